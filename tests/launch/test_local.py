"""launch/local.py with real processes: scripts that print, die or hang, and one psum over gloo."""

import importlib.util
import io
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local.py"
spec = importlib.util.spec_from_file_location("ferjax_launch_local", SCRIPT)
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)

START = """
import os, signal, sys, threading
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
me = int(flags["process_id"])
def again(*_):
    os.write(1, b"saved\\n")  # print may be what the signal interrupted
    os._exit(75)
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script of START and some lines; returns the words after `python` that run it."""

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(START + textwrap.dedent(text))
        return ["-S", "-E", str(path)]

    return write


def run(args, processes=2, **more):
    """The status and the printed lines, sorted by process but in the order within each."""
    out = io.BytesIO()
    status = local.Cluster(args, processes, out=out, **more).run()
    lines = out.getvalue().decode().splitlines()
    return status, sorted(lines, key=lambda line: line.split("]")[0])


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, though nobody has asked for its status yet


def test_two_processes_with_two_devices_each_sum_over_gloo(tmp_path):
    path = tmp_path / "psum.py"
    path.write_text(
        START
        + textwrap.dedent("""
        import jax, jax.numpy as jnp
        jax.distributed.initialize(flags["coordinator"], int(flags["num_processes"]), me)
        x = 10.0 * me + jnp.arange(jax.local_device_count())
        total = jax.pmap(lambda v: jax.lax.psum(v, "i"), "i")(x)
        print("\\nsum", float(total[0]), "of", jax.device_count(), flush=True)
        """)
    )
    status, lines = run([str(path)], devices=2)
    assert status == 0, lines
    # 0 + 1 of the first process, 10 + 11 of the second.
    sums = [line for line in lines if "sum" in line]
    assert sums == ["[0] sum 22.0 of 4", "[1] sum 22.0 of 4"]


def test_environment_and_flags(script):
    args = script("""
        print(*sys.argv[1:3], flags["num_processes"], flags["coordinator"].split(":")[0])
        print(os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"])
        """)
    status, lines = run([*args, "a b", "--x=1"], processes=3, devices=5)
    assert status == 0
    assert lines[0::2] == [f"[{i}] a b --x=1 3 127.0.0.1" for i in range(3)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=5"
    assert lines[1::2] == [f"[{i}] cpu {flags}" for i in range(3)]


@pytest.mark.parametrize(
    ("codes", "status"),
    [((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((75, 0), 75), ((75, 3), 3), ((0, 2), 2)],
)
def test_one_exit_status_for_all(script, codes, status):
    assert run(script(f"sys.exit({codes}[me])"))[0] == status


def test_the_first_failure_counts_and_ends_the_others(script):
    """The other one says 75 or dies of SIGTERM: neither is the status, since it was made to end."""
    args = script("""
        if me == 2:
            sys.exit(7)
        if me == 1:
            signal.signal(signal.SIGTERM, again)
        threading.Event().wait()
        """)
    status, lines = run(args, processes=3)
    assert status == 7
    assert "[local] process 2 ended with status 7; ending 0, 1" in lines


def test_death_by_a_signal_is_128_and_its_number(script):
    status, _ = run(script("os.kill(os.getpid(), signal.SIGKILL) if me else None"))
    assert status == 137


def test_one_that_ignores_sigterm_is_killed(script, tmp_path):
    args = script(f"""
        ready = {str(tmp_path / "ready")!r}
        if me:
            while not os.path.exists(ready):
                threading.Event().wait(0.01)
            sys.exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(ready, "w").close()
        threading.Event().wait()
        """)
    status, lines = run(args, grace=0.2)
    assert status == 1
    assert lines[-1] == "[local] still running: 0; killing them"


def test_one_that_does_not_stop_after_another_was_is_ended(script):
    status, lines = run(script("sys.exit(75) if me else threading.Event().wait()"), grace=0.2)
    assert status == 75
    assert "[local] not stopped after one was: 0; ending them" in lines


def launch(args, *flags):
    command = [sys.executable, str(SCRIPT), "-n", "2", *flags, "--", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_and_75_comes_back(script, number):
    args = script(f"""
        signal.signal({int(number)}, again)
        print("ready", flush=True)
        threading.Event().wait()
        """)
    with launch(args) as launcher:
        assert {launcher.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(number)
        rest = launcher.stdout.read()
        assert launcher.wait() == 75
    assert sorted(rest.splitlines()) == ["[0] saved", "[1] saved"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("code", [0, 75])
def test_no_child_of_a_process_is_left(script, code):
    args = script(f"""
        ready, said = os.pipe()
        if not os.fork():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("child", os.getpid(), flush=True)
            os.write(said, b"x")
            threading.Event().wait()
        os.read(ready, 1)
        sys.exit({code})
        """)
    status, lines = run(args)
    assert status == code
    pids = [int(line.split()[2]) for line in lines]
    assert len(pids) == 2
    # They were killed; the system takes them away when it gets to it.
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_killed_launcher_leaves_no_process(script):
    with launch(script("print(os.getpid(), flush=True)\nthreading.Event().wait()")) as launcher:
        pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        ends = [os.pidfd_open(pid) for pid in pids]
        launcher.kill()
    for end in ends:
        assert select.select([end], [], [], 60)[0]
        os.close(end)


def test_a_line_longer_than_a_pipe(script):
    """And lines of two processes never mix."""
    status, lines = run(script('print(str(me) * 300_000)\nprint("after", end="")'))
    assert status == 0
    assert lines[0] == "[0] " + "0" * 300_000
    assert lines[2] == "[1] " + "1" * 300_000
    assert lines[1::2] == ["[0] after", "[1] after"]


def cut(text, size, bar_seconds):
    lines = []
    reader = local.Lines(lines.append, bar_seconds)
    for start in range(0, len(text), size):
        reader.feed(text[start : start + size])
    reader.close()
    return lines


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "all_states", "last_state"),
    [
        (b"a\nb\n", [b"a", b"b"], [b"a", b"b"]),
        (b"a\n\nb", [b"a", b"", b"b"], [b"a", b"", b"b"]),
        (b"dos\r\nline\r\n", [b"dos", b"line"], [b"dos", b"line"]),
        (b"\r1/3\r2/3\r3/3\nnext\n", [b"1/3", b"2/3", b"3/3", b"next"], [b"3/3", b"next"]),
        (b"1/2\r2/2\r", [b"1/2", b"2/2"], [b"2/2"]),
        (b"1/2\r2/2\r\nend", [b"1/2", b"2/2", b"end"], [b"2/2", b"end"]),
        ("ü\u2028x\x0b\n".encode(), ["ü\u2028x\x0b".encode()], ["ü\u2028x\x0b".encode()]),
    ],
)
def test_lines_and_progress_bars(text, all_states, last_state, size):
    assert cut(text, size, bar_seconds=0) == all_states
    assert cut(text, size, bar_seconds=float("inf")) == last_state


def test_the_port_is_kept_from_others():
    in_use = pytest.raises(OSError, match="in use")
    with local.reserved_port() as port, socket.socket() as other, in_use:
        other.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["-n", "2"], "nothing to run"), (["-n", "0", "--", "x"], "below 1"), (["--", "x"], "-n")],
)
def test_wrong_arguments_end_with_2(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        local.main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
