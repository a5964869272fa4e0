"""Three recorded tasks, shared by the tests of this folder, and the OpenGL library that draws them."""

import pytest

from tests.drawing import gl as gl


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Folders of two pushes (noisy), two reaches, and one coffee button, the shortest task."""
    pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")
    from mmpeft.policies import collect

    root = tmp_path_factory.mktemp("demos")
    collect("metaworld:push-v3", episodes=2, noise=0.3, folder=root / "push", extra_steps=3)
    collect("metaworld:reach-v3", episodes=2, folder=root / "reach", extra_steps=0)
    collect("metaworld:coffee-button-v3", episodes=1, folder=root / "button", extra_steps=0)
    return root
