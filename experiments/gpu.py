"""One command for a machine with a GPU: is all of this right there, how fast, how much fits?

    python experiments/gpu.py                           at most 9 minutes, into gpu.json
    python experiments/gpu.py --only=kernel,scan        of the parts below, in their order
    python experiments/gpu.py --device=cpu --quick      tiny sizes: does it run?

Each part is on its own: what goes wrong in one is written down as its error, and the others go on.
gpu.json is written anew after each, so a crash loses one part. Time that a part leaves unused goes
to those after it; what would begin when its part's time is over is skipped, and the table says so.
"""
import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import bench                                # first: it finds train.py, which sets how threads wait
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import CUDA_HOME

import scan as S
import train
from model import LM, MIXERS, RESET_FORWARD, RESET_REVERSE, ModelConfig
from objectives import Tokenizer

GIB = 2 ** 30
LARGEST_ERROR = 2e-5    # of float32 against float64; on the CPU it is 1e-6
TINY = ("--n_layer=1 --d_model=32 --d_state=64 --n_head=4 --block_size=128 --batch_size=4").split()


def telling_line(text):
    """The line of an error, or of a program's output, that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if "error:" in line), lines[0])


def describe(error):
    return f"{type(error).__name__}: {telling_line(getattr(error, 'stderr', None) or str(error))}"


def settings(args, preset, arch="gated_ssm"):
    """train.py's, settled for the device."""
    compiled = "auto" if args.on_gpu else "no"
    sizes, _ = train.parse_args([f"--preset={preset}", f"--arch={arch}", f"--device={args.device}",
                                 f"--compile={compiled}", *TINY * args.quick])
    with contextlib.redirect_stdout(None):
        train.settle(sizes)
    return sizes


def make_model(sizes):
    tok = Tokenizer(sizes.tokenizer, n_masks=sizes.block_size // 8)
    return LM(train.model_config(sizes, tok))


# ---- kernel: every backend against the loop ------------------------------------------------------

def backends(device):
    """(name, launch, "") of each way to scan there; with why, if one does not load."""
    for name, loader in S.LOADERS.get(device.type, {}).items():
        try:
            launch, why = loader(device), ""
        except Exception as error:
            launch, why = None, describe(error)
        yield name, launch, why
    yield "torch", None, ""


def laid_out(values, layout, device):
    """The same values on the device. Around a slice is NaN, which must not get into any result."""
    B, T, D = values.shape
    if layout == "whole":
        return values.to(device)
    if layout == "slice":
        view = torch.full((B, T + 3, D + 5), torch.nan, device=device)[:, 2:T + 2, 3:D + 3]
    else:                                   # neighbouring channels lie apart
        view = torch.empty(B, D, T, device=device).mT
    return view.copy_(values)


def worst_errors(shape, layout, reverse, runs, device):
    """{run: largest errors of h, da, dx, each over its largest value}, on random numbers.

    runs: {any name: (launch, steps a lane walks; None: as many as the scan would choose)}.
    """
    a, x, g = torch.rand(shape), torch.randn(shape), torch.randn(shape)
    a = a * (torch.rand(*shape[:2], 1) > 0.1) * (torch.rand(shape) > 0.05)      # resets; zeros
    exact = [t.double().requires_grad_() for t in (a, x)]
    h = S.scan_loop(*exact, reverse)
    want = h.detach(), *torch.autograd.grad(h, exact, g.double())
    a, x, g = (laid_out(t, layout, device) for t in (a, x, g))
    errors = {}
    for run, (launch, chunk) in runs.items():
        h, da, dx = got = [torch.full(shape, torch.nan, device=device) for _ in range(3)]
        divide = S.divide if chunk is None else lambda _: (chunk, 1)    # 1: as a GPU's thread does
        with mock.patch.object(S, "divide", divide):
            S.write_states(launch, a, x, h, reverse)
            S.write_gradients(launch, a, h, g, da, dx, reverse)
        errors[run] = [((u.cpu() - v).abs().max() / v.abs().max().clamp(min=1e-30)).item()
                       for u, v in zip(got, want)]
    return errors


def part_kernel(args, found, end):
    """(B, T, D): odd and even, lanes enough and too few, which are cut into chunks in time."""
    shapes = [(1, 1, 1), (2, 2, 3), (3, 17, 32), (2, 255, 33), (1, 300, 7), (2, 513, 64)]
    if not args.quick:
        shapes += [(3, 1000, 130), (8, 300, 1301), (4, 2048, 512), (1, 20001, 7), (16, 256, 640)]
    runs, wrong = {}, []
    for name, launch, why in backends(args.torch_device):
        if why:
            found[name] = why
            continue
        runs[name] = launch, None
        if launch is not None:
            runs[f"{name}, chunks of 16"] = launch, 16
    torch.manual_seed(0)
    for shape, layout, reverse in itertools.product(
            shapes, ("whole", "slice", "channels apart"), (False, True)):
        if time.perf_counter() > end:
            found["cases from " + str(shape)] = "skipped: the time was over"
            break
        for run, errors in worst_errors(shape, layout, reverse, runs, args.torch_device).items():
            entry = found.setdefault(run, {"cases": 0, "h": 0.0, "da": 0.0, "dx": 0.0})
            entry["cases"] += 1
            for which, error in zip(("h", "da", "dx"), errors):
                entry[which] = max(error, entry[which])
                if not error < LARGEST_ERROR:                   # NaN too
                    wrong.append(f"{run}, {shape}, {layout}, reverse={reverse}: {which} is off by "
                                 f"{error:.0e}")
    if wrong:
        raise ValueError(f"{wrong[0]} ({len(wrong)} such)")


def part_sanitizer(args, found, end):
    """The quick part `kernel` again, under each of compute-sanitizer's tools."""
    path = os.pathsep.join([os.environ["PATH"], f"{CUDA_HOME}/bin"])
    program = shutil.which("compute-sanitizer", path=path)
    if program is None or not args.on_gpu:
        found["compute-sanitizer"] = "not installed" if args.on_gpu else "needs a GPU"
        return
    tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "initcheck": [],
             "synccheck": []}
    for left, (tool, flags) in zip(range(len(tools), 0, -1), tools.items()):
        if tool != "initcheck":             # which must see who wrote what our kernel reads
            flags = [*flags, "--kernel-regex", "kns=birdie"]
        seconds = max(1, (end - time.perf_counter()) / left)
        with tempfile.TemporaryDirectory() as folder:
            command = ["timeout", "--kill-after=5", f"{seconds:.0f}", program, "--tool", tool,
                       "--target-processes", "application-only", *flags, sys.executable, __file__,
                       f"--device={args.device}", "--quick", "--only=kernel",
                       f"--out={folder}/gpu.json"]
            done = subprocess.run(command, capture_output=True, text=True,
                                  env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        summary = re.findall(r"SUMMARY: (\d+) ", done.stdout + done.stderr)
        said = [line for line in done.stdout.splitlines() if line.startswith("========= ")]
        found[tool] = {"errors": int(summary[-1])} if summary else f"no result in {seconds:.0f} s"
        if summary and int(summary[-1]):
            found[tool]["first"] = said[min(1, len(said) - 1)]
    if any(isinstance(each, dict) and each["errors"] for each in found.values()):
        raise ValueError("compute-sanitizer found errors in the kernel")


# ---- scan: as a share of the speed of copying ----------------------------------------------------

def peers(args, found):
    """{name: scan} of other packages; found says which are missing."""
    found |= {"accelerated-scan": "not installed", "fla hgrn": "not installed"}
    peers = {}
    try:
        peers.update(bench.peers(torch.device(args.device).type))
    except Exception as error:              # installed, but not for this torch or GPU
        found["import"] = describe(error)
    for name in peers:
        found.pop(name, None)
    return peers


def part_scan(args, found, end):
    """A share of 1: as fast as copy_ moves so many bytes, 3 tensors forward and 5 backward."""
    device, calls = args.torch_device, 10 if args.on_gpu else 1     # a GPU's are queued: no waiting
    best, _, launch = S.choose(device)
    functions = {"scan(a, x)": S.scan, **peers(args, found)}    # with autograd and new tensors
    shapes = [(8, 2048, 2560), (16, 2048, 1536), (1, 131072, 512), (32, 2048, 512)]
    for shape in [(2, 64, 32), (1, 300, 8)] if args.quick else shapes:
        if time.perf_counter() > end:
            found[str(shape)] = "skipped: the time was over"
            continue
        a, x, g, h, da, dx = (torch.rand(shape, device=device) for _ in range(6))
        leaves = [t.clone().requires_grad_() for t in (a, x)]
        runs = {("copy_", 0): lambda: dx.copy_(x)}
        for name, kernel in {best: launch, "torch": None}.items():
            runs[name, 0] = partial(S.write_states, kernel, a, x, h, False)
            runs[name, 1] = partial(S.write_gradients, kernel, a, h, g, da, dx, False)
        for name, function in functions.items():
            both = partial(lambda f: torch.autograd.grad(f(*leaves), leaves, g), function)
            try:
                both()
            except Exception as error:      # a length or type that it does not take
                found[f"{name} {shape}"] = describe(error)
                continue
            runs[name, 0], runs[name, 1] = partial(function, a, x), both
        seconds = bench.medians({run: lambda f=function: [f() for _ in range(calls)]
                                 for run, function in runs.items()}, 1 if args.quick else 5,
                                args.device)
        copy = seconds["copy_", 0]
        found[f"copy_ {shape}"] = {"GB_per_s": 2 * 4 * x.numel() * calls / copy / 1e9}
        for name in dict.fromkeys(name for name, _ in list(runs)[1:]):
            forward, both = seconds[name, 0], seconds[name, 1]
            both += 0 if name in functions else forward
            found[f"{name} {shape}"] = {
                "forward_ms": 1000 * forward / calls, "both_ms": 1000 * both / calls,
                "forward_share": copy * 3 / 2 / forward, "both_share": copy * 8 / 2 / both}


# ---- step: training ------------------------------------------------------------------------------

def nanogpt(folder, sizes):
    """bench.NanoGPT as large as our Transformer of the same preset."""
    model = bench.NanoGPT(folder, sizes.block_size)
    module, config = sys.modules["nanogpt_model"], model.gpt.config
    config.n_layer, config.n_head, config.n_embd = sizes.n_layer, sizes.n_head, sizes.d_model
    model.gpt = module.GPT(config)
    model.blocks = model.gpt.transformer.h
    return model


def step_speed(model, sizes, args, matmul):
    """Of steps on random tokens, half of each row a prefix."""
    torch._dynamo.reset()                   # or a later model would be one recompilation too many
    gc.collect()
    tokens = torch.randint(256, (sizes.batch_size, sizes.block_size))
    reset = torch.zeros_like(tokens, dtype=torch.uint8)
    reset[:, 0] = RESET_FORWARD
    reset[:, sizes.block_size // 2:] |= RESET_REVERSE
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    learner = train.Learner(model, optimizer, sizes, clip=1.0)
    step = partial(learner.step, dict(tokens=tokens, reset=reset, targets=tokens), 1e-4)
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    if args.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds = bench.medians({"step": step}, 1 if args.quick else 8, args.device)["step"]
    tables = {"embed.weight", "gpt.transformer.wpe.weight"}     # nanoGPT's wte is its head as well
    n = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    speed = tokens.numel() / seconds
    peak = torch.cuda.max_memory_allocated(args.device) / GIB if args.on_gpu else None
    return {"tokens_per_s": round(speed), "peak_GiB": peak, "rows": learner.rows,
            "utilisation": 6 * n * speed / matmul, "parameters": n, "first_step_s": first,
            "dtype": sizes.dtype, "compile": sizes.compile}


def part_step(args, found, end):
    """Utilisation: 6 FLOP a parameter (but the embedding) and token, over those of a product."""
    n = 8192 if args.on_gpu and not args.quick else 256
    x = torch.randn(n, n, device=args.device, dtype=torch.bfloat16)
    matmul = 2 * n ** 3 / bench.medians({"": lambda: x @ x}, 20, args.device)[""]
    found["bfloat16 product"] = {"size": n, "TFLOP_per_s": matmul / 1e12}
    runs = {}
    for preset in ("gpu", "110m"):
        for arch in MIXERS:
            runs[preset, arch] = lambda sizes: make_model(sizes), None
        if args.nanogpt:
            runs[preset, "nanoGPT"] = partial(nanogpt, args.nanogpt), None
        for name, launch, why in backends(args.torch_device) if preset == "gpu" else ():
            if not why:                     # those that do not load stand in part `kernel`
                runs[preset, f"gated_ssm, scan: {name}"] = make_model, (name, "", launch)
    for (preset, name), (make, scan) in runs.items():
        row = f"{preset} {name}"
        if time.perf_counter() > end:
            found[row] = "skipped: the time was over"
            continue
        arch = {"nanoGPT": "transformer"}.get(name, name.partition(",")[0])
        choose = S.choose if scan is None else lambda device, scan=scan: scan
        try:
            sizes = settings(args, preset, arch)
            with mock.patch.object(S, "choose", choose):
                found[row] = step_speed(make(sizes), sizes, args, matmul)
        except Exception as error:
            found[row] = {"error": describe(error)}


# ---- memory: what backward keeps -----------------------------------------------------------------

class Kept(TorchDispatchMode):
    """Notes every storage that is made, and which are still there."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def kept_bytes(arch: str, recompute: bool, d_model: int = 512, d_state: int = 1024,
               n_head: int = 8, T: int = 2048, device: str = "cpu") -> tuple[float, float]:
    """Bytes a token that backward keeps after the forward pass, eager and in bfloat16
    -> (in each layer, beside the layers).

    The tensors are fake: they have shapes, types and storages, as on the device, but no contents.
    """
    def alive(n_layer, rows):
        with FakeTensorMode(), torch.device(device):
            model = LM(ModelConfig(arch, n_layer=n_layer, d_model=d_model, d_state=d_state,
                                   n_head=n_head, recompute=recompute))
            tokens = torch.zeros(rows, T, dtype=torch.long)
            reset = torch.zeros(rows, T, dtype=torch.uint8)
            with torch.autocast(torch.device(device).type, torch.bfloat16), Kept() as kept:
                _, loss = model(tokens, reset, tokens)          # loss holds the graph
            return kept.bytes()

    two, four = ((alive(n, 4) - alive(n, 2)) / (2 * T) for n in (2, 4))     # bytes a token
    return (four - two) / 2, 2 * two - four


def part_memory(args, found, end):
    """rows_N: the largest micro-batch on a GPU of N GiB, a tenth of which stays free."""
    for preset, arch in itertools.product(["gpu"] if args.quick else ["gpu", "110m", "1.4b"],
                                          MIXERS):
        sizes, _ = train.parse_args([f"--preset={preset}", f"--arch={arch}"])
        with FakeTensorMode():
            n = make_model(sizes).n_parameters()
        full = None
        for recompute in (False, True):
            row = f"{preset} {arch}{', recompute' * recompute}"
            if time.perf_counter() > end:
                found[row] = "skipped: the time was over"
                continue
            layer, beside = kept_bytes(arch, recompute, sizes.d_model, sizes.d_state, sizes.n_head,
                                       sizes.block_size, args.device)
            full = full or layer            # of one layer at a time, backward makes all of it again
            size = sizes.block_size * (sizes.n_layer * layer + beside + full * recompute)
            found[row] = {"layer_bytes": layer, "beside_bytes": beside, "row_GiB": size / GIB,
                          "fixed_GiB": 16 * n / GIB,            # weights, gradients, AdamW
                          **{f"rows_{room}": max(0, int((0.9 * room * GIB - 16 * n) / size))
                             for room in (8, 16, 24, 80)}}


# ---- train, decode -------------------------------------------------------------------------------

def part_train(args, found, end):
    """`python train.py --preset=gpu`, stopped a minute after its first train_loss."""
    with tempfile.TemporaryDirectory() as folder:
        log, screen = Path(folder, "run", "log.jsonl"), Path(folder, "screen.txt")
        command = [sys.executable, "train.py", "--preset=gpu", f"--device={args.device}",
                   f"--out_dir={log.parent}", *[*TINY, "--data=README.md"] * args.quick]
        losses, begin, first = [], time.perf_counter(), None
        with screen.open("w") as output:
            process = subprocess.Popen(command, cwd=bench.ROOT, stdout=output, stderr=output)
        try:
            while process.poll() is None and (now := time.perf_counter()) < end:
                lines = log.read_text().splitlines(True) if log.exists() else []
                losses = [json.loads(line) for line in lines
                          if '"train_loss"' in line and line.endswith("\n")]
                first = now if losses and first is None else first
                if first is not None and now >= first + 60 * (not args.quick):
                    break
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()                  # nothing, if it has ended
        said = screen.read_text().strip().splitlines() or ["nothing"]
    if not losses:
        raise RuntimeError(f"no train_loss in {time.perf_counter() - begin:.0f} s; it ended with: "
                           f"{said[-1].strip()}")
    found["run"] = {"first_loss": losses[0]["train_loss"], "last_loss": losses[-1]["train_loss"],
                    "tokens_per_s": statistics.median(line["tokens_per_s"] for line in losses),
                    "seconds_to_first": first - begin, "ended": said[-1].strip()}
    found["lines"] = [[line[key] for key in ("step", "train_loss", "tokens_per_s")]
                      for line in losses]


def part_decode(args, found, end):
    """LM.generate of preset gpu, one prompt at a time, in float32."""
    prompts, new = ((16, 32), 8) if args.quick else ((512, 16384), 200)
    for arch, prompt in itertools.product(MIXERS, prompts):
        if time.perf_counter() > end:
            found[f"{arch}, prompt of {prompt}"] = "skipped: the time was over"
            continue
        model = make_model(settings(args, "gpu", arch)).to(args.device)
        seconds, state = bench.token_times(model, prompt, new)
        found[f"{arch}, prompt of {prompt}"] = {
            "tokens_per_s": round(1 / statistics.median(seconds)), "state_bytes": state}


# ---- all of it -----------------------------------------------------------------------------------

PARTS = {"kernel": (part_kernel, 90), "sanitizer": (part_sanitizer, 80), "scan": (part_scan, 40),
         "step": (part_step, 200), "memory": (part_memory, 20), "train": (part_train, 100),
         "decode": (part_decode, 30)}       # and its share of the time


def write(path, report):
    with open(f"{path}.part", "w") as file:
        json.dump(report, file, indent=1)
    os.replace(f"{path}.part", path)


def show(report):
    def text(value):
        return f"{value:.3g}" if isinstance(value, float) else (
            f"{value:,}" if isinstance(value, int) else str(value))

    for part, rows in report["parts"].items():
        print(f"\n{part}: {' '.join(PARTS[part][0].__doc__.split())}")
        for row, cells in rows.items():
            if isinstance(cells, dict):
                cells = "  ".join(f"{name} {text(value)}" for name, value in cells.items())
            if not isinstance(cells, list):
                print(f"  {row:34s}  {text(cells)}")


def main(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    flag = parser.add_argument
    flag("--device", default="cuda", help="cuda or cpu")
    flag("--quick", action="store_true", help="tiny sizes: numbers mean nothing")
    flag("--out", default="gpu.json", help="what to write")
    flag("--nanogpt", metavar="FOLDER", help="holds nanoGPT's model.py, which trains beside ours")
    flag("--minutes", type=train.number(float, 0), default=9, help="when no more is begun")
    flag("--only", default=",".join(PARTS), help="parts, with commas between them")
    args = parser.parse_args(argv)
    unknown = set(args.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"{', '.join(unknown)} is unknown; choose from {', '.join(PARTS)}")
    args.on_gpu = args.device.startswith("cuda")
    if args.on_gpu and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; pass --device=cpu")
    args.torch_device = torch.empty(0, device=args.device).device       # "cuda" is cuda:0
    train.keep_freed_memory()
    name = torch.cuda.get_device_name(args.device) if args.on_gpu else platform.machine()
    report = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda,
              "scan": " ".join(S.backend(args.device)).strip(), "arguments": argv,
              "date": datetime.datetime.now().isoformat(timespec="seconds"), "parts": {}}
    stop = time.perf_counter() + 60 * args.minutes
    left = [part for part in PARTS if part in args.only.split(",")]
    while left:
        function, share = PARTS[left[0]]
        begin, found = time.perf_counter(), report["parts"].setdefault(left[0], {})
        end = begin + (stop - begin) * share / sum(PARTS[part][1] for part in left)
        if begin > stop:
            found["skipped"] = "the time was over"
        else:
            try:
                function(args, found, end)
            except Exception as error:
                found["error"] = describe(error)
            print(f"{left[0]}: {time.perf_counter() - begin:.0f} s {found.get('error', '')}",
                  flush=True)
        write(args.out, report)
        left.pop(0)
        gc.collect()
        if args.on_gpu:
            torch.cuda.empty_cache()
    print(f"\n{args.out}: {report['device']}, torch {report['torch']}, CUDA {report['cuda']}, scan: "
          f"{report['scan']}, {report['date']}")
    show(report)
    failed = [part for part, found in report["parts"].items() if "error" in found or any(
        isinstance(row, dict) and "error" in row for row in found.values())]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} went wrong; {args.out} and the table say how")


if __name__ == "__main__":
    main(sys.argv[1:])
