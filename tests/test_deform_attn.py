"""Deformable attention against its definition: a loop over queries, heads, levels, points and four pixels."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from sst.deform_attn import choose, deform_attn


@pytest.fixture(params=["embedding_bag", "grid_sample"], autouse=True)
def backend(request, monkeypatch):
    """Every test holds for every body."""
    monkeypatch.setenv("SST_DEFORM_ATTN", request.param)
    return request.param


def by_definition(value, shapes, locations, weights):
    B, S, M, d = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    out = torch.zeros(B, Q, M, d, dtype=value.dtype)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                first = 0
                for l, (h, w) in enumerate(shapes):
                    for p in range(P):
                        # in pixels, centres at integers
                        x, y = locations[b, q, m, l, p] * torch.tensor([w, h]) - 0.5
                        top, left = math.floor(y.item()), math.floor(x.item())
                        for i in (top, top + 1):
                            for j in (left, left + 1):
                                if 0 <= i < h and 0 <= j < w:
                                    share = (1 - abs(y - i)) * (1 - abs(x - j))
                                    pixel = value[b, first + i * w + j, m]
                                    out[b, q, m] += weights[b, q, m, l, p] * share * pixel
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
    # A level of 1 x 2 pixels with values 10 and 20; place 0.5 is half-way between the centres 0.25 and 0.75.
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
    exact = deform_attn(rounded.float(), shapes, locations, weights)
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)


def test_shapes_that_do_not_fit_are_named():
    value, shapes, locations, weights = inputs([(3, 4)])
    for bad in ((value, [(3, 3)], locations, weights), (value, shapes, locations, weights[..., :1]),
                (value, shapes * 2, locations, weights)):
        with pytest.raises(ValueError, match="do not fit"):
            deform_attn(*bad)


def test_places_on_centres_edges_and_corners_of_the_frame():
    """On a centre, on the outer edge, and one pixel beyond it, where no share of the last pixel is left."""
    shapes = [(2, 3), (1, 1)]
    value = inputs(shapes)[0][:, :, :1]
    ticks = [-1.0, -1 / 3, -1 / 6, 0, 1 / 6, 0.5, 5 / 6, 1, 7 / 6, 4 / 3, 9]
    ticks = torch.tensor(ticks, dtype=torch.float64)
    places = torch.cartesian_prod(ticks, ticks)[None, :, None, None, None].expand(2, -1, 1, 2, 1, 2)
    args = value, shapes, places, torch.ones(2, len(ticks) ** 2, 1, 2, 1, dtype=torch.float64)
    torch.testing.assert_close(deform_attn(*args), by_definition(*args))


def test_gradients_of_some_inputs_equal_those_of_all():
    value, shapes, locations, weights = inputs([(5, 4), (2, 3)])
    g = torch.randn(2, 5, 6, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (value, locations, weights)]
    every = torch.autograd.grad(deform_attn(value, shapes, locations, weights), tensors, g)
    for k, t in enumerate(tensors):
        args = [x.detach().requires_grad_(x is t) for x in tensors]
        out = deform_attn(args[0], shapes, *args[1:])
        torch.testing.assert_close(torch.autograd.grad(out, args[k], g)[0], every[k])


def test_a_place_that_is_not_a_number_breaks_nothing_else():
    value, shapes, locations, weights = inputs([(3, 4), (2, 2)], B=1)
    good = deform_attn(value, shapes, locations, weights)
    locations[0, 2, 1] = torch.nan
    out = deform_attn(value, shapes, locations, weights).view(1, 5, 2, 3)
    keep = torch.ones(5, 2, dtype=torch.bool)
    keep[2, 1] = False
    assert torch.equal(out[0][keep], good.view(1, 5, 2, 3)[0][keep])


def test_the_bodies_agree_in_float32_at_the_size_of_a_photo(backend):
    levels = [(32, 24), (16, 12), (8, 6)]
    value, shapes, locations, weights = inputs(levels, Q=1008, M=4, d=8, P=4, dtype=torch.float32)
    g = torch.randn(2, 1008, 32)
    results = []
    for name in (backend, "grid_sample"):
        tensors = [t.detach().requires_grad_() for t in (value, locations, weights)]
        out = deform_attn(tensors[0], shapes, *tensors[1:], backend=name)
        results.append([out, *torch.autograd.grad(out, tensors, g)])
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())


def test_a_backend_that_is_none_is_named():
    sentence = "the backend is 'cuda'; it is one of auto, triton, embedding_bag, grid_sample"
    with pytest.raises(ValueError, match=sentence):
        deform_attn(*inputs([(3, 4)]), backend="cuda")


def test_auto_on_a_gpu_is_triton_where_it_can_run(monkeypatch):
    monkeypatch.delenv("SST_DEFORM_ATTN")
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    kernel = SimpleNamespace(refusal=lambda *tensors: None)
    monkeypatch.setitem(sys.modules, "sst.deform_attn_triton", kernel)
    assert choose(tensor, tensor, tensor) == "triton"
    kernel.refusal = lambda *tensors: "it takes no float64"
    assert choose(tensor, tensor, tensor) == "grid_sample"
    monkeypatch.setitem(sys.modules, "sst.deform_attn_triton", None)  # as if the package triton were missing
    assert choose(tensor, tensor, tensor) == "grid_sample"


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sst.deform_attn_triton", None)  # as if the package were missing
    sentence = "'triton' needs the package triton, which is not installed; run: pip install triton"
    with pytest.raises(ImportError, match=sentence):
        deform_attn(*inputs([(3, 4)]), backend="triton")


def test_a_batch_without_images():
    value, shapes, locations, weights = inputs([(3, 4), (2, 2)], B=0)
    assert deform_attn(value, shapes, locations, weights).shape == (0, 5, 6)
