"""Tests of cli.py."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cli
import infer
import runs
import train
from tests.conftest import HERE, damage, fit, outcome, picture


@pytest.mark.slow
def test_scripts_start_as_commands_and_help_names_every_default(workplace, folder):
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    def script(*words):
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                              env=environment)
    with ThreadPoolExecutor(2) as together:
        helped, wrong = together.map(lambda words: script(HERE / "train.py", *words),
                                     (["--help"], ["--lr", "-1"]))
    assert helped.returncode == 0 and all(g in helped.stdout
                                          for g in ("data:", "model:", "objective:", "optimisation:"))
    # of all options but flags, which are off unless they are given
    options = [line for line in helped.stdout.splitlines() if re.match(r"  --\w+(,| \S)", line)]
    assert len(options) > 25 and helped.stdout.count("(default") == len(options)
    made = script(HERE / "train.py", "--dataset", folder, "--epochs", "1", "--model", "mlp", "--limit", "64")
    # and no bar where no terminal is
    assert made.returncode == 0 and made.stderr == "" and "epoch 1/1" in made.stdout
    drawn = script(HERE / "infer.py", "--only", "samples")
    assert drawn.returncode == 0 and "samples.png" in drawn.stdout
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and "--lr" in wrong.stderr


@pytest.mark.slow
def test_training_does_not_wait_for_imports_that_nobody_needs(folder, workplace):
    argv = ["--dataset", str(folder), "--model", "mlp", "--epochs", "1", "--log_dir", "run"]
    script = f"import sys, train; train.main({argv}); print([name in sys.modules for name in " \
        "('train', 'torchvision', 'torch._dynamo', 'matplotlib.pyplot')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.stdout.endswith("[True, False, False, False]\n"), done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_scripts_keep_the_memory_that_a_step_frees():
    script = """
import cli, resource, torch
def work():
    for _ in range(5):
        blocks = [torch.zeros(2**20) for _ in range(20)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
cli.run_script(lambda: print(-work() + work()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
    assert int(done.stdout) < 5000, done.stderr  # of 100,000 pages


def test_a_list_of_names_is_cut_after_the_first_ones():
    assert cli.few("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert cli.few("abcdefghi") == "a, b, c, d, e, f, g, h, …"
    assert cli.few(iter("abc"), most=2) == "a, b, …" and cli.few([]) == ""


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=3", "--log_dir=run"]
    process = subprocess.Popen([sys.executable, HERE / "train.py", *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == ""
    assert runs.load_checkpoint(tmp_path / "checkpoints/run/last.pt")["epoch"] == 3


WRONG = [  # (script, its arguments, what the line says)
    *((train, *row) for row in [
        ("--latent_size 0", "--z_dim: '0'"), ("--lr -1", "--learning_rate: '-1'"),
        ("--learning_rate nan", "--learning_rate: 'nan'"),
        ("--lr 0", "--lr"),
        ("--epochs 0", "--epochs"), ("--epochs 1.5", "whole number"), ("--batch_size 0", "--batch_size"),
        ("--target_beta_val -1", "--target_beta_val: '-1'"), ("--target_beta_val inf", "finite"),
        ("--seed -1", "--seed"),
        ("--conditionnal", "did you mean --conditional?"),
        ("--beta 1.2", "did you mean --target_beta_val?"),
        ("--dataset mnits", "did you mean mnist?"),
        ("--lr-schedule cosine", "did you mean --lr_schedule?"), ("--xyz", "arguments: --xyz\n"),
        ("--grad_clip -1", "--grad_clip"), ("--levels 3", "--levels"), ("--hidden_dims 0", "--hidden_dims"),
        ("--hidden_dims 64 x", "--hidden_dims"), ("--free_bits -1", "--free_bits"), ("--limit 0", "--limit"),
        ("--beta_mode cosine", "'cyclical'"), ("--dataset nosuch", "glyphs, mnist, fashion_mnist, kmnist, "
                                                                   "cifar10"),
        ("--log_dir ../x", "../x"), ("--log_dir /x", "/x"), ("--log_dir a//b", "a//b"),
        ("--log_dir .", "'.'"),
        ("--num_filters 0", "--num_filters"), ("--weight_decay -1", "--weight_decay"),
        ("--save_every -1", "--save_every"),
        ("--image_size 4", "--image_size"), ("--image_size 8 8 8", "--image_size"),
        ("--seeds 1 1", "--seeds"), ("--seed 3 --seeds 1 2", "--seed: 3"),
        ("--device tpu", "cpu"), ("--binarize stochastic", "--levels 2"),
        ("--loss_mode ae --conditional", "--conditional"),
        ("--loss_mode ae --free_bits 1", "--free_bits"), ("--nosuch 1", "--nosuch"),
        ("--latent 3", "--latent"),
        ("--iw_train 5 --beta_mode linear", "--beta_mode"), ("--iw_train 5 --free_bits 1", "--free_bits"),
        ("--iw_train 5 --target_beta_val 2", "--target_beta_val"), ("--iw_train -1", "--iw_train"),
        ("--loss_mode ae --iw_train 5", "--iw_train"), ("--ema 1", "--ema: 1"),
        ("--loss_mode ae --prior flow", "--prior"), ("--prior flow --free_bits 1", "--free_bits"),
        ("--prior_layers 4", "--prior_layers"), ("--image_size 100000", "2048 is the most"),
        ("--warp 1.5", "--warp: 1.5"), ("--warp -1", "--warp"),
        ("--lr_schedule step", "cosine"), ("--recon_loss l1", "mse"), ("--model vit", "mlp"),
        ("--transform sepia", "grayscale3"),
        ("surplus", "surplus"),
        ("--batch_size 99999999999999999999", "--batch_size"), ("--seed 1" + 400 * "0", "--seed"),
        ("--device meta", "cpu"),
        ("--dataset .", "--results_dir"), ("--resume nosuch.pt", "nosuch.pt"),
        ("--resume .", "'last.pt' is not there")]),
    *((infer, *row) for row in [
        ("", "--ckpt"), ("--ckpt nosuch.pt", "nosuch.pt"), ("--ckpt .", "a folder"),
        ("--num_samples 0", "--num_samples"), ("--iw_samples 0", "--iw_samples"), ("--limit 5", "--evaluate"),
        ("--iw_samples 50", "with --evaluate"), ("--evaluate --only samples", "not with --evaluate"),
        ("--compare --num_samples 9", "not with --compare"), ("--dataset nosuch", "nor a folder"),
        ("--temperature -1", "--temperature"), ("--only nosuch", "samples, reconstructions"),
        ("--only sample", "did you mean samples?"),
        ("--images nosuch --temperature 0.5", "--images: not beside --temperature"),
        ("--seed x", "--seed")])]

BAD_FOLDERS = {  # what is in it → what the line says
    "nothing": "holds no images", "text files": "holds no images",
               "unreadable images": "none of its 1 image files",
    "too few images": "ten or more", "two sizes": "9x9 and 9x10", "no classes": "no classes",
               "tiny images": "too small",
    "val without train": "look like splits",
    "more loose than in folders": "are these classes", "an unreadable test": "in test/ can be read"}

BAD_CHECKPOINTS = {
    "a text file": "cut short", "a checkpoint of another program": "this project",
    "pickled code": "this project",
    "a flipped bit": "checksum", "a cut file": "cut short", "an empty file": "cut short",
    "a newer format": "newer version",
    "a tensor that is missing": "Missing key", "a tensor of another shape": "size mismatch",
    "a nan": "not finite",
    "no arguments": "this project",
    "a name that leads elsewhere": "this project"}

BAD_RESUMES = {"--lr 1": "--lr", "--seed 3": "--seed", "--epochs 1": "2 or more",
               "--log_dir other": "--log_dir",
               "--overwrite": "--overwrite", "--dataset nowhere": "--dataset"}


def fill(root, what):
    root.mkdir()
    if what == "text files":
        (root / "a.txt").write_text("a")
    elif what == "unreadable images":
        (root / "a.png").write_text("a")
    elif what == "val without train":
        picture(root / "val" / "1.png"), picture(root / "test" / "1.png")
    elif what == "an unreadable test":
        for i in range(20):
            picture(root / "train" / f"{i}.png", seed=i)
        (root / "test").mkdir()
        (root / "test" / "1.png").touch()
    else:
        if what == "more loose than in folders":
            picture(root / "a" / "1.png")
        for i in range({"nothing": 0, "too few images": 1}.get(what, 20)):
            picture(root / f"{i}.png", (5 if what == "tiny images" else 9, 10 if what == "two sizes" and i % 2
                                        else 9))


ROWS = [*(("line", *row, 2) for row in WRONG), *(("folder", train, *row, 1) for row in BAD_FOLDERS.items()),
        *(("checkpoint", infer, *row, 1) for row in BAD_CHECKPOINTS.items()),
        *(("checkpoint", train, *row, 1) for row in BAD_CHECKPOINTS.items()),
        *(("resume", train, *row, 2) for row in BAD_RESUMES.items()),
        ("other", train, "no network", "KMNIST/raw", 1),
        ("other", train, "results below a file", "cannot be written", 1),
        ("other", train, "a changed dataset", "does not hold the images", 1),
        ("other", train, "a name that is taken", "--overwrite", 2),
        ("other", infer, "an unknown class", "only 0, 1, 2", 1),
        ("other", infer, "classes without a class", "--classes", 1)]


@pytest.mark.parametrize("kind,script,what,said,expected", ROWS,
                         ids=[f"{r[0]}-{r[1].__name__}-{r[2]}" for r in ROWS])
def test_bad_input(kind, script, what, said, expected, folder, trained, workplace, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")
    monkeypatch.setattr("socket.socket.connect", refuse)  # also where there is a network
    argv, last = what.split(), workplace / "checkpoints/run/last.pt"
    if kind in ("checkpoint", "resume") or what in ("a changed dataset", "a name that is taken",
                                                    "classes without a class"):
        shutil.copytree(trained, workplace, dirs_exist_ok=True)
    if kind == "folder":
        fill(workplace / "images", what)
        argv = ["--dataset", workplace / "images", *["--conditional"] * (what == "no classes")]
    elif kind == "checkpoint":
        damage(last, what)
        argv = ["--resume" if script is train else "--ckpt", last]
    elif kind == "resume":
        argv = ["--resume", last, *argv]
    elif what == "no network":
        argv = ["--dataset", "kmnist"]
    elif what == "results below a file":
        (workplace / "file").write_text("")
        argv = ["--dataset", folder, "--results_dir", "file/results"]
    elif what == "a changed dataset":
        state = runs.load_checkpoint(last)
        state["data"]["images"][0] += 1
        torch.save(state, last)
        argv = ["--resume", last]
    elif what == "a name that is taken":
        argv = ["--dataset", folder, "--log_dir", "run"]
    elif what in ("an unknown class", "classes without a class"):
        if what == "an unknown class":
            fit(folder, "--conditional", epochs=1)
        argv = ["--classes", "11"]
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    capsys.readouterr()
    status, error = outcome(script.main, argv, capsys)
    assert status == expected and said in error and "Traceback" not in error
    assert error.count("\n") == 1 or what == "an unreadable test"  # which is named too
    after = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()
             and path.name != "lock"}
    assert {path for path in after if "cache" not in path.parts} <= set(before)
    assert all(after[path] == content for path, content in before.items() if path.name != "lock")
