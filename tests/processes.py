"""Processes for the tests to kill, and groups of them that train together."""
from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from lib import run

CONTEXT = multiprocessing.get_context("forkserver")  # a process in 0.1 s, all this imported once
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "tokenizers", "tqdm",
                                "safetensors.torch", "pytest"])


def child(target: Callable, *args) -> multiprocessing.Process:
    """target(*args), begun in a process of its own."""
    process = CONTEXT.Process(target=isolated, args=(target, *args), daemon=True)
    process.start()
    return process


def isolated(target: Callable, *args) -> None:
    """What every child does first: one thread, as the runs that it is compared with."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that outlives a SIGKILL
    target(*args)


# ------------------------------------------------------------------ kills
MOMENTS = ("in a step", "half a checkpoint", "before the flush", "before the rename",
           "after the rename", "between metrics and checkpoint", "half a line of metrics")


def killed(target: Callable, *args) -> None:
    """Run target(*args) in a process and see it killed."""
    process = child(target, *args)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def arm(moment: str, countdown: int) -> None:
    """Kill this process when `moment` of a training run comes for the `countdown`-th time."""
    def due() -> bool:
        nonlocal countdown
        countdown -= 1
        return countdown == 0

    def killing(function, after=False):
        def wrapped(*args, **kwargs):
            last = due()
            if last and not after:
                die()
            result = function(*args, **kwargs)
            if last:
                die()
            return result
        return wrapped

    def half_a_file(path, data):
        last = due()
        plain(path, data[:-40] if last else data)
        if last:
            die()

    def half_a_line(path, mode="r", **options):
        if mode == "a" and due():
            with open(path, mode, **options) as file:
                file.write('{"step": 1')
            die()
        return open(path, mode, **options)

    plain = Path.write_bytes
    if moment == "half a line of metrics":
        run.open = half_a_line
    elif moment == "half a checkpoint":
        Path.write_bytes = half_a_file
    elif moment == "before the flush":
        os.fsync = killing(os.fsync)
    elif moment == "before the rename":
        os.replace = killing(os.replace)
    elif moment == "after the rename":
        os.replace = killing(os.replace, after=True)
    elif moment == "between metrics and checkpoint":
        run.Run.save = killing(run.Run.save)
    elif moment == "in a step":
        nn.utils.clip_grad_norm_ = killing(nn.utils.clip_grad_norm_)
    else:
        raise ValueError(moment)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------ several that train together
def together(target: Callable, *args, world: int = 2) -> list[int]:
    """Run target(rank, *args) in processes that train together, as torchrun starts them, and return
    their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [child(ranked, target, rank, world, port, *args) for rank in range(world)]
    deadline = time.monotonic() + 60
    while any(p.is_alive() for p in group) and time.monotonic() < deadline:
        time.sleep(0.02)
        if any(p.exitcode for p in group):  # the others would wait for it
            time.sleep(0.5)
            break
    for process in group:
        process.kill()
        process.join()
    return [process.exitcode for process in group]


def ranked(target: Callable, rank: int, world: int, port: int, *args) -> None:
    """One of `together`'s."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(rank, *args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
