"""Bad input: every error is one line that names the thing and the way out, exit code 2, and no
traceback; the hub is asked for no more than it has to be; a full disk leaves the last file."""
from __future__ import annotations

import errno
import fnmatch
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Callable

import huggingface_hub
import pytest
import tokenizers
import torch
from conftest import ABSENT, DATA, ROOT, byte_tokenizer, checkpoint, shard
from safetensors.torch import load_file, save_file

import sample
from model import (CHECKPOINTS, Config, InputError, Tokenizer, command, find, load, save,
                   write_atomic)
from sample import generate

CPU = ["--device", "cpu"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def cli_fails(capsys) -> Callable[..., str]:
    """cli_fails(*argv) -> the one line that sample.py prints on stderr before it exits with 2."""
    def run(*argv) -> str:
        assert sample.main([str(a) for a in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1
        assert err.startswith("error: ") and "Traceback" not in err
        return err
    return run


@pytest.fixture
def ckpt(text_ckpt, tmp_path) -> Path:
    """A checkpoint with a tokenizer, to be broken."""
    return shutil.copytree(text_ckpt, tmp_path / "ckpt")


def assert_refused(cli_fails, folder, *words: str) -> None:
    """Loading fails with an `InputError`, and the command line with its one line; both say
    `words`."""
    with pytest.raises(InputError) as caught:
        load(folder, "cpu")
    line = cli_fails("--ckpt", folder, "--prompt", "hi", "--gen-length", "8", *CPU)
    for word in words:
        assert word in str(caught.value) and word in line


# ------------------------------------------------------------------ which checkpoint
@pytest.mark.parametrize("name", ["llada-9b", "", "not a/hub id", "a/b/c", ".hidden/x", "x" * 300,
                                  "~nobody_of_this_name/x", "nul\0byte", "/no/such/folder"],
                         ids=lambda name: repr(name[:24]))
def test_unknown_checkpoint(cli_fails, name, monkeypatch, tmp_path):
    """A name that is no nickname, folder or hub id: the known ones are listed, and how to pass a
    folder."""
    monkeypatch.chdir(tmp_path)
    words = ["config.json"] if name == "" else ["llada-8b", "dream-7b", "tiny", "config.json"]
    assert_refused(cli_fails, name, *words)


def test_folder_without_config(cli_fails, ckpt):
    """The folder is named, and what it would have to hold."""
    (ckpt / "config.json").unlink()
    assert_refused(cli_fails, ckpt, str(ckpt), "no config.json", "*.safetensors")


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
    (dict(pad_token_id=9999), ["pad_id"]), (dict(pad_token_id=None), ["pad_id"]),
    (dict(rope_theta=0), ["rope_theta"]), (dict(rope_theta="x"), ["rope_theta"]),
    (dict(rms_norm_eps=float("inf")), ["norm_eps"]), (dict(rms_norm_eps=-1e-5), ["norm_eps"]),
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


# ------------------------------------------------------------------ weights
LN_F, HEAD = "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"
V_PROJ = "model.transformer.blocks.1.v_proj.weight"


def truncated(path: Path, keep: float) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop(HEAD), ["lacks", HEAD]),
    (lambda t: t.pop(V_PROJ), ["lacks", V_PROJ]),
    (lambda t: t.clear(), ["lacks"]),
    (lambda t: t.update({"model.transformer.extra": torch.zeros(2)}), ["unexpected", ".extra"]),
    (lambda t: t.update({V_PROJ.replace(".1.", ".3."): torch.ones(64, 64)}), ["unexpected", ".3."]),
    (lambda t: t.update({V_PROJ.replace("weight", "bias"): torch.zeros(64)}), ["unexpected"]),
    (lambda t: t.update({LN_F: torch.ones(65)}), [LN_F, "(65,)", "(64,)"]),
    (lambda t: t.update({LN_F: torch.ones(())}), [LN_F, "()", "(64,)"]),
    (lambda t: t.update({V_PROJ: torch.ones(32, 64)}), [V_PROJ, "(32, 64)", "(64, 64)"]),
    (lambda t: t.update({V_PROJ: torch.ones(64 * 64)}), [V_PROJ, "(4096,)", "(64, 64)"]),
    (lambda t: t.update({HEAD: t[HEAD].T.contiguous()}), [HEAD, "(64, 512)", "(512, 64)"]),
    (lambda t: t.update({LN_F: torch.ones(64, dtype=torch.int64)}), [LN_F, "I64"]),
    (lambda t: t.update({V_PROJ: t[V_PROJ].to(torch.float8_e4m3fn)}), [V_PROJ, "F8_E4M3"]),
], ids=["no head", "no v_proj", "nothing", "extra", "extra layer", "extra bias", "long", "scalar",
        "short v", "flat v", "transposed", "integers", "float8"])
def test_tensors_that_do_not_fit(cli_fails, ckpt, edit, words):
    """A missing, unexpected, misshapen or unreadable tensor is named, with its shape and the shape
    that config.json asks for."""
    tensors = load_file(ckpt / WEIGHTS)
    edit(tensors)
    save_file(tensors, ckpt / WEIGHTS)
    assert_refused(cli_fails, ckpt, str(ckpt), *words)


def test_a_checkpoint_of_the_other_family(cli_fails, tmp_path):
    """Dream's tensors under LLaDA's config: a few names are enough, not all of them."""
    checkpoint(tmp_path / "mixed", "llada")
    shutil.copy(DATA / "dream" / WEIGHTS, tmp_path / "mixed")
    line = cli_fails("--ckpt", tmp_path / "mixed", "--prompt", "hi", *CPU)
    assert "lacks" in line and "more" in line and len(line) < 500


@pytest.mark.parametrize("keep", [0, 1e-5, 0.001, 0.5, 0.999])
def test_truncated_weights(cli_fails, ckpt, keep):
    """A download that broke off, in the header or in the data."""
    truncated(ckpt / WEIGHTS, keep)
    assert_refused(cli_fails, ckpt, str(ckpt / WEIGHTS), "download it again")


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"x": {"dtype": "F32"}}', b"\x80\x04pickle",
                                    b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'])
def test_weights_with_a_broken_header(cli_fails, ckpt, header):
    """Whatever else lies in a file of that name: it is never unpickled, and never a traceback."""
    (ckpt / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_refused(cli_fails, ckpt, str(ckpt / WEIGHTS))


def test_no_weights_at_all(cli_fails, ckpt):
    """Only safetensors count: a pickle beside config.json is not read."""
    (ckpt / WEIGHTS).rename(ckpt / "pytorch_model.bin")
    assert_refused(cli_fails, ckpt, str(ckpt), WEIGHTS, INDEX)


def test_missing_shard(cli_fails, ckpt):
    """A shard that the index names and the folder lacks."""
    index = shard(ckpt)
    gone = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    (ckpt / gone).unlink()
    assert_refused(cli_fails, ckpt, str(ckpt / gone), "missing")


def test_truncated_shard(cli_fails, ckpt):
    """The shard that is cut short is the one that is named."""
    shard(ckpt)
    path = sorted(ckpt.glob("*-of-*"))[-1]
    truncated(path, 0.9)
    assert_refused(cli_fails, ckpt, str(path), "download it again")


@pytest.mark.parametrize("target", ["../stolen.safetensors", "/etc/passwd", "sub/x.safetensors",
                                    "..", ".", "", "model.bin", 3, None, ["a.safetensors"],
                                    "a\0.safetensors"], ids=repr)
def test_index_that_points_outside_its_folder(cli_fails, ckpt, target):
    """Only safetensors files of the index's own folder are opened, even where another exists."""
    index = shard(ckpt)
    shutil.copy(DATA / "llada" / WEIGHTS, ckpt.parent / "stolen.safetensors")
    (ckpt / "sub").mkdir()
    shutil.copy(DATA / "llada" / WEIGHTS, ckpt / "sub" / "x.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"][LN_F] = target
    index.write_text(json.dumps(content))
    assert_refused(cli_fails, ckpt, str(ckpt))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}',
                                     '{"weight_map": "x"}', '{"weight_map": null}'])
def test_index_without_a_weight_map(cli_fails, ckpt, content):
    """A broken index is named."""
    shard(ckpt).write_text(content)
    assert_refused(cli_fails, ckpt, str(ckpt / INDEX))


def test_index_that_disagrees_with_its_shards(cli_fails, ckpt):
    """A tensor promised in a shard that lacks it, and one that a shard holds unlisted."""
    index = shard(ckpt)
    content = json.loads(index.read_text())
    right = content["weight_map"][LN_F]
    wrong = next(s for s in content["weight_map"].values() if s != right)
    content["weight_map"][LN_F] = wrong
    index.write_text(json.dumps(content))
    assert_refused(cli_fails, ckpt, str(ckpt), LN_F)
    del content["weight_map"][LN_F]
    index.write_text(json.dumps(content))
    assert_refused(cli_fails, ckpt, str(ckpt / right), LN_F)


@pytest.mark.parametrize("options", [dict(dtype="float64"), dict(dtype="bf16"), dict(device="gpu"),
                                     dict(dtype=torch.int64), dict(device="cuda:99")], ids=str)
def test_unknown_device_or_dtype(options):
    """A device that torch does not know or this machine does not have, a dtype that no network runs
    in."""
    with pytest.raises(InputError):
        load(DATA / "llada", **{"device": "cpu"} | options)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_unknown_device_on_the_command_line(cli_fails, text_ckpt, device):
    """--device with a typing error, or with a GPU that is not there."""
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "hi", "--gen-length", "8", "--device", device)
    assert "device" in line


# ------------------------------------------------------------------ tokenizer
def test_absent_tokenizer(cli_fails):
    """Weights alone can be loaded, but no text can be read or written."""
    assert load(DATA / "llada", "cpu")[1] is None
    assert "no tokenizer" in cli_fails("--ckpt", DATA / "llada", "--prompt", "hi", *CPU)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer(cli_fails, ckpt, content):
    """A tokenizer.json that the library cannot read: the folder is named."""
    (ckpt / "tokenizer.json").write_text(content)
    assert_refused(cli_fails, ckpt, str(ckpt))


def test_tokenizer_of_another_model(cli_fails, ckpt):
    """Ids beyond the embedding's rows would fail much later, inside the first forward."""
    byte_tokenizer({"<|x|>": 600}, size=600).save(str(ckpt / "tokenizer.json"))
    assert_refused(cli_fails, ckpt, str(ckpt), "600", "512")


def test_tokenizer_without_tokens(cli_fails, ckpt):
    """An empty vocabulary is a broken tokenizer too."""
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(ckpt / "tokenizer.json"))
    line = cli_fails("--ckpt", ckpt, "--prompt", "hi", "--gen-length", "8", *CPU)
    assert str(ckpt) in line or "prompt is empty" in line


# ------------------------------------------------------------------ prompts and settings
BAD_SETTINGS = [
    (dict(gen_length=30, block_length=8), ["30", "8"]), (dict(gen_length=0), ["gen_length"]),
    (dict(gen_length=-8), ["gen_length"]), (dict(block_length=0), ["block_length"]),
    (dict(block_length=-4), ["block_length"]), (dict(steps=0), ["steps"]),
    (dict(gen_length=32, block_length=8, steps=6), ["6", "4"]), (dict(steps=-16), ["steps"]),
    (dict(temperature=-0.5), ["temperature"]),
    (dict(temperature=float("nan")), ["temperature"]), (dict(alg_temp=-1.0), ["alg_temp"]),
    (dict(temperature=float("inf")), ["temperature"]), (dict(top_p=0.0), ["top_p"]),
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
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "abc", *argv, *CPU)
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


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_empty_prompt(cli_fails, text_ckpt, prompt):
    """Nothing to answer."""
    assert "prompt is empty" in cli_fails("--ckpt", text_ckpt, "--prompt", prompt, *CPU)


def test_prompt_without_room(cli_fails, text_ckpt):
    """Prompt and answer together exceed the model's length: both numbers are named, and one token
    less would do."""
    argv = ["--ckpt", text_ckpt, "--gen-length", "8", "--quiet", *CPU]
    line = cli_fails(*argv, "--prompt", "x" * 249)
    assert all(word in line for word in ("249", "8", "256"))
    assert sample.main([str(a) for a in [*argv, "--prompt", "x" * 248]]) == 0


def test_prompt_that_is_no_text(cli_fails, text_ckpt):
    """Bytes on the command line that are not UTF-8 arrive as lone surrogates."""
    assert "Unicode" in cli_fails("--ckpt", text_ckpt, "--prompt", "a\udcffb", *CPU)


BAD_LINES = ["{", '{"prompt": "a"', '{"prompt": "a"} b', "{}", '{"text": "a"}', '{"prompt": 3}',
             '{"prompt": ""}', '{"prompt": "  "}', '{"prompt": null}', '{"prompt": ["a"]}',
             '{"prompt": {"a": 1}}', '{"messages": []}', '{"messages": [{"role": "user"}]}',
             '{"messages": [{"role": "user", "content": 3}]}', '{"messages": {"role": "user"}}',
             '{"prompt": "\\ud800"}', '{"prompt": ' + "[" * 100_000,
             '{"prompt": ' + "1" * 5000 + "}"]


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda t: t[:40])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_lines_of_a_prompts_file(cli_fails, text_ckpt, tmp_path, bad, batch_size):
    """The file and the number of the line are named, blank lines counted, and nothing is generated
    before the whole file is known to be good."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{bad}\nfine\n')
    line = cli_fails("--ckpt", text_ckpt, "--prompts", file, "--gen-length", 8, "--batch-size",
                     batch_size, *CPU)
    assert f"{file}:3:" in line


def test_a_line_ends_at_a_newline_only(text_ckpt, tmp_path, capsys):
    """JSON may hold U+2028, U+0085 or a form feed as they are; they neither cut a line in two nor
    shift the numbers of later ones."""
    prompt = "a\u2028b\u0085c\u2029d"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(text_ckpt)
    found = sample.read_prompts(str(file), tokenizer, True, 100)
    assert found == [(prompt, tokenizer.encode(prompt))]
    file.write_text("one\u2028line\x0cof text\r\n{", encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts\.jsonl:2:"):
        sample.read_prompts(str(file), tokenizer, True, 100)


def test_prompts_without_room_name_their_line(cli_fails, text_ckpt, tmp_path):
    """A prompt that leaves no room is found in its file."""
    file = tmp_path / "prompts.txt"
    file.write_text("fine\n" + "x" * 250 + "\n")
    line = cli_fails("--ckpt", text_ckpt, "--prompts", file, "--gen-length", 8, *CPU)
    assert f"{file}:2:" in line and "248" in line


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"caf\xe9\n"])
def test_prompts_files_that_cannot_be_used(cli_fails, text_ckpt, tmp_path, content):
    """Absent, empty, blank, not UTF-8: the file is named."""
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in cli_fails("--ckpt", text_ckpt, "--prompts", file, *CPU)


@pytest.mark.parametrize("argv, words", [
    (["--nosuch"], ["--nosuch"]), (["--steps", "many"], ["--steps", "many"]),
    (["--steps"], ["--steps"]), (["surplus"], ["surplus"]),
    (["--dtype", "float64"], ["--dtype", "bfloat16"]),
    (["--prompt", "a", "--task", "sums"], ["--prompt", "--task"]),
    (["--prompt", "a", "--prompts", "b"], ["--prompt", "--prompts"]),
    (["--prompt", "a", "--batch-size", "0"], ["--batch-size"]), (["--steps", "8"], ["--prompt"]),
    (["--task", "chess"], ["chess", "sudoku"]), (["--prompts", ""], []),
    (["--prompt", "a", "--seed", str(2**70)], ["seed"]),
    (["--prompt", "a", "--steps", "0"], ["steps"]), (["--prompt", "a", "--ckpt", ""], ["config"]),
    (["--prompt", "a", "--block-length", "0"], ["block"]),
    (["--prompt", "a", "--ckpt", "random:dream-7b"], ["tokenizer"])], ids=str)
def test_arguments_that_make_no_sense(cli_fails, text_ckpt, argv, words, monkeypatch, tmp_path):
    """argparse's own complaints are one line like all others, and 0 or an empty name is not taken
    for an option left out."""
    monkeypatch.chdir(tmp_path)
    line = cli_fails("--ckpt", text_ckpt, *CPU, *argv)
    assert all(word in line for word in words)


def test_a_broken_generation_config(cli_fails, ckpt):
    """The file that states the default length is named when it cannot be read."""
    (ckpt / "generation_config.json").write_text("{")
    assert "generation_config.json" in cli_fails("--ckpt", ckpt, "--prompt", "hi", *CPU)


def process(*argv, **options) -> subprocess.CompletedProcess:
    """sample.py as a script of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, argv)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


def test_the_script_exits_with_2_and_one_line():
    """What `main` returns is the exit code of the process."""
    done = process("--ckpt", "nosuch", "--prompt", "hi", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "nosuch" in done.stderr


def test_a_reader_that_went_away(text_ckpt):
    """`sample.py | head -n 1` ends in silence, as other programs do."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process("--ckpt", text_ckpt, "--prompt", "hi", "--gen-length", 8, *CPU, stdout=writer)
    os.close(writer)
    assert done.stderr == ""


def test_results_that_a_full_disk_does_not_take(cli_fails, text_ckpt, monkeypatch):
    """`sample.py > answers.txt` on a full disk."""
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", FullDisk())
    line = cli_fails("--ckpt", text_ckpt, "--prompt", "hi", "--gen-length", 8, *CPU)
    assert "disk is full" in line


# ------------------------------------------------------------------ full disks and kills
@pytest.fixture
def saved(backbones, tmp_path) -> Path:
    """A saved file that has to survive."""
    save(backbones["llada"], tmp_path / WEIGHTS)
    return tmp_path / WEIGHTS


def assert_untouched(path: Path) -> None:
    """The previous file is whole, and no temporary one is left to fill the disk further."""
    assert load_file(path).keys() == load_file(DATA / "llada" / WEIGHTS).keys()
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file(backbones, saved, monkeypatch, where, code):
    """Flushing or renaming fails: one line, and the last good checkpoint stays."""
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(InputError, match="cannot write.*" + os.strerror(code)):
        save(backbones["dream"], saved)
    monkeypatch.undo()
    assert_untouched(saved)


def test_a_disk_that_fills_while_writing(backbones, saved):
    """The library's own error, provoked by a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write"):
            save(backbones["dream"], saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(saved)


def test_a_kill_while_writing_leaves_the_previous_file(saved):
    """Until the new file is complete and flushed it has another name."""
    class Killed(BaseException):
        pass

    def write(path):
        Path(path).write_bytes(b"half")
        assert Path(path) != saved and Path(path).parent == saved.parent
        raise Killed

    with pytest.raises(Killed):
        write_atomic(saved, write)
    assert load_file(saved).keys() == load_file(DATA / "llada" / WEIGHTS).keys()


def test_the_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """The other order can leave an empty file after a power cut."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: calls.append("replace") or replace(*a))
    write_atomic(tmp_path / "new" / "file", lambda p: p.write_text("x"))
    assert calls[:2] == ["fsync", "replace"] and (tmp_path / "new" / "file").read_text() == "x"


def test_a_path_that_cannot_be_a_file(backbones, saved):
    """A folder where the file should be, a file where its folder should be."""
    for path in (saved.parent, saved / "below"):
        with pytest.raises(InputError, match="cannot write"):
            save(backbones["llada"], path)
    assert_untouched(saved)


@pytest.mark.parametrize("error, code, line", [
    (InputError("two\nlines"), 2, "error: two lines\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "/data/x"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "full"), (KeyboardInterrupt(), 130, "\n")],
    ids=repr)
def test_how_a_command_ends(capsys, error, code, line):
    """What `command` turns into an exit code and one line, whatever lines the message had."""
    @command
    def main(argv=None):
        raise error

    assert main([]) == code
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_errors_of_ours_keep_their_traceback():
    """A programming error is not dressed up as bad input."""
    @command
    def main(argv=None):
        raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"):
        main([])


# ------------------------------------------------------------------ the hub
class FakeHub:
    """Stands in for huggingface_hub.snapshot_download: knows what the cache holds and what the
    network would give, and notes every call."""

    def __init__(self, cached: Path | None, remote: Path | Exception):
        self.cached, self.remote = cached, remote
        self.calls: list[dict] = []

    def __call__(self, repo_id: str, **options) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        found = self.cached if options.get("local_files_only") else self.remote
        if found is None:
            raise FileNotFoundError("not in the cache")
        if isinstance(found, Exception):
            raise found
        return str(found)

    @property
    def downloads(self) -> list[dict]:
        return [call for call in self.calls if not call.get("local_files_only")]


@pytest.fixture
def hub(monkeypatch):
    """hub(cached, remote) -> the fake that `find` will ask."""
    def install(cached: Path | None, remote: Path | Exception) -> FakeHub:
        fake = FakeHub(cached, remote)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake
    return install


def test_a_cached_checkpoint_needs_no_network(hub, ckpt):
    """Whole in the cache, sharded or not: nothing is asked of the hub."""
    for _ in range(2):
        fake = hub(ckpt, AssertionError("asked the network"))
        assert find("owner/name") == ckpt and fake.downloads == []
        assert load("owner/name", "cpu")[1] is not None
        shard(ckpt) if (ckpt / WEIGHTS).exists() else None


def damage_config(folder: Path) -> None:
    """No config.json."""
    (folder / "config.json").unlink()


def damage_weights(folder: Path) -> None:
    """No weights."""
    (folder / WEIGHTS).unlink()


def damage_shard(folder: Path) -> None:
    """All shards but one."""
    shard(folder)
    sorted(folder.glob("*-of-*"))[0].unlink()


def damage_data(folder: Path) -> None:
    """A file that is cut short."""
    truncated(folder / WEIGHTS, 0.5)


@pytest.mark.parametrize("damage", [None, damage_config, damage_weights, damage_shard, damage_data])
def test_what_the_cache_lacks_is_downloaded(hub, ckpt, text_ckpt, damage):
    """Not there, or a download that broke off: the hub is asked once more, for files that can be
    read without running code."""
    if damage:
        damage(ckpt)
    fake = hub(ckpt if damage else None, text_ckpt)
    assert find("owner/name") == text_ckpt
    assert [call["repo_id"] for call in fake.downloads] == ["owner/name"]


NEEDED = ["config.json", "generation_config.json", "model.safetensors", INDEX, "tokenizer.json",
          "model-00001-of-00006.safetensors", "tokenizer_config.json", "vocab.json", "merges.txt"]
UNWANTED = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "modeling_llada.py", "x.pt",
            "configuration_dream.py", "weights.pth", "training_args.bin", "state.pkl", "a.ckpt",
            "README.md", ".gitattributes", "tf_model.h5", "model.gguf", "onnx/model.onnx",
            "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("cached", [False, True])
def test_only_weights_config_and_tokenizer_are_asked_for(hub, ckpt, text_ckpt, cached):
    """No pickle, no remote code, nothing else: the patterns match what is needed and no more, also
    when only the cache is looked at."""
    fake = hub(ckpt if cached else None, text_ckpt)
    find("owner/name")
    assert fake.calls and bool(fake.downloads) is not cached
    for call in fake.calls:
        def asked(name):
            return any(fnmatch.fnmatch(name, pattern) for pattern in call["allow_patterns"])

        assert all(asked(name) for name in NEEDED)
        assert not any(asked(name) for name in UNWANTED)


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("two\nlines"),
                                   RuntimeError(""), ConnectionError("401 Client Error")], ids=repr)
def test_a_failed_download_is_one_line(hub, cli_fails, error):
    """Whatever the hub's client raises: what could not be downloaded, why, and the way out."""
    hub(None, error)
    assert_refused(cli_fails, "owner/name", "owner/name", "folder",
                   str(error).split("\n")[0] or "RuntimeError")


@pytest.mark.parametrize("nickname, repository", [
    ("llada-8b", "GSAI-ML/LLaDA-8B-Instruct"), ("llada-8b-base", "GSAI-ML/LLaDA-8B-Base"),
    ("llada-1.5", "GSAI-ML/LLaDA-1.5"), ("dream-7b", "Dream-org/Dream-v0-Instruct-7B"),
    ("dream-7b-base", "Dream-org/Dream-v0-Base-7B")])
def test_nicknames_are_the_published_repositories(hub, text_ckpt, nickname, repository):
    """A nickname asks the hub for the repository that its name says."""
    fake = hub(None, text_ckpt)
    assert find(nickname) == text_ckpt
    assert fake.downloads[0]["repo_id"] == repository
    assert nickname in CHECKPOINTS


def test_a_model_of_ours_that_is_not_made_yet(cli_fails, monkeypatch, tmp_path):
    """A nickname whose folder is absent says which command makes it; another path does not."""
    monkeypatch.setitem(CHECKPOINTS, "haystack", tmp_path / "absent")
    line = cli_fails("--ckpt", "haystack", "--prompt", "a", *CPU)
    assert "absent is not there" in line and "tiny.py pretrain --task haystack" in line
    with pytest.raises(InputError, match="unknown checkpoint"):
        load(tmp_path / "absent", "cpu")


def test_compiling_without_a_compiler(cli_fails, monkeypatch):
    """On a CPU torch.compile writes C++: without a compiler that is one line, and no traceback."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++" in cli_fails("--compile", *CPU)


def test_a_folder_is_never_looked_up(hub, ckpt, monkeypatch):
    """A folder whose path looks like a hub id is a folder."""
    fake = hub(None, AssertionError("asked the network"))
    monkeypatch.chdir(ckpt.parent.parent)
    relative = f"{ckpt.parent.name}/{ckpt.name}"
    assert load(relative, "cpu")[0].config == load(ckpt, "cpu")[0].config
    assert fake.calls == []
