"""The tensors of a checkpoint folder, which are only ever read from safetensors, and modules filled
with what a file holds once it is known to fit."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from lib.checks import check_memory, check_room, is_finite
from lib.cli import InputError, require
from lib.files import read_json, save_tensors
from lib.progress import slow
from lib.published import TIED, computed


class Stored(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, a view of the file's memory mapping, which is this tensor's own: its pages
        are let go with it."""
        return _open(self.path).get_tensor(self.name)


# ------------------------------------------------------------------ which tensors there are
def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name, from model.safetensors, or where there is none
    from the shards of the index; without those that are computed anew. Raises `InputError` for a
    file that is missing, broken or not what the index says."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # whatever index was left beside it
        where = dict.fromkeys(_open(single).keys(), single)
    else:
        require(index.is_file(), f"no weights in {folder}: neither {single.name} nor {index.name}")
        where = {name: folder / file for name, file in indexed(index).items()}
    found = {}
    for path in sorted(set(where.values())):
        require(path.is_file(), f"shard {path} is missing: download the checkpoint again")
        file = _open(path)
        inside = {name for name in file.keys() if not computed(name)}
        promised = {name for name, p in where.items() if p == path and not computed(name)}
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


# ------------------------------------------------------------------ parameters made of them
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
    shapes, that are stacked to make it. All of the folder's are used, none is missing and all are
    finite, or an `InputError` says which is not. dtype: None is as the first tensor is stored.

    A parameter that is one stored tensor stays a view of the file's mapping (CPU, dtype as
    stored), a stacked one is copied: peak memory is the weights plus one stacked parameter. The
    check reads every weight once, where it will be used, at the speed of memory: what the first
    forward would have read from the disk is read now."""
    found = stored_tensors(folder)
    shapes = {name: shape for parts in wanted.values() for name, shape in parts.items()}
    _pass_over_tied(found, shapes)
    if missing := shapes.keys() - found.keys():
        raise InputError(f"{folder} lacks {_list(missing)}: does config.json belong to it?")
    if unexpected := found.keys() - shapes.keys():
        raise InputError(f"{folder} has unexpected tensors: {_list(unexpected)}")
    for name, shape in shapes.items():
        require(found[name].shape == shape, f"{found[name].path}: {name} has shape "
                f"{found[name].shape}, and config.json asks for {shape}")
    parameters: dict[str, torch.Tensor] = {}
    with slow(f"reading {folder}", lambda: f", {len(parameters)} of {len(wanted)} parameters"):
        for ours, parts in wanted.items():
            tensors = [found[name].read() for name in parts]
            dtype = dtype or tensors[0].dtype
            tensors = [tensor.to(device, dtype) for tensor in tensors]
            for name, tensor in zip(parts, tensors):
                require(is_finite(tensor), f"{found[name].path}: {name} holds NaN or infinity, in "
                        f"{dtype}: download it again, or pass another --dtype")
            parameters[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return parameters


def _pass_over_tied(found: dict[str, Stored], wanted: dict) -> None:
    """Leave out a head that a tied checkpoint stores all the same. Raises `InputError` where it is
    not the embedding."""
    for head, embedding in TIED.items():
        if head in found and head not in wanted and embedding in found.keys() & wanted.keys():
            one, other = found[head], found[embedding]
            require(one.shape == other.shape and torch.equal(one.read(), other.read()),
                    f"{one.path}: {head} differs from {embedding}, and config.json says that they "
                    "are one")
            del found[head]


def allocated(module: nn.Module, device: torch.device) -> nn.Module:
    """A module without storage, given storage on a device, whatever that holds. Raises `InputError`
    for more than the device has."""
    check_room(sum(p.nbytes for p in module.parameters()), device)
    return module.to_empty(device=device)


def rebuilt(make: Callable[..., nn.Module], sizes: dict, tensors: dict[str, torch.Tensor],
            **further) -> nn.Module:
    """make(**sizes, **further) filled with tensors, both from a file. Raises `InputError` for sizes
    that the tensors do not come to, before anything is allocated, and for other dtypes; what else
    does not fit is torch's error."""
    check_memory(sizes, sum(x.numel() for x in tensors.values()))
    module = make(**sizes, **further)
    for name, like in module.state_dict().items():
        found = tensors.get(name, like).dtype
        require(found == like.dtype, f"{name} is {found}, not {like.dtype}")
    module.load_state_dict(tensors)
    return module


# ------------------------------------------------------------------ which weights they are
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
