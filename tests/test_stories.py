"""The stories: what the grammar writes, what its check finds in them and in what others wrote."""
from __future__ import annotations

import random
import re
from typing import Iterator

import pytest

from lib.data import left_pad
from lib.hub import CHECKPOINTS
from model import load
from sample import generate
from tasks import TASKS, draw, is_held_out
from tasks.sentences import COLOURS, DIFFERENT, FACTS, NAMES, PLOTS
from tasks.stories import OUTSIDE, SENTENCE, SHAPES, Stories, choose_facts, fill, read, violations

STORY = TASKS["stories"]
OURS = Stories(outside=0)
OWNER = "'s"


def examples(number: int, seed: int = 0, task: Stories = STORY) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [task.make(rng) for _ in range(number)]


def kinds(prompt: str, text: str) -> set[str]:
    return {violation.kind for violation in violations(prompt, text)}


# ------------------------------------------------------------------ what is written
@pytest.mark.parametrize("number", [2000, pytest.param(10_000, marks=pytest.mark.faults)])
def test_no_story_of_the_grammar_is_blamed(number):
    """Beginnings from inside and outside, cut anywhere: what belongs to them is right."""
    for prompt, rest in examples(number, seed=number):
        assert violations(prompt, rest) == [] and STORY.check(prompt, rest), (prompt, rest)


def test_every_sentence_is_written_and_recognised():
    """Each of the table, whatever is chosen for it, says the facts that it was filled with; its
    shape is met in some story."""
    rng = random.Random(0)
    assert len(SHAPES) > 200 and len(PLOTS) == 8
    for text, shape in SHAPES.items():
        for _ in range(5):
            facts = choose_facts(rng)
            said = shape.facts(shape.match(fill(text, rng, facts)))
            assert all(facts[about] == value for _, (_, about, value) in said if about in facts)
    written = " ".join(prompt + rest for prompt, rest in examples(1000))
    assert all(re.split(r"[{[]", text)[0] in written for text in SHAPES)


def test_stories_are_short():
    """5 to 9 sentences, and two or three more where they begin with something else."""
    counts = {len(SENTENCE.split(prompt + rest)) for prompt, rest in examples(500, task=OURS)}
    assert min(counts) >= 5 and max(counts) == 9
    assert max(len(SENTENCE.split(prompt + rest)) for prompt, rest in examples(500)) <= 12


def test_stories_follow_their_seed():
    """The same seed gives the same stories, another one others, and they hardly repeat."""
    assert examples(20) == examples(20) != examples(20, seed=1)
    assert len({prompt + rest for prompt, rest in examples(300)}) == 300


def test_beginnings_are_cut_anywhere():
    """Behind a sentence, within one, after a word or two, before a comma, behind a blank."""
    prompts = [prompt for prompt, _ in examples(1500)]
    whole = [prompt for prompt in prompts if prompt.endswith(".")]
    assert 0.3 < len(whole) / 1500 < 0.7
    assert {"Once", "Once upon a time", "There was"} <= {*prompts}
    assert any(prompt.endswith(" ") for prompt in prompts) and all(prompts)
    assert sum("Once upon a time" in prompt for prompt in prompts) < 500


def test_training_and_held_out_are_disjoint():
    """No hero has a thing of a colour on both sides; one story in eight is held out."""
    sides = {side: {STORY.split_key(*draw(STORY, rng, side)) for _ in range(60)}
             for side in (True, False) for rng in [random.Random(f"{side}")]}
    assert not sides[True] & sides[False]
    assert all(len(key.split()) == 3 for side in sides.values() for key in side)
    share = sum(is_held_out(STORY, *example) for example in examples(600)) / 600
    assert 0.085 < share < 0.165


# ------------------------------------------------------------------ what is found
WORDS = [("name", NAMES), ("owner", [f"{name}'s" for name in NAMES]), ("colour", COLOURS),
         *((FACTS[example][0], FACTS[example][1])
           for example in ("kite", "bun", "fox", "duck", "the park", "the pond", "by the gate"))]
TOLD = examples(80, task=OURS)


def planted(words: list[str], prompt: str, rest: str) -> Iterator[str]:
    """The rest with one of the words replaced by another one of them, wherever that contradicts
    what was said before."""
    for found in re.finditer(rf"\b({'|'.join(words)})(?![\w'])", rest):
        before = re.sub(r"near the \w+\.", "", prompt + rest[:found.start()])  # the hero's home
        if re.search(rf"\b{found[0].removesuffix(OWNER)}\b", before):
            other = next(word for word in words if word.removesuffix(OWNER) not in prompt + rest)
            yield rest[:found.start()] + other + rest[found.end():]


@pytest.mark.parametrize("kind, words", WORDS, ids=[words[0] for _, words in WORDS])
def test_a_word_that_contradicts_is_found(kind, words):
    """Another name, colour, owner, thing, animal or place than before, wherever one was."""
    wrong = [(prompt, text) for prompt, rest in TOLD for text in planted(words, prompt, rest)]
    assert len(wrong) > 5
    for prompt, text in wrong:
        assert kind in kinds(prompt, text), (prompt, text)


@pytest.mark.parametrize("word, other", [("he", "she"), ("she", "he"), ("He", "She"), ("She", "He"),
                                         ("his", "her"), ("him", "her"), ("His", "Her")])
def test_a_wrong_pronoun_is_found(word, other):
    """Each in turn, wherever there is one."""
    wrong = [(prompt, rest[:found.start()] + other + rest[found.end():])
             for prompt, rest in TOLD for found in re.finditer(rf"\b{word}\b", rest)]
    assert len(wrong) > 5
    for prompt, text in wrong:
        assert "pronoun" in kinds(prompt, text), (prompt, text)


def test_home_and_relatives_may_be_others():
    """One lives here and plays there; who gave the thing is not who is at home, but stays who it
    was."""
    prompt = "Tom lived with his aunt near the hill. His uncle had given him a red kite."
    rest = (" One day, Tom took the kite to the farm. A fox came, took the red kite and ran away."
            " \"My uncle gave it to me,\" he said sadly. Tom followed the fox all over the farm. So"
            " Tom gave the fox a nut and got the red kite back. Tom went home and told his aunt all"
            " about it.")
    assert violations(prompt, rest) == []
    assert [tuple(v) for v in violations(prompt, rest.replace("My uncle", "My aunt"))] == [
        ("name", "aunt")]
    assert [tuple(v) for v in violations(prompt, rest.replace("told his aunt", "told his uncle"))
            ] == [("name", "uncle")]
    assert [tuple(v) for v in violations(prompt, rest.replace("all over the farm", "all over the "
                                                                                   "hill"))
            ] == [("place", "the hill")]


def test_a_broken_sentence_is_found():
    """A word that no story has, a letter too few, no space between two sentences."""
    for prompt, rest in TOLD:
        for at in [m.start() for m in re.finditer(" ", rest)][1::5]:
            assert "grammar" in kinds(prompt, rest[:at] + " indeed" + rest[at:])
        assert "grammar" in kinds(prompt, rest[:-2] + ".")
        assert "grammar" in kinds(prompt, rest.replace(". ", ".", 1))


def test_a_broken_plot_is_found():
    """No end, an end too many, a sentence twice, two in the wrong order, one from another plot."""
    for prompt, rest in TOLD:
        first, *sentences = SENTENCE.split(rest)
        for wrong in (sentences[:-1], sentences + sentences[-1:], sentences[:1] + sentences,
                      sentences[::-1], [*sentences[:-1], "But that is another story."]):
            assert "plot" in kinds(prompt, " ".join([first, *wrong])), wrong


def test_what_is_wrong_is_named():
    """The kind and the word, in the order of the text."""
    prompt = "Once upon a time, there was a girl named Lily. Lily had a red kite."
    rest = (" One sunny day, Anna took the kite to the park. When he looked away, a fox carried off"
            " his kite. Lily followed the cat all over the farm. So Lily gave the fox a nut and got"
            " the blue kite back. The kite can fly. And Lily loved her red drum more than ever.")
    assert [tuple(v) for v in violations(prompt, rest)] == [
        ("name", "Anna"), ("pronoun", "he"), ("pronoun", "his"), ("animal", "cat"),
        ("place", "the farm"), ("colour", "blue"), ("grammar", "The kite can fly."),
        ("thing", "drum")]
    assert violations(prompt, "") == [("plot", "")]
    assert ("owner", "Nora's") in violations(prompt, " Then a hungry fox took Nora's kite and ran "
                                                     "away.")
    assert ("pronoun", "girl") in violations("", "Tom was a kind little girl.")


# ------------------------------------------------------------------ other beginnings
STORIES = [prompt + rest for prompt, rest in examples(5, task=OURS)]


@pytest.mark.parametrize("story", STORIES, ids=range(5))
def test_a_story_may_be_cut_at_any_letter(story):
    """What is judged is the whole; what the beginning says holds for the rest."""
    for cut in range(0, len(story), 3):
        assert violations(story[:cut], story[cut:]) == []


FOREIGN = ["There was a dragon", "x = 3;", "Sarah", "Lily had an orange cat.", "A b. C d! E",
           "Tom was a girl. She had a dragon.", "\"What?\" said the dragon.", "数", "Once upon a",
           "Anna had a red kite. Her kite was blue"]


@pytest.mark.parametrize("prompt", FOREIGN)
def test_behind_another_beginning_the_rest_is_judged(prompt):
    """A story of its own is right, with names of its own; its contradictions are found; and what
    was no sentence may end there, in one dot or three, but cannot go on."""
    dots = "" if prompt[-1] in ".!?" else "..."
    for story in STORIES:
        assert violations(prompt, f"{dots} But that is another story. {story}") == []
        assert violations(prompt, f"{dots} {story}") == []
        assert violations(prompt, f"{dots[1:]} {story}") == []
        assert "plot" in kinds(prompt, f"{dots} But that is another story.")
        wrong = next(planted(NAMES, "", story))
        assert "name" in kinds(prompt, f"{dots} {wrong}")
        assert "grammar" in kinds(prompt, f" indeed. {story}")


def test_most_prefaces_are_no_story():
    """What stands for other beginnings has a word that no story has."""
    known = " ".join(SHAPES) + " ".join(word for _, words in FACTS.values() for word in words)
    assert not set(OUTSIDE) & set(re.findall(r"\w+", known))
    outside = [prompt for prompt, _ in examples(50, task=Stories(outside=1))]
    assert all(not read(prompt, "").facts or "story" in prompt for prompt in outside)


def test_the_check_survives_any_text():
    """What an untrained model writes is wrong, and no crash."""
    for prompt in ("Once upon a time", "", " ", "Lily had a red kite. "):
        for text in ("", " ", ".", "...", "\x00", "é ░ 数", "kite" * 99, ". " * 99, "\n\n", "\"",
                     "{Tom}", "[once |]", "Lily"):
            assert STORY.check(prompt, text) is False


def test_doubt_does_not_multiply():
    """A sentence that fits two of the table, again and again: readings that are alike are one."""
    text = ' "Shall we swap?" asked Max.' * 40
    assert {"plot"} <= kinds('"Shall we swap?" asked Tom. "Shall we swap?" asked Ben.', text)


def test_two_that_differ_are_never_the_same():
    """Hero and friend, both colours, both hiding places."""
    for one, two in DIFFERENT.items():
        facts = [choose_facts(random.Random(seed)) for seed in range(50)]
        assert all(chosen[one] != chosen[two] for chosen in facts)
    assert "name" in kinds("Tom was a kind little boy. Tom had a red kite.",
                           " On the way to the park, Tom met his friend Tom.")


# ------------------------------------------------------------------ the shipped model
def told(prompts: list[str], steps: int) -> list[str]:
    """How checkpoints/stories goes on, in blocks of 32 tokens as sample.py does."""
    backbone, tokenizer = load("stories", "cpu")
    ids, pad = left_pad([tokenizer.encode(prompt) for prompt in prompts], backbone.config.eos_id)
    sample = generate(backbone, ids, pad_mask=pad, gen_length=160, steps=steps, stop_at_eos=True)
    return [tokenizer.decode(row, skip_special=True) for row in sample.ids[:, ids.shape[1]:]]


def test_the_shipped_model_tells_stories():
    """At one token per step, from a beginning of the grammar and from one that it never saw; in an
    eighth of the steps not."""
    prompts = [draw("stories", random.Random(1), True)[0], "The old dragon yawned"]
    assert all(map(STORY.check, prompts, told(prompts, 160)))
    assert not all(map(STORY.check, prompts, told(prompts, 20)))


def test_the_shipped_model_is_small():
    """At most 1.5 million parameters in float32, and a tokenizer of its own."""
    folder = CHECKPOINTS["stories"]
    assert load("stories", "cpu")[0].config.parameters <= 1_500_000
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 12e6
