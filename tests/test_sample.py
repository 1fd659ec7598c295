"""The samplers: token for token against the published ones, and what holds of any decoding."""
from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import (DATA, EOS_ID, FAMILIES, MASK_ID, G, P, awake, boosted, one_prompt,
                      prompts_of, seeded)

import sample
from lib.cli import InputError
from lib.data import left_pad
from lib.options import decoding
from model import DREAM_7B, LLADA_8B, Backbone, Cache, load
from sample import LLADA_ORDERS, ORDERS, Commit, Sample, choose, denoise, generate, plan, propose

# ------------------------------------------------------------------ the published samplers
LLADA_KEYS = {f"steps{s}_block{b}_low_confidence_t0": dict(steps=s, block_length=b)
              for s, b in [(32, 32), (32, 8), (16, 32), (16, 8)]}
LLADA_KEYS["steps16_block8_cfg1.5"] = dict(steps=16, block_length=8, cfg_scale=1.5)
LLADA_BATCH = {"batch_steps16_block8_new_hf": dict(steps=16, block_length=8)}
LLADA_FAST = {f"fast_plain_block8_steps32_th{threshold}":
              dict(steps=32, block_length=8, threshold=threshold)
              for threshold in (None, 0.04, 0.08, 0.9)}
DREAM_KEYS = {f"{order}_steps{s}_t0": dict(steps=s, block_length=32, order=order)
              for order in ("entropy", "maskgit_plus", "topk_margin") for s in (32, 16, 12)}
DREAM_BATCH = {"batch_entropy_steps16_t0": dict(steps=16, block_length=32, order="entropy")}
DREAM_FAST = {f"fast_nocache_threshold{threshold}_steps8":
              dict(steps=8, block_length=32, threshold=threshold)
              for threshold in (0.04, 0.08, 0.9)}
CACHED = {"llada": {f"fast_{cache}_block8_steps32_th{threshold}":
                    dict(steps=32, block_length=8, threshold=threshold, cache=cache)
                    for cache in ("prefix", "dual") for threshold in (None, 0.04, 0.08, 0.9)},
          "dream": {f"fast_{cache}_{name}_block8_steps32":
                    dict(steps=32, block_length=8, cache=cache, **options)
                    for cache in ("prefix", "dual") for name, options in (
                        ("confidence_threshold0.08", dict(threshold=0.08)),
                        ("confidence_threshold0.9", dict(threshold=0.9)),
                        ("entropy0.9", dict(order="entropy")))}}  # the 0.9 is not used there
MATCHED = {"llada": {**LLADA_KEYS, **LLADA_BATCH, **LLADA_FAST, **CACHED["llada"]},
           "dream": {**DREAM_KEYS, **DREAM_BATCH, **DREAM_FAST, **CACHED["dream"]}}
ALL_KEYS = [(family, key) for family, keys in MATCHED.items() for key in keys]


@pytest.mark.parametrize("family, key", ALL_KEYS)
def test_tokens_equal_the_published_samplers(backbones, published, family, key):
    """Official samplers, batches of padded prompts, guidance and Fast-dLLM's threshold and caches:
    the same ids, and for Fast-dLLM the same number of forwards, but for one thing: where a block is
    whole after its first step, its cached samplers run one more forward, which commits nothing."""
    expected = published[family]
    prompt, pad_mask = expected["prompt"], None
    if key.startswith("batch_"):
        prompt, pad_mask = expected["batch_prompt"], expected["batch_attention_mask"] == 0
        assert pad_mask.any()
    steps: list[torch.Tensor] = []
    result = generate(backbones[family], prompt, pad_mask=pad_mask, gen_length=G,
                      on_step=lambda step: steps.append(step.fresh[0]), **MATCHED[family][key])
    assert result.ids.tolist() == expected[key].tolist()
    if f"{key}_nfe" in expected:
        idle = sum(int(fresh.sum()) == 8 for fresh in steps) if key in CACHED[family] else 0
        assert result.forwards + idle == int(expected[f"{key}_nfe"])


def test_eos_in_the_middle_equals_the_published_sampler(eos_liking, published):
    """A head that likes EOS: the official sampler decodes on behind it, and so do we."""
    expected = published["llada"]["eosboost_steps32_block32_plain"]
    result = generate(eos_liking, published["llada"]["prompt"], gen_length=G, steps=32)
    assert EOS_ID in expected[0, P:-1] and result.ids.tolist() == expected.tolist()


def test_no_published_output_is_overlooked(published):
    """Every temperature-0 key of the oracles is matched above."""
    elsewhere = ("seed0", "_inf", "eosboost", "_nfe")
    for family in FAMILIES:
        keys = {k for k in published[family] if not any(word in k for word in elsewhere)}
        assert keys - {"prompt", "batch_prompt", "batch_attention_mask"} == MATCHED[family].keys()


@pytest.fixture
def eos_liking(published) -> Backbone:
    """The oracle's second LLaDA head, which predicts EOS here and there."""
    backbone, _ = load(DATA / "llada", "cpu")
    backbone.head.weight.copy_(published["llada"]["eosboost_ff_out_weight"])
    return backbone


@torch.no_grad()
def llada_loop(backbone: Backbone, prompt: list[int], gen_length: int, block_length: int,
               steps: int) -> list[int]:
    """LLaDA's published sampling by hand: low-confidence remasking in blocks, at temperature 0.
    Masks in the prompt are ours: a block before the others."""
    ids = prompt + [MASK_ID] * gen_length
    blocks = [(range(i, i + block_length), steps * block_length // gen_length)
              for i in range(len(prompt), len(ids), block_length)]
    if holes := [i for i, x in enumerate(prompt) if x == MASK_ID]:
        blocks.insert(0, (holes, math.ceil(steps * len(holes) / (gen_length or len(holes)))))
    for places, number in blocks:
        each, rest = divmod(len(places), number)
        for step in range(number):
            logits = backbone(torch.tensor([ids]))[0]
            probability = logits.softmax(-1)
            logits[:, MASK_ID] = -math.inf
            best = logits.argmax(-1)
            still = [i for i in places if ids[i] == MASK_ID]
            still.sort(key=lambda i: -float(probability[i, best[i]]))
            for i in still[:each + (step < rest)]:
                ids[i] = int(best[i])
    return ids


@pytest.mark.parametrize("gen_length, block_length, steps", [(8, 8, 8), (24, 8, 9), (20, 4, 5),
                                                             (12, 6, 24)])
def test_with_nothing_switched_on_it_is_lladas_loop(backbones, gen_length, block_length, steps):
    """The defaults are the twenty lines above, for other sizes than the published outputs have."""
    prompt, backbone = prompts_of([9], seed=4)[0], backbones["llada"]
    result = generate(backbone, torch.tensor([prompt]), gen_length=gen_length,
                      block_length=block_length, steps=steps)
    assert result.ids[0].tolist() == llada_loop(backbone, prompt, gen_length, block_length, steps)


# ------------------------------------------------------------------ one step
@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_denoise_gives_what_predicts_the_tokens_at_where(backbone, padded):
    """Positions of any order, one of them twice: the head makes of each hidden state the logits of
    that position's token, for Dream those one to the left (the first has nothing there)."""
    ids, where = torch.tensor(prompts_of((14, 14))), torch.tensor([[0, 13, 5], [7, 7, 2]])
    pads = torch.arange(14) < torch.tensor([[0], [3]]) if padded else None
    logits = backbone(ids, pads)
    if backbone.config.shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    h, state = denoise(backbone, ids, where, pad_mask=pads)
    assert state is None and h.shape == (2, 3, backbone.config.dim)
    expected = torch.stack([row[at] for row, at in zip(logits, where)])
    torch.testing.assert_close(backbone.logits(h), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_denoise_with_a_cache_computes_a_slice(backbone):
    """`where` stays absolute: with nothing changed since the whole was computed, a slice gives the
    same hidden states (but for Dream's first, which stands outside of it)."""
    ids, kept = torch.tensor(prompts_of((14, 14))), Cache(backbone, 2, 14)
    where = torch.tensor([[7, 9, 11]] * 2)
    whole, _ = denoise(backbone, ids, where, cache=kept)
    part, _ = denoise(backbone, ids, where, cache=kept, first=6, last=12)
    torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


def test_the_head_sees_the_block_in_every_step(backbone):
    """One fixed shape, whatever is still masked, and no position outside of the block."""
    rows = []
    handle = backbone.head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    try:
        generate(backbone, one_prompt(2), gen_length=G, block_length=8, steps=G,
                 order="low_confidence")
    finally:
        handle.remove()
    assert rows == [(2, 8, 64)] * G


# ------------------------------------------------------------------ batches
SETTINGS = {
    "llada": [dict(steps=4), dict(steps=16, block_length=8), dict(steps=8, cfg_scale=1.5),
              dict(steps=16, block_length=8, threshold=0.06)],
    "dream": [dict(steps=4, order="entropy"), dict(steps=16, order="maskgit_plus", block_length=8),
              dict(steps=8, order="topk_margin", cfg_scale=0.5), dict(steps=4, threshold=0.15)]}


@pytest.mark.parametrize("family, options", [(f, o) for f in FAMILIES for o in SETTINGS[f]],
                         ids=str)
def test_a_padded_batch_equals_its_prompts_one_by_one(backbones, family, options):
    """Neither the padding nor the neighbours nor their pace change what a prompt is answered, also
    for a prompt of one token, whose first logits under Dream's shift come from that token."""
    prompts = prompts_of(lengths=(7, 1, 11))
    ids, pad_mask = left_pad(prompts, EOS_ID)
    options = dict(gen_length=16, block_length=16) | options
    together = generate(backbones[family], ids, pad_mask=pad_mask, **options)
    alone = [generate(backbones[family], torch.tensor([p]), **options) for p in prompts]
    for row, single in zip(together.ids, alone, strict=True):
        assert row[-16:].tolist() == single.ids[0, -16:].tolist()
    if options["block_length"] == 16:  # with several, all wait for the slowest in each
        assert together.forwards == max(single.forwards for single in alone)
    assert len({tuple(single.ids[0, -16:].tolist()) for single in alone}) == len(prompts)


# ------------------------------------------------------------------ caches
CACHES = pytest.mark.parametrize("cache", ["prefix", "dual"])


@pytest.mark.parametrize("cache, options", [
    ("dual", dict(order="low_confidence")), ("prefix", dict(order="random")),
    ("prefix", dict(order="entropy", steps=4)), ("dual", dict(order="origin")),
    ("prefix", dict(threshold=0.06, order="low_confidence")), ("dual", dict(cfg_scale=1.5))],
    ids=str)
def test_a_cache_refreshed_at_every_step_is_no_cache(shallow, cache, options):
    """Ids and forwards, with every way to commit, for a padded batch, with a memory that writes.
    Either kind of cache then computes the whole sequence, so that each way needs one."""
    ids, pad_mask = left_pad(prompts_of((7, 3, 11)), EOS_ID)
    memory = awake(shallow, slots=6)
    options = dict(gen_length=8, block_length=4, steps=8) | options
    options |= dict(pad_mask=pad_mask, memory=memory)
    plain = generate(shallow, ids, **options)
    cached = generate(shallow, ids, cache=cache, refresh=1, **options)
    assert torch.equal(plain.ids, cached.ids) and plain.forwards == cached.forwards


@CACHES
@pytest.mark.parametrize("family", FAMILIES)
def test_only_stale_keys_tell_a_cache_from_none(backbones, family, cache):
    """The hidden states of a slice are those of the whole sequence while nothing has changed, and
    come from the old keys where something has; with padding too."""
    backbone = backbones[family]
    ids, pad_mask = left_pad(prompts_of((24, 19)), EOS_ID)
    kept = Cache(backbone, 2, 24)
    slice_ = slice(10, 16 if cache == "dual" else 24)

    def part() -> torch.Tensor:
        return backbone.hidden(backbone.embed(ids[:, slice_]), pad_mask, kept, 10)

    whole = backbone.hidden(backbone.embed(ids), pad_mask, kept)
    assert torch.equal(whole, backbone.hidden(backbone.embed(ids), pad_mask))
    assert torch.allclose(part(), whole[:, slice_], atol=1e-5)
    ids[:, 8] = 3  # before the slice: unseen
    assert torch.allclose(part(), whole[:, slice_], atol=1e-5)
    ids[:, 12] = 3
    changed, keys = part(), torch.stack(kept.k)
    assert not torch.allclose(changed, whole[:, slice_], atol=1e-3)
    outside = [i for i in range(24) if not 10 <= i < (slice_.stop or 24)]
    backbone.hidden(backbone.embed(ids), pad_mask, kept)
    assert not torch.allclose(torch.stack(kept.k)[1:, ..., outside, :],
                              keys[1:, ..., outside, :], atol=1e-4)


@pytest.mark.parametrize("family, options, cache", [
    (family, options, ("prefix", "dual")[i % 2]) for i, family in enumerate(FAMILIES)
    for i, options in enumerate(SETTINGS[family], i)], ids=str)
def test_a_cached_padded_batch_equals_its_prompts_one_by_one(backbones, family, options, cache):
    """As without a cache, in blocks, and with one refresh within a block."""
    prompts = prompts_of(lengths=(7, 1, 11))
    ids, pad_mask = left_pad(prompts, EOS_ID)
    options = options | dict(gen_length=16, block_length=8, steps=8, cache=cache, refresh=3)
    together = generate(backbones[family], ids, pad_mask=pad_mask, **options)
    for row, p in zip(together.ids, prompts, strict=True):
        single = generate(backbones[family], torch.tensor([p]), **options)
        assert row[-16:].tolist() == single.ids[0, -16:].tolist()


@CACHES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_computes_what_it_should(backbones, family, cache, monkeypatch):
    """The whole sequence at a block's first step and at each refresh, else the block and what
    follows, or the block alone; the memory writes to and reads just that, at its own places."""
    backbone, lengths, spans = backbones[family], [], []
    hidden = backbone.hidden
    monkeypatch.setattr(backbone, "hidden", lambda e, pads, kept, start: (
        lengths.append((start, e.shape[1])), hidden(e, pads, kept, start))[1])
    memory = awake(backbone)
    update = memory.update
    monkeypatch.setattr(memory, "update", lambda s, h, t, span, pads: (
        spans.append((int(span[0]), int(span[1]), h.shape[1])), update(s, h, t, span, pads))[1])
    generate(backbone, torch.tensor(prompts_of((5,))), gen_length=12, block_length=6, steps=12,
             order="low_confidence", cache=cache, refresh=4, memory=memory)
    expected = []
    for start in (5, 11):
        part = (start, 6 if cache == "dual" else 17 - start)
        expected += [(0, 17), part, part, part, (0, 17), part]
    assert lengths == expected
    assert spans == [(5 - first, 12, length) for first, length in expected]


@pytest.mark.parametrize("family, options, words", [
    ("llada", dict(cache="triple"), ["triple", "prefix", "dual"]),
    ("llada", dict(refresh=2), ["refresh", "cache"]),
    ("llada", dict(cache="dual", refresh=0), ["refresh", "0"]),
    ("dream", dict(cache="dual", steps=4), ["2 steps"])], ids=str)
def test_caches_that_cannot_be(backbones, family, options, words):
    """Unknown names, a refresh of nothing, and Dream with no step left for the rest of a block."""
    with pytest.raises(InputError) as error:
        generate(backbones[family], torch.tensor(prompts_of((5,))),
                 **dict(gen_length=G, block_length=8, steps=G) | options)
    assert all(word in str(error.value) for word in words)


def test_a_pad_mask_that_pads_nothing_is_no_pad_mask(backbone):
    """An all-False mask does not even change the rounding."""
    nothing = torch.zeros(1, P, dtype=torch.bool)
    options = dict(gen_length=8, block_length=8, steps=8)
    assert torch.equal(generate(backbone, one_prompt(), pad_mask=nothing, **options).ids,
                       generate(backbone, one_prompt(), **options).ids)


# ------------------------------------------------------------------ what holds of every decoding
VARIANTS = [dict(order=order) for order in ORDERS] + [
    dict(threshold=0.5), dict(threshold=0.0), dict(threshold=2.0), dict(block_length=4),
    dict(temperature=1.0), dict(temperature=1.0, order="random"),
    dict(temperature=0.5, top_p=0.9, top_k=5, order="entropy"), dict(temperature=2.0, top_k=1),
    dict(order="topk_margin", temperature=1.0, top_p=0.01), dict(order="entropy", alg_temp=0.5),
    dict(cfg_scale=1.5), dict(temperature=1.0, threshold=0.5, block_length=4),
    dict(order="maskgit_plus", steps=4), dict(order="origin", steps=4), dict(steps=16)]


def watched(backbone, *args, **options) -> tuple[Sample, list[Sample]]:
    """`generate`, and a copy of every step that it shows."""
    steps = []
    result = generate(backbone, *args, **options, on_step=lambda step: steps.append(
        step._replace(ids=step.ids.clone(), fresh=step.fresh.clone())))
    return result, steps


@pytest.mark.parametrize("options, mask_favoured", [
    *((options, False) for options in VARIANTS), *((options, True) for options in VARIANTS[:8:2]),
    *((options, True) for options in VARIANTS[8::4])], ids=str)
def test_every_position_is_settled_once(shallow, options, mask_favoured, monkeypatch):
    """Whatever the order: the loop ends within the scheduled steps or one per position, the mask is
    never committed even where its logit is the largest (`propose` is asked for every order below),
    each step's fresh positions are new, and together they are the answer."""
    options = dict(gen_length=8, block_length=8, steps=8) | options
    calls, hidden = [], shallow.hidden
    monkeypatch.setattr(shallow, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k))
    prompt = one_prompt(rows=2)
    with boosted(shallow, MASK_ID, 1e4 if mask_favoured else 0.0):
        result, steps = watched(shallow, prompt, **options)
    assert result.ids.shape == (2, P + 8)
    assert torch.equal(result.ids[:, :P], prompt)
    assert not (result.ids == MASK_ID).any()
    assert result.forwards == len(calls) <= max(options["steps"], 8)
    assert [step.forwards for step in steps] == list(range(1, result.forwards + 1))
    settled = torch.zeros_like(result.ids, dtype=torch.bool)
    settled[:, :P] = True
    for step in steps:
        assert not (settled & step.fresh).any()
        settled |= step.fresh
        assert torch.equal(step.ids == MASK_ID, ~settled)
        assert torch.equal(step.ids[settled], result.ids[settled])  # and never revised
    assert settled.all()
    assert 0 <= steps[0].seconds <= steps[-1].seconds <= result.seconds


@pytest.mark.parametrize("options", [dict(), dict(threshold=0.03), dict(order="random"),
                                     dict(order="entropy")], ids=str)
def test_blocks_are_settled_from_left_to_right(shallow, options):
    """Semi-autoregressive: no step commits beyond the leftmost block that has a mask."""
    _, steps = watched(shallow, one_prompt(2), gen_length=G, block_length=8, steps=16, **options)
    for step in steps:
        blocks = step.fresh[:, P:].reshape(2, 4, 8).any(2).any(0)               # (4,)
        current = int(blocks.byte().argmax())
        assert blocks.sum() == 1
        assert not (step.ids[:, P:P + 8 * current] == MASK_ID).any()
    assert torch.equal(steps[-1].ids != MASK_ID, torch.ones_like(steps[-1].fresh))


@torch.no_grad()
def test_one_step_is_the_argmax_of_one_forward(backbone):
    """Each answer position gets the logits that are its own: for Dream those one to the left."""
    ids = torch.cat([one_prompt(), torch.full((1, 8), MASK_ID)], 1)
    logits = backbone(ids)
    if backbone.config.shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    logits[..., MASK_ID] = -torch.inf
    result = generate(backbone, one_prompt(), gen_length=8, block_length=8, steps=1,
                      order="maskgit_plus")
    assert result.forwards == 1 and torch.equal(result.ids[:, P:], logits[:, P:].argmax(-1))


def test_confidences_are_float32_on_a_bfloat16_model(family, monkeypatch):
    """In bf16 confidences tie, and the leftmost position would win."""
    backbone, _ = load(DATA / family, "cpu", "bfloat16")
    seen = []

    def spy(logits, *args, **options):
        candidate, confidence = propose(logits, *args, **options)
        seen.extend([logits.dtype, confidence.dtype])
        return candidate, confidence

    monkeypatch.setattr(sample, "propose", spy)
    generate(backbone, one_prompt(), gen_length=8, block_length=8, steps=8)
    assert set(seen) == {torch.float32}


def test_guidance_fades_into_no_guidance(shallow):
    """With a scale next to nothing the guided logits are the conditional ones, padded or not; with
    a real scale they are not."""
    ids, pad_mask = left_pad(prompts_of([11, 5]), EOS_ID)
    options = dict(pad_mask=pad_mask, gen_length=G, steps=16, order="maskgit_plus")
    plain = generate(shallow, ids, **options).ids
    assert torch.equal(generate(shallow, ids, cfg_scale=1e-9, **options).ids, plain)
    assert not torch.equal(generate(shallow, ids, cfg_scale=1.5, **options).ids, plain)


# ------------------------------------------------------------------ schedules
def lladas_counts(length: int, steps: int) -> list[int]:
    """As LLaDA's get_num_transfer_tokens has it: evenly, the remainder first."""
    return [length // steps + (i < length % steps) for i in range(steps)]


def dreams_counts(length: int, steps: int) -> list[int]:
    """As Dream's loop has it: int(masked * (1 - s/t)), and in the last step all that is left."""
    masked, counts, times = length, [], torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        share = 1 - times[i + 1] / times[i]
        counts.append(int(masked * share) if i < steps - 1 else masked)
        masked -= counts[-1]
    return counts


SIZES = pytest.mark.parametrize("length, steps", [
    (32, 16), (32, 12), (32, 32), (8, 3), (8, 1), (8, 16), (7, 30), (1, 5), (64, 48)])


@SIZES
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "origin"])
def test_counts_are_those_of_the_published_samplers(order, length, steps):
    """Either family runs either's orders; steps behind the one that settles the block are left
    out."""
    published = (lladas_counts if order in LLADA_ORDERS else dreams_counts)(length, steps)
    for config in (LLADA_8B, DREAM_7B):
        commits = plan(config, order, None, length, steps)
        counts = [commit.count for commit in commits]
        assert counts + [0] * (steps - len(counts)) == published
        assert {commit.threshold for commit in commits} == {math.inf} and sum(counts) == length


@pytest.mark.parametrize("order, length, steps, counts", [
    ("low_confidence", 32, 12, [3] * 8 + [2] * 4), ("low_confidence", 8, 16, [1] * 8),
    ("entropy", 32, 16, [1] + [2] * 14 + [3]), ("entropy", 8, 3, [2, 2, 4])], ids=str)
def test_counts_in_figures(order, length, steps, counts):
    """What the two formulas above come to."""
    assert [commit.count for commit in plan(LLADA_8B, order, None, length, steps)] == counts


@SIZES
def test_origin_is_a_threshold_on_uniform_numbers(length, steps):
    """A number above s/t, whose chance is 1 - s/t, is committed; the last step takes the rest."""
    *commits, last = plan(DREAM_7B, "origin", None, length, steps)
    times = torch.linspace(1, 1e-3, steps + 1)
    assert [commit.threshold for commit in commits] == pytest.approx(
        (times[1:] / times[:-1])[:-1].tolist())
    assert {commit.count for commit in commits} <= {0} and last.count == length


def test_thresholds_commit_one_at_least(family):
    """Whatever the order's schedule says, the surest is committed, and for Dream no more of a
    block in all than its steps so far would do evenly; LLaDA's have no such limit."""
    config = {"llada": LLADA_8B, "dream": DREAM_7B}[family]
    commits = plan(config, "maskgit_plus", 0.9, 8, 3)
    assert len(commits) == 8 and {commit[:2] for commit in commits} == {(1, 0.9)}
    most = [3, 6, 8] if config.shift else [8, 8, 8]
    assert [min(commit.most, 8) for commit in commits] == most + [8] * 5


@pytest.mark.parametrize("order", ["low_confidence", "entropy", "origin"])
def test_a_leading_step_commits_one_position(order):
    """With a cache Dream's first step of a block can predict its first position alone."""
    commits = plan(DREAM_7B, order, None, 8, 4, leading=True)
    assert commits[0] == Commit(1) and len(commits) == 4
    assert order == "origin" or sum(commit.count for commit in commits) == 8


@pytest.mark.parametrize("order", ["low_confidence", "maskgit_plus", "entropy"])
@pytest.mark.parametrize("steps", [3, 16])
def test_every_block_follows_the_plan(shallow, order, steps):
    """Each block gets steps / blocks steps, and the schedule begins anew in each; a step that has
    nothing to commit is not run."""
    _, seen = watched(shallow, one_prompt(), gen_length=16, block_length=8, steps=2 * steps,
                      order=order)
    counts = [commit.count for commit in plan(shallow.config, order, None, 8, steps)]
    assert [int(step.fresh.sum()) for step in seen] == [n for n in counts if n] * 2


def test_origin_commits_with_the_published_chance(shallows):
    """Dream's "origin": a masked position is committed with probability 1 - s/t, so that of n
    masked ones the k-th of K steps leaves n (1 - k/K) on average (to eps and four deviations)."""
    rows, length, steps = 200, 16, 4
    _, seen = watched(shallows["dream"], one_prompt(rows), gen_length=length, steps=steps,
                      block_length=length, order="origin")
    left = 1.0
    for k, step in enumerate(seen):
        expected = 1 - (1 - 1e-3) * (k + 1) / steps if k < steps - 1 else 0.0
        deviation = (expected * (1 - expected) / (rows * length)) ** 0.5
        left -= float(step.fresh[:, P:].float().mean())
        assert abs(left - expected) <= 4 * deviation + 1e-6
    assert len(seen) == steps


@pytest.mark.parametrize("threshold, forwards", [(0.0, 1), (1.1, 8)])
def test_thresholds_at_the_ends(backbones, threshold, forwards):
    """A threshold that all reach takes one forward, one that none reaches one per position."""
    result = generate(backbones["llada"], one_prompt(), gen_length=8, block_length=8, steps=8,
                      threshold=threshold)
    assert result.forwards == forwards


def test_a_threshold_commits_what_reaches_it_and_the_surest(backbones):
    """Fast-dLLM's rule, checked against the confidences of every step."""
    backbone, threshold = backbones["llada"], 0.1
    ids = torch.cat([one_prompt(), torch.full((1, 16), MASK_ID)], 1)
    _, steps = watched(backbone, one_prompt(), gen_length=16, block_length=16, steps=16,
                       threshold=threshold)
    assert 1 < len(steps) < 16
    for step in steps:
        with torch.no_grad():
            confidence = backbone(ids).softmax(-1).amax(-1)
        confidence[ids != MASK_ID] = -1.0
        expected = (confidence >= threshold) | (confidence == confidence.max())
        assert torch.equal(step.fresh, expected)
        ids = step.ids


# ------------------------------------------------------------------ which positions are chosen
NEVER = -math.inf  # the confidence of a position that cannot be committed


def chosen(confidence: list[float], *commit, committed: int = 0) -> list[int]:
    """The positions of one row that are committed."""
    [row] = choose(torch.tensor([confidence]), Commit(*commit), torch.tensor([[committed]]))
    return row.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("confidence, count, expected", [
    ([0.1, 0.4, 0.3, 0.2], 0, []), ([0.1, 0.4, 0.3, 0.2], 2, [1, 2]),
    ([0.5, 0.5, 0.5], 1, [0]), ([0.5, 0.5, 0.5], 2, [0, 1]), ([-3.0, -1.0, -2.0], 1, [1]),
    ([NEVER, 0.1, NEVER, 0.2], 3, [1, 3]), ([NEVER, NEVER], 1, [])], ids=str)
def test_so_many_of_the_surest_are_chosen(confidence, count, expected):
    """The most confident, of equals the leftmost, and never one that cannot be."""
    assert chosen(confidence, count) == expected


@pytest.mark.parametrize("most, committed, expected", [
    (8, 0, [0, 2, 3]), (2, 0, [0, 2]), (4, 2, [0, 2]), (4, 3, [0]), (4, 4, [0]), (3, 9, [0])])
def test_what_reaches_a_threshold_is_chosen(most, committed, expected):
    """And the surest in any case; of those that reach it the surest, as long as no more than `most`
    of the block are committed in all."""
    assert chosen([0.9, 0.1, 0.8, 0.7, NEVER], 1, 0.7, most, committed=committed) == expected
    assert chosen([0.6, 0.1, NEVER], 1, 0.7, most, committed=committed) == [0]


def test_rows_are_chosen_for_alone():
    """Each row by its own confidences, and by how many it has committed."""
    confidence = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.8]])
    picked = choose(confidence, Commit(1, 0.5, 3), committed=torch.tensor([[0], [2]]))
    assert picked.tolist() == [[True, True, False], [False, True, False]]


def test_alg_temp_draws_positions_without_replacement():
    """Two of four positions come from softmax(confidence / alg_temp), the second from what the
    first has left; a position that cannot be committed is never drawn."""
    confidence = torch.tensor([0.5, 0.2, 0.9, 0.4, NEVER])
    p = (confidence / 0.3).softmax(-1)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    probability = torch.tensor([p[i] * p[j] / (1 - p[i]) + p[i] * p[j] / (1 - p[j])
                                for i, j in pairs])
    drawn = choose(confidence.expand(20_000, -1), Commit(2), torch.zeros(20_000, 1), alg_temp=0.3,
                   generator=seeded())
    assert (drawn.sum(1) == 2).all() and not drawn[:, 4].any()
    assert_drawn_from(torch.stack([(drawn[:, i] & drawn[:, j]).sum() for i, j in pairs]),
                      probability)


# ------------------------------------------------------------------ randomness
RANDOM = [dict(temperature=0.8), dict(order="random"), dict(order="origin"),
          dict(order="entropy", alg_temp=1.0),
          dict(order="maskgit_plus", temperature=1.0, top_p=0.9)]


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_a_generator_is_the_only_source_of_randomness(shallow, options):
    """The same seed gives the same ids, another seed others, none means seed 0, and torch's global
    generator is neither read nor moved."""
    def decode(seed=None):
        generator = None if seed is None else seeded(seed)
        return generate(shallow, one_prompt(), gen_length=16, block_length=16, steps=4,
                        generator=generator, **options).ids.tolist()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = decode(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert decode(3) == first
    other = decode(0)
    assert decode() == other
    assert len({str(ids) for ids in (first, other, decode(1))}) == 3


def test_temperature_0_needs_no_generator(shallow):
    """With an order by confidence nothing is drawn: the seed does not matter."""
    options = dict(gen_length=16, block_length=16, steps=8, order="topk_margin")
    results = {str(generate(shallow, one_prompt(), generator=seeded(seed), **options).ids.tolist())
               for seed in range(3)}
    assert len(results) == 1


@pytest.mark.parametrize("options, near", [
    (dict(order="low_confidence"), dict(temperature=1e-6)),
    (dict(order="low_confidence"), dict(alg_temp=1e-6)),
    (dict(order="maskgit_plus"), dict(alg_temp=1e-6)),
    (dict(order="topk_margin"), dict(alg_temp=1e-6)),
    (dict(order="entropy"), dict(alg_temp=1e-6))], ids=str)
def test_small_temperatures_approach_the_argmax(shallow, options, near):
    """Near 0 either temperature decodes as at 0. (Dream's confidences are measured in the tempered
    distribution, so that there a temperature near 0 makes all of them 1.)"""
    options = dict(gen_length=16, block_length=16, steps=8) | options
    cold = generate(shallow, one_prompt(), **options).ids
    for seed in range(2):
        drawn = generate(shallow, one_prompt(), generator=seeded(seed), **options, **near)
        assert torch.equal(drawn.ids, cold)


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, 1.2, 0.3])  # of eight tokens; the last: mask
MASK = len(LOGITS) - 1


def draws(order="low_confidence", logits=LOGITS, n=20_000, **options) -> torch.Tensor:
    """How often each token is proposed, (V,) counts."""
    rows = logits.expand(2, n // 2, -1).clone()
    candidate, _ = propose(rows, order, MASK, generator=seeded(), **options)
    return torch.bincount(candidate.flatten(), minlength=len(logits))


def assert_drawn_from(counts: torch.Tensor, probability: torch.Tensor) -> None:
    """Chi-square of counts against probabilities below the 99.99% quantile of up to 20 degrees of
    freedom, and nothing where the probability is 0."""
    assert counts[probability == 0].sum() == 0
    kept = probability > 0
    expected = probability[kept] / probability.sum() * counts.sum()
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    quantile = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 20: 52.4}
    degrees = int(kept.sum()) - 1
    assert chi_square < quantile[min(q for q in quantile if q >= max(degrees, 1))]


@pytest.mark.parametrize("order", ["low_confidence", "random", "maskgit_plus", "origin"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_candidates_are_drawn_from_the_tempered_softmax(order, temperature):
    """Gumbel-argmax is a draw from softmax(logits / T), the mask left out."""
    probability = (LOGITS / temperature).softmax(-1)
    probability[MASK] = 0
    assert_drawn_from(draws(order, temperature=temperature), probability)


@pytest.mark.parametrize("cut, kept", [
    (dict(top_k=1), [0]), (dict(top_k=3), [0, 1, 6]), (dict(top_k=100), [0, 1, 2, 3, 4, 5, 6]),
    (dict(top_k=0), [0, 1, 2, 3, 4, 5, 6]), (dict(top_p=1e-6), [0]), (dict(top_p=0.5), [0, 1]),
    (dict(top_p=0.7), [0, 1, 6, 2]), (dict(top_p=1.0), [0, 1, 2, 3, 4, 5, 6]),
    (dict(top_p=0.7, top_k=2), [0, 1])], ids=str)
def test_cut_tokens_are_never_drawn(cut, kept):
    """top_k keeps the most probable, top_p the smallest set whose probability exceeds it (0.36,
    0.21, 0.16, 0.13, ... here), and what is kept is drawn in proportion."""
    probability = torch.zeros(len(LOGITS))
    probability[kept] = LOGITS.softmax(-1)[kept]
    assert_drawn_from(draws(temperature=1.0, **cut), probability)


def test_top_p_is_exceeded_not_reached():
    """Of four tokens with a quarter each, two reach 0.5 and three exceed it, as published."""
    uniform = torch.tensor([0.0] * 4 + [-torch.inf])
    rows = uniform.expand(1, 500, -1).clone()
    candidate, _ = propose(rows, "entropy", 4, 1.0, top_p=0.5,
                           generator=seeded())
    assert len(candidate.unique()) == 3


def test_top_p_is_measured_after_the_temperature():
    """As Dream does: what a high temperature flattens, top_p cuts later."""
    hot, cold = (draws("entropy", temperature=t, top_p=0.6) > 0 for t in (5.0, 0.2))
    assert hot.sum() > cold.sum() == 1


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=1.0), dict(temperature=1.0, top_k=1), dict(temperature=0.1),
    dict(temperature=1.0, top_p=0.5), dict(top_k=1, top_p=0.1)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_the_mask_is_never_a_candidate(order, options):
    """Not even where it has practically all of the probability and a cut leaves nothing else."""
    logits = LOGITS.clone()
    logits[MASK] = 50.0
    counts = draws(order, logits, n=1000, **options)
    assert counts[MASK] == 0 and counts.sum() == 1000
    if options.get("top_k") or options.get("top_p"):
        assert counts[0] == 1000


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_what_each_order_calls_confidence(temperature):
    """The candidate's probability (LLaDA's in the plain softmax, Dream's in the tempered one), the
    margin of the top two, the negative entropy."""
    logits = torch.randn(2, 5, 40, generator=seeded())
    plain = logits.softmax(-1)
    warm = (logits / (temperature or 1)).softmax(-1)
    top = warm.sort(-1, descending=True).values
    for order, expected in {
            "low_confidence": lambda candidate: plain.gather(-1, candidate)[..., 0],
            "maskgit_plus": lambda candidate: warm.gather(-1, candidate)[..., 0],
            "topk_margin": lambda candidate: top[..., 0] - top[..., 1],
            "entropy": lambda candidate: (warm * warm.log()).sum(-1)}.items():
        candidate, confidence = propose(logits.clone(), order, 39, temperature,
                                        generator=seeded())
        torch.testing.assert_close(confidence, expected(candidate[..., None]))


@torch.no_grad()
def test_first_tokens_are_drawn_from_the_models_softmax(shallow):
    """End to end: of many rows with one prompt, the first token is distributed as the softmax of
    the logits that belong to it. The 20 most probable tokens, and the rest together."""
    rows, temperature = 1500, 0.5
    ids = torch.cat([one_prompt(), torch.full((1, 1), MASK_ID)], 1)
    logits = shallow(ids)[0, P - 1 if shallow.config.shift else P] / temperature
    logits[MASK_ID] = -torch.inf
    probability, index = logits.softmax(-1).sort(descending=True)
    result = generate(shallow, one_prompt(rows), gen_length=1, block_length=1, steps=1,
                      temperature=temperature, top_k=0)
    counts = torch.bincount(result.ids[:, P], minlength=512)[index]
    assert_drawn_from(torch.cat([counts[:20], counts[20:].sum()[None]]),
                      torch.cat([probability[:20], probability[20:].sum()[None]]))


# ------------------------------------------------------------------ stopping early
EARLY = [  # a family, how to decode, and what EOS's logit is raised by
    ("llada", dict(steps=32), 4.5), ("llada", dict(steps=32), 5.5),
    ("llada", dict(steps=16, block_length=8), 3.5), ("llada", dict(steps=16, threshold=0.3), 4.5),
    ("dream", dict(steps=32, order="entropy"), 3.0),
    ("dream", dict(steps=16, block_length=8, order="maskgit_plus"), 3.0),
    ("dream", dict(steps=32, order="topk_margin"), 2.5),
    ("dream", dict(steps=16, threshold=0.2), 2.6)]


def before_eos(answer: torch.Tensor) -> list[int]:
    """The ids of one answer (1-d) up to its first EOS."""
    ids = answer.tolist()
    return ids[:ids.index(EOS_ID)] if EOS_ID in ids else ids


@pytest.mark.parametrize("family, options, by", EARLY, ids=str)
def test_stopping_early_changes_nothing_before_eos(backbones, family, options, by):
    """A model that likes EOS: the tokens before the first EOS are those of the full decoding, what
    was left is EOS, and forwards are saved."""
    options = dict(gen_length=G, block_length=G) | options
    with boosted(backbones[family], EOS_ID, by):
        full = generate(backbones[family], one_prompt(), **options)
        early = generate(backbones[family], one_prompt(), stop_at_eos=True, **options)
    text = before_eos(full.ids[0, P:])
    assert 0 < len(text) < G
    assert before_eos(early.ids[0, P:]) == text
    same = early.ids == full.ids
    assert (early.ids[~same] == EOS_ID).all() and not (early.ids == MASK_ID).any()
    assert early.forwards < full.forwards


def test_stopping_early_on_the_published_eos_model(eos_liking, published):
    """The same with the oracle's EOS-liking head."""
    full = published["llada"]["eosboost_steps32_block32_plain"]
    early = generate(eos_liking, published["llada"]["prompt"], gen_length=G, steps=32,
                     stop_at_eos=True)
    assert before_eos(early.ids[0, P:]) == before_eos(full[0, P:])
    assert early.forwards < 32


def test_only_eos_stops_within_the_first_block(backbone):
    """A model that answers nothing but EOS never reaches the second block."""
    with boosted(backbone, EOS_ID, 1e4):
        result = generate(backbone, one_prompt(), gen_length=G, block_length=8, steps=G,
                          stop_at_eos=True)
    assert result.forwards <= 8 and (result.ids[:, P:] == EOS_ID).all()


def test_without_eos_stopping_early_changes_nothing(backbones):
    """No EOS, no early stop: the same ids and the same forwards."""
    options = dict(gen_length=G, steps=16)
    with boosted(backbones["llada"], EOS_ID, -1e4):
        full = generate(backbones["llada"], one_prompt(), **options)
        early = generate(backbones["llada"], one_prompt(), stop_at_eos=True, **options)
    assert torch.equal(early.ids, full.ids) and early.forwards == full.forwards


def test_a_batch_stops_when_its_last_row_has(backbones):
    """Early stopping waits for the slowest row, so each row's text is what it is alone."""
    backbone = backbones["llada"]
    prompts = prompts_of([P] * 4, seed=1)
    options = dict(gen_length=G, block_length=8, steps=G, stop_at_eos=True)
    with boosted(backbone, EOS_ID, 5.0):
        together = generate(backbone, torch.tensor(prompts), **options)
        alone = [generate(backbone, torch.tensor([p]), **options) for p in prompts]
    assert len({single.forwards for single in alone}) > 1 and together.forwards < G
    assert together.forwards == max(single.forwards for single in alone)
    for row, single in zip(together.ids, alone):
        assert before_eos(row[P:]) == before_eos(single.ids[0, P:])


# ------------------------------------------------------------------ the command line
def run(capsys, ckpt, *argv: str) -> str:
    """stdout of a command that works."""
    assert sample.main(["--ckpt", str(ckpt), "--device", "cpu", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_prompts_file_gives_one_json_result_a_line(text_ckpt, tmp_path, capsys):
    """Text, JSON text and messages; blank lines are skipped; the answers do not depend on the batch
    size."""
    file = tmp_path / "prompts.txt"
    messages = [{"role": "user", "content": "x"}]
    file.write_text('héllo\n\n{"prompt": "two"}\n' + json.dumps({"messages": messages}) + "\n",
                    encoding="utf-8")
    argv = ["--prompts", str(file), "--gen-length", "8", "--raw"]
    results = [[json.loads(line) for line in run(capsys, text_ckpt, *argv, "--batch-size", size)
                .splitlines()] for size in ("1", "2", "5")]
    assert [r["prompt"] for r in results[0]] == ["héllo", "two", messages]
    for others in results[1:]:
        assert [(r["prompt"], r["text"], r["tokens"]) for r in others] == \
            [(r["prompt"], r["text"], r["tokens"]) for r in results[0]]
    assert [[r["batch"] for r in rows] for rows in results] == [[1] * 3, [2, 2, 1], [3] * 3]
    assert all(0 < r["forwards"] <= 8 and r["seconds"] > 0 for rows in results for r in rows)


def test_quiet_prints_the_answer_alone(text_ckpt, capsys):
    """With --quiet the output is what `generate` gives, decoded up to EOS."""
    backbone, tokenizer = load(text_ckpt, "cpu")
    result = generate(backbone, torch.tensor([tokenizer.encode("hi")]), gen_length=8,
                      block_length=4, steps=4, stop_at_eos=True)
    out = run(capsys, text_ckpt, "--prompt", "hi", "--quiet", "--gen-length", "8", "--steps", "4",
              "--block-length", "4")
    assert out == tokenizer.decode(before_eos(result.ids[0, 2:]), skip_special=True) + "\n"


def test_seed_is_reproducible_from_the_command_line(text_ckpt, capsys):
    """--seed is all that makes two drawn answers differ."""
    argv = ["--prompt", "hi", "--quiet", "--gen-length", "16", "--temperature", "1"]
    first, again, other = (run(capsys, text_ckpt, *argv, "--seed", s) for s in ("1", "1", "2"))
    assert first == again != other


def test_the_checkpoints_own_length_is_the_default(text_ckpt, tmp_path, capsys):
    """max_new_tokens of generation_config.json, where there is one."""
    folder = shutil.copytree(text_ckpt, tmp_path / "ckpt")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 12}')
    out = run(capsys, folder, "--prompt", "hi", "--no-early-stop", "--steps", "6")
    assert " 6 forwards " in out.splitlines()[-1]
    assert sum(1 for line in out.splitlines() if line.startswith("   ")) == 6


def test_a_task_is_shown_solved_and_judged(text_ckpt, capsys):
    """A held-out prompt of it; --seed picks another one."""
    outputs = [run(capsys, text_ckpt, "--task", "sums", "--gen-length", "4", "--seed", seed)
               for seed in ("0", "0", "1")]
    assert all(t.startswith("sums\n") and t.splitlines()[-1] in ("right", "wrong") for t in outputs)
    prompts = [text.splitlines()[1] for text in outputs]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_checkpoints_first_task_is_the_default_prompt(small_ckpt, capsys):
    """Without a prompt a checkpoint that names its tasks shows what it can do."""
    out = run(capsys, small_ckpt, "--steps", "2")
    assert out.startswith("sudoku\n") and out.splitlines()[-1] in ("right", "wrong")


def test_compare_answers_without_and_with_the_memory(text_ckpt, tmp_path, capsys):
    """One below the other, each as it would be alone, the draws of one seed included."""
    memory = tmp_path / "memory.safetensors"
    awake(load(text_ckpt, "cpu")[0]).save(memory)
    argv = ["--prompt", "hi", "--quiet", "--gen-length", "8", "--temperature", "1"]
    plain = run(capsys, text_ckpt, *argv)
    changed = run(capsys, text_ckpt, *argv, "--memory", str(memory))
    both = run(capsys, text_ckpt, *argv, "--memory", str(memory), "--compare")
    assert both == f"without memory:\n{plain}with memory:\n{changed}" and plain != changed


@pytest.mark.parametrize("argv, expected", [
    ([], dict(order="entropy", temperature=0.2, top_p=0.95, block_length=64, steps=64)),
    (["--temperature", "0", "--order", "origin"], dict(order="origin", temperature=0.0)),
    (["--cache", "dual"], dict(order="entropy", block_length=32, cache="dual")),
    (["--threshold", "0.9"], dict(order=None, temperature=0.0, top_p=None, block_length=32))])
def test_dreams_own_readme_is_the_default_on_the_command_line(argv, expected):
    """Its sampler's defaults commit in a random order, of which that README warns; LLaDA's are its
    sampler's, in blocks of 32. `generate` keeps the published defaults of both."""
    args = ["--gen-length", "64", "--prompt", "a", *argv]
    found = decoding(sample.parser().parse_args(["--ckpt", str(DATA / "dream"), *args]), 128)
    assert {name: found[name] for name in expected} == expected
    found = decoding(sample.parser().parse_args(["--ckpt", str(DATA / "llada"), *args]), 128)
    assert found["order"] in (None, "origin") and found["temperature"] == 0
    assert found["block_length"] == 32
