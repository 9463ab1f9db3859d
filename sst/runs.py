"""The life of a run: settings, folder, log and lock, what is trained, how it goes on, what may change.

A run's folder holds config.json, log.jsonl, the checkpoints (sst/checkpoint.py) and at the end two pictures.
What a run promises is in docs/reliability.md.
"""

import json
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import checkpoint, config as settings, distributed
from .config import FIGURES, counted, names
from .data import Part, first_of, fraction_of, named_paths, open_dataset
from .distributed import broadcast, compiler_fault, print0, recall, remember
from .domains import builtin_domain
from .errors import InputError
from .scenarios import build

# What may change when a run goes on: none of it changes what is learned from data that can be read.
FREE = ("resume", "out", "workers", "skip_bad", "max_skips", "save_every", "log_to")
COUNTS = ("skipped_steps", "skipped_in_a_row", "skipped_files")
# Where data lies may change too. The training lists themselves are compared.
PLACES = ("data", "source", "target", "source_checkpoint", "masks")


# Settings and folder ----------------------------------------------------------------------------------------


def configure(argv=None):
    """Command line -> Config: of a new run, or of the run that it goes on with. Raises InputError."""
    given = settings.given(argv)
    folder = broadcast(folder_to_resume(given))
    if folder:
        return resumed(given, folder)
    given.pop("resume", None)  # auto, and there is no run: it begins
    settings.check_scenario(given)
    return settings.resolve(given, before(given))


def placed(config, world):
    """A Config with its folder, which may not be there yet, and the images of a step of `world` processes."""
    config = config | {"global_batch": config.global_batch or config.batch_size * world}
    if not config.resume:
        config.out = broadcast(str(free_folder(config)))
    remember("folder", config.out)
    return config


def before(given):
    """The Config of the run that --init-from or --source-checkpoint names, or None."""
    start = given.get("init_from") or given.get("source_checkpoint")
    return settings.restored(checkpoint.start_of(start)[0]["config"]) if start else None


def folder_to_resume(given):
    """The folder of the run that the command goes on with; None for a new run."""
    resume, out, mode = given.get("resume"), given.get("out"), given.get("mode", "universal")
    if resume not in (None, "auto"):
        return resume
    if recall("folder"):  # processes of this launch came before these; it is not to take another's folder
        out = recall("folder")
    elif resume is None:
        return None
    n = first_free(mode) - 1
    folder = Path(out) if out else run_folder(mode, n)
    return str(folder) if (out or n) and (folder / "config.json").is_file() else None


def resumed(given, folder):
    """The Config of the run in `folder`. Raises InputError for a flag that contradicts it."""
    config = saved(Path(folder) / "config.json")
    source = f"{config.out}/source"
    for key, value in given.items():
        was = getattr(config, key)
        if key in ("data", "source", "target") and was:
            same = names(value) == names(was)
        elif key == "out":
            same = Path(value) == Path(folder)
        else:  # the matrices of --masks are in the checkpoint; its file may have moved
            same = key in FREE or value == was or key == "masks" and was
        if not same:
            value, was = (" ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in (value, was))
            raise InputError(f"--{key.replace('_', '-')} {value}: contradicts the run in {folder}, where it "
                             f"is {was or 'not set'}; leave the flag out (a resumed run keeps its settings), "
                             "or start a new run")
        setattr(config, key, value)
    if config.source_checkpoint == source:
        config.source_checkpoint = f"{folder}/source"
    return config | {"resume": folder, "out": folder}


def saved(file):
    """The Config in a config.json; raises InputError."""
    try:
        fields = json.loads(file.read_text())
        if not isinstance(fields["out"], str):
            raise ValueError
        return settings.restored(fields)
    except InputError as error:  # which is a ValueError, too
        raise InputError(f"{file}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; --resume takes the folder of a run that train.py "
                         "began") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file}: not the settings of a run; put the file back, or start a new "
                         "run") from None


def stages(config):
    """The trainings of a run in order: its settings, or in dedicated parsing those of both steps of Eq. 13.

    Step 1 is universal parsing of the sources. With --beta 0 it keeps the preset's beta, since step 2 needs a
    source with MSA and MSE, and with --lam 0 beside it the preset's lambda: plain fine-tuning (--beta 0
    --lam 0) starts from the same source as SST. Step 2's settings, saved, give both steps again.
    """
    if config.mode == "universal":
        return [config]
    own_source = f"{config.out}/source"
    data = [config.target] if config.target else []
    target = config | {"data": data, "figures": ["pascal"]}
    if config.source_checkpoint not in (None, own_source):
        return [target]
    length = {"epochs": config.source_epochs, "steps": config.source_steps}
    if not any(length.values()):
        length = {"epochs": config.epochs, "steps": None if config.epochs else config.steps}
    preset = settings.preset(config.preset)
    weights = {} if config.beta else {"beta": preset.beta, "lam": config.lam or preset.lam}
    source = config | length | weights | {
        "mode": "universal", "data": config.source, "figures": ["cihp"], "out": own_source, "fraction": 1.0,
        "target": config.target or "pascal=figures", "source_checkpoint": None}
    return [source | losses_of(own_source, config), target | {"source_checkpoint": own_source}]


def losses_of(folder, config):
    """The losses' weights of a source that a resumed run has begun: earlier versions had the preset's."""
    file = Path(folder) / "config.json"
    if not config.resume or not file.is_file():
        return {}
    begun = saved(file)
    return {"alpha": begun.alpha, "beta": begun.beta, "lam": begun.lam}


def run_folder(mode, n):
    """runs/universal, runs/universal-2, ..."""
    return Path("runs") / (mode if n == 1 else f"{mode}-{n}")


def first_free(mode):
    """The number of the first of these folders that is not there yet."""
    n = 1
    while run_folder(mode, n).exists():
        n += 1
    return n


def free_folder(config):
    """A new run's folder, as a Path; raises InputError where it holds a run already."""
    if recall("folder"):
        return Path(recall("folder"))
    folder = Path(config.out) if config.out else run_folder(config.mode, first_free(config.mode))
    files = ("config.json", "log.jsonl", "last.pt", "model.pt", "best.pt")
    held = [name for name in files if (folder / name).exists() and (folder / name).stat().st_size]
    if held:
        way_on = f", or go on with it: --resume {folder}" if "config.json" in held else ""
        raise InputError(f"--out {folder}: holds a run already ({', '.join(held)}); give another "
                         f"folder{way_on}")
    return folder


@contextmanager
def writable(folder):
    """What is done with a run's folder; raises InputError where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); give a folder of "
                         "yours") from None


def write_config(config):
    """config.json of a run, by the first process. Raises InputError where it cannot be written."""
    if distributed.first():
        with writable(config.out), checkpoint.written_whole(Path(config.out) / "config.json") as file:
            file.write((json.dumps(vars(config), indent=1) + "\n").encode())


def open_data(config, Figures):
    """The training and the validation set of every label domain: of --data, or drawn by Figures."""
    size, limits, train_sets, val_sets = config.size or (128, 128), counted(config.limit), [], []
    for name, path in named_paths(config.data or [f"{name}=figures" for name in config.figures]).items():
        if path == "figures":
            # Every domain has its own pictures to train on. Those of validation, of another seed, are shared.
            domain, offset = builtin_domain(name), FIGURES.index(name) if name in FIGURES else 0
            train_sets.append(Figures(domain, config.seed, 2000, size, offset, len(FIGURES)))
            val_sets.append(Figures(domain, 2 ** 31, 80, size))
        else:
            train_sets.append(open_dataset(name, path, "train"))
            try:
                val_sets.append(open_dataset(name, path, "val"))
            except InputError:
                if config.validations:
                    raise
                val_sets.append(Part(train_sets[-1], []))  # nobody asks for it
        if name in limits:
            train_sets[-1] = first_of(train_sets[-1], limits[name], config.seed)
    if config.fraction < 1:
        train_sets = [fraction_of(dataset, config.fraction, config.seed) for dataset in train_sets]
    return train_sets, val_sets


# The model, and going on ------------------------------------------------------------------------------------


def prepare(config, domains, device, resumed=False):
    """The model of a run as it starts, on its device, and in words what it takes over from another run."""
    start = config.source_checkpoint or config.init_from
    needed = start and not (resumed and config.init_from)  # which finds all in the run's own checkpoint
    origin, path = checkpoint.start_of(start) if needed else (None, None)
    model, words = build(config, domains, origin, resumed, path), ""
    if origin and config.init_from:
        words = checkpoint.inherit(model, domains, origin, path)
    model.to(device, memory_format=torch.channels_last).train()
    if config.sync_bn:
        if device.type != "cuda":
            raise InputError("--sync-bn: PyTorch has it for GPUs only; leave it out")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.compile:
        if fault := compiler_fault(device):
            print0(f"--compile: torch.compile does not work on this machine ({fault}); the run goes on "
                   "without it")
        else:
            model.extract = torch.compile(model.net.features, dynamic=False)
    return model, words


def fingerprint(dataset):
    """[number of samples, checksum of their names]: what a resumed run's training list must have kept."""
    listed = "\n".join(Path(dataset.where(i)).name for i in range(len(dataset)))
    return [len(dataset), zlib.crc32(listed.encode())]


def check_unchanged(config, lists, state, path):
    """Refuse to go on where config.json or a training list is not what the checkpoint was trained with."""
    for key, was in state["config"].items():
        now = getattr(config, key, None)
        if key not in (*FREE, *PLACES) and as_json(now) != as_json(was):
            raise InputError(f"{path}: was trained with --{key.replace('_', '-')} {was}, but config.json "
                             f"beside it says {now}; put config.json back, or start a new run")
    for name, now in lists.items():
        was = state["lists"].get(name)
        if now != was:
            raise InputError(f"{path}: the training list of '{name}' had {was[0]} photos when the run began, "
                             f"and has {now[0]} now, or others in their place; put the list back, or "
                             "start a new run")


def as_json(value):
    return json.loads(json.dumps(value))


@dataclass
class Progress:
    """How far a training is. It is saved with it.

    best: mean mIoU of best.pt in percent. pending: a validation is due after this step and has not ended.
    """

    step: int = 0
    best: float = -1.0
    counts: dict = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    pending: bool = False


def save(out, model, domains, optimizer, scaler, at, lists, config, again=False):
    """Everything needed to go on, to last.pt, by the first process. again: the second time after a step."""
    if distributed.first():
        content = checkpoint.model_content(model.net, domains, config.size) | vars(at) | {
            "weights": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "lists": lists, "config": vars(config)}
        checkpoint.save_last(content, out, again)


def restore(state, path, config, lists, model, optimizer, scaler):
    """Put a training where the checkpoint `state` left it. Returns its Progress.

    Raises InputError for settings, lists or an optimiser that are not those of the checkpoint.
    """
    check_unchanged(config, lists, state, path)
    checkpoint.load_weights(model, state["weights"], path)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError:  # of a version that grouped the weights differently
        raise InputError(f"{path}: its optimiser's state does not fit this version of train.py; go on with "
                         "the version that began the run, or start a new one with --init-from "
                         f"{config.out}") from None
    if state["scaler"]:  # empty where the run has none
        scaler.load_state_dict(state["scaler"])
    return Progress(state["step"], state["best"], state["counts"], state.get("pending", False))


def open_log(out, at):
    """log.jsonl, open for appending. What a run that goes on at that Progress does again is not kept twice.

    Locked while this process lives: raises InputError where another one trains in the folder. The folder is
    made where it is missing.
    """
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "a+")
    try:
        import fcntl  # not on Windows
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        raise InputError(f"{out}: another process trains in this folder; wait for its end (or end it), then "
                         f"--resume {out}") from None
    log.seek(0)
    kept = 0
    for line in log.readlines():
        try:
            fields = json.loads(line)
            again = at.pending and fields["step"] == at.step and fields["kind"] == "val"
            if fields["step"] > at.step or again or not line.endswith("\n"):
                break
        except ValueError:  # it was being written when the run was killed, or the machine lost power
            break
        kept += len(line.encode())
    log.truncate(kept)
    return log
