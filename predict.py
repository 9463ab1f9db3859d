"""Human parsing of photos with a trained network, and its export to ONNX.

    python predict.py photo.jpg                                           with the weights of the package
    python predict.py runs/universal photo.jpg folder/ --out predictions
    python predict.py runs/universal --export parser.onnx
    python predict.py --help
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import sst
from sst.config import pair, positive
from sst.domains import numbering
from sst.errors import InputError, run_program
from sst.export import export
from sst.files import pixels
from sst.inference import MAX_SIDE
from sst.journal import clock
from sst.plots import indexed, overlay, scaled, side_by_side

CALIBRATION = 64  # photos that set the ranges of 8-bit integers
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OTHER_ENDINGS = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".psd", ".raw", ".dng", ".svg")
DESCRIPTION = """\
Parse people in photos with a trained network: a run's folder, a model.pt or best.pt, or where the first
argument is a photo or a folder of photos the one that the package carries (docs/model-card.md). Each photo
gets, for every label domain,
  NAME.DOMAIN.png          its label map at the photo's size, class ids as palette indices
  NAME.DOMAIN.overlay.jpg  the photo under the classes' colours, with their names
and NAME.all.jpg, all domains side by side. With --masks also
  NAME.DOMAIN.ID-CLASS.png white where the class is, black elsewhere, of every class in the photo
and with --json
  NAME.json                {DOMAIN: [{"class", "id", "share", "box"}]}: its part of the pixels, and
                           [left, top, right, bottom], right and bottom being the first pixels outside
NAME is the photo's path below the given folder, without its
ending. Photos that differ in the ending alone keep it (a.jpg.DOMAIN.png); where photos below two given
folders have the same name, all names start at the folder that holds both.

  python predict.py photo.jpg
  python predict.py runs/universal photo.jpg folder/ --out predictions
  python predict.py runs/universal --export parser.onnx"""


def arguments():
    """The flags, as an argparse parser."""
    p = argparse.ArgumentParser("predict.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=DESCRIPTION)
    p.add_argument("given", nargs="*", metavar="[MODEL] PHOTO|FOLDER",
                   help="the network, photos, and folders that are searched for them with their sub-folders "
                        f"({', '.join(PHOTO_ENDINGS)}; hidden files and --out are left out)")
    p.add_argument("--out", metavar="DIR", default="predictions",
                   help="folder for the results (predictions); earlier results of the same name are replaced")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--size", type=pair, metavar="HxW",
                   help="fit the whole photo into this size for the network (default: the --size of the run, "
                        "which its files name)")
    g.add_argument("--max-side", type=positive, metavar="N",
                   help="instead, the photo's own size, shrunk to at most N pixels on its longer side "
                        f"(default where the run has no --size: {MAX_SIDE})")
    p.add_argument("--domains", nargs="+", metavar="NAME", help="only these label domains (default: all)")
    p.add_argument("--masks", action="store_true", help="write a black and white PNG for every class too")
    p.add_argument("--json", action="store_true", help="write what was found in every photo as JSON too")
    p.add_argument("--numbering", nargs="+", default=[], metavar="DOMAIN=FILE",
                   help="number the classes in NAME.DOMAIN.png otherwise, as FILE says, {class: number}; "
                        "built in are schp-atr (for atr), schp-lip (lip), viton-hd (cihp)")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    p.add_argument("--batch-size", type=positive, metavar="N",
                   help="photos that are read at once; those that the network sees at one size it sees "
                        "together (default: 8 on a GPU, else 1)")
    p.add_argument("--export", metavar="FILE",
                   help="write the network as ONNX; needs the packages onnx and onnxscript")
    p.add_argument("--int8", nargs="+", metavar="PHOTO|FOLDER",
                   help="export it in 8-bit integers, whose ranges are found on the first "
                        f"{CALIBRATION} of these photos; needs onnxruntime too")
    return p


def main():
    args = arguments().parse_intermixed_args()
    model = args.given.pop(0) if args.given and is_model(args.given[0]) else None
    if args.int8 and not args.export:
        raise InputError("--int8 without --export: it is a kind of export; give --export FILE.onnx")
    if not args.given and not args.export:
        raise InputError("nothing to do; give photos or folders of photos, or --export FILE.onnx")
    photos = find_photos(args.given, args.out) if args.given else {}
    parser = sst.load(model, args.size, args.max_side, args.device)
    known = ", ".join(f"{d.name} ({d.num_classes} classes)" for d in parser.domains.values())
    print(f"label domains: {known}")
    if args.export:
        ranges = find_photos(args.int8, args.out) if args.int8 else {}
        canvases = (parser.canvas(pixels(photo))[0] for photo in list(ranges.values())[:CALIBRATION])
        export(parser.net, parser.domains, args.export, parser.size, canvases if ranges else None)
        print(f"wrote {args.export}")
    if photos:
        origin = " (--size)" if args.size else ", the --size of the run; --size and --max-side override it"
        print(f"photos are fitted into {parser.size[0]}x{parser.size[1]}{origin}" if parser.size else
              f"photos keep their size, up to {parser.max_side} pixels on the longer side (--max-side)")
        domains = parser.chosen(args.domains)
        numbers = dict(numbering(spec, domains) for spec in args.numbering)
        spare_photos(photos, domains, args.out)
        parse(photos, parser, numbers, args)


def is_model(path):
    """Whether the first argument names a network: neither a photo nor a folder without a run in it."""
    if Path(path).is_dir():
        return any((Path(path) / name).exists() for name in ("model.pt", "model.safetensors", "config.json"))
    return Path(path).suffix.lower() not in PHOTO_ENDINGS


def spare_photos(photos, domains, out):
    """Make the folder of the results. Raises InputError, also where a result would replace a photo."""
    given = {str(photo) for photo in photos.values()}
    endings = [f".{domain}{ending}" for domain in domains for ending in (".png", ".overlay.jpg")]
    endings += [f".{name}.{filename(domain, k)}.png" for name, domain in domains.items()
                for k in range(domain.num_classes)]
    for name, photo in photos.items():
        for ending in (".all.jpg", *endings):
            if os.path.abspath(f"{out}/{name}{ending}") in given:
                raise InputError(f"--out {out}: a result of {photo} would replace the given photo "
                                 f"{name}{ending}; give another folder")
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None


def parse(photos, parser, numbers, args):
    """Write the results of every photo that can be read. Raises InputError at the end for the others."""
    out, begun, done, failed = args.out, time.time(), 0, 0
    batch_size = args.batch_size or (1 if parser.device.type == "cpu" else 8)
    waiting = list(photos.items())[::-1]
    while waiting:
        images, started = {}, time.time()  # some photos' pixels, by NAME
        while waiting and len(images) < batch_size:
            name, photo = waiting.pop()
            try:
                images[name] = pixels(photo)
            except InputError as error:
                done, failed = done + 1, failed + 1
                print(f"{done}/{len(photos)}  {error}; skipped", file=sys.stderr, flush=True)
        found = parser(list(images.values()), args.domains, batch_size=batch_size)
        before = (time.time() - started) / max(1, len(images))
        for (name, image), masks in zip(images.items(), found):
            started = time.time()
            try:
                save(image, masks, parser.domains, Path(out) / name, numbers, args.masks, args.json)
            except OSError as error:
                raise unwritable(out, error) from None
            done += 1
            h, w = image.shape[:2]
            left = clock((time.time() - begun) / done * (len(photos) - done))
            seconds = before + time.time() - started
            print(f"{done}/{len(photos)}  {photos[name]}  {w}x{h}  {seconds:.1f} s, {left} left", flush=True)
    print(f"results of {len(photos) - failed} photos are in {out}; {time.time() - begun:.1f} s")
    if failed:
        raise InputError(f"{failed} of {len(photos)} photos could not be read and were skipped, see above")


def unwritable(out, error):
    return InputError(f"--out {out}: cannot be written ({error.strerror or error}); give a folder of yours, "
                      f"on a disk with space left")


def find_photos(given, out):
    """{NAME of the results: path of the photo}, in the order given, folders searched; raises InputError."""
    out = Path(os.path.abspath(out))
    found = {}  # {photo: the folder that its NAME starts at}
    for path in given:
        path = Path(os.path.abspath(path))
        if path == out:
            raise InputError(f"--out {out}: is a folder of photos, and a second run would take the results "
                             f"for photos; give another folder")
        if path.is_dir():
            for photo in search(path, out):
                found.setdefault(photo, path)
        elif path.exists():
            found.setdefault(path, path.parent)
        else:
            raise InputError(f"{path}: no such file or folder; give photos or folders of photos")
    names = [photo.relative_to(folder) for photo, folder in found.items()]
    if len(set(names)) < len(names):
        shared = os.path.commonpath(found.values())
        names = [photo.relative_to(shared) for photo in found]
    taken = Counter(names) + Counter(name.with_suffix("") for name in names)
    return {name if taken[name.with_suffix("")] > 1 else name.with_suffix(""): photo
            for name, photo in zip(names, found)}


def search(folder, out):
    """The photos in a folder and its sub-folders, without hidden ones and those below `out`.

    Raises InputError where there is none.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()
             and not any(part.startswith(".") for part in p.relative_to(folder).parts)
             and not (folder in out.parents and out in p.parents)]
    inside = [p for p in files if p.suffix.lower() in PHOTO_ENDINGS]
    others = Counter(p.suffix.lower() for p in files if p.suffix.lower() in OTHER_ENDINGS)
    if others:
        found = ", ".join(f"{count} {ending}" for ending, count in others.items())
        print(f"{folder}: skipped {found}; photos are {', '.join(PHOTO_ENDINGS)}", file=sys.stderr)
    if not inside:
        raise InputError(f"{folder}: no photo in this folder ({', '.join(PHOTO_ENDINGS)}); give photos or a "
                         f"folder that holds some")
    return inside


def contents(mask, domain):
    """What is in a label map, a dictionary for every class: see DESCRIPTION."""
    found = []
    for k in np.unique(mask).tolist():
        rows, columns = np.nonzero((mask == k).any(1))[0], np.nonzero((mask == k).any(0))[0]
        found.append({"class": domain.classes[k], "id": k, "share": round(float((mask == k).mean()), 6),
                      "box": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]})
    return found


def filename(domain, k):
    """A class as a part of a file name: "4-upper-clothes", "14-left_arm"."""
    return f"{k}-" + re.sub(r"[^\w-]", "_", domain.classes[k])


def save(image, masks, domains, path, numbers, each_class=False, as_json=False):
    """The files of one photo, whose names begin with `path`. numbers: {domain: those of its classes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        indexed(mask, domains[name], numbers.get(name)).save(f"{path}.{name}.png")
        for k in np.unique(mask) if each_class else ():
            white = Image.fromarray(np.where(mask == k, 255, 0).astype(np.uint8))
            white.save(f"{path}.{name}.{filename(domains[name], k)}.png")
    if as_json:
        Path(f"{path}.json").write_text(json.dumps(
            {name: contents(mask, domains[name]) for name, mask in masks.items()}, indent=1))
    picture, labels = scaled(image, masks, min(max(640, *image.shape), 1600))
    for name, label in labels.items():
        Image.fromarray(overlay(picture, label, domains[name])).save(f"{path}.{name}.overlay.jpg", quality=90)
    picture, labels = scaled(picture, labels, 640)
    row = [picture, *(overlay(picture, label, domains[name]) for name, label in labels.items())]
    Image.fromarray(side_by_side(row)).save(f"{path}.all.jpg", quality=90)


def cli():
    """What `sst-predict` and `python predict.py` start."""
    run_program(main, "predict.py")


if __name__ == "__main__":
    cli()
