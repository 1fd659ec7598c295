"""torch.compile: the same numbers, and compilations that come to an end whatever the shapes."""
from __future__ import annotations

import collections
from dataclasses import replace

import pytest
import torch
from conftest import DATA, MASK_ID, awake, one_prompt, prompts_of
from torch._guards import CompileContext

from model import Backbone, Cache, load, rope
from sample import denoise, generate
from train import unrolled_loss


@pytest.fixture
def compiled(family):
    """(backbone and memory, the same compiled, graphs): an oracle checkpoint's first block, and how
    often each function was compiled, by (function, with gradients or without)."""
    graphs, pairs = collections.Counter(), []

    def backend(graph, inputs):
        graphs[CompileContext.current_compile_id().frame_id, torch.is_grad_enabled()] += 1
        return graph.forward

    for _ in range(2):
        backbone, _ = load(DATA / family, "cpu")
        backbone.blocks = backbone.blocks[:1]
        pairs.append((backbone, awake(backbone, slots=6)))
    torch._dynamo.reset()
    for module in pairs[1]:
        module.compile(backend=backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield *pairs, graphs
    torch._dynamo.reset()


def padding(B: int, T: int, padded: bool) -> torch.Tensor | None:
    """(B, T), the i-th row padded at i positions; None if not padded."""
    return torch.arange(T) >= T - torch.arange(B)[:, None] if padded else None


@torch.no_grad()
def stepped(pair, B: int, T: int, padded: bool, with_memory: bool, cached: bool) -> list:
    """What steps at the last block give: one of the whole sequence, and one of the block alone
    where there is a cache."""
    backbone, memory = pair
    ids, L, outcomes = torch.tensor(prompts_of([T] * B)), 16, []
    ids[:, -L:] = MASK_ID
    state, cache = memory.initial(B), Cache(backbone, B, T) if cached else None
    where = torch.arange(T - L, T).expand(B, -1)
    for first in (0, T - L)[:1 + cached]:
        h, state = denoise(backbone, ids, where, memory=memory if with_memory else None,
                           state=state, span=(T // 2, T - T // 2), cache=cache, first=first,
                           last=T if first else None, pad_mask=padding(B, T, padded))
        outcomes += [h, state]
    return outcomes


def trained(pair, B: int, T: int, padded: bool, checkpointing: bool) -> list:
    """A loss and what it asks of the memory."""
    backbone, memory = pair
    backbone.checkpointing = checkpointing
    ids, pad = torch.tensor(prompts_of([T] * B)), padding(B, T, padded)
    answer = (torch.arange(T) >= T // 2).expand(B, T)
    answer = answer if pad is None else answer & ~pad
    loss = unrolled_loss(backbone, memory, ids, answer, 2, pad_mask=pad)
    return [loss, *torch.autograd.grad(loss, [*memory.parameters()])]


@pytest.mark.parametrize("family, steps, losses", [
    ("dream", [(4, 96, True, False, True), (1, 230, True, True, False), (1, 72, False, True, True)],
     [(1, 72, False, False)]),
    pytest.param(
        "llada", [(1, 64, False, False, True), (4, 96, True, True, True), (2, 33, True, True, True),
                  (1, 230, True, True, False), (16, 64, False, True, False),
                  (1, 4096, False, True, True), (3, 700, True, False, True)],
        [(1, 64, False, False), (4, 96, True, True), (1, 230, True, True), (16, 64, True, False),
         (2, 131, False, True)], marks=pytest.mark.faults)], ids=["few", "many"])
def test_every_shape_is_compiled_for_at_once(compiled, steps, losses):
    """Any mix of lengths from 64 to 4,096 and batches from 1 to 16, with and without padding,
    memory, cache and checkpointing gives what it gives uncompiled, from at most three graphs per
    function and grad mode (one for a single sequence, one for several), and never meets the limit
    of recompilations, behind which torch goes on without compiling. Functions are the blocks, six
    times, and the memory's three parts; most shapes come with `make faults` only, for tracing is
    slow."""
    plain, other, graphs = compiled
    learning = other if len(losses) > 1 else (other[0], plain[1])
    for work, ours, shapes in ((stepped, other, steps), (trained, learning, losses)):
        for shape in shapes:
            for expected, found in zip(work(plain, *shape), work(ours, *shape), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    options = dict(gen_length=16, block_length=8, steps=16, cache="dual")
    (backbone, memory), (same, again) = plain, other
    assert torch.equal(generate(backbone, one_prompt(), memory=memory, **options).ids,
                       generate(same, one_prompt(), memory=again, **options).ids)
    functions = {function for function, _ in graphs}
    assert len(functions) == 9 and max(graphs.values()) <= 3


@pytest.mark.parametrize("layers", [8, 6, 5])
def test_blocks_are_compiled_some_at_a_time(backbone, layers):
    """Four at a time, or what divides their number: the first ones' code serves all, and they give
    what block after block gives."""
    found = []
    deep = Backbone(replace(backbone.config, layers=layers)).initialise(
        torch.Generator().manual_seed(0)).requires_grad_(False)
    e = torch.randn(1, 7, backbone.config.dim)
    angles, expected = rope(deep.config, torch.arange(7), e.dtype), e
    for block in deep.blocks:
        expected = block(expected, angles)
    eager = deep.hidden(e)
    torch._dynamo.reset()
    deep.compile(backend=lambda graph, inputs: found.append(graph) or graph.forward)
    for hidden in (eager, deep.hidden(e)):
        torch.testing.assert_close(hidden, deep.norm(expected))
    torch._dynamo.reset()
    assert len(found) == 1
