"""What the catalogue says of a method beside its class: its row in the survey's catalogue (family and number) and the formula
of its count.

A formula is of one site (of a rule with that one), in the method's own fields and

    out, in           sides of the matrix [out, in]; with a bias where the method trains one
    width             channels of a call, or of a prompt's tokens; `targets`: widths of PEDRO's targets, `layers`: blocks
    size              of a bottleneck, given or width / reduction
    d, a1, a2         the common divisor of a rule's sides (FacT), the first factor's sides (KronA)
    l, m, k, n        LoKr's split, out = l k and in = m n
    chosen            edited heads

`rank (in + out)` is a product. A test holds each to the true count at two shapes, all fields varied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "AS": "serial adapters",
    "AP": "parallel adapters",
    "AH": "hybrid adapters",
    "SP": "soft prompts",
    "VP": "visual prompts",
    "SC": "scaling and steering",
    "SU": "selective, unstructured",
    "SS": "selective, structured",
    "LR": "low-rank and structured",
    "DR": "dynamic rank",
    "LV": "LoRA variants",
    "QU": "quantised",
    "PR": "pruning",
    "HY": "hybrids",
}


@dataclass(frozen=True)
class Facts:
    """A row ("SC1", or "LR" for a method the survey doesn't name) and the count; `other`: (field, value, count) where an
    option changes it."""

    row: str
    count: str
    other: tuple[tuple[str, Any, str], ...] = ()

    @property
    def family(self) -> str:
        """Family and row: "scaling and steering, SC1"."""
        letters = self.row.rstrip("0123456789")
        return FAMILIES[letters] + (f", {self.row}" if self.row != letters else "")

    @property
    def formula(self) -> str:
        """The counts as one cell."""
        cells = [f"`{self.count}`"]
        for field, value, formula in self.other:  # a number stands for any
            cells.append(f"`{formula}` with `{field}" + ("`" if type(value) is int else f"={value!r}`"))
        return "; ".join(cells)


PAIR = "rank (in + out)"
BOX = "2 width size + size + width"
ENTRIES = Facts("SU1", "max(1, round(density out in))", (("count", 5, "count"),))


def entries(row: str) -> Facts:
    """Of `Sparse` and what only chooses differently."""
    return Facts(row, ENTRIES.count, ENTRIES.other)


def lines(row: str) -> Facts:
    """Of `SparseRows` and what only chooses differently."""
    return Facts(row, "max(1, round(density out)) in", (("count", 5, "count in"), ("axis", "columns", "max(1, round(density in)) out")))


FACTS: dict[str, Facts] = {
    "Propulsion": Facts("SC1", "vectors out"),
    "IA3": Facts("SC2", "out", (("side", "in", "in"),)),
    "SSF": Facts("SC3", "2 out"),
    "LayerNormTuning": Facts("SC4", "2 width"),
    "AttnScale": Facts("SC5", "num_heads tokens^2", (("share", True, "tokens^2"),)),
    "AttnScaleLite": Facts("SC5", "num_heads"),
    "DRA": Facts("SC6", "width"),
    "ETT": Facts("SC6", "width (num_tokens + hidden) + 2 hidden width"),
    "PEDRO": Facts("SC8", "rank (width + targets)"),
    "HeadScaling": Facts("SC10", "width"),
    "LoFiT": Facts("SC10", "chosen width / num_heads"),
    "RepE": Facts("SC11", "0"),
    "ITI": Facts("SC11", "0"),
    "RED": Facts("SC", "2 width"),
    "Sparse": ENTRIES,
    "FishMask": entries("SU2"),
    "DiffPruning": Facts("SU6", "2 out in", (("structured", True, "2 out in + 1"),)),
    "UBitFit": Facts("SU7", "max(1, round(density out))", (("count", 5, "count"),)),
    "BitFit": Facts("SU8", "out"),
    "LTSFT": entries("SU9"),
    "ChildTuningD": entries("SU10"),
    "PaFi": entries("SU11"),
    "HiWi": Facts("SU11", "2 rank out", (("of", "weight", "2 rank in"),)),
    "SpIEL": entries("SU12"),
    "SpIELMA": entries("SU12"),
    "SecondOrderMask": entries("SU13"),
    "Mixout": Facts("SU13", "out in + out"),
    "SHPEFT": entries("SU15"),
    "SHiRA": Facts("SU", PAIR, (("count", 5, "count"),)),
    "RoCoFT": Facts("SS1", "rank in", (("axis", "columns", "rank out"),)),
    "SparseRows": lines("SS1"),
    "FAR": lines("SS2"),
    "XPEFT": Facts("SS4", "2 adapters"),
    "SURM": Facts(
        "SS5", "max(out, in)", (("structure", "toeplitz", "out + in - 1"), ("structure", "ldr", "2 rank max(out, in)"))
    ),
    "NEFT": lines("SS7"),
    "Full": Facts("SS8", "out in + out"),
    "LoRA": Facts("LR1", PAIR),
    "DID": Facts("LR2", "dimension"),
    "SAID": Facts("LR2", "dimension"),
    "Compacter": Facts(
        "LR3",
        "n^3 + 2 rank (size + width) + size + width",
        (("bias", False, "n^3 + 2 rank (size + width)"), ("share", False, "2 (n^3 + rank (size + width)) + size + width")),
    ),
    "KAdaptation": Facts("LR4", "t^3 + rank (in + out)"),
    "DoRA": Facts("LR5", f"{PAIR} + out"),
    "KronA": Facts("LR7", "a1 a2 + out in / (a1 a2)"),
    "KronAB": Facts("LR7", "a1 a2 + out in / (a1 a2)"),
    "KronARes": Facts("LR7", "a1 a2 + out in / (a1 a2) + 1"),
    "LoHa": Facts("LR8", "2 rank (in + out)"),
    "LoKr": Facts(
        "LR",
        "l m + (rank (k + n) if 2 rank < max(k, n) else k n)",
        (
            (
                "decompose_both",
                True,
                "(rank (l + m) if 2 rank < max(l, m) else l m) + (rank (k + n) if 2 rank < max(k, n) else k n)",
            ),
        ),
    ),
    "LoRAFA": Facts("LR9", "rank out"),
    "VeRA": Facts("LR10", "rank + out"),
    "LoRAXS": Facts("LR11", "rank^2"),
    "DeltaLoRA": Facts("LR12", PAIR),
    "KernelMix": Facts("LR13", f"{PAIR} + head_rank (heads in + out)"),
    "FacTTT": Facts("LR14", "2 d rank + out in / d^2 rank^2"),
    "FacTTK": Facts("LR14", "2 d rank + out in / d^2 rank + rank^3"),
    "OFT": Facts(
        "LR16",
        "in (block_size - 1) / 2",
        (("side", "out", "out (block_size - 1) / 2"), ("share", True, "block_size (block_size - 1) / 2")),
    ),
    "BOFT": Facts("LR16", "m in (block_size - 1) / 2 + out", (("scale", False, "m in (block_size - 1) / 2"),)),
    "ReLoRA": Facts("LR18", PAIR),
    "DnA": entries("LR20"),
    "HRA": Facts("LR", "rank in"),
    "FourierFT": Facts("LR", "n"),
    "RandLoRA": Facts("LR", "ceil(min(out, in) / rank) (rank + min(out, in))"),
    "C3A": Facts("LR", "out in / block_size"),
    "GraLoRA": Facts("LR", "(rank + hybrid_rank) (in + out)"),
    "MiSS": Facts("LR", "rank out"),
    "HiRA": Facts("LR", PAIR),
    "DeLoRA": Facts("LR", f"{PAIR} + 1"),
    "DyLoRA": Facts("DR1", PAIR),
    "AdaLoRA": Facts("DR2", "rank (in + out + 1)"),
    "SoRA": Facts("DR3", "rank (in + out + 1)"),
    "CapaBoost": Facts("DR4", PAIR),
    "AutoLoRA": Facts("DR5", "rank (in + out + 1)"),
    "IncreLoRA": Facts("DR6", "rank (in + out + 1)"),
    "LoRADropout": Facts("LV3", PAIR),
    "PeriodicLoRA": Facts("LV4", PAIR),
    "LoRAPlus": Facts("LV5", PAIR),
    "MoSLoRA": Facts("LV7", f"{PAIR} + rank^2"),
    "RoseLoRA": Facts("LV10", PAIR),
    "QALoRA": Facts("QU2", "rank (in / group + out)"),
    "LRQAT": Facts("QU4", f"{PAIR} + out"),
    "PEQA": Facts("QU5", "out", (("group", 32, "out in / group"),)),
    "LoRAPrune": Facts("PR1", PAIR),
    "StructuredMask": Facts("PR4", "in / group", (("axis", "rows", "out / group"),)),
    "LayerDrop": Facts("PR6", "0"),
    "APT": Facts("PR7", PAIR),
    "FLOP": Facts("PR8", "rank (in + out + 1)"),
    "AdaDEFT": Facts("PR9", "1"),
    "Bottleneck": Facts("AS1", BOX, (("bias", False, "2 width size"),)),
    "PHMAdapter": Facts(
        "AS9",
        "2 (n^3 + size width / n) + size + width",
        (("share", True, "n^3 + 2 size width / n + size + width"), ("bias", False, "2 (n^3 + size width / n)")),
    ),
    "AdaptFormer": Facts("AP2", BOX, (("bias", False, "2 width size"),)),
    "ConvAdapter": Facts(
        "AH8", "2 width size + (kernel^2 + 2) size + width", (("bias", False, "2 width size + kernel^2 size"),)
    ),
    "ProPETL": Facts("HY9", "4 width size", (("bias", True, "4 width size + size + width"),)),
    "Gated": Facts("HY2", "17 width + 1"),
    "PromptTuning": Facts("SP1", "num_tokens width"),
    "PrefixTuning": Facts("SP2", "num_tokens width + hidden (width + 1) + 2 width (hidden + 1)"),
    "Prefix": Facts("SP2", "2 num_tokens width"),
    "VPT": Facts("VP2", "num_tokens width layers", (("deep", False, "num_tokens width"),)),
}
