"""Every row of the benchmarks runs at toy sizes on CPU, arm by arm, so that no GPU minute is lost to a typo."""

import importlib
import json

import pytest
import torch

from mmpeft.kernels import dispatch

pytestmark = pytest.mark.slow

# row -> (arguments, arms left out here: torch.compile on a CPU takes a minute), arms that must have given a line
ROWS = {
    "llm": ("llm", ["--shape", "1.5b"], ["mmpeft", "mmpeft engine", "peft", "unsloth", "peft+liger"], 3),
    "llm-dropout": ("llm", ["--shape", "360m", "--dropout", "0.05"], ["mmpeft", "peft"], 2),
    "llm-dora": ("llm", ["--dora"], ["mmpeft", "mmpeft engine", "peft"], 3),
    "llm-packed": ("llm", ["--packed"], ["mmpeft", "mmpeft engine", "peft"], 3),
    "llm-nf4": ("llm", ["--base", "nf4"], ["mmpeft", "mmpeft engine", "peft"], 2),
    "vit": ("vit", [], ["mmpeft", "mmpeft engine", "mmpeft engine+compile", "peft"], 3),
    "vlm": ("vlm", [], ["mmpeft", "mmpeft, cached features", "peft"], 3),
    "policy": ("policy", [], ["mmpeft", "mmpeft, switching", "peft", "peft merged"], 4),
    "many": ("many", [], ["mmpeft", "mmpeft, one adapter", "peft", "peft, one adapter"], 4),
}
KEYS = {"workload", "arm", "throughput", "unit", "peak_gib", "mfu", "loss", "device", "date", "versions"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run for machines without a GPU")
@pytest.mark.parametrize("name", ROWS)
def test_row(name, tmp_path, monkeypatch, capsys):
    for package in ("transformers", "peft", "timm"):
        pytest.importorskip(package)
    monkeypatch.setenv("BENCH_RAISE", "1")
    module, options, arms, lines = ROWS[name]
    out = tmp_path / "out.jsonl"
    with dispatch.backend("reference"):
        row = importlib.import_module(f"benchmarks.{module}").main([*options, "--tiny", "--out", str(out), "--arms", *arms])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    printed = capsys.readouterr().out
    assert len(written) == lines and all(set(x) >= KEYS for x in written), printed
    assert all("(tiny)" in x["workload"] and x["device"] == "cpu" for x in written)
    if "dropout" not in name:
        assert row.gate(relative=1e-2), printed  # the arms compute the same thing
    assert printed.count("FAILED") == 0 and printed.count("skipped") == len(arms) - lines, printed


def test_wrong_arguments_are_refused_before_work(capsys):
    from benchmarks import llm

    for wrong in (["--arms", "pfet"], ["--shape", "2b"], []):
        with pytest.raises(SystemExit):
            llm.main(wrong if wrong == [] else [*wrong, "--tiny"])
    assert "this row has mmpeft" in capsys.readouterr().err


def test_the_table_is_made_of_the_last_lines():
    from benchmarks import table

    line = {"workload": "w", "arm": "mmpeft", "throughput": 300.0, "unit": "x/s", "peak_gib": 1.0, "mfu": 0.5, "loss": 2.0,
            "loss_first": 3.0, "step_ms": 1.0, "step_ms_iqr": [1.0, 2.0], "device": "d", "clocks": "1 MHz, 2 W, 3",
            "date": "now"}  # fmt: skip
    lines = [line | {"throughput": 1.0}, line, line | {"arm": "peft", "throughput": 200.0},
             line | {"arm": "peft+compile", "throughput": 100.0}, line | {"throughput": 9.0, "repeat": True}]  # fmt: skip
    text = table.render(f"a {table.BEGIN} old {table.END} b", lines)
    assert text.startswith("a ") and text.endswith(" b") and "old" not in text
    rows = [r.split(" | ") for r in text.splitlines() if r.startswith("| w |")]
    assert [r[1] for r in rows] == ["mmpeft", "peft", "peft+compile"] and [r[3] for r in rows] == ["1.50", "1.00", "0.50"]
