"""Bottleneck adapters: placement, maths against one line, channels first, tuples."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, Unsupported


def fill(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in mmpeft.parameter_groups(model, lr=1.0):
            for p in group["params"]:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return {k.rpartition(".")[2]: p.detach() for k, p in mmpeft.adapters.switch.adapter_parameters(model)}


class Mlp(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x, scale=1.0):
        return scale * self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x):
        return self.mlp(x, scale=2.0)


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "method",
    [
        mmpeft.Bottleneck(size=2, activation="gelu", scale=0.5),
        mmpeft.AdaptFormer(size=3),
        mmpeft.Bottleneck(size=2, bias=False),
        mmpeft.AdaptFormer(size=3, bias=False),
    ],
)
def test_definition(method):
    model = Net()
    base = model(X)
    mmpeft.attach(model, {"mlp": method}, example=X)
    assert torch.equal(model(X), base)
    p = fill(model)
    act = F.gelu if method.activation == "gelu" else F.relu
    source = X if isinstance(method, mmpeft.AdaptFormer) else base
    assert ("down_bias" in p, "up_bias" in p) == (method.bias, method.bias)
    inner = act(source @ p["down_weight"].T + p.get("down_bias", 0))
    expected = base + method.scale * (inner @ p["up_weight"].T + p.get("up_bias", 0))
    torch.testing.assert_close(model(X), expected)
    with mmpeft.use(model, None):
        assert torch.equal(model(X), base)


def test_houlsby_counts_on_a_vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3)
    mmpeft.attach(model, {"blocks.*.{attn,mlp}": mmpeft.Bottleneck(reduction=16)})
    inner = 192 // 16
    trained = sum(p.numel() for g in mmpeft.parameter_groups(model, lr=1.0) for p in g["params"])
    assert trained == 3 * 2 * (192 * inner + inner + inner * 192 + 192)


def test_on_a_convolutional_map():
    model = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 3, 9, 8)
    base = model(x)
    mmpeft.attach(model, {"0": mmpeft.Bottleneck(size=2)}, example=x)
    p = fill(model)
    y = model[0](x)
    with mmpeft.use(model, None):
        conv = model[0](x)
    h = torch.einsum("bchw,rc->brhw", conv, p["down_weight"]) + p["down_bias"][:, None, None]
    expected = conv + torch.einsum("brhw,cr->bchw", h.relu(), p["up_weight"]) + p["up_bias"][:, None, None]
    torch.testing.assert_close(y, expected)
    assert model(x).shape == base.shape


def test_a_call_that_returns_a_tuple_keeps_the_rest():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})

    class Wrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner["attn"](x, x, x)

    net = Wrap()
    x = torch.randn(2, 4, 8)
    mmpeft.attach(net, {"inner.attn": mmpeft.Bottleneck(size=2)}, example=x)
    fill(net)
    y, weights = net(x)
    with mmpeft.use(net, None):
        y0, weights0 = net(x)
    assert torch.equal(weights, weights0) and not torch.allclose(y, y0)


def test_rows_of_a_batch_equal_single_runs():
    model = Net()
    mmpeft.attach(model, {"mlp": mmpeft.Bottleneck(size=2)}, "a", example=X)
    fill(model)
    mmpeft.attach(model, {"mlp": mmpeft.AdaptFormer(size=3)}, "b", example=X)
    with torch.no_grad():
        for group in mmpeft.parameter_groups(model, lr=1.0, name="b"):
            for p in group["params"]:
                p.normal_()
    with mmpeft.use(model, rows=["b", None, "a"]):
        mixed = model(X)
    for i, name in enumerate(["b", None, "a"]):
        with mmpeft.use(model, name):
            torch.testing.assert_close(mixed[i], model(X)[i])


def test_refusals():
    with pytest.raises(ConfigError, match="reduction 0"):
        mmpeft.Bottleneck(reduction=0)
    with pytest.raises(ConfigError, match="expected one of relu"):
        mmpeft.Bottleneck(activation="swish")
    model = Net()
    with pytest.raises(ConfigError, match="no channel axis of 99"):
        mmpeft.attach(model, {"mlp": mmpeft.Bottleneck(dim=99)}, example=X)
    assert type(model.mlp) is Mlp
    mmpeft.attach(model, {"mlp": mmpeft.Bottleneck()}, example=X)
    with pytest.raises(Unsupported, match="only weight methods can be merged"):
        mmpeft.merge(model)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (mmpeft.Bottleneck(size=4, bias=False), 2 * 8 * 4),
        (mmpeft.AdaptFormer(size=4, bias=False), 2 * 8 * 4),
        (mmpeft.PHMAdapter(size=4, n=2, bias=False), 2 * (2**3 + 8 * 4 // 2)),
        (mmpeft.Compacter(size=4, n=2, bias=False), 2**3 + 2 * (8 + 4)),
        (mmpeft.ConvAdapter(size=4, bias=False), 2 * 8 * 4 + 4 * 9),
        (mmpeft.XPEFT(size=4, adapters=3, bias=False), 2 * 3),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_bottlenecks_without_biases(method, count, tmp_path):
    """Only the biases go: the same function as with biases of 0, fewer numbers, and a file that loads; compaction and the
    cost table take them."""
    made = {}
    for bias in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        x = torch.randn(3, 9, 8)
        mmpeft.attach(model, {"0": dataclasses.replace(method, bias=bias)}, example=x)
        made[bias] = model
        fill(model)
    with torch.no_grad():
        plain = dict(mmpeft.adapters.switch.adapter_parameters(made[False]))
        for name, p in mmpeft.adapters.switch.adapter_parameters(made[True]):
            p.zero_() if name.endswith("bias") else p.copy_(plain[name])
    y = made[False](x)
    torch.testing.assert_close(y, made[True](x))
    assert mmpeft.inspect(nn.Sequential(nn.Linear(8, 8)), {"0": method}).trainable == count
    mmpeft.save(made[False], tmp_path)
    other = nn.Sequential(nn.Linear(8, 8))
    other.load_state_dict({n: t for n, t in made[False].state_dict().items() if "_adapters" not in n})
    mmpeft.load(other, tmp_path, check=False)
    torch.testing.assert_close(other(x), y)
    if type(method) in (mmpeft.Bottleneck, mmpeft.AdaptFormer):
        keep = torch.tensor([True, False, True, False])
        (delta,) = mmpeft.adapters.state.sites_of(made[False], mmpeft.Method, "default")
        assert list(mmpeft.compact(made[False], keep={delta.site.name: keep}).values()) == [2]
        (delta,) = mmpeft.adapters.state.sites_of(made[False], mmpeft.Method, "default")
        assert {n: tuple(t.shape) for n, t in delta.named_parameters()} == {"down_weight": (2, 8), "up_weight": (8, 2)}
        assert delta.method.size == 2 and not delta.method.bias and made[False](x).shape == y.shape


def test_a_parallel_adapter_wants_a_call_that_keeps_its_width():
    """Refused before the first forward, checked or not."""
    for layer in (nn.Linear(6, 8), nn.Conv1d(6, 8, 3, padding=1)):
        with pytest.raises(ConfigError, match="takes 6 channels and gives 8; match the block around it"):
            mmpeft.attach(nn.Sequential(layer), {"0": mmpeft.AdaptFormer(size=2)}, check=False)
    mmpeft.attach(nn.Sequential(nn.Linear(6, 6)), {"0": mmpeft.AdaptFormer(size=2)}, check=False)
