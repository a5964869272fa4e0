"""The Q-Former against transformers' own, its weight loaders, and instructions."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from mmpeft.connectors import QFormer, load_qformer
from mmpeft.connectors.qformer_weights import LAYER_PARTS
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound

IN, OUT, WIDTH, QUERIES, VOCAB = 20, 14, 24, 5, 31
SIZES = {"num_queries": QUERIES, "width": WIDTH, "depth": 3, "heads": 4, "hidden_dim": 40}


def small(**options: object) -> QFormer:
    return QFormer(in_dim=IN, out_dim=OUT, **{**SIZES, **options}).eval()


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Large random values everywhere, norms and biases included, so that a swapped tensor shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.dim() == 1 else 0.0))
    return module.eval()


def hf_config(cls: type) -> object:
    return cls(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=16, cross_attention_frequency=2, encoder_hidden_size=IN,
    )  # fmt: skip


@pytest.fixture(scope="module")
def blip2() -> torch.nn.Module:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    return randomise(Blip2QFormerModel(hf_config(Blip2QFormerConfig)), 1)


@pytest.fixture(scope="module")
def instruct() -> torch.nn.Module:
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    return randomise(InstructBlipQFormerModel(hf_config(InstructBlipQFormerConfig)), 2)


@pytest.fixture
def media() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(3, 9, IN), torch.arange(9) < torch.tensor([9, 4, 1])[:, None]


@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_transformers_blip2(blip2: torch.nn.Module, media: tuple[Tensor, Tensor], masked: bool) -> None:
    tokens, mask = media
    connector = small()
    report = load_qformer(connector, blip2.state_dict())
    assert not report.unused
    assert set(report.kept) == {"queries", "ln_vision.weight", "ln_vision.bias", "project.weight", "project.bias"}
    queries = torch.randn(3, QUERIES, WIDTH)
    expected = blip2(
        query_embeds=queries, encoder_hidden_states=tokens, encoder_attention_mask=mask.long() if masked else None
    ).last_hidden_state
    given = connector.core(queries, tokens, mask if masked else None)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert given.std() > 0.1


def test_gradients_equal_transformers(blip2: torch.nn.Module, media: tuple[Tensor, Tensor]) -> None:
    connector = small()
    load_qformer(connector, blip2.state_dict())
    queries = torch.randn(3, QUERIES, WIDTH)
    ours, theirs = media[0].clone().requires_grad_(), media[0].clone().requires_grad_()
    direction = torch.randn(3, QUERIES, WIDTH)
    (connector.core(queries, ours) * direction).sum().backward()
    (blip2(query_embeds=queries, encoder_hidden_states=theirs).last_hidden_state * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_equal_to_transformers_instructblip(instruct: torch.nn.Module, media: tuple[Tensor, Tensor]) -> None:
    tokens, mask = media
    connector = small(text_vocab=VOCAB, text_positions=16)
    assert not load_qformer(connector, instruct.state_dict()).unused
    queries, ids = torch.randn(3, QUERIES, WIDTH), torch.randint(1, VOCAB, (3, 7))
    text_mask = torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    joint = torch.cat([torch.ones(3, QUERIES), text_mask], dim=1)
    expected = instruct(
        input_ids=ids, attention_mask=joint, query_embeds=queries,
        encoder_hidden_states=tokens, encoder_attention_mask=mask.long(),
    ).last_hidden_state[:, :QUERIES]  # fmt: skip
    torch.testing.assert_close(connector.core(queries, tokens, mask, ids, text_mask), expected, atol=1e-5, rtol=0)


def test_instruction_changes_the_queries_and_its_padding_does_not() -> None:
    connector = randomise(small(text_vocab=VOCAB, text_positions=16), 4)
    x, ids = torch.randn(2, 6, IN), torch.randint(0, VOCAB, (2, 5))
    plain, _ = connector(x)
    told, _ = connector(x, None, ids)
    assert (plain - told).abs().max() > 1e-2
    short, _ = connector(x, None, ids[:, :3])
    padded, _ = connector(x, None, ids, (torch.arange(5) < 3).expand(2, 5))
    torch.testing.assert_close(short, padded, atol=1e-5, rtol=1e-5)
    told.sum().backward()
    last = f"core.layers.{connector.depth - 1}.text_ffn"  # read by no later layer
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        assert name.startswith(last) or (parameter.grad != 0).any(), name
    with pytest.raises(ConfigError, match="text_vocab"):
        small()(x, None, ids)
    with pytest.raises(ConfigError, match="L <= 16"):
        connector(x, None, torch.zeros(2, 17, dtype=torch.long))
    with pytest.raises(ConfigError, match="bool mask"):
        connector(x, None, ids, torch.ones(2, 5))


def lavis_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our own state dict under LAVIS' names, written out here independently of the loader's table."""
    renamed = {}
    swaps = (
        (".cross_attention.", ".crossattention."), (".attention.query", ".attention.self.query"),
        (".attention.key", ".attention.self.key"), (".attention.value", ".attention.self.value"),
        ("crossattention.query", "crossattention.self.query"), ("crossattention.key", "crossattention.self.key"),
        ("crossattention.value", "crossattention.self.value"), ("attention.dense", "attention.output.dense"),
        ("attention.norm", "attention.output.LayerNorm"), ("query_ffn.up", "intermediate_query.dense"),
        ("query_ffn.down", "output_query.dense"), ("query_ffn.norm", "output_query.LayerNorm"),
        ("text_ffn.up", "intermediate.dense"), ("text_ffn.down", "output.dense"),
        ("text_ffn.norm", "output.LayerNorm"), ("core.layers.", "Qformer.bert.encoder.layer."),
        ("core.norm", "Qformer.bert.embeddings.LayerNorm"),
        ("core.text.word", "Qformer.bert.embeddings.word_embeddings"),
        ("core.text.position", "Qformer.bert.embeddings.position_embeddings"), ("project", "opt_proj"),
    )  # fmt: skip
    for name, tensor in state.items():
        for old, new in swaps:
            name = name.replace(old, new)
        renamed["query_tokens" if name == "queries" else name] = tensor
    return renamed


@pytest.mark.parametrize("text", [False, True])
def test_lavis_checkpoint_round_trip(tmp_path, text: bool) -> None:
    options = {"text_vocab": VOCAB, "text_positions": 16} if text else {}
    teacher = randomise(small(**options), 5)
    state = lavis_names({k: v.clone() for k, v in teacher.state_dict().items()})
    extra = {"Qformer.cls.predictions.bias": torch.zeros(3), "visual_encoder.cls_token": torch.zeros(1)}
    torch.save({"model": state | extra, "epoch": 9}, tmp_path / "blip2.pth")
    student = small(**options, pretrained=str(tmp_path / "blip2.pth"))
    x = torch.randn(2, 6, IN)
    assert torch.equal(student(x)[0], teacher(x)[0])
    report = load_qformer(student, tmp_path / "blip2.pth")
    assert report.unused == tuple(sorted(extra)) and report.kept == ()
    assert len(report.loaded) == len(teacher.state_dict())


def test_text_branch_is_left_out_when_not_wanted(instruct: torch.nn.Module) -> None:
    connector = small()
    report = load_qformer(connector, instruct.state_dict())
    assert all("intermediate." in k or ".output." in k or "_embeddings" in k for k in report.unused)
    assert any("word_embeddings" in k for k in report.unused)


def test_sharded_transformers_folder_with_queries_norm_and_projection(tmp_path, blip2: torch.nn.Module, caplog) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(6)
    around = {
        "query_tokens": torch.randn(1, QUERIES, WIDTH),
        "vision_model.post_layernorm.weight": torch.randn(IN),
        "vision_model.post_layernorm.bias": torch.randn(IN),
        "language_projection.weight": torch.randn(OUT, WIDTH),
        "language_projection.bias": torch.randn(OUT),
        "language_model.lm_head.weight": torch.randn(4, 4),
    }
    save_file({f"qformer.{k}": v.clone() for k, v in blip2.state_dict().items()}, tmp_path / "model-00001.safetensors")
    save_file(around, tmp_path / "model-00002.safetensors")
    connector = small()
    report = load_qformer(connector, tmp_path)
    assert report.kept == () and report.unused == ("language_model.lm_head.weight",)
    assert torch.equal(connector.queries, around["query_tokens"])
    assert torch.equal(connector.ln_vision.weight, around["vision_model.post_layernorm.weight"])
    assert torch.equal(connector.project.bias, around["language_projection.bias"])

    other_llm = QFormer(in_dim=IN, out_dim=OUT + 1, **SIZES)
    before = other_llm.project.weight.clone()
    with caplog.at_level(logging.WARNING):
        report = load_qformer(other_llm, tmp_path)
    assert report.kept == ("project.bias", "project.weight") and "project.weight" in caplog.text
    assert torch.equal(other_llm.project.weight, before)
    assert torch.equal(other_llm.queries, around["query_tokens"])


def test_wrong_sources_are_refused_and_change_nothing(tmp_path, blip2: torch.nn.Module) -> None:
    connector = small()
    before = {k: v.clone() for k, v in connector.state_dict().items()}
    state = dict(blip2.state_dict())
    nan = {**state, "layernorm.weight": torch.full((WIDTH,), float("nan"))}
    short = {k: v for k, v in state.items() if not k.endswith("layer.2.output_query.dense.bias")}
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    pickled = tmp_path / "code.pth"
    torch.save({"model": object()}, pickled)
    cases = [
        (short, FileFormatError, "lacks 1 tensors.*core.layers.2.query_ffn.down.bias"),
        (nan, FileFormatError, "not finite"),
        ({"a": torch.zeros(1)}, FileFormatError, "no Q-Former"),
        (torn, FileFormatError, "torn.safetensors"),
        (pickled, FileFormatError, "code.pth"),
        (tmp_path / "torm.safetensors", NameNotFound, "nearest: torn.safetensors"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            load_qformer(connector, source)
    with pytest.raises(FileFormatError, match="depth=1"):
        load_qformer(small(depth=1), state)
    with pytest.raises(FileFormatError, match=rf"\[{WIDTH}, {IN}\], expected \[{WIDTH}, {IN + 1}\]"):
        load_qformer(QFormer(in_dim=IN + 1, out_dim=OUT, **SIZES), state)
    with pytest.raises(ConfigError, match="build"):
        load_qformer(QFormer(), state)
    assert all(torch.equal(v, before[k]) for k, v in connector.state_dict().items())


def test_layer_table_covers_every_part_of_a_layer() -> None:
    parts = {
        n.rsplit(".", 1)[0].split(".", 3)[3] for n in small(text_vocab=3).state_dict() if n.startswith("core.layers.0")
    }
    assert parts == set(LAYER_PARTS)


def test_dropout_acts_in_training_only() -> None:
    connector = small(dropout=0.5)
    x = torch.randn(2, 6, IN)
    assert torch.equal(connector(x)[0], connector(x)[0])
    connector.train()
    assert not torch.equal(connector(x)[0], connector(x)[0])


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="5 heads do not divide width 24.*nearest: (4|6)"):
        small(heads=5)
    with pytest.raises(ConfigError, match="dropout"):
        small(dropout=1.0)
    with pytest.raises(ConfigError, match="num_queries"):
        small(num_queries=0)
