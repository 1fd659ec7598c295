"""A resume that knows what it goes on with: data, tokenizer, backbone, dtype and code known by
their content, and state and metrics files that are damaged or foreign."""
from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import (METRICS, STATE, assert_same_run, metrics_of, noise, saved_step, toy,
                      toy_loss, toy_run)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from lib import identity
from lib.cli import InputError
from lib.files import read_tensors, save_tensors
from lib.metrics import read_metrics
from metastate import MetaState
from studies import memdlm
from train import fit, unrolled_loss

LINES = "".join(json.dumps({"prompt": f"{i}", "response": f"{i} {i}"}) + "\n" for i in range(20))


# ------------------------------------------------------------------ known by content
@pytest.mark.parametrize("shape, dtype", [((3,), torch.float32), ((), torch.float32),
                                          ((300, 70), torch.float32), ((129, 65), torch.bfloat16),
                                          ((5, 4096), torch.bfloat16), ((0,), torch.bool)])
def test_every_bit_counts(shape, dtype):
    """Any element that is another, two that changed places, another dtype or shape; the same bits
    in other memory are the same."""
    x = noise(*shape).to(dtype)
    name = identity.bits("", [x])
    assert name == identity.bits("", [x.clone()]) != identity.bits("config", [x])
    assert name == identity.bits("", [torch.stack([x, x], -1)[..., 0]])
    assert name not in (identity.bits("", [x[None]]), identity.bits("", [x.double()]))
    flat = x.view(-1)
    for i in range(0, x.numel(), max(1, x.numel() // 20)):
        other = flat.clone()
        other[i] = math.nextafter(float(flat[i]), math.inf) if dtype == torch.float32 \
            and float(flat[i]) else float(flat[i]) * 1.01
        if not torch.equal(other, flat):
            assert identity.bits("", [other.view(shape)]) != name
        other = flat.clone()
        other[[i, 0]] = flat[[0, i]]
        if not torch.equal(other, flat):
            assert identity.bits("", [other.view(shape)]) != name
    if x.numel():
        assert identity.bits("", [-x]) != name


def test_code_is_its_syntax(tmp_path, monkeypatch):
    """Comments, docstrings and layout may change; whatever is computed may not. A class stands for
    its module."""
    def code(source: str, name: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        return identity.of_code(getattr(__import__(name), "A"))

    first = code('"""Doc."""\ndef f(x):\n    """More."""\n    return x + 1\nclass A:\n    y = 1\n',
                 "first")
    same = code('# none\ndef f(x):\n    return (x +\n            1)\n\nclass A:\n    """A."""\n'
                '    y = 1\n', "same")
    other = code("def f(x):\n    return x + 2\nclass A:\n    y = 1\n", "other")
    assert first == same != other
    assert identity.of_code(fit) != identity.of_code(unrolled_loss)
    assert identity.of_code(MetaState) == identity.of_code(MetaState) and identity.of_code(len)


@pytest.fixture
def run(small_ckpt, tmp_path, capsys):
    """run(*flags) -> (exit code, stderr) of a short training on a file in tmp_path / "out"."""
    (tmp_path / "data.jsonl").write_text(LINES)
    shutil.copytree(small_ckpt, tmp_path / "ckpt")

    def call(*flags, main=train.main, argv=(), data="data.jsonl", ckpt="ckpt") -> tuple[int, str]:
        argv = [*argv, "--ckpt", tmp_path / ckpt, "--out", tmp_path / "out", "--device", "cpu",
                "--data", tmp_path / data, "--steps", 2, "--batch-size", 8, "--micros", 1,
                *([] if argv else ["--K", 1]), *flags]
        code = main([str(a) for a in argv])
        return code, capsys.readouterr().err
    return call


def other_weight(folder: Path) -> None:
    """Swap two neighbours in the midst of a matrix, where no sample of 64 looks."""
    tensors = load_file(folder / "model.safetensors")
    x = tensors["model.transformer.blocks.0.ff_proj.weight"].view(-1)
    x[[777, 778]] = x[[778, 777]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_file(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES = {
    "data": lambda p: other_file(p / "data.jsonl", '"19 19"', '"19 20"'),
    "backbone": lambda p: other_weight(p / "ckpt"),
    "tokenizer": lambda p: other_file(p / "ckpt" / "tokenizer.json", '"normalizer": null',
                                      '"normalizer": {"type": "Lowercase"}')}


@pytest.mark.parametrize("command", ["train", "memdlm"])
def test_what_is_another_content_is_another_run(run, tmp_path, command):
    """A changed line of the data, two weights that changed places, another tokenizer, another
    dtype, other code: each is named. The same content under another path goes on."""
    how = {"main": memdlm.main, "argv": ["train"]} if command == "memdlm" else {}
    assert run(**how)[0] == 0
    before = (tmp_path / "out" / STATE).read_bytes()
    for what, change in CHANGES.items():
        shutil.copytree(tmp_path, tmp_path / "kept", ignore=lambda *_: ["out", "kept"])
        change(tmp_path)
        code, err = run(**how)
        assert code == 2 and "other settings" in err and what in err and err.count("\n") == 1
        shutil.copytree(tmp_path / "kept", tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "kept")
    code, err = run("--dtype", "bfloat16", **how)
    assert code == 2 and "dtype" in err
    assert (tmp_path / "out" / STATE).read_bytes() == before
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ckpt").rename(tmp_path / "elsewhere" / "model")
    (tmp_path / "data.jsonl").rename(tmp_path / "elsewhere" / "x.jsonl")
    spelled = "elsewhere/../elsewhere"
    code, err = run("--steps", 3, data=f"{spelled}/x.jsonl", ckpt=f"{spelled}/model", **how)
    assert code == 0 and saved_step(tmp_path / "out") == 3


def test_other_code_of_the_memory_is_another_run(run, monkeypatch):
    """The memory's module decides."""
    assert run()[0] == 0
    monkeypatch.setattr(identity, "of_code", lambda *things: "another")
    code, err = run()
    assert code == 2 and "code" in err


# ------------------------------------------------------------------ longer and shorter
def test_a_finished_run_is_made_longer(tmp_path, capsys):
    """It goes on at its last step, by the schedule of the new length, and says so; what a run of
    fewer steps could not be is refused."""
    toy_run(tmp_path, steps=10)
    toy_run(tmp_path, steps=14)
    assert "step 10 of 10" in capsys.readouterr().err
    assert saved_step(tmp_path) == 14
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, 15))
    with pytest.raises(InputError, match="14 steps.*--steps"):
        toy_run(tmp_path, steps=13)
    toy_run(tmp_path, steps=14)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ damaged and foreign states
def edited(path: Path, edit) -> None:
    """Write a state anew, after edit(tensors, stated)."""
    tensors, stated = read_tensors(path)
    stated = edit(tensors, stated) or stated
    save_tensors(path, tensors, stated)


def put(name: str, change):
    return lambda tensors, stated: tensors.update({name: change(tensors[name])})


def said(**changes):
    return lambda tensors, stated: {**stated, **changes}


MATRIX, VECTOR, SQUARE = "weight.matrix", "weight.vector", "exp_avg_sq.vector"


@pytest.mark.parametrize("edit", [
    put(VECTOR, lambda x: x[:1]), put(VECTOR, lambda x: x[0]), put(VECTOR, lambda x: x[None]),
    put(MATRIX, lambda x: x[0]), put(MATRIX, lambda x: x.T.contiguous()),
    put(MATRIX, lambda x: x.double()), put(MATRIX, lambda x: x.bfloat16()),
    put(MATRIX, lambda x: x.int()), put(MATRIX, lambda x: x * math.nan),
    put(SQUARE, lambda x: -x - 1), put(SQUARE, lambda x: x / 0), put(SQUARE, lambda x: x[:1]),
    put("step.vector", lambda x: x + 1), put("step.vector", lambda x: x * math.nan),
    put("step.vector", lambda x: x.long()), put("step.vector", lambda x: x.expand(2).clone()),
    lambda tensors, stated: tensors.update(extra=torch.zeros(1)),
    lambda tensors, stated: tensors.update(x=tensors.pop("exp_avg.matrix")),
    lambda tensors, stated: tensors.popitem() and None,
    *(said(step=step) for step in ("6", None, True, 6.0, -1, -6, 5, 10 ** 9, 10 ** 400, [6], {})),
    *(said(settings=settings) for settings in (None, [], "x", 3)),
    lambda tensors, stated: {"a": 1, "b": 2}], ids=lambda edit: "")
def test_states_that_are_none(tmp_path, edit):
    """Shapes that would broadcast, other dtypes, numbers that no run writes, tensors too few or
    many, steps that are no number or out of range: one line with the file, and the file stays."""
    toy_run(tmp_path, steps=6)
    edited(tmp_path / STATE, edit)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(InputError, match=STATE) as caught:
        toy_run(tmp_path, steps=6)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert (tmp_path / STATE).read_bytes() == before


@pytest.mark.parametrize("stated", ["[]", "3", "null", '"x"', "{", "[" * 100_000, '{"step": NaN}'],
                         ids=lambda text: text[:9])
def test_a_state_whose_header_is_none(tmp_path, stated):
    """Metadata that is no JSON, or no object."""
    toy_run(tmp_path, steps=2)
    tensors = load_file(tmp_path / STATE)
    save_file(tensors, tmp_path / STATE, {"json": stated})
    with pytest.raises(InputError, match=STATE):
        toy_run(tmp_path, steps=2)


def test_a_state_that_was_never_written_by_now(tmp_path):
    """What a state says and holds, so that the cases above are no more than changes of it."""
    toy_run(tmp_path, steps=6)
    edited(tmp_path / STATE, lambda tensors, stated: None)
    toy_run(tmp_path, steps=6)
    with safe_open(tmp_path / STATE, framework="pt") as file:
        assert json.loads(file.metadata()["json"]) == {"step": 6, "steps": 6, "settings": {}}


# ------------------------------------------------------------------ metrics
DAMAGE = [b"\x00" * 50, b"\xff\xfe", b"{", b"[]", b"null", b"3", b'{"step": true, "loss": 1}',
          b'{"step": "2", "loss": 1}', b'{"step": 2.0}', b'{"step": -1, "loss": 1}',
          b'{"step": null}', b'{"loss": 1}', b'{"step": 2, "loss": NaN}',
           b'{"step": 2, "loss": 1e999}',
          b'{"step": 2, "loss": "x"}', b'{"step": 2, "loss": null}', b"[" * 100_000,
          b'{"step": 3, "loss": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("line", DAMAGE, ids=lambda line: ascii(line[:20]))
def test_damaged_metrics_are_mended_and_refused(tmp_path, line):
    """A run that goes on drops a line that is none, wherever it stands, and lines that are there
    twice; who wants to read them is told the number of the line."""
    toy_run(tmp_path / "whole", steps=8, save_every=2)
    toy_run(tmp_path / "out", steps=4, save_every=2)
    path = tmp_path / "out" / METRICS
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([line, *lines[:2], line, lines[0], *lines[2:], line]))
    with pytest.raises(InputError, match=METRICS):
        read_metrics(path)
    toy_run(tmp_path / "out", steps=8, save_every=2)
    assert [fields["step"] for fields in read_metrics(path)] == list(range(1, 9))


# ------------------------------------------------------------------ nothing that is not finite
@pytest.mark.parametrize("name", ["figure", "held_out"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite(tmp_path, name, value):
    """A figure of the loss or a held-out loss: named with its step, and the metrics stay JSON."""
    parameters = toy()
    loss_fn = toy_loss(parameters)

    def spoiled(step, micro):
        return loss_fn(step, micro)[0], {"figure": value if name == "figure" and step == 5 else 1.0}

    with pytest.raises(InputError, match=rf"{name} is {value} at step 6"):
        fit(parameters, spoiled, tmp_path, steps=9, lr=0.05, save_every=2, eval_every=3,
            evaluate=lambda step: {"held_out": value if step == 6 else 1.0})
    assert saved_step(tmp_path) == 4 and len(read_metrics(tmp_path / METRICS)) == 5


@pytest.mark.parametrize("lr, steps", [(1e38, 1), (1e308, 1), (math.nan, 1), (math.inf, 1),
                                       (-1.0, 1), (1e5, 50)])
def test_learning_rates_that_overflow(tmp_path, lr, steps):
    """Weights that are not finite are never saved, not even those of the last step."""
    p = nn.Parameter(torch.ones(3, 3) * 1e34)
    with pytest.raises((InputError, ValueError)) as caught:
        fit({"p": p}, lambda *_: (p.square().sum().sqrt() * 1e4, {}), tmp_path, steps=steps, lr=lr,
            warmup=0, weight_decay=1.0, save_every=1)
    assert isinstance(caught.value, InputError) or lr < 0 or math.isnan(lr)
    if (tmp_path / STATE).exists():
        assert torch.isfinite(load_file(tmp_path / STATE)["weight.p"]).all()


@pytest.mark.parametrize("lr", ["1e30", "1e308", "inf", "0"])
def test_learning_rates_on_the_command_line(run, tmp_path, lr):
    """One line before anything is loaded."""
    for how in ({}, {"main": memdlm.main, "argv": ["train"]}):
        code, err = run("--lr", lr, **how)
        assert code == 2 and "--lr" in err and err.count("\n") == 1
    assert not os.path.exists(tmp_path / "out")


def test_weights_that_overflow_at_the_last_step(tmp_path):
    """The last good checkpoint stays, and nothing is said to be done."""
    p = nn.Parameter(torch.full((2, 2), 3e38))

    def loss_fn(step, micro):
        return (p * (0 if step < 4 else -1e-30)).sum(), {}

    with pytest.raises(InputError, match="weight.p is not finite after step 5"):
        fit({"p": p}, loss_fn, tmp_path, steps=5, lr=1e6, warmup=0, weight_decay=-1e3,
            save_every=1, schedule=lambda step, *_: float(step == 4))
    assert saved_step(tmp_path) == 4


def test_a_mended_run_ends_as_one_left_alone(tmp_path):
    """After any of these the folder goes on."""
    toy_run(tmp_path / "out", steps=4)
    path = tmp_path / "out" / METRICS
    path.write_bytes(path.read_bytes() + b"\x00\x00{")
    toy_run(tmp_path / "out", steps=4)
    toy_run(tmp_path / "whole", steps=4)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
