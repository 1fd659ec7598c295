"""Examples made ahead of time, in processes of their own: a small model on a GPU eats them faster
than one process makes them."""
from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Callable, Hashable

import torch

from lib.run import processes


class Ahead:
    """A function whose results are made by other processes before they are asked for: whoever asks
    for one has those of the next `depth` keys started. after(key) is the key that will be asked for
    next. Results are tensors, None, and lists or tuples of these; function and keys are pickled."""

    def __init__(self, function: Callable, after: Callable[[Hashable], Hashable], workers: int):
        self.function, self.after, self.depth, self.started = function, after, 2 * workers, {}
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepared)

    def __call__(self, key: Hashable):
        wanted = key
        for _ in range(self.depth):
            if key not in self.started:
                self.started[key] = self.pool.submit(_arrays_of, self.function, key)
            key = self.after(key)
        return _changed(self.started.pop(wanted).result(), torch.from_numpy)


def ahead(function: Callable, after: Callable, device: str | torch.device | None) -> Callable:
    """function(key), made ahead by all cores but one where the device is a GPU; elsewhere the
    function itself, for there it would take the cores from the model."""
    workers = (len(os.sched_getaffinity(0)) - 1) // processes()[1]
    if not str(device).startswith("cuda") or workers < 1:
        return function
    return Ahead(function, after, workers)


def _prepared() -> None:
    """A worker: one thread, and Ctrl-C is for the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _arrays_of(function: Callable, key: Hashable):
    """The function's result without torch's tensors, which hold an open file each on their way."""
    return _changed(function(key), torch.Tensor.numpy)


def _changed(x, change: Callable):
    """change(leaf) for every leaf of lists and tuples that is not None."""
    if isinstance(x, (list, tuple)):
        return type(x)(_changed(part, change) for part in x)
    return None if x is None else change(x)
