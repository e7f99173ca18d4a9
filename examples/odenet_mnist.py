"""Section 3 of "Neural Ordinary Differential Equations" on handwritten digits.

Trains a residual network, an RK-Net (backpropagation through the solver) and ODE-Nets
(gradients by adjoints) on the same images, by the same recipe, and compares error,
size, memory and time (table 1 of the paper). Then it looks into the trained ODE-Net as
figure 3 does: error and time against evaluations, evaluations backwards against those
forwards, evaluations against epochs. Figures are printed; with matplotlib they are
drawn, too.

    python examples/odenet_mnist.py --data mnist.npz    # about half an hour, two cores
    python examples/odenet_mnist.py                     # the digits of scikit-learn

The file has images ``X``, (n, height, width) or (n, height, width, channels) bytes, and
labels ``y``. A fifth of them is held out for the test, unless ``--test`` names another
file. Without a file, the 1797 small digits that come with scikit-learn serve.
"""

import argparse
import copy
import time
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sknode import ODENetClassifier
from sknode.fields.conv import group_norm
from sknode.ode import solve_ode

N_BLOCKS = 6
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def main():
    args = parse()
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, X_test, y, y_test, shape = load(args)
    print(f"{len(X)} images to train on, {len(X_test)} to test, {shape} each\n")
    settings = {
        "image_shape": shape,
        "n_channels": args.channels,
        "hidden_layer_sizes": (args.channels,),
        "max_iter": args.epochs,
        "device": args.device,
        "verbose": True,
        "random_state": args.seed,
    }
    # A residual network is an ODE-Net: one whose field is another block in every one of
    # its Euler steps.
    euler = {"solver": "euler", "step_size": 1 / N_BLOCKS, "vector_field": Blocks}
    models = {
        "ResNet": ODENetClassifier(gradient="backprop", **euler, **settings),
        "RK-Net": ODENetClassifier(gradient="backprop", **settings),
        "ODE-Net": ODENetClassifier(**settings),
    }
    if args.continuous:
        models["ODE-Net, continuous"] = ODENetClassifier(
            gradient="continuous", rtol=1e-3, atol=1e-3, **settings
        )
    rows = {}
    for name, model in models.items():
        print(name)
        rows[name] = measure(model, X, y, X_test, y_test)
        print()
    print_table(rows)
    curves = figure_3(models["ODE-Net"], X_test, y_test)
    draw(curves, models["ODE-Net"].nfe_curve_, args.plot)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="npz file with X and y; default: bundled digits")
    parser.add_argument("--test", help="npz file with X and y to test on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--continuous", action="store_true", help="train by the continuous adjoint, too"
    )
    parser.add_argument("--plot", default="odenet_mnist.png", help="file to draw into")
    return parser.parse_args()


def load(args):
    """Return images for training and test as rows, labels, and an image's shape."""
    if args.data is None:
        digits = load_digits()
        X, y = digits.images, digits.target
    else:
        X, y = read(args.data)
    if args.test is None:
        X, X_test, y, y_test = train_test_split(
            X, y, test_size=0.2, stratify=y, random_state=args.seed
        )
    else:
        X_test, y_test = read(args.test)
    if X.ndim == 3:
        X, X_test = X[..., None], X_test[..., None]
    # channels first, then one row an image
    X, X_test = (np.moveaxis(x, 3, 1).astype(np.float32) for x in (X, X_test))
    return X.reshape(len(X), -1), X_test.reshape(len(X_test), -1), y, y_test, X[0].shape


def read(path):
    with np.load(path) as file:
        return file["X"], file["y"]


class Blocks(nn.Module):
    """The residual blocks, as a field for Euler steps of a time each."""

    def __init__(self, state_shape):
        super().__init__()
        channels = state_shape[0]

        def half():
            norm = group_norm(channels)
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            return norm, nn.SiLU(), conv

        self.blocks = nn.ModuleList(
            nn.Sequential(*half(), *half()) for _ in range(N_BLOCKS)
        )

    def forward(self, t, y):
        # all images are at the same time
        number = min(round(float(t.flatten()[0]) * N_BLOCKS), N_BLOCKS - 1)
        return N_BLOCKS * self.blocks[number](y)


def measure(model, X, y, X_test, y_test):
    """Fit; return error in percent, parameters, memory in MB, seconds."""
    started = time.perf_counter()
    model.fit(X, y)
    seconds = time.perf_counter() - started
    error = 100 * np.mean(model.predict(X_test) != y_test)
    n_parameters = sum(p.numel() for p in model.module_.parameters())
    print(f"test error {error:.2f} %, {seconds:.0f} s")
    return error, n_parameters, memory(model, X[:128], y[:128]), seconds


def memory(model, X, y):
    """Return the most memory that a gradient of one batch takes, in MB."""
    # one more pass over these images, of a copy
    model = copy.deepcopy(model).set_params(verbose=False, batch_size=len(X))
    if model.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.partial_fit(X, y)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model.partial_fit(X, y)
    held = most = 0
    for event in sorted(seen.events(), key=lambda event: event.time_range.start):
        held += event.self_cpu_memory_usage
        most = max(most, held)
    return most / 1e6


def print_table(rows):
    print("Table 1")
    print(f"{'':20s}{'test error':>11s}{'parameters':>12s}{'memory':>10s}{'time':>9s}")
    for name, (error, n_parameters, megabytes, seconds) in rows.items():
        print(
            f"{name:20s}{error:9.2f} %{n_parameters:12,d}{megabytes:7.0f} MB"
            f"{seconds:7.0f} s"
        )
    print()


def figure_3(model, X, y):
    """Solve the trained model at several tolerances; print and return what it takes."""
    exact = at(model, 1e-6).decision_function(X)
    curves = {k: [] for k in ("forward", "backward", "numerical", "test", "seconds")}
    print("Figure 3: the trained ODE-Net, solved more and less accurately")
    print(
        f"{'tolerance':>10s}{'evaluations':>13s}{'off by':>10s}{'test error':>12s}"
        f"{'time':>9s}{'backwards':>11s}{'of forwards':>13s}"
    )
    for tolerance in TOLERANCES:
        solved = at(model, tolerance)
        started = time.perf_counter()
        outputs = solved.decision_function(X)
        seconds = time.perf_counter() - started
        forward, backward = solved.count_evaluations(X).mean(), count(solved, X[:256])
        off = np.linalg.norm(outputs - exact) / np.linalg.norm(exact)
        error = 100 * np.mean(solved.classes_[outputs.argmax(1)] != y)
        ratio = backward[1] / backward[0]
        print(
            f"{tolerance:10.0e}{forward:13.1f}{off:10.1e}{error:10.2f} %"
            f"{seconds:7.1f} s{backward[1]:11.1f}{ratio:13.2f}"
        )
        values = (forward, backward, off, error, seconds)
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append(value)
    nfe = model.nfe_curve_
    print(
        f"evaluations in training: {nfe[0]:.1f} in the first epoch, {nfe[-1]:.1f} in "
        "the last\n"
    )
    return curves


def at(model, tolerance):
    """Return the model with another tolerance and the same weights."""
    return copy.copy(model).set_params(rtol=tolerance, atol=tolerance)


def count(model, X):
    """Count evaluations forwards and backwards by the continuous adjoint."""
    net = model.module_
    dtype = next(net.parameters()).dtype
    x = torch.from_numpy(X).to(next(net.parameters()).device, dtype)
    calls = []
    hook = net.field.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        y0 = net.initial_state(x).detach().requires_grad_()
        solution = solve_ode(
            net.field,
            y0,
            [0.0, 1.0],
            method=model.solver,
            rtol=model.rtol,
            atol=model.atol,
            gradient="continuous",
        )
        forward = len(calls)
        net.output_map(solution.y[:, -1]).logsumexp(1).sum().backward()
    finally:
        hook.remove()
        net.zero_grad()
    return forward, len(calls) - forward


def draw(curves, nfe_curve, path):
    """Draw figure 3."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not there: nothing is drawn")
        return
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    nfe = curves["forward"]
    forward, backward = zip(*curves["backward"], strict=True)
    panels = (
        (nfe, curves["numerical"], "evaluations", "relative error of the outputs"),
        (nfe, curves["seconds"], "evaluations", "seconds for the test images"),
        (forward, backward, "evaluations forwards", "evaluations backwards"),
        (range(1, len(nfe_curve) + 1), nfe_curve, "epoch", "evaluations"),
    )
    for ax, (x, y, x_name, y_name) in zip(axes, panels, strict=True):
        ax.plot(x, y, "o-", markersize=3)
        ax.set(xlabel=x_name, ylabel=y_name)
    axes[0].set_yscale("log")
    axes[2].axline((0, 0), slope=1, color="0.7", linestyle=":")
    figure.savefig(path, dpi=150)
    print(f"figure 3 is in {path}")


if __name__ == "__main__":
    main()
