"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, Eq. 3), the operator of the encoder.

Ordinary attention lets a query look at every pixel. A deformable query looks at P points on each of L maps, at places that
it chooses itself. A place between pixels is read bilinearly, from four pixels. So a query's answer is a weighted sum of 4LP
rows of the value matrix, out of thousands: attention with a sparse matrix. Two bodies compute it in plain PyTorch:
`sparse_product` builds that matrix and multiplies, `grid_sample` reads the maps as images. A third, for GPUs, is the Triton
kernel of deform_attn_triton.py. They agree to round-off.
"""

import os
import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def deform_attn(value, shapes, locations, weights, backend="auto"):
    """Sum over levels and points of weights * (value at locations, read bilinearly; zero outside the map).

    value:     (B, S, M, D/M) rows of all levels, one after another; S = sum of H*W; M heads.
    shapes:    [(H_1, W_1), ...] of the L levels.
    locations: (B, Q, M, L, P, 2), x then y; [0, 1] spans a map from outer edge to outer edge, pixel centres at (i + 0.5)/W.
    weights:   (B, Q, M, L, P).
    backend:   "triton", "sparse", "grid_sample", or "auto" for the fastest that can run; the environment's SST_DEFORM_ATTN replaces "auto".
    Returns (B, Q, D). Raises ValueError for shapes that do not belong together, backends that are none and tensors that "triton" cannot
    take, ImportError for "triton" where it is not installed.
    """
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    if sum(h * w for h, w in shapes) != S or locations.shape != (B, Q, M, len(shapes), P, 2) or weights.shape != (B, Q, M, L, P):
        raise ValueError(f"deform_attn: value {tuple(value.shape)}, shapes {list(shapes)}, locations {tuple(locations.shape)} and "
                         f"weights {tuple(weights.shape)} do not fit (B, S, M, D/M), L x (H, W) with S = sum of H*W, "
                         f"(B, Q, M, L, P, 2), (B, Q, M, L, P)")
    backend = choose(value, locations, weights, backend)
    if backend == "triton":
        try:
            from .deform_attn_triton import attend
        except ImportError:
            raise ImportError("deform_attn: the backend 'triton' needs the package triton, which is not installed; "
                              "run: pip install triton") from None
        return attend(value, shapes, locations, weights)  # reads every tensor in its own dtype
    # Sampling places must not be rounded to bfloat16 under autocast: it would move them by a tenth of a pixel and more.
    precise = torch.promote_types(value.dtype, locations.dtype)
    with torch.autocast(value.device.type, enabled=False):
        out = PYTORCH[backend](value.to(precise), shapes, locations.to(precise), weights.to(precise))
    return out.to(value.dtype)


def choose(value, locations, weights, backend="auto"):
    """The name of the backend: the one place where it is chosen."""
    if backend == "auto":
        backend = os.environ.get("SST_DEFORM_ATTN", "auto")
    if backend == "auto" and value.is_cuda:
        try:
            from .deform_attn_triton import refusal
            backend = "grid_sample" if refusal(value, locations, weights) else "triton"
        except ImportError:
            backend = "grid_sample"
    elif backend == "auto":
        # PyTorch multiplies sparse matrices by MKL, eagerly: a compiled or exported graph cannot hold them.
        sparse = value.device.type == "cpu" and torch.backends.mkl.is_available() and not torch.compiler.is_compiling()
        backend = "sparse" if sparse else "grid_sample"
    if backend != "triton" and backend not in PYTORCH:
        raise ValueError(f"deform_attn: the backend is {backend!r}; it is one of auto, triton, {', '.join(PYTORCH)}")
    return backend


def grid_sample(value, shapes, locations, weights):
    """Every map an image, every head a batch entry, read at the locations: (B*M, D/M, Q, L*P) samples, then their weighted sum."""
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    grid = 2 * locations - 1  # grid_sample counts from -1 to 1
    samples = []
    for l, (rows, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes)):
        image = rows.permute(0, 2, 3, 1).reshape(B * M, d, h, w)
        samples.append(F.grid_sample(image, grid[:, :, :, l].transpose(1, 2).flatten(0, 1), mode="bilinear", padding_mode="zeros",
                                     align_corners=False))  # (B*M, d, Q, P)
    samples = torch.stack(samples, dim=3).flatten(3)  # (B*M, d, Q, L*P)
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    out = (samples * weights).sum(-1)  # (B*M, d, Q)
    return out.view(B, M * d, Q).transpose(1, 2)


def sparse_product(value, shapes, locations, weights):
    """A V: V the values as a matrix, and A with a row per (image, query, head) that has 4LP entries, four pixels for each sample."""
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    # Each map gets a frame of zeros, one pixel wide. What lies outside falls onto it, so nothing asks where a pixel is.
    framed = [(h + 2, w + 2) for h, w in shapes]
    N, integer, real = sum(h * w for h, w in framed), torch.int32, locations.dtype

    # Constants are spelled out along (M, L, P): broadcasting over short last axes is many times slower.
    def constant(per_level, dtype=integer):
        return torch.tensor(per_level, dtype=dtype).view(L, 1, -1).expand(M, L, P, -1).contiguous().squeeze(-1)
    size, last = constant([[w, h] for h, w in shapes], real), constant([[w + 1, h + 1] for h, w in shapes], real)
    place = torch.addcmul(torch.full_like(size, 0.5), locations, size)  # in pixels of the framed map, 0 on its first centre
    place = place.clamp(torch.zeros_like(last), last)
    corner = place.detach().to(integer)  # top left of the four pixels; a place that is not a number must not lead outside V
    corner = corner.clamp(torch.zeros_like(corner[0, 0]), constant([[w, h] for h, w in shapes]))
    x, y = (place - corner).unbind(-1)  # 0 to 1 within the square of the four, (B, Q, M, L, P)

    # The row of V that the top left pixel is: V has the images one below the other, then pixels, then heads.
    starts = [sum(h * w for h, w in framed[:l]) for l in range(L)]
    first = constant(starts) * M + torch.arange(M, dtype=integer)[:, None, None]
    first = first + torch.arange(0, B * N * M, N * M, dtype=integer)[:, None, None, None, None]
    first = torch.addcmul(first, corner[..., 0], constant([M] * L))
    first = torch.addcmul(first, corner[..., 1], constant([w * M for _, w in framed]))

    lower = weights * y
    upper = weights - lower
    lower_right, upper_right = lower * x, upper * x
    corners = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], dim=-1)  # the four entries of a sample
    out = SparseProduct.apply(value, first.view(B * Q * M, L * P), corners.view(B * Q * M, L * P, 4), shapes)
    return out.view(B, Q, M * d)


class SparseProduct(torch.autograd.Function):
    """A V and its gradients, where A (R, rows of V) is sparse: row r holds, for each of n samples, four neighbouring pixels.

    V is `value` (B, S, M, d), the maps framed: N pixels in all, B*N*M rows of d. first (R, n) int32: row of V of the top left pixel;
    its neighbours are M rows, a line of the map, and both, further on. corners (R, n, 4): the entries of A.
    """

    @staticmethod
    def forward(ctx, value, first, corners, shapes):
        V, M = frame(value, shapes), value.shape[2]
        samples = first.shape[1] // len(shapes)
        steps = [[0, M, (w + 2) * M, (w + 3) * M] for _, w in shapes for _ in range(samples)]  # (n, 4)
        columns = first[:, :, None] + torch.tensor(steps, dtype=torch.int32)  # (R, n, 4)
        ctx.save_for_backward(V, first, corners, columns)
        ctx.shapes, ctx.size = shapes, value.shape
        return equal_rows(columns, corners, len(V)) @ V

    @staticmethod
    def backward(ctx, G):
        V, first, corners, columns = ctx.saved_tensors
        G, grad_value, grad_corners = G.contiguous(), None, None
        if ctx.needs_input_grad[2]:  # d/dA: G V^T, where A has entries
            pattern = equal_rows(columns, torch.zeros_like(corners), len(V))
            grad_corners = torch.sparse.sampled_addmm(pattern, G, V.t(), beta=0.0).values().view_as(corners)
        if ctx.needs_input_grad[0]:  # d/dV: A^T G
            # The four corners of a sample stand in a fixed pattern, so that one sort by the first transposes all of A: four products,
            # each as if all entries were the top left one, whose results are then moved to where they belong.
            order = first.flatten().argsort()
            starts = F.pad(torch.bincount(first.flatten(), minlength=len(V)).cumsum(0), (1, 0)).to(torch.int32)
            rows = torch.div(order, first.shape[1], rounding_mode="floor").to(torch.int32)
            entries = corners.flatten(0, 1)[order].t().contiguous()  # (4, R*n)
            B, _, M, d = ctx.size
            upper, upper_right, lower, lower_right = ((csr(starts, rows, e, len(G)) @ G).view(B, -1, M, d) for e in entries)
            upper[:, 1:] += upper_right[:, :-1]
            lower[:, 1:] += lower_right[:, :-1]
            maps = []
            for above, below, (h, w) in zip(*(part.split(pixels(ctx.shapes), dim=1) for part in (upper, lower)), ctx.shapes):
                above[:, w + 2:] += below[:, :-w - 2]
                maps.append(above.unflatten(1, (h + 2, w + 2))[:, 1:-1, 1:-1].flatten(1, 2))
            grad_value = torch.cat(maps, dim=1)
        return grad_value, None, grad_corners, None


def pixels(shapes):
    """Pixels of each framed map."""
    return [(h + 2) * (w + 2) for h, w in shapes]


def frame(value, shapes):
    """value (B, S, M, d) -> (B*N*M, d), each map with a frame of zeros, one pixel wide."""
    B, S, M, d = value.shape
    V = value.new_zeros(B, sum(pixels(shapes)), M, d)
    for rows, (h, w), inner in zip(V.split(pixels(shapes), dim=1), shapes, value.split([h * w for h, w in shapes], dim=1)):
        rows.unflatten(1, (h + 2, w + 2))[:, 1:-1, 1:-1] = inner.unflatten(1, (h, w))
    return V.view(-1, d)


def equal_rows(columns, entries, width):
    """The sparse matrix whose rows have the same number of entries: columns, entries (R, ...)."""
    starts = torch.arange(0, columns.numel() + 1, columns[0].numel(), dtype=torch.int32)
    return csr(starts, columns, entries, width)


def csr(starts, columns, entries, width):
    """A sparse matrix in compressed rows: row r has the entries starts[r] to starts[r + 1]."""
    return torch.sparse_csr_tensor(starts, columns.flatten(), entries.flatten(), (len(starts) - 1, width), check_invariants=False)


PYTORCH = {"sparse": sparse_product, "grid_sample": grid_sample}
