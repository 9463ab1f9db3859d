"""tools/huggingface.py: a folder that is read back as the model that it was made of."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_predict import model, photo  # noqa: F401

import sst
from sst.errors import InputError

ROOT = Path(__file__).parent.parent
pytest.importorskip("safetensors", reason="optional: pip install safetensors")


def test_the_folder_is_the_same_parser(model, tmp_path):  # noqa: F811
    command = [sys.executable, ROOT / "tools/huggingface.py", model, tmp_path / "hub", "--name", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'hub'}\n", done.stderr
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "hub/README.md").read_text()
    assert "# tiny" in card and "| mine | background, hat, shoe |" in card
    before, after, image = sst.load(model), sst.load(tmp_path / "hub"), photo(40, 48)
    assert after.legend() == before.legend() and after.size == before.size
    for name, domain in before.domains.items():
        assert after.domains[name].to_dict() == domain.to_dict()
    for name, mask in before(image).items():
        assert np.array_equal(mask, after(image)[name])
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.endswith("hub: is not empty; give a folder that is\n")

    config = json.loads((tmp_path / "hub/config.json").read_text())
    (tmp_path / "hub/config.json").write_text(json.dumps(config | {"arch": config["arch"] | {"dim": 96}}))
    with pytest.raises(InputError, match="model.safetensors: "):
        sst.load(tmp_path / "hub")
    (tmp_path / "hub/config.json").unlink()
    with pytest.raises(InputError, match="model.safetensors: not a readable checkpoint"):
        sst.load(tmp_path / "hub")


def test_the_package_that_it_needs(model, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="needs the package safetensors, which is not installed; run: pip"):
        sst.load(tmp_path)
