"""Files that are whole or not there: atomic writes, JSON and text with the name in every error, and
the tensors of a checkpoint folder, which are only ever read from safetensors."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lib.cli import InputError, require


# ------------------------------------------------------------------ writing
def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush it to disk, then rename it onto `path`: a kill or a full
    disk at any moment leaves the previous file whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error}") from error


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
    """(tensors, metadata) of a file that `save_tensors` wrote. Raises `InputError`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["json"])
            return {k: file.get_tensor(k) for k in file.keys()}, metadata
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error or 'not one of our files'}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or an `InputError` that names it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def parse_json(text: str, where: str | Path) -> dict:
    """The JSON object in a text, or an `InputError` that says where."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    require(isinstance(value, dict), f"{where}: not a JSON object")
    return value


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, or an `InputError` that names the file."""
    return parse_json(read_text(path), path)


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """("path:number", text) for every line of a file that is not blank."""
    lines = read_text(path).split("\n")  # not splitlines: JSON may hold U+2028 and its like
    return [(f"{path}:{n}", line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]


# ------------------------------------------------------------------ checkpoint folders
class Stored(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, a view of the file's memory mapping, which is this tensor's own: its pages
        are let go with it."""
        return _open(self.path).get_tensor(self.name)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name, from model.safetensors or the sharded index.
    Raises `InputError` for a file that is missing, broken or not what the index says."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = {name: folder / file for name, file in indexed(index).items()}
    else:
        single = folder / "model.safetensors"
        require(single.is_file(), f"no weights in {folder}: neither model.safetensors nor "
                "model.safetensors.index.json")
        where = dict.fromkeys(_open(single).keys(), single)
    found = {}
    for path in sorted(set(where.values())):
        require(path.is_file(), f"shard {path} is missing: download the checkpoint again")
        file = _open(path)
        inside, promised = set(file.keys()), {name for name, p in where.items() if p == path}
        for name in sorted(promised - inside):
            raise InputError(f"{path} does not hold {name}, which the index promises")
        for name in sorted(inside - promised):
            raise InputError(f"{path} holds {name}, which the index does not list")
        for name in inside:
            part = file.get_slice(name)
            require(part.get_dtype() in ("BF16", "F16", "F32"),
                    f"{path}: {name} is {part.get_dtype()}, not BF16, F16 or F32")
            found[name] = Stored(path, name, tuple(part.get_shape()))
    return found


def indexed(index: Path) -> dict[str, str]:
    """Tensor name -> file name of a model.safetensors.index.json. Raises `InputError`."""
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict) and bool(weight_map), f"{index} has no weight_map")
    for name, shard in weight_map.items():
        require(isinstance(shard, str) and os.path.basename(shard) == shard
                and shard.endswith(".safetensors"), f"{index}: {name} is said to be in {shard!r}, "
                "which is not a safetensors file of the same folder")
    return weight_map


def save_stacked(path: str | Path, parameters: dict[str, torch.Tensor],
                 wanted: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Write parameters as the tensors of which `read_stacked` makes them."""
    tensors = {}
    for ours, parts in wanted.items():
        tensors.update(zip(parts, parameters[ours].split([shape[0] for shape in parts.values()])))
    save_tensors(path, tensors, {"format": "pt"})  # transformers refuses a file without it


def read_stacked(folder: Path, wanted: dict[str, dict[str, tuple[int, ...]]], device: torch.device,
                 dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Parameters made from a checkpoint folder's tensors: name -> the stored tensors, with their
    shapes, that are stacked to make it. All of the folder's are used and none is missing, or an
    `InputError` says which. dtype: None is as the first tensor is stored.

    A parameter that is one stored tensor stays a view of the file's mapping (CPU, dtype as
    stored), a stacked one is copied: peak memory is the weights plus one stacked parameter."""
    found = stored_tensors(folder)
    shapes = {name: shape for parts in wanted.values() for name, shape in parts.items()}
    if missing := shapes.keys() - found.keys():
        raise InputError(f"{folder} lacks {_list(missing)}: does config.json belong to it?")
    if unexpected := found.keys() - shapes.keys():
        raise InputError(f"{folder} has unexpected tensors: {_list(unexpected)}")
    for name, shape in shapes.items():
        require(found[name].shape == shape, f"{found[name].path}: {name} has shape "
                f"{found[name].shape}, and config.json asks for {shape}")
    parameters = {}
    for ours, parts in wanted.items():
        tensors = [found[name].read() for name in parts]
        dtype = dtype or tensors[0].dtype
        tensors = [tensor.to(device, dtype) for tensor in tensors]
        parameters[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return parameters


def fingerprint(text: str, tensors: Iterable[torch.Tensor]) -> str:
    """A short hash of a text and of 64 numbers spread over each tensor, the same in float32 and
    bfloat16 and on any device."""
    digest = hashlib.sha256(text.encode())
    for x in tensors:
        spread = torch.linspace(0, x.numel() - 1, 64, dtype=torch.float64).long()
        digest.update(x.detach().view(-1)[spread.to(x.device)].bfloat16().float().cpu().numpy())
    return digest.hexdigest()[:16]


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): "
                         "download it again") from error


def _list(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
