"""LLaDA and Dream, two masked diffusion language models, as one hand-written transformer.

    from model import load
    backbone, tokenizer = load("tiny")              # or "llada-8b", a folder, a hub id
    logits = backbone(ids)                          # (B, T) -> (B, T, V)

Both families are pre-norm decoder blocks without the causal mask. They differ in three places,
each a field of `Config`: Dream has biases on q, k and v (`qkv_bias`), shares key/value heads among
query heads (`kv_heads`), and rotates in the weights' dtype where LLaDA rotates in float32
(`rope_float32`). A fourth difference is outside the network: Dream's logits at position i are for
token i + 1 (`shift`); they are returned raw here, and whoever uses them moves them.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.checks import check_config
from lib.cli import device_of, dtype_of
from lib.hub import CHECKPOINTS, find
from lib.published import read_config
from lib.tensors import allocated, fingerprint, read_stacked, save_stacked
from lib.tokenizer import Tokenizer


# ------------------------------------------------------------------ configuration
@dataclass(frozen=True)
class Config:
    """Sizes and ids of a backbone, the same names for both families."""

    family: str            # "llada" | "dream"
    dim: int               # d, width of the residual stream
    layers: int
    heads: int             # query heads
    kv_heads: int          # key/value heads, a divisor of heads
    mlp_dim: int           # width of the SwiGLU's two branches
    vocab: int             # V, rows of the embedding and of the head
    max_len: int           # longest sequence the model was built for, prompt included
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    rope_float32: bool     # rotate q and k in float32 (LLaDA) or in the weights' dtype (Dream)
    tied: bool             # the head is the embedding
    mask_id: int
    eos_id: int
    pad_id: int
    dtype: str = "bfloat16"  # as the config file states it; `load` follows the stored tensors

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def shift(self) -> bool:
        """True when the logits at position i are for token i + 1 (Dream)."""
        return self.family == "dream"

    @property
    def large(self) -> bool:
        """Of LLaDA-8B's and Dream-7B's class: a memory's sizes go by this  # our choice"""
        return self.dim >= 2048

    @property
    def parameters(self) -> int:
        """Number of weights of the backbone."""
        return sum(p.numel() for p in unfilled(self).parameters())

    def __post_init__(self):
        check_config(self)

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """From a published config.json, the file or its folder. Raises `InputError`."""
        return read_config(path, cls)


LLADA_8B = Config("llada", 4096, 32, 32, 32, 12288, 126464, 4096, 500000.0, 1e-5, False, True,
                  False, 126336, 126081, 126081)
DREAM_7B = Config("dream", 3584, 28, 28, 4, 18944, 152064, 131072, 1e6, 1e-6, True, False, False,
                  151666, 151643, 151643)


# ------------------------------------------------------------------ the network
class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (the order both families use)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rope(config: Config, position: torch.Tensor,
         dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles at positions (T,), each (T, head_dim / 2): computed
    in float32, and given in the dtype in which the family rotates."""
    half = torch.arange(0, config.head_dim, 2, device=position.device, dtype=torch.float32)
    angles = torch.outer(position.float(), 1.0 / config.rope_theta ** (half / config.head_dim))
    dtype = torch.float32 if config.rope_float32 else dtype
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the two-halves form: [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin].
    x (B, T, nh, hd), cos and sin (T, hd / 2); computed in the dtype of cos."""
    x1, x2 = x.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]                           # (T, 1, hd / 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU. q, k, v are one matrix, and so are gate and up: one read of
    the activations each, and rows stacked in that order so that splitting is a view."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.qkv = nn.Linear(c.dim, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.dim, c.dim, bias=False)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.gate_up = nn.Linear(c.dim, 2 * c.mlp_dim, bias=False)
        self.down = nn.Linear(c.mlp_dim, c.dim, bias=False)

    def attention(self, x, angles, keys_allowed, kept):
        """x (B, T, d) after its norm -> (B, T, d), of keys and values that may be a cache's too."""
        nh, nkv, hd = self.c.heads, self.c.kv_heads, self.c.head_dim
        qkv = self.qkv(x).unflatten(-1, (nh + 2 * nkv, hd))         # (B, T, nh + 2 nkv, hd)
        q, k = rotate(qkv[:, :, :nh + nkv], *angles).split([nh, nkv], 2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, qkv[:, :, nh + nkv:]))   # (B, heads, T, hd)
        if kept is not None:  # (B, nkv, S, hd) each: ours go to their rows, all are attended to
            k, v = (old.index_copy_(2, kept[2], new) for old, new in zip(kept, (k, v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys_allowed, enable_gqa=nh != nkv)
        return self.out(y.transpose(1, 2).flatten(2))               # (B, T, d)

    def forward(self, x, angles, keys_allowed=None, kept=None):
        """x (B, T, d) -> (B, T, d)."""
        x = x + self.attention(self.attn_norm(x), angles, keys_allowed, kept)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)      # (B, T, mlp_dim) each
        return x + self.down(F.silu(gate) * up)


def through(blocks: list[Block], x, angles, keys_allowed=None, kept=None):
    """x (B, T, d) -> (B, T, d), through some blocks; kept: their keys, their values, positions."""
    for i, block in enumerate(blocks):
        x = block(x, angles, keys_allowed, kept and (kept[0][i], kept[1][i], kept[2]))
    return x


class Cache:
    """Keys and values of every position of B sequences of length S: k, v of every layer (B,
    kv_heads, S, head_dim), written in place. Positions that are not computed anew are seen as when
    they were last computed: an approximation, for attention looks both ways (Fast-dLLM)."""

    def __init__(self, backbone: Backbone, batch: int, length: int):
        c, like = backbone.config, backbone.embedding.weight
        shape = batch, c.kv_heads, length, c.head_dim
        self.k, self.v = ([like.new_zeros(shape) for _ in range(c.layers)] for _ in range(2))


class Backbone(nn.Module):
    """A LLaDA or Dream transformer: ids -> embed -> hidden -> logits, each callable on its own,
    because a memory writes between the first two and reads after the second."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab, config.dim)  # or a slow start: its init imports dynamo
        self.embedding = nn.Embedding(config.vocab, config.dim, _weight=weight)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)
        self.checkpointing = False  # recompute blocks in the backward pass: less memory
        self.graphs = False  # replay denoising steps as CUDA graphs
        self.through = through  # or the same compiled

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, d)."""
        return self.embedding(ids)

    def hidden(self, e: torch.Tensor, pad_mask: torch.Tensor | None = None,
               cache: Cache | None = None, start: int | torch.Tensor = 0) -> torch.Tensor:
        """(B, T, d) embeddings -> (B, T, d) after the last norm. pad_mask (B, T) is True where
        padded: those keys are hidden from every query. Positions stay 0..T-1 also with padding on
        the left: RoPE sees differences only, so real rows come out as without the padding.

        With a cache of length S, e holds the positions start (an int, or a tensor in a graph) ..
        start + T - 1 of S; their keys and values replace the cache's, and pad_mask is (B, S)."""
        keys_allowed = None if pad_mask is None else ~pad_mask[:, None, None]   # (B, 1, 1, S)
        position = torch.arange(e.shape[1], device=e.device) + start           # (T,)
        angles = rope(self.config, position, e.dtype)
        through, blocks = self.through, list(self.blocks)
        if self.checkpointing and torch.is_grad_enabled():
            through = partial(checkpoint, through, use_reentrant=False, preserve_rng_state=False)
        some = max(n for n in (1, 2, 3, 4) if len(blocks) % n == 0)  # fewer calls where compiled
        for i in range(0, len(blocks), some):
            kept = None if cache is None else (cache.k[i:i + some], cache.v[i:i + some], position)
            e = through(blocks[i:i + some], e, angles, keys_allowed, kept)
        return self.norm(e)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V), raw: not moved by Dream's one position, nothing suppressed."""
        return F.linear(h, self.embedding.weight) if self.head is None else self.head(h)

    def forward(self, ids: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) ids -> (B, T, V) raw logits."""
        return self.logits(self.hidden(self.embed(ids), pad_mask))

    def compile(self, **options) -> None:
        """Compile the blocks, some at a time, with torch.compile's options, for any batch and
        length: a code each without a cache, filling one, reading one, each with and without
        padding, for torch keeps few graphs of a code. On CUDA steps become CUDA graphs."""
        copies = (FunctionType(through.__code__.replace(), globals()) for _ in range(6))
        cases = [torch.compile(copy, dynamic=True, **options) for copy in copies]

        def compiled(blocks, x, angles, allowed=None, kept=None):
            reading = kept is not None and kept[0][0].shape[2] > x.shape[1]
            case = (allowed is not None) + 2 * (kept is not None) + 2 * reading
            return cases[case](blocks, x, angles, allowed, kept)

        self.through, self.graphs = compiled, self.embedding.weight.is_cuda

    def fingerprint(self) -> str:
        """A short hash of config and weights that tells one backbone's memories from another's."""
        return fingerprint(repr(replace(self.config, dtype="")), self.parameters())

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Backbone:
        """Fresh weights: normal with deviation fan_in ** -0.5, smaller by sqrt(2 (layer + 1)) for
        the two projections that write to the residual stream (LLaDA's "mitchell" scheme)."""
        for name, p in self.named_parameters():
            layer = re.match(r"blocks\.(\d+)\.(out|down)\.", name)
            depth = 2 * (int(layer[1]) + 1) if layer else 1
            if p.dim() > 1:
                p.normal_(0.0, (p.shape[1] * depth) ** -0.5, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


# ------------------------------------------------------------------ published checkpoints
NAMES = {  # our module -> the published ones, in the order in which they are stacked; {} is a layer
    "llada": {
        "embedding": "model.transformer.wte", "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out", "blocks": "model.transformer.blocks.{}.",
        "attn_norm": "attn_norm", "qkv": "q_proj k_proj v_proj", "out": "attn_out",
        "mlp_norm": "ff_norm", "gate_up": "ff_proj up_proj", "down": "ff_out"},
    "dream": {
        "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "blocks": "model.layers.{}.", "attn_norm": "input_layernorm",
        "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm", "gate_up": "mlp.gate_proj mlp.up_proj",
        "down": "mlp.down_proj"}}


def layout(backbone: Backbone) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our parameter -> the published tensors that are stacked to make it, with their shapes."""
    c, names, found = backbone.config, NAMES[backbone.config.family], {}
    for ours, p in backbone.named_parameters():
        *path, module, kind = ours.split(".")                       # blocks, 0, qkv, weight
        prefix = names["blocks"].format(path[1]) if path else ""
        parts = [f"{prefix}{part}.{kind}" for part in names[module].split()]
        kv = c.kv_heads * c.head_dim
        rows = [c.dim, kv, kv] if module == "qkv" else [p.shape[0] // len(parts)] * len(parts)
        found[ours] = {part: (n, *p.shape[1:]) for part, n in zip(parts, rows)}
    return found


def save(backbone: Backbone, path: str | Path) -> None:
    """Write the weights under their published names, so that the published code reads them too."""
    save_stacked(path, backbone.state_dict(), layout(backbone))


def unfilled(config: Config) -> Backbone:
    """A backbone whose parameters have shapes and no storage."""
    with torch.device("meta"):
        return Backbone(config)


def config_of(ckpt: str) -> Config:
    """The config of a checkpoint, without its weights; the published nicknames need no download."""
    if isinstance(CHECKPOINTS.get(ckpt), str):  # all relatives of Dream have its shapes
        return LLADA_8B if ckpt.startswith("llada") else DREAM_7B
    return Config.from_json(find(ckpt))


def load(ckpt: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None) -> tuple[Backbone, Tokenizer | None]:
    """A frozen backbone in eval mode and its tokenizer (None where the checkpoint has none).

    ckpt: a nickname of `lib.hub.CHECKPOINTS`, a folder, a hub id, or "random:" and one of these:
    the shapes of its config.json with random weights and no tokenizer, for benchmarks.
    device: CUDA where there is one, else the CPU. dtype: a torch dtype or its name; by default
    bfloat16 on CUDA (float16 on cards without) and as stored elsewhere. Raises `InputError`."""
    device = device_of(device)
    dtype, name, tokenizer = dtype_of(dtype, device), str(ckpt), None
    if name.startswith("random:"):
        config = config_of(name.removeprefix("random:"))
        backbone = unfilled(config).to(dtype or getattr(torch, config.dtype))
        allocated(backbone, device).initialise(torch.Generator(device).manual_seed(0))
    else:
        folder = find(ckpt)
        backbone = unfilled(Config.from_json(folder))
        tokenizer = Tokenizer.found_in(folder, backbone.config.vocab, name)
        backbone.load_state_dict(read_stacked(folder, layout(backbone), device, dtype), assign=True)
    return backbone.eval().requires_grad_(False), tokenizer
