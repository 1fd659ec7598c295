"""How a model of stories is pretrained, by `python -m studies.pretrain stories`: from nothing on
whole stories, then, from such weights on, on excerpts and contrasts beside them, and on stories
that it told itself."""
from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from functools import lru_cache, partial
from itertools import chain, starmap
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers

from lib.ahead import ahead
from lib.cli import device_of, require
from lib.data import Batch, move, task_batch
from lib.files import parse_json, read_lines, read_tensors, save_tensors
from lib.options import run_settings
from lib.published import config_fields
from lib.run import local_device, processes
from lib.terminal import note
from model import Backbone, Config, Tokenizer, load
from studies.small import (Graphed, Weighted, build_config, byte_level, examples, llada_loss,
                           look_nearby, trapezoids, write_folder)
from tasks import TASKS, draw, is_held_out
from tasks.sentences import FACTS
from tasks.stories import SENTENCE, Stories, read
from train import fit

# ------------------------------------------------------------------ what is learned
STORIES = {"d_model": 160, "n_heads": 5, "n_kv_heads": 5, "n_layers": 4, "mlp_hidden_size": 384,
           "rope_theta": 10000.0}
STORY_LENGTH = 160  # the longest continuation has some 140 tokens
POOL = 16  # batches of stories that are drawn together
AGAIN = 3  # times that they are learned from, with other masks: they are slow to make
BLOCK = 32  # tokens, of half of the examples: as sampling has them
# What a model of stories is taught one by one, so many updates each, when it goes on from another's
# weights: to say again where something was, see `excerpts`, and of two colours or names that differ
# which is which, see `contrast`. Of whole stories it had not learned the first of these in 14,281
# updates, nor the second in 1,240 more. Ours.
LESSONS = ("the park", "red", "Tom", "friend", "grandmother", "under the bench")
CONTRASTS = ("red", "Tom", "under the bench")
LESSON, CONTRAST = 60, 150
# Such a run writes the mean of its weights at every so many updates of its later half: so few
# examples make noisy ones. Where the rate stayed high a mean had 113 of 120 stories right, where it
# fell for a third of the run 99.
KEEP = 100
EVEN = 8000  # that it is to learn from of its own stories, see `evenly`


def story_tokenizer() -> Tokenizer:
    """A byte-level BPE learned from stories: nearly all their words are one token each."""
    task, rng = Stories(outside=0), random.Random(0)
    texts = ["".join(task.make(rng)) for _ in range(4000)]
    return byte_level(texts, 1024, pre_tokenizers.ByteLevel(add_prefix_space=False))


def story_batches(tokenizer: Tokenizer, size: int, seed: int, eos_id: int, device: torch.device,
                  told: list[tuple[str, str]] | None = None) -> Callable[[int], Batch]:
    """batch(step) of stories that are about as long, see `story_pool`, each of them AGAIN times.
    told: (beginning, rest) to choose from, in place of the grammar's."""
    pool = lru_cache(maxsize=1)(ahead(partial(story_pool, tokenizer, size, seed, eos_id, told),
                                      lambda index: index + 1, device))
    return lambda step: pool(step // (AGAIN * POOL))[step % POOL]


def evenly(told: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """EVEN of some stories, drawn so that all plots are as frequent and a thing, in a plot, as the
    root of its number: of what a model tells itself half has one plot, and it would tell no other
    if it learned from that.  # ours"""
    kinds = [(min(plot for plot, _ in story.places), story.facts.get("kite", ""))
             for story in starmap(read, told)]
    number, plots = Counter(kinds), Counter()
    weights = [number[kind] ** -0.5 for kind in kinds]
    for (plot, _), weight in zip(kinds, weights):
        plots[plot] += weight
    even = [weight / plots[plot] for (plot, _), weight in zip(kinds, weights)]
    return random.Random(0).choices(told, even, k=EVEN)


def told_right(files: list[str]) -> list[tuple[str, str]]:
    """(beginning, rest) of the stories that are right among answers of sample.py --prompts, less
    what is held out, EVEN of them drawn `evenly`. Raises `InputError` for lines that are none, and
    where no story is left."""
    told, task = [], TASKS["stories"]
    for where, line in chain.from_iterable(map(read_lines, files)):
        answer = parse_json(line, where)
        if "error" in answer:
            continue
        require(all(isinstance(answer.get(name), str) for name in ("prompt", "text")),
                f"{where}: no answer of sample.py --prompts, which has `prompt` and `text`")
        told.append((answer["prompt"], answer["text"]))
    right = [pair for pair in told if task.check(*pair) and not is_held_out(task, *pair)]
    require(bool(right), f"{', '.join(files)}: no story there is right")
    if processes()[0] == 0:
        note(f"{len(right)} of {len(told)} stories are right and not held out")
    return evenly(right)


def story_pool(tokenizer: Tokenizer, size: int, seed: int, eos_id: int,
               told: list[tuple[str, str]] | None, index: int) -> list[Batch]:
    """The batches of POOL steps, drawn together: each has a fourth of the beginnings and of the
    continuations by length. Both are filled up to multiples of 16 tokens, so that there are few
    shapes; every fourth batch has answers of STORY_LENGTH, as sampling begins with."""
    rng, batches = random.Random(f"{seed} {index}"), []
    pairs = rng.choices(told, k=POOL * size) if told else [
        draw("stories", rng, False) for _ in range(POOL * size)]
    pairs.sort(key=lambda pair: len(pair[0]))
    for i in range(0, len(pairs), 4 * size):
        fourth = sorted(pairs[i:i + 4 * size], key=lambda pair: len(pair[1]))
        batches += [fourth[k:k + size] for k in range(0, 4 * size, size)]
    filled = []
    for i, part in enumerate(rng.sample(batches, POOL)):
        prompts, answers, pad = task_batch(part, tokenizer, eos_id, STORY_LENGTH)
        pad = torch.zeros_like(prompts, dtype=torch.bool) if pad is None else pad
        more = -prompts.shape[1] % 16
        length = int((answers != eos_id).sum(1).max()) + 1  # with an EOS
        filled.append((F.pad(prompts, (more, 0), value=eos_id),
                       answers[:, :STORY_LENGTH if i % 4 == 0 else length + -length % 16],
                       F.pad(pad, (more, 0), value=True)))
    return filled


def lesson(step: int, rng: random.Random, first: bool) -> tuple[str, str]:
    """What update `step` teaches beside stories: to look up one of "few" words or of "all", or a
    "contrast", and about which thing; one after the other at `first`, else in turns."""
    alone = [*(("few", about) for about in LESSONS for _ in range(LESSON)),
             *(("contrast", about) for about in CONTRASTS for _ in range(CONTRAST))]
    if first and step < len(alone):
        return alone[step]
    return ("contrast", rng.choice(CONTRASTS)) if step % 2 else ("all", rng.choice(LESSONS))


def excerpts(tokenizer: Tokenizer, rng: random.Random, size: int, about: str, eos_id: int,
             few: int = 0, least: int = 1) -> tuple[Batch, torch.Tensor]:
    """What `size` stories say about one thing, with few words for it (all if 0): their sentences
    that name one, the first as the prompt; and the tokens with which the words end. least: only
    of stories with so many words for it."""
    words, pairs = FACTS[about][1], []
    named, task = re.compile(rf"\b({'|'.join(words)})\b"), Stories(outside=0, few=few)
    while len(pairs) < size:
        told = SENTENCE.split("".join(draw(task, rng, False)).strip())
        first, *rest = [*filter(named.search, told)] or [""]
        if rest and len({*named.findall(" ".join([first, *rest]))}) >= least:
            pairs.append((first, " " + " ".join(rest)))
    prompts, answers, pad = task_batch(pairs, tokenizer, eos_id, STORY_LENGTH)
    ends = torch.tensor([tokenizer.encode(" " + word)[-1] for word in words])
    return (prompts, answers[:, :int((answers != eos_id).sum(1).max()) + 1], pad), ends


# ------------------------------------------------------------------ pretraining
def contrast(backbone: Backbone, prompts: torch.Tensor, answers: torch.Tensor,
             pad_mask: torch.Tensor | None, ends: torch.Tensor,
             generator: torch.Generator) -> torch.Tensor:
    """The loss that teaches two words to differ, such as the colours of two drums: of excerpts
    (B, P) and (B, G) with two words for a thing, which end in `ends` (W,). In every second row the
    second word is hidden: masked wherever it is, so that all one can know is that it is not the
    first. Other mentions are masked with a probability p, uniform for a row.  # ours

    A masked mention's loss is the cross-entropy with what can be known, the word, or evenly all
    that a hidden one may be, and softplus(z_wrong - z_right) in their logits: wrong is the other of
    the two, right the word, or the mean of all that it may be; then the mean of a row and of rows.
    An example of a hidden word says what it is, which nobody can know, and hardly what it must not
    be, one of ten or 24: in 1,600 updates that was not learned. The mean of all examples says it
    without noise, and one against the rest loudly: now in a hundred."""
    said = torch.isin(answers, ends)                                                 # (B, G)
    behind = torch.isin(prompts, ends) * torch.arange(1, prompts.shape[1] + 1)
    first = prompts.gather(1, behind.argmax(1, keepdim=True))                        # (B, 1)
    at = (said & (answers != first)).byte().argmax(1, keepdim=True)
    second = answers.gather(1, at)                                                   # (B, 1)
    hidden = (answers == second) & (torch.arange(len(answers)) % 2 == 0)[:, None]
    p, noise = (torch.rand(len(answers), n, generator=generator) for n in (1, answers.shape[1]))
    masked = hidden | said & (noise < p)
    known = torch.where(hidden, first, answers)                                      # (B, G)
    other = torch.where(answers == first, second, first)
    right, wrong = (ends == words[masked][:, None] for words in (known, other))      # (n, W) each
    unknown = hidden[masked][:, None]
    right = torch.where(unknown, ~right / (len(ends) - 1), right)
    weights = (masked / masked.sum(1, keepdim=True).clamp(min=1) / len(answers))[masked]
    noisy = answers.masked_fill(masked, backbone.config.mask_id)
    pads = None if pad_mask is None else F.pad(pad_mask, (0, answers.shape[1]))
    prompts, noisy, pads, masked, right, wrong, weights, ends = move(
        (prompts, noisy, pads, masked, right, wrong, weights, ends),
        backbone.embedding.weight.device)
    h = backbone.hidden(backbone.embed(torch.cat([prompts, noisy], 1)), pads)
    logits = backbone.logits(h[:, prompts.shape[1]:][masked])                        # (n, V)
    z = logits[:, ends]                                                              # (n, W)
    odds = (z * wrong).sum(-1) - (z + right.log()).logsumexp(-1)
    losses = logits.logsumexp(-1) - (z * right).sum(-1) + F.softplus(odds)
    return losses @ weights


@torch.no_grad()
def set_mean(backbone: Backbone, weights: list[dict[str, torch.Tensor]]) -> None:
    """Make the backbone's weights the mean of several."""
    for name, p in backbone.named_parameters():
        p.copy_(torch.stack([x[name].to(p.device) for x in weights]).mean(0))


def pretrain_stories(args: argparse.Namespace) -> None:
    """Train the model that writes stories from nothing, or from the mean of the weights in
    `args.begun` on, and write it to `args.out`."""
    device, tokenizer = device_of(local_device(args.device)), story_tokenizer()
    args.micros = 2 if args.begun else 1
    config = Config(**config_fields(build_config(tokenizer, **STORIES)))
    backbone = Backbone(config).initialise(torch.Generator().manual_seed(args.seed))
    look_nearby(backbone, (-1, 1))
    # ours: as long as what the blocks add. At a length of 1 no later layer sees which word it was:
    # after 1,000 updates the model knew where a name has to stand, and wrote any
    backbone.embedding.weight.data *= config.dim ** 0.5
    if args.begun:
        set_mean(backbone, [dict(load(name, "cpu", torch.float32)[0].named_parameters())
                            for name in args.begun])
    backbone.to(device)
    batch = story_batches(tokenizer, args.batch_size, args.seed, config.eos_id, device)
    own = args.own and story_batches(tokenizer, args.batch_size, args.seed, config.eos_id, device,
                                     told_right(args.own))
    loss = Graphed(backbone) if device.type == "cuda" else None
    out, kept = Path(args.out), Path(args.out) / "pretraining" / "weights"

    def loss_fn(step: int, micro: int):
        rng = random.Random(f"{args.seed} {step}" + f" {micro}" * (micro > 0))
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        if args.begun and micro == 0:
            if step % KEEP == 0 and step >= args.steps / 2:
                save_tensors(kept / f"{step}.safetensors", backbone.state_dict(),
                             {"step": step, "steps": args.steps})
        if args.begun and micro == 0 and not (own and step % 2):
            kind, about = lesson(step // 2 if own else step, rng, args.lessons)
            few, least = 2 * (kind == "few"), 1 + (kind == "contrast")
            data, ends = excerpts(tokenizer, rng, args.batch_size * (3 - least), about,
                                  config.eos_id, few, least)
            if kind == "contrast":
                return contrast(backbone, *data, ends, generator), {}
            return llada_loss(backbone, *data, generator, among=torch.isin(data[1], ends),
                              least=float(few > 0)), {}
        if own and micro == 0:  # in odd steps, as large a part as the lessons': ours
            return llada_loss(backbone, *batch(step // 2), generator, block=BLOCK), {}
        return llada_loss(backbone, *(own or batch)(step), generator, loss, block=BLOCK), {}

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        data = examples(TASKS["stories"], tokenizer, random.Random(0), 64, True, config.eos_id,
                        STORY_LENGTH)
        generator = torch.Generator().manual_seed(0)
        return {"held_out": llada_loss(backbone, *data, generator).item()}

    fit(dict(backbone.named_parameters()), loss_fn, out / "pretraining", steps=args.steps,
        lr=args.lr, schedule=partial(trapezoids, fall=0.1 if args.begun else 1 / 3),
        warmup=30 if args.begun else 200, micros=args.micros, evaluate=evaluate,
        settings=run_settings(args, backbone, tokenizer, lambda step, micro: (own or batch)(step),
                              Backbone, Weighted, lesson, contrast, excerpts))
    if processes()[0] == 0:
        later = [read_tensors(file)[0] for file in sorted(kept.glob("*.safetensors"))
                 if args.steps / 2 <= int(file.stem) < args.steps]
        set_mean(backbone, [dict(backbone.named_parameters()), *later])
        write_folder(backbone, tokenizer, out, ["stories"], STORY_LENGTH, **STORIES)
        print(f"wrote {out}, {config.parameters:,} parameters")
