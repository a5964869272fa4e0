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
    first        bool [B]             the row's first observation of an episode: forget what was before

The chunk is float [B, chunk, action_dim] (discrete actions: int [B, chunk]) with chunk >= the `execute` given to
`rollout`. Rows of slots that ran out of seeds repeat their last observation; their actions are ignored.
Optional attributes:

    reset(num_envs)      called once before the first `act` of a rollout, and again when workers were restarted
    reads                the observation keys it needs, default ("images", "state", "instruction"); what nobody reads
                         is not rendered
    execute, chunk       how many actions of a chunk are carried out, where `rollout` is not told (execute None: all)
    environment          `env.describe()` of the environment it was trained in: names the cameras, and another kind of
                         environment is refused before the first step

**Demonstrations** (`mmpeft.data.demos`) are stored as simulator states, clean actions and proprioception; pictures are
rendered from them at any size and camera when first used.

**Training** is `mmpeft.tasks.ControlTask` under Lightning, or, where the demonstrations fit in memory, without a loader:

    memory = policies.Memory.of(demonstrations, policy, copies=8, device="cuda")   # pictures through the frozen prefix
    policies.clone(policy, memory, steps=24_000, graph=True)                       # a step is one CUDA graph

A clone that stands still: a teacher that switches abruptly (lower the hand, close it, lift) has two actions in nearly one
state, and a regression gives the one between them. `FlowHead` picks one of the two, and then it can look again more
often (`execute=4` of a chunk of 8); see benchmarks/NOTES.md 9. Sentences in other words than those of training:
`Policy(word_noise=1)`.

Nothing here imports Gymnasium, MuJoCo or Metaworld until a function that needs it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmpeft.lazy import lazy

if TYPE_CHECKING:
    from mmpeft.data.demos.record import collect as collect
    from mmpeft.policies.chunking import ChunkExecutor as ChunkExecutor
    from mmpeft.policies.cloning import as_base as as_base
    from mmpeft.policies.cloning import clone as clone
    from mmpeft.policies.continual import learn_continually as learn_continually
    from mmpeft.policies.envs import make_env as make_env
    from mmpeft.policies.experts import make_expert as make_expert
    from mmpeft.policies.heads import ACTHead as ACTHead
    from mmpeft.policies.heads import BinnedHead as BinnedHead
    from mmpeft.policies.heads import DiffusionHead as DiffusionHead
    from mmpeft.policies.heads import DiscreteHead as DiscreteHead
    from mmpeft.policies.heads import FASTHead as FASTHead
    from mmpeft.policies.heads import FlowHead as FlowHead
    from mmpeft.policies.heads import GaussianHead as GaussianHead
    from mmpeft.policies.heads import MixtureHead as MixtureHead
    from mmpeft.policies.heads import RegressionHead as RegressionHead
    from mmpeft.policies.heads import VQBeTHead as VQBeTHead
    from mmpeft.policies.instructions import InstructionEncoder as InstructionEncoder
    from mmpeft.policies.memory import Memory as Memory
    from mmpeft.policies.normalise import Normaliser as Normaliser
    from mmpeft.policies.policy import Policy as Policy
    from mmpeft.policies.policy import load_policy as load_policy
    from mmpeft.policies.policy import save_policy as save_policy
    from mmpeft.policies.ppo_loop import ppo as ppo
    from mmpeft.policies.prefix import TappedEncoder as TappedEncoder
    from mmpeft.policies.rollout_loop import rollout as rollout
    from mmpeft.policies.rollout_result import RolloutResult as RolloutResult
    from mmpeft.policies.samples import PolicySamples as PolicySamples
    from mmpeft.policies.saycan import SayCan as SayCan
    from mmpeft.policies.scratch import ScratchEncoder as ScratchEncoder
    from mmpeft.policies.skills import Skills as Skills
    from mmpeft.policies.trunks import MLPTrunk as MLPTrunk
    from mmpeft.policies.trunks import TransformerTrunk as TransformerTrunk
    from mmpeft.policies.trunks_llm import LLMTrunk as LLMTrunk

#: public name -> module; a module is imported when one of its names is used
_LAZY = {
    "ACTHead": "mmpeft.policies.heads",
    "BinnedHead": "mmpeft.policies.heads",
    "ChunkExecutor": "mmpeft.policies.chunking",
    "DiffusionHead": "mmpeft.policies.heads",
    "DiscreteHead": "mmpeft.policies.heads",
    "ExpertPolicy": "mmpeft.policies.experts",
    "FASTHead": "mmpeft.policies.heads",
    "FlowHead": "mmpeft.policies.heads",
    "GaussianHead": "mmpeft.policies.heads",
    "InstructionEncoder": "mmpeft.policies.instructions",
    "LLMTrunk": "mmpeft.policies.trunks_llm",
    "MLPTrunk": "mmpeft.policies.trunks",
    "MixtureHead": "mmpeft.policies.heads",
    "Memory": "mmpeft.policies.memory",
    "Normaliser": "mmpeft.policies.normalise",
    "Policy": "mmpeft.policies.policy",
    "PolicySamples": "mmpeft.policies.samples",
    "RegressionHead": "mmpeft.policies.heads",
    "RolloutResult": "mmpeft.policies.rollout_result",
    "SayCan": "mmpeft.policies.saycan",
    "ScratchEncoder": "mmpeft.policies.scratch",
    "Shift": "mmpeft.policies.envs.views",
    "Skills": "mmpeft.policies.skills",
    "TappedEncoder": "mmpeft.policies.prefix",
    "TransformerTrunk": "mmpeft.policies.trunks",
    "VQBeTHead": "mmpeft.policies.heads",
    "View": "mmpeft.policies.envs.views",
    "as_base": "mmpeft.policies.cloning",
    "collect": "mmpeft.data.demos.record",
    "clone": "mmpeft.policies.cloning",
    "learn_continually": "mmpeft.policies.continual",
    "load_policy": "mmpeft.policies.policy",
    "make_env": "mmpeft.policies.envs",
    "make_expert": "mmpeft.policies.experts",
    "ppo": "mmpeft.policies.ppo_loop",
    "rollout": "mmpeft.policies.rollout_loop",
    "save_policy": "mmpeft.policies.policy",
}
__all__ = list(_LAZY)
__getattr__ = lazy(__name__, _LAZY)
