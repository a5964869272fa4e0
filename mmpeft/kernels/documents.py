"""Several documents in one row: where each begins, and the position of every token within its own.

A batch [B, S] is read as one line of B * S tokens that documents cut without gaps (padding is a document like any other;
none crosses a row). `starts` is what varlen attention kernels take as cu_seqlens, `positions` what RoPE counts by. With a
fixed number of documents (`most`) every shape is fixed: the rest of `starts` repeats the end, which are documents of no
tokens, so a captured CUDA graph takes any batch that has no more. A batch with more is refused before it is copied in.

    Documents.of_ids(ids)            ids [B, S]: a document is a run of one id within a row (what `collate` packs)
    Documents.of_positions(p)        p [B, S]: a document begins at every 0 (what transformers is given)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.errors import ConfigError

SPARE = 16  # without `most`, the number of documents is rounded up to a multiple, so that few shapes arise


class Documents(NamedTuple):
    """Documents of a batch [B, S], as T = B * S tokens in one line.

    starts: int32 [most + 1]: the first token of each document, then T for all that is left. positions: int64 [T], from 0 in
    every document. longest: at least the longest document's tokens; S unless known better.
    """

    starts: Tensor
    positions: Tensor
    longest: int

    @staticmethod
    def of_ids(ids: Tensor, *, most: int | None = None) -> Documents:
        """From document ids [B, S], of any integer dtype.

        Raises:
            ConfigError: ids that are no [B, S] of integers, or more than `most` documents (ids on the CPU are counted for
                nothing, ids on a GPU cost one wait for it).
        """
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ConfigError(f"document ids {tuple(ids.shape)} of {ids.dtype}; expected integers [B, S]")
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return _of(begins, most)

    @staticmethod
    def of_positions(positions: Tensor, *, most: int | None = None) -> Documents:
        """From positions [B, S] that begin at 0 in every row, count on, and begin again at 0 with every document.

        Raises:
            ConfigError: positions that do neither, or more than `most` documents.
        """
        found = _of(positions == 0, most) if positions.ndim == 2 and bool((positions[:, 0] == 0).all()) else None
        if found is None or not torch.equal(found.positions, positions.reshape(-1).to(found.positions.dtype)):
            raise ConfigError("positions that neither count on nor begin again at 0; expected [B, S], each document's from 0")
        return found

    def ids(self) -> Tensor:
        """int64 [T]: the number of each token's document."""
        T = self.positions.shape[0]
        return torch.searchsorted(self.starts, torch.arange(T, device=self.starts.device, dtype=torch.int32), right=True)

    def mask(self, S: int) -> Tensor:
        """bool [B, 1, S, S]: whether a row's token (third axis) sees another (fourth): not later, of the same document."""
        ids = self.ids().view(-1, 1, S)
        return (ids[..., :, None] == ids[..., None, :]).tril()

    def first(self, S: int) -> Tensor:
        """bool [B, S]: whether a token is its document's first, which nothing before it predicts."""
        return self.positions.view(-1, S) == 0

    def copy_(self, other: Documents) -> None:
        """Another batch's documents into these tensors, of the same shapes, without waiting for the device."""
        self.starts.copy_(other.starts, non_blocking=True)
        self.positions.copy_(other.positions, non_blocking=True)


def empty(B: int, S: int, most: int, device: torch.device) -> Documents:
    """Tensors for up to `most` documents, one a row to begin with.

    Raises:
        ConfigError: fewer documents than rows.
    """
    if most < B:
        raise ConfigError(f"{most} documents in {B} rows; expected at least one a row")
    return _of(torch.arange(S, device=device).expand(B, S) == 0, most)


def _of(begins: Tensor, most: int | None) -> Documents:
    (B, S), device = begins.shape, begins.device
    line = begins.reshape(-1)
    count = int(line.sum())
    if most is not None and count > most:
        raise ConfigError(f"the batch holds {count} documents, padding included; this step was made for at most {most}")
    where = line.nonzero()[:, 0]
    places = -(-count // SPARE) * SPARE if most is None else most
    starts = torch.full((places + 1,), B * S, dtype=torch.int32, device=device)
    starts[:count] = where.to(torch.int32)
    at = torch.arange(B * S, device=device)
    return Documents(starts, at - where[line.cumsum(0) - 1], S)
