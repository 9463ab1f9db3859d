"""The settings of a run: flags, presets, and how they resolve. `python train.py --help` shows them in groups."""

import argparse
import json
import os
from pathlib import Path

from .checkpoint import load, written_whole
from .domains import BUILTIN
from .errors import InputError
from .model import ARCHS

# What a preset sets; any flag overrides its field. `paper` is Sec. 4.1; where the paper is silent (optimiser, weight decay,
# backbone rate) it is Mask2Former's.
PAPER = dict(arch="r50", backbone_weights="auto", size=None, crop=(512, 512), scale=(0.5, 2.0), batch_size=4, epochs=150, steps=None, lr=1e-4,
             optimizer="adamw", adam_beta2=0.999, backbone_lr_scale=0.1, sst_lr_scale=1.0, weight_decay=0.05, drop_at=125 / 150, decay="drop",
             balance=0.0, alpha=10.0, beta=1.0, lam=5.0, validations=30, log_every=20, save_every=1000, workers=4)
# On a CPU steps are few: the optimiser and schedule that learn fastest, found by experiment (docs/experiments.md).
SMALL = PAPER | dict(arch="small", backbone_weights="none", size=(192, 128), crop=(192, 128), batch_size=12, epochs=30, lr=0.01,
                     optimizer="muon", adam_beta2=0.95, backbone_lr_scale=1.0, sst_lr_scale=0.1, drop_at=0.6, decay="linear", balance=0.25,
                     validations=10, log_every=5, workers=1)
# The figures vary in size already: the demo does not resize them.
DEMO = SMALL | dict(size=(96, 96), crop=(96, 96), scale=(1.0, 1.0), epochs=None, steps=1800, validations=2)
FIGURES = ("pascal", "atr", "cihp")  # label domains of the built-in figures
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
# What may change when a run goes on: none of it changes what is learned from data that can be read.
FREE = ("resume", "out", "workers", "skip_bad", "max_skips", "save_every")


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
        "  torchrun --nproc_per_node=8 train.py --mode universal --data pascal=DIR atr=DIR cihp=DIR      as published\n"
        "  torchrun --nproc_per_node=8 train.py --mode dedicated --source cihp=DIR --target pascal=DIR   as published"))
    g = p.add_argument_group("the run")
    g.add_argument("--mode", choices=["universal", "dedicated"], default="universal", help="universal: one network, a head per label "
                   "domain; dedicated: pre-train on source domains, then transfer to one target domain")
    g.add_argument("--preset", choices=list(PRESETS), help="demo (default without --data), small (the demo's network, for photos), "
                   "paper (default with --data: the published settings)")
    g.add_argument("--out", metavar="DIR", help="the run's folder; by default a fresh one, runs/universal, runs/universal-2, ...")
    g.add_argument("--resume", metavar="DIR|auto", help="go on with the run in DIR, at its last checkpoint, with its settings; auto: with "
                   "the run in --out (without it: the newest of runs/), or begin it where there is none (what a scheduler's requeue runs)")
    g.add_argument("--check", action="store_true", default=None, help="train nothing: read every file of the data once, report on it")
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
    g.add_argument("--workers", type=int, metavar="N", help="loading processes per training process (--check: one per core)")
    g.add_argument("--skip-bad", action="store_true", help="go on past files that cannot be read, naming and counting them: the list's next "
                   "photo takes their place (default: such a file stops the run)")
    g = p.add_argument_group("dedicated parsing (without data: figures, source cihp, target pascal)")
    g.add_argument("--source", nargs="+", default=[], metavar="NAME=PATH", help="label domains to pre-train on (several: universal parsing)")
    g.add_argument("--target", metavar="NAME=PATH", help="the label domain to transfer to; its head is the one that is kept")
    g.add_argument("--source-checkpoint", metavar="RUN_DIR", help="a run to transfer from, instead of pre-training")
    g.add_argument("--source-epochs", type=positive, metavar="N", help="length of the pre-training (the transfer's length)")
    g.add_argument("--source-steps", type=positive, metavar="N", help="the same in optimiser steps")
    g.add_argument("--fraction", type=float, default=1.0, metavar="PART", help="part of the target's training list, chosen by seed (1)")
    g = p.add_argument_group("a growing pool of label domains (universal)")
    g.add_argument("--init-from", metavar="RUN_DIR", help="start from the weights of that run; --data may add and remove domains")
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
    g.add_argument("--optimizer", choices=["adamw", "muon"], help="muon: AdamW with Muon's steps for the kept network's matrices "
                   "(presets demo and small)")
    g.add_argument("--lr", type=float, help="learning rate")
    g.add_argument("--adam-beta2", type=float, metavar="B", help="AdamW's second beta (0.999; small networks from scratch: less)")
    g.add_argument("--backbone-lr-scale", type=float, metavar="X", help="the backbone's rate is X times --lr")
    g.add_argument("--sst-lr-scale", type=float, metavar="X", help="the rate of MSA, MSE and MST is X times --lr")
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--drop-at", type=float, metavar="PART", help="part of the run after which the rate is less (125/150)")
    g.add_argument("--decay", choices=["drop", "linear"], help="drop: to a tenth, as published; linear: falling to 0 at the end (demo, small)")
    g.add_argument("--balance", type=float, metavar="P", help="L_seg's weight of a pixel: (pixels of its class in the image) ** -P (not "
                   "published: 0; demo and small: 0.25)")
    g.add_argument("--clip", type=float, metavar="NORM", help="shorten the gradient to this norm (not published; default: off)")
    g.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 on GPUs that have it, fp16 with "
                   "loss scaling on those that do not, fp32 on CPUs")
    g.add_argument("--compile", action="store_true", help="torch.compile the kept network (needs a C++ compiler on CPUs)")
    g.add_argument("--sync-bn", action="store_true", help="batch norm over the micro-batches of all GPUs; the number of GPUs then matters")
    g.add_argument("--max-skips", type=positive, default=20, metavar="N", help="a step whose loss or gradient is not finite is skipped, named "
                   "and counted; stop after N of them in a row (20)")
    g.add_argument("--save-every", type=positive, metavar="STEPS", help="steps between checkpoints (last.pt), besides those at validations")
    g.add_argument("--validations", type=int, metavar="N", help="how often validation runs, evenly spread; 0 for never")
    g.add_argument("--log-every", type=positive, metavar="STEPS", help="steps between lines of log.jsonl")
    return p


def resolve(argv=None, agree=lambda value: value):
    """Command line -> settings, a plain dict with every field set. Raises InputError for settings that exclude each other.

    agree: gives every process the first one's answer to a question about the disk.
    """
    args = vars(parser().parse_args(argv))
    folder = agree(folder_to_resume(args))
    if folder:
        return resumed(given(argv), folder)
    check_scenario(args)
    origin = args["init_from"] or args["source_checkpoint"]
    if origin and Path(origin).is_file():
        flag = "init-from" if args["init_from"] else "source-checkpoint"
        raise InputError(f"--{flag} {origin}: is a file, and model.pt alone lacks the auxiliary modules; give the run's folder, whose "
                         f"last.pt has them")
    before = load(Path(origin) / "last.pt", "run")["config"] if origin else {}
    args["preset"] = args["preset"] or before.get("preset") or ("paper" if args["data"] or args["source"] or args["target"] else "demo")
    preset = PRESETS[args["preset"]] | {key: before[key] for key in ("arch", "backbone_weights") if before}
    for key in ("arch", "backbone_weights"):
        if before and args[key] not in (None, before[key]):
            raise InputError(f"--{key.replace('_', '-')} {args[key]}: the network of {origin} has {before[key]}, which it keeps; leave the "
                             f"flag out")
    if args["epochs"] and args["steps"]:
        raise InputError(f"--epochs {args['epochs']} and --steps {args['steps']}: give one of them")
    if args["epochs"] or args["steps"]:
        preset = preset | dict(epochs=None, steps=None)
    if args["check"]:
        preset = preset | dict(workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    config = {key: preset.get(key) if value is None else value for key, value in args.items()} | {"figures": list(FIGURES)}
    for key, low, high in (("alpha", 0, 1e6), ("beta", 0, 1e6), ("lam", 0, 1e6), ("lr", 1e-12, 10), ("adam_beta2", 0, 0.999999),
                           ("backbone_lr_scale", 0, 1e3), ("sst_lr_scale", 0, 1e3), ("weight_decay", 0, 10), ("drop_at", 0, 1),
                           ("balance", 0, 1), ("validations", 0, 1e9), ("workers", 0, 1e3), ("seed", 0, 2 ** 31 - 1), ("fraction", 1e-9, 1), ("clip", 1e-12, 1e12)):
        if config[key] is not None and not low <= config[key] <= high:  # also refuses NaN
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
    if config["preset"] == "paper" and not (config["data"] or config["target"]):
        raise InputError("--preset paper without --data: the built-in figures are too small for 512x512 crops; give --data or --preset demo")
    if config["global_batch"] and config["global_batch"] % config["batch_size"]:
        raise InputError(f"--global-batch {config['global_batch']}: must be a multiple of --batch-size {config['batch_size']}")
    return config


def check_scenario(args):
    """Flags of one scenario in the other, and sources that are the target."""
    dedicated = args["mode"] == "dedicated"
    other = ["data", "init_from"] if dedicated else ["source", "target", "source_checkpoint", "source_epochs", "source_steps"]
    given = [key for key in other if args[key]] + ["fraction"] * (not dedicated and args["fraction"] != 1)
    if given:
        raise InputError(f"--{given[0].replace('_', '-')}: has no meaning with --mode {args['mode']}; "
                         + ("give --source NAME=PATH and --target NAME=PATH" if dedicated else "it belongs to --mode dedicated"))
    if not dedicated:
        return
    if args["source_checkpoint"] and (args["source"] or args["source_epochs"] or args["source_steps"]):
        raise InputError(f"--source-checkpoint {args['source_checkpoint']}: takes the place of pre-training; leave out --source, "
                         f"--source-epochs and --source-steps")
    if args["source_epochs"] and args["source_steps"]:
        raise InputError(f"--source-epochs {args['source_epochs']} and --source-steps {args['source_steps']}: give one of them")
    if bool(args["source"]) != bool(args["target"]) and not args["source_checkpoint"]:
        raise InputError("--mode dedicated needs --source NAME=PATH and --target NAME=PATH, or neither for the built-in figures")
    if args["target"] and args["target"].partition("=")[0] in [spec.partition("=")[0] for spec in args["source"]]:
        raise InputError(f"--target {args['target']}: is a source domain too; a transfer needs two different label domains")


def stages(config):
    """The trainings of a run, one after another: its settings, or for dedicated parsing those of both steps of Eq. 13.

    Step 1 is universal parsing of the sources with the preset's weights of the losses: --beta 0 --lam 0 makes step 2 plain
    fine-tuning, from the same start. Step 2's settings, saved, give both steps again.
    """
    if config["mode"] == "universal":
        return [config]
    target = config | {"data": [config["target"]] if config["target"] else [], "figures": ["pascal"]}
    own_source = f"{config['out']}/source"
    if config["source_checkpoint"] not in (None, own_source):
        return [target]
    preset = PRESETS[config["preset"]]
    length = {key: config[f"source_{key}"] for key in ("epochs", "steps")}
    if not any(length.values()):
        length = {"epochs": config["epochs"], "steps": None if config["epochs"] else config["steps"]}
    source = config | {key: preset[key] for key in ("alpha", "beta", "lam")} | length | {
        "mode": "universal", "data": config["source"], "figures": ["cihp"], "out": own_source, "fraction": 1.0, "source_checkpoint": None}
    return [source, target | {"source_checkpoint": own_source}]


# Runs that go on ---------------------------------------------------------------------------------------------------------------


def given(argv):
    """The flags that a command line sets, whatever their defaults."""
    p, unset = parser(), object()
    args = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(p.parse_args([])), unset))))
    return {key: value for key, value in args.items() if value is not unset}


def folder_to_resume(args):
    """The folder of the run that the command goes on with; None for a new run."""
    if args["resume"] not in (None, "auto"):
        return args["resume"]
    if args["resume"] is None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # torchrun started the processes again
        return None
    n = numbered(args["mode"]) - 1
    folder = Path(args["out"]) if args["out"] else run_folder(args["mode"], n)
    return str(folder) if (args["out"] or n) and (folder / "config.json").is_file() else None


def resumed(given, folder):
    """The settings of the run in `folder`. Raises InputError for a flag that contradicts them."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
        before = config["out"]
        config |= {key: config[key] and tuple(config[key]) for key in ("size", "crop")}
        # A setting that the run does not know is younger than the run, and was as published.
        config = vars(parser().parse_args([])) | PAPER | config
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; --resume takes the folder of a run that train.py began") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file}: not the settings of a run; put the file back, or start a new run") from None
    for key, value in given.items():
        was = config.get(key)
        if key in ("data", "source", "target") and was:  # folders may have moved; the lists are compared when they are read
            same = names(value) == names(was)
        elif key == "out":
            same = Path(value) == Path(folder)
        else:
            same = key in FREE or value == was
        if not same:
            value, was = (" ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in (value, was))
            raise InputError(f"--{key.replace('_', '-')} {value}: contradicts the run in {folder}, where it is {was or 'not set'}; leave the flag out (a "
                             f"resumed run keeps its settings), or start a new run")
        config[key] = value
    if config["source_checkpoint"] == f"{before}/source":
        config["source_checkpoint"] = f"{folder}/source"
    return config | {"resume": folder, "out": folder}


def names(specs):
    """["pascal=DIR"] or "pascal=DIR" -> ["pascal"]."""
    return [spec.partition("=")[0] for spec in ([specs] if isinstance(specs, str) else specs)]


def check_unchanged(config, state, path):
    """Refuse to go on where config.json is not what the checkpoint was trained with."""
    for key, was in state["config"].items():
        if key not in (*FREE, "data", "source", "target", "source_checkpoint") and plain(config.get(key)) != plain(was):
            raise InputError(f"{path}: was trained with --{key.replace('_', '-')} {was}, but config.json beside it says {config.get(key)}; put "
                             f"config.json back, or start a new run")


def plain(value):
    """As JSON keeps it."""
    return json.loads(json.dumps(value))


def run_folder(mode, n):
    """runs/universal, runs/universal-2, ..."""
    return Path("runs") / (mode if n == 1 else f"{mode}-{n}")


def numbered(mode):
    """The number of the first of these folders that is not there yet."""
    n = 1
    while run_folder(mode, n).exists():
        n += 1
    return n


def free_folder(config):
    """A new run's folder, as a Path; raises InputError where it holds a run already."""
    folder = Path(config["out"]) if config["out"] else run_folder(config["mode"], numbered(config["mode"]))
    held = [name for name in ("config.json", "log.jsonl", "last.pt", "model.pt", "best.pt") if (folder / name).exists()]
    if held:
        way_on = f", or go on with it: --resume {folder}" if "config.json" in held else ""
        raise InputError(f"--out {folder}: holds a run already ({', '.join(held)}); give another folder{way_on}")
    return folder


def open_folder(config):
    """Make the run's folder with its config.json; raises InputError where it cannot be written."""
    folder = Path(config["out"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "config.json") as file:
            file.write((json.dumps(config, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give a folder of yours") from None
    return folder
