"""The live view: what a person sees on a terminal, and what a file gets."""
from __future__ import annotations

import io
import re
import unicodedata
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, EOS_ID, MASK_ID, byte_tokenizer

import sample
from lib.cli import command
from lib.live import (FRESH, MASK, NEWLINE, LiveView, answer_prompts, answer_text, count_tokens,
                      figures)
from lib.options import sampling_parser
from lib.terminal import printable
from lib.tokenizer import Tokenizer
from model import load
from sample import Sample, generate

PROMPT = [104, 105]  # two tokens that no frame may show
SPECIAL = SimpleNamespace(mask_id=MASK_ID, eos_id=EOS_ID, pad_id=EOS_ID, max_len=500)
STATUS = re.compile(r"(\d+)/(\d+) positions  (\d+) tokens  (\d+) forwards  "
                    r"[\d.]+ tokens/forward  [\d.]+ tokens/s")


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Screen:
    """What a terminal shows after a stream was written to it. Knows what the live view uses and
    refuses anything else; a line that would wrap is an error, for it would break the redrawing."""

    columns: int
    obeys: bool = True  # refuses what the live view does not use
    lines: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])  # (char, style) cells
    row: int = 0
    style: str = ""

    def feed(self, text: str) -> Screen:
        for escape, char in re.findall(r"(\x1b\[[0-9;]*[A-Za-z])|([\s\S])", text):
            if escape.endswith("m"):
                self.style = "" if escape == "\x1b[0m" else self.style + escape
            elif escape.endswith("F"):
                up = int(escape[2:-1])
                assert 0 < up <= self.row, "moves above its own first line"
                self.row -= up
            elif escape == "\x1b[2K":
                self.lines[self.row] = []
            elif escape == "\x1b[J":
                del self.lines[self.row:]
                self.lines.append([])
            elif char == "\n":
                assert not self.style, "a style reaches beyond its line"
                self.row += 1
                self.lines += [[]] * (self.row == len(self.lines))
            else:
                assert char and (char in "\t\u200d" and not self.obeys
                                 or unicodedata.category(char)[0] != "C"), f"{escape or char!r}"
                self.lines[self.row] = self.lines[self.row] + [(char, self.style)]
                assert width(self.text(self.row)) <= self.columns, "wraps"
        return self

    def text(self, row: int) -> str:
        return "".join(char for char, _ in self.lines[row])

    def marked(self, style: str) -> str:
        """What is shown in one style."""
        return "".join(char for line in self.lines for char, s in line if s == style)

    def shown(self) -> tuple[list[str], str]:
        """The lines of the answer and the status line; the cursor stands beneath them."""
        texts = [self.text(row) for row in range(len(self.lines))]
        assert self.row == len(texts) - 1 and texts[-1] == ""
        return texts[:-2], texts[-2]


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A byte a token, so that every character beyond ASCII is split among tokens."""
    return Tokenizer(byte_tokenizer({"<|mask|>": MASK_ID, "<|eos|>": EOS_ID}))


@pytest.fixture
def terminal(tokenizer, monkeypatch):
    """show(*steps, columns=, lines=) -> the screen after the last step."""
    def show(*steps: Sample, columns: int = 200, lines: int = 24) -> Screen:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        stream, screen = FakeTerminal(), Screen(columns)
        view = LiveView(tokenizer, MASK_ID, EOS_ID, len(PROMPT), stream)
        for step in steps:
            view(step)
            screen.feed(stream.getvalue())
            stream.seek(0)
            stream.truncate()
        return screen
    return show


def step_of(answer: list[int], fresh: range | list[int] = (), forwards: int = 1) -> Sample:
    """A step that shows an answer, positions `fresh` just committed."""
    ids = torch.tensor([PROMPT + answer])
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for i in fresh:
        marks[0, len(PROMPT) + i] = True
    return Sample(ids, marks, forwards, 1.0)


# ------------------------------------------------------------------ on a terminal
def test_a_frame_shows_masks_fresh_and_settled_tokens(terminal, tokenizer):
    """Masks are the block character, what the step committed is marked, the rest is plain, and the
    prompt is not part of the answer."""
    screen = terminal(step_of(tokenizer.encode("ab") + [MASK_ID] * 3 + tokenizer.encode("cd"),
                              fresh=[0, 6]))
    lines, status = screen.shown()
    assert lines == ["ab" + MASK * 3 + "cd"]
    assert screen.marked(FRESH) == "ad" and screen.marked("") == "bc"
    assert STATUS.fullmatch(status).groups() == ("4", "7", "4", "1")


def test_frames_are_drawn_over_one_another(terminal, tokenizer):
    """Every step redraws the same lines: after it nothing of earlier frames is left, also where
    they had more lines or longer ones; marks are those of the last step."""
    wide = step_of([MASK_ID] * 70)
    text = tokenizer.encode("one\ntwo\nthree")
    screen = terminal(wide, step_of(text + [MASK_ID] * 5), step_of(text + [EOS_ID] * 5, [0, 17]),
                      step_of(tokenizer.encode("x") + [EOS_ID] * 17, forwards=9), columns=20)
    lines, status = screen.shown()
    assert lines == ["x"] and screen.marked(FRESH) == ""
    assert status.startswith("18/18 positions")


@pytest.mark.parametrize("columns", [2, 5, 19, 80])
@pytest.mark.parametrize("text", ["plain words " * 9, "界" * 30, "a界" * 20, "ﾊﾝ角ｶﾅ" * 9,
                                  "e\u0301" * 50, "\n" * 5, "ab\n\n界界\nend"], ids=repr)
def test_no_line_is_wider_than_the_terminal(terminal, tokenizer, text, columns):
    """Lines break before they wrap, counting wide characters twice and combining ones not at all,
    and at newlines; no character is lost. (The screen refuses what wraps.)"""
    ids = tokenizer.encode(text)
    for fresh in ([], range(len(ids))):
        lines, status = terminal(step_of(ids, fresh), columns=columns, lines=500).shown()
        assert "".join(lines) == text.replace("\n", "") and width(status) <= columns
        rows = sum(max(1, -(-width(part) // columns)) for part in text.split("\n"))
        if not any(unicodedata.east_asian_width(c) in "WF" for c in text):
            assert len(lines) == rows


def test_only_what_fits_is_drawn_on_a_low_terminal(terminal, tokenizer):
    """An answer with more lines than the terminal shows its end: drawing all of it would scroll,
    and no cursor movement reaches what has scrolled away."""
    text = tokenizer.encode("\n".join(str(i) for i in range(30)))
    lines, status = terminal(step_of(text), step_of(text), lines=8).shown()
    assert lines == [str(i) for i in range(24, 30)] and status.startswith("79/79")


def test_a_terminal_of_one_line_shows_no_frames(terminal, tokenizer):
    """The line would scroll away with every step."""
    screen = terminal(*[step_of(tokenizer.encode("ab"))] * 2, lines=1)
    assert [screen.text(row) for row in range(len(screen.lines))] == [""]


def test_characters_split_among_tokens_come_out_whole(terminal, tokenizer):
    """"é界😀" is nine byte tokens: a run of one kind is decoded together."""
    ids = tokenizer.encode("é界😀")
    assert len(ids) == 9
    for fresh in ([], range(9)):
        assert terminal(step_of(ids + [MASK_ID], fresh)).shown()[0] == ["é界😀" + MASK]


def test_an_unfinished_character_does_not_break_the_frame(terminal, tokenizer):
    """While its other bytes are masked, a byte is a replacement character."""
    ids = tokenizer.encode("界")
    assert terminal(step_of(ids[:2] + [MASK_ID])).shown()[0] == ["\ufffd" + MASK]


@pytest.mark.parametrize("char", ["\x1b", "\r", "\b", "\t", "\x00", "\x07", "\x7f", "\x9b",
                                  "\u202e", "\u200b"], ids=repr)
def test_control_characters_never_reach_the_terminal(terminal, tokenizer, char):
    """A model may write anything, cursor movements too; what it writes is shown, not obeyed."""
    lines, _ = terminal(step_of(tokenizer.encode(f"a{char}[2Jb"))).shown()
    assert lines == ["a\ufffd[2Jb"]


def test_the_tail_behind_eos_is_hidden_once_settled(terminal, tokenizer):
    """EOS and what follows it is no part of the text; while a mask stands before the first EOS, the
    tail is still shown, for the view must not jump about."""
    text, eos = tokenizer.encode("hi"), [EOS_ID, MASK_ID, *tokenizer.encode("junk")]
    assert terminal(step_of(text + eos)).shown()[0] == ["hi"]
    assert terminal(step_of([MASK_ID] + text + eos)).shown()[0] == [MASK + "hi" + MASK + "junk"]


def test_a_whole_generation_on_a_narrow_terminal(text_ckpt, tokenizer, monkeypatch):
    """Every frame of a real decoding fits, and the last one shows the answer."""
    monkeypatch.setenv("COLUMNS", "17")
    monkeypatch.setenv("LINES", "50")
    backbone, _ = load(text_ckpt, "cpu")
    stream = FakeTerminal()
    view = LiveView(tokenizer, MASK_ID, EOS_ID, len(PROMPT), stream)
    result = generate(backbone, torch.tensor([PROMPT]), gen_length=32, block_length=8, steps=16,
                      on_step=view)
    screen = Screen(17).feed(stream.getvalue())
    answer = answer_text(result.ids[0, len(PROMPT):], tokenizer, MASK_ID, EOS_ID)
    assert "".join(screen.shown()[0]) == printable(answer).replace("\n", "")
    assert screen.marked(FRESH) and MASK not in screen.marked(FRESH)


# ------------------------------------------------------------------ anywhere else
def test_plain_lines_without_escape_codes(tokenizer):
    """In a file or a pipe every step is one line: forwards and the text, line breaks shown, nothing
    that moves a cursor."""
    stream = io.StringIO()
    view = LiveView(tokenizer, MASK_ID, EOS_ID, len(PROMPT), stream)
    view(step_of([MASK_ID] * 4, forwards=1))
    view(step_of(tokenizer.encode("a\n\x1b") + [MASK_ID], [1], forwards=2))
    view(step_of(tokenizer.encode("é\n") + [EOS_ID], forwards=3))
    assert stream.getvalue().splitlines() == \
        [f"   1  {MASK * 4}", f"   2  a{NEWLINE}\ufffd{MASK}", f"   3  é{NEWLINE}"]


def test_the_command_line_writes_plain_lines_to_a_pipe(text_ckpt, capsys):
    """What a pipe gets ends with the answer and the figures, and has no escape codes at all."""
    argv = ["--ckpt", str(text_ckpt), "--device", "cpu", "--prompt", "hi", "--gen-length", "16"]
    assert sample.main(argv) == 0
    lines = capsys.readouterr().out.split("\n")
    steps = [line for line in lines if re.match(r" +\d+  ", line)]
    assert [int(line.split()[0]) for line in steps] == list(range(1, len(steps) + 1))
    assert not any("\x1b" in line for line in steps)
    assert re.search(rf"tokens  {len(steps)} forwards  .* tokens/s$", lines[-2])


FILE = str(DATA / "llada" / "model.safetensors")  # of tensors, as memories are
WRITTEN = ("tab\there \U0001f469\u200d\U0001f680\n" + "界\n" * 20
           + "\x1b[31m\x9b\u202e\u2066\x07\r end\r\n")


@pytest.mark.parametrize("argv, times", [([], 1), (["--compare", "--memory", FILE], 2),
                                         (["--quiet"], 1)], ids=lambda x: str(x)[:12])
def test_the_answer_on_a_terminal_is_the_answer(tokenizer, monkeypatch, argv, times):
    """After the last step the frames are gone and the whole text stands there, also what a window
    of ten lines never showed, tabs and joiners as they are and characters split among tokens; what
    a terminal would obey is not sent, and nothing of a frame is left."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setattr("sys.stdout", stream := FakeTerminal())
    ids = tokenizer.encode(WRITTEN)

    def decode(prompt, on_step=None, **_):
        for known in range(0, len(ids) + 1, 8):
            answer = ids[:known] + [MASK_ID] * (len(ids) - known)
            on_step(step_of(answer, range(max(0, known - 8), known)))
        return step_of(ids)

    @command
    def main(args):
        parsed = sampling_parser("", ["low_confidence"], []).parse_args(["--prompt", "hi", *args])
        variants = {"without memory": decode, "with memory": decode} if parsed.compare else \
            {"": decode}
        return answer_prompts(parsed, variants, tokenizer, SPECIAL, "cpu", 8, {}, [], None)

    assert main(argv) == 0
    monkeypatch.undo()
    shown = Screen(200, obeys=False).feed(stream.getvalue())
    lines = [shown.text(row) for row in range(len(shown.lines))]
    expected = ["tab\there \U0001f469\u200d\U0001f680", *["界"] * 20,
                "\ufffd[31m\ufffd\ufffd\ufffd\ufffd\ufffd end", ""]
    where = [i for i, line in enumerate(lines) if line.startswith("tab")]
    assert len(where) == times
    assert all(lines[i:i + len(expected)] == expected for i in where)
    assert not any(MASK in line or "positions" in line for line in lines)
    assert sum("tokens/s" in line for line in lines) == times * ("--quiet" not in argv)
    assert [line for line in lines if line.endswith(":")] == \
        ["without memory:", "with memory:"] * ("--compare" in argv)


def test_steps_in_a_pipe_have_whole_characters(tokenizer):
    """There what a step committed is not marked, so that it is decoded with what stood there."""
    stream = io.StringIO()
    view = LiveView(tokenizer, MASK_ID, EOS_ID, len(PROMPT), stream)
    view(step_of(tokenizer.encode("😀"), [2, 3]))
    assert stream.getvalue() == "   1  😀\n"


@pytest.mark.parametrize("text, expected", [
    ("a\nb", "a\nb"), ("\x1b[31mred", "\ufffd[31mred"), ("tab\there", "tab\ufffdhere"),
    ("界 é \u00a0", "界 é \u00a0"), ("", "")])
def test_printable(text, expected):
    """Only what moves a cursor is replaced; newlines are the frame's own business."""
    assert printable(text) == expected


# ------------------------------------------------------------------ answers and figures
def test_figures_count_generated_tokens_only():
    """tokens/s of generated tokens: neither EOS nor what is still masked."""
    answer = torch.tensor([[1, 2, MASK_ID, EOS_ID, EOS_ID], [3, EOS_ID, 4, MASK_ID, 5]])
    assert count_tokens(answer, MASK_ID, EOS_ID) == 5
    assert figures(5, 4, 2.0) == \
        "5 tokens  4 forwards  1.25 tokens/forward  2.5 tokens/s"


def test_resting_between_frames_is_not_the_models_time(tokenizer):
    """With a delay the frames rest on a terminal, and tokens/s are as without."""
    def shown(delay: float) -> str:
        stream = FakeTerminal()
        view = LiveView(tokenizer, MASK_ID, EOS_ID, len(PROMPT), stream, delay)
        view(step_of(tokenizer.encode("abcd")))
        view(step_of(tokenizer.encode("abcd"))._replace(seconds=1.0 + delay))
        return stream.getvalue()

    assert shown(0.25).count("4.0 tokens/s") == shown(0.0).count("4.0 tokens/s") == 2


def test_the_answers_text_ends_before_eos(tokenizer):
    """Masks and special tokens are no part of it; without an EOS it is all there is."""
    ids = torch.tensor([MASK_ID, *tokenizer.encode("hi\u00e9"), EOS_ID, *tokenizer.encode("junk")])
    assert answer_text(ids, tokenizer, MASK_ID, EOS_ID) == "hi\u00e9"
    assert answer_text(ids[:4], tokenizer, MASK_ID, EOS_ID) == "hi\ufffd"
    assert answer_text(ids[-5:-4], tokenizer, MASK_ID, EOS_ID) == ""
