"""Action heads, one interface (`loss`, `predict`) behind any trunk; see `base` for the contract.

RegressionHead   L1 or L2 of the whole chunk in one forward (OpenVLA-OFT); the default
GaussianHead     one Gaussian a number                 MixtureHead    a mixture over whole chunks (robomimic)
BinnedHead       256 bins a number (RT-2, OpenVLA)     FASTHead       cosine transform and byte pairs (pi0-FAST)
ACTHead          conditional VAE (ACT)                 DiffusionHead  DDPM, predicted by DDIM (Diffusion Policy)
FlowHead         flow matching (pi0)                   VQBeTHead      residual codes and offsets (VQ-BeT)
DiscreteHead     one of A actions (BabyAI)
"""

from mmpeft.policies.heads.act import ACTHead
from mmpeft.policies.heads.base import Head
from mmpeft.policies.heads.diffusion import DiffusionHead
from mmpeft.policies.heads.fast import FASTHead
from mmpeft.policies.heads.flow import FlowHead
from mmpeft.policies.heads.gaussian import GaussianHead, MixtureHead
from mmpeft.policies.heads.regression import RegressionHead
from mmpeft.policies.heads.tokens import BinnedHead, DiscreteHead
from mmpeft.policies.heads.vqbet import VQBeTHead

__all__ = [
    "ACTHead",
    "BinnedHead",
    "DiffusionHead",
    "DiscreteHead",
    "FASTHead",
    "FlowHead",
    "GaussianHead",
    "Head",
    "MixtureHead",
    "RegressionHead",
    "VQBeTHead",
]
