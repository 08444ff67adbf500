"""model.py -- language models that read their prefix both ways and write causally after it.

One residual stack, three kinds of block: the Gated SSM, Hawk, and a Transformer as the control.

    Gated SSM (section 3.4)     f, i = sigmoid(W_f u), sigmoid(W_i u);  z = W_z u;  o = gelu(W_o u)
                                h[t] = f[t] h[t-1] + (1 - f[t]) i[t] z[t]
                                y = W_out (o * h)
    Hawk (section 2.1, A.16.2)  v = conv(W_in u);  r, i = sigmoid(W_a v + b_a), sigmoid(W_x v + b_x)
                                a = exp(-8 r softplus(L));  h[t] = a[t] h[t-1] + sqrt(1 - a[t]^2) i[t] v[t]
                                y = W_out (gelu(W_gate u) * h), then a gated MLP
    Transformer (A.8)           attention with rotary positions, then a gated MLP

Symbols: B batch, T tokens in a row, D = d_model, N = d_state (channels of the recurrence), V vocabulary,
u the normalised input of a block, h the recurrence's state, f, a gates that forget, i a gate that lets in.

A row holds packed samples, each `prefix, GEN, label` (section 3.1). In a bidirectional block the second
half of the N channels scans right to left over the prefix; blocks 0, 2, 4 ... are bidirectional, the others
causal (every Transformer block sees the prefix both ways), at a causal model's parameters and cost. `reset` (B, T) says
where samples begin and which tokens are causal; `Layout` turns it into what the blocks need.

Run it:  python model.py            parameters, shapes, and which input each output can see
         python model.py --ckpt=out/ckpt.pt --prompt='def main'             a trained model goes on
         python model.py --ckpt=out/ckpt.pt --prompt='x = ___' --objective=infill      see --help

Departures from the paper, all ours: the input is scaled by (1 - f) and forget biases are spread, so that
channels remember from one token to `memory` (block_size) tokens; a width-4 causal convolution stands before the
Gated SSM's gates. `scale_input=False, conv_width=0` gives the paper's bare form, which takes about twice as
many steps to learn to look things up (README; tests/test_model.py compares them).
"""
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from scan import RESET_FORWARD, RESET_REVERSE, scan

ARCHS = ("gated_ssm", "hawk", "transformer")


@dataclass
class ModelConfig:
    arch: str = "gated_ssm"    # one of ARCHS
    vocab_size: int = 336      # V: text and special tokens
    block_size: int = 512      # tokens in a row; not a limit of an SSM
    n_layer: int = 4
    d_model: int = 192         # D
    d_state: int = 384         # N, of the SSMs
    n_head: int = 4            # of the Transformer
    causal: bool = False       # True: no block reads the prefix right to left
    memory: int = 0            # the longest memory of the Gated SSM at initialisation, in tokens; 0: block_size
    conv_width: int = 4        # of the convolution before the gates; 0: none (Gated SSM only)
    scale_input: bool = True   # Gated SSM: input times (1 - f); False is the paper's bare form
    recompute: bool = False    # keep no activations inside blocks, compute them again in backward

    def __post_init__(self):
        if self.arch not in ARCHS:
            raise ValueError(f'arch {self.arch!r} is unknown; choose one of {", ".join(ARCHS)}')
        for name in ("vocab_size", "block_size", "n_layer", "d_model", "d_state", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.memory < 0:
            raise ValueError(f"memory is {self.memory}; it must be at least 1 token, or 0 for block_size")
        if self.conv_width < 0 or (self.arch == "hawk" and self.conv_width < 1):
            raise ValueError(f"conv_width is {self.conv_width}; it must be at least 1 for hawk, else 0")
        if self.arch == "transformer" and self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model {self.d_model} does not divide into {self.n_head} heads of even "
                             f"size; change n_head or d_model")


class Layout:
    """What the blocks need to know of a row: computed once from `reset`, shared by every layer.

    reset (B, T) uint8, bits RESET_FORWARD at a sample's first token, RESET_REVERSE at its causal tokens.
    last (B,): index of each row's last real token, where decoding goes on; None in training.
    """

    def __init__(self, reset, config, last=None, position=None):
        self.reset, self.last = reset, last
        B, T = reset.shape
        sample = (reset & RESET_FORWARD).int().cumsum(1)              # 0, 0: before the row's first start
        if config.arch == "transformer":
            steps = torch.arange(T, device=reset.device)
            position = steps[None] if position is None else position[:, None]
            half = config.d_model // config.n_head // 2           # rotary positions (arXiv 2104.09864)
            angle = position[:, None, :, None] * 10000.0 ** (-torch.arange(half, device=reset.device) / half)
            self.turn = angle.cos(), angle.sin()                  # (1 or B, 1, T, half)
            seen = steps[:, None] >= steps                            # (T, T), query and key
            if not config.causal:
                seen = seen | ((reset & RESET_REVERSE) == 0)[:, None, :]
            self.mask = (seen & (sample[:, :, None] == sample[:, None, :]))[:, None]     # (B, 1, T, T)
        else:  # taps[k] is 1 where token t - k is of the same sample as token t
            self.taps = [(sample == F.pad(sample, (k, 0))[:, :T])[..., None] for k in range(config.conv_width)]

    def take(self, x, width=1):
        """x (B, width - 1 + T, C) -> the `width` entries that end at each row's last token (B, width, C)."""
        at = self.last[:, None] + torch.arange(width, device=x.device)
        return x.gather(1, at[..., None].expand(-1, -1, x.size(2)))


class CausalConv(nn.Module):
    """Depthwise convolution over the last `width` tokens of the same sample (Hawk's; A.16.2)."""

    def __init__(self, n_channel, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, n_channel) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(n_channel))

    def forward(self, u, layout, tail=None):
        """u (B, T, C), tail (B, width - 1, C) the inputs before it -> the same shapes."""
        B, T, C = u.shape
        past = len(self.weight) - 1
        tail = u.new_zeros(B, past, C) if tail is None else tail.to(u.dtype)
        extended = torch.cat([tail, u], 1)
        y = torch.addcmul(self.bias, u, self.weight[0])
        for k in range(1, past + 1):
            y = y + self.weight[k] * (extended[:, past - k:past - k + T] * layout.taps[k])
        return y, None if layout.last is None else layout.take(extended[:, 1:], past)


class Recurrent(nn.Module):
    """What the two SSM mixers share: N channels, the last n_reverse of which run right to left."""

    def __init__(self, config, bidirectional):
        super().__init__()
        self.N, self.n_reverse = config.d_state, config.d_state // 2 if bidirectional else 0

    def recur(self, a, x, layout, h0):
        """The scan, and the state of the forward channels at each row's last token, if it is asked for."""
        h = scan(a, x, layout.reset, self.n_reverse, h0)
        return h, None if layout.last is None else layout.take(h)[:, 0]

    def spread(self, low, high):
        """(N,) values from low to high, the whole range in each direction's channels."""
        return torch.cat([torch.linspace(low, high, n) for n in (self.N - self.n_reverse, self.n_reverse)])


class GatedSSM(Recurrent):
    """Mixer and MLP in one (section 3.4)."""

    def __init__(self, config, bidirectional):
        super().__init__(config, bidirectional)
        D, N = config.d_model, config.d_state
        self.conv = CausalConv(D, config.conv_width) if config.conv_width else None
        self.W_f = nn.Linear(D, N)                       # the one map with a bias
        self.W_izo = nn.Linear(D, 3 * N, bias=False)
        self.W_out = nn.Linear(N, D, bias=False)
        self.scale_input = config.scale_input
        # f = exp(-1 / memory) at initialisation, memory from 1 to config.memory tokens (our choice)
        memory = self.spread(0, math.log(config.memory or config.block_size)).exp()
        self.W_f.bias.data = -torch.expm1(1 / memory).log()

    def forward(self, u, layout, state=None):
        h0, tail = state or (None, None)
        if self.conv is not None:
            u, tail = self.conv(u, layout, tail)
        f = self.W_f(u).float()                          # (B, T, N), gates and scan in float32
        i, z, o = self.W_izo(u).float().chunk(3, dim=-1)
        x = torch.sigmoid(i) * z
        if self.scale_input:
            x = x * torch.sigmoid(-f)                    # 1 - f, without cancellation near 1
        h, h0 = self.recur(torch.sigmoid(f), x, layout, h0)
        return self.W_out(F.gelu(o) * h), (h0, tail)


class BoundedSqrt(torch.autograd.Function):
    """sqrt whose gradient is at most 1000, as it is infinite where a gate is 1 (Hawk, A.16.2)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return g / (2 * x.clamp(min=1 / (4 * 1000 ** 2)).sqrt())


class Hawk(Recurrent):
    """A gated branch beside convolution and RG-LRU (section 2.1, A.16.2; Griffin, arXiv 2402.19427)."""

    def __init__(self, config, bidirectional):
        super().__init__(config, bidirectional)
        D, N = config.d_model, config.d_state
        self.W_gate = nn.Linear(D, N, bias=False)
        self.W_in = nn.Linear(D, N, bias=False)
        self.conv = CausalConv(N, config.conv_width)
        self.W_a, self.W_x = nn.Linear(N, N), nn.Linear(N, N)
        self.W_out = nn.Linear(N, D, bias=False)
        # a at r = 1 is uniform in [0.9, 0.999]: log a = -8 softplus(L)
        self.L = nn.Parameter(torch.log(torch.expm1(-self.spread(0.9, 0.999).log() / 8)))

    def rg_lru(self, v, layout, h0=None):
        r = torch.sigmoid(self.W_a(v).float())
        i = torch.sigmoid(self.W_x(v).float())
        log_a = -8 * r * F.softplus(self.L)
        x = BoundedSqrt.apply(-torch.expm1(2 * log_a)) * i * v.float()
        return self.recur(log_a.exp(), x, layout, h0)

    def forward(self, u, layout, state=None):
        h0, tail = state or (None, None)
        v, tail = self.conv(self.W_in(u), layout, tail)
        h, h0 = self.rg_lru(v, layout, h0)
        return self.W_out(F.gelu(self.W_gate(u)) * h), (h0, tail)


class Attention(nn.Module):
    """Multi-head attention, both ways inside the prefix, causal after it, within a sample (A.8)."""

    def __init__(self, config, bidirectional):
        super().__init__()
        D, self.n_head = config.d_model, config.n_head
        self.W_qkv = nn.Linear(D, 3 * D, bias=False)
        self.W_out = nn.Linear(D, D, bias=False)

    @staticmethod
    def rotate(x, turn):
        """x (B, heads, T, d) turned by its position."""
        (c, s), (left, right) = turn, x.chunk(2, -1)
        return torch.cat([left * c - right * s, left * s + right * c], -1).to(x.dtype)

    def forward(self, u, layout, state=None):
        B, T, D = u.shape
        q, k, v = self.W_qkv(u).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, d)
        q, k, mask = self.rotate(q, layout.turn), self.rotate(k, layout.turn), layout.mask
        if state is not None:  # one more token: it sees every real token before it
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
            mask = torch.cat([state[2], mask], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if layout.last is not None and state is None:
            mask = (torch.arange(T, device=u.device) <= layout.last[:, None])[:, None, None]
        return self.W_out(y.transpose(1, 2).reshape(B, T, D)), (k, v, mask)


class GatedMLP(nn.Module):
    """GeGLU of expansion 8/3 (A.8, A.16.2)."""

    def __init__(self, D):
        super().__init__()
        self.W_up = nn.Linear(D, 2 * (8 * D // 3), bias=False)
        self.W_out = nn.Linear(8 * D // 3, D, bias=False)

    def forward(self, u):
        gate, value = self.W_up(u).chunk(2, dim=-1)
        return self.W_out(F.gelu(gate) * value)


class Block(nn.Module):
    """Pre-norm residual block: a mixer, then an MLP unless the mixer is one too."""

    def __init__(self, config, layer):
        super().__init__()
        mixer = {"gated_ssm": GatedSSM, "hawk": Hawk, "transformer": Attention}[config.arch]
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.mixer = mixer(config, bidirectional=not config.causal and layer % 2 == 0)
        self.mlp = None
        if config.arch != "gated_ssm":
            self.mlp_norm, self.mlp = nn.RMSNorm(config.d_model, eps=1e-6), GatedMLP(config.d_model)

    def forward(self, x, layout, state=None):
        y, state = self.mixer(self.norm(x), layout, state)
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class LM(nn.Module):
    """The language model: embedding, blocks, norm, head.

    The head is not tied to the embedding. To look something up, blocks compare tokens, whose vectors must
    be large in the residual stream; a tied head would then predict the very token it reads (a loss of 12
    at the start). Looking up 1 of 8 pairs is learnt in 600 to 800 steps so, and not in 800 with a tied
    embedding of the usual 0.02.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.W_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.W_head.weight, std=0.02)
        for name, p in self.blocks.named_parameters():   # our choice: variance-preserving maps
            if p.ndim == 2 and "conv" not in name:
                depth = config.n_layer if "W_out" in name else 1
                nn.init.normal_(p, std=(p.size(1) * depth) ** -0.5)

    def forward(self, tokens, reset, targets=None):
        """tokens (B, T) int64, reset (B, T) uint8, targets (B, T) int64 with -100 for no loss
        -> logits (B, T, V), and the mean cross-entropy in nats a label token (None without targets)."""
        x, _ = self.run(tokens, Layout(reset, self.config))
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def run(self, tokens, layout, states=None):
        """tokens (B, T) -> the last block's output (B, T, D) and every block's state."""
        x = self.embed(tokens)
        new_states = []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks)):
            if self.config.recompute and self.training and torch.is_grad_enabled():
                x, state = checkpoint(block, x, layout, state, use_reentrant=False)
            else:
                x, state = block(x, layout, state)
            new_states.append(state)
        return x, new_states

    def head(self, x):
        return self.W_head(self.norm(x))

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self, weight_decay):
        """Optimiser groups: no decay for W_f (section 3.4), RG-LRU (A.16.2), norms, biases, convolutions."""
        groups = {weight_decay: [], 0.0: []}
        for name, p in self.named_parameters():
            free = p.ndim < 2 or any(key in name for key in ("W_f", "W_a", "W_x", "conv"))
            groups[0.0 if free else weight_decay].append(p)
        return [dict(params=params, weight_decay=decay) for decay, params in groups.items()]

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop=None, temperature=0.0, top_k=None, generator=None):
        """Continue a batch of prompts; the prompts in one parallel pass, then one token at a time.

        prompts: list of (prefix, start), two sequences of token ids: the prefix is read both ways, the
        start, at least GEN, is causal. Greedy at temperature 0, else sampled from the top_k (all if None).
        Returns a list of lists of new tokens, each ending with `stop` where that was written.
        SSMs carry a state of fixed size (section 3.1), so time and memory a token do not grow.
        """
        if not prompts or any(len(start) == 0 for _, start in prompts):
            raise ValueError("generate needs at least one prompt, and GEN at the start of each causal part")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature {temperature} must not be below 0, nor top_k {top_k} below 1")
        device = self.embed.weight.device
        lengths = torch.tensor([len(prefix) + len(start) for prefix, start in prompts], device=device)
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)
        reset = torch.full_like(tokens, RESET_REVERSE, dtype=torch.uint8)
        for b, (prefix, start) in enumerate(prompts):
            tokens[b, :lengths[b]] = torch.tensor([*prefix, *start], device=device)
            reset[b, :len(prefix)] = 0
        reset[:, 0] |= RESET_FORWARD
        layout = Layout(reset, self.config, last=lengths - 1)
        x, states = self.run(tokens, layout)
        x = layout.take(x)                               # (B, 1, D)
        written, done = [], torch.zeros_like(lengths, dtype=torch.bool)
        for n in range(max_new_tokens):
            token = self.choose(self.head(x)[:, -1].float(), temperature, top_k, generator)
            written.append(token)
            done |= token == (-1 if stop is None else stop)
            if done.all() or n == max_new_tokens - 1:
                break
            layout = Layout(torch.full_like(token[:, None], RESET_REVERSE, dtype=torch.uint8), self.config,
                            last=torch.zeros_like(token), position=lengths + n)
            x, states = self.run(token[:, None], layout, states)
        rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
        return [row[:row.index(stop) + 1] if stop in row else row for row in rows]

    @staticmethod
    def choose(logits, temperature, top_k, generator):
        """logits (B, V) -> tokens (B,)."""
        if temperature == 0:
            return logits.argmax(-1)
        if top_k is not None:
            kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]


def sees(model, reset):
    """(T, T) bool: does output t depend on input s? Read off gradients of a random combination."""
    T = reset.size(1)
    x = torch.randn(1, T, model.config.d_model, requires_grad=True)
    layout, y = Layout(reset, model.config), x
    for block in model.blocks:
        y, _ = block(y, layout)
    y = (y * torch.randn_like(y)).sum(-1)[0]
    return torch.stack([torch.autograd.grad(y[t], x, retain_graph=True)[0][0].abs().sum(-1) > 0 for t in range(T)])


def demo():
    """Parameters and shapes of every architecture; which input each output sees, in two packed samples."""
    torch.manual_seed(0)
    prefix, label = 5, 4
    one = [0] * prefix + [RESET_REVERSE] * label
    reset = torch.tensor([2 * one + 2 * [RESET_FORWARD | RESET_REVERSE]], dtype=torch.uint8)
    reset[0, 0] |= RESET_FORWARD
    reset[0, len(one)] |= RESET_FORWARD
    for arch in ARCHS:
        model = LM(ModelConfig(arch=arch))
        logits, _ = model(torch.zeros_like(reset, dtype=torch.long), reset)
        print(f"{arch:12s} {model.n_parameters():>9,} parameters; tokens {tuple(reset.shape)} -> "
              f"logits {tuple(logits.shape)}")
    print("\nWhich input (column) each output (row) sees: two packed samples, then padding.\n"
          "p: a prefix token, c: a causal token (GEN and the label), .: padding\n")
    names = 2 * (prefix * "p" + label * "c") + ".."
    grids = [sees(LM(ModelConfig(n_layer=2, d_model=16, d_state=16, causal=causal)), reset)
             for causal in (False, True)]
    print(f'  {"gated_ssm":{len(names) + 6}s}gated_ssm --causal')
    print("    " + names + "      " + names)
    for t, name in enumerate(names):
        print(f"  {name} " + f"    {name} ".join("".join(" #"[int(s)] for s in grid[t]) for grid in grids))


def as_trained(objective, text, tok, start, end):
    """(prefix, start) of a prompt, laid out as training samples of the objective are."""
    ids = tok.encode(text)
    if objective == "continue":
        return [], [tok.GEN, *ids]
    if objective == "infill":
        parts = text.split("___")
        if not 1 < len(parts) <= tok.n_masks + 1:
            raise ValueError(f"the prompt has {len(parts) - 1} gaps; write 1 to {tok.n_masks} of them as ___")
        ids = list(tok.encode(parts[0]))
        for mask, part in zip(tok.MASKS, parts[1:]):
            ids += [mask, *tok.encode(part)]
    if objective == "lookup":
        ids = [tok.COPY, tok.START, *tok.encode(start), tok.END, *tok.encode(end), tok.CONTEXT, *ids]
    cls = {"infill": "infilling", "lookup": "selective_copying", "copy": "copying", "unshuffle": "deshuffling"}[objective]
    return [tok.paradigm[cls], *ids], [tok.GEN]


def try_out(argv):
    """A trained model answers a prompt."""
    import argparse
    from train import load_model
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
    parser.add_argument("--prompt", required=True, help="the text; infill: gaps as ___; unshuffle: shuffled text")
    parser.add_argument("--objective", default="continue", choices=("continue", "infill", "copy", "unshuffle", "lookup"))
    parser.add_argument("--start", default="", help="lookup: what stands just before the answer in the prompt")
    parser.add_argument("--end", default="", help="lookup: what stands just after it")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    parser.add_argument("--top_k", type=int, help="sample from so many tokens at most")
    args = parser.parse_args(argv)
    try:
        model, tok, _ = load_model(args.ckpt)
        prompt = as_trained(args.objective, args.prompt, tok, args.start, args.end)
        answer, = model.eval().generate([prompt], args.max_new_tokens, tok.DONE, args.temperature, args.top_k)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    print((args.prompt if args.objective == "continue" else "") + tok.decode(answer).removesuffix("<DONE>"))


if __name__ == "__main__":
    try_out(sys.argv[1:]) if len(sys.argv) > 1 else demo()
