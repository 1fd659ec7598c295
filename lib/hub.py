"""From the name of a checkpoint to its folder: nicknames, folders and downloads, and what the
folder states about generating with it."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from lib.cli import InputError, require
from lib.files import read_json
from lib.progress import slow
from lib.tensors import stored_tensors

OURS = Path(__file__).resolve().parents[1] / "checkpoints"
CHECKPOINTS = {  # nickname -> a folder of ours or a hub id
    "tiny": OURS / "tiny",
    "haystack": OURS / "haystack",
    "halves": OURS / "halves",
    "soft": OURS / "soft",
    "soft-tiny": OURS / "soft-tiny",
    "sudoku6-hard": OURS / "sudoku6-hard",  # knows both grades: the one that is meant comes first
    "sudoku6": OURS / "sudoku6",
    "countdown": OURS / "countdown",
    "stories": OURS / "stories",
    "llada-8b": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-8b-base": "GSAI-ML/LLaDA-8B-Base",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
    "dream-7b-base": "Dream-org/Dream-v0-Base-7B",
    # relatives of the same format: their config.json has Dream-v0's shapes
    "dream-coder-7b": "Dream-org/Dream-Coder-v0-Instruct-7B",
    "dream-coder-7b-base": "Dream-org/Dream-Coder-v0-Base-7B",
    "diffucoder-7b": "apple/DiffuCoder-7B-Instruct",
    "diffucoder-7b-base": "apple/DiffuCoder-7B-Base",
    "diffucoder-7b-cpgrpo": "apple/DiffuCoder-7B-cpGRPO",
}
MADE = {"soft": "soft", "soft-tiny": "soft --ckpt tiny"}  # the others by studies.pretrain NAME
WANTED = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
          "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
          "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
          "chat_template.json"]  # no code, no pickles


def folder_of(ckpt: str | Path) -> Path | None:
    """The folder that a nickname or a path names, None where there is none: a hub id, or nothing.
    os.path takes names that no system has (too long, of a user who is not there); Path does not."""
    folder = os.path.expanduser(CHECKPOINTS.get(str(ckpt), ckpt))
    return Path(folder) if os.path.isdir(folder) else None


def find(ckpt: str | Path) -> Path:
    """The local folder of a checkpoint: a nickname, a folder, or a hub id, which is downloaded
    (weights, config and tokenizer only) when the hub's cache does not hold it whole. Behind a hub
    id @ and a branch, tag or commit may stand."""
    target, folder = CHECKPOINTS.get(str(ckpt), ckpt), folder_of(ckpt)
    if folder is not None:
        require(os.path.isfile(os.path.join(folder, "config.json")), f"no config.json in {folder}: "
                "pass a folder with config.json, *.safetensors and the tokenizer's files")
        return folder
    require(not str(ckpt).startswith("random:"), f"{ckpt} has neither files nor a tokenizer: pass "
            f"{str(ckpt).removeprefix('random:')!r} itself, or another checkpoint")
    require(str(ckpt) not in CHECKPOINTS or isinstance(target, str), f"{target} is not there: "
            f"python -m studies.{MADE.get(str(ckpt), f'pretrain {ckpt}')} --out {target} makes it")
    require(bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", str(target))),
            f"unknown checkpoint {str(ckpt)!r}: pass one of {', '.join(CHECKPOINTS)}, random:NAME, "
            "a folder with config.json and *.safetensors, or a hub id owner/name or "
            "owner/name@revision")
    from huggingface_hub import snapshot_download
    name, _, revision = str(target).partition("@")
    wanted = dict(allow_patterns=WANTED, **({"revision": revision} if revision else {}))
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **wanted))
        if _whole(cached):
            return cached
    except Exception:  # not whole in the cache: the hub's own errors differ by version
        pass
    try:
        with slow(f"downloading {target} from the hub"):
            return Path(snapshot_download(name, **wanted))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot download {target} ({reason}), and there is no such folder; "
                         "a folder with config.json and *.safetensors works too") from error


def _whole(folder: Path) -> bool:
    """Whether the hub's cache holds what a checkpoint needs, a tokenizer included: a download may
    have ended anywhere, and leave links to what is not there. Raises `InputError` for weights that
    are not whole."""
    there = {file.name for file in folder.iterdir() if file.is_file()}
    parts = {"vocab.json", "merges.txt"} <= there and {"tokenizer_config.json",
                                                       "added_tokens.json"} & there
    return "config.json" in there and bool("tokenizer.json" in there or parts) and \
        all(file.exists() for file in folder.iterdir()) and bool(stored_tensors(folder))


def texts_of(folder: Path) -> list[Path]:
    """The files of a checkpoint but its weights, to be copied. Raises `InputError` for a link that
    leads elsewhere: a copy would carry off whatever it points to."""
    root = folder.resolve()
    home = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache has links
    found = [folder / name for name in WANTED if not name.endswith(".safetensors")
             and not name.endswith(".index.json") and os.path.lexists(folder / name)]
    for file in found:
        real = file.resolve()
        require(real.is_relative_to(home) and real.is_file(),
                f"{file} leads to {real}, which is no file of that checkpoint: put a copy there")
    return found


def is_dream(ckpt: str) -> bool:
    """Whether a checkpoint's config.json says that it is one of Dream's. Raises `InputError`."""
    return str(read_json(find(ckpt) / "config.json").get("model_type")).lower() == "dream"


class Stated(NamedTuple):
    """What a checkpoint's generation_config.json states, for the defaults of the commands."""

    length: int           # of an answer, in tokens (max_new_tokens; 128 where it is silent)
    tasks: list[str]      # that the model was trained on (ours; published checkpoints have none)


def stated(ckpt: str | Path) -> Stated:
    """What the checkpoint's generation_config.json states; null is as if it were silent. Raises
    `InputError` for what is no length and no list of names."""
    file = find(ckpt) / "generation_config.json"
    raw = {k: v for k, v in (read_json(file) if file.is_file() else {}).items() if v is not None}
    length, tasks = raw.get("max_new_tokens", 128), raw.get("tasks", [])
    require(type(length) is int and 0 < length <= 2 ** 16, f"{file}: max_new_tokens is {length!r}, "
            f"not a whole number from 1 to {2 ** 16}")
    require(isinstance(tasks, list) and all(isinstance(name, str) for name in tasks),
            f"{file}: tasks is {tasks!r}, not a list of names")
    return Stated(length, tasks)
