"""What holds for every weight method at every kind of site it takes, all its tensors random."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from cases import close, deltas, fill
from table import ALL, INTO, OUT, PLACES, ROWS, build, grid, match_of, weight_delta
from torch import nn

import mmpeft
from mmpeft.adapters import forward as forward_module
from mmpeft.errors import MmpeftError, Unsupported

GRID = pytest.mark.parametrize(("name", "place"), grid(), ids=str)
NAMES = pytest.mark.parametrize("name", ROWS)
ANY = pytest.mark.parametrize("name", ALL)  # vector methods too
DROPS = [n for n, row in ROWS.items() if "dropout" in {f.name for f in dataclasses.fields(row.method)} and row.factored]
LINEAR, NARROW, EXPERTS = PLACES[0], PLACES[1], PLACES[-1]


def shake(model: nn.Module, name: str, adapter: str = "a", seed: int = 1) -> None:
    fill(model, adapter, seed, ALL[name].size)


@GRID
def test_start_effect_gradient_merge_file_and_detach(name, place, tmp_path):
    """One story, since attaching costs most of the time: starts as the base, has an effect and a gradient in every
    mode, `use(None)` is the base bit for bit, merging and baking change nothing, and a file gives the same model
    back."""
    model, x, base = build(name, place)
    keys = [k for k in model.state_dict() if "_adapters" not in k]
    outputs = []
    for mode in (True, False):
        model.train(mode)
        assert close(model(x), base, ALL[name].gap)
    shake(model, name)
    for mode in (True, False):
        model.train(mode)
        y = model(x)
        outputs.append(y.detach())
        assert not close(y, base, 1e-3)
        params = [d._parameters[n] for d in deltas(model) for n in d.trained]
        grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), params)
        assert all(bool(g.any()) and bool(torch.isfinite(g).all()) for g in grads)
    assert close(*outputs)
    with torch.no_grad():
        y = model(x)
        assert close(y, outputs[0])
        with mmpeft.use(model, None):
            assert torch.equal(model(x), base)
        assert mmpeft.merge(model, check=x) <= 1e-5
        mmpeft.unmerge(model)

        mmpeft.save(model, tmp_path, name="a")
        torch.manual_seed(0)
        other = place.make().eval()
        torch.manual_seed(99)  # another start: everything that matters is in the file or follows from seed and base
        mmpeft.load(other, tmp_path, name="b", check=False)
        assert close(other(x), y)

        mmpeft.detach(model, bake=True)
        assert close(model(x), y)
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize("place", [LINEAR, NARROW], ids=str)
@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.factored])
def test_the_factored_plan_computes_the_same(name, place, monkeypatch):
    model, x, _ = build(name, place)
    shake(model, name)
    params = [d._parameters[n] for d in deltas(model) for n in d.trained]
    calls = []
    from mmpeft.adapters import slot as slot_module

    apply = slot_module.apply
    monkeypatch.setattr(slot_module, "apply", lambda w, d: calls.append(d.site.tensor) or apply(w, d))

    def measure():
        y = model(x)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        return y.detach(), torch.autograd.grad((y * direction).sum(), params)

    y, grads = measure()
    assert "weight" not in calls, "a factored site forms no W'"
    monkeypatch.setattr(forward_module.Slot, "parts", lambda self, tensor, base: None)
    expected, materialised = measure()
    assert "weight" in calls and close(y, expected)
    for g, e in zip(grads, materialised, strict=True):
        assert close(g, e, 5e-5)


@NAMES
def test_two_adapters_compose_left_to_right_and_average(name):
    model, x, _ = build(name, LINEAR)
    mmpeft.attach(model, {"site": ROWS[name].method}, name="b", example=x)
    shake(model, name, "a", 1)
    shake(model, name, "b", 2)
    method, W = ROWS[name].method, model.site._parameters["weight"]
    first, second = weight_delta(model, "a"), weight_delta(model, "b")
    with torch.no_grad():
        Wa, Wb = method.weight(W, first), method.weight(W, second)
        both = method.weight(Wa, second)
        for active, expected in ((["a", "b"], both), ({"a": 0.25, "b": 0.5}, W + 0.25 * (Wa - W) + 0.5 * (Wb - W))):
            mmpeft.use(model, active)
            assert close(model.site.weight, expected)
            bias = model.site.bias
            assert close(model(x), torch.tanh(nn.functional.linear(model.norm(x), expected, bias)), 2e-5)


@ANY
def test_rows_of_a_batch_mix_or_are_refused_by_name(name):
    model, x, base = build(name, LINEAR)
    mmpeft.attach(model, {match_of(name, LINEAR): ALL[name].method}, name="b", example=x)
    shake(model, name, "a", 1)
    shake(model, name, "b", 2)
    with torch.no_grad():
        singles = {None: base}
        for adapter in "ab":
            mmpeft.use(model, adapter)
            singles[adapter] = model(x)
        rows = ["a", None, "b"]
        if not ALL[name].factored:
            place = re.escape(ALL[name].tensor or "site.weight")
            with pytest.raises(MmpeftError, match=rf"(?s)rows=.*{place}"), mmpeft.use(model, rows=rows):
                model(x)
            return
        with mmpeft.use(model, rows=rows):
            y = model(x)
        for i, adapter in enumerate(rows):
            assert close(y[i], singles[adapter][i]), adapter


@ANY
def test_precision_and_pickle(name):
    """Adapters stay fp32 on a bf16 base, follow to fp64, and a pickled model computes the same."""
    model, x, _ = build(name, LINEAR)
    shake(model, name)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        exact = copy.deepcopy(model).double()(x.double())
        assert exact.dtype == torch.float64 and close(exact.float(), y)
    floats = [p for d in deltas(model) for p in d.parameters() if p.is_floating_point()]
    values = [p.detach().clone() for p in floats]
    model.bfloat16()
    assert all(p.dtype == torch.float32 and torch.equal(p, v) for p, v in zip(floats, values, strict=True))
    rough = model(x.bfloat16())
    assert rough.dtype == torch.bfloat16 and close(rough.float(), y, 0.1)
    rough.float().sum().backward()
    assert all(bool(torch.isfinite(d._parameters[n].grad).all()) for d in deltas(model) for n in d.trained)


@pytest.mark.parametrize("name", DROPS)
def test_dropout_acts_in_training_and_is_refused_where_nothing_can_be_dropped(name):
    method = dataclasses.replace(ROWS[name].method, dropout=0.5)
    model, x = LINEAR.make().eval(), LINEAR.data()
    mmpeft.attach(model, {"site": method}, name="a", example=x)
    shake(model, name)
    with torch.no_grad():
        still = model(x)
        assert torch.equal(model(x), still)
        model.train()
        assert not close(model(x), model(x), 1e-3)
        mmpeft.use(model, None)
        assert torch.equal(model(x), model(x)), "the base drops nothing"
    read = PLACES[[p.name for p in PLACES].index("read")]
    with pytest.raises(MmpeftError, match="dropout"):
        mmpeft.attach(read.make(), {read.match: method}, example=read.data())


@ANY
def test_learns_a_planted_task_that_the_frozen_model_cannot_do(name):
    """Data made by the same model under a random adapter of the same method; the base does not fit it, training
    does."""
    row = ALL[name]
    model, _, _ = build(name, LINEAR)
    teacher = copy.deepcopy(model)
    shake(teacher, name, seed=5)
    x = torch.randn(64, INTO)
    with torch.no_grad():
        target = teacher(x)
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=row.lr))
    losses = []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        if losses[-1] < 0.2 * losses[0]:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1e-3
    assert min(losses[-5:]) < 0.25 * losses[0], f"{losses[0]:.4f} -> {losses[-1]:.4f}"


@ANY
def test_definition_in_float64(name):
    """The weight equals the formula of the paper, written independently in the table."""
    torch.manual_seed(0)
    model = LINEAR.make().double().eval()
    row = ALL[name]
    mmpeft.attach(model, {match_of(name, LINEAR): row.method}, name="a", example=torch.randn(3, 5, INTO).double())
    shake(model, name)
    owner, _, tensor = (row.tensor or "site.weight").rpartition(".")
    delta = weight_delta(model, tensor=row.tensor)
    tensors = {n: t.detach() for n, t in delta._parameters.items()}
    module = model.get_submodule(owner)
    W = module._parameters[tensor].detach()
    assert W.dtype == torch.float64
    assert close(getattr(module, tensor).detach(), row.define(W, tensors), 1e-10)
    assert not close(getattr(module, tensor).detach(), W, 1e-3)


@ANY
def test_count_also_on_the_meta_device(name):
    row = ALL[name]
    for out, into in ((OUT, INTO), (INTO, OUT)):
        if name == "lokr-full" and out < into:
            continue

        def make(out=out, into=into):
            return nn.Sequential(nn.LayerNorm(into) if row.tensor.startswith("norm") else nn.Linear(into, out))

        model = make()
        with torch.device("meta"):
            ghost = make()
        assert mmpeft.inspect(ghost, {"0": row.method}).trainable == row.count(out, into)
        mmpeft.attach(model, {"0": row.method}, name="a", example=torch.randn(3, into))
        trained = {id(d._parameters[n]): d._parameters[n] for d in deltas(model) for n in d.trained}
        assert sum(p.numel() for p in trained.values()) == row.count(out, into)


@NAMES
def test_expert_stacks_work_or_are_refused_by_name(name):
    row = ROWS[name]
    model, x = EXPERTS.make().eval(), EXPERTS.data()
    if not row.stacks:
        with pytest.raises(MmpeftError, match="site"):
            mmpeft.attach(model, {"site": row.method}, name="a", example=x)
        return
    method = SMALL.get(name, row.method)
    with torch.no_grad():
        base = model(x)
    mmpeft.attach(model, {"site": method}, name="a", example=x)
    assert close(model(x), base, row.gap)
    shake(model, name)
    y = model(x)
    assert not close(y, base, 1e-3)
    first = weight_delta(model)
    stored = first.site.layout.to_matrix(model.site._parameters[first.site.tensor])
    with torch.no_grad():
        W = method.weight(stored, first)
        for e in range(3 if name not in WHOLE else 0):  # each expert alone gives the same; these project the stack
            tensors = {n: t if n in SHARED.get(name, ()) else t[e] for n, t in first._parameters.items()}
            assert close(W[e], define_small(name, stored[e], tensors), 1e-5)


# The experts' sides are 8 x 6 and 6 x 4.
SMALL = {
    "krona": mmpeft.KronA(a1=2, a2=2, scale=0.5),
    "lokr": mmpeft.LoKr(rank=1, alpha=2, factor=2, decompose_both=True),
    "kadaptation-full": mmpeft.KAdaptation(rank=2, t=2),
    "loha-full": mmpeft.LoHa(rank=3),
    "oft": mmpeft.OFT(block_size=2),
    "oft-out": mmpeft.OFT(block_size=2, side="out"),
    "oft-share": mmpeft.OFT(block_size=2, share=True),
    "coft": mmpeft.OFT(block_size=2, eps=0.5),
    "boft": mmpeft.BOFT(block_size=2, m=1),
    "boft-noscale": mmpeft.BOFT(block_size=2, m=1, scale=False),
    "miss": mmpeft.MiSS(rank=4),
    "miss-bat": mmpeft.MiSS(rank=2, bat=True),
    "oft-neumann": mmpeft.OFT(block_size=2, neumann=5),
}
WHOLE = (
    "did",
    "said",
    "sparse",
    "shira",
    "pafi",
    "spiel",
    "spiel-ma",
    "dna",
    "diff-pruning",
)  # these take the stack as one list of numbers
SHARED = {
    "kadaptation": ("A",), "kadaptation-full": ("A",), "delta-lora": ("on",), "rocoft": ("index",),
    "rocoft-columns": ("index",),
}  # fmt: skip


def define_small(name, W, tensors):
    """The definition where it does not depend on the row's own sizes; else the method itself on one expert."""
    if name in SMALL:
        delta = type("P", (), {**tensors, "_parameters": tensors, "site": type("S", (), {"tensor": "weight"})()})()
        return SMALL[name].weight(W, delta)
    return ROWS[name].define(W, tensors)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: mmpeft.KronA(a1=5), "a1 5 at 0.weight does not divide its rows of 24; it could be 2, 3, 4, 6"),
        (lambda: mmpeft.C3A(block_size=3), "columns of 16"),
        (lambda: mmpeft.OFT(block_size=3), "columns of 16"),
        (lambda: mmpeft.BOFT(block_size=4, m=4), "columns of 16"),
        (lambda: mmpeft.BOFT(block_size=3, m=2), "even"),
        (lambda: mmpeft.HRA(rank=3), "even rank"),
        (lambda: mmpeft.GraLoRA(rank=3, k=2), "multiple of k"),
        (lambda: mmpeft.FourierFT(n=1000), "384"),
        (lambda: mmpeft.SURM(structure="toplitz"), "toeplitz"),
        (lambda: mmpeft.SURM(rank=2), "only 'ldr'"),
        (lambda: mmpeft.MoSLoRA(mixer="identity"), "orthogonal"),
        (lambda: mmpeft.LoRAFA(rank=17), "1 to 16"),
        (lambda: mmpeft.LoHa(rank=5, dropout=0.1), "set dropout=0"),
        (lambda: mmpeft.FacTTT(rank=9), "divisor 8"),
        (lambda: mmpeft.SAID(dimension=1), "expected more than that"),
        (lambda: mmpeft.KernelMix(heads=5), "rows of 24"),
        (lambda: mmpeft.DeLoRA(alpha=3), "lam"),
        (lambda: mmpeft.RoseLoRA(sparsity=1.0), "sparsity"),
        (lambda: mmpeft.Propulsion(degree=0), "degree 0"),
        (lambda: mmpeft.OFT(eps=-1.0), "positive radius"),
    ],
)
def test_bad_options_are_refused_with_the_way_out(method, message):
    model = nn.Sequential(nn.Linear(INTO, OUT))
    with pytest.raises(MmpeftError, match=message):
        mmpeft.attach(model, {"0": method()}, example=torch.randn(3, INTO))
    assert type(model[0]) is nn.Linear and not hasattr(model, "_adapters")


def test_ssf_needs_a_bias_and_names_what_to_use_instead():
    with pytest.raises(Unsupported, match="use RED there"):
        mmpeft.attach(nn.Sequential(nn.Linear(4, 4, bias=False)), {"0": mmpeft.SSF()})
