"""Prompts: what a line of a file may be, what becomes of one that cannot be answered, and what
comes back with an answer."""
from __future__ import annotations

import json

import pytest
from conftest import MASK_ID

import sample
from lib.cli import InputError
from lib.files import to_json
from lib.prompts import Prompt, read_prompts
from lib.tokenizer import Tokenizer
from metastate import MetaState
from model import load
from studies import probe

CPU = ["--device", "cpu"]


def strict(text: str) -> dict:
    """A line of JSON as a strict reader takes it."""
    def no(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text.encode("utf-8").decode("utf-8"), parse_constant=no)


# ------------------------------------------------------------------ what is read
def test_a_line_ends_at_a_newline_only(tokenizers, tmp_path):
    """JSON may hold U+2028, U+0085 or a form feed as they are; they neither cut a line in two nor
    shift the numbers of later ones."""
    prompt = "a\u2028b\u0085c\u2029d"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = tokenizers["llada"]
    found = read_prompts(str(file), tokenizer, True, 100)
    assert found == [Prompt({"prompt": prompt}, tokenizer.encode(prompt))]
    file.write_text("one\u2028line\x0cof text\r\n{", encoding="utf-8")
    good, bad = read_prompts(str(file), tokenizer, True, 100)
    assert good.prompt == "one\u2028line\x0cof text" and f"{file}:2:" in bad.error


def test_what_a_line_of_prompts_may_be(tokenizers, tmp_path):
    """A text, JSON with a prompt, or messages, whatever their chat format; blank lines are skipped,
    and a byte order mark is none of the text."""
    messages = [{"role": "user", "content": "x"}]
    file = tmp_path / "prompts.txt"
    file.write_text('\ufeffh\u00e9llo\n\n{"prompt": "two"}\n' + json.dumps({"messages": messages}),
                    encoding="utf-8")
    for tokenizer in tokenizers.values():
        found = read_prompts(str(file), tokenizer, False, 500)
        assert [p.prompt for p in found] == ["h\u00e9llo", "two", messages]
        assert [p.ids for p in found] == [tokenizer.prompt(p.prompt) for p in found]
        assert not any(p.error for p in found)
        raw = read_prompts(str(file), tokenizer, True, 500)
        assert raw[0].ids == tokenizer.encode("h\u00e9llo")


def test_a_prompt_without_room_names_its_line(tokenizers, tmp_path):
    """One token less would do."""
    file = tmp_path / "prompts.txt"
    file.write_text("fine\n" + "x" * 9)
    assert [p.error for p in read_prompts(str(file), tokenizers["llada"], True, 9)] == ["", ""]
    good, bad = read_prompts(str(file), tokenizers["llada"], True, 8)
    assert good.error == "" and f"{file}:2: 9 tokens, and only 8" in bad.error


BAD = {  # a line -> the id that its error has
    b"{": None, b'{"prompt": "a"': None, b'{"id": 7} b': None, b"{}": None, b"[1, 2]": None,
    b'["a"]': None, b'"a text in quotes"': None, b"42": None, b"-1.5e3": None, b"null": None,
    b"true": None, b"NaN": None, b"[" * 100_000: None, b"caf\xe9": None,
    b'{"id": 1, "prompt": 3}': 1, b'{"id": "a", "prompt": ""}': "a",
    b'{"id": [1], "prompt": "  "}': [1], b'{"id": 2, "prompt": null}': 2,
    b'{"id": 3, "prompt": ["a"]}': 3, b'{"prompt": {"a": 1}, "id": 4}': 4,
    b'{"id": 5, "messages": []}': 5, b'{"id": 6, "messages": [{"role": "user"}]}': 6,
    b'{"id": 7, "messages": [{"role": "user", "content": 3}]}': 7,
    b'{"id": 8, "messages": {"role": "user"}}': 8, b'{"id": 9, "messages": "a"}': 9,
    b'{"id": 10, "prompt": "\\ud800"}': 10,
    b'{"id": 12, "prompt": "a", "x": NaN}': 12, b'{"id": 13, "prompt": "a", "x": [-Infinity]}': 13,
    b'{"id": 14, "prompt": "a", "x": 1e999}': 14, b'{"id": NaN, "prompt": "a"}': None,
    b'{"id": "\\udfff", "prompt": 3}': "\udfff", b'{"id": 15, "text": "a"}': 15,
    b'{"id": 16, "prompt": "a", "messages": [{"role": "user", "content": "b"}]}': 16,
    b'{"prompt": ' + b"[" * 100_000: None, b'{"prompt": ' + b"1" * 5000 + b"}": None,
    b"x" * 250: None}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_bad_line_is_an_error_and_the_others_run(text_ckpt, tmp_path, capsys, batch_size):
    """Whatever a line is, what comes out is one line of JSON for each, in order: the answer, or its
    id with an error that names the file and the number of the line, blank lines counted. The exit
    code is 1 and stderr says how many."""
    file, bad = tmp_path / "prompts.jsonl", list(BAD)
    lines = [b'{"id": "first", "prompt": "fine"}', b"", *bad[:9], b"one in the middle", *bad[9:],
             b"a last one"]
    file.write_bytes(b"\n".join(lines) + b"\n")
    expected = [line for line in lines if line]
    assert sample.main(["--ckpt", str(text_ckpt), "--prompts", str(file), "--gen-length", "8",
                        "--batch-size", str(batch_size), *CPU]) == 1
    out, err = capsys.readouterr()
    rows = [strict(text) for text in out.splitlines()]
    assert len(rows) == len(expected)
    for line, row in zip(expected, rows):
        if line in BAD:
            assert row.keys() == {"id", "error"} and row["id"] == BAD[line], line[:40]
            assert row["error"].startswith(f"{file}:{lines.index(line) + 1}: ")
        else:
            assert "text" in row and "error" not in row and row["forwards"] > 0
    assert [row["prompt"] for row in rows if "text" in row] == \
        ["fine", "one in the middle", "a last one"]
    assert err == f"error: {len(BAD)} of {len(BAD) + 3} prompts have no answer: their lines say " \
        "why\n"


def test_every_field_comes_back(text_ckpt, tmp_path, capsys):
    """Whatever a line holds besides the prompt; what has a name of ours is in "given", and halves
    of surrogate pairs are written as JSON escapes."""
    given = [{"id": "a\udc80", "prompt": "x", "nested": {"deep": [1, None, "é"]}, "big": 10 ** 30},
             {"messages": [{"role": "user", "content": "x"}], "id": 0, "": 1, "\ud800": 2},
             {"prompt": "x", "text": 1, "tokens": 2, "error": "was", "given": {"a": 1}, "id": 3}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in given))
    argv = ["--ckpt", str(text_ckpt), "--prompts", str(file), "--gen-length", "8", *CPU]
    found = sample.main(argv)
    out, err = capsys.readouterr()
    first, second, third = (strict(text) for text in out.splitlines())
    ours = {"text", "finish_reason", "tokens", "forwards", "seconds", "batch"}
    assert {k: v for k, v in first.items() if k not in ours} == given[0]
    if "text" in second:  # a tokenizer with no chat format of its own may refuse messages
        assert {k: v for k, v in second.items() if k not in ours} == \
            given[1] | {"prompt": given[1]["messages"]}
    taken = ("text", "tokens", "error", "given")
    assert third["given"] == {name: given[2][name] for name in taken}
    assert third["id"] == 3 and isinstance(third["text"], str) and "error" not in third
    assert found == ("error" in second)
    assert not any("\ud800" <= c <= "\udfff" for c in out)


def test_a_mask_where_nothing_is_filled(text_ckpt):
    """The probe would count it as still to be written."""
    assert probe.main(["--ckpt", str(text_ckpt), "--prompt", "<|mask|>", *CPU]) == 2


def test_a_file_is_not_compared(cli_fails, text_ckpt, tmp_path):
    """One of two answers to each prompt would be a choice that nobody made."""
    (tmp_path / "x").write_text("a\n")
    MetaState.for_backbone(load(text_ckpt, "cpu")[0]).save(tmp_path / "m.safetensors")
    assert "--compare" in cli_fails("--ckpt", text_ckpt, "--prompts", tmp_path / "x", "--compare",
                                    "--memory", tmp_path / "m.safetensors")


def test_no_room_for_any_prompt(cli_fails, text_ckpt, tmp_path):
    """That is an error of the command line and not of its prompts."""
    (tmp_path / "x.txt").write_text("a\n")
    argv = ["--ckpt", text_ckpt, "--prompts", tmp_path / "x.txt", "--gen-length", 256]
    line = cli_fails(*argv, *CPU)
    assert "--gen-length 256" in line


# ------------------------------------------------------------------ the probe
def test_the_probe_goes_on_without_a_bad_line(text_ckpt, tmp_path, capsys):
    """As JSON the line has its error, and an answer the fields of its line; else stderr names it.
    Means are over the others. Where none is left nothing is measured."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "id": 1, "positions": 2}\n[3]\n{"prompt": "b", "x": NaN}\nc\n')
    argv = ["--ckpt", str(text_ckpt), "--prompts", str(file), "--n-masks", "4", *CPU]
    assert probe.main([*argv, "--json"]) == 1
    rows = [strict(text) for text in capsys.readouterr().out.splitlines()]
    assert ["error" in row for row in rows] == [True, True, False, False, False]
    assert rows[2]["id"] == 1 and rows[2]["given"] == {"positions": 2}
    assert rows[3]["prompt"] == "c" and rows[4]["prompts"] == 2
    assert probe.main(argv) == 1
    out, err = capsys.readouterr()
    assert out.startswith("2 prompts") and f"{file}:2:" in err and err.count("error: ") == 2
    file.write_text("a\n" + "a" * 256)
    assert probe.main([*argv[:4], *CPU]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("1 prompt,") and f"{file}:2: 256 tokens, and only 255" in err
    file.write_text("[3]\n")
    assert probe.main(argv) == 1
    assert capsys.readouterr().out == ""


def test_a_line_that_is_almost_too_deep(tokenizers, tmp_path):
    """One whose `id` can just be written, and not with anything around it: its own error."""
    file = tmp_path / "x.jsonl"
    for depth in range(900, 1000):
        file.write_text(json.dumps({"prompt": ""})[:-1] + ', "id": ' + "[" * depth + "]" * depth
                        + '}\n{"prompt": "b"}\n')
        bad, good = read_prompts(str(file), tokenizers["llada"], True, 100, MASK_ID)
        assert bad.error and not good.error and strict(to_json(bad.refused()))["error"]


def test_files_that_were_put_together(tokenizers, tmp_path):
    """A byte order mark in front of any line is none of it."""
    file = tmp_path / "x.jsonl"
    file.write_text('\ufeff{"prompt": "a", "id": 1}\n\ufeff{"prompt": "b", "id": 2}\n')
    found = read_prompts(str(file), tokenizers["llada"], True, 100, MASK_ID)
    assert [prompt.fields["id"] for prompt in found] == [1, 2]


def test_what_cannot_be_read_at_all(tokenizers, tmp_path):
    """No file, no prompt: that is no error of a line."""
    tokenizer: Tokenizer = tokenizers["llada"]
    for name, content in (("none", None), ("empty", ""), ("blank", "\n \n")):
        file = tmp_path / f"{name}.txt"
        if content is not None:
            file.write_text(content)
        with pytest.raises(InputError, match=file.name):
            read_prompts(str(file), tokenizer, True, 100, MASK_ID)
