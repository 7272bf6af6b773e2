"""Tests of pictures.py."""

import fnmatch
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributions as D

import data
import infer
import model
import pictures
import runs
from tests.conftest import HERE, encoded, fit, outcome, picture, pixels


def test_infer_conditional_draws_only_the_classes_asked_for(folder, workplace, capsys, monkeypatch):
    fit(folder, "--conditional")
    seen = []
    decode = model.ConditionalVAE.decode
    monkeypatch.setattr(model.ConditionalVAE, "decode", lambda self, z, labels: seen.append((z, labels)) or
                        decode(self, z, labels))
    for prior in ("model", "fitted"):
        infer.main(["--only", "classes", "--classes", "3", "7", "--prior", prior])
        z, labels = seen[-1]
        assert labels.view(2, -1).tolist() == [[3] * 10, [7] * 10]
        # the same noise; the mixture turns it into other latents for each class
        assert torch.equal(z[:10], z[10:]) == (prior == "model")
    infer.main(["--only", "samples", "--classes", "3", "7", "--num_samples", "9"])
    assert set(seen[-1][1].tolist()) == set(seen[-2][1].tolist()) == {3, 7}
    assert "run, only classes 3, 7: samples" in Image.open("results/run/samples.png").text["Description"]
    infer.main([])
    capsys.readouterr()
    assert outcome(infer.main, ["--classes", "11"], capsys) == \
        (1, f"{Path(sys.argv[0]).name}: --classes: there is no 11, only 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n")


def test_latents_are_the_means_or_their_principal_components(folder, workplace, drawn):
    def rows(points):
        return sorted(np.round(np.abs(points.numpy()), 3).tolist())
    fit(folder, "--latent_size=2")
    infer.main(["--only", "latents"])
    caption, points, labels, names, axes = drawn["latents"][1:]
    assert "two directions" not in caption
    _, everything, (mean, _) = encoded(folder)
    assert rows(points) == rows(mean) and axes == ["z1", "z2"] and names == everything.classes
    i = int(points[:, 0].argmax())  # a point and its class
    assert labels[i] == everything.test.labels[int(mean[:, 0].argmax())]
    fit(folder)
    infer.main(["--only", "latents"])
    caption, points, _, _, axes = drawn["latents"][1:]
    assert "in two directions of 4: what overlaps" in caption
    mean = encoded(folder)[2][0]
    centred = (mean - mean.mean(0)).double().numpy()
    singular, directions = np.linalg.svd(centred, full_matrices=False)[1:]
    assert np.allclose(rows(points), rows(torch.from_numpy(centred @ directions[:2].T)), atol=2e-3)
    shares = singular ** 2 / (singular ** 2).sum()
    assert [axis.split("(")[1].split("%")[0] for axis in axes] == [f"{100 * part:.0f}" for part in shares[:2]]


def test_units_are_in_the_order_of_their_kl(folder, workplace, drawn):
    fit(folder, "--levels=2", epochs=4)
    infer.main(["--only", "units"])
    names, kl, active, t, densities = drawn["units"][2:]
    mean, log_std = encoded(folder, levels=2)[2]
    posterior = D.Normal(mean, log_std.exp())
    expected = D.kl_divergence(posterior, D.Normal(0.0, 1.0)).mean(0)
    order = expected.argsort(descending=True)
    torch.testing.assert_close(kl, expected[order])
    assert active.tolist() == (mean[:, order].var(0, correction=0) > 0.01).tolist()
    assert names == list(densities) == [f"z{d + 1}" for d in order.tolist()]
    weights = D.Categorical(torch.ones(len(mean)))
    for d, density in zip(order.tolist(), densities.values()):
        mixture = D.MixtureSameFamily(weights, D.Normal(mean[:, d], log_std[:, d].exp()))
        torch.testing.assert_close(density, mixture.log_prob(t).exp(), rtol=1e-4, atol=1e-6)
        assert torch.trapezoid(density, t).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("mode", ["vae", "ae"])
def test_traversals_change_one_dimension_at_a_time(folder, workplace, drawn, monkeypatch, mode):
    fit(folder, f"--loss_mode={mode}", "--latent_size=3")
    seen, decode = [], model.AE.decode
    monkeypatch.setattr(model.AE, "decode", lambda self, z, labels: seen.append(z) or decode(self, z, labels))
    infer.main(["--only", "traversals"])
    _, title, images, columns, names, offsets = drawn["labelled_grid"]
    z = seen[-1].view(3, 11, 3)
    net, everything, code = encoded(folder)
    order = [int(name.split()[0][1:]) - 1 for name in names]
    assert columns == 11 and len(images) == 33 and offsets[0] == "-3.0" and offsets[5] == "0.0"
    centre, spread = torch.zeros(3), torch.ones(3)
    activity = code.var(0) if mode == "ae" else D.kl_divergence(
        D.Normal(code[0], code[1].exp()), D.Normal(0.0, 1.0)).mean(0)
    assert order == activity.argsort(descending=True).tolist()
    if mode == "ae":
        latents = net.embed(everything.train.batch(torch.arange(320))[0]).detach()
        centre, spread = latents.mean(0), latents.std(0, correction=0)
    for row, d in enumerate(order):
        torch.testing.assert_close(z[row, :, d], centre[d] + torch.linspace(-3, 3, 11) * spread[d], rtol=1e-3,
                                   atol=1e-3)
        others = [i for i in range(3) if i != d]
        assert (z[row][:, others] == z[row][0, others]).all()
        # which are those of one test image
        mean = code if mode == "ae" else code[0]
        assert ((mean[:, others] - z[row, 0, others]).abs().sum(1) < 1e-4).any()


def test_interpolations_go_between_classes_on_the_line_and_on_the_sphere(folder, workplace, monkeypatch):
    start, end = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    arc = pictures.slerp(start, end, torch.linspace(0, 1, 4)[:, None])
    angles = torch.tensor([0, math.pi / 6, math.pi / 3, math.pi / 2])
    torch.testing.assert_close(arc, 3 * torch.stack([angles.cos(), angles.sin(), 0 * angles], 1), atol=1e-5,
                               rtol=0)
    # ends of other lengths: the length changes evenly, also where they point nearly in opposite directions
    for end in (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([-1.3, 0.05, 0.0])):
        arc = pictures.slerp(start, end, torch.linspace(0, 1, 9)[:, None])
        torch.testing.assert_close(arc[[0, -1]], torch.stack([start, end]), atol=1e-5, rtol=0)
        lengths = torch.linspace(3, float(end.norm()), 9)
        torch.testing.assert_close(arc.norm(dim=1), lengths, atol=1e-3, rtol=0)
        angles = torch.atan2(arc[:, 1], arc[:, 0])
        torch.testing.assert_close(angles, torch.linspace(0, float(angles[-1]), 9), atol=1e-3, rtol=0)
    for other in (2 * start, -start, start):  # no arc, or more than one
        middle = pictures.slerp(start, other, torch.tensor([[0.5]]))
        assert torch.equal(middle, torch.lerp(start, other, 0.5)[None])
    taken, lines = [], []
    monkeypatch.setattr(pictures, "slerp", lambda a, b, w: lines.append((a, b)) or torch.lerp(a, b, w))
    images = pictures.Subject.test_images
    monkeypatch.setattr(pictures.Subject, "test_images", lambda it, index: taken.append(images(it, index))
                        or taken[-1])
    fit(folder)
    infer.main(["--only", "interpolations"])
    (_, z, labels), (_, ends, others) = taken
    assert len(lines) == 5 and (labels != others).all() and len(ends.unique(dim=0)) == 5
    for i, line in enumerate(lines):
        torch.testing.assert_close(line, (z[i], ends[i]))
    taken.clear()
    fit(folder, "--conditional")
    infer.main(["--only", "interpolations"])
    assert torch.equal(taken[0][2], taken[1][2]) and not torch.equal(taken[0][1], taken[1][1])
    taken.clear()
    lines.clear()
    fit(folder, "--loss_mode=ae")  # around the middle of its latents
    infer.main(["--only", "interpolations"])
    middle, spread = encoded(folder)[0].fitted.mean_and_std()
    assert middle.abs().max() > 0.01
    torch.testing.assert_close(lines[0], tuple((part[1][0] - middle) / spread for part in taken))


def test_nearest_are_the_nearest_training_images(folder, workplace, drawn):
    fit(folder)
    infer.main(["--only", "nearest"])
    title, images, columns, distances, _ = drawn["labelled_grid"][1:]
    images = images.view(-1, columns, 784).double()
    train_images = pixels(encoded(folder)[1].train).flatten(1).double() / 255
    for row, distance in zip(images, distances):
        away = (train_images - row[0]).square().sum(1).sqrt().sort()[0]
        shown = (row[1:] - row[0]).square().sum(1).sqrt()
        torch.testing.assert_close(shown, away[:columns - 1], rtol=1e-3, atol=1e-3)
        assert float(distance) == pytest.approx(away[0].item(), abs=0.01)
    net, everything, _ = encoded(folder)  # all 40 test images are asked for
    unseen = net.reconstruct(pixels(everything.test)).detach().flatten(1).double()
    away = torch.stack([(train_images - image).square().sum(1).sqrt().min() for image in unseen])
    said = re.search(r"theirs at (.*) \(median\), one in ten below (.*);", title).groups()
    assert [float(value) for value in said] == pytest.approx(np.quantile(away.numpy(), [0.5, 0.1]), abs=0.01)
    fit(folder, "--levels=2", "--binarize=stochastic")
    infer.main(["--only", "nearest"])
    images, columns, distances, _ = drawn["labelled_grid"][2:]
    for row, distance in zip(images.view(-1, columns, 784), distances):  # what is shown is what was measured
        shown = (row[1:] - row[0]).square().sum(1).sqrt().tolist()
        assert shown == sorted(shown) and float(distance) == pytest.approx(shown[0], abs=0.006)


def test_the_file_of_each_picture_is_of_a_run():  # so that --overwrite deletes it
    for name in pictures.PICTURES:
        files = [f"{name}.png", f"{name}.gif"]
        assert any(fnmatch.fnmatch(file, pattern) for file in files for pattern in runs.FILES), name


def test_of_two_betas_other_figures_can_be_compared_than_of_two_likelihoods():
    betas, losses = (pictures.comparison_warnings([name], [], True)[0] for name in (
        "target_beta_val", "recon_loss"))
    assert betas.endswith("val reconstruction and val KL can") and "squared error" not in betas
    assert losses.endswith("the test squared error can")


@pytest.mark.slow
def test_comparing_shows_in_what_models_differ(folder, workplace, drawn, monkeypatch, capsys):
    for name, *flags in (("a", "--latent_size=2"), ("b", "--latent_size=6", "--seed=3"),
                         ("c", "--loss_mode=ae")):
        fit(folder, *flags)
        shutil.move("checkpoints/run", f"checkpoints/{name}")
    files = [f"checkpoints/{name}/best.pt" for name in "abc"]
    measured = {"ckpt": str(Path(files[0]).resolve()), "epoch": infer.restore(files[0])[1]["epoch"],
                "frechet_distance": 1.5, "frechet_distance_model_prior": 9.25, "coverage": 0.25}
    for wrong in ([], {**measured, "epoch": 7}, {**measured, "ckpt": files[1]},  # not of these checkpoints
                  {**measured, "frechet_distance": "x", "iw_nll": 80.0, "images": [1]}):  # or damaged
        Path("results/a").mkdir(exist_ok=True)
        Path("results/a/evaluation.json").write_text(json.dumps(wrong))
        infer.main(["--compare", "--ckpt", files[0], files[2]])
        assert "frechet distance" not in drawn["compare"][2][0][3]
    Path("results/a/evaluation.json").write_text(json.dumps(measured))
    capsys.readouterr()
    infer.main(["--compare", "--prior=model", "--ckpt", *files[:2]])
    assert drawn["compare"][2][0][3]["frechet distance"] == "9.25"
    assert "cannot be compared" not in capsys.readouterr().out
    infer.main(["--compare", "--ckpt", *files])
    assert re.findall(r"mixture of (\d+)", drawn["compare"][1]) == ["16", "5", "8"]  # from left to right
    captions = [column[0][1:] for column in drawn["compare"][2]]
    assert captions == [[f"latent_size {size}", f"loss_mode {mode}", f"recon_loss {loss}", f"seed {seed}"]
                        for size, mode, loss, seed in ((2, "vae", "gaussian", 1), (6, "vae", "gaussian", 3),
                                                       (4, "ae", "mse", 1))]
    table = [column[3] for column in drawn["compare"][2]]
    for file, values in zip(files, table):
        net, state = infer.restore(Path(file), "cpu")
        assert values["val reconstruction"] == f"{state['history'][-1]['val_rec']:.2f}"
        images = data.load(str(folder), "data").test.batch(torch.arange(40))[0]
        error = (net.reconstruct(images) - images / 255).square().sum().item() / 40
        assert float(values["test squared error"]) == pytest.approx(error, abs=0.01)
        if file == files[1]:
            means = net.embed(images)
            assert values["active units"] == str(int((means.var(0, correction=0) > 0.01).sum()))
    assert [values["frechet distance"] for values in table] == ["1.50", "–", "–"]
    assert table[0]["coverage"] == "0.25"
    assert table[2]["val KL, nats"] == table[2]["active units"] == "–" != table[0]["active units"]
    assert "val bits/dim" not in table[0] and [*table[0]] == [*table[2]]  # squared errors: none has them
    # the same test images in all of them, above the reconstructions
    grids = [column[2] for column in drawn["compare"][2]]
    assert torch.equal(grids[0][:, :29], grids[1][:, :29]) and not torch.equal(grids[0], grids[1])
    assert {path.name for path in Path("results/compare").iterdir()} == {
        "a_and_b.png", "a_and_c.png", "a_and_b_and_c.png"}
    with Image.open("results/compare/a_and_b_and_c.png") as image:
        assert image.width > 900
    said = capsys.readouterr().out.splitlines()
    assert ["a", "b", "c"] in map(str.split, said) and any("parameters" in line for line in said)
    assert "val losses cannot be compared: the models differ in --loss_mode, --recon_loss; the test " \
        "squared error can" in said
    assert "to measure quality of samples, where they apply: python infer.py --evaluate --ckpt " \
        f"{files[1]} {files[2]}" in said
    assert ["--latent_size", "2", "6", "4"] in map(str.split, said)
    fit(folder, "--levels=2", epochs=1)
    infer.main(["--compare", "--ckpt", files[0], "checkpoints/run/best.pt"])
    said = capsys.readouterr().out
    assert "losses, NLL and errors cannot be compared: the models differ in --levels, --recon_loss\n" in said
    assert "to measure NLL and quality of samples, where they apply: " in said
    fit(folder, "--conditional", epochs=1)
    infer.main(["--compare", "--ckpt", files[0], "checkpoints/run/best.pt"])
    assert "val losses and NLL cannot be compared: the models differ in --conditional; " in \
        capsys.readouterr().out
    infer.main(["--evaluate", "--ckpt", *files])
    said = capsys.readouterr().out
    assert said.count("squared_error") == 2 * 3 and "±" not in said  # no mean of different models
    for sizes in (40, 40, 40), (40, 40, 39):
        numbers = {Path(file): {"coverage": 0.5, "frechet_distance": 2.0, "images": n}
                   for file, n in zip(files, sizes)}
        monkeypatch.setattr(pictures, "evaluated", lambda subject: numbers[subject.path])
        infer.main(["--compare", "--ckpt", *files])
        said = capsys.readouterr().out
        assert ("of different numbers of test images" in said) == (39 in sizes) and "to measure" not in said
        assert ("of different numbers of test images" in drawn["compare"][1]) == (39 in sizes)
    numbers[Path(files[2])].pop("frechet_distance")  # it has no figures of samples
    infer.main(["--compare", "--ckpt", *files])
    assert "of different numbers" not in capsys.readouterr().out
    assert outcome(infer.main, ["--ckpt", *files], capsys)[0] == 2
    assert outcome(infer.main, ["--compare", "--ckpt", files[0]], capsys)[0] == 2


@pytest.mark.slow
def test_beta_is_no_difference_from_an_autoencoder(folder, workplace, drawn):
    files = []
    for name, *flags in (("vae", "--target_beta_val=1.2", "--beta_mode=linear"), ("other",),
                         ("ae", "--loss_mode=ae")):
        fit(folder, *flags, epochs=1)
        files.append(shutil.move("checkpoints/run", f"checkpoints/{name}") + "/best.pt")
    infer.main(["--compare", "--ckpt", files[0], files[2]])
    assert not [text for column in drawn["compare"][2] for text in column[0] if "beta" in text]
    infer.main(["--compare", "--ckpt", *files])
    assert [[text for text in column[0] if "beta" in text] for column in drawn["compare"][2]] == [
        [f"beta_mode {mode}", f"target_beta_val {beta}"] for mode, beta in
        (("linear", 1.2), ("constant", 1.0), ("–", "–"))]


def test_long_names_stay_different():
    first, second = (pictures.short("a" * 250 + end) for end in "bc")
    assert first != second and len(first) < 220 and pictures.short("a_and_b") == "a_and_b"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--conditional"], ["--loss_mode=ae"]], ids=str)
def test_the_explorer_follows_its_widgets(folder, workplace, monkeypatch, flags):
    import matplotlib
    from matplotlib.backend_bases import MouseEvent
    matplotlib.use("Agg")
    fit(folder, *flags)
    args = infer.parse_args(["--explore"])
    with torch.no_grad():
        subject = infer.open_checkpoint(args.ckpt[0], args)
        window = pictures.explore(subject)

    def shown():
        return torch.from_numpy(np.array(window.picture.get_array()))[..., 0]

    def matches():  # what is seen is what the decoder makes of the latent
        label = None if window.label is None else torch.tensor([window.label])
        with torch.no_grad():
            image = subject.model.mean_images(subject.model.from_base(window.z[None], label), label)[0, 0]
        return torch.allclose(image, shown(), atol=1e-5)
    first, start = shown(), window.z.clone()
    assert matches() and torch.equal(start, subject.codes.base[0])
    assert window.dimensions == subject.codes.order[:10].tolist()
    window.sliders[0].set_val(window.sliders[0].valmax)
    moved = window.z != start
    assert moved.nonzero().flatten().tolist() == [window.dimensions[0]] and matches()
    assert not torch.equal(shown(), first)
    window.buttons["random"]._observers.process("clicked", None)
    assert (window.z != start).all() and matches()
    assert float(window.sliders[-1].val) == pytest.approx(
        float(window.z[window.dimensions[-1]].clamp(window.sliders[-1].valmin, window.sliders[-1].valmax)))
    target = [0.3 * low + 0.7 * high for low, high in (window.map.get_xlim(), window.map.get_ylim())]
    x, y = window.map.transData.transform(target)
    window.figure.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event",
                                                                            window.figure.canvas, x, y, 1))
    there = (window.z - window.origin) @ window.directions.T
    assert there.tolist() == pytest.approx(target, abs=1e-3) and matches()
    if window.chooser:
        before, label = shown(), (window.label + 1) % 10
        window.chooser.set_active(label)
        assert window.label == label and matches() and not torch.equal(shown(), before)
        assert window.class_axis.get_title() == f"class {label}"
    window.buttons["reset"]._observers.process("clicked", None)
    assert torch.equal(window.z, start) and torch.equal(shown(), first) and matches()
    subject.data = None  # where the dataset is not here, images that the model draws take its place
    del subject.codes
    with torch.no_grad():
        window = pictures.explore(subject)
    assert matches() and len(subject.codes.z) == 1000
    assert len(subject.codes.labels.unique()) == (10 if window.chooser else 1)


@pytest.mark.slow
def test_exploring_without_a_screen_says_what_to_do(folder, workplace, capsys, monkeypatch):
    fit(folder, epochs=1)
    script = [sys.executable, HERE / "infer.py", "--explore"]
    screenless = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
    backends = [subprocess.Popen(script, stderr=subprocess.PIPE, text=True,
                                 env={**screenless, "MPLBACKEND": backend})
                for backend in ("svg", "TkAgg", "nonsense")]
    for process in backends:
        error = process.communicate()[1]
        assert process.returncode == 1 and error.count("\n") == 1 and "MPLBACKEND=WebAgg" in error


def test_classes_with_names_that_are_no_file_names(workplace, monkeypatch):
    for i in range(80):
        picture(workplace / "images" / ("a b", "t(1)")[i % 2] / f"{i}.png", seed=i)
    fit("images", "--conditional", "--latent_size=2", epochs=1)
    seen = []
    images = pictures.Subject.test_images
    monkeypatch.setattr(pictures.Subject, "test_images", lambda it, index: seen.append(images(it, index)[2])
                        or images(it, index))
    infer.main(["--classes", "1"])  # by number, since no class has a number for its name
    assert Path("results/run/manifold_t_1_.png").exists() and len(seen[0]) > 1 and seen[0].eq(1).all()


def test_a_class_without_test_images_and_a_name_with_a_dollar(workplace, capsys):
    for i in range(60):
        picture(workplace / "images" / "$x_{$" / f"{i}.png", seed=i)
    picture(workplace / "images" / "rare" / "a.png", seed=99)
    fit("images", "--conditional", epochs=1)
    infer.main(["--classes", "rare"])
    said = capsys.readouterr().err
    assert said.count("no test image is of these classes") == 1 and said.count("\n") == 1
    assert {path.name for path in Path("results/run").glob("[c-z]*.png")} - {"curves.png"} == {
        "samples.png", "samples_prior.png", "samples_001.png", "classes.png", "reconstructions_001.png"}
    infer.main([])
    assert Path("results/run/latents.png").exists()


def test_an_unfinished_run_is_said(folder, workplace, capsys, drawn):
    fit(folder, "--conditional", epochs=1)
    best = Path("checkpoints/run/best.pt")
    state = runs.load_checkpoint(best)
    assert state["finished"]
    state["finished"], state["args"]["epochs"], state["fitted"] = False, 3, None
    runs.save_checkpoint(best, state)
    capsys.readouterr()
    infer.main(["--only", "classes"])
    assert capsys.readouterr().out.splitlines()[0] == f"{best.as_posix()}: run run, epoch 1 of 3, unfinished"
    assert "unfinished, epoch 1" in drawn["labelled_grid"][1]
    for argv, said in ((["--only=samples", "--temperature=0.5"], True), (["--only=reconstructions"], False),
                       (["--only=samples", "--prior=model"], False), (["--export_samples=2"], True)):
        infer.main(argv)
        assert ("no mixture is fitted" in capsys.readouterr().err) == said, argv


def test_of_many_classes_32_are_drawn(workplace, capsys, drawn):
    labels = np.arange(1200) % 300
    np.savez("many.npz", images=np.arange(1200 * 64).reshape(1200, 8, 8).astype(np.uint8), labels=labels)
    fit("many.npz", "--conditional", epochs=1)
    infer.main(["--only", "classes"])
    assert drawn["labelled_grid"][2].shape[0] == 320
    assert drawn["labelled_grid"][4] == list(map(str, range(32)))
    assert "the first 32 of 300 classes" in capsys.readouterr().out
    infer.main(["--only", "classes", "--classes", "299", "7"])
    assert drawn["labelled_grid"][4] == ["299", "7"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_many_classes_and_many_samples_need_bounded_memory(folder, workplace):
    def peak(script, *argv):
        code = f"import sys, re, {script}; {script}.main(sys.argv[1:]); " \
               "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
        out = subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(HERE)}).stdout
        return int(out.splitlines()[-1]) / 1024  # MB
    images = np.random.default_rng(0).integers(0, 256, (12_000, 28, 28)).astype(np.uint8)
    np.savez("many.npz", images=images, labels=np.arange(12_000) % 3000)
    assert peak("train", "--dataset=many.npz", "--conditional", "--epochs=1", "--log_dir=many") < 1000
    assert peak("infer", "--ckpt=checkpoints/many/best.pt") < 1000
    fit(folder, "--recon_loss=categorical", "--limit=20", epochs=1)  # 200,704 numbers an image
    assert peak("infer", "--ckpt=checkpoints/run/best.pt", "--only=samples", "--num_samples=1200") < 1000


def test_classes_whose_names_are_alike_in_file_names_keep_their_pictures(workplace):
    labels, images = np.arange(60) % 3, np.random.default_rng(0).integers(0, 256, (60, 8, 8)).astype(np.uint8)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = workplace / "images" / ("#", "+", "7")[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    fit("images", "--conditional", "--latent_size=2", epochs=2)
    infer.main(["--temperature", "0.5", "--prior", "model"])
    names = {"manifold___0.png", "manifold___1.png", "manifold_7_2.png"}
    assert {path.name for path in Path("results/run").glob("manifold*")} == names
    with Image.open("results/run/manifold_7_2.png") as image:
        assert "percentiles of N(0, I) times 0.5 in the latent space, class 7" in image.info["Description"]
    page = Path("results/run/index.html").read_text()
    assert all(page.index(f'src="{name}"') < page.index("After each epoch") for name in names)
