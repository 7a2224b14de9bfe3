"""How fast, against the matrix products that no form can do without, and against nn.LSTM.

    python experiments/speed.py                   some 25 minutes on two CPU cores
    python experiments/speed.py --sizes small     the small preset alone: some five minutes

The contestants take turns, round after round. `products` are the matrix products of the same step and nothing
else. (For y = x W^T: y itself, dW = dy^T x and dx = dy W.) A time is the median over the rounds. `times` is
the median of each round's own ratio to the first contestant. Nothing else should be at work meanwhile.
"""

import argparse
import itertools
import statistics
import time

import study
import torch
import train
from torch import nn

from qrnn import QRNN, pool, pool_loop

torch._dynamo.config.recompile_limit = 64                               # all contestants in one process
VOCABULARY = 10_000                                                     # PTB's


def table(title, contestants, rounds, device):
    """Print a table of contestants, {name: function}; the first is what the others are compared with."""
    times = {name: [] for name in contestants}
    for n, (name, function) in itertools.product(range(-3, rounds), contestants.items()):       # 3 to warm up
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if n >= 0:
            times[name].append(time.perf_counter() - began)
    first = next(iter(times.values()))
    print(f"\n{title}\n\n|  | ms | times |\n|---|---|---|")
    for name, its in times.items():
        ratio = statistics.median(a / b for a, b in zip(its, first))
        print(f"| {name} | {1e3 * statistics.median(its):,.2f} | {ratio:.2f} |", flush=True)


def products(shapes, rows, kind, device):
    """The products of layers y = x W^T, forward and backward. shapes: [(inputs, outputs)]; rows of x: T B."""
    layers = [[torch.randn(shape, device=device).to(kind) for shape in ((rows, i), (o, i), (rows, o))]
              for i, o in shapes]
    return lambda: [(x @ w.t(), dy.t() @ x, dy @ w) for x, w, dy in layers]


def both_ways(function, inputs, size, autocast, device, parameters=()):
    """Forward and backward of function(*inputs), every number of its (T, B, H) with a gradient."""
    inputs = [torch.rand(shape, device=device).requires_grad_() for shape in inputs]
    G = torch.randn(size, device=device)

    def once():
        with autocast:
            y = function(*inputs)
            y = y if torch.is_tensor(y) else y[0]
        torch.autograd.grad(y, [*inputs, *parameters], G.to(y.dtype))
    return once


def step(preset, mode, form, autocast, device):
    """A whole training step on random text; in mode dni with a synthetic gradient."""
    settings = train.preset(preset, mode, "ptb")
    model, optimizer, dni = train.build(settings, VOCABULARY, device)
    if form == "compiled":
        train.compile_modules([model] if dni is None else [model, dni.g])
    text = torch.randint(VOCABULARY, (settings.chunk + 1, settings.batch_size), device=device)
    state = None

    def once():
        nonlocal state
        _, state = train.train_step(model, optimizer, dni, text[:-1], text[1:], state, dni is not None,
                                    settings.clip, autocast)
    return once


def main():
    parser = argparse.ArgumentParser(description="How fast, against its matrix products and nn.LSTM?")
    parser.add_argument("--sizes", nargs="+", choices=("small", "paper"), default=("small", "paper"))
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    train.keep_freed_memory()
    device, _ = train.pick_device("auto", "fp32")
    print(f"{study.machine()}; torch {torch.__version__}; {a.rounds} rounds")
    for preset in a.sizes:
        s = train.preset(preset, "bptt", "ptb")
        E, H, rows = s.embedding_size, s.hidden_size, s.chunk * s.batch_size
        size = s.chunk, s.batch_size, H
        shapes = [(2 * E, 3 * H), *[(H, 3 * H)] * (s.num_layers - 2), (H, 3 * E), (E, VOCABULARY)]
        fp32 = torch.autocast(device, enabled=False)
        table(f"The pooling alone, fp32, the loop under autograd; T, B, H = {size}", {
            form.__name__: both_ways(form, (size, size, size[1:]), size, fp32, device)
            for form in (pool, pool_loop)}, a.rounds, device)
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            autocast = torch.autocast(device, kind, kind != torch.float32)
            layers = {"nn.LSTM": nn.LSTM(H, H), "QRNN": QRNN(H, H), "QRNN, compiled": QRNN(H, H)}
            train.compile_modules([layers["QRNN, compiled"]])
            contestants = {"products": products([(H, 3 * H)], rows, kind, device)}
            for what, module in layers.items():
                contestants[what] = both_ways(module.to(device), (size,), size, autocast, device,
                                              list(module.parameters()))
            table(f"One layer, forward and backward, {name}; T, B, H = {size}", contestants, a.rounds, device)
            contestants = {"products": products(shapes, rows, kind, device)}
            for form, mode in itertools.product(("plain", "compiled"), ("bptt", "dni")):
                contestants[f"{mode} {form}"] = step(preset, mode, form, autocast, device)
            table(f"A whole training step, {preset}, {name}", contestants, a.rounds, device)


if __name__ == "__main__":
    main()
