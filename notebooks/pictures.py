"""Pictures that only the notebooks show: panels, matrices, the graph of a body, sampling points, timings.

A finished one is a PIL image, which a notebook shows as it is. matplotlib is imported where it is needed.
"""

import inspect
import io
from itertools import product
from textwrap import dedent

import numpy as np
from PIL import Image

from sst.domains import IGNORE
from sst.plots import colourise, draw_matrix, is_dark


def rendered(figure):
    """A matplotlib Figure -> a PIL image, which a notebook shows as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


class Moving:
    """Pictures that a notebook plays one after another, for ever: an animated PNG.

    frames: PIL images of one size. milliseconds: that each is shown; the last one longer.
    """

    def __init__(self, frames, milliseconds=150):
        self.frames, self.milliseconds = list(frames), milliseconds

    def __repr__(self):
        return f"{len(self.frames)} pictures, {self.milliseconds} ms each"

    def _repr_png_(self):
        durations = [self.milliseconds] * (len(self.frames) - 1) + [2000]
        file = io.BytesIO()
        self.frames[0].save(file, "PNG", save_all=True, append_images=self.frames[1:], duration=durations,
                            loop=0)
        return file.getvalue()


class Listing:
    """The source of functions and classes of the library, which a notebook shows with its colours."""

    def __init__(self, *things):
        self.source = "\n".join(dedent(inspect.getsource(thing)) for thing in things).rstrip()

    def __repr__(self):
        return self.source

    def _repr_markdown_(self):
        return f"```python\n{self.source}\n```"


def touch(draw, columns=None, **choices):
    """A picture with a control for each choice, where a notebook server shows ipywidgets.

    draw: makes a PIL image from one value of every choice. choices: {name: its values}. Without a server, and
    in a stored notebook: the pictures of all values, `columns` a row (all in one).
    """
    if has_widgets():
        from ipywidgets import interact
        interact(draw, **choices)  # shows itself
        return None
    pictures = [draw(**dict(zip(choices, values))) for values in product(*choices.values())]
    columns = columns or len(pictures)
    width, height = (max(getattr(picture, side) for picture in pictures) for side in ("width", "height"))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (width * (k % columns), height * (k // columns)))
    return sheet


def has_widgets():
    """Whether this runs in a notebook server with ipywidgets."""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


def diagram(boxes, arrows, size):
    """Boxes with text and arrows between them.

    boxes: {name: (x, y, width, height, text, kept)} in inches from the lower left; what is not kept after
    training is dashed. arrows: [(from, to, text)]. size: (width, height) in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    figure = Figure(figsize=size, dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, size[0]), ylim=(0, size[1]))
    axis.axis("off")
    for x, y, width, height, words, kept in boxes.values():
        axis.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", edgecolor="#2f4b66",
            facecolor="#dfe9f3" if kept else "white", linestyle="-" if kept else (0, (4, 3)), linewidth=1.3))
        axis.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=8)
    for start, end, words in arrows:
        (x0, y0, w0, h0, *_), (x1, y1, w1, h1, *_) = boxes[start], boxes[end]
        if x0 + w0 <= x1 or x1 + w1 <= x0:  # side by side
            right = x0 + w0 <= x1
            a, b = (x0 + w0 * right, y0 + h0 / 2), (x1 + w1 * (not right), y1 + h1 / 2)
        else:
            up = y1 > y0
            a, b = (x0 + w0 / 2, y0 + h0 * up), (x1 + w1 / 2, y1 + h1 * (not up))
        axis.annotate("", b, a, arrowprops={"arrowstyle": "-|>", "color": "#2f4b66", "linewidth": 1.2})
        axis.text((a[0] + b[0]) / 2 + 0.05, (a[1] + b[1]) / 2 + 0.07, words, fontsize=7, color="#6f7d8a")
    return rendered(figure)


def plane(points, names, colours, title, reach):
    """Vectors in two coordinates, (n, 2), each from the origin, with their names; axes to `reach`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.6, 3.6), dpi=80, layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), title=title, xticks=[], yticks=[])
    for (x, y), name, colour in zip(points, names, colours):
        axis.plot([0, x], [0, y], color=colour, linewidth=2)
        axis.annotate(name, (x, y), fontsize=7)
    return rendered(figure)


def panel(pictures, titles, domains=None, columns=None, width=2.0):
    """Pictures side by side with a title each, as a PIL image.

    pictures: (H, W, 3) uint8, or (H, W) class ids where the same place of `domains` holds their LabelDomain:
    those are coloured, and the names of their classes stand below.
    columns: pictures a row. width: of one picture, in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    domains = domains or [None] * len(pictures)
    columns = min(columns or len(pictures), len(pictures))
    rows = -(-len(pictures) // columns)
    present = [np.setdiff1d(np.unique(picture), (0, IGNORE)) if domain else ()
               for picture, domain in zip(pictures, domains)]
    tall = width * max(picture.shape[0] / picture.shape[1] for picture in pictures)
    names = 0.14 * max((len(ids) + 1) // 2 for ids in present)  # inches below a picture
    row = 0.28 + tall + (names and names + 0.15)
    size = (width + 0.08) * columns, row * rows + 0.05
    figure = Figure(figsize=size, dpi=100)
    for k, (picture, title, domain, ids) in enumerate(zip(pictures, titles, domains, present)):
        left, top = (width + 0.08) * (k % columns) + 0.04, size[1] - row * (k // columns) - 0.28
        axis = figure.add_axes((left / size[0], (top - tall) / size[1], width / size[0], tall / size[1]))
        axis.imshow(colourise(picture, domain) if domain else picture, interpolation="nearest")
        axis.axis("off")
        axis.set_title(title, fontsize=9, pad=3)
        if domain:
            patches = [Patch(facecolor=domain.palette()[i] / 255, edgecolor="0.5", linewidth=0.4,
                             label=domain.classes[i]) for i in ids]
            axis.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7,
                        frameon=False, handlelength=1, labelspacing=0.3, columnspacing=0.8, borderaxespad=0.3)
    return rendered(figure)


def shade(values, low=None, high=None, cmap="viridis"):
    """(H, W) numbers -> (H, W, 3) uint8 colours between `low` and `high` (smallest and largest number)."""
    from matplotlib import colormaps
    values = np.asarray(values, np.float64)
    low, high = values.min() if low is None else low, values.max() if high is None else high
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return (255 * colormaps[cmap](share)[..., :3]).round().astype(np.uint8)


def matrices(values, titles, rows, columns, width=None, **how):
    """Heat maps side by side, as a PIL image.

    values: matrices (R, C). rows, columns: the names of their R rows and C columns. width: of all, in inches.
    how: as sst.plots.draw_matrix takes it.
    """
    from matplotlib.figure import Figure
    n = len(values)
    width = width or n * (0.3 * len(columns) + 0.5) + 0.07 * max(map(len, rows))
    height = 0.22 * len(rows) + 0.07 * max(map(len, columns)) + 0.4
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    for k, (axis, matrix, title) in enumerate(zip(figure.subplots(1, n, squeeze=False)[0], values, titles)):
        draw_matrix(axis, np.asarray(matrix), rows if k == 0 else [""] * len(rows), columns, **how)
        axis.set_title(title, fontsize=9)
    return rendered(figure)


def place_of(region):
    """x, y of a region (H, W) of booleans: its mean where that lies in the region.

    Else it is the pixel next to the mean of the larger half, left or right: the place of arms is on an arm.
    """
    y, x = np.nonzero(region)
    mean = np.array([x.mean(), y.mean()])
    if not region[tuple(mean.round().astype(int)[::-1])]:
        half = x > mean[0]
        half = half if half.mean() >= 0.5 else ~half
        x, y = x[half], y[half]
        nearest = np.hypot(x - x.mean(), y - y.mean()).argmin()
        mean = np.array([x[nearest], y[nearest]])
    return mean


def class_places(label, others, Z):
    """(Z, 2): where each class is on the body, as x, y in pixels of a label map (H, W); NaN: in no map.

    The place of a class that `label` lacks is its mean place in the label maps `others`. In each of them,
    places are measured between the top and bottom, the left and right end of the foreground.
    """
    def foreground(label):
        return (label > 0) & (label != IGNORE)

    def places(label):
        y, x = np.nonzero(foreground(label))
        corner, size = np.array([x.min(), y.min()]), np.array([np.ptp(x) + 1, np.ptp(y) + 1])
        present = [z for z in range(Z) if (label == z).any()]
        result = np.full((Z, 2), np.nan)
        result[present] = [(place_of(label == z) - corner) / size for z in present]
        return result, corner, size

    own, corner, size = places(label)
    found = np.stack([places(other)[0] for other in others if foreground(other).any()] + [own])
    seen = ~np.isnan(found[..., 0])
    mean = np.nansum(found, axis=0) / np.where(seen.any(0), seen.sum(0), np.nan)[:, None]
    return np.where(np.isnan(own), mean, own) * size + corner


def body_graph(samples, width=4.0):
    """M_intra drawn on the body, one picture per domain side by side, as a PIL image.

    Every class but the background has its name at its place, and a line goes between two that touch. What has
    to do with a class that the picture lacks is grey. A class without a place in any label map is left out.

    samples: [(domain, image (H, W, 3), label map (H, W), label maps of others), ...]; those of others show
    where the classes are that the label map lacks.
    """
    from matplotlib.figure import Figure
    tall = max(image.shape[0] / image.shape[1] for _, image, _, _ in samples)
    figure = Figure(figsize=(width * len(samples), 0.98 * width * tall + 0.32), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(samples), squeeze=False)[0]
    for axis, (domain, image, label, others) in zip(axes, samples):
        h, w = label.shape
        axis.imshow(0.35 * image.mean(-1) + 0.65 * 255, cmap="gray", vmin=0, vmax=255, extent=(0, w, h, 0))
        axis.axis("off")
        axis.set_title(domain.name, fontsize=10)
        mask, palette = domain.intra_mask().numpy(), domain.palette() / 255
        there = np.isin(np.arange(domain.num_classes), label)
        place = class_places(label, others, domain.num_classes)
        known = [z for z in range(1, domain.num_classes) if not np.isnan(place[z]).any()]
        place[known] = apart(place[known], gap=(0.22 * w, 0.07 * h), size=(w, h))
        for a, b in [(a, b) for a in known for b in known if a < b and mask[a, b]]:
            strong = there[a] and there[b]
            axis.plot(*zip(place[a], place[b]), color="0.1" if strong else "0.45",
                      linewidth=1.1 if strong else 0.6, linestyle="-" if strong else ":",
                      zorder=2 if strong else 1)
        for z in known:
            ink = "0.45" if not there[z] else "white" if is_dark(palette[z]) else "black"
            axis.text(*place[z], domain.classes[z], ha="center", va="center", fontsize=7, color=ink,
                      zorder=3 + there[z],
                      bbox=dict(boxstyle="round,pad=0.2", linewidth=0.6,
                                edgecolor="0.2" if there[z] else "0.6",
                                facecolor=palette[z] if there[z] else "0.95"))
    return rendered(figure)


def apart(points, gap, size):
    """Points (n, 2), moved a little, so that none is in the ellipse of radii `gap` (x, y) around another.

    They stay within `size` (w, h), even where they cannot be so far apart.
    """
    gap, size = np.asarray(gap, np.float64), np.asarray(size, np.float64)
    rank = np.argsort(np.argsort(points[:, 1], kind="stable"))
    side = np.where(rank % 2, 0.2, -0.2) + 0.01 * rank
    # A column of points gives way to both sides.
    start = points = points + np.stack([side * gap[0], 0 * side], -1)
    for _ in range(300):
        difference = (points[:, None] - points[None]) / gap  # (n, n, 2)
        distance = np.linalg.norm(difference, axis=-1, keepdims=True)
        push = np.maximum(1 - distance, 0) * difference / np.maximum(distance, 1e-9)
        points = points + 0.3 * gap * push.sum(1) + 0.02 * (start - points)
        points = np.clip(points, gap * (0.4, 0.3), size - gap * (0.4, 0.3))
    return points


def sampling_points(image, chosen, reference, locations, weights, key=True):
    """Where queries of deformable attention look: one picture of the photo for each, as a PIL image.

    image (H, W, 3) uint8; chosen {title: q}; reference (Q, 2), locations (Q, M, L, P, 2) and weights
    (Q, M, L, P) as `deform_attn` takes them. A level has a colour, a head a marker, a weight an area. The
    white cross is the query. What lies outside the photo reads zeros, and what lies far outside is not drawn.
    key: whether the legend is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    H, W = image.shape[:2]
    wide = 2.5 * min(1, W / H)
    widths = [wide] * len(chosen) + [1] * key
    figure = Figure(figsize=(sum(widths), 2.85), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    colours, markers, (_, M, L, _) = ("#ffb000", "#dc267f", "#648fff", "#009e73"), "o^sDvP*X", weights.shape
    for axis, (title, q) in zip(axes, chosen.items()):
        axis.imshow(image, extent=(0, W, H, 0), interpolation="nearest")
        for m in range(M):
            for l in range(L):
                x, y = (np.asarray(locations[q, m, l]) * (W, H)).T
                axis.scatter(x, y, s=6 + 400 * np.asarray(weights[q, m, l]), c=colours[l % 4],
                             marker=markers[m % 8], edgecolor="black", linewidth=0.5, alpha=0.85)
        axis.plot(*(np.asarray(reference[q]) * (W, H)), "+", color="white", markersize=11, markeredgewidth=2)
        axis.set(xlim=(-0.2 * W, 1.2 * W), ylim=(1.2 * H, -0.2 * H), xticks=[], yticks=[], facecolor="0.85")
        axis.set_title(title, fontsize=9)
    if key:
        dots = [Line2D([], [], linestyle="", marker="o", color=colours[l % 4], label=f"level {l + 1}")
                for l in range(L)]
        dots += [Line2D([], [], linestyle="", marker=markers[m % 8], color="0.4", label=f"head {m + 1}")
                 for m in range(M)]
        axes[-1].legend(handles=dots, loc="center left", fontsize=8, frameon=False)
        axes[-1].axis("off")
    return rendered(figure)


def heat_map(matrix, title, xlabel="", ylabel="", lines=(), path=None):
    """A matrix as a picture, dark where it is large; a PIL image.

    lines: rows and columns before which a line is drawn, such as the first of each level.
    path: (n, 2) places x, y drawn over it.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.2, 4.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(np.asarray(matrix), cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, ax=axis, shrink=0.8)
    for n in lines:
        axis.axhline(n - 0.5, color="0.5", linewidth=0.6)
        axis.axvline(n - 0.5, color="0.5", linewidth=0.6)
    if path is not None:
        axis.plot(*np.asarray(path).T, ".-", color="#dc267f", linewidth=1, markersize=4)
        axis.plot(*np.asarray(path)[-1], "o", color="#dc267f", markersize=8, markeredgecolor="black")
    axis.set_title(title, fontsize=10)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return rendered(figure)


def timings(x, times, xlabel):
    """Times over sizes, both logarithmic, as a PIL image.

    A line goes through the medians, a bar from the fastest turn to the slowest. x: the sizes.
    times: {name: (len(x), turns) seconds}.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.6, 3.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    for (name, turns), colour in zip(times.items(), ("#648fff", "#fe6100", "#555555", "#dc267f")):
        turns = 1000 * np.asarray(turns)
        middle = np.median(turns, axis=1)
        bars = [middle - turns.min(1), turns.max(1) - middle]
        axis.errorbar(x, middle, bars, fmt="o-", color=colour, label=name, capsize=3, markersize=4)
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="milliseconds")
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return rendered(figure)
