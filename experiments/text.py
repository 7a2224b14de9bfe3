"""Does a synthetic gradient help on text? Which kind of g, at which chunk length T and rate of g?

    python experiments/text.py --study rates     each g at five rates, T of 2 and 5, seed 0
    python experiments/text.py --study T         each g at its best rate, T of 2 to 20, other seeds
    python experiments/text.py --study alpha     the discount α, T of 2 and 5
    python experiments/text.py --study memory    the paper's g, taught through 4 borders
    python experiments/text.py --study words     words, T of 5, 20 and 70
    python experiments/text.py --study longer    words, T = 70, read four times, without a g

The model is an embedding of 64, one QRNN layer of 256 and a decoder; B = 32, Adam at 2e-3, clip 1.
For one T, all arms make the same number of updates. Words are read once (in the last study four
times), with products in bf16 where the processor has it. The arms:

    bptt      truncated backpropagation through time
    full      the loss of a chunk goes back through the 40 steps before its end, or through two
              chunks where those are longer: the ceiling
    twice     the loss of a chunk goes back through two chunks: the simplest alternative to a g
    linear    layer-wise, one linear map 256 -> 256
    mlp       layer-wise, 256 -> 256 -> 256 -> 256
    neuron    the paper's: neuron-wise, scalar in and out, memory h_g
    neuron4   the same, taught through 4 borders

The measure is bits per token of the validation text. (Of its characters, only the first 200,000.)
"""

import argparse
import collections
import functools
import math
import time

import study

import torch

import data
import train
from dni import Interface, LayerDNI, NeuronDNI

EMBEDDING = 64
HIDDEN = 256
B = 32  # streams
CLIP = 1.0
REACH = 40  # steps that `full` goes back
UPDATES = {2: 10_000, 5: 8_000, 10: 5_000, 20: 2_500}  # on characters: {T: number of updates}
WORD_LENGTHS = (5, 20, 70)  # T on words
LONGER = 4  # epochs
RATES = (1e-4, 1e-3, 1e-5, 1e-2, 1e-6)  # of Adam for g
WITHOUT_G = ("bptt", "full", "twice")
WITH_G = ("linear", "mlp", "neuron")


# ------------------------------------------------------------------------------------- one training


def build(case, vocabulary_size):
    """(model, optimizer, the arm's Interface or None)"""
    torch.manual_seed(case["seed"])
    arm = case["arm"]
    model = study.Reader(vocabulary_size, EMBEDDING, HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    if arm in WITHOUT_G:
        return model, optimizer, None
    borders = 1
    if arm == "linear":
        g = LayerDNI([HIDDEN], 0)  # 0: no hidden layer
    elif arm == "mlp":
        g = LayerDNI([HIDDEN], HIDDEN)
    elif arm == "neuron":
        g = NeuronDNI()
    elif arm == "neuron4":
        g = NeuronDNI()
        borders = 4
    else:
        raise ValueError(f"no arm of text.py: {arm}")
    g_optimizer = torch.optim.Adam(g.parameters(), case["rate"], fused=True)
    return model, optimizer, Interface(g, g_optimizer, case["alpha"], borders)


def one(case, name="ptb-chars", parts=10, epochs=1):
    """Train one arm. Returns a row for each of `parts` parts of the training.

    case: {"arm", "T", "alpha", "rate", "seed"}; alpha and rate are g's.
    name: of the corpus.
    epochs: of words. Characters have the number of updates that UPDATES says.
    """
    train.keep_freed_memory()
    arm = case["arm"]
    T = case["T"]
    corpus = data.load_corpus(name)
    inputs, targets = data.streams(corpus.train, B)
    if name == "ptb-chars":
        updates = UPDATES[T]
    else:
        updates = epochs * (len(inputs) // T) // parts * parts
    precision = "auto" if name == "ptb" else "fp32"
    _, autocast = train.pick_device("cpu", precision)
    model, optimizer, dni = build(case, len(corpus.vocabulary))
    reach = 2  # chunks that `twice` and `full` go back through
    if arm == "full":
        reach = max(REACH // T, 2)
    recent = collections.deque(maxlen=reach)
    state = None
    rows = []
    began = time.monotonic()
    for n in range(1, updates + 1):
        start = (n - 1) * T % (len(inputs) - T)
        x = inputs[start : start + T]
        y = targets[start : start + T]
        if arm in ("full", "twice"):
            recent.append((x, y, state))
            state = study.full_update(model, optimizer, recent, CLIP, autocast)
        else:
            synthetic = dni is not None
            _, state = train.train_step(
                model, optimizer, dni, x, y, state, synthetic, CLIP, autocast
            )
        if n % (updates // parts) == 0:
            nats = train.evaluate(model, corpus.valid[:200_001], B, autocast)
            row = dict(
                updates=n,
                bits=round(nats / math.log(2), 4),
                seconds=round(time.monotonic() - began, 1),
            )
            rows.append({**case, **row})
    return rows


# ---------------------------------------------------------------------------------------- the cases


def is_of_the_search(row):
    """Whether a row is the last one of a training that `best_rates` compares."""
    if row["T"] not in ("2", "5") or row["rate"] == "":
        return False
    if row["alpha"] != "1.0" or row["seed"] != "0":
        return False
    return int(row["updates"]) == UPDATES[int(row["T"])]


def best_rates(rows):
    """{arm: the rate with the fewest bits at the end, a mean over T = 2 and T = 5}

    rows: of the log text.csv. Only those of the search count, `--study rates`: α = 1 and seed 0. An
        arm that was not tried at both T is left out.
    """
    searched = [row for row in rows if is_of_the_search(row)]
    best = {}
    for arm in sorted({row["arm"] for row in searched}):
        mine = [row for row in searched if row["arm"] == arm]
        rate = study.best_rate(mine, "bits", min, times=2)
        if rate:
            best[arm] = rate
    return best


def cases(which, best):
    """The cases of a study. best: {arm: rate}, of `best_rates`."""

    def case(arm, T, seed, rate=None, alpha=1.0):
        if arm in WITHOUT_G:  # columns of g
            alpha = ""
            rate = ""
        elif rate is None:
            rate = best[arm]
        return dict(arm=arm, T=T, alpha=alpha, rate=rate, seed=seed)

    if which == "rates":
        found = []
        for T in (2, 5):
            found += [case(arm, T, 0) for arm in ("bptt", "full")]
            found += [case(arm, T, 0, rate) for arm in WITH_G for rate in RATES]
        return found
    if which == "memory":
        return [case("neuron4", 2, 0, rate) for rate in (1e-3, 1e-4)]
    arms = [*WITHOUT_G, *(arm for arm in WITH_G if arm in best)]
    if which == "T":
        return [
            case(arm, T, seed)
            for seed in range(1, 6)
            for T in UPDATES
            for arm in arms
            if arm != "neuron" or seed <= 3
        ]
    if which == "alpha":
        return [
            case(arm, T, seed, alpha=alpha)
            for seed in (1, 2)
            for alpha in (0.1, 0.9)
            for T in (2, 5)
            for arm in arms
            if arm in ("linear", "mlp")
        ]
    if which == "longer":
        return [case(arm, 70, seed) for seed in (1, 2) for arm in ("twice", "bptt")]
    return [  # words
        case(arm, T, seed)
        for seed in (1, 2, 3)
        for T in WORD_LENGTHS
        for arm in arms
        if arm != "twice" or T == 5
    ]


def main():
    parser = argparse.ArgumentParser(
        description="Which synthetic gradient helps on text, at what rate?"
    )
    studies = ("rates", "T", "alpha", "memory", "words", "longer")
    parser.add_argument("--study", required=True, choices=studies)
    which = parser.parse_args().study
    best = best_rates(study.read_log(study.LOGS / "text.csv"))
    log = study.LOGS / "text.csv"
    function = one
    if which == "words":
        log = study.LOGS / "text-words.csv"
        function = functools.partial(one, name="ptb", parts=5)
    elif which == "longer":
        log = study.LOGS / "text-longer.csv"
        function = functools.partial(one, name="ptb", parts=LONGER, epochs=LONGER)
    study.do_cases(log, function, cases(which, best))


if __name__ == "__main__":
    study.run(main)
