"""Look at every sample before training: which are bad, and why.

report = mmpeft.data.check(dataset)                       # form, files and decoding; no model needed
report = mmpeft.data.check(dataset, processor, max_length=512)   # also too long, no supervised token
print(report)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mmpeft.data.encoding import encode_one
from mmpeft.data.processor import Processor
from mmpeft.data.samples import check_media_files, check_sample
from mmpeft.errors import BadSample

#: reason -> words that the messages of mmpeft use for it, first match counts
REASONS = {
    "missing file": ("file not found", "No such file", "missing"),
    "unreadable file": ("no image that can be read", "no sound that can be read", "cannot identify", "truncated"),
    "too long": ("too long", "the limit is"),
    "no supervised token": ("no supervised token",),
}


@dataclass
class Report:
    """What `check` found: the number of samples and, for each bad one, its index and the message."""

    total: int
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """Bad samples by reason."""
        return Counter(
            next((reason for reason, words in REASONS.items() if any(w in message for w in words)), "malformed")
            for message in self.bad.values()
        )

    def good(self) -> list[int]:
        """Indices of the usable samples, for `torch.utils.data.Subset`."""
        return [i for i in range(self.total) if i not in self.bad]

    def __str__(self) -> str:
        lines = [f"{self.total} samples, {len(self.bad)} bad"]
        lines += [f"  {count:>6} {reason}" for reason, count in self.reasons.most_common()]
        lines += [f"  [{index}] {message}" for index, message in list(self.bad.items())[:20]]
        return "\n".join(lines + ([f"  ... and {len(self.bad) - 20} more"] if len(self.bad) > 20 else []))

    def refuse(self) -> None:
        """Raise if any sample is bad.

        Raises:
            BadSample: the report as its message.
        """
        if self.bad:
            raise BadSample(str(self))


def check(
    dataset: Any,
    processor: Processor | None = None,
    *,
    max_length: int | None = None,
    indices: Iterable[int] | None = None,
) -> Report:
    """Read every sample (or those at `indices`) and list the bad ones.

    Conversations are checked for their form and their media are decoded in full; with a `processor` each sample is also
    encoded, which finds what is too long for `max_length` or has no supervised token.
    """
    report = Report(len(dataset))
    for index in range(len(dataset)) if indices is None else indices:
        try:
            sample = dataset[index]
            if "messages" in sample:
                check_sample(sample)
                check_media_files(sample)
            if processor is not None:
                encode_one(dataset, index, processor, train=True, max_length=max_length)
        except (BadSample, OSError) as error:
            report.bad[index] = str(error)
    return report
