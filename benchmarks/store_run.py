"""A training run's curve as it is committed: curve.json and loss.png of a run folder.

python benchmarks/store_run.py RUN FOLDER

Wall time is from the run's configuration, written when it starts, to its last line of metrics: for
a run made in one piece.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from gptk.bench.measure import facts

EVERY = 10
"""Steps between points of the training loss, each the mean over them."""


def curve(run: Path) -> dict[str, Any]:
    """What the folder says, without paths of this machine."""
    config = json.loads((run / "config.json").read_text("utf-8"))
    config.get("run", {}).pop("out", None)
    config["data"]["data"] = Path(config["data"]["data"]).name
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    validation = [
        {
            "step": line["step"],
            "loss": round(line["val_loss"], 4),
            "bits_per_byte": round(line["bits_per_byte"], 4),
        }
        for line in lines
        if "val_loss" in line
    ]
    training = []
    for end in range(EVERY, len(steps) + 1, EVERY):
        part = [step["loss"] for step in steps[end - EVERY : end]]
        training.append([steps[end - 1]["step"], round(sum(part) / EVERY, 4)])
    wall = metrics.stat().st_mtime - (run / "config.json").stat().st_mtime
    return {
        "facts": facts("cpu"),
        "config": config,
        "wall_seconds": round(wall),
        "seconds_in_steps": round(sum(step["ms"] for step in steps) / 1e3, 1),
        "validation": validation,
        "training": training,
    }


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = curve(options.run)
    text = ", \n".join(f'"{key}": {json.dumps(value)}' for key, value in found.items())
    (options.folder / "curve.json").write_text(f"{{{text}}}\n", "utf-8")
    shutil.copyfile(options.run / "loss.png", options.folder / "loss.png")


if __name__ == "__main__":
    main()
