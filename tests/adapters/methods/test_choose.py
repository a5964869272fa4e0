"""Which entries and rows train: the second-order mask, hybrid importance, DnA, IRD, SpIEL-MA and SM3, RoCoFT's rules,
cross-attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill
from sparse_kit import data, losses, net
from torch import nn

import mmpeft
from mmpeft.adapters.plan import Plan, resolve
from mmpeft.adapters.selection import criteria
from mmpeft.errors import ConfigError, NameNotFound


def gradients(model, x, y):
    """Per-sample gradients of both weights, as lists."""
    pairs = [torch.autograd.grad(loss(), [model[0].weight, model[2].weight]) for loss in losses(model, x, y)]
    return [torch.stack(g) for g in zip(*pairs, strict=True)]


def places(model, name="a"):
    return {d.site.name: set(d.index.tolist()) for d in deltas(model, name)}


def best(scores, k):
    """Places by site of the k largest scores over both weights."""
    flat = torch.cat([s.flatten() for s in scores])
    top = flat.topk(k).indices.tolist()
    n = scores[0].numel()
    return {"0.weight": {i for i in top if i < n}, "2.weight": {i - n for i in top if i >= n}}


def test_the_second_order_mask_takes_the_largest_gain():
    model, (x, y) = net(), data()
    g = gradients(model, x, y)
    expected = best([m.mean(0) ** 2 / m.square().mean(0) for m in g], round(0.2 * 81))
    plan = {"{0,2}": mmpeft.SecondOrderMask(density=0.2)}
    mmpeft.attach_selected(model, plan, losses(model, x, y), name="a", example=x)
    assert places(model) == expected
    assert mmpeft.Plan.read({"0": "sam"}).rules[0].methods == (mmpeft.SecondOrderMask(),)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_hybrid_importance_joins_the_task_and_the_weight(norm):
    model, (x, y) = net(), data()
    parts = []
    for m, layer in zip(gradients(model, x, y), (model[0], model[2]), strict=True):
        task, own = m.mean(0).abs(), layer.weight.detach().abs()
        task, own = task / task.mean(), own / own.mean()
        parts.append(task + own if norm == "l1" else (task**2 + own**2).sqrt())
    plan = {"{0,2}": mmpeft.SHPEFT(density=0.1, norm=norm)}
    mmpeft.attach_selected(model, plan, losses(model, x, y), name="a", example=x)
    assert places(model) == best(parts, round(0.1 * 81))
    with pytest.raises(ConfigError, match="l1, l2"):
        mmpeft.SHPEFT(norm="l3")


def test_dna_trains_the_sparse_part_of_a_low_rank_plus_sparse_weight():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 30))
    where = torch.randperm(600)[:12]
    with torch.no_grad():
        W = torch.randn(30, 2) @ torch.randn(2, 20)
        W.view(-1)[where] += 8 * torch.randn(12).sign()
        model[0].weight.copy_(W)
    mmpeft.attach(model, {"0": mmpeft.DnA(count=12, rank=2, iterations=20)}, name="a", example=torch.randn(3, 20))
    assert set(deltas(model)[0].index.tolist()) == set(where.tolist())
    assert mmpeft.inspect(model).trainable == 12
    with pytest.raises(ConfigError, match="1 to 20"):
        mmpeft.attach(nn.Sequential(nn.Linear(20, 30)), {"0": mmpeft.DnA(rank=21)})


def test_ird_shrinks_samples_and_entries_together():
    model, (x, y) = net(), data()
    squares = [m.square() for m in gradients(model, x, y)]
    samples, inside = list(range(8)), [torch.ones_like(s[0]) for s in squares]
    for turn, kept in ((1, 4), (2, 2)):
        weight = {i: sum(float((s[i] * m).sum()) for s, m in zip(squares, inside, strict=True)) for i in samples}
        samples = sorted(samples, key=lambda i: -weight[i])[:kept]
        fisher = [s[samples].sum(0) * m - (1 - m) for s, m in zip(squares, inside, strict=True)]
        chosen = best(fisher, round(0.1 ** (turn / 2) * 81))
        inside = [torch.zeros_like(m) for m in inside]
        for m, found in zip(inside, chosen.values(), strict=True):
            m.view(-1)[list(found)] = 1
    found = mmpeft.fish_ird(model, {"{0,2}": mmpeft.FishMask(density=0.1)}, losses(model, x, y), rounds=2, name="a")
    assert found == sorted(samples) and places(model) == {n: p for n, p in chosen.items() if p}
    model = net()
    with pytest.raises(ConfigError, match="one FishMask rule"):
        mmpeft.fish_ird(model, {"0": mmpeft.PaFi()}, losses(model, x, y))
    with pytest.raises(ConfigError, match="0 samples"):
        mmpeft.fish_ird(model, {"0": mmpeft.FishMask()}, [])


def test_sm3_keeps_rows_and_columns_of_dense_and_sparse_parameters():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3).double())
    start, row, column = w.detach().clone(), torch.zeros(4).double(), torch.zeros(3).double()
    optimizer = mmpeft.SM3([w], lr=0.1, weight_decay=0.2)
    for _ in range(3):
        g = torch.randn(4, 3).double()
        v = torch.minimum(row[:, None], column[None]) + g**2
        row, column = v.amax(1), v.amax(0)
        start = start * (1 - 0.1 * 0.2) - 0.1 * g / v.sqrt()
        w.grad = g
        optimizer.step()
        assert close(w, start, 1e-12)
    assert close(optimizer.estimate(w), torch.minimum(row[:, None], column[None]), 1e-12)
    with pytest.raises(ConfigError, match=r"betas \(1.0, 0.0\)"):
        mmpeft.SM3([w], beta=1.0)


def test_spiel_ma_grows_where_the_row_and_column_momenta_are_largest():
    model, (x, y) = net(), data()
    mmpeft.attach(model, {"{0,2}": mmpeft.SpIELMA(density=0.3)}, name="a", example=x)
    optimizer = mmpeft.SM3(mmpeft.parameter_groups(model, lr=0.05), model=model)
    d = deltas(model)[0]
    row, column = torch.zeros(9), torch.zeros(6)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        r, c = d.index // 6, d.index % 6
        v = torch.minimum(row[r], column[c]) + d.value.grad**2
        expected = d.value.detach() - 0.05 * d.value.grad / v.sqrt()
        for i in range(len(v)):  # rows and columns without an entry keep what they have
            row[r[i]] = v[r == r[i]].max()
            column[c[i]] = v[c == c[i]].max()
        optimizer.step()
        assert close(d.value, expected, 1e-6)
    change = (d.value - d.before).abs()
    dropped = set(d.index[change.argsort()[: round(0.5 * 16)]].tolist())
    before, dense = set(d.index.tolist()), torch.minimum(row[:, None], column[None]).flatten()
    free = [i for i in dense.argsort(descending=True, stable=True).tolist() if i not in before]
    assert mmpeft.spiel_ma_step(model, optimizer, 0.5, name="a") == round(0.5 * 16) + round(0.5 * 8)
    assert set(d.index.tolist()) == before - dropped | set(free[: len(dropped)])
    assert int((d.value == 0).sum()) >= len(dropped)
    with pytest.raises(ConfigError, match="share 2"):
        mmpeft.spiel_ma_step(model, optimizer, 2, name="a")
    with pytest.raises(ConfigError, match="no step"):
        mmpeft.spiel_ma_step(model, mmpeft.SM3(mmpeft.parameter_groups(model, lr=0.1), model=model), 0.5, name="a")


# --- rows and columns
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("select", ["first", "last", "random", "magnitude", "small_magnitude", "mixed_magnitude"])
def test_every_rule_of_rocoft(select, axis):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 7))
    norms = model[0].weight.detach().norm(dim=1 if axis == "rows" else 0)
    order, n = norms.argsort().tolist(), len(norms)
    expected = {
        "first": {0, 1, 2},
        "last": {n - 3, n - 2, n - 1},
        "random": set(torch.randperm(n, generator=torch.Generator().manual_seed(5))[:3].tolist()),
        "magnitude": set(order[-3:]),
        "small_magnitude": set(order[:3]),
        "mixed_magnitude": {order[0], order[-1], order[-2]},
    }[select]
    method = mmpeft.RoCoFT(rank=3, axis=axis, select=select, seed=5)
    mmpeft.attach(model, {"0": method}, name="a", example=torch.randn(3, 8))
    (d,) = deltas(model)
    assert set(d.index.tolist()) == expected
    fill(model)
    change = model[0].weight - model[0]._parameters["weight"]
    moved = change.abs().sum(1 if axis == "rows" else 0).nonzero().flatten()
    assert set(moved.tolist()) == expected
    assert mmpeft.inspect(model).trainable == 3 * (8 if axis == "rows" else 7)
    with pytest.raises(ConfigError, match="expected one of first"):
        mmpeft.RoCoFT(select="largest")


@pytest.mark.parametrize("order", ["largest", "smallest", "mixed"])
def test_rocofts_score_of_weight_times_input(order):
    model, (x, y) = net(), data()
    hidden = torch.tanh(model[0](x)).detach()
    scores = [(model[0].weight.abs() * x.norm(dim=0)).sum(1), (model[2].weight.abs() * hidden.norm(dim=0)).sum(1)]
    expected = {}
    for site, s in zip(("0.weight", "2.weight"), scores, strict=True):
        ranked = s.argsort().tolist()
        expected[site] = {"largest": {ranked[-1], ranked[-2]}, "smallest": {ranked[0], ranked[1]}}.get(
            order, {ranked[0], ranked[-1]}
        )
    for match in ("0", "2"):
        plan = {match: mmpeft.SparseRows(count=2, criterion="wanda", order=order)}
        mmpeft.attach_selected(model, plan, losses(model, x, y), name=f"r{match}", example=x)
        assert places(model, f"r{match}") == {f"{match}.weight": expected[f"{match}.weight"]}
    with pytest.raises(ConfigError, match="needs the inputs"):
        criteria.criterion("wanda")(criteria.Evidence(torch.ones(2, 2)))
    with pytest.raises(ConfigError, match="largest, smallest, mixed"):
        mmpeft.SparseRows(order="max")


def test_far_keeps_the_nodes_that_priming_changed_most():
    model, (x, _) = net(), data()
    primed = {n: t.clone() for n, t in model.state_dict().items()}
    primed["0.weight"][[2, 7]] += 0.5
    primed["0.weight"][4] += 0.3
    mmpeft.attach_selected(model, {"0": mmpeft.FAR(count=2)}, trained=primed, name="a", example=x)
    assert places(model) == {"0.weight": {2, 7}}
    assert mmpeft.inspect(model).trainable == 2 * 6


def test_sites_of_a_plan_are_what_the_criteria_see():
    model, (x, y) = net(), data()
    targets = resolve(model, Plan.read({"{0,2}": mmpeft.Sparse()}))
    evidence = criteria.gather(model, targets, losses(model, x, y))
    assert close(evidence["0.weight"].x2, x.square().sum(0), 1e-5)
    assert not model[0]._forward_pre_hooks


def test_cross_attention_alone_trains_with_its_norms_and_new_embeddings():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 8, "vocab_size": 20, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16}
    bart = transformers.BartModel(transformers.BartConfig(**sizes))
    plan = mmpeft.cross_attention_plan(bart, embeddings="shared")
    layer = "decoder.layers.{}.encoder_attn"
    assert set(plan) == {layer.format(i) + end for i in (0, 1) for end in ("", "_layer_norm")} | {"shared"}
    trained = mmpeft.inspect(bart, mmpeft.cross_attention_plan(bart)).trainable
    assert trained == 2 * (4 * 8**2 + 4 * 8 + 2 * 8)  # L (4 d^2 + 4 d + 2 d)
    t5 = transformers.T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=2, vocab_size=20)
    plan = mmpeft.cross_attention_plan(transformers.T5Model(t5))
    block = "decoder.block.{}.layer.1.{}"
    assert set(plan) == {block.format(i, end) for i in (0, 1) for end in ("EncDecAttention", "layer_norm")}
    torchs = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 2)
    plan = mmpeft.cross_attention_plan(torchs, norms=False, method=mmpeft.LoRA(rank=2))
    assert plan == {f"layers.{i}.multihead_attn": mmpeft.LoRA(rank=2) for i in (0, 1)}
    with pytest.raises(NameNotFound, match="encoder_attn"):
        mmpeft.cross_attention_plan(net())


# --- SPT
# --------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two feed-forwards, the second of little effect: [B, 6] -> [B, 3]."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x + self.mlp[0](x) + 0.6 * self.mlp[1](x))


def squared_gradients(model, x, y, names):
    weights = [model.get_parameter(n) for n in names]
    grads = [torch.autograd.grad(loss(), weights) for loss in losses(model, x, y)]
    return {n: torch.stack(g).square().mean(0) for n, g in zip(names, zip(*grads, strict=True), strict=True)}


def test_spt_adapter_weighs_a_bottleneck_against_the_sensitive_weights_of_its_module():
    torch.manual_seed(0)
    model, (x, y) = Blocks().eval(), data()
    names = [f"mlp.{i}.{j}.weight" for i in (0, 1) for j in (0, 2)]
    found = criteria.top(squared_gradients(model, x, y, names), round(0.3 * 4 * 48))
    counts = {n: len(found.get(n, ())) for n in names}
    method = mmpeft.Bottleneck(size=1, dim=6)  # 2 * 6 + 1 + 6 = 19 numbers
    plans = mmpeft.spt_plan(model, "mlp.*", losses(model, x, y), density=0.3, method=method)
    assert (
        counts["mlp.0.0.weight"] + counts["mlp.0.2.weight"] >= 19 > counts["mlp.1.0.weight"] + counts["mlp.1.2.weight"]
    )
    assert [(r.match, r.methods) for r in plans["structured"].rules] == [("mlp.0", (method,))]
    entries = {n: c for n, c in counts.items() if c and n.startswith("mlp.1")}
    assert entries and {r.match: r.methods[0].count for r in plans["sparse"].rules} == entries
    few = sum(c for n, c in counts.items() if n.startswith("mlp.1"))
    both = mmpeft.spt_plan(model, "mlp.*", losses(model, x, y), density=0.3, method=method, alpha=19 / few)
    assert [r.match for r in both["structured"].rules] == ["mlp.0", "mlp.1"] and "sparse" not in both
    mmpeft.attach(model, plans["structured"], name="a", example=x)
    (d,) = deltas(model)
    assert d.site.path == "mlp.0" and sum(getattr(d, n).numel() for n in d.trained) == 19
    mmpeft.detach(model)
    large = mmpeft.Bottleneck(size=9, dim=6)
    wide = mmpeft.spt_plan(model, "mlp.*", losses(model, x, y), density=0.1, method=large)
    assert set(wide) == {"sparse"}, "an adapter larger than the budget is nowhere worth it"


def test_spt_takes_the_squared_gradient_and_any_weight_method():
    model, (x, y) = net(), data()
    squares = squared_gradients(model, x, y, ["0.weight", "2.weight"])
    best = criteria.top(squares, round(0.5 * 81))
    for method, trained in ((mmpeft.IA3(side="out"), {"0.weight": 9, "2.weight": 3}),
                            (mmpeft.LoHa(rank=1), {"0.weight": 30, "2.weight": 24})):  # fmt: skip
        plans = mmpeft.spt_plan(model, "{0,2}.weight", losses(model, x, y), density=0.5, method=method)
        dense = [n for n in squares if len(best.get(n, ())) >= trained[n]]
        assert [r.match for r in plans["structured"].rules] == dense
        sparse = {r.match: r.methods[0] for r in plans["sparse"].rules} if "sparse" in plans else {}
        assert {n: m.count for n, m in sparse.items()} == {n: len(i) for n, i in best.items() if n not in dense}
        assert all(m.criterion == "fisher" for m in sparse.values())


def test_spt_refuses_what_has_no_weights_to_compare():
    model, (x, y) = Blocks(), data()
    made = losses(model, x, y)
    for pattern, method, message in (
        ("{mlp.0,mlp.0.2}", mmpeft.Bottleneck(size=1, dim=6), "mlp.0.2.weight lies in two sites"),
        ("mlp.0.1", mmpeft.Bottleneck(size=1, dim=6), "mlp.0.1 has no matrix"),
    ):
        with pytest.raises(ConfigError, match=message):
            mmpeft.spt_plan(model, pattern, made, density=0.1, method=method)
    with pytest.raises(NameNotFound):
        mmpeft.spt_plan(model, "mlpp", made, density=0.1, method=mmpeft.LoRA(rank=1))
