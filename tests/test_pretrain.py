"""How the shipped checkpoints are made: tokenizer, config, first heads, curriculum, schedule, the
pretraining loss, and the commands."""
from __future__ import annotations

import collections
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, metrics_of, seeded
from safetensors.torch import load_file

from lib.data import task_batch
from lib.hub import CHECKPOINTS, stated
from lib.published import config_fields
from lib.tokenizer import Tokenizer
from model import Backbone, Config, load, rotate
from studies import pretrain, stories
from studies.pretrain import (COURSES, EASIER, FIRST, OFFSETS, PUZZLES, SHORT, STAGE, deepened,
                              fewer_numbers, given_sudoku, named_halves, puzzle, short_haystack)
from studies.small import (CONFIG, GEN_LENGTH, SPECIAL, Graphed, build_config, examples,
                           llada_loss, look_nearby, noised, trapezoids, write_folder)
from studies.stories import (AGAIN, CONTRASTS, LESSONS, POOL, STORIES, STORY_LENGTH, contrast,
                             excerpts, story_batches, story_tokenizer)
from tasks import TASKS, draw, is_held_out
from tasks.haystack import KINDS, LENGTHS
from tasks.sentences import DIFFERENT, FACTS
from tasks.stories import SENTENCE, choose_facts, read
from train import fit


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return pretrain.build_tokenizer()


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """The stories' tokenizer."""
    return story_tokenizer()


def fresh(tokenizer: Tokenizer, **sizes) -> Backbone:
    """A model in tiny's format with fresh weights."""
    return Backbone(Config(**config_fields(build_config(tokenizer) | sizes))).initialise(seeded())


# ------------------------------------------------------------------ tokenizer
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
    for name in PUZZLES:
        assert len(tokenizer.encode(name)) == 1
        for seed in range(10):
            prompt, answer = TASKS[name].make(random.Random(seed))
            assert len(tokenizer.encode(prompt)) == len(prompt) - len(name) + 1
            assert [tokenizer.decode([i]) for i in tokenizer.encode(answer)] == list(answer)
    assert len(tokenizer.encode("é")) == 2


def test_special_tokens_are_three_ids_apart(tokenizer):
    """Start, end and mask: one id each, which a text cut of special tokens does not show."""
    ids = [tokenizer.encode(s) for s in SPECIAL]
    assert [len(i) for i in ids] == [1, 1, 1] and len({i[0] for i in ids}) == 3
    assert tokenizer.decode([i for [i] in ids] + tokenizer.encode("x"), skip_special=True) == "x"
    config = Config(**config_fields(build_config(tokenizer)))
    assert [config.eos_id, config.mask_id] == [ids[1][0], ids[2][0]]
    assert config.vocab == len(tokenizer.vocab)


# ------------------------------------------------------------------ the checkpoint
def test_the_folder_is_a_checkpoint(tokenizer, tmp_path):
    """What write_folder writes loads as the same model and tokenizer, under LLaDA's own names, and
    states its tasks and their length."""
    backbone = fresh(tokenizer)
    write_folder(backbone, tokenizer, tmp_path / "ckpt", ["sums", "track2-64"])
    loaded, reloaded = load(tmp_path / "ckpt", "cpu")
    assert loaded.config == backbone.config and reloaded.vocab == tokenizer.vocab
    for name, p in backbone.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p)
    assert [reloaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert "model.transformer.wte.weight" in load_file(tmp_path / "ckpt" / "model.safetensors")
    assert stated(tmp_path / "ckpt") == (GEN_LENGTH, ["sums", "track2-64"])
    assert loaded.config.parameters == sum(p.numel() for p in backbone.parameters())


@pytest.mark.parametrize("name, changes, tasks, length", [
    *((name, course.changes, [*course.tasks], course.length)
      for name, course in COURSES.items() if name != "haystack"),
    ("haystack", COURSES["haystack"].changes, pretrain.HAYSTACK_TASKS, 24),
    ("soft", {}, ["halves"], 16), ("soft-tiny", {}, [*PUZZLES], 24),
    ("stories", STORIES, ["stories"], 160)])
def test_the_shipped_folders_are_what_is_written(name, changes, tasks, length, tokenizer, words,
                                                 tmp_path):
    """Config, tokenizer and what is stated; the weights took longer than a test."""
    tokenizer = words if name == "stories" else tokenizer
    write_folder(load(name, "cpu")[0], tokenizer, tmp_path, tasks, length, **changes)
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        written, shipped = (json.loads((folder / file).read_text())
                            for folder in (tmp_path, CHECKPOINTS[name]))
        assert written == shipped
    assert stated(name) == (length, list(tasks)) and all(task in TASKS for task in tasks)


# ------------------------------------------------------------------ what pretraining starts from
def test_the_first_heads_look_nearby(tokenizer):
    """At the start the first layer's heads put most of their attention on the token at their
    offset, whatever the text; the head after them does not."""
    backbone = fresh(tokenizer)
    look_nearby(backbone, OFFSETS)
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

    for head, offset in enumerate(OFFSETS):
        assert share(head, offset) > 0.8
        assert share(len(OFFSETS), offset) < 0.2


def test_easier_puzzles_give_way_to_the_full_size():
    """All are easy at first, half of them halfway, none at the end; sums change at their stage."""
    def easy(name: str, step: int) -> float:
        rng = random.Random(step)
        drawn = [puzzle(name, step, rng) for _ in range(400)]
        assert all(task in EASIER[name] or task is TASKS[name] for task in drawn)
        return sum(task is not TASKS[name] for task in drawn) / 400

    for name in EASIER:
        assert easy(name, 0) == 1 and easy(name, 5000) == easy(name, 9000) == 0
        assert easy(name, 2500) == pytest.approx(0.5, abs=0.1)
    rng = random.Random(0)
    assert puzzle("sums", STAGE - 1, rng) is FIRST["sums"] is not TASKS["sums"]
    assert puzzle("sums", STAGE, rng) is TASKS["sums"] and puzzle("sudoku", 0, rng) is \
        TASKS["sudoku"]


def test_most_stations_are_named_at_first():
    """Nine in ten, and from update 800 on one in four, as in the task."""
    rng = random.Random(0)
    named = [named_halves("halves", step, rng).named for step in (0, 400, 800, 1999)]
    assert named[0] == 0.9 and 0.25 < named[1] < 0.9 and named[2:] == [0.25, 0.25]
    assert TASKS["halves"].named == 0.25


def test_most_cells_are_given_at_first():
    """One sudoku in five is the task's own at first, all are from update 3000 on; the others have
    up to 30 of 36 cells."""
    rng = random.Random(0)
    for step, own in ((0, 0.2), (1500, 0.5), (3000, 1), (5999, 1)):
        drawn = [given_sudoku("sudoku6", step, rng) for _ in range(400)]
        assert sum(task is TASKS["sudoku6"] for task in drawn) / 400 == pytest.approx(own, abs=0.1)
    easy = next(t for t in iter(lambda: given_sudoku("sudoku6", 0, rng), 0)
                if t is not TASKS["sudoku6"])
    given = [sum(c.isdigit() for c in easy.make(rng)[0][8:]) for _ in range(40)]
    assert min(given) < 16 < 24 < max(given) <= 30


def test_numbers_become_four():
    """Two countdowns in five have all four numbers at first, all have them from update 8000 on."""
    rng = random.Random(0)
    for step, own in ((0, 0.4), (6000, 0.75), (8000, 1)):
        drawn = [fewer_numbers("countdown", step, rng) for _ in range(400)]
        full = sum(task is TASKS["countdown"] for task in drawn)
        assert full / 400 == pytest.approx(own, abs=0.1)
        assert {task.size for task in drawn} == ({2, 3, 4} if own < 1 else {4})


def test_layers_besides_add_nothing_at_first(tokenizer):
    """A deeper backbone with a smaller one's weights says what that says."""
    smaller, more = load("tiny", "cpu")[0], build_config(tokenizer, n_layers=5)
    deep = deepened(Backbone(Config(**config_fields(more))).initialise(seeded()), smaller)
    ids = torch.tensor([tokenizer.encode("follow a\n")])
    assert deep.config.layers == 5
    assert torch.equal(deep.hidden(deep.embed(ids)), smaller.hidden(smaller.embed(ids)))


def test_haystacks_are_short_at_first():
    """Of the lengths below any that is asked for later, and "text" of every kind."""
    rng = random.Random(0)
    drawn = [short_haystack("text", 0, rng) for _ in range(200)]
    assert {(t.needles, t.track) for t in drawn} == {(*k, False)[:2] for k in KINDS.values()}
    assert {t.length for t in drawn} == set(SHORT) and max(SHORT) < min(LENGTHS)
    assert {short_haystack("track4", 0, rng).needles for _ in range(9)} == {4}


def test_the_learning_rate_has_two_stages(tmp_path):
    """A line up, a plateau, and a line down to 0 over the last tenth, before which nothing depends
    on the number of steps; with a stage once more behind it. `fit` follows it."""
    shares = [trapezoids(step, 100, 10) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(shares[9:91]) == {1.0}
    assert shares[90:] == pytest.approx([1 - i / 10 for i in range(11)])
    assert shares[:90] == [trapezoids(step, 1000, 10) for step in range(90)]
    staged = [trapezoids(step, 130, 10, stage=30) for step in range(130)]
    assert staged[:30] == [trapezoids(step, 30, 10) for step in range(30)]
    assert staged[30:] == shares[:100]
    p = torch.nn.Parameter(torch.zeros(4))
    fit({"p": p}, lambda step, micro: (p.sum(), {}), tmp_path, steps=20, lr=0.01, warmup=5,
        schedule=trapezoids)
    way = 0.01 * sum(trapezoids(step, 20, 5) for step in range(20))
    assert p.tolist() == pytest.approx([-way] * 4, rel=1e-4)


# ------------------------------------------------------------------ the loss
class Ragged:
    """A task whose prompts have different lengths."""

    def make(self, rng):
        word = "".join(rng.choice("xyz") for _ in range(rng.randint(4, 12)))
        return f"reverse {word}\n", word[::-1]

    def check(self, prompt, text):
        return text.strip() == prompt.split()[1][::-1]


def batch_of(task, tokenizer: Tokenizer, size: int, seed: int):
    rng = random.Random(seed)
    return task_batch([draw(task, rng, False) for _ in range(size)], tokenizer, 1, GEN_LENGTH)


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
    data = batch_of(task, tokenizer, 5, seed)
    assert (data[2] is not None) == isinstance(task, Ragged)
    losses, grads = [], []
    for loss_fn in (llada_loss, slow_llada_loss):
        backbone.zero_grad()
        loss = loss_fn(backbone, *data, seeded(seed))
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    assert torch.allclose(*losses, rtol=1e-4)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)


def test_the_pretraining_loss_is_unbiased(tokenizer):
    """A model that says nothing has log V on average: what 1 / p is for."""
    backbone = fresh(tokenizer, n_layers=1)
    torch.nn.init.zeros_(backbone.head.weight)
    data, generator = batch_of(TASKS["sums"], tokenizer, 16, 0), seeded()
    with torch.no_grad():
        losses = torch.stack([llada_loss(backbone, *data, generator) for _ in range(80)])
    expected = torch.tensor(float(backbone.config.vocab)).log()
    error = losses.std() / 80 ** 0.5
    assert abs(losses.mean() - expected) < 4 * error < 1  # without 1 / p it would be half


@pytest.mark.parametrize("length", [64, 160, 48], ids=lambda n: f"{n} tokens")
def test_every_second_row_is_one_block_of_what_sampling_meets(length):
    """Before its block nothing is masked, behind it everything, and only the block counts, with 1
    of a loss that is 1 everywhere; the other rows are as they are without blocks."""
    answers, total, seen = torch.zeros(6, length, dtype=torch.long), 0.0, set()
    for seed in range(300):
        noisy, weights = noised(answers, 7, seeded(seed), 32)
        plain, usual = noised(answers, 7, seeded(seed))
        assert torch.equal(noisy[1::2], plain[1::2]) and torch.equal(weights[1::2], usual[1::2])
        for row, weight in zip(noisy[::2] == 7, weights[::2]):
            block = next((b for b in range(0, length, 32) if weight[b:b + 32].any()), None)
            if block is not None:
                inside = slice(block, block + 32)
                seen.add(block)
                assert not row[:block].any() and row[block + 32:].all()
                assert torch.equal(weight[inside] > 0, row[inside])
                assert weight.count_nonzero() == weight[inside].count_nonzero()
        total += 6 * weights[::2].sum(1)
    assert seen == {*range(0, length, 32)} and (total / 300 - 1).abs().max() < 0.25


def test_masks_among_some_tokens(tokenizer):
    """Nothing else is masked or counted; at least a half, or all; a row without any counts 0."""
    answers, among = torch.zeros(4, 30, dtype=torch.long), torch.arange(30).expand(4, 30) % 3 == 0
    among = among & (torch.arange(4) < 3)[:, None]
    shares = []
    for seed in range(200):
        noisy, weights = noised(answers, 7, seeded(seed), among=among, least=0.5)
        assert torch.equal(noisy == 7, weights > 0) and not ((noisy == 7) & ~among).any()
        shares.append(weights.sum(1) * 4)
    assert (torch.stack(shares).mean(0) - torch.tensor([1., 1, 1, 0])).abs().max() < 0.15
    noisy, weights = noised(answers, 7, seeded(), among=among, least=1.0)
    assert torch.equal(noisy == 7, among) and weights.sum() == pytest.approx(0.75)


# ------------------------------------------------------------------ the commands
DRAWN = """import random
from tasks import draw
rng = random.Random(5)
print(*(p + a + "\\n" for p, a in [draw("chain", rng, held_out=True) for _ in range(2)]), sep="\\n")
"""


def test_show_prints_held_out_examples(capsys):
    """What the command prints is what `draw` gives in another process, which knows no torch: the
    split depends neither on the process nor on its hash seed."""
    done = subprocess.run([sys.executable, "-c", DRAWN], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONHASHSEED": "7"})
    assert done.returncode == 0 and done.stderr == ""
    assert pretrain.main(["show", "chain", "--number", "2", "--seed", "5"]) == 0
    assert capsys.readouterr() == (done.stdout, "")


def test_a_task_from_outside_is_shown(monkeypatch, capsys):
    """One line in TASKS is enough."""
    monkeypatch.setitem(TASKS, "reverse", Ragged())
    assert pretrain.main(["show", "reverse", "--number", "1"]) == 0
    prompt, answer = capsys.readouterr().out.split()[1:]
    assert prompt[::-1] == answer


@pytest.mark.parametrize("argv, words", [
    (["show", "chess"], ["chess", *PUZZLES]), ([], ["show"]), (["eat"], ["eat"]),
    (["show", "sums", "--number", "x"], ["--number"]), (["tiny"], ["--out"]),
    (["haystack", "--steps", "3"], ["--out"]), (["tiny", "--out", "x", "--steps", "0"], ["0"]),
    (["tiny", "--out", "x", "--lr", "nan"], ["--lr", "nan"]),
    (["tiny", "--out", "x", "--batch-size", "0"], ["--batch-size"]),
    (["tiny", "--out", "x", "--device", "abacus"], ["abacus"])], ids=" ".join)
def test_arguments_that_make_no_sense(argv, words, capsys, tmp_path, monkeypatch):
    """One line and exit code 2, and nothing is written: above all not over a shipped checkpoint,
    which --out would have to name."""
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def few(monkeypatch):
    """Batches of at most 2, in place of the 256 that are held out."""
    drawn = examples
    monkeypatch.setattr(pretrain, "examples", lambda task, tokenizer, rng, size, *rest:
                        drawn(task, tokenizer, rng, min(size, 2), *rest))


def test_pretraining_writes_a_checkpoint_that_loads(few, tmp_path, monkeypatch, capsys):
    """Two updates from nothing: the folder is whole, the weights moved, and the loss of every task
    is in the metrics."""
    monkeypatch.setitem(CONFIG, "n_layers", 1)
    out = tmp_path / "ckpt"
    assert pretrain.main(["tiny", "--out", str(out), "--steps", "2", "--batch-size", "1",
                          "--device", "cpu"]) == 0
    backbone, tokenizer = load(out, "cpu")
    before = fresh(tokenizer, n_layers=1)
    assert not torch.equal(backbone.head.weight, before.head.weight)
    first, last = metrics_of(out / "pretraining")
    assert (first["step"], last["step"]) == (1, 2) and {*PUZZLES, "loss"} <= first.keys()
    assert {f"held_out_{name}" for name in PUZZLES} <= last.keys()
    assert f"wrote {out}" in capsys.readouterr().out and stated(out).tasks == list(PUZZLES)


def test_pretraining_on_haystacks(few, tmp_path):
    """Two updates of checkpoints/tiny write a checkpoint with room for the longest haystack."""
    assert pretrain.main(["haystack", "--out", str(tmp_path), "--steps", "2", "--batch-size", "4",
                          "--device", "cpu"]) == 0
    backbone, _ = load(tmp_path, "cpu")
    assert backbone.config.max_len > max(LENGTHS) + 17 + 24
    start, _ = load("tiny", "cpu")
    moved = [(a - b).abs().max() for a, b in zip(backbone.parameters(), start.parameters())]
    assert 0 < max(moved) < 1e-4  # two updates of warm-up, 3e-6 and 6e-6
    first, last = metrics_of(tmp_path / "pretraining")
    assert {*KINDS, "text"} <= first.keys()
    assert {f"held_out_{kind}" for kind in KINDS} <= last.keys()
    assert stated(tmp_path).tasks == [f"{kind}-64" for kind in KINDS]


@pytest.mark.parametrize("name, begun, layers, length", [
    ("halves", "tiny", 3, 16), ("sudoku6", "tiny", 4, 42), ("sudoku6-hard", "sudoku6", 4, 42)])
def test_pretraining_from_a_model_that_knows_less(few, tmp_path, name, begun, layers, length):
    """Two updates of one shipped, with answers and layers of its own."""
    assert pretrain.main([name, "--out", str(tmp_path), "--steps", "2", "--batch-size", "4",
                          "--device", "cpu"]) == 0
    start, moved = load(begun, "cpu")[0], load(tmp_path, "cpu")[0]
    assert 0 < (start.head.weight - moved.head.weight).abs().max() < 1e-4
    assert moved.config.layers == layers
    assert stated(tmp_path) == (length, [*COURSES[name].tasks]) and name in COURSES[name].tasks
    assert {f"held_out_{task}" for task in COURSES[name].tasks} <= \
        metrics_of(tmp_path / "pretraining")[-1].keys()


# ------------------------------------------------------------------ stories
def test_each_shape_of_batch_is_one_graph(words, monkeypatch):
    """The loss is the same with graphs as without; here what would be recorded is called."""
    recorded = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, data, pool: (
        recorded.append([tuple(x.shape) for x in data]) or module))
    backbone = fresh(words, **STORIES)
    graphed, batch = Graphed(backbone), story_batches(words, 4, 0, 1, torch.device("cpu"))
    for step in (0, 1, 2, 0, 2):
        one, other = (llada_loss(backbone, *batch(step), seeded(step), loss)
                      for loss in (None, graphed))
        assert torch.equal(one, other) and one > 0
    shapes = [[tuple(x.shape) for x in batch(step)] for step in range(3)]
    assert len(recorded) == len({str(shape) for shape in shapes})


def test_batches_of_stories_have_little_padding(words):
    """Each step has its own stories, none of them held out, whole and with an end; most of a batch
    is text, every fourth goes up to the full length, and there are few shapes."""
    task, text, all_, seen, shapes = TASKS["stories"], 0, 0, set(), set()
    batch = story_batches(words, 8, 0, 1, torch.device("cpu"))
    for step in [*range(POOL), *range(AGAIN * POOL, (AGAIN + 1) * POOL)]:
        prompts, answers, pad = batch(step)
        text += int((answers != 1).sum() + (~pad).sum())
        all_ += answers.numel() + prompts.numel()
        shapes.add((prompts.shape[1], answers.shape[1]))
        assert (answers[:, -1] == 1).all() and bool((prompts[pad] == 1).all())
        assert (answers.shape[1] == STORY_LENGTH) >= (step % 4 == 0)
        prompt, story = (words.decode(ids[0], True) for ids in (prompts, answers))
        assert task.check(prompt, story) and not is_held_out(task, prompt, story)
        seen.add(prompt + story)
    assert text / all_ > 0.5 and len(seen) == 2 * POOL
    assert all(n % 16 == 0 for shape in shapes for n in shape) and len(shapes) < POOL
    again = story_batches(words, 8, 0, 1, torch.device("cpu"))
    for step in (5, 5 + POOL, 5 + (AGAIN - 1) * POOL):
        assert all(torch.equal(*pair) for pair in zip(again(step), batch(5)))


def test_words_of_stories_are_one_token(words):
    """Nearly all of them, with the space before them; and any text comes back."""
    assert all(words.decode(words.encode(text)) == text for text in TEXTS)
    rng = random.Random(1)
    stories = ["".join(TASKS["stories"].make(rng)) for _ in range(100)]
    lengths = [len(words.encode(story)) for story in stories]
    assert 60 <= min(lengths) and max(lengths) <= STORY_LENGTH + 20
    assert sum(lengths) < 1.1 * sum(len(re.findall(r"\w+|[^\w\s]+", text)) for text in stories)


@pytest.mark.parametrize("about", LESSONS)
def test_excerpts_are_what_stories_say_about_a_thing(words, about):
    """Every sentence names one of few words, in prompt and answer, and what is masked in a lesson
    are the answer's."""
    (prompts, answers, pad), ends = excerpts(words, random.Random(0), 6, about, 1, few=2)
    said = set()
    for i in range(6):
        prompt, answer = (words.decode(ids[i], True) for ids in (prompts, answers))
        sentences = SENTENCE.split(prompt + answer)
        found = [re.findall(rf"\b({'|'.join(FACTS[about][1])})\b", s) for s in sentences]
        assert len(sentences) > 1 and all(found)
        said.update(*found)
        told = [word.split()[-1] for names in found[1:] for word in names]
        masked = words.decode(answers[i][torch.isin(answers[i], ends)], True)
        assert masked.split() == told
    assert len(said) <= 3


@pytest.mark.parametrize("about", CONTRASTS)
def test_a_contrast_is_the_slow_one(words, about, monkeypatch):
    """Every second row shows one word of the two, and its loss asks for all others alike; the rest
    asks for the words, each against the other one."""
    (prompts, answers, pad), ends = excerpts(words, random.Random(0), 6, about, 1, least=2)
    backbone, seen = fresh(words, **STORIES), []
    mask_id, embed, among = backbone.config.mask_id, backbone.embed, ends.tolist()
    monkeypatch.setattr(backbone, "embed", lambda ids: seen.append(ids) or embed(ids))
    loss = contrast(backbone, prompts, answers, pad, ends, seeded())
    logits = backbone(seen[0], None if pad is None else F.pad(pad, (0, answers.shape[1])))
    rows, hidden = [], 0
    for i in range(6):
        shown, truth = seen[0][i].tolist(), torch.cat([prompts[i], answers[i]]).tolist()
        one, *_, = [token for token in truth if token in among]
        two = next(token for token in truth if token in among and token != one)
        losses = []
        for at in [at for at, token in enumerate(shown) if token == mask_id]:
            z, token = logits[i, at], truth[at]
            assert token in among
            unknown = token == two and i % 2 == 0
            hidden += unknown
            may_be = [x for x in among if x != one] if unknown else [token]
            wrong = two if token == one else one
            losses.append(-z.log_softmax(0)[may_be].mean() - F.logsigmoid(
                z[may_be].logsumexp(0) - math.log(len(may_be)) - z[wrong]))
        assert i % 2 or two not in shown
        rows.append(sum(losses) / max(1, len(losses)))
    assert torch.allclose(loss, sum(rows) / 6, rtol=1e-5) and hidden >= 3


def test_stories_of_few_words():
    """Of everything two words, and who has to differ differs."""
    rng, seen = random.Random(0), collections.defaultdict(set)
    for _ in range(300):
        facts = choose_facts(rng, 2)
        assert all(facts[one] != facts[two] for one, two in DIFFERENT.items())
        for example in FACTS:
            seen[example].add(facts[example])
    assert {*map(len, seen.values())} == {2}


def test_lessons_come_first_where_stories_go_on(few, words, tmp_path, monkeypatch):
    """From the mean of two's weights: look-ups and contrasts in their order, then both in turns of
    all words, beside stories, and a checkpoint in the end."""
    asked, drawn = [], excerpts
    monkeypatch.setattr(stories, "story_tokenizer", lambda: words)
    monkeypatch.setitem(STORIES, "n_layers", 1)
    monkeypatch.setattr(stories, "LESSON", 1)
    monkeypatch.setattr(stories, "CONTRAST", 1)
    monkeypatch.setattr(stories, "excerpts", lambda tokenizer, rng, size, about, eos_id, *which: (
        asked.append((about, size, *which)) or drawn(tokenizer, rng, size, about, eos_id, *which)))
    backbone, begun = fresh(words, **STORIES), [str(tmp_path / name) for name in ("one", "two")]
    for folder, share in zip(begun, (1.5, 1 / 3)):  # 1.5 times, then half
        for p in backbone.parameters():
            p.data *= share
        write_folder(backbone, words, Path(folder), ["stories"], STORY_LENGTH, **STORIES)
    assert pretrain.main(["stories", "--from", *begun, "--out", str(tmp_path / "out"),
                          "--lessons", "--steps", "11", "--batch-size", "1", "--lr", "1e-9",
                          "--device", "cpu"]) == 0
    assert asked[:6] == [(about, 2, 2, 1) for about in LESSONS]
    assert asked[6:9] == [(about, 1, 0, 2) for about in CONTRASTS]
    assert [which for _, *which in asked[9:]] == [[1, 0, 2], [2, 0, 1]]
    after, _ = load(tmp_path / "out", "cpu")
    torch.testing.assert_close(after.state_dict(), fresh(words, **STORIES).state_dict(), atol=1e-6,
                               rtol=1e-6)


def test_a_mean_of_weights_is_written(few, words, tmp_path, monkeypatch):
    """Of those that a run from others' weights passed through in its later half, and the last."""
    monkeypatch.setattr(stories, "story_tokenizer", lambda: words)
    monkeypatch.setitem(STORIES, "n_layers", 1)
    monkeypatch.setattr(stories, "KEEP", 2)
    write_folder(fresh(words, **STORIES), words, tmp_path / "begun", ["stories"], STORY_LENGTH,
                 **STORIES)
    out = tmp_path / "out"
    assert pretrain.main(["stories", "--from", str(tmp_path / "begun"), "--out", str(out),
                          "--steps", "5", "--batch-size", "1", "--device", "cpu"]) == 0
    files = [out / "pretraining" / "weights" / "4.safetensors",
             out / "pretraining" / "training.safetensors"]
    assert [*files[0].parent.iterdir()] == files[:1]
    passed, last = map(load_file, files)
    for name, p in load(out, "cpu")[0].named_parameters():
        assert torch.allclose(p, (passed[name] + last[f"weight.{name}"]) / 2)
        assert not torch.equal(passed[name], last[f"weight.{name}"])


def test_its_own_stories_are_learned_where_they_are_right(few, words, tmp_path, monkeypatch, capfd):
    """Every second micro-batch has them and nothing else, and none that is held out; of the others
    half are lessons. What is no answer is refused with its place."""
    (begun, rest), wrong = draw(TASKS["stories"], random.Random(5), False), " Nonsense."
    others, learned = draw(TASKS["stories"], random.Random(5), True), stories.llada_loss
    file, seen = tmp_path / "own.jsonl", []
    file.write_text('{"id": 1, "error": "too long"}\n' + "".join(
        json.dumps({"prompt": prompt, "text": text}) + "\n"
        for prompt, text in ((begun, rest), (begun, wrong), others)))
    monkeypatch.setattr(stories, "story_tokenizer", lambda: words)
    monkeypatch.setitem(STORIES, "n_layers", 1)
    monkeypatch.setattr(stories, "POOL", 4)
    monkeypatch.setattr(stories, "llada_loss", lambda backbone, *data, **noise: (
        seen.append((data[:2], noise)) or learned(backbone, *data, **noise)))
    monkeypatch.setattr(stories, "contrast", lambda backbone, *data: seen.append("contrast") or sum(
        p.sum() for p in backbone.parameters()))
    write_folder(fresh(words, **STORIES), words, tmp_path / "begun", ["stories"], STORY_LENGTH,
                 **STORIES)
    command = ["stories", "--from", str(tmp_path / "begun"), "--own", str(file), "--steps", "8",
               "--out", str(tmp_path / "out"), "--batch-size", "1", "--device", "cpu"]
    assert pretrain.main(command) == 0
    assert "1 of 3 stories are right and not held out" in capfd.readouterr().err
    lessons, others, own = seen[0:16:4], seen[2:16:4], seen[1:16:2]
    assert [x == "contrast" for x in lessons] == [False, True] * 2
    told = [[words.decode(ids[0], True) for ids in pair] for pair, noise in own]
    assert told == [[begun, rest]] * 8
    assert all(words.decode(pair[1][0], True) != rest and noise["block"] == 32
               for pair, noise in others)
    for line, fault in (('{"prompt": "Once"}', "own.jsonl:1: no answer of sample.py --prompts"),
                        (json.dumps({"prompt": begun, "text": wrong}), "no story there is right")):
        file.write_text(line)
        assert pretrain.main([*command[:-2], "--device", "cpu"]) != 0
        assert fault in capfd.readouterr().err
    assert pretrain.main(["stories", "--own", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "need --from" in capfd.readouterr().err


def test_its_own_stories_are_chosen_evenly():
    """Where they have two plots, of which one is rare, both come alike often; and of a plot that
    has one thing nine times as often as another the one comes three times as often."""
    rng, kinds = random.Random(0), {}
    while len(kinds) < 60:  # a story of each plot and thing
        told = draw("stories", rng, False)
        story = read(*told)
        kinds.setdefault((*{plot for plot, _ in story.places}, story.facts["kite"]), told)
    (often, rare), other = [told for (plot, _), told in kinds.items() if plot == "lost"][:2], next(
        told for (plot, _), told in kinds.items() if plot == "wet")
    chosen = collections.Counter(stories.evenly([often] * 90 + [rare] * 10 + [other] * 5))
    assert chosen.total() == stories.EVEN
    assert chosen[other] / stories.EVEN == pytest.approx(0.5, abs=0.03)
    assert chosen[often] / chosen[rare] == pytest.approx(3, abs=0.4)


def test_pretraining_on_stories(few, words, tmp_path, monkeypatch):
    """Two updates write a checkpoint that states its task and its length."""
    monkeypatch.setattr(stories, "story_tokenizer", lambda: words)
    monkeypatch.setitem(STORIES, "n_layers", 1)
    assert pretrain.main(["stories", "--out", str(tmp_path), "--steps", "2", "--batch-size", "1",
                          "--device", "cpu"]) == 0
    backbone, _ = load(tmp_path, "cpu")
    assert backbone.config.layers == 1 and stated(tmp_path) == (STORY_LENGTH, ["stories"])
    assert "held_out" in metrics_of(tmp_path / "pretraining")[-1]
