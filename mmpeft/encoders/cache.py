"""The frozen-feature cache: each sample goes through a frozen encoder once, and later epochs read its tokens from disk.

    cache = FeatureCache(encoder, "features/")
    cache.fill([("cat", "cat.jpg"), ("dog", photo)])
    cache["cat"]                                        # Tensor [T, d_v], a view of a memory-mapped file

Tokens are valid only for the encoder, preprocessing and sample that made them. So they live under a folder named by the
encoder's fingerprint (weights, layer, pooling, size, preprocessing): another encoder finds an empty folder, never stale
tokens. An encoder with a trainable part, an attached adapter or a random augmentation is refused, because its tokens
change from step to step. A sample is named by an id; `content_id` names it by its bytes where ids are not trusted.

A file `tokens-*.safetensors` holds the tokens of some hundred samples, written whole or not at all (temporary file,
fsync, rename), so an interrupted `fill` goes on where it stopped, and a damaged file is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmpeft.encoders.base import Encoder, is_frozen, log
from mmpeft.errors import BadSample, BaseMismatch, ConfigError, NameNotFound, nearest

SHARD_BYTES = 64 << 20


class FeatureCache:
    """Tokens of samples under a frozen encoder, on disk, by sample id.

    Args:
        encoder: frozen, without adapters inside.
        folder: where caches are kept; this encoder's is `<folder>/<fingerprint>`.
        dtype: of the stored tokens, such as torch.bfloat16; None is the encoder's own.

    Raises:
        ConfigError: the encoder has trainable parameters or adapters, or its preprocessing is random.
    """

    def __init__(self, encoder: Encoder, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        _refuse_changing(encoder)
        self.encoder: Encoder | None = encoder
        self.dtype = dtype
        self.fingerprint = encoder.fingerprint()
        self.folder = Path(folder) / (
            self.fingerprint[:20] + (f"-{str(dtype).removeprefix('torch.')}" if dtype else "")
        )
        self._places: dict[str, tuple[Path, int, int]] = {}  # id -> file, first row, end row
        self._open: dict[Path, Tensor] = {}
        self._read_folder()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sample: object) -> bool:
        return str(sample) in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, sample: str | int) -> Tensor:
        """The tokens [T, d_v] of a sample.

        Raises:
            NameNotFound: it was never filled in.
        """
        key = str(sample)
        if key not in self._places:
            raise NameNotFound(
                f"sample {key!r} is not among the {len(self)} of {str(self.folder)!r}{nearest(key, self)}"
            )
        path, start, end = self._places[key]
        return self._tokens(path)[start:end]

    def fill(
        self,
        samples: Sequence[tuple[str | int, Any]],
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: bool = True,
    ) -> list[Tensor]:
        """Encode the samples that are not there yet, and return the tokens of all, in order.

        Args:
            samples: pairs (id, raw), `raw` being whatever the encoder's `preprocess` takes.
            batch_size: samples a forward.
            num_workers: processes that preprocess.
            progress: show a progress bar.

        Raises:
            ConfigError, BaseMismatch: the encoder has changed since the cache was made.
            BadSample: a raw input that cannot be read; the message names its id.
        """
        self.check(self.encoder)
        missing = {str(key): raw for key, raw in samples if str(key) not in self._places}
        started = time.perf_counter()
        written = sum(self._encode(missing, batch_size, num_workers, progress)) if missing else 0
        seconds = time.perf_counter() - started
        log.info(
            "feature cache %s: %d samples encoded in %.1f s (%.0f a second), %d found, %.1f MB written",
            self.folder, len(missing), seconds, len(missing) / max(seconds, 1e-9), len(samples) - len(missing), written / 1e6,
        )  # fmt: skip
        return [self[key] for key, _ in samples]

    def check(self, encoder: Encoder | None) -> None:
        """Refuse an encoder that would not give these tokens.

        Raises:
            ConfigError: it has a trainable part, an adapter or a random preprocessing.
            BaseMismatch: its weights or options are others.
        """
        if encoder is None:
            raise ConfigError("this cache came from another process without its encoder: it can be read, not filled")
        _refuse_changing(encoder)
        now = encoder.fingerprint()
        if now != self.fingerprint:
            raise BaseMismatch(
                f"the cache {str(self.folder)!r} is of an encoder with fingerprint {self.fingerprint}, {encoder.name!r} "
                f"now has {now}: its weights or options have changed; make a new FeatureCache"
            )

    def statistics(self, samples: Iterable[str | int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [d_v] of each channel over the tokens of the samples (None: of all)."""
        keys = list(self) if samples is None else list(samples)
        if not keys:
            raise ConfigError("statistics need at least one sample")
        total = square = torch.zeros((), dtype=torch.float64)
        count = 0
        for key in keys:
            tokens = self[key].double()
            total, square, count = total + tokens.sum(0), square + tokens.square().sum(0), count + len(tokens)
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp(min=0).sqrt().float()

    def _encode(self, missing: dict[str, Any], batch_size: int, workers: int, progress: bool) -> Iterator[int]:
        """Encode batch by batch, write a file whenever enough has come together, yield the bytes written."""
        assert self.encoder is not None
        device = next(self.encoder.backbone.parameters()).device
        loader = torch.utils.data.DataLoader(
            _Preprocessed(list(missing.items()), self.encoder.preprocess),
            batch_size=batch_size, num_workers=workers, collate_fn=_collate,
        )  # fmt: skip
        keys: list[str] = []
        parts: list[Tensor] = []
        held = 0
        for batch_keys, x, mask in _track(loader, progress, f"{self.encoder.name} features"):
            with torch.no_grad():
                tokens, valid = self.encoder(x.to(device), None if mask is None else mask.to(device))
            tokens = tokens.to(self.dtype or tokens.dtype).cpu()
            for i, key in enumerate(batch_keys):
                row = tokens[i] if valid is None else tokens[i][valid[i].cpu()]
                keys.append(key)
                parts.append(row)
                held += row.numel() * row.element_size()
            if held >= SHARD_BYTES:
                yield self._write(keys, parts)
                keys, parts, held = [], [], 0
        if keys:
            yield self._write(keys, parts)

    def _write(self, keys: list[str], parts: list[Tensor]) -> int:
        """One file, whole or not at all."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "encoder.json").exists() and self.encoder is not None:
            about = {"name": self.encoder.name, "fingerprint": self.fingerprint, "config": self.encoder.config()}
            (self.folder / "encoder.json").write_text(json.dumps(about, indent=1, default=str))
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=self.folder)
        os.close(handle)
        try:
            lengths = json.dumps([len(p) for p in parts])
            index = {"ids": json.dumps(keys), "lengths": lengths, "fingerprint": self.fingerprint}
            save_file({"tokens": torch.cat(parts)}, temporary, metadata=index)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
            path = self.folder / f"tokens-{name}.safetensors"
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._open.pop(path, None)
        self._read_file(path)
        return path.stat().st_size

    def _read_folder(self) -> None:
        from safetensors import SafetensorError

        for path in sorted(self.folder.glob("tokens-*.safetensors")):
            try:
                self._read_file(path)
            except (
                SafetensorError,
                OSError,
                ValueError,
                KeyError,
            ) as error:  # truncated or foreign: the samples are encoded again
                log.warning("feature cache file %s is damaged (%s) and will be made again", path, error)
                path.unlink()

    def _read_file(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            rows = file.get_slice("tokens").get_shape()[0]
        lengths = json.loads(about["lengths"])
        if about["fingerprint"] != self.fingerprint or sum(lengths) != rows:
            raise ConfigError("it is of another encoder, or its lengths do not add up")
        start = 0
        for key, length in zip(json.loads(about["ids"]), lengths, strict=True):
            self._places[key] = (path, start, start + length)
            start += length

    def _tokens(self, path: Path) -> Tensor:
        """The tokens [N, d_v] of a file, memory-mapped."""
        if path not in self._open:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                self._open[path] = file.get_tensor("tokens")
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        """A worker process gets the index alone: it maps the files itself, and needs no encoder to read."""
        return {**self.__dict__, "encoder": None, "_open": {}}


def content_id(raw: Any) -> str:
    """An id for a sample by its content: a path's bytes, an array's or tensor's values, a PIL image's pixels, a text."""
    digest = hashlib.sha256(type(raw).__name__.encode())
    if isinstance(raw, Path) or (isinstance(raw, str) and len(raw) < 4096 and os.path.isfile(raw)):
        digest = hashlib.sha256(Path(raw).read_bytes())
    elif isinstance(raw, str):
        digest.update(raw.encode())
    elif isinstance(raw, Tensor):
        digest.update(f"{raw.shape}{raw.dtype}".encode())
        digest.update(raw.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(raw, "tobytes"):  # numpy arrays and PIL images
        shape = getattr(raw, "shape", None) or (raw.size, raw.mode)
        digest.update(f"{shape}{getattr(raw, 'dtype', '')}".encode())
        digest.update(raw.tobytes())
    else:
        raise BadSample(f"content_id reads paths, texts, arrays, tensors and PIL images, not {type(raw).__name__}")
    return digest.hexdigest()[:24]


class _Preprocessed(torch.utils.data.Dataset[tuple[str, Tensor]]):
    """Samples (id, raw) as (id, tensor)."""

    def __init__(self, samples: list[tuple[str, Any]], preprocess: Any) -> None:
        self.samples = samples
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        key, raw = self.samples[index]
        try:
            return key, self.preprocess(raw)
        except BadSample as error:
            raise BadSample(f"sample {key!r}: {error}") from error


def _collate(batch: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor, Tensor | None]:
    """Ids, inputs and mask; waveforms and ids of several lengths are right-padded with zeros."""
    keys = [key for key, _ in batch]
    inputs = [x for _, x in batch]
    if all(x.shape == inputs[0].shape for x in inputs):
        return keys, torch.stack(inputs), None
    if any(x.ndim != 1 for x in inputs):
        raise BadSample(f"pictures of several sizes in one batch: {sorted({tuple(x.shape) for x in inputs})}")
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in inputs], batch_first=True)
    return keys, pad_sequence(inputs, batch_first=True), mask


def _refuse_changing(encoder: Encoder) -> None:
    if not is_frozen(encoder):
        raise ConfigError(
            f"{encoder.name!r} has trainable parameters or an adapter inside, so its tokens change as it trains and must "
            f"not be cached; cache before attaching, or train without a cache"
        )
    if getattr(encoder.preprocess, "random", False):
        raise ConfigError(
            f"the preprocessing of {encoder.name!r} is random (an augmentation): its tokens must not be cached"
        )


def _track(loader: torch.utils.data.DataLoader[Any], progress: bool, title: str) -> Iterable[Any]:
    if not progress:
        return loader
    from rich.progress import track

    return track(loader, description=title, total=len(loader))
