"""What a start ran on is kept, whatever became of the starts before it."""

import json

import jax
from etils import epath

from ferjax import machine
from ferjax.engine import starts
from ferjax.engine.parallel import Layout


def test_each_start_has_a_row(tmp_path):
    workdir = epath.Path(tmp_path)
    assert starts.read(workdir) == []
    assert starts.last(workdir) == {}
    layout = Layout(devices=jax.devices()[:2])
    starts.record(workdir, layout, 0)
    with (tmp_path / starts.FILE).open("a") as file:
        file.write('{"step": 7, "time": "20')  # a start that a full disk cut off
    starts.record(workdir, layout, 12)
    first, second = starts.read(workdir)
    assert (first["step"], second["step"]) == (0, 12)
    assert starts.last(workdir) == second
    assert (second["devices"], second["processes"], second["device"]) == (2, 1, "cpu")
    assert second["jax"] == jax.__version__
    assert second["cpu"] == machine.cpu()
    assert f"jax {jax.__version__}" in second["code"]
    assert all(json.loads(line) for line in (tmp_path / starts.FILE).read_text().splitlines())


def test_a_disk_that_does_not_take_it_stops_no_training(tmp_path, caplog_ferjax):
    (tmp_path / starts.FILE).mkdir()
    (tmp_path / starts.FILE / "file").touch()
    starts.record(epath.Path(tmp_path), Layout(devices=jax.devices()[:1]), 0)
    assert f"{starts.FILE} can't be written" in caplog_ferjax.text
