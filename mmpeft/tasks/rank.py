"""Rank controllers under Lightning: the policies of `mmpeft.adapters.selection.rank_policies` as a callback.

trainer = lightning.Trainer(callbacks=[RankControl(mmpeft.Budget(target=4, total_steps=1000))])
"""

from __future__ import annotations

from functools import partial

from mmpeft.adapters.selection.rank import Policy, RankController
from mmpeft.tasks.step_control import StepControl


class RankControl(StepControl):
    """Run a policy on the task's adapter: after every optimizer step, and its penalty's gradient before it.

    Args:
        policy: `Budget`, `Proximal`, `Sampled`, `Growth`, ...
        adapter: name; None is every adapter of the model.
        shrink: `compact` the adapter when training ends, so that what is saved is as small as what is in use.
    """

    def __init__(self, policy: Policy, *, adapter: str | None = None, shrink: bool = False) -> None:
        super().__init__(partial(RankController, policy=policy, name=adapter, shrink=shrink))
