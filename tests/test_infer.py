"""Tests of infer.py."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import data
import infer
import train
from tests.conftest import fit, needs_gpu, outcome


def test_restore_is_for_notebooks(folder, workplace):
    fit(folder, "--conditional", epochs=1)
    net, checkpoint = infer.restore("checkpoints/run/best.pt")
    assert not net.training and checkpoint["epoch"] == 1 and next(net.parameters()).device.type == "cpu"
    everything = data.load(str(folder), "data")
    images, labels = everything.test.batch(torch.arange(5))
    drawn, mean = net.sample(5, labels)
    assert drawn.dtype == torch.uint8 and drawn.shape == mean.shape == (5, 1, 28, 28)
    z, _ = net.encode(images, labels)
    assert torch.equal(net.embed(images, labels), z)
    assert torch.equal(net.reconstruct(images, labels), (net.decode(z, labels).tanh() + 1) / 2)
    again, _ = infer.restore(Path("checkpoints/run/best.pt"), device="cpu")
    assert torch.equal(again.embed(images, labels), z)


def test_without_a_file_it_is_the_newest_checkpoint(folder, workplace, capsys):
    for name in ("older", "newest"):
        train.main([f"--dataset={folder}", "--model=mlp", "--epochs=1", f"--log_dir={name}"])
        time.sleep(0.01)
    capsys.readouterr()
    for argv in ([], ["--ckpt"]):
        infer.main([*argv, "--only", "samples"])
        assert capsys.readouterr().out.splitlines() == [
            "checkpoints/newest/best.pt: run newest, epoch 1 of 1",
            *(str(Path("results/newest", name)) for name in ("samples.png", "samples_prior.png")),
            f"open {Path('results/newest/index.html')} to see them all"]
    status, error = outcome(infer.main, ["--ckpt", "older"], capsys)
    assert status == 2 and error.endswith("its folder; did you mean checkpoints/older/best.pt?\n")
    with pytest.raises(cli.UserError, match="left out classes"):
        infer.main(["--only", "classes"])
    assert "to see them all" not in capsys.readouterr().out  # nothing new was drawn


@needs_gpu
@pytest.mark.parametrize("flags", [["--levels=2", "--conditional", "--prior=flow"], ["--loss_mode=ae"], []],
                         ids=str)
def test_a_gpu_draws_and_measures_as_a_cpu_does(folder, workplace, flags):
    fit(folder, "--device=cuda", *flags)
    found = []
    for device in ("cuda", "cpu"):
        asked = [f"--device={device}", f"--results_dir={device}"]
        for argv in ([], ["--evaluate", "--iw_samples=50"], ["--export"], ["--export_samples=3"],
                     ["--images", f"{folder}/3/" + next(Path(folder, "3").iterdir()).name]):
            infer.main([*argv, *asked])
        run = Path(device, "run")
        found.append((json.loads((run / "evaluation.json").read_text()), np.load(run / "latents.npz"),
                      {path.name for path in run.iterdir()}))
    (measured, latents, names), (measured_cpu, latents_cpu, names_cpu) = found
    assert names == names_cpu and len(names) > 10
    for name in ("neg_elbo", "rec", "kl", "iw_nll", "squared_error", "active_units"):
        assert measured[name] is measured_cpu[name] is None \
            or measured[name] == pytest.approx(measured_cpu[name], rel=0.02)
    np.testing.assert_allclose(latents["z"], latents_cpu["z"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(latents["squared_error"], latents_cpu["squared_error"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--loss_mode=ae", "--model=cnn"],
                                   ["--latent_size=2", "--levels=16", "--model=cnn"]], ids=str)
def test_infer_twice_is_the_same_to_the_byte(folder, workplace, flags):
    fit(folder, *flags)
    pictures = []
    for out in ("a", "b"):
        infer.main(["--results_dir", out])
        pictures.append({path.name: path.read_bytes() for path in (workplace / out / "run").iterdir()})
    assert pictures[0] == pictures[1]
    expected = {"samples.png", "reconstructions.png", "interpolations.png", "latents.png", "traversals.png",
                "nearest.png", "progress.gif", "index.html"}
    expected |= set() if "--loss_mode=ae" in flags else {"units.png", "samples_prior.png"}
    expected |= {"manifold.png"} if "--latent_size=2" in flags else set()
    expected |= {"samples_drawn.png"} if any("levels" in flag for flag in flags) else set()
    assert set(pictures[0]) == expected


@pytest.mark.parametrize("linked", [False, True])
def test_a_renamed_run_has_the_results_of_its_new_name(folder, workplace, linked):
    if linked:  # as to another disk
        Path("disk").mkdir(), os.symlink("disk", "checkpoints")
    fit(folder, epochs=1)
    os.rename("checkpoints/run", "checkpoints/kept"), os.rename("results/run", "results/kept")
    fit(folder, "--seed=2", epochs=1)
    before = {path: path.read_bytes() for path in Path("results/run").iterdir()}
    for argv in (["--evaluate", "--limit=30"], ["--only=samples"]):
        infer.main([*argv, "--ckpt", "checkpoints/kept/best.pt"])
    assert {path: path.read_bytes() for path in Path("results/run").iterdir()} == before
    page = Path("results/kept/index.html").read_text()
    assert "psnr" in page and "test_loss" in page and Path("results/kept/samples.png").exists()
    Path("elsewhere").mkdir(), shutil.copy("checkpoints/kept/best.pt", "elsewhere")
    infer.main(["--only=samples", "--ckpt", "elsewhere/best.pt", "--results_dir", "out"])
    assert [path.name for path in Path("out").iterdir()] == ["run"]  # as it was called in training


def test_infer_without_the_dataset_draws_what_needs_none(folder, workplace, capsys):
    copy = workplace / "images"
    shutil.copytree(folder, copy)
    fit(copy)
    shutil.rmtree(copy)
    infer.main(["--results_dir", "elsewhere"])
    assert {path.name for path in (workplace / "elsewhere/run").iterdir()} == \
        {"samples.png", "samples_prior.png", "progress.gif", "index.html"}
    said = capsys.readouterr().err
    assert "so without" in said and "reconstructions" in said and "images" in said
    assert "give its new place with --dataset" in said
    shutil.copytree(folder, copy)
    next(copy.rglob("*.png")).unlink()
    infer.main([])
    said = capsys.readouterr().err
    assert "has changed since the model was trained" in said and "its new place" not in said


def test_infer_follows_its_flags(folder, workplace, capsys):
    fit(folder, "--results_dir=mine")
    shutil.move("mine", "results")
    infer.main(["--ckpt", "checkpoints/run", "--only", "samples", "--temperature", "0", "--num_samples", "4",
                "--prior", "model"])
    assert not Path("mine/run/samples_prior.png").exists()
    with Image.open("mine/run/samples.png") as image:  # beside the training's own results
        cells = np.asarray(image)[..., 0]
    half = image.width // 59 * 29  # two images of 28 pixels and three lines, enlarged
    # without variance all samples are one
    assert np.array_equal(cells[:half, :half], cells[:half, half:2 * half])
    status, error = outcome(infer.main, ["--only", "reconstructions", "--dataset", folder / "0"], capsys)
    assert status == 1 and "--images" in error
    shutil.copytree(folder, "moved")
    infer.main(["--only", "reconstructions", "--dataset", "moved"])
    assert Path("mine/run/reconstructions.png").exists()
