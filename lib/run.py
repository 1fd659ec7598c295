"""A training run in a folder: where it stands, its metrics, its last whole state, and the processes
that share its work."""
from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from lib.checks import is_finite
from lib.cli import InputError, require
from lib.files import read_tensors, save_tensors, to_json
from lib.interrupts import Stop
from lib.metrics import keep_up_to
from lib.outputs import check_disk, own
from lib.progress import say, slow
from lib.terminal import note


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that train together; joins those that torchrun started, and
    returns when all have: one that is refused something and ends takes the meeting point along."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            dist.all_gather_object([None] * dist.get_world_size(), None)
        except (ValueError, RuntimeError) as error:
            raise InputError("the environment has RANK, as if torchrun had started this, but the "
                             f"processes do not find together ({str(error).splitlines()[0]}): "
                             "start with torchrun, or unset RANK") from error
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everyone(thing: object) -> list:
    """What each of the processes has, in the order of their ranks."""
    found = [thing] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, thing)
    return found


def first_process_first(work: Callable):
    """work() in each process, in the others once the first has done it. What is refused there is
    refused in all: nobody waits for one that has ended."""
    (rank, _), found, problem = processes(), None, None
    if rank == 0:
        try:
            found = work()
        except InputError as error:
            problem = str(error)
    problem = everyone(problem)[0]
    require(problem is None, str(problem))
    return found if rank == 0 else work()


def read_once(read: Callable):
    """What the first process reads, in all of them: a pipe gives what it has to one alone."""
    return everyone(first_process_first(lambda: read() if processes()[0] == 0 else None))[0]


def local_device(wanted: str | None) -> str | None:
    """The device that this process trains on: a GPU of its own under torchrun, unless one is
    asked for."""
    processes()
    if wanted is None and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return wanted


class Run:
    """The folder of a run, which this process owns: training.safetensors (weights, optimizer state,
    step, settings) and metrics.jsonl. Made with the folder of a run of the same settings it fills
    parameters and optimizer with where that one stood; with other settings it raises `InputError`.

    The number of steps is no setting: a finished run can be made longer. The learning rate is then
    that of the new schedule from there on (a cosine that was at its end rises again), so the end is
    not quite that of a run which was as long from the start."""

    def __init__(self, out: str | Path, parameters: dict[str, nn.Parameter],
                 optimizer: torch.optim.Optimizer, settings: dict, micros: int,
                 pace: Callable[[float], str] | None = None,
                 on_save: Callable[[], None] | None = None):
        self.out, self.parameters, self.optimizer = Path(out), parameters, optimizer
        self.settings = json.loads(to_json(settings))
        self.rank, self.world = processes()
        require(micros % self.world == 0,
                f"{self.world} processes do not divide {micros} micro-batches")
        for group in optimizer.param_groups:
            require(0 <= group["lr"] <= 1e6, f"a learning rate of {group['lr']} is none")
        self.my_micros = range(self.rank, micros, self.world)
        self.state, self.metrics = self.out / "training.safetensors", self.out / "metrics.jsonl"
        self.owner = first_process_first(self._own)
        self.start, self.planned = self._resume()
        if self.rank == 0:
            keep_up_to(self.metrics, self.start or -1)
        self.began, self.pace, self.shown = time.perf_counter(), pace or (lambda seconds: ""), ""
        self.on_save = on_save or (lambda: None)

    def steps(self, number: int) -> Iterator[int]:
        """The steps that are left of so many, with a progress bar. Ctrl-C ends them after a whole
        one, which is saved."""
        require(self.start <= number, f"{self.out} holds a run of {self.start} steps, which are "
                f"more than {number}: pass --steps {self.start} or more, or another --out")
        if self.start and self.planned != number and self.rank == 0:
            note(f"{self.out} was at step {self.start} of {self.planned}: from there on the "
                 f"learning rate is that of {number} steps")
        self.planned, self.done, self.saved = number, self.start, self.start
        self.bar = tqdm(range(self.start, number), initial=self.start, total=number,
                        disable=None if self.rank == 0 else True)
        with Stop(self._end) as stop, slow(
                "training", lambda: f", step {self.done} of {number}{self.shown}",
                not self.bar.disable or self.rank > 0):
            hook = self.optimizer.register_step_pre_hook(lambda *_: stop.at(whole=False))
            try:
                for step in self.bar:
                    self.step_began = time.perf_counter()
                    yield step
                    self.done = step + 1
                    stop.at(whole=True)
            finally:
                hook.remove()

    def _end(self, whole: bool) -> None:
        """Save a whole step, if it is not yet, and raise KeyboardInterrupt that says what stays."""
        self.bar.close()
        if whole and self.done > self.saved:
            self.save(self.done)
        lost = "" if whole else f"; what was computed since step {self.saved} is lost"
        raise KeyboardInterrupt(f"interrupted: {self.out} holds step {self.saved} of {self.planned}"
                                f"{lost}; the same command goes on from there" if self.saved else
                                "interrupted before anything was saved")

    def combine(self, records: list[dict]) -> dict[str, float]:
        """Means of the figures of all micro-batches of a step, as floats, for which the device has
        to be done: the pace is taken here. The gradients of all processes are added up in place,
        and a parameter that got none has zero. The sum is the average: every loss is divided by the
        number of all micro-batches. Plainer than DistributedDataParallel, whose hooks want all K
        steps to be one module's forward."""
        records = [{key: float(value) for key, value in record.items()} for record in records]
        parameters = list(self.parameters.values())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
            records = [record for part in everyone(records) for record in part]
        self.shown = self.pace(time.perf_counter() - self.step_began)
        return {key: float(np.mean([r[key] for r in records if key in r]))
                for key in dict.fromkeys(k for r in records for k in r)}

    def check_finite(self, step: int, figures: dict[str, float]) -> None:
        """Raise an `InputError` for a loss, gradient norm or other figure that is not finite."""
        for name, value in figures.items():
            require(math.isfinite(value), f"{name} is {value} at step {step + 1}; training stops, "
                    f"and {self.out} keeps the last good checkpoint")

    def log(self, step: int, steps: int, figures: dict[str, float], measured: dict) -> None:
        """Append a step's figures to metrics.jsonl; what was measured on held-out data, if
        anything, is printed too, with the pace. Raises `InputError` where that is not finite."""
        self.check_finite(step, measured)
        if self.rank != 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if measured:
            shown = " ".join(f"{k} {v:.4f}" for k, v in {**figures, **measured}.items())
            seconds = time.perf_counter() - self.began
            say(f"step {step + 1}/{steps}  {seconds:.0f} s  {shown}{self.shown}")
        if figures:
            self.bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in list(figures.items())[:6])
                                     + self.shown)
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(to_json({"step": step + 1, **figures, **measured}) + "\n")

    def save(self, step: int) -> None:
        """Weights, both moments of AdamW and its step counters, as one safetensors file. Raises
        `InputError` for those that are not finite, and leaves the last good file."""
        tensors = {f"weight.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors.update((f"{key}.{name}", value)
                           for key, value in self.optimizer.state[p].items())
        for name, x in tensors.items():
            require(is_finite(x), f"{name} is not finite after step {step}: the "
                    f"learning rate may be too high; {self.out} keeps the last good checkpoint")
        if self.rank == 0:
            save_tensors(self.state, tensors, {"step": step, "steps": self.planned,
                                               "settings": self.settings})
            self.on_save()
        self.saved = step

    def _own(self):
        """Own the folder, and see that there is room for a checkpoint."""
        if self.rank != 0:
            return None
        owner = own(self.out)
        check_disk(self.out, 4 * sum(p.nbytes for p in self.parameters.values()))
        return owner

    def _resume(self) -> tuple[int, int | None]:
        """Fill weights and optimizer from the state file and return its step and how many there
        were to be, or 0 without one."""
        if not self.state.is_file():
            return 0, None
        tensors, stated = read_tensors(self.state)
        wrong = f"{self.state} is not the state of such a run"
        require(isinstance(stated, dict) and isinstance(stated.get("settings"), dict), wrong)
        stored, settings, step = stated["settings"], self.settings, stated.get("step")
        changed = sorted(k for k in {*stored, *settings} if stored.get(k) != settings.get(k))
        require(not changed, f"{self.out} holds a run with other settings ({', '.join(changed)}): "
                "pass another --out, or delete it")
        require(type(step) is int and 0 <= step < 2 ** 53, f"{wrong}: its step is {step!r:.40}")
        fitting = {}
        for name, p in self.parameters.items():
            fitting |= {f"{key}.{name}": p for key in ("weight", "exp_avg", "exp_avg_sq")}
            fitting[f"step.{name}"] = torch.tensor(float(step))
        require(tensors.keys() == fitting.keys(), f"{wrong}: it holds other tensors")
        for name, x in tensors.items():
            like = fitting[name]
            require((x.shape, x.dtype) == (like.shape, like.dtype), f"{wrong}: {name} is "
                    f"{tuple(x.shape)} {x.dtype}, not {tuple(like.shape)} {like.dtype}")
            require(is_finite(x) and (not name.startswith("step.") or bool(x == like))
                    and (not name.startswith("exp_avg_sq.") or bool((x >= 0).all())),
                    f"{wrong}: {name} has numbers that no run writes")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"weight.{name}"])
                self.optimizer.state[p] = {
                    "step": tensors[f"step.{name}"].clone(),
                    **{k: tensors[f"{k}.{name}"].to(p.device, copy=True)
                       for k in ("exp_avg", "exp_avg_sq")}}
        return step, stated.get("steps")
