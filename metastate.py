"""MetaState: a small recurrent memory that a frozen masked diffusion model carries between steps.

Between denoising steps a masked diffusion model keeps only the hard tokens; what it computed is
thrown away (the "Information Island", arXiv 2603.01331). MetaState keeps M slots s of width D:

    e_t     = embed(x_t)
    e_t'    = e_t + Injector(e_t, s_t, t)              what enters the frozen backbone
    h_t     = backbone(e_t')                           gives the logits, hence x_{t-1}
    c_t     = Mixer(s_t, h_t, t)                       the slots read the activations
    s_{t-1} = Updater(s_t, c_t, t)                     a GRU integrates what they read

`# paper` marks what the authors published, `# our choice` what nothing published says.
"""
from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.cli import require
from lib.memories import load_memory, save_memory


class TimeConditioner(nn.Module):
    """t -> t_cond, one for Mixer, Updater and Injector  # paper

    t_cond = W2 silu(W1 [cos(2 pi f_i t), sin(2 pi f_i t)]), f_i from 1/4 to 64 in a geometric
    series; t is the share of the response that is still masked  # our choice"""

    def __init__(self, width: int, features: int = 32):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-2, 6, features, base=2.0),
                             persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) in [0, 1] -> (B, C)."""
        angles = t.float()[:, None] * self.frequencies                # (B, features)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class AdaptiveNorm(nn.Module):
    """x / rms(x) * (1 + scale(t_cond)) + shift(t_cond), both zero at first  # our choice"""

    def __init__(self, dim: int, cond: int):
        super().__init__()
        self.modulation = nn.Linear(cond, 2 * dim)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """x (B, N, dim), cond (B, C) -> (B, N, dim)."""
        x = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
        scale, shift = self.modulation(cond)[:, None].chunk(2, -1)    # (B, 1, dim) each
        return (x * (1 + scale) + shift).to(scale.dtype)


class CrossAttention(nn.Module):
    """Queries from x, keys and values from y, with a local bias:

        softmax(q k^T / sqrt(hd) - slope_head * distance) v,   then one output projection

    distance is between a token and a slot's centre, in slot spacings; slopes are learned, half of
    the heads begin at 4, a quarter at 1, the rest at 0. Without the bias the memory stays unused:
    slots that all see everything have no reason to differ  # our choice"""

    def __init__(self, dim_x: int, dim_y: int, dim_out: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim_x, width, bias=False)
        self.kv = nn.Linear(dim_y, 2 * width, bias=False)
        self.out = nn.Linear(width, dim_out, bias=False)
        slopes = [4.0] * (heads // 2) + [1.0] * (heads // 4)
        self.slopes = nn.Parameter(torch.tensor(slopes + [0.0] * (heads - len(slopes))))

    def forward(self, x, y, distance, hidden=None):
        """x (B, N, dim_x), y (B, S, dim_y), distance (B, N, S) -> (B, N, dim_out); hidden (B, S),
        True for keys that no query may see."""
        (B, N, _), S = x.shape, y.shape[1]
        q = self.q(x).view(B, N, self.heads, -1).transpose(1, 2)      # (B, nh, N, hd)
        k, v = self.kv(y).view(B, S, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = -self.slopes[:, None, None] * distance[:, None]        # (B, nh, N, S)
        if hidden is not None:
            bias = bias.masked_fill(hidden[:, None, None], -torch.inf)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.out(a.transpose(1, 2).reshape(B, N, -1))


class Mixer(nn.Module):
    """The slots read the backbone's activations  # paper: cross-attention, queries from s_t

        c_t = Attention(norm(s_t + id; t), norm(h_t; t))

    h_t: after the last norm, all positions but pads; id: learned identities  # our choice"""

    def __init__(self, dim: int, width: int, heads: int, cond: int):
        super().__init__()
        self.norm_s, self.norm_h = AdaptiveNorm(width, cond), AdaptiveNorm(dim, cond)
        self.attention = CrossAttention(width, dim, width, width, heads)

    def forward(self, s, h, cond, distance, hidden):
        """s (B, M, D), h (B, T, d), distance (B, M, T), hidden (B, T) -> (B, M, D)."""
        return self.attention(self.norm_s(s, cond), self.norm_h(h, cond), distance, hidden)


class Updater(nn.Module):
    """GRU-style integration of the reading into the state  # paper

        r, z = sigmoid(W [norm(c; t), norm(s; t)])
        n    = tanh(W_c norm(c; t) + r * W_s norm(s; t))
        s'   = (1 - z) * n + z * s                                   # our choice: a plain GRU cell

    computed in float32, so that a state that changes little is not lost to rounding."""

    def __init__(self, width: int, cond: int):
        super().__init__()
        self.norm_c, self.norm_s = AdaptiveNorm(width, cond), AdaptiveNorm(width, cond)
        self.from_c, self.from_s = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, s, c, cond):
        """s (B, M, D) float32, c (B, M, D) -> (B, M, D) float32."""
        rc, zc, nc = self.from_c(self.norm_c(c, cond)).float().chunk(3, -1)
        rs, zs, ns = self.from_s(self.norm_s(s, cond)).float().chunk(3, -1)
        z = torch.sigmoid(zc + zs)
        return (1 - z) * torch.tanh(nc + torch.sigmoid(rc + rs) * ns) + z * s


class Injector(nn.Module):
    """The memory writes to the backbone's input  # paper: cross-attention, queries from E_t

        e' = e + W_out Attention(norm(e; t), norm(s + id; t)),  W_out = 0 at first  # our choice

    so that an untrained memory leaves the frozen model exactly as it is."""

    def __init__(self, dim: int, width: int, heads: int, cond: int):
        super().__init__()
        self.norm_e, self.norm_s = AdaptiveNorm(dim, cond), AdaptiveNorm(width, cond)
        self.attention = CrossAttention(dim, width, dim, width, heads)

    def forward(self, e, s, cond, distance):
        """e (B, T, d), s (B, M, D), distance (B, T, M) -> (B, T, d)."""
        return e + self.attention(self.norm_e(e, cond), self.norm_s(s, cond), distance).to(e.dtype)


class MetaState(nn.Module):
    """The memory: M slots of width D, independent of the sequence's length, and what reads, keeps
    and writes them. Weights and state are float32 whatever the backbone's dtype.

    `span` in the methods is (start, length) of the response, ints or (B,) tensors: the slots'
    centres are spread evenly over it.  # our choice"""

    def __init__(self, dim: int, slots: int, width: int, heads: int = 8, cond: int | None = None,
                 time: bool = True, local: bool = True, fingerprint: str = "",
                 generator: torch.Generator | None = None):
        super().__init__()
        cond = cond or 3 * width // 4  # brings LLaDA-8B to the published 48 M  # our choice
        self.sizes = {"dim": dim, "slots": slots, "width": width, "heads": heads, "cond": cond,
                      "time": time, "local": local}
        self.fingerprint = fingerprint  # of the backbone it is trained for
        self.time = TimeConditioner(cond)
        self.mixer = Mixer(dim, width, heads, cond)
        self.updater = Updater(width, cond)
        self.injector = Injector(dim, width, heads, cond)
        # learned, the same for every prompt; the identities make the slots differ  # our choice
        self.start, self.identity = (nn.Parameter(torch.zeros(slots, width)) for _ in range(2))
        self._initialise(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal with deviation fan_in ** -0.5, the identities 1; zero for biases, modulations and
        the Injector's output, so that the untrained memory changes nothing.  # our choice"""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features ** -0.5, generator=generator)
                if name.endswith("modulation") or name == "injector.attention.out":
                    module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        self.identity.normal_(0.0, 1.0, generator=generator)

    @classmethod
    def for_backbone(cls, backbone, slots: int | None = None, width: int | None = None,
                     **options) -> MetaState:
        """64 slots of width 1024 for 8B and 7B (0.5 to 0.7% of their parameters); for small
        backbones 24 slots of their own width."""
        c = backbone.config
        most, wide, heads = (64, 1024, 8) if c.large else (24, c.dim, 4)
        slots, width = most if slots is None else slots, wide if width is None else width
        require(slots > 0 and width >= heads and width % heads == 0, f"--slots {slots} and --width "
                f"{width}: there has to be a slot, and {heads} heads have to divide the width")
        return cls(c.dim, slots, width, heads, fingerprint=backbone.fingerprint(), **options)

    def initial(self, batch: int) -> torch.Tensor:
        """The state before the first step: (B, M, D) float32."""
        return self.start.float().repeat(batch, 1, 1)

    def inject(self, e: torch.Tensor, s: torch.Tensor, t: torch.Tensor, span) -> torch.Tensor:
        """e (B, T, d) embeddings, s (B, M, D), t (B,) share of the response still masked
        -> (B, T, d), what enters the backbone."""
        return self.injector(e, s + self.identity, self._cond(t), self._distance(e, span))

    def update(self, s: torch.Tensor, h: torch.Tensor, t: torch.Tensor, span,
               pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """s (B, M, D), h (B, T, d) after the last norm, pad_mask (B, T) True where padded
        -> the next s (B, M, D) float32."""
        cond, distance = self._cond(t), self._distance(h, span).transpose(1, 2)
        if pad_mask is None:  # so that the compiled Mixer is one for both
            pad_mask = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        reading = self.mixer(s + self.identity, h, cond, distance, pad_mask)
        return self.updater(s, reading, cond)

    def compile(self, **options) -> None:
        """Compile the three parts with torch.compile's options, for every batch and length."""
        for part in (self.mixer, self.updater, self.injector):
            part.compile(dynamic=True, **options)

    def _cond(self, t):
        return self.time(t if self.sizes["time"] else torch.zeros_like(t))

    def _distance(self, x, span) -> torch.Tensor:
        """(B, T, M): from each position to each slot's centre, in slot spacings."""
        (B, T, _), M = x.shape, self.sizes["slots"]
        start, length = (torch.as_tensor(v, device=x.device).view(-1, 1, 1) for v in span)
        spacing = length / M                                          # (B or 1, 1, 1)
        centre = start + (torch.arange(M, device=x.device) + 0.5) * spacing - 0.5   # (B, 1, M)
        position = torch.arange(T, device=x.device)[None, :, None]    # (1, T, 1)
        return ((position - centre).abs() / spacing * self.sizes["local"]).expand(B, -1, -1)

    def save(self, path: str | Path) -> None:
        """Write weights, sizes and the backbone's fingerprint as one safetensors file."""
        save_memory(path, self, self.fingerprint)

    @staticmethod
    def load(path: str | Path, backbone, frozen: bool = True) -> MetaState:
        """A file's memory, of the class that it names, see `load_memory`. Raises `InputError`."""
        return load_memory(path, backbone, frozen)


# ------------------------------------------------------------------ controls (ours)
class Reset:
    """A memory set back to its start after every step: an adapter of the same weights. What
    MetaState gains over this is the memory's."""

    def __init__(self, memory: MetaState):
        self.memory, self.initial, self.inject = memory, memory.initial, memory.inject

    def update(self, s: torch.Tensor, *seen) -> torch.Tensor:
        return self.initial(len(s))


class Shuffled(Reset):
    """A memory whose states move to the next row after every step: does a prompt need its own?"""

    def update(self, s: torch.Tensor, *seen) -> torch.Tensor:
        return self.memory.update(s, *seen).roll(1, 0)


class Cut(Reset):
    """A memory whose gradients end within a step: is training through all K steps needed?"""

    def update(self, s: torch.Tensor, h: torch.Tensor, *seen) -> torch.Tensor:
        return self.memory.update(s.detach(), h.detach(), *seen)
