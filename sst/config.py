"""The settings of a run: flags, presets, and how they resolve. `python train.py --help` shows them in groups."""

import argparse
import json
from pathlib import Path

from .checkpoint import load
from .domains import BUILTIN
from .errors import InputError
from .model import ARCHS

# What a preset sets; any flag overrides its field. `paper` is Sec. 4.1; where the paper is silent (optimiser, weight decay,
# backbone rate) it is Mask2Former's.
PAPER = dict(arch="r50", backbone_weights="auto", size=None, crop=(512, 512), scale=(0.5, 2.0), batch_size=4, epochs=150, steps=None, lr=1e-4,
             backbone_lr_scale=0.1, weight_decay=0.05, drop_at=125 / 150, alpha=10.0, beta=1.0, lam=5.0, validations=30,
             log_every=20, workers=4)
SMALL = PAPER | dict(arch="small", backbone_weights="none", size=(192, 128), crop=(192, 128), batch_size=6, epochs=30, lr=3e-3,
                     backbone_lr_scale=1.0, validations=10, log_every=5, workers=1)
# The figures vary in size already, and minutes are few: the demo hardly resizes them.
DEMO = SMALL | dict(size=(96, 96), crop=(96, 96), scale=(0.8, 1.25), batch_size=12, epochs=None, steps=1100, validations=2)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}


def pair(text):
    """"512x384" -> (512, 384), height first."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH in pixels, such as 512x512")
    return int(height), int(width)


def positive(text):
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def parser():
    p = argparse.ArgumentParser("train.py", formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=None, description=(
        "Train a human parser on several label domains with SST.\n\n"
        "  python train.py --mode universal                                       the built-in figures, minutes on a CPU\n"
        "  torchrun --nproc_per_node=8 train.py --mode universal --data pascal=DIR atr=DIR cihp=DIR      as published"))
    g = p.add_argument_group("the run")
    g.add_argument("--mode", choices=["universal"], default="universal", help="universal: one network, a head per label domain")
    g.add_argument("--preset", choices=list(PRESETS), help="demo (default without --data), small (the demo's network, for photos), "
                   "paper (default with --data: the published settings)")
    g.add_argument("--out", metavar="DIR", help="the run's folder; by default a fresh one, runs/universal, runs/universal-2, ...")
    g.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its settings")
    g.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation (default 0)")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH", help="label domains and their folders; NAME is one of "
                   f"{', '.join(BUILTIN)}, or any if PATH is a folder with a domain.json or such a file; without --data: figures")
    g.add_argument("--size", type=pair, metavar="HxW", help="fit the whole photo into this size first (aspect kept, padded)")
    g.add_argument("--crop", type=pair, metavar="HxW", help="the training window, cut after a random resize")
    g.add_argument("--scale", nargs=2, type=float, metavar=("LOW", "HIGH"), help="range of the random resize (0.5 2)")
    g.add_argument("--batch-size", type=positive, metavar="B", help="images of a micro-batch, of all domains together")
    g.add_argument("--global-batch", type=positive, metavar="G", help="images of a step, a multiple of B that the processes share "
                   "(default: B per process)")
    g.add_argument("--workers", type=int, metavar="N", help="loading processes per training process")
    g = p.add_argument_group("the network")
    g.add_argument("--arch", choices=list(ARCHS), help="r50, r101 or small")
    g.add_argument("--backbone-weights", metavar="auto|none|PATH", help="ImageNet weights: downloaded, none, or torchvision's file")
    g = p.add_argument_group("SST (--beta 0 --lam 0 is the Multi-datasets baseline, no SST module is built)")
    g.add_argument("--alpha", type=float, help="weight of L_seg (10)")
    g.add_argument("--beta", type=float, help="weight of L_aux (1)")
    g.add_argument("--lam", type=float, help="lambda, weight of L_dataset + L_img (5)")
    g.add_argument("--intra-mask", choices=["body", "none"], default="body", help="M_intra of Eq. 6, or Eq. 5 (default body)")
    g.add_argument("--scr", choices=["both", "dataset", "image", "none"], default="both", help="consistency terms (default both)")
    g.add_argument("--connect", choices=["full", "progressive"], default="full", help="pairs of domains (default full)")
    g.add_argument("--regions", choices=["label", "prediction"], default="label", help="what MSA pools over (default label)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=positive, help="passes over all training sets together")
    g.add_argument("--steps", type=positive, help="optimiser steps, instead of epochs")
    g.add_argument("--lr", type=float, help="learning rate of AdamW")
    g.add_argument("--backbone-lr-scale", type=float, metavar="X", help="the backbone's rate is X times that")
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--drop-at", type=float, metavar="PART", help="part of the run after which the rate is a tenth (125/150)")
    g.add_argument("--validations", type=int, metavar="N", help="how often validation runs, evenly spread; 0 for never")
    g.add_argument("--log-every", type=positive, metavar="STEPS", help="steps between lines of log.jsonl")
    return p


def resolve(argv=None):
    """Command line -> settings, a plain dict with every field set. Raises InputError for settings that exclude each other."""
    args = vars(parser().parse_args(argv))
    if args["resume"]:
        return resumed(args)
    args["preset"] = args["preset"] or ("paper" if args["data"] else "demo")
    preset = PRESETS[args["preset"]]
    if args["epochs"] and args["steps"]:
        raise InputError(f"--epochs {args['epochs']} and --steps {args['steps']}: give one of them")
    if args["epochs"] or args["steps"]:
        preset = preset | dict(epochs=None, steps=None)
    config = {key: preset.get(key) if value is None else value for key, value in args.items()}
    for key, low, high in (("alpha", 0, 1e6), ("beta", 0, 1e6), ("lam", 0, 1e6), ("lr", 1e-12, 10), ("backbone_lr_scale", 0, 1e3),
                           ("weight_decay", 0, 10), ("drop_at", 0, 1), ("validations", 0, 1e9), ("workers", 0, 1e3), ("seed", 0, 2 ** 31 - 1)):
        if not low <= config[key] <= high:  # also refuses NaN
            raise InputError(f"--{key.replace('_', '-')} {config[key]}: must lie between {low:g} and {high:g}")
    if not 0.01 <= config["scale"][0] <= config["scale"][1] <= 100:
        raise InputError(f"--scale {config['scale'][0]} {config['scale'][1]}: give the smaller factor first, such as 0.5 2")
    for side in config["crop"]:
        if side < 32:
            raise InputError(f"--crop {config['crop'][0]}x{config['crop'][1]}: the deepest map has a 32nd of that size; use 32 or "
                             f"more on each side")
    if config["batch_size"] == 1 and max(config["crop"]) <= 32:
        raise InputError("--batch-size 1 with --crop 32x32: batch norm has one pixel left in the deepest map and needs two; use a larger "
                         "crop or batch")
    if config["preset"] == "paper" and not config["data"]:
        raise InputError("--preset paper without --data: the built-in figures are too small for 512x512 crops; give --data or --preset demo")
    if config["global_batch"] and config["global_batch"] % config["batch_size"]:
        raise InputError(f"--global-batch {config['global_batch']}: must be a multiple of --batch-size {config['batch_size']}")
    return config


def resumed(args):
    """The settings of the run that is resumed; flags given beside --resume are refused, since they would change the run."""
    default = vars(parser().parse_args([]))
    extra = [key for key, value in args.items() if key not in ("resume", "workers") and value != default[key]]
    if extra:
        raise InputError(f"--{extra[0].replace('_', '-')} beside --resume: a resumed run keeps its settings; give --resume alone")
    config = load(Path(args["resume"]) / "last.pt", "run")["config"]
    return config | {"resume": args["resume"], "out": args["resume"], "workers": config["workers"] if args["workers"] is None else args["workers"]}


def fresh_folder(mode):
    """runs/universal, or the first of runs/universal-2, -3, ... that is not there yet."""
    n = 1
    while (folder := Path("runs") / (mode if n == 1 else f"{mode}-{n}")).exists():
        n += 1
    return folder


def open_folder(config):
    """Make the run's folder; raises InputError where it holds a run already or cannot be written."""
    folder = Path(config["out"]) if config["out"] else fresh_folder(config["mode"])
    held = [name for name in ("config.json", "log.jsonl", "last.pt", "model.pt", "best.pt") if (folder / name).exists()]
    if held and not config["resume"]:
        way_on = f", or go on with it: --resume {folder}" if "last.pt" in held else ""
        raise InputError(f"--out {folder}: holds a run already ({', '.join(held)}); give another folder{way_on}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give a folder of yours") from None
    return folder
