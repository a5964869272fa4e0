"""Audio encoders: token counts and masks equal the real lengths, batch mates change nothing, Whisper without its padding."""

from __future__ import annotations

import pickle
import wave

import numpy as np
import pytest
import torch

from mmpeft.encoders import load_encoder
from mmpeft.encoders.audio import load_torchaudio, torchaudio_encoder
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import AudioOptions
from mmpeft.errors import BadSample, ConfigError, NameNotFound

WAVE = ["wav2vec2", "wav2vec2-layer", "hubert", "wavlm", "data2vec"]
NAMES = [*WAVE, "whisper", "torchaudio", "torchaudio-layer"]


def torchaudio_model(mode: str):
    """A small torchaudio wav2vec 2.0 (mode group_norm or layer_norm)."""
    from torchaudio.models import wav2vec2_model

    torch.manual_seed(1)
    return wav2vec2_model(
        extractor_mode=mode, extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2), (16, 2, 2)], extractor_conv_bias=False,
        encoder_embed_dim=32, encoder_projection_dropout=0.1, encoder_pos_conv_kernel=8, encoder_pos_conv_groups=4,
        encoder_num_layers=3, encoder_num_heads=4, encoder_attention_dropout=0.1, encoder_ff_interm_features=48,
        encoder_ff_interm_dropout=0.1, encoder_dropout=0.1, encoder_layer_norm_first=mode == "layer_norm",
        encoder_layer_drop=0.1, aux_num_out=7,
    )  # fmt: skip


@pytest.fixture
def make(hf_audio: dict[str, str]):
    def build(name: str, **options):
        if name.startswith("torchaudio"):
            mode = "layer_norm" if name.endswith("layer") else "group_norm"
            return torchaudio_encoder(
                torchaudio_model(mode), name=name, sampling_rate=16000, normalize=False, options=AudioOptions(**options)
            )
        return load_encoder(hf_audio[name], **options)

    return build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [-1, -2])
def test_tokens_and_masks_have_the_real_lengths(name: str, layer: int, make) -> None:
    encoder = make(name, layer=layer).train()
    lengths = [4001, 2323, 801, 2323]
    clips = [torch.randn(n) for n in lengths]
    x = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = torch.arange(x.shape[1])[None] < torch.tensor(lengths)[:, None]
    tokens, valid = encoder(x, mask)
    counts = [encoder.num_tokens(n) for n in lengths]
    assert tokens.shape == (4, max(counts), encoder.dim) and valid.dtype == torch.bool
    assert valid.sum(-1).tolist() == counts
    assert tokens.grad_fn is None
    # a clip alone gives the same tokens as among others, whatever stands in the padding
    x = x + 5 * torch.randn_like(x) * ~mask
    tokens = encoder(x, mask)[0]
    for i, clip in enumerate(clips):
        alone, full = encoder(clip[None])
        assert full is None and alone.shape[1] == counts[i]
        torch.testing.assert_close(tokens[i, : counts[i]], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_num_tokens_of_every_length(name: str, make) -> None:
    encoder = make(name)
    for samples in (401, 799, 800, 801, 1023, 3200):
        assert (
            encoder(torch.randn(2, samples))[0].shape[1]
            == encoder.num_tokens(samples)
            == encoder.num_tokens((samples,))
        )


@pytest.mark.parametrize("name", WAVE)
def test_equals_transformers(name: str, hf_audio: dict[str, str]) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(hf_audio[name]).eval()
    x = torch.randn(2, 1500)
    out = model(x, output_hidden_states=True)
    torch.testing.assert_close(load_encoder(hf_audio[name])(x)[0], out.last_hidden_state)
    torch.testing.assert_close(load_encoder(hf_audio[name], layer=-2)(x)[0], out.hidden_states[-2])


@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
def test_equals_torchaudio(mode: str) -> None:
    model = torchaudio_model(mode).eval()
    x = torch.randn(2, 1500)
    hidden = model.extract_features(x)[0]
    final = model.encoder(model.feature_extractor(x, None)[0])
    options = {"name": "small", "sampling_rate": 16000, "normalize": False}
    torch.testing.assert_close(torchaudio_encoder(model, options=AudioOptions(), **options)(x)[0], final)
    for layer in (-2, 0):
        encoder = torchaudio_encoder(model, options=AudioOptions(layer=layer), **options)
        torch.testing.assert_close(encoder(x)[0], hidden[layer])


def test_whisper_equals_transformers_in_its_window(hf_audio: dict[str, str]) -> None:
    from transformers import AutoFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(hf_audio["whisper"]).eval()
    extractor = AutoFeatureExtractor.from_pretrained(hf_audio["whisper"])
    clips = [torch.randn(9000), torch.randn(20001)]
    features = extractor([c.numpy() for c in clips], sampling_rate=16000, return_tensors="pt").input_features
    want = model.encoder(features).last_hidden_state
    encoder = load_encoder(hf_audio["whisper"], full_window=True)
    x = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = torch.arange(x.shape[1])[None] < torch.tensor([9000, 20001])[:, None]
    tokens, valid = encoder(x, mask)
    assert valid is None and tokens.shape[1] == encoder.num_tokens(9000) == 100
    torch.testing.assert_close(tokens, want, atol=2e-5, rtol=1e-4)


def test_whisper_at_its_own_length_sees_the_window_s_frames(hf_audio: dict[str, str]) -> None:
    """Up to the first attention, a short clip's frames equal those inside the padded window."""
    short, window = (load_encoder(hf_audio["whisper"], full_window=w) for w in (False, True))
    seen: list[torch.Tensor] = []
    for encoder in (short, window):
        encoder.backbone.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        encoder(torch.randn(1, 8123, generator=torch.Generator().manual_seed(0)))
    count = short.num_tokens(8123)
    assert count == 26 and seen[0].shape[1] == count
    torch.testing.assert_close(seen[0], seen[1][:, :count], atol=1e-5, rtol=1e-5)


def test_layer_that_is_not_there(make) -> None:
    with pytest.raises(ConfigError, match=r"-3\.\.2"):
        make("wav2vec2", layer=3)


def test_too_short_and_too_long(make) -> None:
    with pytest.raises(BadSample, match="too short"):
        make("wav2vec2").num_tokens(9)
    with pytest.raises(BadSample, match="too short"):
        make("hubert")(torch.randn(2, 9))
    with pytest.raises(BadSample, match="longer than the window"):
        make("whisper").num_tokens(16000 * 2 + 1)
    with pytest.raises(ConfigError, match="full_window is for Whisper"):
        make("wav2vec2", full_window=True)
    with pytest.raises(ConfigError, match=r"\[B, samples\]"):
        make("wav2vec2")(torch.randn(2, 1, 900))


def test_unknown_bundle_names_the_nearest() -> None:
    with pytest.raises(NameNotFound, match="WAV2VEC2_BASE"):
        load_encoder("torchaudio:WAV2VEC2_BAS")


def test_gradient_reaches_the_waveform(make) -> None:
    for name in ("wav2vec2", "whisper", "torchaudio"):
        x = torch.randn(2, 2000, requires_grad=True)
        make(name)(x)[0].square().sum().backward()
        assert x.grad.abs().sum() > 0


# --- preprocessing ----------------------------------------------------------------------------------------------------


def test_every_kind_of_raw_sound(hf_audio: dict[str, str], tmp_path) -> None:
    preprocess = load_encoder(hf_audio["whisper"]).preprocess
    samples = (np.sin(np.arange(3000) / 9) * 20000).astype(np.int16)
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    want = torch.from_numpy(samples).float() / 32768
    raws = [str(tmp_path / "s.wav"), samples, want, (samples, 16000), {"array": want.numpy(), "sampling_rate": 16000}]
    raws.append(torch.stack([want, want]))  # two channels
    for raw in raws:
        torch.testing.assert_close(preprocess(raw), want)
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess
    assert abs(len(preprocess((want, 8000))) - 6000) <= 1  # resampled


def test_normalisation_equals_transformers(hf_audio: dict[str, str]) -> None:
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(hf_audio["wav2vec2"])
    clip = torch.randn(2000) * 0.1 + 0.3
    want = extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt").input_values[0]
    torch.testing.assert_close(load_encoder(hf_audio["wav2vec2"]).preprocess(clip), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("no/such.wav", "not found"),
        (torch.zeros(0), "non-empty"),
        (torch.tensor([0.0, float("nan")]), "finite"),
        (torch.zeros(2, 3, 4), r"\[T\]"),
        ({"array": [0.0]}, "sampling_rate"),
    ],
)
def test_what_is_no_sound_is_refused(raw, words: str, hf_audio: dict[str, str]) -> None:
    with pytest.raises(BadSample, match=words):
        load_encoder(hf_audio["whisper"]).preprocess(raw)


def test_random_bundle_has_the_published_size() -> None:
    """wav2vec 2.0 base has 95 M (paper, section 4.2): 94,371,712 in transformers, 768 of them its mask embedding."""
    with torch.device("meta"):
        encoder = load_torchaudio(Name("random", "torchaudio", "WAV2VEC2_BASE", random=True), AudioOptions())
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 94_371_712 - 768
    assert encoder.dim == 768 and encoder.num_tokens(16000) == 49
