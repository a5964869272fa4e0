"""The adapter engine: sites, plans, attaching, switching, merging, files; and the methods, one file a family."""

from mmpeft.adapters.attach import attach, bare, detach
from mmpeft.adapters.inspect import Inspection, inspect
from mmpeft.adapters.method import Delta, Factors, Method
from mmpeft.adapters.methods.activation import RED, SSF, HeadScaling, LoFiT, Propulsion, lofit_plan
from mmpeft.adapters.methods.attention import DRA, AttnScale, AttnScaleLite
from mmpeft.adapters.methods.blocks import GraLoRA, MiSS
from mmpeft.adapters.methods.bottleneck import AdaptFormer, Bottleneck
from mmpeft.adapters.methods.circulant import C3A, SURM, FourierFT
from mmpeft.adapters.methods.conv_adapter import ConvAdapter
from mmpeft.adapters.methods.density import AdaDEFT, Density, LayerDrop, layer_l1
from mmpeft.adapters.methods.diff_pruning import DiffGates, DiffPruning
from mmpeft.adapters.methods.dynamic_rank import AdaLoRA, AutoLoRA, CapaBoost, DyLoRA, IncreLoRA, SoRA
from mmpeft.adapters.methods.fact import FacTTK, FacTTT
from mmpeft.adapters.methods.flop import FLOP, FLOPGates
from mmpeft.adapters.methods.full_tuning import HiWi, Mixout, draw_mixout, r3f
from mmpeft.adapters.methods.hadamard import HiRA, LoHa
from mmpeft.adapters.methods.krona_adapter import KronAB, KronARes
from mmpeft.adapters.methods.kronecker import KAdaptation, KronA, LoKr
from mmpeft.adapters.methods.lora import DoRA, LoRA, LoRAPlus, VeRA
from mmpeft.adapters.methods.lora_kin import (
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
from mmpeft.adapters.methods.lora_noise import (
    LoRADropout,
    Masks,
    PeriodicLoRA,
    mask_ensemble,
    orthogonal_penalty,
    unload,
)
from mmpeft.adapters.methods.lora_prune import LoRAPrune, LoRAPruner, drop_below, layer_of
from mmpeft.adapters.methods.masks import APT, StructuredMask, mask_l1
from mmpeft.adapters.methods.orthogonal import BOFT, HRA, OFT
from mmpeft.adapters.methods.pedro import PEDRO, prompt_mask
from mmpeft.adapters.methods.phm import Compacter, PHMAdapter
from mmpeft.adapters.methods.prefix import ETT, Prefix, PrefixTuning, fit_ett
from mmpeft.adapters.methods.quantised import LRQAT, PEQA, QALoRA, merge_qalora
from mmpeft.adapters.methods.relora import Jagged, ReLoRA, restart
from mmpeft.adapters.methods.scaling import IA3
from mmpeft.adapters.methods.selective import BitFit, Full, LayerNormTuning, RoCoFT
from mmpeft.adapters.methods.sparse import LTSFT, ChildTuningD, FishMask, PaFi, SHiRA, Sparse, UBitFit, attach_selected
from mmpeft.adapters.methods.sparse_kin import SHPEFT, DnA, SecondOrderMask
from mmpeft.adapters.methods.sparse_rows import FAR, NEFT, SparseRows
from mmpeft.adapters.methods.spiel import SpIEL, SpIELMA, spiel_ma_step, spiel_step
from mmpeft.adapters.methods.steering import ITI, RepE, fit_iti, fit_repe, set_strength
from mmpeft.adapters.methods.subspace import DID, SAID
from mmpeft.adapters.methods.tokens import VPT, PromptTuning
from mmpeft.adapters.methods.xpeft import XPEFT
from mmpeft.adapters.plan import Plan, Rule
from mmpeft.adapters.selection.apt import APTController, apt_distill
from mmpeft.adapters.selection.autolora import AutoLoRASearch
from mmpeft.adapters.selection.compact import compact, drop_sites, plain_prefixes, prune_channels
from mmpeft.adapters.selection.ird import fish_ird
from mmpeft.adapters.selection.laplace import Laplace
from mmpeft.adapters.selection.layers import LayerSampler
from mmpeft.adapters.selection.light_peft import module_ratios, prune_masks, prune_modules
from mmpeft.adapters.selection.lora_shear import LHSPG, kept_groups, shear_plan
from mmpeft.adapters.selection.placement import cross_attention_plan, place, spt_plan
from mmpeft.adapters.selection.prune_adapter import EntryMask, prune_entries, prune_units
from mmpeft.adapters.selection.rank import Constant, Cubic, RankController
from mmpeft.adapters.selection.rank_policies import Budget, Growth, Proximal, Sampled, set_rank
from mmpeft.adapters.selection.sm3 import SM3
from mmpeft.adapters.selection.sparsify import ChildMask, RosePruner, TopGradient, WorstSamples
from mmpeft.adapters.selection.structures import Structure, cut, prune_structures, score_structures, structures
from mmpeft.adapters.selection.transfer import TransLoRA, distil_loss
from mmpeft.adapters.stack import stack, unstack
from mmpeft.adapters.storage.integer import FP8, Int
from mmpeft.adapters.storage.nf4 import NF4
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.adapters.storage.quantise import (
    dequantise,
    load_bitsandbytes,
    load_packed,
    loftq,
    packed_bytes,
    plan_bits,
    quantise,
    save_packed,
)
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
