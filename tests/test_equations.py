"""The paper's equations 1 to 13, each against numbers worked out with a pencil.

Inputs are small integers. Softmaxes come out as fractions because their logits are 0 or ln 3: e^(ln 3) = 3,
so that (ln 3, 0) gives (3/4, 1/4) and (ln 3, 0, 0) gives (3/5, 1/5, 1/5). Where attention is not uniform,
D = 4, so that sqrt(D) = 2.
"""

from math import log

import pytest
import torch

from sst.domains import LabelDomain, vocabulary
from sst.losses import L_aux, L_d, L_dataset, L_img, L_seg, L_u, cosine, cosine_distance
from sst.modules import MSA, MSE, MST, SST

LN3 = log(3)
I4 = torch.eye(4)


def close(found, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-5)


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def weigh(layer, W):
    """Set a linear map to x -> x W, with W written as in the paper: one row per input."""
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(W, dtype=torch.float32).T)


def image(*pixels):
    """A map (1, D, 1, n) from n pixels in a row, each with D values."""
    return rows(*pixels).T[None, :, None]


def labels(*ids):
    return torch.tensor([[ids]])


def domain(name, Z, adjacency=()):
    return LabelDomain(name, tuple(f"class {i}" for i in range(Z)), adjacency=adjacency)


# Eq. 1: L_seg

LOGITS = (LN3, 0)  # softmax (3/4, 1/4): the cross-entropy is ln 4/3 for label 0 and ln 4 for label 1


def test_eq1_is_the_mean_cross_entropy_of_the_pixels():
    close(L_seg(image(LOGITS, LOGITS), labels(0, 1)), (log(4 / 3) + log(4)) / 2)


def test_eq1_takes_ignored_pixels_out_of_the_sum_and_of_the_count():
    A = image(LOGITS, LOGITS, (90, -90), LOGITS)
    close(L_seg(A, labels(0, 1, 255, 1)), (log(4 / 3) + 2 * log(4)) / 3)


def test_eq1_weighs_images_alike_however_many_pixels_they_have():
    A = image(LOGITS, LOGITS, LOGITS).repeat(2, 1, 1, 1)
    Y = torch.cat([labels(1, 255, 255), labels(0, 0, 0)])
    close(L_seg(A, Y), (log(4) + log(4 / 3)) / 2)  # over all pixels it would be (ln 4 + 3 ln 4/3) / 4


def test_eq1_an_image_of_ignored_pixels_contributes_0_and_is_counted():
    A = image(LOGITS, LOGITS).repeat(2, 1, 1, 1).requires_grad_()
    loss = L_seg(A, torch.cat([labels(1, 1), labels(255, 255)]))
    close(loss, (log(4) + 0) / 2)
    loss.backward()
    close(A.grad[1], [[[0.0, 0]], [[0, 0]]])
    # d CE / d logits = softmax - one-hot = (3/4, 1/4 - 1); half of it for 2 pixels, half again for 2 images
    close(A.grad[0], [[[3 / 16, 3 / 16]], [[-3 / 16, -3 / 16]]])
    close(L_seg(A, torch.cat([labels(255, 255)] * 2)), 0.0)


def test_balanced_eq1_gives_small_classes_their_weight_by_hand():
    A, Y = image(*[LOGITS] * 6), labels(0, 0, 0, 0, 1, 255)
    close(L_seg(A, Y, balance=1.0), (log(4 / 3) + log(4)) / 2)  # every class the same
    # 4^-1/2 = 1/2 for each of class 0's four pixels, 1 for class 1's one: weights 2 and 1 for the classes
    close(L_seg(A, Y, balance=0.5), (2 * log(4 / 3) + log(4)) / 3)
    close(L_seg(A, Y), (4 * log(4 / 3) + log(4)) / 5)
    close(L_seg(A, labels(*[255] * 6), balance=0.5), 0.0)
    # A class is counted in its own image.
    both = L_seg(A.repeat(2, 1, 1, 1), torch.cat([Y, labels(1, 1, 1, 1, 255, 255)]), balance=0.5)
    close(both, ((2 * log(4 / 3) + log(4)) / 3 + log(4)) / 2)


def test_eq1_upsamples_the_logits_to_the_label_map():
    # Two pixels to four: centres 1/4 apart from theirs, so (0, 4) becomes (0, 1, 3, 4).
    # Here in units of ln 3, against 0: the probabilities of class 0 are 1/2, 3/4, 27/28, 81/82.
    A = image((0, 0), (4 * LN3, 0))
    close(L_seg(A, labels(0, 0, 0, 0)), (log(2) + log(4 / 3) + log(28 / 27) + log(82 / 81)) / 4)


# Eq. 2-4: MSA

def test_eq2_3_4_mean_and_maximum_of_every_region_joined_by_W_s():
    msa = MSA(num_classes=3, dim=2)
    # W_s is 2D x D: rows for the two means, then rows for the two maxima.
    # S = ave + 10 max, and the first mean also times 2 into the second channel.
    weigh(msa.W_s, [[1, 2], [0, 1], [10, 0], [0, 10]])
    H = torch.cat([image((1, -5), (3, -7), (4, 2), (99, 99)),
                   image((6, 0), (7, 1), (-1, -1), (-4, -4))])
    delta = torch.tensor([[[0, 0, 1, 255]], [[2, 2, 255, 1]]])
    close(msa([H], [delta])[0], [
        # image 1. class 0: ave (2, -6), max (3, -5): (2 + 30, 2*2 - 6 - 50);
        # class 1: (4 + 40, 8 + 2 + 20); class 2: empty
        [[32.0, -52], [44, 30], [0, 0]],
        # image 2. class 0: empty; class 1: the one pixel (-4, -4); class 2: ave (6.5, 0.5), max (7, 1)
        [[0, 0], [-4 - 40, -8 - 4 - 40], [6.5 + 70, 13 + 0.5 + 10]]])


def test_eq3_gradient_goes_to_the_pixel_that_is_the_maximum():
    msa = MSA(num_classes=2, dim=1)
    weigh(msa.W_s, [[3], [1]])  # S = 3 ave + max
    H = image([-5], [-2], [7], [50]).requires_grad_()
    msa([H], [labels(0, 0, 1, 255)])[0].sum().backward()
    # class 0: 3/2 of the mean to each of two pixels, and 1 of the maximum to the -2;
    # class 1: 3 + 1; the ignored pixel: 0
    close(H.grad.flatten(), [1.5, 2.5, 4, 0])


def test_eq4_one_W_s_serves_all_three_scales():
    msa = MSA(num_classes=2, dim=1)
    weigh(msa.W_s, [[1], [100]])
    H = [image([1]), image([1], [3]), image([1], [3], [4], [8])]
    S = msa(H, [labels(1), labels(0, 1), labels(0, 0, 0, 255)])
    close(S[0], [[[0.0], [101]]])
    close(S[1], [[[101.0], [303]]])
    close(S[2], [[[8 / 3 + 400], [0]]])
    assert sum(p.numel() for p in msa.parameters()) == 2  # W_s, 2D x D with D = 1, and no bias


# Eq. 5-7: MSE

def mse_by_hand(mask):
    """Three layers whose projections are multiples of the identity, except f_Q of layers 2 and 3."""
    mse = MSE(mask, dim=4)
    with torch.no_grad():
        mse.X_0.copy_(rows((2, 0, 0, 0), (0, 2, 0, 0)))
    weigh(mse.f_Q[0], I4), weigh(mse.f_K[0], LN3 * I4), weigh(mse.f_V[0], 4 * I4)
    third_to_first = torch.zeros(4, 4)
    third_to_first[2, 0] = 1
    weigh(mse.f_Q[1], third_to_first), weigh(mse.f_K[1], 2 * LN3 * I4), weigh(mse.f_V[1], 40 * I4)
    weigh(mse.f_Q[2], 0 * I4), weigh(mse.f_K[2], I4), weigh(mse.f_V[2], 2 * I4)
    S = [((1, 0, 0, 0), (0, 0, 1, 0)), ((1, 0, 0, 0), (0, 0, 0, 1)), ((1, 2, 3, 4), (5, 6, 7, 8))]
    return mse(torch.stack([rows(*S_l)[None] for S_l in S]))  # of one image


def test_eq5_three_layers_of_semantic_propagation():
    X = mse_by_hand(torch.ones(2, 2))  # Eq. 6 with a mask of ones
    close(X[0], [[2.0, 0, 0, 0], [0, 2, 0, 0]])
    # Q = X_0, K = ln 3 S_1: Q K^T / 2 = [[ln 3, 0], [0, 0]], softmax [[3/4, 1/4], [1/2, 1/2]]; V = 4 S_1
    # class 0: 3/4 (4,0,0,0) + 1/4 (0,0,4,0) = (3,0,1,0), + X_0;  class 1: (2,0,2,0), + X_0
    close(X[1], [[[5.0, 0, 1, 0], [2, 2, 2, 0]]])
    # Q = third channel of X_1 = 1 and 2: Q K^T / 2 = [[ln 3, 0], [2 ln 3, 0]],
    # softmax [[3/4, 1/4], [9/10, 1/10]]; V = 40 S_2
    # class 0: (30,0,0,10) + X_1;  class 1: (36,0,0,4) + X_1
    close(X[2], [[[35.0, 0, 1, 10], [38, 2, 2, 4]]])
    # Q = 0: both softmax rows are (1/2, 1/2), V = 2 S_3, so (1,2,3,4) + (5,6,7,8) comes to both
    close(X[3], [[[41.0, 8, 11, 22], [44, 10, 12, 16]]])


def test_eq6_the_mask_multiplies_after_the_softmax_and_rows_are_not_renormalised():
    X = mse_by_hand(torch.eye(2))
    # class 0: 3/4 (4,0,0,0) = (3,0,0,0); a renormalised row, or a mask before the softmax, gives (4,0,0,0)
    close(X[1], [[[5.0, 0, 0, 0], [0, 2, 2, 0]]])
    # Q = third channel of X_1 = 0 and 2: softmax [[1/2, 1/2], [9/10, 1/10]];
    # diagonal: 1/2 (40,0,0,0) and 1/10 (0,0,0,40)
    close(X[2], [[[25.0, 0, 0, 0], [0, 2, 2, 4]]])
    close(X[3], [[[26.0, 2, 3, 4], [5, 8, 9, 12]]])  # halves of V = 2 S_3: (1,2,3,4) and (5,6,7,8)


def test_eq6_M_intra_has_a_diagonal_of_1_and_the_pairs_that_touch():
    body = domain("body", 4, (("class 1", "class 3"),))
    close(body.intra_mask(), [[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]])
    close(SST([body], dim=4, scr="none").mse["body"].M_intra, body.intra_mask().tolist())
    close(SST([body], dim=4, scr="none", intra_mask="none").mse["body"].M_intra, torch.ones(4, 4).tolist())


def test_eq7_is_the_dot_product_of_pixels_and_representations():
    F = image((1, 2), (-3, 5))
    X_L = rows((1, 0), (0, 1), (2, 10))[None]
    A_aux = MSE.auxiliary(F, X_L)  # pixel 1: 1, 2, 2 + 20; pixel 2: -3, 5, -6 + 50
    close(A_aux, [[[[1.0, -3]], [[2, 5]], [[22, 44]]]])
    A_aux = MSE.auxiliary(LN3 * image((1, 0), (0, 0)), rows((1, 7), (0, 9))[None])
    close(L_aux(A_aux, labels(1, 0)), (log(4) + log(2)) / 2)


def test_eq7_takes_the_finest_map_and_the_last_representations():
    sst = SST([domain("a", 2)], dim=2, scr="none")
    with torch.no_grad():
        sst.mse["a"].X_0.copy_(rows((1, 0), (0, 0)))
        for l, f_V in enumerate(sst.mse["a"].f_V):
            f_V.weight.zero_(), sst.mse["a"].f_Q[l].weight.zero_()
    weigh(sst.mse["a"].f_V[2], [[0, 0], [4, 0]])
    weigh(sst.msa["a"].W_s, [[1, 0], [0, 1], [0, 0], [0, 0]])  # S = S_ave
    H = [image((50, 60)), image((70, 80)), image((LN3, 1), (LN3, 1))]
    losses, X = sst(H, labels(1, 255), [0])
    # S_3: class 1 is (ln 3, 1), class 0 absent. V takes 4 times the second channel: (0, 0) and (4, 0).
    # Softmax (1/2, 1/2), M_intra = 1 on the diagonal only: class 0 gets 1/2 (0, 0), class 1 gets 1/2 (4, 0).
    close(X["a"][3], [[[1.0, 0], [2, 0]]])
    # A_aux = (ln 3, 2 ln 3): softmax (3, 9) / 12
    close(losses["aux/a"], log(12 / 9))


# Eq. 8, 9: MST

X_1 = rows((2, 0, 0, 0), (0, 2, 0, 0))
X_2 = rows((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))


def mst_by_hand(static, l):
    """Q the identity, K = ln 3 X, V_1 = 4 X_1, V_2 = 5 X_2 at level l, and random maps at all others.

    1->2: Q K^T / 2 = ln 3 [[1, 0], [0, 1], [0, 0]], softmax [[3/4, 1/4], [1/4, 3/4], [1/2, 1/2]],
          V_1 = 8 e1, 8 e2
    2->1: Q K^T / 2 = ln 3 [[1, 0, 0], [0, 1, 0]], softmax [[3/5, 1/5, 1/5], [1/5, 3/5, 1/5]],
          V_2 = 5 e1, 5 e2, 5 e3
    """
    mst = MST(static, dim=4)
    weigh(mst.QKV_1[str(l)], torch.cat([I4, LN3 * I4, 4 * I4], dim=1))  # side by side: Q | K | V
    weigh(mst.QKV_2[str(l)], torch.cat([I4, LN3 * I4, 5 * I4], dim=1))
    return mst


def test_eq8_M_static_multiplies_after_the_softmax_in_both_directions():
    mst = mst_by_hand(rows((1, 0.5), (0, 1), (0.25, 0)), 0)
    to_2, to_1 = mst.dataset_level(X_1, X_2)
    # class 0: 3/4 * 1 * 8 and 1/4 * 1/2 * 8; class 1: 0 and 3/4 * 1 * 8; class 2: 1/2 * 1/4 * 8 and 0
    close(to_2, [[6.0, 1, 0, 0], [0, 6, 0, 0], [1, 0, 0, 0]])
    # class 0, mask (1, 0, 1/4): 3/5 * 5, 0, 1/5 * 1/4 * 5;
    # class 1, mask (1/2, 1, 0): 1/5 * 1/2 * 5, 3/5 * 5, 0
    close(to_1, [[3.0, 0, 0.25, 0], [0.5, 3, 0, 0]])


def test_eq8_M_static_holds_the_word_similarities_of_domain_2_down_and_domain_1_across():
    one = LabelDomain("one", ("background", "hat", "face"), adjacency=())
    two = LabelDomain("two", ("background", "face", "dress"), adjacency=())
    M = SST([one, two], dim=4).mst["one:two"].M_static
    close(M[1, 2], 1.0)  # face of two, face of one
    close(M[2, 1], float(vocabulary()["dress"] @ vocabulary()["hat"]))
    assert M[2, 1] < 0.99
    mine = torch.arange(9.0).view(3, 3)
    close(SST([one, two], dim=4, static={("one", "two"): mine}).mst["one:two"].M_static, mine.tolist())


def test_eq9_M_dynamic_is_worked_out_from_the_two_images():
    mst = mst_by_hand(torch.full((3, 2), 1e6), 2)  # M_static has no part in it
    W_1, W_2 = torch.zeros(4, 4), torch.zeros(4, 4)
    W_1[0, 1], W_1[1, 0] = 2, 3
    W_2[0, 0], W_2[1, 1] = 1, 5
    weigh(mst.W_1["2"], W_1), weigh(mst.W_2["2"], W_2)
    S_1 = rows((1, 0, 0, 0), (0, 1, 0, 0))  # S_1 W_1 = (0, 2), (3, 0)
    S_2 = rows((1, 1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))  # S_2 W_2 = (1, 5), (0, 5), (0, 0): no class 2
    # M_dynamic = [[5 * 2, 1 * 3], [5 * 2, 0], [0, 0]] = [[10, 3], [10, 0], [0, 0]], 3 x 2
    levels = [torch.stack([torch.ones_like(x), x, 9 * x]) for x in (X_1, X_2, S_1, S_2)]
    to_2, to_1 = (mapped[1] for mapped in mst.image_level(*levels))
    # class 0: 3/4 * 10 * 8 and 1/4 * 3 * 8; class 1: 1/4 * 10 * 8 and 0; class 2: 0
    close(to_2, [[60.0, 6, 0, 0], [20, 0, 0, 0], [0, 0, 0, 0]])
    # class 0, mask (10, 10, 0): 3/5 * 10 * 5 and 1/5 * 10 * 5; class 1, mask (3, 0, 0): 1/5 * 3 * 5
    close(to_1, [[30.0, 10, 0, 0], [3, 0, 0, 0]])


# Eq. 10, 11: consistency

def test_eq10_adds_the_mean_over_the_rows_of_each_domain():
    one, one_mapped = rows((3, 4), (1, 0)), rows((4, 3), (0, 7))  # cosines 24/25 and 0: (1/25 + 1) / 2 = 0.52
    # cosines 1, -1 and, without a direction, 0: (0 + 2 + 1) / 3 = 1
    two, two_mapped = rows((1, 0), (0, 2), (1, 1)), rows((9, 0), (0, -1), (0, 0))
    close(L_dataset(one, one_mapped, two, two_mapped), 0.52 + 1)



def test_eq10_a_zero_row_counts_1_with_zero_gradient():
    X, mapped = rows((3, 4), (3, 4)).requires_grad_(), rows((0, 0), (5, 0)).requires_grad_()
    loss = cosine_distance(X, mapped)
    close(loss, (1 + (1 - 15 / 25)) / 2)
    loss.backward()
    # d cos(x, y) / dy = (x / |x| - cos y / |y|) / |y| = ((0.6, 0.8) - 0.6 (1, 0)) / 5 = (0, 0.16);
    # half of it, downhill
    close(mapped.grad, [[0.0, 0], [0, -0.08]])
    # d cos(x, y) / dx = ((1, 0) - 0.6 (0.6, 0.8)) / 5 = (0.128, -0.096)
    close(X.grad, [[0.0, 0], [-0.064, 0.048]])
    close(cosine(rows((0, 0)), rows((0, 0))), [0.0])


def uniform(sizes, **options):
    """Q = 0, V = W = 1 in all of MST: 1->2 is the mean over z1 of M[z2, z1] X_1[z1],
    M_static = 1, M_dynamic = S_2 S_1^T."""
    static = {(a, b): torch.ones(sizes[b], sizes[a]) for a in sizes for b in sizes}
    sst = SST([domain(name, Z) for name, Z in sizes.items()], dim=2, static=static, **options)
    I2 = torch.eye(2)
    for name, layer in sst.mst.named_modules():
        if isinstance(layer, torch.nn.Linear):
            weigh(layer, torch.cat([0 * I2, I2, I2], dim=1) if ".QKV_" in name else I2)
    return sst


def test_eq11_averages_over_all_pairs_of_images_and_sums_over_the_scales():
    # Images a, b of domain 1 and c, d of domain 2. Class 1 is absent everywhere.
    S_1 = torch.stack([rows((1, 0), (0, 0)), rows((0, 1), (0, 0))])
    S_2 = torch.stack([rows((1, 0), (0, 0)), rows((1, 1), (0, 0))])
    X_1, X_2 = S_1 + rows((0, 0), (5, 5)), torch.stack([rows((1, 0), (5, 5)), rows((3, 4), (5, 5))])
    # M_dynamic[0, 0] = S_2[0] . S_1[0]: 1 for (a, c), (a, d), (b, d), 0 for (b, c). What is mapped is then
    # the other image's row 0, or nothing (1 - cos = 1). Row 1 is never mapped, and counts 1.
    # (a, c): cos 1,   (0 + 1)/2 twice   = 1        (b, c): nothing is mapped, (1 + 1)/2 twice = 2
    # (a, d): cos 3/5, (2/5 + 1)/2 twice = 1.4      (b, d): cos 4/5, (1/5 + 1)/2 twice         = 1.2
    mean = (1 + 2 + 1.4 + 1.2) / 4
    S = {"one": torch.stack([S_1, 0 * S_1, S_1]),  # at scale 2 nothing is mapped at all: 2
         "two": torch.stack([S_2, S_2, S_2])}
    X = {"one": [None, X_1, X_1, X_1], "two": [None, X_2, X_2, X_2]}
    dataset, img = uniform({"one": 2, "two": 2}, scr="image").consistency("one", "two", S, X)
    close(img, mean + 2 + mean)
    assert dataset == 0


def test_eq11_is_eq10_summed_over_three_levels():
    level = (rows((3, 4)), rows((4, 3)), rows((1, 0)), rows((0, 1)))  # 1/25 + 1
    other = (rows((3, 4)), rows((0, 4)), rows((1, 0)), rows((0, 1)))  # 1/5 + 1
    close(L_img(*map(torch.stack, zip(level, level, other))), 1.04 + 1.04 + 1.2)


def test_eq11_an_image_without_a_labelled_pixel_leaves_X_0_and_maps_nothing():
    sst = uniform({"one": 2, "two": 2})
    H = [torch.ones(2, 2, 1, 2), torch.ones(2, 2, 1, 2), torch.ones(2, 2, 1, 2)]
    losses, X = sst(H, torch.cat([labels(255, 255), labels(0, 1)]), [0, 1])
    close(X["one"][3], [sst.mse["one"].X_0.tolist()])  # S = 0, so V = 0 in every layer
    close(losses["aux/one"], 0.0)
    close(losses["img"], 6.0)  # M_dynamic = 0: every row counts 1, two directions, three scales


def test_eq10_holds_without_images_and_eq11_is_0_without_an_image_of_one_domain():
    sst = uniform({"one": 2, "two": 2})
    with torch.no_grad():
        sst.mse["one"].X_0.copy_(rows((1, 0), (1, 0)))
        sst.mse["two"].X_0.copy_(rows((3, 4), (3, 4)))
    losses, X = sst([torch.ones(1, 2, 1, 1)] * 3, labels(0), [1])
    close(losses["dataset"], 2 * (1 - 3 / 5))
    close(losses["img"], 0.0)
    assert "aux/one" not in losses and "aux/two" in losses and len(X["one"]) == 1


# Eq. 12, 13: objectives

def test_eq12_weighs_the_terms_of_two_domains():
    terms = {"seg/a": 1, "seg/b": 2, "aux/a": 3, "aux/b": 4, "dataset": 5, "img": 6}
    assert L_u(terms) == 10 * (1 + 2) + 1 * (3 + 4) + 5 * (5 + 6)
    assert L_u(terms, alpha=2, beta=3, lam=7) == 2 * 3 + 3 * 7 + 7 * 11
    assert L_u({"seg/a": 1, "seg/b": 2, "seg/c": 4, "aux/c": 3}) == 10 * 7 + 3


@pytest.mark.parametrize("connect, dataset, img", [
    ("full", 2 + 0.8 + 0.4, 3 * 6), ("progressive", 0.8 + 2, 2 * 6)])
def test_eq12_sums_over_three_domains_and_their_connected_pairs(connect, dataset, img):
    names = {"a": 3, "b": 4, "c": 2}
    sst = uniform(names, connect=connect)
    # All rows of a domain are alike, so what MST maps (a mean of rows) has their direction.
    # cos(a, b) = 0: 1 + 1;  cos(a, c) = 3/5: 2/5 + 2/5;  cos(b, c) = 4/5: 1/5 + 1/5.
    # Coarse to fine: c - a - b.
    with torch.no_grad():
        for name, row in {"a": (1, 0), "b": (0, 1), "c": (3, 4)}.items():
            sst.mse[name].X_0.copy_(rows(row).expand(names[name], 2))
    losses, _ = sst([torch.ones(3, 2, 1, 2)] * 3, torch.full((3, 1, 2), 255), [0, 1, 2])
    close(losses["dataset"], dataset)
    close(losses["img"], float(img))  # without a labelled pixel, 6 a pair
    terms = {"seg/a": 1, "seg/b": 2, "seg/c": 3, "aux/a": 4, "aux/b": 5, "aux/c": 6}
    close(L_u(losses | terms), 10 * 6 + 15 + 5 * (dataset + img))


def test_eq13_trains_one_domain_first_without_and_then_with_consistency():
    assert L_d({"seg/source": 2, "aux/source": 3}, "source") == 10 * 2 + 1 * 3
    terms = {"seg/source": 100, "aux/source": 1000, "seg/target": 2, "aux/target": 3, "dataset": 4, "img": 5}
    assert L_d(terms, "target") == 10 * 2 + 1 * 3 + 5 * (4 + 5)
    assert L_d(terms, "target", alpha=10, beta=0, lam=0) == 20  # fine-tuning, Table 5
    assert L_d({"seg/a": 1, "seg/a2": 50}, "a") == 10  # another domain
