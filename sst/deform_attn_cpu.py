"""Deformable attention on CPUs, as a sparse matrix times the values. deform_attn.py says when it is used.

A sample is four pixels with bilinear weights, so a head of a query is a row of a sparse matrix A with 4LP
entries. PyTorch's product of such a matrix with V is called embedding_bag: a bag is a row of A, a list of
rows of V with their weights.
"""

import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def embedding_bag(value, shapes, locations, weights):
    """A V: V the values as a matrix, and A with a row per (image, query, head).

    Takes and returns what `deform_attn` does, in one dtype.
    """
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    R, n = B * Q * M, L * P
    N = sum(pixels(shapes))
    column, x = pixel_before(locations[..., 0], [w for _, w in shapes])
    line, y = pixel_before(locations[..., 1], [h for h, _ in shapes])
    # The row of V that a sample's top left pixel is. V has images, within them pixels, within them heads.
    starts = [sum(pixels(shapes)[:l]) for l in range(L)]
    heads = [M * start + m for m in range(M) for start in starts for _ in range(P)]
    first = torch.tensor(heads, dtype=torch.int32)
    first = first + torch.arange(0, B * N * M, N * M, dtype=torch.int32)[:, None, None]
    first = torch.addcmul(first, column, spelled_out([M] * L, M, P))
    first = torch.addcmul(first, line, spelled_out([M * (w + 2) for _, w in shapes], M, P))  # (B, Q, M*L*P)
    first, x, y, weights = (t.reshape(R, n) for t in (first, x, y, weights))
    return WeightedRows.apply(value, first, x, y, weights, shapes).view(B, Q, M * d)


def spelled_out(per_level, M, P, dtype=torch.int32):
    """A constant of each level for all MLP samples of a query: broadcasting short axes is far slower."""
    return torch.tensor([number for _ in range(M) for number in per_level for _ in range(P)], dtype=dtype)


def pixel_before(coordinate, sizes):
    """The last pixel of the framed map (`frame`) whose centre is not beyond a coordinate, and the rest.

    coordinate: (B, Q, M, L, P), along an axis with sizes[l] pixels on level l.
    Returns the pixel, int32, and the rest, 0 to 1 pixels, both (B, Q, M*L*P).
    """
    M, P = coordinate.shape[2], coordinate.shape[4]
    size = spelled_out(sizes, M, P, coordinate.dtype)
    # 0 is the first centre of the framed map, and what lies outside goes onto the frame.
    place = torch.addcmul(torch.full_like(size, 0.5), coordinate.flatten(2), size)
    place = place.clamp(torch.zeros_like(size), size + 1)
    last = spelled_out(sizes, M, P)
    pixel = place.detach().to(torch.int32).clamp(torch.zeros_like(last), last)  # a NaN must not leave V
    return pixel, place - pixel


class WeightedRows(torch.autograd.Function):
    """A V and its gradients. A row of A (R, rows of V) holds four neighbouring pixels for each of n samples.

    V is `value` (B, S, M, d), the maps framed: N pixels in all, B*N*M rows of d.
    first:   (R, n) int32, the row of V that is the top left pixel.
    x, y:    (R, n), how far right of and below its centre the sample lies, 0 to 1.
    weights: (R, n).
    """

    @staticmethod
    def forward(ctx, value, first, x, y, weights, shapes):
        V = frame(value, shapes)
        samples = torch.stack([x, y, weights])  # one tensor: of three, a compiler would recompute two
        ctx.save_for_backward(V, first, samples)
        ctx.shapes, ctx.size = shapes, value.shape
        columns = four_pixels(first, shapes, value.shape[2])
        entries = torch.stack(four_entries(x, y, weights), dim=1)  # (R, 4, n)
        return bags(columns.flatten(), equal_rows(columns), entries.flatten(), V)

    @staticmethod
    def backward(ctx, G):
        V, first, samples = ctx.saved_tensors
        G, grad_value, grad_samples = G.contiguous(), None, (None, None, None)
        if any(ctx.needs_input_grad[2:5]):
            columns = four_pixels(first, ctx.shapes, ctx.size[2])
            grad_samples = gradients_of_samples(G, V, columns, samples)
        if ctx.needs_input_grad[0]:
            grad_value = gradient_of_value(G, len(V), first, samples, ctx.shapes, ctx.size)
        return grad_value, None, *grad_samples, None


def gradients_of_samples(G, V, columns, samples):
    """Those of x, y and weights, (R, n) each: d/dA = G V^T, where A has entries.

    G:       (R, d), the gradient of A V.
    columns: (R, 4, n), where A has entries.
    samples: (3, R, n), x, y and weights.
    """
    if torch.compiler.is_compiling():
        products = (G[:, None, None] * V[columns]).sum(-1)  # fused: the rows of V are never stored
    else:
        zeros = torch.zeros(columns.numel(), dtype=V.dtype)
        A = torch.sparse_csr_tensor(equal_rows(columns), columns.flatten(), zeros, (len(G), len(V)),
                                    check_invariants=False)
        products = torch.sparse.sampled_addmm(A, G, V.t(), beta=0.0).values().view_as(columns)
    upper_left, upper_right, lower_left, lower_right = products.unbind(1)  # (R, n)
    x, y, weights = samples
    upper, lower = torch.lerp(upper_left, upper_right, x), torch.lerp(lower_left, lower_right, x)
    grad_x = weights * torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
    grad_y = weights * (lower - upper)
    return grad_x, grad_y, torch.lerp(upper, lower, y)


def gradient_of_value(G, rows_of_V, first, samples, shapes, size):
    """d/dV = A^T G without the frames, (B, S, M, d).

    The four pixels of a sample stand in a fixed pattern, so one sort by the first transposes all of A. That
    leaves four products, each as if all entries were the top left one. Their results are then added where
    they belong.
    """
    B, _, M, d = size
    row, order = first.flatten().sort()
    starts = torch.searchsorted(row, torch.arange(rows_of_V + 1, dtype=torch.int32), out_int32=True)
    rows_of_G = torch.div(order, first.shape[1], rounding_mode="floor").to(torch.int32)
    sorted_entries = four_entries(*samples.flatten(1).index_select(1, order))
    products = [bags(rows_of_G, starts, entries, G).view(B, -1, M, d) for entries in sorted_entries]
    parts = [product.split(pixels(shapes), dim=1) for product in products]
    maps = []
    for (h, w), level in zip(shapes, zip(*parts)):
        framed = (part.unflatten(1, (h + 2, w + 2)) for part in level)
        upper_left, upper_right, lower_left, lower_right = framed
        maps.append(upper_left[:, 1:-1, 1:-1] + upper_right[:, 1:-1, :-2]
                    + lower_left[:, :-2, 1:-1] + lower_right[:, :-2, :-2])
    return torch.cat([image.flatten(1, 2) for image in maps], dim=1)


def pixels(shapes):
    """Pixels of each framed map."""
    return [(h + 2) * (w + 2) for h, w in shapes]


def frame(value, shapes):
    """value (B, S, M, d) -> (B*N*M, d), each map with a frame of zeros, one pixel wide.

    What lies outside a map is read on its frame, so that nothing asks where a pixel is.
    """
    levels = value.split([h * w for h, w in shapes], dim=1)
    maps = [F.pad(rows.unflatten(1, size), (0, 0, 0, 0, 1, 1, 1, 1)) for rows, size in zip(levels, shapes)]
    return torch.cat([image.flatten(1, 2) for image in maps], dim=1).flatten(0, 2)


def four_pixels(first, shapes, M):
    """Rows of V of the four pixels of each sample, (R, 4, n).

    The first one's neighbours lie M rows on, a line of the map on, and both.
    """
    P = first.shape[1] // len(shapes)
    steps = [[M * (i * (w + 2) + j) for _, w in shapes for _ in range(P)] for i in (0, 1) for j in (0, 1)]
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
    return F.embedding_bag(columns, V, starts, mode="sum", per_sample_weights=entries,
                           include_last_offset=True)
