"""The devices that a test runs on: the CPU, and a GPU where there is one. `pytest -m gpu` runs those of the GPU alone."""

import pytest
import torch

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


def on_gpu(*values: object) -> object:
    """A parameter's values for a test that needs a GPU."""
    return pytest.param("cuda", *values, marks=GPU)


DEVICES = ("cpu", on_gpu())
