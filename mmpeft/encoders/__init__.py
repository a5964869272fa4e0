"""Frozen pretrained backbones under one protocol: pictures, sounds and texts to tokens; and the language models.

    encoder = load_encoder("timm:vit_base_patch16_siglip_224", layer=-2)
    tokens, mask = encoder(torch.stack([encoder.preprocess("cat.jpg")]))      # [1, 196, 768], None
    llm = load_llm("hf:HuggingFaceTB/SmolLM2-135M-Instruct")
    cache = FeatureCache(encoder, "features/")

The libraries behind the names load when a name needs them. `names.py` has the grammar of names.
"""

from mmpeft.encoders.base import Encoder, is_frozen
from mmpeft.encoders.cache import FeatureCache, content_id
from mmpeft.encoders.llm import LLM, load_llm
from mmpeft.encoders.load import load_encoder

__all__ = ["LLM", "Encoder", "FeatureCache", "content_id", "is_frozen", "load_encoder", "load_llm"]
