"""torch.compile: every site and method in one graph, forward and backward."""

from __future__ import annotations

import pytest
import torch
from cases import FEW, MAIN, build, close, deltas, fill, grid
from torch import nn

import mmpeft

NAMES = """linear-3d hf-conv1d conv2d conv-grouped conv-depthwise-reflect convt2d-grouped embedding embedding-max-norm
mha mha-kdim direct-read experts-role tied weight-norm-new encoder-layer""".split()  # recurrent layers break the graph
SITES = [s for s in MAIN if s.name in NAMES]
GRID = [(m, s) for m, s in grid(FEW, SITES) if m == "lora" or s.name in ("linear-3d", "mha")]
BACKWARD = {"linear-3d", "conv2d", "mha", "experts-role", "tied"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "site"), GRID, ids=str)
def test_fullgraph(method, site):
    model, x, _ = build(site, method)
    fill(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert close(compiled(x), model(x))
    with torch.no_grad():
        assert close(compiled(x), model(x))
        if method == "lora":
            with mmpeft.use(model, None):
                assert close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("method", "site"),
    [(m, s) for m, s in GRID if s.name in BACKWARD and m in ("lora", "dora", "full")],
    ids=str,
)
def test_aot_eager_with_backward(method, site):
    model, x, _ = build(site, method)
    fill(model)
    params = [d._parameters[n] for d in deltas(model) for n in d.trained]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, model):
        y = run(x)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        found.append((y.detach(), torch.autograd.grad((y * direction).sum(), params)))
    assert close(found[0][0], found[1][0])
    assert all(close(a, b, 2e-5) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_autocast_and_checkpointing_inside_a_graph():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = checkpoint(self.a, x, use_reentrant=False)
            return nn.functional.linear(x, self.b.weight)

    model, x = Net(), torch.randn(3, 6)
    mmpeft.attach(model, {"a": mmpeft.DoRA(rank=2), "b": mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y, z = compiled(x), model(x)
    assert y.dtype == torch.bfloat16 and close(y.float(), z.float(), 1e-2)
    y.float().sum().backward()
    assert all(p.grad is not None for d in deltas(model) for p in d.parameters())


def test_attach_after_compile_is_seen():
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 5)
    compiled = torch.compile(model, backend="eager")
    base = compiled(x)
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    assert close(compiled(x), model(x)) and not close(compiled(x), base, 1e-3)
    mmpeft.detach(model)
    assert close(compiled(x), base)
