"""The bench: who is compared with whom, what counts as a forward, what its tables say, and the
operations that the speeds are shares of."""
from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, FAMILIES, seeded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from lib.bench_options import bench_parser, check_speed
from lib.cli import InputError
from metastate import MetaState
from model import DREAM_7B, LLADA_8B, Backbone, Cache, load
from sample import denoise, generate
from tasks import TASKS, draw

LENGTH = 24  # of the tiny model's answers


@pytest.fixture(scope="module")
def tiny():
    """The tiny model and its tokenizer; not to be edited."""
    return load("tiny", "cpu")


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> list[str]:
    """A memory that changes answers, and two that are untrained: they change nothing."""
    folder = tmp_path_factory.mktemp("memories")
    paths = [str(folder / f"{i}.safetensors") for i in range(3)]
    for i, path in enumerate(paths):
        memory = MetaState.for_backbone(tiny[0], generator=seeded(i))
        if i == 0:
            with torch.no_grad():
                memory.injector.attention.out.weight.normal_(0, 0.3, generator=seeded(1))
        memory.save(path)
    return paths


def result_of(capsys, *argv: str) -> tuple[list[str], dict]:
    """The lines that bench.py prints with --json, and what its last line holds."""
    assert bench.main([*argv, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def refused(capsys, *argv: str) -> str:
    """The one line with which bench.py ends before it prints anything else."""
    assert bench.main([*argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# ------------------------------------------------------------------ accuracy
@pytest.mark.parametrize("name", ["sudoku", "follow"])
def test_forwards_are_counted_per_prompt(tiny, name):
    """In a batch that decodes by threshold a prompt is charged until its own last token, as if it
    had been alone; by schedule all take the same."""
    (backbone, tokenizer), rng = tiny, random.Random(0)
    prompts, by = [draw(name, rng, False)[0] for _ in range(5)], {"steps": LENGTH, "threshold": 0.9}
    verdicts, forwards = bench.solve(backbone, tokenizer, TASKS[name], prompts, LENGTH, **by)
    alone = [generate(backbone, torch.tensor([tokenizer.encode(prompt)]), gen_length=LENGTH,
                      block_length=LENGTH, **by).forwards for prompt in prompts]
    assert forwards == alone and len(verdicts) == 5
    assert bench.solve(backbone, tokenizer, TASKS[name], prompts, LENGTH, 2, steps=6)[1] == [6] * 5
    # in batches of 2, 2 and 1 or all at once: the same verdicts
    assert bench.solve(backbone, tokenizer, TASKS[name], prompts, LENGTH, 2, **by) == (
        verdicts, forwards)


def test_nobody_is_charged_for_others_blocks():
    """Where answers have several blocks, a row of a batch waits at the end of each for the others:
    it is charged what it would take alone."""
    (backbone, tokenizer), rng = load("stories", "cpu"), random.Random(0)
    prompts, by = [draw("stories", rng, True)[0] for _ in range(3)], {"steps": 64, "threshold": 0.9}
    batch, alone = (bench.solve(backbone, tokenizer, TASKS["stories"], prompts, 64, size, **by)[1]
                    for size in (3, 1))
    whole = [generate(backbone, torch.tensor([tokenizer.encode(prompt)]), gen_length=64,
                      block_length=32, **by).forwards for prompt in prompts]
    assert batch == alone == whole and len({*whole}) > 1


def test_what_decodes_may_be_wrapped(tiny):
    """`decode` gets what `generate` takes, each batch's ids and pads among it, and what it returns
    is judged."""
    (backbone, tokenizer), seen = tiny, []

    def decode(backbone, ids, *, pad_mask, **options):
        seen.append((ids.shape, pad_mask.shape, options["steps"]))
        sample = generate(backbone, ids, pad_mask=pad_mask, **options)
        return sample._replace(ids=sample.ids.index_fill(1, torch.tensor([ids.shape[1]]), 5))

    prompts = [draw("sums", random.Random(i), False)[0] for i in range(3)]
    verdicts, _ = bench.solve(backbone, tokenizer, TASKS["sums"], prompts, LENGTH, 2, steps=LENGTH)
    spoilt, _ = bench.solve(backbone, tokenizer, TASKS["sums"], prompts, LENGTH, 2, decode,
                            steps=LENGTH)
    assert verdicts == [True] * 3 and spoilt == [False] * 3
    assert [shape[0] for shape, _, _ in seen] == [1, 2] and seen[0][2] == LENGTH
    assert all(shape == pads for shape, pads, _ in seen)


def test_the_table_and_its_json(files, capsys):
    """Every variant, task and setting has a row; an untrained memory is the frozen backbone, so its
    lead is 0; what is printed is what the JSON says."""
    table, result = result_of(
        capsys, "accuracy", "--tasks", "sudoku,sums", "--prompts", "4", "--budgets", "4,8",
        "--thresholds", "0.9", "--memory", *files[1:], "--reset", files[0])
    rows = {(r["task"], r["variant"], r["setting"]): r for r in result["rows"]}
    assert len(rows) == 3 * 4 * 3 and result["prompts"] == 4
    assert 0 < rows["mean", "frozen", "3 steps"]["accuracy"] < 100  # so equal says something
    for (task, variant, setting), row in rows.items():
        assert row["low"] - 1e-9 <= row["accuracy"] <= row["high"] + 1e-9
        assert len(row["seeds"]) == {"frozen": 1, "reset": 1}.get(variant, 2)
        frozen = rows[task, "frozen", setting]
        assert variant == "reset" or row["accuracy"] == frozen["accuracy"]
        assert setting.startswith("thr") or row["forwards"] == int(setting.split()[0])
        [line] = [line for line in table if line.startswith(f"| {task} | {variant} |")]
        assert f"{row['accuracy']:.1f} ({row['low']:.0f}-{row['high']:.0f})" in line
    assert rows["mean", "frozen", "3 steps"]["accuracy"] == pytest.approx(np.mean(
        [rows[task, "frozen", "3 steps"]["accuracy"] for task in ("sudoku", "sums")]))
    leads = {lead["minus"]: lead for lead in result["leads"]}
    for minus in ("frozen", "shuffled"):
        assert [leads[minus][k] for k in ("points", "low", "high")] == pytest.approx([0] * 3)
    assert "reset" in leads and result["forwards_share"] is None  # no column at full length


def test_the_map_in_seconds(files, capsys):
    """--alone N: what one answer takes by itself, in each cell and on a front of its own; without
    it neither."""
    argv = ["accuracy", "--tasks", "sums", "--prompts", "3", "--budgets", "4,24", "--thresholds",
            "0.9", "--memory", files[1], "--reset"]
    table, result = result_of(capsys, *argv, "--alone", "2")
    assert all(r["seconds"] > 0 for r in result["rows"])
    # one row: a single task is its own mean
    assert [line.count(" ms") for line in table if "| frozen |" in line] == [3]
    slow, fast = (r["seconds"] for r in result["rows"][:2])
    assert slow > fast  # six steps against one
    assert [(f["variant"], f["by"]) for f in result["fronts"]] == [
        (v, by) for by in ("forwards", "seconds") for v in ("frozen", "MetaState", "shuffled")]
    assert sum(line.startswith("front of ") for line in table) == 6
    differences = {(d["minus"], d["setting"]): d["points"] for d in result["differences"]}
    assert set(differences) == {(minus, setting) for minus in ("frozen", "shuffled")
                                for setting in ("6 steps", "1 steps", "threshold 0.9")}
    assert differences["frozen", "6 steps"] == 0  # an untrained memory
    table, result = result_of(capsys, *argv)
    assert all(r["seconds"] is None for r in result["rows"]) and " ms" not in "".join(table)
    assert {f["by"] for f in result["fronts"]} == {"forwards"}


def test_a_variant_of_ones_own_is_paired_with_the_others(files, capsys):
    """--also NAME=FILES: a column of rows and a lead over it; names that are taken are refused."""
    argv = ["accuracy", "--tasks", "sums", "--prompts", "3", "--budgets", "8", "--thresholds", "",
            "--memory", files[1], "--reset"]
    table, result = result_of(capsys, *argv, "--also", f"mine={files[0]},{files[2]}")
    seeds = {r["variant"]: len(r["seeds"]) for r in result["rows"] if r["task"] == "mean"}
    assert seeds == {"frozen": 1, "MetaState": 1, "shuffled": 1, "mine": 2}
    assert {lead["minus"] for lead in result["leads"]} == {"frozen", "shuffled", "mine"}
    for also in (f"reset={files[0]}", f"mean={files[0]}", str(files[0]), f"={files[0]}", "mine",
                 "mine="):
        assert "--also" in refused(capsys, *argv, "--also", also)


def test_rows_are_printed_as_they_are_measured(files, capsys, monkeypatch):
    """Who interrupts a long table keeps the rows that stand."""
    solved, solve = [], bench.solve

    def until_the_fourth(*args, **options):
        solved.append(1)
        if len(solved) == 4:
            raise InputError("enough")
        return solve(*args, **options)

    monkeypatch.setattr(bench, "solve", until_the_fourth)
    assert bench.main(["accuracy", "--tasks", "sums,chain", "--prompts", "2", "--budgets", "8,12",
                       "--thresholds", "", "--memory", "--reset"]) == 2
    out = capsys.readouterr().out
    assert "| sums | frozen |" in out and "| chain |" not in out


def test_any_budget_has_its_steps(files, capsys):
    """Steps are the answer's length by the budget, rounded up; budgets of equal steps are one
    column, and one beyond the length is a single step. Only those with less than a step per token
    count as reduced; an untrained memory never needs more forwards than the frozen backbone."""
    argv = ["accuracy", "--tasks", "sums", "--prompts", "2", "--thresholds", "", "--memory",
            files[1], "--reset", "--budgets"]
    _, result = result_of(capsys, *argv, "5,16,1,20,100")
    settings = list(dict.fromkeys(r["setting"] for r in result["rows"]))
    assert settings == ["5 steps", "2 steps", "24 steps", "1 steps"]
    assert [r["forwards"] for r in result["rows"]][:4] == [5, 2, 24, 1]
    assert result["leads"] and 0 < result["forwards_share"] <= 1
    _, result = result_of(capsys, *argv, "1")
    assert result["leads"] == []


def test_the_shipped_memories_are_memory(capsys):
    """The files beside the tiny model are found without being named: three training seeds and
    three of the control. In a quarter of the steps each seed leads the frozen backbone and every
    seed of the control by far, and so does their mean, also over themselves with the memories of
    other prompts."""
    _, result = result_of(capsys, "accuracy", "--tasks", "chain,sums", "--budgets", "4",
                          "--prompts", "20", "--thresholds", "")
    seeds = {r["variant"]: r["seeds"] for r in result["rows"] if r["task"] == "mean"}
    assert [len(seeds[v]) for v in ("frozen", "MetaState", "shuffled", "reset")] == [1, 3, 3, 3]
    assert min(seeds["MetaState"]) > max(seeds["frozen"] + seeds["reset"]) + 20
    assert {lead["minus"] for lead in result["leads"]} == {"frozen", "shuffled", "reset"}
    assert all(lead["points"] > 25 and lead["low"] > 15 for lead in result["leads"])


def test_defaults_are_what_the_checkpoint_states(small_ckpt, tmp_path, capsys):
    """Tasks and the length of an answer come from its generation_config.json; the memories beside a
    checkpoint that names no tasks are not taken unasked."""
    folder = shutil.copytree(small_ckpt, tmp_path / "ckpt")
    argv = ["accuracy", "--ckpt", str(folder), "--prompts", "2", "--budgets", "4",
            "--thresholds", ""]
    MetaState.for_backbone(load(folder, "cpu")[0]).save(folder / "metastate-9.safetensors")
    stated = {"max_new_tokens": 30, "tasks": ["sums", "follow"]}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    _, result = result_of(capsys, *argv)
    assert {(r["task"], r["setting"]) for r in result["rows"]} == {
        (task, "8 steps") for task in ("sums", "follow", "mean")}
    assert {r["variant"] for r in result["rows"]} == {"frozen", "MetaState", "shuffled"}

    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 30}))
    assert "--tasks" in refused(capsys, *argv)
    _, result = result_of(capsys, *argv, "--tasks", "chain")
    assert {r["variant"] for r in result["rows"]} == {"frozen"}

    (folder / "generation_config.json").write_text(json.dumps({"tasks": ["chess"]}))
    line = refused(capsys, *argv)
    assert "chess" in line and "sudoku" in line


def test_prompts_that_the_model_has_no_room_for(capsys):
    """They are refused before the tasks that fit are decoded."""
    room = str(load("tiny", "cpu")[0].config.max_len)
    assert room in refused(capsys, "accuracy", "--tasks", "sums,needle1-256", "--prompts", "9",
                           "--memory", "--reset")


def test_the_same_seed_asks_the_same_prompts(capsys):
    """Two runs print the same table; another seed picks other prompts."""
    tables = []
    for seed in ("0", "0", "1"):
        assert bench.main(["accuracy", "--tasks", "sudoku", "--prompts", "12", "--budgets", "8",
                           "--thresholds", "", "--memory", "--reset", "--seed", seed]) == 0
        tables.append(capsys.readouterr().out.splitlines()[2])
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


@pytest.mark.parametrize("argv, words", [
    (["--tasks", "chess"], ["chess", "sudoku"]), (["--budgets", "0"], ["--budgets", "0"]),
    (["--budgets", "1,,2"], ["--budgets"]), (["--thresholds", "0.5,x"], ["'x'"]),
    (["--thresholds", "1.5"], ["1.5"]), (["--thresholds", "nan"], ["nan"]),
    (["--prompts", "0"], ["--prompts"]), (["--memory", "none.safetensors"], ["none.safetensors"]),
    (["--ckpt", "stories", "--budgets", "2,3"], ["54 steps", "5 blocks"]),
    (["--ckpt", str(DATA / "llada")], ["tokenizer"])], ids=str)
def test_arguments_that_make_no_sense(argv, words, capsys):
    """One line and exit code 2, before anything is decoded."""
    line = refused(capsys, "accuracy", *argv)
    assert all(word in line for word in words)


def test_what_the_plot_lacks_is_said_at_once(tmp_path, monkeypatch, capsys):
    """Without matplotlib: one line that says what to install, before anything is decoded. With it:
    a file."""
    argv = ["accuracy", "--tasks", "sums", "--prompts", "2", "--budgets", "8", "--memory",
            "--reset", "--plot", str(tmp_path / "plot.png")]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        assert "pip install matplotlib" in refused(capsys, *argv)
    pytest.importorskip("matplotlib")
    assert bench.main(argv) == 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------ speed
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(backbones, family):
    """For a whole sequence, and for a block with a cache: counted operation by operation."""
    backbone = backbones[family]
    c, ids, where = backbone.config, torch.randint(400, (1, 20)), torch.arange(15, 20)[None]
    for cache, first in ((None, 0), (Cache(backbone, 1, 20), 12)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            backbone.logits(denoise(backbone, ids, where, cache=cache, first=first)[0])
        flops, moved = bench.work_of(c, 20 - first, 20, 5, 4)
        assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
        read = sum(p.numel() for p in backbone.parameters()) - c.vocab * c.dim
        seen = 0 if cache is None else 2 * sum(k[..., :first, :].numel() for k in cache.k)
        assert moved == pytest.approx(4 * (read + seen), rel=0.01)


@pytest.mark.parametrize("config", [LLADA_8B, DREAM_7B], ids=["llada-8b", "dream-7b"])
def test_the_memory_adds_little_at_8b(config, monkeypatch, length=256):
    """At the true shapes it costs at most 3% of a full-sequence step and 10% of a block step, in
    floating-point operations. Counted with two of the blocks, which do as much each as the others
    that `work_of` adds."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # none on meta
    with torch.device("meta"):
        backbone = Backbone(replace(config, layers=2))
        backbone.fingerprint = lambda: ""
        memory = MetaState.for_backbone(backbone)
        ids, half = torch.zeros(1, length, dtype=torch.long), length // 2
        where = torch.arange(half, half + 32)[None]
        for cache, first, most in ((None, 0, 0.03), (Cache(backbone, 1, length), half, 0.1)):
            flops, computed = [], 32 if first else length
            for used in (None, memory):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    h, _ = denoise(backbone, ids, where, memory=used, state=memory.initial(1),
                                   cache=cache, span=(half, half), first=first,
                                   last=first + 32 if first else None)
                    backbone.logits(h)
                flops.append(counter.get_total_flops())
            two, all_of_them = (bench.work_of(c, computed, length, 32, 2)[0]
                                for c in (backbone.config, config))
            assert flops[0] == pytest.approx(two, rel=0.01) and all_of_them > 4e11
            assert 0.001 < (flops[1] - flops[0]) / all_of_them < most


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flash_attention_is_asserted(family, monkeypatch):
    """Without padding it can be chosen; where it cannot (here: three dimensions) that is said."""
    backbone, _ = load(DATA / family, "cpu")
    bench.flash_attention(backbone, 16)
    monkeypatch.setattr(backbone, "hidden", lambda e: F.scaled_dot_product_attention(e, e, e))
    with pytest.raises(InputError, match="FlashAttention"):
        bench.flash_attention(backbone, 16)


def test_random_ids_are_never_the_mask(backbone):
    """All other ids may come."""
    ids = bench.random_ids(backbone, 20_000, seeded())
    c = backbone.config
    assert set(ids.unique().tolist()) == set(range(c.vocab)) - {c.mask_id}


SPEED = ["speed", "--ckpt", f"random:{DATA / 'llada'}", "--lengths", "48,64", "--gen", "4",
         "--block", "4", "--prompt", "9", "--train", "16", "--warmup", "0", "--repeat", "1",
         "--device", "cpu", "--dtype", "float32", "--threshold", "0.9"]


def test_speed_measures_what_it_names(capsys):
    """A small config with random weights: every step, generation, training step and cross-entropy
    has its row for each batch, without a run to warm up too, and shares follow from its figures."""
    table, result = result_of(capsys, *SPEED, "--batches", "1,3")
    assert result["product_flops"] > 1e8 and result["copy_bytes"] > 1e8
    rows = {row["what"]: row for row in result["rows"]}
    assert len(rows) == 2 * (2 * 3 * 2 + 3 * 2 * 2 + 3)
    assert sum(what.endswith(", batch 3") for what in rows) == len(rows) / 2
    for what, row in rows.items():
        assert 0 < row["low"] <= row["seconds"] <= row["high"] and row["first"] > 0
        assert any(line.startswith(f"| {what} |") for line in table)
        if row["flops"]:
            assert row["flops_share"] == pytest.approx(
                row["flops"] / row["seconds"] / result["product_flops"])
        if what.startswith("generate"):
            assert 0 < row["first_token"] < row["high"]
            assert row["tokens"] == (12 if "batch 3" in what else 4)
        if what.startswith("generate") and "None, mem" in what:
            assert row["forwards"] == 4
    assert rows["dual-cache block step, 64 tokens, memory off"]["flops"] < \
        rows["prefix-cache step, 64 tokens, memory off"]["flops"] / 3 < \
        rows["full-sequence step, 64 tokens, memory off"]["flops"] / 5
    update = rows["training step, K = 4, 16 tokens, checkpointing on"]
    assert update["tokens"] == 16 and update["flops"] == \
        6 * 4 * 16 * load(DATA / "llada", "cpu")[0].config.parameters
    first = next(line for line in table if "first whole result" in line)
    assert f"{result['first_result']:.1f} s" in first


def test_a_quick_look_at_speed(capsys):
    """--quick takes fewer rows and runs, says all that was not asked otherwise, and leaves what
    was."""
    argv = ["speed", "--ckpt", f"random:{DATA / 'llada'}", "--quick", "--device", "cpu", "--gen",
            "4", "--block", "4", "--prompt", "9", "--dtype", "float32", "--lengths", "32",
            "--train", "8"]
    table, result = result_of(capsys, *argv)
    assert len(result["rows"]) == 4 + 3 * 2 + 3 and "medians of 3 after 1 " in table[0]
    assert not any("prefix" in row["what"] and "generate" in row["what"] for row in result["rows"])


@pytest.mark.parametrize("flags", [[], ["--quick"]], ids=str)
def test_what_is_not_asked_fits_the_default_model(tiny, flags):
    """Lengths, generation and update have room in it."""
    args = bench_parser("", TASKS).parse_args(["speed", *flags])
    check_speed(args)
    longest = max(*args.lengths, args.prompt + args.gen, args.train or 0)
    assert longest <= tiny[0].config.max_len


@pytest.mark.parametrize("argv, words", [
    (["--block", "64"], ["--block", "64"]), (["--gen", "10"], ["--gen"]),
    (["--lengths", "999999"], ["999999"]), (["--prompt", "999999"], ["model's"]),
    (["--warmup", "-1"], ["--warmup"]), (["--repeat", "0"], ["--repeat"]),
    (["--threshold", "nan"], ["--threshold"])], ids=str)
def test_speeds_that_cannot_be_taken(argv, words, capsys):
    """One line and exit code 2, before anything is measured."""
    line = refused(capsys, *SPEED, *argv)
    assert all(word in line for word in words)
