"""Write text with a masked diffusion language model, and watch it denoise.

    python sample.py                                   # the embedded tiny model solves a sudoku
    python sample.py --steps 6 --seed 7                # another one, in a quarter of the steps
    python sample.py --ckpt llada-8b --prompt "Why is the sky blue?"
    python sample.py --ckpt dream-7b --order entropy --temperature 0.1 --prompt "Name three moons."
    python sample.py --ckpt llada-8b --prompts questions.txt > answers.jsonl

`generate` is the whole algorithm: LLaDA's semi-autoregressive remasking, Dream's four orders and
Fast-dLLM's confidence threshold are one loop that differs in which positions a step may commit.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import sys
import time
import unicodedata
from dataclasses import dataclass
from typing import Callable, NamedTuple, TextIO

import torch

from model import (DTYPES, Backbone, Cache, Config, InputError, Parser, Tokenizer, command,
                   compile_on, find, load, parse_json, pick, read_json, read_lines, seed)
from metastate import MetaState

LLADA_ORDERS = ("low_confidence", "random")
DREAM_ORDERS = ("origin", "maskgit_plus", "topk_margin", "entropy")
BY_PROBABILITY = ("low_confidence", "maskgit_plus")  # the orders a threshold makes sense for


# ------------------------------------------------------------------ the sampler
@dataclass
class Sample:
    """What `generate` returns."""

    ids: torch.Tensor      # (B, P + gen_length)
    forwards: int          # backbone calls of any length (Fast-dLLM's nfe)
    seconds: float         # of the whole generation


class Step(NamedTuple):
    """What `on_step` is called with after every commit."""

    ids: torch.Tensor      # (B, P + gen_length), the mask id where nothing is committed yet
    fresh: torch.Tensor    # (B, P + gen_length) bool, True where this step committed
    forwards: int
    seconds: float         # since the start


def _bfloat16_as(x: torch.Tensor):
    """The memory's float32 weights multiply in bfloat16 where the backbone does."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16)


def denoise(backbone: Backbone, ids: torch.Tensor, where: torch.Tensor, *,
            memory: MetaState | None = None, state: torch.Tensor | None = None, span=None,
            pad_mask: torch.Tensor | None = None, cut: bool = False, cache: Cache | None = None,
            first: int = 0, last: int | None = None,
            head: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One denoising step, the same for sampling and training: (logits, next state).

    ids (B, T), masked where nothing is revealed; where (B, n), the positions whose logits are
    wanted; state (B, M, D) and span (start, length) of the response, with a memory; pad_mask
    (B, T); cut: the next state's gradient ends within this step. With a cache only the positions
    first .. last - 1 are computed, and `where` lies among them. -> logits (B, n, V) float32, of the
    token at each position: Dream's logits for position i are those of hidden state i - 1. head:
    what to make of their hidden states (B, n, d) in place of logits."""
    c = backbone.config
    e = backbone.embed(ids[:, first:last])                            # (B, S, d)
    if memory is not None:
        position = torch.arange(ids.shape[1], device=ids.device)
        start, length = (torch.as_tensor(v, device=ids.device).view(-1, 1) for v in span)
        inside = (position >= start) & (position < start + length)    # (B, T)
        t = ((ids == c.mask_id) & inside).sum(1) / length[:, 0]       # (B,) share still masked
        with _bfloat16_as(e):
            e = memory.inject(e, state, t, (start[:, 0] - first, length[:, 0]))
    where = (where - first - int(c.shift)).clamp(min=0)
    whole = cache is None or memory is not None  # a memory reads all that is computed
    if cache is None:
        h = backbone.hidden(e, pad_mask)                              # (B, T, d)
    elif backbone.graphs and last is not None:
        h, whole = cache.replay(backbone, e, pad_mask, first), True   # (B, S, d)
    else:
        h = backbone.hidden(e, pad_mask, cache, first, None if whole else where)
    wanted = pick(h, where) if whole else h                           # (B, n, d)
    logits = backbone.logits(wanted).float() if head is None else head(wanted)
    if memory is not None:
        with _bfloat16_as(h):
            seen = (state.detach(), h.detach()) if cut else (state, h)
            pads = None if pad_mask is None else pad_mask[:, first:last]
            state = memory.update(*seen, t, (start[:, 0] - first, length[:, 0]), pads)
    return logits, state


@torch.no_grad()
def generate(backbone: Backbone, prompt: torch.Tensor, *, memory: MetaState | None = None,
             pad_mask: torch.Tensor | None = None, gen_length: int = 128, block_length: int = 32,
             steps: int = 128, order: str | None = None, threshold: float | None = None,
             temperature: float = 0.0, top_p: float | None = None, top_k: int | None = None,
             alg_temp: float = 0.0, cfg_scale: float = 0.0, cache: str | None = None,
             refresh: int | None = None, stop_at_eos: bool = False,
             generator: torch.Generator | None = None,
             on_step: Callable[[Step], None] | None = None) -> Sample:
    """Denoise `gen_length` masked positions behind `prompt`, block by block from left to right.

    prompt (B, P) ids; pad_mask (B, P), True where the prompt is padding (on the left).
    memory: a MetaState, carried from step to step and from block to block; with guidance the
        conditional and the unconditional pass keep one each.
    gen_length is a multiple of block_length, and steps of the number of blocks.
    order: which masked positions of the block a step commits. LLaDA: "low_confidence" (its
        default) takes the most probable candidates, "random" any; a block's positions are spread
        evenly over its steps. Dream: "origin" (its default) takes each with probability 1 - s/t,
        "maskgit_plus", "topk_margin" and "entropy" take the best int(masked * (1 - s/t)) by
        probability, by the margin of the top two, by negative entropy; t falls linearly from 1 to
        0.001. Either family runs every order.
    threshold: commit the most probable candidate and every other that reaches the threshold,
        whatever the schedule says (Fast-dLLM). For Dream `steps` still bounds how many a step may
        commit, as in Fast-dLLM's sampler for it: with n positions, no more than n (i + 1) / steps
        in the first i + 1 steps.
    temperature, top_p, top_k: above 0, candidates are drawn from the tempered and cut distribution
        instead of taken by argmax. Dream's confidence is measured in that distribution, LLaDA's in
        the plain one. top_k None is the published default: no cut for LLaDA, and 50 for Dream,
        whose sampler inherits it from transformers' configuration class; 0 is no cut.
    alg_temp: positions are drawn from softmax(confidence / alg_temp) (Dream).
    cfg_scale: classifier-free guidance against the same sequence with the prompt masked.
    cache: None, or Fast-dLLM's "prefix" or "dual": the first step of a block computes the whole
        sequence, the others the block and what follows it (prefix) or the block alone (dual), with
        the keys and values of the rest as they were. For Dream the block's first step commits its
        first position only, whose logits come from the position before; no bound by `steps` then
        applies to a threshold. A memory reads what is computed.
    refresh: with a cache, the whole sequence again in every refresh-th step of a block.
    stop_at_eos: stop once everything before every row's first EOS is settled; EOS fills the rest.
    generator: the source of all randomness, on the backbone's device; a seed of 0 if None.

    The mask token is never a candidate, and no block takes more steps than it has positions or
    scheduled steps. Without memory a step that the schedule gives nothing to commit is not run:
    the published samplers run its forward and discard it. Raises `InputError`."""
    c = backbone.config
    if order is None:
        order = "low_confidence" if c.family == "llada" else \
            "origin" if threshold is None else "maskgit_plus"
    if top_k is None and c.family == "dream":
        top_k = 50
    prompt, pad_mask = _check(backbone, prompt, pad_mask, gen_length, block_length, steps, order,
                              threshold, temperature, top_p, top_k, alg_temp, cfg_scale, cache,
                              refresh)
    (B, P), device = prompt.shape, prompt.device
    generator = generator or torch.Generator(device).manual_seed(0)
    started, forwards = time.perf_counter(), 0
    ids = torch.cat([prompt, prompt.new_full((B, gen_length), c.mask_id)], 1)     # (B, P + G)
    prompt_part = torch.arange(P + gen_length, device=device) < P     # what guidance masks
    passes = 2 * B if cfg_scale > 0 else B
    state = None if memory is None else memory.initial(passes)
    kept = None if cache is None else Cache(backbone, passes, P + gen_length)
    # Dream's first position of a block is the one thing that a slice of it cannot predict
    alone = cache is not None and bool(c.shift) and refresh != 1
    if pad_mask is not None:
        pad_mask = torch.cat([pad_mask, pad_mask.new_zeros(B, gen_length)], 1)    # (B, P + G)

    steps = steps // (gen_length // block_length)                     # from here on: per block
    schedule = _schedule(order, block_length, steps, alone)
    counted = threshold is None and order != "origin"  # then the schedule alone tells what is left
    for start in range(P, P + gen_length, block_length):
        block = ids[:, start:start + block_length]                    # (B, L), a view
        for step in range(max(steps, block_length)):
            masked = block == c.mask_id                               # (B, L)
            n = block_length - sum(schedule[:step]) if counted else int(masked.sum(1).max())
            if n == 0:
                break
            idle = counted and schedule[step] == 0
            if idle and memory is None:
                continue
            first, last = 0, None                                     # what this step computes
            if cache is not None and step % (refresh or max(steps, block_length)):
                first, last = start, start + block_length if cache == "dual" else None
            # The n positions that can still be committed, in order; a row with fewer fills up.
            where = masked.byte().argsort(dim=1, descending=True, stable=True)[:, :n]  # (B, n)
            open_ = masked.gather(1, where)                           # (B, n)
            if alone and step == 0:
                open_ = open_ & (where == 0)
            both, keys, rows = ids, pad_mask, start + where
            if cfg_scale > 0:  # the conditional and the unconditional pass, in one batch
                both = torch.cat([ids, ids.masked_fill(prompt_part, c.mask_id)])
                keys = None if pad_mask is None else pad_mask.repeat(2, 1)
                rows = rows.repeat(2, 1)
            logits, state = denoise(backbone, both, rows[:, :0] if idle else rows, memory=memory,
                                    state=state, span=(P, gen_length), pad_mask=keys, cache=kept,
                                    first=first, last=last)
            forwards += 1
            if idle:  # the memory went on, and no random number was drawn
                continue
            if cfg_scale > 0:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + (cfg_scale + 1) * (conditional - unconditional)
            candidate, confidence = propose(logits, order, c.mask_id, temperature, top_p, top_k,
                                            generator)                # (B, n) each
            confidence = confidence.masked_fill(~open_, -torch.inf)
            if order == "origin":
                chance = schedule[step] if step < steps - 1 else 1.0
                chosen = torch.rand(where.shape, device=device, generator=generator) < chance
            elif threshold is not None:
                allowed = block_length if c.family == "llada" or alone else \
                    math.ceil(block_length * (step + 1) / steps)
                committed = block_length - masked.sum(1, keepdim=True)
                chosen = _above(confidence, threshold, allowed - committed)
            else:
                chosen = _best(confidence, schedule[step], alg_temp, generator)
            fresh = torch.zeros_like(masked).scatter_(1, where, chosen & open_)
            block.copy_(torch.where(fresh, block.scatter(1, where, candidate), block))
            if on_step is not None:
                everywhere = torch.zeros_like(ids, dtype=torch.bool)
                everywhere[:, start:start + block_length] = fresh
                on_step(Step(ids, everywhere, forwards, time.perf_counter() - started))
            if stop_at_eos and _settled(ids[:, P:], c.mask_id, c.eos_id):
                break
        if stop_at_eos and _settled(ids[:, P:], c.mask_id, c.eos_id):
            ids[:, P:].masked_fill_(ids[:, P:] == c.mask_id, c.eos_id)
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Sample(ids, forwards, time.perf_counter() - started)


def propose(logits: torch.Tensor, order: str, mask_id: int, temperature: float = 0.0,
            top_p: float | None = None, top_k: int | None = None,
            generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A candidate token and the confidence in it at each of n positions.

    logits (B, n, V) float32 -> candidate ids (B, n), confidence (B, n), larger is surer. The mask
    token is never a candidate; its share of the probability counts all the same, as in the
    published samplers, which leave it in."""
    share = logits[..., mask_id].clone()
    logits[..., mask_id] = -torch.inf
    best = logits.argmax(-1, keepdim=True)                            # (B, n, 1)
    logits[..., mask_id] = share
    drawn = logits / temperature if temperature > 0 else logits
    if top_p is not None or top_k:  # whatever is cut, the best real token stays
        drawn = _cut(drawn, top_p, top_k).scatter(-1, best, drawn.gather(-1, best))
    candidate = best[..., 0]
    if temperature > 0:  # argmax after Gumbel noise is a draw from the softmax; float64 as LLaDA's
        noise = torch.rand(drawn.shape, device=drawn.device, dtype=torch.float64,
                           generator=generator)
        noise = drawn - (-noise.log()).log()
        noise[..., mask_id] = -torch.inf
        candidate = noise.argmax(-1)
    if order in ("random", "origin"):
        return candidate, torch.rand(candidate.shape, device=logits.device, generator=generator)
    scored = logits if order in LLADA_ORDERS else drawn
    probability = torch.softmax(scored, -1)                           # (B, n, V)
    if order == "topk_margin":
        best = probability.topk(2, -1).values
        return candidate, best[..., 0] - best[..., 1]
    if order == "entropy":
        return candidate, (probability * (probability + 1e-10).log()).sum(-1)
    return candidate, probability.gather(-1, candidate[..., None])[..., 0]


def _cut(logits: torch.Tensor, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """-inf outside the smallest set of top tokens whose probability exceeds top_p, and outside the
    top_k most probable of those."""
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        ordered = ordered.masked_fill(before > top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _schedule(order: str, n: int, steps: int, alone: bool = False, eps: float = 1e-3) -> list:
    """What each of a block's `steps` commits of its n positions: counts, or for "origin" the chance
    of each position. LLaDA spreads evenly, the remainder first; Dream follows its time. alone: the
    first step commits one position."""
    if order in LLADA_ORDERS:
        if alone:
            return [1] + _schedule(order, n - 1, steps - 1)
        return [n // steps + (step < n % steps) for step in range(steps)]
    times = torch.linspace(1, eps, steps + 1)
    chances = [1 - times[step + 1] / times[step] for step in range(steps)]
    if order == "origin":
        return [1.0] * alone + [float(chance) for chance in chances[alone:]]
    counts = [1] * alone
    for chance in chances[alone:-1]:  # float32 and truncated, as the published sampler computes it
        counts.append(int((n - sum(counts)) * chance))
    return counts + [n - sum(counts)]


def _best(confidence, count: int, alg_temp: float, generator) -> torch.Tensor:
    """(B, n) bool: the `count` surest positions of each row, or so many drawn by confidence."""
    if alg_temp > 0:
        index = torch.softmax(confidence / alg_temp, -1).multinomial(count, generator=generator)
    else:
        index = confidence.topk(count, -1).indices
    return torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, index, True)


def _above(confidence, threshold: float, most: torch.Tensor) -> torch.Tensor:
    """(B, n) bool: of each row's `most` (B, 1) surest positions those that reach the threshold, and
    the surest whatever it has."""
    ordered, index = confidence.sort(-1, descending=True)
    rank = torch.arange(confidence.shape[1], device=confidence.device)
    take = (rank == 0) | ((ordered >= threshold) & (rank < most))
    return torch.zeros_like(take).scatter_(1, index, take)


def _settled(answer: torch.Tensor, mask_id: int, eos_id: int) -> bool:
    """True when no row has a mask before its first EOS."""
    before_eos = (answer == eos_id).cumsum(1) == 0                    # (B, G)
    return not bool((before_eos & (answer == mask_id)).any())


def _check(backbone, prompt, pad_mask, gen_length, block_length, steps, order, threshold,
           temperature, top_p, top_k, alg_temp, cfg_scale, cache, refresh):
    """Refuse what cannot be generated, and drop a pad_mask that pads nothing."""
    c = backbone.config
    if prompt.dim() != 2 or prompt.shape[0] == 0 or prompt.shape[1] == 0:
        raise InputError("the prompt is empty: it needs at least one token")
    if pad_mask is not None and pad_mask.shape != prompt.shape:
        raise InputError(f"pad_mask is {tuple(pad_mask.shape)}, the prompt {tuple(prompt.shape)}")
    if pad_mask is not None and bool(pad_mask.all(1).any()):
        raise InputError("a prompt is empty: it is all padding")
    if pad_mask is not None and bool((pad_mask[:, 1:] & ~pad_mask[:, :-1]).any()):
        raise InputError("prompts are padded on the left only")
    if int(prompt.max()) >= c.vocab or int(prompt.min()) < 0:
        raise InputError(f"the prompt has ids outside the vocabulary of {c.vocab}")
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise InputError(f"gen_length {gen_length} is not a multiple of block_length "
                         f"{block_length}")
    blocks = gen_length // block_length
    if steps < 1 or steps % blocks:
        raise InputError(f"{steps} steps do not divide into {blocks} blocks "
                         f"(gen_length {gen_length} / block_length {block_length})")
    if prompt.shape[1] + gen_length > c.max_len:
        raise InputError(f"a prompt of {prompt.shape[1]} tokens and gen_length {gen_length} leave "
                         f"no room in the model's {c.max_len} positions")
    if cache not in (None, "prefix", "dual"):
        raise InputError(f"unknown cache {cache!r}: prefix or dual")
    if refresh is not None and (cache is None or refresh < 1):
        raise InputError(f"refresh is {refresh}: it needs a cache, and has to be 1 or more")
    if cache is not None and c.shift and refresh != 1 and steps // blocks < 2 <= block_length:
        raise InputError("with a cache Dream needs 2 steps a block or more: the first commits one "
                         "position")
    if order not in LLADA_ORDERS + DREAM_ORDERS:
        known = ", ".join(LLADA_ORDERS + DREAM_ORDERS)
        raise InputError(f"unknown order {order!r}: one of {known}")
    if threshold is not None and order not in BY_PROBABILITY:
        raise InputError(f"a threshold needs an order by probability ({' or '.join(BY_PROBABILITY)}"
                         f"), not {order!r}")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise InputError(f"threshold is {threshold}, and has to be 0 or more")
    if threshold is not None and alg_temp > 0:
        raise InputError("threshold and alg_temp exclude each other")
    for name, value, least in (("temperature", temperature, 1e-6), ("alg_temp", alg_temp, 1e-6),
                               ("cfg_scale", cfg_scale, 0.0)):
        if value != 0 and not least <= value < math.inf:
            raise InputError(f"{name} is {value}, and has to be 0 or from {least} up")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, and has to lie in (0, 1]")
    if top_k is not None and top_k < 0:
        raise InputError(f"top_k is {top_k}, and has to be 0 (off) or more")
    return prompt, pad_mask if pad_mask is not None and bool(pad_mask.any()) else None


# ------------------------------------------------------------------ the live view
MASK, NEWLINE = "\u2591", "\u23ce"  # how a masked position and, on one line, a line break look
DIM, FRESH, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"


class LiveView:
    """Shows row 0 of a generation denoise. On a terminal every step redraws the same lines: masked
    positions as a light block, what the step committed in bold green, and a status line beneath.
    Anywhere else every step is one plain line."""

    def __init__(self, tokenizer: Tokenizer, config: Config, prompt_length: int, stream: TextIO,
                 delay: float = 0.0):
        self.tokenizer, self.config, self.prompt_length = tokenizer, config, prompt_length
        self.stream, self.terminal = stream, stream.isatty()
        self.delay = delay   # seconds to rest after each frame on a terminal
        self.rested = 0.0    # seconds so far, which are none of the model's
        self.drawn = 0       # lines of the last frame

    def __call__(self, step: Step) -> None:
        if not self.terminal:
            text = "".join(t for t, _ in self.runs(step)).replace("\n", NEWLINE)
            print(f"{step.forwards:4d}  {text}", file=self.stream, flush=True)
            return
        size = shutil.get_terminal_size()
        lines = self.frame(step, size.columns)[-max(1, size.lines - 1):]
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        self.stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self.drawn = len(lines)
        time.sleep(self.delay)
        self.rested += self.delay

    def frame(self, step: Step, columns: int) -> list[str]:
        """The lines of one frame, each at most `columns` wide: the answer, then the status."""
        lines, width = [""], 0
        for text, style in self.runs(step):
            lines[-1] += style
            for char in text:
                wide = 2 if unicodedata.east_asian_width(char) in "WF" else \
                    0 if unicodedata.combining(char) else 1
                if char == "\n" or width + wide > columns:
                    lines[-1] += PLAIN if style else ""
                    lines.append(style)
                    width = 0
                if char != "\n":
                    lines[-1] += char
                    width += wide
            lines[-1] += PLAIN if style else ""
        status = self.status(step)[:columns]
        return lines + [DIM + status + PLAIN]

    def status(self, step: Step) -> str:
        answer = step.ids[:, self.prompt_length:]
        masks = int((answer[0] == self.config.mask_id).sum())
        return (f"{answer.shape[1] - masks}/{answer.shape[1]} positions  "
                + figures(answer, self.config, step.forwards, step.seconds - self.rested))

    def runs(self, step: Step) -> list[tuple[str, str]]:
        """(text, style) of neighbouring tokens of one kind: masked, fresh or settled. EOS and what
        follows it is left out once everything before it is settled."""
        ids = step.ids[0, self.prompt_length:].tolist()
        fresh = step.fresh[0, self.prompt_length:].tolist()
        if self.config.eos_id in ids and self.config.mask_id not in ids[:ids.index(
                self.config.eos_id)]:
            ids = ids[:ids.index(self.config.eos_id)]
        runs: list[tuple[list[int], str]] = []
        for token, is_fresh in zip(ids, fresh):
            style = DIM if token == self.config.mask_id else FRESH if is_fresh else ""
            if not runs or runs[-1][1] != style:
                runs.append(([], style))
            runs[-1][0].append(token)
        return [(MASK * len(tokens) if style == DIM
                 else printable(self.tokenizer.decode(tokens, skip_special=True)), style)
                for tokens, style in runs]


def printable(text: str) -> str:
    """Text without the control characters that would move a terminal's cursor."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def count_tokens(answer: torch.Tensor, config: Config) -> int:
    """Generated tokens of a (B, G) answer: neither EOS nor mask."""
    return int(((answer != config.eos_id) & (answer != config.mask_id)).sum())


def figures(answer: torch.Tensor, config: Config, forwards: int, seconds: float) -> str:
    """The three figures that go together, always said the same way."""
    tokens = count_tokens(answer, config)
    return (f"{tokens} tokens  {forwards} forwards  {tokens / max(forwards, 1):.2f} "
            f"tokens/forward  {tokens / max(seconds, 1e-9):.1f} tokens/s")


def answer_text(ids: torch.Tensor, tokenizer: Tokenizer, config: Config) -> str:
    """Text of one generated answer (1-d ids) up to its first EOS, special tokens left out."""
    ids = ids.tolist()
    ids = ids[:ids.index(config.eos_id)] if config.eos_id in ids else ids
    return tokenizer.decode([i for i in ids if i != config.mask_id], skip_special=True)


# ------------------------------------------------------------------ command line
def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; raises `InputError` for values that make no sense."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to answer (by default a held-out sudoku for the tiny model)")
    what.add_argument("--prompt", help="a text; a user's message where the model has a chat format")
    what.add_argument("--prompts", metavar="FILE", help="one prompt a line, text or JSON with "
                      "`prompt` or `messages`; prints one JSON result a line")
    what.add_argument("--task", help="a held-out prompt of this task of tiny.py, and the verdict")
    what.add_argument("--raw", action="store_true", help="the text as it is, without chat format")
    model = p.add_argument_group("model")
    model.add_argument("--ckpt", default="tiny", help="nickname, folder or hub id (default: tiny)")
    model.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    model.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else as stored")
    model.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: "
                       "some seconds at first, faster then (default: on CUDA)")
    model.add_argument("--memory", metavar="FILE", help="a MetaState memory trained for it")
    model.add_argument("--fast-weights", nargs="?", const="", metavar="FOLDER", help="store the "
                       "prompt in fast weights first (memdlm.py), with the settings that FOLDER "
                       "holds (default: --ckpt), else the published ones")
    model.add_argument("--compare", action="store_true", help="without the memory, then with it")
    how = p.add_argument_group("how to decode")
    how.add_argument("--gen-length", type=int, help="positions to write (default: the checkpoint's "
                     "max_new_tokens, else 128)")
    how.add_argument("--block-length", type=int, help="default: 32, or all if 32 divides not")
    how.add_argument("--steps", type=int, help="denoising steps (default: one token per step)")
    how.add_argument("--order", choices=LLADA_ORDERS + DREAM_ORDERS, help="default: the family's")
    how.add_argument("--threshold", type=float, help="commit all that is at least so probable")
    how.add_argument("--cache", choices=("prefix", "dual"), help="Fast-dLLM's approximate caches")
    how.add_argument("--refresh", type=int, help="with --cache: all anew every so many steps")
    how.add_argument("--temperature", type=float, default=0.0)
    how.add_argument("--top-p", type=float)
    how.add_argument("--top-k", type=int)
    how.add_argument("--alg-temp", type=float, default=0.0, help="draw positions too (Dream)")
    how.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance")
    how.add_argument("--no-early-stop", action="store_true", help="decode what follows EOS too")
    how.add_argument("--seed", type=seed, default=0, help="of drawn tokens and of --task")
    show = p.add_argument_group("output")
    show.add_argument("--batch-size", type=int, default=1, help="prompts at a time with --prompts")
    show.add_argument("--delay", type=float, help="seconds to rest after each frame on a terminal "
                      "(default: 0.08 for tasks, which the tiny model solves in a blink, else 0)")
    show.add_argument("--quiet", action="store_true", help="the answer only, no live view")
    args = p.parse_args(argv)
    if sum(x is not None for x in (args.prompt, args.prompts, args.task)) > 1:
        raise InputError("--prompt, --prompts and --task exclude each other")
    if args.ckpt != "tiny" and args.prompt is args.prompts is args.task is None:
        raise InputError(f"what should {args.ckpt} answer? Pass --prompt, --prompts or --task")
    if args.compare and not args.memory:
        raise InputError("--compare needs a --memory to compare with")
    if args.delay is not None and not 0 <= args.delay < math.inf:
        raise InputError(f"--delay is {args.delay}, and has to be 0 or more")
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}, and has to be 1 or more")
    return args


def encode(tokenizer: Tokenizer, prompt: str | list[dict], raw: bool) -> list[int]:
    """Ids of a prompt: messages, or a text that becomes a user's message where there is a chat
    format and `raw` does not forbid it."""
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError("the prompt is empty")
    if isinstance(prompt, list):
        return tokenizer.chat(prompt)
    if raw or not tokenizer.is_chat:
        return tokenizer.encode(prompt)
    return tokenizer.chat([{"role": "user", "content": prompt}])


def read_prompts(path: str, tokenizer: Tokenizer, raw: bool,
                 room: int) -> list[tuple[str | list[dict], list[int]]]:
    """(prompt, ids) of a file, one a line: a text, or JSON with `prompt` or `messages`. An
    `InputError` names the line, also of a prompt longer than `room` tokens."""
    prompts = []
    for where, line in read_lines(path):
        prompt: str | list[dict] | None = line
        if line.lstrip().startswith("{"):
            fields = parse_json(line, where)
            prompt = fields.get("messages") or fields.get("prompt")
            if not isinstance(prompt, list if fields.get("messages") else str):
                raise InputError(f"{where}: neither a prompt nor a list of messages")
        try:
            ids = encode(tokenizer, prompt, raw)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if len(ids) > room:
            raise InputError(f"{where}: {len(ids)} tokens, and only {room} leave room for the "
                             "answer")
        prompts.append((prompt, ids))
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return prompts


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (B, P) ids padded on the left, and (B, P) True where padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows], device=device)
    pad = torch.tensor([[True] * (width - len(r)) + [False] * len(r) for r in rows], device=device)
    return ids, pad


@command
def main(argv: list[str] | None = None) -> int:
    """Answer what the command line asks; returns the exit code."""
    args = parse(argv)
    if args.ckpt.startswith("random:"):
        raise InputError(f"{args.ckpt} has no tokenizer: it is for bench.py")
    backbone, tokenizer = load(args.ckpt, args.device, args.dtype)
    if tokenizer is None:
        raise InputError(f"{args.ckpt} has no tokenizer, so a text cannot be read or written")
    c, device = backbone.config, backbone.embedding.weight.device
    length = _stated_length(args.ckpt) if args.gen_length is None else args.gen_length
    block_length = args.block_length
    if block_length is None:
        block_length = length if length % 32 else 32
    memory = MetaState.load(args.memory, backbone) if args.memory else None
    prepare = fast_weights(args, backbone)
    # fast weights come and go, and compiled code would not see them
    compile_on(device, args.compile if args.fast_weights is None else False, backbone, memory)
    options = dict(
        memory=memory, gen_length=length, block_length=block_length,
        steps=length if args.steps is None else args.steps, order=args.order,
        threshold=args.threshold,
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, alg_temp=args.alg_temp,
        cfg_scale=args.cfg_scale, cache=args.cache, refresh=args.refresh,
        stop_at_eos=not args.no_early_stop,
        generator=torch.Generator(device))

    if args.prompts is not None:
        options["generator"].manual_seed(args.seed)
        answer_file(args, backbone, tokenizer, options, prepare)
        return 0
    task = None
    if args.prompt is None:
        from tiny import draw, find_task  # the tasks that our own models were trained on
        task = find_task(args.task or "sudoku")
        args.prompt, _ = draw(task, random.Random(args.seed), held_out=True)
    ids = torch.tensor([encode(tokenizer, args.prompt, args.raw)], device=device)
    if not args.quiet and task:
        print(args.prompt, flush=True)
    delay = args.delay if args.delay is not None else 0.08 if task else 0.0
    for chosen in [None, memory] if args.compare else [memory]:
        if args.compare:
            print(f"{'with' if chosen else 'without'} memory:", flush=True)
        options["generator"].manual_seed(args.seed)
        view = None if args.quiet else LiveView(tokenizer, c, ids.shape[1], sys.stdout, delay)
        with prepare(ids, None):
            sample = generate(backbone, ids, on_step=view, **{**options, "memory": chosen})
        answer = sample.ids[:, ids.shape[1]:]
        text = answer_text(answer[0], tokenizer, c)
        if view is None or not view.terminal:
            print(text)
        if view is not None and not view.terminal:
            print(figures(answer, c, sample.forwards, sample.seconds))
        if task and not args.quiet:
            print("right" if task.check(args.prompt, text) else "wrong", flush=True)
    return 0


def fast_weights(args, backbone: Backbone) -> Callable:
    """prepare(prompt, pad_mask): within, the backbone has stored the prompt in fast weights, or is
    as it was where --fast-weights is not given."""
    if args.fast_weights is None:
        return lambda prompt, pad_mask: contextlib.nullcontext()
    from memdlm import Settings, adapted  # here, because memdlm trains with what imports this file
    settings = Settings.read(args.fast_weights or args.ckpt)
    return lambda prompt, pad_mask: adapted(backbone, settings, prompt, pad_mask, args.seed)


def answer_file(args, backbone: Backbone, tokenizer: Tokenizer, options: dict,
                prepare: Callable) -> None:
    """Answer the prompts of a file in batches, one JSON object a line on stdout."""
    c = backbone.config
    prompts = read_prompts(args.prompts, tokenizer, args.raw, c.max_len - options["gen_length"])
    for i in range(0, len(prompts), args.batch_size):
        batch = prompts[i:i + args.batch_size]
        ids, pad = left_pad([row for _, row in batch], c.pad_id, backbone.embedding.weight.device)
        with prepare(ids, pad):
            sample = generate(backbone, ids, pad_mask=pad, **options)
        for (prompt, _), answer in zip(batch, sample.ids[:, ids.shape[1]:]):
            print(json.dumps({
                "prompt": prompt, "text": answer_text(answer, tokenizer, c),
                "tokens": count_tokens(answer, c), "forwards": sample.forwards,
                "seconds": round(sample.seconds, 4), "batch": len(batch)},
                ensure_ascii=False), flush=True)


def _stated_length(ckpt: str) -> int:
    """max_new_tokens of the checkpoint's generation_config.json, else 128."""
    file = find(ckpt) / "generation_config.json"
    stated = read_json(file).get("max_new_tokens") if file.is_file() else None
    return stated if isinstance(stated, int) and stated > 0 else 128


if __name__ == "__main__":
    sys.exit(main())
