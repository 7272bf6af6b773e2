"""Tests of distributed.py."""

import csv
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import train
from tests.conftest import assert_same_runs


@pytest.mark.slow
def test_gradients_of_two_and_three_processes_are_those_of_one(torchrun):
    runpy.run_path("worker.py")["all_gradients"]("1.pt")
    with ThreadPoolExecutor(2) as together:
        for status, _, err in together.map(lambda n: torchrun(n, "gradients", f"{n}.pt"), (2, 3)):
            assert status == 0, err
    one, *others = (torch.load(f"{n}.pt") for n in (1, 2, 3))
    assert len(one) == 24
    for other in others:
        for case, (grads, *found) in one.items():
            assert sum(grad.abs().sum() for grad in grads) > 1e-3
            for a, b in zip(grads, other[case][0]):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
            assert list(other[case][1:]) == [pytest.approx(figure, rel=1e-10) for figure in found]


@pytest.mark.slow
def test_processes_train_as_one_and_stop_and_go_on_together(torchrun, folder, capsys):
    def argv(name):
        return [f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", "--model=mlp",
                "--batch_size=30", "--epochs=4", "--lr=3e-3", f"--log_dir={name}", "--levels=2",
                "--binarize=stochastic", "--flip", "--precision=fp32", "--optimizer=muon", "--grad_clip=100"]
    train.main(argv("one"))
    with ThreadPoolExecutor(2) as together:  # in the second, only one process is told to stop
        whole, cut = together.map(lambda words: torchrun(2, words[0], *argv(words[1])),
                                  (("run", "whole"), ("stop", "cut")))
    status, out, err = whole
    assert status == 0 and out.count("epoch 4/4") == 1, err
    rows = {}
    for name in ("one", "whole"):
        with open(f"results/{name}/metrics.csv") as file:
            rows[name] = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert len(rows["one"]) == 4 and rows["whole"] == pytest.approx(rows["one"], rel=1e-4)
    status, out, err = cut
    assert status and out.count("stopped after step") == 1, err
    assert "Error" not in err.split("ChildFailedError")[0].replace("error_file", ""), err
    shutil.copytree("checkpoints/cut", "checkpoints/alone")
    status, _, err = torchrun(2, "run", "--resume", "checkpoints/cut/last.pt")
    assert status == 0, err
    assert_same_runs(*((Path("results", name), Path("checkpoints", name)) for name in ("whole", "cut")))
    train.main(["--resume", "checkpoints/alone/last.pt"])
    assert "2 processes, not 1" in capsys.readouterr().err
    with open("results/alone/metrics.csv") as file:
        last = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert last == pytest.approx(rows["one"], rel=1e-4)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_message(torchrun, folder):
    argv = [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=100", "--batch_size=32"]
    with ThreadPoolExecutor(4) as together:
        (failed, _, err), (killed, _, _), (wrong, _, usage), (differs, _, said) = together.map(
            lambda words: torchrun(2, words[0], *argv, words[1]),
            (("fail", "--log_dir=a"), ("kill", "--log_dir=b"), ("run", "--latent_size=0"),
             ("differ", "--log_dir=c")))
    assert failed and err.count("process 1 of 2: this one has failed") == 1 and "another process" not in err
    assert killed and wrong and usage.count("argument --latent_size") == 1
    assert differs and said.count("is not the same on all machines") == 1
