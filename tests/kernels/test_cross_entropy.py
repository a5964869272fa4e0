"""Linear cross-entropy: the loss and gradients of the plain formula, the supervised rows only, and no kept logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mmpeft.errors import ConfigError
from mmpeft.kernels.cross_entropy import linear_cross_entropy, postprocess_logits

IGNORE = -100
POSTPROCESS = [(None, None), (0.0625, None), (None, 3.0), (2.5, 1.7)]


def inputs(rows=13, width=7, vocabulary=19, *, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::3] = IGNORE
    return tuple(t.to(device) for t in (hidden, weight, bias, labels))


def reference(hidden, weight, labels, bias, scale, softcap, reduction="sum"):
    logits = postprocess_logits(F.linear(hidden, weight, bias), logit_scale=scale, softcap=softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction=reduction)


@pytest.mark.parametrize("scale,softcap", POSTPROCESS)
@pytest.mark.parametrize("chunk_rows", [1, 3, 1024])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_and_gradients_are_the_plain_formula(device, scale, softcap, chunk_rows, reduction):
    hidden, weight, bias, labels = inputs(device=device)
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(
        ours[0], ours[1], labels, bias=ours[2], chunk_rows=chunk_rows, reduction=reduction,
        logit_scale=scale, softcap=softcap,
    )  # fmt: skip
    expected = reference(theirs[0], theirs[1], labels, theirs[2], scale, softcap, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (1.7 * loss).backward()
    (1.7 * expected).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale,softcap", POSTPROCESS)
def test_gradcheck_in_float64(scale, softcap):
    hidden, weight, bias, labels = inputs(rows=5, width=4, vocabulary=6)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, chunk_rows=2, logit_scale=scale, softcap=softcap),
        leaves,
    )


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_only_the_asked_gradients_are_made(wanted):
    hidden, weight, bias, labels = inputs()
    leaves = [t.requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], chunk_rows=4)
    saved = [t is not None for t in loss.grad_fn.saved_tensors]
    assert saved == list(wanted)  # nothing is computed or kept for a frozen head
    loss.backward()
    assert [t.grad is not None for t in leaves] == list(wanted)


def test_logits_are_not_kept_and_never_whole(monkeypatch):
    """The graph keeps one [N, H] tensor; the largest product of the head is [chunk_rows, V]."""
    hidden, weight, _, labels = inputs(rows=64, width=3, vocabulary=501)
    shapes = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: shapes.append(x.shape[0]) or real(x, *rest))
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, chunk_rows=16)
    supervised = int((labels != IGNORE).sum())
    assert max(shapes) == 16 and sum(shapes) == supervised < 64  # supervised rows only
    assert sum(t.numel() for t in loss.grad_fn.saved_tensors if t is not None) == supervised * 3


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_have_an_fp32_softmax(dtype, tolerance):
    hidden, weight, _, labels = inputs(rows=33, width=16, vocabulary=257, dtype=dtype)
    weight = (weight * 0.1).requires_grad_()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, chunk_rows=8)
    assert loss.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = reference(*exact, labels, None, None, None)
    assert abs(loss.item() / expected.item() - 1) < tolerance
    loss.backward()
    expected.backward()
    for leaf, other in zip((hidden, weight), exact, strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < tolerance, error


def test_autocast_matches_the_plain_formula_under_autocast(device):
    hidden, weight, _, labels = inputs(rows=9, width=32, vocabulary=65, dtype=torch.float32, device=device)
    weight = weight * 0.1
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(ours, weight, labels, chunk_rows=4)
        expected = F.cross_entropy(F.linear(theirs, weight).float(), labels, reduction="sum", ignore_index=IGNORE)
    assert abs(loss.item() - expected.item()) < 1e-3
    loss.backward()
    expected.backward()
    assert (ours.grad - theirs.grad).norm() / theirs.grad.norm() < 2e-2


def test_no_supervised_row_is_zero_with_zero_gradient(device):
    hidden, weight, _, labels = inputs(device=device)
    hidden.requires_grad_()
    for reduction in ("sum", "mean"):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), reduction=reduction)
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, hidden)
        assert not grad.any()


def test_without_ignore_index_every_row_counts():
    hidden, weight, _, labels = inputs()
    labels = labels.clamp_min(0)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, ignore_index=None),
        F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"),
    )
    with pytest.raises(ConfigError, match=r"labels must be in \[0, 19\)"):
        linear_cross_entropy(hidden, weight, inputs()[3], ignore_index=None)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": torch.zeros(13, 8)}, "expected hidden"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, r"int64 labels \[13\]"),
        ({"labels": torch.zeros(13)}, "int64"),
        ({"labels": torch.full((13,), 19)}, "0, 19"),
        ({"bias": torch.zeros(18)}, r"bias \[19\]"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"reduction": "summ"}, "nearest: sum"),
        ({"softcap": 0.0}, "softcap"),
        ({"logit_scale": -1.0}, "logit_scale"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    hidden, weight, _, labels = inputs(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("labels_of", ["some", "none", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_kernel_of_a_frozen_head(device, labels_of, reduction):
    """The GPU's path for half precision, forced: one kernel over a chunk's logits gives loss and gradient."""
    from mmpeft.kernels import dispatch

    if not dispatch.triton_installed():
        pytest.skip("no Triton on this platform")
    hidden, weight, _, labels = inputs(dtype=torch.float32, device=device)
    labels = {"some": labels, "none": torch.full_like(labels, IGNORE), "all": labels.clamp_min(0)}[labels_of]
    found = []
    for backend in ("triton", "reference"):
        leaf = hidden.clone().requires_grad_()
        with dispatch.backend(backend):
            loss = linear_cross_entropy(leaf, weight, labels, chunk_rows=4, reduction=reduction)
            (1.7 * loss).backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    atol = 1e-6 if device == "cpu" else 1e-5  # a GPU's exp is good to 2 ulp, of terms larger than their sum
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=atol)
