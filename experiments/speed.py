"""How fast, against what: side by side, as tables.

    python experiments/speed.py                        about 25 minutes on two CPU cores
    python experiments/speed.py --sizes small          the small preset only (--tables: some tables only)

Contestants take turns, round after round, in one process: plain and compiled forms, BPTT and DNI. Beside them
is their FLOOR, the matrix products of the same step and nothing else (for y = x W^T: y itself, dW = dy^T x
and dx = dy W). A time is the median over the rounds. A ratio is the median of the rounds' own ratios, so that
a machine whose speed drifts drifts in both.

Peak memory and the time to compile are taken from a fresh process for each contestant, the compiler's cache
empty. Nothing else should be at work meanwhile.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import study
import train
from harness import machine, processes
from qrnn import QRNN, pool, pool_loop

PRESETS = {"small": train.SMALL, "paper": dataclasses.replace(train.PAPER, jitter=False)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 10_000                                                     # PTB's


# -------------------------------------------------------------------------------------------------- measuring

def seconds(function, device):
    """The time of one call, a GPU's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def side_by_side(contestants, rounds, device, title):
    """{name: function} -> {name: [seconds of each round]}; all of them take their turn in each round.

    Two rounds of warm-up.
    """
    times = {name: [] for name in contestants}
    for i in range(-2, rounds):
        tell(f"{title}: round {max(i + 1, 0)} of {rounds}")
        for name, function in contestants.items():
            taken = seconds(function, device)
            if i >= 0:
                times[name].append(taken)
    tell("")
    return times


def tell(text):
    """Progress: a line on stderr in place of the one before."""
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def ratio(times, name, other):
    """Median over the rounds of time(name) / time(other) in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def row(times, name, other, **more):
    return dict(what=name, ms=1e3 * statistics.median(times[name]), against=other,
                ratio=ratio(times, name, other), **more)


# ------------------------------------------------------------------------------------------------ contestants

def mixed(kind, device):
    """The autocast for products of this type."""
    return torch.autocast(device, kind, enabled=kind != torch.float32)


def products(shapes, rows, kind, device):
    """The matrix products of layers y = x W^T, forward and backward.

    shapes: [(inputs, outputs)]; rows of x: T B.
    """
    def random(*shape):
        return torch.randn(*shape, device=device).to(kind)
    layers = [(random(rows, i), random(o, i), random(rows, o)) for i, o in shapes]

    def once():
        for x, w, dy in layers:
            x @ w.t(), dy.t() @ x, dy @ w
    return once


def layer(module, T, B, H, kind, device):
    """Forward and backward of a recurrent module on T steps of B streams, every output with a gradient."""
    module.to(device).train()
    x, G = torch.randn(T, B, H, device=device).requires_grad_(), torch.randn(T, B, H, device=device)

    def once():
        with mixed(kind, device):
            y, _ = module(x)
        torch.autograd.grad(y, [x, *module.parameters()], G.to(y.dtype))
    return once


def pooling(form, T, B, H, device):
    """Forward and backward of the recurrence alone."""
    f, z, c0 = (a.to(device).requires_grad_()
                for a in (torch.rand(T, B, H), torch.randn(T, B, H), torch.randn(B, H)))
    G = torch.randn(T, B, H, device=device)

    def once():
        c = form(f, z, c0)
        torch.autograd.grad(c if torch.is_tensor(c) else c[0], [f, z, c0], G)
    return once


def indexing_loop(f, z, c0):
    """pool_loop, but with f[t] for the t-th step.

    The gradient of each such index is a (T, B, H) of zeros but for one row.
    """
    c, states = c0, []
    for t in range(len(f)):
        c = f[t] * c + (1 - f[t]) * z[t]
        states.append(c)
    return torch.stack(states)


def step(preset, mode, compiled, kind, device):
    """A whole training step of train.py on random text: forward, backward, g, clipping, Adam.

    mode: bptt, dni, or dni4 with g taught through 4 borders (--dni-bptt 4). Of several processes, this one's,
    with the gradients of the model averaged.
    """
    s = dataclasses.replace(PRESETS[preset], mode=mode.rstrip("4"), compile=compiled,
                            dni_bptt=4 if mode == "dni4" else 1)
    model, optimizer, dni = train.build(s, VOCABULARY, device)
    processes.average_gradients(model)
    model.train()
    text = torch.randint(VOCABULARY, (s.bptt + 1, s.batch_size), device=device)
    state, autocast = None, mixed(kind, device)

    def once():
        nonlocal state
        _, state = train.train_step(model, optimizer, dni, text[:-1], text[1:], state, dni is not None, s,
                                    autocast)
    return once


def shapes_of(s):
    """(inputs, outputs) of the products in a step: each layer's gates, and the decoder."""
    sizes = [s.embedding_size] + [s.hidden_size] * (s.num_layers - 1) + [s.embedding_size]
    gates = [(i * (s.window if n == 0 else 1), 3 * o) for n, (i, o) in enumerate(zip(sizes, sizes[1:]))]
    return gates + [(s.embedding_size, VOCABULARY)]


# ----------------------------------------------------------------------------------------------------- tables

def layers_table(sizes, rounds, device):
    rows = []
    for preset in sizes:
        s = PRESETS[preset]
        T, B, H = s.bptt, s.batch_size, s.hidden_size
        contestants = {f"LSTM {name}": layer(nn.LSTM(H, H), T, B, H, kind, device)
                       for name, kind in TYPES.items()}
        for name, kind in TYPES.items():
            contestants[f"products {name}"] = products([(H, 3 * H)], T * B, kind, device)
            contestants[f"plain {name}"] = layer(QRNN(H, H), T, B, H, kind, device)
            contestants[f"compiled {name}"] = layer(QRNN(H, H, compile=True), T, B, H, kind, device)
        times = side_by_side(contestants, rounds, device, f"layer, {preset}")
        fastest = min(("LSTM fp32", "LSTM bf16"), key=lambda name: statistics.median(times[name]))
        for name in contestants:
            rows.append(row(times, name, "products " + name[-4:], size=f"H={H} T={T} B={B}",
                            lstm=ratio(times, fastest, name)))
    return rows


def pooling_table(sizes, rounds, device):
    rows = []
    for preset in sizes:
        s = PRESETS[preset]
        size = s.bptt, s.batch_size, s.hidden_size
        forms = {"pool": pool, "pool_loop": pool_loop, "pool_loop, indexing f[t]": indexing_loop}
        contestants = {name: pooling(form, *size, device) for name, form in forms.items()}
        x, y = torch.ones(size, device=device), torch.empty(size, device=device)
        contestants["copy of one (T, B, H)"] = lambda: y.copy_(x)
        times = side_by_side(contestants, rounds, device, f"pooling, {preset}")
        rows += [row(times, name, "pool", size="T={} B={} H={}".format(*size)) for name in times]
    return rows


def steps_table(sizes, rounds, device):
    rows = []
    for preset in sizes:
        s = PRESETS[preset]
        tokens = s.bptt * s.batch_size
        for name, kind in TYPES.items():
            contestants = {"products": products(shapes_of(s), tokens, kind, device)}
            for form in ("plain", "compiled"):
                for mode in ("bptt", "dni", "dni4"):
                    contestants[f"{mode} {form}"] = step(preset, mode, form == "compiled", kind, device)
            times = side_by_side(contestants, rounds, device, f"step, {preset}, {name}")
            for what in contestants:
                mode, _, form = what.partition(" ")
                has_g = mode.startswith("dni")
                rows.append(row(times, what, "products", preset=preset, precision=name,
                                dni_bptt=ratio(times, what, f"bptt {form}") if has_g else None,
                                tokens=tokens / statistics.median(times[what]) if form else None))
    return rows


def growth_table(_, rounds, device):
    """One compiled layer and its products: time against T at H = 1550, and against H at T = 200."""
    networks, rows, B, kind = {}, [], 20, torch.bfloat16
    for axis, values in (("T", (50, 100, 200, 400, 800)), ("H", (200, 400, 800, 1600))):
        contestants = {}
        for n in values:
            T, H = (n, 1550) if axis == "T" else (200, n)
            network = networks.setdefault(H, QRNN(H, H, compile=True))
            contestants[f"layer {n}"] = layer(network, T, B, H, kind, device)
            contestants[f"products {n}"] = products([(H, 3 * H)], T * B, kind, device)
        times = side_by_side(contestants, rounds, device, f"growth with {axis}")
        rows += [row(times, f"layer {n}", f"layer {values[0]}", axis=axis, larger=n / values[0],
                     floor=ratio(times, f"layer {n}", f"products {n}"),
                     products=ratio(times, f"products {n}", f"products {values[0]}")) for n in values]
    return rows


def process_table(sizes, _, device):
    rows = []
    for preset in sizes:
        for name in TYPES:
            for what in ("bptt plain", "dni plain", "dni4 plain", "bptt compiled", "dni compiled"):
                tell(f"memory and compilation: {preset} {name} {what}")
                with tempfile.TemporaryDirectory() as cache:
                    process = subprocess.run(
                        [sys.executable, __file__, "--one", preset, *what.split(), name, device], check=True,
                        capture_output=True, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache})
                measured = json.loads(process.stdout.splitlines()[-1])
                rows.append(dict(preset=preset, precision=name, what=what, **measured))
    tell("")
    return rows


def one(preset, mode, form, name, device):
    """In a process of its own: eight steps; what they took beyond the usual is compilation.

    Prints a line of JSON.
    """
    machine.prepare(device, "fp32")
    once = step(preset, mode, form == "compiled", TYPES[name], device)
    taken = [seconds(once, device) for _ in range(8)]
    usual = statistics.median(taken[3:])
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # (getrusage would count the parent's memory in.)
        status = Path("/proc/self/status")
        peak = math.nan
        if status.exists():
            peak = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    print(json.dumps(dict(peak_gb=peak / 1e9,
                          compile_s=sum(taken[:3]) - 3 * usual if form == "compiled" else None)))


# name: (title, columns, function)
TABLES = {
    "layer": ("One layer, forward and backward", "size what ms ratio against lstm", layers_table),
    "pooling": ("The pooling alone, forward and backward, float32; the loops under autograd",
                "size what ms ratio against", pooling_table),
    "step": ("A whole training step", "preset precision what ms ratio against dni_bptt tokens", steps_table),
    "growth": ("Growth of a compiled layer with T and with H, products in bf16",
               "axis what larger ms ratio products floor", growth_table),
    "process": ("In a process of its own", "preset precision what peak_gb compile_s", process_table)}
HEADS = dict(what="", ms="ms", ratio="times", lstm="faster than nn.LSTM", dni_bptt="against bptt",
             tokens="tokens/s", size="size", preset="preset", precision="products in", against="of",
             axis="along", larger="of a size, times", products="its products, times",
             floor="of its products", peak_gb="peak GB", compile_s="compiling, s")


def show(title, rows, columns):
    def cell(value):
        if value is None:
            return ""
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 0.995 else f"{value:.2f}"
    heads = " | ".join(HEADS[c] for c in columns)
    print(f"\n{title}\n\n| {heads} |\n|" + "---|" * len(columns))
    for r in rows:
        print("| " + " | ".join(cell(r.get(c)) for c in columns) + " |")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(
        description="How fast is it, side by side with its floor and with nn.LSTM?")
    parser.add_argument("--sizes", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which; all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(*arguments.one)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    sizes, rounds, device = arguments.sizes, arguments.rounds, arguments.device
    machine.prepare(device, "fp32")                                     # "fp32": `mixed` sets the precision
    where = f"{study.processor()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {rounds} rounds")
    for name in arguments.tables:
        title, columns, make = TABLES[name]
        show(title, make(sizes, rounds, device), columns.split())


if __name__ == "__main__":
    main()
