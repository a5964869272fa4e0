"""LeRobotDataset v3.0 and robomimic HDF5: exact round trips, the layout that their readers expect, damaged files."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")

from mmpeft.data.demos import Demonstrations, read_lerobot, read_robomimic, write_lerobot, write_robomimic
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound

parquet = pytest.importorskip("pyarrow.parquet")
VIEWS = ("corner2", "close")


@pytest.fixture(scope="module")
def dataset(recorded, gl, tmp_path_factory):
    """A LeRobot folder of both tasks, and the demonstrations it was made from."""
    source = [recorded / "reach", recorded / "button"]
    root = write_lerobot(source, tmp_path_factory.mktemp("lerobot") / "both", views=VIEWS, image_size=16)
    return root, Demonstrations(source, views=VIEWS, image_size=16)


def test_lerobot_round_trip_is_exact(dataset, tmp_path):
    root, data = dataset
    store = read_lerobot(root, tmp_path / "back")
    back = Demonstrations(store.path, views=VIEWS)
    assert store.imported_views == VIEWS and len(back.episodes) == 3
    for number, (_, episode) in enumerate(data.episodes):
        there = back.episodes[number][1]
        for name in ("state", "action", "reward", "success"):
            assert np.array_equal(there[name], episode[name]) and there[name].dtype == episode[name].dtype
        assert np.array_equal(back.pictures(number), data.pictures(number))
        assert there.instruction == data.instruction(number)
    one = Demonstrations(store.path, views=("close",))
    assert np.array_equal(one[3]["images"], back[3]["images"][1:])
    assert one.describe()["images"] == [1, 16, 16, 3]
    with pytest.raises(NameNotFound, match="close"):
        Demonstrations(store.path, views=("clse",))[0]


def test_lerobot_layout(dataset):
    root, data = dataset
    info = json.loads((root / "meta/info.json").read_text())
    lengths = [len(e) for _, e in data.episodes]
    counts = (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"])
    assert info["codebase_version"] == "v3.0" and counts == (3, sum(lengths), 2, 80)
    assert info["features"]["observation.images.close"] == {
        "dtype": "image", "shape": [16, 16, 3], "names": ["height", "width", "channels"],
    }  # fmt: skip
    table = parquet.read_table(root / "data/chunk-000/file-000.parquet")
    assert set(table.column_names) == set(info["features"])
    assert table["index"].to_pylist() == list(range(sum(lengths)))
    assert np.allclose(np.diff(table["timestamp"].to_pylist()[: lengths[0]]), 1 / 80)
    assert str(table.schema.field("action").type).startswith("fixed_size_list") and len(table["action"][0]) == 4
    assert set(table["observation.images.close"][0].as_py()) == {"bytes", "path"}
    episodes = parquet.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [e["length"] for e in episodes] == lengths
    assert [e["dataset_to_index"] - e["dataset_from_index"] for e in episodes] == lengths
    tasks = parquet.read_table(root / "meta/tasks.parquet").to_pandas()
    assert tasks.loc[data.instruction(2), "task_index"] == 1 and episodes[2]["tasks"] == [data.instruction(2)]
    stats = json.loads((root / "meta/stats.json").read_text())
    actions = np.concatenate([e["action"] for _, e in data.episodes])
    for name, value in (
        ("mean", actions.mean(0)),
        ("std", actions.std(0)),
        ("min", actions.min(0)),
        ("max", actions.max(0)),
    ):
        assert np.allclose(stats["action"][name], value, atol=1e-6)
    assert stats["action"]["count"] == [len(actions)]
    assert np.shape(stats["observation.images.close"]["mean"]) == (3, 1, 1)


def test_lerobot_video(recorded, gl, tmp_path):
    av = pytest.importorskip("av")
    root = write_lerobot(recorded / "button", tmp_path / "video", views=("close",), image_size=32, video=True)
    film = root / "videos/observation.images.close/chunk-000/file-000.mp4"
    with av.open(str(film)) as opened:
        times = [float(frame.pts * frame.time_base) for frame in opened.decode(video=0)]
    data = Demonstrations(recorded / "button", views=("close",), image_size=32)
    assert np.allclose(times, np.arange(len(data)) / 80, atol=1e-6)  # a reader looks pictures up by time
    back = Demonstrations(read_lerobot(root, tmp_path / "back").path, views=("close",))
    assert np.abs(back.pictures(0).astype(int) - data.pictures(0)).mean() < 12  # H.264 halves the colour resolution
    film.write_bytes(film.read_bytes()[:900])
    with pytest.raises((FileFormatError, ConfigError)):
        read_lerobot(root, tmp_path / "cut")


def test_damaged_lerobot_folders(dataset, tmp_path):
    def copy(name):
        shutil.copytree(dataset[0], tmp_path / name)
        return tmp_path / name

    cut = copy("cut")
    file = cut / "data/chunk-000/file-000.parquet"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(FileFormatError, match="cut short"):
        read_lerobot(cut, tmp_path / "a")
    old = copy("old")
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(FileFormatError, match="v2.1"):
        read_lerobot(old, tmp_path / "b")
    (old / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 4}))
    with pytest.raises(FileFormatError, match="4 expected"):
        read_lerobot(old, tmp_path / "c")
    with pytest.raises(NameNotFound, match="info.json"):
        read_lerobot(tmp_path, tmp_path / "d")
    with pytest.raises(NameNotFound, match="observation.images.close"):
        read_lerobot(dataset[0], tmp_path / "e", images=["observation.images.clse"])
    with pytest.raises(ConfigError, match="exists"):
        write_lerobot(tmp_path, cut)


def test_robomimic_round_trip(recorded, gl, tmp_path):
    h5py = pytest.importorskip("h5py")
    file = write_robomimic(recorded / "reach", tmp_path / "reach.hdf5", views=("close",), image_size=16, valid=0.5)
    data = Demonstrations(recorded / "reach", views=("close",), image_size=16)
    with h5py.File(file) as opened:
        assert json.loads(opened["data"].attrs["env_args"])["env_name"] == "metaworld:reach-v3"
        assert opened["data"].attrs["total"] == len(data) and list(opened["mask/valid"]) == [b"demo_1"]
        demo = opened["data/demo_0"]
        assert demo["dones"][-1] == 1 and demo["dones"][:-1].sum() == 0
        assert demo["states"].shape == (len(data.episodes[0][1]), data.episodes[0][1]["snapshot"].shape[1])
    store = read_robomimic(file, tmp_path / "back", images=("close_image",))
    back = Demonstrations(store.path, views=("close_image",))
    for number, (_, episode) in enumerate(data.episodes):
        there = back.episodes[number][1]
        assert all(np.array_equal(there[k], episode[k]) for k in ("state", "action", "executed", "reward", "success"))
        assert np.array_equal(back.pictures(number), data.pictures(number)) and there.seed == episode.seed
    assert len(read_robomimic(file, tmp_path / "half", mask="valid")) == 1
    with pytest.raises(NameNotFound, match="close_image"):
        read_robomimic(file, tmp_path / "x", images=("close",))
    with pytest.raises(NameNotFound, match="train"):
        read_robomimic(file, tmp_path / "y", mask="trian")
    (tmp_path / "cut.hdf5").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(FileFormatError, match="cut short"):
        read_robomimic(tmp_path / "cut.hdf5", tmp_path / "z")
