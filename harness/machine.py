"""Device, precision and memory of the machine, and its random generators."""

import ctypes
import sys

import torch

from harness.command_line import UserError
from harness.processes import who


def prepare(device, precision):
    """The device and the torch.autocast for these settings, the machine set up for them. Raises UserError."""
    keep_freed_memory()
    device = pick_device(device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")                     # TF32 in products that are not in bf16
    return device, pick_autocast(precision, device)


def pick_device(name):
    """"cpu", "cuda" or "mps", for one of these or "auto". Raises UserError where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here; "
                        f"there is {', '.join(d for d in there if there[d])}")
    return name


def pick_autocast(name, device):
    """The torch.autocast for "fp32", "bf16", or "auto": bf16 where the processor multiplies it natively."""
    native = False
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    elif device == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()           # older torch: unknown
        native = any(able.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.autocast(device, torch.bfloat16, enabled=name == "bf16" or (name == "auto" and native))


def describe(device, mixed):
    """Where and how it computes, in words."""
    with mixed:
        product = "bfloat16" if torch.is_autocast_enabled(device) else "float32"
    number = f" in each of {who()[1]} processes" if who()[1] > 1 else ""
    return f"{device}, products in {product}, {torch.get_num_threads()} threads{number}"


def parameters(module):
    """How many numbers it learns."""
    return sum(p.numel() for p in module.parameters())


def keep_freed_memory():
    """Ask glibc to keep the memory that a step frees, for the next step takes the same again. Elsewhere,
    nothing.

    As it comes, every large tensor is a mapping of its own that goes back to the kernel when freed, and whose
    pages of 4 KB are cleared and mapped one by one when it is next wanted. The price is some memory lost in
    holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1), (-8, 1)):
            mallopt(parameter, value)


def random_state(device, generators=()):
    """The states of the random generators in use: the CPU's, the device's, and those given, on the device."""
    own = {"cpu": {}, "cuda": {"cuda": torch.cuda}, "mps": {"mps": torch.mps}}[device]
    return {"cpu": torch.get_rng_state(), **{name: module.get_rng_state() for name, module in own.items()},
            f"given {device}": [g.get_state() for g in generators]}


def set_random_state(states, device, generators=()):
    """Back to what `random_state` returned. On another device, that one's are left as they are."""
    torch.set_rng_state(states["cpu"])
    if device != "cpu" and device in states:
        {"cuda": torch.cuda, "mps": torch.mps}[device].set_rng_state(states[device])
    for g, state in zip(generators, states.get(f"given {device}", ())):
        g.set_state(state)
