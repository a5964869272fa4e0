"""The adapter engine: sites, plans, attaching, switching, merging, files; and the methods, one file a family."""

from mmpeft.adapters.activation import RED, SSF, HeadScaling, LoFiT, Propulsion, lofit_plan
from mmpeft.adapters.attach import attach, bare, detach
from mmpeft.adapters.autolora import AutoLoRASearch
from mmpeft.adapters.blocks import GraLoRA, MiSS
from mmpeft.adapters.bottleneck import AdaptFormer, Bottleneck
from mmpeft.adapters.circulant import C3A, SURM, FourierFT
from mmpeft.adapters.compact import compact, drop_sites, prune_channels
from mmpeft.adapters.conv_adapter import ConvAdapter
from mmpeft.adapters.diff_pruning import DiffGates, DiffPruning
from mmpeft.adapters.dynamic_rank import AdaLoRA, AutoLoRA, CapaBoost, DyLoRA, IncreLoRA, SoRA
from mmpeft.adapters.fact import FacTTK, FacTTT
from mmpeft.adapters.hadamard import HiRA, LoHa
from mmpeft.adapters.inspect import Inspection, inspect
from mmpeft.adapters.integer import FP8, Int
from mmpeft.adapters.kronecker import KAdaptation, KronA, LoKr
from mmpeft.adapters.laplace import Laplace
from mmpeft.adapters.lora import DoRA, LoRA, VeRA
from mmpeft.adapters.lora_kin import (
    DeLoRA,
    DeltaLoRA,
    KernelMix,
    LoRAFA,
    LoRAXS,
    MoSLoRA,
    RandLoRA,
    RoseLoRA,
    begin_delta_lora,
)
from mmpeft.adapters.lora_noise import LoRADropout, Masks, PeriodicLoRA, mask_ensemble, orthogonal_penalty, unload
from mmpeft.adapters.lora_prune import LoRAPrune, LoRAPruner, drop_below, layer_of
from mmpeft.adapters.method import Delta, Factors, Method
from mmpeft.adapters.nf4 import NF4
from mmpeft.adapters.orthogonal import BOFT, HRA, OFT
from mmpeft.adapters.packed_weight import PackedWeight
from mmpeft.adapters.phm import Compacter, PHMAdapter
from mmpeft.adapters.placement import place, spt_plan
from mmpeft.adapters.plan import Plan, Rule
from mmpeft.adapters.quantise import (
    dequantise,
    load_bitsandbytes,
    load_packed,
    loftq,
    packed_bytes,
    plan_bits,
    quantise,
    save_packed,
)
from mmpeft.adapters.quantised import LRQAT, PEQA, QALoRA, merge_qalora
from mmpeft.adapters.rank import Constant, Cubic, RankController
from mmpeft.adapters.rank_policies import Budget, Growth, Proximal, Sampled, set_rank
from mmpeft.adapters.scaling import IA3
from mmpeft.adapters.selective import BitFit, Full, LayerNormTuning, RoCoFT
from mmpeft.adapters.sparse import (
    FAR,
    LTSFT,
    NEFT,
    ChildTuningD,
    FishMask,
    PaFi,
    SHiRA,
    Sparse,
    SparseRows,
    UBitFit,
    attach_selected,
)
from mmpeft.adapters.sparsify import ChildMask, RosePruner, TopGradient, WorstSamples
from mmpeft.adapters.spiel import SpIEL, spiel_step
from mmpeft.adapters.stack import stack, unstack
from mmpeft.adapters.steering import ITI, RepE, fit_iti, fit_repe, set_strength
from mmpeft.adapters.store import load, read_metadata, save
from mmpeft.adapters.subspace import DID, SAID
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
from mmpeft.adapters.xpeft import XPEFT
