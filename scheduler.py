"""Which objective comes next: fixed mixtures, and Birdie, the bandit that learns a mixture.

    dL = (new - old) / old,   S = sqrt(old new)
    R  = clip(-100 e tanh(e S dL^3), -1, 1)         an arm's reward: 1 for a fast fall (3.3)
    total = sum over classes of the mean R of a class's arms

Symbols (sections are of Birdie, arXiv 2411.01030)
    arm         one configuration of one objective class; has .cls, .name and .options (a dict)
    losses      float64 (arms,): validation loss of every arm, in nats a label token
    old, new    an arm's loss at one evaluation and at the next
    action      float64 (arms,): the probability that a training sample is made by an arm
    K           evaluations so far

At every evaluation the bandit knows which losses and action led to which R so far. Its reward
model, four causal Gated SSM layers over the K evaluations, is trained on that; then 2,048 random
actions are tried in the model, and the mean of the eight with the highest predicted total is the
action until the next evaluation (A.1).

A scheduler, learned or fixed, is any object with
    .action                   what samples are drawn by until the next evaluation
    .update(step, losses)     told at every evaluation; may change .action
    .state_dict()             tensors, numbers, strings, and lists or dicts of these
    .load_state_dict(state)   goes on from there; ValueError if the state is another scheduler's
    .predicted                optional: the total expected of .action, or None
To add your own, write such a class and name it in MIXTURES, at the end: train.py's --mixture and
the tests take it from there.

Run it:  python scheduler.py        the bandit in a simulated run, against uniform

Departures, ours
    proposals     can reach the corners (see `propose`)
    reward model  learns the cube root of R, as R goes with dL^3: a fall by 1% earns an
                  eight-thousandth of what 20% does, and would be lost beside it. Its Gated SSM
                  layers scale their input by 1 - f, the paper's do not
    sign of dL    turned: as printed, a rise would be rewarded (the authors' later code agrees)
"""
import math
from functools import partial
from types import SimpleNamespace
from typing import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Boundaries, ModelConfig, run_blocks


def reward(old, new):
    """R of a loss that went from `old` to `new`: numbers or arrays, in [-1, 1] (section 3.3).

    Our choice where the formula has no value: 0 where a loss is missing (nan), 1 for a return from
    infinity, -1 for a rise to infinity or from a loss of 0.
    """
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    with np.errstate(all="ignore"):
        dL, S = (new - old) / old, np.sqrt(old * new)
        R = np.clip(-100 * math.e * np.tanh(math.e * S * dL ** 3), -1, 1)
    no_value = np.isinf(old) | np.isinf(new) | (old == 0)
    R = np.where(no_value, np.sign((old > new) * 1.0 - (old < new)), R)
    missing = np.isnan(old) | np.isnan(new)
    return np.where(missing, 0.0, R)[()] + 0.0          # [()]: a number for numbers; + 0.0: no -0


def class_weights(arms: Sequence) -> np.ndarray:
    """(arms,): 1 / arms in the class, so that class_weights @ rewards is the total reward."""
    classes = [arm.cls for arm in arms]
    return np.array([1 / classes.count(cls) for cls in classes])


def evaluation_steps(max_steps: int) -> list[int]:
    """Training steps that begin with an evaluation, from 0 to max_steps.

    The paper's for 32,000 steps (A.1), scaled; in short runs 10 steps apart (our choice).
    """
    paper = [10, 50, 250, 500, 1000, 1500, *range(2000, 32000, 1000)]
    steps = [0]
    for step in paper:
        scaled = round(step * max_steps / 32000)
        if steps[-1] + 10 <= scaled <= max_steps - 10:
            steps.append(scaled)
    return steps + [max_steps]


def check_saved(state: dict, name: str, arms: Sequence) -> None:
    """Raise ValueError if `state` is of another scheduler than `name`, or over other arms."""
    if state.get("name") != name:
        raise ValueError(f"the saved scheduler is {state.get('name')!r}, not {name!r}; "
                         f"resume with the saved --mixture")
    saved, names = state["arms"], [arm.name for arm in arms]
    if saved != names:
        differ = ", ".join(sorted(set(saved) ^ set(names))[:3]) or "their order"
        raise ValueError(f"the saved scheduler has {len(saved)} arms, this one {len(names)}, and "
                         f"they differ in {differ}; resume it with the code it was made with")


# ---- fixed mixtures (A.6, table 6) ---------------------------------------------------------------

def split(arms: Sequence, *parts) -> np.ndarray:
    """(arms,): each part (share, class, options) is split evenly over the arms it describes."""
    weights = np.zeros(len(arms))
    for share, cls, options in parts:
        members = [k for k, arm in enumerate(arms)
                   if arm.cls == cls and options.items() <= arm.options.items()]
        if not members:
            raise ValueError(f"the mixture needs an arm of {cls} {options or ''}, for which this "
                             f"block_size has no room; raise --block_size")
        weights[members] += share / len(members)
    return weights


FIXED = {       # functions from arms to weights, in shares of samples
    "ntp": lambda arms: split(arms, (1.0, "next_token_prediction", {})),        # the baseline
    "ul2": lambda arms: split(arms, (0.6, "next_token_prediction", {}), (0.2, "prefix_lm", {}),
                              (0.1, "infilling", {"mean_span": 3, "masked": 15}),
                              (0.1, "infilling", {"mean_span": 32, "masked": 50})),
    "fixed": class_weights,     # the classes at equal weight (the paper's ratios are unpublished)
    "uniform": lambda arms: np.ones(len(arms)),
    # without the two classes that practise copying, and with one of them: are they what helps?
    "no-copying": lambda arms: class_weights(arms) * ["copying" not in arm.cls for arm in arms],
    "ntp-copying": lambda arms: split(arms, (0.5, "next_token_prediction", {}),
                                      (0.5, "copying", {})),
}


class FixedMixture:
    """A scheduler that never changes its mind."""

    def __init__(self, name: str, arms: Sequence, max_steps: int, seed: int):
        """name: in FIXED. The other arguments are those of every scheduler."""
        self.name, self.arms = name, arms
        self.action = FIXED[name](arms) / FIXED[name](arms).sum()

    def update(self, step: int, losses: np.ndarray) -> None:
        pass

    def state_dict(self) -> dict:
        return {"name": self.name, "arms": [arm.name for arm in self.arms]}

    def load_state_dict(self, state: dict) -> None:
        check_saved(state, self.name, self.arms)


# ---- the bandit ----------------------------------------------------------------------------------

def propose(arms: Sequence, n: int, rng: np.random.Generator):
    """n random actions, float64 (n, arms): a sparse Dirichlet over the classes, a flat one within.

    Figure 4's proposals are uniform numbers, normalised: with 96 arms none gives an arm more than
    about twice its share, so next token prediction could not pass 2%, and figure 5 has classes at
    60%. Here too every arm has the same share on average: a model that knows nothing chooses that.
    """
    classes = list(dict.fromkeys(arm.cls for arm in arms))
    of_arm = np.array([classes.index(arm.cls) for arm in arms])             # an arm's class
    average = np.bincount(of_arm) / len(arms)
    shares = rng.dirichlet(0.5 * len(classes) * average, n)                 # (n, classes)
    within = rng.exponential(size=(n, len(arms)))       # over its sum: a flat Dirichlet
    sums = within @ np.eye(len(classes))[of_arm]                            # (n, classes)
    weights = (shares / sums)[:, of_arm] * within
    return weights / weights.sum(1, keepdims=True)


class RewardModel(nn.Module):
    """(losses, action) at an evaluation -> cube root of every arm's R until the next (A.1.5)."""

    def __init__(self, n_arms: int):
        super().__init__()
        self.config = ModelConfig(n_layer=4, d_model=256, d_state=256, causal=True, memory=64,
                                  conv_width=0)
        self.norm_losses = nn.RMSNorm(n_arms, eps=1e-6)
        self.norm_actions = nn.RMSNorm(n_arms, eps=1e-6)
        self.W_in = nn.Linear(2 * n_arms, 256)
        self.blocks = nn.ModuleList(Block(self.config, layer) for layer in range(4))
        self.norm = nn.RMSNorm(256, eps=1e-6)
        self.W_reward = nn.Linear(256, n_arms)

    def forward(self, losses, actions, states=None):
        """losses, actions (B, K, arms) -> (B, K, arms), and the blocks' states after step K."""
        B, K, _ = losses.shape
        reset = torch.zeros(B, K, dtype=torch.uint8)
        boundaries = Boundaries(reset, self.config, last=torch.full((B,), K - 1))
        x = self.W_in(torch.cat([self.norm_losses(losses), self.norm_actions(actions)], -1))
        x, states = run_blocks(self, x, boundaries, states)
        return self.W_reward(self.norm(x)), states


class Birdie:
    """The bandit. The same seed, losses and steps give the same actions."""
    train_steps = 200                           # of the reward model, at every evaluation (A.1.5)

    def __init__(self, arms: Sequence, max_steps: int, seed=0):
        self.arms, self.seed = arms, seed
        self.first_choice = round(250 * max_steps / 32000)      # uniform until then (A.1)
        self.weights = class_weights(arms)
        self.action, self.predicted = np.full(len(arms), 1 / len(arms)), None
        self.losses, self.actions = [], []      # at every evaluation; in force from there on
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = RewardModel(len(arms))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95),
                                           weight_decay=0.1, fused=True)

    def update(self, step: int, losses: np.ndarray) -> None:
        """Learn what the last action did, and choose the next."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)        # the matrices are small: 4 threads took twice as long
        try:
            self.losses.append(np.array(losses, np.float64))
            if len(self.losses) > 1:
                self.fit()
                if step >= self.first_choice:
                    self.action, self.predicted = self.choose()
            self.actions.append(self.action)
        finally:
            torch.set_num_threads(threads)

    def history(self):
        """Losses and actions (1, K, arms) as the model reads them; a missing loss counts as 0."""
        losses = np.nan_to_num(self.losses, nan=0.0, posinf=100.0)
        return [torch.tensor(np.array(rows)).float()[None] for rows in (losses, self.actions)]

    def fit(self) -> float:
        """Train the reward model on every interval so far -> its last mean squared error."""
        losses, actions = self.history()
        R = reward(np.array(self.losses[:-1]), np.array(self.losses[1:]))
        target = torch.tensor(np.cbrt(R)).float()[None]                     # (1, K - 1, arms)
        for _ in range(self.train_steps):
            error = F.mse_loss(self.model(losses[:, :-1], actions)[0], target)
            self.optimizer.zero_grad()
            error.backward()
            self.optimizer.step()
        return error.item()

    @torch.no_grad()
    def choose(self):
        """-> (the mean of the eight best of 2,048 proposals, the total reward predicted for it)."""
        rng = np.random.default_rng([self.seed, len(self.losses)])
        proposals = propose(self.arms, 2048, rng)
        losses, actions = self.history()
        _, states = self.model(losses[:, :-1], actions)     # the past once, not for each proposal
        weights = torch.tensor(self.weights).float()

        def predict(candidates):                            # (n, arms) -> (n, arms)
            n = len(candidates)
            one_more = torch.tensor(candidates).float()[:, None]
            past = [(h0.expand(n, -1, -1), None) for h0, _ in states]
            return self.model(losses[:, -1:].expand(n, -1, -1), one_more, past)[0][:, 0]

        best = (predict(proposals) @ weights).topk(8).indices.numpy()
        action = proposals[best].mean(0)
        action /= action.sum()
        return action, float(predict(action[None]) ** 3 @ weights)

    def state_dict(self) -> dict:
        return {"name": "birdie", "arms": [arm.name for arm in self.arms],
                "action": torch.tensor(self.action), "predicted": self.predicted,
                "losses": torch.tensor(np.array(self.losses)),
                "actions": torch.tensor(np.array(self.actions)),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        check_saved(state, "birdie", self.arms)
        self.action, self.predicted = state["action"].numpy(), state["predicted"]
        self.losses, self.actions = list(state["losses"].numpy()), list(state["actions"].numpy())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


# ---- every scheduler by its name; add your own here ----------------------------------------------
# A constructor is called with (arms, max_steps, seed).

MIXTURES = {name: partial(FixedMixture, name) for name in FIXED} | {
    "birdie": Birdie,
    "birdie-causal": Birdie,        # on a model without bidirectional blocks, which train.py makes
}


def make_scheduler(name: str, arms: Sequence, max_steps: int, seed: int = 0):
    """The scheduler of that name in MIXTURES; ValueError for another name."""
    if name not in MIXTURES:
        raise ValueError(f"mixture {name!r} is unknown; choose one of {', '.join(MIXTURES)}")
    return MIXTURES[name](arms, max_steps, seed)


# ---- demonstration -------------------------------------------------------------------------------

def main(n_evaluations: int = 10):
    """A simulated run: the losses of two classes fall with the samples these get, one's never."""
    classes = ("useless", "quick", "slow")
    height, speed = np.array([3, 3, 6]), np.array([0, 6, 3])
    arms = [SimpleNamespace(cls=cls, name=f"{cls}-{k}") for cls in classes for k in range(4)]
    bandit = Birdie(arms, max_steps=0)              # 0: it chooses from the second evaluation on
    bandit.train_steps = 50                         # for a demonstration of seconds
    end = []
    print("Share of the samples by class\n"
          "evaluation  " + "".join(f"{cls:27s}" for cls in classes) + "total loss")
    for scheduler in (bandit, make_scheduler("uniform", arms, max_steps=0)):
        samples = np.zeros(3)                       # that a class has had, in units of the run
        for step in range(n_evaluations):
            losses = 1 + height * np.exp(-speed * samples)
            scheduler.update(step, losses.repeat(4))
            shares = scheduler.action.reshape(3, 4).sum(1)
            samples += shares / n_evaluations
            if scheduler is bandit:
                bars = "".join(f"{share:4.0%} {'#' * round(20 * share):22s}" for share in shares)
                print(f"{step:10d}  {bars}{losses.sum():10.2f}")
        end.append((1 + height * np.exp(-speed * samples)).sum())
    print("\nTotal loss at the end: bandit {:.2f}, uniform {:.2f}".format(*end))


if __name__ == "__main__":
    main()
