"""Tests of train.py."""

import csv
import json
import math
import os
import random
import shutil
import signal
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributions as D

import data
import distributions
import infer
import model
import runs
import train
import training_state
import utils
from tests.conftest import (
    HERE,
    LN2,
    assert_same_runs,
    begin,
    damage,
    ended,
    fit,
    needs_gpu,
    outcome,
    pixels,
    same,
    stop_at,
    wait_for,
)


def test_a_run_leaves_its_files(folder, workplace, curves):
    rows, test = fit(folder, "--levels=2", epochs=3)
    results = workplace / "results" / "run"
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and tuple(rows[0]) == runs.COLUMNS
    for name in ("curves.png", "samples_003.png", "reconstructions_003.png"):
        with Image.open(results / name) as image:
            assert min(image.size) > 100
    assert list(results.glob("events.out.*"))
    last, best = (runs.load_checkpoint(workplace / "checkpoints" / "run" / f"{n}.pt")
                  for n in ("last", "best"))
    assert last["epoch"] == 3 and last["step"] == 3 * 10 and len(last["history"]) == 3
    losses = [float(row["val_loss"]) for row in rows]
    assert best["epoch"] == 1 + losses.index(min(losses)) == test["epoch"] and best["best"] == min(losses)
    for row in rows:
        assert float(row["val_loss"]) == pytest.approx(float(row["val_rec"]) + float(row["val_kl"]))
        assert float(row["val_bpd"]) == pytest.approx(float(row["val_loss"]) / LN2 / 784)


def test_test_figures_are_those_of_the_best_checkpoint(folder, workplace):
    _, test = fit(folder, "--levels=2")
    net, state = infer.restore(workplace / "checkpoints" / "run" / "best.pt", "cpu")
    split = data.load(str(folder), "data", levels=2).test
    mean, log_std = net.encode(pixels(split))
    kl = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(0.0, 1.0)).sum(1).mean()
    assert test["test_kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert test["active_units"] == int((mean.var(0, correction=0) > 0.01).sum())


def test_the_best_epoch_need_not_be_the_last(folder, workplace, monkeypatch):
    weights, ranks = [], iter([3.0, 1.0, 2.0])
    run_epoch = train.run_epoch

    def ranked(state, *args):
        row = {**run_epoch(state, *args), "val_loss": next(ranks)}
        weights.append({name: value.clone() for name, value in state.model.state_dict().items()})
        return row
    monkeypatch.setattr(train, "run_epoch", ranked)
    _, test = fit(folder, "--levels=2", epochs=3)
    best = runs.load_checkpoint(Path("checkpoints/run/best.pt"))
    assert same(best["model"], weights[1]) and best["epoch"] == test["epoch"] == 2 and best["best"] == 1
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    mean, log_std = net.encode(pixels(data.load(str(folder), "data", levels=2).test))
    assert test["test_kl"] == pytest.approx(utils.KLD(mean, log_std).mean().item(), rel=1e-5)


def test_each_epoch_sees_each_image_once_in_a_new_order_and_new_noise(folder, workplace, monkeypatch):
    seen, forward = [], model.VAE.forward

    def watched(self, images, labels=None, noise=None):
        if self.training:
            seen.append((images.flatten(1).long() @ torch.arange(1, 785), noise))
        return forward(self, images, labels, noise)
    monkeypatch.setattr(model.VAE, "forward", watched)
    fit(folder)
    codes, noise = (torch.cat(part) for part in zip(*seen))
    first, second = codes.view(2, -1)
    assert len(first) == 320 and torch.equal(first.sort()[0], second.sort()[0]) and not torch.equal(first,
                                                                                                    second)
    assert len({row.numpy().tobytes() for row in noise}) == 640
    assert noise.mean().abs() < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)


def test_the_same_seed_gives_the_same_run_and_another_does_not(folder, workplace):
    def numbers(*flags):
        rows, test = fit(folder, "--levels=2", "--binarize=stochastic", *flags)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], test
    torch.manual_seed(123)
    first = numbers("--seed=7")
    torch.rand(10)
    assert first == numbers("--seed=7") and first != numbers("--seed=8")


def test_annealing(folder, workplace):
    rows, test = fit(folder, "--beta_mode=linear", "--target_beta_val=0.8", "--levels=2", epochs=4)
    assert [float(row["beta"]) for row in rows] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert rows[0]["beta"] == "0.0" and test["epoch"] > 1
    for row in rows:  # the loss that ranks epochs is always at the target
        for part in ("train", "val"):
            assert float(row[f"{part}_loss"]) == pytest.approx(
                float(row[f"{part}_rec"]) + 0.8 * float(row[f"{part}_kl"]))


def test_an_ae_reports_what_it_has(folder, workplace, curves, capsys):
    rows, test = fit(folder, "--loss_mode=ae")
    assert all(row[name] == "" for row in rows for name in ("beta", "train_kl", "val_kl", "train_bpd",
                                                            "val_bpd"))
    said = capsys.readouterr()
    assert set(test) == {"epoch", "test_loss", "test_rec"} and " kl " not in said.out and said.err == ""
    infer.main([])
    assert (workplace / "results" / "run" / "samples.png").exists()


def test_training_learns_and_grad_clip_bites(folder, workplace):
    rows, _ = fit(folder, "--levels=2", "--lr=3e-3", epochs=6)
    assert float(rows[-1]["val_loss"]) < 0.6 * 784 * LN2
    clipped, _ = fit(folder, "--levels=2", "--lr=3e-3", "--grad_clip=1e-9", epochs=2)
    assert clipped[1]["val_loss"] != rows[1]["val_loss"]


@pytest.mark.slow
def test_collapse_is_reported(folder, workplace, capsys):
    collapse = "--target_beta_val=1000", "--lr=1e-2", "--recon_loss=mse"
    fit(folder, *collapse, epochs=20)
    said = capsys.readouterr().out
    assert "collapsed" in said and "nothing was learned" not in said
    assert all(flag in said for flag in ("--beta_mode linear", "--target_beta_val", "--free_bits"))
    fit(folder, *collapse, "--prior=flow", epochs=20)
    said = capsys.readouterr().out
    assert "collapsed" in said and "--free_bits" not in said  # which does not go with it
    fit(folder, "--target_beta_val=0.01", "--free_bits=1", epochs=5)
    assert "collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--loss_mode=ae"], []])
def test_training_that_failed_is_told_from_collapse(folder, workplace, capsys, flags):
    fit(folder, "--lr=10", *flags)
    said = capsys.readouterr().out
    assert "nothing was learned" in said and "smaller --lr than 10" in said and "collapsed" not in said
    assert "test images (only 40, so these figures are rough), by epoch" in said
    read = data.load(str(folder), workplace)
    images = pixels(read.test).double() / 255

    class Constant:  # one image for all: its error is known in closed form
        max_batch = 7

        def reconstruct(self, images, labels):
            return torch.full(images.shape, 0.25)
    expected = (images - 0.25).square().sum() / (images.var(0, correction=0) * len(images)).sum()
    assert train.error_ratio(Constant(), read) == pytest.approx(expected.item(), rel=1e-5)
    read.test.rows, read.test.labels = read.test.rows[:1], read.test.labels[:1]
    assert train.error_ratio(Constant(), read) == 0  # one image does not differ from its mean


@pytest.mark.slow
def test_a_long_run_draws_about_sixty_epochs(folder, workplace):
    fit(folder, "--limit=32", epochs=130)
    drawn = sorted(int(path.stem.split("_")[1]) for path in Path("results/run").glob("samples_*.png"))
    assert drawn == [1, *range(3, 130, 3), 130]
    assert len(list(Path("results/run").glob("reconstructions_*.png"))) == len(drawn)


def test_what_a_run_says_at_its_start(folder, workplace, capsys):
    fit(folder, "--batch_size=200", "--limit=300", epochs=1)
    said = capsys.readouterr().out
    read = data.load(str(folder), workplace, limit=300)
    assert f"10 classes, with their training images: 0 ({int((read.train.labels == 0).sum())})" in said
    assert "2 steps: the model may learn more with --batch_size 15 and --epochs 50 and --grad_clip" in said
    fit(folder, "--recon_loss=categorical", "--limit=10", epochs=1)
    assert "--recon_loss logistic" in capsys.readouterr().out
    fit(folder, "--beta_mode=linear", "--target_beta_val=0.8", "--limit=32", epochs=2)
    said = capsys.readouterr().out
    assert "beta is 0 in the first epoch and 0.4 in the last" in said and "at the target, 0.8" in said


def test_ten_epochs_without_a_better_one_are_said(folder, workplace, monkeypatch, capsys):
    ranks, run_epoch = iter([3.0, 2.0, *[2.5] * 30]), train.run_epoch
    monkeypatch.setattr(train, "run_epoch", lambda *args: {**run_epoch(*args), "val_loss": next(ranks)})
    fit(folder, "--limit=32", epochs=14)
    said = capsys.readouterr().out
    assert said.count("has not fallen for 10 epochs; best.pt keeps epoch 2") == 1
    assert said.index("epoch 12/14") < said.index("has not fallen") < said.index("epoch 13/14")
    assert said.count("best so far") == 2
    Path("checkpoints/run/best.pt").unlink()  # from here on only new epochs count
    ranks = iter([2.6, 2.2, 2.4])
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "17"])
    said = capsys.readouterr().out
    assert said.count("best so far") == 2 and "has not fallen" not in said


def test_free_bits_keep_the_kl_up(folder, workplace):
    _, low = fit(folder, "--target_beta_val=20", "--levels=2", "--lr=1e-3", epochs=4)
    _, high = fit(folder, "--target_beta_val=20", "--levels=2", "--free_bits=0.5", "--lr=1e-3", epochs=4)
    assert high["test_kl"] > low["test_kl"] + 0.5


def test_several_seeds(folder, workplace, capsys):
    train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=16", "--epochs=1", "--seeds", "1", "2",
                "3", "--log_dir=many", "--results_dir=out/results", "--checkpoint_dir=out/checkpoints"])
    values = [json.loads((workplace / f"out/results/many/seed_{s}/test.json").read_text())["test_loss"]
              for s in (1, 2, 3)]
    with open(workplace / "out/results/many/seeds.csv") as file:
        rows = {row["figure"]: row for row in csv.DictReader(file)}
    assert len(set(values)) == 3
    assert float(rows["test_loss"]["mean"]) == pytest.approx(np.mean(values))
    assert float(rows["test_loss"]["std"]) == pytest.approx(np.std(values, ddof=1))
    assert "±" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    "--model=mlp --levels=2 --binarize=stochastic --prior=flow --beta_mode=linear --warp=0.4",
    "--model=cnn --conditional --beta_mode=linear --precision=bf16 --lr_schedule=cosine --ema=0.9",
    "--model=resnet --loss_mode=ae --ema=0.99 --flip --optimizer=muon",
    "--model=mlp --free_bits=0.2 --beta_mode=cyclical --grad_clip=50 --weight_decay=0.01 --precision=bf16",
    "--model=cnn --levels=16 --precision=fp32 --iw_train=3",
    pytest.param("--model=mlp --compile --precision=bf16", marks=pytest.mark.slow),
    *(pytest.param(f"--device=cuda {words}", marks=needs_gpu) for words in (
        "--model=resnet --levels=2 --binarize=stochastic --prior=flow --optimizer=muon --warp=0.4",
        "--model=cnn --conditional"))])
def test_stopped_within_an_epoch_and_resumed_is_never_stopped(flags, folder, workplace, monkeypatch, capsys):
    def argv(name):
        return [f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", "--num_filters=2", "--epochs=3",
                "--batch_size=32", f"--log_dir={name}", *flags.split()]
    train.main(argv("whole"))
    if "no compiler works here" in capsys.readouterr().err:
        pytest.skip("no compiler works here")
    # Of the 12 batches of an epoch 10 are for training. It stops in training; in validation, after the first
    # batch of two; in the validation of the last epoch; and in the test of the best checkpoint, when all is
    # trained.
    for stop in (13, 10, 14, 3):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            status, _ = outcome(train.main, argv("cut") if stop == 13
                                else ["--resume", "checkpoints/cut/last.pt"], capsys)
            assert status == 143
    with open("results/cut/metrics.csv", "a") as file:
        file.write("4,a row of an epoch that was not saved\n")
    train.main(["--resume", "checkpoints/cut"])  # a folder stands for its last.pt
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("whole", "cut")))


def test_more_epochs_continue_as_if_asked_for_at_once(folder, workplace, monkeypatch, capsys):
    fit(folder, epochs=3)
    os.rename("results/run", "results/long"), os.rename("checkpoints/run", "checkpoints/long")
    fit(folder, epochs=1)
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3", "--save_every", "0"])
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("long", "run")))


def test_fewer_epochs_end_a_stopped_run_as_if_asked_for_at_once(folder, workplace, monkeypatch, capsys):
    fit(folder, epochs=2)
    os.rename("results/run", "results/short"), os.rename("checkpoints/run", "checkpoints/short")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2 * 12 + 3)
        fit(folder, epochs=9)
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--epochs", "1"], capsys)
    assert status == 2 and "must be 2 or more" in error
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    assert Path("results/run/test.json").read_bytes() == Path("results/short/test.json").read_bytes()
    short, stopped = (runs.load_checkpoint(f"checkpoints/{name}/best.pt") for name in ("short", "run"))
    assert same(short, stopped) and stopped["finished"] and stopped["args"]["epochs"] == 2
    assert runs.load_checkpoint("checkpoints/run/last.pt")["args"]["epochs"] == 2
    assert "all 2 epochs are done; 3 steps after them do not count" in capsys.readouterr().out
    train.main(["--resume", "checkpoints/run/last.pt"])  # it is over, and stays so
    assert Path("results/run/test.json").read_bytes() == Path("results/short/test.json").read_bytes()


def test_several_seeds_go_on_where_they_were_stopped(folder, workplace, monkeypatch, capsys):
    def argv(name):
        return [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1", "--batch_size=32",
                "--seeds", "4", "5", "6", f"--log_dir={name}"]
    train.main(argv("whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        with pytest.raises(SystemExit, match="143"):
            train.main(argv("cut"))
    assert "repeat the command with --log_dir cut" in capsys.readouterr().out
    Path("results/cut/seed_6").mkdir()  # as if this one had been killed before its first save
    shutil.copy("results/whole/seed_6/metrics.csv", "results/cut/seed_6")  # written before the checkpoint
    before = Path("checkpoints/cut/seed_4/last.pt").stat().st_mtime_ns
    for other, name in (("--lr=0.5", "--lr 0.002, not 0.5"), ("--epochs=2", "--epochs 1, not 2")):
        status, error = outcome(train.main, [*argv("cut"), other], capsys)
        assert status == 1 and error.count("\n") == 1 and name in error
    train.main(argv("cut"))
    # What was trained was not trained again.
    assert Path("checkpoints/cut/seed_4/last.pt").stat().st_mtime_ns == before
    assert Path("results/cut/seeds.csv").read_text() == Path("results/whole/seeds.csv").read_text()
    for seed in (4, 5, 6):
        assert_same_runs(*((workplace / "results" / name / f"seed_{seed}",
                            workplace / "checkpoints" / name / f"seed_{seed}") for name in ("whole", "cut")))
    before_best = runs.load_checkpoint("checkpoints/whole/seed_6/best.pt")
    Path("checkpoints/whole/seed_6/last.pt").unlink()  # as if it had been killed between its first two files
    Path("results/whole/seed_6/test.json").unlink()
    train.main(argv("whole"))
    assert same(runs.load_checkpoint("checkpoints/whole/seed_6/best.pt"), before_best)
    assert Path("results/cut/seeds.csv").read_text() == Path("results/whole/seeds.csv").read_text()
    # One of them goes on alone.
    shutil.copytree("checkpoints/cut/seed_5", "checkpoints/solo")
    train.main(["--resume", "checkpoints/solo/last.pt", "--epochs", "2"])
    assert runs.load_checkpoint(Path("checkpoints/solo/last.pt"))["epoch"] == 2
    assert {path.name for path in Path("checkpoints").iterdir()} == {"cut", "whole", "solo"}
    shutil.copytree("checkpoints/solo", "checkpoints/backup/seed_5")
    train.main(["--resume", "checkpoints/backup/seed_5/last.pt", "--epochs", "3"])
    assert [path.name for path in Path("checkpoints/backup").iterdir()] == ["seed_5"]
    assert Path("checkpoints/cut/seed_4/last.pt").stat().st_mtime_ns == before


def test_a_group_of_seeds_keeps_what_it_cannot_go_on_with(folder, workplace, monkeypatch, capsys):
    argv = [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1", "--log_dir=run"]
    seeds = [*argv, "--seeds", "1", "2"]
    train.main(seeds)
    test = Path("results/run/seed_1/test.json")
    before = test.read_text()
    # results without a checkpoint
    for other in ("--checkpoint_dir=other", "--checkpoint_dir=other --lr=0.5"):
        status, error = outcome(train.main, [*seeds, *other.split()], capsys)
        assert status == 1 and error.count("\n") == 1 and "no checkpoint" in error and "--overwrite" in error
    assert test.read_text() == before
    # one that is in use keeps all of them
    with runs.lock(Path("checkpoints/run/seed_2")):
        status, error = outcome(train.main, [*seeds, "--overwrite"], capsys)
    assert status == 1 and "is being trained" in error
    assert test.read_text() == before and Path("checkpoints/run/seed_1/best.pt").exists()
    # a damaged last.pt: from best.pt; a test.json that is not ours: the test again
    Path("checkpoints/run/seed_1/last.pt").write_bytes(b"cut short")
    for content in ("", "[]", '{"epoch": 1}'):
        test.write_text(content)
        train.main(seeds)
        assert test.read_text() == before
    # a single run in place of a group, and a group in place of a single run
    train.main([*argv, "--overwrite"])
    assert not list(Path("checkpoints/run").glob("seed_*/*.pt"))
    assert not Path("results/run/seeds.csv").exists()
    train.main([*seeds, "--overwrite"])
    assert not Path("checkpoints/run/best.pt").exists() and not Path("results/run/metrics.csv").exists()
    train.main(seeds)
    # a renamed group
    os.rename("checkpoints/run", "checkpoints/other")
    status, error = outcome(train.main, ["--resume", "checkpoints/other"], capsys)
    assert status == 2 and "only a file such as checkpoints/other/seed_1/last.pt" in error
    train.main(["--resume", "checkpoints/other/seed_1/last.pt", "--epochs", "2"])
    assert Path("results/other/seed_1/test.json").exists() and not Path("results/seed_1").exists()


def test_a_lost_best_checkpoint_is_said_and_never_made_up(folder, workplace, capsys, monkeypatch):
    run_epoch, ranks = train.run_epoch, iter([1.0, 3.0, 1.0, 3.0, 2.0])
    monkeypatch.setattr(train, "run_epoch", lambda *args: {**run_epoch(*args), "val_loss": next(ranks)})
    fit(folder, epochs=2)  # the first epoch is the best
    fit(folder, "--warp=0.5", "--log_dir=annealed", epochs=2)
    damage(workplace / "checkpoints/run/best.pt", "a flipped bit")
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt"], capsys)
    assert status == 1 and "best.pt is missing or damaged" in error and "--epochs 3" in error
    damage(workplace / "checkpoints/annealed/best.pt", "a flipped bit")
    status, error = outcome(train.main, ["--resume", "checkpoints/annealed/last.pt"], capsys)
    assert status == 1 and "--epochs" not in error and "infer.py --ckpt checkpoints/annealed/last.pt" in error
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    assert "looks for a new best epoch" in capsys.readouterr().err
    assert json.loads(Path("results/run/test.json").read_text())["epoch"] == 3


def test_stopped_in_the_final_test_keeps_the_last_weights(folder, workplace, monkeypatch, capsys):
    """The model then holds the best epoch's weights, which must not become those of last.pt."""
    run_epoch, ranks = train.run_epoch, iter([1.0, 3.0])
    monkeypatch.setattr(train, "run_epoch", lambda *args: {**run_epoch(*args), "val_loss": next(ranks)})
    stop_at(monkeypatch, 2 * 12 + 1)
    status, _ = outcome(train.main, ["--dataset", folder, "--model", "mlp", "--hidden_dims", "8",
                                     "--epochs", "2", "--batch_size", "32", "--save_every", "0",
                                     "--log_dir", "run"], capsys)
    last, best = (runs.load_checkpoint(Path(f"checkpoints/run/{name}.pt")) for name in ("last", "best"))
    assert status == 143 and (last["epoch"], best["epoch"]) == (2, 1)
    assert not same(last["model"], best["model"])


def test_means_that_are_not_finite_are_found_on_any_device():
    with pytest.raises(FloatingPointError):
        train.means(torch.tensor([1.0, math.nan]), 2)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_ends_as_if_never_killed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", folder, "--model", "mlp", "--hidden_dims", "32", "--levels", "2", "--binarize",
            "stochastic", "--batch_size", "1", "--epochs", "8", "--save_every", "0.02"]

    def to_its_end(name, *words):
        status, _, error = ended(begin(f"{name}.txt", train.main, *words), f"{name}.txt")
        assert status == 0
        # Other work on the machine may have made steps slow: that line is right, any other is not.
        assert all(line.startswith("steps take") for line in error.splitlines()), error

    def killed_ten_times(name):
        moments, within, words = random.Random(name), 0, [*argv, "--log_dir", name]
        for turn in range(10):
            said = tmp_path / f"{name}_{turn}.txt"
            process = begin(said, train.main, *words)
            wait_for("parameters", said, process)  # it trains from there on
            time.sleep(moments.uniform(0, 0.4))
            process.kill()
            assert ended(process, said)[0] == -signal.SIGKILL, "the run is too short for so many kills"
            last = tmp_path / "checkpoints" / name / "last.pt"
            words = ["--resume", last] if last.exists() else [*argv, "--log_dir", name, "--overwrite"]
            assert all(map(training_state.is_whole, last.parent.glob("*.pt")))
            within += last.exists() and runs.load_checkpoint(last)["step"] % 320 > 0
        assert within > 0  # an epoch was cut in two
        to_its_end(name, "--resume", last)
        assert_same_runs(*((tmp_path / "results" / run, tmp_path / "checkpoints" / run)
                           for run in ("never", name)))
    to_its_end("never", *argv, "--log_dir", "never")
    with ThreadPoolExecutor(2) as both:
        list(both.map(killed_ten_times, ("a", "b")))


def test_precision_is_chosen_once_and_reaches_training_alone(folder, workplace, monkeypatch):
    seen, forward = set(), model.AE.decode

    def watched(self, z, labels=None):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, z, labels)
    monkeypatch.setattr(model.AE, "decode", watched)
    for precision in ("bf16", "fp32"):
        seen.clear()
        fit(folder, f"--precision={precision}", epochs=1)
        assert seen == {(True, precision == "bf16"), (False, False)}
    for native, chosen in ((True, "bf16"), (False, "fp32")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda native=native: native)
        fit(folder, "--device=cpu", epochs=1)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: not native)
        train.main(["--resume", "checkpoints/run/last.pt", "--epochs=2"])
        assert runs.load_checkpoint(Path("checkpoints/run/last.pt"))["args"]["precision"] == chosen


def test_a_loss_that_jumps_is_reported(capsys):
    def said(recs, rise=0.0):
        rows = [{"epoch": epoch, "beta": rise * epoch, "train_loss": rec, "train_rec": rec, "val_loss": rec,
                 "val_rec": rec, "seconds": 1.0} for epoch, rec in enumerate(recs, 1)]
        state = Namespace(history=rows, best=min(recs))
        train.print_epoch(rows[-1], Namespace(loss_mode="vae", epochs=50, grad_clip=0), state)
        return capsys.readouterr().out
    jumped = [9000, -2000, -7185, 3004]
    assert "epoch 3). What may help: a new run with --grad_clip 1000\n" in said(jumped)
    assert said(jumped, rise=0.1).count("\n") == 1  # beta has changed too
    assert said([100, 90, 89, 89.5]).count("\n") == said([100, 99.9, 99.95]).count("\n") == 1
    assert said([9000, 9500]).count("\n") == said([9000, -7000, -7100]).count("\n") == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(folder, workplace, capsys):
    status, error = outcome(train.main, ["--dataset", folder, "--lr", "1e30", "--model", "mlp", "--epochs",
                                         "2", "--log_dir", "run"], capsys)
    assert status == 1 and all(part in error for part in ("epoch 1", "after step", "not finite", "--lr",
                                                          "1e+30", "beta 1"))
    # it ended before there was anything to keep
    assert {path.name for path in workplace.iterdir()} <= {"data"}
    fit(folder, epochs=1)
    before = runs.load_checkpoint(Path("checkpoints/run/last.pt"))
    before["model"]["encoder.net.3.bias"][0] = 3e38  # the mean's, whose square is in the KL
    runs.save_checkpoint(Path("checkpoints/run/last.pt"),
                          {**before, "args": {**before["args"], "epochs": 2}})
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--save_every", "0"], capsys)
    assert status == 1 and "not finite" in error and "checkpoints/run/last.pt" in error
    assert training_state.is_whole(Path("checkpoints/run/last.pt"))


@pytest.mark.skipif(not (HERE / "data/MNIST/raw/train-images-idx3-ubyte").exists(),
                    reason="data/MNIST is not here")
@pytest.mark.slow
@pytest.mark.parametrize("kind,epochs,bound", [("mlp", 1, 130), ("cnn", 2, 112)])
def test_mnist_in_an_epoch_or_two(kind, epochs, bound, workplace):
    train.main(["--dataset=mnist", f"--data_dir={HERE / 'data'}", "--levels=2", f"--model={kind}",
                f"--epochs={epochs}", "--log_dir=run"])
    best = runs.load_checkpoint(workplace / "checkpoints/run/best.pt")
    assert best["best"] < bound and best["data"]["shape"] == [1, 28, 28]


@pytest.mark.parametrize("flags", [[], ["--conditional"]], ids=str)
def test_the_mixture_is_fitted_to_draws_from_posteriors_of_training_images(folder, workplace, monkeypatch,
                                                                           flags):
    """Of a limited number of them, with their own labels."""
    given = []
    monkeypatch.setattr(train, "enough_latents", lambda size: 20)
    monkeypatch.setattr(train, "fit_mixture",
                        lambda *args, **words: given.append((*args, *words.values()))
                        or distributions.fit_mixture(*args, **words))
    fit(folder, "--binarize=stochastic", "--levels=2", *flags, epochs=1)
    (latents, *classes), = given
    read = data.load(str(folder), workplace)
    assert len(latents) == (sum(min(20, n) for n in read.train.labels.bincount()) if flags else 20)
    net, _ = infer.restore("checkpoints/run/best.pt")
    assert len(net.fitted.weights) == (10 if flags else 1)
    labels = classes[0] if flags else read.train.labels[:20]
    chosen = torch.cat([(read.train.labels == label).nonzero()[:20, 0] for label in range(10)]) if flags \
        else torch.arange(20)
    assert torch.equal(read.train.labels[chosen], labels)
    # grey values are the probabilities of the pixels that the encoder saw
    mean, log_std = net.encode((read.train.batch(chosen)[0] > 127).byte(), labels)
    score = (latents - mean) / log_std.exp()
    assert 0.7 < score.std() < 2 and not torch.equal(latents, mean)
    shuffled = (latents - mean.roll(7, 0)) / log_std.exp()
    assert shuffled.std() > score.std()


def test_a_run_killed_before_its_first_save_is_begun_anew(folder, workplace, capsys):
    (workplace / "checkpoints" / "run").mkdir(parents=True)
    (workplace / "checkpoints" / "run" / "lock").touch()
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt"], capsys)
    assert status == 2 and "start it anew, with --overwrite" in error
    fit(folder, epochs=1)  # with --overwrite
    assert training_state.is_whole(Path("checkpoints/run/last.pt"))
