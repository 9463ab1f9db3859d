"""From photos to logits at their own size, and scoring a dataset with them."""

import numpy as np
import torch
import torch.nn.functional as F

from .batches import fit
from .metrics import confusion


@torch.no_grad()
def photo_logits(net, image, size=None, domains=None):
    """image (h, w, 3) uint8 RGB -> {domain: logits (Z, h, w) float32} at the photo's own size.

    size: (H, W) that the photo is fitted into for the network, or None for its own size. domains: names; None for all.
    """
    h, w = image.shape[:2]
    canvas, box = image, (0, 0, h, w)
    if size is not None:
        canvas, _, box = fit(image, size)
    device = next(net.parameters()).device
    x = torch.from_numpy(np.ascontiguousarray(canvas)).to(device).permute(2, 0, 1)[None].float() / 255
    F_ = net.features(x)[-1]
    top, left, height, width = box
    logits = {}
    for name in domains or net.heads:
        A = F.interpolate(net.heads[name](F_).float(), size=x.shape[-2:], mode="bilinear", align_corners=False)
        A = A[:, :, top:top + height, left:left + width]
        logits[name] = F.interpolate(A, size=(h, w), mode="bilinear", align_corners=False)[0]
    return logits


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
