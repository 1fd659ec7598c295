"""A memory that begins as a copy of soft tokens."""
from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import seeded

import train
from lib.data import task_batch
from lib.hub import CHECKPOINTS
from lib.memories import load_memory, save_memory
from metastate import MetaState
from model import load
from studies import imitate
from studies.imitate import Pupil, imitation_loss
from studies.soft import Soft
from tasks import draw

SOFT = CHECKPOINTS["soft-tiny"] / "soft.safetensors"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What the command changes in train.py is put back."""
    for name in ("parser", "unrolled_loss"):
        monkeypatch.setattr(train, name, getattr(train, name))


@pytest.fixture(scope="module")
def shown():
    """A backbone that reads soft tokens, with examples: ids and where the answers are."""
    backbone, tokenizer = load("soft-tiny", "cpu", torch.float32)
    rng = random.Random(0)
    prompts, answers, _ = task_batch([draw("chain", rng, False) for _ in range(3)], tokenizer,
                                     backbone.config.eos_id, 24)
    ids = torch.cat([prompts, answers], 1)
    return backbone, ids, (torch.arange(ids.shape[1]) >= prompts.shape[1]).repeat(3, 1)


def distance(shown, memory, K=3, **figures):
    return imitation_loss(SOFT, shown[0], memory, *shown[1:], K, 0.5, 1.0, seeded(), **figures)


def test_the_teacher_is_no_distance_from_itself(shown):
    """At any step; what hands nothing on is none before the first, and then is."""
    figures, none = {}, {}
    assert distance(shown, load_memory(SOFT, shown[0]), figures=figures) == 0
    assert set(figures) == {"far_1", "far_2", "far_3"}
    distance(shown, None, figures=none)
    assert none["far_1"] == 0 and min(none["far_2"], none["far_3"]) > 0.01


def test_the_backbone_sees_the_teacher_alone(shown):
    """Whatever the pupil would have handed on; the distance is what it was wrong by."""
    backbone, ids, _ = shown
    soft, memory = Soft.of(backbone), MetaState.for_backbone(backbone)
    torch.nn.init.normal_(memory.injector.attention.out.weight, generator=seeded())
    mask = backbone.embedding.weight[backbone.config.mask_id]
    pupil = Pupil(memory, soft, mask)
    masked = ids.clone()
    masked[:, -5:] = backbone.config.mask_id
    e, t, span = backbone.embed(masked), torch.ones(3), (torch.full((3,), 20), torch.full((3,), 24))
    mine, theirs = states = pupil.update(pupil.initial(3), backbone.hidden(e), t, span)
    handed = pupil.inject(e, states, t, span)
    assert torch.equal(handed, soft.inject(e, theirs, t, span)) and not torch.equal(handed, e)
    wrong = (memory.inject(e, mine, t, span) - handed).square().sum() / 15
    torch.testing.assert_close(pupil.far, [wrong])


def test_the_pupil_learns_through_its_state(shown):
    """All of it and nothing else; within few updates it is nearer."""
    backbone, memory = shown[0], MetaState.for_backbone(shown[0])
    optimizer, losses = torch.optim.Adam(memory.parameters(), lr=1e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(distance(shown, memory))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0] and all(p.grad is None for p in backbone.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (
        memory.updater.from_s.weight, memory.mixer.attention.q.weight, memory.identity))


def test_the_command_writes_a_memory_to_go_on_from(tmp_path, capsys):
    """train.py's, with distances in its log, of which the loss is the mean."""
    options = ["--ckpt", "soft-tiny", "--K", "2", "--steps", "2", "--batch-size", "2", "--micros",
               "1", "--device", "cpu", "--out", str(tmp_path)]
    assert imitate.main([*options, "--teacher", str(SOFT)]) == 0
    memory = MetaState.load(tmp_path / "metastate.safetensors", load("soft-tiny", "cpu")[0])
    assert isinstance(memory, MetaState)
    first, *_ = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
                 if "far_1" in line]
    assert first["loss"] == pytest.approx((first["far_1"] + first["far_2"]) / 2, rel=1e-4)
    other = tmp_path / "other.safetensors"  # the run is known by what its teacher holds
    other.write_bytes(SOFT.read_bytes())
    assert imitate.main([*options, "--teacher", str(other)]) == 0
    backbone, _ = load("soft-tiny", "cpu", torch.float32)
    changed = load_memory(other, backbone)
    changed.head *= 2
    save_memory(other, changed, backbone.fingerprint())
    capsys.readouterr()
    assert imitate.main([*options, "--teacher", str(other)]) == 2
    assert "teacher" in capsys.readouterr().err


def test_a_teacher_is_of_the_same_backbone(tmp_path, capsys):
    assert imitate.main(["--ckpt", "tiny", "--teacher", str(SOFT), "--steps", "1", "--device",
                         "cpu", "--out", str(tmp_path)]) == 2
    assert "soft.safetensors" in capsys.readouterr().err
