"""Tests of evaluate.py."""

import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributions as D

import data
import evaluate
import infer
import model
import train
import utils
from tests.conftest import fit, levels_like, outcome, pixels
from tests.test_model import LinearGaussian


@pytest.mark.parametrize("flow,most,n", [(0, 5000, 100), pytest.param(1, 4000, 60, marks=pytest.mark.slow)])
def test_importance_sampling_finds_the_likelihood_of_a_linear_gaussian_model(monkeypatch, flow, most, n):
    net, images = LinearGaussian(flow), levels_like((1, 8, 8), 256, n)
    split = data.Split(images, torch.arange(n), torch.zeros(n, dtype=torch.long), 256)
    everything = data.Data(split, split, split, (1, 8, 8), 256, [], 0)
    marginal = D.MultivariateNormal(torch.zeros(64).double(), net.w @ net.w.T + 0.25 * torch.eye(64))
    exact = -marginal.log_prob(net.normalize(images).flatten(1)).mean().item()
    found = [evaluate.evaluate(net, everything, Namespace(limit=None, iw_samples=k, device="cpu", seed=1))
             for k in (1, 10, 100, most)]
    bounds = [figures["iw_nll"] for figures in found]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > exact + 0.2
    assert abs(bounds[-1] - exact) < min(found[-1]["iw_nll_se"], 0.01)
    assert found[-1]["neg_elbo"] == pytest.approx(found[0]["neg_elbo"], abs=0.5) and \
        found[-1]["neg_elbo"] > exact + 0.2
    monkeypatch.setattr(model, "MAX_DECODER_OUTPUTS", 64 * 300)  # latents in parts
    part = evaluate.evaluate(net, everything, Namespace(limit=50, iw_samples=most, device="cpu", seed=1))
    chosen = torch.randperm(n, generator=utils.stream("evaluate"))[:50]
    exact = -marginal.log_prob(net.normalize(images[chosen]).flatten(1)).mean().item()
    assert part["images"] == 50 and part["iw_nll"] == pytest.approx(exact, abs=0.02)


def test_evaluation_refuses_a_dataset_that_has_changed(folder, workplace, capsys):
    """The split of a plain folder is another with one image more: the test's were among the training's."""
    shutil.copytree(folder, "images")
    fit("images")
    shutil.copy("images/0/" + sorted(os.listdir("images/0"))[0], "images/0/zzz.png")
    status, error = outcome(infer.main, ["--evaluate"], capsys)
    assert status == 1 and "images has changed" in error
    infer.main(["--only", "nearest"])
    assert "images has changed" in capsys.readouterr().err and not Path("results/run/nearest.png").exists()
    assert not Path("results/run/evaluation.json").exists()


def test_several_models_are_measured_at_once_and_one_with_a_flow_is_drawn(folder, workplace, capsys):
    train.main([f"--dataset={folder}", "--model=mlp", "--latent_size=4", "--levels=2", "--epochs=2",
                "--flow=1", "--seeds", "1", "2", "--log_dir=run"])
    paths = [f"checkpoints/run/seed_{seed}/best.pt" for seed in (1, 2)]
    capsys.readouterr()
    infer.main(["--evaluate", "--iw_samples=20", "--ckpt", *paths])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "json" not in line)
    found = [json.loads(Path(f"results/run/seed_{seed}/evaluation.json").read_text()) for seed in (1, 2)]
    for name in ("neg_elbo", "kl", "iw_nll", "active_units"):
        values = [measured[name] for measured in found]
        assert said[name] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert found[0]["neg_elbo"] != found[1]["neg_elbo"] and said["iw_samples"] == "20"
    for measured, seed in zip(found, (1, 2)):
        test = json.loads(Path(f"results/run/seed_{seed}/test.json").read_text())
        assert measured["neg_elbo"] == pytest.approx(test["test_loss"], rel=0.01)  # of 20 latents and of one
        assert measured["iw_nll"] < measured["neg_elbo"]
    infer.main(["--ckpt", paths[0], "--only", "reconstructions,latents,units,traversals"])
    drawn = {path.name for path in Path("results/run/seed_1").glob("[a-z]*s.png")}
    assert {"reconstructions.png", "latents.png", "traversals.png"} <= drawn and "units.png" not in drawn
    assert "left out units: an AE has no KL, and with --flow" in capsys.readouterr().err


def test_an_ae_is_measured_against_pca(folder, workplace):
    fit(folder, "--loss_mode=ae", "--ema=0.9")
    infer.main(["--evaluate", "--limit", "30"])
    measured = json.loads(Path("results/run/evaluation.json").read_text())
    everything = data.load(str(folder), "data")
    x = pixels(everything.train).flatten(1).double().numpy() / 255
    chosen = torch.randperm(len(everything.test), generator=utils.stream("evaluate"))[:30]
    images, _ = everything.test.batch(chosen)
    y = images.flatten(1).double().numpy() / 255 - x.mean(0)
    basis = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    left = ((y - y @ basis.T @ basis) ** 2).sum(1).mean()
    assert measured["pca_squared_error"] == pytest.approx(left, rel=1e-6)
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    assert not torch.equal(net.fitted.scale, torch.eye(4))
    error = ((net.reconstruct(images).detach().numpy() - images.numpy() / 255) ** 2).sum((1, 2, 3)).mean()
    assert measured["squared_error"] == pytest.approx(error, rel=1e-5) and measured["images"] == 30
    assert measured["psnr"] == pytest.approx(10 * math.log10(784 / error), rel=1e-5)
    assert measured["kl"] is measured["iw_nll"] is measured["neg_elbo"] is None
