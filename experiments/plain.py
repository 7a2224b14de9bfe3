"""The whole method once more, in plain code: slow, short, and with nothing hidden.

    python experiments/plain.py alternating      a tiny training, in a minute; or bptt, dni, restart

It needs torch and the standard library alone, and no other file of this project. It has its own
QRNN, g, Adam, clipping, cosine, restarts, chunk lengths and alternation. test_all.py trains with it
and with train.py from the same first weights, and finds the same numbers to 1e-10.

Read it last, after the five files that it puts together. Symbols are those of dni.py: θ and φ are
the parameters of the model and of g, s_k is the state at border k, δ^_k its synthetic gradient, and
h_g the memory of g. AWD is the paper of the network and its regularisation, arXiv 1708.02182. A
number without a name is a section of Shang & Zhang.

Truncation is done without detach() here. Each chunk has NEW weights, which the step before has
made. autograd.grad is asked for the derivative with respect to these new weights and to
s_k, and to nothing else. The older weights, which acted on the chunks before, are other tensors, so
nothing flows to them. That is truncation. For φ it is the same: the memory h_g comes from older φ.

Not here: dropout, a penalty on states outside [-1, 1] (the c of a QRNN stays within), evaluation,
speed.
"""

import dataclasses
import math
import random
import re
import sys
from typing import NamedTuple

import torch


@dataclasses.dataclass
class Settings:
    """The settings that are used here. In train.py those of the same names mean the same."""

    mode: str = "alternating"
    gradient: str = "real"  # of mode restart; or "synthetic"
    seed: int = 0
    embedding_size: int = 16
    hidden_size: int = 32
    num_layers: int = 2
    lr: float = 1e-2
    l2: float = 0.0
    clip: float = 0.25
    chunk: int = 20  # T
    jitter: bool = False
    e_base: float = 1.0
    mult: float = 2.0
    eta_max: tuple = ()
    eta_min: tuple = (0.0,)
    dni_alpha: float = 0.9
    dni_lr: float = 1e-3
    dni_borders: int = 1
    dni_warmup: float = 1.0


# ------------------------------------------------------------------------------ the two networks


def qrnn(x, c, x_prev, W, b):
    """One QRNN layer (QRNN, section 2).

    x: a list of T inputs (B, I).
    c: (B, H), the state.
    x_prev: a list of the inputs before x that its first windows see.
    Returns a list of T outputs (B, H), and the c and x_prev that the next chunk begins with.
    """
    inputs = x_prev + x
    h = []
    for t in range(len(x)):
        window = torch.cat(inputs[t : t + len(x_prev) + 1], 1)  # x_t and the len(x_prev) before it
        z, f, o = (window @ W.T + b).chunk(3, 1)  # (B, H) each
        c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
        h.append(o.sigmoid() * c)
    return h, c, inputs[len(x) :]


def model(theta, inputs, targets, s_k, x_prev, num_layers):
    """The language model on a chunk, entered with s_k.

    theta: {name: weight}.
    inputs, targets: (T, B) of words.
    s_k: (N,), the c of all layers and streams, one layer after the other.
    x_prev: for each layer, a list of the inputs before the chunk.
    Returns the nll, the loss that is minimised, s_{k+1}, and the x_prev of the next chunk.
    """
    B = inputs.shape[1]
    weights = []
    for i in range(num_layers):
        weights.append((theta[f"rnn.layers.{i}.weight"], theta[f"rnn.layers.{i}.bias"]))
    sizes = [B * len(b) // 3 for _, b in weights]  # B H of each layer

    h = [theta["embedding.weight"][words] for words in inputs]
    s_next = []
    next_x_prev = []
    for c, before, (W, b) in zip(s_k.split(sizes), x_prev, weights):
        h, c, after = qrnn(h, c.view(B, -1), before, W, b)
        s_next.append(c.flatten())
        next_x_prev.append(after)

    h = torch.stack(h)  # (T, B, E)
    log_p = (h @ theta["embedding.weight"].T + theta["decoder_bias"]).log_softmax(-1)
    nll = -log_p.gather(-1, targets[..., None]).mean()
    loss = nll + 2 * (h**2).mean()  # AWD's two penalties (4.6)
    if len(h) > 1:
        loss = loss + ((h[1:] - h[:-1]) ** 2).mean()
    return nll, loss, torch.cat(s_next), next_x_prev


def g(phi, c, memory):
    """g of N neurons: 1 -> MLP -> QRNN over the borders -> MLP -> 1 (2.2).

    phi: {name: weight}.
    c: (N,), the values of the neurons.
    memory: (N, 50), h_g.
    Returns δ^ (N,) and the next h_g.
    """

    def linear(x, name):
        return x @ phi[f"{name}.weight"].T + phi[f"{name}.bias"]

    x = linear(linear(c[:, None], "encode.0").relu(), "encode.2")  # (N, 50)
    [h], memory, _ = qrnn([x], memory, [], phi["rnn.weight"], phi["rnn.bias"])
    return linear(linear(h, "decode.0").relu(), "decode.2")[:, 0], memory


# ------------------------------------------------------------- the optimiser, the schedule, chunks


def adam(weights, gradients, moments, rate, l2):
    """Adam (Kingma & Ba 2014, algorithm 1) with weight decay in the gradient.

    weights: {name: weight}.
    gradients: a list, in the order of weights.
    moments: {name: (t, m, v)}; it is changed.
    Returns new weights.
    """
    new = {}
    for (name, w), d in zip(weights.items(), gradients):
        t, m, v = moments.get(name, (0, 0.0, 0.0))
        d = d + l2 * w.detach()
        t = t + 1
        m = 0.9 * m + 0.1 * d
        v = 0.999 * v + 0.001 * d**2
        moments[name] = (t, m, v)
        mean = m / (1 - 0.9**t)
        mean_square = v / (1 - 0.999**t)
        step = mean / (mean_square.sqrt() + 1e-8)
        new[name] = (w.detach() - rate * step).requires_grad_()
    return new


def schedule(settings, epoch):
    """(learning rate, run, whether synthetic gradients cross the borders) at a moment, in epochs.

    It knows nine runs of SGDR.
    """
    warm = epoch >= settings.dni_warmup
    if settings.mode in ("bptt", "dni"):
        return settings.lr, 0, settings.mode == "dni" and warm

    starts = [0.0]
    for i in range(9):
        starts.append(starts[i] + settings.e_base * settings.mult**i)  # E_i = mult^i E_base
    run = max(i for i, start in enumerate(starts) if start <= epoch)
    high = settings.eta_max or (settings.lr,)
    low = settings.eta_min
    eta_max = high[min(run, len(high) - 1)]
    eta_min = low[min(run, len(low) - 1)]
    share = (epoch - starts[run]) / (starts[run + 1] - starts[run])  # E_cur / E_i
    rate = eta_min + (eta_max - eta_min) / 2 * (1 + math.cos(math.pi * share))
    if settings.mode == "alternating":
        return rate, run, run % 2 == 1  # real gradients first (2.3, 3.2)
    return rate, run, settings.gradient == "synthetic" and warm


def chunks(length, settings, epoch):
    """Yield (start, stop) of the chunks of an epoch, of T steps each.

    With jitter T is drawn from N(chunk, 5), one in twenty from N(chunk / 2, 5), and is at least 5.
    The seed and the order of the draws are taken from train.py, as the names of the weights are. So
    both cut the text alike.
    """
    draw = random.Random(f"{settings.seed} {epoch}")
    start = 0
    while start < length:
        T = settings.chunk
        if settings.jitter:
            mean = settings.chunk if draw.random() < 0.95 else settings.chunk / 2
            T = max(5, int(draw.gauss(mean, 5)))
        yield start, min(start + T, length)
        start += T


# ------------------------------------------------------------------------------------- the method


class Step(NamedTuple):
    """What is told of a training step: the chunk's mean loss, and how it was learned from."""

    nll: float
    rate: float
    run: int
    synthetic: bool
    norm: float  # of the gradient, before it is clipped


def training(theta, phi, inputs, targets, settings, epochs):
    """All steps of a training. After each epoch yields

        theta, phi, [a Step for each chunk], the epoch's mean nll

    theta, phi: {name: weight} of the model and of g; an empty phi: no g.
    inputs, targets: (L, B) of words.
    """
    length, B = inputs.shape
    E = settings.embedding_size
    N = B * (settings.hidden_size * (settings.num_layers - 1) + E)  # neurons of all streams
    dtype = theta["embedding.weight"].dtype
    theta_moments = {}
    phi_moments = {}

    for epoch in range(epochs):
        # A text begins: all states are zero. The first layer has a window of 2, the others of 1.
        s_k = torch.zeros(N, dtype=dtype, requires_grad=True)
        memory = torch.zeros(N, 50, dtype=dtype)  # h_g
        x_prev = [[torch.zeros(B, E, dtype=dtype)]] + [[]] * (settings.num_layers - 1)
        past = []
        steps = []
        total = 0.0
        for start, stop in chunks(length, settings, epoch):
            T = stop - start
            rate, run, synthetic = schedule(settings, epoch + start / length)

            # 1. Forward: chunk k, from s_k to s_{k+1}.
            nll, loss, s_next, x_prev = model(
                theta, inputs[start:stop], targets[start:stop], s_k, x_prev, settings.num_layers
            )

            # 2. g predicts the gradient of s_k, to be corrected in 4. Nothing is predicted for s_0.
            #    past: the last dni_borders borders, by default this one alone. g is run over all of
            #    them with its newest weights. With more than one border, g's error also teaches g
            #    what to store for later.
            if phi and start > 0:
                past.append((s_k, memory))
                past = past[-settings.dni_borders :]
                _, memory = past[0]
                for s, _ in past:
                    guess, memory = g(phi, s, memory)
                # The last guess is δ^_k, and memory is now h_g after this border.

            #    In a synthetic chunk g also predicts the gradient of s_{k+1}, which stands for the
            #    future after this chunk. The last chunk has no future.
            future = torch.zeros(N, dtype=dtype)
            if synthetic and stop < length:
                predicted, _ = g(phi, s_next, memory)
                future = settings.dni_alpha * predicted.detach()  # α δ^_{k+1}

            # 3. One sum, two derivatives. T B loss is the loss summed over the chunk. The product
            #    future . s_{k+1} is there because its derivative in s_{k+1} is `future`. The
            #    derivative of `everything` in θ is the gradient of Eq. 1. The derivative in s_k,
            #    the state that the chunk before ended with, is target_k, the bootstrap of 2.1.
            everything = T * B * loss + future @ s_next
            *gradients, target = torch.autograd.grad(everything, [*theta.values(), s_k])

            # 4. g learns what its prediction should have been, from all neurons at once (2.2).
            if phi and start > 0:
                error = ((guess - target) ** 2).mean()
                phi_gradients = torch.autograd.grad(error, phi.values())
                phi = adam(phi, phi_gradients, phi_moments, settings.dni_lr, 0.0)

            # 5. The model learns: its gradient, of the mean loss, is clipped. With jitter a chunk
            #    of T steps gets T / chunk of the learning rate (AWD, 4.1).
            gradients = [d / (T * B) for d in gradients]
            norm = torch.cat([d.flatten() for d in gradients]).norm()
            gradients = [d * min(1, settings.clip / (norm + 1e-6)) for d in gradients]
            if settings.jitter:
                rate = rate * T / settings.chunk
            theta = adam(theta, gradients, theta_moments, rate, settings.l2)

            steps.append(Step(nll.item(), rate, run, synthetic and stop < length, norm.item()))
            total += nll.item() * T
            s_k = s_next
        yield theta, phi, steps, total / length


# -------------------------------------------------------------------------------------- a training


def python_words(count):
    """The first words of the language reference that comes with Python, in lower case."""
    from pydoc_data.topics import topics

    text = " ".join(text for _, text in sorted(topics.items()))
    return re.findall(r"[a-z]+|[.,:;()]", text.lower())[:count]


def first_weights(settings, vocabulary_size):
    """theta and phi, with names and initial values as in train.py: those of torch.nn.Linear."""
    theta = {"embedding.weight": uniform((vocabulary_size, settings.embedding_size), 0.1)}
    theta["decoder_bias"] = torch.zeros(vocabulary_size, requires_grad=True)
    size = 2 * settings.embedding_size  # a window of 2
    for i in range(settings.num_layers):
        last = i == settings.num_layers - 1
        H = settings.embedding_size if last else settings.hidden_size
        linear_weights(theta, f"rnn.layers.{i}", size, 3 * H)
        size = H
    phi = {}
    linear_weights(phi, "encode.0", 1, 50)
    linear_weights(phi, "encode.2", 50, 50)
    linear_weights(phi, "rnn", 50, 150)
    linear_weights(phi, "decode.0", 50, 50)
    phi["decode.2.weight"] = torch.zeros(1, 50, requires_grad=True)  # the first δ^ are zero
    phi["decode.2.bias"] = torch.zeros(1, requires_grad=True)
    return theta, phi


def linear_weights(weights, name, size, out):
    weights[f"{name}.weight"] = uniform((out, size), size**-0.5)
    weights[f"{name}.bias"] = uniform((out,), size**-0.5)


def uniform(shape, bound):
    return ((2 * torch.rand(shape) - 1) * bound).requires_grad_()


def main():
    modes = ("bptt", "dni", "restart", "alternating")
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        print(f"usage: python experiments/plain.py {{{','.join(modes)}}}", file=sys.stderr)
        return 2
    settings = Settings(mode=sys.argv[1])
    torch.manual_seed(settings.seed)
    words = python_words(4001)
    index = {word: i for i, word in enumerate(sorted(set(words)))}
    tokens = torch.tensor([index[word] for word in words])
    streams = 10
    inputs = tokens[:-1].view(streams, -1).T  # (L, B)
    targets = tokens[1:].view(streams, -1).T
    theta, phi = first_weights(settings, len(index))
    if settings.mode in ("bptt", "restart"):
        phi = {}
    print(
        f"{len(words):,} words, {len(index):,} different; {len(inputs)} steps of {streams} streams"
    )
    trained = training(theta, phi, inputs, targets, settings, epochs=15)
    for epoch, (_, _, steps, nll) in enumerate(trained, 1):
        first = steps[0]
        used = sum(step.synthetic for step in steps)
        print(
            f"epoch {epoch:2}  run {first.run}  rate from {first.rate:.4f}  "
            f"synthetic gradients in {used:2} of {len(steps)} chunks  "
            f"perplexity {math.exp(nll):.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
