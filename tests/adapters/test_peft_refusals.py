"""HF PEFT folders: where peft itself is wrong, what cannot be expressed, and files that are broken."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import IDS, TEXT, TOKENS, attention, net, outputs, peft, randomise, seeded, to_peft, transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters.peft.format import export_peft, load_peft, read_peft
from mmpeft.errors import FileFormatError, NameNotFound, Unsupported

# --- where PEFT is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"padding": 1, "padding_mode": "reflect"}, {"dilation": 2}], ids=["reflect", "dilated"]
)
def test_convolutions_peft_gets_wrong(tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT builds lora_A from kernel, stride and padding alone. With reflect padding its branch pads with zeros, so its
    forward is not that of its own merged weight; with dilation the shapes do not even meet. W + s B A through the layer's
    own geometry is both the definition of LoRA and what PEFT's merge gives, and it is what is loaded here. Writing such
    an adapter would make PEFT compute something else, so it is refused."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 3, 3, **options)).eval()
    x = torch.randn(2, 2, 9, 9)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"])).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    try:
        unmerged = outputs(theirs, x)
    except RuntimeError:
        unmerged = None
    merged = outputs(theirs.merge_and_unload(), x)
    assert unmerged is None or (unmerged - merged).abs().max() > 1e-2  # PEFT contradicts itself
    load_peft(base, tmp_path / "theirs", example=x)
    torch.testing.assert_close(outputs(base, x), merged, atol=1e-5, rtol=1e-5)
    with pytest.raises(Unsupported, match=r"0\.weight: PEFT (runs|pads)"):
        export_peft(base, tmp_path / "ours", example=x)
    assert not (tmp_path / "ours").exists()


def test_out_proj_of_multihead_attention_counts_twice_in_peft(tmp_path: Path) -> None:
    """PEFT adds this update twice (huggingface/peft#3774), in forward and merge alike, and its adapters are trained that
    way: loading gives PEFT's outputs by doubling alpha there. If this fails, PEFT has changed; see OUT_PROJ_TIMES."""
    theirs = peft.get_peft_model(attention(), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"])).eval()
    layer = theirs.base_model.model.attn.base_layer.out_proj
    randomise([layer.lora_A["default"].weight, layer.lora_B["default"].weight])
    once = attention()
    with torch.no_grad():
        once.attn.out_proj.weight += layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert (outputs(theirs, TOKENS) - outputs(once, TOKENS)).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path)
    ours = load_peft(attention(), tmp_path, example=TOKENS)
    torch.testing.assert_close(outputs(ours, TOKENS), outputs(theirs, TOKENS), atol=1e-5, rtol=1e-5)


def test_weights_that_are_read_are_not_exported(tmp_path: Path) -> None:
    """timm's BEiT reads qkv.weight, so PEFT's wrapper would never run."""
    timm = pytest.importorskip("timm")
    beit = seeded(
        timm.create_model, "beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=2
    )
    x = torch.randn(2, 3, 32, 32)
    mmpeft.attach(beit, {"blocks.*.attn.qkv": mmpeft.LoRA(rank=2)}, example=x)
    with pytest.raises(Unsupported, match="blocks.0.attn.qkv"):
        export_peft(beit, tmp_path / "out", example=x)
    assert not (tmp_path / "out").exists()


def test_encoder_layers_are_exported_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's adapters in nn.TransformerEncoderLayer are skipped by its fast path in eval; without it they are right."""
    make = partial(seeded, nn.TransformerEncoderLayer, 8, 2, 12, batch_first=True)
    encoder = mmpeft.attach(
        nn.Sequential(make()), {"0.{linear1,linear2,self_attn}": mmpeft.LoRA(rank=2)}, example=TOKENS
    )
    randomise(p for g in mmpeft.parameter_groups(encoder, lr=1.0) for p in g["params"])
    with caplog.at_level("WARNING", "mmpeft"):
        export_peft(encoder, tmp_path, example=TOKENS)
    assert "set_fastpath_enabled" in caplog.text
    theirs = peft.PeftModel.from_pretrained(nn.Sequential(make()), tmp_path).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(outputs(encoder, TOKENS), outputs(theirs, TOKENS), atol=1e-5, rtol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"fused": mmpeft.LoRA(rank=2), "head": mmpeft.IA3()}, r"mixes lora \(at fused.weight\) and ia3"),
        ({"fused": mmpeft.RoCoFT(rank=1)}, "fused.weight: PEFT has no RoCoFT"),
        ({"fused": mmpeft.LoRA(rank=2), "head": mmpeft.RoCoFT(rank=1)}, "head.weight: PEFT has no RoCoFT"),
        ({"conv1.bias": mmpeft.BitFit()}, "conv1.bias: PEFT trains biases of linear layers alone"),
        ({"conv1": mmpeft.IA3()}, "conv1.weight: PEFT has no IA3 for a Conv1d"),
        ({"head.weight": mmpeft.IA3()}, "head.weight: PEFT scales the bias too"),
        ({"conv2": mmpeft.VeRA(rank=2)}, "conv2.weight: PEFT has no VeRA"),
        ({"fused": mmpeft.VeRA(rank=2), "gpt": mmpeft.VeRA(rank=2)}, "gpt.weight: PEFT has one pair of projections"),
        ({"grouped": mmpeft.DoRA(rank=2)}, "grouped.weight: PEFT has no DoRA for grouped"),
    ],
)
def test_what_peft_cannot_express_is_refused_before_writing(tmp_path: Path, plan: dict[str, Any], message: str) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"earlier")
    model = mmpeft.attach(net(), plan, example=IDS)
    with pytest.raises(Unsupported, match=message):
        export_peft(model, folder, example=IDS)
    assert [p.name for p in folder.iterdir()] == ["adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"earlier"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["fused", "head"]))
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bad_tensors_are_named(folder: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t["base_model.model.extra.lora_A.weight"] = torch.zeros(2)
        del t["base_model.model.head.lora_A.weight"]
        t["base_model.model.fused.lora_A.weight"] = torch.zeros(3, 4)

    edit(folder, change)
    model = net()
    with pytest.raises(FileFormatError) as error:
        load_peft(model, folder, example=IDS)
    for words in ("missing base_model.model.head.lora_A.weight", "extra base_model.model.extra.lora_A.weight",
                  "fused.lora_A.weight has shape (3, 4), expected (2, 3)"):  # fmt: skip
        assert words in str(error.value)
    assert not hasattr(model.head, "_adapters")  # nothing was attached


def test_nan_is_refused(folder: Path) -> None:
    edit(folder, lambda t: t["base_model.model.head.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(FileFormatError, match="head.lora_A.weight hold NaN"):
        read_peft(folder)


def test_pickles_and_broken_files_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileFormatError, match="truncated"):
        read_peft(folder)
    path.unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="pickle, which mmpeft never loads"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(FileFormatError, match="no JSON"):
        read_peft(folder)
    with pytest.raises(NameNotFound, match="holds no HF PEFT adapter"):
        read_peft(folder / "nowhere")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "XLORA"}, "PEFT type 'XLORA' has no method here.*mmpeft reads ADALORA"),
        ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens=\[3, 4\] changes what the adapter computes"),
        *[
            ({"init_lora_weights": i}, f"'{i}' rewrote the base")
            for i in ("corda", "loftq", "lora_ga", "pissa_niter_4")
        ],
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_modules": ["fused", "head", "norm"]}, "norm: PEFT has no LoRA for a LayerNorm"),
    ],
)
def test_configurations_without_counterpart_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    reconfigure(folder, **fields)
    with pytest.raises(Unsupported, match=message):
        load_peft(net(), folder, example=IDS)


@pytest.mark.parametrize("fields, message", [({"r": 0}, "r is 0"), ({"target_modules": "(fused"}, "no regular expression"),
                                             ({"target_modules": ["fused"]}, "extra base_model.model.head")])  # fmt: skip
def test_configurations_that_do_not_fit_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    reconfigure(folder, **fields)
    with pytest.raises(FileFormatError, match=message):
        load_peft(net(), folder, example=IDS)


def test_tied_weights(tmp_path: Path) -> None:
    """PEFT adapts one of two tied names and leaves the other on the base; here they are one weight."""
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=4, n_positions=20)
    make = partial(seeded, transformers.GPT2LMHeadModel, config)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["wte"]))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(Unsupported, match="tied to lm_head.weight"):
        load_peft(make(), tmp_path / "theirs", example=TEXT)
    model = mmpeft.attach(make(), {"transformer.wte": mmpeft.LoRA(rank=2)}, example=TEXT)
    with pytest.raises(Unsupported, match="tied to lm_head.weight"):
        export_peft(model, tmp_path / "ours", example=TEXT)


def test_names_that_end_alike(tmp_path: Path) -> None:
    """PEFT's lists match endings: 'fc' would hit 'net.fc' too, in targets, patterns and modules_to_save."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
            self.net = nn.ModuleDict({"fc": nn.Linear(6, 6), "aux_head": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net["aux_head"](self.net["fc"](self.fc(x))))

    x = torch.randn(3, 5)
    config = to_peft(lambda: seeded(Twice), {"fc": mmpeft.LoRA(rank=2)}, x, tmp_path / "a")
    assert config["target_modules"] == "fc"  # an expression, which PEFT matches against the whole path
    to_peft(
        lambda: seeded(Twice),
        {"net.fc": mmpeft.LoRA(rank=2), "fc": mmpeft.LoRA(rank=3), "head": "full"},
        x,
        tmp_path / "b",
    )
