"""The split encoder: both halves equal the whole bit for bit, the cache is fresh or refused, augmentation, refusals."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.encoders import load_encoder
from mmpeft.errors import BadSample, ConfigError, Unsupported
from mmpeft.policies.prefix import TappedEncoder, random_shift
from mmpeft.policies.samples import PolicyProcessor, PolicySamples
from mmpeft.policies.scratch import ScratchEncoder

from .policy_kit import SIDE, Demos, eyes, make_policy

TOWERS = {
    "efficientnet": ({"name": "random:timm:tf_efficientnet_lite0"}, (2, 3), 2),
    "efficientnet, last": ({"name": "random:timm:tf_efficientnet_lite0"}, (-1,), 2),
    "resnet": ({"name": "random:timm:resnet18"}, (1, 3), 0),
    "convnext": ({"name": "random:timm:convnext_atto"}, (-1,), 1),
    "regnet": ({"name": "random:timm:regnetx_002"}, (1, -2), 1),
    "mobilenetv3": ({"name": "random:timm:mobilenetv3_small_050"}, (1, 2), 1),
    "vit": ({"name": "random:timm:vit_tiny_patch16_224", "image_size": 64}, (2, 4), 1),
    "vit, last": ({"name": "random:timm:vit_tiny_patch16_224", "image_size": 64}, (-1,), 3),
}


@pytest.mark.parametrize("name", TOWERS)
def test_two_halves_equal_the_whole(name):
    options, taps, split = TOWERS[name]
    tower = TappedEncoder(options, taps=taps, split=split)
    images = torch.randint(256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = tower.pixels(images)
    whole, halves = tower(x), tower.suffix(tower.prefix(x))
    assert len(whole) == len(taps)
    for a, b, shape in zip(whole, halves, tower.shapes(64, 64), strict=True):
        assert torch.equal(a, b) and tuple(a.shape) == (3, *shape) and a.is_contiguous()


def test_maps_are_the_encoders_own():
    """One tap gives what `load_encoder(layer=...)` gives, and pixels what its own preprocessing gives."""
    torch.manual_seed(0)
    encoder = load_encoder("random:timm:resnet18", layer=2, image_size=64, resize="squash")
    tower = TappedEncoder(encoder, taps=(2,))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    pixels = tower.pixels(image[None])
    torch.testing.assert_close(pixels[0], encoder.preprocess(image), rtol=0, atol=1e-5)
    tokens, _ = encoder(pixels)
    assert torch.equal(tower(pixels)[0].flatten(2).transpose(1, 2), tokens)


def test_an_adapter_behind_the_split_trains_and_before_it_is_refused():
    policy = make_policy(encoder=eyes())
    policy.fit(Demos().stacked("action"), Demos().stacked("state"))
    mmpeft.attach(
        policy, {"encoder.backbone.blocks.2.*": mmpeft.adapters.ConvAdapter(size=2), "trunk": "full", "head": "full"}
    )
    x = torch.randint(256, (2, SIDE, SIDE, 3)).to(torch.uint8)
    start = policy.encoder.prefix(policy.encoder.pixels(x))
    batch = {"state": torch.randn(2, 1, 4), "action": torch.randn(2, 5, 3)}
    cached = policy({**batch, "prefix": start[:, None, None]})
    torch.testing.assert_close(cached, policy({**batch, "images": x[:, None, None]}))
    cached.backward()
    assert all(p.grad is not None for g in mmpeft.parameter_groups(policy, lr=1.0) for p in g["params"])
    mmpeft.attach(policy, {"encoder.backbone.blocks.0.*": mmpeft.adapters.ConvAdapter(size=2)}, "early")
    with pytest.raises(ConfigError, match=r"blocks\.0 lies before the split"):
        policy.encoder.prefix(policy.encoder.pixels(x))
    with pytest.raises(ConfigError, match=r"blocks\.0 lies before the split"):
        policy({**batch, "prefix": start[:, None, None]})


def test_cache(tmp_path):
    policy, demos = make_policy(encoder=eyes(), history=2), Demos(episodes=2)
    samples = PolicySamples(demos, policy, cache=tmp_path, copies=3, shift=2)
    samples.fill()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    item = samples[5]
    assert item["prefix"].shape[:3] == (2, 3, 1) and item["prefix"].dtype == torch.float16
    whole = policy.encoder.prefix(policy.encoder.pixels(demos[5]["images"]))
    torch.testing.assert_close(
        item["prefix"][1, 0].float(), whole, rtol=2e-3, atol=2e-3
    )  # frame now, copy 0: not moved
    back = policy.encoder.prefix(policy.encoder.pixels(demos[3]["images"]))
    torch.testing.assert_close(item["prefix"][0, 0].float(), back, rtol=2e-3, atol=2e-3)  # `execute` steps before
    assert not torch.equal(item["prefix"][1, 1], item["prefix"][1, 0])
    again = PolicySamples(demos, policy, cache=tmp_path, copies=3, shift=2)
    torch.testing.assert_close(again[5]["prefix"], item["prefix"], rtol=0, atol=0)
    assert sorted(tmp_path.iterdir()) == files
    other = make_policy(encoder=eyes(split=0), history=2)
    PolicySamples(demos, other, cache=tmp_path, copies=3, shift=2).fill()
    assert len(list(tmp_path.iterdir())) == 4  # another split finds nothing stale
    files[0].write_bytes(files[0].read_bytes()[:100])  # cut short: made again
    torch.testing.assert_close(
        PolicySamples(demos, policy, cache=tmp_path, copies=3, shift=2)[5]["prefix"], item["prefix"]
    )


def test_history_at_the_start_of_an_episode():
    samples = PolicySamples(Demos(), make_policy(history=3))  # execute=2
    assert samples[1]["seen"].tolist() == [False, False, True]
    assert samples[3]["seen"].tolist() == [False, True, True]
    assert torch.equal(samples[3]["state"][1], Demos()[1]["state"]) and torch.equal(
        samples[3]["state"][0], Demos()[0]["state"]
    )


def test_cache_refusals(tmp_path):
    with pytest.raises(ConfigError, match="needs an encoder that was split"):
        PolicySamples(Demos(), make_policy(), cache=tmp_path)
    with pytest.raises(ConfigError, match="copies"):
        PolicySamples(Demos(), make_policy(), copies=0)


def test_pictures_without_a_cache_move_in_training_only():
    good = PolicySamples(Demos(), make_policy())[2]
    sizes = {"action_dim": 3, "state_dim": 4, "chunk": 5, "discrete": False}
    moving, still = PolicyProcessor(**sizes, shift=4), PolicyProcessor(**sizes)
    torch.manual_seed(0)
    drawn = [moving.encode(good, train=True)["images"] for _ in range(4)]
    assert all(d.shape == good["images"].shape and d.dtype == torch.uint8 for d in drawn)
    assert any(not torch.equal(d, good["images"]) for d in drawn) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(moving.encode(good, train=False)["images"], good["images"])
    assert torch.equal(still.encode(good, train=True)["images"], good["images"])


def test_processor_refuses_by_name():
    processor = PolicyProcessor(action_dim=3, state_dim=4, chunk=5, discrete=False)
    good = PolicySamples(Demos(), make_policy())[2]
    processor.encode(good, train=True)
    nan = good["action"].clone()
    nan[1, 2] = float("nan")
    for change, message in [
        ({"action": good["action"][:, :2]}, r"seed 0 step 2: actions have shape \[5, 2\]"),
        ({"action": nan}, "seed 0 step 2: the demonstrated action holds NaN"),
        ({"state": good["state"][:, :3]}, "seed 0 step 2: expected a finite state of 4"),
        ({"action_mask": torch.zeros(5, dtype=torch.bool)}, "no step"),
    ]:
        with pytest.raises(BadSample, match=message):
            processor.encode({**good, **change}, train=True)
    hidden = {**good, "action": nan, "action_mask": torch.tensor([True, False, True, True, True])}
    processor.encode(hidden, train=True)  # what the mask hides may be anything
    with pytest.raises(BadSample, match=r"whole numbers 0 \.\. 2"):
        PolicyProcessor(action_dim=3, state_dim=0, chunk=5, discrete=True).encode(
            {**good, "action": torch.tensor([0, 1, 2, 3, 0])}, train=True
        )


def test_random_shift_moves_and_repeats_the_border():
    image = torch.arange(2 * 6 * 6 * 3, dtype=torch.uint8).view(2, 6, 6, 3)
    assert torch.equal(random_shift(image, torch.Generator().manual_seed(0), pixels=0), image)
    moved = random_shift(image.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0), pixels=2)
    found = set()
    for m, original in zip(moved, image.repeat(50, 1, 1, 1), strict=True):
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                rows, columns = (torch.arange(6) + dy).clamp(0, 5), (torch.arange(6) + dx).clamp(0, 5)
                if torch.equal(m, original[rows][:, columns]):
                    found.add((dy, dx))
    assert len(found) > 20  # nearly all of the 25 moves are met, and nothing else


def test_refusals():
    with pytest.raises(ConfigError, match="comes after the first tap"):
        eyes(taps=(1, 2), split=2)
    with pytest.raises(ConfigError, match="taps"):
        eyes(taps=(9,))
    with pytest.raises(ConfigError, match="early to late"):
        eyes(taps=(2, 1))
    with pytest.raises(ConfigError, match="empty"):
        eyes(taps=())
    with pytest.raises(Unsupported, match="cannot be split"):
        TappedEncoder("random:timm:ghostnet_050", taps=(-1,), split=0)
    with pytest.raises(ConfigError, match="not split"):
        eyes(split=None).prefix(torch.zeros(1, 3, 32, 32))
    with pytest.raises(BadSample, match="bytes"):
        eyes().pixels(torch.zeros(2, 32, 32, 3))
    with pytest.raises(ConfigError, match="three positive"):
        ScratchEncoder(channels=(4, 8))
