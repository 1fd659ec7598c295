"""What bench.py takes."""
from __future__ import annotations

import argparse
import re
from typing import Iterable

from lib.cli import Parser, count, listed, number, one_of, require, seed, size, whole
from lib.options import add_model_options, with_text
from lib.outputs import tensors_file
from lib.plans import harness_options
from lib.stats import plot_file


def variant(text: str) -> tuple[str, list[str]]:
    """The type of a variant's name and files on the command line."""
    name, _, files = text.partition("=")
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no name: write NAME={text}")
    taken = ("frozen", "MetaState", "shuffled", "reset", "mean")
    if not re.fullmatch(r"\w[\w .-]*", name) or name in taken:
        raise argparse.ArgumentTypeError(f"{name!r} is no name for a variant of its own")
    return name, listed(tensors_file)(files)


def check_speed(args: argparse.Namespace) -> None:
    """Fill in what bench.py speed was not told, and refuse lengths that do not go together."""
    sure = None if args.ckpt.startswith("random:") else 0.9
    for name, usual, quick in (("lengths", [128, 256], [256]), ("train", None, 256),
                               ("warmup", 2, 0), ("repeat", 5, 3), ("threshold", sure, None)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    require(args.block <= min(args.lengths) and args.gen % args.block == 0,
            f"a --block of {args.block} has to fit into every length and to divide --gen")


def bench_parser(doc: str, tasks: Iterable[str]) -> Parser:
    """What bench.py takes; .table says which."""
    p = Parser(description=doc)
    tables = p.add_subparsers(required=True, dest="table", metavar="accuracy | speed | harness")
    a = tables.add_parser("accuracy", help="tasks x step budgets")
    a.add_argument("--tasks", type=listed(one_of(tasks, "task")), help="comma-separated (default: "
                   "those that the checkpoint names)")
    a.add_argument("--budgets", type=listed(count), default=[1, 2, 4, 8], help="tokens per step")
    a.add_argument("--thresholds", type=listed(number(0, 1, open_low=True), empty=True),
                   default=[0.9999, 0.999, 0.99, 0.9], help='also by confidence; "" for none')
    a.add_argument("--memory", type=tensors_file, nargs="*", metavar="FILE", help="memories, one "
                   "per training seed (default: metastate*.safetensors in the folder of a "
                   "checkpoint with tasks)")
    a.add_argument("--reset", type=tensors_file, nargs="*", metavar="FILE", help="memories of "
                   "train.py --reset (default: reset*.safetensors there)")
    a.add_argument("--also", type=variant, action="append", default=[], metavar="NAME=FILES",
                   help="a variant more: its name and, comma-separated, memories; may be repeated")
    a.add_argument("--prompts", type=whole(1, 10 ** 5), default=500, help="held-out prompts a task")
    a.add_argument("--alone", type=whole(0, 10 ** 5), default=0, metavar="N", help="also time N of "
                   "a task's prompts in each setting, one at a time")
    a.add_argument("--plot", type=plot_file, metavar="FILE", help="accuracy against forwards, and "
                   "seconds with --alone (matplotlib)")
    s = tables.add_parser("speed", help="steps, generations and training against the limits")
    s.checks.append(check_speed)
    s.add_argument("--quick", action="store_true", help="on a GPU two minutes at most: other "
                   "defaults, and no generations on a prefix cache")
    s.add_argument("--lengths", type=listed(count), help="tokens of a sequence, comma-separated "
                   "(default: 128,256; quick: 256)")
    s.add_argument("--batches", type=listed(size), default=[1], help="sequences at a time, "
                   "comma-separated (default: 1)")
    s.add_argument("--prompt", type=count, default=128, help="tokens to generate from")
    s.add_argument("--gen", type=count, default=64, help="tokens to generate")
    s.add_argument("--block", type=count, default=32, help="tokens of a block")
    s.add_argument("--threshold", type=number(0, 1e3), help="generations by confidence too "
                   "(default: 0.9; none for random weights, which are never sure)")
    s.add_argument("--train", type=count, help="also a training update with so many tokens (quick: "
                   "256)")
    s.add_argument("--warmup", type=whole(0, 10 ** 4), help="runs before those that count, after "
                   "the very first (default: 2; quick: 0)")
    s.add_argument("--repeat", type=size, help="runs that count (default: 5; quick: 3)")
    h = tables.add_parser("harness", help="published benchmarks, or your own examples")
    harness_options(h)
    for each in (a, s, h):
        add_model_options(each, kind=str if each is s else with_text)
        each.add_argument("--seed", type=seed, default=0, help="of prompts and of what is drawn")
        each.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return p
