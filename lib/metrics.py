"""metrics.jsonl: a line of JSON for each step of a training, {"step": ..., figures}; step 0 is what
there was before."""
from __future__ import annotations

from pathlib import Path

from lib.cli import InputError, require
from lib.files import parse_json, read_lines, write_text


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises `InputError` with the number of one that is none."""
    return [_metrics(line, where) for where, line in read_lines(path)]


def keep_up_to(path: Path, step: int) -> None:
    """Drop the metrics that a killed run wrote after its last checkpoint, and whatever is none:
    what the kill cut short, or a disk damaged."""
    if not path.is_file():
        return
    lines, last = [], -1
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = _metrics(line, path)["step"]
        except InputError:
            continue
        if last < found <= step:
            lines.append(line + "\n")
            last = found
    write_text(path, "".join(lines))


def _metrics(line: str, where: str | Path) -> dict:
    """{"step": ..., figures} of a line. Raises `InputError`."""
    fields = parse_json(line, where)
    step = fields.get("step")
    require(type(step) is int and 0 <= step < 2 ** 53, f"{where}: its step is {step!r:.40}")
    for name, value in fields.items():
        require(type(value) in (int, float) and abs(value) < 1e300,
                f"{where}: {name} is {value!r:.40}, which is no number of a training")
    return fields
