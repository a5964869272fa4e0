"""The segmented sum of integrate-and-fire equals the overlap matrix, in value and gradient, and is linear in memory."""

import pytest
import torch

from mmpeft.connectors.cif import overlap
from mmpeft.kernels import segmented


@pytest.mark.parametrize("largest", [0.3, 1.0, 2.5, 7.0])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_equals_the_overlap_matrix(largest, tokens, device):
    torch.manual_seed(0)
    frames = torch.randn(3, 23, 4, dtype=torch.float64).to(device).requires_grad_()
    weights = (largest * torch.rand(3, 23, dtype=torch.float64)).to(device).requires_grad_()
    with torch.no_grad():
        weights[1, 9:] = 0.0
        weights[2, :4] = 0.0
    direction = torch.randn(3, tokens, 4, dtype=torch.float64).to(device)
    found = []
    for y in (segmented.integrate(frames, weights, tokens), overlap(weights, tokens) @ frames):
        found.append((y, *torch.autograd.grad((y * direction).sum(), [frames, weights])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-12)
    alive = weights > 0  # where a weight is 0 the overlap has a kink
    torch.testing.assert_close(found[0][2][alive], found[1][2][alive], rtol=1e-9, atol=1e-10)


def test_whole_numbers(device):
    """Boundaries that fall on frames: ones, a two, zeros."""
    weights = torch.tensor([[1.0, 1.0, 0.0, 2.0, 0.5, 0.5]], device=device)
    frames = torch.eye(6, device=device).unsqueeze(0)
    want = overlap(weights, 5) @ frames
    torch.testing.assert_close(segmented.integrate(frames, weights, 5), want)


def test_half_precision_sums_are_wide(device):
    torch.manual_seed(0)
    frames, weights = torch.randn(2, 400, 8).to(device).bfloat16(), torch.rand(2, 400).to(device) * 0.4
    got = segmented.integrate(frames, weights, 70)
    want = overlap(weights.double(), 70) @ frames.double()
    assert got.dtype == torch.float32 and (got - want).norm() < 1e-4 * want.norm()


def test_no_matrix_of_frames_by_tokens(device):
    """50,000 frames and 20,000 tokens: the matrix would have 10^9 entries."""
    frames, weights = torch.ones(1, 50_000, 2, device=device), torch.full((1, 50_000), 0.4, device=device)
    y = segmented.integrate(frames, weights, 20_000)
    assert abs(float(y[0, :19_000].mean()) - 1) < 1e-3


def test_no_frames():
    assert not segmented.integrate(torch.zeros(2, 0, 3), torch.zeros(2, 0), 4).any()
