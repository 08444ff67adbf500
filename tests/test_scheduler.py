"""What every scheduler promises: probabilities over the arms, the paper's mixtures and rewards, a bandit
that learns from its history.   python -m pytest tests/test_scheduler.py"""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import scheduler
from objectives import CLASSES, arms
from scheduler import (MIXTURES, Birdie, FixedMixture, World, class_weights, evaluation_steps, make_scheduler, propose,
                       reward)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EVERY = arms(2048)
nan, inf = math.nan, math.inf


def share(action, chosen):
    return sum(p for p, arm in zip(action, EVERY) if chosen(arm))


@pytest.mark.parametrize("block_size", (256, 512, 2048))
@pytest.mark.parametrize("name", MIXTURES)
def test_an_action_is_a_probability_over_the_arms(name, block_size):
    action = make_scheduler(name, arms(block_size), 1000).action
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
    with pytest.raises(ValueError, match="ntp, ul2, fixed, uniform, birdie, birdie-causal"):
        make_scheduler("ntpp", EVERY, 1000)


def test_evaluations_follow_the_papers_schedule_at_its_length_and_scale_with_shorter_runs():
    assert evaluation_steps(32000) == [0, 10, 50, 250, 500, 1000, 1500, *range(2000, 33000, 1000)]
    assert evaluation_steps(3200)[:6] == [0, 25, 50, 100, 150, 200]
    assert evaluation_steps(64) == [0, 10, 20, 30, 40, 50, 64]
    for max_steps in (1, 2, 7, 100, 2000):
        steps = evaluation_steps(max_steps)
        assert steps[0] == 0 and steps[-1] == max_steps and steps == sorted(set(steps))
        assert min(np.diff(steps)) >= min(10, max_steps)


# ---- rewards ----

@pytest.mark.parametrize("old, new, value", [(4.5, 4.2, 0.9518), (0.6, 0.5207, 0.9535), (3.0, 3.0, 0.0), (2.0, 1.0, 1.0)])
def test_rewards_have_the_papers_golden_values(old, new, value):
    assert reward(old, new) == pytest.approx(value, abs=5e-5)


def test_rewards_fall_with_the_new_loss_and_stay_in_bounds():
    new = np.linspace(0.01, 6, 500)
    values = reward(np.full(500, 2.0), new)
    assert (np.abs(values) <= 1).all() and (np.diff(values[20:]) <= 0).all() and reward(2, 2.2) < 0


@pytest.mark.parametrize("old, new, value", [(nan, 2, 0), (2, nan, 0), (nan, inf, 0), (inf, 2, 1), (2, inf, -1), (inf, inf, 0),
                                             (0, 0, 0), (0, 1, -1), (0, inf, -1), (inf, 0, 1), (1, 0, 0)])
def test_losses_without_a_reward_by_the_formula_have_a_defined_one(old, new, value, recwarn):
    assert reward(old, new) == value and not recwarn.list


# ---- the bandit ----

@pytest.mark.parametrize("kind, reach", [("flat", 0.05), ("hierarchical", 0.5)])
def test_proposals_are_probabilities_and_only_hierarchical_ones_reach_the_corners(kind, reach):
    actions = propose(EVERY, 2048, np.random.default_rng(0), kind)
    assert (actions >= 0).all() and np.allclose(actions.sum(1), 1)
    ntp = [arm.cls == "next_token_prediction" for arm in EVERY]
    assert (actions[:, ntp].max() > 0.5) == (kind == "hierarchical")
    by_class = np.stack([actions[:, [arm.cls == cls for arm in EVERY]].sum(1) for cls in CLASSES], 1)
    n_arms = np.array([sum(arm.cls == cls for arm in EVERY) for cls in CLASSES])
    assert np.allclose(by_class.mean(0), n_arms / len(EVERY), atol=0.02)
    if kind == "hierarchical":
        assert (by_class.max(0) > reach).all()
    else:
        assert actions.max() < reach


def test_a_focus_has_half_of_the_samples_on_average_and_the_other_classes_share_the_rest():
    actions = propose(EVERY, 2048, np.random.default_rng(0), "hierarchical", "copying")
    by_class = {cls: actions[:, [arm.cls == cls for arm in EVERY]].sum(1) for cls in CLASSES}
    assert abs(by_class["copying"].mean() - 1 / 2) < 0.02 and np.quantile(by_class["copying"], [0.1, 0.9]).round(1).tolist() != [0.5, 0.5]
    assert all(abs(by_class[cls].mean() - 1 / 14) < 0.01 for cls in CLASSES if cls != "copying")
    world = World(0)
    bandit = run(make_scheduler("birdie", world.arms, 12, 0, world.arms[-1].cls), world, 12)
    focus = [arm.cls == world.arms[-1].cls for arm in world.arms]
    plain = run(make_scheduler("birdie", world.arms, 12, 0), World(0), 12)
    assert np.mean(bandit.actions, 0)[focus].sum() > np.mean(plain.actions, 0)[focus].sum()
    assert make_scheduler("birdie", world.arms, 12, 0, "none").focus == plain.focus == ""
    with pytest.raises(ValueError, match="focus 'copy' is no class; choose one of .*copying.* or none"):
        make_scheduler("birdie", EVERY, 100, 0, "copy")
    with pytest.raises(ValueError, match="mixture 'ntp' is fixed; drop --focus"):
        make_scheduler("ntp", EVERY, 100, 0, "copying")


def run(bandit, world, n):
    for step in range(n):
        bandit.update(step, world.losses())
        world.train(bandit.action, 1 / n)
    return bandit


def test_the_bandit_predicts_learns_its_history_and_gives_probabilities():
    world = World(0)
    bandit = run(Birdie(world.arms, 0, seed=0, train_steps=60), world, 4)
    assert all((action >= 0).all() and np.isclose(action.sum(), 1) for action in bandit.actions)
    assert len({action.tobytes() for action in bandit.actions}) == 4              # it does choose
    bandit.losses.append(world.losses())                                          # in the middle of an update
    bandit.train_steps = 1
    bandit.fit()
    bandit.train_steps = 60
    bandit.fit()
    assert bandit.errors[-1] < 0.5 * bandit.errors[-2]                            # the error on its history falls
    action, predicted_total = bandit.choose()
    losses, actions = bandit.history()
    candidates = [action, *propose(world.arms, 64, np.random.default_rng(1), "hierarchical")]
    with torch.no_grad():                                                         # the history anew for each
        predicted = torch.cat([bandit.model(losses, torch.cat([actions, torch.tensor(c).float()[None, None]], 1))[0][:, -1]
                               for c in candidates]).double().numpy()
    assert predicted.std(0).min() > 1e-4                                          # predictions differ between actions
    assert predicted_total == pytest.approx(predicted[0] ** 3 @ bandit.weights, abs=1e-3)
    assert predicted_total > np.quantile(predicted[1:] @ bandit.weights, 0.9)     # and the best are chosen


def test_the_bandit_is_uniform_until_its_first_choice_and_deterministic_by_seed():
    results = []
    for seed in (0, 0, 1):
        world = World(3)
        bandit = Birdie(world.arms, max_steps=256, seed=seed, train_steps=5)      # first choice at step 2
        results.append(run(bandit, world, 4).actions)
    assert all((action == 1 / 32).all() for action in results[0][:2]) and (results[0][2] != 1 / 32).any()
    assert all(np.array_equal(a, b) for a, b in zip(results[0], results[1]))
    assert not np.array_equal(results[0][3], results[2][3])


def test_a_bandit_loaded_in_the_middle_goes_on_bit_for_bit(tmp_path):
    one, world, other_world = Birdie(World(5).arms, 0, train_steps=10), World(5), World(5)
    run(one, world, 3), run(Birdie(World(5).arms, 0, train_steps=10), other_world, 3)
    torch.save(one.state_dict(), tmp_path / "state")
    other = Birdie(world.arms, 0, train_steps=10)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert np.array_equal(run(one, world, 3).actions, run(other, other_world, 3).actions)
    with pytest.raises(ValueError, match="birdie"):
        Birdie(world.arms[1:], 0).load_state_dict(one.state_dict())


@pytest.mark.parametrize("odd", (nan, inf, 0.0))
def test_the_bandit_survives_odd_losses_and_a_history_of_one(odd):
    bandit = Birdie(World(0).arms, 0, train_steps=3)
    for step in range(4):
        losses = np.linspace(1, 2, 32) / (step + 1)
        losses[step] = odd
        bandit.update(step, losses)
        assert np.isfinite(bandit.action).all() and np.isclose(bandit.action.sum(), 1)
    assert np.isfinite(bandit.errors).all()


def test_a_class_counts_once_however_many_arms_it_has():
    weights = class_weights(EVERY)
    assert all(np.isclose(sum(w for w, arm in zip(weights, EVERY) if arm.cls == cls), 1) for cls in CLASSES)


def test_in_a_simulated_world_the_bandit_beats_uniform_and_a_search_beats_the_bandit():
    bandit, uniform, best = (scheduler.run_way(way, 4) for way in ("bandit", "uniform", "best fixed mixture, by search"))
    assert best < bandit < 0.95 * uniform


# ---- running the file ----

def test_the_demonstration_runs(capsys):
    scheduler.main(n_evaluations=3)
    assert "total loss at the end" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["table", "x"], ["plot", "README.md"]])
def test_a_wrong_command_ends_in_one_line(wrong):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found = subprocess.run([sys.executable, "scheduler.py", *wrong], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_the_plot_is_drawn_from_a_log(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    names = [arm.name for arm in EVERY]
    lines = [dict(step=-1, arms=names)] + [dict(step=s, eval={key: [0.1] * 96 for key in ("loss", "accuracy", "action")})
                                           for s in (0, 10)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scheduler.plot(str(tmp_path / "log.jsonl"))
    assert (tmp_path / "log.png").stat().st_size > 1000
