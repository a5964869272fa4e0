"""mmpeft: adapt frozen multimodal models and robot policies by training only small parts.

    model = timm.create_model("vit_small_patch16_224", pretrained=True)
    mmpeft.attach(model, {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=8), "head": "full"}, name="pets")
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-3))
    mmpeft.save(model, "pets/", name="pets")

Importing mmpeft imports torch and nothing heavier.
"""

from mmpeft.adapters import *  # noqa: F403  (mmpeft/adapters/__init__.py is the list)
from mmpeft.lazy import lazy

__version__ = "0.1.0"

# What needs more than torch loads when it is first asked for.
_LAZY = {
    "MultimodalLM": "mmpeft.multimodal",
    "compile": "mmpeft.adapters.compiled",
    "export_peft": "mmpeft.adapters.peft.format",
    "rollout": "mmpeft.policies.rollout_loop",
}
_PARTS = ("connectors", "data", "encoders", "kernels", "metrics", "multimodal", "policies", "report", "tasks")

__getattr__ = lazy(__name__, _LAZY, _PARTS)
