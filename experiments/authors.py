"""How much does the authors' g inject, as their code has it, beside the neuron-wise g of dni.py?

    python experiments/authors.py        two seeds; resumable by whole seeds

Their code is github.com/parap1uie-s/alternate_sg (model.py, dni.py, main.py). No line of it is
copied. Their g differs from the one that this project took from the paper's text (departures 1 to
6, 15 and 22):

                 authors' code                                 dni.py
    sequence     all N neurons, one after another, batch 1     the borders; neurons are the batch
    memory       of the last neuron, on to the first           of each neuron
    input        c times noise, N(1, 0.5²), at all times       c
    layers       linear 1 -> 50, QRNN of window 2 with         MLP, QRNN of window 1, MLP; the last
                 zoneout 0.1, linear 50 -> 1; weights of       layer begins at zero
                 both linear maps in U(-0.1, 0.1), biases 0
    loss         sum of squares, on gradients of the mean      mean of squares, on T B times these
                 loss                                          gradients
    Adam         at 1e-3, weight decay 1.2e-6                  at 1e-4
    α            0.1                                           0.9

The model is preset `small` on PTB. It learns from real gradients alone, for two epochs. Both g
learn beside it and are not used. So they do not act on each other or on the model. After some
chunks, both are measured on the chunks that come next, without dropout: `look_on` of injected.py,
ten windows of two chunks.

When does their code first use its g? In the DNI commands of its README, at the beginning of epoch
2: the row of 664 chunks here. In its alternating commands for PTB, after epoch 5 or 160, and g has
    learned for longer than here.

Not here: a model trained with this g; a length of chunks that varies; the size of the paper.
"""

import argparse
import dataclasses
import time

import study

import torch
from torch import nn

import data
import injected
import train
from dni import constants, flatten

ALPHA = 0.1
RATE = 1e-3
WEIGHT_DECAY = 1.2e-6
ZONEOUT = 0.1
NOISE = 0.5  # standard deviation of the factor on g's input
CHUNKS = (0, 20, 60, 120, 250, 400, 600, 664, 800, 1000, 1300)  # an epoch has 664
WINDOWS = 10
SEEDS = (1, 2)


def scan(f, b):
    """c_t = f_t c_{t-1} + b_t for all t at once, c_0 = 0. f, b, result: (N, ..).

    After n rounds c_t holds the last 2^n terms of its sum, and f_t the product of as many f. It
    ends where all products are 0, after eight rounds or so. A loop over 15,360 neurons takes
    several times as long.
    """
    reach = 1
    while reach < len(f) and f[reach:].any():
        b = torch.cat([b[:reach], b[reach:] + f[reach:] * b[:-reach]])
        f = torch.cat([f[:reach], f[reach:] * f[:-reach]])
        reach *= 2
    return b


class AcrossNeurons(nn.Module):
    """The authors' g: its sequence is all N neurons of a border. It is called as a NeuronDNI is.

        x_n = W_e (c_n · noise_n) + b_e
        z_n = tanh(..), u_n, o_n = sigmoid(..)      of (x_{n-1}, x_n)
        m_n = u_n z_n + (1 - u_n) m_{n-1}           here u gates the new value
        δ^_n = W_d (o_n m_n) + b_d

    Zoneout sets some u_n to 0: the old value is kept. Noise and zoneout are on at all times.
    """

    def __init__(self, hidden_size=50):
        super().__init__()
        self.encode = nn.Linear(1, hidden_size)
        self.gates = nn.Linear(2 * hidden_size, 3 * hidden_size)
        self.decode = nn.Linear(hidden_size, 1)
        for linear in (self.encode, self.decode):
            nn.init.uniform_(linear.weight, -0.1, 0.1)
            nn.init.zeros_(linear.bias)

    def forward(self, s, memory=None):
        """s: a list of (B, H_l).
        memory: (m, x) of the last neuron at the call before, (1, 50) each, or None.

        Returns the gradients of the MEAN loss that it predicts, a list like s, and its memory.
        """
        joined = torch.cat(s, 1)  # (B, sum of H_l)
        c = joined.reshape(-1, 1)  # (N, 1): the neurons of stream 1, of stream 2, ..
        noise = torch.empty_like(c).normal_(1.0, NOISE)
        x = self.encode(c * noise)  # (N, 50)
        if memory is None:
            memory = (torch.zeros_like(x[:1]), torch.zeros_like(x[:1]))
        m_before, x_before = memory
        x_shifted = torch.cat([x_before, x[:-1]])
        z, u, o = self.gates(torch.cat([x_shifted, x], 1)).chunk(3, 1)  # (N, 50) each
        kept = torch.rand_like(u) < ZONEOUT
        u = u.sigmoid().masked_fill(kept, 0.0)
        new = u * z.tanh()
        first = new[:1] + (1 - u[:1]) * m_before
        m = scan(1 - u, torch.cat([first, new[1:]]))
        predicted = self.decode(o.sigmoid() * m).reshape(joined.shape)
        sizes = [c.shape[1] for c in s]
        return list(predicted.split(sizes, 1)), (m[-1:].detach(), x[-1:].detach())


def teach(g, optimizer, s, memory):
    """One step of the authors' g in a real chunk, after its backward pass. Returns g's memory.

    s: the leaves that the chunk began with; s.grad is the gradient of the mean loss.
    """
    predicted, memory = g(constants(s), memory)
    target = flatten([c.grad for c in s])
    error = (flatten(predicted) - target).square().sum()
    optimizer.zero_grad(set_to_none=True)
    error.backward()
    optimizer.step()
    return memory


def in_unit_of_dni(g, tokens_per_chunk):
    """The same g, but it predicts what g's of dni.py do: the gradient of a stream's summed loss."""

    def ask(s, memory):
        predicted, memory = g(s, memory)
        return [tokens_per_chunk * d for d in predicted], memory

    return ask


def zero_state(model, B):
    """The state where a text begins, as leaves. The authors' g predicts there, too."""
    return [
        (
            torch.zeros(B, layer.hidden_size, requires_grad=True),
            torch.zeros(layer.window - 1, B, layer.input_size),
        )
        for layer in model.rnn.layers
    ]


def one(case, points=CHUNKS, count=WINDOWS):
    """Train for two epochs, and measure both g after so many chunks. Returns two rows for each."""
    train.keep_freed_memory()
    began = time.monotonic()
    preset = train.preset("small", "dni", "ptb")
    settings = dataclasses.replace(preset, seed=case["seed"])
    corpus = data.load_corpus("ptb")
    T = settings.chunk
    inputs, targets = data.streams(corpus.train, settings.batch_size)
    device, autocast = train.pick_device("cpu", settings.precision)
    model, optimizer, dni = train.build(settings, len(corpus.vocabulary), device)
    theirs = AcrossNeurons()
    their_optimizer = torch.optim.Adam(
        theirs.parameters(), RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    chunks_of_epoch = list(train.chunk_borders(len(inputs), settings))
    rows = []
    for n in range(max(points) + 1):
        start, stop = chunks_of_epoch[n % len(chunks_of_epoch)]
        if start == 0:  # an epoch begins
            model.train()
            dni.reset()
            state = None
            memory = None
        if n in points:
            following = [
                (inputs[i : i + 2 * T], targets[i : i + 2 * T], False)
                for i in range(start, start + count * 2 * T, 2 * T)
            ]
            arms = (
                ("authors", in_unit_of_dni(theirs, T * settings.batch_size), ALPHA, memory),
                ("dni.py", dni.g, dni.alpha, dni.memory),
            )
            for name, g, alpha, its_memory in arms:
                # The training goes on as if nothing had been measured.
                with torch.random.fork_rng():
                    looks = injected.look_on(
                        model, g, alpha, following, T, state, its_memory, autocast
                    )
                    found = injected.summary(looks)
                seconds = round(time.monotonic() - began)
                told = {"chunks": n, "g": name, "windows": count}
                rows.append({**case, **told, **found, "seconds": seconds})
        x = inputs[start:stop]
        y = targets[start:stop]
        if state is None:
            # In train.py the g of dni.py does not predict where a text begins. The authors' does.
            state = zero_state(model, settings.batch_size)
            its_dni = None
        else:
            its_dni = dni
        s = [c for c, _ in state]
        _, state = train.train_step(
            model, optimizer, its_dni, x, y, state, False, settings.clip, autocast
        )
        memory = teach(theirs, their_optimizer, s, memory)
    return rows


def main():
    argparse.ArgumentParser(description="How much does the authors' g inject?").parse_args()
    study.do_cases(study.LOGS / "authors.csv", one, [dict(seed=seed) for seed in SEEDS])


if __name__ == "__main__":
    study.run(main)
