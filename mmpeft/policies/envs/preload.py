"""Imported by the fork server before it forks simulator workers, so that each worker starts in milliseconds.

It imports and never draws: an OpenGL context does not survive a fork. What is not installed here is reported by the
worker that needs it.
"""

import contextlib
import importlib

import mmpeft.policies.envs
import mmpeft.policies.rollout_slot  # noqa: F401

for _module in ("mujoco", "metaworld.env_dict", "OpenGL"):
    with contextlib.suppress(Exception):
        importlib.import_module(_module)
