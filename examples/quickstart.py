"""`make quickstart`: visual question answering with two frozen pretrained models, trained and checked in two processes.

1. `mmpeft fit --config examples/vqa_digits.yaml` trains, answers held-out questions before and after, and writes
   runs/quickstart: the adapter, result.json, answers.json and a picture.
2. A fresh process knows only the adapter's folder: it builds the model again, loads the adapter, answers the same
   questions from the images themselves (no cached features), and compares answer by answer.

    python examples/quickstart.py [--config YAML] [options of mmpeft fit]     # both steps
    python examples/quickstart.py --reload                                        # the second alone
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "vqa_digits.yaml"
CORES = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait without spinning: far faster where other programs run too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--folder", default="runs/quickstart", help="where the config's callbacks write")
    parser.add_argument("--reload", action="store_true", help="only load and answer again")
    given, overrides = parser.parse_known_args()
    folder = Path(given.folder)
    if given.reload:
        return reload(folder)
    started = time.perf_counter()
    environment = CORES | os.environ
    fit = [sys.executable, "-m", "mmpeft", "fit", "--config", given.config, *overrides]
    subprocess.run(fit, check=True, env=environment)
    again = [sys.executable, __file__, "--reload", "--folder", given.folder]
    subprocess.run(again, check=True, env=environment)
    update(folder, seconds=round(time.perf_counter() - started, 1))
    result = json.loads((folder / "result.json").read_text())
    print(f"{result['seconds']:.0f} s in all; the same accuracy after loading: {result['reloaded_equal']}")
    return 0 if result["reloaded_equal"] else 1


def reload(folder: Path) -> int:
    """Restore the adapter from its folder and answer the questions of answers.json again."""
    import yaml

    from mmpeft.data import DigitsVQA
    from mmpeft.tasks.restore import restore

    said = json.loads((folder / "answers.json").read_text())
    model = restore(folder / "adapter")
    settings = yaml.safe_load((folder / "logs" / "config_of_run.yaml").read_text())
    dataset = DigitsVQA(**settings["data"]["init_args"]["val"]["init_args"])
    asked = [dataset[i] for i in range(len(said))]
    options = {"max_new_tokens": settings["model"]["init_args"]["max_new_tokens"], "batch_size": 100}
    answers = model.generate([sample["messages"] for sample in asked], **options)
    same = sum(a == row["answer"] for a, row in zip(answers, said, strict=True))
    right = sum(a in sample["answers"] for a, sample in zip(answers, asked, strict=True))
    before = json.loads((folder / "result.json").read_text())["accuracy"]["all"]
    accuracy = right / len(said)
    print(f"a fresh process gives {same} of {len(said)} answers alike, accuracy {accuracy:.3f} (it was {before:.3f})")
    update(folder, reloaded_equal=accuracy == before, reloaded_accuracy=accuracy, reloaded_answers_alike=same)
    return 0


def update(folder: Path, **values: object) -> None:
    """Put values into result.json."""
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))


if __name__ == "__main__":
    sys.exit(main())
