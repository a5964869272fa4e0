"""Vision towers of every library, tiny and random, and what their tests share."""

import io

import pytest
import torch

import mmpeft

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 20, "patch_size": 4}


def siglip(act="gelu_pytorch_tanh"):
    config = transformers.SiglipVisionConfig(**SIZES, intermediate_size=40, hidden_act=act, vision_use_head=False)
    return transformers.SiglipVisionModel(config)


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, intermediate_size=40, hidden_act="quick_gelu"))


def vit():
    config = transformers.ViTConfig(**SIZES, intermediate_size=40, hidden_act="gelu")
    return transformers.ViTModel(config, add_pooling_layer=False)


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.5))


def timm_scaled():
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=20, patch_size=4, depth=3, embed_dim=24, num_heads=3, num_classes=0,
        global_pool="", init_values=0.3,
    )  # fmt: skip


def open_clip():
    made = pytest.importorskip("open_clip.transformer")
    return made.VisionTransformer(
        image_size=20, patch_size=4, width=24, layers=3, heads=3, mlp_ratio=2.0, ls_init_value=0.5, output_dim=8
    )


# builder -> pattern of every weight in the blocks, number of blocks
MODELS = {
    siglip: "encoder.layers.*.{self_attn,mlp}.{q_proj,k_proj,v_proj,out_proj,fc1,fc2}",
    clip: "**.layers.*.{self_attn,mlp}.{q_proj,v_proj,fc1}",
    vit: "layers.*.{attention,mlp}.{q_proj,k_proj,v_proj,o_proj,fc1,fc2}",
    dinov2: "encoder.layer.*.{attention,mlp}.**.{q_proj,v_proj,o_proj,query,value,dense,fc1,fc2}",  # the latter: transformers 5.17
    timm_scaled: "blocks.*.{attn,mlp}.{qkv,proj,fc1,fc2}",
    open_clip: "transformer.resblocks.*.mlp.{c_fc,c_proj}",
}


def made(builder, device="cpu"):
    torch.manual_seed(0)
    model = builder().eval().requires_grad_(False)
    for p in model.parameters():
        p.data = 0.25 * torch.randn_like(p) + (0.7 if p.ndim == 1 else 0.0)
    return model.to(device), torch.randn(3, 3, 20, 20).to(device)


def adapted(builder, device="cpu", names=("a",), plan=None, **options):
    model, x = made(builder, device)
    for name in names:
        patterns = [MODELS[builder], *(["transformer.resblocks.*.attn[q,v]"] if builder is open_clip else [])]
        chosen = plan or {pattern: mmpeft.LoRA(rank=2, alpha=4, **options) for pattern in patterns}
        mmpeft.attach(model, chosen, name=name, check=False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator).to(p)
    mmpeft.use(model, names[0])
    return model, x


def tokens(model, x, **options):
    y = model(x, **options)
    return getattr(y, "last_hidden_state", y)


def quiet(model, **options):
    """Without CUDA graphs: a capture makes calls of its own, and the tests count them."""
    return mmpeft.compile(model, out=io.StringIO(), graphs=False, **options)


def run(model, x):
    """(output, gradients of pixels and of what trains)."""
    x = x.detach().requires_grad_()
    y = tokens(model, x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    return y.detach(), [g for g in grads if g is not None]


def same(one, other, rtol=1e-4):
    assert (one[0] - other[0]).norm() <= rtol * other[0].norm()
    assert len(one[1]) == len(other[1]) > 0
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= 5 * rtol * b.norm() + 1e-6
