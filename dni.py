"""Decoupled neural interfaces (DNI): predicting the gradient that a state gets from the future.

Text is read in chunks of T steps. Truncated backpropagation cuts the graph at every border between
two chunks. So the state that crosses a border gets no gradient from the chunks after it. A DNI adds
a second network, g. It looks at the state at a border and predicts the missing gradient. This file
has two kinds of g, and the class Interface, which asks g for predictions and teaches it. (In the
other files a variable `g` is such a network, and `dni` is an Interface.)

Papers
    DNI          Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients",
                 arXiv 1608.05343
    Neuron-wise  Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language
                 Modeling", sections 2.1 (Eq. 1) and 2.2; departures: experiments/departures.md.
                 In brackets below, a number without a name is a section of Shang & Zhang

Glossary
    name       symbol    shape        meaning
    s          s_k       [(B, H_l)]   the state at border k, where chunk k begins: the tensors that
                                      would get a gradient from later chunks. Of a QRNN the c of
                                      each layer l, of a GRU its h, of an LSTM its h and c
    s_next     s_{k+1}   as s         the state at border k + 1, where chunk k ends
    N          N         -            how many numbers are in s_k, B * sum of H_l
    -          δ_k       as s         the gradient of s_k from all that follows
    predicted  δ^_k      as s         g(s_k, h_g; φ), the synthetic gradient: a prediction of δ_k
    -          θ, φ      -            the parameters of the model, and those of g
    target     target_k  as s         what g is taught in the place of δ_k, known one chunk later
    memory     h_g       (N, 50)      g's own recurrent state; `memory` is a tuple with h_g first
    alpha      α         -            a factor on δ^_{k+1} wherever it is used
    synthetic  -         -            a chunk that uses α δ^_{k+1}. In a real chunk it is not used:
                                      read it as 0 in the equations of D_k and target_k below

The bootstrap. L_k is the loss of chunk k, a mean over its T B tokens. R_k is the summed loss of
chunk k and of all later chunks, R_k = T B L_k + R_{k+1}, and δ_k = dR_k/ds_k. All chunks use θ.
In the next lines d/dθ counts the use of θ in chunk k alone. (Its use in later chunks is counted
when they are read. Over all chunks the sum is the full gradient.) Chunk k acts on later losses
through s_{k+1}. So, by the chain rule,

    dR_k/dθ  =  T B dL_k/dθ   +  (ds_{k+1}/dθ)ᵀ   δ_{k+1}
    δ_k      =  T B dL_k/ds_k +  (ds_{k+1}/ds_k)ᵀ δ_{k+1}

Nobody knows δ_{k+1} before all the text is read. So α times g's prediction takes its place in both:

    D_k       =  T B dL_k/dθ   +  (ds_{k+1}/dθ)ᵀ   α δ^_{k+1}     Eq. 1, with α
    target_k  =  T B dL_k/ds_k +  (ds_{k+1}/ds_k)ᵀ α δ^_{k+1}

The model is trained by D_k / (T B), and g is taught target_k. target_k contains g's own prediction
for the next border, as in temporal-difference learning. So, border by border, g can learn of losses
that lie further ahead than one chunk.

(The last inputs x_prev of a QRNN with a window above 1 cross the border too, and they depend on θ
through the embedding. They get no gradient from later chunks, in any mode.)

Not here: gates that decide when to trust g, predictions of a network's inputs (DNI's "synthetic
inputs"), interfaces between layers rather than in time.

Run `python dni.py` (it needs data.py) for Eq. 1 in numbers, and for what a g can learn and carry
back.
"""

import contextlib
import signal
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qrnn import QRNN, QRNNLayer

# -------------------------------------------------------------------------------- the networks g


class NeuronDNI(nn.Module):
    """The neuron-wise interface: one small network for all neurons, scalar in, scalar out (2.2).

        c --- MLP 1 -> 50 -> 50 --- QRNN of 50, memory h_g --- MLP 50 -> 50 -> 1 --- δ^

    c is the value of one neuron in one stream. The neurons of all layers and streams are the BATCH
    of this network, and its time counts borders. So each neuron has a memory of its own, and all
    share one set of parameters, however many neurons there are. (Departure 1: the authors' code
    runs the recurrence ACROSS the neurons, as one sequence of N.)

    The last layer begins at zero, as in DNI. So the first synthetic gradients are zero.

    hidden_size: of the recurrence and of both MLPs; the paper's is 50 (3).
    """

    def __init__(self, hidden_size=50):
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(1, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.rnn = QRNNLayer(hidden_size, hidden_size)
        self.decode = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1)
        )
        begin_at_zero(self.decode[-1])

    def forward(self, s, memory=None):
        """s: a list of (B, H_l).
        memory: what the call for the previous border returned, or None for zero.

        Returns the synthetic gradients, a list of the same shapes, and the memory after this
        border.
        """
        dtype = self.rnn.weight.dtype  # it may be another than the model's
        B = s[0].shape[0]
        sizes = [c.shape[1] for c in s]
        # One row a neuron: all layers of the first stream, then those of the second, and so on.
        c = torch.cat(s, 1).view(-1, 1).to(dtype)  # (N, 1)
        x = self.encode(c).to(dtype)[None]  # (1, N, 50): a chunk of one step
        h, memory = self.rnn(x, memory)
        predicted = self.decode(h[0]).to(wide(s[0].dtype))  # (N, 1)
        return list(predicted.view(B, sum(sizes)).split(sizes, 1)), memory


class LayerDNI(nn.Module):
    """The layer-wise interface (DNI, section 2.1): from the whole state of a layer to its gradient.

    It knows which neuron is which, and sees the values of all neurons of the layer. It pays for
    this in parameters: an MLP H_l -> 50 -> 50 -> H_l for each layer has about 100 H_l. Streams are
    its batch. It has no memory.

    sizes: [H_l], one for each tensor of s: one a layer of a QRNN or a GRU, two a layer of an LSTM.
    hidden_size: of the MLPs; 0 makes each of them one linear map H_l -> H_l.
    Raises ValueError if sizes is a number.
    """

    def __init__(self, sizes, hidden_size=50):
        super().__init__()
        if not hasattr(sizes, "__iter__"):
            raise ValueError(f"sizes: a list, one for each tensor of s, please: [{sizes}]")
        self.mlps = nn.ModuleList()
        for size in sizes:
            if hidden_size == 0:
                mlp = nn.Sequential(nn.Linear(size, size))
            else:
                mlp = nn.Sequential(
                    nn.Linear(size, hidden_size),
                    nn.ReLU(),
                    nn.Linear(hidden_size, hidden_size),
                    nn.ReLU(),
                    nn.Linear(hidden_size, size),
                )
            begin_at_zero(mlp[-1])
            self.mlps.append(mlp)

    def forward(self, s, memory=None):
        """As NeuronDNI.forward; the memory stays None.

        Raises ValueError for states of other sizes.
        """
        made_for = [mlp[0].in_features for mlp in self.mlps]
        sizes = [c.shape[1] for c in s]
        if sizes != made_for:
            raise ValueError(f"this g was made for states of sizes {made_for}, and s has {sizes}")
        dtype = self.mlps[0][0].weight.dtype
        predicted = [mlp(c.to(dtype)).to(wide(c.dtype)) for mlp, c in zip(self.mlps, s)]
        return predicted, None


def begin_at_zero(linear):
    for p in linear.parameters():
        nn.init.zeros_(p)


# --------------------------------------------------------------------------------- the interface
#
# g is asked about a border once or twice. The chunk that ends there asks for a gradient to use, if
# it is synthetic. Then the chunk that begins there asks for the prediction that g is corrected on.
# (Between the two questions g has learned, so its answers differ a little.) credit() puts both
# questions, when a chunk has been read. In chunk k, between the borders k and k + 1, in this order:
#
#     credit()    asks g for δ^_k = g(s_k), and keeps its graph for learn(). h_g moves on.
#                 In a synthetic chunk it also asks for δ^_{k+1} = g(s_{k+1}), a constant, to
#                 inject.
#     backward()  leaves target_k / (T B) in s_k.grad. It does not touch φ.
#     learn()     makes one step of Adam for φ, on the mean of (δ^_k - target_k)² over all neurons.
#
# To inject δ^_{k+1}, credit() returns a term to be added to the loss:
#
#     α / (T B) Σ δ^_{k+1} s_{k+1}        over layers, streams and neurons; δ^ is a constant
#
# Its derivative in s_{k+1} is α δ^_{k+1} / (T B), the gradient that the future would send. So one
# backward pass computes D_k and target_k, both divided by T B. In a real chunk the term is zero. g
# is asked for δ^_k and learns, and nothing is injected. (Where a state is outside [-1, 1], as the c
# of an LSTM can be, a penalty is added to α δ^_{k+1}: see `excess`.)
#
# Why T B? The loss L_k is a mean, and g is taught the gradient of the summed loss. The gradient of
# the mean is T B times smaller. If g were taught that one, its own gradients could fall below
# Adam's epsilon, 1e-8, and g would hardly learn. Also, streams do not touch one another. So with a
# summed loss each stream gets the gradient of its own losses, whatever B is.


class Interface:
    """All that a synthetic gradient adds to the training of a recurrent model. In each chunk:

        s = [c.detach().requires_grad_() for c in s_next]  # s_k, cut off from the chunk before
        s_next, loss = ...  # read chunk k; the loss is a mean over T B tokens
        (loss + dni.credit(s, s_next, tokens_per_chunk=T * B)).backward()  # Eq. 1
        dni.learn()  # g, from what backward left in s

    g: a NeuronDNI, a LayerDNI, or a module that is called as they are: g(s, memory) returns its
        predictions, a list like s, and its memory: None, or a tuple of tensors, the first with N
        rows.
    optimizer: of g's parameters alone; None stands for Adam at 1e-4.
    alpha: α. An error of g is multiplied by α each time it is carried back through a border. The
        paper has no such factor, which is α = 1.
    borders: over how many borders g is unrolled when it learns. 1 is the present one alone: then no
        gradient flows into its memory, so nothing teaches g what to store for later.
    penalty: of states outside [-1, 1], see `excess`; 0 turns it off.
    Raises ValueError if borders is below 1, if optimizer holds parameters that are not g's, or if g
    is in float16.

    You may multiply the sum loss + credit by one factor, as GradScaler does, or by 1/n to
    accumulate gradients over n chunks. (To weigh credit alone, use alpha.) Call learn() after each
    backward(): it divides the factor out. A factor that is 0 or not finite teaches g nothing. g
    computes in its own type, and under autocast in bfloat16, but never in float16, in which its
    gradients are too small.

    h_g has a row for each neuron of each stream, so the streams must stay in their order, and begin
    and end together. For another model, a second batch or a validation text make another Interface
    with the same g and optimizer.

    g may be a part of the model. Its parameters have no gradient when learn() has returned, so the
    model's optimiser and its clipping leave them alone. In a function that torch.compile compiles,
    credit() and learn() are graph breaks.

    A checkpoint that is made where a text begins needs only the state_dicts of g and of optimizer.
    """

    def __init__(self, g, optimizer=None, alpha=1.0, borders=1, penalty=0.01):
        if borders < 1:
            raise ValueError(f"borders must be at least 1, got {borders}")
        self.g = g
        self.optimizer = optimizer or torch.optim.Adam(g.parameters(), 1e-4)
        self.alpha = alpha
        self.borders = borders
        self.penalty = penalty
        self.check_g()
        self.reset()

    def reset(self):
        """Begin another text: h_g is zero, and there is no prediction to learn from."""
        self.memory = None  # h_g after the last border
        self.past = []  # the last borders: [(s, h_g before it)]
        self.asked = None  # what credit() leaves for learn()
        self.loss_scale = None  # what the loss was multiplied by before backward()

    @torch.compiler.disable  # else both backward() would run through one compiled graph: an error
    def credit(self, s, s_next, tokens_per_chunk, synthetic=True):
        """Ask g about s_k and s_{k+1}. Returns the term to add to the loss.

        s: the leaves that the chunk began with, new ones for each chunk: a list of (B, H_l), each
            requiring a gradient. Do not change their .grad between backward() and learn(). Where
            a text begins pass None, because no chunk ended there: g is not asked about this state,
            and h_g begins at zero. (You may also pass leaves of zeros. Then g also learns about
            them.)
        s_next: the states it ended with, still in their graph.
        tokens_per_chunk: T B, which the loss is a mean over.
        synthetic: False in a real chunk: g learns and is not used. Zero is returned then, and
            target_k is the gradient of this chunk's own loss. (Add this zero to the loss, too, and
            call backward() without its argument `inputs`. If you multiply the sum by a factor, the
            gradient that the zero receives is this factor, and learn() needs it.)

        Raises ValueError or RuntimeError for a wrong shape, graph or order of calls.
        """
        self.check_g()
        self.check(s, s_next, tokens_per_chunk, synthetic)
        if s is None:  # another text
            self.memory = None
            self.past = []
        with no_float16(s_next[0].device):
            predicted = None if s is None else self.predict(s)  # δ^_k
            future = self.synthesize(s_next) if synthetic else None  # δ^_{k+1}
        self.asked = Asked(predicted, s, tokens_per_chunk, synthetic)
        if synthetic:
            term = self.alpha / tokens_per_chunk * dot(future, s_next)
            outside = dot([excess(c) for c in s_next], s_next)
            term = term + self.penalty / tokens_per_chunk * outside
        else:
            dtype = wide(s_next[0].dtype)
            term = s_next[0].new_zeros((), dtype=dtype, requires_grad=True)
        self.loss_scale = None
        term.register_hook(self.record_loss_scale)  # backward() calls it
        return term

    def predict(self, s):
        """δ^_k, with a graph for φ; h_g moves on by one border.

        g always reads its memory. With borders = 1 it runs once, on s_k, and is never taught what
        to store for later. With borders = n it runs again over the last n borders, with its present
        weights, from the h_g before the first of them. So its error also teaches it what to store.
        """
        self.past.append((constants(s), self.memory))
        self.past = self.past[-self.borders :]
        _, memory = self.past[0]  # h_g before the first of them
        for seen, _ in self.past:
            predicted, memory = self.ask(seen, memory)
        self.memory = tuple(m.detach() for m in memory) if memory else None
        return predicted

    @torch.no_grad()
    def synthesize(self, s_next):
        """δ^_{k+1}, constants; h_g is left as it is."""
        predicted, _ = self.ask(constants(s_next), self.memory)
        return predicted

    def ask(self, s, memory):
        """g(s, memory). Raises ValueError where the answer is not what Interface says of a g."""
        predicted, memory = self.g(s, memory)
        expected = [tuple(c.shape) for c in s]
        if torch.is_tensor(predicted) or [tuple(d.shape) for d in predicted] != expected:
            raise ValueError(f"g must return a list of predictions of the shapes {expected}")
        if memory is not None:
            neurons = sum(c.numel() for c in s)
            if not isinstance(memory, (tuple, list)) or len(memory[0]) != neurons:
                raise ValueError(f"g's memory: None, or a tuple of tensors, {neurons} rows first")
        return predicted, memory

    def record_loss_scale(self, gradient):
        """Keep the gradient of credit()'s term: what loss + credit was multiplied by.

        It is the derivative of what backward() was called on, with respect to this term.
        After several backward() it is their sum, and so is s_k.grad.
        """
        self.loss_scale = gradient if self.loss_scale is None else self.loss_scale + gradient

    @torch.compiler.disable
    def learn(self):
        """Teach g target_k; backward has left target_k / (T B) in s_k.grad.

        Returns g's mean squared error before the update: None where nothing was predicted, nan
        where no target was finite. (φ's gradient is zero then, but momentum in g's optimiser may
        still move φ.) A state without a gradient was not read in this chunk: its
        gradient is zero.
        Raises RuntimeError where credit() or backward() was not called, or if no state was read.
        """
        if self.asked is None:
            raise RuntimeError(
                "nothing to learn from: call credit() and then backward() before learn()"
            )
        predicted, s, tokens_per_chunk, synthetic = self.asked
        no_gradient = predicted is not None and all(c.grad is None for c in s)
        not_in_loss = synthetic and self.loss_scale is None
        if no_gradient or not_in_loss:
            raise RuntimeError(
                "no gradient yet: call backward() on loss + credit(...) before learn(), and let "
                "the chunk read s"
            )
        self.asked = None
        if predicted is None:
            return None
        scale = tokens_per_chunk
        if self.loss_scale is not None:
            # Divided by infinity all targets would be 0. So they are nan, which teaches nothing.
            finite = self.loss_scale.isfinite()
            scale = tokens_per_chunk / self.loss_scale.where(finite, torch.nan)
        gradients = with_zeros([c.grad for c in s], s)
        target = [scale * d.to(wide(d.dtype)) for d in gradients]  # target_k
        return regress(self.optimizer, predicted, target)

    def check_g(self):
        """Raise where learn() would teach nothing, or the wrong network."""
        optimized = {p for group in self.optimizer.param_groups for p in group["params"]}
        if not optimized <= set(self.g.parameters()):
            raise ValueError(
                "optimizer must hold parameters of g alone, for learn() clears their gradients. "
                "(Were weights of g replaced after the optimizer was made?)"
            )
        if any(p.dtype == torch.float16 for p in optimized):
            raise ValueError("g is in float16, in which Adam's epsilon is 0: call g.float()")

    def check(self, s, s_next, tokens_per_chunk, synthetic):
        """Raise where credit() is called out of turn, or with what would silently do nothing."""
        if self.asked is not None:
            raise RuntimeError(
                "credit() was called twice: call backward() and learn() after it, or reset()"
            )
        if not tokens_per_chunk > 0:
            raise ValueError(f"tokens_per_chunk must be above 0, got {tokens_per_chunk}")
        if not is_state(s_next) or not (s is None or is_state(s)):
            raise ValueError(
                "s, s_next: lists of (B, H): a GRU's list(h_n), an LSTM's [*h_n, *c_n], a "
                "QRNN's [c for c, _ in state]"
            )
        neurons = sum(c.numel() for c in s_next)
        if s:
            shapes = [tuple(c.shape) for c in s]
            shapes_next = [tuple(c.shape) for c in s_next]
            if not all(c.is_leaf and c.requires_grad for c in s):
                raise ValueError(
                    "s must be leaves: begin the chunk with c.detach().requires_grad_()"
                )
            if any(c.grad is not None for c in s):
                raise ValueError(
                    "s has a gradient already: begin each chunk with new leaves, "
                    "c.detach().requires_grad_()"
                )
            if shapes != shapes_next:
                raise ValueError(
                    f"s and s_next must have the same shapes, got {shapes} and {shapes_next}"
                )
        if synthetic and not all(c.requires_grad for c in s_next):
            raise ValueError(
                "s_next has no graph: call credit() before detaching it, not under no_grad. If "
                "nothing in this chunk learns, pass synthetic=False"
            )
        if self.memory and len(self.memory[0]) != neurons:
            raise ValueError(
                f"h_g has {len(self.memory[0])} neurons, s_next {neurons}: call reset() first"
            )


def is_state(states):
    """Whether this is a list of (B, H) that is not empty."""
    if torch.is_tensor(states) or not states:
        return False
    return all(torch.is_tensor(c) and c.dim() == 2 for c in states)


def with_zeros(gradients, s):
    """The gradients of s, zeros for None: where a chunk did not read a state."""
    return [torch.zeros_like(c) if d is None else d for d, c in zip(gradients, s)]


class Asked(NamedTuple):
    """What credit() leaves for learn()."""

    predicted: list  # δ^_k with its graph, or None where a text begins
    s: list  # s_k, whose .grad backward() fills
    tokens_per_chunk: int
    synthetic: bool


def regress(optimizer, predicted, target):
    """One step of φ towards the targets: the mean of (δ^ - target)² over all neurons (2.2).

    optimizer: g's. No other parameter gets a gradient, and its own have none afterwards. If all of
        them are frozen, nothing is taught.
    predicted: δ^_k with its graph, a list of (B, H_l).
    target: target_k, a list of the same shapes. What is not finite in it teaches nothing.
    Returns the mean squared error before the step, a tensor. An error that is not finite counts as
    0 in the mean, but if none is finite, the mean is nan.
    """
    truth = flatten(target).detach()
    guess = flatten(predicted).to(truth.dtype)  # mse_loss wants one type
    finite = truth.isfinite()
    truth = torch.where(finite, truth, guess.detach())
    error = F.mse_loss(guess, truth)
    phi = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    optimizer.zero_grad(set_to_none=True)
    if phi:
        error.backward(inputs=phi)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return error.detach().where(finite.any(), torch.nan)


def excess(c):
    """By how much a state is outside [-1, 1], with its sign: 0 within. c, result: (B, H).

    It is the gradient of ½ (|c| - 1)² where |c| > 1, a penalty for each neuron and border. In
    synthetic chunks penalty * excess(c) is added to α δ^_{k+1}, and so is part of target_k
    (departure 23).

    Why a penalty? An LSTM's c has no bound. Where g pushes c outwards, g sees a larger c at the
    next border, and may predict a larger gradient. Both can grow without end. The state of a QRNN
    or a GRU stays within [-1, 1] if it began there, and the penalty is exactly zero.
    """
    return F.softshrink(c.detach(), 1.0)


def constants(s):
    """What g sees: s without its graph, and with 0 for what is not finite and would make φ nan."""
    return [c.detach().nan_to_num(0.0, 0.0, 0.0) for c in s]


def flatten(tensors):
    """A list of tensors as one vector of all their N numbers, one layer after the other."""
    return torch.cat([t.flatten() for t in tensors])  # (N,)


def dot(gradients, s):
    """Σ d c over layers, streams and neurons. Its derivative in each c of s is its d."""
    return sum((d * c.to(wide(c.dtype))).sum() for d, c in zip(gradients, s))


def wide(dtype):
    """dtype, or float32 if dtype has fewer bits: float16 cannot hold a sum over many neurons."""
    return torch.promote_types(dtype, torch.float32)


def no_float16(device):
    """A context without autocast to float16, in which g's gradients, tiny and unscaled, are 0."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


# --------------------------------------------------------------------------- what can g know?
#
# From the state alone g can predict something of the gradient of the log loss only while the
# model's probabilities are wrong. Here is why.
#
# Let the model, in state s, give the probability P_s(x) to a sequence x, all the words that follow.
# The loss to come is then -log P_s(x). Suppose that the model is calibrated: given s, sequences do
# follow with these probabilities. Then the mean of the gradient of s, over all that may follow s,
# is
#
#     E[-d log P_s(x) / ds | s]  =  -Σ_x P_s(x) d log P_s(x) / ds
#                                =  -Σ_x dP_s(x) / ds  =  -d/ds Σ_x P_s(x)  =  -d/ds 1  =  0
#
# and the best prediction from s alone is zero. (Shown by counting in test_all.py,
# test_what_a_state_can_tell.) With its memory h_g, g may know more than s says. And the gradient of
# a penalty may have a mean other than zero.
#
# Why does BPTT through more chunks than one gain something even then? It multiplies δ by ds/dθ, and
# both depend on the words already read. Given s alone, δ has mean zero. Given s and those words its
# mean may differ from zero, so the mean of the product may too.


# ------------------------------------------------------ how right is g, and how much does it do?
#
# A text is measured as it is trained on: in chunks (s, s_next, loss), each with a graph of its own.
# s are the leaves that a chunk began with, s_next the states that it ended with, and the loss is a
# mean over T B tokens. For K + 1 chunks there are K borders between them. The border before the
# first chunk is not looked at, nor is the one after the last.


@torch.no_grad()
def predictions(g, chunks, memory=None):
    """What g says at each border between the chunks.

    chunks: [(s, s_next, loss)], as above.
    memory: what g returned at the border before these, or None where a text begins.
    Returns [δ^_1, .., δ^_K], each a list like s, and the memory after the last.
    """
    found = []
    for s, _, _ in chunks[1:]:
        predicted, memory = g(constants(s), memory)
        found.append(predicted)
    return found, memory


def true_gradients(chunks, tokens_per_chunk):
    """What g should say there: [δ_1, .., δ_K], each a list like s.

        δ_k  =  T B dL_k/ds_k + (ds_{k+1}/ds_k)ᵀ δ_{k+1}      nothing follows the last chunk

    s_k is a leaf that chunk k alone reads. So δ_k holds the losses after border k and no other,
    even where the state is also an output of the chunk before (the h of an nn.GRUCell in a loop).
    Where a chunk did not read a state, the gradient of that state is zero.
    Raises ValueError if s are no leaves, or if a chunk read none of them.
    """
    found = []
    for s, s_next, loss in reversed(chunks[1:]):
        if not all(c.is_leaf for c in s):
            raise ValueError("s must be the leaves that the chunk read, as in Interface")
        future = tokens_per_chunk * loss
        if found:
            future = future + dot(found[0], s_next)
        delta = torch.autograd.grad(future, s, retain_graph=True, allow_unused=True)
        if all(d is None for d in delta):
            raise ValueError("s must be the leaves that the chunk read, as in Interface")
        found.insert(0, with_zeros(delta, s))
    return found


def through_borders(gradients, chunks, parameters):
    """The gradient of θ, a vector, if at border k a gradient d_k enters the chunk that ends there.

        Σ_k (ds_k/dθ)ᵀ d_k        ds_k/dθ goes back through one chunk

    gradients: [d_1, .., d_K], each a list like s.
    """
    entering = torch.zeros((), requires_grad=True)  # for a text without a border
    for at_border, (_, s_next, _) in zip(gradients, chunks):
        entering = entering + dot(at_border, s_next)
    return gradient_of(entering, parameters)


def gradient_of(loss, parameters):
    """The gradient of all parameters as one vector; zero where the loss does not depend on one."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return flatten(found)


def agreement(g, chunks, tokens_per_chunk):
    """Cosine and R² of g's predictions with the TRUE gradients, two floats; nan without a border.

    (g's targets are no measure, for they hold its own predictions.)
    """
    predicted, _ = predictions(g, chunks)
    truth = true_gradients(chunks, tokens_per_chunk)
    return compare(sum(predicted, []), sum(truth, []))


def crossing(g, chunks, tokens_per_chunk, parameters, alpha):
    """How much g does: three gradients of θ, summed over the chunks.

        truncated  =  Σ_k dL_k/dθ                        the chunks apart: truncated BPTT
        lost       =  Σ_k (ds_k/dθ)ᵀ δ_k / (T B)         what truncation leaves out
        injected   =  Σ_k (ds_k/dθ)ᵀ α δ^_k / (T B)      what Eq. 1 adds with g's predictions

    dL_k/dθ and ds_k/dθ go back through one chunk. By the chain rule, truncated + lost is the
    gradient of Σ_k L_k in one graph of all chunks (with x_prev cut). A g that is always right, with
    α = 1, injects what was lost.

    parameters: θ, tensors that require a gradient.
    Returns truncated, lost and injected, a vector each.
    """
    parameters = list(parameters)
    predicted, _ = predictions(g, chunks)
    truth = true_gradients(chunks, tokens_per_chunk)
    truncated = gradient_of(sum(loss for _, _, loss in chunks), parameters)
    lost = through_borders(truth, chunks, parameters) / tokens_per_chunk
    injected = through_borders(predicted, chunks, parameters) * alpha / tokens_per_chunk
    return truncated, lost, injected


def compare(predicted, truth):
    """Cosine and R², floats, of two lists of tensors of the same shapes; nan if empty.

        cosine = sum p t / sqrt(sum p² sum t²)
        R²     = 1 - sum (p - t)² / sum t²

    The cosine sees direction alone: 1 is parallel, 0 unrelated; nan if p = 0. R² is 1 for equal, 0
    for as good as predicting zero, below 0 for worse.
    """
    if not predicted:  # no border
        return float("nan"), float("nan")
    p = flatten(predicted).detach().double()
    t = flatten(truth).double()
    cosine = (p @ t) / (p.norm() * t.norm())
    r2 = 1 - (p - t).square().sum() / t.square().sum()
    return cosine.item(), r2.item()


# -------------------------------------------------------------------------------- see it work


def two_chunks():
    """The gradient of one weight w over two chunks of T = 2: whole, truncated, mended with δ."""
    w = torch.tensor(0.8, requires_grad=True)
    x = torch.tensor([1.0, -1.0, 2.0, 0.5])
    y = torch.tensor([0.5, 1.0, 1.0, -1.0])

    def read(c, x, y):
        """c_t = c_{t-1} / 2 + w x_t. The last c, and the summed loss Σ (c_t - y_t)²."""
        loss = 0.0
        for x_t, y_t in zip(x, y):
            c = c / 2 + w * x_t
            loss = loss + (c - y_t) ** 2
        return c, loss

    def gradient(of, by):
        (derivative,) = torch.autograd.grad(of, by, retain_graph=True)
        return derivative

    s_1, first_loss = read(0.0, x[:2], y[:2])  # s_1: the state at the border
    _, second_loss = read(s_1, x[2:], y[2:])
    whole = gradient(first_loss + second_loss, w)

    s = s_1.detach().requires_grad_()  # the same state, cut off from its past
    _, second_loss = read(s, x[2:], y[2:])
    of_second_chunk = gradient(second_loss, w)
    delta = gradient(second_loss, s)
    truncated = gradient(first_loss, w) + of_second_chunk
    mended = gradient(first_loss + delta * s_1, w) + of_second_chunk  # Eq. 1, with δ for α δ^
    of_state = gradient(s_1, w)

    print("One neuron c_t = c_(t-1) / 2 + w x_t, two chunks of T = 2. The gradient of w:")
    print(f"  by BPTT through both chunks            {whole:+.4f}")
    print(f"  truncated at the border                {truncated:+.4f}")
    print(f"  δ, the gradient of the border's state  {delta:+.4f}   (and ds/dw = {of_state:+.4f})")
    print(f"  truncated + δ ds/dw (Eq. 1)            {mended:+.4f}")
    print("Only chunk 2 can know δ. A DNI predicts it when chunk 1 ends.\n")


def train_recall(text, make_g, updates=1000, T=10, H=64):
    """Train a QRNN to recall a symbol.

    Returns the share of right answers in the last 50 updates of each quarter of the training.

    text: inputs and targets, (updates T, B) each; only the answers count, the other targets are
        -100.
    make_g: makes a g; None for truncated BPTT.
    """
    torch.manual_seed(0)
    dni = Interface(make_g()) if make_g else None
    torch.manual_seed(0)  # the same model for all
    embed = nn.Embedding(13, H)  # 4 symbols, 8 fillers, 1 query
    rnn = QRNN(H, H)
    decode = nn.Linear(H, 13)
    nn.init.constant_(rnn.layers[0].bias[H : 2 * H].data, 2.0)  # forget little
    model = nn.ModuleList([embed, rnn, decode])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    inputs, targets = text
    s = None
    x_prev = None
    right = []
    for x, y in zip(inputs.split(T), targets.split(T)):
        state = None if s is None else [(s, x_prev)]
        h, [(s_next, x_prev)] = rnn(embed(x), state)
        logits = decode(h)
        # The mean over all T B tokens, of which only the answers are scored.
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.numel()
        if dni:
            loss = loss + dni.credit(None if s is None else [s], [s_next], y.numel())
        optimizer.zero_grad()
        loss.backward()
        if dni:
            dni.learn()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        s = s_next.detach().requires_grad_()
        right.append((logits.argmax(-1) == y)[y != -100])
    quarter = updates // 4
    ends = range(quarter, updates + 1, quarter)
    return [torch.cat(right[end - 50 : end]).float().mean().item() for end in ends]


def sine(c):
    return torch.sin(3 * c)


def coin(c):
    return torch.randn_like(c).sign()


def main():
    from data import episodes  # a symbol, 9 fillers, a query, the symbol

    two_chunks()
    print("Recall a symbol shown one chunk before. The share of right answers (chance: 0.25) after")
    print("  updates             250   500   750  1000")
    text = episodes(delay=9, steps=10_000, batch_size=24, answers_only=True)
    for name, make_g in (("truncated BPTT", None), ("layer-wise DNI", lambda: LayerDNI([64]))):
        shares = train_recall(text, make_g)
        print(f"  {name:17}", "  ".join(f"{share:.2f}" for share in shares), flush=True)
    print("Truncated BPTT is above chance: a trace of the symbol is left in the state.")

    print(
        "\nWhat can a neuron-wise g learn? After 200 borders, where the gradient of a neuron c is"
    )
    for name, gradient in (("sin(3 c)", sine), ("a coin toss", coin)):
        g = NeuronDNI()
        optimizer = torch.optim.Adam(g.parameters(), 3e-3)
        memory = None
        for _ in range(200):
            s = [torch.rand(8, 48) * 2 - 1]
            target = [gradient(c) for c in s]
            predicted, memory = g(s, memory)
            memory = tuple(m.detach() for m in memory)
            regress(optimizer, predicted, target)
        cosine, r2 = compare(predicted, target)
        print(f"  {name:12} cosine {cosine:+.2f}, R² {r2:+.2f}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end quietly where nobody reads on: python dni.py | head -1
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # an encoding without Greek letters
    main()
