"""Fused kernels: what makes low-rank adapters as cheap in time as they are in FLOPs.

    lowrank_linear   y = x W^T + b + s (x A^T) B^T for one linear, a drop-in for the three-launch form
    lowrank_updates  the same for several adapters on one linear, on row ranges of it, and with DoRA's row factor
    lowrank_group    the same for linears that share their input (q|k|v, gate|up), one K-extended GEMM (`PackedGroup`)
    add_grouped      every row of a batch under an adapter of its own
    llama            a whole Llama-type training step (norm, RoPE, attention, SwiGLU, loss) with the fewest passes over
                     memory; `fuse` finds one in a model
    rope_attention   RoPE, the low-rank terms of q, k, v and causal attention of a short forward in one launch
    short_attention  attention over a ViT's few tokens, whose backward writes straight into the block's wide buffer

Each kernel stands beside its plain-torch reference, which runs where the kernel cannot (no GPU, no Triton); the log
says so once. Nothing here imports Triton until a CUDA tensor arrives.

The repository's root has a link `kernels -> mmpeft/kernels`, and `kernels` is also the name of the hub library that
transformers probes for. Imported under that name, this file steps aside: it loads the hub library from further along
`sys.path`, or, where there is none, looks like the empty namespace package that transformers counts as "not installed".
(Raising here instead breaks `import transformers` >= 5.24, which imports what `find_spec` finds.)
"""

from __future__ import annotations

if __name__ == "mmpeft.kernels":
    from mmpeft.kernels.grouped import add_grouped
    from mmpeft.kernels.lowrank import Update, lowrank_linear, lowrank_updates, worth_fusing
    from mmpeft.kernels.packed import PackedGroup, lowrank_group
    from mmpeft.kernels.reference import dropout_mask

    __all__ = [
        "PackedGroup",
        "Update",
        "add_grouped",
        "dropout_mask",
        "lowrank_group",
        "lowrank_linear",
        "lowrank_updates",
        "worth_fusing",
    ]
else:
    import os
    import sys
    from importlib.machinery import PathFinder

    _here = os.path.dirname(os.path.realpath(__file__))
    _spec = PathFinder.find_spec(
        __name__, [p for p in sys.path if os.path.realpath(os.path.join(p, __name__)) != _here]
    )
    _module = sys.modules[__name__]
    if _spec is not None and _spec.loader is not None:
        _module.__spec__, _module.__loader__ = _spec, _spec.loader
        _module.__file__, _module.__path__ = _spec.origin, list(_spec.submodule_search_locations or [])
        _spec.loader.exec_module(_module)
    else:
        del __file__
        __path__ = []
