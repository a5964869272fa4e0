"""Which modules an HF PEFT configuration means: its selection rules, on plain data.

    target_modules      a string is a regular expression for the whole path, "all-linear" every linear layer but the head;
                        a list holds whole paths or endings of paths ("q_proj")
    exclude_modules     the same language, and wins
    modules_to_save     endings (of the string, not of the path: "head" hits "aux_head"), trained whole, never adapted
    layers_to_transform numbers of layers, for lists only
    rank_pattern        regular expressions for a path or its ending; the first that matches decides

Reading a folder needs these rules to know what a file must hold, writing one to prove that PEFT will find what was meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mmpeft.adapters.site import _is_hf_conv1d as is_hf_conv1d
from mmpeft.adapters.state import SLOT
from mmpeft.errors import FileFormatError

Config = Mapping[str, Any]


def module_paths(model: nn.Module, *, duplicates: bool = False) -> dict[str, nn.Module]:
    """Modules of the base by path, the root and all adapters left out; `duplicates` lists shared modules under each path."""
    found = model.named_modules(remove_duplicate=not duplicates)
    return {path: module for path, module in found if path and SLOT not in path.split(".")}


def target_paths(config: Config, modules: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Paths of the modules that PEFT adapts under this configuration, in the model's order."""
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        config = {**config, "target_modules": _all_linear(config, modules, model)}
    return [path for path in modules if is_target(config, path)]


def is_target(config: Config, path: str) -> bool:
    """Whether `target_modules` and its companions mean the module at `path`."""
    targets = config.get("target_modules")
    if not targets or _listed(config.get("exclude_modules"), path) or in_saved(config, path):
        return False
    if isinstance(targets, str) or path in targets:
        return _listed(targets, path)
    return _listed(targets, path) and _in_layers(config, path)


def _listed(names: str | Iterable[str] | None, path: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return compiled(names).fullmatch(path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _in_layers(config: Config, path: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    names = config.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){p}" for p in ([names] if isinstance(names, str) else names)] or [r".*?\.[^.]*"]
    found = next((m for p in patterns if (m := compiled(rf"{p}\.(\d+)\.").match(path))), None)
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def _all_linear(config: Config, modules: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Every nn.Linear and HF Conv1D, less the output head of a transformers model."""
    head = None
    if any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__):
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None and config.get("task_type") == "SEQ_CLS":
            head = next((h for n in ("score", "classifier") if (h := getattr(model, n, None)) is not None), None)
    linear = [path for path, m in modules.items() if isinstance(m, nn.Linear) or is_hf_conv1d(m)]
    return [path for path in linear if modules[path] is not head]


def saved_paths(config: Config, modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules that `modules_to_save` copies whole; the outermost where they nest."""
    names = tuple(config.get("modules_to_save") or ())
    hits = [path for path in modules if names and path.endswith(names)]
    return [path for path in hits if not any(path.startswith(other + ".") for other in hits)]


def in_saved(config: Config, path: str) -> bool:
    """Whether the module is one of `modules_to_save` or below one, and so never adapted."""
    return any(compiled(rf"(^|.*\.){name}($|\..*)").match(path) for name in config.get("modules_to_save") or ())


def is_feedforward(config: Config, path: str) -> bool:
    """IA3: whether the gains are on the module's input. A list means endings of the string."""
    names = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return compiled(names).fullmatch(path) is not None
    return path.endswith(tuple(names)) if names else False


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """`rank_pattern` or `alpha_pattern` at a path: the first entry that matches, else the default."""
    for pattern, value in (patterns or {}).items():
        if compiled(rf"(.*\.)?({pattern})$").match(path):
            return value
    return default


def late_pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The older rule of `block_size_pattern` and `n_frequency_pattern`: an expression for what follows a dot, else the
    whole path as it is."""
    found = next((p for p in patterns or {} if compiled(rf".*\.{p}$").match(path)), path)
    return (patterns or {}).get(found, default)


def target_parameters(config: Config, parameters: Iterable[str]) -> list[str]:
    """Full names of the bare parameters that `target_parameters` means."""
    names = config.get("target_parameters") or ()
    return [p for p in parameters if any(p == name or p.endswith("." + name) for name in names)]


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression of the configuration.

    Raises:
        FileFormatError: it is not one.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FileFormatError(
            f"adapter_config.json holds {pattern!r}, which is no regular expression: {error}"
        ) from error


def any_of(paths: Iterable[str]) -> str:
    """An expression for exactly these paths."""
    return "|".join(re.escape(path) for path in paths) or "$^"


def pattern_key(target: str, targets: Iterable[str]) -> str:
    """A key for rank_pattern: the path, anchored where it would also end another target's path."""
    hits = [t for t in targets if pattern_value({target: True}, t, False)]
    return target if hits == [target] else f"^{re.escape(target)}"


def plain_number(x: float) -> float | int:
    """Free of rounding: alpha / r * r."""
    near = round(x, 9)
    return int(near) if near == int(near) else near
