"""The embedded default: reasoning tasks in text, a tokenizer for them, and the small LLaDA-format
model in checkpoints/tiny that everyone can run.

    python tiny.py pretrain                 # train checkpoints/tiny from nothing; resumes if killed
    python tiny.py pretrain --task haystack # checkpoints/haystack, from checkpoints/tiny
    python tiny.py show --task chain        # a few held-out prompts with their answers
    python tiny.py show --task track4-128   # four hops through a haystack of 128 tokens

A task is an object with `make(rng) -> (prompt, answer)` and `check(prompt, text) -> bool`. The
check judges the answer by the rules of the task, never by comparing strings. To add one, write a
class and give it a line in `TASKS`.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import string
import sys
from pathlib import Path
from typing import Protocol, Sequence

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, trainers

from model import (CHECKPOINTS, Backbone, Config, InputError, Parser, Tokenizer, command, load,
                   rotate, save, seed, write_atomic)
from sample import left_pad
from train import fit, move, processes, trapezoid


# ------------------------------------------------------------------ tasks
class Task(Protocol):
    """What a task has to offer. `make` draws one example from a `random.Random`; `check` says
    whether `text` is a right answer to `prompt`; `split_key` is the part of an example that must
    never be shared between training and held-out data."""

    def make(self, rng: random.Random) -> tuple[str, str]: ...
    def check(self, prompt: str, text: str) -> bool: ...
    def split_key(self, prompt: str, answer: str) -> str: ...


class Sudoku:
    """4x4 sudoku: rows, columns and 2x2 boxes hold 1 to 4 once each. Puzzles have one solution
    and 4 to 7 givens; the split is by solution grid, so held-out grids were never seen."""

    def __init__(self):
        rows = list(itertools.permutations("1234"))
        self.grids = [a + b + c + d for a in rows for b in rows if self._fits(a, b, box=True)
                      for c in rows if self._fits(a, c) and self._fits(b, c)
                      for d in rows if self._fits(a, d) and self._fits(b, d)
                      and self._fits(c, d, box=True)]            # all 288
        # having[i][c]: the grids that have character c in cell i, as the bits of one integer
        self.having = [{c: sum(1 << k for k, g in enumerate(self.grids) if g[i] == c)
                        for c in "1234"} for i in range(16)]

    @staticmethod
    def _fits(upper, lower, box=False) -> bool:
        if any(a == b for a, b in zip(upper, lower)):
            return False
        return not box or (not set(upper[:2]) & set(lower[:2]))

    def make(self, rng):
        grid, givens, target = rng.choice(self.grids), set(range(16)), rng.randint(4, 7)
        for cell in rng.sample(range(16), 16):
            fitting = -1                                         # all bits: every grid
            for i in givens - {cell}:
                fitting &= self.having[i][grid[i]]
            if fitting.bit_count() == 1 and len(givens) > target:
                givens.discard(cell)
        puzzle = "".join(grid[i] if i in givens else "." for i in range(16))
        return "sudoku\n" + self._lines(puzzle) + "\n", self._lines("".join(grid))

    @staticmethod
    def _lines(cells: str) -> str:
        return "\n".join(cells[i:i + 4] for i in range(0, 16, 4))

    def check(self, prompt, text):
        cells = "".join(text.split())
        givens = "".join(prompt.removeprefix("sudoku").split())
        return tuple(cells) in self.grids and all(g in (".", c) for g, c in zip(givens, cells))

    def split_key(self, prompt, answer):
        return answer


class Chain:
    """Six variables, each the one before plus 1 to 3, modulo 10; the assignments come in shuffled
    order. The answer gives every variable's value, in the order in which they can be worked out."""

    names = "abcdef"

    def __init__(self, size: int = 6):
        self.size = size

    def make(self, rng):
        order, value = rng.sample(self.names, self.size), rng.randrange(10)
        lines, answer = [f"{order[0]}={value}"], [f"{order[0]}={value}"]
        for before, name in zip(order, order[1:]):
            step = rng.randint(1, 3)
            value = (value + step) % 10
            lines.append(f"{name}={before}+{step}")
            answer.append(f"{name}={value}")
        rng.shuffle(lines)
        return "chain\n" + "\n".join(lines) + "\n", " ".join(answer)

    def check(self, prompt, text):
        lines = dict(line.split("=") for line in prompt.split()[1:])
        value = {}
        while len(value) < len(lines):
            for name, right in lines.items():
                if right.isdigit():
                    value[name] = int(right)
                elif right[0] in value and name not in value:
                    value[name] = (value[right[0]] + int(right[1:])) % 10
        return text.split() == [f"{name}={v}" for name, v in value.items()]

    def split_key(self, prompt, answer):
        return prompt


class Follow:
    """A permutation of eight letters as pairs "from>to", and a letter to start at. The answer is
    the path of eight letters that begins there; where a cycle closes, it goes round again."""

    names = "abcdefgh"

    def __init__(self, size: int = 8):
        self.size = size

    def make(self, rng):
        names = rng.sample(self.names, self.size)
        target = dict(zip(names, rng.sample(names, self.size)))
        start = rng.choice(names)
        pairs = [f"{a}>{b}" for a, b in target.items()]
        rng.shuffle(pairs)
        return f"follow {start}\n" + " ".join(pairs) + "\n", self._path(target, start)

    def _path(self, target: dict[str, str], start: str) -> str:
        path = [start]
        while len(path) < len(target):
            path.append(target[path[-1]])
        return ">".join(path)

    def check(self, prompt, text):
        _, start, *pairs = prompt.split()
        return "".join(text.split()) == self._path(dict(p.split(">") for p in pairs), start)

    def split_key(self, prompt, answer):
        return prompt


class Sums:
    """Twelve digits, from the second on 1 to `most`; the answer has their running total modulo
    10."""

    def __init__(self, most: int = 9):
        self.most = most

    def make(self, rng):
        numbers = [rng.randrange(10), *(rng.randint(1, self.most) for _ in range(11))]
        return f"sums\n{self._row(numbers)}\n", self._row(itertools.accumulate(numbers))

    @staticmethod
    def _row(numbers) -> str:
        return " ".join(str(number % 10) for number in numbers)

    def check(self, prompt, text):
        numbers = map(int, prompt.split()[1:])
        return text.split() == self._row(itertools.accumulate(numbers)).split()

    def split_key(self, prompt, answer):
        return prompt


TASKS: dict[str, Task] = {"sudoku": Sudoku(), "chain": Chain(), "follow": Follow(),
                          "sums": Sums()}
# Easier examples for pretraining: what looks things up is learned there first, and much sooner than
# from the full size alone. Their share falls from all to none over the first CURRICULUM updates.
CURRICULUM = 5000
EASIER = {"chain": [Chain(size) for size in range(2, 6)],
          "follow": [Follow(size) for size in range(2, 8)]}
# What a task is in the first STAGE updates: small steps, as in chain. With large ones among them
# from the start (the share falling as above) chain was not learned in 12,000 updates.
STAGE = 8000
FIRST = {"sums": Sums(most=3)}


class Haystack:
    """`length` tokens of filler with eight assignments "K=v" scattered in it, and a query. Asked
    for needles, the answer is their values; asked to track, it follows one variable through as many
    assignments "c=b", "b=7" until a digit comes. Half of the assignments that nobody asks for name
    another one of them, so that a letter behind "=" gives nothing away.

    Assignments look as in `Chain`, filler is words of capitals, and the query has one width, so
    that each of the answer's tokens has its counterpart in it 16 before."""

    names, pairs, slots = "abcdefgh", 8, 4

    def __init__(self, length: int, needles: int, track: bool = False):
        if length < 4 * self.pairs:
            raise InputError(f"a haystack has at least {4 * self.pairs} tokens, not {length}")
        self.length, self.needles, self.track = length, needles, track

    def make(self, rng):
        names = rng.sample(self.names, self.pairs)
        asked, others = names[:self.needles], names[self.needles:]
        value = {name: str(rng.randrange(10)) for name in names}
        value |= {name: rng.choice([o for o in others if o != name]) for name in others
                  if rng.random() < 0.5}
        if self.track:
            value |= dict(zip(asked, asked[1:]))
        words, rest = divmod(self.length - 4 * self.pairs, 3)
        pieces = [f"{name}={value[name]} " for name in names]
        pieces += ["".join(rng.choices(string.ascii_uppercase, k=2)) + " " for _ in range(words)]
        rng.shuffle(pieces)
        query = " ".join(f"{name}=?" for name in (asked[:1] if self.track else asked))
        prompt = f"{''.join(pieces)}{'.' * rest}\n{query.ljust(4 * self.slots - 1)}\n"
        return prompt, " ".join(f"{name}={value[name]}" for name in asked)

    def check(self, prompt, text):
        hay, query = prompt.splitlines()
        value = dict(word.rstrip(".").split("=") for word in hay.split() if "=" in word)
        todo, right = [word[0] for word in query.split()], []
        while todo:
            name = todo.pop(0)
            right.append(f"{name}={value[name]}")
            if value[name] in value:
                todo.insert(0, value[name])
        return text.split() == right

    def split_key(self, prompt, answer):
        return prompt


# Not among TASKS: checkpoints/tiny knows nothing of them, checkpoints/haystack only these. Kind ->
# what is asked for; the length is in the name, and a haystack of any length can be made.
KINDS = {"needle1": (1,), "needle2": (2,), "needle4": (4,), "track2": (2, True),
         "track4": (4, True)}
LENGTHS = (64, 96, 128, 256)  # training is at 64
HAYSTACK: dict[str, Task] = {f"{kind}-{length}": Haystack(length, *asked)
                             for length in LENGTHS for kind, asked in KINDS.items()}
SHORT = (32, 40, 48)  # lengths that checkpoints/haystack is pretrained on


def find_task(name: str) -> Task:
    """The task of that name, from either list; an `InputError` names them."""
    task = TASKS.get(name) or HAYSTACK.get(name)
    if task is None:
        raise InputError(f"unknown task {name!r}: one of {', '.join([*TASKS, *HAYSTACK])}")
    return task


def is_held_out(task: Task, prompt: str, answer: str) -> bool:
    """One example in eight is held out, by a hash of the task's split key: training and held-out
    data are disjoint whatever seed they are drawn with."""
    key = getattr(task, "split_key", lambda p, a: p)(prompt, answer)
    return hashlib.sha256(key.encode()).digest()[0] < 32


def draw(task: Task, rng: random.Random, held_out: bool) -> tuple[str, str]:
    """One (prompt, answer) of the wanted side of the split."""
    while True:
        prompt, answer = task.make(rng)
        if is_held_out(task, prompt, answer) == held_out:
            return prompt, answer


# ------------------------------------------------------------------ the tiny model
GEN_LENGTH = 24  # the longest answer has 23 tokens; what is left over is EOS
CONFIG = {  # LLaDA's own format, small: 0.4 M parameters. rope_theta suits sequences of some 70
    # tokens better than 10000: sudoku was learned in about half as many updates with 100
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "block_type": "llama",
    "d_model": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 6, "mlp_hidden_size": 256,
    "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
    "rope_theta": 300.0, "rope_full_precision": True, "max_sequence_length": 256,
    "include_bias": False, "include_qkv_bias": True, "weight_tying": False,
    "torch_dtype": "float32"}
LONGER = {"max_sequence_length": 2048}  # of checkpoints/haystack
OFFSETS = (-2, 2, -4, 4)  # where the first layer's first heads look at the start; see look_nearby
VOCAB = 1000  # no tokenizer made here is larger; ours has 275 tokens
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE in which the tasks' names are one token each and everything else is one
    byte: any text can be encoded, and every digit is a token of its own."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[a-z]{3,}|[\s\S]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([f"{name} {name}" for name in TASKS], trainers.BpeTrainer(
        vocab_size=VOCAB, min_frequency=2, show_progress=False,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return Tokenizer(core)


def build_config(tokenizer: Tokenizer, **changes) -> dict:
    """The tiny model's config.json, with `changes`."""
    _, eos, mask = (tokenizer.vocab[s] for s in SPECIAL)
    return {**CONFIG, **changes, "vocab_size": len(tokenizer.vocab), "mask_token_id": mask,
            "eos_token_id": eos, "pad_token_id": eos}


def write_folder(backbone: Backbone, tokenizer: Tokenizer, folder: Path, **changes) -> None:
    """The whole checkpoint: config.json (with `changes`), generation_config.json, tokenizer.json
    and weights."""
    stated = {"bos_token_id": tokenizer.vocab[SPECIAL[0]], "eos_token_id": backbone.config.eos_id,
              "max_new_tokens": GEN_LENGTH}
    for name, fields in (("config.json", build_config(tokenizer, **changes)),
                         ("generation_config.json", stated)):
        text = json.dumps(fields, indent=2) + "\n"
        write_atomic(folder / name, lambda p: p.write_text(text, encoding="utf-8"))
    write_atomic(folder / "tokenizer.json", lambda p: tokenizer.core.save(str(p)))
    save(backbone, folder / "model.safetensors")


def batch(task: Task, tokenizer: Tokenizer, rng: random.Random, size: int, held_out: bool,
          eos_id: int, length: int = GEN_LENGTH):
    """`size` examples of one task as ids -> prompts (B, P), answers (B, length) with EOS behind,
    and (B, P) True where a prompt is padded on the left, or None where all are of one length, as
    the built-in tasks' are. Raises `InputError` for an answer longer than `length`."""
    pairs = [draw(task, rng, held_out) for _ in range(size)]
    prompts, pad_mask = left_pad([tokenizer.encode(p) for p, _ in pairs], eos_id, "cpu")
    answers = [tokenizer.encode(a) for _, a in pairs]
    if max(map(len, answers)) > length:
        raise InputError(f"the answer {max(pairs, key=lambda p: len(p[1]))[1]!r} is longer than "
                         f"{length} tokens")
    answers = torch.tensor([a + [eos_id] * (length - len(a)) for a in answers])
    return prompts, answers, pad_mask if bool(pad_mask.any()) else None


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


def llada_loss(backbone: Backbone, prompts: torch.Tensor, answers: torch.Tensor,
               pad_mask: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """LLaDA's own fine-tuning loss: t uniform, every answer token masked with probability
    p = (1 - 1e-3) t + 1e-3, cross-entropy over the masked ones weighted 1 / p and divided by the
    answer's length. EOS counts as answer; prompts (B, P) are never masked; answers (B, G);
    pad_mask (B, P) True where padded.

    Ours: the t of a batch are one uniform number plus a regular grid, modulo 1, which has the same
    distribution for each row and less variance for their mean."""
    B, G = answers.shape
    t = (torch.arange(B) / B + torch.rand(1, generator=generator)) % 1                   # (B,)
    p = ((1 - 1e-3) * t + 1e-3)[:, None].expand(B, G)                                    # (B, G)
    masked = torch.rand(B, G, generator=generator) < p
    noisy = answers.masked_fill(masked, backbone.config.mask_id)
    pads = None if pad_mask is None else F.pad(pad_mask, (0, G))
    h = backbone.hidden(backbone.embed(torch.cat([prompts, noisy], 1)), pads)[:, prompts.shape[1]:]
    loss = F.cross_entropy(backbone.logits(h[masked]), answers[masked], reduction="none")
    return (loss / p[masked]).sum() / (B * G)


def two_stages(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: a trapezoid over the first STAGE updates, another over what
    follows."""
    if step < STAGE:
        return trapezoid(step, STAGE, warmup)
    return trapezoid(step - STAGE, steps - STAGE, warmup)


def pretrain(args: argparse.Namespace) -> None:
    """Train the tiny model from nothing, or the one for haystacks from the tiny one, which can look
    things up (from nothing that was not learned in 3,000 updates), and write it to `args.out`."""
    hay, device = args.task == "haystack", torch.device(args.device)
    out = Path(args.out or CHECKPOINTS["haystack" if hay else "tiny"])
    steps = args.steps if args.steps is not None else 2000 if hay else 10500
    tokenizer, changes = build_tokenizer(), LONGER if hay else {}
    config = Config.from_dict(build_config(tokenizer, **changes))
    backbone = Backbone(config).initialise(torch.Generator().manual_seed(args.seed))
    if hay:
        backbone.load_state_dict(load(CHECKPOINTS["tiny"], "cpu")[0].state_dict())
    else:
        look_nearby(backbone, OFFSETS)
    backbone.to(device)
    tasks = TASKS if not hay else {kind: Haystack(SHORT[-1], *KINDS[kind]) for kind in KINDS}
    names = [*tasks, *(["text"] if hay else [])]

    def loss_fn(step: int, micro: int):  # one task per micro-batch: no padding
        name, generator = names[micro], torch.Generator()
        rng = random.Random(f"{args.seed} {step} {micro}")
        generator.manual_seed(rng.getrandbits(60))
        if hay:
            kind = rng.choice(list(KINDS)) if name == "text" else name
            task = Haystack(rng.choice(SHORT), *KINDS[kind])
        else:
            task = FIRST[name] if step < STAGE and name in FIRST else TASKS[name]
        if name in EASIER and rng.random() > step / CURRICULUM:
            task = rng.choice(EASIER[name])
        # a quarter of the steps has a longer tail of EOS, so that other lengths work too
        length = GEN_LENGTH if step % 4 else rng.randint(GEN_LENGTH, 2 * GEN_LENGTH)
        size = args.batch_size if name in EASIER else args.batch_size // 2  # these learn sooner
        data = batch(task, tokenizer, rng, size, False, config.eos_id, length)
        if name == "text":  # masks anywhere, as in LLaDA's own pretraining: nothing but answer
            text = torch.cat(data[:2], 1)
            data = text[:, :0], text, None
        loss = llada_loss(backbone, *move(data, device), generator)
        # our choice: most of a text is filler, which nobody can guess
        return loss * (0.1 if name == "text" else 1), {name: loss.item()}

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        figures = {}
        for name, task in tasks.items():
            data = batch(task, tokenizer, random.Random(0), 256, True, config.eos_id)
            generator = torch.Generator().manual_seed(0)
            loss = llada_loss(backbone, *move(data, device), generator)
            figures[f"held_out_{name}"] = loss.item()
        return figures

    fit(dict(backbone.named_parameters()), loss_fn, out / "pretraining", steps=steps,
        lr=args.lr, schedule=trapezoid if hay else two_stages, warmup=200, clip=0.25,
        micros=len(names), evaluate=evaluate,
        settings={"batch_size": args.batch_size, "lr": args.lr, "seed": args.seed,
                  **({"task": args.task} if hay else {})})
    if processes()[0] == 0:
        write_folder(backbone, tokenizer, out, **changes)
        print(f"wrote {out}, {config.parameters:,} parameters")


def show(args: argparse.Namespace) -> None:
    """Print held-out prompts with a right answer each."""
    task = find_task(args.task)
    rng = random.Random(args.seed)
    for _ in range(args.number):
        prompt, answer = draw(task, rng, held_out=True)
        print(prompt + answer + "\n")


@command
def main(argv: list[str] | None = None) -> int:
    """Pretrain or show, as the command line says; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="pretrain | show")
    p = commands.add_parser("pretrain", help="train the tiny model")
    p.set_defaults(run=pretrain)
    p.add_argument("--task", choices=("tiny", "haystack"), default="tiny",
                   help="the four tasks of checkpoints/tiny, or short haystacks")
    p.add_argument("--out", help="folder of the checkpoint (default: checkpoints/tiny, or "
                   "checkpoints/haystack)")
    p.add_argument("--steps", type=int, help=f"updates (default: 10500, the first {STAGE} of them "
                   "with easier sums; 2000 for haystacks)")
    p.add_argument("--batch-size", type=int, default=32, help="examples of each task per update")
    p.add_argument("--lr", type=float, default=6e-4, help="peak learning rate of AdamW")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p = commands.add_parser("show", help="print held-out examples")
    p.set_defaults(run=show)
    p.add_argument("--task", default="sudoku", help=", ".join([*TASKS, *HAYSTACK]))
    p.add_argument("--number", type=int, default=3)
    p.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
