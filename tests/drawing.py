"""The fixture of tests that draw simulators: software OpenGL in one thread, or a skip that says why nothing can draw."""

import os

import pytest

os.environ.setdefault("LP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def gl():
    """The OpenGL back end."""
    pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")
    from mmpeft.policies.envs.gl import choose_gl, why_no_gl

    if reason := why_no_gl():
        pytest.skip(reason)
    return choose_gl()
