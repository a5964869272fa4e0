"""A robot policy: frozen eyes and ears, a small trunk, an action head; observation in, chunk of actions out.

    policy = Policy(
        encoder=TappedEncoder("package:efficientnet-lite0", taps=(2, 3), split=2),
        instruction="package:minilm-l6", trunk=MLPTrunk(), head=RegressionHead(),
        action_dim=4, state_dim=4, chunk=8, image_size=96,
    )
    policy.fit(actions, states)                                             # normalisation, vocabularies, codebooks
    mmpeft.attach(policy, {"trunk": "full", "head": "full", "encoder.backbone.blocks.{3,4}.*": mmpeft.ConvAdapter()},
    "push") loss = policy(batch)                                                    # behaviour cloning; ControlTask
    does it chunk = policy.act(observation)                                         # [B, chunk, 4] in the environment's
    units save_policy(policy, "runs/push");  policy = load_policy("runs/push")

What decides an action travels in the adapter: encoder adapters, trunk, head, statistics, and the sizes and environment
that they hold for. So `mmpeft.use(policy, "reach")` switches the units with the weights, and an adapter made for
another robot is refused by what differs. One base serves robots of several sizes: `action_dim` and `state_dim` are its
widths, an adapter whose statistics have fewer dimensions is padded and masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.adapters import load, read_metadata, save
from mmpeft.adapters.freeze import evaluating, learning
from mmpeft.adapters.state import find_state
from mmpeft.errors import BadSample, BaseMismatch, ConfigError, FileFormatError
from mmpeft.policies.heads.base import Head
from mmpeft.policies.instructions import InstructionEncoder, noisy_words
from mmpeft.policies.normalise import Kind, Normaliser, Statistics
from mmpeft.policies.observing import History, batched_images
from mmpeft.policies.parts import Part, make
from mmpeft.policies.prefix import TappedEncoder
from mmpeft.policies.skill import Skill
from mmpeft.policies.trunks import Observed, Sizes, Trunk

KEY = "policy"  # the adapter's metadata entry


class Policy(Part):
    """Encoder, trunk and head.

    Args:
        encoder: what sees (`TappedEncoder`, `ScratchEncoder`, or a name: its last map); None: a blind policy.
        trunk, head: see `trunks` and `heads`; a head is given by its options alone, sizes are filled in.
        instruction: what reads the sentence: a name for `load_encoder`, or an `InstructionEncoder`; None: nothing does.
        action_dim, state_dim: widths (state 0: none); of a discrete head `action_dim` is the number of actions.
        chunk: steps a prediction has. execute: how many of them a rollout carries out before it asks again (None: all).
        image_size: side of the pictures, or (height, width). views: pictures an observation has.
        history: observations the trunk sees; they are `execute` steps apart, in training as in a rollout.
        readouts: feature tokens the trunk gives the head, 1 or `chunk`.
        actions, states: normalisation: "mean_std", "min_max", "quantile" or "identity".
        keep_actions: action dimensions that are not normalised (a binary gripper).
        word_noise: in training each sentence's unit vector gets Gaussian noise of up to this length (`noisy_words`).

    Attributes:
        environment: `describe()` of where the active adapter was trained; `rollout` refuses other environments.

    Raises:
        ConfigError: sizes out of range, or parts that do not fit together.
    """

    def __init__(
        self, *, trunk: Trunk, head: Head, action_dim: int, state_dim: int = 0,
        encoder: TappedEncoder | Part | str | None = None, instruction: InstructionEncoder | str | None = None,
        chunk: int = 8, execute: int | None = None, image_size: int | Sequence[int] = 96, views: int = 1,
        history: int = 1, readouts: int = 1, actions: Kind = "mean_std", states: Kind = "mean_std",
        keep_actions: Sequence[int] = (), word_noise: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        execute = chunk if execute is None else execute
        if min(action_dim, chunk, execute, views, history) < 1 or state_dim < 0 or execute > chunk:
            raise ConfigError(
                f"need action_dim, chunk, views, history of 1 or more, state_dim of 0 or more, 1 <= execute <= chunk; "
                f"given {action_dim}, {chunk}, {views}, {history}, {state_dim}, execute={execute}"
            )
        if not 0 <= word_noise < math.inf:
            raise ConfigError(f"word_noise is 0 or more, given {word_noise}")
        self.word_noise = word_noise
        side = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.image_size: tuple[int, int] = (int(side[0]), int(side[1]))
        self.action_dim, self.state_dim, self.chunk, self.execute = action_dim, state_dim, chunk, execute
        self.views, self.history = (views if encoder is not None else 0), history
        self.kinds: dict[str, Kind] = {"actions": actions, "states": states}
        self.keep_actions = tuple(keep_actions)
        self.encoder: Any = TappedEncoder(encoder) if isinstance(encoder, str) else encoder
        self.instruction: Any = InstructionEncoder(instruction) if isinstance(instruction, str) else instruction
        eyes: Any = self.encoder
        maps = tuple(eyes.shapes(*self.image_size)) if eyes is not None else ()
        text = self.instruction.dim if self.instruction is not None else 0
        self.trunk = trunk.build(Sizes(maps, max(1, self.views), state_dim, text, history), readouts=readouts)
        self.head = head.build(in_dim=trunk.dim, action_dim=action_dim, chunk=chunk, readouts=readouts)
        self.reads = tuple(
            key for key, used in (
                ("images", maps), ("state", state_dim), ("instruction", text or trunk.reads_text),
            ) if used
        )  # fmt: skip
        self.skill: Skill | None = None  # what `fit` measured, until an adapter carries it
        self._skills: dict[str, tuple[int, Skill]] = {}
        self._past = History(history)
        self._generator: torch.Generator | None = None

    # ---- what belongs to the adapter -------------------------------------------------------------------------------

    def fit(
        self, actions: Any, states: Any = None, *, chunks: Any = None, environment: Mapping[str, Any] | None = None,
        pad: bool = False,
    ) -> Skill:  # fmt: skip
        """Measure the demonstrations: normalisation, and what the head learns without gradients.

        Args:
            actions, states: every step, [N, A] and [N, S] in the environment's units (discrete actions: ignored).
            chunks: [M, chunk, A], for heads that learn a vocabulary or codebook from them; default: cut from `actions`.
            environment: `describe()` of where they were recorded.
            pad: allow a robot with fewer dimensions than the policy has.

        Raises:
            ConfigError: another number of dimensions. BadSample: a value that is not finite.
        """
        act = None if self.head.discrete else self._normaliser("actions", actions, self.action_dim, pad)
        if self.state_dim and states is None:
            raise ConfigError(f"the policy reads a state of {self.state_dim} numbers, but fit was given no states")
        state = self._normaliser("states", states, self.state_dim, pad) if self.state_dim else None
        if act is not None:
            steps = torch.as_tensor(np.asarray(actions)).float()
            whole = steps[: len(steps) // self.chunk * self.chunk].view(-1, self.chunk, act.dim)
            self.head.fit(act.encode(whole if chunks is None else torch.as_tensor(chunks)))
        where = dict(environment) if environment else None
        self.skill = Skill(act, state, self.head.facts(), self.sizes(), where)
        return self.skill

    def _normaliser(self, which: str, values: Any, width: int, pad: bool) -> Normaliser:
        statistics = Statistics.of(values)
        if statistics.dim > width or (statistics.dim < width and not pad):
            hint = "; pad=True serves a robot with fewer" if statistics.dim < width else ""
            given = f"the demonstrations {statistics.dim}{hint}"
            raise ConfigError(f"the policy has {width} dimensions of {which}, {given}")
        keep = self.keep_actions if which == "actions" else ()
        return Normaliser(statistics, self.kinds[which], keep=keep, width=width)

    def sizes(self) -> dict[str, Any]:
        """What an adapter must have been made for."""
        return {
            "action_dim": self.action_dim, "state_dim": self.state_dim, "chunk": self.chunk, "views": self.views,
            "image_size": list(self.image_size) if self.views else None, "history": self.history,
            "discrete": self.head.discrete,
        }  # fmt: skip

    def metadata(self) -> dict[str, Any]:
        """{"policy": ...}: what `mmpeft.save(policy, folder, metadata=policy.metadata())` keeps beside the tensors."""
        return {KEY: {"recipe": self.recipe(), **self.current().to_dict()}}

    def current(self) -> Skill:
        """The skill of the active adapter; what `fit` measured where no adapter is active or its metadata is still
        empty.

        Raises:
            ConfigError: there is neither. BaseMismatch: it is for other sizes. FileFormatError: something is missing.
        """
        skill = self._skill_now()
        if skill is None:
            raise ConfigError("the policy has no normalisation yet: policy.fit(actions, states), or load an adapter")
        return skill

    def _skill_now(self) -> Skill | None:
        """See `current`; also hands the head what it works with."""
        state = find_state(self)
        name = state.active.names[-1] if state is not None and state.active.names else None
        given = state.entries[name].metadata if state is not None and name is not None else {}
        if name is None or (not given and self.skill is not None):
            skill = self.skill
        elif KEY not in given:
            raise FileFormatError(
                f"adapter {name!r} carries no {KEY!r} metadata (normalisation, sizes): save it with "
                f"save_policy(policy, folder), or mmpeft.save(..., metadata=policy.metadata())"
            )
        else:
            known = self._skills.get(name)
            if known is None or known[0] != id(given[KEY]):
                known = (id(given[KEY]), Skill.from_dict(given[KEY], self.sizes(), name))
                self._skills[name] = known
            skill = known[1]
        if skill is not None and skill.head and self.head.facts_differ(skill.head):
            self.head.set_facts(skill.head)
        return skill

    @property
    def environment(self) -> dict[str, Any] | None:
        """Where the active adapter was trained."""
        return self.current().environment

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """The head's loss, the mean over valid steps.

        Args:
            batch: `images` uint8 [B, T, V, H, W, 3] or `prefix` [B, T, V, C, h, w] out of a cache; `state` [B, T, S]
                with `state_mask` [B, T]; `seen` [B, T], False before the episode; `instruction`, B sentences, or `text` [B, dim],
                what their encoder gives; `action` [B, chunk, A] in the environment's units with `action_mask` [B, chunk].
                `normalised: True` says that states and actions are already normalised and padded, and then the mask may
                be one a number [B, chunk, A].
        """
        self._skill_now()  # a head with a vocabulary takes up the active adapter's
        features = self.features(batch)
        actions, mask = batch["action"], batch.get("action_mask")
        if not self.head.discrete and not batch.get("normalised"):
            norm = self.current().actions
            assert norm is not None
            mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device) if mask is None else mask
            mask = mask.unsqueeze(-1) & norm.valid.to(mask.device)
            actions = norm.encode(actions)
        return self.head.loss(features, actions, mask)

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """What the trunk gives the head, [B, N, D]."""
        maps = self.maps(batch) if self.encoder is not None else []
        state = batch["state"] if self.state_dim else None
        if state is not None and not batch.get("normalised"):
            norm = self.current().states
            assert norm is not None
            state = norm.encode(state)
        sentences = batch.get("instruction")
        text = batch.get("text")
        if text is None and self.instruction is not None:
            text = self.instruction(sentences)
        if text is not None and self.word_noise and learning(self):
            text = noisy_words(text, self.word_noise)
        features: Tensor = self.trunk(
            Observed(maps, state, text, batch.get("state_mask"), batch.get("seen"), sentences)
        )
        return features

    def maps(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Each tap's maps [B, T, V, C, h, w], from pictures or from a cached prefix."""
        given = batch["prefix"] if "prefix" in batch else batch["images"]
        lead = tuple(given.shape[:3])
        if lead[1:] != (self.history, self.views):
            raise BadSample(f"expected {self.history} frames of {self.views} views, given {list(given.shape)}")
        flat = given.flatten(0, 2)
        if "prefix" in batch:
            self.encoder.check_prefix()
            found = self.encoder.suffix(flat)
        else:
            if tuple(given.shape[3:5]) != self.image_size:
                raise BadSample(f"expected pictures of {self.image_size} pixels, given {tuple(given.shape[3:5])}")
            found = self.encoder(self.encoder.pixels(flat))
        return [m.unflatten(0, lead) for m in found]

    def predict(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> Tensor:
        """Actions [B, chunk, A] in the environment's units (discrete: indices [B, chunk])."""
        actions = self.head.predict(self.features(batch), generator=generator)
        norm = self.current().actions
        return actions if norm is None else norm.decode(actions)

    def example_inputs(self) -> tuple[dict[str, Any]]:
        """A small batch with everything the policy reads; `mmpeft.attach` proves with it that each site is alive."""
        g = torch.Generator().manual_seed(0)
        device = next(self.parameters()).device
        batch: dict[str, Any] = {"normalised": True, "instruction": ["push the puck", "open the drawer"]}
        if self.encoder is not None:
            shape = (2, self.history, self.views, *self.image_size, 3)
            batch["images"] = torch.randint(256, shape, generator=g).to(torch.uint8).to(device)
        if self.state_dim:
            batch["state"] = torch.randn(2, self.history, self.state_dim, generator=g).to(device)
        if self.head.discrete:
            batch["action"] = torch.randint(self.action_dim, (2, self.chunk), generator=g).to(device)
        else:
            batch["action"] = torch.rand(2, self.chunk, self.action_dim, generator=g).to(device) * 0.6 - 0.3
        return (batch,)

    # ---- acting ----------------------------------------------------------------------------------------------------

    def reset(self, num_envs: int | None = None, *, seed: int = 0) -> None:
        """Forget the past; called before the first `act` of a rollout. `seed` is of the heads that draw."""
        self._past = History(self.history)
        self._generator = torch.Generator(next(self.parameters()).device).manual_seed(seed)

    def observe(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """An environment's observation, batched over B, as a batch for `features`; remembers it where history is used.

        Raises:
            BadSample: a key that is missing, a shape that does not fit, a state that is not finite.
        """
        missing = [k for k in self.reads if k not in observation]
        if missing:
            raise BadSample(f"the policy reads {', '.join(self.reads)}; the observation lacks {', '.join(missing)}")
        now: dict[str, Any] = {}
        if "images" in self.reads:
            now["images"] = batched_images(observation["images"], self.views)
        if "state" in self.reads:
            state = np.asarray(observation["state"], dtype=np.float32)
            size = self.current().states.dim  # type: ignore[union-attr]
            if state.ndim != 2 or state.shape[1] != size:
                raise BadSample(f"the adapter was trained on a state of {size} numbers, given {list(state.shape)}")
            now["state"] = state
            if "state_mask" in observation:
                now["state_mask"] = np.asarray(observation["state_mask"], dtype=bool)
            elif not np.isfinite(state).all():
                raise BadSample("the state holds NaN or infinite values; state_mask says which rows are missing")
        device = next(self.parameters()).device
        arrays = self._past.push(now, observation.get("first"))
        batch: dict[str, Any] = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
        if "instruction" in self.reads:
            batch["instruction"] = [str(s) for s in observation["instruction"]]
        return batch

    @torch.no_grad()
    def act(self, observation: Mapping[str, Any], *, adapters: Sequence[str] | None = None) -> Any:
        """The chunk to carry out, float32 [B, chunk, A] in the environment's units (discrete: int64 [B, chunk]).

        Args:
            observation: `images` uint8 [B, V, H, W, 3] (or [B, H, W, 3], or a dict of views), `state` [B, S],
                `instruction` [B]; `first` [B] marks rows whose episode has just begun.
            adapters: one adapter a row; None: the active one. The frozen prefix runs once for all rows.

        Raises:
            BadSample: an observation that does not fit. ConfigError: a prediction that is not finite.
        """
        with evaluating(self):
            if adapters is None:
                actions = self.predict(self.observe(observation), generator=self._generator)
            else:
                from mmpeft.policies.by_row import predict_by_row

                actions = predict_by_row(self, observation, adapters, self._generator)
        found = actions.cpu().numpy()
        if not np.isfinite(found).all():
            rows = sorted(set(np.argwhere(~np.isfinite(found))[:, 0].tolist()))
            raise ConfigError(f"the policy predicted NaN or infinite actions in rows {rows}; no action was given out")
        return found


def note_skill(policy: Policy, name: str) -> None:
    """Put what `fit` measured into adapter `name`, so that any way of saving it keeps it."""
    state = find_state(policy)
    if state is None or policy.skill is None:
        raise ConfigError("nothing to note: fit the policy and attach an adapter first")
    state.check_names([name])
    state.entries[name].metadata[KEY] = {"recipe": policy.recipe(), **policy.skill.to_dict()}


def save_policy(
    policy: Policy, folder: str | Path, name: str | None = None, *, metadata: Mapping[str, Any] | None = None
) -> Path:
    """`mmpeft.save` with all the policy needs to act: statistics, vocabulary, sizes, environment, how it is built."""
    state = find_state(policy)
    entry = state.entries.get(name) if state is not None and name is not None else None
    if entry is not None and KEY in entry.metadata:  # it may be another than the active one
        return save(policy, folder, name, metadata=metadata)
    return save(policy, folder, name, metadata={**policy.metadata(), **(metadata or {})})


def load_policy(folder: str | Path, policy: Policy | None = None, *, name: str | None = None) -> Policy:
    """A policy ready to act, from an adapter's folder alone, or the adapter on a `policy` that is there already.

    Raises:
        FileFormatError: the folder does not say how its policy is built, or lacks statistics.
        BaseMismatch: the adapter is for other sizes or another base; NameNotFound: no adapter there.
    """
    about = read_metadata(folder)
    if KEY not in about:
        raise FileFormatError(f"{str(folder)!r} is no policy's adapter: its metadata has no {KEY!r}")
    if policy is None:
        if about[KEY].get("recipe") is None:
            raise FileFormatError(
                f"{str(folder)!r} does not say how its policy is built (a part was given as an object): build the "
                f"policy and call load_policy(folder, policy)"
            )
        made: nn.Module = make(about[KEY]["recipe"])
        if not isinstance(made, Policy):
            raise BaseMismatch(f"{str(folder)!r} was saved from a {type(made).__name__}, not from a Policy")
        policy = made
    Skill.from_dict(about[KEY], policy.sizes(), name or str(folder))
    load(policy, folder, name)
    return policy.eval()
