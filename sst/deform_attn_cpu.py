"""Deformable attention on CPUs, as a sparse matrix times the values. deform_attn.py says when it is used.

A sample is four pixels with bilinear weights, so a head of a query is a row of a sparse matrix A with 4LP
entries. PyTorch's product of such a matrix with V is called embedding_bag: a bag is a row of A, a list of
rows of V with their weights.
"""

import warnings

import torch
import torch.nn.functional as F

# Pixels around each map, all zeros. What lies outside is read there, and since all its four pixels are zeros,
# so is the gradient of its place: nothing asks where a sample is.
FRAME = 2

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def embedding_bag(value, shapes, locations, weights):
    """A V: V the values as a matrix, and A with a row per (image, query, head).

    Takes and returns what `deform_attn` does, in one dtype.
    """
    return WeightedRows.apply(value, locations, weights, shapes)


class WeightedRows(torch.autograd.Function):
    """A V and its gradients. A row of A (R, rows of V) holds four neighbouring pixels for each of n samples.

    V is `value` (B, S, M, d), the maps framed: N pixels in all, B*N*M rows of d. R = B*Q*M and n = L*P.
    """

    @staticmethod
    def forward(ctx, value, locations, weights, shapes):
        V = frame(value, shapes)
        first, x, y = places(locations, shapes)
        samples = torch.stack([x, y, weights.reshape(x.shape)])  # of three, a compiler recomputes two
        columns = four_pixels(first, shapes, value.shape[2])
        ctx.save_for_backward(V, first, samples)  # not the columns, which are four times as large
        ctx.shapes, ctx.size = shapes, value.shape
        entries = torch.stack(four_entries(*samples), dim=1)  # (R, 4, n)
        out = bags(columns.flatten(), equal_rows(columns), entries.flatten(), V)
        return out.view(*locations.shape[:2], value.shape[2] * value.shape[3])

    @staticmethod
    def backward(ctx, G):
        V, first, samples = ctx.saved_tensors
        (B, Q, _), (_, _, M, d), L = G.shape, ctx.size, len(ctx.shapes)
        P, G = first.shape[1] // L, G.reshape(len(first), d)
        grad_value = grad_locations = grad_weights = None
        if any(ctx.needs_input_grad[1:3]):
            grads = gradients_of_samples(G, V, four_pixels(first, ctx.shapes, M), samples)
            grad_x, grad_y, grad_weights = (g.view(B, Q, M, L, P) for g in grads)
            size = torch.tensor(ctx.shapes, dtype=V.dtype).flip(1)  # (L, 2), x then y
            grad_locations = torch.stack([grad_x, grad_y], dim=-1) * size[:, None]
        if ctx.needs_input_grad[0]:
            grad_value = gradient_of_value(G, len(V), first, samples, ctx.shapes, ctx.size)
        return grad_value, grad_locations, grad_weights, None


def places(locations, shapes):
    """Where samples lie: first (R, n) int32, the row of V that is the top left pixel of each one's four, and
    x, y (R, n), how far right of and below its centre the sample is, 0 to 1.

    V has images, within them pixels, within them heads. What lies outside a map goes onto its frame.
    """
    B, Q, M, L, P, _ = locations.shape
    N, starts = sum(pixels(shapes)), [sum(pixels(shapes)[:l]) for l in range(L)]
    heads = [M * start + m for m in range(M) for start in starts for _ in range(P)]
    first = torch.tensor(heads, dtype=torch.int32)
    first = first + torch.arange(0, B * N * M, N * M, dtype=torch.int32)[:, None, None]  # (B, 1, M*L*P)
    rests = []
    for axis in (0, 1):
        sizes = [shape[1 - axis] for shape in shapes]
        size = spelled_out(sizes, M, P, locations.dtype)
        # 0 is the first centre of the framed map.
        place = torch.addcmul(size.new_full((), FRAME - 0.5), locations[..., axis].flatten(2), size)
        place = place.clamp_(torch.zeros_like(size), size + FRAME)
        last = spelled_out(sizes, M, P) + FRAME
        pixel = place.to(torch.int32).clamp_(torch.zeros_like(last), last)  # a NaN must not leave V
        step = [M] * L if axis == 0 else [M * (w + 2 * FRAME) for _, w in shapes]
        first = torch.addcmul(first, pixel, spelled_out(step, M, P))
        rests.append(place.sub_(pixel))
    return [t.view(B * Q * M, L * P) for t in (first, *rests)]


def spelled_out(per_level, M, P, dtype=torch.int32):
    """A constant of each level for all MLP samples of a query: broadcasting short axes is far slower."""
    return torch.tensor([number for _ in range(M) for number in per_level for _ in range(P)], dtype=dtype)


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
        products = torch.sparse.sampled_addmm(A, G, V.t(), beta=0.0, out=A).values().view_as(columns)
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
        framed = (part.unflatten(1, (h + 2 * FRAME, w + 2 * FRAME)) for part in level)
        upper_left, upper_right, lower_left, lower_right = framed
        rows, columns = slice(FRAME, -FRAME), slice(FRAME, -FRAME)
        before = slice(FRAME - 1, -FRAME - 1)
        maps.append(upper_left[:, rows, columns] + upper_right[:, rows, before]
                    + lower_left[:, before, columns] + lower_right[:, before, before])
    return torch.cat([image.flatten(1, 2) for image in maps], dim=1)


def pixels(shapes):
    """Pixels of each framed map."""
    return [(h + 2 * FRAME) * (w + 2 * FRAME) for h, w in shapes]


def frame(value, shapes):
    """value (B, S, M, d) -> (B*N*M, d), each map with its frame of zeros."""
    levels = value.split([h * w for h, w in shapes], dim=1)
    maps = [F.pad(rows.unflatten(1, size), (0, 0, 0, 0, *[FRAME] * 4)) for rows, size in zip(levels, shapes)]
    return torch.cat([image.flatten(1, 2) for image in maps], dim=1).flatten(0, 2)


def four_pixels(first, shapes, M):
    """Rows of V of the four pixels of each sample, (R, 4, n).

    The first one's neighbours lie M rows on, a line of the map on, and both.
    """
    P = first.shape[1] // len(shapes)
    steps = torch.tensor([[M * (i * (w + 2 * FRAME) + j) for _, w in shapes for _ in range(P)]
                          for i in (0, 1) for j in (0, 1)], dtype=torch.int32)
    if torch.compiler.is_compiling():
        return torch.stack([first + step for step in steps], dim=1)  # one sum would need a division for each
    return first[:, None] + steps


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
