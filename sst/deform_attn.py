"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, Eq. 3), the operator of the encoder.

Ordinary attention lets a query look at every pixel. A deformable query looks at P points on each of L maps, at places that
it chooses itself. A place between pixels is read bilinearly, from four pixels. So a query's answer is a weighted sum of 4LP
rows of the value matrix, out of thousands: attention with a sparse matrix. Two bodies compute it in plain PyTorch:
`embedding_bag` builds that matrix and multiplies, `grid_sample` reads the maps as images. A third, for GPUs, is the Triton
kernel of deform_attn_triton.py. They agree to round-off.
"""

import os
import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
# PyTorch 2.6 cannot tell that a graph is exported from that it is compiled.
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def deform_attn(value, shapes, locations, weights, backend="auto"):
    """Sum over levels and points of weights * (value at locations, read bilinearly; zero outside the map).

    value:     (B, S, M, D/M) rows of all levels, one after another; S = sum of H*W; M heads.
    shapes:    [(H_1, W_1), ...] of the L levels.
    locations: (B, Q, M, L, P, 2), x then y; [0, 1] spans a map from outer edge to outer edge, pixel centres at (i + 0.5)/W.
    weights:   (B, Q, M, L, P).
    backend:   "triton", "embedding_bag", "grid_sample" or "auto", the fastest that can run; the environment's SST_DEFORM_ATTN replaces "auto".
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
        # ONNX has no embedding bags.
        backend = "embedding_bag" if value.device.type == "cpu" and not exporting() else "grid_sample"
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


def embedding_bag(value, shapes, locations, weights):
    """A V: V the values as a matrix, and A with a row per (image, query, head) that has 4LP entries, four pixels for each sample.

    PyTorch's product of such a matrix is called embedding_bag: a bag is a row of A, a list of rows of V with their weights.
    """
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    R, n = B * Q * M, L * P
    N = sum(pixels(shapes))
    column, x = pixel_before(locations[..., 0], [w for _, w in shapes])
    line, y = pixel_before(locations[..., 1], [h for h, _ in shapes])
    # The row of V that the top left of a sample's pixels is: V has the images one below the other, then pixels, then heads.
    starts = [sum(pixels(shapes)[:l]) for l in range(L)]
    first = torch.tensor([M * start + m for m in range(M) for start in starts for _ in range(P)], dtype=torch.int32)
    first = first + torch.arange(0, B * N * M, N * M, dtype=torch.int32)[:, None, None]
    first = torch.addcmul(first, column, spelled_out([M] * L, M, P))
    first = torch.addcmul(first, line, spelled_out([M * (w + 2) for _, w in shapes], M, P))  # (B, Q, M*L*P)
    out = WeightedRows.apply(value, first.view(R, n), x.view(R, n), y.view(R, n), weights.reshape(R, n), shapes)
    return out.view(B, Q, M * d)


def spelled_out(per_level, M, P, dtype=torch.int32):
    """A constant of each level for all MLP samples of a query: broadcasting over short axes is many times slower."""
    return torch.tensor([number for _ in range(M) for number in per_level for _ in range(P)], dtype=dtype)


def pixel_before(coordinate, sizes):
    """Coordinates (B, Q, M, L, P) along an axis with so many pixels on each level -> the pixel of the framed map (`frame`) whose centre
    is at or before them, int32, and how far beyond it they lie, 0 to 1; both (B, Q, M*L*P).
    """
    M, P = coordinate.shape[2], coordinate.shape[4]
    size = spelled_out(sizes, M, P, coordinate.dtype)
    place = torch.addcmul(torch.full_like(size, 0.5), coordinate.flatten(2), size)  # 0 on the first centre of the framed map
    place = place.clamp(torch.zeros_like(size), size + 1)  # what lies outside goes onto the frame
    last = spelled_out(sizes, M, P)
    pixel = place.detach().to(torch.int32).clamp(torch.zeros_like(last), last)  # a NaN must not lead outside V
    return pixel, place - pixel


class WeightedRows(torch.autograd.Function):
    """A V and its gradients, where A (R, rows of V) is sparse: row r holds, for each of n samples, four neighbouring pixels.

    V is `value` (B, S, M, d), the maps framed: N pixels in all, B*N*M rows of d. first (R, n) int32: row of V of the top left pixel.
    x, y (R, n): how far right of and below its centre the sample lies, 0 to 1. weights (R, n).
    """

    @staticmethod
    def forward(ctx, value, first, x, y, weights, shapes):
        V = frame(value, shapes)
        ctx.save_for_backward(V, first, torch.stack([x, y, weights]))  # one tensor: of three, a compiler would recompute two
        ctx.shapes, ctx.size = shapes, value.shape
        columns = four_pixels(first, shapes, value.shape[2])
        entries = torch.stack(four_entries(x, y, weights), dim=1)  # (R, 4, n)
        return bags(columns.flatten(), equal_rows(columns), entries.flatten(), V)

    @staticmethod
    def backward(ctx, G):
        V, first, samples = ctx.saved_tensors
        shapes, (B, _, M, d) = ctx.shapes, ctx.size
        G, grad_value, grad_x, grad_y, grad_weights = G.contiguous(), None, None, None, None
        if any(ctx.needs_input_grad[2:5]):
            # d/dA: G V^T, where A has entries
            columns = four_pixels(first, shapes, M)
            if torch.compiler.is_compiling():
                products = (G[:, None, None] * V[columns]).sum(-1)  # fused: the rows of V are never stored
            else:
                zeros = torch.zeros(columns.numel(), dtype=V.dtype)
                A = torch.sparse_csr_tensor(equal_rows(columns), columns.flatten(), zeros, (len(G), len(V)), check_invariants=False)
                products = torch.sparse.sampled_addmm(A, G, V.t(), beta=0.0).values().view_as(columns)
            upper_left, upper_right, lower_left, lower_right = products.unbind(1)  # (R, n)
            x, y, weights = samples
            upper, lower = torch.lerp(upper_left, upper_right, x), torch.lerp(lower_left, lower_right, x)
            grad_x = weights * torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
            grad_y = weights * (lower - upper)
            grad_weights = torch.lerp(upper, lower, y)
        if ctx.needs_input_grad[0]:
            # d/dV: A^T G. The four pixels of a sample stand in a fixed pattern, so that one sort by the first transposes all of A: four
            # products, each as if all entries were the top left one, whose results are then added where they belong.
            row, order = first.flatten().sort()
            starts = torch.searchsorted(row, torch.arange(len(V) + 1, dtype=torch.int32), out_int32=True)
            rows_of_G = torch.div(order, first.shape[1], rounding_mode="floor").to(torch.int32)
            sorted_entries = four_entries(*samples.flatten(1).index_select(1, order))
            parts = [bags(rows_of_G, starts, e, G).view(B, -1, M, d).split(pixels(shapes), dim=1) for e in sorted_entries]
            maps = []
            for (h, w), level in zip(shapes, zip(*parts)):
                upper_left, upper_right, lower_left, lower_right = (part.unflatten(1, (h + 2, w + 2)) for part in level)
                maps.append(upper_left[:, 1:-1, 1:-1] + upper_right[:, 1:-1, :-2] + lower_left[:, :-2, 1:-1] + lower_right[:, :-2, :-2])
            grad_value = torch.cat([image.flatten(1, 2) for image in maps], dim=1)
        return grad_value, None, grad_x, grad_y, grad_weights, None


def pixels(shapes):
    """Pixels of each framed map."""
    return [(h + 2) * (w + 2) for h, w in shapes]


def frame(value, shapes):
    """value (B, S, M, d) -> (B*N*M, d), each map with a frame of zeros, one pixel wide.

    What lies outside a map is read on its frame, so that nothing asks where a pixel is.
    """
    maps = [rows.unflatten(1, size) for rows, size in zip(value.split([h * w for h, w in shapes], dim=1), shapes)]
    return torch.cat([F.pad(image, (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2) for image in maps], dim=1).flatten(0, 2)


def four_pixels(first, shapes, M):
    """Rows of V of the four pixels of each sample, (R, 4, n): the neighbours of the first are M rows, a line of the map, and both, on."""
    P = first.shape[1] // len(shapes)
    steps = [[M * (i * (w + 2) + j) for _, w in shapes for _ in range(P)] for i in (0, 1) for j in (0, 1)]  # (4, n)
    return torch.stack([first + torch.tensor(step, dtype=torch.int32) for step in steps], dim=1)


def four_entries(x, y, weights):
    """The entries of A for the four pixels: a sample's weight, shared out bilinearly."""
    lower = weights * y
    upper = weights - lower
    lower_right, upper_right = lower * x, upper * x
    return upper - upper_right, upper_right, lower - lower_right, lower_right


def equal_rows(columns):
    """Where rows with equally many entries start, and where the last ends: columns (R, ...) -> (R + 1,)."""
    return torch.arange(0, columns.numel() + 1, columns.shape[1:].numel(), dtype=torch.int32)


def bags(columns, starts, entries, V):
    """The product with V of the sparse matrix whose row r has the entries starts[r] to starts[r + 1]."""
    return F.embedding_bag(columns, V, starts, mode="sum", per_sample_weights=entries, include_last_offset=True)


PYTORCH = {"embedding_bag": embedding_bag, "grid_sample": grid_sample}
