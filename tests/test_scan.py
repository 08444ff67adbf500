"""The scan equals a plain loop in float64, forward and backward, on every backend.

    python -m pytest tests/test_scan.py
"""
import pathlib
import re
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import scan as S

LENGTHS = (1, 2, 3, 4, 7, 16, 31, 32, 33, 50)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    if pick(True, False):       # strides that a split projection or a transpose leaves behind
        x = torch.cat([x, x, x], -1)[..., D:2 * D]
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
        g = g[:, :, :1].expand(B, T, D)
    return (a, x, reset, pick(0, 1, D // 2, D), h0), g


def with_gradients(f, case, g, dtype=None):
    """[h, da, dx, dh0 if there is an h0] of f, computed in dtype."""
    a, x, reset, n_reverse, h0 = case
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (a, x, h0) if t is not None]
    h = f(leaves[0], leaves[1], reset, n_reverse, *leaves[2:])
    return [h, *torch.autograd.grad(h, leaves, g.to(h.dtype), materialize_grads=True)]


def assert_close_to_loop(case, g, message=""):
    limit = 3e-6 if case[1].dtype == torch.float32 else 1e-2
    got = with_gradients(S.scan, case, g)
    want = with_gradients(S.scan_loop, case, g, torch.float64)
    for name, u, v in zip(("h", "da", "dx", "dh0"), got, want):
        error = (u.double() - v).abs().max() / v.abs().max().clamp(min=1)
        assert error <= limit, f"{name} off by {error:.1e} {message}"


def test_two_thousand_random_cases_equal_the_loop():
    for seed in range(2000):
        case, g = random_case(seed)
        assert_close_to_loop(case, g, f"(seed {seed})")


def test_gradcheck():
    r = torch.Generator().manual_seed(0)
    a, x = torch.rand(2, 7, 5, generator=r).double(), torch.randn(2, 7, 5, generator=r).double()
    h0 = torch.randn(2, 5, generator=r).double()
    reset = torch.randint(4, (2, 7), generator=r, dtype=torch.uint8)
    for n_reverse in (0, 2, 5):
        leaves = [t.clone().requires_grad_() for t in (a, x, h0)]
        assert torch.autograd.gradcheck(lambda a, x, h0: S.scan(a, x, reset, n_reverse, h0), leaves)


def test_opcheck():
    for seed in range(12):
        case, _ = random_case(seed)
        for t in case[:2]:
            t.requires_grad_()
        torch.library.opcheck(torch.ops.birdie.scan.default, case)


def test_compiles_without_a_graph_break():
    case, g = random_case(3)
    compiled = torch.compile(S.scan, fullgraph=True, backend="aot_eager")
    for u, v in zip(with_gradients(compiled, case, g), with_gradients(S.scan, case, g)):
        assert torch.equal(u, v)


def test_a_reset_isolates_both_sides_bit_for_bit():
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
        first = with_gradients(S.scan, (a, x, reset, 3, None), g)
        second = with_gradients(S.scan, (a2, x2, reset, 3, None), g2)
        for u, v in zip(first, second):
            assert torch.equal(u[:, side], v[:, side]) and not torch.equal(u[:, other], v[:, other])


def test_a_sequence_in_pieces_equals_the_whole():
    r = torch.Generator().manual_seed(2)
    a, x = torch.rand(2, 100, 9, generator=r), torch.randn(2, 100, 9, generator=r)
    h, state = [], None
    for begin, end in ((0, 41), (41, 42), (42, 100)):
        h.append(S.scan(a[:, begin:end], x[:, begin:end], h0=state))
        state = h[-1][:, -1]
    torch.testing.assert_close(torch.cat(h, 1), S.scan(a, x), atol=1e-6, rtol=1e-6)


def test_errors_name_the_value_and_the_remedy():
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


def test_demonstration(capsys):
    S.main()
    assert "torch.add" in capsys.readouterr().out
