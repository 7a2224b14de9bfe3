"""A quasi-recurrent neural network (QRNN) and the language model built on it, in one file.

An LSTM multiplies its last output by a matrix at every step: W h_{t-1}. So no step can begin before the one
before has ended. A QRNN has no such product. Its gates look at the inputs alone, so one matrix product serves
all steps at once. The recurrence that remains, f_t * c_{t-1}, is one multiplication per neuron: "quasi".

Papers
    QRNN     Bradbury, Merity, Xiong, Socher 2016, "Quasi-Recurrent Neural Networks", arXiv 1611.01576
    AWD      Merity, Keskar, Socher 2017, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182
    Sizes    Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling"

Glossary
    name       symbol   shape          meaning
    x          x_t      (T, B, I)      input: T time steps of B independent streams
    z          z_t      (T, B, H)      candidate: the new value offered to a neuron
    f          f_t      (T, B, H)      forget gate: the share of the OLD value that is kept
    o          o_t      (T, B, H)      output gate
    c          c_t      (T, B, H)      recurrent state: the values of a layer's H neurons
    h          h_t      (T, B, H)      output of a layer
    window     k        -              time steps each gate sees: x_{t-k+1} .. x_t
    state      -        [(c, x_prev)]  what crosses from one chunk of text to the next, one pair per layer:
                                       c (B, H) and the last k-1 inputs x_prev (k-1, B, I)
    G          G_t      (T, B, H)      the part of dL/dc_t that comes from the layers above, through h_t
    G_next     -        (B, H)         the part of dL/dc_T that comes from the chunks after this one
    r          r_t      (T, B, H)      dL/dc_t, all of it: from above and from the future

Sections: the recurrence and its gradient; layers; the language model; and last, "the same, faster", which
only saves time and memory. Each piece there is proven equal to the plain form it names.

Not here: bidirectional layers, the QRNN's encoder-decoder attention, a convolution over more than time.

Run `python qrnn.py` to see one product serve all steps, and the backward pass beside autograd's.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

try:                                            # comes with torch for GPUs; for the last section alone
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---------------------------------------------------------------------------- the recurrence and its gradient

def pool_loop(f, z, c0):
    """The QRNN's only recurrence, which its paper calls pooling, as on a blackboard (QRNN, Eq. 3).

        c_t = f_t * c_{t-1} + (1 - f_t) * z_t

    f, z: (T, B, H); c0: (B, H). Returns c_1 .. c_T as (T, B, H). Autograd does the backward pass, one step at
    a time; `pool` below gives the same, faster.
    """
    c, states = c0, []
    for f_t, z_t in zip(f, z):
        c = f_t * c + (1 - f_t) * z_t                                   # (B, H)
        states.append(c)
    return torch.stack(states)                                          # (T, B, H)


class Pool(torch.autograd.Function):
    """`pool_loop` with its backward pass written out, so that neither direction builds a graph of T steps.

    Let G_t arrive at c_t from the layers above, and G_next from the chunk to come, through the border that
    c_T crosses. c_t also feeds c_{t+1} = f_{t+1} c_t + (1 - f_{t+1}) z_{t+1}, so the whole gradient r_t of
    c_t follows a recurrence that runs backwards in time:

        r_T = G_T + G_next,    r_t = G_t + f_{t+1} r_{t+1}

    and from c_t = f_t c_{t-1} + (1 - f_t) z_t, differentiated in each of its three arguments (df_t: dL/df_t),

        df_t = r_t (c_{t-1} - z_t),    dz_t = r_t (1 - f_t),    dc_0 = f_1 r_1

    dc_0, the gradient that leaves the chunk through its left border, is what truncated backpropagation throws
    away. It is the G_next of the chunk before: what a decoupled neural interface (dni.py) learns to predict.
    """

    @staticmethod
    def forward(ctx, f, z, c0):
        c = pool_forward(f, z, c0)                                      # pool_loop's, and c_0: (T+1, B, H)
        ctx.save_for_backward(f, z, c)
        return c[1:], c[-1].clone()                                     # outputs may not share memory

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G, G_next):
        return pool_backward(G, G_next, *ctx.saved_tensors)             # df, dz, dc_0


def pool(f, z, c0):
    """c_t = f_t c_{t-1} + (1 - f_t) z_t; shapes as in `pool_loop`, same values and gradients.

    Returns c_1 .. c_T (T, B, H) and, apart, c_T (B, H), which the next chunk needs. First derivatives only.
    """
    if len(f) == 1:                                                     # one step: no loop to save
        c = f * c0 + (1 - f) * z
        return c, c[0]
    return Pool.apply(f, z, c0)


# ----------------------------------------------------------------------------------------------------- layers

class QRNNLayer(nn.Module):
    """One QRNN layer (QRNN, section 2).

        z_t = tanh(W_z x_{t-k+1..t} + b_z)          candidate and gates see a window of k inputs and no state,
        f_t = sigmoid(W_f x_{t-k+1..t} + b_f)       so all three, for all t, are ONE matrix product
        o_t = sigmoid(W_o x_{t-k+1..t} + b_o)
        c_t = f_t c_{t-1} + (1 - f_t) z_t           pooling
        h_t = o_t c_t                               the output ("fo-pooling")

    input_size I, hidden_size H >= 1; window k >= 1.
    zoneout in [0, 1]: the probability that a neuron keeps its old value at a step, f_t = 1 (QRNN 2.1).
        When evaluating, the expected gate is used, f_t = zoneout + (1 - zoneout) f_t.
    weight_dropout in [0, 1): dropout on the weights, one mask a call (AWD, section 2, on the QRNN's product).
    """

    def __init__(self, input_size, hidden_size, window=1, zoneout=0.0, weight_dropout=0.0):
        super().__init__()
        if min(input_size, hidden_size, window) < 1:
            raise ValueError(f"input_size, hidden_size and window must be at least 1, "
                             f"got {input_size}, {hidden_size}, {window}")
        self.input_size, self.hidden_size, self.window = input_size, hidden_size, window
        self.zoneout, self.weight_dropout = zoneout, weight_dropout
        linear = nn.Linear(window * input_size, 3 * hidden_size)
        self.weight, self.bias = linear.weight, linear.bias             # (3H, kI), (3H,), PyTorch's own init

    def zero_state(self, x):
        """The state before the first step of x (T, B, .): all neurons zero, nothing read."""
        return (x.new_zeros(x.shape[1], self.hidden_size),
                x.new_zeros(self.window - 1, x.shape[1], self.input_size))

    def draw(self, x, generator=None):
        """The random masks of one call on x (T, B, .): weights to use (3H, kI), steps to skip (T, B, H).

        None stands for no mask. generator: where the random numbers come from; None for torch's own.
        """
        use = skip = None
        if self.training and self.weight_dropout:
            use = toss(self.weight.shape, 1 - self.weight_dropout, x.device, generator)
        if self.training and self.zoneout:
            skip = toss((*x.shape[:2], self.hidden_size), self.zoneout, x.device, generator)
        return use, skip

    def forward(self, x, state=None, masks=None):
        """x: (T, B, I), T >= 1; state: (c (B, H), x_prev (k-1, B, I)), or None for zeros; masks: from `draw`.

        Returns the output (T, B, H) and the state after step T. Raises ValueError for any other shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.input_size or len(x) == 0:
            raise ValueError(f"expected an input of shape (T >= 1, B, {self.input_size}), "
                             f"got {tuple(x.shape)}")
        c0, x_prev = self.zero_state(x) if state is None else state
        expected = (x.shape[1], self.hidden_size), (self.window - 1, x.shape[1], self.input_size)
        if (tuple(c0.shape), tuple(x_prev.shape)) != expected:
            raise ValueError(f"expected a state (c, x_prev) of shapes {expected}, "
                             f"got {tuple(c0.shape)}, {tuple(x_prev.shape)}")
        use, skip = self.draw(x) if masks is None else masks
        inputs = torch.cat([x_prev, x]) if self.window > 1 else x       # (k-1 + T, B, I)
        windows = torch.cat([inputs[i:i + len(x)] for i in range(self.window)], -1)   # (T, B, kI)

        weight = self.weight if use is None else self.weight * use / (1 - self.weight_dropout)
        gates = F.linear(windows, weight, self.bias)                    # (T, B, 3H)
        # Under autocast the product comes back in a 16-bit type; gates and state stay in the type of x.
        z, f, o = (gate.to(x.dtype) for gate in gates.chunk(3, -1))
        z, f = torch.tanh(z), torch.sigmoid(f)                          # (T, B, H) each
        if self.zoneout:                                                # f, or 1 where the step is skipped
            f = f + (self.zoneout if skip is None else skip) * (1 - f)
        c, c_T = pool(f, z, c0)
        x_prev = inputs[len(inputs) - (self.window - 1):]               # the last k - 1, none for k = 1
        return torch.sigmoid(o) * c, (c_T, x_prev)


def locked_mask(x, p, training=True):
    """Dropout's mask for x (T, B, H), one for all steps of a chunk (AWD, 4.2): (1, B, H), 0 or 1/(1-p)."""
    return F.dropout(x.new_ones(1, *x.shape[1:]), p) if training and p else None


def locked_dropout(x, p, training=True):
    """Dropout with a `locked_mask`. x: (T, B, H), same shape out."""
    mask = locked_mask(x, p, training)
    return x if mask is None else x * mask


class QRNN(nn.Module):
    """A stack of QRNN layers with the calling conventions of torch.nn.LSTM.

    input_size: I. hidden_size: H of each of num_layers layers, or a list with one size a layer (num_layers
    then has no say). Raises ValueError where sizes and windows do not match.
    window: k of every layer, or a list with one a layer.
    batch_first: input and output are (B, T, .), not (T, B, .). The state is not affected, as in nn.LSTM.
    dropout: between layers, not after the last. Unlike nn.LSTM's the mask is locked over time.
    compile: train with the `Compiled` form of the same code. The first call then takes up to a minute.
    layer: passed on to QRNNLayer (zoneout, weight_dropout).
    """

    def __init__(self, input_size, hidden_size, num_layers=1, *, batch_first=False, dropout=0.0, window=1,
                 compile=False, **layer):
        super().__init__()
        sizes = [hidden_size] * num_layers if isinstance(hidden_size, int) else list(hidden_size)
        windows = [window] * len(sizes) if isinstance(window, int) else list(window)
        if not sizes or len(windows) != len(sizes):
            raise ValueError(f"{len(sizes)} layer sizes and {len(windows)} windows: one of each a layer, "
                             "at least one")
        self.batch_first, self.dropout = batch_first, dropout
        self.layers = nn.ModuleList(QRNNLayer(i, h, k, **layer)
                                    for i, h, k in zip([input_size] + sizes, sizes, windows))
        self.compiled = Compiled(self.stack) if compile else None

    def forward(self, x, state=None):
        """x: (T, B, I), or (B, T, I) with batch_first; state: [(c, x_prev)] a layer, or None for zeros.

        Returns (output, state): the last layer's h for every step, and the state to hand to the next call.
        """
        x = x.transpose(0, 1) if self.batch_first else x
        state = state or [layer.zero_state(x) for layer in self.layers]
        masks = [layer.draw(x) for layer in self.layers]
        # A mask for what layer l hands up to l + 1, so none for the first. (c lends its shape, type and
        # device.)
        locked = [None] + [locked_mask(c[None], self.dropout, self.training) for c, _ in state[:-1]]
        stack = self.stack
        if self.compiled and self.training and min(x.shape[:2]) > 1:
            # torch.compile compiles again for a T or B of 1, and for a state that requires no gradient. So a
            # size of 1 is left uncompiled, and every state is made to require a gradient.
            stack = self.compiled
            state = [(c if c.requires_grad else c.detach().requires_grad_(), x_prev) for c, x_prev in state]
        h, state = stack(x, state, masks, locked)
        return h.transpose(0, 1) if self.batch_first else h, state

    def stack(self, h, state, masks, locked):
        """The layers one after the other, with all that is random given: what `compile` compiles."""
        new_state = []
        for layer, s, mask, lock in zip(self.layers, state, masks, locked, strict=True):
            h, s = layer(h if lock is None else h * lock, s, mask)
            new_state.append(s)
        return h, new_state


# --------------------------------------------------------------------------------------------- language model

class LanguageModel(nn.Module):
    """Embedding -> QRNN stack -> decoder tied to the embedding, regularised as in AWD (paper, section 3).

    (Departure 19: the paper says four layers of 1550; here, as in AWD, the last has size E.)

    vocabulary: V words. embedding_size E; hidden_size H; num_layers: all of size H but the last, which is E
    so that decoder and embedding can be one matrix. window: words the first layer sees; the others see 1, as
    in AWD's QRNN. Dropouts, each in [0, 1): embedding (whole words), input, hidden (between layers), output
    (locked over time), weight (on the gates' matrix). zoneout as in QRNNLayer. compile: train with the
    `Compiled` forms of stack and softmax.
    """

    def __init__(self, vocabulary, embedding_size=400, hidden_size=1550, num_layers=4, *, window=2,
                 dropout_embedding=0.0, dropout_input=0.0, dropout_hidden=0.0, dropout_output=0.0,
                 dropout_weight=0.0, zoneout=0.0, compile=False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)              # AWD, section 5
        self.decoder_bias = nn.Parameter(torch.zeros(vocabulary))
        self.rnn = QRNN(embedding_size, [hidden_size] * (num_layers - 1) + [embedding_size],
                        window=[window] + [1] * (num_layers - 1), dropout=dropout_hidden,
                        zoneout=zoneout, weight_dropout=dropout_weight, compile=compile)
        self.softmax = Compiled(softmax_and_gradient) if compile else softmax_and_gradient
        self.dropout_embedding, self.dropout_input = dropout_embedding, dropout_input
        self.dropout_output = dropout_output

    def features(self, tokens, state=None):
        """tokens: (T, B) of int64. Returns the output (T, B, E) after and before dropout, and the state."""
        x = self.embedding(tokens)                                      # (T, B, E)
        if self.training and self.dropout_embedding:                    # a word is dropped wherever it occurs
            word_mask = F.dropout(x.new_ones(self.embedding.num_embeddings, 1), self.dropout_embedding)
            x = x * word_mask[tokens]
        x = locked_dropout(x, self.dropout_input, self.training)
        raw, state = self.rnn(x, state)
        return locked_dropout(raw, self.dropout_output, self.training), raw, state

    def forward(self, tokens, state=None):
        """tokens: (T, B) of int64. Returns the logits of each next token (T, B, V) and the state."""
        output, _, state = self.features(tokens, state)
        return F.linear(output, self.embedding.weight, self.decoder_bias), state

    def loss(self, tokens, targets, state=None, activation=0.0, temporal=0.0):
        """tokens, targets: (T, B). Returns (nll, penalty, state). Training minimises nll + penalty.

        nll is the cross-entropy in nats, a mean over the T B tokens (those whose target is not -100).
        penalty is AWD's, section 4.6: activation * mean(h'^2) on the output after dropout plus
        temporal * mean((h_{t+1} - h_t)^2) on the output before it, means over all their numbers.
        """
        output, raw, state = self.features(tokens, state)
        nll = decoder_loss(output.flatten(0, 1), self.embedding.weight, self.decoder_bias, targets.flatten(),
                           self.softmax)
        penalty = activation * output.square().mean()
        if temporal and len(raw) > 1:
            penalty = penalty + temporal * (raw[1:] - raw[:-1]).square().mean()
        return nll, penalty, state


# ------------------------------------------------------------------------------------------- the same, faster
#
# Nothing below adds to the method. Each piece names the plain form that it is proven equal to (tests 1).

@torch.library.custom_op("qrnn::pool_forward", mutates_args=())
def pool_forward(f: torch.Tensor, z: torch.Tensor, c0: torch.Tensor) -> torch.Tensor:
    """The plain form is `pool_loop`. c_0 .. c_T (T+1, B, H), without a graph, into memory taken once.

    (An "op", so that torch.compile leaves it whole, and so that a GPU can have its own: see below.)
    """
    c = z.new_empty(len(z) + 1, *c0.shape)
    c[0] = c0
    c_t = c.unbind()
    for t, (f_t, z_t) in enumerate(zip(f.unbind(), z.unbind())):
        torch.lerp(z_t, c_t[t], f_t, out=c_t[t + 1])                    # f c + (1 - f) z
    return c


@torch.library.custom_op("qrnn::pool_backward", mutates_args=())
def pool_backward(G: torch.Tensor, G_next: torch.Tensor, f: torch.Tensor, z: torch.Tensor,
                  c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain form is autograd through `pool_loop`. df, dz (T, B, H) and dc_0 (B, H), from r_T down to r_1.

    c: c_0 .. c_T, as `pool_forward` returns it; the rest as in `Pool`.
    """
    r = torch.empty_like(G, memory_format=torch.contiguous_format)
    torch.add(G[-1], G_next, out=r[-1])
    G_t, f_t, r_t = G.unbind(), f.unbind(), r.unbind()
    for t in range(len(r) - 2, -1, -1):
        torch.addcmul(G_t[t], f_t[t + 1], r_t[t + 1], out=r_t[t])       # r_t = G_t + f_{t+1} r_{t+1}
    return r * (c[:-1] - z), r * (1 - f), r[0] * f[0]                  # r first: they get its memory layout


@pool_forward.register_fake
def _(f, z, c0):
    return z.new_empty(z.shape[0] + 1, *c0.shape)


@pool_backward.register_fake
def _(G, G_next, f, z, c):
    return f.new_empty(f.shape), z.new_empty(z.shape), G_next.new_empty(G_next.shape)


if triton:
    # On a GPU each step of the loops above is a launch of its own. Here a program takes BLOCK columns
    # (stream, neuron) through all T steps: one launch each way, and every number is read once. Neighbours in
    # memory are read together. num_stages: the loads of the next steps are under way while this one is
    # computed.
    BLOCK, STAGES = 64, 8

    @triton.jit
    def pool_forward_kernel(f, z, c0, c, T, N, BLOCK: tl.constexpr, STAGES: tl.constexpr):
        """All pointers are to the first step. N = B H columns."""
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        c_t = tl.load(c0 + column, inside)
        tl.store(c + column, c_t, inside)
        for _ in tl.range(T, num_stages=STAGES):
            f_t, z_t = tl.load(f + column, inside), tl.load(z + column, inside)
            c_t = f_t * c_t + (1 - f_t) * z_t
            f, z, c = f + N, z + N, c + N
            tl.store(c + column, c_t, inside)

    @triton.jit
    def pool_backward_kernel(G, G_next, f, z, c, df, dz, dc0, T, N, BLOCK: tl.constexpr,
                             STAGES: tl.constexpr):
        """G, f, z, df and dz point to step T, c to c_{T-1}; all move down."""
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        from_later = tl.load(G_next + column, inside)                   # f_{t+1} r_{t+1}; at T, G_next
        for _ in tl.range(T, num_stages=STAGES):
            f_t, z_t = tl.load(f + column, inside), tl.load(z + column, inside)
            c_before, G_t = tl.load(c + column, inside), tl.load(G + column, inside)
            r_t = G_t + from_later
            tl.store(df + column, r_t * (c_before - z_t), inside)
            tl.store(dz + column, r_t * (1 - f_t), inside)
            from_later = f_t * r_t
            G, f, z, c, df, dz = G - N, f - N, z - N, c - N, df - N, dz - N
        tl.store(dc0 + column, from_later, inside)                      # f_1 r_1

    @pool_forward.register_kernel("cuda")
    def pool_forward_triton(f, z, c0):
        f, z, c0 = f.contiguous(), z.contiguous(), c0.contiguous()
        c, N = z.new_empty(len(z) + 1, *c0.shape), c0.numel()
        with torch.cuda.device_of(z):                                   # not always the current one
            pool_forward_kernel[triton.cdiv(N, BLOCK),](f, z, c0, c, len(f), N, BLOCK, STAGES, num_warps=2)
        return c

    @pool_backward.register_kernel("cuda")
    def pool_backward_triton(G, G_next, f, z, c):
        G, G_next, f, z = G.contiguous(), G_next.contiguous(), f.contiguous(), z.contiguous()
        df, dz, dc0, N = torch.empty_like(f), torch.empty_like(z), torch.empty_like(G_next), G_next.numel()
        last = G[-1], G_next, f[-1], z[-1], c[-2], df[-1], dz[-1], dc0
        with torch.cuda.device_of(z):
            pool_backward_kernel[triton.cdiv(N, BLOCK),](*last, len(f), N, BLOCK, STAGES, num_warps=2)
        return df, dz, dc0


def toss(shape, p, device, generator=None):
    """The plain form is torch.rand(shape) < p: a mask, True with probability p in [0, 1].

    On a CPU much faster. p is rounded to a multiple of 2^-16: at 2^-17 and below the mask is all False.
    generator: where the random bits come from; None for torch's own.
    """
    share, n = round(p * 2 ** 16), math.prod(shape)                     # of the 2^16 values of 16 bits
    if share == 0:
        return torch.zeros(shape, dtype=torch.bool, device=device)
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=device)
    bits.random_(-2 ** 63, None, generator=generator)                   # 64 random bits each
    # An int16 is uniform on -2^15 .. 2^15 - 1: the lowest `share` values are True.
    return bits.view(torch.int16)[:n].view(shape) <= share - 2 ** 15 - 1


IGNORED = -100                                                          # a target that is not counted


def decoder_loss(x, weight, bias, target, softmax=None):
    """The plain form is F.cross_entropy(F.linear(x, weight, bias), target), with its (n, V) logits in memory.

    x: (n, E), weight: (V, E), bias: (V,), target: (n,) of int64, -100 where it is not counted. A scalar, in
    nats. First derivatives only. Raises ValueError where x and target differ in length.
    softmax: `softmax_and_gradient`, which None stands for, or its `Compiled` form.
    """
    if target.shape != x.shape[:1]:
        raise ValueError(f"expected a target for each of {len(x)} rows, "
                         f"got a target of shape {tuple(target.shape)}")
    softmax = (softmax or softmax_and_gradient) if torch.is_grad_enabled() else None
    return DecoderLoss.apply(x, weight, bias, target, softmax)


class DecoderLoss(torch.autograd.Function):
    """`decoder_loss`, a block of rows at a time, so that no (n, V) matrix outlives its block.

    The gradient of the logits needs no second pass, so forward makes dx, dW and db too, while a block's
    softmax is there, and backward only scales them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, target, softmax):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_low, weight_low = x.to(dtype), weight.to(dtype)               # 16 bits under autocast
        nll = x.new_zeros(())
        dx, dw, db = (torch.zeros_like(a) if softmax else None for a in (x, weight, bias))
        # Blocks of about 16 MB of float32 logits, but at least 200 rows: each block adds a whole dW.
        rows = max(200, 2 ** 22 // len(weight))
        for block in (slice(i, i + rows) for i in range(0, len(x), rows)):
            logits, y = x_low[block] @ weight_low.t(), target[block].clone()              # (rows, V), (rows,)
            if not softmax:
                nll += F.cross_entropy(logits.to(x.dtype) + bias, y, ignore_index=IGNORED, reduction="sum")
                continue
            block_nll, dl = softmax(logits, bias, y)
            nll += block_nll
            dx[block] = dl @ weight_low
            dw += dl.t() @ x_low[block]
            db += dl.sum(0)
        counted = (target != IGNORED).sum()
        ctx.save_for_backward(dx, dw, db, counted)
        return nll / counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw, db, counted = ctx.saved_tensors
        grad = grad / counted
        return dx * grad, dw * grad, db * grad, None, None


def softmax_and_gradient(logits, bias, y):
    """Of n rows of logits (n, V) without their bias (V,), and targets y (n,): summed nll and its gradient (n,
    V).

    With l_i = logits_i + bias, nll = sum_i(logsumexp(l_i) - l_i[y_i]) and dnll/dl_i = softmax(l_i) -
    onehot(y_i). A row whose target is IGNORED counts for nothing: its nll and its gradient are zero.
    """
    l = logits.to(bias.dtype) + bias                                    # (n, V)
    is_counted = (y != IGNORED)[:, None].to(l.dtype)                    # (n, 1), 1 or 0
    y = y.masked_fill(y == IGNORED, 0)
    top = l.amax(-1, keepdim=True)
    exp = (l - top).exp()
    total = exp.sum(-1, keepdim=True)                                   # (n, 1)
    log_p_y = l.gather(1, y[:, None]) - top - total.log()
    gradient = (exp * (is_counted / total)).to(logits.dtype)
    at_y = is_counted * (log_p_y.exp() - 1)     # (n, 1): p - 1, subtracted before it is rounded to 16 bits
    gradient[torch.arange(len(y), device=y.device), y] = at_y.to(logits.dtype)[:, 0]
    return -(is_counted * log_p_y).sum(), gradient


class Compiled:
    """The plain form is `function`; this is torch.compile's, fused where it can be, once for all T and B.

    Where that does not work (no C++ compiler, say) it warns, in one line, and is the plain function from then
    on. copy.deepcopy and pickle make a new one: for the same function, or the method of the copied module.
    """

    def __init__(self, function):
        self.function, self.fast = function, torch.compile(function, dynamic=True)

    def __reduce__(self):
        return Compiled, (self.function,)

    def __call__(self, *arguments):
        if self.fast:
            try:
                return self.fast(*arguments)
            except Exception as error:
                result = self.function(*arguments)                 # raises again what is the caller's mistake
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(f"torch.compile failed, so the plain form goes on in its place: {reason[:200]}",
                              stacklevel=2)
                self.fast = None
                return result
        return self.function(*arguments)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer, x, state = QRNNLayer(3, 4), torch.randn(6, 2, 3), None
    at_once, _ = layer(x)                                               # (6, 2, 4): one product for six steps
    for t in range(6):
        h, state = layer(x[t:t + 1], state)                             # a product for each step, as an LSTM
        print(f"step {t + 1}: h = {h[0, 0, 0]:+.6f} alone, {at_once[t, 0, 0]:+.6f} in one product for all")
    print("\nThe backward pass of the pooling:")
    leaves = [x.requires_grad_() for x in (torch.rand(6, 2, 3), torch.randn(6, 2, 3), torch.randn(2, 3))]
    G, G_next = torch.randn(6, 2, 3), torch.randn(2, 3)
    c = pool_loop(*leaves)
    by_autograd = torch.autograd.grad((G * c).sum() + (G_next * c[-1]).sum(), leaves)
    c, c_T = pool(*leaves)
    by_hand = torch.autograd.grad((G * c).sum() + (G_next * c_T).sum(), leaves)
    for name, a, b in zip(("f", "z", "c_0"), by_autograd, by_hand):
        print(f"dL/d{name:<4} autograd {a.flatten()[0]:+.6f}   by hand {b.flatten()[0]:+.6f}   "
              f"largest difference {(a - b).abs().max():.1e}")
