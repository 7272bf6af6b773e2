"""Tests of execution.py: what it leaves unchanged. tests/test_distributed.py has those of many processes."""

import pytest
import torch

import distributions
import execution
import train
from tests.conftest import assert_same_runs, fit, needs_gpu


def test_without_a_compiler_the_run_goes_on(folder, workplace, monkeypatch, capsys):
    class Missing(torch.nn.Module):  # it is looked for at the first call
        def forward(self, *args):
            raise RuntimeError("no C++ compiler")
    plain = fit(folder)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: Missing())
    assert fit(folder, "--compile")[1] == plain[1]
    assert capsys.readouterr().err.count("no C++ compiler") == 1


@needs_gpu
@pytest.mark.parametrize("flags", [
    "--model=resnet --levels=2 --binarize=stochastic --prior=flow --optimizer=muon --weight_decay=0.1 "
    "--lr_schedule=cosine --grad_clip=20 --warp=0.5",
    "--model=mlp --conditional --levels=16 --beta_mode=linear", "--iw_train=3 --ema=0",
    "--model=cnn --precision=fp32 --free_bits=0.1 --flip", "--model=cnn --loss_mode=ae"])
def test_recorded_steps_are_those_that_python_starts(flags, folder, workplace, monkeypatch):
    def run(name):
        train.main([f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", "--num_filters=2",
                    "--epochs=3", "--batch_size=24", f"--log_dir={name}", "--device=cuda", *flags.split()])
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replayed.append(1) or replay(graph))
    run("recorded")
    assert len(replayed) == 3 * 13 - 3  # of the 14 steps of an epoch, the last is of fewer images
    monkeypatch.setattr(execution.Recorded, "__call__", lambda recorded, *words: recorded.function(*words))
    run("started")
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("recorded", "started")))


@needs_gpu
def test_steps_that_cannot_be_recorded_are_started(folder, workplace, monkeypatch, capsys):
    loss = distributions.Bernoulli.loss
    monkeypatch.setattr(distributions.Bernoulli, "loss",
                        lambda own, params, images: loss(own, params, images) + 0 * params.sum().item())
    rows, test = fit(folder, "--device=cuda", "--levels=2")
    assert "cannot be recorded" in capsys.readouterr().err
    monkeypatch.setattr(execution.Recorded, "__call__", lambda recorded, *words: recorded.function(*words))
    rows_started, test_started = fit(folder, "--device=cuda", "--levels=2")
    assert test == test_started and rows[1]["train_loss"] == rows_started[1]["train_loss"]
