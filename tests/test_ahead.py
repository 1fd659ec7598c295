"""Examples that other processes make ahead of time."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lib.ahead import Ahead, ahead
from lib.data import task_batches
from lib.hub import CHECKPOINTS
from lib.tokenizer import Tokenizer
from studies.pretrain import story_pool
from tasks import draw


def squares(key: int) -> list:
    """Nested as a batch is, and from where it was made."""
    if key == 7:
        raise ValueError("seven")
    return [torch.tensor([key ** 2]), (None, torch.tensor([os.getpid()]))]


def test_results_come_in_order_from_other_processes():
    """From any key on, again for one that was had, and what fails there fails here."""
    made = Ahead(squares, lambda key: key + 2, 2)
    for key in (0, 2, 4, 1, 3, 0, 100):
        square, (nothing, where) = made(key)
        assert square.item() == key ** 2 and nothing is None and where.item() != os.getpid()
    with pytest.raises(ValueError, match="seven"):
        made(7)
    assert made(9)[0].item() == 81
    made.pool.shutdown(cancel_futures=True)


def test_on_a_cpu_nothing_is_made_ahead():
    """There the cores are the model's."""
    assert ahead(squares, lambda key: key + 1, "cpu") is squares
    assert ahead(squares, lambda key: key + 1, None) is squares


def test_a_gpu_gets_the_same_batches(monkeypatch):
    """Of tasks, for each of two processes, and those that a run may begin with."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr("lib.data.processes", lambda: (0, 2))
    monkeypatch.setattr("lib.ahead.processes", lambda: (0, 1))
    tokenizer = Tokenizer.from_folder(CHECKPOINTS["tiny"])
    plain, fast = (task_batches(draw, tokenizer, 1, 24, ["chain", "sums"], 3, 4, 0, device)
                   for device in ("cpu", "cuda:0"))
    for key in ((0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (5, 3), (0, 0, True)):
        for one, other in zip(plain(*key), fast(*key)):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_a_command_ends_with_its_workers(tmp_path):
    """Also while they still work."""
    code = ("from lib.ahead import Ahead\nfrom tests.test_ahead import squares\n"
            "if __name__ == '__main__':\n"
            "    made = Ahead(squares, lambda key: key + 1, 2)\n    print(made(3)[0].item())\n")
    path = tmp_path / "command.py"
    path.write_text(code)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("9\n", 0), done.stderr


def test_pools_of_stories_are_the_same_anywhere():
    """Made by a function that other processes can be given."""
    from studies.pretrain import story_tokenizer
    tokenizer = story_tokenizer()
    here = story_pool(tokenizer, 1, 0, 1, 3)
    made = Ahead(squares, lambda key: key + 1, 1)
    made.function = __import__("functools").partial(story_pool, tokenizer, 1, 0, 1)
    there = made(3)
    made.pool.shutdown(cancel_futures=True)
    assert all(torch.equal(a, b) for one, other in zip(here, there)
               for a, b in zip(one, other) if a is not None)
