"""What a person sees of a generation: the live view on a terminal, the answer and its figures."""
from __future__ import annotations

import functools
import random
import shutil
import sys
import time
import unicodedata
from collections import Counter
from typing import Callable, Sequence, TextIO

import torch

from lib.answers import Ends, end_tokens, held, written
from lib.asked import Asked, share, understood, unknown_to
from lib.batch import answer_file
from lib.chat import chat
from lib.cli import require
from lib.hub import stated
from lib.progress import slow
from lib.prompts import fillable_ids, masks_in, read_prompts
from lib.run import processes, read_once
from lib.terminal import note, printable
from lib.tokenizer import Tokenizer
from lib.watch import Bars, Watched

MASK, NEWLINE = "\u2591", "\u23ce"  # how a masked position and, on one line, a line break look
DIM, FRESH, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"


class LiveView:
    """Shows row 0 of a generation denoise. On a terminal every step redraws the same lines: masked
    positions as a light block, what the step committed in bold green, and a status line beneath,
    until `end` takes them away: what fits into a window is not the answer. Anywhere else every step
    is one plain line."""

    def __init__(self, tokenizer: Tokenizer, mask_id: int, eos_id: int, prompt_length: int,
                 stream: TextIO, delay: float = 0.0,
                 further: Callable[[], list[str]] = list):
        self.further = further  # lines more for each step
        self.tokenizer, self.mask_id, self.eos_id = tokenizer, mask_id, eos_id
        self.prompt_length, self.terminal = prompt_length, stream.isatty()
        self.stream = getattr(stream, "unfiltered", stream)  # it moves the cursor on purpose
        self.delay = delay   # seconds to rest after each frame on a terminal
        self.rested = 0.0    # seconds so far, which are none of the model's
        self.drawn = 0       # lines of the last frame

    def __call__(self, step) -> None:
        if not self.terminal:
            text = "".join(t for t, _ in self.runs(step, False)).replace("\n", NEWLINE)
            print(f"{step.forwards:4d}  {text}", file=self.stream, flush=True)
            for line in self.further():
                print(f"      {line}", file=self.stream, flush=True)
            return
        size = shutil.get_terminal_size()
        lines = self.frame(step, size.columns)[-(size.lines - 1):] if size.lines > 1 else []
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        self.stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self.drawn = len(lines)
        time.sleep(self.delay)
        self.rested += self.delay

    def end(self) -> None:
        """Take the last frame away; the cursor stands where it began."""
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
            self.stream.flush()
        self.drawn = 0

    def frame(self, step, columns: int) -> list[str]:
        """The lines of one frame, each at most `columns` wide: the answer, further ones, the
        status."""
        lines, width = [""], 0
        for text, style in self.runs(step):
            lines[-1] += style
            for char in text:
                wide = 2 if unicodedata.east_asian_width(char) in "WF" else \
                    0 if unicodedata.combining(char) else 1
                if char == "\n" or width + wide > columns:
                    lines[-1] += PLAIN if style else ""
                    lines.append(style)
                    width = 0
                if char != "\n":
                    lines[-1] += char
                    width += wide
            lines[-1] += PLAIN if style else ""
        beneath = [*self.further(), self.status(step)]
        return lines + [DIM + line[:columns] + PLAIN for line in beneath]

    def status(self, step) -> str:
        """The line beneath: how many positions are settled, and the figures."""
        answer = step.ids[:, self.prompt_length:]
        masks = int((answer[0] == self.mask_id).sum())
        return (f"{answer.shape[1] - masks}/{answer.shape[1]} positions  "
                + figures(count_tokens(answer, self.mask_id, self.eos_id), step.forwards,
                          step.seconds - self.rested))

    def runs(self, step, marked: bool = True) -> list[tuple[str, str]]:
        """(text, style) of neighbouring tokens of one kind: masked, fresh (if these are to be
        marked) or settled. EOS and what follows it is left out once everything before it is
        settled."""
        ids = step.ids[0, self.prompt_length:].tolist()
        fresh = step.fresh[0, self.prompt_length:].tolist()
        if self.eos_id in ids and self.mask_id not in ids[:ids.index(self.eos_id)]:
            ids = ids[:ids.index(self.eos_id)]
        runs: list[tuple[list[int], str]] = []
        for token, is_fresh in zip(ids, fresh):
            style = DIM if token == self.mask_id else FRESH if is_fresh and marked else ""
            if not runs or runs[-1][1] != style:
                runs.append(([], style))
            runs[-1][0].append(token)
        return [(MASK * len(tokens) if style == DIM
                 else printable(self.tokenizer.decode(tokens, skip_special=True)), style)
                for tokens, style in runs]


def count_tokens(answer: torch.Tensor, mask_id: int, eos_id: int) -> int:
    """Generated tokens of answers of any shape: neither EOS nor mask."""
    return int(((answer != eos_id) & (answer != mask_id)).sum())


def figures(tokens: int, forwards: int, seconds: float) -> str:
    """The figures that go together, always said the same way."""
    return (f"{tokens} tokens  {forwards} forwards  {tokens / max(forwards, 1):.2f} "
            f"tokens/forward  {tokens / max(seconds, 1e-9):.1f} tokens/s")


def answer_text(ids: torch.Tensor, tokenizer: Tokenizer, mask_id: int, eos_id: int) -> str:
    """Text of one generated answer, ids (G,), up to its first EOS, special tokens left out."""
    ids = ids.tolist()
    ids = ids[:ids.index(eos_id)] if eos_id in ids else ids
    return tokenizer.decode([i for i in ids if i != mask_id], skip_special=True)


# ------------------------------------------------------------------ answers
def answer_prompts(args, variants: dict[str, Callable], tokenizer: Tokenizer, special, device,
                   gen_length: int, tasks: dict, names: Sequence[str], draw: Callable,
                   watched: Watched | None = None) -> int:
    """Answer what a command line asks by every variant's `decode(ids, ...)`: a prompt, a held-out
    one of a task, or, where there is one variant, the prompts of a file. Returns the exit code, 1
    where some of these have errors.
    special has mask_id, eos_id, pad_id and max_len; draw(task, rng, held_out) -> (prompt, answer);
    names: the tasks that the model knows, of which the first is drawn where no prompt is given;
    watched: a memory that is to be shown too. Raises `InputError`."""
    options = held(args.hold_eos, special.eos_id, tokenizer, device)
    if watched and "adjust" in options:
        watched.before = options.pop("adjust")
    variants = {name: functools.partial(decode, **options) for name, decode in variants.items()}
    if args.prompts is not None:
        room = special.max_len - gen_length
        require(room > 0, f"--gen-length {gen_length} leaves no room for a prompt in the model's "
                f"{special.max_len} positions")
        prompts = read_once(lambda: read_prompts(
            args.prompts, tokenizer, args.raw or gen_length == 0, room, special.mask_id, fill=True,
            fill_only=gen_length == 0))
        if hint := unknown_to([p for p in prompts if not p.error and special.mask_id not in p.ids],
                              tasks, names):
            note(hint)
        return answer_file(args, *variants.values(), prompts, tokenizer, special, device, watched)
    require(processes()[1] == 1, "several processes share the lines of --prompts: pass a file")
    if args.chat:
        return chat(args, lambda ids: show(
            *variants.values(), torch.tensor([ids], device=device), tokenizer, special, args.quiet,
            0.0, args.stop, watched), tokenizer, special.mask_id, special.max_len - gen_length)
    require(args.system is None or tokenizer.is_chat, f"{args.ckpt} has no chat format: leave "
            "--system out")
    known = stated(args.ckpt).tasks
    if known and args.task not in (None, *known):
        note(f"{args.ckpt} was not trained on {args.task}, but on {', '.join(known)}")
    rng, right = random.Random(args.seed), dict.fromkeys(variants, 0)
    wrong = {name: Counter() for name in variants}
    quiet, raw = args.quiet or args.number > 1, args.raw or gen_length == 0  # a text, no question
    for _ in range(args.number):
        asked = ask(args, tasks, names, draw, rng)
        prompt = asked.prompt
        if args.system is not None and args.prompt is not None:
            prompt = [{"role": "system", "content": args.system},
                      {"role": "user", "content": prompt}]
        ids = torch.tensor([fillable_ids(prompt, tokenizer, raw, special.mask_id)], device=device)
        if asked.task and not asked.lead and not args.quiet:
            print(prompt, flush=True)
        usual = 0.03 if asked.lead else 0.08 if asked.task else 0.0
        delay = usual if args.delay is None else args.delay
        for name, decode in variants.items():
            if name:
                print(f"{name}:", flush=True)
            text = show(decode, ids, tokenizer, special, quiet, delay, args.stop, watched,
                        "" if args.quiet else asked.lead)
            if asked.task and not args.quiet:
                found, words, kinds = asked.verdict(text)
                right[name] += found
                wrong[name].update(kinds)
                print(words, flush=True)
    for name, found in right.items() if asked.task and args.number > 1 and not args.quiet else ():
        print(f"{name}{': ' if name else ''}{share(found, args.number, wrong[name])}")
    return 0


def ask(args, tasks: dict, names: Sequence[str], draw: Callable, rng: random.Random) -> Asked:
    """What the command line asks, or a held-out prompt of the first task."""
    if args.prompt is not None:
        asked = Asked(args.prompt) if masks_in(args.prompt) or args.raw else \
            understood(args.prompt, args.ckpt, tasks, names)
        if asked.hint:
            note(asked.hint)
        return asked
    require(bool(names), f"what should {args.ckpt} answer? Pass --prompt or --prompts")
    require(names[0] in tasks, f"{args.ckpt} names the task {names[0]!r}, which is none of "
            f"{', '.join(tasks)}: pass --prompt or --task")
    return Asked(draw(tasks[names[0]], rng, True)[0], tasks[names[0]])


def show(decode: Callable, ids: torch.Tensor, tokenizer: Tokenizer, special, quiet: bool = False,
         delay: float = 0.0, stops: Sequence[str] = (), watched: Watched | None = None,
         lead: str = "") -> str:
    """Answer a prompt of ids (1, P) by `decode(ids, on_step=...)`, live, or `quiet`, which prints
    the answer alone, behind `lead`; returns its text. special has mask_id and eos_id; delay:
    seconds a frame; stops: texts at which the answer ends."""
    mask_id, eos_id = special.mask_id, special.eos_id
    start = 0 if lead or (ids == mask_id).any() else ids.shape[1]
    view = None if quiet else LiveView(tokenizer, mask_id, eos_id, start, sys.stdout, delay,
                                       Bars(watched) if watched else list)
    ends, forwards = Ends(tokenizer, mask_id, end_tokens(tokenizer, eos_id), [stops],
                          ids.shape[1]), 0

    def on_step(step) -> bool:
        nonlocal forwards
        forwards = step.forwards
        if view is not None:
            if view.terminal:
                waiting.set()  # from now on the frames say that it goes on
            view(step)
        return bool(stops) and ends(step)

    with slow("answering", lambda: f", {forwards} forwards") as waiting:
        sample = decode(ids, on_step=on_step)
    text, tokens, _ = written(ids[0].tolist(), sample.ids[0].tolist(), ends, 0)
    if view is not None:
        view.end()
    print(lead + text)
    if view is not None:
        print(figures(tokens, sample.forwards, sample.seconds - view.rested))
    return text
