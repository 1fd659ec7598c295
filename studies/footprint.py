"""What training takes of a device's memory, counted without running it.

    python -m studies.footprint                                  # LLaDA-8B, by length and K
    python -m studies.footprint --ckpt dream-7b --tokens 2048 --K 4,12

The operations of a memory's update run on fake tensors, which have shapes and no storage, and the
bytes of those that live at a time are added up. What a device's allocator and kernels need for
themselves comes on top.
"""
from __future__ import annotations

import argparse
import sys
import weakref
from itertools import product

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.cli import Parser, command, count, listed, require, whole
from lib.files import to_json
from lib.progress import progress
from metastate import MetaState
from model import Config, config_of, unfilled
from sample import denoise
from train import token_losses


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live, and their peak."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def update_bytes(config: Config, tokens: int, K: int, checkpointing: bool) -> tuple[int, int, int]:
    """What a memory's update on one sequence takes in bfloat16, in bytes: (the backbone's weights;
    the memory's, with gradients and AdamW's moments, float32; the peak of all else). Nothing is
    computed: the operations of `denoise` and its backward pass run on fake tensors (not through
    `unrolled_loss`, which asks tensors for values). Three quarters of the tokens are the answer,
    and stay masked for all K steps: the most that can be."""
    backbone = unfilled(config)
    with FakeTensorMode():
        backbone.load_state_dict({name: torch.empty(p.shape, dtype=torch.bfloat16)
                                  for name, p in backbone.named_parameters()}, assign=True)
        backbone.requires_grad_(False)
        backbone.checkpointing, backbone.fingerprint = checkpointing, lambda: ""
        memory = MetaState.for_backbone(backbone)
        ids, answer = torch.zeros(1, tokens, dtype=torch.long), 3 * tokens // 4
        where, span = ids[:, :answer], (tokens - answer, answer)
        with Alive(backbone, memory) as alive:
            total, state = 0.0, memory.initial(1)
            for _ in range(K):
                h, state = denoise(backbone, ids, where, memory=memory, state=state, span=span)
                total = total + token_losses(backbone, h, where).mean()
            del state, h  # what followed the last step: nothing needs it
            total.backward()
        gradients = sum(p.grad.nbytes for p in memory.parameters() if p.grad is not None)
    own = sum(p.nbytes for p in memory.parameters())
    return sum(p.nbytes for p in backbone.parameters()), 4 * own, alive.peak - gradients


# ------------------------------------------------------------------ command line
def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    p.add_argument("--ckpt", default="llada-8b", help="only its config is read; the published "
                   "nicknames need no download (default: llada-8b)")
    p.add_argument("--tokens", type=listed(count), default=[512, 1024], help="of a sequence")
    p.add_argument("--K", type=listed(whole(1, 1000)), default=[4], help="unrolled steps")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return p


def table(args: argparse.Namespace) -> None:
    """Print what a training update takes, by length, steps and checkpointing."""
    config, rows = config_of(args.ckpt), []
    require(max(args.tokens) <= config.max_len, f"{max(args.tokens)} tokens are more than the "
            f"model's {config.max_len}")
    print("| tokens | K | checkpointing | backbone | memory and AdamW | activations, peak | "
          "together, GB |\n|---|---|---|---|---|---|---|")
    work = list(product(args.tokens, args.K, (False, True)))
    for tokens, K, checkpointing in progress(work, "sizes", bar=False):
        parts = update_bytes(config, tokens, K, checkpointing)
        rows.append({"tokens": tokens, "K": K, "checkpointing": checkpointing, "bytes": parts})
        print(f"| {tokens} | {K} | {'on' if checkpointing else 'off'} | " + " | ".join(
            f"{x / 1e9:.2f}" for x in (*parts, sum(parts))) + " |", flush=True)
    print(f"\n{args.ckpt}, one sequence, bfloat16; counted on fake tensors, without what a "
          "device's allocator and kernels need for themselves")
    if args.json:
        print(to_json({"ckpt": args.ckpt, "rows": rows}))


@command
def main(argv: list[str] | None = None) -> None:
    """Print the table that the command line asks for."""
    table(parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
