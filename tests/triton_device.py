"""Where kernels of Triton run in tests: on a GPU, or interpreted on the CPU, which conftest.py asks for."""

import importlib.util

import pytest
import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch on Linux only")
