"""The linear recurrence at the heart of every state space model here, forward and backward.

    h[t] = a[t] * h[t-1] + x[t]              elementwise, for every sample and channel
    dx[t] = g[t] + a[t+1] * dx[t+1]          its gradient (g = dL/dh): a scan the other way,
    da[t] = dx[t] * h[t-1]                   and one product

Symbols (Birdie, arXiv 2411.01030, sections 2.1, 3.1 and 3.4):
    a  gates    x  inputs    h  states, all (B, T, D): batch, length, channels
    reset       a gate of 0: nothing passes from one packed sample to the next (section 3.4), not
                even an infinity or a NaN
    reverse     right to left, for half the channels of a bidirectional layer (section 3.1)

A lane (one channel in a thread of a GPU, a long row of channels in a thread of a CPU) walks through
time in order, which reads and writes everything once. Where lanes are too few to keep a GPU busy:

    many lanes (B * D is large)       few: time is cut into chunks, and there is a lane for each
    time ------------------->         1  every chunk from 0: its end e, the product p of its gates
    lane 0  h h h h h h h h h         2  from chunk to chunk: end = p * end before + e, a short scan
    lane 1  h h h h h h h h h         3  every chunk again, now from the end of the one before

Run it:  python scan.py               every backend against the loop, then a timing table
         SCAN_BACKEND=torch           in any program's environment: no kernel, PyTorch only

Departures from the paper: it describes no kernel; this one is ours. It gives the scan a mask; here
the caller zeroes gates, and scans each direction in a call of its own.
"""
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

import torch
from torch.autograd.forward_ad import unpack_dual


# ---- the plain reference: one step at a time, differentiable, slow -------------------------------

def scan_loop(a, x, reverse=False):
    """`scan` as a Python loop over time. Autograd through it is the oracle of the tests."""
    T = x.shape[1]
    h, states = torch.zeros_like(x[:, 0]), [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        h = h.masked_fill((a[:, t] == 0) & ~h.isfinite(), 0)
        h = states[t] = a[:, t] * h + x[:, t]
    return torch.stack(states, dim=1)


# ---- PyTorch: two levels of sqrt(T) steps, for any device ----------------------------------------

def torch_scan(a, x, h, reverse):
    """Write the states h.

    Time is cut into K chunks of C = sqrt(T) steps. One operation takes a step in all chunks at
    once: the header's three passes take about 3 C + K operations, where the loop takes T.
    """
    T, order = x.shape[1], -1 if reverse else 1
    C = math.isqrt(T)
    K = T // C
    cut = T - K * C if reverse else K * C                       # fewer than C steps are left over
    whole, rest = slice(0, cut), slice(cut, T)
    if reverse:
        whole, rest = rest, whole
    A, X, H = (t[:, whole].unflatten(1, (K, C)).unbind(2)[::order] for t in (a, x, h))  # (B, K, D)

    # pass 1: every chunk's end from a state of 0, and the product of its gates
    e, p = (t[0].clone(memory_format=torch.contiguous_format) for t in (X, A))
    for gate, into in zip(A[1:], X[1:]):
        torch.addcmul(into, gate, e, out=e)
        p.mul_(gate)
    # pass 2, chunk by chunk: the state before each
    state = torch.zeros_like(e)
    ends, products, starts = (t.unbind(1)[::order] for t in (e, p, state))
    for end, product, start, following in zip(ends, products, starts, starts[1:]):
        torch.addcmul(end, product, start, out=following)
    # pass 3: every chunk's states from there, then those of the steps left over
    for gate, into, now in zip(A, X, H):
        state = torch.addcmul(into, gate, state, out=now)
    state = state[:, 0 if reverse else -1]
    for gate, into, now in zip(*(t[:, rest].unbind(1)[::order] for t in (a, x, h))):
        state = torch.addcmul(into, gate, state, out=now)
    if not math.isfinite(h.sum()):              # 0 * inf made a nan, perhaps; in the loop it is 0
        h.copy_(scan_loop(a, x, reverse))


def torch_walk(a, x, out, reverse, h=None, da=None):
    """What `kernel_scan` does, by PyTorch; a gradient's gates are those of one step later."""
    if da is None:
        return torch_scan(a, x, out, reverse)
    early, late = slice(None, -1), slice(1, None)
    if not reverse:                                             # the scan came the other way
        early, late = late, early
    later = torch.zeros_like(a)
    later[:, early] = a[:, late]
    torch_scan(later, x, out, reverse)
    da.zero_()
    torch.mul(out[:, late], h[:, early], out=da[:, late])


# ---- the kernel: one source for nvcc, NVRTC and the C++ compiler ---------------------------------
# Right to left is a pointer to the last step and a negative stride, and the gradient is the same
# walk the other way, so there is one walk. Without torch's headers it compiles in a second.

KERNEL = r"""
typedef long long i64;
#ifdef __CUDACC__
#define LANE __device__ __forceinline__
#else
#define LANE inline
#endif

struct Track {                          // one tensor, in the order of the walk
    float* first;                       // its first step: right to left, the last one in memory
    i64 row, step;                      // floats to the next row and step; of any sign
    LANE float* at(i64 b, i64 t, i64 d) const { return first + b * row + t * step + d; }
};
struct Job {                            // field for field what Python passes
    Track a, x, h, out, da;             // backward: x is g = dL/dh, and out is dx
    Track e, p, carried;                // (B, chunks, D): pass 1 writes e, p; pass 3 reads carried
    i64 T, D, chunk, width, lanes, threads;
    void* stream;
};

// n <= W channels of row b, from d on, walk through chunk k. SUMMARY is pass 1.
template <bool BACK, bool SUMMARY, int U, int W>
LANE void walk(const Job& j, i64 b, i64 k, i64 d, int n) {
    constexpr bool STATES = BACK && !SUMMARY;
    const i64 begin = k * j.chunk, end = begin + j.chunk < j.T ? begin + j.chunk : j.T;
    const float *a = j.a.at(b, begin, d), *x = j.x.at(b, begin, d);
    const float *h = j.h.at(b, begin + 1, d);           // h[t-1]: BACK walks against the scan
    float *out = j.out.at(b, begin, d), *da = j.da.at(b, begin, d);
    const auto read_on = [&] { a += j.a.step, x += j.x.step, h += j.h.step; };
    const auto write_on = [&] { out += j.out.step, da += j.da.step; };

    float c[W], p[W];                   // what is carried from step to step; the product of gates
    for (int w = 0; w < n; w++) {
        c[w] = SUMMARY || k == 0 ? 0 : j.carried.at(b, k - 1, d)[w];
        p[w] = 1;
    }
    const auto pass = [](float gate, float v) { return gate == 0 ? 0 : v; };   // 0 * inf is nan
    const auto step = [&](int w, float gate, float in, float before) {
        const float y = BACK ? in + c[w] : gate * pass(gate, c[w]) + in;            // dx or h
        c[w] = BACK ? gate * pass(gate, y) : y;
        if (SUMMARY) p[w] *= gate;
        else out[w] = y;
        if (STATES) da[w] = y * before;
    };

    i64 t = begin;
    const i64 safe = end - (STATES && end == j.T);      // the scan's first state has none before it
    if constexpr (U > 1) {      // a GPU's thread works on U steps while the next U are on their way
        struct Steps { float gate[U], in[U], before[U]; } even, odd;
        const auto ask = [&](Steps& s) {
#pragma unroll
            for (int u = 0; u < U; u++, read_on()) {
                s.gate[u] = *a;
                s.in[u] = *x;
                s.before[u] = STATES ? *h : 0;
            }
        };
        const auto use = [&](const Steps& s) {
#pragma unroll
            for (int u = 0; u < U; u++, write_on()) step(0, s.gate[u], s.in[u], s.before[u]);
        };
        const i64 turns = (safe - t) / U;
        if (turns > 0) ask(even);
        for (i64 i = 0; i < turns; i += 2) {
            if (i + 1 < turns) ask(odd);
            use(even);
            if (i + 2 < turns) ask(even);
            if (i + 1 < turns) use(odd);
        }
        t += turns * U;
    }
    for (; t < end; t++, read_on(), write_on()) {       // a CPU's thread takes all its steps here
        const bool more = STATES && t + 1 < j.T;
#pragma omp simd
        for (int w = 0; w < n; w++) step(w, a[w], x[w], more ? h[w] : 0);
    }
    if (SUMMARY) for (int w = 0; w < n; w++) {
        j.e.at(b, k, d)[w] = c[w];
        j.p.at(b, k, d)[w] = p[w];
    }
}

template <int U, int W> LANE void lane(const Job& j, i64 i, bool back, bool summary) {
    const i64 pieces = (j.D + j.width - 1) / j.width, chunks = (j.T + j.chunk - 1) / j.chunk;
    const i64 b = i / pieces / chunks, k = i / pieces % chunks, d = i % pieces * j.width;
    const int n = W == 1 ? 1 : j.D - d < j.width ? j.D - d : j.width;
    if (back && summary) walk<true, true, U, W>(j, b, k, d, n);
    else if (back) walk<true, false, U, W>(j, b, k, d, n);
    else if (summary) walk<false, true, U, W>(j, b, k, d, n);
    else walk<false, false, U, W>(j, b, k, d, n);
}

#ifdef __CUDACC__
extern "C" __global__ void birdie_lanes(const Job j, int back, int summary) {
    const i64 i = blockIdx.x * 32ll + threadIdx.x;
    if (i < j.lanes) lane<16, 1>(j, i, back, summary);
}
#endif
#ifndef __CUDACC_RTC__                  // with NVRTC Python starts birdie_lanes itself
extern "C" int birdie_launch(const Job* j, int back, int summary) {
#ifdef __CUDACC__
    birdie_lanes<<<(j->lanes + 31) / 32, 32, 0, (cudaStream_t)j->stream>>>(*j, back, summary);
    return cudaGetLastError();
#else
#pragma omp parallel for num_threads(j->threads) schedule(dynamic) if (j->threads > 1)
    for (i64 i = 0; i < j->lanes; i++)
        if (j->width > 1) lane<1, 4096>(*j, i, back, summary);
        else lane<16, 1>(*j, i, back, summary);         // a GPU's threads, for the tests
    return 0;
#endif
}
#endif
"""


class Track(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("row", ctypes.c_int64), ("step", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor, reverse=False):
        row, step, _ = tensor.stride()
        if not reverse:
            return cls(tensor.data_ptr(), row, step)
        return cls(tensor.data_ptr() + 4 * step * (tensor.shape[1] - 1), row, -step)


class Job(ctypes.Structure):
    _fields_ = [(name, Track) for name in "a x h out da e p carried".split()]
    _fields_ += [(name, ctypes.c_int64) for name in "T D chunk width lanes threads".split()]
    _fields_ += [("stream", ctypes.c_void_p)]


def divide(x):
    """(steps, channels) of one lane's work."""
    B, T, D = x.shape
    if x.is_cuda:
        many = B * D * 4 >= 40_000 or T < 256                   # bytes a step; an estimate
        return T if many else max(64, -(-T * B * D // 65536)), 1        # 65536 lanes: our choice
    threads = torch.get_num_threads()
    pieces = 1 if threads == 1 else -(-4 * threads // B)        # four for each thread
    return T, min(4096, max(128, -(-D // pieces)))              # 4096 is the kernel's W


def kernel_scan(launch, a, x, out, reverse, h=None, da=None):
    """What every backend does: write out, the states; or, with the states h and x = dL/dh, write
    out = dx and da, in the other direction than the scan's."""
    B, T, D = x.shape
    if x.numel() == 0:
        return
    a, x, h = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (a, x, h))
    tracks = {name: Track.of(t, reverse) for name, t in
              {"a": a, "x": x, "h": h, "out": out, "da": da}.items() if t is not None}
    chunk, width = divide(x)
    chunks, pieces, back = -(-T // chunk), -(-D // width), da is not None
    job = Job(**tracks, T=T, D=D, chunk=chunk, width=width, lanes=B * chunks * pieces,
              threads=torch.get_num_threads())
    with torch.cuda.device_of(x):                               # does nothing on the CPU
        job.stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        if chunks > 1:
            e, p, carried = x.new_empty(3, B, chunks, D)
            job.e, job.p, job.carried = map(Track.of, (e, p, carried))
            launch(job, back, True)                             # pass 1
            kernel_scan(launch, p, e, carried, False)           # pass 2: the same scan over chunks
        launch(job, back, False)                                # pass 3


# ---- files that say whether they are whole -------------------------------------------------------

def sha256(file, n):
    """Of the next n bytes of an open binary file."""
    digest = hashlib.sha256()
    for begin in range(0, n, 1 << 20):
        digest.update(file.read(min(1 << 20, n - begin)))
    return digest.digest()


def seal(path):
    """Write a file's SHA-256 behind it: neither torch.load nor dlopen looks there."""
    with open(path, "r+b") as file:
        file.write(sha256(file, os.path.getsize(path)))
        os.fsync(file.fileno())


def is_sealed(file):
    """Is an open binary file as `seal` left it, bit for bit?"""
    right = sha256(file, os.fstat(file.fileno()).st_size - 32) == file.read()
    file.seek(0)
    return right


# ---- who compiles it -----------------------------------------------------------------------------

def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def one_line(error) -> str:
    """What tells most of an error's text, which may be a compiler's."""
    text = str(getattr(error, "stderr", None) or error) or repr(error)
    lines = [line for line in text.splitlines() if "error:" in line or "not found" in line]
    return " ".join((lines[0] if lines else text).split())[:300]


def built(suffix, key, make):
    """What make(path) writes, kept among torch's extensions under a hash of all it depends on.

    A process builds in a folder of its own and moves the file into place in one step: there is no
    lock to wait for, and no half-written file to load.
    """
    from torch.utils import cpp_extension
    key = hashlib.sha256("\n".join([torch.__version__, KERNEL, *key]).encode()).hexdigest()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    root = tempfile.gettempdir() if "~" in pathlib.Path(root).parts else root       # no home
    final = pathlib.Path(root, f"birdie_scan_{key[:16]}{suffix}")
    with contextlib.suppress(FileNotFoundError), open(final, "rb") as file:
        if is_sealed(file):             # loading half a library would end the process
            return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=final.stem, dir=final.parent) as folder:
        made = pathlib.Path(folder, final.name)
        make(made)
        seal(made)
        os.replace(made, final)
    return final


def library_launch(path):
    library = ctypes.CDLL(str(path))

    def launch(job, back, summary):
        error = library.birdie_launch(ctypes.byref(job), back, summary)
        if error:
            raise RuntimeError(f"scan kernel: CUDA error {error} with {job.lanes} lanes")
    return functools.partial(kernel_scan, launch)


def load_cpp(device):
    from torch.utils import cpp_extension
    compiler = shlex.split(cpp_extension.get_cxx_compiler())    # may be "ccache g++"
    compiler += ["-O3", "-std=c++17", "-march=native", "-fPIC", "-shared"]
    # Its version, and what "native" means: machines with other processors may share the folder.
    target = run([*compiler, "-v", "-E", "-x", "c++", os.devnull])

    def make(library):
        source = library.with_suffix(".cpp")
        source.write_text(KERNEL)
        command = [*compiler, str(source), "-o", str(library)]
        try:
            run([*command, "-fopenmp"])
        except subprocess.CalledProcessError:                   # Apple's compiler has no OpenMP
            run([*command, "-fopenmp-simd"])
    return library_launch(built(".so", [target], make))


def architecture(device):
    """Of the tensor's card, which need not be the current one."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def load_nvcc(device):
    from torch.utils import cpp_extension
    home = cpp_extension.CUDA_HOME
    if home is None:
        raise OSError("nvcc not found")
    flags = ["-O3", "-std=c++17", f"-arch={architecture(device)}"]

    def make(library):
        source = library.with_suffix(".cu")
        source.write_text(KERNEL)
        cpp_extension.load(library.stem, [str(source)], extra_cuda_cflags=flags,
                           extra_ldflags=[f"-Wl,-rpath,{home}/lib64"], is_python_module=False,
                           build_directory=str(library.parent))
    return library_launch(built(".so", [run([f"{home}/bin/nvcc", "--version"]), *flags], make))


def find_nvrtc():
    """CUDA's compiler as a library, which every CUDA build of torch brings along."""
    for folder in sys.path:
        for wheel in pathlib.Path(folder).glob("nvidia/*/lib/libnvrtc.so*"):
            for builtins in wheel.parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))      # CUDA 13.0's NVRTC does not look beside itself
            return str(wheel)
    return "libnvrtc.so." + (torch.version.cuda or "13").split(".")[0]      # where the linker looks


def nvrtc_cubin(arch):
    """The kernel's machine code for arch, as "sm_90", compiled by NVRTC; needs no GPU."""
    nvrtc, program, size = ctypes.CDLL(find_nvrtc()), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), KERNEL.encode(), b"scan.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={arch}".encode(), b"--std=c++17")
    error = nvrtc.nvrtcCompileProgram(program, len(options), options)

    result = "ProgramLog" if error else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{result}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{result}")(program, content)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if error:
        raise RuntimeError(content.value.decode() or f"NVRTC error {error} for {arch}")
    return content.raw


def load_nvrtc(device):
    arch = architecture(device)
    cubin = built(".cubin", [find_nvrtc(), arch], lambda path: path.write_bytes(nvrtc_cubin(arch)))
    context, module, kernel = (ctypes.c_void_p() for _ in range(3))
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(function, *arguments):
        error = getattr(cuda, function)(*arguments)
        if error:
            raise RuntimeError(f"scan kernel: {function} gave CUDA error {error}")

    def launch(job, back, summary):
        values = job, ctypes.c_int(back), ctypes.c_int(summary)
        pointers = (ctypes.c_void_p * 3)(*map(ctypes.addressof, values))
        grid, block, stream = (-(-job.lanes // 32), 1, 1), (32, 1, 1), ctypes.c_void_p(job.stream)
        call("cuCtxSetCurrent", context)                        # autograd's threads start with none
        call("cuLaunchKernel", kernel, *grid, *block, 0, stream, pointers, None)

    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device.index)   # the one torch uses
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), cubin.read_bytes()[:-32])
    call("cuModuleGetFunction", ctypes.byref(kernel), module, b"birdie_lanes")
    return functools.partial(kernel_scan, launch)


LOADERS = {"cpu": {"cpp": load_cpp}, "cuda": {"nvcc": load_nvcc, "nvrtc": load_nvrtc}}


@functools.cache
def load(device):
    """(name, why no better one, walk) of the first backend that works."""
    reasons = []
    for name, loader in LOADERS.get(device.type, {}).items():
        try:
            return name, "; ".join(reasons), loader(device)
        except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            reasons.append(f"no {name}: {one_line(error)}")
    reason = "; ".join(reasons) or f"no kernel for {device.type}"
    print(f"scan: using PyTorch on {device}, which is slower: {reason}", file=sys.stderr)
    return "torch", reason, torch_walk


def choose(device):
    forced = os.environ.get("SCAN_BACKEND", "")
    if forced not in ("", "torch"):
        raise ValueError(f"SCAN_BACKEND={forced} is unknown; set it to torch, or unset it")
    return ("torch", "SCAN_BACKEND=torch", torch_walk) if forced else load(device)


def backend(device="cpu") -> tuple[str, str]:
    """What `scan` uses on device (nvcc, nvrtc, cpp, torch), and why nothing better ("" if best)."""
    return choose(torch.empty(0, device=device).device)[:2]     # "cuda" is cuda:0


# ---- the operator, its gradient, and the public function -----------------------------------------

# `define` and `impl` say what `custom_op` says and take 3 us less a call, 15 with the gradient,
# and 1 s less at the first call, which for custom_op imports torch's compiler.
torch.library.define("birdie::scan", "(Tensor a, Tensor x, bool reverse) -> Tensor")
torch.library.define("birdie::scan_backward",
                     "(Tensor a, Tensor h, Tensor g, bool reverse) -> (Tensor, Tensor)")


@torch.library.register_fake("birdie::scan")
def empty_states(a, x, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("birdie::scan_backward")
def empty_gradients(a, h, g, reverse):
    return empty_states(a, h, reverse), empty_states(a, h, reverse)


def walk_for(x):
    return torch_walk if x.dtype == torch.float64 else choose(x.device)[2]


@torch.library.impl("birdie::scan", "default")
def forward(a, x, reverse):
    h = empty_states(a, x, reverse)
    walk_for(x)(a, x, h, reverse)
    return h


@torch.library.impl("birdie::scan_backward", "default")
def backward(a, h, g, reverse):
    da, dx = empty_gradients(a, h, g, reverse)
    walk_for(h)(a, g, dx, not reverse, h, da)
    return da, dx


def remember(ctx, inputs, output):
    a, _, ctx.reverse = inputs
    ctx.save_for_backward(a, output)                            # x is not needed


def differentiate(ctx, g):
    a, h = ctx.saved_tensors
    return *torch.ops.birdie.scan_backward(a, h, g, ctx.reverse), None


def refuse(ctx, *gradients):                                    # without it they would be 0
    raise RuntimeError("scan has no second derivatives; differentiate scan_loop instead")


torch.library.register_autograd("birdie::scan", differentiate, setup_context=remember)
torch.library.register_autograd("birdie::scan_backward", refuse)


def scan(a: torch.Tensor, x: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """h[t] = a[t] * h[t-1] + x[t], from h = 0 before the first step; in reverse from the right.

    a, x    (B, T, D), float32; float64, for gradient checks, goes to PyTorch. Slices of a larger
            tensor are read in place; only where neighbouring channels lie apart is there a copy.
    Returns h (B, T, D), differentiable once in a and x. Raises ValueError, TypeError, RuntimeError.
    """
    if x.dim() != 3 or a.shape != x.shape or x.shape[1] == 0:
        raise ValueError(f"a {tuple(a.shape)} and x {tuple(x.shape)} must be one (B, T, D), T at "
                         "least 1; reshape them")
    for name, t in (("a", a), ("x", x)):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {t.dtype}, not float32; pass {name}.float()")
    if a.dtype != x.dtype or a.device != x.device:
        raise TypeError(f"a is {a.dtype} on {a.device}, x {x.dtype} on {x.device}; pass a.to(x)")
    if unpack_dual(a).tangent is not None or unpack_dual(x).tangent is not None:
        raise RuntimeError("scan has no forward-mode derivative; use torch.autograd.grad")
    return torch.ops.birdie.scan(a, x, reverse)


# ---- demonstration -------------------------------------------------------------------------------

def errors(walk, device, reverse):
    """Largest errors of h, da and dx, over the largest value, against the loop in float64."""
    a, x, g = torch.rand(2, 300, 200), torch.randn(2, 300, 200), torch.randn(2, 300, 200)
    a *= torch.rand(2, 300, 1) > 0.1                            # a tenth are resets
    exact = [t.double().requires_grad_() for t in (a, x)]
    h = scan_loop(*exact, reverse)
    want = h, *torch.autograd.grad(h, exact, g.double())
    a, x, g = (t.to(device) for t in (a, x, g))
    h, da, dx = got = [torch.empty_like(x) for _ in range(3)]
    walk(a, x, h, reverse)
    walk(a, g, dx, not reverse, h, da)
    return [((u.cpu() - v).abs().max() / v.abs().max()).item() for u, v in zip(got, want)]


def times(walk, device, shape):
    """Forward, and with backward, over the time that torch.add takes to move 3 and 8 tensors."""
    from torch.utils.benchmark import Timer     # one thread; waits for the GPU; 0.1 s to import

    def seconds(function):
        return Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=0.1).median

    a, x, g, h, da, dx = (torch.rand(shape, device=device) for _ in range(6))
    unit = seconds(lambda: torch.add(a, x, out=h))
    first = seconds(lambda: walk(a, x, h, False))
    second = seconds(lambda: walk(a, g, dx, True, h, da))
    return first / unit, (first + second) / unit * 3 / 8


def main():
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        best, reason, walk = choose(torch.empty(0, device=device).device)
        shapes = ((4, 2048, 1024), (1, 16384, 512))             # (B, T, D)
        if device == "cuda":
            shapes = ((8, 2048, 2560), (1, 131072, 512))
        print(f"{device}: {best} {reason}\nrelative errors; times over that of moving the memory")
        for name, walk in {best: walk, "torch": torch_walk}.items():
            for reverse in (False, True):
                h, da, dx = errors(walk, device, reverse)
                print(f"  {name:6s} reverse={reverse!s:10s}  h {h:.0e}  da {da:.0e}  dx {dx:.0e}")
            for shape in shapes:
                first, both = times(walk, device, shape)
                print(f"  {name:6s} {shape!s:16s}  forward {first:.2f}  with backward {both:.2f}")


if __name__ == "__main__":
    main()
