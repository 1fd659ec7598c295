"""What reaches terminals and pipes: no control characters, every encoding, and a word of long
work."""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import EOS_ID, MASK_ID, ROOT, byte_tokenizer, checkpoint

import sample
from lib import progress as progress_module
from lib.cli import InputError, command
from lib.files import to_json
from lib.live import answer_prompts, show
from lib.options import sampling_parser
from lib.progress import progress, slow
from lib.stats import Clock, Timings
from lib.terminal import harmless, printable
from lib.tokenizer import Tokenizer
from sample import Sample
from studies.probe import visible

CPU = ["--device", "cpu"]
OBEYED = ["\x1b[2J", "\r", "\b", "\x00", "\x07", "\x7f", "\x85", "\x9b", "\x9d", "\u061c", "\u200e",
          "\u202e", "\u2067", "\ud800"]
KEPT = ["\t", "\n", "a\u200db", "\u200c", "\ufe0f", "\u00ad", "\u00a0", "é界😀", "e\u0301"]


class Terminal(io.TextIOWrapper):
    """A terminal of some encoding; .sent is what arrived, in bytes."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__(io.BytesIO(), encoding, newline="\n")

    def isatty(self) -> bool:
        return True

    @property
    def sent(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()


# ------------------------------------------------------------------ nothing escapes
@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_what_a_terminal_would_obey(monkeypatch, capsys, text):
    """It reaches neither an error line nor a terminal, whatever is printed."""
    @command
    def main(argv=None):
        print(f"one {text} two")
        raise InputError(f"the tensor a{text}b")

    assert not {*text} & {*printable(text)} - {*"[2J"} and "\ufffd" in harmless(text)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    assert main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the tensor a") and err.count("\n") == 1
    assert not {*text} & {*err} - {*"[2J"}
    assert terminal.sent.decode() == f"one {harmless(text)} two\n"
    assert sys.stdout is terminal  # as it was found


@pytest.mark.parametrize("text", KEPT, ids=ascii)
def test_what_a_terminal_shows_is_left(text):
    """Tabs, joiners, accents: whatever no terminal would obey."""
    assert harmless(text) == text and harmless("a\r\nb") == "a\nb"


@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b", "\u202e"], ids=ascii)
def test_names_of_files_tensors_and_tokens(cli_fails, tmp_path, text):
    """Which come from outside as well as answers do."""
    folder = checkpoint(tmp_path / f"a{text}b", edit=lambda x: x.update({text: torch.ones(1)}))
    byte_tokenizer({"<|mask|>": MASK_ID, "<|eos|>": EOS_ID}).save(str(folder / "tokenizer.json"))
    (tmp_path / "x").write_text("{")
    for argv in (["--ckpt", folder], ["--ckpt", text], ["--ckpt", folder, "--memory", text],
                 [f"--{text}"], ["--task", text]):
        assert not {*text} & {*cli_fails(*argv, "--prompt", "hi", *CPU)} - {*"[31m"}
    tokenizer = Tokenizer(byte_tokenizer({f"<{text}>": 500, f"<{text}\ufffd>": 501}))
    assert not {*text} & {*visible(tokenizer, 500), *visible(tokenizer, 501)} - {*"[31m"}


# ------------------------------------------------------------------ encodings
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16"])
def test_a_pipe_is_utf_8_and_a_terminal_shows_what_it_can(monkeypatch, encoding):
    """Whatever the locale says; half a surrogate pair, as in a path, ends nothing either."""
    @command
    def main(argv=None):
        print("界 ░\n\udce9")
        print("é", file=sys.stderr, flush=True)

    pipe, errors = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", pipe)
    monkeypatch.setattr("sys.stderr", errors)
    assert main() == 0
    assert pipe.buffer.getvalue().decode("utf-8") == "界 ░\n\\udce9\n"
    assert errors.buffer.getvalue().decode("utf-8") == "é\n"
    monkeypatch.setattr("sys.stdout", terminal := Terminal(encoding))
    assert main() == 0
    shown = terminal.sent.decode(encoding)
    assert shown == ("界 ░\n\ufffd\n" if encoding.startswith("utf") else "? ?\n?\n")


def test_nobody_hears_an_error(monkeypatch):
    """A full disk behind stderr changes no exit code."""
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing fails too
        monkeypatch.setattr("sys.stderr", full)
        assert sample.main(["--ckpt", "nosuch"]) == 2
        monkeypatch.undo()


def test_a_closed_stream_swallows(monkeypatch):
    """`sample.py >&-` is None to Python."""
    @command
    def main(argv=None):
        print("one", file=sys.stdout)
        raise InputError("two")

    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert main() == 2 and sys.stdout is None


def test_json_lines_of_a_process_in_another_locale(text_ckpt, tmp_path):
    """From the first byte to the last, of the answers and of what is wrong."""
    (tmp_path / "x.jsonl").write_text('{"prompt": "界", "id": "é\\ud800"}\n{"id": "界"}\n', "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONUTF8": "0"}
    argv = ["--ckpt", text_ckpt, "--prompts", tmp_path / "x.jsonl", "--gen-length", "8", *CPU]
    done = subprocess.run([sys.executable, ROOT / "sample.py", *argv], capture_output=True,
                          env=environment, timeout=120)
    first, second = (json.loads(line) for line in done.stdout.decode("utf-8").splitlines())
    assert (first["prompt"], first["id"], second["id"]) == ("界", "é\ud800", "界")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1


def test_json_is_finite_and_utf_8():
    """What JSON has no name for is an error and not a word that other readers refuse."""
    assert to_json({"é\udfff": [1e300, None]}) == '{"é\\udfff": [1e+300, null]}'
    for value in (float("nan"), [float("inf")], {"a": {"b": -float("inf")}}):
        with pytest.raises(InputError, match="finite"):
            to_json(value)
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match="deep"):
        to_json(deep)


# ------------------------------------------------------------------ long work
@pytest.fixture
def impatient(monkeypatch):
    """Says after a moment what else takes seconds, and often."""
    monkeypatch.setattr(progress_module, "PATIENCE", 0.01)
    monkeypatch.setattr(progress_module, "RARELY", 0.02)


def test_long_work_is_said_and_short_work_is_not(impatient, capsys, monkeypatch):
    """With how long and how far; nothing once it is over, or where it failed."""
    before = progress_module.threading.active_count()  # other tests may have left some
    with slow("load\x1bing", lambda: ", 3 of 4"):
        time.sleep(0.2)
    first, *more = capsys.readouterr().err.splitlines()
    assert first == "load\ufffding, 3 of 4: 0 s so far" and more
    with pytest.raises(InputError), slow("failing"):
        time.sleep(0.1)
        raise InputError("x")
    assert slow("measuring")(lambda x: time.sleep(0.1) or x)(7) == 7
    with slow("seen elsewhere", silent=True):
        time.sleep(0.1)
    assert progress_module.threading.active_count() <= before
    assert "elsewhere" not in capsys.readouterr().err
    monkeypatch.setattr(progress_module, "PATIENCE", 5)
    assert list(progress([1, 2], "short")) == [1, 2] and capsys.readouterr().err == ""


def test_pieces_of_long_work(impatient, capsys, monkeypatch):
    """Which are counted; on a terminal in a bar, unless something else stands there."""
    for _ in progress([0, 1, 2], "pieces", start=5):
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pieces, 5 of 8: ") and lines[-1].startswith("pieces, 7 of 8: ")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(progress([0, 1], "pieces", bar=True)) == [0, 1]
    assert b"\r" in terminal.sent and b"2/2" in terminal.sent
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(progress([0, 1], "pieces", bar=False)) == [0, 1] and terminal.sent == b""


def slowly(ids, on_step=None, pad_mask=None, **_) -> Sample:
    """A model that takes its time."""
    for _ in range(3 if on_step else 0):
        time.sleep(0.06)
        on_step(Sample(torch.cat([ids, ids], 1), torch.zeros(1, 2).bool(), 1, 0.1))
    time.sleep(0.1)
    return Sample(torch.cat([ids, ids], 1), torch.zeros(len(ids), 2).bool(), 1, 0.1)


def test_no_command_is_silent_for_long(impatient, capsys, tmp_path):
    """A file of prompts, an answer alone, a row of a benchmark, whatever reads a checkpoint."""
    tokenizer = Tokenizer(byte_tokenizer({"<|mask|>": MASK_ID, "<|eos|>": EOS_ID}))
    special = argparse.Namespace(mask_id=MASK_ID, eos_id=EOS_ID, pad_id=EOS_ID, max_len=99)
    (tmp_path / "x").write_text("a\nb\n")
    args = sampling_parser("", ["random"], []).parse_args(["--prompts", str(tmp_path / "x")])
    assert answer_prompts(args, {"": slowly}, tokenizer, special, "cpu", 8, {}, [], None) == 0
    said = capsys.readouterr().err
    assert re.search(r"answering, 1 of 2, \S+ prompts/s, \d\d:\d\d left: ", said)
    for quiet in (True, False):
        show(slowly, torch.tensor([[97]]), tokenizer, special, quiet)
        assert "answering, 1 forwards: " in capsys.readouterr().err
    Timings(Clock(torch.device("cpu"), 0, 1), 1.0, 1.0).take("a step", lambda: time.sleep(0.1))
    assert "a step: 0 s so far" in capsys.readouterr().err


def test_a_hub_that_stalls(impatient, capsys, monkeypatch):
    """It is said that something is awaited, and of whom."""
    import huggingface_hub

    def stalls(name, allow_patterns, local_files_only=False):
        if not local_files_only:
            time.sleep(0.1)
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stalls)
    assert sample.main(["--ckpt", "some/model", "--prompt", "a", *CPU]) == 2
    *said, last = capsys.readouterr().err.splitlines()
    assert said and all("some/model" in line and "so far" in line for line in said)
    assert last.startswith("error: cannot download some/model (no route)")
