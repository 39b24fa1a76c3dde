"""What a stage is given: the size of its work, the time it has, the file that it fills."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Replace the file at once: a reader, or a kill, never sees half of it."""
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(fresh, path)


@dataclass
class Job:
    """One part of one stage.

    Args:
        dry: tiny sizes on the CPU, Triton interpreted, a host clock: nothing measured is a result.
        ends: time.monotonic() at which the part is killed.
    """

    stage: str
    part: str
    out: Path
    dry: bool
    ends: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def file(self) -> Path:
        return part_file(self.out, self.stage, self.part)

    def left(self) -> float:
        """Seconds until the part is killed."""
        return self.ends - time.monotonic()

    def add(self, **row: Any) -> None:
        """One more result, on disk at once."""
        self.rows.append(row)
        self.save()

    def put(self, place: int, **row: Any) -> None:
        """The last result, which is at this place, as far as it has got."""
        self.rows[place:] = [row]
        self.save()

    def note(self, **facts: Any) -> None:
        self.facts.update(facts)
        self.save()

    def save(self, finished: bool = False) -> None:
        write_json(
            self.file,
            {
                "stage": self.stage,
                "part": self.part,
                "dry_run": self.dry,
                "finished": finished,
                "facts": self.facts,
                "rows": self.rows,
            },
        )

    def read(self, stage: str, part: str = "") -> dict[str, Any]:
        """The facts that an earlier stage left; none if it left nothing."""
        path = part_file(self.out, stage, part)
        facts: dict[str, Any] = json.loads(path.read_text())["facts"] if path.exists() else {}
        return facts


def part_file(out: Path, stage: str, part: str) -> Path:
    """Where a part of a stage writes."""
    name = f"{stage}-{part}" if part else stage
    return out / "stages" / (name.replace("/", "-") + ".json")
