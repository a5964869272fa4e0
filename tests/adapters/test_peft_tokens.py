"""Single tokens of an embedding, alone and beside LoRA, tied heads, and prompts that an encoder made: HF PEFT both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import IDS, TEXT, from_peft, llama, net, outputs, peft, randomise, seeded, to_peft, transformers
from torch import nn

import mmpeft
from mmpeft.adapters.peft.format import export_peft, load_peft
from mmpeft.errors import Unsupported


def tied() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=4, n_positions=20)
    return seeded(transformers.GPT2LMHeadModel, config)


@pytest.mark.parametrize("make, target, x", [(net, "table", IDS), (llama, "embed_tokens", TEXT), (tied, "wte", TEXT)])
def test_tokens_both_ways(tmp_path: Path, make: Any, target: str, x: Any) -> None:
    config = peft.TrainableTokensConfig(token_indices=[2, 9, 4], target_modules=[target])
    ours = from_peft(make, config, x, tmp_path / "theirs", size=0.5)
    expected = outputs(ours, x)
    export_peft(ours, tmp_path / "ours", name="imported", example=x)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("indices", [[2, 9], {"embed_tokens": [3, 8, 5]}], ids=str)
def test_tokens_beside_lora(tmp_path: Path, indices: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    ours = from_peft(llama, config, TEXT, tmp_path / "theirs")
    expected = outputs(ours, TEXT)
    export_peft(ours, tmp_path / "ours", name="imported", example=TEXT)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again, TEXT), expected, atol=1e-5, rtol=1e-5)


def test_columns_of_an_embedding_to_peft(tmp_path: Path) -> None:
    plan = {"table": mmpeft.RoCoFT(rank=3, axis="columns", select="magnitude"), "fused": mmpeft.LoRA(rank=2)}
    to_peft(net, plan, IDS, tmp_path, size=0.5)


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"table": mmpeft.RoCoFT(rank=2)}, "table.weight: PEFT has no RoCoFT"),
        (
            {"table": mmpeft.RoCoFT(rank=2, axis="columns"), "fused": mmpeft.LoHa(rank=2)},
            "table: PEFT trains single tokens alone or beside LoRA",
        ),
    ],
    ids=["rows", "beside LoHa"],
)
def test_tokens_that_peft_cannot_hold(tmp_path: Path, plan: Any, message: str) -> None:
    model = mmpeft.attach(net(), plan, example=IDS)
    with pytest.raises(Unsupported, match=message):
        export_peft(model, tmp_path / "out", example=IDS)


def test_tokens_of_a_linear_layer_are_refused(tmp_path: Path) -> None:
    """PEFT takes them and computes with rows of a weight that no token names."""
    theirs = peft.get_peft_model(net(), peft.TrainableTokensConfig(token_indices=[1], target_modules=["fused"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="fused: PEFT has no TRAINABLE_TOKENS for a Linear"):
        load_peft(net(), tmp_path, example=IDS)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_is_read_as_the_prompts_it_made(tmp_path: Path, kind: str) -> None:
    """PEFT saves what the prompt encoder gives, not the encoder; the file holds plain soft prompts."""
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type=kind
    )
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    x = TEXT | {"attention_mask": torch.ones_like(TEXT["input_ids"])}
    ours = load_peft(base, tmp_path, example=x)
    torch.testing.assert_close(outputs(ours, x), outputs(theirs, x)[:, 3:], atol=1e-5, rtol=1e-5)


def test_prefix_both_ways(tmp_path: Path) -> None:
    """PEFT fills the KV cache and the tokens' positions start behind it; ours take none, so the keys are turned back."""
    base = llama()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    randomise((p for n, p in sorted(theirs.eval().named_parameters()) if p.requires_grad), 1.0)
    theirs.save_pretrained(tmp_path / "theirs")
    x = TEXT | {"attention_mask": torch.ones_like(TEXT["input_ids"])}
    x["attention_mask"][1, :3] = 0
    expected = outputs(theirs, x)
    plain = outputs(base, x)
    ours = load_peft(base, tmp_path / "theirs", example=x)
    seen = x["attention_mask"].bool()
    torch.testing.assert_close(outputs(ours, x)[seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert (expected - plain)[seen].abs().max() > 1e-3
    export_peft(ours, tmp_path / "ours", example=x)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again, x)[seen], expected[seen], atol=1e-5, rtol=1e-5)


def test_prefix_tuning_is_written_as_the_prefix_it_makes(tmp_path: Path) -> None:
    ours = mmpeft.attach(llama(), {"**.self_attn": mmpeft.PrefixTuning(num_tokens=5, hidden=6)}, example=TEXT)
    export_peft(ours, tmp_path, example=TEXT)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs, TEXT), outputs(ours, TEXT), atol=1e-5, rtol=1e-5)


def test_prefixes_without_counterpart(tmp_path: Path) -> None:
    """Learned positions are added to the input, so PEFT's shift of them is no prefix's doing; and every layer has one."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(tied(), config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(Unsupported, match="PEFT's prefix moves the tokens' positions"):
        load_peft(tied(), tmp_path / "gpt2", example=TEXT)
    some = mmpeft.attach(llama(), {"model.layers.1.self_attn": mmpeft.Prefix(num_tokens=2)}, example=TEXT)
    with pytest.raises(Unsupported, match="in every attention of the decoder.*layers.0"):
        export_peft(some, tmp_path / "some", example=TEXT)
