"""The house: what the root holds, how long files and functions may get, and that imports point
down, read from the source without running it."""
from __future__ import annotations

import ast
import functools
import subprocess
from typing import Iterator

import pytest
from conftest import ROOT

HEART = ["model.py", "metastate.py", "sample.py", "train.py"]
FOLDERS = ["lib", "tasks", "studies", "checkpoints", "tests", "docs"]
FILES = [*HEART, "bench.py", "README.md", "requirements.txt", "Makefile", "LICENSE", ".gitignore"]
CODE = [*HEART, "bench.py", *(str(path.relative_to(ROOT)) for folder in ("lib", "tasks", "studies")
                              for path in sorted((ROOT / folder).rglob("*.py")))]
TESTS = [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("*.py"))]
EVERY_FILE = pytest.mark.parametrize("name", CODE)

# What a room may import of ours, besides its own: always what lies below it.
BELOW = {"lib": [], "tasks": [], "model": ["lib"], "metastate": ["lib", "model"],
         "sample": ["lib", "tasks", "model", "metastate"],
         "train": ["lib", "tasks", "model", "metastate", "sample"],
         "bench": ["lib", "tasks", "model", "metastate", "sample", "train"]}
BELOW["studies"] = [*BELOW, "bench"]


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


# ------------------------------------------------------------------ what stands where
def test_the_root_holds_what_it_should():
    """The named files and folders are there."""
    assert [name for name in FILES if not (ROOT / name).is_file()] == []
    assert [name for name in FOLDERS if not (ROOT / name).is_dir()] == []


def test_the_root_holds_nothing_else():
    """Of what git keeps; what a user leaves there is the user's."""
    asked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode or not asked.stdout:
        pytest.skip("not a clone of its own")
    found = {name.split("/")[0] for name in asked.stdout.splitlines()
             if (ROOT / name.split("/")[0]).exists()}
    assert found - {*FILES, *FOLDERS, ".ci"} == set()


# ------------------------------------------------------------------ sizes
def test_the_heart_is_read_in_an_afternoon():
    """Four files of at most 1,200 lines, with the bench of at most 1,530."""
    four = sum(len(lines_of(name)) for name in HEART)
    assert four <= 1200 and four + len(lines_of("bench.py")) <= 1530


@pytest.mark.parametrize("name", [name for name in CODE if name.startswith("lib/")])
def test_a_file_of_lib_is_one_concern(name):
    """At most 250 lines."""
    assert len(lines_of(name)) <= 250


def test_the_readme_is_for_one_sitting():
    """At most 220 lines."""
    assert len(lines_of("README.md")) <= 220


@EVERY_FILE
def test_functions_fit_on_a_page(name):
    """At most 80 lines from `def` to the end, docstring included."""
    long = [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(tree_of(name))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno + 1 > 80]
    assert long == []


@pytest.mark.parametrize("name", CODE + TESTS)
def test_lines_are_narrow_and_hold_one_statement(name):
    """At most 100 columns, and each statement begins its line: neither behind a semicolon nor
    behind the colon of the one that it belongs to."""
    lines = lines_of(name)
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []
    assert crowded((ROOT / name).read_text(encoding="utf-8"), tree_of(name)) == []


def crowded(source: str, tree: ast.Module) -> list[int]:
    """The lines on which a statement stands behind another or behind its own header."""
    lines = source.encode().split(b"\n")  # ast counts columns in bytes, and lines at newlines only
    return sorted({node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)
                   and lines[node.lineno - 1][:node.col_offset].strip()})


@pytest.mark.parametrize("source, expected", [
    ("x = 1; y = 2\n", [1]), ("if x: y = 1\n", [1]), ("if x:\n    y = 1\nelse: z = 2\n", [3]),
    ("def f(): ...\n", [1]), ("for x in (1,\n          2): pass\n", [2]),
    ("try:\n    x = 1\nexcept E: pass\n", [3]), ("s = '界'; y = 2\n", [1]),
    ("if x:\n    y = 1\nelif z:\n    y = '; '\n@f\nasync def g():\n    return {a: b}\n", [])])
def test_what_counts_as_crowded(source, expected):
    """What the test above sees."""
    assert crowded(source, ast.parse(source)) == expected


# ------------------------------------------------------------------ imports
def imported(tree: ast.Module) -> Iterator[str]:
    """Every module or name of one that a file imports, dotted, functions looked into as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> str:
    return dotted.removesuffix(".py").replace("/", ".").split(".")[0]


@EVERY_FILE
def test_imports_point_down(name):
    """A file imports of its own room and of those below it, also inside functions."""
    room = room_of(name)
    ours = {room_of(dotted) for dotted in imported(tree_of(name))} & {*BELOW, "tests"}
    assert ours - {room, *BELOW[room]} == set()


def test_there_is_no_circle():
    """Within rooms neither: the files have an order in which each imports earlier ones only."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
               for name in CODE}
    waiting = {module: ({*imported(tree_of(name))} & modules.keys()) - {module}
               for module, name in modules.items()}
    while ready := [module for module, needed in waiting.items() if not needed & waiting.keys()]:
        for module in ready:
            del waiting[module]
    assert waiting == {}


UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "transformers",
          "torch.load", "torch.hub"}


@EVERY_FILE
def test_only_safetensors_and_json_are_read(name):
    """No pickle, no `torch.load`, no transformers, no remote code."""
    tree = tree_of(name)
    found = {*imported(tree)} | {room_of(dotted) for dotted in imported(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.keyword):
            assert node.arg not in ("trust_remote_code", "allow_pickle")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")
    assert found & UNSAFE == set()


# ------------------------------------------------------------------ docstrings
DOCUMENTED_ONCE = ("make", "check", "split_key", "read")  # by the protocol that tasks follow


@EVERY_FILE
def test_public_functions_have_docstrings(name):
    """Modules, classes and functions without an underscore, and methods of more than three
    lines."""
    tree, silent = tree_of(name), []

    def look(parent, method=False):
        for node in parent.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) \
                    or node.name.startswith("_"):
                continue
            short = method and node.end_lineno - node.body[0].lineno < 3
            if not (ast.get_docstring(node) or short or node.name in DOCUMENTED_ONCE):
                silent.append(node.name)
            if isinstance(node, ast.ClassDef):
                look(node, method=True)

    look(tree)
    assert ast.get_docstring(tree) or not tree.body
    assert silent == []
