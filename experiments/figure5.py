"""Figure 5 of the paper, of one run or of two below each other: what the scheduler chose, and what
became of every class.

    python experiments/figure5.py LOG [LOG_B] [--out=figure5.png]        LOG: a run's log.jsonl

Loss is in nats a label token, accuracy is greedy given the true tokens before; both on validation
rows. A share stands from the evaluation that chose it until the next.
"""
import argparse
import json
import sys

COLORS = [f"tab:{name}" for name in "red orange green cyan purple brown pink gray".split()]
PANELS = {"loss": "validation loss", "accuracy": "accuracy", "share": "share of samples"}


def read(path):
    """-> (what the run is, {column: its value at every evaluation})."""
    try:
        with open(path) as file:
            head, *lines = [json.loads(line) for line in file]
        config = head["config"]
        evaluations = [line for line in lines if "mean_loss" in line]
        if len(evaluations) < 2:
            raise ValueError(f"{path} has {len(evaluations)} evaluations, and a picture needs 2")
        title = f"{config['mixture']}, {config['arch']}, seed {config['seed']}"
        columns = {name: [line[name] for line in evaluations] for name in evaluations[0]
                   if name == "step" or name.split("_")[0] in PANELS}
    except (AttributeError, KeyError, RecursionError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no log of train.py ({type(error).__name__}: {error}); "
                         f"pass the log.jsonl of a run")
    return title, columns


def plot(paths, picture):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("the picture needs matplotlib; pip install matplotlib")
    runs = [read(path) for path in paths]
    figure, axes = plt.subplots(len(runs), 3, figsize=(14, 0.4 + 3.4 * len(runs)), sharex="row",
                                sharey="col", squeeze=False, layout="constrained")
    for row, (title, columns) in zip(axes, runs):
        row[0].set_ylabel(title)
        classes = [name[len("loss_"):] for name in columns if name.startswith("loss_")]
        of_class = {name: [columns[f"{name}_{cls}"] for cls in classes] for name in PANELS}
        for axis, (name, label) in zip(row, PANELS.items()):
            axis.set(title=label, xlim=(0, columns["step"][-1]))
            axis.set_prop_cycle(color=COLORS)
            if name != "share":
                axis.plot(columns["step"], list(zip(*of_class[name])))
            else:
                areas = axis.stackplot(columns["step"], of_class[name], step="post")
                axis.set_ylim(0, 1)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    names = [cls.replace("_", " ").replace("lm", "LM") for cls in classes]
    figure.legend(areas[::-1], names[::-1], loc="outside right center", frameon=False)
    plt.savefig(picture, dpi=110)
    plt.close(figure)
    print(f"wrote {picture}")


def main(argv):
    parser = argparse.ArgumentParser(usage="python experiments/figure5.py LOG [LOG_B] "
                                     "[--out=figure5.png]", allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help shows the command")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of one or two runs")
    parser.add_argument("--out", default="figure5.png", help="the picture")
    args = parser.parse_args(argv)
    if len(args.logs) > 2:
        parser.error(f"{len(args.logs)} logs do not fit one picture; pass one or two")
    try:
        plot(args.logs, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
