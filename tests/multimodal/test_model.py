"""The model's loss and hidden states: equal to the plain computation, whatever the padding, packing and grouping."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmpeft.connectors import MLP, Linear
from mmpeft.encoders import LLM
from mmpeft.errors import BadSample, ConfigError, Unsupported
from mmpeft.multimodal import MultimodalLM, global_mean
from mmpeft.multimodal.language_model import LogitRules, logit_rules, verify_packing
from mmpeft.multimodal.sample import IGNORE

from .kit import StubImage, ask, audio, build_llm, build_model, conversations, image, picture, state, text

KINDS = ["llama", "qwen2", "gpt2", "gemma2", "granite", "cohere", "opt", "bloom"]


def samples(model):
    return [model.encode(c) for c in conversations()]


def reference_loss(model, sample):
    """Transformers' own loss, from the logits of every position, for one sample."""
    embeds = model.embed(model.collate([sample]))
    logits = model.llm(inputs_embeds=embeds).logits[0, :-1].float()
    return F.cross_entropy(logits, sample.labels[1:], ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_padded_batch_is_the_sum_of_full_logit_losses_alone(kind, tokenizer):
    model = build_model(kind, tokenizer)
    batch = model.collate(samples(model))
    output = model(batch, need_logits=True)
    expected = sum(reference_loss(model, s) for s in samples(model))
    assert output.num_supervised == sum(s.num_supervised for s in samples(model)) == len(output.targets)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-6)
    per_token = F.cross_entropy(output.logits, output.targets, reduction="none")
    torch.testing.assert_close(per_token.sum(), output.loss_sum.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(output.predictions, output.logits.argmax(-1))
    for i, sample in enumerate(samples(model)):
        assert torch.equal(output.targets[output.target_samples == i], sample.labels[sample.labels != IGNORE])
    scaled = {"gemma2": LogitRules(softcap=3.0), "granite": LogitRules(scale=0.25), "cohere": LogitRules(scale=0.25)}
    assert logit_rules(model.llm) == scaled.get(kind, LogitRules())  # and without them the loss would be another one


def test_gradients_are_those_of_the_full_logit_loss(tokenizer):
    model = build_model("gemma2", tokenizer)
    ours = model(model.collate(samples(model))).loss_sum
    parameters = [p for n, p in model.named_parameters() if p.requires_grad]
    mine = torch.autograd.grad(ours, parameters)
    theirs = torch.autograd.grad(sum(reference_loss(model, s) for s in samples(model)), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(g.abs().max() > 0 for g in mine)  # every connector and every weight of the LLM


PACKABLE = [(kind, attention) for kind in ("llama", "qwen2", "gpt2") for attention in ("eager", "sdpa")]


@pytest.mark.parametrize("kind,attention", [*PACKABLE, ("gemma2", "eager")])
def test_packed_equals_unpacked(kind, attention, tokenizer):
    model = build_model(kind, tokenizer, llm_changes={"attn_implementation": attention})
    encoded = samples(model)
    batch = model.collate(encoded, row_length=120)
    rows = batch["document_ids"]
    assert rows.shape[0] < len(encoded) and int(rows.max()) > 1 and (rows == 0).any()
    torch.testing.assert_close(
        model(batch).loss_sum, sum(model(model.collate([s])).loss_sum for s in encoded), rtol=1e-5, atol=1e-5
    )
    hidden = model.hidden(batch)
    for row in range(rows.shape[0]):
        for document in range(1, int(rows[row].max()) + 1):
            span = rows[row] == document
            sample = next(s for s in encoded if torch.equal(s.input_ids, batch["input_ids"][row][span]))
            alone = model.hidden(model.collate([sample]))[0]
            torch.testing.assert_close(hidden[row][span], alone, rtol=1e-4, atol=1e-4)


def test_no_leak_between_packed_documents(model):
    """Another first document changes nothing in the second, its own gradient included."""
    a, b, c = (model.encode(ask(image(i), text("Which digit is this?"))) for i in range(3))
    first, second = (model.collate(pair, row_length=100) for pair in ([a, b], [c, b]))
    other = first["document_ids"][0] == 2
    h1, h2 = model.hidden(first), model.hidden(second)
    assert torch.equal(h1[0][other], h2[0][other]) and not torch.equal(h1[0][~other], h2[0][~other])


@pytest.mark.parametrize("kind", ["mamba", "opt", "bloom"])
def test_an_architecture_that_leaks_is_refused_when_packed(kind, tokenizer):
    model = build_model(kind, tokenizer)
    model(model.collate(samples(model)))  # padded on the right it is fine
    with pytest.raises(Unsupported, match="lets packed documents see each other"):
        model(model.collate(samples(model), row_length=100))
    verify_packing(build_llm("llama", tokenizer).model)


def test_an_unknown_logit_rule_is_refused(tokenizer):
    llm = build_llm("cohere", tokenizer)
    llm.model.config.logit_scale = 0.5  # what the configuration says is not what the model does
    with pytest.raises(Unsupported, match="does more to its logits than mmpeft knows"):
        MultimodalLM(llm)
    blind = build_llm("llama", tokenizer)
    blind.model.forward = lambda input_ids=None: None  # an architecture that takes token ids only
    with pytest.raises(Unsupported, match="cannot be run from input embeddings"):
        MultimodalLM(blind)


def test_media_tokens_stand_in_their_places_in_order(model):
    sample = model.encode(ask(text("Is"), image(2, 16, 24), text("or"), state(1), image(3)))
    embeds = model.embed(model.collate([sample, model.encode(ask(image(4), text("?")))]))[0, : len(sample)]
    for modality, item in enumerate(("image", "state")):
        mine = embeds[sample.modality_ids == (1, 3)[modality]]
        parts = []
        for medium in (m for m in sample.media if m.modality == item):
            tokens = medium.x[None] if medium.encoded else model.encoders[item](medium.x[None])[0]
            parts.append(model.connectors[item](tokens)[0][0])
        torch.testing.assert_close(mine, torch.cat(parts), rtol=1e-5, atol=1e-6)
    words = sample.modality_ids == 0
    assert torch.equal(embeds[words], model.llm.get_input_embeddings()(sample.input_ids[words]))
    swapped = model.encode(ask(text("Is"), image(3), text("or"), state(1), image(2, 16, 24)))
    assert not torch.allclose(model.embed(model.collate([swapped]))[0][5:], embeds[5 : len(swapped)])


def test_media_of_different_sizes_and_cached_features_equal_one_by_one(model):
    """Groups in one batch: two image sizes, features of two lengths, waveforms of two lengths."""
    cached = [
        {"type": "image", "features": model.encoders["image"](picture(9, 8, w)[None])[0][0]} for w in (16, 24)
    ]  # fmt: skip
    mixed = [
        ask(image(1), audio(31, 1), cached[0]), ask(image(2, 8, 32)), ask(cached[1], audio(50, 2), image(3)),
        ask(text("none")),
    ]  # fmt: skip
    encoded = [model.encode(c) for c in mixed]
    batch = model.collate(encoded)
    assert [len(g["samples"]) for g in batch["media"]["image"]] == [2, 2, 1]
    assert batch["media"]["audio"][0]["mask"].sum(1).tolist() == [31, 50]
    together = model.embed(batch)
    for row, sample in enumerate(encoded):
        alone = model.embed(model.collate([sample]))[0]
        torch.testing.assert_close(together[row, : len(sample)], alone, rtol=1e-5, atol=1e-6)
    raw = model.encode(ask(image(9, 8, 16)))
    features = model.encode(ask(cached[0]))
    torch.testing.assert_close(model.embed(model.collate([raw])), model.embed(model.collate([features])))


def test_one_flat_encoder_call_a_modality(model, monkeypatch):
    calls = []
    real = type(model.encoders["image"]).forward
    monkeypatch.setattr(
        StubImage, "forward", lambda self, x, mask=None: calls.append(x.shape[0]) or real(self, x, mask)
    )
    model(model.collate(samples(model)))
    assert calls == [4]  # all images of all samples


def test_unequal_micro_batches_give_the_gradient_of_the_whole(tokenizer):
    model = build_model("llama", tokenizer)
    parts = samples(model)
    halves = [model.collate(parts[:1]), model.collate(parts[1:])]
    counts = [b["target_ids"].numel() for b in halves]
    assert counts[0] * 3 < counts[1]
    whole = model(model.collate(parts))
    loss = global_mean(whole.loss_sum, whole.num_supervised)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for half in halves:  # the trainer averages over two accumulation steps
        share = global_mean(model(half).loss_sum, counts, averaged_over=2)
        (share / 2).backward()
        total += share.item() / 2
    assert abs(total - loss.item()) < 1e-5
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-5)
    assert global_mean(torch.zeros(()), 0).item() == 0.0


def test_frozen_encoder_builds_no_graph_but_lets_gradients_through(tokenizer):
    model = build_model("llama", tokenizer)
    batch = model.collate([model.encode(ask(image(1), text("?")))])
    tokens, _ = model.encoders["image"](batch["media"]["image"][0]["x"])
    assert not tokens.requires_grad
    prompt = torch.zeros(3, 16, 16, requires_grad=True)  # a visual prompt before the frozen tower
    batch["media"]["image"][0]["x"] = batch["media"]["image"][0]["x"] + prompt
    model(batch).loss_sum.backward()
    assert prompt.grad.abs().sum() > 0 and all(p.grad is None for p in model.encoders.parameters())


def test_fp32_connectors_beside_a_bf16_language_model(tokenizer):
    llm = build_llm("llama", tokenizer)
    llm.model.to(torch.bfloat16)
    model = MultimodalLM(llm, image=StubImage(), connector=MLP(depth=1))
    batch = model.collate([model.encode(ask(image(i), text("?"), answer="7" * (i + 1))) for i in range(3)])
    output = model(batch)
    output.loss_sum.backward()
    assert model.embed(batch).dtype == torch.bfloat16 and output.loss_sum.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.connectors.parameters())
    assert len(model.generate(conversations()[:2], max_new_tokens=3)) == 2


def test_rows_follow_the_samples_to_their_media(model):
    batch = model.collate([model.encode(ask(*[image(i) for i in range(n)], text("?"))) for n in (2, 1, 0, 3)])
    assert model.expand_rows(["a", None, "b", "c"], batch) == {"image": ["a", "a", None, "c", "c", "c"]}
    with pytest.raises(ConfigError, match="expected 4 rows"):
        model.expand_rows(["a"], batch)
    several = model.collate([model.encode(ask(image(0))), model.encode(ask(image(0, 8, 8)))])
    with pytest.raises(Unsupported, match="2 sizes"):
        model.expand_rows(["a", "b"], several)


class Liar(StubImage):
    """num_tokens that disagrees with forward."""

    def num_tokens(self, shape) -> int:
        return super().num_tokens(shape) + 1


def test_a_wrong_token_count_names_the_sample(tokenizer):
    model = build_model("llama", tokenizer, image=Liar())
    batch = model.collate([model.encode(ask(text("fine"))), model.encode(ask(image(0), name="culprit"))])
    with pytest.raises(BadSample, match="culprit: its image became 4 tokens, num_tokens promised 5"):
        model(batch)


def test_parts_that_do_not_fit_are_refused(tokenizer):
    llm = build_llm("llama", tokenizer)
    built = MLP(depth=1, in_dim=12, out_dim=32)
    for options, message in [
        ({"image": "timm:whatever", "dtype": "bfloat16"}, "given by name"),
        ({"audio": StubImage()}, "reads image, it was given as audio="),
        ({"connector": MLP(depth=2)}, "needs something to connect"),
        ({"image": StubImage(), "connector": {"imag": MLP(depth=2)}}, "nearest: image"),
        ({"image": StubImage(), "state": 4, "connector": built}, "cannot serve image and state"),
        ({"image": StubImage(), "connector": MLP(depth=1, in_dim=13)}, "in_dim=13"),
        ({"max_length": 0}, "max_length"),
    ]:
        with pytest.raises(ConfigError, match=message):
            MultimodalLM(llm, **options)
    text_only = MultimodalLM(llm)
    other = MultimodalLM(llm, image=StubImage())
    with pytest.raises(ConfigError, match="holds image inputs, the model has none"):
        text_only(other.collate([other.encode(ask(image(0)))]))


def test_connectors_by_modality_are_plain_submodules_and_independent(tokenizer):
    model = MultimodalLM(
        build_llm("llama", tokenizer), image=StubImage(), state=5,
        connector={"image": MLP(depth=2, output_norm=True), "state": Linear()},
    )  # fmt: skip
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"encoders", "connectors", "llm"} and isinstance(model.encoders, nn.ModuleDict)
    assert isinstance(model.connectors["state"], Linear) and not hasattr(model.connectors, "audio")
    std = model.llm.get_input_embeddings().weight.std()
    torch.testing.assert_close(model.connectors["image"].output_norm.weight, std.expand(32).detach(), rtol=1e-5, atol=0)
    shared = build_model("llama", tokenizer)
    assert shared.connectors["image"].in_dim == 12 and shared.connectors["audio"].in_dim == 9


def test_deepcopy_and_pickle_keep_the_loss(model):
    import copy
    import io

    batch = model.collate(samples(model))
    expected = model(batch).loss_sum.detach()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(batch).loss_sum, expected)
        assert torch.equal(twin.encode(conversations()[1]).input_ids, model.encode(conversations()[1]).input_ids)


def test_on_meta_the_model_has_its_shapes_and_no_storage(tokenizer):
    llm = build_llm("llama", tokenizer)
    with torch.device("meta"):
        model = MultimodalLM(
            LLM(type(llm.model)(llm.model.config), tokenizer, "meta"),
            image=StubImage(),
            connector=MLP(output_norm=True),
        )
    assert all(p.is_meta for p in model.parameters())


def test_options_parse_from_yaml_by_class_path():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MultimodalLM, "model")
    arguments = {
        "llm": "package:some-llm", "image": {"name": "package:some-encoder", "image_size": 64, "pool": [2, 2]},
        "connector": {"image": {"class_path": "mmpeft.connectors.MLP", "init_args": {"depth": 3}}}, "state": 7,
        "dtype": "bfloat16", "chat_template": "chatml",
    }  # fmt: skip
    parsed = parser.parse_object({"model": {"class_path": "mmpeft.multimodal.MultimodalLM", "init_args": arguments}})
    given = parsed.model.init_args
    assert given.image == arguments["image"] and given.connector["image"].init_args.depth == 3 and given.state == 7
    with pytest.raises(jsonargparse.ArgumentError, match="chat_templat"):
        parser.parse_object(
            {"model": {"class_path": "mmpeft.multimodal.MultimodalLM", "init_args": {"llm": "x", "chat_templat": "y"}}}
        )
