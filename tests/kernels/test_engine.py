"""The engine's factored plan on the fused operator: the same function, gradients and random masks as on torch's own.

The switch is `dispatch.backend("triton")`, which is what a half-precision tensor on a GPU turns on by itself.
"""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.adapters.storage.nf4 import NF4
from mmpeft.kernels import dispatch, lowrank, tuning

METHODS = {
    "lora": mmpeft.LoRA(rank=3, alpha=6),
    "pissa": mmpeft.LoRA(rank=2, init_from="pissa"),
    "dora": mmpeft.DoRA(rank=3),
    "vera": mmpeft.VeRA(rank=5),
    "ia3": mmpeft.IA3(),
    "ia3-in": mmpeft.IA3(side="in"),
    "loha": mmpeft.LoHa(rank=2),
}


class Net(nn.Module):
    """A linear used twice, a fused qkv of which q and v are adapted, and a linear without a bias."""

    def __init__(self, width=12):
        super().__init__()
        self.first, self.qkv = nn.Linear(width, width), nn.Linear(width, 3 * width)
        self.last = nn.Linear(3 * width, 5, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(x)) + self.first(2 * x)
        return self.last(self.qkv(x))


def build(method, device, *, names=("a",), seed=0, double=True, width=12):
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    model, x = Net(width).to(device, dtype), torch.randn(2, 5, width, dtype=dtype).to(device)
    for name in names:
        mmpeft.attach(model, {"first": method, "qkv[q,v]": method, "last": method}, name=name, example=x)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
    return model, x


def run(model, x, backend="reference"):
    """(output, gradients of the input and of every trained tensor)."""
    with dispatch.backend(backend):
        x = x.detach().requires_grad_()
        y = model(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])


def same(one, other, tolerance=1e-9):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def calls(monkeypatch):
    """Counts the engine's calls of the operator."""
    found = []
    whole = lowrank.lowrank_updates
    from mmpeft.adapters import forward

    monkeypatch.setattr(forward, "lowrank_updates", lambda *a, **k: (found.append(1), whole(*a, **k))[1])
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_factored_method(name, device, monkeypatch):
    model, x = build(METHODS[name], device)
    want, found = run(model, x), calls(monkeypatch)
    same(run(model, x, "triton"), want)
    assert len(found) == (0 if name == "ia3-in" else 4)  # column factors stay with torch's operators


@pytest.mark.parametrize("use", ["b", ["a", "b"], {"a": 0.3, "b": -0.7}, None])
def test_every_active_set(use, device, monkeypatch):
    model, x = build(METHODS["lora"], device, names="ab")
    with mmpeft.use(model, use):
        with dispatch.backend("reference"):
            want = model(x)
        found = calls(monkeypatch)
        with dispatch.backend("triton"):
            torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)
    assert len(found) == (0 if use is None else 4)


def test_merged_and_stacked(device):
    model, x = build(METHODS["lora"], device, names="ab")
    mmpeft.use(model, ["a", "b"])
    mmpeft.merge(model, "a")
    with torch.no_grad():
        want = model(x)
        with dispatch.backend("triton"):
            torch.testing.assert_close(model(x), want)
    mmpeft.unmerge(model)
    mmpeft.stack(model)
    mmpeft.use(model, "b")
    with torch.no_grad():
        want = model(x)
        with dispatch.backend("triton"):
            torch.testing.assert_close(model(x), want)


def test_hf_conv1d(device):
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model, x = nn.Sequential(conv(7, 12)).to(device).double(), torch.randn(2, 5, 12, dtype=torch.float64).to(device)
    mmpeft.attach(model, {"0": METHODS["dora"]}, example=x)
    for p in model.parameters():
        p.data += 0.1
    same(run(model, x, "triton"), run(model, x))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_dropout_is_redrawn_in_the_backward_and_by_checkpointing(name, device):
    """A finite difference sees the mask of the forward; recomputation draws the same one."""
    method = {"lora": mmpeft.LoRA(rank=3, dropout=0.4), "dora": mmpeft.DoRA(rank=3, dropout=0.4)}[name]
    model, x = build(method, device)
    model.train()
    x = x.requires_grad_()
    p = next(p for n, p in model.named_parameters() if p.requires_grad and n.endswith("B"))

    def loss(forward=model):
        torch.manual_seed(5)
        return forward(x).square().sum()

    def gradients(value):
        return torch.autograd.grad(value, [x, p])

    with dispatch.backend("triton"):
        dx, dp = gradients(loss())
        again = gradients(loss(lambda x: checkpoint(model, x, use_reentrant=False)))
        for a, b in zip(again, (dx, dp), strict=True):
            torch.testing.assert_close(a, b)
        if name == "lora":  # DoRA's gradient takes its norm for a constant, so it is no derivative
            step = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(2)).to(p) * 1e-3
            with torch.no_grad():
                high, low = (p.add_(sign * step) is not None and loss() for sign in (1, -2))
            torch.testing.assert_close((high - low) / 2, (dp * step).sum(), rtol=1e-3, atol=1e-4)
        torch.manual_seed(6)
        assert not torch.allclose(model(x).square().sum(), loss())
        model.eval()
        torch.testing.assert_close(model(x), model(x))


def test_dropout_keeps_what_it_says(device):
    model = nn.Sequential(nn.Linear(400, 1, bias=False)).to(device)
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=1, dropout=0.25)}, example=torch.randn(2, 400, device=device))
    model[0]._parameters["weight"].data.zero_()  # the attribute shows W + B A
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.fill_(1.0 if name.endswith("B") else 0.01)
    model.train()
    with dispatch.backend("triton"):
        y = model(torch.ones(200, 400, device=device)) / 4  # the kept share of each row
    kept = y * 0.75
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / 80_000) ** 0.5
    assert 0.6 < float(kept.std() / (0.25 * 0.75 / 400) ** 0.5) < 1.5


def test_autocast_and_packed_base(device):
    model, x = build(METHODS["lora"], device, double=False, width=128)
    with torch.autocast(device, torch.bfloat16):
        got, want = run(model, x, "triton"), run(model, x)
    assert got[0].dtype == torch.bfloat16
    for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()
    model = nn.Sequential(nn.Linear(64, 32)).to(device).requires_grad_(False)
    mmpeft.quantise(model, "0", NF4())
    x = torch.randn(3, 64, device=device)
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, example=x)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    same(run(model, x, "triton"), run(model, x), 1e-4)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_one_graph(name, device):
    torch._dynamo.reset()
    model, x = build(METHODS[name], device)
    want = run(model, x)
    same(run(torch.compile(model, fullgraph=True, backend="aot_eager"), x, "triton"), want)
    torch._dynamo.reset()
    model, x = build(METHODS[name], device, double=False)  # and by itself: in fp32 torch's own operators are taken
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_torch_func_and_a_trained_base_are_left_to_torch(device, monkeypatch):
    model, x = build(METHODS["lora"], device)
    found = calls(monkeypatch)
    with dispatch.backend("triton"):
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
        assert len(found) == 4  # of the plain call
        found.clear()
        model.first._parameters["weight"].requires_grad_()
        model(x).sum().backward()
    assert len(found) == 2 and model.first._parameters["weight"].grad is not None


def test_the_log_says_once_that_references_run(caplog):
    model, x = build(METHODS["lora"], "cpu")
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "mmpeft.kernels"):
        model(x)
        model(x)
    assert sum("plain-torch references run on cpu" in r.message for r in caplog.records) == 1


def test_a_timing_decides_and_is_kept(tmp_path, monkeypatch):
    """The first call at a size times both ways; the answer is on disk for the next process."""
    monkeypatch.setenv("MMPEFT_CACHE", str(tmp_path))
    for winner in ("torch", "fused"):
        lowrank._fastest.cache_clear()
        tuning._open.cache_clear()
        kind = (8, 16, 12, 3, 1, True, True, torch.float32, winner == "fused")
        times = {"torch": 1.0, "fused": 2.0} if winner == "torch" else {"torch": 2.0, "fused": 1.0}
        order = iter(["fused", "torch"])

        def timer(run, device, times=times, order=order):
            run()  # both candidates work
            return times[next(order)]

        monkeypatch.setattr(tuning, "milliseconds", timer)
        assert lowrank._fastest(kind, torch.device("cpu")) == winner
        lowrank._fastest.cache_clear()
        tuning._open.cache_clear()
        monkeypatch.setattr(tuning, "milliseconds", lambda run, device: pytest.fail("timed again"))
        assert lowrank._fastest(kind, torch.device("cpu")) == winner
    lowrank._fastest.cache_clear()
    tuning._open.cache_clear()
