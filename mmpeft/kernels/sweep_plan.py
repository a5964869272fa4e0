"""Which tile shape of `sweep.mlp_backward` a device runs fastest, or none where the unfused kernels are faster."""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmpeft.kernels import tuning
from mmpeft.kernels.sweep import Config, configs, mlp_backward


@functools.cache
def plan(
    T: int, F: int, R: int, ranks: tuple[int, int, int], dtype: torch.dtype, device: torch.device, scaled: bool = False,
    dropped: bool = False,
) -> Config | None:  # fmt: skip
    """The fastest tile shape for `mlp_backward` at this size and device, or None where the unfused kernels are faster.

    Timed once a size and device, on random data (`tuning`). Off the GPU (in the interpreter) the first shape
    is taken. `scaled`: with DoRA's factors in it; `dropped`: with the down projection's dropout.
    """
    choices = configs(ranks)
    if not choices or device.type != "cuda":
        return choices[0] if choices else None
    if dtype not in (torch.bfloat16, torch.float16):  # tiles of twice the bytes do not fit shared memory
        return None
    from mmpeft.kernels.dropout import Dropped, add_masked
    from mmpeft.kernels.elementwise import swiglu_backward
    from mmpeft.kernels.row_kernels import scale_backward_into

    factor = torch.ones(2 * F, device=device) if scaled else None
    scaling = None if factor is None else (factor, factor)
    mask = Dropped(0.05, torch.zeros(1, dtype=torch.int64, device=device)) if dropped else None

    @functools.cache  # made only if something is timed
    def data() -> tuple[Tensor, ...]:
        make = functools.partial(torch.randn, dtype=dtype, device=device)
        dS_down = make(T, 16 * -(-max(ranks[2], 1) // 16))
        out = [torch.empty(F * r, device=device) for r in ranks]
        A = make(dS_down.shape[1], F)
        return make(T, F), make(T, 2 * F), make(T, 2 * F + R), make(T, R), dS_down, make(2 * F, R), A, *out

    def unfused() -> None:
        dh, gate_up, dgu, S, dS_down, B, A, *_ = data()
        dy = dgu[:, : 2 * F]
        if mask is not None:
            add_masked(dh, dS_down, A, mask)
        swiglu_backward(dh, gate_up, dy, dh, scaling)
        if factor is not None:
            scale_backward_into(dy, gate_up, factor, dy)
        torch.mm(dgu[:, : 2 * F], B, out=dgu[:, 2 * F :])
        for half in dgu[:, : 2 * F].split(F, 1):
            torch.mm(half.mT, S[:, : max(ranks[:2])], out_dtype=torch.float32)
        torch.mm(dS_down.mT, dh if mask is None else mask.of(dh), out_dtype=torch.float32)

    def swept(config: Config) -> None:
        dh, gate_up, dgu, S, dS_down, B, A, *out = data()
        mlp_backward(
            dh, gate_up, dgu, S, dS_down, B, ranks, (1.0, 1.0), out[0], out[1], out[2], config, scaling=scaling,
            masked=None if mask is None else (mask, A),
        )  # fmt: skip

    names = {str(c): c for c in choices}
    candidates: dict[str, Callable[[], None]] = {"unfused": unfused}
    candidates |= {name: functools.partial(swept, c) for name, c in names.items()}
    op = "mlp_backward" + "_dora" * scaled + "_dropout" * dropped
    best = tuning.choose(op, (T, F, R, ranks, dtype), candidates, device, otherwise="unfused")
    return names.get(best)
