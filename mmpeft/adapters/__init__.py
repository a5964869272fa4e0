"""The adapter engine: sites, plans, attaching, switching, merging, files; and the methods, one file a family."""

from mmpeft.adapters.attach import attach, bare, detach
from mmpeft.adapters.bottleneck import AdaptFormer, Bottleneck
from mmpeft.adapters.inspect import Inspection, inspect
from mmpeft.adapters.lora import DoRA, LoRA, VeRA
from mmpeft.adapters.method import Delta, Factors, Method
from mmpeft.adapters.plan import Plan, Rule
from mmpeft.adapters.scaling import IA3
from mmpeft.adapters.selective import BitFit, Full, LayerNormTuning, RoCoFT
from mmpeft.adapters.store import load, read_metadata, save
from mmpeft.adapters.switch import (
    active,
    check_distributed,
    merge,
    parameter_groups,
    trainable,
    trainable_names,
    unmerge,
    use,
)
from mmpeft.adapters.tokens import VPT, PromptTuning
