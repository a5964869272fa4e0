"""`mmpeft fit | validate | test | predict`: Lightning's own command line, with two additions.

The config that built the model travels with the task (`recipe`), so that a saved adapter can be restored from its folder
alone; and a wrong option is answered with the nearest valid one instead of a page of usage.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any, NoReturn

from mmpeft.errors import nearest, require
from mmpeft.tasks.base import AdapterTask

_cli: Any = require("lightning.pytorch.cli", "train", "the command line also needs jsonargparse[signatures]")
_REFUSED = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")


class Parser(_cli.LightningArgumentParser):  # type: ignore[misc]
    """Lightning's parser; its errors come without the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = [f"{path} has no option {name!r}{_nearest_option(path, name)}" for path, name in _REFUSED.findall(message)]
        super().error("\n".join([message, *dict.fromkeys(hints)]), ex)
        raise AssertionError("the parser's error() exits")

    def print_usage(self, file: Any = None) -> None:
        command = next((a for a in sys.argv[1:] if not a.startswith("-")), "fit")
        print(f"usage: mmpeft {command} --config FILE [--config FILE ...] [--KEY VALUE ...]", file=file or sys.stdout)


def _nearest_option(path: str, option: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return ""
    return f"; it has {', '.join(parameters)}{nearest(option, parameters)}"


class KeepConfig(_cli.SaveConfigCallback):  # type: ignore[misc]
    """The config of a run beside its logs; a run without a logger leaves no files where it happens to be started."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class MmpeftCLI(_cli.LightningCLI):  # type: ignore[misc]
    """A `LightningCLI` for any task and any data module, by class path."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            parser_class=Parser,
            parser_kwargs={"prog": "mmpeft"},
            seed_everything_default=0,
            auto_configure_optimizers=False,  # tasks make their optimizer from the plan
            save_config_callback=KeepConfig,
            # under a name that no config of a user's own has, since it is written over
            save_config_kwargs={"overwrite": True, "config_filename": "config_of_run.yaml"},
            **options,
        )

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if isinstance(self.model, AdapterTask):
            self._dump_config()
            self.model.recipe = self.config_dump["model"].get("init_args", {}).get("model")
