"""Command lines: how a command ends, errors of one line, the types of options, devices, and what is
refused before any work begins."""
from __future__ import annotations

import argparse
import errno
import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DATA, ROOT

import bench
import sample
import train
from lib.cli import (InputError, Parser, command, count, dtype_of, listed, number, one_of, require,
                     seed)
from model import load
from studies import footprint, memdlm, picture, probe

CPU = ["--device", "cpu"]
SHIPPED = ROOT / "checkpoints" / "tiny" / "metastate.safetensors"


# ------------------------------------------------------------------ how a command ends
@pytest.mark.parametrize("error, code, line", [
    (InputError("two\nlines"), 2, "error: two lines\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "/data/x"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "full"), (KeyboardInterrupt(), 130, "\n")],
    ids=repr)
def test_how_a_command_ends(capsys, error, code, line):
    """What `command` turns into an exit code and one line, whatever lines the message had."""
    @command
    def main(argv=None):
        raise error

    assert main([]) == code
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_errors_of_ours_keep_their_traceback():
    """A programming error is not dressed up as bad input."""
    @command
    def main(argv=None):
        raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"):
        main([])


def test_a_checkpoint_that_names_an_unknown_task(cli_fails, ckpt):
    """The tasks raise a `ValueError`; the command says the task and those there are."""
    (ckpt / "generation_config.json").write_text('{"tasks": ["chess"]}')
    line = cli_fails("--ckpt", ckpt, *CPU)
    assert "chess" in line and "sudoku" in line


NO_NAMES = ["x" * 300, "~nobody-of-that-name/x", "random:llada-8b"]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("main, argv", [
    (sample.main, ["--prompt", "hi", "--ckpt"]), (probe.main, ["--prompt", "hi", "--ckpt"]),
    (train.main, ["--out", "out", "--ckpt"]), (picture.main, ["--memory", SHIPPED, "--ckpt"]),
    (memdlm.main, ["sample", "--prompt", "hi", "--ckpt"]), (footprint.main, ["--ckpt"]),
    (memdlm.main, ["train", "--out", "out", "--ckpt"]), (bench.main, ["accuracy", "--ckpt"]),
    (memdlm.main, ["sample", "--prompt", "hi", "--ckpt", "tiny", "--fast-weights"]),
    (memdlm.main, ["bench", "--standard", "tiny", "--memdlm"])])
def test_names_that_no_checkpoint_has(main, argv, name, capsys, tmp_path, monkeypatch):
    """Too long for the system, of a user who is not there, or with no files of its own: each
    command says so in one line, before anything is read."""
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, argv), name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert name[:40] in err


def process(*argv, **options) -> subprocess.CompletedProcess:
    """sample.py as a script of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, argv)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


def test_the_script_exits_with_2_and_one_line():
    """What `main` returns is the exit code of the process."""
    done = process("--ckpt", "nosuch", "--prompt", "hi", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "nosuch" in done.stderr


def test_a_reader_that_went_away(text_ckpt):
    """`sample.py | head -n 1` ends in silence, as other programs do."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process("--ckpt", text_ckpt, "--prompt", "hi", "--gen-length", 8, *CPU, stdout=writer)
    os.close(writer)
    assert done.stderr == ""


def test_results_that_a_full_disk_does_not_take(cli_fails, text_ckpt, monkeypatch):
    """`sample.py > answers.txt` on a full disk."""
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", FullDisk())
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "hi", "--gen-length", 8, *CPU)
    assert "disk is full" in line


# ------------------------------------------------------------------ options
@pytest.mark.parametrize("kind, good, bad", [
    (seed, {"0": 0, "7": 7, str(2 ** 63 - 1): 2 ** 63 - 1},
     ["-1", "1.0", "x", "", str(2 ** 63), "9" * 5000]),
    (count, {"1": 1, "12": 12}, ["0", "-3", "1.5", "x", "", " 1", "9" * 5000]),
    (number(0), {"0": 0.0, "2.5": 2.5, "1e3": 1000.0}, ["-1", "nan", "inf", "x", ""]),
    (number(0, 1), {"0": 0.0, "1": 1.0, "0.5": 0.5}, ["-0.1", "1.1", "nan", "-inf", "x"]),
    (number(0, open_low=True), {"1e-9": 1e-9, "3": 3.0}, ["0", "-1", "nan", "inf"]),
    (listed(count), {"4": [4], "4,4,12": [4, 4, 12]}, ["", "4,", ",4", "4,x", "0", "4;12"]),
    (listed(count, empty=True), {"": [], "1,2": [1, 2]}, [",", "1,", "x"]),
    (one_of(["a", "b"], "letter"), {"a": "a", "b": "b"}, ["c", "", "A", "a,b"]),
    (listed(one_of(["a", "b"], "letter")), {"b,a": ["b", "a"]}, ["a,c", ""])])
def test_types_of_options(kind, good, bad):
    """What each takes, and that all else is one line that names the option and the value."""
    p = Parser()
    p.add_argument("--x", type=kind)
    for text, value in good.items():
        found = p.parse_args([f"--x={text}"]).x
        assert found == value and type(found) is type(value)
    for text in bad:
        with pytest.raises(InputError, match="--x") as caught:
            p.parse_args([f"--x={text}"])
        assert "\n" not in str(caught.value) and "help" in str(caught.value)


def test_a_name_that_is_unknown_lists_the_known():
    """The way out of a typing error."""
    with pytest.raises(argparse.ArgumentTypeError, match="fruit 'aple': one of apple, pear"):
        one_of(["apple", "pear"], "fruit")("aple")


def test_require():
    """A condition that holds says nothing."""
    require(True, "never said")
    with pytest.raises(InputError, match="said"):
        require(False, "said")


@pytest.mark.parametrize("argv, words", [
    (["--nosuch"], ["--nosuch"]), (["--steps", "many"], ["--steps", "many"]),
    (["--steps"], ["--steps"]), (["surplus"], ["surplus"]),
    (["--dtype", "float64"], ["--dtype", "bfloat16"]),
    (["--prompt", "a", "--task", "sums"], ["--prompt", "--task"]),
    (["--prompt", "a", "--prompts", "b"], ["--prompt", "--prompts"]),
    (["--prompt", "a", "--batch-size", "0"], ["--batch-size"]), (["--steps", "8"], ["--prompt"]),
    (["--task", "chess"], ["chess", "sudoku"]), (["--prompts", ""], []),
    (["--prompt", "a", "--seed", str(2**70)], ["seed"]),
    (["--prompt", "a", "--steps", "0"], ["steps"]), (["--prompt", "a", "--ckpt", ""], ["config"]),
    (["--prompt", "a", "--block-length", "0"], ["block"]),
    (["--prompt", "a", "--ckpt", "random:dream-7b"], ["tokenizer"])], ids=str)
def test_arguments_that_make_no_sense(cli_fails, text_ckpt, argv, words, monkeypatch, tmp_path):
    """argparse's own complaints are one line like all others, and 0 or an empty name is not taken
    for an option left out."""
    monkeypatch.chdir(tmp_path)
    line = cli_fails("--ckpt", text_ckpt, *CPU, *argv)
    assert all(word in line for word in words)


# ------------------------------------------------------------------ devices
def test_dtypes_where_nothing_is_said(monkeypatch):
    """bfloat16 on CUDA, float16 on cards that have none, as stored elsewhere."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
        assert dtype_of(None, cuda) == dtype and dtype_of(None, cpu) is None
        assert dtype_of("float32", cuda) == torch.float32


@pytest.mark.parametrize("options", [dict(dtype="float64"), dict(dtype="bf16"), dict(device="gpu"),
                                     dict(dtype=torch.int64), dict(device="cuda:99")], ids=str)
def test_unknown_device_or_dtype(options):
    """A device that torch does not know or this machine does not have, a dtype that no network runs
    in."""
    with pytest.raises(InputError):
        load(DATA / "llada", **{"device": "cpu"} | options)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_unknown_device_on_the_command_line(cli_fails, text_ckpt, device):
    """--device with a typing error, or with a GPU that is not there."""
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "hi", "--gen-length", "8", "--device", device)
    assert "device" in line


def test_compiling_without_a_compiler(cli_fails, monkeypatch):
    """On a CPU torch.compile writes C++: without a compiler that is one line, and no traceback."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++" in cli_fails("--compile", *CPU)


# ------------------------------------------------------------------ prompts
@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_empty_prompt(cli_fails, text_ckpt, prompt):
    """Nothing to answer."""
    assert "prompt is empty" in cli_fails("--ckpt", text_ckpt, "--prompt", prompt, *CPU)


def test_prompt_without_room(cli_fails, text_ckpt):
    """Prompt and answer together exceed the model's length: both numbers are named, and one token
    less would do."""
    argv = ["--ckpt", text_ckpt, "--gen-length", "8", "--quiet", *CPU]
    line = cli_fails(*argv, "--prompt", "x" * 249)
    assert all(word in line for word in ("249", "8", "256"))
    assert sample.main([str(a) for a in [*argv, "--prompt", "x" * 248]]) == 0


def test_prompt_that_is_no_text(cli_fails, text_ckpt):
    """Bytes on the command line that are not UTF-8 arrive as lone surrogates."""
    assert "Unicode" in cli_fails("--ckpt", text_ckpt, "--prompt", "a\udcffb", *CPU)


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_prompts_files_that_cannot_be_used(cli_fails, text_ckpt, tmp_path, content):
    """Absent, empty, blank: the file is named."""
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in cli_fails("--ckpt", text_ckpt, "--prompts", file, *CPU)


ASK = """
import importlib, os, sys

class Asked(Exception):
    pass

class BeforeTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Asked

sys.meta_path.insert(0, BeforeTorch())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Asked:
        print(name, *(os.environ.pop(setting, None) for setting in ("OMP_WAIT_POLICY", "MKL_CBWR")))
    for known in [*sys.modules]:
        if known.split(".")[0] in ("lib", "model", "sample", "train", "bench", "studies", "tasks"):
            del sys.modules[known]
"""


def test_threads_sleep_and_share():
    """Every command says so before torch starts its threads, or two of them on a busy core spin and
    wait for each other, twenty times as long; what the user has said stays."""
    names = ["sample", "train", "bench", *(f"studies.{path.stem}" for path in
                                           sorted((ROOT / "studies").glob("[!_]*.py")))]
    asked = {}
    for given in (None, "ACTIVE"):
        env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "MKL_CBWR")}
        env |= {"OMP_WAIT_POLICY": given, "MKL_CBWR": "AVX2"} if given else {}
        done = subprocess.run([sys.executable, "-c", ASK, *names[:1 if given else None]], env=env,
                              cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        asked[given] = [line.split() for line in done.stdout.splitlines()]
    assert asked == {None: [[name, "PASSIVE", "AUTO"] for name in names],
                     "ACTIVE": [["sample", "ACTIVE", "AVX2"]]}
