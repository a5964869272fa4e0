"""The choice of the OpenGL back end, and what is said where there is none."""

import pytest

from mmpeft.errors import ConfigError, MissingExtra
from mmpeft.policies.envs import gl as module


def choose(monkeypatch, asked, **probes):
    monkeypatch.setenv("MUJOCO_GL", asked)
    monkeypatch.setattr(module, "_PROBES", {name: lambda why=why: why for name, why in probes.items()})
    return module.choose_gl.__wrapped__()


def test_no_library_is_an_error_that_names_the_packages(monkeypatch):
    with pytest.raises(module.NoGL, match="libegl1.*libosmesa6") as error:
        choose(monkeypatch, "", egl="no device", osmesa="not there")
    assert "no device" in str(error.value) and isinstance(error.value, MissingExtra)


def test_the_asked_one_is_not_replaced_by_another(monkeypatch):
    with pytest.raises(module.NoGL, match="libosmesa6") as error:
        choose(monkeypatch, "osmesa", egl="", osmesa="not there")
    assert "libegl1" not in str(error.value)


@pytest.mark.parametrize(("asked", "error"), [("off", module.NoGL), ("disable", module.NoGL), ("oxmesa", ConfigError)])
def test_settings_that_cannot_draw(monkeypatch, asked, error):
    with pytest.raises(error, match="MUJOCO_GL"):
        choose(monkeypatch, asked, egl="", osmesa="")


def test_the_choice_draws(gl):
    assert gl in ("egl", "osmesa", "glfw", "cgl", "wgl") and module.why_no_gl() == ""


def test_devices_of_egl_are_counted_only_where_it_is_there(monkeypatch):
    assert module.egl_devices() >= (1 if module._egl_works() == "" else 0)

    def missing(name):
        raise OSError(f"no {name}")

    monkeypatch.setattr(module.ctypes, "CDLL", missing)
    assert module.egl_devices() == 0 and "cannot be loaded" in module._egl_works()
