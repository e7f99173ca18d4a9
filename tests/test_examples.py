"""The examples run and print what they promise."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # torch's profiler, which measures the memory
    pytest.mark.filterwarnings("ignore:.*[Pp]rofiler:UserWarning"),
]


def run(monkeypatch, name, *arguments):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("colours", [0, 3])
def test_section_3_of_the_paper_runs_on_files(monkeypatch, capsys, tmp_path, colours):
    digits = load_digits()
    X, y = (16 * digits.images).astype(np.uint8), digits.target
    if colours:
        X = np.stack([X] * colours, axis=-1)
    np.savez(tmp_path / "train.npz", X=X[:200], y=y[:200])
    np.savez(tmp_path / "test.npz", X=X[200:300], y=y[200:300])
    run(
        monkeypatch,
        "odenet_mnist.py",
        *("--data", str(tmp_path / "train.npz"), "--test", str(tmp_path / "test.npz")),
        *("--epochs", "1", "--channels", "4", "--plot", str(tmp_path / "plot.png")),
        *(["--continuous"] if colours else []),
    )
    printed = capsys.readouterr().out
    assert "200 images to train on, 100 to test" in printed
    table = dict(
        re.findall(r"^(\S+-?Net)  .*?([\d,]+)  +\d+ MB", printed, re.MULTILINE)
    )
    assert set(table) == {"ResNet", "RK-Net", "ODE-Net"}
    assert table["RK-Net"] == table["ODE-Net"]
    tolerances = re.findall(r"^ +(1e-\d\d) ", printed, re.MULTILINE)
    assert tolerances == ["1e-01", "1e-02", "1e-03", "1e-04", "1e-05"]


def test_section_3_of_the_paper_holds_out_a_fifth(monkeypatch, capsys, tmp_path):
    digits = load_digits()
    np.savez(tmp_path / "all.npz", X=digits.images[:100], y=digits.target[:100])
    run(
        monkeypatch,
        "odenet_mnist.py",
        *("--data", str(tmp_path / "all.npz"), "--epochs", "1", "--channels", "2"),
        *("--plot", str(tmp_path / "plot.png")),
    )
    assert "80 images to train on, 20 to test" in capsys.readouterr().out


@pytest.mark.slow
def test_images_in_a_pipeline(monkeypatch, capsys):
    run(monkeypatch, "images.py")
    right = re.search(r"accuracy +(0\.\d+)", capsys.readouterr().out)
    assert float(right[1]) > 0.9


@pytest.mark.slow
def test_section_4_of_the_paper_compares_planar_flows(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "plot.png"
    run(
        monkeypatch,
        "planar_flows.py",
        *("--seconds", "0.1", "--sizes", "2", "--targets", "1", "4", "--rows", "300"),
        *("--plot", str(picture)),
    )
    printed = capsys.readouterr().out
    lines = re.findall(r"^(target \d, size +\d|\w+, size 64) +CNF", printed, re.M)
    assert lines == [
        *("target 1, size  2", "target 4, size  2"),
        *("circles, size 64", "moons, size 64"),
    ]
    # a divergence is not negative, but for what the samples leave open
    found = [float(x) for x in re.findall(r"(?:CNF|NF) +(-?\d+\.\d+)", printed)]
    assert len(found) == 10 and min(found) > -0.05
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_section_4_of_the_paper_compares_by_iterations_at_equal_time(
    monkeypatch, capsys
):
    run(
        monkeypatch,
        "planar_flows.py",
        *("--figures", "5", "--iterations", "8", "--equal-time", "--rows", "300"),
        *("--optimizer", "adam"),
    )
    printed = capsys.readouterr().out
    assert "target" not in printed
    # four of each network of two, in epochs of two
    found = re.findall(r"iterations +(\d+) and +([\d,]+)", printed)
    assert [n for n, _ in found] == ["8", "8"]


def test_planar_layers_of_section_4_are_invertible_and_know_their_volume():
    names = runpy.run_path(str(EXAMPLES / "planar_flows.py"))
    torch.manual_seed(0)
    flow = names["PlanarFlow"](3).double()
    with torch.no_grad():
        flow.u.mul_(50)  # far beyond what would be invertible by itself
    z = torch.randn(5, 2, dtype=torch.float64)
    _, log_det = flow(z)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: flow(x[None])[0][0]))(z)
    sign, expected = torch.linalg.slogdet(jacobians)
    assert (sign == 1).all()
    torch.testing.assert_close(log_det, expected)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_targets_of_section_4_are_within_the_grid_of_their_normaliser(number):
    names = runpy.run_path(str(EXAMPLES / "planar_flows.py"))
    points, area = names["grid_points"](9.0, 501)
    logs = names["log_target"](number, torch.from_numpy(points))
    mass = float(logs.exp().sum()) * area
    assert np.log(mass) == pytest.approx(names["log_normaliser"](number), abs=1e-6)


@pytest.mark.slow
def test_section_5_of_the_paper_compares_forecasts_of_spirals(
    monkeypatch, capsys, tmp_path
):
    picture = tmp_path / "plot.png"
    run(
        monkeypatch,
        "spirals.py",
        *("--observed", "30", "20", "--series", "100", "--epochs", "5"),
        *("--updates", "20", "--plot", str(picture)),
    )
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+)  (\S.*?\S)  +(\d\.\d{4}) +(0\.\d{4})?", printed, re.M)
    names = ["latent ODE", "RNN", "RNN, with time gaps"]
    assert [row[1] for row in rows] == 2 * names
    # the paper has no figure for 20 points, nor for gaps
    assert [row[3] for row in rows] == ["0.1642", "0.3937", "", "", "", ""]
    # predicting the centre has about 3.5
    assert all(0.05 < float(row[2]) < 10 for row in rows)
    assert picture.stat().st_size > 50_000


@pytest.mark.slow
def test_carbon_dioxide_is_filled_in_and_forecast(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "plot.png"
    run(monkeypatch, "co2.py", "--plot", str(picture))
    printed = capsys.readouterr().out
    errors = {
        name: [float(x) for x in figures]
        for name, *figures in re.findall(
            r"^ +(LatentODEImputer|linear interpolation) +(\d+\.\d+) +(\d+\.\d+)$",
            printed,
            re.M,
        )
    }
    ours, lines = errors["LatentODEImputer"], errors["linear interpolation"]
    assert ours[0] < 0.5 * lines[0] and ours[1] < lines[1]
    inside = re.search(r"band +(\d+)% +(\d+)%", printed)
    assert min(int(x) for x in inside.groups()) > 50
    assert re.search(
        r"2003 highest +3[678]\d\.\d \+- \d\.\d in (April|May|June)", printed
    )
    assert picture.stat().st_size > 50_000
