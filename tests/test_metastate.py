"""The memory: what it leaves alone untrained, what it reads and writes trained, its arithmetic by
hand, and the files it is kept in."""
from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (DATA, EOS_ID, FAMILIES, MASK_ID, G, P, awake, noise, one_prompt, prompts_of,
                      seeded)
from safetensors import safe_open
from safetensors.torch import save_file

from lib.cli import DTYPES, InputError
from lib.memories import USUAL, new_memory
from lib.data import left_pad
from metastate import AdaptiveNorm, Cut, MetaState, Reset, Shuffled, Updater
from model import DREAM_7B, LLADA_8B, Backbone, load
from sample import ORDERS, denoise, generate
from train import unrolled_loss

SPAN = (P, G)
D = 64                 # width of both oracle checkpoints


def clock(*values: float) -> torch.Tensor:
    """A t for each row."""
    return torch.tensor(values)


def masked_answer(rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, P + G) ids with half of the answer masked, and the answer's positions."""
    ids = torch.tensor(prompts_of([P + G] * rows))
    ids[:, P::2] = MASK_ID
    return ids, torch.arange(P, P + G).expand(rows, G)


# ------------------------------------------------------------------ untrained: nothing changes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_untrained_memory_leaves_the_model_alone(family, dtype):
    """Bit for bit, at the first step and with a state that has moved."""
    backbone, _ = load(DATA / family, "cpu", dtype)
    memory, (ids, where) = MetaState.for_backbone(backbone), masked_answer(rows=2)
    plain, nothing = denoise(backbone, ids, where)
    assert nothing is None
    for state in (memory.initial(2), noise(2, memory.sizes["slots"], memory.sizes["width"])):
        e = backbone.embed(ids)
        assert torch.equal(memory.inject(e, state, clock(0.5, 0.1), SPAN), e)
        h, _ = denoise(backbone, ids, where, memory=memory, state=state, span=SPAN)
        assert torch.equal(h, plain)


SAMPLINGS = [dict(order=order) for order in ORDERS]
SAMPLINGS += [dict(steps=4, block_length=3), dict(order="entropy", block_length=2)]
SAMPLINGS += [dict(order=order, threshold=0.05) for order in ("low_confidence", "maskgit_plus")]
SAMPLINGS += [dict(cfg_scale=1.5, block_length=3), dict(order="low_confidence", temperature=0.7)]
SAMPLINGS += [dict(order="entropy", temperature=0.7, alg_temp=0.5)]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_an_untrained_memory_changes_no_answer(shallow, options):
    """Every order, threshold, guidance and kind of draw on a padded batch: the same seed gives the
    same tokens with an untrained memory as without one, also where a schedule has empty steps."""
    ids, pad_mask = left_pad(prompts_of([7, 1, P]), EOS_ID)
    options = dict(gen_length=6, block_length=6, steps=6) | options
    plain = generate(shallow, ids, pad_mask=pad_mask, **options)
    same = generate(shallow, ids, pad_mask=pad_mask,
                    memory=MetaState.for_backbone(shallow, slots=6), **options)
    assert same.ids.tolist() == plain.ids.tolist()


def test_a_trained_memory_changes_answers(backbone):
    """What the tests above would miss if `generate` ignored its memory."""
    options = dict(gen_length=G, block_length=G, steps=8)
    plain = generate(backbone, one_prompt(), **options)
    changed = generate(backbone, one_prompt(), memory=awake(backbone), **options)
    assert changed.ids.tolist() != plain.ids.tolist()


def test_the_first_step_of_training_moves_the_injector(backbone):
    """A memory at zero output still gets a gradient there, or it would stay untrained forever."""
    memory, (ids, where) = MetaState.for_backbone(backbone), masked_answer()
    h, _ = denoise(backbone, ids, where, memory=memory, state=memory.initial(1), span=SPAN)
    backbone.logits(h).square().mean().backward()
    assert memory.injector.attention.out.weight.grad.abs().max() > 0


# ------------------------------------------------------------------ sizes and dtypes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_state_is_float32_and_as_large_for_any_length(family, dtype):
    """(B, M, D) for a short and a long sequence, and no rounding to the backbone's dtype."""
    backbone, _ = load(DATA / family, "cpu", dtype)
    memory = awake(backbone)
    for rows, length in ((1, 6), (3, 90)):
        ids, state = torch.full((rows, length), MASK_ID), memory.initial(rows)
        shape = (rows, memory.sizes["slots"], memory.sizes["width"])
        for _ in range(2):
            assert state.dtype == torch.float32 and tuple(state.shape) == shape
            _, state = denoise(backbone, ids, torch.zeros(rows, 1, dtype=torch.long),
                               memory=memory, state=state, span=(0, length))
        assert memory.inject(backbone.embed(ids), state, clock(*[0.5] * rows),
                             (0, length)).dtype == DTYPES[dtype]


def test_a_small_change_to_the_state_is_not_lost():
    """The update is computed in float32 whatever the reading's dtype: in bfloat16 1 - 2e-4 is 1."""
    updater = Updater(4, 4)
    with torch.no_grad():
        for p in updater.parameters():
            p.zero_()
        updater.from_c.bias[4:8] = 8.5  # z = sigmoid(8.5), so 1 - z is 2e-4
    state = updater(torch.ones(1, 2, 4), noise(1, 2, 4).bfloat16(), noise(1, 4))
    assert torch.allclose(1 - state, torch.full((1, 2, 4), -8.5).sigmoid(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("config", [LLADA_8B, DREAM_7B], ids=FAMILIES)
def test_the_share_of_parameters_is_the_published_one(config):
    """64 slots of width 1024, and 0.5 to 0.7% of the backbone's weights."""
    fake = SimpleNamespace(config=config, fingerprint=lambda: "x")
    with torch.device("meta"):
        memory = MetaState.for_backbone(fake)
    assert memory.sizes["slots"] == 64 and memory.sizes["width"] == 1024
    assert memory.sizes["dim"] == config.dim
    count = sum(p.numel() for p in memory.parameters())
    assert 0.005 <= count / config.parameters <= 0.007


def test_sizes_can_be_chosen(backbone):
    """Slots and width as given, and the generator decides the weights."""
    memory = MetaState.for_backbone(backbone, slots=5, width=20)
    assert memory.initial(3).shape == (3, 5, 20)
    weights = [MetaState.for_backbone(backbone, generator=seeded(seed))
               .mixer.attention.q.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ------------------------------------------------------------------ arithmetic by hand
def zeroed_updater(width: int = 6, cond: int = 5) -> Updater:
    """An Updater with random weights and modulations of zero."""
    updater, generator = Updater(width, cond), seeded(3)
    with torch.no_grad():
        for p in updater.parameters():
            p.normal_(0.0, 0.7, generator=generator)
        for norm in (updater.norm_c, updater.norm_s):
            for p in norm.parameters():
                p.zero_()
    return updater


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def gru_cell(updater: Updater) -> torch.nn.GRUCell:
    """torch's cell with the Updater's weights."""
    cell = torch.nn.GRUCell(updater.from_c.in_features, updater.from_s.in_features)
    with torch.no_grad():
        for ours, name in ((updater.from_c, "ih"), (updater.from_s, "hh")):
            getattr(cell, f"weight_{name}").copy_(ours.weight)
            getattr(cell, f"bias_{name}").copy_(ours.bias)
    return cell


def test_the_updater_is_a_gru_cell():
    """On a state of root mean square 1, which the norm leaves as it is, and with no modulation."""
    updater, s, c = zeroed_updater(), rms(noise(2, 3, 6)), 5 * noise(2, 3, 6, seed=1)
    expected = gru_cell(updater)(rms(c).view(6, 6), s.view(6, 6)).view(2, 3, 6)
    assert torch.allclose(updater(s, c, noise(2, 5)), expected, atol=1e-5)


def test_the_updater_keeps_the_state_itself_not_its_norm():
    """What z keeps is s: a state of another size comes through at that size."""
    updater, s, c = zeroed_updater(), 4 * rms(noise(2, 3, 6)), noise(2, 3, 6, seed=1)
    z = torch.sigmoid((updater.from_c(rms(c)) + updater.from_s(rms(s)))[..., 6:12])
    expected = gru_cell(updater)(rms(c).view(6, 6), rms(s).view(6, 6)).view(2, 3, 6)
    assert torch.allclose(updater(s, c, noise(2, 5)), expected + z * (s - rms(s)), atol=1e-5)


def test_the_adaptive_norm_by_hand():
    """x / rms(x) * (1 + scale) + shift, one scale and shift for all positions of a row."""
    norm = AdaptiveNorm(6, 5)
    x, cond = 3 * noise(2, 4, 6), noise(2, 5, seed=1)
    with torch.no_grad():
        norm.modulation.weight.copy_(noise(12, 5, seed=2))
        norm.modulation.bias.copy_(noise(12, seed=3))
    for b in range(2):
        scale, shift = (norm.modulation.weight @ cond[b] + norm.modulation.bias).split(6)
        for i in range(4):
            expected = x[b, i] / x[b, i].square().mean().sqrt() * (1 + scale) + shift
            assert torch.allclose(norm(x, cond)[b, i], expected, atol=1e-5)


# ------------------------------------------------------------------ where slots look
@pytest.mark.parametrize("start, length, slots", [(0, 8, 8), (10, 24, 24), (3, 8, 4), (5, 10, 4),
                                                  (2, 3, 6)])
def test_slots_are_spread_evenly_over_the_response(start, length, slots):
    """Each slot's centre is the middle of its share of the response; distances count in slots."""
    memory = MetaState(D, slots, 8, heads=4)
    distance = memory._distance(torch.zeros(1, 40, D), (start, length))
    assert distance.shape == (1, 40, slots)
    per_slot = length / slots
    for slot in range(slots):
        centre = start - 0.5 + per_slot * (slot + 0.5)  # position i covers i - 0.5 to i + 0.5
        for position in range(40):
            expected = abs(position - centre) / per_slot
            assert float(distance[0, position, slot]) == pytest.approx(expected, abs=1e-4)


def test_spans_may_differ_by_row(backbone):
    """(B,) tensors of starts and lengths give each row what its own ints give it."""
    memory, e = awake(backbone), noise(2, 30, D)
    s = noise(2, memory.sizes["slots"], memory.sizes["width"], seed=1)
    starts, lengths, t = torch.tensor([4, 20]), torch.tensor([12, 9]), clock(0.3, 0.8)
    spans = (starts, lengths)
    written, updated = memory.inject(e, s, t, spans), memory.update(s, e, t, spans)
    for i in range(2):
        row, span = slice(i, i + 1), (int(starts[i]), int(lengths[i]))
        for both, alone in ((written, memory.inject(e[row], s[row], t[row], span)),
                            (updated, memory.update(s[row], e[row], t[row], span))):
            assert torch.allclose(both[row], alone, atol=1e-5 * float(alone.detach().abs().max()))


def steep(backbone: Backbone, slots: int) -> MetaState:
    """A memory whose heads all see the nearest position or slot only."""
    memory = awake(backbone, slots=slots)
    with torch.no_grad():
        for attention in (memory.mixer.attention, memory.injector.attention):
            attention.slopes.fill_(60.0)
    return memory


def test_a_steep_bias_ties_slots_to_their_positions(backbone):
    """With as many slots as answer positions slot j reads position P + j and writes to it, and to
    no other: distances are neither transposed nor shifted."""
    memory, h = steep(backbone, slots=8), noise(1, P + 8, D)
    s, t, span = noise(1, 8, memory.sizes["width"], seed=1), clock(0.5), (P, 8)
    for j in (0, 3, 7):
        moved = h.clone()
        moved[0, P + j] += 1
        changed = (memory.update(s, moved, t, span) - memory.update(s, h, t, span)).abs().amax(-1)
        assert changed[0, j] > 1e-3 and changed[0, torch.arange(8) != j].max() < 1e-5
        other = s.clone()
        other[0, j] += noise(memory.sizes["width"], seed=2)
        changed = (memory.inject(h, other, t, span) - memory.inject(h, s, t, span)).abs().amax(-1)
        assert changed[0, P + j] > 1e-3
        assert changed[0, P:][torch.arange(8) != j].max() < 1e-5


def test_heads_begin_local_and_global(backbone):
    """Of four heads two are sharply local at first, slope 4, one less so, and one sees everything
    alike."""
    memory = MetaState.for_backbone(backbone)
    for attention in (memory.mixer.attention, memory.injector.attention):
        assert sorted(attention.slopes.tolist()) == [0.0, 1.0, 4.0, 4.0]


def test_identities_make_slots_differ(backbone):
    """Without the local bias only its identity tells a slot from another: slots of equal state read
    alike without identities, and not with them; which slot holds what matters to the Injector in
    the same way."""
    memory, h, t = awake(backbone, local=False), noise(1, 20, D), clock(0.5)
    alike = noise(1, 1, memory.sizes["width"]).repeat(1, memory.sizes["slots"], 1)
    mixed = noise(1, memory.sizes["slots"], memory.sizes["width"], seed=1)
    for identity in (memory.identity.detach().clone(), torch.zeros_like(memory.identity)):
        with torch.no_grad():
            memory.identity.copy_(identity)
        told_apart = bool(identity.any())
        updated = memory.update(alike, h, t, SPAN)
        assert told_apart == bool((updated - updated[:, :1]).abs().max() > 1e-3)
        turned = memory.inject(h, mixed, t, SPAN) - memory.inject(h, mixed.flip(1), t, SPAN)
        assert told_apart == bool(turned.abs().max() > 1e-3)


# ------------------------------------------------------------------ switches
def results(memory: MetaState, t: float, span: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """What the memory writes, and its next state."""
    e, s = noise(1, 40, D), noise(1, memory.sizes["slots"], memory.sizes["width"], seed=1)
    return memory.inject(e, s, clock(t), span), memory.update(s, e, clock(t), span)


@pytest.mark.parametrize("time", [True, False])
def test_the_time_switch(backbone, time):
    """Results depend on t exactly when time conditioning is on."""
    memory = awake(backbone, time=time)
    for now, later in zip(results(memory, 0.9, SPAN), results(memory, 0.2, SPAN)):
        assert torch.equal(now, later) == (not time)
        assert time == bool((now - later).abs().max() > 1e-3)


@pytest.mark.parametrize("local", [True, False])
def test_the_local_switch(backbone, local):
    """Results depend on where the response lies exactly when the local bias is on."""
    memory = awake(backbone, local=local)
    for here, there in zip(results(memory, 0.5, (0, 12)), results(memory, 0.5, (20, 16))):
        assert torch.equal(here, there) == (not local)
        assert local == bool((here - there).abs().max() > 1e-3)


def test_time_tells_neighbouring_steps_apart(backbone):
    """The shares of a 24-token answer have t_cond that differ, 0 and 1 included."""
    cond = awake(backbone).time(torch.arange(25) / 24)
    gaps = torch.cdist(cond, cond) + torch.eye(25) * 99
    assert gaps.min() > 0.01


# ------------------------------------------------------------------ sampling with a memory
def slow_generate(backbone: Backbone, memory: MetaState, prompt: list[int], gen_length: int,
                  block_length: int, cfg_scale: float) -> list[int]:
    """One token a step by low confidence, written out with a memory for each of the two passes."""
    c, start = backbone.config, len(prompt)
    ids, span = prompt + [MASK_ID] * gen_length, (start, gen_length)
    states = [memory.initial(1), memory.initial(1)]
    for first in range(start, start + gen_length, block_length):
        for _ in range(block_length):
            share = clock(ids[start:].count(MASK_ID) / gen_length)
            both = []
            for i, seen in enumerate((ids, [MASK_ID] * start + ids[start:])):
                e = memory.inject(backbone.embed(torch.tensor([seen])), states[i], share, span)
                h = backbone.hidden(e)
                logits = backbone.logits(h)[0]
                both.append(torch.cat([logits[:1], logits[:-1]]) if c.shift else logits)
                states[i] = memory.update(states[i], h, share, span)
            logits = both[1] + (cfg_scale + 1) * (both[0] - both[1]) if cfg_scale else both[0]
            probability = logits.softmax(-1)
            probability[:, MASK_ID] = -1
            open_ = [i for i in range(first, first + block_length) if ids[i] == MASK_ID]
            best = max(open_, key=lambda i: float(probability[i].max()))
            ids[best] = int(probability[best].argmax())
    return ids


@pytest.mark.parametrize("block_length, cfg_scale", [(4, 1.5), (12, 0.0)])
def test_generate_is_the_slow_loop(shallow, block_length, cfg_scale):
    """Injection, clock, Dream's shift, updates across steps and blocks, and a memory for each pass
    of the guidance: token for token what a hand-written loop gives."""
    memory, prompt = awake(shallow), prompts_of([P])[0]
    result = generate(shallow, torch.tensor([prompt]), memory=memory, gen_length=12, steps=12,
                      block_length=block_length, order="low_confidence", cfg_scale=cfg_scale)
    with torch.no_grad():
        slow = slow_generate(shallow, memory, prompt, 12, block_length, cfg_scale)
    assert result.ids[0].tolist() == slow


def test_the_memory_is_carried_across_blocks(backbone, monkeypatch):
    """The second block begins with the state that the first one left, and what it writes depends on
    it."""
    memory, given, left = awake(backbone), [], []
    inject, update = memory.inject, memory.update
    monkeypatch.setattr(memory, "inject",
                        lambda e, s, *a: given.append((e, s, *a)) or inject(e, s, *a))
    monkeypatch.setattr(memory, "update", lambda *a: left.append(update(*a)) or left[-1])
    generate(backbone, one_prompt(), memory=memory, gen_length=16, block_length=8, steps=8)
    assert len(given) == len(left) == 8  # four steps in each block
    assert torch.equal(given[0][1], memory.initial(1))
    assert all(torch.equal(left[i], given[i + 1][1]) for i in range(7))
    e, s, t, span = given[4]
    assert (s - memory.initial(1)).abs().max() > 0.1
    kept, reset = (backbone.logits(backbone.hidden(inject(e, state, t, span)))
                   for state in (s, memory.initial(1)))
    assert (kept - reset)[:, P + 8:].abs().max() > 1e-3


def test_the_clock_is_the_share_of_the_response_still_masked(backbone, monkeypatch):
    """Over the whole response, not the block; masks in the prompt, which a step before fills, do
    not count, also not where guidance masks all of it."""
    memory, seen = awake(backbone), []
    inject = memory.inject
    monkeypatch.setattr(memory, "inject",
                        lambda e, s, t, span: seen.append(t) or inject(e, s, t, span))
    prompt = one_prompt()
    prompt[0, 2] = MASK_ID
    generate(backbone, prompt, memory=memory, gen_length=16, block_length=8, steps=8,
             order="low_confidence", cfg_scale=1.0)
    assert [t.tolist() for t in seen] == [[1, 1], *([1 - i / 8] * 2 for i in range(8))]


def test_a_memory_runs_where_nothing_is_committed(backbone):
    """A scheduled step that commits nothing still updates the memory; without one it is skipped."""
    options = dict(gen_length=G, block_length=G, steps=G, order="entropy")
    plain = generate(backbone, one_prompt(), **options)
    remembering = generate(backbone, one_prompt(), memory=awake(backbone), **options)
    assert plain.forwards < remembering.forwards == G


# ------------------------------------------------------------------ padding
def test_pads_on_the_left_change_nothing(backbone):
    """Two steps of a padded batch: what predicts the tokens, and the states, are those of the
    prompts one by one."""
    memory, prompts = awake(backbone), prompts_of([3, P, 1])
    ids, pad = left_pad([p + [MASK_ID] * 8 for p in prompts], EOS_ID)
    where = torch.arange(P, P + 8).expand(3, 8)
    state, states = memory.initial(3), [memory.initial(1)] * 3
    for step in range(2):
        h, state = denoise(backbone, ids, where, memory=memory, state=state, span=(P, 8),
                           pad_mask=pad)
        for i, prompt in enumerate(prompts):
            n = len(prompt)
            row = torch.cat([torch.tensor(prompt), ids[i, P:]])[None]
            alone, states[i] = denoise(backbone, row, torch.arange(n, n + 8)[None], memory=memory,
                                       state=states[i], span=(n, 8))
            assert torch.allclose(h[i], alone[0], atol=1e-4)
            assert torch.allclose(state[i], states[i][0], atol=1e-4)
        ids[:, P + step] = 7
    assert (state[0] - state[1]).abs().max() > 1e-2


@pytest.mark.parametrize("options", [
    dict(steps=4), dict(block_length=4, order="entropy"), dict(block_length=4, cfg_scale=1.0),
    dict(order="maskgit_plus", threshold=0.1)], ids=str)
def test_a_padded_batch_with_memory_equals_its_prompts_one_by_one(backbone, options):
    """Neither padding nor neighbours reach a row's memory."""
    options = dict(gen_length=8, block_length=8, steps=8, order="low_confidence") | options
    memory, prompts = awake(backbone), prompts_of((7, 1, P))
    ids, pad = left_pad(prompts, EOS_ID)
    together = generate(backbone, ids, pad_mask=pad, memory=memory, **options)
    for row, prompt in zip(together.ids, prompts, strict=True):
        alone = generate(backbone, torch.tensor([prompt]), memory=memory, **options)
        assert row[-8:].tolist() == alone.ids[0, -8:].tolist()


def test_what_stands_at_a_pad_does_not_matter(backbone):
    """The Mixer never reads a padded position, whatever its hidden state is."""
    memory, h = awake(backbone), noise(2, 20, D)
    s, pad = noise(2, memory.sizes["slots"], memory.sizes["width"]), torch.zeros(2, 20).bool()
    pad[1, :5] = True
    other = h.clone()
    other[1, :5] = 30.0
    first, second = (memory.update(s, x, clock(0.5, 0.5), (8, 12), pad) for x in (h, other))
    assert torch.equal(first, second)
    blind, seeing = (memory.update(s, x, clock(0.5, 0.5), (8, 12)) for x in (h, other))
    assert torch.equal(blind[0], seeing[0]) and not torch.allclose(blind[1], seeing[1], atol=1e-3)


# ------------------------------------------------------------------ gradients
def test_gradients_reach_the_whole_memory_and_nothing_else(backbone):
    """Every parameter of a memory that has begun to learn; no weight of the frozen backbone."""
    memory, ids = awake(backbone), torch.tensor(prompts_of([24, 24]))
    answer = (torch.arange(24) >= 10).expand(2, 24)
    unrolled_loss(backbone, memory, ids, answer, K=3).backward()
    silent = [name for name, p in memory.named_parameters()
              if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    assert all(torch.isfinite(p.grad).all() for p in memory.parameters())
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


# ------------------------------------------------------------------ controls
class Watched:
    """A memory, or a control around one, that keeps the states which its steps begin with."""

    def __init__(self, memory):
        self.memory, self.seen = memory, []
        self.initial, self.update = memory.initial, memory.update

    def inject(self, e, s, t, span):
        self.seen.append(s.clone())
        return self.memory.inject(e, s, t, span)


def states(backbone: Backbone, memory, rows: torch.Tensor) -> torch.Tensor:
    """The states that the steps of a generation began with: (steps, B, M, D)."""
    watched = Watched(memory)
    generate(backbone, rows, memory=watched, gen_length=12, block_length=12, steps=3,
             order="low_confidence")
    return torch.stack(watched.seen)


def test_reset_begins_every_step_alike(backbone):
    """The control without memory: what one step saw is unknown to the next."""
    memory, rows = awake(backbone), torch.tensor(prompts_of([P] * 4))
    plain, reset = states(backbone, memory, rows), states(backbone, Reset(memory), rows)
    assert torch.equal(reset, memory.initial(4).expand(3, -1, -1, -1))
    assert torch.equal(plain[0], reset[0]) and (plain[1] - plain[0]).abs().max() > 0.1


def test_what_is_reset_answers_differently(backbone):
    """The same weights with the state set back after every step: other tokens, so the state and
    not only the Injector decides."""
    options, memory = dict(gen_length=G, block_length=8, steps=16), awake(backbone)
    carried, reset = (generate(backbone, one_prompt(), memory=m, **options).ids.tolist()
                      for m in (memory, Reset(memory)))
    assert carried != reset


def test_shuffled_gives_each_row_the_memory_of_another(backbone):
    """After the first step each row holds the state of the row before it, bit for bit."""
    memory, rows = awake(backbone), torch.tensor(prompts_of([P] * 4))
    plain, shuffled = states(backbone, memory, rows), states(backbone, Shuffled(memory), rows)
    assert torch.equal(shuffled[1], plain[1][[3, 0, 1, 2]])
    assert (plain[1] - plain[1][[3, 0, 1, 2]]).abs().max() > 0.1


def test_shuffled_changes_nothing_among_equals(backbone):
    """Where all rows are the same example. In float64: in float32 the rows of one batch differ on
    some CPUs by rounding, which is not what is asked."""
    memory, backbone = awake(backbone).double(), deepcopy(backbone).double()
    plain, shuffled = (states(backbone, m, one_prompt(3)) for m in (memory, Shuffled(memory)))
    assert torch.allclose(shuffled, plain, atol=1e-5)


def test_cut_ends_gradients_within_a_step(backbone):
    """The same next state; its gradient reaches Mixer and Updater, and neither the state before nor
    the activations."""
    memory, t = awake(backbone), clock(0.5)
    s = noise(1, memory.sizes["slots"], memory.sizes["width"]).requires_grad_()
    h = noise(1, 40, D, seed=1).requires_grad_()
    updated = Cut(memory).update(s, h, t, SPAN)
    assert torch.equal(updated, memory.update(s, h, t, SPAN))
    updated.square().sum().backward()
    assert s.grad is None and h.grad is None
    assert memory.updater.from_c.weight.grad.abs().max() > 0
    assert memory.mixer.attention.kv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("control", [Reset, Shuffled, Cut])
def test_controls_begin_and_write_as_their_memory(backbone, control):
    """Only what a step leaves to the next is another's."""
    memory, t = awake(backbone), clock(0.5)
    wrapped, e = control(memory), noise(1, 40, D)
    s = noise(1, memory.sizes["slots"], memory.sizes["width"], seed=1)
    assert torch.equal(wrapped.initial(2), memory.initial(2))
    assert torch.equal(wrapped.inject(e, s, t, SPAN), memory.inject(e, s, t, SPAN))


# ------------------------------------------------------------------ files
@pytest.mark.parametrize("options", [
    {}, dict(slots=5, width=24, time=False, cond=12), dict(slots=3, local=False)], ids=str)
def test_save_and_load(backbone, tmp_path, options):
    """Sizes, switches, fingerprint and every bit of the weights come back, frozen and in eval
    mode; the same results follow."""
    memory, path = awake(backbone, **options), tmp_path / "new" / "memory.safetensors"
    memory.save(path)
    loaded = MetaState.load(path, backbone)
    assert loaded.sizes == memory.sizes and loaded.fingerprint == backbone.fingerprint()
    assert loaded.state_dict().keys() == memory.state_dict().keys()
    for name, tensor in memory.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    memory.requires_grad_(False)  # attention has another kernel where gradients are wanted
    for ours, theirs in zip(results(memory, 0.4, SPAN), results(loaded, 0.4, SPAN)):
        assert torch.equal(ours, theirs)
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_a_memory_belongs_to_its_backbone(backbones, tmp_path, family):
    """Another family of the same width refuses it, and so does the same network with one matrix
    changed; the file is named."""
    path = tmp_path / "memory.safetensors"
    MetaState.for_backbone(backbones[family]).save(path)
    other = backbones[FAMILIES[1 - FAMILIES.index(family)]]
    tuned, _ = load(DATA / family, "cpu")
    with torch.no_grad():
        tuned.blocks[1].down.weight.mul_(1.01)
    for wrong in (other, tuned):
        with pytest.raises(InputError, match="another backbone") as caught:
            MetaState.load(path, wrong)
        assert str(path) in str(caught.value)


def test_a_file_that_is_missing(backbone, tmp_path):
    """The path is named."""
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="not a MetaState memory") as caught:
            MetaState.load(path, backbone)
        assert str(path) in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_frozen_memory_is_rounded_once(family, dtype, tmp_path):
    """Its matrices are in the backbone's 16 bits, in which every step would multiply them: the same
    hidden states and memory, bit for bit. One that is to be trained keeps its float32."""
    backbone, (ids, where) = load(DATA / family, "cpu", dtype)[0], masked_answer(rows=2)
    memory, path, made = awake(backbone), tmp_path / "memory.safetensors", []
    memory.save(path)
    frozen, trained = MetaState.load(path, backbone), MetaState.load(path, backbone, frozen=False)
    assert frozen.mixer.attention.kv.weight.dtype == backbone.embedding.weight.dtype
    assert frozen.identity.dtype == trained.mixer.attention.kv.weight.dtype == torch.float32
    for one in (memory, frozen, trained):
        state = one.initial(2)
        for _ in range(2):
            h, state = denoise(backbone, ids, where, memory=one, state=state, span=SPAN)
        made.append((h, state))
    assert all(torch.equal(x, y) for other in made[1:] for x, y in zip(made[0], other))
    assert all(p.requires_grad for p in trained.parameters()) and trained.training
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training


@pytest.mark.parametrize("keep", [0.0, 1e-3, 0.5, 0.999])
def test_a_file_that_is_cut_short(backbone, tmp_path, keep):
    """A download that broke off."""
    path = tmp_path / "memory.safetensors"
    MetaState.for_backbone(backbone).save(path)
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match="not a MetaState memory"):
        MetaState.load(path, backbone)


def rewritten(path: Path, memory: MetaState, metadata, **changes) -> Path:
    """The memory's file with other metadata, and with tensors replaced or (None) left out."""
    tensors = {k: v for k, v in (memory.state_dict() | changes).items() if v is not None}
    save_file(tensors, path, None if metadata is None else {"json": json.dumps(metadata)})
    return path


@pytest.mark.parametrize("stated", [{"format": 1}, {}], ids=str)
def test_files_of_format_1(backbone, tmp_path, stated):
    """Files say their format from now on; those from before it was stated are the same."""
    memory, path = awake(backbone), tmp_path / "memory.safetensors"
    memory.save(path)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["json"])["format"] == 1
    known = {"sizes": memory.sizes, "backbone": memory.fingerprint}
    loaded = MetaState.load(rewritten(path, memory, known | stated), backbone)
    assert torch.equal(loaded.identity, memory.identity)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_a_file_of_another_format(backbone, tmp_path, number):
    """One from a later version: the file and its format are named."""
    memory = MetaState.for_backbone(backbone)
    path = rewritten(tmp_path / "memory.safetensors", memory, {
        "format": number, "sizes": memory.sizes, "backbone": memory.fingerprint})
    with pytest.raises(InputError, match="format") as caught:
        MetaState.load(path, backbone)
    assert str(path) in str(caught.value) and repr(number) in str(caught.value)


SIZES = {"dim": D, "slots": 24, "width": 32}


@pytest.mark.parametrize("metadata", [
    None, 3, [], {}, {"sizes": "{", "backbone": "x"}, {"sizes": [1, 2], "backbone": "x"},
    {"sizes": {}, "backbone": "x"}, {"sizes": SIZES | {"colour": 1}, "backbone": "x"},
    {"sizes": SIZES}], ids=str)
def test_a_file_that_says_nothing_of_use(backbone, tmp_path, metadata):
    """Metadata that are absent, broken or too many: a safetensors file of anything."""
    path = rewritten(tmp_path / "memory.safetensors", MetaState.for_backbone(backbone), metadata)
    with pytest.raises(InputError, match="not a MetaState memory"):
        MetaState.load(path, backbone)


@pytest.mark.parametrize("changes", [
    {"start": None}, {"start": torch.zeros(24, 31)}, {"extra": torch.zeros(3)}],
    ids=["missing", "of another shape", "one too many"])
def test_a_file_with_other_tensors(backbone, tmp_path, changes):
    """A tensor is absent, of another shape, or unknown."""
    memory = MetaState.for_backbone(backbone)
    good = {"sizes": memory.sizes, "backbone": backbone.fingerprint()}
    path = rewritten(tmp_path / "memory.safetensors", memory, good, **changes)
    with pytest.raises(InputError, match="not a MetaState memory"):
        MetaState.load(path, backbone)


def test_the_backbone_itself_is_no_memory(backbone, family):
    """The likeliest mistake with two safetensors files at hand."""
    with pytest.raises(InputError, match="not a MetaState memory"):
        MetaState.load(DATA / family / "model.safetensors", backbone)


# ------------------------------------------------------------------ fingerprints
def test_the_fingerprint_is_the_same_in_bfloat16(family):
    """A memory trained on a float32 backbone fits the same one loaded in bfloat16."""
    assert load(DATA / family, "cpu", "bfloat16")[0].fingerprint() == \
        load(DATA / family, "cpu", "float32")[0].fingerprint()


def test_float16_cannot_tell_backbones_apart(backbones, family, tmp_path, capsys):
    """It rounds otherwise than bfloat16 does: a memory is taken, with a note; none is trained."""
    awake(backbones[family]).save(tmp_path / "m.safetensors")
    short, _ = load(DATA / family, "cpu", "float16")
    MetaState.load(tmp_path / "m.safetensors", short)
    assert "not to be seen in float16" in capsys.readouterr().err
    with pytest.raises(InputError, match="--dtype bfloat16"):
        new_memory(USUAL, short, 0)


def test_the_fingerprint_tells_checkpoints_apart(backbones, family):
    """Any parameter that was trained further, the other family, and the same weights under another
    config all count as another backbone."""
    original = backbones[family].fingerprint()
    assert original != backbones[FAMILIES[1 - FAMILIES.index(family)]].fingerprint()
    tuned, _ = load(DATA / family, "cpu")
    assert tuned.fingerprint() == original
    for name, p in tuned.named_parameters():
        kept = p.clone()
        with torch.no_grad():
            p.mul_(1.02).add_(1e-3)
            assert tuned.fingerprint() != original, name
            p.copy_(kept)
    tuned.config = replace(tuned.config, rope_theta=tuned.config.rope_theta + 1)
    assert tuned.fingerprint() != original
