"""times.png and losses.png beside the report, where matplotlib is installed."""

import importlib.util
from collections import defaultdict
from typing import Any

from benchmarks.gpu.job import Job
from benchmarks.gpu.results import Results


def run(job: Job) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        job.note(absent="matplotlib is not installed, so nothing is drawn")
        return
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    results = Results(job.out)
    made = [draw(results, plt, job) for draw in (_times, _losses)]
    job.note(drawn=[name for name in made if name])


def _times(results: Results, plt: Any, job: Job) -> str | None:
    """Bars: each provider's time over ours, a panel for each op."""
    panels: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in results.rows("benchmarks"):
        if "seconds" in row:
            label = f"{row['case']} {row['dtype']}\n{row['mode']}"
            panels[row["op"]][label][row["provider"]] = row["seconds"]
    if not panels:
        return None
    tall = [max(2.0, 0.45 * len(cases)) for cases in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(tall)), height_ratios=tall, squeeze=False
    )
    for axis, (op, cases) in zip(axes[:, 0], panels.items(), strict=True):
        names = list(dict.fromkeys(name for times in cases.values() for name in times))
        for place, name in enumerate(names):
            height = 0.8 / len(names)
            rows = [(i, times) for i, times in enumerate(cases.values()) if name in times]
            axis.barh(
                [i + height * (place - (len(names) - 1) / 2) for i, _ in rows],
                [1e3 * times[name] for _, times in rows],
                height,
                label=name,
            )
        axis.set_yticks(range(len(cases)), list(cases), fontsize=6)
        axis.invert_yaxis()
        axis.set(title=_mark(op, results), xlabel="ms", xscale="log")
        axis.legend(fontsize=6)
    return _saved(figure, plt, job, "times.png")


def _losses(results: Results, plt: Any, job: Job) -> str | None:
    rows = results.rows("training")
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7, 4))
    for row in rows:
        axis.plot(row["losses"], label=f"{row['provider']} {row['dtype']}", linewidth=1)
    axis.set(title=_mark("loss", results), xlabel="step", ylabel="nats")
    axis.legend(fontsize=7)
    return _saved(figure, plt, job, "losses.png")


def _mark(title: str, results: Results) -> str:
    return f"{title} (dry run: no measurement)" if results.dry else title


def _saved(figure: Any, plt: Any, job: Job, name: str) -> str:
    figure.tight_layout()
    figure.savefig(job.out / name, dpi=110)
    plt.close(figure)
    return name
