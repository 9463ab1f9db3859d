"""What own datasets bring: labels that are colours, 1 or 16 bits deep, suffixes, splits, turned photos."""

import json

import numpy as np
import pytest
from PIL import Image

from sst.data import listing, open_dataset
from sst.domains import builtin_domain, from_dict, word_similarity
from sst.errors import InputError
from sst.labels import read_label

CLASSES = ["background", "hat", "shoe"]
IDS = np.array([[0, 1, 1, 2], [0, 0, 2, 2]], np.uint8)  # 2 x 4 pixels
COLOURS = {"background": [0, 0, 0], "hat": [255, 0, 0], "shoe": [0, 0, 255]}


def domain(**fields):
    return from_dict({"name": "mine", "classes": CLASSES} | fields)


def folder(root, files, **fields):
    """A dataset of its own: {path: array}."""
    listing.cache_clear()
    for path, array in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / path)
    (root / "domain.json").write_text(json.dumps({"name": "mine", "classes": CLASSES} | fields))
    return root


# One label file ---------------------------------------------------------------------------------------------


def test_labels_that_are_colours(tmp_path):
    path, rgb = tmp_path / "a.png", np.array([COLOURS[name] for name in CLASSES], np.uint8)[IDS]
    Image.fromarray(rgb).save(path)
    assert (read_label(path, domain(colours=COLOURS)) == IDS).all()
    Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    assert (read_label(path, domain(colours=COLOURS)) == IDS).all(), "also as a palette, whatever its order"
    rgb[1, 2] = 1, 2, 3
    Image.fromarray(rgb).save(path)
    with pytest.raises(InputError, match=r"a.png: the pixel at column 2, row 1 has the colour \[1, 2, 3\]"):
        read_label(path, domain(colours=COLOURS))
    for ignored in ([1, 2, 3], [[9, 9, 9], [1, 2, 3]]):
        label = read_label(path, domain(colours=COLOURS | {"ignore": ignored}))
        assert label[1, 2] == 255 and (np.delete(label.ravel(), 6) == np.delete(IDS.ravel(), 6)).all()
    assert domain(colours=COLOURS).palette().tolist() == list(COLOURS.values())


def test_labels_of_16_bits_and_of_1_bit(tmp_path):
    Image.fromarray(IDS.astype(np.uint16)).save(tmp_path / "deep.png")
    assert (read_label(tmp_path / "deep.png", domain()) == IDS).all()
    Image.fromarray(IDS.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="deep.png: raw label 600 found in a PNG of 16 bits; raw labels"):
        read_label(tmp_path / "deep.png", domain())
    Image.fromarray(IDS == 1).save(tmp_path / "flat.png")
    assert Image.open(tmp_path / "flat.png").mode == "1"
    assert (read_label(tmp_path / "flat.png", domain()) == (IDS == 1)).all()


def test_a_mask_of_0_and_255(tmp_path):
    Image.fromarray(np.where(IDS == 1, 255, 0).astype(np.uint8)).save(tmp_path / "a.png")
    person = from_dict({"name": "one", "classes": ["background", "person"],
                        "label_map": {"background": [0], "person": [255]}})
    assert (read_label(tmp_path / "a.png", person) == (IDS == 1)).all()


def test_class_names_in_any_language():
    german = from_dict({"name": "deutsch", "classes": ["Hintergrund", "Hut"],
                        "aliases": {"Hintergrund": "background", "Hut": "hat"}})
    english = from_dict({"name": "english", "classes": ["background", "hat"]})
    assert (word_similarity(german, builtin_domain("atr"))
            == word_similarity(english, builtin_domain("atr"))).all()
    assert from_dict(german.to_dict()) == from_dict(german.to_dict() | {})
    assert from_dict(german.to_dict()).aliases == german.aliases


# Finding files ----------------------------------------------------------------------------------------------


def test_suffixes_in_one_folder_and_a_share_that_validates(tmp_path):
    image = np.zeros((2, 4, 3), np.uint8)
    files = {f"all/{k}.png": image for k in range(10)} | {f"all/{k}_mask.png": IDS for k in range(10)}
    fields = {"images": "all", "labels": "all", "label_suffix": "_mask", "val": 0.2}
    root = folder(tmp_path, files, **fields)
    train, val = (open_dataset("mine", root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2) and not set(train.images) & set(val.images)
    assert all(label.stem == f"{image.stem}_mask" for image, label in zip(train.images, train.labels))
    assert (train.load(0)[1] == IDS).all()
    assert open_dataset("mine", root, "val").images == val.images, "the same photos every time"
    (root / "some.txt").write_text("1\n3\n5\n")
    root = folder(tmp_path, {}, **fields, train="some.txt")
    stems = [path.stem for split in ("train", "val") for path in open_dataset("mine", root, split).images]
    assert sorted(stems) == ["1", "3", "5"] and len(open_dataset("mine", root, "val")) == 1
    with pytest.raises(InputError, match="--split test: domain.json shares its photos out among train"):
        open_dataset("mine", root, "test")


def test_ids_with_endings_and_a_suffix_of_the_photo(tmp_path):
    root = folder(tmp_path, {"images/a_photo.png": np.zeros((2, 4, 3), np.uint8), "labels/a.png": IDS},
                  image_suffix="_photo")
    for id in ("a", "a.jpg"):
        (root / "train_id.txt").write_text(id)
        dataset = open_dataset("mine", root)
        assert (dataset.images[0].name, dataset.labels[0].name) == ("a_photo.png", "a.png")


@pytest.mark.parametrize("fields, message", [
    ({"val": 1.5}, "'val' is 1.5; it must be a path relative to this file, or the share of the photos"),
    ({"val": True}, "'val' is True; it must be a path"),
    ({"label_suffix": 3}, "'label_suffix' is 3; it must be what stands between an id and its ending"),
    ({"label_orientation": "up"}, "'label_orientation' is 'up'; it must be \"stored\" where labels lie as"),
])
def test_fields_that_mean_nothing(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        open_dataset("mine", folder(tmp_path, {}, **fields))


def test_lip_as_downloaded(tmp_path):
    for top in ("TrainVal_{}", "TrainVal_{0}/TrainVal_{0}"):
        root = tmp_path / top[-1]
        for split in ("train", "val"):
            for kind, part, array in (("images", "images", np.zeros((2, 4, 3), np.uint8)),
                                      ("parsing_annotations", "segmentations", IDS)):
                place = root / top.format(kind) / f"{split}_{part}"
                place.mkdir(parents=True)
                Image.fromarray(array).save(place / f"{split}1.png")
        assert [path.stem for path in open_dataset("lip", root, "val").images] == ["val1"]
        assert (open_dataset("lip", root).load(0)[1] == IDS).all()


# Photos that are turned -------------------------------------------------------------------------------------

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
UPRIGHT = {  # what EXIF orientations mean, on any array (h, w, ...)
    2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


def turned_photo(root, orientation, label, pixels=PIXELS, **fields):
    root = folder(root, {"labels/a.png": np.ascontiguousarray(label)}, **fields)
    (root / "images").mkdir(exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(root / "images/a.png", exif=exif)
    (root / "train_id.txt").write_text("a")
    return open_dataset("mine", root)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_photo_and_its_label_map_lie_upon_each_other(tmp_path, orientation):
    upright = UPRIGHT[orientation]
    for way, stored in (("stored", IDS), ("upright", upright(IDS))):
        dataset = turned_photo(tmp_path, orientation, stored, label_orientation=way)
        image, label = dataset.load(0)
        assert (image == upright(PIXELS)).all() and (label == upright(IDS)).all()
        image, label = dataset.load(0, (2, 2))
        assert image.shape[:2] == label.shape == upright(IDS).shape


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_shape_tells_how_a_label_map_lies_or_nothing_does(tmp_path, orientation):
    for way in (IDS, UPRIGHT[orientation](IDS)):
        dataset = turned_photo(tmp_path, orientation, way)
        if orientation >= 5:
            assert (dataset.load(0)[1] == UPRIGHT[orientation](IDS)).all()
        else:
            with pytest.raises(InputError, match=r'a.png: the EXIF tag .* \(orientation .\), .*"stored"'):
                dataset.load(0)


def test_a_square_photo_tells_nothing(tmp_path):
    with pytest.raises(InputError, match="orientation 6.*label_orientation"):
        turned_photo(tmp_path, 6, IDS[:, :2], PIXELS[:, :2]).load(0)
    image, label = turned_photo(tmp_path, 6, IDS[:, :2], PIXELS[:, :2], label_orientation="stored").load(0)
    assert (label == np.rot90(IDS[:, :2], -1)).all()


def test_a_label_map_of_neither_shape(tmp_path):
    with pytest.raises(InputError, match="is 3x2 but its photo .* is 2x4, turned as its EXIF tag says"):
        turned_photo(tmp_path, 6, IDS[:, :3]).load(0)


def test_check_counts_photos_that_are_turned(tmp_path):
    from sst.check import Tally
    for orientation, turned in ((6, 1), (3, 1), (1, 0)):
        assert Tally(turned_photo(tmp_path, orientation, IDS)).turned == turned


def test_training_and_prediction_see_the_same_photo(tmp_path):
    from sst.files import pixels
    dataset = turned_photo(tmp_path, 8, IDS)
    assert (dataset.load(0)[0] == pixels(dataset.images[0])).all()
