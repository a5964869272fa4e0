"""Actions as tokens: what a round trip may lose, byte pairs, constrained decoding, malformed sequences."""

import json

import pytest
import torch

from mmpeft.errors import BadSample, ConfigError, FileFormatError
from mmpeft.policies import heads
from mmpeft.policies.heads.fast_tokeniser import FASTTokeniser, dct_matrix, learn_merges
from mmpeft.policies.heads.tokens import from_bins, to_bins
from mmpeft.policies.heads.vqbet import k_means, residual_codes


@pytest.mark.parametrize("bins", [2, 7, 256])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 3.0)])
def test_bins_lose_half_a_bin_at_most(bins, low, high):
    x = torch.linspace(low, high, 1001, dtype=torch.float64)
    error = (from_bins(to_bins(x, bins, low, high), bins, low, high).double() - x).abs()
    half = (high - low) / bins / 2
    assert error.max() <= half + 1e-6 and error.max() > 0.9 * half
    index = torch.arange(bins)
    assert torch.equal(to_bins(from_bins(index, bins, low, high), bins, low, high), index)
    assert to_bins(torch.tensor([low - 9.0, high + 9.0]), bins, low, high).tolist() == [0, bins - 1]


def test_binned_head_knows_no_other_token():
    head = heads.BinnedHead(bins=16).build(in_dim=4, action_dim=3, chunk=5)
    assert head.logits(torch.randn(2, 1, 4)).shape == (2, 5, 3, 16)
    with pytest.raises(BadSample, match=r"0 \.\. 15"):
        head.decode(torch.tensor([3, 16]))


def chunks(n=300, c=8, a=3):
    g = torch.Generator().manual_seed(0)
    phase = torch.rand(n, 1, a, generator=g) * 6
    return torch.sin(phase + torch.arange(c)[None, :, None] * 0.3) * 0.9


def test_dct_is_orthonormal_and_compacts():
    for size in (1, 2, 7, 8):
        m = dct_matrix(size)
        torch.testing.assert_close(m @ m.T, torch.eye(size, dtype=m.dtype))
    flat = dct_matrix(7) @ torch.ones(7, dtype=torch.float64)
    assert flat[0] == pytest.approx(7**0.5) and flat[1:].abs().max() < 1e-12


@pytest.mark.parametrize(("c", "a", "scale"), [(8, 3, 10.0), (5, 1, 3.0), (16, 2, 40.0)])
def test_fast_loses_half_a_level_of_each_coefficient(c, a, scale):
    x = chunks(100, c, a)
    tokeniser = FASTTokeniser.fit(x, scale=scale, vocabulary=1024)
    back = torch.stack([tokeniser.decode(t) for t in tokeniser.encode(x)])
    error = torch.einsum("ft,nta->nfa", dct_matrix(c), (back - x).double())
    assert error.abs().max() <= 0.5 / scale + 1e-6
    again = tokeniser.encode(back)
    assert again == tokeniser.encode(x)  # what was decoded encodes to itself


def test_merges_shorten_and_count():
    x = chunks()
    tokeniser = FASTTokeniser.fit(x, vocabulary=256)
    assert tokeniser.size <= 256
    lengths = [len(t) for t in tokeniser.encode(x)]
    assert sum(lengths) / len(lengths) < 0.6 * tokeniser.length
    assert FASTTokeniser.from_dict(json.loads(json.dumps(tokeniser.to_dict()))) == tokeniser
    assert learn_merges([[0, 1, 0, 1, 2], [0, 1, 2]], 3, 2) == ((0, 1), (3, 2))
    assert learn_merges([[0, 1, 2]], 3, 5) == ()  # nothing repeats


def test_a_malformed_sequence_is_an_error_never_zeros():
    tokeniser = FASTTokeniser.fit(chunks(), vocabulary=256)
    good = tokeniser.encode(chunks(1))[0]
    for bad, message in [
        (good[:-1], "coefficients"), (good + good[:1], "coefficients"), ([], "0 FAST tokens"),
        ([tokeniser.size, *good[1:]], "none of the"), ([-1], "none of the"),
    ]:  # fmt: skip
        with pytest.raises(BadSample, match=message):
            tokeniser.decode(bad)
    with pytest.raises(ConfigError, match="vocabulary"):
        FASTTokeniser.fit(chunks(), scale=100.0, vocabulary=16)
    with pytest.raises(FileFormatError, match="low, merges"):
        FASTTokeniser.from_dict({k: v for k, v in tokeniser.to_dict().items() if k not in ("low", "merges")})
    with pytest.raises(FileFormatError, match="not made yet"):
        FASTTokeniser(4, 1, 10.0, 0, 3, ((0, 9),))


def test_constrained_decoding_fills_every_chunk_from_any_weights():
    """An untrained head, which would almost never write a well-formed sequence by chance."""
    for seed in range(3):
        torch.manual_seed(seed)
        head = heads.FASTHead(vocabulary=128, width=16, depth=1, heads=2).build(in_dim=4, action_dim=3, chunk=8)
        head.fit(chunks())
        with torch.no_grad():
            out = head.predict(torch.randn(7, 1, 4))
        assert out.shape == (7, 8, 3) and torch.isfinite(out).all() and (out.abs().sum((1, 2)) > 0).all()


def test_fast_head_keeps_its_tokeniser_in_the_adapter():
    head = heads.FASTHead(vocabulary=128, width=16, depth=1, heads=2).build(in_dim=4, action_dim=3, chunk=8)
    with pytest.raises(ConfigError, match="no tokeniser"):
        head.predict(torch.zeros(2, 4))
    head.fit(chunks())
    other = heads.FASTHead(vocabulary=128, width=16, depth=1, heads=2).build(in_dim=4, action_dim=3, chunk=8)
    other.set_facts(json.loads(json.dumps(head.facts())))
    assert other.tokeniser == head.tokeniser
    with pytest.raises(FileFormatError, match="fast"):
        other.set_facts({})
    third = heads.FASTHead(vocabulary=128, width=16, depth=1, heads=2).build(in_dim=4, action_dim=2, chunk=8)
    with pytest.raises(ConfigError, match="does not fit"):
        third.set_facts(head.facts())


def test_residual_codebooks():
    """Clusters are found; each further codebook leaves less; what is kept in the adapter is exact."""
    centres = torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0]])
    g = torch.Generator().manual_seed(0)
    points = centres.repeat(40, 1) + 0.1 * torch.randn(120, 2, generator=g)
    found = k_means(points, 3)
    assert torch.cdist(centres, found).amin(1).max() < 0.1
    x, errors = chunks(200), []
    for books in (1, 2, 3):
        head = heads.VQBeTHead(codes=8, books=books).build(in_dim=4, action_dim=3, chunk=8)
        head.fit(x)
        _, total = residual_codes(x.flatten(1), head.books)
        errors.append(float((total - x.flatten(1)).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]
    other = heads.VQBeTHead(codes=8, books=3).build(in_dim=4, action_dim=3, chunk=8)
    with pytest.raises(ConfigError, match="no codebooks"):
        other.predict(torch.zeros(2, 4))
    assert other.facts_differ(head.facts())
    other.set_facts(json.loads(json.dumps(head.facts())))
    assert torch.equal(other.books, head.books) and not other.facts_differ(head.facts())
    with pytest.raises(ConfigError, match="do not fit"):
        heads.VQBeTHead(codes=8, books=2).build(in_dim=4, action_dim=3, chunk=8).set_facts(head.facts())
    with pytest.raises(FileFormatError, match="vqbet"):
        other.set_facts({})
    with pytest.raises(ConfigError, match="too few"):
        other.fit(x[:4])
