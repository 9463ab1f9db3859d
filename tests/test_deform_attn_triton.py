"""The Triton kernels: on a GPU where there is one, in Triton's interpreter, and compiled for A100 and H100.

TRITON_INTERPRET is read when Triton is imported, and interpreted kernels cannot be compiled. So
`test_in_the_interpreter` runs this file again with it, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_deform_attn import by_definition, inputs

from sst.deform_attn import deform_attn

triton = pytest.importorskip("triton", reason="the package triton is not installed; run: pip install triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402

from sst import deform_attn_triton  # noqa: E402

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
OLD = deform_attn_triton.too_old(triton.__version__)
runs = pytest.mark.skipif(bool(OLD) or not INTERPRETED and not torch.cuda.is_available(),
                          reason=OLD or "no GPU; test_in_the_interpreter runs it")
new_enough = pytest.mark.skipif(bool(OLD), reason=OLD or "")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")

SHAPES = [[(4, 4)], [(3, 5), (2, 2)], [(1, 1), (1, 7), (6, 2)]]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@not_interpreted
def test_in_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "slow", __file__],
                         env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@not_interpreted
@new_enough
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_compiles_ahead_of_time(dtype, capability, monkeypatch, tmp_path):
    """Both kernels, with the very arguments that the operator launches them with, down to machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    built = []

    class Compile:
        """Stands for a kernel and compiles it where it would be launched."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, num_warps, **constants):
            signature = dict.fromkeys(self.kernel.arg_names, "constexpr")
            for name, arg in zip(signature, args):
                signature[name] = (pointers[arg.dtype] if torch.is_tensor(arg) else
                                   "i32" if isinstance(arg, int) else ("fp32",) * len(arg))
            attrs = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if torch.is_tensor(arg)}
            source = ASTSource(self.kernel, signature, constants, attrs)
            built.append((compile(source, target=GPUTarget("cuda", capability, 32),
                                  options={"num_warps": num_warps}), constants["ROWS"]))

    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(deform_attn_triton, name, Compile(getattr(deform_attn_triton, name)))
    value, shapes, locations, weights = inputs([(8, 8), (4, 4)], d=32, dtype=torch.float32)
    sizes = [n for size in shapes for n in size]
    out = deform_attn_triton.operator(value.to(dtype), sizes, locations, weights)
    deform_attn_triton.operator_backward(out, value.to(dtype), sizes, locations, weights)
    assert len(built) == 2
    for kernel, _ in built:
        ptx = kernel.asm["ptx"]
        assert len(kernel.asm["cubin"]) > 1000
        assert "ld.global.v4.b32" in ptx or "ld.global.v2.b32" in ptx  # rows by 16 or 8 bytes a thread
    (forward, _), (backward, rows) = built
    assert forward.metadata.shared == 0  # all in registers
    # Triton before 3.5 changes the layout of three sums in shared memory, one after another: a float32 a row.
    before_3_5 = [int(number) for number in triton.__version__.split(".")[:2]] < [3, 5]
    assert backward.metadata.shared <= (4 * rows if before_3_5 else 0) and rows == 4


TOO_OLD = "the kernels need Triton 3.3 or newer, this is {}; install PyTorch 2.7 or newer, which brings it"


@pytest.mark.parametrize("version, old", [("2.3.1", True), ("3.2.0", True), ("3.2.0+git35c6c7c6", True),
                                          ("3.3", False), ("3.3.0+git", False), ("3.10.1", False)])
def test_versions_of_triton(version, old):
    assert deform_attn_triton.too_old(version) == (TOO_OLD.format(version) if old else None)


@not_interpreted
def test_triton_that_is_too_old_is_never_launched():
    """The version is the only reason to refuse: the interpreter takes these tensors. A launch would fail."""
    code = """if True:
        import types, torch, triton
        triton.__version__ = "3.2.0"
        torch.cuda.is_available = lambda: True
        from sst import deform_attn_triton
        from sst.deform_attn import choose, deform_attn
        deform_attn_triton.launch = None
        tensor = types.SimpleNamespace(is_cuda=True, shape=(1, 1, 1, 32), dtype=torch.float32)
        print("auto:", choose(tensor, tensor, tensor))
        ones = torch.ones(1, 1, 1, 1, 1, 2)
        try:
            deform_attn(ones[0, 0], [(1, 1)], ones, ones[..., 0], backend="triton")
        except ValueError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"TRITON_INTERPRET": "1"})
    why = TOO_OLD.format("3.2.0")
    assert run.stdout == f"auto: grid_sample\ndeform_attn: the backend is 'triton'; {why}\n", run.stderr
    assert run.stderr.count(f"UserWarning: deform_attn: {why}. The slower grid_sample stands in") == 1


@not_interpreted
@new_enough
def test_triton_that_cannot_launch_is_said_once():
    """Without a GPU there is no driver to launch with; where there is one, let Triton find no compiler."""
    code = """if True:
        import types, torch
        torch.cuda.is_available = lambda: True
        from sst.deform_attn_triton import refusal
        for _ in range(2):
            tensor = types.SimpleNamespace(is_cuda=True, shape=(1, 1, 1, 32), dtype=torch.float32)
            print(refusal(tensor, tensor, tensor))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"CC": "no-compiler", "TRITON_CACHE_DIR": os.devnull})
    assert run.stdout.count("Triton cannot launch kernels here") == 2
    assert run.stderr.count("UserWarning: deform_attn: Triton cannot launch kernels here") == 1


def attend(value, shapes, locations, weights):
    return deform_attn(value, shapes, locations, weights, backend="triton")


def cast(args, dtype=torch.float32):
    """value in dtype, the rest in float32, on the device, all wanting gradients; and a copy in float64."""
    value, shapes, locations, weights = args
    dtypes = (dtype, torch.float32, torch.float32)
    tensors = [t.to(DEVICE, x).requires_grad_() for t, x in zip((value, locations, weights), dtypes)]
    exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
    return [(v, shapes, l, w) for v, l, w in (tensors, exact)]


def close(actual, expected, tolerance):
    atol = tolerance * max(1, expected.abs().max().item())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=atol)


@runs
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_equals_the_definition_and_its_gradients(shapes, dtype):
    args, exact = cast(inputs(shapes, d=4, Q=7), dtype)
    out, expected = attend(*args), by_definition(*exact)
    assert out.dtype == dtype
    close(out, expected, TOLERANCE[dtype])
    G = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    gradients = torch.autograd.grad(out, (args[0], *args[2:]), G)
    true_gradients = torch.autograd.grad(expected, (exact[0], *exact[2:]), G.cpu().double())
    for gradient, true in zip(gradients, true_gradients):
        close(gradient, true, TOLERANCE[dtype])
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]


@runs
@pytest.mark.parametrize("d", [1, 2, 16, 256])
def test_heads_of_any_supported_width(d):
    args, exact = cast(inputs([(3, 5)], d=d, Q=3, M=3))
    out, expected = attend(*args), by_definition(*exact)
    close(out, expected, 1e-5)
    gradients, true_gradients = (torch.autograd.grad(o.sum(), (a[0], *a[2:]))
                                 for o, a in ((out, args), (expected, exact)))
    for gradient, true in zip(gradients, true_gradients):
        close(gradient, true, 1e-5)


@runs
def test_places_on_centres_edges_and_far_outside():
    shapes = [(2, 3), (1, 1)]
    ticks = [-1e30, -9, -1.0, -1 / 3, -1 / 6, 0, 1 / 6, 0.25, 0.5, 0.75, 5 / 6, 1, 7 / 6, 4 / 3, 9, 1e30]
    ticks = torch.tensor(ticks)
    places = torch.cartesian_prod(ticks, ticks)[None, :, None, None, None].expand(1, -1, 1, 2, 1, 2)
    value = inputs(shapes, B=1, M=1, d=4)[0]
    args, exact = cast((value, shapes, places, torch.ones(1, len(ticks) ** 2, 1, 2, 1)))
    close(attend(*args), by_definition(*exact), 1e-6)
    # Outside means: no pixel's share is left, so that nothing depends on the place or the weight.
    far = (places.abs() > 5).any(-1)
    for gradient in torch.autograd.grad(attend(*args).sum(), args[2:]):
        assert (gradient.cpu()[far] == 0).all() and gradient.isfinite().all()


@runs
@pytest.mark.parametrize("place", [torch.nan, torch.inf, -torch.inf])
def test_a_place_that_is_not_a_number_breaks_nothing_else(place):
    args, _ = cast(inputs([(3, 4), (2, 2)], B=1, d=4))
    good = attend(*args).view(5, 2, 4)
    value, shapes, locations, weights = args
    broken = locations.detach().clone()
    broken[0, 2, 1] = place
    out = attend(value, shapes, broken, weights).view(5, 2, 4)
    keep = torch.ones(5, 2, dtype=torch.bool, device=DEVICE)
    keep[2, 1] = False
    assert torch.equal(out[keep], good[keep])
    # NaN is heard of; infinitely far is outside.
    assert (out[2, 1].isnan() if place != place else out[2, 1] == 0).all()
    assert torch.autograd.grad(out.sum(), value)[0].isfinite().all()


@runs
def test_bfloat16_values_under_autocast_do_not_move_the_places():
    args, _ = cast(inputs([(64, 64)], spread=1.0, d=4))
    rounded = args[0].detach().bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attend(rounded, *args[1:])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(rounded.float(), *args[1:]), rtol=1e-2, atol=1e-3)


@runs
def test_tensors_with_any_strides():
    args, exact = cast(inputs([(3, 5), (2, 2)], d=4))
    strange = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
               for t in (args[0], *args[2:])]
    out, expected = attend(strange[0], args[1], *strange[1:]), by_definition(*exact)
    close(out, expected, 1e-5)
    G = torch.ones_like(out[:, :, :1]).expand_as(out)
    true_gradients = torch.autograd.grad(expected.sum(), (exact[0], *exact[2:]))
    for gradient, true in zip(torch.autograd.grad(out, strange, G), true_gradients):
        close(gradient, true, 1e-5)


@runs
def test_no_queries():
    args, _ = cast(inputs([(3, 5)], d=4, Q=0))
    out = attend(*args)
    assert out.shape == (2, 0, 8)
    assert (torch.autograd.grad(out.sum(), args[0])[0] == 0).all()


@runs
@pytest.mark.parametrize("B, side", [(1, 2897), (130, 256)])
def test_more_than_2_to_the_31_numbers(B, side):
    """In one image, and before the last image begins; 4 GB of zeros, of which what is read takes memory."""
    value = torch.from_numpy(np.zeros((B, side * side + 1, 1, 256), dtype=np.float16)).to(DEVICE)
    assert value.numel() > 2 ** 31
    # The last pixel of a large level, and a level of one pixel.
    value[-1, -2:] = torch.tensor([[[2.0]], [[3.0]]])
    centres = torch.tensor([1 - 0.5 / side, 0.5], device=DEVICE)[:, None, None].expand(B, 1, 1, 2, 1, 2)
    out = attend(value, [(side, side), (1, 1)], centres, torch.ones(B, 1, 1, 2, 1, device=DEVICE))
    torch.testing.assert_close(out[-1], torch.full_like(out[-1], 5), rtol=1e-3, atol=0)


@runs
def test_pytorch_sees_through_the_operators():
    value, shapes, locations, weights = cast(inputs([(3, 5), (2, 2)], d=4))[0]
    sizes = [n for size in shapes for n in size]
    torch.library.opcheck(deform_attn_triton.operator, (value, sizes, locations, weights))
    G = torch.randn(2, 5, 8, device=DEVICE)
    value, locations, weights = (t.detach() for t in (value, locations, weights))
    torch.library.opcheck(deform_attn_triton.operator_backward, (G, value, sizes, locations, weights))


@runs
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_into_one_graph(dynamic):
    args, _ = cast(inputs([(3, 5), (2, 2)], d=4))
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    one, two = ([out, *torch.autograd.grad(out.sum(), (args[0], *args[2:]))]
                for out in (compiled(*args), attend(*args)))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b)


@runs
def test_what_is_deterministic():
    args, _ = cast(inputs([(3, 5), (2, 2)], d=4))
    try:
        torch.use_deterministic_algorithms(True)
        out = attend(*args)
        with pytest.raises(RuntimeError, match="gradient to the values has no deterministic implementation"):
            out.sum().backward()
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="gradient to the values has no deterministic implementation"):
            attend(*args).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@runs
@pytest.mark.parametrize("what, dtype, d", [("a head has 3 channels", torch.float32, 3),
                                           ("512 channels", torch.float32, 512),
                                           ("not torch.float64", torch.float64, 4)])
def test_what_the_kernels_cannot_take_is_named(what, dtype, d):
    value, shapes, locations, weights = inputs([(3, 4)], d=d, dtype=dtype)
    with pytest.raises(ValueError, match=what):
        attend(value.to(DEVICE), shapes, locations.to(DEVICE), weights.to(DEVICE))
