"""HF PEFT's other methods: what has no counterpart is refused by name, before anything is read or written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft_cases import IDS, TOKENS, attention, even, outputs, peft
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.adapters.method import REGISTRY
from mmpeft.adapters.peft.decode import _METHODS
from mmpeft.adapters.peft.format import export_peft, load_peft
from mmpeft.adapters.peft.table import BY_METHOD, CODECS, files
from mmpeft.errors import FileFormatError, Unsupported

ABSENT = {
    "ADAMSS", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "DEFT", "FROD", "GLORA", "LILY", "MULTITASK_PROMPT_TUNING", "OSF",
    "PEANUT", "POLY", "PSOFT", "PVERA", "ROAD", "SHADOW", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "WAVEFT",
    "XLORA",
}  # fmt: skip


def test_every_type_of_peft_is_read_or_refused_by_name(tmp_path: Path) -> None:
    """A type that a new PEFT brings fails here."""
    theirs = peft.get_peft_model(even(), peft.LoraConfig(r=2, target_modules=["fused"]))
    theirs.save_pretrained(tmp_path)
    assert {kind.value for kind in peft.PeftType} == {*_METHODS, *CODECS, *ABSENT} - {"BONE"}
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for kind in ABSENT:
        path.write_text(json.dumps(config | {"peft_type": kind}))
        with pytest.raises(Unsupported, match=f"PEFT type '{kind}' has no method here.*mmpeft reads ADALORA, BEFT"):
            load_peft(even(), tmp_path, example=IDS)


def test_every_row_of_the_table_is_a_method() -> None:
    assert {*BY_METHOD} <= {cls.name for cls in REGISTRY.values()}


def test_the_catalogue_says_what_the_files_hold() -> None:
    assert files("loha") == files("dora") == files("bitfit") == files("prompt_tuning") == "both ways"
    assert files("fishmask") == "written as SHIRA" and files("krona") == "written as LOKR"
    assert files("lora+") == files("lora-fa") == "written as LORA"
    assert files("qa-lora") == "read from use_qalora, written as LORA"
    assert files("bottleneck") == ""


def test_the_page_names_every_type_and_method() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "hf_peft.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", page))
    assert {*_METHODS, *CODECS, *ABSENT} <= words
    assert {cls.__name__ for cls in REGISTRY.values() if files(cls.name)} - words == {
        "Full"
    }  # which a plan calls "full"


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"gpt": mmpeft.LoHa(rank=2)}, "gpt.weight: PEFT has no LOHA for a Conv1D"),
        ({"conv1": mmpeft.HRA(rank=2)}, "conv1.weight: PEFT has no HRA for a Conv1d"),
        ({"grouped": mmpeft.HiRA(rank=2)}, "grouped.weight: PEFT has no adapter of this type for a convolution of 2 groups"),
        ({"fused": mmpeft.OFT(block_size=4), "head": mmpeft.OFT(block_size=2)}, "PEFT has one oft_block_size"),
        ({"fused": mmpeft.OFT(block_size=4, side="out")}, "fused.weight: PEFT turns the input of a layer only"),
        ({"head": mmpeft.SHiRA(count=30)}, "head: PEFT's SHiRA has r .in . out. entries"),
        ({"fused": mmpeft.RandLoRA(rank=2), "gpt": mmpeft.RandLoRA(rank=2)}, "PEFT has one pair of projections"),
        ({"fused": mmpeft.LoKr(rank=1, factor=2), "head": mmpeft.LoKr(rank=1, factor=4)}, "PEFT has one decompose_factor"),
        ({"conv1": mmpeft.KronA(a1=2, a2=2)}, "conv1.weight: PEFT multiplies a whole second factor"),
        ({"conv2": mmpeft.KronA(a1=2, a2=3)}, "conv2.weight: a2 = 3 cuts through the kernels"),
        ({"fused": mmpeft.KronA(a1=8, a2=4)}, r"fused.weight: no decompose_factor of PEFT's makes a first factor of \(8, 4\)"),
        ({"fused": mmpeft.KronA(a1=2, a2=2), "head": mmpeft.KronA(a1=4, a2=4)},
         r"none gives KronA's sizes \(2, 2\) at fused, \(4, 4\) at head"),
        ({"fused": mmpeft.KronA(a1=2, a2=2), "head": mmpeft.LoKr(rank=1, factor=4)}, "PEFT has one decompose_factor"),
        ({"fused": mmpeft.C3A(block_size=4), "head": mmpeft.HRA(rank=2)}, r"mixes c3a \(at fused.weight\) and hra"),
        ({"fused": mmpeft.LoHa(rank=2), "head.weight": "full"}, None),
    ],
)  # fmt: skip
def test_what_peft_cannot_express(tmp_path: Path, plan: dict[str, Any], message: str | None) -> None:
    model = mmpeft.attach(even(), plan, example=IDS)
    if message is None:
        export_peft(model, tmp_path / "out", example=IDS)
        return
    with pytest.raises(Unsupported, match=message):
        export_peft(model, tmp_path / "out", example=IDS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"attn": mmpeft.LoHa(rank=2)}, "attn.in_proj_weight: PEFT has no LOHA for a MultiheadAttention"),
        ({"attn.out_proj": mmpeft.HRA(rank=2)}, "nn.MultiheadAttention reads out_proj's weight"),
        ({"experts.down_proj": mmpeft.HiRA(rank=2)}, "experts.down_proj: PEFT has no HIRA for a Experts"),
    ],
)
def test_attention_and_experts_are_lora_s_alone(tmp_path: Path, plan: dict[str, Any], message: str) -> None:
    model = mmpeft.attach(attention(), plan, example=TOKENS)
    with pytest.raises(Unsupported, match=message):
        export_peft(model, tmp_path / "out", example=TOKENS)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (peft.HRAConfig(r=3), "fused: rank 3; HRA starts from pairs of equal reflections"),
        (peft.RandLoraConfig(r=3, save_projection=False), "save_projection=False: PEFT draws RandLoRA's bases in bf16"),
    ],
    ids=["hra", "randlora"],
)
def test_what_is_not_represented_here(tmp_path: Path, config: Any, message: str) -> None:
    config = copy.deepcopy(config)
    config.target_modules = {"fused"}
    peft.get_peft_model(even(), config).save_pretrained(tmp_path)
    model = even()
    with pytest.raises(Unsupported, match=message):
        load_peft(model, tmp_path, example=IDS)
    assert not hasattr(model.fused, "_adapters")


def test_ranks_above_the_matrix(tmp_path: Path) -> None:
    """PEFT's MiSS takes any r up to the input; ours no more than the smaller side."""
    peft.get_peft_model(even(), peft.MissConfig(r=8, target_modules=["head"])).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="head: rank 8 at head.weight of shape .4, 8.; expected 1 to 4"):
        load_peft(even(), tmp_path, example=IDS)


def test_options_of_training_are_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = peft.LoHaConfig(r=2, rank_dropout=0.25, target_modules=["fused"], init_weights=False)
    theirs = peft.get_peft_model(even(), config).eval()
    theirs.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "mmpeft"):
        ours = load_peft(even(), tmp_path, example=IDS)
    assert "rank_dropout=0.25 acts in training only and is left out here" in caplog.text
    assert float((outputs(ours, IDS) - outputs(theirs, IDS)).abs().max()) < 1e-5


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: str) -> None:
    peft.get_peft_model(even(), peft.LoHaConfig(r=2, target_modules=["fused"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, key = load_file(path), "base_model.model.fused.hada_w2_a"
    given = tensors.pop(key)
    if change == "shape":
        tensors[key] = given[:, :1].contiguous()
    elif change == "extra":
        tensors |= {key: given, "base_model.model.head.hada_w2_a": given.clone()}
    save_file(tensors, path)
    words = {"missing": f"missing {key}", "shape": "expected .24, 2.", "extra": "extra base_model.model.head.hada_w2_a"}
    with pytest.raises(FileFormatError, match=words[change]):
        load_peft(even(), tmp_path, example=IDS)
