"""Tests of benchmark.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
import cli
from tests.conftest import outcome, write_idx


@pytest.mark.slow
def test_the_benchmark_prints_its_rows(workplace, capsys):
    write_idx(workplace / "data", (512, 50))
    benchmark.main(["--model", "mlp", "--batch_size", "16", "--images", "448", "--repeats", "1", "--json",
                    "--binarize", "stochastic", "--hidden_dims", "16"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["batch_size"]) == ("mlp", 16) and 0 < row["flop_share"] < 1
    assert row["images_per_second"] > 0 and 0.1 < row["floor_ratio"] < 2 and row["startup_seconds"] > 0.5
    assert sys.platform != "linux" or 100 < row["peak_rss_mb"] < 2000


def test_a_loss_that_is_not_finite_is_said_in_one_line(workplace, capsys):
    write_idx(workplace / "data", (512, 50))
    status, error = outcome(benchmark.main, ["--model", "mlp", "--batch_size", "16", "--images", "448",
                                             "--repeats", "1", "--hidden_dims", "16", "--lr", "1e9"], capsys)
    assert outcome(benchmark.main, ["--limit", "500"], capsys)[0] == 2
    assert status == 1 and "mlp: the loss is not finite (lr 1e+09); try a smaller --lr" in error
    assert error.count("\n") == 1, error


def test_the_plain_way_of_the_benchmark_trains_the_same_network(workplace):
    write_idx(workplace / "data", (640, 50))
    argv = ["--dataset=mnist", "--levels=2", "--model=mlp", "--hidden_dims=16", "--latent_size=4",
            "--lr=0.01"]
    torch.manual_seed(0)
    net, adam, images, tests, args = benchmark.plain_parts(*argv, limit=128)
    first, *_, last = [benchmark.plain_epoch(net, images, args, adam) for _ in range(20)]
    assert (len(images.dataset), len(tests.dataset)) == (128, 50) and last < 0.95 * first
    assert net.shape == (1, 28, 28) and benchmark.plain_seconds(argv, 128) > 0
    for other in (["--dataset=glyphs"], ["--dataset=mnist", "--image_size=16"],
                  ["--dataset=mnist", "--conditional"]):
        with pytest.raises(cli.UserError, match="goes with a dataset of torchvision"):
            benchmark.plain_parts(*other)


def test_the_speedrun_prints_means_deviations_and_the_median_time(workplace, capsys, monkeypatch):
    nll, bound, took = (86.1, 85.9, 86.6), (90.0, 89.9, 90.4), (26.0, 40.0, 30.0)
    figures = iter(zip(nll, bound))

    def fake_run(command, **_):  # stands for the two scripts
        if "--evaluate" in command:
            folder = workplace / "results" / Path(command[-1]).parent.relative_to("checkpoints")
            folder.mkdir(parents=True)
            iw_nll, neg_elbo = next(figures)
            (folder / "evaluation.json").write_text(json.dumps({
                "iw_nll": iw_nll, "iw_nll_se": 0.2, "neg_elbo": neg_elbo}))
    clock = iter(np.cumsum([time for seconds in took for time in (1, seconds)]).tolist())
    monkeypatch.setattr(benchmark, "SPEEDRUN", [(86.76, "a paper", 3, "--model mlp")])
    monkeypatch.setattr(benchmark.subprocess, "run", fake_run)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    benchmark.main(["--speedrun"])
    means = [f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" for values in (nll, bound)]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"86.76 a paper: NLL {means[0]} (standard error over images 0.20), -ELBO {means[1]}, 30 s, seeds: 3")


def test_what_the_speedrun_cannot_do_is_said_in_one_line(workplace, capsys, monkeypatch):
    def fails(command, **_):
        raise benchmark.subprocess.CalledProcessError(1, command)
    monkeypatch.setattr(benchmark.subprocess, "run", fails)
    for argv, expected, said in ((["--batch_size", "64"], 2, "argument --batch_size: does not go with"),
                                 (["--epochs", "0"], 2, "argument --epochs"),
                                 (["--limit"], 2, "argument --limit"),
                                 (["--seed=2"], 2, "argument --seed=2: not with --speedrun"),
                                 (["--log_dir", "mine"], 2, "argument --log_dir: not with --speedrun"),
                                 ([], 1, "train.py did not finish")):
        status, error = outcome(benchmark.main, ["--speedrun", *argv], capsys)
        assert status == expected and said in error and error.count("\n") == 1, error
    (workplace / "checkpoints/speedrun/1").mkdir(parents=True)
    status, error = outcome(benchmark.main, ["--speedrun"], capsys)
    assert status == 1 and "checkpoints/speedrun holds the runs" in error and "--overwrite" in error
    status, error = outcome(benchmark.main, ["--speedrun", "--overwrite"], capsys)
    assert status == 1 and "train.py did not finish" in error


@pytest.mark.slow
def test_the_speedrun_measures_each_row(workplace, capsys, monkeypatch):
    write_idx(workplace / "data", (512, 50))
    monkeypatch.setattr(benchmark, "SPEEDRUN", [(86.76, "a paper", 2, "--model mlp --hidden_dims 8")])
    benchmark.main(["--speedrun", "--epochs", "1", "--limit=50", "--results_dir=out"])
    command, row = capsys.readouterr().out.splitlines()
    measured = json.loads((workplace / "out/speedrun/1/seed_1/evaluation.json").read_text())
    assert command.startswith("python train.py --dataset mnist") and "--prior flow" in command
    assert (measured["iw_samples"], measured["images"]) == (500, 50)
    assert f"NLL {measured['iw_nll']:.2f} (standard error" in row and row.endswith("seeds: 1")
