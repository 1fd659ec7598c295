"""A training run in a folder: where it stands, its metrics, its last whole state, and the processes
that share its work."""
from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from lib.cli import InputError, require
from lib.files import read_tensors, save_tensors, write_text


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that train together; joins those that torchrun started."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_process_first(work: Callable):
    """work() in each process, in the others once the first has done it."""
    rank, world = processes()
    found = work() if rank == 0 else None
    if world > 1:
        dist.barrier()
    return found if rank == 0 else work()


def local_device(wanted: str | None) -> str | None:
    """The device that this process trains on: a GPU of its own under torchrun, unless one is
    asked for."""
    processes()
    if wanted is None and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return wanted


class Run:
    """The folder of a run: training.safetensors (weights, optimizer state, step, settings) and
    metrics.jsonl. Made with the folder of a run of the same settings it fills parameters and
    optimizer with where that one stood; with other settings it raises `InputError`."""

    def __init__(self, out: str | Path, parameters: dict[str, nn.Parameter],
                 optimizer: torch.optim.Optimizer, settings: dict, micros: int):
        self.out, self.parameters, self.optimizer = Path(out), parameters, optimizer
        self.settings = json.loads(json.dumps(settings))
        self.rank, self.world = processes()
        require(micros % self.world == 0,
                f"{self.world} processes do not divide {micros} micro-batches")
        self.my_micros = range(self.rank, micros, self.world)
        self.state, self.metrics = self.out / "training.safetensors", self.out / "metrics.jsonl"
        self.start = self._resume()
        if self.rank == 0:
            self._keep_lines_up_to(self.start)
        self.began = time.perf_counter()

    def steps(self, number: int) -> Iterator[int]:
        """The steps that are left of so many, with a progress bar."""
        self.bar = tqdm(range(self.start, number), initial=self.start, total=number,
                        disable=None if self.rank == 0 else True)
        yield from self.bar

    def combine(self, records: list[dict[str, float]]) -> dict[str, float]:
        """Means of the figures of all micro-batches of a step; the gradients of all processes are
        added up in place, and a parameter that got none has zero. The sum is the average: every
        loss is divided by the number of all micro-batches. Plainer than DistributedDataParallel,
        whose hooks want all K steps to be one module's forward."""
        parameters = list(self.parameters.values())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
            everyone: list = [None] * self.world
            dist.all_gather_object(everyone, records)
            records = [record for part in everyone for record in part]
        return {key: float(np.mean([r[key] for r in records if key in r]))
                for key in dict.fromkeys(k for r in records for k in r)}

    def check_finite(self, step: int, figures: dict[str, float]) -> None:
        """Raise an `InputError` for a loss or gradient norm that is not finite."""
        for name in ("loss", "grad_norm"):
            require(math.isfinite(figures[name]), f"{name} is {figures[name]} at step {step + 1}; "
                    f"training stops, and {self.out} keeps the last good checkpoint")

    def log(self, step: int, steps: int, figures: dict[str, float], measured: dict) -> None:
        """Append a step's figures to metrics.jsonl; what was measured on held-out data, if
        anything, is printed too."""
        if self.rank != 0:
            return
        if measured:
            shown = " ".join(f"{k} {v:.4f}" for k, v in {**figures, **measured}.items())
            seconds = time.perf_counter() - self.began
            tqdm.write(f"step {step + 1}/{steps}  {seconds:.0f} s  {shown}")
            sys.stdout.flush()
        self.bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in list(figures.items())[:6]))
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, **figures, **measured}) + "\n")

    def save(self, step: int) -> None:
        """Weights, both moments of AdamW and its step counters, as one safetensors file."""
        if self.rank != 0:
            return
        tensors = {f"weight.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors.update((f"{key}.{name}", value)
                           for key, value in self.optimizer.state[p].items())
        save_tensors(self.state, tensors, {"step": step, "settings": self.settings})

    def _resume(self) -> int:
        """Fill weights and optimizer from the state file and return its step, or 0 without one."""
        if not self.state.is_file():
            return 0
        tensors, metadata = read_tensors(self.state)
        try:
            stored, settings = metadata["settings"], self.settings
            changed = sorted(k for k in {*stored, *settings} if stored.get(k) != settings.get(k))
            require(not changed, f"{self.out} holds a run with other settings "
                    f"({', '.join(changed)}): pass another --out, or delete it")
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(tensors[f"weight.{name}"])
                    self.optimizer.state[p] = {
                        "step": tensors[f"step.{name}"].clone(),
                        **{k: tensors[f"{k}.{name}"].to(p.device, copy=True)
                           for k in ("exp_avg", "exp_avg_sq")}}
            return metadata["step"]
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise InputError(f"{self.state} is not the state of such a run ({error})") from error

    def _keep_lines_up_to(self, step: int) -> None:
        """Drop the metrics that a killed run wrote after its last checkpoint."""
        if not self.metrics.is_file():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # what the kill cut short, or none of ours
                pass
        write_text(self.metrics, "".join(lines))
