"""What a user asks of a model of ours: which of its tasks a text is meant for, and whether the
answer is right."""
from __future__ import annotations

from pathlib import Path
from typing import Iterable, NamedTuple, Sequence

from lib.accuracies import wilson
from lib.cli import InputError
from lib.hub import CHECKPOINTS, stated


class Asked(NamedTuple):
    """A prompt, and the task that judges what is answered, if any does."""

    prompt: str
    task: object = None
    hint: str = ""        # what the user should know

    @property
    def lead(self) -> str:
        """What the answer is written behind: the prompt, where the task goes on with it."""
        return self.prompt if getattr(self.task, "continues", False) else ""

    def faults(self, text: str) -> list[str]:
        """What is wrong with an answer, in words, where the task says so."""
        return getattr(self.task, "faults", lambda prompt, text: [])(self.prompt, text)

    def verdict(self, text: str) -> tuple[bool, str, set[str]]:
        """Whether an answer is right, in words, and what kinds of things are wrong."""
        if self.task.check(self.prompt, text):
            return True, "right", set()
        faults = self.faults(text)
        words = "wrong" + (": " if faults else "") + "; ".join(faults)
        return False, words, {fault.partition(":")[0] for fault in faults}


def usual_model(prompt: str | None, task: str | None, memory: str | None) -> str:
    """The model of ours that is meant where none is named: whose folder the memory lies in, which
    knows the task or the puzzle that a prompt begins with; else the one that goes on with any
    prompt, or without one tiny."""
    first = "" if prompt is None else (prompt.split() or [""])[0].lower().rstrip(":")
    ours = [name for name, folder in CHECKPOINTS.items() if isinstance(folder, Path)]
    for name in ours:
        if memory is not None and Path(memory).resolve().parent == CHECKPOINTS[name]:
            return name
    return next((name for name in ours if {task, first} & {*stated(name).tasks}),
                "tiny" if prompt is None else "stories")


def understood(text: str, ckpt: str, tasks: dict, names: Iterable[str]) -> Asked:
    """A text as a checkpoint trained on the tasks of these names understands it. Raises
    `InputError` for one that begins like a task's prompt and is none."""
    for name in names:
        try:
            prompt = getattr(tasks.get(name), "read", lambda text: None)(text)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        if prompt is not None:
            hint = getattr(tasks[name], "hint", lambda prompt: "")(prompt)
            return Asked(prompt, tasks[name], hint and f"{ckpt}: {hint}")
    known = ", ".join(name for name in names if name in tasks)
    return Asked(text, hint=known and f"{ckpt} was trained on {known} and knows nothing else; "
                 "docs/data.md shows what its prompts look like")


def unknown_to(prompts: Sequence, tasks: dict, names: Sequence[str]) -> str:
    """What the user should know where some of a file's prompts are none of a model's tasks, ""
    where none of the tasks can tell."""
    def is_known(prompt: str) -> bool:
        try:
            return understood(prompt, "", tasks, names).task is not None
        except InputError:
            return False

    unknown = sum(not is_known(p.prompt) for p in prompts if isinstance(p.prompt, str))
    return f"{unknown} of {len(prompts)} prompts are none of {', '.join(names)}, and the model " \
        "knows nothing else" if unknown and any(
            hasattr(tasks.get(name), "read") for name in names) else ""


def share(right: int, number: int, wrong: dict[str, int] | None = None) -> str:
    """How many of so many are right, in words; wrong: in how many each kind of thing is wrong."""
    low, high = (100 * x for x in wilson(right / number, number))
    kinds = sorted(wrong or {}, key=lambda kind: (-wrong[kind], kind))
    return f"{right} of {number} right: {100 * right / number:.0f}% ({low:.0f} to {high:.0f})" + \
        ("; wrong: " + ", ".join(f"{kind} {wrong[kind]}" for kind in kinds) if kinds else "")
