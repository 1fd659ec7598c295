"""Little stories, written and judged by one table of sentences.

A story is a plot, a list of stages, and a dictionary of facts: who the hero is, what colour the
kite has, where it was put. `make` takes a sentence from every stage and fills in the facts;
`violations` takes a text apart by the same sentences, and what they say has to agree with what was
said before. No fact changes: a kite that is painted or given away has two colours or two owners,
and the stage decides which of them a sentence names.

The sentences are written as if the hero were Tom, his friend Anna and the thing a red kite: what
stands in {braces} is an example of a fact, [this|that] is a choice of words that says nothing, and
an empty sentence means that the stage may be left out. 236 sentences, with their choices 1,034
shapes.
"""
from __future__ import annotations

import functools
import random
import re
from string import ascii_lowercase
from typing import NamedTuple

# ------------------------------------------------------------------ the facts
BOYS = "Tom Ben Max Leo Sam Jack Finn Noah Paul Hugo Oscar Theo".split()
GIRLS = "Anna Lily Mia Ella Nora Rosa Emma Lucy Zoe Ida Clara Ruth".split()
NAMES = BOYS + GIRLS
COLOURS = "red blue green yellow white black pink brown purple grey".split()
SPOTS = ["under the bench", "by the gate", "behind the hedge", "on the wall", "under the oak",
         "behind the shed", "beside the path", "in the tall grass", "by the fence", "on the steps"]
FACTS = {  # example: (kind of the violation where it changes, what it may be)
    "Tom": ("name", NAMES),
    "Anna": ("name", NAMES),
    "friend": ("name", ["friend", "cousin", "neighbour"]),
    "grandmother": ("name", "grandmother grandfather mother father aunt uncle".split()),
    "red": ("colour", COLOURS),
    "blue": ("colour", COLOURS),
    "kite": ("thing", "kite drum boat doll bell basket cup whistle lantern puppet flute train robot"
                      " wagon".split()),
    "bun": ("thing", "bun pear plum carrot cookie cherry nut".split()),
    "fox": ("animal", "fox dog cat crow goat monkey rabbit mouse".split()),
    "duck": ("animal", "duck frog swan turtle beaver goose".split()),
    "the park": ("place", ["the park", "the garden", "the beach", "the forest", "the meadow",
                           "the market", "the hill", "the playground", "the orchard", "the farm"]),
    "the pond": ("place", ["the pond", "the lake", "the river", "the stream", "the canal"]),
    "under the bench": ("place", SPOTS),
    "by the gate": ("place", SPOTS)}
SEXES = "boy", "girl"
PRONOUNS = {"he": ("Tom", "he", "she"), "his": ("Tom", "his", "her"), "him": ("Tom", "him", "her"),
            "boy": ("Tom", "boy", "girl"), "she": ("Anna", "he", "she"),
            "her": ("Anna", "his", "her")}  # example: (who, the word for a boy, for a girl)
DIFFERENT = {"Tom": "Anna", "red": "blue", "under the bench": "by the gate"}
DIFFERENT |= {two: one for one, two in DIFFERENT.items()}

# ------------------------------------------------------------------ the sentences
BRIDGE = (  # after a beginning that none of these sentences would have
    "But that is another story.", "But this story is about [somebody|someone] else.",
    "[Nobody|No one] knows how that ended.", "That is a story for another day.")
OPEN = (
    "", "Once upon a time[,|] there was a [little |kind |quiet |brave |]{boy} named {Tom}.",
    "Once upon a time[,|] there lived a [little |happy |]{boy} [named|called] {Tom}.",
    "[Once|Long ago|A long time ago][,|] there was a [little |kind |brave |]{boy} named {Tom}.",
    "There was [once |]a [little |kind |happy |]{boy} [named|called] {Tom}.",
    "In a [small|quiet|sunny] [town|village], there lived a {boy} named {Tom}.",
    "{Tom} was a [kind|brave|cheerful|curious] [little|young] {boy}.",
    "A [little |young |]{boy} named {Tom} lived near {the park}.",
    "{Tom} lived with {his} {grandmother} near {the park}.",
    "One [day|morning], a [little |]{boy} named {Tom} [woke up early|looked out of the window].",
    "The [little |]{boy} in this story was called {Tom}.",
    "This is the story of a [little |brave |]{boy} named {Tom}.")
OWN = (
    "{Tom} had a {red} {kite}.",
    "{He} had a {red} {kite} that {he} loved [very much|more than anything].",
    "{His} {grandmother} had given {him} a {red} {kite}.",
    "On {his} birthday, {his} {grandmother} gave {him} a {red} {kite}.",
    "[Every day|All day long|Each morning], {Tom} played with {his} {red} {kite}.",
    "{He} was [very |so |]proud of {his} [new |old |]{red} {kite}.",
    "Nobody had a [finer|nicer|prettier] {kite} than {Tom}, and it was {red}.",
    "{Tom}'s {kite} was {red}, and {he} took it everywhere.",
    "Of all {his} things, {he} liked {his} {red} {kite} best.")
FRIEND = (
    "{His} {friend} {Anna} lived [next door|across the street|nearby].",
    "{He} often played with {his} {friend} {Anna}.",
    "{Anna} was {his} {friend}, and {she} liked the {kite} too.",
    "{His} [best |dear |]{friend} was called {Anna}.", "{Tom} had a {friend} named {Anna}.")
GO = (
    "One [sunny |windy |cold |fine |]day, {Tom} took the {kite} to {the park}.",
    "[On Sunday|In spring|One morning], {Tom} carried the {kite} to {the park}.",
    "The sun was shining, so {he} went to {the park} with the {red} {kite}.",
    "One [afternoon|morning], {he} walked to {the park}, and the {kite} came along.")
MEET = (
    "One [sunny |windy |fine |]day, {Tom} and {his} {friend} {Anna} went to {the park}.",
    "On the way to {the park}, {Tom} met {his} {friend} {Anna}.",
    "\"Let us go to {the park},\" said {his} {friend} {Anna} [one day|one morning].",
    "[On Sunday|In spring|One day], {he} took it to {the park} with {his} {friend} {Anna}.",
    "{His} {friend} {Anna} came, and they carried the {kite} to {the park}.")
SAD = (
    "", "{Tom} was [very |so |]sad.", "{He} [began to cry|cried and cried|could not stop crying].",
    "\"Oh no, my {red} {kite}!\" cried {Tom}.", "{Tom} did not know what to do.",
    "Big tears ran down {his} face.", "\"My {grandmother} gave it to me,\" {he} said sadly.")
COMFORT = (
    "", "\"Do not [cry|worry|be sad], {Tom},\" said {Anna}.", "{Anna} took {his} hand.",
    "\"I will help you, {Tom},\" said {Anna}.", "{Anna} saw that {Tom} was sad.",
    "But {Anna} only smiled, for {she} had an idea.")
THANKS = (
    "", "\"Thank you, {Anna},\" said {Tom}.", "{Tom} hugged {Anna} and [laughed|smiled].",
    "\"You are a good {friend}, {Anna},\" said {Tom}.", "{Tom} jumped for joy, and {Anna} laughed.",
    "{Tom} was so happy that {he} [danced|sang|clapped {his} hands].")
END = (
    "From then on, {he} took good care of {his} {red} {kite}.",
    "After that day, {Tom} never let go of {his} {red} {kite} again.",
    "That night, {Tom} slept with the {red} {kite} beside {him}.",
    "{Tom} went home and told {his} {grandmother} all about it.",
    "And {Tom} loved {his} {red} {kite} more than ever.")
END_TWO = END + (
    "{Tom} and {Anna} played with the {red} {kite} until [it was dark|the sun went down].",
    "Then {Tom} and {Anna} went home, and {he} carried the {red} {kite}.",
    "So {Tom} had {his} {red} {kite} again, and {Anna} was glad.")
PLOTS = {
    "lost": (BRIDGE, OPEN, OWN, MEET, (
        "{Tom} put the {kite} {under the bench} and [ran off to play|climbed a tree].",
        "{Tom} left {his} {kite} {under the bench} while they [played tag|picked flowers].",
        "There {Tom} laid the {red} {kite} {under the bench} and played with {Anna}.",
        "{Tom} wanted to [climb|run|dance], so {he} put {his} {kite} {under the bench}.",
        "\"Nobody will take it here,\" said {Tom}, and put the {kite} {under the bench}."), (
        "When {Tom} came home, {his} {kite} was [gone|not there].",
        "In the evening, {Tom} could not find {his} {red} {kite}.",
        "Back home, {Tom} saw that {he} had forgotten the {red} {kite}.",
        "At bedtime, {Tom} looked for the {kite}, but it was not there.",
        "They went home for supper, and {Tom} forgot {his} {kite}."), SAD, COMFORT, (
        "\"Let us go back to {the park},\" said {Anna}.",
        "So {Tom} and {Anna} ran back to {the park}.",
        "In the morning, {Anna} went back to {the park} with {Tom}.",
        "Together they searched all over {the park}."), (
        "There was the {red} {kite}, {under the bench}, where {Tom} had put it.",
        "{Anna} looked {under the bench} and found the {red} {kite}.",
        "The {kite} was still [lying |waiting |]{under the bench}.",
        "At last {she} found {Tom}'s {kite} {under the bench}.",
        "\"Here it is, {under the bench}!\" called {Anna}."), THANKS, END_TWO),
    "broken": (BRIDGE, OPEN, OWN, MEET, (
        "{Tom} ran too fast and fell, and the {red} {kite} broke.",
        "On the way, {Tom} tripped over a [stone|root|stick], and the {kite} broke.",
        "{Tom} dropped the {red} {kite} on a stone, and it broke [in two|to pieces].",
        "Suddenly there was a crack, and {Tom}'s {kite} was broken."), SAD, COMFORT, (
        "\"I can mend it,\" said {Anna}.",
        "\"Give me the {red} {kite} and I will mend it,\" said {Anna}.",
        "{Anna} ran home to get some [glue|string|tape].",
        "{Anna} picked up the pieces of {Tom}'s {kite}.",
        "At home, {Anna} asked {her} father for [glue|string|tape]."), (
        "{She} worked until evening, and the {red} {kite} was whole again.",
        "With [glue|string|tape] and clever hands, {she} mended {Tom}'s {kite}.",
        "Piece by piece, {Anna} put the {red} {kite} together again.",
        "Soon {she} had made the {red} {kite} as good as new."), THANKS, END_TWO),
    "wet": (BRIDGE, OPEN, OWN, (
        "One [sunny |windy |cold |fine |]day, {he} took it to {the pond}.",
        "One [afternoon|morning], {Tom} walked along {the pond} with {his} {kite}.",
        "{He} liked to sit by {the pond} with the {red} {kite}."), (
        "{He} slipped, and the {red} {kite} fell into {the pond}.",
        "The wind pushed {him}, and {his} {kite} fell into {the pond}.",
        "With a big splash, {Tom}'s {kite} fell into {the pond}.",
        "{He} leaned over too far, and splash, the {red} {kite} was in the water."), SAD, (
        "Just then, a [little |friendly |]{duck} came by.", "A [little |big |]{duck} heard {him}.",
        "\"Can I help you?\" asked a [little |friendly |]{duck}."), (
        "", "\"My {red} {kite} fell into {the pond},\" said {Tom}.",
        "{Tom} told the {duck} about {his} {red} {kite}.",
        "{He} pointed at {the pond}, and the {duck} nodded."), (
        "The {duck} dived into {the pond} and brought back the {red} {kite}.",
        "The {duck} swam fast and pulled {Tom}'s {kite} out of {the pond}.",
        "Down went the {duck}, and it came up with the {red} {kite}.",
        "At once the {duck} fished the {kite} out of {the pond}."), (
        "", "\"Thank you, [dear|kind|good] {duck},\" said {Tom}.",
        "{Tom} [thanked|hugged] the wet {duck}.", "{Tom} gave the {duck} a {bun}."), END + (
        "After that, {Tom} and the {duck} were friends.",
        "Every day, {he} brought a {bun} to {the pond} for the {duck}.",
        "{He} dried the {red} {kite} in the sun and went home.")),
    "stolen": (BRIDGE, OPEN, OWN, GO, (
        "A {fox} came, took the {red} {kite} and ran away.",
        "When {he} looked away, a {fox} carried off {his} {kite}.",
        "Then a [sly|naughty|hungry] {fox} took {Tom}'s {kite} and ran away.",
        "Out of nowhere came a {fox} and ran off with the {red} {kite}."), SAD, (
        "{Tom} ran after the {fox} as fast as {he} could.",
        "\"Stop!\" cried {Tom}, but the {fox} did not stop.",
        "{Tom} followed the {fox} all over {the park}."), (
        "", "At last {he} found the {fox} {under the bench}.",
        "The {fox} sat down {under the bench} with the {red} {kite}.",
        "The {fox} hid {under the bench}, but {Tom} saw it."), (
        "", "\"I am [so |very |]hungry,\" said the {fox}.",
        "\"For a {bun} you get it back,\" said the {fox}.",
        "The {fox} was only hungry and wanted a {bun}."), (
        "So {Tom} gave the {fox} a {bun} and got the {red} {kite} back.",
        "{He} gave the {fox} a {bun}, and the {fox} gave {him} the {red} {kite}.",
        "For {his} last {bun}, {Tom} got {his} {kite} back.",
        "The {fox} ate a {bun} {under the bench} and gave {him} the {red} {kite}."), (
        "", "\"I am sorry, {Tom},\" said the {fox}.", "\"Next time, just ask,\" said {Tom}.",
        "The {fox} ate the {bun} and [smiled|was happy]."), END + (
        "{Tom} and the {fox} became friends.",
        "From that day on, {Tom} always had a {bun} for the {fox}.",
        "Now the {fox} and {Tom} play with the {red} {kite} together.")),
    "painted": (BRIDGE, OPEN, OWN, (
        "But {Tom} liked {blue} better than {red}.", "But {he} wished that it were {blue}.",
        "\"I wish my {kite} were {blue},\" said {Tom}."), (
        "{His} {friend} {Anna} had a pot of {blue} paint.",
        "\"I have some {blue} paint,\" said {his} {friend} {Anna}.",
        "{His} {friend} {Anna} came with a brush and {blue} paint."), (
        "So {Tom} and {Anna} painted the {red} {kite} {blue}.",
        "{Tom} took a brush and painted {his} {red} {kite} {blue}.",
        "{Anna} helped {him}, and the {red} {kite} turned {blue}."), (
        "{Tom} put the {blue} {kite} {under the bench} to dry.",
        "They left it {under the bench} to dry in the sun.",
        "{Anna} carried the wet {kite} out and put it {under the bench}."), (
        "", "\"Do not touch it yet, {Tom},\" said {Anna}.",
        "\"Now it is {blue}!\" [cried|said] {Tom}.", "{Tom} could hardly wait."), (
        "The next morning, the {blue} {kite} was still {under the bench}, dry and bright.",
        "When it was dry, {Tom} found {his} {blue} {kite} {under the bench}.",
        "Soon the {kite} {under the bench} was dry, and how {blue} it was!"), THANKS, (
        "Now everybody knew {Tom}'s {blue} {kite}.",
        "{Tom} and {Anna} took the {blue} {kite} to {the park}.",
        "That night, {Tom} dreamed of {his} {blue} {kite}.",
        "{His} {grandmother} did not know {his} {blue} {kite} at first.")),
    "given": (BRIDGE, OPEN, OWN, (
        "{His} {friend} {Anna} had no {kite}.", "{His} {friend} {Anna} had lost {her} own {kite}.",
        "{Anna}, {his} {friend}, had never had a {kite}."), (
        "{Anna} was often [alone|sad].", "\"I wish I had one,\" said {Anna}.",
        "It was {Anna}'s birthday, but nobody had a present.",
        "One day, {Anna} sat near {the park} and looked sad."), (
        "", "{Tom} thought for a long time.", "{Tom} looked at {Anna} and then at {his} {kite}.",
        "\"{Anna} needs it more than I do,\" thought {Tom}."), (
        "{Tom} hid the {red} {kite} {under the bench} for {Anna}.",
        "Quietly {Tom} put the {red} {kite} {under the bench}.",
        "{Tom} tied a ribbon to {his} {kite} and put it {under the bench}."), (
        "", "\"Look {under the bench},\" said {Tom} to {Anna}.",
        "\"I have something for you, {Anna},\" said {Tom}.", "Then {Tom} called {Anna}."), (
        "{Anna} looked {under the bench} and found the {red} {kite}.",
        "There, {under the bench}, {she} saw the {red} {kite}.",
        "{Anna} ran and found {Tom}'s {kite} {under the bench}."), (
        "\"It is yours now, {Anna},\" said {Tom}.",
        "\"This {red} {kite} is for you,\" said {Tom}."), (
        "", "\"Thank you, {Tom},\" said {Anna}.", "{Anna} laughed and hugged {Tom}."), (
        "From then on it was {Anna}'s {kite}, and {Tom} was glad.",
        "Now {Anna} had a {red} {kite}, and {Tom} had a happy {friend}.",
        "That night, {Anna}'s {red} {kite} stood beside {her} bed.",
        "{Anna} let {Tom} play with {her} {red} {kite} whenever {he} came.")),
    "swapped": (BRIDGE, OPEN, OWN, (
        "{His} {friend} {Anna} had a {blue} {kite}.",
        "{Anna}, {his} {friend}, had a {kite} too, but it was {blue}.",
        "{His} {friend} was called {Anna}, and {Anna}'s {kite} was {blue}."), (
        "", "One [afternoon|morning|day], {Tom} and {Anna} went to {the park}.",
        "The next day, {Tom} met {Anna} on the way to {the park}.",
        "\"Let us go to {the park},\" said {Anna} one day."), (
        "{Anna} could not stop looking at {Tom}'s {red} {kite}.",
        "\"Your {blue} {kite} is [lovely|beautiful], {Anna},\" said {Tom}.",
        "\"I like your {red} {kite}, {Tom},\" said {Anna}."), (
        "", "\"Shall we swap?\" asked {Anna}.", "\"Shall we swap?\" asked {Tom}.",
        "\"Take my {red} {kite} and give me the {blue} one,\" said {Tom}.",
        "\"Take my {blue} {kite} and give me the {red} one,\" said {Anna}."), (
        "So {Tom} took the {blue} {kite}, and {Anna} took the {red} one.",
        "{Tom} gave {Anna} the {red} {kite} and got the {blue} one."), (
        "", "Now the {red} {kite} was {Anna}'s, and the {blue} one was {Tom}'s.",
        "{Tom} laughed, and {Anna} laughed too.", "\"Now I have a {blue} {kite}!\" cried {Tom}.",
        "\"Now I have a {red} {kite}!\" cried {Anna}."), (
        "{Tom} carried the {blue} {kite} home, and {Anna} carried the {red} one.",
        "Both were happy, {Tom} with the {blue} {kite} and {Anna} with the {red} one.",
        "That night, the {blue} {kite} stood by {Tom}'s bed and the {red} one by {Anna}'s.")),
    "hidden": (BRIDGE, OPEN, OWN, FRIEND, (
        "One day, {Anna} hid the {red} {kite} {under the bench}.",
        "\"Close your eyes,\" said {Anna}, and hid {Tom}'s {kite} {under the bench}.",
        "For fun, {Anna} took the {red} {kite} and hid it {under the bench}."), (
        "", "\"Now find it, {Tom}!\" called {Anna}.", "{Tom} counted to ten and began to search.",
        "\"Where is my {red} {kite}?\" asked {Tom}."), (
        "{Tom} looked {by the gate}, but there was nothing.",
        "\"Is it {by the gate}?\" asked {Tom}, but it was not there.",
        "First {Tom} searched {by the gate}, but no {kite} was there."), (
        "", "\"Cold, very cold,\" laughed {Anna}.", "{Anna} [laughed|giggled] behind {her} hand.",
        "\"Try again, {Tom},\" said {Anna}."), (
        "Then {he} looked {under the bench}, and there was {his} {red} {kite}.",
        "At last {Tom} found the {red} {kite} {under the bench}.",
        "\"It is {under the bench}!\" cried {Tom}, and {he} was right."), (
        "", "Then {Tom} hid it {by the gate}, and {Anna} found it there.",
        "\"Now it is your turn, {Anna},\" said {Tom}.", "\"Well done, {Tom},\" said {Anna}."),
        END_TWO)}

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
    does where the continuation breaks such a sentence off with three dots."""
    readings, end, whole = [Reading(BEGINNING, {})], len(prompt.rstrip()), prompt + text.rstrip()
    borders = [0, *(i for found in SENTENCE.finditer(whole) for i in found.span()), len(whole)]
    for start, stop in zip(borders[::2], borders[1::2]):
        sentence = whole[start:stop].strip()
        given, broken_off = stop <= end, start < end and whole[end:stop] == "..."
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
        readings = [r for r in found if len(r.wrong) == least]
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
SENTENCES = 6, 9  # of a story, where its plot can do with the fewer


def choose_facts(rng: random.Random) -> dict[str, str]:
    """What stands for every example, also where it begins a sentence."""
    facts = {example: rng.choice(words) for example, (_, words) in FACTS.items()}
    for one, two in DIFFERENT.items():
        while facts[one] == facts[two]:
            facts[one] = rng.choice(FACTS[one][1])
    for example, (who, *words) in PRONOUNS.items():
        facts[example] = words[facts[who] in GIRLS]
    return facts | {capital(example): capital(word) for example, word in facts.items()}


def fill(text: str, rng: random.Random, facts: dict[str, str]) -> str:
    """A sentence of the table with its choices made and its facts filled in."""
    text = re.sub(r"\[(.*?)\]", lambda found: rng.choice(found[1].split("|")), text)
    return text.format_map(facts)


def tell(rng: random.Random) -> list[str]:
    """The sentences of a story. One without an opening begins with the hero's name."""
    facts, stages = choose_facts(rng), rng.choice(list(PLOTS.values()))[1:]
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
    story has: the rest says so, and tells another. The split is by hero, colour and thing."""

    def __init__(self, outside: float = 0.1):
        self.outside = outside

    def make(self, rng):
        story = tell(rng)
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

    def check(self, prompt, text):
        return not violations(prompt, text)

    def split_key(self, prompt, answer):
        facts = read(prompt, answer).facts
        return " ".join(facts.get(example, "") for example in ("Tom", "red", "kite"))
