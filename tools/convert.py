"""What annotation tools export -> a folder that train.py takes: label maps, lists, domain.json.

    python tools/convert.py coco ANNOTATIONS.json --images DIR --out OUT       polygons and RLE
    python tools/convert.py labelme FOLDER --out OUT                           X.json beside its photo
    python tools/convert.py cvat FOLDER --out OUT       "Segmentation mask": labelmap.txt, SegmentationClass
    python tools/convert.py voc LABELS --images DIR --out OUT --classes background hat ...   VOC's palette
    python train.py --check --data mine=OUT

Classes keep the file's order, the background first. Where shapes overlap the later one lies on top (--order
area: the smaller one). Photos stay where they are; OUT/domain.json names the place. Its adjacency (M_intra)
is a proposal from the label maps: look it through.
"""

import argparse
import base64
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

from sst.check import Tally, touching_often  # noqa: E402
from sst.data import IMAGE_ENDINGS, Part, listing, open_dataset  # noqa: E402
from sst.domains import from_dict, vector  # noqa: E402
from sst.errors import InputError, run_program  # noqa: E402

MOST = 300  # label maps that the adjacency is proposed from
VOID = [224, 224, 192]  # VOC's and CVAT's colour of what is no class


# Shapes -> label maps ---------------------------------------------------------------------------------------


def label_map(size, shapes, order):
    """(H, W) uint8 of [(class id, mask (H, W) bool)]: the later on top, or with order "area" the smaller."""
    if order == "area":
        shapes = sorted(shapes, key=lambda shape: -shape[1].sum())
    label = np.zeros(size, np.uint8)
    for k, mask in shapes:
        label[mask] = k
    return label


def polygons(size, parts):
    """(H, W) bool: the pixels in any of the polygons, each [(x, y), ...] in pixels of the photo."""
    image = Image.new("1", size[::-1])
    for points in parts:
        if len(points) > 2:
            ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=1)
    return np.array(image)


def run_lengths(size, counts):
    """(H, W) bool of COCO's RLE: lengths of runs of 0 and 1 in turn, down the columns, a list or packed."""
    if isinstance(counts, str):
        counts = unpacked(counts)
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    if len(values) != size[0] * size[1]:
        raise ValueError(f"its runs add up to {len(values)} pixels, the photo has {size[0] * size[1]}")
    return values.reshape(size[::-1]).T.astype(bool)


def unpacked(text):
    """The numbers in a packed RLE: 5 bits a character, a 6th if more follow; from the 4th on differences."""
    counts, place = [], 0
    while place < len(text):
        value = shift = 0
        while True:
            code = ord(text[place]) - 48
            value |= (code & 31) << shift
            place, shift = place + 1, shift + 5
            if not code & 32:
                break
        if code & 16:  # negative
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


# Formats ----------------------------------------------------------------------------------------------------


# coco and labelme: (classes, number of photos, (id, (H, W), [(class, mask)]) of each, folder of the photos).


def coco(args):
    data = read_json(args.given)
    names = {c["id"]: c["name"] for c in data["categories"]}
    classes = with_background(names.values())
    shapes = {}
    for annotation in data["annotations"]:
        shapes.setdefault(annotation["image_id"], []).append(annotation)

    def photos():
        for image in data["images"]:
            size, masks = (image["height"], image["width"]), []
            for annotation in shapes.get(image["id"], ()):
                found = annotation.get("segmentation") or []
                if isinstance(found, dict):
                    mask = run_lengths(size, found["counts"])
                else:
                    mask = polygons(size, [list(zip(part[::2], part[1::2])) for part in found])
                masks.append((names[annotation["category_id"]], mask))
            yield os.path.splitext(image["file_name"])[0], size, masks

    return classes, len(data["images"]), photos(), args.images


def labelme(args):
    files = sorted(args.given.glob("*.json"))
    if not files:
        raise InputError(f"{args.given}: holds no JSON file; give the folder that Labelme saved in")
    every = [read_json(file) for file in files]
    found = [shape["label"] for data in every for shape in data["shapes"]]
    classes = with_background(args.classes or dict.fromkeys(found))

    def photos():
        for file, data in zip(files, every):
            size = data["imageHeight"], data["imageWidth"]
            id = Path(data["imagePath"].replace("\\", "/")).stem
            yield id, size, [(s["label"], labelme_mask(size, s, file)) for s in data["shapes"]]

    return classes, len(files), photos(), args.images or args.given


def labelme_mask(size, shape, file):
    """(H, W) bool of one of Labelme's shapes; raises InputError for one that has no inside."""
    kind, points = shape.get("shape_type", "polygon"), shape["points"]
    if kind == "polygon":
        return polygons(size, [points])
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return polygons(size, [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)]])
    y, x = np.ogrid[:size[0], :size[1]]
    if kind == "circle":
        (x0, y0), (x1, y1) = points
        return (x - x0) ** 2 + (y - y0) ** 2 <= (x1 - x0) ** 2 + (y1 - y0) ** 2
    if kind == "mask":
        part = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
        left, top = (round(v) for v in points[0])
        mask = np.zeros(size, bool)
        mask[top:top + part.shape[0], left:left + part.shape[1]] = part
        return mask
    raise InputError(f"{file}: holds a shape of type '{kind}', which has no inside; draw polygons, "
                     "rectangles, circles or masks")


# cvat and voc, whose label maps stay as they are: (classes, colours, folder of labels, of photos).


def cvat(args):
    listed, colours = args.given / "labelmap.txt", {}
    if not listed.is_file():
        raise InputError(f"{listed}: no such file; give the folder of CVAT's export 'Segmentation mask 1.1'")
    for line in listed.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, colour, *_ = line.split(":")
            colours[name] = [int(v) for v in colour.split(",")]
    classes = with_background(colours)
    colours = {name: colours.get(name, [0, 0, 0]) for name in classes}
    images = args.images or args.given / "JPEGImages"
    return classes, colours | {"ignore": VOID}, args.given / "SegmentationClass", images


def voc(args):
    if not args.classes:
        raise InputError("voc: VOC's label maps do not name their classes; give --classes background ...")
    colours = {name: voc_colour(k) for k, name in enumerate(args.classes)}
    return args.classes, colours | {"ignore": VOID}, args.given, args.images


def voc_colour(k):
    """The k-th colour of VOC's palette: k's bits, three by three, from the highest of r, g and b down."""
    colour = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            colour[channel] |= (k >> (3 * place + channel) & 1) << (7 - place)
    return colour


# The folder -------------------------------------------------------------------------------------------------


def with_background(names):
    """The classes, "background" first whatever the file says of it."""
    return ["background", *(name for name in names if name != "background")]


def read_json(file):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({' '.join(str(error).split())})") from None


def draw(args, work, classes, count, photos, images):
    """Write the label maps of drawn shapes, with progress. Returns the ids."""
    ids, begun, printed = [], time.time(), time.time()
    photo_files = {}
    for n, (id, size, shapes) in enumerate(photos, 1):
        unknown = [name for name, _ in shapes if name not in classes]
        if unknown:
            raise InputError(f"{id}: is labelled '{unknown[0]}', which is none of the classes "
                             f"{', '.join(classes)}")
        folder = images / Path(id).parent
        photo_files.setdefault(folder, listing(folder, IMAGE_ENDINGS))
        if Path(id).name not in photo_files[folder]:
            raise InputError(f"{images / id}: no such photo ({', '.join(IMAGE_ENDINGS)}); --images names the "
                             "folder of the photos")
        file = work / f"labels/{id}.png"
        if file.exists():
            raise InputError(f"{args.given}: two photos are called {id}, whatever their endings; rename one")
        label = label_map(size, [(classes.index(name), mask) for name, mask in shapes], args.order)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(file)
        ids.append(id)
        if time.time() - printed > 1 or n == count:
            printed = time.time()
            left = (printed - begun) / n * (count - n)
            print(f"\r{n} of {count}, {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return ids


def write(args, work, classes, ids, images, labels, **fields):
    """domain.json, its list of ids, and the proposed adjacency."""
    fields = {"name": args.out.name, "classes": classes, "images": os.path.relpath(images, args.out),
              "labels": labels, "train": "ids.txt", "val": args.val, **fields}
    domain = from_dict(fields, str(args.out / "domain.json"))  # refuses a name that is none
    (work / "ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")

    def save():
        text = json.dumps(fields, indent=1, ensure_ascii=False)
        (work / "domain.json").write_text(text + "\n", encoding="utf-8")

    save()
    data = open_dataset(args.out.name, work)
    tally = Tally(Part(data, range(0, len(data), -(-len(data) // MOST))))
    tally.read("which classes touch", workers=0)
    if tally.bad:
        raise InputError(tally.bad[0])
    fields["adjacency"] = [[classes[a], classes[b]] for a, b in sorted(touching_often(tally))]
    save()
    print(f"wrote {args.out}: {len(ids)} photos, {len(classes)} classes: {', '.join(classes)}")
    without = [name for name in classes if vector(domain, name) is None]
    if without:
        print(f"no word vector: {', '.join(without)}. Several label domains with SST need one: add to "
              f'domain.json "aliases": {{"{without[0]}": "an English word", ...}}, or train with --lam 0 '
              "--cross 0.")
    print(f"next: python train.py --check --data {args.out.name}={args.out}")


def convert(args, work):
    if args.format in ("coco", "labelme"):
        classes, count, photos, images = {"coco": coco, "labelme": labelme}[args.format](args)
        ids = draw(args, work, classes, count, photos, images)
        return write(args, work, classes, ids, images, "labels")
    classes, colours, labels, images = {"cvat": cvat, "voc": voc}[args.format](args)
    ids = sorted(listing(labels, (".png",)))
    return write(args, work, classes, ids, images, os.path.relpath(labels, args.out), colours=colours)


def main():
    p = argparse.ArgumentParser("convert.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("format", choices=["coco", "labelme", "cvat", "voc"])
    p.add_argument("given", type=Path, metavar="FILE|FOLDER", help="what the tool exported")
    p.add_argument("--images", type=Path, metavar="DIR", help="the photos (labelme, cvat: beside the labels)")
    p.add_argument("--out", type=Path, metavar="OUT", required=True,
                   help="a new folder; its name is the domain's")
    p.add_argument("--classes", nargs="+", metavar="NAME", help="voc, labelme: the classes in id order")
    p.add_argument("--order", choices=["given", "area"], default="given",
                   help="which of two shapes lies on top: the later one, or the smaller one (given)")
    p.add_argument("--val", type=float, default=0.1, metavar="SHARE", help="of the photos validates (0.1)")
    args = p.parse_args()
    if args.format in ("coco", "voc") and not args.images:
        raise InputError(f"{args.format}: --images is missing; give the folder of the photos")
    if not 0 < args.val < 1:
        raise InputError(f"--val {args.val}: must lie between 0 and 1")
    if args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"--out {args.out}: holds files already; give a new folder")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=args.out.parent))  # OUT is whole or not there
    try:
        convert(args, work)
        work.chmod(0o755)
        os.replace(work, args.out)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{args.given}: not what {args.format} exports ({type(error).__name__}: "
                         f"{error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run_program(main, "convert.py")
