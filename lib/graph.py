"""Replaying what a GPU was asked to do."""
from __future__ import annotations

from typing import Callable

import torch


class Replay:
    """Calls of one function of numbers that works in place, on tensors which stay where they are:
    weights, a cache, ids. The second is recorded as a CUDA graph, and from then on a call is one
    launch in place of hundreds; the first compiles and allocates what a recording cannot. A call
    overwrites the result of the one before. The function may ask the host nothing: numbers come to
    it as tensors without dimensions, and its noise from the generators given here.

    The function comes with each call and is not kept: what it belongs to may hold this, and of such
    a circle Python frees the graph at any time, also while another is recorded, which breaks that.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator]):
        self.generators = generator if isinstance(generator, list) else [generator]
        self.called, self.graph = False, None

    def __call__(self, function: Callable, *numbers: float):
        if not self.called:
            self.called = True
            return function(*numbers)
        if self.graph is None:
            device = self.generators[0].device
            self.numbers = [torch.full((), x, device=device) for x in numbers]
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.result = function(*self.numbers)
        for tensor, x in zip(self.numbers, numbers):
            tensor.fill_(x)
        self.graph.replay()
        return self.result
