"""Run folders as the examples leave them, small, and a strict reader of the pages made of them."""

import csv
import json
import math
from html.parser import HTMLParser

from mmpeft.policies.rollout_result import RolloutResult
from mmpeft.report.media import KINDS

ENV = "metaworld:coffee-pull-v3"
SEEDS = range(60_000, 60_030)
# arm -> how many of the 30 seeds it solves; a better arm solves every seed that a worse one does, but for one
SOLVED = {"adapted": 27, "frozen": 25, "blind": 4}
VOID = {"meta", "img", "br"}


def rollout(solved, *, tasks=(ENV,), seeds=SEEDS, but=()):
    """A rollout that solves the first so many seeds of every task, except those of `but`."""
    rows = [
        {"task": task, "seed": s, "success": i < solved and s not in but, "first_success": 70 if i < solved else None,
         "steps": 71 if i < solved else 300, "return": 10.5, "instruction": "pull the mug", "seconds": 0.8}
        for task in tasks for i, s in enumerate(seeds)
    ]  # fmt: skip
    settings = {"env": list(tasks), "execute": 8, "options": {"max_steps": 300, "views": ["close"]}}
    return RolloutResult(rows, {"p50": 6.5, "p95": 9.0, "mean": 7.0, "calls": 100.0, "per_step": 0.9}, [], settings)


def robot(folder, arms=SOLVED):
    """A folder as examples/robot.py leaves it, without videos."""
    results = {arm: rollout(n, but=(SEEDS[0],) if arm == "frozen" else ()) for arm, n in arms.items()}
    first = next(iter(results))
    tests = {arm: None if arm == first else results[first].compare(r) for arm, r in results.items()}
    for arm, result in results.items():
        result.save(folder / arm / "rollout.json")
        with (folder / arm / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "loss", "step", "val_error"])
            writer.writeheader()
            for step in range(9, 1000, 10):
                wave = 1 + 0.3 * math.sin(step)
                writer.writerow({"epoch": step // 200, "loss": wave * (0.01 + math.exp(-step / 80)), "step": step})
            writer.writerow({"step": 999, "val_error": 0.125})
        plan = [
            {"pattern": p, "method": m, "sites": 3, "trainable": 1200, "bytes": 4800}
            for p, m in (("trunk", "Full()"), ("head", "Full()"))
        ]
        (folder / arm / "plan.json").write_text(json.dumps(plan))
        adapter(folder / arm / "adapter")
    result = {
        "task": ENV, "seeds": [SEEDS[0], SEEDS[-1]],
        "success": {a: r.success for a, r in results.items()}, "intervals": {a: list(r.interval) for a, r in results.items()},
        "p_value": {a: t and t.p_value for a, t in tests.items()}, "pairs": {a: t and [t.only_a, t.only_b] for a, t in tests.items()},
        "steps": 1000, "demonstrations": 50, "device": "2 CPU cores", "seconds": 100.0,
        "stages": {"collect": 20.0, "fit adapted": 60.0},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def adapter(folder):
    """An adapter's description and tensors, of no model."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": 1, "name": "default", "sha256": "0" * 64, "metadata": {}, "versions": {"torch": "2.11.0"},
        "base": {"name": "EfficientNet-Lite0", "fingerprint": "ab" * 32},
        "plan": [{"match": "trunk", "train": "full"}, {"match": "blocks.*.conv", "train": "adapter", "method": [{"LoRA": {"rank": 3}}], "lr": 0.002}],
    }  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(description))
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, folder / "adapter.safetensors")
    return folder


class Page(HTMLParser):
    """A parsed page: `words` without markup, `tags` as (name, attributes); unbalanced markup is an error."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.pieces = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.pieces).replace("\u00a0", " ").replace("\u2009", " ").split())

    def find(self, name, /, **wanted):
        return [a for n, a in self.tags if n == name and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]

    def check_self_contained(self):
        """Nothing is fetched and nothing runs: no script, no style sheet, no address but data and relative links."""
        names = {name for name, _ in self.tags}
        assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
        for _, attributes in self.tags:
            assert not [key for key in attributes if key.startswith("on")]
            assert attributes.get("src", "data:").startswith(
                tuple(f"data:{kind};base64," for kind in KINDS.values()) + ("data:",)
            )
            assert ":" not in attributes.get("href", "#")
        style = self.source.partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in style and "@import" not in style
