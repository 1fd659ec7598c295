"""Where answers end, and the results that a killed run goes on with."""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple, Sequence

import torch

from lib.cli import InputError
from lib.files import parse_json, read_json, to_json
from lib.tokenizer import Tokenizer


# ------------------------------------------------------------------ where an answer ends
class Ends:
    """What ends the answers of a batch: stop tokens and, for each row, stop strings. As `on_step`
    it says True once every row has all that it needs."""

    def __init__(self, tokenizer: Tokenizer, mask_id: int, tokens: set[int],
                 until: list[Sequence[str]], start: int):
        self.tokenizer, self.mask_id, self.start = tokenizer, mask_id, start
        self.until, self.open = until, set(range(len(until)))
        special = {u: tokenizer.vocab[u] for u in set(itertools.chain(*until))
                   if u in tokenizer.vocab and not tokenizer.decode([tokenizer.vocab[u]], True)}
        self.tokens = [tokens | {special[u] for u in row if u in special} for row in until]

    def __call__(self, step) -> bool:
        rows = step.ids[:, self.start:].tolist()
        for i in sorted(self.open):
            settled = list(itertools.takewhile(lambda token: token != self.mask_id, rows[i]))
            text = self.tokenizer.decode(settled, skip_special=True)
            if self.tokens[i].intersection(settled) or any(u in text for u in self.until[i]):
                self.open.discard(i)
        return not self.open

    def cut(self, i: int, ids: list[int]) -> str:
        """The text of row i's answer up to its first stop token or stop string."""
        ids = list(itertools.takewhile(lambda token: token not in self.tokens[i], ids))
        text = self.tokenizer.decode([t for t in ids if t != self.mask_id], skip_special=True)
        return text[:min((text.find(u) for u in self.until[i] if u in text), default=len(text))]


class Written(NamedTuple):
    """What a generation wrote for one prompt."""
    text: str            # the answer up to its end; where the prompt had masks, behind it filled
    tokens: int          # up to the end, a stop string included
    finish_reason: str   # "eos", "stop" (a stop string), "length", or "filled": no answer at all


def written(prompt: list[int], row: list[int], ends: Ends, i: int) -> Written:
    """What stands in row i of ids (P + G) behind its prompt of P ids, or in its place of masks."""
    answer, decode = row[len(prompt):], ends.tokenizer.decode
    kept = list(itertools.takewhile(lambda token: token not in ends.tokens[i], answer))
    reason = "filled" if not answer else "length" if len(kept) == len(answer) else "eos"
    kept = [token for token in kept if token != ends.mask_id]
    text, whole = ends.cut(i, answer), decode(kept, skip_special=True)
    if len(text) < len(whole):
        reason = "stop"
        kept = next(kept[:n] for n in range(1, len(kept) + 1) if any(
            stop in decode(kept[:n], skip_special=True) for stop in ends.until[i]))
    holes = prompt.count(ends.mask_id)
    if holes:
        text = decode(row[:len(prompt)], skip_special=True) + text
    return Written(text, holes + len(kept), reason)


def end_tokens(tokenizer: Tokenizer, eos_id: int) -> set[int]:
    """EOS, and the end of a turn in the chat format."""
    turn = tokenizer.vocab.get(tokenizer.end_of_turn)
    return {eos_id} | ({turn} if turn is not None else set())


def stop_tokens(folder: Path, tokenizer: Tokenizer, eos_id: int) -> set[int]:
    """EOS, the end of a turn in the chat format, and what generation_config.json calls EOS."""
    file = folder / "generation_config.json"
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    stated = stated if isinstance(stated, list) else [stated]
    return end_tokens(tokenizer, eos_id) | {token for token in stated if type(token) is int}


HOLDS = ("no", "late", "never")


def held(hold: str, eos_id: int, tokenizer: Tokenizer, device) -> dict:
    """The options of `generate` that hold EOS back: "late", LLaDA's `confidence_eos_eot_inf`, has
    it and the end of a turn committed last; "never", its `logits_eos_inf`, which leaves the end of
    a turn, has it not written at all."""
    if hold == "late":
        return {"late": sorted(end_tokens(tokenizer, eos_id))}
    if hold == "never":
        index = torch.tensor([eos_id], device=device)
        return {"adjust": lambda logits, ids: logits.index_fill(-1, index, -torch.inf)}
    return {}


# ------------------------------------------------------------------ what is already known
class Store:
    """Results by key in a folder, one JSON line each, with which a killed run goes on. Every
    process of several writes a file of its own and reads all."""

    def __init__(self, folder: str | Path, name: str, rank: int = 0):
        self.path, self.known = Path(folder) / f"{name}-{rank}.jsonl", {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.path.parent.glob(f"{name}-*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:  # the last line of a killed run may be cut short
                    self.known |= parse_json(line, file)
                except InputError:
                    continue

    def add(self, found: dict[str, object]) -> None:
        """Keep results, all of them or, if the process is killed, none."""
        self.known |= found
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + to_json(found) + "\n")
