"""Where results go: tried before any work, owned by one process at a time, and never through a link
of somebody's."""
from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import METRICS, ROOT, STATE, toy_run
from processes import child

import bench
import sample
import train
from lib import data, outputs
from lib.cli import InputError, command
from lib.files import write_atomic, write_text
from lib.outputs import own
from studies import memdlm, picture, pretrain, probe

TRAINING = {"train": (train.main, []), "memdlm": (memdlm.main, ["train"]),
            "pretrain": (pretrain.main, ["tiny"])}


# ------------------------------------------------------------------ temporary names
def test_a_link_under_a_guessed_name_is_not_followed(tmp_path):
    """Whatever links lie in a folder, what they point to stays as it is; the temporary name is
    another one each time, and the file has the mode that any other would have."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("x.json.tmp", ".x.json.tmp", "x.json", "tmp"):
        (folder / name).symlink_to(secret)
    seen = set()
    for _ in range(3):
        write_atomic(folder / "x.json", lambda p: seen.add(p.name) or p.write_text("new"))
    assert secret.read_text() == "mine" and len(seen) == 3
    assert (folder / "x.json").read_text() == "new" and not (folder / "x.json").is_symlink()
    (tmp_path / "plain").write_text("")
    assert (folder / "x.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_nothing_is_left_of_what_was_not_written(tmp_path, error):
    """Whatever ends the writing, Ctrl-C included."""
    def write(path):
        path.write_text("half")
        raise error("stop")

    with pytest.raises((error, InputError)):
        write_atomic(tmp_path / "x", write)
    assert list(tmp_path.iterdir()) == []


def test_a_name_beyond_sense():
    """A NUL is in no file's name."""
    with pytest.raises(InputError, match="cannot write"):
        write_text("a\0b", "x")


def test_leftovers_of_killed_processes_go(tmp_path):
    """And nothing else does, however alike it looks."""
    mine = [".new-0123.tmp", ".new-0123456789abcdef.txt", "x.tmp"]
    for name in (*mine, ".new-0123456789abcdef.tmp"):
        (tmp_path / name).write_text("x")
    own(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(mine)


# ------------------------------------------------------------------ one owner
def holding(folder: Path, ready: Path) -> None:
    """A process that owns a folder until it is killed."""
    owner = own(folder)
    ready.touch()
    while owner:
        time.sleep(0.05)


@pytest.fixture
def held(tmp_path):
    """A folder that another process owns, and that process."""
    (tmp_path / "out").mkdir()
    process = child(holding, tmp_path / "out", tmp_path / "ready")
    while process.is_alive() and not (tmp_path / "ready").exists():
        time.sleep(0.01)
    yield tmp_path / "out", process
    process.kill()
    process.join()


def test_a_folder_has_one_owner(held, tmp_path, capsys):
    """A second run is refused in one line, by any command and spelling of the path, and writes
    nothing; once the first is killed, the folder is free."""
    folder, process = held
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link", folder / ".." / "out"):
        with pytest.raises(InputError, match="another process"):
            toy_run(path)
    for main, argv in TRAINING.values():
        assert main([*argv, "--out", str(folder)]) == 2
        err = capsys.readouterr().err
        assert "another process" in err and err.count("\n") == 1
    assert list(folder.iterdir()) == []
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    toy_run(folder, steps=1)
    assert sorted(f.name for f in folder.iterdir()) == [METRICS, STATE]


def test_an_owner_may_ask_again(tmp_path):
    """As the command and its run do; when both are gone, so is the folder made for them, unless
    something was written there."""
    first, second = own(tmp_path / "a" / "b"), own(tmp_path / "a" / "b")
    assert first is second
    del first, second
    assert list(tmp_path.iterdir()) == []
    owner = own(tmp_path / "a" / "b")
    (tmp_path / "a" / "x").touch()
    del owner
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["x"]


def test_without_locks_it_works_all_the_same(tmp_path, monkeypatch):
    """On a file system that has none."""
    def none(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(outputs.fcntl, "flock", none)
    toy_run(tmp_path, steps=1)


def test_windows_has_a_file_that_goes_with_its_process(tmp_path, monkeypatch):
    """There is no fcntl, but O_TEMPORARY; the second owner finds the file."""
    monkeypatch.setattr(outputs, "fcntl", None)
    toy_run(tmp_path / "neither", steps=1)
    monkeypatch.setattr(os, "O_TEMPORARY", 0, raising=False)
    (tmp_path / ".lock").touch()
    with pytest.raises(InputError, match="another process"):
        own(tmp_path)
    (tmp_path / ".lock").unlink()
    assert own(tmp_path) and (tmp_path / ".lock").exists()


# ------------------------------------------------------------------ tried before any work
def in_the_way(folder: Path) -> dict[str, Path]:
    """Paths that no folder can have."""
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    return {"file": folder / "file", "below a file": folder / "file" / "x", "long": folder / (
        "x" * 300), "pipe": folder / "pipe", "loop": folder / "loop",
        "no room for names": Path("/proc/self/x"), "null": folder / "a\0b", "empty": Path(""),
        "no text": folder / "\udcff"}


WAYS = ["file", "below a file", "long", "pipe", "loop", "no room for names", "null", "empty",
        "no text"]


def refused(main, argv, capsys) -> str:
    """The one line that a command ends with, at once."""
    started = time.monotonic()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and time.monotonic() - started < 2
    return err


@pytest.fixture
def no_load(monkeypatch):
    """Loading a checkpoint is work: it must not begin."""
    def load(*args):
        raise AssertionError("work began")

    for module in (train, memdlm, pretrain, picture, probe, bench, sample):
        monkeypatch.setattr(module, "load", load)


@pytest.mark.parametrize("way", WAYS)
def test_out_is_tried_at_once(way, tmp_path, capsys, no_load):
    """Each command that trains says it in one line, and leaves what is there."""
    path = in_the_way(tmp_path)[way]
    before = sorted(tmp_path.iterdir())
    for main, argv in TRAINING.values():
        line = refused(main, [*argv, "--out", "" if way == "empty" else path], capsys)
        assert "--out" in line
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("way", [*WAYS, "folder", "slash"])
def test_files_are_tried_at_once(way, tmp_path, capsys, no_load):
    """--plot of bench and probe and --out of the picture; a file that is there may be replaced."""
    paths = in_the_way(tmp_path) | {"folder": tmp_path, "slash": f"{tmp_path}/new/"}
    path = "" if way == "empty" else paths[way]
    before = sorted(tmp_path.iterdir())
    memory = ROOT / "checkpoints" / "tiny" / "metastate.safetensors"
    if way == "file":
        command(lambda argv: outputs.output_file(str(path)) and None)([])
        assert capsys.readouterr().err == ""
    else:
        assert "--out" in refused(picture.main, ["--memory", memory, "--out", path], capsys)
        for main, argv in ((bench.main, ["accuracy"]), (probe.main, [])):
            refused(main, [*argv, "--plot", path], capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_cannot_be_replaced(tmp_path, capsys, no_load, monkeypatch):
    """Another user's in a folder like /tmp, and one on which something is mounted."""
    argv = ["--memory", ROOT / "checkpoints" / "tiny" / "metastate.safetensors", "--out"]
    (tmp_path / "x.svg").touch()
    tmp_path.chmod(0o1777)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 12345)
        assert "another user" in refused(picture.main, [*argv, tmp_path / "x.svg"], capsys)
    mounts = Path("/proc/self/mountinfo")
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        if os.path.isfile(file := line.split()[4]) and os.access(file, os.W_OK):
            assert "mount" in refused(picture.main, [*argv, file], capsys)
            break


def test_a_plot_that_cannot_be_drawn(tmp_path, capsys, no_load, monkeypatch):
    """A format that matplotlib has not, and matplotlib that is not there."""
    for main, argv in ((bench.main, ["accuracy"]), (probe.main, [])):
        line = refused(main, [*argv, "--plot", tmp_path / "x.doc"], capsys)
        assert "doc" in line or "matplotlib" in line
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "matplotlib.figure", None)
            assert "pip install" in refused(main, [*argv, "--plot", tmp_path / "x.png"], capsys)


@pytest.mark.parametrize("name", [STATE, METRICS, "metastate.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link to nothing"])
def test_what_stands_where_a_result_would(name, kind, tmp_path, capsys, no_load, monkeypatch):
    """A folder or a pipe under the name of a file that the end of a training writes, or a link that
    would make what it names."""
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    if kind == "folder":
        Path(name).mkdir()
    elif kind == "pipe":
        os.mkfifo(name)
    elif kind == "link to nothing":
        Path(name).symlink_to(tmp_path.parent / "nothing")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    assert name in refused(train.main, ["--out", tmp_path], capsys)
    with pytest.raises(InputError, match=name):
        toy_run(tmp_path)


def test_a_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    """It is said before the first step, not at the first checkpoint."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 100}))
    with pytest.raises(InputError, match="MB"):
        toy_run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_parser_alone_tries_nothing(tmp_path, monkeypatch):
    """Only a command that runs does: whoever looks at a command line finds no folder made."""
    monkeypatch.chdir(tmp_path)
    args = train.parser().parse_args(["--data", "none.jsonl", "--ckpt", "llada-8b"])
    assert args.out == "out/metastate" and args.out.owner is None
    assert bench.bench_parser("", {}).parse_args(["accuracy", "--plot", "/proc/x.doc"]).plot
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_tried_at_once(tmp_path, capsys, no_load):
    """--data, --memory and --prompts: not there, a folder, a pipe that nobody writes to, what has
    no end; memories that are none, and lines of data."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "junk").write_text("{")
    memory = ROOT / "checkpoints" / "tiny" / "metastate.safetensors"
    for main, argv in ((train.main, ["--out", tmp_path / "out", "--data"]),
                       (memdlm.main, ["train", "--out", tmp_path / "out", "--data"]),
                       (bench.main, ["accuracy", "--memory"]), (probe.main, ["--memory"]),
                       (sample.main, ["--memory"]), (bench.main, ["accuracy", "--reset"]),
                       (picture.main, ["--memory"])):
        assert argv[-1] in refused(main, [*argv, tmp_path / "junk"], capsys)
    for path in (tmp_path / "none", tmp_path, "/dev/zero", ""):
        for main in (sample.main, probe.main):
            assert "--prompts" in refused(main, ["--prompts", path], capsys)
    assert "--compare" in refused(sample.main, ["--compare"], capsys)
    assert "--compare" in refused(sample.main, [
        "--compare", "--memory", memory, "--prompts", tmp_path / "junk"], capsys)
    assert "33" in refused(sample.main, ["--gen-length", 33, "--block-length", 32], capsys)
    for options in (["--lengths", 16], ["--gen", 40], ["--lengths", 4096]):
        refused(bench.main, ["speed", *options], capsys)
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe", ""):
        for main, argv in ((train.main, ["--out", tmp_path / "out", "--data"]),
                           (memdlm.main, ["train", "--out", tmp_path / "out", "--data"]),
                           (bench.main, ["accuracy", "--memory"]), (probe.main, ["--memory"])):
            assert argv[-1] in refused(main, [*argv, path], capsys)
    assert not (tmp_path / "out").exists()


def test_the_mixture_needs_a_package(tmp_path, capsys, no_load, monkeypatch):
    """Where it would be trained on and is not there, this is said before 16 GB are downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    for main, argv in ((train.main, []), (memdlm.main, ["train"])):
        line = refused(main, [*argv, "--ckpt", "llada-8b", "--out", tmp_path / "out"], capsys)
        assert "pip install datasets" in line


# ------------------------------------------------------------------ what is written over
def test_shipped_files_are_no_default():
    """No command writes into checkpoints/ or docs/ unless it is told to."""
    assert train.parser().parse_args([]).out.startswith("out/")
    for module, argv in ((memdlm, ["train"]), (picture, ["--memory", str(ROOT / "README.md")])):
        assert module.parser().parse_args(argv).out.startswith("out/")
    with pytest.raises(InputError, match="--out"):
        pretrain.parser().parse_args(["tiny"])


def test_a_copied_checkpoint_holds_its_own_files_only(tmp_path):
    """`write_folder` copies what belongs to a checkpoint: no other file, no link to one."""
    source, secret = tmp_path / "source", tmp_path / "secret.json"
    source.mkdir()
    secret.write_text('{"secret": 1}')
    (source / "config.json").write_text("{}")
    (source / "notes.txt").symlink_to(secret)
    (source / "diary.json").write_text("{}")
    os.mkfifo(source / "pipe.json")
    assert [f.name for f in memdlm.texts_of(source)] == ["config.json"]
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(InputError, match="tokenizer.json leads to"):
        memdlm.texts_of(source)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("config.json")
    assert len(memdlm.texts_of(source)) == 2


def test_the_hubs_cache_is_links(tmp_path):
    """Its snapshots point to blobs of the same repository, which are followed."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert [f.name for f in memdlm.texts_of(snapshot)] == ["config.json"]
