"""How fast, against the matrix products that no form can do without, and against nn.LSTM.

    python experiments/speed.py                   ten minutes on two CPU cores, with nothing else at work

The contestants take turns, round after round. `products` are the matrix products of the same step alone. A
time is the median over the rounds, `times` that of each round's own ratio to the first contestant.
"""

import argparse
import contextlib
import itertools
import statistics
import time

import study
import torch
import train
from torch import nn

from qrnn import QRNN, pool, pool_loop

torch._dynamo.config.recompile_limit = 64  # all contestants in one process
VOCABULARY = 10_000  # PTB's


def seconds(function, device, times=1):
    """The mean of a few calls in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    began = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - began) / times


def table(title, contestants, rounds, device):
    """Print a table of contestants, {name: function}; the first is what the others are compared with."""
    times = {name: [] for name in contestants}
    for _, (name, function) in itertools.product(range(3 + rounds), contestants.items()):
        times[name].append(seconds(function, device))
    first = next(iter(times.values()))
    print(f"\n{title}\n\n|  | ms | times |\n|---|---|---|")
    for name, its in times.items():  # without the first three rounds
        ratio = statistics.median(a / b for a, b in zip(its[3:], first[3:]))
        print(f"| {name} | {1e3 * statistics.median(its[3:]):,.2f} | {ratio:.2f} |", flush=True)


def shapes_of(settings):
    """[(inputs, outputs)] of all products of a model: layers, the first with a window of 2, and decoder."""
    E, H = settings.embedding_size, settings.hidden_size
    return [(2 * E, 3 * H), *[(H, 3 * H)] * (settings.num_layers - 2), (H, 3 * E), (E, VOCABULARY)]


def products(shapes, rows, kind, device):
    """The products of layers y = x W^T, forward and backward. shapes: [(inputs, outputs)]; rows of x: T B."""
    layers = [
        [torch.randn(shape, device=device).to(kind) for shape in ((rows, i), (o, i), (rows, o))]
        for i, o in shapes
    ]
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


def layer(kind, size, autocast, device, compiled=False):
    """One layer of H neurons, forward and backward. size: (T, B, H)."""
    module = kind(size[2], size[2]).to(device)
    if compiled:
        train.compile_modules([module])
    return both_ways(module, (size,), size, autocast, device, list(module.parameters()))


def step(settings, form, autocast, device):
    """A whole training step on random text; in mode dni with a synthetic gradient."""
    model, optimizer, dni = train.build(settings, VOCABULARY, device)
    if form == "compiled":
        train.compile_modules([model] if dni is None else [model, dni.g])
    text, state = (
        torch.randint(VOCABULARY, (settings.chunk + 1, settings.batch_size), device=device),
        None,
    )

    def once():
        nonlocal state
        _, state = train.train_step(
            model,
            optimizer,
            dni,
            text[:-1],
            text[1:],
            state,
            dni is not None,
            settings.clip,
            autocast,
        )

    return once


def main():
    parser = argparse.ArgumentParser(
        description="How fast, against its matrix products and nn.LSTM?"
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=("small", "paper"), default=("small", "paper")
    )
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    train.keep_freed_memory()
    device, _ = train.pick_device("auto", "fp32")
    print(f"{study.machine()}; torch {torch.__version__}; {a.rounds} rounds")
    for preset in a.sizes:
        s = train.preset(preset, "bptt", "ptb")
        H, rows, size = (
            s.hidden_size,
            s.chunk * s.batch_size,
            (s.chunk, s.batch_size, s.hidden_size),
        )
        contestants = {
            form.__name__: both_ways(
                form, (size, size, size[1:]), size, contextlib.nullcontext(), device
            )
            for form in (pool, pool_loop)
        }
        title = f"The pooling alone, fp32, the loop under autograd; T, B, H = {size}"
        table(title, contestants, a.rounds, device)
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            autocast = torch.autocast(device, kind, kind != torch.float32)
            contestants = {
                "products": products([(H, 3 * H)], rows, kind, device),
                "nn.LSTM": layer(nn.LSTM, size, autocast, device),
                "QRNN": layer(QRNN, size, autocast, device),
                "QRNN, compiled": layer(QRNN, size, autocast, device, compiled=True),
            }
            table(
                f"One layer, forward and backward, {name}; T, B, H = {size}",
                contestants,
                a.rounds,
                device,
            )
            contestants = {"products": products(shapes_of(s), rows, kind, device)}
            for form, mode in itertools.product(("plain", "compiled"), ("bptt", "dni")):
                settings = train.preset(preset, mode, "ptb")
                contestants[f"{mode} {form}"] = step(settings, form, autocast, device)
            table(f"A whole training step, {preset}, {name}", contestants, a.rounds, device)


if __name__ == "__main__":
    main()
