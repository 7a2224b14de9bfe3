"""Could g know the gradient at all? Each g is taught the true gradients of a model that carries the symbol.

    python experiments/taught.py            recall, one to three borders, five seeds; resumable

In recall.py g learns from its own word, about a model that needs g to learn. Here it has neither trouble. A
model is trained by BPTT through all borders (arm `full` of recall.py), and its weights are frozen. Then each
g is regressed on the true gradients of the states that the model passes through. What is left is the question
what there is to know: how much of a neuron's gradient follows from what this g sees? A model that cannot say
the symbol yet has none of this to offer.

Streams are in pairs, and the loss is that of all words or of the answers alone (see recall.py). The model is
that after 200 or 800 updates. After 200 it has just learned the answers. Later its gradients come to be rare
spikes that no interface foresees, and R^2 means little.

g learns from texts of 24 chunks, at the borders of their first three quarters, and so from gradients of six
chunks to come or more, in units of their root mean square. Cosine and R^2 are those of predictions made
before learning from the target, in the middle half of each of the last ten texts.
"""

import argparse

import recall
import study
import torch

from dni import Agreement, Interface, LayerDNI, NeuronDNI, regress

# name: (class of g, class of the interface)
KINDS = {"line": (recall.Line, Interface),
         "amnesic": (recall.Amnesic, Interface),
         "neuron": (NeuronDNI, Interface),
         "memory": (NeuronDNI, recall.Memory),
         "named": (recall.Named, Interface),
         "layer": (lambda hidden: LayerDNI([recall.NEURONS], hidden), Interface)}
CHUNKS = 24


def one(case, texts=40):
    """A row for each interface: the agreement of δ^ = g(c, h_g) with δ = dL/dc.

    L is the loss of the rest of the text.
    """
    answers, borders, seed = case["loss"] == "answers", case["borders"], case["seed"]
    streams, read = 2 * (borders * recall.T + 2), case["updates"] * recall.T
    length = CHUNKS * recall.T                                          # of a text
    inputs, targets = recall.episodes(borders, seed, streams, read + texts * length, answers)
    torch.manual_seed(seed)
    model = recall.Reader(recall.QUERY + 1)
    optimizer = torch.optim.Adam(model.parameters(), recall.SETTINGS.lr)
    for _ in recall.full_steps(model, optimizer, inputs[:read], targets[:read], borders):
        pass
    test_text = recall.episodes(borders, seed + 1000, 2 * streams, length, answers)
    accuracy, _ = recall.test(model, *test_text)
    gs = {name: kind(50) for name, (kind, _) in KINDS.items()}
    dnis = {name: KINDS[name][1](g, torch.optim.Adam(g.parameters(), 3e-3)) for name, g in gs.items()}
    agreements, unit = {name: Agreement() for name in dnis}, None
    for n, (x, y) in enumerate(zip(inputs[read:].split(length), targets[read:].split(length))):
        passed = recall.future_gradients(model, x, y)                   # lists of one (B, H)
        unit = unit or torch.cat([gradient for _, (gradient,) in passed]).square().mean().sqrt()
        for name, dni in dnis.items():
            dni.reset()
            for k, (c, gradient) in enumerate(passed[:len(passed) * 3 // 4]):
                predicted, target = dni.predict(c), [d / unit for d in gradient]
                if n >= texts * 3 // 4 and k >= len(passed) // 4:
                    agreements[name].update(predicted, target)
                regress(dni.optimizer, predicted, target)
    results = {name: (round(a, 4) for a in agreement.result()) for name, agreement in agreements.items()}
    return [{**case, "arm": name, "accuracy": round(accuracy, 4), **dict(zip(("cosine", "r2"), result))}
            for name, result in results.items()]


def main():
    parser = argparse.ArgumentParser(description="How much of the true gradient can each interface know?")
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time [%(default)s]")
    a = parser.parse_args()
    cases = [dict(loss=loss, updates=updates, borders=b, seed=seed)
             for seed in range(a.seeds) for b in a.borders
             for loss, updates in (("answers", 200), ("answers", 800), ("all", 800))]
    study.run(study.LOGS / "taught.csv", one, cases, a.jobs,
              model="as recall-pairs.csv, full BPTT; g: 40 texts, Adam 0.003")


if __name__ == "__main__":
    main()
