"""Patterns over module and parameter paths: the language of a plan.

A path is `blocks.3.attn.qkv`; a pattern starts at the model's root and is matched segment by segment:

    *            one segment, or part of one        blocks.*.attn.qkv      llm.layers.1*.mlp
    **           any number of segments, also none  llm.**.q_proj
    {q,v} {0..5} alternatives, number ranges        llm.**.{q,v}_proj      blocks.{8..11}.mlp.fc1
    [q,v]        slices of a fused weight by role   blocks.*.attn.qkv[q,v]
    !            excludes; terms are separated by white space:  "llm.**.q_proj !llm.layers.0.**"

Choice: patterns are anchored at both ends and compiled to one regular expression. HF PEFT's suffix matching reads
shorter, but hits a vision tower and an LLM alike; `**.` in front says the same thing in the open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmpeft.errors import ConfigError, NameNotFound, nearest

_ROLES = re.compile(r"^(?P<path>.*?)\[(?P<roles>[A-Za-z_, ]+)\]$")
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Term:
    """One white-space separated part of a pattern."""

    text: str
    exclude: bool
    roles: tuple[str, ...]
    regex: re.Pattern[str]
    names_leaf: bool  # its last segment is more than wildcards, so it may mean a parameter


def parse(pattern: str) -> tuple[Term, ...]:
    """Split a pattern into terms.

    Raises:
        ConfigError: an empty pattern, unbalanced brackets, or a pattern that only excludes.
    """
    terms = tuple(_parse_term(text) for text in pattern.split())
    if not any(not term.exclude for term in terms):
        raise ConfigError(f"pattern {pattern!r} includes nothing; write at least one term without '!'")
    return terms


def select(pattern: str, modules: Iterable[str], parameters: Iterable[str] = ()) -> list[tuple[str, tuple[str, ...]]]:
    """The paths a pattern matches, in their own order, each with the roles asked for (empty: the whole tensor).

    A parameter is matched by a term that names it (`**.in_proj_weight`), not by one that ends in a wildcard:
    `blocks.**` means modules, whose methods know their parameters.

    Raises:
        NameNotFound: a term that matches nothing, excluding terms included; the message lists the nearest paths.
    """
    leaves = list(parameters)
    own, paths = set(leaves), [*modules, *leaves]
    terms = parse(pattern)
    chosen: dict[str, tuple[str, ...]] = {}
    for term in terms:
        anything = term.names_leaf or term.exclude
        hits = [path for path in paths if (anything or path not in own) and term.regex.fullmatch(path)]
        if not hits:
            raise NameNotFound(f"pattern {term.text!r} matches no module or parameter{_hint(term, paths)}")
        for path in hits:
            if term.exclude:
                chosen.pop(path, None)
            else:
                chosen[path] = term.roles
    if not chosen:
        raise NameNotFound(f"pattern {pattern!r} excludes everything it includes")
    return [(path, chosen[path]) for path in paths if path in chosen]


def _parse_term(text: str) -> Term:
    exclude = text.startswith("!")
    body = text[1:] if exclude else text
    roles: tuple[str, ...] = ()
    if found := _ROLES.match(body):
        body = found["path"]
        roles = tuple(role.strip() for role in found["roles"].split(",") if role.strip())
    if not body or body.count("{") != body.count("}") or "[" in body or "]" in body:
        raise ConfigError(f"pattern term {text!r} is malformed; expected segments like blocks.*.attn.qkv[q,v]")
    if exclude and roles:
        raise ConfigError(f"pattern term {text!r} excludes by role; name the roles to include instead")
    alternatives = [_regex(path) for path in _expand(body)]
    names_leaf = body.rpartition(".")[2].strip("*") != ""
    return Term(text, exclude, roles, re.compile("|".join(f"(?:{a})" for a in alternatives)), names_leaf)


def _expand(body: str) -> list[str]:
    """Write out braces: 'a.{b,c}' -> ['a.b', 'a.c'], '{0..2}' -> ['0', '1', '2']."""
    found = _BRACES.search(body)
    if found is None:
        return [body]
    inner = found[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    options: Sequence[str]
    options = [str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else inner.split(",")
    head, tail = body[: found.start()], body[found.end() :]
    return [path for option in options for path in _expand(head + option.strip() + tail)]


def _regex(path: str) -> str:
    """'a.**.b*' -> 'a\\.(?:[^.]+\\.)*b[^.]*'; a final ** also matches the path before it."""
    segments = path.split(".")
    out = ""
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            if last:
                out = out.removesuffix(r"\.") + (r"(?:\.[^.]+)*" if i else r".*")
            else:
                out += r"(?:[^.]+\.)*"
        else:
            out += re.escape(segment).replace(r"\*", "[^.]*" if len(segment) > 1 else "[^.]+")
            out += "" if last else r"\."
    return out


def _hint(term: Term, paths: list[str]) -> str:
    """Nearest paths, with layer numbers folded to * so that one block stands for all of them."""
    folded = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths if path}
    return nearest(re.sub(r"\[.*\]$", "", term.text.lstrip("!")), sorted(folded), n=4)
