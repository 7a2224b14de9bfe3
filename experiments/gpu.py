"""What to measure on a GPU in a quarter of an hour, the most valuable first.

    python experiments/gpu.py --out OUT --seconds 570                       all stages, in order
    python experiments/gpu.py --out OUT --seconds 130 --stages trainings    resume the trainings
    python experiments/gpu.py --out OUT --method alternating --epochs 320   one training, no more
    python experiments/gpu.py --out OUT --device cpu --scale tiny           try this script out

Look at OUT/report.txt first. It begins with a line for each stage: its exit status, and where it
failed, which files to look at. Then come the files themselves, all but those of many lines.

    stage         file               what is in it
    environment   environment.json   the machine; its speed in copies, products and the pooling
    correctness   tests.txt          the tests marked cuda
                  agreement.csv      a small training of each method, no dropout: CPU beside GPU
    steps         steps.csv          a training step, plain and compiled; nn.LSTM; launches; memory
                  profile.txt        of each, the 15 operations that take longest
    sharing       sharing.csv        four epochs of train.py, one training alone and three at once
    trainings     trainings.csv      the paper's five methods, with as many epochs as time allows

Nothing is lost when this script is cut off. Each stage is a process of its own, and writes its
files as it goes. At the paper's size it also has a time limit of its own, so that one that hangs
leaves time to the next. A later call resumes the trainings.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import study

import torch

import report
import reproduce
import speed
import train

TRAIN = study.ROOT / "train.py"
FIVE = (
    "bptt",
    "dni",
    "alternating",
    "restart",
    "dni-restart",
)  # the paper's methods, in order of worth
TINY = (
    "--chunk 20 --batch-size 60 --hidden-size 24 --embedding-size 16 "
    "--dropout-input 0 --dropout-hidden 0 --dropout-output 0"
).split()


class Scale(NamedTuple):
    preset: str  # of train.py
    data: str
    flags: list  # more flags of train.py
    epochs: int  # of each training, at most


SCALES = {"paper": Scale("paper", "ptb", [], 320), "tiny": Scale("small", "recall", TINY, 4)}


def start(arguments, said):
    """Start python with these arguments. What it prints is added to the file `said`."""
    command = [sys.executable, *map(str, arguments)]
    with open(said, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def compiling_pays(args):
    """Whether a compiled step takes less than 95% of the time of a plain one, by steps.csv."""
    ms = {row["what"]: float(row["ms"]) for row in study.read_log(args.out / "steps.csv")}
    if "dni plain" not in ms or "dni compiled" not in ms:
        return False
    return ms["dni compiled"] < 0.95 * ms["dni plain"]


def flags(args, method, epochs):
    """The flags of train.py for a method and a number of epochs, compiled where that pays."""
    scale = SCALES[args.scale]
    chosen = reproduce.arguments(scale.preset, scale.data, method, epochs) + scale.flags
    if compiling_pays(args):
        chosen.append("--compile")
    return [*chosen, "--device", args.device]


def kind_of(device):
    """The dtype of products: bf16 on a GPU. A CPU, which only tries this out, may lack it."""
    return torch.bfloat16 if device == "cuda" else torch.float32


# ------------------------------------------------------------------------------------- environment


def next_multiple(number, of):
    return math.ceil(number / of) * of


def environment(args):
    """Write environment.json: the machine, and what it reaches at its best."""

    def rate(function, amount):
        """What the function does in a second, in units of 10^12. amount: what one call does."""
        fastest = min(speed.seconds(function, args.device, times) for times in (3, 20))
        return amount / fastest / 1e12

    settings = reproduce.settings_of(flags(args, "bptt", 1))
    size = (settings.chunk, settings.batch_size, settings.hidden_size)
    numbers = 2**29 if args.device == "cuda" else 2**21
    x = torch.randn(numbers, device=args.device)
    y = torch.randn(numbers, device=args.device)
    pooling = speed.pooling(speed.pool, size, args.device)
    pooled = 9 * 4 * math.prod(size)  # bytes: 3 tensors forward and 6 backward, in float32
    facts = {
        "machine": f"{study.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": sys.version,
        "copy, TB/s": rate(functools.partial(y.copy_, x), 2 * x.nbytes),
        "pooling, TB/s": rate(pooling, pooled),
    }
    # The fastest kernels need rows of a multiple of 16 bytes: in bf16 1552 numbers, not 1550.
    H = settings.hidden_size
    rows = settings.chunk * settings.batch_size
    for width in (H, next_multiple(H, 8), next_multiple(H, 64)):
        shapes = speed.shapes_of(dataclasses.replace(settings, hidden_size=width))
        products = speed.products(shapes, rows, kind_of(args.device), args.device)
        operations = sum(6 * rows * inputs * outputs for inputs, outputs in shapes)
        facts[f"products of {width}, TFLOP/s"] = rate(products, operations)
    (args.out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")


# ------------------------------------------------------------------------------------- correctness


def valid_perplexity(method, device):
    """The perplexity of the validation text after a tiny training of one epoch."""
    folder = tempfile.mkdtemp()
    options = [*reproduce.arguments("small", "recall", method, 1), *TINY, "--jitter"]
    options += ["--precision", "fp32", "--device", device, "--out", folder]
    train.main(list(map(str, options)))
    return float(study.read_log(Path(folder, "log.csv"))[-1]["valid_perplexity"])


def correctness(args):
    """Run the tests; beside them train each method on CPU and GPU. Fails where the two disagree."""
    tests = "cuda" if args.device == "cuda" else "pooling_loop"
    pytest = ["-m", "pytest", "-q", study.ROOT / "test_all.py", "-m", "slow or not slow"]
    testing = start([*pytest, "-k", tests], args.out / "tests.txt")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # from here on, products in float32 alone
    rows = []
    for method in FIVE:
        cpu = valid_perplexity(method, "cpu")
        gpu = valid_perplexity(method, args.device)
        rows.append(dict(method=method, cpu=cpu, gpu=gpu, differs_by=abs(gpu / cpu - 1)))
        study.write_log(args.out / "agreement.csv", rows)
    failed = testing.wait() != 0
    if failed or max(report.numbers(rows, "differs_by")) > 1e-3:
        sys.exit("a test failed, or the GPU's perplexity is not the CPU's")


# ------------------------------------------------------------------------------------------- steps


def is_kernel(event):
    """Whether an event of the profiler is work of the GPU, and not a mark of the program's own."""
    return str(event.device_type).endswith("CUDA") and not event.is_user_annotation


def steps(args):
    """Time and profile a training step, and what it is made of: steps.csv, profile.txt."""
    device = args.device
    bptt = reproduce.settings_of(flags(args, "bptt", 1))
    dni = reproduce.settings_of(flags(args, "dni", 1))
    size = (bptt.chunk, bptt.batch_size, bptt.hidden_size)
    tokens = bptt.chunk * bptt.batch_size
    kind = kind_of(device)
    autocast = torch.autocast(device, kind, kind != torch.float32)
    layer = functools.partial(speed.layer, size=size, autocast=autocast, device=device)
    makers = {  # functions that make a contestant; made one after the other, they share the memory
        "products": functools.partial(speed.products, speed.shapes_of(bptt), tokens, kind, device),
        "QRNN layer": functools.partial(layer, speed.QRNN),
        "nn.LSTM layer": functools.partial(layer, torch.nn.LSTM),
    }
    for form in ("plain", "compiled"):
        for settings in (bptt, dni):
            makers[f"{settings.mode} {form}"] = functools.partial(
                speed.step, settings, form, autocast, device
            )
    rows = []
    for what, make in makers.items():
        once = make()
        first = 5 * speed.seconds(once, device, 5)
        ms = 1e3 * speed.seconds(once, device, 50)
        with torch.profiler.profile() as profile:
            speed.seconds(once, device, 3)
        events = profile.key_averages()
        kernels = [event for event in events if is_kernel(event)]
        rows.append(
            {
                "what": what,
                "s for the first five": first,
                "ms": ms,
                "launches": sum(event.count for event in kernels) / 3,
                "GPU ms": sum(event.self_device_time_total for event in kernels) / 3e3,
                "peak GB": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
        study.write_log(args.out / "steps.csv", rows)
        order = "self_device_time_total" if kernels else "self_cpu_time_total"
        longest = events.table(order, 15, max_name_column_width=70)
        with open(args.out / "profile.txt", "a") as file:
            print(f"\n{what}, three times", longest, file=file)


# ----------------------------------------------------------------------------------------- sharing


def sharing(args):
    """Time four epochs of one training, and of three at once: sharing.csv."""
    rows = []
    work = Path(tempfile.mkdtemp())
    said = work / "said"
    for number in (1, 3):
        began = time.monotonic()
        methods = FIVE[1 : 1 + number]
        folders = [work / f"{method}{number}" for method in methods]
        processes = [
            start([TRAIN, *flags(args, method, 4), "--out", folder], said)
            for method, folder in zip(methods, folders)
        ]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            sys.exit(said.read_text())
        logs = [report.numbers(study.read_log(folder / "log.csv"), "seconds") for folder in folders]
        epoch = max((log[-1] - log[0]) / 3 for log in logs)  # the first may have compiled
        besides = time.monotonic() - began - 4 * epoch
        rows.append({"at once": number, "s an epoch": epoch, "s besides": besides})
        study.write_log(args.out / "sharing.csv", rows)


# --------------------------------------------------------------------------------------- trainings


def plan_of(args, seconds):
    """What `trainings` does: {"at_once": trainings at a time, "epochs": of each, "tested": {}}.

    sharing.csv says how long an epoch takes in one training alone, and with three at once. The plan
    is the one in which the five methods get more epochs within the seconds.
    """
    if args.method:
        return dict(at_once=1, epochs=args.epochs, tested={})
    epochs = {1: max(1, int(seconds / 30))}  # {trainings at once: epochs of each}; a first guess
    for row in study.read_log(args.out / "sharing.csv"):
        number = int(row["at once"])
        turns = math.ceil(len(FIVE) / number)
        seconds_of_epochs = 0.95 * seconds / turns - float(row["s besides"])
        fit = int(seconds_of_epochs / float(row["s an epoch"]))
        epochs[number] = max(1, min(SCALES[args.scale].epochs, fit))
    at_once = max(epochs, key=epochs.get)
    return dict(at_once=at_once, epochs=epochs[at_once], tested={})


def write_trainings(args, methods, home, plan):
    """Gather the logs of the trainings in trainings.csv."""
    rows = []
    for method in methods:
        for row in study.read_log(home / method / "log.csv"):
            before = {
                "method": method,
                "epochs planned": plan["epochs"],
                "at once": plan["at_once"],
            }
            rows.append({**before, **row, "test_perplexity": plan["tested"].get(method, "")})
    if rows:
        study.write_log(args.out / "trainings.csv", rows)


def trainings(args):
    """Train, or resume, the methods: trainings.csv. Fails where time ends before they do."""
    seconds = args.seconds - 25
    deadline = time.monotonic() + seconds
    methods = FIVE
    name = "five"
    if args.method:
        methods = [args.method]
        name = f"{args.method}-{args.epochs}"
    home = study.ROOT / "trainings" / f"gpu-{args.scale}-{name}"
    home.mkdir(parents=True, exist_ok=True)
    plan_file = home / "plan.json"
    if plan_file.exists():
        plan = json.loads(plan_file.read_text())
    else:
        plan = plan_of(args, seconds)
    tested = plan["tested"]  # {method: test perplexity}
    waiting = [method for method in methods if method not in tested]
    running = {}  # {method: process}
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < plan["at_once"]:
            method = waiting.pop(0)
            command = [TRAIN, *flags(args, method, plan["epochs"]), "--resume", home / method]
            running[method] = start(command, home / f"{method}.txt")
        time.sleep(1)
        for method, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[method]
            if process.returncode == 0:
                tested[method] = float((home / f"{method}.txt").read_text().split()[-1])
        plan_file.write_text(json.dumps(plan))
        write_trainings(args, methods, home, plan)
    if len(tested) < len(methods):
        sys.exit(f"unfinished, see {home}")


# -------------------------------------------------------------------------------------- all stages


class Stage(NamedTuple):
    function: Callable
    limit: float  # s at most, at the paper's size
    files: str  # where to look if it fails


STAGES = {
    "environment": Stage(environment, 60, "environment.json"),
    "correctness": Stage(correctness, 130, "tests.txt and agreement.csv"),
    "steps": Stage(steps, 150, "steps.csv and profile.txt"),
    "sharing": Stage(sharing, 110, "sharing.csv"),
    "trainings": Stage(trainings, math.inf, "trainings.csv and trainings/gpu-*/*.txt"),
}


def alone(function, args):
    """Run a stage as the leader of a process group, so that all it starts can be ended with it."""
    os.setsid()
    function(args)


def do_stage(name, args):
    """Run a stage in its own process, for at most args.seconds. Returns its line of report.txt."""
    stage = STAGES[name]
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=alone, args=(stage.function, args))
    process.start()
    process.join(args.seconds)
    status = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)  # whatever of it still runs
    if status is None:
        return f"{name}: stopped after {args.seconds:.0f} s; see {stage.files}"
    if status != 0:
        return f"{name}: exit status {status}; see {stage.files}"
    return f"{name}: exit status 0"


def write_report(out, told):
    """Write report.txt: a line for each stage, then the files, without the long ones."""
    parts = [*told, ""]
    for path in sorted(out.iterdir()):
        if path.suffix in (".json", ".csv") and path.stem != "trainings":
            parts.append(f"{path.name}\n{path.read_text()}")
    (out / "report.txt").write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for eight files")
    parser.add_argument("--seconds", type=float, default=570, help="for everything [%(default)g]")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--method", choices=reproduce.METHODS, help="one training alone")
    parser.add_argument("--epochs", type=int, default=320, help="of --method")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # in all the processes
    args.out.mkdir(parents=True, exist_ok=True)
    asked = ["trainings"] if args.method else args.stages
    told = []
    for name, stage in STAGES.items():
        if name not in asked:
            continue
        args.seconds = end - time.monotonic() - 15
        if args.scale == "paper":
            args.seconds = min(stage.limit, args.seconds)
        if args.seconds > 40:
            told.append(do_stage(name, args))
        else:
            told.append(f"{name}: not begun, for too little time was left")
        write_report(args.out, told)
        print(told[-1], flush=True)


if __name__ == "__main__":
    main()
