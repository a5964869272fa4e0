"""From a PEFT configuration and its tensors to the sites, methods and values of this engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.classes import spec_of
from mmpeft.adapters.forward import stock_op
from mmpeft.adapters.lora import DoRA, Init, LoRA, VeRA, projection
from mmpeft.adapters.method import Method, wide
from mmpeft.adapters.peft_codecs import (
    OUT_PROJ_TIMES,
    PREFIX,
    Item,
    expert_shapes,
    fit_rank,
    gain_shape,
    is_packed_attention,
    lora_names,
    lora_shapes,
    magnitude_shape,
    unpack_experts,
    unpack_lora,
    wrapped_path,
)
from mmpeft.adapters.peft_targets import (
    is_feedforward,
    module_paths,
    pattern_value,
    saved_paths,
    target_parameters,
    target_paths,
)
from mmpeft.adapters.scaling import IA3, input_channels
from mmpeft.adapters.selective import BitFit, Full, LayerNormTuning
from mmpeft.adapters.site import Site, _is_hf_conv1d, weight_site
from mmpeft.adapters.state import SLOT
from mmpeft.errors import FileFormatError, Unsupported, nearest

# Initialisations that leave the base as it is, and those that move it by a pair which the base's own weight gives again.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "true", "false")
_BASE_INITS: dict[str, Init] = {"pissa": "pissa", "olora": "olora"}
# Fields that change what a LoRA computes and have no counterpart here.
_LORA_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_LORA_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IA3_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


class Decoder:
    """Reads one PEFT adapter against one model; `items()` gives its sites, or says everything that is wrong with it."""

    def __init__(self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
        self.model, self.config, self.source = model, config, source
        self.modules = module_paths(model)
        self.left = dict(tensors)  # what no site has asked for yet
        self.shared: dict[str, Tensor] = {}  # tensors that several sites share (VeRA's projections)
        self.problems: list[str] = []  # the file does not fit
        self.refused: list[str] = []  # the file fits, this engine cannot represent it
        self.names: dict[int, list[str]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            if SLOT not in path.split("."):
                self.parameters[path] = p
                self.names.setdefault(id(p), []).append(path)
        self.wrappers: dict[str, int] = {}

    def items(self) -> list[Item]:
        """All sites with their values.

        Raises:
            Unsupported: another method, or sites that cannot be represented; all are named.
            FileFormatError: missing, extra or misshapen keys; all are named.
        """
        kind = self.config["peft_type"].upper()
        if kind not in _METHODS:
            raise Unsupported(f"PEFT type {kind!r}{nearest(kind, _METHODS)}; mmpeft reads {', '.join(_METHODS)}")
        found = _METHODS[kind](self)
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

    # --- methods -----------------------------------------------------------------------------------------------------

    def lora(self) -> list[Item]:
        """LoRA and DoRA at modules, attention and bare parameters."""
        config = self.config
        self.refused += [
            f"{f}={config[f]!r} changes what the adapter computes" for f in _LORA_VARIANTS if config.get(f)
        ]
        init = config.get("init_lora_weights", True)
        if init not in _PLAIN_INITS and init not in _BASE_INITS:
            self.refused.append(
                f"init_lora_weights={init!r} rewrote the base; save it from PEFT with "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        if self.refused:
            return []
        targets = self.targets(
            lambda m: isinstance(m, _LORA_LAYERS) or _is_hf_conv1d(m) or is_packed_attention(m), "LoRA"
        )
        bare = target_parameters(config, self.parameters)
        for path in targets:
            self.wrappers[path] = 1
            if is_packed_attention(self.modules[path]):
                self.wrappers[f"{path}.out_proj"] = 1
        owners = [p.rpartition(".")[0] for p in bare]
        for path in owners:
            self.wrappers[path] = self.wrappers.get(path, 0) + 1
        found: list[Item] = []
        for path in targets:
            inner = [(path, "in_proj_weight"), (f"{path}.out_proj", "weight")]
            for owner, tensor in inner if is_packed_attention(self.modules[path]) else [(path, "weight")]:
                times = OUT_PROJ_TIMES if owner != path else 1
                found += self.low_rank(path, owner, tensor, wrapped_path(owner, self.wrappers), False, times)
        for i, parameter in enumerate(bare):  # the parameter registered last has the outermost wrapper
            owner, _, tensor = parameter.rpartition(".")
            key = wrapped_path(owner, self.wrappers, own=owners[i + 1 :].count(owner))
            found += self.low_rank(parameter, owner, tensor, key, True)
        return found

    def low_rank(self, target: str, path: str, tensor: str, key: str, bare: bool, times: int = 1) -> list[Item]:
        """One LoRA site; `target` is what rank and alpha patterns look at, `key` where the file has it."""
        config, owner = self.config, self.modules[path]
        site = self.site(path, tensor)
        if site is None or not self.alone(site):
            return []
        rank = self.count(pattern_value(config.get("rank_pattern"), target, config.get("r", 8)), "r")
        alpha = times * float(pattern_value(config.get("alpha_pattern"), target, config.get("lora_alpha", 8)))
        rslora = bool(config.get("use_rslora"))
        scale = alpha / (rank**0.5 if rslora else rank)
        names = ("lora_A.weight", "lora_B.weight") if bare else lora_names(owner)
        shapes = expert_shapes(site, rank) if bare else lora_shapes(site, rank)
        a, b = (self.take(f"{key}.{n}", s) for n, s in zip(names, shapes, strict=True))
        tensors: dict[str, Tensor] = {}
        if config.get("use_dora"):
            m = self.take(f"{key}.lora_magnitude_vector", magnitude_shape(site))
            tensors = {} if m is None else {"m": m.flatten()}
        bias = self.extra_bias(site, f"{key}.lora_B.bias", scale) if config.get("lora_bias") else []
        if a is None or b is None:
            return []
        if isinstance(owner, nn.Embedding) and owner.max_norm is not None:
            self.refused.append(
                f"{path}: PEFT renormalises lora_A by the table's max_norm, which no update of it repeats"
            )
            return []
        pair = unpack_experts(a, b, site) if bare else unpack_lora(a, b, site)
        if pair is None:
            self.refused.append(
                f"{path}: lora_A mixes the channels of different groups, which no grouped weight can hold"
            )
            return []
        A, B = fit_rank(*pair)
        used = A.shape[-2]
        init = _BASE_INITS.get(str(config.get("init_lora_weights")), "default")
        if init != "default" and used != rank:
            self.refused.append(f"{path}: {init} of rank {rank} exceeds the matrix {site.shape}")
            return []
        method = (DoRA if config.get("use_dora") else LoRA)(
            rank=used,
            alpha=alpha if used == rank else scale * used,
            dropout=self.dropout(owner, tensor, "lora_dropout"),
            rslora=rslora and used == rank,
            init_from=init,
        )
        # PiSSA starts from the very pair PEFT does; OLoRA from QR as well, but PEFT subtracts it times the scale.
        starts = {"pissa": {"A0": 1.0, "B0": 1.0}, "olora": {"A0": scale, "B0": 1.0}}.get(init, {})
        return [Item(site, method, {"A": A, "B": B, **tensors}, starts), *bias]

    def extra_bias(self, site: Site, key: str, scale: float) -> list[Item]:
        """`lora_bias`: a bias of lora_B, which is a scaled delta on the layer's own."""
        given = self.take(key, (site.shape[0],))
        if self.modules[site.path]._parameters.get("bias") is None or site.tensor != "weight":
            self.refused.append(f"{site.path}: lora_bias adds a bias to a layer that has none")
            return []
        return (
            []
            if given is None
            else [Item(weight_site(site.path, self.modules[site.path], "bias"), BitFit(), {"delta": given * scale})]
        )

    def ia3(self) -> list[Item]:
        """IA3 on outputs, or on the inputs of feed-forward modules."""
        found = []
        for path in self.targets(lambda m: isinstance(m, _IA3_LAYERS) or _is_hf_conv1d(m), "IA3"):
            self.wrappers[path] = 1
            feedforward = is_feedforward(self.config, path)
            site = self.site(path, "weight")
            if site is None or not self.alone(site):
                continue
            channels = (input_channels(site) or site.shape[1]) if feedforward else site.shape[0]
            gains = self.take(f"{wrapped_path(path, self.wrappers)}.ia3_l", gain_shape(site, channels, feedforward))
            if gains is not None:
                found.append(Item(site, IA3(side="in" if feedforward else "out"), {"l": gains.flatten()}))
        return found

    def vera(self) -> list[Item]:
        """VeRA; projections that are not what the seed draws are carried in the adapter."""
        config = self.config
        targets = self.targets(lambda m: isinstance(m, nn.Linear) or _is_hf_conv1d(m), "VeRA")
        sites = [site for path in targets if (site := self.site(path, "weight")) is not None and self.alone(site)]
        if not sites:
            return []
        rank, seed = self.count(config.get("r", 256), "r"), int(config.get("projection_prng_key", 0))
        generator = torch.Generator().manual_seed(seed)
        shapes = (rank, max(s.shape[1] for s in sites)), (max(s.shape[0] for s in sites), rank)
        drawn = [projection(*shape, generator) for shape in shapes]
        saved = bool(config.get("save_projection", True))
        given = [self.take(f"base_model.vera_{n}", s) for n, s in zip("AB", shapes, strict=True)] if saved else drawn
        if given[0] is None or given[1] is None:
            return []
        own = any(not torch.equal(g.float(), d) for g, d in zip(given, drawn, strict=True) if g is not None)
        self.shared = {"A": given[0], "B": given[1]} if own else {}
        found = []
        for site in sites:
            self.wrappers[site.path] = 1
        for site in sites:
            key = wrapped_path(site.path, self.wrappers)
            d, b = self.take(f"{key}.vera_lambda_d", (rank,)), self.take(f"{key}.vera_lambda_b", (site.shape[0],))
            method = VeRA(
                rank=rank,
                dropout=float(config.get("vera_dropout", 0.0)),
                d_initial=float(config.get("d_initial", 0.1)),
                seed=seed,
                save_projection=own,
            )
            if d is not None and b is not None:
                found.append(Item(site, method, {"d": d, "b": b}))
        return found

    def layernorm(self) -> list[Item]:
        """LN_TUNING: whole copies of the matched modules."""
        return [i for p in self.targets(lambda m: True, "LN_TUNING") for i in self.copies(p, f"{p}.ln_tuning_layers")]

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
            keys = {
                k.rpartition(f".{m}")[0]
                for k in self.left
                for m in ("lora_", "ia3_", "vera_lambda_", "ln_tuning_")
                if f".{m}" in k
            }
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

    def count(self, value: Any, field: str) -> int:
        """A positive whole number of the configuration."""
        if not isinstance(value, int) or value < 1:
            raise FileFormatError(f"{self.source}: {field} is {value!r}; expected a whole number >= 1")
        return value


def full_key(key: str) -> str:
    """A key as the file has it."""
    return key if key.startswith("base_model.") else PREFIX + key


_METHODS: dict[str, Callable[[Decoder], list[Item]]] = {
    "LORA": Decoder.lora,
    "IA3": Decoder.ia3,
    "VERA": Decoder.vera,
    "LN_TUNING": Decoder.layernorm,
}
