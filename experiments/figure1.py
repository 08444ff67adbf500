"""The phone book, from nothing: pretrain, fine-tune and score every run, then draw figure 1.

    python experiments/figure1.py                       all 40 runs, as many at a time as cores
    python experiments/figure1.py --only='gated_ssm-birdie-?,gated_ssm-ntp-?'      some of them
    python experiments/figure1.py draw experiments/figure1.json OUT.png       what was measured

A run is named ARCHITECTURE-PRETRAINING-SEED and has a folder in --out_dir, with the files of
train.py and eval_phonebook.py, and log.txt, which holds all that they print. The same command goes
on where an earlier one stopped and leaves alone what is done. After each run figure1.json holds all
that are there; at the end come a markdown table and figure1.png.

The number of threads changes how sums are rounded, and so the result; with several, the same
command need not give it twice. The runs of experiments/figure1.json had one thread each.
"""
import fnmatch
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import eval_phonebook                   # before torch: it sets how threads wait
import numpy as np
import torch
from tqdm import tqdm

from model import command_line

ARCHITECTURES = {"gated_ssm": "Gated SSM", "hawk": "Hawk", "transformer": "Transformer"}
PRETRAINING = {                         # --mixture of train.py, or none: its name, color and width
    "birdie": ("Birdie", "C0", 2.8), "ntp": ("next token prediction", "C3", 2.8),
    "birdie-causal": ("Birdie, causal", "C9", 1.2), "fixed": ("fixed mixture", "C2", 1.2),
    "ul2": ("UL2", "C1", 1.2), "none": ("none", "0.35", 1.2),
    "none-causal": ("none, causal", "0.6", 1.2)}
RUNS = {f"{arch}-{mixture}-{seed}": (arch, mixture, seed) for arch, mixture, seed in (
    *((arch, mixture, seed) for arch in ("gated_ssm", "hawk") for seed in (1, 2, 3)
      for mixture in ("birdie", "ntp", "birdie-causal", "none", "none-causal", "fixed")),
    *((arch, "ul2", 1) for arch in ("gated_ssm", "hawk")),
    *(("transformer", mixture, 1) for mixture in ("birdie", "ntp")))}


def parse_args(argv):
    parser, flag = command_line("python experiments/figure1.py [--FLAG=VALUE ...]")
    flag("--out_dir", default="figure1", help="a folder for each run, figure1.json, figure1.png")
    flag("--preset", default="cpu", choices=eval_phonebook.PRESETS, help="size of models and books")
    flag("--only", default="*", help="runs that match a pattern; several, with commas")
    flag("--jobs", default=1 if torch.cuda.is_available() else cores(),
         help="runs at a time; they share the cores")
    args = parser.parse_args(argv)
    args.only = [pattern.strip() for pattern in args.only.split(",")]
    for pattern in args.only:
        if not fnmatch.filter(RUNS, pattern):
            raise ValueError(f"no run matches {pattern!r} of --only; they are {', '.join(RUNS)}")
    return args


def cores():
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---- running what is missing ---------------------------------------------------------------------

def commands(name, folder, preset):
    """What is left to do of a run: [[program, flag, ...]]."""
    arch, mixture, seed = RUNS[name]
    there = os.listdir(folder)
    common = [f"--seed={seed}", f"--out_dir={folder}", "--workers=0"]
    score = ["eval_phonebook.py", f"--preset={preset}", *common]
    if "phonebook.pt" in there:
        return [[*score, "--resume"]]
    if mixture.startswith("none"):
        return [[*score, f"--scratch={arch}"] + ["--causal"] * mixture.endswith("causal")]
    pretrain = ["train.py", f"--preset={eval_phonebook.PRETRAINING[preset]}", f"--arch={arch}",
                f"--mixture={mixture}", *common]
    return [pretrain + ["--resume"] * ("ckpt.pt" in there), score]


def run_one(name, args, threads):
    """Each program in a process of its own -> "", or what went wrong."""
    folder = os.path.join(args.out_dir, name)
    os.makedirs(folder, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(os.path.join(folder, "log.txt"), "a+", errors="replace") as log:
        tqdm.write(f"{name} writes {log.name}")
        for program, *flags in commands(name, folder, args.preset):
            begin, command = time.time(), [sys.executable, os.path.join(ROOT, program), *flags]
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
            if code:
                log.seek(0)
                *_, last = "?", *(line.strip() for line in log if line.strip())
                return f"{name}: {program} failed with exit code {code}; {log.name} ends: {last}"
            log.write(f"{program} took {time.time() - begin:.0f} s, {threads} threads\n")
            log.flush()                                         # before the next program writes
    return ""


def run_missing(args):
    """Make what --only asks for and is not there -> the results of all that are there."""
    there = {"{arch}-{mixture}-{seed}".format(**run) for run in collect(args)}
    wanted = [name for name in RUNS if any(fnmatch.fnmatch(name, each) for each in args.only)]
    missing = [name for name in wanted if name not in there]
    jobs = max(1, min(args.jobs, len(missing)))
    threads, failed = max(1, cores() // jobs), []
    print(f"{len(missing)} of {len(wanted)} runs to do, {jobs} at a time, {threads} threads each")
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="run") as bar:
        for error in pool.map(lambda name: run_one(name, args, threads), missing):
            failed += [error] * bool(error)
            bar.update()
            collect(args)
    if failed:
        print(*failed, sep="\n")
        raise ValueError(f"{len(failed)} of {len(missing)} runs failed; the same command goes on")
    return collect(args)


def collect(args):
    """The results that are there -> figure1.json; ValueError where one has other settings."""
    preset, _ = eval_phonebook.parse_args([f"--preset={args.preset}", f"--out_dir={os.devnull}"])
    found = []
    for name, (arch, mixture, seed) in RUNS.items():
        path = os.path.join(args.out_dir, name, "phonebook.json")
        if not os.path.exists(path):
            continue
        with open(path) as file:
            result = json.load(file)
        for key in eval_phonebook.PRESETS["paper"]:             # names all that depends on size
            was, now = result["config"][key], getattr(preset, key)
            if was != now:
                raise ValueError(f"{path} has {key} {was}, preset {args.preset} has {now}; remove "
                                 f"it and phonebook.pt beside it, or choose another --out_dir")
        found.append(dict(arch=arch, mixture=mixture, seed=seed, **result))
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, "figure1.json")
    with open(path + ".part", "w") as file:
        json.dump(found, file, indent=1)
    os.replace(path + ".part", path)
    return found


# ---- what came out -------------------------------------------------------------------------------

def load(path):
    """A figure1.json; an earlier version's will do."""
    with open(path) as file:
        found = json.load(file)
    needed = {"arch", "mixture", "seed", "results", "curve"}
    if not (isinstance(found, list) and found and all(needed <= set(run) for run in found)):
        raise ValueError(f"{path} is no list of phone book results; pass a figure1.json")
    return found


def by_arm(found):
    """{(architecture, pretraining): its runs}, in the order of the legend."""
    arms = {(arch, mixture): [] for arch in ARCHITECTURES for mixture in PRETRAINING}
    for run in found:
        arms[run["arch"], run["mixture"]].append(run)
    return {arm: runs for arm, runs in arms.items() if runs}


def show_table(found):
    """Markdown; a value for each seed."""
    print("\n| model | pretraining | seeds | numbers asked | digits right | numbers exact | "
          "steps until half of the digits are right |\n" + "|---" * 7 + "|")
    for (arch, mixture), runs in by_arm(found).items():
        half = [[p["step"] for p in run["curve"] if p["digits"] >= 0.5] for run in runs]
        steps = ", ".join(f"{step[0]:,}" if step else "not reached" for step in half)
        seeds = ", ".join(str(run["seed"]) for run in runs)
        for same in zip(*(run["results"] for run in runs)):
            digits, exact = (", ".join(f"{result[key]:.1%}" for result in same)
                             for key in ("digits", "exact"))
            print(f"| {ARCHITECTURES[arch]} | {PRETRAINING[mixture][0]} | {seeds} | "
                  f"{same[0]['n_numbers']} | {digits} | {exact} | {steps} |")


def plot(found, picture):
    """Digits right: lines are means over seeds, bands go from the lowest to the highest."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("the picture needs matplotlib; pip install matplotlib, then draw again")
    archs = [arch for arch in ARCHITECTURES if any(run["arch"] == arch for run in found)]
    rows = [("curve", "step", "step of fine-tuning")]
    if any(len(run["results"]) > 1 for run in found):
        rows.append(("results", "n_numbers", "numbers asked for"))
    size = 2.6 + 3.4 * len(archs), 3.6 * len(rows)
    figure, axes = plt.subplots(len(rows), len(archs), figsize=size, layout="constrained",
                                squeeze=False, sharex="row", sharey=True)
    lines = {}
    for (arch, mixture), runs in by_arm(found).items():
        label, color, width = PRETRAINING[mixture]
        for axis, (series, x, xlabel) in zip(axes[:, archs.index(arch)], rows):
            values = np.array([[point["digits"] for point in run[series]] for run in runs])
            at = [point[x] for point in runs[0][series]]
            lines[label], = axis.plot(at, values.mean(0), color=color, lw=width, zorder=1 + width)
            axis.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            axis.set(title=ARCHITECTURES[arch], xlabel=xlabel, ylim=(0, 1.02))
    for axis in axes.flat:
        lines["chance"] = axis.axhline(0.1, color="black", linestyle=":", lw=1)
        axis.yaxis.set_major_formatter("{x:.0%}")
    axes[0, 0].set_ylabel("digits right")
    order = [name for name, _, _ in PRETRAINING.values() if name in lines] + ["chance"]
    figure.legend([lines[name] for name in order], order, loc="outside right upper",
                  title="pretraining", alignment="left", frameon=False)
    plt.savefig(picture, dpi=110)
    plt.close(figure)
    print(f"\nwrote {picture}")


def main(argv):
    try:
        match argv:
            case ["draw", results, picture]:
                found = load(results)
            case ["draw", *_]:
                raise ValueError("python experiments/figure1.py draw JSON OUT.png")
            case _:
                args = parse_args(argv)
                found, picture = run_missing(args), os.path.join(args.out_dir, "figure1.png")
        show_table(found)
        plot(found, picture)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
