"""Datasets of label domains on disk: where their photos and label maps lie, and how one is read.

A dataset here is anything with `domain` (a LabelDomain), `__len__`, `load(i, size)` -> image (H, W, 3) uint8
RGB and label map (H, W) uint8 of class ids with 255 ignored, and `where(i)`, a name for messages. `Photos`
reads files, and figures/ draws. Where `size` (H, W) is not None the photo will be fitted into it. It
may then be smaller than its label map, but not smaller than that.
"""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from .domains import BUILTIN, HERE, builtin_domain, from_dict, is_share
from .errors import InputError
from .files import TURNS, one_line, oriented, read_image
from .labels import mat_reader, read_label

# Folders of photos and labels and the list of ids, for each built-in domain; the first layout found counts.
# {split} is train or val; {Split} is Training or Validation; a list of None means every photo of the folder.
LAYOUTS = {
    "pascal": [("JPEGImages", "SegmentationPart", "list/{split}_id.txt")],
    "atr": [("JPEGImages", "SegmentationClassAug", "list/{split}_id.txt")],
    "cihp": [("Images", "Category_ids", "lists/{split}_id.txt"),
             ("{Split}/Images", "{Split}/Category_ids", None)],
    "lip": [("{split}_images", "{split}_segmentations", "{split}_id.txt"),
            ("TrainVal_images/{split}_images", "TrainVal_parsing_annotations/{split}_segmentations", None),
            ("TrainVal_images/TrainVal_images/{split}_images",
             "TrainVal_parsing_annotations/TrainVal_parsing_annotations/{split}_segmentations", None)],
}
CCP = ("photos", "annotations/pixel-level")  # Clothing Co-Parsing; the lists are ours, in sst/builtin/
IMAGE_ENDINGS, LABEL_ENDINGS = (".jpg", ".jpeg", ".png"), (".png", ".mat")


class Photos:
    """Photos and label files of one domain.

    images, labels: paths, as many of each. orientation: "stored", "upright" or None, how label maps lie where
    a photo's EXIF tag turns it (`turned`). Raises InputError from `load` for a file that cannot be used.
    """

    def __init__(self, domain, images, labels, orientation=None):
        self.domain, self.images, self.labels = domain, list(images), list(labels)
        self.orientation = orientation

    def __len__(self):
        return len(self.images)

    def where(self, i):
        return str(self.images[i])

    def load(self, i, size=None):
        """image (H, W, 3) uint8 RGB, upright, label map (H, W) uint8."""
        image, (h, w), turn = read_image(self.images[i], size)
        label = turned(self.label(i), (h, w), turn, self.labels[i], self.orientation)
        if (h, w) != label.shape:
            lh, lw = label.shape
            seen = f"{w}x{h}, turned as its EXIF tag says" if turn in TURNS else f"{w}x{h}"
            raise InputError(f"{self.labels[i]}: the label map is {lw}x{lh} but its photo {self.images[i]} "
                             f"is {seen}; they must have the same size, so export the label again at the "
                             "photo's size")
        return image, label

    def label(self, i):
        """The label map as its file has it, (H, W) uint8."""
        return read_label(self.labels[i], self.domain)


def turned(label, size, turn, path, orientation):
    """A label map (h, w) laid as its photo is seen, whose size is then (H, W) and whose EXIF tag is `turn`.

    Photos are turned as viewers do. Tools save label maps either way: one whose shape is the stored photo's
    is turned too. Where both have one shape, nothing but the domain's "label_orientation" tells. Raises
    InputError then.
    """
    if turn not in TURNS or orientation == "upright":
        return label
    stored = size[::-1] if turn >= 5 else size
    if orientation is None and stored == size:
        raise InputError(f"{path}: the EXIF tag of its photo turns it (orientation {turn}), and nothing "
                         'tells whether the label map is turned already; add "label_orientation": "stored" '
                         '(it lies as the file\'s pixels do) or "upright" (as viewers show the photo) to '
                         "domain.json")
    return oriented(label, turn) if label.shape == stored else label


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

    def label(self, i):
        return self.dataset.label(self.indices[i])


def fraction_of(dataset, fraction, seed):
    """That share of a dataset, at least one sample, chosen by seed (Table 5)."""
    return first_of(dataset, max(1, round(fraction * len(dataset))), seed)


def first_of(dataset, count, seed):
    """So many samples of a dataset, chosen by seed: fewer lie within more. All, if it has no more."""
    order = np.random.default_rng((seed, len(dataset))).permutation(len(dataset))
    return Part(dataset, order[:count])


# Finding the files ----------------------------------------------------------------------------------------


def named_paths(specs):
    """["NAME=PATH", ...] -> {name: path}; raises InputError for another form, and for a name given twice."""
    seen = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not (name and equals and path):
            raise InputError(f"{spec}: write NAME=PATH, such as pascal=DIR; built-in names are "
                             f"{', '.join(BUILTIN)}")
        if name in seen:
            raise InputError(f"label domain '{name}' is given twice ({seen[name]} and {path}); give every "
                             f"one once")
        seen[name] = path
    return seen


def open_dataset(name, path, split="train", missing=None):
    """The photos of one label domain.

    name: a built-in domain, `path` being its folder; or any name, `path` being a folder with a domain.json or
    such a file. split: train or val (for some layouts test). Raises InputError for what is missing. Where
    `missing` is a list, ids without a photo or label map are left out, and their sentences added to it.
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
    """The photos of a domain.json, under the name that the command line gives it."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({one_line(error)}); see 'Your own dataset' in "
                         f"docs/usage.md") from None
    domain = from_dict(fields, str(file))
    if name in BUILTIN and domain.classes != builtin_domain(name).classes:
        raise InputError(f"{file}: describes '{domain.name}' with other classes than the built-in {name}; "
                         f"give it a name of its own: {domain.name}={file.parent}")
    if name != domain.name:
        domain = replace(domain, name=name)  # the command line's name is the one that all output uses
    root = file.parent
    images, labels = root / fields.get("images", "images"), root / fields.get("labels", "labels")
    suffixes = fields.get("image_suffix", ""), fields.get("label_suffix", "")
    listed = fields.get(split, f"{split}_id.txt")
    if is_share(fields.get("val")):
        every = root / fields["train"] if "train" in fields else None
        listed = shared_out(split, fields["val"], every, images, suffixes)
    else:
        listed = root / listed
    return list_photos(domain, images, labels, listed, missing, suffixes, fields.get("label_orientation"))


def shared_out(split, share, listed, images, suffixes):
    """The ids of a split where domain.json gives the share that validates instead of lists.

    listed: a text file of all ids, or None for every photo of the folder. The same photos validate whenever
    the same ids are there. Raises InputError.
    """
    if split not in ("train", "val"):
        raise InputError(f"--split {split}: domain.json shares its photos out among train and val; use those")
    ids = sorted(read_ids(listed) if listed else photo_ids(images, suffixes))
    order = np.random.default_rng(0).permutation(len(ids))
    count = min(len(ids) - 1, max(1, round(share * len(ids))))
    chosen = order[:count] if split == "val" else order[count:]
    return [ids[i] for i in sorted(chosen)]


def photo_ids(images, suffixes):
    """The ids of all photos of a folder: their names without suffix and ending, label maps left out."""
    image_suffix, label_suffix = suffixes
    names = [name for name in listing(images, IMAGE_ENDINGS) if name.endswith(image_suffix)]
    names = [name[:len(name) - len(image_suffix)] for name in names]
    return [id for id in names if not label_suffix or not (id + image_suffix).endswith(label_suffix)]


def list_photos(domain, images, labels, listed, missing=None, suffixes=("", ""), orientation=None):
    """A `Photos` of the ids in the text file `listed`, of a list of ids, or of every photo where it is None.

    images, labels: folders. missing: as in `open_dataset`. suffixes: what stands between an id and the ending
    of its photo, and of its label map. orientation: as in `Photos`.
    """
    for folder, what in ((images, "photos"), (labels, "label maps")):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the {what} of domain '{domain.name}' are expected "
                             f"there")
    if isinstance(listed, list):
        ids, listed = listed, images
    elif listed is None:
        ids, listed = sorted(photo_ids(images, suffixes)), images
    else:
        ids = read_ids(listed)
    if not ids:
        raise InputError(f"{listed}: holds no id; a list has one id a line, without folder")
    pairs = []
    for id in ids:
        try:
            pairs.append((find(images, id, suffixes[0], IMAGE_ENDINGS, "photo", listed),
                          find(labels, id, suffixes[1], LABEL_ENDINGS, "label map", listed)))
        except InputError as error:
            if missing is None:
                raise
            missing.append(str(error))
    for _, label in pairs[:1]:
        if label.suffix == ".mat":
            mat_reader(label)  # what is missing is said before training begins
    return Photos(domain, [image for image, _ in pairs], [label for _, label in pairs], orientation)


def read_ids(file):
    """The lines of a list of ids that are not empty; raises InputError."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: the list of ids is not readable ({one_line(error)}); write one id a line, "
                         f"without folder") from None


def find(folder, id, suffix, endings, what, listed):
    """The file of an id, whatever its ending; raises InputError. A list may give ids with their endings."""
    stem, ending = os.path.splitext(id)
    for name in [id, stem] if ending.lower() in IMAGE_ENDINGS else [id]:
        place = folder / (name + suffix)
        file = listing(place.parent, endings).get(place.name)
        if file is not None:
            return place.parent / file
    raise InputError(f"{listed}: id '{id}' has no {what} {folder / (id + suffix)} ({', '.join(endings)}); "
                     "add the file or remove the id (ids are file names without folder)")


@cache
def listing(folder, endings):
    """{stem: file name} of a folder, read once.

    Looking for 28,000 files one by one takes minutes on a network disk.
    """
    if not folder.is_dir():
        return {}
    files = {}
    for ending in reversed(endings):  # the first ending wins
        files.update({os.path.splitext(f)[0]: f for f in os.listdir(folder) if f.lower().endswith(ending)})
    return files
