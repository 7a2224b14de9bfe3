"""What does a second process bring, and what would hundreds? Measured here, and reckoned on paper.

    python experiments/scale.py                    the small preset on this machine's cores, about 5 minutes
    python experiments/scale.py --preset paper     the paper's size, about 15

The B streams of a training step (train.py, mode bptt, random text, a vocabulary of 10,000) are divided among the processes,
as torchrun and train.py do it. Every configuration takes its turn in every round, in new processes; a figure is the median
over the rounds of a process's median step. Nothing else should run meanwhile.

On paper, each of N GPUs has B streams of its own. It does its step's arithmetic at so many operations a second; then it sends
2 (N - 1) / N times the bytes of all gradients, to average them in a ring, through a link of so many bytes a second: the
first speed inside a machine of 8, the second from one machine to the next.
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

PTB = 929_589                                                                                      # tokens of its training text


def worker(preset, kind):
    """One process of a configuration: the milliseconds of a step and of the averaging in it, from process 0."""
    train.keep_freed_memory()
    rank, processes = train.join_processes("cpu")
    s = speed.PRESETS[preset]
    speed.PRESETS["part"] = dataclasses.replace(s, batch_size=s.batch_size // processes)
    run = speed.step("part", "bptt", False, speed.TYPES[kind], "cpu")
    steps = [speed.seconds(run, "cpu") for _ in range(11)][3:]
    gradients = [torch.zeros_like(p) for p in train.build(s, speed.VOCABULARY, "cpu")[0].parameters()]
    averages = [speed.seconds(lambda: train.average(gradients), "cpu") for _ in range(11)][3:]
    print(json.dumps([1e3 * statistics.median(steps), 1e3 * statistics.median(averages)]))


def measure(preset, kind, processes, threads):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    run = subprocess.run([sys.executable, *torchrun, __file__, "--worker", preset, kind], check=True, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return json.loads(run.stdout.splitlines()[-1])


def on_paper(preset, operations, inside, between):
    s = speed.PRESETS[preset]
    size = 4 * train.parameters(train.build(s, speed.VOCABULARY, "cpu")[0])                        # bytes, float32
    work = 3 * 2 * sum(i * o for i, o in speed.shapes_of(s)) * s.bptt * s.batch_size               # forward, dW, dx
    print(f"\nOn paper, {preset}: {work / 1e9:,.0f} GFLOP a step of {s.bptt} x {s.batch_size} tokens at {operations / 1e12:,.0f} TFLOP/s, "
          f"{size / 1e6:,.0f} MB of gradients at {inside / 1e9:,.0f} GB/s among 8 GPUs, {between / 1e9:,.0f} beyond\n\n"
          "| GPUs | arithmetic, ms | averaging, ms | of N times one GPU's tokens/s | chunks in an epoch of PTB |\n|---|---|---|---|---|")
    for n in (1, 2, 8, 64, 512):
        arithmetic, averaging = work / operations, 2 * (n - 1) / n * size / (inside if n <= 8 else between)
        print(f"| {n} | {1e3 * arithmetic:.2f} | {1e3 * averaging:.2f} | {arithmetic / (arithmetic + averaging):.0%} "
              f"| {PTB / (n * s.batch_size * s.bptt):.1f} |")


def main():
    parser = argparse.ArgumentParser(description="What does a second process bring, and what would hundreds?")
    parser.add_argument("--preset", choices=("small", "paper"), default="small")
    parser.add_argument("--precision", choices=speed.TYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", type=float, default=400e12, help="of a GPU a second, on paper [%(default)g]")
    parser.add_argument("--links", type=float, nargs=2, default=(450e9, 50e9), help="bytes a second inside and between machines, on paper")
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
    print(f"{study.processor()}, {cores} threads; torch {torch.__version__}; preset {preset}, {kind}; {arguments.rounds} rounds\n\n"
          f"| processes | threads in each | ms a step | of which averaging | tokens/s | against one process of {cores} threads |\n|---|---|---|---|---|---|")
    for c in configurations:
        ms, averaging = (statistics.median(column) for column in zip(*taken[c]))
        against = statistics.median(whole[0] / mine[0] for whole, mine in zip(taken[1, cores], taken[c]))
        print(f"| {c[0]} | {c[1]} | {ms:.0f} | {averaging if c[0] > 1 else 0:.0f} | {1e3 * s.bptt * s.batch_size / ms:,.0f} | {against:.2f} |")
    on_paper("paper", arguments.operations, *arguments.links)


if __name__ == "__main__":
    main()
