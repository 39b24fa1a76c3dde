"""loss.png: the training and the validation loss of a run, from its metrics.jsonl."""

from pathlib import Path

from gptk.train import metrics
from gptk.train.checkpoint import written


def plot_loss(run: Path) -> Path | None:
    """Draw run/loss.png, log-log, and return its path; None if there is nothing to draw.

    Raises:
        CheckpointError: it cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    records = [r for r in metrics.read(run / "metrics.jsonl") if r["step"] > 0]
    train = [(r["step"], r["loss"]) for r in records if isinstance(r.get("loss"), float)]
    val = [(r["step"], r["val_loss"]) for r in records if isinstance(r.get("val_loss"), float)]
    if not train:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), lw=0.8, alpha=0.6, label="training (each step)")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", ms=4, label="validation")
    axes.set(xscale="log", yscale="log", xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    path = run / "loss.png"
    with written(path):
        figure.savefig(path, dpi=120)
    return path
