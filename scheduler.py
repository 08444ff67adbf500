"""scheduler.py -- which objective comes next: a probability for every arm.

    action[k] = probability that a training sample is made by arm k          (section 3.3, A.6)

An arm is one configuration of one objective class (objectives.arms). Every scheduler has one face:

    .action                  float64 (arms,): what samples are drawn by until the next evaluation
    .update(step, losses)    told after every evaluation: validation loss of each arm, in nats a label token
    .state_dict(), .load_state_dict(state)

Fixed mixtures (A.6, table 6), in shares of samples:
    ntp       next token prediction alone: the baseline
    ul2       60% next token prediction, 20% prefix LM, 10% infilling in short spans, 10% in long ones
    fixed     the eight classes at equal weight, a class's arms at equal weight within it (the paper's
              ratios are unpublished)
    uniform   every arm at equal weight

Run it:  python scheduler.py      each mixture's share of every class
"""
from typing import Sequence

import numpy as np

MIXTURES = ("ntp", "ul2", "fixed", "uniform")


class FixedMixture:
    """A scheduler that never changes its mind."""

    def __init__(self, name: str, arms: Sequence):
        """arms: what objectives.arms gives. Raises ValueError for an unknown name, or a class left empty."""
        self.name, self.action = name, mixture(name, arms)

    def update(self, step: int, losses: np.ndarray) -> None:
        pass

    def state_dict(self) -> dict:
        return {"name": self.name}

    def load_state_dict(self, state: dict) -> None:
        if state.get("name") != self.name:
            raise ValueError(f'the saved scheduler is {state.get("name")!r}, not {self.name!r}; '
                             f'pass --mixture={state.get("name")}')


def mixture(name: str, arms: Sequence) -> np.ndarray:
    """The named mixture as a probability over arms, float64 (arms,)."""
    if name == "ntp":
        parts = [(1.0, lambda arm: arm.cls == "next_token_prediction")]
    elif name == "ul2":
        parts = [(0.6, lambda arm: arm.cls == "next_token_prediction"),
                 (0.2, lambda arm: arm.cls == "prefix_lm"),
                 (0.1, lambda arm: arm.cls == "infilling" and (arm.mean_span, arm.masked) == (3, 15)),
                 (0.1, lambda arm: arm.cls == "infilling" and (arm.mean_span, arm.masked) == (32, 50))]
    elif name == "fixed":
        classes = sorted({arm.cls for arm in arms})
        parts = [(1 / len(classes), lambda arm, cls=cls: arm.cls == cls) for cls in classes]
    elif name == "uniform":
        parts = [(1.0, lambda arm: True)]
    else:
        raise ValueError(f'mixture {name!r} is unknown; choose one of {", ".join(MIXTURES)}')
    action = np.zeros(len(arms))
    for weight, chosen in parts:
        members = [k for k, arm in enumerate(arms) if chosen(arm)]
        if not members:
            raise ValueError(f"mixture {name!r} needs an arm that this block_size has no room for; "
                             f"raise --block_size")
        action[members] += weight / len(members)
    return action


def evaluation_steps(max_steps: int, apart: int = 10) -> list[int]:
    """Training steps that begin with an evaluation: the paper's schedule for 32,000 steps (A.1), scaled,
    between the first step and the end. Those of a short run stay `apart` steps apart (our choice)."""
    paper = [10, 50, 250, 500, 1000, 1500, *range(2000, 32000, 1000)]
    steps = [0]
    for step in paper:
        scaled = round(step * max_steps / 32000)
        if steps[-1] + apart <= scaled <= max_steps - apart:
            steps.append(scaled)
    return steps + [max_steps]


def main():
    from objectives import CLASSES, arms
    every = arms(2048)
    print(f'{"share of samples, %":26s}' + "".join(f"{name:>9s}" for name in MIXTURES))
    for cls in CLASSES:
        mine = np.array([arm.cls == cls for arm in every])
        shares = [100 * mixture(name, every)[mine].sum() for name in MIXTURES]
        print(f"{cls:26s}" + "".join(f"{share:9.1f}" for share in shares) + f"   {mine.sum():2d} arms")


if __name__ == "__main__":
    main()
