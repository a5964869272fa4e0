"""Sentences to vectors: the instruction of a policy through a frozen text encoder, each sentence once.

A robot hears few sentences, and hears them often, so vectors are remembered as long as nothing inside the encoder is
trained. Pooling is the mean over tokens and then unit length, as MiniLM and its kin were trained (Reimers and Gurevych
2019, arXiv 1908.10084).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmpeft.encoders import Encoder, load_encoder
from mmpeft.encoders.base import is_frozen
from mmpeft.errors import ConfigError
from mmpeft.policies.parts import Part


class InstructionEncoder(Part):
    """Sentences to unit vectors [B, dim].

    Args:
        encoder: a text encoder: a name for `load_encoder`, its arguments as a mapping, or an `Encoder`.

    Raises:
        ConfigError: no text encoder.
    """

    def __init__(self, encoder: str | Mapping[str, Any] | Encoder) -> None:
        super().__init__()
        options: Any = {"name": encoder} if isinstance(encoder, str) else encoder
        self.text: Encoder = load_encoder(**options) if isinstance(options, Mapping) else options
        if self.text.modality != "text":
            raise ConfigError(f"instructions need a text encoder, {self.text.name!r} reads {self.text.modality}")
        self.dim = self.text.dim
        self._known: dict[str, Tensor] = {}

    def forward(self, sentences: Sequence[str]) -> Tensor:
        """[B] sentences to [B, dim]; BadSample for an empty one."""
        names = [str(s) for s in sentences]
        device = next(self.text.parameters()).device
        if not is_frozen(self.text):
            self._known = {}
            return self._encode(names, device)
        missing = sorted(set(names) - set(self._known))
        if missing:
            with torch.no_grad():
                self._known |= dict(zip(missing, self._encode(missing, device).cpu(), strict=True))
        return torch.stack([self._known[n] for n in names]).to(device)

    def _encode(self, names: Sequence[str], device: torch.device) -> Tensor:
        ids = [self.text.preprocess(n) for n in names]
        mask = pad_sequence([torch.ones(len(i), dtype=torch.bool) for i in ids], batch_first=True).to(device)
        tokens, _ = self.text(pad_sequence(ids, batch_first=True).to(device), mask)
        tokens = tokens.float()  # the checkpoint may be in half precision; states and maps reach the trunk in fp32
        weight = mask.unsqueeze(-1).float()
        return F.normalize((tokens * weight).sum(1) / weight.sum(1), dim=-1)


def noisy_words(vectors: Tensor, most: float) -> Tensor:
    """Sentence vectors [B, dim] with Gaussian noise, its length about `most` times a number drawn from 0 .. 1 for each.

    A policy hears a handful of sentences and learns them by heart; another wording of one of them is a vector nearby.
    Noise on embeddings in training is NEFTune's (Jain et al. 2023, arXiv 2310.05914), there for language models.
    """
    length = most * torch.rand(len(vectors), 1, device=vectors.device) / vectors.shape[-1] ** 0.5
    noisy: Tensor = vectors + length * torch.randn_like(vectors)
    return noisy
