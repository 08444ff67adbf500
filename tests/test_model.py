"""What the model promises: no leak of the future or between samples, a prefix read both ways, decoding
equal to the parallel forward, blocks equal to their equations.   python -m pytest tests/test_model.py"""
import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import ARCHS, LM, Layout, ModelConfig, demo
from scan import RESET_FORWARD, RESET_REVERSE
from train import PRESETS

VARIANTS = [(arch, causal) for arch in ARCHS for causal in (False, True)]
T = 40


def small(arch="gated_ssm", causal=False, **kw):
    torch.manual_seed(0)
    return LM(ModelConfig(**{**dict(arch=arch, causal=causal, vocab_size=50, block_size=T, n_layer=4, d_model=16,
                                    d_state=24, n_head=2), **kw}))


def packed_row(rng):
    """A random row -> tokens (T,), reset (T,), samples as (first, GEN, end)."""
    tokens, reset = torch.randint(0, 49, (T,), generator=rng), torch.zeros(T, dtype=torch.uint8)
    samples, first = [], 0
    while first < T - 4:
        end = min(T, first + int(torch.randint(2, 16, (), generator=rng)))
        gen = int(torch.randint(first, end, (), generator=rng))           # an empty prefix is a sample too
        tokens[gen] = 49
        reset[first] |= RESET_FORWARD
        reset[gen:end] |= RESET_REVERSE
        samples.append((first, gen, end))
        first = end
    reset[first:] = RESET_FORWARD | RESET_REVERSE                         # padding
    return tokens, reset, samples


def packed_batch(rng, B):
    rows = [packed_row(rng) for _ in range(B)]
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), [r[2] for r in rows]


@pytest.mark.parametrize("arch, causal", VARIANTS)
def test_a_changed_token_is_seen_where_it_should_be_and_nowhere_else(arch, causal):
    """1,000 random perturbations: outputs outside the reach of the token are the same bit for bit."""
    model, rng, B = small(arch, causal), torch.Generator().manual_seed(1), 100
    seen = reachable = 0
    for _ in range(10):
        tokens, reset, samples = packed_batch(rng, B)
        changed, allowed = tokens.clone(), torch.zeros(B, T, dtype=torch.bool)
        for b in range(B):
            first, gen, end = samples[b][int(torch.randint(len(samples[b]), (), generator=rng))]
            at = int(torch.randint(first, end, (), generator=rng))
            changed[b, at] = (tokens[b, at] + 1 + int(torch.randint(48, (), generator=rng))) % 49
            from_ = first if at < gen and not causal else at
            if at == gen and gen > first and not causal and arch != "transformer":
                from_ = first  # a prefix may see GEN, which is the same token in every sample
            allowed[b, from_:end] = True
        with torch.no_grad():
            differs = (model(tokens, reset)[0] != model(changed, reset)[0]).any(-1)
        assert not (differs & ~allowed).any()
        seen, reachable = seen + int((differs & allowed).sum()), reachable + int(allowed.sum())
    assert seen > 0.99 * reachable  # and everything in reach does change


@pytest.mark.parametrize("arch, causal", VARIANTS)
def test_another_sample_of_the_row_changes_no_gradient(arch, causal):
    model, rng = small(arch, causal), torch.Generator().manual_seed(2)
    weights = torch.randn(1, T, 50, generator=rng)
    for _ in range(20):
        tokens, reset, samples = packed_row(rng)
        first, _, end = samples[int(torch.randint(len(samples), (), generator=rng))]
        other = torch.where((torch.arange(T) >= first) & (torch.arange(T) < end), tokens,
                            torch.randint(0, 49, (T,), generator=rng))
        grads = []
        for row in (tokens, other):
            logits, _ = model(row[None], reset[None])
            loss = (logits * weights)[:, first:end].sum()
            names, params = zip(*[(n, p) for n, p in model.named_parameters() if "embed" not in n])
            grads.append(torch.autograd.grad(loss, params))
        for name, g, h in zip(names, *grads):
            assert torch.equal(g, h), name


@pytest.mark.parametrize("arch", ARCHS)
def test_a_prefix_token_changes_every_output_of_its_sample(arch):
    model = small(arch)
    tokens, reset = torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.uint8)
    reset[0, 0], reset[0, 8:] = RESET_FORWARD, RESET_REVERSE
    for at in range(8):
        changed = tokens.clone()
        changed[0, at] = 40
        assert (model(tokens, reset)[0] != model(changed, reset)[0]).any(-1).all()


# ---- decoding ----

@pytest.mark.parametrize("arch, causal", VARIANTS)
def test_decoding_equals_the_parallel_forward(arch, causal, monkeypatch):
    """Prompts of mixed lengths, empty prefixes and bare GENs: same tokens, logits within 1e-4."""
    model, rng = small(arch, causal), torch.Generator().manual_seed(3)
    sizes = [(0, 1), (7, 1), (1, 1), (0, 9), (23, 4), (12, 1)]
    prompts = [(torch.randint(0, 49, (p,), generator=rng).tolist(),
                [49] + torch.randint(0, 49, (s - 1,), generator=rng).tolist()) for p, s in sizes]
    logged, choose = [], LM.choose
    monkeypatch.setattr(LM, "choose", staticmethod(lambda logits, *rest: logged.append(logits) or choose(logits, *rest)))
    written = model.generate(prompts, 12)
    logged = torch.stack(logged, 1)                                        # (B, 12, V)
    for b, (prefix, start) in enumerate(prompts):
        row = torch.tensor([prefix + start + written[b]])
        reset = torch.full_like(row, RESET_REVERSE, dtype=torch.uint8)
        reset[0, :len(prefix)] = 0
        reset[0, 0] |= RESET_FORWARD
        logits = model(row, reset)[0][0, len(prefix) + len(start) - 1:-1]
        assert logits.argmax(-1).tolist() == written[b]
        assert (logits - logged[b]).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ("gated_ssm", "hawk"))
def test_the_state_of_an_ssm_does_not_grow(arch, monkeypatch):
    model, sizes = small(arch), []
    run = LM.run
    def spy(self, tokens, layout, states=None):
        x, states = run(self, tokens, layout, states)
        sizes.append(sum(s.numel() for state in states for s in state))
        return x, states
    monkeypatch.setattr(LM, "run", spy)
    for prompt in (3, 300):
        model.generate([(list(range(3)) * (prompt // 3), [49])], 20)
    assert len(set(sizes)) == 1


def test_generate_stops_and_samples_as_asked():
    model = small()
    greedy = model.generate([([1, 2, 3], [49])], 20)[0]
    stop = greedy[4]
    assert model.generate([([1, 2, 3], [49])], 20, stop=stop)[0] == greedy[:greedy.index(stop) + 1]
    assert model.generate([([1, 2, 3], [49])], 0) == [[]]
    assert model.generate([([1, 2, 3], [49])], 20, temperature=1.0, top_k=1)[0] == greedy
    draws = [model.generate([([1], [49])], 20, temperature=1.0, generator=torch.Generator().manual_seed(s))[0]
             for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for prompts in ([], [([1, 2], [])]):
        with pytest.raises(ValueError, match="GEN"):
            model.generate(prompts, 5)
    for wrong in (dict(temperature=-1.0), dict(temperature=1.0, top_k=0)):
        with pytest.raises(ValueError, match="must not be below 0, nor top_k"):
            model.generate([([1], [49])], 5, **wrong)


# ---- the equations, as plain loops in float64 ----

def one_sample(n_prefix, n, d):
    """Inputs (1, n, d) in float64, their layout bits, and whether each token is causal."""
    reset = torch.zeros(1, n, dtype=torch.uint8)
    reset[0, 0] |= RESET_FORWARD
    reset[0, n_prefix:] |= RESET_REVERSE
    return torch.randn(1, n, d, dtype=torch.float64), reset


def loop_conv(conv, u):
    out = torch.zeros_like(u)
    for t in range(u.shape[1]):
        out[:, t] = conv.bias + sum(conv.weight[k] * u[:, t - k] for k in range(4) if t >= k)
    return out


def loop_recurrence(a, x, reset, n_reverse):
    N, T, h = a.shape[2], a.shape[1], torch.zeros_like(x)
    for n in range(N):
        backwards = n >= N - n_reverse
        state = 0.0
        for t in (reversed(range(T)) if backwards else range(T)):
            cut = reset[0, t] & (RESET_REVERSE if backwards else RESET_FORWARD)
            state = x[0, t, n] + (0 if cut else a[0, t, n] * state)
            h[0, t, n] = state
    return h


@pytest.mark.parametrize("scale_input, bidirectional", [(True, True), (False, False)])
def test_gated_ssm_equals_its_equations(scale_input, bidirectional, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)       # the whole block in float64
    block = model_module.GatedSSM(ModelConfig(d_model=6, d_state=8, scale_input=scale_input), bidirectional).double()
    u, reset = one_sample(5, 9, 6)
    v = loop_conv(block.conv, u)
    f = torch.sigmoid(v @ block.W_f.weight.T + block.W_f.bias)
    W_i, W_z, W_o = block.W_izo.weight.chunk(3)
    i, z, o = torch.sigmoid(v @ W_i.T), v @ W_z.T, F.gelu(v @ W_o.T)
    h = loop_recurrence(f, (1 - f) * i * z if scale_input else i * z, reset, 4 if bidirectional else 0)
    y, _ = block(u, Layout(reset, ModelConfig()))
    assert torch.allclose(y, (o * h) @ block.W_out.weight.T, atol=1e-10)


def test_hawk_equals_its_equations(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = ModelConfig(arch="hawk", d_model=6, d_state=8)
    block = model_module.Hawk(config, True).double()
    u, reset = one_sample(5, 9, 6)
    v = loop_conv(block.conv, u @ block.W_in.weight.T)
    r = torch.sigmoid(v @ block.W_a.weight.T + block.W_a.bias)
    i = torch.sigmoid(v @ block.W_x.weight.T + block.W_x.bias)
    a = torch.exp(-8 * r * F.softplus(block.L))
    h = loop_recurrence(a, (1 - a * a).sqrt() * i * v, reset, 4)
    y, _ = block(u, Layout(reset, config))
    assert torch.allclose(y, (F.gelu(u @ block.W_gate.weight.T) * h) @ block.W_out.weight.T, atol=1e-10)


def test_attention_equals_its_equations():
    """Rotary positions as complex numbers, softmax written out, the mask from its definition."""
    config = ModelConfig(arch="transformer", d_model=8, n_head=2)
    block = model_module.Attention(config, True).double()
    u, reset = one_sample(5, 9, 8)
    q, k, v = (u[0] @ block.W_qkv.weight.T).chunk(3, -1)
    out = torch.zeros(9, 8, dtype=torch.float64)
    turn = torch.polar(torch.ones(9, 2).double(), torch.arange(9)[:, None] * torch.tensor([1.0, 0.01]).double())
    for head in range(2):
        cols = slice(4 * head, 4 * head + 4)
        qc, kc = (torch.complex(w[:, cols][:, :2], w[:, cols][:, 2:]) * turn for w in (q, k))
        for t in range(9):
            keys = [s for s in range(9) if s <= t or s < 5]
            score = torch.stack([(qc[t].conj() * kc[s]).sum().real / 2 for s in keys])
            out[t, cols] = sum(p * v[s, cols] for p, s in zip(score.softmax(0), keys))
    y, _ = block(u, Layout(reset, config))
    assert torch.allclose(y[0], out @ block.W_out.weight.T, atol=1e-6)


def test_bounded_sqrt_has_the_bound_and_else_the_gradient_of_sqrt():
    x = torch.tensor([0.0, 1e-9, 2.5e-7, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    model_module.BoundedSqrt.apply(x).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([1000, 1000, 1000, 0.5 / math.sqrt(1e-3), 0.5], dtype=torch.float64))


# ---- initialisation, precision, optimiser groups ----

@pytest.mark.parametrize("bidirectional", (True, False))
def test_memory_is_spread_from_one_token_to_the_row_in_each_direction(bidirectional):
    for config, longest in ((dict(block_size=512), 512), (dict(block_size=128, memory=1024), 1024)):
        block = model_module.GatedSSM(ModelConfig(d_state=64, **config), bidirectional)
        memory = -1 / torch.sigmoid(block.W_f.bias.detach().double()).log()
        for half in memory.split(32 if bidirectional else 64):
            assert math.isclose(half.min(), 1, rel_tol=1e-3) and math.isclose(half.max(), longest, rel_tol=1e-3)
    a = torch.exp(-8 * F.softplus(model_module.Hawk(ModelConfig(arch="hawk", d_state=64), bidirectional).L.detach()))
    for half in a.split(32 if bidirectional else 64):
        assert math.isclose(half.min(), 0.9, rel_tol=1e-4) and math.isclose(half.max(), 0.999, rel_tol=1e-4)


@pytest.mark.parametrize("arch", ("gated_ssm", "hawk"))
def test_gates_and_scan_stay_in_float32_under_autocast(arch, monkeypatch):
    types, scan = set(), model_module.scan
    monkeypatch.setattr(model_module, "scan", lambda a, x, *rest: types.update((a.dtype, x.dtype)) or scan(a, x, *rest))
    tokens, reset, _ = packed_row(torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        small(arch)(tokens[None], reset[None])
    assert types == {torch.float32}


@pytest.mark.parametrize("arch", ARCHS)
def test_parameter_groups_hold_every_parameter_once_and_spare_the_gates(arch):
    model = small(arch)
    decayed, free = (set(map(id, group["params"])) for group in model.parameter_groups(0.1))
    named = dict(model.named_parameters())
    assert not decayed & free and len(decayed | free) == len(named)
    spared = {n for n, p in named.items() if id(p) in free}
    assert all(n in spared for n in named if n.split(".")[-2] in ("W_f", "W_a", "W_x", "conv", "norm") or n.endswith("L"))
    assert all(n not in spared for n in named if "W_out" in n or "embed" in n)


@pytest.mark.parametrize("arch", ARCHS)
def test_reading_both_ways_costs_no_parameter(arch):
    assert small(arch).n_parameters() == small(arch, causal=True).n_parameters()


@pytest.mark.parametrize("bad, message", [(dict(arch="mamba"), "gated_ssm, hawk"), (dict(n_layer=0), "at least 1"),
                                          (dict(memory=-1), "memory is -1"),
                                          (dict(arch="hawk", conv_width=0), "conv_width"),
                                          (dict(arch="transformer", n_head=5), "n_head")])
def test_a_bad_configuration_names_its_remedy(bad, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**bad)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("preset, low, high", [("cpu", 1.4e6, 2.0e6), ("gpu", 28e6, 36e6), ("110m", 100e6, 112e6),
                                               ("1.4b", 1.2e9, 1.4e9)])
def test_presets_have_their_sizes_in_every_architecture(arch, preset, low, high):
    """Parameters outside embedding and head; 48, 20 and 24 blocks at the paper's size (table 7)."""
    sizes = PRESETS[preset]
    names = ("d_model", "d_state", "n_head", "block_size")
    with torch.device("meta"):
        model = LM(ModelConfig(arch=arch, n_layer=sizes["n_layer"][arch], **{name: sizes[name] for name in names}))
    assert low < sum(p.numel() for p in model.blocks.parameters()) < high
    assert preset != "1.4b" or len(model.blocks) == {"gated_ssm": 48, "hawk": 20, "transformer": 24}[arch]


@pytest.mark.parametrize("arch", ARCHS)
def test_recomputing_activations_saves_memory_and_changes_no_gradient(arch):
    tokens, reset, _ = packed_batch(torch.Generator().manual_seed(0), 4)
    grads, kept = [], []
    for recompute in (False, True):
        model, sizes = small(arch, recompute=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss = model(tokens, reset, tokens)[1]
            kept.append(sum(sizes))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.equal(g, h) for g, h in zip(*grads))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_model_compiles_without_a_graph_break(arch):
    tokens, reset, _ = packed_batch(torch.Generator().manual_seed(0), 2)
    model, losses = small(arch, n_layer=2), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        losses.append(forward(tokens, reset, tokens)[1])
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert torch.allclose(*losses) and all(torch.allclose(g, h, atol=1e-5) for g, h in zip(*grads))


def test_rg_lru_equals_an_implementation_of_others():
    """The layer of the transformers package, weights copied over: forward and gradients."""
    gemma = pytest.importorskip("transformers.models.recurrent_gemma", reason="needs the transformers package")
    N = 16
    ours = model_module.Hawk(ModelConfig(arch="hawk", d_model=8, d_state=N), False)
    config = gemma.configuration_recurrent_gemma.RecurrentGemmaConfig(lru_width=N, hidden_size=N, num_attention_heads=1)
    theirs = gemma.modeling_recurrent_gemma.RecurrentGemmaRglru(config)
    with torch.no_grad():
        for name, source in (("recurrent_gate", ours.W_a), ("input_gate", ours.W_x)):
            getattr(theirs, f"{name}_weight").copy_(source.weight.T[None])
            getattr(theirs, f"{name}_bias").copy_(source.bias[None])
        theirs.recurrent_param.copy_(ours.L)
    v, reset = torch.randn(2, 30, N), torch.zeros(2, 30, dtype=torch.uint8)
    weight, results = torch.randn(2, 30, N), []
    position = torch.arange(1, 31).expand(2, 30)                       # its position 0 would be a reset
    for run, params in ((lambda v: ours.rg_lru(v, Layout(reset, ModelConfig(arch="hawk")))[0],
                         (ours.W_a.weight, ours.W_x.weight, ours.L)),
                        (lambda v: theirs(v, position),
                         (theirs.recurrent_gate_weight, theirs.input_gate_weight, theirs.recurrent_param))):
        leaf = v.clone().requires_grad_()
        h = run(leaf)
        results.append([h, *torch.autograd.grad((h * weight).sum(), (leaf, *params))])
    for one, other in zip(*results):
        other = other[0].T if other.ndim == 3 and other.shape[0] == 1 else other
        assert (one - other).abs().max() <= 1e-5 * max(1, one.abs().max())


# ---- learning ----

def look_up(B, pairs, rng):
    """Question, pairs, question: one of `pairs` keys is asked for, before and after -> a batch."""
    keys = torch.rand(B, 16, generator=rng).argsort(1)[:, :pairs]
    values = torch.randint(16, 32, (B, pairs), generator=rng)
    at = torch.randint(pairs, (B, 1), generator=rng)
    question = keys.gather(1, at)
    tokens = torch.cat([question, torch.stack([keys, values], 2).flatten(1), question, torch.full_like(at, 32)], 1)
    reset, targets = torch.zeros_like(tokens, dtype=torch.uint8), torch.full_like(tokens, -100)
    reset[:, 0], reset[:, -1] = RESET_FORWARD, RESET_REVERSE
    targets[:, -1] = values.gather(1, at)[:, 0]
    return tokens, reset, targets


def learn_to_look_up(most_steps, enough=1.1, pairs=4, **kw):
    """-> (steps, accuracy): trained until the accuracy is enough, or for most_steps."""
    rng = torch.Generator().manual_seed(0)
    model = small(vocab_size=33, block_size=2 * pairs + 3, d_model=64, d_state=64, **kw)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-3, betas=(0.9, 0.95), fused=True)
    for step in range(1, most_steps + 1):
        model(*look_up(64, pairs, rng))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            tokens, reset, targets = look_up(512, pairs, rng)
            accuracy = (model(tokens, reset)[0][:, -1].argmax(-1) == targets[:, -1]).float().mean().item()
            if accuracy > enough:
                break
    return step, accuracy


def test_the_default_form_learns_to_look_up_where_the_bare_form_does_not():
    """1 of 4 pairs; answering with any value of the row scores 25%."""
    steps, accuracy = learn_to_look_up(700, enough=0.9)
    assert accuracy > 0.9
    assert learn_to_look_up(steps, scale_input=False, conv_width=0)[1] < 0.6


def test_the_demonstration_runs(capsys):
    demo()
    assert "#########" in capsys.readouterr().out
