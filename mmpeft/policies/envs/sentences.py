"""What each Metaworld task is called in words, and which tasks need eyes or ears.

Five sentences a task: the first is the canonical one, the first three are for training, the last two are held out, so
that an evaluation with `instruction="heldout"` asks in words no policy was trained on. No sentence stands for two
tasks.

Thirteen scenes are shared by two or three tasks, where only the sentence tells what to do (`SAME_SCENE`). In the
others the picture gives the task away, so a test of language must swap the sentence there.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from mmpeft.errors import ConfigError, nearest

Wording = Literal["canonical", "train", "heldout"]
TRAIN = 3  # sentences of a task that training may use

#: task -> its five sentences; the file beside this one holds them
SENTENCES: dict[str, tuple[str, ...]] = {
    task: tuple(five)
    for task, five in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).items()
}

#: a policy that sees nothing but its own hand solves at most a fifth of these (25 demonstrations, 20 held-out seeds)
VISION_TASKS: tuple[str, ...] = tuple(
    f"{name}-v3"
    for name in (
        "assembly basketball bin-picking box-close coffee-pull coffee-push disassemble hammer hand-insert handle-pull "
        "handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall push "
        "push-back push-wall reach shelf-place soccer stick-pull"
    ).split()
)

#: tasks that start from one and the same scene, so that only the sentence tells them apart
SAME_SCENE: tuple[tuple[str, ...], ...] = (
    ("push-v3", "pick-place-v3", "reach-v3"),
    ("faucet-open-v3", "faucet-close-v3"),
    ("door-lock-v3", "door-unlock-v3"),
    ("handle-press-v3", "handle-pull-v3"),
    ("handle-press-side-v3", "handle-pull-side-v3"),
    ("window-open-v3", "window-close-v3"),
)


@functools.cache  # asked at every sample of a training
def sentence(task: str, wording: Wording, episode_seed: int) -> str:
    """The instruction of an episode: the canonical one, or one drawn by the seed from the training or the held-out
    ones.

    Raises:
        ConfigError: unknown wording.
    """
    five = SENTENCES[task]
    pools = {"canonical": five[:1], "train": five[:TRAIN], "heldout": five[TRAIN:]}
    if wording not in pools:
        raise ConfigError(
            f"instruction must be one of {', '.join(pools)}, got {wording!r}{nearest(str(wording), pools)}"
        )
    pool = pools[wording]
    return pool[int(np.random.default_rng([5, episode_seed]).integers(len(pool)))]
