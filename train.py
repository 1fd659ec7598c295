"""Train a MetaState memory for a frozen backbone by K-step unrolling.

    python train.py                                        # for the tiny model, on its tasks
    python train.py --ckpt llada-8b --out out/llada        # 50,000 examples of the Tulu-3 mixture
    python train.py --ckpt dream-7b --data chats.jsonl --max-length 512
    torchrun --nproc-per-node 2 train.py --micros 4        # processes share the micro-batches

`unrolled_loss` walks the whole denoising trajectory in K steps with the graph kept. `fit` is the
loop that every training here shares: AdamW with warm-up, decay and clipping, a metrics file, atomic
checkpoints, and a resume that is bit-exact: a run killed at any moment and started again ends with
the same weights.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from metastate import MetaState
from model import (DTYPES, Backbone, Config, InputError, Parser, Tokenizer, command, compile_on,
                   load, parse_json, read_lines, read_tensors, save_tensors, seed, write_atomic)
from sample import denoise


# ------------------------------------------------------------------ the loss
def reveal_steps(answer_mask: torch.Tensor, K: int, concentration: float,
                 generator: torch.Generator) -> torch.Tensor:
    """(B, T) -> (B, T): the step 0 .. K-1 in which each answer token is revealed, -1 elsewhere.
    The order is random, the counts are Dirichlet-multinomial: the K steps partition the whole
    trajectory from fully masked to fully revealed (arXiv 2609.37974, App. F.6); a step may reveal
    nothing. That the ground truth is what gets revealed is our choice, as that text implies."""
    noise = torch.rand(answer_mask.shape, generator=generator).to(answer_mask.device)
    rank = noise.masked_fill(~answer_mask, 2.0).argsort(1).argsort(1)            # (B, T)
    rng = np.random.default_rng(int(torch.randint(2 ** 62, (), generator=generator)))
    counts = [rng.multinomial(int(n), rng.dirichlet([concentration] * K))
              for n in answer_mask.sum(1)]
    ends = torch.tensor(np.cumsum(counts, 1), device=answer_mask.device)         # (B, K)
    return (rank[..., None] >= ends[:, None]).sum(-1).masked_fill(~answer_mask, -1)


def token_losses(backbone: Backbone, h: torch.Tensor, target: torch.Tensor,
                 most: int = 2 ** 24) -> torch.Tensor:
    """Cross-entropy of (B, n) target ids given hidden states (B, n, d) -> (B, n) float32. Where the
    logits would have more than `most` elements the head runs over a part of the positions at a
    time, and once more in the backward pass, so that no part's logits outlive it."""
    def part(h, target):
        logits = backbone.logits(h).float()                                      # (B, <= n, V)
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none")

    size = max(1, most // (len(h) * backbone.config.vocab))
    if size >= h.shape[1]:
        return part(h, target)
    return torch.cat([checkpoint(part, *pair, use_reentrant=False)
                      for pair in zip(h.split(size, 1), target.split(size, 1))], 1)


def unrolled_loss(backbone: Backbone, memory: MetaState, ids: torch.Tensor,
                  answer_mask: torch.Tensor, K: int = 4, lam: float = 0.5,
                  concentration: float = 1.0, generator: torch.Generator | None = None,
                  reset: bool = False, *, pad_mask: torch.Tensor | None = None, cut: bool = False,
                  surest: bool = False, figures: dict | None = None) -> torch.Tensor:
    """K denoising steps over ground truth, with the graph through the memory kept:

        L = sum_k n_k / N * (lam * dense_k + (1 - lam) * reveal_k)          (arXiv 2609.37974)

    n_k of an example's N answer tokens are revealed at step k; dense_k is the mean cross-entropy
    over all that are still masked at step k, reveal_k over those revealed at step k; averaged over
    the batch. lam = 0.5 and concentration = 1 are our choice.

    ids (B, T), the truth; answer_mask (B, T) True on the answer, one contiguous run in each row;
    pad_mask (B, T) True where padded (on the right). generator: a CPU generator.
    reset: the memory is set back to its start before every step, the control without memory.
    cut: a state's gradient reaches the Mixer and Updater that made it, and ends there (ablation).
    surest: a step reveals as many tokens, but those whose truth the model gives most probability,
    instead of random ones: nearer to what the samplers commit.
    figures: filled with dense_1 .. dense_K as floats. Raises `InputError` for a row with no answer
    or with an answer in several pieces."""
    length = answer_mask.sum(1)                                                  # (B,)
    start = answer_mask.int().argmax(1)                                          # (B,)
    position = torch.arange(ids.shape[1], device=ids.device)
    run = (position >= start[:, None]) & (position < (start + length)[:, None])
    if not torch.equal(run & answer_mask, answer_mask) or int(length.min()) == 0:
        raise InputError("every row of answer_mask needs one contiguous run of True")
    revealed_at = reveal_steps(answer_mask, K, concentration,
                               generator or torch.Generator().manual_seed(0))
    total, state, masked = 0.0, memory.initial(len(ids)), answer_mask
    for k in range(K):
        n = int(masked.sum(1).max())
        if n == 0:  # everything is revealed: later steps have weight 0
            break
        where = masked.byte().argsort(dim=1, descending=True, stable=True)[:, :n]    # (B, n)
        target = ids.gather(1, where)                                                # (B, n)
        loss, state = denoise(backbone, ids.masked_fill(masked, backbone.config.mask_id), where,
                              memory=memory, state=state, span=(start, length), pad_mask=pad_mask,
                              cut=cut, head=lambda h: token_losses(backbone, h, target))
        still, now = masked.gather(1, where), (revealed_at == k).gather(1, where)    # (B, n)
        if surest:
            rank = loss.detach().masked_fill(~still, torch.inf).argsort(1).argsort(1)
            now = still & (rank < (revealed_at == k).sum(1)[:, None])
        masked = masked.scatter(1, where, still & ~now)                              # (B, T)
        dense = (loss * still).sum(1) / still.sum(1).clamp(min=1)                    # (B,)
        reveal = (loss * now).sum(1) / now.sum(1).clamp(min=1)  # 0 where nothing is revealed
        total = total + (now.sum(1) / length * (lam * dense + (1 - lam) * reveal)).mean()
        if figures is not None:
            figures[f"dense_{k + 1}"] = float(dense.detach().sum() / still.any(1).sum())
        state = memory.initial(len(ids)) if reset else state
    return total


def end_phase(steps: int) -> int:
    """Updates of the end phase of a run of so many: a tenth as many as before it (our choice)."""
    return steps // 11


def trajectory(K: int, step: int, steps: int, rng: random.Random) -> tuple[int, bool]:
    """(steps to unroll, surest first) of a micro-batch of update `step`: K in random order, at
    first. In the last quarter of the main part of a run every second micro-batch takes 3 K steps
    and reveals the surest first, in the end phase 6 K. Our choice: sampling updates the memory far
    more often than K times and commits what is sure, so that what is left is hard; a memory that
    has seen neither loses accuracy where steps are many (on the tiny model 1 to 5 points at one
    token per step)."""
    main = steps - end_phase(steps)
    if step >= 0.75 * main and rng.random() < 0.5:
        return (3 if step < main else 6) * K, True
    return K, False


# ------------------------------------------------------------------ the loop
def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def restarted(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: `cosine` down to 0 before the end phase; that one, which
    would learn nothing so late, has a cosine of its own from 0.3, after a short warm-up (our
    choice)."""
    end = end_phase(steps)
    if step < steps - end:
        return cosine(step, steps - end, warmup)
    return 0.3 * cosine(step - (steps - end), end, end // 20)


def trapezoid(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, flat, then linear to 0 over the last tenth.
    Until that tenth begins a run does not depend on `steps`: it can be made longer or shorter."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (0.1 * steps))


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that train together; joins those that torchrun started."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fit(parameters: dict[str, nn.Parameter], loss_fn: Callable, out: str | Path, *, steps: int,
        lr: float, schedule: Callable = cosine, warmup: int = 100, weight_decay: float = 0.01,
        clip: float = 1.0, micros: int = 1, save_every: int = 200, eval_every: int = 500,
        evaluate: Callable | None = None, settings: dict | None = None) -> None:
    """Train `parameters` in place for `steps` updates.

    loss_fn(step, micro) -> (loss, figures): called for the micro-batches 0 .. micros - 1 of every
        step, whose gradients are averaged; figures is a dict of floats for the log. All its
        randomness must come from (step, micro): this is what makes the resume exact. Several
        processes (torchrun) share the micro-batches, so their number must divide `micros`.
    evaluate(step) -> dict of figures, called every `eval_every` steps and after the last.
    out: the folder for training.safetensors (weights, optimizer state, step) and metrics.jsonl. If
        it holds a state with the same `settings` the run goes on from there; with other settings
        it is an `InputError`.

    A loss that is not finite raises `InputError` and leaves the last good checkpoint."""
    out, settings = Path(out), json.loads(json.dumps(settings or {}))
    rank, world = processes()
    if micros % world:
        raise InputError(f"{world} processes do not divide {micros} micro-batches")
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": weight_decay},
         {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.98))
    state, metrics = out / "training.safetensors", out / "metrics.jsonl"
    start = _resume(state, parameters, optimizer, settings)
    if rank == 0:
        _keep_lines_up_to(metrics, start)
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=None if rank == 0 else True)
    began = time.perf_counter()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, warmup)
        records: list[dict[str, float]] = []
        for micro in range(rank, micros, world):
            loss, figures = loss_fn(step, micro)
            (loss / micros).backward()
            records.append({"loss": loss.item(), **figures})
        for p in parameters.values():  # what a variant does not use: the same state for all
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world > 1:
            records = _combine(records, parameters)
        figures = {key: float(np.mean([r[key] for r in records if key in r]))
                   for key in dict.fromkeys(k for r in records for k in r)}
        figures["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters.values(), clip))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(figures[name]):
                raise InputError(f"{name} is {figures[name]} at step {step + 1}; training stops, "
                                 f"and {out} keeps the last good checkpoint")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == steps
        if evaluate is not None and ((step + 1) % eval_every == 0 or last):
            figures.update(evaluate(step + 1))
            if rank == 0:
                tqdm.write(_line(step + 1, steps, figures, time.perf_counter() - began))
                sys.stdout.flush()
        if rank == 0:
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in list(figures.items())[:6]))
            out.mkdir(parents=True, exist_ok=True)
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, **figures}) + "\n")
            if (step + 1) % save_every == 0 or last:
                _save(state, parameters, optimizer, step + 1, settings)


def _combine(records: list[dict], parameters: dict[str, nn.Parameter]) -> list[dict]:
    """Add up the gradients of all processes in place, and join their figures. The sum is the
    average: every loss is divided by the number of all micro-batches. Plainer than
    DistributedDataParallel, whose hooks want all K steps to be one module's forward."""
    flat = torch.cat([p.grad.flatten() for p in parameters.values()])
    dist.all_reduce(flat)
    for p, g in zip(parameters.values(), flat.split([p.numel() for p in parameters.values()])):
        p.grad.copy_(g.view_as(p))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, records)
    return [record for part in everyone for record in part]


def _line(step, steps, figures, seconds) -> str:
    shown = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
    return f"step {step}/{steps}  {seconds:.0f} s  {shown}"


def _save(path, parameters, optimizer, step, settings) -> None:
    """Weights, both moments of AdamW and its step counters, as one safetensors file."""
    tensors = {f"weight.{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors.update((f"{key}.{name}", value) for key, value in optimizer.state[p].items())
    save_tensors(path, tensors, {"step": step, "settings": settings})


def _resume(path, parameters, optimizer, settings) -> int:
    """Fill weights and optimizer from a state file and return its step, or 0 if there is none."""
    if not path.is_file():
        return 0
    tensors, metadata = read_tensors(path)
    try:
        stored = metadata["settings"]
        if stored != settings:
            changed = sorted(k for k in {*stored, *settings} if stored.get(k) != settings.get(k))
            raise InputError(f"{path.parent} holds a run with other settings "
                             f"({', '.join(changed)}): pass another --out, or delete it")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"weight.{name}"])
                optimizer.state[p] = {
                    "step": tensors[f"step.{name}"].clone(),
                    **{k: tensors[f"{k}.{name}"].to(p.device, copy=True)
                       for k in ("exp_avg", "exp_avg_sq")}}
        return metadata["step"]
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not the state of such a run ({error})") from error


def _keep_lines_up_to(metrics: Path, step: int) -> None:
    """Drop the metrics that a killed run wrote after its last checkpoint."""
    if metrics.is_file():
        lines = []
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except json.JSONDecodeError:  # the line that the kill cut short
                pass
        write_atomic(metrics, lambda p: p.write_text("".join(lines), encoding="utf-8"))


# ------------------------------------------------------------------ data
def knows_tasks(tokenizer: Tokenizer) -> bool:
    """True for the tiny model and its like, whose vocabulary tiny.py makes: bytes and few names."""
    from tiny import SPECIAL, VOCAB  # here, because tiny trains with this file's loop
    return len(tokenizer.vocab) <= VOCAB and all(name in tokenizer.vocab for name in SPECIAL)


def move(data, device):
    """The tensors of a batch on a device; what is None stays None."""
    return [None if x is None else x.to(device) for x in data]


def task_batches(tokenizer: Tokenizer, eos_id: int, size: int, micros: int, seed: int,
                 tasks: dict | None = None):
    """batch(step, micro, held_out) -> (ids, answer_mask, pad_mask) of the tiny model's own tasks,
    or of others, one task per micro-batch in turn."""
    from tiny import TASKS, batch
    tasks = TASKS if tasks is None else tasks
    names = list(tasks)

    def draw(step: int, micro: int, held_out: bool = False):
        rng = random.Random(f"{seed} {step} {micro}")
        task = tasks[names[(step * micros + micro) % len(names)]]
        prompts, answers, pad = batch(task, tokenizer, rng, size, held_out, eos_id)
        ids = torch.cat([prompts, answers], 1)
        answer = torch.arange(ids.shape[1]) >= prompts.shape[1]
        return ids, answer.expand(ids.shape), None if pad is None else F.pad(
            pad, (0, answers.shape[1]))

    return draw


def read_examples(path: str | Path, tokenizer: Tokenizer, eos_id: int,
                  max_length: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids of a JSONL file with `messages` (the last one is the answer) or `prompt`
    and `response` a line, in the tokenizer's chat format. An answer ends with EOS and is cut where
    the two together pass max_length; an example whose prompt leaves less than 8 positions is
    dropped. Raises `InputError` with the file and line number."""
    examples, dropped = [], 0
    for where, line in read_lines(path):
        fields = parse_json(line, where)
        messages = fields.get("messages")
        if messages is None and "prompt" in fields:
            messages = [{"role": "user", "content": fields["prompt"]},
                        {"role": "assistant", "content": fields.get("response")}]
        if not isinstance(messages, list) or len(messages) < 2 or \
                not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant" or \
                not isinstance(messages[-1].get("content"), str) or not messages[-1]["content"]:
            raise InputError(f"{where}: no response: a line needs `messages` that end with the "
                             "assistant's, or `prompt` and `response`")
        try:
            prompt = tokenizer.chat(messages[:-1])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        answer = tokenizer.encode(messages[-1]["content"] + tokenizer.end_of_turn) + [eos_id]
        if len(prompt) > max_length - 8:
            dropped += 1
        else:
            examples.append((prompt, answer[:max_length - len(prompt)]))
    if not examples:
        raise InputError(f"{path} holds no example that fits into {max_length} tokens")
    if dropped:
        print(f"{dropped} of {dropped + len(examples)} examples have prompts too long for "
              f"--max-length {max_length} and are left out", file=sys.stderr)
    return examples


def file_batches(examples, pad_id: int, size: int, micros: int, seed: int):
    """batch(step, micro, held_out) -> (ids, answer_mask, pad_mask) of examples padded on the right.
    The first 64 (at most an eighth) are held out; the others come in a new order every epoch."""
    kept = min(64, len(examples) // 8)
    held, train = examples[:kept] or examples, examples[kept:]
    orders: dict[int, list[int]] = {}

    def pick(index: int):
        epoch, offset = divmod(index, len(train))
        if epoch not in orders:
            orders.clear()
            orders[epoch] = random.Random(f"{seed} {epoch}").sample(range(len(train)), len(train))
        return train[orders[epoch][offset]]

    def draw(step: int, micro: int, held_out: bool = False):
        first = micro * size if held_out else (step * micros + micro) * size
        rows = [held[(first + i) % len(held)] if held_out else pick(first + i) for i in range(size)]
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((size, width), pad_id)
        answer, pad = torch.zeros(size, width, dtype=torch.bool), torch.ones(size, width).bool()
        for i, (p, a) in enumerate(rows):
            ids[i, :len(p) + len(a)] = torch.tensor(p + a)
            answer[i, len(p):len(p) + len(a)] = True
            pad[i, :len(p) + len(a)] = False
        return ids, answer, pad if bool(pad.any()) else None

    return draw


def tulu(seed: int, number: int = 50_000) -> Path:
    """The paper's data: examples of the Tulu-3 SFT mixture, picked by seed, prepared once through
    the optional `datasets` package and kept as JSONL."""
    path = Path("data") / f"tulu3-{number}-seed{seed}.jsonl"
    if not path.is_file():
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError("preparing the Tulu-3 mixture needs the datasets package: pip install "
                             "datasets, or pass your own --data FILE.jsonl") from error
        rows = load_dataset("allenai/tulu-3-sft-mixture", split="train")
        rows = rows.shuffle(seed=seed).select(range(number))

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n")

        write_atomic(path, write)
    return path


def choose_data(args: argparse.Namespace, tokenizer: Tokenizer, config: Config,
                tasks: dict | None = None):
    """The batches that a training command asks for: the file of --data, else the tasks of a model
    that knows them, else the Tulu-3 mixture."""
    if args.data is None and knows_tasks(tokenizer):
        return task_batches(tokenizer, config.eos_id, args.batch_size, args.micros, args.seed,
                            tasks)
    rank, world = processes()
    if args.data is None and rank == 0:
        tulu(args.seed)
    if world > 1:
        dist.barrier()  # one process prepares the file, all read it
    examples = read_examples(args.data or tulu(args.seed), tokenizer, config.eos_id,
                             min(args.max_length, config.max_len))
    return file_batches(examples, config.pad_id, args.batch_size, args.micros, args.seed)


# ------------------------------------------------------------------ command line
def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; raises `InputError` for values that make no sense."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny", help="frozen backbone: nickname, folder or hub id")
    p.add_argument("--out", default="out/metastate", help="folder of the run; resumes if killed")
    p.add_argument("--data", metavar="FILE", help="JSONL with messages, or prompt and response "
                   "(default: tiny's tasks, else the Tulu-3 mixture)")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--dtype", choices=DTYPES, help="of the backbone; default: bfloat16 on CUDA")
    size = p.add_argument_group("memory")
    size.add_argument("--slots", type=int, help="M (default: 64 for 8B and 7B, else 24)")
    size.add_argument("--width", type=int, help="D (default: 1024 for 8B and 7B, else d)")
    size.add_argument("--no-time", action="store_true", help="ablation: t_cond is constant")
    size.add_argument("--no-local", action="store_true", help="ablation: no local attention bias")
    loss = p.add_argument_group("loss")
    loss.add_argument("--K", type=int, default=4, help="unrolled steps")
    loss.add_argument("--no-long", action="store_true", help="ablation: K random steps to the "
                      "end, and no end phase")
    loss.add_argument("--lam", type=float, default=0.5, help="dense against reveal loss")
    loss.add_argument("--concentration", type=float, default=1.0, help="of the Dirichlet")
    loss.add_argument("--reset", action="store_true", help="control: memory reset at every step")
    loss.add_argument("--cut", action="store_true", help="ablation: gradients reach one step back")
    fit_ = p.add_argument_group("optimisation")
    fit_.add_argument("--steps", type=int, default=3300, help="updates")
    fit_.add_argument("--batch-size", type=int, help="examples per micro-batch (default: 1 for 8B "
                      "and 7B, else 16)")
    fit_.add_argument("--micros", type=int, help="micro-batches per update; for tiny's tasks one "
                      "task each (default: 16 for 8B and 7B, else 4)")
    fit_.add_argument("--lr", type=float, default=1e-3, help="peak of AdamW")
    fit_.add_argument("--warmup", type=int, default=50)
    fit_.add_argument("--seed", type=seed, default=0, help="of the memory's weights and the data")
    fit_.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and response")
    fit_.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                      help="recompute blocks: less memory (default: for 8B and 7B)")
    fit_.add_argument("--compile", action=argparse.BooleanOptionalAction,
                      help="torch.compile (default: on CUDA)")
    fit_.add_argument("--save-every", type=int, default=100)
    fit_.add_argument("--eval-every", type=int, default=250)
    args = p.parse_args(argv)
    for name in ("K", "steps", "batch_size", "micros", "max_length", "save_every", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and has to be "
                             "1 or more")
    if not 0 < args.lr < math.inf or args.warmup < 0:
        raise InputError("--lr has to be above 0 and --warmup 0 or more")
    if not 0 <= args.lam <= 1 or not 0 < args.concentration < math.inf:
        raise InputError("--lam has to lie in [0, 1] and --concentration above 0")
    return args


def fill_in(args: argparse.Namespace, config: Config) -> None:
    """The defaults that go by the backbone's size (our choice). For 8B and 7B, one example at a
    time, its blocks recomputed, should fit 40 GB in the end phase too (`bench.py footprint`); 3,300
    updates of 16 examples pass once over the 50,000."""
    small, large = dict(batch_size=16, micros=4, checkpointing=False), dict(
        batch_size=1, micros=16, checkpointing=True)
    for name, value in (large if config.large else small).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


@command
def main(argv: list[str] | None = None) -> int:
    """Train, resume or finish the run in --out; returns the exit code."""
    args = parse(argv)
    rank, _ = processes()
    device = args.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    backbone, tokenizer = load(args.ckpt, device, args.dtype)
    if tokenizer is None:
        raise InputError(f"{args.ckpt} has no tokenizer, so no data can be read")
    c = backbone.config
    fill_in(args, c)
    backbone.checkpointing = args.checkpointing
    device = backbone.embedding.weight.device
    memory = MetaState.for_backbone(
        backbone, args.slots, args.width, time=not args.no_time, local=not args.no_local,
        generator=torch.Generator().manual_seed(args.seed)).to(device)
    compile_on(device, args.compile, backbone, memory)
    draw = choose_data(args, tokenizer, c)
    count = sum(p.numel() for p in memory.parameters())
    if rank == 0:
        print(f"memory: {count:,} parameters, {100 * count / c.parameters:.2f}% of the backbone's")

    def loss_of(step: int, micro: int, held_out: bool):
        ids, answer, pad = move(draw(step, micro, held_out), device)
        figures: dict[str, float] = {}
        rng = random.Random(f"reveal {args.seed} {step} {micro}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        K, surest = (args.K, False) if held_out or args.no_long else trajectory(
            args.K, step, args.steps, rng)
        loss = unrolled_loss(backbone, memory, ids, answer, K, args.lam, args.concentration,
                             generator, args.reset, pad_mask=pad, cut=args.cut,
                             surest=surest, figures=figures if K == args.K else None)
        return loss, figures

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        losses = [loss_of(0, i, True)[0].item() for i in range(max(8, 64 // args.batch_size))]
        return {"held_out": sum(losses) / len(losses)}

    chosen = {k: v for k, v in vars(args).items()
              if k not in ("out", "device", "dtype", "save_every", "eval_every", "checkpointing",
                           "compile")}
    fit(dict(memory.named_parameters()), lambda step, micro: loss_of(step, micro, False), args.out,
        steps=args.steps, lr=args.lr, schedule=cosine if args.no_long else restarted,
        warmup=args.warmup, micros=args.micros,
        save_every=args.save_every, eval_every=args.eval_every, evaluate=evaluate,
        settings={**chosen, "backbone": memory.fingerprint})
    if rank == 0:
        memory.save(Path(args.out) / "metastate.safetensors")
        print(f"wrote {Path(args.out) / 'metastate.safetensors'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
