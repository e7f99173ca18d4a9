"""Peak memory of a solution and its gradient, by the number of steps.

The most bytes that torch held at any one time, as its profiler counts them: states,
outputs, records, graphs and everything in between. 256 samples of 4 states, two hidden
layers of 32, float64, constant steps of dopri5, one output at the end. Without the
kernels, whose memory torch does not see, for the field in closed form and for any
module; and with them by the size of the process (on Linux), with 100 times the samples.

    python tests/benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from sknode.fields import MLPField
from sknode.ode import kernels, solve_ode

STEPS = (10, 100, 1000)
GRADIENTS = ("continuous", "discrete", "backprop")


def gradient(f, batch, n_steps, method):
    """Solve, and differentiate by initial states and parameters."""
    generator = torch.Generator().manual_seed(0)
    y0 = torch.randn(batch, 4, generator=generator, dtype=torch.float64)
    y0.requires_grad_()
    y = solve_ode(f, y0, [0.0, 1.0], step_size=1 / n_steps, gradient=method).y
    y[:, -1].pow(2).sum().backward()


def make_field(any_module):
    field = MLPField(4, (32, 32)).double()
    return (lambda t, y: field(t, y)) if any_module else field


def peak_of_torch(job):
    """Return the most bytes that torch held during a job."""
    job()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        job()
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = most = 0
    for _, size in sorted(changes):
        held += size
        most = max(most, held)
    return most


def peak_of_process(method, n_steps):
    """Return by how much a process grows for a job with the kernels, in bytes."""
    command = [sys.executable, __file__, "--grow", method, str(n_steps)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def grow(method, n_steps):
    """Print the growth of the largest size of this process."""
    field = make_field(False)
    gradient(field, 16, 2, method)  # libraries are loaded
    before = largest_size()
    gradient(field, 25_600, n_steps, method)
    print(largest_size() - before)


def largest_size():
    """Return the largest size that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM"))


def row(kind, method, values):
    cells = "".join(f"{value / 1e6:12.2f}" for value in values)
    print(f"{kind:22s}{method:12s}{cells}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grow", nargs=2, metavar=("GRADIENT", "STEPS"))
    args = parser.parse_args()
    if args.grow:
        grow(args.grow[0], int(args.grow[1]))
        return
    print(f"{'MB at most':34s}" + "".join(f"{n:6d} steps" for n in STEPS))
    for kind in ("closed form", "any module"):
        for method in GRADIENTS:
            field, peaks = make_field(kind == "any module"), []
            for n in STEPS:

                def job(n=n, method=method, field=field):
                    gradient(field, 256, n, method)

                with kernels.reference():
                    peaks.append(peak_of_torch(job))
            row(kind, method, peaks)
    for method in ("continuous", "discrete"):
        row("kernels, process", method, [peak_of_process(method, n) for n in STEPS])


if __name__ == "__main__":
    main()
