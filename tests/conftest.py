"""What all test files share."""

import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import struct
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image

import cli
import data
import datasets
import figures
import infer
import processors
import runs
import train

cli.set_threads(1)  # models are tiny here: several threads would mostly wait for each other
cli.default_device = lambda: "cpu"  # also where there is a GPU, on which random numbers are others
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

HERE = Path(__file__).resolve().parent.parent

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 9, 21), (3, 64, 48), (1, 8, 8)]

LN2 = math.log(2)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels_like(shape, levels, n=5, seed=0):
    return torch.randint(levels, (n, *shape), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def pixels(split):
    """All images of a split, as levels."""
    return split.batch(torch.arange(len(split)))[0]


def blob(height, width, seed):
    """A Gaussian bump in [0, 1]"""
    y, x, size = np.random.default_rng(seed).uniform((0.2, 0.2, 0.1), (0.8, 0.8, 0.3))
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size ** 2))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def everything(read):
    """All images of a dataset, in the order of their bytes"""
    images = torch.cat([pixels(split) for split in (read.train, read.val, read.test)]).numpy()
    return np.array(sorted(images, key=lambda image: image.tobytes()))


def in_order(images):
    return np.array(sorted(images, key=lambda image: image.tobytes()))[:, None]


def zeroed(network):
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    return network


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """400 glyphs as PNG files, a folder a digit; training on them takes a second."""
    root = tmp_path_factory.mktemp("images")
    images, labels, _, _ = datasets.make_glyphs(train=400, test=1)
    for i, (image, label) in enumerate(zip(images[:, 0], labels)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{i:03d}.png")
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run the scripts in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def curves():
    """For tests that look at curves.png or TensorBoard's events."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Drawing and writing these takes most of the time of a short run."""
    monkeypatch.setattr(processors, "THREADS_CHOSEN", True)  # what else runs here must not change a last bit
    monkeypatch.setattr(processors, "watch", lambda: None)  # one more thread each time a script is run
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(runs, "draw_curves", lambda history, path: path.touch())
        monkeypatch.setattr(runs.RunLog, "events", lambda log, row, pictures: None)


def fit(folder, *flags, epochs=2):
    """Train in this process; → metrics.csv as rows, test.json."""
    argv = [f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", f"--epochs={epochs}",
            "--batch_size=32", "--log_dir=run", "--model=mlp", "--overwrite", *flags]
    train.main(argv)
    results = Path(*[flag.split("=")[1] for flag in flags if "results_dir" in flag] or ["results"]) / "run"
    with open(results / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((results / "test.json").read_text())


def outcome(main, argv, capsys):
    """Exit status, stderr of a script's main in this process, as its __main__ runs it."""
    with pytest.raises(SystemExit) as stop:
        cli.run_script(lambda: main([str(word) for word in argv]))
    return stop.value.code, capsys.readouterr().err


def write_idx(root, n=(50, 20)):
    """MNIST's files, small, with images that tell their number."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in zip(("train", "t10k"), n):
        images = (np.arange(count * 784) + np.arange(count).repeat(784)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28,
                                                                      28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def picture(path, size=(10, 8), mode="L", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "P": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "I;16": ()}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values if mode != "P" else np.stack([values] * 3, -1))
        image = image.convert("P") if mode == "P" else image if mode in ("L", "RGB", "RGBA") else \
            Image.frombytes("CMYK", size, values.tobytes())
    image.save(path, **options)
    return values


@pytest.fixture
def drawn(monkeypatch):
    """name of a function of figures.py → the arguments of its last call."""
    calls = {}
    for name in ("labelled_grid", "latents", "units", "compare"):
        draw = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *args, name=name, draw=draw: calls.update({name: args})
                            or draw(*args))
    return calls


def encoded(folder, **options):
    """The model of the run, the dataset, and mean, log_std of its test images in their order."""
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    everything = data.load(str(folder), "data", **options)
    with torch.no_grad():
        return net, everything, net.encode(*everything.test.batch(torch.arange(len(everything.test))))


def same(a, b, leave_out=("elapsed", "seconds", "args")):
    """Whether two checkpoints are equal to the bit, but for times and arguments that change no number."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in leave_out)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_runs(a, b):
    """Two runs ended alike: a and b are (results, checkpoints) folders."""
    for name in ("best.pt", "last.pt"):
        first, second = (runs.load_checkpoint(run[1] / name) for run in (a, b))
        assert same(first, second) and len(list(runs.tensors(first))) > 10
        assert not same(first, {**first, "model": {key: value + 1 for key, value in first["model"].items()}})
    assert (a[0] / "test.json").read_bytes() == (b[0] / "test.json").read_bytes()
    first, second = ([line.split(",")[:-1] for line in (run[0] / "metrics.csv").read_text().splitlines()]
                     for run in (a, b))
    assert first == second and len(first) > 1
    assert {path.name for path in a[0].glob("*.png")} == {path.name for path in b[0].glob("*.png")}


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while it trains its step `step`, counted from its start."""
    seen, add_terms = [], train.add_terms

    def interrupted(sums, terms, n):
        seen.append(n)
        if len(seen) == step:
            signal.raise_signal(number)
        return add_terms(sums, terms, n)
    monkeypatch.setattr(train, "add_terms", interrupted)


@functools.cache
def processes():
    """Makes processes, by a server that imports torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        forkserver.ensure_running()
    return context


def begin(said, main, *argv, most=None):
    """A process that runs main, its output going into the file `said` and its errors into one
    beside it, for files of at most so many bytes.
    """
    process = processes().Process(target=run_quietly, args=(said, main, [str(word) for word in argv], most))
    process.start()
    return process


def run_quietly(said, main, argv, most):
    for number, name in ((1, said), (2, f"{said}.err")):
        with open(name, "w") as out:
            os.dup2(out.fileno(), number)
    sys.argv = [f"{main.__module__}.py", *argv]
    processors.THREADS_CHOSEN = True
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that this one begins
    if most:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    cli.run_script(lambda: main(argv))


def wait_for(words, said, process):
    while not (Path(said).exists() and words in Path(said).read_text()):
        assert process.is_alive(), Path(f"{said}.err").read_text()
        time.sleep(0.01)


def ended(process, said):
    """Waits for a process of `begin` → exit status, output, errors."""
    process.join()
    return process.exitcode, *(Path(f"{said}{end}").read_text() for end in ("", ".err"))


def damage(path, what):
    """Write a bad checkpoint from a good one."""
    state, content = runs.load_checkpoint(path), bytearray(path.read_bytes())
    weights = state["model"]
    name = next(key for key in weights if key.endswith("weight"))
    if what == "a text file":
        content = b"not a checkpoint"
    elif what in ("a cut file", "an empty file"):
        content = content[:len(content) // 2 if what == "a cut file" else 0]
    elif what == "a flipped bit":
        content[len(content) // 2] ^= 1
    else:
        if what == "a checkpoint of another program":
            state = {"state_dict": weights}
        elif what == "pickled code":
            state["args"] = os.getcwd
        elif what == "a newer format":
            state["format"] = f"{runs.FORMAT} {runs.VERSION + 1}"
        elif what == "a name that leads elsewhere":
            state["args"]["log_dir"] = "../../elsewhere"
        elif what == "no arguments":
            del state["args"]
        elif what == "a tensor that is missing":
            del weights[name], state["ema"][name]
        elif what == "a tensor of another shape":
            weights[name] = state["ema"][name] = weights[name][:, :-1]
        elif what == "a nan":
            weights[name].view(-1)[0] = math.nan
        torch.save(state, path)
        return
    path.write_bytes(content)


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A small run of two epochs, to be copied."""
    root = tmp_path_factory.mktemp("trained")
    train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=2", "--log_dir=run",
                f"--data_dir={root / 'data'}", f"--results_dir={root / 'results'}",
                f"--checkpoint_dir={root / 'checkpoints'}"])
    return root


WORKER = """
import dataclasses, functools, os, signal, sys
from argparse import Namespace
import torch
sys.path.insert(0, {here!r})
import cli, data, distributed, execution, model, networks, optim, train, training_state, utils

cli.default_device = lambda: "cpu"

def gradients(case, n):
    # of the one step, in float64, that a pass over n images is
    torch.manual_seed(0)
    args = Namespace(seed=3, batch_size=max(n, 2), latent_size=3, device="cpu", precision="fp32", grad_clip=0,
                     warp=1, progress_bar=False, compile=False, epochs=1,
                     loss_mode="ae" if case == "ae" else "vae",
                     lr_schedule="constant", lr=0, beta_mode="constant", target_beta_val=0.7,
                     iw_train=4 if case == "weighted" else 0, ema=0,
                     flip=case == "resnet")
    pixels = torch.randint(256, (n, 1, 9, 11), dtype=torch.uint8)
    split = data.Split(pixels, torch.arange(n), torch.arange(n) % 2, 2, stochastic=case == "stochastic")
    kind = dict(ae=model.AE, conditional=model.ConditionalVAE).get(case, model.VAE)
    net = kind(
        (1, 9, 11), 2, case if case in networks.NETWORKS else "cnn", 3, hidden_dims=[16], num_filters=2,
        **dict(num_classes=2) if case == "conditional" else {{}},
        **dict(prior="flow") if case == "flow" else {{}},
        **dict(iw_train=4) if case == "weighted" else {{}}).double()
    for coupling in net.prior.couplings if case == "flow" else ():  # a new flow has no effect
        torch.nn.init.normal_(coupling.net[-1].weight, std=0.1)
    everything = data.Data(split, split, split, (1, 9, 11), 2, ["a", "b"], 0)
    optimizer = optim.AdamW(net.parameters(), 0.0)
    state = training_state.State(net, None, optimizer, training_state.zero_sums("cpu"))
    state.network = execution.prepare_network(net, everything, args)
    state.take_step = functools.partial(train.take_step, state, args)
    means = train.train_epoch(state, everything, args, lambda: None)
    tested = train.test_epoch(net, split, args, "val", lambda: None)
    return [p.grad.clone() for p in net.parameters()], means, tested

def all_gradients(file):
    with distributed.process_group():
        cases = ("mlp", "cnn", "resnet", "ae", "conditional", "stochastic", "weighted", "flow")
        found = {{f"{{case}} {{n}}": gradients(case, n) for case in cases for n in (8, 7, 1)}}
    if distributed.RANK == 0:
        torch.save(found, file)

def main():
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "gradients":
        return all_gradients(*rest)
    add_terms, seen = train.add_terms, []
    def interrupted(sums, terms, n):
        seen.append(n)
        if what != "run" and distributed.RANK == 1 and len(seen) == 25:
            if what == "fail":
                raise cli.UserError("this one has failed")
            os.kill(os.getpid(), dict(stop=signal.SIGTERM, kill=signal.SIGKILL)[what])
        return add_terms(sums, terms, n)
    train.add_terms = interrupted
    if what == "differ" and distributed.RANK:
        load = train.load_with
        train.load_with = lambda *args, **options: dataclasses.replace(load(*args, **options), crc32=1)
    train.main(rest)

if __name__ == "__main__":
    cli.run_script(main)
"""


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """Runs WORKER in n processes of one thread → exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER.format(here=str(HERE)))
    processes()  # here, because several threads may call `run` at once
    runs = itertools.count()

    def run(n, *words):
        said = tmp_path / f"run_{next(runs)}.txt"
        return ended(begin(said, torch.distributed.run.main, "--standalone", f"--nproc_per_node={n}",
                           "worker.py", *words), said)
    return run
