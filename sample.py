"""Write text with a masked diffusion language model, and watch it denoise.

    python sample.py                                   # the embedded tiny model solves a sudoku
    python sample.py --prompt "Once upon a time"       # the embedded model of stories goes on
    python sample.py --ckpt llada-8b --prompt "Why is the sky blue?"
    python sample.py --ckpt llada-8b --prompts questions.txt > answers.jsonl

`generate` is the whole algorithm: LLaDA's semi-autoregressive remasking, Dream's four orders and
Fast-dLLM's confidence threshold are one loop that differs in which positions a step may commit.
"""
from __future__ import annotations

import math
import time
from functools import partial
from itertools import chain, product
from typing import Callable, NamedTuple, Sequence

import lib.interrupts  # noqa: F401  Ctrl-C during the imports below
import torch
import torch.nn.functional as F

from lib.checks import check_generation
from lib.cli import command, compile_on, require
from lib.draws import Noise, cut, gumbel, uniform
from lib.graph import Replay
from lib.hub import stated
from lib.live import answer_prompts
from lib.options import decoding, sampling_parser
from lib.run import local_device
from lib.tokenizer import needed
from lib.watch import Watched
from metastate import MetaState
from model import Backbone, Cache, Config, load
from tasks import TASKS, draw

LLADA_ORDERS = ("low_confidence", "random")
DREAM_ORDERS = ("origin", "maskgit_plus", "topk_margin", "entropy")
ORDERS = LLADA_ORDERS + DREAM_ORDERS
BY_PROBABILITY = ("low_confidence", "maskgit_plus")  # the orders a threshold makes sense for


class Sample(NamedTuple):
    """What `generate` returns, and what `on_step` is called with after every commit."""
    ids: torch.Tensor      # (B, P + gen_length), the mask id where nothing is committed yet
    fresh: torch.Tensor    # (B, P + gen_length) bool, True where the last step committed
    forwards: int          # backbone calls of any length (Fast-dLLM's nfe)
    seconds: float         # since the start


# ------------------------------------------------------------------ one step
def denoise(backbone: Backbone, ids: torch.Tensor, where: torch.Tensor, *,
            memory: MetaState | None = None, state: torch.Tensor | None = None, span=None,
            pad_mask: torch.Tensor | None = None, cache: Cache | None = None,
            first: int | torch.Tensor = 0,
            last: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One denoising step, the same for sampling and training: hidden states (B, n, d) from which
    `backbone.logits` predicts the tokens at `where`, and the memory's next state.

    ids (B, T), masked where nothing is revealed; where (B, n), positions; state (B, M, D) and span
    (start, length) of the response, with a memory; pad_mask (B, T). With a cache only the positions
    first .. last - 1 are computed, or those in `first`, a tensor (S,) of some that follow each
    other; `where` lies among them. Dream's token i is predicted by hidden state i - 1, the first
    of a row by its own."""
    c, device = backbone.config, ids.device
    position = torch.arange(ids.shape[1], device=device)
    here = first if isinstance(first, torch.Tensor) else position[first:last]     # (S,)
    e = backbone.embed(ids[:, here])                                  # (B, S, d)
    # the memory's float32 weights multiply in 16 bits where the backbone does
    autocast = torch.autocast(device.type, e.dtype, enabled=e.dtype.itemsize == 2)
    if memory is not None:
        start, length = (torch.as_tensor(v, device=device).view(-1, 1).expand(len(ids), 1)
                         for v in span)                               # (B, 1) each
        inside = (position >= start) & (position < start + length)    # (B, T)
        t = ((ids == c.mask_id) & inside).sum(1) / length[:, 0]       # (B,) share still masked
        span = start[:, 0] - here[0], length[:, 0]                    # as the memory sees it
        with autocast:
            e = memory.inject(e, state, t, span)
    h = backbone.hidden(e, pad_mask, cache, here[0])                  # (B, S, d)
    if memory is not None:
        with autocast:
            state = memory.update(state, h, t, span, pad_mask if pad_mask is None
                                  else pad_mask[:, here])
    real = 0 if pad_mask is None else (~pad_mask).int().argmax(1, keepdim=True)   # first of a row
    where = (where - int(c.shift) * (where != real) - here[0]).clamp(min=0)
    return h.gather(1, where[..., None].expand(-1, -1, h.shape[-1])), state


class Steps:
    """The steps of one generation, and what they carry on: ids, a cache, a memory's state. A step
    is a function of numbers (where its block starts, what it may commit) over tensors that stay
    where they are, and waits for no host: on CUDA it is replayed as a graph. What it commits is
    `decide`'s business."""

    def __init__(self, backbone: Backbone, prompt: torch.Tensor, gen_length: int, length: int,
                 decide: Callable, generator: Noise, *, memory: MetaState | None = None,
                 pad_mask: torch.Tensor | None = None, cfg_scale: float = 0.0,
                 cache: str | None = None, refresh: int | None = None):
        (B, P), passes, device = prompt.shape, 2 if cfg_scale > 0 else 1, prompt.device
        self.backbone, self.decide, self.generator = backbone, decide, generator
        self.scale, self.offset = cfg_scale, torch.arange(length, device=device)
        self.cache, self.refresh, mask_id = cache, refresh, backbone.config.mask_id
        self.ids = F.pad(prompt, (0, gen_length), value=mask_id)      # (B, P + G)
        hole = (prompt == mask_id) & (True if pad_mask is None else ~pad_mask)       # (B, P)
        self.given, n = F.pad(~hole, (0, gen_length)), int(hole.sum(1).max())
        # (B, n): the prompt's masks; rows with fewer fill up with other positions, which stay
        self.holes = hole.byte().argsort(dim=1, descending=True, stable=True)[:, :n]
        # where a memory's response begins: without an answer with the first of them  # our choice
        start = (hole.byte().argmax(1) if gen_length == 0 else hole.sum(1) * 0 + P).repeat(passes)
        self.forwards, self.finite = 0, torch.ones((), dtype=torch.bool, device=device)
        self.state = memory.initial(passes * B).clone() if memory else torch.empty(0, device=device)
        self.fixed = dict(
            memory=memory, span=(start, P + gen_length - start),
            cache=cache and Cache(backbone, passes * B, P + gen_length),
            pad_mask=None if pad_mask is None or not pad_mask.any() else
            F.pad(pad_mask, (0, gen_length)).repeat(passes, 1))
        self.replays: dict[tuple[str, bool], Replay] = {}
        self.graphs = backbone.graphs and cache != "prefix"  # whose steps have ever other shapes

    def __call__(self, start: int | None, step: int, commit: Commit, idle: bool = False):
        """One forward for the block at `start`, or the prompt's masks where it is None, and what it
        commits written to .ids: (B, P + G) bool, True there, or None if idle: then only a memory
        goes on. With a cache the first step of a block, and every refresh-th, computes the whole
        sequence, the others the block and what follows it ("prefix") or the block alone ("dual");
        those for the prompt's masks are whole."""
        part = self.cache and start is not None and step % (self.refresh or step + 1)
        kind, self.forwards = (self.cache if part else "whole", idle), self.forwards + 1
        if not self.graphs or start is None:
            return self._step(*kind, start, *commit)
        replay = self.replays.setdefault(kind, Replay(self.generator))
        return replay(partial(self._step, *kind), start, *commit)

    def where(self, start: int | torch.Tensor | None) -> torch.Tensor:
        """(B, L) positions of the block at `start`, or (B, n) with the prompt's masks."""
        return self.holes if start is None else (start + self.offset).expand(len(self.ids), -1)

    def _step(self, kind: str, idle: bool, start: int | torch.Tensor | None, *commit):
        where = self.where(start)
        logits = self.logits(where, {"whole": 0, "prefix": start, "dual": where[0]}[kind])
        if idle:
            return None
        block = self.ids.gather(1, where)
        candidate, fresh = self.decide(logits, self.ids, block == self.backbone.config.mask_id,
                                       Commit(*commit))               # (B, L) each
        self.ids.scatter_(1, where, torch.where(fresh, candidate, block))
        return torch.zeros_like(self.ids, dtype=torch.bool).scatter_(1, where, fresh)

    def logits(self, where: torch.Tensor, first: int | torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) float32 at where (B, L), from one forward over the positions that
        `denoise` means by `first`. Guidance is uncond + (scale + 1) (cond - uncond), where uncond
        has what was given masked; a memory has a state for each."""
        ids = self.ids
        if self.scale > 0:
            unconditional = ids.masked_fill(self.given, self.backbone.config.mask_id)
            ids, where = torch.cat([ids, unconditional]), where.repeat(2, 1)
        h, state = denoise(self.backbone, ids, where, state=self.state.clone(), first=first,
                           **self.fixed)
        self.state.copy_(state)
        logits = self.backbone.logits(h).float()
        if self.scale > 0:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (self.scale + 1) * (conditional - unconditional)
        self.finite.logical_and_(logits.isfinite().all())  # looked at once, at the end
        return logits


# ------------------------------------------------------------------ the sampler
@torch.no_grad()
def generate(backbone: Backbone, prompt: torch.Tensor, *, memory: MetaState | None = None,
             pad_mask: torch.Tensor | None = None, gen_length: int = 128, block_length: int = 32,
             steps: int = 128, order: str | None = None, threshold: float | None = None,
             cache: str | None = None, temperature: float = 0.0, top_p: float | None = None,
             top_k: int | None = None, alg_temp: float = 0.0, cfg_scale: float = 0.0,
             refresh: int | None = None, stop_at_eos: bool = False, generator: Noise = None,
             adjust: Callable | None = None, late: Sequence[int] = (),
             on_step: Callable[[Sample], object] | None = None) -> Sample:
    """Denoise `gen_length` masked positions behind `prompt`, block by block from left to right.
    Masks in the prompt are a block before those, with as many steps for a token; gen_length 0:
    these alone, in `steps` steps (Dream's sampler does so; for LLaDA our choice).

    prompt (B, P) ids; pad_mask (B, P), True where the prompt is padding (on the left).
    memory: a MetaState, carried from step to step and from block to block.
    gen_length is a multiple of block_length, and steps of the number of blocks.
    order, threshold, alg_temp: which positions a step commits, see `plan` and `choose`.
    temperature, top_p, top_k: which tokens, see `propose`. top_k None is the published default: no
        cut for LLaDA, 50 for Dream, whose sampler inherits that without saying so; 0 is none.
    cfg_scale, cache, refresh: guidance and Fast-dLLM's "prefix" and "dual" caches, see `Steps`.
    stop_at_eos: stop once everything before every row's first EOS is settled; EOS fills the rest,
        as it does when on_step, called after every commit, returns True.
    generator: the source of all randomness, on the backbone's device; a seed of 0 if None. A list
        has one for each row, seeded anew for every block: rows of as many masks are independent.
    adjust, late: see `decide`. Raises `InputError`."""
    c, L, started = backbone.config, block_length, time.perf_counter()
    dreams = "origin" if threshold is None else "maskgit_plus"
    order = order or (dreams if c.family == "dream" else "low_confidence")
    top_k = 50 if top_k is None and c.family == "dream" else top_k
    check_generation(c, prompt, pad_mask, gen_length, L, steps, order, ORDERS, threshold,
                     BY_PROBABILITY, cache, refresh, temperature, top_p, top_k, alg_temp, cfg_scale,
                     generator, memory)
    P, generator = prompt.shape[1], generator or torch.Generator(prompt.device).manual_seed(0)
    by = partial(decide, order=order, mask_id=c.mask_id, temperature=temperature, top_p=top_p,
                 top_k=top_k, alg_temp=alg_temp, generator=generator, adjust=adjust, late=late)
    step = Steps(backbone, prompt, gen_length, L, by, generator, memory=memory, cache=cache,
                 pad_mask=pad_mask, cfg_scale=cfg_scale, refresh=refresh)
    n = step.holes.shape[1]
    filling = plan(c, order, threshold, n, math.ceil(steps * n / (gen_length or n))) if n else []
    # a slice of Dream's cannot predict its first position: a block's first, whole step commits that
    leading = cache is not None and c.shift and refresh != 1 and gen_length > 0
    schedule = plan(c, order, threshold, L, steps * L // (gen_length or L), leading)
    if leading:
        schedule[0] = schedule[0]._replace(within=1)
    counted = threshold is None and order != "origin"  # the plan alone says what is still masked
    for start, (i, commit) in chain(product([None], enumerate(filling)),
                                    product(range(P, P + gen_length, L), enumerate(schedule))):
        for row in generator if i == 0 and isinstance(generator, list) else ():
            row.manual_seed(row.initial_seed() + 1)
        idle = counted and commit.count == 0
        if (idle and memory is None) or (
                not counted and not (step.ids.gather(1, step.where(start)) == c.mask_id).any()):
            continue  # nothing to commit, and no memory to carry on
        fresh = step(start, i, commit, idle)                          # (B, P + G)
        if idle:
            continue
        sample = Sample(step.ids, fresh, step.forwards, time.perf_counter() - started)
        answer = step.ids[:, P:]
        if (on_step is not None and on_step(sample) is True) or (
                stop_at_eos and start is not None and settled(answer, c)):
            answer.masked_fill_(answer == c.mask_id, c.eos_id)
            break  # out of all blocks
    require(bool(step.finite), "the model's logits are not finite in "
            f"{backbone.embedding.weight.dtype}: there is no answer")
    return sample._replace(seconds=time.perf_counter() - started)


class Commit(NamedTuple):
    """What a step commits of a block's masked positions."""
    count: int                     # the surest so many
    threshold: float = math.inf    # and every other whose confidence reaches this,
    most: int = 2 ** 62            # while no more of the block are committed in all,
    within: int = 2 ** 62          # and all of them among the first so many of the block


def plan(c: Config, order: str, threshold: float | None, length: int, steps: int,
         leading: bool = False, eps: float = 1e-3) -> list[Commit]:
    """The steps of a block of `length` positions.

    LLaDA's orders, "low_confidence" (its default) and "random", spread the positions evenly over
    the steps, the remainder first. Dream's follow a time that falls linearly from 1 to eps: a step
    from t to s takes each masked position with probability 1 - s/t ("origin", its default), or the
    best int(masked * (1 - s/t)) by probability, by the margin of the top two, by negative entropy
    ("maskgit_plus", "topk_margin", "entropy"). Either family runs every order.
    threshold: the surest and every other that reaches it until nothing is masked (Fast-dLLM), for
    Dream at most length * i / steps in the first i steps. leading: one position in the first."""
    if threshold is not None:
        capped = steps if c.shift and not leading else 1
        return [Commit(1, threshold, math.ceil(length * (i + 1) / capped))
                for i in range(max(steps, length))]
    counts = [1] * leading
    if order in LLADA_ORDERS:
        n, k = length - leading, steps - leading
        counts += [n // k + (i < n % k) for i in range(k)]
    else:
        times = torch.linspace(1, eps, steps + 1)
        chances = (1 - times[1:] / times[:-1])[leading:-1]            # float32, as published
        if order == "origin":  # its confidence is a uniform number
            return [*map(Commit, counts), *(Commit(0, 1 - float(p)) for p in chances),
                    Commit(length)]
        for chance in chances:
            counts.append(int((length - sum(counts)) * chance))
        counts.append(length - sum(counts))
    while counts[-1] == 0:
        counts.pop()
    return [*map(Commit, counts)]


def decide(logits: torch.Tensor, ids: torch.Tensor, masked: torch.Tensor, commit: Commit, *,
           order: str, mask_id: int, alg_temp: float = 0.0, adjust: Callable | None = None,
           generator: Noise = None, **tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) candidates and (B, L) bool, which of them a step commits, given the block's logits
    (B, L, V) float32, all ids (B, P + G) and which of the block are masked (B, L).
    adjust(logits, ids) -> the logits to go by: operations on the device alone, for they are
    recorded with the step. tokens: as `propose` takes them."""
    if adjust is not None:
        logits = adjust(logits, ids)
    candidate, confidence = propose(logits, order, mask_id, generator=generator, **tokens)
    return candidate, choose(confidence.masked_fill(~masked, -torch.inf), commit,
                             (~masked).sum(1, keepdim=True), alg_temp, generator)


def propose(logits: torch.Tensor, order: str, mask_id: int, temperature: float = 0.0,
            top_p: float | None = None, top_k: int | None = None, generator: Noise = None,
            late: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """A candidate token and the confidence in it at each of n positions: logits (B, n, V) float32
    -> ids (B, n), confidence (B, n), larger is surer.

    The candidate is the argmax; with a temperature it is drawn from the tempered and cut
    distribution, in which Dream measures its confidence; LLaDA measures it in the plain one. The
    mask token is never a candidate; its share of the probability counts all the same, as in the
    published samplers, which leave it in. late: tokens that are left out of the probabilities once
    the candidates are taken, so that they are committed last (`confidence_eos_eot_inf`)."""
    share = logits[..., mask_id].clone()
    logits[..., mask_id] = -torch.inf
    best = logits.argmax(-1, keepdim=True)                            # (B, n, 1)
    logits[..., mask_id] = share
    drawn = logits / temperature if temperature > 0 else logits
    if top_p is not None or top_k:  # whatever is cut, the best real token stays
        drawn = cut(drawn, top_p, top_k).scatter(-1, best, drawn.gather(-1, best))
    candidate = best[..., 0]
    if temperature > 0:  # argmax after Gumbel noise is a draw from the softmax; float64 as LLaDA's
        noisy = drawn + gumbel(drawn, generator)
        noisy[..., mask_id] = -torch.inf
        candidate = noisy.argmax(-1)
    if order in ("random", "origin"):
        return candidate, uniform(candidate, torch.float32, generator)
    for token in late:
        logits[..., token] = drawn[..., token] = -torch.inf
    probability = torch.softmax(logits if order in LLADA_ORDERS else drawn, -1)   # (B, n, V)
    if order == "topk_margin":
        first, second = probability.topk(2, -1).values.unbind(-1)
        return candidate, first - second
    if order == "entropy":
        return candidate, (probability * (probability + 1e-10).log()).sum(-1)
    return candidate, probability.gather(-1, candidate[..., None])[..., 0]


def choose(confidence: torch.Tensor, commit: Commit, committed: torch.Tensor, alg_temp: float = 0.0,
           generator: Noise = None) -> torch.Tensor:
    """(B, L) bool, the positions that a step commits: confidence (B, L), -inf where nothing can be;
    committed (B, 1), how many of the block are already. With alg_temp positions are drawn from
    softmax(confidence / alg_temp), as Dream does."""
    if alg_temp > 0:
        confidence = confidence / alg_temp + gumbel(confidence, generator)
    rank = torch.arange(confidence.shape[1], device=confidence.device)
    confidence = confidence.masked_fill(rank >= commit.within, -torch.inf)
    ordered, index = confidence.sort(dim=-1, descending=True, stable=True)
    take = (rank < commit.count) | (ordered >= commit.threshold) & (rank < commit.most - committed)
    return torch.zeros_like(take).scatter_(1, index, take & (ordered != -torch.inf))


def settled(answer: torch.Tensor, c: Config) -> bool:
    """True when no row of (B, G) has a mask before its first EOS."""
    before_eos = (answer == c.eos_id).cumsum(1) == 0                  # (B, G)
    return not bool((before_eos & (answer == c.mask_id)).any())


# ------------------------------------------------------------------ command line
parser = partial(sampling_parser, __doc__, ORDERS, TASKS)


def answer(args, decode: Callable[..., Sample] = generate) -> int:
    """Answer what the command line asks by `decode(backbone, ids, **options)`: the exit code."""
    length, tasks = stated(args.ckpt)
    options = decoding(args, length)
    backbone, tokenizer = load(args.ckpt, local_device(args.device), args.dtype)
    memory = MetaState.load(args.memory, backbone) if args.memory else None
    device, watched = backbone.embedding.weight.device, None
    compile_on(device, args.compile, backbone, memory)
    if args.show_memory:
        memory = watched = Watched(memory)
        options["adjust"] = watched.adjust

    def by(used: MetaState | None) -> Callable[..., Sample]:
        generator = torch.Generator(device).manual_seed(args.seed)
        return partial(decode, backbone, memory=used, generator=generator, **options)

    variants = {"without memory": None, "with memory": memory} if args.compare else {"": memory}
    return answer_prompts(args, {name: by(used) for name, used in variants.items()},
                          needed(tokenizer, args.ckpt), backbone.config, device,
                          options["gen_length"], TASKS, [args.task] if args.task else tasks, draw,
                          watched)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return answer(parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
