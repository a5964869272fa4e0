"""Scores: VQA accuracy, exact match, ANLS, CIDEr-D, BLEU, ROUGE-L, WER, success rates, and torchmetrics' own by name.

    metric = load_metric("vqa", variant="official")
    metric.update(["a cat"], [["cat"] * 7 + ["dog"] * 3], kinds=["other"])
    metric.compute()                                   # {"vqa_official": 1.0, "vqa_official/other": 1.0}

Nothing here starts Java or downloads anything. torchmetrics loads when a metric is made.
"""

from mmpeft.metrics.registry import METRICS, load_metric, metric_entry

__all__ = ["METRICS", "load_metric", "metric_entry"]
