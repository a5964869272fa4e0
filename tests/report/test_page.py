"""The page of a run: what it says, that it is one file which fetches and runs nothing, and what is refused before work."""

import json

import pytest

from mmpeft import cli
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound
from mmpeft.report import write
from mmpeft.report.sections import SECTIONS
from tests.report.kit import ENV, SEEDS, Page, adapter, robot, rollout

HOSTILE = '</style><script>alert(1)</script><img src=http://x.example/a.png onerror="b">\'&'


def test_a_robot_run(robot_run, tmp_path):
    path = write(robot_run, out=tmp_path / "page.html")
    page = Page(path)
    page.check_self_contained()
    assert page.find("h1") and ENV in page.words
    titles = {s.title for s in SECTIONS} - {
        "Task by task",
        "Accuracy by kind of question",
        "Some answers",
        "Configuration",
        "Not in this page",
    }
    assert {t for t in titles if t in page.words} == titles
    for said in (
        "90 % of 30 episodes, 95 % interval 74 to 97 %", "adapted against it: p < .001", "a tie: these episodes show no difference",
        "adapted is better than blind", "27 of 30 solved", "Solved by adapted alone", f"seeds {SEEDS[-3]}, {SEEDS[-2]}, {SEEDS[-1]}",
        "“pull the mug”", "2400", "9.6 kB", "1 min 00 s · 60 %", "the rest", "2 CPU cores", "22", "EfficientNet-Lite0", "torch 2.11.0",
        "mmpeft rollout --adapter", "--seeds 60000:60030 --execute 8 --options max_steps=300 'views=[\"close\"]'",
    ):  # fmt: skip
        assert said.replace("2400", "2 400") in page.words, said
    videos = page.find("video")
    assert len(videos) == 4 and len(page.find("div", class_="group several")) == 2
    assert "success, 71 steps" in page.words and "adapted" in videos[0]["aria-label"]
    assert all(v["src"].startswith("data:video/mp4;base64,") for v in videos)
    assert [s["aria-label"] for s in page.find("svg", role="img") if "strip" in s["class"]][
        2
    ] == "blind: 4 of 30 solved"


def test_every_picture_says_what_it_shows(robot_run, tmp_path):
    page = Page(write(robot_run, out=tmp_path / "page.html"))
    assert all(
        a.get("aria-label") or a.get("aria-hidden")
        for n, a in page.tags
        if n in ("svg", "video") and a.get("class") not in ("anchor", "lines")
    )
    assert {a["href"].removeprefix("#") for a in page.find("a") if a["href"].startswith("#")} == {
        h["id"] for h in page.find("h2")
    }
    assert page.find("html", lang="en") and page.find("meta", name="viewport")


def test_the_page_keeps_its_budget_and_names_the_rest(robot_run, tmp_path, film):
    whole = Page(write(robot_run, out=tmp_path / "whole.html"))
    room = (len(whole.source.encode()) - 1) / 1e6
    page = Page(write(robot_run, out=tmp_path / "less.html", budget_mb=room))
    assert len(page.source.encode()) <= room * 1e6 and len(page.find("video")) == 3
    assert "Not in this page" in page.words and "beyond its budget" in page.words
    left = [a["href"] for a in page.find("a") if a["href"].endswith(".mp4")]
    assert left and all((tmp_path / href).resolve().is_file() for href in left)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "24", 0.001])
def test_budgets_that_cannot_work(robot_run, tmp_path, budget):
    with pytest.raises(ConfigError, match="budget_mb"):
        write(robot_run, out=tmp_path / "page.html", budget_mb=budget)
    assert not list(tmp_path.iterdir())


def test_hostile_words_everywhere_are_only_shown(tmp_path):
    folder = robot(tmp_path / "run", {HOSTILE.replace("/", "|"): 20, "blind": 3})
    result = json.loads((folder / "result.json").read_text())
    result |= {"task": HOSTILE, "device": HOSTILE, "stages": {HOSTILE: 1.0}, HOSTILE: HOSTILE, "command": HOSTILE}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config_of_run.yaml").write_text(f"a: {HOSTILE}")
    for row_file in folder.glob("*/rollout.json"):
        body = json.loads(row_file.read_text())
        for row in body["episodes"]:
            row["instruction"] = row["task"] = HOSTILE
        row_file.write_text(json.dumps(body))
    (folder / "blind" / "metrics.csv").write_text(f'step,"{HOSTILE.replace(chr(34), chr(34) * 2)}"\n1,2\n2,3\n')
    (folder / "blind" / "plan.json").write_text(json.dumps([{"pattern": HOSTILE, "method": HOSTILE}]))
    page = Page(write(folder, title=HOSTILE))
    page.check_self_contained()
    assert HOSTILE in page.words and not page.find("img")


def test_several_tasks_make_a_table(tmp_path):
    tasks = [f"metaworld:{name}-v3" for name in ("push", "reach", "drawer-open")]
    for arm, n in (("adapted", 8), ("blind", 2)):
        rollout(n, tasks=tasks, seeds=range(10)).save(tmp_path / arm / "rollout.json")
    page = Page(write(tmp_path))
    assert "Task by task" in page.words and "80 % (49 to 94 %)" in page.words and "every episode" in page.words
    assert len([s for s in page.find("span", class_="heat") if s["style"] == "--share:0.20"]) == 3
    assert "3 tasks, easiest for adapted first" in page.words


def test_a_language_run(tmp_path):
    from PIL import Image

    values = {"all": 0.75, "digit": 0.9, "sum": 0.6}
    result = {"seconds": 500.0, "steps": 500, "questions": 40, "accuracy": values, "accuracy_language_only": dict.fromkeys(values, 0.25), "accuracy_before": {"all": 0.05}, "reloaded_equal": True}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "answers.json").write_text(
        json.dumps([{"id": i, "kind": ("digit", "sum")[i % 2], "answer": f"<{i}>"} for i in range(40)])
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "answers.png")
    adapter(tmp_path / "adapter")
    page = Page(write(tmp_path, title="Digits"))
    page.check_self_contained()
    for said in (
        "Digits",
        "75 %",
        "after training",
        "without looking",
        "before training",
        "digit (20 questions)",
        "same after loading again yes",
        "<7>",
    ):
        assert said in page.words, said
    assert (
        page.find("img")[0]["src"].startswith("data:image/png;base64,")
        and "lr 0.002" in page.words
        and "LoRA(rank=3" in page.words
    )


def test_any_lightning_run(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,loss,step,val_acc\n" + "".join(f"0,{1 / (s + 1)},{s},\n" for s in range(40)) + "1,,40,0.875\n"
    )
    (tmp_path / "config_of_run.yaml").write_text("seed_everything: 1\n")
    page = Page(write(tmp_path))
    assert (
        "val_acc" in page.words
        and "0.875" in page.words
        and "at step 40" in page.words
        and "seed_everything: 1" in page.words
    )
    assert "mmpeft fit --config" in page.words and len(page.find("path")) == 1


def test_disagreeing_files_are_told(tmp_path):
    rollout(3).save(robot(tmp_path) / "frozen" / "rollout.json")
    assert "The files disagree. frozen: result.json says" in Page(write(tmp_path)).words


def test_nothing_to_report(tmp_path):
    for name in ("notes.txt", "hparams.yaml"):
        (tmp_path / name).write_text("a: 1")
    with pytest.raises(NameNotFound, match="metrics.csv.*result.json.*found hparams.yaml, notes.txt"):
        write(tmp_path)
    with pytest.raises(NameNotFound, match="does not exist"):
        write(tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


def test_a_failure_leaves_the_page_that_was_there(tmp_path):
    path = write(robot(tmp_path))
    before = path.read_bytes()
    (tmp_path / "blind" / "rollout.json").write_text("{")
    with pytest.raises(FileFormatError, match="rollout.json"):
        write(tmp_path)
    assert path.read_bytes() == before and not list(tmp_path.glob(".report*"))


def test_places_that_cannot_be_written(tmp_path):
    robot(tmp_path)
    with pytest.raises(ConfigError, match="is a folder"):
        write(tmp_path, out=tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path, out=tmp_path / "result.json" / "page.html")


def test_the_command(tmp_path, capsys, monkeypatch):
    robot(tmp_path / "run")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert cli.main(["report", str(tmp_path / "run"), "--title", "Mugs", "--open"]) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.strip() == str(path) and opened == [path.as_uri()]
    assert "Mugs" in Page(path).words
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2 and "does not exist" in capsys.readouterr().err
    assert (
        cli.main(["report", str(tmp_path / "run"), "--budget-mb", "0.001"]) == 2
        and "too small" in capsys.readouterr().err
    )


def test_the_style_travels_with_the_package():
    """An installed mmpeft has style.css too: it is named as package data."""
    import tomllib
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mmpeft"]
    package = root / "mmpeft"
    kept = {path for pattern in data for path in package.glob(pattern)}
    assert package / "report" / "style.css" in kept
