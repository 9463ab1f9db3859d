"""From photos to logits at their own size, and scoring a dataset with them."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .batches import fit
from .metrics import confusion


@torch.no_grad()
def photo_logits(net, image, size=None, domains=None, scale=1.0):
    """image (h, w, 3) uint8 RGB -> {domain: logits (Z, h, w) float32} at the photo's own size.

    size: (H, W) that the photo is fitted into for the network, or None for its own size. domains: names; None for all.
    scale: factor on that size; the logits keep the photo's.
    """
    h, w = image.shape[:2]
    H, W = (max(1, round(scale * n)) for n in size or (h, w))
    if size is None:
        canvas, box = np.array(Image.fromarray(image).resize((W, H), Image.Resampling.BILINEAR)), (0, 0, H, W)
    else:
        canvas, _, box = fit(image, (H, W))
    device = next(net.parameters()).device
    x = torch.from_numpy(canvas).to(device).permute(2, 0, 1)[None].float() / 255
    top, left, height, width = box
    return {name: F.interpolate(A[:, :, top:top + height, left:left + width].float(), size=(h, w), mode="bilinear", align_corners=False)[0]
            for name, A in net(x, domains).items()}


@torch.no_grad()
def averaged_logits(net, image, size=None, domains=None, scales=(1.0,), flips=None, average="logits"):
    """Test-time averaging: image (h, w, 3) uint8 RGB -> {domain: (Z, h, w) float32}, the mean over all views of the photo.

    scales: factors on the network's input size. flips: {domain: its flip_index()}, and the mirrored photo is a view too, at every
    scale; None for no mirror. average: "logits" or "probabilities". size, domains: as in `photo_logits`.
    Every view is brought to the photo's own size and added to one sum, so memory does not grow with their number.
    """
    sums = {}
    for scale in scales:
        for mirrored in (False, True) if flips else (False,):
            logits = photo_logits(net, image[:, ::-1] if mirrored else image, size, domains, scale)
            for name, A in logits.items():
                if mirrored:
                    A = A.flip(-1)[flips[name].to(A.device)]  # what is the left arm in a mirror is the right one
                if average == "probabilities":
                    A = A.softmax(0)
                sums[name] = sums[name].add_(A) if name in sums else A
    return {name: A.div_(len(scales) * (2 if flips else 1)) for name, A in sums.items()}


def confusion_of(net, dataset, size=None, indices=None):
    """Confusion matrix (Z, Z) of a network in eval mode on a dataset of one of its domains, at the label maps' own size.

    indices: which samples, all by default (with several processes each takes a share and the matrices are added).
    """
    name, Z = dataset.domain.name, dataset.domain.num_classes
    matrix = np.zeros((Z, Z), np.int64)
    for i in range(len(dataset)) if indices is None else indices:
        image, label = dataset.load(i)
        prediction = photo_logits(net, image, size, [name])[name].argmax(0).cpu().numpy()
        matrix += confusion(prediction, label, Z)
    return matrix
