"""MemDLM: memory in fast weights, trained by bi-level optimisation (arXiv 2603.22241).

    python -m studies.memdlm train --tune full --out out/memdlm-0             # toy scale
    python -m studies.memdlm train --tune full --out out/plain-0 --plain      # its control
    python -m studies.memdlm train --ckpt llada-8b --data chats.jsonl --checkpointing  # slow LoRA
    python -m studies.memdlm sample --ckpt out/memdlm-0 --task track4-128     # the prompt is stored
    python sample.py --ckpt out/memdlm-0 --task track4-128                    # it is not
    python -m studies.memdlm bench --standard out/plain-* --memdlm out/memdlm-*

What the fast weights are and how they learn is in `studies.fast_weights`. `sample` takes what
sample.py takes, and any checkpoint: fast weights hold nothing that is trained. `bench` prints
accuracy by haystack length with fast weights off and on, held-out losses over training, and what a
training step and a prompt cost; a folder that `train` wrote for each training seed.
"""
from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import solve
from lib.accuracies import Accuracies
from lib.cli import Parser, command, count, listed, named, one_of, require, seed, size
from lib.data import choose_data, move, task_batches
from lib.files import to_json, write_atomic, write_text
from lib.hub import find, stated, texts_of
from lib.metrics import read_metrics
from lib.options import add_data_options, add_model_options, rate, run_settings, with_text
from lib.outputs import check_disk, output_folder
from lib.progress import progress, slow
from lib.run import local_device, processes
from lib.stats import Clock
from lib.tokenizer import needed
from model import Backbone, Tokenizer, load, save
from sample import answer
from sample import parser as sample_parser
from studies.fast_weights import (PARTS, SETTINGS, FastLoRA, LoRA, Settings, generate_adapted,
                                  outer_loss)
from tasks import draw
from tasks.haystack import KINDS, LENGTHS, Haystack
from train import fit


# ------------------------------------------------------------------ train
def write_folder(backbone: Backbone, source: Path, out: Path, settings: Settings) -> None:
    """A checkpoint that `load` reads, with the config and tokenizer of `source`, and the settings
    of its fast weights, which themselves are nothing that lasts."""
    for file in texts_of(source):
        write_atomic(out / file.name, partial(shutil.copyfile, file))
    write_text(out / SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")
    save(backbone, out / "model.safetensors")


def train(args: argparse.Namespace) -> None:
    """Train, resume or finish the run in --out, and write the checkpoint it makes there."""
    settings = Settings(args.rank, args.alpha, args.share, args.inner_lr, args.clip, args.K,
                        args.only, per_example=args.per_example)
    source, out = find(args.ckpt), Path(args.out)
    require(out.resolve() != source.resolve(),
            f"--out {out} is the checkpoint to start from: pass another folder")
    texts_of(source)  # what cannot be copied is said now
    backbone, tokenizer = load(source, local_device(args.device), args.dtype or (
        "float32" if args.tune == "full" else None))
    tokenizer = needed(tokenizer, args.ckpt)
    c, device = backbone.config, backbone.embedding.weight.device
    backbone.checkpointing = args.checkpointing
    batch = choose_data(args, tokenizer, c, draw)
    if processes()[0] == 0:
        check_disk(out, sum(p.nbytes for p in backbone.parameters()))  # the end needs it
    if args.tune == "full":
        slow, parameters = None, dict(backbone.requires_grad_().named_parameters())
    else:
        slow = LoRA(backbone, range(c.layers), tuple(PARTS), args.slow_rank, 2.0 * args.slow_rank,
                    args.seed)
        slow.attach()
        parameters = slow.weights
    fast = FastLoRA(backbone, settings)
    if processes()[0] == 0:
        print(f"{sum(p.numel() for p in parameters.values()):,} slow weights, "
              f"{sum(p.numel() for p in fast.weights.values()):,} fast ones in layers {fast.first} "
              f"to {c.layers - 1}{', which stay off' if args.plain else ''}")

    def loss_of(step: int, micro: int, held_out: bool, on: bool):
        fast.detach()
        ids, answer, pad = move(batch(step, micro, held_out), device)
        figures: dict[str, float] = {}
        bits = random.Random(f"masks {args.seed} {step} {micro} {held_out}").getrandbits(60)
        loss = outer_loss(backbone, ids, answer, fast if on else None,
                          torch.Generator().manual_seed(bits), pad, figures)
        return loss, figures

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        """held_out: without fast weights. held_out_adapted: with them adapted to the very tokens
        that it scores, so no measure of quality."""
        n = 2 * (len(stated(source).tasks) or 4)
        off, on = (sum(loss_of(0, i, True, x)[0].item() for i in range(n)) / n
                   for x in (False, True))
        fast.detach()
        return {"held_out": off, "held_out_adapted": on}

    fit(parameters, lambda step, micro: loss_of(step, micro, False, not args.plain), out,
        steps=args.steps, lr=args.lr or (2e-5 if c.large else 3e-4),
        warmup=max(1, args.steps // 10), micros=args.micros, save_every=args.save_every,
        eval_every=args.eval_every, evaluate=evaluate,
        settings=run_settings(args, backbone, tokenizer, batch, FastLoRA))
    fast.detach()
    if processes()[0] == 0:
        if slow is not None:
            slow.merge()
        write_folder(backbone, source, out, settings)
        print(f"wrote {out}")


# ------------------------------------------------------------------ sample
def sample(args: argparse.Namespace) -> int:
    """sample.py with the prompt stored in fast weights first."""
    require(not args.compile, "--compile does not go with fast weights: leave it out")
    args.compile = False  # they come and go, and compiled code would not see them
    settings = Settings.read(args.fast_weights or args.ckpt)
    return answer(args, partial(generate_adapted, settings=settings, seed=args.seed))


# ------------------------------------------------------------------ bench
def bench(args: argparse.Namespace) -> None:
    """Accuracy by haystack length and kind, held-out losses over training, and costs, for groups of
    checkpoints that differ in their training seed alone."""
    groups = {"standard": args.standard, "MemDLM": args.memdlm, **dict(args.also)}
    require(len(groups) == 2 + len(args.also), "--also needs names of their own")
    settings = {}
    for group, folders in groups.items():
        settings[group], *others = map(Settings.read, folders)
        require(all(other == settings[group] for other in others), f"the folders of {group} differ "
                f"in their {SETTINGS}: they are no training seeds of one setting")
    runs = read_runs(groups)
    models = {group: [load(folder, args.device) for folder in folders]
              for group, folders in groups.items()}
    for group, folders in groups.items():
        for (_, tokenizer), folder in zip(models[group], folders):
            needed(tokenizer, folder)
    answer_length = stated(args.standard[0]).length
    steps = args.steps or answer_length
    check_lengths(args, models, answer_length)
    variants = {f"{group}, {'on' if on else 'off'}": (group, settings[group] if on else None)
                for group in groups for on in (False, True)}
    shape = (len(args.kinds), len(args.lengths), args.prompts)
    right = {v: np.zeros((len(groups[group]), *shape)) for v, (group, _) in variants.items()}
    work = [(i, j) for i in range(len(args.kinds)) for j in range(len(args.lengths))]
    for i, j in progress(work, "kinds and lengths"):
        task = Haystack(args.lengths[j], *KINDS[args.kinds[i]])
        rng = random.Random(f"{args.seed} {args.kinds[i]} {args.lengths[j]}")
        prompts = [draw(task, rng, held_out=True)[0] for _ in range(args.prompts)]
        for v, (group, fast) in variants.items():
            for k, (backbone, tokenizer) in enumerate(models[group]):
                right[v][k, i, j], _ = solve(
                    backbone, tokenizer, task, prompts, answer_length, 50,
                    partial(generate_adapted, settings=fast), steps=steps)

    measured, rows = Accuracies(right), []
    print("| asked for | trained, fast weights | " + " | ".join(map(str, args.lengths)) + " |")
    print("|---" * (len(args.lengths) + 2) + "|")
    every = list(range(len(args.kinds)))
    for kind, chosen in [*((name, [i]) for i, name in enumerate(args.kinds)), ("mean", every)]:
        for v in variants:
            cells = [{**measured.cell(chosen, j, v), "kind": kind, "variant": v, "length": length}
                     for j, length in enumerate(args.lengths)]
            rows += cells
            print(f"| {kind} | {v} | " + " | ".join(
                f"{c['accuracy']:.1f} ({c['low']:.0f}-{c['high']:.0f})" for c in cells) + " |")
    print(f"\n{args.prompts} held-out prompts a kind and length, seed {args.seed}, {steps} steps; "
          "% right (95% interval over training seeds and prompts); training seeds: "
          + ", ".join(f"{group} {len(folders)}" for group, folders in groups.items()))
    leads = print_leads(measured, list(variants), every, args.lengths)
    curves = held_out_curves(runs)
    costs = print_costs(args, models["standard"][0], settings["MemDLM"], answer_length,
                        steps)
    if args.json:
        print(to_json({"seed": args.seed, "prompts": args.prompts, "steps": steps,
                       "groups": groups, "rows": rows, "leads": leads, "held_out": curves,
                       "costs": costs}))


def print_leads(measured: Accuracies, variants: list[str], every: list[int],
                lengths: list[int]) -> list[dict]:
    """Print and return what each variant leads over the first, for each length and for all."""
    leads = []
    for v in variants[1:]:
        for j, length in [*enumerate(lengths), (None, "all lengths")]:
            which = list(range(len(lengths))) if j is None else [j]
            points, low, high = measured(every, which, v, variants[0])
            leads.append({"variant": v, "minus": variants[0], "length": length, "points": points,
                          "low": low, "high": high})
            print(f"{v} - {variants[0]}, {length}: {points:+.1f} points ({low:+.1f} to "
                  f"{high:+.1f})")
    return leads


def check_lengths(args: argparse.Namespace, models: dict, answer_length: int) -> None:
    """Refuse haystacks that leave no room for an answer in one of the models."""
    for length in (*args.lengths, args.train_length):
        text = Haystack(length, *KINDS[args.kinds[0]]).make(random.Random(args.seed))[0]
        for backbone, tokenizer in itertools.chain(*models.values()):
            tokens, most = len(tokenizer.encode(text)) + answer_length, backbone.config.max_len
            require(tokens <= most, f"a haystack of {length} tokens and its answer come to {tokens}"
                    f", more than the model's {most}")


def read_runs(groups: dict[str, list[str]]) -> dict[str, list[dict[int, dict]]]:
    """By group, for each of its runs: step -> figures, where held-out losses were measured. Raises
    `InputError` for a run without."""
    runs: dict[str, list[dict[int, dict]]] = {group: [] for group in groups}
    for group, folders in groups.items():
        for folder in folders:
            path = Path(folder) / "metrics.jsonl"
            runs[group].append({line["step"]: line for line in read_metrics(path)
                                if "held_out" in line and "held_out_adapted" in line})
            require(bool(runs[group][-1]), f"{path} holds no held-out losses")
    return runs


def held_out_curves(groups: dict[str, list[dict]], most: int = 10) -> list[dict]:
    """Print and return the held-out losses of each group's runs, as of `read_runs`, at `most` of
    the steps at which they were measured."""
    curves = []
    for group, runs in groups.items():
        steps = sorted(set.intersection(*map(set, runs)))
        for step in steps:
            for key in ("held_out", "held_out_adapted"):
                losses = [run[step][key] for run in runs]
                curves.append({"group": group, "step": step, "loss": key, "seeds": losses,
                               "mean": statistics.fmean(losses)})
    print("\n| trained | updates | held-out loss, fast weights off | adapted to the very tokens it "
          "scores: no measure of quality |\n|---|---|---|---|")
    for group in groups:
        mine = [c for c in curves if c["group"] == group]
        pairs = list(zip(mine[::2], mine[1::2]))
        for i in sorted({round(x) for x in np.linspace(0, len(pairs) - 1, most)} if pairs else ()):
            print(f"| {group} | {pairs[i][0]['step']} | " + " | ".join(
                f"{c['mean']:.4f} ({min(c['seeds']):.4f}-{max(c['seeds']):.4f})"
                for c in pairs[i]) + " |")
    print("mean over training seeds (least-most)")
    return curves


def print_costs(args: argparse.Namespace, model: tuple[Backbone, Tokenizer], settings: Settings,
                answer_length: int, steps: int) -> list[dict]:
    """Seconds of a training step (full tuning) and of answering one prompt, relative to standard;
    printed and returned."""
    (backbone, tokenizer), rows = model, []
    c, device = backbone.config, backbone.embedding.weight.device
    clock, fast = Clock(device, 2, args.repeat), FastLoRA(backbone, settings)
    batch = task_batches(
        lambda kind, *rest: draw(Haystack(args.train_length, *KINDS[kind]), *rest), tokenizer,
        c.eos_id, answer_length, args.kinds, args.batch_size, 1, args.seed)
    ids, answers = move(batch(0, 0)[:2], device)
    backbone.requires_grad_()

    def update(chosen: FastLoRA | None):
        backbone.zero_grad()
        fast.detach()
        outer_loss(backbone, ids, answers, chosen, torch.Generator().manual_seed(0)).backward()

    works = [(f"training step, {args.batch_size} haystacks of {args.train_length}",
              lambda: update(None), lambda: update(fast))]
    for length in args.lengths:
        text = Haystack(length, *KINDS[args.kinds[0]]).make(random.Random(args.seed))[0]
        prompt = torch.tensor([tokenizer.encode(text)], device=device)
        works.append((f"prompt, haystack of {length}, {steps} steps", *(
            partial(generate_adapted, backbone, prompt, settings=chosen, steps=steps,
                    gen_length=answer_length, block_length=answer_length)
            for chosen in (None, settings))))
    print("\n| what | standard, ms | with fast weights, ms | times as long |\n|---|---|---|---|")
    for what, plain, with_fast in works:
        with slow(what):
            off, on = clock(plain), clock(with_fast)
        fast.detach()
        rows.append({"what": what, "standard": off, "fast": on,
                     "relative": on["seconds"] / off["seconds"]})
        print(f"| {what} | " + " | ".join(
            f"{1e3 * x['seconds']:.3g} ({1e3 * x['low']:.3g}-{1e3 * x['high']:.3g})"
            for x in (off, on)) + f" | {rows[-1]['relative']:.2f} |")
    backbone.requires_grad_(False)
    return rows


# ------------------------------------------------------------------ command line
def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    commands = p.add_subparsers(required=True, metavar="train | sample | bench")
    q = commands.add_parser("train", help="a backbone with fast weights in place, or plainly")
    q.set_defaults(run=train)
    add_train_options(q)
    # the sampler's own -h gives way to this command's
    q = commands.add_parser("sample", help="write with the prompt stored in fast weights",
                            parents=[sample_parser()], conflict_handler="resolve")
    q.set_defaults(run=sample)
    q.add_argument("--fast-weights", type=named, metavar="FOLDER", help="whose settings: those of "
                   "its fast_weights.json, without one the published (default: the checkpoint's)")
    q = commands.add_parser("bench", help="fast weights off and on: accuracy, losses, cost")
    q.set_defaults(run=bench)
    add_bench_options(q)
    return p


def add_train_options(p: Parser) -> None:
    """What is trained on what, the outer loop, and the inner one."""
    p.add_argument("--out", type=output_folder, default="out/memdlm", help="folder of the run and "
                   "of the checkpoint it makes; resumes if killed")
    add_model_options(p, "haystack", compiled=False, kind=with_text)
    add_data_options(p, max_length=4096, batch_size=16, micros=1)
    slow = p.add_argument_group("outer loop")
    slow.add_argument("--tune", choices=("lora", "full"), default="lora", help="what is trained: a "
                      "slow LoRA on all linear layers, merged at the end, or everything (in "
                      "float32, if --dtype says no other)")
    slow.add_argument("--plain", action="store_true", help="control: no fast weights, all else "
                      "equal")
    slow.add_argument("--slow-rank", type=size, default=32, help="of the slow LoRA; alpha is "
                      "twice")
    slow.add_argument("--steps", type=count, default=2000, help="updates")
    slow.add_argument("--lr", type=rate, help="peak of AdamW (default: 2e-5 as "
                      "published for 8B and 7B, else 3e-4); a tenth of the run is warm-up")
    slow.add_argument("--checkpointing", action="store_true", help="recompute blocks: less memory")
    slow.add_argument("--save-every", type=count, default=100)
    slow.add_argument("--eval-every", type=count, default=100)
    fast, d = p.add_argument_group("inner loop: the fast weights"), Settings()
    fast.add_argument("--rank", type=int, default=d.rank)
    fast.add_argument("--alpha", type=float, default=d.alpha)
    fast.add_argument("--share", type=float, default=d.share, help="of the layers, the last ones")
    fast.add_argument("--inner-lr", type=float, default=d.lr)
    fast.add_argument("--clip", type=float, default=d.clip, help="0: none (ablation)")
    fast.add_argument("--K", type=int, default=d.K, help="inner steps; 1 is M_pre alone")
    fast.add_argument("--only", choices=("pre", "anchor"), help="that step alone (ablation)")
    fast.add_argument("--per-example", action="store_true", help="fast weights for each example "
                      "rather than for the batch")


def add_bench_options(p: Parser) -> None:
    """Which runs are compared, and on what."""
    p.add_argument("--standard", type=named, nargs="+", metavar="FOLDER", required=True,
                   help="what train --plain wrote, one folder per training seed")
    p.add_argument("--memdlm", type=named, nargs="+", metavar="FOLDER", required=True,
                   help="without --plain")
    p.add_argument("--also", type=_group, action="append", default=[], metavar="NAME=FOLDER,...",
                   help="further groups: ablations, standard at equal compute")
    p.add_argument("--kinds", type=listed(one_of(KINDS, "kind")), default=list(KINDS),
                   help="comma-separated")
    p.add_argument("--lengths", type=listed(_length), default=list(LENGTHS),
                   help="tokens of a haystack")
    p.add_argument("--prompts", type=size, default=200, help="held-out prompts a kind and length")
    p.add_argument("--steps", type=count, help="denoising steps (default: one token per step)")
    p.add_argument("--train-length", type=_length, default=64, help="haystack of the timed step")
    p.add_argument("--batch-size", type=size, default=16, help="of the timed training step")
    p.add_argument("--repeat", type=size, default=5, help="timed runs that count")
    p.add_argument("--seed", type=seed, default=0, help="picks the prompts")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.add_argument("--device", type=named, help="cuda, cpu, ... (default: cuda where there is one)")


def _length(text: str) -> int:
    """The type of a haystack's length on the command line."""
    if (length := count(text)) < 4 * Haystack.pairs:
        raise argparse.ArgumentTypeError(f"a haystack has at least {4 * Haystack.pairs} tokens")
    return length


def _group(text: str) -> tuple[str, list[str]]:
    """The type of a named group of folders on the command line."""
    name, _, folders = text.partition("=")
    if not name or not folders:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER,FOLDER,...")
    return name, listed(named)(folders)


@command
def main(argv: list[str] | None = None) -> int | None:
    """Train, sample or compare, as the command line says."""
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
