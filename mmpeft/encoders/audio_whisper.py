"""Whisper's encoder at a clip's own length.

Whisper was trained on 30 s windows padded with silence, and transformers' encoder accepts nothing else, so a 3 s clip
costs ten times what it must. Here the same layers run on the clip's own frames: position embeddings are cut, attention is
masked to the clip, and a margin of silence after the clip feeds the spectrogram and the two convolutions exactly what
they would see in the window. What differs from the window is only that attention does not see the silence;
`full_window=True` brings that back, and then the tokens equal those of transformers.

Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022), arXiv:2212.04356.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.encoders.audio import AudioEncoder
from mmpeft.encoders.audio_preprocess import AudioPreprocess
from mmpeft.encoders.base import lengths_to_mask
from mmpeft.errors import BadSample


class WhisperAudio(AudioEncoder):
    """Tokens of 20 ms each (two mel frames), without the 30 s padding unless `full_window`."""

    mel_filters: Tensor

    def __init__(self, backbone: nn.Module, *, extractor: Any, name: str, layer: int, full_window: bool) -> None:
        whisper: Any = backbone
        config = whisper.config
        super().__init__(
            backbone, name=name, dim=config.d_model, preprocess=AudioPreprocess(extractor.sampling_rate),
            blocks=whisper.layers, layer=layer,
        )  # fmt: skip
        self.hop, self.n_fft = int(extractor.hop_length), int(extractor.n_fft)
        self.max_samples = int(config.max_source_positions) * 2 * self.hop
        self.full_window = full_window
        filters = torch.as_tensor(extractor.mel_filters, dtype=torch.float32)  # [n_fft / 2 + 1, mel bins]
        self.register_buffer("mel_filters", filters, persistent=False)

    def token_count(self, samples: int) -> int:
        if samples > self.max_samples:
            rate = self.preprocess.sampling_rate
            raise BadSample(
                f"a clip of {samples} samples ({samples / rate:.1f} s) is longer than the window of {self.name!r}, "
                f"{self.max_samples / rate:.0f} s: cut it into pieces"
            )
        if self.full_window:
            return self.max_samples // (2 * self.hop)
        return math.ceil(math.ceil(samples / self.hop) / 2)

    def encode(self, waveforms: Tensor, lengths: list[int]) -> Tensor:
        backbone: Any = self.backbone
        counts = [self.token_count(n) for n in lengths]
        total = max(counts)
        # one token reads 5 mel frames, and a mel frame half a Fourier window to either side
        margin = 0 if self.full_window else self.n_fft + 6 * self.hop
        size = 2 * self.hop * total + margin
        mel = log_mel(F.pad(waveforms.float(), (0, size - waveforms.shape[1])), self.mel_filters, self.n_fft, self.hop)
        hidden = F.gelu(backbone.conv1(mel.to(waveforms.dtype)))
        hidden = F.gelu(backbone.conv2(hidden)).transpose(1, 2)[:, :total]  # [B, T, d_v]
        hidden = hidden + backbone.embed_positions(torch.arange(total, device=hidden.device))
        mask = self._attention_mask(hidden, torch.tensor(counts, device=hidden.device))
        for block in backbone.layers:
            out = block(hidden, mask)
            hidden = out[0] if isinstance(out, tuple) else out
        tokens: Tensor = backbone.layer_norm(hidden) if self.last else hidden
        return tokens

    def _attention_mask(self, hidden: Tensor, counts: Tensor) -> Any:
        """The mask in the form that the configured attention of transformers wants."""
        from transformers.masking_utils import create_bidirectional_mask

        mask = lengths_to_mask(counts, hidden.shape[1])
        return create_bidirectional_mask(config=self.backbone.config, inputs_embeds=hidden, attention_mask=mask)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "full_window": self.full_window}


def log_mel(waveforms: Tensor, filters: Tensor, n_fft: int, hop: int) -> Tensor:
    """Whisper's spectrogram: waveforms [B, N] to log10 mel energies [B, mel bins, N / hop], each clip's own range.

    Energies are cut 8 decades below the clip's loudest bin and mapped so that this range has length 2.
    """
    spectrum = torch.stft(
        waveforms, n_fft, hop, window=torch.hann_window(n_fft, device=waveforms.device), return_complex=True
    )
    energy = filters.T @ spectrum[..., :-1].abs().square()
    logs = energy.clamp(min=1e-10).log10()
    floor = logs.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(logs, floor) + 4.0) / 4.0
