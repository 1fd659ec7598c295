"""The harness: its answers are those of bench.py accuracy, likelihoods those of an enumeration of
all masks; stop strings, EOS, templates, resumed runs, the published settings, and examples of one's
own. lm-eval itself is asked where it is installed."""
from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (EOS_ID, MASK_ID, awake, boosted, byte_tokenizer, checkpoint, prompts_of,
                      seeded)

import bench
import lib.plans
import lib.versus
from lib.answers import Ends, Store, held
from lib.cli import InputError
from lib.harness import Adapter, lm_eval_model
from lib.judge import JUDGES, read_examples
from lib.likelihood import MASKS, log_likelihood, masked_losses
from lib.settings import COMMON, GENERATED, METASTATE, SCORED, Setting, choose, model_of, rows
from lib.templates import chat_template
from lib.versus import compared, scores_of
from model import load
from sample import denoise, generate
from tasks import TASKS, draw

MARKERS = {"llada": ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
           "dream": ["<|beginoftext|>", "<|im_start|>", "<|im_end|>"]}
MEMORY = "checkpoints/tiny/metastate.safetensors"


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict:
    """family -> (folder, backbone, tokenizer) of random weights with a chat format."""
    found = {}
    for family, markers in MARKERS.items():
        folder = checkpoint(tmp_path_factory.mktemp(family) / "ckpt", family)
        special = {"<|mask|>": MASK_ID, "<|eos|>": EOS_ID} | {
            m: 502 + i for i, m in enumerate(markers)}
        byte_tokenizer(special).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"bos_token": {"content": markers[0]}, "chat_template": TEMPLATE}))
        found[family] = folder, *load(folder, "cpu")
    return found


TEMPLATE = ("{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


def adapter_of(chat, out, decode=generate, **options) -> Adapter:
    """An adapter whose results are kept in a folder."""
    folder, backbone, tokenizer = chat
    setting = options.pop("setting", Setting("", length=8, block=4, steps=8))
    adapter = Adapter(backbone, tokenizer, folder, decode, denoise, Store(out, "known"), "it",
                      tokenizer.chat_text, **options)
    adapter.setting = setting
    return adapter


# ------------------------------------------------------------------ the same as bench.py accuracy
def own_task(path, name: str, number: int) -> list[str]:
    """Write the prompts that bench.py accuracy draws as a file of examples; returns them."""
    rng = random.Random(f"0 {name}")
    pairs = [draw(name, rng, held_out=True) for _ in range(number)]
    path.write_text("".join(json.dumps({"prompt": p, "answer": a, "id": f"n{i}"}) + "\n"
                            for i, (p, a) in enumerate(pairs)))
    return [prompt for prompt, _ in pairs]


def samples_of(out, label: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"samples-{label}.jsonl").read_text().splitlines()]


def test_accuracy_example_for_example(tmp_path, capsys, monkeypatch):
    """Frozen and with memory the harness judges every prompt as `solve` does, in batches of other
    sizes and with answers that end early; the table has the pairs. A second time the same is said
    without a model's work."""
    prompts = own_task(tmp_path / "own.jsonl", "sums", 12)
    argv = ["harness", "--data", str(tmp_path / "own.jsonl"), "--memory", MEMORY, "--steps", "6",
            "--out", str(tmp_path / "out"), "--batch-size", "5", "--json"]
    assert bench.main(argv) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(bench, "generate", None)
        assert bench.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [*lines, last]
    assert err.count("3 of 3 batches of answers are known") == 2
    backbone, tokenizer = load("tiny", "cpu")
    verdicts = {}
    for label, memory in (("frozen", None), ("MetaState", bench.MetaState.load(MEMORY, backbone))):
        verdicts[label], _ = bench.solve(backbone, tokenizer, TASKS["sums"], prompts, 24, steps=6,
                                         memory=memory)
        found = samples_of(tmp_path / "out", f"data-{label}")
        assert [bool(s["right"]) for s in found] == verdicts[label]
        assert [s["id"] for s in found] == [f"n{i}" for i in range(12)]
    results = json.loads((tmp_path / "out" / "results-data-frozen.json").read_text())
    assert "6 steps" in results["setting"][0]
    assert results["results"]["data"]["right"] == sum(verdicts["frozen"]) / 12
    [lead] = json.loads(last)["leads"]
    pairs = [*zip(verdicts["MetaState"], verdicts["frozen"])]
    assert lead["better"] == sum(a > b for a, b in pairs) > 2
    assert lead["worse"] == sum(a < b for a, b in pairs)
    assert lead["points"] == pytest.approx(100 * (lead["better"] - lead["worse"]) / 12)
    assert lead["low"] < lead["points"] < lead["high"]
    assert any(line.startswith("| data | right | MetaState | 12 | ") for line in lines)


def test_stories_example_for_example(tmp_path):
    """In blocks, with answers that end in each of them: the harness has for every beginning what
    `solve` has, which judges by the grammar."""
    prompts = own_task(tmp_path / "own.jsonl", "stories", 4)
    assert bench.main(["harness", "--ckpt", "stories", "--data", str(tmp_path / "own.jsonl"),
                       "--out", str(tmp_path / "out"), "--steps", "40", "--batch-size", "3"]) == 0
    texts = [s["text"] for s in samples_of(tmp_path / "out", "data-frozen")]
    answered = []

    class Kept:
        def check(self, prompt, text):
            answered.append(text)
            return TASKS["stories"].check(prompt, text)

    verdicts, _ = bench.solve(*load("stories", "cpu"), Kept(), prompts, 160, steps=40)
    assert texts == answered and all(texts)
    assert [TASKS["stories"].check(*pair) for pair in zip(prompts, texts)] == verdicts


def test_lm_eval_itself(tmp_path, capsys):
    """A task of one's own in a folder: lm-eval's verdicts are those of the same examples as
    data."""
    pytest.importorskip("lm_eval")
    own_task(tmp_path / "own.jsonl", "sums", 6)
    (tmp_path / "task.yaml").write_text(
        "task: own_sums\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/own.jsonl}}}}\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "generation_kwargs: {until: []}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n")
    scores = []
    for what, label, metric in (
            (["--tasks", "own_sums", "--include-path", str(tmp_path)], "own_sums", "exact_match"),
            (["--data", str(tmp_path / "own.jsonl")], "data", "right")):
        assert bench.main(["harness", *what, "--out", str(tmp_path / label), "--steps", "6"]) == 0
        scores.append([s[metric] for s in samples_of(tmp_path / label, f"{label}-frozen")])
    assert scores[0] == scores[1] and len(set(scores[0])) == 2
    results = json.loads((tmp_path / "own_sums" / "results-own_sums-frozen.json").read_text())
    assert results["results"]["own_sums"]["exact_match,none"] == sum(scores[0]) / 6
    assert bench.main(["harness", "--tasks", "no_such_task"]) == 2
    assert "lm-eval has no task 'no_such_task'" in capsys.readouterr().err


# ------------------------------------------------------------------ likelihoods
def subset_losses(backbone, ids: torch.Tensor, start: int, length: int) -> dict:
    """mask -> cross-entropies, for every mask of `length` tokens, each by a plain forward."""
    found, shift = {}, int(backbone.config.shift)
    for mask in itertools.product([False, True], repeat=length):
        seen = ids.clone()
        seen[start:start + length][torch.tensor(mask)] = MASK_ID
        logits = backbone(seen[None])[0, start - shift:start - shift + length]
        found[mask] = -torch.log_softmax(logits, -1).gather(
            1, ids[start:start + length, None])[:, 0] * torch.tensor(mask)
    return found


def expectation(family: str, losses: dict, length: int) -> float:
    """Minus the mean of the weighted losses over all masks, each with its probability: LLaDA's
    number of masks is uniform, Dream's t is, integrated in small steps."""
    total = 0.0
    p = 0.999 * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 + 0.001
    for mask, found in losses.items():
        x = sum(mask)
        if x and family == "llada":
            alike = sum(sum(other) == x for other in losses)
            total += float(found.sum()) * length / x / alike / length
        elif x:
            total += float(found.sum() * (p ** (x - 1) * (1 - p) ** (length - x)).mean())
    return -total


@torch.no_grad()
def test_likelihoods_are_those_of_all_masks(backbone, family):
    """The estimator's mean over many draws is the expectation over all masks, within its standard
    error, and each mask's losses are a plain forward's; of one token LLaDA's is exact."""
    ids, start, length = torch.tensor(prompts_of([9])[0]), 4, 3
    losses = subset_losses(backbone, ids, start, length)
    every = torch.tensor([*losses])
    found = masked_losses(backbone, denoise, ids, start, every)
    torch.testing.assert_close(found, torch.stack([*losses.values()]), atol=1e-4, rtol=1e-4)

    def look_up(mask):
        return found[(mask * torch.tensor([4, 2, 1])).sum(1)]

    exact = expectation(family, losses, length)
    draws = torch.tensor([log_likelihood(look_up, length, family, 8, 8, seeded(i))
                          for i in range(400)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert abs(float(draws.mean()) - exact) < 4 * error < 0.1 * abs(exact)
    if family == "llada":
        one = subset_losses(backbone, ids, start, 1)[True,]
        assert log_likelihood(lambda mask: masked_losses(backbone, denoise, ids, start, mask), 1,
                              family, 128, 8, seeded()) == pytest.approx(-float(one), rel=1e-4)


def test_masks_are_spread(family):
    """LLaDA: row i masks exactly x tokens, x evenly spaced modulo the length, and every x is as
    probable. Dream: weights are those of probabilities from 0.001 to 1."""
    mask, weight = MASKS[family](12, 4, seeded(3))
    assert mask.shape == weight.shape == (4, 12)
    if family == "llada":
        x = mask.sum(1)
        assert torch.equal((x - x[0]) % 12, torch.tensor([0, 3, 6, 9]))
        torch.testing.assert_close(weight[:, 0], 12 / x)
        first = torch.stack([MASKS[family](4, 1, seeded(i))[0].sum() for i in range(400)])
        assert torch.bincount(first, minlength=5)[1:].min() > 70
    else:
        p = 1 / weight[:, 0]
        assert 0.001 <= p.min() and p.max() <= 1
        torch.testing.assert_close(p.sort().values.diff(), torch.full((3,), 0.999 / 4))


def test_guidance_and_memory_change_a_likelihood(backbone):
    """Guidance 0 is none; a memory enters by its initial state, an untrained one changes
    nothing."""
    ids, mask = torch.tensor(prompts_of([9])[0]), torch.tensor([[True, False, True]])
    plain = masked_losses(backbone, denoise, ids, 4, mask)
    assert plain[0, 1] == 0 and (plain[0, ::2] > 0).all()
    asleep = bench.MetaState.for_backbone(backbone, generator=seeded())
    assert torch.equal(masked_losses(backbone, denoise, ids, 4, mask, asleep), plain)
    for other in (dict(cfg=1.0), dict(memory=awake(backbone))):
        assert not torch.allclose(masked_losses(backbone, denoise, ids, 4, mask, **other), plain)


@pytest.mark.parametrize("family", MARKERS)
def test_requests_become_tokens(chats, family, tmp_path, monkeypatch):
    """Blanks at the end of a context belong to the target; Dream has BOS in front and EOS behind,
    LLaDA neither; results come in the order of the requests, and a second time from the folder."""
    seen, adapter = [], adapter_of(chats[family], tmp_path)
    adapter.setting = Setting("", mc=2, rows=2, bos=family == "dream")

    def score(key, prompt, target, tail):
        seen.append((prompt, target, tail))
        return -float(len(target)), False

    monkeypatch.setattr(adapter, "score", score)
    requests = [("ab  ", "cd"), ("a" * 30, "xyz"), ("ab  ", "cd"), ("", "q")]
    expected = [(-4.0, False), (-3.0, False), (-4.0, False), (-1.0, False)]
    assert adapter.loglikelihood(requests) == expected == adapter.loglikelihood(requests)
    encode, bos = adapter.tokenizer.encode, [502] if family == "dream" else []
    tail = [EOS_ID] if family == "dream" else []
    assert sorted(seen, key=str) == sorted([
        (bos + encode("ab"), encode("  cd"), tail), (bos + encode("a" * 30), encode("xyz"), tail),
        (bos, encode("q"), tail)], key=str)  # the longest first, and each once


def test_greedy_is_checked_where_asked(chats, tmp_path):
    """A continuation is greedy if decoding one token at a time writes it."""
    adapter = adapter_of(chats["llada"], tmp_path, greedy=True)
    adapter.setting = Setting("", mc=2, rows=2)
    prompt, backbone = adapter.tokenizer.encode("what"), chats["llada"][1]
    best = generate(backbone, torch.tensor([prompt]), gen_length=3, block_length=3,
                    steps=3).ids[0, 4:].tolist()
    assert adapter.score("0" * 32, prompt, best, [])[1] is True
    assert adapter.score("0" * 32, prompt, [best[0] ^ 1, *best[1:]], [])[1] is False


# ------------------------------------------------------------------ where answers end
def scripted(texts: list[str], counts: list[int] | None = None):
    """`generate` whose logits write one text in every row, byte for byte, from left to right."""
    def decode(backbone, prompt, **options):
        P, L = prompt.shape[1], options["block_length"]
        script = torch.tensor([list(t.encode()) for t in texts[:len(prompt)]])
        script = torch.tensor([[BYTE[b] for b in row] for row in script.tolist()])

        def adjust(logits, ids):
            first = int((ids[:, P:] == MASK_ID).any(0).int().argmax()) // L * L
            wanted = torch.nn.functional.one_hot(script[:, first:first + L], logits.shape[-1])
            return 50.0 * wanted + 0.1 * torch.arange(L, 0, -1)[:, None] * wanted

        sample = generate(backbone, prompt, adjust=adjust, **options)
        if counts is not None:
            counts.append(sample.forwards)
        return sample
    return decode


BYTE = {b: byte_tokenizer({}, 256).encode(bytes([b]).decode("latin-1")).ids[0] for b in range(128)}


def test_a_stop_string_across_a_border(chats, tmp_path):
    """"END" begins in one block and ends in the next: the answer is cut in front of it and decoding
    stops there, for a batch once every row is done."""
    counts, texts = [], ["ab END and what follows ", "abcdefgENDghijklmnopqrst"]
    adapter = adapter_of(chats["llada"], tmp_path, scripted(texts, counts), batch_size=2,
                         setting=Setting("", length=24, block=4, steps=24))
    assert adapter.generate_until([("xx", {"until": ["END", "?"]}), ("x", {"until": "END"})]) \
        == ["ab ", "abcdefg"]
    assert counts == [10]
    alone = adapter_of(chats["llada"], tmp_path / "1", scripted(texts, counts),
                       setting=Setting("", length=24, block=4, steps=24))
    assert alone.generate_until([("xx", {"until": ["END"]})]) == ["ab "] and counts == [10, 6]
    assert alone.generate_until([("xx", {"until": []})]) == [texts[0]] and counts[-1] == 24
    assert alone.generate_until([("xx", {})]) == [texts[0]]


def test_ends_wait_for_what_is_settled(chats):
    """Behind a mask nothing counts: neither EOS nor a stop string, nor one with a mask inside."""
    _, _, tokenizer = chats["llada"]
    a, b = tokenizer.encode("ab")
    M, E = MASK_ID, EOS_ID

    def ended(*rows, until=("ab",)):
        ends = Ends(tokenizer, M, {E}, [until] * len(rows), 1)
        return ends(SimpleNamespace(ids=torch.tensor([[7, *row] for row in rows])))

    assert ended([a, b, M, M]) and ended([a, E, M, M]) and not ended([b, b, b, b], [a, b, M, M])
    assert not ended([M, a, b, E]) and not ended([a, M, b, M]) and not ended([a, b, M], [a, M, b])
    # a stop string that is a special token, which no decoded text shows
    turn = tokenizer.vocab["<|eot_id|>"]
    assert ended([a, turn, M, M], until=("<|eot_id|>",))
    assert not ended([a, turn, M, M], until=("x",))
    assert Ends(tokenizer, M, {E}, [("b",)], 1).cut(0, [a, M, b, a]) == "a"
    assert Ends(tokenizer, M, {E}, [()], 1).cut(0, [a, E, b, a]) == "a"


def test_eos_is_held_back(chats, tmp_path):
    """A model that says EOS everywhere answers nothing; with "never" it has to write, with "late"
    it commits EOS last."""
    folder, backbone, tokenizer = chats["llada"]
    setting = dict(length=8, block=8, steps=8)
    with boosted(backbone, EOS_ID, 100.0):
        for hold, empty in (("no", True), ("never", False), ("late", True)):
            adapter = adapter_of(chats["llada"], tmp_path / hold,
                                 setting=Setting("", **setting, hold=hold))
            [text] = adapter.generate_until([("hello", {})])
            assert (text == "") == empty
    assert held("late", EOS_ID, tokenizer, "cpu") == {
        "late": sorted([EOS_ID, tokenizer.vocab["<|eot_id|>"]])}
    first = {}
    with boosted(backbone, EOS_ID, 4.0):
        for late in ([], [EOS_ID]):
            order = []
            generate(backbone, torch.tensor([tokenizer.encode("hello")]), gen_length=16,
                     block_length=16, steps=16, late=late,
                     on_step=lambda s: order.append(int(s.ids[s.fresh][0])) or None)
            first[bool(late)] = order
    others = sum(token != EOS_ID for token in first[True])
    assert 0 < others < 16 and EOS_ID not in first[True][:others]
    assert EOS_ID in first[False][:others]


def test_stop_tokens_are_the_checkpoints(chats, tmp_path):
    """EOS, the end of a turn, and what generation_config.json states."""
    folder, backbone, tokenizer = chats["dream"]
    copy = shutil.copytree(folder, tmp_path / "ckpt")
    (copy / "generation_config.json").write_text('{"eos_token_id": [501, 77]}')
    adapter = adapter_of((copy, backbone, tokenizer), tmp_path)
    assert adapter.stops == {EOS_ID, 77, tokenizer.vocab["<|im_end|>"]}


# ------------------------------------------------------------------ prompts
@pytest.mark.parametrize("family", MARKERS)
def test_chat_templates(chats, family, tmp_path, capsys):
    """The checkpoint's own template is used where it differs, with a line that says so; without one
    the published format; an answer that was begun stays open."""
    folder, _, tokenizer = chats[family]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "```python\n"}]
    own = chat_template(folder, tokenizer)
    assert "differs from the published format" in capsys.readouterr().err
    assert own(talk[:1]) == MARKERS[family][0] + "<user>hi<assistant>"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    published = chat_template(tmp_path, tokenizer)
    assert tokenizer.encode(published(talk[:1])) == tokenizer.chat(talk[:1])
    adapter = adapter_of(chats[family], tmp_path)
    adapter.template = published
    assert adapter.chat(talk, open_turn=True) == published(talk[:1]) + "```python\n"
    assert adapter.chat(talk) == published(talk)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    with pytest.raises(InputError, match="no system"):
        chat_template(tmp_path, tokenizer)


def test_bos_and_room(chats, tmp_path, capsys):
    """BOS stands in front of raw prompts where the setting says so; a prompt that leaves no room is
    cut on the left, and a line says how many were."""
    lengths = []

    def decode(backbone, prompt, **options):
        lengths.append(prompt[0, :1].tolist() + [prompt.shape[1]])
        return generate(backbone, prompt, **options)

    adapter = adapter_of(chats["dream"], tmp_path, decode, setting=Setting(
        "", length=8, block=8, steps=8, bos=True, window=40, order="entropy"))
    assert len(adapter.generate_until([("a" * 100, {}), ("ab", {})])) == 2
    [a] = adapter.tokenizer.encode("a")
    assert lengths == [[a, 32], [502, 3]]
    assert "1 of 2 prompts are too long and cut on the left" in capsys.readouterr().err


def test_randomness_is_of_the_row(chats, tmp_path):
    """With a temperature an answer depends on the seed and its prompt, not on its batch."""
    setting = Setting("", length=8, block=8, steps=8, temperature=1.0)
    requests = [(text, {}) for text in ("aa", "bbb", "c", "dd", "aa")]
    found = [adapter_of(chats["llada"], tmp_path / str(i), batch_size=size, seed=seed,
                        setting=setting).generate_until(requests)
             for i, (size, seed) in enumerate([(1, 0), (3, 0), (1, 1)])]
    assert found[0] == found[1] != found[2] and found[0][0] == found[0][4]


# ------------------------------------------------------------------ what was done before
def test_a_killed_run_goes_on(chats, tmp_path):
    """Killed in its third batch, with a line cut short: the next run computes the batches that are
    missing, as they would have been, and none twice; other settings compute anew."""
    requests = [("a" * (i % 5 + 1) + str(i), {}) for i in range(9)]
    whole = adapter_of(chats["llada"], tmp_path / "whole", batch_size=2).generate_until(requests)
    shapes = []

    def decode(backbone, prompt, **options):
        shapes.append(tuple(prompt.shape))
        if len(shapes) == 3:
            raise KeyboardInterrupt
        return generate(backbone, prompt, **options)

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        adapter_of(chats["llada"], out, decode, batch_size=2).generate_until(requests)
    with open(out / "known-0.jsonl", "a") as file:
        file.write('\n{"cut short')
    again = adapter_of(chats["llada"], out, decode, batch_size=2)
    assert again.generate_until(requests) == whole
    assert len(shapes) == 3 + 3 and shapes[3] == shapes[2]
    assert again.generate_until(requests) == whole and len(shapes) == 6
    other = adapter_of(chats["llada"], out, decode, setting=Setting("", length=4, block=4, steps=4))
    assert other.generate_until(requests) != whole and len(shapes) == 6 + 9


def test_processes_share_the_examples(chats, tmp_path, monkeypatch):
    """Of two processes each answers half; together they have what one alone has, in order."""
    lines = [{"prompt": "x" * i, "answer": "y", "id": i} for i in range(1, 6)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = SimpleNamespace(limit=None, judge="contains", data=SimpleNamespace(
        examples=read_examples(tmp_path / "own.jsonl")))

    def samples(rank: int, world: int) -> list[dict]:
        adapter = adapter_of(chats["llada"], tmp_path / f"{rank} of {world}")
        return lib.versus.own(adapter, args, rank, world)["samples"]["data"]

    monkeypatch.setattr(lib.versus, "everyone", lambda mine: [mine])
    halves = samples(0, 2), samples(1, 2)
    assert [s["id"] for s in halves[0]] == [1, 3, 5] and [s["id"] for s in halves[1]] == [2, 4]
    assert sorted(sum(halves, []), key=lambda s: s["doc_id"]) == samples(0, 1)


def test_what_lm_eval_calls(chats, tmp_path, monkeypatch):
    """The methods of its `LM`, here on a stand-in for that class: requests become the adapter's,
    and its rank and number of processes are ours."""
    class LM:
        def __init__(self):
            self._rank, self._world_size, self._device = 0, 1, None

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(LM=LM))
    adapter = adapter_of(chats["dream"], tmp_path, setting=Setting(
        "", length=8, block=8, steps=8, order="entropy", mc=2, rows=2))
    model = lm_eval_model(adapter, 1, 2)
    assert (model._rank, model._world_size) == (1, 2)
    ask = [SimpleNamespace(args=("ab", {"until": ["x"]}))]
    assert model.generate_until(ask) == adapter.generate_until([ask[0].args])
    assert model.loglikelihood_rolling([SimpleNamespace(args=("cd",))]) == [
        adapter.loglikelihood([("", "cd")])[0][0]]
    talk = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(talk) == adapter.template(talk)
    assert model.apply_chat_template([*talk, {"role": "assistant", "content": "So"}], False) == \
        adapter.template(talk) + "So"
    assert model.all_gather(torch.tensor(3)).tolist() == [3] == model.gather_object(3)


# ------------------------------------------------------------------ settings
def test_the_table_is_whole():
    """Every column has rows, and they are settings; MetaState's has four scores for each model."""
    assert COMMON.keys() == GENERATED.keys() and SCORED.keys() <= COMMON.keys()
    for column, model in COMMON:
        for benchmark, score, fields in rows(column, model):
            assert 0 < float(score) < 100
            setting, lines = choose(column, model, benchmark, {}, 128)
            assert setting.length % setting.block == 0 and score in lines[0]
            assert Setting(**fields).task
    assert all(len(scores.split()) == 4 for scores in METASTATE.values())


@pytest.mark.parametrize("column, model, name, given, expected", [
    ("llada", "llada-base", "gsm8k", {}, dict(shots=5, length=1024, block=1024, chat=False)),
    ("llada", "llada-instruct", "gsm8k", {}, dict(task="gsm8k_cot", length=512, hold="late")),
    ("llada", "llada-instruct", "gsm8k", {"length": 256}, dict(block=8, hold="no", steps=256)),
    ("llada", "llada-instruct", "humaneval", {"length": 64}, dict(block=64, hold="never")),
    ("dream", "dream-base", "mbpp", {}, dict(temperature=0.2, top_p=0.95, bos=True, block=512)),
    ("dream", "dream-instruct", "gsm8k_cot", {"shots": 2}, dict(shots=2, chat=True, keep=1024)),
    ("fast-dllm", "llada-instruct", "gsm8k", {}, dict(length=256, block=32, turns=False)),
    ("metastate", "dream-base", "math", {}, dict(task="minerva_math500", cache="dual", block=32)),
    ("metastate", "llada-base", "gsm8k", {"cache": "prefix"}, dict(length=256, cache="prefix")),
    ("llada", "llada-base", "arc_challenge", {}, dict(cfg=0.5, mc=128, rows=8)),
    ("llada", "llada-base", "own", {}, dict(task="own", length=48, block=48, shots=None))])
def test_a_column_is_picked(column, model, name, given, expected):
    """What is given goes before what is published, and picks among what a source has said."""
    setting, lines = choose(column, model, name, given, 48)
    assert {key: getattr(setting, key) for key in expected} == expected
    assert all(line in "\n".join(lines) for line in (["instead: "] if given else []))


def test_what_is_silent_is_said():
    """The stand-ins of a column that states little, other values of the same source, and a model
    that a column knows nothing of."""
    _, lines = choose("metastate", "llada-instruct", "gsm8k", {}, 128)
    assert "79.3; with length 512: 77.5" in lines[0]
    assert "78.5->79.5; the rest stands in" in lines[1]
    assert "OpenCompass" in choose("llada", "llada-1.5", "gsm8k", {}, 128)[1][1]
    with pytest.raises(InputError, match="--as dream has nothing of llada-base.*--as llada"):
        choose("dream", "llada-base", "gsm8k", {}, 128)
    assert model_of("llada-1.5", "llada", True) == "llada-1.5"
    assert model_of("dream-7b-base", "dream", False) == "dream-base"


# ------------------------------------------------------------------ own examples
@pytest.mark.parametrize("judge, answer, right, wrong", [
    ("exact", "a b", " a b\n", "a  b"), ("contains", "ell", "hello", "help"),
    ("number", "1,234.5", "first 7, so $1234.5.", "1234.5 or 6"), ("number", "-3", "it is -3", "3"),
    ("regex", r"^\d+ apples?$", "12 apples", "many apples")])
def test_judges(judge, answer, right, wrong):
    """Each way to judge."""
    assert JUDGES[judge](answer, right) and not JUDGES[judge](answer, wrong)


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "a"}', "no `answer`"), ('{"answer": "a"}', "neither a `prompt`"),
    ("hi", "not JSON"),
    ('{"prompt": "a", "answer": "b", "judge": "taste"}', "`judge` is 'taste'"),
    ('{"prompt": "a", "answer": "(", "judge": "regex"}', "no regular expression"),
    ('{"prompt": "a", "answer": "b", "until": "c"}', "`until` is no list"),
    ('{"messages": [{"role": "user"}], "answer": "b"}', "a role and a content")])
def test_a_bad_line_is_named(tmp_path, line, words):
    """Before any model is loaded."""
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n' + line + "\n")
    with pytest.raises(InputError, match="own.jsonl:2: .*" + words):
        read_examples(path)


@pytest.mark.parametrize("argv, words", [
    ([], "either --tasks or --data"), (["--tasks", "gsm8k"], "pip install lm-eval"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--tasks", "mbpp"], "pip install lm-eval"),
    (["--as", "dream"], "--as dream has nothing of llada-base"), (["--chat"], "no chat format"),
    (["--steps", "5", "--block-length", "12"], "do not divide"),
    (["--gen-length", "256"], "no room"), (["--order", "best"], "unknown order 'best'"),
    (["--threshold", "0.9", "--order", "random"], "a threshold needs"),
    (["--include-path", "/no/folder"], "is no folder"), (["--judge", "regex"], "expression")])
def test_one_line_of_refusal(tmp_path, monkeypatch, capsys, argv, words):
    """What cannot be done is said in one line, lm-eval's absence included."""
    monkeypatch.setattr(lib.plans, "find_spec", lambda name: None)
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "answer": "("}\n')
    if argv and not {"--tasks", "--data"} & {*argv}:
        argv = [*argv, "--data", str(tmp_path / "own.jsonl")]
    assert bench.main(["harness", *argv, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_code_is_run_where_allowed(monkeypatch, tmp_path, capsys):
    """HumanEval runs what the model writes: not unless asked."""
    monkeypatch.setattr(lib.plans, "find_spec", lambda name: "there")
    assert bench.main(["harness", "--tasks", "gsm8k,humaneval", "--out", str(tmp_path)]) == 2
    assert "humaneval: judging runs what the model writes" in capsys.readouterr().err


def test_what_is_no_share_is_not_compared():
    """A metric that is beyond 1 for one example, or no number, is left out as a whole; so is one
    that another variant's run has not."""
    def result(*values):
        return {"samples": {"t": [
            {"metrics": ["right", "far"], "filter": "none", "doc_id": i, "right": i % 2, "far": far}
            for i, far in enumerate(values)]}}

    assert scores_of(result(0.5, 1.5)) == {"right": {("t", 0): 0.0, ("t", 1): 1.0}}
    frozen, other = scores_of(result(0.5, 0.2)), scores_of(result(0.5, "none"))
    assert {*frozen} == {"right", "far"}
    table, _ = compared("t", {"frozen": [frozen], "MetaState": [other]})
    assert [row["metric"] for row in table] == ["right", "right"]


def test_pairs_of_several_seeds():
    """Leads of every variant over those before it; two training seeds count half each."""
    frozen = [{"right": {("t", i): float(i < 2) for i in range(8)}}]
    seeds = [{"right": {("t", i): float(i < n) for i in range(8)}} for n in (4, 6)]
    table, leads = compared("t", {"frozen": frozen, "MetaState": seeds})
    assert [r["accuracy"] for r in table] == [25.0, 62.5] and table[1]["seeds"] == [50.0, 75.0]
    [lead] = leads
    assert lead["points"] == 37.5 and (lead["better"], lead["worse"]) == (4, 0)
    assert (lead["variant"], lead["minus"]) == ("MetaState", "frozen")
