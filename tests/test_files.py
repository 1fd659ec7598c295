"""Files that are whole or not there: full disks, kills, and checkpoint folders in which something
is missing, broken or not what the index says."""
from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA, METRICS, STATE, assert_refused, checkpoint, shard, toy_run
from processes import child
from safetensors.torch import load_file, save_file

from lib.cli import InputError
from lib.files import read_tensors, read_text, save_tensors, write_atomic, write_text
from model import save

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# ------------------------------------------------------------------ weights
LN_F, HEAD = "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"
V_PROJ = "model.transformer.blocks.1.v_proj.weight"


def truncated(path: Path, keep: float) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop(HEAD), ["lacks", HEAD]),
    (lambda t: t.pop(V_PROJ), ["lacks", V_PROJ]),
    (lambda t: t.clear(), ["lacks"]),
    (lambda t: t.update({"model.transformer.extra": torch.zeros(2)}), ["unexpected", ".extra"]),
    (lambda t: t.update({V_PROJ.replace(".1.", ".3."): torch.ones(64, 64)}), ["unexpected", ".3."]),
    (lambda t: t.update({V_PROJ.replace("weight", "bias"): torch.zeros(64)}), ["unexpected"]),
    (lambda t: t.update({LN_F: torch.ones(65)}), [LN_F, "(65,)", "(64,)"]),
    (lambda t: t.update({LN_F: torch.ones(())}), [LN_F, "()", "(64,)"]),
    (lambda t: t.update({V_PROJ: torch.ones(32, 64)}), [V_PROJ, "(32, 64)", "(64, 64)"]),
    (lambda t: t.update({V_PROJ: torch.ones(64 * 64)}), [V_PROJ, "(4096,)", "(64, 64)"]),
    (lambda t: t.update({HEAD: t[HEAD].T.contiguous()}), [HEAD, "(64, 512)", "(512, 64)"]),
    (lambda t: t.update({LN_F: torch.ones(64, dtype=torch.int64)}), [LN_F, "I64"]),
    (lambda t: t.update({V_PROJ: t[V_PROJ].to(torch.float8_e4m3fn)}), [V_PROJ, "F8_E4M3"]),
], ids=["no head", "no v_proj", "nothing", "extra", "extra layer", "extra bias", "long", "scalar",
        "short v", "flat v", "transposed", "integers", "float8"])
def test_tensors_that_do_not_fit(cli_fails, ckpt, edit, words):
    """A missing, unexpected, misshapen or unreadable tensor is named, with its shape and the shape
    that config.json asks for."""
    tensors = load_file(ckpt / WEIGHTS)
    edit(tensors)
    save_file(tensors, ckpt / WEIGHTS)
    assert_refused(cli_fails, ckpt, str(ckpt), *words)


def test_a_checkpoint_of_the_other_family(cli_fails, tmp_path):
    """Dream's tensors under LLaDA's config: a few names are enough, not all of them."""
    checkpoint(tmp_path / "mixed", "llada")
    shutil.copy(DATA / "dream" / WEIGHTS, tmp_path / "mixed")
    line = cli_fails("--ckpt", tmp_path / "mixed", "--prompt", "hi", "--device", "cpu")
    assert "lacks" in line and "more" in line and len(line) < 500


@pytest.mark.parametrize("keep", [0, 1e-5, 0.001, 0.5, 0.999])
def test_truncated_weights(cli_fails, ckpt, keep):
    """A download that broke off, in the header or in the data."""
    truncated(ckpt / WEIGHTS, keep)
    assert_refused(cli_fails, ckpt, str(ckpt / WEIGHTS), "download it again")


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"x": {"dtype": "F32"}}', b"\x80\x04pickle",
                                    b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'])
def test_weights_with_a_broken_header(cli_fails, ckpt, header):
    """Whatever else lies in a file of that name: it is never unpickled, and never a traceback."""
    (ckpt / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_refused(cli_fails, ckpt, str(ckpt / WEIGHTS))


def test_no_weights_at_all(cli_fails, ckpt):
    """Only safetensors count: a pickle beside config.json is not read."""
    (ckpt / WEIGHTS).rename(ckpt / "pytorch_model.bin")
    assert_refused(cli_fails, ckpt, str(ckpt), WEIGHTS, INDEX)


def test_missing_shard(cli_fails, ckpt):
    """A shard that the index names and the folder lacks."""
    index = shard(ckpt)
    gone = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    (ckpt / gone).unlink()
    assert_refused(cli_fails, ckpt, str(ckpt / gone), "missing")


def test_truncated_shard(cli_fails, ckpt):
    """The shard that is cut short is the one that is named."""
    shard(ckpt)
    path = sorted(ckpt.glob("*-of-*"))[-1]
    truncated(path, 0.9)
    assert_refused(cli_fails, ckpt, str(path), "download it again")


@pytest.mark.parametrize("target", ["../stolen.safetensors", "/etc/passwd", "sub/x.safetensors",
                                    "..", ".", "", "model.bin", 3, None, ["a.safetensors"],
                                    "a\0.safetensors"], ids=repr)
def test_index_that_points_outside_its_folder(cli_fails, ckpt, target):
    """Only safetensors files of the index's own folder are opened, even where another exists."""
    index = shard(ckpt)
    shutil.copy(DATA / "llada" / WEIGHTS, ckpt.parent / "stolen.safetensors")
    (ckpt / "sub").mkdir()
    shutil.copy(DATA / "llada" / WEIGHTS, ckpt / "sub" / "x.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"][LN_F] = target
    index.write_text(json.dumps(content))
    assert_refused(cli_fails, ckpt, str(ckpt))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}',
                                     '{"weight_map": "x"}', '{"weight_map": null}'])
def test_index_without_a_weight_map(cli_fails, ckpt, content):
    """A broken index is named."""
    shard(ckpt).write_text(content)
    assert_refused(cli_fails, ckpt, str(ckpt / INDEX))


def test_index_that_disagrees_with_its_shards(cli_fails, ckpt):
    """A tensor promised in a shard that lacks it, and one that a shard holds unlisted."""
    index = shard(ckpt)
    content = json.loads(index.read_text())
    right = content["weight_map"][LN_F]
    wrong = next(s for s in content["weight_map"].values() if s != right)
    content["weight_map"][LN_F] = wrong
    index.write_text(json.dumps(content))
    assert_refused(cli_fails, ckpt, str(ckpt), LN_F)
    del content["weight_map"][LN_F]
    index.write_text(json.dumps(content))
    assert_refused(cli_fails, ckpt, str(ckpt / right), LN_F)


# ------------------------------------------------------------------ full disks and kills
@pytest.fixture
def saved(backbones, tmp_path) -> Path:
    """A saved file that has to survive."""
    save(backbones["llada"], tmp_path / WEIGHTS)
    return tmp_path / WEIGHTS


def assert_untouched(path: Path) -> None:
    """The previous file is whole, and no temporary one is left to fill the disk further."""
    assert load_file(path).keys() == load_file(DATA / "llada" / WEIGHTS).keys()
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file(backbones, saved, monkeypatch, where, code):
    """Flushing or renaming fails: one line, and the last good checkpoint stays."""
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(InputError, match="cannot write.*" + os.strerror(code)):
        save(backbones["dream"], saved)
    monkeypatch.undo()
    assert_untouched(saved)


def test_a_disk_that_fills_while_writing(backbones, saved):
    """The library's own error, provoked by a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write"):
            save(backbones["dream"], saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(saved)


def test_a_kill_while_writing_leaves_the_previous_file(saved):
    """Until the new file is complete and flushed it has another name."""
    class Killed(BaseException):
        pass

    def write(path):
        Path(path).write_bytes(b"half")
        assert Path(path) != saved and Path(path).parent == saved.parent
        raise Killed

    with pytest.raises(Killed):
        write_atomic(saved, write)
    assert load_file(saved).keys() == load_file(DATA / "llada" / WEIGHTS).keys()


def large_file(path: Path) -> None:
    save_tensors(path, {"x": torch.zeros(25_000_000)}, {"step": 0, "settings": {}})


@pytest.mark.faults
def test_kills_do_not_fill_the_disk(tmp_path):
    """A checkpoint of 100 MB, killed while it is written: what was written of it is gone once the
    next one is there, or every kill would cost the size of a checkpoint."""
    process = child(large_file, tmp_path / STATE)
    while process.is_alive() and not any(f.stat().st_size for f in tmp_path.iterdir()):
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and any(tmp_path.iterdir())
    toy_run(tmp_path, steps=1)
    assert sorted(f.name for f in tmp_path.iterdir()) == [METRICS, STATE]


def test_the_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """The other order can leave an empty file after a power cut."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: calls.append("replace") or replace(*a))
    write_atomic(tmp_path / "new" / "file", lambda p: p.write_text("x"))
    assert calls[:2] == ["fsync", "replace"] and (tmp_path / "new" / "file").read_text() == "x"


def test_a_path_that_cannot_be_a_file(backbones, saved):
    """A folder where the file should be, a file where its folder should be."""
    for path in (saved.parent, saved / "below"):
        with pytest.raises(InputError, match="cannot write"):
            save(backbones["llada"], path)
    assert_untouched(saved)


# ------------------------------------------------------------------ our own files
def test_what_is_written_is_read_again(tmp_path):
    """Tensors of every kind with their metadata, and text beyond ASCII; metadata of several keys
    gives the same bytes whatever the order in which the library keeps them."""
    tensors = {"matrix": torch.randn(3, 5), "view": torch.arange(12).view(3, 4).T,
               "bytes": torch.zeros(0, dtype=torch.uint8)}
    metadata = {"step": 3, "settings": {"lr": 0.1, "name": "\u00e9"}}
    files = set()
    for i in range(8):
        save_tensors(tmp_path / "x", tensors, metadata)
        files.add((tmp_path / "x").read_bytes())
    found, stated = read_tensors(tmp_path / "x")
    assert len(files) == 1 and stated == metadata
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in tensors.items()}
    write_text(tmp_path / "new" / "y", "\u754c\n")
    assert read_text(tmp_path / "new" / "y") == "\u754c\n"


@pytest.mark.parametrize("content", [None, b"", b"{}", bytes(8), b"\x80\x04pickle"], ids=repr)
def test_files_that_are_none_of_ours(tmp_path, content):
    """Absent, empty, of another kind: the file is named, and nothing is unpickled."""
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="x.safetensors"):
        read_tensors(path)
    save_file({"x": torch.zeros(1)}, path)  # a safetensors file without our metadata
    with pytest.raises(InputError, match="x.safetensors"):
        read_tensors(path)
