"""LeRobotDataset v3.0 folders, written and read without `lerobot`.

    write_lerobot("demos/push", "lerobot/push", views=("corner2",), image_size=96)
    store = read_lerobot("lerobot/push", "demos/from_lerobot")

The layout:

    meta/info.json                        features, frames a second, paths
    meta/stats.json                       statistics for normalisation
    meta/tasks.parquet                    instruction -> task_index
    meta/episodes/chunk-000/file-000.parquet   lengths, offsets and statistics of each episode
    data/chunk-000/file-000.parquet       one row a step; pictures inside as PNG, unless video=True
    videos/<key>/chunk-000/file-000.mp4   all episodes after one another
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.data.demos.dataset import Demonstrations
from mmpeft.data.demos.robomimic import picture_names
from mmpeft.data.demos.store import DemoFolder, Episode, atomic_write, write_pictures
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest, require

VERSION = "v3.0"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
_COUNTERS = {"frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"}
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def write_lerobot(
    folders: str | Path | Sequence[str | Path],
    target: str | Path,
    *,
    views: Sequence[Any] = (),
    image_size: int = 96,
    fps: int | None = None,
    video: bool = False,
) -> Path:
    """Write demonstrations as a new LeRobotDataset v3.0.

    Args:
        folders: one or several tasks. views, image_size: pictures to render, as of `make_env`. fps: default the
            control rate.
        video: pictures as H.264 in mp4 (lossy) in place of PNG in the Parquet file.

    Raises:
        ConfigError: `target` exists, discrete actions, or video without views. MissingExtra: pyarrow, pandas or PyAV
            is missing.
    """
    pa, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    pandas, root = require("pandas", "data"), Path(target)
    if root.exists():
        raise ConfigError(f"{root} exists; a LeRobot dataset is written to a new folder")
    if video and not len(views):
        raise ConfigError("video=True needs views")
    data = Demonstrations(folders, views=views, image_size=image_size)
    if data.episodes[0][1]["action"].dtype != np.float32:
        raise ConfigError("LeRobot datasets hold continuous actions; these are discrete")
    fps = fps or round(float(data.stores[0].description.get("control_hz", 10)))
    keys = [f"observation.images.{name}" for name in picture_names(data, views)]
    texts = list(dict.fromkeys(data.instruction(n) for n in range(len(data.episodes))))
    columns: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    statistics: list[dict[str, dict[str, Any]]] = []
    start = 0
    for number, (_, episode) in enumerate(data.episodes):
        steps, task = len(episode), texts.index(data.instruction(number))
        numbers = _numbers(episode, number, start, task, fps)
        pictures = data.pictures(number) if keys else None
        found = {name: _statistics(value) for name, value in numbers.items()}
        columns.append(dict(numbers))
        for i, key in enumerate(keys):
            assert pictures is not None
            found[key] = _picture_statistics(pictures[:, i])
            if not video:
                columns[-1][key] = [
                    _png(p, f"episode-{number:06d}/frame-{t:06d}.png") for t, p in enumerate(pictures[:, i])
                ]
        statistics.append(found)
        row: dict[str, Any] = {"episode_index": number, "tasks": [data.instruction(number)], "length": steps}
        row |= {
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": start,
            "dataset_to_index": start + steps,
        }
        for key in keys if video else ():
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            row |= {f"videos/{key}/from_timestamp": start / fps, f"videos/{key}/to_timestamp": (start + steps) / fps}
        row |= {f"stats/{name}/{s}": _plain(v) for name, table in found.items() for s, v in table.items()}
        rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        start += steps
    features = _features(data.episodes[0][1], keys, image_size, fps, video)
    table = pa.concat_tables([_table(pa, c, features) for c in columns])
    _write_parquet(parquet, table, root / DATA.format(chunk_index=0, file_index=0))
    _write_parquet(parquet, pa.Table.from_pylist(rows), root / EPISODES)
    tasks = pandas.DataFrame({"task_index": range(len(texts))}, index=pandas.Index(texts, name="task"))
    _write_parquet(parquet, pa.Table.from_pandas(tasks), root / "meta" / "tasks.parquet")
    for i, key in enumerate(keys if video else ()):
        from mmpeft.policies.rollout_video import encode_mp4

        path = root / VIDEO.format(video_key=key, chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        encode_mp4(path, (p for n in range(len(data.episodes)) for p in data.pictures(n)[:, i]), fps=fps, keyframes=2)
    merged = {name: _merged([s[name] for s in statistics]) for name in statistics[0]}
    atomic_write(root / "meta" / "stats.json", json.dumps(merged, indent=1).encode())
    info = {
        "codebase_version": VERSION,
        "robot_type": data.stores[0].env,
        "total_episodes": len(rows),
        "total_frames": start,
        "total_tasks": len(texts),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": fps,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA,
        "video_path": VIDEO if video else None,
        "features": features,
    }
    atomic_write(root / "meta" / "info.json", json.dumps(info, indent=1).encode())  # last: what has it is complete
    return root


def read_lerobot(source: str | Path, folder: str | Path, *, images: Sequence[str] | None = None) -> DemoFolder:
    """Import a LeRobotDataset v3.0 folder into a new folder of demonstrations.

    Args:
        images: picture keys to import ("observation.images.top"); default all. They must have one size.

    Raises:
        NameNotFound: no dataset there, or no such key. FileFormatError: another version, or files that are missing,
            cut short or do not fit together.
    """
    root = Path(source)
    info = _info(root)
    features: dict[str, Any] = info["features"]
    pictured = [k for k, f in features.items() if f["dtype"] in ("image", "video")]
    wanted = pictured if images is None else list(images)
    for key in wanted:
        if key not in pictured:
            raise NameNotFound(f"{root} has no pictures {key!r}; it has {', '.join(pictured)}{nearest(key, pictured)}")
    rows = sorted(_rows(root / "meta" / "episodes", root), key=lambda r: r["episode_index"])
    if len(rows) != info["total_episodes"]:
        raise FileFormatError(f"{root}: {len(rows)} episodes described, {info['total_episodes']} expected")
    described = {
        "action": features["action"]["shape"],
        "discrete": False,
        "state": features["observation.state"]["shape"],
    }
    env = str(info.get("robot_type") or "lerobot")
    description = {
        "env": env,
        "options": {},
        "noise": None,
        "control_hz": info["fps"],
        "describe": {"name": env, **described},
    }
    short = [k.removeprefix("observation.images.") for k in wanted]
    store = DemoFolder(folder, {**description, "imported_from": f"lerobot {VERSION}", "imported_views": short})
    films: dict[str, NDArray[np.uint8]] = {}
    tables: dict[str, Any] = {}
    for row in rows:
        number, steps = int(row["episode_index"]), int(row["length"])
        name = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        if name not in tables:
            tables = {name: _read_parquet(root / name)}  # one file in memory at a time
        mask = np.asarray(tables[name]["episode_index"]) == number
        table = tables[name].filter(mask)
        if len(table) != steps:
            raise FileFormatError(f"{root / name}: episode {number} has {len(table)} rows, {steps} expected")
        action = _vectors(table["action"])
        arrays = {
            "state": _vectors(table["observation.state"]),
            "action": action,
            "executed": action,
            "reward": _scalars(table, "next.reward", steps, np.float32),
            "success": _scalars(table, "next.success", steps, bool),
        }
        if wanted:
            pictures = np.stack([_pictures(root, info, key, table, row, films) for key in wanted], 1)
            write_pictures(store.path / "frames" / "imported" / f"{number:010d}.npy", pictures)
        store.add(Episode(number, str(row["tasks"][0]), arrays))
    return store


def _numbers(episode: Episode, number: int, start: int, task: int, fps: int) -> dict[str, NDArray[Any]]:
    """Columns of an episode that are numbers."""
    steps = len(episode)
    at = np.arange(steps)
    return {
        "observation.state": episode["state"],
        "action": episode["action"],
        "next.reward": episode["reward"],
        "next.success": episode["success"],
        "next.done": at == steps - 1,
        "timestamp": (at / fps).astype(np.float32),
        "frame_index": at,
        "episode_index": np.full(steps, number),
        "index": start + at,
        "task_index": np.full(steps, task),
    }


def _features(episode: Episode, keys: Sequence[str], size: int, fps: int, video: bool) -> dict[str, Any]:
    vectors = {"observation.state": episode["state"], "action": episode["action"]}
    features: dict[str, Any] = {
        key: {
            "dtype": "video" if video else "image",
            "shape": [size, size, 3],
            "names": ["height", "width", "channels"],
        }
        for key in keys
    }
    for key in keys if video else ():
        how = {
            "height": size,
            "width": size,
            "codec": "h264",
            "pix_fmt": "yuv420p",
            "is_depth_map": False,
            "fps": fps,
            "channels": 3,
        }
        features[key]["info"] = {f"video.{k}": v for k, v in how.items()} | {"has_audio": False}
    for key, value in vectors.items():
        features[key] = {
            "dtype": "float32",
            "shape": list(value.shape[1:]),
            "names": [f"{key[-6:]}_{i}" for i in range(value.shape[1])],
        }
    scalars = {
        "next.reward": "float32",
        "next.success": "bool",
        "next.done": "bool",
        "timestamp": "float32",
        **_COUNTERS,
    }
    return features | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in scalars.items()}


def _table(pa: Any, columns: dict[str, Any], features: dict[str, Any]) -> Any:
    """An Arrow table of one episode: vectors as fixed-size lists, pictures as {bytes, path}."""
    arrays = {}
    for name, value in columns.items():
        if isinstance(value, list):
            arrays[name] = pa.array(value, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        elif value.ndim == 2:
            arrays[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(value).reshape(-1)), value.shape[1]
            )
        else:
            arrays[name] = pa.array(value.astype(features[name]["dtype"]))
    return pa.table(arrays)


def _statistics(value: NDArray[Any]) -> dict[str, Any]:
    """By dimension, over the steps of an episode."""
    flat = value.reshape(len(value), -1).astype(np.float64)
    quantiles = {name: np.quantile(flat, q, axis=0) for name, q in _QUANTILES.items()}
    spread = {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0)}
    return {**spread, "count": np.array([len(flat)]), **quantiles}


def _picture_statistics(pictures: NDArray[np.uint8]) -> dict[str, Any]:
    """By colour, in 0..1, shaped [3, 1, 1]; over every tenth picture, as statistics need no more."""
    some = pictures[:: max(1, len(pictures) // 10)]
    found = _statistics(some.reshape(-1, 3) / 255.0)
    return {k: v if k == "count" else v.reshape(3, 1, 1) for k, v in found.items()} | {"count": np.array([len(some)])}


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of all episodes from those of each (quantiles: the mean weighted by length, as LeRobot does)."""
    counts = np.array([p["count"][0] for p in parts], np.float64)
    share = (counts / counts.sum()).reshape(-1, *[1] * parts[0]["mean"].ndim)
    stacked = {k: np.stack([p[k] for p in parts]) for k in parts[0] if k != "count"}
    mean = (share * stacked["mean"]).sum(0)
    variance = (share * (stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)).sum(0)
    merged = {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": mean, "std": np.sqrt(variance)}
    merged |= {q: (share * stacked[q]).sum(0) for q in _QUANTILES}
    return {k: _plain(v) for k, v in merged.items()} | {"count": [int(counts.sum())]}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _png(picture: NDArray[np.uint8], name: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    require("PIL.Image", "vision").fromarray(picture).save(buffer, "png", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": name}


def _write_parquet(parquet: Any, table: Any, path: Path) -> None:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    atomic_write(path, buffer.getvalue())


def _read_parquet(path: Path) -> Any:
    if not path.is_file():
        raise FileFormatError(f"{path} is missing")
    try:
        return require("pyarrow.parquet", "data").read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two kinds
        raise FileFormatError(f"{path} is cut short or no Parquet file ({error})") from error


def _info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise NameNotFound(f"{root} is no LeRobot dataset (no meta/info.json)")
    try:
        info: dict[str, Any] = json.loads(path.read_bytes())
        version = str(info["codebase_version"])
        missing = [k for k in ("action", "observation.state") if k not in info["features"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not version.startswith("v3."):
        raise FileFormatError(
            f"{root} has version {version}; {VERSION} is read here (LeRobot's converter raises older ones)"
        )
    if missing:
        raise FileFormatError(f"{root} has no {' and no '.join(missing)}")
    return info


def _rows(folder: Path, root: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise FileFormatError(f"{root} has no meta/episodes")
    tables = [_read_parquet(f) for f in files]
    return [r for t in tables for r in t.select([c for c in t.column_names if not c.startswith("stats/")]).to_pylist()]


def _vectors(column: Any) -> NDArray[np.float32]:
    return np.asarray(column.to_pylist(), dtype=np.float32)


def _scalars(table: Any, name: str, steps: int, dtype: Any) -> NDArray[Any]:
    """A column that not every dataset has; zeros without it."""
    if name not in table.column_names:
        return np.zeros(steps, dtype)
    return np.asarray(table[name].to_pylist()).reshape(steps).astype(dtype)


def _pictures(
    root: Path, info: dict[str, Any], key: str, table: Any, row: dict[str, Any], films: dict[str, NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """[T, H, W, 3] of an episode, out of the Parquet rows or the film it is a part of."""
    steps = int(row["length"])
    if info["features"][key]["dtype"] == "image":
        image = require("PIL.Image", "vision")
        decoded = [image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in table[key].to_pylist()]
        return np.stack([np.asarray(p, np.uint8) for p in decoded])
    name = info["video_path"].format(
        video_key=key, chunk_index=row[f"videos/{key}/chunk_index"], file_index=row[f"videos/{key}/file_index"]
    )
    if films.get(key + name) is None:
        from mmpeft.policies.rollout_video import read_video

        for old in [k for k in films if k.startswith(key)]:
            del films[old]
        films[key + name] = read_video(root / name)
    start = round(float(row[f"videos/{key}/from_timestamp"]) * info["fps"])
    film = films[key + name][start : start + steps]
    if len(film) != steps:
        raise FileFormatError(
            f"{root / name}: {len(film)} pictures from {start}, {steps} expected; the film is cut short"
        )
    return film
