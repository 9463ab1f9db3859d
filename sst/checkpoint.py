"""Files of a run: the kept network (model.pt, best.pt) and everything needed to resume (last.pt).

All are loaded with weights_only=True: a stranger's file runs no code.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch

from .domains import from_dict
from .errors import InputError
from .model import from_spec

FORMAT = 1


def save(content, path):
    """torch.save through a temporary name: a crash while writing leaves the file that was there before."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path, kind):
    """The content of a checkpoint; kind: "model" (model.pt, best.pt) or "run" (last.pt). Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a {'model.pt or best.pt' if kind == 'model' else 'last.pt'} that train.py wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
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
