"""ReLoRA's restarts and schedule, Mixout, R3F and HiWi, and Trans-LoRA's transfer."""

from __future__ import annotations

import math

import pytest
import torch
from cases import close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound


def small(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    mmpeft.attach(model, {"{0,2}": method}, name="a", example=torch.randn(3, 6))
    fill(model)
    return model


def backward(model, seed):
    g = torch.Generator().manual_seed(seed)
    model.zero_grad()
    (model(torch.randn(7, 6, generator=g)) - torch.randn(7, 4, generator=g)).square().mean().backward()


def test_a_restart_keeps_the_function_forgets_the_moments_and_adds_up_rank():
    model, x = small(mmpeft.ReLoRA(rank=1, stages=2)), torch.randn(3, 6)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.1))
    W = model[0]._parameters["weight"]
    for stage in (1, 2):
        backward(model, stage)
        optimizer.step()
        y, before = model(x).detach(), {p: dict(optimizer.state[p]) for p in optimizer.state}
        before = {p: {n: t.clone() for n, t in s.items()} for p, s in before.items()}
        assert mmpeft.restart(model, optimizer, keep=0.25) == stage
        assert close(model(x), y, 1e-6)
        for d in deltas(model):
            assert not d.B.any()
            for p in (d.A, d.B):
                for n in ("exp_avg", "exp_avg_sq"):
                    old, now = before[p][n], optimizer.state[p][n]
                    kept = round(0.25 * p.numel())
                    least = old.abs().flatten().topk(kept).values.min()
                    assert torch.equal(now, old * (old.abs() >= least)), "the largest quarter stays as it was"
                assert torch.equal(optimizer.state[p]["step"], before[p]["step"])
    for seed in (3, 4):
        backward(model, seed)
        optimizer.step()
    assert torch.linalg.matrix_rank(model[0].weight - W, rtol=1e-4) == 3
    with pytest.raises(ConfigError, match="used its 2 stages"):
        mmpeft.restart(model, optimizer)
    with pytest.raises(ConfigError, match="keep 2"):
        mmpeft.restart(model, optimizer, keep=2)
    with pytest.raises(ConfigError, match="no site of ReLoRA"):
        mmpeft.restart(small(mmpeft.PeriodicLoRA(rank=1)), optimizer)


def test_the_schedule_climbs_back_after_every_restart():
    factor = mmpeft.Jagged(every=10, warmup=4, total=40, final=0.1)
    for step in range(50):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * min(1, step / 40))) / 2
        ramp = min(1, (step % 10 + 1) / 5)
        assert factor(step) == pytest.approx(cosine * ramp)
    with pytest.raises(ConfigError, match="warmup < every"):
        mmpeft.Jagged(every=4, warmup=4, total=10)


# --- near the start


def test_mixout_takes_entries_back_at_random_in_training_and_is_right_in_the_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    mmpeft.attach(model, {"0": mmpeft.Mixout(p=0.7)}, name="a", example=torch.randn(3, 6))
    fill(model)
    W, value = model[0]._parameters["weight"], deltas(model)[0].value
    assert torch.equal(model[0].weight, value)
    model.train()
    assert close(model[0].weight, value, 1e-6), "before a draw it is plain full tuning"
    generator, total = torch.Generator().manual_seed(1), 0
    for _ in range(300):
        mmpeft.draw_mixout(model, generator)
        M = deltas(model)[0].M
        mixed = M * value + (1 - M) * W
        assert close(model[0].weight, (mixed - 0.7 * W) / 0.3, 1e-5)
        total = total + model[0].weight.detach() / 300
    assert close(total, value, 0.15)
    with pytest.raises(ConfigError, match="p 1.0"):
        mmpeft.Mixout(p=1.0)


def test_r3f_is_the_symmetric_divergence_under_noise():
    torch.manual_seed(0)
    head, x = nn.Linear(6, 4).double(), torch.randn(3, 5, 6).double()
    torch.manual_seed(1)
    logits, penalty = mmpeft.r3f(head, x, std=0.1)
    torch.manual_seed(1)
    p, q = head(x).softmax(-1), head(x + 0.1 * torch.randn_like(x)).softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()
    assert close(logits, head(x), 1e-12) and float(penalty.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    _, uniform = mmpeft.r3f(head, x, std=0.1, noise="uniform")
    assert 0 < float(uniform.detach()) < float(penalty.detach())
    with pytest.raises(ConfigError, match="normal, uniform"):
        mmpeft.r3f(head, x, noise="poisson")


def test_hiwi_reads_the_bias_and_merges():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)).double().eval(), torch.randn(3, 6).double()
    mmpeft.attach(model, {"0": mmpeft.HiWi(rank=3)}, name="a", example=x)
    assert mmpeft.inspect(model).trainable == 2 * 3 * 4
    fill(model)
    (d,), b = deltas(model), model[0]._parameters["bias"]
    assert close(model[0].bias, b + d.U @ torch.relu(d.D @ b), 1e-12)
    assert mmpeft.merge(model, check=x) < 1e-12
    with pytest.raises(ConfigError, match="bias, weight"):
        mmpeft.HiWi(of="gain")


# --- Trans-LoRA


class Source(nn.Module):
    """Two classes and a third logit that the discriminator may use."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 12), nn.Tanh()), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(x))


def move():
    torch.manual_seed(0)
    source = Source().eval()
    target = nn.Sequential(nn.Linear(4, 20), nn.GELU(), nn.Linear(20, 9), nn.GELU(), nn.Linear(9, 2)).eval()
    x = torch.randn(3, 4)
    mmpeft.attach(source, {"{body.0,head}": mmpeft.LoRA(rank=2)}, name="task", example=x)
    fill(source, "task", size=1.0)
    plan = {"{0,2}": mmpeft.LoRA(rank=4), "4": mmpeft.LoRA(rank=2)}
    return mmpeft.TransLoRA(source, "task", target, plan, name="moved", example=x), source, target


def test_an_adapter_moves_to_another_base_by_synthetic_data_alone():
    transfer, source, target = move()
    generator = torch.Generator().manual_seed(3)
    real = [torch.randn(4, generator=generator) + 2 for _ in range(12)]

    def draw():  # half of what is generated lies where the task is
        return torch.randn(4, generator=generator) + (2 if torch.rand((), generator=generator) < 0.5 else -2)

    before = [d.A.clone() for d in deltas(source, "task")]
    off = [torch.randn(4, generator=generator) - 2 for _ in range(12)]
    accuracy = transfer.fit_discriminator(lambda x: source(x)[2], real=real, synthetic=off, steps=80, lr=0.05)
    assert accuracy > 0.9
    assert all(torch.equal(a, d.A) for a, d in zip(before, deltas(source, "task"), strict=True))
    samples = transfer.synthesise(draw, count=40)
    assert len(samples) == 40 and sum(float(s.mean()) > 0 for s in samples) > 36

    def loss(x, answer):
        return mmpeft.distil_loss(target(x)[None], answer[None])

    losses = transfer.distil(samples, lambda x: source(x)[:2].clone(), loss, steps=150, lr=0.03)
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    fresh = torch.randn(200, 4, generator=generator) + 2
    with torch.no_grad(), mmpeft.use(source, "task"):
        truth = source(fresh)[:, :2].argmax(-1)
    with torch.no_grad(), mmpeft.use(target, None):
        alone = float((target(fresh).argmax(-1) == truth).float().mean())
    with torch.no_grad(), mmpeft.use(target, "moved"):
        moved = float((target(fresh).argmax(-1) == truth).float().mean())
    assert moved > 0.85 and moved > alone


def test_distil_loss_is_the_divergence_at_a_temperature():
    student, teacher = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 7).double()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert close(mmpeft.distil_loss(student, teacher, temperature=2.0), expected, 1e-12)


def test_the_transfer_refuses():
    transfer, source, target = move()
    with pytest.raises(NameNotFound, match="no adapter 'tusk'"):
        mmpeft.TransLoRA(source, "tusk", target, {})
    with pytest.raises(ConfigError, match="0 real"):
        transfer.fit_discriminator(lambda x: x.sum(), real=[], synthetic=[1])
    transfer.judge = lambda x: torch.tensor(-1.0)
    mmpeft.attach(source, {"head": mmpeft.LoRA(rank=1)}, name="discriminator", check=False)
    with pytest.raises(ConfigError, match="0 of 6 synthetic inputs"):
        transfer.synthesise(lambda: torch.zeros(4), count=3, attempts=2)
    with pytest.raises(ConfigError, match="0 samples"):
        transfer.distil([], lambda x: x, lambda x, a: x, steps=1, lr=0.1)
