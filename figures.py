"""How figures are drawn: tensors in; PNG files, GIF files or a window out. What is drawn of a model is in
pictures.py.

Each function writes one file. Images are [N, C, H, W] in [0, 1]. matplotlib and Pillow are imported only when
something is drawn, because that takes most of a second.
"""

import math
import os
import textwrap
import warnings

import torch

from cli import UserError
from utils import image_grid

# Only for --explore: a backend that is not installed here, such as a notebook's, would fail any import of it.
BACKEND = os.environ.pop("MPLBACKEND", None)
warnings.filterwarnings("ignore", "Glyph .* missing from")  # characters that the font lacks


def new_figure(**options):
    """An empty matplotlib figure. Without pyplot, which takes longer to import and looks for a screen."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams["text.parse_math"] = False  # names of classes and runs may hold a $
    return Figure(**options)


# ------------------------------------------------------------------------------------------------------------
# Pictures with a caption, and the curves of a run

def save_picture(path, caption, image):
    """Write an image with a caption below it.

    image: [3, H, W] in [0, 1]; a small one is enlarged by a whole factor
    """
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    scale = math.ceil(640 / pixels.shape[1])
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    font = ImageFont.load_default(size=15)
    characters = max(16, int((pixels.shape[1] - 16) / font.getlength("n")))
    text = textwrap.fill(caption, characters)
    height = 12 + 20 * (text.count("\n") + 1)
    canvas = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + height), "white")
    canvas.paste(Image.fromarray(pixels), (0, 0))
    ImageDraw.Draw(canvas).multiline_text((8, pixels.shape[0] + 5), text, fill="black", font=font)
    info = PngInfo()
    info.add_text("Description", caption)  # for the page of the run
    canvas.save(path, pnginfo=info)


def save_grid(path, caption, images, nrow):
    """Write images [N, C, H, W] in [0, 1] as a grid with a caption, nrow images per row."""
    save_picture(path, caption, image_grid(images, nrow))


def draw_curves(history, path):
    """The metrics of a run over its epochs: loss, reconstruction, KL, bits/dim and beta, a panel for each
    that the run has.

    history: rows of metrics.csv
    """
    loss = "loss" if history[0]["beta"] is None else "loss at the target beta"
    panels = [("loss", loss), ("rec", "reconstruction"), ("kl", "KL"),
              ("bpd", "bits/dim")]
    panels = [(key, title) for key, title in panels if history[0].get("val_" + key) is not None]
    panels += [("beta", "beta")] * (len({row["beta"] for row in history}) > 1)
    rows = 1 if len(panels) < 4 else 2
    columns = math.ceil(len(panels) / rows)
    width, height = 3.8, 3.4  # inches of a panel
    figure = new_figure(figsize=(width * columns, height * rows))
    for i, (key, title) in enumerate(panels):  # at fixed places: matplotlib's own layout takes twice as long
        row, column = divmod(i, columns)
        axis = figure.add_axes([(column + 0.95 / width) / columns, (rows - 1 - row + 0.5 / height) / rows,
                                (1 - 1.05 / width) / columns, (1 - 0.8 / height) / rows])
        draw_metric(axis, history, key, title)
    figure.savefig(path, dpi=100, metadata={"Description": "the metrics of the run after each epoch"})


def draw_metric(axis, history, key, title):
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    epochs = [row["epoch"] for row in history]
    best = min(history, key=lambda row: row["val_loss"])["epoch"]
    curves = {"": "beta"} if key == "beta" else {"train_": "train", "val_": "validation"}
    for prefix, label in curves.items():
        axis.plot(epochs, [row[prefix + key] for row in history], label=label,
                  marker="." if len(epochs) < 30 else "")
    axis.axvline(best, color="grey", linestyle=":", label=f"best epoch ({best})")
    axis.set(title=title, xlabel="epoch")
    axis.ticklabel_format(useOffset=False)
    values = [row[prefix + key] for row in history for prefix in curves]
    if key != "beta" and 0 < 10 * min(values) < max(values):
        # with annealing, the KL of the first epoch would hide the rest
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")  # matplotlib's own for a log scale writes TeX, which is off
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif len(history) > 3:  # a first epoch far above the others would press these into a line
        later = [row[prefix + key] for row in history[1:] for prefix in curves]
        low, high = min(later), max(later)
        if max(values) > 2 * high - low > high:
            axis.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
            axis.set_title(f"{title} (first epoch cut off)", fontsize="medium")
    if key in ("loss", "rec", "kl"):  # without bits/dim, it may be a squared error
        axis.set_ylabel("nats per image" if key == "kl" or "val_bpd" in history[0] else "per image")
    if key == "beta":
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if key == "loss":  # it is the same in all panels, and might hide a curve
        axis.legend()


# ------------------------------------------------------------------------------------------------------------
# Figures of pictures.py; `title` stands above each

def array(image):
    """[C, H, W] in [0, 1] → what imshow takes, [H, W, 3]"""
    return image.float().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def colours(n):
    """n colours, as different as n allows."""
    from matplotlib import colormaps
    return [colormaps["tab10" if n <= 10 else "tab20"](i) for i in range(n)] if n <= 20 else \
        [colormaps["turbo"](i / (n - 1)) for i in range(n)]


def short(text, most=24):
    return text if len(text) <= most else text[:most // 2] + "…" + text[-(most // 2):]


def labelled_grid(path, title, images, columns, row_labels=None, column_labels=None):
    """A grid of images, `columns` a row, with labels on its left and above it."""
    height, width = images.shape[-2:]
    grid = array(image_grid(images, columns))
    scale, dpi = max(math.ceil(56 / max(height, width)), math.ceil(18 / height), math.ceil(44 / width)), 100
    inches = scale * grid.shape[1] / dpi, scale * grid.shape[0] / dpi
    figure = new_figure(figsize=inches, dpi=dpi)
    axis = figure.add_axes([0, 0, 1, 1])
    axis.imshow(grid, interpolation="nearest", aspect="auto",
                extent=(0, grid.shape[1], grid.shape[0], 0))
    axis.tick_params(length=0, labelsize=9, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_xticks([1 + width / 2 + i * (width + 1) for i in range(columns)] if column_labels else [],
                    column_labels or [])
    axis.set_yticks([1 + height / 2 + i * (height + 1) for i in range(-(-len(images) // columns))]
                    if row_labels else [], list(map(short, row_labels or [])))
    axis.set_title(textwrap.fill(title, max(24, int(inches[0] * 14))), fontsize=10, loc="left", pad=8)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1, metadata={"Description": title})


def latents(path, title, points, labels, names, axes):
    """A scatter of latents by class.

    points: [N, 2]; labels: [N]; names: of the classes, possibly none; axes: the labels of x and y
    """
    figure = new_figure(figsize=(7.5, 6), layout="constrained")
    scatter(figure.subplots(), points, labels, names)
    figure.axes[0].set(xlabel=axes[0], ylabel=axes[1])
    figure.axes[0].set_title(textwrap.fill(title, 80), fontsize=10, loc="left")
    figure.savefig(path, dpi=100, metadata={"Description": title})


def scatter(axis, points, labels, names):
    shades = colours(len(names)) if names else ["tab:blue"]
    shown = sorted(set(labels.tolist())) if names else []
    axis.scatter(*points.T.tolist(), s=5, alpha=0.6, linewidths=0,
                 color=[shades[i] for i in labels.tolist()] if names else shades[0])
    if 1 < len(names) <= 20:
        marks = [axis.plot([], [], ".", markersize=12, color=shades[i])[0] for i in shown]
        axis.legend(marks, [short(names[i], 12) for i in shown], loc="center left", bbox_to_anchor=(1, 0.5),
                    frameon=False)
    axis.set_box_aspect(1)


def units(path, title, names, kl, active, t, densities):
    """The KL of each latent dimension, and the aggregate posterior of some dimensions beside N(0, 1).

    names, kl, active: [D], in the order of the figure; t: [T]; densities: name of a dimension → density at t,
        [T]
    """
    figure = new_figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(textwrap.fill(title, 120), fontsize=10, x=0.01, ha="left")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axis, ranks = left.subplots(), torch.arange(1, len(kl) + 1)
    top = 1.05 * kl.max().clamp_min(1e-3).item()
    if not active.all():
        axis.bar(ranks[~active].tolist(), top, width=1, color="0.9",
                 label=f"inactive ({int((~active).sum())})")
    axis.bar(ranks.tolist(), kl.tolist(), width=0.8 if len(kl) <= 200 else 1, color="tab:blue",
             label=f"active ({int(active.sum())})")
    axis.set(xlabel="latent dimension, in order of its KL", ylabel="KL, nats", xlim=(0.4, len(kl) + 0.6),
             ylim=(0, top))
    if len(names) <= 40:
        axis.set_xticks(ranks.tolist(), names, rotation=90, fontsize=8)
    else:
        axis.locator_params(axis="x", integer=True)
    axis.legend(loc="upper right")
    panels = right.subplots(-(-len(densities) // 3), min(3, len(densities)), sharex=True, sharey=True,
                            squeeze=False)
    for axis, (name, density) in zip(panels.flat, densities.items()):
        axis.fill_between(t.tolist(), density.tolist(), color="tab:blue", alpha=0.5, linewidth=0,
                          label="aggregate posterior")
        axis.plot(t.tolist(), (torch.exp(-t ** 2 / 2) / math.sqrt(2 * math.pi)).tolist(), "k--", linewidth=1,
                  label="N(0, 1)")
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
    for axis in panels.flat[len(densities):]:
        axis.set_visible(False)
    right.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                 frameon=False)
    figure.savefig(path, dpi=100, metadata={"Description": title})


def progress(path, frames, most=60):
    """An animated GIF of picture files, whose last picture stays longer. Of more than `most` files it takes
    evenly spaced ones. Raises UserError if one cannot be read.
    """
    from PIL import Image
    chosen = sorted({round(i * (len(frames) - 1) / (most - 1)) for i in range(most)})
    images = []
    for i in chosen:
        try:
            with Image.open(frames[i]) as image:
                images.append(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"{frames[i]} cannot be read ({error}); delete it to use the others")
    # a longer number of the epoch may need one more line for the caption
    size = [max(sizes) for sizes in zip(*(image.size for image in images))]
    for i, image in enumerate(images):
        canvas = Image.new("RGB", size, "white")
        canvas.paste(image)
        images[i] = canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    images[0].save(path, save_all=True, append_images=images[1:], loop=0,
                   duration=[300] * (len(images) - 1) + [2000])


def compare(path, title, columns):
    """Models side by side.

    columns: for each model (the lines of its caption, samples, reconstructions, table): captions of the same
        number of lines; two grids [3, H, W] in [0, 1], or None; name → text, with the same names
    """
    cell, gap, line, margin = 3.2, 0.15, 0.19, 1.45  # inches
    heights = [max((cell * grid.shape[1] / grid.shape[2] for grid in grids if grid is not None), default=0)
               for grids in list(zip(*columns))[1:3]]
    width = margin + len(columns) * (cell + gap)
    above = textwrap.wrap(title, int(13 * width))
    lines = len(above), len(columns[0][0]), len(columns[0][3])
    height = sum(heights) + 4.5 * gap + line * sum(lines)
    figure = new_figure(figsize=(width, height))

    def write(x, y, text, **style):
        figure.text(x / width, 1 - y / height, text, fontsize=9, va="top", **style)
    write(gap, gap / 2, "\n".join(above))
    for i, (caption, *grids, values) in enumerate(columns):
        left, top = margin + i * (cell + gap), line * len(above) + gap
        for text in caption:
            write(left + cell / 2, top, short(text, 44), ha="center")
            top += line
        for grid, tall in zip(grids, heights):
            top += gap
            if grid is not None:
                axis = figure.add_axes([left / width, 1 - (top + tall) / height, cell / width, tall / height])
                axis.imshow(array(grid), interpolation="nearest")
                axis.set_axis_off()
            top += tall
        top += gap / 2
        for name, text in values.items():
            if i == 0:
                write(left - gap, top, name, ha="right", color="0.3")
            write(left + cell / 2, top, text, ha="center")
            top += line
    figure.savefig(path, dpi=100, metadata={"Description": title})


# ------------------------------------------------------------------------------------------------------------
# The explorer

class Explorer:
    """A window with one decoded image, sliders for its latent, a map of latents, and a choice of the class.

    decode: z [1, D], class (None without `classes`) → an image [C, H, W] in [0, 1]
    draw: class → a random z [D]; start: the first z [D] and class
    sliders: dimensions, most active first; a slider goes from -3 to 3
    points, labels, names: of the map, see `scatter`; origin [D], directions [2, D]: the plane of the map
    """

    def __init__(self, title, decode, draw, start, sliders, points, labels, names, origin, directions,
                 classes):
        from matplotlib import pyplot, rcParams, widgets
        rcParams["text.parse_math"] = False
        self.figure = pyplot.figure(title, figsize=(12, 6.4))
        self.decode, self.draw, self.start, self.classes = decode, draw, start, classes
        self.origin, self.directions, self.dimensions = origin, directions, sliders
        self.z, self.label = start[0].clone(), start[1]
        self.figure.text(0.02, 0.955, title, fontsize=11)

        self.picture_axis = self.figure.add_axes([0.02, 0.2, 0.3, 0.7])
        self.picture_axis.set_axis_off()
        self.picture = self.picture_axis.imshow(self.image(), interpolation="nearest")
        self.buttons = {}
        for i, (name, act) in enumerate((("random", self.random), ("reset", self.reset))):
            axis = self.figure.add_axes([0.07 + 0.11 * i, 0.1, 0.09, 0.06])
            self.buttons[name] = widgets.Button(axis, name)
            self.buttons[name].on_clicked(act)

        self.map = self.figure.add_axes([0.36, 0.2, 0.34, 0.7])
        scatter(self.map, points, labels, names)
        self.map.set_title("click to decode a point", fontsize=9)
        self.mark, = self.map.plot([], [], "k+", markersize=14, markeredgewidth=2)
        self.figure.canvas.mpl_connect("button_press_event", self.click)

        room = 0.43 if classes else 0.8
        self.sliders = []
        for i, dimension in enumerate(sliders):
            axis = self.figure.add_axes([0.85, 0.9 - room * (i + 1) / max(6, len(sliders)), 0.1, 0.03])
            self.sliders.append(widgets.Slider(axis, f"z{dimension + 1}", -3, 3, valfmt="%.1f",
                                               valinit=float(self.z[dimension])))
            self.sliders[-1].on_changed(lambda value, dimension=dimension: self.slide(dimension, value))
            self.sliders[-1].drawon = False  # `show` draws, once for all
        self.chooser = None
        if classes:
            self.class_axis = self.figure.add_axes([0.85, 0.03, 0.13, 0.4 if len(classes) <= 12 else 0.03])
            if len(classes) <= 12:
                self.chooser = widgets.RadioButtons(self.class_axis, [short(name, 14) for name in classes])
                self.chooser.on_clicked(lambda name: self.choose(self.chooser.index_selected))
            else:
                self.chooser = widgets.Slider(self.class_axis, "", 0, len(classes) - 1, valstep=1)
                self.chooser.valtext.set_visible(False)
                self.chooser.on_changed(self.choose)
        self.reset()

    def image(self):
        return array(self.decode(self.z[None], self.label))

    def show(self):
        """Draw the current latent and class in all parts of the window."""
        self.picture.set_data(self.image())
        self.mark.set_data(*((self.directions @ (self.z - self.origin))[:, None].tolist()))
        for slider, dimension in zip(self.sliders, self.dimensions):
            slider.eventson = False
            slider.set_val(float(self.z[dimension]))
            slider.eventson = True
        if self.chooser:
            self.class_axis.set_title(f"class {short(self.classes[self.label])}", fontsize=9)
        self.figure.canvas.draw_idle()

    def slide(self, dimension, value):
        self.z[dimension] = value
        self.show()

    def choose(self, label):
        self.label = int(label)
        self.show()

    def random(self, event=None):
        self.z = self.draw(self.label)
        self.show()

    def reset(self, event=None):
        self.z = self.start[0].clone()
        if self.chooser:
            (self.chooser.set_active if len(self.classes) <= 12 else self.chooser.set_val)(self.start[1])
        self.show()

    def click(self, event):
        busy = getattr(self.figure.canvas.toolbar, "mode", "")  # zooming or panning
        if event.inaxes is self.map and not busy:
            self.z = self.origin + self.z.new_tensor([event.xdata, event.ydata]) @ self.directions
            self.show()


def want_window():
    """Raises UserError if no window can be opened."""
    from matplotlib import pyplot, rcParams
    from matplotlib.backends import BackendFilter, backend_registry
    rcParams["webagg.address"] = "127.0.0.1"  # so that no other machine sees the page
    try:
        if BACKEND:
            pyplot.switch_backend(BACKEND)
        name = pyplot.get_backend().lower()
        if name not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
            raise ImportError(f"no window can be opened here by {name}")
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"--explore: {' '.join(str(error).split())}; on a desktop a toolkit such as tkinter "
                        "(python3-tk) opens a window; for a browser on this machine, pip install tornado, "
                        "then MPLBACKEND=WebAgg python infer.py --explore")


def show():
    """Show the window until the user closes it."""
    from matplotlib import pyplot
    pyplot.show()
