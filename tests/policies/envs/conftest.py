"""Environment tests draw with software OpenGL, one thread, and are skipped by name where nothing can draw."""

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
