"""Decoupled neural interfaces (DNI) that predict the gradient a recurrent state would receive from the future.

Papers
    DNI          Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", arXiv 1608.05343
    Neuron-wise  Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling",
                 section 2.1 (Eq. 1) and section 2.2

Text is read in chunks of T steps. Truncated backpropagation cuts the graph at every border between two chunks, so the
state s that crosses it never hears what it did to the future. A DNI g looks at s and says what it would have heard.

Glossary
    name       symbol        shape               meaning
    state      s_k           [(B, H_l)] a layer  the recurrent states c at border k, on entering chunk k
    neurons    N             -                   scalars in s_k: B * sum over layers of H_l
    target     delta_k       as s_k              dL_k/ds_k + (ds_{k+1}/ds_k)^T alpha delta^_{k+1}: T true steps of the
                                                 future gradient and, for the rest, g's own word
    synthetic  delta^_k      as s_k              g(s_k, h_g; phi), the prediction of delta_k
    memory     h_g           ((N, 50), x_prev)   g's own recurrent state, as QRNNLayer has it: one row for each neuron of
                                                 each stream
    scale      alpha         -                   factor on a prediction where it is injected, and so, through the target,
                                                 g's discount a chunk: delta is the gradient of the whole future for 1

Units: targets are T B times the gradient of what a chunk minimises, a mean over T B tokens. That is the gradient of ONE
STREAM'S SUMMED LOSS; the mean's own are so small that Adam's epsilon would drown g's learning. Whoever calls `inject`
divides by T B again.

Not here: gates that decide when to trust g, synthetic inputs, interfaces between layers rather than in time.

Run `python dni.py` to see g learn a gradient it can know and fail at one it cannot.
"""

import torch
import torch.nn.functional as F
from torch import nn

from qrnn import Compiled, QRNNLayer


class NeuronDNI(nn.Module):
    """The neuron-wise interface: one small network g shared by all neurons, scalar in, scalar out (section 2.2).

        s --- MLP 1 -> 50 --- QRNN of 50 over the borders, memory h_g --- MLP 50 -> 1 --- synthetic gradient

    The neurons of all layers and streams are g's BATCH; its time is the count of borders. So each neuron has its own
    memory, and the number of parameters knows nothing of how many neurons there are.
    (Departure: the authors' code runs g's recurrence ACROSS the neurons, as one sequence of N; README, deviation 1. Nor is there a gradient through h_g from one border to the next, here: deviation 6.)

    hidden_size: 50. window, zoneout: of g's QRNN layer. noise: g sees s * (1 + noise * N(0, 1)) while in training mode.
    last_layer: bound b of the last layer's U(-b, b); 0 makes the first synthetic gradients exactly zero, after DNI.
    compile: use the `Compiled` form (qrnn.py) of the same code.
    generator: of noise and zoneout, on the device of the states; None for torch's own, which the model draws from too.
    """

    def __init__(self, hidden_size=50, window=1, zoneout=0.0, noise=0.0, last_layer=0.0, compile=False, generator=None):
        super().__init__()
        self.noise, self.generator = noise, generator
        self.encode = nn.Sequential(nn.Linear(1, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size))
        self.rnn = QRNNLayer(hidden_size, hidden_size, window, zoneout=zoneout)
        self.decode = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1))
        start_last_layer(self.decode[-1], last_layer)
        self.fast = Compiled(self.predict) if compile else self.predict

    def forward(self, state, memory=None):
        """state: list of (B, H_l) tensors, one a layer; memory: what the previous border returned, or None.

        Returns the synthetic gradients, a list of the same shapes, and the memory after this border.
        """
        s = torch.cat(state, 1).flatten()[:, None]                      # (N, 1), one stream after the other
        if self.noise and self.training:
            s = s * (1 + self.noise * normal_like(s, self.generator))
        masks = self.rnn.draw(s[None], self.generator)
        d, memory = self.fast(s, self.rnn.zero_state(s[None]) if memory is None else memory, masks)
        return list(d.view(len(state[0]), -1).split([c.shape[1] for c in state], 1)), memory

    def predict(self, s, memory, masks=None):
        """g itself. s: (N, 1) -> the synthetic gradients (N,) and the memory after this border."""
        x = self.encode(s).to(s.dtype)[None]                                                       # (1, N, 50)
        h, memory = self.rnn(x, memory, masks)                                                     # one step a border
        return self.decode(h[0]).to(s.dtype).flatten(), memory


class LayerDNI(nn.Module):
    """The layer-wise interface of DNI, section 2.1, as the control: from the whole state of a layer to its whole gradient.

    One MLP H_l -> 50 -> 50 -> H_l a layer; streams are the batch; no memory. sizes: H_l of each layer.
    Knows which neuron is which, and pays for it in parameters: about 100 H_l a layer. The rest is as in NeuronDNI.
    """

    def __init__(self, sizes, hidden_size=50, noise=0.0, last_layer=0.0, generator=None):
        super().__init__()
        self.noise, self.generator = noise, generator
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(h, hidden_size), nn.ReLU(),
                                                nn.Linear(hidden_size, hidden_size), nn.ReLU(),
                                                nn.Linear(hidden_size, h)) for h in sizes)
        for mlp in self.mlps:
            start_last_layer(mlp[-1], last_layer)

    def forward(self, state, memory=None):
        """As NeuronDNI.forward; the memory stays None."""
        if self.noise and self.training:
            state = [c * (1 + self.noise * normal_like(c, self.generator)) for c in state]
        return [mlp(c).to(c.dtype) for mlp, c in zip(self.mlps, state, strict=True)], None


def normal_like(x, generator):
    """Random numbers from N(0, 1) in the shape, type and place of x."""
    return torch.empty_like(x).normal_(generator=generator)


def start_last_layer(linear, bound):
    """Weights and bias from U(-bound, bound)."""
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.uniform_(linear.bias, -bound, bound)


# ------------------------------------------------------------------------------------- the two halves of a DNI's step

def inject(loss, state, synthetic, scale):
    """Backpropagate from the chunk's loss AND from the state it leaves behind (Eq. 1):

        dL/dtheta  =  dL_k/dtheta + (ds_{k+1}/dtheta)^T  scale * delta^_{k+1}

    loss: a scalar; state: s_{k+1}, a list of tensors still attached to their graph; synthetic: delta^_{k+1}, the same
    shapes; scale: alpha / (T B) for a loss that is a mean over T B tokens. Gradients are added to .grad as by
    loss.backward(). The state s_k that entered the chunk, if it requires grad, receives

        dL_k/ds_k + (ds_{k+1}/ds_k)^T  scale * delta^_{k+1}

    which, times T B, is the BOOTSTRAPPED TARGET delta_k: T true steps, then g's own word for the rest (section 2.1).
    """
    torch.autograd.backward([loss, *state], [None, *(scale * d.detach() for d in synthetic)])


def regress(optimizer, predicted, target):
    """One step of phi towards the targets: the mean of (delta^ - delta)^2 over all neurons, in one update (section 2.2).

    optimizer: of g's parameters; predicted: delta^_k with its graph; target: delta_k, no gradient flows into it.
    Returns the mean squared error before the step, a tensor.
    """
    error = F.mse_loss(joined(predicted), joined(target).detach())
    optimizer.zero_grad(set_to_none=True)
    error.backward()
    optimizer.step()
    return error.detach()


def joined(tensors):
    """A list of tensors as one vector of all their N numbers."""
    return torch.cat([t.flatten() for t in tensors])                                               # (N,)


class Agreement:
    """Does g learn? Two running measures of predictions p against targets t, over all neurons and borders seen.

        cosine = sum p t / sqrt(sum p^2 sum t^2)        direction alone: 1 parallel, 0 unrelated; sums over borders of
                                                        means over neurons
        R^2    = 1 - sum (p - t)^2 / sum t^2            1 perfect; 0 no better than predicting zero; below 0, worse
    """

    def __init__(self):
        self.sums = 0.0

    def update(self, predicted, target):
        """Take in the predictions and targets of one border, lists of tensors of the same shapes."""
        p, t = joined(predicted).detach().float(), joined(target).detach().float()
        self.sums = self.sums + torch.stack([p @ t, p @ p, t @ t, (p - t) @ (p - t)]) / len(p)    # stays on the device

    def result(self):
        """(cosine, R^2) as floats; nan where nothing, or nothing but zeros, was seen."""
        if isinstance(self.sums, float):
            return float("nan"), float("nan")
        pt, pp, tt, error = self.sums.cpu().double().unbind()
        return (pt / (pp * tt).sqrt()).item(), (1 - error / tt).item()


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, gradient in (("a function of the neuron's value, sin(3 s)", lambda s: torch.sin(3 * s)),
                           ("a coin toss for each neuron", lambda s: torch.randn_like(s).sign())):
        g = NeuronDNI()
        optimizer, memory = torch.optim.Adam(g.parameters(), 3e-3), None
        print(f"the future gradient is {name}")
        for border in range(1, 401):
            state = [torch.rand(8, 16) * 2 - 1, torch.rand(8, 32) * 2 - 1]
            target, agreement = [gradient(s) for s in state], Agreement()
            predicted, memory = g(state, memory)
            memory = tuple(m.detach() for m in memory)
            agreement.update(predicted, target)
            regress(optimizer, predicted, target)
            if border in (1, 25, 100, 400):
                print("  border {:3d}   cosine {:+.3f}   R^2 {:+.3f}".format(border, *agreement.result()))
