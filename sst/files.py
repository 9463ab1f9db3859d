"""The pixels of one file: how a photo or a label map is decoded, and how pixels get another size."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from .domains import IGNORE
from .errors import InputError

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean: what padding looks like to the network is zero
ORIENTATION, TURN = 0x0112, Image.Transpose  # the EXIF tag, and what undoes its values
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
         6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
# What Pillow raises for a broken file.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def one_line(error):
    """What an exception says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


# Photos ---------------------------------------------------------------------------------------------------


def read_image(path, size=None):
    """The pixels of a photo as stored, (H, W, 3) uint8 RGB; grey, palette, CMYK and 16-bit files too.

    size: (H, W) that it will be fitted into. A JPEG of more than four times that size is then decoded at a
    half, a quarter or an eighth of its size, which is several times faster. It keeps at least twice the size
    that is needed, so that what remains of the shrinking is smooth. Raises InputError.
    """
    try:
        with Image.open(path) as image:
            if size is not None and image.format == "JPEG":
                scale = 2 * min(size[0] / image.height, size[1] / image.width)
                image.draft(image.mode, (math.ceil(scale * image.width), math.ceil(scale * image.height)))
            return rgb(image)
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable photo ({one_line(error)}); replace the file or take its id "
                         f"off the list") from None


def pixels(image):
    """A path, PIL image or array -> (h, w, 3) uint8 RGB, turned upright as EXIF says; raises InputError."""
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                return rgb(upright(file))
        except Exception as error:  # a user's photo may be of any format, and fail in any way
            raise InputError(f"{image}: not a readable photo ({one_line(error)}); give a JPEG, PNG or "
                             f"another format that Pillow reads") from None
    if isinstance(image, Image.Image):
        return rgb(upright(image))
    if not isinstance(image, np.ndarray):
        raise InputError(f"an image of type {type(image).__name__}; give a path, a PIL image or a numpy "
                         f"array (h, w, 3) uint8 RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"an image array of shape {image.shape}, {image.dtype}; give (h, w, 3) uint8 RGB, "
                         f"values 0 to 255")
    return image


def upright(image):
    """A PIL image turned and mirrored as its EXIF tag says.

    ImageOps.exif_transpose also writes the other tags anew, which fails where a camera wrote nonsense.
    """
    image.load()  # of a TIFF this carries the tag out and removes it
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def rgb(image):
    """The pixels of a PIL image of any mode, (H, W, 3) uint8."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


# Label maps -----------------------------------------------------------------------------------------------


def read_label(path, domain):
    """The label map of a PNG or .mat file, (H, W) uint8: class ids of `domain`, 255 ignored.

    A PNG is grey or has a palette. Raises InputError for a file that holds anything else.
    """
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
                         f"in no class; mapped are {allowed}, and {IGNORE} is ignored; add {found} to a "
                         f"class")
    return label.astype(np.uint8)


def read_png(path):
    """The numbers of a single-channel PNG, (H, W) uint8; raises InputError."""
    try:
        with Image.open(path) as image:
            if image.mode == "L" and bit_depth(path) < 8:
                raise InputError(f"{path}: a grey PNG of {bit_depth(path)} bits, whose ids readers stretch "
                                 f"to 0..255; save label maps with 8 bits a pixel")
            if image.mode not in ("L", "P"):
                raise InputError(f"{path}: a label map of colour mode {image.mode}; label maps are "
                                 f"single-channel PNGs (grey, L, or palette, P) that hold class ids, so "
                                 f"export it as such")
            return np.array(image)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable label map ({one_line(error)}); replace the file or take "
                         f"its id off the list") from None


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
    lookup[IGNORE] = IGNORE
    return lookup, allowed


# Another size ---------------------------------------------------------------------------------------------


def fit(image, size, label=None):
    """Scale a photo, aspect kept, to lie centred in (H, W); the rest is padding (mean colour, label 255).

    Returns image (H, W, 3), label (H, W) or None, and the photo's box therein (top, left, height, width).
    """
    h, w = (image if label is None else label).shape[:2]  # the photo may have been read at a part of its size
    H, W = size
    scale = min(H / h, W / w)
    height, width = max(1, min(H, round(h * scale))), max(1, min(W, round(w * scale)))
    box = ((H - height) // 2, (W - width) // 2, height, width)
    whole = (0, 0, *image.shape[1::-1])
    image = paste(image, (H, W), box, whole, MEAN_COLOUR, Image.Resampling.BILINEAR)
    if label is not None:
        label = paste(label, (H, W), box, (0, 0, w, h), IGNORE, Image.Resampling.NEAREST)
    return image, label, box


def paste(pixels, size, box, source, fill, resample):
    """A canvas of (H, W) filled with `fill`, and in its `box` a part of `pixels`, resized.

    box: (top, left, height, width) on the canvas. source: (x0, y0, x1, y1) in `pixels`, fractions allowed.
    """
    top, left, height, width = box
    part = np.asarray(Image.fromarray(pixels).resize((width, height), resample, box=source))
    if (height, width) == tuple(size):
        return part.copy()
    canvas = np.empty((*size, *pixels.shape[2:]), np.uint8)
    canvas[:] = fill
    canvas[top:top + height, left:left + width] = part
    return canvas
