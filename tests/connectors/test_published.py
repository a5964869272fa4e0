"""LLaVA, InternVL and Idefics3 / SmolVLM projectors of transformers as oracles, and LLaVA's weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmpeft.connectors import MLP, PixelShuffleMLP, load_mlp
from mmpeft.connectors.pixel_shuffle import space_to_depth
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound


@pytest.fixture(scope="module")
def llava() -> torch.nn.Module:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = SimpleNamespace(
        vision_feature_layer=-2, vision_config=SimpleNamespace(hidden_size=6),
        text_config=SimpleNamespace(hidden_size=8), multimodal_projector_bias=True, projector_hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaMultiModalProjector(config)


def test_llava_projector_loads_under_both_names(tmp_path, llava: torch.nn.Module) -> None:
    from safetensors.torch import save_file

    x, state = torch.randn(2, 5, 6), llava.state_dict()
    folder = {f"model.multi_modal_projector.{k}": v.clone() for k, v in state.items()} | {
        "lm_head.weight": torch.zeros(2)
    }
    save_file(folder, tmp_path / "model.safetensors")
    index = {"linear_1": "0", "linear_2": "2"}
    original = {f"model.mm_projector.{index[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in state.items()}
    torch.save(original, tmp_path / "mm_projector.bin")
    for source in (tmp_path, tmp_path / "mm_projector.bin", original):
        connector = MLP(in_dim=6, out_dim=8)
        load_mlp(connector, source)
        torch.testing.assert_close(connector(x)[0], llava(x))


def test_wrong_projectors_are_refused_and_change_nothing(tmp_path, llava: torch.nn.Module) -> None:
    state = {f"multi_modal_projector.{k}": v for k, v in llava.state_dict().items()}
    connector = MLP(in_dim=6, out_dim=8)
    before = {k: v.clone() for k, v in connector.state_dict().items()}
    key = "multi_modal_projector.linear_1.weight"
    cases = [
        ({"a": torch.zeros(1)}, FileFormatError, "no LLaVA projector"),
        ({**state, key: torch.zeros(8, 7)}, FileFormatError, r"\[8, 7\], expected \[8, 6\]"),
        ({**state, key: state[key] * float("inf")}, FileFormatError, "not finite"),
        ({k: v for k, v in state.items() if k != key}, FileFormatError, "needs"),
        (tmp_path / "nowhere", NameNotFound, "no such file"),
        (tmp_path, NameNotFound, "no .safetensors"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            load_mlp(connector, source)
    assert all(torch.equal(v, before[k]) for k, v in connector.state_dict().items())
    with pytest.raises(FileFormatError, match="2 Linears.*depth=3"):
        load_mlp(MLP(in_dim=6, out_dim=8, depth=3), state)
    with pytest.raises(ConfigError, match="build"):
        load_mlp(MLP(), state)


def test_pixel_shuffle_equals_idefics3() -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    x = torch.randn(2, 144, 5)
    for factor in (2, 3, 4):
        expected = Idefics3Connector.pixel_shuffle(None, x, factor)
        assert torch.equal(space_to_depth(x, 12, 12, factor), expected)


def test_mlp_equals_internvl_projector() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=5), text_config=SimpleNamespace(hidden_size=8), downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )  # fmt: skip
    theirs = InternVLMultiModalProjector(config)
    ours = PixelShuffleMLP(in_dim=5, out_dim=8)
    index = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    ours.layers.load_state_dict(
        {f"{index[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()}
    )
    x = torch.randn(2, 16, 5)
    torch.testing.assert_close(ours(x)[0], theirs(space_to_depth(x, 4, 4, 2)))
