"""Tests that need an accelerator; without one they are skipped, and say so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda():
    """Return the device, or skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    return torch.device("cuda")
