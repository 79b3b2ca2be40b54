"""Gates: what must hold for any logits (property tests), and the figures that can be told by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from structlora_trl.core.gates import (
    expected_gate,
    kl_gradient,
    kl_to_prior,
    logistic_noise,
    logit,
    sample_gates,
)
from tests.support.core import floats, probabilities, seeds
from tests.support.reference import reference_expected_gate


@given(floats(5), probabilities)
def test_kl_is_never_negative_and_its_gradient_is_the_derivative(logits, prior):
    logits = logits.double().requires_grad_()
    kl = kl_to_prior(logits, prior)
    assert (kl >= -1e-12).all()
    (derivative,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(kl_gradient(logits.detach(), prior), derivative, atol=1e-9, rtol=1e-6)


@given(probabilities)
def test_kl_is_zero_at_the_prior_alone(prior):
    at = torch.tensor([logit(prior)], dtype=torch.float64)
    assert kl_to_prior(at, prior).item() == pytest.approx(0, abs=1e-12)
    assert (kl_to_prior(torch.cat([at - 0.5, at + 0.5]), prior) > 0).all()


def test_noise_is_logistic_and_told_by_seed_and_step():
    noise = logistic_noise(200_000, seed=3, step=7)
    assert torch.equal(noise, logistic_noise(200_000, 3, 7))
    assert not torch.equal(noise, logistic_noise(200_000, 3, 8))
    assert not torch.equal(noise, logistic_noise(200_000, 4, 7))
    assert noise.isfinite().all()
    assert noise.mean().abs() < 0.02
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    # P(gate open) = sigmoid(φ), whatever the temperature
    open_share = (sample_gates(torch.tensor(1.0), noise, 0.3) > 0.5).float().mean().item()
    assert open_share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)


@pytest.mark.parametrize("temperature, tolerance", [(0.05, 1e-3), (0.3, 1e-4), (1.0, 1e-4)])
@pytest.mark.parametrize("hard", [False, True])
def test_expected_gate_is_the_mean_of_samples(temperature, tolerance, hard):
    logits = torch.linspace(-6, 6, 13, dtype=torch.float64)
    expected = expected_gate(logits, temperature, hard)
    if not hard:
        torch.testing.assert_close(
            expected, reference_expected_gate(logits, temperature), atol=tolerance, rtol=0
        )
    noise = logistic_noise(400_000, seed=1, step=2).double()
    sampled = torch.stack([sample_gates(one, noise, temperature, hard).mean() for one in logits])
    torch.testing.assert_close(sampled, expected, atol=5e-3, rtol=0)  # three standard errors are below 0.0024


@given(floats(3, 4), seeds)
def test_hard_gates_are_binary_with_the_soft_gradient(logits, seed):
    noise = logistic_noise(12, seed, 0).view(3, 4)
    gradients = []
    for hard in (False, True):
        leaf = logits.clone().requires_grad_()
        gates = sample_gates(leaf, noise, 0.5, hard)
        gradients.append(torch.autograd.grad(gates.sum(), leaf)[0])
    assert set(gates.round(decimals=5).tolist()[0]) <= {0.0, 1.0}
    torch.testing.assert_close(*gradients)
