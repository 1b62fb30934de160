"""Draws a training: python tests/curve.py OUTPUT_DIR FIGURE.svg

Left: loss per token, in training and on --eval_data_path, and the learning rate. Right: the wrong
tokens on --eval_data_path, and the error rate of each checkpoint that recognize.py has decoded to
OUTPUT_DIR/STEP.txt. Needs matplotlib.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

GREY = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), "#808890")
GREY |= {"xtick.color": "#808890", "ytick.color": "#808890", "grid.color": "#80889060"}


def main(output_dir, figure_path):
    plt.rcParams.update(GREY | {"axes.grid": True, "legend.framealpha": 0})
    states = Path(output_dir).glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    log = json.loads(newest.read_text())["log_history"]

    def logged(key):
        """(steps, values) of what was logged under a key."""
        return zip(*[(entry["step"], entry[key]) for entry in log if key in entry], strict=True)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*logged("loss"), lw=1, label="training")
    left.plot(*logged("eval_loss"), ".-", label="held-out")
    left.set(xlabel="optimizer steps", title="loss per token", ylim=(0, None))
    rate = left.twinx()
    rate.plot(*logged("learning_rate"), color="#80889060", lw=1)
    rate.set(ylim=(0, None), yticks=[])
    left.plot([], [], color="#80889060", label="learning rate")
    steps, accuracies = logged("eval_token_accuracy")
    wrong = [100 * (1 - accuracy) for accuracy in accuracies]
    right.plot(steps, wrong, "C2.-", label="wrong tokens, when told the ones before")
    rates = {}
    for path in Path(output_dir).glob("*.txt.report"):
        name, rate_of_all = re.match(r"(WER|CER) ([\d.]+)", path.read_text("utf-8")).groups()
        rates[int(path.name.split(".")[0])] = name, float(rate_of_all)
    if rates:
        values = [rates[step][1] for step in sorted(rates)]
        right.plot(sorted(rates), values, "C1.-", label=next(iter(rates.values()))[0])
    right.set(xlabel="optimizer steps", title="held-out errors, %", ylim=(0, None))
    for axes in left, right:
        axes.legend()
    figure.savefig(figure_path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
