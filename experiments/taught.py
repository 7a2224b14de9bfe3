"""Could g know the gradient at all? Each g is taught the true gradients of a model that carries the symbol.

    python experiments/taught.py            recall, one to three borders, five seeds; resumable

In recall.py g learns from its own word, about a model that needs g to learn. Here it has neither trouble: a model is trained by
BPTT through all borders (arm `full` of recall.py), its weights are frozen, and each g is regressed on the true gradients of
the states that the model passes through. What is left is the question what there is to know: how much of a neuron's
gradient follows from what this g sees? A model that cannot say the symbol yet has none of this to offer.

Streams in pairs, loss of all words or of the answers alone (see recall.py), the model after 200 or 800 updates. After 200 it has just learned
the answers; later its gradients come to be rare spikes that no interface foresees, and R^2 means little. g learns from texts of 24 chunks, at
the borders of their first three quarters, and so from gradients of six chunks to come or more, in units of their root mean square; cosine
and R^2 are those of predictions made before learning from the target, in the middle half of each of the last ten texts.
"""

import argparse

import recall
import study
import torch

from dni import Agreement, LayerDNI, NeuronDNI, regress

KINDS = {"line": recall.Line, "amnesic": recall.Amnesic, "neuron": NeuronDNI, "memory": recall.Memory, "named": recall.Named,
         "layer": lambda hidden: LayerDNI([recall.NEURONS], hidden)}
CHUNKS = 24


def one(case, texts=40):
    """A row for each interface: the agreement of delta^ = g(c, h_g) with delta = dL/dc, L the loss of the rest of the text."""
    answers, borders, seed = case["loss"] == "answers", case["borders"], case["seed"]
    streams, read = 2 * (borders * recall.T + 2), case["updates"] * recall.T
    inputs, targets = recall.episodes(borders, seed, streams, read + texts * CHUNKS * recall.T, answers)
    torch.manual_seed(seed)
    model = recall.Reader(recall.QUERY + 1)
    for _ in recall.full_steps(model, torch.optim.Adam(model.parameters(), recall.SETTINGS.lr), inputs[:read], targets[:read], borders):
        pass
    accuracy, _ = recall.test(model, *recall.episodes(borders, seed + 1000, 2 * streams, CHUNKS * recall.T, answers))
    gs = {name: kind(50) for name, kind in KINDS.items()}
    optimizers = {name: torch.optim.Adam(g.parameters(), 3e-3) for name, g in gs.items()}
    agreements, unit = {name: Agreement() for name in gs}, None
    for n, (x, y) in enumerate(zip(inputs[read:].split(CHUNKS * recall.T), targets[read:].split(CHUNKS * recall.T))):
        passed = recall.future_gradients(model, x, y)
        unit = unit or torch.cat([gradient for _, (gradient,) in passed]).square().mean().sqrt()
        for name, g in gs.items():
            memory = None
            for k, (c, gradient) in enumerate(passed[:len(passed) * 3 // 4]):                      # a list of one (B, H) each
                predicted, memory = g(c, memory)
                memory = memory and tuple(m.detach() for m in memory)
                target = [d / unit for d in gradient]
                if n >= texts * 3 // 4 and k >= len(passed) // 4:
                    agreements[name].update(predicted, target)
                regress(optimizers[name], predicted, target)
    return [{**case, "arm": name, "accuracy": round(accuracy, 4), **dict(zip(("cosine", "r2"), (round(a, 4) for a in agreements[name].result())))}
            for name in gs]


def main():
    parser = argparse.ArgumentParser(description="How much of the true gradient can each interface know?")
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [%(default)s]")
    a = parser.parse_args()
    cases = [dict(loss=loss, updates=updates, borders=b, seed=seed) for seed in range(a.seeds) for b in a.borders
             for loss, updates in (("answers", 200), ("answers", 800), ("all", 800))]
    study.run(study.LOGS / "taught.csv", one, cases, a.jobs, model="as recall-pairs.csv, full BPTT; g: 40 texts, Adam 0.003")


if __name__ == "__main__":
    main()
