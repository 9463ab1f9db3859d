"""Where do several label domains help? Every number of docs/results.md, from cells that are kept.

    python experiments.py run --photos DIR             all cells that are not there yet, two side by side
    python experiments.py run --photos DIR --only unseen-labels --variants multi cross --seeds 0 1 2
    python experiments.py run --photos DIR --dry-run   what would be done
    python experiments.py run --photos DIR --cells my.jsonl --runs runs/mine             kept cells again
    python experiments.py run --photos DIR --held-back --variants multi --try lr=0.006 "lr=0.006 balance=0.25"
                                                       tuning, on a fifth of the training lists, held back
    python experiments.py report                       docs/results.md and its picture from docs/cells.jsonl

A cell is a test bed, a variant and a seed: one run of train.py in a folder of its own, on one thread, and
its scores. A finished cell is a line of docs/cells.jsonl with its settings, versions and times. Cells of
tuning go to docs/tuning.jsonl; they never see a validation photo. DIR holds Clothing Co-Parsing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, median
from threading import Lock

import results

ROOT = Path(__file__).parent
CELLS, TUNING = ROOT / "docs/cells.jsonl", ROOT / "docs/tuning.jsonl"

# name: (in words, what it adds to the flags of a test bed). `multi` is the baseline of Table 1; in dedicated
# parsing it is fine-tuning.
NO_SST = ["--beta", "0", "--lam", "0", "--cross"]
VARIANTS = {
    "multi": ("Multi-datasets", [*NO_SST, "0"]),
    "cross": ("+ L_cross", [*NO_SST, "1"]),
    "sst": ("SST as published", ["--sst", "published"]),
}
BUILTIN = ROOT / "sst/builtin"
MAPS = ROOT / "docs/maps"  # HEAD-to-ccp-common.json: a head scored through the classes that both have
TRAINED = ("ccp-coarse", "ccp-middle", "ccp-fine")  # disjoint lists, in all those of ccp-common
PHOTO_DOMAINS = (*TRAINED, "ccp-common")
PHOTOS = ["ccp-coarse=DIR", "ccp-middle=DIR", "ccp-fine=DIR"]

LITE = ["--preset", "lite", "--size", "160x96", "--crop", "160x96", "--steps", "500", "--data"]
FIGURES = ["pascal=figures", "atr=figures", "cihp=figures"]

# The source domains of dedicated parsing, which universal parsing is trained on.
SOURCES = {"photos": ["ccp-middle=DIR", "ccp-fine=DIR"], "figures": ["cihp=figures"]}
SOURCE_LOSSES = ["--sst", "published", "--lam", "0"]  # L_seg and L_aux, as in step 1 of Sec. 3.3

# name: (what it asks, flags of train.py, which score counts)
BEDS = {
    "unseen-labels": (
        "Labels that no photo has. 1,500 drawn figures carry `atr`, 266 photos carry `ccp-fine`. Scored: the "
        "head `atr` on the validation photos, over the 13 classes that both have.",
        [*LITE, "ccp-fine=DIR", "atr=figures", "--limit", "atr=1500"], "atr on photos"),
    "poor-coarse": (
        "One poor domain. 20 photos carry `ccp-coarse`, 267 `ccp-middle`, 266 `ccp-fine`. Scored: "
        "`ccp-coarse`.",
        [*LITE, *PHOTOS, "--limit", "ccp-coarse=20"], "ccp-coarse"),
    "poor-fine": (
        "The other way round: 20 photos carry `ccp-fine`, 267 `ccp-coarse`, 267 `ccp-middle`. Scored: "
        "`ccp-fine`.",
        [*LITE, *PHOTOS, "--limit", "ccp-fine=20"], "ccp-fine"),
    "poor-pascal-figures": (
        "The same with drawn figures: 20 carry `pascal`, 2,000 `atr`, 2,000 `cihp`. Scored: `pascal`.",
        [*LITE, *FIGURES, "--limit", "pascal=20"], "pascal"),
    "poor-cihp-figures": (
        "20 figures carry `cihp`, 2,000 `pascal`, 2,000 `atr`. Scored: `cihp`.",
        [*LITE, *FIGURES, "--limit", "cihp=20"], "cihp"),
    "balanced-photos": (
        "Balanced. 800 photos, a third for each of `ccp-coarse`, `ccp-middle`, `ccp-fine`. Scored: their "
        "mean.",
        [*LITE, *PHOTOS], "mean"),
    "balanced-figures": (
        "Balanced. 2,000 figures for each of `pascal`, `atr`, `cihp`. Scored: their mean.",
        [*LITE, *FIGURES], "mean"),
}
BEDS["demo"] = (
    "The demo, cut to 900 steps: the network of the preset `demo` from scratch, 2,000 figures for each of "
    "`pascal`, `atr`, `cihp`. Scored: their mean.",
    ["--preset", "demo", "--steps", "900", "--data", *FIGURES], "mean")
for percent in (10, 25, 50, 100):
    step_2 = ["--mode", "dedicated", *LITE[:6], "--steps", "300"]
    BEDS[f"dedicated-photos-{percent}"] = (
        "Dedicated parsing. Source: 533 photos, `ccp-middle` and `ccp-fine`. Target: of the 267 photos of "
        "`ccp-coarse`, as many percent as the test bed's name says. Scored: `ccp-coarse`.",
        [*step_2, "--source-checkpoint", "SOURCE=photos", "--target", "ccp-coarse=DIR", "--limit",
         f"ccp-coarse={267 * percent // 100}"], "ccp-coarse")
    BEDS[f"dedicated-figures-{percent}"] = (
        "Dedicated parsing. Source: 2,000 figures, `cihp`. Target: of 200 figures, `pascal`, as many percent "
        "as the test bed's name says. Scored: `pascal`.",
        [*step_2, "--source-checkpoint", "SOURCE=figures", "--target", "pascal=figures", "--limit",
         f"pascal={2 * percent}"], "pascal")
for count, pool in ((1, PHOTOS[:1]), (2, PHOTOS[:2]), (3, PHOTOS), (6, PHOTOS + FIGURES)):
    BEDS[f"pool-{count}"] = (
        "A growing pool of label domains: `ccp-coarse`, then also `ccp-middle`, then also `ccp-fine`, then "
        "also figures with `pascal`, `atr`, `cihp`. Scored: `ccp-coarse`.",
        [*LITE, *pool], "ccp-coarse")


# Running cells ----------------------------------------------------------------------------------------------


def kept(path=None):
    """The finished cells, a dictionary each."""
    path = path or CELLS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wanted(args):
    """(bed, variant, seed) of the cells asked for that are not kept. A variant's name holds its --try."""
    done = {(cell["bed"], in_order(cell["variant"]), cell["seed"]) for cell in kept(args.cells)}
    variants = [in_order(f"{variant} {change}") for variant in args.variants for change in args.changes]
    asked = [(bed, variant, seed) for seed in args.seeds for bed in args.only for variant in variants
             if variant.split()[0] in variants_of(bed)]
    return [cell for cell in asked if cell not in done]


def in_order(variant):
    """A variant's name with its changed flags sorted: their order makes no other cell."""
    name, *changes = variant.split()
    return " ".join([name, *sorted(changes)])


def variants_of(bed):
    """The variants that there are for a test bed: L_cross joins several domains."""
    return [name for name in VARIANTS if bed != "pool-1" or name in ("multi", "sst")]


def flags_of(bed, variant, seed):
    """"multi lr=0.006" -> the flags of the test bed, of the variant, and --lr 0.006."""
    name, *changes = variant.split()
    changed = [word for change in changes for word in f"--{change}".split("=")]
    return [*BEDS[bed][1], *VARIANTS[name][1], *changed, "--seed", str(seed)]


def hold_back(photos, folder):
    """Folders of the photo domains whose validation list is every fifth photo of the training lists."""
    lists = {name: (BUILTIN / f"{name}_train_id.txt").read_text().splitlines() for name in PHOTO_DOMAINS}
    back = [id for name in TRAINED for id in lists[name][::5]]
    for name, ids in lists.items():
        fields = json.loads((BUILTIN / f"{name}.json").read_text())
        place = Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "domain.json").write_text(json.dumps(fields | {
            "images": f"{Path(photos).resolve()}/photos",
            "labels": f"{Path(photos).resolve()}/annotations/pixel-level"}))
        (place / "train_id.txt").write_text("\n".join(id for id in ids if id not in back))
        (place / "val_id.txt").write_text("\n".join(back))
    return {name: f"{folder}/{name}" for name in lists}


def run_cell(bed, variant, seed, args):
    """Train and score one cell; returns its record."""
    out = Path(args.runs) / ("held-back" if args.held_back else "") / bed / f"{variant}-{seed}"
    flags, where = flags_of(bed, variant, seed), about()
    words = [source_of(word[7:], seed, args) if word.startswith("SOURCE=") else word for word in flags]
    program([ROOT / "train.py", *words, "--validations", 0, "--out", out, "--resume", "auto"], args)
    began = time.time()
    scores = score(bed, out, args)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line["time"] for line in log if line["kind"] == "train"]
    return {"bed": bed, "variant": variant, "seed": seed, "scores": scores, "flags": flags,
            "steps": log[-1]["step"], "seconds a step": round(median(t["step"] for t in steps), 4),
            "seconds": round(steps[-1]["seconds"]), "seconds of scoring": round(time.time() - began),
            **where, **busy(args.jobs)}


def source_of(kind, seed, args):
    """The folder of a trained source, which cells share."""
    folder = Path(args.runs) / ("held-back" if args.held_back else "") / "sources" / f"{kind}-{seed}"
    with args.locks.setdefault(folder, Lock()):  # of two cells that need it one trains it
        program([ROOT / "train.py", *LITE, *SOURCES[kind], *SOURCE_LOSSES, "--seed", seed, "--validations", 0,
                 "--out", folder, "--resume", "auto"], args)
    return folder


def score(bed, out, args):
    """{what: mIoU %} of a trained cell on the validation lists."""
    if bed == "unseen-labels":
        heads = ("atr", "ccp-fine")  # the second: what labels on the photos themselves give
        maps = [f"ccp-common:{head}={MAPS}/{head}-to-ccp-common.json" for head in heads]
        tables = evaluate(out, ["ccp-common=DIR"], ["--as", *maps], args)
        atr, fine = (tables[f"ccp-common via {head}"] for head in heads)
        classes = {f"atr on photos: {name}": iou for name, iou in atr["iou"].items()}
        return {"atr on photos": atr["miou"], "ccp-fine on photos": fine["miou"]} | classes
    names = [spec for spec in BEDS[bed][1]
             if spec.endswith(("=DIR", "=figures")) and not spec.startswith("SOURCE=")]
    scores = {name: table["miou"] for name, table in evaluate(out, names, [], args).items()}
    return scores | {"mean": mean(scores.values())}


def evaluate(out, data, flags, args):
    return json.loads(program([ROOT / "evaluate.py", out, "--data", *data, *flags, "--json"], args))


def program(words, args):
    """Run a program on one thread. Returns what it prints; raises RuntimeError with its last line."""
    words = [str(word) for word in words]
    words = [f"{word[:-4]}={args.folders[word[:-4]]}" if word.endswith("=DIR") else word for word in words]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])
    return done.stdout


def busy(jobs):
    """{"other work": True} where the last minutes had more to do than these cells: no time counts."""
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else 0
    return {"other work": True} if load > jobs + 0.5 else {}


def about():
    """Versions and machine; no host and no path. -dirty: the commit was changed, and not in docs/ alone."""
    import torch
    git = partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]).stdout > ""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"commit": commit + "-dirty" * changed, "torch": torch.__version__,
            "python": platform.python_version(), "cpu": cpu, "threads": 1}


def report(args):
    """Write docs/results.md, its tables and its picture."""
    names = {name: words for name, (words, _) in VARIANTS.items()}
    results.report(BEDS, names, kept(), [cell | {"score": BEDS[cell["bed"]][2]} for cell in kept(TUNING)])
    return 0


def run(args):
    args.locks = {}
    args.cells = args.cells or (TUNING if args.held_back else CELLS)
    args.folders = dict.fromkeys(PHOTO_DOMAINS, args.photos)
    if args.held_back:
        args.folders = hold_back(args.photos, Path(args.runs) / "held-back")
    cells, lock, began, done = wanted(args), Lock(), time.time(), []
    print(f"{len(cells)} cells to do, {args.jobs} side by side")
    if args.dry_run:
        print("\n".join(f"  {bed}, {variant}, seed {seed}" for bed, variant, seed in cells))
        return 0

    def work(cell):
        try:
            record, words = run_cell(*cell, args), None
        except RuntimeError as error:
            record, words = None, f"failed: {error}"
        with lock:
            done.append(record)
            if record:
                with open(args.cells, "a") as file:
                    file.write(json.dumps(record) + "\n")
                words = f"{BEDS[cell[0]][2]} {record['scores'][BEDS[cell[0]][2]]:.2f} %"
            left = (time.time() - began) / len(done) * (len(cells) - len(done))
            print(f"{len(done)}/{len(cells)}  {cell[0]}, {cell[1]}, seed {cell[2]}: {words}; {left / 60:.0f} "
                  "min left", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, cells))
    return int(None in done)


def arguments():
    p = argparse.ArgumentParser("experiments.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="run|report")
    r = commands.add_parser("run", help="do the cells that are not kept yet")
    r.add_argument("--photos", metavar="DIR", required=True, help="the folder of Clothing Co-Parsing")
    beds = [bed for bed in BEDS if bed not in results.SAME]
    r.add_argument("--only", nargs="+", choices=beds, default=beds, help="test beds")
    r.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    r.add_argument("--seeds", nargs="+", type=int, default=list(range(8, 16)),
                   help="8 to 15, as in docs/results.md; take 0 to 2 with --held-back")
    r.add_argument("--try", dest="changes", metavar="FLAG=VALUE", nargs="+", default=[""],
                   help="variants of the variants: flags of train.py that each of them changes")
    r.add_argument("--held-back", action="store_true",
                   help="tune: train on four fifths of the training lists and score on the last one")
    r.add_argument("--cells", metavar="FILE", type=Path,
                   help="keep the cells in a file of your own; those of docs/ are then done again")
    r.add_argument("--jobs", type=int, default=2, help="cells side by side, a thread each (2)")
    r.add_argument("--runs", metavar="DIR", default="runs/cells", help="folder of the trainings (runs/cells)")
    r.add_argument("--dry-run", action="store_true", help="only list them")
    r.set_defaults(go=run)
    commands.add_parser("report", help="write docs/results.md from the kept cells").set_defaults(go=report)
    return p


if __name__ == "__main__":
    args = arguments().parse_args()
    sys.exit(args.go(args))
