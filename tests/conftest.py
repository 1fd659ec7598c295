"""What the tests share: the repository root on the path, the oracles, and small checkpoints to
load, to break and to rig."""
from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Backbone, load  # noqa: E402  (the path comes first)

torch.set_num_threads(1)  # the models are small: two threads on busy cores wait for each other
DATA = ROOT / "tests" / "data"
FAMILIES = ("llada", "dream")
MASK_ID, EOS_ID = 500, 501  # of both oracle checkpoints
ABSENT = "<absent>"         # as a config value: leave the key out


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Runs a test once for each family."""
    return request.param


@pytest.fixture(scope="session")
def backbones() -> dict[str, Backbone]:
    """The oracle checkpoints, loaded once in float32 on the CPU; not to be edited."""
    return {name: load(DATA / name, "cpu")[0] for name in FAMILIES}


@pytest.fixture
def backbone(backbones, family) -> Backbone:
    """The family's oracle checkpoint; not to be edited."""
    return backbones[family]


@pytest.fixture
def oracle(family) -> dict[str, torch.Tensor]:
    """What the published modelling code gives."""
    return load_file(DATA / family / "oracle.safetensors")


@pytest.fixture(scope="session")
def text_ckpt(tmp_path_factory) -> Path:
    """A LLaDA checkpoint of random weights that can read and write text; not to be edited."""
    folder = checkpoint(tmp_path_factory.mktemp("text") / "ckpt")
    byte_tokenizer({"<|mask|>": MASK_ID, "<|eos|>": EOS_ID}).save(str(folder / "tokenizer.json"))
    return folder


def checkpoint(folder: Path, family: str = "llada",
               edit: Callable[[dict[str, torch.Tensor]], object] | None = None,
               **config) -> Path:
    """A copy of a family's oracle checkpoint with config keys changed and `edit` applied to its
    dict of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads((DATA / family / "config.json").read_text()) | config
    raw = {key: value for key, value in raw.items() if value != ABSENT}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(DATA / family / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shard(folder: Path, pieces: int = 3) -> Path:
    """Split a checkpoint's model.safetensors into shards dealt round robin; returns the index."""
    single = folder / "model.safetensors"
    tensors, weight_map = load_file(single), {}
    for i in range(pieces):
        name = f"model-{i + 1:05d}-of-{pieces:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::pieces]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    single.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def byte_tokenizer(special: dict[str, int], size: int = 500) -> tokenizers.Tokenizer:
    """One token per byte (ids 0 to 255), words "w256", "w257", ... up to `size`, and special tokens
    with the ids given."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"w{i}": i for i in range(256, size)} | special
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    assert all(core.token_to_id(token) == i for token, i in special.items())
    return core


@contextlib.contextmanager
def boosted(backbone: Backbone, token: int, by: float) -> Iterator[None]:
    """A backbone whose head gives one token a larger logit everywhere."""
    def add(module, inputs, logits):
        return logits + by * (torch.arange(logits.shape[-1]) == token)

    handle = backbone.head.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
