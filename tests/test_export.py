"""Tests of export.py, and of infer.py's --images, --export and --export_samples."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import infer
import runs
import train
from tests.conftest import fit, outcome, picture, pixels


@pytest.mark.parametrize("flags", [["--recon_loss=gaussian"], ["--loss_mode=ae"],
                                   ["--levels=2", "--conditional", "--prior=flow"]], ids=str)
def test_latents_of_each_image(folder, workplace, capsys, flags):
    fit(folder, *flags, epochs=1)
    infer.main(["--export", "--split", "val"])
    net, checkpoint = infer.restore("checkpoints/run/best.pt")
    read = data.load(str(folder), "data", levels=checkpoint["data"]["levels"])
    images, labels = read.val.batch(torch.arange(40))
    found = np.load("results/run/latents_val.npz", allow_pickle=False)
    oddest = found["name"][(-found["loss"]).argsort()[:3]]
    assert f"the highest losses are of {', '.join(oddest)}\n" in capsys.readouterr().out
    z = net.embed(images, labels)
    torch.testing.assert_close(torch.from_numpy(found["z"]), z)
    assert [int(name) for name in found["label"]] == labels.tolist()
    for name, label, image in zip(found["name"], found["label"], pixels(read.val)):  # the files themselves
        stored = np.asarray(Image.open(folder / name))
        assert name.startswith(f"{label}/")
        assert torch.equal(torch.from_numpy(stored // (255 if read.levels == 2 else 1) if read.levels == 256
                                            else (stored > 127).astype(np.uint8)), image[0])
    error = (images / (read.levels - 1) - net.reconstruct(images, labels)).square().flatten(1).sum(1)
    torch.testing.assert_close(torch.from_numpy(found["squared_error"]), error)
    if "--loss_mode=ae" in flags:
        assert "kl" not in found
    else:
        mean, log_std = net.encode(images, labels)
        torch.testing.assert_close(torch.from_numpy(found["std"]), log_std.exp())
        noise = torch.randn(40, 500, 4, generator=torch.Generator().manual_seed(0))
        rec, kl = (term.detach().numpy() for term in net.log_weights(images, labels, noise))
        error = (rec + kl).std(1) * (1 / 16 + 1 / 500) ** 0.5  # of means over 16 draws and over 500
        assert (abs(found["loss"] - (rec + kl).mean(1)) < 5 * error + 1e-3).all()
        assert (abs(found["kl"] - kl.mean(1)) < 5 * kl.std(1) * (1 / 16 + 1 / 500) ** 0.5 + 1e-3).all()
    with open("results/run/latents_val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and [row["name"] for row in rows] == found["name"].tolist()
    for d in range(4):
        assert [float(row[f"z{d + 1}"]) for row in rows] == pytest.approx(found["z"][:, d], rel=1e-5)
    assert [float(row["loss"]) for row in rows] == pytest.approx(found["loss"], rel=1e-5)


def test_own_images_are_brought_to_the_models_size(folder, workplace, drawn, capsys):
    fit(folder, epochs=1)
    read = data.load(str(folder), "data")
    for i, image in enumerate(pixels(read.test)[:2, 0].numpy()):  # enlarged, as colour, in another format
        Path("mine").mkdir(exist_ok=True)
        large = Image.fromarray(image).convert("RGB").resize((56, 56), Image.Resampling.NEAREST)
        large.save(f"mine/{i}.webp", lossless=True)
    split, _ = data.own_images([Path("mine")], read.about())
    given, own = pixels(read.test)[:2].int(), pixels(split).int()
    assert own.shape == (2, 1, 28, 28) and (own - given).abs().float().mean() < 12
    infer.main(["--images", "mine"])
    assert Path("results/run/images.png").exists() and len(drawn["labelled_grid"][2]) == 22
    infer.main(["--images", "mine/0.webp", "mine/1.webp", "mine/0.webp", "--export"])
    found = np.load("results/run/latents_images.npz")
    assert found["name"].tolist() == [f"mine/{i}.webp" for i in (0, 1, 0)]
    assert found["label"].tolist() == [""] * 3 and (found["z"][0] == found["z"][2]).all()
    Path("mine/cats").mkdir(), Path("mine/7").mkdir()
    Path("mine/0.webp").rename("mine/cats/0.webp"), Path("mine/1.webp").rename("mine/7/1.webp")
    infer.main(["--images", "mine/cats/0.webp", "mine/7", "mine", "--export"])
    again = np.load("results/run/latents_images.npz")
    assert again["label"].tolist() == ["", "7", "7", "cats"]  # without folders only a class of the model
    assert again["z"] == pytest.approx(found["z"][[0, 1, 1, 0]], abs=1e-5)
    shutil.copytree("mine", "parts/train"), shutil.copytree("mine", "parts/test")
    infer.main(["--images", "parts", "--export"])
    assert np.load("results/run/latents_images.npz")["label"].tolist() == ["7", "cats"] * 2
    Path("results/run/none").mkdir()
    for argv, status, said in ((["--images", "nowhere"], 2, "nowhere"),
                               (["--images", "results/run/none"], 1, "no images"),
                               (["--images", "mine", "--only", "samples"], 2, "--only"),
                               (["--split", "val"], 2, "--export")):
        code, error = outcome(infer.main, argv, capsys)
        assert code == status and said in error and error.count("\n") == 1, (argv, error)


def test_own_images_under_every_class(folder, workplace, drawn, capsys):
    fit(folder, "--conditional", epochs=1)
    picture(Path("a.png"), seed=1), picture(Path("b.png"), seed=2)
    infer.main(["--images", "a.png"])
    assert drawn["labelled_grid"][2].shape == (11, 1, 28, 28)
    net, checkpoint = infer.restore("checkpoints/run/best.pt")
    levels = data.own_images([Path("a.png")], checkpoint["data"])[0].batch(torch.arange(1))[0]
    torch.testing.assert_close(drawn["labelled_grid"][2][4:5], net.reconstruct(levels, torch.tensor([3])))
    infer.main(["--images", "a.png", "b.png", "--classes", "3", "5"])
    assert drawn["labelled_grid"][4] == ["linear as 3", "spherical as 3", "linear as 5", "spherical as 5"]
    status, error = outcome(infer.main, ["--images", "a.png", "--export"], capsys)
    assert status == 1 and "--classes" in error
    infer.main(["--images", "a.png", "--export", "--classes", "5"])
    found = np.load("results/run/latents_images.npz")
    assert found["z"][0] == pytest.approx(net.embed(levels, torch.tensor([5]))[0].tolist())
    assert found["label"].tolist() == ["5"]
    Path("mine/7").mkdir(parents=True), Path("a.png").rename("mine/7/a.png")
    infer.main(["--images", "mine", "--export"])  # the folder is named as a class
    found = np.load("results/run/latents_images.npz")
    assert found["z"][0] == pytest.approx(net.embed(levels, torch.tensor([7]))[0].tolist())
    assert found["label"].tolist() == ["7"]
    Path("mine/7").rename("mine/seven")
    status, error = outcome(infer.main, ["--images", "mine", "--export"], capsys)
    assert status == 1 and "--classes" in error
    status, error = outcome(infer.main, ["--export", "--classes", "7"], capsys)  # not all classes in silence
    assert status == 2 and "--classes" in error and "column label" in error


def test_own_images_are_measured_as_drawn_pixels_where_the_model_knows_only_these(workplace):
    for i in range(12):  # one for the test
        Path("grey").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 60 + 10 * i, np.uint8)).save(f"grey/{i}.png")
    fit("grey", "--levels=2", "--binarize=stochastic", epochs=1)
    infer.main(["--export"])
    name, = np.load("results/run/latents.npz")["name"]
    infer.main(["--images", f"grey/{name}", "--export"])
    found = np.load("results/run/latents_images.npz")
    net, checkpoint = infer.restore("checkpoints/run/best.pt")
    own, _ = data.own_images([Path("grey", name)], checkpoint["data"], binarize="stochastic")
    drawn = own.batch(torch.arange(1))[0]
    assert drawn.unique().tolist() == [0, 1]  # a threshold would leave one of these
    assert found["z"][0] == pytest.approx(net.embed(drawn, None)[0].tolist(), abs=1e-6)


@pytest.mark.parametrize("flags", [["--levels=2"], ["--conditional"]], ids=str)
def test_samples_as_files(folder, workplace, capsys, flags):
    fit(folder, *flags, epochs=1)
    infer.main(["--export_samples", "25"])
    files = sorted(Path("results/run/samples").rglob("*.png"), key=lambda path: path.stem)
    images = [np.asarray(Image.open(path)) for path in files]
    assert len(files) == 25 and all(image.shape == (28, 28) for image in images)
    if flags == ["--levels=2"]:  # pixels drawn from the likelihood
        assert set(np.unique(images)) == {0, 255} and files[7].name == "07.png"
    else:
        assert {path.parent.name for path in files} == set("0123456789")
        assert len(np.unique(images)) > 10
    status, error = outcome(infer.main, ["--export_samples", "9"], capsys)  # old ones would be among them
    assert status == 1 and "samples already" in error
    assert sorted(Path("results/run/samples").rglob("*.png")) == sorted(files)


def test_the_page_shows_what_is_in_the_folder_of_a_run(folder, workplace):
    fit(folder, "--target_beta_val=1.5", epochs=2)
    infer.main([])
    page = Path("results/run/index.html").read_text()

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.sources, self.open = [], []

        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            self.sources += [attributes["src"]] if "src" in attributes else []
            self.open += [tag] * (tag not in ("img", "meta"))

        def handle_endtag(self, tag):
            assert self.open.pop() == tag
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert set(reader.sources) == {path.name for path in Path("results/run").iterdir()
                                   if path.suffix in (".png", ".gif")} and "progress.gif" in reader.sources
    assert not re.search(r"https?:", page) and "--target_beta_val=1.5" in page
    assert "test images, the reconstruction below each" in page  # a caption
    loss = json.loads(Path("results/run/test.json").read_text())["test_loss"]
    assert f"{loss:.4f}" in page and "epoch 2 of 2" in page
    assert "psnr" not in page and "images.png" not in page
    infer.main(["--evaluate", "--limit", "30"]), infer.main(["--images", str(folder / "0")])
    page = Path("results/run/index.html").read_text()
    assert "psnr" in page and "images.png" in page
    assert "test_loss" in page
    measured = json.loads(Path("results/run/evaluation.json").read_text())
    Path("results/run/evaluation.json").write_text(json.dumps({**measured, "prior": "the prior N(0, I)"}))
    infer.main(["--only", "samples"])  # as if measured before the mixture was fitted
    assert "psnr" not in Path("results/run/index.html").read_text()
    infer.main(["--evaluate", "--limit", "30", "--ckpt", "checkpoints/run/last.pt"]), infer.main([])
    page = Path("results/run/index.html").read_text()
    assert "psnr" not in page and "test_loss" in page  # what was measured of another checkpoint
    state = runs.load_checkpoint("checkpoints/run/best.pt")
    runs.save_checkpoint(Path("checkpoints/run/best.pt"), {**state, "epoch": 1})
    infer.main([])  # as if the test were of a longer or a shorter run
    assert "test_loss" not in Path("results/run/index.html").read_text()


def test_what_was_asked_for_and_left_out_is_an_error(folder, workplace, capsys):
    fit(folder, epochs=1)
    infer.main(["--results_dir", "all"])
    assert "left out" not in capsys.readouterr().err  # pictures that do not apply
    status, error = outcome(infer.main, ["--only", "samples,classes"], capsys)
    assert status == 1 and "left out classes: the model is not conditional" in error
    assert Path("results/run/samples.png").exists()
    (workplace / "other").mkdir()
    for i in range(20):
        picture(workplace / "other" / f"{i}.png", seed=i)
    status, error = outcome(infer.main, ["--dataset", "other"], capsys)
    assert status == 1 and "--images" in error


def test_files_in_medmnists_layout_train_and_are_exported(workplace):
    generator = np.random.default_rng(0)
    np.savez_compressed("pathmnist.npz", **{f"{name}_{what}": array for name, n in (
        ("train", 64), ("val", 16), ("test", 24)) for what, array in (
            ("images", generator.integers(0, 256, (n, 64, 64, 3)).astype(np.uint8)),
            ("labels", (np.arange(n) % 9)[:, None]))})
    train.main(["--dataset", "pathmnist.npz", "--conditional", "--epochs", "1", "--batch_size", "16",
                "--num_filters", "2", "--log_dir", "run"])
    infer.main(["--evaluate"])
    infer.main(["--export"])
    assert np.load("results/run/latents.npz")["z"].shape == (24, 32)
    assert np.load("results/run/latents.npz")["name"].tolist() == list(map(str, range(24)))  # no file names
    assert json.loads(Path("results/run/evaluation.json").read_text())["images"] == 24


def test_own_images_are_read_as_those_of_the_training(workplace):
    """The range of floats, and the transform, are those of the training."""
    Path("floats").mkdir()
    scenes = np.random.default_rng(0).uniform(0, 1, (20, 8, 8)).astype(np.float32)
    for i, scene in enumerate(scenes):
        np.save(f"floats/{i}.npy", scene * (200 if i else 1))
    read = data.load("floats", "data")
    assert read.untyped == [0, 255]
    own, _ = data.own_images([Path("floats/0.npy")], read.about())
    assert pixels(own).max() <= 1  # not stretched to 255
    for i in range(20):
        picture(Path("colour") / f"{i}.png", mode="RGB", seed=i)
    read = data.load("colour", "data", transform="grayscale3")
    own = pixels(data.own_images([Path("colour/3.png")], read.about(), "grayscale3")[0])
    assert any(torch.equal(own[0], image) for part in (read.train, read.val, read.test)
               for image in pixels(part))
