"""A dataset before it is trained on: `python train.py --check --data NAME=DIR ...` reads every file once.

Counts are of the files that can be used; the others are named, and none of them stops the reading. Which
classes touch (M_intra, Eq. 6) is counted on the training list alone: the mask is part of the model, and
validation labels must not shape it.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from .data import named_paths, open_dataset
from .domains import IGNORE, vector
from .doubts import doubts_of, exchanged
from .errors import InputError
from .files import TURNS, one_line, orientation
from .plots import save_check, scaled

SHOWN = 20  # entries of a long list that are printed; the rest are counted
# A pair of classes is proposed for M_intra if it touches in this share of the photos that hold both. A few
# stray pixels and crouching people make nearly all pairs touch somewhere: in Clothing Co-Parsing 14 of
# ccp-coarse's 15, 11 of them so often.
TOUCHING = 0.1


def report(stages, open_data):
    """Read and print a report on the data of a run's trainings.

    stages: their settings. open_data: opens the figures where a stage has no --data. Returns the exit status:
    1 where a file cannot be used, or where something looks wrong without --accept, else 0. Raises InputError
    for a --data that is not NAME=PATH.
    """
    found = []  # of every dataset: title, {split: Tally}, sentences about lists that cannot be opened
    for stage in stages:
        drawn = [spec for spec in stage.data if spec.endswith("=figures")]
        if drawn or not stage.data:
            found += [(f"{train.domain.name}, figures", {"train": Tally(train), "val": Tally(val)}, [])
                      for train, val in zip(*open_data(stage | {"data": drawn}))]
        photos = [spec for spec in stage.data if spec not in drawn]
        found += [open_lists(name, path) for name, path in named_paths(photos).items()]
    read = bad = odd = 0
    for title, tallies, unopened in found:
        for split, tally in tallies.items():
            tally.read(f"{title} {split}", stages[0].workers)
            read += len(tally.dataset)
        bad += describe(title, tallies, unopened)
        odd += look_wrong(title, tallies, several=len(found) > 1 and stages[-1].lam + stages[-1].cross > 0)
    picture = Path(stages[-1].out or ".") / "check.png"
    entries = [picture_of(tallies) for _, tallies, _ in found if tallies]
    if entries:
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
            save_check(entries, picture)
        except OSError as error:
            raise InputError(f"{picture}: cannot be written ({error.strerror or error}); give a folder of "
                             "yours: --out DIR") from None
        print(f"\npicture: {picture}")
    verdict = f"bad: {bad}, named above" if bad else "none is bad"
    if odd:
        way_on = "accepted" if stages[0].accept else "named above; if that is right, give --accept"
        verdict += f"; looks wrong: {odd}, {way_on}"
    print(f"\n{read} photos and their label maps read; {verdict}")
    return int(bad > 0 or odd > 0 and not stages[0].accept)


def look_wrong(title, tallies, several):
    """Print what looks wrong in one dataset. Returns how many things.

    several: there are other domains, and a --lam or --cross, so that class names need word vectors.
    """
    said = [f"{split}: {sentence}" for split, tally in tallies.items()
            for sentence in doubts_of(tally.dataset.domain, tally.pixels, "its label maps", split == "train")]
    if "train" in tallies:
        domain = tallies["train"].dataset.domain
        said += exchanged(domain, tallies["train"])
        without = [name for name in domain.classes if vector(domain, name) is None]
        if several and without:
            said.append(f"no word vector: {', '.join(without)}; several domains need one: give the domain "
                        '"aliases", or train with --lam 0 --cross 0')
    if said:
        some(f"looks wrong: {len(said)}", said)
    return len(said)


def picture_of(tallies):
    """What `save_check` draws of a dataset: of its training list, or of the only one that could be opened."""
    tally = tallies.get("train") or tallies["val"]
    data, pictures = tally.dataset, []
    for i in np.linspace(0, len(data) - 1, min(4, len(data))).astype(int):
        try:
            image, label = data.load(i)
        except Exception:  # it is among the bad files
            continue
        pictures.append(scaled(image, {"": label}, 320))
    pictures = [(image, labels[""]) for image, labels in pictures]
    share = np.where(tally.together > 0, tally.touching / np.maximum(tally.together, 1), np.nan)
    return data.domain, pictures, tally.pixels[:data.domain.num_classes], share


def open_lists(name, path):
    """Both lists of a dataset, as far as they can be opened: an entry of `found`."""
    tallies, bad = {}, []
    for split in ("train", "val"):
        missing = []
        try:
            tallies[split] = Tally(open_dataset(name, path, split, missing), missing)
        except InputError as error:
            bad.append(str(error))
    return f"{name}={path}", tallies, bad


class Tally:
    """What the usable files of one list add up to.

    missing: sentences about ids of the list that the dataset leaves out.
    """

    def __init__(self, dataset, missing=()):
        self.dataset, self.listed, self.bad = dataset, len(dataset) + len(missing), list(missing)
        self.sizes = Counter()  # (width, height) -> photos
        paths = getattr(getattr(dataset, "dataset", dataset), "images", [])
        self.turned = sum(orientation(path) in TURNS for path in paths)
        self.pixels = np.zeros(256, np.int64)  # of every class id
        Z = dataset.domain.num_classes
        self.together = np.zeros((Z, Z), np.int64)  # photos that hold both classes
        self.touching = np.zeros((Z, Z), np.int64)  # photos in which they touch

    def read(self, title, workers):
        """Add up `measure` of every sample, in order whatever the number of processes.

        Progress goes to stderr.
        """
        samples = [(self.dataset, i) for i in range(len(self.dataset))]
        started = printed = time.time()
        results = DataLoader(samples, batch_size=None, collate_fn=measure, num_workers=workers)
        for n, result in enumerate(results, 1):
            if isinstance(result, str):
                self.bad.append(result)
            else:
                size, pixels, touching = result
                held = pixels[:len(touching)] > 0
                self.sizes[size] += 1
                self.pixels += pixels
                self.together += np.outer(held, held)
                self.touching += touching
            if time.time() - printed > 1 or n == len(samples):
                printed = time.time()
                left, end = (printed - started) / n * (len(samples) - n), "\n" if n == len(samples) else ""
                print(f"\r{title}: read {n} of {len(samples)}, {left:.0f} s left ", end=end, file=sys.stderr,
                      flush=True)


def measure(sample):
    """(dataset, i) -> (width, height), pixels of each id (256,), touching (Z, Z).

    Or a sentence where a file cannot be used.
    """
    dataset, i = sample
    try:
        image, label = dataset.load(i)
    except InputError as error:
        return str(error)
    except Exception as error:  # a decoder may fail in any way; the other files are still read
        return (f"{dataset.where(i)}: this photo or its label map is not readable ({type(error).__name__}: "
                f"{one_line(error)}); replace the file or take its id off the list")
    pixels = np.bincount(label.ravel(), minlength=256)
    return label.shape[::-1], pixels, touching(label, dataset.domain.num_classes)


def touching(label, Z):
    """(Z, Z) bool, symmetric: classes that are side by side, or one above the other, somewhere in `label`.

    label: (H, W) uint8.
    """
    pairs = np.zeros((256, 256), bool)
    for a, b in ((label[:, 1:], label[:, :-1]), (label[1:], label[:-1])):
        border = a != b
        pairs[a[border], b[border]] = True
    return (pairs | pairs.T)[:Z, :Z]


def describe(title, tallies, unopened):
    """Print the report on one dataset. Returns the number of its bad files."""
    bad = unopened + [sentence for tally in tallies.values() for sentence in tally.bad]
    bad = list(dict.fromkeys(bad))  # both lists may hold one
    print(f"\n{title}")
    if tallies:
        domain = next(iter(tallies.values())).dataset.domain
        counts(tallies)
        classes(domain, tallies)
        if "train" in tallies:
            adjacency(domain, tallies["train"])
    some(f"bad files: {len(bad)}", bad)
    return len(bad)


def some(heading, entries):
    """A heading and the first entries, a line each."""
    print(f"  {heading}")
    for entry in entries[:SHOWN]:
        print(f"    {entry}")
    if len(entries) > SHOWN:
        print(f"    and {len(entries) - SHOWN} more")


def counts(tallies):
    """Print how many photos the lists hold, their sizes, and which ids stand there twice."""
    names = {split: [tally.dataset.where(i) for i in range(len(tally.dataset))]
             for split, tally in tallies.items()}
    for split, tally in tallies.items():
        ignored = 100 * tally.pixels[IGNORE] / max(1, tally.pixels.sum())
        print(f"  {split}: {tally.listed} listed, {sum(tally.sizes.values())} usable; {span(tally.sizes)}; "
              f"{ignored:.2f} % of pixels ignored")
        if tally.turned:
            print(f"  {split}: {tally.turned} photos are turned as their EXIF tag says")
        twice = [name for name, n in Counter(names[split]).items() if n > 1]
        if twice:
            some(f"more than once in the {split} list: {len(twice)}", twice)
    leak = sorted(set(names.get("train", ())) & set(names.get("val", ())))
    if leak:
        some(f"in both lists, so that validation scores are too high: {len(leak)}", leak)


def span(sizes):
    """The smallest, the median and the largest photo by number of pixels, in words."""
    if len(sizes) < 2:
        return "".join("all {}x{}".format(*size) for size in sizes) or "no size"
    ordered = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
    few, middle, many = ("{}x{}".format(*ordered[i]) for i in (0, (len(ordered) - 1) // 2, -1))
    return f"{len(sizes)} sizes from {few} to {many}, median {middle}"


def percent(part, whole):
    """A share with two digits, "-" for none: 0.00 % is little, not nothing."""
    return f"{100 * part / whole:.2f} %" if part else "-"


def classes(domain, tallies):
    """The table of class frequencies, and the classes that no label map holds."""
    width = max(map(len, domain.classes))
    titles = [f"  {f'{split}: of pixels':>16} {'of photos':>10}" for split in tallies]
    print(f"  {'':{width}}" + "".join(titles))
    for c, name in enumerate(domain.classes):
        row = f"  {name:{width}}"
        for tally in tallies.values():
            row += f"  {percent(tally.pixels[c], tally.pixels[:IGNORE].sum()):>16}"
            row += f" {percent(tally.together[c, c], sum(tally.sizes.values())):>10}"
        print(row)
    for split, tally in tallies.items():
        never = [name for c, name in enumerate(domain.classes) if not tally.pixels[c]]
        print(f"  never in {split}: {', '.join(never) or 'none'}")


def pairs_of(Z):
    """All pairs (a, b) of class ids, a < b, without the background."""
    return [(a, b) for a in range(1, Z) for b in range(a + 1, Z)]


def touching_often(tally):
    """{(a, b)}: the pairs of class ids that are proposed for M_intra."""
    return {pair for pair in pairs_of(len(tally.together))
            if tally.touching[pair] >= max(1, TOUCHING * tally.together[pair])}


def adjacency(domain, tally):
    """Print where M_intra and the training labels disagree, and an adjacency list for a domain.json.

    The background is left out.
    """
    touch, both, names = tally.touching, tally.together, domain.classes
    pairs, often = pairs_of(len(names)), touching_often(tally)

    def listed(heading, chosen):
        chosen = sorted(chosen, key=lambda pair: (pair not in often, -touch[pair], -both[pair], pair))
        some(f"{heading}: {len(chosen)}",
             [f"{names[a]}, {names[b]}: {touch[a, b]} of {both[a, b]}" for a, b in chosen])

    if domain.adjacency is None:
        print(f"  domain '{domain.name}' has no adjacency (M_intra): give it the list below, or train with "
              f"--intra-mask none")
    else:
        mask = domain.intra_mask()
        print("  pairs of classes, and in how many of the training photos that hold both they touch:")
        listed("touching but not in M_intra", [pair for pair in pairs if touch[pair] and not mask[pair]])
        listed("in M_intra but never touching", [pair for pair in pairs if mask[pair] and not touch[pair]])
    print(f"  for a domain.json, the {len(often)} pairs that touch in {TOUCHING:.0%} or more of the training "
          f"photos that hold both:")
    words = [json.dumps([names[a], names[b]], ensure_ascii=False) for a, b in sorted(often)]
    lines = [", ".join(words[i:i + 5]) for i in range(0, len(words), 5)]
    print(' "adjacency": [\n  ' + ",\n  ".join(lines) + "\n ]")
