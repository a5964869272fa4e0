"""The checkpoint of a reinforcement run, and its curve as CSV; both written whole or not at all.

Beside the adapter's own folder files lie `curve.csv` and `ppo.pt`: adapter, critic, optimizers, the state of the random
numbers, and the settings, with which another run is refused. It is read without unpickling code.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpeft.adapters.switch import adapter_parameters
from mmpeft.data.demos.store import atomic_write
from mmpeft.errors import ConfigError, FileFormatError

Curve = list[dict[str, float]]
FILE, CURVE = "ppo.pt", "curve.csv"


def write_curve(curve: Curve, path: str | Path) -> None:
    """One line an iteration; numbers as Python writes them, so that they read back exactly."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(curve[0]) if curve else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(path), text.getvalue().encode())


class Checkpoint:
    """Everything that a run needs to go on."""

    def __init__(
        self, policy: nn.Module, adapter: str, critic: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
        generator: torch.Generator, settings: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.policy, self.adapter, self.critic, self.optimizers = policy, adapter, critic, optimizers
        self.generator = generator
        # The environments' number and kind are told by their names or by the vector's class: an object has no JSON.
        self.settings = json.loads(json.dumps(dict(settings), default=lambda v: type(v).__name__, sort_keys=True))

    def save(self, folder: str | Path, curve: Curve) -> None:
        """Write `ppo.pt` and `curve.csv`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        body = {
            "settings": json.dumps(self.settings), "curve": curve, "critic": self.critic.state_dict(),
            "adapter": {k: p.detach() for k, p in adapter_parameters(self.policy, self.adapter)},
            "optimizers": [o.state_dict() for o in self.optimizers], "generator": self.generator.get_state(),
        }  # fmt: skip
        data = io.BytesIO()
        torch.save(body, data)
        atomic_write(Path(folder) / FILE, data.getvalue())
        write_curve(curve, Path(folder) / CURVE)

    def load(self, folder: str | Path) -> Curve | None:
        """Take up what `save` wrote and give back its curve; None if there is nothing.

        Raises:
            ConfigError: a run of other settings, each named. FileFormatError: no checkpoint of such a run.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            body = torch.load(path, weights_only=True, map_location="cpu")
            known = json.loads(body["settings"])
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise FileFormatError(
                f"{path} is no checkpoint ({type(error).__name__}: {error}); delete it to begin anew"
            ) from error
        # a run may be prolonged, if its rates do not depend on its length
        free = () if self.settings["anneal"] else ("total_steps",)
        wrong = [k for k, v in self.settings.items() if known.get(k) != v and k not in free]
        if wrong:
            said = ", ".join(f"{k} {known.get(k)!r} (here {self.settings[k]!r})" for k in wrong)
            raise ConfigError(f"{path} is of a run with other settings: {said}; choose another folder")
        mine = dict(adapter_parameters(self.policy, self.adapter))
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in body["adapter"].items()}:
            raise FileFormatError(f"{path} holds another adapter than {self.adapter!r} of this policy")
        with torch.no_grad():
            for key, parameter in mine.items():
                parameter.copy_(body["adapter"][key])
        self.critic.load_state_dict(body["critic"])
        for optimizer, state in zip(self.optimizers, body["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.generator.set_state(body["generator"])
        curve: Curve = body["curve"]
        return curve
