"""tools/convert.py: files by the published schemas become label maps, pixel for pixel, or one sentence."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sst.data import listing, open_dataset
from sst.errors import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import convert  # noqa: E402

H, W = 12, 16
HEAD = np.zeros((H, W), bool)
HEAD[1:4, 5:11] = True
COAT = np.zeros((H, W), bool)
COAT[3:10, 3:13] = True  # touches and overlaps the head
BOX = {"head": [(5, 1), (10, 1), (10, 3), (5, 3)], "coat": [(3, 3), (12, 3), (12, 9), (3, 9)]}


def photos(folder, names=("a", "b", "c")):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(folder / f"{name}.jpg")
    return folder


def run(monkeypatch, *arguments):
    listing.cache_clear()
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()
    listing.cache_clear()


def labels(out):
    """{id: label map} of both lists of a converted folder."""
    sets = [open_dataset(out.name, out, split) for split in ("train", "val")]
    assert len(sets[1]) == 1
    return {Path(data.where(i)).stem: data.load(i)[1] for data in sets for i in range(len(data))}


def runs(mask):
    """Lengths of runs of 0 and 1 in turn, down the columns: COCO's uncompressed RLE."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = 1 - value
        counts[-1] += 1
    return counts


def packed(counts):
    """The same as COCO writes it in strings, by the description of its format."""
    text = ""
    for n, count in enumerate(counts):
        value, more = count - (counts[n - 2] if n > 2 else 0), True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            text += chr(48 + (code | 32 * more))
    return text


def coco(shapes, classes=("coat", "head")):
    """A COCO file of three photos with these shapes: [(class, segmentation)], on each."""
    categories = [{"id": 10 + n, "name": name} for n, name in enumerate(classes)]
    ids = {c["name"]: c["id"] for c in categories}
    images = [{"id": n, "file_name": f"{name}.jpg", "height": H, "width": W} for n, name in enumerate("abc")]
    annotations = [{"id": n, "image_id": n, "category_id": ids[name], "segmentation": found, "iscrowd": 0}
                   for name, found in shapes for n in range(3)]
    return {"images": images, "categories": categories, "annotations": annotations}


def flat(points):
    return [float(v) for point in points for v in point]


@pytest.mark.parametrize("kind", ["polygons", "runs", "packed"])
def test_coco(tmp_path, monkeypatch, kind):
    segmentation = {
        "polygons": lambda name, mask: [flat(BOX[name])],
        "runs": lambda name, mask: {"size": [H, W], "counts": runs(mask)},
        "packed": lambda name, mask: {"size": [H, W], "counts": packed(runs(mask))}}[kind]
    shapes = [("head", segmentation("head", HEAD)), ("coat", segmentation("coat", COAT))]
    (tmp_path / "all.json").write_text(json.dumps(coco(shapes)))
    images = photos(tmp_path / "images")
    run(monkeypatch, "coco", tmp_path / "all.json", "--images", images, "--out", tmp_path / "given")
    wanted = np.where(COAT, 1, np.where(HEAD, 2, 0))
    found = labels(tmp_path / "given")
    assert sorted(found) == ["a", "b", "c"] and all((label == wanted).all() for label in found.values())
    run(monkeypatch, "coco", tmp_path / "all.json", "--images", images, "--out", tmp_path / "area", "--order",
        "area")
    on_top = np.where(HEAD, 2, np.where(COAT, 1, 0))
    assert all((label == on_top).all() for label in labels(tmp_path / "area").values())
    fields = json.loads((tmp_path / "area/domain.json").read_text())
    assert fields["classes"] == ["background", "coat", "head"] and fields["adjacency"] == [["coat", "head"]]
    assert not list((tmp_path / "area").glob("*.jpg")), "photos stay where they are"


def test_runs_as_the_format_describes_them():
    mask = np.random.default_rng(0).random((40, 30)) < 0.3
    mask[:, 20:] = True  # long runs, which take several characters
    assert convert.unpacked(packed(runs(mask))) == runs(mask)
    assert (convert.run_lengths((40, 30), packed(runs(mask))) == mask).all()
    assert convert.unpacked("11") == [1, 1] and convert.unpacked("0g0") == [0, 23]


def test_several_polygons_and_a_photo_without_any(tmp_path, monkeypatch):
    data = coco([("coat", [flat([(0, 0), (2, 0), (2, 2), (0, 2)]), flat([(8, 8), (9, 8), (9, 9), (8, 9)])])])
    data["annotations"] = data["annotations"][:2]
    (tmp_path / "all.json").write_text(json.dumps(data))
    run(monkeypatch, "coco", tmp_path / "all.json", "--images", photos(tmp_path / "images"), "--out",
        tmp_path / "out")
    found = labels(tmp_path / "out")
    assert found["a"].sum() == 9 + 4 and found["a"][9, 9] == 1 and not found["c"].any()


def test_labelme(tmp_path, monkeypatch):
    folder = photos(tmp_path / "given")
    image = io.BytesIO()
    Image.fromarray(HEAD[1:4, 5:11]).save(image, "PNG")
    for name in "abc":
        (folder / f"{name}.json").write_text(json.dumps({
            "version": "5.4.1", "flags": {}, "imagePath": f"{name}.jpg", "imageData": None,
            "imageHeight": H, "imageWidth": W, "shapes": [
                {"label": "Mantel", "shape_type": "rectangle", "points": [[3, 3], [12, 9]]},
                {"label": "Kopf", "shape_type": "mask", "points": [[5, 1], [10, 3]],
                 "mask": base64.b64encode(image.getvalue()).decode()},
                {"label": "Knopf", "shape_type": "circle", "points": [[7, 8], [8, 8]]},
                {"label": "Hut", "shape_type": "polygon", "points": [[6, 0], [9, 0], [9, 0.4], [6, 0.4]]}]}))
    run(monkeypatch, "labelme", folder, "--out", tmp_path / "out")
    label = labels(tmp_path / "out")["b"]
    assert json.loads((tmp_path / "out/domain.json").read_text())["classes"] == [
        "background", "Mantel", "Kopf", "Knopf", "Hut"]
    assert ((label == 2) == HEAD).all() and ((label == 1) | (label == 3))[COAT & ~HEAD].all()
    assert (label == 3).sum() == 5 and (label[0, 6:10] == 4).all()


def test_cvat(tmp_path, monkeypatch):
    given = tmp_path / "given"
    photos(given / "JPEGImages")
    (given / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\n"
                                        "coat:250,50,83::\nhead:51,221,255::\n")
    (given / "SegmentationClass").mkdir()
    colours = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255]], np.uint8)
    wanted = np.where(HEAD, 2, np.where(COAT, 1, 0))
    for name in "abc":
        Image.fromarray(colours[wanted]).save(given / f"SegmentationClass/{name}.png")
    run(monkeypatch, "cvat", given, "--out", tmp_path / "deep/out")
    assert all((label == wanted).all() for label in labels(tmp_path / "deep/out").values())


def test_voc(tmp_path, monkeypatch):
    assert [convert.voc_colour(k) for k in (0, 1, 2, 3, 8, 20)] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [0, 64, 128]]  # of VOC's kit
    wanted = np.where(HEAD, 2, np.where(COAT, 1, 0)).astype(np.uint8)
    wanted[0, 0] = 255
    (tmp_path / "labels").mkdir()
    for name in "abc":
        image = Image.fromarray(wanted)
        image.putpalette(sum([convert.voc_colour(k) for k in range(255)], []) + [224, 224, 192])
        image.save(tmp_path / f"labels/{name}.png")
    run(monkeypatch, "voc", tmp_path / "labels", "--images", photos(tmp_path / "images"), "--out",
        tmp_path / "out", "--classes", "background", "coat", "head")
    assert all((label == wanted).all() for label in labels(tmp_path / "out").values())


def test_what_is_refused_leaves_nothing_behind(tmp_path, monkeypatch):
    images = photos(tmp_path / "images")
    file, out = tmp_path / "all.json", tmp_path / "out"
    good = coco([("coat", [flat(BOX["coat"])])])

    def refused(message, data, *flags, kind="coco"):
        file.write_text(data if isinstance(data, str) else json.dumps(data))
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=message) as caught:
            run(monkeypatch, kind, file, "--images", images, "--out", out, *flags)
        assert sorted(tmp_path.iterdir()) == before and "\n" not in str(caught.value)

    refused("all.json: not readable as JSON", "{")
    refused("all.json: not what coco exports .KeyError: 'categories'", {"images": []})
    refused("its runs add up to 5 pixels, the photo has 192", coco([("coat", {"counts": [2, 3]})]))
    refused("images/d: no such photo .*--images names the", good | {
        "images": [{"id": 0, "file_name": "d.jpg", "height": H, "width": W}]})
    refused("two photos are called a, whatever", good | {"images": [good["images"][0], good["images"][0]]})
    refused("all.json: holds no JSON file", good, kind="labelme")
    refused("all.json/labelmap.txt: no such file; give the folder of CVAT's export", good, kind="cvat")
    refused("--val 0.0: must lie between", good, "--val", "0")
    out.mkdir()
    (out / "mine.txt").write_text("")
    refused("out: holds files already; give a new folder", good)


@pytest.mark.slow
def test_from_an_export_to_a_trained_run(tmp_path):
    """The commands of docs/usage.md, as programs."""
    shapes = [("head", [flat(BOX["head"])]), ("coat", [flat(BOX["coat"])])]
    (tmp_path / "all.json").write_text(json.dumps(coco(shapes)))
    photos(tmp_path / "images")
    small = ["--preset", "small", "--size", "32x32", "--crop", "32x32", "--batch-size", "2", "--workers", "0",
             "--steps", "1", "--validations", "1", "--lam", "0", "--out", "run"]
    for command in (["tools/convert.py", "coco", "all.json", "--images", "images", "--out", "mine"],
                    ["train.py", "--check", "--workers", "0", "--data", "mine=mine"],
                    ["train.py", "--data", "mine=mine", *small]):
        done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "run/model.pt").exists()
