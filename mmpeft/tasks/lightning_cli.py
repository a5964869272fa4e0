"""`mmpeft fit | validate | test | predict`: Lightning's own command line, with one addition.

The config that built the model travels with the task (`recipe`), so that a saved adapter can be restored from its folder
alone.
"""

from __future__ import annotations

from typing import Any

from mmpeft.errors import require
from mmpeft.tasks.base import AdapterTask

_cli: Any = require("lightning.pytorch.cli", "train", "the command line also needs jsonargparse[signatures]")


class MmpeftCLI(_cli.LightningCLI):  # type: ignore[misc]
    """A `LightningCLI` for any task and any data module, by class path."""

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if isinstance(self.model, AdapterTask):
            self._dump_config()
            self.model.recipe = self.config_dump["model"].get("init_args", {}).get("model")
