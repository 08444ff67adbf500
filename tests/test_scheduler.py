"""Every scheduler gives probabilities and goes on from its saved state; mixtures and rewards are
the paper's; the bandit predicts, and learns from its history what helps.

    python -m pytest tests/test_scheduler.py
"""
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scheduler
from bandit_world import World, best_fixed, run
from objectives import CLASSES, arms
from scheduler import (MIXTURES, Birdie, class_weights, evaluation_steps, make_scheduler, propose,
                       reward)

EVERY = arms(2048)
nan, inf = math.nan, math.inf


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The reward model takes 10 steps an evaluation, not 200, unless a test says otherwise."""
    monkeypatch.setattr(Birdie, "train_steps", 10)


def share(action, cls, **options):
    """What the arms of a class with these options have together."""
    return sum(p for p, arm in zip(action, EVERY)
               if arm.cls == cls and options.items() <= arm.options.items())


def is_probability(action, n):
    return action.shape == (n,) and (action >= 0).all() and np.isclose(action.sum(), 1)


# ---- the test to copy: what every scheduler promises ----

@pytest.mark.parametrize("name", MIXTURES)
def test_a_scheduler_gives_probabilities_and_goes_on_from_its_saved_state(name, tmp_path):
    one, two = (make_scheduler(name, EVERY, 64, seed=1) for _ in range(2))
    losses = np.random.default_rng(0).uniform(1, 3, (3, len(EVERY)))
    assert is_probability(one.action, len(EVERY))
    for step in (0, 1):
        one.update(step, losses[step])
        assert is_probability(one.action, len(EVERY))
    torch.save(one.state_dict(), tmp_path / "state")
    two.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert np.array_equal(one.action, two.action)
    for each in (one, two):
        each.update(2, losses[2])
    assert np.array_equal(one.action, two.action)


# ---- an example to check by hand ----

@pytest.mark.parametrize("old, new, R", [(4.5, 4.2, 0.9518), (0.6, 0.5207, 0.9535), (3.0, 3.0, 0.0),
                                         (2.0, 1.0, 1.0), (2.0, 2.2, -1.0)])
def test_rewards_have_the_papers_golden_values(old, new, R):
    assert reward(old, new) == pytest.approx(R, abs=5e-5)


def test_rewards_fall_with_the_new_loss_and_stay_in_bounds():
    values = reward(np.full(500, 2.0), np.linspace(0.01, 6, 500))
    assert (np.abs(values) <= 1).all() and (np.diff(values[20:]) <= 0).all()


@pytest.mark.parametrize("old, new, R", [(nan, 2, 0), (2, nan, 0), (nan, inf, 0), (inf, 2, 1),
                                         (2, inf, -1), (inf, inf, 0), (0, 0, 0), (0, 1, -1),
                                         (0, inf, -1), (inf, 0, 1), (1, 0, 0)])
def test_losses_without_a_reward_by_the_formula_have_a_defined_one(old, new, R, recwarn):
    assert reward(old, new) == R and not recwarn.list


def test_a_class_counts_once_however_many_arms_it_has():
    two_and_one = [SimpleNamespace(cls=cls) for cls in ("a", "a", "b")]
    assert class_weights(two_and_one).tolist() == [0.5, 0.5, 1]


# ---- mixtures and the schedule ----

def test_fixed_mixtures_have_the_shares_of_table_6():
    ntp, ul2, fixed, uniform = (make_scheduler(name, EVERY, 64).action
                                for name in ("ntp", "ul2", "fixed", "uniform"))
    assert share(ntp, "next_token_prediction") == 1
    assert np.isclose(share(ul2, "next_token_prediction"), 0.6)
    assert np.isclose(share(ul2, "prefix_lm"), 0.2)
    assert np.isclose(share(ul2, "infilling", masked=15, mean_span=3), 0.1)
    assert np.isclose(share(ul2, "infilling", masked=50, mean_span=32), 0.1)
    assert all(np.isclose(share(fixed, cls), 1 / len(CLASSES)) for cls in CLASSES)
    assert np.allclose(uniform, 1 / len(EVERY))


@pytest.mark.parametrize("block_size", (256, 512))
@pytest.mark.parametrize("name", MIXTURES)
def test_an_action_is_a_probability_over_the_arms_of_short_rows_too(name, block_size):
    some = arms(block_size)
    assert is_probability(make_scheduler(name, some, 64).action, len(some))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'ntpp' is unknown.*" + ", ".join(MIXTURES)):
        make_scheduler("ntpp", EVERY, 64)
    without = [arm for arm in EVERY if arm.cls != "prefix_lm"]
    with pytest.raises(ValueError, match="an arm of prefix_lm.*raise --block_size"):
        make_scheduler("ul2", without, 64)


@pytest.mark.parametrize("name", ("fixed", "birdie"))
def test_a_state_of_another_scheduler_or_of_other_arms_is_refused_with_the_difference(name):
    saved = make_scheduler(name, EVERY, 64).state_dict()
    with pytest.raises(ValueError, match=f"is '{name}', not 'ntp'.*--mixture"):
        make_scheduler("ntp", EVERY, 64).load_state_dict(saved)
    with pytest.raises(ValueError, match=f"{len(EVERY)} arms.*{re.escape(EVERY[0].name)}"):
        make_scheduler(name, EVERY[1:], 64).load_state_dict(saved)
    with pytest.raises(ValueError, match="differ in their order"):
        make_scheduler(name, EVERY[::-1], 64).load_state_dict(saved)


def test_evaluations_follow_the_papers_schedule_and_scale_with_shorter_runs():
    assert evaluation_steps(32000) == [0, 10, 50, 250, 500, 1000, 1500, *range(2000, 33000, 1000)]
    assert evaluation_steps(3200)[:6] == [0, 25, 50, 100, 150, 200]
    assert evaluation_steps(64) == [0, 10, 20, 30, 40, 50, 64]
    for max_steps in (1, 2, 7, 100, 2000):
        steps = evaluation_steps(max_steps)
        assert steps[0] == 0 and steps[-1] == max_steps
        assert min(np.diff(steps)) >= min(10, max_steps)


# ---- the bandit ----

def by_class(actions):
    """(n, arms) -> (n, classes)"""
    return np.stack([actions[:, [arm.cls == cls for arm in EVERY]].sum(1) for cls in CLASSES], 1)


def test_proposals_are_uniform_on_average_and_reach_the_corners():
    actions = propose(EVERY, 2048, np.random.default_rng(0))
    assert all(is_probability(action, len(EVERY)) for action in actions)
    n_arms = np.array([sum(arm.cls == cls for arm in EVERY) for cls in CLASSES])
    assert np.allclose(by_class(actions).mean(0), n_arms / len(EVERY), atol=0.02)
    assert (by_class(actions).max(0) > 0.5).all()


def test_the_bandit_tries_2048_proposals(monkeypatch):
    asked = []

    def few(arms, n, rng):
        asked.append(n)
        return propose(arms, 8, rng)

    monkeypatch.setattr(scheduler, "propose", few)
    bandit = make_scheduler("birdie", EVERY, 0, seed=0)
    for step in (0, 1):
        bandit.update(step, np.full(len(EVERY), 2.0))
    assert asked == [2048]


def test_the_bandit_is_uniform_until_its_first_choice_and_deterministic_by_seed():
    results = []
    for seed in (0, 0, 1):
        world = World(3)
        bandit = Birdie(world.arms, max_steps=256, seed=seed)    # chooses at step 2
        run(bandit, world, 4)
        results.append(bandit.actions)
    assert all(np.allclose(action, 1 / len(world.arms)) for action in results[0][:2])
    assert not np.allclose(results[0][2], 1 / len(world.arms))
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_the_bandit_computes_on_one_thread_and_gives_the_others_back():
    seen, bandit = [], Birdie(World(0).arms, 0)
    bandit.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        for step in (0, 1):
            bandit.update(step, np.full(32, 2.0))
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_predictions_are_those_of_the_whole_history_and_the_best_action_is_chosen():
    world = World(0)
    bandit = Birdie(world.arms, 0)
    bandit.train_steps = 40
    run(bandit, world, 4)
    bandit.losses.append(world.losses())                # now in the middle of an update
    bandit.train_steps = 1
    first = bandit.fit()
    bandit.train_steps = 40
    assert bandit.fit() < 0.5 * first                   # it learns its history
    action, total = bandit.choose()
    losses, actions = bandit.history()
    predicted = []
    for candidate in (action, *propose(world.arms, 64, np.random.default_rng(1))):
        grown = torch.cat([actions, torch.tensor(candidate).float()[None, None]], 1)
        with torch.no_grad():                           # all K steps again, without a kept state
            predicted.append(bandit.model(losses, grown)[0][0, -1].double().numpy())
    predicted = np.array(predicted)                     # cube roots of rewards (65, arms)
    assert predicted.std(0).min() > 1e-4                # they differ between actions
    assert total == pytest.approx(predicted[0] ** 3 @ bandit.weights, abs=1e-3)
    roots = predicted @ bandit.weights
    assert roots[0] > np.quantile(roots[1:], 0.9)


def test_the_reward_model_is_causal_over_time():
    torch.manual_seed(0)
    model, losses, actions = scheduler.RewardModel(5), torch.rand(1, 6, 5), torch.rand(1, 6, 5)
    before, _ = model(losses, actions)
    losses[:, 4:] += 1
    actions[:, 4:] += 1
    after, _ = model(losses, actions)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize("odd", (nan, inf, 0.0))
def test_the_bandit_survives_odd_losses(odd):
    bandit = Birdie(World(0).arms, 0)
    for step in range(4):
        losses = np.linspace(1, 2, 32) / (step + 1)
        losses[step] = odd
        bandit.update(step, losses)
        assert is_probability(bandit.action, 32)
    assert all(p.isfinite().all() for p in bandit.model.parameters())


def test_in_a_simulated_world_the_bandit_beats_uniform_and_a_search_beats_the_bandit(monkeypatch):
    monkeypatch.setattr(Birdie, "train_steps", 25)
    bandit = run(Birdie(World(3).arms, 0, 3), World(3))
    uniform = run(make_scheduler("uniform", World(3).arms, 0), World(3))
    assert best_fixed(World(3), 3) < bandit < 0.95 * uniform


# ---- running the file ----

def test_the_demonstration_runs(capsys):
    scheduler.main(n_evaluations=3)
    assert "uniform" in capsys.readouterr().out
