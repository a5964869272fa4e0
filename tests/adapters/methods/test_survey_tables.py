"""The parameter counts of the survey's Table 1 (GLUE, RoBERTa-base and -large) and the true counts where its Table 2 (LLM
reasoning) prints shares of the nominal size, each by a plan on the architecture, on the meta device.

Numbers are those that the named configuration gives exactly; Table 1 prints them rounded (or cut) to three digits. Its
rows are with a two-class head or without, as the row here says. Diff pruning has a test of its own: what it stores is
less than what it trains. MoSLoRA, SFT, SK-Tuning's prompts on -large and its prefixes on -base have no
configuration that gives the printed number.
"""

from __future__ import annotations

import copy
import functools

import pytest

import mmpeft
from mmpeft.adapters.inspect import tensors_of
from mmpeft.adapters.plan import Plan, resolve
from mmpeft.encoders.presets import meta_model

pytest.importorskip("transformers")

SELF = "**.attention.self.{query,key,value}"
QV = "**.attention.self.{query,value}"
DOWN = "**.layer.*.output.dense"
LINEAR = f"{SELF} **.attention.output.dense **.intermediate.dense {DOWN}"
DENSE = "pooler.dense"  # of the size of a classifier's dense layer, which some rows count beside the encoder
EMBEDDINGS = "embeddings.{word,position,token_type}_embeddings"
FOUR_PLACES = "**.layer.*.attention **.attention.self **.attention.output **.layer.*.output"
HEAD = {"classifier": "full"}
IA3 = {"**.attention.self.{key,value}": mmpeft.IA3(), f"**.attention.output.dense {DOWN}": mmpeft.IA3(side="in")}


def bitfit(*patterns):
    return {" ".join(patterns): mmpeft.BitFit()}


def rocoft(rank, axis, *more):
    return {" ".join((LINEAR, *more)): mmpeft.RoCoFT(rank=rank, axis=axis)}


def propulsion(vectors):
    return {f"{LINEAR} {EMBEDDINGS} {DENSE}": mmpeft.Propulsion(vectors=vectors)}


TABLE_1 = [  # (row of the survey, with a head, plan, base, large); None: no such number in the survey
    ("FT", False, {"**": "full"}, 124_645_632, 355_359_744),
    ("AdapterS", False, {FOUR_PLACES: mmpeft.Bottleneck(size=100)}, 7_414_464, 19_768_704),
    ("Prompt tuning", True, {"roberta": mmpeft.PromptTuning(num_tokens=20)}, 607_490, 1_072_130),
    ("Prefix-tuning", True, {"**.attention.self": mmpeft.Prefix(num_tokens=20)}, 960_770, 2_034_690),
    ("(IA)3", True, IA3, 656_642, 1_223_682),
    ("BitFit", False, bitfit(LINEAR), 82_944, 221_184),
    ("BitFit + dense", False, bitfit(LINEAR, DENSE), 83_712, 222_208),
    ("LoRA", True, {QV: mmpeft.LoRA(rank=8)}, 887_042, 1_838_082),
    ("AdaLoRA", True, {QV: mmpeft.AdaLoRA(rank=12)}, 1_034_786, 2_231_874),
    (
        "MAM adapter",  # a parallel adapter of the hidden width; RoBERTa has no module that is the feed-forward alone
        True,
        {"**.attention.self": mmpeft.Prefix(num_tokens=16), "**.layer.*": mmpeft.AdaptFormer(size=48)},
        1_781_570,
        4_223_106,
    ),
    (
        "MAM adapter without biases",
        True,
        {"**.attention.self": mmpeft.Prefix(num_tokens=16), "**.layer.*": mmpeft.AdaptFormer(size=48, bias=False)},
        1_771_778,
        4_197_378,
    ),
    ("ProPETL adapter", True, {"**.layer.*.output": mmpeft.ProPETL()}, 1_870_082, 5_403_650),
    ("ProPETL LoRA", True, {QV: mmpeft.LoRA(rank=32)}, 1_771_778, 4_197_378),
    (
        "ProPETL prefix",  # as trained; 64 prefix tokens stay
        True,
        {"**.attention.self": mmpeft.PrefixTuning(num_tokens=64, hidden=512)},
        10_490_626,
        26_856_962,
    ),
    ("LoRA-XS", False, {LINEAR: mmpeft.LoRAXS(rank=60)}, 259_200, None),
    ("VeRA", False, {QV: mmpeft.VeRA(rank=1024)}, 43_008, None),
    ("LoRA-FA", False, {QV: mmpeft.LoRAFA(rank=24)}, 442_368, None),
    ("RoCoFT 1 row", False, rocoft(1, "rows"), 82_944, 221_184),
    ("RoCoFT 1 row + dense", False, rocoft(1, "rows", DENSE), 83_712, 222_208),
    ("RoCoFT 3 rows", False, rocoft(3, "rows"), 248_832, 663_552),
    ("RoCoFT 3 rows + dense", False, rocoft(3, "rows", DENSE), 251_136, 666_624),
    ("RoCoFT 1 column", False, rocoft(1, "columns"), 82_944, 221_184),
    ("RoCoFT 3 columns", False, rocoft(3, "columns"), 248_832, 663_552),
    ("Propulsion 1", False, propulsion(1), 86_016, 225_280),
    ("Propulsion 3", False, propulsion(3), 258_048, 675_840),
    ("Propulsion attention", False, {SELF: mmpeft.Propulsion()}, 27_648, 73_728),
    ("SK-Tuning prompts", True, {"roberta": mmpeft.PromptTuning(num_tokens=10)}, 599_810, None),
    ("SK-Tuning prefixes", True, {"**.attention.self": mmpeft.Prefix(num_tokens=18)}, None, 1_936_386),
]
UNIPELT = {  # its defaults: four gates a layer
    QV: mmpeft.Gated(mmpeft.LoRA(rank=8)),
    "**.attention.self": mmpeft.Gated(mmpeft.PrefixTuning(num_tokens=10, hidden=512)),
    "**.layer.*.output": mmpeft.Gated(mmpeft.Bottleneck(reduction=16)),
}
MAM_PREFIX = {"**.attention.self": mmpeft.PrefixTuning(num_tokens=30, hidden=800)}
ENCODER = [  # beside Table 1: what HF PEFT and AdapterHub count on the bare RoBERTa-base and -large encoders
    ("LoRA r=8", {QV: mmpeft.LoRA(rank=8)}, 294_912, 786_432),
    ("DoRA r=8", {QV: mmpeft.DoRA(rank=8)}, 313_344, None),
    ("AdaLoRA r=12", {QV: mmpeft.AdaLoRA(rank=12)}, 442_656, None),
    ("VeRA r=256", {QV: mmpeft.VeRA(rank=256)}, 24_576, None),
    ("(IA)3", IA3, 64_512, None),
    ("LayerNorm tuning", {"**": mmpeft.LayerNormTuning()}, 38_400, None),
    ("prompt 20", {".": mmpeft.PromptTuning(num_tokens=20)}, 15_360, None),
    ("prefix 20", {"**.attention.self": mmpeft.Prefix(num_tokens=20)}, 368_640, None),
    ("Houlsby", {"**.layer.*.attention **.layer.*.output": mmpeft.Bottleneck(reduction=16)}, 1_789_056, 6_343_680),
    ("Pfeiffer", {"**.layer.*.output": mmpeft.Bottleneck(reduction=16)}, 894_528, 3_171_840),
    ("parallel m=384", {"**.layer.*": mmpeft.AdaptFormer(size=384)}, 7_091_712, None),
    ("MaM", {**MAM_PREFIX, "**.layer.*": mmpeft.AdaptFormer(size=384, scale=4.0)}, 22_493_984, None),
    ("UniPELT", UNIPELT, 11_083_376, None),
]

SEVEN = "**.{q,k,v,o,gate,up,down}_proj"
LLAMA_IA3 = {"**.{k,v}_proj": mmpeft.IA3(), "**.down_proj": mmpeft.IA3(side="in")}
NORMS = "**.{input_layernorm,post_attention_layernorm,norm}"
GPTJ = "**.{q_proj,k_proj,v_proj,out_proj,fc_in,fc_out}"
BLOOM = "**.{query_key_value,dense,dense_h_to_4h,dense_4h_to_h}"
TABLE_2 = [  # (model, what, plan, count)
    ("meta-llama/Llama-2-7b-hf", "RoCoFT 3 rows", {SEVEN: mmpeft.RoCoFT(rank=3)}, 3_416_064),
    ("meta-llama/Llama-2-7b-hf", "RoCoFT 3 columns", {SEVEN: mmpeft.RoCoFT(rank=3, axis="columns")}, 4_079_616),
    ("meta-llama/Llama-2-7b-hf", "LoRA r=8 q,v", {"**.{q,v}_proj": mmpeft.LoRA(rank=8)}, 4_194_304),
    ("meta-llama/Llama-2-7b-hf", "LoRA r=16", {SEVEN: mmpeft.LoRA(rank=16)}, 39_976_960),
    ("meta-llama/Llama-2-7b-hf", "(IA)3", LLAMA_IA3, 614_400),
    ("meta-llama/Llama-2-7b-hf", "prefix 128", {"**.self_attn": mmpeft.Prefix(num_tokens=128)}, 33_554_432),
    ("meta-llama/Llama-2-7b-hf", "Propulsion", {SEVEN: mmpeft.Propulsion()}, 1_359_872),
    (
        "meta-llama/Llama-2-7b-hf",
        "RoCoFT's notebook: 3 columns, the head's too, and all norms",
        {f"{SEVEN} lm_head": mmpeft.RoCoFT(rank=3, axis="columns"), NORMS: mmpeft.LayerNormTuning()},
        4_441_856,
    ),
    ("meta-llama/Llama-2-7b-hf", "LoRA's there: r=4 q,k,v", {"**.{q,k,v}_proj": mmpeft.LoRA(rank=4)}, 3_145_728),
    ("meta-llama/Llama-2-13b-hf", "RoCoFT 3 rows", {SEVEN: mmpeft.RoCoFT(rank=3)}, 5_345_280),
    ("meta-llama/Llama-2-13b-hf", "RoCoFT 3 columns", {SEVEN: mmpeft.RoCoFT(rank=3, axis="columns")}, 6_389_760),
    ("meta-llama/Llama-2-13b-hf", "LoRA r=8 q,v", {"**.{q,v}_proj": mmpeft.LoRA(rank=8)}, 6_553_600),
    ("meta-llama/Llama-2-13b-hf", "(IA)3", LLAMA_IA3, 962_560),
    ("EleutherAI/gpt-j-6b", "RoCoFT 3 rows", {GPTJ: mmpeft.RoCoFT(rank=3)}, 3_096_576),
    ("EleutherAI/gpt-j-6b", "RoCoFT 3 columns", {GPTJ: mmpeft.RoCoFT(rank=3, axis="columns")}, 3_096_576),
    ("EleutherAI/gpt-j-6b", "LoRA r=8 q,v", {"**.{q,v}_proj": mmpeft.LoRA(rank=8)}, 3_670_016),
    ("bigscience/bloom-7b1", "RoCoFT 3 rows", {BLOOM: mmpeft.RoCoFT(rank=3)}, 2_580_480),
    ("bigscience/bloom-7b1", "RoCoFT 3 columns", {BLOOM: mmpeft.RoCoFT(rank=3, axis="columns")}, 3_317_760),
    ("bigscience/bloom-7b1", "LoRA r=8 qkv", {"**.query_key_value": mmpeft.LoRA(rank=8)}, 3_932_160),
]

# What Table 1 prints, in millions, and Table 2 for LLaMA2-7B and -13B.
PRINTED = {
    "FT": ("124.6", "355.3"), "AdapterS": ("7.41", "19.77"), "Prompt tuning": ("0.61", "1.07"),
    "Prefix-tuning": ("0.96", "2.03"), "(IA)3": ("0.66", "1.22"), "BitFit + dense": ("0.083", "0.222"),
    "LoRA": ("0.89", "1.84"), "AdaLoRA": ("1.03", "2.23"), "ProPETL adapter": ("1.87", "5.40"), "ProPETL LoRA": ("1.77", "4.19"),
    "ProPETL prefix": ("10.49", "26.85"), "MAM adapter": ("1.78", None), "MAM adapter without biases": (None, "4.20"),
    "RoCoFT 1 row + dense": ("0.083", "0.222"), "Propulsion 1": ("0.086", "0.225"),
    "Propulsion 3": ("0.258", "0.675"), "Propulsion attention": ("0.028", "0.073"), "VeRA": ("0.043", None),
    "LoRA-FA": ("0.44", None), "LoRA-XS": ("0.26", None), "SK-Tuning prefixes": (None, "1.94"),
}  # fmt: skip
RATIO_13B_7B = {"LoRA r=8 q,v": (24.30, 44.94), "(IA)3": (19.42, 36.02), "RoCoFT 3 rows": (13.47, 24.88)}


@functools.cache
def model(name, labels=None):
    return meta_model(f"hf:{name}", labels=labels)


def trained(root, plan):
    """What `inspect` counts, without the cost of a step."""
    read, shared = Plan.read(plan), {}
    targets = resolve(root, read)
    made = [tensors_of(root, t, [o for o in targets if o.rule == t.rule], shared) for t in targets]
    return sum(t.numel() for tensors in made for t in tensors.trained.values())


def both(rows):
    return [(*row[:-2], size, n) for row in rows for size, n in zip(("base", "large"), row[-2:], strict=True) if n]


@pytest.mark.parametrize(
    ("head", "plan", "size", "count"), [r[1:] for r in both(TABLE_1)], ids=[f"{r[0]} {r[3]}" for r in both(TABLE_1)]
)
def test_table_1(head, plan, size, count):
    root = model(f"FacebookAI/roberta-{size}", 2 if head else None)
    assert trained(root, plan | HEAD if head else plan) == count


@pytest.mark.parametrize(
    ("plan", "size", "count"), [r[1:] for r in both(ENCODER)], ids=[f"{r[0]} {r[2]}" for r in both(ENCODER)]
)
def test_counts_of_other_libraries(plan, size, count):
    assert trained(model(f"FacebookAI/roberta-{size}"), plan) == count


@pytest.mark.parametrize(
    ("name", "plan", "count"),
    [(n, p, c) for n, _, p, c in TABLE_2],
    ids=[f"{n.rpartition('/')[2]} {what}" for n, what, *_ in TABLE_2],
)
def test_true_counts_where_table_2_prints_shares(name, plan, count):
    assert trained(model(name), plan) == count


def test_table_1_prints_these_counts_rounded_or_cut():
    for name, _, _, *counts in TABLE_1:
        for count, printed in zip(counts, PRINTED.get(name, (None, None)), strict=True):
            if printed is not None:
                digits = len(printed.partition(".")[2])
                cut = int(count / 1e6 * 10**digits) / 10**digits
                assert float(printed) in (round(count / 1e6, digits), cut), (name, count, printed)


def test_the_heads_of_table_1():
    for size, numbers in (("base", 592_130), ("large", 1_051_650)):
        assert trained(model(f"FacebookAI/roberta-{size}", 2), HEAD) == numbers


def test_unipelt_is_its_parts_and_48_gates():
    gates = trained(model("FacebookAI/roberta-base"), UNIPELT)
    gates -= trained(model("FacebookAI/roberta-base"), {match: gated.inner for match, gated in UNIPELT.items()})
    assert gates == 12 * 4 * (768 + 1)


def test_diff_pruning_leaves_one_in_a_hundred_of_all_numbers():
    """Of the encoder without its pooler, biases, norms and embeddings included; chosen over all of them together, so that
    no tensor's rounding counts (tensor by tensor it would be another number)."""
    root = copy.deepcopy(model("FacebookAI/roberta-base"))
    mmpeft.attach(root, {"** !pooler.dense": mmpeft.DiffPruning(vectors=True)}, name="a", check=False)
    kept = [p for n, p in root.named_parameters() if "pooler" not in n and "_adapters" not in n]
    assert mmpeft.DiffGates(root, "a").count(density=0.01) == round(0.01 * sum(p.numel() for p in kept)) == 1_240_550
    assert sum(max(1, round(0.01 * p.numel())) for p in kept) != 1_240_550
    assert round(1_240_550 / 1e6, 2) == 1.24  # as printed


@pytest.mark.parametrize("what", RATIO_13B_7B)
def test_table_2_is_no_count(what):
    """Every method of its grows as layers times width, 13B over 7B by 1.56; what it prints grows as 13 / 7."""
    counts = {n: c for n, w, _, c in TABLE_2 if w == what}
    seven, thirteen = counts["meta-llama/Llama-2-7b-hf"], counts["meta-llama/Llama-2-13b-hf"]
    assert 1.56 <= thirteen / seven <= 1.57
    printed = RATIO_13B_7B[what]
    assert printed[1] / printed[0] == pytest.approx(13 / 7, rel=0.01) and printed[0] > 3 * seven / 1e6
