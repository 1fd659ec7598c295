"""How the two families' files call things, and what they leave unsaid."""
from __future__ import annotations

from pathlib import Path
from typing import Callable

from lib.cli import InputError, require
from lib.files import read_json

FIXED = {  # what every published config says; another value would change the network
    "llada": {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms",
              "rope": True, "alibi": False, "include_bias": False, "bias_for_layer_norm": False,
              "scale_logits": False, "input_emb_norm": False, "attention_layer_norm": False},
    "dream": {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False,
              "use_mrope": False}}
TIED = {  # head -> embedding: a tied checkpoint may store both
    "model.transformer.ff_out.weight": "model.transformer.wte.weight",
    "lm_head.weight": "model.embed_tokens.weight"}


def computed(name: str) -> bool:
    """True for a stored tensor that follows from config.json and is computed anew."""
    return name.endswith("rotary_emb.inv_freq")


def read_config(path: str | Path, make: Callable):
    """make(**fields) of a published config.json (the file, or its folder). Raises `InputError` for
    a file that is missing or broken, and names it in what `make` refuses."""
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    raw = read_json(path)
    try:
        return make(**config_fields(raw))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def config_fields(raw: dict) -> dict:
    """The fields of `model.Config` from the object in a published config.json. Raises `InputError`
    for a family that is not known or a setting that no published checkpoint uses. null is as if
    the key were absent."""
    raw = {key: value for key, value in raw.items() if value is not None}
    said, kind = raw.get("model_type"), str(raw.get("model_type")).lower()
    mixture = "moe" in f"{kind} {raw.get('architectures')}".lower() \
        or any("expert" in key for key in raw)
    require(kind in FIXED and not mixture, f"model_type is {said!r}"
            + ", a mixture of experts as LLaDA-MoE, which is not supported" * mixture
            + "; the families known here are llada and dream, both dense")
    for key, value in FIXED[kind].items():
        found = raw.get(key, value)
        require(type(found) is type(value) and found == value,
                f"{key} = {found!r} is not supported (only {value!r})")
    try:
        fields = (_llada if kind == "llada" else _dream)(raw)
        eos, dtype = raw["eos_token_id"], raw.get("torch_dtype", raw.get("dtype", "bfloat16"))
        require(dtype in ("bfloat16", "float16", "float32"),
                f"torch_dtype is {dtype!r}, not bfloat16, float16 or float32")
        return dict(family=kind, **fields, mask_id=raw["mask_token_id"], eos_id=eos,
                    pad_id=raw.get("pad_token_id", eos), dtype=dtype)
    except KeyError as error:
        raise InputError(f"{error.args[0]} is missing") from error


def _flag(raw: dict, key: str, default: bool) -> bool:
    value = raw.get(key, default)
    require(type(value) is bool, f"{key} is {value!r}, and has to be true or false")
    return value


def _llada(raw: dict) -> dict:
    heads = raw["n_heads"]
    kv_heads = raw.get("n_kv_heads", 1 if _flag(raw, "multi_query_attention", False) else heads)
    require(kv_heads == 1 or not _flag(raw, "multi_query_attention", False),
            f"multi_query_attention has 1 kv head, and n_kv_heads is {kv_heads!r}")
    # mlp_ratio counts only where mlp_hidden_size is absent; 8B has both, and they disagree
    width, ratio = raw["d_model"], raw.get("mlp_ratio")
    if "mlp_hidden_size" not in raw:
        require(type(width) is type(raw["mlp_ratio"]) is int,
                f"mlp_ratio = {ratio!r} or d_model = {width!r} is no whole number")
    return dict(
        dim=width, layers=raw["n_layers"], heads=heads, kv_heads=kv_heads,
        mlp_dim=raw["mlp_hidden_size"] if "mlp_hidden_size" in raw else ratio * width,
        vocab=raw["embedding_size"] if "embedding_size" in raw else raw["vocab_size"],
        max_len=raw["max_sequence_length"], rope_theta=raw.get("rope_theta", 10000.0),
        norm_eps=raw.get("rms_norm_eps", 1e-5), qkv_bias=_flag(raw, "include_qkv_bias", False),
        rope_float32=_flag(raw, "rope_full_precision", True),
        tied=_flag(raw, "weight_tying", False))


def _dream(raw: dict) -> dict:
    heads = raw["num_attention_heads"]
    return dict(
        dim=raw["hidden_size"], layers=raw["num_hidden_layers"], heads=heads,
        kv_heads=raw.get("num_key_value_heads", heads), mlp_dim=raw["intermediate_size"],
        vocab=raw["vocab_size"], max_len=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"], norm_eps=raw["rms_norm_eps"], qkv_bias=True,
        rope_float32=False, tied=_flag(raw, "tie_word_embeddings", False))
