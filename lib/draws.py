"""Random numbers and what they are drawn from, as any sampler needs them."""
from __future__ import annotations

from functools import partial

import torch

from lib.cli import widest

Noise = torch.Generator | list[torch.Generator] | None  # of all rows, or one for each


def uniform(x: torch.Tensor, dtype: torch.dtype, generator: Noise) -> torch.Tensor:
    """Numbers from [0, 1) in x's shape (B, ...)."""
    draw = partial(torch.rand, device=x.device, dtype=dtype)
    if isinstance(generator, list):
        return torch.stack([draw(x.shape[1:], generator=row) for row in generator])
    return draw(x.shape, generator=generator)


def gumbel(x: torch.Tensor, generator: Noise) -> torch.Tensor:
    """Gumbel noise of x's shape, float64 where the device has it."""
    return -(-uniform(x, widest(x.device), generator).log()).log()


def cut(logits: torch.Tensor, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """-inf outside the smallest set of top tokens whose probability exceeds top_p, and outside the
    top_k most probable of those."""
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        ordered = ordered.masked_fill(before > top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
