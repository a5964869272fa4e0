"""Language models: any `AutoModelForCausalLM` with its tokenizer, from the hub, a folder, a GGUF file or a package.

A GGUF file takes about 12 s to dequantise and 4 s for its tokenizer, so it is converted once to safetensors in mmpeft's
cache (`$MMPEFT_CACHE`, else ~/.cache/mmpeft) and every load, the first included, reads the converted folder: the first
and the hundredth run compute with the same numbers. A damaged copy is noticed by its recorded sizes and rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mmpeft.encoders.base import log
from mmpeft.encoders.files import cache_folder, check_weights, identify_folder, read_json
from mmpeft.encoders.hub import reading
from mmpeft.encoders.options import as_dtype
from mmpeft.encoders.packages import find_package
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest, require

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONVERSION = 1  # raised when what a converted folder holds changes


@dataclass
class LLM:
    """A causal language model, its tokenizer, and the name that they were loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_llm(
    name: str | PretrainedConfig,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LLM:
    """Load a causal language model, in eval mode, with its tokenizer.

    Args:
        name: "hf:ID" or "hf:FOLDER", a folder, a .gguf file, "package:smollm2-135m-instruct", or for random weights
            "random:hf:FOLDER" (configuration and tokenizer are read from it) or a transformers configuration.
        dtype: of the weights, such as torch.bfloat16 or "bfloat16"; None is the checkpoint's own.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None is the library's choice. On a CPU with
            short sequences "eager" trains faster.
        revision: commit or tag of a hub repository.
        tokenizer: use this one instead of the model's own; required with a configuration.

    Returns:
        LLM(model, tokenizer, name). A tokenizer without a padding token pads with its end-of-text token, so padding
        is told by the mask, never by the token.

    Raises:
        NameNotFound: an unknown name, or a hub that does not give it.
        FileFormatError: a folder that is no model, pickled weights, a damaged file.
        ConfigError: options that do not fit together.
    """
    require("transformers", "text")
    dtype = as_dtype(dtype)
    random, folder, text = _resolve(name)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if not isinstance(folder, (str, Path)):
        if tokenizer is None:
            raise ConfigError("a model made from a configuration has no tokenizer of its own: give tokenizer=")
        options["dtype"] = dtype or torch.float32
        return LLM(cast(Any, _random_model(folder, options)).eval(), tokenizer, text)
    with reading(text, folder if isinstance(folder, Path) else None):
        model: Any = _model(folder, random, options, revision)
        loaded = tokenizer or _tokenizer(folder, revision)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    log.info("%s: %.1f M parameters, %s", text, sum(p.numel() for p in model.parameters()) / 1e6, model.dtype)
    return LLM(model.eval(), loaded, text)


def _resolve(name: Any) -> tuple[bool, Any, str]:
    """A name to (random weights?, folder or hub id or configuration, name as text)."""
    if not isinstance(name, str):
        from transformers import PretrainedConfig

        if isinstance(name, PretrainedConfig):
            return True, name, f"random:{name.model_type}"
        raise ConfigError(f"an LLM's name is a text or a transformers configuration, not {type(name).__name__}")
    random = name.startswith("random:")
    rest = name.removeprefix("random:")
    source, colon, inner = rest.partition(":")
    if source == "package" and colon:
        package = find_package(inner, "llm")
        return random, converted(package.path()), name
    path = Path(inner if source == "hf" and colon else rest).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NameNotFound(f"GGUF file not found: {str(path)!r}")
        return random, converted(path), name
    if path.is_dir():
        if identify_folder(path) != "hf":
            raise FileFormatError(f"{str(path)!r} holds no transformers model, so it is no language model")
        if not random:
            check_weights(path)
        return random, path, name
    if source == "hf" and inner:
        if inner.startswith((".", "/", "~")):
            raise NameNotFound(f"no folder {inner!r}")
        return random, inner, name
    raise NameNotFound(
        f"{name!r} is no folder and no .gguf file on disk, and LLM names start with 'hf:' or 'package:' "
        f"(for the hub's id: 'hf:{rest}')" + nearest(source, ["hf", "package", "random"])
    )


def _model(folder: str | Path, random: bool, options: dict[str, Any], revision: str | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if random:
        config = AutoConfig.from_pretrained(folder, revision=revision)
        return _random_model(config, options)
    return AutoModelForCausalLM.from_pretrained(folder, revision=revision, use_safetensors=True, **options)


def _random_model(config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if options["dtype"] == "auto":
        options = {**options, "dtype": config.dtype or torch.float32}
    model: Any = AutoModelForCausalLM
    return cast("PreTrainedModel", model.from_config(config, **options))


def _tokenizer(folder: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, revision=revision)


def converted(gguf: Path) -> Path:
    """The folder with the safetensors and tokenizer of a GGUF file, made now if it is not complete in the cache.

    Raises:
        FileFormatError: the file is no GGUF that transformers reads.
        MissingExtra: the `gguf` package is not installed.
    """
    folder = cache_folder() / "converted" / f"{gguf.stem}-{_file_key(gguf)}"
    if not _is_complete(folder):
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    require("gguf", "digits", "it reads GGUF files")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FileFormatError(f"{str(gguf)!r} is no GGUF file: it does not start with the letters GGUF")
    log.info("converting %s to safetensors in %s (once, about 20 s)", gguf.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {str(folder.parent)!r} cannot be made ({error}); set MMPEFT_CACHE"
        ) from error
    # where a GPU is present, newer versions would keep the weights packed, which cannot be saved as safetensors
    packed = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": packed(dequantize=True)} if packed else {}
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **dense
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:
            raise FileFormatError(f"transformers cannot read the GGUF file {str(gguf)!r}: {error}") from error
        # The tensors are dequantised already; the mark would make transformers refuse to save them.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        sizes = {p.name: p.stat().st_size for p in sorted(work.iterdir())}
        _write_synced(work / "complete.json", json.dumps({"gguf": gguf.name, "files": sizes}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(work, folder)
        except OSError:
            if not _is_complete(folder):  # otherwise another process was faster, and its copy is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether every file recorded when the folder was made is there with its size, and the weights open."""
    from safetensors import SafetensorError, safe_open

    try:
        files = read_json(folder / "complete.json")["files"]
        if any((folder / name).stat().st_size != size for name, size in files.items()):
            return False
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (FileFormatError, KeyError, OSError, SafetensorError):
        return False
    return True


def _file_key(path: Path) -> str:
    """A name for a file's content: its size and its first and last mebibyte."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{CONVERSION} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
