"""Masks in the prompt, the hooks that others build on, and noise that belongs to a row."""
from __future__ import annotations

import json
import re
import types

import pytest
import torch
from conftest import (DATA, EOS_ID, MASK_ID, G, P, awake, boosted, one_prompt, prompts_of,
                      seeded)
from safetensors.torch import load_file
from test_sample import eos_liking, llada_loop  # noqa: F401  eos_liking is a fixture

import sample
from lib.cli import InputError
from lib.data import left_pad
from lib.prompts import fillable_ids
from model import load
from sample import generate, propose

INFILLED = load_file(DATA / "dream" / "infill.safetensors")
HOLES = ([2, 3, 7], [0], [1, 4, 5, 6, 8])  # positions of masks in three prompts


def with_holes(lengths=(9, 4, 11), seed: int = 0) -> list[list[int]]:
    """Prompts with masks in them."""
    prompts = prompts_of(lengths, seed)
    for prompt, holes in zip(prompts, HOLES):
        for i in holes:
            prompt[i] = MASK_ID
    return prompts


# ------------------------------------------------------------------ masks in the prompt
@pytest.mark.parametrize("key", [key for key in INFILLED if key != "prompt"])
def test_infilling_equals_dreams_published_sampler(backbones, key):
    """Eight masks here and there in 23 tokens, the first among them, and nothing to write behind;
    in fewer steps, as many, and more."""
    order, steps = key.rsplit("_steps", 1)
    found = generate(backbones["dream"], INFILLED["prompt"], gen_length=0, order=order,
                     steps=int(steps.removesuffix("_t0")))
    assert found.ids.tolist() == INFILLED[key].tolist()


@pytest.mark.parametrize("gen_length, block_length, steps", [(0, 8, 2), (0, 8, 99), (12, 6, 6),
                                                             (8, 8, 16)])
def test_the_prompts_masks_are_a_first_block(backbones, gen_length, block_length, steps):
    """LLaDA's loop, with one block more before its own."""
    prompt = with_holes()[2]
    found = generate(backbones["llada"], torch.tensor([prompt]), gen_length=gen_length,
                     block_length=block_length, steps=steps)
    expected = llada_loop(backbones["llada"], prompt, gen_length, block_length, steps)
    assert found.ids[0].tolist() == expected and MASK_ID not in expected


@pytest.mark.parametrize("options", [dict(gen_length=0), dict(), dict(threshold=0.04),
                                     dict(cfg_scale=1.5, gen_length=0)], ids=str)
def test_a_batch_with_unlike_masks_equals_its_prompts_one_by_one(backbones, family, options):
    """Rows with fewer masks, and one with none, wait for the others and change nothing."""
    options = dict(gen_length=8, block_length=4, steps=8, order="low_confidence") | options
    prompts = with_holes() + ([] if options["gen_length"] == 0 else prompts_of([6], seed=3))
    ids, pad_mask = left_pad(prompts, EOS_ID)
    together = generate(backbones[family], ids, pad_mask=pad_mask, **options)
    for prompt, row in zip(prompts, together.ids, strict=True):
        alone = generate(backbones[family], torch.tensor([prompt]), **options)
        assert row[-alone.ids.shape[1]:].tolist() == alone.ids[0].tolist()
        given = [i for i, x in enumerate(prompt) if x != MASK_ID]
        assert alone.ids[0, given].tolist() == [prompt[i] for i in given]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_cache_the_prompts_masks_are_filled_by_whole_steps(shallow, cache):
    """So their tokens are those without a cache, and one that is refreshed changes nothing."""
    ids = torch.tensor([with_holes()[0]])
    options = dict(gen_length=8, block_length=4, steps=8, order="low_confidence")
    plain, cached, fresh = (generate(shallow, ids, **options, **more).ids for more in (
        {}, dict(cache=cache), dict(cache=cache, refresh=1)))
    assert torch.equal(cached[:, :9], plain[:, :9]) and torch.equal(fresh, plain)


def test_where_a_memorys_response_begins(shallow):
    """What the memory is told: where the response begins, how long it is, how much is masked. It is
    the answer, and where there is none all from the first mask on."""
    memory, told = awake(shallow, slots=6), []
    inject = memory.inject
    memory.inject = lambda e, s, t, span: told.append((t.tolist(), *(
        x.flatten().tolist() for x in span))) or inject(e, s, t, span)
    ids, pad_mask = left_pad(with_holes((9, 4)), EOS_ID)
    for gen_length in (0, 4):
        generate(shallow, ids, pad_mask=pad_mask, memory=memory, gen_length=gen_length,
                 block_length=4, steps=4, order="low_confidence")
    shares, starts, lengths = told[0]
    assert starts == [2, 5] and lengths == [7, 4] and shares == pytest.approx([3 / 7, 1 / 4])
    assert told[-4] == ([1, 1], [9, 9], [4, 4])


def test_guidance_hides_what_was_given_and_not_what_was_filled(shallow, monkeypatch):
    """The second half of every forward: masks where the prompt said something, tokens where it was
    filled."""
    seen, embed = [], shallow.embed
    monkeypatch.setattr(shallow, "embed", lambda ids: seen.append(ids.clone()) or embed(ids))
    prompt = torch.tensor([with_holes()[0]])
    generate(shallow, prompt, gen_length=0, steps=9, order="low_confidence", cfg_scale=1.0)
    given = prompt[0] != MASK_ID
    for step, (conditional, unconditional) in enumerate(seen):
        assert (unconditional[given] == MASK_ID).all()
        assert torch.equal(unconditional[~given], conditional[~given])
        assert int((conditional == MASK_ID).sum()) == 3 - step


def test_nothing_to_write_is_refused(shallow):
    """gen_length 0 and no mask; and lengths that cannot be."""
    for length, words in ((0, "no mask"), (-8, "multiple")):
        with pytest.raises(InputError, match=words):
            generate(shallow, one_prompt(), gen_length=length, block_length=4, steps=4)


# ------------------------------------------------------------------ on the command line
def test_masks_as_they_are_written(text_ckpt):
    """<mask> and <mask:3>, in a text and in messages, or the tokenizer's own; a blank in front is
    swallowed where a word's token begins with one, which tiny's bytes do not."""
    tokenizer = load(text_ckpt, "cpu")[1]
    mask = tokenizer.vocab["<|mask|>"]
    ids = fillable_ids("a<mask>b<mask:3><|mask|><mask:0>", tokenizer, True, mask)
    assert [i == mask for i in ids[:8]] == [False, True, False, *[True] * 4, False]
    assert tokenizer.decode(ids[7:]) == "<mask:0>"  # is none
    plain, tiny = Words(), load("tiny", "cpu")[1]
    assert fillable_ids("A <mask> sat  <mask:2>.", plain, True, 9) == \
        plain.encode("A[M] sat [M][M].")
    mask = tiny.vocab["<|mdm_mask|>"]
    assert fillable_ids("1 <mask> 3", tiny, True, mask) == [
        *tiny.encode("1 "), mask, *tiny.encode(" 3")]
    said = fillable_ids([{"role": "user", "content": "1<mask>"}], tiny, False, mask)
    assert said == [*tiny.encode("1"), mask]


class Words:
    """A tokenizer whose words begin with their blank."""

    core, is_chat = types.SimpleNamespace(id_to_token=lambda i: "[M]"), False

    def encode(self, text: str) -> list[str]:
        return re.findall(r"\[M\]| ?\w+|\W", text)

    def prompt(self, text: str, raw: bool) -> list[str]:
        return self.encode(text)


def test_a_prompt_with_masks_is_filled_and_shown_whole(capsys):
    """No answer behind it, unless one is asked for."""
    text = "sums\n1 2 3 4 5 6 7 8 9 1 2 3\n1 <mask> 6 0 5 1 8 6<mask:2> 6 8 1"
    assert sample.main(["--ckpt", "tiny", "--prompt", text, "--device", "cpu"]) == 0
    *steps, question, numbers, answer, said = capsys.readouterr().out.splitlines()
    assert len(steps) == 3 and question == "sums" and said.startswith("3 tokens  3 forwards")
    assert answer == "1 3 6 0 5 1 8 6 5 6 8 1"
    assert sample.main(["--ckpt", "tiny", "--prompt", text, "--device", "cpu", "--gen-length", "24",
                        "--quiet", "--no-early-stop"]) == 0
    assert capsys.readouterr().out.startswith("sums\n1 2 3 4 5 6 7 8 9 1 2 3\n1 ")


def test_a_file_of_gaps(tmp_path, capsys):
    """Each line's own masks, in one batch; one without has an error, for nothing is to be
    written."""
    file = tmp_path / "gaps.txt"
    totals = "sums\n1 2 3 4 5 6 7 8 9 1 2 3\n1 3 6 0 5 1 8 6 5 6 8 1"
    file.write_text("\n".join(json.dumps({"id": i, "prompt": text}) for i, text in enumerate((
        totals.replace("1 3 6", "1 <mask> 6"), totals,
        totals.replace("8 6 5 6", "8<mask:2> 5 <mask>")))))
    assert sample.main(["--prompts", str(file), "--gen-length", "0", "--batch-size", "2",
                        "--device", "cpu"]) == 1
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], first["tokens"], first["id"]) == (totals, 1, 0)
    assert (third["text"], third["tokens"], third["id"]) == (totals, 3, 2)
    assert second.keys() == {"id", "error"} and "no mask" in second["error"]


# ------------------------------------------------------------------ hooks
@pytest.mark.parametrize("switch", ["logits_eos_inf", "confidence_eos_eot_inf"])
def test_eos_switches_equal_lladas(eos_liking, published, switch):  # noqa: F811
    """LLaDA's two options, at temperature 0, on the head that likes EOS."""
    def never(logits, ids):
        assert ids.shape == (1, P + G)
        logits[..., EOS_ID] = -torch.inf
        return logits

    options = dict(adjust=never) if switch == "logits_eos_inf" else dict(late=[EOS_ID])
    found = generate(eos_liking, published["llada"]["prompt"], gen_length=G, block_length=32,
                     steps=32, **options).ids
    assert found.tolist() == published["llada"][f"eosboost_steps32_block32_{switch}"].tolist()


@pytest.mark.parametrize("hold", ["late", "never"])
def test_eos_is_held_back_on_the_command_line(text_ckpt, tmp_path, capsys, monkeypatch, hold):
    """A head that likes EOS best of all: the answer is empty, also where EOS comes last, for
    nothing else is liked; "never" has it written to its end. A watched memory does not come in
    between."""
    backbone, tokenizer = load(text_ckpt, "cpu")
    awake(backbone, by=0.01).save(tmp_path / "m.safetensors")
    (tmp_path / "a").write_text("a\n")
    monkeypatch.setattr(sample, "load", lambda *_: (backbone, tokenizer))
    for watch in ([], ["--memory", str(tmp_path / "m.safetensors"), "--show-memory"]):
        argv = ["--ckpt", str(text_ckpt), "--prompts", str(tmp_path / "a"), "--gen-length", "8",
                "--device", "cpu", "--no-early-stop", *watch]
        with boosted(backbone, EOS_ID, 50.0):
            for options, reason in ([], "eos"), (["--hold-eos", hold], {
                    "late": "eos", "never": "length"}[hold]):
                assert sample.main([*argv, *options]) == 0
                found = json.loads(capsys.readouterr().out)
                assert found["finish_reason"] == reason
                assert not watch or min(found["steps"][0]["sure"]) > (reason == "eos") * 0.99


def test_late_tokens_have_no_confidence():
    """They are candidates as before; the others share the probability that they leave."""
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 2.0, 1.0, 0.0]]])
    candidate, confidence = propose(logits.clone(), "low_confidence", 3, late=[0])
    assert candidate.tolist() == [[0, 1]]
    rest = torch.tensor([2.0, 1.0, 0.0]).softmax(0)[0]
    assert confidence[0].tolist() == pytest.approx([0, float(rest)])


def test_on_step_may_end_it(shallow):
    """True, and nothing else that a callable may return, ends it; EOS fills what is masked."""
    def at_the_third(step):
        return True if step.forwards == 3 else 1

    found = generate(shallow, one_prompt(), gen_length=8, block_length=4, steps=8,
                     order="low_confidence", on_step=at_the_third)
    assert found.forwards == 3 and not (found.ids == MASK_ID).any()
    assert (found.ids[0, -4:] == EOS_ID).all()


# ------------------------------------------------------------------ noise of a row's own
@pytest.mark.parametrize("options", [
    dict(temperature=0.7), dict(temperature=0.7, threshold=0.02), dict(order="random"),
    dict(order="origin"), dict(order="entropy", temperature=0.4, alg_temp=0.5)], ids=str)
def test_an_answer_does_not_depend_on_its_batch(shallow, options):
    """With a generator for each row the same noise falls on a prompt in any company, in every
    block; with another seed, another."""
    if "threshold" in options:
        options = options | {"order": "low_confidence"}
    options = dict(gen_length=12, block_length=4, steps=12) | options
    prompts = prompts_of((7, 2, 11))
    ids, pad_mask = left_pad(prompts, EOS_ID)
    together = generate(shallow, ids, pad_mask=pad_mask, generator=[*map(seeded, range(3))],
                        **options).ids[:, -12:]
    for i, prompt in enumerate(prompts):
        alone, other = (generate(shallow, torch.tensor([prompt]), generator=[seeded(seed)],
                                 **options).ids[0, -12:] for seed in (i, i + 50))
        assert alone.tolist() == together[i].tolist() != other.tolist()


def test_every_row_needs_its_generator(shallow):
    with pytest.raises(InputError, match="2 prompts need as many generators"):
        generate(shallow, one_prompt(2), gen_length=4, block_length=4, steps=4,
                 generator=[seeded(0)])


def test_the_tiny_model_fills_gaps():
    """Three of twelve running totals, each of which follows from its neighbours."""
    backbone, tokenizer = load("tiny", "cpu")
    mask = backbone.config.mask_id
    text = tokenizer.encode("sums\n1 2 3 4 5 6 7 8 9 1 2 3\n1 3 6 0 5 1 8 6 5 6 8 1")
    holes = [i for i in range(len(text) - 12, len(text), 4)]
    broken = [mask if i in holes else x for i, x in enumerate(text)]
    found = generate(backbone, torch.tensor([broken]), gen_length=0, steps=len(holes))
    assert found.ids[0].tolist() == text
