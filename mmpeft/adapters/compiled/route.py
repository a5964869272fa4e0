"""Another forward in front of a module's own: taken off again without trace, and left behind by copies and pickles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from mmpeft.errors import Unsupported


class Route:
    """Stands in for `module.forward` and calls `fast(route, *args, **kwargs)`, which may call `route.plain(...)`.

    A deep copy or a pickle of the module has its own forward again: what a fast path prepared belongs to the original.
    """

    def __init__(self, module: nn.Module, fast: Callable[..., Any]) -> None:
        if "forward" in module.__dict__:
            raise Unsupported(f"{type(module).__name__} has a forward of its own in place of its class's: undo that first")
        self.module, self.fast = module, fast
        functools.update_wrapper(self, type(module).forward.__get__(module))
        self.__dict__.pop("__dict__", None)
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fast(self, *args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module), self.module)
        return functools.partial(type(self.module).forward, copied)

    def __reduce__(self) -> Any:
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Any:
    return functools.partial(type(module).forward, module)
