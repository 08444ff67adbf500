"""One command for a machine with a GPU: is all of this right there, how fast, how much fits?

    python experiments/gpu.py                           at most 9 minutes, into gpu.json
    python experiments/gpu.py --only=kernel,scan        of the parts, in their order
    python experiments/gpu.py --device=cpu --quick      tiny sizes: does it run?

A part measures rows, each on its own: what goes wrong in one is written down as its error, and the
others go on. gpu.json is written anew after each row. Time that a part leaves unused goes to those
after it; a row that would begin when its part's time is over is skipped, and says so.
"""
import contextlib
import datetime
import gc
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
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
from model import LM, MIXERS, RESET_FORWARD, RESET_REVERSE, ModelConfig, command_line
from objectives import Tokenizer

GIB = 2 ** 30
LARGEST_ERROR = 2e-5    # of float32 against float64; it is 1e-7 on the CPU
TINY = "--n_layer=1 --d_model=32 --d_state=64 --n_head=4 --block_size=128 --batch_size=4".split()


def describe(error):
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {next((s for s in lines if 'error:' in s), lines[0]).strip()}"


def settings(args, preset, arch, compiled="auto"):
    compiled = compiled if args.on_gpu else "no"
    sizes = train.parse_args([f"--preset={preset}", f"--arch={arch}", f"--device={args.device}",
                                 f"--compile={compiled}", *TINY * args.quick])
    with contextlib.redirect_stdout(None):
        train.settle(sizes)
    return sizes


def make_model(sizes):
    tok = Tokenizer(sizes.tokenizer, n_masks=sizes.block_size // 8)
    return LM(train.model_config(sizes, tok))


# ---- the scan: is it right? ----------------------------------------------------------------------

def laid_out(values, layout, device):
    """The same values on the device. Around a slice is NaN, which must not get into any result."""
    B, T, D = values.shape
    view = values.to(device)
    if layout == "slice":
        view = torch.full((B, T + 3, D + 5), torch.nan, device=device)[:, 2:T + 2, 3:D + 3]
    elif layout == "channels apart":
        view = torch.empty(B, D, T, device=device).mT
    return view.copy_(values)


def backends(args):
    """{name: its walk, or why it does not load}."""
    found = {}
    for name, load in S.LOADERS[args.torch_device.type].items():
        try:
            found[name] = load(args.torch_device)
        except Exception as error:
            found[name] = describe(error)
    return found | {"torch": S.torch_walk}


@lru_cache(None)
def example(shape, reverse):
    """((a, x, g), (h, da, dx)), the latter by the loop in float64; with resets, and zeros."""
    torch.manual_seed(0)
    a, x, g = torch.rand(shape), torch.randn(shape), torch.randn(shape)
    a = a * (torch.rand(*shape[:2], 1) > 0.1) * (torch.rand(shape) > 0.05)
    exact = [t.double().requires_grad_() for t in (a, x)]
    h = S.scan_loop(*exact, reverse)
    return (a, x, g), (h.detach(), *torch.autograd.grad(h, exact, g.double()))


def check(walk, args):
    """Largest errors of h, da and dx, each over its largest value, against the loop in float64."""
    if isinstance(walk, str):
        return walk
    shapes = [(1, 1, 1), (2, 2, 3), (3, 17, 32), (2, 255, 33), (1, 300, 7), (2, 513, 64)]
    if not args.quick:      # and many lanes, few lanes, so few that chunks are scanned in chunks
        shapes += [(8, 300, 1301), (4, 2048, 512), (1, 20001, 7), (16, 256, 640)]
    found = {"cases": 0, "h": 0.0, "da": 0.0, "dx": 0.0}
    for shape, layout, reverse in itertools.product(shapes, ("whole", "slice", "channels apart"),
                                                    (False, True)):
        given, want = example(shape, reverse)
        a, x, g = (laid_out(t, layout, args.torch_device) for t in given)
        # as the scan divides the work; in chunks of 16 steps, a channel a lane
        for divide in [S.divide, lambda _: (16, 1)][:1 if walk is S.torch_walk else 2]:
            h, da, dx = got = [torch.full(shape, torch.nan, device=args.device) for _ in range(3)]
            with mock.patch.object(S, "divide", divide):
                walk(a, x, h, reverse)
                walk(a, g, dx, not reverse, h, da)
            found["cases"] += 1
            for name, u, v in zip(("h", "da", "dx"), got, want):
                error = ((u.cpu() - v).abs().max() / v.abs().max().clamp(min=1e-30)).item()
                found[name] = max(error, found[name])
                if not error < LARGEST_ERROR:                   # NaN too
                    found.setdefault("error", f"{name} is off by {error:.0e} first in {shape}, "
                                              f"{layout}, reverse={reverse}")
    return found


def part_kernel(args):
    """Every backend against the loop: largest relative errors."""
    for name, walk in backends(args).items():
        yield name, partial(check, walk, args)


def sanitize(program, tool, args):
    flags = ["--report-api-errors", "no"] if tool == "memcheck" else []
    if tool != "initcheck":                 # which must see who wrote what our kernel reads
        flags += ["--kernel-regex", "kns=birdie"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["timeout", "--kill-after=5", "40", program, "--tool", tool, *flags,
                   "--target-processes", "application-only", sys.executable, __file__, "--quick",
                   f"--device={args.device}", "--only=kernel", f"--out={folder}/gpu.json"]
        done = subprocess.run(command, capture_output=True, text=True,
                              env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    errors = re.findall(r"SUMMARY: (\d+) ", "\n".join(said))
    if not errors:
        last = (done.stderr or done.stdout or "nothing").strip().splitlines()[-1]
        raise RuntimeError(f"no result (exit code {done.returncode}; 124: no time left): {last}")
    return {"errors": int(errors[-1])} | ({"error": said[1]} if int(errors[-1]) else {})


def part_sanitizer(args):
    """Part `kernel`, quick, under each of compute-sanitizer's tools."""
    path = os.pathsep.join([os.environ["PATH"], f"{CUDA_HOME}/bin"])
    program = shutil.which("compute-sanitizer", path=path)
    if program is None or not args.on_gpu:
        yield "compute-sanitizer", lambda: "not installed" if args.on_gpu else "needs a GPU"
        return
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        yield tool, partial(sanitize, program, tool, args)


# ---- the scan: how fast? -------------------------------------------------------------------------

def scan_speed(shape, peers, args):
    """Shares, with copy_ and all others taking turns."""
    device, calls = args.torch_device, 10 if args.on_gpu else 1     # a GPU's are queued: no waiting
    best, _, walk = S.choose(device)
    a, x, g, h, da, dx = (torch.rand(shape, device=device) for _ in range(6))
    leaves, found = [t.clone().requires_grad_() for t in (a, x)], {}
    runs = {("copy_", 0): partial(dx.copy_, x)}
    for name, walk in {best: walk, "torch": S.torch_walk}.items():
        runs[name, 0] = partial(walk, a, x, h, False)
        runs[name, 1] = partial(walk, a, g, dx, True, h, da)
    for name, function in peers.items():    # with new tensors and autograd
        both = partial(lambda f: torch.autograd.grad(f(*leaves), leaves, g), function)
        try:
            both()
            runs[name, 0], runs[name, 1] = partial(function, a, x), both
        except Exception as error:          # a length that it does not take
            found[name] = describe(error)
    repeated = {run: lambda f=function: [f() for _ in range(calls)]
                for run, function in runs.items()}
    seconds = bench.medians(repeated, 1 if args.quick else 5, args.device)
    copy = seconds.pop(("copy_", 0)) / 2    # of one tensor that is moved once
    found["copy_GB_per_s"] = 4e-9 * x.numel() * calls / copy
    for name in dict.fromkeys(name for name, _ in seconds):
        forward, both = seconds[name, 0], seconds[name, 1] + seconds[name, 0] * (name not in peers)
        found |= {f"{name}_forward": 3 * copy / forward, f"{name}_both": 8 * copy / both}
    return found


def part_scan(args):
    """1: as fast as copy_ moves those bytes, 3 tensors forward and 5 backward (both: 8)."""
    peers = {"scan": S.scan}
    try:
        peers |= dict(bench.peers(args.torch_device.type))
    except Exception as error:              # installed, but not for this torch or GPU
        yield "other packages", partial(describe, error)
    for name in ("accelerated-scan", "fla hgrn"):
        if name not in peers:
            yield name, lambda: "not installed"
    shapes = [(8, 2048, 2560), (16, 2048, 1536), (1, 131072, 512), (32, 2048, 512)]
    for shape in [(2, 64, 32), (1, 300, 8)] if args.quick else shapes:
        yield str(shape), partial(scan_speed, shape, peers, args)


# ---- training steps ------------------------------------------------------------------------------

def nanogpt(sizes, folder):
    """bench.NanoGPT, as large as our Transformer of the same preset."""
    model = bench.NanoGPT(folder, sizes.block_size)
    config = model.gpt.config
    config.n_layer, config.n_head, config.n_embd = sizes.n_layer, sizes.n_head, sizes.d_model
    model.gpt = type(model.gpt)(config)
    model.blocks = model.gpt.transformer.h
    return model


def product_speed(args):
    n = 8192 if args.on_gpu and not args.quick else 256
    x = torch.randn(n, n, device=args.device, dtype=torch.bfloat16)
    seconds = bench.medians({"": lambda: x @ x}, 20, args.device)[""]
    return {"size": n, "TFLOP_per_s": 2e-12 * n ** 3 / seconds}


def step_speed(make, preset, arch, product, args, choose=S.choose, compiled="auto"):
    """Of steps on random tokens; half of each row is a prefix."""
    torch._dynamo.reset()                   # or a later model would be one recompilation too many
    gc.collect()
    sizes = settings(args, preset, arch, compiled)
    tokens = torch.randint(256, (sizes.batch_size, sizes.block_size))
    reset = torch.zeros_like(tokens, dtype=torch.uint8)
    reset[:, 0] = RESET_FORWARD
    reset[:, sizes.block_size // 2:] |= RESET_REVERSE
    model = make(sizes).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    learner = train.Learner(model, optimizer, sizes, clip=1.0)
    step = partial(learner.step, dict(tokens=tokens, reset=reset, targets=tokens), 1e-4)
    with mock.patch.object(S, "choose", choose):
        step()                              # chooses the rows of a micro-batch, and compiles
        if args.on_gpu:
            torch.cuda.reset_peak_memory_stats(args.device)
        seconds = bench.medians({"": step}, 1 if args.quick else 8, args.device)[""]
    tables = {"embed.weight", "gpt.transformer.wpe.weight"}     # nanoGPT's wte is its head as well
    n = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    speed = tokens.numel() / seconds
    found = {"tokens_per_s": round(speed), "peak_GiB": None, "rows": learner.rows, "parameters": n,
             "utilisation": 6e-12 * n * speed / product["TFLOP_per_s"],
             "dtype": sizes.dtype, "compile": sizes.compile}
    if args.on_gpu:
        found["peak_GiB"] = torch.cuda.max_memory_allocated(args.device) / GIB
    return found


def part_step(args):
    """Utilisation: 6 FLOP a parameter (not embedding) and token, over a matrix product's."""
    product = product_speed(args)
    yield "bfloat16 product", lambda: product
    for compiled in ("yes", "graphs"):
        yield f"cpu gated_ssm, compile={compiled}", partial(
            step_speed, make_model, "cpu", "gated_ssm", product, args, compiled=compiled)
    for preset in ("gpu", "110m"):
        for arch in MIXERS:
            yield f"{preset} {arch}", partial(step_speed, make_model, preset, arch, product, args)
        if args.nanogpt:
            yield f"{preset} nanoGPT", partial(step_speed, partial(nanogpt, folder=args.nanogpt),
                                               preset, "transformer", product, args)
        for name, walk in backends(args).items() if preset == "gpu" else ():
            if not isinstance(walk, str):       # why it does not load stands in part `kernel`
                yield f"gpu gated_ssm, scan: {name}", partial(
                    step_speed, make_model, "gpu", "gated_ssm", product, args,
                    lambda device, choice=(name, "", walk): choice)


# ---- memory: what backward keeps -----------------------------------------------------------------

class Kept(TorchDispatchMode):
    """Notes every storage that is made, and says how many bytes of them are still there."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result)
                        if isinstance(t, torch.Tensor)):
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def kept_bytes(arch: str, recompute: bool, d_model: int = 512, d_state: int = 1024,
               n_head: int = 8, T: int = 2048, device: str = "cpu") -> tuple[float, float]:
    """Bytes a token that the forward pass, eager and in bfloat16, keeps for backward
    -> (in each layer, beside the layers). The tensors are fake: they have shapes, types and
    storages, as on the device, but no contents."""
    def alive(n_layer, rows):
        with FakeTensorMode(), torch.device(device):
            model = LM(ModelConfig(arch, n_layer=n_layer, d_model=d_model, d_state=d_state,
                                   n_head=n_head, recompute=recompute))
            tokens = torch.zeros(rows, T, dtype=torch.long)
            reset = torch.zeros(rows, T, dtype=torch.uint8)
            with torch.autocast(torch.device(device).type, torch.bfloat16), Kept() as kept:
                _, loss = model(tokens, reset, tokens)          # while loss lives, its graph does
            return kept.bytes()

    two, four = ((alive(n, 4) - alive(n, 2)) / (2 * T) for n in (2, 4))     # bytes a token
    return (four - two) / 2, 2 * two - four


def room_for_rows(preset, arch, recompute, args):
    sizes = train.parse_args([f"--preset={preset}", f"--arch={arch}"])
    with FakeTensorMode():
        fixed = 16 * make_model(sizes).n_parameters()           # weights, gradients, AdamW
    widths = sizes.d_model, sizes.d_state, sizes.n_head, sizes.block_size, args.device
    layer, beside = kept_bytes(arch, recompute, *widths)
    again = kept_bytes(arch, False, *widths)[0] if recompute else 0     # one layer's at a time
    row = sizes.block_size * (sizes.n_layer * layer + beside + again)
    return {"layer_bytes": layer, "beside_bytes": beside, "row_GiB": row / GIB,
            "fixed_GiB": fixed / GIB,
            **{f"rows_{size}": max(0, int((0.9 * size * GIB - fixed) / row))
               for size in (8, 16, 24, 80)}}


def part_memory(args):
    """Bytes a token; rows_N: the largest micro-batch in N GiB, of which a tenth stays free."""
    presets = ["gpu"] if args.quick else ["gpu", "110m", "1.4b"]
    for preset, arch, recompute in itertools.product(presets, MIXERS, (False, True)):
        row = f"{preset} {arch}{', recompute' * recompute}"
        yield row, partial(room_for_rows, preset, arch, recompute, args)


# ---- whole programs ------------------------------------------------------------------------------

def train_for(seconds, args):
    """For so long from the first train_loss line on, which must come within two minutes."""
    with tempfile.TemporaryDirectory() as folder:
        log, screen, losses = Path(folder, "run", "log.jsonl"), Path(folder, "screen"), []
        command = [sys.executable, "train.py", "--preset=gpu", f"--device={args.device}",
                   f"--out_dir={log.parent}", *[*TINY, "--data=README.md"] * args.quick]
        with screen.open("w") as output:
            process = subprocess.Popen(command, cwd=bench.ROOT, stdout=output, stderr=output)
        begin = now = time.perf_counter()
        first, stop = None, min(begin + 120, args.stop)
        try:
            while process.poll() is None and now < stop:
                time.sleep(0.2)
                now = time.perf_counter()
                lines = log.read_text().splitlines(True) if log.exists() else []
                losses = [json.loads(line) for line in lines
                          if '"train_loss"' in line and line.endswith("\n")]
                if losses and first is None:
                    first, stop = now, min(now + seconds, args.stop)
            process.send_signal(signal.SIGTERM)     # some parents have the other ignored
            process.wait(60)
        finally:
            process.kill()                  # nothing, if it has ended
        said = screen.read_text().strip().splitlines() or ["nothing"]
    if not losses:
        raise RuntimeError(f"no train_loss in {now - begin:.0f} s, but: {said[-1].strip()}")
    return {"first_loss": losses[0]["train_loss"], "last_loss": losses[-1]["train_loss"],
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in losses),
            "seconds_to_first": first - begin, "ended": said[-1].strip().partition(";")[0],
            "lines": [[line[key] for key in ("step", "train_loss", "tokens_per_s")]
                      for line in losses]}


def part_train(args):
    """`python train.py --preset=gpu`, stopped a minute after its first train_loss."""
    yield "run", partial(train_for, 0 if args.quick else 60, args)


def decode(arch, prompt, new, args):
    model = make_model(settings(args, "gpu", arch)).to(args.device)
    seconds, state = bench.token_times(model, prompt, new)
    return {"tokens_per_s": round(1 / statistics.median(seconds)), "state_bytes": state}


def part_decode(args):
    """LM.generate of preset gpu, one prompt at a time, in float32."""
    prompts, new = ((16, 32), 8) if args.quick else ((512, 16384), 200)
    for arch, prompt in itertools.product(MIXERS, prompts):
        yield f"{arch}, prompt of {prompt:,}", partial(decode, arch, prompt, new, args)


# ---- all of it -----------------------------------------------------------------------------------

PARTS = {"kernel": (part_kernel, 90), "sanitizer": (part_sanitizer, 120), "scan": (part_scan, 40),
         "step": (part_step, 200), "memory": (part_memory, 20), "train": (part_train, 100),
         "decode": (part_decode, 30)}       # and its share of the time


def measure(part, end, found, write, args):
    try:
        for row, function in PARTS[part][0](args):
            write()                     # what came before
            if time.perf_counter() > end:
                found[row] = "skipped: the time is over"
                continue
            try:
                found[row] = function()
            except Exception as error:
                found[row] = {"error": describe(error)}
            gc.collect()                    # the next one needs the memory
            if args.on_gpu:
                torch.cuda.empty_cache()
    except Exception as error:
        found[part] = {"error": describe(error)}


def show(part, rows):
    print(f"\n{part}: {' '.join(PARTS[part][0].__doc__.split())}")
    for row, cells in rows.items():
        if isinstance(cells, dict):
            cells = "  ".join(f"{name} {cell:.3g}" if isinstance(cell, float) else f"{name} {cell}"
                              for name, cell in cells.items() if not isinstance(cell, list))
        print(f"  {row:28s}  {cells}")


def main(argv):
    parser, flag = command_line(None)
    flag("--device", default="cuda", choices=("cuda", "cpu"))
    flag("--quick", action="store_true", help="tiny sizes: numbers mean nothing")
    flag("--out", default="gpu.json", help="what to write")
    flag("--nanogpt", metavar="FOLDER", help="holds nanoGPT's model.py, which trains beside ours")
    flag("--minutes", default=9, help="after which no row is begun")
    flag("--only", default=",".join(PARTS), help="parts, with commas between them")
    args = parser.parse_args(argv)
    parts = [part for part in PARTS if part in args.only.split(",")]
    if set(args.only.split(",")) - set(parts):
        parser.error(f"--only={args.only} names an unknown part; choose from {', '.join(PARTS)}")
    args.on_gpu = args.device == "cuda"
    if args.on_gpu and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; pass --device=cpu")
    args.torch_device = torch.empty(0, device=args.device).device       # "cuda" is cuda:0
    train.keep_freed_memory()
    report = {"device": torch.cuda.get_device_name() if args.on_gpu else "cpu",
              "torch": torch.__version__, "cuda": torch.version.cuda,
              "scan": " ".join(S.backend(args.device)).strip(), "arguments": argv,
              "date": datetime.datetime.now().isoformat(timespec="seconds")}
    found, args.stop = report.setdefault("parts", {}), time.perf_counter() + 60 * args.minutes

    def write():
        with open(f"{args.out}.part", "w") as file:
            json.dump(report, file, indent=1)
        os.replace(f"{args.out}.part", args.out)

    for i, part in enumerate(parts):
        begin = time.perf_counter()
        share = PARTS[part][1] / sum(PARTS[later][1] for later in parts[i:])
        measure(part, begin + share * (args.stop - begin), found.setdefault(part, {}), write, args)
        write()
        wrong = [f"{row}: {cells['error']}" for row, cells in found[part].items()
                 if isinstance(cells, dict) and "error" in cells]
        print("\n  ".join([f"{part}: {time.perf_counter() - begin:.0f} s", *wrong]), flush=True)
    print("\n" + "  ".join(f"{name} {value}" for name, value in report.items() if name != "parts"))
    for part, rows in found.items():
        show(part, rows)
    if '"error": ' in json.dumps(found):
        raise SystemExit(f"error: something went wrong; the lines with error, here and in "
                         f"{args.out}, say what")


if __name__ == "__main__":
    main(sys.argv[1:])
