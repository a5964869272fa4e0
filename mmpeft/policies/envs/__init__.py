"""Simulated environments by name, all with one kind of observation: `{images, state, instruction}`.

    env = make_env("metaworld:push-v3", views=("close",), image_size=96)
    env = make_env("babyai:GoToLocal")
    env = make_env("gym:FrankaKitchen-v1", state="observation", instruction="open the microwave")

A name is `family:task`; each family is one function below, its keywords are the options. Names and options are checked
before a simulator is started.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from mmpeft.errors import ConfigError, NameNotFound, nearest, require

if TYPE_CHECKING:
    from mmpeft.policies.envs.base import RobotEnv

#: family -> (module, function(task, **options) -> RobotEnv); loaded when a name of the family is used
FAMILIES: dict[str, tuple[str, str]] = {
    "metaworld": ("mmpeft.policies.envs.metaworld", "MetaworldEnv"),
    "babyai": ("mmpeft.policies.envs.babyai", "BabyAIEnv"),
    "libero": ("mmpeft.policies.envs.libero", "LiberoEnv"),
    "gym": ("mmpeft.policies.envs.gym", "GymEnv"),
}


def split_name(name: str) -> tuple[str, str]:
    """("metaworld", "push-v3") of "metaworld:push-v3".

    Raises:
        NameNotFound: no such family, or no task after the colon.
    """
    family, colon, task = name.partition(":") if isinstance(name, str) else ("", "", "")
    if family not in FAMILIES or not task:
        known = ", ".join(f"{f}:<task>" for f in FAMILIES)
        raise NameNotFound(f"an environment is named {known}; got {name!r}{nearest(family, FAMILIES)}")
    return family, task


def worker_context() -> Any:
    """How simulator processes are started: from a fork server that has imported the simulators and drawn nothing.

    A process forked from one that has drawn hangs at its first picture; one that starts from nothing pays the imports.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmpeft.policies.envs.preload"])
    return context


def make_env(name: str, **options: Any) -> RobotEnv:
    """An environment by name.

    Args:
        name: "metaworld:<task>", "babyai:<level>", "libero:<suite>/<task>" or "gym:<any id Gymnasium knows>".
        options: those of the family: `MetaworldEnv`, `BabyAIEnv`, `LiberoEnv`, `GymEnv`; common to all are `views`, `image_size`,
            `max_steps`, `full_state`, and `noise` and `shift` (a dict or a dataclass of `views.py`).

    Raises:
        NameNotFound: unknown family, task or option, with the nearest names. ConfigError: an option out of range.
        MissingExtra: the simulator is not installed.
    """
    family, task = split_name(name)
    require("gymnasium", "robot")
    module, function = FAMILIES[family]
    build = getattr(importlib.import_module(module), function)
    known = [p for p in inspect.signature(build).parameters if p != "task"]
    for option in options:
        if option not in known:
            raise NameNotFound(
                f"{family} environments have no option {option!r}; they have {', '.join(known)}{nearest(option, known)}"
            )
    try:
        env: RobotEnv = build(task, **options)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
    return env
