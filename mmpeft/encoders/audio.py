"""Sounds to tokens: what all audio backbones share, and the wav2vec 2.0 family; Whisper is in `audio_whisper.py`.

A clip is encoded at its own length and a batch is right-padded with zeros, with a mask [B, samples] that becomes a mask
[B, T] of tokens. What a clip's tokens are does not depend on its batch mates: attention is masked, and where the
convolutions normalise over time (GroupNorm, as wav2vec 2.0 base does) each length goes through them by itself, because
there the padding would shift the statistics of the real frames.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.encoders.audio_preprocess import AudioPreprocess
from mmpeft.encoders.base import Encoder, lengths_to_mask, mask_to_lengths, resolve_layer
from mmpeft.encoders.files import load_errors, load_strict, read_weights
from mmpeft.encoders.hf import load_backbone, loading, locate, output_of
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import AudioOptions
from mmpeft.errors import BadSample, ConfigError, FileFormatError, NameNotFound, Unsupported, nearest, require


class AudioEncoder(Encoder):
    """An audio backbone as tokens [B, T, d_v] with their mask [B, T].

    Raises:
        ConfigError: a layer that is not there.
    """

    modality = "audio"
    preprocess: AudioPreprocess

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        dim: int,
        preprocess: AudioPreprocess,
        blocks: nn.ModuleList,
        layer: int,
    ) -> None:
        super().__init__(backbone, name=name, dim=dim, preprocess=preprocess)
        self.index = resolve_layer(name, layer, len(blocks))
        self.last = self.index == len(blocks) - 1
        del blocks[self.index + 1 :]  # no token depends on them

    @abstractmethod
    def token_count(self, samples: int) -> int:
        """Tokens for a clip of so many samples; 0 or less when it is too short."""

    @abstractmethod
    def encode(self, waveforms: Tensor, lengths: list[int]) -> Tensor:
        """Waveforms [B, N], right-padded with zeros, to tokens [B, T, d_v], T that of the longest."""

    def num_tokens(self, shape: Any) -> int:
        """Tokens for a preprocessed clip: its number of samples, or the shape (samples,).

        Raises:
            BadSample: the clip is too short for a single token.
        """
        samples = int(shape if isinstance(shape, int) else shape[-1])
        count = self.token_count(samples)
        if count < 1:
            raise BadSample(f"a clip of {samples} samples is too short for {self.name!r}: it gives no token")
        return count

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, N] and their mask [B, N] (None: all full) to tokens [B, T, d_v] and mask [B, T]."""
        if x.ndim != 2:
            raise ConfigError(f"{self.name!r} reads waveforms [B, samples], not {list(x.shape)}")
        lengths = [int(n) for n in mask_to_lengths(mask, len(x), x.shape[1], x.device).tolist()]
        counts = [self.num_tokens(n) for n in lengths]
        waveforms = x[:, : max(lengths)]
        if mask is not None:
            waveforms = waveforms * mask[:, : max(lengths)]
        tokens = self.encode(waveforms.to(next(self.backbone.parameters()).dtype), lengths)
        return tokens, lengths_to_mask(torch.tensor(counts, device=x.device), tokens.shape[1])

    def config(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "layer": self.index, "preprocess": self.preprocess.signature}


class WaveEncoder(AudioEncoder):
    """The wav2vec 2.0 family: strided convolutions on the waveform, then a transformer.

    Baevski et al., wav2vec 2.0 (2020), arXiv:2006.11477; HuBERT arXiv:2106.07447; WavLM arXiv:2110.13900.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        extractor: Any = backbone.feature_extractor
        convs = [m for m in extractor.modules() if isinstance(m, nn.Conv1d)]
        self.convs = [(int(m.kernel_size[0]), int(m.stride[0])) for m in convs]
        kind = getattr(getattr(backbone, "config", None), "model_type", None)
        self.leaks_padding = kind in LEAKS_PADDING
        self.norm_over_time = any(isinstance(m, nn.GroupNorm) for m in extractor.modules())

    def token_count(self, samples: int) -> int:
        for kernel, stride in self.convs:
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def encode(self, waveforms: Tensor, lengths: list[int]) -> Tensor:
        if self.leaks_padding:
            return self.by_length(lambda clips: self.contextualise(self.frames(clips), None), waveforms, lengths)
        frames = self.by_length(self.frames, waveforms, lengths) if self.norm_over_time else self.frames(waveforms)
        counts = torch.tensor([self.token_count(n) for n in lengths], device=waveforms.device)
        return self.contextualise(frames, lengths_to_mask(counts, frames.shape[1]))

    def by_length(self, run: Callable[[Tensor], Tensor], waveforms: Tensor, lengths: list[int]) -> Tensor:
        """Waveforms [B, N] through `run`, one length at a time, to [B, T, C] padded with zeros."""
        if len(set(lengths)) == 1:
            return run(waveforms)
        total = self.token_count(max(lengths))
        rows: list[Tensor] = [waveforms] * len(lengths)
        for length in set(lengths):
            members = [i for i, n in enumerate(lengths) if n == length]
            out = run(waveforms[members, :length])
            for i, row in zip(members, F.pad(out, (0, 0, 0, total - out.shape[1])), strict=True):
                rows[i] = row
        return torch.stack(rows)

    @abstractmethod
    def frames(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, N] of one length to frames [B, T, C]."""

    @abstractmethod
    def contextualise(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Frames [B, T, C] and their mask [B, T] to tokens [B, T, d_v] of the chosen layer."""


class HFWave(WaveEncoder):
    """wav2vec 2.0, HuBERT, WavLM, data2vec-audio, UniSpeech of transformers."""

    backbone: Any

    def frames(self, waveforms: Tensor) -> Tensor:
        frames: Tensor = self.backbone.feature_extractor(waveforms).transpose(1, 2)
        return frames

    def contextualise(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        backbone = self.backbone
        projected = backbone.feature_projection(frames)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        if self.last:
            tokens: Tensor = backbone.encoder(hidden, attention_mask=mask).last_hidden_state
            return tokens
        path = f"encoder.layers.{self.index}"
        return output_of(backbone, path, lambda: backbone.encoder(hidden, attention_mask=mask))


class TorchaudioWave(WaveEncoder):
    """A torchaudio Wav2Vec2Model (wav2vec 2.0, HuBERT, XLS-R, WavLM)."""

    backbone: Any

    def frames(self, waveforms: Tensor) -> Tensor:
        frames: Tensor = self.backbone.feature_extractor(waveforms, None)[0]
        return frames

    def contextualise(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        encoder = self.backbone.encoder
        lengths = None if mask is None else mask.sum(-1)
        tokens: Tensor = (
            encoder(frames, lengths)
            if self.last
            else encoder.extract_features(frames, lengths, num_layers=self.index + 1)[-1]
        )
        return tokens


# data2vec stacks its position convolutions, so that what the second sees in the padding is no longer zero
LEAKS_PADDING = ("data2vec-audio",)
HF_WAVE = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat")


def load_hf_audio(name: Name, options: AudioOptions) -> AudioEncoder:
    """A frozen transformers audio encoder; `load_encoder` says the names, options and errors."""
    model = load_backbone(name, options, "audio")
    kind = model.config.model_type
    extractor = _feature_extractor(name, model.config, options)
    if kind == "whisper":
        from mmpeft.encoders.audio_whisper import WhisperAudio

        return WhisperAudio(
            model.get_encoder(),
            extractor=extractor,
            name=name.text,
            layer=options.layer,
            full_window=options.full_window,
        )
    if options.full_window:
        raise ConfigError(f"full_window is for Whisper; {name.text!r} is of type {kind!r} and has no window")
    if kind not in HF_WAVE:
        raise Unsupported(f"audio models of type {kind!r} are not read; there are whisper, {', '.join(HF_WAVE)}")
    if getattr(model, "adapter", None) is not None:
        raise Unsupported(f"{name.text!r} has convolutions after its transformer (add_adapter), which are not read")
    preprocess = AudioPreprocess(extractor.sampling_rate, normalize=bool(extractor.do_normalize))
    return HFWave(
        model, name=name.text, dim=model.config.hidden_size, preprocess=preprocess,
        blocks=model.encoder.layers, layer=options.layer,
    )  # fmt: skip


def load_torchaudio(name: Name, options: AudioOptions) -> TorchaudioWave:
    """A frozen torchaudio bundle; `load_encoder` says the names, options and errors."""
    why = f"it must be built for the installed torch, {torch.__version__} (CUDA {torch.version.cuda})"
    torchaudio: Any = require("torchaudio", "audio", why)
    bundles = {
        k: v for k, v in vars(torchaudio.pipelines).items() if isinstance(v, torchaudio.pipelines.Wav2Vec2Bundle)
    }
    if name.rest not in bundles:
        raise NameNotFound(
            f"torchaudio has no wav2vec bundle {name.rest!r}{nearest(name.rest, bundles)}; there are {', '.join(sorted(bundles))}"
        )
    if options.full_window:
        raise ConfigError("full_window is for Whisper; a torchaudio bundle has no window")
    bundle = bundles[name.rest]
    if name.random or options.weights is not None:
        factory = {"Wav2Vec2": torchaudio.models.wav2vec2_model, "WavLM": torchaudio.models.wavlm_model}[
            bundle._model_type
        ]
        model = factory(**bundle._params)
        if options.weights is not None:
            load_strict(model, read_weights(options.weights), options.weights)
    else:
        with load_errors(name.text, torch.hub.get_dir()):
            model = bundle.get_model()
        model = getattr(model, "model", model)  # bundles that normalise the waveform wrap the network
    return torchaudio_encoder(
        model,
        name=name.text,
        sampling_rate=int(bundle.sample_rate),
        normalize=bundle._normalize_waveform,
        options=options,
    )


def torchaudio_encoder(
    model: Any, *, name: str, sampling_rate: int, normalize: bool, options: AudioOptions
) -> TorchaudioWave:
    """An encoder around a torchaudio Wav2Vec2Model of one's own; its classification head is removed."""
    model.aux = None
    layers = model.encoder.transformer.layers
    return TorchaudioWave(
        model.to(options.dtype or torch.float32), name=name, dim=model.encoder.transformer.pos_conv_embed.embed_dim,
        preprocess=AudioPreprocess(sampling_rate, normalize=normalize), blocks=layers, layer=options.layer,
    )  # fmt: skip


def _feature_extractor(name: Name, config: Any, options: AudioOptions) -> Any:
    """The model's transformers feature extractor."""
    transformers: Any = require("transformers", "text")
    place = locate(name)
    if isinstance(place, Path) and not (place / "preprocessor_config.json").is_file():
        if not name.random:
            raise FileFormatError(f"{str(place)!r} has no preprocessor_config.json, so its preprocessing is unknown")
        if config.model_type == "whisper":
            return transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
        return transformers.Wav2Vec2FeatureExtractor()
    with loading(name):
        return transformers.AutoFeatureExtractor.from_pretrained(place, revision=options.revision)
