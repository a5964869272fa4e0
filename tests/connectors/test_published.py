"""LLaVA, InternVL and Idefics3 / SmolVLM projectors of transformers as oracles, and LLaVA's weights."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from mmpeft.connectors import MLP, PixelShuffleMLP, QFormer, load_mlp, load_qformer
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


# ---- folders in the layout of the published repositories ---------------------------------------------------------------


TEXT = dict(vocab_size=40, num_hidden_layers=1, num_attention_heads=2, hidden_size=8, max_position_embeddings=32)


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory):
    """A tiny Blip2ForConditionalGeneration as `save_pretrained` shards it (Salesforce/blip2-opt-2.7b's files), and it."""
    import transformers

    config = transformers.Blip2Config(
        vision_config=dict(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28),
        qformer_config=dict(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=12,
            cross_attention_frequency=2, vocab_size=20,
        ),
        text_config=dict(TEXT, model_type="opt", ffn_dim=16, word_embed_proj_dim=8), num_query_tokens=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("blip2-opt")
    model.save_pretrained(folder, max_shard_size="15KB")
    return folder, model


def test_qformer_from_blip2s_own_folder(blip2_folder) -> None:
    """Sharded with an index; queries, ln_vision, the transformer and the projection equal transformers' on real tokens."""
    folder, theirs = blip2_folder
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("*.safetensors"))) > 2
    sizes = dict(num_queries=4, width=16, depth=3, heads=2, hidden_dim=24)
    ours = QFormer(in_dim=12, out_dim=8, **sizes, pretrained=str(folder)).eval()
    report = load_qformer(ours, folder)
    assert report.kept == () and len(report.loaded) == len(ours.state_dict())
    assert all(key.split(".")[0].startswith(("vision_model", "language_model")) for key in report.unused)
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        seen = theirs.vision_model.post_layernorm(x)
        out = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen)
        expected = theirs.language_projection(out.last_hidden_state)
        torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_only_the_shards_that_are_needed_must_be_there(blip2_folder, tmp_path) -> None:
    folder, _ = blip2_folder
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    mine = {f for k, f in shards.items() if not k.startswith(("language_model", "vision_model.e"))}
    for file in set(shards.values()) - mine:
        (part / file).unlink()
    sizes = dict(num_queries=4, width=16, depth=3, heads=2, hidden_dim=24)
    connector = QFormer(in_dim=12, out_dim=8, **sizes)
    load_qformer(connector, part)
    before = {k: v.clone() for k, v in connector.state_dict().items()}
    gone = shards["qformer.encoder.layer.0.crossattention.attention.key.weight"]
    (part / gone).unlink()
    with pytest.raises(NameNotFound, match=f"{gone}, which is not there"):
        load_qformer(connector, part)
    (part / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FileFormatError, match="no index of shards"):
        load_qformer(connector, part)
    assert all(torch.equal(v, before[k]) for k, v in connector.state_dict().items())


def test_llava_projector_from_the_published_folders(tmp_path) -> None:
    """transformers' sharded folder (llava-hf/llava-1.5-7b-hf); LLaVA's own: pickled shards with an index beside a
    Trainer's pickles, and a LoRA run's non_lora_trainables.bin."""
    import transformers

    config = transformers.LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=6, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8,
        ),
        text_config=dict(TEXT, model_type="llama", intermediate_size=16),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "hf", max_shard_size="2KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    theirs = model.model.multi_modal_projector
    state = {f"{i}.{n}": getattr(layer, n) for i, layer in ((0, theirs.linear_1), (2, theirs.linear_2)) for n in ("weight", "bias")}
    own = tmp_path / "llava"
    own.mkdir()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({"model.embed_tokens.weight": torch.zeros(3, 2)}, own / names[0])
    torch.save({f"model.mm_projector.{k}": v.detach() for k, v in state.items()}, own / names[1])
    index = {"model.embed_tokens.weight": names[0], **{f"model.mm_projector.{k}": names[1] for k in state}}
    (own / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    lora = tmp_path / "lora"
    lora.mkdir()
    torch.save({f"base_model.model.model.mm_projector.{k}": v.detach() for k, v in state.items()}, lora / "non_lora_trainables.bin")
    for folder in (own, lora):
        torch.save(SimpleNamespace(lr=1), folder / "training_args.bin")
    x = torch.randn(2, 5, 6)
    for folder in (tmp_path / "hf", own, lora):
        connector = MLP(in_dim=6, out_dim=8)
        load_mlp(connector, folder)
        torch.testing.assert_close(connector(x)[0], theirs(x))
