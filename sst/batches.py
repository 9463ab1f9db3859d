"""What a training step sees: augmentation, and the order of samples, both functions of the seed alone.

The unit is the micro-batch: B crops of all N domains (equations.md's rule: B/N slots each, the rest in rotation). Micro-batch m
holds the same crops whatever the number of processes or workers, so runs can be split, interrupted and compared seed for seed.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from .domains import IGNORE
from .errors import InputError

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean: what padding looks like to the network is zero


class Schedule:
    """Which samples make up micro-batch m: `schedule[m]` is a list of B keys (domain position, epoch, index), by domain.

    sizes: number of samples of each domain. Every domain reads its own endless series of seeded permutations.
    Raises InputError where B < N.
    """

    def __init__(self, sizes, batch_size, seed):
        self.sizes, self.batch_size, self.seed = list(sizes), batch_size, seed
        if batch_size < len(self.sizes):
            raise InputError(f"--batch-size {batch_size}: every micro-batch needs an image of each of the {len(self.sizes)} label "
                             f"domains; use {len(self.sizes)} or more")

    def read(self, d, m):
        """How many samples of domain d the micro-batches before m have read."""
        N = len(self.sizes)
        whole, rest = divmod(self.batch_size, N)
        # The rest slots go around: slot t of the whole run is domain t % N's, and micro-batch m has slots m*rest ... +rest-1.
        return m * whole + (m * rest - d + N - 1) // N

    def __getitem__(self, m):
        keys = []
        for d, size in enumerate(self.sizes):
            for k in range(self.read(d, m), self.read(d, m + 1)):
                epoch, place = divmod(k, size)
                keys.append((d, epoch, int(permutation(self.seed, d, epoch, size)[place])))
        return keys

    def passes(self, m):
        """How often each domain has been read after m micro-batches."""
        return [self.read(d, m) / size for d, size in enumerate(self.sizes)]


@lru_cache(maxsize=16)
def permutation(seed, d, epoch, size):
    return np.random.default_rng((seed, d, epoch)).permutation(size)


class Crops(torch.utils.data.Dataset):
    """The augmented sample behind a key of the schedule: image (3, H, W) uint8, label (H, W) uint8, domain position, name.

    datasets: one per domain. size: (H, W) that photos are fitted into first, or None. crop: (H, W) of the training window.
    scale: range of the random resize.
    An unusable file is returned as the InputError that names it: raised in a worker it would end in a foreign traceback. With
    `skip_bad` the next sample of the list that can be used takes its place, and a fifth item tells what was wrong.
    """

    def __init__(self, datasets, size, crop, seed, scale=(0.5, 2), skip_bad=False):
        self.datasets, self.size, self.crop, self.seed, self.scale, self.skip_bad = datasets, size, crop, seed, scale, skip_bad

    def __getitem__(self, key):
        d, epoch, index = key
        skipped = []
        while True:
            try:
                image, label = self.datasets[d].load(index, self.size)
                break
            except InputError as error:
                skipped.append(str(error))
                if not self.skip_bad or len(skipped) == len(self.datasets[d]):
                    return error
                index = (index + 1) % len(self.datasets[d])
        if self.size is not None:
            image, label, _ = fit(image, self.size, label)
        rng = np.random.default_rng((self.seed, d, epoch, index))
        image, label = augment(image, label, rng, self.crop, flip_table(self.datasets[d].domain), self.scale)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label), d, self.datasets[d].where(index), skipped


def collate(samples):
    """images (B, 3, H, W) uint8, labels (B, H, W) uint8, domain [B], names [B], skipped [...]; or the first InputError among them."""
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    images, labels, domain, names, skipped = zip(*samples)
    return torch.stack(images), torch.stack(labels), list(domain), list(names), [what for each in skipped for what in each]


def flip_table(domain):
    """(256,) uint8: the class id of a pixel in a mirrored photo; what is ignored stays ignored."""
    table = np.arange(256, dtype=np.uint8)
    table[:domain.num_classes] = domain.flip_index().numpy()
    return table


def fit(image, size, label=None):
    """Scale a photo, aspect kept, to lie centred in (H, W); the rest is padding (mean colour, label 255).

    Returns image (H, W, 3), label (H, W) or None, and the box (top, left, height, width) of the photo therein.
    """
    h, w = (image if label is None else label).shape[:2]  # the photo may have been read at a part of its size
    H, W = size
    scale = min(H / h, W / w)
    height, width = max(1, min(H, round(h * scale))), max(1, min(W, round(w * scale)))
    top, left = (H - height) // 2, (W - width) // 2
    box = (top, left, height, width)
    image = paste(image, (H, W), box, (0, 0, *image.shape[1::-1]), MEAN_COLOUR, Image.Resampling.BILINEAR)
    if label is not None:
        label = paste(label, (H, W), box, (0, 0, w, h), IGNORE, Image.Resampling.NEAREST)
    return image, label, box


def augment(image, label, rng, crop, flip, scale=(0.5, 2)):
    """Random resize (0.5 to 2 as published), random crop (padded where the photo is smaller), random mirroring.

    image (H, W, 3), label (H, W) uint8; crop: (H, W); flip: `flip_table` of the domain. Returns both at crop size.
    """
    h, w = image.shape[:2]
    factor = rng.uniform(*scale)
    place, source = [], []  # per axis: first pixel and length in the crop, first and last coordinate in the photo
    for full, window in ((h, crop[0]), (w, crop[1])):
        scaled = max(1, round(full * factor))
        spare = scaled - window  # < 0: the photo is smaller and lies somewhere within the crop
        start = int(rng.integers(min(spare, 0), max(spare, 0) + 1))
        length = min(scaled, window)
        place.append((max(-start, 0), length))
        source.append((max(start, 0) * full / scaled, (max(start, 0) + length) * full / scaled))
    (top, height), (left, width) = place
    (y0, y1), (x0, x1) = source
    # Only the visible part is resized, straight from the photo.
    image = paste(image, crop, (top, left, height, width), (x0, y0, x1, y1), MEAN_COLOUR, Image.Resampling.BILINEAR)
    label = paste(label, crop, (top, left, height, width), (x0, y0, x1, y1), IGNORE, Image.Resampling.NEAREST)
    if rng.random() < 0.5:
        image, label = image[:, ::-1].copy(), flip[label[:, ::-1]]
    return image, label


def paste(pixels, size, box, source, fill, resample):
    """A canvas of (H, W) filled with `fill`, the part `source` (x0, y0, x1, y1) of `pixels` resized into `box` of it."""
    top, left, height, width = box
    part = np.asarray(Image.fromarray(pixels).resize((width, height), resample, box=source))
    if (height, width) == tuple(size):
        return part.copy()
    canvas = np.empty((*size, *pixels.shape[2:]), np.uint8)
    canvas[:] = fill
    canvas[top:top + height, left:left + width] = part
    return canvas
