"""What must be settled before JAX touches a device: processes, XLA flags, the compilation cache.

Every command that computes calls `start` once. It joins the processes of a distributed run when the
flags `--coordinator`, `--num_processes` and `--process_id` or the environment say so:

    SLURM              SLURM_NTASKS > 1, started by srun
    Open MPI           OMPI_COMM_WORLD_SIZE > 1
    Cloud TPU, GKE     TPU_WORKER_HOSTNAMES names several hosts, or a TPU VM's metadata server
    Kubernetes         an indexed Job or JobSet (JOB_COMPLETION_INDEX), with the package kubernetes

`--num_processes=1` trains alone whatever the environment says.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags

from ferjax import machine
from ferjax.config import EXIT_FAILED, UnreachableError, UserError

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")

# How much longer than we do JAX waits for the processes: it aborts without a message of ours.
_JAX_WAITS_LONGER = 120

# More virtual devices than this were not measured.
MOST_CPU_DEVICES = 8

# Options of glibc's mallopt: blocks of all sizes come from one heap (M_ARENA_MAX=1, M_MMAP_MAX=0),
# which never shrinks (M_TRIM_THRESHOLD=-1).
RECYCLE = ((-8, 1), (-4, 0), (-1, -1))

# Of a compiled program that is kept, in seconds; file systems note a reading once a day.
UNUSED_AFTER = 60 * 24 * 3600.0

# XLA flags of `config.deterministic`, by platform; a CPU and a TPU need none.
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true",)


def define_flags() -> None:
    """The flags of a distributed run."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where processes meet.")
    flags.DEFINE_integer("num_processes", None, "How many processes take part.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    flags.DEFINE_integer("join_timeout", 240, "Seconds to wait for the others.", lower_bound=1)


def start(batch_size: int, *, deterministic: bool = False, float64: bool = False) -> None:
    """Joins the other processes and sets JAX up; before any backend is touched.

    Args:
      batch_size: what the devices must divide.
      deterministic: ask XLA for the same bits in every run on the same kind of device.
      float64: double precision.

    Raises:
      UserError: the processes' flags or environment are incomplete, or they ask for devices that
        this JAX does not know.
      UnreachableError: the other processes, or the devices, did not answer.
    """
    if float64:
        jax.config.update("jax_enable_x64", True)
    recycle_memory(os.environ)
    join = from_flags(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.num_processes is None and not join:
        join = from_environment(os.environ)
    xla_flags(0 if join else batch_size, deterministic=deterministic)
    if join:
        how, arguments = join
        _initialize(how, arguments, FLAGS.join_timeout)
    alone = _start_devices() == 1  # a TPU VM is several processes or one: only now it is known
    set_compilation_cache(os.environ, alone=alone)
    if join and jax.process_index() == 0:
        log.info("distributed: %d processes, found by %s", jax.process_count(), how)
    if jax.process_index() > 0:
        for console in [*log.handlers]:
            log.removeHandler(console)  # process 0 speaks


def xla_flags(batch_size: int, *, deterministic: bool) -> None:
    """Sets XLA's flags, in the environment: they hold for this process and those it starts.

    Args:
      batch_size: for `split_cpu`; 0: this is one of several processes, whose launcher decides.
    """
    if deterministic:
        _add_xla_flags(*DETERMINISTIC)
    if batch_size:
        split_cpu(batch_size, machine.cores(), os.environ)


def split_cpu(batch_size: int, cores: int, environ: Mapping[str, str]) -> int:
    """Makes one device of each CPU core, as far as they divide the batch; returns how many.

    XLA's loops over a CPU's threads leave these idle for much of a small network's step: two
    devices of one thread each made the small CNN's step 1.6 times and WRN-28-2's 1.3 times as fast
    as one device of two threads (BUILD_NOTES.md). What the user has asked for stands.
    """
    flags_given = environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags_given or "JAX_NUM_CPU_DEVICES" in environ:
        return 0
    most = min(cores, MOST_CPU_DEVICES)
    count = max(n for n in range(1, most + 1) if batch_size % n == 0)
    _add_xla_flags(f"--xla_force_host_platform_device_count={count}")
    if count == cores and "xla_cpu_multi_thread_eigen" not in flags_given:
        _add_xla_flags("--xla_cpu_multi_thread_eigen=false")
    return count


def recycle_memory(environ: Mapping[str, str]) -> bool:
    """Has glibc keep the memory that a step frees for the next one; returns whether it will.

    A CPU's step takes some hundred MB to 1.5 GB and gives them back at its end. glibc would return
    them to the system, which then hands out each page anew, filled with zeros: a fifth of a small
    network's step. The price is that the threads of a compilation, which share one heap, take a
    third longer, once (BUILD_NOTES.md). To be called before JAX starts its threads. Where there may
    be an accelerator, or the environment says how to allocate, nothing is changed.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environ):
        return False
    accelerator = find_spec("jax_plugins") or find_spec("libtpu")  # the first one: of GPUs
    if sys.platform != "linux" or (accelerator and environ.get("JAX_PLATFORMS") != "cpu"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and all(mallopt(*option) for option in RECYCLE)


def _add_xla_flags(*added: str) -> None:
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in added if flag not in given)])


def set_compilation_cache(environ: Mapping[str, str], *, alone: bool = True) -> None:
    """Keeps compiled programs on disk, so that the same command starts faster the next time.

    In $XDG_CACHE_HOME/ferjax, or where JAX_COMPILATION_CACHE_DIR says; an empty one keeps none.
    In the first, programs are removed that nobody has read for `UNUSED_AFTER` seconds.
    One of several processes keeps programs only where that variable says so: process 0 alone writes
    them, so it should name a directory that all share. With one of its own only process 0 would
    find its programs, and on GPUs others could wait for ever for its part of choosing kernels.
    """
    given = environ.get("JAX_COMPILATION_CACHE_DIR", "" if not alone else None)
    if given == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
        # JAX keeps those of a second or more: of a start's programs all but a few are shorter.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if given:
        return
    home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    programs = Path(home) / "ferjax" / "xla"
    directory = programs / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home: every start compiles
    _remove_unused(programs)
    jax.config.update("jax_compilation_cache_dir", str(directory))


def _remove_unused(programs: Path) -> None:
    """JAX's own limit of a cache's size wants a lock, which not all file systems have."""
    now = time.time()
    for file in programs.glob("*/*"):
        with contextlib.suppress(OSError):  # another start may have removed it
            status = file.stat()
            # Some file systems don't note when a file was read: there all are written anew then.
            if now - max(status.st_atime, status.st_mtime) > UNUSED_AFTER:
                file.unlink()


def _machine() -> str:
    """A name for this kind of CPU: a program compiled for another may use instructions it lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    digest = hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


Join = tuple[str, dict[str, Any]]


def from_flags(coordinator: str, num_processes: int | None, process_id: int | None) -> Join | None:
    """How the three flags say that processes meet: (in words, arguments of JAX), or None.

    Raises:
      UserError: some of them are missing or impossible.
    """
    if num_processes == 1 and not coordinator and not process_id:
        return None
    given = {
        "--coordinator": coordinator or None,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return None
    if missing:
        there = ", ".join(name for name in given if name not in missing)
        raise UserError(f"{there} without {' and '.join(missing)}: give all three, or none")
    assert num_processes is not None  # for the type checker
    assert process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator}: it is HOST:PORT of process 0")
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} of --num_processes={num_processes}: ids count from 0"
        )
    arguments: dict[str, Any] = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        # Nothing is left to detect; a SLURM allocation around us would else take away devices.
        "cluster_detection_method": "deactivate",
    }
    return "flags", arguments


def from_environment(environ: Mapping[str, str]) -> Join | None:
    """How the environment says that processes meet, or None: this process is alone.

    Raises:
      UserError: it says so by half.
    """

    def several(name: str) -> bool:
        return environ.get(name, "1").isdigit() and int(environ.get(name, "1")) > 1

    def need(*names: str, mend: str) -> None:
        if missing := [name for name in names if not environ.get(name)]:
            raise UserError(
                f"this looks like one of several processes, but {', '.join(missing)} is not set: "
                f"{mend}, or give --num_processes=1 to train alone"
            )

    if several("SLURM_NTASKS"):
        step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
        need(*step, mend="start it with srun")
        return "SLURM", {"cluster_detection_method": "slurm"}
    if several("OMPI_COMM_WORLD_SIZE"):
        ranks = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
        flags = "--coordinator, --num_processes and --process_id"
        need(*ranks, mend=f"start it with mpirun of Open MPI 4; with 5 give {flags}")
        return "Open MPI", {"cluster_detection_method": "ompi"}
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts and environ.get("JAX_PLATFORMS", "tpu") != "cpu":
        need("TPU_WORKER_ID", mend="see launch/README.md")
        return "TPU workers", {}
    if _on_tpu_vm(environ):
        return "TPU VM", {}
    if "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ:
        if find_spec("kubernetes") is None:
            raise UserError(
                "this is an indexed Kubernetes job, but the package kubernetes is not installed: "
                "install it, or give --coordinator, --num_processes and --process_id"
            )
        return "Kubernetes", {}
    return None


def _on_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM whose metadata server says which worker it is."""
    devices = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    wanted = environ.get("JAX_PLATFORMS", "tpu") != "cpu" and "TPU_SKIP_MDS_QUERY" not in environ
    return devices and wanted and find_spec("libtpu") is not None


def _initialize(how: str, arguments: dict[str, Any], timeout: int) -> None:
    """Joins the others; the process ends with one line if they do not come."""

    def give_up() -> NoReturn:
        # JAX would abort the process in C++, which Python can't catch.
        where = arguments.get("coordinator_address", f"found by {how}")
        print(
            f"ferjax: not all processes met within {timeout} s at the coordinator ({where}): is "
            "each one started, with the same address, and can it be reached? "
            "--join_timeout=SECONDS waits longer",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)

    # We handle the signals ourselves; its sync point needs step numbers that rise by one.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + _JAX_WAITS_LONGER)
    except (RuntimeError, ValueError) as error:
        # A ValueError is about what was given, the other about what the rest did.
        kind = UserError if isinstance(error, ValueError) else UnreachableError
        raise kind(f"the processes can't meet ({how}): {' '.join(str(error).split())}") from None
    finally:
        timer.cancel()


def _start_devices() -> int:
    """Starts JAX's backend; returns the number of processes."""
    try:
        return jax.process_count()
    except (RuntimeError, AssertionError) as error:  # the latter: cuda, without its plugin
        asked = os.environ.get("JAX_PLATFORMS")
        said = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split())[:300].rstrip(".")
        said = f"JAX can't start its devices: {said or 'no such platform is installed'}"
        unknown = not str(error) or "known backends" in said or "open libtpu.so" in said
        if asked and unknown:
            mend = (
                f"JAX_PLATFORMS is {asked!r}, set it to a platform that is installed, or unset it"
            )
            raise UserError(f"{said}: {mend}") from None
        # Another process may still hold them, and have ended at the next start.
        raise UnreachableError(said) from None
