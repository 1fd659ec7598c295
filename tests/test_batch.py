"""Files of prompts as a batch tool: order, ends, runs cut off, several processes, noise."""
from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import awake
from processes import child, together

import sample
from lib import batch, live, progress
from lib.answers import Ends, written
from lib.cli import InputError
from lib.prompts import Prompt
from model import load

CPU = ["--device", "cpu"]
ARGV = ["--gen-length", "8", "--block-length", "4", "--batch-size", "2", *CPU]


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Nine prompts of several lengths, one of them bad, each with a field of its own."""
    lines = [json.dumps({"id": i, "prompt": "x" * (1 + i * 5 % 7), "mine": [i]}) for i in range(9)]
    lines[4] = '{"id": "bad"}'
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "prompts.jsonl"


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Four prompts each, so that there are several."""
    monkeypatch.setattr(batch, "WINDOW", 2)


def run(ckpt, prompts, *argv) -> int:
    return sample.main(["--ckpt", str(ckpt), "--prompts", str(prompts), *ARGV, *map(str, argv)])


def rows_of(text: str) -> list[dict]:
    """Lines of JSON without what is measured."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in text.splitlines()]


# ------------------------------------------------------------------ lines and their ends
def test_lines_come_in_the_order_of_the_file(text_ckpt, prompts, tmp_path, capsys):
    """Whatever was answered first; to a file as to stdout, with the exit code of the bad one."""
    assert run(text_ckpt, prompts) == 1
    plain = rows_of(capsys.readouterr().out)
    assert [row["id"] for row in plain] == [0, 1, 2, 3, "bad", 5, 6, 7, 8]
    assert [row.get("mine") for row in plain] == [[0], [1], [2], [3], None, [5], [6], [7], [8]]
    assert run(text_ckpt, prompts, "--out", tmp_path / "new" / "out.jsonl") == 1
    assert capsys.readouterr().out == ""
    assert rows_of((tmp_path / "new" / "out.jsonl").read_text()) == plain


def test_windows_have_prompts_of_like_length():
    """Each prompt once; batches within a window from long to short; one at a time in the order of
    the file. Those of a batch have as many masks."""
    rng = random.Random(0)
    found = [Prompt({}, [0] * rng.randrange(1, 90), "bad" * (i % 7 == 3)) for i in range(50)]
    gaps = [Prompt({}, [0] * 5 + [9] * (i % 3)) for i in range(20)]
    parts = [part for window in batch.windows(gaps, 4, 9) for part in window]
    assert all(len({i % 3 for i in part}) == 1 for part in parts)
    assert sorted(i for part in parts for i in part) == [*range(20)]
    for size in (1, 3):
        cut = batch.windows(found, size, 9)
        flat = [i for window in cut for part in window for i in part]
        good = [i for i, prompt in enumerate(found) if not prompt.error]
        assert sorted(flat) == good and all(len(w) <= 2 for w in cut)
        assert size > 1 or flat == good
        for window, start in zip(cut, range(0, 50, 2 * size)):
            members = [i for part in window for i in part]
            assert sorted(members) == good[start:start + 2 * size]
            lengths = [len(found[i].ids) for i in members]
            assert size == 1 or lengths == sorted(lengths, reverse=True)


class Letters:
    """A tokenizer of a letter each; 0 is the mask, 1 EOS."""

    vocab: dict = {}

    def decode(self, ids, skip_special: bool = False) -> str:
        return "".join(chr(96 + i) for i in ids if i > 1)


@pytest.mark.parametrize("answer, stops, expected", [
    ([3, 4, 5, 1, 1], [], ("cde", 3, "eos")), ([3, 4, 5, 6, 7], [], ("cdefg", 5, "length")),
    ([3, 4, 5, 1, 9], [], ("cde", 3, "eos")), ([3, 4, 5, 6, 1], ["de"], ("c", 3, "stop")),
    ([3, 4, 5, 6, 1], ["x", "e", "d"], ("c", 2, "stop")), ([1, 4, 5], ["d"], ("", 0, "eos")),
    ([3, 0, 5, 1], ["d"], ("ce", 2, "eos")), ([4, 1], ["d"], ("", 1, "stop"))])
def test_why_an_answer_ends(answer, stops, expected):
    """Text, tokens up to the end, and the reason; a stop string goes before EOS behind it."""
    ends = Ends(Letters(), 0, {1}, [stops], 2)
    assert written([8, 9], [8, 9, *answer], ends, 0) == expected


def test_what_is_filled_has_an_end_of_its_own():
    ends = Ends(Letters(), 0, {1}, [()], 3)
    assert written([8, 0, 9], [8, 3, 9], ends, 0) == ("hci", 1, "filled")
    assert written([8, 0, 9], [8, 3, 9, 4, 1], ends, 0) == ("hcid", 2, "eos")


def test_a_stop_string_ends_the_work_too(text_ckpt, prompts, tmp_path, capsys):
    """A letter that the answers have: they end there, and no later block is computed."""
    (tmp_path / "one").write_text("x\n")
    run(text_ckpt, tmp_path / "one")
    [plain] = rows_of(capsys.readouterr().out)
    stop = plain["text"][:1]
    run(text_ckpt, tmp_path / "one", "--stop", "\u2603", "--stop", stop)
    [row] = rows_of(capsys.readouterr().out)
    assert (row["text"], row["finish_reason"]) == ("", "stop")
    assert row["forwards"] <= 4 < plain["forwards"]
    single = ["--ckpt", str(text_ckpt), "--prompt", "x", "--quiet", *ARGV]
    assert sample.main([*single, "--stop", stop]) == 0 and capsys.readouterr().out == "\n"
    assert sample.main([*single, "--stop", "\n\n"]) == 0  # the usual one
    assert capsys.readouterr().out == plain["text"] + "\n"


def test_steps_of_a_watched_memory(text_ckpt, prompts, tmp_path):
    """--show-memory: each line has what its row's slots did, step by step."""
    awake(load(text_ckpt, "cpu")[0], slots=5).save(tmp_path / "m.safetensors")
    argv = ["--memory", tmp_path / "m.safetensors", "--show-memory", "--no-early-stop"]
    run(text_ckpt, prompts, *argv, "--out", tmp_path / "out")
    rows = [row for row in rows_of((tmp_path / "out").read_text()) if "text" in row]
    assert len(rows) == 8
    for row in rows:
        assert [len(step["slots"]) for step in row["steps"]] == [5] * 8
    assert run(text_ckpt, prompts, *argv, "--out", tmp_path / "out") == 1


# ------------------------------------------------------------------ runs cut off
def test_a_run_goes_on_behind_its_last_whole_line(text_ckpt, prompts, tmp_path, capsys):
    """Half a line is made again; what is whole stays byte for byte; batches are what they were. A
    file of prompts may have another name by then."""
    out = tmp_path / "out.jsonl"
    run(text_ckpt, prompts, "--out", out)
    whole = out.read_bytes()
    lines = whole.split(b"\n")
    prompts = prompts.rename(tmp_path / "renamed")
    for kept in (0, 1, 5, 8, 9):
        out.write_bytes(b"\n".join(lines[:kept] + [lines[kept][:20]]))
        assert run(text_ckpt, prompts, "--out", out) == 1
        assert f"has {kept} of 9 lines" in capsys.readouterr().err
        again = out.read_bytes()
        assert again.split(b"\n")[:kept] == lines[:kept]
        again = again.replace(b"renamed", b"prompts.jsonl")
        assert rows_of(again.decode()) == rows_of(whole.decode())


def test_what_is_said_on_the_way(text_ckpt, prompts, tmp_path, capsys, monkeypatch):
    """How many are done, how fast, and for how long still; what was there counts, no prompt
    twice."""
    monkeypatch.setattr(progress, "PATIENCE", 0.001)
    monkeypatch.setattr(progress, "RARELY", 0.001)
    out = tmp_path / "out.jsonl"
    run(text_ckpt, prompts, "--out", out)
    first = capsys.readouterr().err
    out.write_text("".join(out.read_text().splitlines(True)[:3]))
    run(text_ckpt, prompts, "--out", out)
    for said, start in ((first, 1), (capsys.readouterr().err, 4)):
        found = re.findall(r"answering, (\d) of 9, [\d.]+ prompts/s, (\d\d):\d\d left: ", said)
        done = [int(number) for number, _ in found]
        assert done == sorted(done) and start < done[0] and done[-1] <= 9


def test_what_does_not_belong_together(text_ckpt, prompts, tmp_path, cli_fails, capsys):
    """Other options, other prompts, a file of somebody else's: refused, and left as they are."""
    out = tmp_path / "out.jsonl"
    argv = ["--ckpt", text_ckpt, "--prompts", prompts, "--out", out, *ARGV]
    run(text_ckpt, prompts, "--out", out)
    capsys.readouterr()
    kept = out.read_bytes()
    assert "(temperature)" in cli_fails(*argv, "--temperature", "0.5")
    assert "(stop)" in cli_fails(*argv, "--stop", "a")
    (tmp_path / "other").write_text(prompts.read_text().replace('"id": 2', '"id": 22'))
    assert f"{out}:3" in cli_fails(*argv, "--prompts", tmp_path / "other")
    (tmp_path / "fewer").write_text("\n".join(prompts.read_text().split("\n")[:5]))
    assert "more lines" in cli_fails(*argv, "--prompts", tmp_path / "fewer")
    assert out.read_bytes() == kept
    (tmp_path / "mine").write_text("a text of mine\n")
    assert "mine.settings.json is missing" in cli_fails(*argv, "--out", tmp_path / "mine")
    assert "the file of --prompts" in cli_fails(*argv, "--out", prompts)
    assert (tmp_path / "mine").read_text() == "a text of mine\n"
    assert "--prompts" in cli_fails("--ckpt", text_ckpt, "--prompt", "a", "--out", out, *CPU)


def answer_slowly(ckpt: str, prompts: str, out: str) -> None:
    """sample.py in a process of its own."""
    torch.set_num_threads(1)
    batch.WINDOW = 2
    with open(os.devnull, "w") as sys.stderr:
        sys.exit(run(ckpt, prompts, "--out", out))


@pytest.mark.parametrize("rounds", [2, pytest.param(15, marks=pytest.mark.faults)])
def test_killed_in_the_middle(text_ckpt, prompts, tmp_path, rounds):
    """Under SIGKILL at random moments, again and again: the lines of a run left alone."""
    assert run(text_ckpt, prompts, "--out", tmp_path / "whole") == 1
    out, rng = tmp_path / "out", random.Random(0)
    for _ in range(rounds):
        process = child(answer_slowly, str(text_ckpt), str(prompts), str(out))
        before = out.stat().st_size if out.exists() else 0
        while process.is_alive() and (out.stat().st_size if out.exists() else 0) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode in (1, -signal.SIGKILL)
    assert run(text_ckpt, prompts, "--out", out) == 1
    assert rows_of(out.read_text()) == rows_of((tmp_path / "whole").read_text())


# ------------------------------------------------------------------ noise and processes
def test_an_answer_does_not_depend_on_its_batch(text_ckpt, prompts, capsys):
    """At a temperature: one at a time, in threes and all together."""
    texts = []
    for size, seed in ((1, 0), (3, 0), (8, 0), (8, 1)):
        run(text_ckpt, prompts, "--temperature", "0.7", "--batch-size", size, "--seed", seed)
        texts.append([row.get("text") for row in rows_of(capsys.readouterr().out)])
    assert texts[0] == texts[1] == texts[2] != texts[3]


def shared(rank: int, ckpt: str, prompts: str, out: str) -> None:
    """sample.py in one of two processes; the second has nothing to say."""
    torch.set_num_threads(1)
    batch.WINDOW, batch.TURN = 4, 1
    with open(os.devnull, "w") as sys.stderr, \
            open(os.devnull if rank == 0 else out + ".1", "w") as sys.stdout:
        code = run(ckpt, prompts, "--temperature", "0.7", "--out", out)
    sys.exit(code)


def test_two_processes_share_the_lines(text_ckpt, prompts, tmp_path, monkeypatch):
    """The output is that of one, and only the first process writes."""
    monkeypatch.setattr(batch, "WINDOW", 4)
    out = tmp_path / "two"
    assert together(shared, str(text_ckpt), str(prompts), str(out)) == [1, 1]
    run(text_ckpt, prompts, "--temperature", "0.7", "--out", tmp_path / "one")
    assert rows_of(out.read_text()) == rows_of((tmp_path / "one").read_text())
    assert (tmp_path / "two.1").read_text() == ""


def one_fails(rank: int, ckpt: str, prompts: str, out: str) -> None:
    """The second of two processes is refused something in a batch of its own, while the first still
    has a line to write. It reads no prompts, which the first does for both."""
    plain, write = batch.answers, batch.Lines._write

    def slowly(lines, line):
        time.sleep(0.1)
        write(lines, line)

    def answers(args, decode, found, *rest):
        if rank == 1 and 6 in found:
            raise InputError("not finite")
        return plain(args, decode, found, *rest)

    batch.answers, batch.WINDOW, batch.Lines._write = answers, 2, slowly
    live.read_prompts = live.read_prompts if rank == 0 else None
    with open(os.devnull if rank == 0 else out + ".1", "w") as sys.stderr:
        code = run(ckpt, prompts, "--out", out)
        print(len(Path(out).read_text().splitlines()), "lines", file=sys.stderr)
    sys.exit(code)


def test_what_ends_one_process_ends_all(text_ckpt, prompts, tmp_path):
    """In one line, once the answers before it are there."""
    out = tmp_path / "two"
    assert together(one_fails, str(text_ckpt), str(prompts), str(out)) == [2, 2]
    assert (tmp_path / "two.1").read_text() == "error: not finite\n6 lines\n"
    run(text_ckpt, prompts, "--out", tmp_path / "one")
    lines = rows_of((tmp_path / "one").read_text())
    there = rows_of(out.read_text())
    assert there == lines[:len(there)] and len(there) == 6


def test_prompts_that_are_piped_in(text_ckpt, prompts, capsys):
    """- is what comes on stdin."""
    run(text_ckpt, prompts)
    plain = rows_of(capsys.readouterr().out)
    reading, writing = os.pipe()
    os.write(writing, prompts.read_bytes())
    os.close(writing)
    kept = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert run(text_ckpt, "-") == 1
    finally:
        os.dup2(kept, 0)
    piped = rows_of(capsys.readouterr().out)
    assert [row.get("text") for row in piped] == [row.get("text") for row in plain]
