"""What `bench.py harness` was asked for: its options, what is refused before any weights are read,
and how each task will be run."""
from __future__ import annotations

import argparse
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Sequence

import torch

from lib.answers import HOLDS
from lib.checks import check_generation
from lib.cli import InputError, Parser, count, listed, named, number, require, size, whole
from lib.hub import stated
from lib.judge import JUDGES, examples_file
from lib.outputs import output_folder, tensors_file
from lib.progress import slow
from lib.settings import SOURCES, Setting, choose, model_of
from lib.tokenizer import Tokenizer

GIVEN = {  # an option -> the field of a `Setting` that it goes before, and its type
    "gen_length": ("length", count), "block_length": ("block", count), "steps": ("steps", count),
    "shots": ("shots", whole(0)), "order": ("order", named), "temperature": (
        "temperature", number(0, 1e3)), "top_p": ("top_p", number(0, 1, open_low=True)),
    "threshold": ("threshold", number(0, 1e3)), "cfg_scale": ("cfg", number(0, 1e3)),
    "mc": ("mc", count)}
NO_LM_EVAL = "--tasks needs lm-eval: pip install lm-eval; --data FILE.jsonl does without"


def harness_options(p: Parser) -> None:
    """What bench.py harness takes, besides a model's options."""
    p.checks.append(check_harness)
    p.add_argument("--tasks", type=listed(named), help="benchmarks of the columns (gsm8k, math, "
                   "humaneval, mbpp, ...) or any task of lm-eval, comma-separated")
    p.add_argument("--data", type=examples_file, metavar="FILE", help="your own examples, JSONL "
                   "with prompt, answer and, as they like, judge, until, id")
    p.add_argument("--judge", choices=list(JUDGES), default="exact", help="of lines without one")
    p.add_argument("--include-path", type=named, metavar="FOLDER", help="tasks of your own for "
                   "lm-eval")
    p.add_argument("--as", dest="column", choices=SOURCES, help="whose published settings "
                   "(default: the authors of the model's family)")
    p.add_argument("--memory", type=tensors_file, nargs="*", default=[], metavar="FILE",
                   help="memories, one per training seed")
    p.add_argument("--reset", type=tensors_file, nargs="*", default=[], metavar="FILE",
                   help="memories of train.py --reset")
    p.add_argument("--limit", type=count, help="examples a task (default: all)")
    p.add_argument("--batch-size", type=size, default=1, help="prompts at a time (default: 1, as "
                   "published)")
    p.add_argument("--out", type=output_folder, default="out/harness", help="folder of results; "
                   "goes on if killed")
    p.add_argument("--run-code", action="store_true", help="run what the model writes, here and "
                   "without a sandbox: HumanEval and MBPP need it")
    p.add_argument("--greedy", action="store_true", help="with a likelihood, also whether the text "
                   "is what greedy decoding writes")
    how = p.add_argument_group("instead of what is published")
    for name, (_, kind) in GIVEN.items():
        how.add_argument("--" + name.replace("_", "-"), type=kind)
    how.add_argument("--cache", choices=("prefix", "dual"))
    how.add_argument("--hold-eos", choices=HOLDS, dest="hold")
    how.add_argument("--chat", action=argparse.BooleanOptionalAction, help="the chat template")
    how.add_argument("--bos", action=argparse.BooleanOptionalAction, help="BOS before raw prompts")


def check_harness(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, and tasks without lm-eval."""
    require((args.tasks is None) != (args.data is None), "pass either --tasks or --data FILE")
    for example in args.data.examples if args.data else ():
        example.check(args.judge)
    require(args.include_path is None or Path(args.include_path).is_dir(),
            f"--include-path {args.include_path} is no folder")
    if args.tasks:
        require(find_spec("lm_eval") is not None, NO_LM_EVAL)
        code = [name for name in args.tasks if re.search("humaneval|mbpp", name)]
        require(args.run_code or not code, f"{', '.join(code)}: judging runs what the model "
                "writes, on this machine and without a sandbox; --run-code allows it")
        if args.run_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"


class Plan(NamedTuple):
    """A task and how it is run, with lines on where that comes from."""
    name: str
    setting: Setting
    lines: list[str]


def plans(args: argparse.Namespace, config, tokenizer: Tokenizer, orders: Sequence[str],
          by_probability: Sequence[str]) -> list[Plan]:
    """How each task is run, before any weights are read; lm-eval downloads its data here. orders,
    by_probability: those there are, and those a threshold makes sense for. Raises `InputError`."""
    family, length = config.family, stated(args.ckpt).length
    model = model_of(args.ckpt, family, tokenizer.is_chat)
    given = {field: getattr(args, name) for name, (field, _) in GIVEN.items()}
    given |= {name: getattr(args, name) for name in ("cache", "hold", "chat", "bos")}
    require(not args.chat or tokenizer.is_chat, f"{args.ckpt} has no chat format: --chat needs one")
    found = [Plan(name, *choose(args.column or family, model, name, given, length))
             for name in args.tasks or [""]]
    for _, s, _ in found:
        check_generation(config, torch.zeros(1, 1, dtype=torch.long), None, s.length, s.block,
                         s.steps, s.order, orders, s.threshold, by_probability, s.cache, None,
                         s.temperature, s.top_p, None, 0.0, s.cfg)
    if args.tasks:
        with slow("reading lm-eval's tasks"):
            check_tasks([plan.setting.task for plan in found], args.include_path)
    return found


def check_tasks(names: list[str], include_path: str | None) -> None:
    """Refuse tasks that lm-eval does not have, or whose data are not to be had."""
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=include_path)
    for name in names:
        require(name in manager.all_tasks, f"lm-eval has no task {name!r}"
                + ("" if include_path else ": --include-path FOLDER adds some"))
        try:
            manager.load_task_or_group(name)
        except (ConnectionError, FileNotFoundError, ImportError) as error:
            raise InputError(f"lm-eval cannot load {name}: "
                             f"{str(error).strip().splitlines()[0]}") from error
