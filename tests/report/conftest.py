"""One robot run with videos, made once."""

import numpy as np
import pytest

from tests.report.kit import robot


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """An mp4 of 12 frames as `mmpeft rollout` writes it."""
    pytest.importorskip("av")
    from mmpeft.policies.rollout_video import write_video

    frames = np.random.default_rng(0).integers(0, 255, (12, 48, 50, 3), np.uint8)
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", frames, fps=10)


@pytest.fixture(scope="session")
def robot_run(tmp_path_factory, film):
    """What examples/robot.py leaves, videos included."""
    folder = robot(tmp_path_factory.mktemp("runs") / "robot")
    for arm in ("adapted", "blind"):
        (folder / arm / "videos").mkdir()
        for seed in (60_001, 60_002):
            outcome = "success" if arm == "adapted" else "failure"
            (folder / arm / "videos" / f"coffee-pull-v3-{seed}-{outcome}.mp4").write_bytes(film.read_bytes())
    return folder
