"""What a picture shows, as data: the view (camera, crop, size), the shift of the world's looks, the sensor noise.

They are values without a simulator, so that YAML files, adapters and frame caches can hold them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, NameNotFound, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """One camera's picture.

    Args:
        camera: name of a camera in the model.
        position: moves it there, (x, y, z) in metres.
        crop: (x, y, side) of the square that is kept, as fractions of the upright picture; x to the right, y down.
        supersample: drawn so many times larger and averaged down, which keeps thin things visible.
    """

    camera: str = "corner2"
    position: tuple[float, float, float] | None = None
    crop: tuple[float, float, float] | None = None
    supersample: int = 1

    def __post_init__(self) -> None:
        for name, length in (("position", 3), ("crop", 3)):
            value = getattr(self, name)
            if value is not None:
                if len(value) != length or not np.isfinite(np.asarray(value, float)).all():
                    raise ConfigError(f"{name} needs {length} finite numbers, got {value!r}")
                object.__setattr__(self, name, tuple(float(v) for v in value))
        if self.crop is not None:
            x, y, side = self.crop
            if min(x, y) < 0 or side <= 0 or max(x, y) + side > 1 + 1e-9:
                raise ConfigError(f"crop (x, y, side) must lie within 0..1, got {self.crop}")
        if not isinstance(self.supersample, int) or not 1 <= self.supersample <= 4:
            raise ConfigError(f"supersample must be 1, 2, 3 or 4, got {self.supersample!r}")


#: views by name; any camera of the model is a view too
VIEWS: dict[str, View] = {
    # near enough that the object is a dozen pixels wide at 96: nothing of the arm's reach is cut off
    "close": View("corner2", position=(0.75, 0.075, 0.7), crop=(0.30, 0.17, 0.66), supersample=2),
}


@dataclass(frozen=True)
class Shift:
    """How the world's looks differ from the simulator's own; physics is untouched.

    Args:
        camera: every camera moves by up to so many metres along each axis. light: brightness changes by up to this
            share, and lights move by up to so many metres. colour: each material's red, green and blue change by up to
            this share.
        seed: None draws anew each episode, from the episode's seed (domain randomisation); a number is one fixed other
            world.
    """

    camera: float = 0.0
    light: float = 0.0
    colour: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, top in (("camera", 1.0), ("light", 1.0), ("colour", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= top:
                raise ConfigError(f"shift.{name} must be 0 to {top}, got {value!r}")

    def rng(self, episode_seed: int) -> np.random.Generator:
        """The generator of an episode's looks, independent of the one that places its objects."""
        return np.random.default_rng([7, episode_seed] if self.seed is None else [8, self.seed])


@dataclass(frozen=True)
class Noise:
    """Sensor noise of an observation, from the episode's seed.

    Args:
        pixels: standard deviation of Gaussian noise on pictures, in grey levels of 255.
        state: standard deviation on proprioception, in its own units. drop: chance that a picture arrives black.
    """

    pixels: float = 0.0
    state: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if min(self.pixels, self.state) < 0 or not 0 <= self.drop <= 1:
            raise ConfigError(f"noise needs pixels, state >= 0 and drop within 0..1, got {self}")


def as_dataclass(kind: type[T], value: T | Mapping[str, Any] | None) -> T | None:
    """A `View`, `Shift` or `Noise` given as itself or as a mapping (from YAML).

    Raises:
        NameNotFound: a key that is no field. ConfigError: neither a mapping nor the class.
    """
    if value is None or isinstance(value, kind):
        return value
    fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a {kind.__name__} or a mapping of {', '.join(fields)}, got {value!r}")
    for key in value:
        if key not in fields:
            raise NameNotFound(f"{kind.__name__} has no {key!r}; it has {', '.join(fields)}{nearest(str(key), fields)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def as_views(views: Sequence[str | View | Mapping[str, Any]] | str, cameras: Sequence[str]) -> tuple[View, ...]:
    """Views given by name, as `View`, or as mappings; every camera must be one of `cameras`.

    Raises:
        NameNotFound: neither a named view nor a camera of this model.
    """
    found = []
    for view in [views] if isinstance(views, str | View) else views:
        if isinstance(view, str):
            if view not in VIEWS and view not in cameras:
                names = [*VIEWS, *cameras]
                raise NameNotFound(f"no view or camera {view!r}; there are {', '.join(names)}{nearest(view, names)}")
            view = VIEWS.get(view) or View(view)
        made = as_dataclass(View, view)
        assert made is not None
        if made.camera not in cameras:
            raise NameNotFound(
                f"no camera {made.camera!r}; there are {', '.join(cameras)}{nearest(made.camera, cameras)}"
            )
        found.append(made)
    return tuple(found)


def digest(*values: Any) -> str:
    """A short name for what decides a picture, the same in every process."""
    plain = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v for v in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=list).encode()).hexdigest()[:16]


def shrink(picture: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """[H*f, W*f, 3] averaged over f x f blocks and rounded to [H, W, 3]."""
    if factor == 1:
        return picture
    h, w = picture.shape[0] // factor, picture.shape[1] // factor
    blocks = picture.reshape(h, factor, w, factor, 3).astype(np.uint16)
    rounded: NDArray[np.uint8] = ((blocks.sum((1, 3)) + factor * factor // 2) // (factor * factor)).astype(np.uint8)
    return rounded
