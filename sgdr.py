"""SGDR: a learning rate that falls along a cosine and restarts warm, in runs of doubling length.

A high rate makes large steps across the loss, a low one ends in a minimum. Each run does first one and then
the other. A restart is warm: it raises the rate again and keeps the weights, so that training can leave the
minimum it has found and look for another from there.

Papers
    SGDR         Loshchilov, Hutter 2016, "SGDR: Stochastic Gradient Descent with Warm Restarts",
                 arXiv 1608.03983, Eq. 5
    Alternating  Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language
                 Modeling", section 2.1

Glossary
    name       symbol       unit       meaning
    index      i            -          of the run: 0 before the first restart, then 1, 2, ...
    elapsed    E_cur        epochs     since the last restart
    length     E_i          epochs     of run i: mult^i * base, or the distance between two given restarts
    base       E_base       epochs     length of run 0
    eta_min    eta_min^i    -          learning rate at the end of run i
    eta_max    eta_max^i    -          learning rate at its beginning

    eta = eta_min^i + 1/2 (eta_max^i - eta_min^i) (1 + cos(pi E_cur / E_i))

Not here: momentum schedules, warm-up, averaging of the weights at the end of a run.

Run `python sgdr.py` to see the paper's schedule with E_base = 5.
"""

import bisect
import math
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler


class Run(NamedTuple):
    index: int       # i
    elapsed: float   # E_cur, epochs
    length: float    # E_i, epochs


def run_at(epoch, base=1, mult=2, restarts=()):
    """The run that a moment lies in, how long it has lasted, and how long it is: Run(i, E_cur, E_i).

    epoch: epochs since the beginning of training, >= 0, fractional or whole.
    base, mult: run i lasts base * mult^i epochs, so that base 5 restarts at 5, 15, 35, 75, 155, 315. In
    words:
        take off the length of run 0, then that of run 1, and so on while enough is left. (The code below
        solves for i, for there may be many runs.)
    restarts: restart at these epochs instead, rising, such as (5, 10, 20, 40, 80, 160, 320), the authors'
        code's; after the last of them come runs as long as the last.
    A moment within rounding of a restart is the restart. (For base 0.1 run 2 begins at 0.3, computed as
    0.1 + 0.2 = 0.30000000000000004.)
    Raises ValueError for a negative epoch, base <= 0, mult < 1 or restarts that do not rise from above 0.
    """
    starts = [0, *restarts]
    if epoch < 0 or base <= 0 or mult < 1:
        raise ValueError(f"epoch >= 0, base > 0 and mult >= 1 are needed, got {epoch}, {base}, {mult}")
    if any(later <= earlier for earlier, later in zip(starts, starts[1:])):
        raise ValueError(f"restarts must rise from above 0, got {tuple(restarts)}")
    n = len(restarts)                                                   # run n begins at the last of them

    def length(i):
        if restarts:
            return starts[min(i, n - 1) + 1] - starts[min(i, n - 1)]
        return base * mult ** i

    def start(i):
        if restarts:
            return starts[i] if i <= n else starts[n] + (i - n) * length(n)
        # base (1 + mult + .. + mult^{i-1}), a geometric sum
        return i * base if mult == 1 else base * (mult ** i - 1) / (mult - 1)

    # The start of run i, solved for i. (log1p(x) = log(1 + x), exact for small x, so for mult near 1.)
    # Rounding may make i one off, which the two loops mend.
    if restarts:
        i = bisect.bisect(restarts, epoch) if epoch < starts[n] else n + int((epoch - starts[n]) / length(n))
    elif mult == 1:
        i = int(epoch / base)
    else:
        i = int(math.log1p(epoch / base * (mult - 1)) / math.log1p(mult - 1))

    def reached(i):
        return start(i) <= epoch or math.isclose(start(i), epoch, rel_tol=1e-12)
    while not reached(i):
        i -= 1
    while reached(i + 1):
        i += 1
    return Run(i, max(epoch - start(i), 0), length(i))


class SGDR(LRScheduler):
    """The schedule above as a PyTorch scheduler.

    eta_min: a number, or a sequence with one a run (the last serves all later runs).
    eta_max: likewise; None takes each parameter group's own learning rate.
    base, mult, restarts: as in `run_at`.
    fractional: False uses the whole epochs in E_cur, so that the rate moves only between epochs (the authors'
    code).

    step() moves on by one epoch; step(epoch) to any moment, such as epoch + batch / batches, before each
    batch. With one rate for all runs, and mult 1 or 2, the values equal
    torch.optim.lr_scheduler.CosineAnnealingWarmRestarts to the last bit. (For mult 3, late in training,
    PyTorch's logarithm rounds a restart into the run before it: epoch 121 of base 1.) `scheduler.run` is the
    Run of the last step. The alternation of real and synthetic gradients reads run.index.
    """

    def __init__(self, optimizer, base=1, mult=2, eta_min=0.0, eta_max=None, restarts=(), fractional=True,
                 last_epoch=-1):
        self.base, self.mult, self.restarts, self.fractional = base, mult, list(restarts), fractional
        self.eta_min, self.eta_max = eta_min, eta_max
        self.run = run_at(0, base, mult, restarts)                      # which super().__init__ asks for
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        i, elapsed, length = self.run
        rates = []
        for group_rate in self.base_lrs:
            low = per_run(self.eta_min, i)
            high = group_rate if self.eta_max is None else per_run(self.eta_max, i)
            # eta = eta_min^i + (eta_max^i - eta_min^i) (1 + cos(pi E_cur / E_i)) / 2
            rates.append(low + (high - low) * (1 + math.cos(math.pi * elapsed / length)) / 2)
        return rates

    def step(self, epoch=None):
        """Set the learning rates for `epoch` (fractional or whole, >= 0), or 1 after the last step."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        moment = self.last_epoch if self.fractional else math.floor(self.last_epoch)
        self.run = run_at(moment, self.base, self.mult, self.restarts)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self):
        """All but the optimizer, as plain numbers and lists, for torch.load(weights_only=True)."""
        return {**super().state_dict(), "run": list(self.run)}

    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "run": Run(*state_dict["run"])})


def per_run(bound, i):
    """The bound of run i, from one number for all runs or a sequence whose last serves the later runs."""
    return bound if isinstance(bound, (int, float)) else bound[min(i, len(bound) - 1)]


if __name__ == "__main__":
    print("E_base = 5: run i lasts 5 * 2^i epochs. A warm restart raises the rate and keeps the weights.\n"
          "Rate from 1e-3 to 0, one line an epoch; the gradients are those of --mode alternating:")
    schedule = SGDR(torch.optim.SGD([torch.zeros(1)], lr=1e-3), base=5)
    for epoch in range(36):
        schedule.step(epoch)
        (i, elapsed, length), [eta] = schedule.run, schedule.get_last_lr()
        gradient = "synthetic" if i % 2 else "real"
        print(f"{epoch:3d}  run {i}, {gradient:9}  {elapsed:2.0f} of {length:2.0f} epochs  {eta:.6f}  "
              + "#" * round(eta * 5e4))
