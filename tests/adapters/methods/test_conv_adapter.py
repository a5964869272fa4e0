"""ConvAdapter: its maths against one written out another way, on maps and on tokens; what it refuses; a file round trip."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import mmpeft
from mmpeft.adapters import ConvAdapter
from mmpeft.errors import ConfigError


def fill(model):
    generator = torch.Generator().manual_seed(0)
    found = {k.rpartition(".")[2]: p for k, p in mmpeft.adapters.switch.adapter_parameters(model)}
    with torch.no_grad():
        for p in found.values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return {k: p.detach() for k, p in found.items()}


def by_hand(y, p, scale=1.0):
    """A depthwise 3x3 convolution as nine shifted products."""
    h = (torch.einsum("bchw,rc->brhw", y, p["down_weight"]) + p["down_bias"][:, None, None]).relu()
    padded = F.pad(h, (1, 1, 1, 1))
    rows, columns = h.shape[-2:]
    out = p["conv_bias"][:, None, None].expand_as(h).clone()
    for i in range(3):
        for j in range(3):
            out += padded[..., i : i + rows, j : j + columns] * p["conv_weight"][:, 0, i, j][:, None, None]
    return y + scale * (torch.einsum("brhw,cr->bchw", out.relu(), p["up_weight"]) + p["up_bias"][:, None, None])


def test_on_a_map():
    model = nn.Sequential(nn.Conv2d(3, 7, 3, stride=2, padding=1), nn.Tanh())
    x = torch.randn(3, 3, 11, 9)
    base, y = model(x), model[0](x)
    mmpeft.attach(model, {"0": ConvAdapter(size=2, scale=0.5)}, example=x)
    assert torch.equal(model(x), base)
    p = fill(model)
    torch.testing.assert_close(model[0](x), by_hand(y, p, 0.5))
    with mmpeft.use(model, None):
        assert torch.equal(model(x), base)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        return self.mix(x)


def test_on_tokens_with_a_class_token():
    model, x = Tokens(), torch.randn(2, 1 + 3 * 5, 6)
    y = model(x)
    mmpeft.attach(model, {"mix": ConvAdapter(size=3, grid=(3, 5), prefix=1)}, example=x)
    p = fill(model)
    as_map = y[:, 1:].transpose(1, 2).reshape(2, 6, 3, 5)
    torch.testing.assert_close(model(x)[:, 1:], by_hand(as_map, p).flatten(2).transpose(1, 2))
    alone = by_hand(y[:, :1].transpose(1, 2).unsqueeze(-1), p)  # a picture of one pixel
    torch.testing.assert_close(model(x)[:, :1], alone.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [({}, (2, 15, 6), "15 tokens"), ({"grid": (3, 4)}, (2, 15, 6), "3 x 4"), ({"prefix": 1}, (2, 4, 6), "prefix")],
)
def test_refuses_tokens_that_are_no_grid(options, shape, message):
    with pytest.raises(ConfigError, match=message):
        mmpeft.attach(Tokens(), {"mix": ConvAdapter(size=3, **options)}, example=torch.randn(shape))


@pytest.mark.parametrize("options", [{"kernel": 2}, {"kernel": 0}, {"prefix": -1}, {"grid": (3,)}, {"grid": (0, 2)}])
def test_refuses_values(options):
    with pytest.raises(ConfigError):
        ConvAdapter(**options)


def test_in_efficientnet_counts_liveness_and_file(tmp_path):
    """Every inverted residual of two stages; the count follows from the widths; the file restores the very outputs."""

    def make():
        torch.manual_seed(0)
        return timm.create_model("tf_efficientnet_lite0", num_classes=5).eval()

    model, x = make(), torch.randn(2, 3, 64, 64)
    mmpeft.attach(model, {"blocks.{3,4}.*": ConvAdapter(size=8)}, example=x)
    trained = sum(p.numel() for g in mmpeft.parameter_groups(model, lr=1.0) for p in g["params"])
    assert trained == sum(2 * 8 * w + 8 + w + 8 * 9 + 8 for w in (80, 80, 80, 112, 112, 112))
    fill(model)
    mmpeft.save(model, tmp_path)
    other = make()
    mmpeft.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
    assert not torch.equal(model(x), make()(x))


def test_plan_as_data():
    method = ConvAdapter(size=4, grid=(2, 3), prefix=1)
    (rule,) = mmpeft.Plan.read([{"match": "a", "train": "adapter", "method": method.to_dict()}]).rules
    assert rule.methods == (method,)
