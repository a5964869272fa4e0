"""Robot demonstrations: simulator states, clean actions and proprioception on disk, pictures rendered on first use.

    collect("metaworld:push-v3", episodes=50, noise=0.3, folder="demos/push")
    data = Demonstrations("demos/push", views=("close",), image_size=96, chunk=8)
    data[0]["images"], data[0]["action"]                 # uint8 [N, H, W, 3], float32 [8, 4]
    write_lerobot("demos/push", "lerobot/push");  write_robomimic("demos/push", "push.hdf5")

A task of 50 episodes is about 3 MB, and can be looked at from any camera, at any size, under any light, afterwards.
Nothing here imports a simulator until a picture is rendered or an episode recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmpeft.lazy import lazy

if TYPE_CHECKING:
    from mmpeft.data.demos.dataset import Demonstrations as Demonstrations
    from mmpeft.data.demos.lerobot import read_lerobot as read_lerobot
    from mmpeft.data.demos.lerobot import write_lerobot as write_lerobot
    from mmpeft.data.demos.record import collect as collect
    from mmpeft.data.demos.robomimic import read_robomimic as read_robomimic
    from mmpeft.data.demos.robomimic import write_robomimic as write_robomimic
    from mmpeft.data.demos.store import DemoFolder as DemoFolder
    from mmpeft.data.demos.store import Episode as Episode

#: public name -> file; a file is imported when one of its names is used
_LAZY = {
    "DemoFolder": ".store",
    "Demonstrations": ".dataset",
    "Episode": ".store",
    "FrameCache": ".frames",
    "collect": ".record",
    "read_lerobot": ".lerobot",
    "read_robomimic": ".robomimic",
    "verify": ".record",
    "write_lerobot": ".lerobot",
    "write_robomimic": ".robomimic",
}
__all__ = list(_LAZY)
__getattr__ = lazy(__name__, _LAZY)
