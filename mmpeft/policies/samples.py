"""Training samples of a policy out of demonstrations: looking back over time, and pictures replaced by their cached
prefix.

    samples = PolicySamples(demonstrations, policy, cache="runs/prefix")
    samples.fill()                                       # every picture through the frozen prefix, once
    samples[0]                                           # id, prefix [T, copies, V, C, h, w], state [T, S], ...

Training moves pictures at random by up to `shift` pixels. A frozen prefix allows no augmentation after the fact, so
`copies` of each picture are cached: the first as it is, the others moved; training draws one of them, evaluation takes
the first. Without a cache each picture is moved anew. Each episode is
a file named by the digest of its pictures, of the encoder's prefix and of these options, so nothing stale is ever
found; half precision was measured to cost no success.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.encoders.cache import content_id
from mmpeft.errors import BadSample, ConfigError
from mmpeft.policies.prefix import random_shift

log = logging.getLogger("mmpeft")
Array = NDArray[Any]
BATCH = 32  # pictures a forward: larger batches leave the cache of a core and were measured to be three times slower
GPU_BATCH = 256  # on a GPU a forward costs its launches; larger ones fill its memory with blocks of ever other sizes


class PolicySamples(Dataset[dict[str, Any]]):
    """Map-style dataset over the steps of demonstrations (`mmpeft.data.demos.Demonstrations`, or any with its
    attributes `index` [(episode number, step)], `episodes` and `pictures(number)`).

    Args:
        demonstrations: samples with `state`, `instruction`, `action`, `action_mask` and, for policies that see,
            `images`; where a cache or the caller takes their place, `without_pictures()` is read, if there is one.
        policy: whose history, views and encoder the samples are for.
        cache: folder of the cached prefixes; None: pictures go through the whole encoder each time.
        copies, shift, seed: of the cached augmentation; 1 copy is none.
        look: False leaves pictures out.

    Raises:
        ConfigError: a cache for an encoder that is not split or not frozen before its split; numbers out of range.
    """

    def __init__(
        self, demonstrations: Any, policy: Any, *, cache: str | Path | None = None, copies: int = 4, shift: int = 5,
        seed: int = 0, look: bool = True,
    ) -> None:  # fmt: skip
        if copies < 1 or shift < 0:
            raise ConfigError(f"copies is at least 1 and shift not negative, given {copies} and {shift}")
        if cache is not None:
            if policy.encoder is None or policy.encoder.split is None:
                raise ConfigError("a prefix cache needs an encoder that was split: TappedEncoder(..., split=...)")
            policy.encoder.check_prefix()
        self.demonstrations, self.history, self.stride = demonstrations, policy.history, policy.execute
        self.sees = look and cache is None and "images" in policy.reads
        self.rows = demonstrations if self.sees else _without_pictures(demonstrations)
        self.cache = None if cache is None else Path(cache)
        self.copies, self.shift, self.seed = copies, shift, seed
        self.places = {place: i for i, place in enumerate(demonstrations.index)}
        self._encoder = policy.encoder if cache is not None else None
        self._key = self._encoder.fingerprint() if self._encoder is not None else ""
        self._files: dict[int, Path] = {}
        self._open: dict[int, Array] = {}

    def __len__(self) -> int:
        return len(self.demonstrations)

    def length_hint(self, index: int) -> int:
        """All samples are of one length."""
        return 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, step = self.demonstrations.index[index]
        steps = self.steps(step)
        missing = [s for s in steps if (number, s) not in self.places]
        if missing:
            raise ConfigError(f"looking back needs every step of an episode (every=1), step {missing[0]} is left out")
        now = self.rows[index]
        past = [now if s == step else self.rows[self.places[number, s]] for s in steps]
        sample = {k: now[k] for k in ("instruction", "action", "action_mask") if k in now}
        sample["id"] = f"{now.get('task', 'episode')} seed {now.get('seed', number)} step {step}"
        sample["state"] = _frames([p["state"] for p in past])
        if self.history > 1:
            sample["seen"] = torch.tensor([step - k * self.stride >= 0 for k in reversed(range(self.history))])
        if self.cache is not None:
            kept = self._prefix(number)
            sample["prefix"] = torch.from_numpy(np.stack([kept[s] for s in steps]))  # [T, copies, V, C, h, w]
        elif self.sees:
            sample["images"] = _frames([p["images"] for p in past])
        return sample

    def steps(self, step: int) -> list[int]:
        """The steps of its episode that the sample of `step` looks at, the latest last."""
        return [max(0, step - k * self.stride) for k in reversed(range(self.history))]

    # ---- the cached prefix -----------------------------------------------------------------------------------------

    def fill(self, *, progress: Callable[[int, int], None] | None = None) -> float:
        """Encode the episodes that are not on disk yet; gives the seconds. `progress(done, of)` is called on the way."""
        began = time.perf_counter()
        count = len(self.demonstrations.episodes) if self.cache is not None else 0
        for number in range(count):
            self._prefix(number)
            if progress is not None:
                progress(number + 1, count)
        seconds = time.perf_counter() - began
        if self.cache is not None:
            log.info("prefix cache %s: %d episodes ready in %.1f s", self.cache, count, seconds)
        return seconds

    def _prefix(self, number: int) -> Array:
        """[steps, copies, V, C, h, w] fp16 of an episode, memory-mapped."""
        if number not in self._open:
            path = self._file(number)
            found = _read(path)
            if found is None:
                if self._encoder is None:
                    raise ConfigError("the prefix cache was not filled before worker processes took it: call fill()")
                pictures = torch.from_numpy(np.array(self.demonstrations.pictures(number)))
                self._write(path, self._encode(pictures, number))
                found = _read(path)
                if found is None:
                    raise ConfigError(f"{path} cannot be read back right after it was written")
            self._open[number] = found
        return self._open[number]

    def _file(self, number: int) -> Path:
        assert self.cache is not None
        if number not in self._files:
            pictures = content_id(np.array(self.demonstrations.pictures(number)))
            about = [pictures, self._key, self.copies, self.shift, self.seed]
            self._files[number] = self.cache / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.npy"
        return self._files[number]

    def _encode(self, pictures: Tensor, number: int) -> Array:
        """Bytes [steps, V, H, W, 3] to [steps, copies, V, C, h, w]."""
        seed = self.seed * 1_000_003 + number
        found = augmented_prefix(self._encoder, pictures, copies=self.copies, shift=self.shift, seed=seed)
        array: Array = found.cpu().numpy()
        return array

    @staticmethod
    def _write(path: Path, array: Array) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes map the files themselves and need no encoder."""
        return {**self.__dict__, "_encoder": None, "_open": {}}


def augmented_prefix(encoder: Any, pictures: Tensor, *, copies: int, shift: int, seed: int) -> Tensor:
    """Pictures, bytes [steps, V, H, W, 3], through a frozen prefix: [steps, copies, V, C, h, w] in half precision, on the
    encoder's device; the first copy as they are, the others moved by up to `shift` pixels."""
    steps, views = pictures.shape[:2]
    flat, generator = pictures.flatten(0, 1), torch.Generator().manual_seed(seed)
    moved = torch.cat([flat, *(random_shift(flat, generator, pixels=shift) for _ in range(copies - 1))])
    batch = GPU_BATCH if next(encoder.parameters()).is_cuda else BATCH
    parts = [moved[i : i + batch] for i in range(0, len(moved), batch)]
    maps = torch.cat([encoder.prefix(encoder.pixels(part)).half() for part in parts])
    return maps.view(copies, steps, views, *maps.shape[1:]).transpose(0, 1).contiguous()


class PolicyProcessor:
    """Samples of `PolicySamples` to batches of `Policy.forward`; refuses by name what does not fit.

    Args:
        action_dim: of the robot (for discrete actions their number). state_dim: of the robot, 0 if none is read.
        shift: pixels by which pictures (not cached prefixes) move in training.
    """

    def __init__(self, *, action_dim: int, state_dim: int, chunk: int, discrete: bool, shift: int = 0) -> None:
        self.action_dim, self.state_dim, self.chunk, self.discrete = action_dim, state_dim, chunk, discrete
        self.shift = shift

    def encode(self, sample: dict[str, Any], *, train: bool) -> dict[str, Any]:
        """Raises BadSample: an action or a state of another size, or with NaN."""
        name, action = sample["id"], torch.as_tensor(sample["action"])
        shape = (self.chunk,) if self.discrete else (self.chunk, self.action_dim)
        if tuple(action.shape) != shape:
            raise BadSample(f"{name}: actions have shape {list(action.shape)}, the policy's chunk is {list(shape)}")
        item: dict[str, Any] = {k: v for k, v in sample.items() if k in ("id", "instruction", "images", "seen")}
        mask = sample.get("action_mask")
        item["action_mask"] = torch.ones(self.chunk, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        real = item["action_mask"].numpy()  # NumPy: less overhead a call than torch on so few numbers
        if not real.any():
            raise BadSample(f"{name}: no step of its chunk is real")
        if self.discrete:
            wrong = (action < 0) | (action >= self.action_dim) | bool(action.is_floating_point())
            if bool((wrong & item["action_mask"]).any()):
                valid = f"whole numbers 0 .. {self.action_dim - 1}"
                raise BadSample(f"{name}: discrete actions are {valid}, given {action.tolist()}")
        elif not np.isfinite(action.float().numpy()[real]).all():
            raise BadSample(f"{name}: the demonstrated action holds NaN or infinite values")
        item["action"] = action.long() if self.discrete else action.float()
        if self.state_dim:
            state = torch.as_tensor(sample["state"]).float()
            if state.shape[-1] != self.state_dim or not np.isfinite(state.numpy()).all():
                size = list(state.shape)
                raise BadSample(f"{name}: expected a finite state of {self.state_dim} numbers, given {size}")
            item["state"] = state
        if train and self.shift and "images" in item:
            images = item["images"]  # [T, V, H, W, 3]
            moved = random_shift(images.flatten(0, 1), torch.default_generator, pixels=self.shift)
            item["images"] = moved.view_as(images)
        if "prefix" in sample:
            copies = sample["prefix"]  # [T, copies, V, C, h, w]
            chosen = int(torch.randint(copies.shape[1], ())) if train else 0
            item["prefix"] = copies[:, chosen]
        return item

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacked; `ids` and `instruction` stay lists."""
        batch: dict[str, Any] = {"ids": [i["id"] for i in items]}
        for key in items[0]:
            if key == "id":
                continue
            values = [i[key] for i in items]
            batch[key] = torch.stack(values) if isinstance(values[0], Tensor) else values
        return batch


def _without_pictures(demonstrations: Any) -> Any:
    blind = getattr(demonstrations, "without_pictures", None)
    return demonstrations if blind is None else blind()


def _frames(past: list[Tensor]) -> Tensor:
    """[T, ...]; one frame as a view."""
    return past[0].unsqueeze(0) if len(past) == 1 else torch.stack(past)


def _read(path: Path) -> Array | None:
    """The memory-mapped array, or None where the file is missing or damaged."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == np.float16 else None
