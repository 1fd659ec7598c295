"""Looking into a generation."""
from __future__ import annotations

import pytest
import torch
from conftest import ROOT, awake, one_prompt

import sample
from lib.watch import BARS, Bars, Watched, bar
from sample import generate

TINY = str(ROOT / "checkpoints" / "tiny" / "metastate.safetensors")


def test_watching_changes_nothing(shallow):
    """The same tokens; what is kept is what the memory's own update and the logits say."""
    memory = awake(shallow, slots=6)
    options = dict(gen_length=12, block_length=4, steps=12, order="low_confidence")
    plain = generate(shallow, one_prompt(2), memory=memory, **options)
    watched, seen = Watched(memory), []
    found = generate(shallow, one_prompt(2), memory=watched, adjust=watched.adjust, **options,
                     on_step=lambda step: seen.append(watched.of_row(1)))
    assert torch.equal(found.ids, plain.ids) and len(seen) == 12
    for now in seen:
        assert len(now["slots"]) == 6 and len(now["sure"]) == 4
        assert all(0 < x <= 1 for x in now["sure"]) and min(now["slots"]) > 0
    state = memory.initial(2)
    moved = Watched(memory)
    moved.initial(2)
    h, t = torch.randn(2, 9, shallow.config.dim), torch.tensor([0.5, 0.5])
    new = moved.update(state, h, t, (0, 9))
    assert torch.equal(moved.moved, (new - state).norm(dim=-1))


def test_without_a_memory_only_the_model_is_watched(shallow):
    watched = Watched(awake(shallow))
    generate(shallow, one_prompt(), adjust=watched.adjust, gen_length=4, block_length=4, steps=4)
    assert watched.of_row(0)["slots"] == [] and len(Bars(watched)()) == 1


@pytest.mark.parametrize("share, char", [(0, BARS[0]), (0.5, BARS[4]), (0.99, BARS[7]),
                                         (1, BARS[7])])
def test_bars(share, char):
    assert bar(share) == char


def test_slots_that_never_moved_are_not_shown(shallow):
    """Such as the positions behind a sequence, where a memory keeps one for each; those that moved
    once stay."""
    watched = Watched(awake(shallow, slots=4))
    bars, shown = Bars(watched), []
    for moved in ([0.0, 1, 0, 0], [1, 0, 0.5, 0], [0, 0, 0, 0]):
        watched.moved = torch.tensor([moved])
        shown.append(bars()[0].split()[-1])
    assert shown == [BARS[0] + BARS[7], BARS[7] + BARS[0] + BARS[4], 3 * BARS[0]]


def test_shown_beside_every_step(capsys):
    """A line for the slots and one for the positions, with a memory; the answer is what it is."""
    argv = ["--steps", "3", "--memory", TINY, "--device", "cpu"]
    assert sample.main([*argv, "--show-memory"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert sample.main(argv) == 0
    plain = capsys.readouterr().out.splitlines()
    added = [line for line in shown if line.strip().startswith(("slots moved", "sure of each"))]
    assert [line for line in shown if line not in added][:-2] == plain[:-2]
    assert [len(line.split()[-1]) for line in added] == [24, 24] * 3
    assert sample.main(["--show-memory"]) == 2 and "--memory" in capsys.readouterr().err
