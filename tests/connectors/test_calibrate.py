"""Fitting a connector to both ends before training: the features' scale and the LLM's embeddings."""

from __future__ import annotations

import copy

import pytest
import torch

from mmpeft import connectors
from mmpeft.connectors import Connector
from mmpeft.errors import ConfigError

IN, OUT = 12, 10

STARTS_WITH_A_LINEAR = {
    "linear": lambda: connectors.Linear(),
    "mlp": lambda: connectors.MLP(depth=3, hidden_dim=9),
    "pixel-shuffle": lambda: connectors.PixelShuffleMLP(factor=3, input_norm=False),
    "concat": lambda: connectors.ConcatLinear(stack=5, hidden_dim=9),
    "modality-adapter": lambda: connectors.ModalityAdapter(connector=connectors.ConcatLinear(stack=5, hidden_dim=9)),
}


@pytest.mark.parametrize("name", STARTS_WITH_A_LINEAR)
def test_calibrate_is_standardisation(name: str) -> None:
    """calibrate(x) then f(x) is f(standardised x): exact on the very features, padding left out of the statistics."""
    torch.manual_seed(0)
    connector: Connector = STARTS_WITH_A_LINEAR[name]().build(IN, OUT)
    t = 9 if name == "pixel-shuffle" else 10
    x = 3.0 + 40.0 * torch.randn(6, t, IN) * torch.linspace(0.5, 2.0, IN)
    mask = torch.arange(t) < torch.tensor([[t]] * 5 + [[t // 2]])
    valid = x[mask]
    standard = (x - valid.mean(0)) / valid.std(0)
    full = torch.ones(6, t, dtype=torch.bool)
    expected, _ = connector(standard, full)
    calibrated = copy.deepcopy(connector).calibrate(x.masked_fill(~mask.unsqueeze(-1), 1e6), mask)
    assert set(calibrated.state_dict()) == set(connector.state_dict())  # no buffers
    torch.testing.assert_close(calibrated(x, full)[0], expected, atol=2e-4, rtol=1e-4)


SMALL = {"width": 12, "depth": 3, "heads": 2, "hidden_dim": 16}
STARTS_WITH_A_NORM = {
    "pixel-shuffle": lambda: connectors.PixelShuffleMLP(factor=3),
    "qformer": lambda: connectors.QFormer(num_queries=4, **SMALL, dropout=0.0),
    "perceiver": lambda: connectors.PerceiverResampler(num_latents=3, depth=2, heads=2, head_dim=4),
    "frames": lambda: connectors.ModalityAdapter(connector=connectors.PixelShuffleMLP(factor=3), num_frames=2),
}


@pytest.mark.parametrize("name", STARTS_WITH_A_NORM)
def test_behind_a_norm_calibrate_standardises_what_the_norm_gives(name: str) -> None:
    """Each reader's output channels have mean 0 and deviation 1 over the valid tokens of the very sample, whatever
    gain and bias it had (those act after the standardisation); padding is left out of the statistics."""
    torch.manual_seed(0)
    connector: Connector = STARTS_WITH_A_NORM[name]().build(IN, OUT)
    t = 18 if name == "frames" else 9
    x = 3.0 + 40.0 * torch.randn(8, t, IN) * torch.linspace(0.5, 2.0, IN)
    x[..., 2] += 300.0  # LayerNorm leaves a channel like this one nearly constant
    mask = torch.ones(8, t, dtype=torch.bool)
    mask[5] = False
    readers = connector.channel_readers()
    gains = [(torch.rand_like(r.weight) + 0.5, torch.randn_like(r.bias)) for r in readers]
    with torch.no_grad():
        for reader, (gain, bias) in zip(readers, gains, strict=True):
            reader.weight.copy_(gain), reader.bias.copy_(bias)
    connector.calibrate(x.masked_fill(~mask.unsqueeze(-1), 1e6), mask)
    seen: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, o: seen.append(o)) for r in readers]
    connector(x[mask.any(1)])
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(readers) == (2 if name == "perceiver" else 1)
    for out, (gain, bias) in zip(seen, gains, strict=True):
        z = ((out - bias) / gain).flatten(0, 1)
        torch.testing.assert_close(z.mean(0), torch.zeros(z.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std(0), torch.ones(z.shape[1]), atol=1e-3, rtol=0)
    assert connector(x, mask)[0].isfinite().all()


def test_a_qformer_without_its_norm_standardises_its_keys_and_values() -> None:
    torch.manual_seed(0)
    connector = connectors.QFormer(in_dim=IN, out_dim=OUT, num_queries=4, **SMALL, dropout=0.0, input_norm=False)
    x = 3.0 + 40.0 * torch.randn(6, 10, IN) * torch.linspace(0.5, 2.0, IN)
    standard = (x - x.flatten(0, 1).mean(0)) / x.flatten(0, 1).std(0)
    expected, _ = connector(standard)
    torch.testing.assert_close(copy.deepcopy(connector).calibrate(x)(x)[0], expected, atol=2e-4, rtol=1e-4)


def test_published_weights_are_not_calibrated() -> None:
    connector = connectors.QFormer(in_dim=IN, out_dim=OUT, num_queries=4, **SMALL)
    connector.pretrained = "blip2"
    with pytest.raises(ConfigError, match="leave calibrate or pretrained out"):
        connector.calibrate(torch.randn(6, 10, IN))


def test_calibrate_bounds_dead_channels_and_refuses_what_it_cannot_do() -> None:
    x = torch.randn(20, 4, IN)
    x[..., 3] = 1.0
    mlp = connectors.MLP(in_dim=IN, out_dim=OUT).calibrate(x)
    assert mlp.layers[0].weight.abs().max() < 200
    assert mlp(x)[0].isfinite().all()
    for name in ("cformer", "c-abstractor", "stack-swiglu", "conv1d"):
        options = {"width": 12, "heads": 2, "depth": 1, "hidden_dim": 12} if name == "cformer" else {}
        with pytest.raises(ConfigError, match="neither a Linear nor a LayerNorm.*calibrate: false"):
            connectors.build_connector(name, in_dim=IN, out_dim=OUT, **options).calibrate(x)
    with pytest.raises(ConfigError, match="needs them as"):
        connectors.PixelShuffleMLP(in_dim=IN, out_dim=OUT).calibrate(x.flatten(0, 1))
    with pytest.raises(ConfigError, match="bias=True"):
        connectors.Linear(in_dim=IN, out_dim=OUT, bias=False).calibrate(x)
    with pytest.raises(ConfigError, match="no parameters"):
        connectors.MLP().calibrate(x)
    with pytest.raises(ConfigError, match="finite"):
        connectors.Linear(in_dim=IN, out_dim=OUT).calibrate(x * float("nan"))
    with pytest.raises(ConfigError, match=rf"{IN}\], given"):
        connectors.Linear(in_dim=IN, out_dim=OUT).calibrate(x[..., 1:])


def test_calibrate_after_an_adapter_is_refused() -> None:
    """Where something else stands in for the module's own weight, changing that weight would silently do nothing."""

    class Shown(torch.nn.Linear):
        weight = property(lambda self: self._parameters["weight"] + 1)

    connector = connectors.Linear(in_dim=IN, out_dim=OUT)
    connector.linear.__class__ = Shown
    with pytest.raises(ConfigError, match="before an adapter"):
        connector.calibrate(torch.randn(8, IN))


def test_output_norm_starts_at_the_embeddings_scale() -> None:
    connector = connectors.MLP(in_dim=IN, out_dim=64, output_norm=True)
    connector.set_output_std(0.136)
    assert connector.scales_output
    assert connector(torch.randn(16, 9, IN))[0].std().item() == pytest.approx(0.136, rel=0.02)
    wrapped = connectors.ModalityAdapter(connector=connectors.MLP(output_norm=True), in_dim=IN, out_dim=64)
    wrapped.set_output_std(0.136)
    assert wrapped.scales_output
    assert wrapped(torch.randn(16, 9, IN))[0].std().item() == pytest.approx(0.136, rel=0.02)
    plain = connectors.MLP(in_dim=IN, out_dim=64)
    assert not plain.scales_output
    with pytest.raises(ConfigError, match="output_norm=True"):
        plain.set_output_std(0.1)
    with pytest.raises(ConfigError, match="positive"):
        connector.set_output_std(0.0)
