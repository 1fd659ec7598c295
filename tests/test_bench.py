"""The accuracy bench: who is compared with whom, what counts as a forward, and the intervals."""
from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from metastate import MetaState
from model import DREAM_7B, LLADA_8B, Backbone, Cache, InputError, load
from sample import denoise, generate
from tiny import GEN_LENGTH, TASKS
from train import task_batches, unrolled_loss


@pytest.fixture(scope="module")
def tiny_model():
    return load("tiny", "cpu")


@pytest.fixture(scope="module")
def memory(tiny_model) -> MetaState:
    """An untrained memory that writes: its Injector's output is no longer zero."""
    memory = MetaState.for_backbone(tiny_model[0])
    with torch.no_grad():
        memory.injector.attention.out.weight.normal_(
            0, 0.3, generator=torch.Generator().manual_seed(1))
        for block in (memory.mixer, memory.updater):  # what it reads differs between examples
            for p in block.parameters():
                if p.dim() > 1:
                    p.mul_(3)
    return memory


def prompts_of(name: str, tokenizer, number: int) -> torch.Tensor:
    draw = task_batches(tokenizer, 1, number, 4, 0)
    ids, answer, _ = draw(0, list(TASKS).index(name))
    return ids[:, :int((~answer[0]).sum())]


def states(memory, backbone, ids, steps=3) -> torch.Tensor:
    """The states that the steps of a generation began with: (steps, B, M, D)."""
    seen = []

    class Spy(bench.Reset):
        def __init__(self, memory):
            super().__init__(memory)
            self.update = memory.update

        def note(self, e, s, t, span):
            seen.append(s.clone())
            return self.memory.inject(e, s, t, span)

    spy = Spy(memory)
    spy.inject = spy.note
    generate(backbone, ids, memory=spy, gen_length=GEN_LENGTH, block_length=GEN_LENGTH, steps=steps)
    return torch.stack(seen)


def test_reset_begins_every_step_alike(tiny_model, memory):
    """The control without memory: what one step saw is unknown to the next."""
    ids = prompts_of("sums", tiny_model[1], 4)
    plain = states(memory, tiny_model[0], ids)
    reset = states(bench.Reset(memory), tiny_model[0], ids)
    assert torch.equal(reset, memory.initial(4).expand(3, -1, -1, -1))
    assert not torch.allclose(plain[1], plain[0]) and torch.equal(plain[0], reset[0])


def test_shuffled_gives_each_row_the_memory_of_another(tiny_model, memory):
    """After the first step each row holds the state of the row before it, bit for bit; where all
    rows are the same example it changes nothing."""
    backbone, tokenizer = tiny_model
    ids = prompts_of("sums", tokenizer, 4)
    plain = states(memory, backbone, ids)
    shuffled = states(bench.Shuffled(memory), backbone, ids)
    assert torch.equal(shuffled[1], plain[1][[3, 0, 1, 2]])
    assert not torch.allclose(plain[1], plain[1][[3, 0, 1, 2]])
    same = ids[:1].expand(3, -1)
    assert torch.allclose(states(bench.Shuffled(memory), backbone, same),
                          states(memory, backbone, same), atol=1e-5)


@pytest.mark.parametrize("name", ["sudoku", "follow"])
def test_forwards_are_counted_per_prompt(tiny_model, name):
    """In a batch that decodes by threshold a prompt is charged until its own last token, as if it
    had been alone; by schedule all take the same."""
    backbone, tokenizer = tiny_model
    rows = prompts_of(name, tokenizer, 5)
    prompts = [tokenizer.decode(row) for row in rows.tolist()]
    verdicts, forwards = bench.solve(backbone, tokenizer, TASKS[name], prompts, steps=GEN_LENGTH,
                                     threshold=0.9)
    alone = [generate(backbone, row[None], gen_length=GEN_LENGTH, block_length=GEN_LENGTH,
                      steps=GEN_LENGTH, threshold=0.9).forwards for row in rows]
    assert forwards == alone and len(verdicts) == 5
    assert bench.solve(backbone, tokenizer, TASKS[name], prompts, 2, steps=6)[1] == [6] * 5
    # in batches of 2, 2 and 1 or all at once: the same verdicts
    assert bench.solve(backbone, tokenizer, TASKS[name], prompts, 2, steps=GEN_LENGTH,
                       threshold=0.9) == (verdicts, forwards)


def test_intervals_over_prompts():
    """One training seed: the bootstrap's interval of a share is the binomial one."""
    rng = np.random.default_rng(1)
    right = (rng.random((1, 1, 1, 500)) < 0.8).astype(float)
    mean, low, high = bench.Accuracies({"frozen": right})([0], [0], "frozen")
    p = right.mean()
    half = 196 * (p * (1 - p) / 500) ** 0.5
    assert mean == pytest.approx(100 * p)
    assert (low, high) == (pytest.approx(mean - half, abs=0.6), pytest.approx(mean + half, abs=0.6))
    # where all are right: 3.84 / (n + 3.84) is left open
    every = bench.Accuracies({"frozen": np.ones((1, 1, 1, 100))})([0], [0], "frozen")
    assert every == (100, pytest.approx(100 * 100 / 103.84, abs=0.01), pytest.approx(100))


def test_intervals_over_training_seeds():
    """Seeds that differ widen the interval even where prompts are many, and by what a mean of that
    many seeds has as its error."""
    shares = np.array([0.2, 0.5, 0.8])
    right = (np.arange(2000) / 2000 < shares[:, None, None, None]).astype(float)
    right = np.random.default_rng(0).permuted(right, axis=3)
    mean, low, high = bench.Accuracies({"MetaState": right})([0], [0], "MetaState")
    assert mean == pytest.approx(50) and low < 25 and high > 75


def test_leads_are_paired():
    """A variant that is right on the very same prompts leads by 0, without an interval; one that is
    right on ten more of a hundred leads by 10."""
    rng = np.random.default_rng(2)
    right = (rng.random((2, 3, 4, 100)) < 0.5).astype(float)
    better = right.copy()
    better[:, :, 2, 40:50] = 1
    right[:, :, 2, 40:50] = 0
    measured = bench.Accuracies({"frozen": right, "MetaState": better, "reset": right.copy()})
    assert measured([0, 1, 2], [0, 1, 3], "MetaState", "frozen") == pytest.approx((0,) * 3)
    assert measured([0, 1, 2], [0, 1, 2, 3], "reset", "frozen") == pytest.approx((0,) * 3)
    lead, low, high = measured([0, 1, 2], [2], "MetaState", "frozen")
    assert lead == pytest.approx(10) and 4 < low < 10 < high < 16


@pytest.fixture
def files(tiny_model, memory, tmp_path) -> list[str]:
    """Two memories of other seeds, and the one that writes."""
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    memory.save(paths[0])
    for i in (1, 2):
        MetaState.for_backbone(tiny_model[0], generator=torch.Generator().manual_seed(i)).save(
            paths[i])
    return paths


def test_the_table_and_its_json(files, capsys):
    """Every variant, task and setting has a row; an untrained memory is the frozen backbone, so its
    lead is 0; what is printed is what the JSON says."""
    argv = ["accuracy", "--tasks", "sudoku,sums", "--prompts", "12", "--budgets", "1,4",
            "--thresholds", "0.9", "--json", "--memory", *files[1:], "--reset", files[0]]
    assert bench.main(argv) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    rows = {(r["task"], r["variant"], r["setting"]): r for r in result["rows"]}
    assert len(rows) == 3 * 4 * 3 and result["prompts"] == 12
    for (task, variant, setting), row in rows.items():
        assert row["low"] - 1e-9 <= row["accuracy"] <= row["high"] + 1e-9
        assert len(row["seeds"]) == {"frozen": 1, "reset": 1}.get(variant, 2)
        frozen = rows[task, "frozen", setting]
        assert variant == "reset" or row["accuracy"] == frozen["accuracy"]
        assert setting.startswith("thr") or row["forwards"] == int(setting.split()[0])
        [line] = [line for line in table if line.startswith(f"| {task} | {variant} |")]
        assert f"{row['accuracy']:.1f} ({row['low']:.0f}-{row['high']:.0f})" in line
    assert rows["mean", "frozen", "24 steps"]["accuracy"] == pytest.approx(np.mean(
        [rows[task, "frozen", "24 steps"]["accuracy"] for task in ("sudoku", "sums")]))
    leads = {lead["minus"]: lead for lead in result["leads"]}
    for minus in ("frozen", "shuffled"):
        assert [leads[minus][k] for k in ("points", "low", "high")] == pytest.approx([0] * 3)
    assert "reset" in leads
    assert 0 < result["forwards_share"] <= 1


def test_the_shipped_memories_are_memory(capsys):
    """The files beside the tiny model are found without being named: three training seeds and
    three of the control. In a quarter of the steps each seed leads the frozen backbone and every
    seed of the control by far, and so does their mean, also over themselves with the memories of
    other prompts."""
    assert bench.main(["accuracy", "--tasks", "chain,sums", "--budgets", "4", "--prompts", "60",
                       "--thresholds", "", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seeds = {r["variant"]: r["seeds"] for r in result["rows"] if r["task"] == "mean"}
    assert [len(seeds[v]) for v in ("frozen", "MetaState", "shuffled", "reset")] == [1, 3, 3, 3]
    assert min(seeds["MetaState"]) > max(seeds["frozen"] + seeds["reset"]) + 20
    assert {lead["minus"] for lead in result["leads"]} == {"frozen", "shuffled", "reset"}
    assert all(lead["low"] > 20 for lead in result["leads"])


def test_the_same_seed_asks_the_same_prompts(capsys):
    """Two runs print the same table; another seed picks other prompts."""
    tables = []
    for seed in ("0", "0", "1"):
        assert bench.main(["accuracy", "--tasks", "sudoku", "--prompts", "25", "--budgets", "8",
                           "--memory", "--reset", "--seed", seed]) == 0
        tables.append(capsys.readouterr().out.splitlines()[2])
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


@pytest.mark.parametrize("argv, words", [
    (["--tasks", "chess"], ["chess", "sudoku"]), (["--budgets", "5"], ["5", "24"]),
    (["--thresholds", "0.5,x"], ["0.5,x"]), (["--thresholds", "1.5"], ["1.5"]),
    (["--prompts", "0"], ["--prompts"]), (["--memory", "none.safetensors"], ["none.safetensors"])],
    ids=str)
def test_arguments_that_make_no_sense(argv, words, capsys):
    """One line and exit code 2."""
    assert bench.main(["accuracy", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)


def test_the_plot_needs_matplotlib_alone(tmp_path, monkeypatch, capsys):
    """Without it: one line that says what to install. With it: a file."""
    argv = ["accuracy", "--tasks", "sums", "--prompts", "2", "--budgets", "8", "--memory",
            "--reset", "--plot", str(tmp_path / "plot.png")]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        assert bench.main(argv) == 2
        assert "pip install matplotlib" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert bench.main(argv) == 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------ what training takes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_an_update_takes_is_what_a_real_one_takes(family, checkpointing, monkeypatch):
    """The tensors that a real loss keeps for its backward pass, in bfloat16 and with nothing
    revealed, are those counted without running it, as are weights, gradients and moments."""
    backbone, tokens = load(DATA / family, "cpu", "bfloat16")[0], 40
    backbone.checkpointing, memory = checkpointing, MetaState.for_backbone(backbone)
    ids, answer = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None] >= 10
    monkeypatch.setattr("train.reveal_steps", lambda *a: torch.where(answer, 2, -1))
    with bench.Alive(backbone, memory) as alive:
        unrolled_loss(backbone, memory, ids, answer, 3).backward()
    gradients = sum(p.grad.nbytes for p in memory.parameters())
    weights, own, rest = bench.update_bytes(backbone.config, tokens, 3, checkpointing)
    assert weights == sum(p.nbytes for p in backbone.parameters())
    assert own == 4 * sum(p.nbytes for p in memory.parameters()) == 4 * gradients
    assert rest == pytest.approx(alive.peak - gradients, rel=0.02)


def test_alive_counts_what_lives():
    """Views and weights are not counted, what is dropped is taken off, the peak stays."""
    linear = torch.nn.Linear(50, 20, bias=False).requires_grad_(False)
    with bench.Alive(linear) as alive:
        x = torch.ones(1000, 50)                          # 200,000 bytes
        y = linear(x.view(2, 500, 50))[:, :10]            # a view into 80,000 bytes
        assert alive.now == alive.peak == 280_000
        del x
        assert alive.now == 80_000
        z = torch.ones(100)
        assert alive.now == 80_400 and alive.peak == 280_000
    del y, z
    assert alive.now == 0


def test_footprint_makes_its_table(capsys):
    """Checkpointing keeps less and twice the tokens take more; the table is what the JSON says."""
    argv = ["footprint", "--ckpt", "tiny", "--tokens", "32,64", "--K", "2", "--json"]
    assert bench.main(argv) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(r["tokens"], r["checkpointing"]) for r in rows] == [
        (32, False), (32, True), (64, False), (64, True)]
    peaks = [r["bytes"][2] for r in rows]
    assert peaks[1] < peaks[0] and peaks[3] < peaks[2] and peaks[0] < peaks[2]
    assert len(table) == 2 + 4 + 2


# ------------------------------------------------------------------ speed
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(backbones, family):
    """For a whole sequence, and for a block with a cache: counted operation by operation."""
    backbone = backbones[family]
    ids = torch.randint(400, (1, 20))
    for cache, first in ((None, 0), (Cache(backbone, 1, 20), 12)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            denoise(backbone, ids, torch.arange(15, 20)[None], cache=cache, first=first)
        flops, moved = bench.work_of(backbone.config, 20 - first, 20, 5, 4, cache is None)
        assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            h = backbone.hidden(backbone.embed(ids[:, first:]), None, cache, first)
            backbone.logits(h[:, -5:])
        whole, same = bench.work_of(backbone.config, 20 - first, 20, 5, 4, True)
        assert whole == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert (whole > flops) == (cache is not None) and same == moved
        c = backbone.config
        read = sum(p.numel() for p in backbone.parameters()) - c.vocab * c.dim
        kept = 0 if cache is None else cache.k[..., :first, :].numel() * 2
        assert moved == pytest.approx(4 * (read + kept), rel=0.01)


@pytest.mark.parametrize("config", [LLADA_8B, DREAM_7B], ids=["llada-8b", "dream-7b"])
def test_the_memory_adds_little_at_8b(config, monkeypatch, length=256):
    """At the true shapes it costs at most 3% of a full-sequence step and 10% of a block step, in
    floating-point operations."""
    monkeypatch.setattr("sample._bfloat16_as", lambda x: contextlib.nullcontext())  # none on meta
    with torch.device("meta"):
        backbone = Backbone(config)
        backbone.fingerprint = lambda: ""
        memory, ids = MetaState.for_backbone(backbone), torch.zeros(1, length, dtype=torch.long)
        where, state = torch.zeros(1, 32, dtype=torch.long), memory.initial(1)
        for cache, first, most in ((None, 0, 1.03), (Cache(backbone, 1, length), length // 2, 1.1)):
            flops = []
            for used in (None, memory):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    denoise(backbone, ids, where, memory=used, state=state, cache=cache,
                            span=(length // 2, length // 2), first=first,
                            last=first + 32 if first else None)
                flops.append(counter.get_total_flops())
            assert flops[0] > 4e11 and 1.001 < flops[1] / flops[0] < most


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flash_attention_is_asserted(family, monkeypatch):
    """Without padding it can be chosen; where it cannot (here: three dimensions) that is said."""
    backbone, _ = load(DATA / family, "cpu")
    bench.flash_attention(backbone, 16)
    monkeypatch.setattr(backbone, "hidden", lambda e: F.scaled_dot_product_attention(e, e, e))
    with pytest.raises(InputError, match="FlashAttention"):
        bench.flash_attention(backbone, 16)


def test_speed_measures_what_it_names(tmp_path, capsys):
    """A small config with random weights: every step, generation and training step has its row, and
    shares follow from its figures."""
    (tmp_path / "config.json").write_text((DATA / "llada" / "config.json").read_text())
    assert bench.main(["speed", "--ckpt", f"random:{tmp_path}", "--lengths", "48,64", "--gen", "8",
                       "--block", "4", "--prompt", "9", "--train", "16", "--warmup", "1",
                       "--repeat", "2", "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["product_flops"] > 1e8 and result["copy_bytes"] > 1e8
    rows = {row["what"]: row for row in result["rows"]}
    assert len(rows) == 2 * 2 * 2 + 3 * 2 * 2 + 2
    for what, row in rows.items():
        assert 0 < row["low"] <= row["seconds"] <= row["high"] and row["first"] > 0
        assert any(line.startswith(f"| {what} |") for line in table)
        if row["flops"]:
            assert row["flops_share"] == pytest.approx(
                row["flops"] / row["seconds"] / result["product_flops"])
        if what.startswith("generate") and "None, mem" in what:
            assert row["forwards"] == 8 == row["tokens"]
    assert rows["dual-cache block step, 64 tokens, memory off"]["flops"] < \
        rows["full-sequence step, 64 tokens, memory off"]["flops"] / 5
