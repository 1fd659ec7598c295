"""The options of the commands, said the same way wherever they are taken."""
from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Callable, Iterable

from lib import identity
from lib.answers import HOLDS
from lib.asked import usual_model
from lib.checks import block_of, check_blocks
from lib.cli import (DTYPES, Parser, count, listed, named, number, one_of, require, seed, size,
                     spelled, whole, written)
from lib.conversations import data_file
from lib.data import check_source
from lib.hub import is_dream
from lib.memories import USUAL, memory_class
from lib.outputs import input_stream, output_file, output_folder, tensors_file
from lib.prompts import masks_in

rate = number(0, 100, open_low=True)  # of learning
LEGEND = ("held_out: loss on held-out examples, at step 0 without a memory; loss: of the step; "
          "dense_k: cross-entropy of what is masked at step k of the first K")


def with_text(text: str) -> str:
    """The type of the name of a checkpoint that can be expected to have a tokenizer."""
    if text.startswith("random:"):
        raise argparse.ArgumentTypeError(f"{text!r} has no tokenizer, so a text can neither be "
                                         "read nor written; it is for bench.py speed")
    return text


def add_model_options(parser, ckpt: str | None = "tiny", compiled: bool = True,
                      kind: Callable = str, usual: str = "") -> None:
    """--ckpt, of a kind, --device, --dtype and --compile, said the same way by every command.
    usual: what a default of None means in words; without it --ckpt is required."""
    usual = usual or ckpt
    parser.add_argument("--ckpt", type=kind, default=ckpt, required=not usual, help="nickname, "
                        "folder or hub id" + (f" (default: {usual})" if usual else ""))
    parser.add_argument("--device", type=named, help="cuda, cpu, ... (default: cuda where there "
                        "is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the backbone (default: bfloat16 on "
                        "CUDA, float16 where it has none, else as stored)")
    if compiled:
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch."
                            "compile: some seconds at first, faster then (default: on CUDA)")


def add_decoding_options(parser, orders: Iterable[str]) -> None:
    """How `generate` decodes; see its docstring."""
    how = parser.add_argument_group("how to decode")
    how.add_argument("--gen-length", "--max-new-tokens", type=whole(0), help="positions to write "
                     "(default: 0 for a --prompt with masks, else the checkpoint's max_new_tokens, "
                     "else 128)")
    how.add_argument("--block-length", type=count, help="default: 32, or all if 32 divides not or "
                     "for Dream without a cache")
    how.add_argument("--steps", type=count, help="denoising steps (default: one token per step)")
    how.add_argument("--order", choices=list(orders), help="default: low_confidence, and entropy "
                     "for Dream")
    how.add_argument("--threshold", type=number(0, 1e3), help="commit all that is at least so "
                     "probable")
    how.add_argument("--cache", choices=("prefix", "dual"), help="Fast-dLLM's approximate caches")
    how.add_argument("--refresh", type=count, help="with --cache: all anew every so many steps")
    how.add_argument("--temperature", type=number(0, 1e3), help="default: 0, and 0.2 for Dream")
    how.add_argument("--top-p", type=number(0, 1, open_low=True), help="default: off, and 0.95 for "
                     "Dream")
    how.add_argument("--top-k", type=whole(0))
    how.add_argument("--alg-temp", type=number(0, 1e3), default=0.0, help="draw positions too "
                     "(Dream)")
    how.add_argument("--cfg-scale", type=number(0, 1e3), default=0.0, help="classifier-free "
                     "guidance")
    how.add_argument("--hold-eos", choices=HOLDS, default="no", help="EOS committed last, or "
                     "never, as LLaDA's options do (docs/real-models.md)")
    how.add_argument("--no-early-stop", action="store_true", help="decode what follows EOS too")


def decoding(args: argparse.Namespace, length: int) -> dict:
    """The options of `generate` that the command line gives, for a checkpoint that states the
    length of its answers."""
    holes = masks_in(args.prompt or "")  # filled in place of an answer, unless both are asked for
    length = args.gen_length if args.gen_length is not None else 0 if holes else length
    options = {name: getattr(args, name) for name in (
        "order", "threshold", "cache", "refresh", "temperature", "top_p", "top_k", "alg_temp",
        "cfg_scale")}
    block = block_of(length)
    if is_dream(args.ckpt) and args.threshold is None:  # as its README asks for an answer
        usual = {"order": "entropy", "temperature": 0.2, "top_p": 0.95}
        options |= {name: value for name, value in usual.items() if options[name] is None}
        block = block if args.cache else length
    options |= {"temperature": options["temperature"] or 0.0, "gen_length": length,
                "steps": args.steps or length or holes or 128,
                "block_length": args.block_length or block or 32,
                "stop_at_eos": not args.no_early_stop}
    check_blocks(length, options["block_length"], options["steps"])
    return options


def check_sampling(args: argparse.Namespace) -> None:
    """Choose a model where none is named; refuse options of sample.py that do not go together."""
    if args.ckpt is None:
        args.ckpt = usual_model(args.prompt, args.task, args.memory)
    once = args.chat or args.prompts is not None or args.prompt is not None and not args.temperature
    require(args.number == 1 or not once, "--number is for a task or a --prompt with --temperature")
    require(not args.compare or args.memory, "--compare needs a --memory to compare with")
    require(args.system is None or args.chat or args.prompt and not args.raw,
            "--system is for --chat, or for a --prompt in a chat format")
    require(not args.compare or not args.chat, "--compare shows one prompt twice: leave it out "
            "with --chat")
    require(not args.raw or not args.chat, "--raw passes texts as they are: leave it out with "
            "--chat")
    require(args.out is None or args.prompts is not None, "--out is for the answers of --prompts")
    require(args.out is None or os.path.realpath(args.out) != os.path.realpath(args.prompts),
            "--out is the file of --prompts: pass another")
    require(not args.show_memory or args.memory, "--show-memory needs a --memory to show")
    require(not args.compare or args.prompts is None, "--compare shows one prompt twice: leave it "
            "out with --prompts")


def check_training(args: argparse.Namespace) -> None:
    """Refuse options of train.py that do not go together."""
    memory_class(args.memory)
    shaped = [f"--{name}" for name in ("slots", "width") if getattr(args, name) is not None]
    shaped += ["--no-time"] * args.no_time + ["--no-local"] * args.no_local
    shaped += ["--memory"] * (args.memory != USUAL)
    require(not args.init or not shaped, f"--init brings its class and sizes along: leave out "
            f"{', '.join(shaped)}")
    require(args.data is not None or not args.ckpt.startswith("random:"),
            f"{args.ckpt} names no tasks: pass --data FILE, whose bytes will be its tokens")


def sampling_parser(doc: str, orders: Iterable[str], tasks: Iterable[str]) -> Parser:
    """What sample.py takes."""
    p = Parser(description=doc)
    p.checks.append(check_sampling)
    what = p.add_argument_group("what to answer (by default a task that the checkpoint names)")
    what = what.add_mutually_exclusive_group()
    what.add_argument("--prompt", type=written, help="a text; a user's message where the model has "
                      "a chat format; <mask> and <mask:3> in it are filled")
    what.add_argument("--prompts", type=input_stream, metavar="FILE", help="one prompt a line, "
                      "text or JSON with `prompt` or `messages`; prints one JSON result a line")
    what.add_argument("--chat", action="store_true", help="a conversation: a line is a turn, "
                      "/reset forgets, /quit ends")
    what.add_argument("--task", type=one_of(tasks, "task"), help="a held-out prompt of this task")
    p.add_argument("--system", type=written, metavar="TEXT", help="what a chat model is told first")
    p.add_argument("--raw", action="store_true", help="the text as it is, without chat format")
    add_model_options(p, None, kind=with_text, usual="stories for a --prompt, else the "
                      "one that knows the task, or tiny")
    p.add_argument("--memory", type=tensors_file, metavar="FILE",
                   help="a MetaState memory trained for it")
    p.add_argument("--compare", action="store_true", help="without the memory, then with it")
    p.add_argument("--stop", action="append", default=[], type=spelled, metavar="TEXT",
                   help="where an answer ends besides at EOS; may be repeated")
    p.add_argument("--out", type=output_file, metavar="FILE", help="answers of --prompts; what is "
                   "there of a run cut off stays (default: stdout)")
    p.add_argument("--show-memory", action="store_true", help="also how far its slots move in each "
                   "step, and how sure the model is of each position")
    add_decoding_options(p, orders)
    p.add_argument("--seed", type=seed, default=0, help="of drawn tokens and of --task")
    p.add_argument("--number", type=size, default=1, help="so many answers: how many are right")
    p.add_argument("--batch-size", type=size, default=1, help="prompts at a time with --prompts")
    p.add_argument("--delay", type=number(0, 60), help="seconds to rest after each frame on a "
                   "terminal (default: 0.08 for puzzles, 0.03 for stories, else 0)")
    p.add_argument("--quiet", action="store_true", help="the answer only, no live view")
    return p


def add_data_options(parser, max_length: int = 1024, batch_size: int | None = None,
                     micros: int | None = None) -> None:
    """--data and how much of it is taken at a time, with a command's own defaults."""
    parser.checks.append(check_source)
    parser.add_argument("--data", type=data_file, metavar="FILES", help="JSONL with messages, or "
                        "prompt and response, or ShareGPT's or Alpaca's, comma-separated, patterns "
                        "too (default: the checkpoint's own tasks, else the Tulu-3 mixture)")
    parser.add_argument("--max-length", type=count, default=max_length, help="tokens of prompt and "
                        f"response (default: {max_length})")
    parser.add_argument("--batch-size", type=size, default=batch_size, help="examples per "
                        f"micro-batch (default: {batch_size or '1 for 8B and 7B, else 8'})")
    parser.add_argument("--micros", type=size, default=micros, help="micro-batches per update; of "
                        f"tasks, one each (default: {micros or '16 for 8B and 7B, else 4'})")
    parser.add_argument("--seed", type=seed, default=0, help="of the data and of fresh weights")


def training_parser(doc: str, reveals: Iterable[str]) -> Parser:
    """What train.py takes."""
    p = Parser(description=doc)
    p.checks.append(check_training)
    p.add_argument("--out", type=output_folder, default="out/metastate", help="folder of the run; "
                   "resumes if killed")
    add_model_options(p)
    add_data_options(p)
    shape = p.add_argument_group("memory")
    shape.add_argument("--memory", default=USUAL, metavar="MODULE:CLASS", help="another class than "
                       "MetaState, with its three methods (docs/memories.md)")
    shape.add_argument("--init", type=tensors_file, metavar="FILE", help="start from this memory, "
                       "of its own class and sizes")
    shape.add_argument("--slots", type=size, help="M (default: 64 for 8B and 7B, else 24)")
    shape.add_argument("--width", type=size, help="D (default: 1024 for 8B and 7B, else d)")
    shape.add_argument("--no-time", action="store_true", help="ablation: t_cond is constant")
    shape.add_argument("--no-local", action="store_true", help="ablation: no local attention bias")
    loss = p.add_argument_group("loss")
    loss.add_argument("--K", type=listed(whole(1, 1000)), help="steps to unroll; of several each "
                      "micro-batch draws one (default: 4,4,12 on tasks, 4 on texts, as published)")
    loss.add_argument("--reveal", choices=list(reveals), help="which tokens a step reveals: the "
                      "surest (default on tasks) or any, as published (default on texts)")
    loss.add_argument("--lam", type=number(0, 1), default=0.5, help="dense against reveal loss")
    loss.add_argument("--concentration", type=number(0, 1e6, open_low=True), default=1.0,
                      help="of the Dirichlet")
    loss.add_argument("--reset", action="store_true", help="control: memory reset at every step")
    loss.add_argument("--cut", action="store_true", help="ablation: gradients reach one step back")
    how = p.add_argument_group("optimisation")
    how.add_argument("--steps", type=count, help="updates (default: 3125 for 8B and 7B, else 2000);"
                     " with more of them a finished run goes on")
    how.add_argument("--lr", type=rate, default=1e-3, help="peak of AdamW")
    how.add_argument("--warmup", type=whole(0), default=50, help="updates")
    how.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                     help="recompute blocks: less memory (default: for 8B and 7B)")
    how.add_argument("--save-every", type=count, default=100)
    how.add_argument("--eval-every", type=count, default=250)
    return p


def run_settings(args: argparse.Namespace, backbone, tokenizer, batch: Callable, *code) -> dict:
    """What tells one training from another, known by content: the options that change its outcome,
    the bits of a backbone (with .config and .parameters()), the tokenizer, the data (batch(step,
    micro) as `lib.data` makes it) and the syntax of code (functions, and classes with all of their
    module). The number of steps is not among them: a run can be made longer."""
    same = ("out", "ckpt", "begun", "data", "own", "device", "dtype", "steps", "save_every",
            "eval_every", "checkpointing", "compile", "run")
    first = [x for micro in range(args.micros) for x in batch(0, micro) if x is not None]
    file, init = getattr(args, "data", None), getattr(args, "init", None)
    own = [*map(identity.of_file, getattr(args, "own", None) or [])]
    teacher = [*map(identity.of_file, filter(None, [getattr(args, "teacher", None)]))]
    sizes = {k: v for k, v in asdict(backbone.config).items() if k != "dtype"}
    return {**{k: v for k, v in vars(args).items() if k not in same},
            "backbone": identity.bits(repr(sizes), backbone.parameters()),
            "dtype": str(next(backbone.parameters()).dtype),
            "init": init and identity.of_file(init),
            "tokenizer": identity.of_text(tokenizer.core.to_str()),
            "data": [file and " ".join(map(identity.of_file, getattr(file, "files", [file]))),
                     identity.bits("", first)],
            "code": identity.of_code(*code), **({"own": own} if own else {}),
            **({"teacher": teacher} if teacher else {})}
