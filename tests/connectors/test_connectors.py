"""What every connector promises, over one table: the contract of `mmpeft/connectors/base.py`."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import mmpeft
from mmpeft import connectors
from mmpeft.connectors import Connector
from mmpeft.errors import ConfigError, NameNotFound

IN, OUT = 12, 10

# name -> (how to make one, token counts it takes, whether clips of different lengths may share a batch)
BERT = {"width": 16, "depth": 2, "heads": 4, "hidden_dim": 24}
CASES: dict[str, tuple[dict, list[int], bool]] = {
    "linear": ({}, [1, 7], True),
    "mlp": ({"depth": 3, "hidden_dim": 9}, [1, 7], True),
    "pixel-shuffle": ({"factor": 3}, [9, 81], False),
    "qformer": (dict(num_queries=5, **BERT), [1, 7], True),
    "perceiver": ({"num_latents": 5, "depth": 2, "heads": 2, "head_dim": 6}, [1, 7], True),
    "c-abstractor": ({"num_queries": 9, "hidden_dim": 8, "depth": 2, "position_side": 4}, [4, 16, 25], False),
    "concat": ({"stack": 5, "hidden_dim": 9}, [1, 5, 13], True),
    "conv1d": ({"stack": 4, "hidden_dim": 9}, [1, 4, 13], True),
    "stack-swiglu": ({"stack": 3, "hidden_dim": 8}, [1, 3, 13], True),
    "cformer": (dict(frames_per_token=4, **BERT), [1, 4, 13], True),
    "modality-adapter": ({"connector": ("concat", {"stack": 5, "hidden_dim": 9}), "bottleneck_dim": 3}, [1, 13], True),
}
NAMES = sorted(CASES)


def make(name: str, **extra: object) -> Connector:
    """A small connector with every parameter random: zeros at the start would hide a broken path."""
    torch.manual_seed(0)
    options = dict(CASES[name][0])
    if "connector" in options:
        inner, inner_options = options["connector"]
        options["connector"] = connectors.build_connector(inner, **inner_options)
    connector = connectors.build_connector(name, **options, **extra).build(IN, OUT)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return connector.eval()


def length_mask(lengths: list[int], t: int) -> Tensor:
    return torch.arange(t) < torch.tensor(lengths)[:, None]


def test_every_registered_connector_is_tested() -> None:
    assert set(CASES) == set(connectors.CONNECTORS)


@pytest.mark.parametrize("name", NAMES)
def test_num_tokens_is_the_output_length(name: str) -> None:
    connector = make(name)
    for t in CASES[name][1]:
        out, mask = connector(torch.randn(3, t, IN))
        assert out.shape == (3, connector.num_tokens(t), OUT)
        assert mask is None
        out, mask = connector(torch.randn(3, t, IN), torch.ones(3, t, dtype=torch.bool))
        assert mask is not None and mask.dtype == torch.bool and mask.all()
        assert mask.shape == out.shape[:2]


@pytest.mark.parametrize("name", NAMES)
def test_all_valid_mask_changes_nothing(name: str) -> None:
    connector = make(name)
    x = torch.randn(3, CASES[name][1][-1], IN)
    torch.testing.assert_close(connector(x)[0], connector(x, torch.ones(x.shape[:2], dtype=torch.bool))[0])


@pytest.mark.parametrize("name", NAMES)
def test_padding_never_reaches_a_valid_output(name: str) -> None:
    connector = make(name)
    t = CASES[name][1][-1]
    mask = length_mask([t, max(1, t - 4), max(1, t // 3)], t)
    x = torch.randn(3, t, IN)
    poisoned = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    poisoned[1] = torch.where(mask[1, :, None], x[1], 1e4)
    out, valid = connector(x, mask)
    again, valid_again = connector(poisoned, mask)
    assert out.isfinite().all()
    assert torch.equal(out, again) and torch.equal(valid, valid_again)
    assert (out[~valid] == 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n][2]])
def test_a_padded_clip_gives_what_it_gives_alone(name: str) -> None:
    connector = make(name)
    lengths, t = [13, 6, 1], 13
    x = torch.randn(3, t, IN)
    out, valid = connector(x, length_mask(lengths, t))
    for i, length in enumerate(lengths):
        alone, _ = connector(x[i : i + 1, :length])
        assert int(valid[i].sum()) == connector.num_tokens(length)
        torch.testing.assert_close(out[i, valid[i]], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_valid_tokens_is_finite_and_invalid(name: str) -> None:
    connector = make(name)
    t = CASES[name][1][-1]
    x = torch.randn(2, t, IN, requires_grad=True)
    out, valid = connector(x, length_mask([t, 0], t))
    out.square().sum().backward()
    assert valid[0].all() and not valid[1].any()
    assert out.isfinite().all() and x.grad.isfinite().all() and (x.grad[1] == 0).all()
    assert all(p.grad.isfinite().all() for p in connector.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter_and_the_input(name: str) -> None:
    connector = make(name, **({} if name == "modality-adapter" else {"output_norm": True})).train()
    x = torch.randn(3, CASES[name][1][-1], IN, requires_grad=True)
    out, _ = connector(x)
    (out * torch.randn_like(out)).sum().backward()
    assert (x.grad != 0).any()
    for parameter_name, parameter in connector.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name: str) -> None:
    """bf16 weights, fp32 weights given bf16 tokens, autocast: finite and near the fp32 result."""
    connector = make(name)
    t = CASES[name][1][-1]
    x, mask = torch.randn(3, t, IN), length_mask([t, max(1, t - 2), 1], t)
    exact, _ = connector(x, mask)
    mixed, _ = connector(x.bfloat16(), mask)
    assert mixed.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        auto, _ = connector(x, mask)
    half, _ = copy.deepcopy(connector).bfloat16()(x.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    for out in (mixed, auto, half):
        assert out.isfinite().all()
        assert (out.float() - exact).abs().max() < 0.12 * (1 + exact.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_building_late_is_building_at_once(name: str) -> None:
    """Idempotent, refuses other widths, and both ways give one state dict."""
    options = CASES[name][0]
    inner = {"connector": connectors.ConcatLinear(stack=5)} if "connector" in options else {}
    now = connectors.build_connector(name, **{**options, **inner}, in_dim=IN, out_dim=OUT)
    inner = {"connector": connectors.ConcatLinear(stack=5)} if "connector" in options else {}
    late = connectors.build_connector(name, **{**options, **inner})
    assert not list(late.parameters())
    with pytest.raises(ConfigError, match="build"):
        late(torch.randn(2, CASES[name][1][0], IN))
    late.build(IN, OUT)
    kept = dict(late.named_parameters())
    assert late.build(IN, OUT) is late and all(p is kept[n] for n, p in late.named_parameters())
    assert {n: p.shape for n, p in now.state_dict().items()} == {n: p.shape for n, p in late.state_dict().items()}
    assert (late.in_dim, late.out_dim) == (IN, OUT)
    with pytest.raises(ConfigError, match=f"in_dim={IN}.*{IN + 1}"):
        late.build(IN + 1, OUT)
    with pytest.raises(ConfigError, match="positive"):
        connectors.build_connector(name, **{**options, **inner}, in_dim=0, out_dim=OUT)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    connector = make(name)
    x = torch.randn(2, CASES[name][1][-1], IN)
    buffer = io.BytesIO()
    torch.save(connector, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(connector), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], connector(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused(name: str) -> None:
    connector = make(name)
    t = CASES[name][1][-1]
    with pytest.raises(ConfigError, match=rf"\[B, T, {IN}\], given \[2, {t}, {IN + 1}\]"):
        connector(torch.randn(2, t, IN + 1))
    with pytest.raises(ConfigError, match="given"):
        connector(torch.randn(t, IN))
    with pytest.raises(ConfigError, match=r"bool mask \[2, "):
        connector(torch.randn(2, t, IN), torch.ones(2, t))
    with pytest.raises(ConfigError, match=r"bool mask \[2, "):
        connector(torch.randn(2, t, IN), torch.ones(2, t + 1, dtype=torch.bool))
    for wrong in (0, -3, 2.0):
        with pytest.raises(ConfigError, match="positive integer"):
            connector.num_tokens(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name: str) -> None:
    connector = make(name)
    t = CASES[name][1][-1]
    x, mask = torch.randn(3, t, IN), length_mask([t, max(1, t - 2), 1], t)
    torch._dynamo.reset()
    compiled = torch.compile(connector, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, mask), connector(x, mask))


@pytest.mark.parametrize("name", NAMES)
def test_yaml_by_class_path(name: str) -> None:
    """As a Lightning CLI reads it: nested connectors included, typos refused."""
    jsonargparse = pytest.importorskip("jsonargparse")
    options = dict(CASES[name][0])
    if "connector" in options:
        inner, inner_options = options["connector"]
        options["connector"] = {
            "class_path": f"mmpeft.connectors.{connectors.CONNECTORS[inner].__name__}", "init_args": inner_options
        }  # fmt: skip
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Connector, "connector")
    path = f"mmpeft.connectors.{connectors.CONNECTORS[name].__name__}"
    parsed = parser.instantiate_classes(parser.parse_object({"connector": {"class_path": path, "init_args": options}}))
    assert type(parsed.connector) is connectors.CONNECTORS[name]
    assert parsed.connector.build(IN, OUT).num_tokens(CASES[name][1][-1]) == make(name).num_tokens(CASES[name][1][-1])
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_object({"connector": {"class_path": path, "init_args": {**options, "hiden_dim": 3}}})


class Reader(torch.nn.Module):
    """A connector where a multimodal model has it, and something after it that takes its tokens."""

    def __init__(self, connector: Connector) -> None:
        super().__init__()
        self.connectors = torch.nn.ModuleDict({"image": connector})
        self.head = torch.nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.connectors["image"](x)[0].to(self.head.weight.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_trained_in_full_by_an_adapter(name: str) -> None:
    """The plan's `full` keeps its own copy of every tensor: equal output at first, all trained, the base untouched."""
    model = Reader(make(name)).eval().requires_grad_(False)  # Conv1d rounds otherwise when its weight wants a gradient
    x = torch.randn(3, CASES[name][1][-1], IN)
    with torch.no_grad():
        before, base = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    count_before = sum(p.numel() for p in model.connectors.parameters())
    mmpeft.attach(model, {"connectors.image": "full"}, name="a", example=(x,))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count_before
    torch.testing.assert_close(model(x), before)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    assert (model(x) - before).abs().max() > 1e-3
    with mmpeft.use(model, None), torch.no_grad():
        assert torch.equal(model(x), before)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    connector = model.connectors["image"]
    if connector.channel_readers():
        with pytest.raises(ConfigError, match="before an adapter"):
            connector.calibrate(x)


@pytest.mark.parametrize("name", ["mlp", "pixel-shuffle", "concat"])
def test_fp32_adapter_over_a_bf16_connector(name: str) -> None:
    model = Reader(make(name)).bfloat16().eval()
    x = torch.randn(3, CASES[name][1][-1], IN).bfloat16()
    mmpeft.attach(model, {"connectors.image": "full"}, name="a", example=(x,))
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_import_is_light() -> None:
    code = (
        "import sys, mmpeft.connectors; print([m for m in ('transformers', 'timm', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registry_names_the_nearest() -> None:
    with pytest.raises(NameNotFound, match="nearest: qformer"):
        connectors.build_connector("q-former")
    with pytest.raises(ConfigError, match="nearest: hidden_dim"):
        connectors.build_connector("mlp", hiden_dim=3)
