"""Where a student's probability lies: by hand, and at another temperature."""

from __future__ import annotations

import pytest
import torch

from distill_env.models.tabular import markov
from experiments.comparing.diagnosis import Tempered, masses


def test_wrong_and_missed_mass_by_hand() -> None:
    """A state without a choice, and two at which the teacher has two likely tokens: the student knows one; or both."""
    teacher = torch.tensor([[0.999, 0.0005, 0.0005], [0.5, 0.499, 0.001], [0.5, 0.499, 0.001]]).log()
    student = torch.tensor([[0.9, 0.04, 0.06], [0.7, 0.02, 0.28], [0.6, 0.3, 0.1]]).log()
    found = masses(student, teacher)
    assert found["wrong_forced"] == pytest.approx(0.1)
    assert found["wrong_choice"] == pytest.approx((0.28 + 0.1) / 2)
    assert found["missing_choice"] == pytest.approx(0.499 / 2)  # 0.02 is less than a tenth of it, 0.3 is not


def test_a_temperature_of_a_half_squares_the_odds() -> None:
    model, tempered = markov(5, seed=1), Tempered(markov(5, seed=1), 0.5)
    p, sharp = model.start([[0], [1]]).exp(), tempered.start([[0], [1]]).exp()
    torch.testing.assert_close(sharp, p**2 / (p**2).sum(-1, keepdim=True))
    tokens = torch.tensor([[2, 3], [3, 0]])
    p, sharp = model.extend(tokens).exp(), tempered.extend(tokens).exp()
    torch.testing.assert_close(sharp, p**2 / (p**2).sum(-1, keepdim=True))
