"""The two scenarios of SST (Sec. 3.3) as what is trained: a batch in, loss terms out.

Universal parsing (Eq. 12) trains one network with a head per label domain. Dedicated parsing (Eq. 13) trains
a network for one target domain, beside a frozen one that was trained on the source domains. `build` makes
either from the settings of a run.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .association import Association
from .checkpoint import domains_of, from_spec, load_imagenet, load_weights
from .config import names
from .domains import IGNORE, read_masks
from .errors import InputError
from .files import MEAN_COLOUR
from .losses import L_seg
from .model import STRIDE, ParsingNet
from .modules import SST, intra_matrix, named, paired, parted, static_matrix


class Universal(nn.Module):
    """The kept network and, beside it, SST and an Association (or None). balance: of L_seg."""

    def __init__(self, net, sst, balance=0.0, association=None):
        super().__init__()
        self.net, self.sst, self.balance, self.association = net, sst, balance, association
        self.extract = net.features  # --compile puts its compiled form here: crops have one size, photos many

    def forward(self, images, labels, domain, given=None, source=None):
        """images (B, 3, H, W) uint8, labels (B, H, W) uint8 -> {term: scalar}, {domain: [X_0 .. X_L]}.

        domain: of each image its domain's name, or its position among the network's heads. given, source:
        what a frozen source says of the images, its representations and its logits.
        """
        domain = named(domain, list(self.net.heads))
        images, labels = padded(images, labels.long())
        H = self.features(images)
        A, terms, X = {}, {}, {}
        if self.association is not None:
            taught = {name: self.net.heads[name](H[-1]) for name in self.association.taught}
            terms["cross"] = self.association(taught, labels, domain, source)
        F_, Y = (parted(x, domain, list(self.net.heads)) for x in (H[-1], labels))
        for name, head in self.net.heads.items():
            A[name] = head(F_[name])
            terms[f"seg/{name}"] = L_seg(A[name], Y[name], self.balance)  # Eq. 1
        if self.sst is not None:
            losses, X = self.sst(H, labels, domain, A, given)
            terms |= losses
            for name in [name for name in self.net.heads if name not in domain]:
                terms |= absent(name, self.sst, terms)
        order = [f"{kind}/{name}" for kind in ("seg", "aux") for name in self.net.heads]
        order += ["dataset", "img", "cross"]
        return {key: terms[key] for key in order if key in terms}, X

    def features(self, images):
        scaled = images.to(self.net.mean.dtype, memory_format=torch.channels_last) / 255
        return self.extract(scaled)

    @torch.no_grad()
    def represent(self, images, labels):
        """{domain: (S, X)} and {domain: logits} of images that are labelled in none of its domains.

        delta is its heads' argmax. labels (B, H, W) int64 of any domain: only what they ignore counts.
        """
        images, labels = padded(images, labels)
        H = self.features(images)
        A = {name: head(H[-1]) for name, head in self.net.heads.items()}
        return {name: self.sst.represent(name, H, labels, A[name]) for name in A if self.sst is not None}, A


class Dedicated(Universal):
    """A network for one target domain, its SST, and beside them the frozen source (Eq. 13, step 2).

    source: a Universal that never changes.
    """

    def __init__(self, net, sst, source, balance=0.0, association=None):
        super().__init__(net, sst, balance, association)
        self.source = source.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.source.eval()  # the statistics of its batch norm stay too
        return self

    def forward(self, images, labels, domain):
        return super().forward(images, labels, domain, *self.source.represent(images, labels.long()))


def padded(images, labels):
    """A batch at sides that STRIDE divides, so that all maps lie on the labels. What is added is ignored."""
    h, w = labels.shape[-2:]
    if h % STRIDE == 0 and w % STRIDE == 0:
        return images, labels
    frame = (0, -w % STRIDE, 0, -h % STRIDE)
    channels = [F.pad(channel, frame, value=colour) for channel, colour in zip(images.unbind(1), MEAN_COLOUR)]
    return torch.stack(channels, dim=1), F.pad(labels, frame, value=IGNORE)


def absent(name, sst, terms):
    """The terms of a domain that a micro-batch has no image of (--slots proportional): 0.

    With a gradient of zeros for all that only its images reach: DDP waits for one of every parameter.
    """
    parts = [*(modules[name] for modules in (sst.msa, sst.mse) if name in modules)]
    parts += [mst for pair, mst in sst.mst.items() if name in pair.split(":")]
    zero = sum(0 * p.sum() for part in parts for p in part.parameters())
    key = f"aux/{name}" if sst.aux else "img"
    return {key: terms.get(key, 0) + zero} if sst.aux or sst.image_level else {}


# From settings ----------------------------------------------------------------------------------------------


def build(config, domains, origin=None, resumed=False, path=None):
    """What a run trains. A seed gives the network the same weights whether SST is there or not.

    origin: what --source-checkpoint or --init-from names (`checkpoint.start_of`), or None. path: its file.
    resumed: the weights will come from a checkpoint of the run itself.
    Raises InputError where a checkpoint does not suit.
    """
    torch.manual_seed(config.seed)
    net = from_spec(origin["arch"], domains) if origin else ParsingNet(domains, config.arch)
    if config.backbone_weights != "none":
        if not (origin or resumed):
            load_imagenet(net.backbone, config.backbone_weights)
        net.backbone.freeze(config.freeze_stages)
    torch.manual_seed(config.seed + 1)
    if config.mode == "dedicated":
        return build_dedicated(config, domains, origin, net, path)
    sst = build_sst(config, domains, net.arch.dim)
    joined = config.cross and len(domains) > 1
    association = Association(domains, taught=config.cross_to) if joined else None
    return Universal(net, sst, config.balance, association)


def build_sst(config, domains, dim, sources=()):
    """The SST that a run's flags ask for, or None."""
    aux, scr = config.beta > 0, consistency(config, domains, sources)
    if not aux and scr == "none":
        return None
    intra, static = matrices(config, domains, sources)
    return SST(domains, dim, config.intra_mask, scr, config.connect, aux, config.regions,
               static=static, sources=sources, intra=intra)


def consistency(config, domains, sources):
    """--scr, or "none" where there is no weight on it, or no pair of domains."""
    return config.scr if config.lam > 0 and (sources or len(domains) > 1) else "none"


def matrices(config, domains, sources=()):
    """{name: M_intra}, {(name_1, name_2): M_static}: what the losses of a run need.

    Raises InputError where a domain lacks what they are made of, and for a --masks that does not fit. Called
    before anything is trained, and again where SST is built.
    """
    aux, scr = config.beta > 0, consistency(config, domains, sources)
    every = [*domains, *sources]
    intra, static = read_masks(config.masks, every, names(config.target or [])) if config.masks else ({}, {})
    if intra and config.intra_mask == "none":
        raise InputError(f"{config.masks}: holds M_intra, which --intra-mask none leaves out; leave one of "
                         "them out")
    if config.intra_mask == "body" and (aux or scr in ("both", "image")):
        intra = {d.name: intra_matrix(d, intra) for d in domains}
    if scr in ("both", "dataset"):
        pairs = paired(domains, sources, config.connect)
        static = {(one.name, two.name): static_matrix(one, two, static) for one, two in pairs}
    return intra, static


def build_dedicated(config, domains, origin, net, path=None):
    path = path or f"{config.source_checkpoint}/last.pt"
    sources = domains_of(origin, path)
    for d in domains:
        if d.name in (s.name for s in sources):
            raise InputError(f"--target {d.name}: is a source domain too ({path} was trained on "
                             f"{', '.join(s.name for s in sources)}); a transfer needs two different label "
                             f"domains, and to go on with one that it knows there is --init-from "
                             f"{config.source_checkpoint}")
    # The network starts as a copy of the source's, with a new head.
    weights = {key: value for key, value in origin["weights"].items() if key.startswith("net.")}
    net.load_state_dict({key: weights.get(f"net.{key}", value) for key, value in net.state_dict().items()})
    sst = build_sst(config, domains, net.arch.dim, sources)
    transfers = sst is not None and len(sst.pairs) > 0
    if not transfers and not config.cross:  # plain fine-tuning, with or without L_aux
        return Universal(net, sst, config.balance)
    frozen = None
    if transfers:
        modules = ("sst.msa.", "sst.mse.")
        weights |= {key: value for key, value in origin["weights"].items() if key.startswith(modules)}
        if any(f"sst.msa.{s.name}.W_s.weight" not in weights for s in sources):
            raise InputError(f"{path}: has no MSA and MSE, being weights alone or a run with --beta 0, but "
                             f"--lam {config.lam:g} needs them; give the run's folder, a run that has them, "
                             "or --lam 0")
        intra = {s.name: weights[f"sst.mse.{s.name}.M_intra"] for s in sources}
        frozen = SST(sources, net.arch.dim, scr="none", intra=intra)
    source = Universal(from_spec(origin["arch"], sources, path), frozen)
    load_weights(source, weights, path)
    association = Association(domains, sources) if config.cross else None
    return Dedicated(net, sst, source, config.balance, association)
