"""Encoders and connectors in front of a causal language model: conversations in, loss or text out.

model = MultimodalLM("package:smollm2-135m-instruct", image="package:efficientnet-lite0")
samples = [model.encode(conversation) for conversation in conversations]
output = model(model.collate(samples))
global_mean(output.loss_sum, output.num_supervised).backward()
model.chat([{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]}])
"""

from mmpeft.multimodal.collate import Batch, MediaGroup, collate
from mmpeft.multimodal.conversation import ConversationEncoder
from mmpeft.multimodal.model import MultimodalLM, Output, global_mean
from mmpeft.multimodal.packing import pack
from mmpeft.multimodal.sample import MediaItem, Sample

__all__ = [
    "Batch",
    "ConversationEncoder",
    "MediaGroup",
    "MediaItem",
    "MultimodalLM",
    "Output",
    "Sample",
    "collate",
    "global_mean",
    "pack",
]
