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
        rng, picks = np.random.default_rng(0), {}  # picks: (of what, how many, rows) -> shares
        for r in right.values():
            picks |= {("seeds", r.shape[0], 1): [], ("prompts", r.shape[3], r.shape[1]): []}
        for _ in progress(range(draws), "bootstrap", bar=False):
            for (_, n, rows), drawn in picks.items():
                drawn.append(rng.multinomial(n, [1 / n] * n, rows) / n)       # (rows, n)
        picks = {key: np.stack(drawn) for key, drawn in picks.items()}        # (draws, rows, n)
        self.draws = {v: np.einsum("ds,dtp,stqp->dtq", picks["seeds", r.shape[0], 1][:, 0],
                                   picks["prompts", r.shape[3], r.shape[1]], r, optimize=True)
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
    `forwards` of a variant are (training seeds, tasks, settings, prompts), `seconds` (tasks,
    settings). .rows has the cells as they go into JSON."""

    def __init__(self, seeds: dict[str, int], tasks: list[str], settings: list[str], prompts: int):
        self.tasks, self.settings, self.rows = tasks, settings, []
        self.whole = "mean" if len(tasks) > 1 else tasks[0]  # what a line over all tasks says
        shape = (len(tasks), len(settings), prompts)
        self.right, self.forwards = ({v: np.zeros((n, *shape)) for v, n in seeds.items()}
                                     for _ in range(2))
        self.seconds = {v: np.full(shape[:2], np.nan) for v in seeds}
        print("| task | variant | " + " | ".join(settings) + " |")
        print("|---" * (len(settings) + 2) + "|", flush=True)

    def work(self) -> list[tuple[int, str, int, int]]:
        """(task, variant, setting, training seed) of everything to be measured, row by row."""
        return [(i, v, j, k) for i, v, j in product(range(len(self.tasks)), self.right, range(
            len(self.settings))) for k in range(len(self.right[v]))]

    def add(self, i: int, v: str, j: int, k: int, right: list[bool], forwards: list[int],
            seconds: float = math.nan) -> None:
        """What was measured for an item of `work`, in its order; seconds for one answer alone."""
        self.right[v][k, i, j], self.forwards[v][k, i, j] = right, forwards
        self.seconds[v][i, j] = seconds
        if (j + 1, k + 1) == (len(self.settings), len(self.right[v])):
            alone = Accuracies({v: self.right[v][:, i:i + 1]})
            self._row(alone, [0], self.tasks[i], v, [i])

    def finish(self, caption: str, reduced: list[int], one: int | None) -> dict:
        """Print the means of several tasks, MetaState's leads, a caption, and what follows; returns
        {"leads", "differences", "forwards_share", "fronts"}. reduced: the settings with less than
        one step per token; one: that with one."""
        measured, every = Accuracies(self.right), list(range(len(self.tasks)))
        for v in self.right:
            self._row(measured, every, "mean", v, every)
        found = {"leads": [], "differences": self._differences(measured), "forwards_share": None}
        print(f"\n{caption}")
        if "MetaState" in self.right:
            found["leads"] = leads_of(measured, reduced)
            if one is not None:
                found["forwards_share"] = forwards_share(measured, self.forwards, one)
        timed = not any(np.isnan(s).any() for s in self.seconds.values())
        return {**found, "fronts": fronts_of(self.rows, "forwards")
                + (fronts_of(self.rows, "seconds") if timed else [])}

    def _differences(self, measured: Accuracies) -> list[dict]:
        """Print and return MetaState's lead over every other variant in each setting, mean of the
        tasks, with its paired interval."""
        found, every = [], list(range(len(self.tasks)))
        for minus in self.right if "MetaState" in self.right else ():
            if minus != "MetaState":
                leads = [measured(every, [j], "MetaState", minus)
                         for j in range(len(self.settings))]
                found += [{"minus": minus, "setting": setting, "points": points, "low": low,
                           "high": high} for setting, (points, low, high) in
                          zip(self.settings, leads)]
                print(f"| {self.whole} | MetaState - {minus} | " + " | ".join(
                    f"{points:+.1f} ({low:+.1f} to {high:+.1f})" for points, low, high in leads)
                    + " |")
        return found

    def _row(self, measured: Accuracies, chosen: list[int], task: str, v: str,
             tasks: list[int]) -> None:
        forwards, seconds = self.forwards[v][:, tasks], self.seconds[v][tasks].mean(0)
        row = [{**measured.cell(chosen, j, v), "task": task, "variant": v, "setting": setting,
                "forwards": float(forwards[:, :, j].mean()),
                "seconds": None if np.isnan(seconds[j]) else float(seconds[j])}
               for j, setting in enumerate(self.settings)]
        self.rows += row
        if task == "mean" != self.whole:  # it stands above
            return
        print(f"| {task} | {v} | " + " | ".join(
            f"{c['accuracy']:.1f} ({c['low']:.0f}-{c['high']:.0f})"
            + (f" in {c['forwards']:.1f}" if c["setting"].startswith("thr") else "")
            + ("" if c["seconds"] is None else f", {1e3 * c['seconds']:.0f} ms")
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


def fronts_of(rows: list[dict], cost: str) -> list[dict]:
    """Print and return what each variant reaches with its own best decoding: of the means in a
    table's `rows` those settings that no other of the variant matches at the same or less of
    `cost`, "forwards" or "seconds", from cheap to dear."""
    fronts, means = [], [r for r in rows if r["task"] == "mean"]
    unit, scale = ("ms", 1e3) if cost == "seconds" else (cost, 1)
    for variant in dict.fromkeys(r["variant"] for r in means):
        best, points = -1.0, []
        for r in sorted((r for r in means if r["variant"] == variant),
                        key=lambda r: (r[cost], -r["accuracy"])):
            if r["accuracy"] > best:
                best = r["accuracy"]
                points.append({key: r[key] for key in ("setting", cost, "accuracy", "low", "high")})
        fronts.append({"variant": variant, "by": cost, "points": points})
        print(f"front of {variant}, % in {unit}: " + ", ".join(
            f"{p['accuracy']:.1f} ({p['low']:.0f}-{p['high']:.0f}) in {scale * p[cost]:.3g} "
            f"({p['setting']})" for p in points))
    return fronts
