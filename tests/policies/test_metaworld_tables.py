"""The Metaworld tables' program: what is chosen, dealt out, resumed, and never written by halves. Nothing is simulated."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmpeft
from benchmarks import metaworld_program as program
from benchmarks import metaworld_rows
from benchmarks import metaworld_vision as vision
from benchmarks.metaworld_multitask import Misled
from benchmarks.metaworld_rows import Row, paired, plans, pooled, simulators
from mmpeft.policies.policy import note_skill

from .policy_kit import Demos, make_policy


def parsed(*words):
    return program.arguments("text").parse_args(words)


def test_rows_come_seed_by_seed_and_only_those_asked_for():
    rows = vision.final([])
    assert [r.seed for r in rows] == sorted(r.seed for r in rows) and len({r.name for r in rows}) == len(rows) == 60
    assert {r.arm for r in rows} <= set(plans("mid")) and {r.lr for r in rows} == {1e-3}
    found = program.chosen(rows, parsed("--only", r"^push.*(lora|conv)/50/s[12]$", "--steps", "7", "--budget", "9"))
    assert {(r.tasks, r.arm, r.seed) for r in found} == {(("push-v3",), a, s) for a in ("lora", "conv") for s in (1, 2)}
    assert {(r.steps, r.budget) for r in found} == {(7, 9.0)} and len(found) == 8
    tiny = program.chosen(rows, parsed("--tiny"))
    assert len(tiny) == 20 and {(r.demonstrations, r.seed) for r in tiny} == {(2, 1)}
    with pytest.raises(SystemExit):
        parsed("--only", "(")


def test_the_best_tuned_rate_is_taken():
    lines = [{"name": f"tune/push-v3/last/lora/{r}", "lr": r, "success": s} for r, s in ((5e-4, 0.1), (2e-3, 0.9), (1e-3, 0.3))]
    rates = {(r.tasks[0], r.taps, r.arm): r.lr for r in vision.final(lines)}
    assert rates["push-v3", "last", "lora"] == 2e-3
    assert {v for k, v in rates.items() if k != ("push-v3", "last", "lora")} == {1e-3}


def test_every_episode_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "folder_of", lambda task: tmp_path / task)
    for task, count in (("a", 7), ("b", 3)):
        (tmp_path / task).mkdir()
        (tmp_path / task / "demos.json").write_text(json.dumps({"env": f"metaworld:{task}"}))
        for seed in range(0, 2 * count, 2):
            (tmp_path / task / f"episode-{seed:010d}.safetensors").touch()
    dealt = program.shares([("a", {"image_size": 96}, 5), ("b", {"image_size": 96}, 3)], 8)
    drawn = sorted((task, seed) for task, _, seeds in dealt for seed in seeds)
    assert drawn == [*(("a", s) for s in range(0, 10, 2)), *(("b", s) for s in range(0, 6, 2))]  # the first 5, all 3
    assert 6 <= len(dealt) <= 8 and max(len(seeds) for *_, seeds in dealt) == 2
    assert program.shares([], 8) == []


def work(row):
    if row.arm == "full":
        raise ValueError("no such luck")
    if row.arm == "scratch" and not Path(row.view).exists():
        Path(row.view).touch()
        os._exit(9)
    return {"success": 0.5, "interval": [0.1, 0.9], "by_task": {"t": [1, 2]}, "pid": os.getpid()}


def test_rows_run_side_by_side_and_what_has_a_line_is_not_run_again(tmp_path, monkeypatch, capsys):
    prepared = []
    monkeypatch.setattr(program, "prepare", lambda rows, processes: prepared.append([r.name for r in rows]))
    rows, out = [Row(arm, ("push-v3",), arm) for arm in ("lora", "full", "conv")], tmp_path / "new" / "out.jsonl"
    program.run(rows, out, processes=2, work=work)
    lines = {x["name"]: x for x in program.read(out)}
    assert set(lines) == {"lora", "conv"} and os.getpid() not in {x["pid"] for x in lines.values()}
    assert all(x["device"] and x["date"] and x["seconds"] >= 0 and x["arm"] == x["name"] for x in lines.values())
    said = capsys.readouterr().out
    assert "full: FAILED" in said and "no such luck" in said
    monkeypatch.setattr(program, "_one", None)  # nothing may be run
    program.run(rows[:1], out, processes=2, work=work)
    assert prepared == [["lora", "full", "conv"], []] and len(program.read(out)) == 2


def test_a_process_that_dies_loses_no_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "prepare", lambda rows, processes: None)
    rows = [Row(arm, ("push-v3",), arm, view=str(tmp_path / "died")) for arm in ("scratch", "lora")]
    program.run(rows, tmp_path / "out.jsonl", processes=1, work=work)
    assert "a process died" in capsys.readouterr().out
    assert sorted(x["name"] for x in program.read(tmp_path / "out.jsonl")) == ["lora", "scratch"]


def many_lines(path):
    for i in range(20):
        program.append(path, {"name": f"{os.getpid()}-{i}", "won": ["x" * 50] * 300})


def test_two_programs_append_whole_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(many_lines, [path] * 3))
    lines = program.read(path)
    assert len(lines) == 60 and all(len(x["won"]) == 300 for x in lines)


@pytest.mark.parametrize(("gpus", "screens", "expected"), [
    (2, 2, [("0", "0"), ("1", "1"), ("0", "0")]), (2, 1, [("0", None), ("1", None), ("0", None)]), (1, 1, [(None, None)] * 3),
])  # fmt: skip
def test_processes_are_dealt_out_over_the_gpus(monkeypatch, gpus, screens, expected):
    import queue

    names, places, found = ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID"), queue.Queue(), []
    for number in range(3):
        places.put(number)
    for _ in range(3):
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        program._settle(places, gpus, screens)
        found.append(tuple(os.environ.get(name) for name in names))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert found == expected


def test_a_misled_policy_hears_another_task(monkeypatch):
    class Policy:
        chunk = execute = 8

        def act(self, observation):
            return observation["instruction"]

    misled = Misled(Policy(), {"metaworld:push-v3": "reach", "metaworld:reach-v3": "push"})
    told = misled.act({"task": ["metaworld:reach-v3", "", "metaworld:push-v3"], "instruction": ["reach", "", "push"]})
    assert told == ["push", "", "reach"] and misled.chunk == 8


def test_a_row_with_one_core_simulates_in_its_own_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    for processes, expected in ((3, (10, True)), (20, (5, False)), (64, (5, False))):
        monkeypatch.setenv("METAWORLD_PROCESSES", str(processes))
        assert tuple(simulators().values()) == expected


def test_pairs_are_of_the_same_training_seed_and_pooled_over_all():
    a = [{"seed": 1, "won": ["t:1", "t:2"], "by_task": {"t": [2, 3]}}, {"seed": 2, "won": ["t:3"], "by_task": {"t": [1, 3]}}]
    b = [{"seed": 1, "won": ["t:2", "t:3"], "by_task": {"t": [2, 3]}}]
    assert paired(a, b) == (1, 1, 1.0) and paired(a, []) == (0, 0, 1.0)
    assert pooled(a) == "3/6 0.50 (0.19-0.81)" and pooled([]) == "-"


def test_a_trained_row_is_taken_up_and_another_recipe_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(metaworld_rows, "RUNS", tmp_path)
    calls = []

    def train(row, policy, plan):
        calls.append(row.name)
        data = Demos(chunk=8, dims=4)
        policy.fit(data.stacked("action"), data.stacked("state"))
        mmpeft.attach(policy, plan)
        note_skill(policy, "default")
        return {"trained_steps": row.steps}

    monkeypatch.setattr(metaworld_rows, "train", train)
    monkeypatch.setattr(metaworld_rows, "make_policy", lambda row: make_policy(encoder=None, chunk=8, action_dim=4))
    row = Row("24/blind/s1", ("push-v3",), "blind", steps=7, width=16)
    policy, about = metaworld_rows.trained(row)
    again, known = metaworld_rows.trained(replace(row, episodes=3, execute=4))
    assert calls == ["24/blind/s1"] and known == about and known["trained_steps"] == 7 and known["bytes"] > 0
    batch = {"state": torch.randn(3, 1, 4)}
    assert torch.equal(policy.eval().predict(batch), again.predict(batch))
    with pytest.raises(RuntimeError, match="was trained as"):
        metaworld_rows.trained(replace(row, steps=8))


def test_nothing_is_drawn_for_a_trained_row(tmp_path, monkeypatch):
    monkeypatch.setattr(metaworld_rows, "RUNS", tmp_path)
    row = Row("24/conv/s1", ("push-v3",), "conv")
    metaworld_rows.adapter_of(row).mkdir(parents=True)
    (metaworld_rows.adapter_of(row) / "adapter.json").touch()
    monkeypatch.setattr(program, "_pool", None)  # nothing may be recorded
    program.prepare([row], 2)
