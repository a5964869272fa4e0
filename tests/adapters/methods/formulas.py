"""Reading the count formulas of `mmpeft/adapters/families.py`: their grammar, what their letters are for a method at a shape,
and the configurations they are tried on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from math import ceil, gcd
from typing import Any

import torch
from torch import nn

import mmpeft
from mmpeft.adapters.families import Facts
from mmpeft.adapters.inspect import tensors_of
from mmpeft.adapters.plan import Plan, resolve
from mmpeft.adapters.storage.integer import Int
from mmpeft.errors import MmpeftError

WORDS = ("if", "else")
CALLS = {"max": max, "min": min, "ceil": ceil, "round": round}


def evaluate(formula: str, env: dict[str, Any]) -> Any:
    """A formula's value: a product is written side by side, a power with ^."""
    tokens = re.findall(r"\d+|\w+|\S", formula)
    out: list[str] = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        ends = before == ")" or (re.match(r"\w", before) and before not in (*WORDS, *CALLS))
        if ends and (token == "(" or re.match(r"\w", token)) and token not in WORDS:
            out.append("*")
        out.append("**" if token == "^" else "into" if token == "in" else token)
    names = {("into" if k == "in" else k): v for k, v in env.items()}
    return eval(" ".join(out), {"__builtins__": {}}, {**CALLS, **names})  # the project's own strings


def split(n: int) -> int:
    """The smaller of the most square pair of factors."""
    return max(i for i in range(1, n + 1) if n % i == 0 and i * i <= n)


def env_of(method: mmpeft.Method, shape: tuple[int, int]) -> dict[str, Any]:
    """The letters for a method at a site of shape (out, in); calls have `in` on both sides."""
    out, into = shape
    given = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name != "targets"}
    if method.kind != "weight":
        out = into
    env = {
        "in": into, "out": out, "width": into, "d": gcd(out, into), "targets": into + 2 * into, "layers": into // 32,
        "a1": split(out), "a2": split(into), "l": split(out), "m": split(into), "num_heads": 4,
    }  # fmt: skip
    env |= {"k": out // env["l"], "n": into // env["m"]}
    factor = given.get("factor", -1)
    if factor > 0:
        for small, large, n in (("l", "k", out), ("m", "n", into)):
            env[small] = factor if n % factor == 0 else max(i for i in range(1, factor + 1) if n % i == 0)
            env[large] = n // env[small]
    env |= {k: v for k, v in given.items() if v is not None}
    env["size"] = given.get("size") or max(1, into // given.get("reduction", 1))
    env["chosen"] = len(method.heads) or env["num_heads"] if isinstance(method, mmpeft.LoFiT) else 0
    if isinstance(method, mmpeft.FLOP):
        env["rank"] = method.rank or min(out, into)
    return env


class Layer(nn.Module):
    """What PEDRO looks for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(width, width), nn.Linear(width, 2 * width)


class Decoder(nn.Module):
    """What prompts look for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def place_of(method: mmpeft.Method, shape: tuple[int, int]) -> tuple[nn.Module, str]:
    """A model with one site of the shape, on the meta device (a packed weight is on the CPU), and where it is."""
    out, into = shape
    if isinstance(method, mmpeft.PEQA):
        model = nn.Sequential(nn.Linear(into, out))
        mmpeft.quantise(model, "0", Int(4, method.group))
        return model, "0"
    with torch.device("meta"):
        if isinstance(method, mmpeft.LayerNormTuning):
            return nn.Sequential(nn.LayerNorm(into)), "0"
        if isinstance(method, mmpeft.PEDRO):
            return nn.Sequential(Layer(into)), "0"
        if isinstance(method, mmpeft.VPT):
            return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(into, into) for _ in range(into // 32))}), "blocks"
        if isinstance(method, mmpeft.PromptTuning):
            return nn.ModuleDict({"llm": Decoder(into)}), "llm"
        return nn.Sequential(nn.Linear(into, out if method.kind == "weight" else into)), "0"


def counted(method: mmpeft.Method, shape: tuple[int, int]) -> int:
    """What the method trains there."""
    model, match = place_of(method, shape)
    targets, shared = resolve(model, Plan.read({match: method})), {}
    return sum(x.numel() for t in targets for x in tensors_of(model, t, targets, shared).trained.values())


def varied(cls: type[mmpeft.Method], facts: Facts, shape: tuple[int, int]) -> Iterator[tuple[mmpeft.Method, str, int]]:
    """(method, formula, true count): the default, made to fit; each number among its fields doubled, halved and two more,
    where that fits; what is None, given; and the options."""
    start = default(cls)
    yield start, facts.count, counted(start, shape)
    special = {field for field, _, _ in facts.other}
    for f in dataclasses.fields(cls):
        value = getattr(start, f.name)
        if type(value) not in (int, float) or f.name in special:
            continue
        for other in {2 * value, value // 2 if type(value) is int else value / 2, value + 2} - {value}:
            try:
                changed = dataclasses.replace(start, **{f.name: other})
                count = counted(changed, shape)
            except (MmpeftError, ValueError):
                continue
            yield changed, facts.count, count
    if {"a1", "a2"} <= {f.name for f in dataclasses.fields(cls)}:
        changed = dataclasses.replace(start, a1=4, a2=2)
        yield changed, facts.count, counted(changed, shape)
    for field, value, formula in facts.other:
        changed = dataclasses.replace(start, **{field: value})
        yield changed, formula, counted(changed, shape)


def default(cls: type[mmpeft.Method]) -> mmpeft.Method:
    """Default fields, but heads and names that a bare linear layer cannot tell, and a rank that fits 64."""
    known = {f.name for f in dataclasses.fields(cls)}
    given = {"num_heads": 4, "after": 0, "targets": ("q_proj", "up_proj")}
    fields = {k: v for k, v in given.items() if k in known}
    fields |= {mmpeft.MiSS: {"rank": 16}, mmpeft.VeRA: {"rank": 16}, mmpeft.Compacter: {"reduction": 8}}.get(cls, {})
    return cls(**fields)
