"""Training along the trajectories that samplers make: train.py with two more ways to reveal.

    python -m studies.reveals --reveal sure --K 4,4,8 --out out/sure         # and all of train.py's
    python -m studies.reveals --reveal sure --K 4,4,8 --reset --out out/sure-reset
    python -m studies.reveals --ckpt stories --reveal blocks --K 20,40 --own own.jsonl --out out/s

Under a threshold a sampler commits all that the model is sure of, however much that is, and no step
has a number of its own: docs/results.md says what came of it. And where an answer is longer than a
block, it fills one after the other; and it writes what the model would, not what the task would.
"""
from __future__ import annotations

import argparse
import random
import sys
from functools import partial

import torch

import train
from lib.cli import Parser
from lib.options import training_parser
from studies.stories import BLOCK, told_right
from tasks import draw


def sure(loss: torch.Tensor, count: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Reveal the surest, and all whose truth has a probability over a threshold from 0.9 to 0.999,
    drawn for each row and step; what `count` (B,) says does not matter, and what is still masked
    after K steps is left out of the loss.  # our choice
    loss (B, n), inf where not masked -> (B, n) bool."""
    doubt = 0.1 ** (1 + 2 * torch.rand(len(loss), 1, generator=generator))
    surest = train.surest(loss, torch.ones_like(count), generator)
    return surest | (loss < -torch.log1p(-doubt).to(loss.device))


def all_at_the_end(length: torch.Tensor, K: int, *_) -> torch.Tensor:
    """(B,) answer lengths -> (B, K): the most that may still be masked at a step is all, for what
    `sure` reveals is known only then."""
    return length[:, None] * (torch.arange(K) == K - 1)


sure.counts = all_at_the_end


def blocks(loss: torch.Tensor, count: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Reveal the `count` (B,) surest of the first block that is not whole, and of the next one when
    that is. Answers are of whole blocks, and what is behind one is masked: how many are says where
    blocks begin.  # our choice
    loss (B, n), inf where not masked, positions in order -> (B, n) bool."""
    masked = loss.isfinite()
    # whole blocks behind each position, 0 for what is not masked
    behind = (masked.sum(1, keepdim=True) - masked.cumsum(1)) // BLOCK * masked  # (B, n)
    rank = loss.argsort(1).argsort(1) - behind * loss.shape[1]  # by block, then by loss
    return rank.argsort(1).argsort(1) < count[:, None]


REVEALS = {**train.REVEALS, "sure": sure, "blocks": blocks}


# ------------------------------------------------------------------ command line
def drawn(told: list[tuple[str, str]], name: str, rng: random.Random,
          held_out: bool) -> tuple[str, str]:
    """`draw`, but two in three to train on are of those told, as checkpoints/stories had them.
    # our choice"""
    own = not held_out and rng.random() < 2 / 3
    return rng.choice(told) if own else draw(name, rng, held_out)


def choose_draw(args: argparse.Namespace) -> None:
    """What train.py is to draw from."""
    if args.own:
        train.draw = partial(drawn, told_right(args.own))


def parser() -> Parser:
    """What the command line takes."""
    p = training_parser(__doc__, REVEALS)
    p.checks.append(choose_draw)
    p.add_argument("--own", nargs="+", metavar="FILE", help="of stories: two in three are answers "
                   "of sample.py --prompts, those that are right")
    return p


def main(argv: list[str] | None = None) -> int | None:
    """train.py's command line with more ways to reveal, and to draw."""
    train.REVEALS, train.parser, train.draw = REVEALS, parser, draw
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
