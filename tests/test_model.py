"""No leak of the future or between samples, a prefix read both ways, decoding equal to the parallel
forward, blocks equal to their equations, and mixers that one adds.

    python -m pytest tests/test_model.py
"""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import objectives
from gpu import kept_bytes
from model import (IGNORE, LM, MIXERS, RESET_FORWARD, RESET_REVERSE, Attention, BoundedSqrt,
                   Boundaries, GatedSSM, Hawk, ModelConfig, Recurrence, demo, linear)
from train import model_config, parse_args

VARIANTS = [(arch, causal) for arch in MIXERS for causal in (False, True)]
T, GEN = 40, 49         # of the rows here; GEN is the last of 50 tokens


def small(arch="gated_ssm", causal=False, **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_layer=4, d_model=16, d_state=24, n_head=2)
    return LM(ModelConfig(**{**sizes, "arch": arch, "causal": causal, **settings}))


def packed_row(rng):
    """Random samples, padding -> tokens (T,), reset (T,), samples as (first, GEN's place, end)."""
    tokens, reset = torch.randint(0, GEN, (T,), generator=rng), torch.zeros(T, dtype=torch.uint8)
    samples, first = [], 0
    while first < T - 4:
        end = min(T, first + int(torch.randint(2, 16, (), generator=rng)))
        gen = int(torch.randint(first, end, (), generator=rng))     # a prefix may be empty
        tokens[gen] = GEN
        reset[first] |= RESET_FORWARD
        reset[gen:end] |= RESET_REVERSE
        samples.append((first, gen, end))
        first = end
    reset[first:] = RESET_FORWARD | RESET_REVERSE
    return tokens, reset, samples


def packed_batch(seed, B):
    rng = torch.Generator().manual_seed(seed)
    tokens, reset, samples = zip(*[packed_row(rng) for _ in range(B)])
    return torch.stack(tokens), torch.stack(reset), samples


def differ(model, reset, one, two):
    """(B, T) bool: where do the outputs for these tokens differ in any bit?"""
    with torch.no_grad():
        return (model(one, reset)[0] != model(two, reset)[0]).any(-1)


# ---- the test to copy: what every mixer in MIXERS promises -------------------------------------

@pytest.mark.parametrize("arch, causal", VARIANTS)
def test_a_changed_token_changes_nothing_before_its_turn_and_no_other_sample(arch, causal):
    """1,000 tokens changed at random; outputs out of reach stay the same, bit for bit."""
    model, rng, B = small(arch, causal), torch.Generator().manual_seed(1), 100
    for seed in range(10):
        tokens, reset, samples = packed_batch(seed, B)
        changed, reach = tokens.clone(), torch.zeros(B, T, dtype=torch.bool)
        for b in range(B):
            first, gen, end = samples[b][int(torch.randint(len(samples[b]), (), generator=rng))]
            at = gen
            while at == gen:            # GEN is the same token in every sample: it tells nothing
                at = int(torch.randint(first, end, (), generator=rng))
            changed[b, at] = (tokens[b, at] + 1 + int(torch.randint(48, (), generator=rng))) % GEN
            reach[b, first if at < gen and not causal else at:end] = True
        differs = differ(model, reset, tokens, changed)
        assert not (differs & ~reach).any()
        assert (differs & reach).sum() > 0.99 * reach.sum()     # and in reach nearly all changes


# ---- an example to check by hand ---------------------------------------------------------------

# A row says which outputs change with that token. p: prefix, G: GEN, l: label, -: padding.
GRID = """
  gated_ssm  hawk      transformer  gated_ssm,causal
p ####....   ####....  ####....     ####....
p ####....   ####....  ####....     .###....
G ####....   ####....  ..##....     ..##....
l ...#....   ...#....  ...#....     ...#....
p ....###.   ....###.  ....###.     ....###.
G ....###.   ....###.  .....##.     .....##.
l ......#.   ......#.  ......#.     ......#.
- .......#   .......#  .......#     .......#
"""


@pytest.mark.parametrize("column", range(4))
def test_each_token_of_a_row_of_two_samples_reaches_the_outputs_in_this_table(column):
    title, *rows = GRID.strip().splitlines()
    arch, *causal = title.split()[column].split(",")
    tokens = torch.tensor([[1, 2, GEN, 3, 4, GEN, 5, 0]])
    reset = torch.tensor([[1, 0, 2, 2, 1, 2, 2, 3]], dtype=torch.uint8)
    for at, row in enumerate(rows):
        changed = tokens.clone()
        changed[0, at] = 9
        reached = differ(small(arch, bool(causal)), reset, tokens, changed)[0]
        assert "".join(".#"[yes] for yes in reached) == row.split()[1 + column]


# ---- reach -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, causal", VARIANTS)
def test_another_sample_of_the_row_changes_no_gradient(arch, causal):
    model, rng = small(arch, causal), torch.Generator().manual_seed(2)
    weights = torch.randn(1, T, 50, generator=rng)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if "embed" not in n])
    for _ in range(15):
        tokens, reset, samples = packed_row(rng)
        first, _, end = samples[int(torch.randint(len(samples), (), generator=rng))]
        other = torch.randint(0, GEN, (T,), generator=rng)
        other[first:end] = tokens[first:end]
        gradients = []
        for row in (tokens, other):
            logits, _ = model(row[None], reset[None])
            loss = (logits * weights)[:, first:end].sum()
            gradients.append(torch.autograd.grad(loss, parameters))
        for name, one, two in zip(names, *gradients):
            assert torch.equal(one, two), name


def test_both_files_that_know_reset_and_ignore_agree():
    for name in ("RESET_FORWARD", "RESET_REVERSE", "IGNORE"):
        assert getattr(model_module, name) == getattr(objectives, name)


# ---- decoding ----------------------------------------------------------------------------------

def equals_the_parallel_forward(model, monkeypatch):
    """Prompts of mixed lengths, empty prefixes and bare GENs: same tokens, logits within 1e-4."""
    rng, logged, choose = torch.Generator().manual_seed(3), [], LM.choose
    prompts = [(torch.randint(0, GEN, (n_prefix,), generator=rng).tolist(),
                [GEN] + torch.randint(0, GEN, (n_start - 1,), generator=rng).tolist())
               for n_prefix, n_start in [(0, 1), (7, 1), (1, 1), (0, 9), (23, 4), (12, 1)]]
    monkeypatch.setattr(LM, "choose", staticmethod(
        lambda logits, *rest: logged.append(logits) or choose(logits, *rest)))
    written = model.generate(prompts, 12)
    logged = torch.stack(logged, 1)                             # (B, 12, V)
    for b, (prefix, start) in enumerate(prompts):
        row = torch.tensor([prefix + start + written[b]])
        reset = torch.full_like(row, RESET_REVERSE, dtype=torch.uint8)
        reset[0, :len(prefix)] = 0
        reset[0, 0] |= RESET_FORWARD
        logits = model(row, reset)[0][0, len(prefix) + len(start) - 1:-1]
        assert logits.argmax(-1).tolist() == written[b]
        assert (logits - logged[b]).abs().max() < 1e-4


@pytest.mark.parametrize("arch, causal", VARIANTS)
def test_decoding_equals_the_parallel_forward(arch, causal, monkeypatch):
    equals_the_parallel_forward(small(arch, causal), monkeypatch)


@pytest.mark.parametrize("arch", [arch for arch in MIXERS if issubclass(MIXERS[arch], Recurrence)])
def test_the_state_of_an_ssm_does_not_grow(arch, monkeypatch):
    model, sizes, run_blocks = small(arch), set(), model_module.run_blocks

    def spy(*inputs):
        x, states = run_blocks(*inputs)
        sizes.add(sum(s.numel() for state in states for s in state))
        return x, states
    monkeypatch.setattr(model_module, "run_blocks", spy)
    for n_prefix in (3, 300):
        model.generate([([7] * n_prefix, [GEN])], 20)
    assert len(sizes) == 1


def test_generate_stops_and_samples_as_asked():
    model, prompts = small(), [([1, 2, 3], [GEN])]
    greedy, = model.generate(prompts, 20)
    stop = greedy[4]
    assert model.generate(prompts, 20, stop=stop) == [greedy[:greedy.index(stop) + 1]]
    assert model.generate(prompts, 0) == [[]]
    assert model.generate(prompts, 20, temperature=1e-6) == [greedy]
    one, same, other = [model.generate(prompts, 20, None, 1.0, torch.Generator().manual_seed(seed))
                        for seed in (0, 0, 1)]
    assert one == same != other
    for wrong in ([], [([1, 2], [])]):
        with pytest.raises(ValueError, match="GEN"):
            model.generate(wrong, 5)
    with pytest.raises(ValueError, match="temperature is -1"):
        model.generate(prompts, 5, temperature=-1)


# ---- the equations, as plain loops in float64 --------------------------------------------------

N_PREFIX, N_TOKEN = 5, 9        # of one sample


@pytest.fixture
def sample(monkeypatch):
    """Random inputs of width 6 and the bits of one sample; blocks stay in float64 throughout."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    reset = torch.tensor([[1] + 4 * [0] + 4 * [2]], dtype=torch.uint8)
    return torch.randn(1, N_TOKEN, 6, dtype=torch.float64), reset


def loop_conv(conv, u):
    y = conv.bias.expand(N_TOKEN, -1).clone()
    for t in range(N_TOKEN):
        for k in range(min(t + 1, 4)):
            y[t] += conv.weight[k] * u[0, t - k]
    return y


def loop_recurrence(a, x, n_reverse):
    """a, x (T, N); the last n_reverse channels run right to left over the prefix."""
    h = torch.zeros_like(x)
    for n in range(x.size(1)):
        if n < x.size(1) - n_reverse:
            for t in range(N_TOKEN):
                h[t, n] = x[t, n] + (a[t, n] * h[t - 1, n] if t > 0 else 0)
        else:
            for t in reversed(range(N_TOKEN)):
                h[t, n] = x[t, n] + (a[t, n] * h[t + 1, n] if t < N_PREFIX else 0)
    return h


@pytest.mark.parametrize("scale_input, bidirectional", [(True, True), (False, False)])
def test_gated_ssm_equals_its_equations(scale_input, bidirectional, sample):
    config = ModelConfig(d_model=6, d_state=8, scale_input=scale_input)
    block, (u, reset) = GatedSSM(config, bidirectional).double(), sample
    v = loop_conv(block.conv, u)
    W_i, W_z, W_o = block.W_izo.weight.chunk(3)
    f, i = torch.sigmoid(v @ block.W_f.weight.T + block.W_f.bias), torch.sigmoid(v @ W_i.T)
    x = (1 - f if scale_input else 1) * i * (v @ W_z.T)
    h = loop_recurrence(f, x, 4 * bidirectional)
    y, _ = block(u, Boundaries(reset, config))
    assert torch.allclose(y[0], (F.gelu(v @ W_o.T) * h) @ block.W_out.weight.T, atol=1e-10)


def test_hawk_equals_its_equations(sample):
    config = ModelConfig(arch="hawk", d_model=6, d_state=8)
    block, (u, reset) = Hawk(config, True).double(), sample
    v = loop_conv(block.conv, u @ block.W_in.weight.T)
    r = torch.sigmoid(v @ block.W_a.weight.T + block.W_a.bias)
    i = torch.sigmoid(v @ block.W_x.weight.T + block.W_x.bias)
    a = torch.exp(-8 * r * F.softplus(block.L))
    h = loop_recurrence(a, (1 - a * a).sqrt() * i * v, 4)
    y, _ = block(u, Boundaries(reset, config))
    expected = (F.gelu(u[0] @ block.W_gate.weight.T) * h) @ block.W_out.weight.T
    assert torch.allclose(y[0], expected, atol=1e-10)


def test_attention_equals_its_equations():
    """Rotary positions as complex numbers, softmax written out, the mask from its definition."""
    config = ModelConfig(arch="transformer", d_model=8, n_head=2)
    torch.manual_seed(0)
    block, u = Attention(config, True).double(), torch.randn(1, N_TOKEN, 8, dtype=torch.float64)
    q, k, v = (u[0] @ block.W_qkv.weight.T).chunk(3, -1)
    angle = torch.arange(N_TOKEN)[:, None] * torch.tensor([1, 250_000 ** -0.5]).double()
    turn, mixed = torch.polar(torch.ones_like(angle), angle), torch.zeros_like(v)
    for head in (slice(0, 4), slice(4, 8)):
        q_turned, k_turned = (torch.complex(*w[:, head].split(2, 1)) * turn for w in (q, k))
        for t in range(N_TOKEN):
            keys = [s for s in range(N_TOKEN) if s <= t or s < N_PREFIX]
            score = torch.stack([(q_turned[t].conj() * k_turned[s]).sum().real / 2 for s in keys])
            mixed[t, head] = sum(p * v[s, head] for p, s in zip(score.softmax(0), keys))
    reset = torch.tensor([[1] + 4 * [0] + 4 * [2]], dtype=torch.uint8)
    y, _ = block(u, Boundaries(reset, config))
    assert torch.allclose(y[0], mixed @ block.W_out.weight.T, atol=1e-6)


def test_the_loss_is_the_mean_of_minus_log_p_over_the_labels():
    tokens, reset, _ = packed_batch(0, 3)
    targets = torch.where(reset == RESET_REVERSE, tokens.roll(-1, 1), IGNORE)
    logits, loss = small()(tokens, reset, targets)
    p = logits.double().softmax(-1)
    losses = [-p[b, t, targets[b, t]].log() for b, t in (targets != IGNORE).nonzero().tolist()]
    assert torch.isclose(loss.double(), torch.stack(losses).mean())


def test_bounded_sqrt_has_the_bound_and_else_the_gradient_of_sqrt():
    x = torch.tensor([0.0, 1e-9, 2.5e-7, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    BoundedSqrt.apply(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([1000, 1000, 1000, 0.5 / math.sqrt(1e-3), 0.5])


def test_rg_lru_equals_an_implementation_of_others():
    """The layer of the transformers package, weights copied over: forward and gradients."""
    gemma = pytest.importorskip("transformers.models.recurrent_gemma", reason="no transformers")
    config = ModelConfig(arch="hawk", d_model=8, d_state=16)
    ours, position = Hawk(config, False), torch.arange(1, 31).expand(2, 30)     # 0 would be a reset
    theirs = gemma.modeling_recurrent_gemma.RecurrentGemmaRglru(
        gemma.configuration_recurrent_gemma.RecurrentGemmaConfig(
            lru_width=16, hidden_size=16, num_attention_heads=1))
    with torch.no_grad():
        for name, source in (("recurrent_gate", ours.W_a), ("input_gate", ours.W_x)):
            getattr(theirs, f"{name}_weight").copy_(source.weight.T[None])
            getattr(theirs, f"{name}_bias").copy_(source.bias[None])
        theirs.recurrent_param.copy_(ours.L)
    weight, v = torch.randn(2, 2, 30, 16)
    boundaries, results = Boundaries(torch.zeros(2, 30, dtype=torch.uint8), config), []
    for h, parameters in (
            (ours.rg_lru(v.requires_grad_(), boundaries)[0], (ours.W_a.weight, ours.L)),
            (theirs(v, position), (theirs.recurrent_gate_weight, theirs.recurrent_param))):
        dv, dW, dL = torch.autograd.grad((h * weight).sum(), (v, *parameters))
        results.append([h, dv, dW.squeeze(0), dL])
    results[1][2] = results[1][2].T
    for one, two in zip(*results):
        assert (one - two).abs().max() <= 1e-5 * max(1, one.abs().max())


# ---- initialisation, precision, optimiser groups -----------------------------------------------

@pytest.mark.parametrize("bidirectional", (True, False))
def test_memories_are_spread_over_the_channels_of_each_direction(bidirectional):
    n = 32 if bidirectional else 64
    bias = GatedSSM(ModelConfig(d_state=64, memory=512), bidirectional).W_f.bias.detach().double()
    for half in (-1 / torch.sigmoid(bias).log()).split(n):
        assert [half.min(), half.max()] == pytest.approx([1, 512], rel=1e-3)
    L = Hawk(ModelConfig(arch="hawk", d_state=64), bidirectional).L.detach()
    for half in torch.exp(-8 * F.softplus(L)).split(n):
        assert [half.min(), half.max()] == pytest.approx([0.9, 0.999], rel=1e-4)


@pytest.mark.parametrize("arch", ("gated_ssm", "hawk"))
def test_gates_and_scan_stay_in_float32_under_autocast(arch, monkeypatch):
    types, scan = set(), model_module.scan
    monkeypatch.setattr(model_module, "scan", lambda a, x, **rest:
                        types.update((a.dtype, x.dtype)) or scan(a, x, **rest))
    tokens, reset, _ = packed_batch(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        small(arch)(tokens, reset)
    assert types == {torch.float32}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("arch", MIXERS)
def test_weights_of_half_precision_train_and_decode(arch, dtype):
    model = small(arch)
    tokens, reset, _ = packed_batch(0, 2)
    targets = tokens.roll(-1, 1)
    full, loss = (model(tokens, reset, targets)[k].detach() for k in (0, 1))
    half = model.to(dtype)
    logits, half_loss = half(tokens, reset, targets)
    half_loss.backward()
    assert logits.dtype == dtype and abs(half_loss - loss) < 0.02 * loss
    assert (logits - full).abs().max() < 0.1 * full.abs().max()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    assert len(half.generate([([1, 2, 3], [4])], 5)[0]) == 5


@pytest.mark.parametrize("arch", MIXERS)
def test_parameter_groups_hold_every_parameter_once_and_spare_gates_and_norms(arch):
    model = small(arch)
    assert model.n_parameters() == small(arch, causal=True).n_parameters()
    decayed, free = (set(map(id, group["params"])) for group in model.parameter_groups(0.1))
    assert not decayed & free and decayed | free == set(map(id, model.parameters()))
    spared = {name for name, p in model.named_parameters() if id(p) in free}
    for name, p in model.named_parameters():
        if name.split(".")[-2] in ("W_f", "W_a", "W_x", "conv", "norm") or p.ndim < 2:
            assert name in spared
        if "embed" in name or "W_out" in name or "W_head" in name:
            assert name not in spared


@pytest.mark.parametrize("arch", ("gated_ssm", "hawk", "transformer"))
@pytest.mark.parametrize("preset, low, high", [("cpu", 1.4e6, 2e6), ("gpu", 28e6, 36e6),
                                               ("110m", 100e6, 112e6), ("1.4b", 1.2e9, 1.4e9)])
def test_presets_have_their_sizes_in_every_architecture(arch, preset, low, high):
    """Parameters outside embedding and head; 48, 20 and 24 blocks at the paper's size (table 7)."""
    args = parse_args([f"--preset={preset}", f"--arch={arch}"])
    with torch.device("meta"):
        model = LM(model_config(args, SimpleNamespace(vocab_size=2080)))
    assert low < sum(p.numel() for p in model.blocks.parameters()) < high
    if preset == "1.4b":
        assert len(model.blocks) == {"gated_ssm": 48, "hawk": 20, "transformer": 24}[arch]


@pytest.mark.parametrize("bad, message", [
    (dict(arch="no_such"), "gated_ssm, hawk"), (dict(arch="hawk", conv_width=0), "conv_width"),
    (dict(conv_width=-1), "conv_width"), (dict(arch="transformer", n_head=5), "n_head")])
def test_a_bad_configuration_names_its_remedy(bad, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**bad)


@pytest.mark.parametrize("arch", MIXERS)
def test_recomputing_activations_changes_no_gradient(arch):
    tokens, reset, _ = packed_batch(0, 4)
    gradients = []
    for recompute in (False, True):
        model = small(arch, recompute=recompute)
        model(tokens, reset, tokens)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(one, two, atol=1e-7) for one, two in zip(*gradients))


@pytest.mark.parametrize("arch, limit", [("gated_ssm", 16e3), ("hawk", 22e3),
                                         ("transformer", 14e3)])
def test_what_backward_keeps_of_a_token_in_a_layer(arch, limit):
    """At the size of the preset `gpu`, in bytes."""
    assert 0.8 * limit < kept_bytes(arch, recompute=True)[0] <= limit
    assert kept_bytes(arch, recompute=False)[0] > 2 * limit


def test_what_the_compiled_backward_keeps_of_a_token_in_a_layer():
    """By two differences: between two and four rows (weights count once), and in depth."""
    def saved(n_layer, n_rows):
        torch._dynamo.reset()
        model = LM(ModelConfig(n_layer=n_layer, d_model=512, d_state=1024, recompute=True))
        model = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        tokens, sizes = torch.randint(2000, (n_rows, 64)), {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(tokens, torch.zeros_like(tokens, dtype=torch.uint8), tokens)
        return sum(sizes.values())

    one, two = ((saved(n_layer, 4) - saved(n_layer, 2)) / 128 for n_layer in (1, 2))
    old = torch.__version__.startswith("2.6")       # its partitioner keeps 16,480, 2.13's 14,432
    assert 8_000 < two - one <= (16_500 if old else 16_000)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_more_logits_are_in_float32_at_once_than_is_said(recompute, monkeypatch):
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest.append(out.numel() / 2080 if out.shape[-1:] == (2080,) else 0)
            return out

    monkeypatch.setattr("model.LOSS_TOKENS", 32)
    tokens = torch.randint(2000, (4, 64))
    model = small("gated_ssm", recompute=recompute, vocab_size=2080)
    with torch.autocast("cpu", torch.bfloat16), Watch():
        model(tokens, torch.zeros_like(tokens, dtype=torch.uint8), tokens)[1].backward()
    assert max(largest) == (32 if recompute else 256)


@pytest.mark.parametrize("arch, recompute", [("gated_ssm", False), *((m, True) for m in MIXERS)])
def test_the_model_compiles_without_a_graph_break(arch, recompute):
    tokens, reset, _ = packed_batch(0, 2)
    model = small(arch, n_layer=2, recompute=recompute)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [forward(tokens, reset, tokens)[1] for forward in (model, compiled)]
    one, two = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert torch.allclose(*losses)
    assert all(torch.allclose(g, h, atol=1e-5) for g, h in zip(one, two))


# ---- a mixer of one's own ----------------------------------------------------------------------

class EMA(Recurrence):
    """An exponential moving average of each channel: an SSM whose gate sees no input."""
    needs_mlp = True

    def __init__(self, config, bidirectional):
        super().__init__(config.d_state, bidirectional)
        self.W_in = linear(config.d_model, config.d_state)
        self.W_out = linear(config.d_state, config.d_model, n_layer=config.n_layer)
        nn.init.eye_(self.W_in.weight)
        self.decay = nn.Parameter(self.spread(0.0, 4.0)[None])  # (1, N): the optimiser's a matrix
        self.decay.no_decay = True

    def forward(self, u, boundaries, state=None):
        x, a = self.W_in(u).float(), torch.sigmoid(self.decay)
        h, state = self.recur(a.expand_as(x), (1 - a) * x, boundaries, state)
        return self.W_out(h), state


def test_a_mixer_put_into_mixers_keeps_its_initialisation_leaks_nothing_and_decodes(monkeypatch):
    monkeypatch.setitem(MIXERS, "ema", EMA)
    model = small("ema")
    _, free = model.parameter_groups(0.1)
    for block in model.blocks:
        mixer = block.mixer
        assert torch.equal(mixer.W_in.weight, torch.eye(24, 16))
        assert torch.equal(mixer.decay, mixer.spread(0.0, 4.0)[None])
        assert any(p is mixer.decay for p in free["params"])
    for causal in (False, True):
        test_a_changed_token_changes_nothing_before_its_turn_and_no_other_sample("ema", causal)
        test_another_sample_of_the_row_changes_no_gradient("ema", causal)
    equals_the_parallel_forward(model, monkeypatch)


# ---- learning ----------------------------------------------------------------------------------

def look_up(B, n_pairs, rng):
    """Question, pairs, question: one of the keys is asked for, before and after -> a batch."""
    keys = torch.rand(B, 16, generator=rng).argsort(1)[:, :n_pairs]
    values = torch.randint(16, 32, (B, n_pairs), generator=rng)
    at = torch.randint(n_pairs, (B, 1), generator=rng)
    question, pairs = keys.gather(1, at), torch.stack([keys, values], 2).flatten(1)
    tokens = torch.cat([question, pairs, question, torch.full_like(at, GEN)], 1)
    reset, targets = torch.zeros_like(tokens, dtype=torch.uint8), torch.full_like(tokens, IGNORE)
    reset[:, 0], reset[:, -1] = RESET_FORWARD, RESET_REVERSE
    targets[:, -1] = values.gather(1, at)[:, 0]
    return tokens, reset, targets


def learn_to_look_up(n_steps, **form):
    """-> the share of right answers after n_steps."""
    model, rng = small(n_layer=2, d_model=64, d_state=64, **form), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=6e-3, betas=(0.9, 0.95))
    for _ in range(n_steps):
        model(*look_up(64, 4, rng))[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tokens, reset, targets = look_up(512, 4, rng)
    return (model(tokens, reset)[0][:, -1].argmax(-1) == targets[:, -1]).float().mean().item()


def test_the_default_form_learns_to_look_up_where_the_bare_form_does_not():
    """1 of 4 pairs; answering with any value of the row scores 25%."""
    assert learn_to_look_up(400) > 0.8
    assert learn_to_look_up(400, scale_input=False, conv_width=0) < 0.5


def test_the_demonstration_runs(capsys):
    demo()
    assert "#########" in capsys.readouterr().out
