import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests run from a clone, nothing installed


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors on several threads are slower, and the order of sums would depend on the machine."""
    torch.set_num_threads(1)
