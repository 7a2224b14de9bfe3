"""How fast, against the matrix products that no form can do without, and against nn.LSTM.

    python experiments/speed.py                   on two CPU cores some 25 minutes
    python experiments/speed.py --sizes small     the small preset only: two minutes

The contestants take turns, round after round. `products` are those of the same step and nothing else (for
y = x W^T: y itself, dW = dy^T x and dx = dy W). A time is the median over the rounds; `times` is the median
of each round's own ratio to the contestant named. Nothing else should be at work meanwhile.
"""

import argparse
import itertools
import resource
import statistics
import time

import study
import torch
import train
from torch import nn

from qrnn import QRNN, pool, pool_loop

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 10_000                                                     # PTB's


def table(title, contestants, against, rounds, device):
    """Print a table of contestants, {name: function}. against: how the one to divide by begins."""
    times = {name: [] for name in contestants}
    for i, (name, function) in itertools.product(range(-3, rounds), contestants.items()):  # 3 to warm up
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 0:
            times[name].append(time.perf_counter() - began)
    [other] = [its for name, its in times.items() if name.startswith(against)]
    print(f"\n{title}\n\n|  | ms | times | of |\n|---|---|---|---|")
    for name, its in times.items():
        ratio = statistics.median(a / b for a, b in zip(its, other))
        print(f"| {name} | {1e3 * statistics.median(its):,.2f} | {ratio:.2f} | {against} |", flush=True)


def products(shapes, rows, kind, device):
    """The products of layers y = x W^T, forward and backward. shapes: [(inputs, outputs)]; rows of x: T B."""
    layers = [[torch.randn(shape, device=device).to(kind) for shape in ((rows, i), (o, i), (rows, o))]
              for i, o in shapes]
    return lambda: [(x @ w.t(), dy.t() @ x, dy @ w) for x, w, dy in layers]


def layer(module, size, autocast, device):
    """Forward and backward of a recurrent module, every output with a gradient. size: T, B, H."""
    module.to(device).train()
    x, G = torch.randn(size, device=device).requires_grad_(), torch.randn(size, device=device)

    def once():
        with autocast:
            y, _ = module(x)
        torch.autograd.grad(y, [x, *module.parameters()], G.to(y.dtype))
    return once


def pooling(form, size, device):
    """Forward and backward of the recurrence alone."""
    leaves = torch.rand(size), torch.randn(size), torch.randn(size[1:])
    f, z, c0 = (leaf.to(device).requires_grad_() for leaf in leaves)
    G = torch.randn(size, device=device)

    def once():
        c = form(f, z, c0)
        torch.autograd.grad(c if torch.is_tensor(c) else c[0], [f, z, c0], G)
    return once


def step(preset, mode, form, autocast, device):
    """A whole training step on random text. mode: bptt, dni, or dni4 (g taught through 4 borders)."""
    flags = ["--preset", preset, "--mode", mode.rstrip("4")]
    flags += ["--dni-borders", "4"] if mode == "dni4" else []
    settings, _, _ = train.parse(flags)
    model, optimizer, dni = train.build(settings, VOCABULARY, device)
    if form == "compiled":
        train.compile_modules([model, *([dni.g] if dni else [])])
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
    print(f"{study.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}; "
          f"{a.rounds} rounds")
    for preset in a.sizes:
        s = train.preset(preset, "bptt", "ptb")
        H, rows, size = s.hidden_size, s.chunk * s.batch_size, (s.chunk, s.batch_size, s.hidden_size)
        table(f"The pooling alone, fp32, the loop under autograd; T, B, H = {size}", {
            "Pool": pooling(pool, size, device), "pool_loop": pooling(pool_loop, size, device)},
            "Pool", a.rounds, device)
        sizes = [s.embedding_size] + [H] * (s.num_layers - 1) + [s.embedding_size]
        shapes = [(i * (2 if n == 0 else 1), 3 * o) for n, (i, o) in enumerate(zip(sizes, sizes[1:]))]
        for name, kind in TYPES.items():
            autocast = torch.autocast(device, kind, kind != torch.float32)
            torch.compiler.reset()                                      # it keeps eight forms at most
            compiled = QRNN(H, H)
            train.compile_modules([compiled])
            table(f"One layer, forward and backward, {name}; T, B, H = {size}", {
                "products": products([(H, 3 * H)], rows, kind, device),
                "nn.LSTM": layer(nn.LSTM(H, H), size, autocast, device),
                "QRNN": layer(QRNN(H, H), size, autocast, device),
                "QRNN, compiled": layer(compiled, size, autocast, device)}, "products", a.rounds, device)
            shapes = [*shapes, (s.embedding_size, VOCABULARY)]
            contestants = {"products": products(shapes, rows, kind, device)}
            for form, mode in itertools.product(("plain", "compiled"), ("bptt", "dni", "dni4")):
                contestants[f"{mode} {form}"] = step(preset, mode, form, autocast, device)
            table(f"A whole training step, {preset}, {name}", contestants, "products", a.rounds, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss
    print(f"\npeak memory of all this together: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
