"""The scan equals a plain loop in float64, forward and backward, on every backend; and its kernel
builds quickly, alone or beside other processes, or says in one line why not.

    python -m pytest tests/test_scan.py          (runs the GPU's kernel too where there is a GPU)
"""
import ctypes
import functools
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import scan as S

ROOT = pathlib.Path(S.__file__).parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.delenv("SCAN_BACKEND", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "cpp", "cuda"])
def device(request, monkeypatch):
    """The device of each backend in turn, which is then the one that `scan` uses."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here: run this file where there is one")
    if request.param == "cpp":
        need_compiler()
    if request.param == "torch":
        monkeypatch.setenv("SCAN_BACKEND", "torch")
    return "cuda" if request.param == "cuda" else "cpu"


def need_compiler():
    name, reason = S.backend("cpu")
    if name != "cpp":
        pytest.skip(f"no C++ kernel: {reason}")


def with_gradients(f, a, x, g, reverse, device="cpu", dtype=torch.float32):
    """[h, da, dx] of f, which scans in dtype on device."""
    a, x = (t.detach().to(device, dtype).requires_grad_() for t in (a, x))
    h = f(a, x, reverse)
    return [h.detach(), *torch.autograd.grad(h, (a, x), g.to(device, dtype))]


def assert_close(got, want, what=""):
    """Within 3e-6 of float64, relative to the largest value, or to 1 where all are smaller."""
    for name, u, v in zip(("h", "da", "dx"), got, want):
        error = ((u.cpu().double() - v).abs().max() / v.abs().max().clamp(min=1)).item()
        assert error <= 3e-6, f"{name} off by {error:.1e} {what}"


# The test to copy for a scan of your own: the same numbers as the loop, and the same gradients.
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_equals_the_loop(device, reverse):
    a, x, g = torch.rand(2, 100, 33), torch.randn(2, 100, 33), torch.randn(2, 100, 33)
    want = with_gradients(S.scan_loop, a, x, g, reverse, dtype=torch.float64)
    assert_close(with_gradients(S.scan, a, x, g, reverse, device), want)


def test_an_example_by_hand(device):
    """Half of what was, plus what comes in; the gate of 0 lets nothing pass."""
    a = torch.tensor([0.5, 0.5, 0.0, 0.5]).view(1, 4, 1)
    x = torch.tensor([8.0, 2.0, 4.0, 1.0]).view(1, 4, 1)
    h, da, dx = with_gradients(S.scan, a, x, torch.ones(1, 4, 1), False, device)
    assert h.flatten().tolist() == [8, 6, 4, 3]
    assert dx.flatten().tolist() == [1.5, 1, 1.5, 1]            # 1 here, and a half of what follows
    assert da.flatten().tolist() == [0, 8, 9, 4]                # dx times the state before
    assert S.scan(a.to(device), x.to(device), reverse=True).flatten().tolist() == [10, 4, 4, 1]


def random_case(seed, lengths=(1, 2, 3, 7, 16, 17, 18, 31, 32, 33, 34, 49, 50, 65)):
    """(a, x, g, reverse) of one random scan: sizes, gates, resets, strides."""
    r = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=r))]

    B, T, D = pick(1, 2, 3), pick(*lengths), pick(1, 2, 3, 5, 8, 13, 40, 129)
    a = torch.rand(B, T, D, generator=r)
    a = pick(a, a * 1e-3, 1 - a * 1e-3, a * 0, a * 0 + 1, (a * 3).floor() / 2)  # last: 0, 0.5, 1
    a = a * (torch.rand(B, T, 1, generator=r) >= pick(0.0, 0.0, 0.1, 0.5))      # resets
    x, g = torch.randn(2, B, T, D, generator=r)
    if pick(True, False):       # strides that a transpose, a projection's part and a sum leave
        axes = pick((1, 2), (0, 1))
        a = a.transpose(*axes).contiguous().transpose(*axes)
        x = torch.cat([x, x, x], -1)[..., D:2 * D]
        g = pick(g[:, :, :1], g[:, :1], g[:1]).expand(B, T, D)
    return a, x, g, pick(False, True)


@functools.cache
def loop_result(seed):
    return with_gradients(S.scan_loop, *random_case(seed), dtype=torch.float64)


def assert_equals_loop(seed, device, what=""):
    got = with_gradients(S.scan, *random_case(seed), device)
    assert_close(got, loop_result(seed), f"(seed {seed}{what})")


def test_two_thousand_random_cases_equal_the_loop(device):
    for seed in range(2000):
        assert_equals_loop(seed, device)


@pytest.mark.parametrize("width", [1, 40])
def test_two_thousand_random_cases_in_chunks_equal_the_loop(width, monkeypatch):
    """Width 1 is what a GPU's threads do, compiled for the CPU; 40 cuts rows of channels too."""
    need_compiler()
    for seed in range(2000):
        chunk = (2, 3, 16, 17, 33, 100)[seed % 6]
        monkeypatch.setattr(S, "divide", lambda x: (min(chunk, x.shape[1]), width))
        assert_equals_loop(seed, "cpu", f", chunk {chunk}")


@pytest.mark.parametrize("length", [1000, 1023, 1025, 10001])
def test_long_sequences_equal_the_loop(device, length, monkeypatch):
    a, (x, g) = 1 - torch.rand(1, length, 3) / 100, torch.randn(2, 1, length, 3)
    for reverse in (False, True):
        want = with_gradients(S.scan_loop, a, x, g, reverse, dtype=torch.float64)
        assert_close(with_gradients(S.scan, a, x, g, reverse, device), want)
        with monkeypatch.context() as patch:
            patch.setattr(S, "divide", lambda x: (min(128, x.shape[1]), 1))
            assert_close(with_gradients(S.scan, a, x, g, reverse, device), want, "(chunks of 128)")


def test_chunks_are_float32_whatever_torchs_default_is(monkeypatch):
    need_compiler()
    monkeypatch.setattr(S, "divide", lambda x: (16, 1))
    a, x, g = torch.rand(2, 100, 33), torch.randn(2, 100, 33), torch.randn(2, 100, 33)
    want = with_gradients(S.scan_loop, a, x, g, False, dtype=torch.float64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = with_gradients(S.scan, a, x, g, False, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(got, want)


def test_a_gate_of_zero_isolates_both_sides_bit_for_bit(device):
    """Two packed samples: changing one changes no output and no gradient of the other."""
    cut = 37
    for reverse, closed in ((False, cut), (True, cut - 1)):     # the first step of the later sample
        for side, other in ((slice(0, cut), slice(cut, 70)), (slice(cut, 70), slice(0, cut))):
            case = torch.rand(3, 2, 70, 6)                      # a, x, g
            changed = case.clone()
            changed[:, :, other] = torch.rand_like(changed[:, :, other])
            case[0, :, closed] = changed[0, :, closed] = 0
            first = with_gradients(S.scan, *case, reverse, device)
            second = with_gradients(S.scan, *changed, reverse, device)
            for t in (first[1], second[1]):
                t[:, closed] = 0            # the closed gate's gradient, a product of both sides
            for u, v in zip(first, second):
                assert torch.equal(u[:, side], v[:, side])
                assert not torch.equal(u[:, other], v[:, other])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_not_even_an_infinity_crosses_a_reset(device, reverse, value, monkeypatch):
    """In h of the samples after it, in dx of those before it, in any chunk."""
    a, x, g = torch.rand(2, 90, 40), torch.randn(2, 90, 40), torch.randn(2, 90, 40)
    for t in (30, 60):                          # three samples, the bad one in the middle
        a[:, t - reverse] = 0
    bad = slice(30, 60)
    for chunk in (90, 16, 7):
        monkeypatch.setattr(S, "divide", lambda x: (chunk, 40) if not x.is_cuda else (chunk, 1))
        want = with_gradients(S.scan_loop, a, x, g, reverse, dtype=torch.float64)
        x_bad, g_bad = x.clone(), g.clone()
        x_bad[:, 45], g_bad[:, 45] = value, value
        h, _, dx = with_gradients(S.scan, a, x_bad, g_bad, reverse, device)
        for u, v in ((h, want[0]), (dx, want[2]), (S.scan_loop(a, x_bad, reverse), want[0])):
            assert not u[:, bad].isfinite().all()
            for sample in (slice(0, 30), slice(60, 90)):
                assert_close([u[:, sample]], [v[:, sample]])


def test_threads_and_repetition_change_no_bit(device):
    case = torch.rand(3, 2, 300, 700)                           # a, x, g
    first = with_gradients(S.scan, *case, False, device)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for u, v in zip(first, with_gradients(S.scan, *case, False, device)):
            assert torch.equal(u, v)


def test_offsets_beyond_two_to_the_31(monkeypatch):
    """Steps 2^30 floats apart, in memory that is reserved but, save for a few pages, never used."""
    need_compiler()
    try:
        far = torch.empty(2 ** 32)
    except RuntimeError:
        pytest.skip("this machine does not reserve 16 GB")
    tensors = [far[i * 64:].as_strided((1, 4, 50), (1, 2 ** 30 - 1000, 1)) for i in range(6)]
    a, x, g, h, da, dx = tensors
    for t in (a, x, g):
        t.copy_(torch.rand(1, 4, 50))
    walk = S.choose(torch.device("cpu"))[2]
    for reverse in (False, True):
        want = with_gradients(S.scan_loop, a, x, g, reverse, dtype=torch.float64)
        for width in (1, 128):
            monkeypatch.setattr(S, "divide", lambda x: (min(3, x.shape[1]), width))
            walk(a, x, h, reverse)
            walk(a, g, dx, not reverse, h, da)
            assert_close((h, da, dx), want)


def test_gradcheck():
    a, x = (torch.rand(2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in "ax")
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda a, x: S.scan(a, x, reverse), (a, x))


def test_opcheck(device):
    a, x, g = torch.rand(3, 2, 20, 6, device=device)[..., 1:5]
    torch.library.opcheck(torch.ops.birdie.scan_backward.default, (a, x, g, True))
    leaves = a.detach().requires_grad_(), x.detach().requires_grad_()
    torch.library.opcheck(torch.ops.birdie.scan.default, (*leaves, False))


def test_compiles_without_a_graph_break(device):
    case = random_case(3)
    compiled = torch.compile(S.scan, fullgraph=True, backend="aot_eager")
    for u, v in zip(with_gradients(compiled, *case, device), with_gradients(S.scan, *case, device)):
        assert torch.equal(u, v)


def test_derivatives_that_it_lacks_raise_instead_of_being_zero(device):
    a, x = torch.rand(1, 4, 2, device=device).requires_grad_(), torch.rand(1, 4, 2, device=device)
    da, = torch.autograd.grad(S.scan(a, x).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        da.sum().backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(S.scan, (a.detach(), x), (x, x))


def test_no_rows_and_no_channels(device):
    for shape in ((0, 5, 4), (2, 5, 0)):
        empty = torch.empty(shape)
        assert with_gradients(S.scan, empty, empty, empty, False, device)[1].shape == shape


def test_errors_name_the_value_and_the_remedy(monkeypatch):
    a = torch.rand(2, 5, 4)
    for arguments, error, words in (
            ((a, a[:, :4]), ValueError, "(2, 4, 4) must be one (B, T, D)"),
            ((a[0], a[0]), ValueError, "(5, 4) must be one (B, T, D)"),
            ((a[:, :0], a[:, :0]), ValueError, "T at least 1"),
            ((a.bfloat16(), a), TypeError, "a is torch.bfloat16, not float32; pass a.float()"),
            ((a, a.half()), TypeError, "pass x.float()"),
            ((a.int(), a.int()), TypeError, "int32"),
            ((a, a.double()), TypeError, "pass a.to(x)"),
            ((a, a.to("meta")), TypeError, "on meta; pass a.to(x)")):
        with pytest.raises(error, match=re.escape(words)):
            S.scan(*arguments)
    monkeypatch.setenv("SCAN_BACKEND", "triton")
    with pytest.raises(ValueError, match="SCAN_BACKEND=triton is unknown; set it to torch"):
        S.scan(a, a)


# ---- building ------------------------------------------------------------------------------------

def build(monkeypatch, folder, compiler="c++"):
    """(name, reason, walk) as a new process would find them with this folder and compiler."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("CXX", str(compiler))
    return S.load.__wrapped__(torch.device("cpu"))


def start(folder):
    """A process that scans once and prints its backend and the seconds that took."""
    code = ("import time, torch, scan; begin = time.time(); x = torch.ones(1, 3, 2); "
            "assert scan.scan(x, x)[0, 2, 1] == 3; "
            "print(scan.backend('cpu')[0], time.time() - begin)")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_four_processes_build_at_once_despite_stale_locks_and_the_next_starts_quickly(
        tmp_path, monkeypatch):
    need_compiler()
    build(monkeypatch, tmp_path / "first")
    library, = (tmp_path / "first").glob("*.so")
    for place in (tmp_path, tmp_path / library.stem, tmp_path / f"{library.stem}abc"):
        place.mkdir(exist_ok=True)
        (place / "lock").touch()                                # as a killed build leaves it behind
    for process in [start(tmp_path) for _ in range(4)]:
        out, err = process.communicate(timeout=60)
        assert out.startswith("cpp") and float(out.split()[1]) < 15, out + err
    begin = time.perf_counter()
    assert build(monkeypatch, tmp_path)[0] == "cpp" and time.perf_counter() - begin < 1
    assert [path.name for path in tmp_path.glob("*.so")] == [library.name]


def test_a_damaged_build_is_built_again(tmp_path):
    """Loading half a library would end the process with a bus error."""
    need_compiler()
    assert start(tmp_path).communicate(timeout=100)[0].startswith("cpp")
    library, = tmp_path.glob("birdie_scan_*.so")
    whole = library.read_bytes()
    for content in (whole[:len(whole) // 2], b"", whole[:5000] + b"x" + whole[5001:]):
        library.write_bytes(content)
        assert start(tmp_path).communicate(timeout=100)[0].startswith("cpp")
        with open(library, "rb") as file:
            assert S.is_sealed(file)


def test_a_compiler_of_two_words_and_one_without_openmp_build(tmp_path, monkeypatch):
    need_compiler()
    without = tmp_path / "c++"
    without.write_text('#!/bin/sh\ncase "$*" in *-fopenmp) exit 1;; esac\nexec c++ "$@"\n')
    without.chmod(0o755)
    assert build(monkeypatch, tmp_path / "1", "env c++")[0] == "cpp"
    assert build(monkeypatch, tmp_path / "2", without)[0] == "cpp"


def test_without_a_build_it_falls_back_and_says_why_in_one_line(tmp_path, monkeypatch, capsys):
    need_compiler()
    monkeypatch.setattr(S, "KERNEL", "this is not C++")
    for folder, compiler, why in ((tmp_path, "/no/such/compiler", "No such file or directory"),
                                  ("/dev/null/no", "c++", "Not a directory"),
                                  (tmp_path, "c++", "error: ")):        # the compiler's first
        name, reason, walk = build(monkeypatch, folder, compiler)
        line = f"scan: using PyTorch on cpu, which is slower: {reason}\n"
        assert (name, walk) == ("torch", S.torch_walk) and why in reason
        assert capsys.readouterr().err == line


ARCHITECTURES = "sm_75", "sm_80", "sm_90", "sm_100", "sm_120"


def test_nvcc_compiles_the_kernel_without_spills(tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(nvcc):
        pytest.skip("no nvcc here")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    (tmp_path / "scan.cu").write_text(S.KERNEL)
    command = [nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", "-c", "scan.cu"]
    compiling = {arch: subprocess.Popen(
        [*command, f"-arch={arch}", "-o", f"{arch}.o"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for arch in ARCHITECTURES if arch in known}
    for arch, process in compiling.items():
        report = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and "warning" not in report, report
        registers, = re.findall(r"Used (\d+) registers", report)
        print(f"{arch}: {registers} registers")
        # with 168 a multiprocessor holds 12 warps, and measured 144 were faster than 72
        assert int(registers) <= 168 and "0 bytes stack frame, 0 bytes spill stores" in report


def test_nvrtc_compiles_the_kernel():
    try:
        nvrtc, n = ctypes.CDLL(S.find_nvrtc()), ctypes.c_int()
    except OSError as error:
        pytest.skip(f"no NVRTC here: {error}")
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(n))
    known = (ctypes.c_int * n.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    archs = [arch for arch in ARCHITECTURES if int(arch[3:]) in known]
    assert len(archs) >= 3                      # CUDA 12.4's knows no sm_100 and sm_120
    for arch in archs:
        cubin = S.nvrtc_cubin(arch)
        assert cubin.startswith(b"\x7fELF") and b"birdie_lanes" in cubin
    with pytest.raises(RuntimeError, match="error: "):
        S.nvrtc_cubin("sm_1")


def test_demonstration(capsys):
    S.main()
    out = capsys.readouterr().out
    errors = [float(e) for e in re.findall(r"(?:h|da|dx) (\d\S+)", out)]
    assert S.backend("cpu")[0] in out and len(errors) >= 12 and max(errors) < 3e-6
