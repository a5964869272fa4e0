"""mmpeft: adapt frozen multimodal models and robot policies by training only small parts.

    model = timm.create_model("vit_small_patch16_224", pretrained=True)
    mmpeft.attach(model, {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=8), "head": "full"}, name="pets")
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-3))
    mmpeft.save(model, "pets/", name="pets")

Importing mmpeft imports torch and nothing heavier.
"""

from mmpeft.adapters import (
    IA3,
    AdaptFormer,
    BitFit,
    Bottleneck,
    Delta,
    DoRA,
    Factors,
    Full,
    Inspection,
    LayerNormTuning,
    LoRA,
    Method,
    Plan,
    PromptTuning,
    RoCoFT,
    Rule,
    VPT,
    VeRA,
    active,
    attach,
    bare,
    check_distributed,
    detach,
    inspect,
    load,
    merge,
    parameter_groups,
    read_metadata,
    save,
    trainable,
    trainable_names,
    unmerge,
    use,
)

__version__ = "0.1.0"
