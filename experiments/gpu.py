"""What to do with a GPU for a quarter of an hour: the most valuable first, and nothing lost.

    python experiments/gpu.py --out OUT --seconds 570                            all stages, in this order
    python experiments/gpu.py --out OUT --seconds 130 --stages trainings         go on with the trainings
    python experiments/gpu.py --out OUT --method alternating --epochs 320        one training, and no more
    python experiments/gpu.py --out OUT --device cpu --scale tiny                try this script out

    environment   environment.json   the machine, its ceilings, products of the paper's sizes, the pooling
    correctness   tests.txt          the tests marked cuda
                  agreement.csv      a small training of each method, without dropout: CPU beside GPU
    steps         steps.csv          a training step, plain and compiled; nn.LSTM; launches; peak memory
                  profile.txt        of each, the 15 operations that take longest
    sharing       sharing.csv        four epochs of train.py, one training at a time and three at once
    trainings     trainings.csv      the paper's five methods, at as many epochs as all of them have time for
Each stage is a process with a limit of its own. report.txt has it all. A later call goes on with trainings.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
import reproduce
import speed
import study
import torch
import train

TRAIN, ORDER = study.ROOT / "train.py", ("bptt", "dni", "alternating", "restart", "dni-restart")
SMALL = (
    "--chunk 20 --batch-size 60 --hidden-size 24 --embedding-size 16 --dropout-input 0 "
    "--dropout-hidden 0 --dropout-output 0"
).split()
SCALES = {
    "paper": ("paper", "ptb", [], 320),
    "tiny": ("small", "recall", SMALL, 4),
}  # .., epochs at most


def start(arguments, said):
    with open(said, "a") as file:
        return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=file, stderr=file)


def flags(a, method, epochs):
    """Those of train.py for a method that has so many epochs; compiled where steps.csv finds that faster."""
    preset, data, more, _ = SCALES[a.scale]
    ms = {row["what"]: float(row["ms"]) for row in study.read_log(a.out / "steps.csv")}
    compiled = ["--compile"] if ms.get("dni compiled", 1e9) < 0.95 * ms.get("dni plain", 0) else []
    return [
        *reproduce.arguments(preset, data, method, epochs),
        *more,
        *compiled,
        "--device",
        a.device,
    ]


def environment(a):
    s, n = reproduce.settings_of(flags(a, "bptt", 1)), 2**29 if a.device == "cuda" else 2**21
    rows, size = s.chunk * s.batch_size, (s.chunk, s.batch_size, s.hidden_size)

    def rate(function, amount):  # a second, in units of 10^12
        return amount / min(speed.seconds(function, a.device, times) for times in (3, 20)) / 1e12

    x, y = torch.randn(2, n, device=a.device)
    pooling = speed.both_ways(
        speed.pool, (size, size, size[1:]), size, contextlib.nullcontext(), a.device
    )
    facts = {
        "machine": f"{study.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": sys.version,
        "copy, TB/s": rate(lambda: y.copy_(x), 2 * x.nbytes),
        "pooling, TB/s": rate(pooling, 9 * 4 * rows * s.hidden_size),
    }  # 3 forward, 6 backward
    # 1550 numbers of 16 bits are no multiple of 16 bytes, for which the fastest kernels ask. 1552 are.
    for width in (s.hidden_size, -(-s.hidden_size // 8) * 8, -(-s.hidden_size // 64) * 64):
        shapes = speed.shapes_of(dataclasses.replace(s, hidden_size=width))
        once = speed.products(shapes, rows, torch.bfloat16, a.device)
        facts[f"products of {width}, TFLOP/s"] = rate(
            once, sum(6 * rows * i * o for i, o in shapes)
        )
    (a.out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")


def correctness(a):
    tests = start(
        [
            "-m",
            "pytest",
            "-q",
            study.ROOT / "test_all.py",
            "-m",
            "slow or not slow",
            "-k",
            "cuda" if a.device == "cuda" else "pooling_loop",
        ],
        a.out / "tests.txt",
    )
    rows, os.environ["NVIDIA_TF32_OVERRIDE"] = [], "0"  # products in float32 alone
    for method in ORDER:
        found = []
        for device in ("cpu", a.device):
            folder = tempfile.mkdtemp()
            train.main(
                [
                    *map(str, reproduce.arguments("small", "recall", method, 1)),
                    *SMALL,
                    "--jitter",
                    "--precision",
                    "fp32",
                    "--device",
                    device,
                    "--out",
                    folder,
                ]
            )
            found.append(float(study.read_log(Path(folder, "log.csv"))[-1]["valid_perplexity"]))
        rows.append(
            dict(method=method, cpu=found[0], gpu=found[1], differs_by=abs(found[1] / found[0] - 1))
        )
        study.write_log(a.out / "agreement.csv", rows)
    if tests.wait() or max(report.numbers(rows, "differs_by")) > 1e-3:
        sys.exit("see tests.txt and agreement.csv")


def steps(a):
    s, dni = (reproduce.settings_of(flags(a, mode, 1)) for mode in ("bptt", "dni"))
    kind, size, rows = torch.bfloat16, (s.chunk, s.batch_size, s.hidden_size), []
    autocast, shapes = torch.autocast(a.device, kind), speed.shapes_of(s)
    makers = {
        "products": lambda: speed.products(shapes, size[0] * size[1], kind, a.device),
        "QRNN layer": lambda: speed.layer(speed.QRNN, size, autocast, a.device),
        "nn.LSTM layer": lambda: speed.layer(torch.nn.LSTM, size, autocast, a.device),
    }
    for form, mode in itertools.product(("plain", "compiled"), (s, dni)):
        makers[f"{mode.mode} {form}"] = lambda f=form, m=mode: speed.step(m, f, autocast, a.device)
    for what, make in makers.items():
        once = make()
        first, ms = 5 * speed.seconds(once, a.device, 5), 1e3 * speed.seconds(once, a.device, 50)
        with torch.profiler.profile() as profile:
            speed.seconds(once, a.device, 3)
        table = profile.key_averages()
        kernels = [
            e for e in table if str(e.device_type).endswith("CUDA") and not e.is_user_annotation
        ]
        rows.append(
            {
                "what": what,
                "s for the first five": first,
                "ms": ms,
                "launches": sum(e.count for e in kernels) / 3,
                "GPU ms": sum(e.self_device_time_total for e in kernels) / 3e3,
                "peak GB": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
        study.write_log(a.out / "steps.csv", rows)
        order = "self_device_time_total" if kernels else "self_cpu_time_total"
        with open(a.out / "profile.txt", "a") as file:
            print(
                f"\n{what}, three times",
                table.table(order, 15, max_name_column_width=70),
                file=file,
            )


def sharing(a):
    rows, work = [], Path(tempfile.mkdtemp())
    for number in (1, 3):
        began, folders = time.monotonic(), {m: work / f"{m}{number}" for m in ORDER[1 : 1 + number]}
        runs = [
            start([TRAIN, *flags(a, m, 4), "--out", out], work / "said")
            for m, out in folders.items()
        ]
        if any([process.wait() for process in runs]):
            sys.exit((work / "said").read_text())
        logs = [
            report.numbers(study.read_log(out / "log.csv"), "seconds") for out in folders.values()
        ]
        epoch = max((log[-1] - log[0]) / 3 for log in logs)  # the first may have compiled
        besides = time.monotonic() - began - 4 * epoch
        rows.append({"at once": number, "s an epoch": epoch, "s besides": besides})
        study.write_log(a.out / "sharing.csv", rows)


def trainings(a):
    left, (*_, most) = a.seconds - 25, SCALES[a.scale]
    methods, deadline, running = [a.method] if a.method else ORDER, time.monotonic() + left, {}
    home = (
        study.ROOT
        / "trainings"
        / f"gpu-{a.scale}-{f'{a.method}-{a.epochs}' if a.method else 'five'}"
    )
    home.mkdir(parents=True, exist_ok=True)
    if (home / "plan.json").exists():
        made = json.loads((home / "plan.json").read_text())
    else:
        ways = {
            1: a.epochs if a.method else max(1, int(left / 30))
        }  # {trainings at once: epochs of each}
        for row in study.read_log(a.out / "sharing.csv") if not a.method else ():
            number, epoch, besides = (
                float(row[name]) for name in ("at once", "s an epoch", "s besides")
            )
            epochs = (0.95 * left / -(-len(ORDER) // number) - besides) / epoch
            ways[int(number)] = max(1, min(most, int(epochs)))
        number = max(ways, key=ways.get)
        made = dict(at_once=number, epochs=ways[number], tested={})
    to_do = [m for m in methods if m not in made["tested"]]
    while (to_do or running) and time.monotonic() < deadline:
        while to_do and len(running) < made["at_once"]:
            m = to_do.pop(0)
            running[m] = start(
                [TRAIN, *flags(a, m, made["epochs"]), "--resume", home / m], home / f"{m}.txt"
            )
        time.sleep(1)
        for m in [m for m, process in running.items() if process.poll() is not None]:
            if running.pop(m).returncode == 0:
                made["tested"][m] = float((home / f"{m}.txt").read_text().split()[-1])
        (home / "plan.json").write_text(json.dumps(made))
        rows = [
            {
                "method": m,
                "epochs planned": made["epochs"],
                "at once": made["at_once"],
                **row,
                "test_perplexity": made["tested"].get(m, ""),
            }
            for m in methods
            for row in study.read_log(home / m / "log.csv")
        ]
        if rows:
            study.write_log(a.out / "trainings.csv", rows)
    sys.exit(None if len(made["tested"]) == len(methods) else f"unfinished, see {home}")


def alone(stage, a):
    os.setsid()  # a process group of its own
    stage(a)


def main():
    stages = {
        environment: 60,
        correctness: 130,
        steps: 150,
        sharing: 110,
        trainings: 1e9,
    }  # s at most
    parser, names = (
        argparse.ArgumentParser(description=__doc__.split("\n")[0]),
        [f.__name__ for f in stages],
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for eight files")
    parser.add_argument("--seconds", type=float, default=570, help="for everything [%(default)g]")
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--method", choices=reproduce.METHODS, help="one training alone")
    parser.add_argument("--epochs", type=int, default=320, help="of --method")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of all the processes
    a, told = parser.parse_args(), []
    end = time.monotonic() + a.seconds
    a.out.mkdir(parents=True, exist_ok=True)
    for stage, limit in stages.items():
        a.seconds = min(limit, end - time.monotonic() - 15)
        if stage.__name__ in (["trainings"] if a.method else a.stages) and a.seconds > 40:
            process = multiprocessing.get_context("spawn").Process(target=alone, args=(stage, a))
            process.start()
            process.join(a.seconds)
            told.append(f"{stage.__name__}: exit status {process.exitcode} (None: stopped)")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # whatever of it still runs
            files = [
                f"{path.name}\n{path.read_text()}"
                for path in sorted(a.out.iterdir())
                if path.suffix in (".json", ".csv") and path.stem != "trainings"
            ]
            (a.out / "report.txt").write_text("\n\n".join(told + files))
            print(told[-1], flush=True)


if __name__ == "__main__":
    main()
