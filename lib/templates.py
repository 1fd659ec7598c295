"""Conversations as text: by a checkpoint's own chat template where it has one, else by the
published ones."""
from __future__ import annotations

from pathlib import Path
from typing import Callable

from lib.cli import InputError
from lib.files import read_json, read_text
from lib.terminal import note
from lib.tokenizer import Tokenizer


def stated_template(folder: Path) -> str | None:
    """The Jinja template in a checkpoint's files, None where there is none."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, list):  # of several, by name
                found = {t.get("name"): t.get("template") for t in found}.get("default")
            if isinstance(found, str) and found:
                return found
    return None


def special_text(folder: Path, name: str) -> str:
    """A token that tokenizer_config.json names, such as "bos_token"; "" where it does not."""
    file = folder / "tokenizer_config.json"
    found = read_json(file).get(name) if file.is_file() else None
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def chat_template(folder: Path, tokenizer: Tokenizer) -> Callable[[list[dict]], str]:
    """messages -> text up to where the assistant's next words go. A template is run by Jinja2 (a
    package that lm-eval brings) in its sandbox; where it writes something else than the published
    format, or cannot be run, a line says so."""
    template = stated_template(folder)
    if template is None or not tokenizer.is_chat:
        return tokenizer.chat_text
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        note("without the jinja2 package the checkpoint's own chat template is not used; the "
             "published format stands in")
        return tokenizer.chat_text

    def refuse(message: str) -> None:
        raise InputError(f"the checkpoint's chat template: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    special = {name: special_text(folder, name) for name in ("bos_token", "eos_token")}

    def render(messages: list[dict]) -> str:
        try:
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, **special)
        except InputError:
            raise
        except Exception as error:  # whatever a template makes of Jinja
            raise InputError(f"the checkpoint's chat template cannot be run: {error}") from error

    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]
    if render(probe) != tokenizer.chat_text(probe):
        note("the checkpoint's own chat template differs from the published format, and is used")
    return render
