"""From a photo to logits and label maps at its own size: for a trained parser, and to score a dataset.

Every photo goes one way: onto the network's canvas, through the network, and from the canvas to its own size.

    import sst
    parser = sst.load("model.pt")
    masks = parser("photo.jpg")
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .checkpoint import load_model, trained_size
from .errors import InputError
from .files import fit, pixels
from .metrics import confusion

MAX_SIDE = 1024  # published datasets' photos have about 500 pixels a side, and training enlarges them twice
STRIP = 2 ** 20  # logits held at the photo's own size at a time


@torch.no_grad()
def canvas_logits(net, image, size=None, domains=None, scale=1.0):
    """image (h, w, 3) uint8 RGB -> {domain: logits (Z, height, width) float32} of the photo on the canvas.

    size: (H, W) of the canvas that the photo is fitted into, or None for the photo's own size. scale: factor
    on that size. domains: names; None for all. What is padding on the canvas is left out.
    """
    H, W = (max(1, round(scale * n)) for n in size or image.shape[:2])
    if size is None:  # both sides are scaled, each to a whole number of pixels, and nothing is padded
        canvas, box = np.array(Image.fromarray(image).resize((W, H), Image.Resampling.BILINEAR)), (0, 0, H, W)
    else:
        canvas, _, box = fit(image, (H, W))
    device = next(net.parameters()).device
    x = torch.from_numpy(canvas).to(device).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
    top, left, height, width = box
    return {name: A[0, :, top:top + height, left:left + width].float() for name, A in net(x, domains).items()}


def photo_logits(net, image, size=None, domains=None, scale=1.0):
    """`canvas_logits` brought to the photo's own size: {domain: (Z, h, w) float32}."""
    logits = canvas_logits(net, image, size, domains, scale)
    return {name: resized(A, image.shape[:2]) for name, A in logits.items()}


def resized(A, size):
    """Logits (Z, H, W) -> (Z, h, w), bilinear."""
    return F.interpolate(A[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def averaged_logits(net, image, size=None, domains=None, scales=(1.0,), flips=None, average="logits"):
    """Test-time averaging: image (h, w, 3) uint8 RGB -> {domain: (Z, h, w) float32}, the mean over all views.

    scales: factors on the network's input size. flips: {domain: its flip_index()}, and the mirrored photo is
    a view too, at every scale; None for no mirror. average: "logits" or "probabilities". size, domains: as in
    `canvas_logits`. Every view is brought to the photo's own size and added to one sum, so memory does not
    grow with their number.
    """
    sums = {}
    for scale in scales:
        for mirrored in (False, True) if flips else (False,):
            logits = photo_logits(net, image[:, ::-1] if mirrored else image, size, domains, scale)
            for name, A in logits.items():
                if mirrored:
                    A = A.flip(-1)[flips[name].to(A.device)]  # a mirror's left arm is the right one
                if average == "probabilities":
                    A = A.softmax(0)
                sums[name] = sums[name].add_(A) if name in sums else A
    return {name: A.div_(len(scales) * (2 if flips else 1)) for name, A in sums.items()}


def confusion_of(net, dataset, size=None, indices=None, skipped=None):
    """Confusion matrix (Z, Z) of a network in eval mode on a dataset of one of its domains.

    It counts pixels of the label maps at their own size. indices: which samples, all by default (with several
    processes each takes a share and the matrices are added). A photo or label map that cannot be read raises
    InputError. Where `skipped` is a list it is left out instead, and its sentence added to the list.
    """
    name, Z = dataset.domain.name, dataset.domain.num_classes
    matrix = np.zeros((Z, Z), np.int64)
    for i in range(len(dataset)) if indices is None else indices:
        try:
            image, label = dataset.load(i)
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        prediction = photo_logits(net, image, size, [name])[name].argmax(0).cpu().numpy()
        matrix += confusion(prediction, label, Z)
    return matrix


def samples(net, datasets, size=None, skip_bad=False, count=3):
    """[(domain, [(image, truth, prediction), ...])]: the first photos of each dataset that can be read.

    One that cannot raises InputError, or is passed over with skip_bad.
    """
    chosen = []
    for dataset in datasets:
        name, triples = dataset.domain.name, []
        for i in range(len(dataset)):
            try:
                image, truth = dataset.load(i)
            except InputError:
                if not skip_bad:
                    raise
                continue
            prediction = photo_logits(net, image, size, [name])[name].argmax(0).cpu().numpy()
            triples.append((image, truth, prediction))
            if len(triples) == count:
                break
        chosen.append((dataset.domain, triples))
    return chosen


class Parser:
    """A trained human parser: a photo in, a label map of each of its label domains out.

    path: a run folder, whose model.pt is read, or a model.pt or best.pt.
    size: (H, W) that the whole photo is fitted into for the network, as training with --size does.
    max_side: the photo's own size instead, shrunk to at most that many pixels on its longer side.
    With neither, it is the size that the file names; of none, max_side 1024.
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
            size = trained_size(net, path)
        self.size = None if size is None else checked_size(size)
        self.max_side = max_side or MAX_SIDE

    def __call__(self, image):
        """A path, a PIL image or an array (h, w, 3) uint8 RGB -> {domain: (h, w) uint8 class ids}.

        The label maps have the photo's own size. The EXIF rotation of a file or PIL image is carried out:
        photo and label maps are upright, as viewers show the photo. Raises InputError for what is no photo.
        """
        image = pixels(image)
        h, w = image.shape[:2]
        scale = min(1, self.max_side / max(h, w))
        size = self.size or (max(1, round(h * scale)), max(1, round(w * scale)))
        return {name: label_map(A, h, w) for name, A in canvas_logits(self.net, image, size).items()}


def label_map(A, h, w):
    """Logits (Z, H, W) -> (h, w) uint8: the argmax of `resized`, taken in strips of rows.

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
        label[top:top + rows] = resized(strip, (len(y), w)).max(0).indices  # argmax takes three times as long
    return label.cpu().numpy()


def checked_size(size):
    """(H, W) as a tuple; raises InputError for anything else."""
    sides = size if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise InputError(f"size is {size!r}; it must be height and width in pixels, such as (512, 384)")
    return tuple(size)
