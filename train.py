"""train.py -- the one loop: a scheduler says which objectives, workers make batches, the model learns.

    repeat  evaluate every arm now and then   -> scheduler.update(step, losses), scheduler.action
            batch(seed, rank, step, action)   -> loss -> AdamW (betas 0.9, beta2), clipped, warm-up, cosine

Run it:  python train.py                                a small model on numpy's tables, to look things up
         python train.py --preset=text --data=books/    your own text
         python train.py --mixture=ntp --out_dir=ntp    a causal model, next token prediction only
         python train.py --out_dir=out --resume         go on from the last checkpoint
         python train.py --help                         every setting

A run folder holds ckpt.pt, written whole or not at all before each evaluation, and log.jsonl, one JSON
object a line: the configuration, then {"step", "loss", ...} for training and {"step", "eval": ...} for
evaluations. A batch depends on nothing but (seed, rank, step, action), so a resumed run sees the batches
that an uninterrupted one would, and on one CPU ends with the same weights, bit for bit.

Departures from the paper, ours: sizes for one GPU or a laptop; the learning rate falls to a tenth.
"""
import argparse
import ctypes
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec

# Threads that wait must not spin: with 4 threads on 4 cores and one other busy process, a step took
# 4.2 s; with this, 0.5 s. It must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import cpp_extension
from tqdm import tqdm

import scan
from model import ARCHS, LM, ModelConfig
from objectives import CLASSES, Batches, Corpus, Loader, Tokenizer, arms
from scheduler import class_weights, evaluation_steps, make_scheduler, reward

# Settings by name; every field is also a flag. The blocks of each architecture differ in size, so their
# numbers are such that the parameters are alike. cpu leads to a model that looks things up in a phone book
# (eval_phonebook.py), text is for prose and code. 1.4b is the paper's (table 7; its learning rate is ours):
# its batch is for many GPUs; on one of 80 GB pass --recompute and a --batch_size that fits.
SMALL = dict(n_layer=dict(gated_ssm=4, hawk=2, transformer=4), d_model=192, d_state=384, n_head=4, block_size=128,
             eval_rows=4)
LARGE = dict(block_size=2048, data="stdlib", beta2=0.95, eval_rows=1)
PRESETS = {
    "cpu": dict(**SMALL, data="tables", focus="selective_copying", memory=1024, batch_size=16, max_steps=8000, lr=2e-3,
                beta2=0.99),
    "text": dict(**SMALL, data="stdlib", batch_size=32, max_steps=4000, lr=3e-3, beta2=0.95),
    "gpu": dict(**LARGE, n_layer=dict(gated_ssm=12, hawk=6, transformer=10), d_model=512, d_state=1024, n_head=8,
                batch_size=32, max_steps=8000, lr=1e-3),
    "110m": dict(**LARGE, n_layer=dict(gated_ssm=18, hawk=8, transformer=15), d_model=768, d_state=1536, n_head=12,
                 batch_size=32, max_steps=32000, lr=6e-4),
    "1.4b": dict(**LARGE, n_layer=dict(gated_ssm=48, hawk=20, transformer=24), d_model=2048, d_state=2560, n_head=16,
                 batch_size=520, max_steps=32000, lr=3e-4),
}


@dataclass
class Config:
    out_dir: str = "out"           # run folder: checkpoint and log
    data: str = ""                 # text file, folder, glob, .jsonl, nanoGPT folder, stdlib or tables; "": the preset's
    tokenizer: str = "bpe2048"     # bpe2048 (in assets/), bytes, a tiktoken name, or a .tiktoken file
    mixture: str = "birdie"        # which objectives: birdie, birdie-causal, ntp, ul2, fixed or uniform
    focus: str = ""                # a class that has half of the bandit's proposals on average, or none; "": the preset's
    preset: str = ""               # for what is left at 0 or "": cpu, text, gpu, 110m or 1.4b; "": cpu or gpu
    arch: str = "gated_ssm"        # gated_ssm, hawk or transformer
    causal: bool = False           # no block reads the prefix right to left
    n_layer: int = 0               # blocks
    d_model: int = 0               # channels of the residual stream
    d_state: int = 0               # channels of the recurrence
    memory: int = 0                # the Gated SSM's longest memory at first, in tokens; 0: the preset's, or block_size
    n_head: int = 0                # of the Transformer
    block_size: int = 0            # tokens in a row
    batch_size: int = 0            # rows in a step
    max_steps: int = 0             # of training
    lr: float = 0.0                # the highest learning rate
    beta2: float = 0.0             # AdamW's memory of squared gradients; small batches need a longer one
    warmup: float = 0.02           # share of the steps in which the learning rate rises
    weight_decay: float = 0.1      # AdamW's, of most matrices
    clip: float = 1.0              # largest norm of the gradient
    eval_rows: int = 0             # validation rows for each arm
    seed: int = 1                  # of the weights and the batches
    workers: int = 1               # processes that make batches
    device: str = ""               # cpu, cuda, cuda:1 ...; "": cuda if there is one
    dtype: str = ""                # float32 or bfloat16 matrix products; "": what is faster here
    recompute: bool = False        # activations in backward: less memory, about a third more time
    compile: str = ""              # yes or no; "": yes for runs of 2 million tokens and more
    resume: bool = False           # go on from out_dir/ckpt.pt


# ---- what the command line and the machine decide ---------------------------------------------------

def parse_args(cls, argv):
    """A flat dataclass as flags, explained by its comments -> (instance, names of the fields that were given)."""
    meaning = dict(re.findall(r"^    (\w+): .*# (.*)$", inspect.getsource(cls), re.MULTILINE))
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    for field in fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type in (bool, "bool") else dict(
            type=type(field.default), metavar=repr(field.default))
        parser.add_argument(f"--{field.name}", **kind, help=meaning.get(field.name))
    given = vars(parser.parse_args(argv))
    return cls(**given), set(given)


def matmul_seconds(dtype, n=512, repeats=5):
    """The fastest of a few square matrix products."""
    x, times = torch.randn(n, n, dtype=dtype), []
    for _ in range(repeats):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return min(times)


def keep_freed_memory():
    """glibc hands the memory of every large tensor back when it is freed, and takes page faults for the
    next one: a step took 1.2 (4 threads) to 1.7 times (1 thread) as long. Let it keep the memory."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)             # M_MMAP_MAX: no tensor is mapped on its own
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: no less than 2 GB is given back


def sized(config):
    """Fill in from the preset what was left at 0 or ""."""
    if config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    if config.arch not in ARCHS:
        raise ValueError(f"arch {config.arch!r} is unknown; choose one of {', '.join(ARCHS)}")
    for name, value in PRESETS[config.preset].items():
        if name != "focus" or config.mixture in ("birdie", "birdie-causal"):      # a fixed mixture has none
            setattr(config, name, getattr(config, name) or (value[config.arch] if name == "n_layer" else value))
    return config


def resolve(config):
    """Fill in what was left open, and print each choice with its reason."""
    if config.device:
        reason = "as given"
    else:
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
        reason = "found one" if config.device == "cuda" else "torch finds no CUDA device"
    kind = config.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {config.device!r} is unknown; choose cpu, cuda or cuda:N")
    on_gpu = kind == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"device {config.device!r} was asked for, but torch {torch.__version__} finds no CUDA "
                         f"device; pass --device=cpu")
    print(f"device   {config.device}: {reason}" + ("" if on_gpu else f", {torch.get_num_threads()} threads"))

    reason = "as given"
    if not config.dtype and on_gpu:
        config.dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        reason = "what this GPU multiplies fastest"
    elif not config.dtype:
        gain = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
        config.dtype = "bfloat16" if gain > 1.5 else "float32"
        reason = f"bfloat16 matrix products run {gain:.1f} times as fast as float32 here"
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {config.dtype!r} is unknown; choose float32 or bfloat16")
    print(f"dtype    {config.dtype}: {reason}")

    if config.mixture in ("ntp", "birdie-causal") and not config.causal:
        config.causal = True      # without prefixes, channels that run right to left would remember nothing
        print(f"causal   yes: {config.mixture} has no use for reading both ways")
    reason = "as given" if config.preset else "the default with a GPU" if on_gpu else "the default without a GPU"
    config.preset = config.preset or ("gpu" if on_gpu else "cpu")
    sized(config)
    print(f"preset   {config.preset}: {reason}; data {config.data}, focus {config.focus or 'none'}")

    reason = "as given"
    if not config.compile and config.max_steps * config.batch_size * config.block_size < 2_000_000:
        config.compile, reason = "no", "the run is over before it pays"
    elif not config.compile and not (find_spec("triton") if on_gpu else shutil.which(cpp_extension.get_cxx_compiler())):
        config.compile, reason = "no", "there is no " + ("Triton" if on_gpu else "C++ compiler")
    elif not config.compile:
        config.compile, reason = "yes", "a long run; the first step takes about 20 s"
    if config.compile not in ("yes", "no"):
        raise ValueError(f"compile {config.compile!r} is neither yes nor no")
    print(f"compile  {config.compile}: {reason}")
    used = scan.backend(config.device)
    print(f"scan     {used.name}: {used.reason or 'the best for this device'}")
    if not config.lr > 0:
        raise ValueError(f"lr is {config.lr}; it must be above 0")
    if not 0 < config.beta2 < 1:
        raise ValueError(f"beta2 is {config.beta2}; it must be between 0 and 1")
    for name, least in (("batch_size", 1), ("max_steps", 1), ("eval_rows", 1), ("seed", 0), ("workers", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    return config


def model_config(config, tok):
    names = {field.name for field in fields(ModelConfig)} & set(asdict(config))
    return ModelConfig(vocab_size=tok.vocab_size, **{name: getattr(config, name) for name in names})


# ---- validation: the same rows for every arm, every evaluation and every run -----------------------

class Validation:
    def __init__(self, batches, n_arms):
        """batches: as in training, with batch_size rows for each arm."""
        made = [batches.batch(0, 0, k, np.eye(n_arms)[k], "val") for k in range(n_arms)]
        self.rows = {key: torch.from_numpy(np.concatenate([b[key] for b in made])) for key in made[0]}
        self.n_arms = n_arms

    @torch.no_grad()
    def __call__(self, model, config):
        """-> (loss in nats a label token, share of label tokens guessed right), each float64 (arms,)."""
        sums = torch.zeros(3, self.n_arms, dtype=torch.float64)
        model.eval()
        for start in range(0, len(self.rows["tokens"]), config.batch_size):
            rows = {key: value[start:start + config.batch_size].to(config.device) for key, value in self.rows.items()}
            with autocast(config):
                logits, _ = model(rows["tokens"], rows["reset"])
            asked = rows["targets"] != -100
            logits, targets, arm = logits[asked].float(), rows["targets"][asked], rows["arm"][asked].long()
            loss = F.cross_entropy(logits, targets, reduction="none")
            for total, value in zip(sums, (loss, logits.argmax(-1) == targets, torch.ones_like(loss))):
                total += torch.bincount(arm, value.double(), self.n_arms).cpu()
        model.train()
        return (sums[0] / sums[2]).numpy(), (sums[1] / sums[2]).numpy()


def by_class(values, every_arm):
    """(arms,) -> {class: mean over its arms}."""
    return {cls: float(np.mean([v for v, arm in zip(values, every_arm) if arm.cls == cls]))
            for cls in CLASSES if any(arm.cls == cls for arm in every_arm)}


# ---- the run folder --------------------------------------------------------------------------------

def save_checkpoint(path, checkpoint):
    """Written beside, then renamed: at any moment `path` is a whole checkpoint."""
    with open(path + ".part", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def load_checkpoint(path, *also):
    """The saved dict, plain tensors, numbers and strings; `also` names what else it must hold.
    Raises ValueError or FileNotFoundError."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint {path}; train one with --out_dir={os.path.dirname(path) or '.'}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "model", "step", "tokenizer", *also} - set(checkpoint)
        unknown = set(checkpoint.get("config", ())) - {field.name for field in fields(Config)}
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); "
                         f"it is damaged or from another program: remove it, or choose another --out_dir")
    if missing or unknown:
        what = "lacks" if missing else "has settings unknown here,"
        raise ValueError(f"{path} {what} {', '.join(sorted(missing or unknown))}; it is not a checkpoint of this version: "
                         f"choose another, or train anew")
    return checkpoint


def load_model(path):
    """-> (model on the CPU, tokenizer, checkpoint) of a run, for whoever decodes or fine-tunes it."""
    checkpoint = load_checkpoint(path)
    tok = Tokenizer(**checkpoint["tokenizer"])
    model = LM(model_config(Config(**checkpoint["config"]), tok))
    model.load_state_dict(checkpoint["model"])
    return model, tok, checkpoint


class Log:
    """log.jsonl: one JSON object a line, each written whole."""

    def __init__(self, path, resume_at=None):
        """A resumed run writes the lines from its step on again, so the old ones are dropped."""
        self.path, kept = path, []
        if resume_at is not None and os.path.exists(path):
            with open(path) as file:
                kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] < resume_at]
        with open(path + ".part", "w") as file:
            file.writelines(kept)
        os.replace(path + ".part", path)

    def write(self, **entry):
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


# ---- training --------------------------------------------------------------------------------------

def autocast(config):
    """Mixed precision: weights and residual in float32, matrix products in bfloat16."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16)


def learn(model, optimizer, batch, lr, config):
    """One step of AdamW on a batch -> its loss, and the norm of the gradient before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens, reset, targets = (batch[key].to(config.device, non_blocking=True) for key in ("tokens", "reset", "targets"))
    with autocast(config):
        _, loss = model(tokens, reset, targets)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


def learning_rate(step, config):
    """Linear warm-up, then cosine decay to a tenth (section 4.1; the tenth is our choice)."""
    warmup = max(1, round(config.warmup * config.max_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


class StopSignal:
    """Ctrl-C (or SIGTERM) asks for a stop after the step in hand; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def resumed(config, given, saved):
    """The saved configuration; a flag that contradicts it is an error, but for where and how to run."""
    for name in sorted(given - {"resume", "out_dir", "device", "compile", "workers"}):
        if getattr(config, name) != saved[name]:
            raise ValueError(f"{name} is {saved[name]!r} in the checkpoint and {getattr(config, name)!r} on the "
                             f"command line; drop --{name}, or start anew in another --out_dir")
    changes = {name: getattr(config, name) for name in given} | {"resume": True, "out_dir": config.out_dir}
    return Config(**{**saved, **changes})


class Evaluation:
    """What one evaluation found: written to the log, and shown as a line for each class."""

    def __init__(self, step, losses, accuracy, before, every_arm):
        """losses, accuracy (arms,); before: the losses of the evaluation before this one, or None."""
        self.step, self.losses, self.accuracy, self.arms = step, losses, accuracy, every_arm
        self.change = np.zeros_like(losses) if before is None else losses - before
        self.rewards = np.zeros_like(losses) if before is None else reward(before, losses)
        self.observed = None if before is None else float(class_weights(every_arm) @ self.rewards)

    def entry(self, predicted, action):
        """The log's: per arm; predicted and observed are total rewards of the action that was in force."""
        return dict(loss=self.losses.tolist(), accuracy=self.accuracy.tolist(), reward=self.rewards.tolist(),
                    action=action.tolist(), predicted=predicted, observed=self.observed)

    def show(self, predicted, action):
        total = "" if self.observed is None else f", total reward {self.observed:+.2f}"
        total += "" if predicted is None or self.observed is None else f" (predicted {predicted:+.2f})"
        losses, change, accuracy, rewards = (by_class(values, self.arms) for values in (
            self.losses, self.change, self.accuracy, self.rewards))
        lines = [f"step {self.step:,}: mean loss {np.mean(list(losses.values())):.3f}{total}"]
        for cls, loss in losses.items():
            share = sum(p for p, arm in zip(action, self.arms) if arm.cls == cls)
            lines.append(f"  {cls:24s} {'#' * round(40 * share):20.20s} {share:4.0%}  loss {loss:5.2f} {change[cls]:+.2f}"
                         f"  accuracy {accuracy[cls]:4.0%}  reward {rewards[cls]:+.2f}")
        tqdm.write("\n".join(lines))


def train(config, given=()):
    """The whole run, into config.out_dir; `given` names the fields that the command line set."""
    path = os.path.join(config.out_dir, "ckpt.pt")
    checkpoint = load_checkpoint(path, "optimizer", "scheduler", "data", "losses") if config.resume else None
    if checkpoint:
        config = resumed(config, given, checkpoint["config"])
    elif os.path.exists(path):
        raise ValueError(f"{path} exists; go on from it with --resume, or choose another --out_dir")
    config = resolve(config)
    keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)      # compiled, the embedding's gradient is not
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(config.seed)

    tok = Tokenizer(config.tokenizer, n_masks=config.block_size // 8)
    every_arm = arms(config.block_size)
    scheduler = make_scheduler(config.mixture, every_arm, config.max_steps, config.seed, config.focus)
    model = LM(model_config(config, tok)).to(config.device)
    corpus = Corpus(config.data, tok)
    if checkpoint and checkpoint["data"] != corpus.size:
        raise ValueError(f"the run was trained on {checkpoint['data']} tokens and --data now has {corpus.size}; give it "
                         f"the same text, or start anew in another --out_dir")
    batches = Batches(corpus, tok, config.block_size, config.batch_size)
    batches.batch(config.seed, 0, 0, scheduler.action, "train")   # what is wrong with the text shows here
    validation = Validation(Batches(corpus, tok, config.block_size, config.eval_rows), len(every_arm))
    optimizer = torch.optim.AdamW(model.parameter_groups(config.weight_decay), lr=config.lr, betas=(0.9, config.beta2),
                                  fused=True)
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        log = Log(os.path.join(config.out_dir, "log.jsonl"), resume_at=checkpoint and checkpoint["step"])
    except OSError as error:
        raise ValueError(f"{config.out_dir} cannot be written ({error.strerror}); choose another --out_dir")
    start, before = 0, None
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        start, before = checkpoint["step"], checkpoint["losses"] and np.array(checkpoint["losses"])
    if not checkpoint:
        log.write(step=-1, config=asdict(config), arms=[arm.name for arm in every_arm], data=corpus.size,
                  torch=torch.__version__, scan=scan.backend(config.device).name)
    print(f"data     {corpus.size['train']:,} training and {corpus.size['val']:,} validation tokens; {len(every_arm)} arms")
    print(f"model    {config.arch}{' --causal' * config.causal}, {model.n_parameters():,} parameters")
    print(f"run      {config.max_steps:,} steps of {config.batch_size} x {config.block_size} tokens into {config.out_dir}/")

    def save(step):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError(f"the weights are no longer finite at step {step}; {path} is from before: start anew in "
                             f"another --out_dir with a lower --lr (it is {config.lr})")
        save_checkpoint(path, dict(
            config=asdict(config), tokenizer=dict(name=tok.name, n_masks=tok.n_masks), step=step,
            data=corpus.size, losses=None if before is None else before.tolist(),
            model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict()))

    step_model = torch.compile(model) if config.compile == "yes" else model
    stop = StopSignal()
    loader = Loader(batches, config.seed, workers=config.workers)
    stretches = evaluation_steps(config.max_steps)
    bar = tqdm(total=config.max_steps, initial=start, unit="step", smoothing=0.05)
    tick, seen = time.perf_counter(), 0
    for begin, end in zip(stretches, stretches[1:] + [None]):
        if end is not None and end <= start:
            continue
        begin = max(begin, start)
        if begin in stretches:
            save(begin)
            evaluation = Evaluation(begin, *validation(model, config), before, every_arm)
            before = evaluation.losses
            predicted = scheduler.predicted
            scheduler.update(begin, evaluation.losses)
            log.write(step=begin, eval=evaluation.entry(predicted, scheduler.action))
            evaluation.show(predicted, scheduler.action)
            tick, seen = time.perf_counter(), 0
        if end is None:
            break
        for step, batch in enumerate(loader.steps(begin, end, scheduler.action), begin):
            loss, norm = learn(step_model, optimizer, batch, learning_rate(step, config), config)
            seen += batch["tokens"].numel()
            bar.update()
            if (step + 1) % 10 == 0:
                speed, tick, seen = seen / (time.perf_counter() - tick), time.perf_counter(), 0
                bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s")
                log.write(step=step, loss=loss.item(), norm=norm.item(), tokens_per_s=round(speed))
            if stop.asked:
                save(step + 1)
                bar.close()
                raise SystemExit(f"stopped after step {step + 1}; go on with: python train.py "
                                 f"--out_dir={config.out_dir} --resume")
    bar.close()
    show_samples(model, tok, validation, every_arm, config)


# ---- what the model has learnt, as text ------------------------------------------------------------

def first_sample(row):
    """The first sample of a row of Batches -> (prefix, label)."""
    causal = int((row["targets"] != -100).nonzero()[0])
    starts = (row["reset"] & scan.RESET_FORWARD).nonzero().flatten().tolist() + [len(row["reset"])]
    return row["tokens"][:causal].tolist(), row["targets"][causal:starts[1]].tolist()


def show_samples(model, tok, validation, every_arm, config, longest=160):
    """A greedy answer to one validation sample of every class, from the arm with a label of about 64 tokens."""
    chosen = {}
    for k, arm in enumerate(every_arm):
        if arm.n_done > 1:  # several answers; decoding stops at the first DONE
            continue
        row = {key: value[k * config.eval_rows] for key, value in validation.rows.items()}
        prefix, label = first_sample(row)
        if arm.cls not in chosen or abs(len(label) - 64) < abs(len(chosen[arm.cls][2]) - 64):
            chosen[arm.cls] = arm.name, prefix, label
    for name, prefix, label in chosen.values():
        start = [tok.GEN]
        if not prefix:  # next token prediction continues the first half of a text
            half = len(label) // 2
            start, label = start + label[:half], label[half:]
            opening = start
        label = label[:longest]
        answer, = model.generate([(prefix, start)], len(label), stop=tok.DONE)
        right = np.mean([a == b for a, b in zip(answer + [None] * len(label), label)])
        print(f"\n--- {name}: {right:.0%} of {len(label)} tokens right")
        show_text(tok, input=prefix or start, target=label, model=answer)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    answer, = model.generate([([], opening)], 2 * longest, tok.DONE, temperature=0.7, generator=generator)
    print("\n--- the first text again, sampled at temperature 0.7")
    show_text(tok, model=answer)


def show_text(tok, longest=320, **parts):
    for title, ids in parts.items():
        text = tok.decode(ids)
        text = text if len(text) <= longest else text[:longest // 2] + " ... " + text[-longest // 2:]
        print(f"{title:>7s} | " + text.replace("\n", "\n        | "))


def main(argv=None):
    config, given = parse_args(Config, argv)
    try:
        train(config, given)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
