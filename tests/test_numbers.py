"""Numbers beyond sense, names that name nothing and devices that are none: one line at once, from
every command."""
from __future__ import annotations

import time

import pytest
import torch
from conftest import ROOT

import bench
import sample
import train
from lib.cli import InputError, command, device_of, widest
from lib.draws import gumbel
from studies import footprint, memdlm, picture, pretrain, probe

MANY = str(10 ** 9)
COMMANDS = {
    "sample": (sample.main, []), "train": (train.main, []),
    "accuracy": (bench.main, ["accuracy"]), "speed": (bench.main, ["speed"]),
    "tiny": (pretrain.main, ["tiny", "--out", "x"]), "show": (pretrain.main, ["show", "chain"]),
    "memdlm train": (memdlm.main, ["train"]), "memdlm sample": (memdlm.main, ["sample"]),
    "memdlm bench": (memdlm.main, ["bench", "--standard", "x", "--memdlm", "y"]),
    "probe": (probe.main, []), "footprint": (footprint.main, ["--ckpt", "tiny"]),
    "picture": (picture.main, ["--memory", str(ROOT / "checkpoints/tiny/metastate.safetensors")])}
NUMBERS = {
    "sample": "gen-length block-length steps refresh top-k batch-size",
    "train": "steps slots width batch-size micros K max-length warmup save-every eval-every",
    "accuracy": "budgets prompts", "speed": "lengths prompt gen block train warmup repeat",
    "tiny": "steps batch-size", "show": "number",
    "memdlm train": "steps rank K batch-size micros slow-rank max-length",
    "memdlm sample": "gen-length steps top-k",
    "memdlm bench": "lengths prompts steps train-length batch-size repeat",
    "probe": "number n-masks samples after steps topk", "footprint": "tokens K",
    "picture": "steps"}
REALS = {"sample": "delay temperature alg-temp cfg-scale threshold top-p",
         "train": "lr lam concentration", "accuracy": "thresholds", "speed": "threshold",
         "tiny": "lr", "memdlm train": "lr alpha share inner-lr clip",
         "memdlm sample": "temperature"}
NAMES = {"sample": "device ckpt memory prompts dtype", "train": "device ckpt data out",
         "accuracy": "device ckpt memory reset plot tasks", "speed": "device ckpt",
         "tiny": "device out", "memdlm train": "device ckpt data out",
         "memdlm sample": "device fast-weights memory",
         "memdlm bench": "device standard memdlm also kinds",
         "probe": "device ckpt memory plot unigram prompts", "footprint": "ckpt",
         "picture": "device ckpt memory out task"}


def cases(table: dict[str, str], *values: str) -> list[tuple[str, str, str]]:
    """(command, option, value) of a table of options."""
    return [(command, f"--{option}", value) for command, options in table.items()
            for option in options.split() for value in values]


@pytest.mark.parametrize("command, option, value", [
    *cases(NUMBERS, MANY, "9" * 5000, "-1", "nan"), *cases(REALS, "1e308", "nan", "-inf", "1e999"),
    *cases(NAMES, "")], ids=lambda x: x[:20])
def test_no_sense_in_any_command(monkeypatch, tmp_path, capsys, command, option, value):
    """Before any work begins, and in a second or two."""
    main, argv = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    assert main([*argv, f"{option}={value}"]) == 2
    out, err = capsys.readouterr()
    assert time.perf_counter() - began < 5 and err.count("\n") == 1 and len(err) < 6000
    assert err.startswith("error: ") and "Traceback" not in err
    assert option.strip("-").split("-")[-1] in err or option == "--ckpt" and "checkpoint ''" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=repr)
def test_what_does_not_fit(capsys, error):
    """Sizes that make sense and are too large for this machine."""
    @command
    def main(argv=None):
        raise error

    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory: ") and err.count("\n") == 1


# ------------------------------------------------------------------ devices
@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "hpu", "xla", "lazy", "mkldnn", "cuda:99",
                                  "privateuseone", "", " ", "cpu ", "CPU", "gpu", "cuda:-1",
                                  "cuda:1e9", "x" * 5000], ids=lambda x: x[:20])
def test_devices_that_are_not_to_be_had(name, recwarn):
    """Not there, not built in, or none that computes: one line, and no warning of torch's."""
    with pytest.raises(InputError, match="device") as caught:
        device_of(name)
    assert "\n" not in str(caught.value) and not recwarn.list


def test_noise_is_as_wide_as_the_device_has(monkeypatch):
    """MPS has no float64."""
    assert widest(torch.device("cpu")) == torch.float64 == gumbel(torch.zeros(3), None).dtype
    assert widest(torch.device("mps")) == torch.float32
    monkeypatch.setattr("lib.draws.widest", lambda device: torch.float32)
    assert gumbel(torch.zeros(3), None).dtype == torch.float32
