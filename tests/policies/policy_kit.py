"""Tiny policies and demonstrations that the tests of this folder and of tests/tasks/test_control.py share."""

import numpy as np
import torch
from torch import nn

from mmpeft.policies.heads import RegressionHead
from mmpeft.policies.parts import Part
from mmpeft.policies.policy import Policy
from mmpeft.policies.prefix import TappedEncoder
from mmpeft.policies.scratch import ScratchEncoder
from mmpeft.policies.trunks import MLPTrunk

SIDE = 32


class Words(Part):
    """A stand-in for a text encoder: a sentence's letters, counted."""

    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, self.dim)

    def forward(self, sentences):
        device = self.table.weight.device
        return torch.stack([self.table(torch.tensor(list(s.encode()), device=device)).mean(0) for s in sentences])


def eyes(**options):
    torch.manual_seed(0)
    return TappedEncoder("random:timm:tf_efficientnet_lite0", **{"taps": (1, 2), "split": 1, **options})


def make_policy(**options):
    """A policy that sees 32 pixels, has 4 numbers of state, and gives chunks of 5 three-dimensional actions."""
    torch.manual_seed(0)
    given = {
        "trunk": MLPTrunk(width=16, channels=3, side=8), "head": RegressionHead(), "action_dim": 3, "state_dim": 4,
        "chunk": 5, "execute": 2, "image_size": SIDE,
    } | options  # fmt: skip
    if "encoder" not in given:
        given["encoder"] = ScratchEncoder(channels=(4, 8, 8))
    return Policy(**given)


def observation(rows=3, views=1, seed=0, side=SIDE):
    g = np.random.default_rng(seed)
    return {
        "images": g.integers(0, 256, (rows, views, side, side, 3)).astype(np.uint8),
        "state": g.normal(size=(rows, 4)).astype(np.float32),
        "instruction": np.array(["push it", "pull it", "push it"][:rows]),
        "first": np.ones(rows, dtype=bool),
        "task": np.array(["a"] * rows),
    }


class Episode:
    def __init__(self, seed, steps, dims=3, discrete=False):
        g = np.random.default_rng(seed)
        self.seed = seed
        turn = g.uniform(0, 6) + 0.4 * np.arange(steps)  # what comes next follows from what is
        place = np.tile(g.normal(size=2), (steps, 1))
        self.state = np.concatenate([np.stack([np.sin(turn), np.cos(turn)], 1), place], 1).astype(np.float32)
        self.pictures = g.integers(0, 256, (steps, 1, SIDE, SIDE, 3)).astype(np.uint8)
        mix = np.random.default_rng(99).normal(size=(4, dims))
        self.action = (np.tanh(self.state @ mix) * 3 + 5).astype(np.float32)
        if discrete:
            self.action = (self.state[:, :dims].argmax(1)).astype(np.int64)

    def __len__(self):
        return len(self.state)

    def __getitem__(self, name):
        return getattr(self, name)


class Demos(torch.utils.data.Dataset):
    """What `mmpeft.data.demos.Demonstrations` offers; actions, also those to come, are a function of the state."""

    def __init__(self, episodes=4, steps=12, chunk=5, dims=3, discrete=False, first=0):
        self.episodes = [("", Episode(first + i, steps + i, dims, discrete)) for i in range(episodes)]
        self.index = [(n, t) for n, (_, e) in enumerate(self.episodes) for t in range(len(e))]
        self.chunk = chunk

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        number, step = self.index[i]
        episode = self.episodes[number][1]
        actions = episode.action[step : step + self.chunk]
        real = len(actions)
        actions = np.concatenate([actions, np.repeat(actions[-1:], self.chunk - real, axis=0)])
        return {
            "state": torch.from_numpy(episode.state[step]), "images": torch.from_numpy(episode.pictures[step]),
            "instruction": "push it", "action": torch.from_numpy(actions), "action_mask": torch.arange(self.chunk) < real,
            "task": "toy", "seed": episode.seed, "step": step,
        }  # fmt: skip

    def pictures(self, number):
        return self.episodes[number][1].pictures

    def stacked(self, name):
        return torch.from_numpy(np.concatenate([e[name] for _, e in self.episodes]))

    def describe(self):
        return {"name": "toy", "action": [3], "state": [4], "images": [1, SIDE, SIDE, 3], "discrete": False}
