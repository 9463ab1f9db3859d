"""Damaged and hostile files: checkpoints, photos and labels load as they were saved, or are refused."""

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sst import checkpoint
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.files import read_image
from sst.labels import read_label


def content(step=3):
    return {"format": 1, "arch": {}, "domains": [], "weights": {"w": torch.arange(40.0), "b": torch.ones(3)},
            "optimizer": {}, "scaler": {}, "step": step, "best": 1.0, "counts": {}, "lists": {},
            "config": {"lr": 0.1}}


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def mutated(data, rng):
    """One of: a bit flipped, a stretch overwritten, cut short, a stretch cut out, something added."""
    data, place, length = bytearray(data), rng.randrange(len(data)), rng.randrange(1, 30)
    kind = rng.randrange(5)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place:place + length] = rng.randbytes(length)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        del data[place:place + length]
    else:
        data[place:place] = rng.randbytes(length)
    return bytes(data)


def test_a_damaged_checkpoint_is_refused_or_loads_as_it_was_saved(tmp_path):
    """100 mutations: none loads as something else, none raises anything but the sentence."""
    path, rng = tmp_path / "last.pt", random.Random(0)
    checkpoint.save(content(), path)
    whole, refused = path.read_bytes(), 0
    for _ in range(100):
        path.write_bytes(mutated(whole, rng))
        try:
            assert same(checkpoint.load(path, "run"), content())
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 50, "a mutation in the padding between records may be harmless, most are not"


def test_a_checkpoint_of_a_million_names_is_refused_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    torch.save(content() | {"domains": [f"class {n}" for n in range(300_000)]}, path)
    monkeypatch.setattr(torch, "load", None)  # whose reading takes seconds
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(path, "run")


def test_a_strangers_checkpoint_runs_no_code(tmp_path):
    class Stranger:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "last.pt"
    torch.save(content() | {"step": Stranger()}, path)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(path, "run")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_last_checkpoint_points_to_the_one_before(tmp_path):
    for step in (3, 6):
        checkpoint.save_last(content(step), tmp_path)
    assert checkpoint.load_last(tmp_path)[0]["step"] == 6
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"not a readable checkpoint .*; the checkpoint before it, "
                                         r"of step 3, is whole: mv .*previous.pt .*last.pt"):
        checkpoint.load_last(tmp_path)
    (tmp_path / "last.pt").unlink()  # killed between the two renamings
    assert checkpoint.load_last(tmp_path)[0]["step"] == 3
    (tmp_path / "previous.pt").unlink()
    assert checkpoint.load_last(tmp_path) == (None, None)


# Files ------------------------------------------------------------------------------------------------------


def test_mutated_photos_and_labels_load_or_are_refused(tmp_path):
    """100 of each: pixels of the right type and size, class ids of the domain, or one sentence."""
    domain, rng = builtin_domain("pascal"), random.Random(0)
    pixels = np.random.default_rng(0)
    photo, label = tmp_path / "photo.jpg", tmp_path / "label.png"
    Image.fromarray(pixels.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(photo)
    Image.fromarray(np.sort(pixels.integers(0, 7, (40, 30), dtype=np.uint8), axis=0)).save(label)
    refused = {photo: 0, label: 0}
    for path in refused:
        whole = path.read_bytes()
        for _ in range(100):
            path.write_bytes(mutated(whole, rng))
            try:
                array = read_image(path)[0] if path == photo else read_label(path, domain)
                assert array.dtype == np.uint8 and array.ndim == (3 if path == photo else 2) and array.size
                assert path == photo or np.isin(array, [*range(7), 255]).all()
            except InputError as error:
                refused[path] += 1
                assert str(path) in str(error) and "\n" not in str(error)
        path.write_bytes(whole)
    assert refused[photo] > 10 and refused[label] > 50
