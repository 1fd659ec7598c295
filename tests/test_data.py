"""Training examples: what is read from files and tasks, and the batches that are made of it, which
depend on the step alone."""
from __future__ import annotations

import argparse
import contextvars
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import pytest
import torch
from conftest import EOS_ID, MASK_ID, byte_tokenizer

from lib import cli
from lib.cli import InputError
from lib.conversations import data_file, messages_of
from lib.data import (choose_data, file_batches, left_pad, move, read_examples, task_batch,
                      task_batches, training_defaults, tulu)
from lib.tokenizer import Tokenizer
from model import load
from tasks import TASKS, draw, is_held_out
from train import parser


def test_left_pad_puts_the_padding_in_front():
    """The batch that the command line builds: (B, P) ids and True where padded."""
    ids, pad = left_pad([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert pad.tolist() == [[False] * 3, [True, True, False]]


def test_move_leaves_none_alone():
    """A batch without padding has no mask, on any device."""
    assert move((torch.ones(1), None), "meta")[1] is None
    assert move((torch.ones(1), None), "meta")[0].device.type == "meta"


# ------------------------------------------------------------------ what the tests read
def jsonl(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines), encoding="utf-8")
    return path


USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Yes\u2028é."}


# ------------------------------------------------------------------ data files
def test_both_forms_of_a_line(family, tokenizers, tmp_path):
    """`prompt` and `response` are a user's message and its answer; `messages` may hold more turns,
    and each of the assistant's is an answer. The prompt is the chat format, the answer ends with
    its marker and EOS, blank lines count for nothing."""
    tokenizer = tokenizers[family]
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "Hi?", "response": "Yes\u2028é."}, "",
                 {"messages": [USER, ASSISTANT]}, "  ",
                 json.dumps({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, ensure_ascii=False))
    short, same, first, long = read_examples(path, tokenizer, EOS_ID, 500)
    assert short == same == first == (tokenizer.chat([USER]), short[1])
    assert long == (tokenizer.chat([USER, ASSISTANT, USER]), short[1])
    *answer, eos = short[1]
    ending = {"llada": "<|eot_id|>", "dream": "<|im_end|>"}[family]
    assert tokenizer.decode(answer) == "Yes\u2028é." + ending and eos == EOS_ID


@pytest.mark.parametrize("line", [
    "{", "nonsense", "[1]", "3", "null", {}, {"prompt": "Hi?"}, {"prompt": "Hi?", "response": None},
    {"prompt": "Hi?", "response": ""}, {"prompt": "Hi?", "response": 3}, {"response": "Yes."},
    {"prompt": None, "response": "Yes."}, {"prompt": 3, "response": "Yes."}, {"messages": []},
    {"messages": [ASSISTANT]}, {"messages": [USER]}, {"messages": [USER, USER]},
    {"messages": "Hi?"}, {"messages": [USER, {"role": "assistant"}]}, {"messages": [3, ASSISTANT]},
    {"messages": [{"role": 3, "content": "Hi?"}, ASSISTANT]}, {"messages": [USER, "Yes."]},
    {"messages": [USER, ASSISTANT], "prompt": "Hi?", "response": "No."}], ids=str)
def test_lines_that_are_no_example(tokenizers, tmp_path, line):
    """The file and the line are named."""
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"}, "", line)
    with pytest.raises(InputError) as caught:
        read_examples(path, tokenizers["llada"], EOS_ID, 500)
    assert f"{path}:3" in str(caught.value)


@pytest.mark.parametrize("line", [
    {"prompt": "Hi?", "response": "a<|mask|>b"}, {"prompt": "<|mask|>", "response": "b"},
    {"messages": [{"role": "user", "content": "a<|mask|>"}, ASSISTANT]},
    {"prompt": "Hi?", "response": "\ud800"}, {"prompt": "\udfff", "response": "b"},
    '{"prompt": "a", "response": "b", "weight": NaN}'], ids=str)
def test_what_no_example_may_hold(tmp_path, line):
    """A mask stands for what is not there, half a surrogate pair is no text, and NaN no JSON: the
    file and the line."""
    tokenizer = Tokenizer(byte_tokenizer({"<|mask|>": MASK_ID, "<|eot_id|>": EOS_ID}))
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"}, line)
    with pytest.raises(InputError, match=r"x\.jsonl:2: "):
        read_examples(path, tokenizer, EOS_ID, 500, MASK_ID)


def test_files_that_were_put_together(tokenizers, tmp_path):
    """A byte order mark in front of any line is none of it; what is not UTF-8 names its line."""
    path = tmp_path / "x.jsonl"
    line = b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n'
    path.write_bytes(line + line)
    assert len(read_examples(path, tokenizers["llada"], EOS_ID, 500)) == 2
    path.write_bytes(line + b'{"prompt": "\xff", "response": "b"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: not UTF-8"):
        read_examples(path, tokenizers["llada"], EOS_ID, 500)


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_files_without_examples(tokenizers, tmp_path, content):
    """A file that is absent or empty is named."""
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="x.jsonl"):
        read_examples(path, tokenizers["llada"], EOS_ID, 500)


def test_examples_that_are_too_long(tokenizers, tmp_path, capsys):
    """Answers are cut at the length; a prompt that leaves less than 8 positions drops its example,
    which is said; a file of nothing else is refused."""
    tokenizer = tokenizers["llada"]
    n = len(tokenizer.chat([USER]))
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "Hi?", "response": "x" * 50},
                 {"prompt": "Hi?!", "response": "y" * 50}, {"prompt": "Hi?", "response": "z"})
    first, last = read_examples(path, tokenizer, EOS_ID, n + 8)
    assert [len(p + a) for p, a in (first, last)] == [n + 8, n + 3]
    assert tokenizer.decode(first[1]) == "x" * 8 and last[1][-1] == EOS_ID
    said = capsys.readouterr().err
    assert f"3 lines, 2 answers to learn, 1 of them cut at --max-length {n + 8}; left out 1 " \
        "whose prompts are too long for it, 0 that say" in said
    assert len(read_examples(path, tokenizer, EOS_ID, n + 9)) == 3
    assert "2 of them cut" in capsys.readouterr().err
    assert len(read_examples(path, tokenizer, EOS_ID, 500)) == 3
    assert capsys.readouterr().err == ""  # nothing but what one would expect
    with pytest.raises(InputError, match="no example that fits into 20 tokens"):
        read_examples(path, tokenizer, EOS_ID, 20)


SYSTEM = {"role": "system", "content": "Be brief."}
OTHER = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize("line, turns", [
    ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "No."}]},
     [[USER, OTHER]]),
    ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi?"},
                        {"from": "gpt", "value": "No."}, {"from": "human", "value": "Hi?"}],
      "id": "x"}, [[SYSTEM, USER, OTHER]]),
    ({"conversations": [{"from": "gpt", "value": "No."}, {"from": "human", "value": "Hi?"},
                        {"from": "gpt", "value": "No."}]}, [[OTHER, USER, OTHER]]),
    ({"instruction": "Hi?", "input": "", "output": "No."}, [[USER, OTHER]]),
    ({"instruction": "Hi?", "input": "Ann", "output": "No."},
     [[{"role": "user", "content": "Hi?\n\nAnn"}, OTHER]]),
    ({"messages": [USER, OTHER, USER, {"role": "assistant", "content": " "}, USER, ASSISTANT]},
     [[USER, OTHER], [USER, OTHER, USER, {"role": "assistant", "content": " "}, USER, ASSISTANT]])],
    ids=str)
def test_forms_that_are_found(family, tokenizers, tmp_path, capsys, line, turns):
    """ShareGPT's and Alpaca's records; every turn of the assistant's that says something, but one
    that nothing is before, and how many these are."""
    tokenizer = tokenizers[family]
    found = read_examples(jsonl(tmp_path / "x.jsonl", line), tokenizer, EOS_ID, 500)
    assert found == [(tokenizer.chat(messages[:-1]),
                      [*tokenizer.answer(messages[-1]["content"]), EOS_ID]) for messages in turns]
    said = [m for m in messages_of(line, "") if m["role"] == "assistant"]
    assert (f"; left out 0 whose prompts are too long for it, {len(said) - len(turns)} that say "
            in capsys.readouterr().err) == (len(said) > len(turns) or len(turns) > 1)


@pytest.mark.parametrize("line, words", [
    ({"conversations": [{"from": "robot", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a role"),
    ({"conversations": []}, "no response"), ({"conversations": 3}, "no response"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "no response"),
    ({"instruction": "a"}, "no response"), ({"instruction": "a", "output": 3}, "no response"),
    ({"instruction": "a", "output": "b", "prompt": "c"}, "only one"),
    ({"messages": [USER, ASSISTANT], "conversations": []}, "only one")], ids=str)
def test_forms_that_are_none(tokenizers, tmp_path, line, words):
    with pytest.raises(InputError, match=f"x.jsonl:1: .*{words}"):
        read_examples(jsonl(tmp_path / "x.jsonl", line), tokenizers["llada"], EOS_ID, 500)


def test_several_files_and_patterns(tmp_path, monkeypatch):
    """Comma-separated, in the order of their names where a pattern finds them; a name with a comma
    is a name; what is not there is said; a run knows all of them by content."""
    running = contextvars.copy_context()
    for name in ("b,c", "a1", "a2"):
        jsonl(tmp_path / f"{name}.jsonl", {"prompt": name, "response": "x"})

    def texts(data: str) -> list[str]:
        return [messages[0]["content"] for _, messages in data_file(data).records]

    def check() -> None:
        cli.running.set(True)
        one, many = f"{tmp_path}/b,c.jsonl", f"{tmp_path}/a*.jsonl"
        assert texts(one) == ["b,c"] and texts(many) == ["a1", "a2"]
        assert texts(f"{tmp_path}/a2.jsonl, {many}") == ["a2", "a1", "a2"]
        assert data_file(many).files == [f"{tmp_path}/a1.jsonl", f"{tmp_path}/a2.jsonl"]
        for wrong in ("nosuch.jsonl", "nosuch*", "nosuch" * 1000):
            with pytest.raises(argparse.ArgumentTypeError, match="nosuch"):
                data_file(f"{many},{tmp_path}/{wrong}")

    running.run(check)


def numbered(count: int) -> list[tuple[list[int], list[int]]]:
    """Examples of different lengths that can be told apart by any of their tokens."""
    return [([i] * (1 + i % 3), [i] * (2 + i % 5)) for i in range(count)]


def drawn(draw: Callable, steps, micros: int, held_out: bool = False) -> list[int]:
    """Which examples the batches of the steps hold, in order."""
    return [int(row[0]) for step in steps for micro in range(micros)
            for row in draw(step, micro, held_out)[0]]


def test_batches_are_padded_on_the_right():
    """Prompt, answer, then pads; a batch without padding has no mask, and each is as wide as its
    longest row."""
    pairs = {p[0]: (p, a) for p, a in numbered(40)}
    draw, masks = file_batches(numbered(40), 99, 3, 1, seed=0), []
    for step in range(10):
        ids, answer, pad = draw(step, 0)
        for i, row in enumerate(ids):
            prompt, reply = pairs[int(row[0])]
            rest = ids.shape[1] - len(prompt) - len(reply)
            assert row.tolist() == prompt + reply + [99] * rest
            kinds = [0] * len(prompt) + [1] * len(reply) + [2] * rest
            assert answer[i].tolist() == [kind == 1 for kind in kinds]
            padded = [False] * len(row) if pad is None else pad[i].tolist()
            assert padded == [kind == 2 for kind in kinds]
        assert pad is None or not pad.all(0).any()
        masks.append(pad)
    assert any(pad is not None for pad in masks)
    assert file_batches(numbered(1), 99, 2, 1, seed=0)(0, 0)[2] is None


@pytest.mark.parametrize("size, micros", [(1, 1), (3, 2), (7, 2), (50, 1)])
def test_every_example_once_an_epoch(size, micros):
    """Over the steps each training example comes once before any comes again, in another order each
    epoch; batches may span two."""
    draw = file_batches(numbered(40), 99, size, micros, seed=0)
    kept = 40 - 40 // 8
    order = drawn(draw, range(-(-3 * kept // (size * micros))), micros)
    epochs = [order[i * kept:(i + 1) * kept] for i in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) == list(range(5, 40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_depend_on_step_and_micro_alone():
    """What a resumed run draws is what the first one drew; another seed draws otherwise."""
    def orders(seed, steps):
        draw = file_batches(numbered(40), 99, 4, 2, seed=seed)
        return {step: drawn(draw, [step], 2) for step in steps}

    straight = orders(0, range(20))
    jumping = orders(0, [19, 3, 11, 0, 19])
    assert jumping == {step: straight[step] for step in jumping}
    assert orders(1, range(20)) != straight


@pytest.mark.parametrize("count, kept", [(8, 1), (40, 5), (600, 64)])
def test_held_out_examples_are_never_trained_on(count, kept):
    """At most 64 and at most an eighth, disjoint from what is trained on for ever."""
    draw = file_batches(numbered(count), 9999, 4, 2, seed=0)
    held = set(drawn(draw, [-1], 20, held_out=True))
    trained = set(drawn(draw, range(count // 2), 2))
    assert not held & trained and len(held) == kept and len(trained) == count - kept


# ------------------------------------------------------------------ the Tulu-3 mixture
class Rows(list):
    """As much of a `datasets.Dataset` as is used."""

    def shuffle(self, seed):
        return Rows(random.Random(seed).sample(self, len(self)))

    def select(self, indices):
        return Rows(self[i] for i in indices)


def test_the_mixture_needs_datasets(tmp_path, monkeypatch):
    """Without the optional package: what to install, and the other way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets.*--data"):
        tulu(0)
    assert not (tmp_path / "data").exists()


def test_the_mixture_is_prepared_once(tmp_path, monkeypatch, tokenizers):
    """Picked by seed, kept as JSONL that read_examples takes, and not asked for again."""
    calls = []
    rows = Rows({"messages": [{"role": "user", "content": f"{i}\u00e9"}, ASSISTANT], "id": i}
                for i in range(20))
    fake = SimpleNamespace(load_dataset=lambda *a, **k: calls.append((a, k)) or rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    path = tulu(3, number=7)
    assert calls == [(("allenai/tulu-3-sft-mixture",), {"split": "train"})]
    kept = [json.loads(line)["messages"] for line in path.read_text().split("\n") if line]
    assert kept == [row["messages"] for row in rows.shuffle(seed=3)[:7]]
    assert len(read_examples(path, tokenizers["dream"], EOS_ID, 500)) == 7
    assert tulu(3, number=7) == path and len(calls) == 1
    assert tulu(4, number=7) != path and len(calls) == 2


# ------------------------------------------------------------------ tasks
LENGTH = 24  # of the tiny model's answers


@pytest.fixture(scope="module")
def tiny(small_ckpt) -> Tokenizer:
    """The shipped models' tokenizer."""
    return load(small_ckpt, "cpu")[1]


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


@pytest.mark.parametrize("task", [*TASKS.values(), Reverse()], ids=[*TASKS, "from outside"])
@pytest.mark.parametrize("held_out", [True, False])
def test_batches_hold_prompts_and_answers(task, tiny, held_out):
    """Prompts of one length but those of stories, answers that fit with EOS behind them, all from
    the side asked for."""
    rng, story = random.Random(3), task is TASKS["stories"]
    # of a story, letter by letter, and of a sudoku of 6 x 6
    length, number = {"stories": (999, 15), "sudoku6": (48, 15), "sudoku6-hard": (48, 2)}.get(
        next((name for name in TASKS if TASKS[name] is task), ""), (LENGTH, 15))
    pairs = [draw(task, rng, held_out) for _ in range(number)]
    prompts, answers, pad = task_batch(pairs, tiny, 1, length)
    assert len(prompts) == number and answers.shape == (number, length) and (pad is None) != story
    if story:
        prompts = [prompt[~hidden] for prompt, hidden in zip(prompts, pad)]
    for prompt, row, pair in zip(prompts, answers.tolist(), pairs):
        assert 1 in row  # an end that the model learns to write
        answer = row[:row.index(1)]
        assert set(row[len(answer):]) == {1}
        prompt, answer = tiny.decode(prompt), tiny.decode(answer)
        assert (prompt, answer) == pair and task.check(prompt, answer)
        assert is_held_out(task, prompt, answer) == held_out


def test_prompts_of_different_lengths_are_padded_in_front(tiny):
    """Their mask comes with them."""
    rng = random.Random(0)
    pairs = [Ragged().make(rng) for _ in range(6)]
    prompts, answers, pad = task_batch(pairs, tiny, 1, LENGTH)
    assert pad.any()
    for prompt, hidden, (text, _) in zip(prompts, pad, pairs):
        assert tiny.decode(prompt[~hidden]) == text and set(prompt[hidden].tolist()) <= {1}


def test_an_answer_that_is_too_long_is_refused(tiny):
    """Rather than cut: the model could not write it in the positions that it has."""
    assert task_batch([("a", "x" * 24)], tiny, 1, LENGTH)[1].shape == (1, 24)
    with pytest.raises(InputError, match="longer than 24 tokens"):
        task_batch([("a", "b"), ("a", "x" * 25)], tiny, 1, LENGTH)


def test_tasks_take_turns(tiny):
    """One a micro-batch, over the steps; the answer is the last positions; the same for one (step,
    micro), another for another, another seed, and for what is held out."""
    names = ["sums", "chain", "follow"]
    batch = task_batches(draw, tiny, 1, LENGTH, names, 3, 2, seed=0)
    for step, micro, name in ((0, 0, "sums"), (0, 1, "chain"), (1, 0, "follow"), (1, 1, "sums"),
                              (4, 1, "sums"), (5, 0, "chain")):
        for held_out in (False, True):
            ids, answer, pad = batch(step, micro, held_out)
            assert pad is None and answer.sum(1).tolist() == [LENGTH] * 3
            assert answer[:, -LENGTH:].all()
            for row in ids:
                prompt = tiny.decode(row[:-LENGTH])
                reply = tiny.decode(row[-LENGTH:], skip_special=True)
                assert TASKS[name].check(prompt, reply)
                assert is_held_out(TASKS[name], prompt, reply) == held_out
    again = task_batches(draw, tiny, 1, LENGTH, names, 3, 2, seed=0)
    other = task_batches(draw, tiny, 1, LENGTH, names, 3, 2, seed=1)
    assert torch.equal(again(4, 1)[0], batch(4, 1)[0])
    assert not torch.equal(batch(1, 1)[0], batch(4, 1)[0])
    assert not torch.equal(other(4, 1)[0], batch(4, 1)[0])


def test_a_task_from_outside_takes_its_turn(tiny, monkeypatch):
    """The shipped tokenizer has no token for its name; its prompts are padded all the same, and the
    mask covers prompt and answer."""
    monkeypatch.setitem(TASKS, "reverse", Ragged())
    ids, answer, pad = task_batches(draw, tiny, 1, LENGTH, ["reverse"], 5, 1, seed=0)(0, 0)
    assert pad.any() and pad.shape == ids.shape == answer.shape and not (pad & answer).any()


# ------------------------------------------------------------------ which of them
def asked(ckpt, **options) -> SimpleNamespace:
    """What a command line asks for."""
    return SimpleNamespace(**dict(ckpt=str(ckpt), data=None, batch_size=2, micros=2, seed=0,
                                  max_length=500, device="cpu") | options)


SPECIAL = SimpleNamespace(eos_id=1, pad_id=1, mask_id=2, max_len=500)


def test_the_tasks_that_the_checkpoint_names_are_its_data(small_ckpt, tiny, tmp_path):
    """Without --data; with it the file."""
    batch = choose_data(asked(small_ckpt), tiny, SPECIAL, draw)
    assert tiny.decode(batch(0, 0)[0][0]).startswith("sudoku\n")
    file = jsonl(tmp_path / "x.jsonl", *[{"prompt": "Hi?", "response": "Yes."}] * 9)
    ids, answer, _ = choose_data(asked(small_ckpt, data=str(file)), tiny, SPECIAL, draw)(0, 0)
    assert tiny.decode(ids[0][answer[0]], skip_special=True) == "Yes."


def test_no_data_and_no_datasets(text_ckpt, tiny, tmp_path, monkeypatch):
    """A checkpoint without tasks, no file, no `datasets`: what to do is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        choose_data(asked(text_ckpt), tiny, SPECIAL, draw)


def test_a_checkpoint_that_names_an_unknown_task(ckpt, tiny):
    """The checkpoint, the task and those there are."""
    (ckpt / "generation_config.json").write_text('{"tasks": ["sums", "chess"]}')
    with pytest.raises(InputError, match=f"{ckpt}.*chess.*sudoku"):
        choose_data(asked(ckpt), tiny, SPECIAL, draw)


@pytest.mark.parametrize("options, ckpt, K, reveal", [
    ((), "tiny", [4, 4, 12], "surest"), ((), "text", [4], "random"),
    (("--data", "file"), "tiny", [4], "random"), (("--K", "3"), "tiny", [3], "surest"),
    (("--reveal", "surest", "--data", "file"), "tiny", [4], "surest")])
def test_texts_are_walked_as_published(options, ckpt, K, reveal, text_ckpt, tmp_path):
    """Tasks otherwise; and what is asked for is done."""
    file = tmp_path / "file.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    args = parser().parse_args(["--ckpt", "tiny" if ckpt == "tiny" else str(text_ckpt),
                                *(str(file) if word == "file" else word for word in options)])
    training_defaults(args, large=False)
    assert (args.K, args.reveal, args.batch_size, args.steps) == (K, reveal, 8, 2000)
