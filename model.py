"""Language models that read their prefix in both directions and write causally after it.

One residual stack and three kinds of block: the Gated SSM, Hawk, and a Transformer as the control.

    Gated SSM (3.4, A.16.1)     f, i = sigmoid(W_f u), sigmoid(W_i u);  z = W_z u;  o = gelu(W_o u)
                                h[t] = f[t] h[t-1] + (1 - f[t]) i[t] z[t];  y = W_out (o * h)
    Hawk (2.1, A.16.2)          v = conv(W_in u);  r, i = sigmoid(W_a v + b_a), sigmoid(W_x v + b_x)
                                a = exp(-8 r softplus(L))
                                h[t] = a[t] h[t-1] + sqrt(1 - a[t]^2) i[t] v[t]
                                y = W_out (gelu(W_gate u) * h), then a gated MLP
    Transformer (A.8)           attention with rotary positions, then a gated MLP

Symbols (sections are of Birdie, arXiv 2411.01030)
    B, T     rows of a batch, tokens of a row        D  d_model, width of the residual stream
    V        vocabulary                              N  d_state, channels of the recurrence
    u        the normalised input of a block         h  the state; f, a its gates, i an input gate
    reset    uint8 (B, T) of bits (A.4): RESET_FORWARD at a sample's first token, which nothing
             reaches from the left; RESET_REVERSE at causal tokens and padding, from the right

A row holds packed samples, each `prefix, GEN, label`. In a bidirectional block the second half of
the N channels scans right to left over the prefix (3.1). Blocks 0, 2, 4 ... are bidirectional, the
others causal, so parameters and cost are a causal model's. A Transformer's blocks all see the
prefix both ways.

Run it:  python model.py                                parameters; which input each output sees
         python model.py --ckpt=out/ckpt.pt --prompt='def main'      a trained model answers

Departures from the paper, ours
    Gated SSM    the input is scaled by 1 - f; forget biases are spread, so that channels remember
                 from one token to `memory` tokens; a causal convolution of width 4 stands before
                 the gates. `scale_input=False, conv_width=0` is the paper's bare form, which
                 takes twice as many steps to learn to look things up. Only W_f has a bias; the
                 paper's maps all do
    packing      convolutions are masked between samples, where the paper spaces samples apart
    reset        bits, as a sample without prefix needs both on one token; the paper writes 1 and 2
    precision    weights and residual stream are float32; the paper keeps Hawk's in bfloat16
"""
import argparse
import logging
import math
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from scan import is_sealed, one_line, scan

RESET_FORWARD, RESET_REVERSE = 1, 2     # as objectives.py writes them
IGNORE = -100                           # a target without loss


@dataclass
class ModelConfig:
    arch: str = "gated_ssm"     # a name in MIXERS
    vocab_size: int = 2080      # V: text and special tokens
    n_layer: int = 4            # blocks
    d_model: int = 192          # D
    d_state: int = 384          # N, of the SSMs
    n_head: int = 4             # of the Transformer
    causal: bool = False        # True: no block reads the prefix right to left
    memory: int = 1024          # Gated SSM: the longest memory at initialisation, in tokens
    conv_width: int = 4         # of the convolution before the gates; 0: none (Gated SSM only)
    scale_input: bool = True    # Gated SSM: input times 1 - f; False is the paper's bare form
    recompute: bool = False     # backward computes what is pointwise again: a third of the memory

    def __post_init__(self):
        if self.arch not in MIXERS:
            raise ValueError(f"arch {self.arch!r} is unknown; choose one of {', '.join(MIXERS)}")
        if self.conv_width < (self.arch == "hawk"):
            raise ValueError(f"conv_width is {self.conv_width}; it must be 0 or more, Hawk's 1")
        if self.arch == "transformer" and self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model {self.d_model} does not divide into {self.n_head} heads of "
                             f"even size; change n_head or d_model")


class Boundaries:
    """Where samples begin and where they are causal: read off `reset` once, used by every block.

    first, causal (B, T, 1) bool: nothing reaches these tokens from the left, from the right.
    last (B,): each row's last real token when a prompt is read for decoding; None in training.
    position (B,): of the one token that a Transformer decodes; None where rows begin at 0.
    """

    def __init__(self, reset, config, last=None, position=None):
        self.last = last
        self.first = (reset & RESET_FORWARD).bool().unsqueeze(-1)
        self.causal = (reset & RESET_REVERSE).bool().unsqueeze(-1)
        sample = self.first.int().cumsum(1)             # (B, T, 1), counted from the row's start
        T = reset.size(1)
        if config.arch == "transformer":
            steps = torch.arange(T, device=reset.device)
            position = steps[None] if position is None else position[:, None]
            self.rotation = Attention.rotation(position, config.d_model // config.n_head // 2)
            sees = steps[:, None] >= steps              # (T, T): query, key
            if not config.causal:
                sees = sees | ~self.causal.mT           # every key in a prefix
            self.attends = (sees & (sample == sample.mT)).unsqueeze(1)              # (B, 1, T, T)
        else:                   # entry k - 1 (B, T, 1): is token t - k in the sample of token t?
            # Samples count from 1, padding is 0; so is a token decoded alone, which starts none.
            self.same_sample = [sample == F.pad(sample, (0, 0, k, 0))[:, :T]
                                for k in range(1, config.conv_width)]

    def tail(self, x, width=1):
        """What decoding goes on from: the `width` entries that end at each row's last token.

        x (B, width - 1 + T, C) -> (B, width, C); None in training.
        """
        if self.last is None:
            return None
        at = self.last[:, None] + torch.arange(width, device=x.device)
        return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.size(2)))


def linear(n_in, n_out, bias=False, n_layer=1):
    """nn.Linear that keeps its input's variance, or divides it by n_layer (a block's last map)."""
    layer = nn.Linear(n_in, n_out, bias)
    nn.init.normal_(layer.weight, std=(n_in * n_layer) ** -0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


# ---- mixers: (u, boundaries, state) -> (y, state) ----------------------------------------------
# u and y are (B, T, D). In training no state is kept; in decoding it is what one more token needs.
# A mixer initialises its own parameters and marks those without weight decay.

class CausalConv(nn.Module):
    """Depthwise convolution over the last `width` tokens of the same sample (A.16.2)."""

    def __init__(self, n_channel, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, n_channel) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(n_channel))
        self.weight.no_decay = True

    def forward(self, u, boundaries, before=None):
        """u (B, T, C), before (B, width - 1, C): the inputs before it -> the same shapes."""
        B, T, C = u.shape
        n_before = len(self.weight) - 1
        before = u.new_zeros(B, n_before, C) if before is None else before.to(u.dtype)
        extended = torch.cat([before, u], 1)
        y = torch.addcmul(self.bias, u, self.weight[0])
        for k in range(1, n_before + 1):
            earlier = extended[:, n_before - k:n_before - k + T]
            y = y + self.weight[k] * (earlier * boundaries.same_sample[k - 1])
        return y, boundaries.tail(extended[:, 1:], n_before)


class Recurrence(nn.Module):
    """What SSM mixers share: N channels, of which the second half may run right to left."""

    def __init__(self, n_channel, bidirectional):
        super().__init__()
        self.n_reverse = n_channel // 2 if bidirectional else 0
        self.n_forward = n_channel - self.n_reverse

    def recur(self, a, x, boundaries, h0=None):
        """h[t] = a[t] h[t-1] + x[t], float32 (B, T, N) -> (h, state of the forward channels)."""
        n = self.n_forward
        if h0 is not None:              # one more causal token: right to left, h is just its input
            h = x + F.pad(a[..., :n] * h0, (0, self.n_reverse))
        else:
            h = scan(a[..., :n].masked_fill(boundaries.first, 0), x[..., :n])
            if self.n_reverse:
                a_reverse = a[..., n:].masked_fill(boundaries.causal, 0)
                h = torch.cat([h, scan(a_reverse, x[..., n:], reverse=True)], -1)
        return h, boundaries.tail(h[..., :n])

    def spread(self, low, high):
        """(N,) values from low to high, the whole range in each direction's channels."""
        return torch.cat([torch.linspace(low, high, n) for n in (self.n_forward, self.n_reverse)])


class GatedSSM(Recurrence):
    """Mixer and MLP in one (section 3.4)."""
    needs_mlp = False

    def __init__(self, config, bidirectional):
        super().__init__(config.d_state, bidirectional)
        D, N = config.d_model, config.d_state
        self.scale_input = config.scale_input
        self.conv = CausalConv(D, config.conv_width) if config.conv_width else None
        self.W_f = linear(D, N, bias=True)
        self.W_izo = linear(D, 3 * N)
        self.W_out = linear(N, D, n_layer=config.n_layer)
        self.W_f.weight.no_decay = True                         # section 3.4
        # f = exp(-1 / memory) at initialisation, memory from 1 to config.memory tokens: our choice
        memory = self.spread(0, math.log(config.memory)).exp()
        self.W_f.bias.data = -torch.expm1(1 / memory).log()

    def forward(self, u, boundaries, state=None):
        h0, before = state or (None, None)
        if self.conv is not None:
            u, before = self.conv(u, boundaries, before)
        f = self.W_f(u).float()                         # (B, T, N), gates and scan in float32
        i, z, o = self.W_izo(u).float().chunk(3, dim=-1)
        x = torch.sigmoid(i) * z
        if self.scale_input:
            x = x * torch.sigmoid(-f)                   # 1 - f, without cancellation near 1
        h, h0 = self.recur(torch.sigmoid(f), x, boundaries, h0)
        y = (F.gelu(o) * h).to(self.W_out.weight.dtype)
        return self.W_out(y), (h0, before)


class BoundedSqrt(torch.autograd.Function):
    """sqrt with a gradient of at most 1000, as it is infinite where a gate is 1 (A.16.2)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return g / (2 * x.clamp(min=1 / (4 * 1000 ** 2)).sqrt())


class Hawk(Recurrence):
    """A gated branch beside convolution and RG-LRU (2.1, A.16.2; Griffin, arXiv 2402.19427)."""
    needs_mlp = True

    def __init__(self, config, bidirectional):
        super().__init__(config.d_state, bidirectional)
        D, N = config.d_model, config.d_state
        self.W_gate, self.W_in = linear(D, N), linear(D, N)
        self.conv = CausalConv(N, config.conv_width)
        self.W_a, self.W_x = linear(N, N, bias=True), linear(N, N, bias=True)
        self.W_out = linear(N, D, n_layer=config.n_layer)
        # a at r = 1 is uniform in [0.9, 0.999] (Griffin): log a = -8 softplus(L)
        self.L = nn.Parameter(torch.log(torch.expm1(-self.spread(0.9, 0.999).log() / 8)))
        for gate in (self.W_a, self.W_x):
            gate.weight.no_decay = True                         # A.16.2

    def rg_lru(self, v, boundaries, h0=None):
        r = torch.sigmoid(self.W_a(v).float())
        i = torch.sigmoid(self.W_x(v).float())
        log_a = -8 * r * F.softplus(self.L.float())
        x = BoundedSqrt.apply(-torch.expm1(2 * log_a)) * i * v.float()
        return self.recur(log_a.exp(), x, boundaries, h0)

    def forward(self, u, boundaries, state=None):
        h0, before = state or (None, None)
        v, before = self.conv(self.W_in(u), boundaries, before)
        h, h0 = self.rg_lru(v, boundaries, h0)
        y = (F.gelu(self.W_gate(u)) * h).to(self.W_out.weight.dtype)
        return self.W_out(y), (h0, before)


class Attention(nn.Module):
    """Multi-head attention, both ways inside the prefix, causal after it, within a sample (A.8)."""
    needs_mlp = True

    def __init__(self, config, bidirectional):
        super().__init__()
        self.n_head = config.n_head
        self.W_qkv = linear(config.d_model, 3 * config.d_model)
        self.W_out = linear(config.d_model, config.d_model, n_layer=config.n_layer)

    @staticmethod
    def rotation(position, n):
        """position (1 or B, T) -> cos, sin (1 or B, 1, T, n) (arXiv 2104.09864; base: A.8)."""
        speed = 250_000.0 ** (-torch.arange(n, device=position.device) / n)
        angle = position[:, None, :, None] * speed
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x, rotation):
        """x (B, heads, T, d), turned by its position."""
        (cos, sin), (left, right) = rotation, x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).to(x.dtype)

    def forward(self, u, boundaries, state=None):
        B, T, D = u.shape
        q, k, v = self.W_qkv(u).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = (self.rotate(x, boundaries.rotation) for x in (q, k))    # (B, heads, T, d)
        attends = boundaries.attends
        if state is not None:           # one more token: it sees every real token before it
            keys, values, real = state
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            attends = torch.cat([real, attends], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attends)
        y = self.W_out(y.transpose(1, 2).reshape(B, T, D))
        if boundaries.last is None:     # training keeps nothing
            return y, None
        if state is None:               # of the prompt, later tokens see the real ones
            real = torch.arange(T, device=u.device) <= boundaries.last[:, None]
            attends = real[:, None, None]
        return y, (k, v, attends)


MIXERS = {"gated_ssm": GatedSSM, "hawk": Hawk, "transformer": Attention}


# ---- what backward keeps, with `recompute` -----------------------------------------------------
# Products of matrices, attention and states take long to compute and are kept, in 16 bits but for
# the states. All between them is pointwise and computed again: a Gated SSM keeps a quarter (eager)
# to a half (compiled) of what it would.

aten = torch.ops.aten
KEPT = [aten.mm.default, aten.addmm.default, torch.ops.birdie.scan.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default]
# torch warns of writing in place; nothing here does
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
LOSS_TOKENS = 4096      # whose logits are in float32 at the same time


def lean(function, *args):
    """function(*args), whose backward (once) computes again what is not in KEPT."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False,
                      context_fn=partial(create_selective_checkpoint_contexts, KEPT))


# ---- the language model ------------------------------------------------------------------------

class GatedMLP(nn.Module):
    """GeGLU of expansion 8/3 (A.8, A.16.2)."""

    def __init__(self, config):
        super().__init__()
        hidden = 8 * config.d_model // 3
        self.W_up = linear(config.d_model, 2 * hidden)
        self.W_out = linear(hidden, config.d_model, n_layer=config.n_layer)

    def forward(self, u):
        gate, value = self.W_up(u).chunk(2, dim=-1)
        return self.W_out(F.gelu(gate) * value)


class Block(nn.Module):
    """Pre-norm residual block: a mixer, then an MLP unless the mixer is one too."""

    def __init__(self, config, layer):
        super().__init__()
        mixer = MIXERS[config.arch]
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.mixer = mixer(config, bidirectional=not config.causal and layer % 2 == 0)
        if mixer.needs_mlp:
            self.mlp_norm = nn.RMSNorm(config.d_model, eps=1e-6)
            self.mlp = GatedMLP(config)

    def forward(self, x, boundaries, state=None):
        y, state = self.mixer(self.norm(x), boundaries, state)
        x = x + y
        if self.mixer.needs_mlp:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


def run_blocks(model, x, boundaries, states=None):
    """x (B, T, D) -> the output of the model's last block (B, T, D), and every block's state."""
    new_states = []
    for block, state in zip(model.blocks, states or [None] * len(model.blocks)):
        if model.config.recompute and torch.is_grad_enabled():
            x, state = lean(block, x, boundaries, state)
        else:
            x, state = block(x, boundaries, state)
        new_states.append(state)
    return x, new_states


class LM(nn.Module):
    """The language model: embedding, blocks, norm, head.

    The head is not tied to the embedding. To look something up, blocks compare tokens, whose
    vectors must be large in the residual stream; a tied head would then predict the very token it
    reads (a loss of 12 at the start). Looking up 1 of 8 pairs is learnt in 600 to 800 steps so,
    and not in 800 with a tied embedding of the usual 0.02.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.W_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.W_head.weight, std=0.02)

    @classmethod
    def load(cls, path):
        """A checkpoint of train.py or eval_phonebook.py
        -> (model on the CPU, its Tokenizer's arguments, the whole checkpoint)."""
        saved = load_checkpoint(path)
        with fits(path):
            model = cls(ModelConfig(**saved["model_config"]))
            model.load_state_dict(saved["model"])
        return model, saved["tokenizer"], saved

    def forward(self, tokens, reset, targets=None):
        """tokens (B, T) int64, reset (B, T) uint8, targets (B, T) int64 with IGNORE for no loss
        -> logits (B, T, V), and the mean cross-entropy in nats a label token (or None). With
        `recompute` and targets there are no logits (None), only the loss."""
        x, _ = run_blocks(self, self.embed(tokens), Boundaries(reset, self.config))
        if targets is None:
            return self.W_head(self.norm(x)), None
        if self.config.recompute:       # a few logits at a time are ever in float32
            pieces = zip(x.flatten(0, 1).split(LOSS_TOKENS), targets.flatten().split(LOSS_TOKENS))
            loss = sum(lean(self.sum_of_losses, *piece)[1] for piece in pieces)
            return None, loss / (targets != IGNORE).sum().clamp(min=1)
        logits, loss = self.sum_of_losses(x.flatten(0, 1), targets.flatten())
        return logits.view(*tokens.shape, -1), loss / (targets != IGNORE).sum().clamp(min=1)

    def sum_of_losses(self, x, targets):
        logits = self.W_head(self.norm(x))
        return logits, F.cross_entropy(logits.float(), targets, ignore_index=IGNORE,
                                       reduction="sum")

    def parameter_groups(self, weight_decay):
        """Optimiser groups: weight decay for matrices, none for biases, norms and the marked."""
        decay, free = [], []
        for p in self.parameters():
            (free if p.ndim < 2 or hasattr(p, "no_decay") else decay).append(p)
        return [dict(params=decay, weight_decay=weight_decay), dict(params=free, weight_decay=0.0)]

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop=None, temperature=0.0, generator=None):
        """Continue prompts of any lengths: each in one parallel pass, then one token at a time.

        prompts: [(prefix, start)], two sequences of token ids each: the prefix is read both ways,
        the start, at least GEN, is causal. Greedy at temperature 0, else sampled. Returns a list of
        lists of new tokens, each ending with `stop` where that was written. An SSM's state has a
        fixed size (section 3.1), so time and memory a token do not grow.
        """
        if not prompts or any(len(start) == 0 for _, start in prompts):
            raise ValueError("generate needs a prompt, and GEN at the start of each causal part")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        tokens, reset, lengths = self.lay_out(prompts)
        boundaries = Boundaries(reset, self.config, last=lengths - 1)
        x, states = run_blocks(self, self.embed(tokens), boundaries)
        x = boundaries.tail(x)                          # (B, 1, D)

        written, done = [], torch.zeros_like(lengths, dtype=torch.bool)
        one_more = torch.full_like(lengths[:, None], RESET_REVERSE, dtype=torch.uint8)
        for n in range(max_new_tokens):
            logits = self.W_head(self.norm(x))[:, -1].float()
            written.append(self.choose(logits, temperature, generator))
            if stop is not None:
                done |= written[-1] == stop
            if done.all() or n == max_new_tokens - 1:
                break
            boundaries = Boundaries(one_more, self.config, torch.zeros_like(lengths), lengths + n)
            x, states = run_blocks(self, self.embed(written[-1][:, None]), boundaries, states)
        rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
        return [row[:row.index(stop) + 1] if stop in row else row for row in rows]

    def lay_out(self, prompts):
        """-> tokens (B, T), reset (B, T), lengths (B,); rows end in padding."""
        device = self.embed.weight.device
        rows = [torch.tensor([*prefix, *start], device=device) for prefix, start in prompts]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        reset = torch.full_like(tokens, RESET_REVERSE, dtype=torch.uint8)
        for b, (prefix, _) in enumerate(prompts):
            reset[b, :len(prefix)] = 0
        reset[:, 0] |= RESET_FORWARD
        return tokens, reset, torch.tensor([len(row) for row in rows], device=device)

    @staticmethod
    def choose(logits, temperature, generator):
        """logits (B, V) -> tokens (B,)."""
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits.double()        # tiny temperatures are 0 in float32
        p = F.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
        return torch.multinomial(p, 1, generator=generator)[:, 0]


def load_checkpoint(path, *needed):
    """The saved dict of tensors, numbers and strings; `needed` names what else it must hold.

    Raises FileNotFoundError, or ValueError if it cannot be read, or is not as it was written.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; pass a checkpoint, such as {path}/ckpt.pt")
    try:
        with open(path, "rb") as file:
            if not is_sealed(file):
                raise ValueError(f"{path} is damaged, or no checkpoint of this version: its "
                                 f"checksum is wrong; choose another, or remove it and train anew")
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no checkpoint {path}; train one with --out_dir="
                                f"{os.path.dirname(path) or '.'}") from None
    except (OSError, MemoryError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read here, and may be intact ({one_line(error)})")
    missing = {"model", "model_config", "tokenizer", *needed} - set(saved)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it is not a checkpoint of "
                         f"this version: choose another, or train anew")
    return saved


@contextmanager
def fits(path):
    """What is loaded from `path` here, is of this code's classes and sizes, or ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if "allocate" in str(error):            # of memory: errors_in_one_line says so
            raise
        raise ValueError(f"{path} does not fit this code, which has other parts or sizes "
                         f"({one_line(error)}); use the code it was made with, or train anew")


# ---- command lines -----------------------------------------------------------------------------

RANGES = {          # of flags that are numbers, of every command
    "seed": (int, 0, 2 ** 63 - 1), "workers": (int, 0, 256), "jobs": (int, 1, 1024),
    "threads": (int, 1, 1024), "minutes": (float, 0, 10 ** 6),
    "n_layer": (int, 1, 1024), "d_model": (int, 1, 2 ** 14), "d_state": (int, 1, 2 ** 16),
    "n_head": (int, 1, 1024), "memory": (int, 1, 2 ** 24), "block_size": (int, 1, 2 ** 22),
    "batch_size": (int, 1, 2 ** 16), "max_steps": (int, 1, 10 ** 9), "eval_rows": (int, 1, 100),
    "lr": (float, 1e-12, 100), "beta2": (float, 0, 0.999999), "warmup": (float, 0, 1),
    "cooldown": (float, 0, 1), "weight_decay": (float, 0, 100), "clip": (float, 1e-12, 1e12),
    "entries_min": (int, 1, 10 ** 4), "entries_max": (int, 1, 10 ** 4),
    "numbers_max": (int, 1, 10 ** 4), "test_books": (int, 0, 10 ** 6),
    "max_new_tokens": (int, 1, 10 ** 6), "temperature": (float, 0, 1e6),
}


def number(kind, low, high):
    """A type of flag: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def command_line(usage):
    """-> (parser, a function that adds a flag to it)."""
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")

    def flag(name, **settings):
        if name[2:] in RANGES:
            settings["type"] = number(*RANGES[name[2:]])
        elif name in ("--out_dir", "--ckpt", "--init_from"):
            settings["type"] = os.path.expanduser           # a shell leaves --out_dir=~/x as it is
        elif type(settings.get("default")) in (int, float):
            settings["type"] = type(settings["default"])
        parser.add_argument(name, **settings)
    return parser, flag


@contextmanager
def errors_in_one_line():
    """Bad input ends a command with one line; what the terminal cannot show is escaped. `python -X
    dev` shows where an error was raised."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        raise SystemExit(f"error: {' '.join(str(error).split())}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "allocate" in str(error)):
            raise
        raise SystemExit(f"error: memory is short ({one_line(error)}); pass smaller sizes")


# ---- demonstration -----------------------------------------------------------------------------

def sees(model, reset):
    """(T, T) bool: does output t depend on input s? Read off the gradient of a random
    projection."""
    T = reset.size(1)
    x = torch.randn(1, T, model.config.d_model, requires_grad=True)
    y, _ = run_blocks(model, x, Boundaries(reset, model.config))
    y = (y * torch.randn_like(y)).sum(-1)[0]
    return torch.stack([torch.autograd.grad(y[t], x, retain_graph=True)[0][0].abs().sum(-1) > 0
                        for t in range(T)])


def demo():
    """Parameters of every architecture; which input each output sees, in two packed samples."""
    torch.manual_seed(0)
    sample = [RESET_FORWARD] + 4 * [0] + 4 * [RESET_REVERSE]
    reset = torch.tensor([2 * sample + 2 * [RESET_FORWARD | RESET_REVERSE]], dtype=torch.uint8)
    names = 2 * "pppppcccc" + ".."
    print("Which input (column) each output (row) sees, in two samples and padding\n"
          "(p: a prefix token, c: a causal token, GEN and the label)")
    for arch in MIXERS:
        model = LM(ModelConfig(arch=arch))
        logits, _ = model(torch.zeros_like(reset, dtype=torch.long), reset)
        print(f"\n{arch}: {model.n_parameters():,} parameters; tokens {tuple(reset.shape)} -> "
              f"logits {tuple(logits.shape)}\n\n    {names}")
        seen = sees(LM(ModelConfig(arch=arch, n_layer=2, d_model=16, d_state=16)), reset)
        for name, row in zip(names, seen.tolist()):
            print(f"  {name} " + "".join(" #"[s] for s in row))


def answer(argv):
    """A trained model answers a prompt, asked as it was in training."""
    from objectives import CLASSES, Tokenizer, as_prompt    # only here; it imports nothing of ours
    parser, flag = command_line("python model.py --ckpt=FILE --prompt=TEXT [--FLAG=VALUE ...]")
    flag("--ckpt", required=True, help="a checkpoint of train.py")
    flag("--prompt", required=True, help="the text; gaps as ___")
    flag("--objective", default="next_token_prediction", choices=CLASSES)
    flag("--start", default="", help="selective_copying: what stands just before the answer")
    flag("--end", default="", help="selective_copying: what stands just after it")
    flag("--max_new_tokens", default=200, help="the longest answer")
    flag("--temperature", default=0.0, help="0: the most likely token each time")
    args = parser.parse_args(argv)
    model, tokenizer, _ = LM.load(args.ckpt)
    tok = Tokenizer(**tokenizer)
    prompt = as_prompt(args.objective, args.prompt, tok, args.start, args.end)
    tokens, = model.generate([prompt], args.max_new_tokens, tok.DONE, args.temperature)
    opening = args.prompt if args.objective == "next_token_prediction" else ""
    print(opening + tok.decode(tokens).removesuffix("<DONE>"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends it without a word
    with errors_in_one_line():
        answer(sys.argv[1:]) if len(sys.argv) > 1 else demo()
