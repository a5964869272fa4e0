"""Which OpenGL draws MuJoCo's pictures without a screen: chosen once, checked, and refused with the packages to
install.

`MUJOCO_GL` decides where it is set ("egl", "osmesa", "glfw"). Otherwise EGL is taken if a device initialises (an NVIDIA
driver, or Mesa in software), else OSMesa. MuJoCo binds its back end when it is imported and fails only at the first
picture, with a message about a missing attribute; so the libraries are probed here first, through ctypes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib
import os
import platform
from collections.abc import Callable
from typing import Any

from mmpeft.errors import ConfigError, MissingExtra, nearest, require

APT = {
    "egl": "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0",
    "osmesa": "apt-get install libosmesa6 libgl1 libopengl0",
}
_EGL_PLATFORM_DEVICE = 0x313F
_OFF = ("disable", "disabled", "off", "false", "0")
_DEFAULT = ("", "enable", "enabled", "on", "true", "1")


class NoGL(MissingExtra):
    """No OpenGL library draws pictures here; the message names the packages to install."""


def _egl() -> tuple[ctypes.CDLL, Any, list[int | None]]:
    """libEGL, its function that opens a device's display, and the devices.

    Raises:
        OSError: it cannot be loaded, or knows no devices.
    """
    egl = ctypes.CDLL(ctypes.util.find_library("EGL") or "libEGL.so.1")
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display = egl.eglGetProcAddress(b"eglQueryDevicesEXT"), egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display:
        raise OSError("no device platform")
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)(
        16, ctypes.cast(devices, ctypes.c_void_p), ctypes.cast(ctypes.pointer(count), ctypes.c_void_p)
    )
    opens = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display)
    return egl, opens, list(devices[: count.value])


def egl_devices() -> int:
    """Devices that EGL lists, by which `MUJOCO_EGL_DEVICE_ID` counts; 0 without EGL."""
    try:
        return len(_egl()[2])
    except OSError:
        return 0


def _egl_works() -> str:
    """'' if some EGL device initialises, else why not."""
    try:
        egl, opens, devices = _egl()
    except OSError as error:
        return f"libEGL cannot be loaded ({error})"
    for device in devices:
        opened = opens(_EGL_PLATFORM_DEVICE, device, None)
        # never terminated: MuJoCo gets the same display, and ends it at exit
        if opened and egl.eglInitialize(ctypes.c_void_p(opened), None, None):
            return ""
    return f"none of the {len(devices)} EGL devices initialises"


def _osmesa_works() -> str:
    """'' if OSMesa loads, else why not."""
    for name in (ctypes.util.find_library("OSMesa"), "libOSMesa.so.8", "libOSMesa.so.6"):
        try:
            if name:
                ctypes.CDLL(name)
                return ""
        except OSError:
            continue
    return "libOSMesa cannot be loaded"


_PROBES: dict[str, Callable[[], str]] = {"egl": _egl_works, "osmesa": _osmesa_works}


@functools.cache
def choose_gl() -> str:
    """Bind MuJoCo to a back end that works here and give its name; decided once a process.

    Raises:
        NoGL: no library draws here (or the one that `MUJOCO_GL` asks for does not); names the apt packages.
        ConfigError: `MUJOCO_GL` is no back end. MissingExtra: MuJoCo is not installed.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower().strip()
    if asked in _OFF:
        raise NoGL(f"MUJOCO_GL={asked} forbids drawing; unset it, or use views=() for an environment without pictures")
    system = platform.system()
    if system != "Linux":
        require("mujoco", "robot")
        return asked or {"Darwin": "cgl", "Windows": "wgl"}.get(system, "glfw")
    known = (*_PROBES, "glfw", "glx", *_DEFAULT)
    if asked not in known:
        raise ConfigError(f"MUJOCO_GL must be one of {', '.join(_PROBES)}, glfw; got {asked!r}{nearest(asked, known)}")
    chosen = "glfw" if asked in ("glfw", "glx") else _first_working([asked] if asked in _PROBES else list(_PROBES))
    os.environ["MUJOCO_GL"] = chosen  # worker processes take the same
    mujoco = require("mujoco", "robot")
    try:
        module = importlib.import_module(f"mujoco.{chosen}")
    except Exception as error:  # PyOpenGL was bound to another platform before
        raise NoGL(f"MuJoCo cannot use {chosen} here ({type(error).__name__}: {error})") from error
    mujoco.gl_context.GLContext = module.GLContext  # wins even where mujoco was imported earlier
    return chosen


def _first_working(candidates: list[str]) -> str:
    reasons = {}
    for name in candidates:
        reasons[name] = _PROBES[name]()
        if not reasons[name]:
            return name
    said = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    commands = " or ".join(APT[name] for name in candidates)
    raise NoGL(f"no OpenGL library draws pictures here ({said}). Install one as root: {commands}")


def why_no_gl() -> str:
    """'' if pictures can be drawn here, else the reason; for tests and reports that skip."""
    try:
        choose_gl()
    except (MissingExtra, ConfigError) as error:
        return str(error)
    return ""
