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
from tasks import draw


def test_results_come_in_order_from_other_processes():
    """From any key on, again for one that was had, nested as a batch is, and what fails there fails
    here."""
    made = Ahead(torch.arange, lambda key: key + 2, 1)
    for key in (0, 2, 4, 1, 3, 0, 100):
        assert made(key).tolist() == list(range(key))
    with pytest.raises(RuntimeError, match="upper bound"):
        made(-1)
    assert made(9).tolist() == list(range(9))
    made.function = torch.tensor([[1, 2], [3, 4]]).unbind  # to a tuple of tensors
    assert [x.tolist() for x in made(0)] == [[1, 2], [3, 4]]
    made.pool.shutdown(cancel_futures=True)


def test_on_a_cpu_nothing_is_made_ahead():
    """There the cores are the model's."""
    assert ahead(torch.arange, lambda key: key + 1, "cpu") is torch.arange
    assert ahead(torch.arange, lambda key: key + 1, None) is torch.arange


def test_a_gpu_gets_the_same_batches(monkeypatch):
    """Of tasks, for each of two processes, and those that a run may begin with."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
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
    code = ("import torch\nfrom lib.ahead import Ahead\nif __name__ == '__main__':\n"
            "    print(Ahead(torch.arange, lambda key: key + 1, 2)(3).tolist())\n")
    path = tmp_path / "command.py"
    path.write_text(code)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("[0, 1, 2]\n", 0), done.stderr
