"""Refusals, each in one line that names the value and the way out, before any work begins; and of
numbers that are none."""
from __future__ import annotations

import math
import os

import torch

from lib.cli import require


# ------------------------------------------------------------------ numbers and room
def is_finite(x: torch.Tensor) -> bool:
    """True when a tensor holds neither NaN nor infinity. Its extremes say so, at the speed at which
    memory is read and without a mask as large as the tensor. Of dtypes that nothing here computes
    in nothing is known."""
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if x.dtype not in known or x.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


def finite(what: str, x: torch.Tensor) -> torch.Tensor:
    """The tensor, or an `InputError` that says what holds NaN or infinity."""
    require(is_finite(x), f"{what} hold NaN or infinity: there is no result")
    return x


def check_room(needed: int, device: torch.device) -> None:
    """Refuse so many bytes on a device that has less, as far as it can be asked."""
    room = math.inf
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf"):  # Windows has none
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(needed <= room, f"{needed / 1e9:.4g} GB of weights are more than the {room / 1e9:.4g} "
            f"GB that {device} has")


# ------------------------------------------------------------------ sizes
MOST = {"layers": 1000, "dim": 2 ** 16, "heads": 2 ** 12, "kv_heads": 2 ** 12, "mlp_dim": 2 ** 20,
        "vocab": 2 ** 22, "max_len": 2 ** 31 - 1}  # no model is larger, and all products fit


def check_config(c) -> None:
    """Refuse sizes and ids of a backbone that cannot be, from fields of the same names."""
    for name, most in MOST.items():
        n = getattr(c, name)
        require(type(n) is int and 1 <= n <= most,
                f"config: {name} is {n!r}, which is no whole number from 1 to {most}")
    for name in ("mask_id", "eos_id", "pad_id"):
        n = getattr(c, name)
        require(type(n) is int and 0 <= n < c.vocab, f"config: {name} is {n!r}, which is no id of "
                f"the vocabulary of {c.vocab}")
    for name, least, most in (("rope_theta", 1, 1e12), ("norm_eps", 1e-12, 1)):
        x = getattr(c, name)
        require(type(x) in (int, float) and least <= x <= most,
                f"config: {name} is {x!r}, which is no number from {least:g} to {most:g}")
    require(c.dim % c.heads == 0 and c.head_dim % 2 == 0, f"config: width {c.dim} does not split "
            f"into {c.heads} heads of even width")
    require(c.heads % c.kv_heads == 0,
            f"config: {c.heads} heads do not share {c.kv_heads} kv heads")
    require(c.mask_id != c.eos_id, f"config: mask_id and eos_id are both {c.mask_id}")


def check_memory(sizes, numbers: int) -> None:
    """Refuse sizes of a memory, as its file states them, that cannot be, or that need not come from
    a file of so many numbers: any two of its widths have a matrix between them, and those of the
    Updater and the conditioner are square."""
    require(isinstance(sizes, dict), f"sizes are {sizes!r}")
    for name, n in sizes.items():
        switch = name in ("time", "local")
        require(type(n) is (bool if switch else int) and (switch or 0 < n <= 2 ** 16),
                f"{name} is {n!r}")
    get = sizes.get
    dim, width, cond = get("dim", 1), get("width", 1), get("cond", 1)
    most = max(dim * width, 3 * width * width, cond * max(cond, 2 * dim, 2 * width),
               get("slots", 1) * width)
    require(most <= numbers, f"sizes of {sizes} do not come to {numbers} numbers")
    require(get("width", 0) % get("heads", 8) == 0,
            f"{get('heads')} heads do not divide its width of {get('width')}")


# ------------------------------------------------------------------ settings
def check_blocks(gen_length: int, block_length: int, steps: int) -> int:
    """The number of blocks of an answer, 0 without one; refuses what does not divide."""
    require(gen_length >= 0 < block_length and gen_length % block_length == 0,
            f"gen_length {gen_length} is not a multiple of block_length {block_length}")
    blocks = gen_length // block_length
    require(0 < steps <= 2 ** 16, f"{steps} steps: from 1 to {2 ** 16} can be taken")
    require(blocks == 0 or steps % blocks == 0, f"{steps} steps do not divide into {blocks} blocks "
            f"(gen_length {gen_length} / block_length {block_length})")
    return blocks


def block_of(length: int) -> int:
    """Where nothing else is said, an answer's blocks are of 32, or one where 32 divides not."""
    return length if length % 32 else 32


def check_budgets(length: int, budgets: list[int]) -> None:
    """Refuse numbers of steps that an answer's usual blocks cannot share."""
    for steps in budgets:
        check_blocks(length, block_of(length), steps)


def check_generation(c, prompt, pad_mask, gen_length, block_length, steps, order, orders, threshold,
                     by_probability, cache, refresh, temperature, top_p, top_k, alg_temp,
                     cfg_scale, generator=None, memory=None) -> None:
    """Refuse what `generate` cannot do with a backbone of config c; the names are its own.
    orders: those there are; by_probability: those a threshold makes sense for."""
    require(prompt.dim() == 2 and 0 not in prompt.shape,
            "the prompt is empty: it needs at least one token")
    require(0 <= int(prompt.min()) and int(prompt.max()) < c.vocab,
            f"the prompt has ids outside the vocabulary of {c.vocab}")
    if pad_mask is not None:
        require(pad_mask.shape == prompt.shape,
                f"pad_mask is {tuple(pad_mask.shape)}, the prompt {tuple(prompt.shape)}")
        require(not pad_mask.all(1).any(), "a prompt is empty: it is all padding")
        require(not (pad_mask[:, 1:] & ~pad_mask[:, :-1]).any(),
                "prompts are padded on the left only")
    blocks = check_blocks(gen_length, block_length, steps)
    require(blocks > 0 or bool((prompt == c.mask_id).any()),
            "gen_length is 0, and the prompt holds no mask: there is nothing to write")
    require(not isinstance(generator, list) or len(generator) == len(prompt), f"{len(prompt)} "
            "prompts need as many generators in the list")
    require(prompt.shape[1] + gen_length <= c.max_len, f"a prompt of {prompt.shape[1]} tokens and "
            f"gen_length {gen_length} leave no room in the model's {c.max_len} positions")
    require(cache in (None, "prefix", "dual"), f"unknown cache {cache!r}: prefix or dual")
    inner = getattr(memory, "memory", memory)  # of a control, or one that is watched
    require(cache is None or getattr(inner, "caches", True), f"with a cache {type(inner).__name__} "
            "would not see the sequence that it needs as a whole")
    require(refresh is None or cache is not None and refresh > 0,
            f"refresh is {refresh}: it needs a cache, and has to be 1 or more")
    a_block = steps // max(blocks, 1)
    require(not (cache and c.shift and refresh != 1 and a_block < 2 <= block_length),
            "with a cache Dream needs 2 steps a block or more: the first commits one position")
    require(order in orders, f"unknown order {order!r}: one of {', '.join(orders)}")
    require(threshold is None or order in by_probability, "a threshold needs an order by "
            f"probability ({' or '.join(by_probability)}), not {order!r}")
    require(threshold is None or alg_temp == 0, "threshold and alg_temp exclude each other")
    require(threshold is None or 0 <= threshold < math.inf,
            f"threshold is {threshold}, and has to be 0 or more")
    for name, x, least in (("temperature", temperature, 1e-6), ("alg_temp", alg_temp, 1e-6),
                           ("cfg_scale", cfg_scale, 0.0)):
        require(x == 0 or least <= x <= 1e3, f"{name} is {x}, and has to be 0 or from {least:g} to "
                "1000")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, and has to lie in (0, 1]")
    require(top_k is None or top_k >= 0, f"top_k is {top_k}, and has to be 0 (off) or more")
