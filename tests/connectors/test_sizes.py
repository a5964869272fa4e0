"""Published sizes hold exactly; counted on the meta device."""

from __future__ import annotations

import torch

from mmpeft import connectors


def count(connector: torch.nn.Module, *prefixes: str) -> int:
    return sum(p.numel() for n, p in connector.named_parameters() if n.startswith(prefixes or ("",)))


def test_published_sizes() -> None:
    with torch.device("meta"):
        llava_7b = connectors.MLP(in_dim=1024, out_dim=4096)
        llava_13b = connectors.MLP(in_dim=1024, out_dim=5120)
        llava_1 = connectors.Linear(in_dim=1024, out_dim=4096)
        nano = connectors.PixelShuffleMLP(
            in_dim=768, out_dim=960, factor=4, depth=1, bias=False, init_std=0.02, input_norm=False
        )
        blip2 = connectors.QFormer(in_dim=1408, out_dim=2560)
        instruct = connectors.QFormer(in_dim=1408, out_dim=4096, text_vocab=30523)
        slam = connectors.ConcatLinear(in_dim=1024, out_dim=4096)
        flamingo = connectors.GatedCrossAttention(num_layers=24, dim=2048, media_dim=1024)
        resampler = connectors.PerceiverResampler(in_dim=1024, out_dim=2048)
        adapter = connectors.ModalityAdapter(connector=connectors.Linear(), in_dim=768, out_dim=4096, bottleneck_dim=64)
    assert count(llava_7b) == 20_979_712  # 20.98 M
    assert round(count(llava_13b) / 1e6, 1) == 31.5
    assert round(count(llava_1) / 1e6, 1) == 4.2
    assert count(nano) == 11_796_480  # 11.8 M
    assert count(blip2, "core", "queries") == 105_162_240  # 105.2 M: the trimmed Q-Former with its queries
    assert round(count(instruct, "core", "queries") / 1e6) == 186  # with the text branch
    assert count(slam) == 18_880_512  # 18.88 M
    assert round(count(flamingo) / 1e9, 2) == 0.88
    d, m = 4096, 64
    assert count(adapter, "down", "up") == 2 * d * m + m + d
    d, inner = 1024, 512  # Flamingo's resampler: two norms, attention, norm, feed-forward, a layer
    layer = 4 * d + 4 * d * inner + 2 * d + 8 * d * d
    assert count(resampler, "latents", "layers", "norm") == 64 * d + 6 * layer + 2 * d


def test_qformer_has_the_tensors_of_transformers() -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    with torch.device("meta"):
        theirs = Blip2QFormerModel(Blip2QFormerConfig())
        ours = connectors.QFormer(in_dim=1408, out_dim=2560)
    assert sorted(p.shape for p in theirs.parameters()) == sorted(p.shape for p in ours.core.parameters())
