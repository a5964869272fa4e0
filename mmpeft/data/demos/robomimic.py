"""robomimic's HDF5 files, written and read.

    write_robomimic("demos/push", "push.hdf5", views=("corner2",), image_size=84)
    store = read_robomimic("push.hdf5", "demos/from_robomimic", state=("state",), images=("corner2_image",))

Layout (robomimic 0.3): `data/demo_0/{actions, rewards, dones, states, obs/<key>}`, the environment as JSON in
`data.attrs["env_args"]`, and `mask/train`, `mask/valid` naming the demonstrations of a split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.data.demos.dataset import Demonstrations
from mmpeft.data.demos.store import DemoFolder, Episode, write_pictures
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest, require

_GYM = 2  # robomimic's number for Gym environments


def write_robomimic(
    folder: str | Path,
    file: str | Path,
    *,
    views: Sequence[Any] = (),
    image_size: int = 84,
    valid: float = 0.1,
) -> Path:
    """Write a folder of demonstrations as one HDF5 file, whole or not at all.

    Args:
        views, image_size: pictures to render, as of `make_env`; each becomes `obs/<camera>_image`. valid: share of the
            validation mask.

    Raises:
        NameNotFound: no demonstrations there. MissingExtra: h5py is not installed. ConfigError: `valid` outside 0..1.
    """
    h5py = require("h5py", "robot")
    if not 0 <= valid < 1:
        raise ConfigError(f"valid must be 0 up to 1, got {valid!r}")
    data, target = Demonstrations(folder, views=views, image_size=image_size), Path(file)
    store, names = data.stores[0], picture_names(data, views)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with h5py.File(temporary, "w") as out:
            group, keys = out.create_group("data"), []
            env_args = {"env_name": store.env, "type": _GYM, "env_kwargs": store.description.get("options", {})}
            group.attrs["env_args"] = json.dumps(env_args)
            group.attrs["total"] = sum(len(e) for _, e in data.episodes)
            for number, (_, episode) in enumerate(data.episodes):
                demo = group.create_group(f"demo_{number}")
                keys.append(f"demo_{number}")
                demo.attrs["num_samples"], demo.attrs["seed"] = len(episode), episode.seed
                demo.attrs["instruction"] = episode.instruction
                demo["actions"], demo["rewards"] = episode["action"], episode["reward"]
                demo["executed_actions"], demo["success"] = episode["executed"], episode["success"]
                demo["dones"] = (np.arange(len(episode)) == len(episode) - 1).astype(np.int64)
                if "snapshot" in episode.arrays:
                    demo["states"] = episode["snapshot"][:-1]
                demo["obs/state"] = episode["state"]
                for i, name in enumerate(names):
                    demo.create_dataset(f"obs/{name}_image", data=data.pictures(number)[:, i], compression="gzip")
            held = round(valid * len(keys))
            out["mask/train"] = np.array(keys[: len(keys) - held], dtype="S")
            out["mask/valid"] = np.array(keys[len(keys) - held :], dtype="S")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_robomimic(
    file: str | Path,
    folder: str | Path,
    *,
    state: Sequence[str] = ("state",),
    images: Sequence[str] = (),
    mask: str | None = None,
    instruction: str = "",
) -> DemoFolder:
    """Import an HDF5 file into a new folder of demonstrations.

    Args:
        state: keys of `obs` that are joined into the proprioception. images: keys of `obs` that are pictures of one
            size.
        mask: only the demonstrations of this split. instruction: for files that hold none.

    Raises:
        NameNotFound: no such file, key or mask. FileFormatError: cut short, no robomimic file, or arrays that do not
            fit together.
    """
    h5py = require("h5py", "robot")
    source = Path(file)
    if not source.is_file():
        raise NameNotFound(f"no file {source}")
    try:
        opened = h5py.File(source, "r")
    except OSError as error:
        raise FileFormatError(f"{source} is cut short or no HDF5 file ({error})") from error
    with opened as given:
        try:
            demos, env_args = given["data"], json.loads(given["data"].attrs["env_args"])
        except (KeyError, ValueError) as error:
            raise FileFormatError(f"{source} has no data group with env_args ({error})") from error
        wanted = _names(given, mask, source)
        description: dict[str, Any] = {"env": str(env_args.get("env_name", "robomimic")), "options": {}, "noise": None}
        description |= {"imported_from": "robomimic", "imported_views": list(images)}
        first = demos[wanted[0]]
        width = sum(_array(first, f"obs/{k}", source).reshape(len(first["actions"]), -1).shape[1] for k in state)
        described = {
            "name": description["env"],
            "action": list(first["actions"].shape[1:]),
            "discrete": False,
            "state": [width],
        }
        store = DemoFolder(folder, {**description, "describe": described})
        for name in wanted:
            demo, number = demos[name], int(demos[name].attrs.get("seed", name.split("_")[1]))
            actions = _array(demo, "actions", source).astype(np.float32)
            steps = len(actions)
            rewards = _array(demo, "rewards", source) if "rewards" in demo else np.zeros(steps)
            arrays = {
                "state": np.concatenate([_array(demo, f"obs/{k}", source).reshape(steps, -1) for k in state], 1).astype(
                    np.float32
                ),
                "action": actions,
                "executed": _array(demo, "executed_actions", source).astype(np.float32)
                if "executed_actions" in demo
                else actions,
                "reward": rewards.astype(np.float32),
                "success": _array(demo, "success", source).astype(bool) if "success" in demo else rewards > 0,
            }
            if images:
                pictures = np.stack([_array(demo, f"obs/{k}", source) for k in images], 1)
                write_pictures(store.path / "frames" / "imported" / f"{number:010d}.npy", pictures.astype(np.uint8))
            store.add(Episode(number, str(demo.attrs.get("instruction", instruction)), arrays))
    return store


def _names(given: Any, mask: str | None, source: Path) -> list[str]:
    masks = list(given["mask"]) if "mask" in given else []
    if mask is not None and mask not in masks:
        raise NameNotFound(f"{source} has no mask {mask!r}; it has {', '.join(masks) or 'none'}{nearest(mask, masks)}")
    names = [n.decode() for n in given["mask"][mask]] if mask is not None else list(given["data"])
    if not names:
        raise FileFormatError(f"{source} holds no demonstrations{f' under mask {mask}' if mask else ''}")
    return sorted(names, key=lambda n: int(n.split("_")[1]))


def _array(demo: Any, key: str, source: Path) -> Any:
    if key not in demo:
        there = [f"obs/{k}" for k in demo.get("obs", {})]
        raise NameNotFound(f"{source}, {demo.name}: no {key!r}; there are {', '.join(there)}{nearest(key, there)}")
    try:
        return np.asarray(demo[key])
    except OSError as error:
        raise FileFormatError(
            f"{source}, {demo.name}: {key} cannot be read ({error}); the file was cut short"
        ) from error


def picture_names(data: Demonstrations, views: Sequence[Any] | str) -> list[str]:
    """A name for each picture of a dataset: the view's own, or its camera's, or `view0`; none without pictures."""
    listed = [views] if isinstance(views, str) else list(views)
    names = [v if isinstance(v, str) else str(getattr(v, "camera", f"view{i}")) for i, v in enumerate(listed)]
    if len(set(names)) != len(names):
        names = [f"{n}_{i}" for i, n in enumerate(names)]
    return names
