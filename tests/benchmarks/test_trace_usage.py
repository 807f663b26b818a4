"""benchmarks/trace_usage.py: known busy shares, and a real trace of this machine."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
import trace_usage

from ferjax.config import UserError


def meta(kind, pid, name, tid=None):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def span(pid, tid, start, duration, name="op"):
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": duration, "name": name}


def test_streams_overlap_and_other_lines_do_not_count():
    events = [
        meta("process_name", 1, "/device:GPU:0"),
        meta("thread_name", 1, "Stream #1(Compute)", 10),
        meta("thread_name", 1, "Stream #2(MemcpyH2D)", 11),
        meta("thread_name", 1, "Steps", 12),
        meta("process_name", 2, "/device:TPU:0"),
        meta("thread_name", 2, "XLA Ops", 10),
        meta("process_name", 3, "/host:CPU"),
        span(1, 10, 0, 4000),
        span(1, 11, 3000, 2000),
        span(1, 10, 8000, 2000),
        span(1, 12, 0, 10_000),
        span(2, 10, 100, 50),
        span(3, 10, 0, 10_000, "PjitFunction"),
        {},
    ]
    found = trace_usage.utilization(events)
    assert found.keys() == {"/device:GPU:0", "/device:TPU:0"}
    gpu = found["/device:GPU:0"]
    assert gpu == {
        "window": 10.0,
        "busy": pytest.approx(0.7),
        "idle": pytest.approx(0.3),
        "longest_gap": 3.0,
        "gaps": 1,
    }
    assert found["/device:TPU:0"]["busy"] == 1


def test_a_real_trace_and_none(tmp_path, capsys):
    work = jax.jit(lambda x: (x @ x).sum())
    x = jnp.ones((400, 400))
    work(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path / "profile")):
        for _ in range(3):
            work(x).block_until_ready()
    assert trace_usage.main([str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    (device,) = record["devices"].values()
    assert 0 < device["busy"] <= 1
    assert device["window"] > 0

    with pytest.raises(UserError, match=r"--config\.profile"):
        trace_usage.newest(tmp_path / "elsewhere")
    empty = tmp_path / "other" / "profile" / "vm.trace.json.gz"
    empty.parent.mkdir(parents=True)
    with gzip.open(empty, "wt") as file:
        json.dump({"traceEvents": []}, file)
    with pytest.raises(UserError, match="no program"):
        trace_usage.main([str(tmp_path / "other")])
