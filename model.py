"""LLaDA and Dream, two masked diffusion language models, as one hand-written transformer.

Everything between a checkpoint on disk and its logits: `Config` reads either family's
config.json, `Backbone` is the network, `load` fills it from safetensors without ever holding the
weights twice, `Tokenizer` turns text and chats into ids. No transformers, no remote code.

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

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent
CHECKPOINTS = {  # nickname -> a folder of ours or a hub id
    "tiny": HERE / "checkpoints" / "tiny",
    "haystack": HERE / "checkpoints" / "haystack",
    "llada-8b": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-8b-base": "GSAI-ML/LLaDA-8B-Base",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
    "dream-7b-base": "Dream-org/Dream-v0-Base-7B",
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


# ------------------------------------------------------------------ errors and atomic files
class InputError(ValueError):
    """Something the user can put right. Scripts print it as one line and exit with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others."""

    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def seed(text: str) -> int:
    """A seed on the command line: a whole number that every generator takes."""
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**63 - 1")
    return int(text)


def command(main):
    """Wrap a script's `main(argv=None)`: an `InputError` or a full disk becomes one line on stderr
    and exit code 2 instead of a traceback; Ctrl-C becomes exit code 130."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except InputError as error:
            message = str(error)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        except BrokenPipeError:  # `| head` went away: nothing more to say, also not at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 141
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"the disk is full ({error.filename or error.strerror}); free some space"
        print("error: " + " ".join(message.split()), file=sys.stderr)
        return 2

    return wrapped


def write_atomic(path: str | Path, write) -> None:
    """Call `write(temporary_path)`, flush it to disk, then rename it onto `path`: a kill or a full
    disk at any moment leaves the previous file whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error}") from error


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a safetensors file atomically. Equal content gives equal bytes: `metadata` is kept
    under one key, because the library shuffles several."""
    if len(metadata) > 1:
        metadata = {"json": json.dumps(metadata)}
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    write_atomic(path, lambda p: p.write_bytes(safetensors.torch.save(tensors, metadata)))


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, metadata) of a file that `save_tensors` wrote. Raises `InputError`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["json"])
            return {k: file.get_tensor(k) for k in file.keys()}, metadata
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error or 'not one of our files'}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or an `InputError` that names it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def parse_json(text: str, where: str | Path) -> dict:
    """The JSON object in a text, or an `InputError` that says where."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, or an `InputError` that names the file."""
    return parse_json(read_text(path), path)


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """("path:number", text) for every line of a file that is not blank."""
    lines = read_text(path).split("\n")  # not splitlines: JSON may hold U+2028 and its like
    return [(f"{path}:{n}", line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]


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
        """Whether this is of LLaDA-8B's and Dream-7B's class, by its width (our choice): sizes of a
        memory and defaults of its training are for these, or else for a laptop."""
        return self.dim >= 2048

    @property
    def parameters(self) -> int:
        """Number of weights of the backbone."""
        kv = self.kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * self.dim * kv
        bias = (self.dim + 2 * kv) * self.qkv_bias
        block = attention + bias + 3 * self.dim * self.mlp_dim + 2 * self.dim
        return self.vocab * self.dim * (1 if self.tied else 2) + self.layers * block + self.dim

    def __post_init__(self):
        ints = ("dim", "layers", "heads", "kv_heads", "mlp_dim", "vocab", "max_len")
        for name in (*ints, "mask_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            if type(value) is not int or not (name in ints) <= value < 2 ** 31:
                raise InputError(f"config: {name} is {value!r}, which is not a usable whole number")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise InputError(f"config: {name} is {value!r}, which is not a positive number")
        if self.dim % self.heads or self.head_dim % 2:
            raise InputError(f"config: width {self.dim} does not split into {self.heads} heads of "
                             "even width")
        if self.heads % self.kv_heads:
            raise InputError(f"config: {self.heads} heads do not share {self.kv_heads} kv heads")
        if self.mask_id == self.eos_id:
            raise InputError(f"config: mask_id and eos_id are both {self.mask_id}")
        for name in ("mask_id", "eos_id", "pad_id"):
            if getattr(self, name) >= self.vocab:
                raise InputError(f"config: {name} {getattr(self, name)} is outside the vocabulary "
                                 f"of {self.vocab}")

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """Read a published config.json (the file, or its folder) of either family. Raises
        `InputError` for a file that is missing or broken, a family we do not know, or a setting
        that no published checkpoint uses and this implementation does not have."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"no config.json in {path.parent}: pass a folder with config.json, "
                             "*.safetensors and the tokenizer's files")
        try:
            return cls.from_dict(read_json(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: dict) -> Config:
        """The same from the fields of a config.json."""
        family = str(raw.get("model_type")).lower()
        if family not in ("llada", "dream"):
            raise InputError(f"model_type is {raw.get('model_type')!r}; the families known here "
                             "are llada and dream")
        for key, value in (_LLADA_FIXED if family == "llada" else _DREAM_FIXED).items():
            if raw.get(key, value) != value:
                raise InputError(f"{key} = {raw[key]!r} is not supported (only {value!r})")
        try:
            return (cls._llada if family == "llada" else cls._dream)(raw)
        except KeyError as error:
            raise InputError(f"{error.args[0]} is missing") from error
        except TypeError as error:  # null or text where a number is due
            raise InputError(f"a size has the wrong type ({error})") from error

    @classmethod
    def _llada(cls, raw: dict) -> Config:
        heads = raw["n_heads"]
        kv_heads = 1 if raw.get("multi_query_attention") else raw.get("n_kv_heads") or heads
        return cls(
            family="llada", dim=raw["d_model"], layers=raw["n_layers"], heads=heads,
            kv_heads=kv_heads, vocab=raw.get("embedding_size") or raw["vocab_size"],
            # mlp_ratio counts only where mlp_hidden_size is absent; 8B has both, and they disagree
            mlp_dim=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
            max_len=raw["max_sequence_length"], rope_theta=raw.get("rope_theta", 10000.0),
            norm_eps=raw.get("rms_norm_eps", 1e-5), qkv_bias=bool(raw.get("include_qkv_bias")),
            rope_float32=bool(raw.get("rope_full_precision", True)),
            tied=bool(raw.get("weight_tying")), mask_id=raw["mask_token_id"],
            eos_id=raw["eos_token_id"], pad_id=raw.get("pad_token_id", raw["eos_token_id"]),
            dtype=raw.get("torch_dtype") or "bfloat16")

    @classmethod
    def _dream(cls, raw: dict) -> Config:
        return cls(
            family="dream", dim=raw["hidden_size"], layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            mlp_dim=raw["intermediate_size"], vocab=raw["vocab_size"],
            max_len=raw["max_position_embeddings"], rope_theta=raw["rope_theta"],
            norm_eps=raw["rms_norm_eps"], qkv_bias=True, rope_float32=False,
            tied=bool(raw.get("tie_word_embeddings")), mask_id=raw["mask_token_id"],
            eos_id=raw["eos_token_id"], pad_id=raw.get("pad_token_id", raw["eos_token_id"]),
            dtype=raw.get("torch_dtype") or "bfloat16")


_LLADA_FIXED = {  # what every published LLaDA config says; another value would change the network
    "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
    "alibi": False, "include_bias": False, "bias_for_layer_norm": False, "scale_logits": False,
    "input_emb_norm": False, "attention_layer_norm": False}
_DREAM_FIXED = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False,
                "use_mrope": False}

LLADA_8B = Config("llada", 4096, 32, 32, 32, 12288, 126464, 4096, 500000.0, 1e-5, False, True,
                  False, 126336, 126081, 126081)
DREAM_7B = Config("dream", 3584, 28, 28, 4, 18944, 152064, 131072, 1e6, 1e-6, True, False, False,
                  151666, 151643, 151643)


# ------------------------------------------------------------------ the network
class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (the order both families use)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., d) -> (..., d)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_tables(config: Config, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles, each (length, head_dim / 2), float32."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inv_freq = 1.0 / config.rope_theta ** (half / config.head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inv_freq)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the two-halves form: [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin].
    x (B, T, nh, hd), cos and sin (T, hd / 2); computed in the dtype of cos."""
    x1, x2 = x.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]                           # (T, 1, hd / 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear, but that on a CPU a wide one takes up to 64 rows of float32 as W x^T when there is
    no graph: of the long side of W two threads make 1.4 to 2 times as much (AMD EPYC, Zen 3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled() or \
                self.in_features < 1024 or x.numel() > 64 * self.in_features:
            return super().forward(x)
        y = self.weight @ x.flatten(0, -2).T                        # (out, rows)
        y = y if self.bias is None else y.add_(self.bias[:, None])
        return y.T.contiguous().view(*x.shape[:-1], self.out_features)


def pick(x: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """The rows where (B, n) of x (B, T, ...) -> (B, n, ...); all of them where it is None."""
    if where is None:
        return x
    index = where.view(*where.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU. q, k, v are one matrix, and so are gate and up: one read of
    the activations each, and rows stacked in that order so that splitting is a view."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.qkv = Linear(c.dim, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.dim, c.dim, bias=False)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.gate_up = Linear(c.dim, 2 * c.mlp_dim, bias=False)
        self.down = Linear(c.mlp_dim, c.dim, bias=False)

    def attention(self, x, rope, keys_allowed, kept, where):
        B, T, _ = x.shape
        nh, nkv, hd = self.c.heads, self.c.kv_heads, self.c.head_dim
        qkv = self.qkv(x).view(B, T, nh + 2 * nkv, hd)              # (B, T, nh + 2 nkv, hd)
        qk = rotate(qkv[:, :, :nh + nkv], *rope)                    # (B, T, nh + nkv, hd)
        q, k, v = pick(qk[:, :, :nh], where), qk[:, :, nh:], qkv[:, :, nh + nkv:]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))            # (B, heads, T or n, hd)
        if kept is not None:  # (B, nkv, S, hd) each: ours go to their rows, all are attended to
            k, v = (old.index_copy_(2, kept[2], new) for old, new in zip(kept, (k, v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys_allowed, enable_gqa=nh != nkv)
        return self.out(y.transpose(1, 2).flatten(2))               # (B, T or n, d)

    def forward(self, x, rope, keys_allowed, kept=None, where=None):
        """where (B, n): every position gives its keys and values, these alone the rest."""
        x = pick(x, where) + self.attention(self.attn_norm(x), rope, keys_allowed, kept, where)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)      # (B, T, mlp_dim) each
        return x + self.down(F.silu(gate) * up)


class Cache:
    """Keys and values of every position of B sequences of length S: k, v (layers, B, kv_heads, S,
    head_dim), written in place. Positions that are not computed anew are seen as they were when
    they were last computed: an approximation, for attention looks both ways (Fast-dLLM)."""

    def __init__(self, backbone: Backbone, batch: int, length: int):
        c, like = backbone.config, backbone.embedding.weight
        self.k, self.v = (like.new_zeros(c.layers, batch, c.kv_heads, length, c.head_dim)
                          for _ in range(2))
        self.graph: Graph | None = None

    def replay(self, backbone: Backbone, e: torch.Tensor, pad_mask, start: int) -> torch.Tensor:
        """`backbone.hidden(e, pad_mask, self, start)` as a CUDA graph that the first call makes; in
        all calls e has the same shape, and pad_mask is the same."""
        inputs = e, torch.full((), start, device=e.device)
        if self.graph is None:
            self.graph = Graph(lambda e, start: backbone.hidden(e, pad_mask, self, start), *inputs)
        return self.graph(*inputs)


class Graph:
    """A function of tensors, captured once as a CUDA graph and replayed: one launch in place of
    hundreds. What it reads and writes besides stays where it is (weights, a `Cache`). A call
    overwrites the result of the one before."""

    def __init__(self, function: Callable, *inputs: torch.Tensor):
        self.inputs = [x.clone() for x in inputs]
        ours, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(ours)
        with torch.cuda.stream(side):  # compiles and allocates what a capture cannot
            function(*self.inputs)
        ours.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()
        return self.output


class Backbone(nn.Module):
    """A LLaDA or Dream transformer: ids -> embed -> hidden -> logits, each callable on its own,
    because a memory writes between the first two and reads after the second."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # with a weight given, or nn.Embedding's own init imports torch._dynamo: a slow start
        self.embedding = nn.Embedding(config.vocab, config.dim,
                                      _weight=torch.empty(config.vocab, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else Linear(config.dim, config.vocab, bias=False)
        self.checkpointing = False  # recompute each block in the backward pass: less memory
        self.graphs = False  # replay a dual cache's block steps as CUDA graphs
        self._rope = None  # (cos, sin), grown on demand: Dream's 131,072 positions are 134 MB

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, d)."""
        return self.embedding(ids)

    def hidden(self, e: torch.Tensor, pad_mask: torch.Tensor | None = None,
               cache: Cache | None = None, start: int | torch.Tensor = 0,
               where: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, d) embeddings -> (B, T, d) after the last norm. pad_mask (B, T) is True where
        padded: those keys are hidden from every query. Positions stay 0..T-1 also with padding on
        the left: RoPE sees differences only, so real rows come out as without the padding.

        With a cache of length S, e holds the positions start .. start + T - 1 of S; their keys and
        values replace the cache's, all S are attended to, and pad_mask is (B, S). start may be a
        tensor: a graph can then be replayed elsewhere. With where (B, n), positions of e, only
        their n hidden states are made in the last block and returned."""
        keys_allowed = None if pad_mask is None else ~pad_mask[:, None, None]   # (B, 1, 1, S)
        rope = self._rope_for(e, e.shape[1] if cache is None else cache.k.shape[3])
        if cache is not None:
            rows = torch.arange(e.shape[1], device=e.device) + start
            rope = tuple(table[rows] for table in rope)
        for i, block in enumerate(self.blocks):
            kept = None if cache is None else (cache.k[i], cache.v[i], rows)
            wanted = where if i + 1 == len(self.blocks) else None
            if self.checkpointing and torch.is_grad_enabled():
                e = checkpoint(block, e, rope, keys_allowed, kept, wanted, use_reentrant=False)
            else:
                e = block(e, rope, keys_allowed, kept, wanted)
        return self.norm(e)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V), raw: not moved by Dream's one position, nothing suppressed."""
        return F.linear(h, self.embedding.weight) if self.head is None else self.head(h)

    def forward(self, ids: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) ids -> (B, T, V) raw logits."""
        return self.logits(self.hidden(self.embed(ids), pad_mask))

    def compile(self, **options) -> None:
        """Compile the blocks with torch.compile, whose options these are. The first block's graphs
        serve all: one for the first shape that is seen, another for the shapes that differ. On CUDA
        the steps of a dual cache are replayed as CUDA graphs from then on."""
        for block in self.blocks:
            block.compile(**options)
        self.graphs = self.embedding.weight.is_cuda

    def fingerprint(self) -> str:
        """A short hash of the config and of 64 weights spread over every parameter, the same in
        float32 and bfloat16 and on any device: tells one backbone's memories from another's."""
        digest = hashlib.sha256(repr(replace(self.config, dtype="")).encode())
        for p in self.parameters():
            pick = torch.linspace(0, p.numel() - 1, 64, dtype=torch.float64).long()
            digest.update(p.detach().view(-1)[pick.to(p.device)].bfloat16().float().cpu().numpy())
        return digest.hexdigest()[:16]

    def _rope_for(self, e: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float32 if self.config.rope_float32 else e.dtype
        kept = self._rope
        if kept is None or len(kept[0]) < length or kept[0].device != e.device \
                or kept[0].dtype != dtype:
            rows = 1 << (length - 1).bit_length()                   # next power of two
            kept = self._rope = tuple(t.to(dtype) for t in rope_tables(self.config, rows, e.device))
        return kept[0][:length], kept[1][:length]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Backbone:
        """Fresh weights: normal with deviation fan_in ** -0.5, smaller by sqrt(2 (layer + 1)) for
        the two projections that write to the residual stream (LLaDA's "mitchell" scheme)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            layer = re.match(r"blocks\.(\d+)\.(out|down)\.", name)
            depth = 2 * (int(layer[1]) + 1) if layer else 1
            p.normal_(0.0, (p.shape[1] * depth) ** -0.5, generator=generator)
        return self


# ------------------------------------------------------------------ weights
_LLADA_NAMES = {  # our parameter -> the published ones, in the order in which they are stacked
    "embedding.weight": ["model.transformer.wte.weight"],
    "norm.weight": ["model.transformer.ln_f.weight"],
    "head.weight": ["model.transformer.ff_out.weight"],
    **{f"blocks.#.{ours}": [f"model.transformer.blocks.#.{t}" for t in theirs.split()]
       for ours, theirs in {
           "attn_norm.weight": "attn_norm.weight",
           "qkv.weight": "q_proj.weight k_proj.weight v_proj.weight",
           "qkv.bias": "q_proj.bias k_proj.bias v_proj.bias",
           "out.weight": "attn_out.weight",
           "mlp_norm.weight": "ff_norm.weight",
           "gate_up.weight": "ff_proj.weight up_proj.weight",
           "down.weight": "ff_out.weight"}.items()}}
_DREAM_NAMES = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
    **{f"blocks.#.{ours}": [f"model.layers.#.{t}" for t in theirs.split()]
       for ours, theirs in {
           "attn_norm.weight": "input_layernorm.weight",
           "qkv.weight": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
           "qkv.bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
           "out.weight": "self_attn.o_proj.weight",
           "mlp_norm.weight": "post_attention_layernorm.weight",
           "gate_up.weight": "mlp.gate_proj.weight mlp.up_proj.weight",
           "down.weight": "mlp.down_proj.weight"}.items()}}


def layout(config: Config) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our parameter -> the published tensors that are stacked to make it, with their shapes."""
    d, kv = config.dim, config.kv_heads * config.head_dim
    rows = {"embedding": [config.vocab], "head": [config.vocab], "qkv": [d, kv, kv],
            "gate_up": [config.mlp_dim] * 2, "out": [d], "down": [d]}
    columns = {"down": config.mlp_dim}
    found = {}
    for ours, theirs in (_LLADA_NAMES if config.family == "llada" else _DREAM_NAMES).items():
        _, module, kind = ("." + ours).rsplit(".", 2)
        if (kind == "bias" and not config.qkv_bias) or (module == "head" and config.tied):
            continue
        shapes = [(n, columns.get(module, d)) for n in rows[module]] if module in rows else [(d,)]
        shapes = [s[:1] for s in shapes] if kind == "bias" else shapes
        for i in range(config.layers if "#" in ours else 1):
            found[ours.replace("#", str(i))] = {
                name.replace("#", str(i)): shape for name, shape in zip(theirs, shapes)}
    return found


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from model.safetensors or the sharded index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or os.path.basename(shard) != shard \
                    or not shard.endswith(".safetensors"):
                raise InputError(f"{index}: {name} is said to be in {shard!r}, which is not a "
                                 "safetensors file of the same folder")
        where = {name: folder / shard for name, shard in weight_map.items()}
    else:
        single = folder / "model.safetensors"
        if not single.is_file():
            raise InputError(f"no weights in {folder}: neither model.safetensors nor "
                             "model.safetensors.index.json")
        where = dict.fromkeys(_open(single).keys(), single)
    for path in sorted(set(where.values())):
        if not path.is_file():
            raise InputError(f"shard {path} is missing: download the checkpoint again")
        inside = set(_open(path).keys())
        for name in (n for n, p in where.items() if p == path and n not in inside):
            raise InputError(f"{path} does not hold {name}, which the index promises")
        for name in sorted(inside - where.keys()):
            raise InputError(f"{path} holds {name}, which the index does not list")
    return where


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): "
                         "download it again") from error


def _list(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_weights(config: Config, folder: Path, device, dtype: torch.dtype | None) -> Backbone:
    """A backbone filled from the published safetensors of a folder.

    Every tensor of the checkpoint is used and every parameter filled, or it is an `InputError`
    that names them. Files are memory-mapped: a parameter that is one stored tensor stays a view of
    the mapping (CPU, dtype as stored), a fused one is copied part by part and its pages are let go
    at once, because each part is read through a mapping of its own. Peak memory is the weights
    plus one fused parameter."""
    where = _shards(folder)
    if config.layers > len(where):
        raise InputError(f"{folder} lacks tensors for {config.layers} layers: it has {len(where)}")
    wanted = layout(config)
    shapes = {name: shape for parts in wanted.values() for name, shape in parts.items()}
    if missing := shapes.keys() - where.keys():
        raise InputError(f"{folder} lacks {_list(missing)}: does config.json belong to it?")
    if unexpected := where.keys() - shapes.keys():
        raise InputError(f"{folder} has unexpected tensors: {_list(unexpected)}")
    for path in sorted(set(where.values())):
        file = _open(path)
        for name in (n for n in shapes if where[n] == path):
            part = file.get_slice(name)
            if tuple(part.get_shape()) != shapes[name]:
                raise InputError(f"{path}: {name} has shape {tuple(part.get_shape())}, and "
                                 f"config.json asks for {shapes[name]}")
            if part.get_dtype() not in ("BF16", "F16", "F32"):
                raise InputError(f"{path}: {name} is {part.get_dtype()}, not BF16, F16 or F32")
    with torch.device("meta"):
        backbone = Backbone(config)
    state = {}
    for ours, parts in wanted.items():
        for name, shape in parts.items():
            tensor = _open(where[name]).get_tensor(name)
            dtype = dtype or tensor.dtype  # as stored: as the first tensor is
            if len(parts) == 1:
                state[ours] = tensor.to(device, dtype)
                continue
            if ours not in state:
                total = sum(s[0] for s in parts.values())
                state[ours], filled = torch.empty(total, *shape[1:], dtype=dtype,
                                                  device=device), 0
            state[ours][filled:filled + shape[0]].copy_(tensor)
            filled += shape[0]
    backbone.load_state_dict(state, assign=True)
    return backbone


def save(backbone: Backbone, path: str | Path) -> None:
    """Write the weights under their published names, so that the published code reads them too."""
    tensors, state = {}, backbone.state_dict()
    for ours, parts in layout(backbone.config).items():
        pieces = state[ours].split([shape[0] for shape in parts.values()])
        tensors.update(zip(parts, pieces))
    save_tensors(path, tensors, {"format": "pt"})


def find(ckpt: str | Path) -> Path:
    """The local folder of a checkpoint: a nickname, a folder, or a hub id, which is downloaded
    (weights, config and tokenizer only) when the hub's cache does not hold it whole."""
    target = CHECKPOINTS.get(str(ckpt), ckpt)
    folder = os.path.expanduser(target)
    if os.path.isdir(folder):
        return Path(folder)
    if str(ckpt) in CHECKPOINTS and isinstance(target, Path):  # ours, and not made yet
        raise InputError(f"{target} is not there: python tiny.py pretrain --task {ckpt} makes it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(target)):
        raise InputError(f"unknown checkpoint {str(ckpt)!r}: pass one of {', '.join(CHECKPOINTS)}, "
                         "random:NAME, a folder with config.json and *.safetensors, or a hub id "
                         "owner/name")
    from huggingface_hub import snapshot_download
    wanted = ["config.json", "generation_config.json", "*.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
              "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
    try:
        folder = Path(snapshot_download(str(target), allow_patterns=wanted, local_files_only=True))
        Config.from_json(folder)
        _shards(folder)
        return folder
    except Exception:  # not in the cache, or not whole: the hub's own errors differ by version
        pass
    try:
        return Path(snapshot_download(str(target), allow_patterns=wanted))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot download {target} ({reason}), and there is no such folder; "
                         "a folder with config.json and *.safetensors works too") from error


def load(ckpt: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None) -> tuple[Backbone, Tokenizer | None]:
    """A frozen backbone in eval mode and its tokenizer (None where the checkpoint has none).

    ckpt: a nickname of `CHECKPOINTS`, a folder, a hub id, or "random:NAME" with NAME any of these:
    the true shapes, or others (see `shapes_of`), with random weights made on the device and no
    tokenizer, for benchmarks.
    device: CUDA where there is one, else the CPU. dtype: a torch dtype or its name; by default
    bfloat16 on CUDA and as stored on the CPU. Raises `InputError`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} is not to be had ({reason})") from error
    dtype = DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise InputError(f"unknown dtype {str(dtype)!r}: pass one of {', '.join(DTYPES)}")
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16
    if str(ckpt).startswith("random:"):
        return _random(str(ckpt)[len("random:"):], device, dtype), None
    folder = find(ckpt)
    config = Config.from_json(folder)
    backbone = load_weights(config, folder, device, dtype)
    has_tokenizer = any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json"))
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    if tokenizer and (largest := max(tokenizer.vocab.values(), default=0)) >= config.vocab:
        raise InputError(f"{folder}: the tokenizer has id {largest}, "
                         f"the model only {config.vocab} rows")
    return backbone.eval().requires_grad_(False), tokenizer


def compile_on(device: torch.device, wanted: bool | None, *modules) -> None:
    """Compile a backbone and memories (None is passed over) if wanted; if nothing is said, on CUDA.
    Raises `InputError` on a CPU without the C++ compiler that it takes."""
    if device.type == "cuda" if wanted is None else wanted:
        if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"),
                                                               "clang++"))):
            raise InputError("--compile on a CPU needs a C++ compiler, and there is no g++")
        for module in modules:
            if module is not None:
                module.compile()


def shapes_of(ckpt: str | Path) -> Config:
    """The config of a checkpoint, without its weights: a published nickname needs no download.
    "NAME,dim=1024,layers=8,vocab=32000" is the same at other sizes. What is not given follows:
    heads keep their width, the MLP its ratio, and the special ids are the vocabulary's last."""
    name, *changes = str(ckpt).split(",")
    known = {"llada": LLADA_8B, "dream": DREAM_7B}
    nickname = name if name in CHECKPOINTS else ""
    c = next((known[k] for k in known if nickname.startswith(k)), None) \
        or Config.from_json(find(name))
    sizes = ("dim", "layers", "heads", "kv_heads", "mlp_dim", "vocab")
    try:
        given = {key: int(value) for key, value in (change.split("=") for change in changes)}
    except ValueError as error:
        raise InputError(f"{ckpt}: behind the name go sizes, such as ,dim=1024") from error
    if unknown := given.keys() - set(sizes):
        raise InputError(f"{ckpt}: {_list(unknown)} is no size: one of {', '.join(sizes)}")
    dim, vocab = given.get("dim", c.dim), given.get("vocab", c.vocab)
    heads = given.get("heads", max(1, dim // c.head_dim))
    follow = {"heads": heads, "kv_heads": max(1, heads * c.kv_heads // c.heads),
              "mlp_dim": dim * c.mlp_dim // c.dim}
    if vocab != c.vocab:
        follow |= {"mask_id": vocab - 1, "eos_id": vocab - 2, "pad_id": vocab - 2}
    return replace(c, **(follow | given)) if given else c


def _random(name: str, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    config = shapes_of(name)
    with torch.device("meta"):
        backbone = Backbone(config)
    backbone = backbone.to(dtype or DTYPES.get(config.dtype, torch.bfloat16))
    backbone = backbone.to_empty(device=device)
    backbone.initialise(torch.Generator(device).manual_seed(0))
    return backbone.eval().requires_grad_(False)


# ------------------------------------------------------------------ tokenizer and chat format
_QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


class Tokenizer:
    """Text and chats to ids and back. LLaDA ships a tokenizer.json; Dream ships the parts of
    Qwen2's byte-level BPE, from which the same is built here."""

    def __init__(self, core: tokenizers.Tokenizer):
        self.core = core
        self.vocab: dict[str, int] = core.get_vocab(with_added_tokens=True)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From tokenizer.json, else from vocab.json, merges.txt and tokenizer_config.json.
        Raises `InputError` when neither is there, or a file is broken."""
        path = Path(path)
        try:
            if (path / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")))
            for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                if not (path / name).is_file():
                    raise InputError(f"no tokenizer in {path}: tokenizer.json is absent, and "
                                     f"so is {name}")
            return cls(cls._byte_level_bpe(path))
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(f"cannot read the tokenizer in {path}: {error}") from error

    @staticmethod
    def _byte_level_bpe(path: Path) -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
            str(path / "vocab.json"), str(path / "merges.txt")))
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
        added = read_json(path / "tokenizer_config.json").get("added_tokens_decoder", {})
        for number, fields in sorted(added.items(), key=lambda item: int(item[0])):
            flags = {k: fields[k] for k in ("single_word", "lstrip", "rstrip", "normalized",
                                            "special") if k in fields}
            token = AddedToken(fields["content"], **flags)
            (core.add_special_tokens if flags.get("special") else core.add_tokens)([token])
            if core.token_to_id(fields["content"]) != int(number):
                raise InputError(f"{path}/tokenizer_config.json gives {fields['content']} the id "
                                 f"{number}, which vocab.json does not leave free")
        return core

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it is: nothing is put in front; special tokens written out count."""
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair, as from bytes that are not UTF-8
            raise InputError(f"the text is not valid Unicode: {text[:40]!r}") from error

    def decode(self, ids, skip_special: bool = False) -> str:
        """Text of a list (or 1-d tensor) of ids, special tokens included unless skipped."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.core.decode(ids, skip_special_tokens=skip_special)

    @property
    def is_chat(self) -> bool:
        """True when the markers of a chat format are tokens of their own (LLaDA-Base: False)."""
        return any(t in self.vocab for t in ("<|im_start|>", "<|start_header_id|>"))

    @property
    def end_of_turn(self) -> str:
        """The marker behind a message in the chat format, "" where there is none."""
        return next((t for t in ("<|im_end|>", "<|eot_id|>") if t in self.vocab), "")

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation, [{"role": ..., "content": ...}, ...], up to where the assistant's
        next words go. Dream's ChatML where the vocabulary has `<|im_start|>`, else LLaDA's format;
        each as the published templates have it."""
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) \
                    or not isinstance(message.get("content"), str):
                raise InputError(f"a message needs a role and a content, both text: {message!r}")
        if "<|im_start|>" in self.vocab:
            if not messages or messages[0]["role"] != "system":
                default = {"role": "system", "content": "You are a helpful assistant."}
                messages = [default, *messages]
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return self.encode("".join(turns) + "<|im_start|>assistant\n")
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        turns = [header.format(m["role"]) + m["content"].strip() + "<|eot_id|>" for m in messages]
        return self.encode("<|startoftext|>" + "".join(turns) + header.format("assistant"))
