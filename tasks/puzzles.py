"""Four puzzles in text, each a class with `make(rng) -> (prompt, answer)` and
`check(prompt, text) -> bool`, which judges by the puzzle's rules and never by comparing strings.
`read(text)` takes a puzzle of a user's own, whatever stands between its words."""
from __future__ import annotations

import itertools
import re


def words_of(text: str, name: str, form: str, what: str) -> list[str] | None:
    """The words behind a puzzle's name, None for another text. Raises `ValueError` with what they
    should be where they, with one blank between them, are not of a form."""
    first, *words = text.replace("\\n", " ").split() or [""]  # as a shell passes a line break on
    if first.lower().rstrip(":") != name:
        return None
    if not re.fullmatch(form, " ".join(words)):
        raise ValueError(f"write {name!r} and then {what}, with blanks or line breaks between")
    return words


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

    def read(self, text):
        words = words_of(text, "sudoku", r"(\s*[1-4.]){16}", "16 cells, row by row: 1 to 4, and . "
                         "for what is to be found")
        if words is None:
            return None
        if self.solutions(cells := "".join(words)) == 0:
            raise ValueError("this one has no solution")
        return "sudoku\n" + self._lines(cells) + "\n"

    def hint(self, prompt):
        """What to expect of a puzzle with more than one solution, "" for others."""
        found = self.solutions("".join(prompt.split()[1:]))
        return f"{found} solutions; it was trained on puzzles with one" if found > 1 else ""

    def solutions(self, cells: str) -> int:
        """In how many grids the 16 cells are these, where they are not dots."""
        fitting = (1 << len(self.grids)) - 1
        for having, cell in zip(self.having, cells):
            fitting &= having.get(cell, -1)
        return fitting.bit_count()

    def check(self, prompt, text):
        cells = "".join(text.split())
        givens = "".join(prompt.removeprefix("sudoku").split())
        return tuple(cells) in self.grids and all(g in (".", c) for g, c in zip(givens, cells))

    def split_key(self, prompt, answer):
        return answer


class Chain:
    """Six variables, each the one before plus 1 to 3, modulo 10; the assignments come in shuffled
    order. The answer gives every variable's value, in the order in which they can be worked out."""

    names = "abcdef"

    def __init__(self, size: int = 6):
        self.size = size

    def make(self, rng):
        order, value = rng.sample(self.names, self.size), rng.randrange(10)
        lines, answer = [f"{order[0]}={value}"], [f"{order[0]}={value}"]
        for before, name in zip(order, order[1:]):
            step = rng.randint(1, 3)
            value = (value + step) % 10
            lines.append(f"{name}={before}+{step}")
            answer.append(f"{name}={value}")
        rng.shuffle(lines)
        return "chain\n" + "\n".join(lines) + "\n", " ".join(answer)

    def read(self, text):
        what = "a=3 b=a+1 ..., a to f in any order: a digit, the next that plus 1 to 3, and so on"
        words = words_of(text, "chain", r"([a-f]=([0-9]|[a-f]\+[1-3]) ?){6}", what)
        if words is None:
            return None
        known = [word[0] for word in words if len(word) == 3]
        for _ in words:  # what can be worked out from one digit
            known += [word[0] for word in words if word[2] in known and word[0] not in known]
        if len(known) != 6 or len({word[2:3] for word in words if len(word) > 3}) != 5:
            raise ValueError("write 'chain' and then " + what)
        return "chain\n" + "\n".join(words) + "\n"

    def check(self, prompt, text):
        lines = dict(line.split("=") for line in prompt.split()[1:])
        value = {}
        while len(value) < len(lines):
            for name, right in lines.items():
                if right.isdigit():
                    value[name] = int(right)
                elif right[0] in value and name not in value:
                    value[name] = (value[right[0]] + int(right[1:])) % 10
        return text.split() == [f"{name}={v}" for name, v in value.items()]

    def split_key(self, prompt, answer):
        return prompt


class Follow:
    """A permutation of eight letters as pairs "from>to", and a letter to start at. The answer is
    the path of eight letters that begins there; where a cycle closes, it goes round again."""

    names = "abcdefgh"

    def __init__(self, size: int = 8):
        self.size = size

    def make(self, rng):
        names = rng.sample(self.names, self.size)
        target = dict(zip(names, rng.sample(names, self.size)))
        start = rng.choice(names)
        pairs = [f"{a}>{b}" for a, b in target.items()]
        rng.shuffle(pairs)
        return f"follow {start}\n" + " ".join(pairs) + "\n", self.path(target, start)

    def path(self, target: dict[str, str], start: str) -> str:
        """The stations from `start` on, each the target of the one before, as an answer."""
        path = [start]
        while len(path) < len(target):
            path.append(target[path[-1]])
        return ">".join(path)

    def read(self, text):
        what = "a letter to start at and a>b ..., a to h once each on both sides"
        words = words_of(text, "follow", r"[a-h]( [a-h]>[a-h]){8}", what)
        if words is None:
            return None
        if any(len({pair[side] for pair in words[1:]}) < 8 for side in (0, 2)):
            raise ValueError("write 'follow' and then " + what)
        return f"follow {words[0]}\n" + " ".join(words[1:]) + "\n"

    def check(self, prompt, text):
        _, start, *pairs = prompt.split()
        return "".join(text.split()) == self.path(dict(p.split(">") for p in pairs), start)

    def split_key(self, prompt, answer):
        return prompt


class Sums:
    """Twelve digits, from the second on 1 to `most`; the answer has their running total modulo
    10."""

    def __init__(self, most: int = 9):
        self.most = most

    def make(self, rng):
        numbers = [rng.randrange(10), *(rng.randint(1, self.most) for _ in range(11))]
        return f"sums\n{self._row(numbers)}\n", self._row(itertools.accumulate(numbers))

    @staticmethod
    def _row(numbers) -> str:
        return " ".join(str(number % 10) for number in numbers)

    def read(self, text):
        words = words_of(text, "sums", r"[0-9]( [1-9]){11}", "12 digits, from the second on 1 to 9")
        return words and f"sums\n{' '.join(words)}\n"

    def check(self, prompt, text):
        numbers = map(int, prompt.split()[1:])
        return text.split() == self._row(itertools.accumulate(numbers)).split()

    def split_key(self, prompt, answer):
        return prompt
