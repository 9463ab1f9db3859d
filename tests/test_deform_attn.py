"""Deformable attention against its definition: a loop over queries, heads, levels, points and the four pixels."""

import math

import pytest
import torch

from sst.deform_attn import deform_attn


def by_definition(value, shapes, locations, weights):
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    out = torch.zeros(B, Q, M, d, dtype=value.dtype)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                first = 0
                for l, (h, w) in enumerate(shapes):
                    for p in range(P):
                        x, y = (locations[b, q, m, l, p] * torch.tensor([w, h]) - 0.5).tolist()  # in pixels, centres at integers
                        for i in (math.floor(y), math.floor(y) + 1):
                            for j in (math.floor(x), math.floor(x) + 1):
                                if 0 <= i < h and 0 <= j < w:
                                    share = (1 - abs(y - i)) * (1 - abs(x - j))
                                    out[b, q, m] += weights[b, q, m, l, p] * share * value[b, first + i * w + j, m]
                    first += h * w
    return out.reshape(B, Q, M * d)


def inputs(shapes, B=2, Q=5, M=2, d=3, P=2, seed=0, spread=1.4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, S, M, d, generator=g, dtype=dtype)
    locations = torch.rand(B, Q, M, L, P, 2, generator=g, dtype=dtype) * spread - (spread - 1) / 2
    weights = torch.rand(B, Q, M, L, P, generator=g, dtype=dtype)
    return value, shapes, locations, weights


@pytest.mark.parametrize("shapes", [[(4, 4)], [(3, 5), (2, 2)], [(1, 1), (1, 7), (6, 2)]])
def test_equals_the_definition(shapes):
    args = inputs(shapes)
    torch.testing.assert_close(deform_attn(*args), by_definition(*args))


def test_by_hand_on_one_row_of_pixels():
    # One level of 1 x 2 pixels with values 10 and 20; place 0.5 is half-way between the centres 0.25 and 0.75.
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    places = torch.tensor([[0.25, 0.5], [0.5, 0.5], [0.0, 0.5], [1.5, 0.5]]).view(1, 4, 1, 1, 1, 2)
    out = deform_attn(value, [(1, 2)], places, torch.ones(1, 4, 1, 1, 1))
    # on the first centre 10; between 15; on the left edge half of 10; far outside nothing
    assert out.flatten().tolist() == [10, 15, 5, 0]


def test_far_outside_is_zero_with_finite_gradients():
    value, shapes, locations, weights = inputs([(3, 4), (2, 2)])
    locations = (locations + 5).requires_grad_()
    out = deform_attn(value.requires_grad_(), shapes, locations, weights.requires_grad_())
    out.sum().backward()
    assert (out == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (value, locations, weights))


def test_gradients_are_numerically_right():
    value, shapes, locations, weights = inputs([(3, 4), (2, 3)], B=1, Q=3)
    tensors = [t.requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, l, w: deform_attn(v, shapes, l, w), tensors)


def test_bfloat16_values_do_not_move_the_places():
    value, shapes, locations, weights = inputs([(64, 64)], spread=1.0, dtype=torch.float32)
    rounded = value.bfloat16()
    out = deform_attn(rounded, shapes, locations, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), deform_attn(rounded.float(), shapes, locations, weights), rtol=1e-2, atol=1e-2)


def test_shapes_that_do_not_fit_are_named():
    value, shapes, locations, weights = inputs([(3, 4)])
    for bad in ((value, [(3, 3)], locations, weights), (value, shapes, locations, weights[..., :1]), (value, shapes * 2, locations, weights)):
        with pytest.raises(ValueError, match="do not fit"):
            deform_attn(*bad)
