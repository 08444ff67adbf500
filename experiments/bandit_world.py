"""The bandit against other schedulers in simulated worlds, where the truth is known.

Makes the table "In a simulated world" of experiments/measurements.md: the total loss at the end of
a run of 12 evaluations, as mean and standard deviation over worlds, and in how many it is below
uniform's.

    python experiments/bandit_world.py [SEEDS]      over SEEDS worlds (10), one process a core

A world with its schedulers takes about two minutes on one core.
"""
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from scheduler import Birdie, class_weights, make_scheduler, propose


class World:
    """Eight classes of four arms whose losses fall by known laws, told apart only by their losses.

    The seed deals out the roles of classes:
    useless     training on them changes nothing
    saturates   soon learnt
    teacher     its own loss falls, and that of one hard class thrice as fast as by its own training
    hard        a large loss that falls slowly
    The arms of a class differ in speed, floor and height of their loss.
    """
    roles = ("useless", "useless", "saturates", "saturates", "teacher", "teacher", "hard", "hard")
    speed = {"useless": 0.0, "saturates": 12.0, "teacher": 3.0, "hard": 1.0}

    def __init__(self, seed: int):
        self.rng = rng = np.random.default_rng([7, seed])
        role = rng.permutation(self.roles)
        self.role, n = np.repeat(role, 4), 32                               # of every arm
        self.arms = [SimpleNamespace(cls=f"{role[k // 4]}-{k // 4}", options={},
                                     name=f"{role[k // 4]}-{k // 4}-{k % 4}") for k in range(n)]
        gain = np.diag([self.speed[r] for r in role])   # [by training on a class, skill in a class]
        gain[role == "teacher", role == "hard"] = 3     # each teacher has its pupil
        by_arms = np.kron(gain, np.full((4, 4), 1 / 4))
        self.teaches = by_arms * rng.uniform(0.5, 2, (n, 1))
        self.floor = rng.uniform(0.3, 1, n)
        self.fall = np.where(self.role == "hard", 4.0, 1.5) * rng.uniform(0.7, 1.3, n)
        self.skill = np.zeros(n)

    def losses(self, noise: float = 0.003) -> np.ndarray:
        """Validation losses (arms,), with the noise of a finite validation set."""
        loss = self.floor + self.fall * np.exp(-self.skill)
        return loss * (1 + noise * self.rng.standard_normal(len(loss)))

    def train(self, action, time: float) -> None:
        """`time`: the share of the run that passes under this action."""
        self.skill += 8 * time * action @ self.teaches

    def total(self) -> float:
        """The sum over classes of the mean loss of a class's arms."""
        return float(class_weights(self.arms) @ self.losses(noise=0))


def run(scheduler, world: World, n_evaluations: int = 12) -> float:
    """One training run -> the total loss at its end."""
    for step in range(n_evaluations):
        scheduler.update(step, world.losses())
        world.train(scheduler.action, 1 / n_evaluations)
    return world.total()


def best_fixed(world: World, seed: int, n: int = 2000) -> float:
    """The lowest total loss that any of n proposed mixtures reaches when kept for the whole run."""
    actions = propose(world.arms, n, np.random.default_rng(seed))
    losses = world.floor + world.fall * np.exp(-8 * actions @ world.teaches)
    return float((losses @ class_weights(world.arms)).min())


def bandit(world: World, seed: int) -> float:
    return run(Birdie(world.arms, 0, seed), world)                  # 0 steps: it decides at once


def flat(arms, n, rng):
    """Proposals as in figure 4: uniform numbers, normalised."""
    weights = rng.random((n, len(arms)))
    return weights / weights.sum(1, keepdims=True)


def pareto(arms, n, rng):
    """The authors' later code: a quarter uniform numbers, the rest Pareto's of shape 1, 2, 3."""
    weights = 1 + rng.pareto([[[1]], [[2]], [[3]]], (3, n // 4, len(arms)))
    weights = np.concatenate([*weights, rng.random((n - 3 * (n // 4), len(arms)))])
    return weights / weights.sum(1, keepdims=True)


class Exploring(Birdie):
    """The authors' later code: half of the actions at first, later a fifth, are not chosen but
    random, and give nearly all samples to one or two classes."""
    n_evaluations = 12

    def update(self, step, losses):
        super().update(step, losses)
        rng = np.random.default_rng([self.seed, step])
        share = 0.2 + 0.15 * (1 + np.cos(np.pi * step / self.n_evaluations))
        if rng.random() < share:
            of_arm = np.unique([arm.cls for arm in self.arms], return_inverse=True)[1]
            weights = np.full(len(self.arms), 0.005)
            for cls in rng.choice(of_arm.max() + 1, rng.integers(1, 3), replace=False):
                weights[of_arm == cls] = rng.random((of_arm == cls).sum())
            self.action = self.actions[-1] = weights / weights.sum()


def exploring_bandit(world: World, seed: int) -> float:
    return run(Exploring(world.arms, 0, seed), world)


WAYS = {
    "uniform": lambda world, seed: run(make_scheduler("uniform", world.arms, 0), world),
    "bandit with figure 4's proposals": patch("scheduler.propose", flat)(bandit),
    "bandit with Pareto's": patch("scheduler.propose", pareto)(bandit),
    "the same, and it explores": patch("scheduler.propose", pareto)(exploring_bandit),
    "bandit": bandit,
    "best fixed mixture, by search": best_fixed,
}


def total_loss(way: str, seed: int) -> float:
    torch.set_num_threads(1)
    return WAYS[way](World(seed), seed)


def table(n_seeds: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{'total loss after the run':34s}{'mean':>7s}{'std':>7s}  beats uniform in", flush=True)
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        for way in WAYS:
            totals = np.array(list(pool.map(total_loss, [way] * n_seeds, range(n_seeds))))
            uniform = totals if way == "uniform" else uniform
            beaten = f"{(totals < uniform).sum():3d} of {n_seeds}"
            print(f"{way:34s}{totals.mean():7.2f}{totals.std():7.2f}  {beaten}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            table(10)
        case [n] if n.isdigit() and int(n) > 0:
            table(int(n))
        case _:
            raise SystemExit("error: python experiments/bandit_world.py [SEEDS], a number from 1")
