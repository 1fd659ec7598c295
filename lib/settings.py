"""How the published figures were made: which task of lm-eval, shots, length, block, temperature,
template and EOS handling, per family and per task, as papers and repositories state them; and the
options of `bench.py harness`, which go before them.

llada: github.com/ML-GSAI/LLaDA, EVAL.md, opencompass/ and eval_llada.py, 2025-10. dream:
github.com/DreamLM/Dream, eval/ and eval_instruct/, 2025-06. fast-dllm: github.com/NVlabs/Fast-dLLM,
llada/ and dream/, 2025-06 (MATH and MBPP as github.com/ZHZisZZ/dllm quotes them). metastate: arXiv
2603.01331 and its project page.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

from lib.cli import require
from lib.hub import CHECKPOINTS

SOURCES = ("llada", "dream", "fast-dllm", "metastate")
# Benchmark, lm-eval's task, shots, length, block, hold, temperature, published score. Of several
# values in one source each has its place between commas; "-" is unsaid: the task's own shots, EOS
# not held back, the temperature of `COMMON`; "=" is a single block. hold: "late" is LLaDA's
# confidence_eos_eot_inf, "never" its logits_eos_inf.
GENERATED = {
    ("llada", "llada-base"): """
        gsm8k     gsm8k                          5  1024,512,256  =     -       -    70.3,70.8,70.0
        math      minerva_math                   4  1024,512,256  =     -       -    31.4,30.9,30.3
        humaneval humaneval                      0  1024,512,256  =     -       -    35.4,32.9,32.9
        mbpp      mbpp                           3  1024,512,256  =     -       -    40.0,39.2,40.2
        bbh       bbh                            3  1024,512,256  =     -       -    49.7,50.4,45.0
    """,
    ("llada", "llada-instruct"): """
        gsm8k     gsm8k_cot                      4  512,256       =,8   late,no -    69.4,78.6
        math      minerva_math                   0  512,512       =,64  late,no -    31.9,42.2
        humaneval humaneval_instruct             0  512           =     never   -    49.4
        mbpp      mbpp_instruct                  3  256           =     late    -    41.0
        gpqa      gpqa_diamond_generative_n_shot 5  64            =     late    -    33.3
        mmlu      mmlu_generative                5  3             =     -       -    65.5
        mmlu_pro  mmlu_pro                       0  256           =     -       -    37.0
        arc       arc_challenge_chat             0  512           =     -       -    88.5
    """,
    ("llada", "llada-1.5"): """
        gsm8k     gsm8k_cot                      4  256           16    late    -    83.8
        math      minerva_math                   0  1024          128   late    -    42.6
        humaneval humaneval_instruct             0  512           32    late    -    52.4
        mbpp      mbpp_instruct                  3  512           32    late    -    42.8
        gpqa      gpqa_diamond_generative_n_shot 5  256           16    -       -    36.9
        ifeval    ifeval                         0  256           16    late    -    66.2
    """,
    ("dream", "dream-base"): """
        gsm8k     gsm8k_cot                      8  256           =     -       -    77.2
        math      minerva_math                   4  512           =     -       -    39.6
        humaneval humaneval                      0  512           =     -       0.2  57.9
        mbpp      mbpp                           3  512           =     -       0.2  56.2
        bbh       bbh                            3  512           =     -       -    57.9
    """,
    ("dream", "dream-instruct"): """
        gsm8k     gsm8k_cot                      0  256           =     -       -    81.0
        math      minerva_math                   0  512           =     -       -    39.2
        humaneval humaneval_instruct             0  768           =     -       -    55.5
        mbpp      mbpp_instruct                  0  1024          =     -       -    58.8
        mmlu      mmlu_generative                4  128           =     -       -    67.0
        mmlu_pro  mmlu_pro                       4  128           =     -       -    43.3
        ifeval    ifeval                         0  1280          =     -       -    62.5
    """,
    ("fast-dllm", "llada-instruct"): """
        gsm8k     gsm8k                          5  256,512       32    -       -    79.3,77.5
        math      minerva_math                   -  256,512       32    -       -    33.5,37.2
        humaneval humaneval                      0  256,512       32    -       -    41.5,43.9
        mbpp      mbpp                           -  256,512       32    -       -    29.4,14.8
    """,
    ("fast-dllm", "dream-base"): """
        gsm8k     gsm8k                          5  256,512       =     -       -    75.0,76.0
        math      minerva_math                   -  256,512       =     -       -    38.4,39.8
        humaneval humaneval                      0  256,512       =     -       -    49.4,54.3
        mbpp      mbpp                           -  256,512       =     -       -    56.6,55.6
    """,
}
METASTATE = {  # frozen -> with memory; 256 tokens, blocks of 32, a dual cache; nothing else is said
    "benchmark": "gsm8k math humaneval mbpp",
    "llada-base": "67.4->77.9 28.8->37.0 33.5->39.6 25.6->33.0",
    "llada-instruct": "78.5->79.5 36.8->37.8 37.2->39.6 26.0->32.2",
    "dream-base": "73.7->76.7 37.6->46.4 54.9->59.2 52.6->53.6",
    "dream-instruct": "74.8->78.1 45.0->46.6 56.1->59.8 51.0->55.0",
}
SCORED = {  # by likelihood: benchmark, task, shots, cfg, masks drawn, score
    ("llada", "llada-base"): """
        mmlu       mmlu              5  0      1    65.9
        arc        arc_challenge     0  0.5,0  128  47.9,45.9
        hellaswag  hellaswag         0  0.5,0  128  72.5,70.5
        piqa       piqa              0  0.5,0  128  74.4,73.6
        winogrande winogrande        5  0      128  74.8
        gpqa       gpqa_main_n_shot  5  0.5,0  128  26.1,25.2
        truthfulqa truthfulqa_mc2    0  2,0    128  46.4,46.1
    """,
    ("dream", "dream-base"): """
        mmlu       mmlu              5  0      128  69.5
        arc        arc_challenge     0  0      128  59.9
        hellaswag  hellaswag         0  0      128  73.3
        piqa       piqa              0  0      128  75.8
        winogrande winogrande        5  0      128  74.8
        gpqa       gpqa_main_n_shot  5  0      128  36.6
        race       race              0  0      128  44.7
    """,
    ("dream", "dream-instruct"): "gpqa gpqa_main_n_shot 5 0 32 33.0",
}
_LLADA = dict(order="low_confidence", rows=8)
_DREAM = dict(order="entropy", rows=32, window=2048)
COMMON = {
    ("llada", "llada-base"): _LLADA,
    ("llada", "llada-instruct"): dict(_LLADA, chat=True),
    ("llada", "llada-1.5"): dict(_LLADA, chat=True),
    ("dream", "dream-base"): dict(_DREAM, top_p=0.95, bos=True),
    ("dream", "dream-instruct"): dict(_DREAM, chat=True, temperature=0.1, top_p=0.9, rows=1,
                                      keep=1024),
    ("fast-dllm", "llada-instruct"): dict(_LLADA, chat=True, turns=False),
    ("fast-dllm", "dream-base"): dict(_DREAM, bos=True),
}
_CODE = "stop strings are ignored there and a sanitiser follows: here stop strings count"
_COMPASS = "the prompts there are OpenCompass's: lm-eval's stand in"
REMARKS = {  # where lm-eval and this adapter do something else than the source
    ("llada", "llada-instruct", ""): _COMPASS, ("llada", "llada-1.5", ""): _COMPASS,
    ("dream", "dream-base", "humaneval"): _CODE, ("fast-dllm", "dream-base", "humaneval"): _CODE,
    ("fast-dllm", "llada-instruct", "humaneval"): _CODE,
    ("dream", "dream-instruct", ""): "the tasks there are of its own fork: lm-eval's stand in",
}


@dataclass(frozen=True)
class Setting:
    """How one task is run."""
    task: str                     # lm-eval's name
    shots: int | None = None      # None: the task's own
    length: int = 128             # tokens of an answer
    block: int = 128
    steps: int = 128
    order: str = "low_confidence"
    temperature: float = 0.0
    top_p: float | None = None
    threshold: float | None = None
    cache: str | None = None
    cfg: float = 0.0              # guidance, of generations and of likelihoods
    hold: str = "no"              # EOS: "never" (its logit is -inf), "late" (its confidence is 0)
    chat: bool = False            # the prompt in the chat template
    turns: bool = True            # each shot as turns of its own, else all in one of the user's
    bos: bool = False             # BOS in front of a prompt without template
    window: int = 2 ** 31         # tokens that prompt and answer may have
    keep: int = 2 ** 31           # the last tokens of a prompt that count
    mc: int = 128                 # masks drawn for a likelihood
    rows: int = 8                 # of them at a time

    def decoding(self) -> dict:
        """The options of `generate`."""
        return dict(gen_length=self.length, block_length=self.block, steps=self.steps,
                    order=self.order, threshold=self.threshold, cache=self.cache,
                    temperature=self.temperature, top_p=self.top_p, cfg_scale=self.cfg)

    def __str__(self) -> str:
        shots = "its own shots" if self.shots is None else f"{self.shots} shots"
        task = f"lm-eval's {self.task}, {shots}, " if self.task else ""
        kind = ("chat template" + ", all in one turn" * (not self.turns)) if self.chat else \
            "no template, BOS in front" if self.bos else "no template, no BOS"
        extra = "".join(f", {name} {value}" for name, value in (
            ("top-p", self.top_p), ("threshold", self.threshold), ("cache", self.cache),
            ("cfg", self.cfg or None)) if value is not None)
        held = {"no": "as it comes", "late": "committed last", "never": "never written"}[self.hold]
        return (f"{task}{kind}; {self.length} tokens in blocks of {self.block}, {self.steps} steps,"
                f" order {self.order}, temperature {self.temperature:g}{extra}, EOS {held}; a "
                f"likelihood from {self.mc} masks")


# ------------------------------------------------------------------ which one
KINDS = dict(shots=int, length=int, block=int, hold=str, temperature=float, cfg=float, mc=int)


def model_of(ckpt: str, family: str, is_chat: bool) -> str:
    """What the columns call a checkpoint: its family, and whether it is a chat model."""
    if family == "llada" and "1.5" in str(CHECKPOINTS.get(ckpt, ckpt)).split("/")[-1]:
        return "llada-1.5"
    return f"{family}-{'instruct' if is_chat else 'base'}"


def rows(column: str, model: str) -> Iterator[tuple[str, str, dict]]:
    """(benchmark, published score, fields of a `Setting`) of all that a column states; block 0 is
    the whole answer."""
    for table, names in ((GENERATED, "shots length block hold temperature"),
                         (SCORED, "shots cfg mc")):
        for line in table.get((column, model), "").strip().splitlines():
            benchmark, task, *cells = line.split()
            cells = [cell.split(",") for cell in cells]
            for i in range(max(map(len, cells))):
                *values, score = (cell[min(i, len(cell) - 1)] for cell in cells)
                fields = {name: KINDS[name](value.replace("=", "0")) for name, value in
                          zip(names.split(), values) if value != "-"}
                yield benchmark, score, {"task": task, **fields}


def choose(column: str, model: str, name: str, given: dict,
           length: int) -> tuple[Setting, list[str]]:
    """The setting of a benchmark or lm-eval task as a column has it, for a model as `model_of` says
    it, and what a reader has to know of it, line by line. given: fields of a `Setting` that go
    before (None is passed over); length: of an answer where nothing is published. Raises
    `InputError` for a column that has nothing of this model."""
    given, base = {k: v for k, v in given.items() if v is not None}, column
    if column == "metastate":  # silent on nearly everything
        base = "fast-dllm" if ("fast-dllm", model) in COMMON else model.split("-")[0]
    require((base, model) in COMMON, f"--as {column} has nothing of {model}; there is "
            + ", ".join(f"--as {c}" for c, m in COMMON if m == model))
    found = [row for row in rows(base, model) if name in (row[0], row[2]["task"])]
    found.sort(key=lambda row: sum(row[2].get(k, v) != v for k, v in given.items()))
    if found:
        benchmark, score, fields = found[0]
        lines = [f"published by {base} for {model} on {benchmark}: {score}" + "".join(
            "; with " + ", ".join(f"{k} {v if v or k != 'block' else 'the whole'}"
                                  for k, v in other.items() if fields.get(k) != v) + f": {others}"
            for _, others, other in found[1:])]
        lines += [text for key in ("", benchmark) if (text := REMARKS.get((base, model, key)))]
    else:
        benchmark, fields = "", dict(task=name, length=length, block=32)
        lines = [(f"{base} has published nothing of {name}, whose own shots stand in; " if name
                  else "") + f"order, temperature and template are as {base} runs {model}, length "
                 "and blocks as everywhere in this project"]
    if column == "metastate":
        fields |= dict(length=256, block=32, cache="dual", task=fields["task"].replace(
            "minerva_math", "minerva_math500"))
        scores = dict(zip(METASTATE["benchmark"].split(), METASTATE.get(model, "").split()))
        lines.append("metastate states 256 tokens, blocks of 32, a dual cache and, frozen -> with "
                     f"memory, {scores.get(benchmark, 'no score')}; the rest stands in")
    if given:
        lines.append("instead: " + ", ".join(f"{k} {v}" for k, v in given.items()))
    fields = {"length": length, **COMMON[base, model], **fields, **given}
    block = fields.get("block") or fields["length"]
    fields["block"] = fields["length"] if fields["length"] % block else block
    return Setting(**{"steps": fields["length"], **fields}), lines
