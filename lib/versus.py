"""`bench.py harness`: published benchmarks, by lm-eval, or a file of examples, answered by a frozen
backbone and by it with memories, and what they differ in, example for example."""
from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Callable

import numpy as np

from lib import identity
from lib.accuracies import Accuracies
from lib.answers import Store
from lib.files import to_json, write_text
from lib.harness import Adapter, lm_eval_model
from lib.hub import find
from lib.judge import Example
from lib.plans import Plan
from lib.progress import say
from lib.run import everyone, processes
from lib.templates import chat_template
from lib.tokenizer import Tokenizer

Scores = dict[str, dict[tuple, float]]  # metric -> (task, example) -> score


# ------------------------------------------------------------------ what is run
def versus(args: argparse.Namespace, plan: list[Plan], backbone, tokenizer: Tokenizer,
           variants: dict[str, list[tuple]], generate: Callable, denoise: Callable) -> None:
    """Run every task with every variant, (memory, its file) each, None for the frozen backbone, and
    print the table."""
    (rank, world), folder, rows, leads = processes(), find(args.ckpt), [], []
    template = chat_template(folder, tokenizer)
    model = f"{backbone.fingerprint()} {backbone.embedding.weight.dtype}"
    for task in plan:
        if rank == 0:
            say("\n  ".join([f"{task.name or args.data}: {task.setting}", *task.lines]))
        scores: dict[str, list[Scores]] = {name: [] for name, found in variants.items() if found}
        for name, k in ((name, k) for name in scores for k in range(len(variants[name]))):
            (memory, file), label = variants[name][k], f"{name}-{k}" if k else name
            who = identity.of_text(f"{model} {name} {file and identity.of_file(file)}")
            adapter = Adapter(backbone, tokenizer, folder, generate, denoise,
                              Store(args.out, f"known-{label}", rank), who, template, memory,
                              args.batch_size, args.seed, args.greedy)
            adapter.setting = task.setting
            result = (own if args.data else by_lm_eval)(adapter, args, rank, world)
            if rank == 0:
                keep(Path(args.out), task.name or "data", label,
                     {**result, "setting": [str(task.setting), *task.lines]})
                scores[name].append(scores_of(result))
        if rank == 0:
            for table, found in zip((rows, leads), compared(task.name or "data", scores)):
                table += found
    if rank == 0:
        report(rows, leads)
        write_text(Path(args.out) / "table.json", to_json({"rows": rows, "leads": leads}))
        if args.json:
            print(to_json({"ckpt": args.ckpt, "rows": rows, "leads": leads}))


def own(adapter: Adapter, args: argparse.Namespace, rank: int, world: int) -> dict:
    """The result for a file of examples, in lm-eval's form; processes share the examples."""
    examples: list[Example] = args.data.examples[:args.limit]
    mine = examples[rank::world]
    prompts = [adapter.chat(e.messages) if adapter.setting.chat else
               "\n\n".join(m["content"] for m in e.messages) for e in mine]
    texts = adapter.generate_until([(p, {"until": e.until}) for p, e in zip(prompts, mine)])
    found = [{"doc_id": rank + i * world, "id": e.id, "answer": e.answer, "text": text,
              "judge": e.judge or args.judge, "right": float(e.right(text, args.judge)),
              "metrics": ["right"], "filter": "none"}
             for i, (e, text) in enumerate(zip(mine, texts))]
    samples = sorted(sum(everyone(found), []), key=lambda s: s["doc_id"])
    share = sum(s["right"] for s in samples) / len(samples)
    return {"results": {"data": {"right": share}}, "samples": {"data": samples}}


def by_lm_eval(adapter: Adapter, args: argparse.Namespace, rank: int, world: int) -> dict | None:
    """lm-eval's result for one task, None but in the first process."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    setting = adapter.setting
    return simple_evaluate(
        model=lm_eval_model(adapter, rank, world), tasks=[setting.task],
        num_fewshot=setting.shots, limit=args.limit, batch_size=args.batch_size,
        apply_chat_template=setting.chat, bootstrap_iters=0, log_samples=True,
        fewshot_as_multiturn=setting.chat and setting.turns,
        task_manager=TaskManager(include_path=args.include_path),
        confirm_run_unsafe_code=args.run_code)


def keep(out: Path, task: str, label: str, result: dict) -> None:
    """Write lm-eval's results as JSON, and its samples a line each."""
    write_text(out / f"results-{task}-{label}.json", json.dumps(
        {k: v for k, v in result.items() if k != "samples"}, default=str, indent=1))
    write_text(out / f"samples-{task}-{label}.jsonl", "".join(
        json.dumps({"task": name, **sample}, default=str) + "\n"
        for name, samples in result["samples"].items() for sample in samples))


# ------------------------------------------------------------------ what is compared
def scores_of(result: dict) -> Scores:
    """What every example was given, by metric and (task, example), of the metrics that are numbers
    from 0 to 1 throughout; the tasks of a group are one."""
    found: Scores = {}
    for task, samples in result["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                share = isinstance(value, (bool, int, float)) and 0 <= value <= 1
                named = "" if sample["filter"] == "none" else f", {sample['filter']}"
                found.setdefault(metric + named, {})[task, sample["doc_id"]] = \
                    float(value) if share else math.nan
    return {metric: scores for metric, scores in found.items()
            if not any(map(math.isnan, scores.values()))}


def compared(task: str, scores: dict[str, list[Scores]]) -> tuple[list[dict], list[dict]]:
    """(rows, leads) of a task: each variant's mean in percent with its 95% interval, and what it is
    ahead of every variant before it on the same examples, with the interval of that difference and
    how many examples are better and worse."""
    rows, leads = [], []
    runs = [one for found in scores.values() for one in found]
    for metric, examples in runs[0].items():
        if not all(metric in one for one in runs):
            continue
        right = {name: np.array([[[[one[metric][key] for key in examples]]] for one in found])
                 for name, found in scores.items()}                   # (seeds, 1, 1, examples)
        measured = Accuracies(right)
        for name in right:
            rows.append({"task": task, "metric": metric, "variant": name, "examples": len(examples),
                         **measured.cell([0], 0, name)})
        for minus, name in itertools.combinations(right, 2):
            points, low, high = measured([0], [0], name, minus)
            change = (right[name].mean(0) - right[minus].mean(0)).ravel()
            leads.append({"task": task, "metric": metric, "variant": name, "minus": minus,
                          "points": points, "low": low, "high": high,
                          "better": int((change > 0).sum()), "worse": int((change < 0).sum())})
    return rows, leads


def report(rows: list[dict], leads: list[dict]) -> None:
    """Print what `compared` found."""
    print("\n| task | metric | variant | examples | % right (95% interval) |\n" + "|---" * 5 + "|")
    for r in rows:
        print(f"| {r['task']} | {r['metric']} | {r['variant']} | {r['examples']} | "
              f"{r['accuracy']:.1f} ({r['low']:.1f}-{r['high']:.1f}) |")
    for d in leads:
        print(f"{d['variant']} - {d['minus']}, {d['task']}, {d['metric']}: {d['points']:+.1f} "
              f"points ({d['low']:+.1f} to {d['high']:+.1f}), {d['better']} examples better, "
              f"{d['worse']} worse")
