"""Parts of a policy (trunks, heads, fusions, encoders) that remember their options, so that a folder can rebuild them.

    head = RegressionHead(norm="l2")
    head.recipe()                       # {"class_path": "....RegressionHead", "init_args": {"norm": "l2"}}
    make(head.recipe())                 # another one like it

The recipe goes into the adapter's metadata; it is what `class_path` and `init_args` are in a YAML file. Making one
imports the class it names, so take folders only from people you would take a config from.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmpeft.errors import ConfigError, NameNotFound, nearest

PLAIN = (str, int, float, bool, type(None))


class Part(nn.Module):
    """Base class: records the arguments that the outermost constructor was called with."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__init__

        @functools.wraps(init)
        def recording(self: Part, *args: Any, **options: Any) -> None:
            if "_options" not in self.__dict__:  # a subclass's constructor comes first and calls its parent's
                bound = inspect.signature(init).bind(self, *args, **options)
                self.__dict__["_options"] = dict(list(bound.arguments.items())[1:])
            init(self, *args, **options)

        cls.__init__ = recording  # type: ignore[assignment]

    def recipe(self) -> dict[str, Any] | None:
        """{"class_path", "init_args"} as JSON data, or None if an argument was an object that has no recipe."""
        try:
            arguments = {k: _plain(v) for k, v in self.__dict__["_options"].items()}
        except TypeError:
            return None
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}


def make(recipe: Mapping[str, Any]) -> Any:
    """The part that a recipe describes.

    Raises:
        NameNotFound: no such class. ConfigError: arguments that it does not take, or a class that is no part.
    """
    if not isinstance(recipe, Mapping) or not {"class_path"} <= set(recipe) <= {"class_path", "init_args"}:
        raise ConfigError(f"a recipe has class_path and init_args, given {recipe!r}")
    module, _, name = str(recipe["class_path"]).rpartition(".")
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        raise NameNotFound(f"{recipe['class_path']!r}: {error}") from error
    cls = getattr(home, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Part)):
        known = [n for n, v in vars(home).items() if isinstance(v, type) and issubclass(v, Part)]
        raise NameNotFound(f"{module!r} has no part {name!r}{nearest(name, known)}")
    arguments = {k: made(v) for k, v in (recipe.get("init_args") or {}).items()}
    try:
        inspect.signature(cls.__init__).bind(None, **arguments)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
    return cls(**arguments)


def made(value: Any) -> Any:
    """A recipe made, anything else as it is."""
    return make(value) if isinstance(value, Mapping) and "class_path" in value else value


def _plain(value: Any) -> Any:
    """JSON data for an argument; raises TypeError if there is none."""
    if isinstance(value, Part):
        recipe = value.recipe()
        if recipe is None:
            raise TypeError
        return recipe
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no recipe")
