"""Training examples from files and tasks, as batches of ids."""
from __future__ import annotations

import json
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

from lib.ahead import ahead
from lib.cli import InputError, require
from lib.conversations import read_records
from lib.files import write_atomic
from lib.hub import CHECKPOINTS, stated
from lib.progress import progress, slow
from lib.prompts import at, no_mask, prompt_ids
from lib.run import first_process_first, local_device, processes
from lib.terminal import note
from lib.tokenizer import Tokenizer

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # ids, answer mask, pad mask


def left_pad(rows: list[list[int]], pad_id: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (B, P) ids padded on the left, and (B, P) True where padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows], device=device)
    pad = torch.tensor([[True] * (width - len(r)) + [False] * len(r) for r in rows], device=device)
    return ids, pad


def move(data, device) -> list:
    """The tensors of a batch on a device, which the CPU does not wait for; what is None stays."""
    return [None if x is None else x.to(device, non_blocking=True) for x in data]


def named_tasks(args) -> tuple[int, list[str]]:
    """The length of an answer and the names of the tasks to train on; none where it is on texts."""
    return stated(args.ckpt) if args.data is None else (0, [])


def training_defaults(args, large: bool) -> None:
    """Fill in what train.py was not told. 8B and 7B take their examples one by one and recompute
    their blocks, to fit 40 GB; one pass over 50,000 examples. Texts are unrolled as published. For
    tasks K is 12 too, and the surest tokens come first: where one answer is right a memory gains
    most by that, where many are it does harm (docs/results.md)  # our choice"""
    text = not named_tasks(args)[1]
    for name, there, then, usual in (
            ("batch_size", large, 1, 8), ("micros", large, 16, 4), ("steps", large, 3125, 2000),
            ("checkpointing", large, True, False), ("K", text, [4], [4, 4, 12]),
            ("reveal", text, "random", "surest")):
        if getattr(args, name) is None:
            setattr(args, name, then if there else usual)


def choose_data(args, tokenizer: Tokenizer, c, draw: Callable) -> Callable[..., Batch]:
    """The batches that a training command asks for: the file of --data, else the tasks that the
    checkpoint names, else the Tulu-3 mixture. draw(name, rng, held_out) makes a task's example; c
    has eos_id, pad_id and max_len."""
    length, tasks = named_tasks(args)
    if tasks:
        try:
            for name in tasks:
                draw(name, random.Random(0), False)
        except ValueError as error:
            raise InputError(f"{args.ckpt}: its generation_config.json: {error}") from error
        return task_batches(draw, tokenizer, c.eos_id, length, tasks, args.batch_size, args.micros,
                            args.seed, local_device(args.device))
    args.data = args.data or first_process_first(lambda: tulu(args.seed))
    examples = read_examples(args.data, tokenizer, c.eos_id, min(args.max_length, c.max_len),
                             c.mask_id)
    return file_batches(examples, c.pad_id, args.batch_size, args.micros, args.seed)


# ------------------------------------------------------------------ tasks
def task_batch(pairs: list[tuple[str, str]], tokenizer: Tokenizer, eos_id: int,
               length: int) -> Batch:
    """(prompt, answer) texts -> prompts (B, P), answers (B, length) with EOS behind, and (B, P)
    True where a prompt is padded on the left, or None where all are of one length. Raises
    `InputError` for an answer longer than `length`."""
    prompts, pad_mask = left_pad([tokenizer.encode(p) for p, _ in pairs], eos_id)
    answers = [tokenizer.encode(a) for _, a in pairs]
    require(max(map(len, answers)) <= length, f"the answer {max((a for _, a in pairs), key=len)!r} "
            f"is longer than {length} tokens")
    answers = torch.tensor([a + [eos_id] * (length - len(a)) for a in answers])
    return prompts, answers, pad_mask if bool(pad_mask.any()) else None


def task_batches(draw: Callable, tokenizer: Tokenizer, eos_id: int, length: int, names: list[str],
                 size: int, micros: int, seed: int, device=None) -> Callable[..., Batch]:
    """batch(step, micro, held_out) -> (ids, answer_mask, pad_mask) of tasks, one task per
    micro-batch in turn. draw(name, rng, held_out) -> (prompt, answer). For a GPU those to train on
    are made ahead."""
    make = partial(_task_batch, draw, tokenizer, eos_id, length, names, size, micros, seed)

    def after(key: tuple[int, int]) -> tuple[int, int]:  # what this process asks for next
        return divmod(key[0] * micros + key[1] + processes()[1], micros)

    made = ahead(make, after, device)

    def batch(step: int, micro: int, held_out: bool = False) -> Batch:
        return make((step, micro), True) if held_out else made((step, micro))

    return batch


def _task_batch(draw, tokenizer, eos_id, length, names, size, micros, seed, key: tuple[int, int],
                held_out: bool = False) -> Batch:
    step, micro = key
    rng = random.Random(f"{seed} {step} {micro}")
    name = names[(step * micros + micro) % len(names)]
    pairs = [draw(name, rng, held_out) for _ in range(size)]
    prompts, answers, pad = task_batch(pairs, tokenizer, eos_id, length)
    ids = torch.cat([prompts, answers], 1)
    answer = torch.arange(ids.shape[1]) >= prompts.shape[1]
    return (ids, answer.repeat(len(ids), 1),
            None if pad is None else F.pad(pad, (0, length)))


# ------------------------------------------------------------------ files
def read_examples(path: str | Path, tokenizer: Tokenizer, eos_id: int, max_length: int,
                  mask_id: int | None = None) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids of files of conversations, in the format in which sampling asks: each of
    the assistant's turns is an answer, of which all before is the prompt. An answer ends with EOS
    and is cut where the two together pass max_length; one whose prompt leaves less than 8 positions
    is dropped, and one that says nothing or that nothing is before; how many were is said. Raises
    `InputError` with the file and line number, also for the mask token, which would stand for
    something that is not there."""
    records = getattr(path, "records", None) or read_records(path)
    examples, dropped, idle, cut = [], 0, 0, 0
    for where, messages in progress(records, f"examples of {path}", bar=False):
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0 or not message["content"].strip():
                idle += 1
                continue
            with at(where):
                prompt = prompt_ids(messages[:i], tokenizer, False, mask_id)
                answer = tokenizer.answer(message["content"]) + [eos_id]
                no_mask(answer, tokenizer, mask_id, "the response")
            if len(prompt) > max_length - 8:
                dropped += 1
            else:
                cut += len(prompt) + len(answer) > max_length
                examples.append((prompt, answer[:max_length - len(prompt)]))
    require(bool(examples), f"{path} holds no example that fits into {max_length} tokens")
    if cut or len(examples) != len(records) or idle:
        note(f"{path}: {len(records)} lines, {len(examples)} answers to learn, {cut} of them cut "
             f"at --max-length {max_length}; left out {dropped} whose prompts are too long for it, "
             f"{idle} that say nothing or that nothing is before")
    return examples


def file_batches(examples: list[tuple[list[int], list[int]]], pad_id: int, size: int, micros: int,
                 seed: int) -> Callable[..., Batch]:
    """batch(step, micro, held_out) -> (ids, answer_mask, pad_mask) of examples padded on the right.
    The first 64 (at most an eighth) are held out; the others come in a new order every epoch."""
    kept = min(64, len(examples) // 8)
    held, train = examples[:kept] or examples, examples[kept:]
    orders: dict[int, list[int]] = {}

    def pick(index: int):
        epoch, offset = divmod(index, len(train))
        if epoch not in orders:
            orders.clear()
            orders[epoch] = random.Random(f"{seed} {epoch}").sample(range(len(train)), len(train))
        return train[orders[epoch][offset]]

    def batch(step: int, micro: int, held_out: bool = False) -> Batch:
        first = micro * size if held_out else (step * micros + micro) * size
        rows = [held[(first + i) % len(held)] if held_out else pick(first + i) for i in range(size)]
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((size, width), pad_id)
        answer, pad = torch.zeros(size, width, dtype=torch.bool), torch.ones(size, width).bool()
        for i, (p, a) in enumerate(rows):
            ids[i, :len(p) + len(a)] = torch.tensor(p + a)
            answer[i, len(p):len(p) + len(a)] = True
            pad[i, :len(p) + len(a)] = False
        return ids, answer, pad if bool(pad.any()) else None

    return batch


NO_DATASETS = ("preparing the Tulu-3 mixture needs the datasets package: pip install datasets, or "
               "pass your own --data FILE.jsonl")


def tulu_path(seed: int, number: int = 50_000) -> Path:
    """Where examples of the Tulu-3 SFT mixture, picked by seed, are kept."""
    return Path("data") / f"tulu3-{number}-seed{seed}.jsonl"


def check_source(args) -> None:
    """Raise an `InputError` before a large checkpoint is loaded to be trained on the Tulu-3 mixture
    that is not there and cannot be prepared."""
    published = isinstance(CHECKPOINTS.get(args.ckpt, 0), str) or args.ckpt in CHECKPOINTS.values()
    if published and args.data is None and not tulu_path(args.seed).is_file():
        require(find_spec("datasets") is not None, NO_DATASETS)


def tulu(seed: int, number: int = 50_000) -> Path:
    """The paper's data: examples of the Tulu-3 SFT mixture, picked by seed, prepared once through
    the optional `datasets` package and kept as JSONL."""
    path = tulu_path(seed, number)
    if not path.is_file():
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(NO_DATASETS) from error
        with slow("downloading the Tulu-3 mixture"):
            rows = load_dataset("allenai/tulu-3-sft-mixture", split="train")
            rows = rows.shuffle(seed=seed).select(range(number))

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n")

        write_atomic(path, write)
    return path
