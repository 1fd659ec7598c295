"""Text and chats to ids and back, for LLaDA's tokenizer.json and for the parts that Dream ships."""
from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from lib.cli import InputError, require
from lib.files import read_json

_QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


class Tokenizer:
    """Text and chats to ids and back. LLaDA ships a tokenizer.json; Dream ships the parts of
    Qwen2's byte-level BPE, from which the same is built here."""

    def __init__(self, core: tokenizers.Tokenizer):
        self.core = core
        self.vocab: dict[str, int] = core.get_vocab(with_added_tokens=True)

    @classmethod
    def found_in(cls, folder: Path, rows: int) -> Tokenizer | None:
        """The tokenizer of a checkpoint whose embedding has so many rows, None where it has none.
        Raises `InputError` when it is broken or has ids beyond the rows."""
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return None
        tokenizer = cls.from_folder(folder)
        largest = max(tokenizer.vocab.values(), default=0)
        require(largest < rows, f"{folder}: the tokenizer has id {largest}, the model only {rows} "
                "rows")
        return tokenizer

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From tokenizer.json, else from vocab.json, merges.txt and tokenizer_config.json.
        Raises `InputError` when neither is there, or a file is broken."""
        path = Path(path)
        try:
            if (path / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")))
            for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                require((path / name).is_file(), f"no tokenizer in {path}: tokenizer.json is "
                        f"absent, and so is {name}")
            return cls(cls._byte_level_bpe(path))
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(f"cannot read the tokenizer in {path}: {error}") from error

    @staticmethod
    def _byte_level_bpe(path: Path) -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
            str(path / "vocab.json"), str(path / "merges.txt")))
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
        added = read_json(path / "tokenizer_config.json").get("added_tokens_decoder", {})
        for number, fields in sorted(added.items(), key=lambda item: int(item[0])):
            flags = {k: fields[k] for k in ("single_word", "lstrip", "rstrip", "normalized",
                                            "special") if k in fields}
            token = AddedToken(fields["content"], **flags)
            (core.add_special_tokens if flags.get("special") else core.add_tokens)([token])
            require(core.token_to_id(fields["content"]) == int(number),
                    f"{path}/tokenizer_config.json gives {fields['content']} the id {number}, "
                    "which vocab.json does not leave free")
        return core

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it is: nothing is put in front; special tokens written out count."""
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair, as from bytes that are not UTF-8
            raise InputError(f"the text is not valid Unicode: {text[:40]!r}") from error

    def decode(self, ids, skip_special: bool = False) -> str:
        """Text of a list (or 1-d tensor) of ids, special tokens included unless skipped."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.core.decode(ids, skip_special_tokens=skip_special)

    @property
    def is_chat(self) -> bool:
        """True when the markers of a chat format are tokens of their own (LLaDA-Base: False)."""
        return any(t in self.vocab for t in ("<|im_start|>", "<|start_header_id|>"))

    @property
    def end_of_turn(self) -> str:
        """The marker behind a message in the chat format, "" where there is none."""
        return next((t for t in ("<|im_end|>", "<|eot_id|>") if t in self.vocab), "")

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation, [{"role": ..., "content": ...}, ...], up to where the assistant's
        next words go. Dream's ChatML where the vocabulary has `<|im_start|>`, else LLaDA's format;
        each as the published templates have it."""
        for message in messages:
            require(isinstance(message, dict) and isinstance(message.get("role"), str)
                    and isinstance(message.get("content"), str),
                    f"a message needs a role and a content, both text: {message!r}")
        if "<|im_start|>" in self.vocab:
            if not messages or messages[0]["role"] != "system":
                default = {"role": "system", "content": "You are a helpful assistant."}
                messages = [default, *messages]
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return self.encode("".join(turns) + "<|im_start|>assistant\n")
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        turns = [header.format(m["role"]) + m["content"].strip() + "<|eot_id|>" for m in messages]
        return self.encode("<|startoftext|>" + "".join(turns) + header.format("assistant"))

    def prompt(self, prompt: str | list[dict[str, str]], raw: bool = False) -> list[int]:
        """Ids of a prompt: messages, or a text, which becomes a user's message where there is a
        chat format and `raw` does not forbid it. Raises `InputError` for an empty text."""
        if isinstance(prompt, list):
            return self.chat(prompt)
        require(bool(prompt.strip()), "the prompt is empty")
        if raw or not self.is_chat:
            return self.encode(prompt)
        return self.chat([{"role": "user", "content": prompt}])


def needed(tokenizer: Tokenizer | None, ckpt: str) -> Tokenizer:
    """The tokenizer, or an `InputError` where a checkpoint has none."""
    require(tokenizer is not None, f"{ckpt} has no tokenizer, so a text can neither be read nor "
            "written")
    return tokenizer
