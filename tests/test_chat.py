"""Conversations in a terminal."""
from __future__ import annotations

import io
import sys
from argparse import Namespace

import pytest
import torch
from conftest import EOS_ID, MASK_ID, byte_tokenizer, checkpoint

import sample
from lib import live
from lib.chat import chat
from lib.cli import InputError

MARKERS = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture
def said(monkeypatch):
    """said(text): what is typed in."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def conversations(tokenizer, room: int = 500, system: str | None = None,
                  code: int = 0) -> list[list[int]]:
    """What a model is asked, turn by turn; it answers with the number of the turn."""
    asked: list[list[int]] = []

    def answer(ids: list[int]) -> str:
        asked.append(ids)
        return f"answer {len(asked)}"

    assert chat(Namespace(ckpt="x", system=system), answer, tokenizer, MASK_ID, room) == code
    return asked


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_turn_knows_those_before(family, tokenizers, said):
    """Blank lines are none; /reset forgets, but not the system's; what is behind /quit is not
    read."""
    tokenizer = tokenizers[family]
    said("one\n\n two \n/reset\nthree\n/quit\nfour\n")
    system = {"role": "system", "content": "Be brief."}
    assert conversations(tokenizer, system="Be brief.") == [tokenizer.chat([system, *t]) for t in (
        turns("one"), turns("one", "answer 1", "two"), turns("three"))]


def test_the_beginning_is_left_out_where_there_is_no_room(family, tokenizers, said, capsys):
    """Whole turns, the oldest first; the system's stays."""
    tokenizer, system = tokenizers[family], {"role": "system", "content": "Be brief."}
    whole = turns("one", "answer 1", "two", "answer 2", "three")
    room = len(tokenizer.chat([system, *whole])) - 1
    said("one\ntwo\nthree\n")
    *_, last = conversations(tokenizer, room, "Be brief.")
    assert last == tokenizer.chat([system, *whole[2:]])
    assert capsys.readouterr().err.count("no longer fits") == 1


def test_a_line_that_cannot_be_answered(family, tokenizers, said, capsys, monkeypatch):
    """What is too long by itself, or no UTF-8: it is said, and the conversation goes on as if it
    had not been; the exit code tells."""
    tokenizer = tokenizers[family]
    typed = b"one\n" + b"long " * 200 + b"\ncaf\xe9\ntwo\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "ascii"))
    assert conversations(tokenizer, 300, code=1) == [
        tokenizer.chat(turns("one")), tokenizer.chat(turns("one", "answer 1", "two"))]
    err = capsys.readouterr().err
    assert err.count("error: ") == err.count("\n") == 2
    assert "leave room for the answer" in err and "not UTF-8" in err
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="closed"):
        conversations(tokenizer)


def test_an_answer_ends_with_its_turn(family, tokenizers, capsys):
    """The marker is no part of it, nor what stands behind."""
    tokenizer, special = tokenizers[family], Namespace(mask_id=MASK_ID, eos_id=EOS_ID)
    ids = torch.tensor([tokenizer.chat(turns("one"))])

    def decode(ids, on_step):
        row = [*tokenizer.answer("Hi"), *tokenizer.encode("you"), EOS_ID]
        return sample.Sample(torch.cat([ids, torch.tensor([row])], 1), ids, 1, 0.1)

    assert live.show(decode, ids, tokenizer, special) == "Hi"
    assert capsys.readouterr().out.startswith("Hi\n2 tokens")


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A checkpoint of random weights with LLaDA's chat format."""
    folder = checkpoint(tmp_path_factory.mktemp("chat") / "ckpt")
    special = {"<|mask|>": MASK_ID, "<|eos|>": EOS_ID} | dict(zip(MARKERS, range(400, 404)))
    byte_tokenizer(special).save(str(folder / "tokenizer.json"))
    return folder


def test_the_command_line(talking, text_ckpt, said, capsys):
    """Each turn is shown as a prompt's answer is; options that do not go together are refused, and
    a model without a chat format."""
    argv = ["--ckpt", str(talking), "--device", "cpu", "--gen-length", "8", "--quiet"]
    said("a\nb\n")
    assert sample.main([*argv, "--chat", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    assert out and err == ""
    assert sample.main([*argv, "--prompt", "a", "--system", "Be brief."]) == 0
    assert out.startswith(capsys.readouterr().out)
    said("a\nb <|mask|>\nb\n")  # a mask is no part of a conversation
    assert sample.main([*argv, "--chat", "--system", "Be brief."]) == 1
    again, err = capsys.readouterr()
    assert again == out and err.count("\n") == 1 and "mask token" in err
    for wrong in (["--chat", "--prompt", "a"],
                  ["--ckpt", str(text_ckpt), "--prompt", "a", "--system", "b"],
                  ["--system", "a", "--task", "sums"],
                  ["--chat", "--ckpt", str(text_ckpt)], ["--chat", "--raw"]):
        said("a\n")
        assert sample.main([*argv, *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
