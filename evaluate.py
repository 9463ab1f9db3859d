"""Score a parser: mIoU and mean accuracy per label domain, from one confusion matrix over a whole list of photos.

    python evaluate.py runs/universal                                             the built-in figures
    python evaluate.py runs/universal --data pascal=DIR cihp=DIR --published      flips and scales, as published numbers have them
    torchrun --nproc_per_node=8 evaluate.py runs/universal --data cihp=DIR        the photos dealt to 8 processes
    python evaluate.py runs/universal --data atr=DIR --as atr:cihp=MAP.json       ATR's photos through CIHP's head
"""

import argparse
import json
import math
import os
import sys
import time
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from figures import TABLES, Figures
from sst import checkpoint, distributed
from sst.config import pair
from sst.data import open_datasets
from sst.domains import builtin_domain, read_class_map
from sst.errors import InputError, run_program
from sst.inference import averaged_logits
from sst.metrics import confusion, mapped, scores
from sst.plots import is_confusion, save_confusion

PUBLISHED_SCALES = [0.5, 0.75, 1, 1.25, 1.5, 1.75]  # with flips and logits: Graphonomy's and Grapy-ML's evaluation


def parser():
    p = argparse.ArgumentParser("evaluate.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    p.add_argument("model", metavar="MODEL", help="a run's folder, whose model.pt is read, or a model.pt or best.pt")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", action="extend", default=[], metavar="NAME=PATH", help="label domains and their folders, as "
                   "train.py takes them; without --data: the built-in figures' validation set")
    g.add_argument("--split", choices=["train", "val", "test"], default="val", help="the list that is scored (default val)")
    g.add_argument("--as", dest="via", nargs="+", action="extend", default=[], metavar="DATA:HEAD=MAP.json", help="score the dataset DATA "
                   'by the head of another domain too: the file is one object, {"class of HEAD": "class of DATA" or null, ...}, with every '
                   "class of HEAD; what is predicted as a class of null is wrong; classes of DATA that it never names count in no mean")
    g = p.add_argument_group("the network's input")
    g.add_argument("--size", type=pair, metavar="HxW", help="fit the whole photo into this size first (default: as the config.json "
                   "beside the checkpoint says, else the photo's own size); scores are at the label's own size in any case")
    g.add_argument("--flip", action="store_true", help="average over the photo and its mirror image")
    g.add_argument("--scales", type=float, nargs="+", metavar="X", help="average over these factors of the size, such as 0.75 1 1.25")
    g.add_argument("--average", choices=["logits", "probabilities"], help="what is averaged (default logits)")
    g.add_argument("--published", action="store_true", help=f"--flip --scales {' '.join(map(str, PUBLISHED_SCALES))} --average logits")
    g = p.add_argument_group("output")
    g.add_argument("--out", metavar="DIR", help="folder of the pictures confusion.DATA.png (default: the checkpoint's)")
    g.add_argument("--json", action="store_true", help='print {domain: {"miou", "mean_accuracy", "iou": {class}}} in percent and nothing '
                   "else; progress goes to stderr")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.published and (args.flip or args.scales or args.average):
        raise InputError("--published beside --flip, --scales or --average: it sets all three; leave them out, or leave --published out")
    if args.published:
        args.flip, args.scales = True, PUBLISHED_SCALES
    scales, average = args.scales or [1.0], args.average or "logits"
    if not all(0.05 <= scale <= 20 for scale in scales):  # also refuses NaN
        raise InputError(f"--scales {' '.join(f'{s:g}' for s in scales)}: factors lie between 0.05 and 20, such as 0.75 1 1.25")
    rank, world, device = distributed.start()

    def say(text):
        if rank == 0:
            print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    # The network, the datasets, and by which heads each is scored.
    path = Path(args.model)
    path = path / "model.pt" if path.is_dir() else path
    net, domains = checkpoint.load_model(path)
    net.to(device, memory_format=torch.channels_last)
    heads = {d.name: d for d in domains}
    size = args.size or checkpoint.trained_size(path)
    via = [split_spec(spec) for spec in args.via]
    if args.data:
        datasets = open_datasets(args.data, args.split)
    elif args.split != "val":
        raise InputError(f"--split {args.split} without --data: the built-in figures are a val list; give --data NAME=PATH, or leave it out")
    else:
        drawn = [name for name in TABLES if name in heads or name in [data for data, _, _ in via]]
        datasets = [Figures(builtin_domain(name), 2 ** 31, 80, size or (128, 128)) for name in drawn]
    datasets = {d.domain.name: d for d in datasets}
    columns = columns_of(path, datasets, heads, via)
    titles = {(data, head): data if data == head else f"{data} via {head}" for data, head in columns}
    pictures = open_pictures(Path(args.out or path.parent), titles)

    # Photos that several datasets share go through the network once; every world-th photo is this process's.
    photos = {}
    for name, dataset in datasets.items():
        for i in range(len(dataset)):
            photos.setdefault(dataset.where(i), []).append((name, i))
    mine = list(photos.values())[rank::world]
    say(f"reading {path}: label domains {', '.join(f'{d.name} ({d.num_classes} classes)' for d in domains)}")
    origin = "--size" if args.size else "as in training, by config.json"
    say(f"the network sees photos {f'fitted into {size[0]}x{size[1]} ({origin})' if size else 'at their own size'}"
        + (f", times {', '.join(f'{s:g}' for s in scales)}{', each mirrored too' * args.flip}; mean of {average}"
           if args.flip or len(scales) > 1 else ""))
    for (data, _), title in titles.items():
        say(f"{title}: {len(datasets[data])} {'photos' if args.data else 'figures'} on the {args.split} list")
    say(f"{len(photos)} different photos; device {device}, {world} process{'es' if world > 1 else ''}")

    flips = {d.name: d.flip_index() for d in domains} if args.flip else None
    matrices = {(data, head): np.zeros((datasets[data].domain.num_classes, heads[head].num_classes), np.int64) for data, head in columns}
    started = printed = time.time()
    for done, photo in enumerate(mine, 1):
        loaded = [(name, *datasets[name].load(i)) for name, i in photo]
        image, asked = loaded[0][1], {head for name, _ in photo for data, head in matrices if data == name}
        logits = averaged_logits(net, image, size, asked, scales, flips, average)
        prediction = {head: A.argmax(0).cpu().numpy() for head, A in logits.items()}
        for (data, head), matrix in matrices.items():
            for name, _, label in loaded:
                if name == data:
                    matrix += confusion(prediction[head], label, *matrix.shape)
        if time.time() - printed > 3 or done == len(mine):
            printed, elapsed = time.time(), time.time() - started
            say(f"photo {round(done * len(photos) / len(mine))}/{len(photos)}  {done * world / elapsed:.1f} photos/s  "
                f"{timedelta(seconds=round(elapsed / done * (len(mine) - done)))} left")

    results = {}
    for (data, head), matrix in matrices.items():
        matrix = distributed.total(torch.from_numpy(matrix).to(device)).cpu().numpy()
        to, domain, title = columns[data, head], datasets[data].domain, titles[data, head]
        missing = [z for z in range(domain.num_classes) if z not in to]
        result = scores(mapped(matrix, to), missing)
        results[title] = {"miou": number(result["miou"]), "mean_accuracy": number(result["mean_accuracy"]),
                          "iou": dict(zip(domain.classes, map(number, result["iou"])))}
        say(table(title, domain.classes, result, missing, head, matrix.sum()))
        if rank == 0:
            save_confusion(matrix, domain.classes, heads[head].classes, f"{title}: mIoU {result['miou']:.2f} %", pictures[data, head])
        say(f"picture: {pictures[data, head]}")
    if args.json and rank == 0:
        print(json.dumps(results, indent=1, allow_nan=False))
    distributed.stop()


def split_spec(spec):
    """"DATA:HEAD=MAP.json" -> (DATA, HEAD, MAP.json)."""
    names, _, file = spec.partition("=")
    data, _, head = names.partition(":")
    if not (data and head and file) or data == head:
        raise InputError(f"--as {spec}: write DATA:HEAD=MAP.json with two different label domains, such as atr:cihp=cihp-to-atr.json")
    return data, head, file


def columns_of(path, datasets, heads, via):
    """{(dataset's name, head's name): for each class of the head the class id of the dataset, or Z for none}, checked."""
    if not datasets:
        raise InputError(f"{path}: its label domains ({', '.join(heads)}) are none of the built-in figures' ({', '.join(TABLES)}); give "
                         f"--data NAME=PATH")
    for n, (data, head, file) in enumerate(via):
        if data not in datasets:
            raise InputError(f"--as {data}:{head}={file}: '{data}' is not among the datasets ({', '.join(datasets)}); give --data "
                             f"{data}=PATH")
        if head not in heads:
            raise InputError(f"--as {data}:{head}={file}: {path} has no head '{head}'; its label domains are {', '.join(heads)}")
        if (data, head) in [other[:2] for other in via[:n]]:
            raise InputError(f"--as {data}:{head}={file}: {data}:{head} has a map already; give it one")
    columns = {}
    for name, dataset in datasets.items():
        maps = [(head, file) for data, head, file in via if data == name]
        if name in heads:
            classes, own = dataset.domain.classes, heads[name].classes
            for i, (found, wanted) in enumerate(zip_longest(classes, own, fillvalue="absent")):
                if found != wanted:
                    raise InputError(f"--data {name}: class {i} is {found} there and {wanted} in {path}; use the dataset that it was "
                                     f"trained on, or give this one another name and a map: --as NAME:{name}=MAP.json")
            columns[name, name] = np.arange(len(classes))
        elif not maps:
            raise InputError(f"--data {name}: {path} has no head for it; its label domains are {', '.join(heads)}, whose heads can score it "
                             f"through a map of classes: --as {name}:{next(iter(heads))}=MAP.json")
        for head, file in maps:
            columns[name, head] = read_class_map(file, heads[head], dataset.domain)
    return columns


def open_pictures(out, titles):
    """{key: path of its picture}; the folder is made; raises InputError where it cannot be written or holds another's file."""
    paths = {key: out / f"confusion.{title.replace(' ', '.')}.png" for key, title in titles.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}); give a folder of yours") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"{out}: the folder cannot be written; give one of yours: --out DIR")
    for path in paths.values():
        if path.exists() and not is_confusion(path):
            raise InputError(f"{path}: a file that evaluate.py did not write is in the picture's place; move it, or give another --out DIR")
    return paths


def number(value):
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def table(title, classes, result, missing, head, pixels):
    """The scores of a dataset in lines of text."""
    text = lambda value: "-" if math.isnan(value) else f"{value:.2f}"
    lines = [f"\n{title}: mIoU {text(result['miou'])} %, mean accuracy {text(result['mean_accuracy'])} %, "
             f"{pixels:,} labelled pixels",
             f"  {'class':<24} {'IoU %':>8} {'accuracy %':>12}"]
    lines += [f"  {name:<24} {text(iou):>8} {text(accuracy):>12}" for name, iou, accuracy in zip(classes, result["iou"], result["accuracy"])]
    for ids, why in ((result["absent"], "in no label and no prediction"), (missing, f"no class of {head}'s head is mapped to it")):
        if ids:
            lines.append(f"  the means are without {', '.join(classes[i] for i in ids)}: {why}")
    return "\n".join(lines)


def cli():
    """What `sst-evaluate` and `python evaluate.py` start."""
    run_program(main, "evaluate.py")


if __name__ == "__main__":
    cli()
