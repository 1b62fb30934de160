"""Draws training runs: python tests/curve.py FIGURE.svg [options] [RUN=LABEL ...]

RUN is the --output_dir of a training with evaluation, or a file with the lines that it printed.
The numbers of all runs are written to FIGURE.csv. Without a RUN, the figure is drawn again from it.

Left: training loss as logged (faint) and its moving average (bold). Middle: held-out loss. Right:
held-out token accuracy and, for an --output_dir, the error rate of each checkpoint that
recognize.py has decoded to OUTPUT_DIR/STEP.txt. Needs matplotlib.
"""

import argparse
import ast
import csv
import json
import re
from pathlib import Path

KEYS = "loss", "eval_loss", "eval_token_accuracy", "error_rate"
TEXT, GRID = "#1f2328", "#d0d7de"
RUN_COLOURS = "#bc4c00", "#0969da", "#1a7f37", "#8250df"
# Each colour on a light page, and the one that replaces it on a dark page
DARK = {TEXT: "#e6edf3", GRID: "#3d444d"}
DARK |= dict(zip(RUN_COLOURS, ("#f0883e", "#58a6ff", "#3fb950", "#a371f7"), strict=True))
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "west",  # the same figure has the same ids each time
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("text.color", "axes.labelcolor"), TEXT),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), TEXT),
}
PLATEAU_ACCURACY = 0.3  # on real speech an LLM that does not use the audio stays below it


def log_of(output_dir, key):
    """Returns {step: value} of what the latest checkpoint of output_dir logged under a key."""
    checkpoints = Path(output_dir).glob("checkpoint-*")
    latest = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((latest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in log if key in entry}


def printed_log(text, key):
    """Returns {step: value} of what a finished train.py printed under a key.

    Its lines hold epochs instead of steps; the last line tells how many steps there were.
    """
    entries = [
        ast.literal_eval(line)
        for line in re.findall(r"\{'(?:loss|eval_loss|train_runtime)'.*?\}", text)
    ]
    last = {name: float(value) for name, value in entries[-1].items()}
    steps_per_epoch = last["train_runtime"] * last["train_steps_per_second"] / last["epoch"]
    return {
        round(float(entry["epoch"]) * steps_per_epoch): float(entry[key])
        for entry in entries
        if key in entry
    }


def error_rates(output_dir):
    """Returns {step: WER or CER of all utterances in %} of what was decoded to STEP.txt."""
    rates = {}
    for path in Path(output_dir).glob("*.txt.report"):
        step = path.name.split(".")[0]
        if step.isdigit():
            report = path.read_text("utf-8")
            rates[int(step)] = float(re.match(r"(?:WER|CER) ([\d.]+)", report)[1])
    return dict(sorted(rates.items()))


def read_run(path):
    """Returns {key: {step: value}} of an --output_dir, or of a file with what train.py printed."""
    if Path(path).is_dir():
        run = {key: log_of(path, key) for key in KEYS}
        return {**run, "error_rate": error_rates(path)}
    text = Path(path).read_text("utf-8")
    return {key: printed_log(text, key) for key in KEYS}


def write_table(path, runs):
    """Writes {label: {key: {step: value}}} as a csv with one line for each run and step."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "step", *KEYS])
        for label, run in runs.items():
            for step in sorted(set().union(*run.values())):
                values = [f"{run[key][step]:.4g}" if step in run[key] else "" for key in KEYS]
                writer.writerow([label, step, *values])


def read_table(path, last_step):
    """Returns {label: {key: {step: value}}} of a csv of write_table, up to last_step."""
    runs = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            run = runs.setdefault(row["run"], {key: {} for key in KEYS})
            for key in KEYS:
                if row[key] and int(row["step"]) <= last_step:
                    run[key][int(row["step"])] = float(row[key])
    return runs


def moving_average(values):
    """Returns the mean of each value and its neighbours."""
    triples = [values[max(0, i - 1) : i + 2] for i in range(len(values))]
    return [sum(triple) / len(triple) for triple in triples]


def draw_run(run, colour, training, held_out, percent):
    """Draws one run into the three axes."""
    steps, losses = list(run["loss"]), list(run["loss"].values())
    training.plot(steps, losses, color=colour, alpha=0.35, lw=1)
    training.plot(steps, moving_average(losses), color=colour, lw=2)
    held_out.plot(list(run["eval_loss"]), list(run["eval_loss"].values()), ".-", color=colour)
    accuracies = [100 * accuracy for accuracy in run["eval_token_accuracy"].values()]
    percent.plot(list(run["eval_token_accuracy"]), accuracies, ".-", color=colour)
    percent.plot(list(run["error_rate"]), list(run["error_rate"].values()), ".--", color=colour)


def write_labels(axes, labels):
    """Writes the text of each (percent, text, colour) beside the end of its curve."""
    lowest = 0  # keeps labels of curves that end close together apart
    for percent, text, colour in sorted(labels):
        y = max(percent / 100, lowest)
        axes.text(1.03, y, text, color=colour, va="center", transform=axes.transAxes)
        lowest = y + 0.09


def mark_plateau(axes, run):
    """Marks the plateau of a run, if it has one, and its end in the held-out loss."""
    losses, accuracies = run["eval_loss"], run["eval_token_accuracy"]
    start = min(accuracies)
    end = next((step for step in accuracies if accuracies[step] > PLATEAU_ACCURACY), start)
    if end == start:
        return
    axes.text((start + end) / 2, losses[start] + 0.15, "plateau", ha="center")
    axes.annotate(
        "the LLM starts\nto use the audio",
        xy=(end, losses[end]),
        xytext=(0.98, 0.72),
        textcoords="axes fraction",
        ha="right",
        arrowprops={"arrowstyle": "->", "color": TEXT, "shrinkB": 4},
    )


def draw(runs, title, log_scale):
    """Returns a matplotlib figure of {label: {key: {step: value}}}."""
    import matplotlib.pyplot as plt  # only here: the tests read logs without it

    plt.rcParams.update(STYLE)
    figure, all_axes = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    training, held_out, percent = all_axes
    titles = ["training loss, nats per token", "held-out loss, nats per token"]
    titles.append("held-out token accuracy, %")
    labels = []
    for (label, run), colour in zip(runs.items(), RUN_COLOURS, strict=False):
        draw_run(run, colour, training, held_out, percent)
        if run["error_rate"]:
            titles[2] = "held-out speech, %"
            labels.append((list(run["error_rate"].values())[-1], "error rate", colour))
            label = "token accuracy"
        labels.append((100 * list(run["eval_token_accuracy"].values())[-1], label, colour))
    for axes, axes_title in zip(all_axes, titles, strict=True):
        axes.set_title(axes_title, loc="left", fontsize=9)
        axes.set(xlabel="optimizer steps", xlim=(0, None))
    percent.set_ylim(0, 100)
    if log_scale:
        for axes in training, held_out:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
    else:
        training.set_ylim(0, None)
    held_out.set_ylim(training.get_ylim())
    write_labels(percent, labels)
    mark_plateau(held_out, next(iter(runs.values())))
    figure.suptitle(title, fontsize=9)
    return figure


def add_dark_colours(path):
    """Adds a style to an svg that replaces its colours on a dark page."""
    rules = "".join(
        f'[style*="{name}: {light}"] {{{name}: {dark} !important}}\n'
        for light, dark in DARK.items()
        for name in ("fill", "stroke")
    )
    style = f"\n@media (prefers-color-scheme: dark) {{\n{rules}}}</style>"
    path.write_text(path.read_text("utf-8").replace("</style>", style, 1), "utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("figure", type=Path)
    parser.add_argument("runs", nargs="*", metavar="RUN=LABEL")
    parser.add_argument("--title")
    parser.add_argument("--steps", type=int, default=10**9, help="draw no more than these steps")
    parser.add_argument("--log_scale", action="store_true", help="logarithmic axis of the losses")
    args = parser.parse_intermixed_args()
    table = args.figure.with_suffix(".csv")
    if args.runs:
        sources = [run.partition("=") for run in args.runs]
        write_table(table, {label: read_run(path) for path, _, label in sources})
    figure = draw(read_table(table, args.steps), args.title, args.log_scale)
    figure.savefig(args.figure, transparent=True, metadata={"Date": None})
    add_dark_colours(args.figure)


if __name__ == "__main__":
    main()
