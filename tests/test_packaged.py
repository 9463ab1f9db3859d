"""The weights that the package carries: a photo's label maps without training, a model or a network.

How good they are on photos is in docs/model-card.md; drawn figures are here, which every clone has.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import sst
from figures import Figures
from sst import checkpoint, runs
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.metrics import confusion, scores
from sst.model import ParsingNet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import model_card  # noqa: E402
import train_parser  # noqa: E402

DOMAINS = ["ccp-coarse", "ccp-middle", "ccp-fine", "pascal", "atr", "cihp"]


@pytest.fixture(scope="module")
def parser():
    return sst.load()


@pytest.fixture
def photo(tmp_path):
    image, _ = Figures(builtin_domain("atr"), 7, 1, (120, 80)).load(0)
    Image.fromarray(image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_file_of_ten_megabytes_with_six_label_sets(parser, photo):
    assert checkpoint.PACKAGED.stat().st_size < 10e6
    assert list(parser.domains) == DOMAINS and parser.size == (288, 192)
    assert all(w.dtype == torch.float32 for w in parser.net.parameters()), "only the file is halved"
    masks = parser(photo)
    assert list(masks) == DOMAINS and all(mask.shape == (120, 80) for mask in masks.values())


@pytest.mark.parametrize("name, least", [("pascal", 70), ("atr", 50), ("cihp", 45)])
def test_it_parses_figures_that_it_was_not_trained_on(parser, name, least):
    data = Figures(builtin_domain(name), 2 ** 31, 12, parser.size)
    Z = data.domain.num_classes
    matrix = sum(confusion(parser(image, [name])[name], label, Z)
                 for image, label in (data.load(i) for i in range(len(data))))
    assert scores(matrix)["miou"] > least


def test_masks_across_label_sets(parser, photo):
    masks = parser(photo)
    sleeves = parser.mask(masks, "atr: upper-clothes, dress & pascal: upper arms, lower arms")
    arms = np.isin(masks["pascal"], [3, 4])
    assert (sleeves == (arms & np.isin(masks["atr"], [4, 7]))).all()


def test_predict_without_a_model(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    photo.rename(tmp_path / "folder/photo.png")
    for first in ("folder/photo.png", "folder"):
        monkeypatch.setattr(sys, "argv", ["predict.py", first, "--domains", "atr", "cihp"])
        predict.main()
        printed = capsys.readouterr().out
        assert "results of 1 photos are in predictions" in printed and "ccp-coarse (7 classes)" in printed
    results = {f"photo.{name}.{end}" for name in ("atr", "cihp") for end in ("png", "overlay.jpg")}
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == results | {"photo.all.jpg"}
    found = np.array(Image.open(tmp_path / "predictions/photo.atr.png"))
    assert (found == sst.load()("folder/photo.png")["atr"]).all()


def test_a_folder_of_a_run_is_no_folder_of_photos(photo, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path / "run"), str(photo)])
    with pytest.raises(InputError, match="run/model.pt: no such file; give a model.pt or best.pt"):
        predict.main()


def test_domains_that_it_does_not_have(photo, monkeypatch):
    for flags in (["--domains", "lip"], ["--domains", "atr", "--numbering", "cihp=viton-hd"]):
        monkeypatch.setattr(sys, "argv", ["predict.py", str(photo), "--out", "none", *flags])
        with pytest.raises(InputError, match="'lip' is none of ccp-coarse|DOMAIN being one of atr"):
            predict.main()


def test_torch_hub_finds_it(parser, photo):
    by_hub = torch.hub.load(str(ROOT), "parser", source="local")
    assert (by_hub(photo)["cihp"] == parser(photo)["cihp"]).all()


def test_a_package_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "PACKAGED", tmp_path / "parser.pt")
    with pytest.raises(InputError, match="parser.pt: no such file; this copy of the package came without"):
        sst.load()


def test_it_needs_three_lines(photo):
    code = "import sst, sys\nparser = sst.load()\nprint(sorted(parser(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, photo], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(sorted(DOMAINS)), done.stderr


# How it was made --------------------------------------------------------------------------------------------


def test_training_takes_all_training_photos_and_none_of_validation(tmp_path):
    specs = train_parser.folders(Path("PHOTOS"), tmp_path)
    assert [spec.split("=")[0] for spec in specs] == DOMAINS[:3]
    for spec in specs:
        fields = json.loads((Path(spec.split("=")[1]) / "domain.json").read_text())
        train, val = (set(Path(fields[split]).read_text().split()) for split in ("train", "val"))
        assert (len(train), len(val)) == (800, 104) and not train & val
        assert fields["images"] == "PHOTOS/photos"
        assert checkpoint.from_dict({key: fields[key] for key in ("name", "classes")}).num_classes > 1
    config = runs.configure(["--data", *specs, *(f"{name}=figures" for name in DOMAINS[3:]),
                             *train_parser.FLAGS, "--backbone-weights", "none", "--freeze-stages", "0"])
    assert (config.cross, config.beta, config.lam, config.steps) == (0.3, 0, 0, 6000)


def test_the_packed_file_is_the_network_in_half_precision(tmp_path):
    torch.manual_seed(0)
    net, domains = ParsingNet([builtin_domain("pascal")], "small"), [builtin_domain("pascal")]
    checkpoint.save(checkpoint.model_content(net, domains, (64, 48)), tmp_path / "model.pt")
    train_parser.pack(tmp_path / "model.pt", tmp_path / "parser.pt")
    assert (tmp_path / "parser.pt").stat().st_size < 0.6 * (tmp_path / "model.pt").stat().st_size
    whole, half = (sst.load(tmp_path / name) for name in ("model.pt", "parser.pt"))
    assert half.size == (64, 48)
    for key, value in half.net.state_dict().items():
        torch.testing.assert_close(value, whole.net.state_dict()[key], atol=1e-3, rtol=1e-3)


def test_the_card_s_tables_name_every_head_and_class():
    def scored(classes):
        return {"miou": 50.0, "iou": dict.fromkeys(classes, 50.0)}

    common = {name: scored(["background", "hat"]) for name in ("ccp-common via atr", "ccp-common via cihp")}
    single = common | {name: scored(builtin_domain(name).classes) for name in DOMAINS[:3]}
    text = "\n".join(model_card.tables(single, single, dict.fromkeys(DOMAINS[:3], 49.0)))
    assert text.count("| 50.0 | 50.0 | 49.0 |") == 3 and text.count("| 50.0 | 50.0 |  |") == 2
    assert all(f"{name} 50" in text for name in builtin_domain("ccp-fine").classes)
