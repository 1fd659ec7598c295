"""CUDA graphs of whole denoising steps, with a recording that stands in for the device."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import EOS_ID, FAMILIES, MASK_ID, awake, prompts_of, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.data import left_pad
from sample import generate


class Recording(TorchDispatchMode):
    """Does on a CPU what a CUDA graph does: keeps the operations of a capture with the very tensors
    that they read and wrote, undoes what they did, and runs them, into the same memory, on replay.
    No operation may ask the host for a value, or draw from a generator that is not registered."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays, self.before, self.generators = [], 0, {}, []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __enter__(self):
        self.drawn = [generator.get_state() for generator in self.generators]
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        for tensor, value in self.before.values():
            tensor.copy_(value)
        for generator, state in zip(self.generators, self.drawn):
            generator.set_state(state)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function), kwargs or {}
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero"))
        assert "rand" not in name or any(torch.equal(
            kwargs["generator"].get_state(), known.get_state()) for known in self.generators)
        for argument, given in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = given.untyped_storage().data_ptr()
                self.before.setdefault(storage, (given, given.clone()))
        made = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, made))
        return made

    def replay(self):
        self.replays += 1
        for function, args, kwargs, made in self.operations:
            again = function(*args, **kwargs)
            for kept, new in zip(tree_leaves(made), tree_leaves(again)):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def graphs(monkeypatch) -> list[Recording]:
    """The graphs that are captured, in a world that believes to have a GPU."""
    found: list[Recording] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found.append(Recording()) or found[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    return found


OPTIONS = [dict(), dict(pad=True), dict(pad=True, cfg_scale=0.7, refresh=3),
           dict(temperature=0.8, top_p=0.9), dict(order="entropy", temperature=0.3, alg_temp=0.5),
           dict(order="origin"), dict(order="random"), dict(order="maskgit_plus", steps=6),
           dict(order="low_confidence", threshold=0.003, stop_at_eos=True),
           dict(pad=True, temperature=0.8, rows=True, holes=2)]


@pytest.mark.parametrize("options, with_memory, family", [
    (options, i % 3 > 0, FAMILIES[i % 2]) for i, options in enumerate(OPTIONS)], ids=str)
def test_steps_replayed_as_graphs(shallow, options, with_memory, graphs, monkeypatch):
    """With operations recorded once and replayed in place, tokens and forwards are what they are
    without, in every block, whole steps and a cache's: the second step of a kind is captured, and
    that and all later ones are replayed. With a prefix cache nothing is, nor where masks of the
    prompt are filled. Each row may have a generator, seeded anew for each block."""
    memory = awake(shallow, slots=6) if with_memory else None
    ids, pad = left_pad(prompts_of([9, 4, 6]), EOS_ID)
    rows, holes = options.get("rows"), options.get("holes", 0)
    ids[:, ids.shape[1] - holes:] = MASK_ID
    options = {name: x for name, x in options.items() if name not in ("rows", "holes")}
    options = dict(gen_length=12, block_length=6, steps=12, memory=memory) | options
    options["pad_mask"] = pad if options.pop("pad", False) else None
    refresh = options.pop("refresh", None)
    for cache in (None, "dual", "prefix"):
        options |= dict(cache=cache, refresh=refresh if cache else None)

        def run():
            return generate(shallow, ids, **options,
                            generator=[*map(seeded, range(3))] if rows else None)

        plain = run()
        monkeypatch.setattr(shallow, "graphs", True)
        replayed = run()
        monkeypatch.setattr(shallow, "graphs", False)
        assert torch.equal(plain.ids, replayed.ids) and plain.forwards == replayed.forwards
        replays = sum(graph.replays for graph in graphs)
        if cache == "prefix":
            assert graphs == []
        else:  # the first of a kind is not replayed; steps that commit nothing are a kind too
            kinds = 1 if cache is None else 2
            assert 0 < plain.forwards - holes - replays <= 2 * kinds
        graphs.clear()


def test_graphs_are_gone_with_their_generation(shallow, graphs, monkeypatch):
    """Nothing that a generation captured waits for Python's collector, which may come while the
    next one captures: to free a graph then breaks the capture (seen on a GPU)."""
    monkeypatch.setattr(shallow, "graphs", True)
    gc.collect()
    gc.disable()
    try:
        generate(shallow, torch.tensor(prompts_of([5])), memory=awake(shallow, slots=6),
                 gen_length=12, block_length=6, steps=12, cache="dual")
        left = [weakref.ref(graph) for graph in graphs]
        graphs.clear()
        assert len(left) == 2 and all(graph() is None for graph in left)
    finally:
        gc.enable()
