"""From HF PEFT's configuration and tensors to the sites, methods and values of this engine: LoRA, IA3 and norm
tuning here, the methods that wrap modules one by one in `codec.py` and its tables."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mmpeft.adapters.methods.lora import DoRA, Init, LoRA
from mmpeft.adapters.methods.quantised import QALoRA
from mmpeft.adapters.methods.scaling import IA3, input_channels
from mmpeft.adapters.methods.selective import BitFit
from mmpeft.adapters.peft.codec import decode_modules
from mmpeft.adapters.peft.codecs import (
    OUT_PROJ_TIMES,
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
from mmpeft.adapters.peft.projections import read_randlora, read_vera
from mmpeft.adapters.peft.prompts import read_prefix, read_prompts
from mmpeft.adapters.peft.read import Reader
from mmpeft.adapters.peft.table import CODECS
from mmpeft.adapters.peft.targets import (
    is_feedforward,
    pattern_value,
    target_parameters,
)
from mmpeft.adapters.peft.trained_tokens import read_tokens, read_tokens_beside
from mmpeft.adapters.site import Site, _is_hf_conv1d, weight_site
from mmpeft.errors import Unsupported, nearest

# Initialisations that leave the base as it is, and those that move it by a pair which the base's own weight gives again.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "true", "false")
_BASE_INITS: dict[str, Init] = {"pissa": "pissa", "olora": "olora"}
# Fields that change what a LoRA computes and have no counterpart here.
_LORA_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "use_bdlora", "velora_config",
)  # fmt: skip
_LORA_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IA3_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def decode(reader: Reader) -> list[Item]:
    """All sites of an adapter with their values.

    Raises:
        Unsupported, FileFormatError: as `Reader.finish`; another PEFT type.
    """
    kind = reader.config["peft_type"].upper()
    if kind in CODECS:
        return reader.finish(decode_modules(reader, CODECS[kind]))
    if kind not in _METHODS:
        known = sorted([*_METHODS, *CODECS])
        raise Unsupported(
            f"PEFT type {kind!r} has no method here{nearest(kind, known)}; mmpeft reads {', '.join(known)}"
        )
    return reader.finish(_METHODS[kind](reader))


def lora(reader: Reader) -> list[Item]:
    """LoRA and DoRA at modules, attention and bare parameters."""
    config = reader.config
    reader.refused += [f"{f}={config[f]!r} changes what the adapter computes" for f in _LORA_VARIANTS if config.get(f)]
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and init not in _BASE_INITS:
        reader.refused.append(
            f"init_lora_weights={init!r} rewrote the base; save it from PEFT with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if reader.refused:
        return []
    targets = reader.targets(
        lambda m: isinstance(m, _LORA_LAYERS) or _is_hf_conv1d(m) or is_packed_attention(m), "LoRA"
    )
    bare = target_parameters(config, reader.parameters)
    for path in targets:
        reader.wrappers[path] = 1
        if is_packed_attention(reader.modules[path]):
            reader.wrappers[f"{path}.out_proj"] = 1
    owners = [p.rpartition(".")[0] for p in bare]
    for path in owners:
        reader.wrappers[path] = reader.wrappers.get(path, 0) + 1
    found: list[Item] = []
    for path in targets:
        inner = [(path, "in_proj_weight"), (f"{path}.out_proj", "weight")]
        for owner, tensor in inner if is_packed_attention(reader.modules[path]) else [(path, "weight")]:
            times = OUT_PROJ_TIMES if owner != path else 1
            found += _low_rank(reader, path, owner, tensor, wrapped_path(owner, reader.wrappers), False, times)
    for i, parameter in enumerate(bare):  # the parameter registered last has the outermost wrapper
        owner, _, tensor = parameter.rpartition(".")
        key = wrapped_path(owner, reader.wrappers, own=owners[i + 1 :].count(owner))
        found += _low_rank(reader, parameter, owner, tensor, key, True)
    return found + read_tokens_beside(reader)


def _low_rank(reader: Reader, target: str, path: str, tensor: str, key: str, bare: bool, times: int = 1) -> list[Item]:
    """One LoRA site; `target` is what rank and alpha patterns look at, `key` where the file has it."""
    config, owner = reader.config, reader.modules[path]
    site = reader.site(path, tensor)
    if site is None or not reader.alone(site):
        return []
    rank = reader.count(pattern_value(config.get("rank_pattern"), target, config.get("r", 8)), "r")
    alpha = pattern_value(config.get("alpha_pattern"), target, config.get("lora_alpha", 8))
    alpha = times * reader.number(alpha, "lora_alpha")
    rslora = bool(config.get("use_rslora"))
    scale = alpha / (rank**0.5 if rslora else rank)
    names = ("lora_A.weight", "lora_B.weight") if bare else lora_names(owner)
    shapes = expert_shapes(site, rank) if bare else lora_shapes(site, rank)
    group = 0 if bare else _pools(reader, site, f"{key}.{names[0]}", rank)
    if group:
        shapes = ((rank, site.shape[1] // group), shapes[1])
    a, b = (reader.take(f"{key}.{n}", s) for n, s in zip(names, shapes, strict=True))
    tensors: dict[str, Tensor] = {}
    if config.get("use_dora"):
        m = reader.take(f"{key}.lora_magnitude_vector", magnitude_shape(site))
        tensors = {} if m is None else {"m": m.flatten()}
    bias = _extra_bias(reader, site, f"{key}.lora_B.bias", scale) if config.get("lora_bias") else []
    if a is None or b is None:
        return []
    if isinstance(owner, nn.Embedding) and owner.max_norm is not None:
        reader.refused.append(
            f"{path}: PEFT renormalises lora_A by the table's max_norm, which no update of it repeats"
        )
        return []
    pair = unpack_experts(a, b, site) if bare else unpack_lora(a, b, site)
    if pair is None:
        reader.refused.append(
            f"{path}: lora_A mixes the channels of different groups, which no grouped weight can hold"
        )
        return []
    A, B = fit_rank(*pair)
    used = A.shape[-2]
    init = _BASE_INITS.get(str(config.get("init_lora_weights")), "default")
    if init != "default" and used != rank:
        reader.refused.append(f"{path}: {init} of rank {rank} exceeds the matrix {site.shape}")
        return []
    dropout = reader.dropout(owner, tensor, "lora_dropout")
    if group:  # PEFT takes the means times their number
        whole = scale * used * (site.shape[1] // group)
        return [Item(site, QALoRA(rank=used, alpha=whole, dropout=dropout, group=group), {"A": A, "B": B})]
    method = (DoRA if config.get("use_dora") else LoRA)(
        rank=used,
        alpha=alpha if used == rank else scale * used,
        dropout=dropout,
        rslora=rslora and used == rank,
        init_from=init,
    )
    # PiSSA starts from the very pair PEFT does; OLoRA from QR as well, but PEFT subtracts it times the scale.
    starts = {"pissa": {"A0": 1.0, "B0": 1.0}, "olora": {"A0": scale, "B0": 1.0}}.get(init, {})
    return [Item(site, method, {"A": A, "B": B, **tensors}, starts), *bias]


def _pools(reader: Reader, site: Site, key: str, rank: int) -> int:
    """The group of inputs that lora_A sees the mean of, 0 for all inputs apart. PEFT pools in GPTQ layers alone and
    elsewhere passes `use_qalora` over, so the file's lora_A tells what was trained."""
    config, into, found = reader.config, site.shape[-1], reader.left.get(key)
    assert site.layout is not None
    linear = len(site.shape) == 2 and site.layout.name in ("linear", "transposed")
    if not config.get("use_qalora") or not linear or isinstance(reader.modules[site.path], nn.Embedding):
        return 0
    group = reader.count(config.get("qalora_group_size", 16), "qalora_group_size")
    if found is None or tuple(found.shape) == (rank, into) != (rank, into // group):
        return 0
    if group == 1:
        reader.refused.append(f"{site.path}: groups of 1 look like a plain LoRA, whose scale is {into} times smaller")
    elif into % group:
        reader.refused.append(f"{site.path}: qalora_group_size {group} does not divide the {into} inputs")
    if config.get("use_dora") or config.get("lora_bias") or str(config.get("init_lora_weights")) in _BASE_INITS:
        reader.refused.append(f"{site.path}: PEFT's QA-LoRA has no use_dora, no lora_bias and no start from the base")
    return group


def _extra_bias(reader: Reader, site: Site, key: str, scale: float) -> list[Item]:
    """`lora_bias`: a bias of lora_B, which is a scaled delta on the layer's own."""
    given = reader.take(key, (site.shape[0],))
    if reader.modules[site.path]._parameters.get("bias") is None or site.tensor != "weight":
        reader.refused.append(f"{site.path}: lora_bias adds a bias to a layer that has none")
        return []
    bias = weight_site(site.path, reader.modules[site.path], "bias")
    return [] if given is None else [Item(bias, BitFit(), {"delta": given * scale})]


def ia3(reader: Reader) -> list[Item]:
    """IA3 on outputs, or on the inputs of feed-forward modules."""
    found = []
    for path in reader.targets(lambda m: isinstance(m, _IA3_LAYERS) or _is_hf_conv1d(m), "IA3"):
        reader.wrappers[path] = 1
        feedforward = is_feedforward(reader.config, path)
        site = reader.site(path, "weight")
        if site is None or not reader.alone(site):
            continue
        channels = (input_channels(site) or site.shape[1]) if feedforward else site.shape[0]
        gains = reader.take(f"{wrapped_path(path, reader.wrappers)}.ia3_l", gain_shape(site, channels, feedforward))
        if gains is not None:
            found.append(Item(site, IA3(side="in" if feedforward else "out"), {"l": gains.flatten()}))
    return found


def layernorm(reader: Reader) -> list[Item]:
    """LN_TUNING: whole copies of the matched modules."""
    return [i for p in reader.targets(lambda m: True, "LN_TUNING") for i in reader.copies(p, f"{p}.ln_tuning_layers")]


_METHODS: dict[str, Callable[[Reader], list[Item]]] = {
    "LORA": lora,
    "IA3": ia3,
    "VERA": read_vera,
    "RANDLORA": read_randlora,
    "LN_TUNING": layernorm,
    "TRAINABLE_TOKENS": read_tokens,
    "PROMPT_TUNING": read_prompts,
    "P_TUNING": read_prompts,
    "PREFIX_TUNING": read_prefix,
}
