"""The table of benchmarks/README.md, from results/h100.jsonl: the last line of each workload and arm.

python -m benchmarks.table            # rewrites the part of README.md between the two marks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEAD = [
    "| workload | arm | throughput | x the fastest peer | step ms (quartiles) | peak GiB | MFU | loss first, last | clock | date |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one row a (workload, arm), workloads in order of appearance; a later line replaces an earlier one."""
    last: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        if not line.get("repeat"):
            last.setdefault(line["workload"], {})[line["arm"]] = line
    return "\n".join([*HEAD, *(row(x, arms) for arms in last.values() for x in arms.values())])


def row(x: dict[str, Any], arms: dict[str, dict[str, Any]]) -> str:
    """One line of the table. The ratio is to the fastest arm that is not mmpeft's, of the same call's machine kind."""
    low, high = x["step_ms_iqr"]
    digits = 1 if x["step_ms"] >= 10 else 2
    clock = ", ".join(x["clocks"].split(", ")[:2])
    note = f" ({x['note']})" if "note" in x else ""
    peers = [a["throughput"] for a in arms.values() if not a["arm"].startswith("mmpeft") and a["device"] == x["device"]]
    ratio = f"{x['throughput'] / max(peers):.2f}" if peers else ""
    return (
        f"| {x['workload']} | {x['arm']}{note} | {x['throughput']:,.0f} {x['unit']} | {ratio} "
        f"| {x['step_ms']:.{digits}f} ({low:.{digits}f}, {high:.{digits}f}) | {x['peak_gib']} | {x['mfu']:.3f} "
        f"| {x['loss_first']}, {x['loss']} | {clock} | {x['date']} |"
    )


def render(text: str, lines: list[dict[str, Any]]) -> str:
    """The README with its table made again."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table(lines)}\n{END}{after}"


def main() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    README.write_text(render(README.read_text(), lines))


if __name__ == "__main__":
    main()
