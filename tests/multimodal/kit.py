"""Tiny random language models with a real tokenizer and chat template, and stub encoders that keep the contract."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mmpeft.connectors import MLP
from mmpeft.encoders import LLM, Encoder
from mmpeft.multimodal import MultimodalLM

CHATML = (  # with a default system prompt, as SmolLM2 has
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful tester.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Which digit is this? It is 7, not 12.", "You are a helpful tester.", "system user assistant",
    "Is the first image larger than the second one? yes no", "naïve café 数字 🙂",
] * 3  # fmt: skip


def build_tokenizer():
    """Byte-level BPE; pad = eos = end of turn, as in SmolLM2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": ["<|marker|>"]})
    fast.chat_template = CHATML
    return fast


def build_metaspace_tokenizer(scheme: str, template: str):
    """Byte-fallback BPE over words that begin with a space mark, with bos, eos and unk."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    core.train_from_iterator([*CORPUS, "[INST] / [/INST]"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{{ bos_token }}" + template
    return fast


def build_llm(kind: str, tokenizer, **changes) -> LLM:
    """A random two-layer model of an architecture, weights large enough that every position matters."""
    import transformers as tr

    vocabulary = len(tokenizer) + 5
    llama = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
        "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    table = {
        "llama": lambda: tr.LlamaConfig(**llama | {"tie_word_embeddings": True} | changes),
        "qwen2": lambda: tr.Qwen2Config(**llama | changes),
        "gemma2": lambda: tr.Gemma2Config(
            **llama | {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8} | changes
        ),
        "granite": lambda: tr.GraniteConfig(**llama | {"logits_scaling": 4.0} | changes),
        "cohere": lambda: tr.CohereConfig(**llama | {"logit_scale": 0.25} | changes),
        "gpt2": lambda: tr.GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes,
        ),
        "opt": lambda: tr.OPTConfig(
            vocab_size=vocabulary, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, init_std=0.2, **changes,
        ),
        "bloom": lambda: tr.BloomConfig(
            vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, **changes
        ),
        "mamba": lambda: tr.MambaConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4, **changes
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(table[kind](), dtype=torch.float32).eval()
    return LLM(model, tokenizer, f"random:{kind}")


class StubImage(Encoder):
    """8 x 8 patches of a float image [3, H, W], any size."""

    modality = "image"

    def __init__(self, dim: int = 12) -> None:
        super().__init__(nn.Linear(3 * 64, dim), name="stub:image", dim=dim, preprocess=read_image)

    def num_tokens(self, shape) -> int:
        return (shape[-2] // 8) * (shape[-1] // 8)

    def forward(self, x, mask=None):
        return self.backbone(nn.functional.unfold(x, 8, stride=8).transpose(1, 2)), None

    def config(self):
        return {}


class StubAudio(Encoder):
    """Frames of 10 samples; the mask follows the samples."""

    modality = "audio"

    def __init__(self, dim: int = 9) -> None:
        super().__init__(nn.Linear(10, dim), name="stub:audio", dim=dim, preprocess=read_audio)

    def num_tokens(self, shape) -> int:
        return (shape if isinstance(shape, int) else shape[-1]) // 10

    def forward(self, x, mask=None):
        frames = x.shape[1] // 10
        tokens = self.backbone(x[:, : frames * 10].unflatten(1, (frames, 10)))
        return tokens, None if mask is None else torch.arange(frames) < (mask.sum(1, keepdim=True) // 10)

    def config(self):
        return {}


def read_image(raw):
    """[3, H, W] floats as they are, or uint8 [H, W, 3]."""
    if isinstance(raw, np.ndarray) and raw.dtype == np.uint8:
        return torch.from_numpy(raw).permute(2, 0, 1) / 255
    if not isinstance(raw, torch.Tensor) or raw.dim() != 3:
        raise ValueError(f"not an image: {raw!r:.40}")
    return raw


def read_audio(raw):
    return torch.as_tensor(raw[0] if isinstance(raw, tuple) else raw)


def build_model(kind: str, tokenizer, *, llm_changes=None, **options) -> MultimodalLM:
    """Image, audio and state in front of a random language model; connectors of visible size."""
    torch.manual_seed(1)
    given = {"image": StubImage(), "audio": StubAudio(), "state": 5, "connector": MLP(depth=2, init_std=0.5)} | options
    return MultimodalLM(build_llm(kind, tokenizer, **(llm_changes or {})), **given)


def picture(seed: int = 0, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 0, height: int = 16, width: int = 16):
    return {"type": "image", "image": picture(seed, height, width)}


def audio(samples: int = 25, seed: int = 0):
    return {"type": "audio", "audio": torch.randn(samples, generator=torch.Generator().manual_seed(seed))}


def state(seed: int = 0):
    return {"type": "state", "state": torch.randn(5, generator=torch.Generator().manual_seed(seed))}


def text(value: str):
    return {"type": "text", "text": value}


def ask(*content, answer: str = "7", name: str = "s"):
    """One question and its answer."""
    return {
        "id": name,
        "messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}],
    }


def conversations():
    """Samples of several lengths: one and two images, sound, state, a video, several turns, text only."""
    return [
        ask(image(1), text("Which digit is this?"), answer="7", name="one"),
        ask(text("Is"), image(2), text("larger than"), image(3), text("?"), answer="yes, it is", name="two"),
        ask(audio(25), state(4), text("And this?"), answer="12", name="sound"),
        {"id": "turns", "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image(5)]},
            {"role": "assistant", "content": "a café 🙂"},
            {"role": "user", "content": [text("and "), audio(43, 6)]},
            {"role": "assistant", "content": "no"},
        ]},
        ask(text("It is 7, not 12. Which digit is this?"), answer="7", name="text"),
    ]  # fmt: skip
