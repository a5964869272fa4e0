"""VeRA and RandLoRA: frozen random bases that all sites share, as PEFT stores them.

    VERA       base_model.vera_A [r, max in], base_model.vera_B [max out, r]; vera_lambda_d [r], vera_lambda_b [out]
    RANDLORA   base_model.randlora_A [r, 1, min], base_model.randlora_B [max, n, r] (and once more at every site);
               randlora_lambda [r, n], randlora_gamma [n, min] a site

PEFT draws VeRA's bases as we do, so a seed is enough where they are what it draws. RandLoRA's come from a generator
in bf16 or fp16, as the device has it, so they are always in the file; without them it cannot be read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.lora import VeRA, projection
from mmpeft.adapters.methods.lora_kin import RandLoRA
from mmpeft.adapters.peft.codecs import Item, is_stock, wrapped_path
from mmpeft.adapters.peft.read import Reader
from mmpeft.adapters.peft.targets import plain_number
from mmpeft.adapters.peft.write import Writer
from mmpeft.adapters.site import Site, _is_hf_conv1d
from mmpeft.errors import ConfigError

# --- reading ---------------------------------------------------------------------------------------------------------


def _sites(reader: Reader, what: str) -> list[Site]:
    targets = reader.targets(lambda m: isinstance(m, nn.Linear) or _is_hf_conv1d(m), what)
    reader.wrappers |= dict.fromkeys(targets, 1)
    return [site for path in targets if (site := reader.site(path, "weight")) is not None and reader.alone(site)]


def _largest(shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Largest number of rows and of columns."""
    return max(s[0] for s in shapes), max(s[1] for s in shapes)


def read_vera(reader: Reader) -> list[Item]:
    """VeRA; bases that are not what the seed draws are carried in the adapter."""
    config, sites = reader.config, _sites(reader, "VeRA")
    if not sites:
        return []
    rank, seed = reader.count(config.get("r", 256), "r"), int(config.get("projection_prng_key", 0))
    rows, columns = _largest([s.shape for s in sites])
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, columns), (rows, rank)
    drawn = [projection(*shape, generator) for shape in shapes]
    saved = bool(config.get("save_projection", True))
    A, B = [reader.take(f"base_model.vera_{n}", s) for n, s in zip("AB", shapes, strict=True)] if saved else drawn
    if A is None or B is None:
        return []
    own = not (torch.equal(A.float(), drawn[0]) and torch.equal(B.float(), drawn[1]))
    found = []
    for site in sites:
        key = wrapped_path(site.path, reader.wrappers)
        d, b = reader.take(f"{key}.vera_lambda_d", (rank,)), reader.take(f"{key}.vera_lambda_b", (site.shape[0],))
        method = VeRA(
            rank=rank,
            dropout=reader.dropout(reader.modules[site.path], "weight", "vera_dropout"),
            d_initial=float(config.get("d_initial", 0.1)),
            seed=seed,
            save_projection=own,
        )
        if d is not None and b is not None:
            found.append(Item(site, method, {"d": d, "b": b}, shared={"A": A, "B": B} if own else {}))
    return found


def read_randlora(reader: Reader) -> list[Item]:
    """RandLoRA with the bases in its file."""
    config, sites = reader.config, _sites(reader, "RandLoRA")
    if not bool(config.get("save_projection", True)):
        reader.refused.append(
            "save_projection=False: PEFT draws RandLoRA's bases in bf16 or fp16 as the device has it, so no seed gives "
            "them again; save the adapter with save_projection=True"
        )
    if not sites or reader.refused:
        return []
    r, alpha = (
        reader.count(config.get("r", 32), "r"),
        reader.number(config.get("randlora_alpha", 640), "randlora_alpha"),
    )
    small, large = sorted(_largest([s.shape for s in sites]))
    shapes = {"randlora_A": (r, 1, small), "randlora_B": (large, -(-small // r), r)}
    bases = {n: reader.take(f"base_model.{n}", shape) for n, shape in shapes.items()}
    found = []
    for site in sites:
        key, least = wrapped_path(site.path, reader.wrappers), min(site.shape)
        for n, base in bases.items():  # the copy that PEFT saves with every site
            again = reader.left.pop(f"{key}.{n}", None)
            if again is not None and base is not None and not torch.equal(again, base):
                reader.refused.append(f"{site.path}: its {n} is not the one that all sites share")
        lam = reader.take(f"{key}.randlora_lambda", (r, -(-least // r)))
        gamma = reader.take(f"{key}.randlora_gamma", (-(-least // r), least))
        if lam is None or gamma is None or bases["randlora_A"] is None or bases["randlora_B"] is None:
            continue
        method = RandLoRA(
            rank=r,
            alpha=alpha,
            dropout=reader.dropout(reader.modules[site.path], "weight", "randlora_dropout"),
            seed=int(config.get("projection_prng_key", 0)),
            save_projection=True,
        )
        try:
            method.check(site)
        except ConfigError as error:
            reader.refused.append(f"{site.path}: {error}")
            continue
        A, B = bases["randlora_A"].squeeze(1), bases["randlora_B"]
        B = B.reshape(large, r, -1).permute(2, 0, 1)  # PEFT's flat columns, read in the order (rank, n)
        found.append(Item(site, method, {"lambda_": lam.mT, "gamma": gamma}, shared={"A": A, "B": B}))
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


def _one_pair(writer: Writer, what: str) -> dict[str, Delta]:
    """One delta a module, all on the same bases; others are refused."""
    deltas = {path: group[0] for (path, _), group in writer.sites.items()}
    first = next(iter(deltas.values()))
    for (path, tensor), group in writer.sites.items():
        owner, delta = writer.owner(path), group[0]
        if tensor != "weight" or not (isinstance(owner, nn.Linear) or _is_hf_conv1d(owner)) or not is_stock(owner):
            writer.refused.append(f"{delta.site.name}: PEFT has no {what} for a {type(owner).__name__}")
        elif delta.site.rows is not None:
            writer.refused.append(f"{delta.site.name}: PEFT has one set of {what} vectors a weight, not one a slice")
        elif not (torch.equal(delta.A, first.A) and torch.equal(delta.B, first.B)):
            writer.refused.append(f"{delta.site.name}: PEFT has one pair of projections; this site has another")
        elif (delta.method.rank, delta.method.seed) != (first.method.rank, first.method.seed):  # type: ignore[attr-defined]
            writer.refused.append(f"{delta.site.name}: PEFT has one rank and one seed for all of an adapter's modules")
    writer.targets = dict.fromkeys(deltas)
    writer.wrappers = dict.fromkeys(deltas, 1)
    return deltas


def _put(writer: Writer, path: str, tensors: dict[str, Tensor]) -> None:
    key = wrapped_path(path, writer.wrappers)
    writer.tensors |= {f"{key}.{name}": t for name, t in tensors.items()}


def _common(writer: Writer, deltas: dict[str, Delta]) -> dict[str, Any]:
    first: Any = next(iter(deltas.values())).method
    return {
        "bias": "none",
        "fan_in_fan_out": writer.transposed(deltas),
        "init_weights": True,
        "projection_prng_key": first.seed,
        "r": first.rank,
        "save_projection": True,
        "target_modules": [path for path in writer.modules if path in deltas],
    }


def write_vera(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """VeRA, with its projections."""
    deltas = _one_pair(writer, "VeRA")
    if writer.refused:
        return {}
    first: Any = next(iter(deltas.values()))
    rows, columns = _largest([d.site.shape for d in deltas.values()])
    writer.tensors |= {"base_model.vera_A": first.A[:, :columns], "base_model.vera_B": first.B[:rows]}
    for path, delta in deltas.items():
        _put(writer, path, {"vera_lambda_d": delta.d, "vera_lambda_b": delta.b})
    method = first.method
    own = {"d_initial": method.d_initial, "vera_dropout": method.dropout}
    return {"peft_type": "VERA", **_common(writer, deltas), **own}


def write_randlora(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """RandLoRA, with its projections."""
    deltas = _one_pair(writer, "RandLoRA")
    if writer.refused:
        return {}
    first: Any = next(iter(deltas.values()))
    method = first.method
    small, large = sorted(_largest([d.site.shape for d in deltas.values()]))
    r, n = method.rank, -(-small // method.rank)
    flat = first.B.permute(1, 2, 0).flatten(1)
    writer.tensors["base_model.randlora_A"] = first.A[:, None, :small]
    writer.tensors["base_model.randlora_B"] = flat[:large, : n * r].unflatten(1, (n, r))
    for path, delta in deltas.items():
        _put(writer, path, {"randlora_lambda": delta.lambda_.mT, "randlora_gamma": delta.gamma})
        if delta.method.scale != method.scale:  # type: ignore[attr-defined]
            writer.refused.append(f"{path}: PEFT has one alpha for all of an adapter's modules")
    own = {"randlora_alpha": plain_number(method.scale * r), "randlora_dropout": method.dropout}
    return {"peft_type": "RANDLORA", **_common(writer, deltas), **own}
