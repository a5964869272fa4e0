"""Pictures of demonstrations, rendered from the stored states when first asked for and kept beside them.

    frames = FrameCache("demos/push", views=("close",), image_size=96)
    frames[7]                                            # uint8 [T, N, H, W, 3] of seed 7, memory-mapped

The folder's name is a digest of everything that decides a pixel (views, size, shift), so another camera never finds
these pictures. Where a simulator has no states to restore, the recorded actions are replayed instead, and the states
must agree.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.data.demos.record import check_replay
from mmpeft.data.demos.store import DemoFolder, Episode, open_pictures, write_pictures
from mmpeft.errors import ConfigError
from mmpeft.policies.envs import worker_context

log = logging.getLogger("mmpeft")


class FrameCache:
    """Pictures by seed of one folder of demonstrations.

    Args:
        folder: of demonstrations. options: of `make_env` that decide pictures: views, image_size, shift.

    Raises:
        NameNotFound, ConfigError: as `make_env`. NoGL: at the first picture that is not cached yet, where nothing can
            draw.
    """

    def __init__(self, folder: str | Path | DemoFolder, **options: Any) -> None:
        self.store = folder if isinstance(folder, DemoFolder) else DemoFolder(folder)
        self.options = {**self.store.description.get("options", {}), **options}
        self._env: Any = None
        from mmpeft.policies.envs import make_env

        self._env = make_env(self.store.env, **self.options)
        if not self._env.views:
            raise ConfigError("a frame cache needs at least one view")
        self.shape = tuple(self._env.observation_space["images"].shape)
        described = self._env.describe()
        self.folder = self.store.path / "frames" / str(described.get("looks") or _name(described))

    def __getitem__(self, seed: int) -> NDArray[np.uint8]:
        """[T, N, H, W, 3] of an episode; rendered if it is not there, or if its file is damaged."""
        path = self.folder / f"{seed:010d}.npy"
        found = open_pictures(path)
        if found is None or found.shape[1:] != self.shape:
            write_pictures(path, self.render(self.store.read(seed)))
            found = open_pictures(path)
            assert found is not None
        return found

    def fill(self, *, workers: int = 0, seeds: Sequence[int] | None = None) -> float:
        """Render what is missing; frames a second (0 if nothing was).

        Args:
            workers: processes that draw; 0 draws here. seeds: only these episodes.
        """
        began, drawn = time.perf_counter(), 0
        wanted = self.store.seeds if seeds is None else seeds
        missing = [s for s in wanted if not (self.folder / f"{s:010d}.npy").exists()]
        if workers and len(missing) > 1:
            parts = [missing[i::workers] for i in range(min(workers, len(missing)))]
            given = [(str(self.store.path), self.options, part) for part in parts]
            with ProcessPoolExecutor(len(parts), mp_context=worker_context()) as pool:
                drawn = sum(pool.map(_render_seeds, given))
        else:
            drawn = sum(len(self[seed]) for seed in missing)
        seconds = time.perf_counter() - began
        if drawn:
            log.info("rendered %d frames of %s in %.1f s", drawn, self.store.path, seconds)
        return drawn / seconds if drawn else 0.0

    def render(self, episode: Episode) -> NDArray[np.uint8]:
        """Pictures before each action, uint8 [T, N, H, W, 3].

        Raises:
            ReplayMismatch: a recording without simulator states that does not replay.
        """
        env = self._env
        pictures = np.empty((len(episode), *self.shape), np.uint8)
        if "snapshot" in episode.arrays:
            env.begin(episode.seed)  # places what is no state but model: the goal, a wall, the looks of the day
            for step in range(len(episode)):
                env.restore(episode["snapshot"][step])
                pictures[step] = env.pictures()
            return pictures
        check_replay(env, episode)
        env.begin(episode.seed)
        for step in range(len(episode)):
            pictures[step] = env.pictures()
            env.advance(episode["executed"][step])
        return pictures

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""
        self._env.close()


def _render_seeds(given: tuple[str, dict[str, Any], list[int]]) -> int:
    """Render some episodes in a worker process; how many frames they have."""
    os.environ.setdefault("LP_NUM_THREADS", "1")
    folder, options, seeds = given
    cache = FrameCache(folder, **options)
    frames = sum(len(cache[seed]) for seed in seeds)
    cache.close()
    return frames


def _name(described: Mapping[str, Any]) -> str:
    from mmpeft.policies.envs.views import digest

    return digest(described["name"], described["images"])
