"""Decoupled neural interfaces (DNI): networks that predict the gradient a state will receive from the future.

Text is read in chunks of T steps. Truncated backpropagation cuts the graph at every border between two
chunks. So the state that crosses a border gets no gradient from the chunks after it. A DNI is a network g
that looks at this state and predicts the missing gradient.

Papers
    DNI          Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", 1608.05343
    Neuron-wise  Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling",
                 section 2.1 (Eq. 1) and section 2.2; departures from it: experiments/departures.md

Glossary
    name       symbol    shape               meaning
    s          s_k       [(B, H_l)]          the c of each layer l where chunk k begins, at border k
    s_next     s_{k+1}   as s                the same at border k + 1, where chunk k ends
    N          N         -                   how many scalars are in s_k, B * sum of H_l
    -          δ_k       as s                the gradient of s_k from all that follows
    predicted  δ^_k      as s                g(s_k, h_g; φ): the synthetic gradient, a prediction of δ_k
    -          θ, φ      -                   the parameters of the model, and those of g
    target     target_k  as s                what g is taught instead, known one chunk later
    memory     h_g       (N, 50)             g's own recurrent state; `memory` is a tuple, h_g its first
    alpha      α         -                   discount of δ^_{k+1}, where it is injected and in target_k

The bootstrap. R_k is the summed loss of chunk k and all later ones, and δ_k = dR_k/ds_k. L_k is the loss of
chunk k, a mean over T B tokens. Chunk k acts on later losses through s_{k+1}. So, by the chain rule,

    dR_k/dθ  =  T B dL_k/dθ   +  (ds_{k+1}/dθ)ᵀ   δ_{k+1}     (only θ's use in chunk k counts)
    δ_k      =  T B dL_k/ds_k +  (ds_{k+1}/ds_k)ᵀ δ_{k+1}

Nobody knows δ_{k+1} before all the text is read. So α times g's prediction takes its place in both lines:

    T B times the gradient of θ  =  T B dL_k/dθ   +  (ds_{k+1}/dθ)ᵀ   α δ^_{k+1}    Eq. 1
    target_k                     =  T B dL_k/ds_k +  (ds_{k+1}/ds_k)ᵀ α δ^_{k+1}

The first line trains the model. The second is a TARGET for g. It contains g's own next guess, as in
temporal-difference learning. So credit can travel further back than one chunk.

Not here: gates that decide when to trust g, synthetic inputs, interfaces between layers rather than in time.
Run `python dni.py` (it needs data.py) for Eq. 1 in numbers, and for what a g can learn and carry back.
"""

import torch
import torch.nn.functional as F
from torch import nn

from qrnn import QRNN, QRNNLayer


# g is asked twice about each border: at the end of a chunk for a gradient to use, and at the start of the
# next chunk for one to correct. In chunk k, between the borders k and k + 1,
#
#     credit()    asks g for δ^_k = g(s_k), with a graph for φ: learn() will correct it. h_g moves on.
#                 In a synthetic chunk it also asks for δ^_{k+1} = g(s_{k+1}), a constant, and injects it.
#     backward()  leaves target_k / (T B) in s_k.grad. It does not touch φ.
#     learn()     makes one step of Adam for φ, on the mean of (δ^_k - target_k)² over all neurons.
#
# To inject δ^_{k+1}, credit() returns a term to be added to the loss,
#
#     α / (T B) Σ δ^_{k+1} s_{k+1}        over layers, streams and neurons; δ^ is a constant
#
# Its derivative in s_{k+1} is α δ^_{k+1} / (T B), the gradient that the future would send. So one backward
# pass computes Eq. 1 and target_k, both divided by T B. A real chunk is one without this term. There g only
# learns.
#
# A QRNN's x_prev crosses the border too. It gets no gradient from later chunks, in any mode.
#
# Why times T B? Streams do not touch one another, so δ_k holds the gradient of each stream's own summed
# loss. Its size does not depend on B. The gradient of the mean is T B times smaller, perhaps below the
# epsilon of g's Adam, 1e-8, and then Adam's steps shrink.


class Interface:
    """All that a synthetic gradient adds to the training of a recurrent model, of any kind. In each chunk:

        s = [c.detach().requires_grad_() for c in s_next]           # the border: s_k, cut off from its past
        s_next, loss = ...                                          # read the chunk; a mean over T B tokens
        (loss + dni.credit(s, s_next, tokens_per_chunk=T * B)).backward()       # Eq. 1
        dni.learn()                                                 # towards the target that backward left

    g: a NeuronDNI, a LayerDNI, or a module that is called as they are: g(s, memory) returns predictions, a
        list like s, and its memory: None, or a tuple of tensors, the first with N rows.
    optimizer: of g's parameters alone; None stands for Adam at 1e-4.
    alpha: the discount α. Below 1, g's errors shrink on their way back. The paper has none, as with 1.
    borders: how many borders g's error is backpropagated through; with 1 no gradient flows into its memory.
    pull: see below; 0 turns it off.

    The pull. An LSTM's s is [h, c], and its c has no bound. Where g pushes c outwards, it sees a larger c at
    the next border and may predict a larger gradient. Both can grow without end. So, where |c| is above 1,
    pull · (|c| - 1) with the sign of c is added to α δ^_{k+1}. It pulls c back, and is part of target_k.
    The state of a QRNN or a GRU that began within [-1, 1] stays there.

    The sum of loss and credit() may be multiplied before backward(), by GradScaler, or to accumulate over n
    chunks, (loss + dni.credit(..)) / n. learn(), still called for each chunk, undoes this in its targets.
    Where a text begins, the state_dicts of g and optimizer are all that a checkpoint needs.
    """

    def __init__(self, g, optimizer=None, alpha=1.0, borders=1, penalty=0.01):
        if borders < 1:
            raise ValueError(f"borders must be at least 1, got {borders}")
        self.g, self.alpha, self.borders, self.penalty = g, alpha, borders, penalty
        self.optimizer = optimizer or torch.optim.Adam(g.parameters(), 1e-4)
        if not {p for group in self.optimizer.param_groups for p in group["params"]} <= set(
            g.parameters()
        ):
            raise ValueError(
                "optimizer must hold parameters of g alone: learn() clears their gradients"
            )
        self.reset()

    def reset(self):
        """Begin another text: h_g is zero, and there is no prediction to learn from."""
        self.memory = self.pending = self.factor = None
        self.past = []  # the last borders: [(s, h_g before it)]

    def credit(self, s, s_next, tokens_per_chunk, synthetic=True):
        """Ask g about s_k and s_{k+1}. Returns what to add to the loss: α / (T B) Σ δ^_{k+1} s_{k+1}.

        s: the leaves that the chunk began with, new ones for each chunk: a list of (B, H_l), each requiring a
            gradient; None where a text begins and nothing is to be predicted.
        s_next: the states it ended with, still in their graph.
        tokens_per_chunk: T B, which the loss is a mean over.
        synthetic: False in a real chunk: g learns and is not used. Zero is returned then, and target_k
            holds the T true steps alone.

        Raises ValueError or RuntimeError for a wrong shape, graph or order of calls.
        """
        self.check(s, s_next, synthetic)
        predicted = None if s is None else self.predict(s)
        self.pending, self.factor = (predicted, s, tokens_per_chunk, synthetic), None
        if not synthetic:
            return self.watched(s_next[0].new_zeros((), requires_grad=True))
        future = self.synthesize(s_next)  # δ^_{k+1}
        injected = (
            self.alpha / tokens_per_chunk * sum((d * c).sum() for d, c in zip(future, s_next))
        )
        excess = [F.softshrink(c.detach(), 1.0) for c in s_next]  # 0 within [-1, 1] (departure 23)
        pull = self.penalty / tokens_per_chunk * sum((e * c).sum() for e, c in zip(excess, s_next))
        return self.watched(injected + pull)

    def watched(self, term):
        """The term. Backward leaves its gradient in self.factor: what the loss was multiplied by."""

        def keep(gradient):
            self.factor = gradient

        term.register_hook(keep)
        return term

    def predict(self, s):
        """δ^_k, with a graph for φ; h_g moves on by one border.

        g always reads its memory. With borders = 1 it runs once, on s_k, and is never taught what to store
        for later. With borders = n it runs again over the last n borders, with today's φ, from the h_g
        before the first of them. So its error also teaches what to store.
        """
        self.past = [*self.past, (constants(s), self.memory)][-self.borders :]
        memory = self.past[0][1]  # h_g before the first of them
        for seen, _ in self.past:
            predicted, memory = self.g(seen, memory)
        self.memory = tuple(m.detach() for m in memory) if memory else None
        return predicted

    @torch.no_grad()
    def synthesize(self, s_next):
        """δ^_{k+1}, constants; h_g is left as it is."""
        return self.g(constants(s_next), self.memory)[0]

    def learn(self):
        """Teach g target_k; backward has left target_k / (T B) in s_k.grad.

        Returns g's mean squared error before the update, None where nothing was predicted. Raises
        RuntimeError where credit or backward was not called.
        """
        if self.pending is None:
            raise RuntimeError(
                "nothing to learn from: call credit() and then backward() before learn()"
            )
        predicted, s, tokens_per_chunk, synthetic = self.pending
        if (
            predicted is not None
            and any(c.grad is None for c in s)
            or synthetic
            and self.factor is None
        ):
            raise RuntimeError(
                "no gradient yet: call backward() on loss + credit(...) before learn()"
            )
        self.pending = None
        if predicted is None:
            return None
        unit = tokens_per_chunk / (1.0 if self.factor is None else self.factor)
        target = [unit * c.grad for c in s]  # target_k
        return regress(self.optimizer, predicted, target)

    def check(self, s, s_next, synthetic):
        """Raise where credit() is called out of turn, or with what would silently do nothing."""
        if self.pending is not None:
            raise RuntimeError(
                "credit() was called twice: call backward() and learn() after it, or reset()"
            )
        if any(
            torch.is_tensor(x) or any(not torch.is_tensor(c) or c.dim() != 2 for c in x)
            for x in (s_next, [] if s is None else s)
        ):
            raise ValueError(
                "s, s_next: lists of (B, H): a GRU's list(h_n), a QRNN's [c for c, _ in state]"
            )
        if s and not all(c.is_leaf and c.requires_grad for c in s):
            raise ValueError("s must be leaves: begin the chunk with c.detach().requires_grad_()")
        shapes = [[tuple(c.shape) for c in x or ()] for x in (s, s_next)]
        if s and shapes[0] != shapes[1]:
            raise ValueError(f"s and s_next must have the same shapes, got {shapes}")
        if synthetic and not all(c.requires_grad for c in s_next):
            raise ValueError(
                "s_next has no graph: call credit() before detaching it, not under no_grad"
            )
        neurons = sum(c.numel() for c in s_next)
        if self.memory and len(self.memory[0]) != neurons:
            raise ValueError(
                f"h_g has {len(self.memory[0])} neurons, s_next {neurons}: call reset() first"
            )


def regress(optimizer, predicted, target):
    """One step of φ towards the targets: the mean of (δ^ - target)² over all neurons, in one update (2.2).

    optimizer: g's; predicted: δ^_k with its graph; target: target_k. What is not finite teaches nothing.
    Returns the mean squared error before the step, a tensor.
    """
    guess, truth = flatten(predicted), flatten(target).detach()
    error = F.mse_loss(guess, torch.where(truth.isfinite(), truth, guess.detach()))
    optimizer.zero_grad(set_to_none=True)
    error.backward()
    optimizer.step()
    return error.detach()


def constants(s):
    """What g sees: s without its graph. What is not finite is 0: it would spoil all of φ."""
    return [c.detach().nan_to_num(0.0, 0.0, 0.0) for c in s]


def flatten(tensors):
    """A list of tensors as one vector of all their N numbers, one layer after the other."""
    return torch.cat([t.flatten() for t in tensors])  # (N,)


# ------------------------------------------------------------------------------------------ the networks g


class NeuronDNI(nn.Module):
    """The neuron-wise interface: one small network g for all neurons, scalar in, scalar out (section 2.2).

        c --- MLP 1 -> 50 -> 50 --- QRNN of 50, memory h_g --- MLP 50 -> 50 -> 1 --- synthetic gradient

    The neurons of all layers and streams are g's BATCH; its time is the count of borders. So each neuron has
    its own memory, and the number of parameters does not depend on the number of neurons.
    (Departure 1: the authors' code runs g's recurrence ACROSS the neurons, as one sequence of N.)

    The last layer begins at zero, and so do the synthetic gradients, as in DNI.
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
        """s: list of (B, H_l), one a layer.
        memory: what the previous border returned, or None for zero.

        Returns the synthetic gradients, a list of the same shapes, and the memory after this border.
        """
        kind = self.rnn.weight.dtype  # it may be another than the model's
        c = torch.cat(s, 1).flatten()[:, None].to(kind)  # (N, 1), one stream after the other
        x = self.encode(c).to(kind)[None]  # (1, N, 50): one step a border
        h, memory = self.rnn(x, memory)
        predicted = self.decode(h[0]).to(s[0].dtype)  # (N, 1)
        return list(predicted.view(s[0].shape[0], -1).split([c.shape[1] for c in s], 1)), memory


class LayerDNI(nn.Module):
    """The layer-wise interface of DNI, section 2.1: from the whole state of a layer to its whole gradient.

    It knows which neuron is which, and sees what the others do, and pays for it in parameters: one MLP
    H_l -> 50 -> 50 -> H_l a layer, about 100 H_l. Streams are its batch; it has no memory.

    sizes: H_l of each layer.
    hidden_size: 0 makes it one linear map H_l -> H_l a layer.
    """

    def __init__(self, sizes, hidden_size=50):
        super().__init__()
        if isinstance(sizes, int):
            raise ValueError(f"sizes: a list, one a layer, please: [{sizes}]")
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(h, hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, h),
            )
            if hidden_size
            else nn.Sequential(nn.Linear(h, h))
            for h in sizes
        )
        for mlp in self.mlps:
            begin_at_zero(mlp[-1])

    def forward(self, s, memory=None):
        """As NeuronDNI.forward; the memory stays None. Raises ValueError for states of other sizes."""
        made_for, got = [mlp[0].in_features for mlp in self.mlps], [c.shape[1] for c in s]
        if got != made_for:
            raise ValueError(f"this g was made for states of sizes {made_for}, and s has {got}")
        return [mlp(c.to(mlp[0].weight.dtype)).to(c.dtype) for mlp, c in zip(self.mlps, s)], None


def begin_at_zero(linear):
    for p in linear.parameters():
        nn.init.zeros_(p)


# ------------------------------------------------------------------------------------- what can g know?
#
# Let the model, in state s, give the probability P_s(x) to a sequence x, all the words that follow. The loss
# to come is then -log P_s(x). Suppose that the model is calibrated: given s, sequences do follow with these
# probabilities. Then the mean of the gradient of s, over all that may follow s, is
#
#     E[-d log P_s(x) / ds | s]  =  -Σ_x P_s(x) d log P_s(x) / ds  =  -d/ds Σ_x P_s(x)  =  -d/ds 1  =  0
#
# and the best prediction from s alone is zero. So from s alone, g can predict something of the log loss only
# while the model is not calibrated. (Shown by counting in test_all.py, test_what_a_state_can_tell.) With its
# memory h_g it may know more than s says, and the gradient of a penalty may have a mean.
#
# Even then truncation loses something: (ds/dθ)ᵀ δ, the gradient of θ that crosses the border. The mean
# of δ is zero given s, but need not be given s and the words that led to it. ds/dθ depends on these words
# too. So the mean of the product need not be zero.


def agreement(g, states, losses, tokens_per_chunk):
    """Cosine and R² of g's predictions with the TRUE gradients, on a text that was read in one graph.

    states: [s_1, .., s_K], the state at each border, a list of (B, H_l), the very tensors that chunk k reads.
    losses: those of the K + 1 chunks, means over tokens_per_chunk tokens each.

    δ_k is the gradient of all losses after border k, to the end of the text. (g's targets are no measure, as
    they hold its own predictions.) Returns two floats. The graph is used up.
    """
    if len(losses) != len(states) + 1:
        raise ValueError(
            f"{len(states)} borders, so {len(states) + 1} losses are needed, got {len(losses)}"
        )
    guesses, memory, leaves = [], None, [c for s in states for c in s]
    with torch.no_grad():
        for s in states:
            predicted, memory = g(constants(s), memory)
            guesses += predicted
    truths = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if leaves else ()
    if any(d is None for d in truths):
        raise ValueError(
            "states must be what the next chunk read: for a GRU torch.stack(s), s = list(h_n)"
        )
    return compare(guesses, [tokens_per_chunk * d for d in truths])


def compare(predicted, truth):
    """Cosine and R², floats, of two lists of tensors of the same shapes; nan if empty.

    cosine = sum p t / sqrt(sum p² sum t²)      direction alone: 1 parallel, 0 unrelated, nan if p = 0
    R²     = 1 - sum (p - t)² / sum t²          1 equal; 0 as good as predicting zero; below 0 worse
    """
    if not predicted:  # no border
        return float("nan"), float("nan")
    p, t = flatten(predicted).detach().double(), flatten(truth).double()
    return ((p @ t) / (p.norm() * t.norm())).item(), (
        1 - (p - t).square().sum() / t.square().sum()
    ).item()


# ------------------------------------------------------------------------------------------------ see it work


def two_chunks():
    """The gradient of one weight w over two chunks of T = 2: whole, truncated, mended with the true δ."""
    w = torch.tensor(0.8, requires_grad=True)
    x, y = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([0.5, 1.0, 1.0, -1.0])

    def read(c, x, y):
        """c_t = c_{t-1} / 2 + w x_t. The last c, and the summed loss Σ (c_t - y_t)²."""
        loss = 0.0
        for x_t, y_t in zip(x, y):
            c = c / 2 + w * x_t
            loss = loss + (c - y_t) ** 2
        return c, loss

    def gradient(of, by):
        return torch.autograd.grad(of, by, retain_graph=True)

    s_1, first = read(0.0, x[:2], y[:2])  # s_1: the state at the border
    _, second = read(s_1, x[2:], y[2:])
    (whole,) = gradient(first + second, w)
    s = s_1.detach().requires_grad_()  # cut off from its past
    _, second = read(s, x[2:], y[2:])
    of_second, delta = gradient(second, (w, s))
    (of_first,) = gradient(first, w)
    (mended,) = gradient(first + delta * s_1, w)  # Eq. 1, with δ in the place of δ^
    (of_state,) = gradient(s_1, w)
    print(
        f"One neuron c_t = c_(t-1) / 2 + w x_t, two chunks of T = 2. The gradient of w:\n"
        f"  by BPTT through both chunks            {whole:+.4f}\n"
        f"  truncated at the border                {of_first + of_second:+.4f}\n"
        f"  δ, the gradient of the border's state  {delta:+.4f}   (and ds/dw = {of_state:+.4f})\n"
        f"  truncated + δ ds/dw (Eq. 1)            {mended + of_second:+.4f}\n"
        "Only chunk 2 can know δ. A DNI predicts it when chunk 1 ends.\n"
    )


def train_recall(text, make_g, updates=1000, T=10, H=64):
    """Train a QRNN to recall a symbol. The shares of right answers in the last 50 updates of each quarter.

    text: inputs and targets, (updates T, B) each; only the answers count, the other targets are -100.
    make_g: makes a g; None for truncated BPTT.
    """
    torch.manual_seed(0)
    dni = Interface(make_g()) if make_g else None
    torch.manual_seed(0)  # the same model for all
    embed, rnn, decode = nn.Embedding(13, H), QRNN(H, H), nn.Linear(H, 13)
    nn.init.constant_(rnn.layers[0].bias[H : 2 * H].data, 2.0)  # forget little
    model = nn.ModuleList([embed, rnn, decode])
    optimizer, state, right = torch.optim.Adam(model.parameters(), 3e-3), None, []
    for x, y in zip(*(part.split(T) for part in text)):
        h, [(c, x_prev)] = rnn(embed(x), state)
        logits = decode(h)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.numel()
        if dni:
            loss = loss + dni.credit([state[0][0]] if state else None, [c], y.numel())
        optimizer.zero_grad()
        loss.backward()
        if dni:
            dni.learn()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = [(c.detach().requires_grad_(), x_prev)]
        right.append((logits.argmax(-1) == y)[y != -100])
    quarters = [right[end - 50 : end] for end in range(updates // 4, updates + 1, updates // 4)]
    return [torch.cat(quarter).float().mean().item() for quarter in quarters]


def agreement_after(borders, gradient):
    """(cosine, R²) of a neuron-wise g with a made-up gradient of each neuron, after so many borders."""
    g, memory = NeuronDNI(), None
    optimizer = torch.optim.Adam(g.parameters(), 3e-3)
    for _ in range(borders):
        s = [torch.rand(8, 48) * 2 - 1]
        target = [gradient(c) for c in s]
        predicted, memory = g(s, memory)
        memory = tuple(m.detach() for m in memory)
        regress(optimizer, predicted, target)
    return compare(predicted, target)


if __name__ == "__main__":
    from data import episodes  # a symbol, 9 fillers, a query, the symbol

    two_chunks()
    print(
        "Recall a symbol that was shown one chunk before. The share of right answers (chance: 0.25) after\n"
        "  updates             250   500   750  1000"
    )
    text = episodes(delay=9, steps=10_000, batch_size=24, answers_only=True)
    for name, make_g in (("truncated BPTT", None), ("layer-wise DNI", lambda: LayerDNI([64]))):
        print(
            f"  {name:17}",
            "  ".join(f"{share:.2f}" for share in train_recall(text, make_g)),
            flush=True,
        )
    print("Truncated BPTT is above chance: a trace of the symbol is left in the state.")
    print(
        "\nWhat can a neuron-wise g learn? After 200 borders, where the gradient of a neuron c is"
    )
    for name, gradient in (
        ("sin(3 c)", lambda c: torch.sin(3 * c)),
        ("a coin toss", lambda c: torch.randn_like(c).sign()),
    ):
        print("  {:12} cosine {:+.2f}, R² {:+.2f}".format(name, *agreement_after(200, gradient)))
