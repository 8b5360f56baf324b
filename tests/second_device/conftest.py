"""These tests run where DIFFUSIONBLOCKS_TEST_DEVICE says: on `sim`, or on a card (`cuda`). `make test` runs them on
`sim`."""

import pytest
import torch

from tests.conftest import DEVICE

collect_ignore_glob = [] if DEVICE else ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE, 0)
