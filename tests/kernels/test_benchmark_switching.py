"""The benchmark of switching adapters runs at toy sizes on CPU, and its arms switch to the same outputs."""

import json

import pytest
import torch

from mmpeft.kernels import dispatch

pytestmark = pytest.mark.slow


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run for machines without a GPU")
def test_every_arm_switches_to_what_pefts_does(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks import switching

    out = tmp_path / "out.jsonl"
    with dispatch.backend("reference"):
        measured = switching.main(["--tiny", "--adapters", "3", "--out", str(out)])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == sum(len(s.arms) for s in switching.SWITCHES) == printed.count(" ok\n"), printed
    assert all(
        x["step_ms"] > 0 and x["sites"] == 14 and x["device"] == "cpu" and "peft" in x["versions"] for x in lines
    )
    assert {x["adapters"] for x in lines} == {2, 3} and len(switching.table(measured).splitlines()) == 2 + len(lines)


def test_an_arm_that_switches_nothing_is_no_measurement():
    from benchmarks import switching

    model = switching.ours(switching.TINY, 2)
    with pytest.raises(RuntimeError, match="under both choices"):
        switching.Arm(model, torch.zeros(2, 5, dtype=torch.long), lambda i: None).values()


def test_wrong_arguments_are_refused_before_work(capsys):
    from benchmarks import switching

    for wrong, told in ((["--adapters", "1"], "2 or more"), (["--arms", "pfet"], "unknown arms pfet")):
        with pytest.raises(SystemExit):
            switching.main([*wrong, "--tiny"])
        assert told in capsys.readouterr().err
