"""Rank controllers: published schedules, AdaLoRA against HF PEFT's allocator, the search of AutoLoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import close, deltas
from rank_kit import adapted, backward, small
from torch import nn

import mmpeft
from mmpeft.adapters.methods import dynamic_rank
from mmpeft.adapters.selection import rank, rank_policies
from mmpeft.adapters.selection.autolora import AutoLoRASearch
from mmpeft.errors import ConfigError

AdaLoRA, DyLoRA, SoRA, IncreLoRA, AutoLoRA = (
    getattr(dynamic_rank, n) for n in ("AdaLoRA", "DyLoRA", "SoRA", "IncreLoRA", "AutoLoRA")
)
Budget, Growth, Proximal, Sampled = (getattr(rank_policies, n) for n in ("Budget", "Growth", "Proximal", "Sampled"))


def test_adaloras_budget_is_the_published_cubic():
    """b(t) = b_T + (b_0 - b_T)(1 - (t - t_i) / (T - t_i - t_f))^3 between t_i and T - t_f."""
    model = adapted(AdaLoRA(rank=4))
    policy = Budget(2, 100, warmup=10, final=20)
    mmpeft_controller = rank.RankController(model, policy)
    assert mmpeft_controller.ranks() == {f"a: {i}.weight": 4 for i in (0, 2, 4)}
    for t in range(1, 101):
        published = 12 if t <= 10 else 6 if t >= 80 else int(6 + 6 * (1 - (t - 10) / 70) ** 3)
        assert policy.budget(t) == published, t


def test_adalora_chooses_what_hf_pefts_allocator_chooses():
    peft_layer = pytest.importorskip("peft.tuners.adalora.layer")
    from peft import AdaLoraConfig, get_peft_model

    base = small()
    config = AdaLoraConfig(
        target_modules=["0", "2", "4"], init_r=4, target_r=2, total_step=12, tinit=2, tfinal=3, deltaT=2, lora_alpha=4,
        orth_reg_weight=0.1,
    )  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(base), config)
    ours = adapted(AdaLoRA(rank=4), filled=False)
    layers = {n.split(".")[-1]: m for n, m in theirs.named_modules() if isinstance(m, peft_layer.SVDLinear)}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for d in deltas(ours):
            for n in ("P", "lam", "Q"):
                p = getattr(d, n)
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            layer = layers[d.site.path]
            layer.lora_A["default"].copy_(d.Q)
            layer.lora_B["default"].copy_(d.P)
            layer.lora_E["default"].copy_(d.lam[:, None])
            layer.ranknum["default"].fill_(4)
    controller = rank.RankController(ours, Budget(2, 12, warmup=2, final=3, interval=2, orthogonal=0.0))
    optimizer = torch.optim.SGD([p for d in deltas(ours) for p in (d.P, d.lam, d.Q)], lr=0.5)
    other = torch.optim.SGD([p for n, p in theirs.named_parameters() if "lora_" in n], lr=0.5)
    allocator = theirs.base_model.rankallocator
    for t in range(1, 10):
        g = torch.Generator().manual_seed(t)
        x, y = torch.randn(7, 6, generator=g), torch.randn(7, 5, generator=g)
        for model in (ours, theirs):
            (model(x) - y).square().mean().backward()
        optimizer.step()
        other.step()
        # At t = T - t_f the caller of the allocator forces the last choice, from the averages of the step before.
        used = controller.step(t)
        if t < 9:
            allocator.update_and_allocate(theirs, t)
            chosen = t > 2 and t % 2 == 0  # in between, the optimizer moves the lam of masked triplets off zero
            theirs_used = sum(int(layer.lora_E["default"].count_nonzero()) for layer in layers.values())
            assert not chosen or used == theirs_used
            for d in deltas(ours):
                assert close(layers[d.site.path].lora_E["default"][:, 0], d.lam, 1e-5), t
        optimizer.zero_grad()
        other.zero_grad()
    assert used == 6


def test_orthogonality_is_the_papers_penalty():
    model = adapted(AdaLoRA(rank=3)).double()
    controller = rank.RankController(model, Budget(1, 10, orthogonal=0.5))
    expected = 0.0
    for d in deltas(model):
        for M in (d.P.T @ d.P, d.Q @ d.Q.T):
            expected += 0.5 * float((M.detach() - torch.eye(3)).square().sum())
    assert float(controller.penalty().detach()) == pytest.approx(expected, rel=1e-12)


def test_a_masked_triplet_may_come_back_until_the_choice_stands():
    model = adapted(AdaLoRA(rank=3))
    controller = rank.RankController(model, Budget(1, 6, final=2, orthogonal=0.0))
    for t in range(1, 5):
        backward(model, t)
        controller.step(t)
    assert sum(controller.ranks().values()) == 3
    masked = [d for d in deltas(model) if not d.mask.all()]
    backward(model)
    assert all(d.lam.grad[d.mask == 0].any() for d in masked), "lam of a masked triplet keeps a gradient"
    with torch.no_grad():
        for d in masked:
            d.lam.add_(1.0)
    controller.step(5)
    assert all((d.lam[d.mask == 0] == 0).all() for d in masked)


def test_sora_is_soft_thresholding():
    model = adapted(SoRA(rank=4))
    before = [d.g.detach().clone() for d in deltas(model)]
    rank.RankController(model, Proximal(0.9)).step()
    for d, g in zip(deltas(model), before, strict=True):
        expected = torch.tensor([(abs(v) - 0.9) * (1 if v > 0 else -1) if abs(v) > 0.9 else 0.0 for v in g.tolist()])
        assert close(d.g, expected, 1e-6) and (expected == 0).any()


def test_sora_decays_by_a_schedule_to_fewer_components_on_a_task():
    """A rank-1 task: the gates of a rank-4 SoRA close while it is learned."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)
    with torch.no_grad():
        target = model(x) + x @ torch.outer(torch.randn(8), torch.randn(8))
    mmpeft.attach(model, {"0": SoRA(rank=4)}, name="a", example=x)
    controller = rank.RankController(model, Proximal(mmpeft.Cubic(0.0, 5e-3, 0, 100)))
    optimizer = torch.optim.SGD(mmpeft.parameter_groups(model, lr=0.1))
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        used = controller.step()
    assert used < 4 and loss < 0.05 * target.var()


def test_dylora_draws_one_rank_for_all_sites_and_repeats_it_on_resume():
    model = adapted(DyLoRA(rank=4, min_rank=2)).train()
    controller = rank.RankController(model, Sampled(seed=3))
    seen = []
    for t in range(1, 40):
        controller.step(t)
        drawn = {float(d.draw) for d in deltas(model)}
        assert len(drawn) == 1
        seen += drawn
    assert set(seen) == {2.0, 3.0, 4.0}
    again = rank.RankController(model, Sampled(seed=3))
    again.load_state_dict({"steps": 17, "policy": {"draw": 3}})
    again.step()
    assert float(deltas(model)[0].draw) == seen[17]


def test_dylora_uses_and_trains_the_first_components():
    model = adapted(DyLoRA(rank=4)).train()
    d = deltas(model)[0]
    for update, trained in (("all", [True, True, False, False]), ("last", [False, True, False, False])):
        d.method = DyLoRA(rank=4, alpha=6, update=update)
        with torch.no_grad():
            d.draw.fill_(2)
        expected = model[0]._parameters["weight"] + 3 * d.B[:, :2] @ d.A[:2]
        assert close(model[0].weight, expected, 1e-6)
        gA, gB = torch.autograd.grad(model[0].weight.square().sum(), [d.A, d.B])
        assert gA.any(1).tolist() == trained and gB.any(0).tolist() == trained


def test_increlora_grows_where_it_matters_and_stops_at_the_target():
    model = adapted(IncreLoRA(rank=3, std=0.2))
    policy = Growth(2, interval=2, warmup=1, orthogonal=0.0)
    controller = rank.RankController(model, policy)
    used = []
    for t in range(1, 13):
        backward(model, t)
        means = None
        if t % 2 == 0:
            before = copy.deepcopy(policy.importance)
            for name, d in controller.sites.items():
                for n in ("P", "lam", "Q"):
                    before.update(f"{name} {n}", getattr(d, n))
            scores = rank_policies.triplet_scores(before, controller.sites)
            room = {n: scores[n][: int(d.mask.sum())].mean() for n, d in controller.sites.items()}
            open_ = {n: v for n, v in room.items() if controller.sites[n].mask.sum() < 3}
            means = max(open_, key=open_.get)
        ranks = controller.ranks()
        used.append(controller.step(t))
        if means is not None and used[-1] > sum(ranks.values()):
            assert controller.ranks()[means] == ranks[means] + 1
    assert used == [3, 4, 4, 5, 5, 6, 6, 6, 6, 6, 6, 6]


def test_the_triplet_in_reserve_gets_a_gradient_and_joins_without_a_jump():
    model = adapted(IncreLoRA(rank=3, std=0.2))
    d, x = deltas(model)[0], torch.randn(3, 6)
    with torch.no_grad():
        d.lam[1:] = d.method.start
    backward(model)
    assert d.P.grad.any(0).tolist() == [True, True, False] and d.lam.grad.ne(0).tolist() == [True, False, False]
    before = model(x)
    d.mask[1] = 1
    assert close(model(x), before, 1e-4)


def test_autoloras_gradient_is_that_of_the_unrolled_step():
    """Against autograd through the step itself, in float64."""
    model = adapted(AutoLoRA(rank=3)).double()
    g = torch.Generator().manual_seed(0)
    x, u = torch.randn(2, 7, 6, generator=g).double()
    y, v = torch.randn(2, 7, 5, generator=g).double()
    W = [model[i]._parameters["weight"].detach() for i in (0, 2, 4)]
    b = [model[i].bias.detach() for i in (0, 2, 4)]

    def forward(x, factors, logits):
        for k in range(3):
            A, B, w = factors[2 * k], factors[2 * k + 1], logits[k].softmax(0)
            x = x @ (W[k] + B @ torch.diag(w) @ A).T + b[k]
            x = torch.tanh(x) if k < 2 else x
        return x

    xi = 0.05
    search = AutoLoRASearch(model, lr=0.1, inner_lr=xi, epsilon=1e-4)
    found = search.gradient(lambda: (model(x) - y).square().mean(), lambda: (model(u) - v).square().mean())
    factors = [t for d in deltas(model) for t in (d.A.detach().requires_grad_(), d.B.detach().requires_grad_())]
    logits = [d.logits.detach().requires_grad_() for d in deltas(model)]
    inner = torch.autograd.grad((forward(x, factors, logits) - y).square().mean(), factors, create_graph=True)
    stepped = [t - xi * g for t, g in zip(factors, inner, strict=True)]
    exact = torch.autograd.grad((forward(u, stepped, logits) - v).square().mean(), logits)
    first = AutoLoRASearch(model, lr=0.1, inner_lr=0.0).gradient(None, lambda: (model(u) - v).square().mean())
    for f, e, direct in zip(found, exact, first, strict=True):
        assert close(f / e.abs().max(), e / e.abs().max(), 1e-5)
        assert not close(direct / e.abs().max(), e / e.abs().max(), 1e-3), "the second-order part matters here"


def test_autolora_finds_the_component_that_validation_needs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)
    mmpeft.attach(model, {"0": AutoLoRA(rank=4, alpha=8)}, name="a", example=x)
    d = deltas(model)[0]
    with torch.no_grad():
        d.B.normal_()
        target = model(x) + x @ torch.outer(d.B[:, 1], d.A[1]).T
    search = AutoLoRASearch(model, lr=0.05, inner_lr=1e-3)
    loss = lambda: (model(x) - target).square().mean()  # noqa: E731
    for _ in range(30):
        search.step(loss, loss)
    assert d.logits.argmax() == 1 and search.ranks() == {"0.weight": 1}
    plan = search.plan()
    other = nn.Sequential(nn.Linear(8, 8))
    assert mmpeft.inspect(other, plan).trainable == 16 and plan.rules[0].methods[0].scale == 2.0
    with torch.no_grad():
        d.logits.zero_()
    search.deltas[0][1].method = AutoLoRA(rank=4, threshold=0.5)
    with pytest.raises(ConfigError, match="no component of 1 sites"):
        search.plan()
    assert all(g["lr"] == 0 for g in mmpeft.parameter_groups(model, lr=1.0) if any(p is d.logits for p in g["params"]))


def test_capaboost_has_a_higher_rank_than_its_pair():
    model = adapted(dynamic_rank.CapaBoost(rank=2, d=3))
    d = deltas(model)[1]
    update = (model[2].weight - model[2]._parameters["weight"]).detach()
    assert torch.linalg.matrix_rank(d.B @ d.A) == 2 and torch.linalg.matrix_rank(update, rtol=1e-4) == 6
    assert 0.3 < d.M.float().mean() < 0.7 and "M" not in d.state_to_save()


def test_a_controller_goes_on_where_its_checkpoint_stopped():
    first, second = adapted(AdaLoRA(rank=3)), adapted(AdaLoRA(rank=3))
    make = lambda m: rank.RankController(m, Budget(1, 8, orthogonal=0.0))  # noqa: E731
    one, two = make(first), make(second)
    for t in range(1, 9):
        if t == 4:
            state, two = two.state_dict(), make(second)
            two.load_state_dict(copy.deepcopy(state))
        for model in (first, second):
            backward(model, t)
        assert one.step() == two.step()
    assert one.ranks() == two.ranks() and two.steps == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DyLoRA(rank=2, min_rank=3), "min_rank 3; expected 1 to rank"),
        (lambda: DyLoRA(update="first"), "expected one of all, last"),
        (lambda: dynamic_rank.CapaBoost(density=0), "density"),
        (lambda: Budget(2, 10, warmup=6, final=4), "leaves no step"),
        (lambda: Budget(0, 10), "target"),
        (lambda: Budget(1, 10, criterion="sensitivty"), "nearest: sensitivity"),
        (lambda: Budget(1, 10, beta1=1.0), "beta1"),
        (lambda: Proximal(0.0), "threshold"),
        (lambda: Growth(0), "target"),
        (lambda: mmpeft.Cubic(1, 0, 5, 5), "begin"),
        (lambda: rank.RankController(adapted(SoRA(rank=2)), Budget(1, 10)), "works on AdaLoRA"),
        (lambda: rank.RankController(adapted(AdaLoRA(rank=2)), Budget(3, 10)), "more than the 2"),
        (lambda: rank.RankController(adapted(AdaLoRA(rank=2)), Budget(1, 10)).step(), "no gradient"),
        (lambda: mmpeft.compact(adapted(mmpeft.LoRA(rank=2))), "no site with components"),
        (lambda: mmpeft.prune_channels(adapted(mmpeft.BitFit()), keep=1), "pair"),
        (lambda: mmpeft.prune_channels(adapted(mmpeft.LoRA(rank=2)), keep=9), "1 to 6"),
        (lambda: mmpeft.compact(adapted(SoRA(rank=2)), keep={"0.weight": torch.ones(3)}), "mask of 3"),
        (lambda: AutoLoRASearch(adapted(SoRA(rank=2)), lr=0.1, inner_lr=0), "no AutoLoRA"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(make, message):
    with pytest.raises((ConfigError, LookupError), match=message):
        make()
