"""FLOP, Light-PEFT, APT and DEFT: pruning and sparsifying while tuning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.adapters.selection.apt import outliers
from mmpeft.errors import ConfigError, NameNotFound, Unsupported


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(16, 6)


# --- FLOP


def flop(**options):
    model, x = net()
    mmpeft.attach(model, {"{0,2}": mmpeft.FLOP()}, name="a", example=x)
    return model, x, mmpeft.FLOPGates(model, **{"sparsity": 0.5, "steps": 20, **options})


def test_flop_draws_its_gates_in_training_only_and_counts_them():
    model, x, gates = flop()
    d = deltas(model)[0]
    assert d.P.shape == (8, 6) and mmpeft.inspect(model).trainable == 6 * (8 + 6 + 1) + 4 * (4 + 8 + 1)
    still = model(x).detach()
    gates.draw()
    assert torch.equal(model(x), still)
    model.train()
    z = (3 * (d.alpha + d.noise).sigmoid() - 1.5).clamp(0, 1)
    assert close(model[0].weight, d.P @ torch.diag(z) @ d.Q, 1e-6) and not close(model(x), still, 1e-3)
    drawn = torch.cat([(3 * torch.sigmoid(d.alpha + torch.logit(torch.rand(4000, 1))) - 1.5 <= 0).float() for d in deltas(model)], 1)
    assert float(gates.closed().detach()) == pytest.approx(float(drawn.mean()), abs=0.01)


def test_flop_reaches_its_sparsity_and_compaction_keeps_the_function(tmp_path):
    model, x, gates = flop(lr=5.0, steps=20)
    with torch.no_grad():
        target = F.linear(x, torch.randn(4, 2) @ torch.randn(2, 6))
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.1))
    model.train()
    shares = []
    for _ in range(100):
        gates.draw()
        loss = (model(x) - target).square().mean() + gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(gates.step())
    assert min(shares) < 0.2 and max(shares) > 0.45
    gap = float(gates.closed().detach()) - 0.5
    assert float(gates.penalty().detach()) == pytest.approx(gates.l1 * gap + gates.l2 * gap**2, rel=1e-4)
    model.eval()
    with torch.no_grad():
        for d in deltas(model):
            d.alpha[0] = 9.0  # one that is surely open
            d.alpha[1] = -9.0
    y = model(x).detach()
    open_ = {d.site.name: int(((3 * d.alpha.sigmoid() - 1.5) > 0).sum()) for d in deltas(model)}
    assert mmpeft.compact(model, "a") == open_ and close(model(x), y, 1e-6)
    mmpeft.save(model, tmp_path, name="a")
    other, _ = net()
    mmpeft.load(other, tmp_path, check=False)
    assert close(other(x), y, 1e-6)
    with torch.no_grad():
        other[0]._parameters["weight"].zero_()
    assert close(other(x), y, 1e-6), "the base weight takes no part"


# --- Light-PEFT


def light():
    model, x = net()
    mmpeft.attach(model, {"2": mmpeft.StructuredMask(group=2)}, name="masks", example=x)
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=4)}, name="lora", example=x)
    fill(model, "lora")
    mmpeft.use(model, ["masks", "lora"])
    mmpeft.trainable(model, ["masks", "lora"])
    return model, x


def test_light_peft_prunes_channels_modules_and_ranks():
    model, x = light()
    (mask,) = deltas(model, "masks")
    with torch.no_grad():
        mask.m.copy_(torch.tensor([0.2, -0.9, 0.5, 0.1]))
    assert float(mmpeft.mask_l1(model, name="masks").detach()) == pytest.approx(1.7)
    assert mmpeft.prune_masks(model, keep=0.5, name="masks") == {"2.weight": 2}
    assert mask.m.tolist() == [0, 1, 1, 0] and not mask.m.requires_grad
    with mmpeft.use(model, "masks"):
        assert bool((model[2].weight[:, [0, 1, 6, 7]] == 0).all())
    ratios = mmpeft.module_ratios(model, [x[:9], x[9:]], name="lora")
    hidden = torch.relu(model[0](x))
    for (site, value), given, i in zip(ratios.items(), (x, hidden), (0, 2), strict=True):
        d, W = deltas(model, "lora")[i // 2], model[i]._parameters["weight"]
        assert site == f"{i}.weight"
        assert value == pytest.approx(float(((given @ (d.B @ d.A).T).norm() / (given @ W.T).norm()).detach()), rel=1e-4)
    (gone,) = mmpeft.prune_modules(model, [x], keep=0.5, name="lora")
    assert ratios[gone] == min(ratios.values())
    assert mmpeft.prune_modules(model, [x], keep=1.0, name="lora") == []
    (d,) = deltas(model, "lora")
    g = torch.autograd.grad(model(x).square().sum(), [d.A, d.B])
    units = (d.A * g[0]).abs().sum(1) + (d.B * g[1]).abs().sum(0)
    A = d.A.detach()[units.topk(2).indices.sort().values]
    assert mmpeft.prune_units(model, [lambda: model(x).square().sum()], keep=0.5, name="lora") == {d.site.name: 2}
    assert torch.equal(deltas(model, "lora")[0].A, A)


def test_light_peft_refuses():
    model, x = light()
    with pytest.raises(ConfigError, match="keep 1.5"):
        mmpeft.prune_masks(model, keep=1.5, name="masks")
    with pytest.raises(ConfigError, match="no site of StructuredMask"):
        mmpeft.prune_masks(model, keep=0.5, name="lora")
    model = nn.Sequential(nn.Conv1d(3, 4, 3))
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, name="c", example=torch.randn(2, 3, 9))
    with pytest.raises(Unsupported, match="linear layers"):
        mmpeft.module_ratios(model, [torch.randn(2, 3, 9)], name="c")
    with pytest.raises(ConfigError, match="group 3"):
        mmpeft.attach(net()[0], {"2": mmpeft.StructuredMask(group=3)})


# --- APT


def apt(**options):
    model, x = net()
    mmpeft.attach(model, {"{0,2}": mmpeft.APT(rank=4, start=2)}, name="a", example=x)
    fill(model)
    return model, x, mmpeft.APTController(model, **{"sparsity": 0.5, "begin": 0, "end": 4, **options})


def test_apt_scores_outputs_by_gradient_and_outliers_and_masks_the_least():
    model, x, control = apt(beta=0.5)
    target = torch.randn(16, 4)
    seen = {}
    average = {}
    for step in range(1, 6):
        model.zero_grad()
        with control.watch():
            y = model(x)
            (y - target).square().sum().backward()
        hidden = model[0](x).detach().requires_grad_()
        out = model[2](torch.relu(hidden))
        grads = torch.autograd.grad((out - target).square().sum(), [hidden, out])
        for site, H, g in zip(("0.weight", "2.weight"), (hidden, out), grads, strict=True):
            z = H.detach() - H.detach().mean(0)
            seen[site] = (H.detach() * g).sum(0).abs() + (z.pow(4).mean(0) / (z.square().mean(0) ** 2).clamp_min(1e-12)).sqrt()
            average[site] = seen[site] if step == 1 else 0.5 * average[site] + 0.5 * seen[site]
        share = control.step()
        assert share == pytest.approx(0.5 - 0.5 * (1 - min(1, step / 4)) ** 3)
        for d in deltas(model):
            score = average[d.site.name]
            assert close(control.salience[d.site.name] / score.max(), score / score.max(), 1e-4)
            gone = d.m_out == 0
            assert int(gone.sum()) == int(share * len(score) + 1e-9)
            assert not gone.any() or score[gone].max() <= score[~gone].min()
    W = model[0]._parameters["weight"]
    d = deltas(model)[0]
    assert close(model[0].weight, torch.diag(d.m_out) @ (W + d.B[:, :2] @ d.A[:2]), 1e-6)
    assert not model[0]._forward_hooks
    x4 = torch.tensor([[0.0], [0.0], [0.0], [4.0]])
    assert float(outliers(x4)) == pytest.approx(((3 * 1 + 81) / 4 / 9) ** 0.5)


def test_apt_grows_the_half_of_the_sites_where_tuning_matters_and_compacts():
    model, x, control = apt(sparsity=0.0, grow_every=2, grow=1)
    for _ in range(4):
        model.zero_grad()
        with control.watch():
            model(x).square().sum().backward()
        before = model(x).detach()
        control.step()
        with torch.no_grad():
            grown = model(x)
    order = sorted(control.tuning, key=lambda s: -float(control.tuning[s]))
    assert control.ranks() == {order[0]: 4, order[1]: 2}
    fresh, _, _ = apt()
    with torch.no_grad():
        for d in deltas(fresh):
            d.B.zero_()
            y = fresh(x)
            d.mask.fill_(1)
            assert torch.equal(fresh(x), y), "a component joins with B 0: the function stays"
    assert before.shape == grown.shape
    y = model(x).detach()
    assert mmpeft.compact(model, "a") == control.ranks() and close(model(x), y, 1e-6)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    P = torch.randn(4, 4)
    assert close(mmpeft.apt_distill(student, teacher, P), (student @ P.T - teacher).square().mean(), 1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: apt(sparsity=1.0), ConfigError, "sparsity 1.0"),
        (lambda: apt(group={"0": 3}), ConfigError, "group 3 does not divide the 8 rows"),
        (lambda: apt()[2].step(), ConfigError, "was not scored"),
        (lambda: mmpeft.APT(rank=2, start=3), ConfigError, "start 3"),
        (lambda: mmpeft.FLOP(dropout=0.1), ConfigError, "no dropout"),
        (lambda: flop(sparsity=0), ConfigError, "sparsity 0"),
        (lambda: mmpeft.Density(net()[0], "1", approximation="sign"), ConfigError, "tanh, rational"),
        (lambda: mmpeft.Density(net()[0], "7"), NameNotFound, "7"),
        (lambda: mmpeft.Density(net()[0], "2").loss(), ConfigError, "no forward"),
    ],
)
def test_bad_use_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- DEFT


@pytest.mark.parametrize("approximation", ["tanh", "rational"])
def test_deft_counts_activations_smoothly_and_makes_them_fewer(approximation):
    model, x = net()
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=2)}, name="a", example=x)
    target = model(x).detach()
    density = mmpeft.Density(model, "2", approximation=approximation, sharpness=20.0)
    with density:
        model(x)
        a = torch.relu(model[0](x))
        soft = torch.tanh(20 * a) if approximation == "tanh" else a**2 / (a**2 + 0.05)
        assert float(density.loss().detach()) == pytest.approx(float(soft.mean().detach()), rel=1e-5)
        before = density.share()
    assert before == pytest.approx(float((a != 0).float().mean()))
    assert not model[2]._forward_pre_hooks
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.02))
    for _ in range(60):
        with density:
            loss = 0.1 * (model(x) - target).square().mean() + density.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert density.share(1e-3) < 0.7 * before


def test_ada_deft_skips_a_layer_whose_weight_has_gone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.calls = nn.Sequential(nn.Linear(4, 4)), 0
            self.mlp[0].register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

        def forward(self, x):
            return x + self.mlp(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(3, 4)
    mmpeft.attach(model, {"*.mlp": mmpeft.AdaDEFT(threshold=0.1)}, name="a", example=x)
    with torch.no_grad():
        deltas(model)[0].w.fill_(0.05)
        deltas(model)[1].w.fill_(-0.7)
    assert float(mmpeft.layer_l1(model, name="a").detach()) == pytest.approx(0.75)
    plain = copy.deepcopy(model)
    mmpeft.detach(plain)
    calls = [block.calls for block in model]
    y = model(x)
    assert [block.calls - n for block, n in zip(model, calls, strict=True)] == [0, 1], "the first is not run"
    assert close(y, x - 0.7 * plain[1].mlp(x), 1e-6)
    model.train()
    h = x + 0.05 * plain[0].mlp(x)
    assert close(model(x), h - 0.7 * plain[1].mlp(h), 1e-6)


def test_layer_drop_skips_layers_in_training_by_its_chance():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    with torch.no_grad():
        layers = [x, model[0](x), model[1](x), model(x)]  # which of the two ran
        mmpeft.attach(model, {"*": mmpeft.LayerDrop(p=0.25)}, name="a", example=x)
        assert torch.equal(model(x), layers[3])
        model.train()
        seen = [next(i for i, y in enumerate(layers) if close(model_y, y, 1e-6)) for model_y in (model(x) for _ in range(400))]
    shares = [seen.count(i) / 400 for i in range(4)]
    assert shares == pytest.approx([1 / 16, 3 / 16, 3 / 16, 9 / 16], abs=0.08)
    with pytest.raises(ConfigError, match="p 1.0"):
        mmpeft.LayerDrop(p=1.0)
