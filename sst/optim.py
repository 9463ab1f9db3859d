"""The optimiser: groups of weights, the learning rate, half precision, and Muon.

The paper names no optimiser. The preset `paper` uses Mask2Former's AdamW. The presets for CPUs use Muon (K.
Jordan and others, 2024): AdamW, except that the steps of weight matrices are made orthogonal. What AdamW does
to every number alone, Muon does to a matrix as a whole: all directions of a step get about the same length,
so that rare ones are learned as fast as common ones. A small network learns more in the same minutes
(docs/experiments.md).
"""

import torch

MOMENTUM = 0.95
STEPS = 5
# Jordan's quintic: s -> a*s + b*s^3 + c*s^5, five times over, brings all s of (0.002, 1] to 0.68 to 1.21.
A, B, C = 3.4445, -4.7750, 2.0315


def build_optimizer(model, config):
    """AdamW or Muon over what a run trains.

    Backbone and SST learn at their own rates. Norms, biases and embeddings do not decay. Muon takes the
    matrices of the kept network, but for the heads.
    """
    scales = {"net.backbone": config.backbone_lr_scale, "sst": config.sst_lr_scale}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = ".".join(name.split(".")[:2 if name.startswith("net.") else 1])
            decays = parameter.ndim > 1 and not name.endswith(("bias", "level", "X_0"))
            matrix = decays and part not in ("sst", "net.heads") and config.optimizer == "muon"
            groups.setdefault((scales.get(part, 1.0), decays, matrix), []).append(parameter)
    groups = [{"params": parameters, "scale": scale, "matrices": matrix,
               "weight_decay": config.weight_decay if decays else 0.0}
              for (scale, decays, matrix), parameters in groups.items()]
    kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)


def rate(part, config):
    """The learning rate, in parts of --lr, after that part of the run."""
    if part < config.drop_at:
        return 1.0
    return 0.1 if config.decay == "drop" else (1 - part) / (1 - config.drop_at)


def set_rate(optimizer, part, config):
    """Give every group its rate for the step after that part of the run. Returns the rate at scale 1."""
    lr = config.lr * rate(part, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def loss_weights(config, step):
    """alpha, beta and lambda of Eq. 12 and 13, and the weight of L_cross, which rises at first."""
    ramp = min(1.0, (step + 1) / (config.cross_ramp * config.steps)) if config.cross_ramp else 1.0
    return config.alpha, config.beta, config.lam, config.alpha * config.cross * ramp


def precision(name, device):
    """The dtype of autocast; None for float32."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


class Muon(torch.optim.AdamW):
    """AdamW whose groups with "matrices": True are taken with Muon's steps; the others are AdamW's own.

    A convolution's weights are the matrix (out, in*kh*kw). A step is as long as AdamW's would be: 0.2 for
    every weight in the root mean square (Liu and others, 2025), so both share learning rate and weight decay.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group.get("matrices"):
                self.step_matrices(group)
        return super().step(closure)  # passes over what has no gradient

    def step_matrices(self, group):
        those, directions = [p for p in group["params"] if p.grad is not None], []
        for p in those:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # AdamW asks for a count when it is loaded
                state["momentum"] = torch.zeros_like(p)
            state["step"] += 1
            momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            directions.append(p.grad.lerp(momentum, MOMENTUM).flatten(1))
            p.grad = None
        for p, step in zip(those, orthogonalised(directions)):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step.view(p.shape), alpha=-group["lr"] * 0.2 * max(step.shape) ** 0.5)


def orthogonalised(matrices):
    """Each matrix X (r, c) -> U V^T of its decomposition U S V^T, to within the quintic's 0.68 to 1.21.

    The Newton-Schulz iteration X <- (A + B XX^T + C (XX^T)^2) X, carried out on XX^T of the smaller side: all
    its factors are polynomials of the same matrix, so X is needed at the ends only, and matrices whose
    smaller sides are alike iterate together. Zeros stay zeros.
    """
    wide = [X if X.shape[0] <= X.shape[1] else X.mT for X in matrices]
    wide = [X / torch.linalg.matrix_norm(X).clamp(min=1e-30) for X in wide]
    results, sides = [None] * len(wide), {}
    for n, X in enumerate(wide):
        sides.setdefault(len(X), []).append(n)
    for alike in sides.values():
        products = polynomial(torch.stack([wide[n] @ wide[n].mT for n in alike]))
        for n, product in zip(alike, products):
            X = product @ wide[n]
            results[n] = X if X.shape == matrices[n].shape else X.mT
    return results


def polynomial(square):
    """The product of the iteration's factors, for squares XX^T (n, r, r)."""
    for step in range(STEPS):
        factor = torch.baddbmm(square, square, square, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        product = factor @ product if step else factor
        if step < STEPS - 1:
            square = factor @ square @ factor
    return product
