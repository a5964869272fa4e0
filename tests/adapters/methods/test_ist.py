"""IST's suppression of layers, for every weight method of the table: it scales the update, of those layers only."""

from __future__ import annotations

import pytest
import torch
from cases import close, deltas, fill
from table import INTO, OUT, ROWS
from torch import nn

import mmpeft
from mmpeft.errors import Unsupported


class Layers(nn.Module):
    """Four layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(INTO, OUT) for _ in range(4))

    def forward(self, x):
        return sum(layer(x).tanh() for layer in self.layers)


@pytest.mark.parametrize("grad", [False, True], ids=["cached", "with-gradients"])
@pytest.mark.parametrize("name", ROWS)
def test_suppressed_layers_get_a_quarter_of_their_update_and_the_others_all_of_it(name, grad):
    model, x = Layers().eval(), torch.randn(5, INTO)
    mmpeft.attach(model, {"layers.*": ROWS[name].method}, name="a", example=x)
    fill(model, size=ROWS[name].size)
    sampler = mmpeft.LayerSampler(model, active=2, suppressed=2, name="a")

    def weights():
        return [layer.weight.detach().clone() for layer in model.layers]

    with torch.set_grad_enabled(grad):
        base = [layer._parameters["weight"].detach() for layer in model.layers]
        before, y = weights(), model(x).detach()
        assert not close(before[1], base[1], 1e-3)
        with sampler.suppress([1, 3]):
            shares = (1.0, 0.25, 1.0, 0.25)
            expected = [W + s * (V - W) for s, W, V in zip(shares, base, before, strict=True)]
            assert all(close(a, b, 1e-5) for a, b in zip(weights(), expected, strict=True))
            biases = [layer.bias.detach() for layer in model.layers]
            called = sum(torch.tanh(x @ W.T + b) for W, b in zip(expected, biases, strict=True))
            assert close(model(x).detach(), called, 1e-4)
        assert torch.equal(model(x).detach(), y) and all(map(torch.equal, weights(), before))


def test_suppression_of_a_call_and_none_of_tokens():
    model, x = Layers(), torch.randn(5, INTO)
    mmpeft.attach(model, {"layers.*": mmpeft.Bottleneck(size=3)}, name="a", example=x)
    fill(model)
    sampler = mmpeft.LayerSampler(model, active=2, suppressed=2, name="a")
    with mmpeft.use(model, None):
        base = model.layers[2](x)
    y = model.layers[2](x)
    with sampler.suppress([2]):
        assert close(model.layers[2](x), base + 0.25 * (y - base), 1e-6) and not close(y, base, 1e-2)
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    mmpeft.attach(vit, {"blocks": mmpeft.VPT(num_tokens=2, deep=True)}, name="a", example=torch.randn(2, 3, 32, 32))
    sampler = mmpeft.LayerSampler(vit, active=1, suppressed=1, name="a")
    with pytest.raises(Unsupported, match="inserts tokens"), sampler.suppress([0]):
        pass
    assert len(deltas(vit)) == 2


def test_stacked_adapters_are_not_suppressed_site_by_site():
    model, x = Layers(), torch.randn(5, INTO)
    mmpeft.attach(model, {"layers.*": mmpeft.LoRA(rank=2)}, name="a", example=x)
    sampler = mmpeft.LayerSampler(model, active=2, name="a")
    mmpeft.stack(model)
    with pytest.raises(Unsupported, match="unstack"), sampler.suppress([0]):
        pass
