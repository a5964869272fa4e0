"""Two ways past an obstacle: demonstrators turn left or right, never straight. Mixture, VQ-BeT, diffusion and flow
find both ways, and L1 and L2 regression and a Gaussian do neither; the chunk keeps to one way from start to end."""

import functools

import pytest
import torch

from mmpeft.policies import heads

CHUNK = 4
HEADS = {
    "mixture": lambda: heads.MixtureHead(modes=4),
    "vqbet": lambda: heads.VQBeTHead(codes=2, books=1, width=32),
    "diffusion": lambda: heads.DiffusionHead(train_steps=50, predict_steps=10, width=32, depth=1, heads=2),
    "flow": lambda: heads.FlowHead(width=32, depth=1, heads=2),
    "l2": lambda: heads.RegressionHead(norm="l2"),
    "gaussian": lambda: heads.GaussianHead(),
}


@functools.cache
def predictions(name):
    """[200, chunk, 2] predicted from one and the same feature, after learning from both ways in equal parts."""
    torch.manual_seed(0)
    head = HEADS[name]().build(in_dim=3, action_dim=2, chunk=CHUNK)
    features = torch.ones(64, 3)
    side = torch.tensor([-0.8, 0.8]).repeat(32)[:, None]
    actions = torch.stack([side.expand(-1, CHUNK), torch.full((64, CHUNK), 0.3)], -1)
    head.fit(actions)
    steps = 500 if name in ("diffusion", "flow") else 250
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(features, actions + 0.02 * torch.randn_like(actions)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return head.predict(torch.ones(200, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mixture", "vqbet", "diffusion", "flow"])
def test_both_modes_are_found(name):
    side = predictions(name)[..., 0]  # [200, chunk]
    near = (side.abs() - 0.8).abs() < 0.25
    assert near.float().mean() > 0.9
    assert 0.2 < (side[:, 0] > 0).float().mean() < 0.8
    assert ((side > 0).all(1) | (side < 0).all(1)).float().mean() > 0.95
    assert (predictions(name)[..., 1] - 0.3).abs().mean() < 0.15


@pytest.mark.parametrize("name", ["l2", "gaussian"])
def test_one_answer_averages_them(name):
    side = predictions(name)[..., 0]
    assert side.abs().max() < 0.3


def test_l1_cannot_tell_either():
    """The median of two equal crowds is anything between them; it is one answer, whatever it is."""
    torch.manual_seed(0)
    head = heads.RegressionHead().build(in_dim=3, action_dim=1, chunk=CHUNK)
    answer = head.predict(torch.ones(9, 3))
    assert torch.equal(answer, answer[:1].expand_as(answer))
    both = torch.tensor([[[-0.8]], [[0.8]]]).expand(2, CHUNK, 1)
    at = [float((torch.full_like(both, x) - both).abs().mean()) for x in (-0.8, -0.3, 0.0, 0.5, 0.8)]
    assert max(at) - min(at) < 1e-6  # the loss is flat between the modes
