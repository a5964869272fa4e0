"""FAST action tokens (Pertsch et al. 2025, arXiv 2501.09747): a cosine transform in time, rounding, byte-pair encoding.

    chunk [C, A] -> DCT-II over time, per dimension -> round(scale * coefficient) -> low frequencies first -> BPE

Smooth motion has few coefficients that are not zero, and runs of zeros become single tokens. The published code gives
an action of zeros when a token sequence does not decode, which moves a robot; here a malformed sequence is an error,
and `expansions` says what each token stands for, so that a decoder can be constrained never to write one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from mmpeft.errors import BadSample, ConfigError, FileFormatError

PAIRS_FROM = 4096  # chunks that merges are learned from


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II [frequency, time], float64: its inverse is its transpose."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True)
class FASTTokeniser:
    """Tokens of chunks [chunk, action_dim].

    Attributes:
        scale: levels a unit of a (normalised) coefficient; the error of each coefficient is at most half of 1 / scale.
        low, high: the smallest and largest rounded coefficient; token i < high - low + 1 is the number low + i.
        merges: pairs of tokens that became one; merge j is token high - low + 1 + j.
    """

    chunk: int
    action_dim: int
    scale: float
    low: int
    high: int
    merges: tuple[tuple[int, int], ...] = ()
    expansions: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts: list[tuple[int, ...]] = [(n,) for n in range(self.low, self.high + 1)]
        for a, b in self.merges:
            if not (0 <= a < len(parts) and 0 <= b < len(parts)):
                raise FileFormatError(f"FAST merge ({a}, {b}) names a token that is not made yet")
            parts.append(parts[a] + parts[b])
        object.__setattr__(self, "expansions", tuple(parts))

    @classmethod
    def fit(cls, chunks: Tensor, *, scale: float = 10.0, vocabulary: int = 512) -> Self:
        """Learn the alphabet and the merges from chunks [N, C, A].

        Raises:
            ConfigError: a vocabulary smaller than the alphabet of the rounded coefficients.
        """
        numbers = cls._numbers(chunks, scale)
        low, high = int(numbers.min()), int(numbers.max())
        alphabet = high - low + 1
        if alphabet > vocabulary:
            raise ConfigError(
                f"{alphabet} different coefficients do not fit a vocabulary of {vocabulary}; take a larger vocabulary "
                f"or a scale below {scale}"
            )
        rows = (numbers[:: max(1, len(numbers) // PAIRS_FROM)] - low).tolist()
        merges = learn_merges(rows, alphabet, vocabulary - alphabet)
        return cls(int(chunks.shape[1]), int(chunks.shape[2]), float(scale), low, high, merges)

    @staticmethod
    def _numbers(chunks: Tensor, scale: float) -> Tensor:
        """[N, C, A] to rounded coefficients [N, C * A], low frequencies first."""
        spectrum = torch.einsum("ft,nta->nfa", dct_matrix(chunks.shape[1]), chunks.double().cpu())
        return (spectrum * scale).round().long().flatten(1)

    @property
    def size(self) -> int:
        return len(self.expansions)

    @property
    def length(self) -> int:
        """Coefficients that a sequence must expand to."""
        return self.chunk * self.action_dim

    def encode(self, chunks: Tensor) -> list[list[int]]:
        """[N, C, A] -> N token sequences; coefficients beyond those seen in `fit` are cut to the nearest seen."""
        if tuple(chunks.shape[1:]) != (self.chunk, self.action_dim):
            raise ConfigError(f"expected chunks [N, {self.chunk}, {self.action_dim}], given {list(chunks.shape)}")
        numbers = self._numbers(chunks, self.scale).clamp(self.low, self.high) - self.low
        rank = {pair: i for i, pair in enumerate(self.merges)}
        return [self._merge(row, rank) for row in numbers.tolist()]

    def _merge(self, row: list[int], rank: Mapping[tuple[int, int], int]) -> list[int]:
        """Merges in the order in which they were learned."""
        while pairs := [rank[p] for p in zip(row, row[1:], strict=False) if p in rank]:
            first = min(pairs)
            row = _join(row, self.merges[first], self.high - self.low + 1 + first)
        return row

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """One sequence -> [C, A].

        Raises:
            BadSample: an unknown token, or a sequence that does not expand to exactly C * A coefficients.
        """
        unknown = [t for t in tokens if not 0 <= t < self.size]
        if unknown:
            raise BadSample(f"FAST token {unknown[0]} is none of the {self.size} known; the sequence cannot be decoded")
        numbers = [n for t in tokens for n in self.expansions[t]]
        if len(numbers) != self.length:
            raise BadSample(
                f"{len(tokens)} FAST tokens expand to {len(numbers)} coefficients, a chunk of {self.chunk} steps and "
                f"{self.action_dim} dimensions has {self.length}; no action is made up for them"
            )
        spectrum = torch.tensor(numbers, dtype=torch.float64).view(self.chunk, self.action_dim) / self.scale
        return (dct_matrix(self.chunk).T @ spectrum).float()

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        plain = ("chunk", "action_dim", "scale", "low", "high")
        return {k: getattr(self, k) for k in plain} | {"merges": [list(m) for m in self.merges]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises FileFormatError, naming the missing keys."""
        missing = [k for k in ("chunk", "action_dim", "scale", "low", "high", "merges") if k not in data]
        if missing:
            raise FileFormatError(f"the adapter's FAST tokeniser lacks {', '.join(missing)}")
        return cls(**{**data, "merges": tuple((int(a), int(b)) for a, b in data["merges"])})


def learn_merges(rows: list[list[int]], alphabet: int, count: int) -> tuple[tuple[int, int], ...]:
    """Byte-pair encoding: `count` times, the most frequent neighbouring pair becomes a new token.

    Ties go to the smaller pair, so the result does not depend on the order of the rows. Stops when no pair repeats.
    """
    rows = [list(row) for row in rows]
    where: dict[tuple[int, int], set[int]] = {}
    counts: Counter[tuple[int, int]] = Counter()

    def note(i: int, sign: int) -> None:
        for pair in zip(rows[i], rows[i][1:], strict=False):
            counts[pair] += sign
            if sign > 0:
                where.setdefault(pair, set()).add(i)

    for i in range(len(rows)):
        note(i, 1)
    merges: list[tuple[int, int]] = []
    while len(merges) < count and counts:
        best = max(counts.items(), key=lambda item: (item[1], [-p for p in item[0]]))
        if best[1] < 2:
            break
        for i in where.pop(best[0]):
            note(i, -1)
            rows[i] = _join(rows[i], best[0], alphabet + len(merges))
            note(i, 1)
        merges.append(best[0])
    return tuple(merges)


def _join(row: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(row):
        if i + 1 < len(row) and (row[i], row[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(row[i])
            i += 1
    return out
