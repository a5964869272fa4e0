"""Diff pruning of all numbers of a model at once: matrices, biases, norms and embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import deltas, fill
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.fc, self.head = nn.Linear(6, 9), nn.Linear(9, 3, bias=False)

    def forward(self, ids):
        return self.head(torch.tanh(self.fc(self.norm(self.embed(ids)))))


def pruned(density, structured=False):
    torch.manual_seed(0)
    model = Net().eval()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 11, (4, 5))
    plan = {"** !head": mmpeft.DiffPruning(vectors=True, structured=structured)}
    mmpeft.attach(model, plan, name="a", example=ids)
    fill(model, size=0.5)
    gates = mmpeft.DiffGates(model, "a")
    return model, base, ids, gates, gates.count(density)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.37])
def test_exactly_the_share_of_all_numbers_differs_in_the_end(density, structured, tmp_path):
    model, base, ids, gates, count = pruned(density, structured)
    total = sum(t.numel() for n, t in base.items() if n != "head.weight")
    assert total == 11 * 6 + 2 * 6 + 9 * 6 + 9 and count == round(density * total)
    assert {d.site.name for d in deltas(model)} == set(base) - {"head.weight"}
    final = torch.cat([d.method.update(d).detach().flatten() for d in deltas(model)])
    gates.harden(density=density)
    assert mmpeft.inspect(model).trainable == count
    values = torch.cat([d.value.detach() for d in deltas(model)]).abs().sort().values
    assert torch.equal(values, final.abs().sort().values[-count:])
    with torch.no_grad():
        y = model(ids)
        mmpeft.save(model, tmp_path, name="a")
        other = Net().eval()
        other.load_state_dict(base)
        mmpeft.load(other, tmp_path, check=False)
        assert torch.equal(other(ids), y)
        plain = mmpeft.detach(copy.deepcopy(model), bake=True)
    changed = {n: int((p != base[n]).sum()) for n, p in plain.named_parameters()}
    assert sum(changed.values()) == count and changed["head.weight"] == 0
    if density > 0.3:
        assert all(k for n, k in changed.items() if n != "head.weight"), "every kind of tensor was in the choice"


def test_the_count_is_known_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    mmpeft.attach(model, {"**": mmpeft.DiffPruning(vectors=True)}, name="a", check=False)
    assert mmpeft.DiffGates(model, "a").count(0.1) == round(0.1 * (66 + 12 + 63 + 27))


def test_without_vectors_biases_and_norms_stay():
    model = Net()
    mmpeft.attach(model, {"** !norm": mmpeft.DiffPruning()}, name="a", check=False)
    assert {d.site.name for d in deltas(model)} == {"embed.weight", "fc.weight", "head.weight"}
    with pytest.raises(ConfigError, match="0 < keep"):
        mmpeft.DiffGates(model, "a").count(1.5)


def test_sparse_deltas_take_a_bias_by_its_name_and_methods_of_matrices_refuse():
    model = Net()
    mmpeft.attach(model, {"fc.bias": mmpeft.Sparse(count=2)}, name="a", check=False)
    assert [d.site.name for d in deltas(model)] == ["fc.bias"]
    for method in (mmpeft.SHiRA(rank=1), mmpeft.SparseRows(count=1), mmpeft.DnA(rank=1)):
        with pytest.raises(mmpeft.errors.NameNotFound, match="none that"):
            mmpeft.attach(model, {"fc.bias": method}, name="b", check=False)
