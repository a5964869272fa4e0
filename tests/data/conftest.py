"""A folder of real image and sound files, good and bad, for the readers."""

import wave

import numpy as np
import pytest
from PIL import Image


def save_wav(path, seconds=0.1, rate=8000):
    samples = (np.sin(np.arange(int(seconds * rate)) / 5) * 20000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


@pytest.fixture
def files(tmp_path):
    """`a.png`, `b.jpg`, `hello.wav`, and the bad ones `empty.png`, `text.png`, `cut.png` (truncated)."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (13, 17, 3), dtype=np.uint8)).save(tmp_path / name)
    save_wav(tmp_path / "hello.wav")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    return tmp_path
