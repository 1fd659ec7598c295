"""Programs built on the heart, each run as `python -m studies.NAME`: how the shipped checkpoints
were made, memory in fast weights, what one forward knows, what training takes."""
import lib.interrupts  # noqa: F401  before all else, for Ctrl-C while that is imported
