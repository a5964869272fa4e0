"""One base, a folder a task: every row acts as its task's adapter alone would; wrong folders and tasks are refused."""

import json

import numpy as np
import pytest

import mmpeft
from mmpeft.errors import BaseMismatch, ConfigError, FileFormatError, NameNotFound
from mmpeft.policies.by_task import ByTask
from mmpeft.policies.policy import load_policy, save_policy

from .policy_kit import Demos, eyes, make_policy, observation

PLAN = {"trunk": "full", "head": "full", "encoder.backbone.blocks.2.*": mmpeft.ConvAdapter(size=2)}


def save(folder, task, scale=1.0, **environment):
    """A folder trained for `task`, its actions `scale` times the demonstrations'."""
    policy = make_policy(encoder=eyes())
    where = Demos().describe() | {"name": task} | environment
    policy.fit(Demos().stacked("action") * scale, Demos().stacked("state"), environment=where)
    mmpeft.attach(policy, PLAN, task[-4:])
    save_policy(policy, folder)
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path / "a", "toy:pull"), save(tmp_path / "b", "toy:push", 10.0)]


def recipe_free(folders, monkeypatch):
    """Policies of these tests are built by `make_policy`; the folders do not say how (their encoder is random)."""
    policy = make_policy(encoder=eyes())

    def on_it(folder, made, name):
        return load_policy(folder, made or policy, name=name)

    monkeypatch.setattr("mmpeft.policies.by_task.load_policy", on_it)
    return ByTask(folders)


def test_each_row_under_its_task(folders, monkeypatch):
    both = recipe_free(folders, monkeypatch)
    assert both.adapters == {"toy:pull": "task0", "toy:push": "task1"} and both.execute == 2
    seen = observation() | {"task": np.array(["toy:push", "toy:pull", "toy:push"])}
    mixed = both.act(seen)
    assert np.abs(mixed[0]).mean() > 3 * np.abs(mixed[1]).mean()
    for row, task in enumerate(seen["task"]):
        alone = load_policy(folders[task == "toy:push"], make_policy(encoder=eyes())).act(observation())
        np.testing.assert_allclose(mixed[row], alone[row], rtol=1e-5, atol=1e-5)
        with both.only(task):
            np.testing.assert_array_equal(both.policy.act(observation()), alone)  # switched: the very actions
    with pytest.raises(NameNotFound, match=r"'toy:pusch'.*toy:push"):
        both.act(seen | {"task": np.array(["toy:push", "toy:pull", "toy:pusch"])})


def test_wrong_folders(folders, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no adapter folder"):
        ByTask([])
    with pytest.raises(ConfigError, match="two of the folders were trained for toy:pull"):
        recipe_free([folders[0], folders[0]], monkeypatch)
    camera = save(tmp_path / "c", "toy:reach", images=[1, 48, 48, 3])
    with pytest.raises(BaseMismatch, match=r"images.*48"):
        recipe_free([folders[0], camera], monkeypatch)
    path = tmp_path / "b" / "adapter.json"
    about = json.loads(path.read_text())
    about["metadata"]["policy"]["environment"] = None
    path.write_text(json.dumps(about))
    with pytest.raises(FileFormatError, match="does not say which task"):
        recipe_free(folders, monkeypatch)
