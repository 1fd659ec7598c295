"""The tokens of a checkpoint from its files: LLaDA's tokenizer.json, or the parts of Qwen2's
byte-level BPE that Dream ships; and what the tokenizers library makes of broken ones."""
from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lib.cli import InputError, require
from lib.files import read_json, read_text

_QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


# ------------------------------------------------------------------ a checkpoint's files
def chat_trained(path: Path, name: str | Path = "") -> bool:
    """Whether a checkpoint's own name and files let its chat format be used: not where the name
    says that it is a base model, nor where tokenizer_config.json states no template. name: what it
    was asked for by; the folder's own name counts too, and the repository's in the hub's cache."""
    names = [Path(name).name, path.name, *(p.name for p in path.parents if "models--" in p.name)]
    if any(re.search(r"(?<![a-z])base(?![a-z])", n.lower())
           and not re.search("instruct|chat|sft", n.lower()) for n in names):
        return False
    if any((path / file).is_file() for file in ("chat_template.jinja", "chat_template.json")):
        return True
    config = path / "tokenizer_config.json"
    return not config.is_file() or bool(read_json(config).get("chat_template"))


def read_vocabulary(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """The library's tokenizer and all its tokens' ids, from tokenizer.json, else from vocab.json,
    merges.txt and what is added to them. Raises `InputError` when neither is there, or a file is
    broken."""
    vocab = None
    with library(f"cannot read the tokenizer in {path}"), silenced():
        if (path / "tokenizer.json").is_file():
            check_growth(path / "tokenizer.json")
            core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        else:
            core, vocab = _byte_level_bpe(path)
        add_tokens(core, path)
        core.no_truncation()
        core.no_padding()
        if isinstance(core.model, models.BPE):
            core.model.dropout = None  # of training: a text would have other ids each time
        _try(core)
    return core, vocab or core.get_vocab(with_added_tokens=True)


def check_growth(file: Path, most: float = 1000) -> None:
    """Refuse a tokenizer.json whose Replace steps, one after the other, could make a text more than
    `most` times as long: a few kilobytes of them fill any memory."""
    if file.read_bytes().count(b'"Replace"') < 2:  # published ones have one, if any
        return
    growth, parts = 1.0, [read_json(file)]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict) and part.get("type") == "Replace":
            growth *= max(1, len(part["content"]) / max(1, len(part["pattern"].get("String", ""))))
    require(growth <= most, f"its Replace steps make a text up to {growth:.2g} times as long")


def _byte_level_bpe(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """Qwen2's tokenizer and its vocabulary, with the tokens that are added to it."""
    added = [f for f in ("tokenizer_config.json", "added_tokens.json") if (path / f).is_file()]
    for name in ("vocab.json", "merges.txt", *([] if added else ["tokenizer_config.json"])):
        require((path / name).is_file(), f"no tokenizer in {path}: tokenizer.json is absent, and "
                f"so is {name}")
    vocab = read_json(path / "vocab.json")
    require(all(type(i) is int for i in vocab.values()) and len({*vocab.values()}) == len(vocab),
            f"{path / 'vocab.json'} does not give every token a number of its own")
    text = read_text(path / "merges.txt").replace("\r\n", "\n")
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    extra = stated_tokens(path)
    lost = sorted(t for t in {*vocab} - {x.replace(" ", "") for x in lines} - {*extra}
                  if len(t) > 1)
    require(not lost, f"{path / 'merges.txt'} is cut short: none of its lines makes "
            f"{', '.join(map(repr, lost[:3]))}, in all {len(lost)} tokens of vocab.json")
    core = tokenizers.Tokenizer(models.BPE(vocab, [tuple(line.split(" ")) for line in lines]))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return core, vocab | {content: number for content, (number, _) in extra.items()}


def stated_tokens(path: Path) -> dict[str, tuple[int, dict[str, bool]]]:
    """Token -> (id, flags) that tokenizer_config.json and added_tokens.json add, by ascending id.
    Where only the latter states one, special_tokens_map.json says whether it is special."""
    names = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    config, added, special = (
        read_json(path / name) if (path / name).is_file() else {} for name in names)
    found = {}
    for number, fields in config.get("added_tokens_decoder", {}).items():
        found[fields["content"]] = int(number), {k: fields[k] for k in FLAGS if k in fields}
    named = str({**config, **special})  # in fields of their own, and in lists
    for content, number in added.items():
        require(type(number) is int and found.get(content, (number,))[0] == number,
                f"{path / 'added_tokens.json'} gives {content} the id {number!r}, and "
                "tokenizer_config.json another")
        is_special = repr(content) in named
        found.setdefault(content, (number, {"special": is_special, "normalized": not is_special}))
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def add_tokens(core: tokenizers.Tokenizer, path: Path) -> None:
    """Add the tokens that a folder states beside its vocabulary. Where there is a tokenizer.json
    that counts: what is added are tokens that follow those that it has."""
    whole = (path / "tokenizer.json").is_file()
    for content, (number, flags) in stated_tokens(path).items():
        if whole and (core.token_to_id(content) is not None
                      or number != core.get_vocab_size(with_added_tokens=True)):
            continue
        token = AddedToken(content, **flags)
        (core.add_special_tokens if flags.get("special") else core.add_tokens)([token])
        require(core.token_to_id(content) == number, f"{path} gives {content} the id {number}, "
                "which its vocabulary does not leave free")


# ------------------------------------------------------------------ the library's errors
@contextlib.contextmanager
def library(what: str) -> Iterator[None]:
    """Make whatever the tokenizers library raises an `InputError`, also when its Rust side panics,
    which is no `Exception`."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what Rust writes to the process's own stderr when it panics, its call stack and
    all."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _try(core: tokenizers.Tokenizer) -> None:
    """Let a tokenizer that panics do so now. That it cannot encode one text is no fault."""
    with contextlib.suppress(Exception):
        core.encode("a b\n1", add_special_tokens=False)
    with contextlib.suppress(Exception):
        core.decode(list(range(min(core.get_vocab_size(), 300))))
