"""A quasi-recurrent neural network (QRNN) and the language model built on it, in one file.

Papers
    QRNN     Bradbury, Merity, Xiong, Socher 2016, "Quasi-Recurrent Neural Networks", arXiv 1611.01576, section 2
    AWD      Merity, Keskar, Socher 2017, "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182
    Zoneout  as in QRNN section 2.1
    Sizes    Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling"

Glossary
    name       symbol   shape          meaning
    x          x_t      (T, B, I)      input: T time steps of B independent streams
    z          z_t      (T, B, H)      candidate, the new value offered to the memory
    f          f_t      (T, B, H)      forget gate: the share of the OLD value that is kept
    o          o_t      (T, B, H)      output gate
    c          c_t      (T, B, H)      recurrent state, the memory
    h          h_t      (T, B, H)      output of a layer
    window     k                       time steps each gate sees: x_{t-k+1} .. x_t
    state      s        [(c, x_prev)]  what crosses from one chunk of text to the next, one pair a layer:
                                       c (B, H) and the last k-1 inputs x_prev (k-1, B, I)
    r          r_t      (T, B, H)      dL/dc_t, everything that flows into c_t from above and from the future

Not here: bidirectional layers, the QRNN's encoder-decoder attention, a convolution over more than time.

Run `python qrnn.py` for a proof of the backward pass in a second.
"""

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------------------ pooling

def pool_loop(f, z, c0):
    """The QRNN's only recurrence, as one would write it on a blackboard (QRNN, Eq. 3).

        c_t = f_t * c_{t-1} + (1 - f_t) * z_t

    f, z: (T, B, H); c0: (B, H). Returns c_1 .. c_T as (T, B, H). Autograd does the backward pass, one step at a time;
    `pool` below is the same function, faster.
    """
    c, states = c0, []
    for f_t, z_t in zip(f, z):
        c = f_t * c + (1 - f_t) * z_t                                                              # (B, H)
        states.append(c)
    return torch.stack(states)                                                                     # (T, B, H)


class Pool(torch.autograd.Function):
    """`pool_loop` with its backward pass written out, so that neither direction builds a graph of T steps.

    Let G_t = dL/dc_t arrive from the layers above. c_t also feeds c_{t+1} = f_{t+1} c_t + (1 - f_{t+1}) z_{t+1}, so
    the whole gradient r_t of c_t follows a recurrence that runs backwards in time:

        r_T = G_T,    r_t = G_t + f_{t+1} r_{t+1}

    and from c_t = f_t c_{t-1} + (1 - f_t) z_t, differentiated in each of its three arguments,

        df_t = r_t (c_{t-1} - z_t),    dz_t = r_t (1 - f_t),    dc_0 = f_1 r_1

    dc_0, the gradient that leaves the chunk through its left border, is what truncated backpropagation throws away
    and what a decoupled neural interface (dni.py) learns to predict.
    """

    @staticmethod
    def forward(ctx, f, z, c0):
        c = z.new_empty(len(z) + 1, *c0.shape)                                                     # c_0 .. c_T
        c[0] = c0
        c_t = c.unbind()
        for t, (f_t, z_t) in enumerate(zip(f.unbind(), z.unbind())):
            torch.lerp(z_t, c_t[t], f_t, out=c_t[t + 1])                                           # f c + (1 - f) z
        ctx.save_for_backward(f, z, c)
        return c[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        f, z, c = ctx.saved_tensors
        r = torch.empty_like(G, memory_format=torch.contiguous_format)
        r[-1] = G[-1]
        G_t, f_t, r_t = G.unbind(), f.unbind(), r.unbind()
        for t in range(len(r) - 2, -1, -1):
            torch.addcmul(G_t[t], f_t[t + 1], r_t[t + 1], out=r_t[t])
        return r * (c[:-1] - z), r * (1 - f), f[0] * r[0]


def pool(f, z, c0):
    """c_t = f_t c_{t-1} + (1 - f_t) z_t; shapes as in `pool_loop`, same values and gradients. First derivatives only."""
    return Pool.apply(f, z, c0)


# -------------------------------------------------------------------------------------------------------------- layers

class QRNNLayer(nn.Module):
    """One QRNN layer (QRNN, section 2).

        z_t = tanh(W_z x_{t-k+1..t} + b_z)          the three gates see a window of k inputs and no state,
        f_t = sigmoid(W_f x_{t-k+1..t} + b_f)       so all of them, for all t, are ONE matrix product
        o_t = sigmoid(W_o x_{t-k+1..t} + b_o)
        c_t = f_t c_{t-1} + (1 - f_t) z_t           pooling
        h_t = o_t c_t                               "fo-pooling"; without output_gate h_t = c_t, "f-pooling"

    input_size I, hidden_size H >= 1; window k >= 1.
    zoneout in [0, 1]: the probability that a neuron keeps its old value at a step, f_t = 1 (QRNN, section 2.1). When
        evaluating, the expected gate is used, f_t = zoneout + (1 - zoneout) f_t.
    weight_dropout in [0, 1]: dropout on the weights, one mask a call (AWD, section 2, applied to the QRNN's product).
    """

    def __init__(self, input_size, hidden_size, window=1, output_gate=True, zoneout=0.0, weight_dropout=0.0):
        super().__init__()
        if min(input_size, hidden_size, window) < 1:
            raise ValueError(f"input_size, hidden_size and window must be at least 1, "
                             f"got {input_size}, {hidden_size}, {window}")
        self.input_size, self.hidden_size, self.window = input_size, hidden_size, window
        self.output_gate, self.zoneout, self.weight_dropout = output_gate, zoneout, weight_dropout
        linear = nn.Linear(window * input_size, (3 if output_gate else 2) * hidden_size)           # PyTorch's own init
        self.weight, self.bias = linear.weight, linear.bias                                        # (3H, kI), (3H,)

    def forward(self, x, state=None):
        """x: (T, B, I), T >= 1; state: (c (B, H), x_prev (k-1, B, I)), or None for zeros.

        Returns the output (T, B, H) and the state after step T. Raises ValueError where x or state has another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.input_size or len(x) == 0:
            raise ValueError(f"expected an input of shape (T >= 1, B, {self.input_size}), got {tuple(x.shape)}")
        if state is None:
            state = x.new_zeros(x.shape[1], self.hidden_size), x.new_zeros(self.window - 1, x.shape[1], x.shape[2])
        c0, x_prev = state
        expected = (x.shape[1], self.hidden_size), (self.window - 1, x.shape[1], self.input_size)
        if (tuple(c0.shape), tuple(x_prev.shape)) != expected:
            raise ValueError(f"expected a state (c, x_prev) of shapes {expected}, got {tuple(c0.shape)}, {tuple(x_prev.shape)}")
        inputs = torch.cat([x_prev, x]) if self.window > 1 else x                                  # (k-1 + T, B, I)
        windows = torch.cat([inputs[i:i + len(x)] for i in range(self.window)], -1)                # (T, B, kI)

        weight = F.dropout(self.weight, self.weight_dropout, self.training)
        # Under autocast the product comes back in a 16-bit type; gates and state stay in the type of x.
        gates = F.linear(windows, weight, self.bias).to(x.dtype)                                   # (T, B, 3H)
        z, f, *o = gates.chunk(3 if self.output_gate else 2, -1)                                   # (T, B, H) each
        z, f = torch.tanh(z), torch.sigmoid(f)
        if self.zoneout:
            keep = torch.rand_like(f) < self.zoneout if self.training else self.zoneout
            f = f + keep * (1 - f)                                                                 # f, or 1 where kept
        c = pool(f, z, c0)
        h = torch.sigmoid(o[0]) * c if self.output_gate else c
        return h, (c[-1], inputs[len(inputs) - self.window + 1:])


def locked_dropout(x, p, training=True):
    """Dropout with one mask for all time steps of the chunk (AWD, section 4.2). x: (T, B, H), same shape out."""
    return x * F.dropout(torch.ones_like(x[:1]), p) if training and p else x                       # mask (1, B, H)


class QRNN(nn.Module):
    """A stack of QRNN layers with the calling conventions of torch.nn.LSTM.

    input_size: I. hidden_size: H of each of num_layers layers, or a list with one size a layer, which num_layers then
    has no say in. Raises ValueError where sizes and windows do not match.
    window: k of every layer, or a list with one a layer.
    batch_first: input and output are (B, T, .) rather than (T, B, .); the state is not affected, as in nn.LSTM.
    dropout: between layers, not after the last. Unlike nn.LSTM's the mask is locked over time.
    layer: passed on to QRNNLayer (output_gate, zoneout, weight_dropout).
    """

    def __init__(self, input_size, hidden_size, num_layers=1, *, batch_first=False, dropout=0.0, window=1, **layer):
        super().__init__()
        sizes = [hidden_size] * num_layers if isinstance(hidden_size, int) else list(hidden_size)
        windows = [window] * len(sizes) if isinstance(window, int) else list(window)
        if not sizes or len(windows) != len(sizes):
            raise ValueError(f"{len(sizes)} layer sizes and {len(windows)} windows: one of each a layer, at least one")
        self.batch_first, self.dropout = batch_first, dropout
        self.layers = nn.ModuleList(QRNNLayer(i, h, k, **layer)
                                    for i, h, k in zip([input_size] + sizes, sizes, windows))

    def forward(self, x, state=None):
        """x: (T, B, I), or (B, T, I) with batch_first; state: [(c, x_prev)] a layer, or None for zeros.

        Returns (output, state): the last layer's h for every step, and the state to hand to the next call.
        """
        h, new_state = x.transpose(0, 1) if self.batch_first else x, []
        state = state or [None] * len(self.layers)
        for i, (layer, s) in enumerate(zip(self.layers, state, strict=True)):
            h = locked_dropout(h, self.dropout, self.training and i > 0)
            h, s = layer(h, s)
            new_state.append(s)
        return h.transpose(0, 1) if self.batch_first else h, new_state


# ------------------------------------------------------------------------------------------------------ language model

class DecoderLoss(torch.autograd.Function):
    """mean cross-entropy of softmax(x W^T + b), a block of rows at a time, so that no (n, V) matrix outlives its block.

    With l_i the logits of row i and y_i its target, nll = mean_i(logsumexp(l_i) - l_i[y_i]), whose gradient needs no
    second pass: dnll/dl_i = (softmax(l_i) - onehot(y_i)) / n. So forward makes dx, dW and db too, while a block's softmax
    is there, and backward only scales them. A saving of memory and time, not part of the paper.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, target, needs_grad):
        device = x.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x16, weight16, bias16 = x.to(product), weight.to(product), bias.to(product)
        nll = x.new_zeros(())
        dx, dw, db = (torch.zeros_like(a) if needs_grad else None for a in (x, weight, bias))
        rows = max(200, 2 ** 21 // len(weight))           # 8 MB of float32; fewer rows would add up dW too often
        for block in (slice(i, i + rows) for i in range(0, len(x), rows)):
            y = target[block, None]                                                                # (rows, 1)
            log_p = F.linear(x16[block], weight16, bias16).to(x.dtype).log_softmax(-1)             # (rows, V)
            nll -= log_p.gather(1, y).sum()
            if needs_grad:
                dl = log_p.exp_().scatter_add_(1, y, log_p.new_full(y.shape, -1.0))                # softmax - onehot
                db += dl.sum(0)
                dl = dl.to(product)
                dx[block] = dl @ weight16
                dw += dl.t() @ x16[block]
        ctx.save_for_backward(dx, dw, db)
        return nll / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw, db = ctx.saved_tensors
        grad = grad / len(dx)
        return dx * grad, dw * grad, db * grad, None, None


def decoder_loss(x, weight, bias, target):
    """F.cross_entropy(F.linear(x, weight, bias), target) in nats, without the logits of all rows at once.

    x: (n, E), weight: (V, E), bias: (V,), target: (n,) of int64. A scalar. First derivatives only.
    """
    return DecoderLoss.apply(x, weight, bias, target, torch.is_grad_enabled())


class LanguageModel(nn.Module):
    """Embedding -> QRNN stack -> decoder tied to the embedding, regularised as in AWD (the paper's section 3).

    vocabulary: V words. embedding_size E; hidden_size H; num_layers: all of size H but the last, which is E so that
    decoder and embedding can be one matrix. window: words the first layer sees; the others see 1, as in AWD's QRNN.
    Dropouts, each in [0, 1): embedding (whole words), input, hidden (between layers), output (locked over time),
    weight (on the gates' matrix). zoneout as in QRNNLayer.
    """

    def __init__(self, vocabulary, embedding_size=400, hidden_size=1550, num_layers=4, *, window=2, dropout_embedding=0.0,
                 dropout_input=0.0, dropout_hidden=0.0, dropout_output=0.0, dropout_weight=0.0, zoneout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)                                         # AWD, section 5
        self.decoder_bias = nn.Parameter(torch.zeros(vocabulary))
        self.rnn = QRNN(embedding_size, [hidden_size] * (num_layers - 1) + [embedding_size],
                        window=[window] + [1] * (num_layers - 1), dropout=dropout_hidden,
                        zoneout=zoneout, weight_dropout=dropout_weight)
        self.dropout_embedding, self.dropout_input, self.dropout_output = dropout_embedding, dropout_input, dropout_output

    def features(self, tokens, state=None):
        """tokens: (T, B) of int64. Returns the last layer's output (T, B, E) after and before dropout, and the state."""
        x = self.embedding(tokens)                                                                 # (T, B, E)
        if self.training and self.dropout_embedding:                                               # a word is dropped
            word_mask = F.dropout(x.new_ones(self.embedding.num_embeddings, 1), self.dropout_embedding)
            x = x * word_mask[tokens]                                                              # wherever it occurs
        x = locked_dropout(x, self.dropout_input, self.training)
        raw, state = self.rnn(x, state)
        return locked_dropout(raw, self.dropout_output, self.training), raw, state

    def forward(self, tokens, state=None):
        """tokens: (T, B) of int64. Returns the logits of each next token (T, B, V) and the state."""
        output, _, state = self.features(tokens, state)
        return F.linear(output, self.embedding.weight, self.decoder_bias), state

    def loss(self, tokens, targets, state=None, activation=0.0, temporal=0.0):
        """tokens, targets: (T, B). Returns (nll, penalty, state); nll is a scalar, the mean over the T B tokens.

        nll is the cross-entropy in nats. penalty is AWD's, section 4.6: activation * mean(h'^2) on the output after
        dropout plus temporal * mean((h_{t+1} - h_t)^2) on the output before it, means over all their numbers. Training
        minimises nll + penalty.
        """
        output, raw, state = self.features(tokens, state)
        nll = decoder_loss(output.flatten(0, 1), self.embedding.weight, self.decoder_bias, targets.flatten())
        penalty = activation * output.square().mean()
        if temporal and len(raw) > 1:
            penalty = penalty + temporal * (raw[1:] - raw[:-1]).square().mean()
        return nll, penalty, state


if __name__ == "__main__":
    torch.manual_seed(0)
    leaves = [torch.rand(6, 2, 3).requires_grad_(), torch.randn(6, 2, 3).requires_grad_(), torch.randn(2, 3).requires_grad_()]
    weights = torch.randn(6, 2, 3)
    by_autograd = torch.autograd.grad((weights * pool_loop(*leaves)).sum(), leaves)
    by_hand = torch.autograd.grad((weights * pool(*leaves)).sum(), leaves)
    for name, a, b in zip(("f", "z", "c_0"), by_autograd, by_hand):
        print(f"dL/d{name:<4} autograd {a.flatten()[0]:+.6f}   by hand {b.flatten()[0]:+.6f}   "
              f"largest difference {(a - b).abs().max():.1e}")
