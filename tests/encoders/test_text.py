"""Text encoders: a token an id, padding changes nothing, layers are the library's, limits are refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from mmpeft.encoders import load_encoder
from mmpeft.errors import BadSample, ConfigError

HF = ["bert", "roberta", "t5", "gpt2"]
OPEN_CLIP = ["open_clip", "open_clip-timm"]


@pytest.fixture(scope="module")
def folders(hf_text: dict[str, str], open_clip_folders: dict[str, str]) -> dict[str, str]:
    return {**hf_text, **open_clip_folders}


@pytest.mark.parametrize("name", [*HF, *OPEN_CLIP])
@pytest.mark.parametrize("layer", [-1, -2])
def test_one_token_an_id_and_padding_changes_nothing(name: str, layer: int, folders: dict[str, str]) -> None:
    encoder = load_encoder(folders[name], modality="text", layer=layer).train()
    short, long = encoder.preprocess("what digit is this ?"), encoder.preprocess("what is a seven and a two")
    alone, mask = encoder(short[None])
    assert mask is None and alone.shape == (1, encoder.num_tokens(short.shape), encoder.dim)
    assert alone.grad_fn is None
    size = max(len(short), len(long))
    x = torch.zeros(2, size, dtype=torch.long)
    x[0, : len(short)], x[1, : len(long)] = short, long
    mask = torch.arange(size)[None] < torch.tensor([len(short), len(long)])[:, None]
    tokens, valid = encoder(x, mask)
    assert torch.equal(valid, mask)
    torch.testing.assert_close(tokens[0, : len(short)], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", HF)
def test_layers_are_transformers_hidden_states(name: str, hf_text: dict[str, str]) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(hf_text[name]).eval()
    model = model.get_encoder() if name == "t5" else model
    ids = torch.tensor([[6, 7, 8, 9], [10, 11, 12, 13]])
    out = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    torch.testing.assert_close(load_encoder(hf_text[name])(ids)[0], out.last_hidden_state)
    torch.testing.assert_close(load_encoder(hf_text[name], layer=-2)(ids)[0], out.hidden_states[-2])


def test_layers_of_open_clip_text(open_clip_folder: str) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{open_clip_folder}", force_custom_text=True).eval().text
    ids = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")(["a seven", "what is this"])
    hidden, attn_mask = model._embeds(ids)
    want = model.ln_final(model.transformer(hidden, attn_mask=attn_mask))
    torch.testing.assert_close(load_encoder(open_clip_folder, modality="text")(ids)[0], want)


def test_poolers_are_removed_and_fingerprints_stay(hf_text: dict[str, str]) -> None:
    """The masked-language-model checkpoint has no pooler; a fresh random one would change at every load."""
    first, second = load_encoder(hf_text["roberta"]), load_encoder(hf_text["roberta"])
    assert not any("pooler" in n for n, _ in first.named_parameters())
    assert first.fingerprint() == second.fingerprint()


def test_limits(folders: dict[str, str]) -> None:
    long = "seven " * 20
    encoder = load_encoder(folders["roberta"])
    assert encoder.limit == 16  # 18 positions, of which RoBERTa starts at the padding id + 1
    with pytest.raises(BadSample, match="longer than 16"):
        encoder.preprocess(long)
    assert len(load_encoder(folders["roberta"], max_length=5).preprocess(long)) == 5
    with pytest.raises(BadSample, match="1 to 16 tokens"):
        encoder(torch.zeros(2, 17, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"1\.\.16"):
        load_encoder(folders["roberta"], max_length=17)
    with pytest.raises(ConfigError, match="open_clip"):
        load_encoder(folders["open_clip"], modality="text", max_length=5)
    for raw in ("", "  ", 3):
        with pytest.raises(BadSample, match="non-empty text"):
            encoder.preprocess(raw)


@pytest.mark.parametrize("name", ["bert", "open_clip"])
def test_preprocess_travels_to_workers(name: str, folders: dict[str, str]) -> None:
    preprocess = load_encoder(folders[name], modality="text").preprocess
    assert torch.equal(pickle.loads(pickle.dumps(preprocess))("a seven"), preprocess("a seven"))


def test_image_options_are_refused(hf_text: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="image_size, pool do not apply"):
        load_encoder(hf_text["bert"], image_size=32, pool=(2, 2))
