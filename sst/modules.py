"""The paper's three modules (Sec. 3.2), which carry meaning between label domains while a network is trained.

MSA pools a feature map into one vector per class (Eq. 2-4), MSE refines a domain's learned class
representations with those vectors (Eq. 5-7), MST maps one domain's representations into another's space (Eq.
8-9), and `SST` puts them together and returns the losses. They know nothing of the network: three feature
maps of one width, labels and the domain of each image are all they take. After training they are thrown away.

Shapes: B images, D channels, Z classes (background included), l = 1, 2, 3 the scales 1/16, 1/8, 1/4.
Equations come first. What they are computed with stands below them.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from .domains import IGNORE, word_similarity
from .losses import L_aux, L_dataset, L_img

L = 3  # decoder scales


class MSA(nn.Module):
    """Multi-scale semantics aggregation of one domain (Sec. 3.2.1): maps and regions -> S_1, S_2, S_3."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.num_classes = num_classes
        self.W_s = linear(2 * dim, dim)

    def forward(self, H, regions):
        """H: maps (B, D, h_l, w_l). regions: as many maps (B, h_l, w_l) int64, class ids, 255 in no region.

        Returns (L, B, Z, D).
        """
        pixels, segment, K = segments(H, regions, self.num_classes)
        S_ave = segment_mean(pixels, segment, K)  # Eq. 2
        S_max = segment_max(pixels, segment, K)  # Eq. 3
        S = self.W_s(torch.cat([S_ave, S_max], dim=-1))  # Eq. 4
        return S.view(len(H), len(H[0]), self.num_classes + 1, S.shape[-1])[:, :, :-1]


class MSE(nn.Module):
    """Multi-scale semantic enhancement of one domain (Sec. 3.2.2): S_1..S_L -> X_0..X_L.

    intra_mask: M_intra (Z, Z); all ones is "None" of Table 6 (Eq. 5).
    """

    def __init__(self, intra_mask, dim, layers=L):
        super().__init__()
        # X_0's rows start orthogonal (where Z <= D): nothing in Eq. 10 stops all rows from sharing one
        # direction, which makes every cosine 1, and rows that start small get there within a few steps. Their
        # length sets the size of A_aux at the start, and of L_aux's gradient: in a small network, rows of
        # length 8 made it as large as ten times L_seg's, and rows of length 1 ended nearly parallel
        # (docs/experiments.md).
        self.X_0 = nn.Parameter(nn.init.orthogonal_(torch.empty(len(intra_mask), dim), gain=3))
        for name in ("f_Q", "f_K", "f_V"):
            self.add_module(name, nn.ModuleList(linear(dim, dim) for _ in range(layers)))
        self.register_buffer("M_intra", intra_mask.float())

    def forward(self, S):
        """S: (L, B, Z, D), or None where nothing was pooled. Returns [X_0 (Z, D), X_1 .. X_L (B, Z, D)]."""
        X = [self.X_0]
        if S is not None:
            K, V = per_scale(self.f_K, S), per_scale(self.f_V, S)
            for l, f_Q in enumerate(self.f_Q):
                Q_l, K_l, V_l = f_Q(X[l]), K[l], V[l]
                X.append(masked_attention(Q_l, K_l, V_l, self.M_intra) + X[l])  # Eq. 6; Eq. 5 if M_intra is 1
        return X

    @staticmethod
    def auxiliary(F_, X_L):
        """Eq. 7: A_aux = F (x) X_L^T. F_ (B, D, h, w), X_L (B, Z, D) -> (B, Z, h, w)."""
        pixels = F_.flatten(2).transpose(1, 2)  # (B, h*w, D)
        A_aux = pixels @ X_L.transpose(1, 2)  # (B, h*w, Z): classes side by side for the cross-entropy
        return A_aux.transpose(1, 2).unflatten(2, F_.shape[-2:])


class MST(nn.Module):
    """Multi-scale semantic transfer between domain 1 and domain 2, both directions (Sec. 3.2.3).

    static: M_static (Z_2, Z_1), or None without the dataset level. scales: which mapping layers are built; 0
    is the dataset level, 1..L the image level.
    """

    def __init__(self, static, dim, scales=range(L + 1)):
        super().__init__()
        # Q^, K^, V^ of a domain and layer stand one below the other in one matrix: one product, not three.
        for name in ("QKV_1", "QKV_2"):
            self.add_module(name, nn.ModuleDict({str(l): linear(dim, 3 * dim) for l in scales}))
        for name in ("W_1", "W_2"):
            self.add_module(name, nn.ModuleDict({str(l): linear(dim, dim) for l in scales if l > 0}))
        self.register_buffer("M_static", None if static is None else static.float())

    def dataset_level(self, X_1, X_2):
        """Eq. 8: X_0 of both domains, (Z_1, D) and (Z_2, D) -> X_0^(1->2) (Z_2, D), X_0^(2->1) (Z_1, D)."""
        X_1to2, X_2to1 = self.transfer([0], X_1[None], X_2[None], self.M_static)
        return X_1to2[0], X_2to1[0]

    def image_level(self, X_1, X_2, S_1, S_2):
        """Eq. 9 for l = 1..L at once: X_l and S_l of both domains, (L, ..., Z_1, D) and (L, ..., Z_2, D).

        The dimensions between broadcast: (L, B_1, 1) against (L, 1, B_2) gives all pairs of images.
        Returns X_l^(1->2) (L, ..., Z_2, D), X_l^(2->1) (L, ..., Z_1, D).
        """
        W_1, W_2 = per_scale(self.W_1.values(), S_1), per_scale(self.W_2.values(), S_2)  # S_l W_l
        M_dynamic = W_2 @ W_1.transpose(-1, -2)  # (L, ..., Z_2, Z_1)
        return self.transfer(range(1, len(X_1) + 1), X_1, X_2, M_dynamic)

    def transfer(self, scales, X_1, X_2, M):
        """X_l^(1->2) and X_l^(2->1): Eq. 8 for l = 0 and M = M_static, Eq. 9 for the others and M_dynamic."""
        Q_1, K_1, V_1 = per_scale([self.QKV_1[str(l)] for l in scales], X_1).chunk(3, dim=-1)
        Q_2, K_2, V_2 = per_scale([self.QKV_2[str(l)] for l in scales], X_2).chunk(3, dim=-1)
        X_1to2 = masked_attention(Q_2, K_1, V_1, M)
        X_2to1 = masked_attention(Q_1, K_2, V_2, M.transpose(-1, -2))
        return X_1to2, X_2to1


def masked_attention(Q, K, V, M):
    """(softmax(Q K^T / sqrt(D)) (.) M) V: the mask comes after the softmax, rows are not normalised again."""
    attention = (Q @ K.transpose(-1, -2) / Q.shape[-1] ** 0.5).softmax(dim=-1)
    return (attention * M) @ V


class SST(nn.Module):
    """Scalable Semantic Transfer over N >= 1 label domains.

    domains:    LabelDomains. dim: D, the width of the feature maps.
    intra_mask: "body" (each domain's M_intra) or "none" (Eq. 5).
    scr:        consistency terms, "both", "dataset" (Eq. 10), "image" (Eq. 11) or "none".
    connect:    "full" or "progressive".   aux: whether L_aux is wanted.
    regions:    "label" or "prediction": what delta is made of.
    static:     {(name_1, name_2): M_static (Z_2, Z_1)} in place of word similarity, pairs in either order.
    intra:      {name: M_intra (Z, Z)} for domains, instead of what touches on the body.
    sources:    LabelDomains of a frozen network (dedicated parsing, Eq. 13). MST then bridges each of them to
                each of `domains`, instead of these among themselves. Their representations come to `forward`
                as `given`.
    """

    def __init__(self, domains, dim, intra_mask="body", scr="both", connect="full", aux=True, regions="label",
                 static=None, sources=(), intra=None):
        super().__init__()
        one_of("intra_mask", intra_mask, "body", "none")
        one_of("scr", scr, "both", "dataset", "image", "none")
        one_of("connect", connect, "full", "progressive")
        one_of("regions", regions, "label", "prediction")
        self.names, self.sources = [d.name for d in domains], [d.name for d in sources]
        self.aux, self.regions = aux, regions
        pairs = paired(domains, sources, connect) if scr != "none" else []
        self.pairs = [(one.name, two.name) for one, two in pairs]
        self.dataset_level = scr in ("both", "dataset") and len(pairs) > 0
        self.image_level = scr in ("both", "image") and len(pairs) > 0
        # Only what the chosen losses reach is built: a parameter without a gradient would stall DDP.
        layers = L if aux or self.image_level else 0
        scales = ([0] if self.dataset_level else []) + ([1, 2, 3] if self.image_level else [])
        self.msa, self.mse, self.mst = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for d in domains:
            if layers:
                self.msa[d.name] = MSA(d.num_classes, dim)
        for d in domains:
            body = layers and intra_mask == "body"
            M_intra = intra_matrix(d, intra or {}) if body else torch.ones(d.num_classes, d.num_classes)
            self.mse[d.name] = MSE(M_intra, dim, layers)
        for one, two in pairs:
            M_static = static_matrix(one, two, static or {}) if self.dataset_level else None
            self.mst[f"{one.name}:{two.name}"] = MST(M_static, dim, scales)

    def forward(self, H, labels, domain, logits=None, given=None):
        """The auxiliary losses of a batch.

        H:      three maps (B, D, h_l, w_l), coarse to fine.
        labels: (B, H, W) int64, 255 ignored.
        domain: the domain's name of each image, or its position in `domains`.
        logits: {domain name: A (B_d, Z, h, w)}, read with regions="prediction" only.
        given:  {source: its `represent`ation of the same B images}.
        Returns {"aux/NAME": L_aux, ..., "dataset": L_dataset, "img": L_img}, those that were asked for, and
        {NAME: [X_0 (Z, D), X_1.. X_L (B_d, Z, D)]}. Everything is computed in float32 (float64 stays).
        Raises ValueError for maps, labels and domains that do not belong together.
        """
        domain = named(domain, self.names)
        self.check(H, labels, domain, logits)
        losses, S, X = {}, {}, {}
        for source, (S_source, X_source) in (given or {}).items():
            S[source], X[source] = S_source, X_source
        with torch.autocast(H[0].device.type, enabled=False):
            maps = [parted(full_precision(H_l), domain, self.names) for H_l in H]
            Y = parted(labels, domain, self.names)
            for name in self.names:
                if name not in domain:  # nothing to say about it but X_0
                    X[name] = self.mse[name](None)
                    continue
                H_d = [H_l[name] for H_l in maps]
                A = logits[name] if self.regions == "prediction" and self.msa else None
                S[name], X[name] = self.represent(name, H_d, Y[name], A)
                if self.aux:
                    A_aux = MSE.auxiliary(H_d[-1], X[name][-1])  # Eq. 7, with F = H_3
                    losses[f"aux/{name}"] = L_aux(A_aux, Y[name])
            pairs = [self.consistency(one, two, S, X) for one, two in self.pairs]
        if self.dataset_level:
            losses["dataset"] = sum(dataset for dataset, _ in pairs)
        if self.image_level:
            losses["img"] = sum((img for _, img in pairs), H[0].new_zeros(()))  # of pairs with images, if any
        return losses, {name: X[name] for name in self.names}

    def represent(self, name, H, labels, A=None):
        """MSA and MSE on images of one domain: S (L, B, Z, D), or None, and [X_0, X_1, .. X_L], in float32.

        The regions delta are those of the labels (B, H, W), or the argmax of logits A (B, Z, h, w) if given:
        by choice, or because the labels are another domain's. What the labels ignore is in none.
        """
        with torch.autocast(H[0].device.type, enabled=False):
            S = None
            if self.msa:
                H = [full_precision(H_l) for H_l in H]
                delta = regions_of(labels, H) if A is None else predicted_regions(A, labels, H)
                S = self.msa[name](H, delta)
            return S, self.mse[name](S)

    def consistency(self, one, two, S, X):
        """L_dataset and L_img of one pair of domains (Eq. 10, 11); 0 if not asked for, or without images."""
        mst = self.mst[f"{one}:{two}"]
        dataset, img = 0, 0
        if self.dataset_level:
            X_1, X_2 = X[one][0], X[two][0]
            X_1to2, X_2to1 = mst.dataset_level(X_1, X_2)
            dataset = L_dataset(X_1, X_2to1, X_2, X_1to2)
        if self.image_level and one in S and two in S:
            X_1, X_2 = torch.stack(X[one][1:]), torch.stack(X[two][1:])  # (L, B_1, Z_1, D), (L, B_2, Z_2, D)
            S_1, S_2 = S[one], S[two]  # the same
            if one not in self.sources:  # all pairs of images; a frozen source sees the target's own
                X_1, X_2, S_1, S_2 = X_1[:, :, None], X_2[:, None], S_1[:, :, None], S_2[:, None]
            X_1to2, X_2to1 = mst.image_level(X_1, X_2, S_1, S_2)
            img = L_img(X_1, X_2to1, X_2, X_1to2)
        return dataset, img

    def check(self, H, labels, domain, logits):
        """Raise ValueError for what does not belong together."""
        B = len(labels)
        if len(H) != L or any(len(H_l) != B for H_l in H) or H[0].shape[-2] > H[-1].shape[-2]:
            raise ValueError(f"SST: H has shapes {[tuple(H_l.shape) for H_l in H]}; it is {L} maps of the "
                             f"{B} images, coarse to fine")
        if len(domain) != B or labels.dtype != torch.int64:
            raise ValueError(f"SST: domain is {domain} and labels are {labels.dtype}; there are {B} images, "
                             f"so {B} domains, and int64 label maps")
        if self.regions == "prediction" and self.msa and logits is None:
            raise ValueError('SST: regions="prediction" needs the logits of every domain')


# What the equations are computed with -----------------------------------------------------------------------


def linear(inputs, outputs):
    """A projection without bias, as every W and f of the paper: zero in, zero out."""
    return nn.Linear(inputs, outputs, bias=False)


def per_scale(maps, x):
    """Row l of x (L, ..., D) through the l-th of L linear maps, in one batched product."""
    weights = torch.stack([f.weight for f in maps])  # (L, outputs, D)
    return (x.flatten(1, -2) @ weights.transpose(1, 2)).unflatten(1, x.shape[1:-1])


def segments(H, regions, Z):
    """All pixels of all maps, (n, D), one below the other, and the segment of each, (n,): one of K.

    Every (scale, image, class) is a segment, in this order. One more per image takes what is in no region.
    """
    B, D = H[0].shape[:2]
    pixels = torch.cat([H_l.permute(0, 2, 3, 1).reshape(-1, D) for H_l in H])
    image = torch.arange(B * len(H), device=pixels.device).view(len(H), B, 1, 1)
    regions = [(Z + 1) * i + delta_l.clamp(max=Z) for i, delta_l in zip(image, regions)]
    return pixels, torch.cat([ids.flatten() for ids in regions]), len(H) * B * (Z + 1)


def segment_mean(pixels, segment, K):
    """(K, D): the mean of each segment; an empty one has sum 0 and is divided by 1."""
    size = pixels.new_zeros(K).index_add(0, segment, pixels.new_ones(len(segment)))  # |delta|
    return pixels.new_zeros(K, pixels.shape[1]).index_add(0, segment, pixels) / size.clamp(min=1)[:, None]


def segment_max(pixels, segment, K):
    """(K, D): the elementwise maximum of each segment, 0 if empty; the first of equals has the gradient.

    PyTorch's embedding bag takes the maximum over a list of rows, and remembers which it was.
    """
    first = torch.bincount(segment, minlength=K).cumsum(0).roll(1)
    first[0] = 0
    return F.embedding_bag(segment.argsort(stable=True), pixels, first, mode="max")


def regions_of(labels, H):
    """delta_l of label maps (B, H, W): the label at the centre of every pixel of H_l. L of (B, h, w)."""
    labels = labels[:, None].float()
    return [F.interpolate(labels, size=H_l.shape[-2:], mode="nearest-exact")[:, 0].long() for H_l in H]


def predicted_regions(A, labels, H):
    """delta_l of images without labels in a domain: the argmax of its logits A (B, Z, h, w). L of (B, h, w).

    labels (B, H, W) of whatever domain: what they ignore, padding too, belongs to no region.
    """
    predicted = A.detach().float().argmax(dim=1)
    return [torch.where(label == IGNORE, IGNORE, guess)
            for label, guess in zip(regions_of(labels, H), regions_of(predicted, H))]


def full_precision(H_l):
    """A feature map in float32, for sums over regions and small softmaxes; float64 stays."""
    return H_l.to(torch.promote_types(H_l.dtype, torch.float32))


def parted(x, domain, names):
    """{name: the images of that domain in x (B, ...)}. domain: the name of each image.

    Where the domains stand one after the other, as in training, it is one split. It copies nothing, and its
    gradient is put together once, where an index for each domain would add up maps of zeros.
    """
    sizes = [domain.count(name) for name in names]
    if domain == [name for name, size in zip(names, sizes) for _ in range(size)]:
        return dict(zip(names, x.split(sizes)))
    return {name: x[[row for row, d in enumerate(domain) if d == name]] for name in names}


def named(domain, names):
    """The domain of each image by name; positions in `names` become names. Raises ValueError for neither."""
    domain = [d if isinstance(d, str) else int(d) for d in domain]
    if not all(d in names if isinstance(d, str) else 0 <= d < len(names) for d in domain):
        raise ValueError(f"the domains of the images are {domain}; each is one of {', '.join(names)}, "
                         f"or one of the positions from 0 to {len(names) - 1}")
    return [d if isinstance(d, str) else names[d] for d in domain]


# Which pairs, which matrices --------------------------------------------------------------------------------


def paired(domains, sources, connect):
    """The pairs of LabelDomains that MST bridges: each source with each domain, or these among themselves."""
    if sources:
        return [(one, two) for one in sources for two in domains]
    return [(domains[i], domains[j]) for i, j in connections([d.num_classes for d in domains], connect)]


def connections(num_classes, connect):
    """The pairs among N domains: "full" all N(N-1)/2, "progressive" the chain from coarse to fine (Table 4).

    num_classes: Z of each domain in the order given; equal ones keep that order. Returns [(i, j), ...].
    """
    if connect == "full":
        return list(combinations(range(len(num_classes)), 2))
    chain = sorted(range(len(num_classes)), key=lambda i: num_classes[i])
    return list(zip(chain, chain[1:]))


def intra_matrix(domain, given):
    """M_intra (Z, Z): the matrix given for the domain, else what touches on the body."""
    return given[domain.name] if domain.name in given else domain.intra_mask()


def static_matrix(one, two, given):
    """M_static (Z_2, Z_1): the one given for the pair, in either order, else the names' word similarity."""
    if (one.name, two.name) in given:
        return given[one.name, two.name]
    if (two.name, one.name) in given:
        return given[two.name, one.name].T
    return word_similarity(two, one)


def one_of(option, value, *allowed):
    if value not in allowed:
        raise ValueError(f"SST: {option} is {value!r}; it is one of {', '.join(allowed)}")


@torch.no_grad()
def row_cosine(X):
    """Mean off-diagonal cosine between the rows of X (..., Z, D); 1 is Eq. 10's trivial solution."""
    X = F.normalize(X.float(), dim=-1)
    Z = X.shape[-2]
    return ((X.sum(-2).square().sum(-1) - X.square().sum((-1, -2))) / (Z * (Z - 1))).mean()


def centred(X):
    """The rows of X (..., Z, D) minus their mean."""
    return X - X.mean(-2, keepdim=True)


@torch.no_grad()
def centred_cosine(X):
    """The same of the rows minus their mean, without signs: 1 where one direction tells classes apart.

    With signs it would be near -1 / (Z - 1) whatever the rows are, since they sum to zero.
    """
    X = F.normalize(centred(X.float()), dim=-1)
    Z = X.shape[-2]
    return (((X @ X.mT).abs().sum((-1, -2)) - X.square().sum((-1, -2))) / (Z * (Z - 1))).mean()


@torch.no_grad()
def effective_rank(X):
    """Of the centred rows of X (..., Z, D): how many directions tell classes apart, 1 to Z - 1.

    exp of the entropy of the singular values, taken as shares of their sum (Roy and Vetterli 2007).
    """
    values = torch.linalg.svdvals(centred(X.float()))
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.special.entr(share).sum(-1).exp().mean()
