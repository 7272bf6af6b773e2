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
import randomness
import runs
import train
from tests.conftest import HERE, double, fit, levels_like, outcome, pixels
from tests.test_model import LinearGaussian


@torch.no_grad()
@pytest.mark.parametrize("prior", ["normal", pytest.param("flow", marks=pytest.mark.slow)])
def test_importance_sampling_finds_the_likelihood_of_a_linear_gaussian_model(monkeypatch, prior, most=5000,
                                                                             n=100):
    net, images = LinearGaussian(prior), levels_like((1, 8, 8), 256, n)
    split = data.Split(images, torch.arange(n), torch.zeros(n, dtype=torch.long), 256)
    everything = data.Data(split, split, split, (1, 8, 8), 256, [], 0)
    scaled = net.w * net.std
    marginal = D.MultivariateNormal(net.w @ net.mean, scaled @ scaled.T + 0.25 * torch.eye(64))
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
    chosen = torch.randperm(n, generator=randomness.stream("evaluate"))[:50]
    exact = -marginal.log_prob(net.normalize(images[chosen]).flatten(1)).mean().item()
    assert part["images"] == 50 and part["iw_nll"] == pytest.approx(exact, abs=0.02)


def test_evaluation_refuses_a_dataset_that_has_changed(folder, workplace, capsys):
    """The split of a plain folder is another with one image more: the test's were among the training's."""
    shutil.copytree(folder, "images")
    fit("images")
    shutil.copy("images/0/" + sorted(os.listdir("images/0"))[0], "images/0/zzz.png")
    status, error = outcome(infer.main, ["--evaluate"], capsys)
    assert status == 1 and "images has changed" in error
    status, error = outcome(infer.main, ["--only", "nearest"], capsys)
    assert status == 1 and "images has changed" in error and not Path("results/run/nearest.png").exists()
    assert not Path("results/run/evaluation.json").exists()


def test_several_models_are_measured_at_once_and_one_with_a_flow_prior_is_drawn(folder, workplace, capsys):
    train.main([f"--dataset={folder}", "--model=mlp", "--latent_size=4", "--levels=2", "--epochs=2",
                "--prior=flow", "--seeds", "1", "2", "--log_dir=run"])
    paths = [f"checkpoints/run/seed_{seed}/best.pt" for seed in (1, 2)]
    capsys.readouterr()
    infer.main(["--evaluate", "--iw_samples=20", "--ckpt", *paths])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "json" not in line)
    found = [json.loads(Path(f"results/run/seed_{seed}/evaluation.json").read_text()) for seed in (1, 2)]
    for name in ("neg_elbo", "kl", "iw_nll", "active_units"):
        values = [measured[name] for measured in found]
        assert said[name].startswith(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} ")
    assert found[0]["neg_elbo"] != found[1]["neg_elbo"] and said["iw_samples"].split()[0] == "20"
    for measured, seed in zip(found, (1, 2)):
        test = json.loads(Path(f"results/run/seed_{seed}/test.json").read_text())
        assert measured["neg_elbo"] == pytest.approx(test["test_loss"], rel=0.01)  # of 20 latents and of one
        assert measured["iw_nll"] < measured["neg_elbo"]
    status, error = outcome(infer.main, ["--ckpt", paths[0], "--only",
                                         "reconstructions,latents,units,traversals"], capsys)
    drawn = {path.name for path in Path("results/run/seed_1").glob("[a-z]*s.png")}
    assert {"reconstructions.png", "latents.png", "traversals.png"} <= drawn and "units.png" not in drawn
    assert status == 1 and "left out units: an AE has no KL, and with --prior flow" in error


def test_seeds_have_no_mean_while_one_is_unfinished(folder, workplace, capsys):
    for seed in (1, 2):
        fit(folder, f"--seed={seed}")
        shutil.move("checkpoints/run", f"checkpoints/seed_{seed}")
    paths = [Path(f"checkpoints/seed_{seed}/best.pt") for seed in (1, 2)]
    argv = ["--evaluate", "--limit=30", "--ckpt", *map(str, paths)]
    infer.main(argv)
    assert "mean ± standard deviation of the seeds" in capsys.readouterr().out
    state = runs.load_checkpoint(paths[1])
    for epoch in (1, 2):  # killed after the first of two, or after the last, before the mixture
        runs.save_checkpoint(paths[1], {**state, "fitted": None, "finished": False, "epoch": epoch})
        for order in (argv, [*argv[:3], *reversed(argv[3:])]):
            infer.main(order)
            said = capsys.readouterr().out
            assert "the best.pt of a finished run: checkpoints/seed_2/best.pt\n" in said and "±" not in said


def test_an_ae_is_measured_against_pca(folder, workplace):
    fit(folder, "--loss_mode=ae", "--ema=0.9")
    infer.main(["--evaluate", "--limit", "30"])
    measured = json.loads(Path("results/run/evaluation.json").read_text())
    everything = data.load(str(folder), "data")
    x = pixels(everything.train).flatten(1).double().numpy() / 255
    chosen = torch.randperm(len(everything.test), generator=randomness.stream("evaluate"))[:30]
    images, _ = everything.test.batch(chosen)
    y = images.flatten(1).double().numpy() / 255 - x.mean(0)
    basis = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    left = ((y - y @ basis.T @ basis) ** 2).sum(1).mean()
    assert measured["pca_squared_error"] == pytest.approx(left, rel=1e-6)
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    assert not torch.equal(net.fitted.scales[0, 0], torch.eye(4))
    error = ((net.reconstruct(images).detach().numpy() - images.numpy() / 255) ** 2).sum((1, 2, 3)).mean()
    assert measured["squared_error"] == pytest.approx(error, rel=1e-5) and measured["images"] == 30
    assert measured["psnr"] == pytest.approx(10 * math.log10(784 / error), rel=1e-5)
    assert measured["kl"] is measured["iw_nll"] is measured["neg_elbo"] is None


def test_each_figure_is_explained_in_words_that_any_console_can_show():
    assert {*evaluate.METRICS, *evaluate.QUALITY, "prior", "frechet_floor", "judge_accuracy"} == \
        set(evaluate.WORDS)
    for words in evaluate.WORDS.values():
        words.encode("cp1252")


def test_the_frechet_distance_is_that_of_gaussians():
    x = double(500, 4)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov(correction=0)),
                                      (x - x.mean(0)).T, upper=False).T  # mean 0 and covariance I, exactly
    rotation = torch.linalg.qr(double(4, 4, seed=1))[0]
    a = x * torch.tensor([1.0, 2.0, 3.0, 0.0]) @ rotation
    b = (x.flip(0) * torch.tensor([1.5, 2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, 0.0, 2.0])) @ rotation
    assert evaluate.frechet_distance(a, b) == pytest.approx(0.5 ** 2 + 2 ** 2 + 0.5 ** 2 + 1 + 4, rel=1e-6)
    assert evaluate.frechet_distance(b, b) == pytest.approx(0, abs=1e-8)
    # of covariances that do not commute, against a square root found another way
    c = x @ double(4, 4, seed=2)
    product = np.linalg.eigvals((a.T.cov(correction=0) @ c.T.cov(correction=0)).numpy())
    expected = a.var(0, correction=0).sum() + c.var(0, correction=0).sum() - 2 * np.sqrt(
        np.maximum(product.real, 0)).sum()
    assert evaluate.frechet_distance(a, c) == pytest.approx(expected.item(), rel=1e-6)


def test_precision_recall_density_and_coverage_counted_by_hand():
    """Balls of the real ones reach 1, 1 and 2 far, of the drawn ones 9.5."""
    found = evaluate.manifold_metrics(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [10.0]]), k=1)
    assert found == pytest.approx({"precision": 1 / 2, "recall": 1, "density": 1, "coverage": 2 / 3})
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    found = evaluate.manifold_metrics(x, x + 1e-6)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert set(evaluate.manifold_metrics(x, x + 100).values()) == {0.0}


def test_samples_are_judged(folder, workplace, capsys, monkeypatch):
    fit(folder, "--conditional", "--levels=2")
    infer.main(["--evaluate", "--iw_samples=2"])
    said = capsys.readouterr().out
    assert "no figures of samples: 40 test images are too few" in said and "cannot be compared" in said
    path = Path("results/run/evaluation.json")
    assert json.loads(path.read_text())["frechet_distance"] is None
    monkeypatch.setattr(evaluate, "FEWEST", 20)
    monkeypatch.setattr(evaluate, "WORST_JUDGE", 2)
    infer.main(["--evaluate", "--iw_samples=2"])
    assert "the judge is right on" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "WORST_JUDGE", 0)
    cache, = Path("data/cache").glob("judge_*.pt")
    first = cache.read_bytes()
    infer.main(["--evaluate", "--iw_samples=2"])
    measured = json.loads(path.read_text())
    assert cache.read_bytes() == first and measured["samples_judged"] == 40
    for suffix in ("", "_model_prior"):
        assert measured["frechet_distance" + suffix] > 0 and 0 <= measured["class_accuracy" + suffix] <= 1
    assert measured["frechet_distance"] != measured["frechet_distance_model_prior"]
    assert measured["prior"].startswith("a ") and 0 <= measured["coverage"] <= 1
    cache.write_bytes(b"cut short")
    infer.main(["--evaluate", "--iw_samples=2"])
    again = json.loads(path.read_text())
    assert cache.read_bytes() == first and again == measured  # trained again, to the same bit
    # samples that are the test images themselves
    net, _ = infer.restore("checkpoints/run/best.pt")
    everything = data.load(str(folder), "data", None, 2)
    order = torch.randperm(40, generator=randomness.stream("quality"))
    images, labels = everything.test.batch(order)
    place = iter([0])

    def sample(n, asked, generator=None, fitted=False):
        first = next(place)  # one batch
        assert torch.equal(asked, labels[first:first + n])
        return images[first:first + n], images[first:first + n].float()
    monkeypatch.setattr(net, "sample", sample)
    judge = evaluate.cached_judge(data.load(str(folder), "data"), 10, Path("data/cache"))
    real, _ = evaluate.judged(judge, [images.float()])
    perfect = evaluate.sample_quality(net, everything, judge, Namespace(seed=1), False, order, real)
    assert perfect["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert perfect["coverage"] == perfect["precision"] == perfect["recall"] == 1


def test_without_a_likelihood_it_says_how_to_get_one(folder, workplace, capsys):
    fit(folder, epochs=1)
    infer.main(["--evaluate"])
    said = capsys.readouterr().out
    assert "no NLL: gaussian is no likelihood of discrete pixels; train with --recon_loss logistic" in said


@pytest.mark.slow
def test_the_judge_of_mnist_recognises_its_test_images():
    root = HERE / "data"
    if not (root / "MNIST").exists():
        pytest.skip("MNIST is not in data/")
    grey = data.load("mnist", root, download=False)
    for old in (root / "cache").glob(f"judge_{grey.crc32:08x}_*"):
        old.unlink()  # it may be of other code
    judge = evaluate.cached_judge(grey, 10, root / "cache")
    order = torch.arange(10_000)
    for shown, accuracy in (lambda x: x / 255, 0.992), (lambda x: (x > 127).float(), 0.99):
        _, seen = evaluate.judged(judge, (shown(grey.test.batch(index)[0]) for index in order.split(1000)))
        assert (seen == grey.test.labels).double().mean() >= accuracy
