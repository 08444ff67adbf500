"""The linear recurrence at the heart of every state space model here, forward and backward.

    h[t] = a[t] * h[t-1] + x[t]                 elementwise, for every sample and channel
    dx[t] = g[t] + a[t+1] * dx[t+1]             gradients (g = dL/dh): a scan the other way,
    da[t] = dx[t] * h[t-1]                      and one product

Symbols (Birdie, arXiv 2411.01030, sections 2.1, 3.1 and 3.4):
    a        gates, (B, T, D)         x  inputs, (B, T, D)        h  states, (B, T, D)
    B, T, D  batch, length, channels  h0 (B, D), the state before the first step
    reset    uint8 (B, T): where its bit is set, a channel's gate counts as 0, so nothing passes
             RESET_FORWARD  left-to-right channels: the first token of each sample
             RESET_REVERSE  right-to-left channels: causal tokens, sample ends, padding
    n_reverse  the last n_reverse channels run right to left (bidirectional layers: D // 2)

One kernel, compiled for the graphics card and for the processor, and a fallback in PyTorch. A lane
(a CUDA thread; on the processor, a row of channels in one thread) walks in order through time:

    many lanes (B * D is large)          few: time is cut into chunks, a lane for each
    time ------------------------>       1  every chunk from 0: its end e, the product p of its gates
    lane 0  h h h h h h h h h h h        2  from chunk to chunk: state = e + p * state
    lane 1  h h h h h h h h h h h        3  every chunk again, from its right state
    ...     each reads far ahead            |--e,p--> |--e,p--> |--e,p-->   the same sums in any run

Run it:  python scan.py        every backend against the loop, then a timing table
         SCAN_BACKEND=torch    (or cpp, cuda) chooses a backend for anything that scans

Departures from the paper: it writes the mask as the numbers 1 and 2; here they are bits, because a
sample with an empty prefix needs both on one token. A right-to-left channel may be cut anywhere.
"""
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import NamedTuple

import torch

RESET_FORWARD = 1
RESET_REVERSE = 2
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)        # in the kernel's numbering


# ---- the plain reference: one step at a time, differentiable, slow -------------------------------

def directions(D: int, n_reverse: int):
    """(channels, reset bit, runs right to left) of both halves, leaving out an empty one."""
    split = D - n_reverse
    halves = [(slice(0, split), RESET_FORWARD, False), (slice(split, D), RESET_REVERSE, True)]
    return [half for half in halves if half[0].start < half[0].stop]


def scan_loop(a, x, reset=None, n_reverse=0, h0=None):
    """`scan` as a Python loop over time. Autograd through it is the oracle of the tests."""
    B, T, D = x.shape
    out = []
    for channels, bit, reverse in directions(D, n_reverse):
        h = x.new_zeros(B, channels.stop - channels.start)
        if h0 is not None and not reverse:
            h = h0[:, channels]
        gate, into, steps = a[..., channels].unbind(1), x[..., channels].unbind(1), [None] * T
        for t in reversed(range(T)) if reverse else range(T):
            carried = gate[t] * h
            if reset is not None:
                carried = carried.masked_fill((reset[:, t] & bit).bool()[:, None], 0)
            h = steps[t] = carried + into[t]
        out.append(torch.stack(steps, dim=1))
    return torch.cat(out, dim=-1)


# ---- PyTorch: two levels of sqrt(T) steps, for any device -----------------------------------------

def chunked_scan(a, x, state, h, reverse):
    """h[t] = a[t] * h[t-1] + x[t] from `state`, or from the right; writes h.

    Time is cut into about sqrt(T) chunks, and a step is taken in all of them by one operation:
    first each chunk alone, for its last state e and the product p of its gates; then the chunks
    one after another, state = e + p * state; then all chunks again, from the right start.
    """
    T = x.shape[1]
    C = math.isqrt(T)               # steps in a chunk
    K = T // C                      # chunks; what is left, fewer than C steps, comes last
    rest = range(T - K * C - 1, -1, -1) if reverse else range(K * C, T)
    whole = slice(T - K * C, T) if reverse else slice(0, K * C)
    step = range(C - 1, -1, -1) if reverse else range(C)
    chunk = range(K - 1, -1, -1) if reverse else range(K)
    A, X, H = (t[:, whole].unflatten(1, (K, C)).unbind(2) for t in (a, x, h))      # (B, K, D) each

    start = torch.empty_like(X[0], memory_format=torch.contiguous_format)
    start[:, chunk[0]] = state
    if K > 1:
        e, p = X[step[0]].contiguous().clone(), A[step[0]].contiguous().clone()
        for s in step[1:]:
            torch.addcmul(X[s], A[s], e, out=e)
            p.mul_(A[s])
        e, p, carry = e.unbind(1), p.unbind(1), start.unbind(1)
        for k, following in zip(chunk, chunk[1:]):
            torch.addcmul(e[k], p[k], carry[k], out=carry[following])
    previous = start
    for s in step:
        torch.addcmul(X[s], A[s], previous, out=H[s])
        previous = H[s]
    for t in rest:
        torch.addcmul(x[:, t], a[:, t], h[:, t + 1 if reverse else t - 1], out=h[:, t])


def cut(t, reset, bit):
    """t with zeros where the reset bit is set."""
    return t if reset is None else t.masked_fill((reset & bit).bool().unsqueeze(-1), 0)


def torch_forward(a, x, reset, n_reverse, h0, h):
    """Write h, by PyTorch operations. Storage types below float32 are computed in float32."""
    work = torch.promote_types(x.dtype, torch.float32)          # float64 stays, for gradient checks
    out = h if h.dtype == work else torch.empty_like(h, dtype=work)
    for channels, bit, reverse in directions(x.shape[-1], n_reverse):
        state = 0 if h0 is None or reverse else h0[:, channels]
        chunked_scan(cut(a[..., channels].to(work), reset, bit), x[..., channels].to(work),
                     state, out[..., channels], reverse)
    h.copy_(out)                                                # nothing, if out is h


def torch_backward(a, h, g, reset, n_reverse, h0, da, dx, dh0):
    """Write da, dx and dh0: the same scan in the other direction, its gates shifted by one step."""
    work = torch.promote_types(h.dtype, torch.float32)
    out_a, out_x = (t if t.dtype == work else torch.empty_like(t, dtype=work) for t in (da, dx))
    dh0.zero_()
    for channels, bit, reverse in directions(h.shape[-1], n_reverse):
        gate = cut(a[..., channels].to(work), reset, bit)
        G, H, dA, dX = (t[..., channels] for t in (g.to(work), h, out_a, out_x))
        first, last = (-1, 0) if reverse else (0, -1)           # in the order of the forward scan
        early, late = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))
        dX[:, last], dA[:, first] = G[:, last], 0
        if h.shape[1] > 1:
            chunked_scan(gate[:, late], G[:, early], dX[:, last], dX[:, early], not reverse)
            torch.mul(dX[:, late], H[:, early], out=dA[:, late])
        if h0 is not None and not reverse:
            dA[:, first] = dX[:, first] * h0[:, channels]
            dh0[:, channels] = dX[:, first] * gate[:, first]
        if reset is not None:
            dA.masked_fill_((reset & bit).bool().unsqueeze(-1), 0)
    da.copy_(out_a)
    dx.copy_(out_x)


# ---- the kernel: one source for nvcc and the C++ compiler -----------------------------------------
# No torch header, so it compiles in seconds. The card's lanes are threads of V channels, 16 bytes
# where the layout allows; a warp is a block. What a lane reads in DEPTH steps is on its way into its
# own part of shared memory, so no lane waits for another. The host's lanes are long rows of channels,
# which the compiler turns into vector instructions.

KERNEL = r"""
#include <string.h>
typedef long long i64;
struct Job {                        // field for field what Python passes
    const void *a, *x, *h;          // in backward x is g = dL/dh
    const unsigned char* reset;
    const float* h0;
    void *out, *da;                 // out is h, in backward dx
    float *dh0, *e, *p;             // e, p (B, chunks, D): where a chunk ends, the product of its gates
    void* stream;
    i64 a_type, x_type, B, T, D, n_reverse, a_b, a_t, x_b, x_t, h_b, h_t, reset_b, reset_t;
    i64 backward, chunk, width, vector, threads;
};

#ifdef __CUDACC__
#include <cuda_fp16.h>
#if __CUDA_ARCH__ >= 800
#define END_OF_FETCH asm volatile("cp.async.commit_group;" ::: "memory")
#define WAIT_FOR_ALL_BUT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")
#else
#define END_OF_FETCH
#define WAIT_FOR_ALL_BUT(n)
#endif
#define ANY __host__ __device__ __forceinline__
#define KERNEL __device__ __forceinline__
#define EACH(v) _Pragma("unroll") for (int v = 0; v < V; v++)
struct f16 {                        // torch's compiler flags take away __half's own conversions
    __half value;
    ANY void operator=(float f) { value = __float2half_rn(f); }
    ANY operator float() const { return __half2float(value); }
};
template <class T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Row {     // registers
    T value[V];
    KERNEL T& operator[](int v) { return value[v]; }
    static KERNEL Row of(T*) { return Row(); }
    KERNEL void store(T* to) const { *(Row*)to = *this; }
};
template <class T, int V, int DEPTH> struct Stream {        // this lane's part of the ring
    const T* from; i64 stride; Row<T, V>* ring;
    KERNEL Row<T, V>* slot(i64 i) const { return ring + i % DEPTH * 32 + threadIdx.x; }
    KERNEL Row<T, V> row(i64 i, i64) const { return *slot(i); }
    KERNEL void fetch(i64 i, i64 t) const {
        char *to = (char*)slot(i), *global = (char*)(from + t * stride);
#if __CUDA_ARCH__ >= 800
        const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
        if (sizeof(T) * V == 4)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
        for (int q = 0; q + 16 <= sizeof(T) * V; q += 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared + q), "l"(global + q) : "memory");
        if (sizeof(T) * V >= 4) return;
#endif
        *(Row<T, V>*)to = *(Row<T, V>*)global;
    }
};
#else
typedef _Float16 f16;
#define ANY inline
#define KERNEL inline
#define END_OF_FETCH
#define WAIT_FOR_ALL_BUT(n)
#define EACH(v) _Pragma("omp simd") for (int v = 0; v < n; v++)
template <class T, int V> struct Row {                      // where it lies in memory
    T* value;
    T& operator[](int v) const { return value[v]; }
    static Row of(T* value) { return {value}; }
    void store(T*) const {}
};
template <class T, int V, int DEPTH> struct Stream {
    const T* from; i64 stride; Row<T, V>* ring;
    Row<const T, V> row(i64, i64 t) const { return {from + t * stride}; }
    void fetch(i64, i64) const {}
};
#endif

struct bf16 {                       // the upper half of a float; rounds to the nearest, ties to even
    unsigned short bits;
    ANY void operator=(float f) {
        unsigned u;
        memcpy(&u, &f, 4);
        bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    ANY operator float() const {
        const unsigned u = (unsigned)bits << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
};

ANY i64 ceil_div(i64 n, i64 d) { return (n + d - 1) / d; }
ANY i64 count_lanes(const Job& j, i64 width) {              // no lane mixes samples, chunks, directions
    return j.B * ceil_div(j.T, j.chunk) * (ceil_div(j.D - j.n_reverse, width) + ceil_div(j.n_reverse, width));
}

// `width` channels walk through one chunk of time, in backward against the scan's direction.
// SUMMARY finds only where the chunk would end if it started from zero.
template <bool BACK, bool SUMMARY, class A, class X, int V> KERNEL void walk(const Job& j, i64 lane, i64 width) {
    const i64 split = j.D - j.n_reverse, left = ceil_div(split, width), all = left + ceil_div(j.n_reverse, width);
    const i64 chunks = ceil_div(j.T, j.chunk), b = lane / all / chunks, k = lane / all % chunks;
    const bool reverse = lane % all >= left, leftward = reverse != (bool)j.backward;
    const i64 end = reverse ? j.D : split;
    i64 channel = reverse ? split + (lane % all - left) * width : lane % all * width;
#ifdef __CUDACC__
    channel += threadIdx.x * V;
    const bool active = channel < end;
    if (!active) channel = end - V;                         // reads along, writes nothing
    constexpr int bytes = (sizeof(A) + sizeof(X) * (BACK && !SUMMARY ? 2 : 1)) * V;
    constexpr int DEPTH = 32 * 32 * bytes <= 49152 ? 32 : 16;
    __shared__ __align__(16) char ring[DEPTH * 32 * bytes];
#else
    const int n = width < end - channel ? width : end - channel;
    constexpr bool active = true;
    constexpr int DEPTH = 0;
    char* ring = 0;
#endif
    const i64 begin = k * j.chunk, steps = j.T - begin < j.chunk ? j.T - begin : j.chunk;
    const i64 first = leftward ? begin + steps - 1 : begin, dt = leftward ? -1 : 1;
    const auto inside = [&](i64 t) { return 0 <= t && t < j.T; };

    Stream<A, V, DEPTH> a{(const A*)j.a + b * j.a_b + channel, j.a_t, (Row<A, V>*)ring};
    Stream<X, V, DEPTH> x{(const X*)j.x + b * j.x_b + channel, j.x_t, (Row<X, V>*)(a.ring + DEPTH * 32)};
    Stream<X, V, DEPTH> h{(const X*)j.h + b * j.h_b + channel, j.h_t, x.ring + DEPTH * 32};
    const auto fetch = [&](i64 i) {
        const i64 t = first + i * dt;
        if (i < steps) {
            a.fetch(i, t);
            x.fetch(i, t);
            if (BACK && !SUMMARY) h.fetch(i, inside(t + dt) ? t + dt : t);
        }
        END_OF_FETCH;
    };
    for (i64 i = 0; i < DEPTH; i++) fetch(i);

    float c[V], p[V], h0[V];                                // what is carried on; the product of gates
    const bool has_h0 = j.h0 && !reverse, has_before = j.e && inside(begin - dt * j.chunk);
    EACH(v) {
        p[v] = 1;
        h0[v] = has_h0 ? j.h0[b * j.D + channel + v] : 0;
        c[v] = SUMMARY ? 0 : has_before ? j.e[(b * chunks + k - dt) * j.D + channel + v] : BACK ? 0 : h0[v];
    }
    for (i64 i = 0; i < steps; i++) {
        const i64 t = first + i * dt, here = (b * j.T + t) * j.D + channel;
        const bool cut = j.reset && j.reset[b * j.reset_b + t * j.reset_t] & (reverse ? 2 : 1);
        WAIT_FOR_ALL_BUT(DEPTH - 1);
        auto gate = a.row(i, t);
        auto in = x.row(i, t);
        if constexpr (SUMMARY) {
            EACH(v) {
                const float f = cut ? 0.f : (float)gate[v];
                c[v] = BACK ? f * ((float)in[v] + c[v]) : f * c[v] + (float)in[v];
                p[v] *= f;
            }
        } else if constexpr (BACK) {
            const bool edge = !inside(t + dt);              // the state before this one is h0
            auto state = h.row(i, edge ? t : t + dt);
            auto dx = Row<X, V>::of((X*)j.out + here);
            auto da = Row<A, V>::of((A*)j.da + here);
            EACH(v) {
                const float d = (float)in[v] + c[v], stored = state[v];
                const float d_gate = cut ? 0.f : d * (edge ? h0[v] : stored);
                c[v] = cut ? 0.f : (float)gate[v] * d;
                dx[v] = d;
                da[v] = d_gate;
            }
            if (active) dx.store((X*)j.out + here), da.store((A*)j.da + here);
        } else {
            auto y = Row<X, V>::of((X*)j.out + here);
            EACH(v) {
                c[v] = (cut ? 0.f : (float)gate[v] * c[v]) + (float)in[v];
                y[v] = c[v];
            }
            if (active) y.store((X*)j.out + here);
        }
        fetch(i + DEPTH);
    }
    if (!active) return;
    if (SUMMARY) EACH(v) {
        j.e[(b * chunks + k) * j.D + channel + v] = c[v];
        j.p[(b * chunks + k) * j.D + channel + v] = p[v];
    }
    else if (BACK && !inside(first + steps * dt)) EACH(v) j.dh0[b * j.D + channel + v] = has_h0 ? c[v] : 0;
}

#ifdef __CUDACC__
template <bool BACK, bool SUMMARY, class A, class X, int V>
__global__ void __launch_bounds__(32) lanes(Job j) { walk<BACK, SUMMARY, A, X, V>(j, blockIdx.x, 32 * V); }
#endif
template <bool BACK, bool SUMMARY, class A, class X> int launch(const Job& j) {
#ifdef __CUDACC__
    constexpr int V = 16 / sizeof(X);
    const i64 blocks = count_lanes(j, j.vector ? 32 * V : 32);
    if (blocks >> 31) return cudaErrorInvalidConfiguration;
    const auto kernel = j.vector ? lanes<BACK, SUMMARY, A, X, V> : lanes<BACK, SUMMARY, A, X, 1>;
    kernel<<<blocks, 32, 0, (cudaStream_t)j.stream>>>(j);
    return cudaGetLastError();
#else
    const i64 lanes = count_lanes(j, j.width);
#pragma omp parallel for num_threads(j.threads) schedule(dynamic) if (j.threads > 1 && lanes > 1)
    for (i64 lane = 0; lane < lanes; lane++) walk<BACK, SUMMARY, A, X, 4096>(j, lane, j.width);
    return 0;
#endif
}
template <bool BACK, bool SUMMARY> int dispatch(const Job& j) {
    switch (j.a_type * 3 + j.x_type) {                      // float 0, bfloat16 1, float16 2
        case 0: return launch<BACK, SUMMARY, float, float>(j);
        case 1: return launch<BACK, SUMMARY, float, bf16>(j);
        case 2: return launch<BACK, SUMMARY, float, f16>(j);
        case 4: return launch<BACK, SUMMARY, bf16, bf16>(j);
        default: return launch<BACK, SUMMARY, f16, f16>(j);
    }
}
extern "C" int birdie_scan(const Job* job) {                // 0, or an error of the CUDA runtime
    const Job& j = *job;
    if (j.chunk < j.T) {
        Job carry = j;                                      // from chunk to chunk: itself a scan
        carry.a = j.p, carry.x = carry.out = j.e, carry.e = 0, carry.reset = 0;
        carry.T = carry.chunk = ceil_div(j.T, j.chunk), carry.a_type = carry.x_type = 0;
        carry.a_t = carry.x_t = j.D, carry.a_b = carry.x_b = carry.T * j.D;
        if (j.backward) carry.h0 = 0;
        int error = j.backward ? dispatch<true, true>(j) : dispatch<false, true>(j);
        if (!error) error = launch<false, false, float, float>(carry);
        if (error) return error;
    }
    return j.backward ? dispatch<true, false>(j) : dispatch<false, false>(j);
}
"""


class Job(ctypes.Structure):
    """The arguments of one call, as the kernel's struct Job has them."""
    _fields_ = [(name, ctypes.c_void_p) for name in "a x h reset h0 out da dh0 e p stream".split()] + [
        (name, ctypes.c_int64) for name in "a_type x_type B T D n_reverse a_b a_t x_b x_t h_b h_t "
                                           "reset_b reset_t backward chunk width vector threads".split()]


def build(kind):
    """The compiled kernel's file, named by torch, compiler, flags, processor and source.

    Each process builds in a folder of its own and moves the result into place in one step, so no
    lock is ever waited for, and processes that start together do not disturb each other.
    """
    from torch.utils import cpp_extension
    cuda, flags, links = cpp_extension.CUDA_HOME, ["-O3", "-std=c++17"], []
    if kind == "cuda":
        if cuda is None:
            raise RuntimeError("no CUDA toolkit (nvcc) found; install one or set CUDA_HOME")
        compiler, target = f"{cuda}/bin/nvcc", "{}{}".format(*torch.cuda.get_device_capability())
        flags, links = [*flags, f"-arch=sm_{target}"], [f"-Wl,-rpath,{cuda}/lib64"]
    else:
        compiler, info = cpp_extension.get_cxx_compiler(), pathlib.Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        target = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
        flags += ["-march=native"] + ["-fopenmp"] * (sys.platform != "darwin")      # Apple's has no OpenMP
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join([torch.__version__, version, *flags, target, KERNEL]).encode()).hexdigest()
    name = f"birdie_scan_{kind}_{key[:16]}"
    root = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = root / f"{name}.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=name, dir=root) as folder:
            source = pathlib.Path(folder, "scan.cu" if kind == "cuda" else "scan.cpp")
            source.write_text(KERNEL)
            if cpp_extension.is_ninja_available():
                cpp_extension.load(name, [str(source)], extra_cflags=flags, extra_cuda_cflags=flags,
                                   extra_ldflags=links, build_directory=folder, is_python_module=False)
            else:                       # which load cannot do without; the same command, run here
                shared = ["-Xcompiler", "-fPIC"] if kind == "cuda" else ["-fPIC"]
                subprocess.run([compiler, *flags, *shared, "-shared", str(source), "-o", f"{folder}/{name}.so"],
                               capture_output=True, text=True, check=True)
            os.replace(pathlib.Path(folder, f"{name}.so"), library)
    return library


@functools.cache
def load(kind):
    """(the kernel, "") or (None, why there is none), found out once; the reason is printed."""
    try:
        return ctypes.CDLL(str(build(kind))), ""
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error) or type(error).__name__
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0])
        print(f"scan: no {kind} kernel, using PyTorch, which is slower: {reason}", file=sys.stderr)
        return None, reason


class Backend(NamedTuple):
    name: str           # cuda, cpp or torch
    reason: str         # why it is not the device's best one; empty if it is


def backend(device="cpu") -> Backend:
    """Which implementation `scan` uses for tensors on `device`, and why not a better one."""
    device, forced = torch.device(device), os.environ.get("SCAN_BACKEND", "")
    best = {"cpu": "cpp", "cuda": "cuda"}.get(device.type, "torch")
    on_gpu_too = forced == "cuda" and torch.cuda.is_available()     # what stays on the CPU then, has its best
    if forced not in ("", "torch", best) and not on_gpu_too:
        raise ValueError(f"SCAN_BACKEND={forced} cannot run on {device}; use {best} or torch, or unset it")
    if forced == "torch" or best == "torch":
        return Backend("torch", "SCAN_BACKEND=torch" if forced else f"no kernel for {device.type}")
    kernel, reason = load(best)
    if kernel is None and forced == best:
        raise ValueError(f"SCAN_BACKEND={forced} has no kernel: {reason}")
    return Backend("torch" if kernel is None else best, reason)


def chunk_length(x):
    """Steps of a chunk: all of them if the lanes alone can keep the memory busy (estimate: 40 KB a step)."""
    B, T, D = x.shape
    if x.device.type == "cpu" or B * D * x.element_size() >= 40_000 or T < 256:
        return T
    return max(64, -(-T * B * D // 65536))              # about 65536 pieces of work; our choice


def run_kernel(a, x, h, reset, n_reverse, h0, out, da=None, dh0=None):
    """Forward: from x to out = h. Backward: from x = g to out = dx, da and dh0."""
    if x.numel() == 0:
        return
    B, T, D = x.shape
    a, x, h = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, x, h))
    V, threads, chunk = 16 // x.element_size(), torch.get_num_threads(), chunk_length(x)
    bytes_apart = [n for t in (a, x, h, out, a if da is None else da)
                   for n in (t.data_ptr(), *(s * t.element_size() for s in t.stride()[:2]))]
    parts = 1 if threads == 1 else -(-4 * threads // B)         # of a row, so that every thread has work
    e, p = torch.empty(2, B, -(-T // chunk), D, device=x.device) if chunk < T else (None, None)
    tensors = {"a": a, "x": x, "h": h, "reset": reset, "h0": h0, "out": out, "da": da, "dh0": dh0, "e": e, "p": p}
    job = Job(**{name: t.data_ptr() for name, t in tensors.items() if t is not None},
              **{f"{name}_{axis}": tensors[name].stride(dim) for name in ("a", "x", "h", "reset")
                 if tensors[name] is not None for dim, axis in enumerate("bt")},
              a_type=KERNEL_TYPES.index(a.dtype), x_type=KERNEL_TYPES.index(x.dtype), B=B, T=T, D=D,
              n_reverse=n_reverse, backward=da is not None, chunk=chunk, threads=threads,
              vector=all(n % 16 == 0 for n in bytes_apart) and D % V == 0 and n_reverse % V == 0,
              width=min(4096, max(128, -(-D // parts))))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        job.stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        error = load("cuda" if x.is_cuda else "cpp")[0].birdie_scan(ctypes.byref(job))
    if error:
        raise RuntimeError(f"scan kernel on {x.device}: CUDA error {error} for x {tuple(x.shape)}")


def kernel_forward(a, x, reset, n_reverse, h0, h):
    run_kernel(a, x, x, reset, n_reverse, h0, h)


def kernel_backward(a, h, g, reset, n_reverse, h0, da, dx, dh0):
    run_kernel(a, g, h, reset, n_reverse, h0, dx, da, dh0)


def implementation(x):
    """(forward, backward) for x, which write what they compute. Float64, for gradient checks, is PyTorch's."""
    if x.dtype not in KERNEL_TYPES or backend(x.device).name == "torch":
        return torch_forward, torch_backward
    return kernel_forward, kernel_backward


# ---- the operator, its gradient, and the public function ------------------------------------------

torch.library.define("birdie::scan", "(Tensor a, Tensor x, Tensor? reset, int n_reverse, Tensor? h0) -> Tensor")
torch.library.define("birdie::scan_backward", "(Tensor a, Tensor h, Tensor g, Tensor? reset, int n_reverse, "
                                              "Tensor? h0) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("birdie::scan")
def new_states(a, x, reset, n_reverse, h0):
    return x.new_empty(x.shape)


@torch.library.register_fake("birdie::scan_backward")
def new_gradients(a, h, g, reset, n_reverse, h0):
    work = torch.promote_types(h.dtype, torch.float32)
    return a.new_empty(a.shape), h.new_empty(h.shape), h.new_empty((h.shape[0], h.shape[2]), dtype=work)


@torch.library.impl("birdie::scan", "default")
def forward(a, x, reset, n_reverse, h0):
    h = new_states(a, x, reset, n_reverse, h0)
    implementation(x)[0](a, x, reset, n_reverse, h0, h)
    return h


@torch.library.impl("birdie::scan_backward", "default")
def backward(a, h, g, reset, n_reverse, h0):
    gradients = new_gradients(a, h, g, reset, n_reverse, h0)
    implementation(h)[1](a, h, g, reset, n_reverse, h0, *gradients)
    return gradients


def remember(ctx, inputs, output):
    a, x, reset, ctx.n_reverse, h0 = inputs
    ctx.save_for_backward(a, output, reset, h0)             # x is not needed


def differentiate(ctx, g):
    a, h, reset, h0 = ctx.saved_tensors
    da, dx, dh0 = torch.ops.birdie.scan_backward(a, h, g, reset, ctx.n_reverse, h0)
    return da, dx, None, None, None if h0 is None else dh0


torch.library.register_autograd("birdie::scan", differentiate, setup_context=remember)


def scan(a: torch.Tensor, x: torch.Tensor, reset: torch.Tensor | None = None, n_reverse: int = 0,
         h0: torch.Tensor | None = None) -> torch.Tensor:
    """h[t] = a[t] * h[t-1] + x[t] for every sample and channel, accumulated in float32.

    a, x       (B, T, D), float32, bfloat16 or float16; `a` may stay float32 beside a 16-bit x
               (bfloat16 rounds every gate above 0.998 to 1). Any strides.
    reset      uint8 (B, T) of RESET_FORWARD and RESET_REVERSE bits, or None
    n_reverse  how many channels, the last ones, run right to left (section 3.1)
    h0         (B, D), state before the first step; entries of right-to-left channels are ignored
    Returns h (B, T, D) in x's type, differentiable in a, x and h0. Raises ValueError or TypeError.
    """
    check(a, x, reset, n_reverse, h0)
    work = torch.promote_types(x.dtype, torch.float32)
    h0 = None if h0 is None else h0.to(work).contiguous()
    if x.shape[1] == 1:             # one step of decoding: the loop is faster than any machinery
        return scan_loop(a.to(work), x.to(work), reset, n_reverse, h0).to(x.dtype)
    return torch.ops.birdie.scan(a, x, reset, n_reverse, h0)


def check(a, x, reset, n_reverse, h0):
    """Raise an error that names the value, the limit and the remedy."""
    if x.dim() != 3 or a.shape != x.shape:
        raise ValueError(f"a {tuple(a.shape)} and x {tuple(x.shape)} must both be (B, T, D); reshape them")
    B, T, D = x.shape
    if x.dtype not in (*KERNEL_TYPES, torch.float64):
        raise TypeError(f"x is {x.dtype}; use float32, bfloat16 or float16")
    if a.dtype != x.dtype and not (a.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"a is {a.dtype} beside an x of {x.dtype}; give both one type, or a in float32")
    if T == 0:
        raise ValueError(f"x {tuple(x.shape)} has no time step; T must be at least 1")
    if not 0 <= n_reverse <= D:
        raise ValueError(f"n_reverse {n_reverse} is outside 0..{D}, the number of channels; pass D // 2 for half")
    if reset is not None and reset.dtype != torch.uint8:
        raise TypeError(f"reset is {reset.dtype}; pass reset.to(torch.uint8), RESET_FORWARD | RESET_REVERSE bits")
    if reset is not None and reset.shape != (B, T):
        raise ValueError(f"reset {tuple(reset.shape)} must be (B, T) = {(B, T)}")
    if h0 is not None and h0.shape != (B, D):
        raise ValueError(f"h0 {tuple(h0.shape)} must be (B, D) = {(B, D)}, reverse channels included (ignored)")
    for name, t in (("a", a), ("reset", reset), ("h0", h0)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}; move them to one device")


# ---- demonstration ---------------------------------------------------------------------------------

def peers(device):
    """(name, scan) of other packages, where installed, with the copies that their layouts need."""
    if find_spec("mambapy"):
        from mambapy.pscan import pscan
        yield "mambapy", lambda a, x: pscan(a[..., None], x[..., None])[..., 0]
    if find_spec("accelerated_scan") and device == "cuda":
        from accelerated_scan.warp import scan as warp
        yield "accelerated-scan", lambda a, x: warp(a.mT.contiguous(), x.mT.contiguous()).mT
    if find_spec("fla") and device == "cuda":
        from fla.ops.hgrn import fused_recurrent_hgrn
        yield "fla hgrn", lambda a, x: fused_recurrent_hgrn(x, a.log())[0]


def median_ms(functions, device):
    """Median milliseconds of each function, called in turn so that noise hits all alike."""
    calls, times = 20 if device == "cuda" else 1, [[] for _ in functions]
    for _ in range(6):
        for f, out in zip(functions, times):
            begin = time.perf_counter()
            for _ in range(calls):
                f()
            if device == "cuda":
                torch.cuda.synchronize()
            out.append(1000 * (time.perf_counter() - begin) / calls)
    return [statistics.median(t[1:]) for t in times]            # the first turn warms up


def show_errors(backends, device):
    """Each backend against the loop in float64: resets, both directions and h0 at once."""
    B, T, D = 2, 300, 32
    a, x, h0, g = torch.rand(B, T, D), torch.randn(B, T, D), torch.randn(B, D), torch.randn(B, T, D)
    reset = torch.randint(40, (B, T)).to(torch.uint8)
    reset *= reset < 4                                          # a tenth of the steps, any bits
    exact = [t.double().requires_grad_() for t in (a, x, h0)]
    h = scan_loop(exact[0], exact[1], reset, D // 2, exact[2])
    want = [h, *torch.autograd.grad(h, exact, g.double())]
    a, x, h0, g, reset = (t.to(device) for t in (a, x, h0, g, reset))
    for name, (forward, backward) in backends.items():
        h, da, dx, dh0 = got = [torch.empty_like(t) for t in (x, a, x, h0)]
        forward(a, x, reset, D // 2, h0, h)
        backward(a, h, g, reset, D // 2, h0, da, dx, dh0)
        error = [((u.cpu() - v).abs().max() / v.abs().max()).item() for u, v in zip(got, want)]
        print(f"  {name:5s}  h {error[0]:.0e}  da {error[1]:.0e}  dx {error[2]:.0e}  dh0 {error[3]:.0e}")


def show_times(backends, device, shape, dtype):
    """Times, as multiples of what reading and writing takes: 3 tensors forward, 5 more backward."""
    a, x, g, h, da, dx = (torch.rand(shape, device=device, dtype=dtype) for _ in range(6))
    dh0, leaves = torch.empty(shape[0], shape[2], device=device), [t.clone().requires_grad_() for t in (a, x)]
    functions = [(lambda: h.copy_(x)) if device == "cuda" else lambda: torch.add(a, x, out=h)]
    for forward, backward in backends.values():
        functions += [functools.partial(forward, a, x, None, 0, None, h),
                      functools.partial(backward, a, h, g, None, 0, None, da, dx, dh0)]
    called = {"scan, called": scan, **dict(peers(device))}      # with allocations and autograd
    for f in called.values():
        functions += [lambda f=f: f(a, x), lambda f=f: torch.autograd.grad(f(*leaves), leaves, g)]
    unit, *ms = median_ms(functions, device)
    unit *= 1.5 if device == "cuda" else 1                      # a copy moves 2 tensors
    print(f"  {shape} {str(dtype)[6:]}: 3 tensors in {unit:.3f} ms")
    for i, name in enumerate([*backends, *called]):
        first, both = ms[2 * i], ms[2 * i + 1] + (ms[2 * i] if name in backends else 0)
        print(f"    {name:16s}  forward {first:8.3f} ms = {first / unit:5.2f}"
              f"    forward and backward {both:8.3f} ms = {both / unit * 3 / 8:5.2f} x 8/3")


def main():
    torch.manual_seed(0)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        best, threads = backend(device), torch.get_num_threads()
        print(f"{device}: {best.name} {best.reason}")
        backends = {best.name: implementation(torch.empty(0, device=device)),
                    "torch": (torch_forward, torch_backward)}
        print("largest error in float32 against a float64 loop, relative to the largest value")
        show_errors(backends, device)
        print("times the memory limit" + (", one thread" if device == "cpu" else ""))
        torch.set_num_threads(1)
        cpu = [((4, 2048, 1024), torch.float32), ((1, 16384, 512), torch.float32)]
        gpu = [(shape, dtype) for shape in ((8, 2048, 2560), (16, 2048, 1536), (1, 131072, 512))
               for dtype in (torch.float32, torch.bfloat16)]
        for shape, dtype in cpu if device == "cpu" else gpu:
            show_times(backends, device, shape, dtype)
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
