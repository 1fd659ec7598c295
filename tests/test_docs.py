"""README.md and docs/: every command in them parses, every reference to a file and line finds what
it names, every link leads somewhere, and Python compiles. Nothing is run.

A block ```sh may hold `python …`, `torchrun …` and `make …`, comments, continued lines, `&&`,
pipes, variables and loops. A reference is `file.py:123`, of which the line in question has to hold
one of the names in backticks beside it, or a link, [`Name`](file.py#L123), whose line has to hold
Name."""
from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import re
import shlex
from pathlib import Path
from typing import Iterator

import pytest
from conftest import ROOT

from lib.bench_options import bench_parser
from lib.cli import InputError
from tasks import TASKS

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)
NOT_OURS = {"pytest", "pip", "venv", "json.tool", "http.server"}  # run by python -m


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> Iterator[str]:
    """The insides of fenced blocks of these languages."""
    yield from (inside for language, inside in FENCE.findall(text) if language in languages)


# ------------------------------------------------------------------ from shell to arguments
def commands(block: str) -> Iterator[list[str]]:
    """The words of every simple command in a shell block: a loop's once for each of its values, and
    without redirections and what stands before the program."""
    values: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        line = re.sub(r"\$\([^)]*\)", "0", re.sub(r"\s\d?>&\d|\s2>\s*\S+", " ", line))
        values |= {name: shlex.split(found) for name, found in
                   re.findall(r"\bfor +(\w+) +in +([^;]*)", line)}
        values |= {name: [found.strip("\"'")] for name, found in re.findall(
            r"(?:^|[;&]) *(?:export +)?(\w+)=(\"[^\"]*\"|'[^']*'|[^\s;]+)", line)}
        used, seen = dict.fromkeys(re.findall(r"\$\{?(\w+)", line)), []
        assert used.keys() <= values.keys(), f"{line}: a variable without a value"
        for chosen in itertools.product(*(values[name] for name in used)):
            given = dict(zip(used, chosen))
            found = [*simple(re.sub(r"\$\{?(\w+)\}?", lambda name: given[name[1]], line))]
            yield from (words for words in found if words not in seen)
            seen += found


def simple(line: str) -> Iterator[list[str]]:
    """The commands of one line whose variables have their values."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set(";&|()"):
            words = program_of(words)
            if words and words[0] not in ("for", "done", "if", "fi"):
                yield words
            words = []
        else:
            words.append(word)


def program_of(words: list[str]) -> list[str]:
    """A command from its program on."""
    for i in reversed(range(len(words))):
        if words[i] and set(words[i]) <= set("<>"):
            del words[i:i + 2]
    while words and (re.fullmatch(r"\w+=.*|do|then|else|time|env|nohup|exec|\$", words[0])
                     or words[0] == "nice"):
        del words[:3 if words[:2] == ["nice", "-n"] else 1]
    return words


def asked_of_python(words: list[str]) -> tuple[str, list[str]] | None:
    """(dotted module, its arguments) of a command that runs one of ours; None for all others."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "torchrun":
        while rest and rest[0].startswith("-") and rest[0] not in ("-m", "--module"):
            alone = "=" in rest[0] or rest[0] in ("--standalone", "--no-python")
            del rest[:1 if alone else 2]
    elif not re.fullmatch(r"python[\d.]*", program):
        assert not any(re.fullmatch(r"(\./)?\w+\.py", word) for word in words[:1]), words
        return None
    while rest and rest[0] in ("-u", "-O", "-B"):
        del rest[0]
    if rest[:1] == ["-c"]:
        compile(rest[1], "-c", "exec")
        return None
    if rest[:1] in (["-m"], ["--module"]):
        return None if rest[1] in NOT_OURS else (rest[1], rest[2:])
    assert rest and rest[0].endswith(".py"), f"{words}: runs neither a file nor a module"
    assert (ROOT / rest[0]).is_file(), f"{words}: there is no {rest[0]}"
    return rest[0].removesuffix(".py").replace("/", "."), rest[1:]


def parser_of(module: str) -> argparse.ArgumentParser:
    """What takes a command's arguments."""
    if module == "bench":
        return bench_parser("", TASKS)
    return importlib.import_module(module).parser()


def parse(words: list[str]) -> None:
    """Hand a command's arguments to its own parser, or a target to the Makefile."""
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            name, assigned, _ = word.partition("=")
            pattern = rf"^{name} *[?:]?=" if assigned else rf"^{name}:"
            assert re.search(pattern, makefile, re.M), f"{words}: the Makefile has no {name}"
    elif asked := asked_of_python(words):
        try:
            parser_of(asked[0]).parse_args(asked[1])
        except InputError as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error
        except SystemExit as end:  # --help
            assert end.code == 0


BLOCK = r"""
python sample.py                        # a comment; with `python nonsense.py`
python sample.py --prompt "Why is # the sky && blue?" \
    --steps 6   # continued
$ .venv/bin/python sample.py --prompts q.txt --batch-size 2 > a.jsonl 2> log && make test VENV=/x
for seed in 0 1; do python train.py --seed $seed --out out/m$seed; done
for seed in 3 4
do
    OMP_NUM_THREADS=1 nice -n 5 torchrun --nproc-per-node 2 train.py --seed ${seed} | tail -n 1
done
CKPT=llada-8b
torchrun --standalone --nproc-per-node=2 -m studies.pretrain tiny --ckpt "$CKPT" 2>&1 | tee log
pip install -r requirements.txt; python -m pytest -q tests; (cd out && ls)
"""


def test_what_is_read_from_a_block():
    """Comments, quotes, continued lines, lists, pipes, redirections, variables, loops, prefixes."""
    found = [*commands(BLOCK)]
    assert found == [shlex.split(line) for line in """
        python sample.py
        python sample.py --prompt 'Why is # the sky && blue?' --steps 6
        .venv/bin/python sample.py --prompts q.txt --batch-size 2
        make test VENV=/x
        python train.py --seed 0 --out out/m0
        python train.py --seed 1 --out out/m1
        torchrun --nproc-per-node 2 train.py --seed 3
        tail -n 1
        torchrun --nproc-per-node 2 train.py --seed 4
        torchrun --standalone --nproc-per-node=2 -m studies.pretrain tiny --ckpt llada-8b
        tee log
        pip install -r requirements.txt
        python -m pytest -q tests
        cd out
        ls""".strip().splitlines()]
    assert [asked for words in found if (asked := asked_of_python(words))] == [
        ("sample", []), ("sample", ["--prompt", "Why is # the sky && blue?", "--steps", "6"]),
        ("sample", ["--prompts", "q.txt", "--batch-size", "2"]),
        ("train", ["--seed", "0", "--out", "out/m0"]),
        ("train", ["--seed", "1", "--out", "out/m1"]),
        ("train", ["--seed", "3"]), ("train", ["--seed", "4"]),
        ("studies.pretrain", ["tiny", "--ckpt", "llada-8b"])]


@pytest.mark.parametrize("line", [
    "python bench.py", "python sample.py --nosuch", "python sampel.py", "python -m studies.nosuch",
    "make nosuch", "make test NOSUCH=1", "python sample.py --task chess",
    "torchrun --nproc-per-node 2 train.py 3",
    "cd out && python train.py --steps x", "for n in 1 x; do python train.py --steps $n; done"])
def test_what_is_found_wrong(line):
    """A command that its own parser does not take, or that is not there."""
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        for words in commands(line):
            parse(words)


@EVERY_PAGE
def test_commands_parse(page):
    """Each with its own parser."""
    for block in blocks(text_of(page), "sh", "bash", "shell", "console"):
        for words in commands(block):
            parse(words)


# ------------------------------------------------------------------ references
def prose(text: str) -> str:
    """A page without what stands in fences."""
    return FENCE.sub("", text)


def wrong_references(text: str, folder: Path) -> list[str]:
    """References of a page in a folder to files and lines that are not there, or on which nothing
    of the name stands."""
    wrong = []
    link = re.compile(r"\[([^\]]*)\]\(([^)#\s]*\.py)#L(\d+)(?:-L?(\d+))?\)")
    plain = re.compile(r"(?<![\w/#.-])((?:\.\./)*[\w/]+\.py):(\d+)(?:-(\d+))?\b")
    for paragraph in re.split(r"\n\s*\n|\n(?=[|*-])", text):
        beside = [word for word in re.findall(r"`([^`\n]+)`", paragraph) if ".py" not in word]
        for label, path, first, last in link.findall(paragraph):
            names = words_of([label]) or words_of(beside)
            if not stands(folder / path, names, int(first), int(last or first)):
                wrong.append(f"[{label}]({path}#L{first})")
        for path, first, last in plain.findall(link.sub(r"\1", paragraph)):
            found = [place / path for place in (ROOT, folder) if (place / path).is_file()]
            if not found or not stands(found[0], words_of(beside), int(first), int(last or first)):
                if f"[{path}:{first}]" not in paragraph:  # a link's label, seen to above
                    wrong.append(f"{path}:{first}")
    return wrong


def words_of(labels: list[str]) -> list[str]:
    """The names in labels: of `Memory.inject(e, s)` it is inject."""
    plain = [re.sub(r"\(.*", "", label.strip("`* ")) for label in labels if ".py" not in label]
    return [word.split(".")[-1] for label in plain for word in re.findall(r"[\w.]+", label)]


def stands(path: Path, names: list[str], first: int, last: int) -> bool:
    """Whether one of the names, where there are any, stands on a file's line."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    if not 1 <= first <= last <= len(lines) or not lines[first - 1].strip():
        return False
    return not names or any(re.search(rf"\b{re.escape(name)}\b", lines[first - 1])
                            for name in names)


def test_what_a_reference_has_to_hold(tmp_path):
    """The name of a link on its very line, one of those beside a plain one."""
    (tmp_path / "x.py").write_text("import y\n\n\nclass Thing:\n    def act(self):\n        pass\n")
    right = """The [`Thing`](x.py#L4) does [`Thing.act(it)`](x.py#L5-L6), see x.py:4 or `x.py:5`.

| `act` | x.py:5 |
| its [class Thing](x.py#L4), [x.py:4](x.py#L4) of a `Thing` |

Imports: x.py:1"""
    assert wrong_references(right, tmp_path) == []
    for wrong in ("[`Thing`](x.py#L5)", "[`act`](x.py#L4)", "[`Thing`](x.py#L3)",
                  "[`act`](x.py#L99)", "[`Thing`](z.py#L4)", "x.py:2", "x.py:99", "z.py:1",
                  "`act` in x.py:4", "[x.py:5](x.py#L5) of a `Thing`", "[`act`](x.py#L5-L99)"):
        assert wrong_references(wrong, tmp_path) != [], wrong


@EVERY_PAGE
def test_references_find_what_they_name(page):
    """Lines move: this test says which references have to follow."""
    assert wrong_references(prose(text_of(page)), (ROOT / page).parent) == []


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to headings."""
    titles = re.findall(r"^#+ +(.+?) *#*$", prose(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY_PAGE
def test_links_lead_somewhere(page):
    """Files and pictures that are there, headings that exist; what is on the network is not
    asked for."""
    text, here = prose(text_of(page)), ROOT / page
    targets = re.findall(r"\]\(<?([^)\s>]+)[^)]*\)", text)
    targets += re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.M)
    targets += re.findall(r"(?:src|srcset|href)=[\"']([^\"'\s]+)", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (here.parent / path).resolve() if path else here
        assert found.exists() and found.is_relative_to(ROOT), target
        if found.suffix == ".md" and anchor:
            assert anchor in anchors(found), target


# ------------------------------------------------------------------ Python
@EVERY_PAGE
def test_python_compiles(page):
    """And what it imports of ours is there."""
    for block in blocks(text_of(page), "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").is_file():
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_readmes_python_does_what_it_says(capsys, monkeypatch):
    """Run as it stands there: an answer, a batch, the steps of one, and gaps that are filled."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    [snippet] = blocks(text_of("README.md"), "python")
    exec(compile(snippet, "README.md", "exec"), {})
    answer, batch, *steps, filled = capsys.readouterr().out.splitlines()
    assert answer == "1 3 6 0 5 1 8 6 5 6 8 1 24"
    assert batch == "['1 3 6 0 5 1 8 6 5 6 8 1', '3 4 8 9 4 3 5 1 6 9 4 2']"
    assert len(steps) == 24 and filled == "True"
