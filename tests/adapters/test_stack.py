"""stack: many adapters behind one index tensor, so a compiled model switches among them without compiling again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import FEW, MAIN, METHODS, build, close, deltas, fill, grid
from torch import nn
from torch._dynamo.testing import CompileCounter

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound, Unsupported

SOME = {name: FEW[name] for name in ("lora", "dora", "ia3-out", "full", "bitfit", "layernorm")}
RECOMPUTED = {"weight-norm-old", "weight-norm-new"}  # no stored weight to stack beside


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def three(site, method):
    """Adapters a, b, c at one site, c of another method or rank where the site takes it."""
    model, x, base = build(site, method, "a")
    other = "lora-gaussian" if method == "lora" else method
    for seed, (name, m) in enumerate((("b", method), ("c", other)), 5):
        mmpeft.attach(model, {site.match: METHODS[m]}, name=name, check=False)
        fill(model, name, seed)
    fill(model, "a")
    return model, x, base


@pytest.mark.parametrize(("method", "site"), [(m, s) for m, s in grid(SOME, MAIN) if s.name not in RECOMPUTED], ids=str)
def test_stacked_equals_plain(method, site):
    model, x, base = three(site, method)
    with torch.no_grad():
        plain = {}
        for name in "abc":
            mmpeft.use(model, name)
            plain[name] = model(x)
        mmpeft.stack(model)
        for name in "cab":
            mmpeft.use(model, name)
            assert mmpeft.active(model) == (name,)
            assert close(model(x), plain[name])
        with mmpeft.use(model, None):
            assert torch.equal(model(x), base)
        assert close(model(x), plain["b"])
        mmpeft.unstack(model)
        assert torch.equal(model(x), plain["b"])


class Net(nn.Module):
    """A called, a packed, a convolved and an embedded site, norms and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + torch.tanh(self.conv(x.mT)).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x))


PLANS = [
    {"head": mmpeft.LoRA(rank=2), "attention[q,v]": mmpeft.LoRA(rank=1)},
    {"embed": mmpeft.LoRA(rank=3), "conv": mmpeft.LoRA(rank=2), "norm": mmpeft.LayerNormTuning()},
    {"head": mmpeft.DoRA(rank=2), "attention.out_proj": mmpeft.LoRA(rank=4)},
    {"head": "full", "attention[q,v]": mmpeft.DoRA(rank=1)},
]
IDS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


def test_64_switches_cost_one_compilation():
    model = Net().eval()
    names = [f"task{i}" for i in range(16)]
    for i, name in enumerate(names):
        mmpeft.attach(model, PLANS[i % 4], name=name, check=False)
        fill(model, name, i)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        plain = {}
        for name in names:
            mmpeft.use(model, name)
            plain[name] = model(IDS)
        mmpeft.use(model, None)
        plain[None] = model(IDS)
        mmpeft.stack(model)
        for i in range(64):
            name = names[(i * 5 + i // 16) % 16]
            mmpeft.use(model, name)
            assert close(compiled(IDS), plain[name])
            assert counter.frame_count == 1
        mmpeft.use(model, None)
        for _ in range(2):
            assert close(compiled(IDS), plain[None])
        assert counter.frame_count == 2  # the base is a second graph
        mmpeft.use(model, names[3])
        assert close(compiled(IDS), plain[names[3]])
        assert counter.frame_count == 2


def test_64_mixed_batches_cost_one_compilation():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    model = Mlp().eval()
    x = torch.randn(4, 3, 6)
    plans = [
        {"*": mmpeft.LoRA(rank=2)},
        {"one": mmpeft.DoRA(rank=3)},
        {"two": mmpeft.VeRA(rank=5)},
        {"*": mmpeft.IA3()},
    ]
    names = [f"t{i}" for i in range(8)]
    for i, name in enumerate(names):
        mmpeft.attach(model, plans[i % 4], name=name, example=x)
        fill(model, name, i)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        plain = {}
        for name in [*names, None]:
            mmpeft.use(model, name)
            plain[name] = model(x)
        mmpeft.stack(model)
        for i in range(64):
            rows = [[*names, None][(i * 7 + j * (i + 2)) % 9] for j in range(4)]
            with mmpeft.use(model, rows=rows):
                y = compiled(x)
            assert all(close(y[j], plain[name][j]) for j, name in enumerate(rows))
        assert counter.frame_count == 1
        with mmpeft.use(model, rows=["t0", "t1"]), pytest.raises(ConfigError, match="2 rows were given"):
            model(x)


def test_the_stacks_follow_what_changed():
    model = Net().eval()
    for i in range(3):
        mmpeft.attach(model, PLANS[i], name=f"t{i}", check=False)
        fill(model, f"t{i}", i)
    mmpeft.stack(model)
    with torch.no_grad():
        mmpeft.use(model, "t0")
        y = model(IDS)
        for d in deltas(model, "t0"):
            for n in d.trained:
                d._parameters[n].mul_(2)
        mmpeft.use(model, "t0")
        stacked = model(IDS)
        assert not close(stacked, y, 1e-3)
        other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        mmpeft.unstack(model)
        assert close(model(IDS), stacked)
        for m in other:  # copies are unstacked
            assert torch.equal(m(IDS), model(IDS))
        mmpeft.stack(model, ["t0", "t1"])
        mmpeft.use(model, "t1")
        model.double()
        y = model(IDS)
        assert y.dtype == torch.float64
        mmpeft.use(model, "t1")
        assert close(model(IDS), y)
        mmpeft.use(model, ["t0", "t1"])  # a composition is a graph of its own
        assert mmpeft.active(model) == ("t0", "t1") and not close(model(IDS), y, 1e-3)
        mmpeft.use(model, "t0")
        mmpeft.detach(model, "t0")
        assert mmpeft.active(model) == ()
        model(IDS)


def test_stacking_refuses_what_it_cannot_do():
    model = Net().eval()
    for name in "ab":
        mmpeft.attach(model, {"head": mmpeft.LoRA(rank=2)}, name=name, check=False)
        fill(model, name)
    with pytest.raises(NameNotFound, match="'c'"):
        mmpeft.stack(model, ["a", "c"])
    mmpeft.stack(model)
    with pytest.raises(ConfigError, match="for inference"):
        model(IDS)
    with mmpeft.bare(model):
        model(IDS)
    mmpeft.unstack(model)
    assert model(IDS).requires_grad
    mmpeft.attach(model, {"head": mmpeft.Bottleneck(size=2)}, name="c", check=False)
    with pytest.raises(Unsupported, match="'c' changes a call at head"):
        mmpeft.stack(model)
