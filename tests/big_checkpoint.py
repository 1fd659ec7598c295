"""Not a test that pytest collects: writes a checkpoint of random numbers with LLaDA-8B's names,
shapes and six shards (16 GB), loads it and runs one forward, and prints times and peak memory.

    python tests/big_checkpoint.py /path/with/17GB        # the folder is removed afterwards
"""
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import LLADA_8B, layout, load  # noqa: E402

CONFIG = {  # the keys of the published config.json that matter
    "model_type": "llada", "block_type": "llama", "d_model": 4096, "n_layers": 32, "n_heads": 32,
    "n_kv_heads": 32, "mlp_ratio": 4, "mlp_hidden_size": 12288, "vocab_size": 126464,
    "embedding_size": 126464, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081,
    "pad_token_id": 126081}


def write(folder: Path, shards: int = 6) -> int:
    """The checkpoint, tensors dealt to the shards in turn. Returns its bytes."""
    shapes = {n: s for parts in layout(LLADA_8B).values() for n, s in parts.items()}
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    where = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
             for i, n in enumerate(sorted(shapes))}
    for file in sorted(set(where.values())):
        tensors = {}
        for name in (n for n in shapes if where[n] == file):
            size = math.prod(shapes[name])
            numbers = torch.ones(size, dtype=torch.bfloat16) if len(shapes[name]) == 1 else \
                pool.repeat(-(-size // len(pool)))[:size]
            tensors[name] = numbers.view(shapes[name])
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(2 * math.prod(s) for s in shapes.values())


def read(folder: str) -> None:
    """Load, one forward over 16 tokens, and what it took."""
    began = time.perf_counter()
    backbone, _ = load(folder, "cpu")
    loaded = time.perf_counter()
    with torch.no_grad():
        logits = backbone(torch.arange(16)[None])
    assert logits.isfinite().all()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    weights = 2 * backbone.config.parameters
    print(f"load {loaded - began:.0f} s, forward of 16 tokens "
          f"{time.perf_counter() - loaded:.0f} s, peak resident memory {peak / 1e9:.2f} GB = "
          f"{peak / weights:.2f} x the weights")


def main() -> None:
    folder = Path(sys.argv[1]).resolve() / "llada-8b-random"
    folder.mkdir(parents=True)
    try:
        print(f"wrote {write(folder) / 1e9:.2f} GB", flush=True)
        # in a process of its own, whose memory is that of loading alone
        subprocess.run([sys.executable, __file__, "--read", folder], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    read(sys.argv[2]) if sys.argv[1] == "--read" else main()
