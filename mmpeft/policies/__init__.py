"""Robot policies: simulated environments, scripted experts, demonstrations, trunks and heads, and evaluation.

    env = policies.make_env("metaworld:push-v3", views=("close",), image_size=96)
    policies.collect("metaworld:push-v3", episodes=50, noise=0.3, folder="demos/push")
    result = policies.rollout(policy, env="metaworld:push-v3", seeds=range(50_000, 50_050), execute=8, video="videos/")
    result.success, result.interval                      # 0.84, (0.71, 0.92)
    result.compare(other).p_value                        # exact McNemar test on the shared seeds

**Environment.** `make_env` gives a `gymnasium.Env` whose observation is a dict, and whose `reset(seed=s)` decides the
episode:

    images       uint8 [N, H, W, 3]   N views of one size, upright; left out with views=()
    state        float32 [S]          proprioception: what the robot itself measures
    instruction  str                  one sentence
    full_state   float64 [F]          only with full_state=True: what an expert or a ceiling policy may see

`env.describe()` is the JSON dict (name, action and state size, views, image size) that belongs into an adapter's
metadata.

**Policy.** Any object with `act(observation) -> chunk`. The observation is the dict above with a leading batch axis B
(one row a vector-environment slot), `instruction` as an array of B strings, and two more keys:

    task         str [B]              name of the environment each row belongs to, such as "metaworld:push-v3"
    first        bool [B]             the row's first observation of an episode: forget history, temporal ensembles,
    caches

The chunk is float [B, chunk, action_dim] (discrete actions: int [B, chunk]) with chunk >= the `execute` given to
`rollout`. Rows of slots that ran out of seeds repeat their last observation; their actions are ignored. Optional
attributes:

    reset(num_envs)      called once before the first `act` of a rollout, and again when workers were restarted
    reads                the observation keys it needs, default ("images", "state", "instruction"); unread pictures are
    not rendered environment          `env.describe()` of the environment it was trained in; another one is refused
    before the first step

**Demonstrations** (`mmpeft.data.demos`) are stored as simulator states, clean actions and proprioception; pictures are
rendered from them at any size and camera when first used.

Nothing here imports Gymnasium, MuJoCo or Metaworld until a function that needs it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmpeft.errors import nearest

if TYPE_CHECKING:
    from mmpeft.data.demos.record import collect as collect
    from mmpeft.policies.envs import make_env as make_env
    from mmpeft.policies.experts import make_expert as make_expert
    from mmpeft.policies.rollout_loop import rollout as rollout
    from mmpeft.policies.rollout_result import RolloutResult as RolloutResult

#: public name -> module; a module is imported when one of its names is used
_LAZY = {
    "ExpertPolicy": "mmpeft.policies.experts",
    "RolloutResult": "mmpeft.policies.rollout_result",
    "Shift": "mmpeft.policies.envs.views",
    "View": "mmpeft.policies.envs.views",
    "collect": "mmpeft.data.demos.record",
    "make_env": "mmpeft.policies.envs",
    "make_expert": "mmpeft.policies.experts",
    "rollout": "mmpeft.policies.rollout_loop",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, _LAZY)}")
    return getattr(importlib.import_module(_LAZY[name]), name)
