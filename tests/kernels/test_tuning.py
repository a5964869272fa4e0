"""The table of measured choices: one file a device, atomic, harmless when damaged or unwritable."""

import functools
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from mmpeft.kernels import tuning

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPEFT_CACHE", str(tmp_path))
    tuning._open.cache_clear()
    tuning._say_once.cache_clear()
    yield tmp_path / "tuning"
    tuning._open.cache_clear()


def pick(times, key=(3, torch.bfloat16), **more):
    """`choose` among candidates whose times are given; one without a time cannot run."""
    ran = []

    def candidate(name):
        def run():
            ran.append(name)
            if times[name] is None:
                raise RuntimeError("out of memory")

        return run

    def timer(run, device):
        run()
        return times[ran[-1]]

    best = tuning.choose("op", key, {n: candidate(n) for n in times}, CPU, otherwise="plain", timer=timer, **more)
    return best, ran


def restart():
    """What a new process would start with."""
    tuning._open.cache_clear()


def test_the_fastest_is_taken_once_and_remembered(folder, caplog):
    with caplog.at_level(logging.INFO, "mmpeft.kernels"):
        assert pick({"a": 2.0, "b": 1.0}) == ("b", ["a", "b"])
        assert pick({"a": 1.0, "b": 2.0}) == ("b", [])
        restart()
        assert pick({"a": 1.0, "b": 2.0}) == ("b", [])
        assert pick({"a": 1.0, "b": 2.0}, key=(4, torch.bfloat16))[0] == "a"
    assert sum("the first step takes longer" in r.message for r in caplog.records) == 1
    (file,) = folder.iterdir()
    assert file.name == f"{tuning.device_name('cpu', 0)}.json" and torch.__version__.split("+")[0] in file.name
    assert json.loads(file.read_text()) == {"op 3 torch.bfloat16": "b", "op 4 torch.bfloat16": "a"}


def test_what_cannot_run_is_out():
    assert pick({"a": None, "b": 5.0})[0] == "b"
    assert pick({"a": None, "b": None}, key=(1,))[0] == "plain"


def test_a_choice_that_no_longer_exists_is_made_again(folder):
    pick({"old": 1.0, "b": 2.0})
    restart()
    assert pick({"new": 1.0, "b": 2.0})[0] == "new"


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"op 3 torch.bfloat16": 7}', "\x00\xff"])
def test_a_damaged_file_is_ignored_and_said(folder, caplog, text):
    folder.mkdir()
    file = folder / f"{tuning.device_name('cpu', 0)}.json"
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "mmpeft.kernels"):
        assert pick({"a": 2.0, "b": 1.0})[0] == "b"
    assert any("ignored" in r.message and str(file) in r.getMessage() for r in caplog.records)
    assert json.loads(file.read_text()) == {"op 3 torch.bfloat16": "b"}


def test_two_processes_keep_each_others_choices(folder):
    one, other = (tuning.Table(folder / "x.json") for _ in range(2))
    one.put("p", "a")
    other.put("q", "b")
    assert tuning.Table(folder / "x.json").known == {"p": "a", "q": "b"}
    assert [f.name for f in folder.iterdir()] == ["x.json"]  # no temporary file is left


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMPEFT_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "mmpeft.kernels"):
        assert pick({"a": 2.0, "b": 1.0})[0] == "b"
        assert pick({"a": 2.0, "b": 1.0}) == ("b", [])
    assert any("cannot be kept" in r.message for r in caplog.records)


def test_the_real_timer_tells_slow_from_fast():
    slow, fast = torch.randn(300, 300), torch.randn(3, 3)
    best = tuning.choose("mm", (1,), {"slow": lambda: slow @ slow, "fast": lambda: fast @ fast}, CPU, otherwise="")
    assert best == "fast"


def test_what_computes_something_else_is_not_used(caplog):
    """The trusted candidate's result decides, however fast another is; rounding is no difference, NaN is one."""
    right = torch.arange(1.0, 5.0)
    results = {"trusted": right, "rounded": right * 1.001, "wrong": right.flip(0), "nan": right * float("nan")}
    times = {"wrong": 0.1, "nan": 0.2, "rounded": 1.0, "trusted": 2.0}
    with caplog.at_level(logging.WARNING, "mmpeft.kernels"):
        best, ran = pick(times, proof=("trusted", lambda name: [results[name]]))
    assert best == "rounded" and ran == ["rounded", "trusted"]
    assert [r.getMessage().split()[3] for r in caplog.records] == ["wrong", "nan"]


def test_a_trusted_candidate_that_cannot_run_proves_nothing():
    def result(name):
        raise RuntimeError("out of memory")

    assert pick({"trusted": None, "ours": 1.0}, proof=("trusted", lambda n: result(n) if n == "trusted" else []))[0] == "ours"


def test_a_kernel_that_asks_too_much_of_the_device_is_out():
    triton = pytest.importorskip("triton")

    def greedy():
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    times = iter([1.0])
    best = tuning.choose(
        "op", (9,), {"greedy": greedy, "modest": lambda: None}, CPU, otherwise="plain",
        timer=lambda run, device: (run(), next(times))[1],
    )  # fmt: skip
    assert best == "modest"


def test_a_launch_shape_is_timed_once_and_proved(monkeypatch):
    """The one that computes something else is out, however fast; off the GPU nothing is timed."""
    monkeypatch.setattr(tuning, "_shapes", {})
    times, ran = {(1, 4): 3.0, (2, 8): 2.0, (4, 4): 1.0}, []
    monkeypatch.setattr(tuning, "device_milliseconds", lambda run, device: (run(), times[ran[-1]])[1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    proof = ((1, 4), lambda shape: torch.full((3,), 2.0 if shape == (4, 4) else 1.0))
    gpu = SimpleNamespace(is_cuda=True, device=CPU)  # what is read of a tensor there
    ask = functools.partial(tuning.launch_shape, "op", (7, 5), list(times), ran.append, proof=proof)
    assert ask(torch.ones(2)) == (1, 4) and not ran
    assert ask(gpu) == (2, 8) and ran == [(1, 4), (2, 8)]
    restart()
    assert ask(gpu) == (2, 8) and len(ran) == 2
