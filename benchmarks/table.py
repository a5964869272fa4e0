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


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one row a (workload, arm) in order of appearance; a later line replaces an earlier one."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        if not line.get("repeat"):
            last[line["workload"], line["arm"]] = line
    rows = [
        "| workload | arm | throughput | step ms (quartiles) | peak GiB | MFU | loss first, last | clock | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (workload, arm), x in last.items():
        low, high = x["step_ms_iqr"]
        clock = ", ".join(x["clocks"].split(", ")[:2])
        note = f" ({x['note']})" if "note" in x else ""
        rows.append(
            f"| {workload} | {arm}{note} | {x['throughput']:,.0f} {x['unit']} "
            f"| {x['step_ms']:.1f} ({low:.1f}, {high:.1f}) | {x['peak_gib']} | {x['mfu']:.3f} "
            f"| {x['loss_first']}, {x['loss']} | {clock} | {x['date']} |"
        )
    return "\n".join(rows)


def main() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(lines)}\n{END}{after}")


if __name__ == "__main__":
    main()
