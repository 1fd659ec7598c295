"""Intervals of shares, the plot of them, and timings beside what the machine can do."""
from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.cli import InputError
from lib.accuracies import Accuracies, fronts_of, wilson
from lib.stats import Clock, Pace, Timings, limits, plot


# ------------------------------------------------------------------ accuracy
def test_wilson_where_all_are_right():
    """3.84 / (n + 3.84) is left open, though no prompt was wrong; a half has the usual width."""
    low, high = wilson(1.0, 100)
    assert (low, high) == (pytest.approx(100 / 103.84, abs=1e-4), pytest.approx(1.0))
    low, high = wilson(0.5, 2000)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.01)


def test_intervals_over_prompts():
    """One training seed: the bootstrap's interval of a share is the binomial one."""
    rng = np.random.default_rng(1)
    right = (rng.random((1, 1, 1, 500)) < 0.8).astype(float)
    mean, low, high = Accuracies({"frozen": right})([0], [0], "frozen")
    p = right.mean()
    half = 196 * (p * (1 - p) / 500) ** 0.5
    assert mean == pytest.approx(100 * p)
    assert (low, high) == (pytest.approx(mean - half, abs=0.6), pytest.approx(mean + half, abs=0.6))
    # where all are right it is Wilson's
    every = Accuracies({"frozen": np.ones((1, 1, 1, 100))})([0], [0], "frozen")
    assert every == (100, pytest.approx(100 * 100 / 103.84, abs=0.01), pytest.approx(100))


def test_seeds_and_prompts_are_drawn_apart():
    """As many of the one as of the other, and a single task: the bootstrap's mean is the mean."""
    measured = Accuracies({"frozen": np.eye(3)[:, None, None]}, draws=4000)
    assert measured.draws["frozen"].mean() == pytest.approx(1 / 3, abs=0.02)


def test_intervals_over_training_seeds():
    """Seeds that differ widen the interval even where prompts are many, and by what a mean of that
    many seeds has as its error."""
    shares = np.array([0.2, 0.5, 0.8])
    right = (np.arange(2000) / 2000 < shares[:, None, None, None]).astype(float)
    right = np.random.default_rng(0).permuted(right, axis=3)
    mean, low, high = Accuracies({"MetaState": right})([0], [0], "MetaState")
    assert mean == pytest.approx(50) and low < 25 and high > 75


def test_leads_are_paired():
    """A variant that is right on the very same prompts leads by 0, without an interval; one that is
    right on ten more of a hundred leads by 10."""
    rng = np.random.default_rng(2)
    right = (rng.random((2, 3, 4, 100)) < 0.5).astype(float)
    better = right.copy()
    better[:, :, 2, 40:50] = 1
    right[:, :, 2, 40:50] = 0
    measured = Accuracies({"frozen": right, "MetaState": better, "reset": right.copy()})
    assert measured([0, 1, 2], [0, 1, 3], "MetaState", "frozen") == pytest.approx((0,) * 3)
    assert measured([0, 1, 2], [0, 1, 2, 3], "reset", "frozen") == pytest.approx((0,) * 3)
    lead, low, high = measured([0, 1, 2], [2], "MetaState", "frozen")
    assert lead == pytest.approx(10) and 4 < low < 10 < high < 16


def test_a_cell_has_the_seeds_beside_the_interval():
    """The same mean and interval as a call gives, and each training seed's own share."""
    right = (np.random.default_rng(3).random((2, 3, 4, 50)) < 0.5).astype(float)
    measured = Accuracies({"reset": right}, draws=50)
    cell = measured.cell([0, 2], 1, "reset")
    assert (cell["accuracy"], cell["low"], cell["high"]) == measured([0, 2], [1], "reset")
    assert cell["seeds"] == pytest.approx([100 * r[[0, 2], 1].mean() for r in right])
    assert np.mean(cell["seeds"]) == pytest.approx(cell["accuracy"])


def test_a_front_has_what_nothing_cheaper_matches(capsys):
    """From cheap to dear, each more accurate than all before; equals by the cheaper, and of equal
    cost the better; other tasks' rows do not count."""
    cells = [("a", 4, 50), ("b", 2, 60), ("c", 8, 90), ("d", 8, 70), ("e", 16, 90), ("f", 1, 10)]
    rows = [{"variant": v, "task": task, "setting": s, "forwards": f, "accuracy": a * share,
             "low": 0, "high": 99, "seconds": 0.1 / f} for v in ("frozen", "reset")
            for task, share in (("mean", 1), ("sums", 2)) for s, f, a in cells]
    frozen, reset = fronts_of(rows, "forwards")
    assert [p["setting"] for p in frozen["points"]] == ["f", "b", "c"]
    assert frozen["points"] == reset["points"] and reset["variant"] == "reset"
    assert [p["setting"] for p in fronts_of(rows, "seconds")[0]["points"]] == ["e"]
    assert "front of frozen, % in ms: 90.0 (0-99) in 6.25 (e)" in capsys.readouterr().out


def test_the_plot_needs_matplotlib_alone(tmp_path, monkeypatch):
    """Without it: what to install. With it: a file, or what is wrong with its name."""
    rows = [{"variant": v, "task": "mean", "setting": s, "forwards": f, "accuracy": 50.0,
             "low": 40.0, "high": 60.0, "seconds": f / 1e3} for v in ("frozen", "MetaState")
            for s, f in (("24 steps", 24.0), ("6 steps", 6.0), ("threshold 0.9", 4.5))]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(InputError, match="pip install matplotlib"):
            plot(rows, tmp_path / "plot.png")
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="plot.chess"):
        plot(rows, tmp_path / "plot.chess")


# ------------------------------------------------------------------ speed
@pytest.mark.parametrize("warmup", [0, 1])
def test_the_clock_counts_what_comes_after_the_warm_up(warmup, monkeypatch):
    """One run and the warm-up are left out of median, fastest and slowest; the first is said."""
    now = [0.0]
    monkeypatch.setattr("lib.stats.time", SimpleNamespace(perf_counter=lambda: now[0]))
    takes = iter([9.0, *[7.0] * warmup, 1.0, 4.0, 2.0])

    def work():
        now[0] += next(takes)

    measured = Clock(torch.device("cpu"), warmup, 3)(work)
    assert measured == {"seconds": 2.0, "low": 1.0, "high": 4.0, "first": 9.0}
    assert next(takes, None) is None


def test_limits_are_measured(monkeypatch):
    """Rates of a product and of a copy that follow from the clock's seconds."""
    monkeypatch.setattr(Clock, "__call__", lambda self, work: {"seconds": 2.0})
    product, copy = limits(Clock(torch.device("cpu"), 0, 1), torch.float32)
    assert product == pytest.approx(1536 ** 3) and copy == pytest.approx(2 ** 27)


def test_timings_say_shares_of_the_limits(monkeypatch, capsys):
    """What is printed is what goes into the JSON; what is not known stays empty."""
    monkeypatch.setattr(Clock, "__call__", lambda self, work: work() or {
        "seconds": 0.5, "low": 0.4, "high": 0.6, "first": 3.0})
    timings, done = Timings(Clock(torch.device("cpu"), 0, 1), 2e12, 1e9), []
    row = timings.take("a step", lambda: done.append(7), 10 ** 11, 10 ** 8, tokens=20,
                       forwards=lambda: done[-1], first_token=lambda: 0.02)
    bare = timings.take("a walk", lambda: None, times=2)
    timings.compare("walk / step", bare, row)
    assert timings.rows == [row, bare] and row["forwards"] == 7 and bare["forwards"] == 1
    assert row["flops_share"] == pytest.approx(0.1) and row["bytes_share"] == pytest.approx(0.2)
    assert not bare["flops_share"] and not bare["bytes_share"] and bare["tokens"] is None
    head, _, step, walk, ratio = capsys.readouterr().out.splitlines()
    assert step == "| a step | 500 (400-600) | 3e+03 | 20 | 40 | 7 | 0.2 (10%) | 0.2 (20%) |  |"
    assert walk == "| a walk | 250 (200-300) | 1.5e+03 |  |  | 1 |  |  |  |"
    assert ratio.startswith("| -> walk / step | 0.500 x |")
    assert {line.count("|") for line in (head, step, walk, ratio)} == {10}


def test_the_pace_is_of_what_was_added_since():
    """Tokens of all processes a second, and this one's share of a product; then it begins anew."""
    pace = Pace(1e6, processes=2)
    pace.add(1000, 500)
    pace.add(500, 1000)
    assert pace(2.0) == ", 1,500 tokens/s, 50% of a matrix product"
    assert pace(2.0) == ", 0 tokens/s, 0% of a matrix product"
