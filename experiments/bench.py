"""Speed of the model, as assets/measurements.md reports it: training by length of row, decoding by length of prompt, and
nanoGPT's model beside it when a checkout of it is at hand.

    python tests/bench.py [--threads=4] [--compile] [--nanogpt=FOLDER]

Times are medians of interleaved rounds. Random tokens; bfloat16 matrix products, as in a run on this CPU.
"""
import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from model import ARCHS, LM, ModelConfig
from scan import RESET_FORWARD, RESET_REVERSE
from train import PRESETS, keep_freed_memory

TOKENS = 16384          # in a training step, whatever the length of its rows


def config(arch, T):
    sizes = PRESETS["cpu"]
    names = ("d_model", "d_state", "n_head")
    return ModelConfig(arch=arch, n_layer=sizes["n_layer"][arch], block_size=T, **{name: sizes[name] for name in names})


def ours(arch, T):
    model = LM(config(arch, T))
    reset = torch.zeros(TOKENS // T, T, dtype=torch.uint8)
    reset[:, 0] = RESET_FORWARD
    reset[:, T // 2:] |= RESET_REVERSE
    return model, lambda forward, tokens: forward(tokens, reset, tokens)[1]


def nanogpt(folder, T):
    """nanoGPT's GPT with as many parameters in its blocks as our Gated SSM."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(block_size=T, vocab_size=336, n_layer=4, n_head=4, n_embd=176, dropout=0.0, bias=False))
    return model, lambda forward, tokens: forward(tokens, tokens)[1]


def stepper(model, loss_of, T, compiled):
    forward, tokens = torch.compile(model) if compiled else model, torch.randint(0, 256, (TOKENS // T, T))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(forward, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def medians(functions, rounds=5):
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, run in functions.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def decoding(model, prompt, new=200):
    """Median seconds of a new token, and bytes of state, after a prompt of so many tokens."""
    times, sizes, run = [], [], model.run

    def spy(*args):
        times.append(time.perf_counter())
        x, states = run(*args)
        sizes.append(sum(s.numel() * s.element_size() for state in states for s in state))
        return x, states
    model.run = spy
    model.generate([([1] * prompt, [2])], new)
    model.run = run
    return statistics.median(b - a for a, b in zip(times[1:], times[2:])), sizes[-1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--nanogpt", default="", help="a folder with nanoGPT's model.py")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()

    print(f"training, tokens/s, {TOKENS:,} tokens a step, {args.threads} threads, {'compiled' if args.compile else 'eager'}")
    lengths = (512, 1024, 4096, 16384)
    print(f"{'':14s}{'parameters':>12s}" + "".join(f"{f'T={T}':>10s}" for T in lengths))
    names = (*ARCHS, *["nanoGPT"] * bool(args.nanogpt))
    steps, counts = {}, {}
    for name, T in itertools.product(names, lengths):
        model, loss_of = nanogpt(args.nanogpt, T) if name == "nanoGPT" else ours(name, T)
        counts[name] = sum(p.numel() for p in (model.transformer.h if name == "nanoGPT" else model.blocks).parameters())
        steps[name, T] = stepper(model, loss_of, T, args.compile)
    seconds = medians(steps)
    for name in names:
        print(f"{name:14s}{counts[name]:12,}" + "".join(f"{TOKENS / seconds[name, T]:10,.0f}" for T in lengths))

    torch.set_num_threads(1)
    prompts = (512, 16384)
    print("\ndecoding, ms and KB of state a token after prompts of 512 and 16,384 tokens, one thread")
    for arch in ARCHS:
        model = LM(config(arch, 512)).eval()
        found = [[decoding(model, prompt) for prompt in prompts] for _ in range(3 if arch == "transformer" else 9)]
        for prompt, rounds in zip(prompts, zip(*found)):
            print(f"{arch:14s} {prompt:6,d} tokens: {1000 * statistics.median(s for s, _ in rounds):7.3f} ms "
                  f"{rounds[0][1] / 1024:9,.1f} KB")
        ratio = statistics.median(longer[0] / shorter[0] for shorter, longer in found)
        print(f"{'':14s} time after the longer in multiples of the shorter: {ratio:.3f}")


if __name__ == "__main__":
    main()
