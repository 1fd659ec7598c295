"""What may go to a terminal, and what a pipe gets: no control character of a model, a file or a
path moves a cursor, and every stream takes every text."""
from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from typing import Iterator, TextIO

# controls but tab and newline; what changes the direction of writing; halves of surrogate pairs
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
                     "\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for a line of ours: whatever takes no column of its own, or an unknown number of them,
    as a replacement character; newlines are the caller's business."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def harmless(text: str) -> str:
    """A whole text for a terminal: as it is (tabs, joiners and all), but for what a terminal would
    obey rather than show."""
    return _OBEYED.sub("\ufffd", text.replace("\r\n", "\n"))


def note(message: str) -> None:
    """Say something on stderr, as one line that no terminal would obey, if anybody listens."""
    with contextlib.suppress(OSError):
        print(printable(" ".join(message.split())), file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """Say on stderr what is wrong."""
    note(f"error: {message}")


class Screen:
    """A terminal as stdout, on which only harmless text arrives. `unfiltered` is the terminal
    itself, for what moves the cursor on purpose."""

    def __init__(self, terminal: TextIO):
        self.unfiltered = terminal

    def write(self, text: str) -> int:
        """Write a text, made harmless."""
        self.unfiltered.write(harmless(text))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.unfiltered, name)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """stdout and stderr as every command has them: pipes and files are UTF-8 whatever the locale,
    a terminal gets what its encoding can show and nothing that it would obey, and a stream that is
    closed swallows what it is given."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif stream.isatty():
            reconfigure(stream, errors="replace")
        else:
            reconfigure(stream, encoding="utf-8", errors="backslashreplace")
    if sys.stdout.isatty() and not isinstance(sys.stdout, Screen):
        sys.stdout = Screen(sys.stdout)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def reconfigure(stream: TextIO, **how: str) -> None:
    """Change a text stream's encoding or errors, where it is one that can."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(**how)
