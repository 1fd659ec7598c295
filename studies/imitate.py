"""A memory that begins as another's copy: train.py, with the distance to a teacher for a loss.

    python -m studies.imitate --ckpt soft --teacher checkpoints/soft/soft.safetensors --out out/copy
    python train.py --ckpt soft --init out/copy/metastate.safetensors --out out/memory

Soft tokens need no training, but what they hand on is all that they ever do; a memory that begins
at zero can learn more, but only where the first small step already helps (docs/experiments.md). So
it first learns to hand on what the teacher does, along the teacher's own trajectories: no gradient
passes the backbone, and K steps cost a forward each. The log has far_1 .. far_K in place of
dense_k. Nobody published this; all of it is our choice.
"""
from __future__ import annotations

import argparse
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch

import train
from lib.cli import Parser
from lib.memories import load_memory
from lib.options import training_parser
from lib.outputs import tensors_file
from train import unrolled_loss


class Pupil:
    """A memory that watches another at work. The backbone gets what the teacher hands on; `far` has
    how far the pupil's would have been from it at every step: the squared distance, summed over
    width and positions and divided by the number of those that are masked, a scalar."""

    def __init__(self, memory, teacher, mask: torch.Tensor):
        self.memory, self.teacher, self.mask, self.far = memory, teacher, mask, []

    def initial(self, batch: int) -> tuple:
        """Both states; a pupil that is None hands on nothing."""
        return self.memory and self.memory.initial(batch), self.teacher.initial(batch)

    def inject(self, e: torch.Tensor, states: tuple, t: torch.Tensor, span) -> torch.Tensor:
        """e (B, T, d) -> the teacher's (B, T, d)."""
        mine, right = states
        right = self.teacher.inject(e, right, t, span)
        copied = e if self.memory is None else self.memory.inject(e, mine, t, span)
        masked = (e == self.mask.to(e.dtype)).all(-1).sum()
        self.far.append((copied - right).float().square().sum() / masked.clamp(min=1))
        return right

    def update(self, states: tuple, h: torch.Tensor, *seen) -> tuple:
        """Both states after the teacher's h (B, T, d)."""
        mine, right = states
        return (self.memory and self.memory.update(mine, h, *seen),
                self.teacher.update(right, h, *seen))


@lru_cache(maxsize=1)
def teacher_of(path: Path, backbone):
    """The file's memory, for this backbone."""
    return load_memory(path, backbone)


def imitation_loss(path: Path, backbone, memory, *data, figures: dict | None = None, **options):
    """`train.unrolled_loss` with the mean of `Pupil.far` for a loss; figures has each step's."""
    mask = backbone.embedding.weight[backbone.config.mask_id]
    pupil = Pupil(memory, teacher_of(path, backbone), mask)
    unrolled_loss(backbone, pupil, *data, **options)
    if figures is not None:
        figures.update((f"far_{k}", far.detach()) for k, far in enumerate(pupil.far, 1))
    return torch.stack(pupil.far).mean()


# ------------------------------------------------------------------ command line
def choose_loss(args: argparse.Namespace) -> None:
    """What train.py is to minimise."""
    train.unrolled_loss = partial(imitation_loss, args.teacher)


def parser() -> Parser:
    """What the command line takes."""
    p = training_parser(__doc__, train.REVEALS)
    p.checks.append(choose_loss)
    p.add_argument("--teacher", type=tensors_file, metavar="FILE", required=True,
                   help="the memory to copy")
    return p


def main(argv: list[str] | None = None) -> int | None:
    """train.py's command line with another loss."""
    train.parser = parser
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
