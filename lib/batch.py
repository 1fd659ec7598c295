"""A file of prompts answered in batches: a JSON object a line, in the order of the file, by one
process or several; a run that was cut off goes on in its --out file where it stopped."""
from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from lib import identity
from lib.answers import Ends, end_tokens, written
from lib.cli import InputError, require
from lib.data import left_pad
from lib.files import parse_json, read_json, to_json, write_text
from lib.outputs import lock
from lib.progress import slow
from lib.prompts import Prompt
from lib.run import everyone, first_process_first, processes
from lib.terminal import complain, note
from lib.tokenizer import Tokenizer
from lib.watch import Watched

OURS = {"text", "finish_reason", "tokens", "forwards", "seconds", "batch"}
TURN = 4     # batches of each of several processes, until they wait for each other
WINDOW = 32  # batches: within so many, prompts of like length are answered together
ELSEWHERE = ("out", "prompts", "device", "compile", "quiet", "delay")  # change no answer


def answer_file(args, decode: Callable, prompts: list[Prompt], tokenizer: Tokenizer, special,
                device, watched: Watched | None = None) -> int:
    """Answer prompts by `decode(ids, pad_mask=..., generator=..., on_step=...)` and write a line
    for each, as of `Prompt`: to stdout, or to args.out. special has mask_id, eos_id and pad_id; of
    args also batch_size, seed and stop. Each prompt has noise of its own, by its place in the file,
    so that neither its batch nor the process that answers it matters. Returns the exit code: 1
    where a prompt has an error."""
    rank, world = processes()
    lines = first_process_first(lambda: Lines(args, prompts) if rank == 0 else None)
    done, began = everyone(lines and lines.done)[0], time.monotonic()
    left = {i for i, prompt in enumerate(prompts) if i >= done and not prompt.error}
    whole = len(left)

    def pace() -> str:
        rate = (whole - len(left)) / (time.monotonic() - began)
        return (f", {len(prompts) - len(left)} of {len(prompts)}, {rate:.3g} prompts/s, "
                f"{tqdm.format_interval(len(left) / rate)} left" if rate else "")

    bar = tqdm(total=len(prompts), initial=len(prompts) - whole, unit=" prompts",
               disable=None if rank == 0 and not sys.stdout.isatty() else True)
    with contextlib.closing(lines) if lines else contextlib.nullcontext(), bar, slow(
            "answering", pace, not bar.disable or rank > 0):
        for window in windows(prompts, args.batch_size, special.mask_id):
            todo = [batch for batch in window if max(batch) >= done]
            each = world * (TURN if world > 1 else 1)
            for start in range(0, len(todo), each):
                found: dict[int, dict] = {}
                problem = None
                try:
                    for batch in todo[start:start + each][rank::world]:
                        found |= answers(args, decode, batch, prompts, tokenizer, special, device,
                                         watched)
                except InputError as error:  # ends all processes, once they have what was found
                    problem = error
                shared = everyone((found, problem))
                for records, _ in shared:
                    bar.update(len(left & records.keys()))
                    left -= records.keys()
                    if lines:
                        lines.add(records)
                if problems := [error for _, error in shared if error]:
                    everyone(None)  # torchrun ends all when one ends: not before all is written
                    raise problems[0]
    everyone(None)
    bad = sum(bool(prompt.error) for prompt in prompts)
    if bad and rank == 0:
        complain(f"{bad} of {len(prompts)} prompts have no answer: their lines say why")
    return int(bad > 0)


def windows(prompts: list[Prompt], size: int, mask_id: int) -> list[list[list[int]]]:
    """The indices of the prompts that can be answered, as batches of at most `size`, some dozens of
    batches at a time: among these a batch has prompts of like length, the longest first, and of as
    many masks, for which `generate` takes steps of their own. They do not depend on where a run
    begins."""
    def masks(i: int) -> int:
        return list(prompts[i].ids).count(mask_id)

    good, span = [i for i, prompt in enumerate(prompts) if not prompt.error], WINDOW * size
    found = []
    for start in range(0, len(good), span):
        part = good[start:start + span]
        if size > 1:
            part.sort(key=lambda i: (masks(i), -len(prompts[i].ids)))
        alike = (list(same) for _, same in groupby(part, masks))
        found.append([same[i:i + size] for same in alike for i in range(0, len(same), size)])
    return found


def answers(args, decode: Callable, batch: list[int], prompts: list[Prompt], tokenizer: Tokenizer,
            special, device, watched: Watched | None) -> dict[int, dict]:
    """The records of a batch of prompts, by their places in the file."""
    ids, pad = left_pad([prompts[i].ids for i in batch], special.pad_id, device)
    ends = Ends(tokenizer, special.mask_id, end_tokens(tokenizer, special.eos_id),
                [args.stop] * len(batch), ids.shape[1])
    seen: list[list[dict]] = [[] for _ in batch]

    def on_step(step) -> bool:
        if watched:
            for row, steps in enumerate(seen):
                steps.append(watched.of_row(row))
        return bool(args.stop) and ends(step)

    generators = [torch.Generator(device).manual_seed(random.Random(
        f"{args.seed} {i}").getrandbits(62)) for i in batch]
    sample = decode(ids, pad_mask=pad, generator=generators, on_step=on_step)
    records = {}
    for row, (i, found) in enumerate(zip(batch, sample.ids)):
        prompt = prompts[i].ids
        ours = written(prompt, found[ids.shape[1] - len(prompt):].tolist(), ends, row)._asdict()
        ours |= {"forwards": sample.forwards, "seconds": round(sample.seconds, 4),
                 "batch": len(batch)} | ({"steps": seen[row]} if watched else {})
        records[i] = prompts[i].answered(ours)
    return records


class Lines:
    """The lines of the answers in the order of the prompts, each written once all before it are: to
    stdout, or to args.out, in which whole lines that belong to these prompts and options stay.
    Raises `InputError` for a file that holds something else, or that another process writes to."""

    def __init__(self, args, prompts: list[Prompt]):
        self.prompts, self.ready, self.done = prompts, {}, 0
        with contextlib.ExitStack() as opened:
            if args.out:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            self.file = opened.enter_context(open(args.out, "ab+")) if args.out else None
            if args.out:
                opened.callback(os.close, lock(args.out))
                self._go_on(Path(args.out), args)
            self.close = opened.pop_all().close
        self.add({})

    def _go_on(self, path: Path, args) -> None:
        """Count the lines that are there, and cut half a one away."""
        beside, prompts = Path(f"{path}.settings.json"), self.prompts
        settings = {name: value for name, value in vars(args).items() if name not in ELSEWHERE}
        settings["memory"] = settings["memory"] and identity.of_file(settings["memory"])
        self.file.seek(0)
        *lines, cut_short = self.file.read().split(b"\n")
        if lines or cut_short:
            other = f"pass another --out, or delete it and {beside.name}"
            require(beside.is_file(), f"{path} is there, and holds no answers of this command "
                    f"({beside.name} is missing): pass another --out")
            stored = read_json(beside)
            changed = sorted(k for k in {*settings, *stored} if settings.get(k) != stored.get(k))
            require(not changed, f"{path} is of a run with other options ({', '.join(changed)}): "
                    f"{other}")
            require(len(lines) <= len(prompts), f"{path} has more lines than there are prompts: "
                    f"{other}")
            for i, (line, prompt) in enumerate(zip(lines, prompts)):
                require(belongs(line.decode(errors="replace"), prompt), f"{path}:{i + 1} is no "
                        f"answer to the prompt of that place: {other}")
            self.file.truncate(sum(len(line) + 1 for line in lines))
            note(f"{path} has {len(lines)} of {len(prompts)} lines")
        write_text(beside, to_json(settings) + "\n")
        self.done = len(lines)

    def add(self, records: dict[int, dict]) -> None:
        """Take in records by their places, and write all whose turn it is."""
        self.ready |= records
        while self.done < len(self.prompts):
            prompt = self.prompts[self.done]
            record = prompt.refused() if prompt.error else self.ready.pop(self.done, None)
            if record is None:
                break
            self._write(to_json(record) + "\n")
            self.done += 1

    def _write(self, line: str) -> None:
        if self.file is None:
            print(line, end="", flush=True)
        else:
            self.file.write(line.encode())
            self.file.flush()


def belongs(line: str, prompt: Prompt) -> bool:
    """Whether a line is what was, or could have been, written for a prompt."""
    try:
        found = parse_json(line, "")
    except InputError:
        return False
    if prompt.error:  # whose words name the file, wherever that was then
        return found.keys() == {"id", "error"} and found["id"] == prompt.refused()["id"]
    again = prompt.answered({name: found[name] for name in found.keys() & OURS})
    return OURS <= found.keys() and all(found.get(name) == again.get(name) for name in
                                        (found.keys() | again.keys()) - {"steps"})
