"""Numbers as people read them: percentages, counts, sizes, durations and p-values with the digits they deserve."""

from __future__ import annotations

import math

NONE = "–"
ROUNDED = 0.9995  # of a unit: three digits round it up to the unit itself
NBSP = "\u00a0"  # between a number and its unit, where a line must not break


def percent(share: float | None, *, of: int | None = None) -> str:
    """As "92 %"; a digit more where more than 200 trials can tell it apart."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.{1 if of and of > 200 else 0}f}{NBSP}%"


def between(low: float, high: float, *, of: int | None = None) -> str:
    """As "81 to 97 %", of two shares."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return NONE
    return f"{percent(low, of=of).removesuffix(f'{NBSP}%')} to {percent(high, of=of)}"


def count(n: float | None) -> str:
    """As "12 000" below 100 000, "1.24 M" above (thin spaces)."""
    if n is None or not math.isfinite(n):
        return NONE
    if n != int(n):
        return significant(n)
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= max(100_000, ROUNDED * factor):
            return f"{_three(n / factor)}{NBSP}{unit}"
    return f"{int(n):,}".replace(",", "\u2009")


def significant(x: float | None, digits: int = 3) -> str:
    """Three significant digits; powers of ten only for what is very small or very large."""
    if x is None or not math.isfinite(x):
        return NONE if x is None else str(x)
    if x == 0:
        return "0"
    if 1e-3 <= abs(x) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
        said = f"{x:.{places}f}"
        return said.rstrip("0").rstrip(".") if "." in said else said
    front, power = f"{x:.{digits - 1}e}".split("e")
    return f"{front.rstrip('0').rstrip('.')}e{int(power)}"


def size(n: float | None) -> str:
    """Bytes as "4.9 MB" (powers of ten)."""
    if n is None or not math.isfinite(n):
        return NONE
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= ROUNDED * factor:
            return f"{_three(n / factor)}{NBSP}{unit}"
    return f"{int(n)}{NBSP}bytes"


def _three(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"


def duration(seconds: float | None) -> str:
    """As "8.4 s", "13 min 20 s", "2 h 05 min"."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s" if seconds < 10 else f"{seconds:.0f}{NBSP}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def p_value(p: float | None) -> str:
    """As "p < .001", "p = .032", "p = .41", as papers write them."""
    if p is None or not math.isfinite(p):
        return NONE
    if p < 0.001:
        return f"p{NBSP}<{NBSP}.001"
    said = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return f"p{NBSP}={NBSP}{said.removeprefix('0')}"
