"""One trainer a workdir: on this host by the file lock, on others by the heartbeat."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from ferjax.config import UserError
from ferjax.engine.lock import LostLockError, WorkdirLock

ELSEWHERE = {"host": "elsewhere", "process": 7, "id": "other"}


def lock(workdir):
    return WorkdirLock(workdir, beat=0.05, stale=1.0)


def write(workdir, holder=ELSEWHERE, age=0.0):
    path = workdir / "lock"
    path.write_text(json.dumps(holder).ljust(256))
    os.utime(path, (time.time() - age, time.time() - age))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_trainer_on_this_host_is_refused_until_the_first_ends(tmp_path):
    first = lock(tmp_path)
    first.acquire()
    code = (
        "import sys; from pathlib import Path; from ferjax.engine.lock import WorkdirLock\n"
        "WorkdirLock(Path(sys.argv[1])).acquire()"
    )
    second = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert f"is being trained by process {os.getpid()} on" in second.stderr
    first.release()
    assert (tmp_path / "lock").read_text() == ""
    again = lock(tmp_path)
    again.acquire()
    again.release()


def test_the_heartbeat_changes_the_file(tmp_path):
    held = lock(tmp_path)
    held.acquire()
    path = tmp_path / "lock"
    before = path.read_text()
    wait_for(lambda: path.read_text() != before)
    old, new = json.loads(before), json.loads(path.read_text())
    assert old["id"] == new["id"]
    held.release()


def test_a_dead_holder_on_this_host_is_forgotten_at_once(tmp_path, caplog_ferjax):
    import socket

    write(tmp_path, {**ELSEWHERE, "host": socket.gethostname()})
    held = WorkdirLock(tmp_path, stale=1e6)
    held.acquire()
    held.release()
    assert not caplog_ferjax.messages


def test_a_stale_lock_of_another_host_is_taken_over_with_a_warning(tmp_path, caplog_ferjax):
    write(tmp_path, age=100)
    held = lock(tmp_path)
    held.acquire()
    held.release()
    assert "process 7 on elsewhere gave no sign of life" in caplog_ferjax.text


def test_a_holder_on_another_host_that_falls_silent_is_waited_for(
    tmp_path, caplog_ferjax, monkeypatch
):
    write(tmp_path, age=0)
    monkeypatch.setattr(WorkdirLock, "_silence", lambda _: 0.0)  # however slow this machine is
    held = lock(tmp_path)
    held.acquire()
    held.release()
    assert "to see whether process 7 on elsewhere still trains here" in caplog_ferjax.text
    assert "is taken over" in caplog_ferjax.text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_flock(tmp_path, caplog_ferjax, monkeypatch, number):
    """Heartbeats guard the workdir alone, those of this host's processes, too."""

    def flock(file, how):
        raise OSError(number, "no flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    held = lock(tmp_path)
    held.acquire()
    assert "without flock" in caplog_ferjax.text
    with pytest.raises(UserError, match="is being trained by"):
        WorkdirLock(tmp_path, beat=0.05, stale=30).acquire()
    held.release()
    caplog_ferjax.clear()
    again = WorkdirLock(tmp_path, beat=0.05, stale=1e6)
    again.acquire()  # at once: it was given back
    again.release()
    assert "waiting" not in caplog_ferjax.text


def test_without_flock_one_of_two_that_start_together_has_it(tmp_path, monkeypatch):
    """Both have found nobody; the one that wrote last goes on."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "")))
    monkeypatch.setattr(time, "sleep", lambda _: write(tmp_path))  # the other one, meanwhile
    with pytest.raises(UserError, match="is being trained by process 7 on elsewhere"):
        lock(tmp_path).acquire()


def test_another_error_of_flock_is_no_lock(tmp_path, monkeypatch):
    seen = []

    def flock(file, how):
        seen.append(file)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"):
        lock(tmp_path).acquire()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])  # closed


def test_a_living_holder_on_another_host_is_respected(tmp_path):
    done = threading.Event()

    def beat():
        while not done.wait(0.02):
            with (tmp_path / "lock").open("r+") as file:
                file.write(json.dumps({**ELSEWHERE, "beat": time.time()}).ljust(256))

    write(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="is being trained by process 7 on elsewhere"):
            WorkdirLock(tmp_path, beat=0.05, stale=30).acquire()
    finally:
        done.set()
        thread.join()


def test_a_holder_that_slept_looks_before_its_next_beat(tmp_path):
    # No beat comes in this test, and every check is as late as one after a sleep.
    held = WorkdirLock(tmp_path, beat=600, stale=599)
    held.acquire()
    write(tmp_path)
    WorkdirLock(tmp_path, beat=600, stale=599).check()  # of a process that has none to lose
    write(tmp_path)
    with pytest.raises(LostLockError, match="taken over by process 7 on elsewhere"):
        held.check()
    held.release()
    assert json.loads((tmp_path / "lock").read_text()) == ELSEWHERE


def test_one_that_took_over_and_has_given_back_is_seen_too(tmp_path):
    held = WorkdirLock(tmp_path, beat=600, stale=599)
    held.acquire()
    (tmp_path / "lock").write_text("")  # as a release leaves it
    with pytest.raises(LostLockError, match="taken over by another process"):
        held.check()
    held.release()
    assert (tmp_path / "lock").read_text() == ""


def test_another_holders_lock_is_not_given_back(tmp_path):
    held = WorkdirLock(tmp_path, beat=600, stale=599)
    held.acquire()
    write(tmp_path)
    held.release()
    assert json.loads((tmp_path / "lock").read_text()) == ELSEWHERE


def test_a_look_in_vain_is_made_again(tmp_path, monkeypatch):
    held = WorkdirLock(tmp_path, beat=600, stale=599)
    held.acquire()
    (tmp_path / "lock").unlink()
    held.check()  # a file that can't be read says nothing
    write(tmp_path)
    held.check()  # too soon: where each look waits for a server, training would stand still
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    with pytest.raises(LostLockError, match="taken over by process 7 on elsewhere"):
        held.check()
    held.release()


def test_beats_in_vain_do_not_count(tmp_path):
    held = WorkdirLock(tmp_path, beat=0.01, stale=0.1)
    held.acquire()
    (tmp_path / "lock").unlink()

    def still():
        seen = held._awake
        time.sleep(0.2)  # twenty beats
        return held._awake == seen

    wait_for(still)
    held.release()


def test_a_holder_that_slept_beats_at_once(tmp_path):
    held = WorkdirLock(tmp_path, beat=600, stale=599)
    held.acquire()
    first = json.loads((tmp_path / "lock").read_text())["beat"]
    held.check()
    wait_for(lambda: json.loads((tmp_path / "lock").read_text())["beat"] > first)
    held.release()


def test_a_holder_that_was_taken_over_writes_nothing_more(tmp_path):
    held = lock(tmp_path)
    held.acquire()
    held.check()

    def lost():
        # Again and again: the holder's own beat may have been under way.
        with (tmp_path / "lock").open("r+") as file:
            file.write(json.dumps(ELSEWHERE).ljust(256))
        return held.lost

    wait_for(lost)
    with pytest.raises(LostLockError, match="taken over by process 7 on elsewhere"):
        held.check()
    held.release()
    assert json.loads((tmp_path / "lock").read_text()) == ELSEWHERE
