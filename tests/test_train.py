"""Training: the unrolled loss against a slow one, the loop and its exact resume, several processes,
data files, and train.py from end to end."""
from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import DATA, EOS_ID, MASK_ID, byte_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_metastate import awake
from test_sample import prompts_of
from tqdm import tqdm

import model
import tiny
import train
from metastate import MetaState
from model import Backbone, Config, InputError, Tokenizer, load
from sample import generate
from train import (cosine, file_batches, fit, read_examples, restarted, reveal_steps, trapezoid,
                   unrolled_loss)

STATE, METRICS, MEMORY = "training.safetensors", "metrics.jsonl", "metastate.safetensors"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ which token at which step
@pytest.mark.parametrize("K", [1, 3, 6])
def test_the_steps_partition_the_answer(K):
    """Every answer token is revealed in one step, nothing else ever is, in rows of any length."""
    lengths = torch.randint(1, 20, (200,), generator=seeded(0))
    starts = torch.randint(0, 8, (200,), generator=seeded(1))
    position = torch.arange(30)
    answer = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])
    steps = reveal_steps(answer, K, 1.0, seeded(2))
    assert steps.shape == answer.shape and steps.dtype == torch.int64
    assert torch.equal(steps >= 0, answer) and int(steps.max()) == K - 1
    assert set(steps[~answer].tolist()) == {-1}


@pytest.mark.parametrize("concentration", [0.2, 1.0, 40.0])
def test_the_counts_are_dirichlet_multinomial(concentration):
    """Mean and variance of how many tokens a step reveals, each step alike."""
    K, n, rows = 4, 20, 4000
    steps = reveal_steps(torch.ones(rows, n).bool(), K, concentration, seeded(0))
    counts = torch.stack([(steps == k).sum(1) for k in range(K)], 1).float()         # (rows, K)
    total = K * concentration
    variance = n / K * (1 - 1 / K) * (n + total) / (1 + total)
    assert (counts.mean(0) - n / K).abs().max() < 5 * (variance / rows) ** 0.5
    assert torch.allclose(counts.var(0), torch.full((K,), variance), rtol=0.12)


def test_the_order_is_random():
    """Each position is as likely as any other in each step, and neighbours are no more often
    revealed together than strangers."""
    rows, n, K = 6000, 12, 3
    steps = reveal_steps(torch.ones(rows, n).bool(), K, 1.0, seeded(0))
    for k in range(K):
        share = (steps == k).float().mean(0)                                         # (n,)
        assert (share - 1 / K).abs().max() < 5 * (2 / 9 / rows) ** 0.5
    together = [(steps[:, 0] == steps[:, i]).float().mean() for i in (1, 6, 11)]
    assert max(together) - min(together) < 5 * (0.5 / rows) ** 0.5


def test_steps_may_be_empty_and_follow_their_generator():
    """Some steps reveal nothing; one seed gives one outcome, and a generator that has moved on
    another."""
    answer, generator = torch.ones(50, 9).bool(), seeded(3)
    first, second = (reveal_steps(answer, 4, 1.0, generator) for _ in range(2))
    assert torch.equal(first, reveal_steps(answer, 4, 1.0, seeded(3)))
    assert not torch.equal(first, second)
    assert any(len(set(row.tolist())) < 4 for row in first)
    assert len({tuple(row.tolist()) for row in first}) > 45


# ------------------------------------------------------------------ the loss
def examples(lengths=((9, 12), (3, 5), (1, 16), (7, 8)), seed=0) -> list[tuple[list, list]]:
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


def loss_of(backbone: Backbone, memory: MetaState, rows, seed: int = 0, **options) -> torch.Tensor:
    ids, answer, pad = batched(rows)
    return unrolled_loss(backbone, memory, ids, answer, generator=seeded(seed), pad_mask=pad,
                         **options)


def slow_loss(backbone: Backbone, memory: MetaState, rows, seed: int = 0, K: int = 4,
              lam: float = 0.5, concentration: float = 1.0, reset: bool = False,
              surest: bool = False,
              shift: bool | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss row by row without padding, with the logits of every position, and the mean of
    dense_k over the rows that have one; `shift` by default as the family has it."""
    revealed = reveal_steps(batched(rows)[1], K, concentration, seeded(seed))
    total, dense_at = torch.zeros(()), {f"dense_{k + 1}": [] for k in range(K)}
    for (prompt, answer), steps in zip(rows, revealed):
        first, N = len(prompt), len(answer)
        steps, state = steps[first:first + N].tolist(), memory.initial(1)
        still = list(range(N))
        for k in range(K):
            if not still:
                break
            ids = prompt + [MASK_ID if i in still else answer[i] for i in range(N)]
            t, span = torch.tensor([len(still) / N]), (first, N)
            h = backbone.hidden(memory.inject(backbone.embed(torch.tensor([ids])), state, t, span))
            logits = backbone.logits(h)[0]                                           # (T, V)
            if backbone.config.shift if shift is None else shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            ce = {i: -logits[first + i].log_softmax(-1)[answer[i]] for i in still}
            dense = sum(ce[i] for i in still) / len(still)
            dense_at[f"dense_{k + 1}"].append(dense)
            now = [i for i in range(N) if steps[i] == k]
            if surest:
                now = sorted(still, key=lambda i: ce[i].item())[:len(now)]
            still = [i for i in still if i not in now]
            if now:
                reveal = sum(ce[i] for i in now) / len(now)
                total = total + len(now) / N * (lam * dense + (1 - lam) * reveal)
            state = memory.initial(1) if reset else memory.update(state, h, t, span)
    return total / len(rows), {k: sum(v) / len(v) for k, v in dense_at.items() if v}


def grads_of(memory: MetaState, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every parameter of the memory, zero where none arrives."""
    found = torch.autograd.grad(loss, list(memory.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(memory.named_parameters(), found)}


def assert_close(first: dict, second: dict, rtol: float = 1e-3, atol: float = 1e-6) -> None:
    """Tensor by tensor, the length of the difference against that of the tensor."""
    assert first.keys() == second.keys()
    for name in first:
        difference = float((first[name] - second[name]).norm())
        assert difference <= rtol * float(second[name].norm()) + atol, name


@pytest.mark.parametrize("options", [
    dict(), dict(K=2, lam=0.0, concentration=5.0), dict(K=5, lam=1.0, concentration=0.3),
    dict(K=3, reset=True), dict(K=5, surest=True)], ids=str)
def test_the_loss_is_the_slow_one(backbone, options):
    """Reveals, masks, the clock, weights, both means, Dream's shift, prompts and answers of several
    lengths with padding behind: the loss, its figures and its gradients are those of a loop over
    rows and steps that cuts the padding off."""
    memory, rows, figures = awake(backbone), examples(), {}
    loss = loss_of(backbone, memory, rows, figures=figures, **options)
    slow, dense = slow_loss(backbone, memory, rows, **options)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert figures == pytest.approx({k: v.item() for k, v in dense.items()}, rel=1e-5)
    assert_close(grads_of(memory, loss), grads_of(memory, slow))


def test_the_loss_without_dreams_shift_is_another(backbones):
    """What the test above would see if the logits of position i were taken for token i."""
    memory, rows = awake(backbones["dream"]), examples()
    unshifted, _ = slow_loss(backbones["dream"], memory, rows, shift=False)
    assert abs(loss_of(backbones["dream"], memory, rows) - unshifted) > 0.02


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


def test_steps_that_reveal_nothing(backbone):
    """Far more steps than tokens: loss and gradients are finite, and those of the slow loop."""
    memory, rows = awake(backbone), examples(((4, 2), (3, 1), (5, 3)))
    options = dict(K=8, concentration=0.2)
    steps = reveal_steps(batched(rows)[1], 8, 0.2, seeded(0))
    assert int(steps.max()) > 0 and all(len(set(row.tolist()) - {-1}) < 8 for row in steps)
    loss = loss_of(backbone, memory, rows, **options)
    grads = grads_of(memory, loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    slow, _ = slow_loss(backbone, memory, rows, **options)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert_close(grads, grads_of(memory, slow))


@pytest.mark.parametrize("answer", [
    [[0, 1, 1, 0], [0, 0, 0, 0]], [[0, 1, 0, 1], [0, 1, 1, 1]], [[1, 0, 1, 1], [1, 1, 1, 1]]],
    ids=str)
def test_answers_that_are_no_run(backbone, answer):
    """A row without an answer, or with one in pieces, is refused."""
    with pytest.raises(InputError, match="contiguous"):
        unrolled_loss(backbone, MetaState.for_backbone(backbone), torch.ones(2, 4).long(),
                      torch.tensor(answer).bool())


def test_the_head_sees_masked_answer_positions_only(family):
    """A head of 126,464 rows is the largest matrix product of LLaDA: it is computed where a token
    is still masked; rows of a batch fill up to the longest."""
    backbone, _ = load(DATA / family, "cpu")
    for rows in (examples(((20, 9),)), examples()):
        seen = []
        handle = backbone.head.register_forward_hook(
            lambda module, inputs, out: seen.append(inputs[0].shape[:-1].numel()))
        loss_of(backbone, MetaState.for_backbone(backbone), rows, K=4, concentration=5.0)
        handle.remove()
        steps = reveal_steps(batched(rows)[1], 4, 5.0, seeded(0))
        masked = [(steps >= k).sum(1) for k in range(4)]
        assert len(seen) == sum(int(m.sum()) > 0 for m in masked) > 2
        for count, m in zip(seen, masked):
            assert int(m.sum()) <= count <= len(rows) * int(m.max())


# ------------------------------------------------------------------ the gradient of the loss
CHECKED = ("start", "identity", "time.mlp.0.weight", "updater.from_c.weight",
           "updater.from_s.weight", "mixer.attention.kv.weight", "mixer.attention.slopes",
           "injector.attention.out.weight", "injector.norm_s.modulation.weight")


@pytest.mark.parametrize("name", CHECKED)
def test_the_gradient_is_that_of_finite_differences(backbone, name):
    """Through all K steps, for each part of the memory: the loss changes along the gradient as the
    gradient says."""
    memory, rows = awake(backbone), examples(((5, 8), (3, 6)))
    p = memory.get_parameter(name)
    gradient = grads_of(memory, loss_of(backbone, memory, rows))[name]
    slope, kept, losses = float(gradient.norm()), p.detach().clone(), []
    step = min(0.01 / slope, 0.1 * float(kept.norm()))  # moves the loss by 0.01 at the most
    with torch.no_grad():
        for sign in (1, -1):
            p.copy_(kept + sign * step * gradient / slope)
            losses.append(float(loss_of(backbone, memory, rows)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_cut_lets_gradients_reach_one_step_back(backbone):
    """The ablation has the same loss. Mixer and Updater learn from the step after theirs, so with
    two steps their gradient is the whole one; with four they miss the later steps. What reaches
    further back, through the first state or through what it did to the activations, is gone."""
    memory, rows = awake(backbone), examples()
    far = ("start", "injector.attention.out.weight", "injector.attention.kv.weight")
    near = ("updater.from_c.weight", "mixer.attention.kv.weight")
    for K in (2, 4):
        whole, cut = (loss_of(backbone, memory, rows, K=K, cut=cut) for cut in (False, True))
        assert whole.item() == cut.item()
        whole, cut = grads_of(memory, whole), grads_of(memory, cut)
        for name in near + far:
            same = torch.allclose(whole[name], cut[name], rtol=1e-3, atol=1e-7)
            assert same == (K == 2 and name in near), (K, name)
            assert cut[name].norm() > 0


def test_reset_forgets(backbone):
    """The control sees the first state at every step: its loss is another one, and neither Mixer
    nor Updater have any part in it."""
    memory, rows = awake(backbone), examples()
    carried, reset = (loss_of(backbone, memory, rows, reset=reset) for reset in (False, True))
    assert abs(carried.item() - reset.item()) > 1e-3
    with torch.no_grad():
        for p in (*memory.mixer.parameters(), *memory.updater.parameters()):
            p.add_(0.3)
    assert loss_of(backbone, memory, rows, reset=True).item() == reset.item()
    assert loss_of(backbone, memory, rows).item() != carried.item()


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


def test_the_head_in_parts_changes_nothing(backbone, monkeypatch):
    """A large vocabulary's logits are made for a part of the positions at a time: same loss, same
    gradients, and nothing as wide as the vocabulary is kept for the backward pass."""
    memory, whole, V = awake(backbone), train.token_losses, backbone.config.vocab
    wide, outcomes = [], []
    for most in (2 ** 26, 4 * V * 3 + 1):
        monkeypatch.setattr(train, "token_losses", lambda *a: whole(*a, most=most))
        wide.clear()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: wide.append(V in t.shape and t.dim() == 3) or t, lambda t: t):
            loss = loss_of(backbone, memory, examples(), K=2)
        outcomes.append((loss.item(), any(wide), grads_of(memory, loss)))
    (plain, kept, grads), (same, still, again) = outcomes
    assert plain == pytest.approx(same, rel=1e-6) and (kept, still) == (True, False)
    assert_close(grads, again)


def test_compiled_training_is_the_same():
    """Two graphs each for the block and the memory's three parts: the first shape's, and one for
    all others."""
    backbone, _ = load(DATA / "llada", "cpu")
    memory, graphs, outcomes = awake(backbone), [], []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            for module in (backbone, memory):
                module.compile(backend=lambda graph, inputs: graphs.append(1) or graph.forward)
        for rows in (examples(), examples(((2, 9), (6, 3)))):
            loss = loss_of(backbone, memory, rows, K=3)
            outcomes.append((loss.item(), grads_of(memory, loss)))
    for (loss, grads), (again, same) in zip(outcomes[:2], outcomes[2:]):
        assert loss == pytest.approx(again, rel=1e-6)
        assert_close(grads, same)
    assert 0 < len(graphs) <= 8


# ------------------------------------------------------------------ schedules
def test_cosine():
    """A line up to 1 at the end of the warm-up, half way down in the middle, 0 at the end."""
    shares = [cosine(step, 110, 10) for step in range(111)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1 and shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0)
    assert shares[35] == pytest.approx((1 + 2 ** -0.5) / 2)
    assert all(a > b for a, b in zip(shares[10:], shares[11:]))
    assert cosine(0, 10, 0) == 1


def test_restarted():
    """The main part is a cosine down to 0; the end phase, a tenth as long, another one from 0.3 of
    the peak. A run too short for an end phase has none."""
    assert [restarted(step, 330, 10) for step in range(300)] == [
        cosine(step, 300, 10) for step in range(300)]
    end = [restarted(step, 330, 10) for step in range(300, 331)]
    assert end[:2] == pytest.approx([0.3, 0.3]) and end[30] == pytest.approx(0)
    assert all(a > b for a, b in zip(end[1:], end[2:]))
    assert [restarted(s, 10, 2) for s in range(10)] == [cosine(s, 10, 2) for s in range(10)]


def test_trapezoid():
    """A line up, a plateau, and a line down to 0 over the last tenth; before that it does not
    depend on the number of steps."""
    shares = [trapezoid(step, 100, 10) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(shares[9:91]) == {1.0}
    assert shares[90:] == pytest.approx([1 - i / 10 for i in range(11)])
    assert shares[:90] == [trapezoid(step, 1000, 10) for step in range(90)]


# ------------------------------------------------------------------ the loop
def toy() -> dict[str, nn.Parameter]:
    """The parameters of a regression, one with weight decay and one without."""
    return {"matrix": nn.Parameter(torch.randn(6, 4, generator=seeded(0))),
            "vector": nn.Parameter(torch.randn(4, generator=seeded(1)))}


def toy_loss(parameters: dict[str, nn.Parameter]) -> Callable:
    """A loss that depends on (step, micro) alone."""
    def loss_fn(step, micro):
        x = torch.randn(8, 6, generator=seeded(1000 * step + micro))
        loss = (x @ parameters["matrix"] + parameters["vector"] - x[:, :4].sin()).square().mean()
        return loss, {f"micro_{micro}": loss.item()}
    return loss_fn


def toy_run(out: Path, steps: int = 30, **options) -> dict[str, nn.Parameter]:
    parameters = toy()
    options = dict(steps=steps, lr=0.05, warmup=3, save_every=4, micros=2) | options
    fit(parameters, toy_loss(parameters), out, **options)
    return parameters


def content(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Every bit of a safetensors file's tensors, and its metadata."""
    with safe_open(path, framework="pt") as file:
        return ({k: file.get_tensor(k).numpy().tobytes() for k in file.keys()}, file.metadata())


def assert_same_run(first: Path, second: Path) -> None:
    """Two folders of runs hold the same weights, optimizer, step and settings, bit for bit, and the
    same metrics, a memory where there is one included."""
    names = sorted(f.name for f in first.glob("*.safetensors"))
    assert STATE in names and names == sorted(f.name for f in second.glob("*.safetensors"))
    for name in names:
        assert content(first / name) == content(second / name)
    assert (first / METRICS).read_bytes() == (second / METRICS).read_bytes()


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def saved_step(out: Path) -> int:
    with safe_open(out / STATE, framework="pt") as file:
        return json.loads(file.metadata()["json"])["step"]


def test_fit_learns_and_writes_it_down(tmp_path):
    """The loss falls; one line of metrics a step with the loss, the figures and the norm."""
    parameters = toy_run(tmp_path, steps=60)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {"loss", "micro_0", "micro_1", "grad_norm"} <= lines[0].keys()
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert lines[5]["loss"] == pytest.approx((lines[5]["micro_0"] + lines[5]["micro_1"]) / 2)
    stored = load_file(tmp_path / STATE)
    assert all(torch.equal(stored[f"weight.{name}"], p) for name, p in parameters.items())
    assert sorted(f.name for f in tmp_path.iterdir()) == [METRICS, STATE]


@pytest.mark.parametrize("schedule", [cosine, restarted, trapezoid])
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
    parameters = toy_run(tmp_path / "run", steps=1, micros=3, clip=0.5)
    fresh = toy()
    loss_fn = toy_loss(fresh)
    (sum(loss_fn(0, micro)[0] for micro in range(3)) / 3).backward()
    norm = torch.stack([p.grad.norm() for p in fresh.values()]).norm()
    assert norm > 0.5 and parameters.keys() == fresh.keys()
    stored = load_file(tmp_path / "run" / STATE)
    for name, p in fresh.items():
        assert torch.allclose(stored[f"exp_avg.{name}"], 0.1 * 0.5 * p.grad / norm, atol=1e-6)
    assert metrics_of(tmp_path / "run")[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_evaluation_is_periodic_and_last(tmp_path, capsys):
    """Every `eval_every` steps and after the last, into the metrics and as a line."""
    calls = []
    toy_run(tmp_path, steps=5, eval_every=2, evaluate=lambda s: calls.append(s) or {"held_out": s})
    assert calls == [2, 4, 5]
    assert [line.get("held_out") for line in metrics_of(tmp_path)] == [None, 2, None, 4, 5]
    assert capsys.readouterr().out.count("held_out") == 3


def test_a_finished_run_is_left_alone(tmp_path):
    """Started once more it trains nothing, keeps its metrics, and restores the weights."""
    first, before = toy_run(tmp_path), (tmp_path / METRICS).read_text()
    again, calls = toy(), []
    fit(again, lambda *a: calls.append(a), tmp_path, steps=30, lr=0.05, warmup=3, micros=2)
    assert calls == [] and (tmp_path / METRICS).read_text() == before
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_other_settings_are_refused(tmp_path):
    """The folder of a run with other settings: what changed is named, and nothing is lost."""
    toy_run(tmp_path, settings={"lr": 1, "K": 4, "data": None})
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(InputError, match=r"other settings \(K, lam\).*--out"):
        toy_run(tmp_path, settings={"lr": 1, "K": 2, "data": None, "lam": 0.5})
    assert (tmp_path / STATE).read_bytes() == before and len(metrics_of(tmp_path)) == 30
    toy_run(tmp_path, settings={"data": None, "K": 4, "lr": 1})


@pytest.mark.parametrize("damage", ["empty", "half", "another"])
def test_a_broken_state_is_named(tmp_path, damage):
    """A state that a disk damaged, or that is none: one line with the file."""
    toy_run(tmp_path)
    state = tmp_path / STATE
    if damage == "another":
        save_file({"x": torch.zeros(1)}, state)
    else:
        kept = 0 if damage == "empty" else state.stat().st_size // 2
        state.write_bytes(state.read_bytes()[:kept])
    with pytest.raises(InputError, match=STATE):
        toy_run(tmp_path)


def test_the_same_content_is_the_same_file(tmp_path):
    """Byte for byte, so that two runs can be compared with cmp or a checksum."""
    states, memories = set(), set()
    for i in range(8):
        toy_run(tmp_path / str(i), steps=1)
        states.add((tmp_path / str(i) / STATE).read_bytes())
        MetaState(8, 2, 8, heads=2).save(tmp_path / MEMORY)
        memories.add((tmp_path / MEMORY).read_bytes())
    assert len(states) == len(memories) == 1


# ------------------------------------------------------------------ losses that are not finite
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training(tmp_path, value):
    """The step is named, the last good checkpoint and the metrics before it stay, and a run that is
    mended goes on from there."""
    parameters = toy()
    loss_fn = toy_loss(parameters)

    def broken(step, micro):
        loss, figures = loss_fn(step, micro)
        return loss * (value if step == 10 else 1), figures

    out = tmp_path / "run"
    with pytest.raises(InputError, match=rf"{value} at step 11.*{out}"):
        fit(parameters, broken, out, steps=30, lr=0.05, warmup=3, save_every=4, micros=2)
    assert saved_step(out) == 8
    assert all(torch.isfinite(v).all() for v in load_file(out / STATE).values())
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 11))
    for folder in (tmp_path / "run", tmp_path / "whole"):
        toy_run(folder)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("step", [4, 5])
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path, step):
    """A finite loss whose gradient is NaN, in the midst and at the last step: training stops before
    weights of NaN are written over the last good ones."""
    p = nn.Parameter(torch.ones(3))

    def loss_fn(now, micro):
        return (p.sum() + (0 * p).sum().sqrt() if now == step else p.sum()), {}

    with pytest.raises(InputError):
        fit({"p": p}, loss_fn, tmp_path, steps=6, lr=0.1, warmup=1, save_every=1)
    assert torch.isfinite(load_file(tmp_path / STATE)["weight.p"]).all()


# ------------------------------------------------------------------ full disks
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The disk fills in the third checkpoint: one line, the second is whole, and the run resumes to
    the same end."""
    saves = []

    def fills(path, data):
        saves.append(path)
        if len(saves) == 3:
            plain(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path, data)

    plain = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fills)
        with pytest.raises(InputError, match=f"cannot write.*{STATE}.*No space left"):
            toy_run(tmp_path / "run")
    assert saved_step(tmp_path / "run") == 8
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [METRICS, STATE]
    toy_run(tmp_path / "run")
    toy_run(tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_metrics_on_a_full_disk(tmp_path, capsys):
    """A line of metrics that does not fit is the command's one line, too."""
    (tmp_path / METRICS).symlink_to("/dev/full")
    assert model.command(lambda argv: toy_run(tmp_path) and 0)([]) == 2
    err = capsys.readouterr().err
    assert "disk is full" in err and err.count("\n") == 1


# ------------------------------------------------------------------ kills
CONTEXT = multiprocessing.get_context("forkserver")  # a process in 0.1 s, all this imported once
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "tokenizers", "tqdm",
                                "safetensors.torch", "pytest"])


def child(target: Callable, *args) -> multiprocessing.Process:
    process = CONTEXT.Process(target=isolated, args=(target, *args), daemon=True)
    process.start()
    return process


def isolated(target: Callable, *args) -> None:
    """What every child does first: one thread, as the runs that it is compared with."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that outlives a SIGKILL
    target(*args)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, countdown: int) -> None:
    """Kill this process when `moment` comes for the `countdown`-th time."""
    def due() -> bool:
        nonlocal countdown
        countdown -= 1
        return countdown == 0

    def killing(function, after=False):
        def wrapped(*args, **kwargs):
            last = due()
            if last and not after:
                die()
            result = function(*args, **kwargs)
            if last:
                die()
            return result
        return wrapped

    def half_a_file(path, data):
        last = due()
        plain(path, data[:-40] if last else data)
        if last:
            die()

    plain = Path.write_bytes

    def half_a_line(path, mode="r", **options):
        if mode == "a" and due():
            with open(path, mode, **options) as file:
                file.write('{"step": 1')
            die()
        return open(path, mode, **options)

    if moment == "half a line of metrics":
        train.open = half_a_line
    elif moment == "half a checkpoint":
        Path.write_bytes = half_a_file
    elif moment == "before the flush":
        model.os.fsync = killing(os.fsync)
    elif moment == "before the rename":
        model.os.replace = killing(os.replace)
    elif moment == "after the rename":
        model.os.replace = killing(os.replace, after=True)
    elif moment == "between metrics and checkpoint":
        train._save = killing(train._save)
    elif moment == "in a step":
        nn.utils.clip_grad_norm_ = killing(nn.utils.clip_grad_norm_)


MOMENTS = ("in a step", "half a checkpoint", "before the flush", "before the rename",
           "after the rename", "between metrics and checkpoint", "half a line of metrics")


def killed_toy(out: Path, moment: str, countdown: int) -> None:
    arm(moment, countdown)
    toy_run(out, steps=40, save_every=3)


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory) -> Path:
    """The folder of a toy run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    toy_run(out, steps=40, save_every=3)
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_the_worst_moment(whole_toy, tmp_path, moment):
    """SIGKILL at a given point of the loop, twice: resumed, the run ends bit for bit as one left
    alone, weights, optimizer and metrics, each step once."""
    for countdown in (3, 2):
        process = child(killed_toy, tmp_path, moment, countdown)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    toy_run(tmp_path, steps=40, save_every=3)
    assert_same_run(tmp_path, whole_toy)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, 41))


def long_toy(out: Path) -> None:
    toy_run(out, steps=250, save_every=2)


def test_kills_at_random_moments(tmp_path):
    """SIGKILL whenever it comes, again and again: bit for bit the same in the end."""
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(5):
        process, before = child(long_toy, out), size_of(out / METRICS)
        while process.is_alive() and size_of(out / METRICS) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 1
    for folder in (out, tmp_path / "whole"):
        long_toy(folder)
    assert_same_run(out, tmp_path / "whole")


def large_file(path: Path) -> None:
    model.save_tensors(path, {"x": torch.zeros(25_000_000)}, {"step": 0, "settings": {}})


def test_kills_do_not_fill_the_disk(tmp_path):
    """A checkpoint of 100 MB, killed while it is written: what was written of it is gone once the
    next one is there, or every kill would cost the size of a checkpoint."""
    process = child(large_file, tmp_path / STATE)
    while process.is_alive() and not any(map(size_of, tmp_path.iterdir())):
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and any(tmp_path.iterdir())
    toy_run(tmp_path, steps=1)
    assert sorted(f.name for f in tmp_path.iterdir()) == [METRICS, STATE]


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# ------------------------------------------------------------------ several processes
def together(target: Callable, *args, world: int = 2) -> list[int]:
    """Run target(rank, *args) in processes that train together, as torchrun starts them, and return
    their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [child(ranked, target, rank, world, port, *args) for rank in range(world)]
    deadline = time.monotonic() + 60
    while any(p.is_alive() for p in group) and time.monotonic() < deadline:
        time.sleep(0.02)
        if any(p.exitcode for p in group):  # the others would wait for it
            time.sleep(0.5)
            break
    for process in group:
        process.kill()
        process.join()
    return [process.exitcode for process in group]


def ranked(target: Callable, rank: int, world: int, port: int, *args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(rank, *args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def toy_in_two(rank: int, out: Path, steps: int) -> None:
    parameters = toy_run(out / "run", steps=steps, micros=4)
    save_file({k: p.detach() for k, p in parameters.items()}, out / f"rank{rank}.safetensors")


@pytest.mark.parametrize("steps", [1, 25])
def test_two_processes_equal_one(tmp_path, steps):
    """The micro-batches shared by two gloo processes give the gradients of one process with all of
    them (AdamW's moments after one step), the same weights after many, the same on both ranks,
    and the same metrics."""
    assert together(toy_in_two, tmp_path, steps) == [0, 0]
    toy_run(tmp_path / "one", steps=steps, micros=4)
    ours, theirs = (load_file(tmp_path / run / STATE) for run in ("one", "run"))
    assert_close(ours, theirs, rtol=1e-5)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "run"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def uneven(rank: int, out: Path) -> None:
    try:
        toy_run(out, micros=3)
    except InputError as error:
        assert "2 processes" in str(error) and "3 micro-batches" in str(error)
        sys.exit(2)


def test_processes_that_do_not_divide_the_micros(tmp_path):
    """One line, on every rank, instead of an uneven average."""
    assert together(uneven, tmp_path) == [2, 2]


def nan_in_two(rank: int, out: Path) -> None:
    parameters = toy()
    loss_fn = toy_loss(parameters)
    try:
        fit(parameters, lambda step, micro: (loss_fn(step, micro)[0] * (math.nan if (step, micro) ==
            (6, 1) else 1), {}), out, steps=9, lr=0.05, save_every=2, micros=2)
    except InputError:
        sys.exit(2)


def test_one_bad_loss_stops_all_processes(tmp_path):
    """A loss that is not finite on one rank: both stop, none waits for the other, and the last
    checkpoint is the one before."""
    assert together(nan_in_two, tmp_path) == [2, 2]
    assert saved_step(tmp_path) == 6


# ------------------------------------------------------------------ data files
@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """Byte-level tokenizers with the chat markers of either family."""
    markers = {"dream": "<|im_start|> <|im_end|>",
               "llada": "<|startoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|>"}
    return {name: Tokenizer(byte_tokenizer({m: 256 + i for i, m in enumerate(found.split())}, 256))
            for name, found in markers.items()}


def jsonl(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines), encoding="utf-8")
    return path


USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Yes\u2028é."}


def test_both_forms_of_a_line(family, tokenizers, tmp_path):
    """`prompt` and `response` are a user's message and its answer; `messages` may hold more turns.
    The prompt is the chat format, the answer ends with its marker and EOS, blank lines count for
    nothing."""
    tokenizer = tokenizers[family]
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "Hi?", "response": "Yes\u2028é."}, "",
                 {"messages": [USER, ASSISTANT]}, "  ",
                 json.dumps({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, ensure_ascii=False))
    short, same, long = read_examples(path, tokenizer, EOS_ID, 500)
    assert short == same == (tokenizer.chat([USER]), short[1])
    assert long == (tokenizer.chat([USER, ASSISTANT, USER]), short[1])
    *answer, eos = short[1]
    ending = {"llada": "<|eot_id|>", "dream": "<|im_end|>"}[family]
    assert tokenizer.decode(answer) == "Yes\u2028é." + ending and eos == EOS_ID


@pytest.mark.parametrize("line", [
    "{", "nonsense", "[1]", "3", "null", {}, {"prompt": "Hi?"}, {"prompt": "Hi?", "response": None},
    {"prompt": "Hi?", "response": ""}, {"prompt": "Hi?", "response": 3}, {"response": "Yes."},
    {"prompt": None, "response": "Yes."}, {"prompt": 3, "response": "Yes."}, {"messages": []},
    {"messages": [ASSISTANT]}, {"messages": [USER]}, {"messages": [USER, USER]},
    {"messages": "Hi?"}, {"messages": [USER, {"role": "assistant"}]}, {"messages": [3, ASSISTANT]},
    {"messages": [{"role": 3, "content": "Hi?"}, ASSISTANT]}, {"messages": [USER, "Yes."]}],
    ids=str)
def test_lines_that_are_no_example(tokenizers, tmp_path, line):
    """The file and the line are named."""
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"}, "", line)
    with pytest.raises(InputError) as caught:
        read_examples(path, tokenizers["llada"], EOS_ID, 500)
    assert f"{path}:3" in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_files_without_examples(tokenizers, tmp_path, content):
    """A file that is absent or empty is named."""
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="x.jsonl"):
        read_examples(path, tokenizers["llada"], EOS_ID, 500)


def test_examples_that_are_too_long(tokenizers, tmp_path, capsys):
    """Answers are cut at the length; a prompt that leaves less than 8 positions drops its example,
    which is said; a file of nothing else is refused."""
    tokenizer = tokenizers["llada"]
    n = len(tokenizer.chat([USER]))
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "Hi?", "response": "x" * 50},
                 {"prompt": "Hi?!", "response": "y" * 50}, {"prompt": "Hi?", "response": "z"})
    first, last = read_examples(path, tokenizer, EOS_ID, n + 8)
    assert [len(p + a) for p, a in (first, last)] == [n + 8, n + 3]
    assert tokenizer.decode(first[1]) == "x" * 8 and last[1][-1] == EOS_ID
    assert "1 of 3 examples" in capsys.readouterr().err
    assert len(read_examples(path, tokenizer, EOS_ID, n + 9)) == 3
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="no example that fits into 20 tokens"):
        read_examples(path, tokenizer, EOS_ID, 20)


def numbered(count: int) -> list[tuple[list[int], list[int]]]:
    """Examples of different lengths that can be told apart by any of their tokens."""
    return [([i] * (1 + i % 3), [i] * (2 + i % 5)) for i in range(count)]


def drawn(draw: Callable, steps, micros: int, held_out: bool = False) -> list[int]:
    """Which examples the batches of the steps hold, in order."""
    return [int(row[0]) for step in steps for micro in range(micros)
            for row in draw(step, micro, held_out)[0]]


def test_batches_are_padded_on_the_right():
    """Prompt, answer, then pads; a batch without padding has no mask, and each is as wide as its
    longest row."""
    pairs = {p[0]: (p, a) for p, a in numbered(40)}
    draw, masks = file_batches(numbered(40), 99, 3, 1, seed=0), []
    for step in range(10):
        ids, answer, pad = draw(step, 0)
        for i, row in enumerate(ids):
            prompt, reply = pairs[int(row[0])]
            rest = ids.shape[1] - len(prompt) - len(reply)
            assert row.tolist() == prompt + reply + [99] * rest
            kinds = [0] * len(prompt) + [1] * len(reply) + [2] * rest
            assert answer[i].tolist() == [kind == 1 for kind in kinds]
            padded = [False] * len(row) if pad is None else pad[i].tolist()
            assert padded == [kind == 2 for kind in kinds]
        assert pad is None or not pad.all(0).any()
        masks.append(pad)
    assert any(pad is not None for pad in masks)
    assert file_batches(numbered(1), 99, 2, 1, seed=0)(0, 0)[2] is None


@pytest.mark.parametrize("size, micros", [(1, 1), (3, 2), (7, 2), (50, 1)])
def test_every_example_once_an_epoch(size, micros):
    """Over the steps each training example comes once before any comes again, in another order each
    epoch; batches may span two."""
    draw = file_batches(numbered(40), 99, size, micros, seed=0)
    kept = 40 - 40 // 8
    order = drawn(draw, range(-(-3 * kept // (size * micros))), micros)
    epochs = [order[i * kept:(i + 1) * kept] for i in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) == list(range(5, 40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_depend_on_step_and_micro_alone():
    """What a resumed run draws is what the first one drew; another seed draws otherwise."""
    def orders(seed, steps):
        draw = file_batches(numbered(40), 99, 4, 2, seed=seed)
        return {step: drawn(draw, [step], 2) for step in steps}

    straight = orders(0, range(20))
    jumping = orders(0, [19, 3, 11, 0, 19])
    assert jumping == {step: straight[step] for step in jumping}
    assert orders(1, range(20)) != straight


@pytest.mark.parametrize("count, kept", [(8, 1), (40, 5), (600, 64)])
def test_held_out_examples_are_never_trained_on(count, kept):
    """At most 64 and at most an eighth, disjoint from what is trained on for ever."""
    draw = file_batches(numbered(count), 9999, 4, 2, seed=0)
    held = set(drawn(draw, [-1], 20, held_out=True))
    trained = set(drawn(draw, range(count // 2), 2))
    assert not held & trained and len(held) == kept and len(trained) == count - kept


# ------------------------------------------------------------------ the Tulu-3 mixture
class Rows(list):
    """As much of a `datasets.Dataset` as is used."""

    def shuffle(self, seed):
        return Rows(random.Random(seed).sample(self, len(self)))

    def select(self, indices):
        return Rows(self[i] for i in indices)


def test_the_mixture_needs_datasets(tmp_path, monkeypatch):
    """Without the optional package: what to install, and the other way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets.*--data"):
        train.tulu(0)
    assert not (tmp_path / "data").exists()


def test_the_mixture_is_prepared_once(tmp_path, monkeypatch, tokenizers):
    """Picked by seed, kept as JSONL that read_examples takes, and not asked for again."""
    calls = []
    rows = Rows({"messages": [{"role": "user", "content": f"{i}\u00e9"}, ASSISTANT], "id": i}
                for i in range(20))
    fake = SimpleNamespace(load_dataset=lambda *a, **k: calls.append((a, k)) or rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    path = train.tulu(3, number=7)
    assert calls == [(("allenai/tulu-3-sft-mixture",), {"split": "train"})]
    kept = [json.loads(line)["messages"] for line in path.read_text().split("\n") if line]
    assert kept == [row["messages"] for row in rows.shuffle(seed=3)[:7]]
    assert len(read_examples(path, tokenizers["dream"], EOS_ID, 500)) == 7
    assert train.tulu(3, number=7) == path and len(calls) == 1
    assert train.tulu(4, number=7) != path and len(calls) == 2


# ------------------------------------------------------------------ train.py from end to end
@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A very small checkpoint in tiny's format, with fresh weights."""
    folder, tokenizer = tmp_path_factory.mktemp("ckpt"), tiny.build_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2,
                               mlp_hidden_size=64).items():
            patch.setitem(tiny.CONFIG, key, value)
        config = Config.from_dict(tiny.build_config(tokenizer))
        tiny.write_folder(Backbone(config).initialise(seeded(0)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eighty short examples."""
    return jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", *(
        {"prompt": f"{i}", "response": f"{i} " * (1 + i % 4)} for i in range(80)))


@pytest.fixture
def run(ckpt, data, tmp_path, capsys) -> Callable:
    """run(*flags, out=...) -> (exit code, stdout, stderr) of a few steps of train.py."""
    def call(*flags, out=tmp_path / "out") -> tuple[int, str, str]:
        code = train.main([*arguments(ckpt, data, out), *map(str, flags)])
        return code, *capsys.readouterr()
    return call


def arguments(ckpt: Path, data: Path, out: Path) -> list[str]:
    return ["--ckpt", str(ckpt), "--data", str(data), "--out", str(out), "--device", "cpu",
            "--steps", "3", "--batch-size", "2", "--micros", "2", "--K", "2", "--warmup", "2",
            "--save-every", "1", "--slots", "6"]


def test_training_from_end_to_end(run, ckpt, tmp_path):
    """The memory of a short run loads for its backbone, has moved, and generates; the share of the
    parameters is said, the held-out loss measured, and the same seed gives the same memory."""
    code, out, err = run()
    assert code == 0 and err == "" and "% of the backbone" in out and MEMORY in out
    backbone, tokenizer = load(ckpt, "cpu")
    memory = MetaState.load(tmp_path / "out" / MEMORY, backbone)
    assert memory.injector.attention.out.weight.abs().max() > 0 and memory.sizes["slots"] == 6
    prompt = torch.tensor([tokenizer.encode("sudoku\n")])
    sample = generate(backbone, prompt, memory=memory, gen_length=8, block_length=8, steps=4)
    assert not (sample.ids == backbone.config.mask_id).any()
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3] and "held_out" in lines[-1]
    assert {"loss", "dense_1", "dense_2", "grad_norm"} <= lines[0].keys()
    run(out=tmp_path / "again")
    run("--seed", 1, out=tmp_path / "other")
    assert_same_run(tmp_path / "out", tmp_path / "again")
    assert content(tmp_path / "out" / MEMORY) != content(tmp_path / "other" / MEMORY)


VARIANTS = [(), ("--no-time",), ("--no-local",), ("--checkpointing",), ("--width", "16"),
            ("--concentration", "5", "--lam", "0"), ("--reset",), ("--cut",), ("--K", "1")]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_every_variant_resumes(run, ckpt, tmp_path, monkeypatch, flags):
    """Each control and ablation, stopped after its second checkpoint and started again, ends with
    the bytes of a run left alone; what the flags say is in the file."""
    assert run(*flags, out=tmp_path / "whole")[0] == 0
    saves, save = [], train._save

    def stop(*args):
        save(*args)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save", stop)
        assert run(*flags)[0] == 130 and saved_step(tmp_path / "out") == 2
    assert run(*flags)[0] == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    sizes = MetaState.load(tmp_path / "out" / MEMORY, load(ckpt, "cpu")[0]).sizes
    assert sizes["time"] == ("--no-time" not in flags)
    assert sizes["local"] == ("--no-local" not in flags)
    assert sizes["width"] == (16 if "--width" in flags else 32)


@pytest.mark.parametrize("flags, expected", [
    ((), (2, 0.5, 1.0, False, False, False)),
    (("--K", "6", "--lam", "0.25", "--concentration", "3"), (6, 0.25, 3.0, False, False, False)),
    (("--reset", "--checkpointing"), (2, 0.5, 1.0, True, False, True)),
    (("--cut",), (2, 0.5, 1.0, False, True, False))], ids=["defaults", "numbers", "reset", "cut"])
def test_the_flags_reach_the_loss(run, monkeypatch, flags, expected):
    """Steps, weights, control, ablation and the recomputing of blocks are as asked for, in training
    and in the evaluation."""
    seen = set()

    def spy(backbone, memory, ids, answer, K, lam, concentration, generator, reset, **options):
        seen.add((K, lam, concentration, reset, options["cut"], backbone.checkpointing))
        return unrolled_loss(backbone, memory, ids, answer, K, lam, concentration, generator, reset,
                             **options)

    monkeypatch.setattr(train, "unrolled_loss", spy)
    assert run(*flags, "--steps", 1)[0] == 0 and seen == {expected}


@pytest.mark.parametrize("name, expected", [
    ("llada-8b", (1, 16, True)), ("dream-7b", (1, 16, True)),
    ("llada-8b,dim=96,layers=3,heads=6,kv_heads=6", (16, 4, False))], ids=str)
def test_defaults_go_by_the_backbone(name, expected):
    """An 8B model takes its examples one by one and recomputes its blocks, a small one does not;
    what the command line says is kept."""
    for flags, chosen in (([], expected), (["--batch-size", "3", "--micros", "2",
                                            "--no-checkpointing"], (3, 2, False))):
        args = train.parse(flags)
        train.fill_in(args, model.shapes_of(name))
        assert (args.batch_size, args.micros, args.checkpointing) == chosen


@pytest.mark.parametrize("flags, K, longer, longest", [
    ((), 2, (6, True), (12, True)), (("--no-long",), 2, (2, False), (2, False)),
    (("--K", 1, "--reset"), 1, (3, True), (6, True))], ids=str)
def test_trajectories_get_longer(run, tmp_path, monkeypatch, flags, K, longer, longest):
    """Of 44 updates the last 4 are the end phase, and the others the main part. Half of the
    micro-batches of its last quarter walk 3 K steps, the surest first, and half of the end phase's
    6 K; none before and none in the evaluation. The metrics' dense_k are those of K steps, and the
    schedule is the one that goes with it."""
    seen, schedules = [], []
    monkeypatch.setattr(train, "unrolled_loss", lambda *a, **options: seen.append(
        (len(seen) // 4, (a[4], options["surest"]), torch.is_grad_enabled()))
        or unrolled_loss(*a, **options))
    monkeypatch.setattr(train, "fit", lambda *a, **options: schedules.append(options["schedule"])
                        or fit(*a, **options))
    run(*flags, "--steps", 44, "--micros", 4, "--batch-size", 1, "--eval-every", 44)
    training = [(at, kind) for at, kind, grad in seen if grad]
    assert len(training) == 44 * 4 and len(seen) == len(training) + 64
    assert {kind for at, kind in training if at < 30} == {(K, False)}
    assert {kind for at, kind in training if 30 <= at < 40} == {(K, False), longer}
    assert {kind for at, kind in training if at >= 40} == {(K, False), longest}
    assert {kind for _, kind, grad in seen if not grad} == {(K, False)}
    assert schedules == [cosine if "--no-long" in flags else restarted]
    for line in metrics_of(tmp_path / "out"):
        assert f"dense_{K + 1}" not in line


def test_every_second_trajectory_is_long():
    """A coin says which, the same for one micro-batch whenever it is asked."""
    for step, long in ((750, (12, True)), (999, (12, True)), (1000, (24, True))):
        kinds = [train.trajectory(4, step, 1100, random.Random(i)) for i in range(2000)]
        assert set(kinds) == {(4, False), long} and 0.46 < kinds.count(long) / 2000 < 0.54
        assert kinds[7] == train.trajectory(4, step, 1100, random.Random(7))
    assert {train.trajectory(4, 749, 1100, random.Random(i)) for i in range(99)} == {(4, False)}


def killed_training(argv: list[str], moment: str, countdown: int) -> None:
    arm(moment, countdown)
    train.main(argv)


def test_a_killed_training_ends_with_the_same_memory(run, ckpt, data, tmp_path):
    """train.py under SIGKILL in its optimizer step and while it writes, then resumed: bit for bit
    the memory of a run left alone."""
    run(out=tmp_path / "whole")
    for moment, countdown in (("in a step", 2), ("half a checkpoint", 1)):
        process = child(killed_training, arguments(ckpt, data, tmp_path / "out"), moment, countdown)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run()[0] == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def training_in_two(rank: int, argv: list[str]) -> None:
    if code := train.main(argv):
        sys.exit(code)


@pytest.mark.parametrize("flags", [(), ("--reset",)], ids=" ".join)
def test_training_in_two_processes(run, ckpt, data, tmp_path, flags):
    """train.py under two gloo processes: the gradients of the first step, and the weights after it,
    are those of one process with the same micro-batches; also for the control, whose Mixer and
    Updater get no gradient."""
    flags = (*flags, "--steps", "1")
    argv = [*arguments(ckpt, data, tmp_path / "two"), *flags]
    assert together(training_in_two, argv) == [0, 0]
    run(*flags, out=tmp_path / "one")
    one, two = (load_file(tmp_path / name / STATE) for name in ("one", "two"))
    moments = [{k: v for k, v in state.items() if k.startswith("exp_avg.")} for state in (one, two)]
    assert_close(*moments, rtol=1e-4, atol=1e-9)
    assert (tmp_path / "two" / MEMORY).is_file()


def test_the_tasks_are_the_tiny_models_data(ckpt, tmp_path, monkeypatch, capsys):
    """`--ckpt tiny` without data trains on the generated tasks, one a micro-batch, held-out ones
    for the evaluation only."""
    monkeypatch.setitem(model.CHECKPOINTS, "tiny", ckpt)
    asked, batch = [], tiny.batch
    monkeypatch.setattr(tiny, "batch", lambda *a: asked.append((a[0], a[4])) or batch(*a))
    assert train.main(["--out", str(tmp_path), "--device", "cpu", "--steps", "1", "--K", "2",
                       "--batch-size", "2"]) == 0
    tasks = list(tiny.TASKS.values())
    assert asked == [(task, False) for task in tasks] + [(task, True) for task in tasks] * 8
    assert "held_out" in metrics_of(tmp_path)[0] and capsys.readouterr().err == ""


def test_tasks_from_outside_are_trained_on(ckpt, tmp_path, monkeypatch):
    """The shipped tokenizer has no token for a new task's name; it is drawn in its turn all the
    same, and prompts of different lengths are padded."""
    class Echo:
        def make(self, rng):
            word = "xyz"[:rng.randint(1, 3)]
            return f"echo {rng.randrange(1000)} {word}\n", word

        def check(self, prompt, text):
            return text == prompt.split()[-1]

    monkeypatch.setitem(model.CHECKPOINTS, "tiny", ckpt)
    monkeypatch.setitem(tiny.TASKS, "echo", Echo())
    drawn, batch = [], tiny.batch
    monkeypatch.setattr(tiny, "batch", lambda task, *a: drawn.append(task) or batch(task, *a))
    assert train.main(["--out", str(tmp_path), "--device", "cpu", "--steps", "5", "--K", "2",
                       "--batch-size", "3", "--eval-every", "5"]) == 0
    assert all(drawn[:20].count(task) == 4 for task in tiny.TASKS.values())


def test_task_batches_are_prompts_and_answers(ckpt):
    """The answer is the last GEN_LENGTH positions, the same for one (step, micro), another for
    another."""
    _, tokenizer = load(ckpt, "cpu")
    draw = train.task_batches(tokenizer, 1, 3, 4, seed=0)
    ids, answer, pad = draw(4, 1)
    assert pad is None and answer.sum(1).tolist() == [tiny.GEN_LENGTH] * 3
    assert answer[:, -tiny.GEN_LENGTH:].all()
    for row in ids:
        prompt = tokenizer.decode(row[:-tiny.GEN_LENGTH])
        reply = tokenizer.decode(row[-tiny.GEN_LENGTH:], skip_special=True)
        assert tiny.TASKS["chain"].check(prompt, reply)
        assert not tiny.is_held_out(tiny.TASKS["chain"], prompt, reply)
    assert torch.equal(draw(4, 1)[0], ids) and not torch.equal(draw(5, 1)[0], ids)


def test_the_figures_are_those_of_all_micro_batches(run, tmp_path):
    """With K = 1 the loss is dense_1: what the metrics and the bar show has to be the mean over the
    micro-batches, as the loss is, and not the last one's."""
    run("--K", 1, "--micros", 4)
    for line in metrics_of(tmp_path / "out"):
        assert line["dense_1"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("micros", [1, 2, 3, 4])
def test_the_held_out_loss_is_of_many_examples(run, monkeypatch, micros):
    """The batches of an evaluation hold different examples, 64 in all, however many micro-batches a
    step has."""
    seen = []

    def spy(backbone, memory, ids, *args, **kwargs):
        if not torch.is_grad_enabled():
            seen.extend(tuple(row.tolist()) for row in ids)
        return unrolled_loss(backbone, memory, ids, *args, **kwargs)

    monkeypatch.setattr(train, "unrolled_loss", spy)
    run("--micros", micros, "--steps", 1)
    assert len(seen) == 64  # of 80 examples 10 are held out, and all of these are among them
    assert len({tuple(i for i in row if i != 1) for row in seen}) == 10


@pytest.mark.parametrize("flags, words", [
    (("--ckpt", "no/such/folder"), ["no/such/folder"]), (("--data", "none.jsonl"), ["none.jsonl"]),
    (("--K", "0"), ["--K"]), (("--steps", "-1"), ["--steps"]), (("--micros", "0"), ["--micros"]),
    (("--batch-size", "0"), ["--batch-size"]), (("--lam", "1.5"), ["--lam"]),
    (("--lam", "nan"), ["--lam"]), (("--concentration", "0"), ["--concentration"]),
    (("--concentration", "inf"), ["--concentration"]), (("--save-every", "0"), ["--save-every"]),
    (("--max-length", "4"), ["4 tokens"]), (("--steps", "x"), ["--steps"]),
    (("--seed", "-1"), ["--seed"]), (("--slots", "0"), ["--slots"]),
    (("--slots", "-2"), ["--slots"]), (("--width", "30"), ["--width", "30"]),
    (("--width", "0"), ["--width"]), (("--lr", "nan"), ["--lr"]), (("--lr", "-1"), ["--lr"]),
    (("--warmup", "-1"), ["--warmup"]), (("--device", "gpu"), ["gpu"])],
    ids=lambda flags: " ".join(flags) if isinstance(flags, tuple) else "")
def test_arguments_that_make_no_sense(run, tmp_path, flags, words):
    """One line that names the argument, exit code 2, and no run begun."""
    code, out, err = run(*flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words)
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_flags_is_refused(run):
    """The folder of a run is not overwritten by another one."""
    run()
    code, _, err = run("--lam", 0.25)
    assert code == 2 and "lam" in err and "--out" in err and err.count("\n") == 1


def test_a_bad_line_stops_the_command(run, tmp_path):
    """File and line number, and exit code 2."""
    path = jsonl(tmp_path / "bad.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a"})
    code, _, err = run("--data", path)
    assert code == 2 and f"{path}:2" in err and err.count("\n") == 1


def test_a_model_without_a_tokenizer_cannot_be_trained(run):
    """Said before anything else is done."""
    code, _, err = run("--ckpt", DATA / "dream")
    assert code == 2 and "tokenizer" in err and err.count("\n") == 1


def test_no_data_and_no_datasets(text_ckpt, tmp_path, monkeypatch, capsys):
    """A checkpoint other than tiny, no --data, no `datasets`: one line that says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert train.main(["--ckpt", str(text_ckpt), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "pip install datasets" in err and err.count("\n") == 1
