"""Draws a training: python tests/curve.py OUTPUT_DIR FIGURE.svg

Left: loss per token, in training and on --eval_data_path, and the learning rate. Right: the wrong
tokens on --eval_data_path, and the error rate of each checkpoint that recognize.py has decoded to
OUTPUT_DIR/STEP.txt. Needs matplotlib.
"""

import json
import re
import sys
from pathlib import Path

GREY = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), "#808890")
GREY |= {"xtick.color": "#808890", "ytick.color": "#808890", "grid.color": "#80889060"}


def log_of(output_dir, key):
    """{step: value} of what the newest checkpoint of output_dir logged under a key."""
    checkpoints = Path(output_dir).glob("checkpoint-*")
    newest = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in log if key in entry}


def main(output_dir, figure_path):
    import matplotlib.pyplot as plt  # only here: the tests read logs without it

    plt.rcParams.update(GREY | {"axes.grid": True, "legend.framealpha": 0})

    def logged(key):
        """(steps, values) of what was logged under a key."""
        return zip(*log_of(output_dir, key).items(), strict=True)

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
        rates[int(path.name.split(".")[0])] = float(rate_of_all)
    if rates:
        right.plot(*zip(*sorted(rates.items()), strict=True), "C1.-", label=name)
    right.set(xlabel="optimizer steps", title="held-out errors, %", ylim=(0, None))
    for axes in left, right:
        axes.legend()
    figure.savefig(figure_path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
