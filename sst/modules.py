"""The paper's three modules (SST, Sec. 3.2), which carry meaning between label domains while a network is trained.

MSA pools a feature map into one vector per class (Eq. 2-4), MSE refines a domain's learned class representations with those
vectors (Eq. 5-7), MST maps one domain's representations into another's space (Eq. 8-9), and `SST` puts them together and
returns the losses. They know nothing of the network: three feature maps of one width, labels and the domain of each image
are all they take. After training they are thrown away.

Shapes: B images, D channels, Z classes (background included), l = 1, 2, 3 the scales 1/16, 1/8, 1/4.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from .domains import IGNORE, word_similarity
from .losses import L_aux, L_dataset, L_img

L = 3  # decoder scales


def linear(inputs, outputs):
    """A projection without bias, as every W and f of the paper: zero in, zero out."""
    return nn.Linear(inputs, outputs, bias=False)


class MSA(nn.Module):
    """Multi-scale semantics aggregation of one domain (Sec. 3.2.1): feature maps and regions -> S_1, S_2, S_3."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.num_classes = num_classes
        self.W_s = linear(2 * dim, dim)

    def forward(self, H, regions):
        """H: maps (B, D, h_l, w_l); regions: as many maps (B, h_l, w_l) int64, class ids, 255 in no region. Returns (L, B, Z, D)."""
        B, D = H[0].shape[:2]
        Z = self.num_classes
        pixels = torch.cat([H_l.permute(0, 2, 3, 1).reshape(-1, D) for H_l in H])  # (n, D), of all scales one below the other
        # Every (scale, image, class) is a segment, and one more per image takes what belongs to no region.
        image = torch.arange(B * len(H), device=pixels.device).split(B)
        segment = torch.cat([(delta_l.clamp(max=Z) + (Z + 1) * i[:, None, None]).flatten() for delta_l, i in zip(regions, image)])  # (n,)
        K = len(H) * B * (Z + 1)
        size = pixels.new_zeros(K).index_add(0, segment, pixels.new_ones(len(segment)))  # |delta|

        # Eq. 2: the mean over a region; an empty one has sum 0 and is divided by 1.
        S_ave = pixels.new_zeros(K, D).index_add(0, segment, pixels) / size.clamp(min=1)[:, None]

        # Eq. 3: the maximum over a region. First where it is, without a graph; then reading those K*D values is all that
        # has a gradient, while differentiating a scattered maximum would walk over every pixel again.
        with torch.no_grad():
            index = segment[:, None].expand(-1, D)
            top = pixels.new_zeros(K, D).scatter_reduce(0, index, pixels, "amax", include_self=False)
            n = torch.arange(len(pixels), device=pixels.device)[:, None]
            position = torch.where(pixels == top[segment], n, len(pixels))
            position = torch.zeros(K, D, dtype=torch.int64, device=pixels.device).scatter_reduce(0, index, position, "amin",
                                                                                               include_self=False)
            position.clamp_(max=len(pixels) - 1)  # only a NaN equals no maximum
        S_max = torch.where(size[:, None] > 0, pixels.gather(0, position), 0)

        # Eq. 4
        S = self.W_s(torch.cat([S_ave, S_max], dim=-1))  # (K, D)
        return S.view(len(H), B, Z + 1, D)[:, :, :Z]


class MSE(nn.Module):
    """Multi-scale semantic enhancement of one domain (Sec. 3.2.2): S_1..S_L -> X_0..X_L.

    intra_mask: M_intra (Z, Z); all ones is "None" of Table 6 (Eq. 5).
    """

    def __init__(self, intra_mask, dim, layers=L):
        super().__init__()
        # X_0's rows start orthogonal (where Z <= D): nothing in Eq. 10 stops all rows from sharing one direction, which makes every
        # cosine 1, and rows that start small get there within a few steps. Their length sets the size of A_aux at the start, and
        # of L_aux's gradient: in a small network, rows of length 8 made it as large as ten times L_seg's, and rows of length 1 ended
        # nearly parallel (docs/experiments.md).
        self.X_0 = nn.Parameter(nn.init.orthogonal_(torch.empty(len(intra_mask), dim), gain=3))
        self.f_Q, self.f_K, self.f_V = (nn.ModuleList(linear(dim, dim) for _ in range(layers)) for _ in range(3))
        self.register_buffer("M_intra", intra_mask.float())

    def forward(self, S):
        """S: (L, B, Z, D), or None where there is no image. Returns [X_0 (Z, D), X_1, ..., X_L (B, Z, D)]."""
        X = [self.X_0]
        if S is not None:
            for f_Q, K_l, V_l in zip(self.f_Q, per_scale(self.f_K, S), per_scale(self.f_V, S)):
                # Eq. 6: X_l = (softmax(Q_l K_l^T / sqrt(D)) (.) M_intra) V_l + X_{l-1}
                X.append(masked_attention(f_Q(X[-1]), K_l, V_l, self.M_intra) + X[-1])
        return X

    @staticmethod
    def auxiliary(F_, X_L):
        """Eq. 7: A_aux = F (x) X_L^T. F_ (B, D, h, w), X_L (B, Z, D) -> (B, Z, h, w)."""
        pixels = F_.flatten(2).transpose(1, 2)  # (B, h*w, D); the product has the classes of a pixel side by side,
        A_aux = pixels @ X_L.transpose(1, 2)    # (B, h*w, Z), as the cross-entropy likes them
        return A_aux.transpose(1, 2).unflatten(2, F_.shape[-2:])


class MST(nn.Module):
    """Multi-scale semantic transfer between domain 1 and domain 2, both directions (Sec. 3.2.3).

    static: M_static (Z_2, Z_1), or None without the dataset level. scales: which mapping layers are built; 0 is the dataset
    level, 1..L the image level.
    """

    def __init__(self, static, dim, scales=range(L + 1)):
        super().__init__()
        # Q^, K^, V^ of a domain and layer stand one below the other in one matrix: one product instead of three.
        for name in ("QKV_1", "QKV_2"):
            self.add_module(name, nn.ModuleDict({str(l): linear(dim, 3 * dim) for l in scales}))
        for name in ("W_1", "W_2"):
            self.add_module(name, nn.ModuleDict({str(l): linear(dim, dim) for l in scales if l > 0}))
        self.register_buffer("M_static", None if static is None else static.float())

    def dataset_level(self, X_1, X_2):
        """Eq. 8: X_0 of both domains, (Z_1, D) and (Z_2, D) -> X_0^(1->2) (Z_2, D), X_0^(2->1) (Z_1, D)."""
        to_2, to_1 = self.transfer([0], X_1[None], X_2[None], self.M_static)
        return to_2[0], to_1[0]

    def image_level(self, X_1, X_2, S_1, S_2):
        """Eq. 9 for l = 1..L at once: X_l and S_l of both domains, (L, ..., Z_1, D) and (L, ..., Z_2, D) -> X_l^(1->2), X_l^(2->1).

        The dimensions between broadcast: (L, B_1, 1) against (L, 1, B_2) gives all pairs of images.
        """
        W_1, W_2 = (per_scale(W.values(), S) for W, S in ((self.W_1, S_1), (self.W_2, S_2)))
        M_dynamic = W_2 @ W_1.transpose(-1, -2)  # (L, ..., Z_2, Z_1)
        return self.transfer(range(1, len(X_1) + 1), X_1, X_2, M_dynamic)

    def transfer(self, scales, X_1, X_2, M):
        Q_1, K_1, V_1 = per_scale([self.QKV_1[str(l)] for l in scales], X_1).chunk(3, dim=-1)
        Q_2, K_2, V_2 = per_scale([self.QKV_2[str(l)] for l in scales], X_2).chunk(3, dim=-1)
        # Eq. 8 (l = 0, M_static) and Eq. 9 (M_dynamic): X_l^(1->2) = (softmax(Q^(2) K^(1)T / sqrt(D)) (.) M) V^(1), and back
        to_2 = masked_attention(Q_2, K_1, V_1, M)
        to_1 = masked_attention(Q_1, K_2, V_2, M.transpose(-1, -2))
        return to_2, to_1


def per_scale(maps, x):
    """Row l of x (L, ..., D) through the l-th of L linear maps: one batched product, since the scales do not wait for each other."""
    weights = torch.stack([f.weight for f in maps])  # (L, outputs, D)
    return (x.flatten(1, -2) @ weights.transpose(1, 2)).unflatten(1, x.shape[1:-1])


def masked_attention(Q, K, V, M):
    """(softmax(Q K^T / sqrt(D)) (.) M) V: the mask multiplies after the softmax, and rows are not normalised again."""
    attention = (Q @ K.transpose(-1, -2) / Q.shape[-1] ** 0.5).softmax(dim=-1)
    return (attention * M) @ V


def connections(num_classes, connect):
    """The pairs of domains that MST bridges: "full" all N(N-1)/2, "progressive" the chain from coarse to fine (Table 4).

    num_classes: Z of each domain in the order given; equal ones keep that order. Returns [(i, j), ...].
    """
    if connect == "full":
        return list(combinations(range(len(num_classes)), 2))
    chain = sorted(range(len(num_classes)), key=lambda i: num_classes[i])
    return list(zip(chain, chain[1:]))


def static_mask(one, two, given):
    """M_static (Z_2, Z_1): the matrix given for the pair, in either order, else the similarity of the class names."""
    if (one.name, two.name) in given:
        return given[one.name, two.name]
    if (two.name, one.name) in given:
        return given[two.name, one.name].T
    return word_similarity(two, one)


def regions_of(labels, H):
    """The regions delta_l of label maps (B, H, W): the label at every pixel's centre, for each map of H. L of (B, h, w)."""
    return [F.interpolate(labels[:, None].float(), size=H_l.shape[-2:], mode="nearest-exact")[:, 0].long() for H_l in H]


def predicted_regions(A, labels, H):
    """The regions of an image that has no labels in a domain: the argmax of that domain's logits A (B, Z, h, w), for each map of H.

    labels (B, H, W) of whatever domain: what they ignore, padding too, belongs to no region. L of (B, h, w).
    """
    predicted = A.detach().float().argmax(dim=1)
    return [torch.where(label == IGNORE, IGNORE, guess) for label, guess in zip(regions_of(labels, H), regions_of(predicted, H))]


def full_precision(H):
    """Feature maps in float32, for sums over regions and small softmaxes; float64 stays."""
    return [H_l.to(torch.promote_types(H_l.dtype, torch.float32)) for H_l in H]


def rows_of(domain, i):
    """Where the images of domain i stand in a batch: a slice where they are neighbours (no copy), else their indices."""
    rows = [row for row, d in enumerate(domain) if d == i]
    return slice(rows[0], rows[-1] + 1) if rows and rows[-1] - rows[0] + 1 == len(rows) else rows


class SST(nn.Module):
    """Scalable Semantic Transfer over N >= 1 label domains.

    domains:    LabelDomains. dim: D, the width of the feature maps.
    intra_mask: "body" (each domain's M_intra) or "none" (Eq. 5).
    scr:        consistency terms, "both", "dataset" (Eq. 10), "image" (Eq. 11) or "none".
    connect:    "full" or "progressive".   aux: whether L_aux is wanted.
    regions:    "label" or "prediction": what delta is made of.
    static:     {(name_1, name_2): M_static (Z_2, Z_1)} for pairs, in either order, whose word similarities are not to be used.
    sources:    LabelDomains of a frozen network (dedicated parsing, Eq. 13). MST then bridges each of them to each of `domains`,
                instead of these among themselves; their representations come to `forward` as `given`.
    """

    def __init__(self, domains, dim, intra_mask="body", scr="both", connect="full", aux=True, regions="label", static=None, sources=()):
        super().__init__()
        for option, value, allowed in (("intra_mask", intra_mask, ("body", "none")), ("scr", scr, ("both", "dataset", "image", "none")),
                                       ("connect", connect, ("full", "progressive")), ("regions", regions, ("label", "prediction"))):
            if value not in allowed:
                raise ValueError(f"SST: {option} is {value!r}; it is one of {', '.join(allowed)}")
        self.domains, self.aux, self.regions = list(domains), aux, regions
        self.sources = [d.name for d in sources]
        if sources:
            pairs = [(one, two) for one in sources for two in domains]
        else:
            pairs = [(domains[i], domains[j]) for i, j in connections([d.num_classes for d in domains], connect)]
        self.pairs = [(one.name, two.name) for one, two in pairs] if scr != "none" else []
        self.dataset_level = scr in ("both", "dataset") and len(self.pairs) > 0
        self.image_level = scr in ("both", "image") and len(self.pairs) > 0
        # Only what the chosen losses reach is built: a parameter without a gradient would stall DDP.
        layers = L if aux or self.image_level else 0
        body = intra_mask == "body" and layers > 0
        masks = [d.intra_mask() if body else torch.ones(d.num_classes, d.num_classes) for d in domains]
        self.msa = nn.ModuleDict({d.name: MSA(d.num_classes, dim) for d in domains} if layers else {})
        self.mse = nn.ModuleDict({d.name: MSE(mask, dim, layers) for d, mask in zip(domains, masks)})
        self.mst = nn.ModuleDict()
        scales = ([0] if self.dataset_level else []) + ([1, 2, 3] if self.image_level else [])
        for one, two in pairs if self.pairs else ():
            M_static = static_mask(one, two, static or {}) if self.dataset_level else None
            self.mst[f"{one.name}:{two.name}"] = MST(M_static, dim, scales)

    def forward(self, H, labels, domain, logits=None, given=None):
        """The auxiliary losses of a batch.

        H: three maps (B, D, h_l, w_l), coarse to fine. labels: (B, H, W) int64, 255 ignored. domain: B positions in
        `domains`. logits: {domain name: A (B_d, Z, h, w)}, read with regions="prediction" only. given: {source: its
        `represent`ation of the same B images}.
        Returns {"aux/NAME": L_aux, ..., "dataset": L_dataset, "img": L_img}, those that were asked for, and
        {NAME: [X_0 (Z, D), X_1.. X_L (B_d, Z, D)]}. Everything is computed in float32 (float64 stays). Raises ValueError for
        maps, labels and domains that do not belong together.
        """
        domain = [int(d) for d in domain]
        B = len(labels)
        if len(H) != L or any(len(H_l) != B for H_l in H) or H[0].shape[-2] > H[-1].shape[-2]:
            raise ValueError(f"SST: H has shapes {[tuple(H_l.shape) for H_l in H]}; it is {L} maps of the {B} images, coarse to fine")
        if len(domain) != B or not all(0 <= d < len(self.domains) for d in domain) or labels.dtype != torch.int64:
            raise ValueError(f"SST: domain is {domain} and labels are {labels.dtype}; there are {B} images, so {B} positions from 0 to "
                             f"{len(self.domains) - 1}, and int64 label maps")
        if self.regions == "prediction" and self.msa and logits is None:
            raise ValueError('SST: regions="prediction" needs the logits of every domain')
        with torch.autocast(H[0].device.type, enabled=False):
            H = full_precision(H)
            losses, S, X = {}, {}, {}
            for name, (S_d, X_d) in (given or {}).items():
                S[name], X[name] = S_d, X_d
            delta = regions_of(labels, H) if self.msa and self.regions == "label" else None
            for i, d in enumerate(self.domains):
                rows = rows_of(domain, i)
                if rows == []:  # no image of this domain in the batch: nothing to say about it but X_0
                    X[d.name] = self.mse[d.name](None)
                    continue
                H_d, Y = [H_l[rows] for H_l in H], labels[rows]
                if delta is not None:
                    delta_d = [delta_l[rows] for delta_l in delta]
                else:
                    delta_d = predicted_regions(logits[d.name], Y, H_d) if self.msa else None
                S[d.name], X[d.name] = self.represent(d.name, H_d, delta_d)
                if self.aux:
                    losses[f"aux/{d.name}"] = L_aux(MSE.auxiliary(H_d[-1], X[d.name][-1]), Y)  # Eq. 7, with F = H_3
            terms = [self.consistency(one, two, S, X) for one, two in self.pairs]
            if self.dataset_level:
                losses["dataset"] = sum(dataset for dataset, _ in terms)
            if self.image_level:
                losses["img"] = sum((img for _, img in terms), H[0].new_zeros(()))  # of pairs with images; there may be none
        return losses, {d.name: X[d.name] for d in self.domains}

    def represent(self, name, H, delta):
        """What MSA and MSE make of images of one domain with the regions delta: S (L, B, Z, D) and [X_0, X_1, ..., X_L]."""
        S = self.msa[name](H, delta) if self.msa else None
        return S, self.mse[name](S)

    def consistency(self, one, two, S, X):
        """L_dataset and L_img of one pair of domains (Eq. 10, 11); 0 for a level not asked for or without an image."""
        mst = self.mst[f"{one}:{two}"]
        dataset, img = 0, 0
        if self.dataset_level:
            to_2, to_1 = mst.dataset_level(X[one][0], X[two][0])
            dataset = L_dataset(X[one][0], to_1, X[two][0], to_2)
        if self.image_level and one in S and two in S:
            X_1, X_2, S_1, S_2 = torch.stack(X[one][1:]), torch.stack(X[two][1:]), S[one], S[two]  # (L, B_1, Z_1, D), (L, B_2, Z_2, D)
            if one not in self.sources:  # all pairs of images; a frozen source looks at the very image that the target looks at
                X_1, X_2, S_1, S_2 = X_1[:, :, None], X_2[:, None], S_1[:, :, None], S_2[:, None]
            to_2, to_1 = mst.image_level(X_1, X_2, S_1, S_2)
            img = L_img(X_1, to_1, X_2, to_2)
        return dataset, img


@torch.no_grad()
def row_cosine(X):
    """Mean off-diagonal cosine between the rows of X (..., Z, D): 1 is the trivial solution of Eq. 10, all rows parallel."""
    X = F.normalize(X.float(), dim=-1)
    Z = X.shape[-2]
    return ((X.sum(-2).square().sum(-1) - X.square().sum((-1, -2))) / (Z * (Z - 1))).mean()
