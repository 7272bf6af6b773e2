"""Tests of runs.py."""

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import cli
import infer
import runs
import train
import training_state
from tests.conftest import begin, damage, ended, fit, outcome, same, wait_for


def test_curves_are_drawn_in_training_at_most_every_ten_seconds(folder, workplace, curves, monkeypatch):
    now, drawn, draw = [0.0], [], runs.draw_curves
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs, "draw_curves", lambda history, path: drawn.append(len(history))
                        or draw(history, path))
    draw_epoch = train.draw_epoch

    def four_seconds(*args):
        now[0] += 4
        draw_epoch(*args)
    monkeypatch.setattr(train, "draw_epoch", four_seconds)
    fit(folder, epochs=7)
    assert drawn == [3, 6, 7]  # after 12 and 24 seconds, and at the end


def test_tensorboard_has_the_curves_and_the_pictures(folder, workplace, curves):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rows, _ = fit(folder, "--levels=2")
    events = EventAccumulator("results/run").Reload()
    for name in ("val_loss", "train_kl", "val_bpd", "beta"):
        assert [e.value for e in events.Scalars(name.replace("_", "/", 1))] == \
            pytest.approx([float(row[name]) for row in rows])
    assert {"samples", "reconstructions"} <= set(events.Tags()["images"])


def test_overwrite_replaces_a_run_and_touches_nothing_else(folder, workplace, capsys):
    fit(folder, epochs=3)
    infer.main(["--export_samples", "3"])
    own = [Path(name) for name in ("results/run/holiday.png", "results/run/samples_of_mine.png",
                                   "results/run/latents.xlsx", "results/run/samples/notes.txt")]
    for path in (*own, Path("results/photos/samples_001.png")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    fit(folder, epochs=1)
    assert not Path("results/run/samples_002.png").exists()
    assert len(list(Path("results/run").glob("events*"))) == 1
    assert [path.read_text() for path in own] == ["mine"] * 4
    assert not list(Path("results/run/samples").glob("*.png"))  # of the model that was replaced
    infer.main(["--export_samples", "2"])
    assert len(list(Path("results/run/samples").glob("*.png"))) == 2
    train.main(["--dataset", str(folder), "--model", "mlp", "--epochs", "1", "--log_dir", "photos",
                "--overwrite"])
    many = ["--dataset", str(folder), "--model", "mlp", "--hidden_dims", "8", "--epochs", "1", "--log_dir",
            "many"]
    train.main([*many, "--seeds", "1", "2"])
    train.main([*many, "--seeds", "2", "3", "--overwrite"])
    kept = {path.parent.name for path in Path("checkpoints/many").glob("*/best.pt")}
    assert kept == {"seed_2", "seed_3"}
    Path("flat").mkdir()
    for path in Path(folder, "0").iterdir():
        shutil.copy(path, "flat")
    again = [*many, "--seeds", "2", "--overwrite"]
    status, error = outcome(train.main, [*again, "--dataset", "flat", "--conditional"], capsys)
    assert status == 1 and "no classes" in error
    assert {path.parent.name for path in Path("checkpoints/many").glob("*/best.pt")} == kept
    with runs.lock(Path("checkpoints/many/seed_2")):  # as if this one were being trained
        status, error = outcome(train.main, again, capsys)
    assert status == 1 and "is being trained" in error and Path("checkpoints/many/seed_2/best.pt").exists()
    # one folder for everything
    for _ in range(2):
        train.main([*again, "--results_dir", "all", "--checkpoint_dir", "all"])
    assert {"test.json", "best.pt"} <= set(os.listdir("all/many/seed_2"))


def test_names_are_numbered_when_taken(folder, workplace):
    for _ in range(2):
        train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1"])
    name = f"vae_{folder.name}_mlp"
    assert {path.name for path in (workplace / "results").iterdir()} == {name, name + "_2"}
    train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1", "--seed=3",
                "--overwrite"])
    assert {path.name for path in (workplace / "results").iterdir()} == {name, name + "_2"}
    assert [runs.load_checkpoint(f"checkpoints/{run}/best.pt")["args"]["seed"]
            for run in (name, name + "_2")] == [3, 1]


def test_a_run_that_appeared_in_the_meantime_is_not_replaced(folder, workplace, monkeypatch, capsys):
    load = train.load_with

    def meanwhile(*args, **options):
        Path("results/run").mkdir(parents=True)
        Path("results/run/metrics.csv").write_text("another's")
        return load(*args, **options)
    monkeypatch.setattr(train, "load_with", meanwhile)
    status, error = outcome(train.main, ["--dataset", folder, "--log_dir", "run"], capsys)
    assert status == 1 and "holds a run already" in error
    assert Path("results/run/metrics.csv").read_text() == "another's" and not Path("checkpoints").exists()


def test_a_writer_that_fails_to_open_does_not_end_the_run(folder, workplace, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fails)
    fit(folder, epochs=1)
    assert capsys.readouterr().err.count("No space left") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = begin("said", train.main, f"--dataset={folder}", "--model=mlp", "--hidden_dims=8",
                    "--epochs=100000", "--log_dir=a b")
    wait_for("epoch ", "said", process)
    os.kill(process.pid, number)
    status, out, err = ended(process, "said")
    assert status == 128 + number and err == ""
    assert out.endswith("\npython train.py --resume 'checkpoints/a b/last.pt'\n")
    assert training_state.is_whole(tmp_path / "checkpoints/a b/last.pt")


def test_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with runs.Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and not ended
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143] and signal.getsignal(signal.SIGTERM) != signals.handle


def test_two_processes_cannot_train_into_one_folder(folder, workplace, capsys):
    fit(folder, epochs=1)
    with runs.lock(Path("checkpoints/run")):
        for argv in (["--resume", "checkpoints/run/last.pt"],
                     ["--dataset", folder, "--log_dir", "run", "--overwrite"]):
            status, error = outcome(train.main, argv, capsys)
            assert status == 1 and f"process {os.getpid()} on" in error
    dead = ended(begin("said", dies_locked), "said")
    assert dead[0] == -signal.SIGKILL and "process" in Path("checkpoints/run/lock").read_text()
    train.main(["--resume", "checkpoints/run/last.pt"])  # a dead process's lock is none


def dies_locked(_):
    with runs.lock(Path("checkpoints/run")):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(folder, tmp_path, monkeypatch):
    pytest.importorskip("resource")  # not on Windows
    monkeypatch.chdir(tmp_path)
    fit(folder, epochs=1)
    before = {path: path.read_bytes() for path in Path("checkpoints/run").glob("*.pt")}
    room = len(before[Path("checkpoints/run/last.pt")]) // 2
    status, _, err = ended(begin("said", train.main, "--resume", "checkpoints/run/last.pt", "--epochs", "2",
                                 most=room), "said")
    assert status == 1 and re.fullmatch(r"train.py: File too large: checkpoints/run/(best|last).pt\n", err)
    assert {path: path.read_bytes() for path in Path("checkpoints/run").glob("*.pt")} == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_pictures_that_cannot_be_written_do_not_end_the_run(folder, workplace, capsys):
    fit(folder, epochs=1)
    for name in ("samples_002.png", "samples_003.png", "metrics.csv.tmp"):
        Path("results/run", name).mkdir()
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert runs.load_checkpoint(Path("checkpoints/run/last.pt"))["epoch"] == 3


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    path, moments = tmp_path / "x.pt", random.Random(0)
    state = {"args": {"log_dir": "x"}, "data": {}, "model": {"w": torch.randn(40, 10)}, "step": 3}
    runs.save_checkpoint(path, state)
    content, found = path.read_bytes(), 0
    for _ in range(400):
        flipped = bytearray(content)
        flipped[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same({**runs.load_checkpoint(path)}, {"format": f"plain-vae {runs.VERSION}", **state})
        except cli.UserError:
            found += 1
    assert found > 100


def test_a_damaged_checkpoint_is_reported_with_what_else_there_is(trained, workplace, capsys):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)
    damage(workplace / "checkpoints/run/last.pt", "a cut file")
    assert "checkpoints/run/best.pt" in outcome(train.main, ["--resume", "checkpoints/run/last.pt"],
                                                capsys)[1]
    damage(workplace / "checkpoints/run/best.pt", "a flipped bit")
    assert "nothing else" in outcome(train.main, ["--resume", "checkpoints/run/last.pt"], capsys)[1]
