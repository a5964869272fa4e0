"""A folder of demonstrations: one file an episode, written whole or not at all, and a description of what they are.

    demos/push/demos.json                    environment, options, noise, versions
    demos/push/episode-00000007.safetensors  seed 7: arrays below, instruction and a checksum in the header
    demos/push/frames/<digest>/...           rendered pictures; may be deleted at any time
    demos/push/frames/imported/...           pictures that came with data of another format and cannot be rendered anew

An episode is complete by itself, so whatever kills a recording, the episodes before stay readable. Files are never
unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest

FORMAT = "mmpeft.demos/1"
Array = NDArray[Any]
#: array of an episode -> (dtype, number of axes, its first axis is T or T + 1); `snapshot` may be missing
ARRAYS: dict[str, tuple[str, int, int]] = {
    "state": ("float32", 2, 0),  # [T, S] proprioception before each action
    "action": ("", 0, 0),  # [T, A] float32 the expert's clean answer, or int64 [T]
    "executed": ("", 0, 0),  # the same with the noise that was carried out
    "reward": ("float32", 1, 0),  # [T]
    "success": ("bool", 1, 0),  # [T] after each action
    "snapshot": ("float64", 2, 1),  # [T + 1, D] simulator state before each action, and at the end
}
_NEEDED = ("state", "action", "executed", "reward", "success")


@dataclass(frozen=True)
class Episode:
    """One demonstration of T actions.

    Attributes:
        seed: decides the episode in its environment. instruction: what the robot was told.
        arrays: as `ARRAYS` says.
    """

    seed: int
    instruction: str
    arrays: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.arrays["state"])

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def check(self, where: str) -> Episode:
        """Itself, if its arrays fit together and are finite.

        Raises:
            FileFormatError: naming the array.
        """
        missing = [n for n in _NEEDED if n not in self.arrays]
        if missing or not len(self):
            raise FileFormatError(
                f"{where}: {'no arrays ' + ', '.join(missing) if missing else 'an episode without steps'}"
            )
        steps = len(self)
        for name, value in self.arrays.items():
            if name not in ARRAYS:
                raise FileFormatError(f"{where}: unknown array {name!r}{nearest(name, ARRAYS)}")
            dtype, axes, extra = ARRAYS[name]
            if (dtype and str(value.dtype) != dtype) or (axes and value.ndim != axes) or len(value) != steps + extra:
                shape = f"{dtype or 'any'} with {axes or 'some'} axes and length {steps + extra}"
                raise FileFormatError(f"{where}: {name} is {value.dtype} {value.shape}, expected {shape}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise FileFormatError(f"{where}: {name} holds NaN or infinity")
        if self.arrays["action"].shape != self.arrays["executed"].shape:
            raise FileFormatError(
                f"{where}: action {self.arrays['action'].shape}, executed {self.arrays['executed'].shape}"
            )
        return self


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_episode(path: Path, episode: Episode) -> None:
    """Write one episode.

    Raises:
        FileFormatError: its arrays do not fit together or are not finite; nothing is written.
    """
    from safetensors.numpy import save

    episode.check(path.name)
    arrays = {k: np.ascontiguousarray(v) for k, v in episode.arrays.items()}
    header = {
        "format": FORMAT,
        "seed": str(episode.seed),
        "instruction": episode.instruction,
        "sha256": _checksum(arrays),
    }
    atomic_write(path, save(arrays, header))


def read_episode(path: Path) -> Episode:
    """Read one episode.

    Raises:
        NameNotFound: no such file. FileFormatError: cut short, altered, or no episode.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NameNotFound(f"no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is cut short or no episode ({error}); record its seed again") from error
    if header.get("format") != FORMAT:
        raise FileFormatError(f"{path} is no demonstration of format {FORMAT}: {header.get('format')!r}")
    if header.get("sha256") != _checksum(arrays):
        raise FileFormatError(f"{path} was altered since it was written (checksum); record its seed again")
    return Episode(int(header["seed"]), header["instruction"], arrays).check(str(path))


def _checksum(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


class DemoFolder:
    """A folder of demonstrations of one environment.

    Args:
        path: the folder. description: what a new folder holds (`env`, `options`, `noise`, `describe`, `versions`);
            None opens one that exists.

    Raises:
        NameNotFound: no folder of demonstrations there. FileFormatError: a description that cannot be read.
        ConfigError: the folder holds demonstrations recorded with other settings.
    """

    def __init__(self, path: str | os.PathLike[str], description: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        file = self.path / "demos.json"
        if description is not None and not file.exists():
            body = {"format": FORMAT, **description}
            atomic_write(file, json.dumps(body, indent=1).encode())
        if not file.is_file():
            raise NameNotFound(f"{self.path} holds no demonstrations (no demos.json)")
        try:
            self.description: dict[str, Any] = json.loads(file.read_bytes())
            self.env = str(self.description["env"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{file} describes no demonstrations ({type(error).__name__}: {error})") from error
        if description is not None:
            given = json.loads(json.dumps(description))
            wrong = [k for k in ("env", "options", "noise") if self.description.get(k) != given.get(k)]
            if wrong:
                said = "; ".join(f"{k}: {self.description.get(k)} there, {given.get(k)} now" for k in wrong)
                raise ConfigError(f"{self.path} holds demonstrations of other settings ({said}); choose another folder")

    def file(self, seed: int) -> Path:
        """Where the episode of a seed is or would be."""
        return self.path / f"episode-{seed:010d}.safetensors"

    @property
    def seeds(self) -> list[int]:
        """Seeds of the recorded episodes, ascending."""
        return sorted(int(p.stem.split("-")[1]) for p in self.path.glob("episode-*.safetensors"))

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Episode]:
        return (self.read(seed) for seed in self.seeds)

    def read(self, seed: int) -> Episode:
        """The episode of a seed.

        Raises:
            NameNotFound: not recorded. FileFormatError: the file is damaged.
        """
        return read_episode(self.file(seed))

    @property
    def imported_views(self) -> tuple[str, ...]:
        """Names of the pictures that came with the data, or none."""
        return tuple(self.description.get("imported_views", ()))

    def imported(self, seed: int) -> Array:
        """Pictures [T, N, H, W, 3] that came with an episode, memory-mapped.

        Raises:
            FileFormatError: missing or damaged.
        """
        path = self.path / "frames" / "imported" / f"{seed:010d}.npy"
        found = open_pictures(path)
        if found is None:
            raise FileFormatError(f"{path} is missing or damaged; import the data again")
        return found

    def add(self, episode: Episode) -> Path:
        """Write an episode; the file of its seed is replaced."""
        path = self.file(episode.seed)
        write_episode(path, episode)
        return path


def write_pictures(path: Path, pictures: Array) -> None:
    """Write pictures uint8 [T, N, H, W, 3] as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pictures))
    atomic_write(path, buffer.getvalue())


def open_pictures(path: Path) -> Array | None:
    """The memory-mapped pictures, or None where the file is missing, cut short or something else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.ndim == 5 and array.dtype == np.uint8 else None
