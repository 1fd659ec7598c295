"""How checkpoints/tiny, haystack, halves, sudoku6, sudoku6-hard, countdown and stories were made: a
tokenizer, a LLaDA of 0.4 or 0.5 M parameters, for stories of 1.5 M, and its pretraining on tasks.

    python -m studies.pretrain tiny --out out/tiny            # from nothing, 45 min on two cores
    python -m studies.pretrain haystack --out out/haystack    # from checkpoints/tiny, 10 min on one
    python -m studies.pretrain halves --out out/halves        # from checkpoints/tiny, 6 min on one
    python -m studies.pretrain sudoku6 --out out/sudoku6      # from checkpoints/tiny, 40 min on one
    python -m studies.pretrain countdown --out out/countdown  # from checkpoints/tiny, 55 min on one
    torchrun --nproc-per-node 2 -m studies.pretrain sudoku6-hard --out out/sudoku6-hard  # 45 min
    python -m studies.pretrain stories --out out/stories      # from nothing, 4 min on a GPU
    python -m studies.pretrain stories --from out/stories --lessons --out out/taught  # docs/data.md
    python -m studies.pretrain stories --from out/taught --own own.jsonl --out out/told      # too
    python -m studies.pretrain show chain                     # held-out prompts with their answers
    python -m studies.pretrain show track4-128 --number 1     # four hops through 128 tokens

A run that was killed goes on where it stood. torchrun shares the work: one process per task, at
most.
"""
from __future__ import annotations

import argparse
import random
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tokenizers import Regex, pre_tokenizers

from lib.cli import Parser, command, device_of, one_of, require, seed, size
from lib.data import Batch
from lib.options import run_settings
from lib.published import config_fields
from lib.run import local_device, processes
from model import Backbone, Config, Tokenizer, load
from studies.small import (GEN_LENGTH, Weighted, build_config, byte_level, examples, llada_loss,
                           look_nearby, training_options, trapezoids, write_folder)
from studies.stories import pretrain_stories
from tasks import TASKS, Task, draw
from tasks.depth import DEPTH, Countdown, Halves, Sudoku6
from tasks.haystack import KINDS, Haystack
from tasks.puzzles import Chain, Follow, Sums
from train import fit

# ------------------------------------------------------------------ what is learned
PUZZLES = ("sudoku", "chain", "follow", "sums")  # the tasks of checkpoints/tiny
HAYSTACK_TASKS = tuple(f"{kind}-64" for kind in KINDS)  # those that checkpoints/haystack states
# Easier examples at first: what looks things up is learned there, and much sooner than from the
# full size alone. Their share falls from all to none over the first CURRICULUM updates.
CURRICULUM = 5000
EASIER = {"chain": [Chain(size) for size in range(2, 6)],
          "follow": [Follow(size) for size in range(2, 8)]}
# What a task is in the first STAGE updates: small steps, as in chain. With large ones among them
# from the start (the share falling as above) chain was not learned in 12,000 updates.
STAGE = 8000
FIRST = {"sums": Sums(most=3)}
SHORT = (32, 40, 48)  # tokens of the haystacks that checkpoints/haystack is pretrained on
OFFSETS = (-2, 2, -4, 4)  # where the first layer's first heads look at the start; see look_nearby


def puzzle(name: str, step: int, rng: random.Random) -> Task:
    """What a micro-batch of update `step` draws for one of the puzzles."""
    task = FIRST[name] if step < STAGE and name in FIRST else TASKS[name]
    if name in EASIER and rng.random() > step / CURRICULUM:
        task = rng.choice(EASIER[name])
    return task


def short_haystack(name: str, step: int, rng: random.Random) -> Task:
    """What a micro-batch draws for a kind of haystack; "text" is any of them."""
    kind = rng.choice(list(KINDS)) if name == "text" else name
    return Haystack(rng.choice(SHORT), *KINDS[kind])


def named_halves(name: str, step: int, rng: random.Random) -> Task:
    """Halves in which nine stations in ten are named at first, as in `follow`, which the tiny model
    knows; from update 800 on as many as in the task."""
    return Halves(named=max(TASKS[name].named, 0.9 - step / 1230))


def given_sudoku(name: str, step: int, rng: random.Random) -> Task:
    """Sudokus of which up to 30 of the 36 cells are given; the task's own are one in five at first
    and all from update 3000 on."""
    return TASKS[name] if rng.random() < max(0.2, step / 3000) else Sudoku6(least=(10, 30))


def as_it_is(name: str, step: int, rng: random.Random) -> Task:
    """The task itself from the start."""
    return TASKS[name]


def fewer_numbers(name: str, step: int, rng: random.Random) -> Task:
    """Countdowns of two, three or four numbers; of four alone from update 8000 on."""
    return TASKS[name] if rng.random() < max(0.4, step / 8000) else Countdown(rng.randint(2, 3))


class Course(NamedTuple):
    """What a model of puzzles learns: each task is a micro-batch."""
    tasks: dict[str, Task]              # of the held-out loss
    drawn: Callable[..., Task]          # (name, step, rng) -> what a micro-batch draws
    length: int = GEN_LENGTH            # of an answer
    changes: dict = {}                  # in CONFIG
    begun: str = "tiny"                 # the model that it goes on from


COURSES = {
    "tiny": Course({name: TASKS[name] for name in PUZZLES}, puzzle),
    "haystack": Course({kind: Haystack(SHORT[-1], *KINDS[kind]) for kind in KINDS}, short_haystack,
                       changes={"max_sequence_length": 2048}),
    "halves": Course({"halves": TASKS["halves"]}, named_halves, 16),
    "sudoku6": Course({"sudoku6": TASKS["sudoku6"]}, given_sudoku, 42, {"n_layers": 4}),
    "sudoku6-hard": Course({name: TASKS[name] for name in ("sudoku6", "sudoku6-hard")}, as_it_is,
                           42, {"n_layers": 4}, "sudoku6"),
    "countdown": Course({"countdown": TASKS["countdown"]}, fewer_numbers, 12, {"n_layers": 4})}


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE in which the puzzles' names are one token each and everything else is one
    byte: any text can be encoded, and every digit is a token of its own."""
    # 275 is where the merges end
    return byte_level([f"{name} {name}" for name in PUZZLES], 1000, pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[a-z]{3,}|[\s\S]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


# ------------------------------------------------------------------ pretraining
def deepened(backbone: Backbone, smaller: Backbone) -> Backbone:
    """The backbone with a smaller one's weights; its layers besides add nothing at first."""
    backbone.load_state_dict(smaller.state_dict(), strict=False)
    for block in backbone.blocks[smaller.config.layers:]:
        block.out.weight.data.zero_()
        block.down.weight.data.zero_()
    return backbone


def pretrain(args: argparse.Namespace) -> None:
    """Train the tiny model from nothing, or another from one that can look things up (from nothing
    that was not learned in 3,000 updates of haystacks), and write it to `args.out`."""
    tiny, hay = args.command == "tiny", args.command == "haystack"
    asked, drawn, usual, changes, begun = COURSES[args.command]
    device, tokenizer = device_of(local_device(args.device)), build_tokenizer()
    config = Config(**config_fields(build_config(tokenizer, **changes)))
    backbone = Backbone(config).initialise(torch.Generator().manual_seed(args.seed))
    if tiny:
        look_nearby(backbone, OFFSETS)
    else:
        deepened(backbone, load(begun, "cpu", torch.float32)[0])
    backbone.to(device)
    names = [*asked, "text"] if hay else [*asked]
    args.micros = len(names)

    def batch(step: int, micro: int) -> Batch:  # one task per micro-batch: no padding
        name, rng = names[micro], random.Random(f"{args.seed} {step} {micro}")
        rng.getrandbits(60)  # the masks'
        task = drawn(name, step, rng)
        # a quarter of the steps has a longer tail of EOS, so that other lengths work too
        length = usual if step % 4 else rng.randint(usual, 2 * usual)
        # the others learn sooner
        size = args.batch_size if name in (*EASIER, *DEPTH) else max(1, args.batch_size // 2)
        data = examples(task, tokenizer, rng, size, False, config.eos_id, length)
        if name == "text":  # masks anywhere, as in LLaDA's own pretraining: nothing but answer
            text = torch.cat(data[:2], 1)
            data = text[:, :0], text, None
        return data

    def loss_fn(step: int, micro: int):
        name, rng = names[micro], random.Random(f"{args.seed} {step} {micro}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        loss = llada_loss(backbone, *batch(step, micro), generator)
        # our choice: most of a text is filler, which nobody can guess
        return loss * (0.1 if name == "text" else 1), {name: loss.item()}

    @lru_cache(maxsize=None)
    def held_out(name: str) -> Batch:
        return examples(asked[name], tokenizer, random.Random(0), 256, True, config.eos_id, usual)

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        return {f"held_out_{name}": llada_loss(
            backbone, *held_out(name), torch.Generator().manual_seed(0)).item() for name in asked}

    out = Path(args.out)
    fit(dict(backbone.named_parameters()), loss_fn, out / "pretraining", steps=args.steps,
        lr=args.lr, schedule=partial(trapezoids, stage=STAGE if tiny else 0), warmup=200, clip=0.25,
        micros=args.micros, evaluate=evaluate,
        settings=run_settings(args, backbone, tokenizer, batch, Backbone, Weighted))
    if processes()[0] == 0:
        write_folder(backbone, tokenizer, out, HAYSTACK_TASKS if hay else names, usual, **changes)
        print(f"wrote {out}, {config.parameters:,} parameters")


def show(args: argparse.Namespace) -> None:
    """Print held-out prompts with a right answer each."""
    rng = random.Random(args.seed)
    for _ in range(args.number):
        prompt, answer = draw(args.task, rng, held_out=True)
        print(prompt + answer + "\n")


# ------------------------------------------------------------------ command line
def check_begun(args: argparse.Namespace) -> None:
    """Refuse what is for stories that go on from others' weights, where none are named."""
    require(bool(args.begun) or not (args.own or args.lessons), "--own and --lessons need --from")


def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True,
                               metavar=" | ".join([*COURSES, "stories", "show"]))
    for name, run, steps, batch, lr, what in (
            ("tiny", pretrain, 10_500, 32, 6e-4,
             f"four puzzles; easier sums in the first {STAGE} updates"),
            ("haystack", pretrain, 2000, 32, 6e-4, "short haystacks, from checkpoints/tiny on"),
            ("halves", pretrain, 2000, 48, 1e-3, "half-said paths, from checkpoints/tiny on"),
            ("sudoku6", pretrain, 6000, 32, 1e-3, "6x6 sudokus, from checkpoints/tiny on"),
            ("sudoku6-hard", pretrain, 5000, 32, 1e-3, "of both grades, from sudoku6 on"),
            ("countdown", pretrain, 15_000, 64, 1e-3, "countdowns, from checkpoints/tiny on"),
            ("stories", pretrain_stories, 12_163, 192, 3e-3, "little stories")):
        q = commands.add_parser(name, help=what)
        q.set_defaults(run=run)
        training_options(q, steps, batch, lr, "" if name in (*DEPTH, "stories") else
                         ", of chain and follow; of the others half as many")
        if name == "stories":
            q.add_argument("--from", dest="begun", nargs="+", metavar="CKPT", help="go on from its "
                           "weights, or the mean of several's, with excerpts beside stories, and "
                           "write a mean of weights")
            q.add_argument("--own", nargs="+", metavar="FILE", help="with --from: also stories of "
                           "its own, answers of sample.py --prompts, where they are right")
            q.add_argument("--lessons", action="store_true", help="with --from: lessons at first")
            q.checks.append(check_begun)
    q = commands.add_parser("show", help="print held-out examples")
    q.set_defaults(run=show)
    q.add_argument("task", type=one_of(TASKS, "task"), metavar="TASK", help=", ".join(TASKS))
    q.add_argument("--number", type=size, default=3, help="how many (default: 3)")
    q.add_argument("--seed", type=seed, default=0, help="picks them")
    return p


@command
def main(argv: list[str] | None = None) -> None:
    """Pretrain or show, as the command line says."""
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
