"""A quasi-recurrent neural network (QRNN) and the language model built on it, in one file.

An LSTM multiplies its previous output by a matrix at every step. So no step can begin before the previous
one has ended. A QRNN has no such product. Its gates look at the inputs alone, so one matrix product serves
all steps at once. The recurrence that remains, f_t * c_{t-1}, is one multiplication per neuron: "quasi".

Papers
    QRNN     Bradbury, Merity, Xiong, Socher 2016, "Quasi-Recurrent Neural Networks", arXiv 1611.01576
    AWD      Merity, Keskar, Socher 2017, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182

Glossary
    name       symbol   shape          meaning
    x          x_t      (T, B, I)      input: T time steps of B independent streams
    z          z_t      (T, B, H)      candidate: the new value offered to a neuron
    f          f_t      (T, B, H)      forget gate: the share of the OLD value that is kept
    o          o_t      (T, B, H)      output gate
    c          c_t      (T, B, H)      recurrent state: the values of a layer's H neurons
    h          h_t      (T, B, H)      output of a layer
    window     -        -              how many inputs each gate sees: x_t and the window - 1 before it
    state      -        [(c, x_prev)]  what crosses from one chunk of text to the next, one pair per layer:
                                       c (B, H) and the last window - 1 inputs, x_prev (window - 1, B, I)

Not here: bidirectional layers, the QRNN's encoder-decoder attention, a convolution over more than time.

Run `python qrnn.py` to see the backward pass of the recurrence beside autograd's.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------- the recurrence and its gradient
def pool_loop(f, z, c0):
    """The QRNN's only recurrence, which its paper calls pooling, step by step (QRNN, Eq. 3).

        c_t = f_t * c_{t-1} + (1 - f_t) * z_t

    f, z: (T, B, H). c0: (B, H). Returns c_1 .. c_T (T, B, H). `pool` below computes the same, faster.
    """
    c, states = c0, []
    for f_t, z_t in zip(f, z):
        c = f_t * c + (1 - f_t) * z_t  # (B, H)
        states.append(c)
    return torch.stack(states)  # (T, B, H)


class Pool(torch.autograd.Function):
    """`pool_loop` with its backward pass written out, so that neither direction builds a graph of T steps.

    L is the loss. G_t is the part of dL/dc_t that comes from the output of step t. G_next reaches c_T from
    the next chunk: 0 in truncated BPTT, a prediction where there is a DNI. c_t also feeds c_{t+1} = f_{t+1}
    c_t + (1 - f_{t+1}) z_{t+1}. So the whole gradient of c_t, r_t, follows a recurrence backwards in time:

        r_T = G_T + G_next,    r_t = G_t + f_{t+1} r_{t+1}

    and c_t = f_t c_{t-1} + (1 - f_t) z_t, differentiated in each of its three arguments, gives

        dL/df_t = r_t (c_{t-1} - z_t),    dL/dz_t = r_t (1 - f_t),    dL/dc_0 = f_1 r_1

    dL/dc_0, which leaves the chunk through its left border, is what truncated backpropagation throws away.
    The chunk before would need it, as its G_next. A decoupled neural interface (dni.py) learns to predict it.
    """

    @staticmethod
    def forward(ctx, f, z, c0):
        c = pool_states(f, z, c0)
        ctx.save_for_backward(f, z, c)
        return c[1:], c[-1].clone()  # c_T apart, to receive G_next

    @staticmethod
    def backward(ctx, G, G_next):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pool has no second derivative (create_graph=True): use pool_loop instead"
            )
        return pool_gradients(G, G_next, *ctx.saved_tensors)


def pool_states(f, z, c0):
    """c_0 .. c_T (T+1, B, H), into memory taken once."""
    c = z.new_empty(z.shape[0] + 1, *c0.shape)
    c[0] = c0
    c_t = c.unbind()
    for t, (f_t, z_t) in enumerate(zip(f.unbind(), z.unbind())):
        torch.lerp(z_t, c_t[t], f_t, out=c_t[t + 1])  # f c + (1 - f) z
    return c


def pool_gradients(G, G_next, f, z, c):
    """dL/df, dL/dz (T, B, H) and dL/dc_0 (B, H), from r_T down to r_1. c: from `pool_states`."""
    r = torch.empty_like(G, memory_format=torch.contiguous_format)
    torch.add(G[-1], G_next, out=r[-1])
    G_t, f_t, r_t = G.unbind(), f.unbind(), r.unbind()
    for t in range(r.shape[0] - 2, -1, -1):
        torch.addcmul(G_t[t], f_t[t + 1], r_t[t + 1], out=r_t[t])  # r_t = G_t + f_{t+1} r_{t+1}
    return r * (c[:-1] - z), r * (1 - f), r[0] * f[0]


def pool(f, z, c0):
    """`pool_loop`'s c_1 .. c_T and, apart, c_T (B, H). RuntimeError for second derivatives and torch.func."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("pool is not for torch.func (vmap, grad, ..): use pool_loop instead")
    if f.shape[0] == 1:  # no loop to save
        c = f * c0 + (1 - f) * z
        return c, c[0].clone()
    return Pool.apply(f, z, c0)


# ----------------------------------------------------------------------------------------------------- layers
class QRNNLayer(nn.Module):
    """One QRNN layer (QRNN, section 2).

        z_t = tanh(W_z x_{..t} + b_z),  f_t = sigmoid(W_f x_{..t} + b_f),  o_t = sigmoid(W_o x_{..t} + b_o)
        c_t = f_t c_{t-1} + (1 - f_t) z_t      pooling
        h_t = o_t c_t                          the output ("fo-pooling")

    z, f and o see a window of inputs, x_t its last, and no state. So for all t they are ONE matrix product.

    input_size, hidden_size, window: I, H, and how many inputs the gates see; at least 1 each.
    zoneout: in [0, 1), the probability that a neuron keeps its old value at a step, f_t = 1 (QRNN 2.1). When
        evaluating, the expected gate is used, f_t = zoneout + (1 - zoneout) f_t.
    weight_dropout: in [0, 1), dropout on the weights, one mask a call (AWD, section 2).
    """

    def __init__(self, input_size, hidden_size, window=1, zoneout=0.0, weight_dropout=0.0):
        super().__init__()
        if min(input_size, hidden_size, window) < 1:
            raise ValueError(f"not all at least 1: {input_size = }, {hidden_size = }, {window = }")
        check_probabilities(weight_dropout=weight_dropout, zoneout=zoneout)
        self.input_size, self.hidden_size, self.window = input_size, hidden_size, window
        self.zoneout, self.weight_dropout = zoneout, weight_dropout
        linear = nn.Linear(
            window * input_size, 3 * hidden_size
        )  # for PyTorch's own initial weights
        self.weight, self.bias = linear.weight, linear.bias  # (3H, window I), (3H,)

    def extra_repr(self):
        return f"{self.input_size}, {self.hidden_size}, window={self.window}"

    def forward(self, x, state=None):
        """x: (T, B, I), T >= 1.
        state: (c (B, H), x_prev (window - 1, B, I)), or None for zeros.
        Returns the output (T, B, H) and the state after step T. Raises ValueError for any other shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.input_size or x.shape[0] == 0:
            raise ValueError(f"x: expected (T >= 1, B, {self.input_size}), got {tuple(x.shape)}")
        T, B, _ = x.shape
        expected = (B, self.hidden_size), (self.window - 1, B, self.input_size)
        c0, x_prev = map(x.new_zeros, expected) if state is None else state
        if (c0.shape, x_prev.shape) != expected:
            raise ValueError(
                f"c, x_prev: expected {expected}, got {tuple(c0.shape)}, {tuple(x_prev.shape)}"
            )
        windows = x  # (T, B, window I)
        if self.window > 1:
            inputs = torch.cat([x_prev, x])  # (window - 1 + T, B, I)
            windows = torch.cat([inputs[i : i + T] for i in range(self.window)], -1)
            x_prev = inputs[T:]  # the last window - 1 of them
        weight = F.dropout(self.weight, self.weight_dropout, self.training)
        gates = F.linear(windows, weight, self.bias)  # (T, B, 3H)
        # Under autocast the product comes back in a 16-bit type; gates and state stay in the type of x.
        z, f, o = gates.to(x.dtype).chunk(3, -1)  # (T, B, H) each
        z, f, o = torch.tanh(z), torch.sigmoid(f), torch.sigmoid(o)
        if self.zoneout > 0:
            # Dropout makes some of 1 - f zero and divides the rest by 1 - zoneout. The factor undoes that.
            f = 1 - (1 - self.zoneout) * F.dropout(1 - f, self.zoneout, self.training)
        c, c_T = pool(f, z, c0)
        return o * c, (c_T, x_prev)


def check_probabilities(**named):
    if wrong := {name: p for name, p in named.items() if not 0 <= p < 1}:
        raise ValueError(f"must be in [0, 1): {wrong}")


def locked_dropout(x, p, training=True):
    """Locked dropout: one mask (1, B, H) for all steps of a chunk (AWD, 4.2). x, result: (T, B, H)."""
    return x * F.dropout(x.new_ones(1, *x.shape[1:]), p) if training and p > 0 else x


class QRNN(nn.Module):
    """A stack of QRNN layers, with the common arguments of torch.nn.LSTM. (Its state is another: see the
    glossary.) `module.compile(dynamic=True)` is torch.compile's form of the same code, usually faster.
    Between chunks, torch.utils._pytree.tree_map(torch.Tensor.detach, state) cuts the graph, as for nn.LSTM.

    input_size: I.
    hidden_size: H of each of num_layers layers; or a list with one size a layer, and num_layers is ignored.
    batch_first: input and output are (B, T, .), not (T, B, .). The state is not affected, as in nn.LSTM.
    dropout: between layers, not after the last. Unlike nn.LSTM's the mask is the same at all steps.
    window: that of every layer, or a list with one a layer.
    zoneout, weight_dropout: as in QRNNLayer.
    """

    def __init__(
        self,
        input_size,
        hidden_size,
        num_layers=1,
        *,
        batch_first=False,
        dropout=0.0,
        window=1,
        zoneout=0.0,
        weight_dropout=0.0,
    ):
        super().__init__()
        sizes, windows = torch.as_tensor(hidden_size), torch.as_tensor(window)
        sizes = (sizes if sizes.dim() else sizes.expand(num_layers)).tolist()
        windows = (windows if windows.dim() else windows.expand(len(sizes))).tolist()
        check_probabilities(dropout=dropout)
        if not sizes or len(windows) != len(sizes):
            raise ValueError(f"one size and one window a layer, please, not {sizes} and {windows}")
        self.batch_first, self.dropout = batch_first, dropout
        self.layers = nn.ModuleList(
            QRNNLayer(i, h, w, zoneout, weight_dropout)
            for i, h, w in zip([input_size] + sizes, sizes, windows)
        )

    def forward(self, x, state=None):
        """x: (T, B, I), or (B, T, I) with batch_first.
        state: [(c, x_prev)], one pair a layer, or None for zeros.
        Returns (output, state): the last layer's h for every step, and the state to hand to the next call.
        """
        if not torch.is_tensor(x):
            raise TypeError(
                f"x is a {type(x).__name__}: pad it on the right, which changes no real output"
            )
        if self.batch_first and (
            x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.layers[0].input_size
        ):
            raise ValueError(
                f"x: expected (B, T >= 1, {self.layers[0].input_size}), got {tuple(x.shape)}"
            )
        h = x.transpose(0, 1) if self.batch_first else x
        old_state = [None] * len(self.layers) if state is None else state
        if len(old_state) != len(self.layers):
            raise ValueError(
                f"state: expected {len(self.layers)} pairs, one a layer, got {len(old_state)}"
            )
        new_state = []
        for i, (layer, pair) in enumerate(zip(self.layers, old_state)):
            if i > 0:
                h = locked_dropout(h, self.dropout, self.training)
            h, pair = layer(h, pair)
            new_state.append(pair)
        return h.transpose(0, 1) if self.batch_first else h, new_state


# --------------------------------------------------------------------------------------------- language model
class LanguageModel(nn.Module):
    """Embedding -> QRNN stack -> decoder tied to the embedding, regularised as in AWD.

    vocabulary_size, embedding_size: V, how many words, and E.
    hidden_size: H of all layers but the last, whose size is E, for decoder and embedding are one matrix.
    num_layers: at least 1.
    window: of the first layer; that of the others is 1, as in AWD's QRNN.
    dropout_input, dropout_hidden, dropout_output: in [0, 1), before, within and after the stack; locked.
    dropout_embedding, dropout_weight: in [0, 1), of whole words and of the gates' weights.
    activation, temporal: weights of the two penalties in `forward`; AWD's.
    """

    def __init__(
        self,
        vocabulary_size,
        embedding_size=400,
        hidden_size=1550,
        num_layers=4,
        *,
        window=2,
        dropout_embedding=0.0,
        dropout_input=0.0,
        dropout_hidden=0.0,
        dropout_output=0.0,
        dropout_weight=0.0,
        activation=2.0,
        temporal=1.0,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        check_probabilities(
            dropout_embedding=dropout_embedding,
            dropout_input=dropout_input,
            dropout_output=dropout_output,
        )
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)  # AWD, section 5
        self.decoder_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.rnn = QRNN(
            embedding_size,
            [hidden_size] * (num_layers - 1) + [embedding_size],
            window=[window] + [1] * (num_layers - 1),
            dropout=dropout_hidden,
            weight_dropout=dropout_weight,
        )
        self.dropout_embedding, self.dropout_input = dropout_embedding, dropout_input
        self.dropout_output, self.activation, self.temporal = dropout_output, activation, temporal

    def logits(self, tokens, state=None):
        """tokens: (T, B) of int64. Returns the logits of each next token (T, B, V), and the state."""
        logits, _, _, state = self.read(tokens, state)
        return logits, state

    def forward(self, tokens, targets, state=None):
        """The loss of one chunk: training minimises nll + penalty.
        tokens: (T, B) of int64.
        targets: (T, B), the token after each; -100 where it is not counted.
        state: as in QRNN.
        Returns (nll, penalty, state). nll is the cross-entropy in nats, a mean over the tokens counted.
        penalty is activation * mean(h'^2) + temporal * mean((h_{t+1} - h_t)^2), of the stack's output h and
        of the same after dropout, h' (AWD, 4.6).
        """
        if tokens.shape != targets.shape:
            raise ValueError(f"targets: expected {tuple(tokens.shape)}, got {tuple(targets.shape)}")
        logits, dropped, h, state = self.read(tokens, state)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        penalty = self.activation * dropped.square().mean()
        if h.shape[0] > 1:
            penalty = penalty + self.temporal * (h[1:] - h[:-1]).square().mean()
        return nll, penalty, state

    def read(self, tokens, state):
        """Returns the logits, the stack's output (T, B, E) after and before dropout, and the state."""
        x = self.embedding(tokens)  # (T, B, E)
        if self.training and self.dropout_embedding > 0:  # a word is dropped wherever it occurs
            word_mask = F.dropout(
                x.new_ones(self.embedding.num_embeddings, 1), self.dropout_embedding
            )
            x = x * word_mask[tokens]
        h, state = self.rnn(locked_dropout(x, self.dropout_input, self.training), state)
        dropped = locked_dropout(h, self.dropout_output, self.training)
        logits = F.linear(dropped, self.embedding.weight, self.decoder_bias).to(h.dtype)
        return logits, dropped, h, state


# ------------------------------------------------------------------------ the pooling compiled, and on a GPU
#
# torch.compile would unroll the two loops of the pooling, for every T anew. As operations they are left
# whole. Names of operations are global, so a copy of this file takes a free one.
NAME = next(
    n for n in map("qrnn{}".format, itertools.count()) if not hasattr(getattr(torch.ops, n), "pool")
)
pool_states = torch.library.custom_op(
    f"{NAME}::pool",
    pool_states,
    mutates_args=(),
    schema="(Tensor f, Tensor z, Tensor c0) -> Tensor",
)
pool_states.register_fake(lambda f, z, c0: z.new_empty(z.shape[0] + 1, *c0.shape))
pool_gradients = torch.library.custom_op(
    f"{NAME}::pool_backward",
    pool_gradients,
    mutates_args=(),
    schema=("(Tensor G, Tensor G_next, Tensor f, Tensor z, Tensor c) -> (Tensor, Tensor, Tensor)"),
)
pool_gradients.register_fake(
    lambda G, G_next, f, z, c: (
        f.new_empty(f.shape),
        z.new_empty(z.shape),
        G_next.new_empty(G_next.shape),
    )
)

# On a GPU each step of the loops would be a launch. This program takes BLOCK columns (stream, neuron) through
# all T steps, and reads every number once. num_stages: how far loads go ahead.
try:
    import triton  # comes with torch for GPUs
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    BLOCK, STAGES = tl.constexpr(64), tl.constexpr(8)

    @triton.jit
    def pool_forward_kernel(f, z, c0, c, T, N):
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
    def pool_backward_kernel(G, G_next, f, z, c, df, dz, dc0, T, N):
        # G, f, z, df and dz point to step T, c to c_{T-1}; all move down.
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        from_later = tl.load(G_next + column, inside)  # f_{t+1} r_{t+1}; at T, G_next
        for _ in tl.range(T, num_stages=STAGES):
            f_t, z_t = tl.load(f + column, inside), tl.load(z + column, inside)
            c_before, G_t = tl.load(c + column, inside), tl.load(G + column, inside)
            r_t = G_t + from_later
            tl.store(df + column, r_t * (c_before - z_t), inside)
            tl.store(dz + column, r_t * (1 - f_t), inside)
            from_later = f_t * r_t
            G, f, z, c, df, dz = G - N, f - N, z - N, c - N, df - N, dz - N
        tl.store(dc0 + column, from_later, inside)  # f_1 r_1

    @pool_states.register_kernel("cuda")
    def states_on_gpu(f, z, c0):
        f, z, c0 = f.contiguous(), z.contiguous(), c0.contiguous()
        T, N, c = f.shape[0], c0.numel(), z.new_empty(z.shape[0] + 1, *c0.shape)
        with torch.cuda.device_of(z):  # not always the current one
            pool_forward_kernel[triton.cdiv(N, BLOCK.value),](f, z, c0, c, T, N, num_warps=2)
        return c

    @pool_gradients.register_kernel("cuda")
    def gradients_on_gpu(G, G_next, f, z, c):
        G, G_next, f, z = G.contiguous(), G_next.contiguous(), f.contiguous(), z.contiguous()
        T, N = f.shape[0], G_next.numel()
        df, dz, dc0 = torch.empty_like(f), torch.empty_like(z), torch.empty_like(G_next)
        last = G[-1], G_next, f[-1], z[-1], c[-2], df[-1], dz[-1], dc0
        with torch.cuda.device_of(z):
            pool_backward_kernel[triton.cdiv(N, BLOCK.value),](*last, T, N, num_warps=2)
        return df, dz, dc0


if __name__ == "__main__":
    torch.manual_seed(0)
    leaves = [
        x.requires_grad_() for x in (torch.rand(6, 2, 3), torch.randn(6, 2, 3), torch.randn(2, 3))
    ]
    by_autograd = torch.autograd.grad(pool_loop(*leaves).square().sum(), leaves)
    by_hand = torch.autograd.grad(pool(*leaves)[0].square().sum(), leaves)
    for name, a, b in zip(("f", "z", "c_0"), by_autograd, by_hand):
        print(
            f"dL/d{name:<4} autograd {a.flatten()[0]:+.6f}   by hand {b.flatten()[0]:+.6f}   "
            f"largest difference {(a - b).abs().max():.1e}"
        )
