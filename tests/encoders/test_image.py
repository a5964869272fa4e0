"""Image encoders: token counts for every shape, layers, pooling, prefix tokens, preprocessing, the three freezing switches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.encoders import Encoder, load_encoder
from mmpeft.errors import BadSample, ConfigError

# name, odd or rectangular sizes it takes beside its own
SIZES = [(33, 47), (64, 40)]
RANDOM = [
    "random:timm:tf_efficientnet_lite0",
    "random:timm:resnet18",
    "random:timm:convnext_atto",
    "random:timm:mobilevit_xxs",
]


@pytest.fixture(scope="module")
def folders(hf_vision: dict[str, str], timm_folder: str, open_clip_folders: dict[str, str]) -> dict[str, str]:
    return {**hf_vision, "timm": timm_folder, **open_clip_folders}


NAMES = ["clip", "siglip", "dinov2", "vit", "resnet", "timm", "open_clip", "open_clip-resnet", "open_clip-timm"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"drop_class_token": False}, {"layer": -2}, {"pool": (2, 1)}], ids=str)
def test_num_tokens_is_what_forward_gives(
    name: str, options: dict, folders: dict[str, str], picture: Image.Image
) -> None:
    encoder = load_encoder(folders[name], image_size=64, **options)
    pixels = torch.stack([encoder.preprocess(picture)] * 3)
    assert pixels.shape == (3, 3, 64, 64)
    tokens, mask = encoder(pixels)
    assert mask is None
    assert tokens.shape == (3, encoder.num_tokens(pixels.shape[1:]), encoder.dim)
    assert encoder.num_tokens((64, 64)) == tokens.shape[1]
    assert tokens.isfinite().all()


@pytest.mark.parametrize("name", [*RANDOM, "vit", "resnet", "dinov2", "open_clip-resnet", "open_clip-timm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_num_tokens_of_odd_sizes(name: str, size: tuple[int, int], folders: dict[str, str]) -> None:
    encoder = load_encoder(folders.get(name, name), image_size=32)
    tokens, _ = encoder(torch.randn(2, 3, *size))
    assert tokens.shape[:2] == (2, encoder.num_tokens((3, *size)))


def test_a_size_that_the_backbone_refuses_is_named(timm_folder: str) -> None:
    encoder = load_encoder(timm_folder)
    with pytest.raises(ConfigError, match="33 x 47"):
        encoder.num_tokens((3, 33, 47))


def test_image_size_resamples_timm_positions(timm_folder: str) -> None:
    assert load_encoder(timm_folder).num_tokens((32, 32)) == 16
    assert load_encoder(timm_folder, image_size=48).num_tokens((48, 48)) == 36


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "hiera_tiny_224", "xcit_nano_12_p16_224"]
)
def test_num_tokens_of_other_families(name: str) -> None:
    """Shifted windows (channels last), rotary positions, hierarchical, cross-covariance: one rule, the network's own."""
    encoder = load_encoder(f"random:timm:{name}")
    assert encoder(torch.randn(2, 3, 224, 224))[0].shape == (2, encoder.num_tokens((3, 224, 224)), encoder.dim)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_of_timm_equal_forward_features(timm_folder: str) -> None:
    import timm

    model = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_encoder(timm_folder, drop_class_token=False)(x)[0], model.forward_features(x))
    torch.testing.assert_close(load_encoder(timm_folder)(x)[0], model.forward_features(x)[:, 1:])
    hidden = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks[:2]:
        hidden = block(hidden)
    for layer in (-2, 1):
        torch.testing.assert_close(load_encoder(timm_folder, layer=layer)(x)[0], hidden[:, 1:])


def test_what_no_token_depends_on_is_removed(folders: dict[str, str]) -> None:
    """Every parameter left has a gradient, so an adapter plan finds live sites only."""
    for name in ("timm", "open_clip", "open_clip-resnet", "open_clip-timm", "dinov2", "vit", "clip", "siglip"):
        for layer in (-1, -3):
            encoder = load_encoder(folders[name], layer=layer, drop_class_token=False).requires_grad_(True)
            encoder(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
            dead = [n for n, p in encoder.named_parameters() if p.grad is None]
            norms = [
                n for n in dead if "norm" in n or "mask_token" in n
            ]  # the final norm of transformers stays in place
            assert dead == norms and len(norms) <= 3, (name, layer, dead)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "vit"])
def test_layers_of_transformers_are_its_hidden_states(name: str, hf_vision: dict[str, str]) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(hf_vision[name]).eval()
    model = getattr(model, "vision_model", model)
    x = torch.randn(2, 3, 32, 32)
    out = model(x, output_hidden_states=True)
    prefix = 0 if name == "siglip" else 1
    torch.testing.assert_close(load_encoder(hf_vision[name])(x)[0], out.last_hidden_state[:, prefix:])
    torch.testing.assert_close(load_encoder(hf_vision[name], layer=-2)(x)[0], out.hidden_states[-2][:, prefix:])
    torch.testing.assert_close(load_encoder(hf_vision[name], layer=0)(x)[0], out.hidden_states[1][:, prefix:])
    kept = load_encoder(hf_vision[name], drop_class_token=False)(x)[0]
    torch.testing.assert_close(kept, out.last_hidden_state)


def test_layers_of_open_clip(open_clip_folder: str) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{open_clip_folder}").eval().visual
    x = torch.randn(2, 3, 32, 32)
    hidden = model._embeds(x)
    for block in model.transformer.resblocks:
        previous, hidden = hidden, block(hidden)
    torch.testing.assert_close(load_encoder(open_clip_folder)(x)[0], model.ln_post(hidden)[:, 1:])
    torch.testing.assert_close(load_encoder(open_clip_folder, layer=-2)(x)[0], previous[:, 1:])


def test_pooling_averages_the_map(timm_folder: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    full = load_encoder(timm_folder)(x)[0].reshape(2, 4, 4, 32)
    pooled = load_encoder(timm_folder, pool=(2, 4))(x)[0].reshape(2, 2, 4, 32)
    torch.testing.assert_close(pooled, full.reshape(2, 2, 2, 4, 32).mean(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 3}, "layer is in -3..2"),
        ({"layer": -4}, "layer is in -3..2"),
        ({"pool": (5, 5)}, "does not fit the 4 x 4 map"),
        ({"pool": (0, 2)}, "does not fit"),
        ({"pool": (2, 2, 2)}, "rows, columns"),
        ({"image_size": 0}, "image_size"),
        ({"resize": "stretch"}, "squash"),
        ({"full_window": True}, "full_window do not apply"),
        ({"modality": "audio"}, "no encoder of audios"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str, timm_folder: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_encoder(timm_folder, **options)


def test_wrong_input_shape_is_refused(timm_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"\[B, 3, H, W\]"):
        load_encoder(timm_folder)(torch.randn(3, 32, 32))


# --- frozen is three switches -----------------------------------------------------------------------------------------


def test_frozen(folders: dict[str, str]) -> None:
    for name in NAMES:
        encoder = load_encoder(folders[name])
        assert not any(p.requires_grad for p in encoder.parameters())
        torch.nn.Sequential(encoder).train()
        assert encoder.training and not any(m.training for m in encoder.backbone.modules())
        x = torch.randn(2, 3, 32, 32)
        tokens = encoder(x)[0]
        assert tokens.grad_fn is None  # no graph
        x.requires_grad_(True)
        encoder(x)[0].square().sum().backward()  # something upstream is trained: the gradient passes
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert all(p.grad is None for p in encoder.parameters())


def test_batchnorm_statistics_do_not_move() -> None:
    encoder = load_encoder("random:timm:resnet18", image_size=32).train()
    before = encoder.backbone.bn1.running_mean.clone()
    encoder(torch.randn(4, 3, 32, 32) + 3)
    assert torch.equal(before, encoder.backbone.bn1.running_mean)


def test_a_prompt_inside_the_backbone_learns(timm_folder: str) -> None:
    encoder = load_encoder(timm_folder).train()
    prompt = torch.zeros(1, 1, 32, requires_grad=True)
    encoder.backbone.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + prompt,))
    encoder(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    assert prompt.grad.abs().sum() > 0


def test_pickle_and_deepcopy(timm_folder: str) -> None:
    encoder = load_encoder(timm_folder)
    x = torch.randn(2, 3, 32, 32)
    twin: Encoder = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(twin(x)[0], encoder(x)[0]) and twin.num_tokens((32, 32)) == 16
    assert twin.fingerprint() == encoder.fingerprint()


def test_dtype(timm_folder: str, hf_vision: dict[str, str]) -> None:
    for name in (timm_folder, hf_vision["vit"]):
        assert load_encoder(name, dtype=torch.bfloat16)(torch.randn(2, 3, 32, 32))[0].dtype == torch.bfloat16


def test_fingerprint_tells_weights_and_options_apart(timm_folder: str, hf_vision: dict[str, str]) -> None:
    base = load_encoder(timm_folder)
    assert base.fingerprint() == load_encoder(timm_folder).fingerprint()
    others = [
        load_encoder(timm_folder, layer=-2), load_encoder(timm_folder, pool=(2, 2)), load_encoder(hf_vision["vit"]),
        load_encoder(timm_folder, resize="squash"), load_encoder(timm_folder, image_size=48),
        load_encoder(timm_folder, dtype=torch.bfloat16), load_encoder(timm_folder, drop_class_token=False),
    ]  # fmt: skip
    assert len({e.fingerprint() for e in [base, *others]}) == len(others) + 1
    changed = load_encoder(timm_folder)
    with torch.no_grad():
        changed.backbone.blocks[0].attn.qkv.weight.mul_(1.001)
    assert changed.fingerprint() != base.fingerprint()


# --- preprocessing ----------------------------------------------------------------------------------------------------


def test_preprocessing_is_the_library_s_own(folders: dict[str, str], picture: Image.Image) -> None:
    import open_clip
    import timm
    from transformers import AutoImageProcessor

    model = timm.create_model(f"local-dir:{folders['timm']}")
    config = timm.data.resolve_data_config(model=model)
    ours = load_encoder(folders["timm"]).preprocess(picture)
    torch.testing.assert_close(ours, timm.data.create_transform(**config)(picture))

    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folders['open_clip']}")
    torch.testing.assert_close(load_encoder(folders["open_clip"]).preprocess(picture), transform(picture))

    for name in ("clip", "siglip", "dinov2", "vit"):
        processor = AutoImageProcessor.from_pretrained(folders[name])
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(load_encoder(folders[name]).preprocess(picture), theirs)


@pytest.mark.parametrize("name", ["clip", "dinov2", "timm", "open_clip"])
def test_library_crop_loses_borders_and_squash_and_pad_do_not(name: str, folders: dict[str, str]) -> None:
    left = np.zeros((40, 80, 3), dtype=np.uint8)
    left[:, :8] = 255  # a bright bar that a centre crop of a wide picture cuts off
    crop, squash, pad = (load_encoder(folders[name], resize=r).preprocess(left) for r in ("library", "squash", "pad"))
    assert crop.std(dim=(1, 2)).max() < 1e-3
    assert squash[:, :, 0].min() > squash[:, :, 16].max() + 1
    assert (pad[:, 16, 0] > pad[:, 16, 16] + 1).all() and pad[:, 0].abs().max() < 0.2  # a bar of the mean colour on top


@pytest.mark.parametrize("name", NAMES)
def test_preprocess_travels_to_workers(name: str, folders: dict[str, str], picture: Image.Image) -> None:
    preprocess = load_encoder(folders[name]).preprocess
    data = pickle.dumps(preprocess)
    assert len(data) < 200_000  # the recipe, not the model
    assert torch.equal(pickle.loads(data)(picture), preprocess(picture))


def test_every_kind_of_raw_picture(timm_folder: str, picture: Image.Image, tmp_path) -> None:
    preprocess = load_encoder(timm_folder).preprocess
    want = preprocess(picture)
    array = np.asarray(picture)
    picture.save(tmp_path / "p.png")
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    raws = [str(tmp_path / "p.png"), tmp_path / "p.png", array, array.astype(np.float32) / 255, tensor, tensor / 255]
    assert all(torch.equal(preprocess(raw), want) for raw in raws)
    grey = array[:, :, 0]
    same = [preprocess(r) for r in (grey, grey[:, :, None], Image.fromarray(grey), tensor[:1])]
    assert all(torch.equal(r, same[0]) for r in same)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(preprocess(deep), same[0])  # 16 bits are scaled, not clipped


def test_exif_orientation(timm_folder: str, picture: Image.Image, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "turned.png", exif=exif)
    preprocess = load_encoder(timm_folder).preprocess
    assert torch.equal(preprocess(tmp_path / "turned.png"), preprocess(picture.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("no/such.png", "not found"),
        (np.full((4, 4), 16.0), r"0\.\.1"),
        (np.full((4, 4), np.nan), r"0\.\.1"),
        (np.full((4, 4), 300), r"0\.\.255"),
        (np.zeros((4, 4, 2)), r"\[H, W\]"),
        (torch.zeros(2, 4, 4), r"\[3, H, W\]"),
        (7, "int"),
    ],
)
def test_what_is_no_picture_is_refused(raw, words: str, timm_folder: str) -> None:
    with pytest.raises(BadSample, match=words):
        load_encoder(timm_folder).preprocess(raw)


def test_files_that_are_no_picture(timm_folder: str, picture: Image.Image, tmp_path) -> None:
    preprocess = load_encoder(timm_folder).preprocess
    (tmp_path / "text.png").write_text("no picture")
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    for name in ("text.png", "cut.jpg"):
        with pytest.raises(BadSample, match=name):
            preprocess(tmp_path / name)
