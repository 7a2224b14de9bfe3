"""Does a synthetic gradient help on text? Which kind of g, at which chunk length T, at which rate of g?

    python experiments/text.py --study rates     each g at five rates, T of 2 and 5, one seed: 0
    python experiments/text.py --study T         each g at its best rate, T of 2, 5, 10 and 20, other seeds
    python experiments/text.py --study alpha     the discount α, T of 2 and 5
    python experiments/text.py --study memory    the paper's g taught through K = 4 borders of its memory
    python experiments/text.py --study words     words, T of 5, 20 and 70
    python experiments/text.py --study taught    how much of the true gradient each g can know, T = 2

Characters of Penn Treebank, and in `words` its words. The model is an embedding of 64, one QRNN layer of 256
and a decoder; B = 32, Adam at 2e-3, clip 1. All arms of a T make the same number of updates and read
the same characters. Words are read once, with products in bf16 where the processor has it. Arms:

    bptt      truncated backpropagation through time
    full      the loss of a chunk goes back through the 40 steps before its end, or through the chunk before
              it if that is longer: the ceiling
    twice     the same through the chunk before alone: the simplest alternative to a g
    linear    layer-wise, one linear map 256 -> 256
    mlp       layer-wise, 256 -> 256 -> 256 -> 256
    neuron    the paper's: neuron-wise, scalar in and out, memory h_g
    neuron4   the same, taught through 4 borders (--dni-borders 4 of train.py)
    line      a line for each neuron: a_i c_i + b_i

Measured are bits per token of the validation text (of the first 200,000 characters), and for a g cosine and
R² with its targets in the last fifth of the updates.

`taught`: in training g learns from its own predictions, about a model that changes. Here it has neither
trouble. A model is trained by truncated BPTT for 10,000 updates, and its weights are frozen. Then each g is
taught the true gradients of the states that the model passes through. R² is that of predictions made before
learning from them, over the last fifth of the texts so far.
"""

import argparse
import math
import time

import study
import torch
import train
from torch import nn

import data
from dni import Agreement, Interface, LayerDNI, NeuronDNI, regress

EMBEDDING, HIDDEN, B, REACH, CLIP = 64, 256, 32, 40, 1.0
UPDATES = {2: 10_000, 5: 8_000, 10: 5_000, 20: 2_500}                  # on characters, by T
WORDS = (5, 20, 70)                                                     # T on words
WITHOUT_G, WITH_G = ("bptt", "full", "twice"), ("linear", "mlp", "line", "neuron", "neuron4")
TAUGHT = (30, 100, 300)                                                 # after how many texts g is measured


class Line(nn.Module):
    """g(c_i) = a_i c_i + b_i, with an a and a b for each neuron."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, s, memory=None):
        return [self.a * c + self.b for c in s], None


def interface(arm, rate, alpha=1.0):
    """The Interface of an arm, with a new g; None for the arms without one."""
    if arm in WITHOUT_G:
        return None
    if arm in ("neuron", "neuron4"):
        g = NeuronDNI()
    else:
        g = Line() if arm == "line" else LayerDNI([HIDDEN], HIDDEN if arm == "mlp" else 0)
    optimizer = torch.optim.Adam(g.parameters(), rate, fused=True)
    return Interface(g, optimizer, alpha, borders=4 if arm == "neuron4" else 1)


def one(case, name="ptb-chars", parts=10):
    """Train. Returns a row for each of `parts` parts of the updates."""
    train.keep_freed_memory()
    arm, T, corpus = case["arm"], case["T"], data.load_corpus(name)
    inputs, targets = data.streams(corpus.train, B)
    _, autocast = train.pick_device("cpu", "auto" if name == "ptb" else "fp32")
    updates = UPDATES[T] if name == "ptb-chars" else len(inputs) // T // parts * parts
    torch.manual_seed(case["seed"])
    model = study.Reader(len(corpus.vocabulary), EMBEDDING, HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    dni = interface(arm, case["rate"], case["alpha"])
    reach = max(REACH // T, 2) if arm == "full" else 2                  # in chunks
    state, recent, rows, began = None, [], [], time.monotonic()
    for n in range(1, updates + 1):
        start = (n - 1) * T % (len(inputs) - T)
        x, y = inputs[start:start + T], targets[start:start + T]
        if arm in ("full", "twice"):
            recent = [*recent, (x, y, state)][-reach:]
            state = study.full_update(model, optimizer, recent, CLIP, autocast)
        else:
            _, state = train.train_step(model, optimizer, dni, x, y, state, dni is not None, CLIP, autocast)
        if n % (updates // parts) == 0:
            bits = train.evaluate(model, corpus.valid[:200_001], B, autocast) / math.log(2)
            cosine, r2 = dni.agreement.result() if dni else (math.nan, math.nan)
            rows.append({**case, "updates": n, "bits": round(bits, 4), "cosine": round(cosine, 4),
                         "r2": round(r2, 5), "seconds": round(time.monotonic() - began, 1)})
            if dni and n <= updates * 8 // 10:
                dni.agreement.reset()
    return rows


def one_word(case):
    return one(case, "ptb", 5)


def one_taught(case, T=2, chunks=80):
    """Teach g the true gradients of a frozen model. Returns a row for each number of texts in TAUGHT.

    A text has 80 chunks. g learns at the borders of its first three quarters, and so from the gradients of 40
    characters to come or more, in units of their root mean square. Its predictions count from the end of the
    first quarter on.
    """
    corpus, seed = data.load_corpus("ptb-chars"), case["seed"]
    inputs, targets = data.streams(corpus.train, B)
    torch.manual_seed(seed)
    model, state, read = study.Reader(len(corpus.vocabulary), EMBEDDING, HIDDEN), None, UPDATES[T] * T
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    for x, y in zip(inputs[:read].split(T), targets[:read].split(T)):
        _, state = train.train_step(model, optimizer, None, x, y, state, False, CLIP)
    dni, rows, agreement, unit, learned = interface(case["arm"], case["rate"]), [], Agreement(), None, 0
    texts = zip(inputs[read:].split(T * chunks), targets[read:].split(T * chunks))
    for n, (x, y) in zip(range(1, TAUGHT[-1] + 1), texts):
        borders = study.future_gradients(model, x, y, T)
        unit = unit or torch.cat([gradient for _, (gradient,) in borders]).square().mean().sqrt()
        dni.reset()
        for i, (s, gradient) in enumerate(borders[:len(borders) * 3 // 4]):
            predicted, target = dni.predict(s), [d / unit for d in gradient]
            if i >= len(borders) // 4:
                agreement.update(predicted, target)
            regress(dni.optimizer, predicted, target)
        learned += len(borders) * 3 // 4 * B                            # a border counts once for each stream
        if n in [count * 4 // 5 for count in TAUGHT]:                   # the last fifth is kept
            agreement.reset()
        if n in TAUGHT:
            cosine, r2 = agreement.result()
            rows.append({**case, "borders": learned, "cosine": round(cosine, 4), "r2": round(r2, 5)})
    return rows


def best_rates(rows):
    """{arm: the rate with the fewest bits at the end, at T = 2 and 5 together}; α = 1, seed 0."""
    found, best = {}, {}
    for row in rows:
        ended = int(row["updates"]) == UPDATES[int(row["T"])]
        searched = row["T"] in ("2", "5") and row["rate"]
        if ended and searched and (row["alpha"], row["seed"]) == ("1.0", "0"):
            found.setdefault((row["arm"], row["rate"]), []).append(float(row["bits"]))
    for bits, arm, rate in sorted((sum(its), *key) for key, its in found.items() if len(its) == 2):
        best.setdefault(arm, float(rate))
    return best


def cases(which, arms, best):
    """The cases of a study. best: {arm: rate}. A column that means nothing to an arm is empty."""
    def case(arm, T, seed, rate="", alpha=1.0):
        alpha, rate = ("", "") if arm in WITHOUT_G else (alpha, rate or best[arm])
        return dict(arm=arm, T=T, alpha=alpha, rate=rate, seed=seed)
    kept = [arm for arm in arms if arm in WITHOUT_G or arm in best]
    if which == "rates":
        return ([case(arm, T, 0) for T in (2, 5) for arm in arms if arm in ("bptt", "full")]
                + [case(arm, T, 0, rate) for T in (2, 5) for rate in (1e-4, 1e-3, 1e-5, 1e-2, 1e-6)
                   for arm in arms if arm in WITH_G and arm != "neuron4"])
    if which == "T":
        return [case(arm, T, seed) for seed in range(1, 6) for T in UPDATES for arm in kept
                if arm != "neuron" or seed <= 3]
    if which == "alpha":
        return [case(arm, T, seed, alpha=alpha) for seed in (1, 2) for alpha in (0.1, 0.9) for T in (2, 5)
                for arm in kept if arm in ("linear", "mlp")]
    if which == "memory":
        return [case("neuron4", 2, 0, rate) for rate in (1e-3, 1e-4)]
    if which == "words":
        return [case(arm, T, seed) for seed in (1, 2, 3) for T in WORDS for arm in kept
                if arm != "line" and (arm != "twice" or T == 5)]
    return [dict(arm=arm, rate=rate, seed=0) for rate in (1e-3, 1e-4, 1e-5) for arm in arms
            if arm in WITH_G and arm != "neuron4"]


def main():
    parser = argparse.ArgumentParser(description="Which synthetic gradient helps on text, at what rate?")
    parser.add_argument("--study", default="rates",
                        choices=("rates", "T", "alpha", "memory", "words", "taught"))
    parser.add_argument("--arms", nargs="+", choices=WITHOUT_G + WITH_G, default=WITHOUT_G + WITH_G)
    a = parser.parse_args()
    todo = cases(a.study, a.arms, best_rates(study.read(study.LOGS / "text.csv")))
    log, function = {"words": ("text-words", one_word),
                     "taught": ("taught-ptb-chars", one_taught)}.get(a.study, ("text", one))
    study.run(study.LOGS / f"{log}.csv", function, todo)


if __name__ == "__main__":
    main()
