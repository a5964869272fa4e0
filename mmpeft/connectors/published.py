"""Published connector weights: reading tensors from wherever they were published, and LLaVA's projector.

Files are read tensor by tensor and never unpickled into code (`.bin`, `.pth`, `.pt`: `weights_only`). Of a sharded
folder only the shards that hold the wanted tensors are opened, and only they need be there. Nothing is changed in the
connector unless everything it needs was found, has its shape, and is finite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft.connectors.mlp import MLP
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest

PICKLED = (".bin", ".pth", ".pt")
# What the transformers Trainer leaves beside the weights: pickles of its own classes, no tensors of the model.
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
Reader = Callable[[str], Tensor]

# Where a LLaVA projector's Linears stand, and what comes before the i-th of them.
PROJECTOR_KEYS = (
    re.compile(r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.(\d+)\.(weight|bias)"),  # LLaVA: 0, 2, ...
    re.compile(r"(?:model\.)?multi_modal_projector\.linear_(\d+)\.(weight|bias)"),  # transformers: 1, 2
)


def load_mlp(connector: MLP, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load a LLaVA-1.5 projector into a built MLP: LLaVA's `mm_projector.bin`, `non_lora_trainables.bin` or whole model,
    or transformers' names.

    Args:
        source: a folder, a file or a state dict.

    Raises:
        ConfigError: the connector is not built.
        NameNotFound: no such file.
        FileFormatError: no projector inside, or one of another depth or width, or values that are not finite.
    """
    if not connector.built:
        raise ConfigError("build the MLP before loading weights into it")
    keys, read, origin = open_tensors(source)
    matches = next((found for p in PROJECTOR_KEYS if (found := [m for k in keys if (m := p.fullmatch(k))])), None)
    if matches is None:
        raise FileFormatError(
            f"{origin} holds no LLaVA projector ({len(keys)} tensors, e.g. {', '.join(sorted(keys)[:3])})"
        )
    order = sorted({int(m[1]) for m in matches})
    linears = [i for i, layer in enumerate(connector.layers) if isinstance(layer, nn.Linear)]
    if len(order) != len(linears):
        raise FileFormatError(
            f"{origin} holds a projector of {len(order)} Linears, this MLP has depth={connector.depth}"
        )
    own = connector.layers.state_dict()
    tensors = {f"{linears[order.index(int(m[1]))]}.{m[2]}": read(m[0]) for m in matches}
    if set(tensors) != set(own):
        raise FileFormatError(f"{origin} has {sorted(tensors)}, this MLP needs {sorted(own)}")
    require_finite_and_shaped(tensors, own, origin)
    connector.layers.load_state_dict(tensors)


def require_finite_and_shaped(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Raise FileFormatError for a tensor of another shape than its namesake in `own`, or with non-finite values."""
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise FileFormatError(f"{origin}: {name} is {list(tensor.shape)}, expected {list(own[name].shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise FileFormatError(f"{origin}: {name} has values that are not finite")


# ---- files ----------------------------------------------------------------------------------------------------------


def open_tensors(source: str | Path | Mapping[str, Tensor]) -> tuple[list[str], Reader, str]:
    """Names in a state dict, file or folder; a function that reads one tensor; and how to call the source in errors."""
    if isinstance(source, Mapping):
        return list(source), source.__getitem__, "the given state dict"
    path = Path(source)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise NameNotFound(f"no such file or folder: {path}{nearest(path.name, siblings)}")
    index = next((i for kind in ("safetensors", "bin") for i in sorted(path.glob(f"*.{kind}.index.json"))), None)
    if index is not None:
        shards = _read_index(index)
        return list(shards), lambda key: _read_shard(path / shards[key], key, index), str(source)
    files = [path]
    if path.is_dir():
        pickled = (p for p in path.glob("*") if p.suffix in PICKLED and p.name not in NO_WEIGHTS)
        files = sorted(path.glob("*.safetensors")) or sorted(pickled)
        if not files:
            raise NameNotFound(f"no .safetensors, .bin, .pth or .pt file in {path}")
    readers: dict[str, Reader] = {}
    for file in files:
        readers |= _open(file)
    return list(readers), lambda key: readers[key](key), str(source)


def _open(file: Path) -> dict[str, Reader]:
    return _open_pickled(file) if file.suffix in PICKLED else _open_safetensors(file)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint, from its `*.index.json`."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): Path(file).name for key, file in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{index} is no index of shards ({type(error).__name__}: {error})") from error


def _read_shard(file: Path, key: str, index: Path) -> Tensor:
    if not file.is_file():
        raise NameNotFound(f"{index} says that {key} is in {file.name}, which is not there: fetch that shard too")
    readers = _open(file)
    if key not in readers:
        raise FileFormatError(f"{index} says that {key} is in {file.name}, which does not hold it")
    return readers[key](key)


def _open_safetensors(file: Path) -> dict[str, Reader]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            keys = list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{file} is not a readable safetensors file: {error}") from error

    def read(key: str) -> Tensor:
        with safe_open(str(file), framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(key)
        return tensor

    return dict.fromkeys(keys, read)


def _open_pickled(file: Path) -> dict[str, Reader]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise FileFormatError(f"{file} is not a readable file of tensors: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]  # LAVIS wraps its state dict
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    return dict.fromkeys(tensors, tensors.__getitem__)
