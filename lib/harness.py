"""What lm-eval (github.com/EleutherAI/lm-evaluation-harness) asks of a language model, answered by
a masked diffusion model: texts until a stop string, and log-likelihoods. lm-eval itself is
optional; only `lm_eval_model` imports it."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Callable, Iterator

import torch

from lib.answers import Ends, Store, held, stop_tokens
from lib.cli import require
from lib.data import left_pad
from lib.likelihood import log_likelihood, masked_losses
from lib.progress import progress
from lib.run import everyone
from lib.settings import Setting
from lib.templates import special_text
from lib.terminal import note
from lib.tokenizer import Tokenizer


class Adapter:
    """Answers requests in their order, by `generate` and `denoise` of a backbone, without or with a
    memory, as .setting says.

    identity: what tells this model from others in `store`; template: messages -> text; a row's
    randomness comes from the seed and the request, so that no answer depends on its batch."""

    def __init__(self, backbone, tokenizer: Tokenizer, folder: Path, generate: Callable,
                 denoise: Callable, store: Store, identity: str, template: Callable[[list], str],
                 memory=None, batch_size: int = 1, seed: int = 0, greedy: bool = False):
        self.backbone, self.tokenizer, self.memory = backbone, tokenizer, memory
        self.generate, self.denoise, self.store, self.template = generate, denoise, store, template
        self.identity, self.batch_size, self.seed, self.greedy = identity, batch_size, seed, greedy
        self.device = backbone.embedding.weight.device
        self.bos = tokenizer.vocab.get(special_text(folder, "bos_token"))
        self.stops = stop_tokens(folder, tokenizer, backbone.config.eos_id)
        self.setting, self.shortened = Setting(""), 0

    def key(self, *request) -> str:
        """What a result is known by: the model, the setting and the request."""
        text = json.dumps([self.identity, self.seed, repr(self.setting), *request])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with BOS in front where the setting has it."""
        ids = self.tokenizer.encode(text)
        require(self.backbone.config.mask_id not in ids, "a prompt holds the mask token")
        first = self.setting.bos and not self.setting.chat and self.bos is not None
        return [self.bos, *ids] if first else ids

    def fitted(self, ids: list[int], answer: int) -> list[int]:
        """The end of a prompt that leaves room for so many tokens, as the published code cuts."""
        room = min(self.setting.window, self.backbone.config.max_len) - answer
        room = min(room, self.setting.keep)
        require(room > 0, f"{answer} tokens to answer leave no room for a prompt in the model's "
                f"{self.backbone.config.max_len}")
        self.shortened += len(ids) > room
        return ids[-room:]

    def chat(self, messages: list[dict], open_turn: bool = False) -> str:
        """Messages as text; open_turn: the last one is the beginning of the answer."""
        last = messages[-1]["content"] if open_turn else ""
        return self.template(messages[:-1] if open_turn else messages) + last

    def generate_until(self, requests: list[tuple[str, dict]]) -> list[str]:
        """Answers to (context, {"until": stop strings, ...})."""
        prompts, until, self.shortened = [], [], 0
        for context, options in requests:
            stops = options.get("until") or []
            until.append(tuple(u for u in ([stops] if isinstance(stops, str) else stops) if u))
            prompts.append(self.fitted(self.encode(context), self.setting.length))
        self.say_shortened(len(requests))
        keys = [self.key("generate", ids, stops) for ids, stops in zip(prompts, until)]
        wanted = {key: i for i, key in reversed([*enumerate(keys)])}  # each once
        for batch in self.missing(wanted, prompts, "answers"):
            ids, pad = left_pad([prompts[i] for i in batch.values()], self.backbone.config.pad_id,
                                self.device)
            ends = Ends(self.tokenizer, self.backbone.config.mask_id, self.stops,
                        [until[i] for i in batch.values()], ids.shape[1])
            generators = [torch.Generator(self.device).manual_seed(int(key[:15], 16))
                          for key in batch]
            sample = self.generate(
                self.backbone, ids, pad_mask=pad, memory=self.memory, generator=generators,
                on_step=ends, **self.setting.decoding(), **held(
                    self.setting.hold, self.backbone.config.eos_id, self.tokenizer, self.device))
            answers = sample.ids[:, ids.shape[1]:].tolist()
            self.store.add({key: ends.cut(i, row) for i, (key, row) in
                            enumerate(zip(batch, answers))})
        return [self.store.known[key] for key in keys]

    def missing(self, wanted: dict[str, int], prompts: list[list[int]],
                what: str) -> Iterator[dict[str, int]]:
        """Batches of what is not in the store, similar lengths together and the longest of each
        window first. The batches are those of a run from the start, so that one that was killed
        computes the very same."""
        keys, window, batches = list(wanted), 32 * self.batch_size, []
        for start in range(0, len(keys), window):
            part = sorted(keys[start:start + window], key=lambda k: -len(prompts[wanted[k]]))
            batches += [part[i:i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        todo = [b for b in batches if not all(key in self.store.known for key in b)]
        if len(todo) < len(batches):
            note(f"{len(batches) - len(todo)} of {len(batches)} batches of {what} are known")
        for batch in progress(todo, f"batches of {what}", len(batches) - len(todo)):
            yield {key: wanted[key] for key in batch}

    def say_shortened(self, number: int) -> None:
        """One line on the prompts that were cut."""
        if self.shortened:
            note(f"{self.shortened} of {number} prompts are too long and cut on the left")

    # -------------------------------------------------------------- likelihoods
    def loglikelihood(self, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding writes, False unless asked for) of
        (context, continuation)."""
        if self.setting.chat:
            note("likelihoods are meant for base models, says LLaDA's issue 103; this is a chat "
                 "model")
        self.shortened, config = 0, self.backbone.config
        pairs = []
        for context, target in requests:
            blanks = len(context) - len(context.rstrip())
            both = self.encode(context + target)
            count = len(both) - len(self.encode(context[:len(context) - blanks]))
            require(count > 0, f"no token of its own is left of {target[:40]!r}")
            tail = [config.eos_id] if config.family == "dream" else []  # never masked nor scored
            pairs.append((self.fitted(both[:-count], count + len(tail)), both[-count:], tail))
        self.say_shortened(len(requests))
        keys = [self.key("likelihood", self.greedy, *pair) for pair in pairs]
        wanted = {key: i for i, key in reversed([*enumerate(keys)])}
        for batch in self.missing(wanted, [prompt for prompt, _, _ in pairs], "likelihoods"):
            self.store.add({key: self.score(key, *pairs[i]) for key, i in batch.items()})
        return [tuple(self.store.known[key]) for key in keys]

    def score(self, key: str, prompt: list[int], target: list[int],
              tail: list[int]) -> tuple[float, bool]:
        """The estimate for target behind prompt and in front of tail, from masks of its own."""
        ids = torch.tensor(prompt + target + tail, device=self.device)
        found = log_likelihood(
            lambda mask: masked_losses(self.backbone, self.denoise, ids, len(prompt), mask,
                                       self.memory, self.setting.cfg),
            len(target), self.backbone.config.family, self.setting.mc, self.setting.rows,
            torch.Generator().manual_seed(int(key[:15], 16)))
        if not (self.greedy and prompt):
            return found, False
        T = len(target)
        sample = self.generate(self.backbone, ids[None, :len(prompt)], memory=self.memory,
                               gen_length=T, block_length=T, steps=T)
        return found, sample.ids[0, len(prompt):].tolist() == target


# ------------------------------------------------------------------ lm-eval
def lm_eval_model(adapter: Adapter, rank: int = 0, world: int = 1):
    """The adapter as lm-eval's `LM`; of several processes it shares the examples among them."""
    from lm_eval.api.model import LM

    class Model(LM):
        tokenizer_name = f"metastate-{adapter.identity}"

        def __init__(self):
            super().__init__()
            self._rank, self._world_size, self._device = rank, world, torch.device("cpu")

        def generate_until(self, requests):
            return adapter.generate_until([request.args for request in requests])

        def loglikelihood(self, requests):
            return adapter.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return [found for found, _ in adapter.loglikelihood(
                [("", *request.args) for request in requests])]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return adapter.chat(chat_history, open_turn=not add_generation_prompt)

        def all_gather(self, tensor):
            return torch.stack(everyone(tensor))

        def gather_object(self, obj, dst=0):
            return everyone(obj)

        def barrier(self):
            everyone(None)

    return Model()
