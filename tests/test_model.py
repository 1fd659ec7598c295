"""The backbone, its config and its weights, held against the published code's own output."""
from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ABSENT, DATA, checkpoint, noise, seeded, shard
from processes import child
from safetensors import safe_open
from safetensors.torch import load_file

import model
from lib.cli import InputError
from lib.hub import CHECKPOINTS
from model import (DREAM_7B, LLADA_8B, Backbone, Config, config_of, layout, load, rope, rotate,
                   save, unfilled)

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def ids_of(backbone: Backbone, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, backbone.config.vocab, shape, generator=seeded(seed))


def tensors_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config has to hold."""
    backbone, shapes = unfilled(config), {}
    state, parts_of = backbone.state_dict(), layout(backbone)
    assert parts_of.keys() == state.keys()
    for ours, parts in parts_of.items():
        stacked = (sum(s[0] for s in parts.values()), *next(iter(parts.values()))[1:])
        assert stacked == tuple(state[ours].shape), ours
        shapes |= parts
    return shapes


# ------------------------------------------------------------------ parity with the published code
@torch.no_grad()
def test_logits_equal_the_published_models(backbone, oracle):
    """The forward pass as a whole: float32 logits of both families to 1e-4."""
    torch.testing.assert_close(backbone(oracle["input_ids"]), oracle["logits"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_blocks_input_equals_the_published_models(backbone, oracle):
    """A deviation is caught in the block that makes it: hidden_i enters block i, the last one comes
    out of the final norm."""
    seen = []
    handles = [block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
               for block in backbone.blocks]
    try:
        seen.append(backbone.hidden(backbone.embed(oracle["input_ids"])))
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == backbone.config.layers + 1
    for i, hidden in enumerate(seen):
        torch.testing.assert_close(hidden, oracle[f"hidden_{i}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_left_padding_equals_the_published_models(backbone, oracle, family):
    """Pad keys are hidden and pad queries still attend (LLaDA's later revisions, all rows); Dream
    counts positions from the first real token, which only the real rows can show."""
    attended = oracle["attention_mask_leftpad"].bool()
    assert not attended.all()
    logits = backbone(oracle["input_ids"], ~attended)
    if family == "llada":
        torch.testing.assert_close(logits, oracle["logits_leftpad_new_hf"], atol=1e-4, rtol=0)
    else:
        expected = oracle["logits_leftpad"]
        torch.testing.assert_close(logits[attended], expected[attended], atol=1e-4, rtol=0)


@torch.no_grad()
def test_bfloat16_rounds_where_the_published_models_round(oracle, family):
    """The order of casts in RMSNorm and the dtype of the rotation. The published code's own bf16
    logits lie `own` away from its float32 logits. The same operations rounded in the same places
    come far closer to them than that, whatever order a CPU sums in (measured: 0); one cast
    misplaced moves the mean by 0.75 of `own` and more, so a quarter tells the two apart."""
    backbone, _ = load(DATA / family, "cpu", torch.bfloat16)
    expected = oracle["logits_bf16"].float()
    own = (expected - oracle["logits"]).abs()
    off = (backbone(oracle["input_ids"]).float() - expected).abs()
    assert off.mean() <= own.mean() / 4
    assert off.max() <= own.max()


# ------------------------------------------------------------------ properties of the network
def test_rotation_depends_on_the_distance_only():
    """RoPE: q at m and k at n meet as they do at m + s and n + s, and position 0 is untouched."""
    config = replace(LLADA_8B, dim=32, heads=1, kv_heads=1)
    cos, sin = rope(config, torch.arange(300), torch.float32)
    q, k = noise(2, 1, 300, 1, 32)
    same_q, same_k = (x[:, :1].expand(1, 300, 1, 32) for x in (q, k))
    scores = torch.einsum("bmhd,bnhd->mn", rotate(same_q, cos, sin), rotate(same_k, cos, sin))
    for distance in (0, 1, 17, -250):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert scores.diagonal(1)[0] - scores.diagonal(17)[0] != 0
    torch.testing.assert_close(rotate(q, cos, sin)[:, 0], q[:, 0])
    torch.testing.assert_close(rotate(q, cos, sin).norm(dim=-1), q.norm(dim=-1))


def test_rotation_angles_are_given_in_the_familys_dtype(backbone):
    """LLaDA rotates in float32 whatever its weights are in, Dream in theirs; the angles themselves
    are computed in float32, in which positions above 256 differ."""
    exact, rounded = (rope(backbone.config, torch.arange(500), dtype)[0]
                      for dtype in (torch.float32, torch.bfloat16))
    assert exact.dtype == torch.float32 and exact.shape == (500, backbone.config.head_dim // 2)
    assert len(exact[:, 0].unique()) == 500
    if backbone.config.rope_float32:
        assert torch.equal(rounded, exact)
    else:
        assert torch.equal(rounded, exact.bfloat16())


@torch.no_grad()
def test_positions_may_begin_anywhere(backbone):
    """`start` moves every position alike, as a number or as a tensor, and RoPE sees differences
    only: the hidden states stay."""
    e = backbone.embed(ids_of(backbone, 2, 9))
    for start in (30, torch.tensor(30)):
        torch.testing.assert_close(backbone.hidden(e, start=start), backbone.hidden(e),
                                   atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pads", [1, 6, 40])
def test_padding_never_reaches_a_real_row(backbone, pads):
    """However many pads stand on the left, and whatever ids they have, the logits of the real
    tokens stay."""
    ids = ids_of(backbone, 3, 12)
    padded = torch.cat([ids_of(backbone, 3, pads, seed=1), ids], 1)
    mask = torch.arange(12 + pads).expand(3, -1) < pads
    torch.testing.assert_close(backbone(padded, mask)[:, pads:], backbone(ids),
                               atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(backbone):
    """Permuting a batch permutes its logits and nothing else."""
    ids, order = ids_of(backbone, 4, 9), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(backbone(ids[order]), backbone(ids)[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_is_bidirectional(backbone):
    """No causal mask: the last token moves the first one's logits."""
    ids = ids_of(backbone, 1, 9)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % backbone.config.vocab
    assert (backbone(changed)[0, 0] - backbone(ids)[0, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_forward_is_embed_hidden_logits(backbone):
    """The road a memory takes is the road `forward` takes, and the head can be asked for a few
    positions alone."""
    ids = ids_of(backbone, 2, 9)
    h = backbone.hidden(backbone.embed(ids))
    torch.testing.assert_close(backbone.logits(h), backbone(ids), atol=0, rtol=0)
    torch.testing.assert_close(backbone.logits(h[:, 3:5]), backbone(ids)[:, 3:5],
                               atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_embeddings_of_a_frozen_backbone(backbone):
    """A memory is trained through `hidden`: the weights are frozen, their input is not."""
    assert not any(p.requires_grad for p in backbone.parameters())
    e = backbone.embed(ids_of(backbone, 1, 6)).requires_grad_()
    backbone.logits(backbone.hidden(e)[:, -1]).logsumexp(-1).sum().backward()
    assert (e.grad.abs().sum(-1) > 0).all()  # every position, the first included


@torch.no_grad()
def test_shared_kv_heads_equal_repeated_ones():
    """Grouped-query attention gives what plain attention gives with every kv head written out once
    for each query head that shares it."""
    grouped, _ = load(DATA / "dream", "cpu")
    c = grouped.config
    times = c.heads // c.kv_heads
    assert times == 2
    plain = Backbone(replace(c, kv_heads=c.heads))
    state = grouped.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        q, k, v = state[name].split([c.dim] + [c.kv_heads * c.head_dim] * 2)
        k, v = (x.unflatten(0, (c.kv_heads, c.head_dim)).repeat_interleave(times, 0).flatten(0, 1)
                for x in (k, v))
        state[name] = torch.cat([q, k, v])
    plain.load_state_dict(state)
    ids = ids_of(grouped, 2, 20)
    torch.testing.assert_close(grouped(ids), plain(ids), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ loading and saving
UNFUSED = {  # our fused layer -> the published tensors, as each repository names them
    "llada": {"qkv": ["q_proj", "k_proj", "v_proj"], "gate_up": ["ff_proj", "up_proj"]},
    "dream": {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
              "gate_up": ["mlp.gate_proj", "mlp.up_proj"]}}


@torch.no_grad()
@pytest.mark.parametrize("layer", ["qkv", "gate_up"])
@pytest.mark.parametrize("family, with_bias", [("llada", False), ("llada", True), ("dream", True)])
def test_fused_layers_equal_the_unfused_arithmetic(tmp_path, family, layer, with_bias):
    """Loading stacks q, k, v and gate, up in the order in which the forward takes them apart, with
    the biases of Dream and of a LLaDA that has them."""
    def add_biases(tensors):
        for name in [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight",
                                                       "v_proj.weight"))]:
            bias = torch.randn(len(tensors[name]), generator=seeded(len(tensors)))
            tensors[name.replace("weight", "bias")] = bias

    folder = DATA / family
    if family == "llada" and with_bias:
        folder = checkpoint(tmp_path, "llada", add_biases, include_qkv_bias=True)
    backbone, _ = load(folder, "cpu")
    raw = load_file(folder / "model.safetensors")
    prefix = "model.transformer.blocks" if family == "llada" else "model.layers"
    x = noise(2, 7, backbone.config.dim)
    for i, block in enumerate(backbone.blocks):
        names = [f"{prefix}.{i}.{name}" for name in UNFUSED[family][layer]]
        assert all((f"{n}.bias" in raw) == (with_bias and layer == "qkv") for n in names)
        apart = [F.linear(x, raw[f"{n}.weight"], raw.get(f"{n}.bias")) for n in names]
        fused = getattr(block, layer)(x).split([y.shape[-1] for y in apart], -1)
        for ours, theirs in zip(fused, apart, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_sharded_equals_unsharded(tmp_path, family, pieces):
    """The index is followed: a fused parameter's parts may lie in different shards."""
    shard(checkpoint(tmp_path, family), pieces)
    sharded, whole = load(tmp_path, "cpu")[0].state_dict(), load(DATA / family, "cpu")[0]
    for name, parameter in whole.state_dict().items():
        assert torch.equal(sharded[name], parameter), name


def test_save_writes_the_published_tensors(tmp_path, backbone, family):
    """Names, values and dtypes come out as they went in, so that the published code reads them; and
    no temporary file is left."""
    save(backbone, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    original = load_file(DATA / family / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_saving_over_the_file_that_is_mapped(tmp_path, family):
    """A checkpoint can be loaded, changed and saved onto itself: the file is replaced, never
    written into while its pages are in use."""
    folder = checkpoint(tmp_path, family)
    before = (folder / "model.safetensors").read_bytes()
    backbone, _ = load(folder, "cpu")
    for parameter in backbone.parameters():
        parameter.data.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before  # the mapping is private
    save(backbone, folder / "model.safetensors")
    again, _ = load(folder, "cpu")
    for (name, ours), theirs in zip(again.state_dict().items(), backbone.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_dtype_is_as_stored_unless_asked_for(tmp_path, family, monkeypatch):
    """On the CPU nothing is converted behind the user's back, whatever config.json states; a name
    and a torch dtype ask for the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = checkpoint(tmp_path, family, lambda tensors: tensors.update(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}), torch_dtype="float32")
    for wanted, got in [(None, torch.bfloat16), ("float32", torch.float32),
                        (torch.float32, torch.float32), ("bfloat16", torch.bfloat16)]:
        backbone, _ = load(folder, dtype=wanted)
        assert {p.dtype for p in backbone.parameters()} == {got}
    assert {p.dtype for p in load(DATA / family)[0].parameters()} == {torch.float32}


def test_loading_in_another_dtype_converts_each_weight(family):
    """load(dtype=...) is the stored weights rounded once, the fused ones included."""
    stored, converted = load(DATA / family, "cpu")[0], load(DATA / family, "cpu", "bfloat16")[0]
    for (name, ours), theirs in zip(converted.state_dict().items(), stored.state_dict().values()):
        assert torch.equal(ours, theirs.bfloat16()), name


def test_a_loaded_backbone_is_frozen_and_in_eval_mode(family):
    """Training a memory must not train the backbone by accident."""
    backbone, tokenizer = load(DATA / family, "cpu")
    assert not backbone.training and tokenizer is None
    assert not any(p.requires_grad or p.is_meta for p in backbone.parameters())


@LINUX
def test_unfused_parameters_stay_in_the_files_mapping(tmp_path, family):
    """Loading on the CPU copies only what it has to stack: every other parameter lies in the memory
    map of the file, and no map is kept for the stacked ones."""
    folder = checkpoint(tmp_path, family)
    backbone, _ = load(folder, "cpu")
    spans = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            if line.rstrip().endswith(str(folder / "model.safetensors")):
                spans.append([int(x, 16) for x in line.split()[0].split("-")])
    kept = {name for name, p in backbone.state_dict().items()
            if any(start <= p.data_ptr() < stop for start, stop in spans)}
    fused = {name for name in backbone.state_dict() if ".qkv." in name or ".gate_up." in name}
    assert fused and kept == backbone.state_dict().keys() - fused
    assert len(spans) <= len(kept)


def peak_of_loading(small: Path, large: Path, report: Path) -> None:
    """In a process of its own: load `large`, run a forward, and report the peak of the resident
    memory meanwhile as a multiple of the weights."""
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if key in line) * 1024

    ids = torch.arange(4)[None]
    with torch.no_grad():
        load(small, "cpu")[0](ids)                                # whatever torch allocates once
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")             # the peak counts from here
        backbone, _ = load(large, "cpu")
        backbone(ids)
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    report.write_text(str((status("VmHWM") - before) / weights))


@LINUX
def test_loading_never_holds_the_weights_twice(tmp_path):
    """Peak resident memory of loading shards and one forward is at most 1.3 x the weights."""
    config = dict(d_model=512, mlp_hidden_size=1536, n_layers=6, vocab_size=2048,
                  embedding_size=2048)                          # 23 million parameters, 91 MB
    folder = checkpoint(tmp_path / "large", "llada", **config)
    save(load(f"random:{folder}", "cpu", "float32")[0], folder / "model.safetensors")
    shard(folder)
    process = child(peak_of_loading, DATA / "llada", folder, tmp_path / "report")
    process.join()
    assert process.exitcode == 0
    assert 0.8 < float((tmp_path / "report").read_text()) <= 1.3


def test_random_weights_have_the_shapes_and_no_tokenizer(text_ckpt, tmp_path):
    """random:FOLDER is a benchmark's model, for which a config.json is enough: same shapes as
    stored, other weights, the same ones every time, finite logits."""
    stored = load(text_ckpt, "cpu")[0].state_dict()
    shutil.copy(text_ckpt / "config.json", tmp_path)
    assert config_of(str(tmp_path)) == config_of(str(text_ckpt))
    published = [name for name, where in CHECKPOINTS.items() if isinstance(where, str)]
    assert {config_of(name) for name in published} == {LLADA_8B, DREAM_7B}  # nothing is downloaded
    backbone, tokenizer = load(f"random:{tmp_path}", "cpu", "float32")
    assert tokenizer is None
    assert {n: p.shape for n, p in backbone.state_dict().items()} == \
        {n: p.shape for n, p in stored.items()}
    assert not torch.equal(backbone.head.weight, stored["head.weight"])
    again, _ = load(f"random:{tmp_path}", "cpu", "float32")
    assert torch.equal(again.head.weight, backbone.head.weight)
    assert backbone(ids_of(backbone, 1, 5)).isfinite().all()


@pytest.mark.parametrize("nickname, config", [("llada-8b", LLADA_8B), ("llada-1.5", LLADA_8B),
                                              ("dream-7b", DREAM_7B), ("dream-7b-base", DREAM_7B)])
def test_random_nicknames_take_the_published_sizes(nickname, config, monkeypatch):
    """random:llada-8b needs neither a download nor a folder. (The network itself is left out here:
    it has 16 GB.)"""
    asked = []

    def refuse(config):
        asked.append(config)
        raise InputError("far enough")

    monkeypatch.setattr(model, "Backbone", refuse)
    with pytest.raises(InputError, match="far enough"):
        load(f"random:{nickname}", "cpu")
    assert asked == [config]


# ------------------------------------------------------------------ configuration
def test_both_families_speak_one_language(backbones):
    """Every field of Config comes from its family's own key."""
    llada = backbones["llada"].config
    assert llada == Config("llada", 64, 3, 4, 4, 176, 512, 256, 500000.0, 1e-5, False, True, False,
                           500, 501, 501)
    dream = backbones["dream"].config
    assert dream == Config("dream", 64, 3, 4, 2, 176, 512, 512, 1e6, 1e-6, True, False, False,
                           500, 501, 501, dtype="float32")
    assert (llada.head_dim, llada.shift, dream.shift) == (16, False, True)


def test_the_folder_and_the_file_are_the_same_path(family):
    """from_json takes config.json or the folder that holds it."""
    assert Config.from_json(DATA / family) == Config.from_json(DATA / family / "config.json")


@pytest.mark.parametrize("family, changes, field, value", [
    ("llada", dict(mlp_hidden_size=ABSENT, mlp_ratio=3), "mlp_dim", 192),
    ("llada", dict(mlp_hidden_size=None, mlp_ratio=3), "mlp_dim", 192),
    ("llada", dict(mlp_hidden_size=100, mlp_ratio=3), "mlp_dim", 100),
    ("llada", dict(n_kv_heads=ABSENT), "kv_heads", 4),
    ("llada", dict(n_kv_heads=None), "kv_heads", 4),
    ("llada", dict(n_kv_heads=2), "kv_heads", 2),
    ("llada", dict(n_kv_heads=None, multi_query_attention=True), "kv_heads", 1),
    ("llada", dict(n_kv_heads=ABSENT, multi_query_attention=False), "kv_heads", 4),
    ("llada", dict(weight_tying=True), "tied", True),
    ("llada", dict(embedding_size=640), "vocab", 640),
    ("llada", dict(embedding_size=None), "vocab", 512),
    ("llada", dict(include_qkv_bias=True), "qkv_bias", True),
    ("llada", dict(rope_full_precision=False), "rope_float32", False),
    ("llada", dict(pad_token_id=ABSENT), "pad_id", 501),
    ("dream", dict(num_key_value_heads=ABSENT), "kv_heads", 4),
    ("dream", dict(tie_word_embeddings=True), "tied", True),
    ("dream", dict(pad_token_id=ABSENT), "pad_id", 501),
    ("dream", dict(model_type="dream"), "family", "dream"),
], ids=str)
def test_keys_that_configs_leave_out_or_override(tmp_path, family, changes, field, value):
    """Absent and null keys fall back as the published configuration classes do; what 8B's own file
    states twice is read from the key that counts."""
    config = Config.from_json(checkpoint(tmp_path, family, **changes))
    assert getattr(config, field) == value


def test_parameters_is_the_number_of_weights(backbone, family):
    """The count that TFLOP/s and GB/s are computed from is the count of what is stored."""
    stored = load_file(DATA / family / "model.safetensors")
    assert backbone.config.parameters == sum(tensor.numel() for tensor in stored.values())


@torch.no_grad()
def test_a_tied_head_is_the_embedding(tmp_path, family):
    """Tied checkpoints store no head, and their logits are products with the embedding's rows."""
    head, key = {"llada": ("model.transformer.ff_out.weight", "weight_tying"),
                 "dream": ("lm_head.weight", "tie_word_embeddings")}[family]
    backbone, _ = load(checkpoint(tmp_path, family, lambda t: t.pop(head), **{key: True}), "cpu")
    ids = ids_of(backbone, 1, 5)
    h = backbone.hidden(backbone.embed(ids))
    torch.testing.assert_close(backbone(ids), h @ backbone.embedding.weight.T)
    save(backbone, tmp_path / "saved.safetensors")
    assert head not in load_file(tmp_path / "saved.safetensors")


@torch.no_grad()
def test_a_vocabulary_larger_than_the_tokenizers(tmp_path):
    """embedding_size above vocab_size adds rows that are loaded and answer like any other."""
    def widen(tensors):
        for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(128, 64)])

    backbone, _ = load(checkpoint(tmp_path, "llada", widen, embedding_size=640), "cpu")
    expected = load_file(DATA / "llada" / "oracle.safetensors")
    logits = backbone(expected["input_ids"])
    assert logits.shape[-1] == 640
    torch.testing.assert_close(logits[..., :512], expected["logits"], atol=1e-4, rtol=0)


def test_llada_8b_has_the_published_tensors():
    """Names, shapes and bytes of the reference sheet: 291 tensors, 16,031,162,368 bytes of bf16."""
    block = {"attn_norm": (4096,), "ff_norm": (4096,), "ff_out": (4096, 12288)}
    block |= dict.fromkeys(["q_proj", "k_proj", "v_proj", "attn_out"], (4096, 4096))
    block |= dict.fromkeys(["ff_proj", "up_proj"], (12288, 4096))
    expected = {"wte": (126464, 4096), "ff_out": (126464, 4096), "ln_f": (4096,)}
    expected |= {f"blocks.{i}.{name}": s for i in range(32) for name, s in block.items()}
    expected = {f"model.transformer.{name}.weight": shape for name, shape in expected.items()}
    assert len(expected) == 291
    assert tensors_of(LLADA_8B) == expected
    assert 2 * LLADA_8B.parameters == 16_031_162_368
    assert (LLADA_8B.max_len, LLADA_8B.rope_theta, LLADA_8B.norm_eps) == (4096, 500000.0, 1e-5)
    assert (LLADA_8B.mask_id, LLADA_8B.eos_id, LLADA_8B.pad_id) == (126336, 126081, 126081)


def test_dream_7b_has_the_published_tensors():
    """The same for Dream: 339 tensors, biases on q, k and v only, 4 kv heads of 128."""
    block = {"input_layernorm.weight": (3584,), "post_attention_layernorm.weight": (3584,),
             "self_attn.q_proj.weight": (3584, 3584), "self_attn.q_proj.bias": (3584,),
             "self_attn.o_proj.weight": (3584, 3584), "mlp.down_proj.weight": (3584, 18944)}
    for name in ("k_proj", "v_proj"):
        block |= {f"self_attn.{name}.weight": (512, 3584), f"self_attn.{name}.bias": (512,)}
    for name in ("gate_proj", "up_proj"):
        block[f"mlp.{name}.weight"] = (18944, 3584)
    expected = {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584),
                "model.norm.weight": (3584,)}
    expected |= {f"model.layers.{i}.{name}": s for i in range(28) for name, s in block.items()}
    assert len(expected) == 339
    assert tensors_of(DREAM_7B) == expected
    assert (DREAM_7B.head_dim, DREAM_7B.rope_theta, DREAM_7B.norm_eps) == (128, 1e6, 1e-6)
    assert (DREAM_7B.mask_id, DREAM_7B.eos_id, DREAM_7B.pad_id) == (151666, 151643, 151643)
