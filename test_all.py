"""The proofs. Each test states a claim, computes its two sides by independent means, and compares them.

Run `pytest test_all.py`. Set QRNN_DATA to a folder with the PTB and WikiText-2 files to include the claims
about them; without it, without a GPU, and so on, the tests concerned are skipped and say so. The slow tests
(the compiler, kills, studies) are left out; `pytest test_all.py -m slow` runs them.

    0  the whole method, once more, in plain code: read this first
    1  pooling and the QRNN                       6  the language model and its regularisation
    2  Eq. 1 and the bootstrapped target          7  warm restarts
    3  the interface                              8  data
    4  trained but not used                       9  train.py as a program
    5  g learns, and what a state can tell       10  the repository
"""

import ast
import contextlib
import csv
import dataclasses
import errno
import hashlib
import http.server
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import data
import dni as dni_module
import train
from dni import Agreement, Interface, LayerDNI, NeuronDNI, flatten, regress
from qrnn import QRNN, LanguageModel, Pool, QRNNLayer, locked_dropout, pool, pool_loop
from sgdr import SGDR, run_at

HERE = Path(__file__).resolve().parent
SLOW = pytest.mark.slow
CXX = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
COMPILER = pytest.mark.skipif(not CXX, reason="no C++ compiler")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
HAS_TRITON = importlib.util.find_spec("triton")
TRITON = pytest.mark.skipif(not HAS_TRITON, reason="no triton (pip install triton)")
# (The interpreter of 3.6, which torch 2.11 brings along, fails with numpy 2.4.)
INTERPRETER = pytest.mark.skipif(not HAS_TRITON or importlib.metadata.version("triton") < "3.7",
                                 reason="no triton 3.7 or later (pip install triton)")
DOUBLE = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)


def python(code, **environment):
    """Run it in a process of its own. What it printed, on stdout and on stderr."""
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=240,
                         env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def lively(g, bound=0.5):
    """g with a last layer that is not zero, so that it says something."""
    for mlp in getattr(g, "mlps", None) or [g.decode]:
        for p in mlp[-1].parameters():
            torch.nn.init.uniform_(p, -bound, bound)
    return g


def flatten_state(state):
    return [t for pair in state for t in pair]


def settings(mode="bptt", **changes):
    return dataclasses.replace(train.preset("small", mode, "pydoc"), **changes)


# -------------------------------------------------------------- 0. the whole method, once more, in plain code
#
# The paper in 150 lines. It shares nothing with the modules but settings and first weights: it has its own
# QRNN, g, Adam, clipping, cosine, restarts, chunk lengths and alternation. It is slow, and it has no dropout.
#
# It needs no detach at a border. Every step makes NEW weights, and asks for the derivative in these alone.
# What the old weights did in the chunks before is not asked for: that is truncation.

def plain_qrnn(x, c, x_prev, W, b):
    """One QRNN layer (QRNN, section 2). x: a list of T inputs (B, I); c: (B, H); x_prev: the inputs before.

    Returns a list of T outputs (B, H), and the c and x_prev that the next chunk begins with.
    """
    inputs, h = x_prev + x, []
    for t in range(len(x)):
        window = torch.cat(inputs[t:t + len(x_prev) + 1], 1)            # x_t and the len(x_prev) before it
        z, f, o = (window @ W.T + b).chunk(3, 1)                        # (B, H) each
        c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
        h.append(o.sigmoid() * c)
    return h, c, inputs[len(x):]


def plain_model(theta, inputs, targets, s_k, x_prev, layers):
    """The language model on a chunk, inputs and targets (T, B), entered with s_k (N,), the c of all layers.

    Returns the nll, the loss that is minimised, s_{k+1}, and the x_prev of each layer for the next chunk.
    """
    h, cs, next_x_prev = [theta["embedding.weight"][words] for words in inputs], [], []
    weights = [(theta[f"rnn.layers.{i}.weight"], theta[f"rnn.layers.{i}.bias"]) for i in range(layers)]
    sizes = [inputs.shape[1] * len(b) // 3 for _, b in weights]         # B H of each layer
    for c, before, (W, b) in zip(s_k.split(sizes), x_prev, weights):
        h, c, after = plain_qrnn(h, c.view(inputs.shape[1], -1), before, W, b)
        cs, next_x_prev = [*cs, c.flatten()], [*next_x_prev, after]
    h = torch.stack(h)                                                  # (T, B, E)
    log_p = (h @ theta["embedding.weight"].T + theta["decoder_bias"]).log_softmax(-1)
    nll = -log_p.gather(-1, targets[..., None]).mean()
    loss = nll + 2 * (h ** 2).mean()                                    # AWD's penalties
    if len(h) > 1:
        loss = loss + ((h[1:] - h[:-1]) ** 2).mean()
    return nll, loss, torch.cat(cs), next_x_prev


def plain_g(phi, c, memory):
    """g of N neurons, c (N,): 1 -> MLP -> QRNN over the borders -> MLP -> 1. Returns delta^ (N,) and h_g."""
    def linear(x, name):
        return x @ phi[f"{name}.weight"].T + phi[f"{name}.bias"]
    x = linear(linear(c[:, None], "encode.0").relu(), "encode.2")       # (N, 50)
    [h], memory, _ = plain_qrnn([x], memory, [], phi["rnn.weight"], phi["rnn.bias"])
    return linear(linear(h, "decode.0").relu(), "decode.2")[:, 0], memory


def plain_adam(weights, gradients, moments, rate, l2):
    """Adam (Kingma & Ba 2014, algorithm 1) with weight decay in the gradient. moments: {name: (t, m, v)}.

    Returns new weights, and changes moments.
    """
    new = {}
    for (name, w), d in zip(weights.items(), gradients):
        t, m, v = moments.get(name, (0, 0.0, 0.0))
        d = d + l2 * w.detach()
        t, m, v = moments[name] = t + 1, 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d ** 2
        new[name] = w.detach() - rate * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
    return {name: w.requires_grad_() for name, w in new.items()}


def plain_schedule(s, epoch):
    """(learning rate, run, whether the gradient that crosses borders is synthetic) at a moment, in epochs."""
    if s.mode in ("bptt", "dni"):
        return s.lr, 0, s.mode == "dni" and epoch >= s.dni_warmup
    starts = [0, *s.restarts] if s.restarts else [s.e_base * (2 ** i - 1) for i in range(9)]
    i = max(i for i, start in enumerate(starts) if start <= epoch)
    high, low = (bound[min(i, len(bound) - 1)] for bound in (s.eta_max or (s.lr,), s.eta_min))
    elapsed = (epoch - starts[i]) / (starts[i + 1] - starts[i])         # E_cur / E_i
    rate = low + (high - low) / 2 * (1 + math.cos(math.pi * elapsed))
    if s.mode == "alternating":
        return rate, i, i % 2 == 1
    return rate, i, s.gradient == "synthetic" and epoch >= s.dni_warmup


def plain_chunks(length, s, epoch):
    """(start, stop) of the chunks: T steps; with jitter N(T, 5), one in twenty N(T/2, 5), and at least 5."""
    draw, start = random.Random(f"{s.seed} {epoch}"), 0
    while start < length:
        steps = s.chunk
        if s.jitter:
            half = draw.random() >= 0.95
            steps = max(5, int(draw.gauss(s.chunk / 2 if half else s.chunk, 5)))
        yield start, min(start + steps, length)
        start += steps


def plain_training(theta, phi, inputs, targets, s, epochs):
    """The paper. theta, phi: first weights of model and g, by name (phi {}: no g). inputs, targets: (L, B).

    Returns theta, phi, [(nll, rate, run, synthetic, gradient norm)] of all chunks, and
    [(mean nll, cosine, R^2)] of all epochs.
    """
    (length, B), theta_moments, phi_moments, last_run, chunks, summary = inputs.shape, {}, {}, 0, [], []
    N = B * (s.hidden_size * (s.num_layers - 1) + s.embedding_size)     # neurons of all streams

    def zeros(*shape):
        return torch.zeros(*shape, **DOUBLE, requires_grad=True)
    for epoch in range(epochs):
        s_k, memory = zeros(N), zeros(N, 50)                            # memory: h_g
        x_prev = [[zeros(B, s.embedding_size)]] + [[]] * (s.num_layers - 1)      # a window of 2, then of 1
        total, guesses, truths, past = 0.0, [], [], []
        for start, stop in plain_chunks(length, s, epoch):
            T, (rate, run, synthetic) = stop - start, plain_schedule(s, epoch + start / length)
            if run != last_run and s.reset_optimizer:
                theta_moments = {}
            last_run, chunk = run, slice(start, stop)

            # 1. Forward: chunk k, from s_k to s_{k+1}.
            nll, loss, s_next, x_prev = plain_model(theta, inputs[chunk], targets[chunk], s_k, x_prev,
                                                    s.num_layers)

            # 2. g predicts the gradient of s_k, to be corrected in 4, and that of s_{k+1}, which stands for
            #    the future after this chunk. Nothing is predicted for s_0. The last chunk has no future.
            #    g has a memory, so it is run over its last borders, where its newest weights are learned.
            if phi and start > 0:
                past = [*past, (s_k, memory)][-s.dni_borders:]
                memory = past[0][1]
                for state, _ in past:
                    guess, memory = plain_g(phi, state, memory)         # delta^_k, at last
            future = torch.zeros(N, **DOUBLE)
            if synthetic and stop < length:
                future = s.dni_alpha * plain_g(phi, s_next, memory)[0].detach()          # alpha delta^_{k+1}

            # 3. One sum, two derivatives. T B loss is the loss summed over the chunk: g's unit. The product
            #    future . s_{k+1} is there because its derivative in s_{k+1} is `future`. The derivative of
            #    the sum in theta is Eq. 1. The derivative in s_k, which the chunk before has made, is
            #    target_k, the bootstrap of section 2.1.
            everything = T * B * loss + future @ s_next
            *gradients, target = torch.autograd.grad(everything, [*theta.values(), s_k])

            # 4. g learns what its prediction should have been, from all neurons in one update (2.2).
            if phi and start > 0:
                error = ((guess - target) ** 2).mean()
                meta_gradients = torch.autograd.grad(error, phi.values())
                phi = plain_adam(phi, meta_gradients, phi_moments, s.dni_lr, 0.0)
                guesses, truths = [*guesses, guess.detach()], [*truths, target]

            # 5. The model learns: its gradient, of the mean loss, is clipped. A chunk that is shorter or
            #    longer than T gets its share of the learning rate.
            gradients = [d / (T * B) for d in gradients]
            norm = torch.cat([d.flatten() for d in gradients]).norm()
            gradients = [d * min(1, s.clip / (norm + 1e-6)) for d in gradients]
            share = T / s.chunk if s.jitter else 1
            theta = plain_adam(theta, gradients, theta_moments, rate * share, s.l2)

            chunks.append((nll.item(), rate * share, run, synthetic and stop < length, norm.item()))
            s_k, total = s_next, total + nll.item() * T
        p, t = (torch.cat(x or [torch.zeros(1)]) for x in (guesses, truths))
        cosine, r2 = p @ t / (p.norm() * t.norm()), 1 - ((p - t) ** 2).sum() / (t ** 2).sum()
        summary.append((total / length, cosine.item(), r2.item()))
    return theta, phi, chunks, summary


WHOLE = dict(embedding_size=4, hidden_size=5, chunk=12, jitter=True, clip=0.2, l2=1e-2, lr=0.02, dni_lr=5e-3,
             dropout_output=0.0, dropout_hidden=0.0, dropout_input=0.0)
BOUNDS = dict(e_base=0.4, eta_max=(0.02, 0.03, 0.01), eta_min=(0.004, 0.0))


@pytest.mark.parametrize("changes", [
    dict(mode="bptt"),
    dict(mode="dni", dni_warmup=0.6, dni_alpha=0.7),
    dict(mode="restart", restarts=(0.25, 1.5, 2.5, 4.0), eta_max=(0.02, 0.03)),
    dict(mode="restart", gradient="synthetic", reset_optimizer=True, dni_warmup=0.3, dni_borders=3, **BOUNDS),
    dict(mode="alternating", reset_optimizer=True, **BOUNDS),
    dict(mode="alternating", jitter=False, num_layers=3, **BOUNDS)],
    ids=["bptt", "dni", "restart", "restart-synthetic", "alternating", "alternating-3-layers"])
def test_training_is_the_plain_program(changes, monkeypatch):
    """Three epochs of train_epoch are three epochs of the program above, to 1e-10.

    Every chunk's loss, learning rate, run and gradient source; every epoch's row, as it is rounded for
    log.csv; and in the end every weight of the model and of g.
    """
    settings = dataclasses.replace(train.Settings(), **{**WHOLE, **changes})
    model, optimizer, dni = train.build(settings, 11, "cpu")
    networks = [model.double()]
    if dni:
        networks.append(lively(dni.g.double(), 0.1))
    schedule, seen, step = train.make_schedule(settings, optimizer), [], train.train_step
    inputs, targets = torch.randint(11, (2, 100, 3))
    first = [{name: w.clone().requires_grad_() for name, w in net.state_dict().items()} for net in networks]
    *last, chunks, epochs = plain_training(*(first + [{}])[:2], inputs, targets, settings, 3)
    norms = [norm for *_, norm in chunks]
    assert min(norms) < settings.clip < max(norms)                      # clipping bites, at times

    def recorded(model, optimizer, dni, x, y, state, use_synthetic, *rest):
        nll, state = step(model, optimizer, dni, x, y, state, use_synthetic, *rest)
        seen.append((nll.item(), optimizer.param_groups[0]["lr"], schedule.run.index, use_synthetic))
        return nll, state
    monkeypatch.setattr(train, "train_step", recorded)
    for epoch, (nll, cosine, r2) in enumerate(epochs):
        row = train.train_epoch(model, optimizer, schedule, dni, (inputs, targets), epoch, settings)
        assert row["train_perplexity"] == pytest.approx(math.exp(nll), abs=5.1e-4)
        agreed = pytest.approx((cosine, r2), rel=1e-4, abs=2e-5, nan_ok=True)             # summed in float32
        assert (row["dni_cosine"], row["dni_r2"]) == agreed
        assert (row["epoch"], row["run"]) == (epoch + 1, seen[-1][2])
        begin = epoch + list(train.chunk_borders(100, settings, epoch))[-1][0] / 100
        assert row["learning_rate"] == pytest.approx(plain_schedule(settings, begin)[0], rel=1e-4)
        assert row["gradient"] == ("synthetic" if plain_schedule(settings, begin)[2] else "real")
    assert len(seen) == len(chunks)
    for (nll, rate, *rest), (plain_nll, plain_rate, *plain_rest, _) in zip(seen, chunks):
        assert (nll, rate) == pytest.approx((plain_nll, plain_rate), abs=1e-10) and rest == plain_rest
    for net, weights in zip(networks, last):
        close(net.state_dict(), {name: w.detach() for name, w in weights.items()}, atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------------ 1. pooling and the QRNN

def gates(T=7, B=3, H=4, device="cpu"):
    """Leaves f in (0, 1), z in (-1, 1) and c_0."""
    f, z = torch.rand(T, B, H, **DOUBLE), torch.rand(T, B, H, **DOUBLE) * 2 - 1
    return [x.to(device).requires_grad_() for x in (f, z, torch.randn(B, H, **DOUBLE))]


def pool_closed_form(f, z, c0):
    """c_t = (prod_{i<=t} f_i) c_0 + sum_{j<=t} (prod_{j<i<=t} f_i) (1 - f_j) z_j, without a recurrence."""
    states = []
    for t in range(1, len(f) + 1):
        c = f[:t].prod(0) * c0
        for j in range(t):
            c = c + f[j + 1:t].prod(0) * (1 - f[j]) * z[j]
        states.append(c)
    return torch.stack(states)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_pooling_loop_is_closed_form_is_explicit_function(T, device):
    """The three forms agree: c_1 .. c_T, c_T apart, and the gradients of f, z and c_0 through both.

    c_T is a tensor of its own: who writes into it changes neither c_1 .. c_T nor the gradients.
    """
    leaves = gates(T, device=device)
    weights = [torch.randn(T, 3, 4, **DOUBLE).to(device), torch.randn(3, 4, **DOUBLE).to(device)]
    outputs = [(c, c[-1]) for c in (pool_loop(*leaves), pool_closed_form(*leaves))] + [pool(*leaves)]
    results = [[*out, *torch.autograd.grad(out, leaves, weights, retain_graph=True)] for out in outputs]
    close(results[1], results[0])
    close(results[2], results[0])
    c, c_T = outputs[2]
    with torch.no_grad():
        c_T.fill_(100.0)
    close([c, *torch.autograd.grad(c, leaves, weights[0])],
          [outputs[0][0], *torch.autograd.grad(outputs[0][0], leaves, weights[0])])


@INTERPRETER
def test_the_gpus_pooling_without_a_gpu():
    """The GPU's kernels, run by Triton's interpreter on CPU tensors, equal `pool_loop`: c, c_T and the
    gradients of f, z and c_0. Sizes are odd, or above the BLOCK of columns; arguments are strided too; T is 1
    too.
    """
    code = """
import torch, qrnn
torch.manual_seed(0)
qrnn.Pool.states.register_kernel("cpu", qrnn.states_on_gpu)             # in place of the loops
qrnn.Pool.gradients.register_kernel("cpu", qrnn.gradients_on_gpu)
for T, B, H, strided in (1, 3, 5, False), (2, 1, 1, False), (7, 3, 43, False), (6, 5, 27, True):
    f, z, c0 = torch.rand(T, B, H), torch.randn(T, B, H), torch.randn(B, H)
    G, G_next = torch.randn(T, B, H), torch.randn(B, H)
    if strided:
        f, z, G = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (f, z, G))
        c0, G_next = c0.t().contiguous().t(), G_next.t().contiguous().t()
        assert not f.is_contiguous() and not c0.is_contiguous()
    leaves, results = [x.double().requires_grad_() for x in (f, z, c0)], []
    c = qrnn.pool_loop(*leaves)
    results.append([c, c[-1], *torch.autograd.grad([c, c[-1]], leaves, [G.double(), G_next.double()])])
    for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-5):
        low = [x.detach().to(dtype).requires_grad_() for x in (f, z, c0)]
        c, c_T = qrnn.Pool.apply(*low)
        mine = [c, c_T, *torch.autograd.grad([c, c_T], low, [G.to(dtype), G_next.to(dtype)])]
        for a, b in zip(mine, results[0], strict=True):
            assert a.dtype == dtype and a.shape == b.shape and (a - b).abs().max() < tolerance
    print(f"{B * H} columns")
"""
    assert python(code, TRITON_INTERPRET="1")[0].splitlines() == [f"{n} columns" for n in (15, 1, 129, 135)]


@SLOW
@TRITON
def test_the_gpus_pooling_compiles_without_a_gpu():
    """For GPUs of 2018 (compute capability 7.5) and of today; since 8.0 loads go ahead of the arithmetic."""
    code = """
import qrnn, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for capability in (75, 80, 90):
    for kernel, tensors in ((qrnn.pool_forward_kernel, "f z c0 c"),
                            (qrnn.pool_backward_kernel, "G G_next f z c df dz dc0")):
        types = dict.fromkeys(tensors.split(), "*fp32") | {"T": "i32", "N": "i32"}
        made = triton.compile(ASTSource(kernel, types, {}), GPUTarget("cuda", capability, 32),
                              options={"num_warps": 2})
        print(capability, len(made.asm["cubin"]) > 0, "cp.async" in made.asm["ptx"])
"""
    lines = python(code)[0].splitlines()
    assert lines == [f"{c} True {c >= 80}" for c in (75, 80, 90) for _ in range(2)]


def test_the_pooling_is_to_the_compiler_what_it_is():
    """What both operations promise to torch.compile is what they do: shapes, types, strides, no aliases."""
    f, z, c0 = (x.detach() for x in gates())
    strided = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (torch.randn_like(f), f, z)]
    for G, f, z in ((torch.randn_like(f), f, z), strided):
        c = Pool.states(f, z, c0)
        for operation, inputs in ((Pool.states, (f, z, c0)),
                                  (Pool.gradients, (G, torch.randn_like(c0), f, z, c))):
            torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def test_pooling_gradcheck():
    """The hand-written backward agrees with finite differences, for strided and broadcast arguments too."""
    def strided(f, z, c0):
        return pool(f.transpose(0, 1), z.transpose(0, 1), c0.t())[0][::2]
    f, z, c0 = gates(5, 2, 3)
    assert torch.autograd.gradcheck(pool, (f, z, c0))
    assert torch.autograd.gradcheck(strided, (gates(2, 5, 3)[0], gates(2, 5, 3)[1], gates(5, 3, 2)[2]))
    assert torch.autograd.gradcheck(lambda *a: pool(*a)[0].sum(), (f, z, c0))      # G is an expanded scalar


@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_a_second_derivative_is_refused_and_never_wrong(leaf):
    """`pool` refuses it, whatever the outer gradient is; `pool_loop` gives it, as finite differences do.

    So does `pool` at T = 1, where it has no backward of its own.
    """
    leaves = gates(4, 2, 3)
    for outer in (torch.ones(4, 2, 3, **DOUBLE), torch.ones(4, 2, 3, **DOUBLE, requires_grad=True)):
        with pytest.raises(RuntimeError, match="second derivative.*use pool_loop"):
            torch.autograd.grad(pool(*leaves)[0], leaves[leaf], outer, create_graph=True)
    with pytest.raises(RuntimeError, match="use pool_loop"):
        torch.autograd.grad(pool(*leaves)[0].sum(), leaves[leaf], create_graph=True)
    assert torch.autograd.gradgradcheck(pool_loop, leaves)
    assert torch.autograd.gradgradcheck(pool, gates(1, 2, 3))


def test_two_copies_of_the_file_live_in_one_process(tmp_path):
    """`qrnn.py` copied and changed, as people do: each copy computes what its own text says, and the other's
    arrival or deletion changes nothing. (The change: the copy's dL/dc_0 is three times as large.)
    """
    text = (HERE / "qrnn.py").read_text(encoding="utf-8")
    assert text.count("r[0] * f[0]\n") == 1
    (tmp_path / "twin.py").write_text(text.replace("r[0] * f[0]\n", "3 * r[0] * f[0]\n"), encoding="utf-8")
    code = f"""
import gc, importlib, sys, torch
sys.path.append({str(tmp_path)!r})

def work(module, factor):
    leaves = [x.requires_grad_() for x in (torch.rand(6, 2, 3), torch.randn(6, 2, 3), torch.randn(2, 3))]
    ours = torch.autograd.grad(module.pool(*leaves)[0].square().sum(), leaves)
    f, z, c0 = torch.autograd.grad(module.pool_loop(*leaves).square().sum(), leaves)
    torch.testing.assert_close(ours, (f, z, factor * c0))

for first, second in ("qrnn", "twin"), ("twin", "qrnn"):
    modules = {{name: importlib.import_module(name) for name in (first, second)}}
    for name in (first, second, first):
        work(modules[name], 3 if name == "twin" else 1)
    del sys.modules[first], modules[first]
    gc.collect()
    work(modules[second], 3 if second == "twin" else 1)
    del sys.modules[second], modules[second]
    gc.collect()
print("as they say")
"""
    assert python(code)[0] == "as they say\n"


def numpy_qrnn(layers, x):
    """A QRNN stack as the paper writes it: a convolution over time, then a loop.

    The weights are those of `layers`, and the state is zero at first.
    """
    def sigmoid(a):
        return 1 / (1 + np.exp(-a))
    for layer in layers:
        W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        k, H = layer.window, layer.hidden_size
        T, B, I = x.shape                                                                         # noqa: E741
        h, c = np.zeros((T, B, H)), np.zeros((B, H))
        for t in range(T):
            a = np.tile(b, (B, 1))
            for lag in range(k):                                # the last I columns of W belong to x_t itself
                if t - lag >= 0:
                    a = a + x[t - lag] @ W[:, (k - 1 - lag) * I:(k - lag) * I].T
            z, f = np.tanh(a[:, :H]), sigmoid(a[:, H:2 * H])
            c = f * c + (1 - f) * z
            h[t] = sigmoid(a[:, 2 * H:]) * c
        x = h
    return x, c


@pytest.mark.parametrize("window", [1, 2, [3, 1, 2]])
def test_qrnn_is_a_convolution_and_a_loop(window):
    """QRNN = QRNN section 2, written in numpy, for windows 1, 2 and a mixture."""
    qrnn = QRNN(5, [4, 6, 3], window=window).double()
    x = torch.randn(9, 2, 5, **DOUBLE)
    output, state = qrnn(x)
    expected, c = numpy_qrnn(qrnn.layers, x.numpy())
    close(output.detach().numpy(), expected)
    close(state[-1][0].detach().numpy(), c)


def test_qrnn_is_called_like_an_lstm():
    """Same shapes in and out as nn.LSTM, (T, B, I) or batch_first; the two layouts hold the same numbers."""
    x = torch.randn(7, 3, 5)
    for batch_first in (False, True):
        options = dict(num_layers=2, batch_first=batch_first, dropout=0.5)
        lstm, qrnn = torch.nn.LSTM(5, 4, **options), QRNN(5, 4, **options)
        output, state = qrnn(x)
        assert output.shape == qrnn(x, state)[0].shape == lstm(x)[0].shape
        assert [tuple(c.shape) for c, _ in state] == [tuple(c.shape) for c in lstm(x)[1][1]]
    one, other = QRNN(5, 4, 2), QRNN(5, 4, 2, batch_first=True)
    other.load_state_dict(one.state_dict())
    close(one(x)[0], other(x.transpose(0, 1))[0].transpose(0, 1))


def test_wrong_shapes_are_refused():
    """A shape that would be broadcast, or fail deep inside, is refused with what was expected."""
    qrnn, x, tokens = QRNN(5, 4, 2, window=2), torch.randn(7, 3, 5), torch.zeros(7, 3, dtype=torch.int64)
    (c, x_prev), second = qrnn(x)[1]
    for words, call in ((r"\(T >= 1, B, 5\).*\(7, 3, 6\)", lambda: qrnn(torch.randn(7, 3, 6))),
                        (r"T >= 1.*\(7, 5\)", lambda: qrnn(x[:, 0])),
                        ("T >= 1", lambda: qrnn(x[:0])),
                        (r"\(3, 4\).*\(1, 3, 5\).*\(1, 4\)", lambda: qrnn(x, [(c[:1], x_prev), second])),
                        (r"\(0, 3, 5\)", lambda: qrnn(x, [(c, x_prev[:0]), second])),
                        ("shorter", lambda: QRNN(5, 4, 2)(x, [(c, x_prev[:0])])),
                        ("at least 1", lambda: QRNN(5, 0)),
                        ("at least 1", lambda: QRNN(5, 4, window=0)),
                        ("one size and one window", lambda: QRNN(5, [4, 4], window=[1])),
                        ("one size and one window", lambda: QRNN(5, [])),
                        (r"\(7, 3\).*\(6, 3\)", lambda: LanguageModel(9, 4, 4, 1)(tokens, tokens[1:]))):
        with pytest.raises(ValueError, match=words):
            call()


def test_initial_weights():
    """A layer's are torch.nn.Linear's, the embedding's uniform within 0.1 (AWD, section 5), its bias 0."""
    torch.manual_seed(4)
    layer = QRNNLayer(6, 5, window=2)
    torch.manual_seed(4)
    linear = torch.nn.Linear(12, 15)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    model = LanguageModel(500, 40, 6, 2)
    weight = model.embedding.weight
    assert 0.0999 < weight.abs().max() <= 0.1
    assert weight.std().item() == pytest.approx(0.2 / 12 ** 0.5, rel=0.02)
    assert not model.decoder_bias.any()


def test_zoneout_keeps_the_old_value():
    """A share p of the neurons keeps its value, drawn anew for each stream and step; the others are as
    without. Evaluation has the mean of both gates. Zoneout 1 freezes the state.
    """
    layer, plain = QRNNLayer(5, 400, zoneout=0.3).double(), QRNNLayer(5, 400).double()
    plain.load_state_dict(layer.state_dict())
    x, c0 = torch.randn(1, 1, 5, **DOUBLE).expand(6, 8, 5), torch.randn(8, 400, **DOUBLE)
    steps, state = [], (c0, x[:0])
    for x_t in x.split(1):
        (before, _), (new, _) = state, plain(x_t, state)[1]
        state = layer(x_t, state)[1]
        kept = state[0] == before
        close(torch.where(kept, before, new), state[0])
        steps.append(kept)
    kept = torch.stack(steps)
    assert kept.double().mean() == pytest.approx(0.3, abs=0.02)
    assert kept.double().mean(0).std() < 0.25 and kept.double().mean(1).std() < 0.25    # (locked: 0.46)
    layer(x, (c0, x[:0]))[0].sum().backward()                           # the same for all T steps at once
    c = layer(x, (c0, x[:0]))[0] / (F.linear(x, layer.weight, layer.bias)[..., 800:]).sigmoid()
    kept = (c[1:] - c[:-1]).abs() < 1e-12
    assert kept.double().mean() == pytest.approx(0.3, abs=0.02) and kept.double().mean(0).std() < 0.25
    z, f, _ = F.linear(x[:1], layer.weight, layer.bias).chunk(3, -1)
    f = 0.3 + 0.7 * f.sigmoid()
    close(layer.eval()(x[:1], (c0, x[:0]))[1][0], (f * c0 + (1 - f) * z.tanh())[0])
    layer.train().zoneout = 1.0
    assert torch.equal(layer(x, (c0, x[:0]))[1][0], c0)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_products_stay_near_float32(device):
    """With bf16 products the loss is within 1% of float32's, every gradient within 5% (of its norm).

    State, logits and the answers of both g stay float32. So does the softmax: nll is that of float64 on
    these logits to 1e-6.
    """
    model, results = LanguageModel(50, 32, 64, 2).to(device), []
    tokens = torch.randint(50, (20, 4), device=device)
    for product in (torch.float32, torch.bfloat16):
        with torch.autocast(device, product, product != torch.float32):
            nll, _, state = model(tokens[:-1], tokens[1:])
            logits, _ = model.logits(tokens[:-1])
            answers = [d for g in (NeuronDNI(), LayerDNI([64, 32]), LayerDNI([64, 32], 0))
                       for d in lively(g).to(device)([c for c, _ in state])[0]]
        assert {x.dtype for x in (nll, logits, *answers, *flatten_state(state))} == {torch.float32}
        exact = F.cross_entropy(logits.double().flatten(0, 1), tokens[1:].flatten())
        assert nll.item() == pytest.approx(exact.item(), rel=1e-6)
        results.append((nll, torch.autograd.grad(nll, list(model.parameters()))))
    (a, full), (b, half) = results
    assert a != b and abs(a - b) < 0.01 * a
    for g, h in zip(full, half):
        assert (g - h).norm() < 0.05 * g.norm()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_qrnn_is_the_qrnn_at_any_length(strict):
    """torch.export takes two layers, a window of 2 and T as a free number, with and without a state."""
    qrnn, T = QRNN(5, 4, 2, window=2), torch.export.Dim("T", min=2, max=1000)
    for state in (None, qrnn(torch.randn(3, 2, 5))[1]):
        inputs = (torch.randn(6, 2, 5), state)
        shapes = ({0: T}, state and [(None, None)] * 2)
        exported = torch.export.export(qrnn, inputs, dynamic_shapes=shapes, strict=strict).module()
        for steps in (6, 11):
            x = torch.randn(steps, 2, 5)
            close(exported(x, state), qrnn(x, state))


def four_steps(compiled, device, product):
    """Losses, gradients and states of four chunks, the last of another length, and then the weights of g.

    The state is carried from chunk to chunk, and every random mask is in use.
    """
    torch.manual_seed(5)
    s = settings("dni", embedding_size=24, hidden_size=40, dropout_embedding=0.1, dropout_weight=0.3,
                 dropout_hidden=0.2)
    model, optimizer, dni = train.build(s, 60, device)
    lively(dni.g)
    for layer in model.rnn.layers:
        layer.zoneout = 0.1
    if compiled:
        train.compile_modules([model, dni.g])
    tokens, state, found = torch.randint(60, (90, 4)).to(device), None, []
    for start, stop in ((0, 20), (20, 40), (40, 60), (60, 75)):
        torch.manual_seed(stop)
        # Forms with and without a state, an h_g and a graph: all were met by the third chunk.
        with torch.compiler.set_stance("fail_on_recompile" if start == 60 else "default"):
            autocast = torch.autocast(device, product, product != torch.float32)
            nll, state = train.train_step(model, optimizer, dni, tokens[start:stop],
                                          tokens[start + 1:stop + 1], state, True, s.clip, autocast)
        found.append([nll, *(p.grad for p in model.parameters()), *flatten_state(state)])
    return [*found, list(dni.g.parameters())]


@SLOW
@COMPILER
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_is_plain(product, device):
    """Four steps of training with the compiled forms equal four with the plain ones.

    Every loss, gradient and state, and g, are the same to float32 rounding; with bf16 products to 1%. Both
    networks were compiled, each as one graph, and nothing again for a chunk of another length.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fallback_random=True):            # torch's own random numbers
        compiled = four_steps(True, device, product)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 6 and not counters["graph_break"], counters
    for ours, theirs in zip(compiled, four_steps(False, device, product), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= (1e-5 if product == torch.float32 else 1e-2) * b.norm()


@SLOW
@COMPILER
def test_without_a_compiler_the_plain_form_serves(tmp_path):
    """No working C++ compiler: one line on stderr, and the plain form's very numbers."""
    code = """
import torch, train
results = []
for compiled in (False, True):
    torch.manual_seed(0)
    model, tokens = train.LanguageModel(9, 4, 5, 2, dropout_input=0.5), torch.arange(21).view(7, 3) % 9
    if compiled:
        train.compile_modules([model])
    nll, penalty, _ = model(tokens, tokens)
    (nll + penalty).backward()
    results.append([nll, *(p.grad for p in model.parameters())])
print(all(map(torch.equal, *results)))
"""
    nowhere = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out, err = python(code, **nowhere)
    assert out == "True\n" and err.startswith("train.py: no --compile here, the plain form goes on: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("window", [1, 2, 3])
def test_streaming(window):
    """A sequence cut anywhere, with the state carried, equals one pass.

    The pieces may be shorter than the window.
    """
    qrnn = QRNN(3, 4, 2, window=window).double()
    x = torch.randn(7, 2, 3, **DOUBLE)
    whole, last = qrnn(x)
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 7), n) for n in (1, 2, 6)):
        state, pieces = None, []
        for start, stop in zip((0, *cuts), (*cuts, 7)):
            piece, state = qrnn(x[start:stop], state)
            pieces.append(piece)
        close(torch.cat(pieces), whole)
        close(state, last)


# --------------------------------------------------------------------- 2. Eq. 1 and the bootstrapped target

def by_definition(p, t):
    """Cosine and R^2 of predictions p and targets t, vectors."""
    return F.cosine_similarity(p, t, 0).item(), (1 - (p - t).square().sum() / t.square().sum()).item()


def layer_states(state):
    return [c for c, _ in state]


def tiny_model(windows=(1, 1)):
    """A float64 language model, small enough for whole Jacobians, and three chunks of T = 4, B = 2."""
    model = LanguageModel(11, 3, 5, 2).double()
    model.rnn = QRNN(3, [5, 3], window=list(windows)).double()
    tokens = torch.randint(11, (13, 2))
    return model, [(tokens[i:i + 4], tokens[i + 1:i + 5]) for i in (0, 4, 8)]


def one_graph(model, chunks):
    """Losses and border states of all chunks in a single graph, which is what full BPTT would see."""
    losses, states, state = [], [], None
    for inputs, targets in chunks:
        nll, penalty, state = model(inputs, targets, state)
        losses.append(nll + penalty)
        states.append(state)
    return losses, states


class Oracle(Interface):
    """An interface that injects the true gradients it was given, in order, whatever the state."""

    def __init__(self, gradients):
        super().__init__(NeuronDNI().double())
        self.gradients = iter(gradients)

    def synthesize(self, s_next):
        return next(self.gradients)


def test_eq1_with_the_true_future_gradient_is_full_bptt():
    """Eq. 1: given the TRUE future gradients, the chunks' gradients add up to full BPTT's.

    Left side: separate chunks, each trained by train_step. Right side: one graph over the whole text. With
    nothing injected the sum is different, which is what truncation costs.
    """
    model, chunks = tiny_model()
    parameters = list(model.parameters())
    losses, states = one_graph(model, chunks)
    full = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    T_B, future = chunks[0][0].numel(), []
    for k in range(2):
        gradients = torch.autograd.grad(sum(losses[k + 1:]), layer_states(states[k]), retain_graph=True)
        future.append([T_B * d for d in gradients])
    future.append([torch.zeros_like(c) for c in layer_states(states[2])])

    def sum_over_chunks(use_synthetic):
        dni, frozen, state = Oracle(future), torch.optim.SGD(parameters, 0.0), None
        total = [torch.zeros_like(p) for p in parameters]
        for inputs, targets in chunks:
            _, state = train.train_step(model, frozen, dni, inputs, targets, state, use_synthetic, math.inf)
            total = [t + p.grad for t, p in zip(total, parameters)]
        return total

    close(sum_over_chunks(True), list(full))
    truncated = flatten(sum_over_chunks(False))
    assert (truncated - flatten(full)).norm() > 1e-3 * flatten(full).norm()


def test_eq1_holds_for_windows_above_one_when_the_inputs_cross_too():
    """With a window of 2, c and x_prev cross the border. With both gradients injected Eq. 1 is exact."""
    model, chunks = tiny_model(windows=(2, 3))
    parameters = list(model.parameters())
    losses, states = one_graph(model, chunks)
    full = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    state = None
    for k, (inputs, targets) in enumerate(chunks):
        nll, penalty, new_state = model(inputs, targets, state)
        crossing = flatten_state(new_state)
        future = [torch.zeros_like(t) for t in crossing]
        if k < 2:
            future = torch.autograd.grad(sum(losses[k + 1:]), flatten_state(states[k]), retain_graph=True)
        (nll + penalty + sum((d * x).sum() for d, x in zip(future, crossing))).backward()
        state = [(c.detach(), x_prev.detach()) for c, x_prev in new_state]
    close([p.grad for p in parameters], list(full))
    (c, x_prev), *_ = train.detach_state(new_state)     # what train.py carries: the inputs' share is left out
    assert c.requires_grad and c.is_leaf and not x_prev.requires_grad


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_bootstrapped_target(alpha, monkeypatch):
    """target = dL_{T..2T}/dh_T + (dh_2T/dh_T)^T alpha delta^_2T, in units of one stream's summed loss (2.1).

    The paper's h_T and h_2T are s_1 and s_2 in the code. Left: the target that learn() hands to the
    regression, and what train_step leaves in the border state's .grad. Right: autograd over one graph of 2T
    steps for the first term; the whole Jacobian dh_2T/dh_T, as a matrix, times g's answer for the second. The
    prediction it is compared with is g's answer at s_1.
    """
    learned, regress = [], dni_module.regress
    monkeypatch.setattr(dni_module, "regress", lambda *a: learned.append(a[1:]) or regress(*a))
    model, chunks = tiny_model()
    g = lively(NeuronDNI()).double()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.0), alpha)
    optimizer, state, borders = torch.optim.SGD(model.parameters(), 0.0), None, []
    for inputs, targets in chunks[:2]:
        borders.append(state)
        _, state = train.train_step(model, optimizer, dni, inputs, targets, state, True, math.inf)
    T_B = chunks[0][0].numel()
    left = flatten([c.grad for c in layer_states(borders[1])]) * T_B

    (_, loss), (first, second) = one_graph(model, chunks[:2])
    true_part = torch.autograd.grad(loss, layer_states(first), retain_graph=True)

    def second_state(*cs):
        return flatten(layer_states(model(*chunks[1], [(c, x) for c, (_, x) in zip(cs, first)])[2]))
    rows = torch.autograd.functional.jacobian(second_state, tuple(layer_states(first)))
    jacobian = torch.cat([r.flatten(1) for r in rows], 1)               # dh_2T / dh_T, (N, N)
    with torch.no_grad():
        guess, memory = g(layer_states(first))                          # delta^_T
        answer, _ = g(layer_states(second), memory)                     # delta^_2T
    right = flatten(true_part) * T_B + jacobian.T @ (alpha * flatten(answer))
    [(predicted, target)] = learned                       # one border: the first chunk enters without a state
    close(left, right)
    close(flatten(target), right)
    close(flatten(predicted).detach(), flatten(guess))
    assert dni.agreement.result() == pytest.approx(by_definition(flatten(guess), right), rel=1e-4)
    assert all(math.isnan(x) for x in Agreement().result())             # nothing was seen
    assert dni.agreement.sums.grad_fn is None                           # the graph is let go
    assert (jacobian.T @ flatten(answer)).norm() > 1e-3 * left.norm()                      # g had a say in it


# ------------------------------------------------------------------------------------------- 3. the interface

class GRUReader(torch.nn.Module):
    """A stranger's model, called read(chunk, s) -> (s_next, loss): a linear layer reads h of a GRUCell."""
    cell, states = torch.nn.GRUCell, 1

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = torch.nn.Embedding(7, 5), self.cell(5, 6)
        self.decoder = torch.nn.Linear(6, 7)

    def start(self, B):
        return [torch.zeros(B, 6, **DOUBLE) for _ in range(self.states)]

    def step(self, x, s):
        return [self.rnn(x, *s)]

    def forward(self, chunk, s):
        losses = []
        for x, y in zip(chunk, chunk[1:]):
            s = self.step(self.embedding(x), s)
            losses.append(F.cross_entropy(self.decoder(s[0]), y))
        return s, sum(losses) / len(losses)


class LSTMReader(GRUReader):
    """The same with an LSTMCell, which has two states, h and c."""
    cell, states = torch.nn.LSTMCell, 2

    def step(self, x, s):
        return list(self.rnn(x, tuple(s)))


class QRNNReader(GRUReader):
    """The same with a QRNN of two layers and windows of 1, which has a state a layer."""
    cell, states = staticmethod(lambda *sizes: QRNN(*sizes, num_layers=2)), 2

    def forward(self, chunk, s):
        state = [(c, c.new_zeros(0, len(c), n)) for c, n in zip(s, (5, 6))]
        h, state = self.rnn(self.embedding(chunk[:-1]), state)
        return layer_states(state), F.cross_entropy(self.decoder(h).flatten(0, 1), chunk[1:].flatten())


@pytest.mark.parametrize("kind", ["neuron", "layer", "linear"])
@pytest.mark.parametrize("Reader", [GRUReader, LSTMReader, QRNNReader])
def test_five_lines_add_a_synthetic_gradient_to_any_model(Reader, kind):
    """credit, backward and learn are Eq. 1, the bootstrapped target and g's regression.

    This holds for three models that g does not know. Left: the five lines. Right: the derivatives of every
    chunk by torch.autograd.grad, put together by hand.
    """
    T, B, alpha = 4, 3, 0.7
    read, phi_gradients = Reader().double(), []
    g = NeuronDNI() if kind == "neuron" else LayerDNI([6] * Reader.states, 50 if kind == "layer" else 0)
    lively(g).double()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.0), alpha)
    dni.optimizer.register_step_pre_hook(
        lambda *_: phi_gradients.append([p.grad.clone() for p in g.parameters()]))
    text, s_next, memory = torch.randint(7, (3 * T + 1, B)), read.start(B), None
    for k in range(3):
        chunk = text[k * T:(k + 1) * T + 1]
        read.zero_grad()
        s = [c.detach().requires_grad_() for c in s_next]
        s_next, loss = read(chunk, s)
        (loss + dni.credit(s, s_next, tokens_per_chunk=T * B)).backward()
        error = dni.learn()

        predicted, memory = g([c.detach() for c in s], memory)
        future = [d.detach() for d in g([c.detach() for c in s_next], memory)[0]]
        memory = None if memory is None else tuple(m.detach() for m in memory)
        again = [c.detach().requires_grad_() for c in s]
        s_again, loss_again = read(chunk, again)
        everything = [*read.parameters(), *again]
        true = torch.autograd.grad(loss_again, everything, retain_graph=True)
        injected = [alpha / (T * B) * d for d in future]
        through = torch.autograd.grad(s_again, everything, injected, allow_unused=True)
        expected = [a if b is None else a + b for a, b in zip(true, through)]
        close([p.grad for p in read.parameters()], expected[:-len(s)])
        target = [T * B * d for d in expected[-len(s):]]
        mse = ((flatten(predicted) - flatten(target)) ** 2).mean()
        close(error, mse.detach())
        close(phi_gradients[-1], list(torch.autograd.grad(mse, g.parameters())))


def test_a_layer_wise_g_is_an_mlp_a_layer():
    """LayerDNI is W3 relu(W2 relu(W1 c)) for each layer, by hand, and one matrix with hidden_size 0; the
    paper's
    neuron-wise g is one to two orders smaller."""
    g, s = lively(LayerDNI([4, 3])), [torch.randn(2, 4), torch.randn(2, 3)]
    for mlp, c, answer in zip(g.mlps, s, g(s)[0]):
        one, two, three = (m for m in mlp if isinstance(m, torch.nn.Linear))
        hidden = (c @ one.weight.T + one.bias).clamp(min=0)
        close(answer, (hidden @ two.weight.T + two.bias).clamp(min=0) @ three.weight.T + three.bias)
    linear = lively(LayerDNI([4, 3], hidden_size=0))
    close(linear(s)[0][1], s[1] @ linear.mlps[1][0].weight.T + linear.mlps[1][0].bias)
    paper = [layer.hidden_size for layer in LanguageModel(10).rnn.layers]
    count, neuron = (sum(p.numel() for p in g.parameters()) for g in (LayerDNI(paper), NeuronDNI()))
    assert paper == [1550, 1550, 1550, 400] and 10 <= count / neuron <= 100


def test_what_is_used_and_what_is_corrected_come_from_one_g():
    """What synthesize() says of a border is what credit() corrects there, from the same φ and h_g.

    h_g moves on by one border a chunk, without a graph. Adam at 1e-4 is the default optimiser.
    """
    g, s = lively(NeuronDNI()), [torch.randn(2, 3).requires_grad_()]
    dni, used, memory = Interface(g, torch.optim.SGD(g.parameters(), 0.1)), None, None
    for _ in range(3):
        s_next = [s[0].sin() + 1]
        with torch.no_grad():
            predicted, memory = g(s, memory)
        dni.credit(s, s_next, 10).backward()
        close(dni.pending[0][0].detach(), predicted[0])
        close(dni.memory[0], memory[0])
        assert used is None or torch.equal(used, predicted[0])
        dni.learn()
        used, s = dni.synthesize(s_next)[0], [s_next[0].detach().requires_grad_()]
    assert not used.requires_grad and dni.memory[0].grad_fn is None
    default = Interface(NeuronDNI()).optimizer
    assert isinstance(default, torch.optim.Adam) and default.param_groups[0]["lr"] == 1e-4


def test_wrong_calls_of_the_interface_say_what_to_do():
    """A call out of turn, or with a state that would get no gradient, is refused. The message names the way
    out.
    """
    def chunk(dni, B=2, start=lambda c: c.requires_grad_(), end=lambda c: 2 * c, second=lambda c: 2 * c,
              **options):
        s = [start(torch.randn(B, 3)), torch.randn(B, 4).requires_grad_()]
        s_next = [end(s[0]), second(s[1])]
        return dni.credit(s, s_next, 10, **options), s_next

    def refused(error, words, *steps):
        dni = Interface(NeuronDNI())
        with pytest.raises(error, match=words):
            for step in steps:
                step(dni)

    def learned(dni):
        chunk(dni)[0].backward()
        dni.learn()
    refused(RuntimeError, r"call credit\(\) and then backward\(\)", lambda dni: dni.learn())
    refused(RuntimeError, r"call backward\(\) on loss \+ credit", chunk, lambda dni: dni.learn())
    refused(RuntimeError, r"twice: call backward\(\) and learn\(\)", chunk, chunk)
    refused(ValueError, r"leaves .* c.detach\(\).requires_grad_\(\)",
            lambda dni: chunk(dni, start=lambda c: c))
    refused(ValueError, r"leaves", lambda dni: chunk(dni, start=lambda c: 2 * c.requires_grad_()))
    refused(ValueError, r"before detaching", lambda dni: chunk(dni, end=lambda c: (2 * c).detach()))
    refused(ValueError, r"before detaching", lambda dni: chunk(dni, second=lambda c: (2 * c).detach()))
    refused(ValueError, r"same shapes, got \[\(2, 3\), \(2, 4\)\] and \[\(2, 3\), \(2, 2\)\]",
            lambda dni: chunk(dni, second=lambda c: c[:, :2]))
    refused(ValueError, r"list\(h_n\) for nn.GRU", lambda dni: chunk(dni, end=lambda c: 2 * c[None]))
    refused(ValueError, r"h_g remembers 14 neurons, and s_next has 28: call reset\(\)",
            learned, lambda dni: chunk(dni, B=4))
    dni = Interface(NeuronDNI())
    assert dni.credit(None, [torch.randn(2, 3).requires_grad_()], 10) is not None and dni.learn() is None
    assert chunk(dni, use_synthetic=False)[0] == 0
    dni.reset()                                                         # forgets what is to be learned
    chunk(dni)


# ------------------------------------------------------------------------------------ 4. trained but not used

def gradients_of_a_run(mode, steps=4, **changes):
    """Model gradients of each of a few train_steps in float32; Adam updates the weights in between."""
    s = settings(mode, embedding_size=8, hidden_size=12, dropout_weight=0.1, dropout_embedding=0.1, **changes)
    model, optimizer, dni = train.build(s, 30, "cpu")
    tokens, state, gradients = torch.arange(400).view(100, 4) % 29, None, []
    torch.manual_seed(3)                                                # of the dropout masks
    for k in range(steps):
        use_synthetic = train.gradient_source(s, 0, k / 2) == "synthetic"       # two steps an "epoch"
        inputs, targets = tokens[20 * k:20 * k + 20], tokens[20 * k + 1:20 * k + 21]
        _, state = train.train_step(model, optimizer, dni, inputs, targets, state, use_synthetic, s.clip)
        gradients.append([p.grad.clone() for p in model.parameters()])
    return gradients, dni


@pytest.mark.parametrize("kind", ["neuron", "layer", "linear"])
def test_a_dni_trained_but_not_used_changes_nothing(kind):
    """While g only learns, every gradient of the model is BPTT's, bit for bit, dropout included; then not.

    A g whose last layer is zero says 0, so the first step that uses it is BPTT's, too.
    """
    bptt, _ = gradients_of_a_run("bptt")
    unused, dni = gradients_of_a_run("dni", dni_kind=kind, dni_warmup=10.0)
    first, _ = gradients_of_a_run("dni", dni_kind=kind, dni_warmup=0.0, steps=1)
    for ours, theirs in zip([*unused, *first], [*bptt, bptt[0]], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    last_layer = (dni.g.decode if kind == "neuron" else dni.g.mlps[0])[-1]
    assert any((p != 0).any() for p in last_layer.parameters())         # it has learned
    used, _ = gradients_of_a_run("dni", dni_kind=kind, dni_warmup=1.0)
    assert any((a != b).any() for a, b in zip(used[-1], bptt[-1]))


# ------------------------------------------------------------------- 5. g learns, and what a state can tell

def learn(g, gradient, borders=600, neurons=(16, 16)):
    """Train g on random states with the future gradient(now, before). Cosine and R^2 of the last tenth."""
    optimizer, memory, before = torch.optim.Adam(g.parameters(), 3e-3), None, torch.zeros(16, 32)
    agreement = Agreement()
    for n in range(borders):
        now = torch.rand(16, 32) * 2 - 1
        predicted, memory = g(list(now.split(neurons, 1)), memory)
        memory = None if memory is None else tuple(m.detach() for m in memory)
        target = gradient(now, before).split(neurons, 1)
        if n >= borders * 9 // 10:
            agreement.update(predicted, target)
        regress(optimizer, predicted, target)
        before = now
    return agreement.result()


def test_g_learns_a_known_gradient():
    """R^2 passes 0.99 where the gradient is -3 sin(3 h) + 2 h, and stays at 0 where it is drawn at random."""
    cosine, r2 = learn(NeuronDNI(), lambda h, _: -3 * torch.sin(3 * h) + 2 * h)
    assert r2 > 0.99 and cosine > 0.99
    assert learn(NeuronDNI(), lambda h, _: torch.randn_like(h), borders=200)[1] < 0.05


def test_g_remembers():
    """Where the gradient is h now + h at the border before, g passes R^2 = 1/2, and no g without h_g can.

    (Not so where it is the PAST alone: g learns one border at a time, so nothing rewards it for writing to
    h_g what only a later border needs; it writes what is of use at once.)
    """
    def gradient(now, before):
        return now + before
    assert learn(NeuronDNI(), gradient)[1] > 0.65
    assert 0.4 < learn(LayerDNI([16, 16]), gradient, borders=2000)[1] < 0.55


def two_state_chain(stay):
    """{four words: their probability}. A hidden state, 0 or 1, stays with probability `stay` from word to
    word. A word is the state with probability 0.8, and else the other."""
    def joint(words, hidden):
        moves = (stay if a == b else 1 - stay for a, b in itertools.pairwise(hidden))
        return 0.5 * math.prod(moves) * math.prod(0.8 if w == h else 0.2 for w, h in zip(words, hidden))
    strings = list(itertools.product((0, 1), repeat=4))
    return {words: sum(joint(words, hidden) for hidden in strings) for words in strings}


def expected_gradients(text, model):
    """Words 1 and 2 are read, then comes a border, then words 3 and 4 are predicted.

    text, model: chains. The state s is -1 or 1 for word 2, plus θ = 0 times the same for word 1. From s, and
    from word 3 for word 4, the model predicts what its own chain says when word 1 is unknown. Returns the
    mean of dL/ds for each value of s, times its probability, and that of the gradient of θ. All of the
    latter crosses the border.
    """
    def logit(known):                                                  # of a 1, after these words from word 2
        zero, one = (sum(p for words, p in model.items() if words[1:2 + len(known)] == (*known, w))
                     for w in (0, 1))
        return math.log(one / zero)
    theta = torch.zeros((), **DOUBLE, requires_grad=True)
    of_s, of_theta = [0.0, 0.0], 0.0
    for (w1, w2, *future), p in text.items():
        s, loss = 2 * w2 - 1 + theta * (2 * w1 - 1), 0.0
        for k, word in enumerate(future):
            low, high = logit((0, *future[:k])), logit((1, *future[:k]))
            x = (low + high) / 2 + (high - low) / 2 * s                 # `low` at s = -1, `high` at s = 1
            loss = loss - F.logsigmoid(x if word else -x)
        ds, dtheta = torch.autograd.grad(loss, (s, theta))
        of_s[w2] += p * ds.item()
        of_theta += p * dtheta.item()
    return of_s, of_theta


def test_what_a_state_can_tell():
    """"What can g know?" in dni.py, by counting all texts of four words. A calibrated model: the mean of
    dL/ds given s is zero, so no g(s) beats zero, although truncation does lose a gradient. The same model on
    texts of another chain: the mean is not zero, so there is something to know.
    """
    model = two_state_chain(stay=0.9)
    of_s, of_theta = expected_gradients(model, model)
    assert of_s == pytest.approx([0.0, 0.0], abs=1e-12)
    assert of_theta < -0.05
    of_s, _ = expected_gradients(two_state_chain(stay=0.6), model)
    assert of_s[0] < -0.04 and of_s[1] > 0.04


# --------------------------------------------------------------- 6. the language model and its regularisation

def test_perplexity_by_hand():
    """evaluate is minus the mean log-probability of each token given all before it.

    The mean is over the n - 1 predictions, and dropout is off.
    """
    model = LanguageModel(13, 4, 6, 2, dropout_input=0.5, dropout_hidden=0.5, dropout_output=0.5,
                          dropout_embedding=0.5, dropout_weight=0.5).double()
    tokens, by_hand = torch.randint(13, (40,)), 0.0
    with torch.no_grad():
        for i in range(1, 40):                               # a fresh pass over the whole past for each token
            logits, _ = model.eval().logits(tokens[:i, None])
            by_hand -= logits[-1, 0].softmax(0)[tokens[i]].log().item() / 39
    for chunk in (1, 7, 39, 200):
        assert train.evaluate(model.train(), tokens, 1, chunk=chunk) == pytest.approx(by_hand, rel=1e-12)
        assert model.training
    assert train.perplexity(1e9) == train.perplexity(700.0) < math.inf
    inputs, targets = data.streams(tokens, 3)
    separately = [train.evaluate(model, torch.cat([inputs[:, b], targets[-1:, b]]), 1) for b in range(3)]
    assert train.evaluate(model, tokens, 3) == pytest.approx(sum(separately) / 3, rel=1e-12)


def test_locked_dropout_is_constant_in_time():
    """Each stream and each call has its own mask, the same at all steps. Kept values are divided by 1 - p."""
    x = torch.ones(9, 30, 40)
    y, again = locked_dropout(x, 0.3), locked_dropout(x, 0.3)
    assert (y == y[:1]).all() and (y[0, 0] != y[0, 1]).any() and (y != again).any()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()} and abs(y.mean() - 1) < 0.1
    assert locked_dropout(x, 0.3, training=False) is x


def test_dropout_between_layers():
    """The input of each layer but the first loses neurons of its own, the same at all steps; in evaluation
    none.
    """
    qrnn, seen = QRNN(40, 40, 3, dropout=0.5), []
    for layer in qrnn.layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0] == 0).float().mean(0)))
    qrnn(torch.ones(9, 3, 40))
    qrnn.eval()(torch.ones(9, 3, 40))
    assert not any(zeros.any() for zeros in (seen[0], *seen[3:])) and not torch.equal(seen[1], seen[2])
    for zeros in seen[1:3]:
        assert set(zeros.unique().tolist()) == {0, 1} and abs(zeros.mean() - 0.5) < 0.2


def test_weight_dropout_reaches_the_raw_weight():
    """The gradient lands on the parameter: zero where it was dropped, scaled by 1 / (1 - p) elsewhere.

    In evaluation the whole weight is used.
    """
    layer, x = QRNNLayer(5, 4, weight_dropout=0.5).double(), torch.randn(1, 3, 5, **DOUBLE)
    torch.manual_seed(3)
    h, _ = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(layer.weight), 0.5)
    z, f, o = F.linear(x, layer.weight * mask, layer.bias).chunk(3, -1)
    expected = o.sigmoid() * (1 - f.sigmoid()) * z.tanh()
    close(h, expected)
    close(torch.autograd.grad(h.sum(), layer.weight), torch.autograd.grad(expected.sum(), layer.weight))
    assert 0 < (mask == 0).sum() < mask.numel()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    z, f, o = F.linear(x, layer.weight, layer.bias).chunk(3, -1)
    close(layer.eval()(x)[0], o.sigmoid() * (1 - f.sigmoid()) * z.tanh())


def test_loss_and_its_penalties():
    """nll is the cross-entropy of logits(). The penalties are AWD's two means, after and before dropout
    (4.6).

    Targets of -100 are not counted, and the decoder is the embedding.
    """
    model = LanguageModel(13, 4, 6, 2, dropout_output=0.5, activation=2.0, temporal=3.0).double()
    (tokens, targets), results = torch.randint(13, (2, 8, 3)), []
    targets[2] = -100
    for form in (lambda: model(tokens, targets), lambda: model.logits(tokens),
                 lambda: model.read(tokens, None)):
        torch.manual_seed(2)                                            # the same dropout masks
        results.append(form())
    (nll, penalty, _), (logits, _), (_, output, raw, _) = results
    assert (output == 0).any() and not torch.equal(output, raw)
    log_p = logits.log_softmax(-1)
    counted = [log_p[t, b, targets[t, b]] for t in (0, 1, 3, 4, 5, 6, 7) for b in range(3)]
    close(nll, -torch.stack(counted).mean())
    close(logits, output @ model.embedding.weight.T + model.decoder_bias)
    squares = sum((h ** 2).mean() for h in output) / 8
    steps = sum(((b - a) ** 2).mean() for a, b in zip(raw, raw[1:])) / 7
    close(penalty, 2 * squares + 3 * steps)
    model.activation = 0.0
    assert model(tokens[:1], targets[:1])[1] == 0                       # one step has no difference
    assert sum(p.shape == (13, 4) for p in model.parameters()) == 1     # tied


def test_each_dropout_is_in_its_place():
    """`build` hands each setting to its own dropout, which is used: the share of zeros is as asked.

    The weights' is seen in the products, where one input alone is not zero.
    """
    s = settings(embedding_size=300, hidden_size=300, num_layers=2, dropout_output=0.1, dropout_hidden=0.2,
                 dropout_input=0.3, dropout_embedding=0.4, dropout_weight=0.5)
    model, _, _ = train.build(s, 300, "cpu")
    first, second = model.rnn.layers
    seen = {}
    second.register_forward_pre_hook(lambda _, a: seen.update(hidden=a[0]))
    model.rnn.register_forward_pre_hook(lambda _, a: seen.update(input=a[0]))
    _, output, raw, _ = model.read(torch.arange(300).view(1, 300), None)  # every word, in a stream
    dropped = (seen["input"] == 0).all(-1).double().mean()
    zeros = {name: (x == 0).double().mean() for name, x in dict(seen, output=output).items()}
    locked = 1 - (1 - zeros["input"]) / (1 - dropped)
    torch.nn.init.zeros_(first.bias)
    one = torch.zeros(1, 1, 300)
    one[..., 7] = 1.0
    weight = (first(one)[0] == 0).double().mean()                        # tanh(0) = 0: z's share alone
    found = [zeros["output"], zeros["hidden"], locked, dropped, weight]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.08) and (raw != 0).all()
    assert found[0] == pytest.approx(0.1, abs=0.01) and found[1] == pytest.approx(0.2, abs=0.01)


def test_embedding_dropout_drops_a_word_everywhere():
    """A dropped word is zero wherever it stands in the chunk. The others are divided by 1 - p."""
    model, seen = LanguageModel(1000, 4, 6, 2, dropout_embedding=0.4), []
    model.rnn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.logits(torch.arange(1000).repeat(2).view(100, 20))
    dropped = (seen[0] == 0).all(-1).flatten()
    assert torch.equal(dropped[:1000], dropped[1000:])
    kept = model.embedding.weight[~dropped[:1000]] / 0.6                # so that the mean stays what it was
    close(seen[0].view(2000, 4)[:1000][~dropped[:1000]], kept)


def test_jitter_is_drawn_as_it_says():
    """Over 400 epochs of PTB one chunk in twenty is T/2 long, the rest T, each with deviation 5.

    Every epoch has its own chunks.
    """
    lengths, epochs, paper = [], set(), train.preset("paper", "bptt", "ptb")
    for epoch in range(400):
        borders = list(train.chunk_borders(46_479, paper, epoch))
        epochs.add(tuple(borders))
        lengths += [stop - start for start, stop in borders[:-1]]
    lengths = torch.tensor(lengths).double()
    short, whole = lengths[lengths < 150], lengths[lengths >= 150]
    assert len(epochs) == 400 and len(short) / len(lengths) == pytest.approx(0.05, abs=0.003)
    for part, mean in ((whole, 199.5), (short, 99.5)):              # int() takes half a step away, on average
        assert part.mean() == pytest.approx(mean, abs=0.3) and part.std() == pytest.approx(5, abs=0.2)
    tiny = train.chunk_borders(10 ** 6, dataclasses.replace(paper, chunk=5))
    assert min(b - a for a, b in tiny if b < 10 ** 6) == 5


# ------------------------------------------------------------------------------------------- 7. warm restarts

def optimizer_with(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": rate} for rate in rates])


@pytest.mark.parametrize("base, mult, eta_min", [(5, 2, 0.0), (1, 2, 1e-5), (3, 1, 0.0), (2, 3, 1e-4)])
def test_sgdr_is_cosine_annealing_warm_restarts(base, mult, eta_min):
    """To the last bit PyTorch's scheduler: by whole epochs with step(), and by fractions with step(epoch).

    (mult 3 only for these 60 epochs: at epoch 121 of base 1, PyTorch's logarithm comes to 4.999.., one run
    too few.)
    """
    for moments in ([None] * 60, [i / 7 for i in range(420)]):
        ours, theirs = optimizer_with(1e-3, 0.3), optimizer_with(1e-3, 0.3)
        a, b = SGDR(ours, base, mult, eta_min), CosineAnnealingWarmRestarts(theirs, base, mult, eta_min)
        assert a.get_last_lr() == b.get_last_lr()
        for moment in moments:
            ours.step(), theirs.step()
            a.step(moment), b.step(moment)
            assert a.get_last_lr() == b.get_last_lr() == [g["lr"] for g in ours.param_groups]


def test_restarts_of_the_paper_and_of_the_authors_code():
    """E_base = 5 restarts at 5, 15, 35, 75, 155, 315 (2.1: E_i = 2^i E_base); given epochs are kept."""
    starts = lambda **kw: [e for e in range(1, 330) if run_at(e, **kw).elapsed == 0]              # 
    assert starts(base=5) == [5, 15, 35, 75, 155, 315]
    authors = [5, 10, 20, 40, 80, 160, 320]
    assert starts(restarts=authors) == authors
    assert run_at(9.5, base=5) == (1, 4.5, 10) and run_at(12, restarts=[5, 10]) == (2, 2, 5)
    assert [run_at(e, base=0.5).index for e in (0, 0.49, 0.5, 1.49, 1.5)] == [0, 0, 1, 1, 2]
    for bad in (dict(epoch=-1), dict(epoch=0, base=0),
                dict(epoch=0, restarts=[3, 3]), dict(epoch=0, restarts=[0, 1])):
        with pytest.raises(ValueError):
            run_at(**bad)


@pytest.mark.parametrize("base, mult", [(0.1, 2), (0.1, 1), (1 / 3, 2), (0.7, 3), (0.2, 1.5)])
def test_a_moment_within_rounding_of_a_restart_is_the_restart(base, mult):
    """Restarts summed in floating point, run by run, are restarts, and so are their neighbouring floats."""
    start, length = 0.0, base
    for i in range(1, 16):
        start, length = start + length, length * mult
        for moment in (start, math.nextafter(start, 0), math.nextafter(start, math.inf), round(start, 14)):
            run, elapsed, its_length = run_at(moment, base, mult)
            assert run == i and elapsed <= 1e-12 * start and its_length == pytest.approx(length)
        assert run_at(start * (1 - 1e-9), base, mult).index == i - 1
    assert run_at(0.3, base=0.1) == (2, 0, 0.4)


def test_bounds_per_run_and_what_they_may_be():
    """Run i falls from eta_max^i to eta_min^i, and the last bounds serve later runs. Whole numbers are
    bounds, too.

    A run without end keeps its first rate, to the last bit. No run has a negative length, or is at infinity.
    """
    schedule = SGDR(optimizer_with(1.0), 2, eta_max=[1, 0.5], eta_min=[0.1, 0])

    def at(epoch):
        schedule.step(epoch)
        return schedule.get_last_lr()[0]
    assert [at(e) for e in (0, 1, 2, 4, 6, 10)] == pytest.approx([1.0, 0.55, 0.5, 0.25, 0.5, 0.25])
    assert at(2 - 1e-9) == pytest.approx(0.1) and at(6 - 1e-9) == pytest.approx(0.0)
    constant = SGDR(optimizer_with(4e-3), math.inf)
    for epoch in (0, 0.1, 7, 1e6):
        constant.step(epoch)
        assert constant.get_last_lr() == [4e-3] and constant.run.index == 0
    for bad in (dict(epoch=math.inf), dict(epoch=math.nan), dict(epoch=1, mult=0.5), dict(epoch=1, base=-1)):
        with pytest.raises(ValueError, match="mult >= 1"):
            run_at(**bad)
    assert SGDR(optimizer_with(1.0), 2, eta_max=1).get_last_lr() == [1]


def test_sgdr_survives_a_state_dict(tmp_path):
    """Saved and loaded with weights_only in the middle of a run, it goes on as if nothing had happened."""
    straight, optimizer = SGDR(optimizer_with(1e-3), 3), optimizer_with(1e-3)
    first = SGDR(optimizer, 3)
    for _ in range(5):
        straight.optimizer.step(), straight.step(), optimizer.step(), first.step()
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "s.pt")
    schedule_state, optimizer_state = torch.load(tmp_path / "s.pt", weights_only=True)
    optimizer = optimizer_with(1e-3)
    second = SGDR(optimizer, 1)
    optimizer.load_state_dict(optimizer_state), second.load_state_dict(schedule_state)
    assert second.run == straight.run == (1, 2, 6)
    for _ in range(20):
        straight.optimizer.step(), straight.step(), optimizer.step(), second.step()
        assert straight.get_last_lr() == second.get_last_lr() and straight.run == second.run


def test_a_schedule_resumes_with_last_epoch():
    """SGDR(optimizer, last_epoch=n) goes on with epoch n + 1, as PyTorch's schedulers do."""
    for kind in (SGDR, CosineAnnealingWarmRestarts):
        optimizer, rates = optimizer_with(1.0), []
        optimizer.param_groups[0]["initial_lr"] = 1.0
        schedule = kind(optimizer, 4, 2, last_epoch=5)
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
        assert rates == pytest.approx([0.5 + math.cos(math.pi * n / 8) / 2 for n in (2, 3)]), kind


# ---------------------------------------------------------------------------------------------------- 8. data

def spelt(corpus, split):
    return " ".join(corpus.vocabulary[token] for token in getattr(corpus, split))


def canonical(monkeypatch, texts, url="http://127.0.0.1:9"):
    for name in {name for name, _ in texts}:
        hashes = {split: hashlib.sha256(texts[name, split].encode()).hexdigest() for split in data.SPLITS}
        monkeypatch.setitem(data.DOWNLOADS, name, (url + "/{split}", hashes))


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("name, counts", [
    ("ptb", (929_589, 73_760, 82_430, 10_000)), ("wt2", (2_088_628, 217_646, 245_569, 33_278)),
    ("ptb-chars", (5_017_482, 393_042, 442_423, 50))])
def test_counts_of_the_canonical_corpora(name, counts, capsys):
    """Files of the recorded SHA-256 have the literature's tokens and vocabulary. PTB's unigram is at 639."""
    if not os.environ.get(data.ENVIRONMENT):
        pytest.skip(f"{data.ENVIRONMENT} names no folder with the corpora")
    corpus = data.load_corpus(name)
    assert (*(len(getattr(corpus, split)) for split in data.SPLITS), len(set(corpus.vocabulary))) == counts
    assert name != "ptb" or round(data.unigram_perplexity(corpus)) == 639
    assert "not the canonical" not in capsys.readouterr().err


def test_a_fingerprint_tells_texts_apart():
    """Words split, ordered or spelt otherwise are another corpus. The same corpus, made again, is not."""
    def corpus(train, valid, test=(0,), vocabulary=("a", "b")):
        return data.Corpus("x", list(vocabulary), *map(torch.tensor, (train, valid, test))).fingerprint()
    seen = [corpus([0, 1, 0], [1]), corpus([0, 1], [0, 1]), corpus([0, 1, 0, 1], []), corpus([1, 0, 0], [1]),
            corpus([0, 1, 0], [1], vocabulary=("a", "c")), corpus([0, 1], [0], [1, 0])]
    assert len(set(seen)) == 6 and seen[0] == corpus([0, 1, 0], [1])


@pytest.mark.parametrize("n, B", [(101, 4), (104, 4), (5, 4), (50, 1), (61_139, 20)])
def test_streams_lose_nothing_but_the_remainder(n, B):
    """A target is the token after its input. The streams together are the text. L + 1 steps are refused."""
    L = (n - 1) // B
    inputs, targets = data.streams(torch.arange(n), B, L)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs.t().flatten(), torch.arange(L * B)) and n - 1 - L * B < B
    with pytest.raises(data.UserError, match=f"too few for {B} streams.*less than one chunk of {L + 1};"):
        data.streams(torch.arange(n), B, L + 1)


def test_the_picture_of_streams_is_what_streams_does():
    """The alphabet in the docstring is the alphabet as `streams` cuts it."""
    inputs, targets = data.streams(torch.arange(26), 6)
    rows = [" ".join(chr(97 + letter) for letter in row) for row in torch.cat([inputs, targets], 1)]
    drawn = re.findall(r"^ +((?:\w +){11}\w)$", data.streams.__doc__, re.M)
    assert [" ".join(row.split()) for row in drawn] == rows


def test_the_vocabulary_is_by_count_then_by_first_use():
    """A slow sort by (count, first place) gives the same order, ties included."""
    words = "d b c b d a c e <eos>".split()
    corpus = data.from_lines("x", {split: [words[:-1]] for split in data.SPLITS})
    assert corpus.vocabulary == sorted(set(words), key=lambda w: (-words.count(w), words.index(w)))
    assert spelt(corpus, "train").split() == words


@pytest.mark.parametrize("train, min_count, vocabulary, valid", [
    ("a <unk> a b", 1, "a <unk> b <eos>", "<unk> b <eos>"), ("a a b", 1, "a b <eos> <unk>", "<unk> b <eos>"),
    ("a a a b b", 3, "a <eos> <unk>", "<unk> <unk> <eos>")])
def test_new_and_rare_words_are_unk(train, min_count, vocabulary, valid):
    """They share one <unk>, that of train where train has one. <eos> is a word however rare it is."""
    splits = {"train": [train.split()], "valid": [["new", "b"]], "test": [["newer"]]}
    corpus = data.from_lines("x", splits, min_count)
    assert " ".join(corpus.vocabulary) == vocabulary and spelt(corpus, "valid") == valid
    assert spelt(corpus, "test") == "<unk> <eos>"


def test_a_folder_is_read(tmp_path):
    """<eos> ends every line, empty ones inside the text too. A BOM and the CR of Windows are no words."""
    write(tmp_path, {"train.txt": b"\xef\xbb\xbfa b a\r\n\r\nc\r\n", "valid.txt": "a d\n", "test.txt": "c c"})
    corpus = data.load_corpus(str(tmp_path))
    assert spelt(corpus, "train") == "a b a <eos> <eos> c <eos>" and corpus.name == tmp_path.name
    assert spelt(corpus, "valid") == "a <unk> <eos>" and spelt(corpus, "test") == "c c <eos>"


@pytest.mark.parametrize("files, why", [
    ({}, "has no train.txt and no valid.txt and no test.txt; use pydoc, ptb, ptb-chars, wt2, recall or"),
    ({"train.txt": "a", "valid.txt": "a"}, "has no test.txt; use"),
    ({"train.txt": "a", "valid.txt": "\n\n", "test.txt": "a"}, "valid.txt holds no words$"),
    ({"train.txt": "a", "valid.txt": "a", "test.txt": b"caf\xe9"}, r"test.txt is not UTF-8 \(byte 3\)")])
def test_what_cannot_be_read_is_told_in_one_line(files, why, tmp_path):
    """An unknown name, a missing split, an empty file and another encoding. No flag of train.py is named."""
    write(tmp_path, files)
    with pytest.raises(data.UserError, match=why):
        data.load_corpus(str(tmp_path) if files else "klingon")
    assert not re.search("--[a-z]", Path(data.__file__).read_text())


def test_a_closed_file_is_told_in_one_line(tmp_path, monkeypatch):
    """A file that the system does not let us read."""
    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))
    write(tmp_path, {"train.txt": "a", "valid.txt": "a", "test.txt": "a"})
    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(data.UserError, match="/train.txt cannot be read: Permission denied$"):
        data.load_corpus(str(tmp_path))


def test_ptb_chars_spells_ptb(tmp_path, monkeypatch):
    """The characters of ptb are its text, with _ for a space and <eos> for the end of a line."""
    canonical(monkeypatch, {("ptb", split): "the end\nof it\n" for split in data.SPLITS})
    write(tmp_path, {f"ptb.{split}.txt": "the end\nof it\n" for split in data.SPLITS})
    assert spelt(data.load_corpus("ptb-chars", tmp_path), "test") == "t h e _ e n d <eos> o f _ i t <eos>"


def test_the_right_files_are_found(tmp_path, monkeypatch, capsys):
    """Of two corpora side by side each name finds its own, in any of the layouts, without a note."""
    texts = {(name, split): f"{name} {split}\n" for name in data.DOWNLOADS for split in data.SPLITS}
    canonical(monkeypatch, texts)
    layouts = [("ptb.{}.txt", "wiki.{}.tokens"), ("{}.txt", "wt2/{}.txt"), ("ptb/{}.txt", "{}.txt"),
               ("ptb/ptb.{}.txt", "wikitext-2/wiki.{}.tokens"), ("ptb/{}.txt", "wikitext-2/{}.txt"),
               ("ptb/{}.txt", "wt2/wiki.{}.tokens")]
    for i, layout in enumerate(layouts):
        write(tmp_path / str(i), {layout[name == "wt2"].format(split): text
                                  for (name, split), text in texts.items()})
        for name in data.DOWNLOADS:
            assert spelt(data.load_corpus(name, tmp_path / str(i)), "train") == f"{name} train <eos>"
    assert not capsys.readouterr().err


def test_a_strange_file_is_the_last_choice(tmp_path, monkeypatch, capsys):
    """It is read, with a note, where its place names the corpus and the canonical file is nowhere else."""
    canonical(monkeypatch, {("ptb", split): "the text" for split in data.SPLITS})
    write(tmp_path, {**{f"{split}.txt": "the text" for split in data.SPLITS}, "ptb/test.txt": "text"})
    assert spelt(data.load_corpus("ptb", tmp_path), "test") == "the text <eos>"
    assert not capsys.readouterr().err
    write(tmp_path, {"test.txt": "the"})
    assert spelt(data.load_corpus("ptb", tmp_path), "test") == "text <eos>"
    assert f"{tmp_path / 'ptb' / 'test.txt'} is not the canonical file" in capsys.readouterr().err
    (tmp_path / "ptb" / "test.txt").unlink()
    with pytest.raises(data.UserError, match="could not download test.txt"):
        data.load_corpus("ptb", tmp_path)


@contextlib.contextmanager
def web_server(files):
    """A web server on this machine that answers with `files`, {path: bytes}. A body of None breaks off."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path, b"")
            self.send_response(200 if self.path in files else 404)
            self.send_header("Content-Length", "1000" if body is None else str(len(body)))
            self.end_headers()
            self.wfile.write(body or b"part")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_downloads_are_checked_and_leave_nothing_behind(tmp_path):
    """A corrupted, cut-off or missing file is refused in one line, with its address and the way out."""
    good = b"the right text\n" * 9
    expected, target = hashlib.sha256(good).hexdigest(), tmp_path / "deep" / "down" / "train.txt"
    with web_server({"/good": good, "/bad": good[:-1] + b"!", "/short": None}) as url:
        for bad, why in ((f"{url}/bad", "hash"), (f"{url}/short", "hash"), (f"{url}/missing", "404"),
                         ("http://127.0.0.1:9/", "refused")):
            with pytest.raises(data.UserError, match=why) as refusal:
                data.download(bad, target, expected)
            message = str(refusal.value)
            assert "\n" not in message and all(x in message for x in (bad, data.ENVIRONMENT, str(target)))
            assert not list(tmp_path.iterdir()) and socket.getdefaulttimeout() is None
        data.download(f"{url}/good", target, expected)
        assert target.read_bytes() == good and list(target.parent.iterdir()) == [target]


def test_a_corpus_is_downloaded_once(tmp_path, monkeypatch):
    """Missing splits are fetched into the data folder; the second time nobody is asked."""
    texts = {("ptb", split): f"the {split} text\n" for split in data.SPLITS}
    with web_server({f"/{split}": text.encode() for (_, split), text in texts.items()}) as url:
        canonical(monkeypatch, texts, url)
        first = data.load_corpus("ptb", tmp_path)
    assert data.load_corpus("ptb", tmp_path).fingerprint() == first.fingerprint()
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["test.txt", "train.txt", "valid.txt"]


def test_pydoc_is_english_and_its_splits_are_disjoint():
    """It is large enough to learn from. No two splits share a paragraph. Train has each word twice."""
    corpus = data.load_corpus("pydoc")
    assert len(corpus.train) > 40_000 and min(len(corpus.valid), len(corpus.test)) > 4_000
    assert {"the", "statement", "<eos>", "<unk>"} < set(corpus.vocabulary)
    texts = [{p for p in spelt(corpus, split).split(" <eos> ") if "<unk>" not in p and len(p) > 60}
             for split in data.SPLITS]
    assert min(map(len, texts)) > 5 and len(set.union(*texts)) == sum(map(len, texts))
    assert min(Counter(corpus.train.tolist()).values()) == 2


def test_pydoc_is_split_by_topic(monkeypatch):
    """Of 100 topics of one size, 80 are for training, 10 each for validation and test. None is cut."""
    topics = {f"{i}": f"Topic number {i} begins\n\nTopic number {100 + i} ends" for i in range(100)}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=topics))
    corpus = data.pydoc()
    topic = "topic number <unk> begins <eos> topic number <unk> ends <eos>"
    for split, n in zip(data.SPLITS, (80, 10, 10)):
        assert spelt(corpus, split) == " ".join([topic] * n)


def test_recall_reaches_its_floor_only_with_memory():
    """A reader chooses among the words seen in a place, among one if it can be known: the closed form."""
    corpus = data.recall(delay=12, symbols=4, fillers=8, count=500)
    rows = corpus.train[:-1].view(500, 15)
    kinds = [len(column.unique()) for column in rows.t()]
    assert corpus.vocabulary[rows[0, 13]] == "?" and torch.equal(rows[:, 0], rows[:, 14])
    assert math.isclose(corpus.facts["perplexity floor"], math.prod(kinds[:14]) ** (1 / 15))
    assert math.isclose(corpus.facts["perplexity without the symbol"], math.prod(kinds) ** (1 / 15))


def test_no_split_of_recall_repeats_another():
    """The first 50 symbols of the three splits are three different rows."""
    corpus = data.recall(12, 4, 8, 500)
    assert len({tuple(getattr(corpus, split)[:750:15].tolist()) for split in data.SPLITS}) == 3


@pytest.mark.parametrize("borders", [1, 2, 3])
def test_episodes_put_borders_between_symbol_and_query(borders):
    """In every stream b T steps lie between the two. All phases occur; no two streams are equal."""
    T, period = 10, borders * 10 + 2
    inputs, targets = data.episodes(borders * T - 1, 2 * period, 3 * period)
    query = inputs == 12
    t, stream = query[period:].nonzero().unbind(1)
    assert sorted(stream.tolist()) == list(range(3 * period)) and t.bincount().tolist() == [3] * period
    symbol = inputs[period + t - borders * T, stream]
    assert torch.equal(symbol, targets[period + t, stream]) and symbol.unique().tolist() == [0, 1, 2, 3]
    assert len({tuple(column) for column in inputs.t().tolist()}) == 3 * period
    assert torch.equal(query[1:, :-1], query[:-1, 1:])  # one step ahead of the one before


def test_episodes_are_recall():
    """Streams of 60 steps, 61 apart in the text of the same seed: one more than whole episodes."""
    text = data.recall(9, count=4 * 61 // 12 + 10, seed=3).train
    for first, part in enumerate(data.episodes(9, 60, 4, seed=3)):
        assert torch.equal(part, torch.stack([text[61 * b + first:][:60] for b in range(4)], 1))


def test_only_answers_are_scored_when_asked():
    """What follows a query is kept, and all else is -100. The inputs are the same."""
    inputs, targets = data.episodes(9, 60, 24)
    same, answers = data.episodes(9, 60, 24, answers_only=True)
    assert torch.equal(same, inputs) and torch.equal(answers, torch.where(inputs == 12, targets, -100))


def test_unigram_perplexity_by_hand():
    """1 / the geometric mean of the shares in train. Words that train lacks add one to every count."""
    corpus = data.from_lines("x", {"train": [["a", "a", "b"]], "valid": [["a", "b"]], "test": [["a", "z"]]})
    assert data.unigram_perplexity(corpus, "valid") == pytest.approx((2 / 4 * 1 / 4 * 1 / 4) ** (-1 / 3))
    assert data.unigram_perplexity(corpus) == pytest.approx((3 / 8 * 1 / 8 * 2 / 8) ** (-1 / 3))


# ----------------------------------------------------------------------------------- 9. train.py as a program

TINY = "--hidden-size 12 --embedding-size 8 --batch-size 4 --chunk 10 --device cpu".split()


@pytest.fixture
def corpus(tmp_path):
    """A folder with a tiny text: 41 words a line; 30 lines in train are 32 chunks of TINY."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, n in (("train", 30), ("valid", 8), ("test", 4)):
        lines = [" ".join(f"w{(i * i + j) % 23}" for j in range(41)) + "\n" for i in range(n)]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def program(*arguments, stdout=io.StringIO):
    """What becomes of `python train.py ARGUMENTS`, in this process."""
    out, err = stdout(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train.main(list(map(str, arguments)))
        except SystemExit as exit:                                      # argparse's own
            status = exit.code
    signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def succeed(*arguments):
    """The last line that `python train.py ARGUMENTS` prints."""
    run = program(*arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def refused(*arguments, status=2):
    """Run the program; assert one line on stderr and the status; return the line."""
    run = program(*arguments)
    assert run.returncode == status, run.stderr
    assert run.stderr.count("\n") == 1 + run.stderr.startswith("usage"), run.stderr
    assert "epoch 1 " not in run.stdout
    return run.stderr


def log_of(folder):
    """The rows of a training's log.csv, without the seconds."""
    rows = list(csv.DictReader((folder / "log.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def learned(folder):
    """Everything that the training in a folder has learned: weights and Adam's moments of model and g."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint["learners"], checkpoint["best"]


@pytest.mark.parametrize("mode", ["bptt", "dni", "restart", "restart --gradient synthetic", "alternating",
                                  "alternating --dni-kind layer", "restart --reset-optimizer"])
def test_each_mode_trains_resumes_exactly_and_tests(mode, corpus, tmp_path):
    """Resumed after two epochs of four, a training logs, learns and tests what a straight one does, bit for
    bit.
    """
    arguments = ["--data", corpus, "--mode", *mode.split(), *TINY, "--jitter", "--lr", "0.02"]
    arguments += ["--e-base", 1] if "restart" in mode or "alternating" in mode else []
    arguments += ["--dni-borders", 3] if mode == "dni" else []
    last = succeed(*arguments, "--epochs", 4, "--out", tmp_path / "straight")
    assert re.fullmatch(r"test perplexity \d+\.\d\d", last)
    rows = log_of(tmp_path / "straight")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    sources = {"alternating": "rssr", "dni": "rsss"}.get(mode.split()[0], "rrrr")
    sources = "rsss" if "synthetic" in mode else sources
    assert "".join(row["gradient"][0] for row in rows) == sources
    assert (rows[2]["dni_cosine"] != "nan") == (sources != "rrrr")
    assert float(rows[-1]["valid_perplexity"]) < float(rows[0]["valid_perplexity"])       # it learns
    succeed(*arguments, "--epochs", 2, "--out", tmp_path / "half")                      # within a run of SGDR
    assert succeed(*arguments, "--epochs", 4, "--resume", tmp_path / "half") == last     # the same, and more
    assert log_of(tmp_path / "half") == rows
    close(learned(tmp_path / "half"), learned(tmp_path / "straight"), atol=0, rtol=0)


@SLOW
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_killed_training_goes_on(corpus, tmp_path):
    """Killed after its second checkpoint and before its end, it goes on from epoch 2 or later, and ends as if
    nothing had happened, bit for bit."""
    arguments = ["--data", corpus, *TINY, "--epochs", "40"]
    command = [sys.executable, HERE / "train.py", *arguments, "--out", tmp_path / "killed"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2 "):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["rows"])
    assert 2 <= done < 40
    run = program("--resume", tmp_path / "killed")
    assert re.findall(r"^epoch (\d+) ", run.stdout, re.M)[0] == str(done + 1)
    assert succeed(*arguments, "--out", tmp_path / "straight") == run.stdout.splitlines()[-1]
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "straight")
    close(learned(tmp_path / "killed"), learned(tmp_path / "straight"), atol=0, rtol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number, step", [(signal.SIGINT, 3), (signal.SIGTERM, 45), (signal.SIGTERM, 90)])
def test_a_signal_ends_a_training_with_one_line(number, step, corpus, tmp_path, monkeypatch):
    """Within the first epoch, the second or the last: one line says what goes on, and it ends as a straight
    one.
    """
    arguments = ["--data", corpus, *TINY, "--epochs", 3]                                  # of 32 steps each
    last, train_step, steps = succeed(*arguments, "--out", tmp_path / "straight"), train.train_step, []

    def interrupted(*a):
        steps.append(a)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return train_step(*a)
    monkeypatch.setattr(train, "train_step", interrupted)
    run = program(*arguments, "--out", tmp_path / "run")
    assert (run.returncode, len(steps)) == (128 + number, step)
    assert run.stderr == (f"train.py: interrupted; the same command with --resume {tmp_path / 'run'} goes on "
                          "after the last whole epoch\n")
    assert (tmp_path / "run" / "checkpoint.pt").exists() == (step > 32)
    assert succeed(*arguments, "--out", tmp_path / "run", "--resume", tmp_path / "run") == last
    assert log_of(tmp_path / "run") == log_of(tmp_path / "straight")


@pytest.mark.parametrize("spoil, step, says", [
    ("gradient", 40, r"the loss is not finite at step 90 of 314 in epoch 2"),         # seen at the next step
    ("gradient", 64, r"the validation loss or a weight is not finite after epoch 2"),   # an epoch's last
    ("g", 40, r"the validation loss or a weight is not finite after epoch 2")])
def test_what_is_not_finite_is_never_saved(spoil, step, says, corpus, tmp_path, monkeypatch):
    """A gradient of the model, or a g that is not in use, goes to infinity: one line, status 1, nothing
    saved.
    """
    arguments = ["--data", corpus, *TINY, "--mode", "dni", "--dni-warmup", 9, "--epochs", 3]
    train_step, steps = train.train_step, []

    def spoilt(model, optimizer, dni, *a):
        steps.append(a)
        if len(steps) == step:
            if spoil == "g":
                torch.nn.init.constant_(dni.g.decode[-1].bias, math.inf)
            else:
                model.decoder_bias.register_hook(lambda gradient: gradient * math.inf)
        if len(steps) == 32 + 1:
            before.update({path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()})
        return train_step(model, optimizer, dni, *a)
    before = {}
    monkeypatch.setattr(train, "train_step", spoilt)
    run = program(*arguments, "--out", tmp_path / "r")
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert re.match(f"train.py: stopped: {says}.*try a lower --lr", run.stderr), run.stderr
    assert before.keys() == {"checkpoint.pt", "log.csv"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


@pytest.mark.parametrize("curve, cuts, best", [([3, 1, 2, 0.5, 2], [], 4), ([3, 1, 2, 2, 2], [2, 4], 2),
                                               ([1, 1, 1], [], 1), ([2], [], 1), ([3, 1, 2], [2], 2)])
def test_the_best_model_is_the_one_tested(curve, cuts, best, corpus, tmp_path, monkeypatch):
    """Where validation goes down, up and down, the model tested is that of the first lowest epoch.

    A resumption in between changes nothing; with one epoch it is that. cuts: where it is resumed.
    """
    evaluate, models, tested = train.evaluate, [], []

    def scripted(model, tokens, batch_size, *a):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        if batch_size == 1:
            tested.append(weights)
            return evaluate(model, tokens, batch_size, *a)
        models.append(weights)
        return curve[len(models) - 1]
    monkeypatch.setattr(train, "evaluate", scripted)
    how = ["--data", corpus, *TINY, "--out", tmp_path / "r"]
    for epochs in (*cuts, len(curve)):
        last = succeed(*how, "--epochs", epochs)
        how = ["--resume", tmp_path / "r"]
    assert len(models) == len(curve)
    close(tested[-1], models[best - 1], atol=0, rtol=0)
    # So it is in the file, which holds all that is needed to go on reading with it.
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    text = data.load_corpus(str(corpus))
    model, _, _ = train.build(train.Settings(**checkpoint["settings"]), len(checkpoint["vocabulary"]), "cpu")
    model.load_state_dict(checkpoint["best"]["model"])
    _, autocast = train.pick_device("cpu", "auto")
    assert last == f"test perplexity {math.exp(evaluate(model, text.test, 1, autocast)):.2f}"
    assert checkpoint["vocabulary"] == text.vocabulary


def test_the_log_says_what_was_measured(corpus, tmp_path):
    """valid_perplexity is that of the epoch's model in ten streams; all is without dropout and in float32."""
    arguments = ["--data", corpus, *TINY, "--epochs", 1, "--precision", "fp32", "--out", tmp_path / "r"]
    run = program(*arguments)
    text = data.load_corpus(str(corpus))
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    model, _, _ = train.build(train.Settings(**checkpoint["settings"]), len(text.vocabulary), "cpu")
    model.load_state_dict(checkpoint["best"]["model"])
    row, = log_of(tmp_path / "r")
    nll = train.evaluate(model, text.test, 1)
    assert float(row["valid_perplexity"]) == round(math.exp(train.evaluate(model, text.valid, 10)), 3)
    assert run.stdout.splitlines()[-2:] == [f"bits per token {nll / math.log(2):.4f}",
                                            f"test perplexity {math.exp(nll):.2f}"]
    assert f"valid_perplexity {row['valid_perplexity']}" in run.stdout and "torch.float32" in run.stdout


def test_a_training_that_is_done_is_only_tested(corpus, tmp_path, monkeypatch):
    """--resume without an epoch left tests again, and puts back a log.csv that was lost. More epochs go on,
    and so do the seconds.
    """
    monkeypatch.setattr(train.time, "monotonic", itertools.count(1000).__next__)          # a second a look
    last = succeed("--data", corpus, *TINY, "--epochs", 2, "--out", tmp_path / "r")
    rows = log_of(tmp_path / "r")
    (tmp_path / "r" / "log.csv").unlink()
    assert succeed("--resume", tmp_path / "r") == last and log_of(tmp_path / "r") == rows
    shutil.move(corpus, tmp_path / "moved")                             # a corpus is known by its words
    assert succeed("--resume", tmp_path / "r", "--data", tmp_path / "moved", "--epochs", 3)
    seconds = [float(row["seconds"]) for row in csv.DictReader((tmp_path / "r" / "log.csv").open())]
    assert len(seconds) == 3 and 0 < seconds[0] < seconds[1] < seconds[2] < 100


def test_what_resuming_refuses(corpus, tmp_path):
    """Other settings, another text, another folder, and a file that is no whole checkpoint. Nothing is
    lost.
    """
    run = tmp_path / "run"
    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", run)
    file, log = run / "checkpoint.pt", (run / "log.csv").read_bytes()
    good, text = file.read_bytes(), (corpus / "train.txt").read_text()
    assert "--hidden-size 12, not 13" in refused("--resume", run, "--hidden-size", 13)
    assert "holds a training with --" in refused("--resume", run, "--preset", "paper")
    assert "must name one folder" in refused("--resume", run, "--out", tmp_path / "other")
    assert "already holds a training" in refused("--data", corpus, *TINY, "--out", run)
    for other in (text + "one two three\n", text.replace("w1 ", "w99 ")):          # the second: as many words
        (corpus / "train.txt").write_text(other)
        assert "another text" in refused("--resume", run, "--epochs", 2)
    (corpus / "train.txt").write_text(text)

    class Code:                                                         # pickled: it makes a folder
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    checkpoint, third = torch.load(file, weights_only=True), len(good) // 3
    torch.save({**checkpoint, "best": Code()}, tmp_path / "code.pt")
    torch.save({**checkpoint, "settings": {"seed": 1}}, tmp_path / "older.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    one_bit = good[:third] + bytes([good[third] ^ 4]) + good[third + 1:]
    others = [(tmp_path / f"{name}.pt").read_bytes() for name in ("code", "older", "list")]
    for damaged in (b"", good[:100], good[:len(good) // 2], one_bit, *others):
        file.write_bytes(damaged)
        assert f"{file} cannot be read as a checkpoint" in refused("--resume", run, "--epochs", 2)
        assert file.read_bytes() == damaged and (run / "log.csv").read_bytes() == log
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_harms_nothing(corpus, tmp_path, monkeypatch):
    """Where there is no room for a new checkpoint, one line says so, the old one stays, and nothing beside
    it.
    """
    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", tmp_path / "r")
    before, open_file = (tmp_path / "r" / "checkpoint.pt").read_bytes(), open
    monkeypatch.setattr("builtins.open", lambda name, *a, **k: open_file(
        "/dev/full" if str(name).endswith("partial") else name, *a, **k))
    assert re.search("No space left|disk", refused("--resume", tmp_path / "r", "--epochs", 2))
    monkeypatch.undo()

    def half(content, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    assert "No space left" in refused("--resume", tmp_path / "r", "--epochs", 2)
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["checkpoint.pt", "log.csv"]


def test_too_little_memory_is_told_in_one_line(corpus, tmp_path, monkeypatch):
    """torch's errors for a CPU and a GPU without room are one line, with status 2; other errors are not
    hidden.
    """
    for error in (RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory:\nyou tried"),
                  torch.OutOfMemoryError("CUDA out of memory.\nTried")):
        monkeypatch.setattr(train, "build", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert "memory" in refused("--data", corpus, *TINY, "--out", tmp_path / "r")
    monkeypatch.setattr(train, "build", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        program("--data", corpus, *TINY, "--out", tmp_path / "r")


def test_progress_is_a_line_of_a_terminal(corpus, tmp_path, monkeypatch):
    """On a terminal a line rewrites itself, in at most 80 columns; elsewhere there is none. (Here at each
    step.)
    """
    arguments = ["--data", corpus, *TINY, "--epochs", 2, "--out"]
    assert "\r" not in program(*arguments, tmp_path / "quiet").stdout
    monkeypatch.setattr(train.time, "monotonic", itertools.count().__next__)              # a second a look
    run = program(*arguments, tmp_path / "shown", stdout=Terminal)
    shown = [part for part in run.stdout.split("\r\033[K") if "min left" in part]
    assert len(shown) == 64 and max(map(len, shown)) <= 80 and "\n" not in "".join(shown)
    assert shown[31].startswith("epoch 1.00 of 2, perplexity ") and shown[31].endswith(", 1 min left")
    assert shown[63].startswith("epoch 2.00 of 2, perplexity ") and shown[63].endswith(", 0 min left")


@pytest.mark.parametrize("flag, value", [
    ("--hidden-size", "-3"), ("--epochs", "0"), ("--num-layers", "0"), ("--chunk", "0"),
    ("--batch-size", "0"),
    ("--dropout-input", "1"), ("--dropout-output", "-0.1"), ("--dropout-weight", "nan"), ("--e-base", "0"),
    ("--e-base", "nan"), ("--lr", "0"), ("--lr", "inf"), ("--clip", "-1"), ("--dni-alpha", "-1"),
    ("--seed", "-1"),
    ("--seed", 2 ** 63), ("--eta-min", "-1"), ("--eta-min", ""), ("--restarts", "0"), ("--restarts", "3 2"),
    ("--mode", "magic"), ("--data", "klingon"), ("--epochs", "ten"), ("--colour", "red"), ("--data", "/"),
    ("--dni-borders", "0"), ("--dni-warmup", "-1"), ("--l2", "inf"), ("--eta-max", "0"), ("--eta-min", "1"),
    ("--mode bptt --dni-alpha", "0.5"), ("--data pydoc --data-dir", "x"), ("--gradient", "synthetic"),
    ("--eta-max 1e-3 1e-4 --eta-min", "2e-4"), ("--eta-max 1e-3 --lr", "1e-3")])
def test_impossible_settings(flag, value):
    """Each ends in one line that names the flag or the value, and status 2, before any work."""
    assert (value if flag == "--data" else flag.split()[-1]) in refused(*flag.split(), *str(value).split())


# A value of each setting that has an effect in some modes only, other than the one `trained` begins with.
OTHER_VALUES = dict(
    gradient="synthetic", lr=0.02, e_base=0.2, restarts=(0.4,), eta_min=(1e-4,), eta_max=(0.02,),
    reset_optimizer=True, dni_kind="layer", dni_borders=2, dni_alpha=0.3, dni_lr=1e-2, dni_warmup=0.6)


@pytest.mark.parametrize("given", [
    dict(mode="bptt"), dict(mode="dni"), dict(mode="dni", dni_kind="linear"), dict(mode="restart"),
    dict(mode="restart", gradient="synthetic"), dict(mode="alternating"),
    dict(mode="alternating", restarts=(0.3,)), dict(mode="restart", eta_max=(0.01,))], ids=str)
def test_a_setting_is_accepted_where_it_has_an_effect(given):
    """A setting that is not for all modes is accepted where it changes weights or rates, else refused."""
    base = dict(e_base=0.3, dni_warmup=0.3, dni_alpha=30.0, dni_lr=1e-3, **given)

    def trained(**changes):
        settings = dataclasses.replace(train.Settings(), embedding_size=8, hidden_size=12, chunk=10,
                                       **{**base, **changes})
        model, optimizer, dni = train.build(settings, 30, "cpu")
        text, rates = data.streams(torch.arange(641) % 29, 4), []
        schedule = train.make_schedule(settings, optimizer)
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        train.train_epoch(model, optimizer, schedule, dni, text, 0, settings)
        return rates, [p.tolist() for p in model.parameters()]
    plain, accepted, changed = trained(), set(), set()
    for name, value in OTHER_VALUES.items():
        if base.get(name) != value and name not in given:
            if trained(**{name: value}) != plain:
                changed.add(name)
            with contextlib.suppress(data.UserError):
                train.check(dataclasses.replace(train.Settings(), **{**base, name: value}), [name])
                accepted.add(name)
    assert accepted == changed


def parsed(*arguments):
    """The settings that train.py takes from its command line."""
    return train.parse(arguments)[0]


def test_defaults_and_presets(capsys):
    """The settings that the figures of README were made with, those of the paper, and what a flag
    overrides.
    """
    small = parsed()
    assert vars(small) == {**vars(train.Settings()), "lr": 1e-2}
    expected = dict(mode="alternating", data="pydoc", epochs=15, seed=42, embedding_size=256, hidden_size=512,
                    num_layers=2, dropout_output=.3, dropout_hidden=.1, dropout_input=.1, l2=5e-6, clip=.25,
                    batch_size=20, chunk=70, jitter=False, e_base=5, dni_kind="neuron", dni_alpha=.9,
                    dni_lr=1e-4, dni_borders=1, dni_warmup=1, eta_min=(0.0,), restarts=(), eta_max=(),
                    gradient="real")
    assert {name: getattr(small, name) for name in expected} == expected
    rates = [parsed("--mode", mode, "--data", "ptb").lr for mode in ("bptt", "dni", "restart", "alternating")]
    assert rates == [4e-3, 4e-3, 1e-2, 1e-2] and parsed("--mode", "dni", "--lr", "0.5").lr == 0.5
    paper, wt2 = (parsed("--preset", "paper", "--data", name) for name in ("ptb", "wt2"))
    expected = dict(hidden_size=1550, embedding_size=400, num_layers=4, chunk=200, batch_size=20, epochs=320,
                    lr=1e-3, dropout_output=.4, dropout_hidden=.3, dropout_input=.4, dropout_embedding=.1,
                    dropout_weight=.1, l2=1.2e-6, clip=.2, seed=42, e_base=5, dni_alpha=1, jitter=True)
    assert {name: getattr(paper, name) for name in expected} == expected
    assert wt2 == dataclasses.replace(paper, data="wt2", dropout_hidden=0.2, clip=0.25)
    model, _, _ = train.build(dataclasses.replace(paper, hidden_size=9, embedding_size=7), 20, "cpu")
    sizes = [(layer.input_size, layer.hidden_size, layer.window) for layer in model.rnn.layers]
    assert sizes == [(7, 9, 2), (9, 9, 1), (9, 9, 1), (9, 7, 1)]
    used = (model.dropout_output, model.rnn.dropout, model.dropout_input, model.dropout_embedding,
            model.rnn.layers[0].weight_dropout, model.activation, model.temporal)
    assert used == (.4, .3, .4, .1, .1, 2, 1)
    assert len(dataclasses.fields(train.Settings)) <= 36
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "--dni-borders" in capsys.readouterr().out


def test_device_and_precision_are_as_asked():
    """A device that is not there is refused; bf16 products come on request, float32's too."""
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            assert f"--device {name}" in refused("--device", name)
    products = []
    for precision in ("fp32", "bf16"):
        device, autocast = train.pick_device("cpu", precision)
        with autocast:
            products.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    assert device == "cpu" and products == [torch.float32, torch.bfloat16]


def test_bad_texts_and_folders(corpus, tmp_path, monkeypatch):
    """Missing, empty, non-UTF-8 and too short texts, and a folder that cannot be made, before any training.
    """
    monkeypatch.setattr(train, "train_step", None)                      # nothing is trained
    assert "less than one chunk of 400" in refused("--data", corpus, "--chunk", "400")
    assert refused("--data", corpus, *TINY, "--out", corpus / "train.txt" / "run")
    (corpus / "log.csv").write_text("precious")
    assert "already holds a training" in refused("--data", corpus, *TINY, "--out", corpus)
    for text, says in ((b"a b\n", "too few for 10 streams"), (b"caf\xe9\n", "not UTF-8"),
                       (b"\n\n", "holds no words")):
        (corpus / "valid.txt").write_bytes(text)
        assert says in refused("--data", corpus, *TINY, "--out", tmp_path / "r")
    (corpus / "valid.txt").unlink()
    assert "no valid.txt" in refused("--data", corpus)
    monkeypatch.setitem(data.DOWNLOADS, "ptb", ("http://127.0.0.1:9/{split}", data.DOWNLOADS["ptb"][1]))
    assert "127.0.0.1:9" in refused("--data", "ptb", "--data-dir", tmp_path / "none")
    assert not (tmp_path / "r").exists() and not (tmp_path / "none").exists()


def test_a_new_training_has_a_folder_of_its_own(corpus, tmp_path, monkeypatch):
    """Without --out it is in trainings/, named after text and mode. A folder's path is absolute in its
    settings.
    """
    monkeypatch.chdir(tmp_path)
    succeed("--data", "text", "--mode", "bptt", *TINY, "--epochs", 1)
    folder, = (tmp_path / "trainings").iterdir()
    assert folder.name.startswith("text-bptt-")
    monkeypatch.chdir("/")
    succeed("--resume", folder)


def test_recall_prints_its_floor(tmp_path):
    """The floor stands in the output, beside what was reached. The delay is above the length of a chunk."""
    arguments = ["--data", "recall", "--mode", "bptt", *TINY, "--batch-size", 40, "--epochs", 1]
    run = program(*arguments, "--out", tmp_path)
    floor = data.recall(delay=20).facts["perplexity floor"]
    assert run.returncode == 0 and run.stdout.splitlines()[-4] == f"perplexity floor {floor:.4f}"


# ----------------------------------------------------------------------------------------- 10. the repository

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_house():
    """Arrows run downwards: a concept file imports torch, numpy and those below it; only the card's files
    are there.
    """
    below = {"qrnn": set(), "sgdr": set(), "data": set(), "dni": {"qrnn", "data"}}
    below |= {"train": set(below), "test_all": {*below, "train"}}
    free = {*sys.stdlib_module_names, "torch", "numpy"}
    assert {path.stem for path in HERE.glob("*.py")} == set(below) and not list(HERE.glob("*/__init__.py"))
    for name in below:
        nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        optional = {"qrnn": {"triton"}, "test_all": {"pytest"}}.get(name, set())
        assert {name.split(".")[0] for name in names} - free <= below[name] | optional, name


@pytest.mark.parametrize("script", ["qrnn.py", "dni.py", "sgdr.py", "data.py"])
def test_each_file_runs_alone(script, tmp_path):
    """`python FILE` prints a demonstration of its idea, alone in its folder or, for dni.py, beside what it
    needs.
    """
    for name in {script, "qrnn.py", "data.py"} if script == "dni.py" else {script}:
        shutil.copy(HERE / name, tmp_path)
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and len(run.stdout.split("\n")) > 3, run.stderr
    if script == "dni.py":
        numbers = map(float, re.findall(r" ([+\d]+\.\d+)$", run.stdout, re.M)[:5])
        whole, truncated, mended, bptt, layer = numbers
        assert whole == mended != truncated and bptt < 0.6 and layer > 0.9
        assert "\n".join(run.stdout.split("\n")[:5]) in README.replace("\n    ", "\n")
    if script == "sgdr.py":
        for i, gradient in re.findall(r"run (\d+), (\w+)", run.stdout):
            assert gradient == train.gradient_source(train.Settings(), int(i), 0)


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_snippets_run(snippet):
    """Each Python snippet of the README runs as it stands and prints what its comments say it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue().split("\n")[:-1] == re.findall(r"^print.*?  # (.*)$", snippet, re.M)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python train\.py[^#`\n]*", README + (
    HERE / "experiments" / "README.md").read_text(encoding="utf-8")))))
def test_commands_of_the_readmes_parse(line):
    """Each train.py command of the READMEs is one that train.py understands."""
    arguments = shlex.split(line)[2:]
    if "--resume" not in arguments:
        assert parsed(*arguments)


@pytest.fixture
def studies(monkeypatch):
    """The modules of experiments/, by name."""
    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    return importlib.import_module


def test_a_longer_reach(studies):
    """Arms `full` and `twice`: the gradient of the last chunk's loss alone, through all the chunks before it.

    It enters with the state before the first of them.
    """
    study, tokens, weights = studies("study"), torch.randint(7, (16, 4)), []
    chunks = [(tokens[n:n + 5], tokens[n + 1:n + 6]) for n in (0, 5, 10)]
    for by_hand in (False, True):
        torch.manual_seed(3)
        model, state = study.Reader(7, 8, 8), [(torch.randn(4, 8), torch.zeros(0, 4, 8))]
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        if by_hand:
            for x, y in chunks:
                loss, _, state = model(x, y, state)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        else:
            recent = [(x, y, before) for (x, y), before in zip(chunks, (state, None, None))]
            study.full_update(model, optimizer, recent, clip=0.5)
        weights.append([p.detach() for p in model.parameters()])
    close(*weights)


def test_each_arm_of_text_is_what_it_is_called(studies, monkeypatch):
    """text.py with α = 0 is truncated BPTT, to the last digit. α, g's rate, K, the kind of g and the longer
    reach each change the result.
    """
    text, tokens = studies("text"), torch.arange(32 * 101) ** 2 % 17
    corpus = types.SimpleNamespace(train=tokens, valid=tokens[:500], vocabulary=range(17))
    monkeypatch.setattr(data, "load_corpus", lambda name: corpus)
    monkeypatch.setattr(text, "UPDATES", {2: 20})
    monkeypatch.setattr(text, "HIDDEN", 8)

    def bits(arm, alpha="", rate=""):
        return tuple(row["bits"] for row in text.one(dict(arm=arm, T=2, alpha=alpha, rate=rate, seed=3)))
    assert bits("linear", 0.0, 0.1) == bits("neuron", 0.0, 0.1) == bits("bptt")
    different = [bits("bptt"), bits("full"), bits("twice"), bits("linear", 1.0, 0.1), bits("linear", 0.5, 0.1),
                 bits("linear", 1.0, 0.05), bits("mlp", 1.0, 0.1), bits("neuron", 1.0, 0.1),
                 bits("neuron4", 1.0, 0.1)]
    assert len(set(different)) == len(different)


def test_the_recipe_is_what_the_search_found(studies):
    """A method's rate is that with the best validation text, of the longest trainings at several rates.

    Where there are several seeds, their mean counts.
    """
    reproduce, study = studies("reproduce"), studies("study")
    log, judged = study.read(study.LOGS / "search.csv"), set()
    for method, epochs in itertools.product(reproduce.METHODS, ("15", "5")):
        lr, best = reproduce.settings(reproduce.arguments("small", "ptb", method, int(epochs))).lr, {}
        for row in log:
            if (row["data"], row["method"], row["epochs"]) == ("ptb", method, epochs):
                its, valid = best.setdefault(float(row["lr"]), {}), float(row["valid_perplexity"])
                its[row["seed"]] = min(valid, its.get(row["seed"], math.inf))
        best = {rate: statistics.mean(its.values()) for rate, its in best.items()}
        if len(best) > 1 and method not in judged:
            assert best.get(lr) == min(best.values()), (method, epochs, best)           # two may be as good
            judged.add(method)
    assert judged == set(reproduce.METHODS)


def test_results_are_what_the_logs_say(studies):
    """experiments/results.md and README's tables are what report.py makes of the logs, to the letter."""
    report, study = studies("report"), studies("study")
    logs = {name: study.read(study.LOGS / f"{name}.csv") for name in report.LOGS}
    assert (HERE / "experiments" / "results.md").read_text(encoding="utf-8") == report.results(logs)
    assert report.with_tables(README, logs) == README
    assert README.count("written by experiments/report.py -->") == 2


def test_the_tables_say_what_a_hand_would(studies):
    """The rate of a g is the one the search found best. Differences are within a seed."""
    report = studies("report")
    rows = [dict(counts="all", arm="layer", borders="1", rate=rate, seed=seed, accuracy=accuracy)
            for rate, seed, accuracy in (("0.1", "100", "0.3"), ("0.01", "100", "0.8"), ("0.01", "0", "0.5"),
                                         ("0.1", "0", "0.4"), ("0.01", "1", "0.95"))]
    text = report.recall(rows)
    assert "|all|1|layer-wise DNI|0.01|0.72 [0.61, 0.84]|1/2|" in text             # the rate of the search
    assert "|all|1|layer-wise DNI|0.1, tried afterwards|0.40 [0.40, 0.40]|0/1|" in text
    rows = [dict(method=method, seed=seed, test_perplexity=tested, seconds="90") for method, seed, tested in (
        ("bptt", "1", "9"), ("bptt", "2", "11"), ("dni", "1", "1"), ("dni", "2", "0.5"))]
    text = report.methods_table(rows, rows[:1])
    assert "|truncated BPTT|62.78|72.6|10.00 ± 1.41||2|9.00|" in text
    assert "|neuron-wise DNI|62.42|72.37|0.75 ± 0.35|-9.25 ± 1.77 from truncated BPTT|2|-|" in text


def test_figures_in_prose_stand_in_a_table(studies):
    """Every number in the prose of experiments/README.md is in a table of results.md."""
    prose = (HERE / "experiments" / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", prose, flags=re.S)
    results = (HERE / "experiments" / "results.md").read_text(encoding="utf-8")
    cells = re.findall(r"[\d.]+", "\n".join(line for line in results.split("\n") if line.startswith("|")))
    found = re.findall(r"\d+\.\d+|\d+/\d+", prose)
    assert len(found) > 30 and {x for number in found for x in number.split("/")} <= set(cells)


@pytest.mark.parametrize("path", ["README.md", "experiments/README.md", "experiments/logs/README.md"])
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", (HERE / path).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (HERE / path).parent.joinpath(link).exists(), link
