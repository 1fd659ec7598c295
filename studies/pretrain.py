"""How checkpoints/tiny, haystack, halves, sudoku6, countdown and stories were made: a tokenizer, a
LLaDA of 0.4 or 0.5 M parameters, for stories of 1.5 M, and its pretraining on tasks.

    python -m studies.pretrain tiny --out out/tiny            # from nothing, 45 min on two cores
    python -m studies.pretrain haystack --out out/haystack    # from checkpoints/tiny, 10 min on one
    python -m studies.pretrain halves --out out/halves        # from checkpoints/tiny, 8 min on one
    python -m studies.pretrain sudoku6 --out out/sudoku6      # from checkpoints/tiny, 40 min on one
    python -m studies.pretrain countdown --out out/countdown  # from checkpoints/tiny, 55 min on one
    python -m studies.pretrain stories --out out/stories      # from nothing, 4 min on a GPU
    python -m studies.pretrain stories --from out/stories --lessons --out out/taught  # docs/data.md
    python -m studies.pretrain show chain                     # held-out prompts with their answers
    python -m studies.pretrain show track4-128 --number 1     # four hops through 128 tokens

A run that was killed goes on where it stood. torchrun shares the work: one process per task, at
most.
"""
from __future__ import annotations

import argparse
import json
import random
import re
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, trainers

from lib.ahead import ahead
from lib.cli import Parser, command, count, device_of, named, one_of, seed, size
from lib.data import Batch, move, task_batch
from lib.files import read_tensors, save_tensors, write_text
from lib.options import rate, run_settings
from lib.outputs import output_folder
from lib.published import config_fields
from lib.run import local_device, processes
from model import Backbone, Config, Tokenizer, load, rotate, save
from tasks import TASKS, Task, draw
from tasks.depth import DEPTH, Countdown, Halves, Sudoku6
from tasks.haystack import KINDS, Haystack
from tasks.puzzles import Chain, Follow, Sums
from tasks.sentences import FACTS
from tasks.stories import SENTENCE, Stories
from train import fit

# ------------------------------------------------------------------ what is learned
PUZZLES = ("sudoku", "chain", "follow", "sums")  # the tasks of checkpoints/tiny
HAYSTACK_TASKS = tuple(f"{kind}-64" for kind in KINDS)  # those that checkpoints/haystack states
GEN_LENGTH = 24  # the longest answer has 23 tokens; what is left over is EOS
# Easier examples at first: what looks things up is learned there, and much sooner than from the
# full size alone. Their share falls from all to none over the first CURRICULUM updates.
CURRICULUM = 5000
EASIER = {"chain": [Chain(size) for size in range(2, 6)],
          "follow": [Follow(size) for size in range(2, 8)]}
# What a task is in the first STAGE updates: small steps, as in chain. With large ones among them
# from the start (the share falling as above) chain was not learned in 12,000 updates.
STAGE = 8000
FIRST = {"sums": Sums(most=3)}
SHORT = (32, 40, 48)  # tokens of the haystacks that checkpoints/haystack is pretrained on


def puzzle(name: str, step: int, rng: random.Random) -> Task:
    """What a micro-batch of update `step` draws for one of the puzzles."""
    task = FIRST[name] if step < STAGE and name in FIRST else TASKS[name]
    if name in EASIER and rng.random() > step / CURRICULUM:
        task = rng.choice(EASIER[name])
    return task


def short_haystack(name: str, step: int, rng: random.Random) -> Task:
    """What a micro-batch draws for a kind of haystack; "text" is any of them."""
    kind = rng.choice(list(KINDS)) if name == "text" else name
    return Haystack(rng.choice(SHORT), *KINDS[kind])


def named_halves(name: str, step: int, rng: random.Random) -> Task:
    """Halves in which nine stations in ten are named at first, as in `follow`, which the tiny model
    knows; from update 800 on as many as in the task."""
    return Halves(named=max(TASKS[name].named, 0.9 - step / 1230))


def given_sudoku(name: str, step: int, rng: random.Random) -> Task:
    """Sudokus of which up to 30 of the 36 cells are given; the task's own are one in five at first
    and all from update 3000 on."""
    return TASKS[name] if rng.random() < max(0.2, step / 3000) else Sudoku6(least=(10, 30))


def fewer_numbers(name: str, step: int, rng: random.Random) -> Task:
    """Countdowns of two, three or four numbers; of four alone from update 8000 on."""
    return TASKS[name] if rng.random() < max(0.4, step / 8000) else Countdown(rng.randint(2, 3))


# ------------------------------------------------------------------ the tiny model
CONFIG = {  # LLaDA's own format, small: 0.4 M parameters. rope_theta suits sequences of some 70
    # tokens better than 10000: sudoku was learned in about half as many updates with 100
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "block_type": "llama",
    "d_model": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 6, "mlp_hidden_size": 256,
    "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
    "rope_theta": 300.0, "rope_full_precision": True, "max_sequence_length": 256,
    "include_bias": False, "include_qkv_bias": True, "weight_tying": False,
    "torch_dtype": "float32"}
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
# examples make noisy ones. The mean of two that had 97 and 96 of 120 stories right had 105.
KEEP = 100
OFFSETS = (-2, 2, -4, 4)  # where the first layer's first heads look at the start; see look_nearby
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")


class Course(NamedTuple):
    """What a model of puzzles learns: each task is a micro-batch."""
    tasks: dict[str, Task]              # of the held-out loss
    drawn: Callable[..., Task]          # (name, step, rng) -> what a micro-batch draws
    length: int = GEN_LENGTH            # of an answer
    changes: dict = {}                  # in CONFIG


COURSES = {
    "tiny": Course({name: TASKS[name] for name in PUZZLES}, puzzle),
    "haystack": Course({kind: Haystack(SHORT[-1], *KINDS[kind]) for kind in KINDS}, short_haystack,
                       changes={"max_sequence_length": 2048}),
    "halves": Course({"halves": TASKS["halves"]}, named_halves, 16),
    "sudoku6": Course({"sudoku6": TASKS["sudoku6"]}, given_sudoku, 42, {"n_layers": 4}),
    "countdown": Course({"countdown": TASKS["countdown"]}, fewer_numbers, 12, {"n_layers": 4})}


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE in which the puzzles' names are one token each and everything else is one
    byte: any text can be encoded, and every digit is a token of its own."""
    # 275 is where the merges end
    return byte_level([f"{name} {name}" for name in PUZZLES], 1000, pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[a-z]{3,}|[\s\S]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


def story_tokenizer() -> Tokenizer:
    """A byte-level BPE learned from stories: nearly all their words are one token each."""
    task, rng = Stories(outside=0), random.Random(0)
    texts = ["".join(task.make(rng)) for _ in range(4000)]
    return byte_level(texts, 1024, pre_tokenizers.ByteLevel(add_prefix_space=False))


def byte_level(texts: list[str], size: int, split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens, learned from texts."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, show_progress=False,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return Tokenizer(core)


def build_config(tokenizer: Tokenizer, **changes) -> dict:
    """The tiny model's config.json, with `changes`."""
    _, eos, mask = (tokenizer.vocab[s] for s in SPECIAL)
    return {**CONFIG, **changes, "vocab_size": len(tokenizer.vocab), "mask_token_id": mask,
            "eos_token_id": eos, "pad_token_id": eos}


def write_folder(backbone: Backbone, tokenizer: Tokenizer, folder: Path,
                 tasks: Iterable[str] = PUZZLES, length: int = GEN_LENGTH, **changes) -> None:
    """The whole checkpoint: config.json (with `changes`), generation_config.json, which names the
    `tasks` it was trained on and their answers' `length`, tokenizer.json and weights."""
    stated = {"bos_token_id": tokenizer.vocab[SPECIAL[0]], "eos_token_id": backbone.config.eos_id,
              "max_new_tokens": length, "tasks": list(tasks)}
    for name, fields in (("config.json", build_config(tokenizer, **changes)),
                         ("generation_config.json", stated)):
        write_text(folder / name, json.dumps(fields, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer.core.to_str(pretty=True))
    save(backbone, folder / "model.safetensors")


def look_nearby(backbone: Backbone, offsets: Sequence[int], sharpness: float = 20.0) -> None:
    """Start the first layer's head i as one that attends to the token `offsets[i]` positions away,
    whatever stands there; heads left over start as usual. Needs q/k/v biases.

    The bias c of the keys is turned by RoPE to R(n) c at position n, so with R(offset) c as the
    bias of the queries, R(m + offset) c at position m, the score is a sum of cosines of
    n - m - offset times RoPE's frequencies. c has `sharpness` of squared length at each of the
    five highest, and the heads' weights start at a tenth: the bias decides.

    Ours. Without it, look-ups (find the token behind another "a") are hardly learned at this size:
    the second layer has nothing to match before the first has found such heads by itself."""
    c = backbone.config
    d, hd = c.dim, c.head_dim
    amplitude = torch.zeros(hd // 2)
    amplitude[:5] = (sharpness / 2) ** 0.5
    key = amplitude.repeat(2)
    weight, bias = backbone.blocks[0].qkv.weight.data, backbone.blocks[0].qkv.bias.data
    for i, offset in enumerate(offsets):
        angle = offset * c.rope_theta ** (-torch.arange(0, hd, 2) / hd)
        q, k = slice(i * hd, (i + 1) * hd), slice(d + i * hd, d + (i + 1) * hd)
        bias[k] = key
        bias[q] = rotate(key.view(1, 1, 1, hd), angle.cos()[None], angle.sin()[None]).view(hd)
        weight[q] *= 0.1
        weight[k] *= 0.1


# ------------------------------------------------------------------ pretraining
def trapezoids(step: int, steps: int, warmup: int, stage: int = 0, fall: float = 0.1) -> float:
    """Share of the peak learning rate: linear warm-up, flat, then linear to 0 over the last tenth
    (`fall`), once for the first `stage` updates and once for what follows. Until a fall begins a
    run does not depend on its length: it can be made longer or shorter."""
    step, steps = (step, stage) if step < stage else (step - stage, steps - stage)
    return min((step + 1) / warmup, 1.0, (steps - step) / (fall * steps))


def noised(answers: torch.Tensor, mask_id: int, generator: torch.Generator, block: int = 0,
           among: torch.Tensor | None = None,
           least: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers (B, G) -> the same with masks, and each position's weight in LLaDA's own fine-tuning
    loss: t uniform, every answer token masked with probability p = (1 - 1e-3) t + 1e-3, its
    cross-entropy then weighted 1 / p and divided by the answer's length and the batch.

    Ours: the t of a batch are one uniform number plus a regular grid, modulo 1, which has the same
    distribution for each row and less variance for their mean. With `block`, every second row is
    what sampling meets in blocks of so many tokens: one of them, before which nothing is masked and
    behind which everything; its loss is the block's. among (B, G): nothing else is masked or
    counted. least: p is at least that."""
    B, G = answers.shape
    t = (torch.arange(B) / B + torch.rand(1, generator=generator)) % 1                   # (B,)
    p = ((1 - 1e-3) * t + 1e-3).clamp(min=least)[:, None].expand(B, G)                   # (B, G)
    masked = torch.rand(B, G, generator=generator) < p
    among = torch.ones(B, G, dtype=torch.bool) if among is None else among
    behind = torch.zeros(B, G, dtype=torch.bool)
    if block:
        at, second = torch.arange(G) // block, torch.arange(B)[:, None] % 2 == 0     # (G,), (B, 1)
        own = torch.randint(int(at[-1]) + 1, (B, 1), generator=generator)
        among, behind = among & ((at == own) | ~second), (at > own) & second
    weights = (masked & among) / p / (B * among.sum(1, keepdim=True).clamp(min=1))
    masked, weights = move((masked & among | behind, weights), answers.device)
    return answers.masked_fill(masked, mask_id), weights


class Weighted(torch.nn.Module):
    """The loss of `noised` answers behind prompts (B, P), which are never masked; EOS counts as
    answer; pad_mask (B, P) True where padded, or None."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, prompts, pad_mask, noisy, answers, weights):
        """The loss: noisy, answers and weights are (B, G) each."""
        pads = None if pad_mask is None else F.pad(pad_mask, (0, noisy.shape[1]))
        # on a GPU products are taken in bfloat16; a cache of the casts would outlive a CUDA graph
        with torch.autocast("cuda", torch.bfloat16, noisy.is_cuda, cache_enabled=False):
            h = self.backbone.hidden(self.backbone.embed(torch.cat([prompts, noisy], 1)), pads)
            logits = self.backbone.logits(h[:, prompts.shape[1]:]).flatten(0, 1)     # (B * G, V)
            losses = F.cross_entropy(logits, answers.flatten(), reduction="none")
        return losses @ weights.flatten()


def llada_loss(backbone: Backbone, prompts: torch.Tensor, answers: torch.Tensor,
               pad_mask: torch.Tensor | None, generator: torch.Generator,
               loss: Callable | None = None, **noise) -> torch.Tensor:
    """LLaDA's own fine-tuning loss, see `noised`, whose options `noise` are. loss: what computes it
    on the backbone's device, `Weighted` or its `Graphed`."""
    noisy, weights = noised(answers, backbone.config.mask_id, generator, **noise)
    data = move((prompts, pad_mask, noisy, answers, weights), backbone.embedding.weight.device)
    return (loss or Weighted(backbone))(*data)


class Graphed:
    """`Weighted`, forward and backward, as CUDA graphs: a pair for each shape of batch. Thousands
    of launches become two, which is what a small model's update spends its time with. Gradients
    stay where they are recorded: an update is one batch, for the next would overwrite them."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.losses, self.pool = backbone, {}, torch.cuda.graph_pool_handle()

    def __call__(self, *data: torch.Tensor) -> torch.Tensor:
        shape = data[0].shape, data[2].shape
        if shape not in self.losses:  # one of them runs at a time, and so they may share memory
            self.losses[shape] = torch.cuda.make_graphed_callables(
                Weighted(self.backbone), tuple(x.clone() for x in data), pool=self.pool)
        return self.losses[shape](*data)


def examples(task: Task, tokenizer: Tokenizer, rng: random.Random, size: int, held_out: bool,
             eos_id: int, length: int = GEN_LENGTH) -> Batch:
    """`size` examples of one side of a task's split, as `lib.data.task_batch` gives them."""
    pairs = [draw(task, rng, held_out) for _ in range(size)]
    return task_batch(pairs, tokenizer, eos_id, length)


def deepened(backbone: Backbone, smaller: Backbone) -> Backbone:
    """The backbone with a smaller one's weights; its layers besides add nothing at first."""
    backbone.load_state_dict(smaller.state_dict(), strict=False)
    for block in backbone.blocks[smaller.config.layers:]:
        block.out.weight.data.zero_()
        block.down.weight.data.zero_()
    return backbone


def pretrain(args: argparse.Namespace) -> None:
    """Train the tiny model from nothing, or another from the tiny one, which can look things up
    (from nothing that was not learned in 3,000 updates of haystacks), and write it to
    `args.out`."""
    tiny, hay = args.command == "tiny", args.command == "haystack"
    asked, drawn, usual, changes = COURSES[args.command]
    device, tokenizer = device_of(local_device(args.device)), build_tokenizer()
    config = Config(**config_fields(build_config(tokenizer, **changes)))
    backbone = Backbone(config).initialise(torch.Generator().manual_seed(args.seed))
    if tiny:
        look_nearby(backbone, OFFSETS)
    else:
        deepened(backbone, load("tiny", "cpu", torch.float32)[0])
    backbone.to(device)
    names = [*asked, "text"] if hay else [*asked]
    args.micros = len(names)

    def batch(step: int, micro: int) -> Batch:  # one task per micro-batch: no padding
        name, rng = names[micro], random.Random(f"{args.seed} {step} {micro}")
        rng.getrandbits(60)  # the masks'
        task = drawn(name, step, rng)
        # a quarter of the steps has a longer tail of EOS, so that other lengths work too
        length = usual if step % 4 else rng.randint(usual, 2 * usual)
        # the others learn sooner
        size = args.batch_size if name in (*EASIER, *DEPTH) else max(1, args.batch_size // 2)
        data = examples(task, tokenizer, rng, size, False, config.eos_id, length)
        if name == "text":  # masks anywhere, as in LLaDA's own pretraining: nothing but answer
            text = torch.cat(data[:2], 1)
            data = text[:, :0], text, None
        return data

    def loss_fn(step: int, micro: int):
        name, rng = names[micro], random.Random(f"{args.seed} {step} {micro}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        loss = llada_loss(backbone, *batch(step, micro), generator)
        # our choice: most of a text is filler, which nobody can guess
        return loss * (0.1 if name == "text" else 1), {name: loss.item()}

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        figures = {}
        for name, task in asked.items():
            data = examples(task, tokenizer, random.Random(0), 256, True, config.eos_id, usual)
            generator = torch.Generator().manual_seed(0)
            loss = llada_loss(backbone, *data, generator)
            figures[f"held_out_{name}"] = loss.item()
        return figures

    out = Path(args.out)
    fit(dict(backbone.named_parameters()), loss_fn, out / "pretraining", steps=args.steps,
        lr=args.lr, schedule=partial(trapezoids, stage=STAGE if tiny else 0), warmup=200, clip=0.25,
        micros=args.micros, evaluate=evaluate,
        settings=run_settings(args, backbone, tokenizer, batch, Backbone, llada_loss))
    if processes()[0] == 0:
        write_folder(backbone, tokenizer, out, HAYSTACK_TASKS if hay else names, usual, **changes)
        print(f"wrote {out}, {config.parameters:,} parameters")


def story_batches(tokenizer: Tokenizer, size: int, seed: int, eos_id: int,
                  device: torch.device) -> Callable[[int], Batch]:
    """batch(step) of stories that are about as long, see `story_pool`, each of them AGAIN times."""
    pool = lru_cache(maxsize=1)(ahead(partial(story_pool, tokenizer, size, seed, eos_id),
                                      lambda index: index + 1, device))
    return lambda step: pool(step // (AGAIN * POOL))[step % POOL]


def story_pool(tokenizer: Tokenizer, size: int, seed: int, eos_id: int, index: int) -> list[Batch]:
    """The batches of POOL steps, drawn together: each has a fourth of the beginnings and of the
    continuations by length. Both are filled up to multiples of 16 tokens, so that there are few
    shapes; every fourth batch has answers of STORY_LENGTH, as sampling begins with."""
    rng, batches = random.Random(f"{seed} {index}"), []
    pairs = sorted((draw("stories", rng, False) for _ in range(POOL * size)),
                   key=lambda pair: len(pair[0]))
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


def pretrain_stories(args: argparse.Namespace) -> None:
    """Train the model that writes stories from nothing, or from the weights in `args.begun` on, and
    write it to `args.out`."""
    device, tokenizer = device_of(local_device(args.device)), story_tokenizer()
    args.micros = 2 if args.begun else 1
    config = Config(**config_fields(build_config(tokenizer, **STORIES)))
    backbone = Backbone(config).initialise(torch.Generator().manual_seed(args.seed))
    look_nearby(backbone, (-1, 1))
    # ours: as long as what the blocks add. At a length of 1 no later layer sees which word it was:
    # after 1,000 updates the model knew where a name has to stand, and wrote any
    backbone.embedding.weight.data *= config.dim ** 0.5
    if args.begun:
        backbone.load_state_dict(load(args.begun, "cpu", torch.float32)[0].state_dict())
    backbone.to(device)
    batch = story_batches(tokenizer, args.batch_size, args.seed, config.eos_id, device)
    loss = Graphed(backbone) if device.type == "cuda" else None
    out, kept = Path(args.out), Path(args.out) / "pretraining" / "weights"

    def loss_fn(step: int, micro: int):
        rng = random.Random(f"{args.seed} {step}" + f" {micro}" * (micro > 0))
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        if args.begun and micro == 0:
            if step % KEEP == 0 and step >= args.steps / 2:
                save_tensors(kept / f"{step}.safetensors", backbone.state_dict(),
                             {"step": step, "steps": args.steps})
            kind, about = lesson(step, rng, args.lessons)
            few, least = 2 * (kind == "few"), 1 + (kind == "contrast")
            data, ends = excerpts(tokenizer, rng, args.batch_size * (3 - least), about,
                                  config.eos_id, few, least)
            if kind == "contrast":
                return contrast(backbone, *data, ends, generator), {}
            return llada_loss(backbone, *data, generator, among=torch.isin(data[1], ends),
                              least=float(few > 0)), {}
        data = batch(step * args.micros + micro)
        return llada_loss(backbone, *data, generator, loss, block=BLOCK), {}

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        data = examples(TASKS["stories"], tokenizer, random.Random(0), 64, True, config.eos_id,
                        STORY_LENGTH)
        generator = torch.Generator().manual_seed(0)
        return {"held_out": llada_loss(backbone, *data, generator).item()}

    fit(dict(backbone.named_parameters()), loss_fn, out / "pretraining", steps=args.steps,
        lr=args.lr, schedule=partial(trapezoids, fall=1 / 3), warmup=30 if args.begun else 200,
        micros=args.micros, evaluate=evaluate,
        settings=run_settings(args, backbone, tokenizer, lambda step, micro: batch(step), Backbone,
                              llada_loss))
    if processes()[0] == 0:
        later = [read_tensors(file)[0] for file in sorted(kept.glob("*.safetensors"))
                 if int(file.stem) >= args.steps / 2]
        for name, p in backbone.named_parameters():
            p.data = torch.stack([p.data, *(x[name].to(p.device) for x in later)]).mean(0)
        write_folder(backbone, tokenizer, out, ["stories"], STORY_LENGTH, **STORIES)
        print(f"wrote {out}, {config.parameters:,} parameters")


def show(args: argparse.Namespace) -> None:
    """Print held-out prompts with a right answer each."""
    rng = random.Random(args.seed)
    for _ in range(args.number):
        prompt, answer = draw(args.task, rng, held_out=True)
        print(prompt + answer + "\n")


# ------------------------------------------------------------------ command line
def training_options(p: argparse.ArgumentParser, steps: int, batch: int, lr: float,
                     of: str = "") -> None:
    """What every pretraining's command takes, with its defaults; of: which examples a batch has."""
    p.add_argument("--out", type=output_folder, required=True, help="folder of the checkpoint it "
                   "writes; resumes if killed")
    p.add_argument("--steps", type=count, default=steps, help=f"updates (default: {steps})")
    p.add_argument("--batch-size", type=size, default=batch,
                   help=f"examples per micro-batch{of} (default: {batch})")
    p.add_argument("--lr", type=rate, default=lr, help=f"peak of AdamW (default: {lr:g})")
    p.add_argument("--seed", type=seed, default=0, help="of data and fresh weights")
    p.add_argument("--device", type=named, help="cuda, cpu, ... (default: cuda where there is one)")


def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True,
                               metavar=" | ".join([*COURSES, "stories", "show"]))
    for name, run, steps, batch, lr, what in (
            ("tiny", pretrain, 10_500, 32, 6e-4,
             f"four puzzles; easier sums in the first {STAGE} updates"),
            ("haystack", pretrain, 2000, 32, 6e-4, "short haystacks, from checkpoints/tiny on"),
            ("halves", pretrain, 2000, 48, 1e-3, "half-said paths, from checkpoints/tiny on"),
            ("sudoku6", pretrain, 6000, 32, 1e-3, "6x6 sudokus, from checkpoints/tiny on"),
            ("countdown", pretrain, 15_000, 64, 1e-3, "countdowns, from checkpoints/tiny on"),
            ("stories", pretrain_stories, 12_163, 192, 3e-3, "little stories")):
        q = commands.add_parser(name, help=what)
        q.set_defaults(run=run)
        training_options(q, steps, batch, lr, "" if name in (*DEPTH, "stories") else
                         ", of chain and follow; of the others half as many")
        if name == "stories":
            q.add_argument("--from", dest="begun", metavar="CKPT", help="go on from its "
                           "weights, with excerpts beside stories, and write a mean of weights")
            q.add_argument("--lessons", action="store_true", help="with --from: lessons at first")
    q = commands.add_parser("show", help="print held-out examples")
    q.set_defaults(run=show)
    q.add_argument("task", type=one_of(TASKS, "task"), metavar="TASK", help=", ".join(TASKS))
    q.add_argument("--number", type=size, default=3, help="how many (default: 3)")
    q.add_argument("--seed", type=seed, default=0, help="picks them")
    return p


@command
def main(argv: list[str] | None = None) -> None:
    """Pretrain or show, as the command line says."""
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
