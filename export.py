"""What leaves a model as files: numbers of each image, samples as PNG files, and the page of a run."""

import contextlib
import csv
import html
import io
import re

import numpy as np
import torch

from cli import UserError
from evaluate import each_image
from randomness import stream
from runs import atomic_write, describe_checkpoint


def export_latents(model, split, classes, args, path):
    """Write path.npz and path.csv: a row for each image, see evaluate.each_image.

    classes: names of the labels, possibly none
    """
    figures = each_image(model, split, args)
    labels, names = figures.pop("label"), split.names
    files = [name.decode(errors="replace") for name in names[split.rows.cpu().numpy()]] \
        if names is not None else range(len(split))  # without files, the number of the image in the split
    columns = {"name": np.array(files, str),
               "label": np.array([classes[label] if classes else "" for label in labels], str), **figures}
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    atomic_write(path.with_suffix(".npz"), buffer.getvalue())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    flat = {}  # z becomes z1, z2, …, behind the single numbers
    for name, values in sorted(columns.items(), key=lambda column: column[1].ndim):
        flat |= {f"{name}{d}": values[:, d - 1] for d in range(1, values.shape[1] + 1)} if values.ndim == 2 \
            else {name: values}
    writer.writerow(flat)
    for row in zip(*flat.values()):
        writer.writerow([f"{value:.6g}" if isinstance(value, np.floating) else value for value in row])
    atomic_write(path.with_suffix(".csv"), text.getvalue().encode())
    print(f"{path}.csv: {len(split):,} image{'s' * (len(split) != 1)}; {path}.npz: the same for NumPy")
    if len(split) > 3:
        oddest = figures["loss"].argsort()[:-4:-1]
        print(f"the highest losses are of {', '.join(columns['name'][oddest])}")


def export_samples(subject, n):
    """Write n samples as numbered PNG files into samples/, of a conditional model into a folder for each
    class: drawn pixels if the likelihood is one of discrete pixels, mean images otherwise.
    """
    from PIL import Image
    model, folder = subject.model, subject.folder / "samples"
    if any(folder.rglob("*.png")):
        raise UserError(f"{folder} holds samples already; delete it, or take another --results_dir")
    names = subject.class_file_names
    generator, labels = stream(subject.args.seed, "export"), subject.even_labels(n)
    for index in torch.arange(n).split(model.max_batch):
        asked = None if labels is None else labels[index]
        levels, mean = model.sample(len(index), asked, subject.args.temperature, generator, subject.fitted)
        shown = levels / subject.scale if model.likelihood.is_discrete else mean
        pixels = (shown * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for i, image in zip(index.tolist(), pixels):
            name = "" if labels is None else names[labels[i]]
            path = folder / name / f"{i:0{len(str(n - 1))}d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    print(f"{folder}: {n:,} samples from {subject.prior_name}, as PNG files")


# ------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; color: #222;
  overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; image-rendering: auto; }
figure { margin: 1.5rem 0; }
figcaption { color: #555; }
table { border-collapse: collapse; }
td { padding: 0.15rem 1rem 0.15rem 0; border-bottom: 1px solid #ddd; }
td:first-child { color: #555; }
pre { background: #f4f4f4; padding: 0.7rem; white-space: pre-wrap; }
"""

FIRST = ("samples", "classes", "manifold", "reconstructions", "curves")  # pictures at the top of the page


def write_page(subject):
    """Write index.html: the command, the figures, the pictures in the folder with their captions, the
    arguments → its path
    """
    folder, checkpoint = subject.folder, subject.checkpoint
    run = checkpoint["args"]["log_dir"]
    def place(picture):
        return next((i for i, name in enumerate(FIRST) if picture.name.startswith(name)), len(FIRST))
    pictures = sorted((picture for picture in folder.glob("*") if picture.suffix in (".png", ".gif")),
                      key=lambda picture: (place(picture), picture.name))
    epochs = [picture for picture in pictures if re.fullmatch(r"(samples|reconstructions)_\d+", picture.stem)]
    figures = {}
    for name in ("test.json", "evaluation.json"):
        figures |= {key: value for key, value in subject.measured(name).items()
                    if value is not None and key != "ckpt"}
    about = describe_checkpoint(subject.path, checkpoint)
    parts = [f"<h1>{html.escape(run)}</h1>", f"<p>{html.escape(about)}</p>",
             f"<pre>{html.escape(checkpoint['args']['command'])}</pre>"]
    if figures:
        parts += ["<h2>Figures</h2>", table({key: f"{value:.4f}" if isinstance(value, float) else value
                                             for key, value in figures.items()})]
    parts += ["<h2>Pictures</h2>", *(figure(picture, run) for picture in pictures if picture not in epochs)]
    if epochs:
        parts += ["<details><summary>After each epoch</summary>",
                  *(figure(picture, run) for picture in epochs), "</details>"]
    parts += ["<h2>Arguments</h2>", table({f"--{name}": value for name, value in
                                           sorted(checkpoint["args"].items()) if name != "command"})]
    page = ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"<title>{html.escape(run)}</title>\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n")
    atomic_write(folder / "index.html", page.encode())
    return folder / "index.html"


def renew_page(subject):
    """Write index.html again if there is one."""
    if (subject.folder / "index.html").is_file():
        print(write_page(subject))


def table(rows):
    cells = [(name, " ".join(map(str, value)) if isinstance(value, list) else value)
             for name, value in rows.items()]
    lines = [f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
             for name, value in cells]
    return "\n".join(["<table>", *lines, "</table>"])


def figure(picture, run):
    from PIL import Image
    caption = "the samples after each epoch of training, from the prior named below them" \
        if picture.stem == "progress" else picture.stem
    with contextlib.suppress(OSError), Image.open(picture) as image:
        caption = image.info.get("Description", caption).removeprefix(f"{run}: ")  # figures.py writes it
    return (f'<figure><a href="{html.escape(picture.name)}"><img src="{html.escape(picture.name)}" '
            f'alt="{html.escape(picture.stem)}" loading="lazy"></a>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")
