"""Files that are whole or not there: atomic writes, and JSON and text with the name in every
error."""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from pathlib import Path
from typing import Callable

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lib.checks import is_finite
from lib.cli import InputError, require


# ------------------------------------------------------------------ writing
def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush it to disk, then rename it onto `path`: a kill or a full
    disk at any moment leaves the previous file whole."""
    path, temporary = Path(path), None
    require("\0" not in str(path), f"cannot write {str(path)!r}: no file has such a name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = new_file(path.parent)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:  # also when Ctrl-C ends it; after the rename there is none of that name
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def new_file(folder: Path) -> Path:
    """An empty file in a folder, for what gets its own name once it is whole. Its name cannot be
    foretold, so nobody can have put a link there; as tempfile's, but with the user's umask."""
    path = folder / f".new-{secrets.token_hex(8)}.tmp"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write in a folder that nobody else writes in."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.new-[0-9a-f]{16}\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a safetensors file atomically. Equal content gives equal bytes: `metadata` is kept
    under one key, because the library shuffles several."""
    if len(metadata) > 1:
        metadata = {"json": json.dumps(metadata)}
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    write_atomic(path, lambda p: p.write_bytes(safetensors.torch.save(tensors, metadata)))


# ------------------------------------------------------------------ reading
def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, metadata) of a file that `save_tensors` wrote. Raises `InputError`, also where one
    of them is not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["json"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error or 'not one of our files'}") from error
    for name, x in tensors.items():
        require(is_finite(x), f"{path}: {name} holds NaN or infinity")
    return tensors, metadata


def check_tensors(path: str | Path) -> None:
    """Raise an `InputError` for what is no safetensors file; its tensors are not read."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or an `InputError` that names it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def parse_json(text: str, where: str | Path) -> dict:
    """The JSON object in a text, or an `InputError` that says where. Numbers that are not finite
    are no JSON."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    require(isinstance(value, dict), f"{where}: not a JSON object")
    return value


def to_json(value: object) -> str:
    """A value as one line of JSON that is UTF-8: text as it is, unpaired surrogates escaped. Raises
    `InputError` for a number that is not finite, which JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"a result is not finite, and JSON has no such number ({error})"
                         ) from error
    except RecursionError as error:
        raise InputError("nested too deeply for JSON") from error
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, or an `InputError` that names the file."""
    return parse_json(read_text(path), path)


def read_lines(path: str | Path, errors: str = "strict") -> list[tuple[str, str]]:
    """("path:number", text) for every line of a UTF-8 file that is not blank. A byte order mark in
    front of a line is left out: files that are put together have them inside. Raises `InputError`
    for a file that cannot be read, with the number of a line that is not UTF-8."""
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    lines = []
    for n, line in enumerate(raw.split(b"\n"), 1):  # no splitlines: JSON may hold U+2028
        try:
            text = line.decode(errors=errors).removeprefix("\ufeff").rstrip("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{n}: not UTF-8 ({error})") from error
        if text.strip():
            lines.append((f"{path}:{n}", text))
    return lines


def _finite(text: str) -> float:
    """A number of a JSON text. Raises `ValueError` for NaN, Infinity and what is beyond floats."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value
