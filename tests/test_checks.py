"""Sizes that make no network and settings that cannot be decoded: each refused in one line, before
any work begins."""
from __future__ import annotations

import pytest
import torch
from conftest import ABSENT, assert_refused, checkpoint

from lib.cli import InputError
from model import Config
from sample import generate


# ------------------------------------------------------------------ config.json
@pytest.mark.parametrize("model_type", ["qwen2", "LLaDA-MoE", "", None, 3, ["llada"], ABSENT])
def test_unknown_family(cli_fails, tmp_path, model_type):
    """A config.json of another model says which two families are known."""
    folder = checkpoint(tmp_path / "other", model_type=model_type)
    assert_refused(cli_fails, folder, "config.json", "model_type", "llada", "dream")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"model_type": "llada"', "\xff\xfe",
                                  '{"model_type": "llada"}', "[" * 100_000,
                                  '{"d_model": ' + "1" * 5000 + "}"], ids=lambda t: repr(t[:24]))
def test_config_that_is_not_an_object(cli_fails, ckpt, text):
    """Cut short, no JSON, JSON of another kind, nested without end, no UTF-8, empty: the file is
    named."""
    (ckpt / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(cli_fails, ckpt, str(ckpt / "config.json"))


@pytest.mark.parametrize("key", ["d_model", "n_layers", "n_heads", "max_sequence_length",
                                 "mask_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [ABSENT, None, "64", 64.5, -4, [4], True, {}], ids=repr)
def test_config_with_an_unusable_number(cli_fails, tmp_path, key, value):
    """Every key that has no default, absent or of another kind: the file is named."""
    for further in ({}, {"mlp_hidden_size": None, "n_kv_heads": None}):
        folder = checkpoint(tmp_path / f"broken{len(further)}", **{key: value}, **further)
        assert_refused(cli_fails, folder, str(folder / "config.json"))


@pytest.mark.parametrize("changes, words", [
    (dict(d_model=66), ["66", "4"]), (dict(d_model=60), ["60", "4"]), (dict(n_kv_heads=3), ["3"]),
    (dict(n_heads=0), ["heads"]), (dict(n_kv_heads="x"), ["kv_heads"]),
    (dict(mask_token_id=512), ["mask_id", "512"]), (dict(eos_token_id=-1), ["eos_id", "-1"]),
    (dict(pad_token_id=9999), ["pad_id"]), (dict(pad_token_id="x"), ["pad_id"]),
    (dict(rope_theta=0), ["rope_theta"]), (dict(rope_theta="x"), ["rope_theta"]),
    (dict(rms_norm_eps=float("inf")), ["Infinity"]), (dict(rms_norm_eps=-1e-5), ["norm_eps"]),
    (dict(mlp_hidden_size=None, mlp_ratio=None), []), (dict(mlp_hidden_size=1.5), ["mlp_dim"]),
    (dict(mlp_hidden_size=ABSENT, mlp_ratio=ABSENT), ["mlp_ratio"]),
    (dict(vocab_size=0, embedding_size=0), ["vocab"]),
    (dict(embedding_size=ABSENT, vocab_size=ABSENT), ["vocab_size"]),
    (dict(d_model=2**60), []), (dict(embedding_size=2**62), []), (dict(mlp_hidden_size=2**60), []),
    (dict(block_type="sequential"), ["block_type"]), (dict(alibi=True), ["alibi"]),
    (dict(activation_type="gelu"), ["activation_type"]), (dict(scale_logits=True), ["scale_log"]),
    (dict(include_bias=True), ["include_bias"]), (dict(rope=False), ["rope"])], ids=str)
def test_config_that_makes_no_network(cli_fails, tmp_path, changes, words):
    """Numbers that do not go together, ids outside the vocabulary, sizes that no machine has, and
    settings that this implementation does not compute, are refused rather than ignored."""
    assert_refused(cli_fails, checkpoint(tmp_path / "odd", **changes), *words)


@pytest.mark.parametrize("changes", [dict(hidden_act="gelu"), dict(use_sliding_window=True),
                                     dict(rope_scaling={"factor": 2.0}), dict(rope_theta=ABSENT),
                                     dict(num_attention_heads=None)], ids=str)
def test_dream_config_that_makes_no_network(tmp_path, changes):
    """The same for the other family's keys."""
    folder = checkpoint(tmp_path, "dream", **changes)
    with pytest.raises(InputError, match="config.json"):
        Config.from_json(folder)


# ------------------------------------------------------------------ settings and prompts
BAD_SETTINGS = [
    (dict(gen_length=30, block_length=8), ["30", "8"]), (dict(gen_length=0), ["gen_length"]),
    (dict(gen_length=-8), ["gen_length"]), (dict(block_length=0), ["block_length"]),
    (dict(block_length=-4), ["block_length"]), (dict(steps=0), ["steps"]),
    (dict(gen_length=32, block_length=8, steps=6), ["6", "4"]), (dict(steps=-16), ["steps"]),
    (dict(temperature=-0.5), ["temperature"]),
    (dict(temperature=float("nan")), ["temperature"]), (dict(alg_temp=-1.0), ["alg_temp"]),
    (dict(temperature=float("inf")), ["temperature"]), (dict(temperature=1e308), ["temperature"]),
    (dict(alg_temp=1e308), ["alg_temp"]), (dict(cfg_scale=1e308), ["cfg_scale"]),
    (dict(steps=10 ** 9), ["steps"]), (dict(gen_length=10 ** 9), ["gen_length"]),
    (dict(top_p=0.0), ["top_p"]),
    (dict(top_p=1.5), ["top_p"]), (dict(top_p=float("nan")), ["top_p"]),
    (dict(top_k=-1), ["top_k"]),
    (dict(threshold=0.9, order="entropy"), ["threshold", "entropy"]),
    (dict(threshold=0.9, order="random"), ["threshold", "random"]),
    (dict(threshold=0.9, alg_temp=0.5), ["threshold", "alg_temp"]),
    (dict(threshold=float("nan")), ["threshold"]), (dict(cfg_scale=float("nan")), ["cfg_scale"]),
    (dict(cfg_scale=float("inf")), ["cfg_scale"])]


@pytest.mark.parametrize("options, words", BAD_SETTINGS, ids=str)
def test_settings_that_cannot_be_decoded(backbone, cli_fails, text_ckpt, options, words):
    """Refused before the first forward, in the function and on the command line alike, where no
    value may be mistaken for an absent one."""
    options = dict(gen_length=16, block_length=16, steps=16) | options
    with pytest.raises(InputError) as caught:
        generate(backbone, torch.tensor([[1, 2, 3]]), **options)
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "abc", *argv, "--device", "cpu")
    for word in words:
        assert word in str(caught.value) and word.replace("_", "-") in line.replace("_", "-")


def test_no_room_for_the_answer(backbone):
    """A position beyond the model's length is refused, the last one within it is not."""
    room = backbone.config.max_len - 8
    options = dict(gen_length=8, block_length=8, steps=1, order="random")
    assert generate(backbone, torch.ones(1, room, dtype=torch.long), **options).forwards == 1
    with pytest.raises(InputError, match=f"{room + 1} tokens.*room.*{backbone.config.max_len}"):
        generate(backbone, torch.ones(1, room + 1, dtype=torch.long), **options)


def test_unknown_order(backbone, cli_fails, text_ckpt):
    """The orders that there are are listed."""
    with pytest.raises(InputError, match="low_confidence.*entropy"):
        generate(backbone, torch.tensor([[1]]), order="best")
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "hi", "--order", "best")
    assert "low_confidence" in line and "best" in line


@pytest.mark.parametrize("prompt, pad_mask", [
    (torch.zeros(1, 0, dtype=torch.long), None), (torch.zeros(0, 3, dtype=torch.long), None),
    (torch.tensor([1, 2, 3]), None), (torch.tensor([[1, 512]]), None), (torch.tensor([[-1]]), None),
    (torch.tensor([[1, 2]]), torch.tensor([[True, True]])),
    (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[False, False], [True, True]])),
    (torch.tensor([[1, 2]]), torch.tensor([[False, True]])),
    (torch.tensor([[1, 2, 3]]), torch.tensor([[True, False]]))], ids=repr)
def test_prompts_that_cannot_be_continued(backbone, prompt, pad_mask):
    """Empty, not a batch, ids that are none, all padding, padding on the right, a mask of another
    shape."""
    with pytest.raises(InputError):
        generate(backbone, prompt, pad_mask=pad_mask, gen_length=8, block_length=8, steps=8)
