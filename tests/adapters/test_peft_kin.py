"""Methods that HF PEFT knows as something else around an ordinary LORA: LoRA+ and LoRA-FA (optimizers there), QA-LoRA
(an option of GPTQ layers), and KronA, a LOKR there (more of it in `test_peft_methods.py`)."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_cases import IDS, TEXT, TOKENS, attention, even, gpt2, llama, net, outputs, peft, randomise, seeded, to_peft
from safetensors.torch import load_file
from torch import nn

import mmpeft
from mmpeft.adapters.methods.kronecker import factor_pair
from mmpeft.adapters.peft.format import export_peft, load_peft
from mmpeft.errors import Unsupported

# --- LoRA+ and LoRA-FA -----------------------------------------------------------------------------------------------

KIN = [mmpeft.LoRAPlus, mmpeft.LoRAFA]
EVERYWHERE = "{table,conv1,conv2,grouped,conv3,fused,gpt,head}"


@pytest.mark.parametrize("kin", KIN)
@pytest.mark.parametrize(
    ("make", "x", "plan"),
    [
        (net, IDS, lambda kin: {EVERYWHERE: kin(rank=2, alpha=5)}),
        (net, IDS, lambda kin: {"fused": kin(rank=3, alpha=5), "gpt": kin(rank=2, alpha=7), "head": kin(rank=1)}),
        (net, IDS, lambda kin: {"conv2": kin(rank=2, alpha=3), "head": "full", "{fused,head}.bias": mmpeft.BitFit()}),
        (attention, TOKENS, lambda kin: {"attn": kin(rank=3, alpha=2)}),
        (attention, TOKENS, lambda kin: {"attn.in_proj_weight[q,v]": kin(rank=2, alpha=3), "attn.out_proj": kin(rank=3)}),
        (attention, TOKENS, lambda kin: {"experts": kin(rank=2, alpha=3), "head": kin(rank=2, alpha=7)}),
        (llama, TEXT, lambda kin: {"**.{q,v}_proj": kin(rank=2, alpha=4), "model.embed_tokens": kin(rank=3)}),
        (gpt2, TEXT, lambda kin: {"h.*.attn.c_attn[q,v]": kin(rank=2, alpha=3)}),
    ],
    ids=["every layer", "ranks", "beside", "mha", "mha slices", "experts", "llama", "slices"],
)  # fmt: skip
def test_written_as_lora(tmp_path: Path, kin: Any, make: Any, x: Any, plan: Any) -> None:
    config = to_peft(make, plan(kin), x, tmp_path, size=0.2)
    assert config["peft_type"] == "LORA" and config["use_rslora"] is False


def test_the_frozen_half_of_lora_fa_is_in_the_file(tmp_path: Path) -> None:
    model = mmpeft.attach(net(), {"fused": mmpeft.LoRAFA(rank=2, alpha=6)}, example=IDS)
    export_peft(model, tmp_path, example=IDS)
    (delta,) = [m for m in model.fused.modules() if type(m).__name__ == "Delta"]
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")["base_model.model.fused.lora_A.weight"], delta.A
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)


def test_rslora_and_starting_pairs_of_lora_plus(tmp_path: Path) -> None:
    config = to_peft(net, {"{fused,gpt}": mmpeft.LoRAPlus(rank=3, alpha=4, rslora=True)}, IDS, tmp_path / "a", size=0.1)
    assert config["use_rslora"] is True and config["lora_alpha"] == 4
    to_peft(net, {"{fused,head}": mmpeft.LoRAPlus(rank=2, init_from="pissa")}, IDS, tmp_path / "b", size=0.1)


def test_kin_share_one_file(tmp_path: Path) -> None:
    """They are one method to PEFT, so an adapter may mix them."""
    plan = {"conv1": mmpeft.LoRA(rank=2), "fused": mmpeft.LoRAPlus(rank=3, alpha=1), "head": mmpeft.LoRAFA(rank=2),
            "gpt": mmpeft.QALoRA(rank=2, alpha=4, group=3)}  # fmt: skip
    to_peft(net, plan, IDS, tmp_path)
    model = mmpeft.attach(net(), {"fused": mmpeft.LoRAPlus(rank=2), "head": mmpeft.IA3()}, example=IDS)
    with pytest.raises(Unsupported, match=r"mixes lora \(at fused.weight\) and ia3"):
        export_peft(model, tmp_path / "mixed", example=IDS)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sampled_sizes_and_scales(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw, few = data.draw, st.integers(1, 4)
    out, into, kernel = 4 * draw(few), 4 * draw(few), draw(st.integers(1, 3))
    layers = [
        (lambda: nn.Linear(into, out), torch.randn(2, 3, into)),
        (lambda: nn.Conv1d(into, out, kernel, draw(few), 1), torch.randn(2, into, 7)),
        (lambda: nn.Embedding(9, out), torch.randint(0, 9, (2, 5))),
    ]
    layer, x = draw(st.sampled_from(layers))
    layer = layer()
    rank = draw(st.integers(1, min(4, *((9, out) if isinstance(layer, nn.Embedding) else (out, into)))))
    kin = draw(st.sampled_from(KIN))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_peft(lambda: nn.Sequential(nn.Identity(), copy.deepcopy(layer)).eval(),
                {"1": kin(rank=rank, alpha=draw(st.integers(1, 9)))}, x, tmp_path_factory.mktemp("kin"), size=0.3)  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sampled_krona(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever sizes one decompose_factor makes at both layers, KronA of them is written, at any scale."""
    draw, sides = data.draw, st.integers(2, 12)
    channels, width, out, kernel = 2 * draw(sides), 2 * draw(sides), draw(sides), draw(st.integers(1, 3))
    factor = draw(st.sampled_from([-1, 2, 3, 4, 5]))

    def krona(rows: int, columns: int) -> mmpeft.KronA:
        a1, a2 = (factor_pair(n, factor)[0] for n in (rows, columns))
        return mmpeft.KronA(a1=a1, a2=a2, scale=draw(st.sampled_from([0.25, 1.0, 3.0])))

    def make() -> nn.Module:
        conv = nn.Conv2d(channels, width, kernel, padding=1, groups=2)
        return seeded(lambda: nn.Sequential(conv, nn.Flatten(2), nn.Linear((7 - kernel) ** 2, out)))

    state = make().state_dict()
    make_same = lambda: (net := make(), net.load_state_dict(state))[0]  # noqa: E731
    plan = {"0": krona(width, channels // 2), "2": krona(out, (7 - kernel) ** 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = to_peft(make_same, plan, torch.randn(2, channels, 4, 4), tmp_path_factory.mktemp("krona"), size=0.3)
    assert config["peft_type"] == "LOKR" and config["decompose_both"] is False


# --- QA-LoRA ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's layer for GPTQ weights around plain linear ones: the only one of its layers that pools its input."""
    from peft.tuners.lora import gptq, model

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        return gptq.GPTQLoraLinear(target, adapter_name, config=config, **kwargs) if type(target) is nn.Linear else None

    monkeypatch.setattr(model, "dispatch_gptq", dispatch)
    monkeypatch.setattr(model, "dispatch_default", lambda *a, **k: None)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"head": 2}, "alpha_pattern": {"fused": 1.5}},
        {"r": 30, "lora_alpha": 2},  # above every rank there is
    ],
    ids=["plain", "patterns", "high"],
)
def test_use_qalora_is_read(tmp_path: Path, gptq: None, options: dict[str, Any]) -> None:
    """PEFT multiplies the means by their number, in / group; here that is a part of alpha."""
    config = peft.LoraConfig(target_modules=["fused", "head"], use_qalora=True, qalora_group_size=4, **options)
    base = even()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad), 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, IDS)
    assert (expected - outputs(base, IDS)).abs().max() > 1e-3
    ours = load_peft(base, tmp_path / "theirs", example=IDS)
    torch.testing.assert_close(outputs(ours, IDS), expected, atol=1e-5, rtol=1e-5)
    found = [m.method for m in ours.modules() if type(m).__name__ == "Delta"]
    assert len(found) == 2 and all(isinstance(m, mmpeft.QALoRA) and m.group == 4 for m in found)


def test_qalora_is_written_as_the_lora_it_is(tmp_path: Path) -> None:
    """For every base: PEFT pools in GPTQ layers alone. A repeats in groups of a fourth."""
    config = to_peft(even, {"{fused,head}": mmpeft.QALoRA(rank=2, alpha=3, group=4)}, IDS, tmp_path, size=0.2)
    assert config["peft_type"] == "LORA" and not config.get("use_qalora")
    A = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.fused.lora_A.weight"]
    assert torch.equal(A.view(2, 3, 4), A.view(2, 3, 4)[..., :1].expand(2, 3, 4))


def test_use_qalora_on_other_layers_is_a_plain_lora(tmp_path: Path) -> None:
    """PEFT passes the option over there, and so does reading: the shapes in the file say which it was."""
    config = peft.LoraConfig(r=2, target_modules=["fused", "conv1", "table"], use_qalora=True, qalora_group_size=4)
    theirs = peft.get_peft_model(even(), config).eval()
    randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad), 0.2)
    theirs.save_pretrained(tmp_path)
    ours = load_peft(even(), tmp_path, example=IDS)
    torch.testing.assert_close(outputs(ours, IDS), outputs(theirs, IDS), atol=1e-5, rtol=1e-5)


def test_what_use_qalora_cannot_mean_is_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(even(), peft.LoraConfig(r=2, target_modules=["fused"]))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_qalora": True, "qalora_group_size": 1}))
    with pytest.raises(Unsupported, match="fused: groups of 1 look like a plain LoRA, whose scale is 12 times smaller"):
        load_peft(even(), tmp_path, example=IDS)


def test_a_read_qalora_merges_into_the_zeros_of_affine_integers(tmp_path: Path, gptq: None) -> None:
    """What PEFT's own cannot do ("does not support merge")."""
    make = lambda: seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))  # noqa: E731
    x = torch.randn(3, 8)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_qalora=True, qalora_group_size=4)
    theirs = peft.get_peft_model(make(), config).eval()
    randomise((p for p in theirs.parameters() if p.requires_grad), 0.3)
    theirs.save_pretrained(tmp_path)
    model = make()
    mmpeft.quantise(model, "0", mmpeft.Int(4, 4, affine=True))
    W, codes = model[0].weight.dense(), model[0].weight.packed["codes"].clone()
    load_peft(model, tmp_path, "a", example=x)
    layer = theirs.base_model.model[0]
    delta = layer.lora_variant["default"].forward(layer, "default", x, torch.zeros(3, 8))
    h = F.linear(x, W, model[0].bias) + delta.detach()
    torch.testing.assert_close(model[0](x), h, atol=1e-5, rtol=1e-5)
    mmpeft.merge_qalora(model, "a")
    torch.testing.assert_close(model[0](x), h, atol=1e-5, rtol=1e-5)
    assert torch.equal(model[0].weight.packed["codes"], codes)


def test_the_page_says_how_use_qalora_differs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "hf_peft.md").read_text(encoding="utf-8")
    assert re.search(r"use_qalora.*in / group", page.replace("\n", " "))
