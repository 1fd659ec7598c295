"""Checkpoints as people have them, which load, and as nobody should have them, which are refused in
one line: weights, configs, tokenizers, memories."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ABSENT, DATA, awake, byte_tokenizer, checkpoint, shard
from safetensors.torch import load_file

import sample
from lib.checks import finite, is_finite
from lib.cli import InputError
from lib.files import read_tensors, save_tensors
from lib.hub import stated
from lib.tensors import allocated, rebuilt, stored_tensors
from lib.tokenizer import Tokenizer
from metastate import MetaState
from model import Config, load, unfilled
from sample import generate

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADS = {"llada": ("model.transformer.ff_out.weight", "model.transformer.wte.weight"),
         "dream": ("lm_head.weight", "model.embed_tokens.weight")}
TIE = {"llada": "weight_tying", "dream": "tie_word_embeddings"}
PARTS = DATA / "dream-tokenizer"


# ------------------------------------------------------------------ nothing that is not finite
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_finite(bad, place, dtype):
    """One number among many, in every dtype of a checkpoint."""
    x = torch.linspace(-3e4, 3e4, 1001).to(dtype)
    assert is_finite(x) and is_finite(x[:0]) and is_finite(torch.arange(3)) and finite("x", x) is x
    x[place] = bad
    assert not is_finite(x)
    with pytest.raises(InputError, match="the logits hold NaN"):
        finite("the logits", x)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("sharded", [False, True])
def test_a_weight_that_is_not_finite(tmp_path, family, number, sharded):
    """The first tensor, the last one and some between: file and tensor are named."""
    names = sorted(load_file(DATA / family / WEIGHTS))
    name = names[number * (len(names) - 1) // 4]

    def spoil(tensors):
        tensors[name].view(-1)[-1] = float("nan") if number % 2 else float("inf")

    folder = checkpoint(tmp_path / "spoilt", family, spoil)
    if sharded:
        shard(folder)
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        load(folder, "cpu")
    assert name in str(caught.value) and "safetensors" in str(caught.value)


def test_a_weight_that_the_dtype_does_not_hold(tmp_path):
    """Finite as stored, infinite in bfloat16."""
    folder = checkpoint(tmp_path / "large", "llada", lambda t: t[HEADS["llada"][0]].fill_(3.4e38))
    assert load(folder, "cpu")[0].head.weight.isfinite().all()
    with pytest.raises(InputError, match="bfloat16"):
        load(folder, "cpu", "bfloat16")


@pytest.mark.parametrize("name", ["start", "updater.from_c.bias", "injector.attention.slopes"])
def test_a_memory_that_is_not_finite(backbone, tmp_path, name):
    """The file and the tensor are named."""
    memory, path = awake(backbone), tmp_path / "memory.safetensors"
    with torch.no_grad():
        memory.get_parameter(name).view(-1)[0] = float("nan")
    memory.save(path)
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        MetaState.load(path, backbone)
    assert str(path) in str(caught.value) and name in str(caught.value)
    with pytest.raises(InputError, match=name):
        read_tensors(path)


@pytest.mark.parametrize("order", ["low_confidence", "random", "origin", "entropy"])
@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"temperature": 1.0},
                                     {"cfg_scale": 1.0}, {"stop_at_eos": True}], ids=str)
def test_logits_that_are_not_finite(family, order, options):
    """Weights that are finite and overflow: no answer is made of them, whatever decides."""
    loaded, _ = load(DATA / family, "cpu")
    with torch.no_grad():
        loaded.head.weight[7] = 3e38
    with pytest.raises(InputError, match="logits are not finite"):
        generate(loaded, torch.tensor([[1, 2, 3]]), gen_length=8, block_length=8, steps=4,
                 order=order, **options)


# ------------------------------------------------------------------ weights as people have them
def same(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same weights, bit for bit."""
    one, two = (load(folder, "cpu")[0].state_dict() for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_an_index_beside_a_whole_file(tmp_path, family):
    """Shards were merged, and their index stayed: the whole file counts."""
    folder = checkpoint(tmp_path / "merged", family)
    shard(folder)
    for path in folder.glob("*-of-*"):
        path.unlink()
    shutil.copy(DATA / family / WEIGHTS, folder)
    assert (folder / INDEX).is_file() and same(folder, DATA / family)


@pytest.mark.parametrize("sharded", [False, True])
def test_frequencies_that_are_stored(tmp_path, family, sharded):
    """Buffers of RoPE, which older libraries stored, are computed here anew, of whatever dtype."""
    folder = checkpoint(tmp_path / "stored", family, lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64)}))
    if sharded:
        shard(folder)
    assert same(folder, DATA / family)
    assert not any("inv_freq" in name for name in stored_tensors(folder))


def tied(folder: Path, family: str, change: float = 0.0) -> Path:
    """A tied checkpoint that stores its head all the same, changed or not."""
    head, embedding = HEADS[family]

    def tie(tensors):
        tensors[head] = tensors[embedding].clone()
        tensors[head][3, 5] += change

    return checkpoint(folder, family, tie, **{TIE[family]: True})


def test_a_tied_head_that_is_stored(tmp_path, family):
    """Equal to the embedding it is no other tensor; another one is refused, and so is one that
    config.json knows nothing of."""
    backbone, _ = load(tied(tmp_path / "tied", family), "cpu")
    assert backbone.head is None and backbone(torch.tensor([[1]])).shape[-1] == 512
    with pytest.raises(InputError, match="differs") as caught:
        load(tied(tmp_path / "other", family, 0.1), "cpu")
    assert HEADS[family][0] in str(caught.value)


# ------------------------------------------------------------------ config.json
@pytest.mark.parametrize("family, changes, expected", [
    ("llada", {"pad_token_id": None}, {"pad_id": 501}),
    ("llada", {"pad_token_id": ABSENT}, {"pad_id": 501}),
    ("dream", {"pad_token_id": None}, {"pad_id": 501}),
    ("dream", {"num_key_value_heads": ABSENT, "tie_word_embeddings": None}, {"tied": False}),
    ("dream", {"use_sliding_window": None}, {}),
    ("dream", {"torch_dtype": ABSENT, "dtype": "float16"}, {"dtype": "float16"}),
    ("llada", {"rope_full_precision": None, "rope_theta": None, "rms_norm_eps": None,
               "include_qkv_bias": None}, {"rope_float32": True, "rope_theta": 10000.0}),
    ("llada", {"embedding_size": None}, {"vocab": 512}),
    ("llada", {"multi_query_attention": True, "n_kv_heads": None}, {"kv_heads": 1}),
    ("llada", {"mlp_hidden_size": None, "mlp_ratio": 4}, {"mlp_dim": 256})], ids=str)
def test_what_is_left_unsaid(tmp_path, family, changes, expected):
    """null is as if the key were absent."""
    config = Config.from_json(checkpoint(tmp_path, family, **changes))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("changes", [
    {"weight_tying": "false"}, {"weight_tying": 0}, {"rope_full_precision": "true"},
    {"include_qkv_bias": 1}, {"rope": 1}, {"alibi": 0}, {"alibi": "false"}, {"rope": "true"},
    {"n_kv_heads": 0}, {"mlp_hidden_size": 0}, {"mlp_hidden_size": ""}, {"embedding_size": False},
    {"multi_query_attention": "no"}, {"multi_query_attention": True, "n_kv_heads": 4},
    {"rope_theta": 1e-300}, {"rope_theta": 10 ** 400}, {"rope_theta": True}, {"rope_theta": 1e300},
    {"rms_norm_eps": 1e-300}, {"rms_norm_eps": 1e9}, {"torch_dtype": "nn"}, {"torch_dtype": 3},
    {"torch_dtype": "int64"}, {"d_model": 2 ** 30}, {"n_layers": 10 ** 6}, {"n_heads": -4},
    {"embedding_size": 2 ** 31 - 1}, {"d_model": 64.0}, {"eos_token_id": [501, 502]},
    {"mlp_hidden_size": None, "mlp_ratio": "x" * 99, "d_model": 10 ** 9},
    {"mlp_hidden_size": None, "mlp_ratio": [4]}, {"mlp_hidden_size": None, "mlp_ratio": 10 ** 9},
    {"n_heads": 64, "d_model": 64}], ids=str)
def test_values_of_another_kind(tmp_path, changes):
    """"false" is not true, 0 is not absent, and no size is more than any model has: the file is
    named, at once, and nothing is allocated."""
    folder = checkpoint(tmp_path, **changes)
    with pytest.raises(InputError, match="config.json"):
        load(folder, "cpu")
    with pytest.raises(InputError, match="config.json"):
        load(f"random:{folder}", "cpu")


@pytest.mark.parametrize("changes", [{"model_type": "lladamoe"}, {"num_experts": 64},
                                     {"architectures": ["LLaDAMoEModelLM"]},
                                     {"model_type": "llada2_moe"}], ids=str)
def test_mixtures_of_experts_are_named(tmp_path, changes):
    """LLaDA-MoE is one, also where its model_type says "llada"."""
    with pytest.raises(InputError, match="LLaDA-MoE, which is not supported"):
        Config.from_json(checkpoint(tmp_path, **changes))


def test_weights_that_no_machine_has(tmp_path):
    """A config of a few lines that asks for terabytes of random weights."""
    folder = checkpoint(tmp_path, d_model=2 ** 15, mlp_hidden_size=2 ** 18, n_layers=60)
    backbone = unfilled(Config.from_json(folder))
    with pytest.raises(InputError, match="GB of weights are more than"):
        allocated(backbone, torch.device("cpu"))
    with pytest.raises(InputError, match="GB of weights are more than"):
        load(f"random:{folder}", "cpu")


# ------------------------------------------------------------------ memories
@pytest.mark.parametrize("changes", [
    {"width": 2 ** 16, "dim": 2 ** 16}, {"slots": 10 ** 9}, {"slots": 2 ** 16}, {"heads": 10 ** 9},
    {"heads": 5}, {"heads": 0}, {"dim": -1}, {"dim": 64.0}, {"width": "32"}, {"time": "false"},
    {"local": 0}, {"cond": 2 ** 16}, {"cond": None}, {"slots": True},
    {"width": 1024, "dim": 1, "slots": 1, "cond": 1},
    {"cond": 1024, "dim": 1, "slots": 1, "width": 4}], ids=str)
def test_sizes_of_a_memory_that_its_file_does_not_come_to(backbone, tmp_path, changes):
    """Refused before anything is allocated."""
    memory = awake(backbone)
    path = tmp_path / "memory.safetensors"
    save_tensors(path, memory.state_dict(), {
        "format": 1, "sizes": memory.sizes | changes, "backbone": memory.fingerprint})
    with pytest.raises(InputError):
        rebuilt(MetaState, memory.sizes | changes, memory.state_dict())
    with pytest.raises(InputError, match="not a MetaState memory"):
        MetaState.load(path, backbone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_a_memory_of_another_dtype(backbone, dtype):
    """Numbers that would be cast in silence."""
    tensors = {k: v.to(dtype) for k, v in awake(backbone).state_dict().items()}
    with pytest.raises(InputError, match=str(dtype)):
        rebuilt(MetaState, awake(backbone).sizes, tensors)


# ------------------------------------------------------------------ tokenizers as people have them
@pytest.fixture
def parts(tmp_path) -> Path:
    """A copy of the small Dream tokenizer's three files."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(PARTS / name, tmp_path)
    return tmp_path


def edit(path: Path, change) -> None:
    """Apply `change` to the object in a JSON file, an empty one where there is none."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(change(content) or content), encoding="utf-8")


TEXT = "h\u00e9llo 12 <|im_start|>user\nI'm  it\n"


@pytest.mark.parametrize("change", [
    lambda t: t + "\n\n \n".replace(" ", ""), lambda t: t.replace("\n", "\r\n"),
    lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\n\n", 5), str.rstrip],
    ids=["blank at the end", "carriage returns", "byte order mark", "blank within", "no last"])
def test_merges_with_other_blanks(parts, change):
    """Blank lines and line ends of another system make no difference."""
    expected = Tokenizer.from_folder(parts).encode(TEXT)
    path = parts / "merges.txt"
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode())
    assert Tokenizer.from_folder(parts).encode(TEXT) == expected


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999, -1, -2])
def test_merges_that_are_cut_short(parts, keep):
    """A line less, or half of the last: the file is named, and a token that is not made."""
    path = parts / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = "".join(lines if keep == -1 else lines[:-1] if keep == -2 else
                    lines[:int(keep * len(lines))])
    path.write_text(whole.rstrip("\n")[:-1] if keep == -1 else whole, encoding="utf-8")
    with pytest.raises(InputError, match="merges.txt|out of vocabulary"):
        Tokenizer.from_folder(parts)


def test_added_tokens_of_their_own_file(parts):
    """added_tokens.json says what tokenizer_config.json does not, whether that lacks the list or is
    not there; what is special is said elsewhere."""
    expected, added = Tokenizer.from_folder(parts), {}

    def move(config):
        added.update({f["content"]: int(i) for i, f in config.pop("added_tokens_decoder").items()})

    edit(parts / "tokenizer_config.json", move)
    edit(parts / "added_tokens.json", lambda _: added)
    named = [t for t in added if t.startswith("<|")]
    edit(parts / "special_tokens_map.json", lambda _: {"additional_special_tokens": named})
    for _ in range(2):
        found = Tokenizer.from_folder(parts)
        assert found.vocab == expected.vocab and found.encode(TEXT) == expected.encode(TEXT)
        ids = expected.encode("<|im_start|>a<tool_call>b")
        assert found.decode(ids, True) == expected.decode(ids, True) == "a<tool_call>b"
        (parts / "tokenizer_config.json").unlink(missing_ok=True)


def test_added_tokens_beside_a_whole_tokenizer(tmp_path):
    """What follows tokenizer.json's own tokens is added, what contradicts it is not."""
    byte_tokenizer({"<|a|>": 500}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text('{"<|a|>": 7, "<|b|>": 501, "<|c|>": 900}')
    found = Tokenizer.from_folder(tmp_path)
    assert found.encode("<|a|><|b|>") == [500, 501] and "<|c|>" not in found.vocab
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"502": {"content": "<|b|>"}}}')
    with pytest.raises(InputError, match="<.b.> the id 501, and"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_cuts_and_pads(tmp_path):
    """Truncation, padding and dropout are of training: a text has all its ids, and no others."""
    core = byte_tokenizer({"<|pad|>": 500})
    core.enable_truncation(4)
    core.enable_padding(pad_id=500, pad_token="<|pad|>", length=16)
    raw = json.loads(core.to_str())
    raw["model"]["dropout"] = 0.9
    raw["model"]["merges"] = [["a", "b"]]
    raw["model"]["vocab"]["ab"] = raw["model"]["vocab"].pop("w300")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    found = Tokenizer.from_folder(tmp_path)
    assert {tuple(found.encode("ab" * 5)) for _ in range(20)} == {(found.vocab["ab"],) * 5}
    assert len(found.encode("hello there")) == 11


# ------------------------------------------------------------------ as nobody should have them
@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}},
    {"model": {"type": "BPE", "dropout": 7.0, "vocab": {"a": 0}, "merges": []}},
    {"model": {"type": "BPE", "continuing_subword_prefix": "abcdefgh",
               "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}], ids=str)
def test_what_the_library_panics_at(ckpt, changes, capfd):
    """A panic of Rust is no `Exception`, and writes to stderr by itself: one line all the same."""
    edit(ckpt / "tokenizer.json", lambda raw: raw.update(changes))
    assert sample.main(["--ckpt", str(ckpt), "--prompt", "hi", "--device", "cpu"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and str(ckpt) in err


def test_what_the_library_panics_at_later(ckpt, capfd):
    """A pattern that takes for ever on one text: one line of ours, and none of Rust's."""
    edit(ckpt / "tokenizer.json", lambda raw: raw.update(normalizer={
        "type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}))
    tokenizer = Tokenizer.from_folder(ckpt)
    with pytest.raises(InputError, match="cannot be encoded"):
        tokenizer.encode("a" * 40 + "!")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("where", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_texts_longer_and_longer(ckpt, where):
    """24 steps that each double a letter: 16 million for one, were they taken."""
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    steps = {"normalizer": "normalizers", "decoder": "decoders"}[where]
    edit(ckpt / "tokenizer.json", lambda raw: raw.update(
        {where: {"type": "Sequence", steps: [double] * 24}}))
    with pytest.raises(InputError, match="1.7e[+]07 times as long"):
        Tokenizer.from_folder(ckpt)


class Panic(BaseException):
    """Stands in for pyo3_runtime.PanicException."""


@pytest.mark.parametrize("error", [Panic("index out of bounds"), Exception("no [UNK]"),
                                   TypeError()])
def test_what_the_library_raises_later(error):
    """While encoding or decoding; Ctrl-C stays what it is."""
    class Core:
        raised = error

        def encode(self, text, **options):
            raise self.raised

        decode = encode

    core = Core()
    tokenizer = Tokenizer(core, vocab={"a": 0})
    for work in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([0])):
        with pytest.raises(InputError):
            work()
    core.raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


@pytest.mark.parametrize("content", ['{"a": 0, "b": 0}', '{"a": "0"}', '{"a": 1.0}', '{"a": null}',
                                     '{"a": 99999999999}', '{"a": -1}', '{"a": true}'])
def test_vocabularies_that_are_none(parts, content):
    """Two tokens of one id, and ids that are none."""
    (parts / "vocab.json").write_text(content)
    with pytest.raises(InputError, match=str(parts)):
        Tokenizer.from_folder(parts)


# ------------------------------------------------------------------ base and chat
MARKERS = {"<|im_start|>": 502, "<|im_end|>": 503}


def folder_of(path: Path, markers: dict[str, int] = MARKERS, **files: object) -> Path:
    """A folder with a tokenizer.json and further files, `_` for a dot."""
    path.mkdir(parents=True)
    byte_tokenizer(markers).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


CHAT = {"tokenizer_config__json": {"chat_template": "{{ messages }}"}}


@pytest.mark.parametrize("name, files, expected", [
    ("x", {}, True), ("x", CHAT, True), ("x", {"tokenizer_config__json": {}}, False),
    ("x", {"tokenizer_config__json": {"chat_template": None}}, False),
    ("x", {"tokenizer_config__json": {}, "chat_template__jinja": "x"}, True),
    ("Dream-v0-Base-7B", CHAT, False), ("dream-7b-base", CHAT, False),
    ("Dream-v0-Instruct-7B", CHAT, True), ("base-instruct", CHAT, True), ("database", CHAT, True),
    ("models--Dream-org--Dream-v0-Base-7B/snapshots/0f1e", CHAT, False),
    ("models--Dream-org--Dream-v0-Instruct-7B/snapshots/0f1e", CHAT, True)], ids=str)
def test_a_base_model_does_not_chat(tmp_path, name, files, expected):
    """One vocabulary, two models: the folder's name and files say which. A prompt of the one is its
    text, of the other a user's message."""
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path / name, **files))
    assert tokenizer.is_chat is expected
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.prompt("hi") == tokenizer.prompt(message) == (
        tokenizer.chat(message) if expected else tokenizer.encode("hi"))
    assert tokenizer.end_of_turn == ("<|im_end|>" if expected else "")


@pytest.mark.parametrize("asked, expected", [("dream-7b-base", False), ("dream-7b", True),
                                             ("Dream-org/Dream-v0-Base-7B", False)])
def test_what_a_checkpoint_is_asked_for_by(tmp_path, monkeypatch, asked, expected):
    """Its nickname and hub id count, wherever its files lie."""
    folder = folder_of(tmp_path / "0f1e", **CHAT)
    checkpoint(folder)
    monkeypatch.setattr("model.find", lambda ckpt: folder)
    assert load(asked, "cpu")[1].is_chat is expected


@pytest.mark.parametrize("markers, text, expected", [
    (MARKERS, " yes\n", " yes\n<|im_end|>"), ({}, " yes\n", " yes\n"),
    ({"<|start_header_id|>": 502, "<|eot_id|>": 503}, " yes\n", "yes<|eot_id|>")], ids=str)
def test_an_answer_is_what_history_will_be(markers, text, expected):
    """LLaDA's template strips messages, ChatML does not: an answer is trained as it would stand in
    a longer conversation."""
    tokenizer = Tokenizer(byte_tokenizer(markers))
    assert tokenizer.decode(tokenizer.answer(text)) == expected
    if markers:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        assert expected in tokenizer.decode(tokenizer.chat(turns))
    with pytest.raises(InputError, match="empty"):
        tokenizer.answer("" if "<|eot_id|>" not in markers else " \n")


def test_a_conversation_without_a_chat_format():
    """Contents with a blank line between two, and nothing that the model never saw."""
    tokenizer = Tokenizer(byte_tokenizer({}))
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    assert tokenizer.decode(tokenizer.prompt(turns)) == "a\n\nb"
    with pytest.raises(InputError, match="role and a content"):
        tokenizer.prompt([{"role": "user"}])


# ------------------------------------------------------------------ what is stated is used
@pytest.mark.parametrize("length", [0, -3, "12", True, 1.5, [24], 10 ** 9, 10 ** 30])
def test_a_length_of_answers_that_is_none(cli_fails, ckpt, length):
    """It does not mean 128."""
    (ckpt / "generation_config.json").write_text(json.dumps({"max_new_tokens": length}))
    with pytest.raises(InputError, match="max_new_tokens"):
        stated(ckpt)
    line = cli_fails("--ckpt", ckpt, "--prompt", "hi", "--device", "cpu")
    assert "generation_config.json" in line and "max_new_tokens" in line
