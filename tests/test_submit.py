"""Tests of submit.py."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import infer
import runs
import submit
import train
from tests.conftest import HERE, fit, levels_like, outcome, same


@pytest.mark.slow
def test_submission_holds_the_work_and_no_data(folder, workplace, monkeypatch, capsys):
    for path in HERE.glob("*"):
        if path.is_file() and path.suffix != ".zip":
            shutil.copy(path, path.name)
    shutil.copytree(HERE / "tests", "tests")
    shutil.copytree(folder, "data/images")
    fit("data/images", "--ema=0.9", "--save_every=0")
    for name in ("venv/lib/x.py", ".git/config", "data/cache/x.npy", "__pycache__/x.pyc", "mine.zip"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("not this")
    infer.main(["--only", "samples"])
    done = subprocess.run([sys.executable, "submit.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "checkpoints/run/best.pt" in done.stdout
    with zipfile.ZipFile("submission.zip") as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}  # repeated, the same to the byte
        names = archive.namelist()
        archive.extractall("unpacked")
    assert {"train.py", "infer.py", "README.md", "requirements.txt", "results/run/samples.png",
            "results/run/test.json", "results/run/curves.png", "results/run/metrics.csv",
            "checkpoints/run/best.pt"} <= set(names)
    assert not [name for name in names
                if re.search(r"data/|cache|venv|\.git|events|last\.pt|\.zip|lock", name)]
    state = runs.load_checkpoint(Path("unpacked/checkpoints/run/best.pt"))
    assert state["optimizer"] is None and len(list(runs.tensors(state["model"]))) > 4
    before = runs.load_checkpoint(Path("checkpoints/run/best.pt"))
    assert same(state["model"], before["ema"]) and not same(state["model"], before["model"])
    # drawn from the unpacked files in a fresh process, the samples are the same
    fresh = subprocess.run([sys.executable, "infer.py", "--only", "samples"], cwd="unpacked",
                           capture_output=True, text=True)
    assert fresh.returncode == 0 and fresh.stderr == ""
    drawn, again = (Path(place, "results/run/samples.png").read_bytes() for place in (".", "unpacked"))
    assert drawn == again
    tested = subprocess.run([sys.executable, "unittests.py", "-k", "kld"], cwd="unpacked",
                            capture_output=True, text=True)
    assert tested.returncode == 0 and "2 passed" in tested.stdout
    status, error = outcome(train.main, ["--resume", "unpacked/checkpoints/run/best.pt"], capsys)
    assert status == 1 and "packed for drawing" in error
    Path("half.pt").write_bytes(submit.contents(Path("checkpoints/run/best.pt"), half=True)[1][
        "checkpoints/run/best.pt"])
    assert Path("half.pt").stat().st_size < 0.6 * Path("unpacked/checkpoints/run/best.pt").stat().st_size
    images = levels_like(state["data"]["shape"], 256)
    whole, half = (infer.restore(Path(path), "cpu")[0].reconstruct(images)
                   for path in ("unpacked/checkpoints/run/best.pt", "half.pt"))
    assert half.dtype == torch.float32 and 0 < (whole - half).abs().max() < 1 / 255


def test_pictures_of_many_epochs_are_left_out_of_the_zip(folder, workplace, monkeypatch, capsys):
    fit(folder)
    whole = submit.contents("checkpoints/run/best.pt")[1]
    assert {"results/run/samples_001.png", "results/run/reconstructions_002.png"} <= set(whole)
    capsys.readouterr()
    monkeypatch.setattr(submit, "MAX_EPOCH_BYTES", 1000)
    small = submit.contents("checkpoints/run/best.pt")[1]
    Path("results/run/samples_1000.png").write_bytes(b"of a late epoch")
    Path("results/run/manifold_007.png").write_bytes(b"of a class")
    late = submit.contents("checkpoints/run/best.pt")[1]
    assert "results/run/samples_1000.png" not in late and "results/run/manifold_007.png" in late
    capsys.readouterr()
    Path("results/run/samples_1000.png").unlink()
    small = submit.contents("checkpoints/run/best.pt")[1]
    Path("results/run/manifold_007.png").unlink()
    small.pop("results/run/manifold_007.png")
    assert set(whole) - set(small) == {f"results/run/{name}_00{epoch}.png" for epoch in (1, 2)
                                       for name in ("samples", "reconstructions")}
    assert "left out: the 4 pictures of single epochs" in capsys.readouterr().err


def test_pictures_and_figures_of_an_older_state_are_said(folder, workplace, capsys):
    fit(folder, epochs=1)
    infer.main(["--only", "samples"])
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    Path("results/run/evaluation.json").write_text(json.dumps({"epoch": 1, "neg_elbo": 1.0}))
    capsys.readouterr()
    files = submit.contents("checkpoints/run/best.pt")[1]
    said = capsys.readouterr().err
    assert "results/run/test.json" in files and "results/run/evaluation.json" not in files
    assert "left out: results/run/evaluation.json, which is not of epoch 2" in said
    assert "samples.png that is older than the checkpoint; to make" in said
    infer.main(["--only", "samples"])
    Path("results/run/evaluation.json").write_text(json.dumps({"epoch": 2, "neg_elbo": 1.0}))
    capsys.readouterr()
    assert "results/run/evaluation.json" in submit.contents("checkpoints/run/best.pt")[1]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_submission_without_a_checkpoint_or_that_does_not_run(folder, workplace, capsys, monkeypatch):
    status, error = outcome(submit.main, [], capsys)
    assert status == 2 and "train one with python train.py" in error
    fit(folder, epochs=1)
    status, error = outcome(submit.main, ["--out", "x.tar"], capsys)
    assert status == 2 and "--out" in error
    checkpoint = Path("checkpoints/run/best.pt").read_bytes()
    fit(folder, "--seed=2", epochs=1)
    Path("old.pt").write_bytes(checkpoint)
    submit.contents(Path("checkpoints/run/best.pt"))
    assert "no samples.png yet; to make the pictures: python infer.py --ckpt checkpoints/run/best.pt\n" in \
        capsys.readouterr().err
    names = submit.contents(Path("old.pt"))[1]  # whose pictures are no longer there
    assert "checkpoints/run/best.pt" in names and not any("results/run" in name for name in names)
    assert "packed without pictures" in capsys.readouterr().err
    monkeypatch.setattr(submit, "CODE", ("infer.py", "data.py"))
    status, error = outcome(submit.main, [], capsys)
    assert status == 1 and "No module named 'processors'" in error and not Path("submission.zip").exists()


def test_the_pictures_of_the_readme_are_there_and_in_the_zip(folder, workplace):
    pictures = []
    for page in (HERE / "README.md", HERE / "results" / "README.md"):
        found = re.findall(r"!\[.*?\]\((.*?)\)|<img src=\"(.*?)\"", page.read_text())
        pictures += [page.parent / "".join(paths) for paths in found]
    assert len(pictures) >= 7 and [path for path in pictures if not path.is_file()] == []
    fit(folder, epochs=1)
    assert {path.relative_to(HERE).as_posix() for path in pictures} <= set(
        submit.contents("checkpoints/run/best.pt")[1])
