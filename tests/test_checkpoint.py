"""Checkpoints that are not what they should be are refused in one sentence; a failed write loses nothing."""

import zipfile

import pytest
import torch

from sst import checkpoint, scenarios
from sst.config import FIGURES, preset
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.model import Arch

TINY = Arch(blocks=(1, 1, 1, 1), width=8, dim=32, heads=2, layers=1, ffn=32, window=4)
DOMAINS = [builtin_domain(name) for name in FIGURES]
BASE = preset("demo") | dict(arch=TINY, seed=0, mode="universal")


def test_a_checkpoint_of_another_kind_architecture_or_domain_set(tmp_path):
    model = scenarios.build(BASE, DOMAINS)
    path = tmp_path / "model.pt"
    good = checkpoint.model_content(model.net, DOMAINS, (64, 48))

    def refused(content, message):
        checkpoint.save(content, path)
        with pytest.raises(InputError) as caught:
            checkpoint.load_model(path)
        sentence = str(caught.value)
        assert message in sentence and str(path) in sentence and "\n" not in sentence

    refused(good | {"domains": good["domains"][:2]},
            "heads.cihp.weight is (20, 32, 1, 1) there and absent here")
    refused(good | {"arch": good["arch"] | {"dim": 64}}, "encoder.level is (3, 32) there and (3, 64) here")
    refused(good | {"arch": good["arch"] | {"dim": "wide"}}, "cannot be built (")
    refused(good | {"arch": {"dim": 64}}, "its architecture is")
    weights = good["weights"]
    for key, value in (("heads.atr.bias", float("nan")), ("backbone.stem.0.weight", float("inf"))):
        key = key if key in weights else next(iter(weights))
        refused(good | {"weights": weights | {key: torch.full_like(weights[key], value)}},
                f"{key} holds numbers that are not finite")
    for photos in ({"size": [64]}, {"size": "64x64"}, {"size": [64, 0]}, {"size": [64, 10 ** 9]}, [64, 64]):
        refused(good | {"photos": photos}, "expected their size, such as")
    refused(good | {"format": 2}, "format 2; this version reads format 1")
    refused({"weights": {}}, "lacks arch, domains, format")
    refused([1, 2], "lacks arch, domains, format, weights")
    path.write_bytes(b"PK\x03\x04 no checkpoint")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load_model(path)
    with pytest.raises(InputError, match="no such file"):
        checkpoint.load_model(tmp_path / "none.pt")


def test_made_up_sizes_and_packed_gigabytes_are_refused_before_memory_is_taken(tmp_path):
    model = scenarios.build(BASE, DOMAINS)
    path, good = tmp_path / "model.pt", checkpoint.model_content(model.net, DOMAINS, None)
    for change in ({"dim": 100_000}, {"layers": 1_000_000}, {"blocks": [1, 1, 10 ** 6, 1]}, {"ffn": 10 ** 9}):
        checkpoint.save(good | {"arch": good["arch"] | change}, path)
        with pytest.raises(InputError, match="the file was damaged or made up"):
            checkpoint.load_model(path)
    wide = {"heads.atr.weight": torch.zeros(1).expand(10 ** 5, 10 ** 5)}
    checkpoint.save(good | {"weights": good["weights"] | wide}, path)
    with pytest.raises(InputError, match="its weights claim to be larger than the file"):
        checkpoint.load_model(path)
    for weights in ([1], {"heads.atr.weight": 3}):
        checkpoint.save(good | {"weights": weights}, path)
        with pytest.raises(InputError, match="its weights are no tensors by name"):
            checkpoint.load_model(path)
    checkpoint.save(good, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    largest = max(members, key=lambda name: len(members[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(2 ** 26) if name == largest else content)
    assert path.stat().st_size < 2 ** 24
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load_model(path)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)
    with pytest.raises(Exception):
        checkpoint.save({"step": lambda: None}, path)  # cannot be pickled
    assert torch.load(path, weights_only=True) == {"step": 1}
