"""scheduler.py -- which objective comes next: fixed mixtures, and the bandit that learns a mixture.

    action[k]   probability that a training sample is made by arm k                 (section 3.3, A.6)
    losses[k]   validation loss of arm k, in nats a label token
    dL = (new - old) / old,   S = sqrt(old new)
    reward      R = clip(-100 e tanh(e S dL^3), -1, 1): 1 for a fast fall of the loss    (section 3.3)

An arm is one configuration of one objective class (objectives.arms). The bandit keeps a history of
(losses, action) -> rewards. At every evaluation its reward model, four causal Gated SSM layers over that
history, is trained on all of it; then 2,048 random actions are tried in the model, and the mean of the
eight with the highest predicted total is the action until the next evaluation. The total is the sum over
classes of the mean over a class's arms, so a class with many arms counts as much as one with one.

Every scheduler has one face:
    .action                  float64 (arms,): what samples are drawn by until the next evaluation
    .update(step, losses)    told after every evaluation
    .predicted               the total reward expected of .action, None if no one predicts
    .state_dict(), .load_state_dict(state)

Fixed mixtures (A.6, table 6), in shares of samples:
    ntp       next token prediction alone: the baseline
    ul2       60% next token prediction, 20% prefix LM, 10% infilling in short spans, 10% in long ones
    fixed     the eight classes at equal weight, a class's arms at equal weight within it (the paper's
              ratios are unpublished)
    uniform   every arm at equal weight

Run it:  python scheduler.py                       the bandit in a simulated world of arms
         python scheduler.py table 100             the bandit against others in 100 such worlds
         python scheduler.py plot out/log.jsonl    figure 5 of a run: loss, accuracy and probability

Departures, ours: proposals can reach the corners and have a focus (see `propose`); the reward model learns the cube
root of R, as R goes with dL^3: a loss that falls by 1% earns an eight-thousandth of what 20% does, and is lost beside
it; the printed sign of dL is turned, so that improvement is rewarded.
"""
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Layout, ModelConfig

MIXTURES = ("ntp", "ul2", "fixed", "uniform", "birdie", "birdie-causal")


def reward(old, new):
    """Reward for a loss that went from `old` to `new`: numbers or arrays, in [-1, 1] (section 3.3).

    Our choice where the formula has no value: 0 where either loss is missing (nan), 1 for a return from
    infinity, -1 for a rise to it or from a loss of 0.
    """
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    with np.errstate(all="ignore"):
        value = -100 * math.e * np.tanh(math.e * np.sqrt(old * new) * ((new - old) / old) ** 3)
    no_value = np.isinf(old) | np.isinf(new) | (old == 0)
    value = np.where(no_value, np.sign((old > new) * 1.0 - (old < new)), value)
    return np.clip(np.where(np.isnan(old) | np.isnan(new), 0.0, value), -1, 1)[()] + 0.0


def class_weights(arms: Sequence) -> np.ndarray:
    """(arms,): 1 / arms in the class, so that weights @ rewards is the total reward."""
    classes = [arm.cls for arm in arms]
    return np.array([1 / classes.count(cls) for cls in classes])


# ---- fixed mixtures --------------------------------------------------------------------------------

class FixedMixture:
    """A scheduler that never changes its mind."""
    predicted = None

    def __init__(self, name: str, arms: Sequence):
        """arms: what objectives.arms gives. Raises ValueError for an unknown name, or a class left empty."""
        self.name, self.action = name, mixture(name, arms)

    def update(self, step: int, losses: np.ndarray) -> None:
        pass

    def state_dict(self) -> dict:
        return {"name": self.name}

    def load_state_dict(self, state: dict) -> None:
        if state.get("name") != self.name:
            raise ValueError(f"the saved scheduler is {state.get('name')!r}, not {self.name!r}; "
                             f"pass --mixture={state.get('name')}")


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
        return class_weights(arms) / class_weights(arms).sum()
    elif name == "uniform":
        parts = [(1.0, lambda arm: True)]
    else:
        raise ValueError(f"mixture {name!r} is unknown; choose one of {', '.join(MIXTURES)}")
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


# ---- the bandit ------------------------------------------------------------------------------------

def propose(arms: Sequence, n: int, rng: np.random.Generator, kind: str, focus: str = "") -> np.ndarray:
    """n random actions (n, arms), each a probability.

    "flat": uniform numbers, normalised (figure 4). With 96 arms none of these gives an arm more than about
    twice its share, so next token prediction could never pass 2%, yet figure 5 shows classes between 0
    and 60%. "hierarchical", our choice: a sparse Dirichlet over the classes, a flat one within each; on
    average every arm has the same share, as in figure 4's, so a model that knows nothing yet chooses that. With a
    `focus`, that class has half on average, and the others share the rest alike: the bandit decides around that.
    """
    if kind == "flat":
        weights = rng.random((n, len(arms)))
    else:
        classes = list(dict.fromkeys(arm.cls for arm in arms))
        member = np.array([classes.index(arm.cls) for arm in arms])
        sizes = np.bincount(member)
        average = sizes / sizes.sum()
        if focus:
            average = np.where(np.array(classes) == focus, 0.5, 0.5 / (len(classes) - 1))
        shares = rng.dirichlet(0.5 * len(classes) * average, n)                     # (n, classes)
        within = rng.exponential(size=(n, len(arms)))
        sums = np.stack([within[:, member == c].sum(1) for c in range(len(classes))], 1)
        weights = shares[:, member] * within / sums[:, member]
    return weights / weights.sum(1, keepdims=True)


class RewardModel(nn.Module):
    """(losses, action) at each evaluation so far -> every arm's reward at the next (A.1.5), or its cube root."""

    def __init__(self, n_arms: int):
        super().__init__()
        self.config = ModelConfig(d_model=256, d_state=256, n_layer=4, block_size=64, causal=True, conv_width=0)
        self.norms = nn.ModuleList([nn.RMSNorm(n_arms, eps=1e-6) for _ in range(2)])
        self.W_in = nn.Linear(2 * n_arms, 256)
        self.blocks = nn.ModuleList(Block(self.config, layer) for layer in range(self.config.n_layer))
        self.norm = nn.RMSNorm(256, eps=1e-6)
        self.W_reward = nn.Linear(256, n_arms)

    def forward(self, losses, actions, states=None):
        """losses, actions (B, K, arms) -> rewards (B, K, arms), and each block's state after step K."""
        B, K, _ = losses.shape
        layout = Layout(torch.zeros(B, K, dtype=torch.uint8), self.config, last=torch.full((B,), K - 1))
        x = self.W_in(torch.cat([norm(part) for norm, part in zip(self.norms, (losses, actions))], -1))
        new_states = []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks)):
            x, state = block(x, layout, state)
            new_states.append(state)
        return self.W_reward(self.norm(x)), new_states


class Birdie:
    """The bandit. Deterministic: the same seed, losses and steps give the same actions."""

    def __init__(self, arms: Sequence, max_steps: int, seed: int = 0, focus: str = "", proposals: str = "hierarchical",
                 root: bool = True, train_steps: int = 200):
        classes = sorted({arm.cls for arm in arms})
        if focus and focus not in classes:
            raise ValueError(f"focus {focus!r} is no class; choose one of {', '.join(classes)}, or none")
        self.arms, self.seed, self.focus, self.proposals, self.root = arms, seed, focus, proposals, root
        self.train_steps = train_steps
        self.first_choice = round(250 * max_steps / 32000)     # uniform until then (A.1)
        self.weights = class_weights(arms)
        self.action, self.predicted = np.full(len(arms), 1 / len(arms)), None
        self.losses, self.actions = [], []                     # the history: losses, and the action from then on
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = RewardModel(len(arms))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                                           fused=True)
        self.errors = []                                       # mean squared error after each update

    def update(self, step: int, losses: np.ndarray) -> None:
        """Learn from what the last action did, and choose the next."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)          # its matrices are small: 4 threads took twice as long as 1
        self.losses.append(np.asarray(losses, np.float64))
        if len(self.losses) > 1:
            self.fit()
        if step >= self.first_choice and len(self.losses) > 1:
            self.action, self.predicted = self.choose()
        self.actions.append(self.action)
        torch.set_num_threads(threads)

    def history(self):
        """Losses, actions (1, K, arms) as the model reads them: missing losses count as 0."""
        losses = torch.tensor(np.nan_to_num(self.losses, nan=0.0, posinf=100.0), dtype=torch.float32)
        return losses[None], torch.tensor(np.array(self.actions), dtype=torch.float32)[None]

    def fit(self) -> None:
        losses, actions = self.history()
        rewards = np.array([reward(old, new) for old, new in zip(self.losses, self.losses[1:])])
        target = np.cbrt(rewards) if self.root else rewards
        target = torch.tensor(target, dtype=torch.float32)[None]                  # (1, K, arms)
        for _ in range(self.train_steps):
            error = F.mse_loss(self.model(losses[:, :-1], actions)[0], target)
            self.optimizer.zero_grad()
            error.backward()
            self.optimizer.step()
        self.errors.append(error.item())

    @torch.no_grad()
    def choose(self):
        """-> (the mean of the best proposals, the total reward predicted for it)."""
        rng = np.random.default_rng([self.seed, len(self.losses)])
        proposals = propose(self.arms, 2048, rng, self.proposals, self.focus)
        losses, actions = self.history()
        _, states = self.model(losses[:, :-1], actions)
        weights = torch.tensor(self.weights, dtype=torch.float32)

        def predict(candidates):
            n = len(candidates)
            grown = [(h0.expand(n, -1), None) for h0, _ in states]
            candidates = torch.tensor(candidates, dtype=torch.float32)[:, None]
            return self.model(losses[:, -1:].expand(n, 1, -1), candidates, grown)[0][:, 0]

        best = (predict(proposals) @ weights).topk(8).indices.numpy()
        action = proposals[best].mean(0)
        action /= action.sum()
        return action, float((predict(action[None]) ** (3 if self.root else 1)) @ weights)

    def state_dict(self) -> dict:
        return {"name": "birdie", "action": torch.tensor(self.action), "predicted": self.predicted,
                "losses": torch.tensor(np.array(self.losses)), "actions": torch.tensor(np.array(self.actions)),
                "errors": list(self.errors),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if state.get("name") != "birdie" or len(state["action"]) != len(self.arms):
            raise ValueError(f"the saved scheduler is {state.get('name')!r} over {len(state.get('action', ()))} arms, "
                             f"not birdie over {len(self.arms)}; resume with the saved --mixture and --block_size")
        self.action, self.predicted, self.errors = state["action"].numpy(), state["predicted"], list(state["errors"])
        self.losses, self.actions = list(state["losses"].numpy()), list(state["actions"].numpy())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def make_scheduler(name: str, arms: Sequence, max_steps: int, seed: int = 0, focus: str = ""):
    """The scheduler of that name; birdie-causal is birdie on a model without bidirectional blocks (A.6).
    focus: see `propose`; "" or "none" for none, and a fixed mixture has none."""
    focus = "" if focus == "none" else focus
    if name in ("birdie", "birdie-causal"):
        return Birdie(arms, max_steps, seed, focus)
    if focus:
        raise ValueError(f"focus {focus!r} is for the bandit, and mixture {name!r} is fixed; drop --focus")
    return FixedMixture(name, arms)


# ---- a simulated world, where the truth is known ----------------------------------------------------

class SimulatedArm(NamedTuple):
    name: str
    cls: str


class World:
    """Eight classes of four arms whose losses fall by known laws, told apart only by their losses.

    Class roles, dealt out by the seed: two useless (training on them changes nothing), two that saturate
    (soon learnt), two teachers (their own loss falls, and that of one hard class each, thrice as fast as by
    its own training), two hard (a large loss that falls slowly). Arms of a class differ in speed.
    """
    roles = ("useless", "useless", "saturates", "saturates", "teacher", "teacher", "hard", "hard")

    def __init__(self, seed: int):
        self.rng = rng = np.random.default_rng([7, seed])
        role = rng.permutation(self.roles)
        self.arms = [SimulatedArm(f"{role[c]}-{c}-{k}", f"{role[c]}-{c}") for c in range(8) for k in range(4)]
        self.role, n = np.repeat(role, 4), len(self.arms)
        speed = {"useless": 0.0, "saturates": 12.0, "teacher": 3.0, "hard": 1.0}
        gain = np.diag([speed[r] for r in role])             # [by training on a class, skill gained in a class]
        gain[role == "teacher", role == "hard"] = 3          # each teacher has its pupil
        self.teaches = np.kron(gain, np.full((4, 4), 1 / 4)) * rng.uniform(0.5, 2, (n, 1))      # the same by arms
        self.floor = rng.uniform(0.3, 1, n)
        self.fall = np.where(self.role == "hard", 4.0, 1.5) * rng.uniform(0.7, 1.3, n)
        self.skill = np.zeros(n)

    def losses(self, noise: float = 0.003):
        """Validation losses (arms,), with the noise of a finite validation set."""
        return (self.floor + self.fall * np.exp(-self.skill)) * (1 + noise * self.rng.standard_normal(len(self.arms)))

    def train(self, action, time):
        """`time`: the share of the run that passes under this action."""
        self.skill += 8 * time * action @ self.teaches

    def total(self):
        return float(class_weights(self.arms) @ self.losses(noise=0))


def simulate(seed: int, scheduler_of, n_evaluations: int = 12, watch=None) -> float:
    """One run -> the total loss at its end: the sum over classes of the mean over a class's arms."""
    world = World(seed)
    scheduler = scheduler_of(world.arms)
    for step in range(n_evaluations):
        scheduler.update(step, world.losses())
        if watch:
            watch(step, world, scheduler)
        world.train(scheduler.action, 1 / n_evaluations)
    return world.total()


def best_fixed(seed: int, n: int = 2000) -> float:
    """The lowest total loss that any of n proposed mixtures reaches when kept for the whole run."""
    world = World(seed)
    actions = propose(world.arms, n, np.random.default_rng(seed), "hierarchical")
    losses = world.floor + world.fall * np.exp(-8 * actions @ world.teaches)
    return float((losses @ class_weights(world.arms)).min())


WAYS = {
    "uniform": lambda seed: simulate(seed, lambda arms: FixedMixture("uniform", arms)),
    "bandit with figure 4's proposals": lambda seed: simulate(seed, lambda arms: Birdie(arms, 0, seed, "flat")),
    "bandit that learns R itself": lambda seed: simulate(seed, lambda arms: Birdie(arms, 0, seed, root=False)),
    "bandit": lambda seed: simulate(seed, lambda arms: Birdie(arms, 0, seed)),
    "best fixed mixture, by search": best_fixed,
}


def run_way(way: str, seed: int) -> float:
    torch.set_num_threads(1)
    return WAYS[way](seed)


# ---- running this file -----------------------------------------------------------------------------

def main(seed: int = 0, n_evaluations: int = 12):
    """One simulated run, evaluation by evaluation."""
    print("A simulated world: shares of samples (%) by what an arm's class is like, and the total loss\n")
    roles = list(dict.fromkeys(World.roles))
    print(f"{'evaluation':>10s}" + "".join(f"{role:>11s}" for role in roles) + f"{'loss':>9s}{'predicted':>11s}")

    def watch(step, world, scheduler):
        shares = "".join(f"{100 * scheduler.action[world.role == role].sum():11.0f}" for role in roles)
        predicted = "" if scheduler.predicted is None else f"{scheduler.predicted:+11.2f}"
        print(f"{step:10d}{shares}{world.total():9.2f}{predicted}")

    end = simulate(seed, lambda arms: Birdie(arms, 0, seed), n_evaluations, watch)
    uniform = simulate(seed, lambda arms: FixedMixture("uniform", arms), n_evaluations)
    print(f"\ntotal loss at the end: bandit {end:.2f}, uniform {uniform:.2f}, best fixed mixture {best_fixed(seed):.2f}")


def table(n: int):
    """The bandit against others over n simulated worlds, a process a core."""
    print(f"{'total loss after the run':34s}{'mean':>7s}{'std':>7s}  beats uniform in")
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for way in WAYS:
            totals = np.array(list(pool.map(run_way, [way] * n, range(n))))
            uniform = totals if way == "uniform" else uniform
            print(f"{way:34s}{totals.mean():7.2f}{totals.std():7.2f}  {(totals < uniform).sum():3d} of {n}", flush=True)


def plot(log: str):
    """Figure 5 of a run, beside its log: validation loss, accuracy and probability of every class."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("error: the picture needs matplotlib; pip install matplotlib")
    try:
        with open(log) as file:
            head, *lines = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {log} cannot be read ({error}); name the log.jsonl of a run")
    evaluations = [line for line in lines if "eval" in line]
    steps = [line["step"] for line in evaluations]
    classes = [name.split("-")[0] for name in head["arms"]]
    _, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axis, key, title in zip(axes, ("loss", "accuracy", "action"), (
            "validation loss (nats a token)", "greedy accuracy", "share of the samples until the next evaluation")):
        values = np.array([line["eval"][key] for line in evaluations])               # (evaluations, arms)
        of_class = {cls: values[:, [c == cls for c in classes]] for cls in dict.fromkeys(classes)}
        if key == "action":
            axis.stackplot(steps, [mine.sum(1) for mine in of_class.values()], step="post")
        else:
            for cls, mine in of_class.items():
                axis.plot(steps, mine.mean(1), label=cls)
        axis.set(title=title, xlabel="training step")
    axes[0].legend(fontsize=8)
    picture = log.replace(".jsonl", "") + ".png"
    plt.savefig(picture, dpi=110)
    print(f"wrote {picture}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["table", n] if n.isdigit() and int(n) > 0:
            table(int(n))
        case ["plot", log]:
            plot(log)
        case _:
            raise SystemExit("error: python scheduler.py [table SEEDS | plot LOG]")
