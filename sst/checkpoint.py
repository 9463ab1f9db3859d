"""Files of a run: the kept network (model.pt, best.pt) and everything needed to resume (last.pt, and previous.pt before it).

All are loaded with weights_only=True: a stranger's file runs no code. All are read against the checksums that they hold: a
file that was damaged is refused, never loaded.
"""

import json
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from .domains import from_dict
from .errors import InputError
from .model import from_spec

FORMAT = 1


@contextmanager
def written_whole(path):
    """A file, open for writing, that appears under its name once it is whole: what was there before survives a crash or a full disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(content, path):
    """torch.save to a file that is whole or not there. Raises InputError where it cannot be written."""
    try:
        with written_whole(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides what the disk said
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk is full, or the folder cannot be written"
        raise InputError(f"{path}: could not be written ({reason}); what was there before is whole: free some space, then go on with "
                         f"--resume {Path(path).parent}") from None


def save_last(content, folder):
    """Everything needed to resume, to last.pt; the checkpoint before it becomes previous.pt."""
    last, fresh = Path(folder) / "last.pt", Path(folder) / "fresh.pt"
    save(content, fresh)
    if last.exists():
        os.replace(last, last.with_name("previous.pt"))
    os.replace(fresh, last)


def load_last(folder):
    """(content, path) of a run's last checkpoint; (None, None) where it was interrupted before the first.

    Raises InputError for a damaged one, with the way to the one before it.
    """
    last, previous = Path(folder) / "last.pt", Path(folder) / "previous.pt"
    if not last.exists() and previous.exists():  # interrupted between the two renamings of save_last
        last = previous
    if not last.exists():
        return None, None
    try:
        return load(last, "run"), last
    except InputError as error:
        if last == previous or not previous.exists():
            raise
        step = load(previous, "run")["step"]
        raise InputError(f"{error}; the checkpoint before it, of step {step}, is whole: mv {previous} {last}") from None


def load(path, kind):
    """The content of a checkpoint; kind: "model" (model.pt, best.pt) or "run" (last.pt). Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a {'model.pt or best.pt' if kind == 'model' else 'last.pt'} that train.py wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # a checksum is wrong; torch.load does not look at them
                raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file leads the readers of zip and pickle to whatever they raise
        raise InputError(f"{path}: not a readable checkpoint (truncated, or another kind of file); copy it again or use another "
                         f"checkpoint of the run") from None
    wanted = {"format", "arch", "domains", "weights"} | ({"step", "optimizer", "best", "config"} if kind == "run" else set())
    missing = wanted - set(content) if isinstance(content, dict) else wanted
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}; expected a {'model.pt' if kind == 'model' else 'last.pt'} that "
                         f"train.py wrote")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: format {content['format']!r}; this version reads format {FORMAT}")
    return content


def model_content(net, domains):
    """What model.pt holds: the kept network alone."""
    return {"format": FORMAT, "arch": net.spec(), "domains": [d.to_dict() for d in domains], "weights": net.state_dict()}


def load_model(path):
    """(ParsingNet in eval mode, its label domains) from a model.pt or best.pt. Raises InputError."""
    content = load(path, "model")
    if "optimizer" in content:
        raise InputError(f"{path}: a run to resume, with SST and optimizer; give the model.pt or best.pt beside it")
    domains = [from_dict(fields, str(path)) for fields in content["domains"]]
    net = from_spec(content["arch"], domains, str(path))
    load_weights(net, content["weights"], path)
    return net.eval(), domains


def trained_size(path):
    """(H, W) that the photos of a run were fitted into, from the config.json beside its checkpoint; None for their own size.

    None too where there is no config.json; raises InputError for one that holds no settings of a run.
    """
    file = Path(path).with_name("config.json")
    if not file.is_file():
        return None
    try:
        size = json.loads(file.read_text())["size"]
        return None if size is None else (int(size[0]), int(size[1]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise InputError(f"{file}: not the settings of a run, which say the size that photos are fitted into; give --size HxW, or put the "
                         f"checkpoint where no other config.json lies") from None


def load_weights(module, weights, path):
    """load_state_dict, every name and shape the same; raises InputError that names the first that is not."""
    own = module.state_dict()
    for key in [*own, *weights]:
        found, wanted = (tuple(w[key].shape) if key in w else None for w in (weights, own))
        if found != wanted:
            raise InputError(f"{path}: weights of another network or set of label domains: {key} is {found or 'absent'} there and "
                             f"{wanted or 'absent'} here; use the checkpoint of a run with the same architecture and domains")
    module.load_state_dict(weights)
