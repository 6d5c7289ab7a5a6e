"""Tables and plots of a results file."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .methods import WITH_STRIDE
from .prompts import TASKS
from .records import MASS, read_results

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)


def family(method):
    """A method without its knob: rrattn:0.95:8 to rrattn, stride 8."""
    name, *settings = method.split(":")
    if settings and settings[0].endswith(".json"):
        return f"{name}, {settings[0].rsplit('/', 1)[-1]}"
    stride = int(settings[1]) if len(settings) > 1 else 8
    return f"{name}, stride {stride}" if name.split("+")[0] in WITH_STRIDE else name


def merged(rows):
    """{(length, method): {task: {"score", "density", "nats", "seconds"}}}, means over the contexts, by questions."""
    groups = defaultdict(list)
    for row in rows:
        if row["task"] in TASKS:
            groups[row["length"], row["method"], row["task"]].append(row)
    table = defaultdict(dict)
    for (length, method, task), group in sorted(groups.items()):
        weights = [len(row.get("right", "1")) for row in group]
        table[length, method][task] = {
            name: float(np.average([row[name] for row in group], weights=weights))
            for name in ("score", "density", "nats", "seconds")
            if all(name in row for row in group)
        }
    return table


def of_dense(by_task, dense):
    """{task: quality as a share of dense}: of the score, and for text of the inverse loss; tasks that dense fails at,
    and those that one of both lacks, are left out."""
    shares = {}
    for task in by_task.keys() & dense.keys():
        if task == "text":
            shares[task] = dense[task]["nats"] / by_task[task]["nats"]
        elif dense[task]["score"] > 0:
            shares[task] = by_task[task]["score"] / dense[task]["score"]
    return shares


def mean_density(by_task):
    """Over tasks, those that share a context counted once each."""
    return float(np.mean([entry["density"] for entry in by_task.values()]))


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quality_tables(rows):
    """A Markdown table a length: score of each task, the mean share of dense, and the density."""
    table, parts = merged(rows), []
    for length in sorted({length for length, _ in table}):
        methods = {method: by_task for (at, method), by_task in table.items() if at == length}
        dense = methods.get("dense", {})
        tasks = [task for task in TASKS if any(task in by_task for by_task in methods.values())]
        body = []
        order = {name: (name != "dense", family(name), mean_density(by_task)) for name, by_task in methods.items()}
        for method in sorted(methods, key=order.get):
            by_task = methods[method]
            cells = []
            for task in tasks:
                if task not in by_task:
                    cells.append("")
                else:
                    cells.append(f"{by_task[task]['nats']:.4f}" if task == "text" else f"{by_task[task]['score']:.1%}")
            shares = of_dense(by_task, dense)
            complete = shares and set(by_task) == set(tasks)
            mean = f"{np.mean(list(shares.values())):.1%}" if complete else ""
            body.append([method, *cells, mean, f"{mean_density(by_task):.1%}"])
        names = [f"{task}, nats" if task == "text" else task for task in tasks]
        parts.append(f"### {length:,} tokens\n\n" + markdown(["method", *names, "mean of dense", "density"], body))
    return parts


def mass_curves(rows):
    """{(kind, length): {family: (densities, kept)}}, sorted by density, means over contexts."""
    groups = defaultdict(list)
    for row in rows:
        if row["task"].startswith(MASS):
            groups[row["task"].split()[1], row["length"], row["method"]].append((row["density"], row["kept"]))
    curves = defaultdict(lambda: defaultdict(list))
    for (kind, length, method), points in groups.items():
        curves[kind, length][family(method)].append(np.mean(points, axis=0))
    return {
        key: {name: np.asarray(sorted(map(tuple, points))).T for name, points in by_family.items()}
        for key, by_family in curves.items()
    }


def kept_at(curve, density):
    """Kept mass at a density by linear interpolation between the measured points; NaN outside of them."""
    return float(np.interp(density, *curve, left=np.nan, right=np.nan))


def mass_tables(rows):
    """A Markdown table for each text and length: the mass that each method keeps at equal densities."""
    parts = []
    for (kind, length), curves in sorted(mass_curves(rows).items()):
        body = []
        for name in sorted(curves):
            kept = [kept_at(curves[name], density) for density in DENSITIES]
            body.append([name, *("" if np.isnan(share) else f"{share:.1%}" for share in kept)])
        header = ["kept mass at a density of", *(f"{density:.0%}" for density in DENSITIES)]
        parts.append(f"### {kind}, {length:,} tokens\n\n" + markdown(header, body))
    return parts


def write_report(path, plots=None):
    """The tables as Markdown; with `plots`, draws them into that folder.

    Raises
    ------
    SystemExit
        When there is no such file or it holds results of several models.
    """
    if not path.is_file():
        raise SystemExit(f"there is no results file {path}")
    rows = read_results(path)
    models = {row["model"] for row in rows}
    if len(models) != 1:
        raise SystemExit(f"{path} holds results of {len(models)} models, but a report is about one")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        draw_quality(rows, plots / "quality.png")
        draw_mass(rows, plots / "mass.png")
        draw_needles(rows, plots / "needles.png")
    return "\n\n".join(quality_tables(rows) + mass_tables(rows) + benchmark_tables(rows))


def benchmark_tables(rows):
    """A Markdown table of each benchmark's mean scores."""
    groups = defaultdict(list)
    for row in rows:
        if row["task"] not in TASKS and not row["task"].startswith(MASS):
            groups[row["task"], row["method"]].append(row)
    parts = []
    for benchmark in sorted({task for task, _ in groups}):
        body = []
        for (task, method), group in sorted(groups.items()):
            if task == benchmark:
                means = [f"{np.mean([row[name] for row in group]):.1%}" for name in ("score", "density")]
                body.append([method, *means, str(len(group))])
        parts.append(f"### {benchmark}\n\n" + markdown(["method", "score", "density", "samples"], body))
    return parts


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def styles(names):
    """{name: how its line is drawn}: no two alike, rrattn's own with thicker lines."""
    colors = pyplot().get_cmap("tab10").colors
    return {
        name: {
            "color": colors[i % len(colors)],
            "marker": "osD^v"[i // len(colors) % 5],
            "markersize": 5,
            "linewidth": 2.2 if name.startswith("rrattn") else 1,
            "label": name,
        }
        for i, name in enumerate(sorted(names))
    }


def add_legend(figure, axes, columns):
    """One legend below all panels, of every line that any of them has."""
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = sorted(handles)
    rows = -(-len(labels) // columns)
    height = 0.25 * rows / figure.get_figheight() + 0.01
    figure.legend([handles[label] for label in labels], labels, loc="lower center", ncol=columns, fontsize=8)
    figure.tight_layout(rect=(0, height, 1, 1))


def draw_quality(rows, path):
    """Quality as a share of dense against density, a panel for the mean and each task, at the greatest length."""
    table = merged(rows)
    if not any(method == "dense" for _, method in table):
        return
    length = max(length for length, method in table if method == "dense")
    dense = table[length, "dense"]
    points = defaultdict(list)  # (panel, family) -> (density, share)
    for (at, method), by_task in table.items():
        if at != length or method == "dense" or set(by_task) != set(dense):
            continue
        shares = of_dense(by_task, dense)
        points["mean of all tasks", family(method)].append((mean_density(by_task), np.mean(list(shares.values()))))
        for task, share in shares.items():
            points[task, family(method)].append((by_task[task]["density"], share))
    panels = [panel for panel in ("mean of all tasks", *TASKS) if any(panel == name for name, _ in points)]
    if not panels:
        return
    plt = pyplot()
    style = styles({name for _, name in points})
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(4 * -(-len(panels) // 2), 7), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for panel, axis in zip(panels, axes.flat):
        for (at, name), line in sorted(points.items()):
            if at == panel:
                axis.plot(*np.asarray(sorted(line)).T, **style[name])
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set(title=panel, xlabel="density", ylabel="share of dense")
    figure.suptitle(f"Quality against density, {length:,} tokens")
    add_legend(figure, axes, 4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_mass(rows, path):
    """Kept mass against density, a panel for each text and length."""
    curves = mass_curves(rows)
    if not curves:
        return
    plt = pyplot()
    style = styles({name for by_family in curves.values() for name in by_family})
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 5), squeeze=False, sharey=True)
    for ((kind, length), by_family), axis in zip(sorted(curves.items()), axes.flat):
        for name, curve in sorted(by_family.items()):
            axis.plot(*curve, **style[name])
        axis.set(title=f"{kind}, {length:,} tokens", xlabel="density", xlim=(0, 0.7), ylim=(0.7, 1.0))
    axes.flat[0].set_ylabel("true attention mass kept")
    add_legend(figure, axes, 4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_needles(rows, path, num_depths=10):
    """A heat map a method: share of the needles found, by depth and length."""
    found = defaultdict(list)  # (method, length, depth bin)
    for row in rows:
        if row["task"] == "needle":
            for correct, depth in row["right"]:
                found[row["method"], row["length"], min(int(depth * num_depths), num_depths - 1)].append(correct)
    methods = sorted({method for method, _, _ in found}, key=lambda method: (method != "dense", method))
    if not methods:
        return
    lengths = sorted({length for _, length, _ in found})
    plt = pyplot()
    columns = min(6, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.1 * columns, 2.5 * lines), squeeze=False)
    for axis in axes.flat[len(methods) :]:
        axis.axis("off")
    for method, axis in zip(methods, axes.flat):
        shares = [[np.mean(found.get((method, length, i), [np.nan])) for length in lengths] for i in range(num_depths)]
        axis.imshow(np.ma.masked_invalid(shares), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths], fontsize=7)
        axis.set_yticks([0, num_depths - 1], ["start", "end"], fontsize=7)
        axis.set_title(method, fontsize=8)
    figure.suptitle("Needles found, by depth and length: green all, red none")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
