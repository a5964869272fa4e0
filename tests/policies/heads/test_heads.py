"""What every head must do: learn a toy trajectory, ignore what the mask hides, keep the interface, refuse bad shapes."""

import pytest
import torch

from mmpeft.errors import ConfigError
from mmpeft.policies import heads

CHUNK, DIM, WIDTH = 5, 3, 16
SMALL = {"width": 32, "depth": 1, "heads": 2}
# name -> (head, steps to learn, how near it comes in normalised units)
CONTINUOUS = {
    "l1": (lambda: heads.RegressionHead(depth=1), 300, 0.08),
    "l2": (lambda: heads.RegressionHead(norm="l2"), 300, 0.08),
    "gaussian": (lambda: heads.GaussianHead(depth=1), 300, 0.1),
    "mixture": (lambda: heads.MixtureHead(modes=3, depth=1), 300, 0.1),
    "binned": (lambda: heads.BinnedHead(bins=64), 300, 0.05),
    "binned-mean": (lambda: heads.BinnedHead(bins=64, expectation=True), 300, 0.08),
    "fast": (lambda: heads.FASTHead(scale=20, vocabulary=128, **SMALL), 200, 0.08),
    "vqbet": (lambda: heads.VQBeTHead(codes=4, sample=False, width=64), 300, 0.1),
    "act": (lambda: heads.ACTHead(latent=4, width=32, heads=2, encoder_depth=1), 250, 0.12),
    "diffusion": (lambda: heads.DiffusionHead(train_steps=50, predict_steps=10, **SMALL), 400, 0.25),
    "flow": (lambda: heads.FlowHead(**SMALL), 400, 0.25),
}


def trajectory(n=12):
    """Chunks of sines within [-1, 1] and a feature vector for each."""
    g = torch.Generator().manual_seed(0)
    phase = torch.linspace(0, 3, n)[:, None, None] + torch.arange(CHUNK)[None, :, None] * 0.2
    actions = torch.sin(phase + torch.arange(DIM)) * 0.9
    return torch.randn(n, WIDTH, generator=g), actions


def built(name, readouts=1):
    torch.manual_seed(0)
    head = CONTINUOUS[name][0]().build(in_dim=WIDTH, action_dim=DIM, chunk=CHUNK, readouts=readouts)
    head.fit(trajectory()[1])
    return head


def train(head, features, actions, steps, mask=None, lr=1e-2):
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = head.loss(features, actions, mask)
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", CONTINUOUS)
def test_overfits_a_toy_trajectory(name):
    """Every demonstrated step is reproduced from its features, far closer than the spread of the actions (.6)."""
    head, (_, steps, near) = built(name), CONTINUOUS[name]
    features, actions = trajectory()
    times = 4 if name in ("diffusion", "flow") else 1  # several draws of noise a step
    lr = 3e-3 if name in ("diffusion", "flow", "fast", "act") else 1e-2
    train(head, features.repeat(times, 1), actions.repeat(times, 1, 1), steps, lr=lr)
    with torch.no_grad():
        predicted = head.predict(features, generator=torch.Generator().manual_seed(1))
    assert predicted.shape == actions.shape
    assert (predicted - actions).abs().mean() < near


@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_the_mask_hides_is_never_read(name):
    """NaN under the mask changes neither loss nor gradient; a masked dimension gets no gradient of its own."""
    features, actions = trajectory()
    mask = torch.ones(len(actions), CHUNK, dtype=torch.bool)
    mask[3:, 3:] = False
    poisoned = torch.where(mask[..., None], actions, float("nan"))
    found = []
    for given in (actions, poisoned):
        head = built(name)
        torch.manual_seed(5)
        loss = head.loss(features, given, mask)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in head.parameters() if p.grad is not None]))
    assert torch.isfinite(found[1][0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("readouts", [1, CHUNK])
def test_interface(name, readouts):
    """Both feature layouts; every parameter gets a gradient within a few steps; building twice changes nothing."""
    head = built(name, readouts)
    assert head.build(in_dim=WIDTH, action_dim=DIM, chunk=CHUNK, readouts=readouts) is head
    _, actions = trajectory(6)
    features = torch.randn(6, readouts, WIDTH)
    train(head, features, actions, 2)
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not without
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        first = head.predict(features, generator=generator)
        again = head.predict(features, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, again)  # the generator decides all that is drawn


@pytest.mark.parametrize("name", ["l1", "l2", "gaussian", "mixture", "binned"])
def test_loss_adds_up_over_valid_steps(name):
    """loss * valid steps of two halves is that of the whole (of heads whose loss draws no noise and counts steps)."""
    head, (features, actions) = built(name), trajectory()
    mask = torch.rand(len(actions), CHUNK, generator=torch.Generator().manual_seed(0)) > 0.3
    whole = head.loss(features, actions, mask) * mask.sum()
    halves = sum(head.loss(features[i], actions[i], mask[i]) * mask[i].sum() for i in (slice(0, 5), slice(5, None)))
    torch.testing.assert_close(whole, halves)


def test_a_hidden_dimension_is_not_learned():
    """Padded action dimensions of another robot: their outputs get no gradient."""
    head, (features, actions) = built("l2"), trajectory()
    mask = torch.ones_like(actions, dtype=torch.bool)
    mask[..., 2] = False
    head.loss(features, actions, mask).backward()
    per_dim = head.to_actions.linear.weight.grad.view(CHUNK, DIM, WIDTH).abs().sum((0, 2))
    assert (per_dim[:2] > 0).all() and per_dim[2] == 0


def test_discrete():
    features, _ = trajectory()
    actions = torch.randint(4, (len(features), CHUNK), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    head = heads.DiscreteHead().build(in_dim=WIDTH, action_dim=4, chunk=CHUNK)
    train(head, features, actions, 200)
    assert torch.equal(head.predict(features), actions)
    with pytest.raises(ConfigError, match=r"0 \.\. 3"):
        head.loss(features, actions + 1)
    with pytest.raises(ConfigError, match="whole numbers"):
        head.loss(features, actions.float())


@pytest.mark.parametrize("name", ["l1", "flow", "fast"])
def test_refusals(name):
    head, (features, actions) = built(name), trajectory()
    with pytest.raises(ConfigError, match=rf"actions \[12, {CHUNK}, {DIM}\], given \[12, {CHUNK}, 4\]"):
        head.loss(features, torch.zeros(12, CHUNK, 4))
    with pytest.raises(ConfigError, match="features"):
        head.loss(torch.zeros(12, 9), actions)
    with pytest.raises(ConfigError, match="features"):
        head.predict(torch.zeros(12, 2, WIDTH))
    with pytest.raises(ConfigError, match="bool mask"):
        head.loss(features, actions, torch.ones(12, CHUNK))
    with pytest.raises(ConfigError, match="was built with chunk=5, not 6"):
        head.build(in_dim=WIDTH, action_dim=DIM, chunk=6)
    with pytest.raises(ConfigError, match="no parameters yet"):
        CONTINUOUS[name][0]().predict(features)


@pytest.mark.parametrize(
    "make",
    [
        lambda: heads.RegressionHead(norm="l3"),
        lambda: heads.MixtureHead(modes=0),
        lambda: heads.GaussianHead(predict_mode="draw"),
        lambda: heads.BinnedHead(low=1, high=1),
        lambda: heads.FASTHead(scale=0),
        lambda: heads.ACTHead(kl_weight=-1),
        lambda: heads.DiffusionHead(train_steps=5, predict_steps=6),
        lambda: heads.FlowHead(predict_steps=0),
        lambda: heads.VQBeTHead(codes=1),
    ],
)
def test_values_out_of_range(make):
    with pytest.raises(ConfigError):
        make()
