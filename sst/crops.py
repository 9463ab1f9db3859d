"""What a training step sees of datasets: micro-batches of B crops.

Micro-batch m holds the same crops whatever the number of processes or workers: its samples (`Schedule`) and
their augmentation (`Crops`) are functions of the seed alone. So runs can be split, interrupted and compared
seed for seed.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .distributed import ignore_signals
from .domains import IGNORE
from .errors import InputError
from .files import MEAN_COLOUR, fit, paste


class Schedule:
    """Which samples make up micro-batch m: `schedule[m]` is a list of B keys (domain position, epoch, index).

    sizes: number of samples of each of the N domains. slots: how the B places are shared out.
        "equal": B/N for each domain, and what is left over goes around. Every domain reads its own endless
        series of seeded permutations, so a small one is seen more often than a large one.
        "proportional": every sample of every domain once an epoch. An epoch is one seeded permutation of them
        all. Micro-batches cut it in order, across its end, and may hold no sample of some domain.
    The keys of a micro-batch are sorted by domain. Raises InputError where B < N with equal slots.
    """

    def __init__(self, sizes, batch_size, seed, slots="equal"):
        if slots not in ("equal", "proportional"):
            raise ValueError(f"Schedule: slots is {slots!r}; it is one of equal, proportional")
        self.sizes, self.batch_size, self.seed, self.slots = list(sizes), batch_size, seed, slots
        if slots == "equal" and batch_size < len(self.sizes):
            raise InputError(f"--batch-size {batch_size}: every micro-batch needs an image of each of the "
                             f"{len(self.sizes)} label domains; use {len(self.sizes)} or more, "
                             f"or --slots proportional")

    def __getitem__(self, m):
        if self.slots == "equal":
            reads = enumerate(zip(self.read(m), self.read(m + 1)))
            return [self.key(d, k) for d, (first, end) in reads for k in range(first, end)]
        return sorted(self.mixed_key(k) for k in range(m * self.batch_size, (m + 1) * self.batch_size))

    def passes(self, m):
        """How often each domain has been read after m micro-batches."""
        return [read / size for read, size in zip(self.read(m), self.sizes)]

    def read(self, m):
        """How many samples of each domain the micro-batches before m have read."""
        B, N = self.batch_size, len(self.sizes)
        if self.slots == "equal":
            whole, rest = divmod(B, N)
            # The rest slots go around: slot t of the whole run is domain t % N's, and micro-batch m has the
            # slots m*rest ... m*rest + rest - 1.
            return [m * whole + (m * rest - d + N - 1) // N for d in range(N)]
        epoch, place = divmod(m * B, sum(self.sizes))
        begun = permutation((self.seed, epoch), sum(self.sizes))[:place]
        counts = np.bincount(self.domain_of(begun), minlength=N)
        return [epoch * size + int(count) for size, count in zip(self.sizes, counts)]

    def key(self, d, k):
        """The k-th key that domain d reads for itself."""
        epoch, place = divmod(k, self.sizes[d])
        return d, epoch, int(permutation((self.seed, d, epoch), self.sizes[d])[place])

    def mixed_key(self, k):
        """The k-th key of all domains together."""
        epoch, place = divmod(k, sum(self.sizes))
        sample = int(permutation((self.seed, epoch), sum(self.sizes))[place])
        d = int(self.domain_of(sample))
        return d, epoch, sample - sum(self.sizes[:d])

    def domain_of(self, sample):
        """The domain of a position, or of many, in the list of all samples, one domain after the other."""
        return np.searchsorted(np.cumsum(self.sizes), sample, side="right")


@lru_cache(maxsize=16)
def permutation(seed, size):
    return np.random.default_rng(seed).permutation(size)


class Crops(torch.utils.data.Dataset):
    """The augmented sample behind a key of the schedule.

    It is image (3, H, W) uint8, label (H, W) uint8, name of the domain, name of the photo, and a list of
    sentences about photos that were skipped.
    datasets: one per domain. size: (H, W) that photos are fitted into first, or None. crop: (H, W) of the
    training window. scale, resize: as in `augment`.
    An unusable file is returned as the InputError that names it: raised in a worker it would end in a foreign
    traceback. With `skip_bad` the next sample of the list that can be used takes its place instead.
    """

    def __init__(self, datasets, size, crop, seed, scale=(0.5, 2), skip_bad=False, resize="common"):
        self.datasets, self.size, self.crop, self.seed = datasets, size, crop, seed
        self.scale, self.skip_bad, self.resize = scale, skip_bad, resize

    def __getitem__(self, key):
        d, epoch, index = key
        dataset, skipped = self.datasets[d], []
        while True:
            try:
                image, label = dataset.load(index, self.size)
                break
            except InputError as error:
                skipped.append(str(error))
                if not self.skip_bad or len(skipped) == len(dataset):
                    return error
                index = (index + 1) % len(dataset)
        if self.size is not None:
            image, label, _ = fit(image, self.size, label)
        rng = np.random.default_rng((self.seed, d, epoch, index))
        flip = flip_table(dataset.domain)
        image, label = augment(image, label, rng, self.crop, flip, self.scale, self.resize)
        image, label = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)  # (3, H, W), (H, W)
        return image, label, dataset.domain.name, dataset.where(index), skipped


def augment(image, label, rng, crop, flip, scale=(0.5, 2), resize="common"):
    """Random resize, random crop (padded where the photo is smaller), random mirroring.

    image (H, W, 3), label (H, W) uint8. crop: (H, W). flip: `flip_table` of the domain. scale: range of the
    resize. resize: "common" draws one factor for height and width, "independent" one for each, as Graphonomy
    and Grapy-ML do. Returns image and label at crop size.
    """
    if resize not in ("common", "independent"):
        raise ValueError(f"augment: resize is {resize!r}; it is one of common, independent")
    vertical = rng.uniform(*scale)
    horizontal = rng.uniform(*scale) if resize == "independent" else vertical
    place, source = [], []  # per axis: first pixel and length in the crop, both ends of it in the photo
    for full, window, factor in zip(image.shape, crop, (vertical, horizontal)):
        scaled = max(1, round(full * factor))
        spare = scaled - window  # < 0: the photo is smaller and lies somewhere within the crop
        start = int(rng.integers(min(spare, 0), max(spare, 0) + 1))
        length = min(scaled, window)
        place.append((max(-start, 0), length))
        source.append((max(start, 0) * full / scaled, (max(start, 0) + length) * full / scaled))
    (top, height), (left, width) = place
    (y0, y1), (x0, x1) = source
    box, part = (top, left, height, width), (x0, y0, x1, y1)
    # Only the visible part is resized, straight from the photo.
    image = paste(image, crop, box, part, MEAN_COLOUR, Image.Resampling.BILINEAR)
    label = paste(label, crop, box, part, IGNORE, Image.Resampling.NEAREST)
    if rng.random() < 0.5:
        image, label = image[:, ::-1].copy(), flip[label[:, ::-1]]
    return image, label


def flip_table(domain):
    """(256,) uint8: the class id of a pixel in a mirrored photo; what is ignored stays ignored."""
    table = np.arange(256, dtype=np.uint8)
    table[:domain.num_classes] = domain.flip_index().numpy()
    return table


def collate(samples):
    """A batch of `Crops`, or the first InputError among them.

    images (B, 3, H, W) uint8, labels (B, H, W) uint8, domain [B names], photos [B names], skipped [sentence].
    """
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    images, labels, domain, photos, skipped = zip(*samples)
    sentences = [sentence for each in skipped for sentence in each]
    return torch.stack(images), torch.stack(labels), list(domain), list(photos), sentences


class Batch(NamedTuple):
    """Micro-batch `number` of a run on its device. skipped: sentences about files that could not be read."""

    number: int
    images: torch.Tensor  # (B, 3, H, W) uint8
    labels: torch.Tensor  # (B, H, W) uint8
    domain: list
    names: list
    skipped: list


def micro_batches(crops, schedule, numbers, workers, device):
    """The Batches of these numbers, in order; raises InputError for a file that cannot be read."""
    loader = torch.utils.data.DataLoader(
        crops, batch_sampler=(schedule[m] for m in numbers), num_workers=workers, collate_fn=collate,
        pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals)
    for number, batch in zip(numbers, loader):
        if isinstance(batch, InputError):
            raise batch
        images, labels, *rest = batch
        yield Batch(number, images.to(device, non_blocking=True), labels.to(device, non_blocking=True), *rest)
