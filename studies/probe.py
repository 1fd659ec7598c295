"""What a masked diffusion model knows at each distance from its prompt, and what it costs to sample
several positions at once from their marginals.

    python -m studies.probe                            # a held-out sudoku, the tiny model
    python -m studies.probe --task chain --number 100 --n-masks 24    # mean and spread of 100
    python -m studies.probe --ckpt llada-8b --prompt "Do plants have cells that migrate?"
    python -m studies.probe --ckpt llada-8b --prompts questions.txt --unigram book.txt
    python -m studies.probe --memory FILE --task chain --number 100 --n-masks 24    # off and on
    python -m studies.probe --trap                     # the marginal trap, in seconds

`probe` is the experiment of "On the Role of Discreteness in Diffusion LLMs" (arXiv 2512.22630,
Figure 2): masks behind a prompt, one forward, nothing sampled; a plain float32 softmax, no
temperature, nothing suppressed. The top tokens and their probabilities at every position are the
paper's figure; the numbers that `metrics` makes of it are ours. `trap` is its second experiment.
"""
from __future__ import annotations

import argparse
import itertools
import math
import random
import shutil
import sys
import tempfile
import time
from typing import Callable, Iterable, Sequence

import numpy as np
import torch

from lib.checks import finite
from lib.cli import Parser, command, count, one_of, require, seed, size, whole, written
from lib.data import task_batch
from lib.files import read_text, to_json
from lib.hub import Stated, folder_of, stated
from lib.live import NEWLINE
from lib.options import add_model_options, with_text
from lib.outputs import input_file, input_stream, tensors_file
from lib.progress import progress, slow
from lib.prompts import Prompt, prompt_ids, read_prompts
from lib.stats import new_figure, plot_file, save_figure
from lib.terminal import complain, printable
from lib.tokenizer import Tokenizer, needed
from metastate import MetaState
from model import Backbone, Config, load
from sample import denoise, generate
from studies.small import llada_loss
from tasks import TASKS, draw
from train import fit, unrolled_loss

PAPER = {"top1": "top-1 p"}
OURS = {"entropy": "entropy", "eos": "EOS", "frequent": "top-20", "kl": "KL", "tv": "TV",
        "same": "same"}
LEGEND = """\
the paper's: the top tokens and their probabilities. Ours: entropy (nats); EOS, its probability;
top-20, the mass on the 20 most frequent tokens of {unigram}, and
KL (nats) from their distribution; TV, the total variation to the next position; same, whether the
next position has the same most probable token
"""
FREQUENT = 20      # "the most frequent tokens"
SMOOTHING = 0.01   # share of the unigram distribution that is spread evenly over the vocabulary
ROWS = 16          # of a table by distance, at most
BARS = " ▁▂▃▄▅▆▇█"  # 0 to 8


# ------------------------------------------------------------------ the probe
def probe(backbone: Backbone, prompt_ids: Sequence[int], n_masks: int = 128,
          memory: MetaState | None = None) -> torch.Tensor:
    """One forward over a prompt and `n_masks` masks: (n_masks, V) float32 probabilities of the
    token at each masked position; a memory is in its first state. Raises `InputError`."""
    return probe_after(backbone, prompt_ids, n_masks, 0, memory)[1]


def check_steps(after: int, steps: int, n_masks: int) -> None:
    """Refuse a probe after so many of so many steps over so many masks that cannot be."""
    require(0 <= after < steps <= n_masks, f"--after {after} of --steps {steps} over {n_masks} "
            "masks: steps are at most the masks, and after less than the steps")


@torch.no_grad()
def probe_after(backbone: Backbone, prompt_ids: Sequence[int], n_masks: int, after: int,
                memory: MetaState | None = None, steps: int | None = None,
                generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe after `after` of `steps` denoising steps (default: one position a step): distances
    (n,) of the positions still masked, 1 next to the prompt, and their probabilities (n, V).

    A step commits the most probable tokens at random positions. So what is still masked depends
    neither on what the model is sure of (which is EOS, far away) nor on the memory: runs with equal
    CPU generators look at the same positions. Raises `InputError`."""
    c, device, P = backbone.config, backbone.embedding.weight.device, len(prompt_ids)
    steps = n_masks if steps is None else steps
    require(P > 0, "the prompt is empty: it needs at least one token")
    require(n_masks > 0 and P + n_masks <= c.max_len,
            f"a prompt of {P} tokens and {n_masks} masks do not fit into the model's {c.max_len} "
            "positions: shorten the prompt or lower --n-masks")
    check_steps(after, steps, n_masks)
    generator = generator or torch.Generator().manual_seed(0)
    prompt = torch.as_tensor(prompt_ids, device=device)[None]                      # (1, P)
    ids = torch.cat([prompt, prompt.new_full((1, n_masks), c.mask_id)], 1)         # (1, P + n)
    state = None if memory is None else memory.initial(1)
    for step in range(after + 1):
        where = P + (ids[0, P:] == c.mask_id).nonzero()[:, 0]                      # (n,)
        h, state = denoise(backbone, ids, where[None], memory=memory, state=state,
                           span=(P, n_masks))                                      # (1, n, d)
        logits = finite("the model's logits", backbone.logits(h).float())          # (1, n, V)
        if step < after:
            count = n_masks // steps + (step < n_masks % steps)
            chosen = torch.randperm(len(where), generator=generator)[:count].to(device)
            logits[..., c.mask_id] = -torch.inf
            ids[0, where[chosen]] = logits[0, chosen].argmax(-1)
    return where - P + 1, torch.softmax(logits[0], -1)


def unigram_of(ids: Iterable[int], vocab: int) -> torch.Tensor:
    """(V,) float32: how frequent each token is, with `SMOOTHING` of it spread evenly over all V, so
    that a token that does not occur has a finite KL. Raises `InputError` where there is none."""
    counts = torch.bincount(torch.as_tensor(list(ids), dtype=torch.long), minlength=vocab).float()
    require(bool(counts.sum()), "the text for the unigram distribution is empty")
    return (1 - SMOOTHING) * counts / counts.sum() + SMOOTHING / vocab


def metrics(probabilities: torch.Tensor, eos_id: int, unigram: torch.Tensor | None = None,
            distance: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """Numbers for each of n positions, from their probabilities (n, V): arrays (n,).

    top1: the largest probability (the paper's). Ours: entropy in nats; eos; frequent: the mass on
    the 20 tokens with the largest unigram (V,), and kl, KL(position || unigram) in nats, both left
    out without one; tv: the total variation to the next position; same: 1 where the next position
    has the same argmax, else 0. The two are NaN where no next position is among the n:
    distance (n,) says where they lie (by default they are neighbours)."""
    p = probabilities
    found = {"top1": p.amax(-1), "entropy": torch.special.entr(p).sum(-1), "eos": p[:, eos_id]}
    if unigram is not None:
        u = unigram.to(p)
        frequent = u.sort(descending=True, stable=True).indices[:FREQUENT]
        found["frequent"] = p[:, frequent].sum(-1)
        found["kl"] = (torch.special.xlogy(p, p) - p * u.log()).sum(-1).clamp(min=0)
    best, nan = p.argmax(-1), p.new_full((1,), torch.nan)
    apart = torch.zeros_like(best[1:], dtype=torch.bool) if distance is None else \
        (distance.diff() != 1).to(p.device)
    for name, value in (("tv", (p[1:] - p[:-1]).abs().sum(-1) / 2),
                        ("same", (best[1:] == best[:-1]).to(p))):
        found[name] = torch.cat([value.masked_fill(apart, torch.nan), nan])
    return {name: value.cpu().double().numpy() for name, value in found.items()}


def visible(tokenizer: Tokenizer, token: int) -> str:
    """One token, so that spaces, line ends, specials and parts of a character can be seen."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:  # part of a character, or no token: the vocabulary's spelling
        text = tokenizer.core.id_to_token(token) or f"#{token}"
    return printable(text).replace(" ", "␣").replace("\n", NEWLINE)


# ------------------------------------------------------------------ what is shown
def strip(values: np.ndarray, width: int, top: float) -> str:
    """Values from 0 to `top` as a line of bars: one character for each, or for each of `width`
    ranges where they are more; "·" where nothing was measured."""
    cells = np.array_split(np.ma.masked_invalid(values), max(1, min(len(values), width)))
    levels = [np.ma.mean(cell) / top * (len(BARS) - 1) for cell in cells]
    return "".join("·" if level is np.ma.masked else BARS[min(max(round(float(level)), 0), 8)]
                   for level in levels)


def by_distance(rows: list[np.ndarray], width: int = 1) -> list[dict]:
    """Mean and spread (standard deviation over prompts) of a metric for ranges of `width`
    distances; rows: for each prompt an array (n_masks,), NaN where nothing was measured."""
    values, found = np.ma.masked_invalid(np.stack(rows)), []          # (prompts, n_masks)
    for start in range(0, values.shape[1], width):
        part = values[:, start:start + width].mean(1)                 # (prompts,)
        mean, sd = (float(x) if part.count() else None for x in (part.mean(), part.std()))
        found.append({"from": start + 1, "to": min(start + width, values.shape[1]),
                      "prompts": int(part.count()), "mean": mean, "sd": sd})
    return found


def print_tokens(record: dict) -> None:
    """Position -> top tokens with probabilities, of one prompt, and our metrics."""
    shown = [name for name in OURS if name in record["positions"][0]]
    print(" at" + "".join(f"{OURS[name]:>9}" for name in shown) + "   top tokens")
    for row in record["positions"]:
        print(f"{row['distance']:3}" + "".join(
            f"{'' if row[name] is None else format(row[name], '.3f'):>9}" for name in shown)
            + "   " + "  ".join(f"{top['token']} {top['p']:.3f}" for top in row["top"]))
    print()


def print_summary(measured: dict[str, dict[str, list[np.ndarray]]]) -> None:
    """Means by distance (and spread over prompts), variants beneath each other; then the strips."""
    first = next(iter(measured.values()))
    many, n, labels = len(first["top1"]) > 1, len(first["top1"][0]), PAPER | OURS
    margin, cell = max(map(len, measured)) + 10, 13 if many else 9
    if many or len(measured) > 1:  # else it is the table of tokens once more
        tables = {(v, name): by_distance(x, math.ceil(n / ROWS))
                  for v, rows in measured.items() for name, x in rows.items()}
        print(f"{'distance':{margin}}" + "".join(f"{labels[name]:>{cell}}" for name in first))
        for i, span in enumerate(next(iter(tables.values()))):
            at = f"{span['from']}-{span['to']}" if span["from"] < span["to"] else span["from"]
            for variant in measured:
                cells = [tables[variant, name][i] for name in first]
                print((f"{at:<9}{variant:{margin - 9}}" + "".join(
                    f"{'':>{cell}}" if c["mean"] is None else f"{c['mean']:6.2f} ({c['sd']:.2f})"
                    if many else f"{c['mean']:9.3f}" for c in cells)).rstrip())
        print()
    width = max(8, min(n, shutil.get_terminal_size().columns - margin - 16))
    for name in first:
        means = {v: [math.nan if c["mean"] is None else c["mean"] for c in by_distance(rows[name])]
                 for v, rows in measured.items()}
        top = max(1.0, np.nanmax(list(means.values()))) if name in ("entropy", "kl") else 1.0
        for variant, values in means.items():
            print(f"{labels[name]:9}{variant:{margin - 9}}"
                  f"|{strip(values, width, top)}| 0-{top:.1f}")


def plot(measured: dict[str, dict[str, list[np.ndarray]]], path: str) -> None:
    """Write top-1 probability, EOS and entropy against distance: mean, and spread as a band. Raises
    `InputError`."""
    figure = new_figure(figsize=(6, 7), layout="constrained")
    for k, name in enumerate(("top1", "eos", "entropy")):
        axes = figure.add_subplot(3, 1, k + 1, ylabel=(PAPER | OURS)[name])
        for variant, rows in measured.items():
            values = np.ma.masked_invalid(np.stack(rows[name]))
            x, mean, sd = np.arange(1, values.shape[1] + 1), values.mean(0), values.std(0)
            axes.plot(x, mean, label=variant)
            axes.fill_between(x, mean - sd, mean + sd, alpha=0.2)
    axes.set_xlabel("distance from the prompt")
    if len(measured) > 1:
        figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)


# ------------------------------------------------------------------ the marginal trap
SENTENCES = ("He likes apple", "I play tennis")
WORDS = ["<mask>", "<eos>", "<s>", *(word for s in SENTENCES for word in s.split())]
MASK, PROMPT, DATA = 0, [2], [[WORDS.index(word) for word in s.split()] for s in SENTENCES]
SCHEDULES = {1: (3,), 2: (2, 1), 3: (1, 1, 1)}  # steps -> what each commits, as `generate` does


def exact(counts: Sequence[int]) -> tuple[float, float]:
    """(share never seen, KL(data || samples) in nats) of a perfect model whose steps commit
    `counts` random positions. By the chain rule: the k of the first step are drawn from their
    marginals, 1/2 each, and agree with probability 2 (1/2)^k; one visible word then decides the
    rest. So either sentence has (1/2)^k, 1 - 2^(1-k) was never seen, and KL is (k - 1) ln 2."""
    return 1 - 2.0 ** (1 - counts[0]), (counts[0] - 1) * math.log(2)


def _fit(module: torch.nn.Module, loss_fn: Callable, seed: int, steps: int, lr: float) -> None:
    """Train a module on loss_fn(generator), and freeze it."""
    def loss(step: int, _):
        return loss_fn(torch.Generator().manual_seed(seed * steps + step)), {}

    with tempfile.TemporaryDirectory() as out:
        fit(dict(module.named_parameters()), loss, out, steps=steps, lr=lr, warmup=20,
            save_every=steps)
    module.eval().requires_grad_(False)


def trap_model(seed: int = 0) -> Backbone:
    """A masked model of 11 thousand weights, fitted to the two sentences with LLaDA's loss."""
    config = Config("llada", dim=32, layers=1, heads=2, kv_heads=2, mlp_dim=64, vocab=len(WORDS),
                    max_len=256, rope_theta=300.0, norm_eps=1e-5, qkv_bias=True, rope_float32=True,
                    tied=False, mask_id=MASK, eos_id=WORDS.index("<eos>"),
                    pad_id=WORDS.index("<eos>"), dtype="float32")
    backbone = Backbone(config).initialise(torch.Generator().manual_seed(seed))
    answers = torch.tensor(DATA * 16)                                 # (32, 3)
    prompts = torch.tensor([PROMPT]).expand(len(answers), -1)         # (32, 1)
    _fit(backbone, lambda g: llada_loss(backbone, prompts, answers, None, g), seed, 300, 1e-2)
    return backbone


def trap_memory(backbone: Backbone, seed: int = 0, updates: int = 200) -> MetaState:
    """A MetaState memory for it, by K-step unrolling: K = 3, one step per word."""
    memory = MetaState.for_backbone(backbone, slots=4, width=32,
                                    generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([PROMPT + row for row in DATA] * 8)            # (16, 4)
    answer = (torch.arange(4) > 0).expand(ids.shape)
    _fit(memory, lambda g: unrolled_loss(backbone, memory, ids, answer, K=3, generator=g),
         seed, updates, 3e-3)
    return memory


@torch.no_grad()
def outcomes(backbone: Backbone, ids: torch.Tensor, counts: Sequence[int],
             memory: MetaState | None = None) -> dict[tuple[int, ...], float]:
    """The probability of every sequence that decoding ids (1, T) can end in, by enumeration: step s
    commits counts[s] masked positions, any of them alike, each drawn from its own distribution
    (temperature 1, without the mask token). Rows are branches; a step multiplies them."""
    mask_id = backbone.config.mask_id
    words = [i for i in range(backbone.config.vocab) if i != mask_id]
    masked = (ids[0] == mask_id).nonzero()[:, 0]
    span, weight = (int(masked[0]), len(masked)), torch.ones(1, dtype=torch.float64)
    state = None if memory is None else memory.initial(1)
    for count in counts:
        where = (ids == mask_id).nonzero()[:, 1].view(len(ids), -1)               # (N, n)
        h, state = denoise(backbone, ids, where, memory=memory, state=state, span=span)
        logits = finite("the model's logits", backbone.logits(h).float())         # (N, n, V)
        logits[..., mask_id] = -torch.inf
        p, branches = torch.softmax(logits.double(), -1), []                      # (N, n, V)
        subsets = list(itertools.combinations(range(where.shape[1]), count))
        for subset, drawn in itertools.product(subsets, itertools.product(words, repeat=count)):
            chance = p[:, list(subset), list(drawn)].prod(-1) / len(subsets)      # (N,)
            after = ids.scatter(1, where[:, list(subset)],
                                torch.tensor([drawn]).expand(len(ids), -1))
            branches.append((after, weight * chance))
        ids, weight = (torch.cat(part) for part in zip(*branches))                # (N', T), (N',)
        state = None if state is None else state.repeat(len(branches), 1, 1)
    found: dict[tuple[int, ...], float] = {}
    for sequence, chance in zip(ids.tolist(), weight.tolist()):
        found[tuple(sequence)] = found.get(tuple(sequence), 0.0) + chance
    return found


def trap_row(backbone: Backbone, memory: MetaState | None, counts: Sequence[int], samples: int = 0,
             seed: int = 0) -> dict:
    """Share never seen in the data, and KL(data || samples): of the model by enumeration, of a
    perfect one, and the share among so many samples drawn."""
    blank = torch.tensor([PROMPT + [MASK] * 3])
    chances = outcomes(backbone, blank, counts, memory)
    seen = [chances.get((*PROMPT, *row), 0.0) for row in DATA]
    unseen, kl = exact(counts)
    row = {"memory": memory is not None, "commits": list(counts), "unseen": 1 - sum(seen),
           "unseen_exact": unseen, "kl": sum(-math.log(2 * max(q, 1e-300)) / 2 for q in seen),
           "kl_exact": kl, "samples": samples, "unseen_sampled": None}
    if samples:
        drawn = generate(backbone, blank[:, :1].expand(samples, -1), memory=memory, gen_length=3,
                         block_length=3, steps=len(counts), order="random", temperature=1.0,
                         generator=torch.Generator().manual_seed(seed)).ids[:, 1:]
        valid = (drawn[:, None] == torch.tensor(DATA)).all(-1).any(-1)            # (samples,)
        row["unseen_sampled"] = 1 - float(valid.double().mean())
    return row


def trap(args: argparse.Namespace) -> None:
    """Fit the model and its memory, and print the table."""
    started = time.perf_counter()
    with slow("fitting a model and a memory"):
        backbone = trap_model(args.seed)
        between = time.perf_counter()
        memory = trap_memory(backbone, args.seed)
    seconds = between - started, time.perf_counter() - between
    rows = [trap_row(backbone, used, counts, args.samples, args.seed)
            for used in (None, memory) for counts in SCHEDULES.values()]
    rows.insert(2, trap_row(backbone, None, (1, 2)))
    if args.json:
        for row in rows:
            print(to_json(row))
        return
    print(f"{' / '.join(SENTENCES)}: a model fitted in {seconds[0]:.1f} s, a memory in "
          f"{seconds[1]:.1f} s\n\n{'':31}never seen in the data       KL(data || samples), nats\n"
          f"{'steps (positions committed)':30} {args.samples:>7} drawn    model    exact"
          "      model    exact")
    for row in rows:
        name = f"{len(row['commits'])} ({' + '.join(map(str, row['commits']))})" + (
            ", with memory" if row["memory"] else "")
        drawn = "" if row["unseen_sampled"] is None else f"{row['unseen_sampled']:.2%}"
        print(f"{name:30} {drawn:>13} {row['unseen']:8.2%} {row['unseen_exact']:8.2%}   "
              f"{row['kl']:8.3f} {row['kl_exact']:8.3f}")
    print("""
Positions are committed at random, words drawn at temperature 1. exact: of a perfect model, by the
chain rule. (By confidence the shares would be others: which word is surer, by however little, then
decides what is committed.) 1 + 2 is no schedule of sample.py's: enumerated only. A memory's state
follows from the prompt and the words committed before, so the draws of one step stay independent
given it: words committed together cannot agree more often unless one sentence is given up.""")


# ------------------------------------------------------------------ command line
def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    what = p.add_argument_group("what to probe (by default a task that the checkpoint names)")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompt", type=written, help="a text; a user's message where the model "
                        "has a chat format")
    source.add_argument("--prompts", type=input_stream, metavar="FILE", help="one prompt a line, "
                        "text or JSON with `prompt` or `messages`")
    source.add_argument("--task", type=one_of(TASKS, "task"), help="held-out prompts of this task")
    source.add_argument("--trap", action="store_true", help="the marginal trap instead, on the CPU")
    what.add_argument("--number", type=size, default=1, help="how many of the task's (default: 1)")
    what.add_argument("--raw", action="store_true", help="the text as it is, without chat format")
    what.add_argument("--n-masks", type=count, help="masks behind the prompt (default: 128, or "
                      "what the model's length leaves)")
    what.add_argument("--samples", type=count, default=10_000, help="with --trap: to draw")
    what.add_argument("--seed", type=seed, default=0, help="of --task, --after and --trap")
    add_model_options(p, compiled=False, kind=with_text)
    p.add_argument("--memory", type=tensors_file, metavar="FILE",
                   help="a MetaState memory: off and on")
    p.add_argument("--after", type=whole(0), help="denoising steps before the probe (default: 0, "
                   "with --memory half of them)")
    p.add_argument("--steps", type=count, help="denoising steps that would fill all masks "
                   "(default: one token per step)")
    show = p.add_argument_group("output")
    show.add_argument("--topk", type=size, default=3, help="tokens shown at a position "
                      "(default: 3)")
    show.add_argument("--unigram", type=input_file, metavar="FILE", help="a text to "
                      "compare with (default: answers of the checkpoint's tasks; where it has "
                      "none, top-20 and KL are left out)")
    show.add_argument("--json", action="store_true", help="JSON lines: a prompt each, then means")
    show.add_argument("--plot", type=plot_file, metavar="FILE",
                      help="curves by distance (matplotlib)")
    return p


def tasks_of(ckpt: str) -> Stated:
    """What the checkpoint states, without a download: published ones state no tasks. Raises
    `InputError` for a task that is not there."""
    if folder_of(ckpt) is None:
        return Stated(128, [])
    found = stated(ckpt)
    for name in found.tasks:
        require(name in TASKS, f"{ckpt} names a task {name!r}, which is none of {', '.join(TASKS)}")
    return found


def prompts_of(args: argparse.Namespace, tokenizer: Tokenizer, tasks: list[str],
               room: int, mask_id: int) -> list[Prompt]:
    """Everything that the command line asks about, faulty lines of a file included."""
    if args.prompts is not None:
        return read_prompts(args.prompts, tokenizer, args.raw, room, mask_id)
    texts, rng = [args.prompt], random.Random(args.seed)
    if args.prompt is None:
        texts = [draw(args.task or tasks[0], rng, held_out=True)[0] for _ in range(args.number)]
    return [Prompt({"prompt": text}, prompt_ids(text, tokenizer, args.raw, mask_id))
            for text in texts]


def unigram_for(args: argparse.Namespace, tokenizer: Tokenizer, c: Config,
                known: Stated) -> tuple[torch.Tensor | None, str]:
    """(unigram distribution or None, what it is of)."""
    if args.unigram:
        return unigram_of(tokenizer.encode(read_text(args.unigram)), c.vocab), args.unigram
    answers = []
    for name in known.tasks:
        rng = random.Random(0)
        pairs = [draw(name, rng, held_out=False) for _ in range(250)]
        answers.append(task_batch(pairs, tokenizer, c.eos_id, known.length)[1].flatten())
    if not answers:
        return None, "a --unigram text (left out without one)"
    return unigram_of(torch.cat(answers).tolist(), c.vocab), "the training tasks' answers"


def record_of(tokenizer: Tokenizer, distance: torch.Tensor, p: torch.Tensor, topk: int,
              found: dict[str, np.ndarray]) -> list[dict]:
    """A dict for each position: its distance, top tokens and metrics (None for NaN)."""
    top = p.topk(min(topk, p.shape[-1]), -1)
    return [{"distance": at, "top": [{"id": t, "token": visible(tokenizer, t), "p": q}
                                     for t, q in zip(tokens, chances)],
             **{name: None if math.isnan(v[i]) else float(v[i]) for name, v in found.items()}}
            for i, (at, tokens, chances) in enumerate(zip(
                distance.tolist(), top.indices.tolist(), top.values.tolist()))]


def good_ones(prompts: list[Prompt], as_json: bool) -> list[Prompt]:
    """The prompts that can be probed; what is wrong with the others is said, on stdout as JSON or
    on stderr."""
    for prompt in prompts:
        if prompt.error and as_json:
            print(to_json(prompt.refused()))
        elif prompt.error:
            complain(prompt.error)
    return [prompt for prompt in prompts if not prompt.error]


def measure(args: argparse.Namespace) -> int:
    """Probe what the command line asks for, and print it. Returns the exit code, 1 where some
    prompts of a file have errors."""
    known, asked = tasks_of(args.ckpt), (args.prompt, args.prompts, args.task)
    require(bool(known.tasks) or any(x is not None for x in asked),
            f"what should --ckpt {args.ckpt} be asked? Pass --prompt, --prompts or --task")
    backbone, tokenizer = load(args.ckpt, args.device, args.dtype)
    c, tokenizer = backbone.config, needed(tokenizer, args.ckpt)
    require((args.n_masks or 1) < c.max_len, f"--n-masks {args.n_masks} leaves no room for a "
            f"prompt in the model's {c.max_len} positions")
    lines = prompts_of(args, tokenizer, known.tasks, c.max_len - (args.n_masks or 1), c.mask_id)
    prompts = good_ones(lines, args.json)
    if not prompts:
        return 1
    # the same for all, because what a position gets depends on how many masks follow
    n = args.n_masks or max(1, min(128, c.max_len - max(len(prompt.ids) for prompt in prompts)))
    steps = args.steps or n
    after = args.after if args.after is not None else steps // 2 if args.memory else 0
    variants = {"memory off": None, "memory on": MetaState.load(args.memory, backbone)} \
        if args.memory else {"": None}
    unigram, source = unigram_for(args, tokenizer, c, known)
    check_steps(after, steps, n)
    common = {"n_masks": n, "steps": steps, "after": after}

    if not args.json:
        print(f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, {n} masks, one forward" + (
            f" after {after} of {steps} denoising steps" if after else "")
            + "; spread over prompts in brackets" * (len(prompts) > 1) + "\n"
            + LEGEND.format(unigram=source))
    measured: dict[str, dict[str, list[np.ndarray]]] = {variant: {} for variant in variants}
    work = list(itertools.product(enumerate(prompts), variants))
    for (i, prompt), variant in progress(work, "prompts", bar=len(prompts) > 1 and not args.json):
        bits = random.Random(f"{args.seed} {i}").getrandbits(60)  # off and on: the same
        distance, p = probe_after(backbone, prompt.ids, n, after, variants[variant], steps,
                                  torch.Generator().manual_seed(bits))
        found = metrics(p, c.eos_id, unigram, distance)
        for name, values in found.items():
            row = np.full(n, np.nan)
            row[distance.cpu().numpy() - 1] = values
            measured[variant].setdefault(name, []).append(row)
        record = {"prompt_tokens": len(prompt.ids), **common,
                  "memory": variants[variant] is not None,
                  "positions": record_of(tokenizer, distance, p, args.topk, found)}
        if args.json:
            print(to_json(prompt.answered(record)), flush=True)
        elif len(prompts) == 1:
            print(variant + "\n" * bool(variant), end="")
            print_tokens(record)
    if args.json:
        print(to_json({
            "prompts": len(prompts), **common, "paper": ["top", *PAPER], "ours": list(OURS),
            "unigram": None if unigram is None else source,
            "by_distance": {
                variant or "memory off": {name: by_distance(r) for name, r in rows.items()}
                for variant, rows in measured.items()}}))
    else:
        print_summary(measured)
    if args.plot:
        plot(measured, args.plot)
    return int(len(prompts) < len(lines))


@command
def main(argv: list[str] | None = None) -> int | None:
    """Probe what the command line asks for, or show the trap."""
    args = parser().parse_args(argv)
    require(not (args.trap and (args.memory or args.plot)), "--trap trains a memory of its own and "
            f"has no plot: leave out {'--memory' if args.memory else '--plot'}")
    require(not args.trap or args.device in (None, "cpu"), f"--trap runs on the CPU, not on "
            f"{args.device!r}")
    return (trap if args.trap else measure)(args)


if __name__ == "__main__":
    sys.exit(main())
