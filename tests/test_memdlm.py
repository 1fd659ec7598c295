"""MemDLM line by line: masks, the inner steps against slow ones, what gets a gradient, prompts,
the commands with their resume, and the bench."""
from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import (DATA, EOS_ID, MASK_ID, METRICS, awake, metrics_of, prompts_of, saved_step,
                      seeded, small_checkpoint)
from safetensors.torch import load_file
from torch.func import functional_call

import bench
import sample
from lib.cli import InputError
from lib.data import left_pad
from lib.run import Run
from model import Backbone, Config, load
from sample import generate
from studies import fast_weights, memdlm
from studies.fast_weights import (PARTS, FastLoRA, LoRA, Settings, adapt, adapt_prompt, adapted,
                                  anchor_and_pre, draw_masks, generate_adapted, outer_loss)
from tasks import TASKS

LENGTHS = ((5, 9), (3, 12), (6, 4))  # prompt and answer of each row


def examples(seed: int = 0, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, answer_mask, pad_mask), padded on the right by at least `extra`."""
    width = max(map(sum, LENGTHS)) + extra
    position = torch.arange(width)
    answer = torch.stack([(position >= p) & (position < p + a) for p, a in LENGTHS])
    pad = torch.stack([position >= p + a for p, a in LENGTHS])
    ids = torch.randint(0, 500, (3, max(map(sum, LENGTHS))), generator=seeded(seed))
    ids = torch.cat([ids, ids.new_full((3, extra), EOS_ID)], 1)
    return ids.masked_fill(pad, EOS_ID), answer, pad


def moved(fast: FastLoRA, by: float = 0.05) -> FastLoRA:
    """Fast weights that are not zero."""
    generator = seeded(9)
    with torch.no_grad():
        for p in fast.weights.values():
            p.add_(by * torch.randn(p.shape, generator=generator))
    return fast


def copies(weights: dict) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in weights.items()}


def with_delta(backbone: Backbone, weights: dict, scale: float, row: int = 0) -> dict:
    """The backbone's parameters with alpha / r B A added to its own matrices."""
    state = dict(backbone.named_parameters())
    for i in {int(name.split(".")[0]) for name in weights}:
        for linear, parts in PARTS.items():
            if f"{i}.{parts[0]}.A" in weights:
                name = f"blocks.{i}.{linear}.weight"
                state[name] = state[name] + scale * torch.cat(
                    [weights[f"{i}.{x}.B"][row] @ weights[f"{i}.{x}.A"][row] for x in parts])
    return state


def token_losses(backbone, state, ids, masked, pad) -> dict[tuple[int, int], torch.Tensor]:
    """(row, position) -> cross-entropy, each row on its own and without its padding."""
    found = {}
    for row in range(len(ids)):
        real = (~pad[row]).nonzero()[:, 0]
        noisy = ids[row].masked_fill(masked[row], MASK_ID)[real]
        logits = functional_call(backbone, state(row), (noisy[None],))[0]
        if backbone.config.shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        for k, i in enumerate(real.tolist()):
            if masked[row, i]:
                found[row, i] = -logits[k].log_softmax(-1)[ids[row, i]]
    return found


def slow_adapt(backbone, fast, ids, masks, maskable, pad, weighted) -> dict[str, torch.Tensor]:
    """The inner steps with whole matrices and loops over rows and tokens -> the fast weights."""
    s, weights = fast.settings, copies(fast.weights)
    rows = len(next(iter(weights.values())))
    for mask in masks:
        weights = {name: w.requires_grad_() for name, w in weights.items()}
        ce = token_losses(backbone, lambda row: with_delta(
            backbone, weights, s.alpha / s.rank, row if rows > 1 else 0), ids, mask, pad)
        total = 0.0
        for group in [range(len(ids))] if rows == 1 else [[row] for row in range(len(ids))]:
            mine = [(row, loss) for (row, _), loss in ce.items() if row in group]
            for row, loss in mine:
                ratio = int(mask[row].sum()) / int(maskable[row].sum())
                total = total + loss * (1 / (ratio + 1e-6) if weighted else 1) / len(mine)
        after = {}
        for name, g in zip(weights, torch.autograd.grad(total, list(weights.values()))):
            steps = [row * min(1.0, s.clip / max(float(row.norm()), 1e-12)) if s.clip else row
                     for row in g]
            after[name] = weights[name].detach() - s.lr * torch.stack(steps)
        weights = after
    return weights


def assert_close(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=2e-6), name


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_masks_are_nested_and_of_the_right_ratios(K):
    """M_pre has 1.5 times the anchor's tokens, at most all; the last mask is the anchor; the ones
    between reveal equally many, and nothing but maskable tokens is ever masked."""
    answer = examples()[1]
    for anchors in ([0, 0, 0], [4, 1, 2], [5, 10, 4], [9, 12, 3]):
        masks = anchor_and_pre(answer, torch.tensor(anchors), torch.rand(answer.shape), K)
        counts = torch.stack([m.sum(1) for m in masks])                         # (K, 3)
        assert len(masks) == max(K, 2) and counts[-1].tolist() == anchors
        assert counts[0].tolist() == [min(n, int(1.5 * a)) for (_, n), a in zip(LENGTHS, anchors)]
        assert not any((m & ~answer).any() for m in masks)
        assert not any((later & ~earlier).any() for earlier, later in zip(masks, masks[1:]))
        steps = counts[:-1] - counts[1:]
        assert (steps.max(0).values - steps.min(0).values).max() <= 1


def test_the_anchor_has_each_token_with_probability_t():
    """t is uniform, the share of masked tokens follows it, and what M_pre adds is anywhere."""
    answer = torch.ones(3000, 40, dtype=torch.bool)
    masks, t = draw_masks(answer, 2, seeded())
    assert 1e-3 <= float(t.min()) < 0.01 and float(t.max()) > 0.99
    assert t.mean() == pytest.approx(0.5, abs=0.02) and t.var() == pytest.approx(1 / 12, rel=0.06)
    z = (masks[-1].sum(1) - 40 * t) / (40 * t * (1 - t)).sqrt()
    assert abs(z.mean()) < 0.08 and z.std() == pytest.approx(1, abs=0.08)
    added = (masks[0] & ~masks[-1]).float().mean(0)                             # (40,)
    assert added.max() - added.min() < 0.07 and added.min() > 0.05


def test_masks_follow_their_generator():
    answer = examples()[1]
    first, second, third = (draw_masks(answer, 2, seeded(s))[0] for s in (0, 0, 1))
    assert all(map(torch.equal, first, second)) and not all(map(torch.equal, first, third))


# ------------------------------------------------------------------ the fast weights
@pytest.mark.parametrize("layers, share, first", [
    (32, 0.1, 28), (28, 0.1, 25), (10, 0.1, 9), (3, 0.1, 2), (1, 0.1, 0), (4, 0.5, 2), (4, 1, 0)])
def test_they_are_on_the_last_tenth_of_the_layers(layers, share, first):
    """int(0.9 L) .. L - 1, one at least, on gate, up and down with an A and a B each."""
    config = Config("llada", 16, layers, 2, 2, 24, 64, 64, 1e4, 1e-5, False, True, False, 3, 4, 4)
    fast = FastLoRA(Backbone(config), Settings(share=share, rank=4))
    assert {int(name.split(".")[0]) for name in fast.weights} == set(range(first, layers))
    assert {name.split(".", 1)[1]: tuple(p.shape) for name, p in fast.weights.items()} == {
        "gate.A": (1, 4, 16), "gate.B": (1, 24, 4), "up.A": (1, 4, 16), "up.B": (1, 24, 4),
        "down.A": (1, 4, 24), "down.B": (1, 16, 4)}


def test_reset_draws_a_and_clears_b(backbone):
    """B = 0, A uniform up to fan_in ** -0.5 (Kaiming, a = sqrt 5), by seed, alike in every row."""
    fast = moved(FastLoRA(backbone, seed=3))
    for rows in (1, 4):
        fast.reset(3, rows)
        for name, p in copies(fast.weights).items():
            assert p.shape[0] == rows and p.dtype == torch.float32
            assert torch.equal(p, p[:1].expand_as(p))
            if name.endswith("B"):
                assert not p.any()
            else:
                edge = p.shape[-1] ** -0.5
                assert 0.98 * edge < float(p.abs().max()) <= edge
                assert float(p.std()) == pytest.approx(edge / 3 ** 0.5, rel=0.05)
    again, other = FastLoRA(backbone, seed=3), FastLoRA(backbone, seed=4)
    for name in fast.weights:
        assert torch.equal(again.weights[name], fast.weights[name][:1])
        assert torch.equal(other.weights[name], again.weights[name]) == name.endswith("B")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_exact_when_off_and_when_reset(family, dtype):
    """Never attached, attached with delta W = 0, moved, reset again, detached: the same bits but
    for the moved ones; detached, no hook is left."""
    backbone, _ = load(DATA / family, "cpu", dtype)
    ids, _, pad = examples()
    with torch.no_grad():
        plain, fast = backbone(ids, pad), FastLoRA(backbone)
        fast.attach()
        assert torch.equal(backbone(ids, pad), plain)
        moved(fast)
        assert not torch.equal(backbone(ids, pad), plain)
        fast.reset(1)
        assert torch.equal(backbone(ids, pad), plain)
        moved(fast).detach()
        assert torch.equal(backbone(ids, pad), plain)
    assert not any(m._forward_hooks for m in backbone.modules())


@pytest.mark.parametrize("linears", [tuple(PARTS), ("gate_up", "down")], ids=len)
def test_attached_is_delta_w_and_so_is_merged(family, linears):
    """W x + alpha / r B A x, each projection with its own part of a fused matrix."""
    backbone, _ = load(DATA / family, "cpu")
    ids, _, pad = examples()
    lora = moved(LoRA(backbone, range(1, 3), linears, 8, 24.0))
    with torch.no_grad():
        expected = functional_call(backbone, with_delta(backbone, lora.weights, 3.0), (ids, pad))
        plain = backbone(ids, pad)
        lora.attach()
        lora.attach()  # twice is once
        assert torch.allclose(backbone(ids, pad), expected, atol=1e-4)
        lora.merge()
        assert torch.allclose(backbone(ids, pad), expected, atol=1e-4)
        assert not torch.allclose(plain, expected, atol=1e-2)


# ------------------------------------------------------------------ the inner loop
INNER = [dict(), dict(K=3), dict(K=1), dict(only="pre"), dict(only="anchor"), dict(clip=0.0),
         dict(clip=0.05), dict(per_example=True), dict(lr=0.02, rank=4, alpha=4.0, share=0.7)]


@pytest.mark.parametrize("options, weighted", [
    (dict(), False), *((options, True) for options in INNER)], ids=str)
def test_the_inner_steps_are_the_slow_ones(backbone, options, weighted):
    """Loss, weights 1 / ratio, first-order SGD at 0.1, clipping per tensor, which masks are used,
    Dream's shift, padding, weights for the batch or for each row."""
    ids, answer, pad = examples()
    fast = FastLoRA(backbone, Settings(**options))
    fast.reset(0, 3 if fast.settings.per_example else 1)
    masks = anchor_and_pre(answer, torch.tensor([4, 7, 1]),
                           torch.rand(answer.shape, generator=seeded()), fast.settings.K)
    used = {"K": masks, "pre": masks[:1], "anchor": masks[-1:]}[fast.settings.only or "K"]
    used = used[:1] if fast.settings.K == 1 else used
    slow = slow_adapt(backbone, moved(fast, 0.02), ids, used, answer, pad, weighted)
    before = copies(fast.weights)
    losses = adapt(backbone, fast, ids, masks, answer, pad, weighted)
    fast.detach()
    assert len(losses) == len(used) == {"K": fast.settings.K}.get(fast.settings.only or "K", 1)
    assert_close(copies(fast.weights), slow)
    assert all(not torch.equal(before[name], p) for name, p in fast.weights.items())


def test_each_tensor_is_clipped_by_itself(backbone):
    """One step at a small clip moves every tensor by lr x clip, whatever the others' gradients."""
    ids, answer, pad = examples()
    fast = moved(FastLoRA(backbone, Settings(clip=1e-3, only="anchor")))
    before = copies(fast.weights)
    adapt(backbone, fast, ids, [answer, answer], answer, pad)
    fast.detach()
    for name, p in fast.weights.items():
        assert float((p - before[name]).norm()) == pytest.approx(1e-4, rel=1e-2), name


def test_layers_below_run_once_without_a_graph(family):
    """With everything tuned: per adapt, the layers under the fast weights see all steps' inputs in
    one call and build no graph; the others run once a step."""
    backbone, _ = load(DATA / family, "cpu")
    backbone.requires_grad_()
    ids, answer, pad = examples()
    calls: dict[int, list] = {i: [] for i in range(3)}
    for i, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda m, x, y, i=i: calls[i].append((y.shape[0],
                                                                          y.requires_grad)))
    masks = anchor_and_pre(answer, torch.tensor([4, 7, 1]), torch.rand(answer.shape))
    adapt(backbone, FastLoRA(backbone), ids, masks, answer, pad)
    assert calls == {0: [(6, False)], 1: [(6, False)], 2: [(3, True), (3, True)]}
    assert all(p.grad is None for p in backbone.parameters())


# ------------------------------------------------------------------ the outer loss
def slow_outer(backbone, state, ids, answer, pad, seed) -> torch.Tensor:
    masks, t = draw_masks(answer, 2, seeded(seed))
    ce = token_losses(backbone, state, ids, masks[-1], pad)
    return sum(loss / (t[row] + 1e-6) for (row, _), loss in ce.items()) / answer.sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_training_is_the_ordinary_loss(family, seed):
    """Without fast weights: sum over M_t of CE / t by the number of answer tokens, with its
    gradient."""
    backbone, _ = load(DATA / family, "cpu")
    backbone.requires_grad_()
    ids, answer, pad = examples()
    loss = outer_loss(backbone, ids, answer, None, seeded(seed), pad)
    slow = slow_outer(backbone, lambda row: dict(backbone.named_parameters()), ids, answer, pad,
                      seed)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    for one, other in zip(*(torch.autograd.grad(x, list(backbone.parameters()))
                            for x in (loss, slow))):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
def test_the_outer_pass_trains_the_slow_weights_alone(family, per_example):
    """Same masks as plain training; loss and gradients are those with the adapted delta W as a
    constant; nothing arrives at the fast weights, and a next batch forgets them."""
    backbone, _ = load(DATA / family, "cpu")
    backbone.requires_grad_()
    ids, answer, pad = examples()
    fast, figures = FastLoRA(backbone, Settings(per_example=per_example)), {}
    loss = outer_loss(backbone, ids, answer, fast, seeded(1), pad, figures)
    held = copies(fast.weights)
    assert any(w.any() for name, w in held.items() if name.endswith("B"))
    found = torch.autograd.grad(loss, list(backbone.parameters()), retain_graph=True)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in fast.weights.values())
    assert set(figures) == {"inner_1", "inner_2"}
    fast.detach()
    slow = slow_outer(backbone, lambda row: with_delta(
        backbone, held, 2.0, row if per_example else 0), ids, answer, pad, 1)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-4)
    for one, other in zip(found, torch.autograd.grad(slow, list(backbone.parameters()))):
        assert torch.allclose(one, other, rtol=1e-2, atol=2e-5)
    again = outer_loss(backbone, ids, answer, fast, seeded(1), pad)
    fast.detach()
    assert torch.equal(again, loss) and set(held) == set(fast.weights)


def test_checkpointing_changes_nothing(family):
    """Blocks recomputed in the backward pass still have the fast weights in place."""
    grads = []
    for checkpointing in (False, True):
        backbone, _ = load(DATA / family, "cpu")
        backbone.requires_grad_().checkpointing = checkpointing
        ids, answer, pad = examples()
        outer_loss(backbone, ids, answer, FastLoRA(backbone), seeded(), pad).backward()
        grads.append([p.grad for p in backbone.parameters()])
    assert all(map(torch.equal, *grads))


def test_padding_changes_nothing_in_training(backbone):
    """More padding on the right: the same loss on the same masks, the same fast weights."""
    ids, answer, pad = examples()
    wide = torch.cat([ids, ids.new_full((3, 7), EOS_ID)], 1)
    grown = [torch.cat([x, x.new_full((3, 7), value)], 1) for x, value in ((answer, False),
                                                                            (pad, True))]
    masks = anchor_and_pre(answer, torch.tensor([4, 7, 1]), torch.rand(answer.shape))
    results = []
    for data, where, pads in ((ids, answer, pad), (wide, *grown)):
        fast = FastLoRA(backbone)
        extra = data.shape[1] - ids.shape[1]
        adapt(backbone, fast, data, [torch.cat([m, m.new_zeros(3, extra)], 1) for m in masks],
              where, pads)
        fast.detach()
        results.append(copies(fast.weights))
    assert_close(*results)


# ------------------------------------------------------------------ prompts
def spied(monkeypatch) -> list:
    """The arguments of every `adapt`."""
    calls, real = [], fast_weights.adapt

    def spy(*args, **options):
        calls.append((args, options))
        return real(*args, **options)

    monkeypatch.setattr(fast_weights, "adapt", spy)
    return calls


def test_a_prompt_is_masked_at_three_and_two_tenths(backbone, monkeypatch):
    """Nested masks on 0.3, then 0.2 of each prompt's own tokens, all alike, never padding, nor a
    first token that no hidden state says (Dream)."""
    calls, fast = spied(monkeypatch), FastLoRA(backbone)
    ids, pad = left_pad(prompts_of([100, 40, 20, 1]), EOS_ID)
    adapt_prompt(backbone, fast, ids, pad, seed=2)
    fast.detach()
    [((_, _, _, masks, maskable, pads), options)] = calls
    assert options == {"weighted": False} and pads is pad
    first = int(backbone.config.shift)
    real = [n - first for n in (100, 40, 20, 1)]
    assert maskable.sum(1).tolist() == real and not (maskable & pad).any()
    if first:
        assert not any(m[row, int(pad[row].sum())] for m in masks for row in range(4))
    anchors = [min(n, max(1, round(0.2 * n))) for n in real]
    assert masks[1].sum(1).tolist() == anchors
    assert masks[0].sum(1).tolist() == [min(n, int(1.5 * a)) for a, n in zip(anchors, real)]
    assert not (masks[1] & ~masks[0]).any() and not (masks[0] & ~maskable).any()
    assert {len(p) for p in fast.weights.values()} == {4}


def test_a_prompt_is_adapted_alone(backbone):
    """A row's fast weights do not depend on the batch, its padding, or what was there before; they
    do on the seed."""
    rows, fast = prompts_of([23, 9, 14]), moved(FastLoRA(backbone))
    adapt_prompt(backbone, fast, *left_pad(rows, EOS_ID), seed=2)
    together = copies(fast.weights)
    for i, row in enumerate(rows):
        adapt_prompt(backbone, fast, torch.tensor([row]), None, seed=2)
        assert_close(copies(fast.weights), {k: w[i:i + 1] for k, w in together.items()})
    adapt_prompt(backbone, fast, torch.tensor([rows[0]]), None, seed=3)
    assert not torch.allclose(fast.weights["2.gate.A"], together["2.gate.A"][:1])
    fast.detach()


@pytest.mark.parametrize("options, remember", [
    (dict(), False), (dict(cfg_scale=0.7), True), (dict(cache="dual"), True)], ids=str)
def test_generation_with_fast_weights(backbone, options, remember):
    """A batch of prompts gets what each gets alone, with guidance, a cache and a MetaState memory
    too; it differs from generation without, and the backbone is as before afterwards."""
    memory = awake(backbone) if remember else None
    options = dict(gen_length=8, block_length=8, steps=4, memory=memory, order="low_confidence",
                   **options)
    rows, settings = prompts_of([17, 6]), Settings(lr=3.0, clip=3.0)
    ids, pad = left_pad(rows, EOS_ID)
    plain = generate(backbone, ids, pad_mask=pad, **options).ids
    with adapted(backbone, settings, ids, pad):
        batch = generate(backbone, ids, pad_mask=pad, **options).ids
    assert torch.equal(generate(backbone, ids, pad_mask=pad, **options).ids, plain)
    assert not torch.equal(batch, plain)
    for row, out in zip(rows, batch):
        with adapted(backbone, settings, torch.tensor([row])):
            alone = generate(backbone, torch.tensor([row]), **options).ids
        assert out[-8:].tolist() == alone[0, -8:].tolist()
    with adapted(backbone, None, ids, pad):
        assert torch.equal(generate(backbone, ids, pad_mask=pad, **options).ids, plain)


def test_fast_weights_go_when_something_fails(backbone):
    with pytest.raises(ZeroDivisionError), adapted(backbone, Settings(), torch.tensor([[1, 2, 3]])):
        1 / 0
    assert not any(m._forward_hooks for m in backbone.modules())


# ------------------------------------------------------------------ the commands
@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A very small checkpoint in tiny's format, with a layer under the fast weights; two tasks, as
    an evaluation takes two batches of each."""
    folder = small_checkpoint(tmp_path_factory.mktemp("small") / "ckpt", n_layers=2)
    stated = {"max_new_tokens": 24, "tasks": ["sums", "chain"]}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture
def run(small, tmp_path, capsys) -> Callable:
    """run(*flags, out=...) -> (exit code, stdout, stderr) of a few steps of training."""
    def call(*flags, out=tmp_path / "out") -> tuple[int, str, str]:
        code = memdlm.main(["train", "--ckpt", str(small), "--out", str(out), "--device", "cpu",
                            "--steps", "3", "--batch-size", "2", "--micros", "2",
                            "--save-every", "1", "--rank", "4", "--slow-rank", "4",
                            *map(str, flags)])
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def unevaluated(monkeypatch) -> None:
    """Runs without the evaluation at their end, which takes longer than their few steps."""
    fit = memdlm.fit
    monkeypatch.setattr(memdlm, "fit", lambda *args, **options: fit(
        *args, **options | {"evaluate": None}))


VARIANTS = [("--plain",), ("--tune", "full", "--per-example", "--K", "3"),
            ("--checkpointing", "--only", "anchor", "--clip", "0")]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_every_variant_resumes(run, unevaluated, tmp_path, monkeypatch, flags):
    """Stopped after its first checkpoint and started again, a run ends with the bytes of one left
    alone; the folder loads, has moved, and keeps the settings."""
    flags, save = (*flags, "--steps", "2"), Run.save
    assert run(*flags, out=tmp_path / "whole")[0] == 0

    def stop(self, step):
        save(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        assert run(*flags)[0] == 130 and saved_step(tmp_path / "out") == 1
    assert run(*flags)[0] == 0
    for name in ("model.safetensors", "training.safetensors", "metrics.jsonl", "fast_weights.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    settings = Settings.read(tmp_path / "out")
    assert settings.rank == 4 and settings.K == (3 if "--K" in flags else 2)
    assert settings.per_example == ("--per-example" in flags)
    assert (settings.only, settings.clip) == (("anchor", 0) if "--only" in flags else (None, 1))


def test_training_from_end_to_end(run, small, tmp_path):
    """All linear layers of a slow LoRA move and are merged, the rest stays; full tuning moves
    everything; both losses are in the metrics; the same seed gives the same checkpoint."""
    code, out, err = run()
    assert (code, err) == (0, "") and "slow weights" in out and f"wrote {tmp_path / 'out'}" in out
    run("--tune", "full", out=tmp_path / "full")
    run("--plain", out=tmp_path / "plain")
    start, lora, full, plain = (load_file(folder / "model.safetensors") for folder in (
        small, tmp_path / "out", tmp_path / "full", tmp_path / "plain"))
    for name, before in start.items():
        inside = "blocks" in name and "norm" not in name and "bias" not in name
        assert torch.equal(lora[name], before) == (not inside), name
        assert not torch.equal(full[name], before), name
    assert any(not torch.equal(lora[name], plain[name]) for name in lora)
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "inner_1", "inner_2", "grad_norm"} <= lines[0].keys()
    assert {"held_out", "held_out_adapted"} <= lines[-1].keys()
    assert "inner_1" not in metrics_of(tmp_path / "plain")[0]


def test_only_the_fast_weights_differ_from_plain(run, monkeypatch, tmp_path):
    """Plain training sees the same batches and masks, and the held-out loss is that of the
    ordinary loss without fast weights, on held-out examples."""
    seen: dict[str, list] = {"fast": [], "plain": []}
    real = memdlm.outer_loss

    def spy(backbone, ids, answer, fast, generator, *rest):
        state = generator.get_state()
        seen[kind].append((ids, draw_masks(answer, 2, generator)[0][-1], fast is None))
        generator.set_state(state)
        return real(backbone, ids, answer, fast, generator, *rest)

    monkeypatch.setattr(memdlm, "outer_loss", spy)
    for kind, flags in (("fast", ()), ("plain", ("--plain",))):
        run(*flags, out=tmp_path / kind)
    assert len(seen["fast"]) == len(seen["plain"]) == 6 + 2 * 4
    for (a, m, _), (b, n, _) in zip(seen["fast"], seen["plain"]):
        assert torch.equal(a, b) and torch.equal(m, n)
    assert [off for *_, off in seen["fast"]] == [False] * 6 + [True] * 4 + [False] * 4
    assert [off for *_, off in seen["plain"]] == [True] * 6 + [True] * 4 + [False] * 4
    first, second = metrics_of(tmp_path / "fast")[-1], metrics_of(tmp_path / "plain")[-1]
    assert first["held_out"] != second["held_out"] != second["held_out_adapted"]


def test_data_from_a_file(run, tmp_path):
    """The same JSONL as train.py, in the model's chat format, padded."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "response": f"{i} " * (1 + i % 4)}) + "\n"
                            for i in range(20)))
    assert run("--data", path)[0] == 0
    path.write_text('{"prompt": "a"}\n')
    code, _, err = run("--data", path, out=tmp_path / "other")
    assert code == 2 and f"{path}:1" in err and err.count("\n") == 1


def test_the_sampler_adapts_to_the_prompt(run, small, tmp_path, monkeypatch, capsys):
    """`sample` takes the checkpoint's settings, another folder's or the published ones, for one
    prompt or a file of them, with a memory too; sample.py adapts nothing."""
    run("--K", 3)
    calls = spied(monkeypatch)
    memory = tmp_path / "m.safetensors"
    awake(load(tmp_path / "out", "cpu")[0]).save(memory)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\nthe other, longer prompt\n")
    common = ["--ckpt", str(tmp_path / "out"), "--device", "cpu", "--gen-length", "8"]
    one = ["--prompt", "some text to read"]
    for flags, K, rows in (
            (one, 3, 1), ([*one, "--fast-weights", str(small)], 2, 1),
            ([*one, "--memory", str(memory)], 3, 1),
            (["--task", "track2-64", "--gen-length", "24"], 3, 1),
            (["--prompts", str(prompts), "--batch-size", "2"], 3, 2)):
        calls.clear()
        assert memdlm.main(["sample", *common, *flags]) == 0
        assert ("knows nothing else" in capsys.readouterr().err) == (flags[0] != "--task")
        [((_, fast, ids, masks, *_), _)] = calls
        assert (fast.settings.K, len(masks), len(ids)) == (K, K, rows)
    calls.clear()
    assert sample.main([*common, *one]) == 0 and not calls


def test_what_the_sampler_adapts_is_what_it_writes(small, monkeypatch, capsys):
    """The seed goes to the fast weights too; compiled code, which would not see them, is
    refused."""
    seeds, real = [], fast_weights.adapted

    def spy(backbone, settings, prompt, pad_mask, seed):
        seeds.append(seed)
        return real(backbone, settings, prompt, pad_mask, seed)

    monkeypatch.setattr(fast_weights, "adapted", spy)
    argv = ["sample", "--ckpt", str(small), "--device", "cpu", "--quiet", "--seed", "4"]
    assert memdlm.main(argv) == 0 and seeds == [4]
    capsys.readouterr()
    assert memdlm.main([*argv, "--compile"]) == 2
    err = capsys.readouterr().err
    assert "--compile" in err and err.count("\n") == 1 and seeds == [4]


@pytest.mark.parametrize("flags, words", [
    (("--K", 0), ["K", "0"]), (("--rank", 0), ["rank"]), (("--share", 1.5), ["share"]),
    (("--inner-lr", -1), ["lr"]), (("--clip", -1), ["clip"]), (("--clip", "nan"), ["clip"]),
    (("--only", "both"), ["--only"]), (("--steps", 0), ["--steps"]), (("--lr", "nan"), ["--lr"]),
    (("--ckpt", "no/such/folder"), ["no/such"]),
    (("--ckpt", DATA / "llada"), ["tokenizer"]), (("--alpha", "inf"), ["alpha"]),
    (("--slow-rank", 0), ["--slow-rank"]), (("--tune", "some"), ["--tune"]),
    (("--micros", 0), ["--micros"])], ids=lambda x: " ".join(map(str, x)))
def test_arguments_that_make_no_sense(run, tmp_path, flags, words):
    """One line that names the argument, exit code 2, and no run begun."""
    code, _, err = run(*flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words)
    assert not (tmp_path / "out").exists()


def test_runs_that_would_spoil_something(run, unevaluated, small):
    """The checkpoint to start from is not written over, nor the folder of a run with other
    flags."""
    code, _, err = run(out=small)
    assert code == 2 and "another folder" in err
    assert run()[0] == 0
    code, _, err = run("--K", 3)
    assert code == 2 and "K" in err and "--out" in err and err.count("\n") == 1


@pytest.mark.parametrize("text, word", [
    ("{", "not JSON"), ('{"rank": "x"}', "rank"), ('{"rank": 2.5}', "rank"), ('{"x": 3}', "x is"),
    ('{"K": true}', "K"), ('{"only": 3}', "only"), ('{"lr": -1}', "lr"), ("[]", "not a JSON")])
def test_settings_that_make_no_sense(tmp_path, text, word):
    """The file is named."""
    path = tmp_path / "fast_weights.json"
    path.write_text(text)
    for where in (path, tmp_path):
        with pytest.raises(InputError, match=word) as caught:
            Settings.read(where)
        assert str(path) in str(caught.value)


# ------------------------------------------------------------------ the bench
SPOILT = [
    (lambda folder: (folder / METRICS).unlink(), METRICS),
    (lambda folder: (folder / METRICS).write_text('{"step": 1, "held_out": 1' + "0" * 400 + "}"),
     "no number of a training"),
    (lambda folder: (folder / "fast_weights.json").write_text('{"K": 3}'), "differ"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    (lambda folder: None, "")]  # and a training step of haystacks too long


def test_the_bench_compares_groups(run, tmp_path, capsys, monkeypatch):
    """Each group off and on, with intervals by training seed; held-out curves and costs; the last
    line is JSON."""
    monkeypatch.setattr(memdlm, "Accuracies", functools.partial(memdlm.Accuracies, draws=50))
    for kind, flags in (("plain", ("--plain",)), ("fast", ())):
        for s in (0, 1):
            run(*flags, "--seed", s, "--steps", 1, out=tmp_path / f"{kind}{s}")
    folders = {kind: [str(tmp_path / f"{kind}{s}") for s in (0, 1)] for kind in ("plain", "fast")}
    argv = ["bench", "--standard", *folders["plain"], "--memdlm", *folders["fast"], "--also",
            f"one={folders['fast'][0]}", "--kinds", "needle1,track2", "--lengths", "32,64",
            "--prompts", "3", "--steps", "2", "--repeat", "1", "--device", "cpu", "--json"]
    assert memdlm.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    variants = [f"{group}, {how}" for group in ("standard", "MemDLM", "one")
                for how in ("off", "on")]
    assert len(result["rows"]) == 3 * 6 * 2
    assert list(dict.fromkeys(row["variant"] for row in result["rows"])) == variants
    assert {len(row["seeds"]) for row in result["rows"]} == {1, 2}
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in result["rows"])
    assert [lead["variant"] for lead in result["leads"][::3]] == variants[1:]
    for curve in result["held_out"]:
        folder = {"standard": "plain0", "MemDLM": "fast0", "one": "fast0"}[curve["group"]]
        assert curve["seeds"][0] == metrics_of(tmp_path / folder)[-1][curve["loss"]]
    assert len(result["costs"]) == 3 and all(row["relative"] > 0 for row in result["costs"])
    for bad, word in ((["--kinds", "chess"], "chess"), (["--lengths", "8"], "32"),
                      (["--also", "name"], "NAME="), (["--also", "MemDLM=x"], "names")):
        assert memdlm.main([*argv, *bad]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and word in err
    for spoil, word in SPOILT:  # said before anything is measured
        folder = shutil.copytree(folders["fast"][0], tmp_path / "spoilt", dirs_exist_ok=True)
        spoil(folder)
        bad = ["--memdlm", folders["fast"][0], str(folder), *["--train-length", "300"] * (not word)]
        assert memdlm.main([*argv, *bad]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and (word or "300 tokens") in err


def test_the_bench_adapts_each_prompt_by_itself(small, monkeypatch):
    """Fast weights for every prompt, on a batch that is decoded together."""
    backbone, tokenizer = load(small, "cpu")
    task, calls = TASKS["needle2-64"], spied(monkeypatch)
    prompts = [task.make(random.Random(i))[0] for i in range(5)]
    bench.solve(backbone, tokenizer, task, prompts, 24, 3,
                functools.partial(generate_adapted, settings=Settings()), steps=2)
    assert [len(args[2]) for args, _ in calls] == [2, 3]
    assert [len(args[1].weights["1.gate.A"]) for args, _ in calls] == [2, 3]
