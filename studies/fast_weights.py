"""Memory in fast weights (MemDLM, arXiv 2603.22241): masks, inner steps, the outer loss.

For every batch a few fast weights phi, a LoRA on the last layers' MLPs, are reset and take two
gradient steps along a simulated denoising of that very batch; the outer loss is computed with phi
in place and trains the slow weights, and phi is thrown away:

    M_t    each answer token with probability t, t ~ U(1e-3, 1)
    M_pre  M_t and further tokens at random, 1.5 times as many
    inner  for M in M_pre, M_t:  g = d/dphi mean_M w(|M| / n) CE;  clip;  phi <- phi - 0.1 g
    outer  sum over M_t of w(t) CE / n, with phi in place, for the slow weights alone

At inference the same two steps may store the prompt in phi, which then stays as it is while the
answer is written. Each decision is marked `# paper` (or its published code) or `# ours`.
`studies.memdlm` has the commands.
"""
from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.cli import InputError, require
from lib.files import read_json
from lib.hub import find, folder_of
from model import Backbone, rope
from sample import Sample, generate

SETTINGS = "fast_weights.json"


@dataclass(frozen=True)
class Settings:
    """What the fast weights are and how they learn, kept beside the checkpoint. All # paper, as far
    as no comment says otherwise."""

    rank: int = 32
    alpha: float = 64.0       # delta W = alpha / rank * B A
    share: float = 0.1        # of the layers, the last ones
    lr: float = 0.1           # plain SGD, in training and for a prompt
    clip: float = 1.0         # of each tensor's gradient norm; 0 is no clipping (ablation)
    K: int = 2                # inner steps
    only: str | None = None   # "pre" or "anchor": that one step alone (ablation)
    ratio: float = 0.2        # of a prompt's tokens in its anchor mask; 0.3 follow for M_pre
    per_example: bool = False  # ours: fast weights for each example; theirs are for the batch

    def __post_init__(self):
        most = {"rank": 4096, "alpha": 1e6, "share": 1, "lr": 1e6, "clip": 1e6, "K": 64, "ratio": 1}
        for f in (f for f in fields(self) if f.name in most):
            value, open_low = getattr(self, f.name), f.name != "clip"
            fits = type(value) in (int, type(f.default)) and 0 <= value <= most[f.name]
            require(fits and not (open_low and value == 0), f"fast weights: {f.name} is {value!r}, "
                    f"and has to lie above 0 and at most at {most[f.name]:g}")
        require(self.only in (None, "pre", "anchor") and type(self.per_example) is bool,
                f"fast weights: only = {self.only!r} (pre or anchor) or per_example = "
                f"{self.per_example!r} (true or false)")

    @classmethod
    def read(cls, where: str | Path) -> Settings:
        """From a folder that train wrote or its fast_weights.json; the published ones for a
        checkpoint that has none."""
        path = Path(where)
        if not os.path.isfile(where):
            path = (folder_of(where) or find(where)) / SETTINGS
        if not path.is_file():
            return cls()
        raw = read_json(path)
        unknown = sorted(raw.keys() - {f.name for f in fields(cls)})
        require(not unknown, f"{path}: {', '.join(unknown)} is no setting of fast weights")
        try:
            return cls(**raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


# ------------------------------------------------------------------ LoRA
PARTS = {"qkv": ("q", "k", "v"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}


class LoRA:
    """W x + alpha / rank * B A x for every projection of the `linears` of some layers: A is drawn,
    B = 0. Projections that the backbone fuses (gate and up; q, k and v) have an A and a B each.

    Hooks add the second term while it is attached; detached, the backbone's code is untouched.
    weights: name -> A (R, rank, in) or B (R, out, rank), float32; R is 1, or the rows of a batch,
    each with weights of its own."""

    def __init__(self, backbone: Backbone, layers: range, linears: tuple[str, ...], rank: int,
                 alpha: float, seed: int = 0):
        c, self.backbone, self.layers, self.scale = backbone.config, backbone, layers, alpha / rank
        self.linears, self.hooks, self.weights = linears, [], {}
        kv, self.shapes = c.kv_heads * c.head_dim, {}
        rows = {"q": c.dim, "k": kv, "v": kv, "gate": c.mlp_dim, "up": c.mlp_dim}
        for layer, linear, part in self._parts():
            columns = getattr(backbone.blocks[layer], linear).in_features
            self.shapes[f"{layer}.{part}.A"] = (rank, columns)
            self.shapes[f"{layer}.{part}.B"] = (rows.get(part, c.dim), rank)
        self.reset(seed)

    def _parts(self) -> Iterator[tuple[int, str, str]]:
        return ((i, linear, part) for i in self.layers for linear in self.linears
                for part in PARTS[linear])

    def reset(self, seed: int, rows: int = 1) -> None:
        """delta W = 0: A ~ Kaiming uniform with a = sqrt(5), B = 0  # paper
        the same for one seed and for each of the rows  # ours: theirs is a new draw every time"""
        generator = torch.Generator().manual_seed(seed)
        device = self.backbone.embedding.weight.device
        for name, shape in self.shapes.items():
            value = torch.zeros(shape)
            if name.endswith("A"):
                value.uniform_(-shape[1] ** -0.5, shape[1] ** -0.5, generator=generator)
            self.weights[name] = nn.Parameter(value.expand(rows, -1, -1).contiguous().to(device))

    def delta(self, part: str, x: torch.Tensor) -> torch.Tensor:
        """What the projection "layer.part" adds for its input x (B, T, in) -> (B, T, out)."""
        A, B = self.weights[f"{part}.A"], self.weights[f"{part}.B"]
        if 1 < len(A) < len(x):  # guidance: each row once more
            A, B = (w.repeat(len(x) // len(A), 1, 1) for w in (A, B))
        return self.scale * (x.to(A.dtype) @ A.mT @ B.mT)

    def attach(self) -> None:
        """From here on the backbone computes with these weights."""
        def hook(layer: int, linear: str):
            return lambda module, inputs, output: output + torch.cat(
                [self.delta(f"{layer}.{part}", inputs[0]) for part in PARTS[linear]],
                -1).to(output.dtype)

        if not self.hooks:
            self.hooks = [getattr(self.backbone.blocks[i], linear).register_forward_hook(
                hook(i, linear)) for i in self.layers for linear in self.linears]

    def detach(self) -> None:
        """Leave the backbone as it was."""
        while self.hooks:
            self.hooks.pop().remove()

    @torch.no_grad()
    def merge(self) -> None:
        """Add delta W to the backbone's own weights, for good."""
        self.detach()
        for i in self.layers:
            for linear in self.linears:
                weight = getattr(self.backbone.blocks[i], linear).weight
                products = [self.weights[f"{i}.{part}.B"][0] @ self.weights[f"{i}.{part}.A"][0]
                            for part in PARTS[linear]]
                weight.copy_(weight.float() + self.scale * torch.cat(products))


class FastLoRA(LoRA):
    """The fast weights: gate, up and down of layers int(0.9 L) .. L - 1, one layer at least."""

    def __init__(self, backbone: Backbone, settings: Settings = Settings(), seed: int = 0):
        L, self.settings = backbone.config.layers, settings
        self.first = min(int(L * (1 - settings.share)), L - 1)
        super().__init__(backbone, range(self.first, L), ("gate_up", "down"), settings.rank,
                         settings.alpha, seed)


# ------------------------------------------------------------------ masks
def anchor_and_pre(maskable: torch.Tensor, anchor: torch.Tensor, noise: torch.Tensor,
                   K: int = 2) -> list[torch.Tensor]:
    """The masks of K inner steps, two at least, each inside the one before: M_pre, ..., M_t.

    maskable (B, T), True on tokens that may be masked; anchor (B,), how many of them M_t has;
    noise (B, T): masks take the tokens with the least, so that M_pre has M_t's and further ones at
    random. r_pre = min(1, 1.5 r)  # paper
    and the steps between reveal equally many, for K > 2  # as their code"""
    total = maskable.sum(1)                                                      # (B,)
    counts = [torch.minimum(total, anchor + anchor // 2)]
    for left in range(max(K, 2) - 1, 0, -1):
        counts.append(counts[-1] - (counts[-1] - anchor + left - 1) // left)
    rank = noise.masked_fill(~maskable, 2.0).argsort(1).argsort(1)               # (B, T)
    return [rank < n[:, None] for n in counts]


def draw_masks(maskable: torch.Tensor, K: int,
               generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(masks, t (B,)) of a training batch: t ~ U(1e-3, 1), each token of `maskable` (B, T) in M_t,
    the last of the masks, with probability t. generator: on the CPU."""
    device = maskable.device
    t = (1e-3 + (1 - 1e-3) * torch.rand(len(maskable), generator=generator)).to(device)   # (B,)
    noise = torch.rand(maskable.shape, generator=generator).to(device)                    # (B, T)
    return anchor_and_pre(maskable, (maskable & (noise < t[:, None])).sum(1), noise, K), t


# ------------------------------------------------------------------ inner loop
def run(backbone: Backbone, e: torch.Tensor, layers: range,
        pad_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T, d) -> (B, T, d) through some of the layers: what `Backbone.hidden` does with all of
    them before the last norm."""
    angles = rope(backbone.config, torch.arange(e.shape[1], device=e.device), e.dtype)
    keys_allowed = None if pad_mask is None else ~pad_mask[:, None, None]        # (B, 1, 1, T)
    for i in layers:
        e = backbone.blocks[i](e, angles, keys_allowed)
    return e


def masked_losses(backbone: Backbone, h: torch.Tensor, ids: torch.Tensor,
                  masked: torch.Tensor) -> torch.Tensor:
    """(B,) sums of the cross-entropy over each row's masked tokens; h (B, T, d) after the last
    norm. Dream's token i is predicted by h at i - 1."""
    if backbone.config.shift:
        h = torch.cat([h[:, :1], h[:, :-1]], 1)
    loss = F.cross_entropy(backbone.logits(h[masked]).float(), ids[masked], reduction="none")
    return torch.zeros(masked.shape, device=h.device).masked_scatter(masked, loss).sum(1)


def adapt(backbone: Backbone, fast: FastLoRA, ids: torch.Tensor, masks: list[torch.Tensor],
          maskable: torch.Tensor, pad_mask: torch.Tensor | None = None,
          weighted: bool = True) -> list[float]:
    """One SGD step, first order, on the fast weights for each of `masks` that the settings take
    (all; with K = 1 the first, as in their code; with `only` that one); returns the losses. The
    fast weights are attached afterwards, and want no gradient any more.

    ids, maskable and masks (B, T); weighted: each row's tokens count 1 / its mask ratio (training),
    or all alike (a prompt). Fast weights with a row for each example learn from it alone."""
    c, settings, B = backbone.config, fast.settings, len(ids)
    masks = {"pre": masks[:1], "anchor": masks[-1:], None: masks[:settings.K]}[settings.only]
    fast.attach()
    with torch.no_grad():  # nothing below carries phi: one run for all steps, without a graph
        inputs = torch.cat([ids.masked_fill(mask, c.mask_id) for mask in masks])     # (K B, T)
        pads = None if pad_mask is None else pad_mask.repeat(len(masks), 1)
        below = run(backbone, backbone.embed(inputs), range(fast.first), pads)       # (K B, T, d)
    losses, weights = [], list(fast.weights.values())
    rows = len(weights[0])
    for e, mask in zip(below.split(B), masks):
        n = mask.sum(1)                                                              # (B,)
        w = 1 / (n / maskable.sum(1).clamp(min=1) + 1e-6) if weighted else torch.ones_like(n)
        with torch.enable_grad():
            for p in weights:
                p.requires_grad_()
            h = backbone.norm(run(backbone, e, fast.layers, pad_mask))
            loss = (w * masked_losses(backbone, h, ids, mask)).view(rows, -1).sum(1)  # (R,)
            loss = loss / n.view(rows, -1).sum(1).clamp(min=1)
            gradients = torch.autograd.grad(loss.sum(), weights)
        for p, g in zip(weights, gradients):
            p.requires_grad_(False)  # ours: theirs gets gradients from the outer pass too
            if settings.clip:
                norm = g.flatten(1).norm(dim=1)[:, None, None]                       # (R, 1, 1)
                g = g * (settings.clip / (norm + 1e-12)).clamp(max=1)
            p.sub_(settings.lr * g)
        losses.append(float(loss.detach().mean()))
    return losses


def adapt_prompt(backbone: Backbone, fast: FastLoRA, prompt: torch.Tensor,
                 pad_mask: torch.Tensor | None = None, seed: int = 0) -> list[float]:
    """Reset the fast weights and store each prompt in those of its own row: mask ratios 0.3, then
    0.2, all tokens alike  # paper
    prompt (B, P), pad_mask (B, P) True where padded. A row's outcome does not depend on the others
    or on the padding.  # ours"""
    settings = fast.settings
    maskable = torch.ones_like(prompt, dtype=torch.bool) if pad_mask is None else ~pad_mask
    if backbone.config.shift:  # no hidden state says the first token
        maskable = maskable & (maskable.cumsum(1) > 1)
    noise = torch.ones(prompt.shape)
    for row, mine in zip(noise, maskable.cpu()):
        row[mine] = torch.rand(int(mine.sum()), generator=torch.Generator().manual_seed(seed))
    anchor = (settings.ratio * maskable.sum(1)).round().long().clamp(min=1)          # (B,)
    anchor = torch.minimum(anchor, maskable.sum(1))
    masks = anchor_and_pre(maskable, anchor, noise.to(prompt.device), settings.K)
    fast.reset(seed, len(prompt))
    return adapt(backbone, fast, prompt, masks, maskable, pad_mask, weighted=False)


@contextlib.contextmanager
def adapted(backbone: Backbone, settings: Settings | None, prompt: torch.Tensor,
            pad_mask: torch.Tensor | None = None, seed: int = 0) -> Iterator[None]:
    """Within, the backbone has the prompt in fast weights; as it is where settings is None."""
    fast = None if settings is None else FastLoRA(backbone, settings, seed)
    try:
        if fast is not None:
            adapt_prompt(backbone, fast, prompt, pad_mask, seed)
        yield
    finally:
        if fast is not None:
            fast.detach()


def generate_adapted(backbone: Backbone, prompt: torch.Tensor, *, settings: Settings | None,
                     pad_mask: torch.Tensor | None = None, seed: int = 0, **options) -> Sample:
    """`sample.generate`, whose options these are, with each prompt stored in fast weights first
    (not stored where settings is None)."""
    with adapted(backbone, settings, prompt, pad_mask, seed):
        return generate(backbone, prompt, pad_mask=pad_mask, **options)


# ------------------------------------------------------------------ outer loss
def outer_loss(backbone: Backbone, ids: torch.Tensor, answer_mask: torch.Tensor,
               fast: FastLoRA | None, generator: torch.Generator,
               pad_mask: torch.Tensor | None = None,
               figures: dict | None = None) -> torch.Tensor:
    """The loss of a batch for the slow weights: sum over M_t of CE / t, by the number of answer
    tokens. With fast weights these are reset and adapted to the batch first; without (plain
    training) the masks are the same and nothing else is done. ids, answer_mask, pad_mask (B, T);
    figures is filled with the inner losses."""
    masks, t = draw_masks(answer_mask, 2 if fast is None else fast.settings.K, generator)
    anchor = masks[-1]
    if fast is not None:
        fast.reset(int(torch.randint(2 ** 62, (), generator=generator)),
                   len(ids) if fast.settings.per_example else 1)
        losses = adapt(backbone, fast, ids, masks, answer_mask, pad_mask)
        if figures is not None:
            figures.update({f"inner_{k + 1}": loss for k, loss in enumerate(losses)})
    h = backbone.hidden(backbone.embed(ids.masked_fill(anchor, backbone.config.mask_id)), pad_mask)
    return (masked_losses(backbone, h, ids, anchor) / (t + 1e-6)).sum() / answer_mask.sum()
