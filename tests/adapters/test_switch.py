"""use, trainable, merge, detach, rows: three independent things, each exact, each refused where it cannot work."""

from __future__ import annotations

import pytest
import torch
from cases import Attention, DirectRead, Host, close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.adapters import switch
from mmpeft.errors import ConfigError, NameNotFound, Unsupported


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 5)
        self.two = nn.Linear(5, 4)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(3))


def two(plan_a, plan_b, model=None, x=X):
    model = (model or TwoLayers()).eval()
    for seed, (name, plan) in enumerate((("a", plan_a), ("b", plan_b))):
        mmpeft.attach(model, plan, name=name, example=x)
        fill(model, name, seed)
    return model


LORA = {"{one,two}": mmpeft.LoRA(rank=2)}


# --- use --------------------------------------------------------------------------------------------------------------


def test_use_acts_at_once_and_restores_on_exit():
    model = two(LORA, LORA)
    assert mmpeft.active(model) == ("b",)
    with mmpeft.use(model, "a"):
        assert mmpeft.active(model) == ("a",)
        with mmpeft.use(model, None):
            assert mmpeft.active(model) == ()
        assert mmpeft.active(model) == ("a",)
    assert mmpeft.active(model) == ("b",)
    mmpeft.use(model, ["a", "b"])
    assert mmpeft.active(model) == ("a", "b")
    with pytest.raises(RuntimeError, match="boom"), mmpeft.use(model, "a"):
        raise RuntimeError("boom")
    assert mmpeft.active(model) == ("a", "b")


def test_additive_adapters_add_up_in_any_order_and_weights_scale_them():
    model = two(LORA, LORA)
    deltas_of = {n: {d.site.path: d.B @ d.A for d in deltas(model, n)} for n in "ab"}
    want = TwoLayers()
    for names in (["a", "b"], ["b", "a"], {"a": 0.7, "b": -0.3}):
        weights = names if isinstance(names, dict) else dict.fromkeys(names, 1.0)
        mmpeft.use(model, names)
        for path, layer in (("one", want.one), ("two", want.two)):
            stored = getattr(model, path)._parameters
            layer.weight.data = stored["weight"] + sum(w * deltas_of[n][path] for n, w in weights.items())
            layer.bias.data = stored["bias"]
        assert close(model(X), want(X))


def test_a_composition_is_sequential_where_the_second_depends_on_the_first():
    model = two({"one": mmpeft.LoRA(rank=2)}, {"one": mmpeft.IA3()})
    (a,), (b, *_) = deltas(model, "a"), [d for d in deltas(model, "b") if d.site.tensor == "weight"]
    w = model.one._parameters["weight"]
    mmpeft.use(model, ["a", "b"])
    assert close(model.one.weight, (w + a.B @ a.A) * b.l[:, None])
    mmpeft.use(model, ["b", "a"])
    assert close(model.one.weight, w * b.l[:, None] + a.B @ a.A)
    mmpeft.use(model, {"a": 0.5, "b": 0.5})
    assert close(model.one.weight, w + 0.5 * (a.B @ a.A) + 0.5 * w * (b.l[:, None] - 1))


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_overlapping_slices_of_two_adapters_compose(order):
    """One adapter on the k rows, one on the whole matrix: rows overlap without starting together."""
    model = two({"qkv[k]": mmpeft.LoRA(rank=2)}, {"qkv": mmpeft.DoRA(rank=2)}, _Called(), torch.randn(2, 3, 6))
    x = torch.randn(4, 3, 6)
    mmpeft.use(model, order)
    y = model(x)
    with torch.no_grad():
        assert close(torch.nn.functional.linear(x, model.qkv.weight, model.qkv.bias), y)


class _Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        return self.qkv(x)


def test_two_methods_at_one_site_of_one_adapter():
    model = TwoLayers().eval()
    mmpeft.attach(model, [{"match": "one", "method": [{"LoRA": {"rank": 2}}, {"IA3": {"side": "out"}}]}], example=X)
    fill(model, "default")
    y = model(X)
    by_name = {d.method.name: d for d in deltas(model, "default") if d.site.tensor == "weight"}
    lora, ia3 = by_name["lora"], by_name["ia3"]
    w = (model.one._parameters["weight"] + lora.B @ lora.A) * ia3.l[:, None]
    b = model.one._parameters["bias"] * ia3.l
    assert close(model.two(torch.tanh(X @ w.T + b)), y)


def test_unknown_and_repeated_names():
    model = two(LORA, LORA)
    with pytest.raises(NameNotFound, match="'aa'.*nearest: a.*it has a, b"):
        mmpeft.use(model, "aa")
    with pytest.raises(NameNotFound):
        mmpeft.use(model, {"a": 0.5, "c": 0.5})
    with pytest.raises(NameNotFound):
        mmpeft.trainable(model, ["c"])
    with pytest.raises(NameNotFound):
        mmpeft.detach(model, "c")
    with pytest.raises(ConfigError, match="repeat"):
        mmpeft.use(model, ["a", "a"])
    with pytest.raises(ConfigError, match="no adapter; call mmpeft.attach"):
        mmpeft.use(TwoLayers(), "a")
    with pytest.raises(ConfigError, match="names or rows"):
        mmpeft.use(model, "a", rows=["a"])
    assert mmpeft.active(model) == ("b",)


def test_parts_adapted_apart_are_not_switched_half():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for part in model:
        mmpeft.attach(part, {".": mmpeft.LoRA(rank=2)}, example=X)
    with pytest.raises(ConfigError, match="2 parts"):
        mmpeft.use(model, None)


# --- trainable, parameter groups --------------------------------------------------------------------------------------


def test_trainability_is_independent_of_activity():
    model = two(LORA, LORA)
    mmpeft.trainable(model, ["a"])
    mmpeft.use(model, "b")
    assert mmpeft.trainable_names(model) == ["a"] and not model(X).requires_grad
    mmpeft.use(model, ["a", "b"])
    model(X).sum().backward()
    assert all(p.grad is not None for d in deltas(model, "a") for p in d.parameters())
    assert all(p.grad is None for d in deltas(model, "b") for p in d.parameters())


def test_an_inactive_trainable_adapter_is_refused_for_ddp():
    model = two(LORA, LORA)
    with pytest.raises(ConfigError, match="adapters a are trainable but not active .active: b."):
        mmpeft.check_distributed(model)
    mmpeft.trainable(model, "b")
    mmpeft.check_distributed(model)
    mmpeft.merge(model)
    with pytest.raises(ConfigError, match="adapters b"):
        mmpeft.check_distributed(model)


def test_parameter_groups_follow_rules_and_ratios():
    model = TwoLayers()
    plan = [
        {"match": "one", "method": {"LoRA": {"rank": 2, "lr_ratio": 16}}, "lr": 0.01},
        {"match": "two", "train": "full", "weight_decay": 0.1},
    ]
    mmpeft.attach(model, plan, example=X)
    groups = mmpeft.parameter_groups(model, lr=0.5)
    assert {(g["lr"], g["weight_decay"], len(g["params"])) for g in groups} == {
        (0.01, 0.0, 1),
        (0.16, 0.0, 1),
        (0.5, 0.1, 2),
    }
    assert sum(p.numel() for g in groups for p in g["params"]) == 2 * (6 + 5) + 5 * 4 + 4
    torch.optim.AdamW(groups)
    mmpeft.trainable(model, [])
    with pytest.raises(ConfigError, match="nothing is trainable"):
        mmpeft.parameter_groups(model, lr=0.5)


def test_only_adapters_move_under_an_optimiser_step():
    model = two(LORA, {"one": mmpeft.IA3(), "two": "full"})
    base = {n: p.clone() for n, p in model.named_parameters() if "_adapters" not in n}
    mine = [p.clone() for p in (p for d in deltas(model, "a") for p in d.parameters())]
    optimizer = torch.optim.SGD(mmpeft.parameter_groups(model, lr=0.1, name="b"))
    model(X).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if "_adapters" not in n)
    assert all(
        torch.equal(p, q) for p, q in zip(mine, (p for d in deltas(model, "a") for p in d.parameters()), strict=True)
    )
    mmpeft.detach(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merging_twice_while_merged_and_without_adapters_is_refused():
    model = two(LORA, LORA)
    mmpeft.merge(model, "a")
    with pytest.raises(ConfigError, match="merged already"):
        mmpeft.merge(model, "b")
    with pytest.raises(ConfigError, match="unmerge before attaching"):
        mmpeft.attach(model, LORA, name="c", example=X)
    with pytest.raises(ConfigError, match="unmerge first"):
        mmpeft.use(model, rows=["a", "b", None, None, None])
    mmpeft.unmerge(model)
    mmpeft.use(model, None)
    with pytest.raises(ConfigError, match="needs active adapters"):
        mmpeft.merge(model)


def test_merging_in_bf16_reports_its_rounding_and_refuses_more_than_the_tolerance():
    model = two(LORA, LORA).bfloat16()
    x = X.bfloat16()
    y = model(x)
    with pytest.raises(ConfigError, match="rounded to the base's precision"):
        mmpeft.merge(model, check=x, tolerance=1e-6)
    assert torch.equal(model(x), y)
    assert 1e-6 < mmpeft.merge(model, check=x, tolerance=0.1) < 0.1


def test_merged_state_dict_is_the_base():
    model = two(LORA, LORA)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mmpeft.merge(model, ["a", "b"])
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    x = X.double()
    y = model(X)
    assert close(model.double()(x).float(), y)


def test_call_methods_are_not_merged_baked_or_weighted():
    model = two({"one": mmpeft.Bottleneck(size=2)}, LORA)
    with pytest.raises(Unsupported, match="changes the call of one"):
        mmpeft.merge(model, "a")
    mmpeft.use(model, ["a"])
    with pytest.raises(Unsupported, match="bake=True"):
        mmpeft.detach(model, bake=True)
    mmpeft.use(model, {"a": 0.5, "b": 0.5})
    with pytest.raises(Unsupported, match="weighted use"):
        model(X)


def test_bake_writes_the_named_adapter():
    model = two(LORA, LORA)
    mmpeft.use(model, "a")
    with torch.no_grad():
        y = model(X)
    mmpeft.use(model, "b")
    mmpeft.detach(model, "a", bake=True)
    assert type(model) is TwoLayers and torch.allclose(model(X), y, atol=1e-6)


def test_detaching_one_adapter_keeps_the_others_modes():
    model = two(LORA, {"two": "full"}, nn.ModuleDict({"one": nn.Linear(6, 5), "two": nn.Linear(5, 4)}) and TwoLayers())
    model.train()
    assert model.two.training and not model.one.training
    mmpeft.detach(model, "b")
    model.train()
    assert not model.two.training and mmpeft.active(model) == ()


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan_a", "plan_b"),
    [
        (LORA, {"{one,two}": mmpeft.LoRA(rank=3, alpha=1)}),
        (LORA, {"one": mmpeft.DoRA(rank=1)}),
        ({"one": mmpeft.VeRA(rank=2)}, {"two": mmpeft.VeRA(rank=4)}),
        ({"{one,two}": mmpeft.IA3(side="in")}, {"{one,two}": mmpeft.IA3(side="out")}),
        (LORA, {"{one,two}": mmpeft.BitFit()}),
        ({"one": mmpeft.Bottleneck(size=2)}, LORA),
    ],
)
def test_a_mixed_batch_equals_single_runs(plan_a, plan_b):
    model = two(plan_a, plan_b)
    rows = ["b", None, "a", "a", "b"]
    with torch.no_grad():
        singles = {}
        for name in ("a", "b", None):
            mmpeft.use(model, name)
            singles[name] = model(X)
        with mmpeft.use(model, rows=rows):
            y = model(X)
        for i, name in enumerate(rows):
            assert close(y[i], singles[name][i]), name
    with mmpeft.use(model, rows=rows):
        model(X).square().sum().backward()  # gradients reach both adapters
    assert all(p.grad is not None for n in "ab" for d in deltas(model, n) for p in d.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("make", "plan", "x", "site", "why"),
    [
        (DirectRead, {"qkv[q]": mmpeft.LoRA(rank=2)}, torch.randn(2, 3, 6), r"qkv.weight\[q\]", "read without a call"),
        (
            Attention,
            {"site[q]": mmpeft.LoRA(rank=2)},
            torch.randn(2, 3, 8),
            "site.in_proj_weight",
            "one for the whole batch",
        ),
        (TwoLayers, {"one": "full"}, X, "one.weight", "full cannot differ"),
        (
            lambda: Host(nn.Conv2d(4, 6, 3)),
            {"site": mmpeft.LoRA(rank=2)},
            torch.randn(2, 4, 5, 5),
            "site.weight",
            "Conv2d",
        ),
        (lambda: Host(nn.LayerNorm(6)), {"site": mmpeft.LayerNormTuning()}, X, "site.weight", "LayerNorm"),
    ],
)
def test_rows_are_refused_up_front_with_the_sites(make, plan, x, site, why):
    model = make()
    mmpeft.attach(model, plan, name="a", example=x)
    with pytest.raises(Unsupported, match=rf"(?s){site}.*{why}"):
        mmpeft.use(model, rows=["a", None])
    assert mmpeft.active(model) == ("a",)


class Transposed(nn.Module):
    """Hands its layer [T, B, D], so the batch is the second axis; with T == B no shape tells."""

    def __init__(self, flat=False):
        super().__init__()
        self.site = nn.Linear(6, 4)
        self.flat = flat

    def forward(self, x):
        if self.flat:
            return self.site(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.site(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("model", [Transposed(), Transposed(flat=True)])
@pytest.mark.parametrize("x", [torch.randn(2, 2, 6), torch.randn(3, 5, 6)])
def test_the_two_row_probe_sees_a_batch_that_is_not_first(model, x):
    import copy

    model = copy.deepcopy(model)
    mmpeft.attach(model, {"site": mmpeft.LoRA(rank=2)}, name="a", example=x)
    with pytest.raises(Unsupported, match="(?s)site.weight.*does not keep the batch on the first axis"):
        mmpeft.use(model, rows=["a", None])


def test_rows_of_another_length_than_the_batch():
    model = two(LORA, LORA)
    with mmpeft.use(model, rows=["a", "b"]), pytest.raises(ConfigError, match="one.weight: 2 rows were given"):
        model(X)


def test_rows_are_asked_for_once_and_again_after_an_attach_or_a_proof(monkeypatch):
    model = two(LORA, LORA)
    mmpeft.use(model, rows=["a", "b"])
    with monkeypatch.context() as patch:
        patch.setattr(switch, "slots", None)  # nothing may be walked
        mmpeft.use(model, rows=["b", None, "a"])
    mmpeft.detach(model, "b")
    mmpeft.attach(model, {"one": "full"}, name="b", example=X)
    with pytest.raises(Unsupported, match="full cannot differ"):
        mmpeft.use(model, rows=["b", "a"])

    unproven = Transposed()
    mmpeft.attach(unproven, {"site": mmpeft.LoRA(rank=2)}, name="a")
    mmpeft.use(unproven, rows=["a", None])
    mmpeft.use(unproven, "a")
    unproven(torch.randn(3, 5, 6))  # the first forward proves the site
    with pytest.raises(Unsupported, match="does not keep the batch on the first axis"):
        mmpeft.use(unproven, rows=["a", None])
