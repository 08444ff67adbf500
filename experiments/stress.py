"""What happens to real runs, many times over: does each end as it should?

    python experiments/stress.py                        all of it, at most 20 minutes on 2 cores
    python experiments/stress.py --only=kills,damage    of the parts
    python experiments/stress.py --only=kills:17        one trial again
    python experiments/stress.py --quick                a few of each, in a minute

A part yields trials, each a function of --seed and its number (what a signal hits still depends on
the machine). A trial is a process in a folder of its own; it forks the runs that it tries, as torch
is imported there already, and writes a line for all that is not as it should be. At the end stands
a markdown table with a row for each kind of trial, and below it those lines. CPU and Linux only.
"""
import atexit
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval_phonebook                   # before torch: train.py sets how threads wait
import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import scan
from model import LM, RANGES, RESET_FORWARD, command_line, load_checkpoint
from objectives import Batches, Corpus, Loader, Tokenizer

TINY = ("--compile=no --dtype=float32 --device=cpu --workers=0 --data=../text.txt "
        "--tokenizer=bytes --block_size=64 --batch_size=2 --n_layer=1 --d_model=32 --d_state=32 "
        "--eval_rows=1 --mixture=uniform --max_steps=120")
BOOKS = ("--compile=no --dtype=float32 --device=cpu --workers=0 --ckpt=../base/ckpt.pt "
         "--entries_min=1 --entries_max=2 --test_entries=1 --test_numbers=1 --test_books=4 "
         "--block_size=512 --batch_size=2 --max_steps=40")
STATE = "step", "model", "optimizer", "scheduler", "scaler", "losses", "curve"
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def pretrain(folder="run", *flags):
    return ["train.py", *TINY.split(), f"--out_dir={folder}", *flags]


def finetune(folder="run", *flags):
    return ["eval_phonebook.py", *BOOKS.split(), f"--out_dir={folder}", *flags]


def some(args, full, quick):
    return range(quick if args.quick else full)


# ---- processes -----------------------------------------------------------------------------------

class Process:
    """A forked process in a group of its own: a function, or a program of ours with its flags.

    program: this one is started with the flags instead. before() is called in the new process.
    """

    def __init__(self, work, output="said.txt", before=None, program=None):
        self.work, self.output, self.code = work, Path(output), None
        self.output.write_bytes(b"")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.become(before, program) & 255)
        with contextlib.suppress(OSError):          # the process does the same: whoever is first
            os.setpgid(self.pid, self.pid)

    def become(self, before, program):
        os.setpgid(0, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(self.output, os.O_WRONLY | os.O_APPEND)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(file, number)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        try:
            if before:
                before()
            if program:
                os.execvp(program, [program, *self.work])
            elif callable(self.work):
                self.work()
            else:
                sys.argv = [str(ROOT / self.work[0]), *self.work[1:]]
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            print(stop.code if isinstance(stop.code, str) else "", end="\n" * code)
        except BaseException:
            traceback.print_exc()
            code = 1
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        atexit._run_exitfuncs()                     # as at the end of any program
        return code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.send(signal.SIGKILL)
        self.wait()

    def __str__(self):
        command = "" if callable(self.work) else " ".join(self.work)
        command = command.replace(TINY, "TINY").replace(BOOKS, "BOOKS")
        ended = "did not end" if self.code is None else f"exit code {self.code}"
        *_, last = "nothing", *filter(str.strip, self.text().splitlines())
        return f"{command[:300]} -> {ended}, last line: {last.strip()[:300]}"

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds=60, until=lambda: False):
        """Until it has ended or something is so, at most so long -> its exit code, or None."""
        end = time.monotonic() + seconds
        while self.poll() is None and not until() and time.monotonic() < end:
            time.sleep(0.0005)
        return self.code

    def members(self):
        """Ids of the processes of its group that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rpartition(") ")[2].split()[:3]
                found += [int(path.parent.name)] * (int(group) == self.pid and state != "Z")
        return found

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            if self.members():
                os.killpg(self.pid, number)

    def leaves_nobody(self, seconds=10):
        end = time.monotonic() + seconds
        while self.members() and time.monotonic() < end:
            time.sleep(0.05)
        expect(not self.members(), "processes are left", self)

    def text(self):
        return self.output.read_text(errors="replace")


# ---- what should be so ---------------------------------------------------------------------------

class Wrong(Exception):
    """Something is not as it should be."""


def expect(right, problem, *runs):
    if not right:
        raise Wrong(": ".join(map(str, (problem, *runs))))


def note(problem, kind="wrong"):
    print(f"{kind}: {' '.join(str(problem).split())}")


def refuses(run, about="", seconds=60):
    """It ends with one line of error, which names what it is about."""
    expect(run.wait(seconds) is not None, "it is not over", run)
    lines = [line for line in run.text().splitlines() if line.startswith("error:")]
    expect("Traceback" not in run.text(), "traceback", run)
    expect(run.code > 0 and len(lines) == 1, "no single line of error", run)
    expect(about in lines[0], f"error does not name {about}", run)


def content(path):
    """All that a resumed run depends on, to the bit."""
    saved = load_checkpoint(path)
    return [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in tree_leaves([saved.get(key) for key in STATE])]


def logged(folder):
    """The lines of a log that is all JSON (which has no NaN), but for the header and speeds."""
    lines = Path(folder, "log.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=int) for line in lines][1:]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def is_whole(run, folder="run"):
    """It ended as the uninterrupted run did."""
    expect(run.wait(120) == 0, "does not run to its end", run)
    expect(content(f"{folder}/ckpt.pt") == content("../base/ckpt.pt"), "another result", run)
    expect(logged(folder) == logged("../base"), "another log", run)


def is_tuned(run):
    expect(run.wait(120) == 0, "does not run to its end", run)
    expect(content("run/phonebook.pt") == content("../tuned/phonebook.pt"), "another result", run)
    scores = [json.loads(Path(folder, "phonebook.json").read_text())["results"]
              for folder in ("run", "../tuned")]
    expect(scores[0] == scores[1], "other scores", run)


def goes_on():
    with Process(pretrain("run", *["--resume"] * os.path.exists("run/ckpt.pt")), "on.txt") as run:
        is_whole(run)


# ---- kills and signals ---------------------------------------------------------------------------

def kill(trial, moment, args):
    rng, part = np.random.default_rng([args.seed, 1, trial]), Path("run/ckpt.pt.part")
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")     # it may hit the tokenising, too
    alone, saving = moment == "but not of its workers", moment == "as a checkpoint is written"
    with Process(pretrain("run", f"--workers={int(alone) or trial % 2}")) as run:
        for _ in range(rng.integers(1, 8) if saving else 0):
            run.wait(until=lambda: not part.exists())
            run.wait(until=part.exists)
        run.wait(rng.uniform(0, 0.01 if saving else args.seconds))
        if alone and run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
        elif not alone:
            run.send(signal.SIGKILL)
        run.wait()
        run.leaves_nobody()
    goes_on()


def part_kills(args):
    for k in some(args, 100, 4):
        moment = ("as a checkpoint is written" if k % 3 == 0 else "but not of its workers"
                  if k % 20 == 1 else "at any time")
        yield f"SIGKILL of a run, {moment}", 1, partial(kill, k, moment, args)


def inode(path):
    return os.stat(path).st_ino if os.path.exists(path) else 0


def wait_for_saves(run, path, times):
    for _ in range(times):
        before = inode(path)
        run.wait(until=lambda: inode(path) != before)


def wait_for(moment, run, rng, args):
    if moment == "start-up":
        run.wait(rng.uniform(0.5, 3))
    elif moment == "training":
        run.wait(until=lambda: "step 0:" in run.text())
        run.wait(rng.uniform(0, args.seconds))
    elif moment == "an evaluation":
        wait_for_saves(run, "run/ckpt.pt", rng.integers(1, 6))
        run.wait(rng.uniform(0, 0.05))
    elif moment == "the samples":
        run.wait(until=lambda: "\n--- " in run.text())
    else:
        run.wait(until=lambda: "fine-tuning" in run.text())
        run.wait(rng.uniform(0, args.tuning_seconds / 2))


def stopped_by(number, moment, command, rng, args):
    """-> the process that it ended, without anything left."""
    program = sys.executable if moment == "start-up" else None
    command[0] = str(ROOT / command[0]) if program else command[0]
    with Process(command, program=program) as run:
        wait_for(moment, run, rng, args)
        run.send(number)
        expect(run.wait(15) is not None, f"goes on 15 s after {number.name}", run)
        run.leaves_nobody()
    expect("Traceback" not in run.text(), f"traceback after {number.name}", run)
    return run


def interrupt(trial, number, moment, args):
    rng = np.random.default_rng([args.seed, 2, number, trial])
    run = stopped_by(number, moment, pretrain("run", "--workers=2"), rng, args)
    began, codes = os.path.exists("run/ckpt.pt"), {128 + number}
    if run.text().count("\n--- ") == Path("../base.txt").read_text().count("\n--- "):
        codes |= {0, -number}           # its work was done
    elif not began:
        codes |= {-number}
    expect(run.code in codes, f"exit code after {number.name} is not {128 + number}", run)
    if began:
        step = load_checkpoint("run/ckpt.pt")["step"]
        done = [line["step"] + 1 for line in logged("run") if "train_loss" in line]
        done += [int(n.replace(",", "")) for n in re.findall("stopped after step ([0-9,]+)",
                                                             run.text())]
        expect(step >= max(done, default=0), f"saved is step {step}, done were {done}", run)
    if trial % 3 == 0:
        goes_on()


def interrupt_tuning(trial, number, args):
    rng = np.random.default_rng([args.seed, 3, number, trial])
    run = stopped_by(number, "fine-tuning", finetune("run", "--workers=2"), rng, args)
    expect(run.code == 128 + number, f"exit code after {number.name} is not {128 + number}", run)
    with Process(finetune("run", "--resume"), "on.txt") as run:
        is_tuned(run)


def ignore_hangup():
    with Process(pretrain(), before=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)) as run:
        run.wait(until=lambda: "step 0:" in run.text())
        run.send(signal.SIGHUP)
        is_whole(run)


def lose_worker(trial, args):
    rng = np.random.default_rng([args.seed, 4, trial])
    with Process(pretrain("run", "--workers=2")) as run:
        run.wait(until=lambda: "step 0:" in run.text())
        run.wait(rng.uniform(0, args.seconds / 2))
        run.wait(until=lambda: len(run.members()) > 2)
        expect(len(run.members()) > 2, "has no workers", run)
        os.kill(max(run.members()), signal.SIGKILL)
        is_whole(run)


def part_signals(args):
    moments = "training", "start-up", "an evaluation", "the samples", "training"
    for i, (number, times) in enumerate(zip(SIGNALS, (20, 20, 10))):
        for k in some(args, times, 2 - (i == 2)):
            moment = moments[(2 * i + k) % 5]
            yield f"{number.name} in {moment}", 1, partial(interrupt, k, number, moment, args)
        for k in some(args, 4, int(i == 1)):
            yield f"{number.name} in fine-tuning", 1, partial(interrupt_tuning, k, number, args)
    yield "SIGHUP under nohup", 1, ignore_hangup
    for k in some(args, 10, 1):
        yield "SIGKILL of a worker", 1, partial(lose_worker, k, args)


# ---- damaged checkpoints -------------------------------------------------------------------------

def damaged_bytes(kind, data, other, rng):
    data, (one, two) = bytearray(data), sorted(map(int, rng.integers(len(data), size=2)))
    match kind:
        case "a bit flipped":
            data[one] ^= 1 << int(rng.integers(8))
        case "cut off":
            del data[one:]
        case "a range of zeros":
            data[one:two] = bytes(two - one)
        case "two ranges exchanged":
            n = int(rng.integers(1, max(2, min(two - one, len(data) - two))))
            data[one:one + n], data[two:two + n] = data[two:two + n], data[one:one + n]
        case "the beginning of one, the rest of another":
            data[one:] = other[one:]
    return data


def wrong_part(case):
    """A checkpoint with a part that does not belong there."""
    saved, other = (load_checkpoint(f"../{name}/ckpt.pt") for name in ("half", "other"))
    weights, moments = saved["model"], saved["optimizer"]["state"]
    name, moment = list(weights)[case % len(weights)], moments[case % len(moments)]
    nan, three = torch.full_like(weights[name], math.nan), torch.zeros(3)
    changes = [(saved, key, other[key]) for key in ("model", "optimizer", "scheduler")] + [
        (saved, "step", 10 ** 6), (weights, name, three), (weights, name, nan),
        (weights, name, torch.zeros(1).expand(10 ** 6, 10 ** 6)), (moment, "exp_avg", three),
        (moment, "exp_avg_sq", torch.full_like(moment["exp_avg_sq"], math.nan))]
    where, key, value = changes[case % len(changes)]
    where[key] = value
    return saved


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def bomb(case, data):
    file = io.BytesIO()
    if case % 3 == 0:
        pickle.dump({"model": Bomb()}, file, protocol=case % 6)
    elif case % 3 == 1:
        torch.save({**load_checkpoint("../half/ckpt.pt"), "model": Bomb()}, file)
    else:                               # all as it was, but one file in it
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                inside = pickle.dumps(Bomb(), 2) if name.endswith(".pkl") else old.read(name)
                new.writestr(name, inside)
    return file.getvalue()


def other_file(case, data, path):
    liar, entry = bytearray(data), data.find(b"PK\x01\x02")
    liar[entry + 20:entry + 28] = b"\xf0\xff\xff\xff" * 2       # it says that it holds 4 GB
    contents = [b"", b"\0", b"x" * 1000, b"\x89PNG\r\n\x1a\n" + bytes(99), b'{"model": 1}', b"PK",
                b"PK\5\6" + bytes(18), b"\x1f\x8b\x08" + bytes(50), data + data, data + bytes(9),
                pickle.dumps({"model": {}}), pickle.dumps([1]), liar]
    case %= len(contents) + 4
    if case < len(contents):
        path.write_bytes(contents[case])
    elif case == len(contents):
        path.mkdir()
    elif case == len(contents) + 1:     # a zip bomb
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("archive/data.pkl", bytes(300 << 20))
    else:
        path.symlink_to("nowhere" if case == len(contents) + 2 else os.devnull)
    if path.is_file():                  # the checksum is right
        scan.seal(path)


def damage_file(kind, case, path, args):
    """Write the damaged checkpoint there."""
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    data, other = (Path("..", name, "ckpt.pt").read_bytes() for name in ("half", "other"))
    if kind == "a wrong part":
        torch.save(wrong_part(case), path)
        scan.seal(path)                 # the checksum is right
    elif kind == "another kind of file":
        other_file(case, data, path)
    elif kind == "a pickle that makes a folder":
        path.write_bytes(bomb(case, data))
        scan.seal(path)
    else:
        rng = np.random.default_rng([args.seed, 5, list(DAMAGE).index(kind), case])
        path.write_bytes(damaged_bytes(kind, data, other, rng))


def little_memory():
    """4 GB more than torch's libraries take."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30), taken + (4 << 30)))


def load_all(kind, cases, args):
    """A line for each: its number, and what went wrong, if anything."""
    want = [t.numpy().tobytes() for t in load_checkpoint("../half/ckpt.pt")["model"].values()]
    for case in cases:
        damage_file(kind, case, "damaged.pt", args)
        print(f"case {case}", flush=True)
        try:
            found = LM.load("damaged.pt")[0].state_dict().values()
            if [t.numpy().tobytes() for t in found] != want:
                note(f"{case} LM.load accepts other weights")
        except (ValueError, OSError) as error:
            if "\n" in str(error):
                note(f"{case} LM.load raises more than a line: {error}")
        except BaseException as error:
            note(f"{case} LM.load raises {type(error).__name__}: {error}")


def damage(kind, cases, args):
    """LM.load on all, --resume on every tenth: refused, or nothing is changed."""
    left, problems = list(cases), {}
    while left:                         # again for those after one that it does not survive
        with Process(partial(load_all, kind, left, args), before=little_memory) as run:
            run.wait(120)
        found = re.findall("wrong: ([0-9]+) (.*)", run.text())
        problems |= {int(case): problem for case, problem in found}
        last = int(re.findall("case ([0-9]+)", run.text())[-1])
        if run.code != 0:
            problems[last] = f"LM.load {run}"
        left = [] if run.code == 0 else left[left.index(last) + 1:]
    for case in cases[::10]:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("../half", "run")
        damage_file(kind, case, "run/ckpt.pt", args)
        with Process(pretrain("run", "--resume"), before=little_memory) as run:
            try:
                is_whole(run) if run.wait() == 0 else refuses(run)
            except Wrong as problem:
                problems.setdefault(case, problem)
    if os.path.exists("exploded"):
        problems[cases[0]] = "a pickle was executed"
    for case, problem in problems.items():
        note(f"case {case}: {problem}")


def unreadable():
    if os.getuid() == 0:
        note("root may read all", "skipped")
        return
    shutil.copytree("../half", "run")
    os.chmod("run/ckpt.pt", 0)
    with Process(pretrain("run", "--resume")) as run:
        refuses(run, "ckpt.pt")


DAMAGE = {"a bit flipped": 200, "cut off": 150, "a range of zeros": 150,
          "two ranges exchanged": 100, "the beginning of one, the rest of another": 100,
          "a wrong part": 99, "a pickle that makes a folder": 100, "another kind of file": 100}


def part_damage(args):
    for kind, full in DAMAGE.items():
        full = 9 if args.quick and kind == "a wrong part" else 7 if args.quick else full
        for begin in range(0, full, 50):
            cases = range(begin, min(begin + 50, full))
            yield f"checkpoint: {kind}", len(cases), partial(damage, kind, cases, args)
    yield "checkpoint: not to be read", 1, unreadable


# ---- disks ---------------------------------------------------------------------------------------

def no_room(command, about, limit, start=None, padding=""):
    """For files of more than so many bytes. What was saved before stays, and no part of a file."""
    if start:
        shutil.copytree(Path("..", start), "run")
        header, log = Path("run/log.jsonl").read_text().split("\n", 1)
        Path("run/log.jsonl").write_text(f"{header}\n{padding}{log}")
    small_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    with Process(command, before=small_files) as run:
        refuses(run, about)
    if start and about == "ckpt.pt":
        same = Path("run/ckpt.pt").read_bytes() == Path("..", start, "ckpt.pt").read_bytes()
        expect(same, "the checkpoint before is lost", run)
    if start:
        load_checkpoint("run/ckpt.pt")
    expect(not list(Path("run").glob("*.part")), "part of a file is left", run)


def no_folder(folder):
    Path("file").touch()
    with Process(pretrain(folder)) as run:
        refuses(run, "file")


def removed_folder():
    with Process(pretrain()) as run:
        run.wait(until=lambda: "step 0:" in run.text())
        run.wait(0.2)
        shutil.rmtree("run")
        refuses(run, "run")


def mounted(mount, about):
    """In a mount namespace, where that is permitted; what is there at the end is copied back."""
    may = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    if not shutil.which("unshare") or subprocess.run(may, capture_output=True).returncode:
        note("no permission to mount", "skipped")
        return
    command = " ".join([sys.executable, f"{ROOT}/train.py", *pretrain("run", "--resume")[1:]])
    script = f"mkdir run; {mount}; {command}; code=$?; cp -r run after; exit $code"
    with Process(["-rm", "sh", "-c", script], program="unshare") as run:
        refuses(run, about)
    same = Path("after/ckpt.pt").read_bytes() == Path("../half/ckpt.pt").read_bytes()
    expect(same, "the checkpoint before is lost", run)
    expect(not list(Path("after").glob("*.part")), "part of a file is left", run)


def part_disks(args):
    on, padding = pretrain("run", "--resume"), f'{{"step": -1, "padding": "{"x" * 500_000}"}}\n'
    yield "no room for ckpt.pt", 1, partial(no_room, on, "ckpt.pt", 200_000, "half")
    yield "no room for log.jsonl", 1, partial(no_room, on, "log.jsonl", 510_000, "half", padding)
    yield "no room for the first ckpt.pt", 1, partial(no_room, pretrain(), "ckpt.pt", 50_000)
    yield "no room for phonebook.pt", 1, partial(no_room, finetune(), "phonebook.pt", 50_000)
    yield "a full file system", 1, partial(
        mounted, "mount -t tmpfs -o size=600k none run; cp ../half/* run", "ckpt.pt")
    yield "a read-only file system", 1, partial(
        mounted, "cp ../half/* run; mount --bind run run; mount -o remount,ro,bind run", "run")
    yield "--out_dir is a file", 1, partial(no_folder, "file")
    yield "--out_dir is below a file", 1, partial(no_folder, "file/run")
    for k in some(args, 3, 1):
        yield "the run's folder is removed", 1, removed_folder


# ---- bad input -----------------------------------------------------------------------------------

VALUES = ("nan", "inf", "-inf", "-1", "0", "1e300", "99999999999999999999999", "1e-46", "", "x",
          "1e", "0x10", "٣")
TRAIN, EVAL, MODEL = "train.py", "eval_phonebook.py", "model.py"
DRAW, LOG, MIX = (f"experiments/{name}.py" for name in ("figure1", "figure5", "mix_text"))
# Their numeric flags; other arguments, ~ for a blank. `make_inputs` makes the files.
INPUTS = {
    TRAIN: ("seed workers n_layer d_model d_state memory n_head block_size batch_size max_steps lr "
            "beta2 warmup weight_decay clip eval_rows",
            "--data=nothing --data=empty --data=binary --data=nothing.txt --data=png --data=odd "
            "--data=big --data=bad.jsonl --data=no_text.jsonl --data=short.txt --data= "
            "--tokenizer=nothing --tokenizer=bad.tiktoken --tokenizer= --tokenizer=nothing.txt "
            "--tokenizer=short.txt --tokenizer=empty --device=tpu --device=cuda --device=cuda:99 "
            "--device=mps --device=cpu:x --device= --dtype=int8 --compile=maybe --preset=x "
            "--mixture=x --arch=x --focus=x --out_dir= --out_dir=short.txt/run --lrr=1 --lr extra "
            "--resume --resume=yes --d_model=99999999 --d_state=99999999999 --memory=0.5 "
            "--n_layer=999999999 --eval_rows=999999999 --batch_size=999999999 "
            "--arch=transformer~--n_head=5"),
    EVAL: ("seed workers entries_min entries_max numbers_max test_entries test_numbers test_books "
           "max_steps batch_size block_size lr cooldown beta2",
           "--ckpt=nothing --ckpt=short.txt --ckpt=empty --ckpt= --scratch=x --causal --preset=x "
           "--entries_max=99 --block_size=64 --test_entries=2,, --question=x --device=tpu "
           "--dtype=int8 --out_dir=short.txt --out_dir=short.txt/x --lrr=1 --lr extra --resume "
           "--out_dir=tuned --out_dir=tuned~--resume"),
    MODEL: ("max_new_tokens temperature",
            "--ckpt=nothing --ckpt=short.txt --ckpt=empty --ckpt= --objective=x --promt=x extra "
            "--objective=infilling --objective=infilling~--prompt=" + 99 * "___"),
    DRAW: ("jobs", "--only=x --only= --preset=x --out_dir=short.txt --jbos=1 extra draw "
           "draw~short.txt draw~nothing~x.png draw~empty~x.png"),
    MIX: ("", "0.5~nothing~short.txt 0.5~short.txt~nothing 0.5~empty~empty 0.5~../text.txt~a~b"),
    LOG: (None, "nothing empty binary short.txt~--out=a.png a~b~c --logs=1")}
COMMANDS = {
    TRAIN: pretrain("run", "--max_steps=2"), EVAL: finetune("run", "--max_steps=2"),
    MODEL: [MODEL, "--ckpt=../base/ckpt.pt", "--prompt=def ", "--max_new_tokens=3"],
    DRAW: [DRAW, "--out_dir=run", "--only=gated_ssm-ntp-1"], MIX: [MIX, "mixed"], LOG: [LOG]}
LINES = ("[1]", '{"a":1}', '{"step":null}', '{"step": NaN}', '{"step": 1', "null", "1", "garbage",
         "\0\0\0", "[" * 100_000, '"config"', '[{"arch": 1}]', '{"config": {}, "results": []}')


def make_inputs():
    files = {"nothing.txt": b"", "short.txt": b"abc", "binary": b"\xff\xfe\0" * 999,
             "empty/.x": b"", "png/a.png": b"\x89PNG\r\n", "odd/train.bin": b"abc",
             "odd/val.bin": b"abc", "big/train.bin": b"\xff" * 9999 + b"\1",
             "big/val.bin": b"\xff" * 9999 + b"\1", "bad.jsonl": b'{"text": "x"}\n[1]\n',
             "no_text.jsonl": b'{"text": ""}\n', "bad.tiktoken": b"AA== 0\nAQ== 0\n",
             "tuned/phonebook.pt": Path("../base/ckpt.pt").read_bytes()}
    for name, data in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)


def try_inputs(commands, seconds):
    """commands: [(command, may it succeed, a file of the run's folder and the line in it)]."""
    make_inputs()
    for command, legal, name, line in commands:
        shutil.rmtree("run", ignore_errors=True)
        if name:
            shutil.copytree("../half", "run")
            Path("run", name).parent.mkdir(exist_ok=True)
            Path("run", name).write_text(line + "\n")
        with Process(command, before=little_memory) as run:
            try:
                if not (run.wait(seconds) == 0 and legal):
                    expect(run.code != 0, "accepted", run)
                    refuses(run, seconds=0)
            except Wrong as problem:
                note(problem)


def in_range(flag, value):
    """It may be all right; the last of VALUES is 3 to Python."""
    share, count = (float, 1e-300, 0.99), (int, 1, math.inf)
    others = {"": share, "test_entries": count, "test_numbers": count}
    kind, low, high = {**RANGES, **others}[flag]
    with contextlib.suppress(ValueError):
        return low <= kind(value) <= high
    return False


def bad_commands():
    """-> {row: [(command, may it succeed, file, line)]}."""
    found = {}
    for program, (flags, others) in INPUTS.items():
        for flag, value in itertools.product([] if flags is None else flags.split(" "), VALUES):
            more = [f"--{flag}={value}"] if flag else [value, "../text.txt", "../text.txt"]
            if (program, value) != (DRAW, VALUES[-1]):          # three real runs
                found.setdefault(f"{program}, numbers", []).append(
                    (COMMANDS[program] + more, in_range(flag, value), None, None))
        for more in others.split():
            base = [program] if more.startswith("draw") else COMMANDS[program]
            found.setdefault(f"{program}, other arguments", []).append(
                (base + more.split("~"), False, None, None))
    found["another log.jsonl, phonebook.json, figure1.json"] = [
        (command, legal, name, line) for line in LINES for command, legal, name in (
            (pretrain("run", "--resume"), True, "log.jsonl"),
            ([LOG, "run/log.jsonl"], False, "log.jsonl"),
            (COMMANDS[DRAW], False, "gated_ssm-ntp-1/phonebook.json"),
            ([DRAW, "draw", "run/a.json", "a.png"], False, "a.json"))]
    return found


def part_inputs(args):
    seconds = 10 if args.quick else 60
    for row, commands in bad_commands().items():
        commands = commands[::12] if args.quick else commands
        for begin in range(0, len(commands), 13):
            bundle = commands[begin:begin + 13]
            yield f"bad input: {row}", len(bundle), partial(try_inputs, bundle, seconds)


# ---- two at once ---------------------------------------------------------------------------------

def two(command, trial, check, args, start=None):
    """Exactly one wins, the other says so in one line."""
    rng = np.random.default_rng([args.seed, 6, trial])
    if start:
        shutil.copytree(Path("..", start), "run")
    with Process(command, "first.txt") as first:
        first.wait(rng.uniform(0, 0.2) * (trial % 2))
        with Process(command, "second.txt") as second:
            loser, winner = sorted((first, second), key=lambda run: run.wait(120) == 0)
            expect(loser.code != 0, "both run", loser, winner)
            check(winner)
            refuses(loser)


def four(work, variable, folder):
    """All four succeed, and say the same."""
    os.environ[variable] = os.path.abspath(folder)
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Process(work, f"{k}.txt")) for k in range(4)]
        for run in runs:
            expect(run.wait(120) == 0, "fails beside others", run)
            expect(run.text() == runs[0].text(), "another result beside others", run, runs[0])
    expect(len(os.listdir(f"{folder}/birdie" if work is tokenise else folder)) == 1,
           "not one file is left")


def build():
    launch = scan.LOADERS["cpu"]["cpp"](torch.device("cpu"))
    torch.manual_seed(1)
    found = scan.errors(launch, "cpu", False)
    expect(max(found) < 2e-5, "the kernel is wrong")
    print(found)


def build_together():
    if scan.backend("cpu")[0] == "cpp":
        four(build, "TORCH_EXTENSIONS_DIR", "kernels")
    else:
        note("no compiler", "skipped")


def tokenise():
    paths = Corpus("long.txt", Tokenizer("bytes")).paths.values()
    print([hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths])


def tokenise_together():
    Path("long.txt").write_text(Path("../text.txt").read_text() * 100)
    four(tokenise, "XDG_CACHE_HOME", "cache")


def part_two_at_once(args):
    for k in some(args, 10, 1):
        on = pretrain("run", "--resume")
        yield "two train.py", 1, partial(two, pretrain(), k, is_whole, args)
        yield "two train.py --resume", 1, partial(two, on, k, is_whole, args, "half")
    for k in some(args, 6, 1):
        yield "two eval_phonebook.py", 1, partial(two, finetune(), k, is_tuned, args)
    for k in some(args, 3, 1):
        yield "four build the kernel", 1, build_together
        yield "four tokenise one text", 1, tokenise_together


# ---- soak ----------------------------------------------------------------------------------------

def load_batches(workers, n_rows, chunks, each=8):
    """The batches of a few steps at a time, as between evaluations; the action changes."""
    tok = Tokenizer("bytes", n_masks=8)
    batches = Batches(Corpus("../text.txt", tok), tok, 64, n_rows)
    loader = Loader(batches, 1, workers=workers)
    for chunk in chunks:
        action = np.random.default_rng(chunk).dirichlet(np.ones(len(batches.arms)))
        yield from loader.steps(chunk * each, (chunk + 1) * each, action)


def resident():
    """Bytes in memory, of this process and its workers."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * resource.getpagesize()


def soak(total):
    """Memory after a tenth and after all of the samples."""
    samples, first = 0, None
    for batch in load_batches(2, 32, itertools.count()):
        starts = (batch["reset"] & RESET_FORWARD > 0) & (batch["arm"] >= 0)
        samples += starts.sum().item()
        if samples > total / 10 and first is None:
            first = resident()
        if samples >= total:
            break
    growth = resident() / first - 1
    expect(growth < 0.05, f"memory grew by {growth:.1%} from {first >> 20} MiB")


def show_hash(workers, method):
    multiprocessing.set_start_method(method, force=True)
    digest = hashlib.sha256()
    for batch in load_batches(workers, 4, range(3)):
        for key, value in batch.items():
            digest.update(key.encode() + value.numpy().tobytes())
    print(f"hash {digest.hexdigest()}")


def same_batches(work, program=None):
    elsewhere = {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati",
                 "PYTHONPATH": str(ROOT / "experiments")}
    before = partial(os.environ.update, elsewhere if program else {})
    with (Process(partial(show_hash, 0, "fork"), "first.txt") as first,
          Process(work, before=before, program=program) as run):
        hashes = [re.findall("hash (.*)", each.text()) for each in (first, run)
                  if each.wait(120) == 0]
    expect(len(hashes) == 2 and hashes[0] == hashes[1] != [], "other batches", run, first)


def part_soak(args):
    total = 5_000 if args.quick else 1_000_000
    yield f"memory over {total:,} samples", 1, partial(soak, total)
    ways = [(1, "fork"), (3, "fork"), (1, "spawn"), (1, "forkserver")]
    for workers, method in ways[::3 if args.quick else 1]:
        work = partial(show_hash, workers, method)
        yield f"batches with {workers} workers, {method}", 1, partial(same_batches, work)
    code = "import time, stress; time.time = lambda: 1e9; stress.show_hash(0, 'fork')"
    yield "batches with another hash seed, zone and time", 1, partial(
        same_batches, ["-c", code], sys.executable)


# ---- all of it -----------------------------------------------------------------------------------

PARTS = {"kills": part_kills, "signals": part_signals, "damage": part_damage, "disks": part_disks,
         "inputs": part_inputs, "two_at_once": part_two_at_once, "soak": part_soak}


def prepare(args):
    """What trials compare with: a whole run, the same half way, another, a fine-tuned one."""
    shutil.copy(ROOT / "objectives.py", "text.txt")
    for folder in ("trial", "half"):
        os.mkdir(folder)
    os.chdir("trial")
    begin = time.monotonic()
    with (Process(pretrain("../base"), "../base.txt") as base,
          Process(pretrain("../other", "--mixture=ul2", "--d_model=16", "--max_steps=20"),
                  "../other.txt") as other):
        wait_for_saves(base, "../base/ckpt.pt", 5)
        os.link("../base/ckpt.pt", "../half/ckpt.pt")           # which the run replaces
        base.wait()
        args.seconds = time.monotonic() - begin
        with Process(finetune("../tuned"), "../tuned.txt") as tuned:
            for run in (base, other, tuned):
                if run.wait(120) != 0:
                    raise SystemExit(f"error: without any trouble, {run}")
        args.tuning_seconds = time.monotonic() - begin - args.seconds
    shutil.copy("../base/log.jsonl", "../half")
    os.chdir("..")


def attempt(function, folder):
    """One trial, in its own process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # so that it ends its own
    os.chdir(folder)
    try:
        function()
    except Wrong as problem:
        note(problem)
    except Exception as error:
        note(f"{type(error).__name__}: {error}")


def run_trials(part, trials, args):
    """trials: [(number, (row, how many, function))] -> {row: what came out}."""
    rows = {row: dict(part=part, what=row, tried=0, right=0, skipped=0, wrong=[])
            for _, (row, _, _) in trials}
    waiting, running = trials[::-1], []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                number, (row, n, function) = waiting.pop()
                folder = Path(f"{part}-{number}").absolute()
                folder.mkdir()
                process = Process(partial(attempt, function, folder), f"{folder}.txt")
                running.append((process, number, row, n, folder))
            time.sleep(0.005)
            for process, number, row, n, folder in [each for each in running
                                                    if each[0].poll() is not None]:
                running.remove((process, number, row, n, folder))
                found, text = rows[row], process.text()
                wrong = re.findall("^wrong: (.*)", text, re.M) or (
                    [f"the trial itself: {process}"] if process.code else [])
                skipped = re.findall("^skipped: (.*)", text, re.M)
                found["wrong"] += [f"{part}:{number} {row}: {problem}" for problem in wrong]
                found["tried"] += n
                found["skipped"] += len(skipped)
                found["right"] += max(0, n - len(wrong) - len(skipped))
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for process, *_ in running:
            process.send(signal.SIGTERM)
        for process, *_ in running:
            process.wait(10)
            process.send(signal.SIGKILL)
    return rows


def show(rows, args, out):
    print("\n| part | what | tried | as it should be |\n" + "|---" * 4 + "|")
    for row in rows:
        skipped = f", {row['skipped']} skipped" * (row["skipped"] > 0)
        print("| {part} | {what} | {tried} | {right}".format(**row) + f"{skipped} |")
    wrong = [problem for row in rows for problem in row["wrong"]]
    print("", *wrong, sep="\n")
    if out:
        Path(out).write_text(json.dumps(dict(arguments=vars(args), rows=rows), indent=1))
    if wrong:
        raise SystemExit(f"error: {len(wrong)} times it was not as it should be")


def parse_args(argv):
    """-> settings, with `only` as {part: [numbers of trials, or none for all]}."""
    parser, flag = command_line("python experiments/stress.py [--FLAG=VALUE ...]")
    flag("--only", default=",".join(PARTS), help="parts, with commas; kills:17 is one trial of one")
    flag("--quick", action="store_true", help="a few of each")
    flag("--seed", default=1, help="of moments and damages")
    flag("--jobs", default=len(os.sched_getaffinity(0)), help="trials at a time")
    flag("--out", metavar="FILE.json", help="where the table is written, too")
    args = parser.parse_args(argv)
    named, args.only = args.only.split(","), {}
    for name in named:
        part, _, number = name.partition(":")
        if part not in PARTS or not (number.isdigit() or name == part):
            parser.error(f"--only has {name!r}; choose from {', '.join(PARTS)}")
        args.only.setdefault(part, []).extend([int(number)] if number else [])
    return args


def main(argv):
    args, rows, begin = parse_args(argv), [], time.monotonic()
    out = args.out and os.path.abspath(args.out)
    home = tempfile.tempdir = tempfile.mkdtemp(prefix="stress")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", XDG_CACHE_HOME=f"{home}/cache",
                      TMPDIR=home)
    torch.set_num_threads(1)
    importlib.import_module("torch._inductor")      # 2 s, which train.py takes at its start
    try:
        os.chdir(home)
        scan.backend("cpu")
        prepare(args)
        print(f"prepared in {time.monotonic() - begin:.0f} s", flush=True)
        for part, numbers in args.only.items():
            begin = time.monotonic()
            trials = [trial for trial in enumerate(PARTS[part](args))
                      if not numbers or trial[0] in numbers]
            rows += run_trials(part, trials, args).values()
            print(f"{part}: {time.monotonic() - begin:.0f} s", flush=True)
    except KeyboardInterrupt:
        raise SystemExit("stopped")
    finally:
        os.chdir(ROOT)
        shutil.rmtree(home, ignore_errors=True)
    show(rows, args, out)


if __name__ == "__main__":
    main(sys.argv[1:])
