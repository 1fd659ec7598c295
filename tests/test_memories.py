"""Memories of other classes than MetaState: found by name, kept in files that name them."""
from __future__ import annotations

import json
import random
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from conftest import MEMORY, ROOT, awake, noise, one_prompt, prompts_of, seeded

import train
from lib.cli import InputError
from lib.files import read_tensors
from lib.memories import load_memory, memory_class, new_memory, save_memory
from lib.watch import Watched
from metastate import MetaState
from model import load
from sample import generate
from studies import reveals
from studies.carry import Carry
from studies.reveals import blocks, sure
from tasks import draw
from train import unrolled_loss

GATELESS = '''
import torch
import torch.nn as nn

from metastate import AdaptiveNorm, MetaState


class Updater(nn.Module):
    """s' = s + W norm(c; t): no gates."""

    def __init__(self, width, cond):
        super().__init__()
        self.norm, self.write = AdaptiveNorm(width, cond), nn.Linear(width, width)

    def forward(self, s, c, cond):
        return s + self.write(self.norm(c, cond)).float()


class Mine(MetaState):
    def __init__(self, dim, slots, width, *args, **options):
        super().__init__(dim, slots, width, *args, **options)
        self.updater = Updater(width, self.sizes["cond"])
'''
PLAIN = '''
import torch
import torch.nn as nn


class Bias(nn.Module):
    """No state: a vector that is added everywhere."""

    def __init__(self, config):
        super().__init__()
        self.add = nn.Parameter(torch.randn(config.dim))

    def initial(self, batch):
        return torch.zeros(batch, 1, 1)

    def inject(self, e, s, t, span):
        return e + self.add

    def update(self, s, h, t, span, pad_mask=None):
        return s + 1
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """write(text) -> the name of a module with that text in the current folder, forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    written = []

    def write(text: str, name: str = "my_memory") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        written.append(name)
        return name

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("text, kind", [(GATELESS, "Mine"), (PLAIN, "Bias")])
def test_a_memory_of_ones_own_is_kept_and_found(module, shallow, tmp_path, text, kind):
    """What is loaded is of that class, does what was saved did, and trains."""
    name = f"{module(text)}:{kind}"
    memory = new_memory(name, shallow, 3)
    assert type(memory).__name__ == kind
    save_memory(tmp_path / "m.safetensors", memory, shallow.fingerprint())
    found = load_memory(tmp_path / "m.safetensors", shallow)
    assert type(found) is type(memory) and not any(p.requires_grad for p in found.parameters())
    for one, other in zip(memory.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    again = new_memory(name, shallow, 3).state_dict()
    assert all(torch.equal(x, again[key]) for key, x in memory.state_dict().items())


@pytest.mark.parametrize("number", [0, 1])
def test_the_memories_of_the_docs(module, shallow, tmp_path, number):
    """As they stand there: made, trained by a step, written, found again, and used with a cache,
    padding and guidance, in which they change something."""
    text = (ROOT / "docs" / "memories.md").read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, re.S)[number]
    name = module(source) + ":" + ("Mine", "Average")[number]
    memory = new_memory(name, shallow, 0)
    ids = torch.tensor(prompts_of([12, 12]))
    answer = torch.arange(12).expand(2, 12) >= 5
    optimizer = torch.optim.SGD(memory.parameters(), lr=1.0)
    for _ in range(2):  # the first moves what writes, and only that
        unrolled_loss(shallow, memory, ids, answer, K=3).backward()
        optimizer.step()
    save_memory(tmp_path / "m.safetensors", memory, shallow.fingerprint())
    found = load_memory(tmp_path / "m.safetensors", shallow)
    pads = torch.arange(12).expand(2, 12) < torch.tensor([[0], [3]])
    states = []
    update = found.update
    found.update = lambda *seen: states.append(update(*seen)) or states[-1]
    generate(shallow, ids, memory=found, pad_mask=pads, gen_length=8, block_length=4, steps=8,
             cache="dual", cfg_scale=0.5, order="low_confidence")
    assert len(states) == 8 and all(state.isfinite().all() for state in states)
    assert not torch.equal(states[0], states[-1])


def test_a_state_of_any_shape_is_carried_and_watched(module, shallow):
    """(B, D), and one parameter expanded to all rows."""
    flat = PLAIN.replace("return torch.zeros(batch, 1, 1)", "return self.add.expand(batch, -1)")
    memory = new_memory(f"{module(flat)}:Bias", shallow, 0)
    watched, seen = Watched(memory), []
    generate(shallow, torch.tensor(prompts_of([5, 5])), memory=watched, adjust=watched.adjust,
             gen_length=4, block_length=4, steps=4,
             on_step=lambda _: seen.append(watched.of_row(1)))
    assert [len(step["slots"]) for step in seen] == [1] * 4
    assert seen[0]["slots"][0] == pytest.approx(shallow.config.dim ** 0.5, abs=1e-3)


def test_what_does_not_go_with_a_class_or_a_file(module, shallow, small_ckpt, tmp_path, capsys):
    """Sizes that nobody would take, a constructor that wants something else, and --init with what
    its file decides."""
    name = f"{module(PLAIN)}:Bias"
    with pytest.raises(InputError, match="takes no slots"):
        new_memory(name, shallow, 0, slots=4, width=None, time=True, local=True)
    wants = PLAIN.replace("def __init__(self, config)", "def __init__(self, config, more)")
    with pytest.raises(InputError, match="cannot be made of a backbone's config"):
        new_memory(f"{module(wants)}:Bias", shallow, 0)
    awake(load(small_ckpt, "cpu")[0]).save(tmp_path / "m.safetensors")
    assert train.main(["--ckpt", str(small_ckpt), "--init", str(tmp_path / "m.safetensors"),
                       "--out", str(tmp_path / "out"), "--slots", "4", "--no-time"]) == 2
    assert "leave out --slots, --no-time" in capsys.readouterr().err


def test_the_seed_of_fresh_weights_leaves_torchs_own_alone(module, shallow):
    before = torch.random.get_rng_state()
    first, other = (new_memory(f"{module(PLAIN)}:Bias", shallow, seed).add for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), before) and not torch.equal(first, other)


@pytest.mark.parametrize("change, warns", [
    (("self.write(self.norm(c, cond))", "self.write(self.norm(c, cond)).tanh()"), True),
    (("no gates", "none at all"), False), (("# ", "#"), False)])
def test_weights_of_other_code_are_named(module, shallow, tmp_path, capsys, change, warns):
    """A changed class is said, in one line; docstrings and comments may change."""
    name = module("# a memory\n" + GATELESS)
    save_memory(tmp_path / "m.safetensors", new_memory(f"{name}:Mine", shallow, 0),
                shallow.fingerprint())
    module(("# a memory\n" + GATELESS).replace(*change))
    load_memory(tmp_path / "m.safetensors", shallow)
    said = capsys.readouterr().err
    assert ("other code of my_memory:Mine" in said) == warns and said.count("\n") == warns


def test_a_changed_part_is_a_changed_memory(shallow, tmp_path, capsys, monkeypatch):
    """The Updater is a class of its own: the file knows it."""
    memory = awake(shallow, slots=4)
    memory.save(tmp_path / "m.safetensors")
    MetaState.load(tmp_path / "m.safetensors", shallow)
    assert capsys.readouterr().err == ""
    stated = read_tensors(tmp_path / "m.safetensors")[1]
    assert stated["class"] == "metastate:MetaState"
    monkeypatch.setattr("lib.identity._source", lambda kind, whole=True: "x = 1" if
                        kind.__name__ == "Updater" else f"class {kind.__name__}: pass")
    MetaState.load(tmp_path / "m.safetensors", shallow)
    assert "other code of metastate:MetaState" in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [
    ("my_memory", "no MODULE:CLASS"), ("nowhere:Mine", "no memory nowhere:Mine"),
    ("my_memory:Other", "no memory my_memory:Other"), ("torch.nn:Linear", "initial, inject"),
    ("../my_memory:Mine", "no MODULE:CLASS"), ("os:getcwd", "initial, inject")])
def test_what_is_no_memory_is_refused(module, name, words):
    module(GATELESS)
    with pytest.raises(InputError, match=words):
        memory_class(name)


def test_a_memory_without_weights_is_refused(module, shallow):
    empty = PLAIN.replace("nn.Parameter(torch.randn(config.dim))", "0")
    with pytest.raises(InputError, match="nothing to train"):
        new_memory(f"{module(empty)}:Bias", shallow, 0)


def test_an_own_memory_is_trained_by_the_command(module, tmp_path, small_ckpt, capsys):
    """train.py --memory; the file is found by what loads memories, and goes on by --init."""
    name = f"{module(GATELESS)}:Mine"
    argv = ["--ckpt", str(small_ckpt), "--steps", "2", "--batch-size", "2", "--micros", "1", "--K",
            "2", "--no-compile"]
    assert train.main([*argv, "--out", str(tmp_path / "one"), "--memory", name]) == 0
    stated = read_tensors(tmp_path / "one" / MEMORY)[1]
    assert stated["class"] == "my_memory:Mine"
    assert train.main([*argv, "--out", str(tmp_path / "two"), "--init",
                       str(tmp_path / "one" / MEMORY)]) == 0
    one, two = (read_tensors(tmp_path / run / MEMORY)[0] for run in ("one", "two"))
    assert read_tensors(tmp_path / "two" / MEMORY)[1]["class"] == "my_memory:Mine"
    assert one.keys() == two.keys() and any(not torch.equal(one[k], two[k]) for k in one)


# ------------------------------------------------------------------ studies of other memories
def answers(backbone, memory) -> torch.Tensor:
    """Three answers in three steps: ids."""
    return generate(backbone, one_prompt(3), memory=memory, gen_length=24, block_length=24,
                    steps=3).ids


def written_to(memory):
    """The memory, as if trained: what it keeps reaches the embeddings."""
    with torch.no_grad():
        memory.write.weight.normal_(0, 1, generator=seeded())
    return memory


def test_carry_changes_nothing_before_it_is_trained(backbones, tmp_path):
    """It is made by its name, begins as the frozen model, and survives its file."""
    backbone = backbones["llada"]
    memory = new_memory("studies.carry:Carry", backbone, 0)
    assert answers(backbone, memory).equal(answers(backbone, None))
    moved = answers(backbone, written_to(memory))
    assert not moved.equal(answers(backbone, None))
    save_memory(tmp_path / "carry.safetensors", memory, backbone.fingerprint())
    loaded = MetaState.load(tmp_path / "carry.safetensors", backbone)
    assert answers(backbone, loaded).equal(moved)


@pytest.mark.parametrize("spec, file, name", [
    (ModuleSpec("studies.carry", None), "x/studies/carry.py", "studies.carry"),
    (None, "somewhere/carry.py", "carry")])
def test_a_script_s_own_memory_is_found_again(backbones, tmp_path, monkeypatch, spec, file, name):
    """What `python -m studies.carry` or `python carry.py` saves is known by the module's name."""
    script = ModuleType("__main__")
    script.__spec__, script.__file__ = spec, file
    memory = type("Carry", (Carry,), {"__module__": "__main__"})(backbones["llada"].config)
    monkeypatch.setitem(sys.modules, "__main__", script)
    save_memory(tmp_path / "memory.safetensors", memory, backbones["llada"].fingerprint())
    assert read_tensors(tmp_path / "memory.safetensors")[1]["class"] == f"{name}:Carry"


def test_carry_keeps_every_position_to_itself(backbones):
    """A position's hidden state changes that position's state and embedding, and no other's."""
    memory = written_to(new_memory("studies.carry:Carry", backbones["llada"], 0))
    d = backbones["llada"].config.dim
    h, t, e = noise(2, 9, d), torch.ones(2), torch.zeros(2, 9, d)
    other = h.clone()
    other[1, 4] += noise(d, seed=1)
    states = [memory.update(memory.initial(2), x, t, (3, 6)) for x in (h, other)]
    written = [memory.inject(e, s, t, (3, 6)) for s in states]
    for first, second in (states, written):
        assert ((first - second).abs().sum(-1) > 0).nonzero().tolist() == [[1, 4]]
    assert not states[0][:, 9:].any()


def test_what_is_sure_is_revealed():
    """The surest of a row in any case, and whatever is surer than 0.999; nothing below 0.9, and
    between them some; nothing that is not masked."""
    p = torch.tensor([0.9999, 0.97, 0.89, 0.5, 0.0]).expand(400, 5)  # 0: its loss is infinite
    now = sure(-p.log(), torch.full((400,), 3), seeded())
    assert now[:, 0].all() and not now[:, 2:].any() and 0.2 < now[:, 1].float().mean() < 0.8
    unsure = sure(-p[:, 2:].log(), torch.zeros(400, dtype=torch.long), seeded())
    assert unsure[:, 0].all() and not unsure[:, 1:].any()


def test_blocks_are_revealed_one_after_the_other():
    """At every step so many tokens of the first block that is not whole, the surest of them, and of
    the next when it is; all in the end."""
    loss = torch.rand(3, 96, generator=seeded())
    masked, counts = torch.ones(3, 96, dtype=torch.bool), torch.tensor([[10, 40, 0, 5, 30, 11],
                                                                        [32, 32, 32, 0, 0, 0],
                                                                        [1, 1, 62, 20, 10, 2]])
    for step in range(6):
        now = blocks(loss.masked_fill(~masked, torch.inf), counts[:, step], seeded())
        for row in range(3):
            left, wanted = masked[row].nonzero().flatten().tolist(), []
            while len(wanted) < counts[row, step]:
                block = [i for i in left if i // 32 == left[0] // 32]
                block.sort(key=lambda i: loss[row, i].item())
                wanted += block[:int(counts[row, step]) - len(wanted)]
                left = [i for i in left if i not in wanted]
            assert now[row].nonzero().flatten().tolist() == sorted(wanted)
        masked &= ~now
    assert not masked.any()


def test_shipped_memories_are_of_the_code_that_is_here(capsys):
    """Each of them loads, and no line says that its class has changed."""
    files = sorted((ROOT / "checkpoints").glob("*/*.safetensors"))
    memories = [file for file in files if file.name != "model.safetensors"]
    assert len(memories) >= 15
    for file in memories:
        load_memory(file, load(file.parent.name, "cpu")[0])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("reveal", ["sure", "blocks"])
def test_a_memory_is_trained_along_samplers_trajectories(reveal, tmp_path, monkeypatch):
    """train.py's own command line, with two more choices."""
    for name in ("REVEALS", "parser", "draw"):
        monkeypatch.setattr(train, name, getattr(train, name))  # put back after
    assert reveals.main(["--reveal", reveal, "--steps", "1", "--batch-size", "1", "--K", "2",
                         "--device", "cpu", "--out", str(tmp_path / "run")]) in (None, 0)
    assert (tmp_path / "run" / "metastate.safetensors").is_file()


def test_a_memory_is_trained_on_what_the_model_would_write(tmp_path, monkeypatch):
    """Two in three examples are its own stories, if they are right; held-out ones never are."""
    monkeypatch.setattr(train, "draw", draw)  # put back after
    begun, rest = own = draw("stories", random.Random(5), False)
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"prompt": begun, "text": text}) + "\n"
                            for text in (rest, " Nonsense.")))
    reveals.choose_draw(reveals.parser().parse_args(["--own", str(file)]))
    rng, found = random.Random(0), {}
    for side in (True, False):
        found[side] = [train.draw("stories", rng, side) == own for _ in range(60)]
    assert sum(found[True]) == 0 and 25 < sum(found[False]) < 55
