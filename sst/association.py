"""Which class of one label domain is which of another, found while a network is trained. Not the paper's.

L_cross (sst/losses.py) lets the pixels of one domain teach the head of another through a table T of
associations. Here is where the table comes from, and which heads meet which labels.
"""

from itertools import permutations, product

import torch
import torch.nn.functional as F
from torch import nn

from .domains import IGNORE, word_similarity
from .losses import L_cross
from .modules import parted, regions_of


class Association(nn.Module):
    """Which class of one domain is which of another: T_ji (Z_j, Z_i) of every ordered pair, for L_cross.

    What head j predicts where domain i has a label is counted, an EM step, with the similarities of the class
    names as prior. N_ji (Z_j, Z_i) is a running mean over steps, kept like the statistics of batch norm
    (StepStatistics).

    sources: LabelDomains of a frozen network (dedicated parsing). Pairs are then each of `domains`, as j,
    with each of them, as i; what is counted is what the frozen heads say where `domains` have labels.
    taught: names of the domains that may be j; all of them if there is none.
    """

    TEMPERATURE, MOMENTUM, PRIOR = 0.1, 0.98, 0.3

    def __init__(self, domains, sources=(), taught=()):
        super().__init__()
        self.names = [d.name for d in domains]
        self.taught = [name for name in self.names if name in taught] or self.names
        pairs = product(domains, sources) if sources else permutations(domains, 2)
        self.pairs = []
        for j, i in [(j, i) for j, i in pairs if j.name in self.taught]:
            self.pairs.append((j.name, i.name))
            words = (word_similarity(j, i) / self.TEMPERATURE).softmax(-1)
            self.register_buffer(f"words:{j.name}:{i.name}", words, persistent=False)
            self.register_buffer(f"N:{j.name}:{i.name}", torch.zeros_like(words))

    def T(self, j, i):
        """(Z_j, Z_i), rows summing to 1; the similarity of words where nothing is counted yet."""
        N, words = getattr(self, f"N:{j}:{i}"), getattr(self, f"words:{j}:{i}")
        T = N + (self.PRIOR * N.sum(-1, keepdim=True) + 1e-6) * words
        return T / T.sum(-1, keepdim=True)

    def statistics(self):
        """The buffers that a step's micro-batches share."""
        return [buffer for name, buffer in self.named_buffers() if name.startswith("N:")]

    @torch.no_grad()
    def count(self, j, i, p_j, p_i, Y):
        """Add what is said of the same pixels in both domains, p_j (B, Z_j, h, w) and p_i (B, Z_i, h, w).

        Y (B, h, w): 255 where nothing is counted.
        """
        if self.training and len(Y):
            N = getattr(self, f"N:{j}:{i}")
            p_j, p_i = (p.float().permute(0, 2, 3, 1)[Y != IGNORE] for p in (p_j, p_i))  # (n, Z)
            N.lerp_((p_j.T @ p_i / max(1, len(p_j))).to(N.dtype), 1 - self.MOMENTUM)

    def forward(self, A, labels, domain, source=None):
        """The sum of L_cross over the pairs. A: {name: logits (B, Z, h, w)} of all images, by those taught.

        source: {name: logits} of the same images by frozen heads (dedicated parsing).
        """
        total, (Y,) = 0, regions_of(labels, [next(iter(A.values()))])
        if not source:
            parts = {j: parted(A[j], domain, self.names) for j in A}
            Y = parted(Y, domain, self.names)
        for j, i in self.pairs:
            if source:  # the images are labelled in j, and q is what the frozen head i says
                q = source[i].float().softmax(1)
                total = total + L_cross(A[j], Y, self.T(j, i), q)
                self.count(j, i, one_hot(Y, A[j].shape[1]), q, Y)
            else:  # those of domain i
                A_j, Y_i, T = parts[j][i], Y[i], self.T(j, i)
                total = total + L_cross(A_j, Y_i, T)  # 0 without an image
                self.count(j, i, A_j.softmax(1), one_hot(Y_i, T.shape[1]), Y_i)
        return total


def one_hot(Y, Z):
    """Labels (B, h, w) -> (B, Z, h, w): 1 at the label; where it is ignored, at class 0."""
    return F.one_hot(Y.where(Y != IGNORE, 0), Z).permute(0, 3, 1, 2)
