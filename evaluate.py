"""Score a parser: mIoU and mean accuracy of each label domain, over a whole list of photos.

    python evaluate.py runs/universal                                         the built-in figures
    python evaluate.py runs/universal --data pascal=DIR cihp=DIR --published  flips and scales, as published
    torchrun --nproc_per_node=8 evaluate.py runs/universal --data cihp=DIR    the photos dealt to 8 processes
    python evaluate.py runs/universal --data atr=DIR --as atr:cihp=MAP.json   ATR's photos by CIHP's head
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from figures import TABLES, Figures
from sst import checkpoint, distributed
from sst.config import pair
from sst.data import named_paths, open_dataset
from sst.distributed import print0
from sst.domains import builtin_domain, read_class_map
from sst.doubts import doubts
from sst.errors import InputError, InputWarning, run_program
from sst.inference import photo_labels
from sst.metrics import confusion, mapped, scores
from sst.plots import is_confusion, save_confusion

# With flips and logits: how Graphonomy and Grapy-ML evaluate.
PUBLISHED_SCALES = [0.5, 0.75, 1, 1.25, 1.5, 1.75]


def arguments():
    """The flags, as an argparse parser."""
    p = argparse.ArgumentParser("evaluate.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=__doc__)
    p.add_argument("model", metavar="MODEL",
                   help="a run's folder, whose model.pt is read, or a model.pt or best.pt")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", action="extend", default=[], metavar="NAME=PATH",
                   help="label domains and their folders, as train.py takes them, NAME=figures among them; "
                        "without --data: the built-in figures' validation set")
    g.add_argument("--split", choices=["train", "val", "test"], default="val",
                   help="the list that is scored (default val)")
    g.add_argument("--as", dest="via", nargs="+", action="extend", default=[], metavar="DATA:HEAD=MAP.json",
                   help="score the dataset DATA by the head of another domain too: the file is one object, "
                        '{"class of HEAD": "class of DATA" or null, ...}, with every class of HEAD; what is '
                        "predicted as a class of null is wrong; classes of DATA that it never names count in "
                        "no mean")
    g = p.add_argument_group("the network's input")
    g.add_argument("--size", type=pair, metavar="HxW",
                   help="fit the whole photo into this size first (default: as in training, which the "
                        "checkpoint says); scores are at the label's own size in any case")
    g.add_argument("--flip", action="store_true", help="average over the photo and its mirror image")
    g.add_argument("--scales", type=float, nargs="+", metavar="X",
                   help="average over these factors of the size, such as 0.75 1 1.25")
    g.add_argument("--average", choices=["logits", "probabilities"], help="what is averaged (default logits)")
    g.add_argument("--published", action="store_true",
                   help=f"--flip --scales {' '.join(map(str, PUBLISHED_SCALES))} --average logits")
    g = p.add_argument_group("output")
    g.add_argument("--out", metavar="DIR",
                   help="folder of the pictures confusion.DATA.png (default: the checkpoint's)")
    g.add_argument("--json", action="store_true",
                   help='print {domain: {"miou", "mean_accuracy", "iou": {class}}} in percent and nothing '
                        "else; progress goes to stderr")
    return p


def main(argv=None):
    args = arguments().parse_args(argv)
    settle_averaging(args)
    rank, world, device = distributed.start()
    log = sys.stderr if args.json else sys.stdout

    # The network, the datasets, and by which heads each is scored.
    path = checkpoint.model_file(args.model)
    net, domains = checkpoint.load_model(path)
    net.to(device, memory_format=torch.channels_last)
    heads = {d.name: d for d in domains}
    size = args.size or checkpoint.trained_size(net, path)
    via = [split_spec(spec) for spec in args.via]
    datasets = {d.domain.name: d for d in open_data(args, heads, via, size)}
    columns = columns_of(path, datasets, heads, via)
    titles = {(data, head): data if data == head else f"{data} via {head}" for data, head in columns}
    pictures = open_pictures(Path(args.out or path.parent), titles)
    photos = different_photos(datasets)

    known = ", ".join(f"{d.name} ({d.num_classes} classes)" for d in domains)
    print0(f"reading {path}: label domains {known}", file=log)
    print0(f"the network sees photos {views_in_words(args, size)}", file=log)
    for (data, _), title in titles.items():
        dataset = datasets[data]
        what = "figures" if isinstance(dataset, Figures) else "photos"
        print0(f"{title}: {len(dataset)} {what} on the {args.split} list", file=log)
    if rank == 0:
        for dataset in datasets.values():
            for sentence in doubts(dataset, training=args.split == "train"):
                warnings.warn(sentence, InputWarning, stacklevel=2)
    processes = f"{world} process{'es' if world > 1 else ''}"
    print0(f"{len(photos)} different photos; device {device}, {processes}", file=log)

    views = {"size": size, "scales": args.scales, "average": args.average,
             "flips": {d.name: d.flip_index() for d in domains} if args.flip else None}
    matrices = {(data, head): np.zeros((datasets[data].domain.num_classes, heads[head].num_classes), np.int64)
                for data, head in columns}
    read(net, photos, datasets, matrices, views, rank, world, log)

    results = {}
    for key, matrix in matrices.items():
        data, head = key
        classes, title = datasets[data].domain.classes, titles[key]
        matrix = distributed.all_reduce(torch.from_numpy(matrix).to(device)).cpu().numpy()
        missing = [z for z in range(len(classes)) if z not in columns[key]]
        result = scores(mapped(matrix, columns[key]), missing)
        results[title] = for_json(result, classes)
        print0(table(title, classes, result, missing, head, matrix.sum()), file=log)
        if rank == 0:
            heading = f"{title}: mIoU {result['miou']:.2f} %"
            save_confusion(matrix, classes, heads[head].classes, heading, pictures[key])
        print0(f"picture: {pictures[key]}", file=log)
    if args.json:
        print0(json.dumps(results, indent=1, allow_nan=False))
    distributed.stop()


def settle_averaging(args):
    """Set flip, scales and average as all flags say together; raises InputError where they contradict."""
    if args.published and (args.flip or args.scales or args.average):
        raise InputError("--published beside --flip, --scales or --average: it sets all three; leave them "
                         "out, or leave --published out")
    if args.published:
        args.flip, args.scales = True, PUBLISHED_SCALES
    args.scales, args.average = args.scales or [1.0], args.average or "logits"
    if not all(0.05 <= scale <= 20 for scale in args.scales):  # also refuses NaN
        raise InputError(f"--scales {' '.join(f'{s:g}' for s in args.scales)}: factors lie between 0.05 and "
                         f"20, such as 0.75 1 1.25")


def open_data(args, heads, via, size):
    """The datasets of --data, or the figures that the heads and maps can be scored on. Raises InputError."""
    drawn = [name for name in TABLES if name in heads or name in [data for data, _, _ in via]]
    datasets = []
    for name, path in named_paths(args.data or [f"{name}=figures" for name in drawn]).items():
        if path != "figures":
            datasets.append(open_dataset(name, path, args.split))
        elif args.split == "val":
            datasets.append(Figures(builtin_domain(name), 2 ** 31, 80, size or (128, 128)))
        else:
            raise InputError(f"--split {args.split}: the built-in figures ({name}) have only a val list; "
                             f"leave --split out, or give --data {name}=DIR")
    return datasets


def different_photos(datasets):
    """[[(dataset's name, index), ...], ...], an entry a photo: what datasets share is predicted once."""
    photos = {}
    for name, dataset in datasets.items():
        for i in range(len(dataset)):
            photos.setdefault(dataset.where(i), []).append((name, i))
    return list(photos.values())


def views_in_words(args, size):
    origin = "--size" if args.size else "as in training"
    words = f"fitted into {size[0]}x{size[1]} ({origin})" if size else "at their own size"
    if args.flip or len(args.scales) > 1:
        mirrored = ", each mirrored too" if args.flip else ""
        words += f", times {', '.join(f'{s:g}' for s in args.scales)}{mirrored}; mean of {args.average}"
    return words


def read(net, photos, datasets, matrices, views, rank, world, log):
    """Count the pixels of every world-th photo in the confusion matrices.

    matrices: {(dataset's name, head's name): (Z, P)}. photos: of `different_photos`. views: keywords of
    `photo_labels`. Progress goes to the file `log`.
    """
    mine = photos[rank::world]
    started = printed = time.time()
    for done, photo in enumerate(mine, 1):
        loaded = [(name, *datasets[name].load(i)) for name, i in photo]
        image, asked = loaded[0][1], {head for name, _ in photo for data, head in matrices if data == name}
        prediction = photo_labels(net, image, domains=asked, **views)
        for (data, head), matrix in matrices.items():
            for name, _, label in loaded:
                if name == data:
                    matrix += confusion(prediction[head], label, *matrix.shape)
        if time.time() - printed > 3 or done == len(mine):
            printed, elapsed = time.time(), time.time() - started
            left = timedelta(seconds=round(elapsed / done * (len(mine) - done)))
            print0(f"photo {round(done * len(photos) / len(mine))}/{len(photos)}  "
                   f"{done * world / elapsed:.1f} photos/s  {left} left", file=log)


def split_spec(spec):
    """"DATA:HEAD=MAP.json" -> (DATA, HEAD, MAP.json)."""
    names, _, file = spec.partition("=")
    data, _, head = names.partition(":")
    if not (data and head and file) or data == head:
        raise InputError(f"--as {spec}: write DATA:HEAD=MAP.json with two different label domains, such as "
                         f"atr:cihp=cihp-to-atr.json")
    return data, head, file


def columns_of(path, datasets, heads, via):
    """{(dataset's name, head's name): for each class of the head the class id of the dataset, or Z for none}.

    datasets, heads: by name. via: the maps of --as, by `split_spec`. Raises InputError for what has no head.
    """
    if not datasets:
        raise InputError(f"{path}: its label domains ({', '.join(heads)}) are none of the built-in figures' "
                         f"({', '.join(TABLES)}); give --data NAME=PATH")
    check_maps(path, datasets, heads, via)
    columns = {}
    for name, dataset in datasets.items():
        maps = [(head, file) for data, head, file in via if data == name]
        if name in heads:
            check_classes(path, dataset.domain, heads[name])
            columns[name, name] = np.arange(dataset.domain.num_classes)
        elif not maps:
            raise InputError(f"--data {name}: {path} has no head for it; its label domains are "
                             f"{', '.join(heads)}, whose heads can score it through a map of classes: "
                             f"--as {name}:{next(iter(heads))}=MAP.json")
        for head, file in maps:
            columns[name, head] = read_class_map(file, heads[head], dataset.domain)
    return columns


def check_maps(path, datasets, heads, via):
    """Refuse a map of --as between things that are not there, and a second one between the same two."""
    for n, (data, head, file) in enumerate(via):
        if data not in datasets:
            raise InputError(f"--as {data}:{head}={file}: '{data}' is not among the datasets "
                             f"({', '.join(datasets)}); give --data {data}=PATH")
        if head not in heads:
            raise InputError(f"--as {data}:{head}={file}: {path} has no head '{head}'; its label domains are "
                             f"{', '.join(heads)}")
        if (data, head) in [other[:2] for other in via[:n]]:
            raise InputError(f"--as {data}:{head}={file}: {data}:{head} has a map already; give only one")


def check_classes(path, domain, head):
    """Refuse a dataset whose classes are not those that the head of its name was trained on."""
    for i, (found, wanted) in enumerate(zip_longest(domain.classes, head.classes, fillvalue="absent")):
        if found != wanted:
            raise InputError(f"--data {domain.name}: class {i} is {found} there and {wanted} in {path}; use "
                             f"the dataset that it was trained on, or give this one another name and a map: "
                             f"--as NAME:{domain.name}=MAP.json")


def open_pictures(out, titles):
    """{key: path of its picture}, in the folder `out`, which is made.

    Raises InputError where it cannot be written, or another's file is in a picture's place.
    """
    paths = {key: out / f"confusion.{title.replace(' ', '.')}.png" for key, title in titles.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}); give a folder of yours") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"{out}: the folder cannot be written; give one of yours: --out DIR")
    for path in paths.values():
        if path.exists() and not is_confusion(path):
            raise InputError(f"{path}: a file that evaluate.py did not write is in the picture's place; move "
                             f"it, or give another --out DIR")
    return paths


def number(value):
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def for_json(result, classes):
    """The scores of a dataset as plain values."""
    return {"miou": number(result["miou"]), "mean_accuracy": number(result["mean_accuracy"]),
            "iou": dict(zip(classes, map(number, result["iou"])))}


def percent(value):
    """For the table: two digits, or "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def table(title, classes, result, missing, head, pixels):
    """The scores of a dataset in lines of text."""
    lines = [f"\n{title}: mIoU {percent(result['miou'])} %, "
             f"mean accuracy {percent(result['mean_accuracy'])} %, {pixels:,} labelled pixels",
             f"  {'class':<24} {'IoU %':>8} {'accuracy %':>12}"]
    for name, iou, accuracy in zip(classes, result["iou"], result["accuracy"]):
        lines.append(f"  {name:<24} {percent(iou):>8} {percent(accuracy):>12}")
    for ids, why in ((result["absent"], "in no label and no prediction"),
                     (missing, f"no class of {head}'s head is mapped to it")):
        if ids:
            lines.append(f"  the means are without {', '.join(classes[i] for i in ids)}: {why}")
    return "\n".join(lines)


def cli():
    """What `sst-evaluate` and `python evaluate.py` start."""
    run_program(main, "evaluate.py")


if __name__ == "__main__":
    cli()
