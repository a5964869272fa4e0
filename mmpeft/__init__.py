"""mmpeft: adapt frozen multimodal models and robot policies by training only small parts.

    model = timm.create_model("vit_small_patch16_224", pretrained=True)
    mmpeft.attach(model, {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=8), "head": "full"}, name="pets")
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-3))
    mmpeft.save(model, "pets/", name="pets")

Importing mmpeft imports torch and nothing heavier.
"""

import importlib
from typing import Any

from mmpeft.adapters import (
    BOFT,
    C3A,
    DID,
    FAR,
    HRA,
    IA3,
    ITI,
    LTSFT,
    NEFT,
    OFT,
    RED,
    SAID,
    SSF,
    SURM,
    VPT,
    XPEFT,
    AdaptFormer,
    BitFit,
    Bottleneck,
    ChildMask,
    ChildTuningD,
    Compacter,
    DeLoRA,
    Delta,
    DeltaLoRA,
    DiffGates,
    DiffPruning,
    DoRA,
    Factors,
    FacTTK,
    FacTTT,
    FishMask,
    FourierFT,
    Full,
    GraLoRA,
    HeadScaling,
    HiRA,
    Inspection,
    KAdaptation,
    KernelMix,
    KronA,
    LayerNormTuning,
    LoFiT,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAXS,
    Method,
    MiSS,
    MoSLoRA,
    PaFi,
    PHMAdapter,
    Plan,
    PromptTuning,
    Propulsion,
    RandLoRA,
    RepE,
    RoCoFT,
    RoseLoRA,
    RosePruner,
    Rule,
    SHiRA,
    Sparse,
    SparseRows,
    SpIEL,
    TopGradient,
    UBitFit,
    VeRA,
    WorstSamples,
    active,
    attach,
    attach_selected,
    bare,
    begin_delta_lora,
    check_distributed,
    detach,
    fit_iti,
    fit_repe,
    inspect,
    load,
    lofit_plan,
    merge,
    parameter_groups,
    place,
    read_metadata,
    save,
    set_strength,
    spiel_step,
    spt_plan,
    stack,
    trainable,
    trainable_names,
    unmerge,
    unstack,
    use,
)
from mmpeft.errors import nearest

__version__ = "0.1.0"

# What needs more than torch loads when it is first asked for.
_LAZY = {"MultimodalLM": "mmpeft.multimodal", "export_peft": "mmpeft.adapters.peft_format"}
_PARTS = ("connectors", "data", "encoders", "kernels", "metrics", "multimodal", "tasks")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"mmpeft.{name}")
    raise AttributeError(f"module 'mmpeft' has no attribute {name!r}{nearest(name, [*globals(), *_LAZY, *_PARTS])}")
