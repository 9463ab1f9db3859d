"""Train the parser that the package carries: one command, hours of two cores (docs/model-card.md).

    git clone https://github.com/bearpaw/clothing-co-parsing DIR
    python tools/train_parser.py --photos DIR --out runs/parser    begin, or go on after an interruption

It ends with runs/parser/parser.pt, which is model.pt in half precision: the file sst/builtin/parser.pt.
One network, six label sets. The 800 photos of the training lists of Clothing Co-Parsing are labelled in
`ccp-coarse`, `ccp-middle` and `ccp-fine`; drawn figures in `pascal`, `atr` and `cihp`, whose heads learn what
photos look like through L_cross. Validation only reports: what counts is model.pt, the last step's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sst import checkpoint  # noqa: E402
from sst.errors import run_program  # noqa: E402

BUILTIN = ROOT / "sst/builtin"
PHOTOS, FIGURES = ("ccp-coarse", "ccp-middle", "ccp-fine"), ("pascal", "atr", "cihp")

# A photo is 3:2, as 288x192. Drawn figures are three eighths of a photo domain each: they teach the names of
# their classes, the photos the rest. L_cross has five partners for each head here, so each weighs less.
FLAGS = ["--preset", "lite", "--size", "288x192", "--crop", "288x192", "--batch-size", "12",
         "--slots", "proportional", "--limit", *(f"{name}=300" for name in FIGURES),
         "--beta", "0", "--lam", "0", "--cross", "0.3",
         "--steps", "6000", "--validations", "3", "--save-every", "250"]


def folders(photos, out):
    """["NAME=FOLDER"]: the photo domains, each with all 800 photos. Their own lists have a third each."""
    for name in PHOTOS:
        folder = out / "domains" / name
        folder.mkdir(parents=True, exist_ok=True)
        fields = json.loads((BUILTIN / f"{name}.json").read_text())
        fields |= {"images": f"{photos}/photos", "labels": f"{photos}/annotations/pixel-level",
                   "train": f"{BUILTIN}/ccp-common_train_id.txt", "val": f"{BUILTIN}/ccp_val_id.txt"}
        (folder / "domain.json").write_text(json.dumps(fields, indent=1))
    return [f"{name}={out}/domains/{name}" for name in PHOTOS]


def main():
    p = argparse.ArgumentParser("train_parser.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", type=Path, metavar="DIR", required=True, help="Clothing Co-Parsing")
    p.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/parser"), help="(runs/parser)")
    args = p.parse_args()
    data = [*folders(args.photos.resolve(), args.out), *(f"{name}=figures" for name in FIGURES)]
    ended = subprocess.run([sys.executable, ROOT / "train.py", "--data", *data, *FLAGS, "--out", args.out,
                            "--resume", "auto"]).returncode
    if ended == 0:
        pack(args.out / "model.pt", args.out / "parser.pt")
    return ended


def pack(model, file):
    """Write a model.pt in half precision."""
    net, domains = checkpoint.load_model(model)
    content = checkpoint.model_content(net, domains, checkpoint.trained_size(net, model))
    weights = {key: w.half() if w.is_floating_point() else w for key, w in content["weights"].items()}
    checkpoint.save(content | {"weights": weights}, file)
    print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(lambda: sys.exit(main()), "train_parser.py")
