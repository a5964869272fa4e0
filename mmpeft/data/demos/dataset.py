"""Demonstrations as training samples: the observation at a step, and the chunk of actions the expert took from there.

    data = Demonstrations(["demos/push", "demos/reach"], views=("close",), image_size=96, chunk=8)
    data[12]    # images uint8 [N, H, W, 3], state [S], instruction, action [8, A], action_mask [8], task, seed, step

The keys and layouts are those of an environment's observation, so a policy's `act` and its loss see the same thing. A
chunk that runs over the end of its episode repeats the last action, and `action_mask` tells the real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.data.demos.frames import FrameCache
from mmpeft.data.demos.store import DemoFolder, Episode
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest


class Demonstrations(Dataset[dict[str, Any]]):
    """Map-style dataset over every step of every episode; picklable before pictures are rendered, fork-safe after
    `render`.

    Args:
        folders: one or several, with equal action and state sizes. chunk: actions a sample.
        views, image_size, shift: as of `make_env`; views=() gives no pictures (state and blind policies). Of imported
            data, `views` picks among the pictures that came with it.
        episodes: use only the first so many of each folder (by seed).
        wording: None keeps the recorded instruction; "canonical", "train" or "heldout" asks `sentences.py` (Metaworld
            only).
        every: a sample at every so-manieth step.

    Raises:
        NameNotFound: no demonstrations there. FileFormatError: a damaged episode. ConfigError: folders that do not fit
            together, a count out of range, or fewer episodes than asked for.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        *,
        chunk: int = 8,
        views: Sequence[Any] | str = (),
        image_size: int = 96,
        shift: Any = None,
        episodes: int | None = None,
        wording: str | None = None,
        every: int = 1,
    ) -> None:
        given = [folders] if isinstance(folders, str | Path) else list(folders)
        for name, value in (("chunk", chunk), ("every", every), ("folders", len(given)), ("episodes", episodes or 1)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.chunk, self.wording = chunk, wording
        self.stores = [DemoFolder(f) for f in given]
        self._pictures: dict[str, Any] | None = None
        if len(views):
            self._pictures = {
                "views": views,
                "image_size": image_size,
                **({"shift": shift} if shift is not None else {}),
            }
        self._caches: dict[int, FrameCache] = {}
        self._mapped: dict[int, NDArray[np.uint8]] = {}  # mapping a file for every sample was half the cost of a batch
        self.episodes: list[tuple[int, Episode]] = []
        for i, store in enumerate(self.stores):
            seeds = store.seeds[:episodes]
            if not seeds or (episodes is not None and len(seeds) < episodes):
                raise ConfigError(f"{store.path} has {len(seeds)} episodes, {episodes or 'at least 1'} are needed")
            self.episodes += [(i, store.read(seed)) for seed in seeds]
        sizes = {(e["state"].shape[1:], e["action"].shape[1:], str(e["action"].dtype)) for _, e in self.episodes}
        if len(sizes) > 1:
            raise ConfigError(f"the folders have different (state, action, kind of action): {sorted(map(str, sizes))}")
        self.index = [(n, t) for n, (_, e) in enumerate(self.episodes) for t in range(0, len(e), every)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, step = self.index[i]
        where, episode = self.episodes[number]
        actions = episode["action"][step : step + self.chunk]
        real = len(actions)
        if real < self.chunk:
            actions = np.concatenate([actions, np.repeat(actions[-1:], self.chunk - real, axis=0)])
        sample: dict[str, Any] = {
            "state": torch.from_numpy(np.array(episode["state"][step])),
            "instruction": self.instruction(number),
            "action": torch.from_numpy(np.array(actions)),
            "action_mask": torch.arange(self.chunk) < real,
            "task": self.stores[where].env,
            "seed": episode.seed,
            "step": step,
        }
        if self._pictures is not None:
            sample["images"] = torch.from_numpy(np.array(self.pictures(number)[step]))
        return sample

    def without_pictures(self) -> Demonstrations:
        """The same samples without `images`, for those who read `pictures` themselves or need none."""
        blind = copy.copy(self)
        blind._pictures = None
        return blind

    def instruction(self, number: int) -> str:
        """What the robot is told in episode `number`."""
        where, episode = self.episodes[number]
        if self.wording is None:
            return episode.instruction
        from mmpeft.policies.envs import split_name
        from mmpeft.policies.envs.sentences import sentence

        family, task = split_name(self.stores[where].env)
        if family != "metaworld":
            raise ConfigError(f"wording is for Metaworld's tasks; {family} words its own instructions")
        return sentence(task, self.wording, episode.seed)

    def pictures(self, number: int) -> NDArray[np.uint8]:
        """[T, N, H, W, 3] of episode `number`, rendered on first use.

        Raises:
            ConfigError: the dataset was made without views. FileFormatError: pictures of another length than the
                episode.
        """
        if number in self._mapped:
            return self._mapped[number]
        where, episode = self.episodes[number]
        if self._pictures is None:
            raise ConfigError("these demonstrations were opened without views")
        store = self.stores[where]
        if store.imported_views:
            found = self._chosen(store, store.imported(episode.seed))
        else:
            if where not in self._caches:
                self._caches[where] = FrameCache(store, **self._pictures)
            found = self._caches[where][episode.seed]
        if len(found) != len(episode):
            raise FileFormatError(
                f"{self.stores[where].path}: {len(found)} pictures for {len(episode)} steps of seed {episode.seed}"
            )
        self._mapped[number] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Other processes map the files themselves."""
        return {**self.__dict__, "_mapped": {}}

    def _chosen(self, store: DemoFolder, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The asked-for views out of imported pictures."""
        assert self._pictures is not None
        views, known = self._pictures["views"], store.imported_views
        names = [views] if isinstance(views, str) else list(views)
        for name in names:
            if name not in known:
                raise NameNotFound(
                    f"{store.path} came with pictures {', '.join(known)}, not {name!r}{nearest(str(name), known)}"
                )
        return pictures if tuple(names) == known else pictures[:, [known.index(n) for n in names]]

    def render(self, *, workers: int = 0) -> Demonstrations:
        """Render every missing picture now, and free the simulators: afterwards worker processes only read files.

        Args:
            workers: processes that draw; 0 draws here.
        """
        for where, store in enumerate(self.stores):
            if self._pictures is not None and not store.imported_views:
                seeds = [e.seed for i, e in self.episodes if i == where]
                self._caches[where] = self._caches.get(where) or FrameCache(store, **self._pictures)
                self._caches[where].fill(workers=workers, seeds=seeds)
        for number in range(len(self.episodes)):
            self.pictures(number)
        for cache in self._caches.values():
            cache.close()
        return self

    def stacked(self, name: str) -> Tensor:
        """All steps of `state` or `action`, [sum of T, ...]; what normalisers are fitted on."""
        return torch.from_numpy(np.concatenate([e[name] for _, e in self.episodes]))

    def describe(self) -> Mapping[str, Any]:
        """`describe()` of the environment the samples look like; goes into the adapter, checked by `rollout`."""
        described = dict(self.stores[0].description["describe"])
        if self._pictures is not None and self.stores[0].imported_views:
            return {**described, "images": list(self.pictures(0).shape[1:]), "views": list(self._pictures["views"])}
        if self._pictures is not None:
            if 0 not in self._caches:
                self._caches[0] = FrameCache(self.stores[0], **self._pictures)
            described = self._caches[0]._env.describe()
        return described
