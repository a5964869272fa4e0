"""Normalisation: exact round trips, where the statistics put the data, padding, files, refusals."""

import json

import pytest
import torch

from mmpeft.errors import BadSample, ConfigError, FileFormatError
from mmpeft.policies.normalise import KINDS, Normaliser, Statistics


def data(n=501):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0, 2.0, 1.0]) + 7.0
    x[:, 3] = 0.25  # never moves
    x[:, 4] = torch.where(x[:, 4] > 7, 1.0, -1.0)  # a gripper
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [5, 8])
def test_round_trip(kind, width):
    x = data()
    normaliser = Normaliser(Statistics.of(x), kind, keep=[4], width=width)
    z = normaliser.encode(x)
    assert z.dtype == torch.float64 and z.shape == (501, width)
    back = normaliser.decode(z)
    assert ((back - x).abs() <= 2 * torch.finfo(torch.float64).eps * x.abs().clamp_min(50)).all()
    assert torch.equal(back[:, 4], x[:, 4]) and torch.equal(z[:, 4], x[:, 4])  # kept: not one bit
    single = x.float()
    again = normaliser.decode(normaliser.encode(single))
    spread = normaliser.scale + normaliser.offset.abs()
    assert ((again - single).abs() <= 2 * torch.finfo(torch.float32).eps * spread).all()


def test_where_the_data_goes():
    x = data()
    s = Statistics.of(x)
    z = Normaliser(s, "mean_std").encode(x)
    assert z.mean(0).abs().max() < 1e-9
    torch.testing.assert_close(z[:, :3].std(0, correction=0), torch.ones(3, dtype=z.dtype))
    z = Normaliser(s, "min_max").encode(x)
    torch.testing.assert_close(z[:, :3].amax(0), torch.ones(3, dtype=z.dtype))
    torch.testing.assert_close(z[:, :3].amin(0), -torch.ones(3, dtype=z.dtype))
    z = Normaliser(s, "quantile").encode(x)
    assert ((z[:, :3].abs() <= 1).double().mean(0) > 0.975).all() and (z[:, :3].abs() > 1).any()  # never clipped
    assert torch.isfinite(z).all() and z[:, 3].abs().max() == 0


def test_padding():
    normaliser = Normaliser(Statistics.of(data()), width=8)
    assert normaliser.valid.tolist() == [True] * 5 + [False] * 3
    z = normaliser.encode(data().float())
    assert z[:, 5:].abs().max() == 0
    z[:, 5:] = 9.0  # whatever a head says there
    assert normaliser.decode(z).shape == (501, 5)
    with pytest.raises(ConfigError, match="do not fit a policy of 3"):
        Normaliser(Statistics.of(data()), width=3)


def test_file_is_exact():
    first = Normaliser(Statistics.of(data()), "quantile", keep=[4], width=6)
    second = Normaliser.from_dict(json.loads(json.dumps(first.to_dict())))
    assert second.statistics == first.statistics
    assert torch.equal(second.encode(data()), first.encode(data()))


@pytest.mark.parametrize("key", ["kind", "keep", "width", "statistics", "statistics.q99", "statistics.count"])
def test_a_missing_key_is_an_error(key):
    saved = Normaliser(Statistics.of(data())).to_dict()
    *path, leaf = key.split(".")
    del (saved[path[0]] if path else saved)[leaf]
    with pytest.raises(FileFormatError, match=key.replace(".", r"\.")):
        Normaliser.from_dict(saved)


def test_refusals():
    x = data()
    x[3, 1] = float("nan")
    with pytest.raises(BadSample, match="row 3, dimension 1"):
        Statistics.of(x)
    with pytest.raises(ConfigError, match="min_max"):
        Normaliser(Statistics.of(data()), "minmax")
    with pytest.raises(ConfigError, match="keep"):
        Normaliser(Statistics.of(data()), keep=[5])
    with pytest.raises(ConfigError, match="5 dimensions"):
        Normaliser(Statistics.of(data())).encode(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match=r"\[N, D\]"):
        Statistics.of(torch.zeros(4))
