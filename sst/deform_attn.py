"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, Eq. 3), the operator of the encoder.

Ordinary attention lets a query look at every pixel. A deformable query looks at P points on each of L maps,
at places that it chooses itself. A place between pixels is read bilinearly, from four pixels. So a query's
answer is a weighted sum of 4LP rows of the value matrix, out of thousands: attention with a sparse matrix.

`deform_attn` is the one entry. `choose` chooses between three bodies, which agree to round-off:
  grid_sample    below: reads the maps as images; runs everywhere, and is what ONNX knows
  embedding_bag  deform_attn_cpu.py: multiplies by the sparse matrix
  triton         deform_attn_triton.py: a kernel for GPUs
"""

import os

import torch
import torch.nn.functional as F

from .deform_attn_cpu import embedding_bag

# PyTorch 2.6 cannot tell that a graph is exported from that it is compiled.
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def deform_attn(value, shapes, locations, weights, backend="auto"):
    """Sum over levels and points of weights * (value at locations, read bilinearly; zero outside the map).

    value:     (B, S, M, D/M) rows of all levels, one after another; S = sum of H*W; M heads.
    shapes:    [(H_1, W_1), ...] of the L levels.
    locations: (B, Q, M, L, P, 2), x then y; [0, 1] spans a map from outer edge to outer edge, pixel centres
               at (i + 0.5)/W.
    weights:   (B, Q, M, L, P).
    backend:   "triton", "embedding_bag", "grid_sample" or "auto", the fastest that can run; the environment's
               SST_DEFORM_ATTN replaces "auto".
    Returns (B, Q, D). Raises ValueError for shapes that do not belong together, backends that are none and
    tensors that "triton" cannot take, ImportError for "triton" where it is not installed.
    """
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    if (sum(h * w for h, w in shapes) != S or locations.shape != (B, Q, M, len(shapes), P, 2)
            or weights.shape != (B, Q, M, L, P)):
        raise ValueError(f"deform_attn: value {tuple(value.shape)}, shapes {list(shapes)}, locations "
                         f"{tuple(locations.shape)} and weights {tuple(weights.shape)} do not fit "
                         f"(B, S, M, D/M), L x (H, W) with S = sum of H*W, (B, Q, M, L, P, 2), "
                         f"(B, Q, M, L, P)")
    backend = choose(value, locations, weights, backend)
    if backend == "triton":
        try:
            from .deform_attn_triton import attend
        except ImportError:
            raise ImportError("deform_attn: the backend 'triton' needs the package triton, which is not "
                              "installed; run: pip install triton") from None
        return attend(value, shapes, locations, weights)  # reads every tensor in its own dtype
    # Sampling places must not be rounded to bfloat16 under autocast: that moves them by a tenth of a pixel.
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
        raise ValueError(f"deform_attn: the backend is {backend!r}; it is one of auto, triton, "
                         f"{', '.join(PYTORCH)}")
    return backend


def grid_sample(value, shapes, locations, weights):
    """Every map an image and every head a batch entry, read at the locations, then the samples' weighted sum.

    Takes and returns what `deform_attn` does, in one dtype.
    """
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    grid = 2 * locations - 1  # grid_sample counts from -1 to 1
    samples = []
    for l, (rows, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes)):
        image = rows.permute(0, 2, 3, 1).reshape(B * M, d, h, w)
        places = grid[:, :, :, l].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        read = F.grid_sample(image, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        samples.append(read)  # (B*M, d, Q, P)
    samples = torch.stack(samples, dim=3).flatten(3)  # (B*M, d, Q, L*P)
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    out = (samples * weights).sum(-1)  # (B*M, d, Q)
    return out.view(B, M * d, Q).transpose(1, 2)


PYTORCH = {"embedding_bag": embedding_bag, "grid_sample": grid_sample}
