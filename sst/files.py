"""The pixels of a photo: how its file is decoded, and how pixels get another size."""

import math
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


def regular(path):
    """The path of a file; raises OSError for what only looks like one, such as a pipe, which would wait."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("a folder, a pipe or a device, not a file")
    return path


# Photos ---------------------------------------------------------------------------------------------------


def read_image(path, size=None):
    """A photo's pixels (H, W, 3) uint8 RGB, turned as EXIF says; grey, palette, CMYK and 16-bit files too.

    Also its full size (h, w) when turned, and its EXIF orientation, 1 where there is none.
    size: (H, W) that it will be fitted into. A JPEG of more than four times that size is then decoded at a
    half, a quarter or an eighth of its size, which is several times faster. It keeps at least twice the size
    that is needed, so that what remains of the shrinking is smooth. Raises InputError.
    """
    try:
        with Image.open(regular(path)) as image:
            turn = image.getexif().get(ORIENTATION, 1)
            w, h = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
            if size is not None and image.format == "JPEG":
                scale = 2 * min(size[0] / h, size[1] / w)
                image.draft(image.mode, tuple(math.ceil(scale * side) for side in image.size))
            return rgb(upright(image)), (h, w), turn
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable photo ({one_line(error)}); replace the file or take its id "
                         f"off the list") from None


def pixels(image):
    """A path, PIL image or array -> (h, w, 3) uint8 RGB, turned upright as EXIF says; raises InputError."""
    if isinstance(image, (str, Path)):
        try:
            with Image.open(regular(image)) as file:
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


def orientation(path):
    """The EXIF orientation of a photo's file, 1 for none; also for a file that is no photo."""
    try:
        with Image.open(regular(path)) as image:
            return image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:
        return 1


def oriented(array, turn):
    """An array (h, w) turned as an image of that EXIF orientation is."""
    return np.array(Image.fromarray(array).transpose(TURNS[turn]))


def rgb(image):
    """The pixels of a PIL image of any mode, (H, W, 3) uint8."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


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
