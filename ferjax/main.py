"""Trains: `python -m ferjax.main --config=configs/fixmatch.py [--workdir=DIR] [--config.a.b=v]`.

Without --workdir: runs/<the config's name>. The same command with the same workdir resumes.
"""

import logging
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from ferjax import config as configs
from ferjax import runtime
from ferjax.command import out_of_memory, run
from ferjax.config import EXIT_FAILED, UserError
from ferjax.engine.checkpoint import DamagedError, saved
from ferjax.engine.lock import LostLockError
from ferjax.engine.metrics import NotFiniteError
from ferjax.engine.train import train
from ferjax.workdir import is_remote, log_handler, reason, workdir_path, write_errors

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", help_string="The experiment.", lock_config=False, accept_new_attributes=True
)
flags.DEFINE_string("workdir", "", "Where the run is written; runs/<the config's name> if empty.")
runtime.define_flags()

log = logging.getLogger("ferjax")


def main() -> int:
    """Checks the config, then trains; returns the exit status."""
    if FLAGS["config"].value is None:
        raise UserError("--config is missing: for example --config=configs/quickstart.py")
    path = config_flags.get_config_filename(FLAGS["config"])
    try:
        given = FLAGS.config.to_dict()
    except OSError as error:  # ml_collections keeps it until the config is asked for
        cause = error.__cause__ or error
        if not os.path.isfile(path.split(":", 1)[0]):
            raise UserError(f"--config={path}: no such file") from None
        named = getattr(cause, "filename", None) or ""
        raise UserError(f"--config={path}: {named} {reason(cause)}") from None
    original = configs.from_file(*path.split(":", 1)).to_dict()
    given = configs.switch_modules(given, original)
    given["name"] = given.get("name") or config_name(path)
    for key in ("source", "data_dir", "split_file", "ferplus_source"):
        value = given.get("data", {}).get(key)
        if value and not is_remote(value):
            # A later command may be started elsewhere.
            given["data"][key] = os.path.abspath(os.path.expanduser(value))
    kind, colon, value = given.get("data", {}).get("unlabeled_source", "").partition(":")
    if value and not is_remote(value):
        value = os.path.abspath(os.path.expanduser(value))
        given["data"]["unlabeled_source"] = kind + colon + value
    config = configs.finalize(given)
    workdir = workdir_path(FLAGS.workdir or f"runs/{config.name}")
    runtime.start(
        config.batch_size // config.microbatches,
        deterministic=config.deterministic,
        float64=config.dtype == "float64",
    )
    start_logs(workdir)
    if hint := unused_gpu():
        log.warning(hint)
    try:
        return train(config, workdir)
    except jax.errors.JaxRuntimeError as error:
        message = out_of_memory(
            error,
            "lower config.batch_size (or that of config.evaluate), raise config.microbatches "
            "(parts of a batch, one after another), set config.model.remat, where the model has "
            "it, or config.data.pipeline=stream",
        )
        if not saved(workdir):
            raise UserError(message) from None
        # It did fit: another program may have the memory now, and be gone at the next start.
        print(f"ferjax: {message}", file=sys.stderr)
        return EXIT_FAILED
    except (NotFiniteError, DamagedError, LostLockError) as error:
        print(f"ferjax: {error}", file=sys.stderr)
        return EXIT_FAILED


def config_name(path: str) -> str:
    """`configs/seeds/a.py:cpu` -> `seeds_a_cpu`: a name for the workdir."""
    file, _, variant = path.partition(":")
    parts = Path(file).with_suffix("").parts
    # All of the path below configs/, if it is there.
    known = "configs" in parts
    parts = parts[len(parts) - parts[::-1].index("configs") if known else -1 :]
    return re.sub(r"[^\w.-]+", "_", "_".join([*parts, *([variant] if variant else [])]))


def start_logs(workdir: epath.Path) -> None:
    """ferjax's lines to the console of process 0 and to logs/process_<k>.log of each."""
    process = jax.process_index()
    try:
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        file = log_handler(workdir / "logs" / f"process_{process}.log")
    except write_errors(workdir) as error:
        raise UserError(f"{workdir} can't be written: {reason(error)}") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(file)
    logging.getLogger().addHandler(file)  # other libraries' warnings


def unused_gpu() -> str:
    """A line for a machine with an NVIDIA GPU that the installed jaxlib does not use, or ""."""
    present = os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidia0")
    if not present or jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return ""
    if find_spec("jax_cuda13_plugin"):
        return "an NVIDIA GPU is here, but JAX can't use it: CUDA 13 wants a newer driver (README)"
    return "an NVIDIA GPU is here, but the installed jaxlib does not use it: pip install '.[cuda]'"


if __name__ == "__main__":
    run(main)
