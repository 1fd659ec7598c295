"""A conversation in a terminal: several turns with a chat model."""
from __future__ import annotations

import sys
from typing import Callable

from lib.cli import require
from lib.terminal import note
from lib.tokenizer import Tokenizer


def chat(args, answer: Callable[[list[int]], str], tokenizer: Tokenizer, room: int) -> int:
    """Turns until /quit or the end of what is typed or piped in, a line each: answer(ids) shows and
    returns what is said to the conversation so far; /reset forgets it. Its beginning is left out
    where all would have more than `room` tokens: whole turns, not the system's. Raises `InputError`
    for a model without a chat format, and for a message that has no room alone."""
    require(tokenizer.is_chat, f"{args.ckpt} has no chat format: pass --prompt")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    turns: list[dict] = []
    while (line := read_line()) is not None and line != "/quit":
        if line == "/reset":
            turns = []
        elif line:
            turns.append({"role": "user", "content": line})
            while len(ids := tokenizer.chat(system + turns)) > room:
                require(len(turns) > 1, f"{len(ids)} tokens, and only {room} leave room for the "
                        "answer")
                turns = turns[2:]
                note("the beginning of the conversation no longer fits and is left out")
            turns.append({"role": "assistant", "content": answer(ids)})
    return 0


def read_line() -> str | None:
    """A line without the blanks around it, None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
