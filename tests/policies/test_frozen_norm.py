"""Frozen batch norms: the same map and gradient as torch's, the same class, tensors and training mode."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.policies.frozen_norm import FrozenBatchNorm2d, speed_up


def network(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight, 1, 0.2)
            nn.init.normal_(m.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_same_map_gradient_and_training_mode(name):
    slow = network(name)
    fast = copy.deepcopy(slow)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in slow.modules())
    assert speed_up(fast) == norms and speed_up(fast) == 0
    assert all(isinstance(f, type(s)) for f, s in zip(fast.modules(), slow.modules(), strict=True))
    assert list(fast.state_dict()) == list(slow.state_dict())
    found = []
    for model in (slow, fast):
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    torch.manual_seed(1)
    a = slow.train()(torch.randn(4, 3, 64, 64))
    torch.manual_seed(1)
    b = fast.train()(torch.randn(4, 3, 64, 64))
    assert torch.equal(a, b)  # statistics of the batch, by torch's own code
    assert all(torch.equal(slow.state_dict()[k], v) for k, v in fast.state_dict().items())


def test_copies_pickles_and_adapts():
    model = network("tf_efficientnet_lite0")
    speed_up(model)
    x = torch.randn(2, 3, 64, 64)
    base = model(x)
    assert torch.equal(copy.deepcopy(model)(x), base) and torch.equal(pickle.loads(pickle.dumps(model))(x), base)
    mmpeft.attach(model, {"blocks.3.**.bn1": mmpeft.BitFit()}, example=x)
    assert torch.equal(model(x), base)
    with torch.no_grad():
        for _, p in mmpeft.adapters.switch.adapter_parameters(model):
            p.add_(0.5)
    assert not torch.allclose(model(x), base)
    with mmpeft.use(model, None):
        assert torch.equal(model(x), base)


def test_without_weights_and_odd_shapes():
    norm, plain = FrozenBatchNorm2d(3, affine=False).eval(), nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x := torch.randn(2, 3, 5, 4)), plain(x))
    untracked = FrozenBatchNorm2d(3, track_running_stats=False).eval()
    torch.testing.assert_close(untracked(x), nn.BatchNorm2d(3, track_running_stats=False).eval()(x))
