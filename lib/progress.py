"""Long work says on stderr that it goes on: a bar on a terminal, elsewhere a line now and then."""
from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Callable, Iterator, Sequence

from tqdm import tqdm

from lib.terminal import printable

PATIENCE = 3.0   # seconds until the first line
RARELY = 60.0    # seconds between lines at most: each waits twice as long as the one before


@contextlib.contextmanager
def slow(what: str, so_far: Callable[[], str] = str,
         silent: bool = False) -> Iterator[threading.Event]:
    """Around work that may take long, as a context or a decorator: says after a few seconds what
    goes on, with what so_far() gives, and then ever more rarely. Setting the event that it gives
    ends that early, and `silent`, where something else shows it, before it begins."""
    done, started = threading.Event(), time.monotonic()
    if silent:
        done.set()

    def speak() -> None:
        pause = PATIENCE
        while not done.wait(pause):
            line = f"{what}{so_far()}: {time.monotonic() - started:.0f} s so far"
            with contextlib.suppress(OSError, ValueError):  # nobody listens
                tqdm.write(printable(line), file=sys.stderr)
            pause = min(2 * pause, RARELY)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield done
    finally:
        done.set()
        speaker.join()


def say(line: str) -> None:
    """Print a line on stdout at once, above whatever bar there is."""
    tqdm.write(line)
    sys.stdout.flush()


def progress(work: Sequence, what: str, start: int = 0, bar: bool = True) -> Iterator:
    """The pieces of long work, one by one, of which `start` were done before: on a terminal with a
    bar, unless something else stands there, else with lines as of `slow`."""
    total = start + len(work)
    if bar and sys.stderr.isatty():
        yield from tqdm(work, what, total=total, initial=start)
        return
    done = start
    with slow(what, lambda: f", {done} of {total}"):
        for piece in work:
            yield piece
            done += 1
