"""Tables and plots of a results file."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .methods import WITH_STRIDE, settings_by_name
from .prompts import TASKS
from .records import MASS, read_results

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
MEAN = "mean of all tasks"


def family(method):
    """A method without its knob: rrattn:0.95:8 to rrattn, stride 8; rrattn:threshold=0.9,stride=4 to rrattn, stride=4.

    rrattn with its defaults but for the threshold, as in rrattn:threshold=0.9, is rrattn.
    """
    name, *settings = method.split(":")
    if settings and "=" in settings[0]:
        return ", ".join([name, *(one for one in settings_by_name(settings[0]) if not one.startswith("threshold="))])
    if settings and settings[0].endswith(".json"):
        return f"{name}, {settings[0].rsplit('/', 1)[-1]}"
    stride = int(settings[1]) if len(settings) > 1 else 8
    return f"{name}, stride {stride}" if name.split("+")[0] in WITH_STRIDE else name


def of_whole_contexts(rows):
    """The rows of tasks, of the contexts that every method and task met at a length was run on."""
    rows, run = [row for row in rows if row["task"] in TASKS], defaultdict(set)
    for row in rows:
        run[row["length"], row["method"], row["task"]].add(row["index"])
    whole = {length: set.intersection(*(run[key] for key in run if key[0] == length)) for length, _, _ in run}
    return [row for row in rows if row["index"] in whole[row["length"]]]


def merged(rows):
    """{(length, method): {task: {"score", "density", "nats"}}}, means over the contexts, by questions."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["length"], row["method"], row["task"]].append(row)
    table = defaultdict(dict)
    for (length, method, task), group in sorted(groups.items()):
        weights = [len(row.get("right", "1")) for row in group]
        table[length, method][task] = {
            name: float(np.average([row[name] for row in group], weights=weights))
            for name in ("score", "density", "nats")
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


def shares_of_dense(table):
    """{(length, method): {task or MEAN: (density, share of dense)}}; MEAN where a method has every task of dense."""
    found = {}
    for (length, method), by_task in table.items():
        dense = table.get((length, "dense"), {})
        shares = of_dense(by_task, dense)
        found[length, method] = {task: (by_task[task]["density"], share) for task, share in shares.items()}
        if shares and set(by_task) == set(dense):
            found[length, method][MEAN] = mean_density(by_task), float(np.mean(list(shares.values())))
    return found


def standard_errors(rows):
    """{(length, method): {task or MEAN: standard error of the share of dense}}, of lengths with several contexts.

    By the jackknife: each context is left out in turn, and what is made of the others varies so much.
    """
    errors = {}
    for length in {row["length"] for row in rows}:
        of_length = [row for row in rows if row["length"] == length]
        contexts = {row["index"] for row in of_length}
        if len(contexts) < 3:
            continue
        left_out = [
            shares_of_dense(merged([row for row in of_length if row["index"] != context])) for context in contexts
        ]
        for key, panels in left_out[0].items():
            values = {panel: np.array([shares[key][panel][1] for shares in left_out]) for panel in panels}
            errors[key] = {
                panel: float(np.sqrt((len(x) - 1) / len(x) * np.square(x - x.mean()).sum()))
                for panel, x in values.items()
            }
    return errors


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quality_tables(rows):
    """A Markdown table a length: score of each task, the mean share of dense, and the density.

    With the standard error of the mean over contexts where there are several.
    """
    rows = of_whole_contexts(rows)
    table, errors, parts = merged(rows), standard_errors(rows), []
    shares = shares_of_dense(table)
    for length in sorted({length for length, _ in table}):
        methods = {method: by_task for (at, method), by_task in table.items() if at == length}
        tasks = [task for task in TASKS if any(task in by_task for by_task in methods.values())]
        body = []
        order = {
            name: (name != "dense", in_order(family(name)), mean_density(by_task)) for name, by_task in methods.items()
        }
        for method in sorted(methods, key=order.get):
            by_task = methods[method]
            cells = []
            for task in tasks:
                if task not in by_task:
                    cells.append("")
                else:
                    cells.append(f"{by_task[task]['nats']:.4f}" if task == "text" else f"{by_task[task]['score']:.1%}")
            mean = ""
            if MEAN in shares[length, method]:
                share = shares[length, method][MEAN][1]
                error = errors.get((length, method), {}).get(MEAN)
                mean = f"{share:.1%}" if error is None else f"{share:.2%} ± {100 * error:.2f}"
            body.append([method, *cells, mean, f"{mean_density(by_task):.1%}"])
        names = [f"{task}, nats" if task == "text" else task for task in tasks]
        parts.append(f"### {length:,} tokens\n\n" + markdown(["method", *names, "mean of dense", "density"], body))
    return parts


def dense_tables(rows):
    """A Markdown table a length: how prefills that are scored inside differ from dense ones, means over contexts.

    For each task and method the density; the share of right answers, with their number; the share of scored tokens
    where both guess the same; the divergence from dense's chances; and the loss over dense's. Shares of answers and
    losses come with their standard error over contexts, a document each for text.
    """
    groups = defaultdict(dict)  # (length, task, method) -> context -> row
    for row in rows:
        if "divergence" in row:
            groups[row["length"], row["task"], row["method"]][row["index"]] = row
    parts = []
    for length in sorted({length for length, _, _ in groups}):
        body = []
        compared = [(task, method) for at, task, method in groups if at == length]
        for task, method in sorted(compared, key=lambda pair: (pair[0], pair[1] != "dense", in_order(pair[1]))):
            of_context, dense = groups[length, task, method], groups.get((length, task, "dense"), {})
            shared = [of_context[index] for index in sorted(of_context.keys() & dense.keys())]
            if not shared:
                continue
            density, same, divergence = (
                np.mean([row[name] for row in shared]) for name in ("density", "agreement", "divergence")
            )
            answers = ""
            if "answers" in shared[0]:
                count = sum(row["answers"] for row in shared)
                answers = f"{with_error([row['score'] for row in shared], '.1%', 1)} of {count}"
            loss = with_error([row["nats"] / dense[row["index"]]["nats"] - 1 for row in shared], "+.2%", 2)
            cells = [f"{density:.1%}", answers, f"{same:.1%}", f"{divergence:.4f}", loss, str(len(shared))]
            body.append([task, method, *cells])
        if body:
            names = ["density", "answers right", "same token as dense", "KL, nats", "loss over dense", "contexts"]
            parts.append(f"### Against dense, {length:,} tokens\n\n" + markdown(["task", "method", *names], body))
    return parts


def with_error(shares, form, decimals):
    """The mean of shares, one a context, and its standard error in points where there are several contexts."""
    mean = format(np.mean(shares), form)
    if len(shares) == 1:
        return mean
    return f"{mean} ± {100 * np.std(shares, ddof=1) / len(shares) ** 0.5:.{decimals}f}"


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
        for name in sorted(curves, key=in_order):
            kept = [kept_at(curves[name], density) for density in DENSITIES]
            body.append([name, *("" if np.isnan(share) else f"{share:.1%}" for share in kept)])
        header = ["kept mass at a density of", *(f"{density:.0%}" for density in DENSITIES)]
        parts.append(f"### {kind}, {length:,} tokens\n\n" + markdown(header, body))
    return parts


def difference_tables(rows, others=("xattention, stride 8", "exact")):
    """A Markdown table a length with several contexts: rrattn's kept mass less that of others at its own density.

    Differences are of one context, its kinds averaged; the standard error is over contexts.
    """
    parts = []
    for length in sorted({row["length"] for row in rows if row["task"].startswith(MASS)}):
        contexts = defaultdict(list)
        for row in rows:
            if row["length"] == length and row["task"].startswith(MASS):
                contexts[row["index"]].append(row)
        if len(contexts) < 2:
            continue
        found = defaultdict(list)  # method -> of each context: means over kinds
        for of_index in contexts.values():
            curves, of_kind = mass_curves(of_index), defaultdict(list)
            for row in of_index:
                if row["method"].startswith("rrattn:"):
                    of_this = curves[row["task"].split()[1], length]
                    kept = [kept_at(of_this[name], row["density"]) if name in of_this else np.nan for name in others]
                    of_kind[row["method"]].append([row["density"], row["kept"], *(row["kept"] - np.array(kept))])
            for method, values in of_kind.items():
                found[method].append(np.mean(values, axis=0))
        body = []
        means = {method: np.mean(values, axis=0) for method, values in found.items()}
        for method, mean in sorted(means.items(), key=lambda pair: (in_order(family(pair[0])), pair[1][0])):
            error = np.std(found[method], axis=0, ddof=1) / len(found[method]) ** 0.5
            cells = zip(100 * mean[2:], 100 * error[2:])
            less = ["" if np.isnan(x) else f"{x:+.2f} ± {y:.2f}" for x, y in cells]
            body.append([method, f"{mean[0]:.1%}", f"{mean[1]:.2%}", *less])
        header = ["", "density", "kept mass", *(f"less {name}, points" for name in others)]
        parts.append(f"### Kept mass at equal density, {length:,} tokens\n\n" + markdown(header, body))
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
    tables = (quality_tables, dense_tables, difference_tables, mass_tables, benchmark_tables)
    return "\n\n".join(part for make in tables for part in make(rows))


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
    """{family: how its line is drawn}: a colour for each method and stride, a marker for its keep rules.

    Raises
    ------
    ValueError
        For more methods than there are colours.
    """
    colors = pyplot().get_cmap("tab20").colors
    colors = colors[::2] + colors[1::2]  # the strong ones first
    bases = sorted({without_rules(name) for name in names}, key=in_order)
    if len(bases) > len(colors):
        raise ValueError(f"{len(bases)} methods cannot be told apart by {len(colors)} colours: {', '.join(bases)}")
    markers = {"": "o", "last": "s", "near": "^", "last+near": "D"}
    return {
        name: {
            "color": colors[bases.index(without_rules(name))],
            "marker": markers["+".join(name.split(",")[0].split("+")[1:])],
            "markersize": 5,
            "linewidth": 2.2 if name.startswith("rrattn") else 1,
            "label": name,
        }
        for name in names
    }


def in_order(name):
    """What families are sorted by: rrattn first, strides as numbers."""
    method, _, stride = name.partition(", stride ")
    return not name.startswith("rrattn"), without_rules(method), int(stride or 0), name


def without_rules(name):
    """rrattn+last, stride 8 to rrattn, stride 8."""
    method, *stride = name.split(",")
    return ",".join([method.split("+")[0], *stride])


def add_legend(figure, axes):
    """One legend below all panels, of every line that any of them has, in as many columns as there is room for."""
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = sorted(handles, key=in_order)
    label_inches = 0.6 + 0.062 * max(map(len, labels), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() / label_inches)))
    rows = -(-len(labels) // columns)
    height = 0.2 * rows / figure.get_figheight() + 0.01
    figure.legend([handles[label] for label in labels], labels, loc="lower center", ncol=columns, fontsize=8)
    figure.tight_layout(rect=(0, height, 1, 1))


def draw_quality(rows, path):
    """Quality as a share of dense against density, a panel for the mean and each task, at the greatest length."""
    rows = of_whole_contexts(rows)
    table, errors = merged(rows), standard_errors(rows)
    if not any(method == "dense" for _, method in table):
        return
    length = max(length for length, method in table if method == "dense")
    points = defaultdict(list)  # (panel, family) -> (density, share, standard error)
    for (at, method), panels in shares_of_dense(table).items():
        if at == length and method != "dense" and MEAN in panels:
            for panel, point in panels.items():
                points[panel, family(method)].append((*point, errors.get((at, method), {}).get(panel, 0.0)))
    panels = [panel for panel in (MEAN, *TASKS) if any(panel == name for name, _ in points)]
    if not panels:
        return
    plt = pyplot()
    style = styles({name for _, name in points})
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(4 * -(-len(panels) // 2), 8), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for panel, axis in zip(panels, axes.flat):
        for (at, name), line in sorted(points.items()):
            if at == panel:
                density, share, error = np.asarray(sorted(line)).T
                axis.errorbar(density, share, yerr=error if error.any() else None, **style[name])
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set(title=panel, xlabel="density", ylabel="share of dense")
    figure.suptitle(f"Quality against density, {length:,} tokens")
    add_legend(figure, axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_mass(rows, path):
    """Lost mass against density, a panel for each text and length."""
    curves = mass_curves(rows)
    if not curves:
        return
    plt = pyplot()
    style = styles({name for by_family in curves.values() for name in by_family})
    lines = -(-len(curves) // 3)
    columns = -(-len(curves) // lines)
    figure, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 4.5 * lines), squeeze=False, sharey=True)
    for ((kind, length), by_family), axis in zip(sorted(curves.items()), axes.flat):
        for name, curve in sorted(by_family.items()):
            axis.semilogy(curve[0], 1 - curve[1], **style[name])
        axis.set(title=f"{kind}, {length:,} tokens", xlabel="density", xlim=(0, 0.6), ylim=(0.004, 0.3))
    for axis in axes[:, 0]:
        axis.set_ylabel("true attention mass lost")
    add_legend(figure, axes)
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
        axis.set_title(method, fontsize=6)
    figure.suptitle("Needles found, by depth and length: green all, red none")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / lines))
    figure.savefig(path, dpi=110)
    plt.close(figure)
