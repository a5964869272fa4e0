"""Pictures of one MuJoCo model: own OpenGL context, shadows, reflections and multisampling off, always upright.

Measured with software OpenGL on one core (Metaworld's reach, 96 px): the simulator's own renderer 16 frames/s whatever
the size, this one about 100 to 150. One context a model: Gymnasium's shared renderer draws wrong pictures as soon as
two different models live in one process. Pictures are drawn from a second `MjData`, filled from the simulator's state,
so that looking never changes what happens next (a forward pass would touch the solver's warm start), and a stored
state gives the very same pixels.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, require
from mmpeft.policies.envs.gl import choose_gl
from mmpeft.policies.envs.views import Shift, View, shrink

# What a Shift may change; all of it is looks, none of it enters the dynamics.
_LOOKS = ("cam_pos", "light_pos", "light_diffuse", "light_ambient", "geom_rgba", "mat_rgba")
_OPEN: weakref.WeakSet[Renderer] = weakref.WeakSet()


class Renderer:
    """Draws `View`s of a model; the OpenGL context is made at the first picture.

    Raises:
        NoGL: at the first picture, where no OpenGL library works; the message names the packages.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._gl: Any = None
        self._context: Any = None
        self._looks = {name: getattr(model, name).copy() for name in _LOOKS}
        self._headlight = [np.array(getattr(model.vis.headlight, n)) for n in ("diffuse", "ambient")]

    def shift(self, shift: Shift | None, episode_seed: int) -> None:
        """Set the model's looks to its own, changed as `shift` says for this episode."""
        model = self.model
        for name, value in self._looks.items():
            getattr(model, name)[:] = value
        model.vis.headlight.diffuse[:], model.vis.headlight.ambient[:] = self._headlight
        if shift is None:
            return
        rng = shift.rng(episode_seed)
        model.cam_pos[:] += rng.uniform(-shift.camera, shift.camera, model.cam_pos.shape)
        brightness = rng.uniform(1 - shift.light, 1 + shift.light)
        for light in (
            model.light_diffuse,
            model.light_ambient,
            model.vis.headlight.diffuse,
            model.vis.headlight.ambient,
        ):
            light[:] = np.clip(light * brightness, 0, 1)
        model.light_pos[:] += rng.uniform(-shift.light, shift.light, model.light_pos.shape)
        for colours in (model.geom_rgba, model.mat_rgba):
            factor = rng.uniform(1 - shift.colour, 1 + shift.colour, (len(colours), 3))
            colours[:, :3] = np.clip(colours[:, :3] * factor, 0, 1)

    def draw(self, data: Any, view: View, size: int) -> NDArray[np.uint8]:
        """A square picture [size, size, 3] of the simulator's present state."""
        mujoco = require("mujoco", "robot")
        side = view.crop[2] if view.crop else 1.0
        full = round(size * view.supersample / side)
        kept_side = size * view.supersample
        self._open(mujoco, kept_side)
        model, scratch, scene, context = self.model, self._scratch, self._scene, self._context
        state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_setState(model, scratch, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        camera = mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(view.camera).id
        kept = model.cam_pos[camera.fixedcamid].copy()
        if view.position is not None:
            moved = kept - self._looks["cam_pos"][camera.fixedcamid]  # by a Shift
            model.cam_pos[camera.fixedcamid] = np.asarray(view.position) + moved
        mujoco.mj_fwdPosition(model, scratch)
        model.cam_pos[camera.fixedcamid] = kept
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, scratch, self._options, None, camera, everything, scene)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            scene.flags[flag] = 0
        self._gl.make_current()
        # Only the crop is drawn: the whole picture's viewport reaches beyond the buffer. OpenGL's rows run from the
        # bottom up; a camera that hangs upside down turns the picture by half a circle.
        hangs = self._hangs(camera.fixedcamid)
        x, y = (min(round(v * full), full - kept_side) for v in (view.crop or (0, 0))[:2])
        left, bottom = (full - kept_side - x, y) if hangs else (x, full - kept_side - y)
        mujoco.mjr_render(mujoco.MjrRect(-left, -bottom, full, full), scene, context)
        pixels = np.empty((kept_side, kept_side, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, mujoco.MjrRect(0, 0, kept_side, kept_side), context)
        upright = pixels[:, ::-1] if hangs else pixels[::-1]
        return np.ascontiguousarray(shrink(upright, view.supersample))

    def _hangs(self, camera: int) -> bool:
        """Is the world's up the picture's down? From the camera's own axes: y of its frame is the picture's up."""
        return bool(self.model.cam_mat0[camera].reshape(3, 3)[2, 1] < -0.1)

    def _open(self, mujoco: Any, side: int) -> None:
        """The context, and a larger one once a larger picture is asked for."""
        if self._gl is not None and side <= self._context.offWidth:
            return
        if not 1 <= side <= 4096:
            raise ConfigError(
                f"a picture of {side} pixels cannot be drawn; sizes are 1 to 4096, supersampling and crop included"
            )
        self.close()
        choose_gl()
        quality, buffer = self.model.vis.quality, self.model.vis.global_
        quality.offsamples = 0
        quality.shadowsize = 0
        buffer.offwidth = buffer.offheight = max(side, 256)
        self._gl = mujoco.gl_context.GLContext(buffer.offwidth, buffer.offheight)
        if not _OPEN:
            atexit.register(_close_all)  # after MuJoCo registered its own, hence called before it
        _OPEN.add(self)
        self._gl.make_current()
        self._context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(self.model, maxgeom=2000)
        self._options = mujoco.MjvOption()
        self._scratch = mujoco.MjData(self.model)

    def close(self) -> None:
        """Free the context; under OSMesa a context that is dropped unclosed blackens the pictures of the others."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # interpreter shutdown: the libraries may be gone already
            self._gl = None


def _close_all() -> None:
    for renderer in list(_OPEN):
        renderer.close()
