"""Is credit carried across a border? The language `recall` of data.py, its delay longer than a chunk.

    python experiments/recall.py                     everything: some three hours; resumable
    python experiments/recall.py --arms bptt linear full --borders 1 --seeds 1 --rates 1e-2
                                                     a first look, in a minute or two

An episode shows a symbol, then fillers, then a query; the answer is the symbol. With b T - 1 fillers, b
borders lie between symbol and query, and truncated BPTT cannot connect them. Arms, at equal updates:

    bptt      truncated: no gradient crosses a border
    full      the last chunk's loss, backpropagated through it and the b chunks before it, to the symbol
    linear    the layer-wise DNI (DNI, 2.1) as one linear map
    layer     the same as an MLP with 50 hidden units
    neuron    the neuron-wise DNI (paper, 2.2)

With `--counts all` every word is scored. With `answers` the answers alone are: in training, in the true
gradient and in the perplexity. The rate of each g is the best of four, by accuracy, for each number of
borders, on two seeds that serve for nothing else. The text never repeats. Twelve times a training the model
is tested on a text of its own: accuracy of the answer (chance: 0.25), perplexity, and for a DNI cosine and R²
of its predictions with

    true      the gradient of all loss to come, by backpropagation through all of the test text
    target    its bootstrapped targets, in training since the last test
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import study
import torch
import train

from data import episodes, recall
from dni import Agreement, Interface, LayerDNI, NeuronDNI

# Tokens are 4 symbols, 8 fillers and the query.
T, B, NEURONS, QUERY, CLIP = 10, 32, 64, 12, 1.0
UPDATES, ALPHA, RATES, SEARCH_SEEDS = 2400, 0.9, (1e-2, 1e-3, 1e-4, 1e-5), (100, 101)
KINDS = {"linear": 0, "layer": 50}                                      # hidden units of a layer-wise g
ARMS = ("bptt", "full", *KINDS, "neuron")


@torch.no_grad()
def test(model, inputs, targets):
    """(accuracy of the answers, perplexity of what is scored), but for the first quarter of the text."""
    log_p = model.decoder(model.rnn(model.embedding(inputs))[0]).log_softmax(-1)[len(inputs) // 4:]
    inputs, targets = inputs[len(inputs) // 4:], targets[len(inputs) // 4:]
    accuracy = (log_p.argmax(-1) == targets)[inputs == QUERY].double().mean()
    scored = targets != -100
    nll = -log_p[scored].gather(-1, targets[scored][:, None]).mean()
    return accuracy.item(), math.exp(nll)


def truth(model, g, inputs, targets):
    """Agreement of g with the true gradients, at the borders in the middle half of the text."""
    borders, memory, agreement = study.future_gradients(model, inputs, targets, T), None, Agreement()
    for n, (s, gradient) in enumerate(borders):
        with torch.no_grad():
            predicted, memory = g(s, memory)
        if len(borders) // 4 <= n < len(borders) * 3 // 4:
            agreement.update(predicted, gradient)
    return agreement.result()


def one(case, updates=UPDATES):
    """Train. Returns a row for each of twelve tests."""
    train.keep_freed_memory()
    arm, borders, seed, answers = case["arm"], case["borders"], case["seed"], case["counts"] == "answers"
    delay, length = borders * T - 1, borders * T + 2                    # of an episode
    inputs, targets = episodes(delay, updates * T, 2 * length if answers else B, seed, answers)
    test_text = episodes(delay, 24 * T, 4 * length, seed + 1000, answers)
    floor = 1.0 if answers else recall(delay, count=10).facts["perplexity floor"]
    torch.manual_seed(seed)
    dni = None
    if arm in KINDS or arm == "neuron":
        g = LayerDNI([NEURONS], KINDS[arm]) if arm in KINDS else NeuronDNI()
        dni = Interface(g, torch.optim.Adam(g.parameters(), case["rate"]), ALPHA)
    torch.manual_seed(seed)                                             # the same model for all
    model = study.Reader(QUERY + 1, NEURONS, NEURONS, forget=2.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows, state, recent, began = [], None, [], time.monotonic()
    for n, (x, y) in enumerate(zip(inputs.split(T), targets.split(T)), 1):
        if arm == "full":
            recent = [*recent, (x, y, state)][-borders - 1:]
            state = study.full_update(model, optimizer, recent, CLIP)
        else:
            _, state = train.train_step(model, optimizer, dni, x, y, state, dni is not None, CLIP)
        if n % (updates // 12) == 0:
            accuracy, perplexity = test(model, *test_text)
            agreed = [math.nan] * 4
            if dni:
                agreed = [*truth(model, dni.g, *test_text), *dni.agreement.result()]
                dni.agreement.reset()
            measures = dict(zip(("true_cosine", "true_r2", "target_cosine", "target_r2"), agreed))
            measures = dict(accuracy=accuracy, perplexity=perplexity, floor=floor, **measures)
            rows.append({**case, "updates": n, **{name: round(value, 4) for name, value in measures.items()},
                         "seconds": round(time.monotonic() - began, 1)})
    return rows


def best_rate(rows, counts, arm, borders):
    """The rate with the best accuracy at the end, a mean over the seeds of the search; "" without a g."""
    found = {}
    for row in rows:
        case = row["counts"], row["arm"], row["borders"], row["updates"]
        if case == (counts, arm, str(borders), str(UPDATES)) and int(row["seed"]) in SEARCH_SEEDS:
            found.setdefault(row["rate"], []).append(float(row["accuracy"]))
    means = {rate: statistics.mean(accuracies) for rate, accuracies in found.items()}
    return float(max(means, key=means.get)) if means else ""


def main():
    parser = argparse.ArgumentParser(description="Is credit carried across a border?")
    parser.add_argument("--counts", nargs="+", choices=("all", "answers"), default=("all", "answers"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of g; one: no search")
    parser.add_argument("--log", type=Path, default=study.LOGS / "recall.csv")
    a = parser.parse_args()
    cells = [(b, counts, arm) for b in a.borders for counts in a.counts for arm in a.arms]
    if len(a.rates) > 1:
        study.run(a.log, one, [dict(counts=counts, arm=arm, rate=rate, borders=b, seed=seed)
                               for seed in SEARCH_SEEDS for b, counts, arm in cells for rate in a.rates
                               if arm not in ("bptt", "full")])
    cases, rows = [], study.read(a.log)
    for seed in range(a.seeds):
        for b, counts, arm in cells:
            rate = a.rates[0] if len(a.rates) == 1 else best_rate(rows, counts, arm, b)
            cases.append(dict(counts=counts, arm=arm, rate="" if arm in ("bptt", "full") else rate, borders=b,
                              seed=seed))
    study.run(a.log, one, cases)


if __name__ == "__main__":
    main()
