"""The probe's probabilities and metrics, what is printed of them, and the marginal trap."""
from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, EOS_ID, FAMILIES, MASK_ID, awake, boosted, prompts_of, seeded
from safetensors.torch import load_file

from lib.cli import InputError
from metastate import MetaState
from model import load
from sample import denoise, generate
from studies import probe as tool
from studies.probe import (exact, metrics, outcomes, probe, probe_after, strip, trap_row,
                           unigram_of)
from tasks import draw

CPU = ["--device", "cpu"]
LN2 = math.log(2)


def prompt(length: int) -> list[int]:
    """Random ids that are neither mask nor EOS."""
    return prompts_of([length])[0]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """By its definition, in float64."""
    e = (logits.double() - logits.double().amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)).float()


class Known:
    """A backbone whose logits at sequence position i are the i-th row of a table, whatever the
    tokens are: `shift` is Dream's, whose row i is for token i + 1."""

    def __init__(self, table: torch.Tensor, shift: bool = False, mask_id: int = 0, eos_id: int = 1):
        self.table, self.seen = table, []
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.config = SimpleNamespace(vocab=table.shape[1], max_len=len(table), shift=shift,
                                      mask_id=mask_id, eos_id=eos_id)

    def embed(self, ids):
        self.seen.append(ids)
        return F.one_hot(ids, self.table.shape[1]).float()

    def hidden(self, e, *_):
        return self.table[:e.shape[1]].expand(len(e), -1, -1).clone()

    def logits(self, h):
        return h


# ------------------------------------------------------------------ probabilities
def test_probabilities_are_the_softmax_of_the_published_logits(family):
    """Row 0 of the oracle is a prompt of 20 tokens. With its published hidden states in place of
    ours, the probe reads the published logits: at the masks themselves for LLaDA, one position
    earlier for Dream."""
    backbone, _ = load(DATA / family, "cpu")
    oracle = load_file(DATA / family / "oracle.safetensors")
    ids, length = oracle["input_ids"][0].tolist(), oracle["input_ids"].shape[1]
    assert MASK_ID not in ids[:20]
    backbone.hidden = lambda e, *_: oracle["hidden_3"][:1]
    found = probe(backbone, ids[:20], length - 20)
    first = 19 if family == "dream" else 20
    expected = softmax(oracle["logits"][0, first:first + length - 20])
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    other = softmax(oracle["logits"][0, 39 - first:39 - first + length - 20])
    assert (found - other).abs().max() > 0.01


@torch.no_grad()
def test_probabilities_are_a_plain_softmax_of_one_forward(backbone, family):
    """Of the whole model (whose logits are the published ones) over the prompt and the masks: no
    temperature, neither EOS nor the mask token suppressed."""
    ids, n = prompt(11), 9
    logits = backbone(torch.tensor([ids + [MASK_ID] * n]))[0]
    expected = softmax(logits[10:19] if family == "dream" else logits[11:20])
    found = probe(backbone, ids, n)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(n))
    assert (found[:, [MASK_ID, EOS_ID]] > 0).all()


@pytest.mark.parametrize("shift", [False, True], ids=FAMILIES)
def test_a_model_whose_distributions_are_known(shift):
    """Every position has a distribution of its own by construction: the probe finds each at its
    place, from one forward over the prompt and the masks."""
    p = torch.softmax(torch.randn(12, 7, generator=seeded()), -1)
    model = Known(p.log(), shift)
    found = probe(model, [3, 4, 5, 6, 2], 7)
    torch.testing.assert_close(found, p[4:11] if shift else p[5:])
    assert [x.tolist() for x in model.seen] == [[[3, 4, 5, 6, 2] + [0] * 7]]


@torch.no_grad()
def test_after_k_steps(backbone):
    """Against the steps written out: the most probable tokens but the mask, at the positions drawn
    from the generator; what is left is probed, at its distance."""
    ids = torch.tensor([prompt(11) + [MASK_ID] * 10])
    g = seeded(5)
    for count in (3, 3):  # 10 positions in 4 steps: 3, 3, 2, 2
        where = (ids[0] == MASK_ID).nonzero()[:, 0]
        logits = backbone.logits(denoise(backbone, ids, where[None])[0])
        logits[..., MASK_ID] = -torch.inf
        for i in torch.randperm(len(where), generator=g)[:count].tolist():
            ids[0, where[i]] = logits[0, i].argmax()
    where = (ids[0] == MASK_ID).nonzero()[:, 0]
    expected = softmax(backbone.logits(denoise(backbone, ids, where[None])[0])[0])
    distance, found = probe_after(backbone, prompt(11), 10, 2, None, 4, seeded(5))
    assert distance.tolist() == (where - 10).tolist() and len(distance) == 4
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    with boosted(backbone, MASK_ID, 50.0):  # the mask token is probable, and is no candidate
        distance, found = probe_after(backbone, prompt(11), 10, 2, None, 4)
    assert len(distance) == 4 and (found[:, MASK_ID] > 0.9).all()


def test_memory_off_and_on(backbone):
    """An untrained memory changes nothing, bit for bit; one that writes does. Both look at the same
    positions, and the second sees the state that the steps before handed on."""
    def run(memory, after):
        return probe_after(backbone, prompt(11), 12, after, memory, None, seeded(1))

    moved = awake(backbone)
    for after in (0, 5):
        (where, plain), (same, asleep), (also, on) = (
            run(m, after) for m in (None, MetaState.for_backbone(backbone), moved))
        assert torch.equal(plain, asleep) and not torch.allclose(plain, on)
        assert where.tolist() == same.tolist() == also.tolist() and len(where) == 12 - after
    states = []
    moved.inject, inject = lambda e, s, *a: states.append(s) or inject(e, s, *a), moved.inject
    run(moved, 2)
    assert len(states) == 3 and torch.equal(states[0], moved.initial(1))
    assert not torch.allclose(states[1], states[0]) and not torch.allclose(states[2], states[1])


# ------------------------------------------------------------------ metrics
def test_metrics_in_closed_form():
    """Uniform, certain, certain of EOS, one half each, and the unigram distribution itself."""
    V, eos = 40, 7
    u = torch.full((V,), 0.5 / (V - 20))
    u[:20] = 0.5 / 20
    u[:20] += 1e-4  # the 20 most frequent
    u /= u.sum()
    p = torch.zeros(5, V)
    p[0], p[4] = 1 / V, u
    p[1, 3] = p[2, eos] = 1
    p[3, [3, 30]] = 0.5
    m = metrics(p, eos, u)
    assert m["top1"] == pytest.approx([1 / V, 1, 1, 0.5, float(u.max())])
    assert m["entropy"] == pytest.approx(
        [math.log(V), 0, 0, LN2, float(-(u * u.log()).sum())], abs=1e-5)
    assert m["eos"] == pytest.approx([1 / V, 0, 1, 0, float(u[eos])])
    assert m["frequent"] == pytest.approx([0.5, 1, 1, 0.5, float(u[:20].sum())])
    a, b = float(u[0]), float(u[30])
    assert m["kl"] == pytest.approx(
        [-math.log(V) - (math.log(a) + math.log(b)) / 2, -math.log(a), -math.log(a),
         -LN2 - (math.log(a) + math.log(b)) / 2, 0], abs=1e-5)
    assert m["tv"][:3] == pytest.approx([1 - 1 / V, 1, 1]) and np.isnan(m["tv"][4])
    assert m["tv"][3] == pytest.approx(1 - a - b, abs=1e-6)
    assert m["same"][:4].tolist() == [0, 0, 0, 0] and np.isnan(m["same"][4])
    assert metrics(p[[1, 1, 2, 2]], eos)["same"][:3].tolist() == [1, 0, 1]
    assert {"frequent", "kl"} == m.keys() - metrics(p, eos).keys()


def test_positions_that_are_no_neighbours():
    """After some steps the positions have gaps: across a gap nothing is compared."""
    p = torch.eye(4)
    m = metrics(p, 0, distance=torch.tensor([1, 2, 4, 5]))
    for name, value in (("tv", 1), ("same", 0)):
        assert m[name][[0, 2]].tolist() == [value, value] and np.isnan(m[name][[1, 3]]).all()


def test_the_unigram_distribution():
    """Counts, with a hundredth of the mass spread evenly; nothing to count is an error."""
    u = unigram_of([3, 3, 3, 1], 5)
    assert u.tolist() == pytest.approx([.002, .99 / 4 + .002, .002, .99 * 3 / 4 + .002, .002])
    with pytest.raises(InputError, match="empty"):
        unigram_of([], 5)


@pytest.mark.parametrize("n, width", [(128, 50), (128, 200), (7, 7), (1, 30), (129, 128)])
def test_the_strip_is_as_wide_as_it_may_be(n, width):
    """One character a position, or `width` where there are more; higher is darker."""
    line = strip(np.linspace(0, 2, n), width, 2)
    assert len(line) == min(n, width)
    levels = [tool.BARS.index(c) for c in line]
    assert levels == sorted(levels) and (n == 1 or (levels[0], levels[-1]) == (0, 8))


def test_the_strip_shows_what_was_not_measured():
    """A range without a value is a dot; one with some is their mean; nothing leaves the scale."""
    nan = math.nan
    assert strip(np.array([0, nan, 1, 9, -1]), 9, 1) == " ·██ "
    assert strip(np.array([nan, 1, nan, nan]), 2, 1) == "█·"


# ------------------------------------------------------------------ the command line
@pytest.fixture
def lines(capsys):
    """lines(*argv) -> the JSON lines that the probe prints."""
    def run(*argv) -> list[dict]:
        assert tool.main([*map(str, argv), "--json", *CPU]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return run


def test_prompts_of_many_different_lengths(lines, text_ckpt, tmp_path):
    """Each as if it were alone, and the means and spreads over all of them."""
    backbone, tokenizer = load(text_ckpt, "cpu")
    texts = [("abc def? " * 20)[:1 + length] for length in range(0, 100, 3)]
    texts[17] = 'a "quoted"\nline'
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(json.dumps({"prompt": t}) for t in texts))
    *records, last = lines("--ckpt", text_ckpt, "--prompts", file, "--n-masks", 6)
    assert [r["prompt"] for r in records] == texts and last["prompts"] == 34
    values = {"entropy": [], "tv": []}
    for text, record in zip(texts, records):
        p = probe(backbone, tokenizer.encode(text), 6)
        found = metrics(p, EOS_ID)
        assert [r["distance"] for r in record["positions"]] == [1, 2, 3, 4, 5, 6]
        for i, row in enumerate(record["positions"]):
            best = p[i].topk(3)
            assert [t["id"] for t in row["top"]] == best.indices.tolist()
            assert [t["p"] for t in row["top"]] == pytest.approx(best.values.tolist())
            assert row["entropy"] == pytest.approx(found["entropy"][i])
            assert "kl" not in row
        assert record["positions"][-1]["tv"] is None
        for name in values:
            values[name].append(found[name])
    means = last["by_distance"]["memory off"]
    for name in values:
        for i in range(6 - (name == "tv")):
            column = [v[i] for v in values[name]]
            assert means[name][i]["prompts"] == 34
            assert means[name][i]["mean"] == pytest.approx(np.mean(column))
            assert means[name][i]["sd"] == pytest.approx(np.std(column))
    assert means["tv"][5]["mean"] is None and last["unigram"] is None
    assert last["paper"][0] == "top" and set(last["ours"]) >= {"entropy", "kl", "tv", "same"}


def test_masks_take_what_room_the_model_has(lines, text_ckpt, tmp_path):
    """256 positions: 128 masks by default, fewer behind a long prompt, and the same number for all
    the prompts of a file; at least one has to fit."""
    def masks(*argv):
        return {len(r["positions"]) for r in lines("--ckpt", text_ckpt, "--topk", 1, *argv)[:-1]}

    assert masks("--prompt", "a" * 128) == {128}
    assert masks("--prompt", "a" * 129) == {127}
    assert masks("--prompt", "a" * 255) == {1}
    assert masks("--prompt", "a" * 250, "--n-masks", 6) == {6}
    (tmp_path / "two").write_text("short\n" + "a" * 200)
    assert masks("--prompts", tmp_path / "two") == {56}


def test_what_one_prompt_shows(text_ckpt, tmp_path, capsys):
    """A row a position with so many tokens; spaces, line ends, specials and parts of a character
    can be seen; the legend says what is the paper's and what is ours."""
    _, tokenizer = load(text_ckpt, "cpu")
    shown = [tool.visible(tokenizer, i) for i in (
        *tokenizer.encode("a b\n"), EOS_ID, tokenizer.encode("é")[0], 510)]
    assert shown[:5] == ["a", "␣", "b", "⏎", "<|eos|>"] and shown[6] == "#510"
    assert shown[5] and "\ufffd" not in shown[5]
    (tmp_path / "text").write_text("some text to count")
    assert tool.main(["--ckpt", str(text_ckpt), "--prompt", "hi", "--n-masks", "5", "--topk", "2",
                      "--unigram", str(tmp_path / "text"), *CPU]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line[:3].strip().isdigit()]
    assert [row[0] for row in rows] == list("12345")
    assert [len(row) for row in rows] == [11] * 4 + [9]  # the last has no next position
    assert "the paper's" in out and "Ours" in out and str(tmp_path / "text") in out
    bars = [line.split("|")[1] for line in out.splitlines() if line.count("|") == 2]
    assert len(bars) == 7 and {len(bar) for bar in bars} == {5}


def test_tiny_probes_its_own_tasks(lines):
    """By default held-out prompts of a task, beside the unigram distribution of the training
    answers; a seed picks the prompts."""
    first, again, other = (lines("--task", "sums", "--number", 2, "--n-masks", 4, "--seed", seed)
                           for seed in (0, 0, 1))
    assert first == again and first != other and len(first) == 3
    assert first[0]["prompt"].startswith("sums\n") and first[0]["positions"][0]["kl"] >= 0
    assert "training tasks" in first[2]["unigram"]
    assert lines("--n-masks", 1)[0]["prompt"].startswith("sudoku\n")


def test_the_checkpoint_names_what_is_asked(lines, small_ckpt, text_ckpt, tmp_path, capsys):
    """The first task that a checkpoint states is the default, and all of them are the unigram
    distribution's; any other task may be asked too."""
    found = lines("--ckpt", "haystack", "--n-masks", 2, "--seed", 3)
    expected = draw("needle1-64", random.Random(3), True)[0]
    assert found[0]["prompt"] == expected and "training tasks" in found[1]["unigram"]
    expected = draw("track2-128", random.Random(0), True)[0]
    assert lines("--task", "track2-128", "--n-masks", 2)[0]["prompt"] == expected
    foreign = lines("--ckpt", text_ckpt, "--task", "sums", "--n-masks", 2)
    assert foreign[0]["prompt"].startswith("sums") and foreign[1]["unigram"] is None
    folder = shutil.copytree(small_ckpt, tmp_path / "ckpt")
    (folder / "generation_config.json").write_text('{"tasks": ["chess"]}')
    assert tool.main(["--ckpt", str(folder), *CPU]) == 2
    assert "chess" in capsys.readouterr().err


def test_memory_on_the_command_line(lines, tmp_path, capsys):
    """Off and on beside each other, after half of the steps by default, at the same positions; off
    is what there is without the option."""
    backbone, _ = load("tiny", "cpu")
    file = tmp_path / "memory.safetensors"
    awake(backbone).save(file)
    (tmp_path / "text").write_text("a=1 b=2")  # reads faster than the tasks' answers are drawn
    argv = ["--task", "chain", "--number", 2, "--n-masks", 8, "--unigram", tmp_path / "text"]
    *records, last = lines(*argv, "--memory", file)
    assert [r["memory"] for r in records] == [False, True] * 2
    assert {r["after"] for r in records} == {4} and set(last["by_distance"]) == {
        "memory off", "memory on"}
    for off, on in zip(records[::2], records[1::2]):
        at = [[r["distance"] for r in x["positions"]] for x in (off, on)]
        assert at[0] == at[1] and len(at[0]) == 4
        assert off["positions"] != on["positions"]
    assert lines(*argv, "--after", 4)[:2] == records[::2]
    later = lines(*argv, "--memory", file, "--after", 3, "--steps", 4)
    assert [len(r["positions"]) for r in later[:-1]] == [2] * 4
    assert tool.main([*map(str, argv), "--memory", str(file), *CPU]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "|" not in line]
    for variant in ("memory off", "memory on"):
        assert [row.split()[0] for row in table if variant in row] == list("12345678")


LONG = "a" * 256


@pytest.mark.parametrize("argv, words", [
    (["--prompt", LONG], ["256 tokens", "256 positions"]),
    (["--prompt", "a" * 250, "--n-masks", "7"], ["250 tokens", "7 masks", "256"]),
    (["--prompt", "a", "--n-masks", "256"], ["--n-masks 256", "256 positions"]),
    (["--prompt", "a", "--n-masks", "0"], ["--n-masks", "0"]),
    (["--prompt", " "], ["empty"]), (["--prompts", "none.txt"], ["none.txt"]),
    (["--prompt", "a", "--topk", "0"], ["--topk", "0"]), ([], ["--prompt"]),
    (["--prompt", "a", "--task", "sums"], ["--prompt", "--task"]),
    (["--trap", "--prompt", "a"], ["--trap"]), (["--trap", "--memory", "x"], ["--memory"]),
    (["--trap", "--samples", "0"], ["--samples"]), (["--task", "chess"], ["chess", "sudoku"]),
    (["--prompt", "a", "--unigram", "none.txt"], ["none.txt"]),
    (["--prompt", "a", "--unigram", "EMPTY"], ["empty"]),
    (["--prompt", "a", "--memory", "none.safetensors"], ["none.safetensors"]),
    (["--prompt", "a", "--n-masks", "4", "--after", "4"], ["--after 4", "--steps 4"]),
    (["--prompt", "a", "--n-masks", "4", "--after", "-1"], ["--after", "-1"]),
    (["--prompt", "a", "--n-masks", "4", "--steps", "5"], ["--steps 5", "4 masks"]),
    (["--prompt", "a", "--seed", "-1"], ["-1"]), (["--ckpt", "random:tiny"], ["random:tiny"]),
    (["--prompt", "a", "--unknown"], ["--unknown"])], ids=lambda x: " ".join(x)[:40])
def test_bad_input(argv, words, text_ckpt, tmp_path, capsys):
    """One line that names the thing, exit code 2."""
    (tmp_path / "empty.txt").write_text("")
    argv = [str(tmp_path / "empty.txt") if a == "EMPTY" else a for a in argv]
    assert tool.main(["--ckpt", str(text_ckpt), *argv, *CPU]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(w in err for w in words)


def test_an_empty_prompt_of_ids(backbone):
    """Also for those who call the function."""
    with pytest.raises(InputError, match="empty"):
        probe(backbone, [], 4)


def test_the_plot_needs_matplotlib_alone(text_ckpt, tmp_path, monkeypatch, capsys):
    """Without it: one line that says what to install, before anything is computed."""
    argv = ["--ckpt", str(text_ckpt), "--prompt", "a", "--n-masks", "4", *CPU]
    argv += ["--plot", str(tmp_path / "plot.png")]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        assert tool.main(argv) == 2
        out, err = capsys.readouterr()
        assert "pip install matplotlib" in err and out == "" and err.count("\n") == 1
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    for bad in (str(tmp_path / "file" / "x.png"), str(tmp_path / "x.abc")):
        assert tool.main([*argv[:-1], bad]) == 2
        assert bad in capsys.readouterr().err
    assert tool.main(argv) == 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------ the marginal trap
@pytest.fixture(scope="module")
def trapped():
    """The fitted model and its memory, which is trained for less long than the command's."""
    backbone = tool.trap_model()
    return backbone, tool.trap_memory(backbone, updates=40)


class Perfect(Known):
    """The true conditional distributions of the two sentences."""

    def __init__(self):
        super().__init__(torch.zeros(4, len(tool.WORDS)), mask_id=tool.MASK)

    def hidden(self, e, *_):
        log_p = torch.full(e.shape, -1e4)  # e to that power is 0
        for b, row in enumerate(e.argmax(-1)[:, 1:].tolist()):
            fitting = [d for d in tool.DATA if all(w in (tool.MASK, x) for w, x in zip(row, d))]
            for d in fitting or tool.DATA:
                log_p[b, torch.arange(1, 4), torch.tensor(d)] = -math.log(len(fitting) or 2)
        return log_p


def blank() -> torch.Tensor:
    return torch.tensor([tool.PROMPT + [tool.MASK] * 3])


@pytest.mark.parametrize("counts, unseen, kl", [
    ((3,), 0.75, 2 * LN2), ((2, 1), 0.5, LN2), ((1, 2), 0, 0), ((1, 1, 1), 0, 0)])
def test_the_exact_values(counts, unseen, kl):
    """What the chain rule gives is what enumeration of the perfect model gives: of 8 equally likely
    combinations 6 were never seen, two words drawn together agree half the time, and one visible
    word decides the others."""
    assert exact(counts) == pytest.approx((unseen, kl))
    row = trap_row(Perfect(), None, counts)
    assert (row["unseen"], row["kl"]) == pytest.approx((unseen, kl), abs=1e-6)
    chances = outcomes(Perfect(), blank(), counts)
    assert sum(chances.values()) == pytest.approx(1)
    if counts == (3,):
        assert [q for q in chances.values() if q > 0] == pytest.approx([1 / 8] * 8)


@pytest.mark.parametrize("used", ["without", "with"])
@pytest.mark.parametrize("counts", tool.SCHEDULES.values(), ids=str)
def test_the_fitted_models_trap(trapped, counts, used):
    """The fitted model is near the exact values, and so it is with its memory: a step's draws are
    independent given a state that is the same for all. 4,000 samples lie within four standard
    errors of the enumeration."""
    backbone, memory = trapped
    row = trap_row(backbone, memory if used == "with" else None, counts, 4000)
    assert row["unseen"] == pytest.approx(row["unseen_exact"], abs=0.02)
    assert row["kl"] == pytest.approx(row["kl_exact"], abs=0.05)
    error = math.sqrt(row["unseen"] * (1 - row["unseen"]) / 4000)
    assert abs(row["unseen_sampled"] - row["unseen"]) < 4 * error + 1e-4


def test_samples_are_distributed_as_enumerated(trapped):
    """Sequence by sequence, in two steps with a memory that has moved far from its start."""
    backbone, _ = trapped
    memory = awake(backbone, by=0.5, slots=4, width=32)
    expected = outcomes(backbone, blank(), (2, 1), memory)
    plain = outcomes(backbone, blank(), (2, 1))
    drawn = generate(backbone, blank()[:, :1].expand(10_000, -1), memory=memory, gen_length=3,
                     block_length=3, steps=2, order="random", temperature=1.0).ids
    counts = Counter(map(tuple, drawn.tolist()))
    for sequence in {*counts, *(s for s, q in expected.items() if q > 0.002)}:
        q = expected.get(sequence, 0)
        assert abs(counts[sequence] / 10_000 - q) < 5 * math.sqrt(q * (1 - q) / 10_000) + 1e-3
    assert max(abs(expected.get(s, 0) - plain.get(s, 0)) for s in {*expected, *plain}) > 0.05
    row = trap_row(backbone, memory, (2, 1), 10_000)
    assert abs(row["unseen_sampled"] - row["unseen"]) < 0.02
    without = 1 - sum(plain[(*tool.PROMPT, *words)] for words in tool.DATA)
    assert abs(without - row["unseen"]) > 0.05


def test_the_traps_table(trapped, monkeypatch, capsys):
    """Every row with its exact values; JSON says the same."""
    monkeypatch.setattr(tool, "trap_model", lambda seed: trapped[0])
    monkeypatch.setattr(tool, "trap_memory", lambda backbone, seed: trapped[1])
    assert tool.main(["--trap", "--samples", "500"]) == 0
    out = capsys.readouterr().out
    assert tool.main(["--trap", "--samples", "500", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["memory"], sum(r["commits"]), len(r["commits"])) for r in rows] == [
        (False, 3, 1), (False, 3, 2), (False, 3, 2), (False, 3, 3), (True, 3, 1), (True, 3, 2),
        (True, 3, 3)]
    table = [line for line in out.splitlines() if line[:1].isdigit()]
    assert len(table) == len(rows)
    for row, line in zip(rows, table):
        assert line.endswith(f"{row['kl']:8.3f} {row['kl_exact']:8.3f}")
        assert f"{row['unseen']:.2%}" in line and f"{row['unseen_exact']:.2%}" in line
    assert "75.00%" in table[0] and "1.386" in table[0] and "50.00%" in table[1]
