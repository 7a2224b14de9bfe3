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
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
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
    text, module = (HERE / "qrnn.py").read_text(encoding="utf-8"), types.ModuleType("another_qrnn")
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
    first, weights = gates(T), [randn(T, 3, 4), randn(3, 4)]
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
    qrnn, x = QRNN(3, 4, 2, window=window).double(), randn(7, 2, 3)
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, 7), n) for n in (1, 2, 6)
    ):
        state, pieces = None, []
        for start, stop in itertools.pairwise((0, *cuts, 7)):
            piece, state = qrnn(x[start:stop], state)
            pieces.append(piece)
        close((torch.cat(pieces), state), qrnn(x))


def test_qrnn_is_called_like_an_lstm():
    """Same shapes in and out as nn.LSTM, (T, B, I) or batch_first. Wrong shapes are refused."""
    x, tokens, outputs = torch.randn(7, 3, 5), torch.zeros(7, 3, dtype=torch.int64), []
    for batch_first in (False, True):
        torch.manual_seed(0)
        options = dict(num_layers=2, batch_first=batch_first, dropout=0.5)
        qrnn, lstm = QRNN(5, 4, **options), nn.LSTM(5, 4, **options)
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
        (r"\(3, 4\).*\(1, 3, 5\).*\(1, 4\)", lambda: qrnn(x, [(c[:1], x_prev), second])),
        (r"\(3, 4\).*\(1, 3, 5\).*\(0, 3, 5\)", lambda: qrnn(x, [(c, x_prev[:0]), second])),
        ("2 pairs, one a layer, got 1", lambda: QRNN(5, 4, 2)(x, [(c, x_prev[:0])])),
        (
            r"\(B, T >= 1, 5\), got \(7, 3, 6\)",
            lambda: QRNN(5, 4, batch_first=True)(torch.randn(7, 3, 6)),
        ),
        (
            "PackedSequence: .* pad x on the right",
            lambda: qrnn(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 6, 5]))),
        ),
        (r"\(7, 3\).*\(6, 3\)", lambda: LanguageModel(9, 4, 4, 1)(tokens, tokens[1:])),
        (r"\(7, 3\).*\(3, 7\)", lambda: LanguageModel(9, 4, 4, 1)(tokens, tokens.t())),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    with FakeTensorMode(), torch.device("meta"):  # as nn.LSTM, with shapes and no numbers
        assert QRNN(5, 4, 2)(torch.zeros(7, 3, 5))[0].shape == (7, 3, 4)
    padded = torch.cat([x, torch.full((2, 3, 5), math.nan)])  # what comes later has no say
    assert torch.equal(QRNN.forward(qrnn.eval(), padded)[0][:7], qrnn(x)[0])


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
    layer, p = QRNNLayer(5, 400, zoneout=0.3).double(), 0.3
    x, c0 = randn(1, 1, 5).expand(6, 8, 5), randn(8, 400)
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
    model, results = LanguageModel(50, 32, 64, 2).to(device), []
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
    autocast, state, found = torch.autocast(device, product, product != torch.float32), None, []
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
    s, seen, state = train.preset("paper", mode, "ptb"), [], None
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
    T_B, future = chunks[0][0].numel(), []
    for k in range(2):
        gradients = grad(sum(losses[k + 1 :]), c_of(states[k]), retain_graph=True)
        future.append([T_B * d for d in gradients])
    future.append([torch.zeros_like(c) for c in c_of(states[2])])

    def sum_over_chunks(synthetic):
        dni, state, total, truth = Interface(NeuronDNI().double()), None, 0.0, iter(future)
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
    optimizer, state, borders = torch.optim.SGD(model.parameters(), 0.0), None, []
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
        self.embedding, self.rnn, self.decoder = nn.Embedding(7, 5), kind(5, 6), nn.Linear(6, 7)

    def forward(self, chunk, s):
        x, one = self.embedding(chunk[:-1]), isinstance(self.rnn, nn.GRU)
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
    T, B, alpha = 4, 3, 0.7
    n = 2 if kind is nn.LSTM else 1
    read, g, phi_gradients, used = Reader(kind).double(), lively(make_g(n)).double(), [], None
    dni = Interface(g, torch.optim.SGD(g.parameters(), 0.01), alpha)
    dni.optimizer.register_step_pre_hook(
        lambda *_: phi_gradients.append([p.grad.clone() for p in g.parameters()])
    )
    text, s_next, memory = torch.randint(7, (3 * T + 1, B)), [torch.zeros(B, 6, **DOUBLE)] * n, None
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
    g, s = lively(LayerDNI([4, 3], hidden_size)), [torch.randn(2, 4), torch.randn(2, 3)]
    for mlp, x, answer in zip(g.mlps, s, g(s)[0]):
        linears = [m for m in mlp if isinstance(m, nn.Linear)]
        for i, linear in enumerate(linears):
            x = (x.relu() if i else x) @ linear.weight.T + linear.bias
        assert len(linears) == matrices
        close(answer, x)
    paper, default = [1550, 1550, 1550, 400], Interface(NeuronDNI()).optimizer
    count, neuron = (sum(p.numel() for p in g.parameters()) for g in (LayerDNI(paper), NeuronDNI()))
    assert 10 <= count / neuron <= 100
    assert isinstance(default, torch.optim.Adam) and default.param_groups[0]["lr"] == 1e-4


def chunk_of(dni, s, scale=1.0):
    """A chunk of a made-up model, s_next = sin(2 s), loss = mean s_next². g's weights after it."""
    s = [c.detach().requires_grad_() for c in s]
    s_next = [(2 * c).sin() for c in s]
    loss = sum(c.square().mean() for c in s_next)
    (scale * (loss + dni.credit(s, s_next, 10))).backward()
    dni.learn()
    return flatten(dni.g.parameters()).detach().clone(), s_next


@pytest.mark.parametrize("scale", [65536.0, 0.25])
def test_a_scaled_loss_teaches_g_the_same(scale):
    """The loss times a GradScaler's factor, or divided as gradients are accumulated.

    Infinite targets, or a model of another type, do no harm.
    """
    found = []
    for factor in (1.0, scale):
        torch.manual_seed(3)
        dni, s = Interface(lively(NeuronDNI())), [torch.randn(2, 3), torch.randn(2, 4)]
        for _ in range(3):
            weights, s = chunk_of(dni, s, factor)
        found.append(weights)
    close(*found)
    weights, _ = chunk_of(dni, s, math.inf)
    assert weights.isfinite().all()
    s[0].data[0, 0] = math.nan  # of one neuron, before and after
    weights, _ = chunk_of(dni, s)
    assert weights.isfinite().all() and dni.memory[0].isfinite().all()
    for g in (NeuronDNI(), LayerDNI([3, 4])):
        for dtype in (torch.float64, torch.bfloat16):
            _, s = chunk_of(
                Interface(g), [torch.randn(2, 3, dtype=dtype), torch.randn(2, 4, dtype=dtype)]
            )
            assert s[0].dtype == dtype


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
    p, t = torch.cat(guesses), torch.cat(truths)
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
    T, B = 3, 2
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
    left = crossing(g, read_apart(model, chunks), T_B, parameters, alpha)

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
        (r"got \[\[.*\(2, 3\)\], \[.*\(2, 2\)\]\]", dict(end=lambda c: c[:, :2])),
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
    of_s, of_theta = [0.0, 0.0], 0.0
    for (w1, w2, *future), p in text.items():
        s, loss = 2 * w2 - 1 + theta * (2 * w1 - 1), 0.0
        for k, word in enumerate(future):
            low, high = logit((0, *future[:k])), logit((1, *future[:k]))
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
    tokens, by_hand = torch.randint(13, (40,)), 0.0
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
    layers, tokens, seen = model.rnn.layers, torch.randint(60, (30, 40)), []
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
        start, length = 0.0, base
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
    with pytest.raises(ValueError):
        schedule.step(-1)  # refused, and nothing has changed
    schedule.step()
    assert schedule.last_epoch == 6
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(()))]})
    with pytest.raises(ValueError, match="3 groups, and SGDR was made for 2"):
        schedule.step()
    for mode in ("bptt", "dni"):
        schedule = train.make_schedule(small_settings(mode), optimizer_with(0.1))
        assert rates_of(schedule, (0, 1 / 3, 5, 1e9)) == [[0.1]] * 4 and schedule.run.index == 0


# ------------------------------------------------------------------------------------------ 8. data


def spelt(corpus, split):
    return " ".join(corpus.vocabulary[token] for token in getattr(corpus, split))


def write_files(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


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
        ("wt2", (2_088_628, 217_646, 245_569, 33_278)),
        ("ptb-chars", (5_017_482, 393_042, 442_423, 50)),
    ],
)
def test_counts_of_the_canonical_corpora(name, counts, capsys):
    """Files of the recorded SHA-256 have the literature's numbers of tokens and words.

    PTB's unigram perplexity is 639.
    """
    corpus = data.load_corpus(name)
    assert (
        *(len(getattr(corpus, split)) for split in data.SPLITS),
        len(set(corpus.vocabulary)),
    ) == counts
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
    assert torch.equal(inputs.t().flatten(), torch.arange(L * B)) and n - 1 - L * B < B
    with pytest.raises(
        data.UserError, match=f"too few for {B} streams.*less than one chunk of {L + 1};"
    ):
        data.streams(torch.arange(n), B, L + 1)
    inputs, targets = data.streams(torch.arange(26), 6)  # the picture in its docstring
    rows = [" ".join(chr(97 + letter) for letter in row) for row in torch.cat([inputs, targets], 1)]
    drawn = re.findall(r"^ +((?:\w +){11}\w)$", data.streams.__doc__, re.M)
    assert [" ".join(row.split()) for row in drawn] == rows


def test_the_vocabulary_is_by_count_then_by_first_use():
    """A slow sort gives the same order.

    New and rare words share one <unk>: that of train, where train has one.
    """
    words = "d b c b d a c e <eos>".split()
    corpus = data.from_lines("x", {split: [words[:-1]] for split in data.SPLITS})
    assert corpus.vocabulary == sorted(set(words), key=lambda w: (-words.count(w), words.index(w)))
    assert spelt(corpus, "train").split() == words
    for train_text, min_count, vocabulary, valid in (
        ("a <unk> a b", 1, "a <unk> b <eos>", "<unk> b <eos>"),
        ("a a b", 1, "a b <eos> <unk>", "<unk> b <eos>"),
        ("a a a b b", 3, "a <eos> <unk>", "<unk> <unk> <eos>"),
    ):
        splits = {"train": [train_text.split()], "valid": [["new", "b"]], "test": [["newer"]]}
        corpus = data.from_lines("x", splits, min_count)
        assert (" ".join(corpus.vocabulary), spelt(corpus, "valid")) == (vocabulary, valid)


def test_unigram_perplexity_by_hand():
    """1 / the geometric mean of the shares in train.

    Where a split has words that train lacks, one is added to every count.
    """
    corpus = data.from_lines(
        "x", {"train": [["a", "a", "b"]], "valid": [["a", "b"]], "test": [["a", "z"]]}
    )
    found = [data.unigram_perplexity(corpus, split) for split in ("valid", "test")]
    assert found == pytest.approx(
        [(2 / 4 * 1 / 4 * 1 / 4) ** (-1 / 3), (3 / 8 * 1 / 8 * 2 / 8) ** (-1 / 3)]
    )


def test_a_folder_is_read(tmp_path, monkeypatch):
    """<eos> ends every line, empty ones too. A BOM and the CR of Windows are no words.

    The characters of ptb are its text, with _ for a space.
    """
    write_files(
        tmp_path,
        {"train.txt": b"\xef\xbb\xbfa b a\r\n\r\nc\r\n", "valid.txt": "a d\n", "test.txt": "c c"},
    )
    assert (
        spelt(data.load_corpus(str(tmp_path), min_count=2), "train")
        == "a <unk> a <eos> <eos> <unk> <eos>"
    )
    corpus = data.load_corpus(str(tmp_path))
    assert data.describe(corpus)[0].endswith("<unk>: 0.0% of train, 33.3% of valid, 0.0% of test")
    assert spelt(corpus, "train") == "a b a <eos> <eos> c <eos>" and corpus.name == tmp_path.name
    assert spelt(corpus, "valid") == "a <unk> <eos>" and spelt(corpus, "test") == "c c <eos>"
    canonical(monkeypatch, {("ptb", split): "the end\nof it\n" for split in data.SPLITS})
    write_files(tmp_path, {f"ptb.{split}.txt": "the end\nof it\n" for split in data.SPLITS})
    assert (
        spelt(data.load_corpus("ptb-chars", tmp_path), "test")
        == "t h e _ e n d <eos> o f _ i t <eos>"
    )


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
    """Of two corpora side by side each name finds its own, in any layout.

    A file that is not canonical is read, with a note, only where its place names the corpus.
    """
    texts = {(name, split): f"{name} {split}\n" for name in data.DOWNLOADS for split in data.SPLITS}
    canonical(monkeypatch, texts)
    of_ptb, of_wt2 = layout
    places = {"ptb": of_ptb, "wt2": of_wt2}
    files = {places[name].format(split): text for (name, split), text in texts.items()}
    write_files(tmp_path, files)
    if of_ptb == "{}.txt":
        write_files(tmp_path, {"ptb/train.txt": "strange"})
    for name in data.DOWNLOADS:
        assert spelt(data.load_corpus(name, tmp_path), "train") == f"{name} train <eos>"
    assert not capsys.readouterr().err
    if of_ptb == "{}.txt":
        write_files(tmp_path, {"train.txt": "stranger"})
        assert spelt(data.load_corpus("ptb", tmp_path), "train") == "strange <eos>"
        assert (
            f"{tmp_path / 'ptb' / 'train.txt'} is not the canonical file" in capsys.readouterr().err
        )


def test_downloads_are_checked_and_done_once(tmp_path, monkeypatch):
    """A corrupted or missing file, or a host that does not answer, is refused in one line.

    The line has the address and the way out. Nothing is left. What was downloaded is not asked for
    again.
    """
    texts = {("ptb", split): f"the {split} text\n" for split in data.SPLITS}
    web, target = tmp_path / "web", tmp_path / "deep" / "down" / "train.txt"
    write_files(
        web, {**{split: text for (_, split), text in texts.items()}, "bad": "the train texT\n"}
    )
    canonical(monkeypatch, texts, web.as_uri())
    for bad, why in (
        (f"{web.as_uri()}/bad", "hash"),
        (f"{web.as_uri()}/missing", "No such file"),
        ("http://127.0.0.1:9/", "refused"),
    ):
        with pytest.raises(data.UserError, match=why) as refusal:
            data.download(bad, target, data.DOWNLOADS["ptb"][1]["train"])
        message = str(refusal.value)
        assert "\n" not in message and all(
            x in message for x in (bad, data.ENVIRONMENT, str(target))
        )
        assert list(tmp_path.iterdir()) == [web]
    first = data.load_corpus("ptb", tmp_path / "here")
    shutil.rmtree(web)
    assert data.load_corpus("ptb", tmp_path / "here").fingerprint() == first.fingerprint()
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["test.txt", "train.txt", "valid.txt"]


def test_pydoc_is_english_split_by_topic(monkeypatch):
    """It is large enough to learn from, and train has each word twice.

    Of 100 topics of one size 80 are for training, 10 each for validation and test.
    """
    corpus = data.load_corpus("pydoc")
    assert len(corpus.train) > 40_000 and min(len(corpus.valid), len(corpus.test)) > 4_000
    assert {"the", "statement", "<eos>", "<unk>"} < set(corpus.vocabulary)
    assert corpus.train.bincount().min() == 2
    topics = {
        f"{i}": f"Topic number {i} begins\n\nSaid in every topic\n\nIt ends here"
        for i in range(100)
    }
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=topics))
    begins = "topic number <unk> begins <eos>"
    train_text, valid, test = (spelt(data.pydoc(), split) for split in data.SPLITS)
    assert train_text == " ".join([begins] * 80) and valid == " ".join([begins] * 10)
    said_once = f"{begins} <unk> <unk> <unk> topic <eos>"  # no paragraph comes twice
    assert test == " ".join([said_once] + [begins] * 9)


def test_recall_reaches_its_floor_only_with_memory():
    """The closed form: a reader chooses among the words seen in a place.

    Where the word can be known, there is one to choose from.
    """
    corpus = data.make_recall(delay=12, symbols=4, fillers=8, count=500)
    rows = corpus.train[:-1].view(500, 15)
    kinds = [len(column.unique()) for column in rows.t()]
    assert corpus.vocabulary[rows[0, 13]] == "?" and torch.equal(rows[:, 0], rows[:, 14])
    assert math.isclose(corpus.facts["perplexity floor"], math.prod(kinds[:14]) ** (1 / 15))
    assert math.isclose(corpus.facts["perplexity without the symbol"], math.prod(kinds) ** (1 / 15))
    assert len({tuple(getattr(corpus, split)[:750:15].tolist()) for split in data.SPLITS}) == 3


@pytest.mark.parametrize("borders", [1, 2, 3])
def test_episodes_put_borders_between_symbol_and_query(borders):
    """In every stream b T steps lie between the two, in all phases.

    The streams are parts of recall's text, one token more than whole episodes apart. If answers
    alone are scored, the other targets are -100.
    """
    T, period = 10, borders * 10 + 2
    inputs, targets = data.episodes(borders * T - 1, 2 * period, 3 * period, seed=3)
    _, answers = data.episodes(borders * T - 1, 2 * period, 3 * period, seed=3, answers_only=True)
    query = inputs == 12
    assert torch.equal(answers, torch.where(query, targets, -100))
    t, stream = query[period:].nonzero().unbind(1)
    assert (
        sorted(stream.tolist()) == list(range(3 * period)) and t.bincount().tolist() == [3] * period
    )
    symbol = inputs[period + t - borders * T, stream]
    assert torch.equal(symbol, targets[period + t, stream]) and symbol.unique().tolist() == [
        0,
        1,
        2,
        3,
    ]
    text = data.make_recall(borders * T - 1, count=6 * period + 13, seed=3).train
    for first, part in enumerate((inputs, targets)):
        apart = [text[(2 * period + 1) * b + first :][: 2 * period] for b in range(3 * period)]
        assert torch.equal(part, torch.stack(apart, 1))


# ------------------------------------------------------------------------- 9. train.py as a program

TINY = (
    "--hidden-size 12 --embedding-size 8 --batch-size 4 --chunk 20 --device cpu --precision fp32"
).split()


@pytest.fixture
def corpus(tmp_path):
    """A folder with a tiny text, 41 words a line. Its 30 lines of train are 16 chunks of TINY."""
    for split, n, step in (("train", 30, 1), ("valid", 8, 1), ("test", 4, 2)):
        lines = [
            " ".join(f"w{(i * i + step * j) % 23}" for j in range(41)) + "\n" for i in range(n)
        ]
        write_files(tmp_path / "text", {f"{split}.txt": "".join(lines)})
    return tmp_path / "text"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def program(*arguments, stdout=io.StringIO):
    """What becomes of `python train.py ARGUMENTS`, in this process."""
    out, err = stdout(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background has none
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train.main(list(map(str, arguments)))
        except SystemExit as exit:  # argparse's own
            status = exit.code
    signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


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


def left_by(folder):
    """What a training leaves, but its seconds: its log, what it learned, and the best model.

    (Adam's moments belong to what it learned.)
    """
    with (folder / "log.csv").open() as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return rows, checkpoint["learners"], checkpoint["best"]


def best_model(folder):
    """The best model and its vocabulary. The folder's checkpoint has all that is needed."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model, _, _ = train.build(
        train.Settings(**checkpoint["settings"]), len(checkpoint["vocabulary"]), "cpu"
    )
    model.load_state_dict(checkpoint["best"]["model"])
    return model, checkpoint["vocabulary"]


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
    close(left_by(tmp_path / "half")[1:], straight[1:], atol=0, rtol=0)
    assert left_by(tmp_path / "half")[0] == rows


GOES_ON = "interrupted; the same command with --resume {} goes on after the last whole epoch"
NOT_FINITE = (
    "stopped: the validation loss or a weight is not finite after epoch 2; try a lower --lr"
)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
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
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            3,
            2,
            "error: no memory, or no disk, left",
        ),
        (
            RuntimeError("can't allocate memory:\nyou tried"),
            20,
            2,
            "error: no memory, or no disk, left",
        ),
    ],
    ids=lambda value: str(value)[:9],
)
def test_whatever_stops_a_training_loses_nothing(
    event, step, status, line, corpus, tmp_path, monkeypatch
):
    """In the first, second or last of three epochs of 16 steps: one line says why.

    What the last whole epoch left is there, and nothing beside it. Resumed, the training ends as a
    straight one.
    """
    arguments = [
        "--data",
        corpus,
        *TINY,
        "--mode",
        "dni",
        "--dni-warmup",
        9,
        "--epochs",
        3,
        "--out",
    ]
    last, folder, steps = succeed(*arguments, tmp_path / "straight"), tmp_path / "stopped", []

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
    assert not whole or left_by(folder)[0] == left_by(tmp_path / "straight")[0][:whole]
    assert succeed(*arguments, folder, "--resume", folder) == last
    close(left_by(folder)[1:], left_by(tmp_path / "straight")[1:], atol=0, rtol=0)
    assert left_by(folder)[0] == left_by(tmp_path / "straight")[0]


@SLOW
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_killed_training_goes_on(corpus, tmp_path):
    """Killed after its second checkpoint and before its end, it ends as if nothing had happened."""
    arguments, folder = ["--data", corpus, *TINY, "--epochs", "40", "--out"], tmp_path / "killed"
    command = map(str, [sys.executable, HERE / "train.py", *arguments, folder])
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2 "):
            process.kill()
    assert process.wait() == -signal.SIGKILL and 2 <= len(left_by(folder)[0]) < 40
    assert succeed("--resume", folder) == succeed(*arguments, tmp_path / "straight")
    close(left_by(folder)[1:], left_by(tmp_path / "straight")[1:], atol=0, rtol=0)


@pytest.mark.parametrize(
    "curve, cuts, best",
    [
        ([3, 1, 2, 0.5, 2], [], 4),
        ([3, 1, 2, 2, 2], [2, 4], 2),
        ([1, 1, 1], [], 1),
        ([2], [], 1),
        ([3, 1, 2], [2], 2),
    ],
)
def test_the_best_model_is_the_one_tested(curve, cuts, best, corpus, tmp_path, monkeypatch):
    """Where validation goes down, up and down, it is that of the first lowest epoch.

    Whether the training was resumed makes no difference.
    """
    evaluate, models = train.evaluate, []

    def scripted(model, tokens, batch_size, *a):
        if batch_size == 1:
            return evaluate(model, tokens, batch_size, *a)
        models.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return curve[len(models) - 1]

    monkeypatch.setattr(train, "evaluate", scripted)
    how = ["--data", corpus, *TINY, "--out", tmp_path / "r"]
    for epochs in (*cuts, len(curve)):
        ended = program(*how, "--epochs", epochs)
        how = ["--resume", tmp_path / "r"]
    model, vocabulary = best_model(tmp_path / "r")
    text = data.load_corpus(str(corpus))
    assert len(models) == len(curve) and vocabulary == text.vocabulary
    close(dict(model.state_dict()), models[best - 1], atol=0, rtol=0)
    nll = evaluate(model, text.test, 1)
    assert ended.stdout.splitlines()[-2:] == [
        f"bits per token {nll / math.log(2):.4f}",
        f"test perplexity {math.exp(nll):.2f}",
    ]


def test_a_training_that_is_done_is_only_tested(corpus, tmp_path, monkeypatch):
    """--resume without an epoch left tests again, and puts back a lost log.csv.

    With more --epochs it goes on.
    """
    monkeypatch.setattr(train.time, "monotonic", itertools.count(1000).__next__)  # a second a look
    folder, arguments = tmp_path / "r", ["--data", corpus, *TINY, "--epochs", 1, "--out"]
    shown = program(*arguments, tmp_path / "shown", stdout=Terminal).stdout.split("\r\033[K")
    assert (
        len(shown) == 18 and max(map(len, shown[1:17])) <= 80 and "\n" not in "".join(shown[1:17])
    )
    assert re.match(r"epoch 1.00 of 1, perplexity \d+\.\d+, 0 min left$", shown[16])
    last = succeed(*arguments, folder)
    rows, *_ = left_by(folder)
    model, _ = best_model(folder)
    text = data.load_corpus(str(corpus))
    assert float(rows[0]["valid_perplexity"]) == round(
        math.exp(train.evaluate(model, text.valid, 10)), 3
    )
    g = NeuronDNI()
    g.load_state_dict(left_by(folder)[1][1])
    found = train.measure(model, g, text.valid, small_settings(batch_size=4, chunk=20))
    assert {name: float(rows[0][name]) for name in found} == pytest.approx(found, abs=1e-5)
    (folder / "log.csv").unlink()
    assert succeed("--resume", folder) == last and left_by(folder)[0] == rows
    shutil.move(corpus, tmp_path / "moved")  # a corpus is known by its words
    succeed("--resume", folder, "--data", tmp_path / "moved", "--epochs", 3)
    one, two, three = (float(row["seconds"]) for row in csv.DictReader((folder / "log.csv").open()))
    assert 0 < one < two < three < 100


def test_what_resuming_refuses(corpus, tmp_path):
    """Other settings, another text or folder, a file that is no whole checkpoint.

    Nothing is lost.
    """
    folder = tmp_path / "run"
    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", folder)
    file, log = folder / "checkpoint.pt", (folder / "log.csv").read_bytes()
    good, texts = file.read_bytes(), {path: path.read_text() for path in corpus.iterdir()}
    assert "--hidden-size 12, not 13" in refused("--resume", folder, "--hidden-size", 13)
    assert "holds a training with --" in refused("--resume", folder, "--preset", "paper")
    assert "must name one folder" in refused("--resume", folder, "--out", tmp_path / "other")
    assert "already holds a training" in refused("--data", corpus, *TINY, "--out", folder)
    for old, new in ("w", "v"), ("w5 w6", "w6 w5"), ("w7\n", "w7 w7\n"), ("", ""):
        for path, text in texts.items():
            path.write_text(text.replace(old, new))
        assert not old or "another text" in refused("--resume", folder, "--epochs", 2)

    class Code:  # pickled: it makes a folder
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    checkpoint, third = torch.load(file, weights_only=True), len(good) // 3
    one_bit_off = good[:third] + bytes([good[third] ^ 4]) + good[third + 1 :]
    damaged = [b"", good[:third], one_bit_off]
    for other in ({**checkpoint, "best": Code()}, {**checkpoint, "settings": {"seed": 1}}, [1, 2]):
        torch.save(other, tmp_path / "other.pt")
        damaged.append((tmp_path / "other.pt").read_bytes())
    for content in damaged:
        file.write_bytes(content)
        assert f"{file} cannot be read as a checkpoint" in refused(
            "--resume", folder, "--epochs", 2
        )
        assert file.read_bytes() == content and (folder / "log.csv").read_bytes() == log
    assert not (tmp_path / "executed").exists()


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
def test_impossible_settings(flags):
    """Each ends in one line that names the flag, and status 2, before any work."""
    assert re.findall(r"--[a-z0-9-]*[a-z]", flags)[-1] in refused(*flags.split())


def parsed(*arguments):
    """The settings that train.py takes from its command line."""
    return train.parse(arguments)[0]


def test_defaults_and_presets():
    """The settings of README's figures, those of the paper, and what a flag overrides."""
    expected = dict(
        mode="alternating",
        data="pydoc",
        epochs=15,
        seed=42,
        embedding_size=256,
        hidden_size=512,
        num_layers=2,
        dropout_output=0.3,
        dropout_hidden=0.1,
        dropout_input=0.1,
        l2=5e-6,
        clip=0.25,
        batch_size=20,
        chunk=70,
        jitter=False,
        e_base=5,
        dni_kind="neuron",
        dni_alpha=0.9,
        dni_lr=1e-4,
        dni_borders=1,
        dni_warmup=1,
        eta_min=(0.0,),
        mult=2,
        eta_max=(),
        gradient="real",
        lr=1e-2,
    )
    assert vars(parsed()).items() >= expected.items()
    rates = [
        parsed("--mode", mode, "--data", "ptb").lr
        for mode in ("bptt", "dni", "restart", "alternating")
    ]
    assert rates == [4e-3, 4e-3, 1e-2, 1e-2] and parsed("--mode", "dni", "--lr", "0.5").lr == 0.5
    paper, wt2 = (parsed("--preset", "paper", "--data", name) for name in ("ptb", "wt2"))
    expected = dict(
        hidden_size=1550,
        embedding_size=400,
        num_layers=4,
        chunk=200,
        batch_size=20,
        epochs=320,
        lr=1e-3,
        dropout_output=0.4,
        dropout_hidden=0.3,
        dropout_input=0.4,
        dropout_embedding=0.1,
        dropout_weight=0.1,
        l2=1.2e-6,
        clip=0.2,
        seed=42,
        e_base=5,
        dni_alpha=1,
        jitter=True,
    )
    assert vars(paper).items() >= expected.items()
    assert wt2 == dataclasses.replace(paper, data="wt2", dropout_hidden=0.2, clip=0.25)
    model, _, _ = train.build(
        dataclasses.replace(paper, hidden_size=9, embedding_size=7), 20, "cpu"
    )
    sizes = [(layer.input_size, layer.hidden_size, layer.window) for layer in model.rnn.layers]
    assert sizes == [(7, 9, 2), (9, 9, 1), (9, 9, 1), (9, 7, 1)]
    assert (model.activation, model.temporal) == (2, 1)


def test_device_and_precision_are_as_asked():
    """A device that is not there is refused. Products come in bf16 or float32 on request."""
    assert torch.backends.mps.is_available() or "--device mps" in refused("--device", "mps")
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        device, autocast = train.pick_device("cpu", precision)
        with autocast:
            assert device == "cpu" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


@CUDA
@pytest.mark.parametrize("method", ["bptt", "dni", "alternating", "restart", "dni-restart"])
def test_a_gpu_trains_as_a_cpu_does(method, corpus, tmp_path, cuda="cuda"):
    """Two epochs without dropout: perplexities agree to half a percent.

    (A GPU's float32 products are TF32.)
    """
    logs = []
    for device in ("cpu", cuda):
        dropouts = [f"--dropout-{place}=0" for place in ("input", "hidden", "output")]
        succeed(
            *reproduce.METHODS[method],
            "--data",
            corpus,
            *TINY,
            *dropouts,
            "--epochs",
            2,
            "--device",
            device,
            "--out",
            tmp_path / device,
        )
        logs.append(
            [
                float(row[name])
                for row in left_by(tmp_path / device)[0]
                for name in ("train_perplexity", "valid_perplexity")
            ]
        )
    assert logs[0] == pytest.approx(logs[1], rel=5e-3)


def test_texts_and_folders(corpus, tmp_path, monkeypatch):
    """A folder with a text is found from elsewhere. Without --out a training is in trainings/.

    What is wrong with either is told before any training, without a trace.
    """
    monkeypatch.chdir(tmp_path)
    succeed("--data", "text", "--mode", "bptt", *TINY, "--epochs", 1)
    (folder,) = (tmp_path / "trainings").glob("text-bptt-*")
    monkeypatch.chdir("/")
    succeed("--resume", folder)
    few = ["--min-count", 99, "--out", tmp_path / "few"]
    ended = program("--data", corpus, *TINY, "--epochs", 1, *few)
    assert ", vocabulary 2, " in ended.stdout  # <unk> and <eos>
    monkeypatch.setattr(train, "train_step", None)  # nothing is trained
    assert "less than one chunk of 400" in refused("--data", corpus, "--chunk", "400")
    assert refused("--data", corpus, *TINY, "--out", corpus / "train.txt" / "run")
    for content, why in (
        (b"a b\n", "too few for 10 streams"),
        (b"\n\n", "valid.txt holds no words"),
        (b"caf\xe9", "valid.txt is not UTF-8 (byte 3)"),
    ):
        (corpus / "valid.txt").write_bytes(content)
        assert why in refused("--data", corpus, *TINY, "--out", tmp_path / "r")
    (corpus / "valid.txt").unlink()
    assert "has no valid.txt; use pydoc, ptb, ptb-chars, wt2, recall or" in refused(
        "--data", corpus
    )
    assert "klingon has no train.txt and no valid.txt" in refused("--data", "klingon")
    assert not (tmp_path / "r").exists()


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
        "study": {"train", "qrnn"},
        "speed": {"study", "train", "qrnn"},
        "text": {"study", "train", "data", "dni"},
        "recall": {"study", "train", "data", "dni"},
        "injected": {"study", "text", "train", "data", "dni"},
        "authors": {"study", "injected", "train", "data", "dni"},
        "alternate": {"study", "text", "train", "data", "dni", "sgdr"},
        "reproduce": {"study", "train"},
        "tables": set(),
        "report_alternate": {"alternate", "tables"},
        "report": {"study", "text", "recall", "tables", "report_alternate"},
        "figures": {"study", "train", "sgdr"},
        "gpu": {"study", "train", "speed", "reproduce", "report"},
    }
    tested = {"plain", "study", "text", "recall", "reproduce", "report", "injected", "authors"}
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


@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(snippet, marks=[SLOW] if "episodes" in snippet else [])
        for snippet in re.findall(r"```python\n(.*?)```", README, re.S)
    ],
)
def test_readme_snippets_run(snippet, capsys, corpus, tmp_path, monkeypatch):
    """Each runs as it stands, but for the words of the text, and prints what its comments say.

    The one that prints nothing scores a text and continues it as one does who reads all of the text
    again for each word.
    """
    succeed("--data", corpus, *TINY, "--epochs", 1, "--out", tmp_path / "trainings" / "mine")
    monkeypatch.chdir(tmp_path)
    names = {}
    snippet = snippet.replace("the state of the", "w1 w2 w3")
    exec(compile(snippet, "README.md", "exec"), names)
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert printed == re.findall(r"^print.*?  # (.*)$", snippet, re.M)
    if "checkpoint" in names:
        model, vocabulary = best_model(tmp_path / "trainings" / "mine")
        text = [vocabulary.index(word) for word in ("w1", "w2", "w3")]
        logits, _ = model.eval().logits(torch.tensor(text)[:, None])
        log_p = logits[:, 0].log_softmax(-1)
        expected = -(log_p[0, text[1]] + log_p[1, text[2]]) / 2
        assert names["nll"].item() == pytest.approx(expected.item())
        for _ in range(20):
            logits, _ = model.logits(torch.tensor(text)[:, None])
            text.append(logits[-1, 0].argmax().item())
        assert names["text"] == text


@pytest.mark.parametrize(
    "path", ["README.md", "experiments/README.md", "experiments/logs/README.md"]
)
def test_commands_and_links_of_the_readmes(path):
    """Each train.py command is one that train.py understands, and each link leads somewhere."""
    text = (HERE / path).read_text(encoding="utf-8")
    for line in re.findall(r"python train\.py[^#`\n]*", text):
        assert "--resume" in line or parsed(*shlex.split(line)[2:])
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (HERE / path).parent.joinpath(link).exists(), link


def test_the_recipe_is_what_the_search_found():
    """A method's rate has the best mean over seeds on validation text in its longest trainings."""
    rows = study.read_log(study.LOGS / "search.csv")
    for method in reproduce.METHODS:
        for epochs in ("15", "5"):
            mine, found = report.having(rows, data="ptb", method=method, epochs=epochs), {}
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
        flags = f"--out {tmp_path} --device cpu --scale tiny --seconds 400 --stages {stages}"
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
    W_e, b_e = g.encode.weight[:, 0], g.encode.bias
    W, b = g.gates.weight, g.gates.bias
    W_d, b_d = g.decode.weight[0], g.decode.bias
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
    inputs, targets = torch.randint(11, (2, 20, 2))
    texts = list(injected.windows(inputs, targets, 8, 3, 3))
    assert [begins for _, _, begins in texts] == [True, False, True]
    assert torch.equal(texts[1][0], inputs[8:16]) and torch.equal(texts[2][1], targets[3:11])
    found = injected.summary(injected.look_on(model, g, 0.7, texts, 4))

    total = [0.0] * 3
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

            total = [
                a + b for a, b in zip(total, crossing(remembering, window, 8, parameters, 0.7))
            ]
            _, memory = g([c.detach() for c in window[1][0]], memory)
    truncated, lost, sent = total
    assert found["lost"] == pytest.approx((lost.norm() / truncated.norm()).item(), rel=1e-3)
    assert found["injected"] == pytest.approx((sent.norm() / truncated.norm()).item(), rel=1e-3)
    cosine = F.cosine_similarity(sent, lost, 0).item()
    assert found["cosine"] == pytest.approx(cosine, rel=1e-3) and found["windows"] == 3


def test_results_are_what_the_logs_say():
    """results.md and README's tables are what report.py makes of the logs, to the letter.

    The numbers in the prose of experiments/README.md are in results.md.
    """
    logs = {name: study.read_log(study.LOGS / f"{name}.csv") for name in report.LOGS}
    results = report.results(logs)
    assert (study.HERE / "results.md").read_text(encoding="utf-8") == results
    assert report.with_tables(README, logs) == README
    assert README.count("written by experiments/report.py -->") == 2
    prose = re.sub(
        r"```.*?```", "", (study.HERE / "README.md").read_text(encoding="utf-8"), flags=re.S
    )
    cells = re.findall(
        r"[\d.]+", "\n".join(line for line in results.split("\n") if line.startswith("|"))
    )
    found = re.findall(r"\d+\.\d+|\d+/\d+", prose)
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
        rf"\|answers\|1\|layer-wise DNI, one linear map\|0.001\|{right:.2f} \[.*\|[01]/1\|",
        rf"\|lstm\|layer-wise DNI, one linear map\|0.01\|.*\|{size:,.2f}\|",
        rf"\|ptb\|2\|neuron-wise DNI\|0.004\|42\|{searched:.2f}\|.*\|",
        rf"\|neuron-wise DNI\|.*\|{dni:.2f}\|0\|-\|",
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
        dict(method=method, seed=seed, test_perplexity=tested, seconds="90")
        for method, seed, tested in (
            ("bptt", "1", "9"),
            ("bptt", "2", "11"),
            ("dni", "1", "1"),
            ("dni", "2", "0.5"),
        )
    ]
    table = report.methods_table(rows, rows[:1])
    assert "|truncated BPTT|62.78|72.6|10.00 ± 1.41|2|9.00|" in table
    assert "|neuron-wise DNI|62.42|72.37|0.75 ± 0.35|2|-|" in table
    # Differences -8 and -10.5: mean -9.25, deviation 1.7678, t 12.706, half of the interval 15.88.
    table = report.differences_table(rows)
    assert "|neuron-wise DNI - truncated BPTT|-0.36|-9.25 [-25.13, +6.63]|2|" in table
