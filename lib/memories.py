"""Memories of any class: found by its name, made for a backbone, kept in a file that names it."""
from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn

from lib import identity
from lib.cli import InputError, require
from lib.files import read_tensors, save_tensors
from lib.tensors import rebuilt
from lib.terminal import note

FORMAT = 1  # of memory files; those that do not state it are of this format too
USUAL = "metastate:MetaState"


def dtype_of(backbone) -> torch.dtype:
    """Of a backbone's weights."""
    return next(backbone.parameters()).dtype


def memory_class(name: str) -> type[nn.Module]:
    """The class that "MODULE:CLASS" names; the module may lie in the current folder. Raises
    `InputError` for what is not there, or is no `nn.Module` with a memory's three methods."""
    require(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None,
            f"{name!r} is no MODULE:CLASS")
    module, _, kind = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"there is no memory {name} ({error}): is its folder the current one, or "
                         "in PYTHONPATH?") from error
    require(isinstance(found, type) and issubclass(found, nn.Module) and all(
        callable(getattr(found, method, None)) for method in ("initial", "inject", "update")),
        f"{name} is no torch.nn.Module with initial, inject and update")
    return found


def new_memory(name: str, backbone, seed: int, **options) -> nn.Module:
    """An untrained memory of a class for a backbone: CLASS.for_backbone(backbone, **options), or
    where it has none CLASS(backbone.config). The seed decides its weights. Raises `InputError`."""
    require(dtype_of(backbone) != torch.float16, "float16 is too narrow for gradients: train with "
            "--dtype bfloat16 or float32")
    kind, generator = memory_class(name), torch.Generator().manual_seed(seed)
    whole = hasattr(kind, "for_backbone")
    given = [name for name, value in options.items() if value not in (None, True)]
    require(whole or not given, f"{name} is made by its backbone's config alone: it takes no "
            + ", ".join(given))
    with torch.random.fork_rng(devices=[]):  # what torch's own layers draw from at first
        torch.manual_seed(seed)
        try:
            made = kind.for_backbone(backbone, generator=generator, **options) if whole else \
                kind(backbone.config)
        except TypeError as error:
            raise InputError(f"{name} cannot be made of a backbone's config ({error})") from error
    require(any(p.requires_grad for p in made.parameters()), f"{name} has nothing to train")
    return made


def save_memory(path: str | Path, memory: nn.Module, fingerprint: str) -> None:
    """Write weights, sizes, the class by name and syntax, and the fingerprint of the backbone that
    it is for, as one safetensors file."""
    kind, module = type(memory), sys.modules[type(memory).__module__]
    name = module.__name__
    if name == "__main__":  # of a script, which others find by its own name
        name = module.__spec__.name if module.__spec__ else Path(module.__file__).stem
    save_tensors(path, memory.state_dict(), {
        "format": FORMAT, "class": f"{name}:{kind.__qualname__}",
        "code": identity.of_modules(memory), "sizes": getattr(memory, "sizes", {}),
        "backbone": fingerprint})


def rounded(memory: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The memory with the weights of its linear layers in a backbone's 16 bits, in which `denoise`
    multiplies: rounded once and not at every step, to the same numbers. Not for training."""
    for module in memory.modules():
        if isinstance(module, nn.Linear) and dtype.itemsize == 2:
            module.to(dtype)
    return memory


def load_memory(path: str | Path, backbone, frozen: bool = True) -> nn.Module:
    """A memory on the backbone's device, of the class that its file names: frozen and in eval mode,
    a MetaState `rounded`, or to be trained. Raises `InputError` when the file is missing or broken,
    of another format, or belongs to another backbone; a note says when its class has been changed
    since."""
    try:
        tensors, stated = read_tensors(path)
        require(stated.get("format", FORMAT) == FORMAT, f"format {stated.get('format')!r}")
        name, sizes = stated.get("class", USUAL), stated["sizes"]
        kind = memory_class(name)
        memory = rebuilt(kind, sizes, tensors, fingerprint=stated["backbone"]) if hasattr(
            kind, "for_backbone") else rebuilt(lambda: kind(backbone.config), {}, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a MetaState memory ({error})") from error
    same = stated["backbone"] == backbone.fingerprint()
    if not same and dtype_of(backbone) == torch.float16:  # which rounds what the hash is made of
        note(f"whether {path} was trained for this backbone is not to be seen in float16")
    else:
        require(same, f"{path} was trained for another backbone: pass the --ckpt it is for")
    if stated.get("code") not in (None, identity.of_modules(memory)):
        note(f"{path} was made by other code of {name} than there is now, and may not do what it "
             "did")
    if frozen and name == USUAL:
        memory = rounded(memory, dtype_of(backbone))
    return memory.to(backbone.embedding.weight.device).train(not frozen).requires_grad_(not frozen)
