"""The whole grid of method x kind of site x precision x mode, of which `test_grid.py` runs a sample; `make grid` writes it
down.

    python tests/adapters/grid.py --out docs/grid.md            # all; --methods LoRA,DoRA and --sites mha,lstm for a part

A cell attaches one method to one kind of site with the liveness proof of `attach`, in float32, float64 and bfloat16, and
holds what the method promises, its tensors random:

    start      the adapted model is the base at first (unless the method says otherwise)
    effect     then it is not, in train, eval and eval without gradients
    gradient   every trained tensor gets a finite one, not all zero, in train and in eval
    modes      eval with and without gradients agree, and train with them (unless the method draws in training)
    base       `use(None)` is the base bit for bit
    merge      merged weights give the same output; call and token methods refuse
    detach     afterwards the model computes what it did, bit for bit

Configurations are small; where a size has to divide the site's, the first of `CHOICES` that attaches is taken. Methods
that choose places from data take random places here: the choice has tests of its own. NEFT is given the weights after a
run, PEQA a quantised base; what steers (RepE, ITI) trains nothing, so its directions are random and no gradient is asked.
LayerDrop, which only skips layers at random, is not in the grid.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from cases import SITES, STOOD_FOR, Host, SiteCase, base_output, deltas, fill  # noqa: E402

import mmpeft  # noqa: E402
from mmpeft.adapters import catalogue  # noqa: E402
from mmpeft.adapters.method import Method  # noqa: E402
from mmpeft.adapters.storage.integer import Int  # noqa: E402
from mmpeft.adapters.storage.packed_weight import PackedWeight  # noqa: E402
from mmpeft.errors import MmpeftError, NameNotFound  # noqa: E402

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 0.1}  # and what counts as equal, of the largest

SMALL: dict[str, Any] = {  # fields of these names get these values
    "rank": 2, "start": 2, "size": 4, "num_tokens": 3, "count": 5, "criterion": "random", "dimension": 6,
    "activation": "gelu", "hidden": 4, "adapters": 4, "d": 2, "iterations": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # and these methods these
    "IncreLoRA": {"start": 1e-5},
    "SURM": {"rank": 1},
    "FLOP": {"rank": 0},
    "FourierFT": {"n": 6},
    "SparseRows": {"count": 2},
    "FAR": {"count": 2},
    "NEFT": {"count": 2, "criterion": "change"},
    "LoKr": {"rank": 1},
    "KAdaptation": {"rank": 1},
    "Propulsion": {"degree": 3},
    "SHiRA": {"count": None, "rank": 1},
    "Compacter": {"rank": 1},
    "XPEFT": {"std": 0.2},
    "Gated": {"inner": mmpeft.LoRA(rank=2)},
}
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "OFT": {"block_size": (4, 5, 3, 2)},
    "BOFT": {"block_size": (4, 2), "m": (1,)},
    "C3A": {"block_size": (4, 2, 1)},
    "GraLoRA": {"k": (2, 1)},
    "KAdaptation": {"t": (2, 1)},
    "QALoRA": {"group": (2, 3, 1)},  # not all inputs: their mean behind a norm is 0
    "PHMAdapter": {"n": (2, 1)},
    "Compacter": {"n": (2, 1)},
    "FacTTT": {"rank": (2, 1)},
    "FacTTK": {"rank": (2, 1)},
    "AttnScale": {"tokens": (17, 5)},
    "HeadScaling": {"num_heads": (None, 2, 1)},
    "LoFiT": {"num_heads": (None, 2, 1)},
    "ITI": {"num_heads": (None, 2, 1)},
    "AttnScaleLite": {"num_heads": (None, 2, 1)},
}
SPREAD = {"PEQA": 0.002, "Propulsion": 0.05, "DeltaLoRA": 0.1, "RandLoRA": 0.1, "FourierFT": 0.5, "C3A": 1.0, "DID": 2.0, "SAID": 2.0}
INVARIANT = {("AdaDEFT", "vit-blocks"): "a factor on what the final norm reads changes nothing"}
NOT_HERE = {"LayerDrop"}  # neither a trained tensor nor a direction
STEERS = {"RepE": "v", "ITI": "v"}  # nothing is trained: the tensor that is set instead
GAP = {"IncreLoRA": 1e-4}  # how far the start is from the base, where it is not within rounding
DRAWS = {"DyLoRA", "LoRADropout", "FLOP"}  # in training


def _vit() -> nn.Module:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return _lively(timm.create_model("vit_tiny_patch16_224", **sizes))


def _packed() -> nn.Module:
    model = Host(nn.Linear(8, 6), 8)
    mmpeft.quantise(model, "site", Int(8))
    return model


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return _lively(LlamaForCausalLM(config))


def _lively(model: nn.Module) -> nn.Module:
    """Matrices five times their start of 0.02, at which attention hardly looks at anything."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    return model


def _pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def _tokens() -> Tensor:
    return torch.randint(0, 31, (2, 5))


WHOLE = [
    SiteCase("packed-int8", _packed, lambda: torch.randn(3, 4, 8)),
    SiteCase("vit-attention", _vit, _pixels, "blocks.*.attn"),
    SiteCase("vit-mlp", _vit, _pixels, "blocks.*.mlp"),
    SiteCase("vit-blocks", _vit, _pixels, "blocks"),
    SiteCase("vit-qkv", _vit, _pixels, "blocks.*.attn.qkv[q,v]"),
    SiteCase("llm", _llama, _tokens, "model"),
    SiteCase("llm-layers", _llama, _tokens, "model.layers.*"),
    SiteCase("llm-attention", _llama, _tokens, "model.layers.*.self_attn"),
    SiteCase("llm-linears", _llama, _tokens, "model.layers.*.{self_attn,mlp}.*_proj"),
]
KINDS = [site for site in SITES if not site.variant and site.name not in STOOD_FOR] + WHOLE


ELSEWHERE = "the method is for another kind of place"
WARNED = "not refused but warned of: the model around never calls this module, so nothing would be trained"


def after_a_run(model: nn.Module, method: Method, site: SiteCase, x: Tensor) -> None:
    """Attach by the difference to what a run of training would have made."""
    g = torch.Generator().manual_seed(3)
    trained = {
        n: t + 0.1 * torch.randn(t.shape, generator=g).to(t) if t.is_floating_point() else t
        for n, t in model.state_dict().items()
    }
    mmpeft.attach_selected(model, {site.match: method}, trained=trained, name="a", example=x)


def plainly(model: nn.Module, method: Method, site: SiteCase, x: Tensor) -> None:
    mmpeft.attach(model, {site.match: method}, name="a", example=x)


def quantised(model: nn.Module, site: SiteCase) -> None:
    """The site's linear layers as integers, where they are not yet."""
    if not any(type(p) is PackedWeight for p in model.parameters()):
        mmpeft.quantise(model, re.sub(r"\[.*?\]", "", site.match), Int(8))


ATTACH: dict[str, Callable[[nn.Module, Method, SiteCase, Tensor], None]] = {"NEFT": after_a_run}
PREPARE: dict[str, Callable[[nn.Module, SiteCase], None]] = {"PEQA": quantised}


@dataclass
class Cell:
    refused: str = ""
    failed: tuple[str, ...] = ()

    def mark(self, reasons: dict[str, int]) -> str:
        """ok, the number of the reason, or what failed."""
        if self.failed:
            return "**" + "; ".join(self.failed) + "**"
        if not self.refused:
            return "ok"
        return "" if self.refused == ELSEWHERE else f"{reasons.setdefault(self.refused, len(reasons) + 1)}"


def configurations(cls: type[Method]) -> Iterator[Method]:
    """Small ones, in the order in which they are tried."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    base = {k: v for k, v in (SMALL | OWN.get(cls.__name__, {})).items() if k in known}
    choices = CHOICES.get(cls.__name__, {})
    for values in itertools.product(*choices.values()):
        yield cls(**base | dict(zip(choices, values, strict=True)))


def cell(cls: type[Method], site: SiteCase) -> Cell:
    """One cell, over all precisions."""
    if (cls.__name__, site.name) in INVARIANT:
        return Cell(refused=INVARIANT[cls.__name__, site.name])
    failed: list[str] = []
    for dtype in DTYPES:
        torch.manual_seed(0)
        name = str(dtype).removeprefix("torch.")
        try:
            result = check(cls, site, dtype)
        except Exception as error:  # anything that is no refusal is a finding
            failed.append(f"{name}: {type(error).__name__}: {_line(error)}")
            continue
        if isinstance(result, str):
            if dtype is torch.float32:
                return Cell(refused=result)
            failed.append(f"{name}: refused: {result}")
        elif result:
            failed.append(f"{name}: {', '.join(result)}")
    return Cell(failed=tuple(failed))


def check(cls: type[Method], site: SiteCase, dtype: torch.dtype) -> list[str] | str:
    """What does not hold; or why the method is refused."""
    model, x = site.make().to(dtype).eval(), site.data()
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        for p in model.parameters():  # biases that start at 0: a method may build on them
            if p.is_floating_point() and type(p) is nn.Parameter and not p.any():
                p.normal_(std=0.1)
    try:
        PREPARE.get(cls.__name__, lambda *_: None)(model, site)
    except MmpeftError as error:
        return _line(error)
    base = base_output_of(model, x)
    same = torch.equal if torch.equal(base, base_output_of(model, x)) else near_of(dtype)  # max_norm rescales in place
    refusal = ""
    for method in configurations(cls):
        try:
            ATTACH.get(cls.__name__, plainly)(model, method, site, x)
            break
        except MmpeftError as error:
            refusal = refusal or _line(error)
    else:
        return refusal
    near, found = DTYPES[dtype], []

    def expect(name: str, holds: bool) -> None:
        if not holds:
            found.append(name)

    def run(mode: str) -> Tensor:
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "no-grad"):
            return tensor(model(x))

    if cls.identity_at_init and cls.__name__ not in DRAWS:
        gap = max(near, GAP.get(cls.__name__, 0.0))
        expect("start", close(run("train"), base, gap) and close(run("eval"), base, gap))
    fill(model, "a", 1, SPREAD.get(cls.__name__, 0.3))
    steer(model, STEERS.get(cls.__name__))
    found_params = (p for d in deltas(model) for n in d.trained if (p := d._parameters[n]) is not None)
    params = list({id(p): p for p in found_params}.values())
    outputs = {}
    for mode in ("train", "eval", "no-grad"):
        y = outputs[mode] = run(mode)
        if mode == "train" and params and not y.requires_grad or not params and torch.equal(y, base):
            return WARNED
        expect(f"effect in {mode}", not (torch.equal(y, base) if dtype is torch.bfloat16 else close(y, base, near)))
        if mode != "no-grad" and params:
            grads = torch.autograd.grad((y * torch.randn_like(y)).float().sum(), params, allow_unused=True)
            alive = (g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in grads)
            expect(f"gradient in {mode}", all(alive))
    expect("modes", close(outputs["eval"], outputs["no-grad"], near))
    if cls.__name__ not in DRAWS:
        expect("modes", close(outputs["train"], outputs["eval"], near))
    with torch.no_grad():
        with mmpeft.use(model, None):
            expect("base", same(tensor(model(x)), base))
        try:
            mmpeft.merge(model)
            expect("merge", cls.kind == "weight" and close(tensor(model(x)), outputs["no-grad"], near))
            mmpeft.unmerge(model)
        except MmpeftError:
            expect("merge", cls.kind != "weight")
        mmpeft.detach(model)
        model.eval()
    expect("detach", same(base_output_of(model, x), base))
    return list(dict.fromkeys(found))


@torch.no_grad()
def steer(model: nn.Module, tensor: str | None) -> None:
    """Random directions for methods that train none."""
    g = torch.Generator().manual_seed(1)
    for d in deltas(model) if tensor else ():
        v = d._parameters[tensor]
        v.copy_(0.3 * torch.randn(v.shape, generator=g))


def base_output_of(model: nn.Module, x: Tensor) -> Tensor:
    """The plain model's output, its parameters frozen."""
    return base_output(_First(model), x)


class _First(nn.Module):
    """A model whose first output tensor counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return tensor(self.inner(x))


def tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    difference = (a.detach() - b.detach()).abs().max()
    return bool(difference <= tolerance * max(1.0, float(b.detach().abs().max())))


def near_of(dtype: torch.dtype) -> Callable[[Tensor, Tensor], bool]:
    """Equality within what counts as equal at this precision."""
    return lambda a, b: close(a, b, DTYPES[dtype])


def _line(error: Exception) -> str:
    """A message without the names and numbers of the one site."""
    text = " ".join(str(error).split())
    if isinstance(error, NameNotFound) and "none that" in text:
        return ELSEWHERE
    text = re.sub(
        r"'?\b(model\.layers|blocks|inner|site|qkv|embed|head)\b[\w.*{},]*(\[\w+(,\w+)*\])?'?", "the site", text
    )
    text = re.sub(r"(?<=the site) \(\w+\)", "", text)
    text = re.sub(r"\(\d+(, \d+)*,?\)|\b\d+\b", "n", text).split(" Exclude them")[0]
    return re.sub(r"(the site,? ?)+( and n more)?", "the site ", text).replace(" :", ":")[:150].strip()


def row(name: str, sites: list[str]) -> list[Cell]:
    """One method's cells; of names, as it runs in a process of its own."""
    quiet()
    known = {site.name: site for site in KINDS}
    (cls,) = (c for c in catalogue.methods() if c.__name__ == name)
    return [cell(cls, known[site]) for site in sites]


def quiet() -> None:
    """No warnings of torch, nor mmpeft's of unreached sites and rounding."""
    warnings.simplefilter("ignore")
    logging.getLogger("mmpeft").setLevel("ERROR")
    torch.set_num_threads(1)


def every(methods: list[type[Method]], sites: list[SiteCase], jobs: int) -> Iterator[list[Cell]]:
    """The rows, in `jobs` processes."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(row, [cls.__name__ for cls in methods], [[site.name for site in sites]] * len(methods))


def page(methods: list[type[Method]], sites: list[SiteCase], jobs: int, say: Callable[[str], None]) -> tuple[str, int]:
    """The table as Markdown, and how many cells hold less than was promised."""
    started, reasons, rows = time.time(), dict[str, int](), []
    counts = dict.fromkeys(("ok", "elsewhere", "refused", "failed"), 0)
    for cls, cells in zip(methods, every(methods, sites, jobs), strict=True):
        for c in cells:
            refused = "elsewhere" if c.refused == ELSEWHERE else "refused"
            counts["failed" if c.failed else refused if c.refused else "ok"] += 1
        rows.append(f"| {cls.__name__} | " + " | ".join(c.mark(reasons) for c in cells) + " |")
        bad = [f"{s.name} {'; '.join(c.failed)}" for s, c in zip(sites, cells, strict=True) if c.failed]
        say(f"{cls.__name__}: {sum(not c.failed and not c.refused for c in cells)} ok, {bad or 'none failed'}")
    head = [
        "# Method x site",
        "",
        f"Written by `make grid` on {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__}; do not edit. What a cell holds is "
        "said in `tests/adapters/grid.py`; an empty one is no place for the method (a norm for LoRA, a weight for prompts).",
        "",
        f"{len(methods)} methods x {len(sites)} kinds of site, each in float32, float64 and bfloat16, in train, eval and eval "
        f"without gradients: {counts['ok']} hold all they promise, {counts['elsewhere']} are no place for the "
        f"method, {counts['refused']} are refused when attached (the number says why, below), {counts['failed']} fail. {time.time() - started:.0f} s.",
        "",
        "| method | " + " | ".join(site.name for site in sites) + " |",
        "|---" * (len(sites) + 1) + "|",
    ]
    tail = ["", "## Why refused", "", *(f"{n}. {text}" for text, n in reasons.items())]
    return "\n".join(head + rows + tail) + "\n", counts["failed"]


def chosen(names: str, known: dict[str, Any]) -> list[Any]:
    """The entries of a comma-separated list; all for ''."""
    unknown = [n for n in names.split(",") if n and n not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[n] for n in names.split(",") if n] or list(known.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write; default: the terminal")
    parser.add_argument("--methods", default="", help="class names, comma-separated")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--sites", default="", help="kinds of site, comma-separated")
    given = parser.parse_args()
    methods = chosen(given.methods, {c.__name__: c for c in catalogue.methods() if c.__name__ not in NOT_HERE})
    text, failed = page(
        methods, chosen(given.sites, {site.name: site for site in KINDS}), given.jobs, lambda s: print(s, flush=True)
    )
    given.out.write_text(text, encoding="utf-8") if given.out else print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
