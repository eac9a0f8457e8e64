"""The tables of risk and harm: their scores on known results, and estimators that only watch."""

import harm
import numpy as np
import pytest
import risk
import torch
from transfer import Panel

from kvlock_sampling.types import Evaluation
from kvlock_sampling.variance import Divergence, Estimator, Sparse


def test_auroc_is_the_chance_that_a_failure_reads_higher():
    reading = np.array([1.0, 2.0, 3.0, 4.0])
    assert risk.auroc(reading, np.array([False, False, True, True])) == 1.0
    assert risk.auroc(reading, np.array([True, True, False, False])) == 0.0
    assert risk.auroc(reading, np.array([True, False, False, True])) == 0.5
    assert risk.auroc(np.ones(4), np.array([True, False, False, True])) == 0.5
    assert np.isnan(risk.auroc(reading, np.zeros(4, bool)))


def test_the_error_of_an_auroc_falls_with_the_edits():
    random = np.random.default_rng(0)
    errors = []
    for count in (50, 800):
        failed = random.random(count) < 0.5
        value, error = risk.with_error(random.normal(size=count) + failed, failed)
        assert value == pytest.approx(0.76, abs=4 * error)
        errors.append(error)
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.5)


def test_watchers_do_not_change_what_the_policy_sees_and_are_read_where_it_was_asked():
    generator = torch.Generator().manual_seed(0)
    run = [
        Evaluation(
            sigma,
            *torch.randn(2, 2, 3, 2, 4, 4, generator=generator),
            torch.ones(2, 1, 2, 4, 4),
            lambda x, s: x,
            None,
            torch.randn(2, 3, 2, 4, 4, generator=generator),
        )
        for sigma in (4.0, 2.0, 1.0, 0.5)
    ]

    class Level(Estimator):
        """Reads the noise level, and counts how often it is asked."""

        def __init__(self) -> None:
            self.asked = 0

        def step(self, state, evaluation):
            self.asked += 1
            return state, torch.full((2,), evaluation.sigma)

    free, costly, plain = Level(), Level(), Divergence()
    panel = Panel({"own": plain, "free": free, "costly": Sparse(costly, sigmas=(2.0, 0.5))})
    assert panel.needs_source
    assert (panel.patch, panel.default_threshold) == (plain.patch, plain.default_threshold)
    states = panel.init(), plain.init()
    for evaluation in run:
        found, wanted = panel.step(states[0], evaluation), plain.step(states[1], evaluation)
        states = found[0], wanted[0]
        assert (found[1] is None and wanted[1] is None) or torch.equal(found[1], wanted[1])
        assert torch.equal(panel.effect(states[0]), plain.effect(states[1]))
    assert [(sigma, {n: float(v[0]) for n, v in read.items() if n != "own"}) for sigma, read in panel.seen] == [
        (4.0, {"free": 4.0}),
        (2.0, {"free": 2.0, "costly": 2.0}),
        (1.0, {"free": 1.0}),
        (0.5, {"free": 0.5, "costly": 0.5}),
    ]
    assert (free.asked, costly.asked) == (4, 2)


def test_harm_counts_edits_that_are_gained_and_lost():
    base = {"colour": [1, 1, 0, 1], "shape": [1, 0, 1, 1], "inside_psnr": [10.0, 12.0, 14.0, 16.0]}
    base |= {"background_psnr": [100.0] * 4, "composite": [1.0] * 4, "passes": 40}
    other = {**base, "shape": [1, 1, 1, 0], "inside_psnr": [11.0, 13.0, 15.0, 17.0], "composite": [0.5] * 4}
    text = harm.table({"composited": base, "other": other})
    assert "| composited | 13.00 | +0.00 ± 0.00 | 50% | 0 | 0 | 100.0% | 100.0 | 40 |" in text
    assert "| other | 14.00 | +1.00 ± 0.00 | 50% | 1 | 1 | 50.0% | 100.0 | 40 |" in text
