"""Tests of training_state.py."""

import os
import shutil
from argparse import Namespace

import pytest
import torch

import runs
import train
import training_state
from tests.conftest import assert_same_runs, fit, outcome


def test_a_clock_with_coarse_ticks_does_no_harm(folder, workplace, monkeypatch):
    monkeypatch.setattr(training_state.time, "perf_counter", lambda: 1.0)  # all steps of an epoch take 0 s
    assert fit(folder, "--batch_size=4", epochs=2)[1]["test_loss"] > 0


def test_killed_between_the_two_checkpoints_keeps_the_best(folder, workplace, monkeypatch):
    fit(folder, epochs=2)
    os.rename("results/run", "results/whole"), os.rename("checkpoints/run", "checkpoints/whole")
    fit(folder, epochs=1)
    atomic_write, saved = runs.atomic_write, []

    def dies(path, content):
        saved.extend([path.name] if path.suffix == ".pt" else [])
        if len(saved) == 2:
            raise KeyboardInterrupt
        atomic_write(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "atomic_write", dies)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    assert saved == ["best.pt", "last.pt"]
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    assert_same_runs(*((workplace / "results" / n, workplace / "checkpoints" / n) for n in ("whole", "run")))


def test_what_cannot_be_read_again_is_not_saved(folder, workplace, capsys):
    """Gradients whose squares overflow make the optimiser's moments infinite long before a weight is."""
    status, error = outcome(train.main, ["--dataset", folder, "--model", "mlp", "--hidden_dims", "8",
                                         "--epochs", "2",
                                         "--target_beta_val", "1e25", "--log_dir", "run"], capsys)
    assert status == 1 and "not finite" in error and "beta 1e+25" in error
    assert not list(workplace.rglob("*.pt"))


def test_moments_that_do_not_fit_are_reported(trained, workplace, capsys):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)
    last = workplace / "checkpoints/run/last.pt"
    state = runs.load_checkpoint(last)
    state["optimizer"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, last)
    status, error = outcome(train.main, ["--resume", last], capsys)
    assert status == 1 and "size mismatch for exp_avg" in error and "best.pt" in error


def test_only_training_steps_are_timed(folder, workplace, monkeypatch):
    timed = []
    lap = training_state.Saver.lap
    monkeypatch.setattr(training_state.Saver, "lap", lambda saver: timed.append(len(saver.step_seconds))
                        or lap(saver))
    fit(folder, "--batch_size=16", epochs=2)  # 320 images, and 40 of validation
    assert timed == [20, 20]


def test_steps_that_become_slow_are_reported_once(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_state.time, "monotonic", lambda: now[0])
    saver = training_state.Saver.__new__(training_state.Saver)
    saver.args, saver.step_seconds = Namespace(device="cpu"), []
    saver.first_median, saver.warned = None, False
    for device, lines in (("cuda", 0), ("cpu", 1)):
        saver.args.device = device
        for seconds in (0.01, 0.02, 0.05, 0.05):
            saver.step_seconds = [seconds] * 60
            saver.warn_if_slow()
        assert capsys.readouterr().err.count("5 times as long") == lines
