"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, Eq. 3), the operator of the encoder.

Ordinary attention lets a query look at every pixel. A deformable query looks at P points on each of L maps, at places that
it chooses itself. A place between pixels is read bilinearly, from four pixels. So a query's answer is a weighted sum of 4LP
rows of the value matrix, out of thousands: attention with a sparse matrix.
"""

import torch
import torch.nn.functional as F


def deform_attn(value, shapes, locations, weights):
    """Sum over levels and points of weights * (value at locations, read bilinearly; zero outside the map).

    value:     (B, S, M, D/M) rows of all levels, one after another; S = sum of H*W; M heads.
    shapes:    [(H_1, W_1), ...] of the L levels.
    locations: (B, Q, M, L, P, 2), x then y; [0, 1] spans a map from outer edge to outer edge, pixel centres at (i + 0.5)/W.
    weights:   (B, Q, M, L, P).
    Returns (B, Q, D). Raises ValueError for shapes that do not belong together.
    """
    B, S, M, d = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    if sum(h * w for h, w in shapes) != S or locations.shape != (B, Q, M, len(shapes), P, 2) or weights.shape != (B, Q, M, L, P):
        raise ValueError(f"deform_attn: value {tuple(value.shape)}, shapes {list(shapes)}, locations {tuple(locations.shape)} and "
                         f"weights {tuple(weights.shape)} do not fit (B, S, M, D/M), L x (H, W) with S = sum of H*W, "
                         f"(B, Q, M, L, P, 2), (B, Q, M, L, P)")
    grid = 2 * locations - 1  # grid_sample counts from -1 to 1
    # Sampling places must not be rounded to bfloat16 under autocast: it would move them by a tenth of a pixel and more.
    precise = torch.promote_types(value.dtype, grid.dtype)
    samples = []
    for l, (rows, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes)):
        image = rows.permute(0, 2, 3, 1).reshape(B * M, d, h, w).to(precise)
        samples.append(F.grid_sample(image, grid[:, :, :, l].transpose(1, 2).flatten(0, 1).to(precise),
                                     mode="bilinear", padding_mode="zeros", align_corners=False))  # (B*M, d, Q, P)
    samples = torch.stack(samples, dim=3).flatten(3)  # (B*M, d, Q, L*P)
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    out = (samples * weights).sum(-1)  # (B*M, d, Q)
    return out.view(B, M * d, Q).transpose(1, 2).to(value.dtype)
