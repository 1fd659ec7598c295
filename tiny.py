"""The embedded default: reasoning tasks in text, a tokenizer for them, and the small LLaDA-format
model in checkpoints/tiny that everyone can run.

    python tiny.py pretrain                 # train checkpoints/tiny from nothing; resumes if killed
    python tiny.py show --task chain        # a few held-out prompts with their answers

A task is an object with `make(rng) -> (prompt, answer)` and `check(prompt, text) -> bool`. The
check judges the answer by the rules of the task, never by comparing strings. To add one, write a
class and give it a line in `TASKS`.
"""
from __future__ import annotations

import hashlib
import itertools
import random
from typing import Protocol


# ------------------------------------------------------------------ tasks
class Task(Protocol):
    """What a task has to offer. `make` draws one example from a `random.Random`; `check` says
    whether `text` is a right answer to `prompt`; `split_key` is the part of an example that must
    never be shared between training and held-out data."""

    def make(self, rng: random.Random) -> tuple[str, str]: ...
    def check(self, prompt: str, text: str) -> bool: ...
    def split_key(self, prompt: str, answer: str) -> str: ...


class Sudoku:
    """4x4 sudoku: rows, columns and 2x2 boxes hold 1 to 4 once each. Puzzles have one solution
    and 4 to 7 givens; the split is by solution grid, so held-out grids were never seen."""

    def __init__(self):
        rows = list(itertools.permutations("1234"))
        self.grids = [a + b + c + d for a in rows for b in rows if self._fits(a, b, box=True)
                      for c in rows if self._fits(a, c) and self._fits(b, c)
                      for d in rows if self._fits(a, d) and self._fits(b, d)
                      and self._fits(c, d, box=True)]            # all 288
        # having[i][c]: the grids that have character c in cell i, as the bits of one integer
        self.having = [{c: sum(1 << k for k, g in enumerate(self.grids) if g[i] == c)
                        for c in "1234"} for i in range(16)]

    @staticmethod
    def _fits(upper, lower, box=False) -> bool:
        if any(a == b for a, b in zip(upper, lower)):
            return False
        return not box or (not set(upper[:2]) & set(lower[:2]))

    def make(self, rng):
        grid, givens, target = rng.choice(self.grids), set(range(16)), rng.randint(4, 7)
        for cell in rng.sample(range(16), 16):
            fitting = -1                                         # all bits: every grid
            for i in givens - {cell}:
                fitting &= self.having[i][grid[i]]
            if fitting.bit_count() == 1 and len(givens) > target:
                givens.discard(cell)
        puzzle = "".join(grid[i] if i in givens else "." for i in range(16))
        return "sudoku\n" + self._lines(puzzle) + "\n", self._lines("".join(grid))

    @staticmethod
    def _lines(cells: str) -> str:
        return "\n".join(cells[i:i + 4] for i in range(0, 16, 4))

    def check(self, prompt, text):
        cells = "".join(text.split())
        givens = "".join(prompt.removeprefix("sudoku").split())
        return tuple(cells) in self.grids and all(g in (".", c) for g, c in zip(givens, cells))

    def split_key(self, prompt, answer):
        return answer


class Chain:
    """Eight variables, each the one before plus or minus a digit, modulo 10; the assignments come
    in shuffled order. The answer lists every variable's value in alphabetical order."""

    names = "abcdefgh"

    def make(self, rng):
        order = rng.sample(self.names, len(self.names))
        value = {order[0]: rng.randrange(10)}
        lines = [f"{order[0]}={value[order[0]]}"]
        for before, name in zip(order, order[1:]):
            sign, step = rng.choice("+-"), rng.randrange(1, 10)
            value[name] = (value[before] + (step if sign == "+" else -step)) % 10
            lines.append(f"{name}={before}{sign}{step}")
        rng.shuffle(lines)
        return "chain\n" + "\n".join(lines) + "\n", self._answer(value)

    @staticmethod
    def _answer(value: dict[str, int]) -> str:
        return " ".join(f"{name}{value[name]}" for name in sorted(value))

    def check(self, prompt, text):
        lines = dict(line.split("=") for line in prompt.split()[1:])
        value = {}
        while len(value) < len(lines):
            for name, right in lines.items():
                if right.isdigit():
                    value[name] = int(right)
                elif right[0] in value:
                    value[name] = (value[right[0]] + int(right[1:])) % 10
        return text.split() == self._answer(value).split()

    def split_key(self, prompt, answer):
        return prompt


class Follow:
    """A permutation of twelve letters as pairs "from to", and a letter to start at. The answer is
    the path of twelve letters that begins there."""

    names = "abcdefghijkl"

    def make(self, rng):
        target = dict(zip(self.names, rng.sample(self.names, len(self.names))))
        start = rng.choice(self.names)
        pairs = [a + b for a, b in target.items()]
        rng.shuffle(pairs)
        return f"follow {start}\n" + " ".join(pairs) + "\n", self._path(target, start)

    def _path(self, target: dict[str, str], start: str) -> str:
        path = [start]
        while len(path) < len(self.names):
            path.append(target[path[-1]])
        return " ".join(path)

    def check(self, prompt, text):
        _, start, *pairs = prompt.split()
        return text.split() == self._path({p[0]: p[1] for p in pairs}, start).split()

    def split_key(self, prompt, answer):
        return prompt


class Sums:
    """Twelve digits; the answer is their running total modulo 10."""

    def make(self, rng):
        digits = [rng.randrange(10) for _ in range(12)]
        return "sums\n" + " ".join(map(str, digits)) + "\n", self._totals(digits)

    @staticmethod
    def _totals(digits: list[int]) -> str:
        return " ".join(str(total % 10) for total in itertools.accumulate(digits))

    def check(self, prompt, text):
        return text.split() == self._totals([int(d) for d in prompt.split()[1:]]).split()

    def split_key(self, prompt, answer):
        return prompt


TASKS: dict[str, Task] = {"sudoku": Sudoku(), "chain": Chain(), "follow": Follow(),
                          "sums": Sums()}


def is_held_out(task: Task, prompt: str, answer: str) -> bool:
    """One example in eight is held out, by a hash of the task's split key: training and held-out
    data are disjoint whatever seed they are drawn with."""
    key = getattr(task, "split_key", lambda p, a: p)(prompt, answer)
    return hashlib.sha256(key.encode()).digest()[0] < 32


def draw(task: Task, rng: random.Random, held_out: bool) -> tuple[str, str]:
    """One (prompt, answer) of the wanted side of the split."""
    while True:
        prompt, answer = task.make(rng)
        if is_held_out(task, prompt, answer) == held_out:
            return prompt, answer
