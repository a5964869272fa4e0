"""Masked attention against its definition, and the perceiver layer against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmpeft.connectors import PerceiverResampler
from mmpeft.connectors.attention import attend, join_masks


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~(mask[:, None] if mask.dim() == 2 else mask), float("-inf"))
        out.append(scores.softmax(-1).nan_to_num(0.0) @ vh)  # nothing to attend: zeros
    return torch.cat(out, dim=-1)


@pytest.mark.parametrize("shape", [None, (3, 9), (3, 5, 9)])
def test_equal_to_the_definition(shape: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 12), torch.randn(3, 9, 12), torch.randn(3, 9, 12)
    mask = None if shape is None else torch.rand(shape) > 0.4
    if mask is not None:
        mask[1] = False  # a sample that may attend to nothing
    torch.testing.assert_close(attend(q, k, v, heads=3, mask=mask), naive(q, k, v, 3, mask))


def test_join_masks() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    assert join_masks((a, None), (b, None)) is None
    mask = torch.tensor([[True, False], [False, True]])
    assert join_masks((a, None), (b, mask)).tolist() == [[True] * 3 + [True, False], [True] * 3 + [False, True]]


def test_perceiver_equals_its_formula_and_forgets_order() -> None:
    torch.manual_seed(1)
    connector = PerceiverResampler(in_dim=6, out_dim=5, num_latents=4, depth=2, heads=3, head_dim=2).eval()
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    media = torch.randn(2, 7, 6)
    x = connector.latents.expand(2, -1, -1)
    for layer in connector.layers:
        m, y = layer.norm_media(media), layer.norm_latents(x)
        both, attention = torch.cat([m, y], dim=1), layer.attention
        key, value = (both @ attention.to_kv.weight.T).split(6, dim=-1)
        x = x + naive(y @ attention.to_q.weight.T, key, value, 3, None) @ attention.to_out.weight.T
        norm, up, _, down = layer.ffn
        x = x + F.gelu(norm(x) @ up.weight.T) @ down.weight.T
    expected = connector.project(connector.norm(x))
    torch.testing.assert_close(connector(media)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(connector(media[:, torch.randperm(7)])[0], expected, atol=1e-5, rtol=1e-5)
