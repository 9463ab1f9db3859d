"""The label map of one file: how a PNG or MATLAB file is decoded, and how raw labels become class ids."""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from .domains import IGNORE, colours_of
from .errors import InputError
from .files import UNREADABLE, one_line, regular


def read_label(path, domain):
    """The label map of a PNG or .mat file, (H, W) uint8: class ids of `domain`, 255 ignored.

    A PNG is grey or has a palette; where the domain has colours, they are what counts. Raises InputError for
    a file that holds anything else.
    """
    if domain.colours is not None:
        return read_colours(path, domain)
    raw = read_mat_label(path) if Path(path).suffix == ".mat" else read_png(path)
    lookup, allowed = lookup_table(domain, tag_list(path) if holds_tags(domain) else None)
    label = lookup[raw]
    if (label < 0).any():
        found = int(raw[label < 0][0])
        if domain.label_map is None:
            raise InputError(f"{path}: class id {found} found; domain '{domain.name}' has ids {allowed}, and "
                             f"{IGNORE} for ignored pixels; correct the file, or give the domain a label_map "
                             f"from raw labels to classes")
        raise InputError(f"{path}: raw label {found} found, which label_map of domain '{domain.name}' puts "
                         f"in no class; mapped are {allowed}; add {found} to a class, or to \"ignore\"")
    return label.astype(np.uint8)


def read_colours(path, domain):
    """The label map of a file whose labels are colours, (H, W) uint8; raises InputError."""
    with opened(path) as image:
        image = np.array(image.convert("RGB")).astype(np.int32)
    code = image[..., 0] << 16 | image[..., 1] << 8 | image[..., 2]
    label = np.full(code.shape, -1, np.int16)
    for name in domain.colours:
        for r, g, b in colours_of(domain, name):
            label[code == (r << 16 | g << 8 | b)] = IGNORE if name == "ignore" else domain.index(name)
    if (label < 0).any():
        y, x = np.argwhere(label < 0)[0].tolist()
        raise InputError(f"{path}: the pixel at column {x}, row {y} has the colour {image[y, x].tolist()}, "
                         f"which no class of domain '{domain.name}' has; add it to colours, or save label "
                         "maps without loss (PNG) and without smoothing")
    return label.astype(np.uint8)


@contextmanager
def opened(path):
    """A label file as a PIL image; raises InputError for one that cannot be read."""
    try:
        with Image.open(regular(path)) as image:
            yield image
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable label map ({one_line(error)}); replace the file or take "
                         f"its id off the list") from None


def read_png(path):
    """The numbers of a single-channel PNG, (H, W) uint8; raises InputError."""
    with opened(path) as image:
        if image.mode == "L" and bit_depth(path) < 8:
            raise InputError(f"{path}: a grey PNG of {bit_depth(path)} bits, whose ids readers stretch to "
                             "0..255; save label maps with 8 bits a pixel")
        if image.mode.startswith("I"):  # 16 bits a pixel
            raw = np.array(image)
            if raw.max(initial=0) > 255:
                raise InputError(f"{path}: raw label {raw.max()} found in a PNG of 16 bits; raw labels are 0 "
                                 "to 255, so number the classes anew")
            return raw.astype(np.uint8)
        if image.mode not in ("L", "P", "1"):
            raise InputError(f"{path}: a label map of colour mode {image.mode}; label maps are "
                             "single-channel PNGs (grey, L, or palette, P) that hold class ids, so export it "
                             'as such, or give the domain "colours"')
        return np.array(image).astype(np.uint8)


def bit_depth(path):
    """Bits per sample of a PNG (byte 24 of the file)."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def read_mat_label(path):
    """The array 'groundtruth' of a MATLAB file, (H, W) uint8; raises InputError."""
    raw = read_mat(path, "groundtruth")
    if raw.ndim != 2 or not np.isin(raw, range(256)).all():
        raise InputError(f"{path}: 'groundtruth' is no label map (shape {raw.shape}, values {raw.min()} to "
                         f"{raw.max()}); it must be (H, W) of whole numbers from 0 to 255")
    return raw.astype(np.uint8)


def mat_reader(path):
    """scipy's loadmat; raises InputError where scipy is missing, naming the file that needs it."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"{path}: reading MATLAB files needs scipy; run: pip install scipy") from None
    return loadmat


def read_mat(path, key):
    """One array of a MATLAB file; raises InputError."""
    loadmat = mat_reader(path)
    try:
        return loadmat(path)[key]
    except Exception as error:  # scipy raises whatever a broken file leads it to
        raise InputError(f"{path}: not a readable MATLAB file with '{key}' ({one_line(error)}); fetch it "
                         f"again") from None


def holds_tags(domain):
    """Whether the label_map of a domain names tags, as Clothing Co-Parsing does, and not numbers."""
    return domain.label_map is not None and any(isinstance(raw, str) for raws in domain.label_map.values()
                                                for raw in raws)


def tag_list(path):
    """The tag names of Clothing Co-Parsing in id order, from label_list.mat in a folder above the label."""
    for folder in Path(path).absolute().parents[:4]:
        if (folder / "label_list.mat").is_file():
            return read_tags(folder / "label_list.mat")
    raise InputError(f"{path}: the domain's label_map has tag names, but no label_list.mat lies in a folder "
                     f"above; use integers for PNG labels")


@cache
def read_tags(path):
    return tuple(str(tag[0]) for tag in read_mat(path, "label_list").ravel())


def lookup_table(domain, tags):
    """(256,) int16 from raw label to class id, -1 where it has none, and what is allowed, in words.

    tags: names in id order where the domain's label_map holds names, else None. Raises InputError.
    """
    return cached_lookup_table(domain.name, domain.classes, json.dumps(domain.label_map), tags)


@cache
def cached_lookup_table(name, classes, label_map, tags):
    lookup = np.full(256, -1, np.int16)
    label_map = json.loads(label_map)
    if label_map is None:
        lookup[:len(classes)] = np.arange(len(classes))
        allowed = f"0 to {len(classes) - 1}"
    else:
        ids = {"ignore": IGNORE} | {class_name: i for i, class_name in enumerate(classes)}
        for class_name, raws in label_map.items():
            for raw in raws:
                if isinstance(raw, str):
                    if raw not in tags:
                        raise InputError(f"domain '{name}': label_map names the tag '{raw}', which "
                                         f"label_list.mat lacks; its tags are {', '.join(tags)}")
                    raw = tags.index(raw)
                lookup[raw] = ids[class_name]
        allowed = ", ".join(map(str, np.flatnonzero(lookup >= 0)))
    if lookup[IGNORE] < 0:
        lookup[IGNORE] = IGNORE
    return lookup, allowed
