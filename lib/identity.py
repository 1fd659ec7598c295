"""What a training goes on with, known by its content: the bits of weights, the bytes of files, the
syntax of code. Names, paths and comments may change."""
from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Iterable

import torch

from lib.cli import InputError

ROW = 1024  # 64-bit words: a tensor is summed up along rows and columns of this length


def bits(name: str, tensors: Iterable[torch.Tensor]) -> str:
    """A hash of a name and of every bit of tensors, at the speed at which they are read: sums of
    their 64-bit words, which any changed word changes, and two that changed places, too."""
    digest = hashlib.sha256(name.encode())
    for x in tensors:
        flat = x.detach().reshape(-1)
        flat = (flat if flat.stride(0) == 1 else flat.clone(
            memory_format=torch.contiguous_format)).view(torch.uint8)
        whole = len(flat) // (8 * ROW) * 8 * ROW
        words = flat[:whole].view(torch.int64).view(-1, ROW)                     # (n, ROW)
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        for part in (words.sum(0), words.sum(1), flat[whole:]):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()[:16]


def of_file(path: str | Path) -> str:
    """A hash of a file's bytes. Raises `InputError`."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def of_text(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def of_code(*things) -> str:
    """A hash of the syntax of functions, and for a class of its whole module, without docstrings
    and comments."""
    return of_text(repr([_syntax(ast.parse(_source(thing))) for thing in things]))


def of_modules(module) -> str:
    """A hash of the syntax of the classes that a torch module and its parts are made of, and of
    those that they inherit from, but torch's own; without docstrings and comments."""
    found = {kind for part in module.modules() for kind in type(part).__mro__}
    ours = [kind for kind in found if kind.__module__.split(".")[0] not in ("torch", "builtins")]
    ours.sort(key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
    return of_text(repr([_syntax(ast.parse(_source(kind, whole=False))) for kind in ours]))


def _source(thing, whole: bool = True) -> str:
    """The source of a function, or of a class and, if whole, all of its module."""
    if isinstance(thing, functools.partial):
        return _source(thing.func)
    try:
        return textwrap.dedent(inspect.getsource(
            sys.modules[thing.__module__] if whole and isinstance(thing, type) else thing))
    except (OSError, TypeError, KeyError):  # typed in by hand, or built in: its name has to do
        return repr(getattr(thing, "__qualname__", type(thing).__qualname__))


def _syntax(node):
    """A syntax tree as nested tuples, the same in all versions of Python: fields that are empty,
    which newer ones add, are left out, and so are texts that stand as statements."""
    if isinstance(node, list):
        return tuple(_syntax(x) for x in node if not (
            isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
            and isinstance(x.value.value, str)))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, _syntax(value)) for name, value in ast.iter_fields(node)
              if value is not None and name != "type_ignores")
    return type(node).__name__, tuple((name, value) for name, value in fields if value != ())
