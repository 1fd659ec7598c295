"""Plots, and timings beside what the machine can do."""
from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Callable

import torch

from lib.cli import InputError, running
from lib.files import write_atomic
from lib.outputs import output_file
from lib.progress import slow


# ------------------------------------------------------------------ plots
def new_figure(**options):
    """An empty figure of matplotlib, which is optional. Raises `InputError` without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    return Figure(**options)


def plot_file(text: str) -> str:
    """The type of a plot's file on the command line: it can be written, and matplotlib is there and
    has the format that the ending names. It is said now, not after the work."""
    if not running.get():
        return text
    try:
        known = new_figure().canvas.get_supported_filetypes()
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    kind = Path(text).suffix[1:].lower() or "png"
    if kind not in known:
        raise argparse.ArgumentTypeError(f"no plot can be {kind!r}: one of {', '.join(known)}")
    return output_file(text)


def save_figure(figure, path: str | Path) -> None:
    """Write a figure in the format that the path's ending names. Raises `InputError`."""
    try:
        write_atomic(path, lambda p: figure.savefig(p, format=Path(path).suffix[1:] or "png"))
    except ValueError as error:  # a format that matplotlib does not have
        raise InputError(f"cannot write {path}: {error}") from error


def plot(rows: list[dict], path: str) -> None:
    """Write accuracy against forwards, and beside it against seconds where they were measured, mean
    over tasks, one line per variant. rows: what `bench.py accuracy --json` calls so. Raises
    `InputError`."""
    rows = [r for r in rows if r["task"] == "mean"]
    costs = ["forwards"] + ["seconds"] * all(r["seconds"] is not None for r in rows)
    figure = new_figure(figsize=(1 + 5 * len(costs), 4), layout="constrained")
    for n, cost in enumerate(costs):
        axes = figure.add_subplot(1, len(costs), n + 1, xscale="log", ylabel="accuracy, %",
                                  xlabel="seconds for one answer alone" if n else cost)
        for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            for kind, style in (("steps", "o-"), ("threshold", "x--")):
                line = sorted((r for r in rows if r["variant"] == variant
                               and kind in r["setting"]), key=lambda r: r[cost])
                y = [r["accuracy"] for r in line]
                errors = [[abs(r[end] - r["accuracy"]) for r in line] for end in ("low", "high")]
                if line:
                    axes.errorbar([r[cost] for r in line], y, yerr=errors, fmt=style,
                                  color=f"C{i}", label=f"{variant}, by {kind}", capsize=2,
                                  alpha=0.8)
        if cost == "forwards":
            ticks = sorted({int(r[cost]) for r in rows if "steps" in r["setting"]})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.legend(fontsize=8)
    save_figure(figure, path)


# ------------------------------------------------------------------ speed
class Clock:
    """Medians of repeated runs on one device, in seconds."""

    def __init__(self, device: torch.device, warmup: int, repeat: int):
        self.device, self.warmup, self.repeat = device, warmup, repeat

    def __call__(self, work: Callable[[], object]) -> dict[str, float]:
        """{"seconds": median, "low": fastest, "high": slowest, "first": of the first run of all,
        which compiles where something does}."""
        times = []
        for _ in range(1 + self.warmup + self.repeat):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        kept = times[1 + self.warmup:]
        return {"seconds": statistics.median(kept), "low": min(kept), "high": max(kept),
                "first": times[0]}

    def wait(self) -> None:
        """Until the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@slow("measuring a matrix product")
def product_rate(clock: Clock, dtype: torch.dtype, n: int = 768) -> float:
    """FLOP/s of a square matrix product in dtype on this machine, measured here; on CUDA of 8192
    rows, else of n."""
    n = 8192 if clock.device.type == "cuda" else n
    a = torch.randn(n, n, device=clock.device, dtype=dtype)
    return 2 * n ** 3 / clock(lambda: a @ a)["seconds"]


def limits(clock: Clock, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine can do, measured here: (FLOP/s of a square matrix product in dtype, bytes/s
    of a copy, read and written bytes together)."""
    product = product_rate(clock, dtype, 1536)
    source = torch.empty(2 ** (30 if clock.device.type == "cuda" else 27), dtype=torch.uint8,
                         device=clock.device)
    target = torch.empty_like(source)
    with slow("measuring a copy"):
        return product, 2 * source.numel() / clock(lambda: target.copy_(source))["seconds"]


class Pace:
    """What a training gets through, beside a matrix product of so many FLOP/s. Several processes
    are taken to be as fast as this one."""

    def __init__(self, product: float, processes: int = 1):
        self.product, self.processes, self.tokens, self.flops = product, processes, 0, 0

    def add(self, tokens: int, flops: int) -> None:
        """Tokens of sequences, each counted once, and what is computed for one."""
        self.tokens, self.flops = self.tokens + tokens, self.flops + tokens * flops

    def __call__(self, seconds: float) -> str:
        """What was added since the last call, in so many seconds."""
        share, rate = self.flops / seconds / self.product, self.processes * self.tokens / seconds
        self.tokens = self.flops = 0
        return f", {rate:,.0f} tokens/s, {100 * share:.0f}% of a matrix product"


class Timings:
    """A table of timings beside `limits`, printed line by line as they are taken; .rows has them
    as they go into JSON."""

    columns = ("what", "ms", "first, ms", "first token, ms", "tokens/s", "forwards", "TFLOP/s",
               "GB/s", "peak GB")

    def __init__(self, clock: Clock, product: float, copy: float):
        self.clock, self.product, self.copy, self.rows = clock, product, copy, []
        self.suffix = ""  # of what the next rows are called
        print(f"| {' | '.join(self.columns)} |\n" + "|---" * len(self.columns) + "|")

    def take(self, what: str, work: Callable[[], object], flops: int = 0, moved: int = 0,
             tokens: int | None = None, forwards: int | Callable[[], int] = 1,
             first_token: Callable[[], float] | None = None, times: int = 1) -> dict:
        """Time `work`, which does something `times` times, each with so many floating-point
        operations and bytes moved (0 is unknown), and add its row. forwards and first_token, the
        seconds until the first: numbers, or called for them after the work is done."""
        what, device = what + self.suffix, self.clock.device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with slow(what):
            row = {"what": what, **{k: v / times for k, v in self.clock(work).items()},
                   "flops": flops, "bytes": moved}
        seconds, rates, token = row["seconds"], [], first_token and first_token()
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None
        row.update(forwards=forwards() if callable(forwards) else forwards, tokens=tokens,
                   peak_gb=peak, first_token=token)
        for name, amount, unit, limit in (("flops", flops, 1e12, self.product),
                                          ("bytes", moved, 1e9, self.copy)):
            share = row[f"{name}_share"] = amount and amount / seconds / limit
            rates.append(f"{amount / seconds / unit:.3g} ({100 * share:.0f}%)" if amount else "")
        self.rows.append(row)
        print(f"| {what} | {1e3 * seconds:.3g} ({1e3 * row['low']:.3g}-{1e3 * row['high']:.3g}) | "
              f"{1e3 * row['first']:.3g} | {f'{1e3 * token:.3g}' if token else ''} | "
              f"{f'{tokens / seconds:.4g}' if tokens else ''} | "
              f"{row['forwards']} | {' | '.join(rates)} | {f'{peak:.1f}' if peak else ''} |",
              flush=True)
        return row

    def compare(self, what: str, row: dict, other: dict) -> None:
        """Print how many times as long as the other a row took."""
        print(f"| -> {what} | {row['seconds'] / other['seconds']:.3f} x |"
              + "  |" * (len(self.columns) - 2))
