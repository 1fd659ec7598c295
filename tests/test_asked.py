"""What a user asks of the models that come along: a beginning of a story, a puzzle of one's own, a
text that they do not know."""
from __future__ import annotations

import random
import re

import pytest

import sample
from lib.asked import Asked, share, understood, usual_model
from lib.cli import InputError
from lib.hub import CHECKPOINTS
from tasks import TASKS, draw

PUZZLES = ("sudoku", "chain", "follow", "sums")
OWN = {"sudoku": "1... .2.. ..3. .4..", "chain": "b=a+1 a=3 c=b+3 d=c+1 f=e+2 e=d+1",
       "follow": "c a>b b>a c>d d>c e>f f>e g>h h>g", "sums": "0 1 2 3 4 5 6 7 8 9 1 2"}


def asked(text: str, *names: str) -> Asked:
    return understood(text, "model", TASKS, names or PUZZLES)


# ------------------------------------------------------------------ puzzles
@pytest.mark.parametrize("name", PUZZLES)
def test_a_puzzle_of_the_task_is_read_as_it_is(name):
    """What `make` writes, and the same with other blanks between."""
    rng = random.Random(name)
    for _ in range(50):
        prompt, answer = draw(name, rng, True)
        for text in (prompt, prompt.replace("\n", " "), "\n " + prompt.replace(" ", "\n\n"),
                     prompt.replace("\n", "\\n").capitalize() if name == "sudoku" else prompt,
                     prompt.replace(name, name + ":", 1)):
            found = asked(text)
            assert (found.prompt, found.task, found.hint, found.lead) == (
                prompt, TASKS[name], "", "")
        assert found.verdict(answer) == (True, "right", set())
        assert found.verdict(answer[:-1]) == (False, "wrong", set())


@pytest.mark.parametrize("name", PUZZLES)
def test_a_broken_puzzle_names_the_format(name):
    """A word too few or too many, a word twice in place of another, one that is none."""
    words = OWN[name].split()
    assert asked(f"{name} {OWN[name]}").task is TASKS[name]
    assert usual_model(f"{name}\n{OWN[name]}", None, None) == "tiny"
    wrong = [words[:-1], [*words, words[-1]], [], ["?", *words[1:]], [words[0], *words[2:], "x"]]
    wrong += [[*words[:-1], words[1]]] if name in ("chain", "follow") else []
    for broken in wrong:
        with pytest.raises(InputError, match=f"^{name}: write '{name}' and then "):
            asked(" ".join([name, *broken]))


@pytest.mark.parametrize("chain", ["a=b+1 b=a+1 c=1 d=c+1 e=d+1 f=e+1",
                                   "a=1 b=2 c=b+1 d=c+1 e=d+1 f=e+1",
                                   "a=1 b=a+1 c=a+1 d=c+1 e=d+1 f=e+1",
                                   "a=a+1 b=a+1 c=b+1 d=c+1 e=d+1 f=e+1"])
def test_a_chain_without_an_end_is_refused(chain):
    """A circle, two beginnings, a fork: the order of the answer would be anyone's guess."""
    with pytest.raises(InputError, match="^chain: "):
        asked(f"chain {chain}")


def test_a_sudoku_without_a_solution_is_refused():
    """One with several is not, and their number is said."""
    with pytest.raises(InputError, match="^sudoku: this one has no solution"):
        asked("sudoku 11.. .... .... ....")
    assert asked("sudoku " + 4 * ".... ").hint.startswith("model: 288 solutions")


def test_the_model_that_is_meant():
    """Where none is named: by the memory's folder, the task, the puzzle, or that there is a
    prompt."""
    tiny, soft = (str(CHECKPOINTS[name] / "metastate.safetensors") for name in ("tiny", "soft"))
    for model, *said in (("tiny", None, None, None), ("tiny", None, "sums", None),
                         ("stories", None, "stories", None), ("haystack", None, "needle2-64", None),
                         ("stories", "Once", None, None), ("stories", "Sumsy", None, None),
                         ("halves", None, "halves", None), ("soft", None, "halves", soft),
                         ("sudoku6-hard", "sudoku6 1", None, None),
                         ("sudoku6-hard", None, "sudoku6-hard", None),
                         ("tiny", "Sums: 1", None, None), ("tiny", "Once", None, tiny),
                         ("stories", "Once", None, "elsewhere.safetensors")):
        assert usual_model(*said) == model


def test_another_text_is_none_of_the_puzzles():
    """It is left as it is, nothing judges it, and what the model knows is said."""
    for text in ("hello", "Sudoku?", "sudokus 1", "Once upon a time", "sums2", "\x00"):
        found = asked(text)
        assert (found.prompt, found.task, found.lead) == (text, None, "")
        assert "sudoku, chain, follow, sums" in found.hint
    assert understood("hello", "llada-8b", TASKS, []) == Asked("hello")
    assert understood("hello", "mine", TASKS, ["unknown"]) == Asked("hello")
    assert "track4-64" in asked("hello", "track4-64").hint


# ------------------------------------------------------------------ stories
def test_a_beginning_is_gone_on_with():
    """Judged with it; what is wrong is named."""
    found = asked("Lily had a red kite.", "stories")
    assert found.lead == found.prompt == "Lily had a red kite." and found.hint == ""
    right, words, kinds = found.verdict(" One day, Lily took it. And Lily loved her blue kite "
                                        "more than ever.")
    assert not right and words.startswith("wrong: none of its sentences: One day, Lily took it.; "
                                          "colour: blue; at the wrong point: And Lily")
    assert kinds == {"none of its sentences", "colour", "at the wrong point"}
    assert found.verdict("") == (False, "wrong: no end", {"no end"})


@pytest.mark.parametrize("text, unknown", [
    ("There was a dragon", "dragon"), ("Once upon a time", ""), ("2 + 2 = 4, Tom?", "2, 4"),
    ("LILY ran", ""), ("Once upon a ti", ""), ("Once upon a ti ", "ti"), ("Upon dra", "dra"),
    ("\U0001f409", "\U0001f409")])
def test_words_that_no_story_has_are_named(text, unknown):
    """Once each, on the way to a story of its own."""
    hint = asked(text, "stories").hint
    assert bool(hint) == bool(unknown) and f"include {unknown}:" in hint or not unknown


# ------------------------------------------------------------------ the command
def told(capsys, *argv: str) -> tuple[list[str], str]:
    assert sample.main([*argv, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


def test_a_prompt_goes_to_the_stories(capsys):
    """The whole of it stands there, judged, and a model is chosen that can go on with it."""
    lines, err = told(capsys, "--prompt", "Once upon a time", "--steps", "20")
    assert lines[-3].startswith("Once upon a time") and re.match("right|wrong: ", lines[-1])
    assert err == ""
    lines, err = told(capsys, "--prompt", "There was a dragon", "--steps", "20", "--quiet")
    assert len(lines) == 1 and "dragon" not in lines[0] and "do not include dragon" in err


def test_a_puzzle_of_ones_own_is_solved(capsys):
    """And judged."""
    lines, _ = told(capsys, "--ckpt", "tiny", "--prompt", "sudoku " + OWN["sudoku"])
    assert lines[:2] == ["sudoku", "1..."] and lines[-1] == "right"
    lines, err = told(capsys, "--ckpt", "tiny", "--prompt", "hello", "--quiet")
    assert "tiny was trained on sudoku" in err


def test_a_file_of_what_a_model_does_not_know(tmp_path, capsys):
    """How many lines are none of its tasks, said once; those of its tasks are not mentioned, and a
    model that goes on with anything says nothing."""
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\n{\"prompt\": \"sums\\n" + OWN["sums"] + "\"}\nsums 1 2\n")
    _, err = told(capsys, "--prompts", str(file))
    assert "2 of 3 prompts are none of sudoku, chain, follow, sums, and the model knows" in err
    file.write_text("sums\\n" + OWN["sums"] + "\n")
    for more in ([], ["--ckpt", "stories", "--steps", "5"]):
        assert "prompts are none" not in told(capsys, "--prompts", str(file), *more)[1]


def test_a_task_that_the_model_never_saw(capsys):
    """It is tried, and a line says what the model was trained on."""
    lines, err = told(capsys, "--task", "hops", "--steps", "3")
    assert lines[-1] == "wrong"
    assert "tiny was not trained on hops, but on sudoku, chain, follow, sums" in err
    _, err = told(capsys, "--task", "halves", "--steps", "3")
    assert "was not trained" not in err


def test_several_answers_are_counted(capsys):
    """Held-out puzzles, or draws for one prompt; shares with their interval."""
    lines, _ = told(capsys, "--number", "3", "--task", "chain")
    assert lines.count("right") + lines.count("wrong") == 3 and lines.count("chain") == 3
    assert lines[-1] == share(lines.count("right"), 3)
    lines, _ = told(capsys, "--number", "2", "--prompt", "sums " + OWN["sums"], "--temperature",
                    "9", "--ckpt", "tiny")
    assert lines[-1].startswith(f"{lines.count('right')} of 2 right") and lines[0] == "sums"
    for alone in (["--prompt", "Once"], ["--prompts", __file__], ["--chat"]):
        assert sample.main(["--number", "2", *alone]) == 2
        assert "--number is for a task" in capsys.readouterr().err
    assert share(2, 2) == "2 of 2 right: 100% (34 to 100)"
    assert share(1, 2, {"name": 1, "colour": 3, "owner": 1}).endswith("; wrong: colour 3, name 1, "
                                                                      "owner 1")


def test_what_is_wrong_is_counted(capsys):
    """Stories, not mentions: each kind once for a story that has it."""
    lines, _ = told(capsys, "--number", "3", "--ckpt", "stories", "--steps", "5")
    faults = [{fault.partition(":")[0] for fault in line.removeprefix("wrong: ").split("; ")}
              for line in lines if line.startswith("wrong: ")]
    kinds = dict(part.rsplit(" ", 1) for part in lines[-1].partition("; wrong: ")[2].split(", "))
    assert faults and kinds == {kind: str(sum(kind in found for found in faults))
                                for kind in set().union(*faults)}
