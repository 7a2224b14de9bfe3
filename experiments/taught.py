"""Could g know the gradient at all? Each g is taught the true gradients of a model whose weights are frozen.

    python experiments/taught.py                      recall, one to three borders, five seeds; resumable
    python experiments/taught.py --data ptb-chars     characters of Penn Treebank, T = 2

In training g learns from its own predictions, about a model that changes. Here it has neither trouble. A
model is trained by BPTT alone, and its weights are frozen. Then each g is regressed on the true gradients of
the states that the model passes through. What is left is the question what there is to know: how much of a
neuron's gradient follows from what this g sees? A model that makes no use of the state yet has none of this
to offer.

g learns from texts of some chunks (recall: 24 of T = 10; ptb-chars: 80 of T = 2), at the borders of their
first three quarters, and so from gradients of six chunks to come or more (ptb-chars: of 40 characters or
more), in units of their root mean square. Cosine and R^2 are those of predictions made before learning from
the target, in the middle half of each of the last texts: ten of 40 for recall.

recall     The model has 200 updates of arm `full` of recall.py. It has just learned the answers then. Streams
           are in pairs, and the loss is that of all words or of the answers alone.
ptb-chars  The model is that of text.py after 10,000 updates of truncated BPTT. Each g learns at three rates
           and is measured after 30, 100 and 300 texts, over the last fifth of them. A border of a text counts
           once for each of the 32 streams.
"""

import argparse

import recall
import study
import text
import torch
import train
from torch import nn

import data
from dni import Agreement, Interface, regress


class Line(nn.Module):
    """g(c) = w c, with w the only parameter: all it can say is "away from zero" or "towards it"."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, s, memory=None):
        return [self.w * c for c in s], memory


# name: (g, K: the borders through which it is taught)
KINDS = {"line": (Line, 1), **{name: arm for name, arm in recall.ARMS.items() if arm}}
CHUNKS = 24                                                             # of a text of recall
TEXT_T, TEXT_CHUNKS, RATES, COUNTS = 2, 80, (1e-3, 1e-4, 1e-5), (30, 100, 300)       # of ptb-chars


def lesson(dni, borders, unit, agreement):
    """g learns from one text, [(c, gradient)] a border; `agreement` takes in what it said before."""
    dni.reset()
    for k, (c, gradient) in enumerate(borders[:len(borders) * 3 // 4]):
        predicted, target = dni.predict(c), [d / unit for d in gradient]
        if k >= len(borders) // 4:
            agreement.update(predicted, target)
        regress(dni.optimizer, predicted, target)


def root_mean_square(borders):
    return torch.cat([gradient for _, (gradient,) in borders]).square().mean().sqrt()


def one(case, texts=40):
    """Recall. A row for each interface: the agreement of δ^ = g(c, h_g) with δ = dL/dc.

    L is the loss of the rest of the text.
    """
    answers, borders, seed = case["loss"] == "answers", case["borders"], case["seed"]
    streams, read = 2 * (borders * recall.T + 2), case["updates"] * recall.T
    length = CHUNKS * recall.T                                # of a text
    inputs, targets = recall.episodes(borders, seed, streams, read + texts * length, answers)
    torch.manual_seed(seed)
    model = recall.Reader(recall.QUERY + 1)
    optimizer = torch.optim.Adam(model.parameters(), recall.SETTINGS.lr)
    for _ in recall.full_steps(model, optimizer, inputs[:read], targets[:read], borders):
        pass
    test_text = recall.episodes(borders, seed + 1000, 2 * streams, length, answers)
    accuracy, _ = recall.test(model, *test_text)
    dnis = {}
    for name, (g, K) in KINDS.items():
        g = g()
        dnis[name] = Interface(g, torch.optim.Adam(g.parameters(), 3e-3), borders=K)
    agreements, unit = {name: Agreement() for name in dnis}, None
    for n, (x, y) in enumerate(zip(inputs[read:].split(length), targets[read:].split(length))):
        passed = recall.future_gradients(model, x, y)                   # lists of one (B, H)
        unit = unit or root_mean_square(passed)
        for name, dni in dnis.items():
            if n == texts * 3 // 4:
                agreements[name].reset()
            lesson(dni, passed, unit, agreements[name])
    results = {name: (round(a, 4) for a in agreement.result()) for name, agreement in agreements.items()}
    return [{**case, "arm": name, "accuracy": round(accuracy, 4), **dict(zip(("cosine", "r2"), result))}
            for name, result in results.items()]


def one_of_text(case, updates=text.UPDATES[2], counts=COUNTS):
    """ptb-chars. A row for each number of texts in `counts`."""
    T, length = TEXT_T, TEXT_T * TEXT_CHUNKS
    corpus = data.load_corpus("ptb-chars")
    inputs, targets = data.streams(corpus.train, text.B)
    torch.manual_seed(case["seed"])
    model = text.Reader(len(corpus.vocabulary))
    optimizer, state = torch.optim.Adam(model.parameters(), 2e-3, fused=True), None
    settings = train.Settings(clip=1.0, bptt=T, batch_size=text.B)
    for k in range(0, updates * T, T):
        _, state = train.train_step(model, optimizer, None, inputs[k:k + T], targets[k:k + T], state, False,
                                    settings)
    make, kind, K = text.ARMS[case["arm"]]
    g, rows, agreement, unit, learned = make(), [], Agreement(), None, 0
    dni = kind(g, torch.optim.Adam(g.parameters(), case["rate"], fused=True), 1.0, K)
    for n in range(1, counts[-1] + 1):
        here = slice(updates * T + (n - 1) * length, updates * T + n * length)
        passed = recall.future_gradients(model, inputs[here], targets[here], T)
        unit = unit or root_mean_square(passed)
        lesson(dni, passed, unit, agreement)
        learned += len(passed) * 3 // 4 * text.B
        if n in [count * 4 // 5 for count in counts]:                   # the last fifth is kept
            agreement.reset()
        if n in counts:
            cosine, r2 = agreement.result()
            rows.append({**case, "borders": learned, "cosine": round(cosine, 4), "r2": round(r2, 5)})
    return rows


def main():
    parser = argparse.ArgumentParser(description="How much of the true gradient can each interface know?")
    parser.add_argument("--data", choices=("recall", "ptb-chars"), default="recall")
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3), help="of recall [1 2 3]")
    parser.add_argument("--seeds", type=int, help="5 for recall, 1 for ptb-chars")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time [%(default)s]")
    a = parser.parse_args()
    if a.data == "recall":
        cases = [dict(loss=loss, updates=200, borders=b, seed=seed)
                 for seed in range(a.seeds or 5) for b in a.borders for loss in ("answers", "all")]
        study.run(study.LOGS / "taught.csv", one, cases, a.jobs,
                  model="as recall.csv, full BPTT; g: 40 texts, Adam 0.003")
    else:
        cases = [dict(arm=arm, rate=rate, seed=seed) for seed in range(a.seeds or 1) for rate in RATES
                 for arm in ("neuron", "linear", "mlp", "line")]
        study.run(study.LOGS / "taught-ptb-chars.csv", one_of_text, cases, a.jobs,
                  model="as text.csv, truncated BPTT, T = 2; g: Adam")


if __name__ == "__main__":
    main()
