"""How a command finds the other processes, and where it keeps compiled programs."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import types

import jax
import pytest

from ferjax import runtime
from ferjax.config import UnreachableError, UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("", None, None), None),
        (("", 1, None), None),
        (("a:1", 2, 1), {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}),
        (("[::1]:80", 1, 0), {"coordinator_address": "[::1]:80", "num_processes": 1}),
    ],
)
def test_flags(given, expected):
    join = runtime.from_flags(*given)
    assert (join is None) == (expected is None)
    if expected:
        how, arguments = join
        assert how == "flags"
        assert expected.items() <= arguments.items()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "--coordinator without --num_processes and --process_id"),
        (("a:1", 2, None), "--coordinator, --num_processes without --process_id"),
        (("", 2, 1), "--num_processes, --process_id without --coordinator"),
        (("a", 2, 1), "it is HOST:PORT"),
        (("a:b", 2, 1), "it is HOST:PORT"),
        (("a:1", 2, 2), "ids count from 0"),
    ],
)
def test_flags_that_make_no_sense(given, message):
    with pytest.raises(UserError, match=message):
        runtime.from_flags(*given)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def without(environ, name):
    return {k: v for k, v in environ.items() if k != name}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        (MPI, "Open MPI"),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, "TPU workers"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_PLATFORMS": "cpu"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_environment(environ, expected):
    join = runtime.from_environment(environ)
    assert (join and join[0]) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            without(SLURM, "SLURM_STEP_NODELIST"),
            "SLURM_STEP_NODELIST is not set: start it with srun",
        ),
        (
            without(MPI, "OMPI_COMM_WORLD_RANK"),
            "OMPI_COMM_WORLD_RANK is not set: start it with mpi",
        ),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "TPU_WORKER_ID is not set"),
    ],
)
def test_half_given_environment(environ, message):
    with pytest.raises(UserError, match=message):
        runtime.from_environment(environ)


@pytest.mark.skipif(importlib.util.find_spec("kubernetes") is not None, reason="it is installed")
def test_kubernetes_without_its_package():
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    with pytest.raises(UserError, match="the package kubernetes is not installed"):
        runtime.from_environment(environ)


def start_alone(*args, **environ):
    """A process that does nothing but start."""
    code = """
from ferjax import runtime
from ferjax.command import run
runtime.define_flags()
run(lambda: runtime.start(8))
"""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=100,
    )


def test_a_peer_that_never_comes_ends_with_a_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"]
    done = start_alone(*flags, "--join_timeout=2", JAX_PLATFORMS="cpu")
    assert done.returncode == 1, done.stderr
    assert f"not all processes met within 2 s at the coordinator (127.0.0.1:{port})" in done.stderr


@pytest.mark.parametrize(
    ("batch_size", "cores", "expected"),
    [(64, 2, 2), (64, 1, 1), (7, 2, 1), (6, 4, 3), (64, 64, 8), (9, 8, 3)],
)
def test_a_device_for_each_core(monkeypatch, batch_size, cores, expected):
    monkeypatch.setenv("XLA_FLAGS", "--given")
    assert runtime.split_cpu(batch_size, cores, os.environ) == expected
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--given", f"--xla_force_host_platform_device_count={expected}"]
    assert flags[2:] == (["--xla_cpu_multi_thread_eigen=false"] if expected == cores else [])


def test_the_users_own_choice_of_devices_stands(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    for given in (
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        {"JAX_NUM_CPU_DEVICES": "4"},
    ):
        assert runtime.split_cpu(64, 2, given) == 0
    assert "XLA_FLAGS" not in os.environ


@pytest.mark.parametrize(("asked", "added"), [(True, runtime.DETERMINISTIC), (False, ())])
def test_deterministic_asks_xla(monkeypatch, asked, added):
    monkeypatch.setenv("XLA_FLAGS", "--given")
    runtime.xla_flags(0, deterministic=asked)
    assert os.environ["XLA_FLAGS"].split() == ["--given", *added]


@pytest.fixture
def settings(monkeypatch):
    """What `jax.config.update` is called with."""
    seen = {}
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    return seen


def test_compiled_programs_are_kept_in_the_users_cache(settings, tmp_path):
    runtime.set_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    directory = settings["jax_compilation_cache_dir"]
    assert directory.startswith(f"{tmp_path}/ferjax/xla/")
    assert os.path.isdir(directory)
    assert settings["jax_persistent_cache_min_compile_time_secs"] == 0


def test_programs_that_nobody_uses_are_removed(settings, tmp_path):
    programs = tmp_path / "ferjax" / "xla"
    long_ago = time.time() - 2 * runtime.UNUSED_AFTER
    for name, read, written in [
        ("here/fresh", 1, 1),
        ("here/read", 1, 0),
        ("here/old", 0, 0),
        ("another/old", 0, 0),
    ]:
        (programs / name).parent.mkdir(parents=True, exist_ok=True)
        (programs / name).touch()
        times = [time.time() if recent else long_ago for recent in (read, written)]
        os.utime(programs / name, tuple(times))
    runtime.set_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert {file.name for file in programs.glob("*/*")} == {"fresh", "read"}


def test_the_users_own_choice_of_a_cache_stands(settings, tmp_path):
    given = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    runtime.set_compilation_cache(given)
    assert not settings  # JAX reads them itself
    runtime.set_compilation_cache({"JAX_COMPILATION_CACHE_DIR": ""})
    assert settings == {"jax_enable_compilation_cache": False}


def test_one_of_several_processes_keeps_programs_only_where_it_is_told(settings, tmp_path):
    runtime.set_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)}, alone=False)
    assert settings == {"jax_enable_compilation_cache": False}
    settings.clear()
    given = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    runtime.set_compilation_cache(given, alone=False)
    assert "jax_enable_compilation_cache" not in settings


@pytest.mark.parametrize("count", [1, 2])
def test_whether_a_tpu_vm_is_alone_is_asked_after_joining(settings, monkeypatch, tmp_path, count):
    joined = []
    nothing = types.SimpleNamespace(
        coordinator="", num_processes=None, process_id=None, join_timeout=9
    )
    monkeypatch.setattr(runtime, "FLAGS", nothing)
    monkeypatch.setattr(runtime, "from_environment", lambda environ: ("TPU VM", {}))
    monkeypatch.setattr(runtime, "_initialize", lambda *how: joined.append(how))
    monkeypatch.setattr(jax, "process_count", lambda: count if joined else 1)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime.start(8)
    assert ("jax_compilation_cache_dir" in settings) == (count == 1)
    assert settings.get("jax_enable_compilation_cache", True) == (count == 1)


def test_a_home_that_cant_be_written_is_no_error(settings, tmp_path):
    (tmp_path / "file").touch()
    runtime.set_compilation_cache({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert "jax_compilation_cache_dir" not in settings


@pytest.mark.parametrize("platform", ["cuda", "tpu", "no_such"])
def test_devices_that_are_not_there(platform):
    if platform in ("cuda", "tpu") and any(
        map(importlib.util.find_spec, ("jax_cuda13_plugin", "libtpu"))
    ):
        pytest.skip("they may be there")
    done = start_alone(JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert done.stderr.startswith("ferjax: JAX can't start its devices: ")
    assert f": JAX_PLATFORMS is {platform!r}, set it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_device_that_is_held_may_be_free_at_the_next_start(monkeypatch):
    def held():
        raise RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is in use")

    monkeypatch.setattr(jax, "process_count", held)
    with pytest.raises(UnreachableError, match=r"can't start its devices: Unable .* in use$"):
        runtime._start_devices()


TOUCH = """
import os, resource, sys, threading
from ferjax import runtime

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch(count, pages):
    for _ in range(count):
        block = bytearray(2**25)
        pages.append(-faults())
        block[::4096] = bytes(2**13)
        pages[-1] += faults()
        del block

print(int(runtime.recycle_memory(dict(a.split("=") for a in sys.argv[1:]))))
pages = []
thread = threading.Thread(target=touch, args=(4, pages))
thread.start()
thread.join()
print(max(pages[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_is_handed_out_again():
    # A thread's large block: without the setting it comes from mmap, page by page, each time.
    def child(*environ):
        made = subprocess.run(
            [sys.executable, "-c", TOUCH, "JAX_PLATFORMS=cpu", *environ],
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(line) for line in made.stdout.split()]

    recycled, faults = child()
    assert recycled
    assert faults < 10
    recycled, faults = child("MALLOC_ARENA_MAX=4")  # what the user has set stands
    assert not recycled
