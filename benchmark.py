"""How fast training is, and how far from the limits of this machine: python benchmark.py --help"""

import processors  # isort: skip (before torch)
import csv
import functools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

import arguments
import train
from cli import ArgumentParser, UserError, keep_freed_memory, number, run_script
from data import load_with, quantize
from datasets import NAMED, import_torchvision
from execution import record
from model import build
from networks import NETWORKS
from randomness import draw_noise, noise_shape

processors.THREADS_CHOSEN = True  # measure with all threads
HERE = Path(__file__).resolve().parent
COLUMNS = {"model": "model", "batch_size": "batch", "images_per_second": "images/s",
           "floor_images_per_second": "floor, images/s", "floor_ratio": "of the floor",
           "flop_share": "of the matrix rate", "peak_rss_mb": "peak MB", "startup_seconds": "start-up s",
           "speedup": "times the plain way"}


def parse_args(argv=None):
    """→ the benchmark's arguments, and those for train.py."""
    parser = ArgumentParser(
        description="Measure training: images per second of train.py's own epoch; of its forward, backward "
                    "and optimiser step alone on one batch (the floor); the share of this machine's rate of "
                    "matrix products; peak memory; seconds from the command to the first step. Medians over "
                    "passes, the floor's steps between the epoch's. Arguments of train.py can be given too, "
                    "by default --dataset mnist --levels 2 --latent_size 20 --hidden_dims 400, the MLP of "
                    "pytorch/examples.")
    parser.add_argument("--model", nargs="+", choices=list(NETWORKS), default=["mlp", "cnn"],
                        help="which networks (default: mlp cnn)")
    parser.add_argument("--batch_size", nargs="+", type=number(int, 1), default=[128, 512], metavar="N",
                        help="images in a step (default: 128 512)")
    parser.add_argument("--images", type=number(int, 1), default=12_800, metavar="N",
                        help="images in a pass")
    parser.add_argument("--repeats", type=number(int, 1), default=15, metavar="N",
                        help="passes of each kind, and up to 3 starts")
    parser.add_argument("--baseline", action="store_true",
                        help="also the plain way: torchvision's dataset, ToTensor, DataLoader, fp32; and "
                             "three epochs of it against train.py, from the command to its exit")
    parser.add_argument("--busy", action="store_true",
                        help="instead, with train.py's own batch size: how many times longer an epoch takes "
                             "beside another process; the worst of --repeats tries")
    parser.add_argument("--speedrun", action="store_true",
                        help="instead, train models of MNIST that reach published likelihoods, and print "
                             "their time and NLL; takes hours on 2 cores")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args, rest = parser.parse_known_args(argv)
    if args.speedrun:
        for name, value in vars(args).items():
            if name != "speedrun" and value != parser.get_default(name):
                parser.error(f"argument --{name}: does not go with --speedrun")
        for word in rest:
            if word.split("=")[0] in ("--seed", "--seeds", "--log_dir", "--resume"):
                parser.error(f"argument {word}: not with --speedrun, which names its own runs and seeds")
        return args, rest
    if not args.busy and any(word.split("=")[0] == "--limit" for word in rest):
        parser.error("argument --limit: goes with --busy and --speedrun; elsewhere --images limits a pass")
    return args, ["--dataset", "mnist", "--levels", "2", "--latent_size", "20", "--no-progress_bar", *rest]


def of_model(model, rest):
    """The arguments of train.py for a model; where it has hidden layers, those of pytorch/examples."""
    return ["--model", model, *["--hidden_dims", "400"] * (model != "cnn"), *rest]


def measure(argv, images, repeats, baseline):
    """A row of the table, in a process of its own, so that its peak memory is that of this row."""
    keep_freed_memory()  # as train.py does, and so the next line
    processors.watch()
    args, _ = arguments.parse_args(argv)
    args.epochs = 1 + repeats  # --warp is for a share of them
    device = torch.device(args.device)
    data = load_with(vars(args), limit=max(1, images // args.batch_size) * args.batch_size)
    n, batch_size = len(data.train), min(args.batch_size, len(data.train))
    state = train.begin_or_resume(args, data, None)
    batch, labels = data.train.batch(torch.arange(batch_size), args.seed, "binarize")
    noise = draw_noise(batch_size, args)
    with FlopCounterMode(display=False) as flops:
        # The terms get no names, so that their autograd graph is gone before a GPU records a step.
        sum(state.model(batch, labels, noise)[:2]).backward()
    step = floor_step(state, args, batch, labels, noise)
    epoch(state, data, args, step)
    row = {"model": args.model, "batch_size": args.batch_size, "peak_rss_mb": peak_rss(),
           "startup_seconds": None}
    passes = []
    with fresh_process() as other:
        if baseline:
            other.submit(plain_seconds, argv, n).result()
        for _ in range(repeats):
            plain = []
            if baseline:
                plain = [other.submit(plain_seconds, argv, n).result()]
                time.sleep(1)  # until processors.watch sees an idle machine again
            passes.append((*epoch(state, data, args, step), *plain))
    ours, floor, *others = zip(*passes)
    row |= {"images_per_second": n / median(ours), "floor_images_per_second": n / median(floor),
            "floor_ratio": median(b / a for a, b in zip(ours, floor)),
            "flop_share": flops.get_total_flops() / batch_size * n / median(ours)
            / matrix_rate(args.precision, device)}
    if baseline:
        row["speedup"] = median(b / a for a, b in zip(ours, *others))
    return row


def floor_step(state, args, batch, labels, noise):
    """→ a function that takes a step of the floor: forward, backward and optimiser on one batch"""
    precision = torch.autocast(batch.device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def step(batch, labels, noise):
        with precision:
            rec, kl, _ = state.network(batch, labels, noise)
        state.optimizer.zero_grad()
        (rec + args.target_beta_val * kl).backward()
        with precision:
            state.optimizer.step()
        return [rec.detach(), kl.detach()]
    step = record(step, args, len(batch))
    return lambda: step(batch, labels, noise)


def epoch(state, data, args, step):
    """An epoch of train.py, with steps of the floor between its own, because the speed of a shared machine
    changes from second to second → seconds of a pass of each. A GPU must not wait, so there they come at the
    end.
    """
    device, steps, turns = torch.device(args.device), train.steps_per_epoch(data, args), []
    turn = max(1, steps // 5) if device.type == "cpu" else steps

    def after_step():
        if state.step % turn == 0:
            turns.append(seconds(lambda: [step() for _ in range(turn)], device))
    step()  # to end whatever came before this pass
    took = seconds(lambda: train.train_epoch(state, data, args, after_step), device)
    state.epoch += 1
    floor = sum(turns) / (len(turns) * turn) * steps
    return took - sum(turns), floor


def fresh_process():
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def matrix_rate(precision, device):
    """FLOP/s of a product of two square matrices, in the precision of training."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / median(seconds(lambda: a @ a, device) for _ in range(10))


def seconds(work, device):
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_rss():
    """The most memory that this process has had, in MB; None if the system does not tell."""
    try:  # resource.ru_maxrss would count what the parent had
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        return None


# ------------------------------------------------------------------------------------------------------------
# The plain way, as in the VAE of pytorch/examples: one image at a time, fp32, a number fetched in each step;
# in a process of its own, which does not keep freed memory

@functools.cache
def plain_parts(*argv, limit=None):
    """→ a model, its optimiser, batches of training and of test images, train.py's arguments; made once"""
    torchvision = import_torchvision()
    args, _ = arguments.parse_args(argv)
    if args.dataset not in NAMED or args.image_size or args.transform != "none" or args.conditional:
        raise UserError(f"--baseline: goes with a dataset of torchvision ({', '.join(NAMED)}) as it is, "
                        "without --conditional")
    images, tests = (getattr(torchvision.datasets, NAMED[args.dataset][0])(
        args.data_dir, is_train, transform=torchvision.transforms.ToTensor()) for is_train in (True, False))
    more = {"num_workers": 1, "pin_memory": True} if args.device != "cpu" else {}
    loader = DataLoader(Subset(images, range(limit or len(images))), args.batch_size, shuffle=True, **more)
    about = {"shape": images[0][0].shape, "levels": args.levels, "classes": images.classes}
    model = build(vars(args), about).to(args.device, memory_format=torch.contiguous_format)  # torch's default
    return (model, torch.optim.Adam(model.parameters(), args.lr), loader,
            DataLoader(tests, args.batch_size, **more), args)


def plain_seconds(argv, limit):
    """Seconds of a training epoch of the plain way."""
    model, optimizer, loader, _, args = plain_parts(*argv, limit=limit)
    return seconds(lambda: plain_epoch(model, loader, args, optimizer), torch.device(args.device))


def plain_epoch(model, loader, args, optimizer=None):
    """One pass, in training if there is an optimiser → the mean loss"""
    total = 0.0
    for images, labels in loader:
        images = quantize((images.to(args.device) * 255).byte(), args.levels)
        noise = torch.randn(noise_shape(len(images), args), device=args.device)
        rec, kl, _ = model(images, labels.to(args.device), noise)
        loss = rec + args.target_beta_val * kl
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total += loss.item() * len(images)
    return total / len(loader.dataset)


def plain_run(argv, epochs):
    """Train; after each epoch test and draw."""
    torchvision = import_torchvision()
    model, optimizer, loader, tests, args = plain_parts(*argv)
    for epoch in range(epochs):
        plain_epoch(model, loader, args, optimizer)
        with torch.no_grad():
            print(plain_epoch(model, tests, args), flush=True)
            torchvision.utils.save_image(model.sample(64)[1], Path(args.results_dir).parent / f"{epoch}.png")


# ------------------------------------------------------------------------------------------------------------
# Whole commands

def startup(argv):
    """Seconds from the command to the first checkpoint, which is written after the first step."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = subprocess.Popen([sys.executable, HERE / "train.py", *argv, "--save_every", "0",
                                    *places(folder)], stdout=subprocess.DEVNULL)
        try:
            while not list(Path(folder, "checkpoints").rglob("last.pt")):
                if command.poll() is not None:
                    raise UserError("train.py ended before its first checkpoint")
                time.sleep(0.005)
            return time.perf_counter() - start
        finally:
            command.kill()
            command.wait()


def whole(argv, epochs=3):
    """Seconds of train.py and of the plain way, from the command to its exit."""
    took = []
    for command in ([HERE / "train.py", *argv, "--epochs", str(epochs)],
                    ["-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); import benchmark; "
                           f"benchmark.plain_run(sys.argv[1:], {epochs})", *argv]):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command, *places(folder)], stdout=subprocess.DEVNULL, check=True)
            took.append(time.perf_counter() - start)
    return took


def busy(argv, repeats):
    """How many times longer than alone the slowest epoch takes: of a run and another one that starts in the
    middle of an epoch of it; of two that start together; beside a process that only computes. The worst of
    several tries; and the seconds of an epoch alone, their median.
    """
    def start(folder, epochs):
        return subprocess.Popen([sys.executable, HERE / "train.py", *argv, "--epochs", str(epochs),
                                 "--log_dir", "run", *places(folder)], stdout=subprocess.DEVNULL)

    def epochs(folder):
        path = Path(folder, "results/run/metrics.csv")
        rows = csv.DictReader(path.read_text().splitlines() if path.exists() else [])
        return [float(row["seconds"]) for row in rows]
    alone, worst = [], {"later": 0.0, "together": 0.0, "computing": 0.0}
    for _ in range(repeats):
        took = {}
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            runs = [start(first, 3)]
            while not epochs(first) and runs[0].poll() is None:
                time.sleep(0.05)
            time.sleep(sum(epochs(first)) / 2)
            runs.append(start(second, 2))
            if any([run.wait() for run in runs]):
                raise UserError("train.py failed")
            alone.append(epochs(first)[0])
            took["later"] = epochs(first)[1:] + epochs(second)
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            for run in [start(folder, 2) for folder in (first, second)]:
                run.wait()
            took["together"] = epochs(first) + epochs(second)
        with tempfile.TemporaryDirectory() as first:
            computing = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            start(first, 2).wait()
            computing.kill()
            computing.wait()
            took["computing"] = epochs(first)
        for name, values in took.items():
            worst[name] = max(worst[name], max(values) / alone[-1])
    return {"alone": median(alone), **worst}


# NLL of MNIST with pixels drawn anew each time, in nats: a paper's figure, and a command that aims at it
SPEEDRUN_COMMON = ("--dataset mnist --levels 2 --binarize stochastic --prior flow --optimizer muon "
                   "--lr_schedule cosine --batch_size 256 --grad_clip 200")
LARGE = "--model resnet --num_filters 16 --hidden_dims 128 --latent_size 40 --lr 5e-3"
SPEEDRUN = [  # NLL, whose, seeds, arguments beside the common ones
    (86.76, "VAE, Burda et al. 2016", 3, "--model cnn --lr 1e-2 --epochs 4"),
    (84.78, "IWAE of 50 samples, Burda et al. 2016", 3, "--model cnn --latent_size 40 --lr 1e-2 --epochs 8"),
    (82.09, "Exemplar VAE, Norouzi et al. 2020", 3, f"{LARGE} --epochs 11"),
    (80.52, "ConvHVAE, two layers, Norouzi et al. 2020", 1, f"{LARGE} --warp 0.65 --epochs 46"),
    (80.52, "the same, without bent images", 1, f"{LARGE} --weight_decay 0.1 --epochs 36"),
    (79.58, "Exemplar ConvHVAE, two layers, Norouzi et al. 2020", 1,
     f"{LARGE} --num_filters 32 --hidden_dims 256 --warp 0.8 --epochs 75"),
    (78.49, "one layer, a RealNVP prior, Xu et al. 2019", 1,
     f"{LARGE} --num_filters 32 --hidden_dims 256 --warp 0.87 --weight_decay 0.02 --epochs 355"),
]


def speedrun(rest):
    """Train the models of SPEEDRUN and measure them, with 500 latents per image; print a row for each: means
    over seeds, and the median of their times.

    rest: further arguments of train.py. With --limit N among them, each model is trained and measured on N
    images, with one seed.
    Raises UserError if there are runs of a speedrun already, unless --overwrite is among them.
    """
    def run(script, *argv):
        try:
            subprocess.run([sys.executable, HERE / script, *argv], stdout=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError:  # the script has printed the reason
            raise UserError(f"{script} did not finish, and so the speedrun ends")
    trained, _ = arguments.parse_args([*SPEEDRUN_COMMON.split(), *rest])
    limit = ["--limit", str(trained.limit)] if trained.limit else []
    for root in (trained.checkpoint_dir, trained.results_dir):
        if Path(root, "speedrun").exists() and not trained.overwrite:
            raise UserError(f"{Path(root, 'speedrun')} holds the runs of an earlier speedrun; --overwrite "
                            "replaces them, another --checkpoint_dir and --results_dir keep them")
    for row, (target, paper, seeds, options) in enumerate(SPEEDRUN, 1):
        argv = [*SPEEDRUN_COMMON.split(), *options.split(), *rest]
        print("python train.py", *argv, flush=True)
        took, measured = [], []
        seeds = 1 if limit else seeds
        for seed in range(1, seeds + 1):
            name = f"speedrun/{row}/seed_{seed}"
            start = time.perf_counter()
            run("train.py", *argv, "--seed", str(seed), "--log_dir", name)
            took.append(time.perf_counter() - start)
            run("infer.py", "--evaluate", *limit, "--ckpt", f"{trained.checkpoint_dir}/{name}/best.pt")
            measured.append(json.loads(Path(trained.results_dir, name, "evaluation.json").read_text()))
        nll, bound = ([figures[key] for figures in measured] for key in ("iw_nll", "neg_elbo"))
        print(f"{target} {paper}: NLL {spread(nll)} (standard error over images "
              f"{measured[0]['iw_nll_se']:.2f}), -ELBO {spread(bound)}, {median(took):.0f} s, seeds: {seeds}",
              flush=True)


def spread(values):
    """The mean as text, and with several values their standard deviation"""
    more = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{more}"


def places(folder):
    return ["--results_dir", f"{folder}/results", "--checkpoint_dir", f"{folder}/checkpoints"]


def show(rows):
    """Print the rows as a table."""
    names = [name for name in COLUMNS if name in rows[0]]
    table = [[COLUMNS[name] for name in names]]
    for row in rows:
        digits = {"floor_ratio": 3, "flop_share": 3, "startup_seconds": 2, "speedup": 2}
        table.append(["-" if row[name] is None else row[name] if isinstance(row[name], str) else
                      f"{row[name]:,.{digits.get(name, 0)}f}" for name in names])
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def main(argv=None):
    args, rest = parse_args(argv)
    if args.speedrun:
        return speedrun(rest)
    if args.busy:
        for model in args.model:
            row = busy(of_model(model, rest), args.repeats)
            print(f"{model}: an epoch alone {row['alone']:.1f} s; beside a run that starts later "
                  f"{row['later']:.2f} times as long, together {row['together']:.2f}, beside a process that "
                  f"computes {row['computing']:.2f}", flush=True)
        return
    rows = []
    for model in args.model:
        for batch_size in args.batch_size:
            options = [*of_model(model, rest), "--batch_size", str(batch_size)]
            settings, _ = arguments.parse_args(options)
            with fresh_process() as fresh:
                row = fresh.submit(measure, options, args.images, args.repeats, args.baseline)
            try:
                rows.append(row.result())
            except FloatingPointError:
                raise UserError(f"{model}: the loss is not finite (lr {settings.lr:g}); try a smaller --lr, "
                                f"or {train.clip_advice(settings)}")
            rows[-1]["startup_seconds"] = median(startup(options) for _ in range(min(args.repeats, 3)))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{settings.dataset}, {settings.device}, {settings.precision}, {torch.get_num_threads()} "
              f"threads, torch {torch.__version__}")
        show(rows)
    if args.baseline:
        took = [whole(of_model("mlp", rest)) for _ in range(3)]
        ours, plain = map(median, zip(*took))
        print(f"three epochs of the MLP by train.py: {ours:.1f} s; the plain way: {plain:.1f} s; "
              f"{median(b / a for a, b in took):.2f} times as fast",
              file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    run_script(main)
