"""A model to which soft tokens are not foreign, and the memory that hands them on.

    python -m studies.soft --out out/soft        # checkpoints/halves on, 19 min on one core
    python bench.py accuracy --ckpt out/soft --reset --memory --also soft=out/soft/soft.safetensors

Soft-masked diffusion (arXiv 2510.17206): where a token is still masked, the input is the mask
blended with what the model made of it a step before, the mean of the embeddings under its
probabilities. A model that has met bare masks alone cannot read that; this one is trained on: every
other update on masks blended with its guess and the truth, the others on its own guesses, carried
through up to eight steps. docs/results.md says what that buys.
"""
from __future__ import annotations

import argparse
import random
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.cli import Parser, command, named, require
from lib.data import move
from lib.files import write_text
from lib.hub import find, stated
from lib.memories import save_memory
from lib.options import run_settings
from lib.run import local_device, processes
from model import Backbone, Config, load, save
from studies.small import examples, noised, training_options, trapezoids
from tasks import find_task
from train import fit


class Soft(nn.Module):
    """e' = (1 - w) e + w s where a token is masked, w = 1/2;  s' = E_p[embedding], p = softmax of
    the logits, the mask left out. The state (B, max_len, d) is the mask's embedding at first, so
    that the first step has bare masks. Nothing in it is trained but the backbone's own weights, of
    which it keeps a copy."""

    caches = False  # its state is of all positions, from the first on

    def __init__(self, config: Config):
        super().__init__()
        self.length, self.mask_id, self.shift = config.max_len, config.mask_id, config.shift
        self.register_buffer("embedding", torch.zeros(config.vocab, config.dim))
        self.register_buffer("head", torch.zeros(config.vocab, config.dim))

    @classmethod
    def of(cls, backbone: Backbone) -> Soft:
        """With a backbone's own weights, the same tensors."""
        soft = cls(backbone.config)
        soft.embedding, soft.head = backbone.embedding.weight, backbone.head.weight
        return soft

    def initial(self, batch: int) -> torch.Tensor:
        """(B, max_len, d) float32."""
        return self.embedding[self.mask_id].float().repeat(batch, self.length, 1)

    def inject(self, e: torch.Tensor, s: torch.Tensor, t: torch.Tensor | None, span,
               weight: float | torch.Tensor = 0.5) -> torch.Tensor:
        """e (B, T, d), s (B, max_len, d), t unused -> (B, T, d)."""
        masked = (e == self.embedding[self.mask_id].to(e.dtype)).all(-1, keepdim=True)
        return torch.where(masked, torch.lerp(e, s[:, :e.shape[1]].to(e.dtype), weight), e)

    def update(self, s: torch.Tensor, h: torch.Tensor, t: torch.Tensor, span,
               pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """s (B, max_len, d), h (B, T, d) after the last norm -> (B, max_len, d)."""
        return self.mean(s, self.guess(h))

    def guess(self, h: torch.Tensor) -> torch.Tensor:
        """h (B, T, d) -> probabilities of all tokens but the mask, (B, T, V) float32."""
        logits = h.float() @ self.head.float().T
        logits[..., self.mask_id] = -torch.inf
        return logits.softmax(-1)

    def mean(self, s: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """s (B, max_len, d), probabilities p (B, T, V) -> s with the first T replaced."""
        soft = p @ self.embedding.float()
        if self.shift:  # position i is for token i + 1
            soft = torch.cat([s[:, :1], soft[:, :-1]], 1)
        return torch.cat([soft, s[:, p.shape[1]:]], 1)


def soft_loss(backbone: Backbone, soft: Soft, prompts: torch.Tensor, answers: torch.Tensor,
              pad_mask: torch.Tensor | None, passes: int, told: bool,
              generator: torch.Generator) -> torch.Tensor:
    """LLaDA's own fine-tuning loss, see `noised`, after so many passes without gradients, each of
    which hands its guess to the next; 0 are bare masks. Earlier passes have more masks, as earlier
    steps of a sampler have. told: at a random share of the positions the guess is blended with the
    truth, so that what a soft token says can be relied on. The weight of the guess is uniform from
    0.05 to 1 in each row.  # all our choice"""
    (B, G), mask_id = answers.shape, backbone.config.mask_id
    pads = None if pad_mask is None else F.pad(pad_mask, (0, G))
    truth = torch.cat([prompts, answers], 1)                                      # (B, T)
    T = truth.shape[1]
    noisy, weights = noised(answers, mask_id, generator)
    early, share, weight, trust, some, where = move([
        torch.rand(B, *shape, generator=generator)
        for shape in ((G,), (1,), (1, 1), (T, 1), (T, 1), (1, 1))], answers.device)
    weight, trust = weight.clamp(min=0.05), trust * (some < where)                # (B, T, 1)

    def hidden(noisy: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        e = backbone.embed(torch.cat([prompts, noisy], 1))
        return backbone.hidden(soft.inject(e, state, None, None, weight), pads)

    state = soft.initial(B)
    for k in range(passes):
        with torch.no_grad():
            more = early < share * (1 - k / passes)                               # (B, G)
            p = soft.guess(hidden(noisy.masked_fill(more, mask_id), state))       # (B, T, V)
        if told:
            p = torch.lerp(p, F.one_hot(truth, p.shape[-1]).to(p.dtype), trust)
        state = soft.mean(soft.initial(B), p)
    h = hidden(noisy, state)
    losses = F.cross_entropy(backbone.logits(h[:, T - G:]).flatten(0, 1), answers.flatten(),
                             reduction="none")
    return losses @ weights.flatten()


def train_on(args: argparse.Namespace) -> None:
    """Train a checkpoint on with soft masks, on the tasks that it names, and write it and its
    `Soft` to `args.out`."""
    length, names = stated(args.ckpt)
    require(bool(names), f"{args.ckpt} names no tasks that it was trained on")
    backbone, tokenizer = load(args.ckpt, local_device(args.device), torch.float32)
    backbone.requires_grad_(True)
    soft, c = Soft.of(backbone), backbone.config

    def drawn(name: str, rng: random.Random, size: int, held_out: bool):
        data = examples(find_task(name), tokenizer, rng, size, held_out, c.eos_id, length)
        return move(data, backbone.embedding.weight.device)

    def batch(step: int, micro: int):
        return drawn(names[step % len(names)], random.Random(f"{args.seed} {step}"),
                     args.batch_size, False)

    def loss_fn(step: int, micro: int):
        rng = random.Random(f"passes {args.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        told = rng.random() < 0.5
        passes = 1 if told else 0 if rng.random() < 0.3 else rng.randint(1, 8)
        return soft_loss(backbone, soft, *batch(step, micro), passes, told, generator), {}

    @lru_cache(maxsize=None)
    def held_out(name: str):
        return drawn(name, random.Random(0), 256, True)

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        return {f"held_out_{how}": sum(
            soft_loss(backbone, soft, *held_out(name), passes, False,
                      torch.Generator().manual_seed(0)).item()
            for name in names) / len(names) for how, passes in (("bare", 0), ("soft", 8))}

    out, args.micros = Path(args.out), 1
    fit(dict(backbone.named_parameters()), loss_fn, out / "pretraining", steps=args.steps,
        lr=args.lr, schedule=partial(trapezoids, fall=0.3), warmup=100, clip=0.25,
        evaluate=evaluate,
        settings=run_settings(args, backbone, tokenizer, batch, Backbone, Soft, soft_loss))
    if processes()[0] == 0:
        for file in find(args.ckpt).glob("*.json"):
            write_text(out / file.name, file.read_text())
        save(backbone, out / "model.safetensors")
        save_memory(out / "soft.safetensors", soft, backbone.fingerprint())
        print(f"wrote {out}")


def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    p.add_argument("--ckpt", type=named, default="halves", help="one that names its tasks "
                   "(default: halves)")
    training_options(p, 3000, 48, 7e-4)
    return p


@command
def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    train_on(parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
