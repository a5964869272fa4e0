"""A hub that does not answer: noticed once and in seconds, the cache still serves; a hub that does is left to its client."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from mmpeft.encoders import hub, load_encoder, load_llm
from mmpeft.errors import FileFormatError, NameNotFound

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOBODY = "http://127.0.0.1:9"  # the discard port, on which nothing listens


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """What was asked before is forgotten, and the time between two tries is counted, not waited."""
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.log, "propagate", True)  # the command line, run before in this process, turns it off
    waited = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    return waited


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)


@pytest.fixture
def server(monkeypatch):
    """A hub of this machine that answers everything with the status in `status[0]`; what it was asked is in `asked`."""

    class Answer(BaseHTTPRequestHandler):
        asked: list[str] = []
        status = [404]

        def do_HEAD(self):
            self.asked.append(self.path)
            self.send_response(self.status[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    served = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{served.server_port}")
    yield Answer
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.mark.parametrize("status", [200, 404, 503])
def test_an_answer_of_any_kind_is_one(server, status):
    server.status[0] = status
    assert hub.silence() is None and hub.silence() is None
    assert len(server.asked) == 1  # the second time within the minute it was not asked
    with hub.reading("hf:org/name", None):
        assert not constants.HF_HUB_OFFLINE


def test_silence_is_asked_for_twice_and_kept_for_a_while(silent, anew, monkeypatch):
    said = hub.silence()
    assert said is not None and "ConnectError" in said and anew == [0, hub.WAIT]
    assert hub.silence() == said and len(anew) == hub.TRIES
    later = time.monotonic() + hub.KEPT + 1
    monkeypatch.setattr(hub.time, "monotonic", lambda: later)  # of the stand-in
    hub.silence()
    assert len(anew) == 2 * hub.TRIES


def test_a_silent_hub_leaves_the_cache(silent, tmp_path, caplog):
    """A file of the cache is given, another is refused without a second call, and the client is as before afterwards."""
    place = tmp_path / "models--org--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    (place / "snapshots" / COMMIT / "config.json").write_text("{}")
    from huggingface_hub import hf_hub_download

    with hub.reading("hf:org/name", None):
        assert hf_hub_download("org/name", "config.json", cache_dir=tmp_path).endswith(f"{COMMIT}/config.json")
    with pytest.raises(NameNotFound, match="'hf:org/name'.*the hub did not give it"), hub.reading("hf:org/name", None):
        hf_hub_download("org/name", "model.safetensors", cache_dir=tmp_path)
    assert constants.HF_HUB_OFFLINE is False
    assert [NOBODY in r.getMessage() and "does not answer" in r.getMessage() for r in caplog.records] == [True, True]


def test_offline_by_choice_asks_nobody(silent, anew, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.reading("hf:org/name", None):
        pass
    assert constants.HF_HUB_OFFLINE is True and not anew and not caplog.records


def test_a_folder_asks_nobody(silent, anew, tmp_path):
    with pytest.raises(FileFormatError, match="could not be loaded"), hub.reading("./here", tmp_path):
        raise ValueError("torn")
    assert not anew


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_llm, "hf:org/no-such-model"),
        (load_encoder, "hf:org/no-such-model"),
        (load_encoder, "timm:hf-hub:org/no-such-model"),
        (load_encoder, "open_clip:hf-hub:org/no-such-model"),
    ],
)
def test_every_library_is_stopped_in_seconds(silent, load, name):
    """Their clients would wait 23 s or more for each file; their own sleeps count here, since `hub` alone is patched."""
    began = time.perf_counter()
    with pytest.raises(NameNotFound, match="no-such-model.*the hub did not give it"):
        load(name)
    assert time.perf_counter() - began < 20  # imports included
