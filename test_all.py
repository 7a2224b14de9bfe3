"""The proofs. Each test states a claim, computes its two sides by independent means, and compares them.

Run `pytest test_all.py`. Set QRNN_DATA to a folder with the PTB and WikiText-2 files to include the claims
about them; without it, without a GPU, and so on, the tests concerned are skipped and say so. The slow tests
(the compiler, several processes, faults.py) are left out; `pytest test_all.py -m slow` runs them.

    0  the whole method, once more, in plain code: read this first
    1  pooling and the QRNN          5  neuron-wise               9  data
    2  causality and streaming       6  trained but not used     10  evaluation and regularisation
    3  Eq. 1                         7  g learns                 11  train.py as a program
    4  the bootstrapped target       8  warm restarts            12  README.md
"""

import ast
import contextlib
import copy
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
import pickle
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.flop_counter import FlopCounterMode

import data
import dni as dni_module
import qrnn as qrnn_module
import train
from dni import Agreement, Interface, LayerDNI, NeuronDNI, joined, regress
from harness import checkpoints, command_line, keeper, machine
from qrnn import QRNN, LanguageModel, QRNNLayer, decoder_loss, locked_dropout, pool, pool_loop, toss
from sgdr import SGDR, run_at

HERE = Path(__file__).resolve().parent
CXX = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
COMPILER = pytest.mark.skipif(not CXX, reason="no C++ compiler")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
DOUBLE = dict(dtype=torch.float64)


with warnings.catch_warnings(action="ignore"):                          # pytest hears of it below only
    SLOW = pytest.mark.slow
pytest_plugins = [__name__]                                             # for the function that follows


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless asked for with -m slow, -k or by name")
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method. is deprecated:"
                                              "DeprecationWarning")
    if not (config.option.markexpr or config.option.keyword or any("::" in a for a in config.args)):
        config.option.markexpr = "not slow"


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)                 # train.py sets its own


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)


# -------------------------------------------------------------- 0. the whole method, once more, in plain code
#
# The paper in 150 lines. It shares nothing with the modules but settings and first weights: it has its own
# QRNN, g, Adam, clipping, cosine, restarts, chunk lengths and alternation. It is slow, and it has no dropout.
#
# It needs no detach. Every step makes NEW weights, and asks for the derivative in these alone. What the old
# weights did in the chunks before is not asked for: that is truncation.

def plain_qrnn(x, c, x_prev, W, b):
    """One QRNN layer (QRNN, section 2). x: a list of T inputs (B, I); c: (B, H); x_prev: k - 1 inputs before.

    Returns a list of T outputs (B, H), and the c and x_prev that the next chunk begins with.
    """
    inputs, h = x_prev + x, []
    for t in range(len(x)):
        window = torch.cat(inputs[t:t + len(x_prev) + 1], 1)            # (B, kI): x_{t-k+1} .. x_t
        z, f, o = (window @ W.T + b).chunk(3, 1)                        # (B, H) each
        c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
        h.append(o.sigmoid() * c)
    return h, c, inputs[len(x):]


def plain_model(theta, inputs, targets, s_k, x_prev, s):
    """The language model on a chunk, inputs and targets (T, B), entered with s_k (N,), the c of all layers.

    Returns the nll, the loss that is minimised, s_{k+1}, and the x_prev of each layer for the next chunk.
    """
    h, cs, next_x_prev = [theta["embedding.weight"][words] for words in inputs], [], []
    weights = [(theta[f"rnn.layers.{i}.weight"], theta[f"rnn.layers.{i}.bias"]) for i in range(s.num_layers)]
    sizes = [inputs.shape[1] * len(b) // 3 for _, b in weights]         # B H of each layer
    for c, before, (W, b) in zip(s_k.split(sizes), x_prev, weights):
        h, c, after = plain_qrnn(h, c.view(inputs.shape[1], -1), before, W, b)
        cs, next_x_prev = [*cs, c.flatten()], [*next_x_prev, after]
    h = torch.stack(h)                                                  # (T, B, E)
    log_p = (h @ theta["embedding.weight"].T + theta["decoder_bias"]).log_softmax(-1)
    nll = -log_p.gather(-1, targets[..., None]).mean()
    loss = nll + s.activation * (h ** 2).mean()
    if len(h) > 1:
        loss = loss + s.temporal * ((h[1:] - h[:-1]) ** 2).mean()
    return nll, loss, torch.cat(cs), next_x_prev


def plain_g(phi, c, memory):
    """g of N neurons, c (N,): 1 -> MLP -> QRNN over the borders -> MLP -> 1. Returns delta^ (N,) and h_g."""
    def linear(x, name):
        return x @ phi[f"{name}.weight"].T + phi[f"{name}.bias"]
    x = linear(linear(c[:, None], "encode.0").relu(), "encode.2")       # (N, 50)
    [h], c, x_prev = plain_qrnn([x], *memory, phi["rnn.weight"], phi["rnn.bias"])
    return linear(linear(h, "decode.0").relu(), "decode.2")[:, 0], (c, x_prev)


def plain_adam(weights, gradients, moments, rate, l2, beta2=0.999):
    """Adam (Kingma & Ba 2014, algorithm 1) with weight decay in the gradient. moments: {name: (t, m, v)}.

    Returns new weights, and changes moments.
    """
    new = {}
    for (name, w), d in zip(weights.items(), gradients):
        t, m, v = moments.get(name, (0, 0.0, 0.0))
        d = d + l2 * w.detach()
        t, m, v = moments[name] = t + 1, 0.9 * m + 0.1 * d, beta2 * v + (1 - beta2) * d ** 2
        new[name] = w.detach() - rate * (m / (1 - 0.9 ** t)) / ((v / (1 - beta2 ** t)).sqrt() + 1e-8)
    return {name: w.requires_grad_() for name, w in new.items()}


def plain_schedule(s, epoch):
    """(learning rate, run, whether the gradient that crosses borders is synthetic) at a moment, in epochs."""
    if s.mode in ("bptt", "dni"):
        return s.lr, 0, s.mode == "dni" and epoch >= s.dni_warmup
    starts = [0, *s.restarts] if s.restarts else [s.e_base * (2 ** i - 1) for i in range(9)]
    moment = math.floor(epoch) if s.sgdr_step == "epoch" else epoch
    i = max(i for i, start in enumerate(starts) if start <= moment)
    high, low = (bound[min(i, len(bound) - 1)] for bound in (s.eta_max, s.eta_min))
    elapsed = (moment - starts[i]) / (starts[i + 1] - starts[i])        # E_cur / E_i
    rate = low + (high - low) / 2 * (1 + math.cos(math.pi * elapsed))
    if s.mode == "alternating":
        return rate, i, i % 2 == (1 if s.first == "real" else 0)
    return rate, i, s.gradient == "synthetic" and epoch >= s.dni_warmup


def plain_chunks(length, s, epoch):
    """(start, stop) of the chunks: T steps; with jitter N(T, 5), one in twenty N(T/2, 5), and at least 5."""
    draw, start = random.Random(f"{s.seed} {epoch}"), 0
    while start < length:
        steps = s.bptt
        if s.jitter:
            half = draw.random() >= 0.95
            steps = max(5, int(draw.gauss(s.bptt / 2 if half else s.bptt, 5)))
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
        s_k = zeros(N)
        x_prev = [[zeros(B, s.embedding_size)] * (s.window - 1)] + [[]] * (s.num_layers - 1)
        memory = zeros(N, s.dni_hidden), [zeros(N, s.dni_hidden)] * (s.dni_window - 1)   # h_g
        total, guesses, truths, past = 0.0, [], [], []
        for start, stop in plain_chunks(length, s, epoch):
            T, (rate, run, synthetic) = stop - start, plain_schedule(s, epoch + start / length)
            if run != last_run and s.reset_optimizer:
                theta_moments = {}
            last_run, chunk = run, slice(start, stop)

            # 1. Forward: chunk k, from s_k to s_{k+1}.
            nll, loss, s_next, x_prev = plain_model(theta, inputs[chunk], targets[chunk], s_k, x_prev, s)

            # 2. g predicts the gradient of s_k, to be corrected in 4, and that of s_{k+1}, which stands for
            #    the future after this chunk. Nothing is predicted for s_0. The last chunk has no future.
            #    g has a memory, so it is run over the last K borders, where its newest weights are learned.
            if phi and start > 0:
                past = [*past, (s_k, memory)][-s.dni_bptt:]
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
                phi = plain_adam(phi, meta_gradients, phi_moments, s.dni_lr, s.dni_l2)
                guesses, truths = [*guesses, guess.detach()], [*truths, target]

            # 5. The model learns: its gradient, of the mean loss, is clipped. A chunk that is shorter or
            #    longer than T gets its share of the learning rate.
            gradients = [d / (T * B) for d in gradients]
            norm = torch.cat([d.flatten() for d in gradients]).norm()
            gradients = [d * min(1, s.clip / (norm + 1e-6)) for d in gradients]
            share = T / s.bptt if s.jitter else 1
            theta = plain_adam(theta, gradients, theta_moments, rate * share, s.l2, s.beta2)

            chunks.append((nll.item(), rate, run, synthetic, norm.item()))
            s_k, total = s_next, total + nll.item() * T
        p, t = (torch.cat(x or [torch.zeros(1)]) for x in (guesses, truths))
        cosine, r2 = p @ t / (p.norm() * t.norm()), 1 - ((p - t) ** 2).sum() / (t ** 2).sum()
        summary.append((total / length, cosine.item(), r2.item()))
    return theta, phi, chunks, summary


WHOLE = dict(embedding_size=4, hidden_size=5, window=2, bptt=12, jitter=True, clip=0.2, l2=1e-2, lr=0.02,
             beta2=0.98, dropout_output=0.0, dropout_hidden=0.0, dropout_input=0.0,
             dni_hidden=6, dni_last_layer=0.5, dni_lr=5e-3, dni_l2=3e-3)
BOUNDS = dict(e_base=0.4, eta_max=(0.02, 0.03, 0.01), eta_min=(0.004, 0.0))


@pytest.mark.parametrize("changes", [
    dict(mode="bptt"),
    dict(mode="dni", dni_warmup=0.6, dni_window=2, dni_alpha=0.7),
    dict(mode="restart", restarts=(0.25, 1.5, 2.5, 4.0), eta_max=(0.02, 0.03), sgdr_step="epoch"),
    dict(mode="restart", gradient="synthetic", reset_optimizer=True, dni_warmup=0.3, dni_bptt=3, **BOUNDS),
    dict(mode="alternating", reset_optimizer=True, **BOUNDS),
    dict(mode="alternating", first="synthetic", jitter=False, **BOUNDS)],
    ids=["bptt", "dni", "restart", "restart-synthetic", "alternating", "alternating-first"])
def test_training_is_the_plain_program(changes):
    """Three epochs of train_epoch are three epochs of the program above, to 1e-10.

    Every chunk's loss, learning rate, run and gradient source; every epoch's mean loss, cosine and R^2 (these
    two to 1e-4, for train.py sums them in float32); and in the end every weight of the model and of g.
    """
    s = dataclasses.replace(train.SMALL, **{**WHOLE, **changes})
    model, optimizer, dni = train.build(s, 11, "cpu")
    networks = [model.double(), dni.g.double()] if dni else [model.double()]
    schedule, place = train.make_schedule(s, optimizer), train.Place()
    inputs, targets = torch.randint(11, (2, 100, 3))
    first = [{name: w.clone().requires_grad_() for name, w in net.state_dict().items()} for net in networks]
    *last, chunks, epochs = plain_training(*(first + [{}])[:2], inputs, targets, s, 3)
    norms = [norm for *_, norm in chunks]
    assert min(norms) < s.clip < max(norms)                             # clipping bites, at times

    expected = iter(chunks)
    for place.epoch, (mean, *agreed) in enumerate(epochs):
        place.start = start = total = 0
        for _ in train.train_epoch(place, model, optimizer, schedule, dni, (inputs, targets), s):
            nll, rate, run, synthetic, _ = next(expected)
            start, total = place.start, total + nll * (place.start - start)
            assert (float(place.total), place.rate) == pytest.approx((total, rate), abs=1e-10)
            assert (place.run, place.source == "synthetic") == (run, synthetic)
        assert float(place.total) / place.start == pytest.approx(mean, abs=1e-10)
        if dni:
            assert dni.agreement.result() == pytest.approx(agreed, rel=1e-4)
    assert next(expected, None) is None
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
    """The three forms agree: c_1 .. c_T, c_T apart, and the gradients of f, z and c_0 through both."""
    leaves = gates(T, device=device)
    weights = [torch.randn(T, 3, 4, **DOUBLE).to(device), torch.randn(3, 4, **DOUBLE).to(device)]
    outputs = [(c, c[-1]) for c in (pool_loop(*leaves), pool_closed_form(*leaves))] + [pool(*leaves)]
    results = [[*out, *torch.autograd.grad(out, leaves, weights)] for out in outputs]
    close(results[1], results[0])
    close(results[2], results[0])


HAS_TRITON = importlib.util.find_spec("triton")
TRITON = pytest.mark.skipif(not HAS_TRITON, reason="no triton (pip install triton)")
# (The interpreter of 3.6, which torch 2.11 brings along, fails with numpy 2.4.)
INTERPRETER = pytest.mark.skipif(not HAS_TRITON or importlib.metadata.version("triton") < "3.7",
                                 reason="no triton 3.7 or later (pip install triton)")


def python(code, **environment):
    """Run it in a process of its own; its output."""
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=240,
                         env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    return run.stdout


@INTERPRETER
def test_the_gpus_pooling_without_a_gpu():
    """The GPU's kernels, run by Triton's interpreter on CPU tensors, equal `pool_loop`: c, c_T and the
    gradients of f, z and c_0. Sizes are odd, or above the BLOCK of columns; arguments are strided too; T is 1
    too.
    """
    code = """
import torch, qrnn
torch.manual_seed(0)
qrnn.pool_forward.register_kernel("cpu", qrnn.pool_forward_triton)      # in place of the loops
qrnn.pool_backward.register_kernel("cpu", qrnn.pool_backward_triton)
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
    assert python(code, TRITON_INTERPRET="1").split("\n")[:-1] == [f"{n} columns" for n in (15, 1, 129, 135)]


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
        types |= dict.fromkeys(("BLOCK", "STAGES"), "constexpr")
        source = ASTSource(kernel, types, {"BLOCK": qrnn.BLOCK, "STAGES": qrnn.STAGES})
        made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 2})
        print(capability, len(made.asm["cubin"]) > 0, "cp.async" in made.asm["ptx"])
"""
    lines = python(code).split("\n")[:-1]
    assert lines == [f"{c} True {c >= 80}" for c in (75, 80, 90) for _ in range(2)]


def test_the_pooling_is_to_the_compiler_what_it_is():
    """What both operations promise to torch.compile is what they do: shapes, types, strides, no aliases."""
    f, z, c0 = (x.detach() for x in gates())
    strided = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (torch.randn_like(f), f, z)]
    for (G, f, z) in ((torch.randn_like(f), f, z), strided):
        c = qrnn_module.pool_forward(f, z, c0)
        for operation, inputs in ((qrnn_module.pool_forward, (f, z, c0)),
                                  (qrnn_module.pool_backward, (G, torch.randn_like(c0), f, z, c))):
            torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def test_pooling_gradcheck():
    """The hand-written backward agrees with finite differences, for strided and broadcast arguments too."""
    def strided(f, z, c0):
        return pool(f.transpose(0, 1), z.transpose(0, 1), c0.t())[0][::2]
    f, z, c0 = gates()
    assert torch.autograd.gradcheck(pool, (f, z, c0))
    assert torch.autograd.gradcheck(strided, (gates(3, 7, 4)[0], gates(3, 7, 4)[1], gates(7, 4, 3)[2]))
    assert torch.autograd.gradcheck(lambda *a: pool(*a)[0].sum(), (f, z, c0))      # G is an expanded scalar


def numpy_qrnn(layers, x):
    """A QRNN stack as the paper writes it: a convolution over time, then a loop.

    The weights are those of `layers`, and the state is zero at first.
    """
    sigmoid = lambda a: 1 / (1 + np.exp(-a))                                                      # noqa: E731
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
    for batch_first in (False, True):
        options = dict(num_layers=2, batch_first=batch_first, dropout=0.5)
        lstm, qrnn = torch.nn.LSTM(5, 4, **options), QRNN(5, 4, **options)
        x = torch.randn(7, 3, 5)
        assert qrnn(x)[0].shape == lstm(x)[0].shape
        output, state = qrnn(x)
        qrnn(x, state)
        assert [tuple(c.shape) for c, _ in state] == [tuple(c.shape) for c in lstm(x)[1][1]]
    one, other = QRNN(5, 4, 2), QRNN(5, 4, 2, batch_first=True)
    other.load_state_dict(one.state_dict())
    x = torch.randn(7, 3, 5)
    close(one(x)[0], other(x.transpose(0, 1))[0].transpose(0, 1))
    with pytest.raises(ValueError, match=r"\(T >= 1, B, 5\).*\(7, 3, 6\)"):
        one(torch.randn(7, 3, 6))
    with pytest.raises(ValueError, match="T >= 1"):
        one(torch.randn(0, 3, 5))
    with pytest.raises(ValueError, match="at least 1"):
        QRNN(5, 0)


def test_zoneout_keeps_the_old_value():
    """Zoneout 1 freezes the state, 0.3 keeps 30% of it in training. Evaluation is the mean over masks."""
    x, c0 = torch.randn(1, 1, 5, **DOUBLE), torch.randn(1, 3000, **DOUBLE)
    layer = QRNNLayer(5, 3000, zoneout=0.3).double()
    after = lambda x: layer(x, (c0, x[:0]))[1][0]                                                 # noqa: E731
    kept = (after(x) == c0).double().mean()
    assert abs(kept - 0.3) < 0.04
    with torch.no_grad():
        mean = sum(after(x) for _ in range(2000)) / 2000
        layer.eval()
        close(after(x), mean, atol=0.1, rtol=0)
    layer.train().zoneout = 1.0
    assert torch.equal(after(torch.randn(6, 1, 5, **DOUBLE)), c0)


@pytest.mark.parametrize("p", [0.0, 2 ** -18, 2 ** -17, 2 ** -16, 0.01, 0.3, 1 - 2 ** -16, 1 - 2 ** -18, 1.0])
def test_masks_are_true_with_probability_p(p):
    """Of a million draws a share p is true. p is rounded to a multiple of 2^-16, at 2^-17 and below to 0."""
    share = toss((1000, 1000), p, "cpu").double().mean().item()
    rounded = round(p * 2 ** 16) / 2 ** 16
    assert abs(share - rounded) <= 5 * (rounded * (1 - rounded) / 1e6) ** 0.5


@pytest.mark.parametrize("ignored", [0, 3, 5])
@pytest.mark.parametrize("n, V", [(5, 7), (1000, 9000)])
def test_decoder_loss_in_blocks_is_cross_entropy(n, V, ignored):
    """The block-wise decoder and loss equal F.cross_entropy(F.linear(.)), in value and gradients.

    They do in one block and in several, where targets of -100 are not counted, and where no target is left
    (nan). Gradients cost two products more than the loss; without autograd they are not made. What
    cross_entropy refuses is refused here.
    """
    leaves = [torch.randn(shape, **DOUBLE).requires_grad_() for shape in ((n, 6), (V, 6), (V,))]
    target = torch.randint(V, (n,))
    target[:ignored] = -100
    ours, theirs = decoder_loss(*leaves, target), F.cross_entropy(F.linear(*leaves), target)
    close(ours, theirs, equal_nan=True)
    if ignored < n:
        close(torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * theirs, leaves))
    for context, products in ((torch.enable_grad, 3), (torch.no_grad, 1)):
        with context():
            with FlopCounterMode(display=False) as counter:
                close(decoder_loss(*leaves, target), theirs, equal_nan=True)
            assert counter.get_total_flops() == products * 2 * n * V * 6
            with pytest.raises(ValueError, match=f"each of {n} rows"):
                decoder_loss(*leaves, torch.cat([target, target[:1]]))
            for bad in (-1, V):
                with pytest.raises((IndexError, RuntimeError)):
                    decoder_loss(*leaves, torch.cat([target[:-1], torch.tensor([bad])]))


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_products_stay_near_float32(device):
    """With bf16 products the loss is within 1% of float32's, every gradient within 5% (of its norm).

    The state stays float32.
    """
    model = LanguageModel(50, 32, 64, 2).to(device)
    tokens = torch.randint(50, (20, 4), device=device)
    results = []
    for product in (torch.float32, torch.bfloat16):
        with torch.autocast(device, product, product != torch.float32):
            nll, _, state = model.loss(tokens[:-1], tokens[1:])
        assert state[0][0].dtype == torch.float32
        results.append((nll, torch.autograd.grad(nll, list(model.parameters()))))
    (a, full), (b, half) = results
    assert a != b and abs(a - b) < 0.01 * a
    for g, h in zip(full, half):
        assert (g - h).norm() < 0.05 * g.norm()


def three_steps(compile, device, product):
    """Losses, gradients and states of three chunks of different lengths.

    The state is carried from chunk to chunk, and every random mask is in use.
    """
    torch.manual_seed(5)
    s = dataclasses.replace(train.SMALL, mode="dni", embedding_size=24, hidden_size=40, num_layers=3,
                            dropout_embedding=0.1, dropout_weight=0.3, zoneout=0.1, dni_last_layer=0.3,
                            dni_zoneout=0.1, dni_alpha=1.0, compile=compile)
    model, optimizer, dni = train.build(s, 60, device)
    mixed = torch.autocast(device, product, product != torch.float32)
    tokens, state, found = torch.randint(60, (90, 4)).to(device), None, []
    for start, stop in ((0, 30), (30, 60), (60, 83)):
        torch.manual_seed(stop)
        # g is compiled without a graph in the first chunk, with one in the second; after that nothing may be.
        with torch.compiler.set_stance("fail_on_recompile" if start == 60 else "default"):
            chunk = tokens[start:stop], tokens[start + 1:stop + 1]
            nll, state = train.train_step(model, optimizer, dni, *chunk, state, True, s, mixed)
        h_g = dni.memory and dni.memory[0]
        found.append([nll, *(p.grad for p in model.parameters()), *train.cells(state), h_g])
    return found[0], found[1], found[2], list(dni.g.parameters())


@pytest.mark.parametrize("how, real", [("deepcopy", False), ("pickle", False), ("torch.save", False),
                                       pytest.param("deepcopy", True, marks=[SLOW, COMPILER])])
def test_a_copy_of_a_compiled_module_has_its_own_weights(how, real, monkeypatch, tmp_path):
    """A copy of a module with compile=True computes with and learns its own weights, not the original's.

    The copy may be made by copying, by pickling, or by saving the module whole.
    """
    if not real:
        monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *a: function(*a))
    x, tokens = torch.randn(6, 2, 5), torch.randint(7, (6, 2))
    for module, output in ((QRNN(5, 4, compile=True), lambda m: m(x)[0].sum()),
                           (LanguageModel(7, 4, 5, 2, compile=True), lambda m: m.loss(tokens, tokens)[0]),
                           (NeuronDNI(6, last_layer=0.5, compile=True), lambda m: m([x[0]])[0][0].sum())):
        before = output(module).detach()
        torch.save(module, tmp_path / "module.pt")
        twin = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
                "torch.save": lambda _: torch.load(tmp_path / "module.pt", weights_only=False)}[how](module)
        with torch.no_grad():
            close(output(twin), before)
            for p in twin.parameters():
                p.mul_(-0.5)
        changed = output(twin)
        changed.backward()
        assert all(p.grad is not None for p in twin.parameters())
        assert all(p.grad is None for p in module.parameters())
        assert abs(changed - before) > 1e-4 and output(module) == before


@SLOW
@COMPILER
@pytest.mark.filterwarnings("error:torch.compile failed")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_is_plain(product, device):
    """Three steps of training with the compiled forms equal three with the plain ones.

    Every loss, gradient and state, and g, are the same to float32 rounding; with bf16 products to 1%.
    Nothing is compiled again for a chunk of another length.
    """
    for ours, theirs in zip(three_steps(True, device, product), three_steps(False, device, product)):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= (1e-5 if product == torch.float32 else 1e-2) * b.norm()


@SLOW
@COMPILER
def test_without_a_compiler_the_plain_form_serves(tmp_path):
    """No working C++ compiler: one warning, and the plain form's very numbers. Mistakes stay the caller's."""
    code = """
import torch, warnings
from qrnn import QRNN
warnings.simplefilter("always")
results = []
for compile in (False, True):
    torch.manual_seed(0)
    qrnn = QRNN(5, 4, 2, compile=compile)
    results += [qrnn(torch.ones(7, 3, 5))[0], qrnn(torch.ones(6, 3, 5))[0]]
assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
try:
    qrnn(torch.ones(7, 3, 6))
except ValueError as error:
    print(error)
"""
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=240,
                         env={**os.environ, **environment})
    assert run.returncode == 0 and "(T >= 1, B, 5)" in run.stdout, run.stderr
    assert run.stderr.count("UserWarning: torch.compile failed, so the plain form goes on") == 1, run.stderr


# --------------------------------------------------------------------------------- 2. causality and streaming

@pytest.mark.parametrize("window", [1, 2, 3])
def test_causality(window):
    """Output t depends on inputs up to t, and on every one of them, and on none after."""
    qrnn = QRNN(3, 4, 2, window=window).double()
    x = torch.randn(6, 1, 3, **DOUBLE)
    jacobian = torch.autograd.functional.jacobian(lambda x: qrnn(x)[0], x)
    jacobian = jacobian.abs().amax((1, 2, 4, 5))                        # (t out, t in)
    assert (jacobian.triu(1) == 0).all() and (jacobian.tril() + torch.ones(6, 6).triu(1) > 0).all()


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


def by_definition(p, t):
    """Cosine and R^2 of predictions p and targets t, vectors."""
    return F.cosine_similarity(p, t, 0).item(), (1 - (p - t).square().sum() / t.square().sum()).item()


# -------------------------------------------------------------------- 3, 4. Eq. 1 and the bootstrapped target

def tiny_model(windows=(1, 1)):
    """A float64 language model, small enough for whole Jacobians, and K = 3 chunks of T = 4, B = 2."""
    model = LanguageModel(11, 3, 5, 2).double()
    model.rnn = QRNN(3, [5, 3], window=list(windows)).double()
    tokens = torch.randint(11, (13, 2))
    return model, [(tokens[i:i + 4], tokens[i + 1:i + 5]) for i in (0, 4, 8)]


def settings(**changes):
    return dataclasses.replace(train.SMALL, **{"clip": math.inf, "dni_alpha": 1.0, **changes})


def one_graph(model, chunks):
    """Losses and border states of all chunks in a single graph, which is what full BPTT would see."""
    losses, states, state = [], [], None
    for inputs, targets in chunks:
        nll, penalty, state = model.loss(inputs, targets, state, 2.0, 1.0)
        losses.append(nll + penalty)
        states.append(state)
    return losses, states


class Oracle(Interface):
    """An interface that injects the true gradients it was given, in order, whatever the state."""

    def __init__(self, answers):
        super().__init__(NeuronDNI().double())
        self.answers = iter(answers)

    def synthesize(self, s_next):
        return next(self.answers)


def test_eq1_with_the_true_future_gradient_is_full_bptt():
    """Eq. 1: given the TRUE future gradients, the chunks' gradients add up to full BPTT's.

    Left side: K separate chunks, each trained by train_step. Right side: one graph over the whole text. With
    nothing injected the sum is different, which is what truncation costs.
    """
    model, chunks = tiny_model()
    parameters = list(model.parameters())
    losses, states = one_graph(model, chunks)
    full = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    T_B = chunks[0][0].numel()
    future = []
    for k in range(2):
        s_k = train.cells(states[k])
        future.append([T_B * d for d in torch.autograd.grad(sum(losses[k + 1:]), s_k, retain_graph=True)])
    future.append([torch.zeros_like(c) for c in train.cells(states[2])])

    def sum_over_chunks(synthetic):
        dni, frozen, state = Oracle(future), torch.optim.SGD(parameters, 0.0), None
        total = [torch.zeros_like(p) for p in parameters]
        for inputs, targets in chunks:
            _, state = train.train_step(model, frozen, dni, inputs, targets, state, synthetic,
                                        settings(activation=2.0, temporal=1.0))
            total = [t + p.grad for t, p in zip(total, parameters)]
        return total

    close(sum_over_chunks(synthetic=True), list(full))
    truncated = joined(sum_over_chunks(synthetic=False))
    assert (truncated - joined(full)).norm() > 1e-3 * joined(full).norm()


def test_eq1_holds_for_windows_above_one_when_the_inputs_cross_too():
    """With a window of 2, c and x_prev cross the border. With both gradients injected Eq. 1 is exact."""
    def flat(state):
        return [t for pair in state for t in pair]
    model, chunks = tiny_model(windows=(2, 3))
    parameters = list(model.parameters())
    losses, states = one_graph(model, chunks)
    full = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    state = None
    for k, (inputs, targets) in enumerate(chunks):
        nll, penalty, new_state = model.loss(inputs, targets, state, 2.0, 1.0)
        future = (torch.autograd.grad(sum(losses[k + 1:]), flat(states[k]), retain_graph=True) if k < 2
                  else [torch.zeros_like(t) for t in flat(new_state)])
        (nll + penalty + sum((d * x).sum() for d, x in zip(future, flat(new_state)))).backward()
        state = [(c.detach(), x_prev.detach()) for c, x_prev in new_state]
    close([p.grad for p in parameters], list(full))
    (c, x_prev), *_ = train.cut(new_state)              # what train.py carries: the inputs' share is left out
    assert c.requires_grad and not x_prev.requires_grad


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
    g = NeuronDNI(last_layer=0.5).double()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.0), alpha)
    optimizer, state = torch.optim.SGD(model.parameters(), 0.0), None
    borders = []
    for inputs, targets in chunks[:2]:
        borders.append(state)
        _, state = train.train_step(model, optimizer, dni, inputs, targets, state, True, settings())
    left = joined([c.grad for c in train.cells(borders[1])]) * chunks[0][0].numel()

    (_, loss), (first, second) = one_graph(model, chunks[:2])
    true_part = torch.autograd.grad(loss, train.cells(first), retain_graph=True)

    def second_state(*cs):
        return joined(train.cells(model.loss(*chunks[1], [(c, x) for c, (_, x) in zip(cs, first)])[2]))
    rows = torch.autograd.functional.jacobian(second_state, tuple(train.cells(first)))
    jacobian = torch.cat([r.flatten(1) for r in rows], 1)               # dh_2T / dh_T, (N, N)
    with torch.no_grad():
        guess, memory = g(train.cells(first))                         # delta^_T
        answer, _ = g(train.cells(second), memory)                    # delta^_2T
    right = joined(true_part) * chunks[0][0].numel() + jacobian.T @ (alpha * joined(answer))
    [(predicted, target)] = learned                       # one border: the first chunk enters without a state
    close(left, right)
    close(joined(target), right)
    close(joined(predicted).detach(), joined(guess))
    assert dni.agreement.result() == pytest.approx(by_definition(joined(guess), right), rel=1e-4)
    assert all(math.isnan(x) for x in Agreement().result())             # nothing was seen
    assert (jacobian.T @ joined(answer)).norm() > 1e-3 * left.norm()                       # g had a say in it


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
        return [c for c, _ in state], F.cross_entropy(self.decoder(h).flatten(0, 1), chunk[1:].flatten())


@pytest.mark.parametrize("kind", ["neuron", "layer"])
@pytest.mark.parametrize("Reader", [GRUReader, LSTMReader, QRNNReader])
def test_five_lines_add_a_synthetic_gradient_to_any_model(Reader, kind):
    """credit, backward and learn are Eq. 1, the bootstrapped target and g's regression.

    This holds for three models that g does not know. Left: the five lines. Right: the derivatives of every
    chunk by torch.autograd.grad, put together by hand.
    """
    T, B, alpha = 4, 3, 0.7
    read, phi_gradients = Reader().double(), []
    g = NeuronDNI(last_layer=0.5) if kind == "neuron" else LayerDNI([6] * Reader.states, last_layer=0.5)
    g.double()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.0), alpha)
    dni.optimizer.register_step_pre_hook(
        lambda *_: phi_gradients.append([p.grad.clone() for p in g.parameters()]))
    text, s_next = torch.randint(7, (3 * T + 1, B)), read.start(B)
    memory = None
    for k in range(3):
        chunk = text[k * T:(k + 1) * T + 1]
        read.zero_grad()
        s = [c.detach().requires_grad_() for c in s_next]
        s_next, loss = read(chunk, s)
        (loss + dni.credit(s, s_next, tokens=T * B)).backward()
        error = dni.learn()

        predicted, memory = g([c.detach() for c in s], memory)
        future = [d.detach() for d in g([c.detach() for c in s_next], memory)[0]]
        memory = memory and tuple(m.detach() for m in memory)
        again = [c.detach().requires_grad_() for c in s]
        s_again, loss_again = read(chunk, again)
        everything = [*read.parameters(), *again]
        true = torch.autograd.grad(loss_again, everything, retain_graph=True)
        injected = [alpha / (T * B) * d for d in future]
        through = torch.autograd.grad(s_again, everything, injected, allow_unused=True)
        expected = [a if b is None else a + b for a, b in zip(true, through)]
        close([p.grad for p in read.parameters()], expected[:-len(s)])
        target = [T * B * d for d in expected[-len(s):]]
        mse = ((joined(predicted) - joined(target)) ** 2).mean()
        close(error, mse.detach())
        close(phi_gradients[-1], list(torch.autograd.grad(mse, g.parameters())))


def test_credit_is_a_term_of_the_loss():
    """Its derivative in s_{k+1} is alpha delta^ / (T B), in s_k's prediction 0; without inject it is 0."""
    g, s = NeuronDNI(last_layer=0.5).double(), [torch.randn(2, 3, **DOUBLE).requires_grad_()]
    s_next = [(2 * s[0]).sin()]
    dni = Interface(g, alpha=0.9)
    credit = dni.credit(s, s_next, tokens=10)
    expected = g(s_next, g(s)[1])[0][0].detach()
    close(torch.autograd.grad(credit, s_next, retain_graph=True)[0], 0.09 * expected)
    close(credit, 0.09 * (expected * s_next[0]).sum())
    dni.reset()
    assert dni.credit(s, s_next, tokens=10, inject=False) == 0 and dni.memory is not None


def test_wrong_calls_of_the_interface_say_what_to_do():
    """A call that would give wrong gradients, or silently none, is refused. The message names the way out."""
    def chunk(dni, B=2, start=lambda c: c.requires_grad_(), end=lambda c: 2 * c, **options):
        s = [start(torch.randn(B, 3))]
        s_next = [end(c) for c in s]
        return dni.credit(s, s_next, 10, **options), s_next

    def refused(error, words, *steps):
        dni = Interface(NeuronDNI())
        with pytest.raises(error, match=words):
            for step in steps:
                step(dni)
    refused(RuntimeError, r"call credit\(\) and then backward\(\)", lambda dni: dni.learn())
    refused(RuntimeError, r"call backward\(\) on loss \+ credit", chunk, lambda dni: dni.learn())
    refused(RuntimeError, r"twice: call backward\(\) and learn\(\)", chunk, chunk)
    way_out = r"leaves .* c.detach\(\).requires_grad_\(\)"
    refused(ValueError, way_out, lambda dni: chunk(dni, start=lambda c: c))
    refused(ValueError, r"leaves", lambda dni: chunk(dni, start=lambda c: 2 * c.requires_grad_()))
    refused(ValueError, r"before detaching", lambda dni: chunk(dni, end=lambda c: (2 * c).detach()))
    refused(ValueError, r"same shapes, got \[\(2, 3\)\] and \[\(2, 2\)\]",
            lambda dni: chunk(dni, end=lambda c: c[:, :2]))
    refused(ValueError, r"list\(h_n\) for nn.GRU", lambda dni: chunk(dni, end=lambda c: 2 * c[None]))
    refused(ValueError, r"h_g remembers 6 neurons, and s_next has 12: call reset\(\)",
            lambda dni: (sum(c.sum() for c in [chunk(dni)[0]]).backward(), dni.learn(), chunk(dni, B=4)))
    dni = Interface(NeuronDNI())
    assert dni.credit(None, [torch.randn(2, 3).requires_grad_()], 10) is not None and dni.learn() is None
    chunk(dni, inject=False), dni.reset(), chunk(dni)                   # reset forgets what is to be learned


# --------------------------------------------------------------------------------------------- 5. neuron-wise

def test_permuting_neurons_permutes_the_synthetic_gradients():
    """g cannot tell neurons apart: shuffle those of all layers and streams, and its answers follow."""
    g, memory, shuffled_memory = NeuronDNI(last_layer=0.5), None, None
    order = torch.randperm(4 * 9)
    for _ in range(3):
        c = torch.randn(4, 9)
        (d,), memory = g([c], memory)
        (shuffled,), shuffled_memory = g([c.flatten()[order].view(4, 9)], shuffled_memory)
        close(shuffled.flatten(), d.flatten()[order])
    one_call = g([torch.ones(2, 3), torch.ones(2, 5)])[0]                               # layers do not matter
    assert [tuple(d.shape) for d in one_call] == [(2, 3), (2, 5)] and joined(one_call).unique().numel() == 1


def test_each_neuron_has_its_own_memory():
    """One neuron's past changes its own row of h_g and its own later synthetic gradient, and no other's."""
    g, past = NeuronDNI(last_layer=0.5), torch.randn(2, 8)
    other = past.clone()
    other[1, 3] += 1
    memories = [g([p])[1] for p in (past, other)]
    assert memories[0][0].shape == (16, 50)
    changed = (memories[0][0] != memories[1][0]).any(1).nonzero().flatten().tolist()
    now = torch.randn(2, 8)
    answers = [g([now], m)[0][0].flatten() for m in memories]
    assert changed == [8 + 3] == (answers[0] != answers[1]).nonzero().flatten().tolist()


@pytest.mark.parametrize("dni", ["neuron", "layer"])
def test_the_noise_on_what_g_sees(dni):
    """In training g sees c (1 + 0.5 N(0, 1)), drawn for each neuron by g's generator; in evaluation c."""
    s = dataclasses.replace(train.SMALL, mode="dni", dni=dni, dni_noise=0.5,
                            embedding_size=1000, hidden_size=1000)
    g, seen = train.build(s, 7, "cpu")[2].g, []
    entry = g.encode if dni == "neuron" else g.mlps[0]
    entry.register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten()))
    c = [(torch.arange(2000.0) / 1000 - 1).view(2, 1000)]
    state, ours = torch.get_rng_state(), g.generator.get_state()
    for _ in range(2):
        g(c + c if dni == "layer" else c)
    g.generator.set_state(ours)
    g(c + c if dni == "layer" else c)
    g.eval()(c + c if dni == "layer" else c)
    once, again, replayed, plain = seen
    assert torch.equal(plain, c[0].flatten()) and torch.equal(once, replayed) and not torch.equal(once, again)
    assert torch.equal(state, torch.get_rng_state())
    factors = (once / plain)[plain != 0]
    assert factors.mean() == pytest.approx(1, abs=0.06) and factors.std() == pytest.approx(0.5, abs=0.04)
    assert once[1000] == 0 and factors.unique().numel() > 1900    # c = 0 stays 0; no two neurons share a draw


def test_the_linear_interface_is_one_affine_map_per_layer():
    """LayerDNI with hidden_size 0 gives W c + b for each layer, with H^2 + H parameters."""
    g = LayerDNI([4, 3], 0, last_layer=0.5).double()
    assert machine.parameters(g) == 4 * 4 + 4 + 3 * 3 + 3
    a, b = ([torch.randn(2, h, **DOUBLE) for h in (4, 3)] for _ in range(2))
    between = [0.3 * x + 0.7 * y for x, y in zip(a, b)]
    close(g(between)[0], [0.3 * x + 0.7 * y for x, y in zip(g(a)[0], g(b)[0])])
    assert (g(a)[0][0] - g(b)[0][0]).abs().min() > 0


def test_parameters_do_not_grow_with_the_neurons():
    """phi is the same for 1 neuron and the paper's 101,000. A layer-wise DNI is 10 to 100 times as large."""
    count = machine.parameters
    paper = [layer.hidden_size for layer in LanguageModel(10, 400, 1550, 4).rnn.layers]
    assert paper == [1550, 1550, 1550, 400] and 20 * sum(paper) == 101_000
    g = NeuronDNI()
    with torch.no_grad():
        g([torch.randn(1, 1)]), g([torch.randn(20, h) for h in paper])
    assert 10 <= count(LayerDNI(paper)) / count(g) <= 100
    assert count(LayerDNI([2 * h for h in paper])) > 1.9 * count(LayerDNI(paper))


# ------------------------------------------------------------------------------------ 6. trained but not used

def gradients_of_a_run(mode, kind="neuron", steps=4, **changes):
    """Model gradients of each of a few train_steps in float32; Adam updates the weights in between."""
    s = dataclasses.replace(train.SMALL, mode=mode, dni=kind, embedding_size=8, hidden_size=12,
                            dropout_weight=0.1, dropout_embedding=0.1, dni_alpha=1.0, **changes)
    model, optimizer, dni = train.build(s, 30, "cpu")
    tokens, state, gradients = torch.arange(400).view(100, 4) % 29, None, []
    for k in range(steps):
        run, epoch = 0, k / 2                                           # two steps an "epoch" for the warm-up
        synthetic = train.gradient_source(s, run, epoch) == "synthetic"
        part = slice(20 * k, 20 * k + 20)
        chunk = tokens[part], tokens[1:][part]
        _, state = train.train_step(model, optimizer, dni, *chunk, state, synthetic, s)
        gradients.append([p.grad.clone() for p in model.parameters()])
    return gradients, dni


@pytest.mark.parametrize("kind", ["neuron", "layer", "linear"])
def test_a_dni_trained_but_not_used_changes_nothing(kind):
    """While g only learns, every gradient of the model is BPTT's, bit for bit, dropout included; then not.

    This holds with noise and zoneout in g too. g draws them from a generator of its own.
    """
    bptt, _ = gradients_of_a_run("bptt")
    unused, dni = gradients_of_a_run("dni", kind, dni_warmup=10.0, dni_noise=0.5, dni_zoneout=0.3)
    for ours, theirs in zip(unused, bptt):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    last_layer = (dni.g.decode if kind == "neuron" else dni.g.mlps[0])[-1]
    assert any((p != 0).any() for p in last_layer.parameters())
    used, _ = gradients_of_a_run("dni", kind, dni_warmup=1.0)
    assert any((a != b).any() for a, b in zip(used[-1], bptt[-1]))


@pytest.mark.parametrize("dni", [NeuronDNI(), LayerDNI([9, 5])])
def test_the_first_synthetic_gradients_are_zero(dni):
    """With its last layer at zero, g says exactly 0. With that injected, a step is BPTT's, bit for bit."""
    assert not joined(dni([torch.randn(4, 9), torch.randn(4, 5)])[0]).any()
    bptt, _ = gradients_of_a_run("bptt", steps=1)
    first, _ = gradients_of_a_run("dni", steps=1, dni_warmup=0.0)
    assert all(torch.equal(a, b) for a, b in zip(first[0], bptt[0]))


# ------------------------------------------------------------------------------------------------ 7. g learns

def learn(g, gradient, borders=600, neurons=(16, 16)):
    """Train g on random states with the future gradient(now, before). Cosine and R^2 of the last tenth."""
    optimizer, memory, before = torch.optim.Adam(g.parameters(), 3e-3), None, torch.zeros(16, 32)
    agreement = Agreement()
    for k in range(borders):
        now = torch.rand(16, 32) * 2 - 1
        predicted, memory = g(list(now.split(neurons, 1)), memory)
        memory = tuple(m.detach() for m in memory) if memory else None
        target = gradient(now, before).split(neurons, 1)
        if k >= borders * 9 // 10:
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
    gradient = lambda now, before: now + before                                                   # noqa: E731
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


# ------------------------------------------------------------------------------------------- 8. warm restarts

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
    starts = lambda **kw: [e for e in range(1, 330) if run_at(e, **kw).elapsed == 0]              # noqa: E731
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


def test_sgdr_bounds_per_run_and_whole_epochs():
    """Run i falls from eta_max^i to eta_min^i, and the last bounds serve later runs.

    With fractional=False the rate moves by whole epochs only.
    """
    schedule = SGDR(optimizer_with(1.0), 2, eta_max=[1.0, 0.5], eta_min=[0.1, 0.0])
    at = lambda epoch: (schedule.step(epoch), schedule.get_last_lr()[0])[1]                       # noqa: E731
    assert [at(e) for e in (0, 1, 2, 4, 6, 10)] == pytest.approx([1.0, 0.55, 0.5, 0.25, 0.5, 0.25])
    assert at(2 - 1e-9) == pytest.approx(0.1) and at(6 - 1e-9) == pytest.approx(0.0)
    whole = SGDR(optimizer_with(1.0), 4, fractional=False)
    rates = []
    for epoch in (1, 1.25, 1.99, 2):
        whole.step(epoch)
        rates.append(whole.get_last_lr()[0])
    assert rates[0] == rates[1] == rates[2] > rates[3]


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


def test_the_alternation_flips_at_a_restart_and_nowhere_else():
    """Over 80 epochs of E_base = 5, mode alternating is real in even runs and synthetic in odd ones.

    The other modes do what their table says.
    """
    moments = [i / 8 for i in range(640)]

    def sources(**changes):
        s = dataclasses.replace(train.SMALL, e_base=5.0, dni_warmup=1.0, **changes)
        schedule, found = train.make_schedule(s, optimizer_with(s.lr)), []
        for moment in moments:
            if schedule:
                schedule.step(moment)
            found.append(train.gradient_source(s, schedule.run.index if schedule else 0, moment))
        return found, schedule

    found, schedule = sources(mode="alternating")
    flips = [moment for a, b, moment in zip(found, found[1:], moments[1:]) if a != b]
    assert found[0] == "real" and flips == [5, 15, 35, 75] and schedule
    swapped = {"real": "synthetic", "synthetic": "real"}
    assert sources(mode="alternating", first="synthetic")[0] == [swapped[source] for source in found]
    assert sources(mode="bptt") == (["real"] * 640, None)
    assert set(sources(mode="restart")[0]) == {"real"} and sources(mode="restart")[1]
    for changes in (dict(mode="dni"), dict(mode="restart", gradient="synthetic")):
        found = sources(**changes)[0]
        assert found == ["real"] * 8 + ["synthetic"] * 632


# ---------------------------------------------------------------------------------------------------- 9. data

COUNTS = {"ptb": (929_589, 73_760, 82_430, 10_000), "wt2": (2_088_628, 217_646, 245_569, 33_278),
          "ptb-chars": (5_017_482, 393_042, 442_423, 50)}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_canonical_corpora(name, capsys):
    """Files of the recorded SHA-256 have the literature's tokens and vocabulary. PTB's unigram is at 639."""
    if not os.environ.get(data.ENVIRONMENT):
        pytest.skip(f"{data.ENVIRONMENT} names no folder with the corpora")
    corpus = data.load_corpus(name)
    assert (*(len(getattr(corpus, s)) for s in data.SPLITS), len(corpus.vocabulary)) == COUNTS[name]
    assert len(set(corpus.vocabulary)) == len(corpus.vocabulary)
    assert name != "ptb" or round(data.unigram_perplexity(corpus)) == 639
    assert "not the canonical" not in capsys.readouterr().err


def test_a_fingerprint_tells_texts_apart():
    """Words split, ordered or spelt otherwise are another corpus. The same corpus, made again, is not."""
    def corpus(train, valid, test=(0,), vocabulary=("a", "b")):
        splits = map(torch.tensor, (train, valid, test))
        return data.Corpus("x", list(vocabulary), *splits).fingerprint()
    others = [corpus([0, 1, 0], [1]), corpus([0, 1], [0, 1]), corpus([0, 1, 0, 1], []),
              corpus([1, 0, 0], [1]), corpus([0, 1, 0], [1], vocabulary=("a", "c")),
              corpus([0, 1], [0], [1, 0])]
    assert len(set(others)) == 6 and others[0] == corpus([0, 1, 0], [1])


@pytest.mark.parametrize("n, B", [(101, 4), (104, 4), (5, 4), (50, 1), (61_139, 20)])
def test_streams_lose_nothing_but_the_remainder(n, B):
    """In every stream a target is the token after its input. Together the streams are the text, in order."""
    inputs, targets = data.streams(torch.arange(n), B)
    assert torch.equal(targets, inputs + 1)
    L = (n - 1) // B
    assert torch.equal(inputs.t().flatten(), torch.arange(L * B)) and n - 1 - L * B < B
    with pytest.raises(data.CorpusError, match="too few"):
        data.streams(torch.arange(4), 4)


def test_pydoc_is_english_and_its_splits_are_disjoint():
    """The embedded corpus is large enough to learn from, and no paragraph stands in two of its splits."""
    corpus = data.load_corpus("pydoc")
    assert len(corpus.train) > 40_000 and min(len(corpus.valid), len(corpus.test)) > 4_000
    assert {"the", "statement", "<eos>", "<unk>"} < set(corpus.vocabulary)
    def paragraphs(split):
        text = " ".join(corpus.vocabulary[t] for t in split)
        return {p for p in text.split(" <eos> ") if "<unk>" not in p and len(p) > 60}
    sets = [paragraphs(split) for split in (corpus.train, corpus.valid, corpus.test)]
    assert all(len(s) > 5 for s in sets)
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_recall_reaches_its_floor_only_with_memory():
    """A reader who knows the rule pays exactly the closed form. A reader without memory pays more."""
    corpus = data.recall(delay=12, symbols=4, fillers=8, episodes=500)
    text, period = corpus.train.tolist(), 15
    assert len(text) == 500 * period + 1
    nll = forgetful = 0.0
    for position, token in enumerate(text[1:], 1):
        where, episode = position % period, position - position % period
        if where == 0:
            cost = math.log(4)
        elif where <= 12:
            assert 4 <= token < 12
            cost = math.log(8)
        elif where == 13:
            assert corpus.vocabulary[token] == "?"
            cost = 0.0
        else:
            assert token == text[episode]
            cost, forgetful = 0.0, forgetful + math.log(4)
        nll += cost
    predictions = len(text) - 1
    assert math.isclose(nll / predictions, math.log(corpus.facts["perplexity floor"]))
    without = math.exp((nll + forgetful) / predictions)
    assert math.isclose(corpus.facts["perplexity without the symbol"], without)


def test_a_folder_is_read(tmp_path):
    """<eos> ends every line, empty ones inside the text too; words new to valid and test are <unk>."""
    for split, text in (("train", "a b a\n\nc\n"), ("valid", "a d\n"), ("test", "c c")):
        (tmp_path / f"{split}.txt").write_text(text)
    corpus = data.load_corpus(str(tmp_path))
    spell = lambda tokens: " ".join(corpus.vocabulary[t] for t in tokens)                         # noqa: E731
    assert spell(corpus.train) == "a b a <eos> <eos> c <eos>"
    assert spell(corpus.valid) == "a <unk> <eos>" and spell(corpus.test) == "c c <eos>"


def test_the_right_files_are_found(tmp_path, monkeypatch, capsys):
    """Of two corpora side by side each name finds its own, in either naming. A strange file is announced."""
    texts = {(name, split): f"{name} {split}\n" for name in data.DOWNLOADS for split in data.SPLITS}
    for name in data.DOWNLOADS:
        hashes = {split: hashlib.sha256(texts[name, split].encode()).hexdigest() for split in data.SPLITS}
        monkeypatch.setitem(data.DOWNLOADS, name, ("http://127.0.0.1:9/{split}", hashes))
    layouts = [{"ptb": "ptb.{}.txt", "wt2": "wiki.{}.tokens"}, {"ptb": "{}.txt", "wt2": "wiki.{}.tokens"},
               {"ptb": "ptb/{}.txt", "wt2": "{}.txt"},
               {"ptb": "ptb/ptb.{}.txt", "wt2": "wikitext-2/wiki.{}.tokens"}]
    for i, layout in enumerate(layouts):
        for (name, split), text in texts.items():
            path = tmp_path / str(i) / layout[name].format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, newline="\n")
        for name in data.DOWNLOADS:
            corpus = data.load_corpus(name, tmp_path / str(i))
            assert corpus.vocabulary[corpus.train[0]] == name and len(corpus.train) == 3
    assert not capsys.readouterr().err
    (tmp_path / "3" / "ptb" / "ptb.test.txt").write_text("other words")
    data.load_corpus("ptb", tmp_path / "3")
    assert "ptb.test.txt is not the canonical file" in capsys.readouterr().err
    (tmp_path / "1" / "test.txt").write_text("other words")             # nothing says whose it is
    with pytest.raises(data.CorpusError, match="could not download test.txt"):
        data.load_corpus("ptb", tmp_path / "1")


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

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_downloads_are_checked_and_leave_nothing_behind(tmp_path, capsys):
    """A corrupted, cut-off or missing file is refused in one line, with its address and the way out."""
    good = b"the right text\n" * 9
    expected, target = hashlib.sha256(good).hexdigest(), tmp_path / "deep" / "train.txt"
    with web_server({"/good": good, "/bad": good[:-1] + b"!", "/short": None}) as url:
        for bad, why in ((f"{url}/bad", "SHA-256"), (f"{url}/short", "SHA-256"),
                         (f"{url}/missing", "Not Found"), ("http://127.0.0.1:9/", "refused")):
            with pytest.raises(data.CorpusError, match=why) as refusal:
                data.download(bad, target, expected)
            message = str(refusal.value)
            assert "\n" not in message and all(x in message for x in (bad, "--data-dir", str(target)))
            assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
        data.download(f"{url}/good", target, expected)
        assert target.read_bytes() == good and list(target.parent.iterdir()) == [target]


def test_a_corpus_is_downloaded_once(tmp_path, monkeypatch):
    """Missing splits are fetched into the data folder; the second time nobody is asked."""
    texts = {split: f"the {split} text\n".encode() for split in data.SPLITS}
    with web_server({f"/{split}": text for split, text in texts.items()}) as url:
        hashes = {split: hashlib.sha256(text).hexdigest() for split, text in texts.items()}
        monkeypatch.setitem(data.DOWNLOADS, "ptb", (url + "/{split}", hashes))
        first = data.load_corpus("ptb", tmp_path)
    again = data.load_corpus("ptb", tmp_path)
    assert torch.equal(first.test, again.test)
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == ["test.txt", "train.txt", "valid.txt"]


# -------------------------------------------------------------------------- 10. evaluation and regularisation

def test_perplexity_by_hand():
    """evaluate is minus the mean log-probability of each token given all before it.

    The mean is over the n - 1 predictions, and dropout is off.
    """
    model = LanguageModel(13, 4, 6, 2, dropout_input=0.5, dropout_hidden=0.5, dropout_output=0.5,
                          dropout_embedding=0.5, dropout_weight=0.5, zoneout=0.5).double()
    tokens = torch.randint(13, (40,))
    by_hand = 0.0
    with torch.no_grad():
        for i in range(1, 40):                               # a fresh pass over the whole past for each token
            logits, _ = model.eval()(tokens[:i, None])
            by_hand -= logits[-1, 0].softmax(0)[tokens[i]].log().item() / 39
    for bptt in (1, 7, 39, 200):
        assert math.isclose(train.evaluate(model.train(), tokens, 1, bptt=bptt), by_hand, rel_tol=1e-12)
        assert model.training
    inputs, targets = data.streams(tokens, 3)
    separately = [train.evaluate(model, torch.cat([inputs[:, b], targets[-1:, b]]), 1) for b in range(3)]
    assert math.isclose(train.evaluate(model, tokens, 3), sum(separately) / 3, rel_tol=1e-12)


def test_locked_dropout_is_constant_in_time():
    """Each stream and each call has its own mask, the same at all steps. Kept values are divided by 1 - p."""
    x = torch.ones(9, 30, 40)
    y, again = locked_dropout(x, 0.3), locked_dropout(x, 0.3)
    assert (y == y[:1]).all() and (y[0, 0] != y[0, 1]).any() and (y != again).any()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()} and abs(y.mean() - 1) < 0.1
    assert locked_dropout(x, 0.3, training=False) is x


def test_dropout_between_layers():
    """The input of the second layer alone loses neurons, the same at all steps, and none in evaluation."""
    qrnn, seen = QRNN(40, 40, 2, dropout=0.5), []
    for layer in qrnn.layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0] == 0).float().mean(0)))
    qrnn(torch.ones(9, 3, 40)), qrnn.eval()(torch.ones(9, 3, 40))
    assert not seen[0].any() and not seen[3].any()
    assert set(seen[1].unique().tolist()) == {0, 1} and abs(seen[1].mean() - 0.5) < 0.2


def test_embedding_dropout_drops_a_word_everywhere():
    """A share p of the words is zero wherever they stand in the chunk. The others are divided by 1 - p."""
    model = LanguageModel(1000, 4, 6, 2, dropout_embedding=0.4)
    seen = []
    model.rnn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    tokens = torch.arange(1000).repeat(2).view(100, 20)
    model.features(tokens)
    dropped = (seen[0] == 0).all(-1).flatten()
    assert torch.equal(dropped[:1000], dropped[1000:]) and abs(dropped.float().mean() - 0.4) < 0.06
    kept = model.embedding.weight[~dropped[:1000]] / 0.6                # so that the mean stays what it was
    close(seen[0].view(2000, 4)[:1000][~dropped[:1000]], kept)


def test_weight_dropout_reaches_the_raw_weight():
    """The gradient lands on the parameter: zero where it was dropped, scaled by 1 / (1 - p) elsewhere."""
    layer, x = QRNNLayer(5, 4, weight_dropout=0.5).double(), torch.randn(1, 3, 5, **DOUBLE)
    use, _ = masks = layer.draw(x)
    layer(x, None, masks)[0].sum().backward()
    mask = use.double() / 0.5
    z, f, o = F.linear(x, layer.weight * mask, layer.bias).chunk(3, -1)
    expected = torch.autograd.grad((o.sigmoid() * (1 - f.sigmoid()) * z.tanh()).sum(), layer.weight)[0]
    close(layer.weight.grad, expected)
    assert torch.equal(layer.weight.grad == 0, ~use) and 0 < use.sum() < use.numel()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_loss_and_its_penalties():
    """nll is forward's cross-entropy. The penalties are AWD's two means, after and before dropout (4.6)."""
    model = LanguageModel(13, 4, 6, 2, dropout_output=0.5).double()
    (tokens, targets), results = torch.randint(13, (2, 8, 3)), []
    for form in (lambda: model.loss(tokens, targets, None, 2.0, 3.0), lambda: model(tokens),
                 lambda: model.features(tokens)):
        torch.manual_seed(2)                                            # the same dropout masks
        results.append(form())
    (nll, penalty, _), (logits, _), (output, raw, _) = results
    assert (output == 0).any() and not torch.equal(output, raw)
    close(nll, F.cross_entropy(logits.view(-1, 13), targets.view(-1)))
    squares = sum((h ** 2).mean() for h in output) / 8
    steps = sum(((b - a) ** 2).mean() for a, b in zip(raw, raw[1:])) / 7
    close(penalty, 2 * squares + 3 * steps)
    assert model.loss(tokens[:1], targets[:1], None, 0.0, 3.0)[1] == 0
    assert sum(p.shape == (13, 4) for p in model.parameters()) == 1     # tied


def test_each_dropout_is_in_its_place():
    """`build` hands each setting to its own dropout: the share of zeros, or of values kept, is as asked."""
    s = dataclasses.replace(train.SMALL, mode="dni", embedding_size=300, hidden_size=300, num_layers=2,
                            dropout_output=0.1, dropout_hidden=0.2, dropout_input=0.3, dropout_embedding=0.4,
                            dropout_weight=0.5, zoneout=0.6, dni_zoneout=0.7, dni_hidden=300)
    model, _, dni = train.build(s, 300, "cpu")
    layer, g, seen = model.rnn.layers[1], dni.g, {}
    use, skip = layer.draw(torch.zeros(3, 100, 300))
    _, g_skip = g.rnn.draw(torch.zeros(1, 300, 300))
    use, skip, g_skip = (mask.double().mean() for mask in (use, skip, g_skip))
    for its in model.rnn.layers:
        its.zoneout = 0.0                                               # which would make zeros of its own
    layer.register_forward_pre_hook(lambda _, a: seen.update(hidden=a[0]))
    model.rnn.register_forward_pre_hook(lambda _, a: seen.update(input=a[0]))
    output, raw, _ = model.features(torch.arange(300).view(1, 300))     # every word once, in its own stream
    dropped = (seen["input"] == 0).all(-1).double().mean()
    zeros = {name: (x == 0).double().mean() for name, x in dict(seen, output=output).items()}
    locked = 1 - (1 - zeros["input"]) / (1 - dropped)
    found = [zeros["output"], zeros["hidden"], locked, dropped, 1 - use, skip, g_skip]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], abs=0.08) and (raw != 0).all()
    assert found[0] == pytest.approx(0.1, abs=0.01) and found[1] == pytest.approx(0.2, abs=0.01)


def test_jitter_is_drawn_as_it_says():
    """Over 400 epochs of PTB one chunk in twenty is T/2 long, the rest T, each with deviation 5.

    Every epoch has its own chunks.
    """
    lengths, epochs = [], set()
    for epoch in range(400):
        borders = list(train.chunk_borders(46_479, train.PAPER, epoch))
        epochs.add(tuple(borders))
        lengths += [stop - start for start, stop in borders[:-1]]
    lengths = torch.tensor(lengths).double()
    short, whole = lengths[lengths < 150], lengths[lengths >= 150]
    assert len(epochs) == 400 and len(short) / len(lengths) == pytest.approx(0.05, abs=0.003)
    for part, mean in ((whole, 199.5), (short, 99.5)):              # int() takes half a step away, on average
        assert part.mean() == pytest.approx(mean, abs=0.3) and part.std() == pytest.approx(5, abs=0.2)
    tiny = train.chunk_borders(10 ** 6, dataclasses.replace(train.PAPER, bptt=5))
    assert min(b - a for a, b in tiny if b < 10 ** 6) == 5


@pytest.mark.parametrize("part, mode, says", [
    ("model", "alternating", "the loss"), ("gradient", "bptt", "the loss"),
    ("g", "alternating --e-base 1", "the loss"),
    ("last gradient", "bptt", "the validation loss"), ("g", "dni --dni-warmup 9", "a weight of dni")])
def test_what_is_not_finite_is_never_saved(part, mode, says, corpus, tmp_path, monkeypatch):
    """A loss, a gradient of a finite loss, or a g, used or not, gone to infinity ends the training.

    One line with status 1 says what and where. The checkpoint before it, and best.pt, are what they were.
    """
    out, build, gradients = tmp_path / "r", train.build, []
    arguments = ["--data", corpus, "--mode", *mode.split(), *TINY, "--lr", 0.01]
    first = program(*arguments, "--epochs", 1, "--out", out)
    assert first.returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".pt", ".csv")}

    def spoil_gradient(gradient):
        gradients.append(gradient)                                      # of 32 steps an epoch
        return gradient * math.inf if part == "gradient" or len(gradients) == 32 else gradient

    def build_and_spoil(*arguments):
        model, optimizer, dni = build(*arguments)
        spoilt = {"model": model.decoder_bias, "g": dni and dni.g.decode[-1].bias}.get(part)

        def restore_and_spoil(*a, restore=checkpoints.restore):
            restore(*a)
            if spoilt is not None:
                torch.nn.init.constant_(spoilt, math.inf)
        monkeypatch.setattr(checkpoints, "restore", restore_and_spoil)
        if "gradient" in part:
            model.decoder_bias.register_hook(spoil_gradient)
        return model, optimizer, dni
    monkeypatch.setattr(train, "build", build_and_spoil)
    ended = program("--resume", out, "--epochs", 3)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    expected = rf"train.py: stopped: {says} is not finite after time step \d+ of epoch 2 \(.*--lr.*last\.pt"
    assert re.match(expected, ended.stderr), ended.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before


# A value of each setting that has an effect in some modes only, other than the one that `what_it_changes`
# begins with.
OTHER_VALUES = dict(
    dni="layer", lr=0.02, e_base=0.2, restarts=(0.4,), eta_min=(1e-4,), eta_max=(0.02,), sgdr_step="epoch",
    reset_optimizer=True, dni_bptt=2, dni_alpha=0.3, dni_hidden=7, dni_lr=1e-2, dni_l2=0.1, dni_window=2,
    dni_zoneout=0.4, dni_noise=0.7, dni_last_layer=0.3, dni_warmup=0.6)


@pytest.mark.parametrize("given", [
    dict(mode="bptt"), dict(mode="dni"), dict(mode="dni", dni="layer"),
    dict(mode="dni", dni="linear"), dict(mode="restart"),
    dict(mode="restart", gradient="synthetic"), dict(mode="alternating"),
    dict(mode="alternating", restarts=(0.3,)), dict(mode="restart", eta_max=(0.01,))], ids=str)
def test_a_setting_is_accepted_where_it_has_an_effect(given):
    """A setting that is not for all modes is accepted where it changes weights or rates, else refused."""
    base = dict(e_base=0.3, dni_warmup=0.3, dni_last_layer=0.2, **given)
    names = {f.name for f in dataclasses.fields(train.Settings) if f.metadata["where"]}
    assert names == {*OTHER_VALUES, "gradient", "first", "data_dir"}

    def trained(**changes):
        s = dataclasses.replace(train.SMALL, embedding_size=8, hidden_size=12, bptt=20, **{**base, **changes})
        model, optimizer, dni = train.build(s, 30, "cpu")
        schedule, place = train.make_schedule(s, optimizer), train.Place()
        text = data.streams(torch.arange(1601) % 29, 4)
        rates = [place.rate for _ in train.train_epoch(place, model, optimizer, schedule, dni, text, s)]
        return rates, [p.tolist() for p in model.parameters()]
    plain, accepted, changed = trained(), set(), set()
    for name, value in {**OTHER_VALUES, "gradient": "synthetic", "first": "synthetic"}.items():
        if base.get(name) != value and name not in given:
            if trained(**{name: value}) != plain:
                changed.add(name)
            with contextlib.suppress(command_line.UserError):
                command_line.check(dataclasses.replace(train.SMALL, **{**base, name: value}), [name])
                accepted.add(name)
    assert accepted == changed


def parsed(*arguments):
    """What train.py takes from its command line: (settings, out, resume)."""
    return command_line.parse(arguments, train.PRESETS, checkpoints.read_settings, train.__doc__)


def test_presets_are_the_papers():
    """For each corpus the paper preset has the sizes and regularisers of section 3. Eq. 1 has no alpha."""
    ptb, out, resume = parsed("--preset", "paper", "--data", "ptb")
    expected = dict(hidden_size=1550, embedding_size=400, num_layers=4, bptt=200, batch_size=20, epochs=320,
                    lr=1e-3, dropout_output=.4, dropout_hidden=.3, dropout_input=.4, dropout_embedding=.1,
                    dropout_weight=.1, activation=2, temporal=1, l2=1.2e-6, clip=.2, seed=42, e_base=5)
    assert {name: getattr(ptb, name) for name in expected} == expected
    assert ptb.dni_alpha == 1 and ptb.jitter
    model, _, _ = train.build(dataclasses.replace(ptb, hidden_size=9, embedding_size=7), 20, "cpu")
    sizes = [(layer.input_size, layer.hidden_size, layer.window) for layer in model.rnn.layers]
    assert sizes == [(7, 9, 2), (9, 9, 1), (9, 9, 1), (9, 7, 1)]
    wt2 = parsed("--preset", "paper", "--data", "wt2")[0]
    assert (wt2.dropout_hidden, wt2.clip) == (0.2, 0.25) and (out, resume) == (None, None)


def test_a_mode_has_its_recipe(capsys):
    """At preset small a constant rate is lower. It is a default: --help names it, a flag overrides it."""
    bptt, dni, restart, alternating = (parsed("--mode", mode, "--data", "ptb")[0].lr
                                       for mode in ("bptt", "dni", "restart", "alternating"))
    assert bptt == dni < restart == alternating == parsed()[0].lr
    assert parsed("--mode", "dni", "--lr", "0.5")[0] == dataclasses.replace(train.SMALL, mode="dni", lr=0.5)
    assert parsed("--data", "dni")[0].lr == train.SMALL.lr
    assert parsed("--preset", "paper", "--mode", "bptt")[0].lr == train.PAPER.lr
    with pytest.raises(SystemExit):
        parsed("--help")
    assert f"small --mode dni: --lr {dni}\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- 11. train.py as a program

TINY = ["--hidden-size", "12", "--embedding-size", "8", "--batch-size", "4", "--bptt", "10",
        "--valid-batch-size", "2", "--device", "cpu"]


@pytest.fixture
def corpus(tmp_path):
    """A folder with a tiny text: 41 words a line, 30 lines in train."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, n in (("train", 30), ("valid", 4), ("test", 4)):
        lines = [" ".join(f"w{(i * i + j) % 23}" for j in range(41)) + "\n" for i in range(n)]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def program(*arguments, processes=None):
    """What becomes of `python train.py ARGUMENTS`: in this process, or in as many of its own."""
    arguments = list(map(str, arguments))
    if not processes:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train.command(arguments)
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(HERE / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def log_of(folder):
    """A training's log.csv without its last column, the seconds."""
    return [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().split()]


@pytest.mark.parametrize("mode", [["bptt"], ["dni"], ["restart"], ["restart", "--gradient", "synthetic"],
                                  ["alternating"], ["alternating", "--dni", "layer"]], ids=" ".join)
def test_each_mode_trains_resumes_exactly_and_tests(mode, corpus, tmp_path):
    """Interrupted within an epoch and resumed, a training logs and tests as a straight one, bit for bit."""
    noise = [] if mode in (["bptt"], ["restart"]) else ["--dni-hidden", 5, "--dni-noise", 0.5]
    noise += {"dni": ["--dni-bptt", 3], "alternating": ["--e-base", 1]}.get(mode[0], [])
    arguments = ["--data", corpus, "--mode", *mode, *TINY, *noise, "--jitter", "--lr", "0.02"]
    straight = program(*arguments, "--epochs", 4, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    last = straight.stdout.strip().split("\n")[-1]
    assert re.fullmatch(r"test perplexity \d+\.\d\d", last)
    rows = [line.split(",") for line in log_of(tmp_path / "straight")[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    sources = {"alternating": "rssr", "dni": "rsss"}.get(mode[0], "rsss" if "synthetic" in mode else "rrrr")
    assert "".join(row[2][0] for row in rows) == sources
    assert (rows[2][6] != "nan") == (sources != "rrrr")                                   # a cosine is logged
    assert float(rows[-1][5]) < float(rows[0][5])                                                  # it learns

    for how, steps in ((arguments + ["--epochs", 4, "--out"], 45), (["--resume"], 0)):     # 31 or so an epoch
        resumed = program(*how, tmp_path / "half", "--max-steps", steps)
        assert resumed.returncode == 0, resumed.stderr
    assert log_of(tmp_path / "half") == log_of(tmp_path / "straight")
    assert resumed.stdout.strip().split("\n")[-1] == last
    weights = [torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("half", "straight")]
    assert all(torch.equal(a, b) for a, b in zip(*(w["model"].values() for w in weights)))


def test_validating_within_an_epoch_changes_nothing_else(corpus, tmp_path):
    """Rows between two epochs are what a training that stops there would log, also after a resumption."""
    arguments = ["--data", corpus, *TINY, "--lr", 0.02, "--epochs", 2]                     # of 32 steps
    for how, steps in ((arguments + ["--validate-every", 0.25, "--out"], 45), (["--resume"], 0)):
        assert program(*how, tmp_path / "often", "--max-steps", steps).returncode == 0
    assert program(*arguments, "--out", tmp_path / "plain").returncode == 0
    assert program(*arguments, "--max-steps", 40, "--out", tmp_path / "stopped").returncode == 0
    plain, often, stopped = (log_of(tmp_path / name) for name in ("plain", "often", "stopped"))
    assert len(often) == 1 + 8 and [often[0], often[4], often[8]] == plain
    assert [often[0], often[4], often[5]] == stopped
    assert float(often[5].split(",")[0]) == pytest.approx(1.25, abs=0.01)


def test_a_run_goes_on_in_another_folder(corpus, tmp_path):
    """--resume OLD --out NEW ends as a straight training does, and leaves OLD as it is."""
    old, new, straight = (tmp_path / name for name in ("old", "new", "straight"))
    assert program("--data", corpus, *TINY, "--epochs", 2, "--out", old).returncode == 0
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    assert program("--resume", old, "--epochs", 3, "--out", new).returncode == 0
    assert program("--data", corpus, *TINY, "--epochs", 3, "--out", straight).returncode == 0
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert log_of(new) == log_of(straight)
    tested = program("--resume", old, "--out", tmp_path / "tested")     # with no epoch left to do
    assert tested.returncode == 0 and "only tested" in tested.stdout
    assert (tmp_path / "tested" / "best.pt").read_bytes() == before["best.pt"]
    assert "already holds a training" in bad_input("--resume", old, "--epochs", 3, "--out", new)


GLOO = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")


@SLOW
@GLOO
def test_two_processes_are_one(corpus, tmp_path):
    """Without dropout, N processes do what one does, to float32 rounding.

    N is 2, then 1, then 2 again, each going on from the last. With dropout, each process has masks of its
    own, and the model is as good.
    """
    arguments = ["--data", corpus, *TINY, "--jitter", "--lr", "0.02", "--epochs", 4, "--precision", "fp32",
                 "--e-base", 1, "--dni-bptt", 2]
    no_dropout = [f"--dropout-{place}=0" for place in ("input", "hidden", "output")]
    for name, dropout in (("without", no_dropout), ("with", [])):
        one, run = tmp_path / f"{name}-one", tmp_path / name
        straight = program(*arguments, *dropout, "--out", one)
        assert straight.returncode == 0, straight.stderr
        begin, resume = [*arguments, *dropout, "--out"], ["--resume"]
        for processes, how, steps in ((2, begin, 45), (1, resume, 35), (2, resume, 0)):
            several = program(*how, run, "--max-steps", steps, processes=processes)
            assert several.returncode == 0, several.stderr
        weights, weights_one = (torch.load(f / "last.pt", weights_only=True) for f in (run, one))
        log, log_one = log_of(run), log_of(one)
        if name == "without":
            for line, line_one in zip(log[1:], log_one[1:], strict=True):
                assert line.split(",")[2] == line_one.split(",")[2]     # the source
                numbers, numbers_one = ([float(x) for i, x in enumerate(row.split(",")) if i != 2]
                                        for row in (line, line_one))
                assert numbers == pytest.approx(numbers_one, rel=1e-3, abs=2e-5)
            tested = [float(run.stdout.split()[-1]) for run in (several, straight)]
            assert tested[0] == pytest.approx(tested[1], abs=0.02)
            for part in ("model", "dni"):
                close(weights[part], weights_one[part], atol=2e-6, rtol=0)
            close(weights["divided"], weights_one["divided"], atol=1e-5, rtol=0)               # s_k and h_g
        else:
            assert log != log_one and len({tuple(own["cpu"].tolist()) for own in weights["random"]}) == 2
            valid, valid_one = (float(lines[-1].split(",")[5]) for lines in (log, log_one))
            assert valid == pytest.approx(valid_one, rel=0.15)             # another seed makes as much


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=[SLOW, GLOO])])
def test_how_often_is_saved_changes_nothing(processes, corpus, tmp_path):
    """Saved after each step, after none, or resumed: the sums of an epoch are the same to the last bit."""
    arguments = ["--data", corpus, *TINY, "--mode", "dni", "--lr", 0.02]
    for how in (["--checkpoint-every", 0, "--max-steps", 45, "--out", tmp_path / "often"],
                ["--checkpoint-every", 60, "--max-steps", 45, "--out", tmp_path / "never"],
                ["--checkpoint-every", 60, "--max-steps", 40, "--out", tmp_path / "resumed"],
                ["--resume", tmp_path / "resumed", "--max-steps", 5]):
        run = program(*(arguments if "--resume" not in how else []), *how, processes=processes)
        assert run.returncode == 0, run.stderr
    often, *others = (torch.load(tmp_path / name / "last.pt", weights_only=True)["sums"]
                      for name in ("often", "never", "resumed"))
    assert len(often) == (processes or 1)                               # own sums of every process
    for sums in others:
        close(sums, often, atol=0, rtol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(number, corpus, tmp_path, monkeypatch):
    """SIGINT and SIGTERM save within the epoch, and one line says how to go on.

    What goes on ends as a straight training does.
    """
    arguments = ["--data", corpus, *TINY, "--seed", 7, "--epochs", 3]
    straight, step, steps = program(*arguments, "--out", tmp_path / "straight"), train.train_step, []

    def interrupted(*a):
        steps.append(a)
        if len(steps) == 45:                                            # there are 32 in an epoch
            os.kill(os.getpid(), number)
        return step(*a)
    monkeypatch.setattr(train, "train_step", interrupted)
    run = program(*arguments, "--out", tmp_path / "run")
    assert run.returncode == 128 + number and not run.stderr and len(steps) == 45
    last = run.stdout.split("\n")[-2]
    assert last == f"interrupted after 41% of epoch 2; go on with --resume {tmp_path / 'run'}"
    place = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["place"]
    assert (place["epoch"], place["start"]) == (1, 130)
    resumed = program("--resume", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert log_of(tmp_path / "run") == log_of(tmp_path / "straight")
    assert resumed.stdout.split("\n")[-2] == straight.stdout.split("\n")[-2]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_second_signal_ends_the_run_at_once():
    """The first Ctrl-C is noted, for the loop to look at; the second has the effect it has elsewhere."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # in the background it may be ignored
    idle = keeper.Keeper(train.SMALL, train.Place(), {}, [], [], [], "cpu", 100, "")
    try:
        with pytest.raises(KeyboardInterrupt), idle:
            os.kill(os.getpid(), signal.SIGINT)
            assert idle.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            assert False
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("damage", ["nothing left", "half of it", "one bit", "gone"])
def test_a_damaged_checkpoint_is_not_used(damage, corpus, tmp_path):
    """Where the newest checkpoint is damaged, one line says so, and the one before leads to the same end.

    Where both are damaged, --resume is refused.
    """
    run, last = tmp_path / "run", tmp_path / "run" / "last.pt"
    assert program("--data", corpus, *TINY, "--epochs", 3, "--out", run).returncode == 0
    log, good = log_of(run), last.read_bytes()
    third = len(good) // 3
    spoilt = {"nothing left": b"", "half of it": good[:len(good) // 2], "gone": b"",
              "one bit": good[:third] + bytes([good[third] ^ 4]) + good[third + 1:]}[damage]
    last.write_bytes(spoilt)
    if damage == "gone":
        last.unlink()
    again = program("--resume", run)
    assert again.returncode == 0 and log_of(run) == log
    assert again.stderr.endswith(f"; going on from {run / 'previous.pt'}\n") and again.stderr.count("\n") == 1
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(spoilt)
    assert "cannot be read" in bad_input("--resume", run)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_harms_nothing(tmp_path, monkeypatch):
    """Where there is no room for the new file, the old one stays, and nothing is left beside it."""
    path = tmp_path / "last.pt"
    checkpoints.save({"settings": {}, "x": torch.ones(3)}, path)
    before, open_file = path.read_bytes(), open

    def open_full(name, *a, **k):
        return open_file("/dev/full" if str(name).endswith("partial") else name, *a, **k)
    monkeypatch.setattr("builtins.open", open_full)
    with pytest.raises((command_line.UserError, OSError), match="(?s)cannot be written|No space left"):
        checkpoints.save({"settings": {}, "x": torch.zeros(3)}, path)
    assert path.read_bytes() == before and checkpoints.read(path)["x"].sum() == 3
    monkeypatch.undo()
    with pytest.raises(OSError), checkpoints.replacing(path) as file:   # full when half of it is written
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@SLOW
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
def test_faults_are_survived():
    """The fast part of faults.py: three kills, every damage to a checkpoint, a full disk."""
    command = [sys.executable, str(HERE / "experiments" / "faults.py"), "--kills", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=800)
    not_survived = [line for line in run.stdout.split("\n") if "NOT SURVIVED" in line]
    assert run.returncode == 0, "\n".join(not_survived) + run.stderr


def test_a_run_cut_off_before_its_first_checkpoint_is_begun_again(corpus, tmp_path):
    """Where settings.json is all there is, --resume says so in one line and begins again.

    It ends as a training that was not cut off. Whatever else is damaged or lost is refused as before.
    """
    arguments = ["--data", corpus, *TINY, "--epochs", 2, "--lr", 0.01]
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert program(*arguments, "--out", straight).returncode == 0
    assert program(*arguments, "--out", run, "--max-steps", 3).returncode == 0
    for name in ("last.pt", "log.csv"):
        (run / name).unlink()
    settings = (run / "settings.json").read_text()
    many = settings.replace('"hidden_size": 12', '"hidden_size": "many"')
    for text in ("", "[1]", "{}", many, settings.replace("seed", "sad")):
        (run / "settings.json").write_text(text)
        assert "settings.json cannot be read" in bad_input("--resume", run)
    (run / "settings.json").write_text(settings)
    assert "--hidden-size (was 12, now 13)" in bad_input("--resume", run, "--hidden-size", 13)
    again = program("--resume", run, "--max-steps", 0)
    said = f"train.py: {run} was cut off before its first checkpoint; starting it from the beginning\n"
    assert again.returncode == 0 and again.stderr == said
    assert log_of(run) == log_of(straight)
    for name in ("last.pt", "previous.pt"):                # a log without a checkpoint: not cut off, but lost
        (run / name).unlink(missing_ok=True)
    assert "nothing to resume" in bad_input("--resume", run)


def test_max_steps_ends_a_training_where_it_says(corpus, tmp_path):
    """After 5, 32 (a whole epoch) and 40 steps, with the epoch under way logged and not counted as done."""
    arguments = ["--data", corpus, *TINY, "--epochs", 3, "--lr", 0.01]
    for steps, rows, epochs, start in ((5, 1, 0, 50), (32, 1, 1, 0), (40, 2, 1, 80)):
        out = tmp_path / str(steps)
        assert program(*arguments, "--max-steps", steps, "--out", out).returncode == 0
        place = torch.load(out / "last.pt", weights_only=True)["place"]
        assert len(log_of(out)) == 1 + rows and (place["epoch"], place["start"]) == (epochs, start)


def test_the_best_model_is_the_first_of_equals(corpus, tmp_path, monkeypatch):
    """Where a later epoch validates as well as the best, best.pt stays what it is."""
    monkeypatch.setattr(train, "evaluate", lambda *_: 2.0)
    assert program("--data", corpus, *TINY, "--epochs", 3, "--out", tmp_path / "r").returncode == 0
    assert torch.load(tmp_path / "r" / "best.pt", weights_only=True)["epoch"] == 1


def test_sampling_is_without_dropout_and_leaves_the_model_as_it_was():
    """Sentences have the probabilities of evaluation. The model is in training before and after."""
    model = LanguageModel(13, 4, 6, 2, dropout_output=0.9, dropout_input=0.9)
    words = ["<eos>", *"abcdefghijkl"]
    torch.manual_seed(5)
    sampled = keeper.sample(model.train(), words, sentences=2, longest=9)
    assert model.training and not LanguageModel(13, 4, 6, 2).eval().training
    torch.manual_seed(5)
    token, state, expected = torch.zeros(1, 1, dtype=torch.int64), None, []
    with torch.no_grad():
        for _ in range(2):
            sentence = []
            while len(sentence) < 9:
                logits, state = copy.deepcopy(model).eval()(token, state)
                token = torch.distributions.Categorical(logits=logits[-1]).sample()[None]
                if token == 0:
                    break
                sentence.append(words[token])
            expected.append(" ".join(sentence))
    assert sampled == expected and any(sampled)


def test_two_runs_do_not_share_a_folder(corpus, tmp_path):
    """While one training holds a folder, another that would resume it is refused. When it ends, it may."""
    assert program("--data", corpus, *TINY, "--epochs", 1, "--out", tmp_path).returncode == 0
    held = checkpoints.lock(tmp_path)
    assert "another training is at work" in bad_input("--resume", tmp_path, "--epochs", 2)
    held.close()
    assert program("--resume", tmp_path, "--epochs", 2).returncode == 0


def test_the_best_model_is_the_one_tested(corpus, tmp_path):
    """Where validation gets worse again, the test perplexity printed is the best epoch's, evaluated anew.

    The validation perplexity in the log is that of --valid-batch-size streams; the test text is one stream.
    """
    for split in ("valid", "test"):                                     # a text that train says nothing about
        (corpus / f"{split}.txt").write_text("".join(f"w{(7 * i * i + i // 3) % 23} " for i in range(300)))
    run = program("--data", corpus, "--mode", "bptt", *TINY, "--lr", 0.03, "--epochs", 6,
                  "--precision", "fp32", "--out", tmp_path / "r")
    valid = [float(line.split(",")[5]) for line in log_of(tmp_path / "r")[1:]]
    best = torch.load(tmp_path / "r" / "best.pt", weights_only=True)
    assert best["epoch"] == 1 + valid.index(min(valid)) < 6
    text = data.load_corpus(str(corpus))
    model, _, _ = train.build(train.Settings(**best["settings"]), len(text.vocabulary), "cpu")
    model.load_state_dict(best["model"])
    tested = math.exp(train.evaluate(model, text.test, 1))
    assert run.stdout.rstrip().endswith(f"test perplexity {tested:.2f}")
    in_streams = [round(math.exp(train.evaluate(model, text.valid, B)), 3) for B in (1, 2)]       # TINY has 2
    assert min(valid) == in_streams[1] != in_streams[0]


def test_recall_runs_and_prints_its_floor(tmp_path):
    """The floor stands in the output, beside what was reached. The delay is above the length of a chunk."""
    arguments = ["--data", "recall", "--mode", "dni", *TINY, "--max-steps", 3]
    run = program(*arguments, "--out", tmp_path / "r")
    floor = data.recall(delay=20).facts["perplexity floor"]
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().split("\n")[-4] == f"perplexity floor {floor:.4f}"


def bad_input(*arguments):
    """Run train.py's command; assert one line on stderr, status 2, before any work; return the line."""
    run = program(*arguments)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("train.py: error: ") and "epoch" not in run.stdout
    return run.stderr


@pytest.mark.parametrize("flag, value", [
    ("--hidden-size", "-3"), ("--epochs", "0"), ("--num-layers", "0"), ("--window", "0"), ("--bptt", "0"),
    ("--batch-size", "0"), ("--dropout-input", "1"), ("--dropout-output", "-0.1"), ("--zoneout", "1.5"),
    ("--dropout-weight", "nan"), ("--e-base", "0"), ("--e-base", "nan"), ("--lr", "0"),
    ("--lr", "inf"), ("--clip", "-1"), ("--dni-alpha", "-1"), ("--dni-hidden", "0"), ("--seed", "-1"),
    ("--seed", 2 ** 63), ("--max-steps", "-1"), ("--eta-min", "-1"), ("--eta-min", ""), ("--restarts", "0"),
    ("--restarts", "3 2"), ("--mode", "magic"), ("--data", "klingon"), ("--valid-batch-size", "0"),
    ("--validate-every", "1.5"), ("--checkpoint-every", "-1"),
    ("--epochs", "ten"), ("--colour", "red"), ("--data", "/"), ("--beta2", "1")])
def test_impossible_settings(flag, value):
    """Each ends in one line that names the flag or the value, and status 2."""
    assert (value if flag == "--data" else flag) in bad_input(flag, *str(value).split())


@pytest.mark.parametrize("arguments, flag", [
    ("--mode bptt --dni-alpha 0.5", "--dni-alpha"), ("--data pydoc --data-dir x", "--data-dir"),
    ("--eta-min 1", "--eta-min"), ("--eta-max 1e-3 1e-4 --eta-min 2e-4", "run 1")])
def test_settings_that_contradict_each_other(arguments, flag):
    """A setting that would silently do nothing, or turn the schedule upside down, is refused."""
    assert flag in bad_input(*arguments.split())


def test_bad_files_and_folders(corpus, tmp_path):
    """Missing, empty, non-UTF-8 and too short texts, folders in use, and devices that are not there."""
    for device in ("cuda", "mps"):
        if not {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
            assert f"--device {device}" in bad_input("--device", device)
    assert "less than one chunk of 400" in bad_input("--data", corpus, "--bptt", "400")
    assert "too few for 5000 streams" in bad_input("--data", corpus, *TINY, "--valid-batch-size", "5000")
    in_use = tmp_path / "used"
    in_use.mkdir()
    (in_use / "log.csv").write_text("precious")
    assert "already holds a training" in bad_input("--data", corpus, *TINY, "--out", in_use)
    assert (in_use / "log.csv").read_text() == "precious"
    assert bad_input("--data", corpus, *TINY, "--out", corpus / "train.txt" / "run")
    assert "nothing to resume" in bad_input("--resume", tmp_path / "nowhere")
    (corpus / "valid.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8" in bad_input("--data", corpus)
    (corpus / "valid.txt").write_bytes(b"\n\n")
    assert "holds no words" in bad_input("--data", corpus)
    (corpus / "valid.txt").unlink()
    assert "no valid.txt" in bad_input("--data", corpus)


def test_a_dead_network(tmp_path, monkeypatch):
    """Without file and network one line names the address and the file's place. The folder stays empty."""
    monkeypatch.setitem(data.DOWNLOADS, "ptb", ("http://127.0.0.1:9/{split}", data.DOWNLOADS["ptb"][1]))
    message = bad_input("--data", "ptb", "--data-dir", tmp_path)
    assert "127.0.0.1:9" in message and str(tmp_path / "ptb" / "train.txt") in message
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(corpus, tmp_path):
    """--resume refuses other settings, another corpus, a damaged file and pickled code; nothing is lost."""
    run = tmp_path / "run"
    first = program("--data", corpus, *TINY, "--epochs", 1, "--out", run)
    whole = (run / "log.csv").read_bytes()
    (run / "log.csv").unlink()
    again = program("--resume", run)                              # all epochs are done: only the test is left
    assert (run / "log.csv").read_bytes() == whole
    assert first.returncode == again.returncode == 0 and "has done its 1 epochs" in again.stdout
    assert first.stdout.split("\n")[-2] == again.stdout.split("\n")[-2]
    assert "--hidden-size (was 12, now 13)" in bad_input("--resume", run, "--hidden-size", 13)
    assert "leave --preset" in bad_input("--resume", run, "--preset", "small")
    log, good = (run / "log.csv").read_bytes(), (run / "last.pt").read_bytes()
    text = (corpus / "train.txt").read_text()
    for other in (text + "one two three\n", text.replace("w1 ", "w99 ")):          # the second: as many words
        (corpus / "train.txt").write_text(other)
        assert "another text" in bad_input("--resume", run, "--epochs", 2)
    (corpus / "train.txt").write_text(text)
    class Code:                                                         # pickled: it makes a folder
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    torch.save({**checkpoint, "model": {"embedding.weight": torch.zeros(2, 2)}}, run / "last.pt")
    assert "another model" in bad_input("--resume", run, "--epochs", 2)
    torch.save({**checkpoint, "epoch": Code()}, run / "last.pt")
    assert "cannot be read" in bad_input("--resume", run, "--epochs", 2)
    assert not (tmp_path / "executed").exists()
    torch.save({**checkpoint, "settings": {**checkpoint["settings"], "seed": 8}}, run / "last.pt")
    assert "of another training" in bad_input("--resume", run, "--epochs", 2)
    torch.save([1, 2], run / "last.pt")
    assert "not a checkpoint" in bad_input("--resume", run, "--epochs", 2)
    for damaged in (good[:100], b""):
        (run / "last.pt").write_bytes(damaged)
        assert "cannot be read as a checkpoint" in bad_input("--resume", run, "--epochs", 2)
    assert (run / "log.csv").read_bytes() == log


def test_output_folders_are_never_overwritten(tmp_path, monkeypatch):
    """Without --out each training gets a folder of its own."""
    monkeypatch.chdir(tmp_path)
    folders = [checkpoints.output_folder(None, "pydoc-alternating") for _ in range(3)]
    names = ["pydoc-alternating", "pydoc-alternating-2", "pydoc-alternating-3"]
    assert list(map(str, folders)) == [str(Path("trainings") / name) for name in names]


@pytest.fixture
def studies(monkeypatch):
    """The modules of experiments/, by name."""
    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    return importlib.import_module


@pytest.mark.parametrize("answers", [False, True])
def test_the_true_future_gradient_of_recall(studies, answers):
    """recall.py's true gradient of s_k is the gradient of all losses after border k that count.

    The text is read on from s_k in one piece.
    """
    recall = studies("recall")
    (inputs, targets), model, T = recall.episodes(1, 0, 4, 240, answers), recall.Reader(13), recall.T
    every_target, counts = recall.episodes(1, 0, 4, 240)[1], (inputs == 12) | (not answers)
    assert torch.equal(targets == every_target, counts)
    assert 0.07 < (inputs == 12).double().mean() < 0.09                 # once in 12

    def oracle(state, memory):
        k = (memory or 0) + 1
        leaf = [(state[0].detach().requires_grad_(), torch.zeros(0, 4, recall.NEURONS))]
        with torch.enable_grad():
            logits, _ = model(inputs[k * T:], leaf)
            log_p = logits.log_softmax(-1).gather(-1, every_target[k * T:, :, None])[..., 0]
            future = -(log_p * counts[k * T:]).sum()
            return [torch.autograd.grad(future, leaf[0][0])[0]], k

    def reversed_oracle(*a):
        [gradient], k = oracle(*a)
        return [-2 * gradient], k
    assert recall.truth(model, oracle, inputs, targets) == pytest.approx((1, 1), abs=1e-5)
    assert recall.truth(model, reversed_oracle, inputs, targets) == pytest.approx((-1, -8), abs=1e-4)


def test_the_episodes_of_recall(studies):
    """In every stream b T steps lie between symbol and query. All phases occur; no two streams are equal."""
    recall = studies("recall")
    for b in (1, 2, 3):
        period, n = b * recall.T + 2, 3 * (b * recall.T + 2)
        inputs, targets = recall.episodes(b, 0, n, 2 * period)
        assert torch.equal(inputs[1:], targets[:-1])
        t, stream = (inputs == recall.SYMBOLS + recall.FILLERS)[period:].nonzero().unbind(1)     # the queries
        assert sorted(stream.tolist()) == list(range(n)) and t.bincount().tolist() == [3] * period
        symbol = inputs[period + t - b * recall.T, stream]
        assert torch.equal(symbol, targets[period + t, stream])
        assert (symbol < recall.SYMBOLS).all() and len(symbol.unique()) == 4
        assert len({tuple(column) for column in inputs.t().tolist()}) == n
        query = inputs == recall.QUERY
        assert torch.equal(query[:, period:], query[:, :-period])       # streams a period apart: pairs


@pytest.mark.parametrize("name", ["recall", "text"])
def test_a_longer_reach(name, studies):
    """Arms `full` and `twice`: the gradient of the last chunk's loss alone, through all the chunks before it.

    It enters with the state before the first of them. With one chunk it is a BPTT step.
    """
    T, clip, tokens = 5, 0.5, torch.randint(7, (16, 4))
    chunks = [(tokens[k * T:][:T], tokens[k * T + 1:][:T]) for k in range(3)]
    for n in (1, 3):
        weights = []
        for form in ("full", "by hand"):
            torch.manual_seed(3)
            model = studies(name).Reader(7)
            c, x_prev = model.rnn.layers[0].zero_state(torch.zeros(T, 4, 1))
            state, optimizer = [(torch.randn_like(c), x_prev)], torch.optim.SGD(model.parameters(), 1.0)
            if form == "full":
                recent = [(x, y, before) for (x, y), before in zip(chunks[:n], (state, None, None))]
                studies("recall").full_update(model, optimizer, recent, clip)
            else:
                for x, y in chunks[:n]:
                    loss, _, state = model.loss(x, y, state)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            weights.append([p.detach() for p in model.parameters()])
        close(*weights)


def test_a_named_g_knows_which_neuron_it_sees(studies):
    """A neuron is known by its name and not by its place. Without names g is the plain one."""
    recall = studies("recall")
    torch.manual_seed(0)
    plain, named, memory = NeuronDNI(last_layer=0.5), recall.Named(), None
    named.load_state_dict(plain.state_dict(), strict=False)
    for _ in range(4):
        s = [torch.randn(4, recall.NEURONS)]
        before, (expected, memory) = memory, plain(s, memory)
    flip = [s[0].flip(1)]
    (c,), (flipped,) = named(s)[0], named(flip)[0]
    assert not torch.allclose(flipped, c.flip(1))
    named.names.data = named.names.data.flip(0)
    close(named(flip)[0][0], c.flip(1))
    torch.nn.init.zeros_(named.names)
    close(named(s, before)[0][0], expected[0])


def test_truncated_credit_never_reaches_a_symbol(studies):
    """With the answers alone counted, no gradient within a chunk reaches the embedding of a symbol.

    One synthetic gradient does.
    """
    recall = studies("recall")
    for b in (1, 2, 3):
        inputs, targets = recall.episodes(b, 0, 2 * (b * recall.T + 2), 6 * recall.T, answers=True)
        model, state, reached = recall.Reader(13), None, 0
        for x, y in zip(inputs.split(recall.T), targets.split(recall.T)):
            model.zero_grad()
            loss, _, new_state = model.loss(x, y, state)
            loss.backward(retain_graph=True)
            gradient = model.embedding.weight.grad
            assert gradient[:recall.SYMBOLS].count_nonzero() == 0
            assert gradient[recall.SYMBOLS:].count_nonzero() > 0
            sum(c.sum() for c, _ in new_state).backward()
            reached += model.embedding.weight.grad[:recall.SYMBOLS].count_nonzero()
            state = train.cut(new_state)
        assert reached > 0


def test_the_rate_of_recall_is_searched_on_seeds_of_its_own(studies):
    """The best rate is by accuracy at the end over the seeds of the search, whatever other seeds say."""
    recall = studies("recall")

    def row(rate, seed, accuracy, updates=recall.UPDATES, counts="all", arm="linear", borders="2"):
        return dict(counts=counts, arm=arm, rate=rate, borders=borders, seed=str(seed), updates=str(updates),
                    accuracy=str(accuracy))
    rows = [row("0.1", 100, 0.5), row("0.1", 101, 0.6), row("0.01", 100, 0.7), row("0.01", 101, 0.2),
            row("0.01", 100, 1.0, updates=200), row("0.01", 0, 1.0), row("0.01", 101, 1.0, counts="answers"),
            row("0.01", 101, 1.0, arm="layer"), row("0.01", 101, 1.0, borders="1")]
    assert recall.best_rate(rows, "all", "linear", 2) == 0.1
    assert recall.best_rate(rows, "all", "linear", 1) == 0.01
    assert recall.best_rate(rows, "all", "bptt", 2) == ""


def test_two_ways_to_teach_g_through_four_borders(studies):
    """text.py's `every4`: one step on the mean of the errors of four borders, through one graph of them."""
    text = studies("text")
    states, targets = torch.randn(8, 3, text.HIDDEN), torch.randn(8, 3, text.HIDDEN)
    torch.manual_seed(0)
    g = NeuronDNI(5, last_layer=0.5)
    by_hand, memory = copy.deepcopy(g), None
    dni, optimizer = text.Every(g, torch.optim.SGD(g.parameters(), 1.0), 1.0, 4), torch.optim.SGD(
        by_hand.parameters(), 1.0)
    for k, (c, d) in enumerate(zip(states, targets)):
        s = [c.clone().requires_grad_()]
        dni.credit(s, [s[0] * 1.0], tokens=2, inject=False)
        s[0].grad = d / 2                                               # of a mean over 2 tokens
        before = [p.clone() for p in g.parameters()]
        dni.learn()
        assert (k % 4 == 3) == any(not torch.equal(a, b) for a, b in zip(before, g.parameters()))
    for four in range(2):
        errors = []
        for c, d in list(zip(states, targets))[4 * four:4 * four + 4]:
            (predicted,), memory = by_hand([c], memory)
            errors.append((predicted - d).square().mean())
        optimizer.zero_grad()
        torch.stack(errors).mean().backward()
        optimizer.step()
        memory = tuple(m.detach() for m in memory)
    close([p.detach() for p in g.parameters()], [p.detach() for p in by_hand.parameters()])


def test_each_arm_of_text_is_what_it_is_called(studies, monkeypatch):
    """text.py with α = 0 is truncated BPTT, to the last digit. α, g's rate, K, the kind of g and the longer
    reach each change the result.
    """
    text = studies("text")
    corpus = types.SimpleNamespace(train=torch.arange(32 * 101) ** 2 % 17, valid=torch.arange(500) ** 2 % 17,
                                   vocabulary=range(17))
    monkeypatch.setattr(data, "load_corpus", lambda name: corpus)
    monkeypatch.setattr(text, "UPDATES", {2: 20})
    monkeypatch.setattr(text, "HIDDEN", 8)

    def bits(arm, alpha="", rate=""):
        rows = text.one(dict(arm=arm, T=2, alpha=alpha, rate=rate, seed=3))
        assert [row["updates"] for row in rows] == list(range(2, 21, 2))
        return [row["bits"] for row in rows]
    bptt = bits("bptt")
    assert bits("linear", 0.0, 0.1) == bptt and bits("neuron", 0.0, 0.1) == bptt
    different = [bptt, bits("full"), bits("twice"), bits("linear", 1.0, 0.1), bits("linear", 0.5, 0.1),
                 bits("linear", 1.0, 0.05), bits("mlp", 1.0, 0.1), bits("line", 1.0, 0.1),
                 bits("constant", 1.0, 0.1),
                 bits("neuron", 1.0, 0.1), bits("neuron4", 1.0, 0.1), bits("every4", 1.0, 0.1)]
    assert len(set(map(tuple, different))) == len(different)


def test_the_best_rate_of_text(studies):
    """text.py takes along the rate with the fewest bits at T = 2 and 5 together: at the end, α 1, seed 0."""
    text = studies("text")

    def row(rate, T, bits, updates=None, alpha="1.0", seed="0", arm="linear"):
        return dict(arm=arm, T=T, alpha=alpha, rate=rate, seed=seed, bits=bits,
                    updates=str(updates or text.UPDATES[int(T)]))
    rows = [row("0.1", "2", "2.5"), row("0.1", "5", "2.5"), row("0.01", "2", "2.3"), row("0.01", "5", "2.6"),
            row("0.01", "5", "1.0", updates=10), row("0.1", "2", "1.0", seed="1"),
            row("1.0", "2", "1.0"), row("0.2", "2", "1.0", alpha="0.9"), row("0.2", "5", "1.0", alpha="0.9"),
            row("", "2", "1.0", arm="bptt"), row("", "5", "1.0", arm="bptt"),
            row("0.01", "10", "9.0"), row("0.01", "20", "9.0")]
    assert text.best_rates(rows) == {"linear": 0.01}
    cases = text.cases("T", {"linear": 0.01})
    assert {c["rate"] for c in cases if c["arm"] == "linear"} == {0.01}
    assert {(c["T"], c["seed"]) for c in cases if c["arm"] == "bptt"} == set(
        itertools.product(text.UPDATES, range(1, 6)))


def test_what_can_be_known_is_learned(studies, monkeypatch):
    """taught.py, with c^2 as the gradient: the neuron-wise g knows it unseen, and g(c) = w c does not."""
    recall, taught = studies("recall"), studies("taught")
    monkeypatch.setattr(recall, "future_gradients", lambda model, x, y: [
        ([c], [c * c]) for c in torch.randn(12, 8, recall.NEURONS)])
    monkeypatch.setattr(taught, "KINDS", {name: taught.KINDS[name] for name in ("line", "neuron")})
    rows = {row["arm"]: row for row in taught.one(dict(loss="all", updates=2, borders=1, seed=0), texts=40)}
    assert abs(rows["line"]["cosine"]) < 0.1 and rows["neuron"]["r2"] > 0.9
    table = studies("report").taught([{name: str(x) for name, x in row.items()} for row in rows.values()])
    assert "|neuron-wise DNI|{r2:.2f}, {cosine:.2f}|".format(**rows["neuron"]) in table


def test_what_can_be_known_of_text_is_learned(studies, monkeypatch):
    """The same on text. The texts follow one another, from where the model has stopped to read."""
    recall, taught, text = studies("recall"), studies("taught"), studies("text")
    read, passed = [], torch.randn(12, 8, text.HIDDEN)
    corpus = types.SimpleNamespace(train=torch.arange(32 * 4001) % 4001, vocabulary=range(4001))
    monkeypatch.setattr(data, "load_corpus", lambda name: corpus)

    def future_gradients(model, x, y, T):
        assert T == 2 and torch.equal((x + 1) % 4001, y)
        read.extend(x[:, 0].tolist())
        return [([c], [7 * c * c]) for c in passed[torch.randperm(12)]]
    monkeypatch.setattr(recall, "future_gradients", future_gradients)
    for arm, known in (("neuron", True), ("line", False)):
        rows = taught.one_of_text(dict(arm=arm, rate=3e-3, seed=0), updates=2, counts=(5, 20))
        assert [row["borders"] for row in rows] == [5 * 9 * 32, 20 * 9 * 32]
        assert (rows[-1]["r2"] > 0.8) == known, (arm, rows)
    assert read == 2 * list(range(4, 4 + 20 * 160))


def test_the_search_trains_what_it_says(studies):
    """Each case is a command that train.py understands; `cosine` is one run of SGDR over all epochs.

    A shorter training restarts at the same share of it as preset small. On PTB at scale small reproduce.py
    trains the recipes.
    """
    search, reproduce = studies("search"), studies("reproduce")
    for case in search.CASES:
        s, _, _ = parsed(*map(str, search.arguments(case)))
        assert (s.data, s.epochs, s.seed) == (case["data"], case["epochs"], case["seed"])
        assert all(getattr(s, name) == case[name] for name in search.SHARED)
        assert s.eta_max == tuple(map(float, case["eta_max"].split())) and (s.eta_max or s.lr == case["lr"])
        assert s.mode not in train.SGDR_MODES or s.e_base == (case["e_base"] or case["epochs"])
    falling = search.case("restart", "", e_base=0.7, eta_max="0.01 0.005")
    s, _, _ = parsed(*map(str, search.arguments(falling)))
    assert (s.e_base, s.eta_max) == (0.7, (0.01, 0.005))
    for method, mode in reproduce.METHODS.items():
        s, _, _ = parsed(*map(str, reproduce.arguments("small", "ptb", method, 5)))
        whole, _, _ = parsed(*map(str, reproduce.arguments("small", "ptb", method, 15)))
        plain, _, _ = parsed(*mode, "--data", "ptb")
        assert whole == (dataclasses.replace(plain, e_base=15.0) if method == "cosine" else plain)
        if s.mode in train.SGDR_MODES:
            assert [run_at(5 * x, s.e_base).index for x in (0.0, 0.4, 0.99)] == (
                [run_at(15 * x, whole.e_base).index for x in (0.0, 0.4, 0.99)])
        if train.uses_synthetic(s) and s.mode != "alternating":
            assert s.dni_warmup == pytest.approx(whole.dni_warmup / 3, abs=1e-4)
        s, _, _ = parsed(*map(str, reproduce.arguments("paper", "wt2", method, 320)))
        assert s.epochs == 320 and s.hidden_size == 1550 and s.clip == 0.25
        assert method == "cosine" or s.e_base == 5


def test_the_recipe_is_what_the_search_found(studies):
    """A method's rate is that with the best validation text, of the longest trainings at several rates.

    Where there are several seeds, their mean counts.
    """
    search, reproduce, study = studies("search"), studies("reproduce"), studies("study")
    log, judged = study.read(study.LOGS / "search.csv"), set()
    for method in reproduce.METHODS:
        for epochs in (15, 5):
            s = reproduce.settings(reproduce.arguments("small", "ptb", method, epochs))
            usual = dict(data="ptb", method=method, epochs=epochs, eta_max="", e_base=s.e_base,
                         **{name: getattr(s, name) for name in search.SHARED})
            if method in ("bptt", "dni", "cosine"):
                usual["e_base"] = ""
            best = {}
            for row in log:
                if all(row[name] == str(value) for name, value in usual.items()):
                    valid = float(row["valid_perplexity"])
                    its = best.setdefault(float(row["lr"]), {})
                    its[row["seed"]] = min(valid, its.get(row["seed"], math.inf))
            best = {rate: statistics.mean(its.values()) for rate, its in best.items()}
            if len(best) > 1:
                assert best.get(s.lr) == min(best.values()), (method, epochs, best)      # two may be as good
                judged.add(method)
                break
    assert judged == set(reproduce.METHODS)


@pytest.mark.parametrize("method, seed", [("bptt", "42"), ("restart", "42"),
                                          ("cosine", "42"), ("cosine", "43"), ("cosine", "44")])
def test_a_whole_training_of_the_search_counts(method, seed, studies):
    """Where search.csv has a training with the method's recipe, the methods' log has the same."""
    search, reproduce, study = studies("search"), studies("reproduce"), studies("study")
    s = reproduce.settings(reproduce.arguments("small", "ptb", method, 15))
    recipe = dict(data="ptb", method=method, epochs=15, lr=s.lr, seed=seed,
                  e_base=s.e_base if method == "restart" else "",
                  **{name: getattr(s, name) for name in search.SHARED})
    ours = [row for row in study.read(study.LOGS / "methods-small-ptb.csv")
            if (row["method"], row["seed"]) == (method, seed) and float(row["epoch"]).is_integer()]
    theirs = [row for row in study.read(study.LOGS / "search.csv")
              if all(row[name] == str(value) for name, value in recipe.items())]
    assert len(ours) == 15 and ours == [{name: row[name] for name in ours[0]} for row in theirs]


def test_a_log_holds_one_recipe(studies, tmp_path, monkeypatch):
    """A study does not go on with a log whose recipe was another one. What a log does not tell may be new."""
    study, log = studies("study"), tmp_path / "methods.csv"
    study.write(log, [{"case": "1"}])
    log.with_suffix(".json").write_text('[{"bptt": "lr 1"}]')
    monkeypatch.setattr(sys, "argv", [HERE / "experiments" / "reproduce.py"])
    study.run(log, None, [{"case": 1}], 1, bptt="lr 1", dni="lr 2")
    with pytest.raises(SystemExit, match="bptt lr 1, now lr 3: move it away"):
        study.run(log, None, [{"case": 1}], 1, bptt="lr 3")


@SLOW
def test_a_study_goes_on_and_reports(studies, tmp_path):
    """A study does each case once, whatever it is called for again, and its report is made of its log."""
    log = tmp_path / "recall.csv"
    options = "--seeds 1 --borders 1 --rates 0.1 --counts all --updates 12 --log".split()
    for arms, todo in ((["bptt", "layer"], 2), (["layer", "neuron", "bptt"], 1)):
        command = [sys.executable, HERE / "experiments" / "recall.py", "--arms", *arms, *options, log]
        run = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0 and f"{todo} runs to do" in run.stdout, run.stderr
    rows = studies("study").read(log)
    assert [row["updates"] for row in rows if row["arm"] == "neuron"] == [str(n) for n in range(1, 13)]
    table = studies("report").recall(rows)
    accuracy = next(float(row["accuracy"]) for row in rows if (row["arm"], row["updates"]) == ("layer", "12"))
    assert f"|all|layer-wise DNI|{accuracy:.2f} [{accuracy:.2f}, {accuracy:.2f}], 0/1 (rate 0.1)|" in table


@SLOW
def test_a_study_does_not_mix_runs(studies, corpus, tmp_path):
    """A training that an earlier study left behind is gone on with, but not under another setting."""
    train_run = studies("study").train_run
    arguments, folder = ["--data", corpus, "--mode", "bptt", *TINY, "--epochs", 1], tmp_path / "run"
    row, = train_run({"case": 1}, arguments, folder)
    assert train_run({"case": 1}, arguments, folder) == [row]
    assert row["case"] == 1 and float(row["test_perplexity"]) > 1
    with pytest.raises(RuntimeError, match="--lr"):
        train_run({"case": 1}, [*arguments, "--lr", 0.01], folder)


def test_results_are_what_the_logs_say(studies):
    """experiments/results.md and README's table are what report.py makes of the logs, to the letter."""
    report, study = studies("report"), studies("study")
    logs = {name: study.read(study.LOGS / f"{name}.csv") for name in report.LOGS}
    assert (HERE / "experiments" / "results.md").read_text() == report.results(logs)
    tables = report.readme_tables(logs)
    assert report.with_tables(README, tables) == README and all(table in README for table in tables.values())


def test_the_tables_say_what_a_hand_would(studies):
    """The rate of a g is the one the search found best. Differences are within a seed. A gap is named.

    The best validation is that of a model that can be tested, at an epoch's end: not the 1 in its middle.
    """
    report = studies("report")
    case = {name: str(value) for name, value in studies("search").case("cosine", 0.1, bptt=35).items()}
    rows = [dict(case, valid_perplexity=valid, train_perplexity=train)
            for valid, train in (("9", "7"), ("7.126", "6"), ("8", "5"))]
    line = "|ptb|5|BPTT, one cosine|0.1|bptt 35|7.13|6.00|"
    assert line in report.searched(rows)
    rows = [dict(counts="all", arm="layer", borders="1", rate=rate, seed=seed, updates="2400",
                 accuracy=accuracy, true_cosine="0", target_r2="0")
            for rate, seed, accuracy in (("0.1", "100", "0.3"), ("0.01", "100", "0.8"), ("0.01", "0", "0.5"),
                                         ("0.1", "0", "0.4"), ("0.01", "1", "0.95"))]
    text = report.recall(rows)
    assert "|all|layer-wise DNI|0.72 [0.61, 0.84], 1/2 (rate 0.01)|" in text       # the rate of the search
    assert "|all|layer-wise DNI|1|0.1|0.40 [0.40, 0.40], 0/1|" in text             # another rate
    assert "|all|layer-wise DNI|1|0.30|0.80|" in text                              # the search

    def training(method, seed, valid, tested):
        return [dict(data="ptb", method=method, seed=seed, epoch=epoch, valid_perplexity=str(v),
                     test_perplexity=str(tested), seconds="90")
                for epoch, v in zip(("0.500001", "1", "2"), (1, *valid))]
    rows = [*training("bptt", "1", [6, 8], 9.0), *training("bptt", "2", [5, 4], 11.0),
            *training("dni", "1", [4, 8], 1.0), *training("dni", "2", [2, 2], 0.5)]
    text = report.methods([rows, [], []])
    assert "|truncated BPTT|62.78|2|10.00 ± 1.41||5.00 ± 1.41|2|" in text
    assert "|neuron-wise DNI|62.42|2|0.75 ± 0.35|truncated BPTT: -9.25 ± 1.77|3.00 ± 1.41|2|" in text
    table = report.methods_table(rows, report.having(rows, seed="2"))
    assert "|truncated BPTT|62.78|72.6|10.00 ± 1.41||2|11.00|" in table
    assert "|neuron-wise DNI|62.42|72.37|0.75 ± 0.35|-9.25 ± 1.77 from truncated BPTT|2|0.50|" in table
    assert "|alternating|63.76|73.35|-||-|-|" in table
    bits = {("bptt", "", "0"): 3.1, ("full", "", "0"): 2.1, ("linear", "0.1", "0"): 2.5,
            ("bptt", "", "1"): 3.0, ("full", "", "1"): 2.0, ("linear", "0.1", "1"): 2.5,
            ("bptt", "", "2"): 3.5, ("full", "", "2"): 2.5, ("linear", "0.1", "2"): 2.7,
            ("linear", "0.1", "3"): 2.6}
    rows = [dict(arm=arm, T=T, alpha=rate and "1.0", rate=rate, seed=seed, updates=updates, bits=str(end),
                 cosine="0.5", r2="0.25") for (arm, rate, seed), end in bits.items()
            for T, updates in (("2", "10000"), ("5", "8000"))]
    text = report.characters(rows)
    line = "|2|layer-wise, one linear map|0.1|3|2.600 ± 0.100|0.650 ± 0.212|0.65 ± 0.21|"
    assert line in text
    assert "|layer-wise, one linear map|2.500 (+0.250)|" in text
    assert report.results({name: [] for name in report.LOGS}).count("Not run yet.") == 7


def test_the_house():
    """harness/ imports only torch and the standard library. Paper files import neither it nor train.py."""
    below = {"qrnn": set(), "sgdr": set(), "data": set(), "dni": {"qrnn"}}
    below["train"] = {*below, "harness"}
    free = {*sys.stdlib_module_names, "torch", "numpy", "triton"}       # triton comes with torch for GPUs
    for path in [*(HERE / f"{name}.py" for name in below), *HERE.glob("harness/*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        inside = {name.split(".")[0] for name in names} - free
        assert inside <= (below[path.stem] if path.parent == HERE else {"harness"}), path
    text = (HERE / "train.py").read_text()
    step, = (node for node in ast.walk(ast.parse(text)) if getattr(node, "name", "") == "train_step")
    assert step.end_lineno - step.lineno < 35 and len(text.splitlines()) <= 400
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        assert max(len(line) for line in path.read_text(encoding="utf-8").splitlines()) <= 110, path
    for path in [*HERE.glob("*.md"), *HERE.glob("experiments/**/*.md")]:
        prose = [line for line in path.read_text(encoding="utf-8").splitlines() if "](" not in line]
        assert max(len(line) for line in prose if not line.startswith("|")) <= 110, path
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("script", ["qrnn.py", "dni.py", "sgdr.py", "data.py"])
def test_each_file_runs_alone(script, tmp_path):
    """`python FILE` prints a demonstration of its idea, alone in its folder or, for dni.py, with qrnn.py."""
    for name in {script, "qrnn.py"} if script == "dni.py" else {script}:
        shutil.copy(HERE / name, tmp_path)
    run = subprocess.run([sys.executable, script, *(["pydoc"] if script == "data.py" else [])], cwd=tmp_path,
                         capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and len(run.stdout.split("\n")) > 3, run.stderr
    if script == "dni.py":
        numbers = map(float, re.findall(r" ([+\d]+\.\d+)$", run.stdout, re.M)[:6])
        whole, truncated, mended, bptt, layer, neuron = numbers
        assert whole == mended != truncated and bptt < 0.6 < neuron and layer > 0.9
        assert "\n".join(run.stdout.split("\n")[:5]) in README.replace("\n    ", "\n")


# ---------------------------------------------------------------------------------------------- 12. README.md

README = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_snippets_run(snippet):
    """Each Python snippet of the README runs as it stands and prints what its comments say it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue().split("\n")[:-1] == re.findall(r"^print.*?  # (.*)$", snippet, re.M)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^python train\.py[^#\n]*", README, re.M))))
def test_readme_commands_parse(line):
    """Each train.py command of the README is one that train.py understands."""
    arguments = shlex.split(line)[2:]
    if "--resume" not in arguments:
        parsed(*arguments)
