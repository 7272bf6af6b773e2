"""Tests of benchmark.py."""

import json
import sys

import pytest
import torch

import benchmark
import cli
from tests.conftest import write_idx


@pytest.mark.slow
def test_the_benchmark_prints_its_rows(workplace, capsys):
    write_idx(workplace / "data", (512, 50))
    benchmark.main(["--model", "mlp", "--batch_size", "16", "--images", "448", "--repeats", "1", "--json",
                    "--binarize", "stochastic", "--hidden_dims", "16"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["batch_size"]) == ("mlp", 16) and 0 < row["flop_share"] < 1
    assert row["images_per_second"] > 0 and 0.1 < row["floor_ratio"] < 2 and row["startup_seconds"] > 0.5
    assert sys.platform != "linux" or 100 < row["peak_rss_mb"] < 2000


def test_the_plain_way_of_the_benchmark_trains_the_same_network(workplace):
    write_idx(workplace / "data", (640, 50))
    argv = ["--dataset=mnist", "--levels=2", "--model=mlp", "--hidden_dims=16", "--latent_size=4",
            "--lr=0.01"]
    torch.manual_seed(0)
    net, adam, images, tests, args = benchmark.plain_parts(*argv, limit=128)
    first, *_, last = [benchmark.plain_epoch(net, images, args, adam) for _ in range(20)]
    assert (len(images.dataset), len(tests.dataset)) == (128, 50) and last < 0.95 * first
    assert net.shape == (1, 28, 28) and benchmark.plain_seconds(argv, 128) > 0
    for other in (["--dataset=glyphs"], ["--dataset=mnist", "--image_size=16"]):
        with pytest.raises(cli.UserError, match="goes with a dataset of torchvision"):
            benchmark.plain_parts(*other)


@pytest.mark.slow
def test_the_speedrun_measures_each_row(workplace, capsys, monkeypatch):
    write_idx(workplace / "data", (512, 50))
    monkeypatch.setattr(benchmark, "SPEEDRUN", [(86.76, "a paper", 2, "--model mlp --hidden_dims 8")])
    benchmark.main(["--speedrun", "--epochs", "1", "--limit", "50"])
    command, row = capsys.readouterr().out.splitlines()
    measured = json.loads((workplace / "results/speedrun/1/seed_1/evaluation.json").read_text())
    assert command.startswith("python train.py --dataset mnist") and "--prior flow" in command
    assert (measured["iw_samples"], measured["images"]) == (500, 50)
    assert f"NLL {measured['iw_nll']:.2f} (standard error" in row and row.endswith("seeds: 1")
