"""CUDA graphs of block steps, with a recording that stands in for the device."""
from __future__ import annotations

import contextlib
import types

import pytest
import torch
from conftest import DATA, EOS_ID, awake, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.data import left_pad
from model import load
from sample import generate


class Recording(TorchDispatchMode):
    """Does on a CPU what a CUDA graph does: keeps the operations of a capture with the very tensors
    that they read and wrote, and runs them again, into the same memory, on replay."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function)  # a host that asks for a value
        made = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, made))
        return made

    def replay(self):
        self.replays += 1
        for function, args, kwargs, made in self.operations:
            again = function(*args, **kwargs)
            for kept, new in zip(tree_leaves(made), tree_leaves(again)):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.mark.parametrize("family, with_memory", [("llada", True), ("dream", False)])
def test_block_steps_replayed_as_a_graph(family, with_memory, monkeypatch):
    """With operations recorded once and replayed in place, a dual cache gives the tokens that it
    gives without: in every block, padded, with guidance, with refreshes and with a memory."""
    graphs, stream = [], types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Recording()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    backbone, _ = load(DATA / family, "cpu")
    memory = awake(backbone, slots=6) if with_memory else None
    ids, pad = left_pad(prompts_of([9, 4, 6]), EOS_ID)
    options = dict(gen_length=12, block_length=6, steps=12, cache="dual", memory=memory,
                   order="low_confidence")
    for more in (dict(), dict(pad_mask=pad), dict(pad_mask=pad, cfg_scale=0.7, refresh=3)):
        plain = generate(backbone, ids, **options, **more)
        backbone.graphs, count = True, len(graphs)
        replayed = generate(backbone, ids, **options, **more)
        backbone.graphs = False
        assert torch.equal(plain.ids, replayed.ids) and plain.forwards == replayed.forwards
        whole = 4 if "refresh" in more else 2
        assert len(graphs) == count + 1 and graphs[-1].replays == plain.forwards - whole
    generate(backbone, ids, **options | dict(cache="prefix"))
    assert len(graphs) == 3
