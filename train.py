"""Train a MetaState memory for a frozen backbone by K-step unrolling.

    python train.py                                        # for the tiny model, on its tasks
    python train.py --ckpt llada-8b --out out/llada        # 50,000 examples of the Tulu-3 mixture
    python train.py --ckpt dream-7b --data chats.jsonl --max-length 512
    torchrun --nproc-per-node 2 train.py --micros 4        # processes share the micro-batches

`unrolled_loss` walks the whole trajectory in K steps with the graph kept. `fit` is the loop of
every training here: a run killed at any moment and started again ends with the same weights.
"""
from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Callable

import lib.interrupts  # noqa: F401  Ctrl-C during the imports below
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.cli import command, compile_on, require
from lib.data import choose_data, move, training_defaults
from lib.memories import new_memory, save_memory
from lib.options import LEGEND, run_settings, training_parser
from lib.progress import slow
from lib.run import Run, local_device, processes
from lib.stats import Clock, Pace, product_rate
from lib.tokenizer import needed, stand_in
from metastate import Cut, MetaState, Reset
from model import Backbone, load
from sample import denoise
from tasks import draw


# ------------------------------------------------------------------ what a step reveals
def reveal_counts(length: torch.Tensor, K: int, concentration: float,
                  generator: torch.Generator) -> torch.Tensor:
    """(B,) answer lengths -> (B, K): how many tokens each step reveals, Dirichlet-multinomial; a
    step may reveal none  # published: arXiv 2609.37974, App. F.6"""
    rng = np.random.default_rng(int(torch.randint(2 ** 62, (), generator=generator)))
    counts = [rng.multinomial(int(n), rng.dirichlet([concentration] * K)) for n in length]
    return torch.tensor(np.array(counts), device=length.device)


def at_random(loss: torch.Tensor, count: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Reveal `count` (B,) of the tokens still masked, any of them  # published
    loss (B, n), inf where not masked -> (B, n) bool."""
    noise = torch.rand(loss.shape, generator=generator).to(loss.device, non_blocking=True)
    return surest(noise.masked_fill(loss.isinf(), torch.inf), count, generator)


def surest(loss: torch.Tensor, count: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Reveal the `count` (B,) whose truth is surest, as samplers commit what is  # our choice
    loss (B, n), inf where not masked -> (B, n) bool."""
    return loss.argsort(1).argsort(1) < count[:, None]                           # by rank


REVEALS = {"random": at_random, "surest": surest}


# ------------------------------------------------------------------ the loss
def token_losses(backbone: Backbone, h: torch.Tensor, target: torch.Tensor,
                 most: int = 2 ** 25) -> torch.Tensor:
    """Cross-entropy of (B, n) target ids given hidden states (B, n, d) -> (B, n) float32. Where the
    logits would have more than `most` elements the head runs over a part of the positions at a
    time, and once more in the backward pass, so that no part's logits outlive it. Rows are flat:
    over (B, V, n) a GPU's kernel for many classes runs on a handful of threads."""
    def part(h, target):
        return F.cross_entropy(backbone.logits(h).float(), target, reduction="none")

    flat, size = (h.flatten(0, 1), target.flatten()), max(1, most // backbone.config.vocab)
    if len(flat[0]) <= size:
        return part(*flat).view(target.shape)
    parts = zip(*(x.split(size) for x in flat))
    return torch.cat([checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False)
                      for pair in parts]).view(target.shape)


def unrolled_loss(backbone: Backbone, memory: MetaState | None, ids: torch.Tensor,
                  answer_mask: torch.Tensor, K: int = 4, lam: float = 0.5,
                  concentration: float = 1.0, generator: torch.Generator | None = None, *,
                  reveal: Callable = at_random, pad_mask: torch.Tensor | None = None,
                  figures: dict | None = None) -> torch.Tensor:
    """K denoising steps over ground truth, with the graph through the memory kept:

        L = sum_k n_k / N * (lam * dense_k + (1 - lam) * reveal_k)          (arXiv 2609.37974)

    n_k of an example's N answer tokens are revealed at step k; dense_k is the mean cross-entropy
    over all that are still masked at step k, reveal_k over those revealed at step k; averaged over
    the batch. lam = 0.5, concentration = 1 and that the truth is revealed are our choice.

    ids (B, T), the truth; answer_mask (B, T) True on the answer, a contiguous run in each row (best
    on the CPU); pad_mask (B, T) True where padded (on the right). memory: a MetaState, a control
    around it, or None. reveal: which tokens a step reveals, `at_random` or one like it, whose own
    .counts may stand for `reveal_counts`. generator: of the CPU. figures: filled with dense_1 ..
    dense_K, scalar tensors. Raises `InputError` for a row whose answer is none or in pieces."""
    generator = generator or torch.Generator().manual_seed(0)
    length, start = answer_mask.sum(1), answer_mask.int().argmax(1)              # (B,) each
    position = torch.arange(ids.shape[1], device=answer_mask.device)
    run = (position >= start[:, None]) & (position < (start + length)[:, None])
    require(bool((run == answer_mask).all()) and int(length.min()) > 0,
            "every row of answer_mask needs one contiguous run of True")
    counts = getattr(reveal, "counts", reveal_counts)(length, K, concentration, generator)
    most = (length[:, None] - counts.cumsum(1) + counts).amax(0).tolist()  # still masked in a row
    masked, length, start, counts = move((answer_mask, length, start, counts), ids.device)
    total, state = 0.0, memory and memory.initial(len(ids))
    for k, n in enumerate(most):
        if n == 0:  # everything is revealed: later steps have weight 0
            break
        # the n positions still masked; a row with fewer fills up with others, which do not count
        where = masked.byte().argsort(dim=1, descending=True, stable=True)[:, :n]    # (B, n)
        still, target = masked.gather(1, where), ids.gather(1, where)                # (B, n) each
        h, state = denoise(backbone, ids.masked_fill(masked, backbone.config.mask_id), where,
                           memory=memory, state=state, span=(start, length), pad_mask=pad_mask)
        loss = token_losses(backbone, h, target)                                     # (B, n)
        now = still & reveal(loss.detach().masked_fill(~still, torch.inf), counts[:, k], generator)
        masked = masked.scatter(1, where, still & ~now)                              # (B, T)
        dense = (loss * still).sum(1) / still.sum(1).clamp(min=1)                    # (B,)
        revealed = (loss * now).sum(1) / now.sum(1).clamp(min=1)  # 0 where nothing is revealed
        total = total + (now.sum(1) / length * (lam * dense + (1 - lam) * revealed)).mean()
        if figures is not None:
            figures[f"dense_{k + 1}"] = dense.detach().sum() / still.any(1).sum()
    return total


# ------------------------------------------------------------------ the loop
def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(parameters: dict[str, nn.Parameter], loss_fn: Callable, out: str | Path, *, steps: int,
        lr: float, schedule: Callable = cosine, warmup: int = 100, weight_decay: float = 0.01,
        clip: float = 1.0, micros: int = 1, save_every: int = 200, eval_every: int = 500,
        evaluate: Callable | None = None, baseline: Callable[[], dict] | None = None,
        settings: dict | None = None, pace: Callable[[float], str] | None = None,
        on_save: Callable[[], None] | None = None) -> None:
    """Train `parameters` in place for `steps` updates of AdamW.

    loss_fn(step, micro) -> (loss, figures): called for the micro-batches 0 .. micros - 1 of every
        step, whose gradients are averaged; figures is a dict of numbers for the log. All its
        randomness must come from (step, micro): this is what makes the resume exact. Several
        processes (torchrun) share the micro-batches, so their number must divide `micros`.
    evaluate(step) -> dict of figures, called every `eval_every` steps and after the last.
    baseline() -> dict of figures to beat, called before the first step.
    pace(seconds) -> what an update got through in that time, for the progress line.
    out: the folder of the `Run`, which goes on where it stands if its `settings` are these. Every
        `save_every` steps and at the end it is saved, and on_save called.
    A loss that is not finite raises `InputError` and leaves the last good checkpoint."""
    groups = [{"params": [p for p in parameters.values() if (p.dim() > 1) == matrices],
               "weight_decay": weight_decay * matrices} for matrices in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    run = Run(out, parameters, optimizer, settings or {}, micros, pace, on_save)
    if run.start == 0 and baseline is not None:
        run.log(-1, steps, {}, slow("measuring the baseline")(baseline)())
    for step in run.steps(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, warmup)
        records = []
        for micro in run.my_micros:
            loss, figures = loss_fn(step, micro)
            (loss / micros).backward()
            records.append({"loss": loss.detach(), **figures})
        figures = run.combine(records)  # of all processes, their gradients too
        figures["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters.values(), clip))
        run.check_finite(step, figures)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == steps
        due = evaluate is not None and (last or (step + 1) % eval_every == 0)
        run.log(step, steps, figures, evaluate(step + 1) if due else {})
        if last or (step + 1) % save_every == 0:
            run.save(step + 1)


# ------------------------------------------------------------------ command line
parser = partial(training_parser, __doc__, REVEALS)


@command
def main(argv: list[str] | None = None) -> None:
    """Train, resume or finish the run in --out."""
    args = parser().parse_args(argv)
    backbone, tokenizer = load(args.ckpt, local_device(args.device), args.dtype)
    c, device = backbone.config, backbone.embedding.weight.device
    training_defaults(args, c.large)
    backbone.checkpointing = args.checkpointing
    memory = new_memory(args.memory, backbone, args.seed, slots=args.slots, width=args.width,
                        time=not args.no_time, local=not args.no_local).to(device)
    if args.init:
        memory = MetaState.load(args.init, backbone, frozen=False)
    compile_on(device, args.compile, backbone, memory)
    trained = Reset(memory) if args.reset else Cut(memory) if args.cut else memory
    tokenizer = needed(tokenizer or stand_in(args.ckpt, c.vocab), args.ckpt)
    batch = choose_data(args, tokenizer, c, draw)
    pace = Pace(product_rate(Clock(device, 1, 3), backbone.embedding.weight.dtype), processes()[1])
    n = sum(p.numel() for p in memory.parameters())
    if processes()[0] == 0:
        print(f"memory: {n:,} parameters, {100 * n / c.parameters:.2f}% of the backbone's")
        print(LEGEND)

    def loss_of(step: int, micro: int, held_out: bool = False, memory=trained):
        ids, answer, pad = batch(step, micro, held_out)  # on the CPU
        ids, pad = move((ids, pad), device)
        rng = random.Random(f"reveal {args.seed} {step} {micro}")
        generator, figures = torch.Generator().manual_seed(rng.getrandbits(60)), {}
        K = args.K[0] if held_out else rng.choice(args.K)
        if not held_out:
            pace.add(ids.numel(), K * c.parameters * (6 if backbone.checkpointing else 4))
        loss = unrolled_loss(backbone, memory, ids, answer, K, args.lam, args.concentration,
                             generator, reveal=REVEALS["random" if held_out else args.reveal],
                             pad_mask=pad, figures=figures)
        return loss, figures if K == args.K[0] else {}

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        used = trained if step else None  # the frozen backbone alone, before the first step
        losses = [loss_of(0, i, True, used)[0].item() for i in range(max(8, 64 // args.batch_size))]
        return {"held_out": sum(losses) / len(losses)}

    path = Path(args.out) / "metastate.safetensors"
    keep = partial(save_memory, path, memory, backbone.fingerprint())
    code = dict.fromkeys((MetaState, type(memory)))
    fit(dict(memory.named_parameters()), loss_of, args.out, warmup=args.warmup, micros=args.micros,
        steps=args.steps, lr=args.lr, save_every=args.save_every, eval_every=args.eval_every,
        evaluate=evaluate, baseline=partial(evaluate, 0), pace=pace, on_save=keep,
        settings=run_settings(args, backbone, tokenizer, batch, *code))
    if processes()[0] == 0:
        keep()  # a run that had ended before may have lost it
        print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
