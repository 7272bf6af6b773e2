"""Tests of figures.py."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import figures
import infer
import runs
from tests.conftest import fit, outcome


def test_curves_have_a_panel_for_each_metric_that_there_is(curves, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))

    def panels(*betas, **metrics):
        rows = [{"epoch": 1 + i, "beta": beta, **{f"{part}_{key}": value + i for key, value in metrics.items()
                                                  for part in ("train", "val")}}
                for i, beta in enumerate(betas)]
        runs.draw_curves(rows, None)
        axes = kept[-1].get_axes()
        places = [axis.get_window_extent() for axis in axes]
        assert not any(place.overlaps(other) for i, place in enumerate(places) for other in places[:i])
        assert all(kept[-1].bbox.contains(*corner) for place in places for corner in (place.p0, place.p1))
        return [(axis.get_title(), [list(line.get_ydata()) for line in axis.lines[:-1]])
                for axis in axes]
    assert panels(None, None, loss=3, rec=3) == [("loss", [[3, 4]] * 2), ("reconstruction", [[3, 4]] * 2)]
    assert [title for title, _ in panels(1.0, 1.0, loss=3, rec=2, kl=1, bpd=4)][2:] == ["KL", "bits/dim"]
    assert panels(0.0, 1.0, loss=3, rec=2, kl=1, bpd=4)[4] == ("beta", [[0, 1]])
    assert kept[-1].axes[0].get_title() == "loss at the target beta"
    panels(*[None] * 4, loss=-1, rec=3)
    assert "cut off" not in kept[-1].axes[0].get_title()
    names = "train_loss", "val_loss", "train_rec", "val_rec"
    rows = [{"epoch": i, "beta": None, **dict.fromkeys(names, loss)}
            for i, loss in enumerate((160, 100, 95, 90), 1)]
    runs.draw_curves(rows, None)
    assert "cut off" in kept[-1].axes[0].get_title() and kept[-1].axes[0].get_ylim()[1] == 103
    panels(None, loss=3, rec=500)
    rows[0] |= {"train_rec": 0.15, "val_rec": 2.0}  # far below the others: a log scale
    runs.draw_curves(rows, None)
    axis = kept[-1].axes[1]
    kept[-1].draw_without_rendering()
    ticks = {tick.get_text() for tick in axis.get_yticklabels(which="both")}
    assert axis.get_yscale() == "log" and {"0.2", "1", "10", "50"} <= ticks and all(map(float, ticks - {""}))
    kept[-2].draw_without_rendering()
    assert all(tick.get_text().isdecimal() for tick in kept[-2].axes[0].get_xticklabels())  # whole epochs


def test_figures_show_the_numbers_that_they_are_given(monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    kl, t = torch.tensor([2.0, 1.0, 0.5]), torch.linspace(-4, 4, 9)
    figures.units("", "", ["z2", "z1", "z3"], kl, torch.tensor([True, True, False]), t,
                  {"z2": t ** 2, "z1": t + 4})
    bars, *panels = kept[0].get_axes()
    assert [bar.get_height() for bar in bars.containers[1]] == kl.tolist()
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["z2", "z1", "z3"]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars.containers[0]] == [3]  # inactive
    assert [panel.collections[0].get_paths()[0].vertices[:, 1].max() for panel in panels] == [16, 8]
    labels, names = torch.tensor([2, 0, 2, 1]), ["a", "b", "c"]
    figures.latents("", "", torch.arange(8.0).view(4, 2), labels, names, ["x", "y"])
    axis = kept[1].axes[0]
    key = {text.get_text(): line.get_color()
           for text, line in zip(axis.get_legend().get_texts(), axis.get_legend().get_lines())}
    assert len(set(key.values())) == 3 and axis.collections[0].get_offsets().tolist()[1] == [2, 3]
    for label, shown in zip(labels, axis.collections[0].get_facecolors()):
        assert tuple(shown[:3]) == key[names[label]][:3]


def test_progress_is_a_film_of_the_samples(folder, workplace, capsys):
    fit(folder, epochs=3)
    infer.main(["--only", "progress"])
    with Image.open("results/run/progress.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for epoch in (1, 2, 3):
            film.seek(epoch - 1)
            with Image.open(f"results/run/samples_{epoch:03d}.png") as still:
                difference = np.asarray(film.convert("RGB"), float) - np.asarray(still.convert("RGB"), float)
            assert np.abs(difference).mean() < 4 and film.info["duration"] == (2000 if epoch == 3 else 300)
    figures.progress("few.gif", sorted(Path("results/run").glob("samples_00*.png")), most=2)
    with Image.open("few.gif") as film:
        assert film.n_frames == 2
    with Image.open("results/run/samples_003.png") as still:  # as if its caption had one more line
        Image.new("RGB", (still.width, still.height + 20), "red").save("results/run/samples_003.png")
    figures.progress("few.gif", sorted(Path("results/run").glob("samples_00*.png")))
    with Image.open("few.gif") as film:
        film.seek(2)
        assert film.height == still.height + 20
        assert film.convert("RGB").getpixel((5, film.height - 2)) == (255, 0, 0)
    for path in Path("results/run").glob("samples_00[23].png"):
        path.unlink()
    status, error = outcome(infer.main, ["--only", "progress"], capsys)
    assert status == 1 and "left out progress" in error


def test_the_explorer_has_a_slider_for_many_classes():
    import matplotlib
    matplotlib.use("Agg")
    seen, names = [], [f"class number {i}" for i in range(30)]
    window = figures.Explorer("title", lambda z, label: seen.append(label) or torch.zeros(1, 8, 8),
                              lambda label: torch.ones(2), (torch.zeros(2), 4), [1, 0], torch.zeros(5, 2),
                              torch.zeros(5, dtype=torch.long), names, torch.zeros(2), torch.eye(2), names)
    assert seen[-1] == 4
    window.chooser.set_val(17)
    assert seen[-1] == window.label == 17 and "17" in window.class_axis.get_title()
    window.buttons["reset"]._observers.process("clicked", None)
    assert seen[-1] == window.chooser.val == 4
