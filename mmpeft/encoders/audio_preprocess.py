"""Sounds to waveforms [T] at the model's sampling rate; the object is picklable and `signature` says what it does."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft.errors import BadSample, require


@dataclass(frozen=True)
class AudioPreprocess:
    """A sound to one channel [T] at the model's sampling rate.

    `raw` is a path, a pair (waveform, sampling_rate), a mapping with "array" and "sampling_rate", or a waveform already
    at `sampling_rate`; several channels [C, T] are averaged.

    Args:
        sampling_rate: in hertz, of the output.
        normalize: zero mean and unit variance over the clip, as some wav2vec 2.0 models were trained.
    """

    sampling_rate: int
    normalize: bool = False
    random: bool = False

    @property
    def signature(self) -> str:
        return f"audio {self.sampling_rate} Hz, normalize={self.normalize}"

    def __call__(self, raw: Any) -> Tensor:
        wave_, rate = load_audio(raw, self.sampling_rate)
        if rate != self.sampling_rate:
            resample = require("torchaudio", "audio").functional.resample
            wave_ = resample(wave_, rate, self.sampling_rate)
        if self.normalize:
            wave_ = (wave_ - wave_.mean()) / (wave_.var(unbiased=False) + 1e-7).sqrt()
        return wave_


def load_audio(raw: Any, default_rate: int) -> tuple[Tensor, int]:
    """Any accepted sound as a float waveform [T] in -1..1 and its sampling rate in hertz.

    Raises:
        BadSample: a missing or damaged file, an empty or non-finite waveform.
    """
    rate = default_rate
    if isinstance(raw, (str, Path)):
        raw, rate = _open_audio(Path(raw))
    elif isinstance(raw, tuple) and len(raw) == 2:
        raw, rate = raw
    elif isinstance(raw, dict):
        if not {"array", "sampling_rate"} <= raw.keys():
            raise BadSample(f"a sound mapping has 'array' and 'sampling_rate', this one has {sorted(raw)}")
        raw, rate = raw["array"], raw["sampling_rate"]
    samples = torch.as_tensor(raw)
    if samples.dtype == torch.int16:
        samples = samples.float() / 32768
    samples = samples.float()
    if samples.ndim == 2 and samples.shape[0] <= 16:
        samples = samples.mean(0)
    if samples.ndim != 1:
        raise BadSample(f"a waveform is [T] or [C, T] with at most 16 channels, not {list(samples.shape)}")
    if samples.numel() == 0 or not bool(samples.isfinite().all()):
        raise BadSample("a waveform must be non-empty and finite")
    return samples, int(rate)


def _open_audio(path: Path) -> tuple[np.ndarray, int]:
    """A file to samples [C, T]; 16-bit WAV by the standard library, every other format by soundfile."""
    if not path.is_file():
        raise BadSample(f"sound file not found: {str(path)!r}")
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() == 2:
                data = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
                return data.reshape(-1, file.getnchannels()).T.astype(np.float32) / 32768, file.getframerate()
    except (wave.Error, EOFError, OSError):
        pass  # not a plain WAV: soundfile decides
    soundfile = require("soundfile", "audio", f"it reads {path.name!r}, which is no 16-bit WAV")
    try:
        data, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except Exception as error:  # soundfile raises its own error type
        raise BadSample(f"{str(path)!r} is no sound that can be read: {error}") from error
    return data.T, int(rate)
