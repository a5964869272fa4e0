"""Frame stacking against explicit loops and formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmpeft.connectors import ConcatLinear, Conv1dLinear, StackSwiGLU
from mmpeft.connectors.concat import stack_frames
from mmpeft.errors import ConfigError


@pytest.mark.parametrize(("t", "k"), [(12, 4), (13, 4), (3, 5), (7, 1)])
def test_stack_is_the_loop_with_zeros_at_the_end(t: int, k: int) -> None:
    x = torch.randn(2, t, 3)
    padded = torch.cat([x, torch.zeros(2, -t % k, 3)], dim=1)
    expected = [torch.cat([padded[:, j + i] for i in range(k)], dim=-1) for j in range(0, padded.shape[1], k)]
    assert torch.equal(stack_frames(x, k), torch.stack(expected, dim=1))


def test_conv1d_is_one_kernel_a_stack() -> None:
    connector = Conv1dLinear(in_dim=3, out_dim=4, stack=4, hidden_dim=5)
    x = torch.randn(2, 9, 3)
    frames = F.pad(x, (0, 0, 0, 3)).unflatten(1, (3, 4))  # [B, 3, 4, 3]
    hidden = torch.einsum("bqki,oik->bqo", frames, connector.conv.weight) + connector.conv.bias
    expected = connector.layers[2](F.relu(connector.layers[0](F.relu(hidden))))
    torch.testing.assert_close(connector(x)[0], expected)


def test_swiglu_formula() -> None:
    """The second half gates the first by silu; norms start at .4; the output does not see the input's scale."""
    connector = StackSwiGLU(in_dim=3, out_dim=4, stack=2, hidden_dim=6)
    assert (connector.norm_in.weight == 0.4).all() and (connector.norm_mid.weight == 0.4).all()
    x = torch.randn(2, 6, 3)
    stacked = x.reshape(2, 3, 6)

    def rms(v: torch.Tensor) -> torch.Tensor:
        return 0.4 * v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    hidden = rms(stacked) @ connector.up.weight.T
    expected = rms(F.silu(hidden[..., 3:]) * hidden[..., :3]) @ connector.down.weight.T
    torch.testing.assert_close(connector(x)[0], expected)
    torch.testing.assert_close(connector(100 * x)[0], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="even, given 7"):
        StackSwiGLU(hidden_dim=7)


def test_whisper_clip_lengths() -> None:
    """30 s of Whisper frames (1500): 300 tokens at SLAM-ASR's stack of 5, 188 at Ultravox' 8."""
    assert ConcatLinear().num_tokens(1500) == 300
    assert StackSwiGLU().num_tokens(1500) == 188
