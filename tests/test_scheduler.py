"""What every scheduler promises: probabilities over the arms, the paper's mixtures, evaluations that
scale with the run.   python -m pytest tests/test_scheduler.py"""
import numpy as np
import pytest

import scheduler
from objectives import arms
from scheduler import MIXTURES, FixedMixture, evaluation_steps

EVERY = arms(2048)


def share(action, chosen):
    return sum(p for p, arm in zip(action, EVERY) if chosen(arm))


@pytest.mark.parametrize("block_size", (256, 512, 2048))
@pytest.mark.parametrize("name", MIXTURES)
def test_an_action_is_a_probability_over_the_arms(name, block_size):
    action = FixedMixture(name, arms(block_size)).action
    assert action.shape == (len(arms(block_size)),) and (action >= 0).all() and np.isclose(action.sum(), 1)


def test_mixtures_have_the_shares_of_table_6():
    ntp, ul2, fixed, uniform = (FixedMixture(name, EVERY).action for name in ("ntp", "ul2", "fixed", "uniform"))
    assert share(ntp, lambda arm: arm.cls == "next_token_prediction") == 1
    assert np.isclose(share(ul2, lambda arm: arm.cls == "next_token_prediction"), 0.6)
    assert np.isclose(share(ul2, lambda arm: arm.cls == "prefix_lm"), 0.2)
    assert np.isclose(share(ul2, lambda arm: (arm.cls, arm.masked, arm.mean_span) == ("infilling", 15, 3)), 0.1)
    assert np.isclose(share(ul2, lambda arm: (arm.cls, arm.masked, arm.mean_span) == ("infilling", 50, 32)), 0.1)
    for cls in {arm.cls for arm in EVERY}:
        assert np.isclose(share(fixed, lambda arm: arm.cls == cls), 1 / 8)
    assert np.allclose(uniform, 1 / 96)


def test_a_fixed_mixture_keeps_its_action_and_refuses_another_ones_state():
    fixed = FixedMixture("fixed", EVERY)
    before = fixed.action.copy()
    fixed.update(10, np.full(len(EVERY), 2.0))
    assert (fixed.action == before).all()
    FixedMixture("fixed", EVERY).load_state_dict(fixed.state_dict())
    with pytest.raises(ValueError, match="--mixture=fixed"):
        FixedMixture("ntp", EVERY).load_state_dict(fixed.state_dict())


def test_an_unknown_mixture_names_the_known_ones():
    with pytest.raises(ValueError, match="ntp, ul2, fixed, uniform"):
        FixedMixture("ntpp", EVERY)


def test_evaluations_follow_the_papers_schedule_at_its_length_and_scale_with_shorter_runs():
    assert evaluation_steps(32000) == [0, 10, 50, 250, 500, 1000, 1500, *range(2000, 33000, 1000)]
    assert evaluation_steps(3200)[:6] == [0, 25, 50, 100, 150, 200]
    assert evaluation_steps(64) == [0, 10, 20, 30, 40, 50, 64]
    for max_steps in (1, 2, 7, 100, 2000):
        steps = evaluation_steps(max_steps)
        assert steps[0] == 0 and steps[-1] == max_steps and steps == sorted(set(steps))
        assert min(np.diff(steps)) >= min(10, max_steps)


def test_the_demonstration_runs(capsys):
    scheduler.main()
    assert "selective_copying" in capsys.readouterr().out
