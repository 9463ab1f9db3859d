"""Datasets on disk: photos and label maps of one label domain, in the layouts in which the field keeps them.

A dataset here is anything with `domain` (a LabelDomain), `__len__`, `load(i, size)` -> image (H, W, 3) uint8 RGB and label map
(H, W) uint8 of class ids with 255 ignored, and `where(i)`, a name for messages. `Photos` reads files; sst/figures.py draws. Where
`size` (H, W) is not None the photo will be fitted into it, and may be smaller than its label map, but not smaller than that.
"""

import json
import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from .domains import BUILTIN, HERE, IGNORE, builtin_domain, from_dict
from .errors import InputError

# Folders of photos and labels and the list of ids, for each built-in domain; the first layout that is there counts.
# {split} is train or val; {Split} is Training or Validation; a list of None means every photo of the folder.
LAYOUTS = {
    "pascal": [("JPEGImages", "SegmentationPart", "list/{split}_id.txt")],
    "atr": [("JPEGImages", "SegmentationClassAug", "list/{split}_id.txt")],
    "cihp": [("Images", "Category_ids", "lists/{split}_id.txt"), ("{Split}/Images", "{Split}/Category_ids", None)],
    "lip": [("{split}_images", "{split}_segmentations", "{split}_id.txt")],
}
CCP = ("photos", "annotations/pixel-level")  # Clothing Co-Parsing; the lists are ours, in sst/builtin/
IMAGE_ENDINGS, LABEL_ENDINGS = (".jpg", ".jpeg", ".png"), (".png", ".mat")


class Photos:
    """Photos and label files of one domain.

    images, labels: paths, as many of each. Raises InputError from `load` for a file that cannot be used.
    """

    def __init__(self, domain, images, labels):
        self.domain, self.images, self.labels = domain, list(images), list(labels)

    def __len__(self):
        return len(self.images)

    def where(self, i):
        return str(self.images[i])

    def load(self, i, size=None):
        """image (H, W, 3) uint8 RGB, label map (H, W) uint8."""
        image, label = read_image(self.images[i], size), read_label(self.labels[i], self.domain)
        (h, w), (lh, lw) = image.shape[:2], label.shape
        if size and (h, w) != (lh, lw):
            with Image.open(self.images[i]) as stored:
                w, h = stored.size
        if (h, w) != (lh, lw):
            raise InputError(f"{self.labels[i]}: the label map is {lw}x{lh} but its photo {self.images[i]} is {w}x{h}; they must "
                             f"have the same size, so export the label again at the photo's size")
        return image, label


class Part:
    """Some samples of a dataset, as a dataset."""

    def __init__(self, dataset, indices):
        self.dataset, self.domain, self.indices = dataset, dataset.domain, [int(i) for i in indices]

    def __len__(self):
        return len(self.indices)

    def where(self, i):
        return self.dataset.where(self.indices[i])

    def load(self, i, size=None):
        return self.dataset.load(self.indices[i], size)


def fraction_of(dataset, fraction, seed):
    """That share of a dataset (at least one sample), chosen by seed: a smaller fraction lies within a larger one (Table 5)."""
    order = np.random.default_rng((seed, len(dataset))).permutation(len(dataset))
    return Part(dataset, order[:max(1, round(fraction * len(dataset)))])


def read_image(path, size=None):
    """The pixels of a photo as stored, (H, W, 3) uint8 RGB; grey, palette, CMYK and 16-bit files are converted.

    size: (H, W) that it will be fitted into. A JPEG of more than four times that size is then decoded at a half, a quarter or an eighth of
    its size, which is several times faster; twice the size that is needed, so that what remains of the shrinking is smooth.
    """
    try:
        with Image.open(path) as image:
            if size is not None and image.format == "JPEG":
                scale = 2 * min(size[0] / image.height, size[1] / image.width)
                image.draft(image.mode, (math.ceil(scale * image.width), math.ceil(scale * image.height)))
            return rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable photo ({one_line(error)}); replace the file or take its id off the list") from None


def rgb(image):
    """The pixels of a PIL image of any mode, (H, W, 3) uint8."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def read_label(path, domain):
    """The label map of a file, (H, W) uint8: class ids of `domain`, 255 ignored. PNG (grey or palette) or .mat."""
    raw = read_mat_label(path) if Path(path).suffix == ".mat" else read_png(path)
    lookup, allowed = lookup_table(domain, tag_list(path) if holds_tags(domain) else None)
    label = lookup[raw]
    if (label < 0).any():
        found = int(raw[label < 0][0])
        if domain.label_map is None:
            raise InputError(f"{path}: class id {found} found; domain '{domain.name}' has ids {allowed}, and {IGNORE} for ignored "
                             f"pixels; correct the file, or give the domain a label_map from raw labels to classes")
        raise InputError(f"{path}: raw label {found} found, which label_map of domain '{domain.name}' puts in no class; mapped are "
                         f"{allowed}, and {IGNORE} is ignored; add {found} to a class")
    return label.astype(np.uint8)


def read_png(path):
    try:
        with Image.open(path) as image:
            if image.mode == "L" and bit_depth(path) < 8:
                raise InputError(f"{path}: a grey PNG of {bit_depth(path)} bits, whose ids readers stretch to 0..255; save label maps "
                                 f"with 8 bits a pixel")
            if image.mode not in ("L", "P"):
                raise InputError(f"{path}: a label map of colour mode {image.mode}; label maps are single-channel PNGs (grey, L, or "
                                 f"palette, P) that hold class ids, so export it as such")
            return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable label map ({one_line(error)}); replace the file or take its id off the list") from None


def bit_depth(path):
    """Bits per sample of a PNG (byte 24 of the file)."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def read_mat_label(path):
    raw = read_mat(path, "groundtruth")
    if raw.ndim != 2 or not np.isin(raw, range(256)).all():
        raise InputError(f"{path}: 'groundtruth' is no label map (shape {raw.shape}, values {raw.min()} to {raw.max()}); it must be "
                         f"(H, W) of whole numbers from 0 to 255")
    return raw.astype(np.uint8)


def mat_reader(path):
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"{path}: reading MATLAB files needs scipy; run: pip install scipy") from None
    return loadmat


def read_mat(path, key):
    loadmat = mat_reader(path)
    try:
        return loadmat(path)[key]
    except Exception as error:  # scipy raises whatever a broken file leads it to
        raise InputError(f"{path}: not a readable MATLAB file with '{key}' ({one_line(error)}); fetch it again") from None


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def holds_tags(domain):
    return domain.label_map is not None and any(isinstance(raw, str) for raws in domain.label_map.values() for raw in raws)


def tag_list(path):
    """The tag names of Clothing Co-Parsing in id order, from label_list.mat in a folder above the label file."""
    for folder in Path(path).absolute().parents[:4]:
        if (folder / "label_list.mat").is_file():
            return read_tags(folder / "label_list.mat")
    raise InputError(f"{path}: the domain's label_map has tag names, but no label_list.mat lies in a folder above; use integers for "
                     f"PNG labels")


@cache
def read_tags(path):
    return tuple(str(tag[0]) for tag in read_mat(path, "label_list").ravel())


def lookup_table(domain, tags):
    """(256,) int16 from raw label to class id, -1 where it has none, and what is allowed, in words."""
    key = (domain.name, domain.classes, json.dumps(domain.label_map), tags)
    return cached_lookup_table(*key)


@cache
def cached_lookup_table(name, classes, label_map, tags):
    lookup = np.full(256, -1, np.int16)
    label_map = json.loads(label_map)
    if label_map is None:
        lookup[:len(classes)] = np.arange(len(classes))
        allowed = f"0 to {len(classes) - 1}"
    else:
        for i, class_name in enumerate(classes):
            for raw in label_map[class_name]:
                if isinstance(raw, str):
                    if raw not in tags:
                        raise InputError(f"domain '{name}': label_map names the tag '{raw}', which label_list.mat lacks; its tags are "
                                         f"{', '.join(tags)}")
                    raw = tags.index(raw)
                lookup[raw] = i
        allowed = ", ".join(map(str, np.flatnonzero(lookup >= 0)))
    lookup[IGNORE] = IGNORE
    return lookup, allowed


# Finding the files -----------------------------------------------------------------------------------------------------------


def open_datasets(specs, split):
    """["NAME=PATH", ...] -> datasets of that split. Lists and files are checked to be there; raises InputError."""
    return [open_dataset(name, path, split) for name, path in named_paths(specs).items()]


def named_paths(specs):
    """["NAME=PATH", ...] -> {name: path}; raises InputError for another form, and for a name given twice."""
    seen = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not (name and equals and path):
            raise InputError(f"{spec}: write NAME=PATH, such as pascal=DIR; built-in names are {', '.join(BUILTIN)}")
        if name in seen:
            raise InputError(f"label domain '{name}' is given twice ({seen[name]} and {path}); give every one once")
        seen[name] = path
    return seen


def open_dataset(name, path, split="train", missing=None):
    """The photos of one label domain.

    name: a built-in domain whose folder `path` is; or any name, `path` being a folder with a domain.json or such a file.
    split: train or val (for some layouts test). Raises InputError for what is missing; where `missing` is a list, ids without a
    photo or label map are left out instead, and their sentences added to it.
    """
    path = Path(path)
    file = path if path.is_file() else path / "domain.json"
    if file.is_file():
        return open_own(name, file, split, missing)
    domain = builtin_domain(name)
    if not path.is_dir():
        raise InputError(f"{name}={path}: no such folder; give the folder that holds the dataset")
    if name.startswith("ccp-"):
        listed = HERE / "builtin" / (f"{name}_train_id.txt" if split == "train" else f"ccp_{split}_id.txt")
        layouts = [(*CCP, str(listed))]
    else:
        layouts = LAYOUTS[name]
    words = {"split": split, "Split": {"train": "Training", "val": "Validation"}.get(split, split.title())}
    layouts = [tuple(part and part.format(**words) for part in layout) for layout in layouts]
    for images, labels, listed in layouts:
        if (path / images).is_dir():
            return list_photos(domain, path / images, path / labels, listed and path / listed, missing)
    wanted = " or ".join(f"{images}/ with {labels}/" for images, labels, _ in layouts)
    raise InputError(f"{name}={path}: found no {layouts[0][0]} folder there; a {name} folder holds {wanted}")


def open_own(name, file, split, missing):
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({one_line(error)}); see 'your own dataset' in the README") from None
    domain = from_dict(fields, str(file))
    if name in BUILTIN and domain.classes != builtin_domain(name).classes:
        raise InputError(f"{file}: describes '{domain.name}' with other classes than the built-in {name}; give it a name of its own: "
                         f"{domain.name}={file.parent}")
    if name != domain.name:
        domain = replace(domain, name=name)  # the command line's name is the one that all output uses
    root = file.parent
    return list_photos(domain, root / fields.get("images", "images"), root / fields.get("labels", "labels"),
                       root / fields.get(split, f"{split}_id.txt"), missing)


def list_photos(domain, images, labels, listed, missing=None):
    """A `Photos` of the ids in the text file `listed`, or of every photo in the folder where it is None; `missing` as above."""
    for folder, what in ((images, "photos"), (labels, "label maps")):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the {what} of domain '{domain.name}' are expected there")
    if listed is None:
        ids, listed = sorted(listing(images, IMAGE_ENDINGS)), images
    else:
        try:
            ids = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{listed}: the list of ids is not readable ({one_line(error)}); write one id a line, without folder "
                             f"and ending") from None
    if not ids:
        raise InputError(f"{listed}: holds no id; a list has one id a line, without folder and ending")
    pairs = []
    for id in ids:
        try:
            pairs.append((find(images, id, IMAGE_ENDINGS, "photo", listed), find(labels, id, LABEL_ENDINGS, "label map", listed)))
        except InputError as error:
            if missing is None:
                raise
            missing.append(str(error))
    for _, label in pairs[:1]:
        if label.suffix == ".mat":
            mat_reader(label)  # what is missing is said before training begins
    return Photos(domain, [image for image, _ in pairs], [label for _, label in pairs])


def find(folder, id, endings, what, listed):
    """The file of an id, whatever its ending; raises InputError."""
    place = folder / id
    file = listing(place.parent, endings).get(place.name)
    if file is None:
        raise InputError(f"{listed}: id '{id}' has no {what} {place} ({', '.join(endings)}); add the file or remove the id (ids are "
                         f"file names without folder and ending)")
    return place.parent / file


@cache
def listing(folder, endings):
    """{stem: file name} of a folder, read once: looking for 28,000 files one by one takes minutes on a network disk."""
    if not folder.is_dir():
        return {}
    files = {}
    for ending in reversed(endings):  # the first ending wins
        files.update({os.path.splitext(f)[0]: f for f in os.listdir(folder) if f.lower().endswith(ending)})
    return files
