"""Does a synthetic gradient help on text? Which kind of g, at which chunk length T, at which rate of g?

    python experiments/text.py --study rates     each g at five rates, T of 2 and 5, one seed: 0
    python experiments/text.py --study T         each g at its best rate, T of 2, 5, 10 and 20, other seeds
    python experiments/text.py --study alpha     the discount α, T of 2 and 5
    python experiments/text.py --study memory    the paper's g taught through K = 4 borders of its memory
    python experiments/text.py --study words     words, T of 5, 20 and 70

The model is an embedding of 64, one QRNN layer of 256 and a decoder; B = 32, Adam at 2e-3, clip 1. All arms
of a T make the same number of updates. Words are read once, in bf16 where the processor has it. The arms:

    bptt      truncated backpropagation through time
    full      the loss of a chunk goes back through the 40 steps before its end, or through the chunk before
              it if that is longer: the ceiling
    twice     the same through the chunk before alone: the simplest alternative to a g
    linear    layer-wise, one linear map 256 -> 256
    mlp       layer-wise, 256 -> 256 -> 256 -> 256
    neuron    the paper's: neuron-wise, scalar in and out, memory h_g
    neuron4   the same, taught through 4 borders

Measured are bits per token of the validation text (of the first 200,000 characters).
"""

import argparse
import functools
import math
import time

import study
import torch
import train

import data
from dni import Interface, LayerDNI, NeuronDNI

EMBEDDING, HIDDEN, B, REACH, CLIP = 64, 256, 32, 40, 1.0
UPDATES, WORDS = {2: 10_000, 5: 8_000, 10: 5_000, 20: 2_500}, (5, 20, 70)  # on characters, by T; T
WITHOUT_G, WITH_G = ("bptt", "full", "twice"), ("linear", "mlp", "neuron")


def build(case, vocabulary_size):
    """(model, optimizer, the arm's Interface or None)"""
    torch.manual_seed(case["seed"])
    model, arm = study.Reader(vocabulary_size, EMBEDDING, HIDDEN), case["arm"]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    if arm in WITHOUT_G:
        return model, optimizer, None
    if arm in ("neuron", "neuron4"):
        g = NeuronDNI()
    else:
        g = LayerDNI([HIDDEN], HIDDEN if arm == "mlp" else 0)  # 0: one linear map
    g_optimizer = torch.optim.Adam(g.parameters(), case["rate"], fused=True)
    return model, optimizer, Interface(g, g_optimizer, case["alpha"], 4 if arm == "neuron4" else 1)


def one(case, name="ptb-chars", parts=10):
    """Train. Returns a row for each of `parts` parts of the updates."""
    train.keep_freed_memory()
    arm, T, corpus = case["arm"], case["T"], data.load_corpus(name)
    inputs, targets = data.streams(corpus.train, B)
    _, autocast = train.pick_device("cpu", "auto" if name == "ptb" else "fp32")
    updates = UPDATES[T] if name == "ptb-chars" else len(inputs) // T // parts * parts
    model, optimizer, dni = build(case, len(corpus.vocabulary))
    reach = max(REACH // T, 2) if arm == "full" else 2  # in chunks
    state, recent, rows, began = None, [], [], time.monotonic()
    for n in range(1, updates + 1):
        start = (n - 1) * T % (len(inputs) - T)
        x, y = inputs[start : start + T], targets[start : start + T]
        if arm in ("full", "twice"):
            recent = [*recent, (x, y, state)][-reach:]
            state = study.full_update(model, optimizer, recent, CLIP, autocast)
        else:
            _, state = train.train_step(
                model, optimizer, dni, x, y, state, dni is not None, CLIP, autocast
            )
        if n % (updates // parts) == 0:
            bits = train.evaluate(model, corpus.valid[:200_001], B, autocast) / math.log(2)
            rows.append(
                {
                    **case,
                    "updates": n,
                    "bits": round(bits, 4),
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
    return rows


def best_rates(rows):
    """{arm: the rate with the fewest bits at the end, at T = 2 and 5 together}; α = 1, seed 0."""
    found, best = {}, {}
    for row in rows:
        searched = (
            row["T"] in ("2", "5") and row["rate"] and (row["alpha"], row["seed"]) == ("1.0", "0")
        )
        if searched and int(row["updates"]) == UPDATES[int(row["T"])]:
            found.setdefault((row["arm"], row["rate"]), []).append(float(row["bits"]))
    for bits, arm, rate in sorted((sum(its), *key) for key, its in found.items() if len(its) == 2):
        best.setdefault(arm, float(rate))
    return best


def cases(which, best):
    """The cases of a study. best: {arm: rate}. A column that means nothing to an arm is empty."""

    def case(arm, T, seed, rate="", alpha=1.0):
        with_g = arm not in WITHOUT_G
        return dict(
            arm=arm,
            T=T,
            alpha=alpha if with_g else "",
            rate=rate or best[arm] if with_g else "",
            seed=seed,
        )

    rates, arms = (
        (1e-4, 1e-3, 1e-5, 1e-2, 1e-6),
        (*WITHOUT_G, *(arm for arm in WITH_G if arm in best)),
    )
    return {
        "rates": [
            case(arm, T, 0, rate)
            for T in (2, 5)
            for arm in ("bptt", "full", *WITH_G)
            for rate in (rates if arm in WITH_G else rates[:1])
        ],
        "T": [
            case(arm, T, seed)
            for seed in range(1, 6)
            for T in UPDATES
            for arm in arms
            if arm != "neuron" or seed <= 3
        ],
        "alpha": [
            case(arm, T, seed, alpha=alpha)
            for seed in (1, 2)
            for alpha in (0.1, 0.9)
            for T in (2, 5)
            for arm in arms
            if arm in ("linear", "mlp")
        ],
        "memory": [case("neuron4", 2, 0, rate) for rate in (1e-3, 1e-4)],
        "words": [
            case(arm, T, seed)
            for seed in (1, 2, 3)
            for T in WORDS
            for arm in arms
            if arm != "twice" or T == 5
        ],
    }[which]


def main():
    parser = argparse.ArgumentParser(
        description="Which synthetic gradient helps on text, at what rate?"
    )
    parser.add_argument(
        "--study", required=True, choices=("rates", "T", "alpha", "memory", "words")
    )
    which = parser.parse_args().study
    words = "text-words", functools.partial(one, name="ptb", parts=5)
    log, function = words if which == "words" else ("text", one)
    todo = cases(which, best_rates(study.read_log(study.LOGS / "text.csv")))
    study.do_cases(study.LOGS / f"{log}.csv", function, todo)


if __name__ == "__main__":
    main()
