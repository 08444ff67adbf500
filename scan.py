"""The linear recurrence at the heart of every state space model here, forward and backward.

    h[t] = a[t] * h[t-1] + x[t]                     elementwise, for every sample and channel
    dx[t] = g[t] + a[t+1] * dx[t+1]                 gradients (g = dL/dh): a scan the other way,
    da[t] = dx[t] * h[t-1]                          and one product

Symbols (Birdie, arXiv 2411.01030, sections 2.1, 3.1 and 3.4):
    a        gates, (B, T, D)             x  inputs, (B, T, D)            h  states, (B, T, D)
    B, T, D  batch, length, channels      h0  (B, D), the state before the first step
    reset    uint8 (B, T): where its bit is set, a channel's gate counts as 0, so nothing passes
             RESET_FORWARD   for left-to-right channels: the first token of each sample
             RESET_REVERSE   for right-to-left channels: causal tokens, sample ends, padding
    n_reverse  the last n_reverse channels run right to left (bidirectional layers: D // 2)

Run it:  python scan.py          every backend against the loop, then a timing table

Departures from the paper: it writes the mask as the numbers 1 and 2; here they are bits, because a
sample with an empty prefix needs both on one token. The paper cuts a right-to-left channel only at
causal tokens; here the caller may cut it anywhere, and cuts it at sample ends too.
"""
import math
import statistics
import time
from typing import NamedTuple

import torch

RESET_FORWARD = 1
RESET_REVERSE = 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        steps = [None] * T
        for t in reversed(range(T)) if reverse else range(T):
            carried = a[:, t, channels] * h
            if reset is not None:
                carried = carried.masked_fill((reset[:, t] & bit).bool()[:, None], 0)
            h = steps[t] = carried + x[:, t, channels]
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
    K = T // C                      # chunks; what is left, at most 2 * sqrt(T) steps, comes last
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
    work = torch.promote_types(x.dtype, torch.float32)              # float64 stays, for gradcheck
    out = h if h.dtype == work else torch.empty_like(h, dtype=work)
    for channels, bit, reverse in directions(x.shape[-1], n_reverse):
        state = 0 if h0 is None or reverse else h0[:, channels]
        chunked_scan(cut(a[..., channels].to(work), reset, bit), x[..., channels].to(work),
                     state, out[..., channels], reverse)
    if out is not h:
        h.copy_(out)


def torch_backward(a, h, g, reset, n_reverse, h0, da, dx, dh0):
    """Write da, dx and dh0: the same scan in the other direction, its gates shifted by one step."""
    work = torch.promote_types(h.dtype, torch.float32)
    outs = [t if t.dtype == work else torch.empty_like(t, dtype=work) for t in (da, dx)]
    for channels, bit, reverse in directions(h.shape[-1], n_reverse):
        gate = cut(a[..., channels].to(work), reset, bit)
        grad, H, dA, dX = (t[..., channels] for t in (g.to(work), h, *outs))
        first, last = (-1, 0) if reverse else (0, -1)               # in the forward scan's order
        early, late = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))
        dX[:, last] = grad[:, last]
        if h.shape[1] > 1:
            chunked_scan(gate[:, late], grad[:, early], dX[:, last], dX[:, early], not reverse)
            torch.mul(dX[:, late], H[:, early], out=dA[:, late])
        dA[:, first] = 0
        dh0[:, channels] = 0
        if h0 is not None and not reverse:
            torch.mul(dX[:, first], h0[:, channels], out=dA[:, first])
            torch.mul(dX[:, first], gate[:, first], out=dh0[:, channels])
        if reset is not None:
            dA.masked_fill_((reset & bit).bool().unsqueeze(-1), 0)
    for t, out in zip((da, dx), outs):
        if out is not t:
            t.copy_(out)


# ---- the operator, its gradient, and the public function ------------------------------------------

class Backend(NamedTuple):
    """Which implementation a device gets, and why not a better one ("" if it is the best)."""
    name: str
    reason: str


def backend(device="cpu") -> Backend:
    """The implementation `scan` uses for tensors on `device`."""
    return Backend("torch", "")


@torch.library.custom_op("birdie::scan", mutates_args=(),
                         schema="(Tensor a, Tensor x, Tensor? reset, int n_reverse, Tensor? h0) -> Tensor")
def scan_op(a, x, reset, n_reverse, h0):
    h = x.new_empty(x.shape)
    torch_forward(a, x, reset, n_reverse, h0, h)
    return h


@torch.library.custom_op("birdie::scan_backward", mutates_args=(),
                         schema="(Tensor a, Tensor h, Tensor g, Tensor? reset, int n_reverse, Tensor? h0)"
                                " -> (Tensor, Tensor, Tensor)")
def scan_backward_op(a, h, g, reset, n_reverse, h0):
    out = new_gradients(a, h, g, reset, n_reverse, h0)
    torch_backward(a, h, g, reset, n_reverse, h0, *out)
    return out


@scan_op.register_fake
def new_states(a, x, reset, n_reverse, h0):
    return x.new_empty(x.shape)


@scan_backward_op.register_fake
def new_gradients(a, h, g, reset, n_reverse, h0):
    work = torch.promote_types(h.dtype, torch.float32)
    return a.new_empty(a.shape), h.new_empty(h.shape), h.new_empty((h.shape[0], h.shape[2]), dtype=work)


def remember(ctx, inputs, output):
    a, x, reset, ctx.n_reverse, h0 = inputs
    ctx.save_for_backward(a, output, reset, h0)             # x is not needed


def gradient(ctx, g):
    a, h, reset, h0 = ctx.saved_tensors
    da, dx, dh0 = scan_backward_op(a, h, g, reset, ctx.n_reverse, h0)
    return da, dx, None, None, None if h0 is None else dh0


scan_op.register_autograd(gradient, setup_context=remember)


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
    if x.shape[1] == 1:             # one step of decoding: the loop is faster than any machinery
        return scan_loop(a, x, reset, n_reverse, h0).to(x.dtype)
    if h0 is not None:
        h0 = h0.to(torch.promote_types(x.dtype, torch.float32))
    return scan_op(a, x, reset, n_reverse, h0)


def check(a, x, reset, n_reverse, h0):
    """Raise an error that names the value, the limit and the remedy."""
    if x.dim() != 3 or a.shape != x.shape:
        raise ValueError(f"a {tuple(a.shape)} and x {tuple(x.shape)} must both be (B, T, D); expand or reshape them")
    B, T, D = x.shape
    if x.dtype not in DTYPES:
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

def median_ms(functions, repeats=5):
    """Median milliseconds of each function, called in turn so that noise hits all alike."""
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for f, out in zip(functions, seconds):
            begin = time.perf_counter()
            f()
            out.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(s) for s in seconds]


def main():
    torch.manual_seed(0)
    B, T, D = 2, 300, 24
    a, x, h0 = torch.rand(B, T, D), torch.randn(B, T, D), torch.randn(B, D)
    reset = ((torch.rand(B, T) < 0.05) + 2 * (torch.rand(B, T) < 0.05)).to(torch.uint8)
    g = torch.randn(B, T, D)

    def run(f, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (a, x, h0)]
        h = f(leaves[0], leaves[1], reset, D // 2, leaves[2])
        return [h, *torch.autograd.grad(h, leaves, g.to(dtype))]

    errors = [((u - v).abs().max() / v.abs().max()).item()
              for u, v in zip(run(scan, torch.float32), run(scan_loop, torch.float64))]
    print("largest error, float32 against a float64 loop, relative to the largest value")
    print(f"  {backend().name:6s}" + "".join(f"  {n} {e:.1e}" for n, e in zip(("h", "da", "dx", "dh0"), errors)))

    torch.set_num_threads(1)
    print("\none CPU thread, float32: milliseconds (times torch.add, or times 8/3 of it)")
    for shape in ((4, 2048, 1024), (1, 16384, 512)):
        a, x, g, h = torch.rand(shape), torch.randn(shape), torch.randn(shape), torch.empty(shape)
        grads = torch.empty(shape), torch.empty(shape)
        dh0 = torch.empty(shape[0], shape[2])
        add, forward, back = median_ms([lambda: torch.add(a, x, out=h),
                                        lambda: torch_forward(a, x, None, 0, None, h),
                                        lambda: torch_backward(a, h, g, None, 0, None, *grads, dh0)])
        print(f"  {shape}  torch.add {add:.1f}   {backend().name} forward {forward:.1f} ({forward / add:.1f})"
              f"   forward+backward {forward + back:.1f} ({(forward + back) / add * 3 / 8:.1f})")


if __name__ == "__main__":
    main()
