"""Prompts from command lines and files: what a line may be, and why another cannot be answered."""
from __future__ import annotations

import contextlib
import json
import re
from typing import Iterator, NamedTuple

from lib.cli import InputError, require
from lib.files import parse_json, read_lines, to_json
from lib.progress import progress
from lib.tokenizer import Tokenizer


MASKS = re.compile(r"<mask(?::([1-9]\d{0,3}))?>")  # <mask> is one position to fill, <mask:3> three


class Prompt(NamedTuple):
    """A line of a file of prompts, or why it cannot be answered."""

    fields: dict      # of its JSON object, and "prompt", a text or messages
    ids: list[int]
    error: str = ""   # with file and line, "" where there is none

    @property
    def prompt(self) -> str | list[dict]:
        """The text or the messages."""
        return self.fields["prompt"] if self.fields.get("messages") is None else \
            self.fields["messages"]

    def answered(self, ours: dict) -> dict:
        """The line's fields, then ours. What the line has under names of ours comes back in
        "given"."""
        taken = {*ours, "error", "given"} & self.fields.keys()
        given = {name: value for name, value in self.fields.items() if name in taken}
        rest = {name: value for name, value in self.fields.items() if name not in taken}
        return rest | ({"given": given} if given else {}) | ours

    def refused(self) -> dict:
        """What is written in place of an answer."""
        return {"id": self.fields.get("id"), "error": self.error}


def read_prompts(path: str, tokenizer: Tokenizer, raw: bool, room: int,
                 mask_id: int | None = None, fill: bool = False,
                 fill_only: bool = False) -> list[Prompt]:
    """The prompts of a file, one a line: a text, or a JSON object with `prompt` or `messages`. One
    that is neither, or of more than `room` tokens, or that holds the mask token, has an error; with
    `fill` its masks are to be filled, and with `fill_only` one without has an error. Raises
    `InputError` for a file that cannot be read or holds none."""
    found = []
    lines = read_lines(path, "surrogateescape")
    for where, line in progress(lines, f"prompts of {path}", bar=False):
        try:
            with at(where):
                fields = fields_of(line)
                prompt = Prompt(fields, []).prompt
                ids = fillable_ids(prompt, tokenizer, raw, mask_id) if fill else \
                    prompt_ids(prompt, tokenizer, raw, mask_id)
                require(not fill_only or mask_id in ids, "no mask to fill, and --gen-length is 0")
                require(len(ids) <= room, f"{len(ids)} tokens, and only {room} leave room for the "
                        "answer")
            found.append(Prompt({"prompt": prompt, **fields}, ids))
        except InputError as error:
            found.append(Prompt({"id": id_of(line)}, [], str(error)))
    require(bool(found), f"{path} holds no prompt")
    return found


def prompt_ids(prompt: str | list[dict], tokenizer: Tokenizer, raw: bool,
               mask_id: int | None) -> list[int]:
    """Ids of a text or of messages. Raises `InputError` for what is empty or holds the mask
    token."""
    ids = tokenizer.prompt(prompt, raw)
    require(bool(ids), "the prompt is empty")
    no_mask(ids, tokenizer, mask_id, "the prompt")
    return ids


def fillable_ids(prompt: str | list[dict], tokenizer: Tokenizer, raw: bool,
                 mask_id: int) -> list[int]:
    """Ids of a text or of messages in which <mask> and <mask:3> are that many of the model's mask
    tokens. A blank in front belongs to the first of them where words are tokens that begin with
    one. Raises `InputError` for what is empty."""
    token = tokenizer.core.id_to_token(mask_id)
    pattern = (" ?" if len(tokenizer.encode(" a")) == 1 else "") + MASKS.pattern

    def masked(text):
        return re.sub(pattern, lambda found: token * int(found[1] or 1), text) \
            if token is not None and isinstance(text, str) else text

    if isinstance(prompt, str):
        return prompt_ids(masked(prompt), tokenizer, raw, None)
    return prompt_ids([{**message, "content": masked(message.get("content"))} if
                       isinstance(message, dict) else message for message in prompt],
                      tokenizer, raw, None)


def masks_in(text: str) -> int:
    """How many positions a text asks to be filled."""
    return sum(int(found[1] or 1) for found in MASKS.finditer(text))


def no_mask(ids: list[int], tokenizer: Tokenizer, mask_id: int | None, what: str) -> None:
    """Raise an `InputError` where the mask token is among the ids of a text."""
    if mask_id in ids:
        raise InputError(f"{what} holds the mask token {tokenizer.core.id_to_token(mask_id)!r}, "
                         "which stands for a position that is still to be written")


def fields_of(line: str) -> dict:
    """The fields that a line of prompts gives. Raises `InputError` for what is neither a text nor
    an object with a prompt."""
    require(not re.search("[\ud800-\udfff]", line), "not UTF-8")
    if not line.lstrip().startswith("{"):
        try:
            json.loads(line)
        except ValueError:
            return {"prompt": line}
        except RecursionError:
            pass
        raise InputError('JSON, but no object: write {"prompt": ...}, a text in quotes')
    fields = parse_json(line, "this line")
    to_json([[fields]])  # nothing that could not be written again
    messages, prompt = fields.get("messages"), fields.get("prompt")
    require(messages is None or prompt is None, "`prompt` and `messages`: only one can be answered")
    require(isinstance(prompt, str) or isinstance(messages, list) and bool(messages),
            "neither a `prompt`, a text, nor `messages`, a list of them")
    return fields


def id_of(line: str) -> object:
    """The `id` of a line that is refused, None where it has none that can be written."""
    try:
        found = json.loads(line)["id"]
        to_json([[found]])  # one level more than it will be written with
        return found
    except (ValueError, RecursionError, LookupError, TypeError):
        return None


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Put the place in front of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
