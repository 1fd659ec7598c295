"""Tasks in text with answers that can be checked.

A task is an object with `make(rng) -> (prompt, answer)` and `check(prompt, text) -> bool`. To add
one, write a class and give it a line in `TASKS`; a checkpoint's generation_config.json names the
tasks it was trained on.
"""
from __future__ import annotations

import hashlib
import random
from typing import Protocol

from tasks.depth import DEPTH
from tasks.haystack import HAYSTACKS
from tasks.puzzles import Chain, Follow, Sudoku, Sums
from tasks.stories import Stories


class Task(Protocol):
    """What a task has to offer. `split_key` and `read` may be missing, and so may `practice(rng)`,
    a quicker `make` for training, `hint(prompt)`, a line for the user before the answer,
    `faults(prompt, text)`, what is wrong in words, and `continues`, True where an answer goes on in
    the prompt's own text."""

    def make(self, rng: random.Random) -> tuple[str, str]:
        """One example, a prompt and its answer."""

    def check(self, prompt: str, text: str) -> bool:
        """Whether the text is a right answer to the prompt."""

    def split_key(self, prompt: str, answer: str) -> str:
        """What training and held-out data must never share; the prompt for a task without."""

    def read(self, text: str) -> str | None:
        """A user's text as the prompt that `make` would write, None if it is none of this task's.
        Raises `ValueError` with the format for what begins like one. A task without it gets its
        prompts from `make` alone."""


TASKS: dict[str, Task] = {"sudoku": Sudoku(), "chain": Chain(), "follow": Follow(), "sums": Sums(),
                          **DEPTH, **HAYSTACKS, "stories": Stories()}


def find_task(name: str) -> Task:
    """The task of that name; a `ValueError` names those there are."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: one of {', '.join(TASKS)}")
    return TASKS[name]


def is_held_out(task: Task, prompt: str, answer: str) -> bool:
    """One example in eight is held out, by a hash of the task's split key: training and held-out
    data are disjoint whatever seed they are drawn with."""
    key = getattr(task, "split_key", lambda p, a: p)(prompt, answer)
    return hashlib.sha256(key.encode()).digest()[0] < 32


def draw(task: Task | str, rng: random.Random, held_out: bool) -> tuple[str, str]:
    """One (prompt, answer) of the wanted side of the split, of a task or the task of that name."""
    task = find_task(task) if isinstance(task, str) else task
    make = task.make if held_out else getattr(task, "practice", task.make)
    while True:
        prompt, answer = make(rng)
        if is_held_out(task, prompt, answer) == held_out:
            return prompt, answer
