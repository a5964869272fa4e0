"""Whisper's encoder from CTranslate2's file: written here from transformers' own module, read back to the bit."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpeft.encoders import load_encoder
from mmpeft.encoders.packages import PACKAGES, Package
from mmpeft.encoders.packages_whisper import ENDS, LAYER, read_ctranslate2, whisper_encoder
from mmpeft.errors import ConfigError, FileFormatError, MissingExtra, NameNotFound, Unsupported

NAME = "package:whisper-tiny.en"
SIZES = dict(
    d_model=24, num_mel_bins=80, max_source_positions=1500, encoder_layers=3, encoder_attention_heads=3, encoder_ffn_dim=40
)
NUMBERS = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def write(path: Path, variables: dict[str, torch.Tensor], spec: str = "WhisperSpec", version: int = 6) -> Path:
    """CTranslate2's binary form, written independently of the reader."""
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        data = value.contiguous().numpy().tobytes()
        out += text(name) + struct.pack(f"<B{value.ndim}IBI", value.ndim, *value.shape, NUMBERS[value.dtype], len(data)) + data
    path.write_bytes(out + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight"))
    return path


@pytest.fixture(scope="module")
def theirs():
    """A random transformers encoder, rounded to half precision."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    model = WhisperEncoder(WhisperConfig(**SIZES)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.05 * torch.randn_like(p)).half().float())
    return model


@pytest.fixture
def variables(theirs) -> dict[str, torch.Tensor]:
    state = {k: v.half() for k, v in theirs.state_dict().items()}
    found = {f"encoder/{a}": state[b] for a, b in ENDS.items()}
    for i in range(SIZES["encoder_layers"]):
        found |= {f"encoder/layer_{i}/{a}": state[f"layers.{i}.{b}"] for a, b in LAYER.items()}
        q, k, v = (f"layers.{i}.self_attn.{role}_proj" for role in "qkv")
        stacked = torch.cat([state[f"{n}.weight"] for n in (q, k, v)])
        biases = torch.cat([state[f"{q}.bias"], torch.zeros(24).half(), state[f"{v}.bias"]])
        found |= {
            f"encoder/layer_{i}/self_attention/linear_0/weight": stacked,
            f"encoder/layer_{i}/self_attention/linear_0/bias": biases,
        }
    return {**found, "encoder/num_heads": torch.tensor(3, dtype=torch.int16), "decoder/x": torch.zeros(2, 3)}


@pytest.fixture
def package(tmp_path, variables, monkeypatch) -> Path:
    """The file in place of the installed package's."""
    path = write(tmp_path / "model.bin", variables)

    @dataclass(frozen=True)
    class Here(Package):
        def path(self) -> Path:
            return path

    monkeypatch.setitem(PACKAGES, "whisper-tiny.en", Here("audio", "w", "m", "f"))
    return path


def test_the_encoder_is_transformers_own(package, theirs) -> None:
    """Every tensor to the bit; on two sounds in one batch, padded to the window, the tokens are those of transformers."""
    from transformers import WhisperFeatureExtractor

    sizes, state = whisper_encoder(package)
    assert sizes == SIZES
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(v.float(), theirs.state_dict()[k]) for k, v in state.items())
    encoder = load_encoder(NAME, full_window=True)
    assert encoder.modality == "audio" and encoder.dim == 24
    sounds = torch.randn(2, 16000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.1], [0.3]])
    features = WhisperFeatureExtractor()(list(sounds.numpy()), sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = theirs(features).last_hidden_state
        tokens, _ = encoder(sounds)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_options_and_random_weights(package) -> None:
    encoder = load_encoder(NAME, layer=1, dtype="bfloat16")
    assert len(encoder.backbone.layers) == 2 and next(encoder.backbone.parameters()).dtype == torch.bfloat16
    tokens, mask = encoder(torch.randn(3, 8000))
    assert tokens.shape == (3, 25, 24) and encoder.num_tokens(8000) == 25
    assert load_encoder(f"random:{NAME}").fingerprint() != load_encoder(NAME).fingerprint()
    with pytest.raises(ConfigError, match="image_size"):
        load_encoder(NAME, image_size=64)
    with pytest.raises(ConfigError, match="reads audio"):
        load_encoder(NAME, modality="text")
    with pytest.raises(NameNotFound, match=r"whisper-tiny\.en"):
        load_encoder("package:whisper-tiny")


@pytest.mark.parametrize("cut", [0, 3, 11, 300, -1, -40_000])
def test_truncated_files_are_refused(package, cut) -> None:
    data = package.read_bytes()
    aliases = len(text("decoder/projection/weight") + text("decoder/embeddings/weight")) + 4
    package.write_bytes(data[: cut - aliases if cut < 0 else cut])
    with pytest.raises(FileFormatError, match="model.bin"):
        load_encoder(NAME)


def test_foreign_and_misfitting_files_are_refused(tmp_path, variables) -> None:
    key = "encoder/layer_1/self_attention/linear_0"
    cases = {
        "version 6": write(tmp_path / "old", variables, version=5),
        "TransformerSpec": write(tmp_path / "other", variables, spec="TransformerSpec"),
        "lacks the encoder's variable.*conv2": write(
            tmp_path / "lacks", {k: v for k, v in variables.items() if "conv2/bias" not in k}
        ),
        "has not: something": write(tmp_path / "more", variables | {"encoder/something": torch.zeros(2)}),
        "layer 1 has a key bias": write(tmp_path / "bias", variables | {f"{key}/bias": torch.ones(72).half()}),
    }
    for message, path in cases.items():
        with pytest.raises(FileFormatError, match=message):
            whisper_encoder(path)
    quantised = variables | {f"{key}/weight": torch.zeros(72, 24, dtype=torch.int8), f"{key}/weight_scale": torch.ones(72)}
    with pytest.raises(Unsupported, match="quantised"):
        whisper_encoder(write(tmp_path / "int8", quantised))
    assert read_ctranslate2(tmp_path / "int8")[1][f"{key}/weight"].dtype == torch.int8


def test_the_package_equals_ctranslate2() -> None:
    """A second of a rising tone through the real weights; the numbers are CTranslate2 4.8.5's own encoder's, in fp32."""
    try:
        PACKAGES["whisper-tiny.en"].path()
    except MissingExtra as error:
        pytest.skip(str(error))
    t = np.arange(5 * 16000) / 16000
    sweep = torch.from_numpy((0.3 * np.sin(2 * np.pi * (200 * t + 150 * t * t))).astype(np.float32))
    with torch.no_grad():
        tokens, _ = load_encoder(NAME, full_window=True)(sweep[None])
    assert tokens.shape == (1, 1500, 384)
    for (row, column), expected in ORACLE.items():
        assert tokens[0, row, column].item() == pytest.approx(expected, abs=2e-3)


ORACLE = {
    (0, 0): -0.7321, (10, 7): -0.5703, (123, 200): 0.3067, (249, 383): -0.8529, (400, 64): -0.182, (1499, 5): -0.6216,
}  # fmt: skip
