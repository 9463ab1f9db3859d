"""Data of label domains: the datasets on disk, and what a training step sees of them.

A dataset here is anything with `domain` (a LabelDomain), `__len__`, `load(i, size)` -> image (H, W, 3) uint8
RGB and label map (H, W) uint8 of class ids with 255 ignored, and `where(i)`, a name for messages. `Photos`
reads files, and figures/ draws. Where `size` (H, W) is not None the photo will be fitted into it. It
may then be smaller than its label map, but not smaller than that.

A training step sees micro-batches of B crops. Micro-batch m holds the same crops whatever the number of
processes or workers: its samples (`Schedule`) and their augmentation (`Crops`) are functions of the seed
alone. So runs can be split, interrupted and compared seed for seed.
"""

import json
import os
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .distributed import ignore_signals
from .domains import BUILTIN, HERE, IGNORE, builtin_domain, from_dict
from .errors import InputError
from .files import MEAN_COLOUR, fit, mat_reader, one_line, paste, read_image, read_label

# Folders of photos and labels and the list of ids, for each built-in domain; the first layout found counts.
# {split} is train or val; {Split} is Training or Validation; a list of None means every photo of the folder.
LAYOUTS = {
    "pascal": [("JPEGImages", "SegmentationPart", "list/{split}_id.txt")],
    "atr": [("JPEGImages", "SegmentationClassAug", "list/{split}_id.txt")],
    "cihp": [("Images", "Category_ids", "lists/{split}_id.txt"),
             ("{Split}/Images", "{Split}/Category_ids", None)],
    "lip": [("{split}_images", "{split}_segmentations", "{split}_id.txt")],
}
CCP = ("photos", "annotations/pixel-level")  # Clothing Co-Parsing; the lists are ours, in sst/builtin/
IMAGE_ENDINGS, LABEL_ENDINGS = (".jpg", ".jpeg", ".png"), (".png", ".mat")


class Photos:
    """Photos and label files of one domain.

    images, labels: paths, as many of each. Raises InputError from `load` for a file that cannot be used.
    """

    def __init__(self, domain, images, labels):
        self.domain, self.images, self.labels = domain, list(images), list(labels)

    def __len__(self):
        return len(self.images)

    def where(self, i):
        return str(self.images[i])

    def load(self, i, size=None):
        """image (H, W, 3) uint8 RGB, label map (H, W) uint8."""
        image, label = read_image(self.images[i], size), read_label(self.labels[i], self.domain)
        (h, w), (lh, lw) = image.shape[:2], label.shape
        if size and (h, w) != (lh, lw):
            with Image.open(self.images[i]) as stored:
                w, h = stored.size
        if (h, w) != (lh, lw):
            raise InputError(f"{self.labels[i]}: the label map is {lw}x{lh} but its photo {self.images[i]} "
                             f"is {w}x{h}; they must have the same size, so export the label again at the "
                             f"photo's size")
        return image, label


class Part:
    """Some samples of a dataset, as a dataset."""

    def __init__(self, dataset, indices):
        self.dataset, self.domain, self.indices = dataset, dataset.domain, [int(i) for i in indices]

    def __len__(self):
        return len(self.indices)

    def where(self, i):
        return self.dataset.where(self.indices[i])

    def load(self, i, size=None):
        return self.dataset.load(self.indices[i], size)


def fraction_of(dataset, fraction, seed):
    """That share of a dataset, at least one sample, chosen by seed (Table 5)."""
    return first_of(dataset, max(1, round(fraction * len(dataset))), seed)


def first_of(dataset, count, seed):
    """So many samples of a dataset, chosen by seed: fewer lie within more. All, if it has no more."""
    order = np.random.default_rng((seed, len(dataset))).permutation(len(dataset))
    return Part(dataset, order[:count])


# Finding the files ----------------------------------------------------------------------------------------


def open_datasets(specs, split):
    """["NAME=PATH", ...] -> datasets of that split. Raises InputError where a list or a file is missing."""
    return [open_dataset(name, path, split) for name, path in named_paths(specs).items()]


def named_paths(specs):
    """["NAME=PATH", ...] -> {name: path}; raises InputError for another form, and for a name given twice."""
    seen = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not (name and equals and path):
            raise InputError(f"{spec}: write NAME=PATH, such as pascal=DIR; built-in names are "
                             f"{', '.join(BUILTIN)}")
        if name in seen:
            raise InputError(f"label domain '{name}' is given twice ({seen[name]} and {path}); give every "
                             f"one once")
        seen[name] = path
    return seen


def open_dataset(name, path, split="train", missing=None):
    """The photos of one label domain.

    name: a built-in domain, `path` being its folder; or any name, `path` being a folder with a domain.json or
    such a file. split: train or val (for some layouts test). Raises InputError for what is missing. Where
    `missing` is a list, ids without a photo or label map are left out, and their sentences added to it.
    """
    path = Path(path)
    file = path if path.is_file() else path / "domain.json"
    if file.is_file():
        return open_own(name, file, split, missing)
    domain = builtin_domain(name)
    if not path.is_dir():
        raise InputError(f"{name}={path}: no such folder; give the folder that holds the dataset")
    if name.startswith("ccp-"):
        listed = HERE / "builtin" / (f"{name}_train_id.txt" if split == "train" else f"ccp_{split}_id.txt")
        layouts = [(*CCP, str(listed))]
    else:
        layouts = LAYOUTS[name]
    words = {"split": split, "Split": {"train": "Training", "val": "Validation"}.get(split, split.title())}
    layouts = [tuple(part and part.format(**words) for part in layout) for layout in layouts]
    for images, labels, listed in layouts:
        if (path / images).is_dir():
            return list_photos(domain, path / images, path / labels, listed and path / listed, missing)
    wanted = " or ".join(f"{images}/ with {labels}/" for images, labels, _ in layouts)
    raise InputError(f"{name}={path}: found no {layouts[0][0]} folder there; a {name} folder holds {wanted}")


def open_own(name, file, split, missing):
    """The photos of a domain.json, under the name that the command line gives it."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({one_line(error)}); see 'your own dataset' in the "
                         f"README") from None
    domain = from_dict(fields, str(file))
    if name in BUILTIN and domain.classes != builtin_domain(name).classes:
        raise InputError(f"{file}: describes '{domain.name}' with other classes than the built-in {name}; "
                         f"give it a name of its own: {domain.name}={file.parent}")
    if name != domain.name:
        domain = replace(domain, name=name)  # the command line's name is the one that all output uses
    root = file.parent
    return list_photos(domain, root / fields.get("images", "images"), root / fields.get("labels", "labels"),
                       root / fields.get(split, f"{split}_id.txt"), missing)


def list_photos(domain, images, labels, listed, missing=None):
    """A `Photos` of the ids in the text file `listed`, or of every photo in the folder where it is None.

    images, labels: folders. missing: as in `open_dataset`.
    """
    for folder, what in ((images, "photos"), (labels, "label maps")):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the {what} of domain '{domain.name}' are expected "
                             f"there")
    if listed is None:
        ids, listed = sorted(listing(images, IMAGE_ENDINGS)), images
    else:
        ids = read_ids(listed)
    if not ids:
        raise InputError(f"{listed}: holds no id; a list has one id a line, without folder and ending")
    pairs = []
    for id in ids:
        try:
            pairs.append((find(images, id, IMAGE_ENDINGS, "photo", listed),
                          find(labels, id, LABEL_ENDINGS, "label map", listed)))
        except InputError as error:
            if missing is None:
                raise
            missing.append(str(error))
    for _, label in pairs[:1]:
        if label.suffix == ".mat":
            mat_reader(label)  # what is missing is said before training begins
    return Photos(domain, [image for image, _ in pairs], [label for _, label in pairs])


def read_ids(file):
    """The lines of a list of ids that are not empty; raises InputError."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: the list of ids is not readable ({one_line(error)}); write one id a line, "
                         f"without folder and ending") from None


def find(folder, id, endings, what, listed):
    """The file of an id, whatever its ending; raises InputError."""
    place = folder / id
    file = listing(place.parent, endings).get(place.name)
    if file is None:
        raise InputError(f"{listed}: id '{id}' has no {what} {place} ({', '.join(endings)}); add the file or "
                         f"remove the id (ids are file names without folder and ending)")
    return place.parent / file


@cache
def listing(folder, endings):
    """{stem: file name} of a folder, read once.

    Looking for 28,000 files one by one takes minutes on a network disk.
    """
    if not folder.is_dir():
        return {}
    files = {}
    for ending in reversed(endings):  # the first ending wins
        files.update({os.path.splitext(f)[0]: f for f in os.listdir(folder) if f.lower().endswith(ending)})
    return files


# What a training step sees --------------------------------------------------------------------------------


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
