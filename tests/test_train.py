"""Training: what a step reveals, the unrolled loss against a slow one and its gradient, what `fit`
computes, and train.py from end to end."""
from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (DATA, EOS_ID, MASK_ID, MEMORY, STATE, assert_close,
                      assert_same_run, awake, content, metrics_of, noise, prompts_of, saved_step,
                      seeded, toy, toy_loss, toy_run)
from processes import arm, killed, together
from safetensors.torch import load_file

import tasks
import train
from lib.cli import InputError
from lib.run import Run
from metastate import Cut, MetaState, Reset
from model import Backbone, Config, load
from sample import generate
from studies.reveals import sure
from train import at_random, cosine, fit, reveal_counts, surest, token_losses, unrolled_loss


# ------------------------------------------------------------------ how many a step reveals
@pytest.mark.parametrize("concentration", [0.2, 1.0, 40.0])
def test_the_counts_are_dirichlet_multinomial(concentration):
    """Mean and variance of how many tokens a step reveals, each step alike."""
    K, n, rows = 4, 20, 4000
    counts = reveal_counts(torch.full((rows,), n), K, concentration, seeded()).float()  # (rows, K)
    total = K * concentration
    variance = n / K * (1 - 1 / K) * (n + total) / (1 + total)
    assert (counts.mean(0) - n / K).abs().max() < 5 * (variance / rows) ** 0.5
    assert torch.allclose(counts.var(0), torch.full((K,), variance), rtol=0.12)


def test_the_counts_add_up_to_the_answer():
    """In rows of any length; some steps reveal nothing."""
    length = torch.randint(1, 20, (200,), generator=seeded(1))
    counts = reveal_counts(length, 6, 1.0, seeded())
    assert counts.shape == (200, 6) and torch.equal(counts.sum(1), length)
    assert int(counts.min()) == 0


def test_the_counts_follow_their_generator():
    """One seed gives one outcome, and a generator that has moved on another."""
    length, generator = torch.full((50,), 9), seeded(3)
    first, second = (reveal_counts(length, 4, 1.0, generator) for _ in range(2))
    assert torch.equal(first, reveal_counts(length, 4, 1.0, seeded(3)))
    assert not torch.equal(first, second)


# ------------------------------------------------------------------ which tokens it reveals
def losses_of(rows: int, n: int, masked: float = 0.6) -> torch.Tensor:
    """(rows, n) losses, infinite where nothing is masked."""
    loss = torch.rand(rows, n, generator=seeded(5))
    return loss.masked_fill(torch.rand(rows, n, generator=seeded(6)) > masked, torch.inf)


@pytest.mark.parametrize("reveal", [at_random, surest])
def test_so_many_of_the_masked_are_revealed(reveal):
    """As many as asked for in each row, none at all or all of them, and only what is masked."""
    loss = losses_of(300, 12)
    masked = loss.isfinite()
    count = (torch.rand(300, generator=seeded()) * (masked.sum(1) + 1)).long()
    now = reveal(loss, count, seeded())
    assert now.dtype == torch.bool and torch.equal(now.sum(1), count)
    assert not (now & ~masked).any() and (count == masked.sum(1)).any() and (count == 0).any()


def test_at_random_any_token_is_as_likely():
    """Whatever its loss, and neighbours no more often together than strangers."""
    rows, n = 6000, 12
    now = at_random(torch.arange(n).float().expand(rows, n), torch.full((rows,), 4), seeded())
    assert (now.float().mean(0) - 4 / n).abs().max() < 5 * (2 / 9 / rows) ** 0.5
    together = [float((now[:, 0] & now[:, i]).float().mean()) for i in (1, 6, 11)]
    assert max(together) - min(together) < 5 * (0.2 / rows) ** 0.5


def test_at_random_follows_its_generator():
    """One seed gives one outcome, and a generator that has moved on another."""
    loss, count, generator = losses_of(50, 12), torch.full((50,), 3), seeded(3)
    first, second = (at_random(loss, count, generator) for _ in range(2))
    assert torch.equal(first, at_random(loss, count, seeded(3))) and not torch.equal(first, second)


def test_the_surest_have_the_smallest_losses():
    """What is revealed has no larger loss than what is not."""
    loss = losses_of(300, 12)
    now = surest(loss, loss.isfinite().sum(1) // 2, seeded())
    revealed = loss.masked_fill(~now, -torch.inf).amax(1)
    assert (revealed <= loss.masked_fill(now, torch.inf).amin(1)).all()


# ------------------------------------------------------------------ the loss of each token
def heads_of(backbone: Backbone, rows: int = 3, n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (rows, n, d) that take a gradient, and targets (rows, n)."""
    target = torch.randint(0, backbone.config.vocab, (rows, n), generator=seeded())
    return noise(rows, n, backbone.config.dim).requires_grad_(), target


@pytest.mark.parametrize("most", [2 ** 24, 512 * 4 + 1, 1])
def test_token_losses_are_cross_entropy(backbone, most):
    """Rows one behind the other, all at a time, four, or one: losses and gradient are those of the
    logits as (B, V, n)."""
    h, target = heads_of(backbone)
    ours = token_losses(backbone, h, target, most)
    expected = F.cross_entropy(backbone.logits(h).transpose(1, 2), target, reduction="none")
    assert ours.shape == target.shape and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weight = torch.rand(target.shape, generator=seeded(1))
    gradients = [torch.autograd.grad((loss * weight).sum(), h)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("most, wide", [(2 ** 24, True), (512 * 4, False)])
def test_no_logits_are_kept_of_a_large_vocabulary(backbone, most, wide):
    """With the head in parts nothing that the backward pass needs is as wide as the vocabulary."""
    h, target = heads_of(backbone)
    kept, weight = [], backbone.head.weight.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_losses(backbone, h, target, most)
    assert wide == any(t.shape[-1:] == (512,) and t.data_ptr() != weight for t in kept)


# ------------------------------------------------------------------ the unrolled loss
@pytest.fixture
def exact(shallow, monkeypatch) -> Iterator[Backbone]:
    """`shallow` in double precision, and so is what is else computed in float32: nothing that could
    be seen is rounded."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    backbone = copy.deepcopy(shallow).double()
    backbone.config = replace(backbone.config, rope_float32=False)
    yield backbone
    torch.set_default_dtype(torch.float32)


def examples(lengths=((9, 12), (3, 5), (1, 14)), seed=0) -> list[tuple[list, list]]:
    """(prompt, answer) ids of the lengths given."""
    flat = iter(prompts_of([n for pair in lengths for n in pair], seed))
    return [(prompt, answer) for prompt, answer in zip(flat, flat)]


def batched(rows, extra: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, answer_mask, pad_mask), padded on the right."""
    width = max(len(p + a) for p, a in rows) + extra
    ids = torch.tensor([p + a + [EOS_ID] * (width - len(p + a)) for p, a in rows])
    position = torch.arange(width)
    answer = torch.stack([(position >= len(p)) & (position < len(p + a)) for p, a in rows])
    pad = torch.stack([position >= len(p + a) for p, a in rows])
    return ids, answer, pad


def loss_of(backbone: Backbone, memory, rows, seed: int = 0, **options) -> torch.Tensor:
    """The unrolled loss of (prompt, answer) pairs."""
    ids, answer, pad = batched(rows)
    return unrolled_loss(backbone, memory, ids, answer, generator=seeded(seed), pad_mask=pad,
                         **options)


class Recorded:
    """A reveal that keeps what it is asked and what it answers, step by step."""

    def __init__(self, reveal: Callable = at_random):
        self.reveal, self.losses, self.numbers, self.revealed = reveal, [], [], []
        self.counts = getattr(reveal, "counts", reveal_counts)

    def __call__(self, loss, count, generator):
        self.losses.append(loss)
        self.numbers.append(count)
        self.revealed.append(self.reveal(loss, count, generator))
        return self.revealed[-1]


class Slow(NamedTuple):
    """What `slow_loss` finds."""

    loss: torch.Tensor
    dense: dict[str, float]             # mean of dense_k over the rows that have one
    losses: list[list[list[float]]]     # step, row, the tokens still masked


def slow_loss(backbone: Backbone, memory: MetaState, rows, revealed: list[torch.Tensor],
              lam: float = 0.5, reset: bool = False, shift: bool | None = None) -> Slow:
    """The loss row by row without padding, with the logits of every position. revealed: for each
    step which of the tokens still masked it reveals; `shift` by default as the family has it."""
    total, losses = torch.zeros(()), [[[] for _ in rows] for _ in revealed]
    for row, (prompt, answer) in enumerate(rows):
        first, N = len(prompt), len(answer)
        state, still = memory.initial(1), list(range(N))
        for k, chosen in enumerate(revealed):
            if not still:
                break
            ids = prompt + [MASK_ID if i in still else answer[i] for i in range(N)]
            t, span = torch.tensor([len(still) / N]), (first, N)
            h = backbone.hidden(memory.inject(backbone.embed(torch.tensor([ids])), state, t, span))
            logits = backbone.logits(h)[0]                                           # (T, V)
            if backbone.config.shift if shift is None else shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            ce = {i: -logits[first + i].log_softmax(-1)[answer[i]] for i in still}
            losses[k][row] = [x.item() for x in ce.values()]
            now = [i for place, i in enumerate(still) if chosen[row, place]]
            if now:
                dense, reveal = (sum(ce[i] for i in at) / len(at) for at in (still, now))
                total = total + len(now) / N * (lam * dense + (1 - lam) * reveal)
            still = [i for i in still if i not in now]
            state = memory.initial(1) if reset else memory.update(state, h, t, span)
    dense = {f"dense_{k + 1}": [sum(x) / len(x) for x in step if x]
             for k, step in enumerate(losses)}
    return Slow(total / len(rows), {name: sum(x) / len(x) for name, x in dense.items()}, losses)


def grads_of(memory: MetaState, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every parameter of the memory, zero where none arrives."""
    found = torch.autograd.grad(loss, list(memory.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(memory.named_parameters(), found)}


@pytest.mark.parametrize("options, reset", [
    (dict(), False), (dict(), True), (dict(K=2, lam=0.0, concentration=5.0), False),
    (dict(K=5, lam=1.0, concentration=0.3), True), (dict(K=5, reveal=surest), False),
    (dict(K=5, reveal=sure), False)])
def test_the_loss_is_the_slow_one(exact, options, reset):
    """Masks, the clock, weights, both means, Dream's shift, prompts and answers of several lengths
    with padding behind, the control without memory: loss and gradients are those of a loop over
    rows and steps that cuts the padding off."""
    memory, rows = awake(exact).double(), examples()
    asked = Recorded(options.get("reveal", at_random))
    loss = loss_of(exact, Reset(memory) if reset else memory, rows,
                   **options | {"reveal": asked})
    slow = slow_loss(exact, memory, rows, asked.revealed, options.get("lam", 0.5), reset).loss
    assert loss.item() == pytest.approx(slow.item(), rel=1e-9)
    assert_close(grads_of(memory, loss), grads_of(memory, slow), rtol=1e-9)


def test_figures_are_the_dense_losses(shallow):
    """Of each step the mean over the rows that still have something masked."""
    memory, rows, asked, figures = awake(shallow), examples(((4, 1), (3, 9))), Recorded(), {}
    loss_of(shallow, memory, rows, K=5, reveal=asked, figures=figures)
    assert (asked.losses[-1].isfinite().sum(1) == 0).any()  # one row is done before the last step
    assert figures == pytest.approx(slow_loss(shallow, memory, rows, asked.revealed).dense,
                                    rel=1e-5)


def test_what_a_reveal_is_asked(shallow):
    """The losses of the tokens still masked in each row, from left to right, infinity behind them;
    and the counts, drawn once for all steps."""
    memory, rows, asked = awake(shallow), examples(), Recorded()
    loss_of(shallow, memory, rows, seed=4, K=3, concentration=2.0, reveal=asked)
    slow = slow_loss(shallow, memory, rows, asked.revealed)
    for ours, step in zip(asked.losses, slow.losses, strict=True):
        assert not ours.requires_grad
        for row, expected in zip(ours.tolist(), step, strict=True):
            behind = [math.inf] * (len(row) - len(expected))
            assert row == pytest.approx(expected + behind, rel=1e-4)
    lengths = torch.tensor([len(answer) for _, answer in rows])
    counts = reveal_counts(lengths, 3, 2.0, seeded(4))
    assert torch.equal(torch.stack(asked.numbers, 1), counts[:, :len(asked.numbers)])


@pytest.mark.parametrize("K", [1, 3, 6])
def test_the_steps_reveal_the_answer_once(shallow, K):
    """From fully masked to fully revealed: in each row as many tokens as it has, and never more at
    a step than it still masks."""
    asked, rows = Recorded(), examples()
    loss_of(shallow, awake(shallow), rows, K=K, reveal=asked)
    assert sum(now.sum(1) for now in asked.revealed).tolist() == [len(a) for _, a in rows]


def test_the_loss_without_dreams_shift_is_another(backbones):
    """What the tests above would see if the logits of position i were taken for token i."""
    memory, rows, asked = awake(backbones["dream"]), examples(), Recorded()
    loss = loss_of(backbones["dream"], memory, rows, reveal=asked)
    unshifted = slow_loss(backbones["dream"], memory, rows, asked.revealed, shift=False).loss
    assert abs(loss - unshifted) > 0.02


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_one_step_is_masked_cross_entropy(backbone, lam):
    """K = 1 with an untrained memory: the backbone's cross-entropy with the whole answer masked."""
    rows = examples()
    ids, answer, pad = batched(rows)
    logits = backbone(ids.masked_fill(answer, MASK_ID), pad)
    if backbone.config.shift:
        logits = logits.roll(1, 1)
    expected = sum(F.cross_entropy(logits[i, answer[i]], ids[i, answer[i]])
                   for i in range(len(rows))) / len(rows)
    loss = loss_of(backbone, MetaState.for_backbone(backbone), rows, K=1, lam=lam)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("K, concentration", [(1, 1.0), (4, 1.0), (6, 0.1), (3, 30.0)])
def test_the_weights_of_the_steps_sum_to_one(family, K, concentration):
    """A head that says nothing has log V at every token, so the whole loss is log V, whatever the
    steps reveal."""
    backbone, _ = load(DATA / family, "cpu")
    backbone.head.weight.zero_()
    loss = loss_of(backbone, awake(backbone), examples(), K=K, concentration=concentration, lam=0.3)
    assert loss.item() == pytest.approx(math.log(backbone.config.vocab), rel=1e-5)


def test_steps_that_reveal_nothing(exact):
    """Far more steps than tokens: loss and gradients are finite, and those of the slow loop."""
    memory, rows = awake(exact).double(), examples(((4, 2), (3, 1), (5, 3)))
    asked = Recorded()
    loss = loss_of(exact, memory, rows, K=8, concentration=0.2, reveal=asked)
    assert all((torch.stack(asked.numbers) == 0).any(0))
    grads = grads_of(memory, loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    slow = slow_loss(exact, memory, rows, asked.revealed).loss
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert_close(grads, grads_of(memory, slow), rtol=1e-9)


@pytest.mark.parametrize("answer", [
    [[0, 1, 1, 0], [0, 0, 0, 0]], [[0, 1, 0, 1], [0, 1, 1, 1]], [[1, 0, 1, 1], [1, 1, 1, 1]]],
    ids=str)
def test_answers_that_are_no_run(backbone, answer):
    """A row without an answer, or with one in pieces, is refused."""
    with pytest.raises(InputError, match="contiguous"):
        unrolled_loss(backbone, MetaState.for_backbone(backbone), torch.ones(2, 4).long(),
                      torch.tensor(answer).bool())


def test_the_head_sees_masked_answer_positions_only(backbone):
    """A head of 126,464 rows is the largest matrix product of LLaDA: it is computed where a token
    is still masked; rows of a batch fill up to the longest."""
    rows, seen, asked = examples(), [], Recorded()
    handle = backbone.head.register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0].shape[:-1].numel()))
    loss_of(backbone, awake(backbone), rows, K=4, concentration=5.0, reveal=asked)
    handle.remove()
    masked = torch.tensor([len(answer) for _, answer in rows])
    for count, now in zip(seen, asked.revealed, strict=True):
        assert count == len(rows) * int(masked.max())
        masked = masked - now.sum(1)


# ------------------------------------------------------------------ its gradient
CHECKED = ("start", "identity", "time.mlp.0.weight", "updater.from_c.weight",
           "updater.from_s.weight", "mixer.attention.kv.weight", "mixer.attention.slopes",
           "injector.attention.out.weight", "injector.norm_s.modulation.weight")


FEW = ((5, 8), (3, 6))  # prompts and answers


@pytest.fixture(scope="module")
def gradients(shallows) -> dict[str, dict[str, torch.Tensor]]:
    """By family the gradient of the loss of a few examples, for every parameter of a memory."""
    found = {}
    for family, backbone in shallows.items():
        memory = awake(backbone)
        found[family] = grads_of(memory, loss_of(backbone, memory, examples(FEW)))
    return found


@pytest.mark.parametrize("name", CHECKED)
def test_the_gradient_is_that_of_finite_differences(shallow, family, gradients, name):
    """Through all K steps, for each part of the memory: the loss changes along the gradient as the
    gradient says."""
    memory, rows = awake(shallow), examples(FEW)
    p, gradient = memory.get_parameter(name), gradients[family][name]
    slope, kept, losses = float(gradient.norm()), p.detach().clone(), []
    step = min(1e-3 / slope, 0.1 * float(kept.norm()))  # moves the loss by 0.001 at the most
    with torch.no_grad():
        for sign in (1, -1):
            p.copy_(kept + sign * step * gradient / slope)
            losses.append(float(loss_of(shallow, memory, rows)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("K", [2, 4])
def test_cut_lets_gradients_reach_one_step_back(shallow, K):
    """The ablation has the same loss. Mixer and Updater learn from the step after theirs, so with
    two steps their gradient is the whole one; with four they miss the later steps. What reaches
    further back, through the first state or through what it did to the activations, is gone."""
    memory, rows = awake(shallow), examples()
    far = ("start", "injector.attention.out.weight", "injector.attention.kv.weight")
    near = ("updater.from_c.weight", "mixer.attention.kv.weight")
    whole, cut = (loss_of(shallow, m, rows, K=K) for m in (memory, Cut(memory)))
    assert whole.item() == cut.item()
    whole, cut = grads_of(memory, whole), grads_of(memory, cut)
    for name in near + far:
        same = torch.allclose(whole[name], cut[name], rtol=1e-3, atol=1e-7)
        assert same == (K == 2 and name in near), name
        assert cut[name].norm() > 0


def test_mixer_and_updater_have_no_part_in_reset(shallow):
    """The control sees the first state at every step: its loss is another one, whatever they do."""
    memory, rows = awake(shallow), examples()
    carried, reset = (loss_of(shallow, m, rows).item() for m in (memory, Reset(memory)))
    assert abs(carried - reset) > 1e-3
    with torch.no_grad():
        for p in (*memory.mixer.parameters(), *memory.updater.parameters()):
            p.add_(0.3)
    assert loss_of(shallow, Reset(memory), rows).item() == reset
    assert loss_of(shallow, memory, rows).item() != carried


def test_checkpointing_changes_nothing(family):
    """Recomputed blocks give the same loss and gradients, and blocks really are recomputed."""
    backbone, _ = load(DATA / family, "cpu")
    memory, calls, outcomes = awake(backbone), [], []
    backbone.blocks[0].register_forward_pre_hook(lambda *a: calls.append(1))
    for backbone.checkpointing in (False, True):
        calls.clear()
        loss = loss_of(backbone, memory, examples(), K=3)
        outcomes.append((loss.item(), grads_of(memory, loss), len(calls)))
    (plain, grads, once), (same, again, twice) = outcomes
    assert plain == pytest.approx(same, rel=1e-6)
    assert_close(grads, again)
    assert (once, twice) == (3, 6)


# ------------------------------------------------------------------ what `fit` computes
def test_cosine():
    """A line up to 1 at the end of the warm-up, half way down in the middle, 0 at the end."""
    shares = [cosine(step, 110, 10) for step in range(111)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1 and shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0)
    assert shares[35] == pytest.approx((1 + 2 ** -0.5) / 2)
    assert all(a > b for a, b in zip(shares[10:], shares[11:]))
    assert cosine(0, 10, 0) == 1


@pytest.mark.parametrize("schedule", [cosine, lambda step, steps, warmup: (steps - step) / steps],
                         ids=["cosine", "a line"])
def test_the_learning_rate_follows_the_schedule(tmp_path, schedule):
    """A constant gradient moves AdamW by the learning rate at each step: the way is their sum."""
    p = nn.Parameter(torch.zeros(4))
    fit({"p": p}, lambda step, micro: (p.sum(), {}), tmp_path, steps=20, lr=0.01, warmup=5,
        schedule=schedule)
    way = 0.01 * sum(schedule(step, 20, 5) for step in range(20))
    assert p.tolist() == pytest.approx([-way] * 4, rel=1e-4)


def test_weight_decay_is_for_matrices(tmp_path):
    """Biases, norms and slopes are not pulled towards zero."""
    parameters = {"matrix": nn.Parameter(torch.ones(2, 2)), "vector": nn.Parameter(torch.ones(2))}
    fit(parameters, lambda *a: (sum(0 * p.sum() for p in parameters.values()), {}), tmp_path,
        steps=1, lr=0.1, warmup=1, weight_decay=0.5)
    assert parameters["matrix"].flatten().tolist() == pytest.approx([1 - 0.1 * 0.5] * 4)
    assert parameters["vector"].tolist() == [1.0, 1.0]


def test_gradients_are_averaged_and_clipped(tmp_path):
    """Over the micro-batches, then to the norm given: AdamW's first moment after one step is a
    tenth of that gradient; the norm in the metrics is the one before clipping."""
    toy_run(tmp_path, steps=1, micros=3, clip=0.5)
    fresh = toy()
    loss_fn = toy_loss(fresh)
    (sum(loss_fn(0, micro)[0] for micro in range(3)) / 3).backward()
    norm = torch.stack([p.grad.norm() for p in fresh.values()]).norm()
    assert norm > 0.5
    stored = load_file(tmp_path / STATE)
    for name, p in fresh.items():
        assert torch.allclose(stored[f"exp_avg.{name}"], 0.1 * 0.5 * p.grad / norm, atol=1e-6)
    assert metrics_of(tmp_path)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


# ------------------------------------------------------------------ train.py from end to end
@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eighty short examples."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "response": f"{i} " * (1 + i % 4)}) + "\n"
                            for i in range(80)))
    return path


def arguments(ckpt: Path, out: Path, *flags) -> list[str]:
    """A run of three short steps on the checkpoint's own tasks."""
    return ["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", "--steps", "3",
            "--batch-size", "8", "--micros", "2", "--K", "2", "--warmup", "2", "--save-every", "1",
            "--slots", "6", *map(str, flags)]


@pytest.fixture
def unevaluated(monkeypatch) -> None:
    """Runs without the evaluation at their end, which takes longer than their few steps."""
    monkeypatch.setattr(train, "fit", lambda *args, **options: fit(
        *args, **options | {"evaluate": None, "baseline": None}))


@pytest.fixture
def run(small_ckpt, tmp_path, capsys) -> Callable:
    """run(*flags, out=...) -> (exit code, stdout, stderr) of a few steps of train.py."""
    def call(*flags, out=tmp_path / "out") -> tuple[int, str, str]:
        return train.main(arguments(small_ckpt, out, *flags)), *capsys.readouterr()
    return call


class Call(NamedTuple):
    """What the loss is asked for."""

    index: int            # among those of its kind
    training: bool        # or the held-out loss
    K: int
    lam: float
    concentration: float
    memory: str           # the name of its class
    reveal: Callable
    checkpointing: bool
    rows: list[tuple[int, ...]]


@pytest.fixture
def asked(monkeypatch) -> list[Call]:
    """What train.py asks of the loss, call by call."""
    calls = []

    def spy(backbone, memory, ids, answer, K, lam, concentration, generator, *, reveal, **others):
        training = torch.is_grad_enabled()
        if memory is not None:  # the frozen backbone's are not training's
            calls.append(Call(sum(c.training == training for c in calls), training, K, lam,
                              concentration, type(memory).__name__, reveal, backbone.checkpointing,
                              [tuple(row) for row in ids.tolist()]))
        return unrolled_loss(backbone, memory, ids, answer, K, lam, concentration, generator,
                             reveal=reveal, **others)

    monkeypatch.setattr(train, "unrolled_loss", spy)
    return calls


def test_training_from_end_to_end(run, small_ckpt, data, tmp_path):
    """The memory of a short run on a file loads for its backbone, has moved, and generates; the
    share of the parameters is said, and the held-out loss measured."""
    code, out, err = run("--data", data)
    assert code == 0 and err == "" and "% of the backbone" in out and MEMORY in out
    backbone, tokenizer = load(small_ckpt, "cpu")
    memory = MetaState.load(tmp_path / "out" / MEMORY, backbone)
    assert memory.injector.attention.out.weight.abs().max() > 0 and memory.sizes["slots"] == 6
    prompt = torch.tensor([tokenizer.encode("sudoku\n")])
    sample = generate(backbone, prompt, memory=memory, gen_length=8, block_length=8, steps=4)
    assert not (sample.ids == backbone.config.mask_id).any()
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and "held_out" in lines[-1]
    assert lines[0].keys() == {"step", "held_out"}
    assert {"loss", "dense_1", "dense_2", "grad_norm"} <= lines[1].keys()


def test_the_seed_decides(run, unevaluated, tmp_path):
    """The same seed gives the same memory, bit for bit, and another seed another one."""
    for flags, name in (((), "out"), ((), "again"), (("--seed", 1), "other")):
        run(*flags, out=tmp_path / name)
    assert_same_run(tmp_path / "out", tmp_path / "again")
    assert content(tmp_path / "out" / MEMORY) != content(tmp_path / "other" / MEMORY)


VARIANTS = [("--reset", "--no-time", "--no-local"), ("--K", "1,3", "--reveal", "surest"),
            ("--cut", "--width", "16", "--checkpointing", "--concentration", "5", "--lam", "0")]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_every_variant_resumes(run, unevaluated, small_ckpt, tmp_path, monkeypatch, flags):
    """Each control and ablation, stopped after its first checkpoint and started again, ends with
    the bytes of a run left alone; what the flags say is in the file."""
    flags, save = (*flags, "--steps", "2"), Run.save
    assert run(*flags, out=tmp_path / "whole")[0] == 0

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        assert run(*flags)[0] == 130 and saved_step(tmp_path / "out") == 1
    assert run(*flags)[0] == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    sizes = MetaState.load(tmp_path / "out" / MEMORY, load(small_ckpt, "cpu")[0]).sizes
    assert sizes["time"] == ("--no-time" not in flags)
    assert sizes["local"] == ("--no-local" not in flags)
    assert sizes["width"] == (16 if "--width" in flags else 32)


@pytest.mark.parametrize("flags, expected", [
    ((), (2, 0.5, 1.0, "MetaState", False)),
    (("--cut", "--K", "3", "--lam", "0.25", "--concentration", "3"), (3, 0.25, 3.0, "Cut", False)),
    (("--reset", "--checkpointing"), (2, 0.5, 1.0, "Reset", True))],
    ids=["defaults", "cut and numbers", "reset"])
def test_the_flags_reach_the_loss(run, asked, flags, expected):
    """Steps, weights, control, ablation and the recomputing of blocks are as asked for, in training
    and in the evaluation."""
    assert run(*flags, "--steps", 1)[0] == 0
    assert {(c.K, c.lam, c.concentration, c.memory, c.checkpointing) for c in asked} == {expected}


def test_of_several_k_each_micro_batch_draws_one(run, asked):
    """As often as each is named, in training; the held-out loss is always of the first."""
    run("--K", "1,1,3", "--steps", 2, "--micros", 9)
    drawn = [call.K for call in asked if call.training]
    assert set(drawn) == {1, 3} and 2 <= drawn.count(3) <= 9 and len(drawn) == 18
    assert {call.K for call in asked if not call.training} == {1}


def test_figures_are_of_trajectories_of_the_first_k(run, unevaluated, tmp_path):
    """dense_k of the metrics are those of --K's first: steps of another count are no neighbours."""
    run("--K", "2,4", "--steps", 4)
    names = {name for line in metrics_of(tmp_path / "out") for name in line}
    assert {"dense_1", "dense_2"} <= names and "dense_3" not in names


def test_the_frozen_backbone_is_measured_before_the_first_step(run, small_ckpt, tmp_path, capsys):
    """On the examples of every later evaluation: what an untrained memory has, for it changes
    nothing. A run that goes on does not measure it again, and the first lines say what is what."""
    code, out, _ = run("--steps", 1, "--lr", "1e-12")
    before, after = metrics_of(tmp_path / "out")
    assert (before["step"], after["step"]) == (0, 1)
    assert before["held_out"] == pytest.approx(after["held_out"], rel=1e-6)
    assert f"step 0/1  0 s  held_out {before['held_out']:.4f}" in out and train.LEGEND in out
    run("--steps", 2, "--lr", "1e-12")
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [0, 1, 2]


def test_an_unfinished_runs_memory_can_be_used(run, small_ckpt, tmp_path, monkeypatch):
    """It is written with every checkpoint."""
    monkeypatch.setattr("lib.run.Run.check_finite", lambda self, step, figures: 1 / (step != 2))
    with pytest.raises(ZeroDivisionError):
        run("--steps", 3, "--save-every", 1)
    assert saved_step(tmp_path / "out") == 2
    memory = MetaState.load(tmp_path / "out" / MEMORY, load(small_ckpt, "cpu")[0])
    state = load_file(tmp_path / "out" / STATE)
    assert all(torch.equal(x, state[f"weight.{name}"]) for name, x in memory.named_parameters())


@pytest.mark.parametrize("name, reveal", [("random", at_random), ("surest", surest)])
def test_what_a_step_reveals_is_asked_for(run, asked, name, reveal):
    """In training; the held-out loss stays that of random reveals, so that runs can be compared."""
    run("--reveal", name, "--steps", 1)
    assert {call.reveal for call in asked if call.training} == {reveal}
    assert {call.reveal for call in asked if not call.training} == {at_random}


@pytest.mark.parametrize("large, flags, expected", [
    (True, [], (1, 16, True)), (False, [], (8, 4, False)),
    (True, ["--batch-size", "3", "--micros", "2", "--no-checkpointing"], (3, 2, False)),
    (False, ["--batch-size", "3", "--micros", "2", "--checkpointing"], (3, 2, True))], ids=str)
def test_defaults_go_by_the_backbone(small_ckpt, tmp_path, asked, monkeypatch, large, flags,
                                     expected):
    """An 8B model takes its examples one by one and recomputes its blocks, a small one does not;
    what the command line says is kept."""
    monkeypatch.setattr(Config, "large", large)
    monkeypatch.setattr(train, "fit", lambda parameters, loss_of, out, *, micros, **_: [
        loss_of(0, micro) for micro in range(micros)])  # one step, without its evaluation
    assert train.main(["--ckpt", str(small_ckpt), "--out", str(tmp_path), "--device", "cpu",
                       "--steps", "1", "--K", "1", "--slots", "4", "--width", "32", *flags]) == 0
    assert {len(call.rows) for call in asked} == {expected[0]}
    assert (len(asked), asked[0].checkpointing) == expected[1:]


def test_random_weights_learn_from_bytes(data, tmp_path, asked, capsys):
    """random:NAME with a file: each byte is a token, so that a training can be timed without
    weights; the pace is said with the losses. Without a file there is nothing to learn."""
    argv = ["--ckpt", f"random:{DATA / 'llada'}", "--out", str(tmp_path / "out"), "--device", "cpu",
            "--dtype", "float32", "--steps", "1", "--batch-size", "2", "--micros", "1", "--K", "3"]
    assert train.main([*argv, "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert re.search(r", [\d,]+ tokens/s, \d+% of a matrix product\n", out)
    assert (tmp_path / "out" / MEMORY).is_file()
    texts = [json.loads(line) for line in data.read_text().splitlines()]
    letters = {len((text["prompt"] + text["response"]).encode()) for text in texts}
    assert {sum(i < 256 for i in row) for call in asked for row in call.rows} <= letters
    assert train.main(argv) == 2 and "--data" in capsys.readouterr().err


def test_the_figures_are_those_of_all_micro_batches(run, unevaluated, tmp_path):
    """With K = 1 the loss is dense_1: what the metrics and the bar show has to be the mean over the
    micro-batches, as the loss is, and not the last one's."""
    run("--K", 1, "--micros", 4)
    for line in metrics_of(tmp_path / "out"):
        assert line["dense_1"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("micros", [1, 3])
def test_the_held_out_loss_is_of_many_examples(run, data, asked, micros):
    """The batches of an evaluation hold different examples, 64 in all, however many micro-batches a
    step has."""
    run("--data", data, "--micros", micros, "--steps", 1)
    seen = [row for call in asked if not call.training for row in call.rows]
    assert len(seen) == 64  # of 80 examples 10 are held out, and all of these are among them
    assert len({tuple(i for i in row if i != 1) for row in seen}) == 10


def test_the_checkpoints_tasks_are_its_data(run, small_ckpt, asked):
    """Without --data, one task a micro-batch in turn, held-out examples for the evaluation only."""
    assert run("--steps", 2, "--micros", 4)[0] == 0
    tokenizer = load(small_ckpt, "cpu")[1]
    for call in asked:
        task = tasks.TASKS[["sudoku", "chain", "follow", "sums"][call.index % 4]]
        for row in call.rows:
            prompt, answer = (tokenizer.decode(ids, skip_special=True)
                              for ids in (row[:-24], row[-24:]))
            assert task.check(prompt, answer)
            assert tasks.is_held_out(task, prompt, answer) == (not call.training)
    assert sum(call.training for call in asked) == len(asked) - 8 == 8


class Echo:
    """A task from outside, with prompts of several lengths."""

    def make(self, rng: random.Random) -> tuple[str, str]:
        word = "xyz"[:rng.randint(1, 3)]
        return f"echo {rng.randrange(1000)} {word}\n", word

    def check(self, prompt: str, text: str) -> bool:
        return text == prompt.split()[-1]


def test_tasks_from_outside_are_trained_on(run, small_ckpt, tmp_path, monkeypatch, asked):
    """A line in TASKS and the name in the checkpoint's generation_config.json are enough; the
    tokenizer has no token for it, and prompts of different lengths are padded."""
    folder = shutil.copytree(small_ckpt, tmp_path / "ckpt")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 6, "tasks": ["echo"]}')
    monkeypatch.setitem(tasks.TASKS, "echo", Echo())
    assert run("--ckpt", folder, "--steps", 2, "--batch-size", 3)[0] == 0
    tokenizer = load(folder, "cpu")[1]
    texts = [tokenizer.decode(row, skip_special=True) for call in asked for row in call.rows]
    assert all(text.startswith("echo ") and Echo().check(*text.rsplit("\n", 1)) for text in texts)


# ------------------------------------------------------------------ killed, and in two processes
def killed_training(argv: list[str]) -> None:
    """train.py, killed when it writes its second checkpoint."""
    arm("half a checkpoint", 2)
    train.main(argv)


def test_a_killed_training_ends_with_the_same_memory(run, small_ckpt, tmp_path):
    """train.py under SIGKILL while it writes, then resumed: bit for bit the memory of a run left
    alone."""
    killed(killed_training, arguments(small_ckpt, tmp_path / "out"))
    assert saved_step(tmp_path / "out") == 1
    run(out=tmp_path / "whole")
    assert run()[0] == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def training_in_two(rank: int, argv: list[str]) -> None:
    """train.py in one of two processes."""
    sys.exit(train.main(argv))


@pytest.mark.parametrize("flags", [(), ("--reset",)], ids=["memory", "reset"])
def test_training_in_two_processes(run, small_ckpt, tmp_path, flags):
    """train.py under two gloo processes: the gradients of the first step are those of one process
    with the same micro-batches; also for the control, whose Mixer and Updater get no gradient."""
    flags = (*flags, "--steps", "1")
    assert together(training_in_two, arguments(small_ckpt, tmp_path / "two", *flags)) == [0, 0]
    run(*flags, out=tmp_path / "one")
    one, two = (load_file(tmp_path / name / STATE) for name in ("one", "two"))
    moments = [{k: v for k, v in state.items() if k.startswith("exp_avg.")} for state in (one, two)]
    assert_close(*moments, rtol=1e-4, atol=1e-9)
    assert (tmp_path / "two" / MEMORY).is_file()


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("flags, words", [
    (("--ckpt", "no/such/folder"), ["no/such/folder"]), (("--data", "none.jsonl"), ["none.jsonl"]),
    (("--K", "0"), ["--K"]), (("--K", "4,"), ["--K"]), (("--K", "4,x"), ["--K"]),
    (("--reveal", "best"), ["--reveal"]), (("--steps", "-1"), ["--steps"]),
    (("--micros", "0"), ["--micros"]), (("--batch-size", "0"), ["--batch-size"]),
    (("--lam", "1.5"), ["--lam"]), (("--lam", "nan"), ["--lam"]),
    (("--concentration", "0"), ["--concentration"]),
    (("--concentration", "inf"), ["--concentration"]), (("--save-every", "0"), ["--save-every"]),
    (("--steps", "x"), ["--steps"]),
    (("--seed", "-1"), ["--seed"]), (("--slots", "0"), ["--slots"]),
    (("--slots", "-2"), ["--slots"]), (("--width", "30"), ["--width", "30"]),
    (("--width", "0"), ["--width"]), (("--lr", "nan"), ["--lr"]), (("--lr", "-1"), ["--lr"]),
    (("--warmup", "-1"), ["--warmup"]), (("--device", "gpu"), ["gpu"]),
    (("--ckpt", DATA / "dream"), ["tokenizer"])],
    ids=lambda flags: " ".join(map(str, flags)) if isinstance(flags, tuple) else "")
def test_arguments_that_make_no_sense(run, tmp_path, flags, words):
    """One line that names the argument, exit code 2, and no run begun."""
    code, out, err = run(*flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words)
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_flags_is_refused(run, unevaluated):
    """The folder of a run is not overwritten by another one."""
    run()
    code, _, err = run("--lam", 0.25)
    assert code == 2 and "lam" in err and "--out" in err and err.count("\n") == 1


@pytest.mark.parametrize("line, flags, words", [
    ('{"prompt": "a"}', (), ["{path}:2"]), ("", ("--max-length", "4"), ["{path}", "4 tokens"])],
    ids=["a bad line", "too long"])
def test_a_file_that_cannot_be_trained_on(run, tmp_path, line, flags, words):
    """File and line number, and exit code 2."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line)
    code, _, err = run("--data", path, *flags)
    assert code == 2 and err.count("\n") == 1
    assert all(word.format(path=path) in err for word in words)
