"""What every environment is: a Gymnasium environment whose step is split, so that pictures are drawn on demand.

Drawing costs ten times the physics (8 ms against 0.3 ms for Metaworld on one core). So `advance` moves the simulator
and gives no observation, `observe` makes one, and `step` is both: a policy that executes eight actions of a chunk pays
for one picture, not eight.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import BaseMismatch, ConfigError, Unsupported

Observation = dict[str, Any]
Array = NDArray[Any]


class RobotEnv(gym.Env[Observation, Any]):
    """Base class. A subclass sets `name`, the spaces and `max_steps`, and has the methods that raise `Unsupported`
    here.

    Attributes:
        name: "metaworld:push-v3". max_steps: an episode is truncated after so many actions.
        control_hz: actions a second of simulated time, for the speed of videos.
        action_noise_mask: [action_dim] bool, the action dimensions an expert's noise may touch.
        episode_seed, text: seed and instruction of the present episode.
    """

    name: str = ""
    views: tuple[Any, ...] = ()
    max_steps: int = 500
    control_hz: float = 10.0
    action_noise_mask: Array
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"
    episode_seed: int = 0
    text: str = ""

    def begin(self, seed: int | None) -> None:
        """`reset` without an observation, so that nothing is drawn; None goes on in the sequence that the last seed
        began."""
        raise Unsupported(f"{type(self).__name__} has no begin()")

    def advance(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        """Move the simulator by one action: reward, terminated, truncated, info (with `success`, a bool)."""
        raise Unsupported(f"{type(self).__name__} has no advance()")

    def observe(self) -> Observation:
        """The observation of the present moment; pictures are drawn here and nowhere else."""
        raise Unsupported(f"{type(self).__name__} has no observe()")

    def pictures(self) -> Array:
        """The views as they are now, without sensor noise, uint8 [N, H, W, 3]."""
        raise Unsupported(f"{self.name} draws no pictures")

    def frame(self, size: int = 256) -> Array:
        """One picture for a video, uint8 [size, size, 3]."""
        raise Unsupported(f"{self.name} draws no pictures")

    def snapshot(self) -> Array | None:
        """The simulator's whole state, float64 [D], or None where it cannot be read out."""
        return None

    def restore(self, state: Array) -> None:
        """Put the simulator into a state of `snapshot` within the same episode (the same seed)."""
        raise Unsupported(f"{self.name} cannot be put into a stored state; its actions are replayed instead")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode that `seed` names; without one, the next of the sequence that the last seed began."""
        self.begin(seed)
        return self.observe(), {"seed": self.episode_seed, "instruction": self.text}

    def take_seed(self, seed: int | None) -> None:
        """Set `episode_seed`: the given one, or the next that the generator of the last given one draws."""
        gym.Env.reset(self, seed=seed)
        self.episode_seed = int(self.np_random.integers(2**31)) if seed is None else int(seed)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def render(self) -> Any:
        return self.frame()

    def describe(self) -> dict[str, Any]:
        """What a policy trained here depends on, as JSON: goes into the adapter's metadata, checked by
        `check_trained_for`."""
        space = self.observation_space
        assert isinstance(space, gym.spaces.Dict)
        discrete = isinstance(self.action_space, gym.spaces.Discrete)
        images = space.spaces.get("images")
        return {
            "name": self.name,
            "action": int(self.action_space.n)
            if isinstance(self.action_space, gym.spaces.Discrete)
            else list(self.action_space.shape or ()),
            "discrete": discrete,
            "state": list(space["state"].shape or ()) if "state" in space.spaces else None,
            "images": list(images.shape or ()) if images is not None else None,
        }


def check_trained_for(trained: Mapping[str, Any], env: Mapping[str, Any], *, needs: Sequence[str] = ()) -> None:
    """Refuse a policy in an environment with other actions, proprioception or cameras than it was trained with.

    Args:
        trained: `describe()` of the training environment. env: `describe()` of this one.
        needs: the observation keys the policy reads; what it does not read may differ. The task may differ too.

    Raises:
        BaseMismatch: naming every difference.
    """
    kept = [k for k in ("action", "discrete") if k in trained]
    kept += [k for k in ("state", "images") if k in trained and (k in needs or not needs)]
    kept += ["views"] if "views" in trained and ("images" in needs or not needs) else []
    wrong = [f"{k}: trained with {trained[k]!r}, here {env.get(k)!r}" for k in kept if trained[k] != env.get(k)]
    if wrong:
        raise BaseMismatch(
            f"the policy was trained in {trained.get('name')}, not for {env.get('name')}: " + "; ".join(wrong)
        )


def check_action(action: Any, space: gym.Space[Any], where: str) -> Any:
    """`action` as the space wants it: clipped to a Box's bounds, an int for a Discrete one.

    Raises:
        ConfigError: another size, NaN or infinity, or an integer that is no action; `where` opens the message.
    """
    if isinstance(space, gym.spaces.Discrete):
        value = np.asarray(action)
        if value.size != 1 or not space.contains(int(value.reshape(()))):
            raise ConfigError(f"{where}: actions are integers 0 to {space.n - 1}, got {action!r}")
        return int(value.reshape(()))
    assert isinstance(space, gym.spaces.Box)
    value = np.asarray(action, dtype=np.float64)
    if value.shape != space.shape:
        raise ConfigError(f"{where}: an action has shape {space.shape}, got {value.shape}")
    if not np.isfinite(value).all():
        raise ConfigError(f"{where}: an action must be finite, got {value.tolist()}")
    return np.clip(value, space.low, space.high).astype(space.dtype)


def text_space() -> gym.spaces.Text:
    """Any sentence in printable ASCII; Gymnasium's own default has no space character."""
    return gym.spaces.Text(1000, min_length=0, charset=string.printable)


def positive_steps(name: str, value: Any) -> int:
    """`value` if it is an int above zero, else ConfigError naming the option."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)
