"""What has to be true before any test module is imported."""

import os

import torch

# Triton decides when it is first imported whether kernels are compiled or interpreted, and many libraries import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
