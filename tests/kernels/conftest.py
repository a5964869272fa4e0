"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: the GPU, or CPU tensors under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    """Both implementations, one after the other."""
    from mmpeft.kernels import dispatch

    if request.param == "triton" and not dispatch.triton_installed():
        pytest.skip("no Triton on this platform")
    with dispatch.backend(request.param):
        yield request.param
