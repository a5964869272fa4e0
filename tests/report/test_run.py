"""Reading a run's folder: labels, arms from results or from rollouts, logs; and files that are broken, by name."""

import json

import pytest

from mmpeft.errors import FileFormatError, NameNotFound
from mmpeft.report import logs as reading
from mmpeft.report.logs import read_csv, read_logs
from mmpeft.report.run import Run
from tests.report.kit import SEEDS, adapter, robot, rollout

CSV = "epoch,loss,step,val_loss\n0,0.5,9,\n0,0.25,19,\n0,,19,0.75\n"


def put(path, said=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(said if isinstance(said, str) else json.dumps(said))
    return path


def test_labels_leave_out_folders_that_say_nothing(tmp_path):
    for name in (
        "a/adapter/adapter.json",
        "a/version_0/metrics.csv",
        "b/version_0/metrics.csv",
        "b/version_1/metrics.csv",
        "logs/metrics.csv",
    ):
        put(tmp_path / "one" / name, "{}")
    put(tmp_path / "one" / "b" / "version_1" / "adapter" / "adapter.json", "{}")
    run = Run(tmp_path / "one")
    assert list(run.adapters) == ["a", "b/version_1"]
    paths = run.find("metrics.csv")
    assert [run.label(p, paths) for p in paths] == ["a", "b/version_0", "b/version_1", "one"]


def test_two_files_of_one_kind_never_share_a_label(tmp_path):
    for name in ("adapter.json", "adapter/adapter.json"):
        put(tmp_path / "x" / name, "{}")
    for name in ("rollout.json", "result.json"):
        rollout(3).save(tmp_path / "y" / name)
    assert len(Run(tmp_path).adapters) == 2 and list(Run(tmp_path).rollouts) == ["y/rollout.json", "y/result.json"]


def test_arms_are_what_the_result_says_reference_first(tmp_path):
    arms = Run(robot(tmp_path, {"blind": 4, "adapted": 27})).arms
    assert [(a.name, a.p_value is None) for a in arms] == [("blind", True), ("adapted", False)]
    arms = Run(robot(tmp_path)).arms
    assert [a.name for a in arms] == ["adapted", "frozen", "blind"]
    assert (arms[1].only_reference, arms[1].only_this) == (3, 0)
    assert arms[0].success == 27 / 30 and arms[0].interval[0] < 0.9 < arms[0].interval[1] and arms[0].episodes == 30


def test_arms_of_rollouts_alone_are_compared_here(tmp_path):
    for arm, n in (("zero", 2), ("adapted", 20)):
        rollout(n).save(tmp_path / arm / "rollout.json")
    rollout(20, seeds=range(9)).save(tmp_path / "other" / "rollout.json")  # other seeds: no paired test
    rollout(3).save(tmp_path / "cli" / "result.json")  # what `mmpeft rollout --output` writes
    arms = {a.name: a for a in Run(tmp_path).arms}
    assert list(arms) == ["adapted", "other", "zero", "cli"]
    assert (arms["zero"].only_reference, arms["zero"].only_this) == (18, 0) and arms["zero"].p_value < 1e-4
    assert arms["other"].p_value is None and arms["adapted"].p_value is None


def test_deep_and_hidden_folders_are_not_searched(tmp_path):
    for name in ("a/b/c/d/metrics.csv", "a/b/c/d/e/metrics.csv", ".cache/metrics.csv"):
        put(tmp_path / name, CSV)
    assert [Run(tmp_path).relative(p) for p in Run(tmp_path).find("metrics.csv")] == ["a/b/c/d/metrics.csv"]


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("result.json", "{", "no JSON"), ("result.json", "", "no JSON"), ("result.json", "[1]", "a JSON dict"), ("result.json", "[" * 100_000, "no JSON"),
        ("result.json", {"success": {"adapted": 1.3}}, "success.adapted should be a number from 0 to 1, but is '1.3'"),
        ("result.json", {"success": {"adapted": "0.9"}}, "success.adapted"), ("result.json", {"success": {"adapted": float("nan")}}, "success.adapted"),
        ("result.json", {"success": {"a": 1}, "intervals": [1, 2]}, "intervals"), ("result.json", {"success": {"a": 1}, "intervals": {"a": [1]}}, "pair"),
        ("result.json", {"success": {"a": 1, "b": 1}, "p_value": {"b": 2}}, "p_value.b"), ("result.json", {"success": {"a": 1, "b": 1}, "pairs": {"b": [1, -1]}}, "pairs.b"),
        ("a/rollout.json", "{}", "no rollout"), ("a/rollout.json", {"episodes": [{"task": "t", "seed": None, "success": 1}]}, "no rollout"),
        ("a/rollout.json", {"episodes": [{"task": "t", "seed": 3, "success": 1}], "latency": {}, "videos": [], "settings": {}}, "steps of seed 3"),
    ],
    ids=range(14),
)  # fmt: skip
def test_broken_results_are_named(tmp_path, name, said, words):
    path = put(tmp_path / name, said)
    with pytest.raises(FileFormatError) as error:
        _ = Run(tmp_path).arms
    assert str(path) in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("name", "said", "part"),
    [
        ("plan.json", [{"pattern": "a"}], "plans"), ("plan.json", {"rows": []}, "plans"), ("adapter.json", "x", "adapters"),
        ("plan.json", [{"pattern": "a", "method": "m", "bytes": "many"}], "plans"), ("answers.json", [1], "answers"), ("answers.json", {}, "answers"),
    ],
)  # fmt: skip
def test_other_broken_files_are_named(tmp_path, name, said, part):
    path = put(tmp_path / name, said)
    with pytest.raises(FileFormatError, match=str(path)):
        getattr(Run(tmp_path), part)


def test_no_such_folder(tmp_path):
    with pytest.raises(NameNotFound, match="does not exist"):
        Run(tmp_path / "nowhere")
    with pytest.raises(NameNotFound, match="is a file"):
        Run(put(tmp_path / "x"))


def test_csv_logs_are_series_by_step(tmp_path):
    put(tmp_path / "adapted" / "metrics.csv", CSV + "1,nan,29,inf\n")
    found = {s.metric: s for s in read_logs(Run(tmp_path)).series}
    assert set(found) == {"loss", "val_loss"} and {s.label for s in found.values()} == {"adapted"}
    assert found["loss"].points == ((9, 0.5), (19, 0.25)) and found["loss"].broken == 1 == found["val_loss"].broken


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_csv_that_is_still_being_written_is_read(tmp_path, cut):
    path = put(tmp_path / "metrics.csv", CSV[:-cut])
    assert read_csv(path)["loss"] == [(9, 0.5), (19, 0.25)]


@pytest.mark.parametrize(
    ("said", "words"),
    [("", "no header"), ("loss,loss\n1,2\n", "no header"), (CSV + "0,x,5,\n" + CSV[-9:], "line 5"), (CSV + "0,1\n0,,1,\n", "line 5: 2 values")],
)  # fmt: skip
def test_broken_csv_is_named(tmp_path, said, words):
    with pytest.raises(FileFormatError, match=words):
        read_csv(put(tmp_path / "metrics.csv", said))
    with pytest.raises(FileFormatError, match="no CSV"):
        (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00")
        read_csv(tmp_path / "metrics.csv")


def test_event_files_are_read_or_named(tmp_path, monkeypatch):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "run" / "logs"))
    for step in range(3):
        writer.add_scalar("loss", 0.5 - 0.125 * step, 10 * step)
        writer.add_scalar("epoch", step, 10 * step)
    writer.close()
    (series,) = read_logs(Run(tmp_path / "run")).series
    assert (series.label, series.metric, series.points) == ("run", "loss", ((0, 0.5), (10, 0.375), (20, 0.25)))

    def missing(module, extra, why=""):
        raise reading.MissingExtra(f"{module}: pip install 'mmpeft[{extra}]'")

    monkeypatch.setattr(reading, "require", missing)
    found = read_logs(Run(tmp_path / "run"))
    assert not found.series and "mmpeft[train]" in found.unread[0] and "logs/events.out" in found.unread[0]


def test_colours_follow_the_arms(tmp_path):
    run = Run(robot(tmp_path))
    adapter(tmp_path / "later" / "adapter")
    assert [run.colour(a) for a in ("adapted", "frozen", "blind", "new", "newer", "new")] == [0, 1, 2, 3, 4, 3]
    assert len(SEEDS) == 30
