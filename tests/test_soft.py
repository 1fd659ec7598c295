"""Soft tokens: what they are, how a model learns to read them, and what the shipped one makes of
them."""
from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import noise, one_prompt, seeded

import bench
from lib.cli import InputError
from lib.hub import CHECKPOINTS, stated
from lib.memories import new_memory, save_memory
from lib.watch import Watched
from metastate import MetaState, Reset, Shuffled
from model import load
from sample import generate
from studies import soft as study
from studies.carry import Carry
from studies.small import examples, llada_loss
from studies.soft import Soft, soft_loss
from tasks import TASKS, draw

HALVES = TASKS["halves"]


def answers(backbone, memory, steps=3):
    return generate(backbone, one_prompt(2), memory=memory, gen_length=8, block_length=8,
                    steps=steps).ids


# ------------------------------------------------------------------ the memory
def test_a_soft_token_is_the_mean_of_embeddings(backbone):
    """Under the model's own probabilities of the token at that position, the mask left out."""
    c, soft = backbone.config, Soft.of(backbone)
    ids = torch.randint(5, 60, (2, 9), generator=seeded())
    h = backbone.hidden(backbone.embed(ids))
    state = soft.update(soft.initial(2), h, torch.ones(2), (3, 6))
    logits = backbone.logits(h)
    logits[..., c.mask_id] = -1e9
    means = logits.softmax(-1) @ backbone.embedding.weight
    said = means[:, :-1] if c.shift else means  # Dream's position i speaks for i + 1
    torch.testing.assert_close(state[:, c.shift:9], said)
    mask = backbone.embedding.weight[c.mask_id]
    assert torch.equal(state[:, 9:], mask.expand_as(state[:, 9:]))
    assert not c.shift or torch.equal(state[:, 0], mask.expand(2, -1))


def test_masks_are_blended_and_tokens_are_not(backbone):
    """Half mask, half what the state holds; before the first step the mask as it is."""
    soft, c = Soft.of(backbone), backbone.config
    ids = torch.tensor([[7, c.mask_id, 9, c.mask_id]])
    e, state = backbone.embed(ids), noise(1, c.max_len, c.dim)
    assert torch.equal(soft.inject(e, soft.initial(1), torch.ones(1), (0, 4)), e)
    blended = soft.inject(e, state, torch.ones(1), (0, 4))
    assert torch.equal(blended[0, ::2], e[0, ::2])
    torch.testing.assert_close(blended[0, 1::2], (e[0, 1::2] + state[0, 1:4:2]) / 2)


def test_it_is_kept_in_a_file(backbone, tmp_path):
    """And is a memory as others are, but has nothing to train."""
    soft = Soft.of(backbone)
    save_memory(tmp_path / "soft.safetensors", soft, backbone.fingerprint())
    loaded = MetaState.load(tmp_path / "soft.safetensors", backbone)
    assert torch.equal(answers(backbone, loaded), answers(backbone, soft))
    with pytest.raises(InputError, match="nothing to train"):
        new_memory("studies.soft:Soft", backbone, 0)


# ------------------------------------------------------------------ the training
@pytest.fixture()
def tiny():
    backbone, tokenizer = load("tiny", "cpu", torch.float32)
    data = examples(TASKS["follow"], tokenizer, random.Random(0), 12, False,
                    backbone.config.eos_id)
    return backbone.requires_grad_(True), data


def test_without_passes_it_is_the_loss_of_bare_masks(tiny):
    backbone, data = tiny
    soft = Soft.of(backbone)
    bare = llada_loss(backbone, *data, seeded())
    torch.testing.assert_close(soft_loss(backbone, soft, *data, 0, False, seeded()), bare)
    assert not torch.isclose(soft_loss(backbone, soft, *data, 2, False, seeded()), bare)


def test_earlier_passes_have_more_masks(tiny, monkeypatch):
    """The last has those of the loss, every one before it a superset; prompts are never masked."""
    backbone, data = tiny
    seen, embed = [], backbone.embed
    monkeypatch.setattr(backbone, "embed", lambda ids: seen.append(ids) or embed(ids))
    soft_loss(backbone, Soft.of(backbone), *data, 4, False, seeded()).backward()
    masked = [ids == backbone.config.mask_id for ids in seen]
    assert len(seen) == 5 and not any(m[:, :data[0].shape[1]].any() for m in masked)
    assert all((later <= earlier).all() for earlier, later in zip(masked, masked[1:]))
    counts = [int(m.sum()) for m in masked]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    truth = torch.cat(data[:2], 1)
    assert all(torch.equal(ids[~m], truth[~m]) for ids, m in zip(seen, masked))


def test_what_is_told_is_in_the_soft_tokens(tiny, monkeypatch):
    """Blended with the truth at some positions and at no others."""
    backbone, data = tiny
    soft, states = Soft.of(backbone), {}
    for told in (False, True):
        monkeypatch.setattr(soft, "mean", lambda s, p, told=told: (
            states.__setitem__(told, p), Soft.mean(soft, s, p))[1])
        soft_loss(backbone, soft, *data, 1, told, seeded())
    truth = F.one_hot(torch.cat(data[:2], 1), states[True].shape[-1])
    trust = ((states[True] - states[False]).abs().sum(-1) > 1e-6).float()
    open_to = (states[False] * truth).sum(-1) < 0.9  # where there is something to be told
    assert 0.2 < trust[open_to].mean() < 0.8
    assert ((states[True] - states[False]) * truth >= -1e-6).all()
    torch.testing.assert_close(states[True].sum(-1), torch.ones_like(trust))


def test_gradients_come_from_the_last_pass_alone(tiny, monkeypatch):
    backbone, data = tiny
    grads, hidden = [], backbone.hidden
    monkeypatch.setattr(backbone, "hidden", lambda *a: grads.append(hidden(*a)) or grads[-1])
    soft_loss(backbone, Soft.of(backbone), *data, 3, False, seeded())
    assert [h.requires_grad for h in grads] == [False, False, False, True]


def test_training_writes_a_checkpoint_and_its_soft_tokens(tmp_path):
    """Two updates of checkpoints/halves, which is the usual one: a checkpoint as that, and what was
    in its folder besides weights."""
    assert study.main(["--out", str(tmp_path), "--steps", "2", "--batch-size", "4", "--device",
                       "cpu"]) == 0
    start, (moved, _) = load("halves", "cpu")[0], load(tmp_path, "cpu")
    assert not torch.equal(start.head.weight, moved.head.weight)
    assert stated(tmp_path) == stated("halves")
    soft = MetaState.load(tmp_path / "soft.safetensors", moved)
    assert torch.equal(soft.head, moved.head.weight)
    last = json.loads((tmp_path / "pretraining" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"held_out_bare", "held_out_soft"} <= last.keys()


def test_a_checkpoint_has_to_name_its_tasks(text_ckpt, tmp_path, capsys):
    assert study.main(["--ckpt", str(text_ckpt), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("names no tasks that it was trained on\n")


# ------------------------------------------------------------------ what is shipped
def paths_of(prompts):
    """The stations of each prompt's path, as letters."""
    return [HALVES.follow.path(dict(pair.split(">") for pair in pairs), start).split(">")
            for _, start, *pairs in map(str.split, prompts)]


@torch.no_grad()
def read_from_softly(name, share, number=60):
    """How often the next station's half is right where a letter makes up that share of a mask, and
    all behind it is masked."""
    (backbone, tokenizer), rng = load(name, "cpu", torch.float32), random.Random(3)
    prompts = [draw(HALVES, rng, held_out=True)[0] for _ in range(number)]
    ids, ways = torch.tensor([tokenizer.encode(p) for p in prompts]), paths_of(prompts)
    halves, right = tokenizer.encode("12"), []
    for station in range(2, 7):
        before = torch.tensor([tokenizer.encode("".join("12"[c > "d"] + ">" for c in way[:station]))
                               for way in ways])
        masks = torch.full((number, 16 - before.shape[1]), backbone.config.mask_id)
        e, at = backbone.embed(torch.cat([ids, before, masks], 1)), ids.shape[1] + before.shape[1]
        letters = torch.tensor([tokenizer.encode(way[station])[0] for way in ways])
        e[:, at] = torch.lerp(e[:, at], backbone.embed(letters), share)
        said = backbone.logits(backbone.hidden(e))[:, at + 2, halves].argmax(-1).tolist()
        right += [bool(half) == (way[station + 1] > "d") for half, way in zip(said, ways)]
    return sum(right) / len(right)


def test_the_shipped_model_reads_what_another_does_not():
    """A letter that is a quarter of its mask tells `soft` where the path goes on, and `halves`
    hardly anything, though it knows the letters as well: both are sure of a whole one."""
    assert read_from_softly("soft", 0.25) > 0.95 > 0.8 > read_from_softly("halves", 0.25)
    assert min(read_from_softly(name, 1.0) for name in ("soft", "halves")) > 0.95


def test_depth_is_bought():
    """At one token per step: the frozen model stands at what two hops allow; its own soft tokens
    take it on, MetaState to the end; set back after every step, it takes it nowhere."""
    (backbone, tokenizer), rng = load("soft", "cpu", torch.float32), random.Random(7)
    prompts = [draw(HALVES, rng, held_out=True)[0] for _ in range(40)]

    def right(memory):
        return sum(bench.solve(backbone, tokenizer, HALVES, prompts, 16, steps=16,
                               memory=memory)[0])

    memory, soft = (MetaState.load(CHECKPOINTS["soft"] / f"{name}.safetensors", backbone)
                    for name in ("metastate", "soft"))
    frozen, reset = right(None), right(Reset(memory))
    assert right(memory) > 36 and max(frozen, reset) < 20 and right(soft) > frozen + 5


@pytest.mark.parametrize("wrapped", [lambda m: m, Reset, Watched], ids=["plain", "reset", "seen"])
def test_a_cache_is_refused(wrapped):
    """With one a step sees a part of what the state is of; also where a memory is wrapped."""
    backbone, _ = load("soft", "cpu", torch.float32)
    for memory in (MetaState.load(CHECKPOINTS["soft"] / "soft.safetensors", backbone),
                   Carry(backbone.config)):
        with pytest.raises(InputError, match=f"with a cache {type(memory).__name__} would not see"):
            generate(backbone, torch.tensor([[5, 6, 7]]), gen_length=16, block_length=16,
                     steps=16, memory=wrapped(memory), cache="dual")


def test_few_steps_are_enough_for_who_reads_softly():
    """In a quarter of the steps a chain is worked out by its own soft tokens and by MetaState, not
    by the frozen model, nor with another prompt's memory."""
    (backbone, tokenizer), rng = load("soft-tiny", "cpu", torch.float32), random.Random(7)
    prompts = [draw("chain", rng, held_out=True)[0] for _ in range(30)]
    memory, soft = (MetaState.load(CHECKPOINTS["soft-tiny"] / f"{name}.safetensors", backbone)
                    for name in ("metastate", "soft"))
    frozen, softly, with_memory, shuffled = (
        sum(bench.solve(backbone, tokenizer, TASKS["chain"], prompts, 24, steps=6, memory=m)[0])
        for m in (None, soft, memory, Shuffled(memory)))
    assert min(softly, with_memory) > 26 and frozen < 20 and shuffled < 8
