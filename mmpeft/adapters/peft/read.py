"""One HF PEFT adapter against one model: what it asks of the file, and everything that is wrong with it at once.

`Reader` hands out the file's tensors to whoever asks by key and shape, notes what is missing, misshapen or left over,
and turns the plain tensors beside an adapter (copies of whole modules, trained biases, embedding tables) into sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.classes import spec_of
from mmpeft.adapters.forward import stock_op
from mmpeft.adapters.method import Method, wide
from mmpeft.adapters.methods.selective import BitFit, Full, LayerNormTuning
from mmpeft.adapters.peft.codecs import Item, full_key, wrapped_path
from mmpeft.adapters.peft.table import LEAVES
from mmpeft.adapters.peft.targets import module_paths, saved_paths, target_paths
from mmpeft.adapters.site import Site, weight_site
from mmpeft.adapters.state import SLOT
from mmpeft.errors import FileFormatError, Unsupported, nearest


class Reader:
    """One adapter being read; `finish` raises if anything was noted."""

    def __init__(self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
        self.model, self.config, self.source = model, config, source
        self.modules = module_paths(model)
        self.left = dict(tensors)  # what no site has asked for yet
        self.problems: list[str] = []  # the file does not fit
        self.refused: list[str] = []  # the file fits, this engine cannot represent it
        self.names: dict[int, list[str]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            if SLOT not in path.split("."):
                self.parameters[path] = p
                self.names.setdefault(id(p), []).append(path)
        self.wrappers: dict[str, int] = {}

    def finish(self, found: list[Item]) -> list[Item]:
        """`found` and the sites of the plain tensors.

        Raises:
            Unsupported: sites that cannot be represented; all are named.
            FileFormatError: missing, extra or misshapen keys; all are named.
        """
        found += [item for path in saved_paths(self.config, self.modules) for item in self.copies(path, path)]
        found += self.plain()
        if self.refused:
            raise Unsupported(f"{self.source} cannot be represented:\n  " + "\n  ".join(self.refused[:20]))
        self.problems += [f"extra {full_key(key)}{nearest(key, self.parameters, n=1)}" for key in sorted(self.left)]
        if self.problems:
            more = f"\n  and {len(self.problems) - 20} more" if len(self.problems) > 20 else ""
            raise FileFormatError(
                f"{self.source} does not fit this model:\n  " + "\n  ".join(self.problems[:20]) + more
            )
        if not found:
            raise FileFormatError(f"{self.source} changes nothing of this model")
        return found

    # --- whole copies and plain tensors ------------------------------------------------------------------------------

    def copies(self, path: str, key: str) -> list[Item]:
        """Every parameter at or below a module, as the adapter's own values; buffers must be the base's."""
        found = []
        for below, module in self.modules.items():
            if below != path and not below.startswith(path + "."):
                continue
            inner = key + below.removeprefix(path)
            for tensor in module._parameters:
                found += self.value(below, tensor, f"{inner}.{tensor}")
            for n, buffer in module._buffers.items():
                if buffer is None or n in module._non_persistent_buffers_set:
                    continue
                given = self.take(f"{inner}.{n}", tuple(buffer.shape))
                if given is not None and not torch.equal(given.to(buffer), buffer):
                    self.refused.append(f"{below}.{n}: the adapter moved a buffer; statistics belong to the base here")
        return found

    def value(self, path: str, tensor: str, key: str) -> list[Item]:
        """The adapter's own value of one base tensor: a delta on norms, else a copy."""
        parameter = self.modules[path]._parameters[tensor]
        site = None if parameter is None else self.site(path, tensor)
        given = None if parameter is None else self.take(key, tuple(parameter.shape))
        if site is None or given is None or parameter is None:
            return []
        for other in self.names[id(parameter)]:
            twin = self.left.get(other) if other != f"{path}.{tensor}" else given
            if twin is None or not torch.equal(twin, given):
                self.refused.append(f"{path}.{tensor} is tied to {other}; the file trains the two apart")
                return []
            self.left.pop(other, None)
        return [self.as_item(site, given, parameter)]

    def as_item(self, site: Site, value: Tensor, base: nn.Parameter) -> Item:
        assert site.layout is not None
        change = (
            (value.to(wide(base.dtype)) - base.detach().cpu().to(wide(base.dtype)))
            if site.layout.name == "vector"
            else value
        )
        for method in (LayerNormTuning(), BitFit()):
            if site.tensor in method.tensors(site.path, self.modules[site.path]) and self.takes(site, method):
                return Item(site, method, {"delta": change})
        return Item(site, Full(), {"value": site.layout.to_matrix(value)})

    def takes(self, site: Site, method: Method) -> bool:
        """Norms are deltas in LN_TUNING, biases where the configuration trains them."""
        return self.config["peft_type"].upper() == "LN_TUNING" if method.name == "layernorm" else self.biases(site)

    def biases(self, site: Site) -> bool:
        inside = any(site.path == p or site.path.startswith(p + ".") for p in saved_paths(self.config, self.modules))
        return self.config.get("bias", "none") != "none" and not inside

    def plain(self) -> list[Item]:
        """Base tensors stored under their own names: trained biases, embedding tables of targeted or resized embeddings.

        Those that are the base's own values are passed over.
        """
        found = []
        for name, parameter in self.parameters.items():
            path, _, tensor = name.rpartition(".")
            key = f"{wrapped_path(path, self.wrappers, own=self.wrappers.get(path, 0))}.{tensor}" if path else tensor
            given = self.take(key, tuple(parameter.shape)) if key in self.left else None
            if given is None or torch.equal(given.to(parameter.dtype), parameter.detach().cpu()):
                continue
            site = self.site(path, tensor)
            if site is not None:
                found.append(self.as_item(site, given, parameter))
        return found

    # --- helpers -----------------------------------------------------------------------------------------------------

    def targets(self, fits: Callable[[nn.Module], bool], what: str) -> list[str]:
        """Paths that `target_modules` means; without the field, what the file itself names."""
        if self.config.get("target_modules") is None and not self.config.get("target_parameters"):
            names = LEAVES.get(self.config["peft_type"].upper(), {})
            keys = {k.rpartition(f".{name}")[0] for k in self.left for name in names if f".{name}" in k}
            paths = [p for p in self.modules if p in keys]
        else:
            paths = target_paths(self.config, self.modules, self.model)
        for path in paths:
            if not fits(self.modules[path]):
                self.refused.append(f"{path}: PEFT has no {what} for a {type(self.modules[path]).__name__}")
        return [path for path in paths if fits(self.modules[path])]

    def site(self, path: str, tensor: str) -> Site | None:
        module = self.modules[path] if path else self.model
        if module._parameters.get(tensor) is None:
            self.refused.append(
                f"{path}.{tensor} is computed (weight norm and kin); PEFT's adapter of it has no meaning"
            )
            return None
        return weight_site(path, module, tensor)

    def alone(self, site: Site) -> bool:
        """PEFT adapts one name of a tied weight and leaves the other on the base; here a tied weight is one site."""
        name = f"{site.path}.{site.tensor}"
        others = [n for n in self.names[id(self.parameters[name])] if n != name]
        if others:
            self.refused.append(
                f"{name} is tied to {others[0]}, which PEFT leaves unadapted; one weight cannot be both"
            )
        return not others

    def dropout(self, owner: nn.Module, tensor: str, field: str) -> float:
        op = stock_op(spec_of(type(owner))[0]) if tensor == "weight" else None
        drops = op is not None and op.drops and op.fits(owner)
        return float(self.config.get(field, 0.0)) if drops else 0.0

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """One tensor of the file; a missing or misshapen one is noted and None."""
        found = self.left.pop(key, None)
        if found is None:
            self.problems.append(f"missing {full_key(key)}")
        elif tuple(found.shape) != shape:
            self.problems.append(f"{full_key(key)} has shape {tuple(found.shape)}, expected {shape}")
            return None
        return found

    def number(self, value: Any, field: str) -> float:
        """A number of the configuration."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FileFormatError(f"{self.source}: {field} is {value!r}; expected a number")
        return float(value)

    def count(self, value: Any, field: str) -> int:
        """A positive whole number of the configuration."""
        if not isinstance(value, int) or value < 1:
            raise FileFormatError(f"{self.source}: {field} is {value!r}; expected a whole number >= 1")
        return value
