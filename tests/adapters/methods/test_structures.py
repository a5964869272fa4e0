"""LLM-Pruner's dependency groups, their importance and the cut; LoRAShear on top."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import close, deltas
from torch import nn

import mmpeft
from mmpeft.adapters.selection.structures import Rows
from mmpeft.errors import ConfigError


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.tanh(self.a(x)))))


class Normed(nn.Module):
    """A norm between two layers lets every output reach every input: nothing may be cut."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def mlp():
    torch.manual_seed(0)
    return MLP().eval(), torch.randn(7, 6)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 40, (3, 7))}


def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval(), torch.randn(2, 3, 32, 32)


def run(model, x):
    y = model(**x) if isinstance(x, dict) else model(x)
    return y.logits if hasattr(y, "logits") else y


def without(model, found, kept):
    """The whole model with the columns of the groups that go at 0."""
    model = copy.deepcopy(model)
    for s in found:
        W = model.get_submodule(s.consumer).weight.data
        for j in set(range(s.groups)) - set(kept[s.consumer]):
            W[:, j * s.width : (j + 1) * s.width] = 0
    return model


LAYER = "model.layers.{}.self_attn."
EXPECTED = {
    "mlp": [("b", 8, 1, [("a", 0, 1)]), ("c", 10, 1, [("b", 0, 1)])],
    "llama": [
        row
        for i in (0, 1)
        for row in (
            # two key heads, each of width 4, serve two queries each
            (f"{LAYER.format(i)}o_proj", 2, 8, [(f"{LAYER.format(i)}{n}_proj", 0, w) for n, w in zip("qkv", (8, 4, 4), strict=True)]),
            (f"model.layers.{i}.mlp.down_proj", 24, 1, [(f"model.layers.{i}.mlp.{n}_proj", 0, 1) for n in ("gate", "up")]),
        )
    ],
    "vit": [
        ("blocks.0.attn.proj", 3, 64, [("blocks.0.attn.qkv", i * 192, 64) for i in range(3)]),
        ("blocks.0.mlp.fc2", 768, 1, [("blocks.0.mlp.fc1", 0, 1)]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("make", [mlp, llama, vit], ids=lambda f: f.__name__)
def test_structures_are_found_by_running_and_cut_for_good(make):
    model, x = make()
    found = mmpeft.structures(model, x)
    assert found == [mmpeft.Structure(c, g, w, tuple(Rows(*p) for p in parts)) for c, g, w, parts in EXPECTED[make.__name__]]
    scores = mmpeft.score_structures(model, found, [lambda: run(model, x).square().mean()])
    whole = copy.deepcopy(model)
    kept = mmpeft.prune_structures(model, found, scores, share=0.5)
    with torch.no_grad():
        assert close(run(model, x), run(without(whole, found, kept), x), 1e-6)
        assert not close(run(model, x), run(whole, x), 1e-3)
    for s in found:
        assert len(kept[s.consumer]) == s.groups - s.groups // 2
        consumer = model.get_submodule(s.consumer)
        assert consumer.weight.shape[1] == consumer.in_features == len(kept[s.consumer]) * s.width
        worst = scores[s.consumer][sorted(set(range(s.groups)) - set(kept[s.consumer]))].max()
        assert scores[s.consumer][kept[s.consumer]].min() >= worst
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, whole)]
    assert sizes[0] < 0.7 * sizes[1]
    mmpeft.attach(model, {found[0].consumer: mmpeft.LoRA(rank=1)}, name="recover", example=x)
    with pytest.raises(ConfigError, match="without adapters"):
        mmpeft.structures(model, x)


def test_what_a_norm_mixes_is_no_structure():
    assert mmpeft.structures(Normed().eval(), torch.randn(5, 6)) == []


@pytest.mark.parametrize("order", ["vector", "element", "second"])
@pytest.mark.parametrize("aggregate", ["sum", "prod", "max", "last"])
def test_importance_is_the_taylor_expansion_over_a_groups_parts(order, aggregate):
    model, x = mlp()
    found = mmpeft.structures(model, x, only=lambda path: path == "c")
    losses = [lambda i=i: model(x[i : i + 1]).square().sum() for i in range(7)]
    grads = {n: [torch.autograd.grad(f(), model.get_submodule(n).weight)[0] for f in losses] for n in "bc"}
    parts = []
    for n, axis in (("b", 1), ("c", 0)):
        w, g = model.get_submodule(n).weight.detach(), torch.stack(grads[n])
        first, second = w * g.mean(0), w**2 * g.square().mean(0) / 2
        entries = {"vector": first, "element": first.abs(), "second": (first - second).abs()}[order]
        parts.append(entries.sum(axis).abs())
    stack = torch.stack(parts)
    joined = {"sum": stack.sum(0), "prod": stack.prod(0), "max": stack.max(0).values, "last": stack[1]}[aggregate]
    assert close(mmpeft.score_structures(model, found, losses, order=order, aggregate=aggregate)["c"], joined, 1e-6)
    with pytest.raises(ConfigError, match="share 1"):
        mmpeft.prune_structures(model, found, {"c": joined}, share=1)
    with pytest.raises(ConfigError, match="order 'third'"):
        mmpeft.score_structures(model, found, losses, order="third")


def shearing(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x, target = torch.randn(16, 6), torch.randn(16, 4)
    found = mmpeft.structures(model, x)
    plan, tied = mmpeft.shear_plan(found, rank=2)
    mmpeft.attach(model, plan, name="shear", example=x)
    shear = mmpeft.LHSPG(model, tied=tied, **{"sparsity": 0.5, "begin": 2, "end": 12, "periods": 2, **options})
    return model, x, target, found, shear


def test_lora_shear_lets_go_of_the_least_groups_period_by_period_and_cuts_them():
    model, x, target, found, shear = shearing()
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.02))
    masks = []
    for _ in range(14):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        shear.step()
        masks.append(deltas(model, "shear")[1].mask.clone())
        assert torch.equal(masks[-1], deltas(model, "shear")[0].mask), "tied sites share their mask"
    gone = [int((m == 0).sum()) for m in masks]
    shrinking = [int(((m > 0) & (m < 1)).sum()) for m in masks]
    assert gone == [0] * 6 + [2] * 5 + [4] * 3  # a quarter at the end of each of two periods
    assert shrinking == [0, 0, 2, 2, 2, 2, 0, 2, 2, 2, 2, 0, 0, 0]
    assert all(bool((b <= a).all()) for a, b in zip(masks, masks[1:], strict=False)), "what was let go does not return"
    first = masks[2]
    assert close(first[first < 1], torch.full((2,), 0.8), 1e-6)
    y = model(x).detach()
    kept = mmpeft.kept_groups(model, found)
    mmpeft.detach(model, bake=True)
    mmpeft.cut(model, found, kept)
    assert model[0].weight.shape == (4, 6) and model[2].weight.shape == (4, 4)
    assert close(model(x), y, 1e-5)


def test_lora_shear_takes_the_least_salient_and_drops_what_turns_at_once():
    model, x, target, _, shear = shearing(begin=0, end=8, periods=1, epsilon=0.5)
    (model(x) - target).square().mean().backward()
    shear.step()
    total = sum(shear.scores[name] for name in shear.groups[0])
    redundant = shear.redundant[0]
    assert total[redundant].max() <= total[~redundant].min() and int(redundant.sum()) == 4
    i = int(redundant.nonzero()[0])
    rows, columns = sorted(deltas(model, "shear"), key=lambda d: d.method.axis, reverse=True)
    with torch.no_grad():  # turn one group's weights around
        W = [model[0]._parameters["weight"], model[2]._parameters["weight"]]
        rows.A[0], rows.B[:, 0] = -3 * W[0][i], 0
        rows.B[i, 0] = 1
        columns.B[:, 0], columns.A[0] = -3 * W[1][:, i], 0
        columns.A[0, i] = 1
    shear.step()
    assert shear.left[0][i] == 0 and bool((shear.left[0][redundant] > 0).any())


def test_lora_shear_refuses():
    with pytest.raises(ConfigError, match="periods 0"):
        shearing(periods=0)
    with pytest.raises(ConfigError, match="in 2 steps"):
        shearing(end=4, periods=3)
    model, x, _, found, _ = shearing()
    mmpeft.detach(model)
    mmpeft.attach(model, {"0": mmpeft.LoRAPrune(rank=1)}, example=x)
    with pytest.raises(ConfigError, match="2 has no LoRAPrune"):
        mmpeft.kept_groups(model, found)
