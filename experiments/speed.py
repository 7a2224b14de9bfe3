"""How fast is a QRNN, beside the matrix products that no form can do without, and beside nn.LSTM?

    python experiments/speed.py        ten minutes on two CPU cores, with nothing else at work

The contestants take turns, round after round. `products` are the matrix products of the same step,
alone. In the tables, `ms` is the median over the rounds. `times` is a median too, of the ratio to
the first contestant in the same round.
"""

import argparse
import contextlib
import statistics
import time

import study

import torch
from torch import nn

import train
from qrnn import QRNN, pool, pool_loop

torch._dynamo.config.recompile_limit = 64  # all contestants in one process
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 10_000  # PTB's
WARM_UP = 3  # rounds that are not counted


# ------------------------------------------------------------------------------------- measuring


def wait_for(device):
    """Wait until a GPU has done what it was asked. A CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device, times=1):
    """The mean time of `times` calls in a row, in seconds."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    wait_for(device)
    return (time.perf_counter() - began) / times


def race(title, contestants, rounds, device):
    """Time the contestants in turn, and print a table.

    contestants: {name: function}. The others are compared with the first one.
    """
    times = {name: [] for name in contestants}
    for n in range(WARM_UP + rounds):
        for name, function in contestants.items():
            took = seconds(function, device)
            if n >= WARM_UP:
                times[name].append(took)
    first = next(iter(times.values()))
    print(f"\n{title}\n\n|  | ms | times |\n|---|---|---|")
    for name, mine in times.items():
        ms = 1e3 * statistics.median(mine)
        ratio = statistics.median(a / b for a, b in zip(mine, first))
        print(f"| {name} | {ms:,.2f} | {ratio:.2f} |", flush=True)


# ------------------------------------------------------------------- the contestants, as functions


def shapes_of(settings):
    """[(inputs, outputs)] of all matrix products of a model: its layers and its decoder.

    The first layer reads two words at once (window 2). The last one has the size of the embedding.
    """
    E = settings.embedding_size
    H = settings.hidden_size
    between = [(H, 3 * H)] * (settings.num_layers - 2)
    return [(2 * E, 3 * H), *between, (H, 3 * E), (E, VOCABULARY)]


def products(shapes, rows, kind, device):
    """A function that makes the products of layers y = x W^T, forward and backward.

    shapes: [(inputs, outputs)] of the layers. rows: of x, T B. kind: a dtype.
    """
    layers = []
    for inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=device).to(kind)
        w = torch.randn(outputs, inputs, device=device).to(kind)
        dy = torch.randn(rows, outputs, device=device).to(kind)
        layers.append((x, w, dy))

    def once():
        return [(x @ w.t(), dy.t() @ x, dy @ w) for x, w, dy in layers]

    return once


def both_ways(function, shapes, size, autocast, device, parameters=()):
    """A function that calls function(*inputs), and backpropagates a gradient of all its outputs.

    shapes: of the inputs.
    size: of the output, (T, B, H). Where function returns several values, the output is the first.
    parameters: what gets a gradient, besides the inputs.
    """
    inputs = [torch.rand(shape, device=device).requires_grad_() for shape in shapes]
    gradient = torch.randn(size, device=device)

    def once():
        with autocast:
            y = function(*inputs)
            if not torch.is_tensor(y):
                y = y[0]
        torch.autograd.grad(y, [*inputs, *parameters], gradient.to(y.dtype))

    return once


def pooling(form, size, device):
    """Forward and backward of `pool` or `pool_loop`, in fp32. size: (T, B, H)."""
    shapes = (size, size, size[1:])  # z, f, c_0
    return both_ways(form, shapes, size, contextlib.nullcontext(), device)


def layer(kind, size, autocast, device, compiled=False):
    """Forward and backward of one layer of H neurons. kind: its class. size: (T, B, H)."""
    module = kind(size[2], size[2]).to(device)
    if compiled:
        train.compile_modules([module])
    return both_ways(module, (size,), size, autocast, device, list(module.parameters()))


def step(settings, form, autocast, device):
    """A whole training step on random text; in mode dni with a synthetic gradient.

    form: "plain" or "compiled".
    """
    model, optimizer, dni = train.build(settings, VOCABULARY, device)
    if form == "compiled":
        train.compile_modules([model] if dni is None else [model, dni.g])
    text = torch.randint(VOCABULARY, (settings.chunk + 1, settings.batch_size), device=device)
    inputs = text[:-1]
    targets = text[1:]
    synthetic = dni is not None
    state = None

    def once():
        nonlocal state
        _, state = train.train_step(
            model, optimizer, dni, inputs, targets, state, synthetic, settings.clip, autocast
        )

    return once


# ------------------------------------------------------------------------------------- the tables


def race_of_pools(size, rounds, device):
    contestants = {form.__name__: pooling(form, size, device) for form in (pool, pool_loop)}
    title = f"The pooling alone, fp32, the loop under autograd; T, B, H = {size}"
    race(title, contestants, rounds, device)


def race_of_layers(size, precision, rounds, device):
    T, B, H = size
    kind = KINDS[precision]
    autocast = torch.autocast(device, kind, precision == "bf16")
    contestants = {
        "products": products([(H, 3 * H)], T * B, kind, device),
        "nn.LSTM": layer(nn.LSTM, size, autocast, device),
        "QRNN": layer(QRNN, size, autocast, device),
        "QRNN, compiled": layer(QRNN, size, autocast, device, compiled=True),
    }
    title = f"One layer, forward and backward, {precision}; T, B, H = {size}"
    race(title, contestants, rounds, device)


def race_of_steps(preset, precision, rounds, device):
    kind = KINDS[precision]
    autocast = torch.autocast(device, kind, precision == "bf16")
    settings = train.preset(preset, "bptt", "ptb")
    tokens = settings.chunk * settings.batch_size
    contestants = {"products": products(shapes_of(settings), tokens, kind, device)}
    for form in ("plain", "compiled"):
        for mode in ("bptt", "dni"):
            settings = train.preset(preset, mode, "ptb")
            contestants[f"{mode} {form}"] = step(settings, form, autocast, device)
    race(f"A whole training step, {preset}, {precision}", contestants, rounds, device)


def main():
    parser = argparse.ArgumentParser(
        description="How fast, against its matrix products and nn.LSTM?"
    )
    presets = ("small", "paper")
    parser.add_argument("--sizes", nargs="+", choices=presets, default=presets)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    train.keep_freed_memory()
    device, _ = train.pick_device("auto", "fp32")
    print(f"{study.machine()}; torch {torch.__version__}; {args.rounds} rounds")
    for preset in args.sizes:
        settings = train.preset(preset, "bptt", "ptb")
        size = (settings.chunk, settings.batch_size, settings.hidden_size)
        race_of_pools(size, args.rounds, device)
        for precision in KINDS:
            race_of_layers(size, precision, args.rounds, device)
            race_of_steps(preset, precision, args.rounds, device)


if __name__ == "__main__":
    main()
