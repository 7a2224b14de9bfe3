"""Does a synthetic gradient help on text? Which kind of g, at which chunk length T, at which learning rate of
g?

    python experiments/text.py --study rates     each g at five rates, T of 2 and 5, one seed: 0
    python experiments/text.py --study T         each g at its best rate, T of 2, 5, 10 and 20, other seeds
    python experiments/text.py --study alpha     the discount α of three kinds of g, T of 2 and 5
    python experiments/text.py --study memory    g taught through K borders of its own time, in two ways
    python experiments/text.py --study words     words, T of 5, 20 and 70

Characters of Penn Treebank, and in `words` its words. The model is an embedding of 64, one QRNN layer of 256
and a decoder, B = 32, Adam at 2e-3, clip 1. All arms of a T make the same number of updates, UPDATES, and
read the same characters; on words they read the text once, with products in bf16 where the processor has it.

    bptt      truncated backpropagation through time
    full      the loss of a chunk is backpropagated through the 40 steps before its end, or the chunk before
              it if that is longer: the ceiling
    twice     the same through the chunk before alone, the simplest alternative to a g
    linear    layer-wise, one linear map 256 -> 256
    mlp       layer-wise, 256 -> 256 -> 256 -> 256
    neuron    the paper's: neuron-wise, scalar in and out, memory h_g
    neuron4   the same, taught through 4 borders of its own time (dni_bptt), at 4 times the cost of g
    every4    the same, taught through 4 borders, in one update every 4 borders
    named     neuron-wise, with a learnt vector of 50 numbers for each neuron
    line      each neuron has its own line, a_i c_i + b_i
    constant  each neuron has its own constant, b_i

The measure is bits per token on the validation text (of the characters the first 200,000), and for a g cosine
and R^2 with its targets in the last fifth of the updates. Resumable: a case that is in the log is not run
again.
"""

import argparse
import functools
import math
import time

import recall
import study
import torch
import train
from torch import nn

import data
from dni import Interface, LayerDNI, NeuronDNI, joined
from harness import machine
from qrnn import decoder_loss

EMBEDDING, HIDDEN, B, REACH = 64, 256, 32, 40
UPDATES = {2: 10_000, 5: 8_000, 10: 5_000, 20: 2_500}                  # on characters
WORDS = (5, 20, 70)                                                     # T on words


class Reader(recall.Reader):
    def __init__(self, vocabulary):
        super().__init__(vocabulary, EMBEDDING, HIDDEN, forget=0.0)

    def nll(self, h, targets):
        return decoder_loss(h.flatten(0, 1), self.decoder.weight, self.decoder.bias, targets.flatten())


# ------------------------------------------------------------------------------------------------ kinds of g

class Line(nn.Module):
    """a_i c_i + b_i for neuron i; b_i alone without a slope."""

    def __init__(self, slope=True):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(HIDDEN)) if slope else 0.0
        self.b = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, s, memory=None):
        return [self.a * c + self.b for c in s], None


class Named(recall.Named):
    """g also gets a learnt vector of 50 numbers for the neuron it looks at."""
    neurons = HIDDEN


class Every(Interface):
    """g taught through `bptt` borders in one update every `bptt` borders, on the errors of all of them."""

    def reset(self):
        super().reset()
        self.errors = []

    def predict(self, s):
        predicted, self.memory = self.g([c.detach() for c in s], self.memory)
        return predicted

    def learn(self):
        predicted, s, tokens = self.pending
        self.pending = None
        if predicted:
            target = [tokens * c.grad for c in s]
            self.agreement.update(predicted, target)
            self.errors.append(nn.functional.mse_loss(joined(predicted), joined(target)))
        if len(self.errors) == self.borders:
            self.optimizer.zero_grad(set_to_none=True)
            (sum(self.errors) / len(self.errors)).backward()
            self.optimizer.step()
            self.memory, self.errors = tuple(m.detach() for m in self.memory), []


# arm: (g, its interface, K)
ARMS = {"bptt": None, "full": None, "twice": None,
        "linear": (lambda: LayerDNI([HIDDEN], 0), Interface, 1),
        "mlp": (lambda: LayerDNI([HIDDEN], HIDDEN), Interface, 1),
        "neuron": (NeuronDNI, Interface, 1), "neuron4": (NeuronDNI, Interface, 4),
        "every4": (NeuronDNI, Every, 4), "named": (Named, Interface, 1), "line": (Line, Interface, 1),
        "constant": (lambda: Line(slope=False), Interface, 1)}


# ------------------------------------------------------------------------------------------------- one case

def one(case, every=10, name="ptb-chars"):
    """A row for each tenth of the updates, or for as many parts as `every` says."""
    machine.keep_freed_memory()
    arm, T, corpus = case["arm"], case["T"], data.load_corpus(name)
    inputs, targets = data.streams(corpus.train, B)
    mixed = machine.pick_autocast("auto" if name == "ptb" else "fp32", "cpu")
    updates = UPDATES[T] if name == "ptb-chars" else len(inputs) // T // every * every
    s = train.Settings(clip=1.0, bptt=T, batch_size=B)
    torch.manual_seed(case["seed"])
    model = Reader(len(corpus.vocabulary))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    dni, state, recent, rows, started = None, None, [], [], time.monotonic()
    reach = {"full": max(REACH // T, 2), "twice": 2}                    # in chunks
    if ARMS[arm]:
        g, kind, K = ARMS[arm]
        g = g()
        dni = kind(g, torch.optim.Adam(g.parameters(), case["rate"], fused=True), case["alpha"], K)
    for k in range(updates):
        start = k * T % (len(inputs) - T)
        x, y = inputs[start:start + T], targets[start:start + T]
        if arm in reach:
            recent = [*recent, (x, y, state)][-reach[arm]:]
            state = recall.full_update(model, optimizer, recent, s.clip, mixed)
        else:
            _, state = train.train_step(model, optimizer, dni, x, y, state, dni is not None, s, mixed)
        if (k + 1) % (updates // every) == 0:
            bits = train.evaluate(model, corpus.valid[:200_001], B, mixed) / math.log(2)
            cosine, r2 = dni.agreement.result() if dni else (math.nan, math.nan)
            rows.append({**case, "updates": k + 1, "bits": round(bits, 4), "cosine": round(cosine, 4),
                         "r2": round(r2, 5), "seconds": round(time.monotonic() - started, 1)})
            if dni and k + 1 <= updates * 8 // 10:                      # the last fifth is kept
                dni.agreement.reset()
    return rows


def cases(which, chosen):
    """The cases of a study: {arm, T, alpha, rate, seed}, "" where an arm has none. chosen: {arm: rate}."""
    def case(arm, T, seed, rate="", alpha=1.0):
        plain = ARMS[arm] is None
        return dict(arm=arm, T=T, alpha="" if plain else alpha, rate="" if plain else rate, seed=seed)

    def at_best(arms, lengths, seeds, alpha=1.0):
        return [case(arm, T, seed, chosen.get(arm, ""), alpha) for seed in range(1, seeds + 1)
                for T in lengths for arm in arms if arm in chosen or not ARMS[arm]]
    if which == "rates":
        baselines = [case(arm, T, 0) for T in (2, 5) for arm in ("bptt", "full")]
        quick, slow = ("linear", "mlp", "line", "constant"), ("neuron", "named")
        return baselines + [case(arm, T, 0, rate) for arms in (quick, slow) for T in (2, 5)
                            for rate in (1e-4, 1e-3, 1e-5, 1e-2, 1e-6) for arm in arms]
    if which == "T":
        quick = ("bptt", "full", "twice", "linear", "mlp", "line", "constant")
        return at_best(quick, UPDATES, 5) + at_best(("neuron", "named"), UPDATES, 3)
    if which == "alpha":
        return [c for alpha in (0.1, 0.9) for c in at_best(("linear", "mlp", "neuron"), (2, 5), 2, alpha)]
    if which == "memory":
        return [case(arm, 2, 0, rate) for rate in (1e-3, 1e-4) for arm in ("neuron4", "every4")]
    return at_best(("bptt", "full", "linear", "mlp", "neuron"), WORDS, 3) + at_best(("twice",), (5,), 3)


def best_rates(rows):
    """{arm: the rate with the fewest bits at the end, at T = 2 and 5 together}; alpha 1, seed 0."""
    last = {}
    for row in rows:
        ended = int(row["updates"]) == UPDATES[int(row["T"])]
        searched = row["T"] in ("2", "5") and row["rate"] and (row["alpha"], row["seed"]) == ("1.0", "0")
        if ended and searched:
            last.setdefault((row["arm"], row["rate"]), []).append(float(row["bits"]))
    whole = {key: sum(bits) for key, bits in last.items() if len(bits) == 2}
    return {arm: float(min((bits, rate) for (a, rate), bits in whole.items() if a == arm)[1])
            for arm in {arm for arm, _ in whole}}


def main():
    parser = argparse.ArgumentParser(description="Which synthetic gradient helps on text, at what rate?")
    parser.add_argument("--study", choices=("rates", "T", "alpha", "memory", "words"), default="rates")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="of them; all")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time [%(default)s]")
    a = parser.parse_args()
    log = study.LOGS / "text.csv"
    chosen = best_rates(study.read(log))
    if a.study not in ("rates", "memory") and not chosen:
        parser.error("run --study rates first")
    todo = [case for case in cases(a.study, chosen) if case["arm"] in a.arms]
    model = f"QRNN of {HIDDEN}, embedding {EMBEDDING}, B = {B}, Adam 0.002, clip 1"
    if a.study == "words":
        study.run(study.LOGS / "text-words.csv", functools.partial(one, every=5, name="ptb"), todo, a.jobs,
                  model=model)
    else:
        study.run(log, one, todo, a.jobs, model=model, updates=str(UPDATES))


if __name__ == "__main__":
    main()
