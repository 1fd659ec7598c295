"""Refusals, each in one line that names the value and the way out, before any work begins."""
from __future__ import annotations

import math

from lib.cli import require


def check_config(c) -> None:
    """Refuse sizes and ids of a backbone that cannot be, from fields of the same names."""
    sizes = ("dim", "heads", "kv_heads", "mlp_dim", "vocab", "max_len")
    for name, most in (("layers", 1000), *((name, 2 ** 31 - 1) for name in sizes)):
        n = getattr(c, name)
        require(type(n) is int and 1 <= n <= most,
                f"config: {name} is {n!r}, which is no whole number from 1 to {most}")
    for name in ("mask_id", "eos_id", "pad_id"):
        n = getattr(c, name)
        require(type(n) is int and 0 <= n < c.vocab, f"config: {name} is {n!r}, which is no id of "
                f"the vocabulary of {c.vocab}")
    for name in ("rope_theta", "norm_eps"):
        x = getattr(c, name)
        require(type(x) in (int, float) and 0 < x < math.inf,
                f"config: {name} is {x!r}, which is not a positive number")
    require(c.dim % c.heads == 0 and c.head_dim % 2 == 0, f"config: width {c.dim} does not split "
            f"into {c.heads} heads of even width")
    require(c.heads % c.kv_heads == 0,
            f"config: {c.heads} heads do not share {c.kv_heads} kv heads")
    require(c.mask_id != c.eos_id, f"config: mask_id and eos_id are both {c.mask_id}")


def check_generation(c, prompt, pad_mask, gen_length, block_length, steps, order, orders, threshold,
                     by_probability, cache, refresh, temperature, top_p, top_k, alg_temp,
                     cfg_scale) -> None:
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
    require(gen_length > 0 < block_length and gen_length % block_length == 0,
            f"gen_length {gen_length} is not a multiple of block_length {block_length}")
    blocks = gen_length // block_length
    require(steps > 0 and steps % blocks == 0, f"{steps} steps do not divide into {blocks} blocks "
            f"(gen_length {gen_length} / block_length {block_length})")
    require(prompt.shape[1] + gen_length <= c.max_len, f"a prompt of {prompt.shape[1]} tokens and "
            f"gen_length {gen_length} leave no room in the model's {c.max_len} positions")
    require(cache in (None, "prefix", "dual"), f"unknown cache {cache!r}: prefix or dual")
    require(refresh is None or cache is not None and refresh > 0,
            f"refresh is {refresh}: it needs a cache, and has to be 1 or more")
    require(not (cache and c.shift and refresh != 1 and steps // blocks < 2 <= block_length),
            "with a cache Dream needs 2 steps a block or more: the first commits one position")
    require(order in orders, f"unknown order {order!r}: one of {', '.join(orders)}")
    require(threshold is None or order in by_probability, "a threshold needs an order by "
            f"probability ({' or '.join(by_probability)}), not {order!r}")
    require(threshold is None or alg_temp == 0, "threshold and alg_temp exclude each other")
    require(threshold is None or 0 <= threshold < math.inf,
            f"threshold is {threshold}, and has to be 0 or more")
    for name, x, least in (("temperature", temperature, 1e-6), ("alg_temp", alg_temp, 1e-6),
                           ("cfg_scale", cfg_scale, 0.0)):
        require(x == 0 or least <= x < math.inf,
                f"{name} is {x}, and has to be 0 or from {least} up")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, and has to lie in (0, 1]")
    require(top_k is None or top_k >= 0, f"top_k is {top_k}, and has to be 0 (off) or more")
