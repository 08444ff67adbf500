"""What happens to real runs, many times over: does each end as it should?

    python experiments/stress.py                        all of it, at most 20 minutes on 2 cores
    python experiments/stress.py --only=kills           a part, or several: --only=kills --only=soak
    python experiments/stress.py --quick                a few of each, in two minutes

A trial is a function, called in a process and a folder of its own with random numbers of its own
(what a signal hits still depends on the machine); it is right if it raises nothing. It forks the
runs that it tries, as torch is imported there already. At the end stands a markdown table (0 tried:
this machine permits none), then a line for each trial that was not right. Linux, on its CPU.
"""
import atexit
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval_phonebook                   # before torch: train.py sets how threads wait
import numpy as np
import torch
import torch._inductor                  # 2 s, which train.py takes at its start
from torch.utils._pytree import tree_map_only

import scan
from model import LM, RANGES, command_line, load_checkpoint
from objectives import Batches, Corpus, Loader, Tokenizer

# A later flag overrides an earlier one. The folders beside a trial's own are those of `prepare`.
TRAIN = ("train.py --compile=no --dtype=float32 --device=cpu --workers=0 --data=../text.txt "
         "--tokenizer=bytes --block_size=64 --batch_size=2 --n_layer=1 --d_model=32 --d_state=32 "
         "--eval_rows=1 --mixture=uniform --max_steps=120 --out_dir=run").split()
EVAL = ("eval_phonebook.py --compile=no --dtype=float32 --device=cpu --workers=0 "
        "--ckpt=../base/ckpt.pt --entries_min=1 --entries_max=2 --test_entries=1 --test_numbers=1 "
        "--test_books=4 --block_size=512 --batch_size=2 --max_steps=40 --out_dir=run").split()
RESUME = [*TRAIN, "--resume"]
ANEW = [sys.executable, f"{ROOT}/train.py", *TRAIN[1:]]     # as somebody types it
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
TOOK = {}                               # seconds of the runs that others are compared with


# ---- processes -----------------------------------------------------------------------------------

class Run(multiprocessing.context.ForkProcess):
    """A forked process in a group of its own: a function, a program of ours, another command."""

    started = []                        # by this process

    def __init__(self, work):
        super().__init__()
        self.work, self.said = work, Path(f"said-{time.monotonic_ns()}.txt")
        self.said.touch()
        self.start()
        self.started.append(self)
        with contextlib.suppress(OSError):          # the process does the same: whoever is first
            os.setpgid(self.pid, self.pid)

    def run(self):
        os.setpgid(0, 0)
        self.started.clear()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for output in (1, 2):
            os.dup2(os.open(self.said, os.O_WRONLY | os.O_APPEND), output)
        try:
            if callable(self.work):
                self.work()
            elif self.work[0].endswith(".py"):
                sys.argv = [str(ROOT / self.work[0]), *self.work[1:]]
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                os.execvp(self.work[0], self.work)
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            atexit._run_exitfuncs()                 # as at the end of any program

    def text(self):
        return self.said.read_text(errors="replace")

    def last_line(self):
        *_, last = "nothing", *filter(str.strip, self.text().splitlines())
        return last.strip()[:500]

    def __str__(self):
        flags = "" if callable(self.work) else " ".join(self.work)[-100:]
        return f"{flags} -> exit code {self.exitcode}, last line: {self.last_line()}"

    def wait(self, seconds=120, until=lambda: False):
        """Until it has ended or something is so, at most so long -> its exit code, or None."""
        end = time.monotonic() + seconds
        while self.exitcode is None and not until() and time.monotonic() < end:
            time.sleep(0.001)
        return self.exitcode

    def ends(self, *codes, about=""):
        """With one of these codes and no traceback, alone; if it is 1, with one line of error."""
        self.wait()
        quiet = "Traceback" not in self.text()
        assert self.exitcode in codes and quiet, f"not {codes}: {self}"
        if self.exitcode == 1:
            errors = [line for line in self.text().splitlines() if line.startswith("error:")]
            assert len(errors) == 1 and about in errors[0], f"not one error on {about}: {self}"
        end = time.monotonic() + 10
        while self.members() and time.monotonic() < end:
            time.sleep(0.01)
        assert not self.members(), f"processes are left: {self}"

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
            os.killpg(self.pid, number)


def outcome(folder):
    """All that a run leaves, to the bit, but for times -> {name of the file: content}."""
    found = {}
    for path in Path(folder).glob("[!.]*"):
        if path.suffix == ".pt":
            parts = "step", "model", "optimizer", "scheduler", "scaler", "losses", "curve"
            content = tree_map_only(torch.Tensor, lambda tensor: tensor.numpy().tobytes(),
                                    [*map(load_checkpoint(path).get, parts)])
        elif path.name == "log.jsonl":
            lines = map(json.loads, path.read_text().splitlines()[1:])
            content = [{**line, "tokens_per_s": 0} for line in lines]
        else:
            content = json.loads(path.read_text())["results"]
        found[path.name] = content
    return found


def completes(run, like="base"):
    """It leaves what the same run without trouble left."""
    run.ends(0)
    found, wanted = outcome("run"), outcome(f"../{like}")
    differ = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    assert not differ, f"{', '.join(differ)} not as without trouble: {run}"


# ---- kills and signals ---------------------------------------------------------------------------

def wait_for(moment, run):
    """It has printed something so many times; a checkpoint is being written; some time passes."""
    text, times, seconds = {
        "in start-up": ("", [1], 3),
        "at any time": ("", [1], TOOK["base"]),
        "as a checkpoint is written": ("mean loss", range(8), 0.01),
        "in an evaluation": ("mean loss", range(8), 0.05),      # which follows
        "in the samples": ("\n--- ", [1], 0),
        "in fine-tuning": ("fine-tuning", [1], TOOK["tuned"] / 2),
    }.get(moment, ("step 0:", [1], TOOK["base"] / 2))
    n = random.choice(times)
    run.wait(until=lambda: run.text().count(text) >= n)
    if len(times) > 1:
        run.wait(until=Path("run/ckpt.pt.part").exists)
    run.wait(0.5 * (moment == "in start-up") + random.uniform(0, seconds))


def interrupt(number, moment):
    """It ends at once, and goes on to what it would have been."""
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")     # it may hit the tokenising, too
    program, like = (EVAL, "tuned") if moment == "in fine-tuning" else (TRAIN, "base")
    command = {"in start-up": ANEW, "under nohup": ["nohup", *ANEW]}.get(moment, program)
    n_workers = 2 if "worker" in moment else random.randrange(3)
    run = Run([*command, f"--workers={n_workers}"])
    wait_for(moment, run)
    is_done = "\n--- " in run.text()
    if moment == "to a worker":
        run.wait(until=lambda: len(run.members()) > 2)
        os.kill(max(run.members()), number)
    elif moment == "but not to its workers":
        run.kill()
    else:
        run.send(number)

    codes = {-number} if number == signal.SIGKILL else {128 + number}
    if moment in ("to a worker", "under nohup"):
        codes = {0}                     # it goes on
    elif is_done or moment == "in start-up":
        codes |= {-number, 0}
    run.ends(*codes)
    resume = ["--resume"] * any(Path("run").glob("*.pt"))
    completes(Run([*program, *resume]), like)


def kills():
    for moment, full, few in (("as a checkpoint is written", 34, 2), ("at any time", 63, 2),
                              ("but not to its workers", 3, 1), ("to a worker", 10, 1)):
        yield f"SIGKILL {moment}", full, few, partial(interrupt, signal.SIGKILL, moment)


def signals():
    for number, times in zip(SIGNALS, (4, 4, 2)):
        for moment, full in (("in training", 2 * times), ("in start-up", times),
                             ("in an evaluation", times), ("in the samples", times),
                             ("in fine-tuning", 4)):
            few = int(number == signal.SIGTERM or moment == "in training")
            yield f"{number.name} {moment}", full, few, partial(interrupt, number, moment)
    yield "SIGHUP under nohup", 1, 1, partial(interrupt, signal.SIGHUP, "under nohup")


# ---- damaged checkpoints -------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def damage_file(kind, path):
    data, other = (Path("..", name, "ckpt.pt").read_bytes() for name in ("half", "other"))
    one, two = sorted(random.sample(range(len(data)), 2))
    match kind:
        case "a bit flipped":
            data = data[:one] + bytes([data[one] ^ 1 << random.randrange(8)]) + data[one + 1:]
        case "cut off":
            data = data[:one]
        case "a range of zeros":
            data = data[:one] + bytes(two - one) + data[two:]
        case "two ranges exchanged":
            data = data[:one] + data[two:] + data[one:two]
        case "the beginning of one, the rest of another":
            data = data[:one] + other[one:]
        case "a wrong part":
            saved, other = (load_checkpoint(f"../{name}/ckpt.pt") for name in ("half", "other"))
            part = random.choice(("step", "model", "optimizer", "scheduler"))
            torch.save({**saved, part: other[part]}, path)
            data = path.read_bytes()
        case "a pickle that makes a folder":
            torch.save({"model": Bomb()}, path)
            protocol = random.randrange(6)
            data = random.choice((path.read_bytes(), pickle.dumps({"model": Bomb()}, protocol)))
        case "another kind of file":
            entry = data.find(b"PK\x01\x02")
            liar = data[:entry + 20] + b"\xf0\xff\xff\xff" * 2 + data[entry + 28:]  # of 4 GB
            data = random.choice((
                b"", b"\0", b"x" * 1000, b"\x89PNG\r\n\x1a\n" + bytes(99), b'{"model": 1}', b"PK",
                b"PK\5\6" + bytes(18), b"\x1f\x8b\x08" + bytes(50), data + data, data + bytes(9),
                liar, pickle.dumps({"model": {}}), pickle.dumps([1])))
    path.write_bytes(data)
    if kind in ("another kind of file", "a pickle that makes a folder"):
        scan.seal(path)                 # past the checksum
    elif kind == "not to be read":      # but by root, for whom nothing changes
        path.chmod(0)
    elif kind == "no file":
        path.unlink()
        random.choice((path.mkdir, partial(path.symlink_to, "nowhere"),
                       partial(path.symlink_to, os.devnull)))()


def damage(kind):
    """LM.load and, for a tenth, --resume refuse it in one line, or nothing has changed."""
    shutil.copytree("../half", "run")
    damage_file(kind, Path("run/ckpt.pt"))
    try:
        found = LM.load("run/ckpt.pt")[0].state_dict()
        wanted = load_checkpoint("../half/ckpt.pt")["model"]
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), "other weights"
    except (ValueError, OSError) as error:
        assert "\n" not in str(error), f"not in one line: {error!r}"
    if random.randrange(10) == 0:
        run = Run(RESUME)
        run.ends(0, 1)
        if run.exitcode == 0:
            completes(run)
    assert not os.path.exists("exploded"), "a pickle was executed"


def damages():
    for kind, full in (("a bit flipped", 200), ("cut off", 150), ("a range of zeros", 150),
                       ("two ranges exchanged", 100), ("a wrong part", 99),
                       ("the beginning of one, the rest of another", 100), ("not to be read", 1),
                       ("a pickle that makes a folder", 100), ("another kind of file", 75),
                       ("no file", 25)):
        yield f"checkpoint: {kind}", full, min(full, 7), partial(damage, kind)


# ---- disks ---------------------------------------------------------------------------------------

def no_room(command, about, limit):
    """It is refused; what was saved before stays, and no part of a file. limit: of bytes a file."""
    resumes = "--resume" in " ".join(command)
    if resumes:
        shutil.copytree("../half", "run")
    if about == "log.jsonl":            # a long one
        Path("run/log.jsonl").write_text(json.dumps(dict(step=-1, text="x" * 500_000)) + "\n")
    Path("file").touch()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    Run(command).ends(1, about=about)
    if resumes:
        before, after = (load_checkpoint(f"{name}/ckpt.pt") for name in ("../half", "run"))
        assert after["step"] >= before["step"], "the checkpoint before is lost"
    assert not any(Path("run").glob("*.part")), "part of a file is left"


def mounted(mount):
    """-> the command with its folder on a disk that is mounted for it, and copied back."""
    command = " ".join([*ANEW, "--resume", "--out_dir=disk"])
    return ["unshare", "-rm", "sh", "-c", f"mkdir disk; {mount}; {command}; code=$?; "
                                          f"rm -r run; cp -r disk run; exit $code"]


def remove_folder():
    run = Run(TRAIN)
    run.wait(until=lambda: "step 0:" in run.text())
    shutil.rmtree("run")
    run.ends(1, about="run")


def disks():
    may_mount = os.system("unshare -rm mount -t tmpfs none /mnt 2>/dev/null") == 0
    full = mounted("mount -t tmpfs -o size=600k none disk; cp run/* disk")
    read_only = mounted("cp run/* disk; mount --bind disk disk; mount -o remount,ro,bind disk")
    for what, command, about, limit in (
            ("no room for ckpt.pt", RESUME, "ckpt.pt", 200_000),
            ("no room for log.jsonl", RESUME, "log.jsonl", 501_000),
            ("no room for the first ckpt.pt", TRAIN, "ckpt.pt", 50_000),
            ("no room for phonebook.pt", EVAL, "phonebook.pt", 50_000),
            ("a full file system", full, "ckpt.pt", 10 ** 9),
            ("a read-only file system", read_only, "disk", 10 ** 9),
            ("--out_dir is a file", [*TRAIN, "--out_dir=file"], "file", 10 ** 9),
            ("--out_dir is below a file", [*TRAIN, "--out_dir=file/run"], "file", 10 ** 9)):
        times = int(may_mount or command not in (full, read_only))
        yield what, times, times, partial(no_room, command, about, limit)
    yield "the run's folder is removed", 3, 1, remove_folder


# ---- bad input -----------------------------------------------------------------------------------

VALUES = ("nan", "inf", "-inf", "-1", "0", "1e300", "99999999999999999999999", "1e-46", "", "x",
          "1e", "0x10", "٣")                                # the last is 3 to Python
LINES = ("[1]", '{"a":1}', '{"step":null}', '{"step": NaN}', '{"step": 1', "null", "1", "garbage",
         "\0\0\0", "[" * 100_000, '"config"', '[{"arch": 1}]', '{"config": {}, "results": []}')
FILES = {"nothing.txt": b"", "short.txt": b"abc", "binary": b"\xff\xfe\0" * 999, "empty/.x": b"",
         "png/a.png": b"\x89PNG\r\n", "odd/train.bin": b"abc", "odd/val.bin": b"abc",
         "big/train.bin": b"\xff" * 9999 + b"\1", "big/val.bin": b"\xff" * 9999 + b"\1",
         "bad.jsonl": b'{"text": "x"}\n[1]\n', "no_text.jsonl": b'{"text": ""}\n',
         "bad.tiktoken": b"AA== 0\nAQ== 0\n"}
DRAW, CURVES = "experiments/figure1.py", "experiments/figure5.py"
INPUTS = (                              # command, its numeric flags, other arguments, ~ for a blank
    ([*TRAIN, "--max_steps=2"],
     "seed workers n_layer d_model d_state memory n_head block_size batch_size max_steps lr beta2 "
     "warmup weight_decay clip eval_rows",
     "--data=nothing --data=empty --data=binary --data=nothing.txt --data=png --data=odd "
     "--data=big --data=bad.jsonl --data=no_text.jsonl --data=short.txt --data= "
     "--tokenizer=nothing --tokenizer=bad.tiktoken --tokenizer= --tokenizer=nothing.txt "
     "--tokenizer=short.txt --tokenizer=empty --device=tpu --device=cuda --device=cuda:99 "
     "--device=mps --device=cpu:x --device= --dtype=int8 --compile=maybe --preset=x --mixture=x "
     "--arch=x --data=, --out_dir= --out_dir=short.txt/run --lrr=1 --lr extra --resume "
     "--resume=yes --d_model=99999999 --d_state=99999999999 --memory=0.5 --n_layer=999999999 "
     "--eval_rows=999999999 --batch_size=999999999 --arch=transformer~--n_head=5"),
    ([*EVAL, "--max_steps=2"],
     "seed workers entries_min entries_max numbers_max test_entries test_numbers test_books "
     "max_steps batch_size block_size lr cooldown beta2",
     "--ckpt=nothing --ckpt=short.txt --ckpt=empty --ckpt= --scratch=x --causal --preset=x "
     "--entries_max=99 --block_size=64 --test_entries=2,, --device=tpu --dtype=int8 --lrr=1 --lr "
     "extra --resume --out_dir=short.txt --out_dir=short.txt/x --out_dir=tuned~--resume"),
    (["model.py", "--ckpt=../base/ckpt.pt", "--prompt=def ", "--max_new_tokens=3"],
     "max_new_tokens temperature",
     "--ckpt=nothing --ckpt=short.txt --ckpt=empty --ckpt= --objective=x --promt=x extra "
     "--objective=infilling --objective=infilling~--prompt=" + 99 * "___"),
    ([DRAW, "--out_dir=run"], "jobs", "--only=x --preset=x --jbos=1 extra"),
    ([DRAW, "draw"], "", "short.txt short.txt~x.png nothing~x.png empty~x.png"),
    ([CURVES], "", "nothing empty binary short.txt~--out=a.png a~b~c --logs=1"))


def try_input(command, may_succeed, name=None, line=None):
    """name: of a file in the run's folder that holds this line instead."""
    for file, data in {**FILES, "tuned/phonebook.pt": Path("../base/ckpt.pt").read_bytes()}.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(data)
    if name:
        for folder in ("../half", "../tuned"):
            shutil.copytree(folder, "run", dirs_exist_ok=True)
        Path("run", name).write_text(line + "\n")
    Run(command).ends(1, *[0] * may_succeed)


def in_range(flag, value):
    kind, low, high = RANGES.get(flag, (int, 1, float("inf")))
    with contextlib.suppress(ValueError):
        return low <= kind(value) <= high
    return False


def inputs():
    trials = []                         # (row, what try_input is called with)
    for command, flags, others in INPUTS:
        for flag, value in itertools.product(flags.split(), VALUES):
            legal = in_range(flag, value)
            if not (legal and command[0] == DRAW):              # which would take hours
                trials.append((f"{command[0]}, numbers", [*command, f"--{flag}={value}"], legal))
        trials += [(f"{command[0]}, other arguments", [*command, *more.split("~")], False)
                   for more in others.split()]
    for name, command, legal in (("log.jsonl", RESUME, True),
                                 ("log.jsonl", [CURVES, "run/log.jsonl"], False),
                                 ("phonebook.json", [*EVAL, "--resume"], True),
                                 ("a.json", [DRAW, "draw", "run/a.json", "a.png"], False)):
        trials += [(f"another {name}", command, legal, name, line) for line in LINES]
    for k, (row, *arguments) in enumerate(trials):
        yield f"bad input: {row}", 1, int(k % 12 == 0), partial(try_input, *arguments)


# ---- two at once, soak ---------------------------------------------------------------------------

def two(command, like):
    """Exactly one completes; the other says in one line why it does not."""
    if "--resume" in command:
        shutil.copytree("../half", "run")
    first = Run(command)
    first.wait(random.choice((0, random.uniform(0, 0.2))))
    loser, winner = sorted((first, Run(command)), key=lambda run: run.wait() == 0)
    loser.ends(1)
    completes(winner, like)


def say_the_same(*works):
    """Side by side, each with empty caches."""
    os.environ.update(TORCH_EXTENSIONS_DIR=os.path.abspath("kernels"),
                      XDG_CACHE_HOME=os.path.abspath("cache"))
    runs = [Run(work) for work in works]
    for run in runs:
        run.ends(0)
        assert run.last_line() == runs[0].last_line(), f"{run}, but {runs[0]}"


def build():
    walk = scan.LOADERS["cpu"]["cpp"](torch.device("cpu"))
    torch.manual_seed(1)
    print(scan.errors(walk, "cpu", False))


def tokenise():
    paths = Corpus("../long.txt", Tokenizer("bytes")).paths.values()
    print([hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths])


def two_at_once():
    can_build = scan.backend("cpu")[0] == "cpp"
    yield "two train.py", 10, 1, partial(two, TRAIN, "base")
    yield "two train.py --resume", 10, 1, partial(two, RESUME, "base")
    yield "two eval_phonebook.py", 6, 1, partial(two, EVAL, "tuned")
    yield "four build the kernel", 3 * can_build, can_build, partial(say_the_same, *4 * [build])
    yield "four tokenise one text", 3, 1, partial(say_the_same, *4 * [tokenise])


def make_batches(workers=0, method="fork", n_steps=24):
    """It prints their hash; memory stays what it was after a tenth. 59 samples a step."""
    multiprocessing.set_start_method(method, force=True)
    tok = Tokenizer("bytes", n_masks=8)
    batches = Batches(Corpus("../text.txt", tok), tok, 64, 32)
    loader, digest, memory = Loader(batches, 1, workers=workers), hashlib.sha256(), []
    for begin in range(0, n_steps, 8):          # as between evaluations: the action changes
        action = np.random.default_rng(begin).dirichlet(np.ones(len(batches.arms)))
        for batch in loader.steps(begin, begin + 8, action):
            for key, value in batch.items():
                digest.update(key.encode() + value.numpy().tobytes())
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        memory.append(sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids))
    assert memory[-1] < 1.05 * memory[len(memory) // 10], f"memory grew: {memory[::100]} pages"
    print(digest.hexdigest())


def soak():
    yield "memory over 1,000,000 samples", 1, 0, partial(make_batches, 2, "fork", 17_000)
    code = "import time, stress; time.time = lambda: 1e9; stress.make_batches()"
    elsewhere = ["env", "PYTHONHASHSEED=7", "TZ=Pacific/Kiritimati",
                 f"PYTHONPATH={ROOT}/experiments", sys.executable, "-c", code]
    for what, few, work in (("1 worker, fork", 1, partial(make_batches, 1)),
                            ("3 workers, fork", 0, partial(make_batches, 3)),
                            ("1 worker, spawn", 0, partial(make_batches, 1, "spawn")),
                            ("1 worker, forkserver", 1, partial(make_batches, 1, "forkserver")),
                            ("another hash seed, zone and time", 1, elsewhere)):
        yield f"batches with {what}", 1, few, partial(say_the_same, make_batches, work)


# ---- all of it -----------------------------------------------------------------------------------

# Each yields (row of the table, how many trials, how many of --quick, function).
PARTS = {"kills": kills, "signals": signals, "damage": damages, "disks": disks, "inputs": inputs,
         "two_at_once": two_at_once, "soak": soak}


def prepare():
    """What trials are compared with: a whole run, a stopped one, another one, a fine-tuned one."""
    text = (ROOT / "objectives.py").read_text()
    Path("text.txt").write_text(text)
    Path("long.txt").write_text(text * 100)
    os.mkdir("prepared")
    os.chdir("prepared")
    for name, command, code in (
            ("base", TRAIN, 0), ("half", TRAIN, 128 + signal.SIGTERM), ("tuned", EVAL, 0),
            ("other", [*TRAIN, "--mixture=ul2", "--d_model=16", "--max_steps=20"], 0)):
        begin, run = time.monotonic(), Run([*command, f"--out_dir=../{name}"])
        if name == "half":
            run.wait(until=lambda: run.text().count("mean loss") > 4)
            run.send(signal.SIGTERM)
        run.ends(code)
        TOOK[name] = time.monotonic() - begin
    os.chdir("..")
    Run.started.clear()


def attempt(function, folder, seed):
    """A trial, which leaves no process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.chdir(folder)
    random.seed(f"{seed} {folder}")
    try:
        function()
    finally:
        for run in Run.started:
            run.send(signal.SIGKILL)


def run_trials(args):
    """-> {row of the table: [tried, right]}, a line for each trial that was not right."""
    rows, wrong, waiting = {}, [], []
    for part in args.only or PARTS:
        for what, full, few, function in PARTS[part]():
            rows.setdefault(f"{part} | {what}", [0, 0])
            waiting += [(f"{part} | {what}", function)] * (few if args.quick else full)
    while waiting or Run.started:
        if waiting and len(Run.started) < args.jobs:
            folder = f"trial-{len(waiting)}"
            os.mkdir(folder)
            row, function = waiting.pop(0)
            trial = Run(partial(attempt, function, folder, args.seed))
            trial.row, trial.folder = row, folder
        time.sleep(0.005)
        for trial in [trial for trial in Run.started if trial.exitcode is not None]:
            Run.started.remove(trial)
            rows[trial.row][0] += 1
            rows[trial.row][1] += trial.exitcode == 0
            wrong += [f"{trial.row}{trial}"] * (trial.exitcode != 0)
            shutil.rmtree(trial.folder, ignore_errors=True)
    return rows, wrong


def main(argv):
    parser, flag = command_line("python experiments/stress.py [--FLAG=VALUE ...]")
    flag("--only", action="append", choices=PARTS, help="a part; may be given several times")
    flag("--quick", action="store_true", help="a few of each")
    flag("--seed", default=1, help="of moments and damages")
    flag("--jobs", default=len(os.sched_getaffinity(0)), help="trials at a time")
    args = parser.parse_args(argv)

    home = tempfile.tempdir = tempfile.mkdtemp(prefix="stress")
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", XDG_CACHE_HOME=f"{home}/cache",
                      TMPDIR=home)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("stopped"))
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30), taken + (4 << 30)))
    try:
        os.chdir(home)
        scan.backend("cpu")
        prepare()
        rows, wrong = run_trials(args)
    finally:
        for run in Run.started:
            run.terminate()
            run.join(10)
        os.chdir(ROOT)
        shutil.rmtree(home, ignore_errors=True)

    print("| part | what | tried | as it should be |\n" + "|---" * 4 + "|")
    for row, (tried, right) in rows.items():
        print(f"| {row} | {tried} | {right} |")
    if wrong:
        print("", *wrong, sep="\n")
        raise SystemExit(f"error: {len(wrong)} times it was not as it should be")


if __name__ == "__main__":
    main(sys.argv[1:])
