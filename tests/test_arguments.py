"""Tests of arguments.py; those of wrong arguments are in test_cli.py."""

import os
import shutil
from pathlib import Path

import pytest

import arguments
import runs
import train
import training_state
from tests.conftest import fit, outcome, stop_at


def test_a_run_goes_on_where_its_dataset_was_moved_and_from_another_folder(folder, workplace, monkeypatch,
                                                                           capsys):
    shutil.copytree(folder, "here/images")
    monkeypatch.chdir("here")
    fit("images", epochs=1)
    (workplace / "here/images").rename(workplace / "here/moved")
    last = "checkpoints/run/last.pt"
    status, error = outcome(train.main, ["--resume", last, "--epochs", "2"], capsys)
    assert status == 2 and "give its new place with --dataset" in error and error.count("\n") == 1
    status, error = outcome(train.main, ["--resume", last, "--epochs", "2", "--dataset", "glyphs"], capsys)
    assert status == 1 and "does not hold the images" in error
    train.main(["--resume", last, "--epochs", "2", "--dataset", "moved"])
    monkeypatch.chdir(workplace)
    train.main(["--resume", f"here/{last}", "--epochs", "3"])  # results, caches and images are found
    assert {path.name for path in workplace.iterdir()} == {"here"}
    assert len(Path("here/results/run/metrics.csv").read_text().splitlines()) == 4


def test_a_moved_run_goes_on_where_it_is(folder, workplace):
    fit(folder, epochs=1)
    os.rename("checkpoints", "moved")
    train.main(["--resume", "moved/run/last.pt", "--epochs", "2"])
    assert runs.load_checkpoint(Path("moved/run/last.pt"))["epoch"] == 2 and not Path("checkpoints").exists()
    Path("alone/run").mkdir(parents=True)
    shutil.copy("moved/run/last.pt", "alone/run/last.pt")  # without its best.pt
    train.main(["--resume", "alone/run/last.pt", "--epochs", "3"])
    assert training_state.is_whole(Path("alone/run/best.pt"))


def test_a_copied_run_leaves_the_original_alone(folder, workplace, capsys):
    fit(folder, epochs=1)
    shutil.copytree("checkpoints/run", "checkpoints/backup")
    before = {path: path.read_bytes() for path in workplace.rglob("run/*") if path.name != "lock"}
    shutil.copytree("checkpoints/run", "checkpoints/run (copy)")
    status, error = outcome(train.main, ["--resume", "checkpoints/run (copy)/last.pt"], capsys)
    assert status == 2 and "rename its folder" in error
    train.main(["--resume", "checkpoints/backup/last.pt", "--epochs", "2"])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert runs.load_checkpoint(Path("checkpoints/backup/last.pt"))["epoch"] == 2
    assert len(Path("results/backup/metrics.csv").read_text().splitlines()) == 3


def test_an_older_checkpoint_does_not_replace_a_newer_one(folder, workplace, capsys, monkeypatch):
    run_epoch = train.run_epoch
    monkeypatch.setattr(train, "run_epoch", lambda state, *rest: {**run_epoch(state, *rest),
                                                                  "val_loss": float(state.epoch)})
    fit(folder, epochs=3)
    before = {path: path.read_bytes() for path in workplace.rglob("run/*") if path.name != "lock"}
    assert runs.load_checkpoint(Path("checkpoints/run/best.pt"))["epoch"] == 1
    status, error = outcome(train.main, ["--resume", "checkpoints/run/best.pt"], capsys)
    assert status == 2 and "checkpoints/run/last.pt, which would be lost" in error and error.count("\n") == 1
    Path("checkpoints/other").mkdir()
    shutil.copy("checkpoints/run/best.pt", "checkpoints/other")
    train.main(["--resume", "checkpoints/other/best.pt", "--epochs", "2"])
    assert runs.load_checkpoint(Path("checkpoints/other/last.pt"))["epoch"] == 2
    assert all(path.read_bytes() == content for path, content in before.items())
    Path("checkpoints/run/last.pt").write_bytes(b"damaged")  # now best.pt is the newest that is whole
    train.main(["--resume", "checkpoints/run/best.pt", "--epochs", "2"])
    assert runs.load_checkpoint(Path("checkpoints/run/last.pt"))["epoch"] == 2


def test_a_renamed_group_leaves_other_runs_alone(folder, workplace, capsys):
    argv = [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1"]
    for name in ("base", "group/base"):
        train.main([*argv, f"--log_dir={name}"])
    before = {path: path.read_bytes() for path in workplace.rglob("*s/base/*") if path.name != "lock"}
    os.rename("checkpoints/group", "checkpoints/old")
    train.main(["--resume", "checkpoints/old/base/last.pt", "--epochs", "2"])
    assert len(before) > 4 and all(path.read_bytes() == content for path, content in before.items())
    assert len(Path("results/old/base/metrics.csv").read_text().splitlines()) == 3
    train.main([*argv, "--seeds", "1", "--log_dir=three"])
    shutil.copytree("checkpoints/three", "checkpoints/three (copy)")
    status, error = outcome(train.main, ["--resume", "checkpoints/three (copy)/seed_1/last.pt"], capsys)
    assert status == 2 and "rename its folder" in error  # no checkpoint is written that could not be read


def test_a_dataset_of_a_name_is_no_folder(workplace):
    arguments.parse_args(["--dataset=glyphs", "--log_dir=glyphs", "--results_dir=."])


def test_epochs_cannot_change_under_a_schedule(folder, workplace, capsys, monkeypatch):
    fit(folder, "--beta_mode=linear")
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--epochs", "3"], capsys)
    assert status == 2 and "--beta_mode" in error
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 12 + 3)
        fit(folder, "--beta_mode=linear", epochs=4)
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--epochs", "3"], capsys)
    assert status == 2 and "must be 4, because --beta_mode" in error
    fit(folder, "--lr_schedule=cosine")
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--epochs", "3"], capsys)
    assert status == 2 and "--lr_schedule" in error
    fit(folder, "--loss_mode=ae", "--beta_mode=linear", "--warp=1")  # an AE has no beta; always warped
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    assert len(Path("results/run/metrics.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("argv,said", [
    (["--loss_mode=ae", "--target_beta_val=1.2"], "--target_beta_val changes nothing with ae\n"),
    (["--num_filters=8", "--model=mlp"], "--num_filters changes nothing with mlp\n"),
    (["--beta_mode=linear", "--num_filters=4"], "")])
def test_an_option_that_changes_nothing_is_said(argv, said, workplace, capsys):
    arguments.parse_args(argv)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("argv,clip", [
    ([], 0), (["--beta_mode=linear"], 1000), (["--loss_mode=ae"], 0),
    (["--beta_mode=cyclical", "--grad_clip=0"], 0), (["--grad_clip=7"], 7)])
def test_gradients_are_clipped_while_beta_changes_unless_the_user_says_otherwise(argv, clip, workplace):
    assert arguments.parse_args(argv)[0].grad_clip == clip
