"""The patch convolution in front of fused ViT blocks as one product: equal, found by structure, taken off again."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.compiled import patches

from .vit_kit import MODELS, adapted, made, quiet, tokens


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (4, 4)])
@pytest.mark.parametrize("kernel", [(4, 4), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_product_is_the_convolution(size, kernel, bias, device):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 10, kernel, stride=kernel, bias=bias, dtype=torch.float64, device=device)
    x = torch.randn(2, 3, *size, dtype=torch.float64, device=device)
    torch.testing.assert_close(patches.patches_product(x, conv.weight, conv.bias), conv(x))


def test_what_cuts_and_what_does_not():
    assert patches.cuts(nn.Conv2d(3, 8, 4, stride=4)) and patches.cuts(nn.Conv2d(3, 8, 4, stride=4, padding="valid"))
    others = [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}, {"stride": 4, "groups": 3}]
    assert not any(patches.cuts(nn.Conv2d(3, 9, 4, **o)) for o in others) and not patches.cuts(nn.Conv2d(3, 8, 1))


@pytest.mark.parametrize("builder", MODELS, ids=lambda b: b.__name__)
def test_every_tower_has_its_own(builder, device):
    """Timm, transformers and open_clip; what trains or looks is left to the convolution."""
    model, x = made(builder, device)
    with torch.no_grad():
        want = tokens(model, x)
        compiled = quiet(model)
        (route,) = routed(model)
        route.fast.everywhere = True
        calls = []
        route.fast.fits, fits = (lambda x: calls.append(fits(x)) or calls[-1]), route.fast.fits
        torch.testing.assert_close(tokens(model, x), want, rtol=1e-4, atol=1e-4)
        assert calls == [True]
        with torch.enable_grad():
            tokens(model, x.clone().requires_grad_())
        assert calls == [True, False]
        compiled.undo()
        assert not routed(model)


def test_not_where_an_adapter_sits(device):
    model, x = adapted(next(iter(MODELS)), device)
    compiled = quiet(model)
    (route,) = routed(model)
    route.fast.everywhere = True
    with torch.no_grad():
        before = tokens(model, x)
        name = next(n for n, m in model.named_modules() if m is route.module)
        mmpeft.attach(model, {name: mmpeft.LoRA(rank=2)}, name="more", check=False)
        assert not route.fast.fits(x)
        mmpeft.use(model, None)
        assert (tokens(model, x) - before).norm() > 0
    compiled.undo()


def routed(model):
    found = [m.__dict__["forward"] for m in model.modules() if isinstance(m, nn.Conv2d) and "forward" in m.__dict__]
    return [r for r in found if isinstance(r.fast, patches.Patches)]
