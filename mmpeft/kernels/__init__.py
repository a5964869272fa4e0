"""Fused kernels: what makes low-rank adapters as cheap in time as they are in FLOPs.

    lowrank_linear   y = x W^T + b + s (x A^T) B^T for one linear, a drop-in for the three-launch form
    lowrank_group    the same for linears that share their input (q|k|v, gate|up), as one K-extended GEMM on
    `PackedGroup` llama            a whole Llama-type training step (norm, RoPE, attention, SwiGLU, loss) with the
    fewest passes over memory

Each kernel stands beside its plain-torch reference, which runs where the kernel cannot (no GPU, no Triton); the log
says so once. Nothing here imports Triton until a CUDA tensor arrives.

The repository's root has a link `kernels -> mmpeft/kernels`, and `kernels` is also the name of the hub library that
transformers probes for. Imported under that name, this file steps aside: it loads the hub library from further along
`sys.path`, or, where there is none, looks like the empty namespace package that transformers counts as "not installed".
(Raising here instead breaks `import transformers` >= 5.24, which imports what `find_spec` finds.)
"""

from __future__ import annotations

if __name__ == "mmpeft.kernels":
    from mmpeft.kernels.lowrank import lowrank_linear
    from mmpeft.kernels.packed import PackedGroup, lowrank_group
    from mmpeft.kernels.reference import dropout_mask

    __all__ = ["PackedGroup", "dropout_mask", "lowrank_group", "lowrank_linear"]
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
