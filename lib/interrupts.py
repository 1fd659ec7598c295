"""Ctrl-C at any moment is one line and exit code 130: while a script imports what it needs, which
takes seconds, and in training, which is stopped with what it has.

Scripts import this before anything large; as a library it leaves Ctrl-C as it is."""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Callable

CODE = 130  # of a process that Ctrl-C ended, as shells count


def _leave(*_) -> None:
    """End the process at once, without the traceback of an import that was cut short."""
    try:
        sys.stdout.flush()
        os.write(2, b"interrupted\n")
    finally:
        os._exit(CODE)


def _is_ours() -> bool:
    """Whether the running script is one of this project's."""
    root = Path(__file__).resolve().parents[1]
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is not None:
        return Path(script).resolve().parent in (root, root / "studies")
    return any(flag == "-m" and name.startswith("studies.")  # python -m: there is no __file__ yet
               for flag, name in zip(sys.orig_argv, sys.orig_argv[1:]))


def _replace(old: Callable, new: Callable) -> bool:
    """Put a handler of Ctrl-C in the place of another, if that one is there and can be replaced:
    only the main thread may, and what others set (nohup, say) stays."""
    try:
        if signal.getsignal(signal.SIGINT) is not old:
            return False
        signal.signal(signal.SIGINT, new)
    except ValueError:
        return False
    return True


if _is_ours():
    _replace(signal.default_int_handler, _leave)


class CaughtByMain:
    """While a command runs, Ctrl-C raises KeyboardInterrupt in it, as ever; before and after, where
    nobody would catch that, it ends the process."""

    def __enter__(self):
        self.script = _replace(_leave, signal.default_int_handler)

    def __exit__(self, *_):
        if self.script:
            _replace(signal.default_int_handler, _leave)


class Stop:
    """While a training runs, Ctrl-C calls `end(True)` at the first moment at which its weights are
    those of a whole step; a second one `end(False)` at once. Both raise KeyboardInterrupt."""

    def __init__(self, end: Callable[[bool], None]):
        self.end, self.whole, self.asked, self.handler = end, True, False, None

    def __enter__(self) -> Stop:
        handler = self._handle  # kept, for every look at a method makes another object
        self.handler = handler if _replace(signal.default_int_handler, handler) else None
        return self

    def __exit__(self, *_):
        if self.handler:
            _replace(self.handler, signal.default_int_handler)
        self.handler = None

    def _handle(self, *_) -> None:
        if self.asked or self.whole:
            again, self.asked = self.asked, True
            self.end(not again)
        self.asked = True

    def at(self, whole: bool) -> None:
        """Say whether the weights are whole from now on."""
        self.whole = whole
        if whole and self.asked:
            self.end(True)
