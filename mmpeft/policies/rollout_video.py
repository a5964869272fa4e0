"""Videos of episodes: H.264 in mp4, which browsers play, or an animated GIF where no encoder is installed.

Small pictures are enlarged by whole factors (nearest neighbour), so that what the policy saw stays what is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, nearest, require

SHORTEST_SIDE = 192  # pixels; smaller pictures are enlarged to at least this


def write_video(path: str | Path, frames: NDArray[np.uint8], *, fps: float = 20.0) -> Path:
    """Write frames [T, H, W, 3] as .mp4 or .gif, by the ending; whole or not at all.

    Raises:
        ConfigError: no frames, another shape, or another ending. MissingExtra: mp4 without PyAV.
    """
    target = Path(path)
    if target.suffix not in _WRITERS:
        raise ConfigError(
            f"a video ends in {' or '.join(_WRITERS)}, got {target.name!r}{nearest(target.suffix, _WRITERS)}"
        )
    if np.ndim(frames) != 4 or np.shape(frames)[-1] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ConfigError(
            f"a video needs uint8 frames [T, H, W, 3], got {getattr(frames, 'dtype', None)} {np.shape(frames)}"
        )
    factor = max(1, -(-SHORTEST_SIDE // min(frames.shape[1:3])))
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    large = large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2]  # H.264 wants even sides
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        _WRITERS[target.suffix](temporary, large, fps)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def encode_mp4(path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: float, keyframes: int | None = None) -> None:
    """H.264 at `path` from pictures [H, W, 3] with even sides; a key frame every so many pictures, for random access.

    Raises:
        MissingExtra: PyAV is not installed.
    """
    av = require("av", "robot", "mp4 videos need PyAV; a name that ends in .gif needs only Pillow")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as file:
        stream: Any = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"} | ({"g": str(keyframes)} if keyframes else {})
        for number, picture in enumerate(frames):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def _write_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    encode_mp4(path, frames, fps=fps)


def _write_gif(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    image = require("PIL.Image", "vision")
    pictures = [image.fromarray(f) for f in frames]
    # GIF counts in hundredths of a second, and players slow down what is faster than 50 a second
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=max(20, round(1000 / fps)), loop=0)


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}


def read_video(path: str | Path) -> NDArray[np.uint8]:
    """All frames [T, H, W, 3] of a video file.

    Raises:
        MissingExtra: PyAV is not installed. ConfigError: the file cannot be decoded.
    """
    av = require("av", "robot", "videos are read with PyAV")
    try:
        with av.open(str(path)) as file:
            return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} cannot be decoded as a video ({type(error).__name__}: {error})") from error
