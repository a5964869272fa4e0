"""Kernels of packed weights equal the plain-torch schemes: dequantised exactly, multiplied within rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmpeft
from mmpeft.adapters.storage.integer import FP8, Int
from mmpeft.adapters.storage.nf4 import NF4
from mmpeft.adapters.storage.on_kernels import kernel_form
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.kernels import dispatch, quantised

SCHEMES = {
    "nf4": NF4(),
    "nf4-single": NF4(block=32, double=False),
    "nf4-odd": NF4(block=24, nested_block=7),
    "int8": Int(8),
    "int8-affine": Int(8, group=15, affine=True),
    "int4": Int(4, group=15),
    "int4-affine": Int(4, group=45, affine=True),
    "int2": Int(2, group=5),
    "fp8": FP8(),
}


@pytest.fixture(autouse=True)
def _triton():
    if not dispatch.triton_installed():
        pytest.skip("no Triton on this platform")


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return SCHEMES[request.param]


def packed_of(scheme, shape=(37, 45), device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return PackedWeight.of((torch.randn(shape, generator=g) * 0.3).to(device, dtype), scheme)


def test_dequantised_exactly(scheme, device):
    w = packed_of(scheme, device=device)
    form = kernel_form(w.scheme, w.packed, w.shape)
    for dtype in (torch.float32, torch.bfloat16):
        with dispatch.backend("reference"):
            want = scheme.dequantise(w.packed, w.shape).to(dtype)
        torch.testing.assert_close(quantised.dequantise(form, dtype), want, rtol=1e-6 if dtype == torch.float32 else 8e-3,
                                   atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_few_rows_multiply_without_the_dense_weight(scheme, device, rows):
    w = packed_of(scheme, (40, 300 if scheme.name != "int" else 90), device=device)
    x = torch.randn(rows, w.shape[1], device=device)
    with dispatch.backend("reference"):
        want = F.linear(x, w.dense())
    torch.testing.assert_close(quantised.linear(x, kernel_form(w.scheme, w.packed, w.shape), None), want,
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_linear_layer_picks_by_rows(monkeypatch, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 30)).to(device)
    mmpeft.quantise(model, "0", "nf4")
    forms, dense = [], []
    whole, formed = quantised.linear, quantised.dequantise
    monkeypatch.setattr(quantised, "linear", lambda *a: (forms.append(1), whole(*a))[1])
    monkeypatch.setattr(quantised, "dequantise", lambda *a: (dense.append(1), formed(*a))[1])
    for rows, few in ((64, True), (65, False)):
        x = torch.randn(rows, 60, device=device)
        with dispatch.backend("reference"), torch.no_grad():
            want = model(x)
        for grad in (False, True):
            with dispatch.backend("triton"), torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        assert (len(forms), len(dense)) == ((2, 0) if few else (2, 2))


def test_gradients_with_an_adapter(scheme, device):
    """Dense or not in the forward, the backward's product is with the same weight."""
    for rows in (6, 70):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(45, 37)).to(device).requires_grad_(False)
        mmpeft.quantise(model, {"0": scheme})
        x = torch.randn(rows, 45, device=device, requires_grad=True)
        mmpeft.attach(model, {"0": mmpeft.LoRA(rank=3)}, example=x.detach())
        for p in model.parameters():
            p.data.normal_() if p.requires_grad else None
        found = []
        for backend in ("triton", "reference"):
            with dispatch.backend(backend):
                y = model(x)
                found.append((y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters()
                                                                             if p.requires_grad)])))  # fmt: skip
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_has_no_kernel_is_read_by_its_scheme():
    class Other(Int):
        pass

    w = packed_of(Int(8))
    assert kernel_form(Other(8), w.packed, w.shape) is None and kernel_form(Int(8), w.packed, torch.Size([5])) is None
    assert not quantised.runs(kernel_form(w.scheme, w.packed, w.shape), torch.float64)
    wide = packed_of(NF4(), dtype=torch.float64)
    with dispatch.backend("triton"):
        assert wide.dense().dtype == torch.float64
