"""What a user asks of a model of ours: which of its tasks a text is meant for, and whether the
answer is right."""
from __future__ import annotations

from typing import Iterable, NamedTuple

from lib.accuracies import wilson
from lib.cli import InputError


class Asked(NamedTuple):
    """A prompt, and the task that judges what is answered, if any does."""

    prompt: str
    task: object = None
    hint: str = ""        # what the user should know

    @property
    def lead(self) -> str:
        """What the answer is written behind: the prompt, where the task goes on with it."""
        return self.prompt if getattr(self.task, "continues", False) else ""

    def verdict(self, text: str) -> tuple[bool, str]:
        """Whether an answer is right, and in words."""
        if self.task.check(self.prompt, text):
            return True, "right"
        faults = getattr(self.task, "faults", lambda prompt, text: [])(self.prompt, text)
        return False, "wrong" + (": " if faults else "") + "; ".join(faults)


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


def share(right: int, number: int) -> str:
    """How many of so many are right, in words."""
    low, high = (100 * x for x in wilson(right / number, number))
    return f"{right} of {number} right: {100 * right / number:.0f}% ({low:.0f} to {high:.0f})"
