"""A saved adapter back on its model, in a process that knows nothing but the folder.

`AdapterCheckpoint` keeps the config that built the model (class path and arguments, as in YAML). Building it imports the
class it names, as running any config does: restore folders from people you would take a config from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmpeft.adapters import load, read_metadata
from mmpeft.adapters.store import DESCRIPTION, read_description, read_tensors
from mmpeft.errors import ConfigError, FileFormatError, refusal_in, require

log = logging.getLogger(__name__)


def build(recipe: Mapping[str, Any]) -> nn.Module:
    """A model from `{"class_path": ..., "init_args": {...}}`, nested ones included.

    Raises:
        ConfigError: a class or argument that does not exist; the message is the parser's.
    """
    parser = require("jsonargparse", "train").ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    try:
        config = parser.parse_object({"model": dict(recipe)})
        model: nn.Module = parser.instantiate_classes(config).model
    except (TypeError, ValueError, AttributeError) as error:
        if (refused := refusal_in(error)) is not None:
            raise refused from error
        raise ConfigError(f"the model's config does not build: {error}") from error
    return model


def restore(folder: str | Path, recipe: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the model that the adapter in `folder` was trained on, and load the adapter.

    Args:
        recipe: how to build it, where the folder does not know (trained from Python).

    Raises:
        NameNotFound, FileFormatError, BaseMismatch: as `mmpeft.load`.
        FileFormatError: the folder does not say how the model is built, and no recipe is given.
    """
    if (Path(folder) / DESCRIPTION).exists():
        read_tensors(Path(folder), read_description(folder))  # a damaged file is refused before a model is built
    recipe = recipe or read_metadata(folder).get("model")
    if recipe is None:
        raise FileFormatError(
            f"{str(folder)!r} does not say how its model is built (it was not trained from the command line): give "
            "--config, or build the model in Python and call mmpeft.load(model, folder)"
        )
    model = build(recipe)
    load(model, folder)
    return model.eval()
