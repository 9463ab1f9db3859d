"""The layouts of datasets, and what is said of files that cannot be used."""

import json
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from sst.data import named_paths, open_dataset
from sst.domains import HERE
from sst.errors import InputError

LAYOUTS = {  # images, labels, list, as published; the split is train
    "pascal": ("JPEGImages", "SegmentationPart", "list/train_id.txt"),
    "atr": ("JPEGImages", "SegmentationClassAug", "list/train_id.txt"),
    "cihp": ("Images", "Category_ids", "lists/train_id.txt"),
    "lip": ("train_images", "train_segmentations", "train_id.txt"),
}


SCIPY = "MATLAB files need scipy; .ci/run installs it for this"
OWN = ("images", "labels", "train_id.txt")  # of a domain.json that says nothing of them
SHARED = ("../photos", "labels", "lists/t.txt")


def write(root, images, labels, listed, ids=("a", "b.1"), top=3, palette=False):
    """Photos of 6 x 4 pixels with labels 0..top."""
    for folder in (images, labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for n, id in enumerate(ids):
        Image.fromarray(np.full((4, 6, 3), 40 * n, np.uint8)).save(root / images / f"{id}.jpg")
        label = Image.fromarray((np.arange(24).reshape(4, 6) % (top + 1)).astype(np.uint8))
        if palette:
            label.putpalette([7, 8, 9] * 256)
        label.save(root / labels / f"{id}.png")
    if listed:
        (root / listed).parent.mkdir(parents=True, exist_ok=True)
        (root / listed).write_text("\n".join(ids) + "\n\n")
    return root


def own(root, **fields):
    """A dataset with a domain.json of its own."""
    fields = {"name": "mine", "classes": ["background", "hat", "shoe", "bag"]} | fields
    root.mkdir(exist_ok=True)
    (root / "domain.json").write_text(json.dumps(fields))
    return root


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(tmp_path, name, palette):
    dataset = open_dataset(name, write(tmp_path, *LAYOUTS[name], palette=palette))
    assert len(dataset) == 2 and dataset.domain.name == name
    image, label = dataset.load(1)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8 and abs(int(image.mean()) - 40) <= 1
    assert label.dtype == np.uint8 and (label == np.arange(24).reshape(4, 6) % 4).all()
    assert dataset.where(1).endswith("b.1.jpg")


def test_cihp_as_downloaded(tmp_path):
    write(tmp_path, "Training/Images", "Training/Category_ids", None, ids=("2", "1"))
    write(tmp_path, "Validation/Images", "Validation/Category_ids", None, ids=("3",))
    assert [path.stem for path in open_dataset("cihp", tmp_path).images] == ["1", "2"]
    assert len(open_dataset("cihp", tmp_path, "val")) == 1


def test_own_dataset_by_folder_and_by_file(tmp_path):
    write(own(tmp_path / "d"), *OWN)
    for path in (tmp_path / "d", tmp_path / "d" / "domain.json"):
        dataset = open_dataset("any-name", path)
        assert dataset.domain.name == "any-name" and dataset.domain.classes[1] == "hat" and len(dataset) == 2


def test_two_domains_may_share_a_photo_folder(tmp_path):
    write(own(tmp_path / "one", images="../photos", train="lists/t.txt"), *SHARED)
    (tmp_path / "one" / "labels").rename(tmp_path / "labels-two")
    write(own(tmp_path / "one", images="../photos", train="lists/t.txt"), *SHARED)
    own(tmp_path / "two", images="../photos", labels="../labels-two", train="../one/lists/t.txt")
    a, b = (open_dataset(*place) for place in (("a", tmp_path / "one"), ("b", tmp_path / "two")))
    assert [p.resolve() for p in a.images] == [p.resolve() for p in b.images] and a.labels != b.labels


def test_what_label_map_ignores_is_255(tmp_path):
    label_map = {"background": [0], "hat": [2], "shoe": [1], "bag": [], "ignore": [3]}
    root = write(own(tmp_path / "d", label_map=label_map), *OWN)
    label_map = {"background": [0], "hat": [2], "shoe": [1], "bag": [3]}
    plain = write(own(tmp_path / "plain", label_map=label_map), *OWN)
    label, bag = (open_dataset("mine", where).load(0)[1] for where in (root, plain))
    assert (bag == 3).any() and (label[bag == 3] == 255).all() and (label == bag)[bag != 3].all()


def test_label_map_translates_raw_labels(tmp_path):
    label_map = {"background": [0], "hat": [2, 3], "shoe": [1], "bag": []}
    root = write(own(tmp_path / "d", label_map=label_map), *OWN)
    label = open_dataset("mine", root).load(0)[1]
    assert (label == np.array([0, 2, 1, 1])[np.arange(24).reshape(4, 6) % 4]).all()


def test_255_is_ignored_unless_a_class_has_it(tmp_path):
    label_map = {"background": [0], "hat": [2], "shoe": [1], "bag": [3]}
    root = write(own(tmp_path / "d", label_map=label_map), *OWN)
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(root / "labels" / "a.png")
    assert (open_dataset("mine", root).load(0)[1] == 255).all()
    own(root, label_map=label_map | {"shoe": [255]})
    assert (open_dataset("mine", root).load(0)[1] == 2).all()


def ccp(root, tags=("null", "hair", "skin", "t-shirt")):
    """Clothing Co-Parsing as its repository comes, with few tags; `groundtruth` holds 0..3."""
    scipy_io = pytest.importorskip("scipy.io", reason=SCIPY)
    write(root, "photos", "unused", None, ids=("0001", "0002"))
    (root / "annotations/pixel-level").mkdir(parents=True)
    label = (np.arange(24).reshape(4, 6) % 4).astype(np.uint8)
    for id in ("0001", "0002"):
        scipy_io.savemat(root / f"annotations/pixel-level/{id}.mat", {"groundtruth": label})
    scipy_io.savemat(root / "label_list.mat", {"label_list": np.array([list(tags)], dtype=object)})
    (root / "train_id.txt").write_text("0001\n0002\n")
    return root


def test_clothing_co_parsing_tags_become_classes(tmp_path):
    root = ccp(tmp_path)
    own(root, labels="annotations/pixel-level", images="photos", classes=["background", "head", "body"],
        label_map={"background": ["null"], "head": ["hair"], "body": ["skin", "t-shirt"]})
    label = open_dataset("mine", root).load(1)[1]
    assert (label == np.array([0, 1, 2, 2])[np.arange(24).reshape(4, 6) % 4]).all()


def test_a_missing_scipy_is_named_before_anything_is_read(tmp_path, monkeypatch):
    own(write(tmp_path, *OWN))
    for file in list((tmp_path / "labels").iterdir()):
        file.rename(file.with_suffix(".mat"))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"\.mat: reading MATLAB files needs scipy; run: pip install scipy"):
        open_dataset("mine", tmp_path)


def test_clothing_co_parsing_tag_that_does_not_exist(tmp_path):
    root = ccp(tmp_path)
    own(root, labels="annotations/pixel-level", images="photos", classes=["background", "head"],
        label_map={"background": ["null"], "head": ["wig"]})
    with pytest.raises(InputError, match="the tag 'wig', which label_list.mat lacks"):
        open_dataset("mine", root).load(0)


def test_builtin_clothing_co_parsing_uses_the_committed_lists(tmp_path):
    ids = (HERE / "builtin" / "ccp-coarse_train_id.txt").read_text().split()
    for folder in ("photos", "annotations/pixel-level"):
        (tmp_path / folder).mkdir(parents=True)
    for id in [*ids, "9999"]:  # a clone holds further photos
        (tmp_path / "photos" / f"{id}.jpg").touch()
        (tmp_path / "annotations/pixel-level" / f"{id}.mat").touch()
    assert [path.stem for path in open_dataset("ccp-coarse", tmp_path).images] == ids


# Bad input --------------------------------------------------------------------------------------------------


def pascal(tmp_path):
    return write(tmp_path, *LAYOUTS["pascal"])


def says(message, action):
    with pytest.raises(InputError) as caught:
        action()
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_list_or_part_of_a_layout(tmp_path):
    says("pascal=nowhere: no such folder", lambda: open_dataset("pascal", "nowhere"))
    says("found no JPEGImages folder there; a pascal folder holds JPEGImages/ with SegmentationPart/",
         lambda: open_dataset("pascal", tmp_path))
    root = pascal(tmp_path)
    says("list/val_id.txt: the list of ids is not readable (", lambda: open_dataset("pascal", root, "val"))
    (root / "SegmentationPart").rename(root / "gone")
    says("SegmentationPart: no such folder; the label maps of domain 'pascal'",
         lambda: open_dataset("pascal", root))


def test_an_id_without_image_or_label(tmp_path):
    root = pascal(tmp_path)
    (root / "list/train_id.txt").write_text("a\nzz\n")
    says("train_id.txt: id 'zz' has no photo", lambda: open_dataset("pascal", root))
    (root / "list/train_id.txt").write_text("a\n")
    (root / "SegmentationPart/a.png").unlink()
    from sst.data import listing
    listing.cache_clear()
    says("id 'a' has no label map", lambda: open_dataset("pascal", root))


def test_an_empty_list(tmp_path):
    root = pascal(tmp_path)
    (root / "list/train_id.txt").write_text("\n \n")
    says("train_id.txt: holds no id", lambda: open_dataset("pascal", root))


def test_the_same_domain_twice_an_unknown_one_and_no_path(tmp_path):
    root = pascal(tmp_path)
    says("label domain 'pascal' is given twice", lambda: named_paths([f"pascal={root}", f"pascal={root}"]))
    says("unknown label domain 'coco'; built in are", lambda: open_dataset("coco", root))
    says("write NAME=PATH", lambda: named_paths(["pascal"]))


def test_sizes_that_differ(tmp_path):
    root = pascal(tmp_path)
    Image.new("L", (4, 6)).save(root / "SegmentationPart/a.png")
    says("the label map is 4x6 but its photo", lambda: open_dataset("pascal", root).load(0))


def test_an_rgb_label(tmp_path):
    root = pascal(tmp_path)
    Image.new("RGB", (6, 4)).save(root / "SegmentationPart/a.png")
    says("a.png: a label map of colour mode RGB; label maps are single-channel",
         lambda: open_dataset("pascal", root).load(0))


def chunk(kind, data):
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_grey_label_of_few_bits_is_not_stretched_silently(tmp_path):
    root = pascal(tmp_path)
    rows = b"".join(b"\0" + bytes([0x01, 0x23, 0x10]) for _ in range(4))  # 6 x 4 pixels of 4 bits
    header = struct.pack(">IIBBBBB", 6, 4, 4, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (root / "SegmentationPart/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    says("a.png: a grey PNG of 4 bits", lambda: open_dataset("pascal", root).load(0))


def test_a_domain_json_in_the_folder_of_a_builtin_domain(tmp_path):
    own(pascal(tmp_path))
    says("describes 'mine' with other classes than the built-in pascal; give it a name of its own: mine=",
         lambda: open_dataset("pascal", tmp_path))


def test_a_mat_label_that_is_no_label_map(tmp_path):
    savemat = pytest.importorskip("scipy.io", reason=SCIPY).savemat
    root = ccp(tmp_path)
    own(root, labels="annotations/pixel-level", images="photos", classes=["background", "head"],
        label_map={"background": ["null"], "head": ["hair", "skin", "t-shirt"]})
    for bad in (np.full((4, 6), -1.0), np.full((4, 6), 300), np.full((4, 6), 0.5), np.zeros((4, 6, 3))):
        savemat(root / "annotations/pixel-level/0001.mat", {"groundtruth": bad})
        says("0001.mat: 'groundtruth' is no label map", lambda: open_dataset("mine", root).load(0))
    (root / "annotations/pixel-level/0001.mat").write_bytes(b"nothing")
    says("0001.mat: not a readable MATLAB file", lambda: open_dataset("mine", root).load(0))


def test_a_class_id_outside_the_domain(tmp_path):
    root = write(tmp_path, *LAYOUTS["pascal"], top=7)
    says("a.png: class id 7 found; domain 'pascal' has ids 0 to 6, and 255 for ignored",
         lambda: open_dataset("pascal", root).load(0))
    label_map = {"background": [0], "hat": [2], "shoe": [1], "bag": []}
    root = write(own(tmp_path / "d", label_map=label_map), *OWN)
    says("raw label 3 found, which label_map of domain 'mine' puts in no class; mapped are 0, 1, 2",
         lambda: open_dataset("mine", root).load(0))


def test_broken_photos_and_labels(tmp_path):
    root = pascal(tmp_path)
    whole = (root / "JPEGImages/a.jpg").read_bytes()
    for content in (b"", b"no photo", whole[:len(whole) // 2]):
        (root / "JPEGImages/a.jpg").write_bytes(content)
        says("a.jpg: not a readable photo (", lambda: open_dataset("pascal", root).load(0))
    (root / "SegmentationPart/b.1.png").write_bytes(whole)  # a JPEG that calls itself PNG is RGB
    says("b.1.png: a label map of colour mode RGB", lambda: open_dataset("pascal", root).load(1))
    (root / "SegmentationPart/b.1.png").write_bytes(b"\x89PNG\r\n")
    says("b.1.png: not a readable label map (", lambda: open_dataset("pascal", root).load(1))


def test_a_domain_json_that_is_no_json(tmp_path):
    (tmp_path / "domain.json").write_text("{name: mine")
    says("domain.json: not readable as JSON (", lambda: open_dataset("mine", tmp_path))
    (tmp_path / "domain.json").write_text("[]")
    says("domain.json: found list", lambda: open_dataset("mine", tmp_path))
