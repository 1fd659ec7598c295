"""Tasks that ask for more than one look: searching, and following a trail whose stations are never
written. Classes as in tasks/puzzles.py."""
from __future__ import annotations

import ast
import operator
import random
import string
from fractions import Fraction
from functools import lru_cache

from tasks.puzzles import Follow, words_of


# ------------------------------------------------------------------ sudoku6
def _units() -> list[list[int]]:
    rows = [[6 * r + c for c in range(6)] for r in range(6)]
    boxes = [[6 * (r + i) + c + k for i in range(2) for k in range(3)]
             for r in (0, 2, 4) for c in (0, 3)]
    return [*rows, *map(list, zip(*rows)), *boxes]


UNITS = _units()  # the 18 rows, columns and boxes, as cells
PEERS = [sorted({j for unit in UNITS if i in unit for j in unit} - {i}) for i in range(36)]


class Contradiction(Exception):
    """No grid fits."""


def place(candidates: list[int], cell: int, bit: int) -> None:
    """Make `bit` the only candidate of a cell and whatever follows by naked singles: candidates are
    6 bits for each of the 36 cells. Raises `Contradiction`."""
    candidates[cell] = bit
    for peer in PEERS[cell]:
        if candidates[peer] & bit:
            left = candidates[peer] & ~bit
            if not left:
                raise Contradiction
            candidates[peer] = left
            if not left & (left - 1):
                place(candidates, peer, left)


def singles(cells: str) -> list[int]:
    """Candidates of the 36 cells ("." where none is given) after naked and hidden singles."""
    candidates = [63] * 36
    for i, cell in enumerate(cells):
        if cell != ".":
            bit = 1 << int(cell) - 1
            if not candidates[i] & bit:
                raise Contradiction
            place(candidates, i, bit)
    return hidden_singles(candidates)


def hidden_singles(candidates: list[int]) -> list[int]:
    """The same candidates, with what has but one place in a row, column or box placed there."""
    changed = True
    while changed:
        changed = False
        for unit in UNITS:
            once = twice = 0
            for i in unit:
                twice |= once & candidates[i]
                once |= candidates[i]
            if once != 63:
                raise Contradiction
            for i in unit:
                bit = candidates[i] & once & ~twice
                if bit and bit != candidates[i]:
                    place(candidates, i, bit & -bit)
                    changed = True
    return candidates


def grids(candidates: list[int], most: int, rng: random.Random | None = None) -> list[str]:
    """At most so many of the grids that fit, in the order that rng shuffles."""
    open_cells = [i for i in range(36) if candidates[i] & (candidates[i] - 1)]
    if not open_cells:
        return ["".join(str(c.bit_length()) for c in candidates)]
    cell = min(open_cells, key=lambda i: candidates[i].bit_count())
    bits, found = [1 << k for k in range(6) if candidates[cell] >> k & 1], []
    if rng is not None:
        rng.shuffle(bits)
    for bit in bits:
        tried = candidates.copy()
        try:
            place(tried, cell, bit)
            found += grids(hidden_singles(tried), most - len(found), rng)
        except Contradiction:
            continue
        if len(found) >= most:
            break
    return found


def by_singles(puzzle: str) -> bool:
    """Whether naked and hidden singles solve a puzzle that has a solution."""
    return not any(c & (c - 1) for c in singles(puzzle))


def has_one_solution(puzzle: str) -> bool:
    """Whether a puzzle that has a solution has no other."""
    return len(grids(singles(puzzle), 2)) == 1


class Sudoku6:
    """6x6 sudoku: rows, columns and boxes of two rows by three hold 1 to 6 once each, and one grid
    fits. Givens are left out in a random order while naked and hidden singles still solve it, down
    to some number from 8 to 16 (`least`); or, if `hard`, while it has one solution, which singles
    alone do not find. The split is by solution grid."""

    pool = 1000  # of hard ones, for training

    def __init__(self, hard: bool = False, least: tuple[int, int] = (8, 16)):
        self.hard, self.least = hard, least

    def make(self, rng):
        while True:
            [grid] = grids([63] * 36, 1, rng)
            cells, least = list(grid), 0 if self.hard else rng.randint(*self.least)
            for cell in rng.sample(range(36), 36):
                if 36 - cells.count(".") <= least:
                    break
                cells[cell] = "."
                if not self._fine("".join(cells)):
                    cells[cell] = grid[cell]
            puzzle = "".join(cells)
            if not (self.hard and by_singles(puzzle)):  # nineteen in twenty are too easy
                return self._example(puzzle, grid)

    def practice(self, rng):
        """A training example. To make a hard one takes a tenth of a second: those are copies of
        `pool` of them, 2.5 million of each, with other digits and other orders of the boxes and of
        the rows and columns in them.  # ours"""
        if not self.hard:
            return self.make(rng)
        rows = [2 * i + k for i in rng.sample(range(3), 3) for k in rng.sample(range(2), 2)]
        columns = [3 * i + k for i in rng.sample(range(2), 2) for k in rng.sample(range(3), 3)]
        digits = str.maketrans("123456", "".join(rng.sample("123456", 6)))
        return self._example(*(
            "".join(cells[6 * r + c] for r in rows for c in columns).translate(digits)
            for cells in hard_sudoku(rng.randrange(self.pool))))

    def _fine(self, puzzle: str) -> bool:
        return by_singles(puzzle) or self.hard and has_one_solution(puzzle)

    @staticmethod
    def _lines(cells: str) -> str:
        return "\n".join(cells[i:i + 6] for i in range(0, 36, 6))

    def _example(self, puzzle: str, grid: str) -> tuple[str, str]:
        return f"sudoku6\n{self._lines(puzzle)}\n", self._lines(grid)

    def read(self, text):
        words = words_of(text, "sudoku6", r"(\s*[1-6.]){36}", "36 cells, row by row: 1 to 6, and . "
                         "for what is to be found")
        if words is None:
            return None
        if self._solutions(cells := "".join(words)) == 0:
            raise ValueError("this one has no solution")
        return f"sudoku6\n{self._lines(cells)}\n"

    def hint(self, prompt):
        """What to expect of a puzzle with more than one solution, "" for others."""
        several = self._solutions("".join(prompt.split()[1:])) > 1
        return "several solutions; it was trained on puzzles with one" if several else ""

    @staticmethod
    def _solutions(cells: str) -> int:
        """How many grids fit, 2 for any more than one."""
        try:
            return len(grids(singles(cells), 2))
        except Contradiction:
            return 0

    def check(self, prompt, text):
        cells, givens = "".join(text.split()), "".join(prompt.split()[1:])
        return (len(cells) == 36 and all(g in (".", c) for g, c in zip(givens, cells))
                and all({cells[i] for i in unit} == set("123456") for unit in UNITS))

    def split_key(self, prompt, answer):
        return answer


@lru_cache(maxsize=None)
def hard_sudoku(number: int) -> tuple[str, str]:
    """The cells of hard puzzle `number` of those that training has copies of, and of its grid."""
    prompt, answer = Sudoku6(hard=True).make(random.Random(f"hard {number}"))
    return "".join(prompt.split()[1:]), "".join(answer.split())


# ------------------------------------------------------------------ countdown
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def worked_out(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression of one-digit numbers, + - * / and parentheses, and the numbers in
    it; None for any other text and where something is divided by zero."""
    if len(text) > 40 or set(text) - set("0123456789+-*/() "):
        return None
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10:
            numbers.append(node.value)
            return Fraction(node.value)
        raise ValueError

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


class Countdown:
    """Some numbers from 1 to 9, four unless said otherwise, and a target from 10 to 99: an
    expression that uses each of them once, with + - * and parentheses, and has that value. Any
    right one counts, with / too."""

    def __init__(self, size: int = 4):
        self.size = size

    def make(self, rng):
        while True:
            numbers = [rng.randint(1, 9) for _ in range(self.size)]
            terms = [(n, str(n), 3) for n in numbers]  # value, text, how tightly it binds
            while len(terms) > 1:
                rng.shuffle(terms)
                terms.append(self._joined(terms.pop(), terms.pop(), rng.choice("+-*")))
            value, text, _ = terms[0]
            if 10 <= value <= 99:
                rng.shuffle(numbers)
                return f"countdown\n{' '.join(map(str, numbers))} {value}\n", text

    @staticmethod
    def _joined(left, right, sign: str):
        """Two terms as one, in parentheses only where they are needed."""
        (a, before, tight), (b, behind, close) = left, right
        binds = 2 if sign == "*" else 1
        before = before if tight >= binds else f"({before})"
        behind = behind if close > binds or close == binds and sign != "-" else f"({behind})"
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        return value, before + sign + behind, binds

    def read(self, text):
        words = words_of(text, "countdown", r"([1-9] ){4}[1-9][0-9]",
                         "four numbers from 1 to 9 and a target from 10 to 99")
        return words and f"countdown\n{' '.join(words)}\n"

    def check(self, prompt, text):
        *numbers, target = map(int, prompt.split()[1:])
        found = worked_out(text)
        return found is not None and found[0] == target and sorted(found[1]) == sorted(numbers)

    def split_key(self, prompt, answer):
        *numbers, target = prompt.split()[1:]
        return " ".join([*sorted(numbers), target])


# ------------------------------------------------------------------ hops
class Hops:
    """`chains` trails of `length` letters, each ending at a digit of its own, as pairs in shuffled
    order: "a>f" leads from a to f, "f>3" to the end. The answer is the digit to which the trail of
    a letter leads. How many pairs are on the way is uniform from 1 to `length`, and none of the
    stations is ever written."""

    def __init__(self, chains: int = 3, length: int = 6, hops: int | None = None):
        self.chains, self.length, self.hops = chains, length, hops

    def make(self, rng):
        size = self.chains * self.length
        names = rng.sample(string.ascii_lowercase[:size], size)
        ends, pairs = rng.sample(string.digits, self.chains), []
        for i, end in enumerate(ends):
            trail = [*names[i * self.length:(i + 1) * self.length], end]
            pairs += [f"{a}>{b}" for a, b in zip(trail, trail[1:])]
        rng.shuffle(pairs)
        start = names[self.length - (self.hops or rng.randint(1, self.length))]
        return f"hops\n{' '.join(pairs)}\n{start}>", ends[0]

    @staticmethod
    def trail(prompt: str) -> str:
        """The letters on the way and the digit at its end."""
        _, *pairs, start = prompt.split()
        target, way = dict(pair.split(">") for pair in pairs), start[0]
        while way[-1] in target:
            way += target[way[-1]]
        return way

    def check(self, prompt, text):
        return text.strip() == self.trail(prompt)[-1]

    def split_key(self, prompt, answer):
        return prompt


class Halves:
    """`follow` with its mouth half shut: of each station on the path only its half of the alphabet
    is written, 1 for a to d and 2 for e to h, and the letter itself one time in four. To name a
    half one has to know the station, and what is written does not tell it to the next: where
    `follow` goes on from the last letter, here whoever has kept nothing begins again at the start.
    Either is right for every station."""

    def __init__(self, size: int = 8, named: float = 0.25):
        self.follow, self.named = Follow(size), named

    def make(self, rng):
        prompt, path = self.follow.make(rng)
        stations = [c if rng.random() < self.named else self._half(c) for c in path.split(">")]
        return prompt.replace("follow", "halves"), ">".join(stations)

    @staticmethod
    def _half(station: str) -> str:
        return "1" if station < "e" else "2"

    def check(self, prompt, text):
        _, start, *pairs = prompt.split()
        path = self.follow.path(dict(pair.split(">") for pair in pairs), start).split(">")
        stations = "".join(text.split()).split(">")
        return len(stations) == len(path) and all(
            s in (c, self._half(c)) for s, c in zip(stations, path))

    def split_key(self, prompt, answer):
        return prompt


DEPTH = {"sudoku6": Sudoku6(), "sudoku6-hard": Sudoku6(hard=True), "countdown": Countdown(),
         "hops": Hops(), "halves": Halves()}
