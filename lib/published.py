"""How the two families' config.json files call things, and what they leave unsaid."""
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
    for a family that is not known or a setting that no published checkpoint uses."""
    family = str(raw.get("model_type")).lower()
    require(family in FIXED, f"model_type is {raw.get('model_type')!r}; the families known here "
            "are llada and dream")
    for key, value in FIXED[family].items():
        require(raw.get(key, value) == value,
                f"{key} = {raw.get(key)!r} is not supported (only {value!r})")
    try:
        fields = (_llada if family == "llada" else _dream)(raw)
        return dict(family=family, **fields, mask_id=raw["mask_token_id"],
                    eos_id=raw["eos_token_id"],
                    pad_id=raw.get("pad_token_id", raw["eos_token_id"]),
                    dtype=raw.get("torch_dtype") or "bfloat16")
    except KeyError as error:
        raise InputError(f"{error.args[0]} is missing") from error
    except TypeError as error:  # null or text where a number is due
        raise InputError(f"a size has the wrong type ({error})") from error


def _llada(raw: dict) -> dict:
    heads = raw["n_heads"]
    return dict(
        dim=raw["d_model"], layers=raw["n_layers"], heads=heads,
        kv_heads=1 if raw.get("multi_query_attention") else raw.get("n_kv_heads") or heads,
        # mlp_ratio counts only where mlp_hidden_size is absent; 8B has both, and they disagree
        mlp_dim=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        vocab=raw.get("embedding_size") or raw["vocab_size"], max_len=raw["max_sequence_length"],
        rope_theta=raw.get("rope_theta", 10000.0), norm_eps=raw.get("rms_norm_eps", 1e-5),
        qkv_bias=bool(raw.get("include_qkv_bias")),
        rope_float32=bool(raw.get("rope_full_precision", True)), tied=bool(raw.get("weight_tying")))


def _dream(raw: dict) -> dict:
    heads = raw["num_attention_heads"]
    return dict(
        dim=raw["hidden_size"], layers=raw["num_hidden_layers"], heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads, mlp_dim=raw["intermediate_size"],
        vocab=raw["vocab_size"], max_len=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"], norm_eps=raw["rms_norm_eps"], qkv_bias=True,
        rope_float32=False, tied=bool(raw.get("tie_word_embeddings")))
