"""Text and chats to ids, held against the published tokenizer and the published chat formats."""
from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import DATA, assert_refused, byte_tokenizer
from tokenizers import Tokenizer as Core
from tokenizers import models, processors

from lib.cli import InputError
from lib.tokenizer import Tokenizer
from model import load

DREAM_FILES = DATA / "dream-tokenizer"
EXPECTED = json.loads((DREAM_FILES / "expected.json").read_text(encoding="utf-8"))
LLADA_MARKERS = {"<|startoftext|>": 502, "<|start_header_id|>": 503, "<|end_header_id|>": 504,
                 "<|eot_id|>": 505}
DREAM_MARKERS = {"<|im_start|>": 502, "<|im_end|>": 503}


@pytest.fixture(scope="module")
def dream() -> Tokenizer:
    """The small tokenizer of Dream's form."""
    return Tokenizer.from_folder(DREAM_FILES)


@pytest.fixture
def parts(tmp_path) -> Path:
    """A copy of the small Dream tokenizer's three files, to be broken."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(DREAM_FILES / name, tmp_path)
    return tmp_path


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """The ids of pieces, each either one special token or text without any: what a chat format has
    to come to, put together from the outside."""
    special = {**LLADA_MARKERS, **DREAM_MARKERS}
    return [i for piece in pieces for i in
            ([tokenizer.vocab[piece]] if piece in special else tokenizer.encode(piece))]


# ------------------------------------------------------------------ Dream's, built from its parts
def test_dream_ids_are_the_published_ones(dream):
    """The rebuilt byte-level BPE (normaliser, split, merges, added tokens) gives the published ids
    of every text."""
    assert len(EXPECTED) > 100
    wrong = [(text, ids, dream.encode(text)) for text, ids in EXPECTED if dream.encode(text) != ids]
    assert not wrong, wrong[:3]


def test_decode_undoes_encode(dream):
    """Decoding gives the text back, up to the normalisation (NFC) that encoding applies; and takes
    a tensor as well as a list."""
    for text, ids in EXPECTED:
        assert dream.decode(ids) == unicodedata.normalize("NFC", text)
        assert dream.decode(torch.tensor(ids, dtype=torch.long)) == dream.decode(ids)


def test_skipping_special_tokens_leaves_the_others(dream):
    """`<tool_call>` is an added token but not a special one: it is part of the text."""
    ids = dream.encode("<|im_start|>a<tool_call>b<|im_end|>")
    assert dream.decode(ids) == "<|im_start|>a<tool_call>b<|im_end|>"
    assert dream.decode(ids, skip_special=True) == "a<tool_call>b"


def test_vocab_has_the_added_tokens(dream):
    """The largest id, which is compared with the model's rows, is that of the last added token."""
    assert dream.vocab["<|mask|>"] == max(dream.vocab.values()) == 1206


# ------------------------------------------------------------------ which files are read
def test_tokenizer_json_is_preferred(parts):
    """Where both forms lie in one folder, tokenizer.json counts."""
    byte_tokenizer({"<|only_here|>": 500}).save(str(parts / "tokenizer.json"))
    assert Tokenizer.from_folder(parts).encode("<|only_here|>") == [500]
    (parts / "tokenizer.json").unlink()
    assert "<|only_here|>" not in Tokenizer.from_folder(str(parts)).vocab


def test_nothing_is_put_in_front(tmp_path):
    """A tokenizer.json whose post-processor adds a BOS does not smuggle it in: the chat format
    states its own."""
    core = byte_tokenizer({"<|startoftext|>": 500})
    core.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 500)])
    core.save(str(tmp_path / "tokenizer.json"))
    assert core.encode("a").ids[0] == 500
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("") == []
    assert tokenizer.encode("ab") == [tokenizer.vocab["a"], tokenizer.vocab["b"]]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_an_absent_part_is_named(parts, name):
    """Without tokenizer.json each of the three files is needed, and the one that is absent is
    named."""
    (parts / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(parts)


@pytest.mark.parametrize("name, content", [
    ("vocab.json", "{"), ("vocab.json", '{"a": "b"}'), ("vocab.json", "[]"),
    ("merges.txt", "#version: 0.2\none two three four"), ("merges.txt", "not_in vocab_at_all"),
    ("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"added_tokens_decoder": ['),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<|x|>"}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1200": {"special": true}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1, 2]}'),
    ("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer.json", '{"model": null}'),
])
def test_a_broken_part_is_an_input_error(parts, name, content):
    """Every file can be cut short or hold something else; the error names the file or its
    folder."""
    (parts / name).write_text(content)
    with pytest.raises(InputError, match=str(parts)):
        Tokenizer.from_folder(parts)


@pytest.mark.parametrize("number", ["1207", "1210", "5"])
def test_added_ids_that_cannot_be_given_are_an_input_error(parts, number):
    """The library numbers added tokens itself, one after the other: a gap, or an id that the
    vocabulary already uses, would move them silently."""
    config = json.loads((parts / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    added[number] = added.pop("1206")
    (parts / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"<\|mask\|>.* {number}\b"):
        Tokenizer.from_folder(parts)


# ------------------------------------------------------------------ chat formats
def llada(special: dict[str, int] = LLADA_MARKERS) -> Tokenizer:
    """A byte-level tokenizer with the special tokens of LLaDA's chat format."""
    return Tokenizer(byte_tokenizer(special))


def test_llada_chat():
    """<|startoftext|> once, each message between its markers and stripped, then the assistant's
    header."""
    tokenizer = llada()
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": " \n one\n two \n"},
                {"role": "assistant", "content": "three"}, {"role": "user", "content": ""}]
    turn = [("<|start_header_id|>", role, "<|end_header_id|>", "\n\n" + content, "<|eot_id|>")
            for role, content in [("system", "Be brief."), ("user", "one\n two"),
                                  ("assistant", "three"), ("user", "")]]
    assert tokenizer.chat(messages) == ids_of(
        tokenizer, "<|startoftext|>", *(piece for pieces in turn for piece in pieces),
        "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")


def test_llada_chat_has_no_system_message_of_its_own():
    """Only Dream's template adds one."""
    tokenizer = llada()
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == ids_of(
        tokenizer, "<|startoftext|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\nhi",
        "<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")


def test_llada_base_writes_the_markers_as_plain_text():
    """Base knows <|startoftext|> but not the three header tokens: its template spells them out."""
    tokenizer = llada({"<|startoftext|>": 500})
    ids = tokenizer.chat([{"role": "user", "content": " hi "}])
    text = ("<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert ids == [500] + tokenizer.encode(text)
    assert len(ids) == 1 + len(text)  # a token a byte
    assert tokenizer.decode(ids) == "<|startoftext|>" + text


@pytest.mark.parametrize("system", [None, "Speak in rhymes. "])
def test_dream_chat(system):
    """ChatML without BOS, the default system message unless one is given, contents as they are."""
    tokenizer = Tokenizer(byte_tokenizer(DREAM_MARKERS))
    given = [] if system is None else [{"role": "system", "content": system}]
    messages = given + [{"role": "user", "content": " one\n"},
                        {"role": "assistant", "content": "two"}]
    assert tokenizer.chat(messages) == ids_of(
        tokenizer, "<|im_start|>", f"system\n{system or 'You are a helpful assistant.'}",
        "<|im_end|>", "\n", "<|im_start|>", "user\n one\n", "<|im_end|>", "\n",
        "<|im_start|>", "assistant\ntwo", "<|im_end|>", "\n", "<|im_start|>", "assistant\n")


def test_a_chat_leaves_its_messages_alone():
    """The default system message is not put into the caller's list."""
    messages = [{"role": "user", "content": " hi "}]
    for tokenizer in (llada(), Tokenizer(byte_tokenizer(DREAM_MARKERS))):
        tokenizer.chat(messages)
        assert messages == [{"role": "user", "content": " hi "}]


@pytest.mark.parametrize("special, expected", [
    (LLADA_MARKERS, True), (DREAM_MARKERS, True), ({"<|startoftext|>": 500}, False), ({}, False)])
def test_is_chat_is_about_the_markers(special, expected):
    """A text prompt becomes a chat only where the model was trained on one."""
    assert llada(special).is_chat is expected


@pytest.mark.parametrize("messages", [
    ["hi"], "hi", [None], [{}], [{"role": "user"}], [{"content": "hi"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": ["hi"]}],
    [{"role": 1, "content": "hi"}], [{"role": "user", "content": "fine"}, {"role": "user"}],
], ids=str)
@pytest.mark.parametrize("special", [LLADA_MARKERS, DREAM_MARKERS], ids=["llada", "dream"])
def test_malformed_messages_are_an_input_error(special, messages):
    """A message without a role and a content, both text, is refused before any format sees it."""
    with pytest.raises(InputError, match="role and a content"):
        llada(special).chat(messages)


def test_text_that_is_no_unicode_is_an_input_error():
    """A lone surrogate, as Python makes of a command line that is not UTF-8 and of JSON's \\ud800,
    cannot be encoded: the tokenizers library raises a TypeError about something else."""
    with pytest.raises(InputError):
        llada().encode("a\udcff")


# ------------------------------------------------------------------ the text of a prompt
def test_a_prompt_becomes_a_chat_where_there_is_a_format():
    """A user's message with a chat format; the text as it is with raw, or without a format."""
    plain, chat = (Tokenizer(byte_tokenizer(s)) for s in ({}, {"<|im_start|>": 500}))
    message = [{"role": "user", "content": "hi"}]
    assert chat.prompt("hi") == chat.prompt(message, raw=True) == chat.chat(message)
    assert chat.prompt("hi", raw=True) == chat.encode("hi")
    assert plain.prompt("hi") == plain.encode("hi")


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_a_prompt_of_nothing(prompt):
    """There is nothing to answer."""
    with pytest.raises(InputError, match="prompt is empty"):
        llada().prompt(prompt)


# ------------------------------------------------------------------ a checkpoint's tokenizer
def test_absent_tokenizer(cli_fails):
    """Weights alone can be loaded, but no text can be read or written."""
    assert load(DATA / "llada", "cpu")[1] is None
    argv = ["--ckpt", DATA / "llada", "--prompt", "hi", "--device", "cpu"]
    assert "no tokenizer" in cli_fails(*argv)


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
    Core(models.BPE()).save(str(ckpt / "tokenizer.json"))
    line = cli_fails("--ckpt", ckpt, "--prompt", "hi", "--gen-length", 8, "--device", "cpu")
    assert str(ckpt) in line or "prompt is empty" in line
