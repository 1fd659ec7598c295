"""Shares of right answers with their intervals, and the table of them."""
from __future__ import annotations

import math
from itertools import product

import numpy as np

from lib.progress import progress


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion of n (Wilson's score interval)."""
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n
                                                          + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


class Accuracies:
    """right[variant] (training seeds, tasks, settings, prompts) of 0 and 1, with means over
    training seeds and prompts, and 95% intervals by bootstrap over both: a draw picks training
    seeds and each task's prompts with replacement, the same for every variant (the frozen backbone
    has one seed). Three seeds are few, so the intervals are rough. That of an accuracy is never
    narrower than Wilson's for so many prompts: where all are right a bootstrap sees no doubt."""

    def __init__(self, right: dict[str, np.ndarray], draws: int = 2000):
        self.seeds = {v: r.mean(3) for v, r in right.items()}          # (seeds, tasks, settings)
        self.means = {v: shares.mean(0) for v, shares in self.seeds.items()}  # (tasks, settings)
        self.prompts = next(iter(right.values())).shape[3]
        rng, picks = np.random.default_rng(0), {}  # picks: (of how many, rows) -> shares of each
        for r in right.values():
            picks |= {(r.shape[0], 1): [], (r.shape[3], r.shape[1]): []}
        for _ in progress(range(draws), "bootstrap", bar=False):
            for (n, rows), drawn in picks.items():
                drawn.append(rng.multinomial(n, [1 / n] * n, rows) / n)       # (rows, n)
        picks = {key: np.stack(drawn) for key, drawn in picks.items()}        # (draws, rows, n)
        self.draws = {v: np.einsum("ds,dtp,stqp->dtq", picks[r.shape[0], 1][:, 0],
                                   picks[r.shape[3], r.shape[1]], r, optimize=True)
                      for v, r in right.items()}                              # (draws, tasks, ...)

    def __call__(self, tasks: list[int], settings: list[int], variant: str,
                 minus: str | None = None) -> tuple[float, float, float]:
        """(mean, low, high) in percent over the chosen task and setting indices, of a variant or of
        its lead over another."""
        def over(means):
            value = means[variant] - (means[minus] if minus else 0)
            return 100 * value[..., tasks, :][..., settings].mean((-1, -2))
        mean, (low, high) = over(self.means), np.percentile(over(self.draws), [2.5, 97.5])
        if minus is None:
            least, most = wilson(mean / 100, len(tasks) * len(settings) * self.prompts)
            low, high = min(low, 100 * least), max(high, 100 * most)
        return float(mean), float(low), float(high)

    def cell(self, tasks: list[int], setting: int, variant: str) -> dict:
        """{"accuracy", "low", "high", "seeds": each training seed's accuracy} in percent of a
        variant, for one setting and the mean of the chosen tasks."""
        accuracy, low, high = self(tasks, [setting], variant)
        seeds = 100 * self.seeds[variant][:, tasks, setting].mean(1)
        return {"accuracy": accuracy, "low": low, "high": high, "seeds": seeds.tolist()}


class AccuracyTable:
    """The table task x variant x setting, each row printed once all of it is measured: `right` and
    `forwards` of a variant are (training seeds, tasks, settings, prompts). .rows has the cells as
    they go into JSON."""

    def __init__(self, seeds: dict[str, int], tasks: list[str], settings: list[str], prompts: int):
        self.tasks, self.settings, self.rows = tasks, settings, []
        shape = (len(tasks), len(settings), prompts)
        self.right, self.forwards = ({v: np.zeros((n, *shape)) for v, n in seeds.items()}
                                     for _ in range(2))
        print("| task | variant | " + " | ".join(settings) + " |")
        print("|---" * (len(settings) + 2) + "|", flush=True)

    def work(self) -> list[tuple[int, str, int, int]]:
        """(task, variant, setting, training seed) of everything to be measured, row by row."""
        return [(i, v, j, k) for i, v, j in product(range(len(self.tasks)), self.right, range(
            len(self.settings))) for k in range(len(self.right[v]))]

    def add(self, i: int, v: str, j: int, k: int, right: list[bool], forwards: list[int]) -> None:
        """What was measured for an item of `work`, in its order."""
        self.right[v][k, i, j], self.forwards[v][k, i, j] = right, forwards
        if (j + 1, k + 1) == (len(self.settings), len(self.right[v])):
            alone = Accuracies({v: self.right[v][:, i:i + 1]})
            self._row(alone, [0], self.tasks[i], v, self.forwards[v][:, i:i + 1])

    def finish(self, caption: str, reduced: list[int], one: int | None) -> dict:
        """Print the means of the tasks, a caption, and what follows; returns {"leads",
        "forwards_share"}. reduced: the settings with less than one step per token; one: that with
        one."""
        measured, every = Accuracies(self.right), list(range(len(self.tasks)))
        for v in self.right:
            self._row(measured, every, "mean", v, self.forwards[v])
        print(f"\n{caption}")
        if "MetaState" not in self.right:
            return {"leads": [], "forwards_share": None}
        return {"leads": leads_of(measured, reduced), "forwards_share": None if one is None else
                forwards_share(measured, self.forwards, one)}

    def _row(self, measured: Accuracies, chosen: list[int], task: str, v: str,
             forwards: np.ndarray) -> None:
        row = [{**measured.cell(chosen, j, v), "task": task, "variant": v, "setting": setting,
                "forwards": float(forwards[:, :, j].mean())}
               for j, setting in enumerate(self.settings)]
        self.rows += row
        print(f"| {task} | {v} | " + " | ".join(
            f"{c['accuracy']:.1f} ({c['low']:.0f}-{c['high']:.0f})"
            + (f" in {c['forwards']:.1f}" if c["setting"].startswith("thr") else "")
            for c in row) + " |", flush=True)


def leads_of(measured: Accuracies, reduced: list[int]) -> list[dict]:
    """Print and return MetaState's lead over every other variant, mean of all tasks and of the
    settings with less than one step per token."""
    leads, tasks = [], list(range(len(measured.means["frozen"])))
    for minus in measured.means if reduced else ():
        if minus != "MetaState":
            points, low, high = measured(tasks, reduced, "MetaState", minus)
            leads.append({"minus": minus, "points": points, "low": low, "high": high})
            print(f"MetaState - {minus}, mean of tasks and reduced budgets: {points:+.1f} points "
                  f"({low:+.1f} to {high:+.1f})")
    return leads


def forwards_share(measured: Accuracies, forwards: dict[str, np.ndarray], one: int) -> float | None:
    """Print and return the least forwards with which MetaState is as accurate as the frozen
    backbone at one token per step (the setting `one`), as a share of those; None if never."""
    target = measured.means["frozen"][:, one].mean()
    reached = measured.means["MetaState"].mean(0) >= target                   # (settings,)
    took = forwards["MetaState"].mean((0, 1, 3))[reached]
    share = took.min() / forwards["frozen"][:, :, one].mean() if len(took) else None
    print("forwards for the frozen accuracy at one token per step: "
          + ("not reached" if share is None else f"{share:.2f} x as many"))
    return share
