"""Files of conversations to learn from, in the forms in which they are found."""
from __future__ import annotations

import glob
import os
from pathlib import Path

from lib.cli import require
from lib.files import parse_json, read_lines
from lib.outputs import input_file, tried
from lib.progress import progress


class DataFile(str):
    """A --data of the command line: its .files and what stands in them, (place, messages)."""

    files: list[str] = []
    records: list[tuple[str, list]] | None = None


def data_file(text: str) -> DataFile:
    """The type of files of examples on the command line, comma-separated, also as patterns such as
    chats/*.jsonl: they are read before any model is."""
    found = DataFile(text)
    found.files = [text] if os.path.isfile(text) else [
        name for part in map(str.strip, text.split(","))
        for name in sorted(glob.glob(part)) or [part]]
    for name in found.files:
        input_file(name)
    found.records = tried(lambda _: [r for name in found.files for r in read_records(name)], text)
    return found


def read_records(path: str | Path) -> list[tuple[str, list]]:
    """(file and line, messages) of a JSONL file, as of `messages_of`. Raises `InputError` for a
    line that holds no example."""
    records = []
    for where, line in progress(read_lines(path), f"lines of {path}", bar=False):
        messages = messages_of(parse_json(line, where), where)
        last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
        require(isinstance(last, dict) and last.get("role") == "assistant"
                and isinstance(last.get("content"), str),
                f"{where}: no response: a line needs `messages` that end with the assistant's, or "
                "`prompt` and `response`, or ShareGPT's or Alpaca's fields")
        require(last["content"] != "", f"{where}: the response is empty")
        require(all(isinstance(m, dict) and isinstance(m.get("role"), str)
                    and isinstance(m.get("content"), str) for m in messages),
                f"{where}: a message needs a role and a content, both text")
        records.append((where, messages))
    return records


FORMS = ("messages", "prompt", "conversations", "instruction")  # a line has one of them
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "system": "system"}


def messages_of(fields: dict, where: str) -> list | None:
    """The conversation in a line: `messages`; `prompt` and `response`; ShareGPT's `conversations`,
    up to the last of the assistant's; Alpaca's `instruction`, `input` and `output`. Raises
    `InputError` for a line of two forms."""
    forms = [name for name in FORMS if fields.get(name) is not None]
    require(len(forms) < 2, f"{where}: `{'` and `'.join(forms[::-1])}`: only one can be learned")
    if "messages" in forms:
        return fields["messages"]
    if "conversations" in forms and isinstance(fields["conversations"], list):
        turns = [turn if isinstance(turn, dict) else {} for turn in fields["conversations"]]
        messages = [{"role": SPEAKERS.get(str(turn.get("from"))), "content": turn.get("value")}
                    for turn in turns]
        while messages and messages[-1]["role"] == "user":
            messages.pop()
        return messages
    question, answer = fields.get("prompt"), fields.get("response")
    if "instruction" in forms:
        parts = [fields["instruction"], fields.get("input") or None]
        question, answer = "\n\n".join(str(part) for part in parts if part), fields.get("output")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
