"""What a memory's update takes of a device's memory, counted without running it."""
from __future__ import annotations

import json

import pytest
import torch
import train
from conftest import DATA

from metastate import MetaState
from model import load
from studies import footprint
from studies.footprint import Alive, update_bytes
from train import unrolled_loss


@pytest.mark.parametrize("family, checkpointing", [("llada", False), ("dream", True)])
def test_what_an_update_takes_is_what_a_real_one_takes(family, checkpointing, monkeypatch):
    """The tensors that a real loss keeps for its backward pass, in bfloat16 and with nothing
    revealed before the last step, are those counted without running it, as are weights, gradients
    and moments."""
    monkeypatch.setattr(train, "reveal_counts", lambda length, *_: torch.tensor([[0, *length]]))
    backbone, tokens = load(DATA / family, "cpu", "bfloat16")[0], 40
    backbone.checkpointing, memory = checkpointing, MetaState.for_backbone(backbone)
    ids, answer = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None] >= 10
    with Alive(backbone, memory) as alive:
        unrolled_loss(backbone, memory, ids, answer, 2).backward()
    gradients = sum(p.grad.nbytes for p in memory.parameters())
    weights, own, rest = update_bytes(backbone.config, tokens, 2, checkpointing)
    assert weights == sum(p.nbytes for p in backbone.parameters())
    assert own == 4 * sum(p.nbytes for p in memory.parameters()) == 4 * gradients
    assert rest == pytest.approx(alive.peak - gradients, rel=0.02)


def test_alive_counts_what_lives():
    """Views and weights are not counted, what is dropped is taken off, the peak stays."""
    linear = torch.nn.Linear(50, 20, bias=False).requires_grad_(False)
    with Alive(linear) as alive:
        x = torch.ones(1000, 50)                          # 200,000 bytes
        y = linear(x.view(2, 500, 50))[:, :10]            # a view into 80,000 bytes
        assert alive.now == alive.peak == 280_000
        del x
        assert alive.now == 80_000
        z = torch.ones(100)
        assert alive.now == 80_400 and alive.peak == 280_000
    del y, z
    assert alive.now == 0


def test_the_table_and_its_json(small_ckpt, capsys):
    """Checkpointing keeps less and twice the tokens take more; the table is what the JSON says. At
    K = 1 what updates the state has no gradient."""
    assert footprint.main(["--ckpt", str(small_ckpt), "--tokens", "32,64", "--K", "1",
                           "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(r["tokens"], r["checkpointing"]) for r in rows] == [
        (32, False), (32, True), (64, False), (64, True)]
    peaks = [r["bytes"][2] for r in rows]
    assert peaks[1] < peaks[0] and peaks[3] < peaks[2] and peaks[0] < peaks[2]
    assert len(table) == 2 + 4 + 2


@pytest.mark.parametrize("argv, word", [
    (["--tokens", "0"], "--tokens"), (["--K", "x"], "--K"),
    (["--ckpt", "no/such/folder"], "no/such")])
def test_arguments_that_make_no_sense(argv, word, capsys):
    """One line and exit code 2."""
    assert footprint.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err
