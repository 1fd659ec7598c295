"""Little stories, written and judged by one table of sentences.

A story is a plot, a list of stages, and a dictionary of facts: who the hero is, what colour the
kite has, where it was put. `Stories.make` takes a sentence from every stage and fills in the facts;
`violations` takes a text apart by the same sentences, and what they say has to agree with what was
said before. No fact changes: a kite that is painted or given away has two colours or two owners,
and the stage decides which of them a sentence names.
"""
from __future__ import annotations

import functools
import random
import re
from string import ascii_lowercase
from typing import NamedTuple

from tasks.sentences import (ALIKE, BRIDGE, DIFFERENT, FACTS, GIRLS, NAMES, OPEN, PLOTS, PRONOUNS,
                             SEXES)

# ------------------------------------------------------------------ from a sentence to its parts
Fact = tuple[str, str, str]  # the kind of a violation, what is said something about, and what
Place = tuple[str, int]      # a plot and the stage that was told last
BEGINNING = frozenset((plot, 0) for plot in PLOTS)
ANYWHERE = frozenset((plot, i) for plot, stages in PLOTS.items()
                     for i in range(-1, len(stages) - 1))
SENTENCE = re.compile(r"""(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]")\s+(?=["A-Z])""")  # between two


def capital(word: str) -> str:
    """As at the beginning of a sentence."""
    return word[0].upper() + word[1:]


CAPITALS = {capital(example): example for example in (*FACTS, *PRONOUNS)}


def meanings(example: str) -> dict[str, list[Fact]]:
    """The words that may stand for an example, each with what it says."""
    if example in PRONOUNS:
        who, *words = PRONOUNS[example]
        return {word: [("pronoun", f"{who}'s sex", sex)] for word, sex in zip(words, SEXES)}
    kind, words = FACTS[example]
    said = {word: [(kind, example, word)] for word in words}
    if words is NAMES:
        for name, facts in said.items():
            facts.append(("pronoun", f"{example}'s sex", SEXES[name in GIRLS]))
    return said


def slot(example: str, ending: str) -> dict[str, list[Fact]]:
    """The words for a place in a sentence: {kite}, {He}, or {Tom}'s, where another name would be
    another owner."""
    words = meanings(CAPITALS.get(example, example))
    if example in CAPITALS:
        words = {capital(word): said for word, said in words.items()}
    return {word + ending: [("owner" if ending and kind == "name" else kind, *fact)
                            for kind, *fact in said] for word, said in words.items()}


class Shape:
    """A sentence of the table, ready to be recognised."""

    def __init__(self, text: str):
        pattern, self.slots = "", []
        for piece in re.split(r"(\{.*?\}(?:'s)?|[][|])", text):
            if piece.startswith("{"):
                self.slots.append(slot(*piece[1:].split("}")))
                pattern += f"({'|'.join(self.slots[-1])})"
            else:
                pattern += {"[": "(?:", "|": "|", "]": ")"}.get(piece, re.escape(piece))
        self.match = re.compile(pattern).fullmatch

    def facts(self, match: re.Match) -> list[tuple[str, Fact]]:
        """(word, what it says) of a sentence that has this shape."""
        return [(word, fact) for word, said in zip(match.groups(), self.slots) if word
                for fact in said[word]]


SHAPES = {text: Shape(text) for stages in PLOTS.values() for stage in stages for text in stage
          if text}


@functools.cache
def following(places: frozenset[Place]) -> list[tuple[Shape, frozenset[Place]]]:
    """The sentences that may come next, and where the story stands after each."""
    found: dict[str, set[Place]] = {}
    for plot, last in places:
        for i in range(last + 1, len(PLOTS[plot])):
            for text in filter(None, PLOTS[plot][i]):
                found.setdefault(text, set()).add((plot, i))
            if "" not in PLOTS[plot][i]:
                break
    return [(SHAPES[text], frozenset(after)) for text, after in found.items()]


# ------------------------------------------------------------------ reading
class Violation(NamedTuple):
    """What is wrong: of which kind, and where."""

    kind: str      # "grammar", "plot", "name", "pronoun", "colour", "thing", "animal", "owner",
    where: str     # "place"; the word, or the sentence where it is none of the grammar or the plot


class Reading(NamedTuple):
    """How far a story was understood: where it may stand, what is known, and what was wrong."""

    places: frozenset[Place]
    facts: dict[str, str]
    wrong: tuple[Violation, ...] = ()

    def after(self, sentence: str, places: frozenset[Place]) -> list[Reading]:
        """The readings of a sentence that comes next, if the story stands at one of `places`."""
        found = []
        for shape, reached in following(places):
            if match := shape.match(sentence):
                facts, wrong = dict(self.facts), list(self.wrong)
                for word, (kind, about, value) in shape.facts(match):
                    twin = facts.get(DIFFERENT.get(about, ""))
                    if facts.setdefault(about, value) != value or twin == value:
                        wrong.append(Violation(kind, word))
                found.append(Reading(reached, facts, tuple(wrong)))
        return found

    def blamed(self, kind: str, sentence: str) -> Reading:
        """The same with one more violation. What is no sentence may stand for one of the next."""
        places = self.places
        if kind == "grammar":
            places = places.union(*(reached for _, reached in following(places)))
        return self._replace(places=places, wrong=(*self.wrong, Violation(kind, sentence)))


def read(prompt: str, text: str) -> Reading:
    """Read a beginning and its continuation, of which only the latter can do wrong. A sentence of
    the beginning that is none of ours may have been about anything: what follows starts anew. So it
    does where the continuation ends such a sentence with nothing but dots."""
    readings, end, whole = [Reading(BEGINNING, {})], len(prompt.rstrip()), prompt + text.rstrip()
    borders = [0, *(i for found in SENTENCE.finditer(whole) for i in found.span()), len(whole)]
    for start, stop in zip(borders[::2], borders[1::2]):
        sentence = whole[start:stop].strip()
        given, broken_off = stop <= end, start < end and whole[end:stop] in (".", "..", "...")
        found = [after for r in readings for after in r.after(sentence, r.places)]
        if not found and not broken_off:
            found = [after if given else after.blamed("plot", sentence)
                     for r in readings for after in r.after(sentence, ANYWHERE)]
        if given:
            found = [r._replace(wrong=()) for r in found]
        if not found and (given or broken_off):
            found = [Reading(ANYWHERE, {})]
        found = found or [r.blamed("grammar", sentence) for r in readings]
        least = min(len(r.wrong) for r in found)
        readings = list({(r.places, frozenset(r.facts.items()), r.wrong): r  # each of them once
                         for r in found if len(r.wrong) == least}.values())
    ended = [r for r in readings if any(i + 1 == len(PLOTS[plot]) for plot, i in r.places)]
    return ended[0] if ended else readings[0].blamed("plot", "")


def violations(prompt: str, text: str) -> list[Violation]:
    """What is wrong with a continuation, in the order in which it is met: a sentence that is none
    of ours ("grammar"), one that comes at the wrong point or a missing end ("plot"), or a word that
    contradicts an earlier one, by its kind. After another beginning than ours only the
    continuation is judged."""
    return list(read(prompt, text).wrong)


# ------------------------------------------------------------------ writing
OUTSIDE = ("dragon princess castle space ship planet king computer three seven ocean dinosaur "
           "school car teacher Sarah John wizard ghost secret house mountain eats number 7 2024 "
           "code please write why moon orange pizza English witch flew eat Peter elephant 1 "
           "Hello").split()
KNOWN = [*SHAPES, *(word for _, words in FACTS.values() for word in words),
         *(word for _, *words in PRONOUNS.values() for word in words)]
KNOWN = set(re.findall(r"\w+", " ".join(KNOWN).lower()))  # every word of every story
SENTENCES = 6, 9  # of a story, where its plot can do with the fewer


def choose_facts(rng: random.Random, few: int = 0) -> dict[str, str]:
    """What stands for every example, also where it begins a sentence; of each only `few` words."""
    known = {example: words[::-(-len(words) // few)] if few else words
             for example, (_, words) in FACTS.items()}
    facts = {example: rng.choice(words) for example, words in known.items() if example not in ALIKE}
    facts |= {example: facts[like] for example, like in ALIKE.items()}
    for one, two in DIFFERENT.items():
        while facts[one] == facts[two]:
            facts[one] = rng.choice(known[one])
    for example, (who, *words) in PRONOUNS.items():
        facts[example] = words[facts[who] in GIRLS]
    return facts | {capital(example): capital(word) for example, word in facts.items()}


def fill(text: str, rng: random.Random, facts: dict[str, str]) -> str:
    """A sentence of the table with its choices made and its facts filled in."""
    text = re.sub(r"\[(.*?)\]", lambda found: rng.choice(found[1].split("|")), text)
    return text.format_map(facts)


def tell(rng: random.Random, few: int = 0) -> list[str]:
    """The sentences of a story. One without an opening begins with the hero's name."""
    facts, stages = choose_facts(rng, few), rng.choice(list(PLOTS.values()))[1:]
    story = [fill(rng.choice(stage), rng, facts) for stage in stages]
    while not story[0] and facts["Tom"] not in story[1]:
        story[0] = fill(rng.choice(OPEN), rng, facts)
    extra = [i for i, stage in enumerate(stages) if i and story[i] and "" in stage]
    over = sum(map(bool, story)) - rng.randint(*SENTENCES)
    for i in rng.sample(extra, min(max(over, 0), len(extra))):
        story[i] = ""
    return [sentence for sentence in story if sentence]


def mumble(rng: random.Random, story: list[str]) -> str:
    """The beginning of a sentence with at least one word that no story has."""
    words = rng.choice(story[:3]).rstrip(".").split()
    words, share = words[:rng.randint(1, len(words))], rng.random()
    foreign = rng.randrange(len(words))
    for i in range(len(words)):
        if i == foreign or rng.random() < share:
            words[i] = (rng.choice(OUTSIDE) if rng.random() < 0.7 else
                        "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 9))))
    text = " ".join(words) + rng.choice(["", "", "", ".", "!", "?"])
    return capital(text) if rng.random() < 0.8 else text


class Stories:
    """The beginning of a story and the rest of it. `outside` is the share of beginnings that no
    story has: the rest says so, and tells another. few: as `choose_facts` has it, all if 0. The
    split is by hero, colour and thing."""

    continues = True  # its answers go on where the prompt stops

    def __init__(self, outside: float = 0.1, few: int = 0):
        self.outside, self.few = outside, few

    def make(self, rng):
        story = tell(rng, self.few)
        text, outside, number = " ".join(story), rng.random() < self.outside, rng.choice([1, 1, 2])
        preface = " ".join(mumble(rng, story) for _ in range(number * outside))
        if outside:
            dots = "" if preface[-1] in ".!?" else "..."
            text = f"{preface}{dots} {fill(rng.choice(BRIDGE), rng, {})} {text}"
        if outside and rng.random() < 0.7:
            cut = len(preface)
        elif not outside and rng.random() < 0.5:
            cut = len(" ".join(story[:rng.randint(1, 3)]))
        else:  # behind any word, most often one of the first
            spaces = [i for i, letter in enumerate(text) if letter == " "]
            cut = spaces[preface.count(" ") + rng.randrange(rng.randint(1, 24))]
            if not outside and rng.random() < 0.5:
                cut = len(text[:cut].rstrip(".,!?\""))
        cut += text[cut] == " " and rng.random() < 0.05
        return text[:cut], text[cut:]

    def read(self, text):
        return text

    def hint(self, prompt):
        """What to expect of a beginning with words that no story has, "" for others."""
        words = re.findall(r"\w+", prompt) or [prompt.strip()]
        unknown = [word for word in words if word.lower() not in KNOWN]
        if unknown[-1:] == words[-1:] and prompt.endswith(words[-1]) and any(
                word.startswith(words[-1].lower()) for word in KNOWN):
            unknown.pop()  # cut off in the middle
        return unknown and ("its few words do not include " + ", ".join(dict.fromkeys(unknown))
                            + ": it may go on with a story of its own") or ""

    def check(self, prompt, text):
        return not violations(prompt, text)

    def faults(self, prompt, text):
        """What is wrong, for people."""
        names = {"grammar": "none of its sentences", "plot": "at the wrong point"}
        return [f"{names.get(kind, kind)}: {where}" if where else "no end"
                for kind, where in violations(prompt, text)]

    def split_key(self, prompt, answer):
        facts = read(prompt, answer).facts
        return " ".join(facts.get(example, "") for example in ("Tom", "red", "kite"))
