"""The proofs. Each test states a claim, computes its two sides independently, and compares them.

Run `pytest test_all.py`. Set QRNN_DATA to a folder with the PTB and WikiText-2 files to include the
claims about them; without it, without a GPU, and so on, the tests concerned are skipped and say so.
The slow tests (the compiler, a kill) are left out; `pytest test_all.py -m slow` runs them.

    0  the whole method, in plain code
    1  pooling and the QRNN                       6  the language model and its regularisation
    2  Eq. 1 and the bootstrapped target          7  warm restarts
    3  the interface                              8  data
    4  trained but not used                       9  train.py as a program
    5  what a state can tell                     10  the repository, and its studies
"""

import ast
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import study

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.testing import assert_close as close
from torch.utils._python_dispatch import TorchDispatchMode

import alternate
import authors
import data
import dni as dni_module
import injected
import plain
import qrnn as qrnn_module
import recall
import report
import reproduce
import text as text_study
import train
from dni import Interface, LayerDNI, NeuronDNI, agreement, crossing, flatten
from qrnn import QRNN, LanguageModel, QRNNLayer, pool, pool_loop
from sgdr import SGDR, run_at

torch.set_num_threads(1)  # for small tensors the fastest, above all beside other work

HERE = Path(__file__).resolve().parent
SLOW = pytest.mark.slow
COMPILER = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler"
)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
DOUBLE = dict(dtype=torch.float64)
randn = functools.partial(torch.randn, **DOUBLE)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # of a process that a test starts


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def lively(g, bound=0.5):
    """g with a last layer that is not zero, so that it says something."""
    for mlp in getattr(g, "mlps", None) or [g.decode]:
        for p in mlp[-1].parameters():
            nn.init.uniform_(p, -bound, bound)
    return g


def c_of(state):
    return [c for c, _ in state]


def small_settings(mode="bptt", **changes):
    return dataclasses.replace(train.preset("small", mode, "pydoc"), **changes)


# ------------------------------------------------------------- 0. the whole method, in plain code

WHOLE = dict(
    embedding_size=4,
    hidden_size=5,
    chunk=12,
    jitter=True,
    clip=0.2,
    l2=1e-2,
    lr=0.02,
    dni_lr=5e-3,
    dropout_output=0.0,
    dropout_hidden=0.0,
    dropout_input=0.0,
)
BOUNDS = dict(e_base=0.4, eta_max=(0.02, 0.03, 0.01), eta_min=(0.004, 0.0))


@pytest.mark.parametrize(
    "changes",
    [
        dict(mode="bptt"),
        dict(mode="dni", dni_warmup=0.6, dni_alpha=0.7),
        dict(mode="restart", mult=1.5, **BOUNDS),
        dict(
            mode="restart",
            gradient="synthetic",
            dni_warmup=0.3,
            dni_borders=3,
            **BOUNDS,
        ),
        dict(mode="alternating", **BOUNDS),
        dict(mode="alternating", jitter=False, num_layers=3, **BOUNDS),
    ],
    ids=["bptt", "dni", "restart", "restart-synthetic", "alternating", "alternating-3-layers"],
)
def test_training_is_the_plain_program(changes, monkeypatch):
    """Three epochs of train_epoch are three epochs of experiments/plain.py, to 1e-10.

    Every chunk's loss, learning rate, run and gradient; every epoch's row; and in the end every
    weight of the model and of g.
    """
    settings = dataclasses.replace(train.Settings(), **{**WHOLE, **changes})
    names = [field.name for field in dataclasses.fields(plain.Settings)]
    plain_settings = plain.Settings(**{name: getattr(settings, name) for name in names})
    inputs, targets = torch.randint(11, (2, 100, 3))

    model, optimizer, dni = train.build(settings, 11, "cpu")
    networks = [model.double()]
    if dni:
        networks.append(lively(dni.g.double(), 0.1))
    first = []
    for network in networks:
        weights = network.state_dict().items()
        first.append({name: w.clone().requires_grad_() for name, w in weights})
    theta, phi = first if dni else (*first, {})

    schedule = train.make_schedule(settings, optimizer)
    seen = []
    step = train.train_step

    def recorded(model, optimizer, dni, x, y, state, synthetic, *rest):
        nll, state = step(model, optimizer, dni, x, y, state, synthetic, *rest)
        seen.append((nll.item(), optimizer.param_groups[0]["lr"], schedule.run.index, synthetic))
        return nll, state

    monkeypatch.setattr(train, "train_step", recorded)
    norms = []
    trained = plain.training(theta, phi, inputs, targets, plain_settings, epochs=3)
    for epoch, (*weights_of_both, chunks, mean_nll) in enumerate(trained):
        last = weights_of_both
        seen.clear()
        row = train.train_epoch(model, optimizer, schedule, dni, (inputs, targets), epoch, settings)
        assert len(seen) == len(chunks)
        for ours, (*theirs, norm) in zip(seen, chunks):
            assert ours == pytest.approx(theirs, abs=1e-10)
            norms.append(norm)
        last_border, _ = list(plain.chunks(100, plain_settings, epoch))[-1]
        rate, run, synthetic = plain.schedule(plain_settings, epoch + last_border / 100)
        assert row["learning_rate"] == pytest.approx(rate, abs=1e-10)
        assert row["train_perplexity"] == pytest.approx(math.exp(mean_nll), rel=1e-10)
        assert (row["epoch"], row["run"]) == (epoch + 1, run)
        assert row["gradient"] == ("synthetic" if synthetic else "real")
    assert min(norms) < settings.clip < max(norms)  # clipping bites, at times
    for network, weights in zip(networks, last):
        expected = {name: w.detach() for name, w in weights.items()}
        close(network.state_dict(), expected, atol=1e-10, rtol=0)


@SLOW
def test_the_plain_program_runs_alone(tmp_path):
    """`python plain.py alternating` alternates at each restart, and learns, alone in a folder."""
    shutil.copy(HERE / "experiments" / "plain.py", tmp_path)
    command = [sys.executable, "plain.py", "alternating"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD)
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(r"run (\d) .* in +(\d+) of 20 chunks  perplexity ([\d.]+)", ended.stdout)
    assert [int(run) for run, _, _ in rows] == [0] + [1] * 2 + [2] * 4 + [3] * 8
    assert [used for run, used, _ in rows if run in "02"] == ["0"] * 5
    assert [used for run, used, _ in rows if run in "13"] == ["19"] * 10  # all chunks but the last
    assert float(rows[-1][2]) < 0.5 * float(rows[0][2])
    command = [sys.executable, "plain.py", "magic"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 2


# -------------------------------------------------------------------------- 1. pooling and the QRNN


def gates(T=7, B=3, H=4):
    """Leaves f in (0, 1), z in (-1, 1) and c_0."""
    return [
        x.requires_grad_()
        for x in (torch.rand(T, B, H, **DOUBLE), randn(T, B, H).tanh(), randn(B, H))
    ]


def pool_closed_form(f, z, c0):
    """The same without a recurrence.

    c_t = (prod_{i<=t} f_i) c_0 + sum_{j<=t} (prod_{j<i<=t} f_i) (1 - f_j) z_j
    """
    parts = [c0, *((1 - f) * z)]
    return torch.stack(
        [
            sum(f[j:t].prod(0) * part for j, part in enumerate(parts[: t + 1]))
            for t in range(1, len(f) + 1)
        ]
    )


def another_qrnn(old="", new=""):
    """A second module made of qrnn.py's text, with `old` replaced."""
    text = (HERE / "qrnn.py").read_text(encoding="utf-8")
    module = types.ModuleType("another_qrnn")
    assert not old or text.count(old) == 1
    exec(compile(text.replace(old, new), HERE / "qrnn.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)],
    ids=str,
)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_pooling_loop_is_closed_form_is_explicit_function(T, dtype, tolerance, device):
    """The three forms agree in c_1 .. c_T, c_T, and the gradients of f, z and c_0 through both."""
    first = gates(T)
    weights = [randn(T, 3, 4), randn(3, 4)]
    outputs = [(c, c[-1]) for c in (pool_loop(*first), pool_closed_form(*first))]
    expected, closed = ([*out, *grad(out, first, weights, retain_graph=True)] for out in outputs)
    close(closed, expected)
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in first]
    G, G_next = (w.to(device, dtype) for w in weights)
    c, c_T = pool(*leaves)
    found = [c, c_T.detach().clone(), *grad([c, c_T], leaves, [G, G_next], retain_graph=True)]
    assert all(x.dtype == dtype for x in found)
    close([x.double().cpu() for x in found], expected, atol=tolerance, rtol=tolerance)
    c_T.detach().fill_(100.0)  # a tensor of its own
    again, _ = pool(*leaves)
    close([c, *grad(c, leaves, G)], [again, *grad(again, leaves, G)])


def test_the_gpus_pooling_without_a_gpu(monkeypatch):
    """The GPU's kernels, in Triton's interpreter on a CPU, equal `pool_loop` and its gradients."""
    pytest.importorskip("triton", "3.7")  # that of 3.6 fails with numpy 2.4
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    copy = another_qrnn()
    copy.pool_states.register_kernel("cpu", copy.states_on_gpu)  # in place of the loops
    copy.pool_gradients.register_kernel("cpu", copy.gradients_on_gpu)
    # Sizes are odd, or above the BLOCK of columns.
    for T, B, H, strided in (1, 3, 5, False), (2, 1, 1, False), (7, 3, 43, False), (6, 5, 27, True):
        arguments = [*gates(T, B, H), randn(T, B, H), randn(B, H)]
        c = pool_loop(*arguments[:3])
        expected = [c, c[-1], *grad([c, c[-1]], arguments[:3], arguments[3:])]
        if strided:
            arguments = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in arguments]
        for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-5):
            *leaves, G, G_next = (x.detach().to(dtype).requires_grad_() for x in arguments)
            c, c_T = copy.Pool.apply(*leaves)
            close(
                [c, c_T, *grad([c, c_T], leaves, [G, G_next])],
                [x.to(dtype) for x in expected],
                atol=tolerance,
                rtol=0,
            )


@SLOW
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_the_gpus_pooling_compiles_without_a_gpu(capability, tmp_path):
    """For GPUs from 2018 on. No number is spilled to memory. From 8.0 on loads run ahead."""
    pytest.importorskip("triton")
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tensors = {
        qrnn_module.pool_forward_kernel: "f z c0 c",
        qrnn_module.pool_backward_kernel: "G G_next f z c df dz dc0",
    }
    for kernel, names in tensors.items():
        types_of = dict.fromkeys(names.split(), "*fp32") | {"T": "i32", "N": "i32"}
        target = GPUTarget("cuda", capability, 32)
        made = compile(ASTSource(kernel, types_of, {}), target, options={"num_warps": 2})
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", used) == ["0", "0"], used
        assert ("cp.async" in made.asm["ptx"]) == (capability >= 80)


@pytest.mark.parametrize(
    "mode, kind", [("bptt", "neuron"), ("dni", "neuron"), ("dni", "layer"), ("dni", "linear")]
)
@pytest.mark.parametrize("synthetic", [False, True])
def test_a_step_stays_on_its_device(mode, kind, synthetic, monkeypatch):
    """At the paper's size, on a device without numbers.

    To make a tensor elsewhere, or to read a number back, would raise.
    """
    adam = torch.optim.Adam

    def plain_adam(*arguments, fused, **options):  # the fused form is not for this device
        return adam(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", plain_adam)
    chosen = dataclasses.replace(train.preset("paper", mode, "ptb"), dni_kind=kind)
    with torch.device("meta"):
        model, optimizer, dni = train.build(chosen, 10_000, "meta")
        tokens = torch.zeros(201, 20, dtype=torch.int64)
    state = None
    for _ in range(3):
        nll, state = train.train_step(
            model, optimizer, dni, tokens[:-1], tokens[1:], state, synthetic, chosen.clip
        )
    assert {x.device.type for x in (nll, *c_of(state))} == {"meta"}


def test_derivatives_of_the_pooling_by_finite_differences():
    """The hand-written backward agrees with them.

    It refuses a second derivative, which `pool_loop` has.
    """

    def strided(f, z, c0):
        return pool(f.transpose(0, 1), z.transpose(0, 1), c0.t())[0][::2]

    def summed(f, z, c0):
        return pool(f, z, c0)[0].sum()  # so the gradient of c is an expanded scalar

    assert torch.autograd.gradcheck(pool, gates(5, 2, 3))
    assert torch.autograd.gradcheck(strided, (*gates(2, 5, 3)[:2], gates(5, 3, 2)[2]))
    assert torch.autograd.gradcheck(summed, gates(5, 2, 3))
    leaves = gates(4, 2, 3)
    for leaf, outer in itertools.product(leaves, (False, True)):
        G = torch.ones((), requires_grad=outer, **DOUBLE)
        with pytest.raises(RuntimeError, match="second derivative.*use pool_loop"):
            grad(pool(*leaves)[0].sum(), leaf, G, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch transforms"):  # torch's own refusal
        torch.func.vmap(pool)(*(x.detach()[None] for x in leaves))
    assert torch.autograd.gradgradcheck(pool_loop, leaves)
    assert torch.autograd.gradgradcheck(pool, gates(1, 2, 3))  # T = 1 has no backward of its own


def test_two_copies_of_the_file_live_in_one_process():
    """A changed copy of qrnn.py computes what its own text says, and the original what it did."""
    twin = another_qrnn("r[0] * f[0]\n", "3 * r[0] * f[0]\n")  # dL/dc_0, three times as large
    for module, factor in ((twin, 3), (qrnn_module, 1), (another_qrnn(), 1), (twin, 3)):
        leaves = gates()
        f, z, c0 = grad(pool_loop(*leaves).square().sum(), leaves)
        close(grad(module.pool(*leaves)[0].square().sum(), leaves), (f, z, factor * c0))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_streaming(window):
    """A sequence cut anywhere, with the state carried, equals one pass.

    Pieces may be shorter than the window.
    """
    qrnn = QRNN(3, 4, 2, window=window).double()
    x = randn(7, 2, 3)
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, 7), n) for n in (1, 2, 6)
    ):
        state = None
        pieces = []
        for start, stop in itertools.pairwise((0, *cuts, 7)):
            piece, state = qrnn(x[start:stop], state)
            pieces.append(piece)
        close((torch.cat(pieces), state), qrnn(x))


def test_qrnn_is_called_like_an_lstm():
    """Same shapes in and out as nn.LSTM, (T, B, I) or batch_first. Wrong shapes are refused."""
    x = torch.randn(7, 3, 5)
    tokens = torch.zeros(7, 3, dtype=torch.int64)
    outputs = []
    for batch_first in (False, True):
        torch.manual_seed(0)
        options = dict(num_layers=2, batch_first=batch_first, dropout=0.5)
        qrnn = QRNN(5, 4, **options)
        lstm = nn.LSTM(5, 4, **options)
        output, state = qrnn(x)
        assert output.shape == qrnn(x, state)[0].shape == lstm(x)[0].shape
        assert [c.shape for c in c_of(state)] == [c.shape for c in lstm(x)[1][1]]
        state = [(c.detach(), x_prev.detach()) for c, x_prev in state]  # as its docstring says
        assert not any(tensor.requires_grad for pair in state for tensor in pair)
        outputs.append(qrnn.eval()(x.transpose(0, 1) if batch_first else x)[0])
    close(outputs[0], outputs[1].transpose(0, 1))

    qrnn = QRNN(5, 4, 2, window=2)
    (c, x_prev), second = qrnn(x)[1]
    for words, call in (
        (r"\(T >= 1, B, 5\).*\(7, 3, 6\)", lambda: qrnn(torch.randn(7, 3, 6))),
        (r"T >= 1.*\(0, 3, 5\)", lambda: qrnn(x[:0])),
        ("a tensor, got list", lambda: qrnn([x])),
        (r"\(3, 4\).*\(1, 3, 5\).*\(1, 4\)", lambda: qrnn(x, [(c[:1], x_prev), second])),
        (r"\(3, 4\).*\(1, 3, 5\).*\(0, 3, 5\)", lambda: qrnn(x, [(c, x_prev[:0]), second])),
        ("2 pairs, one a layer, got 1", lambda: QRNN(5, 4, 2)(x, [(c, x_prev[:0])])),
        (
            r"\(B, T >= 1, 5\), got \(7, 3, 6\)",
            lambda: QRNN(5, 4, batch_first=True)(torch.randn(7, 3, 6)),
        ),
        (
            "PackedSequence: pad it on the right",
            lambda: qrnn(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 6, 5]))),
        ),
        (r"\(7, 3\).*\(6, 3\)", lambda: LanguageModel(9, 4, 4, 1)(tokens, tokens[1:])),
        (r"\(7, 3\).*\(3, 7\)", lambda: LanguageModel(9, 4, 4, 1)(tokens, tokens.t())),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    for mode in (FakeTensorMode(), contextlib.nullcontext()):
        with mode, torch.device("meta"):  # as nn.LSTM, with shapes and no numbers
            assert QRNN(5, 4, 2)(torch.zeros(7, 3, 5))[0].shape == (7, 3, 4)
    padded = torch.cat([x, torch.full((2, 3, 5), math.nan)])  # what comes later has no say
    assert torch.equal(QRNN.forward(qrnn.eval(), padded)[0][:7], qrnn(x)[0])


def test_a_state_does_not_hold_the_chunk():
    """x_prev is memory of its own, not a view of all inputs."""
    _, [(c, x_prev)] = QRNN(5, 4, window=3)(torch.randn(100, 2, 5))
    for tensor in (c, x_prev):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_state_that_does_not_fit_is_refused():
    """That of an nn.GRU or nn.LSTM, c alone, or one on another device: nn.LSTM refuses it, too."""
    x = torch.randn(7, 3, 5)
    qrnn = QRNN(5, 4, 2, window=2)
    (c, x_prev), second = qrnn(x)[1]
    zeros = torch.zeros(2, 3, 4)
    elsewhere = zeros.to("meta")
    pair = r"expected a pair of tensors \(c, x_prev\) .* the call before returned"
    for state, words in (
        (zeros, r"2 pairs, one a layer, got a tensor of shape \(2, 3, 4\)"),
        ((zeros, zeros), pair),
        ([c, c], pair),
        ([(c,), second], pair),
        ([(c, None), second], pair),
        ([(c, x_prev, c), second], pair),
        ([(c.to("meta"), x_prev), second], "c is on meta, x_prev on cpu, x on cpu"),
        ([(c, x_prev.to("meta")), second], "c is on cpu, x_prev on meta, x on cpu"),
    ):
        for inputs in (x, x[:1]):
            with pytest.raises(ValueError, match=words):
                qrnn(inputs, state)
    with pytest.raises(RuntimeError, match="same device"):
        nn.LSTM(5, 4, 2)(x, (elsewhere, elsewhere))
    with pytest.raises(ValueError, match="x on meta"):
        qrnn(x.to("meta"), [(c, x_prev), second])


def test_a_state_of_another_type_is_taken_in_that_of_x():
    """As after a change of the model's type, and whatever the length of the chunk."""
    x = torch.randn(7, 3, 5)
    qrnn = QRNN(5, 4, 2, window=2)
    _, state = qrnn(x)
    for dtype in (torch.float64, torch.bfloat16):
        other = [(c.to(dtype), x_prev.to(dtype)) for c, x_prev in state]
        rounded = [(c.float(), x_prev.float()) for c, x_prev in other]
        for inputs in (x, x[:1]):
            close(qrnn(inputs, other), qrnn(inputs, rounded), rtol=0, atol=0)


def test_pool_refuses_what_does_not_fit():
    """Shapes and devices that the loops would take, and fill with memory that nobody wrote."""
    f, z, c0 = (x.detach() for x in gates())
    for T in (7, 1):
        for wrong in (
            (f[:T], z[:T], c0[:1]),
            (f[:T], z[:T], c0[None]),
            (f[:T, :1], z[:T], c0),
            (f[:T], z[:T, :1], c0),
            (f[: T + 1], z[:T, :1], c0),
            (f[:T], z[:T], c0.to("meta")),
            (f[:T], z[:T].to("meta"), c0),
            (f[:T].to("meta"), z[:T], c0),
            (f[:0], z[:0], c0),
            (f[:T].float(), z[:T], c0),
            (f[:T], z[:T], c0.float()),
            (f[:T] + 0j, z[:T] + 0j, c0 + 0j),
        ):
            with pytest.raises(ValueError, match=r"f and z \(T >= 1, B, H\), c0 \(B, H\)"):
                pool(*wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: QRNN(5, 0),
        lambda: QRNN(5, 4, window=0),
        lambda: QRNN(5, [4, 4], window=[1]),
        lambda: QRNN(5, []),
        lambda: QRNN(5, 4, num_layers=0),
        lambda: QRNN(5, 4, dropout=1.0),
        lambda: QRNN(5, 4, weight_dropout=1.0),
        lambda: QRNN(5, 4, zoneout=2.0),
        lambda: QRNN(5, 4, zoneout=-0.1),
        lambda: QRNN(5, 4, dropout=math.nan),
        lambda: LanguageModel(9, 4, 4, num_layers=0),
        lambda: LanguageModel(9, 4, 4, dropout_input=1.0),
        lambda: LanguageModel(9, 4, 4, dropout_hidden=-1.0),
        lambda: LanguageModel(9, 4, 4, dropout_output=1.0),
        lambda: LanguageModel(9, 4, 4, dropout_embedding=1.0),
        lambda: LanguageModel(9, 4, 4, dropout_weight=1.0),
        lambda: Interface(NeuronDNI(), borders=0),
        lambda: LayerDNI(8),
        lambda: Interface(NeuronDNI(), torch.optim.Adam(nn.Linear(2, 2).parameters())),
        lambda: LayerDNI([4, 3])([torch.ones(2, 4)]),
        lambda: LayerDNI([4])([torch.ones(2, 3)]),
        lambda: SGDR(optimizer_with(1.0), base=0),
        lambda: SGDR(optimizer_with(1.0), mult=0.5),
    ],
)
def test_a_module_refuses_what_the_command_line_does(make):
    with pytest.raises(ValueError):
        make()


def test_numbers_may_be_numpys_or_torchs():
    """Sizes, windows, rates and bounds: what is made is the same."""
    sizes = [
        [layer.hidden_size for layer in QRNN(5, size, num_layers, window=window).layers]
        for size, num_layers, window in (
            (4, 2, 1),
            (np.int64(4), np.int64(2), torch.tensor(1)),
            ([np.int64(4), 4], 1, (torch.tensor(1), 1)),
        )
    ]
    assert sizes == [[4, 4]] * 3 and "4, window=1" in repr(QRNN(5, 4))
    bounds = (
        ([1.0, 0.5], 0.25),
        (np.array([1.0, 0.5]), np.float32(0.25)),
        (torch.tensor([1.0, 0.5]), torch.tensor(0.25)),
    )
    rates = [
        rates_of(SGDR(optimizer_with(1.0), 2, eta_max=high, eta_min=low), (0, 1, 3))
        for high, low in bounds
    ]
    assert rates[0] == rates[1] == rates[2]


def test_initial_weights():
    """A layer's are torch.nn.Linear's.

    The embedding's are uniform within 0.1, and the decoder's bias is 0 (AWD, section 5).
    """
    torch.manual_seed(4)
    layer = QRNNLayer(6, 5, window=2)
    torch.manual_seed(4)
    close(layer.state_dict(), nn.Linear(12, 15).state_dict(), atol=0, rtol=0)
    model = LanguageModel(500, 40, 6, 2)
    weight = model.embedding.weight.detach()
    assert 0.0999 < weight.abs().max() <= 0.1 and abs(weight.std() - 0.2 / 12**0.5) < 1e-3
    assert not model.decoder_bias.any()
    assert sum(p.shape == (500, 40) for p in model.parameters()) == 1  # tied


def test_zoneout_keeps_the_old_value():
    """A share p of the neurons keeps it, drawn anew for each stream and step.

    Evaluation uses the mean of the gate.
    """
    layer = QRNNLayer(5, 400, zoneout=0.3).double()
    p = 0.3
    x = randn(1, 1, 5).expand(6, 8, 5)
    c0 = randn(8, 400)
    z, f, o = F.linear(x, layer.weight, layer.bias).chunk(3, -1)
    z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
    c = torch.cat([c0[None], layer(x, (c0, x[:0]))[0] / o])
    kept = (c[1:] - c[:-1]).abs() < 1e-12  # (T, B, H)
    close(c[1:], torch.where(kept, c[:-1], f * c[:-1] + (1 - f) * z))
    assert abs(kept.double().mean() - p) < 0.02
    for dim, n in ((0, 6), (1, 8)):  # means of n draws; locked: n = 1
        assert abs(kept.double().mean(dim).std() - (p * (1 - p) / n) ** 0.5) < 0.02
    f = p + (1 - p) * f
    close(layer.eval()(x[:1], (c0, x[:0]))[1][0], (f * c0 + (1 - f) * z)[0])
    layer.train().zoneout = 1.0
    assert torch.equal(layer(x, (c0, x[:0]))[1][0], c0)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_products_stay_near_float32(device):
    """The loss to 1%, every gradient to 5%.

    State, logits, softmax and the answers of g stay float32.
    """
    model = LanguageModel(50, 32, 64, 2).to(device)
    results = []
    tokens = torch.randint(50, (20, 4)).to(device)
    for product in (torch.float32, torch.bfloat16):
        with torch.autocast(device, product, product != torch.float32):
            nll, _, state = model(tokens[:-1], tokens[1:])
            logits, _ = model.logits(tokens[:-1])
            answers = [
                d
                for g in (NeuronDNI(), LayerDNI([64, 32]), LayerDNI([64, 32], 0))
                for d in lively(g).to(device)(c_of(state))[0]
            ]
        assert {x.dtype for x in (nll, logits, *answers, *c_of(state))} == {torch.float32}
        exact = F.cross_entropy(logits.double().flatten(0, 1), tokens[1:].flatten())
        assert nll.item() == pytest.approx(exact.item(), rel=1e-6)
        results.append((nll, grad(nll, list(model.parameters()))))
    (a, full), (b, half) = results
    assert a != b and abs(a - b) < 0.01 * a
    assert all((g - h).norm() < 0.05 * g.norm() for g, h in zip(full, half))


def four_steps(compiled, device, product):
    """Losses, gradients and states of four chunks, the last of another length; then g's weights."""
    torch.manual_seed(5)
    s = small_settings(
        "dni", embedding_size=24, hidden_size=40, dropout_embedding=0.1, dropout_weight=0.3
    )
    model, optimizer, dni = train.build(s, 60, device)
    for layer in model.rnn.layers:
        layer.zoneout = 0.1
    lively(dni.g)
    if compiled:
        train.compile_modules([model, dni.g])
    inputs, targets = data.streams(torch.randint(60, (301,)).to(device), 4)
    autocast = torch.autocast(device, product, product != torch.float32)
    state = None
    found = []
    for x, y in zip(inputs.split(20), targets.split(20)):
        torch.manual_seed(len(found))
        # Forms with and without a state, an h_g and a graph: all were met by the third chunk.
        with torch.compiler.set_stance("default" if len(x) == 20 else "fail_on_recompile"):
            nll, state = train.train_step(
                model, optimizer, dni, x, y, state, True, s.clip, autocast
            )
        found += [nll, *(p.grad for p in model.parameters()), *c_of(state)]
    return found + [p.detach() for p in dni.g.parameters()]


@SLOW
@COMPILER
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_is_plain(product, device):
    """Four steps agree, with every random mask in use.

    Model and g are one graph each, for chunks of any length.
    """
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._inductor.config.patch(fallback_random=True):  # torch's own random numbers
        compiled = four_steps(True, device, product)
    assert counters["stats"]["unique_graphs"] >= 6 and not counters["graph_break"], counters
    for a, b in zip(compiled, four_steps(False, device, product), strict=True):
        assert (a - b).norm() <= (1e-5 if product == torch.float32 else 1e-2) * b.norm()


class Launches(TorchDispatchMode):
    """Counts the operations that are no views: about the kernels that a GPU is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        views = [
            r.alias_info is not None and not r.alias_info.is_write
            for r in operation._schema.returns
        ]
        if not any(views) and not re.search("empty|profiler|unsafe_view", str(operation)):
            self.names.append(operation.__name__)
        return operation(*args, **kwargs or {})


def steps_of_the_papers_model(mode, watch, compiled=False):
    """Train the paper's model, with few neurons, on six chunks. Returns what watch() saw."""
    s = train.preset("paper", mode, "ptb")
    seen = []
    state = None
    s = dataclasses.replace(s, hidden_size=9, embedding_size=7)
    model, optimizer, dni = train.build(s, 30, "cpu")
    if compiled:
        train.compile_modules([model] if dni is None else [model, dni.g])
    inputs, targets = data.streams(torch.arange(561) % 29, 4)
    for x, y in zip(inputs.split([20] * 5 + [40]), targets.split([20] * 5 + [40])):
        with watch() as watched, torch.autocast("cpu", torch.bfloat16):
            _, state = train.train_step(model, optimizer, dni, x, y, state, mode == "dni", s.clip)
        seen.append(watched)
    return seen


@pytest.mark.parametrize("mode, most", [("bptt", 330), ("dni", 500)])
def test_a_step_of_the_papers_model_asks_a_gpu_for_little(mode, most):
    """At most so many kernels for any T, and no question that the CPU would have to wait for."""
    names = [launches.names for launches in steps_of_the_papers_model(mode, Launches)]
    assert most / 2 < len(names[4]) == len(names[5]) <= most  # (in the first steps Adam begins)
    assert not any({"_local_scalar_dense.default", "nonzero.default"} & set(its) for its in names)


@SLOW
@COMPILER
@pytest.mark.parametrize("mode, most", [("bptt", 220), ("dni", 350)])
def test_a_compiled_step_asks_for_less(mode, most):
    """Counted in a CPU's profile: products, pooling, compiled kernels, and the optimiser's."""

    def kernels(event):
        if re.search(
            "view|transpose|slice|select|expand|squeeze|stride|detach|::t$|empty|item", event.name
        ):
            return 0
        if re.search("mm$|pool|foreach|fused", event.name):
            return 1
        return sum(map(kernels, event.cpu_children)) or 1

    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        profiles = steps_of_the_papers_model(mode, torch.profiler.profile, compiled=True)
    count = sum(kernels(event) for event in profiles[5].events() if event.cpu_parent is None)
    assert 40 < count <= most


def test_without_a_compiler_the_plain_form_serves(monkeypatch, capsys):
    """Where torch.compile fails, one line says so, and the modules stay as they are."""

    def fails(*_):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(LanguageModel, "compile", None)
    train.compile_modules([LanguageModel(9, 4, 5, 2)])
    line = "train.py: no --compile here, the plain form goes on: 'no compiler\\nhere'\n"
    assert capsys.readouterr().err == line


# ------------------------------------------------------------- 2. Eq. 1 and the bootstrapped target


def tiny_model(windows=(1, 1)):
    """A float64 language model, small enough for whole Jacobians; three chunks: T = 4, B = 2."""
    model = LanguageModel(11, 3, 5, 2).double()
    model.rnn = QRNN(3, [5, 3], window=list(windows)).double()
    tokens = torch.randint(11, (13, 2))
    return model, [(tokens[i : i + 4], tokens[i + 1 : i + 5]) for i in (0, 4, 8)]


def one_graph(model, chunks, state=None):
    """Losses and border states of all chunks in a single graph: what full BPTT would see."""
    losses = []
    states = []
    for inputs, targets in chunks:
        nll, penalty, state = model(inputs, targets, state)
        losses.append(nll + penalty)
        states.append(state)
    return losses, states


def test_eq1_with_the_true_future_gradient_is_full_bptt():
    """Eq. 1: given the TRUE future gradients, the chunks' gradients add up to full BPTT's.

    Left side: separate chunks, each trained by train_step. Right side: one graph of the whole text.
    """
    model, chunks = tiny_model()
    parameters = list(model.parameters())
    losses, states = one_graph(model, chunks)
    full = flatten(grad(sum(losses), parameters, retain_graph=True))
    T_B = chunks[0][0].numel()
    future = []
    for k in range(2):
        gradients = grad(sum(losses[k + 1 :]), c_of(states[k]), retain_graph=True)
        future.append([T_B * d for d in gradients])
    future.append([torch.zeros_like(c) for c in c_of(states[2])])

    def sum_over_chunks(synthetic):
        dni = Interface(NeuronDNI().double())
        state = None
        total = 0.0
        truth = iter(future)
        dni.synthesize = lambda s_next: next(truth)  # whatever the state
        for inputs, targets in chunks:
            frozen = torch.optim.SGD(parameters, 0.0)
            _, state = train.train_step(
                model, frozen, dni, inputs, targets, state, synthetic, math.inf
            )
            total = total + flatten([p.grad for p in parameters])
        return total

    close(sum_over_chunks(synthetic=True), full)
    lost = sum_over_chunks(synthetic=False) - full  # what truncation costs
    assert lost.norm() > 1e-3 * full.norm()
    # With a window of 2 the inputs cross a border, too. Nothing is synthesised for them.
    _, states = one_graph(*tiny_model(windows=(2, 1)))
    (c, x_prev), *_ = train.detach_state(states[0])
    assert c.is_leaf and c.requires_grad and not x_prev.requires_grad


def watch_regression(monkeypatch):
    """A list that grows by (predicted, target) whenever g learns."""
    learned = []
    regress = dni_module.regress

    def watched(optimizer, predicted, target):
        learned.append((predicted, target))
        return regress(optimizer, predicted, target)

    monkeypatch.setattr(dni_module, "regress", watched)
    return learned


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_bootstrapped_target(alpha, monkeypatch):
    """target = dL_{T..2T}/dh_T + (dh_2T/dh_T)^T alpha delta^_2T (2.1).

    The unit is one stream's summed loss. The paper's h_T and h_2T are s_1 and s_2 in the code.
    Left: the target that learn() hands to the regression, and what train_step leaves in the border
    state's .grad. Right: autograd over one graph of 2T steps for the first term; the whole Jacobian
    dh_2T/dh_T, as a matrix, times g's answer for the second. The prediction that the target is
    compared with is g's answer at s_1.
    """
    learned = watch_regression(monkeypatch)
    model, chunks = tiny_model()
    g = lively(NeuronDNI()).double()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.0), alpha)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    state = None
    borders = []
    for inputs, targets in chunks[:2]:
        borders.append(state)
        _, state = train.train_step(model, optimizer, dni, inputs, targets, state, True, math.inf)
    T_B = chunks[0][0].numel()
    left = flatten([c.grad for c in c_of(borders[1])]) * T_B

    (_, loss), (first, second) = one_graph(model, chunks[:2])
    true_part = grad(loss, c_of(first), retain_graph=True)

    def second_state(*cs):
        return flatten(c_of(model(*chunks[1], [(c, x) for c, (_, x) in zip(cs, first)])[2]))

    rows = torch.autograd.functional.jacobian(second_state, tuple(c_of(first)))
    jacobian = torch.cat([r.flatten(1) for r in rows], 1)  # dh_2T / dh_T, (N, N)
    with torch.no_grad():
        guess, memory = g(c_of(first))  # delta^_T
        answer, _ = g(c_of(second), memory)  # delta^_2T
    right = flatten(true_part) * T_B + jacobian.T @ (alpha * flatten(answer))
    [(predicted, target)] = learned  # one border: the first chunk enters without a state
    guess = flatten(guess)
    close([left, flatten(target), flatten(predicted).detach()], [right, right, guess])
    assert (jacobian.T @ flatten(answer)).norm() > 1e-3 * left.norm()  # g had a say in it


# --------------------------------------------------------------------------------- 3. the interface


class Reader(nn.Module):
    """A stranger's model: read(chunk, s) -> (s_next, loss).

    s: states (B, 6); a GRU has one, an LSTM two.
    """

    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.rnn = kind(5, 6)
        self.decoder = nn.Linear(6, 7)

    def forward(self, chunk, s):
        x = self.embedding(chunk[:-1])
        one = isinstance(self.rnn, nn.GRU)
        h, states = self.rnn(x, s[0][None] if one else tuple(c[None] for c in s))
        loss = F.cross_entropy(self.decoder(h).flatten(0, 1), chunk[1:].flatten())
        return (list(states) if one else [c[0] for c in states]), loss


@pytest.mark.parametrize(
    "make_g",
    [lambda n: NeuronDNI(), lambda n: LayerDNI([6] * n), lambda n: LayerDNI([6] * n, 0)],
    ids=["neuron", "layer", "linear"],
)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_five_lines_add_a_synthetic_gradient_to_any_model(kind, make_g):
    """credit, backward, learn are Eq. 1, the bootstrapped target, g's regression, done by hand.

    The prediction that is used at a border, and the one that the next chunk corrects there, come
    from the same φ and h_g.
    """
    T = 4
    B = 3
    alpha = 0.7
    n = 2 if kind is nn.LSTM else 1
    read = Reader(kind).double()
    g = lively(make_g(n)).double()
    phi_gradients = []
    used = None
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.01), alpha)
    dni.optimizer.register_step_pre_hook(
        lambda *_: phi_gradients.append([p.grad.clone() for p in g.parameters()])
    )
    text = torch.randint(7, (3 * T + 1, B))
    s_next = [torch.zeros(B, 6, **DOUBLE)] * n
    memory = None
    for k in range(3):
        chunk = text[k * T : (k + 1) * T + 1]
        read.zero_grad()
        s = [c.detach().requires_grad_() for c in s_next]
        s_next, loss = read(chunk, s)
        (loss + dni.credit(s, s_next, tokens_per_chunk=T * B)).backward()

        predicted, memory = g([c.detach() for c in s], memory)
        future = [d.detach() for d in g([c.detach() for c in s_next], memory)[0]]
        memory = None if memory is None else tuple(m.detach() for m in memory)
        close(dni.memory, memory)
        again = [c.detach().requires_grad_() for c in s]
        s_again, loss_again = read(chunk, again)
        injected = sum((d * c).sum() for d, c in zip(future, s_again))
        expected = grad(loss_again + alpha / (T * B) * injected, [*read.parameters(), *again])
        close([p.grad for p in read.parameters()], list(expected[:-n]))
        mse = ((flatten(predicted) - T * B * flatten(expected[-n:])) ** 2).mean()
        of_phi = list(grad(mse, list(g.parameters())))
        close([dni.learn(), phi_gradients[-1]], [mse.detach(), of_phi])
        assert used is None or torch.equal(used, flatten(predicted))
        used = flatten(dni.synthesize(s_next))
    assert not used.requires_grad and all(m.grad_fn is None for m in dni.memory or ())


@pytest.mark.parametrize("hidden_size, matrices", [(50, 3), (0, 1)])
def test_a_layer_wise_g_is_an_mlp_a_layer(hidden_size, matrices):
    """W3 relu(W2 relu(W1 c)) for each layer, or one matrix.

    The neuron-wise g is 10 to 100 times smaller.
    """
    g = lively(LayerDNI([4, 3], hidden_size))
    s = [torch.randn(2, 4), torch.randn(2, 3)]
    for mlp, x, answer in zip(g.mlps, s, g(s)[0]):
        linears = [m for m in mlp if isinstance(m, nn.Linear)]
        for i, linear in enumerate(linears):
            x = (x.relu() if i else x) @ linear.weight.T + linear.bias
        assert len(linears) == matrices
        close(answer, x)
    paper = [1550, 1550, 1550, 400]
    default = Interface(NeuronDNI()).optimizer
    count, neuron = (sum(p.numel() for p in g.parameters()) for g in (LayerDNI(paper), NeuronDNI()))
    assert 10 <= count / neuron <= 100
    assert isinstance(default, torch.optim.Adam) and default.param_groups[0]["lr"] == 1e-4


def sines(dni, s, factor=1.0, synthetic=True, extra=0.0, add=True):
    """A chunk of a made-up model, s_next = sin(2 s), loss = Σ mean s_next², of 10 tokens.

    factor: what the loss is multiplied by.
    extra: a gradient that the loss gives to the first neuron besides.
    add: whether credit's term is added to the loss.
    Returns s_next and what learn() returns.
    """
    s = [c.detach().requires_grad_() for c in s]
    s_next = [(2 * c).sin() for c in s]
    loss = sum(c.double().square().mean() for c in s_next) + extra * s[0][0, 0]
    term = dni.credit(s, s_next, 10, synthetic)
    (factor * (loss + term if add else loss)).backward()
    return s_next, dni.learn()


def lesson(g, memory, s, synthetic=True, alpha=1.0):
    """The same by hand, in float64: what g says at s, and what it should have said. And h_g.

    A number that is not finite is 0 in the eyes of g.
    """

    def says(states, memory):
        return g([torch.where(c.isfinite(), c, 0.0) for c in states], memory)

    predicted, memory = says(s, memory)
    future, _ = says([(2 * c).sin() for c in s], memory)
    target = []
    for c, d in zip(s, future):
        of_loss = 2 * (2 * c).sin() * 2 * (2 * c).cos() / c.numel()
        of_future = alpha * d * 2 * (2 * c).cos() if synthetic else 0.0
        target.append(10 * of_loss + of_future)
    return flatten(predicted), flatten(target).detach(), memory


def in_float64(g, memory):
    """A copy of g, and of h_g."""
    return copy.deepcopy(g).double(), memory and tuple(m.double() for m in memory)


MAKE_G = {"neuron": NeuronDNI, "layer": lambda: LayerDNI([3, 4])}
TYPES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("synthetic", [True, False], ids=["synthetic", "real"])
@pytest.mark.parametrize("kind", MAKE_G)
@pytest.mark.parametrize(
    "of_s, of_g, factors",
    [
        (torch.float32, torch.float32, (65536.0, 1.0, 0.25, -3.0)),
        (torch.float32, torch.float32, (1.0, math.inf, 1.0, -math.inf, 2.0, math.nan, 65536.0)),
        (torch.float32, torch.float32, (2.0, 0.0, 2.0)),
        (torch.float16, torch.float32, (1.0, 8192.0, math.inf, 8192.0)),
        (torch.bfloat16, torch.float32, (1.0, 65536.0, math.nan, 65536.0)),
        (torch.float64, torch.float32, (1.0, 65536.0)),
        (torch.float64, torch.float64, (1.0, 65536.0)),
        (torch.float32, torch.float64, (1.0, 65536.0)),
        (torch.float32, torch.bfloat16, (1.0, 65536.0)),
    ],
    ids=str,
)
def test_a_scaled_loss_teaches_g_the_same(of_s, of_g, factors, kind, synthetic, monkeypatch):
    """In chunk after chunk the loss is multiplied by another factor.

    It may be a GradScaler's, or 1/n where gradients are accumulated. A factor that is not finite,
    or 0, teaches nothing. learn() then returns nan, and the next chunk is as if it had not been.
    Model and g may have different types.
    Left: the prediction, the target and the mean squared error of learn(), and h_g.
    Right: a closed form, in float64.
    """
    learned = watch_regression(monkeypatch)
    g = lively(MAKE_G[kind]()).to(of_g)
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.1))
    s = [torch.randn(2, 3).to(of_s), torch.randn(2, 4).to(of_s)]
    tolerance = max(TYPES[of_s], TYPES[of_g])
    for factor in factors:
        before = flatten(g.parameters()).detach()
        copied = in_float64(g, dni.memory)
        predicted, target, memory = lesson(*copied, [c.double() for c in s], synthetic)
        s, error = sines(dni, s, factor, synthetic)
        assert {c.dtype for c in s} == {of_s}
        assert {d.dtype for d in learned[-1][0]} == {torch.promote_types(of_s, torch.float32)}
        close(flatten(learned[-1][0]).double(), predicted, rtol=tolerance, atol=tolerance)
        if memory:
            close(dni.memory[0].double(), memory[0], rtol=tolerance, atol=tolerance)
        after = flatten(g.parameters()).detach()
        if math.isfinite(factor) and factor:
            close(flatten(learned[-1][1]).double(), target, rtol=tolerance, atol=tolerance)
            expected = (predicted - target).square().mean().item()
            assert error.item() == pytest.approx(expected, rel=4 * tolerance)
            assert not torch.equal(after, before)
        else:
            assert math.isnan(error)
            assert torch.equal(after, before)


@pytest.mark.parametrize("synthetic", [True, False], ids=["synthetic", "real"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["state", "target", "all targets"])
@pytest.mark.parametrize("kind", MAKE_G)
def test_what_is_not_finite_teaches_nothing(kind, where, bad, synthetic, monkeypatch):
    """In the state or in the target of one neuron. All that is finite is taught as ever.

    Left: g's weights after learn(), and its error.
    Right: a step down the gradient of the squared errors that are finite.
    """
    learned = watch_regression(monkeypatch)
    g = lively(MAKE_G[kind]()).double()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.1))
    s, _ = sines(dni, [randn(2, 3), randn(2, 4)])
    for broken in (True, False):  # and the chunk after it
        s = [c.detach().clone() for c in s]
        extra = 0.0
        factor = 1.0
        if broken and where == "state":
            s[0][0, 0] = bad
        elif broken and where == "target":
            extra = bad
        elif broken:
            factor = bad
        copied, memory = in_float64(g, dni.memory)
        predicted, target, memory = lesson(copied, memory, s, synthetic)
        finite = torch.ones(14, dtype=torch.bool)
        if broken:
            finite[0] = False
            finite &= where != "all targets"
        mse = (predicted - target)[finite].square().sum() / 14
        s, error = sines(dni, s, factor, synthetic, extra)
        close(flatten(learned[-1][0]), predicted)
        if finite.any():
            of_phi = grad(mse, list(copied.parameters()))
            close(error, mse.detach())
            close(list(g.parameters()), [p - 0.1 * d for p, d in zip(copied.parameters(), of_phi)])
        else:
            assert math.isnan(error)
            close(list(g.parameters()), list(copied.parameters()), rtol=0, atol=0)
        if memory:
            close(dni.memory[0], memory[0])
        s = [torch.where(c.isfinite(), c, 0.3) for c in s]  # the model has got over it


def test_a_scale_is_that_of_its_own_chunk(monkeypatch):
    """The zero of a real chunk need not be added. Then the chunk before has no say in the scale.

    In a synthetic chunk a term that is forgotten is found out, even after one that was not.
    """
    learned = watch_regression(monkeypatch)
    g = lively(NeuronDNI())
    dni = Interface(g)
    s = [torch.randn(2, 3), torch.randn(2, 4)]
    for between in (lambda: None, dni.reset):
        s, _ = sines(dni, s, 64.0)
        between()
        memory = dni.memory and tuple(m.double() for m in dni.memory)
        _, target, _ = lesson(copy.deepcopy(g).double(), memory, [c.double() for c in s], False)
        s, _ = sines(dni, s, synthetic=False, add=False)
        close(flatten(learned[-1][1]), target.float())
    sines(dni, s, 64.0)
    with pytest.raises(RuntimeError, match=r"call backward\(\) on loss \+ credit"):
        sines(dni, s, add=False)


def read_once(dni, s, s_next=None, tokens=10, **options):
    """One chunk of a model that doubles its state. Returns what learn() does."""
    if s_next is None:
        s_next = [(2 * c).sin() for c in s]
    loss = sum(c.square().mean() for c in s_next)
    (loss + dni.credit(s, s_next, tokens, **options)).backward()
    return dni.learn()


def leaves(*shape):
    return [torch.randn(*shape).requires_grad_()]


class Says(nn.Module):
    """A g whose answer is made by a function of s."""

    def __init__(self, answer):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.answer = answer

    def forward(self, s, memory=None):
        return self.answer(self.linear, s)


def replaced(dni):
    weights = {name: p.clone() for name, p in dni.g.state_dict().items()}
    dni.g.load_state_dict(weights, assign=True)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda dni: setattr(dni, "g", LayerDNI([3])), "optimizer must hold"),
        (replaced, "optimizer must hold"),
        (lambda dni: nn.utils.parametrizations.weight_norm(dni.g.mlps[0][0]), "must hold"),
        (lambda dni: dni.g.half(), "float16"),
    ],
    ids=["another g", "other weights", "weight_norm", "half"],
)
def test_a_g_that_would_not_learn_is_refused(spoil, words):
    """Its optimiser has other parameters than g, or such that one step of Adam makes them nan."""
    dni = Interface(LayerDNI([3]))
    read_once(dni, leaves(2, 3))
    spoil(dni)
    with pytest.raises(ValueError, match=words):
        read_once(dni, leaves(2, 3))


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda linear, s: (linear(s[0]), None), "must return a list"),
        (lambda linear, s: ([linear(s[0])[:, :1]], None), "must return a list"),
        (lambda linear, s: ([], None), "must return a list"),
        (lambda linear, s: ([linear(s[0])], torch.zeros(6, 5)), "g's memory"),
        (lambda linear, s: ([linear(s[0])], (torch.zeros(1, 6, 5),)), "g's memory"),
        (lambda linear, s: ([linear(s[0])], dict(h=torch.zeros(6, 5))), "g's memory"),
    ],
)
def test_a_g_of_another_kind_is_refused(answer, words):
    """A plain tensor (B, H) would be read as a list of B predictions, the first used for all."""
    dni = Interface(Says(answer))
    for s in (None, leaves(2, 3)):
        with pytest.raises(ValueError, match=words):
            read_once(dni, s, s_next=[2 * leaves(2, 3)[0]])


def test_what_credit_refuses():
    """An old leaf, whose gradient would be added to; no tokens; no states."""
    dni = Interface(LayerDNI([3]))
    s = leaves(2, 3)
    read_once(dni, s)
    with pytest.raises(ValueError, match="new leaves"):
        read_once(dni, s)
    for tokens in (0, -10, math.nan, torch.tensor(0)):
        for synthetic in (True, False):
            with pytest.raises(ValueError, match="tokens_per_chunk must be above 0"):
                dni.credit(None, leaves(2, 3), tokens, synthetic=synthetic)
    for nothing in ([], None):
        with pytest.raises(ValueError, match="s, s_next: lists of"):
            dni.credit(None, nothing, 10)
    for sizes in (3, np.int64(3)):
        with pytest.raises(ValueError, match="sizes: a list"):
            LayerDNI(sizes)
    chunks = []
    w = torch.tensor(1.3, requires_grad=True)
    s = leaves(2, 3)
    for _ in range(3):
        s_next = [(w * c).tanh() for c in s]
        chunks.append((s, s_next, s_next[0].square().sum()))
        s = s_next  # not detached
    with pytest.raises(ValueError, match="must be the leaves"):
        crossing(dni.g, chunks, 2, [w], 1.0)


@pytest.mark.parametrize("borders", [1, 3])
def test_without_s_another_text_begins(borders):
    """credit(None, ..) is what reset() and credit(None, ..) are: h_g is zero."""
    dni = Interface(lively(NeuronDNI()), borders=borders)
    dni.optimizer = torch.optim.SGD(dni.g.parameters(), 0.0)
    for _ in range(4):
        read_once(dni, leaves(2, 3))
    assert dni.memory[0].any()
    h = leaves(2, 3)
    gradients = []
    for reset in (False, True):
        if reset:
            dni.reset()
        read_once(dni, None, s_next=[c.clone() for c in h])
        s = [c.detach().requires_grad_() for c in h]
        read_once(dni, s)
        gradients.append(torch.stack([h[0].grad, s[0].grad]))
        h[0].grad = None
    assert torch.equal(*gradients)


def test_several_backward_passes_are_their_sum():
    """0.3 of the loss and 0.7 of it, or all of it twice: g learns the same."""
    errors = []
    for factors in ((1.0,), (0.3, 0.7), (1.0, 1.0)):
        torch.manual_seed(0)
        dni = Interface(lively(LayerDNI([3])))
        s = leaves(2, 3)
        s_next = [(2 * c).sin() for c in s]
        total = s_next[0].square().mean() + dni.credit(s, s_next, 10)
        for factor in factors:
            (factor * total).backward(retain_graph=True)
        errors.append(dni.learn().item())
    assert errors[1:] == pytest.approx(errors[:1] * 2, rel=1e-6)


def test_a_batch_may_be_empty():
    for g in (NeuronDNI(), LayerDNI([3, 2])):
        predicted, _ = g([torch.zeros(0, 3), torch.zeros(0, 2)])
        assert [tuple(d.shape) for d in predicted] == [(0, 3), (0, 2)]


def test_a_frozen_g_is_used_and_not_taught():
    dni = Interface(lively(LayerDNI([3])))
    dni.g.requires_grad_(False)
    before = [p.clone() for p in dni.g.parameters()]
    h = leaves(2, 3)
    assert read_once(dni, h).item() > 0 and h[0].grad.any()
    assert all(map(torch.equal, before, dni.g.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_over_neurons_are_in_float32_at_least(dtype):
    """Of 64 x 2000 neurons: what is injected, the penalty, g's error. So is a real chunk's zero.

    A GradScaler begins with 65536, which float16 does not hold.
    """
    at_least = torch.promote_types(dtype, torch.float32)

    class Ones(nn.Module):
        """Says 1 everywhere, and has learned what it can: 300."""

        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(()))

        def forward(self, s, memory):
            return [self.p.to(dtype).expand_as(c) for c in s], None

    g = Ones()
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.0))
    s = [torch.full((64, 2000), 3.0, dtype=dtype, requires_grad=True)]
    term = dni.credit(s, [2 * c for c in s], 10)
    n = 64 * 2000
    assert term.dtype == at_least
    assert term.item() == pytest.approx((n * 6 + 0.01 * n * 5 * 6) / 10, rel=2e-3)
    (30_000 * s[0].to(at_least).sum() + term).backward()
    target = 10 * 30_000 + 2 * (1 + 0.01 * 5)
    assert dni.learn().item() == pytest.approx((target - 1) ** 2, rel=2e-2)

    s = [c.detach().requires_grad_() for c in s]
    term = dni.credit(s, [2 * c for c in s], 10, synthetic=False)
    assert term.dtype == at_least and term == 0
    (65536.0 * term).backward()
    assert dni.loss_scale == 65536


@pytest.mark.parametrize("synthetic", [True, False], ids=["synthetic", "real"])
@pytest.mark.parametrize("make_g", [NeuronDNI, lambda: LayerDNI([128])], ids=["neuron", "layer"])
def test_autocast_to_float16_with_a_scaler_teaches_g_the_same(make_g, synthetic):
    """An nn.RNNCell under autocast has a state in float16. g and all its gradients have not.

    Left: φ's gradient under autocast, of a loss times 65536. Right: the same in float32.
    """
    cell = nn.RNNCell(3, 128)
    inputs = 0.1 * torch.randn(100, 3)
    start = (0.1 * torch.randn(100, 128)).half()
    found = []
    for on in (True, False):
        torch.manual_seed(1)
        g = lively(make_g(), 0.001)
        dni = Interface(g)
        seen = []
        dni.optimizer.register_step_pre_hook(
            lambda *_, g=g, seen=seen: seen.append(flatten([p.grad for p in g.parameters()]))
        )
        scaler = torch.amp.GradScaler("cpu", enabled=on)
        with torch.autocast("cpu", torch.float16, enabled=on):
            s = [(start if on else start.float()).detach().requires_grad_()]
            s_next = [cell(inputs, s[0])]
            assert s_next[0].dtype == s[0].dtype
            loss = s_next[0].float().square().mean()
            loss = loss + dni.credit(s, s_next, 10, synthetic)
        scaler.scale(loss).backward()
        found.append((dni.learn(), seen[0]))
    (error, half), (expected, full) = found
    assert error.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (half - full).norm() < 1e-3 * full.norm()


def test_no_gradient_of_g_outlives_learn():
    """g may be a part of the model: the model's optimiser and its clipping do not see φ.

    What the model's loss says of φ, a penalty on all weights here, has no part in g's step. Nor
    does learn() touch what g reads but does not own: here the model's embedding, and a part of
    g that its optimiser does not hold.
    """
    model = nn.ModuleDict(dict(embedding=nn.Embedding(5, 3), g=LayerDNI([3])))

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lively(model["g"])
            self.embedding = model["embedding"]
            self.fixed = nn.Parameter(torch.ones(3))

        def forward(self, s, memory):
            predicted, memory = self.inner(s, memory)
            return [d * self.fixed + self.embedding.weight[0] for d in predicted], memory

    g = Reading()
    inner = list(g.inner.parameters())
    dni = Interface(g, torch.optim.Adam(inner))
    optimizer = torch.optim.SGD([*model.parameters(), g.fixed], 0.1, weight_decay=0.1)
    before = flatten(inner).detach()
    taught = []
    dni.optimizer.register_step_pre_hook(lambda *_: taught.append(flatten([p.grad for p in inner])))
    for begin in (True, False, False):
        optimizer.zero_grad()
        s = None if begin else [torch.randn(2, 3).requires_grad_()]
        h = model["embedding"](torch.tensor([1, 2]))
        s_next = [h if begin else h + s[0]]
        loss = s_next[0].square().mean()
        if not begin:
            loss = loss + flatten(model.parameters()).square().sum()
        (loss + dni.credit(s, s_next, 6)).backward()
        of_embedding = model["embedding"].weight.grad.clone()
        if not begin:
            mse = (g([s[0].detach()], None)[0][0] - 6 * s[0].grad).square().mean()
            expected = flatten(grad(mse, inner))
        dni.learn()
        assert begin or torch.equal(taught[-1], expected)
        assert all(p.grad is None for p in inner)
        assert g.fixed.grad is None or not g.fixed.grad.any()
        assert torch.equal(model["embedding"].weight.grad, of_embedding)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        close(norm, of_embedding.norm())
        after = flatten(inner).detach()
        assert torch.equal(after, before) == begin  # learned where something was predicted
        optimizer.step()
        assert torch.equal(flatten(inner).detach(), after)
        before = after


@pytest.mark.parametrize("synthetic", [True, False], ids=["synthetic", "real"])
def test_a_state_that_a_chunk_does_not_read_has_the_gradient_zero(synthetic, monkeypatch):
    """A clockwork layer rests in some chunks. Where no state is read at all, learn() says so.

    Left: what g is taught. Right: nothing from the loss, and α δ^ where the state was handed on.
    """
    learned = watch_regression(monkeypatch)
    g = lively(LayerDNI([3, 4]))
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.1), alpha=0.7)
    for reads, keeps in ((True, True), (False, True), (False, False)):
        s = [torch.rand(2, 3).requires_grad_(), torch.rand(2, 4).requires_grad_()]
        first = s[0].sin()
        loss = first.sum()
        second = s[1] if keeps else first.sum(1, keepdim=True) * torch.ones(4)  # begins anew
        if reads:
            second = s[1].sin()
            loss = loss + second.sum()
        with torch.no_grad():
            future, _ = g([first, second])
        (loss / 10 + dni.credit(s, [first, second], 10, synthetic)).backward()
        error = dni.learn()
        back = s[1].cos() if reads else torch.full((2, 4), float(keeps))
        expected = reads * s[1].cos() + synthetic * 0.7 * future[1] * back
        predicted, target = learned[-1]
        close(target[1], expected.detach())
        close(error, (flatten(predicted) - flatten(target)).square().mean().detach())

    before = flatten(g.parameters()).detach()
    s = [torch.rand(2, 3).requires_grad_(), torch.rand(2, 4).requires_grad_()]
    s_next = [s[0].sin(), torch.ones(2, 4, requires_grad=True)]
    (math.inf * (s_next[0].sum() + dni.credit(s, s_next, 10, synthetic))).backward()
    assert math.isnan(dni.learn())  # after an infinite scale nothing is known, not even the zero
    assert torch.equal(flatten(g.parameters()), before)

    s = [torch.rand(2, 3).requires_grad_(), torch.rand(2, 4).requires_grad_()]
    new = [torch.rand(2, 3).requires_grad_(), torch.rand(2, 4).requires_grad_()]
    (flatten(new).sum() + dni.credit(s, [2 * c for c in new], 10, synthetic)).backward()
    with pytest.raises(RuntimeError, match="no gradient .* let the chunk read s"):
        dni.learn()


def test_the_truth_about_a_state_that_a_chunk_does_not_read():
    """Its gradient comes from the chunks after it alone: by hand, in one graph of three chunks."""
    weight = randn(4)

    def read(s, k):
        """The second layer rests in chunk 1."""
        first = (s[0] + s[1][:, :3]).sin() if k != 1 else s[0].sin()
        second = s[1] if k == 1 else (s[1] * weight).sin()
        loss = first.square().mean() + (second.mean() if k != 1 else 0.0)
        return [first, second], loss

    s_next = [randn(2, 3), randn(2, 4)]
    chunks = []
    truths = []
    for k in range(4):
        whole = [c.detach().requires_grad_() for c in s_next]
        s = whole
        later = 0.0
        for j in range(k, 4):
            s, loss = read(s, j)
            later = later + 10 * loss
        truths.append(list(grad(later, whole)))
        s = [c.detach().requires_grad_() for c in s_next]
        s_next, loss = read(s, k)
        chunks.append((s, s_next, loss))
    close(dni_module.true_gradients(chunks, 10), truths[1:])
    found = dni_module.true_gradients(chunks[:2], 10)  # nothing follows chunk 1
    close(found[0][1], torch.zeros(2, 4, **DOUBLE))


@SLOW
@COMPILER
@pytest.mark.parametrize("compile_g", [False, True])
def test_credit_and_learn_within_a_compiled_function(compile_g):
    """The whole step of a training compiled, graph breaks and all, is the plain step."""
    torch._dynamo.reset()
    found = []
    for compiled in (True, False):
        torch.manual_seed(1)
        read = Reader(nn.GRU)
        g = lively(NeuronDNI())
        if compiled and compile_g:
            g.compile(dynamic=True)
        dni = Interface(g)
        optimizer = torch.optim.SGD(read.parameters(), 0.1)

        def forward(chunk, s, synthetic, read=read, dni=dni):
            s_next, loss = read(chunk, s)
            return s_next, loss + dni.credit(s, s_next, 12, synthetic)

        def step(chunk, s, synthetic, optimizer=optimizer, dni=dni, forward=forward):
            optimizer.zero_grad()
            s_next, loss = forward(chunk, s, synthetic)
            loss.backward()
            error = dni.learn()
            optimizer.step()
            return s_next, error

        if compiled:
            step = torch.compile(step)
        text = torch.randint(7, (25, 3))
        s_next = [torch.zeros(3, 6)]
        for k in range(6):
            s = [c.detach().requires_grad_() for c in s_next]
            s_next, error = step(text[4 * k : 4 * k + 5], s, k != 3)
        found.append([error, *s_next, *read.parameters(), *g.parameters()])
    close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_penalty_holds_what_is_outside():
    """What is injected where |c| <= 1 is α δ^, bit for bit.

    Where |c| > 1, penalty (|c| - 1) towards the inside is added.
    """
    c = torch.tensor([[-3.0, -1.0, -0.5, 0.0, 0.999, 1.5]]).requires_grad_()
    g = lively(NeuronDNI())
    with torch.no_grad():
        predicted = g([c])[0][0]
    for penalty in (0.0, 0.01):
        found = grad(Interface(g, alpha=0.7, penalty=penalty).credit(None, [c + 0], 5), c)[0]
        close(found, 0.7 / 5 * predicted + penalty / 5 * torch.tensor([[-2.0, 0, 0, 0, 0, 0.5]]))
        assert torch.equal(found[0, 1:5], (0.7 / 5 * predicted)[0, 1:5])


def plain_losses(windows=(1, 1)):
    """tiny_model without penalties, its chunks, and θ."""
    model, chunks = tiny_model(windows)
    model.activation = 0.0
    model.temporal = 0.0
    return model, chunks, list(model.parameters())


def read_apart(model, chunks):
    """The chunks as train.py reads them to be measured."""
    inputs = torch.cat([x for x, _ in chunks])
    targets = torch.cat([y for _, y in chunks])
    return train.read_chunks(model, inputs, targets, len(chunks[0][0]))[0]


def test_agreement_is_with_the_truth():
    """Cosine and R² by hand, from the gradient of all losses after each border; nan without one.

    Left: chunks with a graph each. Right: one graph of the whole text.
    """
    model, chunks, _ = plain_losses()
    losses, states = one_graph(model, chunks)
    g = lively(NeuronDNI().double())
    memory = None
    guesses = []
    truths = []
    for k in range(2):
        predicted, memory = g(c_of(states[k]), memory)
        guesses.append(flatten(predicted))
        later = grad(sum(losses[k + 1 :]), c_of(states[k]), retain_graph=True)
        truths.append(8 * flatten(later))  # T B
    p = torch.cat(guesses)
    t = torch.cat(truths)
    expected = [
        F.cosine_similarity(p, t, 0).item(),
        (1 - (p - t).square().sum() / t.square().sum()).item(),
    ]
    read = read_apart(model, chunks)
    assert agreement(g, read, 8) == pytest.approx(expected)
    assert all(map(math.isnan, agreement(g, read[:1], 8)))
    copies = [([c + 0 for c in s or []], s_next, loss) for s, s_next, loss in read]
    with pytest.raises(ValueError, match="the leaves that the chunk read"):
        agreement(g, copies, 8)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_an_oracle_agrees_with_any_cell(kind):
    """A g that is always right has cosine 1 and R² 1, even where a state is an output too.

    The oracle reads all text after a border again, in one graph, from a copy of the state there.
    """
    T = 3
    B = 2
    embedding = nn.Embedding(7, 5).double()
    cell = kind(5, 6).double()
    decoder = nn.Linear(6, 7).double()
    text = torch.randint(7, (4 * T + 1, B))

    def read(s, start, stop):
        """The states after these steps, and the mean loss."""
        loss = 0.0
        for x, y in zip(text[start:stop], text[start + 1 :]):
            s = cell(embedding(x), s if kind is nn.LSTMCell else s[0])
            s = list(s) if kind is nn.LSTMCell else [s]
            loss = loss + F.cross_entropy(decoder(s[0]), y, reduction="sum")
        return s, loss / (T * B)

    s_next = [torch.zeros(B, 6, **DOUBLE)] * (2 if kind is nn.LSTMCell else 1)
    chunks = []
    answers = []
    for k in range(4):
        s = [c.detach().requires_grad_() for c in s_next]
        _, rest = read(s, k * T, 4 * T)
        answers.append([T * B * d for d in grad(rest, s)])
        s = [c.detach().requires_grad_() for c in s_next]
        s_next, loss = read(s, k * T, k * T + T)
        chunks.append((s, s_next, loss))
    truth = iter(answers[1:])
    assert agreement(lambda s, memory: (next(truth), None), chunks, T * B) == pytest.approx((1, 1))


def cut(state):
    """The state without the graph of x_prev, which crosses a border in one graph otherwise."""
    return [(c, x_prev.detach()) for c, x_prev in state]


def one_graph_and_apart(model, chunks, parameters):
    """The gradient of Σ L_k in one graph with x_prev cut, and that with every border cut."""
    state = None
    total = 0.0
    apart = 0.0
    for x, y in chunks:
        nll, _, new_state = model(x, y, state)
        total = total + nll
        state = cut(new_state)
    for k, (x, y) in enumerate(chunks):
        before = None
        for earlier, _ in chunks[:k]:  # the words before, read again and forgotten
            before = train.detach_state(model.logits(earlier, before)[1])
        nll, _, _ = model(x, y, before)
        apart = apart + flatten(grad(nll, parameters))
    return flatten(grad(total, parameters)), apart


@pytest.mark.parametrize("windows", [(1, 1), (2, 1)], ids=["window 1", "window 2"])
def test_injected_and_lost_by_hand(windows):
    """truncated, lost and injected, the three gradients of θ, for three chunks.

    Left: `crossing`, chunk by chunk. Right: lost is what one graph has and chunks cut apart have
        not, though
    x_prev is cut in both. Injected comes from the whole Jacobian of each border's state, as a
    matrix, times α and what g says there.
    """
    alpha = 0.7
    T_B = 8
    model, chunks, parameters = plain_losses(windows)
    g = lively(NeuronDNI().double())
    left = crossing(g, read_apart(model, chunks), T_B, iter(parameters), alpha)

    whole, apart = one_graph_and_apart(model, chunks, parameters)
    names = [name for name, _ in model.named_parameters()]
    injected = 0.0
    memory = None
    state = None
    for x, _ in chunks[:2]:  # one border ends each

        def state_after(*values, x=x, state=state):
            of_theta = dict(zip(names, values))
            _, after = torch.func.functional_call(model, of_theta, (x, x, state))[1:]
            return flatten(c_of(after))

        rows = torch.autograd.functional.jacobian(state_after, tuple(parameters))
        jacobian = torch.cat(
            [row.flatten(1) for row in rows], 1
        )  # ds/dθ, (N, number of parameters)
        state = train.detach_state(model.logits(x, state)[1])
        predicted, memory = g(c_of(state), memory)
        injected = injected + alpha / T_B * jacobian.T @ flatten(predicted)
    close(left, (apart, whole - apart, injected))
    assert all(part.norm() > 1e-3 * apart.norm() for part in left)  # none is empty


def test_a_g_that_is_right_injects_what_is_lost():
    """With α = 1. And a text without a border loses nothing."""
    model, chunks, parameters = plain_losses()
    losses, states = one_graph(model, chunks)
    answers = []
    for k in range(2):
        later = grad(sum(losses[k + 1 :]), c_of(states[k]), retain_graph=True)
        answers.append([8 * d for d in later])
    truth = iter(answers)
    read = read_apart(model, chunks)
    _, lost, injected = crossing(lambda s, memory: (next(truth), None), read, 8, parameters, 1.0)
    close(injected, lost)
    _, lost, injected = crossing(NeuronDNI().double(), read[:1], 8, parameters, 1.0)
    assert not lost.any() and not injected.any()


@pytest.mark.parametrize("training", [True, False])
def test_what_log_csv_says_of_a_g(training):
    """dni_injected and dni_lost are norms over that of the truncated gradient, without dropout.

    The model is given back in the mode in which it came.
    """
    model, _, parameters = plain_losses()
    model.dropout_input = 0.5
    model.train(training)
    g = lively(NeuronDNI().double())
    settings = small_settings("dni", batch_size=8, chunk=4, dni_alpha=0.7)
    tokens = torch.randint(11, (45,))
    found = train.measure(model, g, tokens, settings)
    assert model.training == training

    model.eval()
    inputs, targets = data.streams(tokens, 2)
    chunks = list(zip(inputs[:16].split(4), targets[:16].split(4)))
    whole, apart = one_graph_and_apart(model, chunks, parameters)
    read = read_apart(model, chunks)
    _, _, injected = crossing(g, read, 8, parameters, 0.7)
    lost = (whole - apart).norm() / apart.norm()
    injected = injected.norm() / apart.norm()
    cosine, r2 = agreement(g, read, 8)
    expected = dict(
        dni_cosine=cosine, dni_r2=r2, dni_injected=injected.item(), dni_lost=lost.item()
    )
    assert found == pytest.approx(expected)


@SLOW
def test_an_lstm_is_held_by_the_penalty(monkeypatch):
    """With it an LSTM learns to recall across a border, and its c stays small.

    Without it c runs away. Then g agrees with its own targets, and not with the truth.
    """
    train_step = train.train_step
    steps = []

    def watched(model, optimizer, dni, inputs, targets, state, *rest):
        steps.append((model, dni.g, inputs, targets, state))
        return train_step(model, optimizer, dni, inputs, targets, state, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    learned = watch_regression(monkeypatch)
    case = dict(counts="answers", arm="linear", rate=1e-4, borders=1, seed=1, cell="lstm")
    for penalty in (0.01, 0.0):
        [row] = recall.one({**case, "penalty": penalty}, updates=1200, alpha=1.0)
        _, own_r2 = dni_module.compare(*learned[-1])
        model, g, _, _, state = steps[-4]
        inputs = torch.cat([step[2] for step in steps[-4:]])
        targets = torch.cat([step[3] for step in steps[-4:]])
        chunks, _ = train.read_chunks(model, inputs, targets, recall.T, state)
        cosine, r2 = agreement(g, chunks, inputs.numel() // 4)
        if penalty:
            assert row["accuracy"] > 0.9 and row["size"] < 2
        else:
            assert row["accuracy"] < 0.5 and row["size"] > 100
            assert own_r2 > 0.9 and cosine < 0.5 and r2 < 0.5


def test_wrong_calls_of_the_interface_say_what_to_do():
    """A call out of turn, or with a second state that would get no gradient, is refused."""

    def chunk(
        dni, B=2, start=lambda c: c.requires_grad_(), end=lambda c: 2 * c, forget=False, **options
    ):
        s = [torch.randn(B, 4).requires_grad_(), start(torch.randn(B, 3))]
        s_next = [2 * s[0], end(s[1])]
        credit = dni.credit(s, s_next, 10, **options)
        return sum(c.sum() for c in s_next) + (0.0 if forget else credit)

    def refused(error, words, *steps):
        dni = Interface(NeuronDNI())
        for step in steps[:-1]:
            step(dni)
        with pytest.raises(error, match=words):
            steps[-1](dni)

    refused(RuntimeError, r"call credit\(\) and then backward\(\)", Interface.learn)
    refused(RuntimeError, r"call backward\(\) on loss \+ credit", chunk, Interface.learn)
    refused(RuntimeError, r"twice: call backward\(\) and learn\(\)", chunk, chunk)
    refused(
        ValueError,
        r"h_g has 14 neurons, s_next 28: call reset\(\)",
        lambda dni: chunk(dni).backward(),
        Interface.learn,
        lambda dni: chunk(dni, B=4),
    )
    for words, options in (
        (r"leaves: .* c.detach\(\).requires_grad_\(\)", dict(start=lambda c: c)),
        ("leaves", dict(start=lambda c: 2 * c.requires_grad_())),
        ("before detaching it, not under no_grad", dict(end=lambda c: (2 * c).detach())),
        (r"got \[.*\(2, 3\)\] and \[.*\(2, 2\)\]", dict(end=lambda c: c[:, :2])),
        (r"a QRNN.s \[c for c, _ in state\]", dict(end=lambda c: (2 * c, c))),
        (r"list\(h_n\)", dict(end=lambda c: 2 * c[None])),
    ):
        refused(ValueError, words, functools.partial(chunk, **options))
    refused(
        ValueError,
        r"list\(h_n\)",
        lambda dni: dni.credit(torch.ones(1, 2, 3), torch.ones(1, 2, 3), 10),
    )
    refused(
        RuntimeError,
        r"call backward\(\) on loss \+ credit",
        lambda dni: chunk(dni, forget=True).backward(),
        Interface.learn,
    )
    dni = Interface(NeuronDNI())
    dni.credit(None, [torch.randn(2, 3).requires_grad_()], 10).backward()
    assert dni.learn() is None
    dni.reset()
    assert chunk(dni, end=lambda c: (2 * c).detach(), synthetic=False).requires_grad and dni.memory
    dni.reset()  # forgets h_g and what is pending
    assert chunk(dni, B=4).requires_grad


# -------------------------------------------------------------------------- 4. trained but not used


@pytest.mark.parametrize("kind", ["neuron", "layer", "linear"])
def test_a_dni_trained_but_not_used_changes_nothing(kind):
    """While g only learns, every gradient of the model is BPTT's, bit for bit, dropout included.

    Once g is used, the gradients differ.
    """

    def gradients(mode, **changes):
        """Those of the model in four train_steps, each an "epoch"; Adam updates the weights."""
        s = small_settings(
            mode,
            embedding_size=8,
            hidden_size=12,
            dropout_weight=0.1,
            dropout_embedding=0.1,
            dni_kind=kind,
            **changes,
        )
        model, optimizer, dni = train.build(s, 30, "cpu")
        torch.manual_seed(0)  # of the dropout masks
        inputs, targets = data.streams(torch.arange(401) % 29, 5)
        state = None
        found = []
        for epoch, (x, y) in enumerate(zip(inputs.split(20), targets.split(20))):
            synthetic = train.gradient_at(s, 0, epoch) == "synthetic"
            _, state = train.train_step(model, optimizer, dni, x, y, state, synthetic, s.clip)
            found.append(flatten([p.grad for p in model.parameters()]))
        return found, dni

    bptt, _ = gradients("bptt")
    unused, dni = gradients("dni", dni_warmup=9.0)
    assert all(map(torch.equal, unused, bptt))
    last_layer = (dni.g.decode if kind == "neuron" else dni.g.mlps[0])[-1]
    assert any(p.any() for p in last_layer.parameters())  # it has learned
    for warmup in (0.0, 2.0):  # a new g says 0; used at once, it changes the third step
        used, _ = gradients("dni", dni_warmup=warmup)
        assert list(map(torch.equal, used, bptt)) == [True, True, False, False]


# ------------------------------------------------------------------------- 5. what a state can tell


def two_state_chain(stay):
    """{four words: their probability}

    A hidden 0 or 1 stays the same from word to word with probability `stay`.
    """

    def joint(words, hidden):  # a word is the hidden one, with 0.8
        moves = (stay if a == b else 1 - stay for a, b in itertools.pairwise(hidden))
        return (
            0.5
            * math.prod(moves)
            * math.prod(0.8 if w == h else 0.2 for w, h in zip(words, hidden))
        )

    strings = list(itertools.product((0, 1), repeat=4))
    return {words: sum(joint(words, hidden) for hidden in strings) for words in strings}


def expected_gradients(text, model):
    """Words 1 and 2 are read, then comes a border, then words 3 and 4 are predicted.

    text, model: chains, as of `two_state_chain`.

    The state s is -1 or 1 for word 2, plus θ = 0 times the same for word 1. From s, and from word 3
    for word 4, the model predicts what its own chain says when word 1 is unknown. Returns the mean
    of dL/ds for each value of s, times its probability, and the mean of the gradient of θ, all of
    which crosses the border.
    """

    def logit(known):  # of a 1, after these words from word 2
        zero, one = (
            sum(p for words, p in model.items() if words[1 : 2 + len(known)] == (*known, w))
            for w in (0, 1)
        )
        return math.log(one / zero)

    theta = torch.zeros((), **DOUBLE, requires_grad=True)
    of_s = [0.0, 0.0]
    of_theta = 0.0
    for (w1, w2, *future), p in text.items():
        s = 2 * w2 - 1 + theta * (2 * w1 - 1)
        loss = 0.0
        for k, word in enumerate(future):
            low = logit((0, *future[:k]))
            high = logit((1, *future[:k]))
            x = (low + high) / 2 + (high - low) / 2 * s  # `low` at s = -1, `high` at s = 1
            loss = loss - F.logsigmoid(x if word else -x)
        ds, dtheta = grad(loss, (s, theta))
        of_s[w2] += p * ds.item()
        of_theta += p * dtheta.item()
    return of_s, of_theta


def test_what_a_state_can_tell():
    """The section "What can g know?" of dni.py, by counting all texts of four words.

    A calibrated model: the mean of dL/ds given s is zero, so no g(s) beats zero, although
    truncation does lose a gradient. The same model on texts of another chain: the mean is not zero,
    so there is something to know.
    """
    model = two_state_chain(stay=0.9)
    of_s, of_theta = expected_gradients(model, model)
    assert of_s == pytest.approx([0.0, 0.0], abs=1e-12) and of_theta < -0.05
    of_s, _ = expected_gradients(two_state_chain(stay=0.6), model)
    assert of_s[0] < -0.04 and of_s[1] > 0.04


# ----------------------------------------------------- 6. the language model and its regularisation


def test_perplexity_by_hand():
    """evaluate() is minus the mean log-probability of a token, but for the first of each stream."""
    everywhere = (
        "dropout_input",
        "dropout_hidden",
        "dropout_output",
        "dropout_embedding",
        "dropout_weight",
    )
    model = LanguageModel(13, 4, 6, 2, **dict.fromkeys(everywhere, 0.5)).double()
    tokens = torch.randint(13, (40,))
    by_hand = 0.0
    for i in range(1, 40):  # a fresh pass over the whole past for each token
        logits, _ = model.eval().logits(tokens[:i, None])
        by_hand -= logits[-1, 0].softmax(0)[tokens[i]].log().item() / 39
    for chunk in (1, 7, 39, 200):
        assert train.evaluate(model.train(), tokens, 1, chunk=chunk) == pytest.approx(
            by_hand, rel=1e-12
        )
        assert model.training
    streams = [train.evaluate(model, tokens[i : i + 14], 1) for i in (0, 13, 26)]
    assert train.evaluate(model, tokens, 3) == pytest.approx(sum(streams) / 3, rel=1e-12)
    assert train.perplexity(1e9) == train.perplexity(700.0) < math.inf


def test_loss_and_its_penalties():
    """nll is the cross-entropy of logits().

    The penalties are AWD's two means, of the output after and before dropout (4.6).
    """
    model = LanguageModel(13, 4, 6, 2, dropout_output=0.5, activation=5.0, temporal=3.0).double()
    nn.init.constant_(model.decoder_bias[3:4].data, 200.0)
    tokens, targets = torch.randint(13, (2, 8, 3))
    results = []
    targets[2:4] = -100  # not counted
    for form in (
        lambda: model(tokens, targets),
        lambda: model.logits(tokens),
        lambda: model.read(tokens, None),
        lambda: model.float()(tokens, targets),
    ):
        torch.manual_seed(2)  # the same dropout masks
        results.append(form())
    (nll, penalty, _), (logits, _), (_, output, raw, _), (in_float32, *_) = results
    assert (output == 0).any() and raw.all()
    close(logits, output @ model.embedding.weight.double().T + model.decoder_bias.double())
    log_p = logits.log_softmax(-1).gather(-1, targets.clamp(0)[..., None])[..., 0]
    by_hand = -log_p[targets >= 0].mean()
    close([nll, in_float32.double()], [by_hand, by_hand], rtol=1e-5, atol=0)
    steps = sum(((b - a) ** 2).sum() for a, b in zip(raw, raw[1:]))
    close(penalty, 5 * (output**2).sum() / (8 * 3 * 4) + 3 * steps / (7 * 3 * 4))
    alone = model.eval().read(tokens[:1], None)[1]  # T = 1: no step to compare with
    close(model(tokens[:1], targets[:1])[1], 5 * (alone**2).mean())


def test_a_text_read_in_pieces_is_the_text_read_at_once():
    """logits() and the loss hand the state on, and begin with the one that they get."""
    model = LanguageModel(13, 4, 6, 2).double()
    tokens = torch.randint(13, (9, 3))
    targets = torch.randint(13, (9, 3))
    whole, last = model.logits(tokens)
    by_logits = None
    by_loss = None
    for start, stop in ((0, 1), (1, 4), (4, 9)):
        piece, by_logits = model.logits(tokens[start:stop], by_logits)
        nll, _, by_loss = model(tokens[start:stop], targets[start:stop], by_loss)
        close(piece, whole[start:stop])
        expected = F.cross_entropy(whole[start:stop].transpose(1, 2), targets[start:stop])
        close(nll, expected)
    close(by_logits, last)
    close(by_loss, last)
    fresh, _ = model.logits(tokens[4:9])
    assert (fresh - whole[4:9]).abs().max() > 1e-4  # without its state a piece says something else


def test_each_weight_is_dropped_for_itself():
    """No row, column, gate or half of a window shares its mask with another, nor two calls.

    A mask is seen by the weights that get no gradient.
    """
    layer = QRNNLayer(40, 50, window=2, weight_dropout=0.3)
    x = torch.randn(6, 5, 40)
    masks = []
    for _ in range(2):
        layer.weight.grad = None
        layer(x)[0].sum().backward()
        masks.append(layer.weight.grad != 0)  # (150, 80)
    first, second = masks
    share = first.float()
    for dim, n in ((0, 150), (1, 80)):  # columns, rows: means of n draws
        spread = (0.3 * 0.7 / n) ** 0.5
        means = share.mean(dim)
        assert (means - 0.7).abs().max() < 5 * spread
        assert 0.7 * spread < means.std() < 1.3 * spread
    z, f, o = first.chunk(3)
    before, now = first.chunk(2, 1)
    for one, other in ((z, f), (f, o), (z, o), (before, now), (first, second)):
        differ = (one != other).float().mean()
        assert differ == pytest.approx(2 * 0.3 * 0.7, abs=0.06)
    layer.eval()
    close(layer(x), layer(x), rtol=0, atol=0)  # no mask when evaluating


def test_each_dropout_is_in_its_place():
    """The embedding loses words, wherever they stand.

    The stack's input, that of each further layer and the stack's output lose neurons of a stream,
    the same at all steps of a chunk (locked), and others in each place and call. What is kept is
    divided by 1 - p. Weights that were dropped get no gradient.
    """
    s = small_settings(
        embedding_size=50,
        hidden_size=50,
        num_layers=4,
        dropout_embedding=0.4,
        dropout_input=0.3,
        dropout_hidden=0.2,
        dropout_output=0.1,
        dropout_weight=0.5,
    )
    model, _, _ = train.build(s, 60, "cpu")
    layers = model.rnn.layers
    tokens = torch.randint(60, (30, 40))
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs[0])))

    def read():
        """The tensors before each locked dropout, those after it, and the logits."""
        seen.clear()
        logits, output, raw, _ = model.read(tokens, None)
        assert raw is seen[-1][1]
        inputs, outputs = zip(*seen)
        return [model.embedding(tokens), *outputs], [*inputs, output], logits

    before, after, logits = read()
    logits.sum().backward()
    kept_words = (after[0] != 0).any(-1)  # (T, B)
    kept_of = [kept_words[tokens == word].double() for word in range(60)]
    assert all(kept.min() == kept.max() for kept in kept_of)  # a word everywhere, or nowhere
    assert sum(kept.mean() for kept in kept_of) / 60 == pytest.approx(0.6, abs=0.15)
    before[0] = before[0] * kept_words[..., None] / 0.6
    masks, rates = [(x != 0).any(0) for x in after], [0.3, 0.2, 0.2, 0.2, 0.1]  # (B, H) each
    close(after, [x * mask / (1 - p) for x, mask, p in zip(before, masks, rates)])
    zeros = [~mask for mask in masks] + [layer.weight.grad == 0 for layer in layers]
    assert [zero.double().mean() for zero in zeros] == pytest.approx(rates + [0.5] * 4, abs=0.05)
    first = layers[0]  # a window of 2; before x_1 is zero
    weight = first.weight * (first.weight.grad != 0) / 0.5
    z, f, o = F.linear(F.pad(after[0][0], (50, 0)), weight, first.bias).chunk(3, -1)
    h_1 = o.sigmoid() * (1 - f.sigmoid()) * z.tanh()  # by the weights that were kept
    close(before[1][0], h_1)
    again = [(x != 0).any(0) for x in read()[1]]
    for one, other in (
        *itertools.combinations(masks[1:4], 2),
        *zip(masks, again),
        masks[1].chunk(2),
    ):
        assert (one != other).double().mean() > 0.1  # another place, call, stream
    model.eval()
    before, after, _ = read()
    close(before, after, rtol=0, atol=0)


# --------------------------------------------------------------------------------- 7. warm restarts


def optimizer_with(*rates):
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(()))], "lr": rate} for rate in rates]
    )


def rates_of(schedule, moments):
    """[the rates of all groups at each moment]. None: one epoch later."""
    found = []
    for moment in moments:
        schedule.optimizer.step()
        schedule.step(moment)
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        assert schedule.get_last_lr() == found[-1]
    return found


@pytest.mark.parametrize(
    "base, mult, eta_min", [(5, 2, 0.0), (1, 2, 1e-5), (3, 1, 0.0), (2, 3, 1e-4)]
)
def test_sgdr_is_cosine_annealing_warm_restarts(base, mult, eta_min, tmp_path):
    """To the last bit PyTorch's, by whole epochs and by fractions.

    Also when resumed by a file or by last_epoch.
    """
    # (mult 3 only for these 60 epochs: at epoch 121 of base 1, PyTorch's logarithm is 4.999..)
    for moments in ([None] * 60, [i / 7 for i in range(420)]):
        theirs = CosineAnnealingWarmRestarts(optimizer_with(1e-3, 0.3), base, mult, eta_min)
        ours = SGDR(optimizer_with(1e-3, 0.3), base, mult, eta_min)
        assert ours.get_last_lr() == theirs.get_last_lr()
        expected = rates_of(theirs, moments)
        assert rates_of(ours, moments[:17]) == expected[:17]
        torch.save([ours.state_dict(), ours.optimizer.state_dict()], tmp_path / "s.pt")
        later = SGDR(optimizer_with(1.0, 1.0), 7)
        states = torch.load(tmp_path / "s.pt", weights_only=True)
        later.load_state_dict(states[0])
        later.optimizer.load_state_dict(states[1])
        assert later.run == ours.run and rates_of(later, moments[17:]) == expected[17:]
        if moments[0] is None:
            later = SGDR(ours.optimizer, base, mult, eta_min, last_epoch=17)
            assert [later.get_last_lr(), *rates_of(later, moments[18:])] == expected[17:]


def test_restarts_of_the_paper_and_of_the_authors_readme():
    """E_base = 5 restarts at 5, 15, 35, 75, 155, 315 (2.1: E_i = 2^i E_base).

    Runs of 160 epochs each, as in the authors' README, restart at 160 and 320.
    """
    for starts, options in (
        ((5, 15, 35, 75, 155, 315), dict(base=5)),
        ((160, 320), dict(base=160, mult=1)),
    ):
        found = [epoch for epoch in range(1, 330) if run_at(epoch, **options).elapsed == 0]
        assert tuple(found) == starts
    assert run_at(9.5, base=5) == (1, 4.5, 10)
    assert [run_at(e, base=0.5).index for e in (0, 0.49, 0.5, 1.49, 1.5)] == [0, 0, 1, 1, 2]
    for bad in (
        dict(epoch=-1),
        dict(epoch=math.inf),
        dict(epoch=math.nan),
        dict(base=0),
        dict(base=-1),
        dict(mult=0.9),
    ):
        with pytest.raises(ValueError):
            run_at(**{"epoch": 1, **bad})
    # Restarts summed in floating point, run by run, are restarts. So are their neighbouring floats.
    for base, mult in (0.1, 2), (0.1, 1), (1 / 3, 2), (0.7, 3), (0.2, 1.5):
        start = 0.0
        length = base
        for i in range(1, 16):
            start, length = start + length, length * mult
            neighbours = (math.nextafter(start, to) for to in (0, math.inf))
            for moment in (start, round(start, 14), *neighbours):
                run, elapsed, its_length = run_at(moment, base, mult)
                assert (
                    run == i
                    and 0 <= elapsed <= 1e-12 * start
                    and its_length == pytest.approx(length)
                )
            assert run_at(start * (1 - 1e-9), base, mult).index == i - 1


def test_bounds_of_each_run_and_a_rate_that_never_falls():
    """Run i falls from eta_max^i to eta_min^i, and the last bounds serve later runs.

    A constant rate is one run without end, bit for bit.
    """
    almost = 1 - 1e-9  # at 2 and 6 runs 1 and 2 begin
    for high, low, expected in (
        ([1, 0.5], [0.1, 0], [1, 0.55, 0.1, 0.5, 0.25, 0, 0.5, 0.25]),
        (3, 1, [3, 2, 1, 3, 2, 1, 3, 2]),
        (None, (0, 1), [2, 1, 0, 2, 1.5, 1, 2, 1.5]),
    ):
        schedule = SGDR(optimizer_with(2.0), 2, eta_max=high, eta_min=low)
        found = rates_of(schedule, (0, 1, 2 * almost, 2, 4, 6 * almost, 6, 10))
        assert [rate for (rate,) in found] == pytest.approx(expected)
    schedule = SGDR(optimizer_with(torch.tensor(2.0), 1.0), 10)
    tensor = schedule.optimizer.param_groups[0]["lr"]  # filled in place, as PyTorch does
    schedule.step(5)
    assert schedule.optimizer.param_groups[0]["lr"] is tensor and tensor == 1
    assert schedule.get_last_lr() == [1, 0.5]
    schedule.step()
    assert schedule.last_epoch == 6
    for mode in ("bptt", "dni"):
        schedule = train.make_schedule(small_settings(mode), optimizer_with(0.1))
        assert rates_of(schedule, (0, 1 / 3, 5, 1e9)) == [[0.1]] * 4 and schedule.run.index == 0


def test_equal_bounds_are_a_constant_rate():
    """Bit for bit, in each run, whether the bounds are given by run or once."""
    for high, low, first, later in (
        (0.3, 0.3, 0.3, 0.3),
        ([0.3, 0.7], (0.3, 0.7), 0.3, 0.7),
        (None, 0.1, 0.1, 0.1),  # the optimiser's own rate
    ):
        schedule = SGDR(optimizer_with(0.1), 2, eta_max=high, eta_min=low)
        assert rates_of(schedule, (0, 0.7, 1.9)) == [[first]] * 3
        assert rates_of(schedule, (2, 3.3, 6, 13.9)) == [[later]] * 4


def test_a_refused_step_changes_nothing():
    """Neither the clock, nor a rate, nor what the schedule says of them."""

    def all_of(schedule):
        groups = [{**group, "lr": float(group["lr"])} for group in schedule.optimizer.param_groups]
        return {**schedule.state_dict(), "rates": schedule.get_last_lr()}, schedule.run, groups

    schedule = SGDR(optimizer_with(torch.tensor(2.0), 1.0), 10)
    schedule.step(5)
    before = all_of(schedule)
    for bad in (-1, -1e-9, math.inf, math.nan):
        with pytest.raises(ValueError, match="epoch >= 0"):
            schedule.step(bad)
        assert all_of(schedule) == before
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(()))], "lr": 3.0})
    before = all_of(schedule)
    for epoch in (None, 7):
        with pytest.raises(ValueError, match="3 groups, and SGDR was made for 2"):
            schedule.step(epoch)
        assert all_of(schedule) == before
    del schedule.optimizer.param_groups[2]
    schedule.step()
    assert schedule.run == (0, 6, 10)
    assert schedule.get_last_lr() == pytest.approx([1 + math.cos(0.6 * math.pi), 0.345], abs=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(eta_max=[]), r"eta_max: .* got \[\]"),
        (dict(eta_min=()), r"eta_min: .* got \(\)"),
        (dict(eta_max=np.array([])), "eta_max"),
        (dict(eta_max=[[0.1, 0.2]]), "eta_max"),
        (dict(eta_min=math.nan), "eta_min"),
        (dict(eta_min=-1e-3), "eta_min"),
        (dict(eta_max=[0.1, -0.1]), "eta_max"),
        (dict(eta_max=[0.1, math.inf]), "eta_max"),
        (dict(base=math.nan), "base > 0"),
        (dict(mult=math.nan), "mult >= 1"),
    ],
    ids=str,
)
def test_bounds_that_are_no_numbers_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SGDR(optimizer_with(0.1), **options)


def test_a_checkpoint_holds_pythons_numbers(tmp_path):
    """Whatever numbers were given, torch.load's default reads them. The rates are the same."""
    arguments = (5, 2, [0.1, 0.2], [1.0, 0.5], 1.5, 0.25)
    found = []
    for number in (float, np.float64, np.float32, torch.tensor):
        base, mult, low, high, moment, lr = (
            [number(x) for x in value] if isinstance(value, list) else number(value)
            for value in arguments
        )
        if number is not float:
            low = np.array([float(x) for x in low])  # a whole array, and a list of numbers
        schedule = SGDR(optimizer_with(lr), base, mult, low, high)
        schedule.step(moment)
        schedule.step()
        torch.save(schedule.state_dict(), tmp_path / "s.pt")
        state = torch.load(tmp_path / "s.pt")
        later = SGDR(optimizer_with(1.0), 7)
        later.load_state_dict(state)
        assert later.run == schedule.run == (0, 2.5, 5)
        found.append((state, schedule.get_last_lr()))
    for state, rates in found[1:]:
        assert state.keys() == found[0][0].keys()
        assert rates == pytest.approx(found[0][1], rel=1e-6)  # (np.float32 has rounded 0.1)
    with torch.device("meta"):
        assert SGDR(optimizer_with(0.1), eta_min=[0.05]).eta_min == [0.05]


@pytest.mark.parametrize(
    "script",
    ["sgdr.py", pytest.param("qrnn.py", marks=SLOW), pytest.param("dni.py", marks=SLOW)],
)
def test_a_pipe_that_nobody_reads_is_no_error(script):
    """As in `python sgdr.py | head -1`, whose pipe closes early."""
    if not hasattr(signal, "SIGPIPE"):
        pytest.skip("no SIGPIPE")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", HERE / script]
    ended = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=ONE_THREAD, text=True
    )
    os.close(writer)
    assert ended.returncode == -signal.SIGPIPE
    assert ended.stderr == ""


@SLOW
def test_a_terminal_without_greek_letters_is_no_error():
    """Of dni.py's first lines one speaks of δ."""
    environment = {**ONE_THREAD, "PYTHONIOENCODING": "ascii"}
    running = subprocess.Popen(
        [sys.executable, "-u", HERE / "dni.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    lines = [running.stdout.readline() for _ in range(5)]
    running.terminate()
    _, errors = running.communicate()
    assert "?, the gradient of the border's state" in lines[3]
    assert errors == ""


# ------------------------------------------------------------------------------------------ 8. data


def spelt(corpus, split):
    """A split of a corpus as one line of words."""
    return " ".join(corpus.vocabulary[token] for token in getattr(corpus, split))


def corpus_of(train_text, valid="a", test="a", min_count=1):
    """A Corpus of three texts with one line each."""
    texts = dict(train=train_text, valid=valid, test=test)
    return data.from_lines("x", {split: [text.split()] for split, text in texts.items()}, min_count)


def write_files(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def canonical(monkeypatch, texts, url="file:///nowhere"):
    """Take `texts`, {(corpus, split): text}, for the canonical files, to be had from `url`."""
    for name in {name for name, _ in texts}:
        hashes = {
            split: hashlib.sha256(texts[name, split].encode()).hexdigest() for split in data.SPLITS
        }
        monkeypatch.setitem(data.DOWNLOADS, name, (url + "/{split}", hashes))


@pytest.mark.skipif(
    not os.environ.get(data.ENVIRONMENT), reason=f"{data.ENVIRONMENT} names no folder"
)
@pytest.mark.parametrize(
    "name, counts",
    [
        ("ptb", (929_589, 73_760, 82_430, 10_000)),
        pytest.param("wt2", (2_088_628, 217_646, 245_569, 33_278), marks=SLOW),
        pytest.param("ptb-chars", (5_017_482, 393_042, 442_423, 50), marks=SLOW),
    ],
)
def test_counts_of_the_canonical_corpora(name, counts, capsys):
    """Files of the recorded SHA-256 have the literature's numbers of tokens and words.

    PTB's unigram perplexity is 639.
    """
    corpus = data.load_corpus(name)
    lengths = [len(getattr(corpus, split)) for split in data.SPLITS]
    assert (*lengths, len(set(corpus.vocabulary))) == counts
    assert name != "ptb" or round(data.unigram_perplexity(corpus)) == 639
    assert "not the canonical" not in capsys.readouterr().err


@pytest.mark.parametrize("n, B", [(101, 4), (104, 4), (5, 4), (50, 1), (61_139, 20)])
def test_streams_lose_nothing_but_the_remainder(n, B):
    """A target is the token after its input. The streams together are the text.

    Chunks longer than the streams, of L + 1 steps, are refused.
    """
    L = (n - 1) // B
    inputs, targets = data.streams(torch.arange(n), B, L)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs.t().flatten(), torch.arange(L * B))
    assert n - 1 - L * B < B
    why = f"too few for {B} streams.*less than one chunk of {L + 1};"
    with pytest.raises(data.UserError, match=why):
        data.streams(torch.arange(n), B, L + 1)


def test_the_picture_of_the_streams():
    """The alphabet in the docstring of `streams` is what `streams` makes of it."""
    inputs, targets = data.streams(torch.arange(26), 6)
    rows = [" ".join(chr(97 + letter) for letter in row) for row in torch.cat([inputs, targets], 1)]
    drawn = re.findall(r"^ +((?:\w +){11}\w)$", data.streams.__doc__, re.M)
    assert [" ".join(row.split()) for row in drawn] == rows


def test_the_vocabulary_is_by_count_then_by_first_use():
    """Counts and first uses are those of train alone. A slow sort gives the same order.

    Here the order by count is not that of first use, and words of equal count stand neither in the
    order of the alphabet, nor in its reverse, nor in that of their last use.
    """
    text = "e b d d b a c c c"
    corpus = corpus_of(text, valid="a a a a d d d c", test="a a d d")
    assert corpus.vocabulary == "c b d e a <eos>".split()
    words = [*text.split(), "<eos>"]
    slow = sorted(set(words), key=words.index)
    slow.sort(key=words.count, reverse=True)
    assert corpus.vocabulary == slow
    assert spelt(corpus, "train").split() == words


@pytest.mark.parametrize(
    "text, min_count, vocabulary, valid",
    [
        ("a <unk> a b", 1, "a <unk> b <eos>", "<unk> b <eos>"),
        ("a a b", 1, "a b <eos> <unk>", "<unk> b <eos>"),
        ("a b b a", 2, "a b <eos> <unk>", "<unk> b <eos>"),
        ("a a a b b", 3, "a <eos> <unk>", "<unk> <unk> <eos>"),
    ],
)
def test_new_and_rare_words_share_one_unk(text, min_count, vocabulary, valid):
    """It is that of train, where train has one. <eos> is never rare."""
    corpus = corpus_of(text, "new b", "newer", min_count)
    assert " ".join(corpus.vocabulary) == vocabulary
    assert spelt(corpus, "valid") == valid


def test_unigram_perplexity_by_hand():
    """1 / the geometric mean of the shares in train.

    Where a split has words that train lacks, one is added to every count.
    """
    corpus = corpus_of("a a b", valid="a b", test="a z")
    found = [data.unigram_perplexity(corpus, split) for split in ("valid", "test")]
    all_seen = (2 / 4 * 1 / 4 * 1 / 4) ** (-1 / 3)
    one_new = (3 / 8 * 1 / 8 * 2 / 8) ** (-1 / 3)
    assert found == pytest.approx([all_seen, one_new])


def test_what_is_said_of_a_text():
    """Its length, its words, the unigram perplexity of TEST, and the share of <unk> in each split.

    By hand: train is a a b <unk> <eos>, and the shares in it of a, b, <unk>, <eos> are 2/5 and 1/5
    three times.
    """
    corpus = corpus_of("a a b <unk>", valid="a y y", test="b b a z")
    corpus.facts = {"perplexity floor": 1.23456}
    unigram = (1 / 5 * 1 / 5 * 2 / 5 * 1 / 5 * 1 / 5) ** (-1 / 5)
    assert data.describe(corpus) == [
        "x: 5 training tokens, vocabulary 4, "
        f"unigram test perplexity {unigram:.1f}; "
        "<unk>: 20.0% of train, 50.0% of valid, 20.0% of test",
        "perplexity floor 1.2346",
    ]
    without = data.describe(corpus_of("a b", "a", "b"))
    assert without[0].endswith("<unk>: 0.0% of train, 0.0% of valid, 0.0% of test")


def test_the_fingerprint_tells_texts_apart():
    """Any other word, order or length, of any split or of the vocabulary, is another text.

    The same text under another name is the same.
    """
    usual = [torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0])]
    words = ["a", "b", "c"]
    corpora = [data.Corpus("x", words, *usual)]
    corpora.append(data.Corpus("x", ["b", "a", "c"], *usual))
    corpora.append(data.Corpus("x", ["a", "b", "d"], *usual))
    for i in range(3):
        other_word = usual[i].clone()
        other_word[0] += 1
        longer = torch.cat([usual[i], usual[i][-1:]])
        for changed in (other_word, usual[i].flip(0), usual[i][:-1], longer):
            corpora.append(data.Corpus("x", words, *usual[:i], changed, *usual[i + 1 :]))
    all_tokens = torch.cat(usual)
    corpora.append(data.Corpus("x", words, *all_tokens.split([3, 4, 3])))
    corpora.append(data.Corpus("x", words, *all_tokens.split([4, 2, 4])))
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    copies = [tokens.clone() for tokens in usual]
    assert data.Corpus("y", list(words), *copies).fingerprint() == corpora[0].fingerprint()


def test_a_folder_is_read(tmp_path, monkeypatch):
    """<eos> ends every line, empty ones too. A BOM and the CR of Windows are no words.

    The characters of ptb are its text, with _ for a space.
    """
    windows = b"\xef\xbb\xbfa b a\r\n\r\nc\r\n"
    write_files(tmp_path, {"train.txt": windows, "valid.txt": "a d\n", "test.txt": "c c"})
    corpus = data.load_corpus(str(tmp_path), min_count=2)
    assert spelt(corpus, "train") == "a <unk> a <eos> <eos> <unk> <eos>"
    corpus = data.load_corpus(str(tmp_path))
    assert corpus.name == tmp_path.name
    assert spelt(corpus, "train") == "a b a <eos> <eos> c <eos>"
    assert spelt(corpus, "valid") == "a <unk> <eos>"
    assert spelt(corpus, "test") == "c c <eos>"
    canonical(monkeypatch, {("ptb", split): "the end\nof it\n" for split in data.SPLITS})
    write_files(tmp_path, {f"ptb.{split}.txt": "the end\nof it\n" for split in data.SPLITS})
    characters = data.load_corpus("ptb-chars", tmp_path)
    assert spelt(characters, "test") == "t h e _ e n d <eos> o f _ i t <eos>"


@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize(
    "text, mark",
    [("a b <eos>\nb a <eos>\n", "<eos>"), ("a b\nb </s>", "</s>"), ("a\n\na <EOS> \r\n", "<EOS>")],
)
def test_a_text_that_marks_its_ends_is_refused(split, text, mark, tmp_path):
    """With a second <eos> in each line, one word of each would cost nothing. The line names it all.

    Within a line <eos> is a word, as it is in a text that is one long line.
    """
    texts = {f"{name}.txt": "a <eos> b\nb a\n" for name in data.SPLITS}
    write_files(tmp_path, texts)
    assert spelt(data.load_corpus(str(tmp_path)), split) == "a <eos> b <eos> b a <eos>"
    write_files(tmp_path, {f"{split}.txt": text})
    with pytest.raises(data.UserError, match=f"{split}.txt ends line .*remove {mark}") as refusal:
        data.load_corpus(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "layout",
    [
        ("ptb.{}.txt", "wiki.{}.tokens"),
        ("{}.txt", "wt2/{}.txt"),
        ("ptb/{}.txt", "{}.txt"),
        ("ptb/{}.txt", "wikitext-2/{}.txt"),
        ("ptb/ptb.{}.txt", "wikitext-2/wiki.{}.tokens"),
    ],
)
def test_the_right_files_are_found(layout, tmp_path, monkeypatch, capsys):
    """Of two corpora side by side each name finds its own, in any layout."""
    texts = {(name, split): f"{name} {split}\n" for name in data.DOWNLOADS for split in data.SPLITS}
    canonical(monkeypatch, texts)
    places = dict(zip(("ptb", "wt2"), layout))
    files = {places[name].format(split): text for (name, split), text in texts.items()}
    write_files(tmp_path, files)
    for name in data.DOWNLOADS:
        corpus = data.load_corpus(name, tmp_path)
        for split in data.SPLITS:
            assert spelt(corpus, split).replace("<unk>", split) == f"{name} {split} <eos>"
    assert not capsys.readouterr().err


def test_files_that_are_not_canonical(tmp_path, monkeypatch, capsys):
    """Such a file is read where its place names the corpus, with a note. A canonical one comes
    first, wherever it lies. A file whose place names nothing is not taken: it may be anything.
    """
    texts = {("ptb", split): f"ptb {split}\n" for split in data.SPLITS}
    canonical(monkeypatch, texts)
    write_files(tmp_path, {f"{split}.txt": text for (_, split), text in texts.items()})
    write_files(tmp_path, {"ptb/train.txt": "strange", "ptb.valid.txt": "strange"})
    assert spelt(data.load_corpus("ptb", tmp_path), "train") == "ptb train <eos>"
    assert not capsys.readouterr().err

    write_files(tmp_path, {"train.txt": "stranger"})
    assert spelt(data.load_corpus("ptb", tmp_path), "train") == "strange <eos>"
    note = f"note: {tmp_path / 'ptb' / 'train.txt'} is not the canonical file\n"
    assert capsys.readouterr().err == note

    (tmp_path / "ptb" / "train.txt").unlink()
    with pytest.raises(data.UserError, match="could not download train.txt from file:///nowhere"):
        data.load_corpus("ptb", tmp_path)


def test_which_folder_holds_the_files(tmp_path, monkeypatch):
    """The one that is named, else $QRNN_DATA, else corpora/ beside data.py. ~ is one's home."""
    texts = {}
    for place in ("named", "environment", "home/own", "beside/corpora"):
        for split in data.SPLITS:
            texts[f"{place}/ptb/{split}.txt"] = place
    write_files(tmp_path, texts)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "beside" / "data.py"))
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))

    def first_word(data_dir=None):
        return spelt(data.load_corpus("ptb", data_dir), "train").split()[0]

    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "environment"))
    assert first_word(tmp_path / "named") == "named"
    assert first_word("~/own") == "home/own"
    assert first_word() == "environment"
    monkeypatch.setenv(data.ENVIRONMENT, "~/own")
    assert first_word() == "home/own"
    monkeypatch.delenv(data.ENVIRONMENT)
    assert first_word() == "beside/corpora"
    assert spelt(data.load_corpus("~/own/ptb"), "test") == "home/own <eos>"


def test_downloads_are_checked_and_done_once(tmp_path, monkeypatch):
    """A corrupted or missing file, or a host that does not answer, is refused in one line.

    The line has the address and the way out. Nothing is left. What was downloaded is not asked for
    again.
    """
    texts = {("ptb", split): f"the {split} text\n" for split in data.SPLITS}
    web = tmp_path / "web"
    target = tmp_path / "deep" / "down" / "train.txt"
    write_files(web, {split: text for (_, split), text in texts.items()})
    write_files(web, {"bad": "the train texT\n"})
    canonical(monkeypatch, texts, web.as_uri())
    for bad, why in (
        (f"{web.as_uri()}/bad", "hash"),
        (f"{web.as_uri()}/missing", "No such file"),
        ("http://127.0.0.1:9/", "refused"),
    ):
        with pytest.raises(data.UserError, match=why) as refusal:
            data.download(bad, target, data.DOWNLOADS["ptb"][1]["train"])
        message = str(refusal.value)
        assert "\n" not in message
        for part in (bad, data.ENVIRONMENT, str(target)):
            assert part in message
        assert list(tmp_path.iterdir()) == [web]
    first = data.load_corpus("ptb", tmp_path / "here")
    shutil.rmtree(web)
    assert data.load_corpus("ptb", tmp_path / "here").fingerprint() == first.fingerprint()
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["test.txt", "train.txt", "valid.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route"),
        TimeoutError("timed out"),
        RuntimeError("invalid hash"),
        http.client.IncompleteRead(b"half"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_a_download_has_a_time_limit(error, tmp_path, monkeypatch):
    """A host that is silent for 30 seconds is given up. The program's own limit is put back.

    Every error of a network is told in one line. Ctrl-C stays what it is.
    """
    limits = []

    def failing(url, path, expected):
        limits.append(socket.getdefaulttimeout())
        Path(path).write_text("half")
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", failing)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else data.UserError
    before = socket.getdefaulttimeout()
    for own_limit in (None, 7.0):
        socket.setdefaulttimeout(own_limit)
        try:
            with pytest.raises(expected):
                data.download("http://x/y", tmp_path / "deep" / "y.txt", "0")
            assert socket.getdefaulttimeout() == own_limit
        finally:
            socket.setdefaulttimeout(before)
    assert limits == [30, 30]
    assert not list(tmp_path.iterdir())


def pydoc_of(topics, monkeypatch):
    """`pydoc` with these topics, {title: text}, in place of Python's. Its splits as words."""
    module = types.SimpleNamespace(topics=topics)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    return {split: spelt(data.pydoc(), split) for split in data.SPLITS}


def test_pydoc_is_large_enough():
    """Python's own manual is enough to learn from. Train has each word twice or more."""
    corpus = data.load_corpus("pydoc")
    assert len(corpus.train) > 40_000
    assert min(len(corpus.valid), len(corpus.test)) > 4_000
    assert {"the", "statement", "<eos>", "<unk>"} < set(corpus.vocabulary)
    assert corpus.train.bincount().min() == 2


def test_pydoc_is_english_split_by_topic(monkeypatch):
    """Of 100 topics of one size 80 are for training, 10 each for validation and test.

    Splits share no paragraph: one that is in every topic is left to test. Paragraphs of three
    words or fewer are left out.
    """
    text = "Topic number {} begins\n\nSaid in every topic\n\nIt ends here"
    splits = pydoc_of({f"{i}": text.format(i) for i in range(100)}, monkeypatch)
    begins = "topic number <unk> begins <eos>"
    said_once = f"{begins} <unk> <unk> <unk> topic <eos>"
    assert splits["train"] == " ".join([begins] * 80)
    assert splits["valid"] == " ".join([begins] * 10)
    assert splits["test"] == " ".join([said_once] + [begins] * 9)


def test_pydocs_largest_topics_are_given_away_first(monkeypatch):
    """Each goes to the split that lacks most: of 100 words train, valid, test lack 80, 10, 10.

    The topic of 50 leaves train 30 short, that of 20 leaves 10. At 10, 10, 10 that of 15 goes to
    train, the first. Then that of 10 goes to valid, and that of 5 to test.
    """
    sizes = dict(b=5, e=10, a=15, d=20, c=50)
    topics = {topic: f"{topic} " * size for topic, size in sizes.items()}
    splits = pydoc_of(topics, monkeypatch)
    assert splits["train"] == "c " * 50 + "<eos> " + "d " * 20 + "<eos> " + "a " * 15 + "<eos>"
    assert splits["valid"] == "<unk> " * 10 + "<eos>"
    assert splits["test"] == "<unk> " * 5 + "<eos>"


def test_pydocs_words(monkeypatch):
    """Lower case, an apostrophe within a word, numbers, and single signs but those of layout."""
    said = "Don't STOP: a*b == 3.15 -- x^y ~"
    splits = pydoc_of({"x": f"{said}\n \nAlso {said}"}, monkeypatch)
    words = "don't stop : a b 3 . 15 x y <eos>"
    assert splits["train"] == f"{words} <unk> {words}"


def test_recall_reaches_its_floor_only_with_memory():
    """The closed form: a reader chooses among the words seen in a place.

    Where the word can be known, there is one to choose from.
    """
    corpus = data.make_recall(delay=12, symbols=4, fillers=8, count=500)
    rows = corpus.train[:-1].view(500, 15)
    kinds = [len(column.unique()) for column in rows.t()]
    assert corpus.vocabulary[rows[0, 13]] == "?"
    assert torch.equal(rows[:, 0], rows[:, 14])
    assert math.isclose(corpus.facts["perplexity floor"], math.prod(kinds[:14]) ** (1 / 15))
    assert math.isclose(corpus.facts["perplexity without the symbol"], math.prod(kinds) ** (1 / 15))
    assert len({tuple(getattr(corpus, split)[:750:15].tolist()) for split in data.SPLITS}) == 3


@pytest.mark.parametrize("borders", [1, 2, 3])
def test_episodes_put_borders_between_symbol_and_query(borders):
    """In every stream b T steps lie between the two, in all phases.

    The streams are parts of recall's text, one token more than whole episodes apart. If answers
    alone are scored, the other targets are -100.
    """
    T = 10
    period = borders * T + 2
    inputs, targets = data.episodes(borders * T - 1, 2 * period, 3 * period, seed=3)
    _, answers = data.episodes(borders * T - 1, 2 * period, 3 * period, seed=3, answers_only=True)
    query = inputs == 12
    assert torch.equal(answers, torch.where(query, targets, -100))
    t, stream = query[period:].nonzero().unbind(1)
    assert sorted(stream.tolist()) == list(range(3 * period))
    assert t.bincount().tolist() == [3] * period
    symbol = inputs[period + t - borders * T, stream]
    assert torch.equal(symbol, targets[period + t, stream])
    assert symbol.unique().tolist() == [0, 1, 2, 3]
    text = data.make_recall(borders * T - 1, count=6 * period + 13, seed=3).train
    for first, part in enumerate((inputs, targets)):
        apart = [text[(2 * period + 1) * b + first :][: 2 * period] for b in range(3 * period)]
        assert torch.equal(part, torch.stack(apart, 1))


# ------------------------------------------------------------------------- 9. train.py as a program

TINY = (
    "--hidden-size 12 --embedding-size 8 --batch-size 4 --chunk 20 --device cpu --precision fp32"
).split()
THREE_EPOCHS = [*TINY, "--mode", "dni", "--dni-warmup", 9, "--epochs", 3]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no such signals, shells and locks")


def write_corpus(folder):
    """A folder with a tiny text, 41 words a line. Its 30 lines of train are 16 chunks of TINY."""
    for split, n, step in (("train", 30, 1), ("valid", 8, 1), ("test", 4, 2)):
        lines = [
            " ".join(f"w{(i * i + step * j) % 23}" for j in range(41)) + "\n" for i in range(n)
        ]
        write_files(folder, {f"{split}.txt": "".join(lines)})
    return folder


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "text")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Narrow(io.TextIOWrapper):
    """A stdout whose encoding has the letters of ASCII alone."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")

    def getvalue(self):
        self.flush()
        return self.buffer.getvalue().decode("ascii")


def program(*arguments, stdout=io.StringIO):
    """What becomes of `python train.py ARGUMENTS`, in this process."""
    out = stdout()
    err = io.StringIO()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background has none
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train.main(list(map(str, arguments)))
        except SystemExit as exit:  # argparse's own
            status = exit.code
    said = out.getvalue() if out else ""
    return subprocess.CompletedProcess(arguments, status, said, err.getvalue())


def succeed(*arguments):
    """The last line that `python train.py ARGUMENTS` prints."""
    ended = program(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1]


def refused(*arguments, status=2):
    """The one line on stderr, after which the program ends with this status."""
    ended = program(*arguments)
    assert ended.returncode == status, ended.stderr
    lines = ended.stderr.removesuffix("\n").split("\n")
    if lines[0].startswith("usage"):  # argparse's own
        lines = lines[1:]
    assert len(lines) == 1, ended.stderr
    return ended.stderr


def rows_of(folder):
    """The rows of a training's log, {column: text}."""
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def left_by(folder):
    """What a training leaves, but its seconds: its log, what it learned, and the best model.

    (Adam's moments belong to what it learned.)
    """
    rows = [{**row, "seconds": ""} for row in rows_of(folder)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return rows, checkpoint["learners"], checkpoint["best"]


def same_training(left, other):
    """Whether two trainings have left the same: raises where they differ in one bit."""
    assert left[0] == other[0]
    close(left[1:], other[1:], atol=0, rtol=0)


def best_model(folder):
    """The best model and its vocabulary. The folder's checkpoint has all that is needed."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model, _, _ = train.build(
        train.Settings(**checkpoint["settings"]), len(checkpoint["vocabulary"]), "cpu"
    )
    model.load_state_dict(checkpoint["best"]["model"])
    return model, checkpoint["vocabulary"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The last line of a training of THREE_EPOCHS that nothing disturbs, and what it leaves."""
    home = tmp_path_factory.mktemp("undisturbed")
    last = succeed("--data", write_corpus(home / "text"), *THREE_EPOCHS, "--out", home / "r")
    return last, left_by(home / "r")


@pytest.mark.parametrize(
    "mode, sources",
    [
        ("bptt", "rrr"),
        ("dni --dni-borders 3", "rss"),
        ("alternating --dni-kind layer --e-base 1", "rss"),
        ("restart --gradient synthetic --mult 1 --e-base 1", "rss"),
    ],
)
def test_each_mode_trains_resumes_exactly_and_tests(mode, sources, corpus, tmp_path):
    """Resumed after two epochs of three, a training ends as a straight one, bit for bit."""
    arguments = ["--data", corpus, "--mode", *mode.split(), *TINY, "--jitter", "--lr", "0.02"]
    last = succeed(*arguments, "--epochs", 3, "--out", tmp_path / "straight")
    straight = left_by(tmp_path / "straight")
    rows, *_ = straight
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert "".join(row["gradient"][0] for row in rows) == sources
    assert ("dni_cosine" in rows[2]) == (sources != "rrr")
    assert float(rows[2]["valid_perplexity"]) < float(rows[0]["valid_perplexity"])  # it learns
    succeed(*arguments, "--epochs", 2, "--out", tmp_path / "half")  # within a run of SGDR
    assert succeed(*arguments, "--epochs", 3, "--resume", tmp_path / "half") == last
    same_training(left_by(tmp_path / "half"), straight)


def test_random_numbers_are_those_of_seed_and_epoch(monkeypatch):
    """What an epoch draws depends on both, and on nothing before: so a training can be resumed."""
    drawn = []

    def drawing(*_):
        drawn.append(torch.rand(2).tolist())
        return torch.tensor(1.0), None

    monkeypatch.setattr(train, "train_step", drawing)
    text = torch.zeros(2, 400, 3).long()
    found = {}
    for again in range(2):
        for seed, epoch in itertools.product((1, 2, 11), (0, 1, 2, 10)):
            settings = small_settings(seed=seed, jitter=True, epochs=99)
            model, optimizer, _ = train.build(settings, 11, "cpu")
            schedule = train.make_schedule(settings, optimizer)
            torch.manual_seed(again)
            drawn.clear()
            train.train_epoch(model, optimizer, schedule, None, text, epoch, settings)
            borders = list(train.chunk_borders(400, settings, epoch))
            found.setdefault((seed, epoch), []).append((str(drawn), str(borders)))
    for first, second in found.values():
        assert first == second
    assert len({masks for (masks, _), _ in found.values()}) == len(found)
    assert len({borders for (_, borders), _ in found.values()}) == len(found)


@pytest.mark.parametrize("precision, chunk, T", [("fp32", 20, 20), ("bf16", 50, 41)])
def test_which_text_is_read_for_what(precision, chunk, T, corpus, tmp_path, monkeypatch):
    """Training, validation as 10 streams, the measure of g on validation text, the test as one.

    The products of all are in the precision that was asked for. Only training has dropout. g is
    measured in 4 chunks, of a quarter of the 8 streams. They are shorter where the text is short:
    its 2 streams have 167 steps.
    """
    read = []
    forward = LanguageModel.forward

    def recorded(self, inputs, targets, state=None):
        how = (self.training, inputs.shape[1])
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        if state is None:
            read.append([how])
        assert read[-1][0] == how
        read[-1].append(inputs.clone())
        return forward(self, inputs, targets, state)

    monkeypatch.setattr(LanguageModel, "forward", recorded)
    succeed(
        *["--data", corpus, *TINY, "--precision", precision, "--mode", "dni", "--epochs", 1],
        *["--batch-size", 8, "--chunk", chunk, "--out", tmp_path / "r"],
    )
    text = data.load_corpus(str(corpus))
    expected = [
        ((True, 8), data.streams(text.train, 8)[0]),
        ((False, 10), data.streams(text.valid, 10)[0]),
        ((False, 2), data.streams(text.valid, 2)[0][: 4 * T]),
        ((False, 1), data.streams(text.test, 1)[0]),
    ]
    assert [how for how, *_ in read] == [how for how, _ in expected]
    for (_, *chunks), (_, whole) in zip(read, expected):
        assert torch.equal(torch.cat(chunks), whole)
    assert [len(chunk) for chunk in read[2][1:]] == [T] * 4


GOES_ON = "interrupted; the same command with --resume {} goes on after the last whole epoch"
NOT_FINITE = (
    "stopped: the validation loss or a weight is not finite after epoch 2; try a lower --lr"
)
NO_ROOM = "error: no memory, or no disk, left"


@POSIX
@pytest.mark.parametrize(
    "event, step, status, line",
    [
        (signal.SIGINT, 3, 130, GOES_ON),
        (signal.SIGTERM, 20, 143, GOES_ON),
        (signal.SIGTERM, 40, 143, GOES_ON),
        (
            "gradient",
            20,
            1,
            "stopped: the loss is not finite at step 100 of 314 in epoch 2 (real gradients",
        ),
        ("gradient", 32, 1, NOT_FINITE),
        ("g", 20, 1, NOT_FINITE),
        ("disk", 20, 2, "error: [Errno 28] No space"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 3, 2, NO_ROOM),
        (RuntimeError("can't allocate memory:\nyou tried"), 20, 2, NO_ROOM),
        (MemoryError(), 20, 2, NO_ROOM),
    ],
    ids=lambda value: str(value)[:9],
)
def test_whatever_stops_a_training_loses_nothing(
    event, step, status, line, corpus, undisturbed, tmp_path, monkeypatch
):
    """In the first, second or last of three epochs of 16 steps: one line says why.

    What the last whole epoch left is there, and nothing beside it. Resumed, the training ends as a
    straight one.
    """
    arguments = ["--data", corpus, *THREE_EPOCHS, "--out"]
    last, straight = undisturbed
    folder = tmp_path / "stopped"
    steps = []

    def half_saved(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    def disturbed(model, optimizer, dni, *a):
        steps.append(a)
        if len(steps) == step:
            if event == "gradient":  # infinite, and seen at the next step
                model.decoder_bias.register_hook(lambda gradient: gradient * math.inf)
            elif event == "g":  # which is not in use
                nn.init.constant_(dni.g.decode[-1].bias, math.inf)
            elif event == "disk":
                context.setattr(torch, "save", half_saved)
            elif isinstance(event, Exception):
                raise event
            else:
                os.kill(os.getpid(), event)
        return train_step(model, optimizer, dni, *a)

    train_step = train.train_step
    with monkeypatch.context() as context:
        context.setattr(train, "train_step", disturbed)
        message = refused(*arguments, folder, status=status)
    assert message.startswith(f"train.py: {line.format(folder)}"), message
    whole = (step - 1) // 16
    files = ["checkpoint.pt", "log.csv"] if whole else []
    assert sorted(path.name for path in folder.iterdir()) == files
    assert not whole or left_by(folder)[0] == straight[0][:whole]
    assert succeed(*arguments, folder, "--resume", folder) == last
    same_training(left_by(folder), straight)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_stops(loss, corpus, tmp_path, monkeypatch):
    """Though each weight is finite. The epoch before it is kept."""
    losses = iter([2.0, loss])

    def scripted(*_):
        return next(losses)

    monkeypatch.setattr(train, "evaluate", scripted)
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 2]
    assert NOT_FINITE in refused(*how, "--out", tmp_path / "r", status=1)
    assert len(rows_of(tmp_path / "r")) == 1


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "required rank 4 tensor to use channels_last memory format",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
    ],
)
def test_a_fault_of_the_program_is_not_taken_for_a_full_memory(
    message, corpus, tmp_path, monkeypatch
):
    """Its traceback is shown: it is nothing that a user could put right."""

    def faulty(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(train, "train_step", faulty)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        program("--data", corpus, *TINY, "--epochs", 1, "--out", tmp_path / "r")
    assert not list((tmp_path / "r").iterdir())


@SLOW
@POSIX
def test_a_killed_training_goes_on(corpus, tmp_path):
    """Killed after its second checkpoint and before its end, it ends as if nothing had happened.

    The lock of its folder has died with it.
    """
    arguments = ["--data", corpus, *TINY, "--epochs", "40", "--out"]
    folder = tmp_path / "killed"
    command = map(str, [sys.executable, HERE / "train.py", *arguments, folder])
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    for line in process.stdout:
        if line.startswith("epoch 2 "):
            assert f"another training runs in {folder}" in refused("--resume", folder)
            process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(rows_of(folder)) < 40
    assert succeed("--resume", folder) == succeed(*arguments, tmp_path / "straight")
    same_training(left_by(folder), left_by(tmp_path / "straight"))


@pytest.mark.parametrize(
    "curve, cuts, best",
    [
        ([3, 1, 2, 0.5, 2], [], 4),
        ([3, 1, 2, 1.5], [], 2),  # below the epoch before it, and not the lowest
        ([3, 1, 2, 1.5], [3], 2),
        ([3, 1, 2, 2, 2], [2, 4], 2),
        ([1, 1, 1], [], 1),
        ([2], [], 1),
    ],
)
def test_the_best_model_is_the_one_tested(curve, cuts, best, corpus, tmp_path, monkeypatch):
    """Where validation goes down, up and down, it is that of the first lowest epoch.

    Whether the training was resumed makes no difference. Perplexity is rounded once, where it is
    printed: 10.37499999 is 10.37. (Rounded to three or more decimals before, it would be 10.38.)
    """
    models = []
    tested = []

    def scripted(model, tokens, batch_size, *_):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        if batch_size == 1:
            tested.append(weights)
            return math.log(10.37499999)
        models.append(weights)
        return curve[len(models) - 1]

    monkeypatch.setattr(train, "evaluate", scripted)
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--out", tmp_path / "r"]
    for epochs in (*cuts, len(curve)):
        ended = program(*how, "--epochs", epochs)
        how = ["--resume", tmp_path / "r"]
    model, vocabulary = best_model(tmp_path / "r")
    assert vocabulary == data.load_corpus(str(corpus)).vocabulary
    assert len(models) == len(curve)
    for weights in (dict(model.state_dict()), tested[-1]):
        close(weights, models[best - 1], atol=0, rtol=0)
    assert ended.stdout.splitlines()[-2:] == ["bits per token 3.3750", "test perplexity 10.37"]


def test_a_training_that_is_done_is_only_tested(corpus, tmp_path, monkeypatch):
    """--resume without an epoch left tests again, and puts back a lost log.csv.

    A corpus is known by its words: it may have moved. With more --epochs the training goes on.
    """
    folder = tmp_path / "r"
    last = succeed("--data", corpus, *TINY, "--epochs", 1, "--out", folder)
    rows, *_ = left_by(folder)
    model, _ = best_model(folder)
    text = data.load_corpus(str(corpus))
    valid = math.exp(train.evaluate(model, text.valid, 10))
    assert float(rows[0]["valid_perplexity"]) == round(valid, 3)
    test = math.exp(train.evaluate(model, text.test, 1))
    assert last == f"test perplexity {test:.2f}"
    (folder / "log.csv").unlink()
    with monkeypatch.context() as context:
        context.setattr(train, "train_step", None)
        assert succeed("--resume", folder) == last
    assert left_by(folder)[0] == rows
    shutil.move(corpus, tmp_path / "moved")
    succeed("--resume", folder, "--data", tmp_path / "moved", "--epochs", 2)
    assert [row["epoch"] for row in rows_of(folder)] == ["1", "2"]


def test_what_is_known_of_a_text_is_said_twice(corpus, tmp_path, monkeypatch):
    """First after what the text is, and at the end beside the test perplexity, to be compared."""
    text = data.load_corpus(str(corpus))
    text.facts = {"perplexity floor": 1.5}

    def known(*_):
        return text

    monkeypatch.setattr(train, "load_corpus", known)
    ended = program("--data", corpus, *TINY, "--epochs", 1, "--out", tmp_path / "r")
    lines = ended.stdout.splitlines()
    assert lines[:2] == data.describe(text)
    assert re.match(r"[\d,]+ parameters; torch.float32 products on cpu; ", lines[2])
    assert lines[-3] == "perplexity floor 1.5000"


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        return self.seconds


def test_seconds_and_minutes_left(corpus, tmp_path, monkeypatch):
    """By a clock that goes on by 30 seconds in each of an epoch's 16 chunks, 15.7 times 20 steps.

    `seconds` is the time since the training began. The time between two sessions does not count.
    On a terminal the line within an epoch has at most 80 letters, and is written over.
    """
    clock = Clock(1000.0)
    train_step = train.train_step

    def slow(*a):
        clock.seconds += 30
        return train_step(*a)

    monkeypatch.setattr(train.time, "monotonic", clock)
    monkeypatch.setattr(train, "train_step", slow)
    folder = tmp_path / "r"
    how = ["--data", corpus, *TINY, "--mode", "bptt"]
    ended = program(*how, "--epochs", 2, "--out", folder, stdout=Terminal)
    _, *shown = ended.stdout.split("\r\033[K")
    of_epochs = [shown.pop(16), shown.pop(32).splitlines()[0]]  # the lines that stay
    assert len(shown) == 32
    for i, line in enumerate(shown):
        epoch, chunk = divmod(i, 16)
        steps = min(20 * (chunk + 1), 314)
        left = 30 * (chunk + 1) * ((2 - epoch) * 314 / steps - 1) / 60
        perplexity = r"perplexity \d+\.\d{3}"
        expected = rf"epoch {epoch + steps / 314:.2f} of 2, {perplexity}, {left:.0f} min left"
        assert re.fullmatch(expected, line)
        assert len(line) <= 80
    assert of_epochs[1].endswith("seconds 960.0")
    clock.seconds += 9999
    succeed("--resume", folder, "--epochs", 3)
    assert [row["seconds"] for row in rows_of(folder)] == ["480.0", "960.0", "1440.0"]


def test_the_line_on_a_terminal_comes_twice_a_second(monkeypatch):
    """Not more often, for it makes a GPU wait; and not at all where no one sees it."""
    monkeypatch.setattr(train.time, "monotonic", Clock(50.0))
    counts = []
    for stdout in (Terminal, io.StringIO):
        with contextlib.redirect_stdout(stdout()) as out:
            progress = train.Progress(0, 1, 100)
            for stop in range(1, 11):
                train.time.monotonic.seconds += 0.3
                progress.show(stop, torch.tensor(math.nan))
        counts.append(out.getvalue().count("perplexity nan, "))
    assert counts == [5, 0]


def test_a_row_as_text():
    """Columns have their decimals. What is not a number is written so, and read back as nan."""
    row = dict(epoch=3, run=1, gradient="real", learning_rate=0.00123456, seconds=61.25)
    row |= dict(train_perplexity=12.34567, valid_perplexity=math.inf, dni_cosine=math.nan)
    row |= dict(dni_r2=-0.000004, dni_injected=1.23456789, dni_lost=2e-7)
    expected = dict(epoch="3", run="1", gradient="real", learning_rate="0.0012346", seconds="61.2")
    expected |= dict(train_perplexity="12.346", valid_perplexity="inf", dni_cosine="nan")
    expected |= dict(dni_r2="-0.0", dni_injected="1.234568", dni_lost="0.0")
    assert train.as_text(row) == expected
    assert math.isnan(train.perplexity(math.nan))
    assert train.perplexity(math.inf) == math.exp(700)


def test_another_text_is_not_gone_on_with(corpus, tmp_path):
    """One word, the order of two, or one word more, in any one of the three texts."""
    folder = tmp_path / "run"
    succeed("--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1, "--out", folder)
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    for split in data.SPLITS:
        path = corpus / f"{split}.txt"
        text = path.read_text()
        first, second, *rest = text.split(" ")
        for words in ([second, second], [second, first], [first, second, second]):
            path.write_text(" ".join([*words, *rest]))
            assert "was trained on another text than" in refused("--resume", folder, "--epochs", 2)
        path.write_text(text)
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before
    succeed("--resume", folder, "--epochs", 2)


def checkpoint_with(folder, settings):
    """A folder with a checkpoint of which the settings alone are real."""
    folder.mkdir()
    empty = dict.fromkeys(("vocabulary", "fingerprint", "rows", "best", "learners"))
    torch.save(dict(settings=vars(settings), **empty), folder / "checkpoint.pt")
    return folder


def flags_of(name, value):
    """The flags that give a setting this value."""
    if isinstance(value, bool):
        return [train.flag(name)]
    if isinstance(value, tuple):
        return [train.flag(name), *map(str, value)]
    return [train.flag(name), str(value)]


# Another value of each setting than that of `--data ptb`.
MAY_CHANGE = dict(
    epochs=16,
    data="wt2",
    device="cpu",
    precision="fp32",
    compile=True,
    data_dir=os.path.abspath("x"),
)
MAY_NOT_CHANGE = dict(
    mode="dni",
    min_count=2,
    gradient="synthetic",
    seed=43,
    embedding_size=257,
    hidden_size=513,
    num_layers=3,
    dropout_output=0.4,
    dropout_hidden=0.2,
    dropout_input=0.2,
    dropout_embedding=0.1,
    dropout_weight=0.1,
    lr=2e-2,
    l2=1e-6,
    clip=0.5,
    batch_size=21,
    chunk=71,
    jitter=True,
    e_base=6.0,
    mult=3.0,
    eta_min=(1e-4,),
    eta_max=(2e-2,),
    dni_kind="layer",
    dni_alpha=1.0,
    dni_lr=1e-3,
    dni_borders=2,
    dni_warmup=2.0,
)


def test_each_setting_may_or_may_not_change():
    """The two lists of this file name each setting once."""
    names = [field.name for field in dataclasses.fields(train.Settings)]
    assert sorted([*MAY_CHANGE, *MAY_NOT_CHANGE]) == sorted(names)


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_when_a_training_is_resumed(name, tmp_path):
    """It has the new value, and all others that of the checkpoint."""
    old = small_settings("alternating", data="ptb")
    folder = checkpoint_with(tmp_path / "run", old)
    new = MAY_CHANGE[name]
    settings, where, checkpoint = train.parse(["--resume", str(folder), *flags_of(name, new)])
    assert settings == dataclasses.replace(old, **{name: new})
    assert where == folder
    assert checkpoint["settings"] == vars(old)


@pytest.mark.parametrize("name", MAY_NOT_CHANGE)
def test_what_may_not_change_when_a_training_is_resumed(name, tmp_path):
    """The line names the flag, the checkpoint's value and the new one. The old value is taken."""
    old = small_settings("alternating", data="ptb")
    folder = checkpoint_with(tmp_path / "run", old)
    new = MAY_NOT_CHANGE[name]
    line = f"{train.flag(name)} {getattr(old, name)}, not {new}"
    assert f"{folder} holds a training with {line}" in refused(
        "--resume", folder, *flags_of(name, new)
    )
    other = dataclasses.replace(old, **{name: new})
    assert parsed("--resume", str(checkpoint_with(tmp_path / "other", other))) == other


def test_a_preset_beside_a_resume(tmp_path):
    """Its settings count as given: they must be those of the checkpoint, or be put right by flags.

    Without it, those of the checkpoint are taken, whichever preset they came from.
    """
    paper = train.preset("paper", "dni", "wt2")
    folder = str(checkpoint_with(tmp_path / "paper", paper))
    assert parsed("--resume", folder) == paper
    assert parsed("--resume", folder, "--preset", "paper") == paper
    assert "paper holds a training with --" in refused("--resume", folder, "--preset", "small")
    small = train.preset("small", "dni", "ptb")
    folder = str(checkpoint_with(tmp_path / "small", dataclasses.replace(small, lr=0.5)))
    line = "--lr 0.5, not 0.004"
    assert line in refused("--resume", folder, "--preset", "small")
    settings = parsed("--resume", folder, "--preset", "small", "--lr", "0.5")
    assert settings == dataclasses.replace(small, lr=0.5)


def test_a_folder_for_each_training(corpus, tmp_path):
    """No flag writes over a training, or takes one folder for another. Each line says what to give.

    A log without its checkpoint is not written over either.
    """
    folder = checkpoint_with(tmp_path / "run", small_settings())
    assert "must name one folder" in refused("--resume", folder, "--out", tmp_path / "other")
    assert "already holds a training" in refused("--out", folder)
    write_files(tmp_path, {"log/log.csv": "epoch"})
    assert "already holds a training" in refused("--out", tmp_path / "log")
    log_alone = refused("--data", corpus, *TINY, "--epochs", 1, "--resume", tmp_path / "log")
    assert "log.csv without a checkpoint.pt" in log_alone
    file = folder / "checkpoint.pt"
    assert f"{file} is a file; give its folder, --resume {folder}" in refused("--resume", file)
    assert "is a file; give a folder" in refused("--out", corpus / "train.txt")
    assert refused("--data", corpus, *TINY, "--out", corpus / "train.txt" / "run")


class Code:
    """What makes a folder when it is read by pickle."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_that_cannot_be_read(corpus, tmp_path):
    """Damaged, of another version, or with code in it: one line says so.

    No code is run, and nothing is lost.
    """
    folder = tmp_path / "run"
    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", folder)
    file = folder / "checkpoint.pt"
    log = (folder / "log.csv").read_bytes()
    good = file.read_bytes()
    checkpoint = torch.load(file, weights_only=True)
    third = len(good) // 3
    one_bit_off = good[:third] + bytes([good[third] ^ 4]) + good[third + 1 :]
    settings = checkpoint["settings"]
    fewer = {name: value for name, value in settings.items() if name != "seed"}
    others = [
        {**checkpoint, "best": Code(str(tmp_path / "executed"))},
        {**checkpoint, "settings": fewer},
        {**checkpoint, "settings": {**settings, "colour": "red"}},
        {**checkpoint, "more": 1},
        [1, 2],
    ]
    for name in checkpoint:
        others.append({key: value for key, value in checkpoint.items() if key != name})
    contents = [b"", good[:third], one_bit_off]
    for other in others:
        torch.save(other, tmp_path / "other.pt")
        contents.append((tmp_path / "other.pt").read_bytes())
    for content in contents:
        file.write_bytes(content)
        message = refused("--resume", folder, "--epochs", 2)
        assert f"{file} cannot be read as a checkpoint" in message
        assert file.read_bytes() == content
        assert (folder / "log.csv").read_bytes() == log
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_whose_parts_do_not_fit(corpus, tmp_path):
    """Another version may have other weights, or other parts: it is refused in one line.

    The parts are the model, g, Adam, SGDR and Adam for g. (SGDR's moment is set by each step.)
    """
    folder = tmp_path / "run"
    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", folder)
    file = folder / "checkpoint.pt"
    good = file.read_bytes()

    def refuse(checkpoint):
        torch.save(checkpoint, file)
        content = file.read_bytes()
        assert "another version" in refused("--resume", folder, "--epochs", 2)
        assert file.read_bytes() == content
        file.write_bytes(good)
        return torch.load(file, weights_only=True)

    checkpoint = torch.load(file, weights_only=True)
    assert len(checkpoint["learners"]) == 5
    for part in (0, 1, 2, 4):
        learned = checkpoint["learners"][part]
        name = next(iter(learned))
        learned[f"other_{name}"] = learned.pop(name)
        checkpoint = refuse(checkpoint)
    for part in range(5):
        del checkpoint["learners"][part]
        checkpoint = refuse(checkpoint)
    succeed("--resume", folder, "--epochs", 2)


@pytest.mark.parametrize(
    "flags",
    [
        "--hidden-size -3",
        "--epochs 0",
        "--num-layers 0",
        "--chunk 0",
        "--batch-size 0",
        "--dropout-input 1",
        "--dropout-output -0.1",
        "--dropout-weight nan",
        "--e-base 0",
        "--e-base nan",
        "--lr 0",
        "--lr inf",
        "--clip -1",
        "--dni-alpha -1",
        "--seed -1",
        f"--seed {2**63}",
        "--eta-min -1",
        "--eta-min",
        "--mode magic",
        "--epochs ten",
        "--colour red",
        "--dni-borders 0",
        "--dni-warmup -1",
        "--l2 inf",
        "--eta-max 0",
        "--eta-min 1",
        "--eta-max 1e-3 1e-4 --eta-min 2e-4",
        # without effect:
        "--gradient synthetic",
        "--eta-max 1e-3 --lr 1e-3",
        "--mode dni --mult 3",
        "--mult 0.5",
        "--mode bptt --dni-kind layer",
        "--mode bptt --dni-alpha 0.5",
        "--mode restart --dni-lr 1",
        "--dni-kind layer --dni-borders 2",
        "--dni-warmup 2",
        "--data-dir x",
        "--min-count 2",
    ],
)
def test_impossible_settings(flags, monkeypatch):
    """Each ends in one line that names the flag, and status 2, before any work."""
    monkeypatch.setattr(train, "train", None)
    assert re.findall(r"--[a-z0-9-]*[a-z]", flags)[-1] in refused(*flags.split())


def is_true_of(words, x):
    """Whether a number is what the words of a range say."""
    return {
        "at least 1": x >= 1,
        "0 or more": x >= 0,
        "above 0": x > 0,
        "above 0, or inf for none": x > 0,
        "in [0, 1)": 0 <= x < 1,
        "from 0 to 2^63 - 1": 0 <= x <= 2**63 - 1,
    }[words]


RANGED = [
    field
    for field in dataclasses.fields(train.Settings)
    if isinstance(field.default, (int, float, tuple)) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("field", RANGED, ids=[field.name for field in RANGED])
def test_a_refusal_says_what_is_true(field):
    """A number is refused where the words that refuse it are false of it, and nowhere else."""
    numbers = [math.nan, -math.inf, -1, -1e-9, 0, 1e-9, 0.5, 1, 1.5, 1e30, math.inf]
    if isinstance(field.default, int):
        numbers = [-1, 0, 1, 2, 2**62, 2**63 - 1, 2**63]
    usual = small_settings("alternating")
    if field.name == "eta_min":
        usual = dataclasses.replace(usual, eta_max=(1e30,))
    for x in numbers:
        value = (x,) if isinstance(field.default, tuple) else x
        settings = dataclasses.replace(usual, **{field.name: value})
        words = field.metadata["values"]
        finite = x != math.inf or field.name == "clip"
        if is_true_of(words, x) and finite:
            train.check_ranges(settings)
            continue
        if not finite:
            words += " and finite"
        line = f"{train.flag(field.name)} must be {words}, got {x}"
        with pytest.raises(data.UserError) as refusal:
            train.check_ranges(settings)
        assert str(refusal.value) == line


def test_bounds_of_the_rate_may_be_equal_and_not_cross(monkeypatch):
    """eta_min is at most eta_max, or else lr, in each run. Equal bounds are a constant rate."""
    monkeypatch.setattr(train, "train", None)
    equal = "--eta-min 1e-3 --eta-max 1e-3".split()
    assert parsed(*equal).eta_min == parsed(*equal).eta_max == (1e-3,)
    assert parsed("--eta-min", "1e-2").lr == 1e-2
    assert parsed(*"--eta-min 0 1e-3 --eta-max 1e-2 1e-3".split())
    assert "--eta-min" in refused(*"--eta-min 1.01e-2".split())
    assert "--eta-min" in refused(*"--eta-min 0 2e-3 --eta-max 1e-2 1e-3".split())
    assert "--eta-min" in refused(*"--eta-min 2e-3 --eta-max 1e-2 1e-3".split())  # of run 1


def test_no_clipping_is_a_clip_of_inf(corpus, tmp_path):
    """It trains as with a bound that no gradient reaches."""
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1]
    for clip in ("inf", "1e9", "1e-3"):
        succeed(*how, "--clip", clip, "--out", tmp_path / clip)
    same_training(left_by(tmp_path / "inf"), left_by(tmp_path / "1e9"))
    assert left_by(tmp_path / "inf")[0] != left_by(tmp_path / "1e-3")[0]


def parsed(*arguments):
    """The settings that train.py takes from its command line."""
    return train.parse(arguments)[0]


SMALL = dict(
    mode="alternating",
    data="pydoc",
    min_count=1,
    gradient="real",
    epochs=15,
    seed=42,
    embedding_size=256,
    hidden_size=512,
    num_layers=2,
    dropout_output=0.3,
    dropout_hidden=0.1,
    dropout_input=0.1,
    dropout_embedding=0.0,
    dropout_weight=0.0,
    lr=1e-2,
    l2=5e-6,
    clip=0.25,
    batch_size=20,
    chunk=70,
    jitter=False,
    e_base=1,
    mult=2,
    eta_min=(0.0,),
    eta_max=(),
    dni_kind="neuron",
    dni_alpha=0.9,
    dni_lr=1e-4,
    dni_borders=1,
    dni_warmup=1,
    device="auto",
    precision="auto",
    compile=False,
    data_dir="",
)
PAPER = dict(
    hidden_size=1550,
    embedding_size=400,
    num_layers=4,
    chunk=200,
    epochs=320,
    lr=1e-3,
    dropout_output=0.4,
    dropout_hidden=0.3,
    dropout_input=0.4,
    dropout_embedding=0.1,
    dropout_weight=0.1,
    l2=1.2e-6,
    clip=0.2,
    dni_alpha=1,
    jitter=True,
    e_base=5,
)


def test_defaults_and_presets():
    """The settings of README's figures, those of the paper, and what a flag overrides."""
    assert vars(parsed()) == SMALL
    assert parsed() == parsed("--preset", "small") == train.Settings()
    for mode, rate in (("bptt", 4e-3), ("dni", 4e-3), ("restart", 1e-2), ("alternating", 1e-2)):
        assert parsed("--mode", mode, "--data", "ptb").lr == rate
    assert parsed("--mode", "dni", "--lr", "0.5").lr == 0.5
    paper = parsed("--preset", "paper", "--data", "ptb")
    assert vars(paper) == {**SMALL, "data": "ptb", **PAPER}
    wt2 = parsed("--preset", "paper", "--data", "wt2")
    assert wt2 == dataclasses.replace(paper, data="wt2", dropout_hidden=0.2, clip=0.25)
    chosen = parsed("--preset", "paper", "--mode", "bptt", "--lr", "0.5", "--no-jitter")
    changed = dict(data="pydoc", mode="bptt", lr=0.5, jitter=False)
    assert chosen == dataclasses.replace(paper, **changed)


def test_help_says_the_defaults_and_the_papers_values():
    """In brackets the default. After "paper:", or else "code:", what preset paper has, on WT2 too.

    But the code's rate for g is not taken (departure 22). Without --out, a training is in
    trainings/.
    """
    said = {}
    for action in train.make_parser()._actions:
        said[action.dest] = action.help.replace("%%", "%")
    for name, default in SMALL.items():
        assert said[name].endswith(f" [{getattr(train.Settings(), name)}]"), name
        assert getattr(train.Settings(), name) == default
    assert said["preset"].endswith(" [small]")
    assert said["out"].endswith(" [new, in trainings/]")
    folder = train.parse([])[1]
    assert folder.parent == Path("trainings")
    paper = train.preset("paper", "dni", "ptb")
    wt2 = train.preset("paper", "dni", "wt2")
    checked = []
    for field in dataclasses.fields(train.Settings):
        text = field.metadata["text"]
        stated = re.search(r"paper: ([\d.e-]+)", text) or re.search(r"code: ([\d.e-]+)", text)
        if stated and field.name != "dni_lr":
            checked.append(field.name)
            assert getattr(paper, field.name) == float(stated[1]), field.name
            on_wt2 = re.search(r"WT2 ([\d.]+)", text) or stated
            assert getattr(wt2, field.name) == float(on_wt2[1]), field.name
    assert len(checked) == 18
    assert "4e-3" in said["lr"]


def test_each_setting_arrives_in_the_networks():
    """Sizes, dropouts and rates of the model, and what makes g and trains it."""
    settings = small_settings(
        "dni",
        embedding_size=6,
        hidden_size=7,
        num_layers=3,
        dropout_output=0.11,
        dropout_hidden=0.12,
        dropout_input=0.13,
        dropout_embedding=0.14,
        dropout_weight=0.15,
        lr=0.016,
        l2=0.017,
        dni_alpha=0.18,
        dni_lr=0.019,
        dni_borders=2,
    )
    model, optimizer, dni = train.build(settings, 20, "cpu")
    sizes = [(layer.input_size, layer.hidden_size, layer.window) for layer in model.rnn.layers]
    assert sizes == [(6, 7, 2), (7, 7, 1), (7, 6, 1)]
    assert model.embedding.weight.shape == (20, 6)
    dropouts = [model.dropout_output, model.rnn.dropout, model.dropout_input]
    assert dropouts == [0.11, 0.12, 0.13]
    assert model.dropout_embedding == 0.14
    assert {layer.weight_dropout for layer in model.rnn.layers} == {0.15}
    assert (model.activation, model.temporal) == (2, 1)
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.016, 0.017)
    [group] = dni.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.019, 0)
    assert (dni.alpha, dni.borders, dni.penalty) == (0.18, 2, 0.01)


@pytest.mark.parametrize("kind", ["neuron", "layer", "linear"])
def test_each_kind_of_g_arrives(kind):
    """And each optimiser holds the parameters of its own network, all of them and no other."""
    settings = small_settings("dni", embedding_size=6, hidden_size=7, dni_kind=kind)
    model, optimizer, dni = train.build(settings, 20, "cpu")
    shapes = [tuple(p.shape) for p in dni.g.parameters()]
    if kind == "neuron":
        assert type(dni.g) is NeuronDNI
        assert shapes == [tuple(p.shape) for p in NeuronDNI().parameters()]
    elif kind == "linear":
        assert shapes == [(7, 7), (7,), (6, 6), (6,)]
    else:
        assert shapes == [
            *[(50, 7), (50,), (50, 50), (50,), (7, 50), (7,)],
            *[(50, 6), (50,), (50, 50), (50,), (6, 50), (6,)],
        ]
    for network, its in ((model, optimizer), (dni.g, dni.optimizer)):
        held = [p for group in its.param_groups for p in group["params"]]
        assert list(map(id, held)) == list(map(id, network.parameters()))


def test_the_first_weights_are_those_of_the_seed():
    """The same in every mode, so that methods are compared from one start."""
    first = {}
    for mode, seed in (("bptt", 1), ("dni", 1), ("alternating", 1), ("bptt", 2)):
        settings = small_settings(mode, embedding_size=6, hidden_size=7, seed=seed)
        model, _, _ = train.build(settings, 20, "cpu")
        first[mode, seed] = model.state_dict()
    for mode in ("dni", "alternating"):
        close(first[mode, 1], first["bptt", 1], atol=0, rtol=0)
    weight = "embedding.weight"
    assert not torch.equal(first["bptt", 1][weight], first["bptt", 2][weight])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--data ptb --data-dir /x --chunk 30", ("ptb", "/x", 40, 1)),
        ("--data recall --chunk 7", ("recall", None, 17, 1)),
        ("--data text --min-count 3", ("text", None, 80, 3)),
    ],
)
def test_what_is_asked_of_the_corpus(flags, expected, corpus, monkeypatch):
    """Its name, the data folder, the delay of recall (10 above a chunk), and the rarest word."""
    asked = []

    def recorded(*a):
        asked.append(a)
        raise data.UserError("enough")

    monkeypatch.setattr(train, "load_corpus", recorded)
    monkeypatch.chdir(corpus.parent)
    refused(*flags.split())
    name, *rest = expected
    name = str(corpus) if name == "text" else name
    assert asked == [(name, *rest)]


def test_device_and_precision_are_as_asked(monkeypatch):
    """A device that is not there is refused. Products come in bf16 or float32 on request.

    "auto" is bf16 where the device computes in it, and what is asked for is taken though it does
    not.
    """
    if not torch.backends.mps.is_available():
        assert "--device mps" in refused("--device", "mps")
    if not torch.cuda.is_available():
        assert "--device cuda: PyTorch sees no such device here; there is " in refused(
            "--device", "cuda"
        )
    native = dict(avx512_bf16=True, amx_bf16=False)
    other = dict(avx512_bf16=False, amx_bf16=False, avx2=True)
    for abilities, precision, kind in (
        (native, "auto", torch.bfloat16),
        (other, "auto", torch.float32),
        (dict(bf16=True), "auto", torch.bfloat16),
        (dict(amx_bf16=True), "auto", torch.bfloat16),
        ({}, "auto", torch.float32),
        (other, "bf16", torch.bfloat16),
        (native, "fp32", torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", abilities.copy)
        device, autocast = train.pick_device("cpu", precision)
        assert device == "cpu"
        with autocast:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    "capability, precision, bf16",
    [
        ((8, 0), "auto", True),
        ((9, 0), "auto", True),
        ((7, 5), "auto", False),
        ((7, 5), "bf16", True),
        ((9, 0), "fp32", False),
    ],
)
def test_a_gpu_is_taken_where_there_is_one(name, capability, precision, bf16, monkeypatch):
    """In bf16 from compute capability 8.0 on. Its float32 products may then be TF32."""
    asked = []

    def recorded(*a):
        asked.append(a)

    def here(value):
        return lambda *_: value

    monkeypatch.setattr(torch.cuda, "is_available", here(True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", here(capability))
    monkeypatch.setattr(torch, "autocast", recorded)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", recorded)
    device, _ = train.pick_device(name, precision)
    assert device == "cuda"
    assert asked == [("high",), ("cuda", torch.bfloat16, bf16)]


@CUDA
@pytest.mark.parametrize("method", ["bptt", "dni", "alternating", "restart", "dni-restart"])
def test_a_gpu_trains_as_a_cpu_does(method, corpus, tmp_path, cuda="cuda"):
    """Two epochs without dropout: perplexities agree to half a percent.

    (A GPU's float32 products are TF32.)
    """
    dropouts = [f"--dropout-{place}=0" for place in ("input", "hidden", "output")]
    how = [*reproduce.METHODS[method], "--data", corpus, *TINY, *dropouts, "--epochs", 2]
    logs = []
    for device in ("cpu", cuda):
        succeed(*how, "--device", device, "--out", tmp_path / device)
        log = []
        for row in rows_of(tmp_path / device):
            log.append(float(row["train_perplexity"]))
            log.append(float(row["valid_perplexity"]))
        logs.append(log)
    assert logs[0] == pytest.approx(logs[1], rel=5e-3)


def test_texts_and_folders(corpus, tmp_path, monkeypatch):
    """A folder with a text is found from elsewhere. Without --out a training is in trainings/."""
    monkeypatch.chdir(tmp_path)
    succeed("--data", "text", "--mode", "bptt", *TINY, "--epochs", 1)
    (folder,) = (tmp_path / "trainings").glob("text-bptt-*")
    monkeypatch.chdir("/")
    succeed("--resume", folder)
    few = ["--min-count", 99, "--out", tmp_path / "few"]
    ended = program("--data", corpus, *TINY, "--epochs", 1, *few)
    assert ", vocabulary 2, " in ended.stdout  # <unk> and <eos>


def test_a_text_that_cannot_be_used(corpus, tmp_path, monkeypatch):
    """What is wrong with it is told before any training, without a trace."""
    monkeypatch.setattr(train, "train_step", None)
    for content, why in (
        (b"\n\n", "valid.txt holds no words"),
        (b"caf\xe9", "valid.txt is not UTF-8 (byte 3)"),
        (b"a <eos>\n", "valid.txt ends line 1 with <eos>"),
    ):
        (corpus / "valid.txt").write_bytes(content)
        assert why in refused("--data", corpus, *TINY, "--out", tmp_path / "r")
    (corpus / "valid.txt").unlink()
    missing = "has no valid.txt; use pydoc, ptb, ptb-chars, wt2, recall or"
    assert missing in refused("--data", corpus)
    assert "klingon has no train.txt and no valid.txt" in refused("--data", "klingon")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "split, words, flags, said",
    [
        ("train", 79, "", "train text has 80 tokens and needs 81: --batch-size 4 times --chunk 20"),
        ("valid", 6, "--mode bptt", "valid text has 7 tokens and needs 11: 10 streams"),
        ("valid", 9, "--mode dni", "valid text has 10 tokens and needs 11: 10 streams"),
        (
            "valid",
            10,
            "--batch-size 44",
            "valid text has 11 tokens and needs 12: 11 streams, a quarter",
        ),
        ("valid", 10, "--batch-size 44 --mode bptt", ""),
        ("valid", 10, "--batch-size 43", ""),
        ("test", 1, "", ""),
    ],
)
def test_a_text_that_is_too_short(split, words, flags, said, corpus, tmp_path):
    """The line names the text, what it has and what it needs, before any training.

    A text that has what it needs is read.
    """
    (corpus / f"{split}.txt").write_text(" ".join(["w1"] * words))
    chunk = ["--chunk", 5] if "--batch-size" in flags else []
    how = ["--data", corpus, *TINY, "--epochs", 1, *flags.split(), *chunk, "--out", tmp_path / "r"]
    if said:
        assert said in refused(*how)
        assert not (tmp_path / "r").exists()
    else:
        assert succeed(*how).startswith("test perplexity ")


def test_home_is_expanded_in_every_path(corpus, tmp_path, monkeypatch):
    """`--out=~/runs` reaches the program as it stands: a shell expands ~ only where a word begins.

    The folder of the data is kept whole, to resume from anywhere.
    """
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert train.parse(["--out=~/runs"])[1] == tmp_path / "runs"
    folder = checkpoint_with(tmp_path / "run", small_settings("dni", data="ptb"))
    _, where, checkpoint = train.parse(["--resume=~/run"])
    assert where == folder
    assert checkpoint
    assert parsed("--data=~/text").data == str(corpus)
    assert parsed("--data=ptb", "--data-dir=~/d").data_dir == str(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    assert parsed("--data=ptb", "--data-dir=d").data_dir == str(tmp_path / "d")
    assert parsed("--data=ptb", "--data-dir=").data_dir == ""


@pytest.mark.parametrize("name", ["a b", "it's", "$HOME", "-x", "тексты"])
def test_what_is_printed_can_be_pasted(name, corpus, tmp_path, monkeypatch):
    """The flag that resumes an interrupted training means its folder, whatever it is called."""
    monkeypatch.chdir(tmp_path)
    train_step = train.train_step
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupted)
    message = refused(*how, f"--out={name}", status=130)
    monkeypatch.setattr(train, "train_step", train_step)
    printed = re.search(r"with (--resume .*) goes on", message)[1]
    succeed(*how, *shlex.split(printed))
    assert len(rows_of(tmp_path / name)) == 1
    message = refused(*how, f"--out={name}")
    printed = re.search(r"go on with (--resume .*), or", message)[1]
    succeed(*how, *shlex.split(printed))


def test_interrupted_before_it_began(monkeypatch):
    """Then there is nothing to resume, and no folder is named."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "parse", interrupted)
    assert refused(status=130) == "train.py: interrupted before it began\n"


def test_a_resume_that_begins_says_so(corpus, tmp_path):
    """--resume may begin a training. The name may be mistyped, so one line tells it."""
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1]
    begun = program(*how, "--resume", tmp_path / "mien")
    assert begun.returncode == 0
    line = f"train.py: no checkpoint in {tmp_path / 'mien'}: a new training begins there\n"
    assert begun.stderr == line
    assert not program(*how, "--resume", tmp_path / "mien").stderr
    assert not program(*how, "--out", tmp_path / "mine").stderr


@pytest.mark.parametrize("stdout", [Narrow, type(None)], ids=["ASCII", "closed"])
def test_no_output_stops_a_training(stdout, corpus, tmp_path):
    """A letter that stdout's encoding lacks is written as its number. A closed one gets nothing."""
    folder = shutil.move(corpus, tmp_path / "тексты")
    how = ["--data", folder, *TINY, "--mode", "bptt", "--epochs", 1, "--out"]
    ended = program(*how, tmp_path / "ход", stdout=stdout)
    assert ended.returncode == 0
    assert not ended.stderr
    assert len(rows_of(tmp_path / "ход")) == 1
    if stdout is Narrow:
        assert "\\u0442\\u0435\\u043a\\u0441\\u0442\\u044b: 1,260 training tokens" in ended.stdout
        assert "\\u03b1, a factor on" in program("--help", stdout=Narrow).stdout
    assert "already holds a training" in program(*how, tmp_path / "ход", stdout=stdout).stderr


def test_stdout_is_given_back():
    """What the caller's stdout did with letters that it lacks, it does again."""
    narrow = Narrow()

    def same():
        return narrow

    assert program("--epochs", 0, stdout=same).returncode == 2
    assert narrow.errors == "strict"


@POSIX
def test_a_training_runs_in_a_thread(corpus, tmp_path):
    """No signal can be caught there, and none is asked for."""
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1, "--out", tmp_path / "r"]
    found = []

    def work():
        found.append(train.main(list(map(str, how))))

    thread = threading.Thread(target=work)
    with contextlib.redirect_stdout(io.StringIO()):
        thread.start()
        thread.join()
    assert found == [0]
    assert len(rows_of(tmp_path / "r")) == 1


@POSIX
def test_sigterm_is_given_back(corpus, tmp_path, monkeypatch):
    """After a training, a refusal and an interrupt, the program that called does as it did."""

    def own(*_):
        pass

    before = signal.signal(signal.SIGTERM, own)
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1, "--out"]
    try:
        succeed(*how, tmp_path / "r")
        assert signal.getsignal(signal.SIGTERM) is own
        refused("--epochs", 0)
        refused("--colour", "red")
        assert signal.getsignal(signal.SIGTERM) is own

        def terminated(*_):
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(train, "train_step", terminated)
        refused(*how, tmp_path / "s", status=143)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torchrun_is_refused(corpus, tmp_path, monkeypatch):
    """It would start whole trainings side by side. One process of it is as good as python."""
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1, "--out", tmp_path / "r"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a training is one process" in refused(*how)
    assert not (tmp_path / "r").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    succeed(*how)


@POSIX
def test_a_second_training_in_one_folder_is_refused(corpus, undisturbed, tmp_path, monkeypatch):
    """With --out or --resume, before its first checkpoint and after. The first ends as if alone.

    The lock is not a file, and ends with the training.
    """
    folder = tmp_path / "r"
    how = ["--data", corpus, *THREE_EPOCHS]
    train_step = train.train_step
    steps = []
    said = []

    def visited(*a):
        steps.append(a)
        if len(steps) == 2:
            said.append(refused(*how, "--out", folder))
            # (A line before it says that there is no checkpoint yet.)
            said.append(program(*how, "--resume", folder).stderr)
        if len(steps) == 20:
            said.append(refused(*how, "--resume", folder))
        return train_step(*a)

    monkeypatch.setattr(train, "train_step", visited)
    last, straight = undisturbed
    assert succeed(*how, "--out", folder) == last
    assert len(steps) == 48
    assert len(said) == 3
    for line in said:
        assert f"another training runs in {folder}" in line
    same_training(left_by(folder), straight)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "log.csv"]
    assert succeed("--resume", folder) == last


@POSIX
def test_a_file_system_without_locks(corpus, tmp_path, monkeypatch):
    """A training there is not noticed by another, and runs all the same."""
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    how = ["--data", corpus, *TINY, "--mode", "bptt", "--epochs", 1]
    succeed(*how, "--out", tmp_path / "r")


def in_a_shell(line, folder):
    """What a line of sh prints in a folder, on stdout and stderr, and its exit status."""
    environment = {**ONE_THREAD, "PYTHONUNBUFFERED": ""}  # with a buffer, which may stay unwritten
    ended = subprocess.run(
        ["sh", "-c", line], cwd=folder, capture_output=True, text=True, env=environment
    )
    said = ended.stdout + ended.stderr
    assert "Traceback" not in said
    assert "Exception" not in said  # "ignored", when Python ends
    return said, ended.returncode


NO_UTF8 = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"


@SLOW
@POSIX
@pytest.mark.parametrize(
    "prefix, suffix, status, said",
    [
        ("", ">&- 2>&-", 0, ""),
        (NO_UTF8, "> log; x=$?; cat log; exit $x", 0, "test perplexity"),
        ("PYTHONIOENCODING=cp1252", "", 0, "test perplexity"),
        ("", "2>err | head -n 1; cat err", 0, "Broken pipe"),
        ("", "> /dev/full", 2, "No space left"),
        ("WORLD_SIZE=2", "", 2, "one process"),
    ],
)
def test_the_program_in_a_shell(prefix, suffix, status, said, corpus, tmp_path):
    """Whatever becomes of its output, there is no traceback. A resume goes on."""
    shutil.move(corpus, tmp_path / "тексты")
    words = [sys.executable, HERE / "train.py", "--data", "тексты", *TINY, "--epochs", 2]
    command = shlex.join(map(str, words))
    for flag in ("--out", "--resume") if prefix == NO_UTF8 else ("--out",):
        found, ended = in_a_shell(f"{prefix} {command} {flag} ход {suffix}", tmp_path)
        assert ended == status, found
        assert said in found


@SLOW
@POSIX
def test_data_in_a_shell(corpus, tmp_path):
    """`python data.py FOLDER` needs no reader, and no letters but ASCII's."""
    shutil.move(corpus, tmp_path / "тексты")
    command = shlex.join(map(str, [sys.executable, HERE / "data.py", "тексты"]))
    said, status = in_a_shell(f"PYTHONIOENCODING=ascii {command}", tmp_path)
    assert said.startswith("\\u0442\\u0435\\u043a\\u0441\\u0442\\u044b: 1,260 training tokens")
    assert status == 0
    assert in_a_shell(f"{command} >&-", tmp_path) == ("", 0)
    said, _ = in_a_shell(f"PYTHONUNBUFFERED=1 {command} 2>err | head -n 1; cat err", tmp_path)
    assert said.count("\n") == 1


# -------------------------------------------------------------- 10. the repository, and its studies

README = (HERE / "README.md").read_text(encoding="utf-8")


def imports_of(path):
    """The modules that a file imports anywhere, without what follows a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_the_house():
    """Arrows run downwards: a file imports torch, numpy and files below it.

    No other file is there. plain.py imports torch and the standard library alone. The figures need
    matplotlib.
    """
    top = {
        "qrnn": set(),
        "sgdr": set(),
        "data": set(),
        "dni": {"qrnn", "data"},
        "train": {"qrnn", "sgdr", "data", "dni"},
    }
    scripts = {
        "plain": set(),
        "study": {"train", "qrnn", "data"},
        "speed": {"study", "train", "qrnn"},
        "text": {"study", "train", "data", "dni"},
        "recall": {"study", "train", "data", "dni"},
        "injected": {"study", "text", "train", "data", "dni"},
        "authors": {"study", "injected", "train", "data", "dni"},
        "alternate": {"study", "text", "train", "data", "dni", "sgdr"},
        "reproduce": {"study", "train"},
        "tables": set(),
        "report_alternate": {"alternate", "tables"},
        "report": {"study", "text", "recall", "reproduce", "tables", "report_alternate"},
        "figures": {"study", "train", "sgdr"},
        "gpu": {"study", "train", "speed", "reproduce", "report"},
    }
    tested = {
        "alternate",
        "plain",
        "study",
        "text",
        "recall",
        "reproduce",
        "report",
        "injected",
        "authors",
    }
    more = {
        "qrnn": {"triton"},
        "test_all": {"pytest", "triton"},
        "report": {"matplotlib"},
        "figures": {"matplotlib"},
    }
    free = {*sys.stdlib_module_names, "torch", "numpy"} - {"importlib"}  # it would hide an import
    below = {**top, "test_all": {*top, *tested}}
    for folder, files in ((HERE, below), (study.HERE, scripts)):
        assert {path.stem for path in folder.glob("*.py")} == set(files)
        for name, ours in files.items():
            allowed = free | ours | more.get(name, set())
            assert imports_of(folder / f"{name}.py") <= allowed, name
    assert "numpy" not in imports_of(study.HERE / "plain.py")
    assert not list(HERE.glob("*/__init__.py"))


@SLOW
@pytest.mark.parametrize("script", ["qrnn.py", "dni.py", "sgdr.py", "data.py"])
def test_each_file_runs_alone(script, tmp_path):
    """`python FILE` shows its idea, alone in its folder or, for dni.py, beside what it needs."""
    for name in (script, "qrnn.py", "data.py") if script == "dni.py" else (script,):
        shutil.copy(HERE / name, tmp_path)
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0 and len(ended.stdout.split("\n")) > 3, ended.stderr
    if script == "dni.py":
        numbers = map(float, re.findall(r" ([+\d]+\.\d+)$", ended.stdout, re.M)[:5])
        whole, truncated, mended, bptt, layer = numbers
        assert whole == mended != truncated and bptt < 0.6 and layer > 0.9
        assert float(re.search(r"sin\(3 c\).*R² (\S+)", ended.stdout)[1]) > 0.9  # what g can learn
        assert "\n".join(ended.stdout.split("\n")[:5]) in README.replace("\n    ", "\n")


def snippets():
    """The programs in README.md and experiments/using-g.md. One takes long."""
    found = []
    for path in (HERE / "README.md", study.HERE / "using-g.md"):
        for indented in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            program = textwrap.dedent(indented)
            takes_long = [SLOW] if "right_answers" in program else []
            found.append(pytest.param(program, marks=takes_long))
    return found


@pytest.mark.parametrize("program", snippets())
def test_the_programs_of_the_readmes_run(program, capsys, corpus, tmp_path, monkeypatch):
    """Each runs as it stands, but for the words of a text, and prints what its comments say.

    The one that continues a text does it as one does who reads all of the text again for each word.
    """
    monkeypatch.chdir(tmp_path)
    names = {}
    if "checkpoint" not in program:
        exec(compile(program, "README.md", "exec"), names)
        printed = capsys.readouterr().out.split("\n")[:-1]
        assert printed == re.findall(r"^print.*?  # (.*)$", program, re.M) != []
        return

    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", tmp_path / "trainings" / "mine")
    capsys.readouterr()
    exec(compile(program.replace("the value of", "w1 w2 w3"), "using-g.md", "exec"), names)
    model, vocabulary = best_model(tmp_path / "trainings" / "mine")
    text = [vocabulary.index(word) for word in ("w1", "w2", "w3")]
    logits, _ = model.eval().logits(torch.tensor(text)[:, None])
    log_p = logits[:, 0].log_softmax(-1)
    expected = -(log_p[0, text[1]] + log_p[1, text[2]]) / 2
    assert names["nll"].item() == pytest.approx(expected.item())
    for _ in range(20):
        logits, _ = model.logits(torch.tensor(text)[:, None])
        text.append(logits[-1, 0].argmax().item())
    assert capsys.readouterr().out == " ".join(vocabulary[i] for i in text) + "\n"


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "experiments/README.md",
        "experiments/using-g.md",
        "experiments/departures.md",
        "experiments/results.md",
        "experiments/logs/README.md",
    ],
)
def test_commands_and_links_of_the_readmes(path):
    """Each train.py command is one that train.py understands, and each link leads somewhere.

    No sentence is broken where a line would begin as an item of a list does ("α is" / "1. Then").
    """
    text = (HERE / path).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S).split("\n")
    for before, line in itertools.pairwise(prose):
        if re.match(r" *(\d+[.)]|[-+*]) ", line):
            assert before == "" or before.endswith((".", ":", ";", "?", ")")), line
    for line in re.findall(r"python train\.py[^#`\n]*", text):
        assert "--resume" in line or parsed(*shlex.split(line)[2:])
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (HERE / path).parent.joinpath(link).exists(), link


def test_the_logs_hold_the_cases_of_reproduce():
    """What reproduce.py would train today is what its logs hold, as far as they go."""
    searched = study.read_log(study.LOGS / "search.csv")
    names = ("data", "method", "epochs", "lr", "seed", "e_base")
    in_log = {tuple(row[name] for name in names) for row in searched}
    asked = set()
    for corpus in ("ptb", "pydoc"):
        for case in reproduce.search_cases(corpus, reproduce.METHODS):
            asked.add(tuple(str(case.get(name, "")) for name in names))
    assert asked == in_log
    # The .json says with which settings WT2 was trained: "epochs 2 e_base 0.6667", ..
    trained, _ = json.loads((study.LOGS / "methods-small-wt2.json").read_text())
    for method in reproduce.METHODS:
        its = reproduce.settings_of(reproduce.arguments("small", "wt2", method, 2))
        words = trained[method].split()
        for name, value in zip(words[::2], words[1::2]):
            assert getattr(its, name) == float(value), (method, name)


def test_the_recipe_is_what_the_search_found():
    """A method's rate has the best mean over seeds on validation text in its longest trainings."""
    rows = study.read_log(study.LOGS / "search.csv")
    for method in reproduce.METHODS:
        for epochs in ("15", "5"):
            mine = report.having(rows, data="ptb", method=method, epochs=epochs)
            found = {}
            for (rate, _), its in report.groups(mine, "lr", "seed").items():
                found.setdefault(float(rate), []).append(
                    min(report.numbers(its, "valid_perplexity"))
                )
            if len(found) > 1:
                break
        valid = {rate: statistics.mean(its) for rate, its in found.items()}
        lr = reproduce.settings_of(reproduce.arguments("small", "ptb", method, int(epochs))).lr
        # It is among the best: two may be as good.
        assert len(valid) > 1 and valid[lr] == min(valid.values()), (method, valid)


@SLOW
def test_what_waits_for_a_gpu_runs_on_a_cpu(tmp_path):
    """experiments/gpu.py at a tiny size: each stage ends, and its files say what they should."""
    home = HERE / "trainings" / "gpu-tiny-five"
    shutil.rmtree(home, ignore_errors=True)
    for stages in ("environment correctness sharing trainings", "steps trainings"):
        flags = f"--out {tmp_path} --device cpu --scale tiny --seconds 3600 --stages {stages}"
        command = [sys.executable, "gpu.py", *flags.split()]
        subprocess.run(command, cwd=study.HERE, check=True, capture_output=True)
        said = (tmp_path / "report.txt").read_text()
        assert all(f"{stage}: exit status 0" in said for stage in stages.split()), said
    shutil.rmtree(home)
    tables = {path.stem: study.read_log(path) for path in tmp_path.glob("*.csv")}
    methods = ["bptt", "dni", "alternating", "restart", "dni-restart"]
    assert [row["method"] for row in tables["agreement"]] == methods
    assert not any(report.numbers(tables["agreement"], "differs_by"))  # a CPU beside the same
    ended = {row["method"]: row for row in tables["trainings"]}
    assert list(ended) == methods and all(
        float(row["test_perplexity"]) < 10 for row in ended.values()
    )
    assert {row["epoch"] for row in ended.values()} == {
        row["epochs planned"] for row in ended.values()
    }
    assert {"bptt plain", "dni compiled", "nn.LSTM layer"} < {
        row["what"] for row in tables["steps"]
    }
    assert len(tables["sharing"]) == 2 and "passed" in (tmp_path / "tests.txt").read_text()
    assert "dni compiled" in (tmp_path / "profile.txt").read_text() and "TFLOP/s" in said


def test_the_authors_g_is_a_loop_over_neurons():
    """One sequence across all neurons of all streams: stream by stream, in a stream layer by layer.

    Left: the g of the study. Right: a loop over the neurons, with the same noise and the same
        zoneout.
    """
    g = authors.AcrossNeurons(hidden_size=5).double()
    W_e = g.encode.weight[:, 0]
    b_e = g.encode.bias
    W = g.gates.weight
    b = g.gates.bias
    W_d = g.decode.weight[0]
    b_d = g.decode.bias
    assert W_e.abs().max() <= 0.1 and W_d.abs().max() <= 0.1 and not b_e.any() and not b_d.any()
    memory = None
    m = torch.zeros(5, **DOUBLE)
    x_before = torch.zeros(5, **DOUBLE)
    for border in range(2):  # the memory goes on from the last neuron to the first
        s = [randn(3, 4), randn(3, 2)]
        torch.manual_seed(border)
        predicted, memory = g(s, memory)
        torch.manual_seed(border)
        noise = torch.empty(18, 1, **DOUBLE).normal_(1.0, 0.5)
        kept = torch.rand(18, 5, **DOUBLE) < 0.1
        for stream in range(3):
            for layer, size in enumerate((4, 2)):
                for neuron in range(size):
                    n = stream * 6 + (0, 4)[layer] + neuron
                    x = W_e * (s[layer][stream, neuron] * noise[n]) + b_e
                    z, u, o = (W @ torch.cat([x_before, x]) + b).chunk(3)
                    u = torch.where(kept[n], 0.0, u.sigmoid())
                    m = u * z.tanh() + (1 - u) * m
                    x_before = x
                    answer = W_d @ (o.sigmoid() * m) + b_d[0]
                    close(predicted[layer][stream, neuron], answer)
        close(memory, (m[None], x_before[None]))
    f, z = torch.rand(700, 1, 5), torch.randn(700, 1, 5)  # so long that products of f are 0
    close(authors.scan(f, (1 - f) * z), pool_loop(f, z, torch.zeros(1, 5)))


def test_the_controls_of_alternation():
    """δ^ with random signs or shuffled is what the head of alternate.py says, by its own checks.

    Every control has the linear g of the arm that it is compared with.
    """
    alternate.check_controls()
    with pytest.raises(ValueError, match="no arm of text.py: sign"):
        text_study.build(dict(arm="sign", seed=0, rate=1e-4, alpha=1.0), 50)


def test_all_streams_begin_an_episode_at_one_place():
    """`recall.py --places`: where every period begins, all streams are shown a symbol.

    The text of a stream is that of `episodes`, and an answer is the symbol.
    """
    period = 20
    text = data.episodes(period - 3, 8 * period, 7, seed=3, answers_only=True)
    inputs, targets = recall.at_one_place(*text, period)
    assert inputs.shape == targets.shape == (7 * period, 7)
    symbols = inputs[::period]
    assert (symbols < 4).all() and (inputs < 4).sum() == 2 * symbols.numel() > 0
    asked = inputs == recall.QUERY
    assert torch.equal(asked.nonzero()[:, 0].unique(), torch.arange(period - 2, 7 * period, period))
    assert torch.equal(targets[asked].view(7, 7), symbols) and (targets[~asked] == -100).all()
    assert torch.equal(inputs[:, 0], text[0][: 7 * period, 0])


def test_the_authors_g_learns_the_sum_of_squares():
    """On the gradients of the mean loss, without their unit of dni.py: one step of Adam at 1e-3."""
    g = authors.AcrossNeurons().double()
    s = [randn(3, 4).requires_grad_(), randn(3, 2).requires_grad_()]
    for c in s:
        c.grad = randn(*c.shape)
    torch.manual_seed(0)
    predicted, _ = g(s)
    error = sum(((d - c.grad) ** 2).sum() for d, c in zip(predicted, s))
    expected = grad(error, list(g.parameters()))
    torch.manual_seed(0)
    authors.teach(g, torch.optim.SGD(g.parameters(), 0.0), s, None)
    close([p.grad for p in g.parameters()], list(expected))
    ask = authors.in_unit_of_dni(g, 10)
    torch.manual_seed(0)
    close(ask(s, None)[0], [10 * d for d in predicted])


def test_sums_over_windows_are_one_text():
    """The study's sums are those of `crossing` over its windows, with state and memory carried on.

    A text that is too short is read again from `shift` further on.
    """
    model, _, parameters = plain_losses()
    g = lively(NeuronDNI().double())
    model.embedding.weight.data *= 20  # so that the states of the two streams differ
    inputs, targets = torch.randint(11, (2, 20, 2))
    texts = list(injected.windows(inputs, targets, 8, 3, 3))
    assert [begins for _, _, begins in texts] == [True, False, True]
    assert torch.equal(texts[1][0], inputs[8:16]) and torch.equal(texts[2][1], targets[3:11])
    found = injected.summary(injected.look_on(model, g, 0.7, texts, 4))

    total = [0.0] * 3
    placebo = 0.0
    for text, begins in ((inputs[:16], True), (inputs[3:11], False)):
        labels = targets[:16] if begins else targets[3:11]
        chunks, _ = train.read_chunks(model, text, labels, 4)
        memory = None
        for n in range(0, len(chunks), 2):
            window = chunks[n : n + 2]
            if n:  # the border between two windows: g sees it, and nothing is injected there
                _, memory = g([c.detach() for c in window[0][0]], memory)

            def remembering(s, fresh, memory=memory):
                return g(s, memory if fresh is None else fresh)

            def of_the_other_stream(s, fresh, g=remembering):
                predicted, fresh = g(s, fresh)
                return [d[[1, 0]] for d in predicted], fresh

            total = [
                a + b for a, b in zip(total, crossing(remembering, window, 8, parameters, 0.7))
            ]
            _, _, other = crossing(of_the_other_stream, window, 8, parameters, 0.7)
            placebo = placebo + other
            _, memory = g([c.detach() for c in window[1][0]], memory)
    truncated, lost, sent = total
    assert found["lost"] == pytest.approx((lost.norm() / truncated.norm()).item(), rel=1e-3)
    assert found["injected"] == pytest.approx((sent.norm() / truncated.norm()).item(), rel=1e-3)
    cosine = F.cosine_similarity(sent, lost, 0).item()
    assert found["cosine"] == pytest.approx(cosine, rel=1e-3)
    assert found["placebo"] == pytest.approx((placebo.norm() / truncated.norm()).item(), rel=1e-3)
    cosine = F.cosine_similarity(placebo, lost, 0).item()
    assert found["placebo_cosine"] == pytest.approx(cosine, rel=1e-3)


def test_a_study_of_a_training_reads_the_text_of_that_training(tmp_path, monkeypatch, capsys):
    """injected.py FOLDER: the text depends on the chunk. Another number of windows is another case.

    What is no training ends the script in one line, with the status of a user's mistake.
    """
    monkeypatch.setattr(study, "LOGS", tmp_path)
    big = "--data recall --chunk 190 --batch-size 40 --mode dni --epochs 1".split()
    succeed(*TINY, *big, "--out", tmp_path / "mine")
    for count in (2, 3, 3):
        monkeypatch.setattr(
            sys, "argv", ["injected.py", str(tmp_path / "mine"), "--windows", str(count)]
        )
        study.run(injected.main)
    rows = study.read_log(tmp_path / "injected.csv")
    assert [row["windows"] for row in rows] == ["2", "3"]
    assert all(row["what"] == "mine" and row["T"] == "190" for row in rows)
    capsys.readouterr()
    assert list(injected.counted(range(40), 40)) == list(range(40))
    assert capsys.readouterr().out == "20 of 40 windows, 0 min left\n"
    monkeypatch.setattr(sys, "argv", ["injected.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        study.run(injected.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("injected.py: error: ")
    assert said.count("\n") == 1

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        study.run(interrupted)
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.count("\n") == 1


@POSIX
def test_a_study_that_is_terminated_leaves_no_training_behind(tmp_path, capsys):
    """SIGTERM ends what a study waits for in subprocess.run, which would have run for a minute."""
    before = signal.getsignal(signal.SIGTERM)
    child = tmp_path / "child"
    lives = f"import os, time; open('{child}', 'w').write(str(os.getpid())); time.sleep(60)"

    def terminate_when_it_lives():
        while not child.exists() or not child.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def waits():
        threading.Thread(target=terminate_when_it_lives).start()
        subprocess.run([sys.executable, "-c", lives])

    with pytest.raises(SystemExit) as ended:
        study.run(waits)
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.endswith("interrupted; the same command does what is left\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_results_are_what_the_logs_say():
    """results.md and README's tables are what report.py makes of the logs, to the letter.

    The numbers in the prose of experiments/README.md and using-g.md, and in what README says was
    found, are in a table of results.md, or in the log of the main job, of the exercises or of the
    training with preset paper.
    """
    logs = {name: study.read_log(study.LOGS / f"{name}.csv") for name in report.LOGS}
    results = report.results(logs)
    assert (study.HERE / "results.md").read_text(encoding="utf-8") == results
    assert report.with_tables(README, logs) == README
    assert README.count("written by experiments/report.py -->") == 2
    _, found_here = README.split("## What was found")
    found_here, _ = found_here.split("## Use g in your own program")
    texts = [found_here]
    for name in ("README.md", "using-g.md"):
        texts.append((study.HERE / name).read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```|<!-- table.*?<!-- end -->", "", "\n".join(texts), flags=re.S)
    tables = [line for line in results.split("\n") if line.startswith("|")]
    names = ("main-job", "exercises", "paper-dni")
    logged = [(study.LOGS / f"{name}.txt").read_text() for name in names]
    cells = re.findall(r"[\d.,]*\d", "\n".join([*tables, *logged]))
    for number in re.findall(r"dni_\w+ ([\d.]+)", logged[0]):  # of the main job, rounded
        cells += [f"{float(number):.3f}", f"{float(number):.4f}"]
    found = re.findall(r"[\d,]*\d\.\d+|\d+/\d+", prose)
    assert len(found) > 30 and {x for number in found for x in number.split("/")} <= set(cells)


@pytest.fixture
def tiny_studies(corpus, tmp_path, monkeypatch):
    """The studies, so small that a case takes a moment. What they read as PTB is the tiny text."""
    texts = {("ptb", split): (corpus / f"{split}.txt").read_text() for split in data.SPLITS}
    canonical(monkeypatch, texts)
    write_files(tmp_path, {f"ptb.{split}.txt": text for (_, split), text in texts.items()})
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))

    def train_here(command, **_):
        _, _, *arguments = command  # python train.py ARGUMENTS
        return program(*arguments)

    of_reproduce = types.SimpleNamespace(run=train_here, PIPE=subprocess.PIPE)
    monkeypatch.setattr(reproduce, "subprocess", of_reproduce)
    monkeypatch.setattr(train, "compile_modules", lambda modules: None)
    monkeypatch.setattr(study, "ROOT", tmp_path)  # where trainings/ is
    monkeypatch.setattr(reproduce, "epochs_of", lambda scale, data: 1)
    for method, options in reproduce.METHODS.items():
        monkeypatch.setitem(reproduce.METHODS, method, [*options, *TINY])
    monkeypatch.setattr(text_study, "UPDATES", {2: 10, 5: 10})
    monkeypatch.setattr(text_study, "HIDDEN", 8)
    monkeypatch.setattr(text_study, "B", 4)


def test_the_report_reads_what_the_studies_write(tiny_studies, tmp_path):
    """report.py makes its tables of the rows that text.py, recall.py and reproduce.py write today.

    Old rows of text.py also have own_cosine and own_r2. Where a row has none, their place is blank,
    in a log of new rows and in one with rows of both kinds.
    """

    def log_of(function, cases):
        """The rows of these cases as a study leaves them in its log, {column: string}."""
        path = tmp_path / "log.csv"
        path.unlink(missing_ok=True)
        study.do_cases(path, function, cases)
        return study.read_log(path)

    arms = dict.fromkeys(text_study.WITH_G, 1e-3)
    of_text = [case for which in ("rates", "T", "alpha") for case in text_study.cases(which, arms)]
    of_text = [case for case in of_text if case["rate"] in ("", 1e-3) and case["seed"] < 2]
    of_words = [dict(arm="bptt", T=5, alpha="", rate="", seed=1)]
    of_longer = [{**of_words[0], "arm": arm} for arm in ("twice", "bptt")]
    recalled = [
        dict(counts="answers", arm="linear", rate=1e-3, borders=1, seed=seed)
        for seed in (*recall.SEARCH_SEEDS, 0)
    ]
    of_cells = [{**recalled[-1], "cell": "lstm", "penalty": 0.01}]
    of_search = [dict(data="ptb", method="dni", epochs=2, lr=4e-3, seed=42)]
    of_methods = [dict(data="ptb", method=method, seed=42) for method in reproduce.METHODS]
    logs = dict.fromkeys(report.LOGS, [])
    logs |= {
        "text": log_of(text_study.one, of_text),
        "text-words": log_of(functools.partial(text_study.one, name="ptb", parts=1), of_words),
        "text-longer": log_of(
            functools.partial(text_study.one, name="ptb", parts=2, epochs=2), of_longer
        ),
        "recall": log_of(functools.partial(recall.one, updates=3), recalled),
        "recall-cells": log_of(functools.partial(recall.one, updates=3), of_cells),
        "search": log_of(functools.partial(reproduce.one, "small"), of_search),
        "methods-small-ptb": log_of(functools.partial(reproduce.one, "small"), of_methods),
    }

    def number(log, column, **case):
        """The last number in this column of the rows of a case."""
        return report.numbers(report.having(logs[log], **case), column)[-1]

    linear = dict(arm="linear", T="2", alpha="1.0", rate="0.001")
    found = number("text", "bits", **linear, seed="0")
    told = number("text", "bits", **linear, seed="1")
    word = number("text-words", "bits")
    once, twice_read = report.numbers(report.having(logs["text-longer"], arm="bptt"), "updates")
    assert once == number("text-words", "updates") and twice_read == 2 * once
    longer = number("text-longer", "bits", arm="bptt")
    twice = number("text-longer", "bits", arm="twice")
    right = number("recall", "accuracy")
    size = number("recall-cells", "size")
    searched = min(report.numbers(logs["search"], "valid_perplexity"))
    bptt = number("methods-small-ptb", "test_perplexity", method="bptt")
    dni = number("methods-small-ptb", "test_perplexity", method="dni")
    results = report.results(logs)
    for line in (
        rf"\|2\|layer-wise, one linear map\|{found:.3f}\|",
        rf"\|2\|layer-wise, one linear map\|0.001\|1\|{told:.3f}\|.*\|\|\|",
        rf"\|5\|truncated BPTT\|-\|1\|{word:.3f}\|\|\|\|\|",
        rf"\|\d+\|{longer:.3f}\|{twice:.3f}\|\{longer - twice:+.4f}\|",
        rf"\|answers\|1\|layer-wise DNI, one linear map\|0.001\|{right:.2f} \[.*\|[01]/1\|",
        rf"\|lstm\|layer-wise DNI, one linear map\|0.01\|.*\|{size:,.2f}\|",
        rf"\|ptb\|2\|neuron-wise DNI\|0.004\|42\|{searched:.2f}\|.*\|",
        rf"\|neuron-wise DNI\|.*\|{dni:.2f}\|-\|`--mode dni .*`\|",
        rf"\|neuron-wise DNI - truncated BPTT\|-0.36\|\{dni - bptt:+.2f}\|1\|",
    ):
        assert re.search(f"^{line}$", results, re.M), line
    assert "2|BPTT through two chunks" in results
    assert f"|truncated BPTT|62.78|72.6|{bptt:.2f}|" in report.with_tables(README, logs)
    # Today's row in the place of an old one changes one line: it has bits, and no R².
    old = {name: study.read_log(study.LOGS / f"{name}.csv") for name in report.LOGS}
    new = report.having(logs["text"], **linear, seed="0")
    replaced = report.having(old["text"], **linear, seed="0")
    kept = [row for row in old["text"] if row not in replaced]
    study.write_log(tmp_path / "log.csv", kept + new)
    mixed = report.results({**old, "text": study.read_log(tmp_path / "log.csv")})
    [(was, now)] = [
        lines
        for lines in zip(report.results(old).split("\n"), mixed.split("\n"))
        if len(set(lines)) > 1
    ]
    assert now == was.replace("2.496 (-0.210)", f"{found:.3f}")


def test_the_tables_say_what_a_hand_would():
    """Means and deviations are over seeds, and differences within a seed."""
    rows = [
        dict(method=method, seed=seed, valid_perplexity=valid, test_perplexity=tested)
        for method, seed, tested, validated in (
            ("bptt", "1", "9", "57"),  # validated with 5 after one epoch, and with 7 after two
            ("bptt", "2", "11", "86"),
            ("dni", "1", "1", "43"),
            ("dni", "2", "0.5", "29"),
        )
        for valid in validated
    ]
    table = report.methods_table(rows, rows[:1])
    assert "|truncated BPTT|62.78|72.6|10.00 ± 1.41|9.00|`--mode bptt --data ptb`|" in table
    assert "|neuron-wise DNI|62.42|72.37|0.75 ± 0.35|-|`--mode dni --data ptb`|" in table
    # Differences -8 and -10.5: mean -9.25, deviation 1.7678, t 12.706, half of the interval 15.88.
    table = report.differences_table(rows)
    assert "|neuron-wise DNI - truncated BPTT|-0.36|-9.25 [-25.13, +6.63]|2|" in table
    # At the best epochs, which were tested: 3 - 5 and 2 - 6. Mean -3, deviation 1.4142, half 12.71.
    table = report.validation_differences_table(rows)
    assert "|neuron-wise DNI - truncated BPTT|-3.00 [-15.71, +9.71]|2|" in table
    # Trainings with g: the last epochs say 0.2 and 0.4, mean 0.3, and 0.6 is the largest of all.
    # The method without g has blanks.
    rows = [
        dict(method=method, seed=seed, dni_injected=injected, dni_lost=lost)
        for method, seed, injected, lost in (
            ("bptt", "1", "", ""),
            ("dni", "1", "0.6", "0.9"),
            ("dni", "1", "0.2", "0.5"),
            ("dni", "2", "0.4", "0.7"),
        )
    ]
    table = report.methods_injected_table(rows)
    assert "|neuron-wise DNI|2|0.3000 ± 0.1414|0.6000|0.600 ± 0.141|" in table
    assert "truncated BPTT" not in table and report.methods_injected_table(rows[:1]) == ""
