"""The losses of SST: Eq. 1, 7 and 10-13. Equations above, what they are computed with below."""

import torch
import torch.nn.functional as F

from .domains import IGNORE


def L_seg(A, Y, balance=0.0):
    """Eq. 1: cross-entropy of logits A (B, Z, h, w), upsampled to the label maps Y (B, H, W); 255 is ignored.

    The mean over an image's pixels, then over the images, so that a crowded photo counts as much as an empty
    one. An image with nothing but ignored pixels contributes 0; so does a batch without images.

    balance: 0 as published. Between that and 1 it is a weighted mean, small classes counting more: a pixel
    weighs n^-balance, n the pixels of its class in its image. At 1 every class in an image counts the same.
    """
    CE = cross_entropy(A, Y)  # (B, H*W), 0 where ignored
    weight = pixel_weights(Y, balance, CE.dtype)  # (B, H*W), 0 where ignored
    L = (CE * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B,); one labelled pixel is enough for a sum of 1
    return L.mean() if len(L) else L.sum()


def L_aux(A_aux, Y):
    """Eq. 7: the cross-entropy of the auxiliary logits, in the same form as Eq. 1."""
    return L_seg(A_aux, Y)


def L_dataset(X_1, X_2to1, X_2, X_1to2):
    """Eq. 10: X_0 of both domains, (Z_1, D) and (Z_2, D), against what MST mapped onto them."""
    return cosine_distance(X_1, X_2to1) + cosine_distance(X_2, X_1to2)


def L_img(X_1, X_2to1, X_2, X_1to2):
    """Eq. 11: the two terms of Eq. 10 with X_l, summed over l: (L, ..., Z, D), image pairs in between."""
    d_l = cosine_distance(X_1, X_2to1, keep=1) + cosine_distance(X_2, X_1to2, keep=1)  # (L,)
    return d_l.sum()


def L_u(terms, alpha=10, beta=1, lam=5, cross=0):
    """Eq. 12, universal parsing. terms: {"seg/NAME", "aux/NAME", "dataset", "img": scalar}; 0 if missing."""
    seg = sum(value for name, value in terms.items() if name.startswith("seg/"))
    aux = sum(value for name, value in terms.items() if name.startswith("aux/"))
    paper = alpha * seg + beta * aux + lam * (terms.get("dataset", 0) + terms.get("img", 0))
    return paper + cross * terms.get("cross", 0)  # L_cross is not the paper's


def L_d(terms, target, alpha=10, beta=1, lam=5, cross=0):
    """Eq. 13, dedicated parsing: Eq. 12 with L_seg and L_aux of the one domain that is trained.

    In the first step that is the source, without consistency terms; in the second the target.
    """
    kept = {name: value for name, value in terms.items() if "/" not in name or name.endswith("/" + target)}
    return L_u(kept, alpha, beta, lam, cross)


def cosine_distance(X, mapped, keep=0):
    """Mean over all rows of 1 - cos(X, mapped); leading dimensions (image pairs) broadcast, `keep` stay."""
    return (1 - cosine(X, mapped)).flatten(keep).mean(-1)


def cosine(a, b):
    """Cosine similarity along the last axis; 0, and no gradient, for a row of zeros."""
    return (direction(a) * direction(b)).sum(-1)


# What they are computed with --------------------------------------------------------------------------------


def cross_entropy(A, Y):
    """Of every pixel, in float32 (float64 stays): logits A (B, Z, h, w), labels Y (B, H, W) -> (B, H*W)."""
    B, H, W = Y.shape
    # On a CPU the softmax takes 16 numbers at once: classes of a pixel that stand side by side, or where
    # there are fewer, pixels.
    side_by_side = A.shape[1] >= 16
    layout = torch.channels_last if side_by_side else torch.contiguous_format
    A = A.to(torch.promote_types(A.dtype, torch.float32), memory_format=layout)
    A = F.interpolate(A, size=(H, W), mode="bilinear", align_corners=False)
    if side_by_side:
        A, Y = A.permute(0, 2, 3, 1).flatten(0, 2), Y.flatten()  # (B*H*W, Z), (B*H*W,)
    return F.cross_entropy(A, Y, ignore_index=IGNORE, reduction="none").view(B, H * W)


def pixel_weights(Y, balance, dtype):
    """(B, H*W): 0 for ignored pixels, else n^-balance, n the pixels of its class in its image."""
    weight = (Y != IGNORE).flatten(1).to(dtype)
    if not balance:
        return weight
    n = weight.new_zeros(len(Y), IGNORE + 1).scatter_add_(1, Y.flatten(1), weight)
    return weight * n.clamp(min=1).pow(-balance).gather(1, Y.flatten(1))


def direction(x):
    """Rows of x at length 1; zeros, without a gradient, for rows that have none.

    The softmax of Eq. 9 may put nearly all its weight on a class that M_dynamic then sets to zero: the mapped
    row is left with a length such as 1e-25. Its direction is as good as any other's, but squared it would
    vanish, and its gradient would be infinite. So rows are brought to size 1 by their largest entry before
    their length is taken, which then is at least 1.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest < 1e-30, torch.inf, largest)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1)


# Not the paper's --------------------------------------------------------------------------------------------


def L_cross(A, Y, T, q=None):
    """Cross-domain likelihood of the logits A (B, Z_j, h, w) of head j on images labelled in domain i.

    Y (B, h, w) int64: their labels at the size of A, 255 ignored. T (Z_j, Z_i): T[k, y] = P(label y of domain
    i | class k of domain j), rows summing to 1. A pixel labelled y costs -log sum_k p_j(k) T[k, y]: what head
    j believes, told in the words of domain i, should be its label. That is the forward correction of noisy
    labels (Patrini and others 2017), and NLL+ (Bevandic and others 2022) with a soft map. The mean is Eq.
    1's: small classes weigh no more with --balance, with which it learned less (docs/experiments.md).

    q (B, Z_i, h, w): what another network believes about images that have no label in domain i. A pixel costs
    the mean over q of what each y would cost, and Y only says what is ignored.
    """
    A = A.to(torch.promote_types(A.dtype, torch.float32)).flatten(2)  # (B, Z_j, n)
    Y = Y.flatten(1)
    weight = (Y != IGNORE).to(A.dtype)  # (B, n)
    told = (T.clamp(min=1e-6).T @ A.softmax(1)).log()  # (B, Z_i, n): head j in the words of domain i
    if q is None:
        cost = -told.gather(1, Y.where(Y != IGNORE, 0)[:, None])[:, 0]
    else:
        cost = -(q.flatten(2) * told).sum(1)
    L = (cost * weight).sum(1) / weight.sum(1).clamp(min=1)
    return L.mean() if len(L) else L.sum()
