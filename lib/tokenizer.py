"""Text and chats to ids and back, in LLaDA's and in Dream's chat format."""
from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from lib.cli import require
from lib.vocabulary import chat_trained, library, read_vocabulary, silenced


class Tokenizer:
    """Text and chats to ids and back. LLaDA ships a tokenizer.json; Dream ships the parts of
    Qwen2's byte-level BPE, from which the same is built here.

    chat: whether the model was trained on the chat format whose markers the vocabulary has (a base
    and a chat model may share one vocabulary)."""

    def __init__(self, core: tokenizers.Tokenizer, chat: bool = True,
                 vocab: dict[str, int] | None = None):
        self.core = core
        self.vocab: dict[str, int] = vocab or core.get_vocab(with_added_tokens=True)
        # True when the markers of a chat format are tokens of their own, and mean something
        self.is_chat = chat and any(
            t in self.vocab for t in ("<|im_start|>", "<|start_header_id|>"))

    @classmethod
    def found_in(cls, folder: Path, rows: int, name: str | Path = "") -> Tokenizer | None:
        """The tokenizer of a checkpoint whose embedding has so many rows, None where it has none.
        name: what the checkpoint was asked for by. Raises `InputError` when it is broken or has ids
        beyond the rows."""
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            return None
        tokenizer = cls.from_folder(folder, name)
        largest = max(tokenizer.vocab.values(), default=0)
        require(largest < rows, f"{folder}: the tokenizer has id {largest}, the model only {rows} "
                "rows")
        return tokenizer

    @classmethod
    def from_folder(cls, path: str | Path, name: str | Path = "") -> Tokenizer:
        """From tokenizer.json, else from vocab.json, merges.txt and what tokenizer_config.json or
        added_tokens.json add. Raises `InputError` when neither is there, or a file is broken."""
        core, vocab = read_vocabulary(Path(path))
        return cls(core, chat_trained(Path(path), name), vocab)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it is: nothing is put in front; special tokens written out count."""
        with library(f"{text[:40]!r} cannot be encoded (is it Unicode?)"), silenced():
            return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special: bool = False) -> str:
        """Text of a list (or 1-d tensor) of ids, special tokens included unless skipped."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        with library("an answer cannot be decoded"), silenced():
            return self.core.decode(ids, skip_special_tokens=skip_special)

    @property
    def end_of_turn(self) -> str:
        """The marker behind a message in the chat format, "" where there is none."""
        markers = ("<|im_end|>", "<|eot_id|>") if self.is_chat else ()
        return next((t for t in markers if t in self.vocab), "")

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation, as `chat_text` writes it."""
        return self.encode(self.chat_text(messages))

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """A conversation, [{"role": ..., "content": ...}, ...], up to where the assistant's next
        words go. Dream's ChatML where the vocabulary has `<|im_start|>`, else LLaDA's format; each
        as the published templates have it."""
        _check(messages)
        if "<|im_start|>" in self.vocab:
            if not messages or messages[0]["role"] != "system":
                default = {"role": "system", "content": "You are a helpful assistant."}
                messages = [default, *messages]
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return "".join(turns) + "<|im_start|>assistant\n"
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        turns = [header.format(m["role"]) + m["content"].strip() + "<|eot_id|>" for m in messages]
        return "<|startoftext|>" + "".join(turns) + header.format("assistant")

    def prompt(self, prompt: str | list[dict[str, str]], raw: bool = False) -> list[int]:
        """Ids of a prompt: messages, or a text, which becomes a user's message where there is a
        chat format and `raw` does not forbid it. Without a chat format messages are their contents,
        with a blank line between two: one message is what its text alone is. Raises `InputError`
        for an empty text."""
        if isinstance(prompt, list):
            if self.is_chat:
                return self.chat(prompt)
            prompt, raw = "\n\n".join(message["content"] for message in _check(prompt)), True
        require(bool(prompt.strip()), "the prompt is empty")
        if raw or not self.is_chat:
            return self.encode(prompt)
        return self.chat([{"role": "user", "content": prompt}])

    def answer(self, text: str) -> list[int]:
        """Ids of an answer behind `prompt`, as they would stand in a longer conversation: in
        LLaDA's format without the blanks around it."""
        if self.is_chat and "<|im_start|>" not in self.vocab:
            text = text.strip()
        require(bool(text), "the answer is empty")
        return self.encode(text + self.end_of_turn)


def stand_in(ckpt: str, rows: int) -> Tokenizer | None:
    """For random weights with an embedding of so many rows, to which no token means anything: one
    for each byte. None for other checkpoints."""
    if not ckpt.startswith("random:") or rows < 256:
        return None
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())                        # of 256 bytes
    core = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return Tokenizer(core)


def needed(tokenizer: Tokenizer | None, ckpt: str) -> Tokenizer:
    """The tokenizer, or an `InputError` where a checkpoint has none."""
    require(tokenizer is not None, f"{ckpt} has no tokenizer, so a text can neither be read nor "
            "written")
    return tokenizer


def _check(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    for message in messages:
        require(isinstance(message, dict) and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str),
                f"a message needs a role and a content, both text: {message!r}")
    return messages
