"""Without a GPU the kernels run in Triton's interpreter; tests/conftest.py asks for it before anything imports Triton."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: the GPU, or CPU tensors under the interpreter."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions are fp32 whichever algorithm is picked, as matmuls are
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    """Both implementations, one after the other."""
    from mmpeft.kernels import dispatch

    if request.param == "triton" and not dispatch.triton_installed():
        pytest.skip("no Triton on this platform")
    with dispatch.backend(request.param):
        yield request.param
