"""Sparse deltas, the criteria that choose them, and the callbacks that mask and prune."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas
from sparse_kit import data, losses, net
from torch import nn

import mmpeft
from mmpeft.adapters.plan import Plan, resolve
from mmpeft.adapters.selection import criteria, sparsify
from mmpeft.errors import ConfigError, NameNotFound


def gather(model, made=(), **kwargs):
    return criteria.gather(model, resolve(model, Plan.read({"{0,2}": mmpeft.Sparse()})), made, **kwargs)


def test_each_criterion_equals_its_sum_over_samples():
    model, (x, y) = net(), data()
    grads = [torch.autograd.grad(loss(), model[0].weight)[0] for loss in losses(model, x, y)]
    w, g = model[0].weight.detach(), torch.stack(grads)
    expected = {
        "magnitude": w.abs(),
        "small_magnitude": -w.abs(),
        "gradient": g.mean(0).abs(),
        "fisher": g.square().mean(0),
        "sensitivity": (w * g).abs().mean(0),
        "movement": -(w * g).mean(0),
        "change": (w - 0.5).abs(),
        "second_order": g.mean(0).square() / g.square().mean(0),
        "taylor": (w * g).mean(0).square(),
        "wanda": w.abs() * x.norm(dim=0),
    }
    start = {"0.weight": torch.full((9, 6), 0.5), "2.weight": torch.zeros(3, 9)}
    evidence = gather(model, losses(model, x, y), start=start)
    for name, value in expected.items():
        assert close(criteria.criterion(name)(evidence["0.weight"]), value, 1e-6), name
    assert set(criteria.CRITERIA) == {*expected, "random"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters()), "gathering leaves no trace"


def test_fisher_losses_give_the_expectation_over_the_models_own_labels():
    model, (x, _) = net(), data(3)
    evidence = gather(model, criteria.fisher_losses(lambda s: model(s), list(x)))
    total = torch.zeros(9, 6)
    for s in x:
        logp = model(s).log_softmax(-1)
        for c in range(3):
            g = torch.autograd.grad(logp[c], model[0].weight, retain_graph=True)[0]
            total += logp[c].exp().detach() * g.square()
    assert evidence["0.weight"].n == pytest.approx(3)
    assert close(criteria.criterion("fisher")(evidence["0.weight"]) * 1e4, total / 3 * 1e4)


def test_top_is_over_all_tensors_and_breaks_ties_by_order():
    found = criteria.top({"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([5.0, 0.0, 5.0]), "c": torch.zeros(2)}, 3)
    assert {n: i.tolist() for n, i in found.items()} == {"a": [1], "b": [0, 2]}
    with pytest.raises(ConfigError, match="8 of 7"):
        criteria.top({"a": torch.zeros(7)}, 8)


def test_schedules():
    assert [mmpeft.Cubic(1.0, 0.0, 2, 6)(s) for s in (0, 2, 4, 6, 9)] == [1, 1, 0.125, 0, 0]
    assert [mmpeft.Ramp(0.0, 1.0, 2, 6)(s) for s in (0, 2, 3, 6, 9)] == [0, 0, 0.25, 1, 1]
    with pytest.raises(ConfigError, match="begin 6, end 6"):
        mmpeft.Ramp(0.0, 1.0, 6, 6)


SELECTED = {
    "fishmask": (mmpeft.FishMask(density=0.1), "fisher"),
    "child-tuning-d": (mmpeft.ChildTuningD(density=0.1), "fisher"),
    "pafi": (mmpeft.PaFi(density=0.1), "small_magnitude"),
    "shira-snip": (mmpeft.SHiRA(rank=1, criterion="sensitivity"), "sensitivity"),
    "lt-sft": (mmpeft.LTSFT(density=0.1), "change"),
}


@pytest.mark.parametrize("name", SELECTED)
def test_selected_sites_train_the_top_share_only_and_load(name, tmp_path):
    method, by = SELECTED[name]
    model, (x, y) = net(), data()
    trained = {n: t + torch.randn_like(t) for n, t in model.state_dict().items()} if by == "change" else None
    count = 27 if name == "shira-snip" else round(0.1 * 81)  # rank (in + out) at both sites together
    evidence = gather(model, losses(model, x, y))
    if trained is not None:
        for site, e in evidence.items():
            e.start, e.value = e.value, trained[site]
    expected = criteria.top({s: criteria.criterion(by)(e) for s, e in evidence.items()}, count)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    mmpeft.attach_selected(model, {"{0,2}": method}, losses(model, x, y), trained=trained, name="a", example=x)
    assert {d.site.name: d.index.tolist() for d in deltas(model)} == {n: i.tolist() for n, i in expected.items()}
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.05))
    first = F.cross_entropy(model(x), y)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert F.cross_entropy(model(x), y) < first - 0.02
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) == 2 * count, "no dense state"
    for site in evidence:
        owner = model.get_submodule(site.split(".")[0])
        changed = (owner.weight - base[site]).flatten().nonzero().flatten().tolist()
        assert set(changed) <= set(expected.get(site, torch.empty(0)).tolist())
        assert torch.equal(owner._parameters["weight"], base[site])
    mmpeft.save(model, tmp_path, name="a")
    other = net()
    mmpeft.load(other, tmp_path, check=False)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_shira_trains_what_lora_would_and_its_places_follow_the_seed():
    places = []
    for seed in (0, 0, 1):
        model = net()
        mmpeft.attach(model, {"0": mmpeft.SHiRA(rank=2, seed=seed)}, name="a", example=torch.randn(2, 6))
        (d,) = deltas(model)
        assert len(d.value) == 2 * (6 + 9) and len(set(d.index.tolist())) == 30
        places.append(d.index)
    assert torch.equal(places[0], places[1]) and not torch.equal(places[0], places[2])
    model = net()
    mmpeft.attach(model, {"0": mmpeft.SHiRA(rank=1, criterion="magnitude")}, name="a", example=torch.randn(2, 6))
    (d,) = deltas(model)
    w = model[0]._parameters["weight"].abs().flatten()
    assert w[d.index].min() >= w.sort().values[-15]


@pytest.mark.filterwarnings("ignore")
def test_shira_is_pefts():
    peft = pytest.importorskip("peft")
    model, ours, x = net(), net(), torch.randn(4, 6)
    mask = torch.zeros(9, 6)
    mask.view(-1)[torch.randperm(54)[:30]] = 1
    config = peft.ShiraConfig(r=2, target_modules=["0"], mask_type="random", init_weights=False)
    config.mask_fn = lambda layer, r, **kwargs: mask
    theirs = peft.get_peft_model(model, config)
    layer = theirs.base_model.model[0]
    mmpeft.attach(ours, {"0": mmpeft.SHiRA(rank=2)}, name="a", example=x)
    (d,) = deltas(ours)
    with torch.no_grad():
        rows, columns = layer.shira_indices["default"].long()
        d.index.copy_(rows * 6 + columns)
        d.value.copy_(layer.shira_weight["default"])
        assert close(ours(x), theirs(x))


def test_spiel_moves_to_the_largest_gradients_and_keeps_its_size():
    model, (x, y) = net(), data()
    mmpeft.attach(model, {"0": mmpeft.SpIEL(count=10)}, name="a", example=x)
    (d,) = deltas(model)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.05))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    before, values = d.index.clone(), d.value.detach().clone()
    weight = model[0].weight.detach().requires_grad_()
    dense = torch.autograd.grad(F.cross_entropy(model[2](torch.tanh(F.linear(x, weight, model[0].bias))), y), weight)[0]
    least = values.abs().argsort()[:4]
    expected = dense.abs().flatten().index_fill(0, before, -1).topk(4).indices
    batch = [lambda: F.cross_entropy(model(x), y)]
    assert mmpeft.spiel_step(model, batch, 0.4, name="a", optimizer=optimizer) == 4
    assert set(d.index[least].tolist()) == set(expected.tolist()) and not d.value[least].any()
    kept = [i for i in range(10) if i not in least.tolist()]
    assert torch.equal(d.index[kept], before[kept]) and torch.equal(d.value[kept], values[kept])
    assert all(not t[least].any() for t in optimizer.state[d.value].values() if t.ndim)
    with pytest.raises(ConfigError, match="share 1.5"):
        mmpeft.spiel_step(model, batch, 1.5, name="a")


def test_spiel_in_a_dense_site_takes_no_place_twice():
    model, (x, y) = net(), data()
    mmpeft.attach(model, {"0": mmpeft.SpIEL(density=0.75)}, name="a", example=x)
    (d,) = deltas(model)
    places, free = len(d.index), model[0].weight.numel() - len(d.index)
    assert mmpeft.spiel_step(model, [lambda: F.cross_entropy(model(x), y)], 0.8, name="a") == free < 0.8 * places
    assert len(d.index.unique()) == places


def test_rose_pruner_keeps_the_top_share_of_every_row_of_a_and_column_of_b():
    model, (x, y) = net(), data()
    mmpeft.attach(model, {"0": mmpeft.RoseLoRA(rank=3, sparsity=0.5)}, name="a", example=x)
    (d,) = deltas(model)
    pruner = sparsify.RosePruner(model, begin=2, end=8)
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.05))
    kept = []
    first = F.cross_entropy(model(x), y).item()
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        kept.append(pruner.step())
        if len(kept) == 2:
            assert bool((d.A != 0).all())
    assert kept == sorted(kept, reverse=True) and kept[-1] == 0.5
    assert (d.A != 0).sum(1).tolist() == [3] * 3 and (d.B != 0).sum(0).tolist() == [
        4
    ] * 3  # half of 6; half of 9, rounded
    assert F.cross_entropy(model(x), y).item() < first
    with pytest.raises(ConfigError, match="no RoseLoRA"):
        sparsify.RosePruner(net_with_lora(), begin=0, end=1)


def net_with_lora():
    return mmpeft.attach(net(), {"0": mmpeft.LoRA(rank=2)}, example=torch.randn(2, 6))


def test_gradient_masks():
    p = nn.Parameter(torch.zeros(4000))
    p.grad = torch.ones(4000)
    sparsify.ChildMask([p], p=0.25)()
    assert set(p.grad.tolist()) == {0.0, 4.0} and 0.2 < (p.grad != 0).float().mean() < 0.3
    p.grad = torch.arange(4000.0) - 2000
    sparsify.TopGradient([p], density=0.001)()
    assert p.grad.nonzero().flatten().tolist() == [0, 1, 2, 3999]  # 2000, 1999, 1998, 1999; ties go to the earlier
    for make in (lambda: sparsify.ChildMask([p], p=0), lambda: sparsify.TopGradient([p], density=2)):
        with pytest.raises(ConfigError, match="expected 0 <"):
            make()


def test_rows_are_chosen_by_change_and_by_turning():
    model, (x, y) = net(), data()
    trained = {n: t.clone() for n, t in model.state_dict().items()}
    trained["0.weight"][2] *= 5  # much longer, not turned
    trained["0.weight"][[1, 7]] = -trained["0.weight"][[1, 7]]  # turned
    trained["0.weight"][4] += 0.001
    for method, rows in ((mmpeft.FAR(density=0.09), [2]), (mmpeft.NEFT(density=0.17), [1, 7])):
        model = net()
        mmpeft.attach_selected(model, {"{0,2}": method}, trained=trained, name="a", example=x)
        (d,) = deltas(model)  # the other site got none
        assert d.index.tolist() == rows and d.value.shape == (len(rows), 6)
        F.cross_entropy(model(x), y).backward()
        assert d.value.grad.any(1).all()


def test_u_bitfit_trains_the_most_sensitive_bias_entries():
    model, (x, y) = net(), data()
    made = losses(model, x, y)
    names = ("0.bias", "2.bias")
    grads = [torch.autograd.grad(loss(), [model[0].bias, model[2].bias]) for loss in made]
    scores = {
        n: torch.stack([(b * g[i]).abs() for g in grads]).sum(0)
        for i, (n, b) in enumerate(zip(names, (model[0].bias, model[2].bias), strict=True))
    }
    mmpeft.attach_selected(model, {"{0,2}": mmpeft.UBitFit(density=0.5)}, made, name="a", example=x)
    assert {d.site.name: d.index.tolist() for d in deltas(model)} == {
        n: i.tolist() for n, i in criteria.top(scores, 6).items()
    }


@pytest.mark.parametrize("structured", [False, True])
def test_diff_pruning_draws_penalises_and_hardens_to_a_sparse_adapter(structured):
    model, (x, y) = net(), data(16)
    mmpeft.attach(model, {"{0,2}": mmpeft.DiffPruning(structured=structured)}, name="a", example=x)
    gates = mmpeft.DiffGates(model, "a")
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.05))
    model.train()
    first, outputs = gates.penalty().item(), []
    for _ in range(40):
        gates.draw()
        outputs.append(model(x).detach())
        assert torch.equal(outputs[-1], model(x).detach()), "one draw a step, however often the weight is read"
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + 0.002 * gates.penalty()).backward()
        optimizer.step()
    (a, b) = deltas(model)
    gates.draw()
    one = model(x).detach()
    gates.draw()
    assert not torch.equal(model(x).detach(), one)
    assert gates.penalty().item() < first
    model.eval()
    full = {d.site.name: (d.method.update(d).detach()) for d in (a, b)}
    everything = torch.cat([t.flatten() for t in full.values()]).abs().sort(descending=True).values
    before = F.cross_entropy(model(x), y).item()
    gates.harden(density=20 / 81)
    held = {d.site.name: d for d in deltas(model)}
    assert all(isinstance(d.method, mmpeft.Sparse) for d in held.values()) and mmpeft.active(model) == ("a",)
    values = torch.cat([d.value for d in held.values()]).abs()
    assert close(values.sort(descending=True).values, everything[:20], 1e-6)
    for name, d in held.items():
        assert torch.equal(d.value.detach(), full[name].flatten()[d.index])
    assert F.cross_entropy(model(x), y).item() < F.cross_entropy(net()(x), y).item()
    assert before < F.cross_entropy(net()(x), y).item()


def test_diff_gates_need_a_diff_pruning_adapter():
    model = net_with_lora()
    with pytest.raises(ConfigError, match="0 DiffPruning sites of 1"):
        mmpeft.DiffGates(model)


def test_fish_dip_masks_all_but_the_worst_samples_largest_fisher_entries():
    model, (x, y) = net(), data()
    parameters = list(model.parameters())
    with pytest.raises(ConfigError, match="update"):
        sparsify.WorstSamples(parameters, density=0.1, worst=2)()
    mask = sparsify.WorstSamples(parameters, density=0.1, worst=2)
    made = losses(model, x, y)
    order = sorted(range(8), key=lambda i: -made[i]().item())
    assert mask.update(made) == order[:2]
    fisher = sum(
        torch.cat([g.flatten() for g in torch.autograd.grad(made[i](), parameters)]).square() for i in order[:2]
    )
    expected = set(fisher.topk(round(0.1 * len(fisher))).indices.tolist())
    F.cross_entropy(model(x), y).backward()
    mask()
    assert set(torch.cat([p.grad.flatten() for p in parameters]).nonzero().flatten().tolist()) == expected


def test_placement_keeps_the_sites_that_matter():
    model, (x, y) = net(), data()
    with torch.no_grad():
        model[0].weight *= 1e-3
    made = losses(model, x, y)
    plan = mmpeft.place(model, {"{0,2}": mmpeft.LoRA(rank=2)}, made, by="sensitivity", share=0.5)
    assert [rule.match for rule in plan.rules] == ["2.weight"] and plan.rules[0].methods == (mmpeft.LoRA(rank=2),)
    biases = mmpeft.place(model, {"{0,2}": mmpeft.BitFit()}, made, share=0.5)  # S-BitFit
    assert len(biases.rules) == 1 and biases.rules[0].match in ("0.bias", "2.bias")
    half = mmpeft.place(model, {"{0,2}": "full"}, by="random", share=0.5, seed=3)  # HFT
    assert len(half.rules) == 2 and all(rule.train == "full" for rule in half.rules)
    mmpeft.attach(model, plan, name="a", example=x)
    assert [d.site.name for d in deltas(model)] == ["2.weight"]
    with pytest.raises(ConfigError, match="share 0"):
        mmpeft.place(model, {"{0,2}": mmpeft.LoRA(rank=2)}, made, share=0.0)


def test_spt_gives_lora_where_sensitive_weights_are_dense_and_entries_elsewhere():
    model, (x, y) = net(), data()
    made = losses(model, x, y)
    evidence = gather(model, made)
    scores = {n: criteria.criterion("fisher")(e) for n, e in evidence.items()}
    best = criteria.top(scores, round(0.4 * 81))
    plans = mmpeft.spt_plan(model, "{0,2}", made, density=0.4, method=mmpeft.LoRA(rank=1))
    kinds = {"structured": [], "sparse": []}
    for name, index in best.items():
        kinds["structured" if len(index) >= sum(scores[name].shape) else "sparse"].append(name)
    assert {k: [r.match for r in p.rules] for k, p in plans.items()} == {k: v for k, v in kinds.items() if v}
    for rule in plans["sparse"].rules:
        assert rule.methods[0].count == len(best[rule.match])
    mmpeft.attach_selected(model, plans["sparse"], made, name="s", example=x)
    for d in deltas(model, "s"):
        assert d.index.tolist() == best[d.site.name].tolist()


def test_bad_input():
    with pytest.raises(NameNotFound, match="fisher"):
        mmpeft.Sparse(criterion="fischer")
    with pytest.raises(ConfigError, match="use attach_selected"):
        mmpeft.attach(net(), {"0": mmpeft.FishMask()}, example=torch.randn(2, 6))
    with pytest.raises(ConfigError, match="no places yet"):
        mmpeft.attach(net(), {"0": mmpeft.FishMask(count=3)}, example=torch.randn(2, 6))
    with pytest.raises(ConfigError, match="needs gradients"):
        mmpeft.attach_selected(net(), {"0": mmpeft.FishMask()})
    model, (x, _) = net(), data()

    class Skips(nn.Module):  # the second layer never runs
        def __init__(self):
            super().__init__()
            self.used, self.unused = model[0], model[2]

        def forward(self, x):
            return self.used(x)

    skips = Skips()
    with pytest.raises(mmpeft.errors.DeadSite):
        mmpeft.attach_selected(skips, {"{used,unused}": mmpeft.PaFi(density=0.9)}, example=x)
    assert type(skips) is Skips and type(skips.unused) is nn.Linear, "a refused adapter leaves nothing behind"
    with pytest.raises(ConfigError, match="Sparse methods"):
        mmpeft.attach_selected(net(), {"0": mmpeft.LoRA()})
    with pytest.raises(ConfigError, match="it has 54"):
        mmpeft.attach(net(), {"0": mmpeft.SHiRA(rank=8)})
    with pytest.raises(ConfigError, match="density 0"):
        mmpeft.Sparse(density=0.0)
