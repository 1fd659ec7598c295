"""The moving picture of a prompt being denoised: read back frame by frame."""
from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT

from lib.live import NEWLINE
from metastate import MetaState
from model import load
from sample import generate
from studies import picture
from tasks import TASKS, draw

MEMORY = str(ROOT / "checkpoints" / "tiny" / "metastate.safetensors")
LENGTH = 24  # of the tiny model's answers
TITLES = {"without-memory": False, "with-memory": True}  # panel -> whether a memory is used


@pytest.fixture(scope="module")
def tiny():
    """The tiny model and its tokenizer."""
    return load("tiny", "cpu")


def drawn(tmp_path, *argv: str, memory: str = MEMORY, most: int = 60_000) -> ElementTree.Element:
    """The picture that the command writes, of `most` bytes, parsed."""
    out = tmp_path / "picture.svg"
    assert picture.main(["--memory", memory, "--device", "cpu", "--out", str(out), *argv]) == 0
    assert out.stat().st_size < most
    return ElementTree.fromstring(out.read_text(encoding="utf-8"))


def parts(root: ElementTree.Element, tag: str, kind: str = "") -> list[ElementTree.Element]:
    """Elements of a tag and class, in order."""
    found = root.iter("{http://www.w3.org/2000/svg}" + tag)
    return [e for e in found if kind in (e.get("class") or "").split() or not kind]


def span(element: ElementTree.Element) -> tuple[int, int]:
    """The frames in which an element shows: from the first to before the second."""
    first, after = re.fullmatch(r"animation-name: from(\d+)to(\d+)", element.get("style")).groups()
    return int(first), int(after)


def prompt_of(root: ElementTree.Element) -> str:
    """The prompt that stands above the panels."""
    return "\n".join(e.text for e in parts(root, "text", "prompt")) + "\n"


def trajectory(tiny, prompt: str, steps: int, used: bool) -> list[list[str]]:
    """What `generate` leaves after each step: a text for each position, "" where masked."""
    (backbone, tokenizer), frames = tiny, [[""] * LENGTH]
    c, ids = backbone.config, torch.tensor([tokenizer.encode(prompt)])

    def text(token: int) -> str:
        if token == c.mask_id:
            return ""
        return picture.END if token == c.eos_id else tokenizer.decode([token])

    def note(step):
        frames.append([text(i) for i in step.ids[0, ids.shape[1]:].tolist()])

    generate(backbone, ids, memory=MetaState.load(MEMORY, backbone) if used else None,
             gen_length=LENGTH, block_length=LENGTH, steps=steps, on_step=note)
    return frames


@pytest.mark.parametrize("task, steps", [("chain", 6), ("sudoku", 5), ("follow", 8)])
def test_every_frame_is_what_the_step_left(tiny, tmp_path, task, steps):
    """In each frame a position shows its mask, or the token that generate has there; it is
    highlighted in the one frame after the step that committed it; the last frame is the answer,
    and stands as long as the check's verdict, which is the task's."""
    root = drawn(tmp_path, "--task", task, "--steps", str(steps), "--seed", "5")
    prompt = prompt_of(root)
    for panel in parts(root, "g"):
        frames = trajectory(tiny, prompt, steps, TITLES[panel.get("id")])
        assert len(frames) == steps + 1
        kinds = {kind: parts(panel, tag, kind) for tag, kind in (
            ("rect", "mask"), ("rect", "fresh"), ("text", "bold"), ("text", "token"))}
        assert {len(found) for found in kinds.values()} == {LENGTH}
        for k, frame in enumerate([*frames, frames[-1]]):
            on = {kind: [span(e)[0] <= k < span(e)[1] for e in found]
                  for kind, found in kinds.items()}
            texts = ["".join((e.text or "") * visible for e, visible in (
                (kinds["bold"][i], on["bold"][i]), (kinds["token"][i], on["token"][i])))
                for i in range(LENGTH)]
            assert texts == [token.replace("\n", NEWLINE) for token in frame]
            assert on["mask"] == [token == "" for token in frame]
            before = frames[k - 1] if 0 < k <= steps else frame
            assert on["fresh"] == on["bold"] == [a != b for a, b in zip(before, frame)]
        answer = "".join(frames[-1]).replace(picture.END, "")
        word = "right" if TASKS[task].check(prompt, answer) else "wrong"
        for verdict in parts(panel, "text", word) + parts(panel, "path", word):
            assert span(verdict) == (steps + 1, steps + 2)
        assert [e.text for e in parts(panel, "text", word)] == [word]
        assert not parts(panel, "text", {"right": "wrong", "wrong": "right"}[word])


def test_a_text_stands_in_words_and_below_it_what_is_wrong(tmp_path):
    """A story is what generate tells, from block to block up to its end: words whole, a space
    between two, no box over another or over the panel's edge; below it stand the check's faults.
    The prompt is one's own, and the caption does not say that it was drawn."""
    folder = ROOT / "checkpoints" / "stories"
    memory, prompt, task = folder / "metastate.safetensors", "Once upon a time", TASKS["stories"]
    root = drawn(tmp_path, "--ckpt", "stories", "--steps", "20", "--prompt", prompt,
                 memory=str(memory), most=200_000)
    assert prompt_of(root) == prompt + "\n" and "seed" not in parts(root, "title")[0].text
    backbone, tokenizer = load("stories", "cpu")
    ids, eos = torch.tensor([tokenizer.encode(prompt)]), backbone.config.eos_id
    for panel, left in zip(parts(root, "g"), (20, 424)):
        used = MetaState.load(memory, backbone) if TITLES[panel.get("id")] else None
        sample = generate(backbone, ids, memory=used, gen_length=160, block_length=32, steps=20,
                          stop_at_eos=True)
        answer = sample.ids[0, ids.shape[1]:].tolist()
        text = tokenizer.decode(answer[:answer.index(eos)])
        rebuilt, x, y = "", left, None
        for box, token in zip(parts(panel, "rect", "mask"), parts(panel, "text", "token")):
            start, wide = float(box.get("x")) - 1, float(box.get("width")) + 2
            new_line = y != float(box.get("y"))
            assert start == left if new_line else start - x in (0, 9)
            rebuilt += " " * (new_line or start > x) + token.text
            x, y = start + wide, float(box.get("y"))
            assert x <= left + 384 and wide == 9 * len(token.text)
        assert rebuilt.split() == text.split() and rebuilt.strip() == text.strip()
        last = max(span(e)[0] for e in parts(panel, "rect", "fresh"))
        assert parts(panel, "text", "quiet")[-1].text == f"{last} of {last} forwards"
        assert last <= sample.forwards
        word, *faults = [e.text for e in parts(panel, "text", "wrong")]
        assert word == "wrong" and " ".join(faults) == " ".join(task.faults(prompt, text))
        assert not parts(panel, "text", "right")


def test_forwards_are_counted_frame_by_frame(tmp_path):
    """One count at a time, and the last one stays."""
    root = drawn(tmp_path, "--task", "sums", "--steps", "4", "--seed", "0")
    for panel in parts(root, "g"):
        counts = parts(panel, "text", "quiet")
        assert [e.text for e in counts] == [f"{k} of 4 forwards" for k in range(5)]
        assert [span(e) for e in counts] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]
        assert ["soon" in e.get("class") for e in counts] == [True] * 4 + [False]


def test_the_prompt_is_chosen_and_this_is_said(tmp_path):
    """Without --seed the frozen model is wrong and the memory right, in the same number of
    forwards, and the caption says that the prompt was chosen; with --seed it says no such thing."""
    root = drawn(tmp_path)
    words = [parts(panel, "text", "right") + parts(panel, "text", "wrong")
             for panel in parts(root, "g")]
    assert [panel.get("id") for panel in parts(root, "g")] == list(TITLES)
    assert [[e.text for e in found] for found in words] == [["wrong"], ["right"]]
    assert "chosen to show this" in parts(root, "title")[0].text
    assert "chosen to show this" in parts(root, "text")[-1].text
    assert "chosen" not in parts(drawn(tmp_path, "--seed", "1"), "title")[0].text


def test_it_moves_without_scripts_and_looks_for_nothing_outside(tmp_path):
    """An animation for every span that an element names, colours for a light and a dark page, the
    end where motion is not wanted; no script, no font or file from elsewhere."""
    root = drawn(tmp_path, "--seed", "1")
    [style] = [e.text for e in parts(root, "style")]
    named = {"from{}to{}".format(*span(e)) for e in root.iter() if e.get("style")}
    assert named == set(re.findall(r"@keyframes (\w+)", style))
    for words in ("prefers-color-scheme: dark", "prefers-reduced-motion: reduce"):
        assert words in style
    assert {e.tag.split("}")[1] for e in root.iter()} == {
        "svg", "title", "style", "rect", "text", "g", "path"}
    assert "url(" not in style and "@import" not in style and "@font-face" not in style


@pytest.mark.parametrize("name, verdicts, most", [
    ("denoising", ["wrong", "right"], 60_000), ("story", ["wrong", "right"], 120_000)])
def test_the_pictures_in_docs_are_of_this_format(name, verdicts, most):
    """The shipped pictures are read by the same eyes: two panels, and what became of each."""
    file = ROOT / "docs" / f"{name}.svg"
    panels = parts(ElementTree.parse(file).getroot(), "g")
    assert [panel.get("id") for panel in panels] == list(TITLES)
    assert [panel.find("{*}path").get("class") for panel in panels] == verdicts
    assert file.stat().st_size < most


@pytest.mark.parametrize("argv, word", [
    (["--memory", "none.safetensors"], "none.safetensors"), ([], "--memory"),
    (["--memory", MEMORY, "--task", "chess"], "chess"),
    (["--memory", MEMORY, "--task", "sudoku", "--prompt", "1... 2..."], "sudoku"),
    (["--memory", MEMORY, "--task", "follow", "--prompt", "a text"], "follow"),
    (["--memory", MEMORY, "--task", "stories", "--prompt", "Once"], "trained on sudoku, chain"),
    (["--memory", MEMORY, "--seed", "1", "--prompt", "a text"], "--seed"),
    (["--memory", MEMORY, "--steps", "0"], "--steps")], ids=str)
def test_arguments_that_make_no_sense(argv, word, capsys):
    """One line and exit code 2."""
    assert picture.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_where_no_prompt_shows_it(tmp_path, monkeypatch, capsys):
    """With a step for every token both are right: the line says what to change."""
    monkeypatch.setattr(picture, "SEEDS", 2)
    out = tmp_path / "picture.svg"
    assert picture.main(["--memory", MEMORY, "--steps", "24", "--out", str(out)]) == 2
    assert "--seed" in capsys.readouterr().err and not out.exists()


def test_what_the_memory_does(tmp_path, capsys):
    """A row for each step, a cell for each slot and each position, as dark as `Watched` says."""
    out = tmp_path / "slots.svg"
    argv = ["--slots", "--steps", "3", "--task", "sums", "--out", str(out), "--device", "cpu"]
    assert picture.main(["--memory", MEMORY, *argv]) == 0
    shades = [float(x) for x in re.findall(r'fill-opacity="([\d.]+)"', out.read_text())]
    assert len(shades) == 3 * (24 + 24) and max(shades) == 1 and min(shades) >= 0
    backbone, tokenizer = load("tiny", "cpu")
    prompt = draw("sums", random.Random(0), held_out=True)[0]
    steps = picture.slot_steps(backbone, tokenizer, prompt, 24, 3, MetaState.load(MEMORY, backbone))
    most = max(x for step in steps for x in step["slots"])
    assert shades[:24] == pytest.approx([x / most for x in steps[0]["slots"]], abs=1e-3)
    assert shades[-24:] == pytest.approx(steps[-1]["sure"], abs=1e-3)
