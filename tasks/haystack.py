"""Needles in a haystack: assignments scattered in filler, and one or several to find or follow."""
from __future__ import annotations

import string


class Haystack:
    """`length` tokens of filler with eight assignments "K=v" scattered in it, and a query. Asked
    for needles, the answer is their values; asked to track, it follows one variable through as many
    assignments "c=b", "b=7" until a digit comes. Half of the assignments that nobody asks for name
    another one of them, so that a letter behind "=" gives nothing away.

    Assignments look as in `Chain`, filler is words of capitals, and the query has one width, so
    that each of the answer's tokens has its counterpart in it 16 before."""

    names, pairs, slots = "abcdefgh", 8, 4

    def __init__(self, length: int, needles: int, track: bool = False):
        if length < 4 * self.pairs:
            raise ValueError(f"a haystack has at least {4 * self.pairs} tokens, not {length}")
        self.length, self.needles, self.track = length, needles, track

    def make(self, rng):
        names = rng.sample(self.names, self.pairs)
        asked, others = names[:self.needles], names[self.needles:]
        value = {name: str(rng.randrange(10)) for name in names}
        value |= {name: rng.choice([o for o in others if o != name]) for name in others
                  if rng.random() < 0.5}
        if self.track:
            value |= dict(zip(asked, asked[1:]))
        words, rest = divmod(self.length - 4 * self.pairs, 3)
        pieces = [f"{name}={value[name]} " for name in names]
        pieces += ["".join(rng.choices(string.ascii_uppercase, k=2)) + " " for _ in range(words)]
        rng.shuffle(pieces)
        query = " ".join(f"{name}=?" for name in (asked[:1] if self.track else asked))
        prompt = f"{''.join(pieces)}{'.' * rest}\n{query.ljust(4 * self.slots - 1)}\n"
        return prompt, " ".join(f"{name}={value[name]}" for name in asked)

    def check(self, prompt, text):
        hay, query = prompt.splitlines()
        value = dict(word.rstrip(".").split("=") for word in hay.split() if "=" in word)
        todo, right = [word[0] for word in query.split()], []
        while todo:
            name = todo.pop(0)
            right.append(f"{name}={value[name]}")
            if value[name] in value:
                todo.insert(0, value[name])
        return text.split() == right

    def split_key(self, prompt, answer):
        return prompt


KINDS = {"needle1": (1,), "needle2": (2,), "needle4": (4,), "track2": (2, True),
         "track4": (4, True)}  # kind -> what is asked for
LENGTHS = (64, 96, 128, 256)  # tokens of a haystack; training is at 64
HAYSTACKS = {f"{kind}-{length}": Haystack(length, *asked)
             for length in LENGTHS for kind, asked in KINDS.items()}
