"""The scan equals a plain loop in float64, forward and backward, on every backend; and the kernel builds
quickly, alone or beside other processes, or says in one line why not.

    python -m pytest tests/test_scan.py          (runs the CUDA kernel too where there is a GPU)
"""
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import scan as S

LENGTHS = (1, 2, 3, 4, 7, 16, 31, 32, 33, 50)


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
    name = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here: run this file where there is one")
    if name == "cpp" and S.backend("cpu").name != "cpp":
        pytest.skip(f"no C++ kernel: {S.backend('cpu').reason}")
    monkeypatch.setenv("SCAN_BACKEND", name)
    return "cuda" if name == "cuda" else "cpu"


def random_case(seed, lengths=LENGTHS):
    """(a, x, reset, n_reverse, h0) and g of one random scan: sizes, types, gates, resets, strides."""
    r = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=r))]

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    B, T, D = pick(1, 2, 3), pick(*lengths), pick(1, 2, 3, 5, 8, 13, 16, 24, 40)
    x_type = pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    a = torch.rand(B, T, D, generator=r)
    a = pick(a, a * 1e-3, 1 - a * 1e-3, a * 0, a * 0 + 1, (a * 3).floor() / 2).to(pick(torch.float32, x_type))
    x, g = normal(B, T, D).to(x_type), normal(B, T, D).to(x_type)
    chance = pick(None, 0.0, 0.05, 0.3, 1.0)
    reset = None
    if chance is not None:
        forward, backward = torch.rand(2, B, T, generator=r) < chance
        reset = (forward * S.RESET_FORWARD + backward * S.RESET_REVERSE).to(torch.uint8)
    h0 = pick(None, normal(B, D))
    if pick(True, False):       # strides that a split projection, a transpose or a sum leaves behind
        x = torch.cat([x, x, x], -1)[..., D:2 * D]
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
        g = g[:, :, :1].expand(B, T, D)
    return (a, x, reset, pick(0, 1, D // 2, D), h0), g


def with_gradients(f, case, g, dtype=None, device="cpu"):
    """[h, da, dx, dh0 if there is an h0] of f, computed in dtype."""
    a, x, reset, n_reverse, h0 = case
    leaves = [t.to(device, dtype or t.dtype).detach().requires_grad_() for t in (a, x, h0) if t is not None]
    h = f(leaves[0], leaves[1], None if reset is None else reset.to(device), n_reverse, *leaves[2:])
    return [h, *torch.autograd.grad(h, leaves, g.to(device, h.dtype), materialize_grads=True)]


@functools.cache
def loop_result(seed, lengths=LENGTHS):
    case, g = random_case(seed, lengths)
    return [t.detach() for t in with_gradients(S.scan_loop, case, g, torch.float64)]


def assert_equals_loop(device, seed, lengths=LENGTHS, message=""):
    case, g = random_case(seed, lengths)
    limit = 3e-6 if case[1].dtype == torch.float32 else 1e-2
    got = with_gradients(S.scan, case, g, device=device)
    for name, u, v in zip(("h", "da", "dx", "dh0"), got, loop_result(seed, lengths)):
        error = (u.cpu().double() - v).abs().max() / v.abs().max().clamp(min=1)
        assert error <= limit, f"{name} off by {error:.1e} (seed {seed}{message})"


def test_two_thousand_random_cases_equal_the_loop(device, monkeypatch):
    whole = S.chunk_length
    for seed in range(2000):
        chunk = (0, 1, 3, 8, 20)[seed % 5]      # the kernel's second way: time cut into chunks
        monkeypatch.setattr(S, "chunk_length", lambda x: min(chunk, x.shape[1]) if chunk else whole(x))
        assert_equals_loop(device, seed, message=f", chunk {chunk}")


@pytest.mark.parametrize("length", [1000, 1023, 1024, 1025, 4097, 65537])
def test_long_sequences_equal_the_loop(device, length, monkeypatch):
    for seed in range(1 if length > 2000 else 3):
        assert_equals_loop(device, seed, (length,))
        monkeypatch.setattr(S, "chunk_length", lambda x: 128)


def test_gradcheck():
    r = torch.Generator().manual_seed(0)
    a, x = torch.rand(2, 7, 5, generator=r).double(), torch.randn(2, 7, 5, generator=r).double()
    h0 = torch.randn(2, 5, generator=r).double()
    reset = torch.randint(4, (2, 7), generator=r, dtype=torch.uint8)
    for n_reverse in (0, 2, 5):
        leaves = [t.clone().requires_grad_() for t in (a, x, h0)]
        assert torch.autograd.gradcheck(lambda a, x, h0: S.scan(a, x, reset, n_reverse, h0), leaves)


def test_opcheck(device):
    for seed in range(6):
        case, _ = random_case(seed)
        case = [t.to(device) if torch.is_tensor(t) else t for t in case]
        for t in case[:2]:
            t.requires_grad_()
        torch.library.opcheck(torch.ops.birdie.scan.default, case)


def test_compiles_without_a_graph_break(device):
    case, g = random_case(3)
    compiled = torch.compile(S.scan, fullgraph=True, backend="aot_eager")
    for u, v in zip(with_gradients(compiled, case, g, device=device), with_gradients(S.scan, case, g, device=device)):
        assert torch.equal(u, v)


def test_a_reset_isolates_both_sides_bit_for_bit(device):
    """Two packed samples: changing one changes no output and no gradient of the other."""
    r = torch.Generator().manual_seed(1)
    B, T, D, cut = 2, 70, 6, 37
    a, x, g = torch.rand(B, T, D, generator=r), *torch.randn(2, B, T, D, generator=r)
    reset = torch.zeros(B, T, dtype=torch.uint8)
    reset[:, cut] |= S.RESET_FORWARD
    reset[:, cut - 1] |= S.RESET_REVERSE
    for side, other in ((slice(0, cut), slice(cut, T)), (slice(cut, T), slice(0, cut))):
        a2, x2, g2 = a.clone(), x.clone(), g.clone()
        for t in (a2, x2, g2):
            t[:, other] = torch.rand(t[:, other].shape, generator=r)
        first = with_gradients(S.scan, (a, x, reset, 3, None), g, device=device)
        second = with_gradients(S.scan, (a2, x2, reset, 3, None), g2, device=device)
        for u, v in zip(first, second):
            assert torch.equal(u[:, side], v[:, side]) and not torch.equal(u[:, other], v[:, other])


def test_a_sequence_in_pieces_equals_the_whole(device):
    r = torch.Generator().manual_seed(2)
    a, x = torch.rand(2, 100, 9, generator=r).to(device), torch.randn(2, 100, 9, generator=r).to(device)
    h, state = [], None
    for begin, end in ((0, 41), (41, 42), (42, 100)):
        h.append(S.scan(a[:, begin:end], x[:, begin:end], h0=state))
        state = h[-1][:, -1]
    torch.testing.assert_close(torch.cat(h, 1), S.scan(a, x), atol=1e-6, rtol=1e-6)


def test_threads_and_repetition_change_no_bit(device):
    case, g = random_case(5, (300,))
    first = with_gradients(S.scan, case, g, device=device)
    torch.set_num_threads(3)
    for u, v in zip(first, with_gradients(S.scan, case, g, device=device)):
        assert torch.equal(u, v)


def test_more_than_two_to_the_31_elements(monkeypatch):
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 12e9 or S.backend("cpu").name != "cpp":
        pytest.skip(f"needs the C++ kernel and 12 GB of memory; {available / 1e9:.0f} are free")
    torch.set_num_threads(4)
    T, D = 65537, 32769
    row = torch.ones(1, 1, D).bfloat16().expand(1, T, D)    # one step's inputs, repeated
    h = S.scan(row, row)
    assert h[0, 99].eq(100).all() and h[0, -1].eq(65536).all() and h[0, :, -1].float().diff().min() >= 0


def test_one_step_is_summed_in_float32_like_the_first_of_two():
    a, x, h0 = torch.rand(4, 2, 64).bfloat16(), torch.randn(4, 2, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    assert torch.equal(S.scan(a[:, :1], x[:, :1], h0=h0), S.scan(a, x, h0=h0)[:, :1])


def test_errors_name_the_value_and_the_remedy(monkeypatch):
    a = torch.rand(2, 5, 4)
    reset = torch.zeros(2, 5, dtype=torch.uint8)
    for arguments, error, words in (
            ((a, a[:, :4]), ValueError, "both be"),
            ((a[0], a[0]), ValueError, "both be"),
            ((a.bfloat16(), a), TypeError, "bfloat16"),
            ((a, a.double()), TypeError, "float64"),
            ((a.int(), a.int()), TypeError, "int32"),
            ((a[:, :0], a[:, :0]), ValueError, "at least 1"),
            ((a, a, None, 5), ValueError, "n_reverse 5"),
            ((a, a, None, -1), ValueError, "n_reverse -1"),
            ((a, a, reset.bool()), TypeError, "uint8"),
            ((a, a, reset[:, :3]), ValueError, "(2, 5)"),
            ((a, a, reset, 0, a[:, 0, :2]), ValueError, "(2, 4)"),
            ((a, a.to("meta")), ValueError, "meta")):
        with pytest.raises(error, match=re.escape(words)):
            S.scan(*arguments)
    for name in ("cuda", "triton"):
        monkeypatch.setenv("SCAN_BACKEND", name)
        if name == "cuda" and torch.cuda.is_available():        # then what is on the CPU has the CPU's kernel
            continue
        with pytest.raises(ValueError, match=f"SCAN_BACKEND={name} cannot run on cpu"):
            S.scan(a, a)


def start(folder, **environment):
    """A process that scans once and prints its backend and the seconds that took."""
    code = ("import time, torch, scan; t = time.time(); x = torch.ones(1, 3, 2); h = scan.scan(x, x); "
            "assert h[0, 2, 1] == 3; print(scan.backend().name, time.time() - t)")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_four_processes_build_at_once_despite_stale_locks_and_the_next_starts_quickly(tmp_path):
    if S.backend("cpu").name != "cpp":
        pytest.skip(f"no C++ kernel: {S.backend('cpu').reason}")
    library = S.build("cpp")
    for place in (tmp_path, tmp_path / library.stem, tmp_path / f"{library.stem}abc"):
        place.mkdir(exist_ok=True)
        (place / "lock").touch()                            # as a killed build leaves it behind
    for processes, limit in ((4, 15), (1, 1)):
        for process in [start(tmp_path) for _ in range(processes)]:
            out, err = process.communicate(timeout=60)
            assert out.startswith("cpp") and float(out.split()[1]) < limit, out + err
    assert len(list(tmp_path.glob("*.so"))) == 1


@pytest.mark.parametrize("environment", [{"CXX": "/no/such/compiler"}, {"TORCH_EXTENSIONS_DIR": "/dev/null/no"}])
def test_without_a_build_it_falls_back_and_says_why_in_one_line(tmp_path, environment):
    free, forced = start(tmp_path, **environment), start(tmp_path, SCAN_BACKEND="cpp", **environment)
    out, err = free.communicate(timeout=60)
    assert out.startswith("torch"), out + err
    ours = [line for line in err.splitlines() if "No CUDA runtime" not in line]         # a CUDA build's, where there is no GPU
    assert len(ours) == 1 and ours[0].startswith("scan: no cpp kernel"), err
    out, err = forced.communicate(timeout=60)
    assert forced.returncode != 0 and "SCAN_BACKEND=cpp has no kernel" in err, out + err


def test_it_builds_without_ninja_and_names_the_compilers_first_error(tmp_path, monkeypatch, capsys):
    if S.backend("cpu").name != "cpp":
        pytest.skip(f"no C++ kernel: {S.backend('cpu').reason}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    assert S.load.__wrapped__("cpp")[0].birdie_scan
    monkeypatch.setattr(S, "KERNEL", "this is not C++")
    kernel, reason = S.load.__wrapped__("cpp")
    assert kernel is None and "error:" in reason and reason in capsys.readouterr().err


def test_nvcc_compiles_the_kernel_without_spills(tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(nvcc):
        pytest.skip("no nvcc here")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    (tmp_path / "scan.cu").write_text(S.KERNEL)
    compiling = {code: subprocess.Popen(
        [nvcc, "-O3", "-std=c++17", *COMMON_NVCC_FLAGS, f"-arch={code}", "-Xptxas", "-v", "-c", "scan.cu",
         "-o", f"{code}.o"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for code in ("sm_75", "sm_80", "sm_90", "sm_100") if code in known}
    for code, process in compiling.items():
        report = process.communicate(timeout=120)[0]
        assert process.returncode == 0, report
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        print(f"{code}: {len(registers)} kernels, {min(registers)}-{max(registers)} registers")
        assert len(registers) == 40 and not any(spills)


def test_demonstration(capsys):
    S.main()
    out = capsys.readouterr().out
    assert S.backend("cpu").name in out and "torch" in out
    errors = [float(e) for e in re.findall(r"(?:h|da|dx|dh0) (\d\S+)", out.split("times")[0])]
    assert len(errors) >= 4 and max(errors) < 3e-6
