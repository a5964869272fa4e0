"""Where HF PEFT is wrong, mmpeft computes the definition: each test shows PEFT's result to differ from it and ours to
equal it. A test that fails because PEFT no longer differs says that PEFT was mended; see the file it names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import IDS, TEXT, boft, even, llama, net, outputs, peft, randomise, seeded
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters.peft.format import export_peft, load_peft
from mmpeft.errors import Unsupported

PLANE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))


def theirs_of(base: nn.Module, config: Any, size: float = 0.2) -> Any:
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise((p for n, p in sorted(model.named_parameters()) if p.requires_grad), size)
    return model


def far(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-2


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- single adapters -------------------------------------------------------------------------------------------------


def test_oft_on_kernels_above_one(tmp_path: Path) -> None:
    """PEFT turns unfolded patches and folds them back, so pixels under several patches count several times. Its merge
    gives W R, which is OFT, and what its file is read as; to write such an adapter is refused."""
    base = nn.Sequential(seeded(nn.Conv2d, 4, 8, 3, padding=1))
    theirs = theirs_of(base, peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "theirs")
    R = theirs.base_model.model[0].oft_R["default"].get_weight()  # its transpose is the rotation of the definition
    conv = base[0]
    defined = nn.functional.conv2d(PLANE, (conv.weight.flatten(1) @ R.T).view_as(conv.weight), conv.bias, padding=1)
    assert far(outputs(theirs, PLANE), defined)
    near(outputs(theirs.merge_and_unload(), PLANE), defined.detach())
    ours = load_peft(base, tmp_path / "theirs", example=PLANE)
    near(outputs(ours, PLANE), defined.detach())
    with pytest.raises(Unsupported, match="PEFT folds turned patches"):
        export_peft(ours, tmp_path / "ours", example=PLANE)


def test_short_neumann_series() -> None:
    """Of n terms, (I + Q)(I + Q + ... + Q^(n - 2)): PEFT's series of 3 is that of 4 (which is how it is read), and that
    of 2 is I + 2 Q, the first two terms of the endless series, which no n gives (refused)."""
    from peft.tuners.oft.layer import OFTRotationModule

    module = OFTRotationModule(1, 6, 4, 4)
    v = torch.randn(1, 6) * 0.2
    Q = module._pytorch_skew_symmetric(v, 4)[0]
    eye = torch.eye(4)
    series = {n: module._cayley_batch(v, 4, True, n)[0] for n in (2, 3, 4)}
    near(series[4], (eye + Q) @ (eye + Q + Q @ Q))
    assert far(series[3], (eye + Q) @ (eye + Q))
    near(series[3], series[4])
    assert far(series[2], eye + Q)


def test_two_neumann_terms_are_refused(tmp_path: Path) -> None:
    theirs_of(even(), peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, target_modules=["fused"])
              ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(Unsupported, match=r"fused: 2 Neumann terms are I \+ 2 Q in PEFT"):
        load_peft(even(), tmp_path, example=IDS)


def test_butterfly_factors_without_the_cuda_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT makes every BOFT one factor where its CUDA extension is missing, whatever the configuration says. With the
    extension's block diagonal in plain torch, three factors are read and written."""
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["0"])
    base = nn.Sequential(seeded(nn.Linear, 16, 6))
    x = torch.randn(3, 5, 16)
    assert theirs_of(base, copy.deepcopy(config)).base_model.model[0].boft_R["default"].shape[0] == 1

    class BlockDiagonal:
        @staticmethod
        def apply(R: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*blocks) for blocks in R])

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", BlockDiagonal)
    theirs = theirs_of(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_peft(copy.deepcopy(base), tmp_path / "theirs", example=x)
    assert ours[0]._adapters is not None
    near(outputs(ours, x), outputs(theirs, x))
    export_peft(ours, tmp_path / "ours", example=x)
    near(outputs(peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval(), x), outputs(theirs, x))


@pytest.mark.parametrize("config", [peft.HRAConfig(r=4), peft.BOFTConfig(boft_block_size=4)], ids=["hra", "boft"])
@pytest.mark.parametrize("geometry", [{"stride": (2, 1)}, {"dilation": 2}, {"padding": (0, 2)}], ids=str)
def test_convolutions_of_hra_and_boft(tmp_path: Path, config: Any, geometry: dict[str, Any]) -> None:
    """They run a convolution of their own with the first stride and padding and no dilation; merged they are right."""
    base = nn.Sequential(seeded(nn.Conv2d, 4, 8, 3, **geometry))
    config = copy.deepcopy(config)
    config.target_modules = {"0"}
    theirs = theirs_of(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    wrong = outputs(theirs, PLANE)
    merged = outputs(theirs.merge_and_unload(), PLANE)
    assert wrong.shape != merged.shape or far(wrong, merged)
    ours = load_peft(base, tmp_path / "theirs", example=PLANE)
    near(outputs(ours, PLANE), merged)
    with pytest.raises(Unsupported, match="PEFT (takes the first number|runs this convolution without)"):
        export_peft(ours, tmp_path / "ours", example=PLANE)


@pytest.mark.parametrize("config", [peft.LoHaConfig(r=2), peft.HiraConfig(r=2), peft.AdaLoraConfig(init_r=2, total_step=9)],
                         ids=["loha", "hira", "adalora"])  # fmt: skip
def test_padding_that_is_not_zeros(tmp_path: Path, config: Any) -> None:
    base = nn.Sequential(seeded(nn.Conv2d, 4, 8, 3, padding=1, padding_mode="reflect"))
    config = copy.deepcopy(config)
    config.target_modules = {"0"}
    theirs = theirs_of(base, config, 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    wrong = outputs(theirs, PLANE)
    merged = outputs(theirs.merge_and_unload(), PLANE)
    assert (wrong - merged).abs().max() > 1e-3
    ours = load_peft(base, tmp_path / "theirs", example=PLANE)
    near(outputs(ours, PLANE), merged)
    with pytest.raises(Unsupported, match="PEFT pads the input with zeros, not by 'reflect'"):
        export_peft(ours, tmp_path / "ours", example=PLANE)


def test_lokr_with_a_whole_factor_of_a_conv1d(tmp_path: Path) -> None:
    """torch.kron lines axes up from the right, so the kernel's axis of lokr_w2 meets the input axis of lokr_w1: PEFT's
    update is no C (x) D in either direction. Refused both ways; Conv2d and decomposed factors are right."""
    base = nn.Sequential(seeded(nn.Conv1d, 4, 8, 3))
    x = torch.randn(2, 4, 9)
    theirs = theirs_of(base, peft.LoKrConfig(r=4, alpha=4, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    C, D = layer.lokr_w1["default"], layer.lokr_w2["default"]
    defined = torch.einsum("lm,knt->lkmnt", C, D).reshape_as(base[0].weight)
    assert far(layer.get_delta_weight("default"), defined)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(Unsupported, match="no Kronecker product"):
        load_peft(copy.deepcopy(base), tmp_path / "theirs", example=x)
    ours = mmpeft.attach(copy.deepcopy(base), {"0": mmpeft.LoKr(rank=4)}, example=x)
    values = {"C": C, "D": D.flatten(1)}
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if n.rpartition(".")[2] in values:
                p.copy_(values[n.rpartition(".")[2]])
        near(ours[0].weight - base[0].weight, defined)
    with pytest.raises(Unsupported, match="no Kronecker product"):
        export_peft(ours, tmp_path / "ours", example=x)


def test_rank_pattern_of_hira_is_ignored(tmp_path: Path) -> None:
    """PEFT looks rank_pattern up and then builds every layer with r. The file says what was trained; sites of several
    ranks are written at the largest."""
    config = peft.HiraConfig(r=2, rank_pattern={"head": 3}, target_modules=["fused", "head"])
    theirs = theirs_of(even(), config, 0.5)
    assert theirs.base_model.model.head.hira_A["default"].shape[0] == 2
    theirs.save_pretrained(tmp_path)
    near(outputs(load_peft(even(), tmp_path, example=IDS), IDS), outputs(theirs, IDS))


# --- several adapters ------------------------------------------------------------------------------------------------


def pair(tmp_path: Path, make: Any, first: Any, second: Any, x: Any) -> tuple[Any, nn.Module]:
    """Two random adapters "a" and "b": PEFT's model, and ours with both loaded."""
    theirs = peft.get_peft_model(make(), copy.deepcopy(first), adapter_name="a").eval()
    theirs.add_adapter("b", copy.deepcopy(second))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sorted(theirs.named_parameters()):
            if name.endswith((".a", ".b", ".a.weight", ".b.weight")):
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    theirs.save_pretrained(tmp_path)
    ours = make()
    for name in "ab":
        load_peft(ours, tmp_path / name, name, example=x)
    return theirs, ours


def test_mixed_batches(tmp_path: Path) -> None:
    """Rows of a batch on different adapters. PEFT ignores `adapter_names` for every method but LoRA and two more: the
    row of the base gets the adapter. Ours are the rows of single runs."""
    targets = {"target_modules": ["q_proj", "v_proj"]}
    theirs, ours = pair(
        tmp_path, llama, peft.LoHaConfig(r=2, **targets), peft.LoHaConfig(r=2, alpha=3, **targets), TEXT
    )
    theirs.set_adapter("a")
    with torch.no_grad():
        mixed = theirs(**TEXT, adapter_names=["__base__", "a", "b"]).logits
    single = {}
    for name in (None, "a", "b"):
        with mmpeft.use(ours, name):
            single[name] = outputs(ours, TEXT)
    assert far(mixed[0], single[None][0]) and far(mixed[2], single["b"][2])  # all rows got "a"
    near(mixed, single["a"])
    with mmpeft.use(ours, rows=[None, "a", "b"]):
        rows = outputs(ours, TEXT)
    near(rows, torch.stack([single[None][0], single["a"][1], single["b"][2]]))


def lora_pair(tmp_path: Path, **options: Any) -> tuple[Any, nn.Module, list[Tensor]]:
    """Two LoRAs on one layer, and what each adds to its weight."""
    first = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fused"], **options)
    second = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fused"], **options)
    theirs, ours = pair(tmp_path, net, first, second, IDS)
    layer = theirs.base_model.model.fused
    return theirs, ours, [layer.get_delta_weight(name).detach() for name in "ab"]


def with_change(change: Tensor) -> Tensor:
    defined = net()
    with torch.no_grad():
        defined.fused.weight += change
    return outputs(defined, IDS)


def test_merging_one_of_two_active_adapters(tmp_path: Path) -> None:
    """Once something is merged, PEFT runs no active adapter that is not (huggingface/peft#3756)."""
    theirs, ours, (a, b) = lora_pair(tmp_path)
    defined = with_change(a + b)
    theirs.base_model.set_adapter(["a", "b"])
    near(outputs(theirs, IDS), defined)
    theirs.merge_adapter(["a"])
    near(outputs(theirs, IDS), with_change(a))
    assert far(outputs(theirs, IDS), defined)
    mmpeft.use(ours, "a")
    mmpeft.merge(ours)
    mmpeft.use(ours, "b")
    near(outputs(ours, IDS), defined)


def test_weighted_sums(tmp_path: Path) -> None:
    """PEFT's "linear" combination weighs A and B apart, so that the products of one's A with the other's B come along
    (huggingface/peft#3004); ours adds the deltas."""
    theirs, ours, (a, b) = lora_pair(tmp_path)
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type="linear")
    theirs.set_adapter("sum")
    defined = with_change(0.7 * a + 0.3 * b)
    assert far(outputs(theirs, IDS), defined)
    with mmpeft.use(ours, {"a": 0.7, "b": 0.3}):
        near(outputs(ours, IDS), defined)


def test_one_adapter_with_weight_one(tmp_path: Path) -> None:
    """Which is that adapter: not in PEFT with rsLoRA, whose scale the combination forgets (huggingface/peft#3761)."""
    theirs, ours, (a, _) = lora_pair(tmp_path, use_rslora=True)
    theirs.add_weighted_adapter(["a"], [1.0], "same", combination_type="linear")
    theirs.set_adapter("same")
    assert far(outputs(theirs, IDS), with_change(a))
    with mmpeft.use(ours, {"a": 1.0}):
        near(outputs(ours, IDS), with_change(a))
