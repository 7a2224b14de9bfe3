"""Is credit carried across a border? The language `recall`, its delay longer than a chunk.

    python experiments/recall.py                             everything, two hours on two cores; resumable
    python experiments/recall.py --seeds 1 --arms bptt full  a first look
    python experiments/recall.py --study pairs               streams in pairs, at the same place of an episode
    python experiments/recall.py --study answers             the same, and the answers alone count

An episode shows one of K symbols, then D fillers, a query, and the symbol again (data.py). With D = b T - 1
the query comes exactly b chunks of T steps after the symbol, whatever the phase. So b borders lie between
them, and truncation cuts every link. The B streams are cut so that all phases occur in each chunk. Arms, at
equal updates and equal tokens:

    bptt      truncated: no gradient crosses a border
    cut       the same, on a text that ends every 20 chunks, and the state with it: to compare `terminal` with
    full      the last chunk's loss, backpropagated through it and the b chunks before it, to the symbol
    neuron    the neuron-wise DNI (paper, 2.2)
    layer     the layer-wise DNI (DNI, 2.1): sees a whole layer at once, and knows which neuron is which

Changes to the neuron-wise one, one at a time, over one and two borders (alpha below 1 makes a decayed
bootstrap of it):

    window    g sees this border's scalar and the last one's
    scaled    g predicts in units of the targets' root mean square
    amnesic   g forgets: h_g is zero at every border
    memory    g's errors are backpropagated through h_g over 4 borders
    terminal  the text ends every 20 chunks, with state and h_g: what is injected there is known to be zero
    line      g(c) = w c, with w the only parameter: all it can say is "away from zero" or "towards it"
    shuffled  what g predicts for one stream is injected into another: gradients of the right size that know
              nothing (the agreement with the truth is that of what is injected)
    named     g gets a learnt vector of 50 numbers for each neuron, too: it knows which neuron is which
    swapped   (streams in pairs) what g predicts for a stream is injected into the other one at the same place
              of its episode: gradients that know this place, and not which symbol it has

Two more studies take that apart. A text asks two things, which symbol it was and when the query comes, and
the gradients of both cross a border. In `pairs` B is twice the length of an episode. So each place of an
episode is in two streams, and `swapped` is possible. (The number of answers in an update is then the same
over any number of borders.) In `answers`, moreover, the symbol is all that is asked for. What follows any
word but a query is not counted: not in training, not in the true gradient, and not in the perplexity, whose
floor is then 1.

An update is `train_step` of train.py (for `full`, `full_step` below), without dropout, on a text that never
repeats. The model, one QRNN layer of 64, starts with forget gates of about sigmoid(2), so that a state
outlives a border. Every so often it is tested on a text of its own: accuracy of the answer (chance 1 / K),
perplexity (the floor is known), and for a DNI cosine and R^2 of its predictions with

    true      the gradient of all loss to come, by backpropagation through all of the test text without a cut
    own       the same with a factor alpha at each border: the best that its bootstrapped targets can come to
    target    those targets, in training since the last test
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import study
import torch
import train
from torch import nn

from data import recall
from dni import Agreement, Interface, NeuronDNI
from harness.machine import keep_freed_memory
from qrnn import QRNN

T, B, NEURONS, SYMBOLS, FILLERS = 10, 32, 64, 4, 8
QUERY, IGNORED = SYMBOLS + FILLERS, -100                           # a token, and a target that is not counted
SETTINGS = train.Settings(embedding_size=NEURONS, hidden_size=NEURONS, num_layers=1, l2=0.0, clip=1.0,
                          batch_size=B, bptt=T, lr=3e-3)


class Reader(nn.Module):
    """Embedding -> one QRNN layer -> decoder, called as a LanguageModel is."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(vocabulary, NEURONS), QRNN(NEURONS, NEURONS)
        self.decoder = nn.Linear(NEURONS, vocabulary)
        with torch.no_grad():
            self.rnn.layers[0].bias[NEURONS:2 * NEURONS] += 2.0         # forget gates

    def forward(self, tokens, state=None):
        h, state = self.rnn(self.embedding(tokens), state)
        return self.decoder(h), state

    def loss(self, tokens, targets, state=None, *_):
        logits, state = self(tokens, state)
        return mean_nll(logits, targets), 0.0, state


def mean_nll(logits, targets):
    """The loss summed over what is counted and divided by T B, all positions: the units of dni.py."""
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                                        reduction="sum")
    return total / targets.numel()


# --------------------------------------------------------------------------------- changes to the network g

class Scaled(NeuronDNI):
    scale = 1.0                                                         # set by `one`

    def forward(self, s, memory=None):
        predicted, memory = super().forward(s, memory)
        return [self.scale * d for d in predicted], memory


class Amnesic(NeuronDNI):
    def forward(self, s, memory=None):
        return super().forward(s)


class Line(nn.Module):
    def __init__(self, _):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, s, memory=None):
        return [self.w * c for c in s], memory


class Named(NeuronDNI):
    neurons = NEURONS

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.names = nn.Parameter(torch.randn(self.neurons, 50) / 50 ** 0.5)

    def step(self, c, memory, masks=None):
        x = self.encode(c).view(-1, *self.names.shape) + self.names     # (B, neurons, 50)
        h, memory = self.rnn(x.view(1, -1, self.names.shape[1]), memory, masks)
        return self.decode(h[0]).flatten(), memory


# ------------------------------------------------------------------------------- changes to what is made of g

class Memory(Interface):
    """A prediction is made anew from the states of the last borders, with the graph of h_g over them."""
    borders = 4

    def reset(self):
        super().reset()
        self.past = []                                                  # [(s, h_g before it)]

    def predict(self, s):
        self.past = [*self.past, ([c.detach() for c in s], self.memory)][-self.borders:]
        memory = self.past[0][1]
        for earlier, _ in self.past:
            predicted, memory = self.g(earlier, memory)
        self.memory = tuple(m.detach() for m in memory)
        return predicted


class Terminal(Interface):
    ends = False                                             # does the text end with this chunk? set by `one`

    def synthesize(self, s_next):
        return [torch.zeros_like(c) for c in s_next] if self.ends else super().synthesize(s_next)


class Shuffled(Interface):
    """Not what is learned from, but what is injected goes to another stream."""

    @torch.no_grad()
    def synthesize(self, s_next):
        return self.injected([c.detach() for c in s_next], self.memory)[0]

    def injected(self, s, memory):
        """Called as g is."""
        predicted, memory = self.g(s, memory)
        return [self.exchange(d) for d in predicted], memory            # (B, H) each

    def exchange(self, d):
        return d[torch.randperm(len(d))]


class Swapped(Shuffled):
    def exchange(self, d):
        return d.roll(len(d) // 2, 0)         # stream i of B = 2 episodes is at the place of stream i + B / 2


# arm: (settings, class of g, class of the interface); without a class, train.py's own
TRUNCATED, SYNTHETIC = dict(mode="bptt"), dict(mode="dni")
ARMS = {"bptt": (TRUNCATED, None, None),
        "cut": (TRUNCATED, None, None),
        "full": (TRUNCATED, None, None),
        "neuron": (SYNTHETIC, None, None),
        "layer": (dict(SYNTHETIC, dni="layer"), None, None),
        "window": (dict(SYNTHETIC, dni_window=2), None, None),
        "scaled": (SYNTHETIC, Scaled, Interface),
        "amnesic": (SYNTHETIC, Amnesic, Interface),
        "memory": (SYNTHETIC, NeuronDNI, Memory),
        "terminal": (SYNTHETIC, NeuronDNI, Terminal),
        "line": (SYNTHETIC, Line, Interface),
        "shuffled": (SYNTHETIC, NeuronDNI, Shuffled),
        "named": (SYNTHETIC, Named, Interface),
        "swapped": (SYNTHETIC, NeuronDNI, Swapped)}
# study: (arms, borders, alphas of neuron and layer)
STUDIES = {"recall": ([arm for arm in ARMS if arm != "swapped"], (1, 2, 3), (0.1, 0.9, 1.0)),
           "pairs": (["bptt", "neuron", "swapped"], (2,), (0.9,)),
           "answers": (["bptt", "full", "neuron", "layer"], (1, 2, 3), (0.9,))}


# --------------------------------------------------------------------------------------------------- one case

def full_step(model, optimizer, chunks, state):
    """An update from the loss of the last of `chunks`, backpropagated into the first. Returns the new state.

    chunks: [(inputs, targets)]; the first is entered with `state`.
    """
    logits, new_state = model(torch.cat([x for x, _ in chunks]), state)
    last = chunks[-1][1]
    optimizer.zero_grad(set_to_none=True)
    mean_nll(logits[-len(last):], last).backward()
    nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip)
    optimizer.step()
    return train.cut(new_state)


def full_steps(model, optimizer, inputs, targets, borders):
    """A `full_step` for each chunk of (L, B) streams and the `borders` chunks before it. Yields after it."""
    recent, state = [], None
    for chunk in zip(inputs.split(T), targets.split(T)):
        recent = [*recent, (chunk, state)][-borders - 1:]
        state = full_step(model, optimizer, [c for c, _ in recent], recent[0][1])
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


def future_gradients(model, inputs, targets, T=T, alpha=1.0):
    """[(c, gradient)] of the borders of a text in chunks of T, each a list of (B, H).

    The gradient is that of all loss to come, with a factor alpha a border.
    """
    state, loss, borders = None, 0.0, []
    for start in range(0, len(inputs), T):
        x, y = inputs[start:start + T], targets[start:start + T]
        if state:                                                       # the same value, alpha its gradient
            state = [(alpha * c + (1 - alpha) * c.detach(), x_prev) for c, x_prev in state]
            borders.append(train.cells(state))
            for c in borders[-1]:
                c.retain_grad()
        nll, _, state = model.loss(x, y, state)
        loss = loss + nll * x.numel()                                   # summed, each stream its own
    loss.backward()
    return [([c.detach() for c in border], [c.grad for c in border]) for border in borders]


def truth(model, g, inputs, targets, alpha=1.0):
    """Agreement of g's predictions with the gradient of all loss to come, alpha a border.

    It is that of the borders in the middle half of the text.
    """
    borders, memory, agreement = future_gradients(model, inputs, targets, alpha=alpha), None, Agreement()
    for k, (c, gradient) in enumerate(borders):
        with torch.no_grad():
            predicted, memory = g(c, memory)
        if len(borders) // 4 <= k < len(borders) * 3 // 4:
            agreement.update(predicted, gradient)
    return agreement.result()


MEASURES = ("true_cosine", "true_r2", "own_cosine", "own_r2", "target_cosine", "target_r2")


def one(case, updates, every, which):
    keep_freed_memory()
    arm, borders, seed = case["arm"], case["borders"], case["seed"]
    settings, kind, interface = ARMS[arm]
    s = dataclasses.replace(SETTINGS, seed=seed, dni_alpha=case["alpha"] or 0.0, **settings)
    answers, pairs = which == "answers", 2 * (borders * T + 2)
    inputs, targets = episodes(borders, seed, B if which == "recall" else pairs, updates * T, answers)
    test_text = episodes(borders, seed + 1000, 2 * pairs, 24 * T, answers)               # each phase 4 times
    language = recall(borders * T - 1, SYMBOLS, FILLERS, 10)
    floor = 1.0 if answers else round(language.facts["perplexity floor"], 4)
    dni = train.build(s, QUERY + 1, "cpu")[2]
    if kind:
        g = kind(s.dni_hidden)
        dni = interface(g, torch.optim.Adam(g.parameters(), s.dni_lr), s.dni_alpha)
    torch.manual_seed(seed)
    model = Reader(QUERY + 1)
    optimizer = torch.optim.Adam(model.parameters(), s.lr)
    full = full_steps(model, optimizer, inputs, targets, borders)
    rows, state, started, squares = [], None, time.monotonic(), 0.0
    for k in range(updates):
        chunk = inputs[k * T:(k + 1) * T], targets[k * T:(k + 1) * T]
        if arm == "full":
            next(full)
        else:
            ends = arm in ("terminal", "cut") and (k + 1) % 20 == 0
            if arm == "terminal":
                dni.ends = ends
            _, state = train.train_step(model, optimizer, dni, *chunk, state, bool(dni), s)
            if ends:
                state = None
                if dni:
                    dni.reset()
        if arm == "scaled" and k:                                       # of all targets so far
            dni.g.scale = ((squares + dni.agreement.sums[2]) / k).sqrt()
        if (k + 1) % every == 0:
            accuracy, perplexity = test(model, *test_text)
            agreed = [math.nan] * len(MEASURES)
            if dni:
                g = getattr(dni, "injected", dni.g)
                agreed = [*truth(model, g, *test_text), *truth(model, g, *test_text, s.dni_alpha),
                          *dni.agreement.result()]
                squares = squares + dni.agreement.sums[2]
                dni.agreement.reset()
            rows.append({**case, "updates": k + 1, "accuracy": round(accuracy, 4),
                         "perplexity": round(perplexity, 4), "floor": floor,
                         **{name: round(a, 4) for name, a in zip(MEASURES, agreed)},
                         "seconds": round(time.monotonic() - started, 1)})
    return rows


class One:
    """`one` with its options, to be sent to another process."""

    def __init__(self, **options):
        self.options = options

    def __call__(self, case):
        return one(case, **self.options)


def main():
    parser = argparse.ArgumentParser(
        description="Is credit carried across the border of truncated backpropagation?")
    parser.add_argument("--study", choices=STUDIES, default="recall",
                        help="decides what of the next three is not given [%(default)s]")
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--borders", nargs="+", type=int)
    parser.add_argument("--alphas", nargs="+", type=float, help="alpha of neuron and layer")
    parser.add_argument("--alpha", type=float, default=0.9, help="alpha of the changed ones [%(default)s]")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--every", type=int, default=200, help="updates between two tests [%(default)s]")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time [%(default)s]")
    parser.add_argument("--log", type=Path, help="default: in experiments/logs, recall.csv, "
                                                 "recall-pairs.csv or recall-answers.csv")
    a = parser.parse_args()
    plain, usual = a.study == "recall", STUDIES[a.study]
    arms, borders, alphas = (given or those for given, those in zip((a.arms, a.borders, a.alphas), usual))

    def alphas_of(arm):
        if arm in ("bptt", "cut", "full"):
            return ("",)
        return alphas if arm in ("neuron", "layer") else (a.alpha,)

    cases = [dict(arm=arm, alpha=alpha, borders=b, seed=seed)
             for seed in range(a.seeds) for b in borders for arm in arms
             if not plain or b <= 2 or arm in ("bptt", "full", "neuron", "layer")
             for alpha in alphas_of(arm)]
    log = a.log or study.LOGS / f"recall{'' if plain else '-' + a.study}.csv"
    model = (f"QRNN of {NEURONS}, T = {T}, B = {B if plain else '2 episodes'}, {SYMBOLS} symbols, "
             f"{FILLERS} fillers, Adam {SETTINGS.lr}")
    study.run(log, One(updates=a.updates, every=a.every, which=a.study), cases, a.jobs, updates=a.updates,
              model=model)


if __name__ == "__main__":
    main()
