"""TF1Adam equals TensorFlow 1's update, written out."""

import torch

from agents.sb3.tf1_adam import TF1Adam


def test_it_is_tensorflows_update():
    torch.manual_seed(0)
    rate, betas, eps = 0.01, (0.9, 0.999), 1e-3
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    start = weight.detach().clone()
    optimizer = TF1Adam([weight], lr=rate, betas=betas, eps=eps)
    m = v = torch.zeros(5, dtype=torch.float64)
    expected = start.clone()
    for t in range(1, 6):
        gradient = torch.randn(5, dtype=torch.float64) * 1e-3
        weight.grad = gradient.clone()
        optimizer.step()
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        corrected = rate * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
        expected = expected - corrected * m / (v.sqrt() + eps)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-12, rtol=1e-9)
    assert optimizer.param_groups[0]["eps"] == eps


def test_with_small_gradients_it_moves_less_than_pytorchs():
    moved = {}
    for kind in (torch.optim.Adam, TF1Adam):
        weight = torch.zeros(1, requires_grad=True)
        optimizer = kind([weight], lr=1.0, eps=1e-5)
        weight.grad = torch.tensor([1e-6])
        optimizer.step()
        moved[kind] = abs(float(weight.detach()))
    assert moved[TF1Adam] < 0.1 * moved[torch.optim.Adam]
