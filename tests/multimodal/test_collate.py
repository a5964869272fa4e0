"""Padding and packing: nothing lost, nothing cut, nothing doubled."""

import pytest
import torch

from mmpeft.errors import BadSample, ConfigError
from mmpeft.multimodal import collate, pack
from mmpeft.multimodal.sample import IGNORE

from .kit import conversations


def lengths(count, low, high, seed=0):
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("layout", [{}, {"padding": "left"}, {"row_length": 97}])
def test_every_sample_is_in_the_batch_once_and_whole(model, layout):
    samples = [model.encode(c) for c in conversations()]
    batch = collate(samples, **layout)
    ids, documents = batch["input_ids"], batch["document_ids"]
    found = []
    for row in range(ids.shape[0]):
        for document in range(1, int(documents[row].max()) + 1):
            span = documents[row] == document
            assert torch.equal(batch["position_ids"][row][span], torch.arange(int(span.sum())))
            match = [i for i, s in enumerate(samples) if torch.equal(s.input_ids, ids[row][span])]
            assert len(match) == 1
            found += match
            sample = samples[match[0]]
            assert torch.equal(batch["labels"][row][span], sample.labels)
            assert torch.equal(batch["modality_ids"][row][span], sample.modality_ids)
    assert sorted(found) == list(range(len(samples)))
    padding = documents == 0
    assert torch.equal(batch["attention_mask"], ~padding)
    assert (batch["labels"][padding] == IGNORE).all() and not batch["modality_ids"][padding].any()
    flat_labels, flat_modality = batch["labels"].flatten(), batch["modality_ids"].flatten()
    assert torch.equal(flat_labels[batch["target_positions"] + 1], batch["target_ids"])
    assert batch["target_ids"].numel() == sum(s.num_supervised for s in samples)
    for number, modality in enumerate(("image", "audio", "state"), start=1):
        positions = torch.cat([g["positions"] for g in batch["media"][modality]])
        assert torch.equal(positions.sort().values, (flat_modality == number).nonzero().squeeze(1))
        assert all(sum(g["counts"]) == g["positions"].numel() for g in batch["media"][modality])


def test_position_ids_restart_at_every_document_and_in_the_padding(model):
    """transformers tells documents apart by positions that do not go up by one: padding must not join the last one."""
    samples = [model.encode(c) for c in conversations()]
    batch = collate(samples, row_length=97)
    for row in range(batch["input_ids"].shape[0]):
        changed = batch["document_ids"][row].diff() != 0
        assert torch.equal(batch["position_ids"][row].diff() != 1, changed)


def test_pack_fills_rows_without_loss():
    sizes, capacity = lengths(200, 1, 100), 128
    rows = pack(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(200))
    loads = [sum(sizes[i] for i in row) for row in rows]
    assert max(loads) <= capacity
    assert len(rows) <= 1.05 * -(-sum(sizes) // capacity)  # at most 5 % more rows than the tokens fill
    assert rows == sorted(sorted(row) for row in rows) == pack(sizes, capacity)


def test_pack_keeps_the_media_budget():
    sizes, media = lengths(60, 5, 30), lengths(60, 0, 4, seed=1)
    rows = pack(sizes, 100, media=media, max_media=5)
    assert sorted(i for row in rows for i in row) == list(range(60))
    assert max(sum(media[i] for i in row) for row in rows) == 5


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda s: collate([]), ConfigError, "at least one sample"),
        (lambda s: collate(s, padding="rigth"), ConfigError, "nearest: right"),
        (lambda s: collate(s, padding="left", row_length=200), ConfigError, "generation takes samples one a row"),
        (lambda s: collate(s, row_length=40), BadSample, r"two: \d+ tokens and 2 media, a row holds 40"),
        (lambda s: collate(s, row_length=200, max_media=1), BadSample, r"two: .* a row holds 200 tokens and 1 media"),
        (lambda s: pack([3], 0), ConfigError, "at least 1 token"),
        (lambda s: pack([3], 5, max_media=1), ConfigError, "max_media needs media"),
    ],
)
def test_wrong_inputs_are_refused(model, call, error, message):
    with pytest.raises(error, match=message):
        call([model.encode(c) for c in conversations()])
