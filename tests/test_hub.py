"""From the name of a checkpoint to its folder: nicknames, folders and downloads, for which the hub
is asked for no more than it has to be; and what a folder states about generating."""
from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import DATA, assert_refused, shard

from lib.cli import InputError
from lib.hub import CHECKPOINTS, find, stated
from model import Config, load

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# ------------------------------------------------------------------ which checkpoint
@pytest.mark.parametrize("name", ["llada-9b", "", "not a/hub id", "a/b/c", ".hidden/x", "x" * 300,
                                  "~nobody_of_this_name/x", "nul\0byte", "/no/such/folder"],
                         ids=lambda name: repr(name[:24]))
def test_unknown_checkpoint(cli_fails, name, monkeypatch, tmp_path):
    """A name that is no nickname, folder or hub id: the known ones are listed, and how to pass a
    folder."""
    monkeypatch.chdir(tmp_path)
    words = ["config.json"] if name == "" else ["llada-8b", "dream-7b", "tiny", "config.json"]
    assert_refused(cli_fails, name, *words)


def test_folder_without_config(cli_fails, ckpt):
    """The folder is named, and what it would have to hold."""
    (ckpt / "config.json").unlink()
    assert_refused(cli_fails, ckpt, str(ckpt), "no config.json", "*.safetensors")


# ------------------------------------------------------------------ the hub
class FakeHub:
    """Stands in for huggingface_hub.snapshot_download: knows what the cache holds and what the
    network would give, and notes every call."""

    def __init__(self, cached: Path | None, remote: Path | Exception):
        self.cached, self.remote = cached, remote
        self.calls: list[dict] = []

    def __call__(self, repo_id: str, **options) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        found = self.cached if options.get("local_files_only") else self.remote
        if found is None:
            raise FileNotFoundError("not in the cache")
        if isinstance(found, Exception):
            raise found
        return str(found)

    @property
    def downloads(self) -> list[dict]:
        return [call for call in self.calls if not call.get("local_files_only")]


@pytest.fixture
def hub(monkeypatch):
    """hub(cached, remote) -> the fake that `find` will ask."""
    def install(cached: Path | None, remote: Path | Exception) -> FakeHub:
        fake = FakeHub(cached, remote)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake
    return install


def test_a_cached_checkpoint_needs_no_network(hub, ckpt):
    """Whole in the cache, sharded or not: nothing is asked of the hub."""
    for _ in range(2):
        fake = hub(ckpt, AssertionError("asked the network"))
        assert find("owner/name") == ckpt and fake.downloads == []
        assert load("owner/name", "cpu")[1] is not None
        shard(ckpt) if (ckpt / WEIGHTS).exists() else None


def damage_config(folder: Path) -> None:
    """No config.json."""
    (folder / "config.json").unlink()


def damage_weights(folder: Path) -> None:
    """No weights."""
    (folder / WEIGHTS).unlink()


def damage_shard(folder: Path) -> None:
    """All shards but one."""
    shard(folder)
    sorted(folder.glob("*-of-*"))[0].unlink()


def damage_data(folder: Path) -> None:
    """A file that is cut short."""
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def damage_tokenizer(folder: Path) -> None:
    """No tokenizer at all."""
    (folder / "tokenizer.json").unlink()


def damage_part(folder: Path) -> None:
    """One of the tokenizer's parts."""
    damage_tokenizer(folder)
    for name in ("vocab.json", "tokenizer_config.json"):
        shutil.copy(DATA / "dream-tokenizer" / name, folder)


def damage_link(folder: Path) -> None:
    """A link whose blob is gone."""
    (folder / "generation_config.json").symlink_to(folder / "gone")


@pytest.mark.parametrize("damage", [None, damage_config, damage_weights, damage_shard, damage_data,
                                    damage_tokenizer, damage_part, damage_link])
def test_what_the_cache_lacks_is_downloaded(hub, ckpt, text_ckpt, damage):
    """Not there, or a download that broke off: the hub is asked once more, for files that can be
    read without running code."""
    if damage:
        damage(ckpt)
    fake = hub(ckpt if damage else None, text_ckpt)
    assert find("owner/name") == text_ckpt
    assert [call["repo_id"] for call in fake.downloads] == ["owner/name"]


NEEDED = ["config.json", "generation_config.json", "model.safetensors", INDEX, "tokenizer.json",
          "model-00001-of-00006.safetensors", "tokenizer_config.json", "vocab.json", "merges.txt"]
UNWANTED = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "modeling_llada.py", "x.pt",
            "configuration_dream.py", "weights.pth", "training_args.bin", "state.pkl", "a.ckpt",
            "README.md", ".gitattributes", "tf_model.h5", "model.gguf", "onnx/model.onnx",
            "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("cached", [False, True])
def test_only_weights_config_and_tokenizer_are_asked_for(hub, ckpt, text_ckpt, cached):
    """No pickle, no remote code, nothing else: the patterns match what is needed and no more, also
    when only the cache is looked at."""
    fake = hub(ckpt if cached else None, text_ckpt)
    find("owner/name")
    assert fake.calls and bool(fake.downloads) is not cached
    for call in fake.calls:
        def asked(name):
            return any(fnmatch.fnmatch(name, pattern) for pattern in call["allow_patterns"])

        assert all(asked(name) for name in NEEDED)
        assert not any(asked(name) for name in UNWANTED)


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("two\nlines"),
                                   RuntimeError(""), ConnectionError("401 Client Error")], ids=repr)
def test_a_failed_download_is_one_line(hub, cli_fails, error):
    """Whatever the hub's client raises: what could not be downloaded, why, and the way out."""
    hub(None, error)
    assert_refused(cli_fails, "owner/name", "owner/name", "folder",
                   str(error).split("\n")[0] or "RuntimeError")


@pytest.mark.parametrize("nickname, repository", [
    ("llada-8b", "GSAI-ML/LLaDA-8B-Instruct"), ("llada-8b-base", "GSAI-ML/LLaDA-8B-Base"),
    ("llada-1.5", "GSAI-ML/LLaDA-1.5"), ("dream-7b", "Dream-org/Dream-v0-Instruct-7B"),
    ("dream-7b-base", "Dream-org/Dream-v0-Base-7B"),
    ("dream-coder-7b", "Dream-org/Dream-Coder-v0-Instruct-7B"),
    ("dream-coder-7b-base", "Dream-org/Dream-Coder-v0-Base-7B"),
    ("diffucoder-7b", "apple/DiffuCoder-7B-Instruct"),
    ("diffucoder-7b-base", "apple/DiffuCoder-7B-Base"),
    ("diffucoder-7b-cpgrpo", "apple/DiffuCoder-7B-cpGRPO")])
def test_nicknames_are_the_published_repositories(hub, text_ckpt, nickname, repository):
    """A nickname asks the hub for the repository that its name says."""
    fake = hub(None, text_ckpt)
    assert find(nickname) == text_ckpt
    assert fake.downloads[0]["repo_id"] == repository
    assert nickname in CHECKPOINTS


def test_a_revision_is_asked_for(hub, text_ckpt):
    """Behind a hub id @ and a branch, tag or commit: of the cache and of the network; without one
    neither is told any."""
    fake = hub(None, text_ckpt)
    assert find("owner/name@refs/pr/3") == text_ckpt
    assert {(call["repo_id"], call["revision"]) for call in fake.calls} == {
        ("owner/name", "refs/pr/3")}
    find("owner/name")
    assert all("revision" not in call for call in fake.calls[2:])


@pytest.mark.parametrize("stated", [dict(bos_token_id=151665, max_position_embeddings=32768),
                                    dict(bos_token_id=151643, max_position_embeddings=131072)])
def test_relatives_have_dreams_shapes(tmp_path, stated):
    """What Dream-Coder's and DiffuCoder's config.json state otherwise than Dream's loads."""
    config = json.loads((DATA / "dream" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | stated))
    assert Config.from_json(tmp_path).max_len == stated["max_position_embeddings"]


def test_a_model_of_ours_that_is_not_made_yet(cli_fails, monkeypatch, tmp_path):
    """A nickname whose folder is absent says which command makes it; another path does not."""
    monkeypatch.setitem(CHECKPOINTS, "haystack", tmp_path / "absent")
    line = cli_fails("--ckpt", "haystack", "--prompt", "a", "--device", "cpu")
    assert "absent is not there" in line and "python -m studies.pretrain haystack" in line
    monkeypatch.setitem(CHECKPOINTS, "soft-tiny", tmp_path / "absent")
    with pytest.raises(InputError, match="python -m studies.soft --ckpt tiny --out .*absent makes"):
        load("soft-tiny", "cpu")
    with pytest.raises(InputError, match="unknown checkpoint"):
        load(tmp_path / "absent", "cpu")


def test_a_folder_is_never_looked_up(hub, ckpt, monkeypatch):
    """A folder whose path looks like a hub id is a folder."""
    fake = hub(None, AssertionError("asked the network"))
    monkeypatch.chdir(ckpt.parent.parent)
    relative = f"{ckpt.parent.name}/{ckpt.name}"
    assert load(relative, "cpu")[0].config == load(ckpt, "cpu")[0].config
    assert fake.calls == []


# ------------------------------------------------------------------ what a folder states
@pytest.mark.parametrize("content, expected", [
    (None, (128, [])), ({}, (128, [])), ({"max_new_tokens": None}, (128, [])),
    ({"max_new_tokens": 12}, (12, [])), ({"tasks": None}, (128, [])),
    ({"max_new_tokens": 24, "tasks": ["sums", "chain"]}, (24, ["sums", "chain"]))], ids=str)
def test_what_a_checkpoint_states(ckpt, content, expected):
    """The length of an answer, 128 where the file is silent or absent, and the tasks in order."""
    if content is not None:
        (ckpt / "generation_config.json").write_text(json.dumps(content))
    assert stated(ckpt) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"tasks": "sums"}', '{"tasks": [3]}'])
def test_a_broken_generation_config(cli_fails, ckpt, content):
    """The file that states the default length is named when it cannot be used."""
    (ckpt / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match="generation_config.json"):
        stated(ckpt)
    line = cli_fails("--ckpt", ckpt, "--prompt", "hi", "--device", "cpu")
    assert "generation_config.json" in line


def test_the_shipped_checkpoints_state_their_tasks():
    """What `make demo` goes by."""
    assert stated("tiny") == (24, ["sudoku", "chain", "follow", "sums"])
    assert stated("haystack").length == 24 and "needle4-64" in stated("haystack").tasks
