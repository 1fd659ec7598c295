"""What every command line here shares: errors of one line, checks, and the options that say which
checkpoint runs where."""
from __future__ import annotations

import argparse
import errno
import functools
import math
import os
import re
import shutil
import sys
from contextvars import ContextVar
from typing import Callable, Iterable

import torch

from lib.interrupts import CODE, CaughtByMain
from lib.terminal import complain, note, streams

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class InputError(ValueError):
    """Something the user can put right. Commands print it as one line and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise an `InputError` with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


# ------------------------------------------------------------------ parsing
# Whether a command runs: then files and folders on its line are tried; a parser alone only parses.
running: ContextVar[bool] = ContextVar("running", default=False)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others, and whose help begins with the script's
    docstring as it is written."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        # of what was parsed, as a whole; a parent's too
        self.checks: list[Callable] = [c for p in kwargs.get("parents", ()) for c in p.checks]

    def parse_known_args(self, *args, **kwargs):
        """argparse's, and the checks."""
        found = super().parse_known_args(*args, **kwargs)
        for check in self.checks if running.get() else ():
            check(found[0])
        return found

    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def seed(text: str) -> int:
    """A seed on the command line: a whole number that every generator takes."""
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**63 - 1")
    return int(text)


def whole(least: int, most: int = 10 ** 6) -> Callable:
    """The type of a whole number on the command line from `least` to `most`."""
    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is no whole number from {least} to {most}")
        return int(text)

    return parse


count = whole(1)           # of what is only counted
size = whole(1, 10 ** 4)   # of what is allocated, or comes with a forward each


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
                f"{text[:40]!r} is no number {'above' if open_low else 'from'} {low:g}"
                + (f" to {high:g}" if high < math.inf else " up"))
        return value

    return parse


def written(text: str) -> str:
    """The type of a prompt on the command line: a text in which something stands."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the prompt is empty")
    return spelled(text)


def spelled(text: str) -> str:
    """The type of a text on the command line, blanks or line breaks alone included. What a locale
    that is not UTF-8 made of its bytes is undone."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty")
    try:
        return os.fsencode(text).decode() if re.search("[\ud800-\udfff]", text) else text
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no Unicode text in UTF-8") from error


def named(text: str) -> str:
    """The type of a name or path on the command line: anything but nothing."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text


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
    CPU. Raises `InputError` for one that is not to be had, or that computes nothing ("meta")."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        require(str(name).split(":")[0] in ("cpu", "cuda", "mps", "xpu"),
                f"device {str(name)[:40]!r} is none of cpu, cuda, mps, xpu")
        return torch.empty(0, device=name).device
    except InputError:
        raise
    except Exception as error:  # of many kinds: what is not built in, not plugged in, no device
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} is not to be had ({reason})") from error


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no wider floating point (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_of(name: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """A torch dtype or its name; where nothing is said bfloat16 on CUDA, or float16 where a card
    has none (before 2020), elsewhere None."""
    dtype = DTYPES.get(name, name)
    require(dtype is None or dtype in DTYPES.values(),
            f"unknown dtype {str(dtype)!r}: pass one of {', '.join(DTYPES)}")
    if dtype is not None or device.type != "cuda":
        return dtype
    short = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if short else torch.float16


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
    and exit code 2 instead of a traceback; Ctrl-C becomes exit code 130. The streams are those of
    `lib.terminal.streams`."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        before = running.set(True)
        try:
            with CaughtByMain(), streams():
                return _ended(main, argv)
        finally:
            running.reset(before)

    return wrapped


def _ended(main: Callable, argv: list[str] | None) -> int:
    """The exit code of a `main(argv)`, an error said in one line."""
    try:
        code = main(argv) or 0
        sys.stdout.flush()  # what the disk or the reader does not take is known here
        return code
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt as error:  # a training says what it keeps
        note(str(error) or "interrupted")
        return CODE
    except BrokenPipeError:  # `| head` went away: nothing more to say
        _drop_output()
        return 141
    except (MemoryError, RuntimeError) as error:  # torch has one of its own, but not on a CPU
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "can't allocate memory" in str(error)):
            raise
        message = "out of memory: " + (str(error).splitlines() or ["there is no more"])[0]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        message = f"the disk is full ({error.filename or error.strerror}); free some space"
    complain(message)
    return 2


def _drop_output() -> None:
    """Let go of what stdout holds and cannot write, so that Python's own flush at exit has nothing
    to complain about."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
