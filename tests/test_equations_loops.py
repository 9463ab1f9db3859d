"""The modules against slow loops over images, classes, pixels and pairs, written straight from the equations.

The loops share nothing with the library: vectors are 1-D float64 tensors, all else is plain Python.
The inputs are random: absent classes, ignored pixels, domains that take turns in the batch,
maps that are neither square nor multiples of 16.
"""

import math
from itertools import product

import pytest
import torch

from sst.domains import LabelDomain
from sst.losses import L_img, L_seg, cosine, cosine_distance
from sst.modules import MSA, MSE, MST, SST

IGNORED = 255
HEIGHT, WIDTH = 17, 39
SIZES = [(2, 3), (3, 5), (5, 10)]  # of H_1, H_2, H_3
D = 6


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


# The loops

def times(x, weight):
    """x W: entry k of the result is the sum over j of x[j] W[j, k].

    A linear layer stores W[j, k] as weight[k, j].
    """
    x = x.tolist()
    xW = [sum(x[j] * row[j] for j in range(len(x))) for row in weight.tolist()]
    return torch.tensor(xW, dtype=torch.float64)


def softmax(logits):
    e = [math.exp(v - max(logits)) for v in logits]
    return [v / sum(e) for v in e]


def at_centres(Y, h, w):
    """A label map (H x W, nested lists) at the pixel under each centre of an h x w grid."""
    H, W = len(Y), len(Y[0])
    return [[Y[int((i + 0.5) * H / h)][int((j + 0.5) * W / w)] for j in range(w)] for i in range(h)]


def aggregate(H, delta, Z, W_s):
    """Eq. 2-4 for one image: H (D, h, w), delta h x w."""
    S = []
    for z in range(Z):
        region = [H[:, i, j] for i in range(H.shape[1]) for j in range(H.shape[2]) if delta[i][j] == z]
        if region:
            S_ave = sum(region) / len(region)
            S_max = torch.stack([max(pixel[d] for pixel in region) for d in range(len(H))])
            S.append(times(torch.cat([S_ave, S_max]), W_s.weight))
        else:
            S.append(torch.zeros(len(W_s.weight), dtype=torch.float64))
    return S


def attend(queries, keys, values, mask):
    """(softmax(Q K^T / sqrt(D)) (.) M) V, row by row; mask(a, b) is an entry of M."""
    out = []
    for a, query in enumerate(queries):
        weights = softmax([float(query @ key) / math.sqrt(len(key)) for key in keys])
        out.append(sum(weight * mask(a, b) * value for b, (weight, value) in enumerate(zip(weights, values))))
    return out


def propagate(X_0, S, mse, M_intra):
    """Eq. 6 for one image: [X_0, ..., X_L]."""
    X = [list(X_0)]
    for l in range(len(S)):
        Q, K, V = ([times(row, f[l].weight) for row in source] for f, source in
                   ((mse.f_Q, X[-1]), (mse.f_K, S[l]), (mse.f_V, S[l])))
        X.append([new + old for new, old in zip(attend(Q, K, V, lambda a, b: float(M_intra[a][b])), X[-1])])
    return X


def transfer(l, mst, X_1, X_2, mask):
    """Eq. 8, 9: X^(1->2) and X^(2->1); mask(z2, z1)."""
    D = X_1[0].shape[0]  # of Q, K and V, which stand one below the other
    Q_1, K_1, V_1 = ([times(x, mst.QKV_1[str(l)].weight[i:i + D]) for x in X_1] for i in (0, D, 2 * D))
    Q_2, K_2, V_2 = ([times(x, mst.QKV_2[str(l)].weight[i:i + D]) for x in X_2] for i in (0, D, 2 * D))
    return attend(Q_2, K_1, V_1, mask), attend(Q_1, K_2, V_2, lambda z1, z2: mask(z2, z1))


def dynamic(l, mst, S_1, S_2):
    """M_dynamic_l of a pair of images as a function of (z2, z1)."""
    left = [times(s, mst.W_2[str(l)].weight) for s in S_2]
    right = [times(s, mst.W_1[str(l)].weight) for s in S_1]
    return lambda z2, z1: float(left[z2] @ right[z1])


def differ(X, mapped):
    """One of the two means of Eq. 10."""
    total = 0
    for x, y in zip(X, mapped):
        lengths = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
        total += 1 - (float(x @ y) / lengths if lengths else 0)
    return total / len(X)


def image_level(one, two, S, X, mst):
    """Eq. 11: the mean over all pairs of images of the sum over the scales.

    S[name], X[name] hold one entry per image.
    """
    total = 0
    for a, b in product(range(len(S[one])), range(len(S[two]))):
        for l in (1, 2, 3):
            X_1, X_2 = X[one][a][l], X[two][b][l]
            to_2, to_1 = transfer(l, mst, X_1, X_2, dynamic(l, mst, S[one][a][l - 1], S[two][b][l - 1]))
            total += differ(X_1, to_1) + differ(X_2, to_2)
    return total / (len(S[one]) * len(S[two]))


def upsampled(A, i, j, H, W):
    """The logits of pixel (i, j) of an H x W image from A (Z, h, w).

    They are bilinear between centres and constant beyond the last.
    """
    h, w = A.shape[1:]
    y, x = max((i + 0.5) * h / H - 0.5, 0), max((j + 0.5) * w / W - 0.5, 0)
    top, left = int(y), int(x)
    bottom, right, v, u = min(top + 1, h - 1), min(left + 1, w - 1), y - top, x - left
    return ((1 - v) * ((1 - u) * A[:, top, left] + u * A[:, top, right])
            + v * ((1 - u) * A[:, bottom, left] + u * A[:, bottom, right])).tolist()


def cross_entropy(A, Y, balance=0):
    """Eq. 1: A holds one (Z, h, w) per image, Y one H x W per image."""
    per_image = []
    for A_b, Y_b in zip(A, Y):
        H, W = len(Y_b), len(Y_b[0])
        weights = {z: sum(row.count(z) for row in Y_b) ** -balance for row in Y_b for z in row}
        pixels = [-math.log(softmax(upsampled(A_b, i, j, H, W))[Y_b[i][j]]) * weights[Y_b[i][j]]
                  for i, j in product(range(H), range(W)) if Y_b[i][j] != IGNORED]
        total = sum(weights[z] for row in Y_b for z in row if z != IGNORED)
        per_image.append(sum(pixels) / total if pixels else 0)
    return sum(per_image) / len(per_image)


# Inputs

def label_maps(images, Z, seed=0, height=HEIGHT, width=WIDTH):
    """Label maps of large blocks, the last class absent from the odd ones.

    A tenth of the pixels and some blocks are ignored.
    """
    random = torch.Generator().manual_seed(seed)
    maps = []
    for b in range(images):
        blocks = torch.randint(Z - b % 2, (6, 8), generator=random)
        blocks[1, 2] = IGNORED
        Y = blocks.repeat_interleave(3, 0)[:height].repeat_interleave(5, 1)[:, :width].clone()
        Y[torch.rand(Y.shape, generator=random) < 0.1] = IGNORED
        maps.append(Y)
    return torch.stack(maps)


def label_domain(name, Z):
    names = tuple(f"class {z}" for z in range(Z))
    return LabelDomain(name, names, adjacency=tuple(zip(names[1:], names[2:])))


def randomise(module, seed=0):
    """Double precision, and weights of a size that makes the attention anything but uniform."""
    module.double()
    with torch.no_grad():
        for i, weight in enumerate(module.parameters()):
            weight.copy_(0.6 * rand(*weight.shape, seed=1000 * seed + i))
    return module


# Each module

@torch.no_grad()
def test_msa_equals_the_loops():
    H, Y = rand(3, D, 10, 12), label_maps(3, 4, height=10, width=12, seed=3)
    Y[2] = IGNORED
    msa = randomise(MSA(4, D))
    expected = torch.stack([torch.stack(aggregate(H[b], Y[b].tolist(), 4, msa.W_s)) for b in range(3)])
    close(msa([H], [Y])[0], expected)
    close(msa([H, H], [Y, Y])[1], expected)


@torch.no_grad()
def test_mse_equals_the_loops_with_and_without_a_mask():
    S = torch.stack([rand(2, 5, D, seed=l) for l in range(3)])
    for M_intra in (label_domain("a", 5).intra_mask(), torch.ones(5, 5)):
        mse = randomise(MSE(M_intra, D))
        expected = [propagate(mse.X_0, [S_l[b] for S_l in S], mse, M_intra) for b in range(2)]
        X = mse(S)
        close(X[0], mse.X_0)
        for l in (1, 2, 3):
            close(X[l], torch.stack([torch.stack(expected[b][l]) for b in range(2)]))


@torch.no_grad()
def test_mst_equals_the_loops_at_every_level_and_for_every_pair_of_images():
    M_static = rand(4, 3, seed=9)  # Z_2 = 4, Z_1 = 3
    mst = randomise(MST(M_static, D))
    X_1, X_2 = rand(3, 2, 3, D, seed=1), rand(3, 3, 4, D, seed=2)
    S_1, S_2 = rand(3, 2, 3, D, seed=3), rand(3, 3, 4, D, seed=4)
    S_2[:, 1, 2] = 0  # a class that image lacks
    mapped = transfer(0, mst, X_1[0, 0], X_2[0, 0], lambda z2, z1: float(M_static.float()[z2, z1]))
    for found, expected in zip(mst.dataset_level(X_1[0, 0], X_2[0, 0]), mapped):
        close(found, torch.stack(expected))
    to_2, to_1 = mst.image_level(X_1[:, :, None], X_2[:, None], S_1[:, :, None], S_2[:, None])
    for l, a, b in product((1, 2, 3), range(2), range(3)):
        X, S = (X_1[l - 1, a], X_2[l - 1, b]), (S_1[l - 1, a], S_2[l - 1, b])
        expected = transfer(l, mst, *X, dynamic(l, mst, *S))
        close(to_2[l - 1, a, b], torch.stack(expected[0]))
        close(to_1[l - 1, a, b], torch.stack(expected[1]))
    assert not to_2[:, :, 1, 2].any()


def test_consistency_equals_the_loops():
    X, mapped = rand(2, 5, D, seed=1), rand(2, 5, D, seed=2)
    mapped[0, 3] = 0
    close(cosine_distance(X, mapped), sum(differ(X[b], mapped[b]) for b in range(2)) / 2)
    others, mapped_others = rand(2, 3, D, seed=3), rand(2, 3, D, seed=4)
    expected = [differ(X[b], mapped[b]) + differ(others[b], mapped_others[b]) for b in range(2)]
    close(L_img(X, mapped, others, mapped_others), sum(expected))


def test_cross_entropy_equals_the_loops():
    A, Y = 3 * rand(3, 4, 5, 10), label_maps(3, 4)
    Y[1] = IGNORED
    close(L_seg(A, Y), cross_entropy(A, Y.tolist()))
    close(L_seg(A, Y, 0.25), cross_entropy(A, Y.tolist(), 0.25))


# The whole

CLASSES = [4, 5, 3]  # in this order: coarse to fine is domain 2, 0, 1
DOMAIN = [1, 0, 2, 0, 1]  # of each image: every domain's images stand apart, but the third's
PAIRS = {"full": [(0, 1), (0, 2), (1, 2)], "progressive": [(2, 0), (0, 1)]}
STATIC = {(a, b): rand(CLASSES[b], CLASSES[a], seed=77 + 10 * a + b) for a, b in product(range(3), range(3))}


def build(**options):
    domains = [label_domain(str(i), Z) for i, Z in enumerate(CLASSES)]
    static = {(str(a), str(b)): M for (a, b), M in STATIC.items()}
    return randomise(SST(domains, D, static=static, **options))


def batch():
    labels = torch.stack([label_maps(2, CLASSES[i], seed=50 + b)[b % 2] for b, i in enumerate(DOMAIN)])
    logits = {str(i): rand(DOMAIN.count(i), Z, 5, 10, seed=i) for i, Z in enumerate(CLASSES)}
    return [rand(len(DOMAIN), D, h, w, seed=h) for h, w in SIZES], labels, logits


def by_loops(sst, pairs, H, labels, logits, regions, intra_mask):
    """The losses of `sst` with every term, and [X_0, .., X_3] of every image; pairs as (i, j)."""
    S, X, losses = {}, {}, {}
    for i, Z in enumerate(CLASSES):
        images = [b for b, d in enumerate(DOMAIN) if d == i]
        S[i], X[i], A_aux = [], [], []
        touch = lambda a, b: intra_mask == "none" or a == b or (min(a, b) > 0 and abs(a - b) == 1)
        M_intra = [[1 if touch(a, b) else 0 for b in range(Z)] for a in range(Z)]
        for n, b in enumerate(images):
            S[i].append([])
            for l, (h, w) in enumerate(SIZES):
                delta = at_centres(labels[b].tolist(), h, w)
                if regions == "prediction":
                    guess = at_centres(logits[str(i)][n].max(dim=0).indices.tolist(), h, w)
                    delta = [[IGNORED if y == IGNORED else g for y, g in zip(*lines)]
                             for lines in zip(delta, guess)]
                S[i][n].append(aggregate(H[l][b], delta, Z, sst.msa[str(i)].W_s))
            X[i].append(propagate(sst.mse[str(i)].X_0, S[i][n], sst.mse[str(i)], M_intra))
            A_aux.append(torch.stack([sum(x[d] * H[2][b, d] for d in range(D)) for x in X[i][n][3]]))
        losses[f"aux/{i}"] = cross_entropy(A_aux, [labels[b].tolist() for b in images])
    losses["dataset"] = losses["img"] = 0
    for i, j in pairs:
        mst, X_1, X_2 = sst.mst[f"{i}:{j}"], sst.mse[str(i)].X_0, sst.mse[str(j)].X_0
        to_2, to_1 = transfer(0, mst, X_1, X_2, lambda z2, z1: float(STATIC[i, j].float()[z2, z1]))
        losses["dataset"] += differ(X_1, to_1) + differ(X_2, to_2)
        losses["img"] += image_level(i, j, S, X, mst)
    return losses, X


@pytest.mark.parametrize("connect", ["full", "progressive"])
@pytest.mark.parametrize("regions, intra_mask", [
    ("label", "body"), ("prediction", "body"), ("label", "none")])
@torch.no_grad()
def test_the_whole_equals_the_loops_whatever_is_asked_for(connect, regions, intra_mask):
    H, labels, logits = batch()
    whole = build(connect=connect, regions=regions, intra_mask=intra_mask)
    expected, X_expected = by_loops(whole, PAIRS[connect], H, labels, logits, regions, intra_mask)
    for scr, aux in product(("both", "dataset", "image", "none"), (True, False)):
        sst = build(connect=connect, regions=regions, intra_mask=intra_mask, scr=scr, aux=aux)
        sst.load_state_dict(whole.state_dict(), strict=False)
        losses, X = sst(H, labels, DOMAIN, logits)
        names = ([f"aux/{i}" for i in range(3)] if aux else []) + (
            ["dataset"] if scr in ("both", "dataset") else []) + (["img"] if scr in ("both", "image") else [])
        assert sorted(losses) == sorted(names)
        for name in names:
            close(losses[name], expected[name])
        for i in range(3):
            for l in range(1, len(X[str(i)])):
                close(X[str(i)][l], torch.stack([torch.stack(x[l]) for x in X_expected[i]]))


# Gradients, against differences

def gradients_agree(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-5)


def test_gradients_of_msa_agree_with_differences():
    msa, Y = randomise(MSA(3, 2)), torch.tensor([[[0, 0, 1], [255, 1, 1]], [[2, 2, 2], [0, 255, 2]]])
    assert gradients_agree(lambda H: msa([H], [Y])[0], rand(2, 2, 2, 3))


def test_gradients_of_mse_and_mst_agree_with_differences():
    mse, mst = randomise(MSE(label_domain("a", 4).intra_mask(), 3)), randomise(MST(rand(2, 4), 3))
    assert gradients_agree(lambda S: mse(S)[3], rand(3, 2, 4, 3))
    assert gradients_agree(mst.dataset_level, rand(4, 3), rand(2, 3, seed=1))
    X_1, X_2, S_1, S_2 = (rand(3, Z, 3, seed=seed) for seed, Z in enumerate((4, 2, 4, 2)))
    assert gradients_agree(mst.image_level, X_1, X_2, S_1, S_2)


def test_gradients_of_the_losses_agree_with_differences():
    a, b = rand(2, 4, 3), rand(2, 4, 3, seed=1)
    assert gradients_agree(cosine, a, b) and gradients_agree(cosine_distance, a, 1e-3 * b)
    Y = label_maps(2, 3, height=7, width=5)
    assert gradients_agree(lambda A: L_seg(A, Y), rand(2, 3, 3, 2))
    assert gradients_agree(lambda A: L_seg(A, Y, 0.5), rand(2, 3, 3, 2))


def test_gradients_of_the_whole_agree_with_differences():
    H, labels, logits = batch()
    sst = build()
    some = ("mse.1.X_0", "msa.1", "mst.0:1.W_1")
    names, weights = zip(*[(n, p) for n, p in sst.named_parameters() if n.startswith(some)])

    def total(H_1, H_3, *weights):
        arguments = [H_1, H[1], H_3], labels, DOMAIN
        losses, _ = torch.func.functional_call(sst, dict(zip(names, weights)), arguments)
        return sum(losses.values())
    inputs = [x.detach().requires_grad_() for x in (H[0], H[2], *weights)]
    assert torch.autograd.gradcheck(total, inputs, atol=1e-7, rtol=1e-5, fast_mode=True)
