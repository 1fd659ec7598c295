"""From the name of a checkpoint to its folder: nicknames, folders and downloads, and what the
folder states about generating with it."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from lib.cli import InputError, require
from lib.files import read_json, stored_tensors

OURS = Path(__file__).resolve().parents[1] / "checkpoints"
CHECKPOINTS = {  # nickname -> a folder of ours or a hub id
    "tiny": OURS / "tiny",
    "haystack": OURS / "haystack",
    "llada-8b": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-8b-base": "GSAI-ML/LLaDA-8B-Base",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
    "dream-7b-base": "Dream-org/Dream-v0-Base-7B",
}
WANTED = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
          "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
          "added_tokens.json", "special_tokens_map.json"]  # no code, no pickles


def find(ckpt: str | Path) -> Path:
    """The local folder of a checkpoint: a nickname, a folder, or a hub id, which is downloaded
    (weights, config and tokenizer only) when the hub's cache does not hold it whole."""
    target = CHECKPOINTS.get(str(ckpt), ckpt)
    folder = os.path.expanduser(target)
    if os.path.isdir(folder):
        require(os.path.isfile(os.path.join(folder, "config.json")), f"no config.json in {folder}: "
                "pass a folder with config.json, *.safetensors and the tokenizer's files")
        return Path(folder)
    require(str(ckpt) not in CHECKPOINTS or isinstance(target, str), f"{target} is not there: "
            f"python -m studies.pretrain {ckpt} --out {target} makes it")
    require(bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(target))),
            f"unknown checkpoint {str(ckpt)!r}: pass one of {', '.join(CHECKPOINTS)}, random:NAME, "
            "a folder with config.json and *.safetensors, or a hub id owner/name")
    from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(str(target), allow_patterns=WANTED, local_files_only=True)
        if os.path.isfile(os.path.join(folder, "config.json")) and stored_tensors(Path(folder)):
            return Path(folder)
    except Exception:  # not whole in the cache: the hub's own errors differ by version
        pass
    try:
        return Path(snapshot_download(str(target), allow_patterns=WANTED))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot download {target} ({reason}), and there is no such folder; "
                         "a folder with config.json and *.safetensors works too") from error


class Stated(NamedTuple):
    """What a checkpoint's generation_config.json states, for the defaults of the commands."""

    length: int           # of an answer, in tokens (max_new_tokens; 128 where it is silent)
    tasks: list[str]      # that the model was trained on (ours; published checkpoints have none)


def stated(ckpt: str | Path) -> Stated:
    """What the checkpoint's generation_config.json states. Raises `InputError`."""
    file = find(ckpt) / "generation_config.json"
    raw = read_json(file) if file.is_file() else {}
    length, tasks = raw.get("max_new_tokens"), raw.get("tasks", [])
    require(isinstance(tasks, list) and all(isinstance(name, str) for name in tasks),
            f"{file}: tasks is {tasks!r}, not a list of names")
    return Stated(length if type(length) is int and length > 0 else 128, tasks)
