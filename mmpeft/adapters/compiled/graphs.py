"""CUDA graphs for forwards without gradients: one capture a shape, replayed with the inputs copied into place.

At batch 1 a policy step or a vision tower is hundreds of launches of a few microseconds each, so the host is the limit;
a replay is one launch. Adapters stay unmerged: their tensors are read where they lie, so training them or `use` of
another one among `mmpeft.stack`ed adapters (an index tensor) needs no new capture; what is another program (another
active set) is another key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

LIMIT = 8  # captures kept a module: each holds its activations' memory


class Graphed:
    """`fn` of tensors (and constants), replayed as a CUDA graph for every signature of its arguments seen.

    Args:
        fn: a function without side effects and without host synchronisation, run under no_grad.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.captures: OrderedDict[Any, Capture] = OrderedDict()

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """fn(*args, **kwargs); `key`: whatever else decides which program runs."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not tensors or not all(t.is_cuda for t in tensors) or torch.cuda.is_current_stream_capturing():
            return self.fn(*args, **kwargs)
        signature = (key, spec, *map(_signature, leaves))
        capture = self.captures.get(signature)
        if capture is None:
            capture = self.captures[signature] = Capture(self.fn, leaves, spec)
            while len(self.captures) > LIMIT:
                self.captures.popitem(last=False)
        self.captures.move_to_end(signature)
        return capture.replay(tensors)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class Capture:
    """One captured call."""

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        self.inputs = [x.clone() for x in leaves if isinstance(x, Tensor)]
        copies = iter(self.inputs)
        args, kwargs = tree_unflatten([next(copies) if isinstance(x, Tensor) else x for x in leaves], spec)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes and picks kernels outside of the capture
                fn(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = fn(*args, **kwargs)

    def replay(self, tensors: list[Tensor]) -> Any:
        """The output for other inputs of the same signature; the caller's own copy."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.output)
