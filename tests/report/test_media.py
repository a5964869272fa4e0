"""Media: what is embedded, what is named instead, and that videos are such as browsers play."""

import base64

import pytest

from mmpeft.report.media import Asked, Media, _boxes, admit
from tests.report.kit import Page


def test_videos_are_what_browsers_play(film):
    import av

    with av.open(str(film)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    names = list(_boxes(film.read_bytes()))
    assert names.index("moov") < names.index("mdat")  # plays before all of it is loaded


def test_a_file_is_embedded_whole(film, tmp_path):
    made = Media(tmp_path, frozenset({film})).show(film, alt="Video: a <b>, seed 3")
    (tmp_path / "page.html").write_text(made)
    (video,) = Page(tmp_path / "page.html").find("video")
    assert base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")) == film.read_bytes()
    assert video["aria-label"] == "Video: a <b>, seed 3" and "controls" in video


def broken(film, folder):
    """(file, why it is not shown)"""
    whole = film.read_bytes()
    made = {
        "empty.mp4": (b"", "empty"), "cut.mp4": (whole[: len(whole) // 2], "no whole mp4"), "text.mp4": (b"not a film" * 9, "no whole mp4"),
        "other.mp4": (whole.replace(b"avc1", b"mp4v"), "codec"), "text.gif": (b"hello", "no gif"), "text.png": (b"hello", "no png"),
    }  # fmt: skip
    for name, (data, why) in made.items():
        (folder / name).write_bytes(data)
        yield folder / name, why


def test_broken_files_are_named_with_the_reason(film, tmp_path):
    for path, why in broken(film, tmp_path):
        media = Media(tmp_path, frozenset({path}))
        shown = media.show(path, alt="x")
        assert why in shown and path.name in shown and "<video" not in shown and "<img" not in shown
        assert not admit(media.left_out(), 10**9)


def test_the_budget_is_shared_by_turns(tmp_path):
    files = [Asked(tmp_path / f"{arm}{i}.mp4", i, 100, None) for arm in "ab" for i in range(3)]
    chosen = admit(files, 450)
    assert {p.name for p in chosen} == {"a0.mp4", "b0.mp4", "a1.mp4", "b1.mp4"}
    assert admit([Asked(tmp_path / "large", 0, 1000, None), *files], 100) == {tmp_path / "a0.mp4"}
    assert admit(files, 99) == frozenset()


@pytest.mark.parametrize("name", ["javascript:alert(1).mp4", "a b'\"<i>.mp4", "#x?.mp4"])
def test_links_to_files_cannot_be_anything_else(film, tmp_path, name):
    path = tmp_path / "videos" / name
    path.parent.mkdir()
    path.write_bytes(film.read_bytes())
    (tmp_path / "page.html").write_text(Media(tmp_path).show(path, alt="x"))
    page = Page(tmp_path / "page.html")
    page.check_self_contained()
    assert name in page.words and [n for n, _ in page.tags] == ["p", "span", "a"]
