"""Properties of every weight method at every kind of site, all adapter tensors random (zeros would hide bugs)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import FEW, MAIN, METHODS, SITES, assert_same_object, base_output, build, close, deltas, fill, grid, snapshot

import mmpeft
from mmpeft.adapters import forward as forward_module

GRID = pytest.mark.parametrize(("method", "site"), grid(), ids=str)
SMALL = pytest.mark.parametrize(("method", "site"), grid(FEW, MAIN), ids=str)
FACTORED = [(m, s) for m, s in grid() if s.factored and m not in ("full", "bitfit")]


def _run(model, x, mode):
    model.train(mode == "train")
    if mode == "no-grad":
        with torch.no_grad():
            return model(x)
    return model(x)


@GRID
def test_identity_at_init_then_effect_and_gradient_in_every_mode(method, site):
    model, x, base = build(site, method, check=True)
    for mode in ("eval", "train", "no-grad"):
        assert close(_run(model, x, mode), base, 2e-6), mode
    fill(model)
    outputs = []
    for mode in ("train", "eval", "no-grad"):
        y = _run(model, x, mode)
        outputs.append(y.detach())
        assert not close(y, base, 1e-3), f"no effect in {mode}"
        if mode != "no-grad":
            params = [d._parameters[n] for d in deltas(model) for n in d.trained]
            for p, g in zip(params, torch.autograd.grad((y * torch.randn_like(y)).sum(), params), strict=True):
                assert g is not None and bool(g.any()), f"no gradient in {mode} for a tensor of shape {tuple(p.shape)}"
    assert close(outputs[0], outputs[1]) and close(outputs[1], outputs[2])


@GRID
def test_merge_disable_unmerge_detach(method, site):
    model, x = site.make().eval(), site.data()
    base, before = base_output(model, x), snapshot(model)
    with torch.no_grad():
        plain = model(x)
    mmpeft.attach(model, {site.match: METHODS[method]}, name="a", check=False)
    fill(model)
    with torch.no_grad():
        y = model(x)
        with mmpeft.use(model, None):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), y)
        assert mmpeft.merge(model, check=x) <= 1e-5
        assert close(model(x), y)
        with mmpeft.use(model, None):
            assert torch.equal(model(x), base)
        mmpeft.unmerge(model)
        assert torch.equal(model(x), y)
        mmpeft.detach(model)
        assert torch.equal(model(x), plain)
    assert_same_object(before, snapshot(model))


@SMALL
def test_copies_and_base_checkpoint(method, site):
    keys = list(site.make().state_dict())
    model, x, _ = build(site, method)
    fill(model)
    with torch.no_grad():
        y = model(x)
        copies = [copy.deepcopy(model)]
        if site.name != "weight-norm-new":  # torch itself refuses to pickle parametrised modules
            copies.append(pickle.loads(pickle.dumps(model)))
        for other in copies:
            assert torch.equal(other(x), y)
            with mmpeft.use(other, None):
                assert not close(other(x), y, 1e-3)
            assert torch.equal(model(x), y), "the copy shares its active set with the original"
            mmpeft.detach(other)
            assert list(other.state_dict()) == keys
    assert [k for k in model.state_dict() if "_adapters" not in k] == keys
    model.load_state_dict(site.make().state_dict(), strict=True)


@pytest.mark.parametrize(("method", "site"), FACTORED, ids=str)
def test_factored_equals_materialised(method, site, monkeypatch):
    model, x, _ = build(site, method)
    x = torch.where(x == 2, 3, x) if site.name == "embedding-padding" else x  # padding takes no part in gradients
    fill(model)
    params = [d._parameters[n] for d in deltas(model) for n in d.trained]

    def measure():
        y = model(x)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        return y.detach(), torch.autograd.grad((y * direction).sum(), params)

    y, grads = measure()
    monkeypatch.setattr(forward_module.Slot, "parts", lambda self, tensor, base: None)
    materialised, expected = measure()
    assert close(y, materialised)
    for g, e in zip(grads, expected, strict=True):
        assert close(g, e, 2e-5)


@pytest.mark.parametrize("site", [s for s in SITES if s.factored], ids=str)
def test_a_factored_site_materialises_zero_times_a_step(site, monkeypatch):
    from mmpeft.adapters import slot as slot_module

    model, x, _ = build(site, "lora")
    calls = []
    apply = slot_module.apply
    monkeypatch.setattr(slot_module, "apply", lambda w, d: calls.append(d) or apply(w, d))
    for mode in ("train", "eval", "no-grad"):
        y = _run(model, x, mode)
        if y.requires_grad:
            y.sum().backward()
    assert calls == []
    assert model.site.weight.shape == model.site._parameters["weight"].shape and len(calls) == 1  # the count counts


@SMALL
def test_bake_gives_a_plain_model_of_equal_outputs(method, site):
    model, x = site.make().eval(), site.data()
    before = snapshot(model)
    mmpeft.attach(model, {site.match: METHODS[method]}, check=False)
    fill(model, "default")
    with torch.no_grad():
        y = model(x)
        if site.name.startswith("weight-norm") and method != "bitfit":
            with pytest.raises(mmpeft.errors.Unsupported, match="recomputed"):
                mmpeft.detach(model, bake=True)
            assert torch.equal(model(x), y)
            return
        mmpeft.detach(model, bake=True)
        assert close(model(x), y)
    after = snapshot(model)
    assert list(after.pop("values")) == list(before.pop("values"))
    assert after == before


@SMALL
def test_one_adapter_at_weight_one_is_that_adapter(method, site):
    model, x, _ = build(site, method)
    fill(model)
    with torch.no_grad():
        y = model(x)
        for names in ("a", ["a"], {"a": 1.0}):
            mmpeft.use(model, names)
            assert torch.equal(model(x), y)


@SMALL
def test_two_adapters_compose_and_average(method, site):
    model, x, base = build(site, method)
    mmpeft.attach(model, {site.match: METHODS[method]}, name="b", check=False)
    fill(model, "a", 1)
    fill(model, "b", 2)
    with torch.no_grad():
        single = {}
        for name in "ab":
            mmpeft.use(model, name)
            single[name] = model(x)
        assert not close(single["a"], single["b"], 1e-3)
        mmpeft.use(model, {"a": 0.5, "b": 0.5})
        mean = model(x)
        mmpeft.use(model, {"a": 0.0, "b": 0.0})
        assert close(model(x), base)
        mmpeft.use(model, {"a": 1.0, "b": 0.0})
        assert close(model(x), single["a"])
        mmpeft.use(model, ["a", "b"])
        both = model(x)
        assert not close(both, single["b"], 1e-4) or method == "full"  # full replaces what came before
        mmpeft.use(model, "a")
        mmpeft.merge(model)
        mmpeft.use(model, "b")
        assert close(model(x), both, 2e-5)
        mmpeft.unmerge(model)
        mmpeft.use(model, {"a": 0.5, "b": 0.5})
        assert torch.equal(model(x), mean)
        mmpeft.detach(model, "a")
        mmpeft.use(model, "b")
        assert torch.equal(model(x), single["b"])


@SMALL
def test_rows_equal_single_runs_or_are_refused_by_name(method, site):
    model, x, base = build(site, method, check=True)
    mmpeft.attach(model, {site.match: METHODS[method]}, name="b", example=x)
    fill(model, "a", 1)
    fill(model, "b", 2)
    rows = (["a", None, "b", "a", None])[: len(x)]
    with torch.no_grad():
        singles = {None: base}
        for name in "ab":
            mmpeft.use(model, name)
            singles[name] = model(x)
        try:
            with mmpeft.use(model, rows=rows):
                y = model(x)
        except mmpeft.errors.MmpeftError as error:
            path = deltas(model)[0].site.name
            assert path.split("[")[0].rpartition(".")[0] in str(error) and "rows=" in str(error)
            assert not (site.name.startswith("linear") and method.startswith(("lora", "dora", "vera", "ia3-in")))
            return
        for i, name in enumerate(rows):
            assert close(y[i], singles[name][i]), name


@SMALL
def test_precision(method, site):
    """Adapters stay fp32 under bf16 and fp16, and follow to fp64."""
    model, x, _ = build(site, method)
    fill(model)
    params = [p for d in deltas(model) for p in d.parameters() if p.is_floating_point()]
    values = [p.detach().clone() for p in params]
    model.double()
    assert {p.dtype for p in params} == {torch.float64}
    y64 = model(x.double() if x.is_floating_point() else x)
    assert y64.dtype == torch.float64
    model.float()
    for cast in (model.bfloat16, model.half):
        cast()
        assert {p.dtype for p in params} == {torch.float32}
        if not (method == "full" and site.name == "embedding-max-norm"):  # whose forward rescales what it reads
            assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    model.bfloat16()
    y = model(x.bfloat16() if x.is_floating_point() else x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {d._parameters[n].grad.dtype for d in deltas(model) for n in d.trained} <= {torch.float32}
    assert close(y.double(), y64, 0.15)


@SMALL
def test_autocast(method, site):
    model, x, _ = build(site, method)
    fill(model)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
        with torch.no_grad():
            assert close(model(x).float(), y, 0.15)
    assert close(rough.float(), y, 0.15)
    rough.float().sum().backward()
    assert all(d._parameters[n].grad.dtype == torch.float32 for d in deltas(model) for n in d.trained)
    with torch.no_grad():
        assert close(model(x), y)  # nothing rounded under autocast outlives it
