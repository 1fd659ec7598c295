"""What every command line here shares: errors of one line, checks, and the options that say which
checkpoint runs where."""
from __future__ import annotations

import argparse
import errno
import functools
import math
import os
import shutil
import sys
from typing import Callable, Iterable

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class InputError(ValueError):
    """Something the user can put right. Commands print it as one line and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise an `InputError` with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


# ------------------------------------------------------------------ parsing
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others, and whose help begins with the script's
    docstring as it is written."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def seed(text: str) -> int:
    """A seed on the command line: a whole number that every generator takes."""
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**63 - 1")
    return int(text)


def whole(least: int) -> Callable:
    """The type of a whole number on the command line from `least` up."""
    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return int(text)

    return parse


count = whole(1)


def number(low: float, high: float = math.inf, open_low: bool = False) -> Callable:
    """The type of a finite number on the command line from low (or above it) to high."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high \
                or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no number {'above' if open_low else 'from'} {low:g}"
                + (f" to {high:g}" if high < math.inf else " up"))
        return value

    return parse


def listed(kind: Callable, empty: bool = False) -> Callable:
    """The type of a comma-separated list of a kind on the command line."""
    def parse(text: str) -> list:
        return [] if empty and not text else [kind(part) for part in text.split(",")]

    return parse


def one_of(known: Iterable[str], what: str) -> Callable:
    """The type of a name on the command line that has to be known."""
    known = list(known)

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}: one of {', '.join(known)}")
        return text

    return parse


# ------------------------------------------------------------------ devices
def device_of(name: str | torch.device | None) -> torch.device:
    """The device of that name, CUDA's current one where there is one and nothing is said, else the
    CPU. Raises `InputError` for one that is not to be had."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} is not to be had ({reason})") from error


def dtype_of(name: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """A torch dtype or its name; where nothing is said bfloat16 on CUDA, elsewhere None."""
    dtype = DTYPES.get(name, name)
    require(dtype is None or dtype in DTYPES.values(),
            f"unknown dtype {str(dtype)!r}: pass one of {', '.join(DTYPES)}")
    return torch.bfloat16 if dtype is None and device.type == "cuda" else dtype


def compile_on(device: torch.device, wanted: bool | None, *modules) -> None:
    """Call `compile` of a backbone and memories (None is passed over) if wanted; if nothing is
    said, on CUDA. Raises `InputError` on a CPU without the C++ compiler that it takes."""
    if not (device.type == "cuda" if wanted is None else wanted):
        return
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    require(device.type != "cpu" or any(map(shutil.which, compilers)),
            "--compile on a CPU needs a C++ compiler, and there is no g++")
    for module in modules:
        if module is not None:
            module.compile()


# ------------------------------------------------------------------ running
def command(main: Callable) -> Callable:
    """Wrap a script's `main(argv=None)`: an `InputError` or a full disk becomes one line on stderr
    and exit code 2 instead of a traceback; Ctrl-C becomes exit code 130."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except InputError as error:
            message = str(error)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        except BrokenPipeError:  # `| head` went away: nothing more to say, also not at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 141
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"the disk is full ({error.filename or error.strerror}); free some space"
        print("error: " + " ".join(message.split()), file=sys.stderr)
        return 2

    return wrapped
