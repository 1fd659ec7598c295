"""Training along the trajectories that a threshold makes: train.py with one more way to reveal.

    python -m studies.sure --reveal sure --K 4,4,8 --out out/sure            # and all of train.py's
    python -m studies.sure --reveal sure --K 4,4,8 --reset --out out/sure-reset

Under a threshold a sampler commits all that the model is sure of, however much that is, and no step
has a number of its own. docs/results.md says what came of it.
"""
from __future__ import annotations

import sys
from functools import partial

import torch

import train
from lib.options import training_parser


def sure(loss: torch.Tensor, count: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Reveal the surest, and all whose truth has a probability over a threshold from 0.9 to 0.999,
    drawn for each row and step; what `count` (B,) says does not matter, and what is still masked
    after K steps is left out of the loss.  # our choice
    loss (B, n), inf where not masked -> (B, n) bool."""
    doubt = 0.1 ** (1 + 2 * torch.rand(len(loss), 1, generator=generator))
    surest = train.surest(loss, torch.ones_like(count), generator)
    return surest | (loss < -torch.log1p(-doubt).to(loss.device))


def all_at_the_end(length: torch.Tensor, K: int, *_) -> torch.Tensor:
    """(B,) answer lengths -> (B, K): the most that may still be masked at a step is all, for what
    `sure` reveals is known only then."""
    return length[:, None] * (torch.arange(K) == K - 1)


sure.counts = all_at_the_end
REVEALS = {**train.REVEALS, "sure": sure}
parser = partial(training_parser, __doc__, REVEALS)


def main(argv: list[str] | None = None) -> int | None:
    """train.py's command line with one more way to reveal."""
    train.REVEALS, train.parser = REVEALS, parser
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
