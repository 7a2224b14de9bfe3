"""Is credit carried across a border? The language `recall` of data.py, its delay longer than a chunk.

    python experiments/recall.py                                                  about three hours; resumable
    python experiments/recall.py --arms bptt full --borders 1 --seeds 0 --log look.csv    a first look

An episode shows a symbol, then fillers, then a query; the answer is the symbol. With b T - 1 fillers, b
borders lie between symbol and query, and truncated BPTT cannot connect them. The arms:

    bptt      truncated: no gradient crosses a border
    full      the last chunk's loss, backpropagated through it and the b chunks before it, to the symbol
    linear    the layer-wise DNI (DNI, 2.1) as one linear map
    layer     the same as an MLP with 50 hidden units
    neuron    the neuron-wise DNI (paper, 2.2)

With `--counts all` every word is scored in training, with `answers` the answers alone. The rate of each g is
the best of four, by accuracy, for each number of borders, on two seeds that serve for nothing else. The text
never repeats. At the end of a training the model is tested on another text.
"""

import argparse
import statistics
import time
from pathlib import Path

import study
import torch
import train

from data import episodes
from dni import Interface, LayerDNI, NeuronDNI

T, B, NEURONS, QUERY, CLIP = 10, 32, 64, 12, 1.0                        # 4 symbols, 8 fillers, the query: 12
UPDATES, ALPHA, RATES, SEARCH_SEEDS = 2400, 0.9, (1e-2, 1e-3, 1e-4, 1e-5), (100, 101)


@torch.no_grad()
def test(model, inputs, targets):
    """Accuracy of the answers, but for the first quarter of the text."""
    right = model.logits(inputs)[0].argmax(-1) == targets
    return right[len(inputs) // 4:][inputs[len(inputs) // 4:] == QUERY].double().mean().item()


def one(case):
    """Train and test. Returns one row. (An episode has b T + 2 words.)"""
    train.keep_freed_memory()
    arm, b, seed, answers = case["arm"], case["borders"], case["seed"], case["counts"] == "answers"
    inputs, targets = episodes(b * T - 1, UPDATES * T, 2 * (b * T + 2) if answers else B, seed, answers)
    test_text = episodes(b * T - 1, 24 * T, 4 * (b * T + 2), seed + 1000, answers)
    torch.manual_seed(seed)
    dni = None
    if arm not in ("bptt", "full"):
        g = NeuronDNI() if arm == "neuron" else LayerDNI([NEURONS], 50 if arm == "layer" else 0)
        dni = Interface(g, torch.optim.Adam(g.parameters(), case["rate"]), ALPHA)
    torch.manual_seed(seed)                                             # the same model for all
    model = study.Reader(QUERY + 1, NEURONS, NEURONS, forget=2.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    state, recent, began = None, [], time.monotonic()
    for x, y in zip(inputs.split(T), targets.split(T)):
        if arm == "full":
            recent = [*recent, (x, y, state)][-b - 1:]
            state = study.full_update(model, optimizer, recent, CLIP)
        else:
            _, state = train.train_step(model, optimizer, dni, x, y, state, dni is not None, CLIP)
    return [{**case, "accuracy": round(test(model, *test_text), 4),
             "seconds": round(time.monotonic() - began, 1)}]


def best_rate(rows, counts, arm, b):
    """The rate with the best accuracy, a mean over the seeds of the search; "" without a g."""
    found = {}
    for row in rows:
        case = row["counts"], row["arm"], row["borders"]
        if case == (counts, arm, str(b)) and int(row["seed"]) in SEARCH_SEEDS:
            found.setdefault(row["rate"], []).append(float(row["accuracy"]))
    return float(max(found, key=lambda rate: statistics.mean(found[rate]))) if found else ""


def main():
    parser = argparse.ArgumentParser(description="Is credit carried across a border?")
    parser.add_argument("--counts", nargs="+", choices=("all", "answers"), default=("all", "answers"))
    parser.add_argument("--arms", nargs="+", default=("bptt", "full", "linear", "layer", "neuron"))
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--log", type=Path, default=study.LOGS / "recall.csv")
    a = parser.parse_args()
    cells = [(counts, arm, b) for b in a.borders for counts in a.counts for arm in a.arms]
    study.run(a.log, one, [dict(counts=counts, arm=arm, rate=rate, borders=b, seed=seed)
                           for seed in SEARCH_SEEDS for counts, arm, b in cells for rate in RATES
                           if arm not in ("bptt", "full")])
    rows = study.read(a.log)
    study.run(a.log, one, [dict(counts=counts, arm=arm, rate=best_rate(rows, counts, arm, b), borders=b,
                                seed=seed) for seed in a.seeds for counts, arm, b in cells])


if __name__ == "__main__":
    main()
