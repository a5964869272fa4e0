"""ProPETL: the formula, the masks' share and gradient, and one prototype under many masks."""

from __future__ import annotations

import pytest
import torch
from cases import close, deltas, fill
from safetensors.torch import load_file
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError


def net(layers=3):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(layers))).double().eval()
    return model, torch.randn(4, 5, 12).double()


def largest(score, share):
    """1 where fewer than a share of all entries are larger."""
    rank = torch.tensor([[(score.abs() > s.abs()).sum() for s in row] for row in score])
    return (rank < round(share * score.numel())).to(score)


@pytest.mark.parametrize(("density", "bias"), [(0.5, False), (0.3, True), (1.0, False)])
def test_it_is_a_bottleneck_of_the_prototype_under_the_masks(density, bias):
    model, x = net(1)
    method = mmpeft.ProPETL(reduction=3, density=density, bias=bias, scale=0.5)
    mmpeft.attach(model, {"0": method}, name="a", example=x)
    fill(model, size=0.5)
    (d,) = deltas(model)
    with mmpeft.use(model, None):
        y = model(x)
    down, up = (d._parameters[f"{n}_weight"] * largest(d._parameters[f"{n}_score"], density) for n in ("down", "up"))
    b, c = (d.down_bias, d.up_bias) if bias else (0, 0)
    assert close(model(x), y + 0.5 * ((y @ down.T + b).relu() @ up.T + c), 1e-12)
    assert not close(model(x), y, 1e-3)


def test_masks_hold_exactly_their_share_and_pass_their_gradient_on():
    method, score = mmpeft.ProPETL(density=0.3), torch.randn(7, 9, requires_grad=True)
    mask = method.mask(score)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and int(mask.sum()) == round(0.3 * 63)
    direction = torch.randn(7, 9)
    (mask * direction).sum().backward()
    assert close(score.grad, direction * score.detach().sign(), 1e-7)  # through the absolute value
    tied = method.mask(torch.ones(7, 9))
    assert int(tied.sum()) == 19


def test_layers_share_one_prototype_and_have_masks_of_their_own(tmp_path):
    model, x = net()
    plan = {"{0,1}": mmpeft.ProPETL(reduction=3), "2": mmpeft.ProPETL(reduction=3)}  # two rules, one network
    assert mmpeft.inspect(model, plan).trainable == (1 + 3) * 2 * 12 * 4
    mmpeft.attach(model, plan, name="a", example=x)
    first, *rest = deltas(model)
    assert all(d.down_weight is first.down_weight and d.up_weight is first.up_weight for d in rest)
    assert len({id(d.down_score) for d in (first, *rest)}) == 3
    assert not torch.equal(first.down_score, rest[0].down_score)
    fill(model)
    y = model(x).detach()
    mmpeft.save(model, tmp_path, name="a")
    assert sum(t.numel() for t in load_file(tmp_path / "adapter.safetensors").values()) == 4 * 96
    other, _ = net()
    mmpeft.load(other, tmp_path, check=False)
    assert torch.equal(other(x), y)
    masks = [first.method.mask(d.down_score) for d in (first, *rest)]
    with torch.no_grad():
        for d, m in zip((first, *rest), masks, strict=True):  # a bit each is all that a trained site needs
            d.down_score.copy_(m)
            d.up_score.copy_(d.method.mask(d.up_score))
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "method", [mmpeft.ProPETL(reduction=3), mmpeft.XPEFT(adapters=3), mmpeft.PHMAdapter(reduction=3)], ids=str
)
def test_weights_made_at_each_call_are_one_graph_under_torch_compile(method):
    model, x = net(1)
    mmpeft.attach(model, {"0": method}, name="a", example=x)
    fill(model)
    torch._dynamo.reset()
    assert close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), 1e-12)


def test_scores_learn_faster_than_the_prototype():
    model, x = net(1)
    mmpeft.attach(model, {"0": mmpeft.ProPETL(reduction=3)}, name="a", example=x)
    rates = {id(p): g["lr"] for g in mmpeft.parameter_groups(model, lr=1.0) for p in g["params"]}
    (d,) = deltas(model)
    assert (rates[id(d.down_weight)], rates[id(d.up_score)]) == (1.0, 30.0)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"density": 0.0}, "density 0.0"),
        ({"density": 1.5}, "density 1.5"),
        ({"lr_ratio": 0.0}, "lr_ratio"),
        ({"reduction": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(fields, why):
    with pytest.raises(ConfigError, match=why):
        mmpeft.ProPETL(**fields)
