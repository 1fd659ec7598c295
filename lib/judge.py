"""A researcher's own examples, a JSON object a line: what to answer, what is right, and who says
so."""
from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from lib.cli import InputError, require
from lib.files import parse_json, read_lines
from lib.outputs import input_file, tried
from lib.prompts import at, fields_of


def _numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


JUDGES = {  # name -> right(answer, text)
    "exact": lambda answer, text: text.strip() == answer.strip(),
    "contains": lambda answer, text: answer in text,
    "number": lambda answer, text: _numbers(text)[-1:] == _numbers(answer)[-1:],  # the last one
    "regex": lambda answer, text: re.search(answer, text) is not None,
}


class Example(NamedTuple):
    """A line of a file of examples."""
    id: object               # as the line has it, else its number
    messages: list[dict]     # what to answer
    answer: str              # what is right, or for "regex" what finds it
    judge: str | None        # of `JUDGES`, None: as the command line says
    until: list[str]         # stop strings

    def right(self, text: str, judge: str) -> bool:
        """Whether a text is right; judge: where the line names none."""
        return JUDGES[self.judge or judge](self.answer, text)


    def check(self, judge: str) -> None:
        """Raise an `InputError` where the answer cannot be judged by."""
        try:
            self.right("", judge)
        except re.error as error:
            raise InputError(f"`answer` {self.answer[:40]!r} is no regular expression: {error}"
                             ) from error


class ExamplesFile(str):
    """The path of a file of examples on the command line, and what stands in it."""

    examples: list[Example] | None = None


def examples_file(text: str) -> ExamplesFile:
    """The type of a file of examples on the command line: it is read before any model is."""
    found = ExamplesFile(input_file(text))
    found.examples = tried(read_examples, text)
    return found


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a JSONL file with `prompt` or `messages`, `answer`, and as it likes `judge`,
    `until` and `id`. Raises `InputError` for a line that is none, with its number."""
    found = []
    for where, line in read_lines(path):
        with at(where):
            parse_json(line, "this line")
            fields = fields_of(line)
            messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
            answer, until = fields.get("answer"), fields.get("until") or []
            require(all(isinstance(m, dict) and isinstance(m.get("role"), str)
                        and isinstance(m.get("content"), str) for m in messages),
                    "a message needs a role and a content, both text")
            require(type(answer) in (str, int, float) and str(answer) != "",
                    "no `answer`, a text or a number")
            require(fields.get("judge") in (None, *JUDGES), f"`judge` is {fields.get('judge')!r}, "
                    f"none of {', '.join(JUDGES)}")
            require(isinstance(until, list) and all(isinstance(u, str) for u in until),
                    "`until` is no list of texts")
            example = Example(fields.get("id", len(found)), messages, str(answer),
                              fields.get("judge"), until)
            example.check("exact")
        found.append(example)
    require(bool(found), f"{path} holds no example")
    return found
