"""Speed: of the scan, a training step, decoding, and making batches.

    python experiments/bench.py                                all four, on one thread
    python experiments/bench.py step --nanogpt=FOLDER          FOLDER holds nanoGPT's model.py
    python experiments/bench.py scan decode --quick            tiny sizes: does it run?

Times are medians of rounds in which all that is compared takes turns, so that noise hits all alike.
Inputs are random. It runs on the GPU where there is one.
"""
import importlib.util
import itertools
import os
import statistics
import sys
import time
from functools import partial
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train                            # before torch: it sets how threads wait
import numpy as np
import torch

import scan as S
from model import LM, MIXERS, RESET_FORWARD, RESET_REVERSE, command_line, run_blocks
from objectives import Batches, Corpus, Tokenizer

VOCABULARY = Tokenizer("bpe2048", n_masks=16)


def medians(functions, rounds, device):
    """{name: median seconds of functions[name]}."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):                                 # the first round warms up
        for name, run in functions.items():
            begin = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


# ---- the scan, against other packages and the memory limit ---------------------------------------

def peers(device):
    """(name, scan) of other packages, where installed, with the copies that their layouts need."""
    def installed(name, needs="cuda"):
        return importlib.util.find_spec(name) and needs in (device, "any")

    if installed("mambapy", needs="any"):
        from mambapy.pscan import pscan
        yield "mambapy", lambda a, x: pscan(a[..., None], x[..., None])[..., 0]
    if installed("accelerated_scan"):
        from accelerated_scan.warp import scan as warp
        yield "accelerated-scan", lambda a, x: warp(a.mT.contiguous(), x.mT.contiguous()).mT
    if installed("fla"):
        from fla.ops.hgrn import fused_recurrent_hgrn
        yield "fla hgrn", lambda a, x: fused_recurrent_hgrn(x, a.log())[0]


def bench_scan(args):
    """In units of the time that torch.add takes to move as many tensors: 3 forward, 8 in all."""
    shapes = [(4, 2048, 1024), (1, 16384, 512)]                 # (B, T, D)
    if args.device != "cpu":
        shapes = [(8, 2048, 2560), (16, 2048, 1536), (1, 131072, 512)]
    best, reason, walk = S.choose(torch.empty(0, device=args.device).device)
    print(f"scan: {best} {reason}\n{'':18s}{'(B, T, D)':20s}   forward   with backward")
    for shape in [(1, 64, 8)] if args.quick else shapes:
        a, x, g, h, da, dx = (torch.rand(shape, device=args.device) for _ in range(6))
        leaves = [t.clone().requires_grad_() for t in (a, x)]
        runs = {"unit": lambda: torch.add(a, x, out=h)}
        for name, walk in {best: walk, "torch": S.torch_walk}.items():
            runs[name, 0] = partial(walk, a, x, h, False)
            runs[name, 1] = partial(walk, a, g, dx, True, h, da)
        # with what a model pays besides: new tensors and autograd
        called = {"scan(a, x)": S.scan, **dict(peers(args.device))}
        for name, function in called.items():
            runs[name, 0] = lambda f=function: f(a, x)
            runs[name, 1] = lambda f=function: torch.autograd.grad(f(*leaves), leaves, g)
        seconds = medians(runs, args.rounds, args.device)
        for name in dict.fromkeys(name for name, _ in list(runs)[1:]):
            first, both = seconds[name, 0], seconds[name, 1]
            both += 0 if name in called else first
            print(f"{name:18s}{shape!s:20s}{first / seconds['unit']:10.2f}"
                  f"{both / seconds['unit'] * 3 / 8:16.2f}")


# ---- a training step -----------------------------------------------------------------------------

def our_model(arch):
    sizes = train.parse_args([f"--arch={arch}"])
    return LM(train.model_config(sizes, VOCABULARY))


class NanoGPT(torch.nn.Module):
    """nanoGPT's GPT with as many parameters in its blocks as the Gated SSM."""

    def __init__(self, folder, T):
        super().__init__()
        path = os.path.join(folder, "model.py")
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.gpt = module.GPT(module.GPTConfig(
            block_size=T, vocab_size=VOCABULARY.vocab_size, n_layer=4, n_head=4, n_embd=176,
            dropout=0.0, bias=False))
        self.blocks = self.gpt.transformer.h

    def forward(self, tokens, reset, targets):
        return self.gpt(tokens, targets)


def bench_step(args):
    """Tokens a second by length of row; the number of tokens in a step is always the same."""
    n_tokens, lengths = (128, (32, 64)) if args.quick else (16384, (512, 1024, 4096, 16384))
    for T in lengths:
        torch.compiler.reset()
        models = {arch: our_model(arch) for arch in MIXERS}
        if args.nanogpt is not None:
            models["nanoGPT"] = NanoGPT(args.nanogpt, T)
        tokens = torch.randint(256, (n_tokens // T, T))
        reset = torch.zeros_like(tokens, dtype=torch.uint8)     # half of each row is a prefix
        reset[:, 0] = RESET_FORWARD
        reset[:, T // 2:] |= RESET_REVERSE
        batch, steps = dict(tokens=tokens, reset=reset, targets=tokens), {}
        for name, model in models.items():
            model.to(args.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            steps[name] = partial(train.Learner(model, optimizer, args, 1.0).step, batch, 1e-3)
        if T == lengths[0]:
            counts = [sum(p.numel() for p in m.blocks.parameters()) for m in models.values()]
            print(f"training, tokens/s, {n_tokens:,} tokens a step\n{'':18s}"
                  + "".join(f"{name:>14s}" for name in models)
                  + f"\n{'blocks have':18s}" + "".join(f"{n:14,}" for n in counts))
        seconds = medians(steps, args.rounds, args.device)
        speeds = "".join(f"{n_tokens / taken:14,.0f}" for taken in seconds.values())
        print(f"{f'rows of {T:,}':18s}{speeds}", flush=True)


# ---- decoding ------------------------------------------------------------------------------------

@torch.no_grad()
def token_times(model, prompt, new):
    """Seconds of each new token after the first, and bytes of state, after so many tokens."""
    times, size = [], 0

    def watched(*inputs):
        nonlocal size
        times.append(time.perf_counter())
        x, states = run_blocks(*inputs)
        size = sum(t.numel() * t.element_size() for state in states for t in state if t is not None)
        return x, states

    with mock.patch("model.run_blocks", watched):
        model.generate([([1] * prompt, [2])], new)
    return np.diff(times)[1:].tolist(), size


def bench_decode(args):
    """Time and state of one more token by length of prompt."""
    prompts, new = ((16, 32), 8) if args.quick else ((512, 16384), 200)
    print(f"decoding {new} tokens, one prompt at a time\n{'':12s}{'prompt':>8s}{'ms a token':>13s}"
          f"{'KB of state':>13s}")
    for arch in MIXERS:
        model, times = our_model(arch).to(args.device), {prompt: [] for prompt in prompts}
        sizes = {}
        for _, prompt in itertools.product(range(-(-args.rounds // 2)), prompts):
            seconds, sizes[prompt] = token_times(model, prompt, new)
            times[prompt] += seconds
        for prompt in prompts:
            print(f"{arch:12s}{prompt:8,}{1000 * statistics.median(times[prompt]):13.2f}"
                  f"{sizes[prompt] / 1024:13,.1f}")


# ---- batches -------------------------------------------------------------------------------------

def bench_batches(args):
    """How fast one process makes batches, and how full their rows are."""
    data = os.path.join(ROOT, "README.md") if args.quick else "stdlib"
    tok = Tokenizer("bpe2048")
    corpus = Corpus(data, tok)
    print("batches of 16,384 tokens, every arm alike\n"
          f"{'T':>8s}{'rows full':>13s}{'tokens/s':>13s}{'batches/s':>13s}")
    for T in (128,) if args.quick else (128, 512, 2048):
        batches = Batches(corpus, tok, T, 16384 // T)
        action, full = np.full(len(batches.arms), 1 / len(batches.arms)), []
        made = (batches.batch(1, 0, step, action, "train") for step in itertools.count())
        runs = {T: lambda: full.append((next(made)["arm"] >= 0).mean())}
        seconds = medians(runs, 2 * args.rounds, "cpu")[T]
        print(f"{T:8,}{np.mean(full):13.1%}{16384 / seconds:13,.0f}{1 / seconds:13.1f}")


BENCHES = {"scan": bench_scan, "step": bench_step, "decode": bench_decode, "batches": bench_batches}


def main(argv):
    parser, flag = command_line(None)
    flag("what", nargs="*", default=[*BENCHES], help=f"of {', '.join(BENCHES)}; all without a name")
    flag("--threads", default=1, help="of the CPU")
    flag("--compile", action="store_true", help="torch.compile for training steps")
    flag("--nanogpt", metavar="FOLDER", help="holds nanoGPT's model.py, which trains beside ours")
    flag("--quick", action="store_true", help="tiny sizes and one round: numbers mean nothing")
    args = parser.parse_args(argv)
    unknown = set(args.what) - set(BENCHES)
    if unknown:
        parser.error(f"{', '.join(unknown)} is unknown; choose from {', '.join(BENCHES)}")
    torch.set_num_threads(args.threads)
    settings = train.parse_args([f"--compile={'yes' if args.compile else 'no'}"])
    try:
        train.settle(settings)                          # device and number format, as in a run
        args.device, args.dtype, args.compile = settings.device, settings.dtype, settings.compile
        args.rounds = 1 if args.quick else 5
        for what in args.what:
            print()
            BENCHES[what](args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
