"""A conversation in a terminal: several turns with a chat model."""
from __future__ import annotations

import re
import sys
from typing import Callable

from lib.cli import InputError, require
from lib.prompts import prompt_ids
from lib.terminal import complain, note
from lib.tokenizer import Tokenizer


def chat(args, answer: Callable[[list[int]], str], tokenizer: Tokenizer, mask_id: int,
         room: int) -> int:
    """Turns until /quit or the end of what is typed or piped in, a line each: answer(ids) shows and
    returns what is said to the conversation so far; /reset forgets it. A line that cannot be
    answered is said to be one, and the conversation goes on without it. Returns the exit code: 1
    where there was such a line. Raises `InputError` for a model without a chat format."""
    require(tokenizer.is_chat, f"{args.ckpt} has no chat format: pass --prompt")
    require(sys.stdin is not None, "--chat reads from stdin, which is closed")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8",
                              errors="surrogateescape")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    turns: list[dict] = []
    code = 0
    while (line := read_line()) is not None and line != "/quit":
        if line == "/reset":
            turns = []
        elif line:
            try:
                require(not re.search("[\ud800-\udfff]", line), "not UTF-8")
                asked, ids = fitting(system, [*turns, {"role": "user", "content": line}], tokenizer,
                                     mask_id, room)
            except InputError as error:
                complain(str(error))
                code = 1
                continue
            if len(asked) <= len(turns):
                note("the beginning of the conversation no longer fits and is left out")
            turns = [*asked, {"role": "assistant", "content": answer(ids)}]
    return code


def fitting(system: list[dict], turns: list[dict], tokenizer: Tokenizer, mask_id: int,
            room: int) -> tuple[list[dict], list[int]]:
    """The turns that fit behind the system's into `room` tokens, and the ids of all: the oldest are
    left out, a question with its answer. Raises `InputError` where not even the last has room, and
    for the mask token."""
    while len(ids := prompt_ids(system + turns, tokenizer, False, mask_id)) > room:
        require(len(turns) > 1, f"{len(ids)} tokens, and only {room} leave room for the answer")
        turns = turns[2:]
    return turns, ids


def read_line() -> str | None:
    """A line without the blanks around it, None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
