"""The phone book, from nothing: pretrain, fine-tune at some rates, score the best, draw figure 1.

    python experiments/figure1.py --only='gated_ssm-birdie-1,gated_ssm-ntp-1'       some runs
    python experiments/figure1.py --preset=packages     every run, as many at a time as cores
    python experiments/figure1.py draw experiments/figure1.json OUT.png       what was measured

A run is named ARCHITECTURE-PRETRAINING-SEED. Its folder in --out_dir holds ckpt.pt, a folder for
each way to fine-tune (the fewest entries of a book, the rate), and log.txt with all that was
printed. The rate with the most digits right on validation books is scored on test books. The same
command goes on where an earlier one stopped and leaves alone what is done. After each run
figure1.json holds all that are there; at the end come a markdown table and figure1.png.

The number of threads changes how sums are rounded, and so the result; with several, and on a GPU,
the same command need not give it twice. experiments/README.md says where each run of
experiments/figure1.json was made.
"""
import ctypes
import fnmatch
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends the imports without a word

import train                            # before torch: it sets how threads wait
import numpy as np
import torch
from tqdm import tqdm

from model import command_line, errors_in_one_line

ARCHITECTURES = {"gated_ssm": "Gated SSM", "hawk": "Hawk", "transformer": "Transformer"}
PRETRAINING = {                         # its flags and its name
    "birdie": (["--mixture=birdie"], "Birdie"),
    "ntp": (["--mixture=ntp"], "next token prediction"),
    "none": (None, "none"),
    "birdie-causal": (["--mixture=birdie-causal"], "Birdie, causal"),
    "fixed": (["--mixture=fixed"], "fixed mixture"),
    "no-copying": (["--mixture=no-copying"], "fixed mixture without copying"),
    "ntp-copying": (["--mixture=ntp-copying"], "next token prediction, copying"),
    "ul2": (["--mixture=ul2"], "UL2")}
COLORS = {"birdie": "C0", "fixed": "C2", "ntp": "C3", "none": "0.35"}   # the others are pale
RUNS = {f"{arch}-{kind}-{seed}": (arch, kind, seed) for arch, kind, seed in (
    *(("gated_ssm", kind, seed) for seed in (1, 2, 3)
      for kind in ("birdie", "ntp", "none", "fixed")),
    *(("gated_ssm", kind, 1) for kind in ("birdie-causal", "no-copying", "ntp-copying", "ul2")),
    *((arch, kind, 1) for arch in ("hawk", "transformer") for kind in ("birdie", "ntp", "none")))}
RATES, SIZES = (1e-3, 2e-3, 4e-3), (4, 8, 16, 32, 64, 128)
SMALL = ["--d_model=192", "--d_state=384", "--n_head=4", "--lr=2e-3"]
PRESETS = {     # name of the text, flags of pretraining, of fine-tuning, its rates, test sizes
    "tables": ("tables of numbers, 2.3 million parameters", [], [], RATES, SIZES),
    "mixed": ("real text and a fifth of tables, 2.3 million parameters",
              ["--data=packages,tables", "--max_steps=24500", "--eval_rows=2"], [],
              (*RATES, 8e-3), SIZES),
    "packages": ("real text, 2.3 million parameters", ["--preset=wide", *SMALL],
                 ["--max_steps=1066", "--batch_size=2"], RATES, SIZES),
    "wide": ("real text, 12.6 million parameters", ["--preset=wide"], ["--preset=wide"],
             (5e-4, 1e-3, 2e-3), SIZES),
    "gpu": ("real text, 34 million parameters", ["--preset=gpu"], ["--preset=gpu"],
            (1e-4, 3e-4, 1e-3), (50, 100, 200, 400))}
# A small model cannot keep a GPU busy: CUDA graphs, a process that makes batches, many --jobs.
MACHINE = ["--workers=1", "--compile=graphs"] if torch.cuda.is_available() else ["--workers=0"]
LOWER = {"transformer": 1 / 4}          # all its rates over the others'
STARTS = 4, 2                           # entries of the first books in fine-tuning
TEST_BOOKS = 1024                       # of each size


def parse_args(argv):
    parser, flag = command_line("python experiments/figure1.py [--FLAG=VALUE ...]")
    flag("--out_dir", default="figure1", help="holds a folder of runs for each preset")
    flag("--preset", default="tables", choices=PRESETS, help="text, size of models and books")
    flag("--entries_min", default=4, choices=STARTS,
         help="entries of the first books in fine-tuning; from 2 on it is easier")
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

def settings(preset, arch):
    """-> flags of pretraining, of fine-tuning, its rates, test sizes."""
    _, pretraining, finetuning, rates, sizes = PRESETS[preset]
    if arch in LOWER:
        usual = train.parse_args(pretraining).lr
        pretraining = [*pretraining, f"--lr={usual * LOWER[arch]}"]
        rates = [rate * LOWER[arch] for rate in rates]
    return pretraining, finetuning, rates, sizes


def commands(name, folder, args):
    """A run's programs with their flags, one after the other; those that are done are left out."""
    arch, kind, seed = RUNS[name]
    pretraining, finetuning, rates, sizes = settings(args.preset, arch)
    folders = [f"{folder}/{args.entries_min}-{rate}" for rate in rates]
    common = [f"--seed={seed}", *(MACHINE if args.preset != "gpu" else [])]
    source = [f"--ckpt={folder}/ckpt.pt"]
    if kind == "none":
        source = [f"--scratch={arch}"]
    elif not any(read(f"{tuned}/phonebook.json") for tuned in folders):
        # repeats the last evaluation of a run that is over
        there = os.path.exists(f"{folder}/ckpt.pt")
        yield ["train.py", *pretraining, f"--arch={arch}", f"--out_dir={folder}",
               *PRETRAINING[kind][0], *common, *["--resume"] * there]
    for tuned, rate in zip(folders, rates):
        if not read(f"{tuned}/phonebook.json"):
            there = os.path.exists(f"{tuned}/phonebook.pt")
            yield ["eval_phonebook.py", *finetuning, *source, f"--lr={rate}",
                   f"--entries_min={args.entries_min}", f"--out_dir={tuned}", "--test_books=0",
                   *common, *["--resume"] * there]
    best = max(folders, key=lambda tuned: validation(read(f"{tuned}/phonebook.json")))
    yield ["eval_phonebook.py", f"--out_dir={best}", "--resume",
           f"--test_entries={','.join(map(str, sizes))}", f"--test_books={TEST_BOOKS}"]


def read(path):
    """A result of eval_phonebook.py, or None."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        try:
            found = json.load(file)
            found["curve"][-1]["digits"], found["results"], found["config"]["lr"]
            found["config"]["entries_min"]
        except (IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no result of eval_phonebook.py ({type(error).__name__}); "
                             f"remove it")
    return found


def validation(found):
    """What a rate is chosen by: digits right on validation books at the end."""
    return found["curve"][-1]["digits"]


def end_with_parent():
    """A child of a process that is killed gets SIGTERM (Linux), and saves."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_one(name, args, threads):
    """Each program in a process of its own -> "", or what went wrong."""
    folder = os.path.join(args.out_dir, args.preset, name)
    os.makedirs(folder, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(os.path.join(folder, "log.txt"), "a+", errors="replace") as log:
        tqdm.write(f"{name} writes {log.name}")
        for program, *flags in commands(name, folder, args):
            begin, command = time.time(), [sys.executable, os.path.join(ROOT, program), *flags]
            code = subprocess.run(command, stdout=log, stderr=log, env=environment,
                                  preexec_fn=end_with_parent).returncode
            if code:
                log.seek(0)
                *_, last = "?", *(line.strip() for line in log if line.strip())
                return f"{name}: {program} failed with exit code {code}; {log.name} ends: {last}"
            log.write(f"{program} took {time.time() - begin:.0f} s, {threads} threads\n")
            log.flush()                                         # before the next program writes
    return ""


def run_missing(args):
    """Make what --only asks for and is not there -> the results of all that are there."""
    there = {"{arch}-{pretrained}-{seed}".format(**run) for run in collect(args)
             if (run["preset"], run["config"]["entries_min"]) == (args.preset, args.entries_min)}
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
    """The results that are there, of each run at its best rate -> figure1.json."""
    found = []
    for preset, name, start in itertools.product(PRESETS, RUNS, STARTS):
        arch, kind, seed = RUNS[name]
        *_, rates, sizes = settings(preset, arch)
        tried = [read(os.path.join(args.out_dir, preset, name, f"{start}-{rate}", "phonebook.json"))
                 for rate in rates]
        best = max(tried, key=validation) if all(tried) else dict(results=())
        best["results"] = sorted(
            (each for each in best["results"] if each["books"] == TEST_BOOKS and
             each["n_numbers"] == 1 and each["n_entries"] in sizes),
            key=lambda each: each["n_entries"])
        if len(best["results"]) == len(sizes):
            chosen_from = {each["config"]["lr"]: validation(each) for each in tried}
            found.append(dict(preset=preset, arch=arch, pretrained=kind, seed=seed,
                              tried=chosen_from, **best))
    with (train.replacing(os.path.join(args.out_dir, "figure1.json")) as part,
          open(part, "w") as file):
        json.dump(found, file, indent=1)
    return found


# ---- what came out -------------------------------------------------------------------------------

def load(path):
    """A figure1.json."""
    needed = {"preset", "arch", "pretrained", "seed", "tried", "results", "curve", "config"}
    try:
        with open(path) as file:
            found = json.load(file)
        right = found and all(needed <= set(run) for run in found)
    except (RecursionError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{path} is no list of phone book results; pass a figure1.json")
    return found


def panels_of(found):
    """{(preset, architecture, entries of the first books): {pretraining: its runs}}, in order."""
    panels = {}
    for *panel, kind in itertools.product(PRESETS, ARCHITECTURES, STARTS, PRETRAINING):
        runs = [run for run in found if (*panel, kind) == (
            run["preset"], run["arch"], run["config"]["entries_min"], run["pretrained"])]
        if runs:
            panels.setdefault(tuple(panel), {})[kind] = runs
    return panels


def reached(run, share):
    """The first step of the curve with so many of the digits right."""
    steps = [point["step"] for point in run["curve"] if point["digits"] >= share]
    return f"{steps[0]:,}" if steps else "-"


def show_table(found):
    """Markdown, a line a run; experiments/README.md has that of experiments/figure1.json."""
    sizes = sorted({each["n_entries"] for run in found for each in run["results"]})
    print("\n| text, pretraining, seed | digits right on validation books at the rates, in order "
          "| steps until 50%, 90% | digits right, numbers exact, in test books of "
          + " | ".join(map(str, sizes)) + " |\n" + "|---" * (3 + len(sizes)) + "|")
    for (preset, arch, start), arms in panels_of(found).items():
        for run in itertools.chain(*arms.values()):
            name = [preset, ARCHITECTURES[arch] * (arch != "gated_ssm"),
                    f"books from {start}" * (start != STARTS[0]),
                    PRETRAINING[run["pretrained"]][1], str(run["seed"])]
            scores = {each["n_entries"]: f"{each['digits']:.1%}, {each['exact']:.0%}"
                      for each in run["results"]}
            cells = [", ".join(filter(None, name)),
                     ", ".join(f"{share:.1%}" for share in run["tried"].values()),
                     f"{reached(run, 0.5)}, {reached(run, 0.9)}",
                     *(scores.get(n, "") for n in sizes)]
            print("| " + " | ".join(cells) + " |")


def by_heart(n_entries):
    """Digits right where a random entry's number is the answer."""
    return 1 / n_entries + (1 - 1 / n_entries) / 10


def plot(found, picture):
    """Above, digits right in test books: the mean over seeds and, thin, every seed, or one seed
    and its interval over books. Below, the validation books during fine-tuning. Mixtures without a
    color of their own are alike."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("the picture needs matplotlib; pip install matplotlib, then draw again")
    panels, lines = panels_of(found), {}
    figure, axes = plt.subplots(2, len(panels), figsize=(1 + 2.5 * len(panels), 6.6),
                                layout="constrained", squeeze=False, sharey=True)
    for ((preset, arch, start), arms), (above, below) in zip(panels.items(), axes.T):
        shown = arms[next(iter(arms))][0]
        sizes = np.array([each["n_entries"] for each in shown["results"]])
        lines["a random entry's number"], = above.plot(sizes, by_heart(sizes), "k:", lw=1)
        below.axhline(by_heart(shown["config"]["entries_max"]), color="k", linestyle=":", lw=1)
        for kind, runs in arms.items():
            for axis, x, series in ((above, "n_entries", [run["results"] for run in runs]),
                                    (below, "step", [run["curve"] for run in runs])):
                values = np.array([[point["digits"] for point in each] for each in series])
                at, mean, bars = [point[x] for point in series[0]], values.mean(0), None
                if kind not in COLORS:
                    lines["another mixture"], *_ = axis.plot(at, values.T, "C1", lw=1, alpha=0.4)
                    continue
                if len(runs) > 1:
                    axis.plot(at, values.T, COLORS[kind], lw=0.8, alpha=0.7)
                elif axis is above:
                    low, high = np.array([each["digits_interval"] for each in series[0]]).T
                    bars = mean - low, high - mean
                lines[PRETRAINING[kind][1]] = axis.errorbar(
                    at, mean, bars, color=COLORS[kind], lw=2.8, elinewidth=1, capsize=2, zorder=4,
                    marker="o" * (axis is above), ms=4.5)
        name = PRESETS[preset][0].replace(", ", "\n")
        above.set_title("\n".join([name, ARCHITECTURES[arch] * (arch != "gated_ssm"),
                                   f"books from {start} entries" * (start != STARTS[0])]).strip(),
                        fontsize="medium")
        above.set_xscale("log", base=2)
        above.set_xticks(sizes, sizes)
        above.set_xlabel("entries of a test book")
        below.set_xlabel("step of fine-tuning")
    for axis, what in zip(axes[:, 0], ("test books", "validation books")):
        axis.set(ylabel=f"digits right, {what}", ylim=(0, 1.02))
        axis.yaxis.set_major_formatter("{x:.0%}")
    order = [PRETRAINING[kind][1] for kind in COLORS]
    order = [name for name in [*order, "another mixture", "a random entry's number"]
             if name in lines]
    figure.legend([lines[name] for name in order], order, loc="outside upper center",
                  title="pretraining", ncols=2 + len(panels), frameon=False)
    plt.savefig(picture, dpi=110)
    plt.close(figure)
    print(f"\nwrote {picture}")


def main(argv):
    with errors_in_one_line():
        match argv:
            case ["draw", results, picture]:
                found = load(results)
            case ["draw", *_]:
                raise ValueError("python experiments/figure1.py draw JSON OUT.png")
            case _:
                args = parse_args(argv)
                with train.claimed(args.out_dir, "figure1.json"):
                    found = run_missing(args)
                picture = os.path.join(args.out_dir, "figure1.png")
        show_table(found)
        plot(found, picture)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here")
