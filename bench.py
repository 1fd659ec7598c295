"""What decoding with fewer steps costs.

    python bench.py accuracy                       # tasks x step budgets, checkpoints/tiny
    python bench.py accuracy --tasks chain,sums --budgets 1,4 --prompts 200 --json

Accuracy is the share of held-out prompts whose answer is right by the task's own rules, with a 95%
Wilson interval. Budget b is one step per b tokens: 1 is one token per step, 8 an eighth as many
steps. Every table is made by the command printed beneath it.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import sys

from model import DTYPES, Backbone, InputError, Parser, Tokenizer, command, load, seed
from sample import answer_text, generate, left_pad
from tiny import GEN_LENGTH, TASKS, Task, draw


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson's score interval)."""
    p, z2 = right / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def solve(backbone: Backbone, tokenizer: Tokenizer, task: Task, prompts: list[str],
          batch_size: int = 250, **options) -> tuple[list[bool], float]:
    """Decode prompts and judge them: (right or wrong for each, mean forwards per batch). Options
    are `generate`'s."""
    device, c = backbone.embedding.weight.device, backbone.config
    verdicts, forwards = [], []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i:i + batch_size]
        ids, pad = left_pad([tokenizer.encode(p) for p in part], c.pad_id, device)
        sample = generate(backbone, ids, pad_mask=pad, gen_length=GEN_LENGTH,
                          block_length=GEN_LENGTH, **options)
        forwards.append(sample.forwards)
        verdicts += [task.check(prompt, answer_text(row, tokenizer, c))
                     for prompt, row in zip(part, sample.ids[:, ids.shape[1]:])]
    return verdicts, sum(forwards) / len(forwards)


def accuracy(args: argparse.Namespace) -> None:
    """The table task x budget."""
    backbone, tokenizer = load(args.ckpt, args.device, args.dtype)
    if tokenizer is None:
        raise InputError(f"{args.ckpt} has no tokenizer, so no task can be asked")
    rows = []
    for name in args.tasks:
        rng = random.Random(f"{args.seed} {name}")
        prompts = [draw(TASKS[name], rng, held_out=True)[0] for _ in range(args.prompts)]
        for budget in args.budgets:
            verdicts, forwards = solve(backbone, tokenizer, TASKS[name], prompts,
                                       steps=GEN_LENGTH // budget)
            low, high = wilson(sum(verdicts), len(verdicts))
            rows.append({"task": name, "budget": budget, "steps": GEN_LENGTH // budget,
                         "forwards": forwards, "right": sum(verdicts), "prompts": len(verdicts),
                         "accuracy": sum(verdicts) / len(verdicts), "low": low, "high": high})
    steps = [GEN_LENGTH // b for b in args.budgets]
    print("| task | " + " | ".join(f"{s} steps" for s in steps) + " |")
    print("|---" * (len(steps) + 1) + "|")
    for name in [*args.tasks, "mean"]:
        cells = []
        for budget in args.budgets:
            found = [r for r in rows if r["budget"] == budget and name in (r["task"], "mean")]
            mean = sum(r["accuracy"] for r in found) / len(found)
            cells.append(f"{100 * mean:.1f}" if name == "mean" else
                         f"{100 * mean:.1f} ({100 * found[0]['low']:.0f}-"
                         f"{100 * found[0]['high']:.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n{args.prompts} held-out prompts a task, seed {args.seed}; % right (95% interval)")
    if args.json:
        print(json.dumps({"ckpt": args.ckpt, "seed": args.seed, "rows": rows}))


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TASKS:
            raise InputError(f"unknown task {name!r}: one of {', '.join(TASKS)}")
    return names


def _budgets(text: str) -> list[int]:
    if not all(b.isdigit() and int(b) > 0 and GEN_LENGTH % int(b) == 0 for b in text.split(",")):
        raise InputError(f"budgets {text!r}: whole numbers that divide {GEN_LENGTH}")
    return [int(b) for b in text.split(",")]


@command
def main(argv: list[str] | None = None) -> int:
    """Make the table that the command line asks for; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="accuracy")
    p = commands.add_parser("accuracy", help="tasks x step budgets")
    p.set_defaults(run=accuracy)
    p.add_argument("--ckpt", default="tiny", help="checkpoint that was trained on the tasks")
    p.add_argument("--tasks", type=_names, default=list(TASKS), help="comma-separated")
    p.add_argument("--budgets", type=_budgets, default=[1, 2, 4, 8], help="tokens per step")
    p.add_argument("--prompts", type=int, default=500, help="held-out prompts a task")
    p.add_argument("--seed", type=seed, default=0, help="picks the prompts")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else as stored")
    args = parser.parse_args(argv)
    if args.prompts < 1:
        raise InputError(f"--prompts is {args.prompts}, and has to be 1 or more")
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
