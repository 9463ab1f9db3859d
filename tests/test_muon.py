"""Muon: its steps against singular value decompositions, and AdamW where it is AdamW."""

from copy import deepcopy

import torch
from torch import nn

from sst.optim import Muon, orthogonalised


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def optimiser(net, lr=0.1, **kw):
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
    return Muon(groups, lr=lr, fused=True, **kw)


def test_a_diagonal_matrix_by_hand():
    # 3 and 4 on the diagonal: brought to length 1 they are 0.6 and 0.8,
    # and each goes through a*s + b*s^3 + c*s^5 five times.
    want = []
    for s in (0.6, 0.8):
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        want.append(s)
    got = orthogonalised(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64))[0]
    want = torch.diag(torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_iteration_as_it_is_published():
    X = rand(3, 5, 9)
    want = X / X.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        square = want @ want.mT
        want = 3.4445 * want + (-4.7750 * square + 2.0315 * square @ square) @ want
    torch.testing.assert_close(torch.stack(orthogonalised(X)), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(orthogonalised(X.mT)), want.mT, rtol=1e-9, atol=1e-12)


def test_singular_vectors_stay_and_values_come_near_one():
    X = rand(4, 16, 24)
    U, S, V = torch.linalg.svd(X, full_matrices=False)
    values = U.mT @ torch.stack(orthogonalised(X)) @ V.mT  # diagonal where the vectors stayed
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-9
    assert diagonal.min() > 0.68 and diagonal.max() < 1.21 and S.max() / S.min() > 3


def test_a_step_is_as_long_as_adamws_and_a_convolution_is_a_matrix():
    net = nn.Conv2d(8, 16, 3, bias=False).double()
    before = net.weight.detach().clone()
    net.weight.grad = rand(16, 8, 3, 3)
    optimiser(net, weight_decay=0.0).step()
    step = (net.weight - before).flatten(1).detach()
    # The momentum began at zero, so the direction of the first step is the gradient's.
    direction = orthogonalised(rand(16, 8, 3, 3).flatten(1)[None])[0]
    torch.testing.assert_close(step, -0.1 * 0.2 * 72 ** 0.5 * direction)
    assert 0.015 < step.square().mean().sqrt() < 0.025  # AdamW's would be about 0.1 * 0.2


def test_momentum_by_hand_in_the_second_step():
    net = nn.Linear(3, 4, bias=False).double()
    first, second = rand(4, 3, seed=1), rand(4, 3, seed=2)
    muon = optimiser(net, weight_decay=0.0)
    for gradient in (first, second):
        before = net.weight.detach().clone()
        net.weight.grad = gradient.clone()
        muon.step()
    momentum = 0.95 * 0.05 * first + 0.05 * second
    direction = orthogonalised((0.05 * second + 0.95 * momentum)[None])[0]
    torch.testing.assert_close(net.weight.detach() - before, -0.1 * 0.2 * 4 ** 0.5 * direction)


def test_weight_decay_is_decoupled_and_a_zero_gradient_moves_nothing_else():
    net = nn.Linear(3, 4, bias=False).double()
    before = net.weight.detach().clone()
    net.weight.grad = torch.zeros(4, 3, dtype=torch.float64)
    optimiser(net, weight_decay=0.5).step()
    torch.testing.assert_close(net.weight.detach(), before * (1 - 0.1 * 0.5))


def test_groups_without_matrices_are_adamws():
    nets = [nn.Linear(3, 4), nn.Linear(3, 4)]
    nets[1].load_state_dict(nets[0].state_dict())
    muon = optimiser(nets[0], betas=(0.9, 0.95))
    adamw = torch.optim.AdamW(nets[1].parameters(), lr=0.1, betas=(0.9, 0.95), fused=True)
    for seed in range(3):
        for net in nets:
            net.weight.grad, net.bias.grad = rand(4, 3, seed=seed).float(), rand(4, seed=seed).float()
        muon.step(), adamw.step()
    assert torch.equal(nets[0].bias, nets[1].bias) and not torch.equal(nets[0].weight, nets[1].weight)


def test_saved_and_loaded_it_goes_on_as_it_would_have():
    def train(net, muon, seeds):
        for seed in seeds:
            muon.zero_grad()
            (net(rand(5, 3, seed=seed).float()) ** 2).mean().backward()
            muon.step()

    torch.manual_seed(0)
    net, again = nn.Linear(3, 4), nn.Linear(3, 4)
    muon, loaded = optimiser(net), optimiser(again)
    train(net, muon, range(3))
    again.load_state_dict(net.state_dict())
    loaded.load_state_dict(deepcopy(muon.state_dict()))
    train(net, muon, range(3, 6))
    train(again, loaded, range(3, 6))
    assert torch.equal(net.weight, again.weight) and torch.equal(net.bias, again.bias)


def test_matrices_of_many_shapes_iterate_together_and_come_back_in_their_places():
    shapes = [(5, 9), (7, 5), (4, 4), (9, 5), (5, 5), (4, 8)]
    matrices = [rand(*shape, seed=n) for n, shape in enumerate(shapes)]
    together = orthogonalised(matrices)
    for alone, X in zip(map(lambda X: orthogonalised([X])[0], matrices), together):
        assert alone.shape == X.shape
        torch.testing.assert_close(alone, X, rtol=1e-12, atol=1e-12)
