"""A small model in LLaDA's format and how one is pretrained: config, tokenizer, first heads, loss,
CUDA graphs of it, schedule. What each is pretrained on: studies/pretrain.py and stories.py."""
from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Callable, Iterable, Sequence

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers

from lib.cli import count, named, seed, size
from lib.data import Batch, move, task_batch
from lib.files import write_text
from lib.options import rate
from lib.outputs import output_folder
from model import Backbone, Tokenizer, rotate, save
from tasks import Task, draw

# ------------------------------------------------------------------ config and weights
CONFIG = {  # LLaDA's own format, small: 0.4 M parameters. rope_theta suits sequences of some 70
    # tokens better than 10000: sudoku was learned in about half as many updates with 100
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "block_type": "llama",
    "d_model": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 6, "mlp_hidden_size": 256,
    "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
    "rope_theta": 300.0, "rope_full_precision": True, "max_sequence_length": 256,
    "include_bias": False, "include_qkv_bias": True, "weight_tying": False,
    "torch_dtype": "float32"}
GEN_LENGTH = 24  # the longest answer has 23 tokens; what is left over is EOS
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")


def byte_level(texts: list[str], size: int, split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens, learned from texts."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, show_progress=False,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return Tokenizer(core)


def build_config(tokenizer: Tokenizer, **changes) -> dict:
    """The tiny model's config.json, with `changes`."""
    _, eos, mask = (tokenizer.vocab[s] for s in SPECIAL)
    return {**CONFIG, **changes, "vocab_size": len(tokenizer.vocab), "mask_token_id": mask,
            "eos_token_id": eos, "pad_token_id": eos}


def write_folder(backbone: Backbone, tokenizer: Tokenizer, folder: Path,
                 tasks: Iterable[str], length: int = GEN_LENGTH, **changes) -> None:
    """The whole checkpoint: config.json (with `changes`), generation_config.json, which names the
    `tasks` it was trained on and their answers' `length`, tokenizer.json and weights."""
    stated = {"bos_token_id": tokenizer.vocab[SPECIAL[0]], "eos_token_id": backbone.config.eos_id,
              "max_new_tokens": length, "tasks": list(tasks)}
    for name, fields in (("config.json", build_config(tokenizer, **changes)),
                         ("generation_config.json", stated)):
        write_text(folder / name, json.dumps(fields, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer.core.to_str(pretty=True))
    save(backbone, folder / "model.safetensors")


def look_nearby(backbone: Backbone, offsets: Sequence[int], sharpness: float = 20.0) -> None:
    """Start the first layer's head i as one that attends to the token `offsets[i]` positions away,
    whatever stands there; heads left over start as usual. Needs q/k/v biases.

    The bias c of the keys is turned by RoPE to R(n) c at position n, so with R(offset) c as the
    bias of the queries, R(m + offset) c at position m, the score is a sum of cosines of
    n - m - offset times RoPE's frequencies. c has `sharpness` of squared length at each of the
    five highest, and the heads' weights start at a tenth: the bias decides.

    Ours. Without it, look-ups (find the token behind another "a") are hardly learned at this size:
    the second layer has nothing to match before the first has found such heads by itself."""
    c = backbone.config
    d, hd = c.dim, c.head_dim
    amplitude = torch.zeros(hd // 2)
    amplitude[:5] = (sharpness / 2) ** 0.5
    key = amplitude.repeat(2)
    weight, bias = backbone.blocks[0].qkv.weight.data, backbone.blocks[0].qkv.bias.data
    for i, offset in enumerate(offsets):
        angle = offset * c.rope_theta ** (-torch.arange(0, hd, 2) / hd)
        q, k = slice(i * hd, (i + 1) * hd), slice(d + i * hd, d + (i + 1) * hd)
        bias[k] = key
        bias[q] = rotate(key.view(1, 1, 1, hd), angle.cos()[None], angle.sin()[None]).view(hd)
        weight[q] *= 0.1
        weight[k] *= 0.1


# ------------------------------------------------------------------ pretraining
def trapezoids(step: int, steps: int, warmup: int, stage: int = 0, fall: float = 0.1) -> float:
    """Share of the peak learning rate: linear warm-up, flat, then linear to 0 over the last tenth
    (`fall`), once for the first `stage` updates and once for what follows. Until a fall begins a
    run does not depend on its length: it can be made longer or shorter."""
    step, steps = (step, stage) if step < stage else (step - stage, steps - stage)
    return min((step + 1) / warmup, 1.0, (steps - step) / (fall * steps))


def noised(answers: torch.Tensor, mask_id: int, generator: torch.Generator, block: int = 0,
           among: torch.Tensor | None = None,
           least: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers (B, G) -> the same with masks, and each position's weight in LLaDA's own fine-tuning
    loss: t uniform, every answer token masked with probability p = (1 - 1e-3) t + 1e-3, its
    cross-entropy then weighted 1 / p and divided by the answer's length and the batch.

    Ours: the t of a batch are one uniform number plus a regular grid, modulo 1, which has the same
    distribution for each row and less variance for their mean. With `block`, every second row is
    what sampling meets in blocks of so many tokens: one of them, before which nothing is masked and
    behind which everything; its loss is the block's. among (B, G): nothing else is masked or
    counted. least: p is at least that."""
    B, G = answers.shape
    t = (torch.arange(B) / B + torch.rand(1, generator=generator)) % 1                   # (B,)
    p = ((1 - 1e-3) * t + 1e-3).clamp(min=least)[:, None].expand(B, G)                   # (B, G)
    masked = torch.rand(B, G, generator=generator) < p
    among = torch.ones(B, G, dtype=torch.bool) if among is None else among
    behind = torch.zeros(B, G, dtype=torch.bool)
    if block:
        at, second = torch.arange(G) // block, torch.arange(B)[:, None] % 2 == 0     # (G,), (B, 1)
        own = torch.randint(int(at[-1]) + 1, (B, 1), generator=generator)
        among, behind = among & ((at == own) | ~second), (at > own) & second
    weights = (masked & among) / p / (B * among.sum(1, keepdim=True).clamp(min=1))
    masked, weights = move((masked & among | behind, weights), answers.device)
    return answers.masked_fill(masked, mask_id), weights


class Weighted(torch.nn.Module):
    """The loss of `noised` answers behind prompts (B, P), which are never masked; EOS counts as
    answer; pad_mask (B, P) True where padded, or None."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, prompts, pad_mask, noisy, answers, weights):
        """The loss: noisy, answers and weights are (B, G) each."""
        pads = None if pad_mask is None else F.pad(pad_mask, (0, noisy.shape[1]))
        # on a GPU products are taken in bfloat16; a cache of the casts would outlive a CUDA graph
        with torch.autocast("cuda", torch.bfloat16, noisy.is_cuda, cache_enabled=False):
            h = self.backbone.hidden(self.backbone.embed(torch.cat([prompts, noisy], 1)), pads)
            logits = self.backbone.logits(h[:, prompts.shape[1]:]).flatten(0, 1)     # (B * G, V)
            losses = F.cross_entropy(logits, answers.flatten(), reduction="none")
        return losses @ weights.flatten()


def llada_loss(backbone: Backbone, prompts: torch.Tensor, answers: torch.Tensor,
               pad_mask: torch.Tensor | None, generator: torch.Generator,
               loss: Callable | None = None, **noise) -> torch.Tensor:
    """LLaDA's own fine-tuning loss, see `noised`, whose options `noise` are. loss: what computes it
    on the backbone's device, `Weighted` or its `Graphed`."""
    noisy, weights = noised(answers, backbone.config.mask_id, generator, **noise)
    data = move((prompts, pad_mask, noisy, answers, weights), backbone.embedding.weight.device)
    return (loss or Weighted(backbone))(*data)


class Graphed:
    """`Weighted`, forward and backward, as CUDA graphs: a pair for each shape of batch. Thousands
    of launches become two, which is what a small model's update spends its time with. Gradients
    stay where they are recorded: an update is one batch, for the next would overwrite them."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.losses, self.pool = backbone, {}, torch.cuda.graph_pool_handle()

    def __call__(self, *data: torch.Tensor) -> torch.Tensor:
        shape = data[0].shape, data[2].shape
        if shape not in self.losses:  # one of them runs at a time, and so they may share memory
            self.losses[shape] = torch.cuda.make_graphed_callables(
                Weighted(self.backbone), tuple(x.clone() for x in data), pool=self.pool)
        return self.losses[shape](*data)


def examples(task: Task, tokenizer: Tokenizer, rng: random.Random, size: int, held_out: bool,
             eos_id: int, length: int = GEN_LENGTH) -> Batch:
    """`size` examples of one side of a task's split, as `lib.data.task_batch` gives them."""
    pairs = [draw(task, rng, held_out) for _ in range(size)]
    return task_batch(pairs, tokenizer, eos_id, length)


def training_options(p: argparse.ArgumentParser, steps: int, batch: int, lr: float,
                     of: str = "") -> None:
    """What every pretraining's command takes, with its defaults; of: which examples a batch has."""
    p.add_argument("--out", type=output_folder, required=True, help="folder of the checkpoint it "
                   "writes; resumes if killed")
    p.add_argument("--steps", type=count, default=steps, help=f"updates (default: {steps})")
    p.add_argument("--batch-size", type=size, default=batch,
                   help=f"examples per micro-batch{of} (default: {batch})")
    p.add_argument("--lr", type=rate, default=lr, help=f"peak of AdamW (default: {lr:g})")
    p.add_argument("--seed", type=seed, default=0, help="of data and fresh weights")
    p.add_argument("--device", type=named, help="cuda, cpu, ... (default: cuda where there is one)")
