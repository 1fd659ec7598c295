"""Looking into a generation: how far a memory's slots move, how sure the model is."""
from __future__ import annotations

import torch

BARS = "▁▂▃▄▅▆▇█"


class Watched:
    """A memory that keeps, of its last update, how far each slot moved, and of the last step how
    sure the model was of its best token at each position of the block. Both are written in place,
    so that they are right too where a step is replayed as a CUDA graph. `adjust` goes to `generate`
    beside the memory itself."""

    def __init__(self, memory):
        self.memory, self.inject = memory, memory.inject
        self.moved = self.sure = torch.empty(0)
        self.before = None  # another `adjust`

    def initial(self, batch: int) -> torch.Tensor:
        """The memory's (B, M, D), or whatever it is."""
        state = self.memory.initial(batch)
        self.moved = lengths(torch.zeros_like(state))
        return state

    def update(self, s: torch.Tensor, *seen) -> torch.Tensor:
        """The memory's (B, M, D); .moved (B, M) has the lengths of what was added to each slot."""
        new = self.memory.update(s, *seen)
        self.moved.copy_(lengths(new - s))
        return new

    def adjust(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The logits (B, L, V), as they are or as `before` leaves them; .sure (B, L) has their
        largest probabilities."""
        if self.before is not None:
            logits = self.before(logits, ids)
        if self.sure.shape != logits.shape[:2] or self.sure.device != logits.device:
            self.sure = logits.new_zeros(logits.shape[:2])
        self.sure.copy_(logits.softmax(-1).amax(-1))
        return logits

    def of_row(self, row: int) -> dict[str, list[float]]:
        """{"slots": how far each moved, "sure": of each position of the block} of a row, now."""
        return {name: [round(x, 4) for x in values[row].tolist()] if len(values) else []
                for name, values in (("slots", self.moved), ("sure", self.sure))}


def lengths(state: torch.Tensor) -> torch.Tensor:
    """(B, M) of a state (B, M, ...); one that is (B, D) is taken for a single slot."""
    slots = state if state.dim() > 2 else state.flatten(1)[:, None]
    return slots.flatten(2).norm(dim=-1)


class Bars:
    """The lines of a live view that show a `Watched` memory: a bar for each slot, up to the last
    that has ever moved, of which the highest is the largest move so far, and one for each position
    of the block, of which the highest is certainty."""

    def __init__(self, watched: Watched):
        self.watched, self.most, self.used = watched, 1e-9, 0

    def __call__(self) -> list[str]:
        now = self.watched.of_row(0)
        self.most = max([self.most, *now["slots"]])
        self.used = max([self.used, *(i for i, x in enumerate(now["slots"], 1) if x)])
        slots = "".join(bar(x / self.most) for x in now["slots"][:self.used])
        return [f"slots moved   {slots}"] * bool(slots) + [
            "sure of each  " + "".join(map(bar, now["sure"]))]


def bar(share: float) -> str:
    """A block character as high as a share of 1."""
    return BARS[min(int(share * len(BARS)), len(BARS) - 1)]
