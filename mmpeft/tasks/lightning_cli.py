"""`mmpeft fit | validate | test | predict`: Lightning's own command line, with two additions.

The config that built the model travels with the task (`recipe`), so that a saved adapter can be restored from its folder
alone; and a wrong option is answered with the nearest valid one instead of a page of usage.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from mmpeft.adapters import inspect
from mmpeft.adapters.plan import Plan
from mmpeft.adapters.store import read_description, read_tensors
from mmpeft.errors import NameNotFound, nearest, require
from mmpeft.tasks.base import AdapterTask

_cli: Any = require("lightning.pytorch.cli", "train", "the command line also needs jsonargparse[signatures]")
_REFUSED = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
_UNKNOWN = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_STRANGE = re.compile(r"does not accept option '([\w.]+)'")
# What jsonargparse says about every branch of a Union it tried, and the whole value, pages of it.
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")


class Parser(_cli.LightningArgumentParser):  # type: ignore[misc]
    """Lightning's parser; its errors say what is wrong and the nearest valid name, without the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = {name: f"{path} has no option {name!r}{_nearest_option(path, name)}" for path, name in _REFUSED.findall(message)[::-1]}
        for module, name in _UNKNOWN.findall(message):
            known = importlib.import_module(module)
            hints[name] = f"{module} has no {name!r}{nearest(name, [*vars(known), *getattr(known, '__all__', ())])}"
        for option in _STRANGE.findall(message):
            valid = {a.dest.removeprefix("fit.").split(".")[0] for a in self._actions} | set(_CONFIG_KEYS)
            hints[option] = f"a config has the keys {', '.join(_CONFIG_KEYS)}{nearest(option.split('.')[0], valid, 1)}"
        if "arguments are required" in message:
            hints["config"] = "give a config: --config FILE"
        super().error("\n".join(dict.fromkeys([*_plain(message), *hints.values()])), ex)
        raise AssertionError("the parser's error() exits")

    def print_usage(self, file: Any = None) -> None:
        command = next((a for a in sys.argv[1:] if not a.startswith("-")), "fit")
        print(f"usage: mmpeft {command} --config FILE [--config FILE ...] [--KEY VALUE ...]", file=file or sys.stdout)


_CONFIG_KEYS = ("seed_everything", "trainer", "model", "data", "ckpt_path")


def _plain(message: str) -> list[str]:
    """The lines of a parser's message that say something, none of them longer than a screen."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    return [line[:400] for line in lines if line and not line.startswith(_NOISE)]


def _nearest_option(path: str, option: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        options = _options(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return ""
    return f"; it has {', '.join(options)}{nearest(option, options)}"


def _options(cls: Any) -> list[str]:
    """Names of a class's arguments; a `**rest` stands for those of the class above."""
    found: dict[str, None] = {}
    for owner in (c for c in cls.__mro__ if "__init__" in vars(c)):
        given = [p for p in signature(owner.__init__).parameters.values() if p.name != "self"]
        found |= dict.fromkeys(p.name for p in given if p.kind is not p.VAR_KEYWORD)
        if all(p.kind is not p.VAR_KEYWORD for p in given):
            break
    return list(found)


class KeepConfig(_cli.SaveConfigCallback):  # type: ignore[misc]
    """The config of a run beside its logs, and its plan's table as plan.json; a run without a logger leaves no files
    where it happens to be started."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        folder = trainer.log_dir  # asks every rank
        if trainer.logger is not None and folder is not None and trainer.is_global_zero:
            if isinstance(pl_module, AdapterTask):
                path = Path(folder) / "plan.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(plan_table(pl_module.model), indent=1), encoding="utf-8")


def plan_table(model: Any) -> list[dict[str, Any]]:
    """The rows of `mmpeft.inspect(model)` as data: pattern, method, sites, trainable numbers, their bytes (fp32)."""
    rows = inspect(model).rows
    size = [{"trainable": r.parameters, "bytes": 4 * r.parameters} for r in rows]
    return [{"pattern": r.match, "method": r.method, "sites": len(r.sites)} | s for r, s in zip(rows, size, strict=True)]


def keep_freed_memory() -> bool:
    """Let glibc keep what torch frees, for the next tensor; whether it agreed.

    By default every tensor of a few hundred kB or more is a mapping of its own, given back when freed: a training step
    through a small CNN on a CPU then spends an eighth, a forward of 32 pictures a third of its time in page faults.
    Settings of the user's own (MALLOC_... in the environment) are left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False  # no glibc
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 25) and mallopt(trim_threshold, 1 << 30))


_CHECKPOINT_WORDS = ("last", "best", "hpc")  # Lightning's own names for one


class MmpeftCLI(_cli.LightningCLI):  # type: ignore[misc]
    """A `LightningCLI` for any task and any data module, by class path."""

    def __init__(self, **options: Any) -> None:
        keep_freed_memory()
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

    def before_instantiate_classes(self) -> None:
        """Refuse what can be refused before a model is loaded: plan, adapter folder, checkpoint."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        task = config.model.get("init_args") or {}
        if task.get("plan") is not None:
            Plan.read(task["plan"])
        start = task.get("start_from")
        if start is not None and not (Path(start) / "adapter_config.json").is_file():
            read_tensors(Path(start), read_description(start))
        path = config.get("ckpt_path")
        elsewhere = path in _CHECKPOINT_WORDS or "://" in str(path) or str(path).startswith("registry")
        if path is not None and not elsewhere and not Path(path).exists():
            raise NameNotFound(f"no checkpoint {str(path)!r}{nearest(str(path), map(str, Path(path).parent.glob('*')))}")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if isinstance(self.model, AdapterTask):
            self._dump_config()
            self.model.recipe = self.config_dump["model"].get("init_args", {}).get("model")
