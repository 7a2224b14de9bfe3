"""Is credit carried across a border? The language `recall`, its delay longer than a chunk.

    python experiments/recall.py                     everything; resumable
    python experiments/recall.py --arms bptt linear full --borders 1 --seeds 1 --log /tmp/look.csv
                                                     a first look, in two minutes

An episode shows one of K symbols, then D fillers, a query, and the symbol again (data.py). With D = b T - 1
the query comes exactly b chunks of T steps after the symbol, whatever the phase. So b borders lie between
them, and truncation cuts every link. The B streams are cut so that all phases occur in each chunk. Arms, at
equal updates and equal tokens:

    bptt      truncated: no gradient crosses a border
    full      the last chunk's loss, backpropagated through it and the b chunks before it, to the symbol
    linear    the layer-wise DNI (DNI, 2.1) as one linear map: sees a whole layer, knows which neuron is which
    layer     the same as an MLP with 50 hidden units
    neuron    the neuron-wise DNI (paper, 2.2)
    neuron4   the same, taught through 4 borders of its own time (dni_bptt); over two borders only
    named     neuron-wise, and g gets a learnt vector of 50 numbers for each neuron: it knows which is which

A text asks two things, which symbol it was and when the query comes, and the gradients of both cross a
border. So there are two counts. With `all`, the loss is that of every word. With `answers`, what follows any
word but a query is not counted: not in training, not in the true gradient, and not in the perplexity, whose
floor is then 1. B is 32 with `all`, and twice the length of an episode with `answers`.

The learning rate of each g is the best of RATES, by accuracy, for each number of borders, on two seeds that
serve for nothing else. The discount α is 0.9.

An update is `train_step` of train.py (for `full`, `full_update` below), without dropout, on a text that never
repeats. The model, one QRNN layer of 64, starts with forget gates of about sigmoid(2), so that a state
outlives a border. Every so often it is tested on a text of its own: accuracy of the answer (chance 1 / K),
perplexity (the floor is known), and for a DNI cosine and R^2 of its predictions with

    true      the gradient of all loss to come, by backpropagation through all of the test text without a cut
    target    its bootstrapped targets, in training since the last test
"""

import argparse
import contextlib
import functools
import math
import statistics
import time
from pathlib import Path

import study
import torch
import train
from torch import nn

from data import recall
from dni import Agreement, Interface, LayerDNI, NeuronDNI
from harness.machine import keep_freed_memory
from qrnn import QRNN

T, B, NEURONS, SYMBOLS, FILLERS = 10, 32, 64, 4, 8
QUERY, IGNORED = SYMBOLS + FILLERS, -100                           # a token, and a target that is not counted
SETTINGS = train.Settings(embedding_size=NEURONS, hidden_size=NEURONS, num_layers=1, l2=0.0, clip=1.0,
                          batch_size=B, bptt=T, lr=3e-3)
UPDATES, ALPHA, RATES, SEARCH_SEEDS = 2400, 0.9, (1e-2, 1e-3, 1e-4, 1e-5), (100, 101)


class Reader(nn.Module):
    """Embedding -> one QRNN layer -> decoder, called as a LanguageModel is."""

    def __init__(self, vocabulary, embedding=NEURONS, hidden=NEURONS, forget=2.0):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(vocabulary, embedding), QRNN(embedding, hidden)
        self.decoder = nn.Linear(hidden, vocabulary)
        with torch.no_grad():
            self.rnn.layers[0].bias[hidden:2 * hidden] += forget        # forget gates

    def forward(self, tokens, state=None):
        h, state = self.rnn(self.embedding(tokens), state)
        return self.decoder(h), state

    def nll(self, h, targets):
        return mean_nll(self.decoder(h), targets)

    def loss(self, tokens, targets, state=None, *_):
        """The nll of the last len(targets) tokens, after all that come before them."""
        h, state = self.rnn(self.embedding(tokens), state)
        return self.nll(h[-len(targets):], targets), 0.0, state


def mean_nll(logits, targets):
    """The loss summed over what is counted and divided by T B, all positions: the units of dni.py."""
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                                        reduction="sum")
    return total / targets.numel()


# ------------------------------------------------------------------------------------------------ kinds of g

class Named(NeuronDNI):
    neurons = NEURONS

    def __init__(self):
        super().__init__()
        self.names = nn.Parameter(torch.randn(self.neurons, 50) / 50 ** 0.5)

    def step(self, c, memory, masks=None):
        x = self.encode(c).view(-1, *self.names.shape) + self.names     # (B, neurons, 50)
        h, memory = self.rnn(x.view(1, -1, self.names.shape[1]), memory, masks)
        return self.decode(h[0]).flatten(), memory


# arm: (g, K: the borders through which it is taught)
ARMS = {"bptt": None, "full": None, "linear": (lambda: LayerDNI([NEURONS], 0), 1),
        "layer": (lambda: LayerDNI([NEURONS]), 1), "neuron": (NeuronDNI, 1), "neuron4": (NeuronDNI, 4),
        "named": (Named, 1)}


# --------------------------------------------------------------------------------------------------- one case

def full_update(model, optimizer, recent, clip, mixed=contextlib.nullcontext()):
    """An update from the loss of the last of `recent` chunks [(inputs, targets, state before)], through all.

    Returns the state after it. The chunks before the last are read again, with the weights of today.
    """
    optimizer.zero_grad(set_to_none=True)
    with mixed:
        nll, _, state = model.loss(torch.cat([x for x, _, _ in recent]), recent[-1][1], recent[0][2])
    nll.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return train.cut(state)


def full_steps(model, optimizer, inputs, targets, borders):
    """A `full_update` for each chunk of (L, B) streams and the `borders` chunks before. Yields after it."""
    recent, state = [], None
    for x, y in zip(inputs.split(T), targets.split(T)):
        recent = [*recent, (x, y, state)][-borders - 1:]
        state = full_update(model, optimizer, recent, SETTINGS.clip)
        yield


def episodes(borders, seed, streams, steps, answers=False):
    """Inputs and targets, (steps, streams) each, with that many borders between symbol and query.

    Each stream begins one step later in its episode than the one before it: all phases side by side.
    answers: all other targets are not counted.
    """
    period = borders * T + 2
    length = steps + (1 - steps) % period                               # 1 more than whole episodes
    text = recall(period - 3, SYMBOLS, FILLERS, streams * length // period + 10, seed).train
    inputs, targets = (text[i:i + streams * length].view(streams, length).t()[:steps] for i in (0, 1))
    return inputs, targets.masked_fill(inputs != QUERY, IGNORED) if answers else targets


@torch.no_grad()
def test(model, inputs, targets):
    """(accuracy of the answers, perplexity of what is counted) on (L, B) streams.

    The first quarter is for warming up.
    """
    log_p = model(inputs)[0].log_softmax(-1)[len(inputs) // 4:]
    inputs, targets = inputs[len(inputs) // 4:], targets[len(inputs) // 4:]
    accuracy = (log_p.argmax(-1) == targets)[inputs == QUERY].double().mean()
    counted = targets != IGNORED
    nll = -log_p[counted].gather(-1, targets[counted][:, None]).mean()
    return accuracy.item(), math.exp(nll)


def future_gradients(model, inputs, targets, T=T):
    """[(c, gradient)] of the borders of a text in chunks of T, each a list of (B, H).

    The gradient is that of all loss to come.
    """
    state, loss, borders = None, 0.0, []
    for start in range(0, len(inputs), T):
        x, y = inputs[start:start + T], targets[start:start + T]
        if state:
            borders.append(train.cells(state))
            for c in borders[-1]:
                c.retain_grad()
        nll, _, state = model.loss(x, y, state)
        loss = loss + nll * x.numel()                                   # summed, each stream its own
    loss.backward()
    return [([c.detach() for c in border], [c.grad for c in border]) for border in borders]


def truth(model, g, inputs, targets):
    """Agreement of g's predictions with the gradient of all loss to come.

    It is that of the borders in the middle half of the text.
    """
    borders, memory, agreement = future_gradients(model, inputs, targets), None, Agreement()
    for k, (c, gradient) in enumerate(borders):
        with torch.no_grad():
            predicted, memory = g(c, memory)
        if len(borders) // 4 <= k < len(borders) * 3 // 4:
            agreement.update(predicted, gradient)
    return agreement.result()


def one(case, updates=UPDATES):
    """A row for each of twelve tests."""
    keep_freed_memory()
    arm, borders, seed, answers = case["arm"], case["borders"], case["seed"], case["counts"] == "answers"
    pairs = 2 * (borders * T + 2)
    inputs, targets = episodes(borders, seed, pairs if answers else B, updates * T, answers)
    test_text = episodes(borders, seed + 1000, 2 * pairs, 24 * T, answers)               # each phase 4 times
    language = recall(borders * T - 1, SYMBOLS, FILLERS, 10)
    floor = 1.0 if answers else round(language.facts["perplexity floor"], 4)
    torch.manual_seed(seed)
    dni = None
    if ARMS[arm]:
        g, K = ARMS[arm]
        g = g()
        dni = Interface(g, torch.optim.Adam(g.parameters(), case["rate"]), ALPHA, K)
    torch.manual_seed(seed)
    model = Reader(QUERY + 1)
    optimizer = torch.optim.Adam(model.parameters(), SETTINGS.lr)
    full = full_steps(model, optimizer, inputs, targets, borders)
    rows, state, started = [], None, time.monotonic()
    for k in range(updates):
        if arm == "full":
            next(full)
        else:
            chunk = inputs[k * T:(k + 1) * T], targets[k * T:(k + 1) * T]
            _, state = train.train_step(model, optimizer, dni, *chunk, state, bool(dni), SETTINGS)
        if (k + 1) % (updates // 12) == 0:
            accuracy, perplexity = test(model, *test_text)
            agreed = [math.nan] * 4
            if dni:
                agreed = [*truth(model, dni.g, *test_text), *dni.agreement.result()]
                dni.agreement.reset()
            measures = zip(("true_cosine", "true_r2", "target_cosine", "target_r2"), agreed)
            rows.append({**case, "updates": k + 1, "accuracy": round(accuracy, 4),
                         "perplexity": round(perplexity, 4), "floor": floor,
                         **{name: round(a, 4) for name, a in measures},
                         "seconds": round(time.monotonic() - started, 1)})
    return rows


def best_rate(rows, counts, arm, borders):
    """The rate with the best accuracy at the end, a mean over the seeds of the search; "" without a g."""
    found = {}
    for row in rows:
        case = row["counts"], row["arm"], row["borders"], row["updates"]
        if case == (counts, arm, str(borders), str(UPDATES)) and int(row["seed"]) in SEARCH_SEEDS:
            found.setdefault(row["rate"], []).append(float(row["accuracy"]))
    return float(max(found, key=lambda rate: statistics.mean(found[rate]))) if found else ""


def main():
    parser = argparse.ArgumentParser(
        description="Is credit carried across the border of truncated backpropagation?")
    parser.add_argument("--counts", nargs="+", choices=("all", "answers"), default=("all", "answers"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of g; one: no search")
    parser.add_argument("--updates", type=int, default=UPDATES, help="a multiple of 12 [%(default)s]")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time [%(default)s]")
    parser.add_argument("--log", type=Path, default=study.LOGS / "recall.csv")
    a = parser.parse_args()

    def run(cases):
        study.run(a.log, functools.partial(one, updates=a.updates), cases, a.jobs, updates=a.updates,
                  alpha=ALPHA,
                  model=f"QRNN of {NEURONS}, T = {T}, {SYMBOLS} symbols, {FILLERS} fillers, Adam "
                        f"{SETTINGS.lr}")

    def rate(*case):
        return a.rates[0] if len(a.rates) == 1 and ARMS[case[1]] else best_rate(study.read(a.log), *case)
    if len(a.rates) > 1:
        run([dict(counts=counts, arm=arm, rate=r, borders=b, seed=seed) for seed in SEARCH_SEEDS
             for b in a.borders for counts in a.counts for arm in a.arms if ARMS[arm] for r in a.rates
             if arm != "neuron4" or b == 2])
    run([dict(counts=counts, arm=arm, rate=rate(counts, arm, b), borders=b, seed=seed)
         for seed in range(a.seeds) for b in a.borders for counts in a.counts for arm in a.arms
         if arm != "neuron4" or b == 2])


if __name__ == "__main__":
    main()
