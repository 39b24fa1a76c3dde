"""metrics.jsonl: one line a step; a torn end and steps past the checkpoint go on resume."""

import json
import math

import pytest

from gptk.train.metrics import Metrics, read


def write(path, steps, step=None):
    metrics = Metrics(path, step)
    for n in steps:
        metrics.write({"step": n, "loss": 1.0 / n})
    metrics.close()


def test_a_later_field_joins_the_line_of_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    metrics = Metrics(path, 2)
    metrics.write({"step": 2, "val_loss": 3.0})
    metrics.write({"step": 3, "loss": 0.25})
    metrics.close()
    assert read(path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5, "val_loss": 3.0},
        {"step": 3, "loss": 0.25},
    ]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("step", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("torn", ['{"step": 6, "lo', '{"step": 6}', "\0\0\0", ""])
def test_reopening_drops_the_torn_end_and_later_steps(tmp_path, step, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    whole = path.read_text().splitlines()
    with path.open("a") as file:
        file.write(torn)
    Metrics(path, step).close()
    assert path.read_text().splitlines() == whole[:step]


def test_a_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [1])
    assert [r["step"] for r in read(path)] == [1]


def test_a_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 1, "loss": 1.0})
    assert read(path) == [{"step": 1, "loss": 1.0}]
    metrics.close()


def test_nan_is_null_and_the_file_stays_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    line = path.read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_lines_that_cannot_be_read_are_left_out_with_one_warning(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    bad = b'nonsense\n[1]\n{"step": "x"}\n\xff\n' + b"[" * 100_000 + b"\n"
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n')
    said = []
    assert read(path, said.append) == [{"step": 1}, {"step": 2}]
    assert said == [f"warning: {path}: 5 lines from 2 on cannot be read, left out"]
    Metrics(path, 2).close()
    assert capsys.readouterr().out.count("warning") == 1
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_fresh_log_does_not_read_the_old_one(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("nonsense\n")
    Metrics(path).close()
    assert (path.read_text(), capsys.readouterr().out) == ("", "")


def test_a_line_that_fits_only_in_part_is_an_error(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    whole = metrics._file

    class Full:
        def __getattr__(self, name):
            return getattr(whole, name)

        def write(self, data):
            return whole.write(data[:5])

    metrics._file = Full()
    with pytest.raises(OSError, match="No space"):
        metrics.write({"step": 1})
    whole.close()
