"""Real compaction: smaller tensors and files, the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import close, deltas, fill
from rank_kit import adapted, small

import mmpeft
from mmpeft.adapters.methods.dynamic_rank import AdaLoRA, DyLoRA, IncreLoRA, SoRA
from mmpeft.adapters.selection import rank, rank_policies
from mmpeft.adapters.selection.rank_policies import Budget
from mmpeft.errors import ConfigError, Unsupported


def test_set_rank_is_compaction_of_the_tail(tmp_path):
    model, x = adapted(DyLoRA(rank=4, alpha=2)), torch.randn(3, 6)
    rank_policies.set_rank(model, 3)
    y = model(x)
    assert mmpeft.compact(model) == {f"{i}.weight": 3 for i in (0, 2, 4)}
    assert close(model(x), y, 1e-6) and deltas(model)[0].A.shape == (3, 6)
    with pytest.raises(ConfigError, match="1 to 3"):
        rank_policies.set_rank(model, 4)


@pytest.mark.parametrize("cls", [AdaLoRA, SoRA, IncreLoRA], ids=lambda cls: cls.name)
def test_compaction_keeps_the_output_and_the_file(cls, tmp_path):
    method = cls(rank=4, alpha=3)
    model, x = adapted(method), torch.randn(3, 6)
    keep = {"0.weight": [1, 0, 1, 0], "2.weight": [0, 0, 0, 0], "4.weight": [0, 1, 1, 1]}
    with torch.no_grad():
        for d in deltas(model):
            mask = torch.tensor(keep[d.site.name], dtype=torch.float)
            if method.name == "increlora":
                d.mask.copy_(torch.ones(4))
            elif method.name == "adalora":
                d.mask.copy_(mask)
            (d.g if method.name == "sora" else d.lam).mul_(mask)
    y = model(x)
    given = {n: torch.tensor(k) for n, k in keep.items()} if method.name == "increlora" else None
    found = mmpeft.compact(model, "a", keep=given)
    assert found == {"0.weight": 2, "2.weight": 0, "4.weight": 3}
    assert close(model(x), y, 1e-6)
    per_rank = [6 + 9 + 1, 9 + 5 + 1]
    assert sum(p.numel() for p in mmpeft_trained(model)) == 2 * per_rank[0] + 3 * per_rank[1]
    assert mmpeft.inspect(small(), mmpeft.adapters.state.state_of(model).entries["a"].rules).trainable == 77
    mmpeft.save(model, tmp_path, name="a")
    other = small()
    mmpeft.load(other, tmp_path)
    assert close(other(x), y, 1e-6)
    assert len(mmpeft.parameter_groups(model, lr=1.0)) == 1


def mmpeft_trained(model):
    return [d._parameters[n] for d in deltas(model) for n in d.trained]


def test_lora_channels_are_pruned_by_norm_with_equal_output(tmp_path):
    model, x = adapted(mmpeft.LoRA(rank=4, alpha=6)), torch.randn(3, 6)
    scores = torch.cat([d.B.norm(dim=0) * d.A.norm(dim=1) for d in deltas(model)]).detach()
    least = scores.sort().values[6]
    with torch.no_grad():
        reference = copy.deepcopy(model)
        for d in deltas(reference):
            d.B.mul_(d.B.norm(dim=0) * d.A.norm(dim=1) >= least)
    found = mmpeft.prune_channels(model, keep=0.5)
    assert sum(found.values()) == 6 and close(model(x), reference(x), 1e-6)
    mmpeft.save(model, tmp_path)
    other = small()
    mmpeft.load(other, tmp_path)
    assert close(other(x), model(x), 1e-6)
    assert mmpeft.prune_channels(adapted(mmpeft.DoRA(rank=4)), keep=1, per_site=True) == {
        f"{i}.weight": 1 for i in (0, 2, 4)
    }


def test_compaction_by_role_keeps_the_other_roles_and_other_methods(tmp_path):
    from cases import DirectRead

    torch.manual_seed(0)
    model, x = DirectRead().eval(), torch.randn(3, 5, 6)
    rules = [
        {"match": "qkv[q,v]", "method": SoRA(rank=3), "lr": 0.5},
        {"match": "qkv.bias", "method": mmpeft.BitFit(), "lr": 0.25},
    ]
    plain = copy.deepcopy(model)
    mmpeft.attach(model, rules, name="a", example=x)
    fill(model)
    with torch.no_grad():
        q, v = (d for d in deltas(model) if d.method.name == "sora")
        q.g.zero_()
        v.g[0] = 0
    y = model(x)
    assert mmpeft.compact(model) == {"qkv.weight[q]": 0, "qkv.weight[v]": 2}
    assert close(model(x), y, 1e-6)
    assert sorted(g["lr"] for g in mmpeft.parameter_groups(model, lr=1.0)) == [0.25, 0.5]
    mmpeft.save(model, tmp_path)
    mmpeft.load(plain, tmp_path)
    assert close(plain(x), y, 1e-6)
    with torch.no_grad():
        next(d for d in deltas(model) if d.method.name == "sora").g.zero_()
    assert mmpeft.compact(model) == {"qkv.weight[v]": 0}
    assert [d.site.name for d in deltas(model)] == ["qkv.bias"]


def test_dropping_whole_sites(tmp_path):
    model, x = adapted(mmpeft.LoRA(rank=2)), torch.randn(3, 6)
    y4 = adapted(mmpeft.LoRA(rank=2))
    with torch.no_grad():
        for d in deltas(y4)[:2]:
            d.B.zero_()
    assert mmpeft.drop_sites(model, lambda site: site.path in ("0", "2")) == ["0.weight", "2.weight"]
    assert close(model(x), y4(x), 1e-6)
    mmpeft.save(model, tmp_path)
    other = small()
    mmpeft.load(other, tmp_path)
    assert close(other(x), model(x), 1e-6)
    with pytest.raises(ConfigError, match="not all"):
        mmpeft.drop_sites(model, lambda site: True)


def uneven():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 6))


@pytest.mark.parametrize("method", [mmpeft.FacTTK(rank=2), mmpeft.DID(dimension=5), mmpeft.VeRA(rank=3)])
def test_what_sites_share_is_saved_with_the_first_that_is_left(method, tmp_path):
    """And the file is that of an adapter which never had the dropped site."""
    model, x = uneven(), torch.randn(3, 6)
    mmpeft.attach(model, {"*": method}, name="a", example=x)
    fill(model)
    keeps_shapes = "3" if isinstance(method, mmpeft.VeRA) else "0"  # VeRA's projections are as wide as the widest
    mmpeft.drop_sites(model, lambda site: site.path == keeps_shapes)
    y = model(x)
    mmpeft.save(model, tmp_path)
    other = uneven()
    mmpeft.load(other, tmp_path, example=x)
    assert close(other(x), y, 1e-6) and len(deltas(other)) == 2


@pytest.mark.parametrize(("method", "site"), [(mmpeft.VeRA(rank=3), "02"), (mmpeft.SAID(dimension=9), "0")], ids=str)
def test_a_site_that_the_others_depend_on_stays(method, site, tmp_path):
    model, x = uneven(), torch.randn(3, 6)
    mmpeft.attach(model, {"*": method}, name="a", example=x)
    fill(model)
    y, sites = model(x), deltas(model)
    with pytest.raises(Unsupported, match="looks at all sites of its rule.*nothing was changed"):
        mmpeft.drop_sites(model, lambda s: s.path in site)
    assert torch.equal(model(x), y) and all(a is b for a, b in zip(deltas(model), sites, strict=True))
    mmpeft.save(model, tmp_path)
    other = uneven()
    mmpeft.load(other, tmp_path, example=x)
    assert torch.equal(other(x), y)


def test_stacks_of_experts_are_controlled_but_not_compacted():
    from cases import Experts, Host

    model, x = Host(Experts(True), 6).eval(), torch.randn(5, 6)
    mmpeft.attach(model, {"site.down_proj": AdaLoRA(rank=2)}, name="a", example=x)
    fill(model)
    controller = rank.RankController(model, Budget(2, 4, orthogonal=0.1))
    (model(x).square().mean() + controller.penalty()).backward()
    assert controller.step(4) == 2
    with pytest.raises(Unsupported, match="experts"):
        mmpeft.compact(model)
