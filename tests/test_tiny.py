"""The generated tasks, their split, the tiny model's tokenizer and its pretraining loss."""
from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import bench
import model
import tiny
from model import Backbone, Config, Tokenizer, load, rotate
from tiny import GEN_LENGTH, SPECIAL, TASKS, draw, is_held_out

NAMES = ["sudoku", "chain", "follow", "sums"]
EVERY_TASK = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.build_tokenizer()


def fresh(tokenizer: Tokenizer, seed: int = 0, **sizes) -> Backbone:
    """A model in tiny's format with fresh weights."""
    config = Config.from_dict(tiny.build_config(tokenizer) | sizes)
    return Backbone(config).initialise(torch.Generator().manual_seed(seed))


def examples(name: str, number: int = 60, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [TASKS[name].make(rng) for _ in range(number)]


def test_the_built_in_tasks_are_all_tested():
    """A task that joins TASKS has to join the tests."""
    assert list(TASKS) == NAMES


# ------------------------------------------------------------------ right answers
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
    share = sum(is_held_out(task, *example) for example in examples(name, 1500)) / 1500
    assert 0.085 < share < 0.165  # 0.125, and for sudoku what the 288 grids make of it


def test_held_out_grids_are_never_seen():
    """Every sudoku grid is on one side, by brute force over all of them."""
    grids = ["\n".join(g[i:i + 4] for i in range(0, 16, 4)) for g in all_grids()]
    held = {g for g in grids if is_held_out(TASKS["sudoku"], "any prompt", g)}
    assert 20 < len(held) < 55
    rng = random.Random(0)
    assert {draw(TASKS["sudoku"], rng, True)[1] for _ in range(400)} <= held
    assert not {draw(TASKS["sudoku"], rng, False)[1] for _ in range(400)} & held


class Reverse:
    """A task from outside: make and check, nothing else."""

    def make(self, rng):
        word = "".join(rng.choice("xyz") for _ in range(10))
        return f"reverse {word}\n", word[::-1]

    def check(self, prompt, text):
        return text.strip() == prompt.split()[1][::-1]


class Ragged(Reverse):
    """The same with prompts of different lengths."""

    def make(self, rng):
        word = "".join(rng.choice("xyz") for _ in range(rng.randint(4, 12)))
        return f"reverse {word}\n", word[::-1]


@pytest.fixture
def reverse(monkeypatch) -> Reverse:
    """The task from outside, among the others."""
    monkeypatch.setitem(TASKS, "reverse", Reverse())
    return TASKS["reverse"]


def test_a_task_needs_make_and_check_only(reverse, tokenizer, capsys):
    """One line in TASKS is enough to draw it on both sides of the split, to show it, and to make
    batches of it; the split is then by prompt."""
    rng = random.Random(0)
    sides = {side: {draw(reverse, rng, side) for _ in range(200)} for side in (True, False)}
    assert not {p for p, _ in sides[True]} & {p for p, _ in sides[False]}
    assert all(reverse.check(*pair) for side in sides.values() for pair in side)
    assert tiny.main(["show", "--task", "reverse", "--number", "1"]) == 0
    prompt, answer = capsys.readouterr().out.split()[1:]
    assert prompt[::-1] == answer
    ids, answers, pad = tiny.batch(reverse, tokenizer, rng, 3, True, 1)
    assert ids.shape == (3, len(tokenizer.encode(f"reverse {prompt}\n"))) and pad is None
    assert answers.shape == (3, GEN_LENGTH)


def test_an_answer_that_is_too_long_is_refused(reverse, tokenizer, monkeypatch):
    """Rather than cut: the model could not write it in the bench's positions."""
    monkeypatch.setattr(reverse, "make", lambda rng: (f"reverse {rng.random()}\n", "x" * 25))
    with pytest.raises(model.InputError, match="longer than 24 tokens"):
        tiny.batch(reverse, tokenizer, random.Random(0), 2, False, 1)


# ------------------------------------------------------------------ tokenizer and batches
TEXTS = ["", " ", "\n", "sudoku\n12.4\n", "sudokuchain follows", "a=b+7", "Grüße, 世界! 🧩",
         "\x00\x7f", "tab\tand\r\nline", "e\u0301 \u202e \ufeff", "ABCdefGHI 0123456789",
         "<|not special|>", "\u2028"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_comes_back(tokenizer, text):
    """Byte level: what is encoded is what is decoded, ids in range and no special ones."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    special = {tokenizer.vocab[s] for s in SPECIAL}
    assert all(0 <= i < len(tokenizer.vocab) and i not in special for i in ids)


def test_task_names_are_one_token_and_all_else_is_one_byte(tokenizer):
    """So that each digit and letter is a token of its own, wherever it stands."""
    for name in NAMES:
        assert len(tokenizer.encode(name)) == 1
        for prompt, answer in examples(name, 10):
            assert len(tokenizer.encode(prompt)) == len(prompt) - len(name) + 1
            assert [tokenizer.decode([i]) for i in tokenizer.encode(answer)] == list(answer)
    assert len(tokenizer.encode("é")) == 2


def test_special_tokens_are_three_ids_apart(tokenizer):
    """Start, end and mask: one id each, which a text cut of special tokens does not show."""
    ids = [tokenizer.encode(s) for s in SPECIAL]
    assert [len(i) for i in ids] == [1, 1, 1] and len({i[0] for i in ids}) == 3
    assert tokenizer.decode([i for [i] in ids] + tokenizer.encode("x"), skip_special=True) == "x"
    config = Config.from_dict(tiny.build_config(tokenizer))
    assert [config.eos_id, config.mask_id] == [ids[1][0], ids[2][0]]
    assert config.vocab == len(tokenizer.vocab)


@EVERY_TASK
@pytest.mark.parametrize("held_out", [True, False])
def test_batches_hold_prompts_and_answers(name, tokenizer, held_out):
    """Prompts of one length, answers that fit with EOS behind them, all from the side asked for."""
    prompts, answers, _ = tiny.batch(TASKS[name], tokenizer, random.Random(3), 40, held_out, 1)
    assert prompts.shape[0] == 40 and answers.shape == (40, GEN_LENGTH)
    for prompt, row in zip(prompts, answers.tolist()):
        assert 1 in row  # an end that the model learns to write
        answer = row[:row.index(1)]
        assert set(row[len(answer):]) == {1}
        prompt, answer = tokenizer.decode(prompt), tokenizer.decode(answer)
        assert TASKS[name].check(prompt, answer)
        assert is_held_out(TASKS[name], prompt, answer) == held_out


# ------------------------------------------------------------------ what pretraining starts from
@pytest.mark.parametrize("name", list(tiny.EASIER))
def test_easier_examples_are_of_the_same_task(name, tokenizer):
    """They follow the full size's rules, are judged by its check, and make batches; the full size
    is not among them."""
    for task in tiny.EASIER[name]:
        prompts, *_ = tiny.batch(task, tokenizer, random.Random(0), 10, False, 1)
        assert len(prompts) == 10
        for seed in range(10):
            prompt, answer = task.make(random.Random(seed))
            assert SOLVE[name](prompt) == "".join(re.findall("[a-z0-9]", answer))
            assert TASKS[name].check(prompt, answer)
        assert (vars(task)) != vars(TASKS[name])


def test_the_first_heads_look_nearby(tokenizer):
    """At the start the first layer's heads put most of their attention on the token at their
    offset, whatever the text; the head after them does not."""
    backbone = fresh(tokenizer)
    tiny.look_nearby(backbone, tiny.OFFSETS)
    block, c = backbone.blocks[0], backbone.config
    ids = torch.tensor([tokenizer.encode(TASKS["chain"].make(random.Random(1))[0])])
    T, heads = ids.shape[1], c.heads
    with torch.no_grad():
        qkv = block.qkv(block.attn_norm(backbone.embed(ids))).view(1, T, 3 * heads, c.head_dim)
    inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    angles = torch.arange(T)[:, None] * inverse
    q, k = rotate(qkv[:, :, :2 * heads], angles.cos(), angles.sin())[0].transpose(0, 1).split(heads)
    attention = (q @ k.mT / c.head_dim ** 0.5).softmax(-1)                    # (nh, T, T)
    position = torch.arange(T)

    def share(head: int, offset: int) -> float:
        inside = (position + offset >= 0) & (position + offset < T)
        return float(attention[head, position[inside], position[inside] + offset].mean())

    for head, offset in enumerate(tiny.OFFSETS):
        assert share(head, offset) > 0.8
        assert share(len(tiny.OFFSETS), offset) < 0.2


# ------------------------------------------------------------------ the checkpoint
def test_the_folder_is_a_checkpoint(tokenizer, tmp_path):
    """What write_folder writes loads as the same model and tokenizer, under LLaDA's own names."""
    backbone = fresh(tokenizer)
    tiny.write_folder(backbone, tokenizer, tmp_path / "ckpt")
    loaded, reloaded = load(tmp_path / "ckpt", "cpu")
    assert loaded.config == backbone.config and reloaded.vocab == tokenizer.vocab
    for name, p in backbone.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p)
    assert [reloaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert "model.transformer.wte.weight" in load_file(tmp_path / "ckpt" / "model.safetensors")
    stated = json.loads((tmp_path / "ckpt" / "generation_config.json").read_text())
    assert stated["max_new_tokens"] == GEN_LENGTH
    assert loaded.config.parameters == sum(p.numel() for p in backbone.parameters())


def slow_llada_loss(backbone, prompts, answers, pad, generator) -> torch.Tensor:
    """The published loss token by token, on the same draws, every row without its padding."""
    rows, length = answers.shape
    offset, total = float(torch.rand(1, generator=generator)), 0.0
    dice = torch.rand(rows, length, generator=generator)
    for row in range(rows):
        t = (row / rows + offset) % 1
        p = (1 - 1e-3) * t + 1e-3
        noisy, masked = answers[row].clone(), dice[row] < p
        noisy[masked] = backbone.config.mask_id
        prompt = prompts[row] if pad is None else prompts[row][~pad[row]]
        logits = backbone(torch.cat([prompt, noisy])[None])[0, len(prompt):]
        for i in range(length):
            if masked[i]:
                total = total - logits[i].log_softmax(-1)[answers[row, i]] / p / length
    return total / rows


@pytest.mark.parametrize("task", [TASKS["sums"], Ragged()], ids=["equal", "padded"])
@pytest.mark.parametrize("seed", range(3))
def test_the_pretraining_loss_is_the_slow_one(tokenizer, task, seed):
    """Masking, weights 1 / p, the answer's length, padding and the batch: loss and gradient are
    those of a loop over rows and tokens."""
    backbone = fresh(tokenizer, n_layers=2)
    data = tiny.batch(task, tokenizer, random.Random(seed), 5, False, 1)
    assert (data[2] is not None) == isinstance(task, Ragged)
    losses, grads = [], []
    for loss_fn in (tiny.llada_loss, slow_llada_loss):
        backbone.zero_grad()
        loss = loss_fn(backbone, *data, torch.Generator().manual_seed(seed))
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    assert torch.allclose(*losses, rtol=1e-4)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)


def test_the_pretraining_loss_is_unbiased(tokenizer):
    """A model that says nothing has log V on average: what 1 / p is for."""
    backbone = fresh(tokenizer, n_layers=1)
    torch.nn.init.zeros_(backbone.head.weight)
    data = tiny.batch(TASKS["sums"], tokenizer, random.Random(0), 16, False, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = torch.stack([tiny.llada_loss(backbone, *data, generator) for _ in range(80)])
    expected = torch.tensor(float(backbone.config.vocab)).log()
    error = losses.std() / 80 ** 0.5
    assert abs(losses.mean() - expected) < 4 * error < 1  # without 1 / p it would be half


# ------------------------------------------------------------------ the command
def test_show_prints_held_out_examples():
    """The script in a process of its own prints what `draw` gives here: the split depends neither
    on the process nor on its hash seed."""
    rng = random.Random(5)
    expected = "".join(p + a + "\n\n" for p, a in
                       [draw(TASKS["chain"], rng, held_out=True) for _ in range(2)])
    done = subprocess.run([sys.executable, "tiny.py", "show", "--task", "chain", "--number", "2",
                           "--seed", "5"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected)


@pytest.mark.parametrize("argv, words", [
    (["show", "--task", "chess"], ["chess", *NAMES]), ([], ["show"]), (["eat"], ["eat"]),
    (["show", "--number", "x"], ["--number"])], ids=str)
def test_arguments_that_make_no_sense(argv, words, capsys):
    """One line and exit code 2."""
    assert tiny.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)


def test_pretraining_writes_a_checkpoint_that_loads(tmp_path, monkeypatch, capsys):
    """Two updates from nothing: the folder is whole, the weights moved, and the loss of every task
    is in the metrics."""
    monkeypatch.setitem(tiny.CONFIG, "n_layers", 1)
    drawn = tiny.batch
    monkeypatch.setattr(tiny, "batch", lambda task, tokenizer, rng, size, *rest:
                        drawn(task, tokenizer, rng, min(size, 8), *rest))  # the held-out 256
    out = tmp_path / "ckpt"
    assert tiny.main(["pretrain", "--out", str(out), "--steps", "2", "--batch-size", "2",
                      "--device", "cpu"]) == 0
    backbone, tokenizer = load(out, "cpu")
    before = fresh(tokenizer, n_layers=1)
    assert not torch.equal(backbone.head.weight, before.head.weight)
    lines = (out / "pretraining" / "metrics.jsonl").read_text().splitlines()
    figures = [json.loads(line) for line in lines]
    assert [f["step"] for f in figures] == [1, 2]
    assert {*NAMES, "loss"} <= figures[0].keys()
    assert {f"held_out_{name}" for name in NAMES} <= figures[1].keys()
    assert f"wrote {out}" in capsys.readouterr().out


@EVERY_TASK
def test_the_shipped_model_solves_its_tasks(name):
    """checkpoints/tiny, its tokenizer and the sampler belong together: of 60 held-out prompts at
    least 90% are solved at one token per step, and fewer in three steps."""
    backbone, tokenizer = load("tiny", "cpu")
    rng = random.Random(123)
    prompts = [draw(TASKS[name], rng, held_out=True)[0] for _ in range(60)]
    one, forwards = bench.solve(backbone, tokenizer, TASKS[name], prompts, steps=24)
    assert forwards == [24] * 60 and sum(one) >= 54
    three, forwards = bench.solve(backbone, tokenizer, TASKS[name], prompts, steps=3)
    assert forwards == [3] * 60 and sum(three) < sum(one)
