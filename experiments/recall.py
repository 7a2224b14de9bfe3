"""Is credit carried across a border? The language `recall` of data.py, its delay longer than a chunk.

    python experiments/recall.py              about three hours; resumable
    python experiments/recall.py --cells      a QRNN, a GRU and an LSTM, half an hour

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

`--cells`: one border, answers alone, dni.py's defaults; the LSTM with and without the penalty on its c.
"""

import argparse
import functools
import statistics
import time

import study
import torch
import train
from torch import nn

from data import episodes
from dni import Interface, LayerDNI, NeuronDNI

T, B, NEURONS, QUERY, CLIP = 10, 32, 64, 12, 1.0  # 4 symbols, 8 fillers, the query: 12
PENALTY = Interface(NeuronDNI()).penalty  # dni.py's default
WITH_G = ("linear", "layer", "neuron")
CELLS = {"qrnn": None, "gru": nn.GRU, "lstm": nn.LSTM}
UPDATES, ALPHA, RATES, SEARCH_SEEDS = 2400, 0.9, (1e-2, 1e-3, 1e-4, 1e-5), (100, 101)


class Cell(nn.Module):
    """nn.GRU or nn.LSTM of one layer with the state of a QRNN: pairs (c, x_prev), the second empty."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.states = kind(NEURONS, NEURONS), 2 if kind is nn.LSTM else 1
        if kind is nn.LSTM:
            nn.init.constant_(self.rnn.bias_ih_l0[NEURONS : 2 * NEURONS].data, 2.0)  # forget little

    def forward(self, x, state=None):
        s = state and tuple(c[None] for c, _ in state)
        h, s = self.rnn(x, s if self.states == 2 else s and s[0])
        return h, [(c[0], x[:0]) for c in (s if self.states == 2 else [s])]


@torch.no_grad()
def test(model, inputs, targets):
    """Accuracy of the answers, but for the first quarter of the text."""
    right = model.logits(inputs)[0].argmax(-1) == targets
    return right[len(inputs) // 4 :][inputs[len(inputs) // 4 :] == QUERY].double().mean().item()


def one(case, updates=UPDATES, alpha=ALPHA):
    """Train and test. Returns one row; of a cell, with the mean size of its last state."""
    train.keep_freed_memory()
    arm, b, seed, answers = case["arm"], case["borders"], case["seed"], case["counts"] == "answers"
    inputs, targets = episodes(
        b * T - 1, updates * T, 2 * (b * T + 2) if answers else B, seed, answers
    )
    test_text = episodes(b * T - 1, 24 * T, 4 * (b * T + 2), seed + 1000, answers)
    torch.manual_seed(seed)
    dni, kind = None, CELLS[case.get("cell", "qrnn")]
    if arm in WITH_G:
        sizes = [NEURONS] * (2 if kind is nn.LSTM else 1)
        g = NeuronDNI() if arm == "neuron" else LayerDNI(sizes, 50 if arm == "layer" else 0)
        dni = Interface(
            g,
            torch.optim.Adam(g.parameters(), case["rate"]),
            alpha,
            penalty=case.get("penalty", 0.0),
        )
    torch.manual_seed(seed)  # the same model for all
    model = study.Reader(QUERY + 1, NEURONS, NEURONS, forget=2.0)
    model.rnn = model.rnn if kind is None else Cell(kind)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    state, recent, began = None, [], time.monotonic()
    for x, y in zip(inputs.split(T), targets.split(T)):
        if arm == "full":
            recent = [*recent, (x, y, state)][-b - 1 :]
            state = study.full_update(model, optimizer, recent, CLIP)
        else:
            _, state = train.train_step(model, optimizer, dni, x, y, state, dni is not None, CLIP)
    size = {"size": round(state[-1][0].abs().mean().item(), 3)} if "cell" in case else {}
    return [
        {
            **case,
            "accuracy": round(test(model, *test_text), 4),
            **size,
            "seconds": round(time.monotonic() - began, 1),
        }
    ]


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
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--cells", action="store_true", help="compare recurrent networks")
    a, log, arms = parser.parse_args(), study.LOGS / "recall.csv", ("bptt", "full", *WITH_G)
    if a.cells:
        return study.do_cases(
            study.LOGS / "recall-cells.csv",
            functools.partial(one, updates=1500, alpha=1.0),
            [
                dict(
                    counts="answers",
                    arm=arm,
                    rate=1e-4,
                    borders=1,
                    seed=seed,
                    cell=cell,
                    penalty=penalty,
                )
                for seed in a.seeds
                for cell in CELLS
                for arm in ("bptt", *WITH_G)
                for penalty in ((0.0, PENALTY) if cell == "lstm" and arm in WITH_G else (0.0,))
            ],
        )
    cells = [(counts, arm, b) for b in (1, 2, 3) for counts in ("all", "answers") for arm in arms]
    study.do_cases(
        log,
        one,
        [
            dict(counts=counts, arm=arm, rate=rate, borders=b, seed=seed)
            for seed in SEARCH_SEEDS
            for counts, arm, b in cells
            for rate in RATES
            if arm in WITH_G
        ],
    )
    rows = study.read_log(log)
    study.do_cases(
        log,
        one,
        [
            dict(counts=counts, arm=arm, rate=best_rate(rows, counts, arm, b), borders=b, seed=seed)
            for seed in a.seeds
            for counts, arm, b in cells
        ],
    )


if __name__ == "__main__":
    main()
