"""sst.load: label maps at the photo's size, lists, probabilities, masks by name, sizes, what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_predict import DOMAINS, ROOT, model, photo  # noqa: F401
from torch.overrides import TorchFunctionMode

import sst
from sst.checkpoint import save
from sst.errors import InputError, InputWarning
from sst.inference import label_map, photo_logits


@pytest.mark.parametrize("options, size", [({}, None), ({"size": (64, 48)}, (64, 48)),
                                           ({"max_side": 50}, (30, 50))])
def test_label_maps_are_the_classes_of_the_logits_that_validation_scores(model, options, size):
    image = photo(60, 100)
    parser = sst.load(model, **options)
    masks = parser(image)
    assert list(masks) == list(parser.domains) == ["pascal", "mine"]
    assert parser.domains["mine"].classes == DOMAINS[1].classes
    for name, logits in photo_logits(parser.net, image, size).items():
        assert masks[name].shape == (60, 100) and masks[name].dtype == np.uint8
        assert (masks[name] == logits.argmax(0).numpy()).all() and len(np.unique(masks[name])) > 1


def test_a_list_is_parsed_as_each_of_its_photos(model, monkeypatch):
    parser, sizes = sst.load(model), []
    photos = [photo(40, 48, 0), photo(33, 20, 1), photo(40, 48, 2), photo(40, 48, 3)]
    alone = [parser(image) for image in photos]
    forward = parser.net.forward
    monkeypatch.setattr(parser.net, "forward", lambda x, domains: (sizes.append(tuple(x.shape)),
                                                                   forward(x, domains))[1])
    together = parser(photos, batch_size=2)
    assert sizes == [(2, 3, 40, 48), (1, 3, 33, 20), (1, 3, 40, 48)]
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys() and all((one[name] == other[name]).mean() > 0.999 for name in one)
    assert parser([]) == []
    fitted = sst.load(model, size=(64, 48))
    assert [masks["mine"].shape for masks in fitted(photos)] == [(40, 48), (33, 20), (40, 48), (40, 48)]


def test_probabilities_and_some_of_the_domains(model):
    parser, image = sst.load(model), photo(30, 40)
    p = parser(image, domains=["mine"], probabilities=True)
    assert list(p) == ["mine"] and p["mine"].shape == (3, 30, 40) and p["mine"].dtype == np.float32
    np.testing.assert_allclose(p["mine"].sum(0), 1, atol=1e-5)
    masks = parser(image)
    assert (p["mine"].argmax(0) == masks["mine"]).all()
    assert (parser(image, domains=["pascal"])["pascal"] == masks["pascal"]).all()
    with pytest.raises(InputError, match="domains: 'atr' is none of pascal, mine"):
        parser(image, domains=["atr"])


def test_the_legend_names_ids_and_colours(model):
    parser = sst.load(model)
    legend = parser.legend()
    assert [entry[:2] for entry in legend["mine"]] == [("background", 0), ("hat", 1), ("shoe", 2)]
    assert [entry[2] for entry in legend["mine"]] == list(map(tuple, DOMAINS[1].palette().tolist()))


def test_a_device_that_is_not_there(model):
    with pytest.raises(InputError, match="device 'toaster': cannot be used here"):
        sst.load(model, device="toaster")
    with pytest.raises(InputError, match="half precision on 'cpu': is for GPUs"):
        sst.load(model, device="cpu", half=True)


# Masks by name

FOUR = {"pascal": np.array([[0, 1, 2, 3]], np.uint8), "mine": np.array([[0, 1, 1, 2]], np.uint8)}


@pytest.mark.parametrize("text, wanted", [
    ("mine: hat", [0, 1, 1, 0]),
    ("mine: hat, shoe", [0, 1, 1, 1]),
    ("mine:hat,shoe", [0, 1, 1, 1]),
    ("mine: hat & pascal: torso", [0, 0, 1, 0]),
    ("mine: hat - pascal: torso", [0, 1, 0, 0]),
    ("pascal: torso | mine: shoe - pascal: torso", [0, 0, 0, 1]),  # from left to right
    ("pascal: torso | (mine: shoe - pascal: torso)", [0, 0, 1, 1]),
    ("(mine: hat, shoe) & (pascal: head | pascal: upper arms)", [0, 1, 0, 1]),
])
def test_masks_by_name(model, text, wanted):
    assert sst.load(model).mask(FOUR, text).tolist() == [[bool(n) for n in wanted]]


def test_a_mask_of_a_photo(model):
    parser, image = sst.load(model), photo(30, 40)
    masks = parser(image)
    assert (parser.mask(image, "mine: hat") == (masks["mine"] == 1)).all()


@pytest.mark.parametrize("text, message", [
    ("mine: hut", r"'hut' is no class of mine, which has hat$"),
    ("mine: torso", r"'torso' is no class of mine, which has .*; pascal has it$"),
    ("atr: hat", "'atr' is none of the label domains pascal, mine; write pascal: class"),
    ("hat", "'hat' does not say which of the label domains pascal, mine"),
    ("mine: hat &", "a set is missing"),
    ("& mine: hat", "a set is missing"),
    ("", "a set is missing"),
    ("mine: hat, ", "'' is no class of mine"),
    ("(mine: hat", "a parenthesis is not closed"),
    ("mine: hat)", "a closing parenthesis too many"),
    ("mine: hat (pascal: head)", r"'\(' follows a set without"),
])
def test_expressions_that_mean_nothing(model, text, message):
    parser = sst.load(model)
    for image in (FOUR, "none.jpg"):  # said before any photo is read
        with pytest.raises(InputError, match=message):
            parser.mask(image, text)


@pytest.mark.parametrize("h, w", [(70, 90), (7, 5), (41, 300)])
def test_the_argmax_in_strips_is_the_argmax_of_the_resized_logits(monkeypatch, h, w):
    torch.manual_seed(1)
    A = torch.randn(5, 20, 30)
    whole = F.interpolate(A[None], size=(h, w), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    for strip in (1, 3 * 5 * w, 10 ** 9):  # one row, three rows, all at once
        monkeypatch.setattr("sst.inference.STRIP", strip)
        assert (label_map(A, h, w) == whole).all()


def test_regions_of_one_class_are_found_without_working_out_their_logits():
    """Large areas of few classes, as people have them: the same label map as of all logits."""
    torch.manual_seed(0)
    A = F.interpolate(torch.randn(1, 7, 4, 3), size=(72, 48), mode="bicubic")[0]
    whole = F.interpolate(A[None], size=(511, 387), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    assert (label_map(A, 511, 387) == whole).all() and len(np.unique(whole)) == 6


def test_no_strip_holds_many_logits():
    """Of 14 million logits at the photo's size no more than a million are there at a time."""
    class Largest(TorchFunctionMode):
        size = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with Largest() as largest:
        label_map(torch.rand(30, 6, 8), 600, 800)
    assert 600 * 800 <= largest.size <= 2 ** 20


def test_a_path_a_pil_image_and_an_array_give_the_same(model, tmp_path):
    Image.fromarray(photo(50, 40)).save(tmp_path / "a.png")
    parser = sst.load(str(model))
    expected = parser(photo(50, 40))
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        masks = parser(image)
        assert all((masks[name] == expected[name]).all() for name in expected)


def test_photos_of_any_mode(model, tmp_path):
    parser = sst.load(model)
    grey = np.arange(40 * 48).reshape(40, 48) // 8 % 256
    as_rgb = parser(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8))
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "L.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "16.png")
    for image in ("L.png", "16.png"):
        assert (parser(tmp_path / image)["pascal"] == as_rgb["pascal"]).all()
    colour = Image.fromarray(photo(40, 48))
    colour.convert("RGBA").save(tmp_path / "RGBA.png")
    assert (parser(tmp_path / "RGBA.png")["pascal"] == parser(colour)["pascal"]).all()
    for mode, ending in (("CMYK", "jpg"), ("P", "png"), ("1", "png")):
        colour.convert(mode).save(tmp_path / f"{mode}.{ending}")
        assert parser(tmp_path / f"{mode}.{ending}")["mine"].shape == (40, 48)


@pytest.mark.parametrize("h, w", [(1, 1), (2, 700), (33, 1)])
def test_photos_of_a_few_pixels(model, h, w):
    assert sst.load(model, max_side=100)(photo(h, w))["pascal"].shape == (h, w)


@pytest.mark.parametrize("image, message", [
    (np.zeros((4, 5, 3), np.float32), r"shape \(4, 5, 3\), float32; give \(h, w, 3\) uint8"),
    (np.zeros((4, 5), np.uint8), r"shape \(4, 5\), uint8"),
    (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
    (torch.zeros(3, 4, 5), "of type Tensor; give a path"),
    ("none.jpg", "none.jpg: not a readable photo .*No such file"),
])
def test_what_is_no_photo_is_refused(model, image, message):
    with pytest.raises(InputError, match=message):
        sst.load(model)(image)


def test_the_size_is_the_run_s_unless_one_is_given(model, tmp_path):
    content = torch.load(model, weights_only=True)
    save(content | {"photos": content["photos"] | {"size": [96, 64]}}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"size": [1, 2]}')  # of another run
    assert sst.load(tmp_path).size == sst.load(tmp_path / "model.pt").size == (96, 64)
    assert sst.load(tmp_path, size=(32, 48)).size == (32, 48)
    parser = sst.load(tmp_path, max_side=50)
    assert parser.size is None and parser.max_side == 50
    save(content, tmp_path / "model.pt")
    assert sst.load(tmp_path).size is None and sst.load(tmp_path).max_side == 1024
    with pytest.raises(InputError, match="give one of them"):
        sst.load(model, size=(32, 32), max_side=50)
    with pytest.raises(InputError, match=r"size is 512; it must be"):
        sst.load(model, size=512)
    for side in (0, -3, "64", 0.5):
        with pytest.raises(InputError, match=f"max_side is {side!r}; it must be a number of pixels, 1 or mo"):
            sst.load(model, max_side=side)


def test_a_file_of_an_earlier_version_has_the_size_in_the_config_json_beside_it(model, tmp_path):
    old = torch.load(model, weights_only=True)
    del old["photos"], old["colours"]
    save(old, tmp_path / "model.pt")
    with pytest.warns(InputWarning, match="nor does a config.json beside it; photos keep their own size"):
        assert sst.load(tmp_path).size is None
    config = tmp_path / "config.json"
    for size in ((96, 64), None):
        config.write_text(json.dumps({"size": size, "crop": [32, 32]}))
        with pytest.warns(InputWarning, match="model.pt: does not say the size .*; .*config.json is taken"):
            assert sst.load(tmp_path).size == size
    for text in ('{"size": 96}', "{", "[]"):
        config.write_text(text)
        with (pytest.raises(InputError, match="config.json: not the settings of a run"),
              pytest.warns(InputWarning)):
            sst.load(tmp_path)
        assert sst.load(tmp_path, max_side=50).size is None, "a size that is given makes the file needless"


def test_importing_the_package_does_not_import_torch():
    code = ("import sst, sys; assert 'torch' not in sys.modules; import sst.domains; "
            "assert 'sst.inference' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pyproject_asks_for_what_requirements_txt_does():
    text = (ROOT / "pyproject.toml").read_text()
    wanted = [line for line in (ROOT / "requirements.txt").read_text().split() if line != "pytest"]
    assert [line for line in wanted if f'    "{line}",\n' not in text] == []
