"""Deformable attention on GPUs: one Triton kernel forward, one backward. deform_attn.py says when it is used.

A row of the output is a query's head: d channels, the weighted sum of 4LP rows of the values, four pixels for
each of LP samples. A program computes a few rows, sample by sample, and keeps their sums in registers:
nothing between inputs and outputs goes through memory. Tensors are read in their own dtype and summed in
float32.

The forward pass and the gradients of locations and weights are deterministic: one program adds up a row, in a
fixed order. The gradient of a value is a sum over many rows, by float32 atomics in the order in which they
arrive: it differs from run to run in the last bits. Under torch.use_deterministic_algorithms it therefore
raises, or warns, as the gradient of PyTorch's grid_sample does on CUDA.
"""

import os
import re
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
PLAIN = ["S", "N", "M"]  # of others Triton makes compile-time facts: that they are 1, or multiples of 16


def too_old(version):
    """Why the kernels cannot run with this version of Triton, in one sentence, or None."""
    major_minor = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if major_minor < [3, 3]:  # it cannot pass a tuple, here `sizes`, to a kernel
        return (f"the kernels need Triton 3.3 or newer, this is {version}; install PyTorch 2.7 or newer, "
                f"which brings it")


def cannot_launch():
    """Why Triton cannot launch any kernel on this machine, in one sentence, or None."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # for its first launch Triton builds a library; what goes wrong has many types
        return f"Triton cannot launch kernels here ({error}); it needs a C compiler and Python's headers"


BROKEN = too_old(triton.__version__)
if torch.cuda.is_available():
    BROKEN = BROKEN or cannot_launch()
    if BROKEN:
        warnings.warn(f"deform_attn: {BROKEN}. The slower grid_sample stands in")


def refusal(value, locations, weights):
    """Why the kernels cannot take these tensors, in one sentence, or None."""
    if BROKEN:
        return BROKEN
    d = value.shape[3]
    if not value.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return (f"it runs on CUDA; these tensors are on {value.device} (TRITON_INTERPRET=1 runs it there, "
                "very slowly)")
    if not DTYPES >= {value.dtype, locations.dtype, weights.dtype}:
        return (f"it takes float32, bfloat16 and float16, not {value.dtype}, {locations.dtype} and "
                f"{weights.dtype}")
    if not 1 <= d <= 256 or d & (d - 1):
        return f"a head has {d} channels; it takes a power of two up to 256"


@triton.jit
def pixel_before(coordinate, n):
    """The pixel whose centre is at or before a coordinate, and how far beyond it that lies, 0 to 1.

    The coordinate runs along n pixels, [0, 1] from edge to edge. What lies far outside is moved to where the
    next pixel is still outside. NaN lies NaN beyond pixel -2: nothing is read for it.
    """
    x = tl.clamp(coordinate.to(tl.float32) * n - 0.5, -2.0, n + 1.0, propagate_nan=tl.PropagateNan.ALL)
    before = tl.floor(x)
    return tl.where(before == before, before, -2.0).to(tl.int32), x - before


@triton.jit
def rows_of_program(N, ROWS: tl.constexpr):
    """The program's image; and (ROWS,) each: its rows in the image, in the batch, and which of them exist."""
    programs = tl.cdiv(N, ROWS)  # an image
    image = (tl.program_id(0) // programs).to(tl.int64)  # times a size it may go beyond 2^31
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    return image, row, image * N + row, row < N


@triton.jit
def read_sample(locations, weights, sample, exists, h, w):
    """A sample's weight; row and column of the top left of its four pixels; how far down and right it lies.

    All (ROWS,).
    """
    weight = tl.load(weights + sample, mask=exists, other=0).to(tl.float32)
    j, x = pixel_before(tl.load(locations + 2 * sample, mask=exists, other=-9), w)  # -9 is outside
    i, y = pixel_before(tl.load(locations + 2 * sample + 1, mask=exists, other=-9), h)
    return weight, i, j, y, x


@triton.jit(do_not_specialize=PLAIN)
def forward_kernel(value, locations, weights, out, sizes, S, N, M,
                   L: tl.constexpr, P: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr):
    """A program computes ROWS of the N = Q*M rows of an image. sizes: (h, w) of all levels in one tuple."""
    image, row, rows, exists = rows_of_program(N, ROWS)
    channel = tl.arange(0, d)
    # (ROWS, d): the level's first pixel, the row's head.
    level = value + image * S * M * d + (row % M * d)[:, None] + channel
    total = tl.zeros((ROWS, d), tl.float32)
    for l in tl.static_range(L):
        h, w = tl.cast(sizes[2 * l], tl.int32), tl.cast(sizes[2 * l + 1], tl.int32)
        for p in range(P):
            sample = rows * (L * P) + l * P + p
            weight, i, j, y, x = read_sample(locations, weights, sample, exists,
                                             sizes[2 * l], sizes[2 * l + 1])
            for lower in tl.static_range(2):
                for right in tl.static_range(2):
                    inside = (i + lower >= 0) & (i + lower < h) & (j + right >= 0) & (j + right < w)
                    pixel = ((i + lower) * w + j + right).to(tl.int64) * (M * d)
                    V = tl.load(level + pixel[:, None], mask=inside[:, None], other=0).to(tl.float32)
                    share = (y if lower else 1 - y) * (x if right else 1 - x)
                    total += (weight * share)[:, None] * V
        level += (h * w).to(tl.int64) * (M * d)
    tl.store(out + rows[:, None] * d + channel, total, mask=exists[:, None])


@triton.jit(do_not_specialize=PLAIN)
def backward_kernel(gradient, value, locations, weights, grad_value, grad_locations, grad_weights, sizes,
                    S, N, M, L: tl.constexpr, P: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr):
    """As forward_kernel. gradient: that of out. grad_value: float32, zeros, to which is added."""
    image, row, rows, exists = rows_of_program(N, ROWS)
    channel = tl.arange(0, d)
    level = image * S * M * d + (row % M * d)[:, None] + channel
    G = tl.load(gradient + rows[:, None] * d + channel, mask=exists[:, None], other=0).to(tl.float32)
    for l in tl.static_range(L):
        h, w = tl.cast(sizes[2 * l], tl.int32), tl.cast(sizes[2 * l + 1], tl.int32)
        for p in range(P):
            sample = rows * (L * P) + l * P + p
            weight, i, j, y, x = read_sample(locations, weights, sample, exists,
                                             sizes[2 * l], sizes[2 * l + 1])
            by_weight, by_y, by_x = tl.zeros_like(y), tl.zeros_like(y), tl.zeros_like(y)
            for lower in tl.static_range(2):
                for right in tl.static_range(2):
                    inside = (i + lower >= 0) & (i + lower < h) & (j + right >= 0) & (j + right < w)
                    pixel = level + (((i + lower) * w + j + right).to(tl.int64) * (M * d))[:, None]
                    V = tl.load(value + pixel, mask=inside[:, None], other=0).to(tl.float32)
                    GV = tl.sum(G * V, axis=1)
                    # The product of these two is the pixel's share.
                    vertical, horizontal = (y if lower else 1 - y), (x if right else 1 - x)
                    by_weight += vertical * horizontal * GV
                    by_y += (horizontal if lower else -horizontal) * GV
                    by_x += (vertical if right else -vertical) * GV
                    tl.atomic_add(grad_value + pixel, (weight * vertical * horizontal)[:, None] * G,
                                  mask=inside[:, None], sem="relaxed")
            tl.store(grad_weights + sample, by_weight, mask=exists)
            tl.store(grad_locations + 2 * sample, weight * by_x * sizes[2 * l + 1], mask=exists)
            tl.store(grad_locations + 2 * sample + 1, weight * by_y * sizes[2 * l], mask=exists)
        level += (h * w).to(tl.int64) * (M * d)


def launch(kernel, tensors, sizes, value, locations, warps, channels):
    """Run a kernel over all rows: programs of so many warps, threads with so many channels of a row."""
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    # Not 1: of an atomic's mask that is one row broadcast, the interpreter reads too far.
    ROWS = max(2, warps * 32 * channels // d)
    # Floats, because Triton compiles anew for an integer that is 1 or a multiple of 16.
    sizes = tuple(float(n) for n in sizes)
    if B * Q * M:
        with torch.cuda.device_of(value):  # Triton launches on the current GPU
            kernel[(B * triton.cdiv(Q * M, ROWS),)](*tensors, sizes, S, Q * M, M, L=L, P=P, d=d, ROWS=ROWS,
                                                    num_warps=warps)


@torch.library.custom_op("sst::deform_attn", mutates_args=())
def operator(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    tensors = [t.contiguous() for t in (value, locations, weights)]
    out = output(value, sizes, locations, weights)
    channels = 16 // value.element_size()  # 16 bytes of a row are the widest load that a thread can do
    launch(forward_kernel, (*tensors, out), sizes, value, locations, warps=4, channels=channels)
    return out


@torch.library.custom_op("sst::deform_attn_backward", mutates_args=())
def operator_backward(gradient: Tensor, value: Tensor, sizes: list[int], locations: Tensor,
                      weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if torch.are_deterministic_algorithms_enabled():
        message = "deform_attn: the gradient to the values has no deterministic implementation on CUDA"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(f"{message}; torch.use_deterministic_algorithms(True, warn_only=True) only "
                               f"warns of it")
        warnings.warn(message)
    tensors = [t.contiguous() for t in (gradient, value, locations, weights)]
    grad_value = torch.zeros_like(tensors[1], dtype=torch.float32)
    grad_locations, grad_weights = (torch.empty_like(t) for t in tensors[2:])
    # The widest atomic adds four floats. A single warp sums and changes layouts without waiting for others.
    outputs = (grad_value, grad_locations, grad_weights)
    launch(backward_kernel, (*tensors, *outputs), sizes, value, locations, warps=1, channels=4)
    return grad_value.to(value.dtype), grad_locations, grad_weights


@operator.register_fake
def output(value, sizes, locations, weights):
    B, Q, M = locations.shape[:3]
    return value.new_empty(B, Q, M * value.shape[3])


@operator_backward.register_fake
def _(gradient, value, sizes, locations, weights):
    tensors = (value, locations, weights)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def setup_context(ctx, inputs, output):
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def backward(ctx, gradient):
    value, locations, weights = ctx.saved_tensors
    grad_value, *others = operator_backward(gradient, value, ctx.sizes, locations, weights)
    return grad_value, None, *others


operator.register_autograd(backward, setup_context=setup_context)


def attend(value, shapes, locations, weights):
    """As `deform_attn`. Raises ValueError for tensors that the kernels cannot take."""
    reason = refusal(value, locations, weights)
    if reason:
        raise ValueError(f"deform_attn: the backend is 'triton'; {reason}")
    return operator(value, [n for size in shapes for n in size], locations, weights)
