"""What an adapter must carry beside its tensors before a robot can act on it, as JSON in the adapter's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mmpeft.errors import BaseMismatch, FileFormatError
from mmpeft.policies.normalise import Normaliser


@dataclass(frozen=True)
class Skill:
    """Normalisation of one robot and task, what the head learned without gradients, and what it all holds for.

    Attributes:
        actions, states: normalisers; None for discrete actions, or without a state.
        head: `Head.facts()`. sizes: `Policy.sizes()`. environment: `describe()` of the environment, if it is known.
    """

    actions: Normaliser | None
    states: Normaliser | None
    head: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "actions": None if self.actions is None else self.actions.to_dict(),
            "states": None if self.states is None else self.states.to_dict(),
            "head": self.head, "sizes": self.sizes, "environment": self.environment,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], sizes: Mapping[str, Any], name: str) -> Self:
        """Read it for a policy of `sizes`.

        Raises:
            FileFormatError: a key that is missing. BaseMismatch: other sizes, each named.
        """
        missing = [k for k in ("actions", "states", "head", "sizes") if k not in data]
        if missing:
            raise FileFormatError(f"adapter {name!r} lacks {', '.join(missing)} in its policy metadata")
        other = [f"{k} {data['sizes'].get(k)!r} (here {v!r})" for k, v in sizes.items() if data["sizes"].get(k) != v]
        if other:
            raise BaseMismatch(f"adapter {name!r} was trained for another robot or camera: {', '.join(other)}")
        needed = {"actions": not sizes["discrete"], "states": bool(sizes["state_dim"])}
        found: dict[str, Normaliser | None] = {}
        for key, wanted in needed.items():
            if wanted and data[key] is None:
                raise FileFormatError(f"adapter {name!r} lacks the normalisation of its {key}")
            found[key] = Normaliser.from_dict(data[key], f"{key} normalisation") if wanted else None
        return cls(found["actions"], found["states"], dict(data["head"]), dict(data["sizes"]), data.get("environment"))
