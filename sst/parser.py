"""A trained network on photos, in three lines: import sst; parser = sst.load("model.pt"); masks = parser("photo.jpg")."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .batches import fit
from .checkpoint import load_model, trained_size
from .data import one_line, rgb
from .errors import InputError

MAX_SIDE = 1024  # the published datasets' photos have about 500 pixels a side, and training enlarges them up to twice
STRIP = 2 ** 20  # logits held at the photo's own size at a time
ORIENTATION, TURN = 0x0112, Image.Transpose  # the EXIF tag, and what undoes its values
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270, 7: TURN.TRANSVERSE,
         8: TURN.ROTATE_90}


class Parser:
    """A trained network: a photo in, a label map of each of its label domains out.

    path: a run folder, whose model.pt is read, or a model.pt or best.pt.
    size: (H, W) that the whole photo is fitted into for the network, as training with --size does.
    max_side: the photo's own size instead, shrunk to at most that many pixels on its longer side.
    With neither, it is the size that a config.json beside the file names, else max_side 1024.
    `domains` is {name: LabelDomain}. Raises InputError.
    """

    def __init__(self, path, size=None, max_side=None):
        if size is not None and max_side is not None:
            raise InputError(f"size {size} and max_side {max_side}: give one of them")
        path = Path(path)
        path = path / "model.pt" if path.is_dir() else path
        device = "cuda" if torch.cuda.is_available() else "cpu"
        net, domains = load_model(path)
        self.net = net.to(device)
        self.domains = {domain.name: domain for domain in domains}
        if size is None and max_side is None:
            size = trained_size(path)
        self.size = None if size is None else checked_size(size, "size")
        self.max_side = max_side or MAX_SIDE

    @torch.no_grad()
    def __call__(self, image):
        """A path, a PIL image or an array (h, w, 3) uint8 RGB -> {domain: (h, w) uint8 class ids}, at the photo's own size.

        The EXIF rotation of a file or PIL image is carried out: photo and label maps are upright, as viewers show the photo.
        Raises InputError for what is no photo.
        """
        image = pixels(image)
        h, w = image.shape[:2]
        scale = min(1, self.max_side / max(h, w))
        size = self.size or (max(1, round(h * scale)), max(1, round(w * scale)))
        image, _, (top, left, height, width) = fit(image, size)
        x = torch.from_numpy(image).to(self.net.mean.device).permute(2, 0, 1)[None].float() / 255
        return {name: label_map(A[0, :, top:top + height, left:left + width], h, w) for name, A in self.net(x).items()}


def label_map(A, h, w):
    """Logits (Z, H, W) -> (h, w) uint8: the class of every pixel after bilinear resizing, taken in strips of rows.

    All logits of a photo of 40 megapixels would be gigabytes.
    """
    Z, H, _ = A.shape
    label = torch.empty(h, w, dtype=torch.uint8, device=A.device)
    rows = max(1, STRIP // (Z * w))
    for top in range(0, h, rows):
        y = ((torch.arange(top, min(top + rows, h), device=A.device) + 0.5) * (H / h) - 0.5).clamp(min=0)
        above = y.long()
        below = (above + 1).clamp(max=H - 1)
        t = (y - above)[:, None]
        strip = (1 - t) * A[:, above] + t * A[:, below]  # (Z, rows, W)
        strip = F.interpolate(strip[None], size=(len(y), w), mode="bilinear", align_corners=False)[0]
        label[top:top + rows] = strip.max(0).indices  # argmax takes three times as long
    return label.cpu().numpy()


def pixels(image):
    """A path, PIL image or array -> (h, w, 3) uint8 RGB, upright; raises InputError."""
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                return rgb(upright(file))
        except Exception as error:  # Pillow raises whatever a broken file leads it to
            raise InputError(f"{image}: not a readable photo ({one_line(error)}); give a JPEG, PNG or another format that Pillow "
                             f"reads") from None
    if isinstance(image, Image.Image):
        return rgb(upright(image))
    if not isinstance(image, np.ndarray):
        raise InputError(f"an image of type {type(image).__name__}; give a path, a PIL image or a numpy array (h, w, 3) uint8 RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"an image array of shape {image.shape}, {image.dtype}; give (h, w, 3) uint8 RGB, values 0 to 255")
    return image


def upright(image):
    """A PIL image turned and mirrored as its EXIF tag says.

    ImageOps.exif_transpose also writes the other tags anew, which fails where a camera wrote nonsense.
    """
    image.load()  # of a TIFF this carries the tag out and removes it
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def checked_size(size, where):
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise InputError(f"{where} is {size!r}; it must be height and width in pixels, such as (512, 384)")
    return tuple(size)
