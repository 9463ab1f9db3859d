import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests run from a clone, nothing installed


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors on several threads are slower, and the order of sums would depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Short runs of train.py would spend most of their time drawing: they get empty files.

    The mark `pictures` keeps them for a test that looks at them.
    """
    if "train" in sys.modules and not request.node.get_closest_marker("pictures"):
        for name in ("save_curves", "save_samples"):
            monkeypatch.setattr(f"train.{name}", lambda content, path: path.write_bytes(b""))
        monkeypatch.setattr("train.samples", lambda *args: [])
