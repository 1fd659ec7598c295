"""What decoding with fewer steps costs, and how fast a step is.

    python bench.py accuracy                       # tasks x steps and thresholds, some 25 min
    python bench.py accuracy --tasks chain,sums --budgets 1,4 --prompts 200 --json
    python bench.py speed --ckpt random:llada-8b --lengths 1024,2048 --train 1024
    python bench.py footprint --ckpt llada-8b      # GB that an update takes, without running it
    python bench.py memdlm --standard out/plain-0 out/plain-1 --memdlm out/memdlm-0 out/memdlm-1

Accuracy is the share of held-out prompts whose answer is right by the task's own rules. Budget b is
one step per b tokens: 1 is one token per step, 8 an eighth as many steps. With memories, for the
tiny model those in its folder (none with a bare `--memory --reset`), the table has the frozen
backbone beside MetaState and its controls, reset and shuffled.

For MemDLM: accuracy by haystack length with fast weights off and on, held-out losses over training,
and what a training step and a prompt cost; a folder that memdlm.py wrote for each training seed.

Speed is said as a share of what the machine does in a matrix product and a copy, measured in the
same run.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
import weakref
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from memdlm import FastLoRA, Settings, adapted, outer_loss
from metastate import MetaState
from model import (DTYPES, Backbone, Cache, Config, InputError, Parser, Tokenizer, command,
                   compile_on, find, load, parse_json, read_lines, seed, shapes_of)
from sample import answer_text, denoise, generate, left_pad
from tiny import GEN_LENGTH, KINDS, LENGTHS, TASKS, Haystack, Task, draw
from train import task_batches, token_losses, unrolled_loss


# ------------------------------------------------------------------ accuracy
class Reset:
    """A memory that is set back to its start after every step: an adapter without memory."""

    def __init__(self, memory: MetaState):
        self.memory, self.initial, self.inject = memory, memory.initial, memory.inject

    def update(self, s: torch.Tensor, *_) -> torch.Tensor:
        """The state that every step begins with."""
        return self.initial(len(s))


class Shuffled(Reset):
    """A memory whose states move to the next row of the batch after every step."""

    def update(self, s: torch.Tensor, *seen) -> torch.Tensor:
        """The row before's state, after what this step showed to it."""
        return self.memory.update(s, *seen).roll(1, 0)


def solve(backbone: Backbone, tokenizer: Tokenizer, task: Task, prompts: list[str],
          batch_size: int = 250, fast: Settings | None = None,
          **options) -> tuple[list[bool], list[int]]:
    """Decode prompts and judge them: whether each is right, and the forwards each took until its
    last token stood. fast: store each prompt in fast weights of its own first. Options are
    `generate`'s."""
    device, c = backbone.embedding.weight.device, backbone.config
    verdicts, forwards, batches = [], [], math.ceil(len(prompts) / batch_size)
    for i in range(batches):  # of equal size, give or take one
        part = prompts[i * len(prompts) // batches:(i + 1) * len(prompts) // batches]
        ids, pad = left_pad([tokenizer.encode(p) for p in part], c.pad_id, device)
        needed = torch.zeros(len(part), dtype=torch.long, device=device)
        with adapted(backbone, fast, ids, pad):
            sample = generate(
                backbone, ids, pad_mask=pad, gen_length=GEN_LENGTH, block_length=GEN_LENGTH,
                on_step=lambda s: needed.masked_fill_(s.fresh.any(1), s.forwards), **options)
        verdicts += [task.check(prompt, answer_text(row, tokenizer, c))
                     for prompt, row in zip(part, sample.ids[:, ids.shape[1]:])]
        forwards += needed.tolist()
    return verdicts, forwards


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion of n (Wilson's score interval)."""
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n
                                                          + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


class Accuracies:
    """right[variant] (training seeds, tasks, settings, prompts) of 0 and 1, with means over
    training seeds and prompts, and 95% intervals by bootstrap over both: a draw picks training
    seeds and each task's prompts with replacement, the same for every variant (the frozen backbone
    has one seed). Three seeds are few, so the intervals are rough. That of an accuracy is never
    narrower than Wilson's for so many prompts: where all are right a bootstrap sees no doubt."""

    def __init__(self, right: dict[str, np.ndarray], draws: int = 2000):
        rng = np.random.default_rng(0)
        self.means = {v: r.mean((0, 3)) for v, r in right.items()}            # (tasks, settings)
        self.draws = {v: [] for v in right}
        self.prompts = next(iter(right.values())).shape[3]
        for _ in range(draws):
            picks: dict[tuple, np.ndarray] = {}
            for v, r in right.items():
                seeds, tasks, _, prompts = r.shape
                for n, rows in ((seeds, 1), (prompts, tasks)):
                    if (n, rows) not in picks:
                        picks[n, rows] = rng.multinomial(n, [1 / n] * n, rows) / n   # (rows, n)
                self.draws[v].append(np.einsum("s,tp,stqp->tq", picks[seeds, 1][0],
                                               picks[prompts, tasks], r, optimize=True))
        self.draws = {v: np.stack(d) for v, d in self.draws.items()}  # (draws, tasks, settings)

    def __call__(self, tasks, settings, variant: str, minus: str | None = None):
        """(mean, low, high) in percent over the chosen task and setting indices, of a variant or of
        its lead over another."""
        def over(means):
            value = means[variant] - (means[minus] if minus else 0)
            return 100 * value[..., tasks, :][..., settings].mean((-1, -2))
        mean, (low, high) = over(self.means), np.percentile(over(self.draws), [2.5, 97.5])
        if minus is None:
            least, most = wilson(mean / 100, len(tasks) * len(settings) * self.prompts)
            low, high = min(low, 100 * least), max(high, 100 * most)
        return float(mean), float(low), float(high)


def accuracy(args: argparse.Namespace) -> None:
    """The tables task x setting, for the frozen backbone and each variant of the memory."""
    backbone, tokenizer = load(args.ckpt, args.device, args.dtype)
    if tokenizer is None:
        raise InputError(f"{args.ckpt} has no tokenizer, so no task can be asked")
    trained = []
    for given, pattern in ((args.memory, "metastate*"), (args.reset, "reset*")):
        if given is None:
            folder = find(args.ckpt) if args.ckpt == "tiny" else None
            given = sorted(folder.glob(pattern + ".safetensors")) if folder else []
        trained.append([MetaState.load(path, backbone) for path in given])
    full, reset = trained
    compile_on(backbone.embedding.weight.device, args.compile, backbone, *full, *reset)
    variants = {"frozen": [None], "MetaState": full, "shuffled": [Shuffled(m) for m in full],
                "reset": [Reset(m) for m in reset]}
    variants = {name: memories for name, memories in variants.items() if memories}
    settings = {f"{GEN_LENGTH // b} steps": {"steps": GEN_LENGTH // b} for b in args.budgets}
    settings |= {f"threshold {x}": {"steps": GEN_LENGTH, "threshold": x} for x in args.thresholds}
    shape = (len(args.tasks), len(settings), args.prompts)
    right = {v: np.zeros((len(m), *shape)) for v, m in variants.items()}
    forwards = {v: np.zeros_like(r) for v, r in right.items()}
    work = [(i, j, name, k) for i in range(len(args.tasks)) for j in range(len(settings))
            for name in variants for k in range(len(variants[name]))]
    prompts = []
    for name in args.tasks:
        rng = random.Random(f"{args.seed} {name}")
        prompts.append([draw(TASKS[name], rng, held_out=True)[0] for _ in range(args.prompts)])
    for i, j, name, k in tqdm(work, disable=None):
        right[name][k, i, j], forwards[name][k, i, j] = solve(
            backbone, tokenizer, TASKS[args.tasks[i]], prompts[i], memory=variants[name][k],
            **list(settings.values())[j])

    measured, every = Accuracies(right), list(range(len(args.tasks)))
    print("| task | variant | " + " | ".join(settings) + " |")
    print("|---" * (len(settings) + 2) + "|")
    rows = []
    for task, chosen in [*((name, [i]) for i, name in enumerate(args.tasks)), ("mean", every)]:
        for v in variants:
            row = [dict(zip(("accuracy", "low", "high"), measured(chosen, [j], v)))
                   for j in range(len(settings))]
            for j, cell in enumerate(row):
                cell.update(task=task, variant=v, setting=list(settings)[j], forwards=float(
                    forwards[v][:, chosen, j].mean()), seeds=[
                        float(100 * share) for share in right[v][:, chosen, j].mean((1, 2))])
            rows += row
            print(f"| {task} | {v} | " + " | ".join(
                f"{c['accuracy']:.1f} ({c['low']:.0f}-{c['high']:.0f})" + (
                    f" in {c['forwards']:.1f}" if c["setting"].startswith("thr") else "")
                for c in row) + " |")
    print(f"\n{args.prompts} held-out prompts a task, seed {args.seed}; % right (95% interval over "
          "training seeds and prompts; for thresholds the mean forwards); memories: "
          f"{len(full)} trained, {len(reset)} trained with reset")

    leads, reduced = [], [j for j, b in enumerate(args.budgets) if b > 1]
    for minus in variants if full and reduced else []:
        if minus != "MetaState":
            points, low, high = measured(every, reduced, "MetaState", minus)
            leads.append({"minus": minus, "points": points, "low": low, "high": high})
            print(f"MetaState - {minus}, mean of tasks and reduced budgets: {points:+.1f} points "
                  f"({low:+.1f} to {high:+.1f})")
    needed = None
    if full and 1 in args.budgets:
        one = args.budgets.index(1)
        target = measured.means["frozen"][:, one].mean()
        enough = [forwards["MetaState"][:, :, j].mean() for j in range(len(settings))
                  if measured.means["MetaState"][:, j].mean() >= target]
        needed = min(enough) / forwards["frozen"][:, :, one].mean() if enough else None
        print("forwards for the frozen accuracy at one token per step: " + (
            "not reached" if needed is None else f"{needed:.2f} x as many"))
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        print(json.dumps({"ckpt": args.ckpt, "seed": args.seed, "prompts": args.prompts,
                          "rows": rows, "leads": leads, "forwards_share": needed}))


def plot(rows: list[dict], path: str) -> None:
    """Accuracy against forwards, mean over tasks, one line per variant."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="forwards", ylabel="accuracy, %")
    for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        for kind, style in (("steps", "o-"), ("threshold", "x--")):
            line = sorted((r for r in rows if r["variant"] == variant and r["task"] == "mean"
                           and kind in r["setting"]), key=lambda r: r["forwards"])
            y = [r["accuracy"] for r in line]
            errors = [[abs(r[end] - r["accuracy"]) for r in line] for end in ("low", "high")]
            if line:
                axes.errorbar([r["forwards"] for r in line], y, yerr=errors, fmt=style,
                              color=f"C{i}", label=f"{variant}, by {kind}", capsize=2, alpha=0.8)
    ticks = sorted({int(r["forwards"]) for r in rows if "steps" in r["setting"]})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path)


# ------------------------------------------------------------------ speed
class Clock:
    """Medians of repeated runs on one device, in seconds."""

    def __init__(self, device: torch.device, warmup: int, repeat: int):
        self.device, self.warmup, self.repeat = device, warmup, repeat

    def __call__(self, work: Callable[[], object]) -> dict[str, float]:
        """{"seconds": median, "low": fastest, "high": slowest, "first": of the first run of all,
        which compiles where something does}."""
        times = []
        for _ in range(1 + self.warmup + self.repeat):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - started)
        kept = times[1 + self.warmup:]
        return {"seconds": statistics.median(kept), "low": min(kept), "high": max(kept),
                "first": times[0]}

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def limits(clock: Clock, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine can do, measured here: (FLOP/s of a square matrix product in dtype, bytes/s
    of a copy, read and written bytes together)."""
    big = clock.device.type == "cuda"
    n = 8192 if big else 1536
    a = torch.randn(n, n, device=clock.device, dtype=dtype)
    product = 2 * n ** 3 / clock(lambda: a @ a)["seconds"]
    source = torch.empty(2 ** (30 if big else 27), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return product, 2 * source.numel() / clock(lambda: target.copy_(source))["seconds"]


def work_of(config: Config, computed: int, seen: int, head: int, element: int,
            whole: bool = False) -> tuple[int, int]:
    """(FLOPs, bytes) of a forward for one sequence: `computed` positions attend to `seen`, and the
    head runs at `head` of them, as does the last block's end where not all is wanted. FLOPs are
    2 per weight and position, and attention's two products; bytes are the weights, read once, and
    the keys and values of what is seen and not computed."""
    c = config
    ends = c.vocab * c.dim
    inner = c.parameters - ends * (1 if c.tied else 2)
    last = computed if whole else head
    end = c.dim * (c.dim + 3 * c.mlp_dim)  # of a block's weights: behind queries, keys and values
    flops = 2 * (inner * computed - end * (computed - last) + ends * head) \
        + 4 * c.dim * seen * ((c.layers - 1) * computed + last)
    cached = 2 * c.layers * c.kv_heads * c.head_dim * (seen - computed)
    return flops, element * (inner + ends * (head > 0) + cached)


@torch.no_grad()
def flash_attention(backbone: Backbone, length: int) -> None:
    """Run a forward without padding in which nothing but FlashAttention may compute attention.
    Raises `InputError` where it cannot be chosen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    e = backbone.embed(torch.zeros(1, length, dtype=torch.long,
                                   device=backbone.embedding.weight.device))
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            backbone.hidden(e)
    except RuntimeError as error:
        raise InputError(f"FlashAttention is not chosen here ({error})") from error


def speed(args: argparse.Namespace) -> None:
    """Forwards, block steps, whole generations and a training step, beside the machine's limits."""
    backbone, _ = load(args.ckpt, args.device, args.dtype)
    weight, c = backbone.embedding.weight, backbone.config
    device, dtype = weight.device, weight.dtype
    clock = Clock(device, args.warmup, args.repeat)
    product, copy = limits(clock, dtype)
    if device.type == "cuda":
        flash_attention(backbone, args.lengths[0])
    memory = MetaState.for_backbone(backbone).to(device)
    compile_on(device, args.compile, backbone, memory)
    generator, rows = torch.Generator().manual_seed(args.seed), []
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.ckpt}, {dtype}, {chip}, torch {torch.__version__}: a matrix product does "
          f"{product / 1e12:.3g} TFLOP/s, a copy {copy / 1e9:.3g} GB/s; medians of {args.repeat} "
          f"after {1 + args.warmup} to warm up, fastest and slowest in brackets\n")
    columns = "what", "ms", "first, ms", "tokens/s", "forwards", "TFLOP/s", "GB/s", "peak GB"
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")

    def ids_of(length: int) -> torch.Tensor:
        ids = torch.randint(c.vocab, (1, length), generator=generator)
        return ids.where(ids != c.mask_id, ids - 1).to(device)

    def measure(what: str, work: Callable, flops: int, moved: int, tokens=None, forwards=1):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row = {"what": what, **clock(work), "flops": flops, "bytes": moved}
        s = row["seconds"]
        forwards = forwards() if callable(forwards) else forwards
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
        row.update(forwards=forwards, tokens=tokens, peak_gb=peak)
        rates = []
        for name, amount, unit, limit in (("flops", flops, 1e12, product),
                                          ("bytes", moved, 1e9, copy)):
            row[f"{name}_share"] = amount and amount / s / limit
            rates.append(f"{amount / s / unit:.3g} ({100 * amount / s / limit:.0f}%)"
                         if amount else "")
        rows.append(row)
        print(f"| {what} | {1e3 * s:.3g} ({1e3 * row['low']:.3g}-{1e3 * row['high']:.3g}) | "
              f"{1e3 * row['first']:.3g} | {f'{tokens / s:.4g}' if tokens else ''} | {forwards} | "
              f"{' | '.join(rates)} | {f'{peak:.1f}' if peak else ''} |", flush=True)
        return row

    @torch.no_grad()
    def step(length: int, cache: Cache | None, state: torch.Tensor | None):
        """One denoising step at the last 32 of `length` positions, or of the cache's."""
        start = length - args.block
        ids = inputs[length].clone()
        ids[:, start:] = c.mask_id
        where = torch.arange(start, length, device=device)[None]
        denoise(backbone, ids, where, memory=None if state is None else memory, state=state,
                span=(length // 2, length - length // 2), cache=cache,
                first=0 if cache is None else start, last=None if cache is None else length)

    inputs = {length: ids_of(length) for length in args.lengths}
    for length in args.lengths:
        cache = Cache(backbone, 1, length)
        for kind, kept, computed in (("full-sequence step", None, length),
                                     ("dual-cache block step", cache, args.block)):
            plain, carried = (
                measure(f"{kind}, {length} tokens, memory {name}",
                        lambda: step(length, kept, state),
                        *work_of(c, computed, length, args.block, weight.element_size(),
                                 kept is None or state is not None))
                for name, state in (("off", None), ("on", memory.initial(1))))
            print(f"| -> memory on / off | {carried['seconds'] / plain['seconds']:.3f} x |"
                  + "  |" * (len(columns) - 2))

    prompt = ids_of(args.prompt)
    for cache in (None, "prefix", "dual"):
        for threshold in (None, args.threshold):
            for name, used in (("off", None), ("on", memory)):
                count: list[int] = []
                measure(f"generate {args.gen}, cache {cache}, threshold {threshold}, memory {name}",
                        lambda: count.append(generate(
                            backbone, prompt, memory=used, gen_length=args.gen, cache=cache,
                            block_length=args.block, steps=args.gen, threshold=threshold,
                            order="low_confidence").forwards),
                        0, 0, args.gen, lambda: count[-1])

    for checkpointing in (False, True) if args.train else ():
        backbone.checkpointing = checkpointing
        ids = ids_of(args.train)
        answer = (torch.arange(args.train, device=device) >= args.train // 4)[None]

        def update():
            memory.zero_grad()
            unrolled_loss(backbone, memory, ids, answer, 4).backward()

        # forward 2 P, backward 2 P (activations only), once more forward with checkpointing
        flops = 4 * work_of(c, args.train, args.train, 0, 1, True)[0] * (3 if checkpointing else 2)
        measure(f"training step, K = 4, {args.train} tokens, checkpointing "
                f"{'on' if checkpointing else 'off'}", update, flops, 0, 4 * args.train, 4)
    if args.json:
        print(json.dumps({"ckpt": args.ckpt, "device": chip, "dtype": str(dtype),
                          "product_flops": product, "copy_bytes": copy, "rows": rows}))


# ------------------------------------------------------------------ what training takes
class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live, and their peak."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def update_bytes(config: Config, tokens: int, K: int, checkpointing: bool) -> tuple[int, int, int]:
    """What a memory's update on one sequence takes in bfloat16, in bytes: (the backbone's weights;
    the memory's, with gradients and AdamW's moments, float32; the peak of all else). Nothing is
    computed: the operations of `denoise` and its backward pass run on fake tensors (not through
    `unrolled_loss`, which asks tensors for values). Three quarters of the tokens are the answer,
    and stay masked for all K steps: the most that can be."""
    with torch.device("meta"):
        backbone = Backbone(config)
    with FakeTensorMode():
        backbone.load_state_dict({name: torch.empty(p.shape, dtype=torch.bfloat16)
                                  for name, p in backbone.named_parameters()}, assign=True)
        backbone.requires_grad_(False)
        backbone.checkpointing, backbone.fingerprint = checkpointing, lambda: ""
        memory = MetaState.for_backbone(backbone)
        ids, answer = torch.zeros(1, tokens, dtype=torch.long), 3 * tokens // 4
        where, span = ids[:, :answer], (tokens - answer, answer)
        with Alive(backbone, memory) as alive:
            total, state = 0.0, memory.initial(1)
            for _ in range(K):
                loss, state = denoise(backbone, ids, where, memory=memory, state=state, span=span,
                                      head=lambda h: token_losses(backbone, h, where))
                total = total + loss.mean()
            del state, loss  # what followed the last step: nothing needs it
            total.backward()
        gradients = sum(p.grad.nbytes for p in memory.parameters())
    own = sum(p.nbytes for p in memory.parameters())
    return sum(p.nbytes for p in backbone.parameters()), 4 * own, alive.peak - gradients


def footprint(args: argparse.Namespace) -> None:
    """The table of what a training update takes, by length, steps and checkpointing."""
    config, rows = shapes_of(args.ckpt), []
    print("| tokens | K | checkpointing | backbone | memory and AdamW | activations, peak | "
          "together, GB |\n|---|---|---|---|---|---|---|")
    for tokens in args.tokens:
        for K in args.K:
            for checkpointing in (False, True):
                parts = update_bytes(config, tokens, K, checkpointing)
                rows.append({"tokens": tokens, "K": K, "checkpointing": checkpointing,
                             "bytes": parts})
                print(f"| {tokens} | {K} | {'on' if checkpointing else 'off'} | " + " | ".join(
                    f"{x / 1e9:.2f}" for x in (*parts, sum(parts))) + " |", flush=True)
    print(f"\n{args.ckpt}, one sequence, bfloat16; counted on fake tensors, without what a "
          "device's allocator and kernels need for themselves")
    if args.json:
        print(json.dumps({"ckpt": args.ckpt, "rows": rows}))


# ------------------------------------------------------------------ MemDLM
def memdlm(args: argparse.Namespace) -> None:
    """Accuracy by haystack length and kind, held-out losses over training, and costs, for groups of
    checkpoints that differ in their training seed alone."""
    groups = {"standard": args.standard, "MemDLM": args.memdlm, **dict(args.also)}
    if len(groups) != 2 + len(args.also):
        raise InputError("--also needs names of their own")
    settings = {group: Settings.read(folders[0]) for group, folders in groups.items()}
    models = {group: [load(folder, args.device) for folder in folders]
              for group, folders in groups.items()}
    variants = {f"{group}, {'on' if on else 'off'}": (group, settings[group] if on else None)
                for group in groups for on in (False, True)}
    shape = (len(args.kinds), len(args.lengths), args.prompts)
    right = {v: np.zeros((len(groups[group]), *shape)) for v, (group, _) in variants.items()}
    work = [(i, j) for i in range(len(args.kinds)) for j in range(len(args.lengths))]
    for i, j in tqdm(work, disable=None):
        task = Haystack(args.lengths[j], *KINDS[args.kinds[i]])
        rng = random.Random(f"{args.seed} {args.kinds[i]} {args.lengths[j]}")
        prompts = [draw(task, rng, held_out=True)[0] for _ in range(args.prompts)]
        for v, (group, fast) in variants.items():
            for k, (backbone, tokenizer) in enumerate(models[group]):
                right[v][k, i, j], _ = solve(backbone, tokenizer, task, prompts, 50, fast,
                                             steps=args.steps)

    measured, every, rows, leads = Accuracies(right), list(range(len(args.kinds))), [], []
    print("| asked for | trained, fast weights | " + " | ".join(map(str, args.lengths)) + " |")
    print("|---" * (len(args.lengths) + 2) + "|")
    for kind, chosen in [*((name, [i]) for i, name in enumerate(args.kinds)), ("mean", every)]:
        for v in variants:
            cells = [dict(zip(("accuracy", "low", "high"), measured(chosen, [j], v)),
                          kind=kind, variant=v, length=length,
                          seeds=[float(100 * x) for x in right[v][:, chosen, j].mean((1, 2))])
                     for j, length in enumerate(args.lengths)]
            rows += cells
            print(f"| {kind} | {v} | " + " | ".join(
                f"{c['accuracy']:.1f} ({c['low']:.0f}-{c['high']:.0f})" for c in cells) + " |")
    print(f"\n{args.prompts} held-out prompts a kind and length, seed {args.seed}, {args.steps} "
          "steps; % right (95% interval over training seeds and prompts); training seeds: "
          + ", ".join(f"{group} {len(folders)}" for group, folders in groups.items()))
    for v in list(variants)[1:]:
        for j, length in [*enumerate(args.lengths), (None, "all lengths")]:
            which = range(len(args.lengths)) if j is None else [j]
            points, low, high = measured(every, list(which), v, "standard, off")
            leads.append({"variant": v, "minus": "standard, off", "length": length,
                          "points": points, "low": low, "high": high})
            print(f"{v} - standard, off, {length}: {points:+.1f} points ({low:+.1f} to "
                  f"{high:+.1f})")

    curves = held_out_curves(groups)
    costs = memdlm_costs(args, models["standard"][0], settings["MemDLM"])
    if args.json:
        print(json.dumps({"seed": args.seed, "prompts": args.prompts, "steps": args.steps,
                          "groups": groups, "rows": rows, "leads": leads, "held_out": curves,
                          "costs": costs}))


def held_out_curves(groups: dict[str, list[str]], most: int = 10) -> list[dict]:
    """Print and return the held-out losses in the metrics of each group's runs, at `most` of the
    steps at which they were measured."""
    curves = []
    for group, folders in groups.items():
        runs = []
        for folder in folders:
            path = Path(folder) / "metrics.jsonl"
            lines = [parse_json(text, where) for where, text in read_lines(path)]
            runs.append({line["step"]: line for line in lines if "held_out" in line})
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


def memdlm_costs(args: argparse.Namespace, model, settings: Settings) -> list[dict]:
    """Seconds of a training step (full tuning) and of answering one prompt, relative to standard;
    printed and returned."""
    (backbone, tokenizer), rows = model, []
    c, device = backbone.config, backbone.embedding.weight.device
    clock, fast = Clock(device, 2, args.repeat), FastLoRA(backbone, settings)
    tasks = {kind: Haystack(args.train_length, *KINDS[kind]) for kind in args.kinds}
    ids, answer, _ = task_batches(tokenizer, c.eos_id, args.batch_size, 1, args.seed, tasks)(0, 0)
    ids, answer = ids.to(device), answer.to(device)
    backbone.requires_grad_()

    def update(chosen: FastLoRA | None):
        backbone.zero_grad()
        fast.detach()
        outer_loss(backbone, ids, answer, chosen,
                   torch.Generator().manual_seed(0)).backward()

    def answer_one(prompt: torch.Tensor, chosen: Settings | None):
        with adapted(backbone, chosen, prompt):
            generate(backbone, prompt, gen_length=GEN_LENGTH, block_length=GEN_LENGTH,
                     steps=args.steps)

    works = [(f"training step, {args.batch_size} haystacks of {args.train_length}",
              lambda: update(None), lambda: update(fast))]
    for length in args.lengths:
        text = Haystack(length, *KINDS[args.kinds[0]]).make(random.Random(args.seed))[0]
        prompt = torch.tensor([tokenizer.encode(text)], device=device)
        works.append((f"prompt, haystack of {length}, {args.steps} steps",
                      lambda prompt=prompt: answer_one(prompt, None),
                      lambda prompt=prompt: answer_one(prompt, settings)))
    print("\n| what | standard, ms | with fast weights, ms | times as long |\n|---|---|---|---|")
    for what, plain, with_fast in works:
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
def _lengths(text: str) -> list[int]:
    lengths = _counts(text)
    if min(lengths) < 4 * Haystack.pairs:
        raise argparse.ArgumentTypeError(f"a haystack has at least {4 * Haystack.pairs} tokens")
    return lengths


def _group(text: str) -> tuple[str, list[str]]:
    name, _, folders = text.partition("=")
    if not name or not folders:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER,FOLDER,...")
    return name, folders.split(",")


def _names(text: str, what: str = "task", known=TASKS) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: one of {', '.join(known)}")
    return names


def _kinds(text: str) -> list[str]:
    return _names(text, "kind", KINDS)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(n) for n in text.split(",")]


def _thresholds(text: str) -> list[float]:
    try:
        values = [float(t) for t in text.split(",")] if text else []
    except ValueError:
        values = [math.nan]
    if not all(0 < v <= 1 for v in values):
        raise argparse.ArgumentTypeError(f"thresholds {text!r}: numbers above 0 and up to 1")
    return values


def _budgets(text: str) -> list[int]:
    if not all(b.isdigit() and int(b) > 0 and GEN_LENGTH % int(b) == 0 for b in text.split(",")):
        raise argparse.ArgumentTypeError(f"budgets {text!r}: whole numbers, divisors of "
                                         f"{GEN_LENGTH}")
    return [int(b) for b in text.split(",")]


@command
def main(argv: list[str] | None = None) -> int:
    """Make the table that the command line asks for; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="accuracy | speed | footprint | memdlm")
    p = commands.add_parser("accuracy", help="tasks x step budgets")
    p.set_defaults(run=accuracy)
    p.add_argument("--ckpt", default="tiny", help="checkpoint that was trained on the tasks")
    p.add_argument("--tasks", type=_names, default=list(TASKS), help="comma-separated")
    p.add_argument("--budgets", type=_budgets, default=[1, 2, 4, 8], help="tokens per step")
    p.add_argument("--thresholds", type=_thresholds, default=[0.9999, 0.999, 0.99, 0.9],
                   help='also by confidence; "" for none')
    p.add_argument("--memory", nargs="*", metavar="FILE", help="memories, one per training seed "
                   "(default for tiny: metastate*.safetensors in its folder)")
    p.add_argument("--reset", nargs="*", metavar="FILE", help="memories of train.py --reset "
                   "(default for tiny: reset*.safetensors in its folder)")
    p.add_argument("--plot", metavar="FILE", help="accuracy against forwards (matplotlib)")
    p.add_argument("--prompts", type=_count, default=500, help="held-out prompts a task")
    q = commands.add_parser("speed", help="steps, generations and training against the limits")
    q.set_defaults(run=speed)
    q.add_argument("--ckpt", default="tiny", help="also random:llada-8b, random:dream-7b, or "
                   "any size: random:llada-8b,dim=1024,layers=8,vocab=32000")
    q.add_argument("--lengths", type=_counts,
                   default=[128, 256], help="tokens of a sequence, comma-separated")
    q.add_argument("--prompt", type=_count, default=128, help="tokens to generate from")
    q.add_argument("--gen", type=_count, default=64, help="tokens to generate")
    q.add_argument("--block", type=_count, default=32, help="tokens of a block")
    q.add_argument("--threshold", type=float, default=0.9)
    q.add_argument("--train", type=_count, help="also a training step with so many tokens")
    q.add_argument("--warmup", type=_count, default=2, help="runs before those that count, after "
                   "the very first")
    q.add_argument("--repeat", type=_count, default=5, help="runs that count")
    f = commands.add_parser("footprint", help="memory that a training update takes, counted")
    f.set_defaults(run=footprint)
    f.add_argument("--ckpt", default="llada-8b", help="only its config is read; the published "
                   "nicknames need no download")
    f.add_argument("--tokens", type=_counts, default=[512, 1024], help="of a sequence")
    f.add_argument("--K", type=_counts, default=[4], help="unrolled steps; the end of a run has 12")
    f.add_argument("--json", action="store_true", help="one JSON object as the last line")
    m = commands.add_parser("memdlm", help="fast weights off and on: accuracy, losses, cost")
    m.set_defaults(run=memdlm)
    m.add_argument("--standard", nargs="+", metavar="FOLDER", required=True,
                   help="what memdlm.py train --plain wrote, one folder per training seed")
    m.add_argument("--memdlm", nargs="+", metavar="FOLDER", required=True, help="without --plain")
    m.add_argument("--also", type=_group, action="append", default=[], metavar="NAME=FOLDER,...",
                   help="further groups: ablations, standard at equal compute")
    m.add_argument("--kinds", type=_kinds, default=list(KINDS), help="comma-separated")
    m.add_argument("--lengths", type=_lengths, default=list(LENGTHS), help="tokens of a haystack")
    m.add_argument("--prompts", type=_count, default=200, help="held-out prompts a kind and length")
    m.add_argument("--steps", type=_count, default=GEN_LENGTH, help="denoising steps")
    m.add_argument("--train-length", type=_count, default=64, help="haystack of the timed step")
    m.add_argument("--batch-size", type=_count, default=16, help="of the timed training step")
    m.add_argument("--repeat", type=_count, default=5, help="timed runs that count")
    for each in (p, q, m):
        each.add_argument("--seed", type=seed, default=0, help="picks the prompts")
        each.add_argument("--json", action="store_true", help="one JSON object as the last line")
        each.add_argument("--device", help="default: cuda where there is one")
    for each in (p, q):
        each.add_argument("--compile", action=argparse.BooleanOptionalAction,
                          help="torch.compile (default: on CUDA)")
        each.add_argument("--dtype", choices=DTYPES,
                          help="default: bfloat16 on CUDA, else as stored")
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
