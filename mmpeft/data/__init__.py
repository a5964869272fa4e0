"""Datasets as conversations: readers of the common formats, the handwritten digits, and the Lightning data module.

Nothing here imports Lightning, `datasets` or scikit-learn until a class that needs it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmpeft.lazy import lazy

if TYPE_CHECKING:
    from mmpeft.data.bad_samples import Report as Report
    from mmpeft.data.bad_samples import check as check
    from mmpeft.data.classification import ImageFolder as ImageFolder
    from mmpeft.data.classification import LabelledDataset as LabelledDataset
    from mmpeft.data.classification import Table as Table
    from mmpeft.data.coco import CocoCaptions as CocoCaptions
    from mmpeft.data.digits import DigitsCaptions as DigitsCaptions
    from mmpeft.data.digits import DigitsVQA as DigitsVQA
    from mmpeft.data.hf import HuggingFace as HuggingFace
    from mmpeft.data.hf import HuggingFaceLabels as HuggingFaceLabels
    from mmpeft.data.jsonl import JsonLines as JsonLines
    from mmpeft.data.llava import LLaVA as LLaVA
    from mmpeft.data.loader import Loader as Loader
    from mmpeft.data.module import DataModule as DataModule
    from mmpeft.data.processor import ConversationProcessor as ConversationProcessor
    from mmpeft.data.samples import ConversationDataset as ConversationDataset
    from mmpeft.data.vqa_v2 import VQAv2 as VQAv2

#: public name -> file; a file is imported when one of its names is used
_LAZY = {
    "CocoCaptions": ".coco",
    "ConversationDataset": ".samples",
    "ConversationProcessor": ".processor",
    "DataModule": ".module",
    "DigitsCaptions": ".digits",
    "DigitsVQA": ".digits",
    "HuggingFace": ".hf",
    "HuggingFaceLabels": ".hf",
    "ImageFolder": ".classification",
    "JsonLines": ".jsonl",
    "LLaVA": ".llava",
    "LabelledDataset": ".classification",
    "Loader": ".loader",
    "Report": ".bad_samples",
    "Table": ".classification",
    "VQAv2": ".vqa_v2",
    "check": ".bad_samples",
}
__all__ = list(_LAZY)
__getattr__ = lazy(__name__, _LAZY)
