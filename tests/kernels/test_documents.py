"""Packed documents in the fused step: loss and gradients are those of the documents one by one, and of transformers."""

import io

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.kernels import attention, fuse
from mmpeft.kernels.documents import Documents
from mmpeft.kernels.step import TrainStep

transformers = pytest.importorskip("transformers")

LENGTHS = [[4, 1, 6], [3, 8]]  # of the documents of two rows of 11
IDS = torch.tensor([[5, 5, 5, 5, 2, 7, 7, 7, 7, 7, 7], [1, 1, 1] + [0] * 8])  # document ids as a collator may give them
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, *range(8)]])
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
         "intermediate_size": 56, "vocab_size": 101}  # fmt: skip


def model_and_adapters(device="cpu", kind="Qwen2"):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES))
    model = model.to(device).requires_grad_(False)
    found = {}
    for name, m in model.named_modules():
        if name.endswith("_proj"):
            if m.bias is not None:
                m.bias.data.normal_()
            A, B = (torch.randn(*s, device=device) * 0.2 for s in ((3, m.in_features), (m.out_features, 3)))
            found[name] = fuse.LowRank(nn.Parameter(A), nn.Parameter(B), 0.7)
    return model, found


def test_where_documents_begin_and_what_they_count():
    for documents in (Documents.of_ids(IDS), Documents.of_positions(POSITIONS), Documents.of_ids(IDS, most=7)):
        assert documents.starts[:6].tolist() == [0, 4, 5, 11, 14, 22] and (documents.starts[5:] == 22).all()
        assert documents.positions.view(2, 11).equal(POSITIONS) and documents.longest == 11
        assert documents.starts.dtype == torch.int32
    numbers = documents.ids()
    assert numbers.tolist() == [1] * 4 + [2] + [3] * 6 + [4] * 3 + [5] * 8
    mask = documents.mask(11)
    assert mask.shape == (2, 1, 11, 11)
    assert mask[0, 0, 6].nonzero()[:, 0].tolist() == [5, 6] and mask[1, 0, 10].sum() == 8


def test_wrong_documents_are_refused():
    with pytest.raises(ConfigError, match="holds 5 documents, padding included; this step was made for at most 4"):
        Documents.of_ids(IDS, most=4)
    with pytest.raises(ConfigError, match="begin again at 0"):
        Documents.of_positions(POSITIONS + 1)
    with pytest.raises(ConfigError, match="begin again at 0"):
        Documents.of_positions(torch.tensor([[0, 1, 3, 4]]))
    with pytest.raises(ConfigError, match="expected integers"):
        Documents.of_ids(IDS.float())


@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
def test_attention_of_each_document_alone(heads, device):
    torch.manual_seed(1)
    documents = Documents.of_ids(IDS.to(device))
    q, k, v = (torch.randn(2, 11, h, 8, dtype=torch.float64, device=device, requires_grad=True) for h in (heads[0], *heads[1:] * 2))
    o, kept = attention.forward(q.detach(), k.detach(), v.detach(), 0.3, documents=documents)
    do = torch.randn_like(o)
    grads = attention.backward(do, q.detach(), k.detach(), v.detach(), o, kept, 0.3, documents=documents)
    for row, lengths in enumerate(LENGTHS):
        for part in torch.arange(11).split(lengths):
            alone = nn.functional.scaled_dot_product_attention(
                *(t[row : row + 1, part].transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
            ).transpose(1, 2)
            torch.testing.assert_close(o[row, part], alone[0])
            alone.backward(do[row : row + 1, part])
    for ours, t in zip(grads, (q, k, v), strict=True):
        torch.testing.assert_close(ours, t.grad)


def one_by_one(fused, ids, labels, inputs):
    """The mean loss over the supervised tokens of all documents, each run in a row of its own."""
    total, count = 0.0, 0
    for row, lengths in enumerate(LENGTHS):
        for part in torch.arange(11).split(lengths):
            n = int((labels[row, part][1:] != -100).sum())
            if n:
                total = total + n * fused.loss(None, labels[row, part][None], inputs=inputs[row, part][None])
                count += n
    return total / count


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_loss_and_gradients_of_the_documents_one_by_one_and_of_transformers(backend, device, kind):
    model, found = model_and_adapters(device, kind)
    fused = fuse.from_model(model, found)
    ids = torch.randint(0, 101, (2, 11), device=device)
    labels = torch.where(torch.rand(2, 11, device=device) < 0.8, ids, -100)  # some documents' first tokens included
    inputs = fused.embedding[ids].clone().requires_grad_()
    wanted = [inputs, *(t for a in found.values() for t in (a.A, a.B))]
    documents = Documents.of_ids(IDS.to(device), most=8)
    loss = fused.loss(None, labels, inputs=inputs, documents=documents)
    ours = torch.autograd.grad(loss, wanted)
    rows = nn.functional.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]
    torch.testing.assert_close(fused.loss(None, labels, inputs=inputs, rows=rows, documents=documents), loss)
    assert abs(fused.loss(None, labels, inputs=inputs) - loss) > 1e-3 * loss  # without documents it is another loss

    alone = one_by_one(fused, ids, labels, inputs)
    for name, a in found.items():  # the same adapters on transformers' own modules, which build the mask by positions
        m = model.get_submodule(name)
        m.forward = lambda x, m=m, a=a: nn.functional.linear(x, m.weight + a.scale * a.B @ a.A, m.bias)
    masked = labels.masked_fill(POSITIONS.to(device) == 0, -100)
    own = model(inputs_embeds=inputs, labels=masked, position_ids=POSITIONS.to(device), use_cache=False).loss
    for want in (alone, own):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        for a, b in zip(ours, torch.autograd.grad(want, wanted), strict=True):
            assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7


def test_one_document_a_row_is_no_packing(device):
    model, found = model_and_adapters(device)
    fused = fuse.from_model(model, found)
    ids = torch.randint(0, 101, (2, 11), device=device)
    whole = Documents.of_ids(torch.zeros(2, 11, dtype=torch.int64, device=device))
    torch.testing.assert_close(fused.loss(ids, ids, documents=whole), fused.loss(ids, ids))
    single = torch.randint(0, 101, (3, 1), device=device)  # rows of one token
    x = fused.embedding[single]
    torch.testing.assert_close(fused.states(x, Documents.of_ids(single)), fused.states(x))


def test_the_written_out_step_on_packed_rows(device):
    curves = []
    for way in ("packed", "autograd"):
        model, found = model_and_adapters(device)
        fused = fuse.from_model(model, found)
        generator = torch.Generator().manual_seed(3)
        batches = [torch.randint(0, 101, (2, 11), generator=generator).to(device) for _ in range(3)]
        documents = [torch.randint(1, 4, (2, 11), generator=generator).sort(1).values for _ in range(3)]
        if way == "packed":
            step = TrainStep(fused, fused.optimizer(lr=1e-2), batch=2, length=11, documents=9)
            curves.append([float(step(b, b, documents=d)) for b, d in zip(batches, documents, strict=True)])
            with pytest.raises(ConfigError, match="documents no; this step was made for .2, 11., rows no, documents yes"):
                step(batches[0], batches[0])
            with pytest.raises(ConfigError, match="expected one a token"):
                step(batches[0], batches[0], documents=documents[0][:1])
            with pytest.raises(ConfigError, match="holds 22 documents"):
                step(batches[0], batches[0], documents=torch.arange(22).view(2, 11))
            with pytest.raises(ConfigError, match="1 documents in 2 rows"):
                TrainStep(fused, fused.optimizer(), batch=2, length=11, documents=1)
            continue
        optimizer = torch.optim.AdamW(fused.masters, lr=1e-2, weight_decay=0.0)
        curve = []
        for b, d in zip(batches, documents, strict=True):
            fused.refresh()
            loss = fused.loss(b, b, documents=Documents.of_ids(d.to(device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=2e-4, atol=0)


def test_compile_takes_a_collators_packing_and_says_so(device):
    """Positions that begin again at 0, as `MultimodalLM` gives them for packed batches, run on the fused blocks."""
    model, _ = model_and_adapters(device, "Llama")
    mmpeft.attach(model, {"model.layers.*.{self_attn,mlp}.*_proj": mmpeft.LoRA(rank=3)}, name="a")
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape).to(p) if p.requires_grad else 0
    ids, positions = torch.randint(0, 101, (2, 11)).to(device), POSITIONS.to(device)
    labels = ids.masked_fill(positions == 0, -100)

    def run():
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss  # else no mask is made
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want, out = run(), io.StringIO()
    with mmpeft.compile(model, out=out) as compiled:
        assert "packed documents through a block-diagonal mask" in out.getvalue()
        for a, b in zip(run(), want, strict=True):
            assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7
        assert compiled.decoders[0].packed == 1 and compiled.decoders[0].calls["own"] == 0
        step = compiled.train_step(batch=2, length=11, documents=8)
        torch.testing.assert_close(step(ids, labels, documents=IDS), want[0], rtol=1e-5, atol=0)


def test_a_multimodal_models_packed_batch_runs_on_the_fused_blocks():
    from tests.multimodal.kit import build_model, build_tokenizer

    model = build_model("llama", build_tokenizer())
    mmpeft.attach(model, {"llm.model.layers.*.{self_attn,mlp}.*_proj": mmpeft.LoRA(rank=2)}, name="a", check=False)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape) if p.requires_grad else 0
    texts = ["Which digit is this?", "Is it 7?", "Is the first larger than the second one?"]
    encoded = [
        model.encode([{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}]) for t in texts
    ]
    with mmpeft.compile(model, out=io.StringIO()) as compiled:
        batch = model.collate(encoded, row_length=130)
        assert batch["input_ids"].shape[0] < 3
        loss = model(batch).loss_sum
        assert compiled.decoders[0].packed == 2 and compiled.decoders[0].calls["own"] == 0  # a proof, and this batch
        alone = sum(model(model.collate([s])).loss_sum for s in encoded)
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.llm.parameters() if p.requires_grad)
