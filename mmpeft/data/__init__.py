"""Datasets as conversations: readers of the common formats, the handwritten digits, and the Lightning data module.

Nothing here imports Lightning, `datasets` or scikit-learn until a class that needs it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpeft.data.bad_samples import Report as Report
    from mmpeft.data.bad_samples import check as check
    from mmpeft.data.digits import DigitsCaptions as DigitsCaptions
    from mmpeft.data.digits import DigitsVQA as DigitsVQA
    from mmpeft.data.loader import Loader as Loader
    from mmpeft.data.module import DataModule as DataModule
    from mmpeft.data.processor import ConversationProcessor as ConversationProcessor

_LAZY = {
    "DigitsVQA": "digits",
    "DigitsCaptions": "digits",
    "DataModule": "module",
    "Loader": "loader",
    "ConversationProcessor": "processor",
    "Report": "bad_samples",
    "check": "bad_samples",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
