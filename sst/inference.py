"""From a photo to logits and label maps at its own size: for a trained parser, and to score a dataset.

Every photo goes one way: onto the network's canvas, through the network, and from the canvas to its own size.

    import sst
    parser = sst.load()                                      # the package's weights, or sst.load("model.pt")
    masks = parser("photo.jpg")                              # {domain: (h, w) class ids}
    skirt = parser.mask(masks, "cihp: dress, skirt")         # (h, w) bool
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import expression
from .checkpoint import load_model, model_file, trained_size
from .errors import InputError
from .files import fit, pixels
from .metrics import confusion

MAX_SIDE = 1024  # published datasets' photos have about 500 pixels a side, and training enlarges them twice
STRIP = 2 ** 20  # logits held at the photo's own size at a time


def on_canvas(image, size=None, scale=1.0):
    """image (h, w, 3) uint8 RGB -> the canvas that the network sees, (H, W, 3), and the photo's box on it.

    size: (H, W) of the canvas that the photo is fitted into, or None for the photo's own size. scale: factor
    on that size.
    """
    H, W = (max(1, round(scale * n)) for n in size or image.shape[:2])
    if size is None:  # both sides are scaled, each to a whole number of pixels, and nothing is padded
        return np.array(Image.fromarray(image).resize((W, H), Image.Resampling.BILINEAR)), (0, 0, H, W)
    canvas, _, box = fit(image, (H, W))
    return canvas, box


@torch.no_grad()
def canvas_logits(net, canvases, boxes, domains=None):
    """Canvases of one size, and the photo's box on each -> [{domain: logits (Z, height, width) float32}].

    domains: names; None for all. What is padding on a canvas is left out.
    """
    device = next(net.parameters()).device
    x = torch.from_numpy(np.stack(canvases)).to(device).permute(0, 3, 1, 2).float() / 255  # (n, 3, H, W)
    logits = net(x, domains)
    return [{name: A[k, :, top:top + height, left:left + width].float() for name, A in logits.items()}
            for k, (top, left, height, width) in enumerate(boxes)]


def photo_logits(net, image, size=None, domains=None, scale=1.0):
    """image (h, w, 3) uint8 RGB -> {domain: logits (Z, h, w) float32} at its own size, one canvas a photo."""
    canvas, box = on_canvas(image, size, scale)
    (logits,) = canvas_logits(net, [canvas], [box], domains)
    return {name: resized(A, image.shape[:2]) for name, A in logits.items()}


def resized(A, size):
    """Logits (Z, H, W) -> (Z, h, w), bilinear."""
    return F.interpolate(A[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def averaged_logits(net, image, size=None, domains=None, scales=(1.0,), flips=None, average="logits"):
    """Test-time averaging: image (h, w, 3) uint8 RGB -> {domain: (Z, h, w) float32}, the mean over all views.

    scales: factors on the network's input size. flips: {domain: its flip_index()}, and the mirrored photo is
    a view too, at every scale; None for no mirror. average: "logits" or "probabilities". size, domains: as in
    `photo_logits`. Every view is brought to the photo's own size and added to one sum, so memory does not
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


@torch.no_grad()
def photo_labels(net, image, size=None, domains=None, scales=(1.0,), flips=None, average="logits"):
    """image (h, w, 3) uint8 RGB -> {domain: class ids (h, w) uint8}: the argmax of `averaged_logits`."""
    if len(scales) == 1 and not flips:  # of one view, few pixels' logits need to be known at its own size
        canvas, box = on_canvas(image, size, scales[0])
        (logits,) = canvas_logits(net, [canvas], [box], domains)
        return {name: label_map(A, *image.shape[:2]) for name, A in logits.items()}
    logits = averaged_logits(net, image, size, domains, scales, flips, average)
    return {name: A.max(0).indices.to(torch.uint8).cpu().numpy() for name, A in logits.items()}


def confusion_of(net, dataset, size=None, indices=None, skipped=None, stop=lambda: False):
    """Confusion matrix (Z, Z) of a network in eval mode on a dataset of one of its domains.

    It counts pixels of the label maps at their own size. indices: which samples, all by default (with several
    processes each takes a share and the matrices are added). A photo or label map that cannot be read raises
    InputError. Where `skipped` is a list it is left out instead, and its sentence added to the list. The
    photos after `stop()` is true are left out.
    """
    name, Z = dataset.domain.name, dataset.domain.num_classes
    matrix = np.zeros((Z, Z), np.int64)
    for i in range(len(dataset)) if indices is None else indices:
        if stop():
            break
        try:
            image, label = dataset.load(i)
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        prediction = photo_labels(net, image, size, [name])[name]
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
            prediction = photo_labels(net, image, size, [name])[name]
            triples.append((image, truth, prediction))
            if len(triples) == count:
                break
        chosen.append((dataset.domain, triples))
    return chosen


class Parser:
    """A trained human parser: a photo in, a label map of each of its label domains out.

    path: a run folder, whose model.pt is read, a model.pt or best.pt, or a folder with model.safetensors. By
    default the weights that the package carries.
    device: "cpu", "cuda", ...; by default a GPU where there is one. half: compute in half precision, on a
    GPU.
    size: (H, W) that the whole photo is fitted into for the network, as training with --size does.
    max_side: the photo's own size instead, shrunk to at most that many pixels on its longer side.
    With neither, it is the size that the file names; of none, max_side 1024.
    `domains` is {name: LabelDomain}. Raises InputError.
    """

    def __init__(self, path=None, size=None, max_side=None, device=None, half=False):
        if size is not None and max_side is not None:
            raise InputError(f"size {size} and max_side {max_side}: give one of them")
        path = model_file(path)
        net, domains = load_model(path)
        self.device, self.half = usable(device, half), half
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.domains = {domain.name: domain for domain in domains}
        if size is None and max_side is None:
            size = trained_size(net, path)
        self.size = None if size is None else checked_size(size)
        if max_side is not None and not (isinstance(max_side, int) and max_side > 0):
            raise InputError(f"max_side is {max_side!r}; it must be a number of pixels, 1 or more")
        self.max_side = max_side or MAX_SIDE

    def __call__(self, images, domains=None, probabilities=False, batch_size=8):
        """A path, a PIL image or an array (h, w, 3) uint8 RGB -> {domain: (h, w) uint8 class ids}.

        Of a list of them a list. Those that the network sees at one size it sees together, up to batch_size
        of them. domains: names, for some only. probabilities: (Z, h, w) float32 instead, of every class.
        What is returned has the photo's own size. The EXIF rotation of a file or PIL image is carried out:
        photo and label maps are upright, as viewers show the photo. Raises InputError for what is no photo
        and for a domain that there is not.
        """
        domains = list(self.chosen(domains))
        if not isinstance(images, (list, tuple)):
            return self([images], domains, probabilities, batch_size)[0]
        results = [None] * len(images)
        waiting = {}  # {size of the canvas: [(place, photo's size, canvas, box), ...]}
        for place, image in enumerate(images):
            image = pixels(image)
            canvas, box = self.canvas(image)
            alike = waiting.setdefault(canvas.shape, [])
            alike.append((place, image.shape[:2], canvas, box))
            if len(alike) == batch_size:
                self.parse(waiting.pop(canvas.shape), domains, probabilities, results)
        for alike in waiting.values():
            self.parse(alike, domains, probabilities, results)
        return results

    def chosen(self, names=None):
        """{name: LabelDomain} of those names, or of all; raises InputError for one that there is not."""
        for name in names or ():
            if name not in self.domains:
                raise InputError(f"domains: '{name}' is none of {', '.join(self.domains)}")
        return {name: self.domains[name] for name in names or self.domains}

    def canvas(self, image):
        """A photo (h, w, 3) uint8 as the network sees it, (H, W, 3) uint8, and its box there."""
        if self.size:
            return on_canvas(image, self.size)
        scale = min(1, self.max_side / max(image.shape[:2]))
        return on_canvas(image, tuple(max(1, round(scale * n)) for n in image.shape[:2]))

    def parse(self, alike, domains, probabilities, results):
        """Put the label maps, or probabilities, of photos whose canvases have one size in their places."""
        places, sizes, canvases, boxes = zip(*alike)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            logits = canvas_logits(self.net, canvases, boxes, domains)
        for place, (h, w), each in zip(places, sizes, logits):
            results[place] = {
                name: resized(A, (h, w)).softmax(0).cpu().numpy() if probabilities else label_map(A, h, w)
                for name, A in each.items()}

    def mask(self, image, text):
        """The pixels that an expression means, (h, w) bool: "ccp-fine: dress, skirt".

        image: a photo as in a call, or the label maps of one. The expressions: see sst/expression.py. Raises
        InputError, for a class that there is not with the nearest names.
        """
        masks, classes = image, {name: domain.classes for name, domain in self.domains.items()}
        if not isinstance(image, dict):
            blank = {name: np.zeros((1, 1), np.uint8) for name in self.domains}
            expression.evaluate(text, blank, classes)  # what is wrong with it is said before any work
            named = [name for name in self.domains if name in expression.names_in(text)]
            masks = self(image, named or None)
        return expression.evaluate(text, masks, classes)

    def legend(self):
        """{domain: [(class name, id, (r, g, b)), ...]}."""
        return {name: [(c, k, tuple(rgb)) for k, (c, rgb) in enumerate(zip(d.classes, d.palette().tolist()))]
                for name, d in self.domains.items()}


def usable(device, half):
    """A torch.device; raises InputError for one that is not there, and for half precision without a GPU."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        here = '"cpu" or "cuda"' if torch.cuda.is_available() else '"cpu"'
        raise InputError(f"device {device!r}: cannot be used here ({str(error).splitlines()[0]}); give "
                         f"{here}") from None
    if half and device.type != "cuda":
        raise InputError(f"half precision on '{device.type}': is for GPUs; leave half out")
    return device


def label_map(A, h, w):
    """Logits (Z, H, W) -> (h, w) uint8: the argmax of `resized`.

    A pixel's logits are a weighted mean of those of the four around it. Where all four have the same class,
    so has the pixel; only the others are worked out. Strips of rows bound the memory: all logits of a photo
    of 40 megapixels would be gigabytes.
    """
    Z, H, W = A.shape
    highest, flat = A.max(0).indices, A.flatten(1)  # argmax takes three times as long
    label = torch.empty(h, w, dtype=torch.uint8, device=A.device)
    left, right, s = between(w, W, A.device)
    rows = max(1, STRIP // (4 * w))
    for top in range(0, h, rows):
        part = slice(top, min(top + rows, h))
        above, below, t = (v[part, None] for v in between(h, H, A.device))
        corners = [y * W + x for y in (above, below) for x in (left, right)]  # (rows, w) places in H*W
        found = [highest.flatten()[place] for place in corners]
        label[part] = found[0]
        mixed = (found[1] != found[0]) | (found[2] != found[0]) | (found[3] != found[0])
        y, x = mixed.nonzero(as_tuple=True)
        for some in torch.arange(len(y), device=A.device).split(max(1, STRIP // Z)):
            u, v = y[some], x[some]
            four = [flat[:, place[u, v]] for place in corners]  # (Z, n) each
            across = [a + s[v] * (b - a) for a, b in (four[:2], four[2:])]
            label[part][u, v] = (across[0] + t[u, 0] * (across[1] - across[0])).max(0).indices.to(torch.uint8)
    return label.cpu().numpy()


def between(n, N, device):
    """Where n pixels lie among N: the one before, the one after, and the way between them, 0 to 1."""
    place = ((torch.arange(n, device=device) + 0.5) * (N / n) - 0.5).clamp(min=0)
    before = place.long()
    return before, (before + 1).clamp(max=N - 1), place - before


def checked_size(size):
    """(H, W) as a tuple; raises InputError for anything else."""
    sides = size if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise InputError(f"size is {size!r}; it must be height and width in pixels, such as (512, 384)")
    return tuple(size)
