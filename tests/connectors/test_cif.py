"""Continuous integrate-and-fire in closed form against the sequential definition, and the C-Former on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmpeft.connectors import CFormer
from mmpeft.connectors.cif import fire, integrate, overlap, quantity_loss, scale_weights
from mmpeft.errors import ConfigError


def by_loop(frames: Tensor, weights: Tensor) -> list[Tensor]:
    """One clip [T, D], [T], frame by frame: fill the open token up to 1, fire, go on with the rest of the frame."""
    tokens, open_token, room = [], torch.zeros_like(frames[0]), 1.0
    for frame, weight in zip(frames, weights.tolist(), strict=True):
        while weight >= room:
            tokens.append(open_token + room * frame)
            weight -= room
            open_token, room = torch.zeros_like(frame), 1.0
        open_token = open_token + weight * frame
        room -= weight
    if 1.0 - room > 0.5:
        tokens.append(open_token / (1.0 - room))
    return tokens


@pytest.mark.parametrize("largest", [0.4, 1.0, 3.7])
def test_fire_equals_the_loop(largest: float) -> None:
    """Several firings inside one frame (weights up to 3.7) included."""
    torch.manual_seed(0)
    frames, weights = torch.randn(4, 50, 6, dtype=torch.float64), largest * torch.rand(4, 50, dtype=torch.float64)
    weights[2, 20:] = 0.0
    tokens, mask = fire(frames, weights)
    for i in range(4):
        expected = by_loop(frames[i], weights[i])
        assert int(mask[i].sum()) == len(expected)
        torch.testing.assert_close(tokens[i, : len(expected)], torch.stack(expected), atol=1e-10, rtol=0)
        assert (tokens[i, len(expected) :] == 0).all()


def test_fire_boundaries_on_a_toy_sequence() -> None:
    weights = torch.tensor([[0.5, 0.75, 0.25, 2.0, 0.25, 0.5]])  # 1 after .5+.5, 2 within frame 3, 3, then .25 + .5
    frames = torch.eye(6).unsqueeze(0)
    tokens, mask = fire(frames, weights)
    assert mask.sum() == 4
    expected = torch.tensor([
        [0.5, 0.5, 0, 0, 0, 0], [0, 0.25, 0.25, 0.5, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.25, 0.25],
    ])  # fmt: skip
    torch.testing.assert_close(tokens[0], expected)


def test_tail_fires_alike_alone_and_in_a_batch() -> None:
    """A clip as long as the batch and the same clip padded by 3 frames give the same tokens."""
    torch.manual_seed(1)
    frames, weights = torch.randn(1, 10, 4), torch.full((1, 10), 0.28)  # sums to 2.8: a tail of .8
    alone, mask = fire(frames, weights)
    assert mask.sum() == 3
    padded, padded_mask = fire(torch.cat([frames, torch.randn(1, 3, 4)], 1), torch.cat([weights, torch.zeros(1, 3)], 1))
    assert torch.equal(mask, padded_mask)
    torch.testing.assert_close(alone, padded)


def test_scaled_weights_give_the_target_length_and_conserve_mass() -> None:
    torch.manual_seed(2)
    weights = torch.rand(3, 40)
    weights[1, 25:] = 0.0
    lengths = torch.tensor([7, 3, 1])
    scaled = scale_weights(weights, lengths)
    torch.testing.assert_close(scaled.sum(1), lengths.float())
    matrix = overlap(scaled, 7)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(matrix[i, :n].sum(-1), torch.ones(n), atol=1e-5, rtol=0)
        assert matrix[i, n:].abs().max() < 1e-5 if n < 7 else True
    torch.testing.assert_close(matrix.sum(1), scaled, atol=1e-5, rtol=0)
    assert scale_weights(torch.zeros(1, 4), torch.tensor([2])).eq(0).all()
    assert quantity_loss(weights, weights.sum(1) + 2.0).item() == pytest.approx(2.0, abs=1e-5)


def test_gradient_of_the_closed_form() -> None:
    torch.manual_seed(3)
    frames = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weights = (1.7 * torch.rand(2, 9, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, w: integrate(f, w, 6), (frames, weights))


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        fire(torch.randn(1, 3, 2), torch.tensor([[0.5, -0.1, 0.9]]))


def test_cformer_lets_long_weights_take_more_tokens() -> None:
    """Frames whose predicted weight is high own more output tokens than frames whose weight is near zero."""
    torch.manual_seed(4)
    connector = CFormer(in_dim=4, out_dim=5, frames_per_token=5, width=8, depth=1, heads=2, hidden_dim=8).eval()
    with torch.no_grad():
        connector.weight_conv.weight.zero_()
        connector.weight_conv.weight[0, 0, 1] = 1.0
        connector.weight_conv.bias.zero_()
        connector.weight_linear.weight.zero_()
        connector.weight_linear.weight[0, 0] = 1.0
        connector.weight_linear.bias.zero_()
    x = torch.zeros(1, 20, 4)
    x[:, :10, 0], x[:, 10:, 0] = 6.0, -6.0  # loud, then silent
    weights = connector.weigh(x)
    matrix = overlap(scale_weights(weights, torch.tensor([4])), 4)
    assert (matrix[0, :, :10].sum(-1) > 0.9).sum() == 4
    assert connector.num_tokens(20) == 4 and connector(x)[0].shape == (1, 4, 5)


def test_cformer_quantity_loss_trains_the_weights() -> None:
    torch.manual_seed(5)
    connector = CFormer(in_dim=4, out_dim=5, width=8, depth=1, heads=2, hidden_dim=8, dropout=0.0)
    x, mask = torch.randn(3, 12, 4), torch.arange(12) < torch.tensor([12, 8, 5])[:, None]
    target = torch.tensor([3, 2, 1])
    optimizer = torch.optim.Adam(connector.parameters(), lr=0.05)
    first = quantity_loss(connector.weigh(x, mask), target).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = quantity_loss(connector.weigh(x, mask), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    _, fired = fire(x, connector.weigh(x, mask))
    assert fired.sum(1).tolist() == [3, 2, 1]
