"""The two scenarios of SST (Sec. 3.3) as what is trained: a batch in, loss terms out.

Universal parsing (Eq. 12) trains one network with a head per label domain. Dedicated parsing (Eq. 13) trains a network for one
target domain beside a frozen one that was trained on the source domains. `build` makes either from the settings of a run,
`inherit` fills a universal parser with what a trained one knows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import load_weights
from .domains import IGNORE, from_dict
from .errors import InputError
from .files import MEAN_COLOUR
from .losses import L_seg
from .model import STRIDE, ParsingNet, from_spec
from .modules import SST, full_precision, predicted_regions, rows_of


class Universal(nn.Module):
    """The kept network and, beside it, SST (or None). balance: of L_seg."""

    def __init__(self, net, sst, balance=0.0):
        super().__init__()
        self.net, self.sst, self.balance = net, sst, balance

    def forward(self, images, labels, domain, given=None):
        """images (B, 3, H, W) uint8, labels (B, H, W) uint8, domain [B] -> {term: scalar}, {domain: [X_0 .. X_L]}."""
        domain = [list(self.net.heads).index(d) if isinstance(d, str) else d for d in domain]
        images, labels = padded(images, labels.long())
        H = self.features(images)
        logits, terms, X = {}, {}, {}
        for i, (name, head) in enumerate(self.net.heads.items()):
            rows = rows_of(domain, i)
            logits[name] = head(H[-1][rows])
            terms[f"seg/{name}"] = L_seg(logits[name], labels[rows], self.balance)
        if self.sst is not None:
            losses, X = self.sst(H, labels, domain, logits, given)
            terms |= losses
        return terms, X

    def features(self, images):
        return self.net.features(images.to(self.net.mean.dtype, memory_format=torch.channels_last) / 255)

    @torch.no_grad()
    def represent(self, images, labels):
        """{domain: (S, X)} of images that are labelled in none of its domains; the regions are its own heads' argmax.

        labels (B, H, W) int64 of any domain: only what they ignore counts.
        """
        images, labels = padded(images, labels)
        H = self.features(images)
        logits = {name: head(H[-1]) for name, head in self.net.heads.items()}
        with torch.autocast(images.device.type, enabled=False):
            H = full_precision(H)
            return {name: self.sst.represent(name, H, predicted_regions(A, labels, H)) for name, A in logits.items()}


def padded(images, labels):
    """A batch with sides that STRIDE divides, so that every map lies exactly on the labels. What is added is ignored."""
    h, w = labels.shape[-2:]
    if h % STRIDE == 0 and w % STRIDE == 0:
        return images, labels
    frame = (0, -w % STRIDE, 0, -h % STRIDE)
    channels = [F.pad(channel, frame, value=colour) for channel, colour in zip(images.unbind(1), MEAN_COLOUR)]
    return torch.stack(channels, dim=1), F.pad(labels, frame, value=IGNORE)


class Dedicated(Universal):
    """A network for one target domain, its SST, and beside them the frozen source: a Universal that never changes (Eq. 13, step 2)."""

    def __init__(self, net, sst, source, balance=0.0):
        super().__init__(net, sst, balance)
        self.source = source.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.source.eval()  # the statistics of its batch norm stay too
        return self

    def forward(self, images, labels, domain):
        return super().forward(images, labels, domain, given=self.source.represent(images, labels.long()))


def build(config, domains, origin=None, resumed=False):
    """What a run trains. A seed gives the network the same weights whether SST is there or not.

    origin: content of the last.pt (`checkpoint.load`) named by config["source_checkpoint"] or config["init_from"], or None.
    resumed: the weights will come from a checkpoint of the run itself.
    Raises InputError where a checkpoint does not suit.
    """
    torch.manual_seed(config["seed"])
    net = from_spec(origin["arch"], domains) if origin else ParsingNet(domains, config["arch"])
    if config["backbone_weights"] != "none":
        if origin or resumed:
            net.backbone.freeze()
        else:
            net.backbone.load_imagenet(config["backbone_weights"])
    torch.manual_seed(config["seed"] + 1)
    if config["mode"] == "dedicated":
        return dedicated(config, domains, origin, net)
    return Universal(net, build_sst(config, domains, net.arch.dim), config["balance"])


def build_sst(config, domains, dim, sources=()):
    """The SST that a run's flags ask for, or None; raises InputError where a domain lacks what its masks are made of."""
    aux = config["beta"] > 0
    scr = config["scr"] if config["lam"] > 0 and (sources or len(domains) > 1) else "none"
    if not aux and scr == "none":
        return None
    return SST(domains, dim, config["intra_mask"], scr, config["connect"], aux, config["regions"], sources=sources)


def dedicated(config, domains, origin, net):
    path = f"{config['source_checkpoint']}/last.pt"
    sources = domains_of(origin, path)
    for d in domains:
        if d.name in (s.name for s in sources):
            raise InputError(f"--target {d.name}: is a source domain too ({path} was trained on {', '.join(s.name for s in sources)}); a "
                             f"transfer needs two different label domains")
    # The network starts as a copy of the source's, with a new head.
    weights = {key: value for key, value in origin["weights"].items() if key.startswith("net.")}
    net.load_state_dict({key: weights.get(f"net.{key}", value) for key, value in net.state_dict().items()})
    sst = build_sst(config, domains, net.arch.dim, sources)
    if sst is None or not sst.pairs:  # nothing to be consistent with: plain fine-tuning, with or without L_aux
        return Universal(net, sst, config["balance"])
    weights |= {key: value for key, value in origin["weights"].items() if key.startswith(("sst.msa.", "sst.mse."))}
    if any(f"sst.msa.{s.name}.W_s.weight" not in weights for s in sources):
        raise InputError(f"{path}: was trained without MSA and MSE (--beta 0), which --lam {config['lam']:g} needs; give the folder of a run "
                         f"that has them, or --lam 0")
    source = Universal(from_spec(origin["arch"], sources, path), SST(sources, net.arch.dim, origin["config"]["intra_mask"], scr="none"))
    load_weights(source, weights, path)
    return Dedicated(net, sst, source, config["balance"])


def domains_of(content, path):
    """The label domains of a checkpoint."""
    return [from_dict(fields, str(path)) for fields in content["domains"]]


def inherit(model, domains, origin, path):
    """Give a universal parser the weights of a trained one, for all that both have. Returns what is loaded and what is new, in words.

    Masks are not weights: M_intra and M_static stay as this run's flags make them. Raises InputError where a domain of the same
    name has other classes.
    """
    classes = {d.name: d.classes for d in domains_of(origin, path)}
    for d in domains:
        if classes.get(d.name, d.classes) != d.classes:
            raise InputError(f"{path}: its domain '{d.name}' has the classes {', '.join(classes[d.name])}, but --data's has "
                             f"{', '.join(d.classes)}; give the new one another name")
    weights = dict(origin["weights"])
    for key, value in origin["weights"].items():
        if key.startswith("sst.mst."):  # a pair may be in the other order here
            pair, layer, *rest = key.removeprefix("sst.mst.").split(".")
            other_way = ":".join(reversed(pair.split(":")))
            weights[".".join(["sst.mst." + other_way, layer[:-1] + {"1": "2", "2": "1"}.get(layer[-1], layer[-1]), *rest])] = value
    own = model.state_dict()
    loaded = [key for key in own if key in weights and not key.endswith(("M_intra", "M_static"))]
    model.load_state_dict({key: weights[key] if key in loaded else value for key, value in own.items()})
    parts = {part_of(key): "loaded" if key in loaded else "new" for key in own if not key.endswith(("M_intra", "M_static"))}
    left = sorted({f"domain {name}" for name in classes} - {f"domain {d.name}" for d in domains})
    words = [f"{what} ({path}): " + ", ".join(part for part, state in parts.items() if state == what) for what in ("loaded", "new")
             if what in parts.values()]
    return "\n".join(words + [f"left behind: {', '.join(left)}"] * bool(left))


def part_of(key):
    """ "sst.msa.atr.W_s.weight" -> "MSA of atr"."""
    top, module, *rest = key.split(".")
    if top == "net":
        return f"head of {rest[0]}" if module == "heads" else "network"
    return f"{module.upper()} of {rest[0]}"
