"""A second memory beside MetaState, with the same three methods: every position keeps its own.

    python train.py --memory studies.carry:Carry --out out/carry

MetaState's M slots read all positions and are read by all; here nothing is mixed, as in Loopholing
(arXiv 2510.19304) and its relatives: what the backbone made of a position at one step comes back to
that position at the next. The state grows with the sequence, and a cache, with which a step does
not see all of it, is refused.
"""
from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from metastate import AdaptiveNorm, TimeConditioner, Updater
from model import Config


class Carry(nn.Module):
    """e' = e + W norm(s; t),  s' = Updater(s, h, t), position by position: MetaState without Mixer
    and Injector. W and the state (B, max_len, d) are 0 at first."""

    caches = False  # its state is of all positions, from the first on

    def __init__(self, config: Config):
        super().__init__()
        self.length, d = config.max_len, config.dim
        self.time, self.updater = TimeConditioner(d), Updater(d, d)
        self.norm, self.write = AdaptiveNorm(d, d), nn.Linear(d, d, bias=False)
        for part in (self.write, *(m.modulation for m in self.modules()
                                   if isinstance(m, AdaptiveNorm))):
            for p in part.parameters():
                nn.init.zeros_(p)

    def initial(self, batch: int) -> torch.Tensor:
        """(B, max_len, d) float32."""
        return self.write.weight.new_zeros(batch, self.length, self.write.in_features)

    def inject(self, e: torch.Tensor, s: torch.Tensor, t: torch.Tensor, span) -> torch.Tensor:
        """e (B, T, d), s (B, max_len, d), t (B,) -> (B, T, d)."""
        return e + self.write(self.norm(s[:, :e.shape[1]], self.time(t))).to(e.dtype)

    def update(self, s: torch.Tensor, h: torch.Tensor, t: torch.Tensor, span,
               pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """s (B, max_len, d), h (B, T, d) -> (B, max_len, d)."""
        T = h.shape[1]
        return F.pad(self.updater(s[:, :T], h, self.time(t)), (0, 0, 0, self.length - T))
