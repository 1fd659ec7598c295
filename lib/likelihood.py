"""How likely a text is to a masked diffusion model, estimated over random masks as the published
evaluations of LLaDA and of Dream do."""
from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F

Masks = tuple[torch.Tensor, torch.Tensor]  # (R, T) bool, True where masked, and weights (R, T)


def llada_masks(length: int, rows: int, generator: torch.Generator) -> Masks:
    """Exactly x of `length` tokens are masked and weigh length / x. The first row's x is uniform in
    1 .. length; those of the others follow it evenly spaced, modulo length."""
    first = int(torch.randint(1, length + 1, (), generator=generator))
    spaced = first + torch.arange(rows, dtype=torch.float64) * (length / rows)
    x = (spaced.round().long() - 1) % length + 1                      # (R,)
    rank = torch.rand(rows, length, generator=generator).argsort(1).argsort(1)
    return rank < x[:, None], (length / x[:, None]).expand(rows, length)


def dream_masks(length: int, rows: int, generator: torch.Generator, eps: float = 1e-3) -> Masks:
    """Each token is masked with probability p = (1 - eps) t + eps and weighs 1 / p, where t is
    uniform in the first row, and evenly spaced from it modulo 1 in the others."""
    t = (torch.rand((), generator=generator) + torch.arange(rows) / rows) % 1
    p = ((1 - eps) * t + eps)[:, None].expand(rows, length)
    return torch.rand(rows, length, generator=generator) < p, 1 / p


MASKS = {"llada": llada_masks, "dream": dream_masks}


def log_likelihood(losses: Callable[[torch.Tensor], torch.Tensor], length: int, family: str,
                   number: int, rows: int, generator: torch.Generator) -> float:
    """The estimate for `length` tokens from at least `number` masks, `rows` at a time: minus the
    mean of the weighted losses. losses(mask (R, T)) -> cross-entropies (R, T), 0 where nothing is
    masked. generator: on the CPU, so that the masks are the same on every device.

    LLaDA's is exact for a single token, which is always masked: one mask will do."""
    if family == "llada" and length == 1:
        number = 1
    rows, total = min(rows, number), 0.0
    rounds = -(-number // rows)
    for _ in range(rounds):
        mask, weight = MASKS[family](length, rows, generator)
        total += float((losses(mask).double().cpu() * weight).sum() / rows)
    return -total / rounds


@torch.no_grad()
def masked_losses(backbone, denoise: Callable, ids: torch.Tensor, start: int, mask: torch.Tensor,
                  memory=None, cfg: float = 0.0) -> torch.Tensor:
    """Cross-entropies (R, T) of the tokens of ids (N,) from `start` on that mask (R, T) hides, 0
    elsewhere. A memory is in its initial state, for this is one step from nothing. cfg: guidance
    against the context masked, as in generations."""
    (R, T), mask_id, mask = mask.shape, backbone.config.mask_id, mask.to(ids.device)
    where = torch.arange(start, start + T, device=ids.device).expand(R, T)
    seen = ids.repeat(R, 1)                                           # (R, N)
    seen[:, start:start + T].masked_fill_(mask, mask_id)

    def hidden(seen: torch.Tensor) -> torch.Tensor:
        state = None if memory is None else memory.initial(R)
        return denoise(backbone, seen, where, memory=memory, state=state,
                       span=(start, T))[0][mask]                      # (masked, d)

    h = [hidden(seen)]
    if cfg > 0:
        h.append(hidden(seen.index_fill(1, torch.arange(start, device=ids.device), mask_id)))
    target, found = ids[start:start + T].expand(R, T)[mask], []
    for part, *blind, right in zip(*(x.split(256) for x in h), target.split(256)):
        logits = backbone.logits(part).float()                        # (at most 256, V)
        for other in blind:
            other = backbone.logits(other).float()
            logits = other + (cfg + 1) * (logits - other)
        found.append(F.cross_entropy(logits, right, reduction="none"))
    losses = torch.zeros(R, T, device=ids.device)
    if found:
        losses[mask] = torch.cat(found)
    return losses
