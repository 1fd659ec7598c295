"""The tasks: what they make, what they call right, and their split into training and held-out; and
that the shipped models solve them."""
from __future__ import annotations

import functools
import random
import re

import pytest

import bench
from lib.hub import CHECKPOINTS, stated
from model import load
from tasks import TASKS, draw, find_task, is_held_out
from tasks.haystack import HAYSTACKS, KINDS, LENGTHS, Haystack
from tasks.puzzles import Chain, Follow, Sums

NAMES = ["sudoku", "chain", "follow", "sums"]
EVERY_TASK = pytest.mark.parametrize("name", NAMES)
EVERY_HAYSTACK = pytest.mark.parametrize("name", list(HAYSTACKS))


def examples(name: str, number: int = 60, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [TASKS[name].make(rng) for _ in range(number)]


def test_the_built_in_tasks_are_all_tested():
    """Here, by their own rules, stories in test_stories.py, others in test_depth.py; one that joins
    TASKS by what holds of every task, below."""
    assert {*NAMES, *HAYSTACKS} <= TASKS.keys()
    assert set(HAYSTACKS) == {f"{kind}-{length}" for kind in KINDS for length in LENGTHS}
    assert max(LENGTHS) >= 4 * 64


def test_an_unknown_task_names_those_there_are():
    """A `ValueError`, for tasks know nothing of commands."""
    assert find_task("sums") is TASKS["sums"]
    for ask in (find_task, lambda name: draw(name, random.Random(0), True)):
        with pytest.raises(ValueError, match="unknown task 'chess': one of .*sudoku, chain"):
            ask("chess")


# ------------------------------------------------------------------ right answers
@functools.cache
def all_grids() -> list[str]:
    """The 4x4 sudoku grids, filled cell by cell."""
    grids = [""]
    for cell in range(16):
        row, column = divmod(cell, 4)
        seen = [i for i in range(cell) if i // 4 == row or i % 4 == column
                or (i // 8 == row // 2 and i % 4 // 2 == column // 2)]
        grids = [g + c for g in grids for c in "1234" if c not in [g[i] for i in seen]]
    return grids


def solve_sudoku(prompt: str) -> str:
    puzzle = "".join(prompt.split()[1:])
    [grid] = [g for g in all_grids() if all(p in (".", c) for p, c in zip(puzzle, g, strict=True))]
    return grid


def solve_chain(prompt: str) -> str:
    [(name, value)] = re.findall(r"([a-z])=(\d)", prompt)
    after = {before: (name, int(digit)) for name, before, digit in
             re.findall(r"([a-z])=([a-z])\+(\d)", prompt)}
    answer, value = name + value, int(value)
    while name in after:
        name, step = after[name]
        value = (value + step) % 10
        answer += f"{name}{value}"
    return answer


def solve_follow(prompt: str) -> str:
    head, pairs = prompt.splitlines()
    target = dict(re.findall(r"([a-z])>?([a-z])", pairs))
    path = [head[-1]]
    for _ in range(len(target) - 1):
        path.append(target[path[-1]])
    return "".join(path)


def solve_sums(prompt: str) -> str:
    total, answer = 0, ""
    for number in prompt.split()[1:]:
        total += int(number)
        answer += str(total)[-1]
    return answer


SOLVE = dict(zip(NAMES, (solve_sudoku, solve_chain, solve_follow, solve_sums)))


@EVERY_TASK
def test_make_check_and_a_solver_agree(name):
    """The answer that comes with a prompt is the one that the rules give, and is judged right."""
    for prompt, answer in examples(name):
        assert SOLVE[name](prompt) == "".join(re.findall("[a-z0-9]", answer)) != ""
        assert TASKS[name].check(prompt, answer)


@EVERY_TASK
def test_the_check_judges_the_answer_and_not_the_string(name):
    """Other white space around and between what belongs together is right too."""
    for prompt, answer in examples(name, 5):
        for text in (answer + "\n", f"  {answer}\n\n", "\n".join(answer.split()),
                     "  ".join(answer.split()), answer.replace("\n", " ")):
            assert TASKS[name].check(prompt, text)


@EVERY_TASK
def test_wrong_answers_are_rejected(name):
    """Every answer with one character replaced, one left out, one more, two pieces swapped, its
    lines reversed, nothing at all, or another prompt's answer."""
    for prompt, answer in examples(name, 5):
        letters = "abcdefghijkl"
        wrong = ["", " \n", answer[::-1], answer + " " + answer, answer + " 1", answer + ".",
                 answer.upper() + "A", "?" * len(answer)]
        for i, char in enumerate(answer):
            if not char.isspace():
                others = "0123456789" if char.isdigit() else letters
                wrong += [answer[:i] + c + answer[i + 1:] for c in others if c != char]
                wrong.append(answer[:i] + answer[i + 1:])
        pieces = answer.split()
        for i in range(len(pieces) - 1):
            if pieces[i] != pieces[i + 1]:
                wrong.append(" ".join([*pieces[:i], pieces[i + 1], pieces[i], *pieces[i + 2:]]))
        wrong += [other for _, other in examples(name, 5, seed=1) if other != answer]
        for text in wrong:
            if text.split() != answer.split():  # "d>d>d" is itself reversed
                assert TASKS[name].check(prompt, text) is False, text


@EVERY_TASK
def test_a_check_survives_any_text(name):
    """What an untrained model writes is wrong, and no crash."""
    prompt, _ = examples(name, 1)[0]
    for text in ("=", "a", "1234" * 99, "\x00", "é ░ 数", "-1", "a=b+c", "sudoku"):
        assert TASKS[name].check(prompt, text) is False


def test_a_sudoku_has_one_solution_and_few_givens():
    """Brute force over all grids: one of them fits, the puzzle's own, and 4 to 7 cells are given,
    with each number of givens met."""
    grids, counts = all_grids(), set()
    assert len(grids) == 288
    for prompt, answer in examples("sudoku", 150):
        puzzle = "".join(prompt.split()[1:])
        fitting = [g for g in grids if all(p in (".", c) for p, c in zip(puzzle, g))]
        assert fitting == ["".join(answer.split())]
        assert len(puzzle) == 16 and set(puzzle) <= set(".1234")
        counts.add(16 - puzzle.count("."))
    assert counts == {4, 5, 6, 7}


def test_all_grids_are_met():
    """A puzzle can come from any of the 288 grids."""
    assert len({answer for _, answer in examples("sudoku", 2500)}) == 288


@EVERY_TASK
def test_examples_follow_their_seed(name):
    """The same seed gives the same examples, another one others, and they hardly repeat."""
    assert examples(name, 20) == examples(name, 20) != examples(name, 20, seed=1)
    assert len({prompt for prompt, _ in examples(name, 200)}) > 190


# ------------------------------------------------------------------ the split
@EVERY_TASK
def test_training_and_held_out_are_disjoint(name):
    """Whatever seeds they are drawn with: no prompt is shared, and for sudoku no grid; about one
    example in eight is held out."""
    task = TASKS[name]
    sides = {side: {task.split_key(*draw(task, rng, side)) for seed in range(20)
                    for rng in [random.Random(f"{seed} {side}")] for _ in range(25)}
             for side in (True, False)}
    assert not sides[True] & sides[False]
    share = sum(is_held_out(task, *example) for example in examples(name, 900)) / 900
    assert 0.085 < share < 0.165  # 0.125, and for sudoku what the 288 grids make of it


def test_held_out_grids_are_never_seen():
    """Every sudoku grid is on one side, by brute force over all of them."""
    grids = ["\n".join(g[i:i + 4] for i in range(0, 16, 4)) for g in all_grids()]
    held = {g for g in grids if is_held_out(TASKS["sudoku"], "any prompt", g)}
    assert 20 < len(held) < 55
    rng = random.Random(0)
    assert {draw(TASKS["sudoku"], rng, True)[1] for _ in range(400)} <= held
    assert not {draw(TASKS["sudoku"], rng, False)[1] for _ in range(400)} & held


@pytest.mark.parametrize("name", list(TASKS))
def test_what_holds_of_every_task(name):
    """Also of one that was added to TASKS: its own answers are right and nothing is not, a seed
    gives the same examples again, and what is held out is never trained on."""
    task, examples_of, seeds = TASKS[name], {}, range(3 if name == "sudoku6-hard" else 30)
    assert task.make(random.Random(0)) == task.make(random.Random(0))
    for held_out in (True, False):
        drawn = [draw(name, random.Random(seed), held_out) for seed in seeds]
        assert all(task.check(*example) is True for example in drawn)
        assert not any(task.check(prompt, "") for prompt, _ in drawn)
        key = getattr(task, "split_key", lambda prompt, answer: prompt)
        examples_of[held_out] = {key(*example) for example in drawn}
    assert not examples_of[True] & examples_of[False]


class Reverse:
    """A task from outside: make and check, nothing else."""

    def make(self, rng):
        word = "".join(rng.choice("xyz") for _ in range(10))
        return f"reverse {word}\n", word[::-1]

    def check(self, prompt, text):
        return text.strip() == prompt.split()[1][::-1]


def test_a_task_needs_make_and_check_only(monkeypatch):
    """One line in TASKS is enough to draw it on both sides of the split, which is then by
    prompt."""
    monkeypatch.setitem(TASKS, "reverse", Reverse())
    rng = random.Random(0)
    sides = {side: {draw("reverse", rng, side) for _ in range(200)} for side in (True, False)}
    assert not {p for p, _ in sides[True]} & {p for p, _ in sides[False]}
    assert all(TASKS["reverse"].check(*pair) for side in sides.values() for pair in side)


# ------------------------------------------------------------------ other sizes
@pytest.mark.parametrize("task, name", [
    (Chain(2), "chain"), (Chain(5), "chain"), (Follow(2), "follow"), (Follow(7), "follow"),
    (Sums(most=3), "sums")], ids=lambda task: getattr(task, "__dict__", task))
def test_easier_examples_are_of_the_same_task(task, name):
    """They follow the full size's rules and are judged by its check; they are not of that size."""
    assert vars(task) != vars(TASKS[name])
    for seed in range(10):
        prompt, answer = task.make(random.Random(seed))
        assert SOLVE[name](prompt) == "".join(re.findall("[a-z0-9]", answer))
        assert TASKS[name].check(prompt, answer)


# ------------------------------------------------------------------ haystacks
@pytest.fixture(scope="module")
def tokenizer():
    """The shipped models'."""
    return load("tiny", "cpu")[1]


def solve_haystack(prompt: str) -> str:
    hay, query = prompt.splitlines()
    value = dict(re.findall(r"([a-h])=([a-h0-9])", hay))
    asked, answer = re.findall(r"([a-h])=\?", query), []
    for name in asked:
        while name.isalpha():
            answer.append(f"{name}={value[name]}")
            name = value[name]
    return " ".join(answer)


@EVERY_HAYSTACK
def test_haystacks(name, tokenizer):
    """A tokenizer's length as named, eight assignments, one right answer of the size asked for,
    judged by the rules; training and held-out prompts are disjoint."""
    task = TASKS[name]
    kind, length = name.split("-")
    rng, positions = random.Random(0), set()
    for _ in range(15):
        prompt, answer = task.make(rng)
        hay, query = prompt.splitlines()
        assert len(tokenizer.encode(hay)) == len(hay) == int(length) and len(query) == 15
        assert len(tokenizer.encode(prompt)) == int(length) + 17
        assert len(re.findall("[a-h]=[a-h0-9]", hay)) == 8
        assert not re.search(r"([a-h])=\1", hay)
        assert answer == solve_haystack(prompt) and len(answer.split()) == int(kind[-1])
        assert len(query.split()) == (1 if kind.startswith("track") else int(kind[-1]))
        assert task.check(prompt, f" {answer}\n") and len(answer) < stated("haystack").length
        for wrong in ("", answer[:-1], answer + " a=1", answer[:-1] + "?", answer[::-1],
                      answer[:-1] + str((int(answer[-1]) + 1) % 10)):
            assert not task.check(prompt, wrong)
        positions.add(hay.index(answer[:3]))
    assert len(positions) > 5
    sides = [{draw(task, random.Random(s), side)[0] for s in range(9)} for side in (0, 1)]
    assert not sides[0] & sides[1]


@EVERY_HAYSTACK
def test_a_haystacks_check_survives_any_text(name):
    """What an untrained model writes is wrong, and no crash."""
    prompt, answer = TASKS[name].make(random.Random(0))
    for text in ("=", "a", "1234" * 99, "\x00", "a=b=c", "a=", "=3", answer + "."):
        assert TASKS[name].check(prompt, text) is False


def test_a_haystack_without_room_is_refused():
    """Eight assignments take 32 tokens."""
    Haystack(32, 1).make(random.Random(0))
    with pytest.raises(ValueError, match="at least 32 tokens, not 31"):
        Haystack(31, 1)


# ------------------------------------------------------------------ the shipped models
@EVERY_TASK
def test_the_shipped_model_solves_its_tasks(name):
    """checkpoints/tiny, its tokenizer and the sampler belong together: of 24 held-out prompts at
    least 90% are solved at one token per step, and fewer in three steps."""
    backbone, tokenizer = load("tiny", "cpu")
    rng = random.Random(123)
    prompts = [draw(TASKS[name], rng, held_out=True)[0] for _ in range(24)]
    one, forwards = bench.solve(backbone, tokenizer, TASKS[name], prompts, 24, steps=24)
    assert forwards == [24] * 24 and sum(one) >= 22
    three, forwards = bench.solve(backbone, tokenizer, TASKS[name], prompts, 24, steps=3)
    assert forwards == [3] * 24 and sum(three) < sum(one)


def test_the_haystack_model_finds_needles():
    """checkpoints/haystack is under 4 MB, solves what it was trained on, and leaves something to
    learn at twice the training length."""
    backbone, tokenizer = load("haystack", "cpu")
    assert sum(f.stat().st_size for f in CHECKPOINTS["haystack"].iterdir() if f.is_file()) < 4e6
    right = {}
    for length, number in ((48, 20), (128, 10)):
        task, rng = Haystack(length, *KINDS["needle4"]), random.Random(0)
        prompts = [draw(task, rng, held_out=True)[0] for _ in range(number)]
        right[length] = sum(bench.solve(backbone, tokenizer, task, prompts, 24, steps=24)[0])
    assert right[48] >= 19 and right[128] < 5
