"""What the tests share: the repository root on the path, the published outputs, small checkpoints
to load, to break and to rig, and a short run to train."""
from __future__ import annotations

import contextlib
import gc
import json
import random
import shutil
import sys
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Callable, Iterator

import pytest
import tokenizers
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402  (the path comes first)
from lib.cli import InputError  # noqa: E402
from lib.published import config_fields  # noqa: E402
from metastate import MetaState  # noqa: E402
from model import Backbone, Config, Tokenizer, load, save  # noqa: E402
from train import fit  # noqa: E402

torch.set_num_threads(1)  # the models are small: two threads on busy cores wait for each other
DATA = ROOT / "tests" / "data"
FAMILIES = ("llada", "dream")
MASK_ID, EOS_ID = 500, 501  # of both oracle checkpoints
P, G = 11, 32               # tokens of prompt and answer in the published samplers' outputs
ABSENT = "<absent>"         # as a config value: leave the key out
STATE, METRICS, MEMORY = "training.safetensors", "metrics.jsonl", "metastate.safetensors"


# ------------------------------------------------------------------ the published outputs
@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Runs a test once for each family."""
    return request.param


@pytest.fixture(scope="session")
def backbones() -> dict[str, Backbone]:
    """The oracle checkpoints, loaded once in float32 on the CPU; not to be edited."""
    return {name: load(DATA / name, "cpu")[0] for name in FAMILIES}


@pytest.fixture
def backbone(backbones, family) -> Backbone:
    """The family's oracle checkpoint; not to be edited."""
    return backbones[family]


@pytest.fixture(scope="session")
def shallows() -> dict[str, Backbone]:
    """The first block alone of the oracle checkpoints, in a third of the time, for what does not
    depend on how many there are; not to be edited."""
    found = {name: load(DATA / name, "cpu")[0] for name in FAMILIES}
    for backbone in found.values():
        backbone.blocks = backbone.blocks[:1]
        backbone.config = replace(backbone.config, layers=1)
    return found


@pytest.fixture
def shallow(shallows, family) -> Backbone:
    """The family's oracle checkpoint with one block; not to be edited."""
    return shallows[family]


@pytest.fixture(scope="session")
def oracles() -> dict[str, dict[str, torch.Tensor]]:
    """What the published modelling code gives, by family."""
    return {name: load_file(DATA / name / "oracle.safetensors") for name in FAMILIES}


@pytest.fixture
def oracle(oracles, family) -> dict[str, torch.Tensor]:
    """What the family's published modelling code gives."""
    return oracles[family]


@pytest.fixture(scope="session")
def published() -> dict[str, dict[str, torch.Tensor]]:
    """What the published samplers write, by family."""
    return {name: load_file(DATA / name / "generate.safetensors") for name in FAMILIES}


# ------------------------------------------------------------------ checkpoints
def checkpoint(folder: Path, family: str = "llada",
               edit: Callable[[dict[str, torch.Tensor]], object] | None = None,
               **config) -> Path:
    """A copy of a family's oracle checkpoint with config keys changed and `edit` applied to its
    dict of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads((DATA / family / "config.json").read_text()) | config
    raw = {key: value for key, value in raw.items() if value != ABSENT}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(DATA / family / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shard(folder: Path, pieces: int = 3) -> Path:
    """Split a checkpoint's model.safetensors into shards dealt round robin; returns the index."""
    single = folder / "model.safetensors"
    tensors, weight_map = load_file(single), {}
    for i in range(pieces):
        name = f"model-{i + 1:05d}-of-{pieces:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::pieces]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    single.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def byte_tokenizer(special: dict[str, int], size: int = 500) -> tokenizers.Tokenizer:
    """One token per byte (ids 0 to 255), words "w256", "w257", ... up to `size`, and special tokens
    with the ids given."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"w{i}": i for i in range(256, size)} | special
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    assert all(core.token_to_id(token) == i for token, i in special.items())
    return core


@pytest.fixture(scope="session")
def text_ckpt(tmp_path_factory) -> Path:
    """A LLaDA checkpoint of random weights that can read and write text; not to be edited."""
    folder = checkpoint(tmp_path_factory.mktemp("text") / "ckpt")
    byte_tokenizer({"<|mask|>": MASK_ID, "<|eos|>": EOS_ID}).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def small_ckpt(tmp_path_factory) -> Path:
    """A very small checkpoint in tiny's format, tokenizer and tasks included, with fresh weights;
    not to be edited."""
    return small_checkpoint(tmp_path_factory.mktemp("small") / "ckpt")


def small_checkpoint(folder: Path, seed: int = 0, **config) -> Path:
    """Write a checkpoint like checkpoints/tiny of one layer and width 32, or as config says."""
    tiny = ROOT / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(tiny / name, folder / name)
    raw = json.loads((tiny / "config.json").read_text())
    raw |= dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, mlp_hidden_size=64) | config
    (folder / "config.json").write_text(json.dumps(raw))
    backbone = Backbone(Config(**config_fields(raw))).initialise(seeded(seed))
    save(backbone, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session", name="tokenizers")
def chat_tokenizers() -> dict[str, Tokenizer]:
    """Byte-level tokenizers with the chat markers of either family."""
    markers = {"dream": "<|im_start|> <|im_end|>",
               "llada": "<|startoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|>"}
    return {name: Tokenizer(byte_tokenizer({m: 256 + i for i, m in enumerate(found.split())}, 256))
            for name, found in markers.items()}


@contextlib.contextmanager
def boosted(backbone: Backbone, token: int, by: float) -> Iterator[None]:
    """A backbone whose head gives one token a larger logit everywhere."""
    def add(module, inputs, logits):
        return logits + by * (torch.arange(logits.shape[-1]) == token)

    handle = backbone.head.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


# ------------------------------------------------------------------ inputs
def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=seeded(seed))


def prompts_of(lengths, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids."""
    rng = random.Random(seed)
    return [[rng.randrange(MASK_ID) for _ in range(length)] for length in lengths]


def one_prompt(rows: int = 1) -> torch.Tensor:
    """The same random prompt of P tokens in every row."""
    return torch.tensor(prompts_of([P])).repeat(rows, 1)


def awake(backbone: Backbone, seed: int = 0, by: float = 0.15, **options) -> MetaState:
    """A memory whose every parameter is moved away from its start, as training would."""
    memory, generator = MetaState.for_backbone(backbone, **options), seeded(seed)
    with torch.no_grad():
        for p in memory.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
    return memory


# ------------------------------------------------------------------ a short run of `fit`
def toy() -> dict[str, nn.Parameter]:
    """The parameters of a regression, one with weight decay and one without."""
    return {"matrix": nn.Parameter(noise(6, 4)), "vector": nn.Parameter(noise(4, seed=1))}


def toy_loss(parameters: dict[str, nn.Parameter]) -> Callable:
    """A loss that depends on (step, micro) alone."""
    def loss_fn(step, micro):
        x = noise(8, 6, seed=1000 * step + micro)
        loss = (x @ parameters["matrix"] + parameters["vector"] - x[:, :4].sin()).square().mean()
        return loss, {f"micro_{micro}": loss.item()}
    return loss_fn


def toy_run(out: Path, steps: int = 30, **options) -> dict[str, nn.Parameter]:
    """Fit the regression in a folder, or go on with it there."""
    parameters = toy()
    options = dict(steps=steps, lr=0.05, warmup=3, save_every=4, micros=2) | options
    fit(parameters, toy_loss(parameters), out, **options)
    return parameters


def metrics_of(out: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def saved_step(out: Path) -> int:
    """The step of a run's last checkpoint."""
    with safe_open(out / STATE, framework="pt") as file:
        return json.loads(file.metadata()["json"])["step"]


def content(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Every bit of a safetensors file's tensors, and its metadata."""
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k).numpy().tobytes() for k in file.keys()}, file.metadata()


def assert_same_run(first: Path, second: Path) -> None:
    """Two folders of runs hold the same weights, optimizer, step and settings, bit for bit, and the
    same metrics, a memory where there is one included."""
    names = sorted(f.name for f in first.glob("*.safetensors"))
    assert STATE in names and names == sorted(f.name for f in second.glob("*.safetensors"))
    for name in names:
        assert content(first / name) == content(second / name)
    assert (first / METRICS).read_bytes() == (second / METRICS).read_bytes()


def assert_close(first: dict, second: dict, rtol: float = 1e-3, atol: float = 1e-6) -> None:
    """Tensor by tensor, the length of the difference against that of the tensor."""
    assert first.keys() == second.keys()
    for name in first:
        difference = float((first[name] - second[name]).norm())
        assert difference <= rtol * float(second[name].norm()) + atol, name


# ------------------------------------------------------------------ errors of one line
@pytest.fixture
def cli_fails(capsys) -> Callable[..., str]:
    """cli_fails(*argv) -> the one line that sample.py prints on stderr before it exits with 2."""
    def run(*argv) -> str:
        assert sample.main([str(a) for a in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1
        assert err.startswith("error: ") and "Traceback" not in err
        return err
    return run


@pytest.fixture
def ckpt(text_ckpt, tmp_path) -> Path:
    """A checkpoint with a tokenizer, to be broken."""
    return shutil.copytree(text_ckpt, tmp_path / "ckpt")


def assert_refused(cli_fails: Callable[..., str], folder: str | Path, *words: str) -> None:
    """Loading fails with an `InputError`, and the command line with its one line; both say
    `words`."""
    with pytest.raises(InputError) as caught:
        load(folder, "cpu")
    line = cli_fails("--ckpt", folder, "--prompt", "hi", "--gen-length", 8, "--device", "cpu")
    for word in words:
        assert word in str(caught.value) and word in line


# ------------------------------------------------------------------ what takes time
def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again and
    again, some thousand times. Where processes will be forked, what they are forked from gets ready
    beside the first tests."""
    gc.freeze()
    if "processes" in sys.modules:
        forkserver.ensure_running()


def pytest_configure(config) -> None:
    """Tests marked `faults` (many kills, many rounds) run with `make faults` only."""
    config.addinivalue_line("markers", "faults: slow by nature; run with -m faults")
    config.option.markexpr = config.option.markexpr or "not faults"
