"""A zip to hand in: the code, a checkpoint and its run's pictures: python submit.py"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cli import ArgumentParser, UserError, one_line, run_script
from runs import (
    COLUMNS,
    EPOCH_PICTURES,
    atomic_write,
    checkpoint_bytes,
    csv_bytes,
    describe_checkpoint,
    find_checkpoint,
    load_checkpoint,
)

CODE = ("*.py", "tests/*.py", "README.md", "requirements.txt", "pyproject.toml", "LICENSE")
RESULTS = ("*.png", "*.gif", "metrics.csv", "*.json", "index.html")
MAX_EPOCH_BYTES = 10_000_000


def parse_args(argv=None):
    parser = ArgumentParser(description="Pack the code, a checkpoint and its run's pictures into a zip from "
                                        "which infer.py runs.")
    parser.add_argument("--ckpt", type=Path, nargs="?", metavar="FILE",
                        help="a checkpoint, or the folder of a best.pt (default: the newest "
                             "checkpoints/**/best.pt)")
    parser.add_argument("--out", type=Path, default=Path("submission.zip"), metavar="FILE",
                        help="where the zip goes")
    parser.add_argument("--half", action="store_true",
                        help="store weights in 16 bits: half the size, and no visible difference in pictures")
    args = parser.parse_args(argv)
    args.newest = args.ckpt is None
    args.ckpt = find_checkpoint(parser, args.ckpt)
    if args.out.suffix != ".zip" or args.out.is_dir():
        parser.error(f"argument --out: {str(args.out)!r} is not allowed, only a file that ends in .zip")
    if not args.out.parent.is_dir():
        parser.error(f"argument --out: the folder {str(args.out.parent)!r} is not there")
    return args


def for_drawing(checkpoint, half):
    """A checkpoint without what only training needs, with the folders that it has in the zip."""
    args = {**checkpoint["args"], "results_dir": "results", "checkpoint_dir": "checkpoints"}
    model = checkpoint.get("ema") or checkpoint["model"]
    if half:
        model = {name: value.half() for name, value in model.items()}
    return {**checkpoint, "args": args, "model": model, "ema": None, "optimizer": None}


def is_of_epoch(path, epoch):
    """Whether a file of measured figures is of this epoch; a damaged one is of none."""
    try:
        return json.loads(path.read_text())["epoch"] == epoch
    except (ValueError, TypeError, KeyError):
        return False


def contents(ckpt, half=False):
    """→ the name of the checkpoint in the zip; name → bytes of every file"""
    here, checkpoint = Path(__file__).parent, load_checkpoint(ckpt)
    run = checkpoint["args"]["log_dir"]
    packed, results = f"checkpoints/{run}/best.pt", Path(checkpoint["args"]["results_dir"], run)
    files = {path.relative_to(here).as_posix(): path.read_bytes() for pattern in CODE
             for path in here.glob(pattern) if path.is_file() and not path.is_symlink()}
    for page in ("README.md", "results/README.md"):  # with what they show
        for link in re.findall(r"\]\(([^)#]+)", files.get(page, b"").decode()):
            path = Path(page).parent / link
            if (here / path).is_file():
                files[path.as_posix()] = (here / path).read_bytes()
    metrics = results / "metrics.csv"
    if metrics.is_file() and metrics.read_bytes().startswith(csv_bytes(COLUMNS, checkpoint["history"])):
        paths = {path for pattern in RESULTS for path in results.glob(pattern)}
        for path in [path for path in paths if path.name in ("test.json", "evaluation.json")]:
            if not is_of_epoch(path, checkpoint["epoch"]):
                print(f"left out: {path}, which is not of epoch {checkpoint['epoch']} as {ckpt} is",
                      file=sys.stderr)
                paths.remove(path)
        epochs = {path for pattern in EPOCH_PICTURES for path in results.glob(pattern)}
        if sum(path.stat().st_size for path in epochs) > MAX_EPOCH_BYTES:
            print(f"left out: the {len(epochs)} pictures of single epochs, more than "
                  f"{MAX_EPOCH_BYTES // 1_000_000} MB together", file=sys.stderr)
            paths -= epochs
        for path in paths:
            files[f"results/{run}/{path.name}"] = path.read_bytes()
        samples = results / "samples.png"
        if not samples.is_file() or samples.stat().st_mtime < Path(ckpt).stat().st_mtime:
            holds = "a samples.png that is older than the checkpoint" if samples.is_file() else \
                "no samples.png yet"
            print(f"{results} holds {holds}; to make the pictures: python infer.py --ckpt "
                  + shlex.quote(Path(ckpt).as_posix()), file=sys.stderr)
    else:
        print(f"{results} is not there, or of another run than {ckpt}: packed without pictures",
              file=sys.stderr)
    return packed, {**files, packed: bytes(checkpoint_bytes(for_drawing(checkpoint, half)))}


def prove(archive, ckpt):
    """Unpack the zip elsewhere and draw from its checkpoint. Raises UserError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as unpacked:
            unpacked.extractall(folder)
        drawn = subprocess.run([sys.executable, "infer.py", "--ckpt", ckpt, "--results_dir", "drawn"],
                               cwd=folder, capture_output=True, text=True)
        if drawn.returncode or not any(Path(folder, "drawn").rglob("samples.png")):
            last = (drawn.stderr.strip() or "nothing was drawn").splitlines()[-1]
            raise UserError(f"infer.py does not run from the zip, so none was written: {one_line(last)}")


def main(argv=None):
    args = parse_args(argv)
    if args.newest:
        print(describe_checkpoint(args.ckpt, load_checkpoint(args.ckpt)))
    ckpt, files = contents(args.ckpt, args.half)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "submission.zip")
        with zipfile.ZipFile(archive, "w") as packed:
            for name in sorted(files):
                info = zipfile.ZipInfo(name)  # without a time, so that it is the same to the byte each time
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                packed.writestr(info, files[name])
        prove(archive, ckpt)
        atomic_write(args.out, archive.read_bytes())
    for name in sorted(files):
        print(f"{len(files[name]):>12,}  {name}")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes; infer.py ran from it")


if __name__ == "__main__":
    run_script(main)
