"""A quasi-recurrent neural network (QRNN) and the language model built on it, in one file.

An LSTM multiplies its previous output by a matrix at every step, so no step can begin before the
previous one has ended. In a QRNN no matrix acts on the previous output or state. Its gates are
computed from the inputs alone, so one matrix product serves all steps at once. What is left of the
recurrence multiplies each neuron's last value c_{t-1} by the neuron's own gate f_t, a number. That
is why the network is called quasi-recurrent.

Papers
    QRNN     Bradbury, Merity, Xiong, Socher 2016, "Quasi-Recurrent Neural Networks",
             arXiv 1611.01576
    AWD      Merity, Keskar, Socher 2017, "Regularizing and Optimizing LSTM Language Models",
             arXiv 1708.02182; "AWD's code" is what its authors published with it

Glossary
    name       symbol   shape          meaning
    x          x_t      (T, B, I)      input: T time steps of B independent streams
    z          z_t      (T, B, H)      candidate: the new value offered to a neuron
    f          f_t      (T, B, H)      forget gate: the share of the OLD value that is kept
    o          o_t      (T, B, H)      output gate
    c          c_t      (T, B, H)      recurrent state: the values of a layer's H neurons
    h          h_t      (T, B, H)      output of a layer
    window     -        -              how many inputs each gate sees, x_t and those just before it.
                                       The QRNN paper: the width k of a masked convolution in time
    state      -        [(c, x_prev)]  what crosses from one chunk of text to the next, one pair a
                                       layer: c (B, H), and x_prev (window - 1, B, I), the last
                                       window - 1 inputs of the layer

Not here: bidirectional layers, the QRNN's encoder-decoder attention, convolutions over images or
other inputs that are no sequences.

Run `python qrnn.py` to see the backward pass of the recurrence beside autograd's.
"""

import operator
import signal

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- the recurrence and its gradient


def pool_loop(f, z, c0):
    """The QRNN's only recurrence, which its paper calls pooling, step by step (QRNN, Eq. 4).

        c_t = f_t * c_{t-1} + (1 - f_t) * z_t

    f, z: (T, B, H).
    c0: (B, H), the state before the first step.
    Returns c_1 .. c_T (T, B, H). `pool` below computes the same, faster.
    """
    c = c0
    states = []
    for f_t, z_t in zip(f, z):
        c = f_t * c + (1 - f_t) * z_t  # (B, H)
        states.append(c)
    return torch.stack(states)  # (T, B, H)


class Pool(torch.autograd.Function):
    """`pool_loop` with its backward pass written out: neither direction builds a graph of T steps.

    L is the loss. G_t is the part of dL/dc_t that comes from the output of step t. The last state,
    c_T, also leaves the chunk. G_next is the gradient that comes back to it from the next chunk: 0
    in truncated BPTT, and a prediction by a second network where one is used (dni.py). Inside the
    chunk c_t also feeds the next step, c_{t+1} = f_{t+1} c_t + (1 - f_{t+1}) z_{t+1}. So the whole
    gradient of c_t, called r_t, follows a recurrence backwards in time:

        r_T = G_T + G_next
        r_t = G_t + f_{t+1} r_{t+1}

    The step c_t = f_t c_{t-1} + (1 - f_t) z_t, differentiated in each of its three arguments, gives

        dL/df_t = r_t (c_{t-1} - z_t)
        dL/dz_t = r_t (1 - f_t)
        dL/dc_0 = f_1 r_1

    dL/dc_0 leaves the chunk through its left border, and truncated backpropagation throws it away.
    The chunk before would need it as its G_next. A decoupled neural interface (dni.py) learns to
    predict it.
    """

    @staticmethod
    def forward(ctx, f, z, c0):
        c = pool_states(f, z, c0)
        ctx.save_for_backward(f, z, c)
        # c_T is in both outputs: as the last step of the first, and as the second. So autograd
        # gives backward() two gradients of c_T: G_T from later layers, G_next from the next chunk.
        # (If nobody used an output, its gradient arrives as zeros.)
        return c[1:], c[-1].clone()

    @staticmethod
    def backward(ctx, G, G_next):
        # During a backward pass this is true only if create_graph=True was asked for.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pool has no second derivative (create_graph=True): use pool_loop instead"
            )
        f, z, c = ctx.saved_tensors
        return pool_gradients(G, G_next, f, z, c)


# Read the next two as plain functions, which Pool calls. (The last section of this file registers
# them with torch under the same names, so that torch.compile leaves their loops whole, and a GPU
# can run one kernel in the place of each loop.)


def pool_states(f, z, c0):
    """c_0 .. c_T (T + 1, B, H), written into memory that is allocated once."""
    c = z.new_empty(z.shape[0] + 1, *c0.shape)
    c[0] = c0
    cs = c.unbind()  # cs[0] is c_0, and fs[0], zs[0] are f_1, z_1
    fs = f.unbind()
    zs = z.unbind()
    for t in range(len(fs)):
        torch.lerp(zs[t], cs[t], fs[t], out=cs[t + 1])  # f c + (1 - f) z
    return c


def pool_gradients(G, G_next, f, z, c):
    """dL/df, dL/dz (T, B, H) and dL/dc_0 (B, H), from r_T down to r_1. c: from `pool_states`."""
    r = torch.empty_like(G, memory_format=torch.contiguous_format)
    torch.add(G[-1], G_next, out=r[-1])  # r_T = G_T + G_next
    Gs = G.unbind()
    fs = f.unbind()
    rs = r.unbind()
    for t in range(len(rs) - 2, -1, -1):
        torch.addcmul(Gs[t], fs[t + 1], rs[t + 1], out=rs[t])  # r_t = G_t + f_{t+1} r_{t+1}
    df = r * (c[:-1] - z)
    dz = r * (1 - f)
    dc0 = r[0] * f[0]
    return df, dz, dc0


def pool(f, z, c0):
    """c_1 .. c_T (T, B, H) as `pool_loop` computes them, and as a second output c_T (B, H).

    If T is 1, autograd does all: there is no loop. If T is larger there is no second derivative,
    and torch.func (vmap, grad, ..) refuses the function. Use `pool_loop` for those.
    Raises ValueError for other shapes, for complex numbers, and if types or devices differ.
    Raises RuntimeError in the backward pass if T > 1 and a second derivative is asked for.
    """
    one_device = f.device == z.device == c0.device
    one_type = f.dtype == z.dtype == c0.dtype and not f.is_complex()
    right_shapes = f.shape == z.shape and f.shape[1:] == c0.shape and f.shape[0] > 0
    if not (one_device and one_type and right_shapes):
        found = [(tuple(x.shape), x.dtype, str(x.device)) for x in (f, z, c0)]
        raise ValueError(
            "expected f and z (T >= 1, B, H), c0 (B, H) of one real type on one device, "
            f"got {found}"
        )
    if f.shape[0] == 1:
        c = f * c0 + (1 - f) * z
        return c, c[0].clone()
    return Pool.apply(f, z, c0)


# ---------------------------------------------------------------------------------------- layers


class QRNNLayer(nn.Module):
    """One QRNN layer (QRNN, section 2).

        z_t = tanh(W_z x_{..t} + b_z)
        f_t = sigmoid(W_f x_{..t} + b_f)
        o_t = sigmoid(W_o x_{..t} + b_o)
        c_t = f_t c_{t-1} + (1 - f_t) z_t      pooling
        h_t = o_t c_t                          the output ("fo-pooling")

    x_{..t} is a window of inputs of which x_t is the last. z, f and o are computed from such
    windows and not from any state. So for all t they are ONE matrix product.

    input_size: I, at least 1.
    hidden_size: H, at least 1.
    window: how many inputs the gates see, at least 1.
    zoneout: in [0, 1), the probability that a neuron keeps its old value at a step, f_t = 1
        (QRNN, 2.1). When evaluating, the expected gate is used, zoneout + (1 - zoneout) f_t.
    weight_dropout: in [0, 1), dropout on the weights, one mask a call (AWD, section 2).
    Raises ValueError for a size or a probability out of its range.
    """

    def __init__(self, input_size, hidden_size, window=1, zoneout=0.0, weight_dropout=0.0):
        super().__init__()
        if min(input_size, hidden_size, window) < 1:
            raise ValueError(f"not all at least 1: {input_size = }, {hidden_size = }, {window = }")
        check_probabilities(weight_dropout=weight_dropout, zoneout=zoneout)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.window = window
        self.zoneout = zoneout
        self.weight_dropout = weight_dropout
        linear = nn.Linear(window * input_size, 3 * hidden_size)  # for its initial weights
        self.weight = linear.weight  # (3H, window I)
        self.bias = linear.bias  # (3H,)

    def extra_repr(self):
        return f"{self.input_size}, {self.hidden_size}, window={self.window}"

    def forward(self, x, state=None):
        """x: (T, B, I), T >= 1.
        state: (c (B, H), x_prev (window - 1, B, I)) on the device of x, or None for zeros. It is
            converted to the type of x.
        Returns the output (T, B, H) and the state after step T.
        Raises ValueError for another shape or device.
        """
        if x.dim() != 3 or x.shape[-1] != self.input_size or x.shape[0] == 0:
            raise ValueError(f"x: expected (T >= 1, B, {self.input_size}), got {tuple(x.shape)}")
        T, B, _ = x.shape
        c_shape = (B, self.hidden_size)
        x_prev_shape = (self.window - 1, B, self.input_size)
        if state is None:
            state = x.new_zeros(c_shape), x.new_zeros(x_prev_shape)
        if torch.is_tensor(state) or len(state) != 2 or not all(map(torch.is_tensor, state)):
            raise ValueError(
                "state: expected a pair of tensors (c, x_prev) for each layer, as the call before "
                "returned it (the state of an nn.GRU or an nn.LSTM does not fit)"
            )
        c0, x_prev = state
        if c0.shape != c_shape or x_prev.shape != x_prev_shape:
            raise ValueError(
                f"state: expected c {c_shape} and x_prev {x_prev_shape}, "
                f"got {tuple(c0.shape)} and {tuple(x_prev.shape)}"
            )
        if c0.device != x.device or x_prev.device != x.device:
            raise ValueError(
                f"c is on {c0.device}, x_prev on {x_prev.device}, x on {x.device}: move the state "
                "with .to(x.device)"
            )
        c0 = c0.to(x.dtype)
        x_prev = x_prev.to(x.dtype)

        windows = x  # (T, B, window I)
        if self.window > 1:
            inputs = torch.cat([x_prev, x])  # (window - 1 + T, B, I)
            windows = torch.cat([inputs[i : i + T] for i in range(self.window)], -1)
            x_prev = inputs[T:].clone()  # the last window - 1; the rest of `inputs` can be freed

        weight = F.dropout(self.weight, self.weight_dropout, self.training)
        gates = F.linear(windows, weight, self.bias)  # (T, B, 3H)
        # Under autocast the product has a 16-bit type. Gates and state keep the type of x.
        z, f, o = gates.to(x.dtype).chunk(3, -1)  # (T, B, H) each
        z = torch.tanh(z)
        f = torch.sigmoid(f)
        o = torch.sigmoid(o)
        if self.zoneout > 0:
            # Dropout makes some of 1 - f zero and the others (1 - f) / (1 - zoneout). The factor
            # 1 - zoneout brings them back to 1 - f.
            f = 1 - (1 - self.zoneout) * F.dropout(1 - f, self.zoneout, self.training)
        c, c_T = pool(f, z, c0)
        return o * c, (c_T, x_prev)


def check_probabilities(**named):
    """Raise ValueError where one of these, given by name, is not in [0, 1)."""
    wrong = {name: p for name, p in named.items() if not 0 <= p < 1}
    if wrong:
        raise ValueError(f"must be in [0, 1): {wrong}")


def locked_dropout(x, p, training=True):
    """Dropout with one mask (1, B, H) for all steps of a chunk (AWD, 4.2). x, result: (T, B, H)."""
    if not training or p == 0:
        return x
    mask = F.dropout(x.new_ones(1, *x.shape[1:]), p)
    return x * mask


class QRNN(nn.Module):
    """A stack of QRNN layers, with the common arguments of torch.nn.LSTM.

    Its state is not that of an LSTM: it is a list with a pair (c, x_prev) for each layer (see the
    glossary). Between two chunks the graph is cut by

        state = [(c.detach(), x_prev.detach()) for c, x_prev in state]

    `module.compile(dynamic=True)` runs the same code in torch.compile's form. How fast that is,
    experiments/speed.py measures.
    The recurrence has the type of x. Under autocast give x in float32: in bfloat16 a state that is
    kept for many steps loses digits.

    input_size: I.
    hidden_size: H of each of num_layers layers. Or a list with one size a layer, and then
        num_layers is ignored.
    batch_first: input and output are (B, T, .), not (T, B, .). The state is not affected, as in
        nn.LSTM.
    dropout: between layers, not after the last. Unlike nn.LSTM's, its mask is the same at all
        steps.
    window: of all layers, or a list with one for each layer.
    zoneout, weight_dropout: as in QRNNLayer.
    Raises ValueError for sizes that do not fit together, TypeError for a size that is no integer.
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
        check_probabilities(dropout=dropout)
        sizes = one_a_layer(hidden_size, num_layers)
        windows = one_a_layer(window, len(sizes))
        if not sizes or len(windows) != len(sizes):
            raise ValueError(f"one size and one window a layer, please, not {sizes} and {windows}")
        self.batch_first = batch_first
        self.dropout = dropout
        self.layers = nn.ModuleList()
        for layer_input, size, layer_window in zip([input_size] + sizes, sizes, windows):
            layer = QRNNLayer(layer_input, size, layer_window, zoneout, weight_dropout)
            self.layers.append(layer)

    def forward(self, x, state=None):
        """x: (T, B, I), or (B, T, I) with batch_first.
        state: [(c, x_prev)], one pair a layer, or None for zeros.
        Returns (output, state): the last layer's h for every step, and the state for the next call.
        Raises ValueError for another shape or device, TypeError where x is no tensor.
        """
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise TypeError(
                "x is a PackedSequence: pad it on the right (nn.utils.rnn.pad_sequence). This "
                "changes no output before the padding, but the state returned is that after it"
            )
        if not torch.is_tensor(x):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if self.batch_first:
            expected = self.layers[0].input_size
            if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != expected:
                raise ValueError(f"x: expected (B, T >= 1, {expected}), got {tuple(x.shape)}")
            x = x.transpose(0, 1)  # (T, B, I)
        if state is None:
            state = [None] * len(self.layers)
        if torch.is_tensor(state) or len(state) != len(self.layers):
            got = (
                f"a tensor of shape {tuple(state.shape)}" if torch.is_tensor(state) else len(state)
            )
            raise ValueError(
                f"state: expected {len(self.layers)} pairs, one a layer, got {got}: "
                "hand on what the call before returned, or None"
            )
        h = x
        new_state = []
        for i, (layer, pair) in enumerate(zip(self.layers, state)):
            if i > 0:
                h = locked_dropout(h, self.dropout, self.training)
            h, pair = layer(h, pair)
            new_state.append(pair)
        if self.batch_first:
            h = h.transpose(0, 1)  # (B, T, H)
        return h, new_state


def one_a_layer(value, num_layers):
    """An integer as a list of num_layers equal ones; a list or a tuple of integers as it is."""
    values = value if isinstance(value, list | tuple) else [value] * num_layers
    return [operator.index(v) for v in values]


# -------------------------------------------------------------------------------- language model


class LanguageModel(nn.Module):
    """Embedding -> QRNN stack -> decoder tied to the embedding, regularised as in AWD.

    vocabulary_size: V, how many words.
    embedding_size: E.
    hidden_size: H of all layers but the last. The last has E, because decoder and embedding
        are one matrix.
    num_layers: at least 1.
    window: of the first layer. That of the others is 1, as in AWD's code.
    dropout_input, dropout_hidden, dropout_output: in [0, 1), before, between and after the layers;
        locked.
    dropout_embedding, dropout_weight: in [0, 1), of whole words and of the gates' weights.
    activation, temporal: weights of the two penalties in `forward`, which AWD calls activation
        regularisation (AR) and temporal activation regularisation (TAR). The defaults are AWD's.
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
        self.dropout_embedding = dropout_embedding
        self.dropout_input = dropout_input
        self.dropout_output = dropout_output
        self.activation = activation
        self.temporal = temporal

    def logits(self, tokens, state=None):
        """tokens: (T, B) of int64.
        Returns the logits of each next token (T, B, V), and the state.
        """
        logits, _, _, state = self.read(tokens, state)
        return logits, state

    def forward(self, tokens, targets, state=None):
        """The loss of one chunk: training minimises nll + penalty.

        tokens: (T, B) of int64.
        targets: (T, B), the token after each; -100 where it is not counted.
        state: as in QRNN.
        Returns (nll, penalty, state). nll is the cross-entropy in nats, a mean over the tokens
        counted. With h the stack's output and h' the same after dropout (AWD, 4.6),

            penalty = activation * mean(h'_t^2) + temporal * mean((h_{t+1} - h_t)^2)
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
        """Returns the logits, the stack's output (T, B, E) after and before dropout, the state."""
        x = self.embedding(tokens)  # (T, B, E)
        if self.training and self.dropout_embedding > 0:
            # A word is dropped wherever it occurs.
            every_word = x.new_ones(self.embedding.num_embeddings, 1)
            word_mask = F.dropout(every_word, self.dropout_embedding)
            x = x * word_mask[tokens]
        x = locked_dropout(x, self.dropout_input, self.training)
        h, state = self.rnn(x, state)
        dropped = locked_dropout(h, self.dropout_output, self.training)
        logits = F.linear(dropped, self.embedding.weight, self.decoder_bias).to(h.dtype)
        return logits, dropped, h, state


# ------------------------------------------------------------ the pooling compiled, and on a GPU
#
# torch.compile would unroll the two loops of the pooling, anew for every T. As operations of torch
# they are left whole. Names of operations are global, so a copy of this file takes a free name.

namespace = "qrnn"
while hasattr(getattr(torch.ops, namespace), "pool"):
    namespace += "_copy"

pool_states = torch.library.custom_op(
    f"{namespace}::pool",
    pool_states,
    mutates_args=(),
    schema="(Tensor f, Tensor z, Tensor c0) -> Tensor",
)
pool_gradients = torch.library.custom_op(
    f"{namespace}::pool_backward",
    pool_gradients,
    mutates_args=(),
    schema="(Tensor G, Tensor G_next, Tensor f, Tensor z, Tensor c) -> (Tensor, Tensor, Tensor)",
)


# torch.compile asks these two for the shapes of the results, and calls no loop.
@pool_states.register_fake
def states_shape(f, z, c0):
    return z.new_empty(z.shape[0] + 1, *c0.shape)


@pool_gradients.register_fake
def gradients_shapes(G, G_next, f, z, c):
    return f.new_empty(f.shape), z.new_empty(z.shape), G_next.new_empty(G_next.shape)


# On a GPU each step of the loops would be a launch. A program of these kernels takes BLOCK columns
# (a column is one neuron of one stream) through all T steps, and reads every number once.

try:
    import triton  # comes with torch for GPUs
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    BLOCK = tl.constexpr(64)
    STAGES = tl.constexpr(8)  # how many steps ahead numbers are loaded

    @triton.jit
    def pool_forward_kernel(f, z, c0, c, T, N):
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        c_t = tl.load(c0 + column, inside)
        tl.store(c + column, c_t, inside)
        for _ in tl.range(T, num_stages=STAGES):
            f_t = tl.load(f + column, inside)
            z_t = tl.load(z + column, inside)
            c_t = f_t * c_t + (1 - f_t) * z_t
            f += N
            z += N
            c += N
            tl.store(c + column, c_t, inside)

    @triton.jit
    def pool_backward_kernel(G, G_next, f, z, c, df, dz, dc0, T, N):
        # G, f, z, df and dz point to step T, and c to c_{T-1}. All move down.
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        from_later = tl.load(G_next + column, inside)  # f_{t+1} r_{t+1}; at T, G_next
        for _ in tl.range(T, num_stages=STAGES):
            f_t = tl.load(f + column, inside)
            z_t = tl.load(z + column, inside)
            c_before = tl.load(c + column, inside)
            r_t = tl.load(G + column, inside) + from_later
            tl.store(df + column, r_t * (c_before - z_t), inside)
            tl.store(dz + column, r_t * (1 - f_t), inside)
            from_later = f_t * r_t
            G -= N
            f -= N
            z -= N
            c -= N
            df -= N
            dz -= N
        tl.store(dc0 + column, from_later, inside)  # f_1 r_1

    @pool_states.register_kernel("cuda")
    def states_on_gpu(f, z, c0):
        f = f.contiguous()
        z = z.contiguous()
        c0 = c0.contiguous()
        T = f.shape[0]
        N = c0.numel()
        c = z.new_empty(T + 1, *c0.shape)
        programs = (triton.cdiv(N, BLOCK.value),)
        with torch.cuda.device_of(z):  # not always the current one
            pool_forward_kernel[programs](f, z, c0, c, T, N, num_warps=2)
        return c

    @pool_gradients.register_kernel("cuda")
    def gradients_on_gpu(G, G_next, f, z, c):
        G = G.contiguous()
        G_next = G_next.contiguous()
        f = f.contiguous()
        z = z.contiguous()
        T = f.shape[0]
        N = G_next.numel()
        df = torch.empty_like(f)
        dz = torch.empty_like(z)
        dc0 = torch.empty_like(G_next)
        programs = (triton.cdiv(N, BLOCK.value),)
        with torch.cuda.device_of(z):
            pool_backward_kernel[programs](
                G[-1], G_next, f[-1], z[-1], c[-2], df[-1], dz[-1], dc0, T, N, num_warps=2
            )
        return df, dz, dc0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end quietly where nobody reads on: python qrnn.py | head -1
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    torch.manual_seed(0)
    f = torch.rand(6, 2, 3)
    z = torch.randn(6, 2, 3)
    c0 = torch.randn(2, 3)
    leaves = [x.requires_grad_() for x in (f, z, c0)]
    by_autograd = torch.autograd.grad(pool_loop(*leaves).square().sum(), leaves)
    by_hand = torch.autograd.grad(pool(*leaves)[0].square().sum(), leaves)
    for name, a, b in zip(("f", "z", "c_0"), by_autograd, by_hand):
        difference = (a - b).abs().max()
        print(
            f"dL/d{name:<4} autograd {a.flatten()[0]:+.6f}   by hand {b.flatten()[0]:+.6f}   "
            f"largest difference {difference:.1e}"
        )
