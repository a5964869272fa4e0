"""Bottlenecks after a connector: identity at first, own parameters per modality, frames of a video."""

from __future__ import annotations

import pytest
import torch

from mmpeft.connectors import MLP, ModalityAdapter, PixelShuffleMLP, QFormer
from mmpeft.errors import ConfigError


def test_begins_as_its_connector_and_learns() -> None:
    connector = MLP(in_dim=6, out_dim=8)
    adapter = ModalityAdapter(connector=connector, bottleneck_dim=3)
    assert adapter.built and (adapter.in_dim, adapter.out_dim) == (6, 8)
    x = torch.randn(2, 5, 6)
    assert torch.equal(adapter(x)[0], connector(x)[0])
    adapter(x)[0].square().sum().backward()
    assert (adapter.up.weight.grad != 0).any()


def test_image_and_video_share_a_connector_and_nothing_else() -> None:
    """Training one modality's bottleneck leaves the other's output as it was."""
    shared = QFormer(in_dim=6, out_dim=8, num_queries=3, width=8, depth=2, heads=2, hidden_dim=8).eval()
    image = ModalityAdapter(connector=shared, bottleneck_dim=3)
    video = ModalityAdapter(connector=shared, bottleneck_dim=3, num_frames=4)
    assert image.connector is video.connector
    x, clip = torch.randn(2, 5, 6), torch.randn(2, 20, 6)
    before = image(x)[0]
    with torch.no_grad():
        for module in (video.up, video.down):
            module.weight.normal_()
        video.frame_embedding.normal_()
    assert torch.equal(image(x)[0], before)
    out, _ = video(clip)
    assert out.shape == (2, video.num_tokens(20), 8) and video.num_tokens(20) == 12


def test_frames_go_through_the_connector_one_by_one() -> None:
    inner = PixelShuffleMLP(in_dim=6, out_dim=8)
    video = ModalityAdapter(connector=inner, bottleneck_dim=3, num_frames=3).eval()
    with torch.no_grad():
        video.up.weight.normal_()
        video.frame_embedding.normal_()
    clip = torch.randn(2, 3 * 16, 6)
    mask = torch.ones(2, 48, dtype=torch.bool)
    mask[1, 32:] = False  # the second clip has two frames
    out, valid = video(clip, mask)
    assert valid[0].all() and valid[1].tolist() == [True] * 8 + [False] * 4
    for f in range(3):
        y = inner(clip[:, 16 * f : 16 * (f + 1)])[0] + video.frame_embedding[f]
        y = y + video.up(torch.nn.functional.gelu(video.down(y)))
        torch.testing.assert_close(out[0, 4 * f : 4 * (f + 1)], y[0])
    with pytest.raises(ConfigError, match=r"47 tokens are not 3 equal frames \(nearest: 48\)"):
        video.num_tokens(47)


def test_widths_come_late_or_must_agree() -> None:
    adapter = ModalityAdapter(connector=MLP())
    assert not adapter.built
    adapter.build(6, 8)
    assert adapter.connector.built
    with pytest.raises(ConfigError, match="in_dim=6 and cannot be built with in_dim=7"):
        ModalityAdapter(connector=MLP(in_dim=6, out_dim=8), in_dim=7)
