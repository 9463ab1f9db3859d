"""What surrounds the equations: which pairs, rows and regions are meant,
precision, memory, and where training starts."""

from itertools import product
from math import exp, log, prod, sqrt

import pytest
import torch

from sst.domains import LabelDomain
from sst.losses import L_seg, L_u, cosine
from sst.modules import (MSA, MSE, SST, centred_cosine, connections, effective_rank, parted,
                         predicted_regions, regions_of, row_cosine)

SIZES = {"a": 4, "b": 3, "c": 5}


def network(**options):
    torch.manual_seed(0)
    domains = [LabelDomain(name, tuple(f"class {z}" for z in range(Z)), adjacency=())
               for name, Z in SIZES.items()]
    static = {(i, j): torch.rand(SIZES[j], SIZES[i]) for i, j in product(SIZES, SIZES)}
    return SST(domains, dim=8, static=static, **options)


def batch(domain, seed=1):
    """Three maps and labels for images of the domains at those positions of SIZES."""
    generator = torch.Generator().manual_seed(seed)
    H = [torch.randn(len(domain), 8, 2 * n, 3 * n, generator=generator) for n in (1, 2, 4)]
    Y = torch.stack([torch.randint(list(SIZES.values())[d], (30, 46), generator=generator) for d in domain])
    return H, Y, domain


# Which pairs of domains

def test_full_connects_every_two_domains():
    assert connections([7, 18, 20], "full") == [(0, 1), (0, 2), (1, 2)]
    assert len(connections([2] * 6, "full")) == 6 * 5 / 2


def test_progressive_is_the_chain_from_coarse_to_fine():
    assert connections([20, 7, 18], "progressive") == [(1, 2), (2, 0)]
    assert connections([5, 3, 5, 3], "progressive") == [(1, 3), (3, 0), (0, 2)]  # equal ones as given


def test_one_domain_is_connected_to_nothing():
    assert connections([7], "full") == connections([7], "progressive") == []


# Which images

@pytest.mark.parametrize("domain", ["aabcc", "abaca", "cab", "aa", "ccb"])
def test_parted_has_the_images_of_each_domain_and_their_gradient(domain):
    x = torch.arange(2.0 * len(domain)).view(-1, 2).requires_grad_()
    parts = parted(x, list(domain), ["a", "b", "c"])
    for name, part in parts.items():
        assert part.tolist() == [row for row, d in zip(x.tolist(), domain) if d == name]
    (parts["a"].sum() + 2 * parts["b"].sum() + 3 * parts["c"].sum()).backward()
    assert x.grad[:, 0].tolist() == [{"a": 1, "b": 2, "c": 3}[d] for d in domain]


def test_domains_that_stand_one_after_the_other_are_parted_without_a_copy():
    x = torch.zeros(5, 2)
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
               for part in parted(x, list("aabcc"), ["a", "b", "c"]).values())


def test_the_order_of_the_images_does_not_matter():
    sst, (H, Y, domain) = network(), batch([0, 0, 1, 1, 2])
    order = [4, 2, 0, 3, 1]
    losses, _ = sst(H, Y, domain)
    mixed, _ = sst([H_l[order] for H_l in H], Y[order], [domain[b] for b in order])
    assert losses.keys() == mixed.keys() == {"aux/a", "aux/b", "aux/c", "dataset", "img"}
    for name in losses:
        torch.testing.assert_close(losses[name], mixed[name])


# Which pixels

def test_regions_are_the_labels_at_the_centres_of_the_pixels():
    Y = (10 * torch.arange(6)[:, None] + torch.arange(4))[None]  # row i, column j holds 10 i + j
    # 6 rows to 4: centres at 1.5 (i + 1/2) = 0.75, 2.25, 3.75, 5.25, in rows 0, 2, 3, 5
    # 4 columns to 2: centres 1 and 3
    found, same = regions_of(Y, [torch.empty(1, 9, 4, 2), torch.empty(1, 9, 6, 4)])
    assert found.tolist() == [[[1, 3], [21, 23], [31, 33], [51, 53]]]
    assert torch.equal(same, Y)


def test_regions_are_of_no_class_in_between():
    Y = torch.tensor([[[0, 254], [255, 7]]])
    big, = regions_of(Y, [torch.empty(1, 9, 4, 4)])
    assert big.dtype == torch.int64
    assert big[0, ::2, ::2].tolist() == big[0, 1::2, 1::2].tolist() == Y[0].tolist()


def test_predicted_regions_are_the_best_class_of_every_pixel_but_the_ignored_ones():
    logits = torch.tensor([[[3.0, 0, 1, 0]], [[1, 5, 0, 0]], [[2, 1, 9, 1]], [[0, 0, 2, 4]]])  # (4, 1, 4)
    delta = predicted_regions(logits[None], torch.tensor([[[2, 2, 255, 0]]]), [torch.empty(1, 8, 1, 4)])
    assert delta[0].tolist() == [[[0, 1, 255, 3]]]


# The trivial solution of Eq. 10

def test_row_cosine_is_the_mean_over_all_pairs_of_rows():
    assert row_cosine(torch.tensor([[3.0, 4], [8, 6]])).item() == pytest.approx(24 / 25)
    three = torch.tensor([[2.0, 0], [0, 3], [1, 1]])
    assert row_cosine(three).item() == pytest.approx((0 + sqrt(0.5) + sqrt(0.5)) / 3)
    assert row_cosine(torch.tensor([[2.0, 1], [4, 2], [6, 3]])).item() == pytest.approx(1)
    two = torch.tensor([[[3.0, 4], [8, 6]], [[1, 0], [-1, 0]]])  # 24/25 and -1
    assert row_cosine(two).item() == pytest.approx(-1 / 50, rel=1e-4)


def test_centred_cosine_has_no_common_vector_and_no_signs():
    # Minus their mean (1, 1): (2, 0), (-1, 1), (-1, -1); cosines -1/sqrt 2, -1/sqrt 2 and 0.
    X = torch.tensor([[3.0, 1], [0, 2], [0, 0]])
    assert centred_cosine(X).item() == pytest.approx(2 * sqrt(0.5) / 3)
    assert centred_cosine(X + torch.tensor([7.0, -9])).item() == pytest.approx(2 * sqrt(0.5) / 3, abs=1e-5)
    assert centred_cosine(torch.tensor([[1.0, 2], [2, 4], [9, 18]])).item() == pytest.approx(1)


def test_effective_rank_counts_the_directions_that_tell_classes_apart():
    assert effective_rank(torch.eye(4)).item() == pytest.approx(3), "four rows, minus their mean"
    assert effective_rank(torch.tensor([[5.0, 5], [6, 6], [7, 7]])).item() == pytest.approx(1)
    # Centred rows (3, 0), (-3, 0), (0, 1), (0, -1): singular values sqrt 18 and sqrt 2, shares 3/4 and 1/4.
    X = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert effective_rank(X).item() == pytest.approx(exp(-0.75 * log(0.75) - 0.25 * log(0.25)))
    assert effective_rank(torch.stack([X, X + 2])).item() == pytest.approx(4 / 3 ** 0.75)
    assert effective_rank(torch.ones(3, 2)).item() == pytest.approx(1), "no direction at all"


def test_X_0_starts_far_from_the_trivial_solution():
    for Z in (2, 7, 20):
        X_0 = MSE(torch.ones(Z, Z), dim=256).X_0.detach()
        assert abs(row_cosine(X_0)) < 1e-3
        expected = 9 * torch.eye(Z)  # orthogonal rows of length 3
        torch.testing.assert_close(X_0 @ X_0.T, expected, atol=1e-3, rtol=0)


# What is trained

@pytest.mark.parametrize("scr, aux", [("both", True), ("dataset", True), ("image", True), ("none", True),
                                      ("both", False), ("dataset", False), ("image", False)])
@pytest.mark.parametrize("connect", ["full", "progressive"])
def test_every_parameter_that_is_built_gets_a_gradient(scr, aux, connect):
    sst, (H, Y, domain) = network(scr=scr, aux=aux, connect=connect), batch([2, 0, 1, 0])
    losses, _ = sst(H, Y, domain)
    L_u(losses).backward()
    assert [name for name, weight in sst.named_parameters()
            if weight.grad is None or not weight.grad.any()] == []


def test_every_parameter_gets_a_finite_gradient_from_images_without_a_labelled_pixel():
    sst, (H, Y, domain) = network(), batch([2, 0, 1, 0])
    losses, _ = sst(H, torch.full_like(Y, 255), domain)
    L_u(losses).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in sst.parameters())


def test_no_projection_has_a_bias():
    assert not [name for name, _ in network().named_parameters() if name.endswith("bias")]


def test_features_get_no_gradient_from_ignored_pixels_through_msa():
    H = torch.randn(1, 8, 2, 3, requires_grad=True)
    MSA(3, 8)([H], [torch.tensor([[[0, 255, 1], [255, 1, 1]]])])[0].square().sum().backward()
    assert H.grad[0].any(dim=0).tolist() == [[True, False, True], [False, True, True]]


# Numbers

def test_cosine_is_the_same_for_short_and_long_vectors():
    a, b = torch.tensor([3.0, 4]), torch.tensor([4.0, 3])
    for scale in (1e-8, 1e-4, 1, 1e4, 1e8):
        short = (scale * a).requires_grad_()
        value = cosine(short, b)
        assert value.item() == pytest.approx(24 / 25)
        value.backward()
        # d cos / da = (b / |b| - cos a / |a|) / |a| = (0.8 - 0.576, 0.6 - 0.768) / 5,
        # and as much more as a is shorter
        assert (scale * short.grad).tolist() == pytest.approx([0.0448, -0.0336], rel=1e-4)


def test_a_feature_that_is_no_number_makes_its_own_region_no_number():
    H = torch.randn(1, 8, 2, 3)
    H[0, 2, 0, 0] = float("nan")
    S = MSA(3, 8)([H], [torch.tensor([[[0, 0, 1], [1, 1, 255]]])])[0]
    assert S[0, 0].isnan().all() and S[0, 1:].isfinite().all()


def test_equal_features_share_no_gradient_but_give_it_to_one_pixel():
    H = torch.full((1, 1, 2, 2), 5.0, requires_grad=True)
    msa = MSA(2, 1)
    with torch.no_grad():
        msa.W_s.weight.copy_(torch.tensor([[0.0, 1]]))  # the maximum alone
    msa([H], [torch.tensor([[[1, 1], [255, 1]]])])[0].sum().backward()
    assert H.grad.sum() == 1


def test_losses_are_float32_under_autocast_and_equal_those_of_the_same_features():
    sst, (H, Y, domain) = network(), batch([2, 0, 1, 0])
    H = [H_l.bfloat16() for H_l in H]
    expected, X = sst([H_l.float() for H_l in H], Y, domain)
    A = torch.randn(4, 3, 5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses, X_autocast = sst(H, Y, domain)
        seg = L_seg(A, Y.clamp(max=2))
    for name in expected:
        assert losses[name].dtype == torch.float32 and torch.equal(losses[name], expected[name])
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for i in X for x, y in zip(X[i], X_autocast[i]))
    assert seg.dtype == torch.float32 and torch.equal(seg, L_seg(A.float(), Y.clamp(max=2)))


# Memory

def test_msa_keeps_nothing_larger_than_its_feature_map_however_many_classes():
    B, D, h, w = 2, 8, 40, 30

    def largest(Z):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            H = torch.randn(B, D, h, w, requires_grad=True)
            MSA(Z, D)([H], [torch.randint(Z, (B, h, w))])
        return max(prod(shape) for shape in kept)
    assert largest(200) == largest(2) <= B * D * h * w


def test_a_given_static_matrix_serves_its_pair_in_either_order():
    a, b = (LabelDomain(n, tuple(f"{n}{i}" for i in range(z)), (), ()) for n, z in (("a", 3), ("b", 2)))
    M = torch.arange(6.0).view(2, 3)  # (Z_b, Z_a)
    full = SST([a, b], 4, static={("a", "b"): M})
    assert torch.equal(full.mst["a:b"].M_static, M)
    chain = SST([a, b], 4, connect="progressive", static={("a", "b"): M})  # from coarse to fine: b, then a
    assert torch.equal(chain.mst["b:a"].M_static, M.T)


def test_what_does_not_belong_together_is_refused():
    a, b = (LabelDomain(n, ("x", "y"), (), ()) for n in "ab")
    sst = SST([a, b], 4, static={("a", "b"): torch.ones(2, 2)})
    H, Y = [torch.randn(2, 4, s, s) for s in (1, 2, 4)], torch.zeros(2, 8, 8).long()
    sst(H, Y, [0, 1])
    for bad, message in (((H[:2], Y, [0, 1]), "it is 3 maps"), ((H[::-1], Y, [0, 1]), "coarse to fine"),
                         ((H, Y, [0]), "there are 2 images"), ((H, Y, [0, 2]), "positions from 0 to 1"),
                         ((H, Y.byte(), [0, 1]), "int64 label maps")):
        with pytest.raises(ValueError, match=message):
            sst(*bad)
    for option in ("scr", "connect", "intra_mask", "regions"):
        with pytest.raises(ValueError, match=f"{option} is 'Full'; it is one of"):
            SST([a, b], 4, **{option: "Full"})
    with pytest.raises(ValueError, match="needs the logits"):
        SST([a, b], 4, scr="none", regions="prediction")(H, Y, [0, 1])


def test_words_are_only_looked_up_where_eq_8_needs_them():
    a, b = (LabelDomain(n, ("background", "qwertz"), (), ()) for n in "ab")
    SST([a, b], 4, scr="image")


def test_one_domain_has_no_pair_and_builds_nothing_for_it():
    a = LabelDomain("a", ("x", "y"), (), ())
    alone = SST([a], 4)
    assert not alone.dataset_level and not alone.image_level and len(alone.mst) == 0
    losses, _ = alone([torch.randn(1, 4, 2, 2)] * 3, torch.zeros(1, 8, 8, dtype=torch.long), [0])
    assert set(losses) == {"aux/a"}


def test_cosine_neither_overflows_nor_underflows():
    v = torch.tensor([3.0, 4.0])
    for scale in (1e-29, 1e-21, 1e-18, 1.0, 1e18, 1e37):
        a, b = (v * scale).requires_grad_(), v.flip(0) * scale
        c = cosine(a, b)  # (3*4 + 4*3) / 25
        c.backward()
        # d cos / da = (b/|b| - cos a/|a|) / |a| = ((0.8, 0.6) - 0.96 (0.6, 0.8)) / 5
        #            = (0.0448, -0.0336), divided by the scale
        assert c.item() == pytest.approx(0.96, rel=1e-5)
        assert (a.grad * scale).tolist() == pytest.approx([0.0448, -0.0336], rel=1e-4)


def test_attention_on_an_absent_class_leaves_finite_gradients():
    """Softmax weights of (1, 1e-22), the first on a class whose mask is 0:
    the mapped row is tiny and its gradient is not."""
    logits = torch.tensor([[0.0, -50.657]], requires_grad=True)
    mapped = (logits.softmax(-1) * torch.tensor([[0.0, 2.0]])) @ torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    loss = 1 - cosine(mapped, torch.tensor([[4.0, 3.0]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1 - 0.96, abs=1e-5)
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() < 1


def test_an_id_beyond_the_domain_is_in_no_region():
    H, msa = [torch.randn(2, 4, 2, 2)], MSA(2, 4)
    good, bad = torch.tensor([[[0, 1], [1, 255]]] * 2), torch.tensor([[[0, 1], [1, 3]]] * 2)
    assert torch.equal(msa(H, [good])[0], msa(H, [bad])[0])
