"""Ctrl-C at any moment: one line, exit code 130, and what a training keeps or loses."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import METRICS, ROOT, STATE, assert_same_run, saved_step, toy, toy_loss, toy_run

from lib import interrupts
from lib.cli import command
from lib.run import Run
from train import fit


def press() -> None:
    """What Ctrl-C does to a process."""
    os.kill(os.getpid(), signal.SIGINT)


def stopped(out: Path, capsys, **options) -> str:
    """The one line of a command that fits the toy and is interrupted."""
    parameters = toy()
    loss_fn = options.pop("loss_fn", None)

    @command
    def main(argv=None):
        fit(parameters, loss_fn(toy_loss(parameters)) if loss_fn else toy_loss(parameters), out,
            **{"steps": 30, "lr": 0.05, "warmup": 3, "save_every": 4, "micros": 2} | options)

    assert main([]) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "interrupted" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return err


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    toy_run(out)
    return out


@pytest.mark.parametrize("moment", ["loss", "update", "evaluation", "checkpoint"])
def test_training_saves_what_it_has(tmp_path, capsys, whole, monkeypatch, moment):
    """Between checkpoints, in the midst of an update, an evaluation or the writing of a checkpoint:
    the last whole step is saved and said, and the run ends bit for bit as one left alone."""
    options, expected = {}, 11
    if moment == "loss":
        expected = 10

        def pressing(loss_fn):
            def wrapped(step, micro):
                if (step, micro) == (10, 1):
                    press()
                return loss_fn(step, micro)
            return wrapped
        options["loss_fn"] = pressing
    elif moment == "update":
        def update(self, *args):
            if self.metrics.exists() and self.metrics.read_text().count("\n") == 10:
                press()
            return check(self, *args)
        check = Run.log
        monkeypatch.setattr(Run, "log", update)
    elif moment == "evaluation":
        options |= {"eval_every": 11, "evaluate": lambda step: press() or {}}
    else:
        save, expected = Run.save, 12

        def pressed(self, step):
            if step == 12:
                press()
            save(self, step)
        monkeypatch.setattr(Run, "save", pressed)
    line = stopped(tmp_path, capsys, **options)
    monkeypatch.undo()
    assert f"step {expected} of 30" in line and saved_step(tmp_path) == expected
    assert sorted(f.name for f in tmp_path.iterdir()) == [METRICS, STATE]
    toy_run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_second_one_stops_at_once(tmp_path, capsys, whole):
    """In the midst of an evaluation that lasts: it says what is lost."""
    def evaluate(step):
        press()
        press()
        raise AssertionError("went on")

    line = stopped(tmp_path, capsys, eval_every=11, evaluate=evaluate)
    assert "step 8 of 30" in line and "lost" in line and saved_step(tmp_path) == 8
    toy_run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_before_the_first_step(tmp_path, capsys):
    """There is nothing to keep."""
    assert "before anything" in stopped(tmp_path, capsys, loss_fn=lambda f: lambda *a: press())


def test_others_handlers_stay(tmp_path):
    """nohup's, say; and of a thread, which can set none."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        toy_run(tmp_path, steps=1, evaluate=lambda step: press() or {})
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_library_leaves_ctrl_c_as_it_is():
    """Only a script of ours takes it over while it imports."""
    assert not interrupts._is_ours()
    done = subprocess.run([sys.executable, "-c", "import signal, lib.interrupts; print("
                           "signal.getsignal(2) is signal.default_int_handler)"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("name", ["sample", "train", "bench", *(f"studies.{name}" for name in (
    "memdlm", "pretrain", "probe", "footprint", "picture"))])
def test_while_it_imports(name, tmp_path):
    """One line and 130, though nothing of ours runs yet: here it comes in the midst of torch."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), "
                                       "signal.SIGINT)\ntime.sleep(9)\n")
    how = ["-m", name] if "." in name else [f"{name}.py"]
    done = subprocess.run([sys.executable, *how], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
