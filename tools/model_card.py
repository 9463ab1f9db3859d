"""Score the parser that the package carries, and write the tables and pictures of docs/model-card.md.

    python tools/model_card.py --photos DIR              minutes; DIR holds Clothing Co-Parsing
    python tools/model_card.py --photos DIR --model M    of another model.pt, to stdout, without pictures

Pictures are chosen by rule: the photos of the validation list where the mean IoU of `ccp-middle` over the
classes in the photo is highest, in the middle, and lowest.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import sst  # noqa: E402
from experiments import MAPS, TRAINED  # noqa: E402
from sst import checkpoint  # noqa: E402
from sst.data import open_dataset  # noqa: E402
from sst.errors import InputError, run_program  # noqa: E402
from sst.export import export  # noqa: E402
from sst.inference import on_canvas  # noqa: E402
from sst.metrics import confusion, scores  # noqa: E402
from sst.onnx_parser import OnnxParser  # noqa: E402
from sst.plots import overlay, scaled, side_by_side  # noqa: E402

CARD, FIRST, LAST = ROOT / "docs/model-card.md", "<!-- scores -->", "<!-- end of scores -->"
PICTURED = ("ccp-fine", "atr", "pascal")


def evaluated(model, photos, *flags):
    """{title: scores} on the 104 validation photos, by evaluate.py."""
    with tempfile.TemporaryDirectory() as folder:
        maps = [f"ccp-common:{head}={MAPS}/{head}-to-ccp-common.json" for head in ("atr", "cihp")]
        data = [f"{name}={photos}" for name in (*TRAINED, "ccp-common")]
        done = subprocess.run([sys.executable, ROOT / "evaluate.py", model, "--out", folder, "--json", *flags,
                               "--as", *maps, "--data", *data], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError("evaluate.py failed, see above")
    return json.loads(done.stdout)


def by_photo(parser, data):
    """[(mIoU % of the classes in the photo or its prediction, index)], worst first."""
    name, Z = data.domain.name, data.domain.num_classes
    ranked = []
    for i in range(len(data)):
        image, label = data.load(i)
        matrix = confusion(parser(image, [name])[name], label, Z)
        ranked.append((scores(matrix)["miou"], i))
    return sorted(ranked)


def int8(parser, photos, folder):
    """{domain: mIoU %} of the network in 8-bit integers, by onnxruntime. Ranges: 64 training photos."""
    training = open_dataset("ccp-common", photos)
    canvases = (on_canvas(training.load(i)[0], parser.size)[0] for i in range(64))
    export(parser.net, parser.domains, f"{folder}/int8.onnx", parser.size, canvases)
    small, found = OnnxParser(f"{folder}/int8.onnx"), {}
    for name in TRAINED:
        data = open_dataset(name, photos, "val")
        matrix = sum(confusion(small(image, [name])[name], label, data.domain.num_classes)
                     for image, label in (data.load(i) for i in range(len(data))))
        found[name] = scores(matrix)["miou"]
    return found


def tables(single, published, integers):
    """The scores as lines of Markdown."""
    names = {name: name for name in TRAINED} | {
        "ccp-common via atr": "`atr`, over the 13 classes shared with the photos' labels",
        "ccp-common via cihp": "`cihp`, over the 11 classes shared"}
    lines = ["| head | classes | mIoU %, one pass | flips and six scales | one pass in int8 |",
             "|---|---|---|---|---|"]
    for title, words in names.items():
        count = sum(iou is not None for iou in single[title]["iou"].values())
        words = f"`{title}`" if title in TRAINED else words
        lines.append(f"| {words} | {count} | {single[title]['miou']:.1f} | {published[title]['miou']:.1f} | "
                     f"{f'{integers[title]:.1f}' if title in integers else ''} |")
    for title in names:
        each = ", ".join(f"{c} {iou:.0f}" for c, iou in single[title]["iou"].items() if iou is not None)
        lines += ["", f"**{title.replace('ccp-common via ', '')}**, IoU % of each class, one pass: {each}."]
    return lines


def pictures(parser, photos, ranked):
    """Write docs/parser-{best,median,worst}.jpg, and the median itself. Returns lines of Markdown."""
    data, lines = open_dataset("ccp-middle", photos, "val"), []
    for word, (miou, i) in (("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])):
        image, _ = data.load(i)
        if word == "median":
            shutil.copy(data.where(i), ROOT / "docs/photo.jpg")
        small, maps = scaled(image, parser(image, PICTURED), 480)
        row = [small, *(overlay(small, maps[name], parser.domains[name]) for name in PICTURED)]
        Image.fromarray(side_by_side(row)).save(ROOT / f"docs/parser-{word}.jpg", quality=85)
        lines += ["", f"The {word}, photo {Path(data.where(i)).stem}, mIoU {miou:.0f} %:", "",
                  f"![The photo, then {', '.join(PICTURED)}](parser-{word}.jpg)"]
    return lines


def main():
    p = argparse.ArgumentParser("model_card.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", metavar="DIR", required=True, help="Clothing Co-Parsing")
    p.add_argument("--model", metavar="FILE", help="another network, whose scores are only printed")
    args = p.parse_args()
    model, parser = args.model or checkpoint.PACKAGED, sst.load(args.model)
    ranked = by_photo(parser, open_dataset("ccp-middle", args.photos, "val"))
    with tempfile.TemporaryDirectory() as folder:
        integers = int8(parser, args.photos, folder)
    lines = tables(evaluated(model, args.photos), evaluated(model, args.photos, "--published"), integers)
    quartiles = np.percentile([miou for miou, _ in ranked], (25, 50, 75))
    lines += ["", f"Half of the 104 photos have an mIoU of `ccp-middle` between {quartiles[0]:.0f} and "
              f"{quartiles[2]:.0f} %, over the classes in the photo or its prediction."]
    if args.model:
        print("\n".join(lines))
        return
    lines += pictures(parser, args.photos, ranked)
    before, rest = CARD.read_text().split(FIRST)
    CARD.write_text("\n".join([before + FIRST, *lines, "", LAST + rest.split(LAST)[1]]))


if __name__ == "__main__":
    run_program(main, "model_card.py")
