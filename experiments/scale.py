"""What does a second process bring, and what would hundreds? Measured here, and reckoned on paper.

    python experiments/scale.py                    the small preset on this machine's cores, about 5 minutes
    python experiments/scale.py --preset paper     the paper's size, about 15

The B streams of a training step (train.py, mode bptt, random text, a vocabulary of 10,000) are divided among
the processes, as torchrun and train.py do it. Every configuration takes its turn in every round, in new
processes. A figure is the median over the rounds of a process's median step. Nothing else should be at work
meanwhile.

On paper, each of N GPUs has B streams of its own. It does its step's arithmetic at so many operations a
second. Then it sends 2 (N - 1) / N times the bytes of all gradients, to average them in a ring, through a
link of so many bytes a second: the first speed inside a machine of 8, the second from one machine to the
next.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys

import torch

import speed
import study
import train

from harness import machine, processes

PTB = 929_589                                                           # tokens of its training text


def worker(preset, kind):
    """One of a configuration's processes. Process 0 prints the ms of a step and of the averaging in it."""
    machine.keep_freed_memory()
    _, number = processes.join("cpu")
    s = speed.PRESETS[preset]
    speed.PRESETS["part"] = dataclasses.replace(s, batch_size=s.batch_size // number)
    step = speed.step("part", "bptt", False, speed.TYPES[kind], "cpu")
    steps = [speed.seconds(step, "cpu") for _ in range(11)][3:]
    gradients = [torch.zeros_like(p) for p in train.build(s, speed.VOCABULARY, "cpu")[0].parameters()]
    averages = [speed.seconds(lambda: average(gradients), "cpu") for _ in range(11)][3:]
    print(json.dumps([1e3 * statistics.median(steps), 1e3 * statistics.median(averages)]))


def average(gradients):
    """What processes.average_gradients does in a step, all gradients at once."""
    if torch.distributed.is_initialized():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()


def measure(preset, kind, number, threads):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command = [sys.executable, *(torchrun if number > 1 else []), __file__, "--worker", preset, kind]
    process = subprocess.run(command, check=True, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return json.loads(process.stdout.splitlines()[-1])


def on_paper(preset, operations, inside, between):
    s = speed.PRESETS[preset]
    model, _, _ = train.build(s, speed.VOCABULARY, "cpu")
    size = 4 * machine.parameters(model)                                # bytes, float32
    # Three products for each weight: forward, dW, dx.
    work = 3 * 2 * sum(i * o for i, o in speed.shapes_of(s)) * s.bptt * s.batch_size
    print(f"\nOn paper, {preset}: {work / 1e9:,.0f} GFLOP a step of {s.bptt} x {s.batch_size} tokens at "
          f"{operations / 1e12:,.0f} TFLOP/s, {size / 1e6:,.0f} MB of gradients at {inside / 1e9:,.0f} GB/s "
          f"among 8 GPUs, {between / 1e9:,.0f} beyond\n\n"
          "| GPUs | arithmetic, ms | averaging, ms | of N times one GPU's tokens/s "
          "| chunks in an epoch of PTB |\n|---|---|---|---|---|")
    for n in (1, 2, 8, 64, 512):
        arithmetic = work / operations
        averaging = 2 * (n - 1) / n * size / (inside if n <= 8 else between)
        print(f"| {n} | {1e3 * arithmetic:.2f} | {1e3 * averaging:.2f} "
              f"| {arithmetic / (arithmetic + averaging):.0%} | {PTB / (n * s.batch_size * s.bptt):.1f} |")


def main():
    parser = argparse.ArgumentParser(
        description="What does a second process bring, and what would hundreds?")
    parser.add_argument("--preset", choices=("small", "paper"), default="small")
    parser.add_argument("--precision", choices=speed.TYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", type=float, default=400e12,
                        help="of a GPU a second, on paper [%(default)g]")
    parser.add_argument("--links", type=float, nargs=2, default=(450e9, 50e9),
                        help="bytes a second inside and between machines, on paper")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    preset, kind, cores = arguments.preset, arguments.precision, torch.get_num_threads()
    s = speed.PRESETS[preset]
    configurations = sorted({(1, 1), (1, cores), (2, max(1, cores // 2))})
    taken = {c: [] for c in configurations}
    for i in range(arguments.rounds):
        print(f"\r\033[Kround {i + 1} of {arguments.rounds}", end="", file=sys.stderr, flush=True)
        for c in configurations:
            taken[c].append(measure(preset, kind, *c))
    print("\r\033[K", end="", file=sys.stderr)
    print(f"{study.processor()}, {cores} threads; torch {torch.__version__}; preset {preset}, {kind}; "
          f"{arguments.rounds} rounds\n\n"
          "| processes | threads in each | ms a step | of which averaging | tokens/s "
          f"| against one process of {cores} threads |\n|---|---|---|---|---|---|")
    for c in configurations:
        ms, averaging = (statistics.median(column) for column in zip(*taken[c]))
        against = statistics.median(whole[0] / mine[0] for whole, mine in zip(taken[1, cores], taken[c]))
        print(f"| {c[0]} | {c[1]} | {ms:.0f} | {averaging if c[0] > 1 else 0:.0f} "
              f"| {1e3 * s.bptt * s.batch_size / ms:,.0f} | {against:.2f} |")
    on_paper("paper", arguments.operations, *arguments.links)


if __name__ == "__main__":
    main()
