"""A run in a folder: what it writes, its exact resume after kills at the worst moments and on full
disks, and several processes that share it."""
from __future__ import annotations

import errno
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import (MEMORY, METRICS, STATE, assert_close, assert_same_run, metrics_of,
                      saved_step, toy, toy_loss, toy_run)
from processes import MOMENTS, arm, child, killed, together
from safetensors.torch import load_file, save_file

from lib.cli import InputError, command
from metastate import MetaState
from train import fit


# ------------------------------------------------------------------ what a folder holds
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


def test_lines_of_metrics_that_are_none(tmp_path):
    """A line that a kill cut short or a disk damaged does not stop the run from going on."""
    toy_run(tmp_path, steps=10, save_every=5)
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{}\n3\n\xff\xfe\n{"step": 1')
    toy_run(tmp_path, steps=15, save_every=5)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, 16))


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
    assert command(lambda argv: toy_run(tmp_path) and 0)([]) == 2
    err = capsys.readouterr().err
    assert "disk is full" in err and err.count("\n") == 1


# ------------------------------------------------------------------ kills
def killed_toy(out: Path, moment: str, countdown: int) -> None:
    """A run that is killed."""
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
    alone, weights, optimizer and metrics, each step once, and nothing else lies in its folder."""
    for countdown in (3, 2):
        killed(killed_toy, tmp_path, moment, countdown)
    toy_run(tmp_path, steps=40, save_every=3)
    assert_same_run(tmp_path, whole_toy)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, 41))
    assert sorted(f.name for f in tmp_path.iterdir()) == [METRICS, STATE]


def long_toy(out: Path, steps: int) -> None:
    """A run that lasts long enough to be killed whenever it comes."""
    toy_run(out, steps=steps, save_every=2)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


@pytest.mark.parametrize("rounds, steps", [
    (2, 80), pytest.param(25, 400, marks=pytest.mark.faults)])
def test_kills_at_random_moments(tmp_path, rounds, steps):
    """SIGKILL whenever it comes, again and again: bit for bit the same in the end."""
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(rounds):
        process, before = child(long_toy, out, steps), size_of(out / METRICS)
        while process.is_alive() and size_of(out / METRICS) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    assert kills >= rounds // 2
    for folder in (out, tmp_path / "whole"):
        long_toy(folder, steps)
    assert_same_run(out, tmp_path / "whole")


# ------------------------------------------------------------------ several processes
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


def test_a_rank_without_the_others(tmp_path, monkeypatch):
    """RANK, left in the environment by a cluster: one line that says so."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="RANK.*torchrun"):
        toy_run(tmp_path)


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
