"""Draw one prompt being denoised without and with memory, as a moving picture.

    python -m studies.picture --memory checkpoints/tiny/metastate.safetensors
    python -m studies.picture --memory FILE --task sums --steps 4 --seed 7 --out out/sums.svg
    python -m studies.picture --memory FILE --slots --steps 12 --out out/slots.svg
    python -m studies.picture --ckpt stories --prompt "Once upon a time" --out out/story.svg \
        --memory checkpoints/stories/metastate.safetensors

The same prompt and the same number of steps, side by side: masked positions are light blocks, what
a step commits is highlighted, what is settled is plain, and at the end stands what the task's own
check says. Without --seed or --prompt the prompt is the first held-out one that is solved with the
memory only, and the caption says so. The picture is an SVG that moves by CSS alone, for a light and
a dark page; where nothing moves it shows the end. --slots draws instead what the memory does in one
block: how far each slot moves in each step, and how sure the model is of the best token at each
position.
"""
from __future__ import annotations

import argparse
import random
import sys
from textwrap import wrap
from typing import NamedTuple
from xml.sax.saxutils import escape

import torch

from lib.asked import Asked, understood
from lib.checks import block_of
from lib.cli import InputError, Parser, command, count, one_of, seed, written
from lib.files import write_text
from lib.hub import stated
from lib.live import NEWLINE, answer_text
from lib.options import add_model_options, with_text
from lib.outputs import output_file, tensors_file
from lib.progress import progress
from lib.terminal import note, printable
from lib.tokenizer import Tokenizer, needed
from lib.watch import Watched
from metastate import MetaState
from model import Backbone, load
from sample import Sample, generate
from tasks import TASKS, draw, find_task

SEEDS = 200              # prompts to choose from
SECOND, MOST, REST = 0.9, 20.0, 4.0  # seconds of a step, of all at most, and of the end
CELL, LETTER, ROW, MARGIN = 16, 9, 24, 20  # pixels: width of a position and of a letter, height of
                                           # a line, around everything
END = "\u00b7"           # how EOS looks
VERDICTS = {True: ("right", -5, "l4 5l8 -11"), False: ("wrong", -9, "l9 9m0 -9l-9 9")}  # drawn
STYLE = """
  text { font: 15px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }
  .quiet { font-size: 12.5px } .bold { font-weight: bold } .token, .bold { text-anchor: middle }
  .mask, .fresh, .bold, .soon { opacity: 0 }
  * { animation-timing-function: step-end; animation-iteration-count: infinite }
  @media (prefers-reduced-motion: reduce) { * { animation: none !important } }
"""
COLOURS = {  # selector and property -> on a light page, on a dark one
    ".page { fill": ("#ffffff", "#0d1117"), ".page { stroke": ("#d0d7de", "#3d444d"),
    "text { fill": ("#1f2328", "#f0f6fc"), ".quiet { fill": ("#59636e", "#9198a1"),
    ".dark { fill": ("#1f6feb", "#58a6ff"),
    ".mask { fill": ("#d5dbe2", "#353c46"), ".fresh { fill": ("#ffd33d", "#d29922"),
    ".bold { fill": ("#1f2328", "#0d1117"), "text.right { fill": ("#1a7f37", "#3fb950"),
    "text.wrong { fill": ("#cf222e", "#f85149"), "path { fill": ("none", "none"),
    "path.right { stroke": ("#1a7f37", "#3fb950"), "path.wrong { stroke": ("#cf222e", "#f85149")}


class Denoising(NamedTuple):
    """One prompt denoised: a token's text, and the forward that committed it, by position."""

    title: str
    tokens: list[str]
    steps: list[int]
    forwards: int
    right: bool          # by the task's check
    faults: list[str]    # what is wrong, where the check says so
    is_text: bool

    def places(self, width: int) -> list[tuple[int, int, int]]:
        """Where each token stands in lines of `width` pixels: (left, line, its own width). Those of
        a text stand as its words do, others in cells that are as wide as the widest needs."""
        if not self.is_text:
            cell = max(CELL, LETTER * max(map(len, self.tokens)) + 7)
            return [(cell * (i % (width // cell)), i // (width // cell), cell)
                    for i in range(len(self.tokens))]
        found, left, line = [], 0, 0
        for i, token in enumerate(self.tokens):
            space = LETTER * (left > 0 and token.startswith(" "))
            word = "".join(self.tokens[i:]).lstrip().split(" ")[0]
            if space and left + space + LETTER * len(word) > width:
                left, line, space = 0, line + 1, 0
            found.append((left + space, line, LETTER * len(token.strip())))
            left += space + found[-1][2]
        return found


def denoising(title: str, backbone: Backbone, tokenizer: Tokenizer, asked: Asked, length: int,
              steps: int, memory: MetaState | None) -> Denoising:
    """Denoise a prompt to `length` positions in so many steps, and note what happens. Of a text
    only what is before its end is kept, and the forwards that committed it."""
    c, device = backbone.config, backbone.embedding.weight.device
    ids, committed = torch.tensor([tokenizer.encode(asked.prompt)], device=device), [0] * length

    def see(step: Sample) -> None:
        for i in step.fresh[0, ids.shape[1]:].nonzero()[:, 0].tolist():
            committed[i] = step.forwards

    sample = generate(backbone, ids, memory=memory, gen_length=length, steps=steps, on_step=see,
                      block_length=block_of(length) if asked.lead else length,
                      stop_at_eos=bool(asked.lead))
    answer = sample.ids[0, ids.shape[1]:]
    text = answer_text(answer, tokenizer, c.mask_id, c.eos_id)
    right, answer = asked.task.check(asked.prompt, text), answer.tolist()
    if asked.lead and c.eos_id in answer:
        answer = answer[:answer.index(c.eos_id)]
    texts = [END if i == c.eos_id else tokenizer.decode([i]) for i in answer]
    committed = committed[:len(answer)]
    return Denoising(title, texts, committed, max(committed, default=sample.forwards), right,
                     asked.faults(text) if not right else [], bool(asked.lead))


def both(backbone: Backbone, tokenizer: Tokenizer, asked: Asked, length: int, steps: int,
         memory: MetaState) -> list[Denoising]:
    """A prompt denoised without and with the memory."""
    return [denoising(title, backbone, tokenizer, asked, length, steps, used)
            for title, used in (("without memory", None), ("with memory", memory))]


# ------------------------------------------------------------------ the picture
class Picture:
    """The elements of the picture, and the frames in which they show. Frame 0 is all masks, frame k
    what forward k left; in the last of `total` nothing is fresh and the verdict stands."""

    def __init__(self, total: int):
        self.total, self.elements, self.spans = total, [], set()

    def add(self, tag: str, kind: str, text: str = "", frames: range | None = None,
            **attributes) -> None:
        """An element of a class, shown in some frames only or in all."""
        if frames is not None:
            self.spans.add((frames.start, frames.stop))
            attributes["style"] = f"animation-name: from{frames.start}to{frames.stop}"
        values = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        self.elements.append(f'<{tag} class="{kind}"{values}>{escape(printable(text))}</{tag}>')

    def style(self) -> str:
        """The CSS: colours, and for each span of frames an animation that is opaque in those. A
        frame takes a SECOND, or less where they are many, the last one REST more."""
        second, rules = min(SECOND, MOST / self.total), STYLE
        seconds = (self.total - 1) * second + REST
        light, dark = (" ".join(f"{what}: {colours[i]} }}" for what, colours in COLOURS.items())
                       for i in (0, 1))
        rules += f"  {light}\n  @media (prefers-color-scheme: dark) {{ {dark} }}\n"
        rules += f"  * {{ animation-duration: {seconds:g}s }}\n"
        for first, after in sorted(self.spans):
            stops = {0: 0, 100 * first * second / seconds: 1}
            if after < self.total:
                stops[100 * after * second / seconds] = 0
            rules += f"  @keyframes from{first}to{after} {{ " + " ".join(
                f"{at:.4g}% {{ opacity: {opacity} }}" for at, opacity in stops.items()) + " }\n"
        return rules

    def panel(self, what: Denoising, x: int, y: int, width: int) -> int:
        """One denoising from (x, y) on, `width` pixels wide: its title, its positions in lines,
        the forwards so far, and the verdict. Returns the y of its last line."""
        self.elements.append(f'<g id="{what.title.replace(" ", "-")}">')
        self.add("text", "title", what.title, x=x, y=y)
        places = what.places(width)
        for token, step, (left, line, wide) in zip(what.tokens, what.steps, places):
            left, top = x + left, y + 12 + ROW * line
            box = dict(x=left + 1, y=top, width=wide - 2, height=ROW - 4, rx=3)
            text = dict(text=token.strip() if what.is_text else token.replace("\n", NEWLINE),
                        x=left + wide / 2, y=top + 15)
            self.add("rect", "mask", frames=range(0, step), **box)
            self.add("rect", "fresh", frames=range(step, step + 1), **box)
            self.add("text", "bold", frames=range(step, step + 1), **text)
            self.add("text", "token", frames=range(step + 1, self.total), **text)
        y += 12 + ROW * (1 + max((line for _, line, _ in places), default=0)) + 18
        for k in range(what.forwards + 1):
            end = k == what.forwards
            self.add("text", "quiet" if end else "quiet soon", f"{k} of {what.forwards} forwards",
                     range(k, self.total if end else k + 1), x=x, y=y)
        word, rise, line = VERDICTS[what.right]
        finally_ = range(self.total - 1, self.total)
        self.add("path", word, frames=finally_, d=f"M{x + 134} {y + rise}{line}", stroke_width=2.5)
        self.add("text", word, word, finally_, x=x + 152, y=y)
        for fault in what.faults:
            for part in wrap(fault, width // LETTER):
                y += ROW - 4
                self.add("text", word, part, finally_, x=x, y=y)
        self.elements.append("</g>")
        return y


def picture(prompt: str, caption: str, panels: list[Denoising], width: int = 24 * CELL) -> str:
    """The SVG of a prompt and what became of it, side by side, each `width` pixels wide."""
    drawing = Picture(max(what.forwards for what in panels) + 2)
    w, y = len(panels) * (width + MARGIN) + MARGIN, MARGIN + 14
    for line in prompt.rstrip("\n").split("\n"):
        for part in wrap(line, (w - 2 * MARGIN) // LETTER - 1) or [""]:
            drawing.add("text", "prompt", part, x=MARGIN, y=y)
            y += 20
    y = max(drawing.panel(what, MARGIN + i * (width + MARGIN), y + 16, width)
            for i, what in enumerate(panels)) + 34
    drawing.add("text", "quiet", caption, x=MARGIN, y=y)
    return framed(drawing, caption, w, y + MARGIN)


def framed(drawing: Picture, caption: str, w: int, h: int) -> str:
    """The SVG of a drawing, on a page of w by h pixels."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" '
            f'height="{h}" role="img">\n<title>{escape(printable(caption))}</title>\n'
            f'<style>{drawing.style()}</style>\n'
            f'<rect class="page" x="0.5" y="0.5" width="{w - 1}" height="{h - 1}" rx="8"/>\n'
            + "\n".join(drawing.elements) + "\n</svg>\n")


# ------------------------------------------------------------------ what the memory does
def slot_steps(backbone: Backbone, tokenizer: Tokenizer, prompt: str, length: int, steps: int,
               memory: MetaState) -> list[dict[str, list[float]]]:
    """What `Watched` says of a prompt's denoising in one block, step by step."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=backbone.embedding.weight.device)
    watched, seen = Watched(memory), []
    generate(backbone, ids, memory=watched, adjust=watched.adjust, gen_length=length,
             block_length=length, steps=steps, on_step=lambda _: seen.append(watched.of_row(0)))
    return seen


def slot_picture(steps: list[dict[str, list[float]]], caption: str) -> str:
    """The SVG of `slot_steps`: a row for each step, a cell for each slot and for each position; the
    darkest slot is the farthest move, the darkest position certainty."""
    most = max(x for step in steps for x in step["slots"])
    columns = [("slots: how far each moves", "slots", most), ("positions: how sure", "sure", 1.0)]
    drawing, x = Picture(1), MARGIN + 40
    for title, name, whole in columns:
        drawing.add("text", "quiet", title, x=x, y=MARGIN + 10)
        for k, step in enumerate(steps):
            top = MARGIN + 20 + CELL * k
            if x == MARGIN + 40:
                drawing.add("text", "quiet", f"{k + 1}", x=MARGIN, y=top + 12)
            for i, value in enumerate(step[name]):
                drawing.add("rect", "dark", x=x + CELL * i, y=top, width=CELL - 1, height=CELL - 1,
                            fill_opacity=f"{min(value / whole, 1):.3f}")
        x += CELL * len(steps[0][name]) + MARGIN
    y = MARGIN + 40 + CELL * len(steps)
    drawing.add("text", "quiet", caption, x=MARGIN, y=y)
    return framed(drawing, caption, x, y + MARGIN)


# ------------------------------------------------------------------ command line
def parser() -> Parser:
    """What the command line takes."""
    p = Parser(description=__doc__)
    add_model_options(p, compiled=False, kind=with_text)
    p.add_argument("--memory", type=tensors_file, metavar="FILE", required=True,
                   help="a MetaState memory trained for it")
    p.add_argument("--task", type=one_of(TASKS, "task"), help="one that the checkpoint knows "
                   "(default: chain, or the first)")
    p.add_argument("--slots", action="store_true", help="what the memory does, not the tokens")
    p.add_argument("--steps", type=count, help="denoising steps (default: 6, or one for two tokens "
                   "of a text)")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--seed", type=seed, help="of the prompt (default: the first from 0 on that "
                       "is solved with the memory only; with --slots 0)")
    which.add_argument("--prompt", type=written, help="one of your own, as the task has them")
    p.add_argument("--out", type=output_file, metavar="FILE", default="out/denoising.svg",
                   help="default: out/denoising.svg")
    return p


def asked_of(args: argparse.Namespace, number: int | None) -> tuple[Asked, str]:
    """The prompt that the command line asks for, or the task's held-out one of this number, and
    what to say of it."""
    if args.prompt is None:
        prompt, _ = draw(args.task, random.Random(number), held_out=True)
        return Asked(prompt, find_task(args.task)), f"{args.task}, seed {number}: a held-out prompt"
    asked = understood(args.prompt, args.ckpt, TASKS, [args.task])
    if asked.task is None:
        raise InputError(f"--prompt: {args.task} has no such prompts")
    if asked.hint:
        note(asked.hint)
    return asked, f"{args.task}: a prompt of one's own"


@command
def main(argv: list[str] | None = None) -> None:
    """Write the picture that the command line asks for."""
    args = parser().parse_args(argv)
    backbone, tokenizer = load(args.ckpt, args.device, args.dtype)
    tokenizer, (length, known) = needed(tokenizer, args.ckpt), stated(args.ckpt)
    args.task = args.task or ("chain" if "chain" in known or not known else known[0])
    if known and args.task not in known:
        raise InputError(f"--task {args.task}: {args.ckpt} was trained on {', '.join(known)}")
    is_text = getattr(TASKS[args.task], "continues", False)
    args.steps = args.steps or (length // 2 if is_text else 6)
    memory = MetaState.load(args.memory, backbone)
    if args.slots:
        asked, caption = asked_of(args, args.seed or 0)
        steps = slot_steps(backbone, tokenizer, asked.prompt, length, args.steps, memory)
        write_text(args.out, slot_picture(steps, f"{caption}, {args.steps} steps"))
        print(f"wrote {args.out}")
        return
    chosen = args.seed is None and args.prompt is None
    for number in progress(range(SEEDS) if chosen else [args.seed], "prompts"):
        asked, caption = asked_of(args, number)
        panels = both(backbone, tokenizer, asked, length, args.steps, memory)
        if not chosen or [what.right for what in panels] == [False, True]:
            break
    else:
        raise InputError(f"none of {SEEDS} prompts of {args.task} is solved with the memory only: "
                         "pass --seed, --task or --steps")
    caption += ", chosen to show this, the first solved with the memory only" * chosen
    write_text(args.out, picture(asked.prompt, caption, panels))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
