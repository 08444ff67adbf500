"""The one loop: a scheduler says which objectives, workers make the batches, the model learns.

    repeat   loss of every arm on validation rows    -> scheduler.update(step, losses)
             batch(seed, rank, step, action)         -> loss -> AdamW, clipped, warm-up and cosine

Run it:  python train.py                                a small model learns to look things up
         torchrun --nproc_per_node=4 train.py --preset=gpu      a larger one on four GPUs
         python train.py --preset=text --data=books/    your own text
         python train.py --mixture=ntp --out_dir=ntp    a causal model, next token prediction only
         python train.py --out_dir=out --resume         go on from the last checkpoint
         python train.py --help                         every setting

A run folder holds ckpt.pt, whole at any moment and with a checksum, and log.jsonl, one JSON object
a line: the configuration, then lines with `train_loss`, and for each evaluation one with
`mean_loss`, and `loss_`, `accuracy_`, `reward_` and `share_` of every class, `arm_` of every arm:
`pd.read_json("out/log.jsonl", lines=True)`. A batch depends on nothing but (seed, rank, step,
action), so a resumed run sees the batches that an uninterrupted one would, and on one CPU thread
ends with the same weights, bit for bit.

Departures from the paper (4.1, A.11), ours: sizes for one GPU or a laptop; the learning rate
falls to a tenth; AdamW's settings are Mamba's, as in the paper, but for a longer second moment in
small batches.
"""
import argparse
import ctypes
import errno
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from importlib.util import find_spec

# Threads that wait must not spin: with 4 threads on 4 cores and one other busy process, a step took
# 4.2 s; with this, 0.5 s. It must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for deterministic products on GPUs
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends the imports without a word

with suppress(ImportError):         # Windows has none
    import fcntl

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils import cpp_extension
from torch.utils._pytree import tree_map
from tqdm import tqdm

import scan
from model import (IGNORE, LM, MIXERS, ModelConfig, command_line, errors_in_one_line, fits,
                   load_checkpoint)
from objectives import STOP_SIGNALS, Batches, Corpus, Loader, Tokenizer, progress_bar
from scheduler import MIXTURES, class_weights, evaluation_steps, make_scheduler, reward

# ---- settings ----------------------------------------------------------------------------------

# Architectures have so many blocks that their parameters are alike; an added one has the Gated
# SSM's. cpu: the defaults below, for tables of numbers; text: the same model for prose and code;
# wide: real text, minutes on a GPU; 1.4b: the paper's (table 7; the rate is ours), whose batch is
# for many GPUs.
SMALL = dict(n_layer=dict(gated_ssm=4, hawk=2, transformer=4))
LARGE = dict(data="packages", block_size=2048, memory=2048, beta2=0.95, eval_rows=1,
             recompute=True)
PRESETS = {
    "cpu": SMALL,
    "text": dict(**SMALL, data="stdlib", memory=128, batch_size=32, max_steps=4000, lr=3e-3,
                 beta2=0.95),
    "wide": dict(**SMALL, data="packages", d_model=512, d_state=1024, n_head=8, block_size=256,
                 batch_size=64, max_steps=4000, lr=1e-3, eval_rows=2),
    "gpu": dict(**LARGE, n_layer=dict(gated_ssm=12, hawk=6, transformer=10), d_model=512,
                d_state=1024, n_head=8, batch_size=32, max_steps=3800, lr=1e-3),
    "110m": dict(**LARGE, n_layer=dict(gated_ssm=18, hawk=8, transformer=15), d_model=768,
                 d_state=1536, n_head=12, batch_size=32, max_steps=32000, lr=6e-4),
    "1.4b": dict(**LARGE, n_layer=dict(gated_ssm=48, hawk=20, transformer=24), d_model=2048,
                 d_state=2560, n_head=16, batch_size=520, max_steps=32000, lr=3e-4, shard=True),
}
CAUSAL_MIXTURES = "ntp", "birdie-causal"    # without prefixes, reverse channels remember nothing
MAY_CHANGE = {"out_dir", "data", "device", "workers", "compile", "resume"}  # in a resumed run


def shared_flags(usage):
    """-> (parser, what adds a flag to it), with what pretraining and fine-tuning share."""
    parser, flag = command_line(usage)
    flag("--out_dir", default="out", help="run folder")
    flag("--resume", action="store_true", help="go on from out_dir; fine-tuned: score again")
    flag("--seed", default=1, help="of random weights and of the batches")
    flag("--workers", default=min(4, os.cpu_count() or 1) if torch.cuda.is_available() else 1,
         help="processes that make batches")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         help="cpu, cuda, cuda:1 ... or mps")
    flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
         help="of matrix products; auto: what is faster here")
    flag("--compile", default="auto", choices=("auto", "yes", "graphs", "no"),
         help="torch.compile; auto: for runs of 2 million tokens and more; graphs: with CUDA "
         "graphs, which a GPU needs to be fast with a small model")
    return parser, flag


def parse_args(argv):
    """-> settings; of a resumed run those that it was saved with."""
    parser, flag = shared_flags("python train.py [--FLAG=VALUE ...]")
    flag("--preset", default="cpu", choices=PRESETS, help="defaults of a size; see PRESETS")
    flag("--init_from", help="checkpoint whose weights, sizes and vocabulary a run begins with")
    flag("--data", default="tables", help="text file, folder, .jsonl, tables (of numbers), "
         "stdlib (Python's), packages (what pip installed), or some with commas; nanoGPT folder")
    flag("--tokenizer", default="bpe2048", help="bpe2048, bytes, a tiktoken name, a .tiktoken file")
    flag("--mixture", default="birdie", choices=MIXTURES, help="which objectives")
    flag("--arch", default="gated_ssm", choices=MIXERS, help="kind of block")
    flag("--causal", action="store_true", help="no block reads the prefix right to left")
    flag("--n_layer", default=4, help="blocks; a preset has its own for each --arch")
    flag("--d_model", default=192, help="channels of the residual stream")
    flag("--d_state", default=384, help="channels of the recurrence")
    flag("--memory", default=1024, help="the Gated SSM's longest at first, in tokens")
    flag("--n_head", default=4, help="heads of the Transformer")
    flag("--block_size", default=128, help="tokens in a row")
    flag("--batch_size", default=16, help="rows in a step")
    flag("--max_steps", default=8000, help="steps of training")
    flag("--lr", default=2e-3, help="the highest learning rate")
    flag("--beta2", default=0.99,
         help="AdamW's memory of squared gradients; small batches need a longer one")
    flag("--warmup", default=0.02, help="share of the steps in which the rate rises")
    flag("--weight_decay", default=0.1, help="AdamW's, of most matrices")
    flag("--clip", default=1.0, help="largest norm of the gradient")
    flag("--eval_rows", default=4, help="validation rows for each arm")
    flag("--shard", action="store_true",
         help="under torchrun each device holds a part of the weights and of AdamW's numbers")
    flag("--recompute", action="store_true",
         help="backward computes what is pointwise again: a third of the memory")

    args = parser.parse_args(argv)
    if args.resume:
        path = os.path.join(args.out_dir, "ckpt.pt")
        saved = load_checkpoint(path, "step", "config", "data", "losses", "optimizer", "scheduler")
        return resumed(parser, argv, saved["config"], path, MAY_CHANGE)
    sizes = PRESETS[args.preset]
    depth = sizes["n_layer"].get(args.arch, sizes["n_layer"]["gated_ssm"])
    parser.set_defaults(**{**sizes, "n_layer": depth})
    begun = {}                          # what a checkpoint has settled
    if args.init_from:
        saved = load_checkpoint(args.init_from)
        begun = {name: x for name, x in saved["model_config"].items() if hasattr(args, name)}
        begun["tokenizer"] = saved["tokenizer"]["name"]
        parser.set_defaults(**begun, block_size=8 * saved["tokenizer"]["n_masks"])
    args = parser.parse_args(argv)
    by_mixture = not args.causal and args.mixture in CAUSAL_MIXTURES
    args.causal = args.causal or by_mixture
    for name, value in begun.items():
        if value != getattr(args, name) and name != "recompute":
            flag = f"--mixture={args.mixture}" if name == "causal" and by_mixture else f"--{name}"
            raise ValueError(f"{name} is {value!r} in {args.init_from}, and would be "
                             f"{getattr(args, name)!r}; drop {flag}")
    return args


def resumed(parser, argv, config, path, may_change):
    """The saved settings; a flag that contradicts one is an error, unless it may change."""
    config = {**config, "out_dir": os.path.dirname(path)}       # wherever the folder is now
    args = parser.parse_args(argv, argparse.Namespace(**config))
    if unknown := sorted(vars(parser.parse_args([])).keys() ^ config.keys()):
        raise ValueError(f"{path} is of another version, with another set of flags "
                         f"({', '.join(unknown)}); go on with the code it was made with, or start "
                         f"anew in another --out_dir")
    for name, value in config.items():
        if name not in may_change and value != getattr(args, name):
            raise ValueError(f"{name} is {value!r} in {path} and {getattr(args, name)!r} on the "
                             f"command line; drop --{name}, or choose another --out_dir")
    return args


def settle(args):
    """Decide what was left to this machine, and say why."""
    if os.environ.get("CXX", "").startswith("ccache "):     # torch.compile would look for that file
        os.environ["CXX"] = os.environ["CXX"].removeprefix("ccache ")
    found = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    if args.device not in found:
        raise ValueError(f"torch {torch.__version__} finds no device {args.device!r} here; choose "
                         f"{' or '.join(found)}, such as --device=cpu")
    kind, _, index = args.device.partition(":")
    on_gpu, reason = kind == "cuda", "as set"
    if index:
        torch.cuda.set_device(args.device)
    if args.dtype == "auto" and on_gpu:
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if has_bfloat16 else "float16"      # a T4 or V100 has none
        reason = "what this GPU is made for"
    elif args.dtype == "auto":
        args.dtype = "bfloat16" if kind == "cpu" and cpu_has_bfloat16() else "float32"
        reason = f"this {kind} has {'no ' * (args.dtype == 'float32')}instructions for bfloat16"
    threads = "" if kind != "cpu" else f", {torch.get_num_threads()} threads"
    print(f"device   {args.device}{threads}; {args.dtype} ({reason})")

    reason = "as set"
    if args.compile == "graphs" and (not on_gpu or processes()[1] > 1):
        raise ValueError("compile is 'graphs', which is for one GPU; pass --compile=yes")
    if args.compile == "auto":
        compiler = (find_spec("triton") if on_gpu else kind == "cpu" and
                    shutil.which(cpp_extension.get_cxx_compiler()))
        short = args.max_steps * args.batch_size * args.block_size < 2_000_000
        args.compile = "no" if short or not compiler else "yes"
        reason = ("the run is over before it pays" if short else "the first step takes about 20 s"
                  if compiler else f"there is no {'Triton' if on_gpu else 'C++ compiler'}")
    backend, why = scan.backend(args.device)
    print(f"compile  {args.compile} ({reason}); scan: {backend}" + f" ({why})" * bool(why))
    keep_freed_memory()


def cpu_has_bfloat16():
    """Instructions for it (avx512_bf16, amx_bf16; bf16 on ARM); without, it is slower."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        return "bf16" in file.read()
    return False


def keep_freed_memory():
    """glibc hands the memory of every large tensor back when it is freed, and takes page faults
    for the next one: a step took 1.2 (4 threads) to 1.7 times (1 thread) as long. Let it keep the
    memory."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)             # M_MMAP_MAX: no tensor is mapped on its own
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: keep up to 2 GB


def model_config(args, tok):
    names = [field.name for field in fields(ModelConfig) if hasattr(args, field.name)]
    return ModelConfig(vocab_size=tok.vocab_size, **{name: getattr(args, name) for name in names})


# ---- several processes (torchrun): the same batch, of which each has its rows -------------------

def processes():
    """-> (rank of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(args):
    """Under torchrun: meet the others; only the first prints."""
    if "RANK" not in os.environ:
        return
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"RANK is set and {name} is not; start it by torchrun, or unset RANK")
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    dist.init_process_group()
    rank, n = processes()
    if args.batch_size < n or (args.shard and args.batch_size % n):     # all call it equally often
        raise ValueError(f"batch_size is {args.batch_size} rows for {n} processes; pass a multiple "
                         f"of {n}")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def sum_over(values):
    """Numbers or arrays -> float64, on the CPU, their sums over the processes."""
    sums = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def shard(model, args):
    """FSDP2: a block's weights are gathered where it is computed, and nowhere else."""
    from torch.distributed.device_mesh import init_device_mesh      # here: 1 s to import
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(torch.device(args.device).type, (processes()[1],))
    marked = [name for name, p in model.named_parameters() if hasattr(p, "no_decay")]
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh)
    for name in marked:                 # parameters are new objects now
        model.get_parameter(name).no_decay = True


def whole(state):
    """A state_dict in which tensors that the processes hold in parts are whole, on the CPU."""
    return tree_map(lambda t: t.full_tensor().cpu() if hasattr(t, "full_tensor") else t, state)


# ---- one step ----------------------------------------------------------------------------------

def autocast(args):
    """Mixed precision: weights and residual in float32, matrix products in 16 bits."""
    if args.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=getattr(torch, args.dtype))


class Learner:
    """Steps of AdamW: in as many micro-batches as memory asks for, on as many devices as there are.

    A micro-batch weighs by its label tokens, so the gradient is that of the whole batch. float16
    has too few small numbers for gradients: the loss is scaled up, and a step whose gradients
    overflow is skipped, which `skipped` counts.
    """

    def __init__(self, model, optimizer, args, clip):
        self.raw, self.optimizer, self.args, self.clip = model, optimizer, args, clip
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type,
                                           enabled=args.dtype == "float16")
        self.model, self.rows, self.skipped = model, None, 0
        self.is_sharded = hasattr(next(model.parameters()), "full_tensor")
        if args.compile != "no" and self.is_sharded:
            for block in model.blocks:
                block.compile(dynamic=False)
        elif args.compile != "no":
            torch._dynamo.config.optimize_ddp = False       # it would cut the graph in pieces
            mode = "reduce-overhead" if args.compile == "graphs" else None
            self.model = torch.compile(model, dynamic=False, mode=mode)
        if processes()[1] > 1 and not self.is_sharded:
            self.model = DistributedDataParallel(self.model)

    def step(self, batch, lr):
        """-> the loss of this process's rows (its part of the batch's), and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rank, n = processes()
        size = len(batch["targets"])
        part = slice(rank * size // n, (rank + 1) * size // n)
        mine = {key: batch[key][part] for key in ("tokens", "reset", "targets")}
        labels = np.count_nonzero(batch["targets"].numpy() != IGNORE, 1)    # on the CPU: no waiting
        if self.rows is None:
            self.rows = self.rows_that_fit(mine)
        starts, loss = range(0, len(mine["targets"]), self.rows), 0.0
        for start in starts:
            piece = [tensor[start:start + self.rows] for tensor in mine.values()]
            weight = n * labels[part][start:start + self.rows].sum() / labels.sum()
            loss = loss + self.backward(piece, weight, last=start == starts[-1])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.clip)
        norm = norm.full_tensor() if self.is_sharded else norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            self.skipped = self.skipped + ~norm.isfinite()
        self.optimizer.zero_grad()
        return loss / n, norm

    def backward(self, piece, weight, last):
        """Add the gradients of a micro-batch -> its loss; both times weight."""
        inputs = [tensor.to(self.args.device, non_blocking=True) for tensor in piece]
        alone = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if alone else nullcontext():  # the last one's are sent around
            with autocast(self.args):
                _, loss = self.model(*inputs)
            self.scaler.scale(loss * weight).backward()
        return loss.detach() * weight

    def state_dict(self):
        return dict(optimizer=whole(self.optimizer.state_dict()), scaler=self.scaler.state_dict())

    def load_state_dict(self, state):
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        for k, moments in state["optimizer"]["state"].items():
            p = weights[k]
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != p.shape:          # torch would read beyond their end
                    raise RuntimeError("AdamW's numbers have other shapes than the weights")
                if self.is_sharded:                         # this process holds a part of them
                    from torch.distributed.tensor import distribute_tensor
                    moments[name] = distribute_tensor(moments[name].to(p.device), p.device_mesh,
                                                      p.placements)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def counts(self):
        """For the log: steps that were skipped since this process began (float16 only)."""
        return {"skipped": int(self.skipped)} if self.scaler.is_enabled() else {}

    def rows_that_fit(self, batch):
        """Found by trying: first what free memory suggests, then half of it while that is short."""
        size = rows = len(batch["targets"])
        if torch.device(self.args.device).type == "cuda":
            largest = torch.tensor(self.rows_in_free_memory(batch))
            if dist.is_initialized():
                dist.all_reduce(largest, dist.ReduceOp.MIN)
            while rows > max(1, largest):
                rows = (rows + 1) // 2
        while True:
            try:
                self.backward([tensor[:rows] for tensor in batch.values()], 1.0, last=False)
                break
            except torch.OutOfMemoryError as error:
                problem = str(error)        # not the error: it would hold the tensors
            except Exception as error:
                if self.args.compile == "no" or self.model is self.raw and not self.is_sharded:
                    raise
                if processes()[1] > 1:
                    raise ValueError(f"torch.compile fails here ({scan.one_line(error)}); pass "
                                     f"--compile=no")
                print(f"compile  no: it failed ({scan.one_line(error)}); was a run killed in its "
                      f"first step, remove torch's cache once (TORCHINDUCTOR_CACHE_DIR)")
                self.model = self.raw
                continue
            finally:
                self.optimizer.zero_grad()
            if rows == 1 or self.is_sharded:        # sharded, the others are in the middle of it
                raise ValueError(f"{rows} rows of {batch['targets'].shape[1]} tokens do not fit "
                                 f"into memory ({problem}); pass --recompute, or a smaller "
                                 f"--block_size, --batch_size, --d_state, --d_model or --n_layer")
            torch.cuda.empty_cache()
            print(f"memory   {rows} rows do not fit: trying {(rows + 1) // 2} at a time")
            rows = (rows + 1) // 2
        pieces = -(-size // rows)
        if pieces > 1 and self.args.compile == "graphs":        # untried: gradients that add up
            raise ValueError(f"compile is 'graphs', and a step is {pieces} micro-batches here; "
                             f"pass --compile=yes, or a --batch_size below {size}")
        if pieces > 1:
            print(f"memory   a step is {pieces} micro-batches of {rows} rows")
        return rows

    def rows_in_free_memory(self, batch):
        """By what one row takes beside the gradients, and AdamW's two numbers a parameter."""
        torch.cuda.empty_cache()
        gradients = 4 * sum(p.numel() for p in self.raw.parameters())
        gradients //= processes()[1] if self.is_sharded else 1
        free = 0.9 * torch.cuda.mem_get_info()[0] - 3 * gradients
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            with autocast(self.args):
                row = (tensor[:1].to(self.args.device) for tensor in batch.values())
                self.raw(*row)[1].backward()
        except torch.OutOfMemoryError:
            if self.is_sharded:             # the others are in the middle of it, and would wait
                raise
            return 1
        row = torch.cuda.max_memory_allocated() - before - gradients
        return int(max(0, free) / max(1, row))


def learning_rate(step, args):
    """Linear warm-up, then cosine decay to a tenth (section 4.1; the tenth is our choice)."""
    warmup = max(1, round(args.warmup * args.max_steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.max_steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# ---- validation: the same rows for every evaluation and every run ------------------------------

class Validation:
    """Loss and accuracy of every arm."""

    def __init__(self, batches):
        """batches: as in training, with batch_size rows for each arm."""
        self.arms, every = batches.arms, np.eye(len(batches.arms))
        made = [batches.batch(0, 0, k, only, "val") for k, only in enumerate(every)]
        self.rows = {key: torch.from_numpy(np.concatenate([batch[key] for batch in made]))
                     for key in made[0]}

    @torch.no_grad()
    def __call__(self, model, args):
        """-> (loss in nats a label token, share of label tokens guessed right), float64 (arms,)."""
        sums = torch.zeros(3, len(self.arms), dtype=torch.float64)
        rank, n = processes()           # each takes its part of the rows
        some = max(1, min(args.batch_size, 16384 // self.rows["tokens"].shape[1]))  # at a time
        for start in range(0, len(self.rows["tokens"]), n * some):
            start += rank * some
            rows = {key: value[start:start + some] for key, value in self.rows.items()}
            if len(rows["tokens"]) == 0:        # all processes call the model equally often
                rows = {key: value[:1] for key, value in self.rows.items()}
                rows["targets"] = torch.full_like(rows["targets"], IGNORE)
            rows = {key: value.to(args.device) for key, value in rows.items()}
            with autocast(args):
                logits, _ = model(rows["tokens"], rows["reset"])
            asked = rows["targets"] != IGNORE
            logits, targets = logits[asked].float(), rows["targets"][asked]
            loss = F.cross_entropy(logits, targets, reduction="none")
            right, one = logits.argmax(-1) == targets, torch.ones_like(loss)
            arm = rows["arm"][asked].long().cpu()
            for total, value in zip(sums, (loss, right, one)):
                total += torch.bincount(arm, value.cpu().double(), len(self.arms))
        loss, right, asked = sum_over(sums).numpy()
        return loss / asked, right / asked


def report(step, arms, loss, accuracy, before, action, predicted):
    """One evaluation as the log has it, and a line for each class on the screen.

    before: the losses of the evaluation before; predicted: the total reward that the scheduler
    expected of the action in force since then; action: what it chose now.
    """
    rewards, weights = reward(before, loss), class_weights(arms)        # 1 / arms in the class
    mean_loss, total = float(weights @ loss / weights.sum()), float(weights @ rewards)
    entry = dict(step=step, mean_loss=mean_loss, observed=total, predicted=predicted)
    lines = [f"step {step:,}: mean loss {mean_loss:.3f}, total reward {total:+.2f}"]
    if predicted is not None:
        lines[0] += f" (predicted {predicted:+.2f})"
    for cls in dict.fromkeys(arm.cls for arm in arms):
        mean = np.array([arm.cls == cls for arm in arms]) * weights
        found = {"loss": mean @ loss, "accuracy": mean @ accuracy, "reward": mean @ rewards,
                 "share": (mean > 0) @ action}
        entry |= {f"{name}_{cls}": round(float(value), 5) for name, value in found.items()}
        bar = "#" * round(40 * found["share"])
        line = ("  {:24s} {:20.20s} {share:4.0%}  loss {loss:5.2f} {:+.2f}  "
                "accuracy {accuracy:4.0%}  reward {reward:+.2f}")
        lines.append(line.format(cls, bar, mean @ (loss - before), **found))
    tqdm.write("\n".join(lines))
    return entry | dict(arm_loss=loss.tolist(), arm_accuracy=accuracy.tolist(),
                        arm_reward=rewards.tolist(), arm_share=action.tolist())


# ---- the run folder ----------------------------------------------------------------------------

@contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): mend that, then go "
                         f"on from the last checkpoint with --resume; or choose another --out_dir")


@contextmanager
def claimed(folder, name):
    """The folder is for one process at a time. A lock ends with its process, however that ends."""
    lock = os.path.join(folder, f".{name}.lock")
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        file = open(lock, "a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.stat(lock), os.fstat(file.fileno()))     # not one just left
        except (NameError, OSError) as error:   # Windows and some file systems know no locks
            free = not isinstance(error, (BlockingIOError, PermissionError, FileNotFoundError))
        if not free:
            raise ValueError(f"another process is at work in {folder}; wait for it, or choose "
                             f"another --out_dir")
        try:
            yield
        finally:
            with suppress(OSError):
                os.remove(lock)
                os.rmdir(folder)                # if nothing was written there


@contextmanager
def replacing(path):
    """-> where to write; then it is renamed, so at any moment `path` is a whole file."""
    part = path + ".part"
    with writing(path):
        try:
            yield part
            os.replace(part, path)
        finally:
            with suppress(OSError):
                os.remove(part)


def save_checkpoint(path, checkpoint):
    """Written beside, read again, sealed with a checksum, then renamed."""
    if not all(weight.isfinite().all() for weight in checkpoint["model"].values()):
        raise ValueError(f"weights are no longer finite, and not saved: start anew in another "
                         f"--out_dir with a lower --lr; an earlier {path} is as it was")
    with replacing(path) as part:
        try:
            torch.save(checkpoint, part)
            torch.load(part, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise OSError(errno.EIO, getattr(error, "strerror", None) or scan.one_line(error))
        except Exception as error:
            raise ValueError(f"{path} would not load again ({scan.one_line(error)}): a state_dict "
                             f"may hold tensors, numbers, strings, lists and dicts, and no numpy "
                             f"arrays")
        scan.seal(part)


class Log:
    """log.jsonl: one JSON object a line, each written whole."""

    def __init__(self, path, resume_at=None):
        """A resumed run writes the lines from its step on again, so the old ones are cut off."""
        self.path, self.writes, end = path, processes()[0] == 0, 0
        if not self.writes:
            return
        with writing(path), open(path, "a+b") as file:
            file.seek(0)
            for number, line in enumerate(file if resume_at is not None else (), 1):
                if not line.endswith(b"\n"):            # cut short by a kill
                    break
                try:
                    if json.loads(line)["step"] >= resume_at:
                        break
                except (KeyError, RecursionError, TypeError, ValueError):
                    raise ValueError(f"{path} line {number} is not of a log: {line[:50]!r}; mend "
                                     f"or remove it")
                end += len(line)
            file.truncate(end)

    def write(self, **entry):
        if self.writes:             # JSON knows neither nan nor infinity: null stands for them
            entry = json.loads(json.dumps(entry), parse_constant=lambda name: None)
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


class StopSignal:
    """Ctrl-C, SIGTERM or SIGHUP: a stop after the step in hand, or at once where all is saved
    (`at_once`: starting, evaluating, showing samples; never while others take the same step).

    A second Ctrl-C (a second later: some tools send each twice) stops at once too.
    """

    def __init__(self, program="train.py"):
        self.program, self.asked, self.when, self.at_once = program, 0, math.inf, True
        self.message = "stopped before the first step"

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():       # others cannot have any
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:          # as nohup sets SIGHUP
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is SystemExit:                  # said here, below the progress bar
            with suppress(OSError):             # the terminal may be gone
                print(self.message, file=sys.stderr)

    def ask(self, number, frame):
        again = number == signal.SIGINT and time.monotonic() > self.when + 1
        self.asked, self.when = number, min(self.when, time.monotonic())
        if self.at_once or again:
            self.stop()

    def stop(self):
        raise SystemExit(128 + (self.asked or signal.SIGTERM))

    def saved(self, step, args, at_once=False):
        """Tell it what a stop would say from now on, and whether one loses nothing (at_once)."""
        self.message = (f"stopped after step {step}; go on with: python {self.program} "
                        f"--out_dir={shlex.quote(args.out_dir)} --resume")
        self.at_once = at_once
        if at_once and self.asked:
            self.stop()


# ---- training ----------------------------------------------------------------------------------

class Run:
    """What a run consists of: text, batches, model, optimizer, scheduler, and its folder."""

    def __init__(self, args):
        self.args, self.start = args, 0
        self.before = None              # losses at the evaluation before
        self.path = os.path.join(args.out_dir, "ckpt.pt")
        if source := self.path if args.resume else args.init_from:
            self.model, tokenizer, saved = LM.load(source)
            self.model.config.recompute = args.recompute        # which changes no weight
            self.tok = Tokenizer(**tokenizer)
        else:
            self.tok = Tokenizer(args.tokenizer, n_masks=args.block_size // 8)
            self.model = LM(model_config(args, self.tok))
        self.corpus = corpus = Corpus(args.data, self.tok)
        self.data = dict(corpus.size, fingerprint=corpus.fingerprint)
        self.batches = Batches(corpus, self.tok, args.block_size, args.batch_size)
        self.arms = self.batches.arms
        self.scheduler = make_scheduler(args.mixture, self.arms, args.max_steps, args.seed)
        self.batches.batch(args.seed, 0, 0, self.scheduler.action, "train")     # usable?
        self.validation = Validation(Batches(corpus, self.tok, args.block_size, args.eval_rows))
        self.model.to(args.device)
        if args.shard and processes()[1] > 1:
            shard(self.model, args)
        optimizer = torch.optim.AdamW(
            self.model.parameter_groups(args.weight_decay), args.lr, (0.9, args.beta2), fused=True)
        self.learner = Learner(self.model, optimizer, args, args.clip)
        if args.resume:
            self.restore(saved)
        self.log = Log(os.path.join(args.out_dir, "log.jsonl"),
                       self.start if args.resume else None)
        if not args.resume:
            self.log.write(step=-1, config=vars(args), arms=[arm.name for arm in self.arms],
                           data=self.data, torch=torch.__version__)

    def restore(self, saved):
        if saved["data"] != self.data:
            raise ValueError(f"the run's text was {saved['data']}, and --data={self.args.data} is "
                             f"{self.data}; give it the same text, or train on this one in another "
                             f"--out_dir with --init_from={self.path}")
        with fits(self.path):
            self.learner.load_state_dict(saved)
            self.scheduler.load_state_dict(saved["scheduler"])
            self.start, self.before = saved["step"], saved["losses"] and np.array(saved["losses"])
            self.action = self.scheduler.action

    def passes(self, step):
        """How often the text has been read."""
        return step * self.args.batch_size * self.args.block_size / self.corpus.size["train"]

    def describe(self):
        args, size = self.args, self.corpus.size
        print(f"text     {args.data}: {size['train']:,} tokens, to be read "
              f"{self.passes(args.max_steps):.1f} times; {size['val']:,} for validation")
        print(f"model    {args.arch}{', causal' * args.causal}: {args.n_layer} blocks, "
              f"{self.model.n_parameters():,} parameters")
        print(f"run      {args.max_steps:,} steps of {args.batch_size} x {args.block_size} tokens, "
              f"{args.mixture} over {len(self.arms)} arms, learning rate {args.lr:g}, into "
              f"{args.out_dir}/" + f", from step {self.start:,}" * (self.start > 0))
        if self.start == args.max_steps:
            print("         it is finished: only its last evaluation is repeated; --init_from in "
                  "another --out_dir trains on")

    def save(self, step):
        states = dict(self.learner.state_dict(), model=whole(self.model.state_dict()))
        if processes()[0] == 0:
            save_checkpoint(self.path, dict(
                states, step=step, config=vars(self.args), model_config=vars(self.model.config),
                tokenizer=self.tok.arguments, data=self.data, scheduler=self.scheduler.state_dict(),
                losses=None if self.before is None else self.before.tolist()))

    def evaluate(self, step):
        """Losses, and the next action; the scheduler of the first process chooses for all."""
        loss, accuracy = self.validation(self.model, self.args)
        predicted = getattr(self.scheduler, "predicted", None)
        is_first = processes()[0] == 0
        if is_first:
            self.scheduler.update(step, loss.copy())
        self.action = sum_over(self.scheduler.action * is_first).numpy()
        self.batches.check(self.action)
        before = loss if self.before is None else self.before
        entry = report(step, self.arms, loss, accuracy, before, self.action, predicted)
        self.log.write(**entry, lr=learning_rate(step, self.args), passes=self.passes(step))
        self.before = loss


def train(args):
    """The whole run, into args.out_dir."""
    join_processes(args)
    rank, n_processes = processes()
    claim = claimed(args.out_dir, "ckpt.pt") if rank == 0 else nullcontext()
    with StopSignal() as stop, claim:
        if not args.resume and os.path.exists(os.path.join(args.out_dir, "ckpt.pt")):
            raise ValueError(f"{args.out_dir}/ckpt.pt exists; go on from it with --resume, "
                             f"choose another --out_dir, or remove it")
        settle(args)
        torch.use_deterministic_algorithms(True, warn_only=True)    # compiled, the embedding is not
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.manual_seed(args.seed)
        run = Run(args)
        run.describe()
        take_steps(run, stop)
        if rank == 0:
            model = LM.load(run.path)[0] if run.learner.is_sharded else run.model
            show_samples(model, run.batches)
    if n_processes > 1:
        dist.destroy_process_group()


def take_steps(run, stop):
    args, (rank, n_processes) = run.args, processes()
    loader = Loader(run.batches, args.seed, args.workers)
    evaluations = evaluation_steps(args.max_steps)      # the last at max_steps, with no step after
    with progress_bar(total=args.max_steps, initial=run.start, unit="step", smoothing=0.05,
                      disable=rank > 0) as bar:
        for begin, end in zip(evaluations, [*evaluations[1:], args.max_steps + 1]):
            if end <= run.start:
                continue
            if begin >= run.start:
                run.save(begin)         # first, so that resuming repeats the evaluation
                stop.saved(begin, args, at_once=n_processes == 1)
                run.evaluate(begin)
            stop.at_once = False
            first, tick = max(begin, run.start), time.perf_counter()
            for step, batch in enumerate(loader.steps(first, min(end, args.max_steps), run.action),
                                         first):
                lr = learning_rate(step, args)
                loss, norm = run.learner.step(batch, lr)
                bar.update()
                stopping = stop.asked and n_processes == 1
                if (step + 1) % 10 == 0:        # the only steps that wait for the device
                    # all processes stop at the same step
                    loss, stopping = sum_over([loss.item(), stop.asked]).tolist()
                    if not math.isfinite(loss) and args.dtype != "float16":     # which skips it
                        raise ValueError(f"the loss is {loss} at step {step}; {run.path} is from "
                                         f"before: start anew in another --out_dir, with a lower "
                                         f"--lr than {args.lr:g}")
                    seconds, tick = time.perf_counter() - tick, time.perf_counter()
                    n_steps = min(10, step + 1 - first)
                    speed = round(n_steps * args.batch_size * args.block_size / seconds)
                    bar.set_postfix_str(f"loss {loss:.3f}, {speed:,} tokens/s", refresh=False)
                    run.log.write(step=step, train_loss=loss, norm=norm.item(), lr=lr,
                                  tokens_per_s=speed, **run.learner.counts())
                if stopping:
                    run.save(step + 1)
                    stop.saved(step + 1, args)
                    stop.stop()
        stop.at_once = True


# ---- what the model has learnt, as text --------------------------------------------------------

def show_samples(model, batches, longest=160):
    """A greedy answer to a validation sample of every class, of its first arm."""
    tok, rng = batches.tok, np.random.default_rng(0)
    for cls in dict.fromkeys(arm.cls for arm in batches.arms):
        arm = next(arm for arm in batches.arms if arm.cls == cls)
        sample = batches.sample(arm, batches.block_size, rng, "val")
        prefix, label = (ids.tolist() for ids in sample)
        start = [tok.GEN]
        if not prefix:                  # next token prediction continues the first half of a text
            half = len(label) // 2
            start, label = start + label[:half], label[half:]
        label = label[:longest]
        answer, = model.generate([(prefix, start)], len(label), stop=tok.DONE)
        right = np.mean([a == b for a, b in zip(answer + [None] * len(label), label)])
        print(f"\n--- {arm.name}: {right:.0%} of {len(label)} tokens right")
        for title, ids in (("input", prefix or start), ("target", label), ("model", answer)):
            text = tok.decode(ids)
            text = text if len(text) <= 320 else text[:160] + " ... " + text[-160:]
            print(f"{title:>7s} | " + text.replace("\n", "\n        | "))


def main(argv=None):
    with errors_in_one_line():
        train(parse_args(argv))


if __name__ == "__main__":
    main()
