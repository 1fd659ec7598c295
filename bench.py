"""What decoding with fewer steps costs, and how fast a step is.

    python bench.py accuracy                       # tasks x steps and thresholds, up to an hour
    python bench.py accuracy --tasks chain,sums --budgets 1,4 --prompts 200 --json
    python bench.py speed --ckpt random:llada-8b --quick                  # on a GPU, two minutes
    python bench.py speed --ckpt random:llada-8b --lengths 1024,2048 --batches 1,8 --train 1024
    python bench.py harness --ckpt llada-8b --tasks gsm8k      # by lm-eval, as it was published

Accuracy is the share of held-out prompts whose answer is right by the task's own rules. Budget b is
one step per b tokens: 1 is one token per step, 8 an eighth as many steps. With memories, for a
model that names its tasks those in its folder (none with a bare `--memory --reset`), the table has
the frozen backbone beside MetaState and its controls, reset and shuffled;
--also NAME=FILES adds a variant.

Speed is said as a share of what the machine does in a matrix product and a copy, measured in the
same run. random:NAME has a published model's shapes, and random:FOLDER those of any config.json.
"""
from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from functools import partial
from itertools import product
from typing import Callable

import lib.interrupts  # noqa: F401  Ctrl-C during the imports below
import torch

from lib.accuracies import AccuracyTable
from lib.bench_options import bench_parser
from lib.checks import block_of, check_budgets
from lib.cli import InputError, command, compile_on, require
from lib.data import left_pad
from lib.files import to_json
from lib.hub import find, stated
from lib.live import answer_text
from lib.memories import rounded
from lib.plans import plans
from lib.progress import progress, slow
from lib.run import local_device
from lib.stats import Clock, Timings, limits, plot
from lib.tokenizer import Tokenizer, needed
from lib.versus import versus
from metastate import MetaState, Reset, Shuffled
from model import Backbone, Config, config_of, load
from sample import BY_PROBABILITY, ORDERS, Commit, Sample, Steps, decide, denoise, generate
from tasks import TASKS, Task, draw
from train import token_losses, unrolled_loss


# ------------------------------------------------------------------ accuracy
def solve(backbone: Backbone, tokenizer: Tokenizer, task: Task, prompts: list[str], length: int,
          batch_size: int = 250, decode: Callable[..., Sample] = generate,
          **options) -> tuple[list[bool], list[int]]:
    """Answer prompts in blocks of 32, or in one where 32 does not divide `length`, and judge them:
    whether each is right, and how many forwards committed some of it: in a batch others are for
    rows whose block is not whole yet. decode: `generate`, with these options, or one around it."""
    c, device = backbone.config, backbone.embedding.weight.device
    verdicts, forwards, batches = [], [], math.ceil(len(prompts) / batch_size)
    for i in range(batches):  # of equal size, give or take one
        part = prompts[i * len(prompts) // batches:(i + 1) * len(prompts) // batches]
        ids, pad = left_pad([tokenizer.encode(p) for p in part], c.pad_id, device)
        took = torch.zeros(len(part), dtype=torch.long, device=device)

        def note(step: Sample) -> None:
            took.add_(step.fresh.any(1))

        sample = decode(backbone, ids, pad_mask=pad, gen_length=length, on_step=note,
                        block_length=block_of(length), **options)
        verdicts += [task.check(prompt, answer_text(row, tokenizer, c.mask_id, c.eos_id))
                     for prompt, row in zip(part, sample.ids[:, ids.shape[1]:])]
        forwards += took.tolist()
    return verdicts, forwards


def memories(backbone: Backbone, ckpt: str, files: list[str] | None, prefix: str,
             shipped: bool) -> list[MetaState]:
    """The memories in files, or where none are named and some are shipped, those in the
    checkpoint's folder whose names begin with the prefix: one per training seed."""
    if files is None:
        files = sorted(find(ckpt).glob(prefix + "*.safetensors")) if shipped else []
    return [MetaState.load(path, backbone) for path in files]


def alone(by: Callable, prompts: list[str]) -> float:
    """Seconds that `solve` takes for a prompt, one at a time, after one that does not count; nan
    for none."""
    if not prompts:
        return math.nan
    by(prompts[:1])
    started = time.perf_counter()
    by(prompts, batch_size=1)
    return (time.perf_counter() - started) / len(prompts)


def accuracy(args: argparse.Namespace) -> None:
    """The table task x setting, for the frozen backbone and each variant of the memory."""
    backbone, tokenizer = load(args.ckpt, args.device, args.dtype)
    tokenizer, (length, named) = needed(tokenizer, args.ckpt), stated(args.ckpt)
    names = list(dict.fromkeys(args.tasks or named))
    require(bool(names), f"{args.ckpt} names no tasks of its own: pass --tasks")
    for name in names:
        require(name in TASKS, f"{args.ckpt} names a task {name!r}, none of {', '.join(TASKS)}")
    trained = memories(backbone, args.ckpt, args.memory, "metastate", bool(named))
    reset = memories(backbone, args.ckpt, args.reset, "reset", bool(named))
    also = {name: memories(backbone, args.ckpt, files, "", False) for name, files in args.also}
    compile_on(backbone.embedding.weight.device, args.compile, backbone, *trained, *reset,
               *sum(also.values(), []))
    variants = {"frozen": [None], "MetaState": trained, "shuffled": [*map(Shuffled, trained)],
                "reset": [*map(Reset, reset)], **also}
    variants = {name: found for name, found in variants.items() if found}
    steps = list(dict.fromkeys(math.ceil(length / b) for b in args.budgets))
    check_budgets(length, steps)
    settings = {f"{n} steps": {"steps": n} for n in steps}
    settings |= {f"threshold {x}": {"steps": length, "threshold": x} for x in args.thresholds}

    prompts = {}
    for name in names:
        rng = random.Random(f"{args.seed} {name}")
        prompts[name] = [draw(name, rng, held_out=True)[0] for _ in range(args.prompts)]
        longest = max(len(tokenizer.encode(prompt)) for prompt in prompts[name])
        require(longest + length <= (most := backbone.config.max_len), f"prompts of {name} have up "
                f"to {longest} tokens: with {length} to answer more than the model's {most}")
    table = AccuracyTable({v: len(found) for v, found in variants.items()}, names, list(settings),
                          args.prompts)
    for i, v, j, k in progress(table.work(), "settings"):
        by = partial(solve, backbone, tokenizer, TASKS[names[i]], length=length,
                     memory=variants[v][k], **list(settings.values())[j])
        found = by(prompts[names[i]])
        table.add(i, v, j, k, *found, alone(by, prompts[names[i]][:args.alone]))
    found = table.finish(
        f"{args.prompts} held-out prompts a task, seed {args.seed}; % right (95% interval over "
        "training seeds and prompts; for thresholds the mean forwards); memories: "
        f"{len(trained)} trained, {len(reset)} trained with reset",
        [j for j, n in enumerate(steps) if n < length],
        steps.index(length) if length in steps else None)
    if args.json:
        print(to_json({"ckpt": args.ckpt, "seed": args.seed, "prompts": args.prompts,
                       "rows": table.rows, **found}))
    if args.plot:
        plot(table.rows, args.plot)


# ------------------------------------------------------------------ speed
def work_of(config: Config, computed: int, seen: int, head: int, element: int,
            batch: int = 1) -> tuple[int, int]:
    """(FLOPs, bytes) of a forward: in each of `batch` sequences `computed` positions attend to
    `seen` in every block, and the head runs at `head` of them; a weight has `element` bytes. FLOPs
    are 2 per weight and position, and attention's two products; bytes are the weights, read once,
    and the keys and values of what is seen and not computed."""
    c = config
    ends = c.vocab * c.dim
    inner = c.parameters - ends * (1 if c.tied else 2)
    flops = 2 * (inner * computed + ends * head) + 4 * c.dim * seen * c.layers * computed
    cached = 2 * c.layers * c.kv_heads * c.head_dim * (seen - computed)
    return batch * flops, element * (inner + ends * (head > 0) + batch * cached)


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
    """Generations, steps and a training update, beside the machine's limits."""
    c = config_of(args.ckpt.removeprefix("random:"))
    most = max(*args.lengths, args.prompt + args.gen, args.train or 0)
    require(most <= c.max_len, f"{most} tokens are more than the model's {c.max_len}")
    started = time.perf_counter()
    backbone, _ = slow(f"loading {args.ckpt}")(load)(args.ckpt, args.device, args.dtype)
    loaded = time.perf_counter() - started
    device, dtype = backbone.embedding.weight.device, backbone.embedding.weight.dtype
    clock = Clock(device, args.warmup, args.repeat)
    flops, copied = limits(clock, dtype)
    if device.type == "cuda":
        flash_attention(backbone, args.lengths[0])
    memory = MetaState.for_backbone(backbone).to(device)
    compile_on(device, args.compile, backbone, memory)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.ckpt}, {dtype}, {chip}, torch {torch.__version__}: a matrix product does "
          f"{flops / 1e12:.3g} TFLOP/s, a copy {copied / 1e9:.3g} GB/s; medians of {args.repeat} "
          f"after {1 + args.warmup} to warm up, fastest and slowest in brackets\n")
    timings, generator = Timings(clock, flops, copied), torch.Generator().manual_seed(args.seed)
    for batch in args.batches:
        timings.suffix = f", batch {batch}" if batch > 1 else ""
        prompt, memory = random_ids(backbone, args.prompt, generator, batch), rounded(memory, dtype)
        time_generations(timings, backbone, memory, prompt, args)
        for length in args.lengths:
            time_steps(timings, backbone, memory, random_ids(backbone, length, generator, batch),
                       args.block)
        if args.train:
            time_training(timings, backbone, memory.float(),
                          random_ids(backbone, args.train, generator, batch))
    result = loaded + timings.rows[0]["first"]
    print(f"\nfrom nothing to the first whole result {result:.1f} s, {loaded:.1f} of them loading; "
          "the rest is the first generation, with all that it compiles")
    if args.json:
        print(to_json({"ckpt": args.ckpt, "device": chip, "dtype": str(dtype),
                       "product_flops": flops, "copy_bytes": copied, "first_result": result,
                       "rows": timings.rows}))


def random_ids(backbone: Backbone, length: int, generator: torch.Generator,
               batch: int = 1) -> torch.Tensor:
    """(batch, length) ids, none of them the mask's."""
    c = backbone.config
    ids = torch.randint(c.vocab - 1, (batch, length), generator=generator)
    return (ids + (ids >= c.mask_id)).to(backbone.embedding.weight.device)


@torch.no_grad()
def time_steps(timings: Timings, backbone: Backbone, memory: MetaState, ids: torch.Tensor,
               block: int) -> None:
    """One denoising step of `generate`, the choice of tokens included, for the first `block` of a
    response that is the later half of ids (B, T): of the whole sequence, of the response on a
    prefix cache, of the block on a dual cache; without and with the memory."""
    c, (B, T) = backbone.config, ids.shape
    response, element = max(block, T // 2), backbone.embedding.weight.element_size()
    times = 10 if ids.is_cuda else 1  # between two waits for the device

    by = partial(decide, order="low_confidence", mask_id=c.mask_id)
    for kind, cache, computed in (("full-sequence step", None, T),
                                  ("prefix-cache step", "prefix", response),
                                  ("dual-cache block step", "dual", block)):
        rows = []
        for name, used in (("off", None), ("on", memory)):
            steps = Steps(backbone, ids[:, :T - response], response, block, by,
                          torch.Generator(ids.device), memory=used, cache=cache)
            steps(T - response, 0, Commit(1))  # fills the cache

            def work() -> None:
                for _ in range(times):
                    steps(T - response, 1, Commit(1))

            rows.append(timings.take(
                f"{kind}, {T} tokens, memory {name}", work,
                *work_of(c, computed, T, block, element, B), times=times))
        timings.compare("memory on / off", rows[1], rows[0])


def time_generations(timings: Timings, backbone: Backbone, memory: MetaState, prompt: torch.Tensor,
                     args: argparse.Namespace) -> None:
    """Whole generations behind prompt (B, P), by cache, threshold and memory."""
    for cache, threshold, (name, used) in product(
            (None, "dual") if args.quick else (None, "prefix", "dual"),
            dict.fromkeys((None, args.threshold)), (("off", None), ("on", memory))):
        forwards, waits = [], []

        def work() -> None:
            began = time.perf_counter()

            def first_token(step: Sample) -> None:
                if len(waits) == len(forwards):
                    timings.clock.wait()
                    waits.append(time.perf_counter() - began)

            forwards.append(generate(
                backbone, prompt, memory=used, gen_length=args.gen, block_length=args.block,
                steps=args.gen, order="low_confidence", threshold=threshold, cache=cache,
                on_step=first_token).forwards)

        timings.take(f"generate {args.gen}, cache {cache}, threshold {threshold}, memory {name}",
                     work, tokens=len(prompt) * args.gen, forwards=lambda: forwards[-1],
                     first_token=lambda: statistics.median(waits[1 + args.warmup:]))


def time_training(timings: Timings, backbone: Backbone, memory: MetaState,
                  ids: torch.Tensor) -> None:
    """A training update's loss and gradients on ids (B, T), K = 4, of which the last three quarters
    are the answer; and its cross-entropy alone. FLOPs are 4 per weight, token and step (forward,
    backward through activations), with checkpointing 6 (forward again)."""
    (B, T), K, c = ids.shape, 4, backbone.config
    answer = (torch.arange(T) >= T // 4).expand(B, T)
    target = ids[:, T // 4:]
    h = torch.randn(*target.shape, c.dim, device=ids.device, dtype=backbone.embedding.weight.dtype,
                    requires_grad=True)

    def update() -> None:
        memory.zero_grad()
        unrolled_loss(backbone, memory, ids, answer, K).backward()

    timings.take(f"cross-entropy of {target.numel()} tokens and its gradient",
                 lambda: token_losses(backbone, h, target).mean().backward(),
                 4 * c.dim * c.vocab * target.numel(), forwards=0)
    for backbone.checkpointing in (False, True):
        flops = (6 if backbone.checkpointing else 4) * c.parameters * K * ids.numel()
        timings.take(f"training step, K = {K}, {T} tokens, checkpointing "
                     f"{'on' if backbone.checkpointing else 'off'}", update, flops,
                     tokens=ids.numel(), forwards=K)


# ------------------------------------------------------------------ harness
def harness(args: argparse.Namespace) -> None:
    """Published benchmarks or a file of examples: the frozen backbone beside memories."""
    folder = find(args.ckpt)
    config = Config.from_json(folder)
    tokenizer = needed(Tokenizer.found_in(folder, config.vocab, args.ckpt), args.ckpt)
    plan = plans(args, config, tokenizer, ORDERS, BY_PROBABILITY)  # before weights are read
    backbone, _ = load(args.ckpt, local_device(args.device), args.dtype)
    reset, trained = (memories(backbone, args.ckpt, files, "", False)
                      for files in (args.reset, args.memory))
    compile_on(backbone.embedding.weight.device, args.compile, backbone, *reset, *trained)
    versus(args, plan, backbone, tokenizer,
           {"frozen": [(None, None)], "reset": [*zip(map(Reset, reset), args.reset)],
            "MetaState": [*zip(trained, args.memory)]}, generate, denoise)


# ------------------------------------------------------------------ command line
@command
def main(argv: list[str] | None = None) -> None:
    """Make the table that the command line asks for."""
    args = bench_parser(__doc__, TASKS).parse_args(argv)
    {"accuracy": accuracy, "speed": speed, "harness": harness}[args.table](args)


if __name__ == "__main__":
    raise SystemExit(main())
