"""Checkpoints: what is kept, chosen, and refused."""

import json
import logging
import shutil
import subprocess
import sys
import types
from pathlib import Path

import flax.struct
import jax
import numpy as np
import pytest

from ferjax.config import UserError
from ferjax.engine import checkpoint
from ferjax.engine.checkpoint import Checkpoints, DamagedError


@flax.struct.dataclass
class State:
    step: np.ndarray
    params: dict
    opt_state: tuple
    extra: dict


def make_state(step):
    rng = np.random.default_rng(step)
    params = {"kernel": rng.normal(size=(64, 64)).astype(np.float32)}
    return State(np.asarray(step, np.int32), params, (params, (), np.asarray(3)), {})


def save_all(workdir, accuracies, keep=2):
    checkpoints = Checkpoints(workdir / "checkpoints", keep)
    for step, accuracy in accuracies.items():
        checkpoints.save(make_state(step), {"row": {"loss": [0.1, 1.0]}}, accuracy)
    checkpoints.close()


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: (np.asarray(x) == np.asarray(y)).all(), a, b))


def test_latest_and_best_are_kept(tmp_path):
    save_all(tmp_path, {1: 0.3, 2: None, 3: 0.5, 4: 0.4, 5: None, 6: 0.1, 7: None})
    assert steps(tmp_path) == [3, 6, 7]
    assert checkpoint.choose(tmp_path, "best").name == "3"
    assert checkpoint.choose(tmp_path, "latest").name == "7"
    assert checkpoint.choose(tmp_path, "6").name == "6"
    with pytest.raises(UserError, match="--checkpoint=5: use best, latest or one of 3, 6, 7"):
        checkpoint.choose(tmp_path, "5")


def test_a_kill_while_old_ones_are_deleted_leaves_no_part_of_one(tmp_path, monkeypatch):
    """What is to be deleted is moved aside first, under a name that is no checkpoint's."""

    def killed(path, ignore_errors=False):
        raise KeyboardInterrupt(path)

    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(make_state(1), {"row": {}}, None)
    checkpoints.save(make_state(2), {"row": {}}, None)
    checkpoints.save(make_state(3), {"row": {}}, None)
    checkpoints.wait()
    monkeypatch.setattr("ferjax.engine.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt, match="deleted"):
        checkpoints.save(make_state(4), {"row": {}}, None)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["2", "3"]  # keep=1 keeps two
    assert (tmp_path / "checkpoints/deleted/1").is_dir()
    state, _ = checkpoint.restore_latest(tmp_path, make_state(0))
    assert equal(state, make_state(3))
    # The next trainer finishes the deletion.
    Checkpoints(tmp_path / "checkpoints", 1).close()
    assert steps(tmp_path) == [2, 3]


def test_restored_state_is_equal(tmp_path):
    save_all(tmp_path, {4: 0.5})
    state, meta = checkpoint.restore_latest(tmp_path, make_state(0))
    assert isinstance(state, State)
    assert equal(state, make_state(4))
    assert state.params["kernel"].dtype == np.float32
    assert meta["row"] == {"loss": [0.1, 1.0]}
    assert meta["accuracy"] == 0.5


def test_nothing_saved(tmp_path):
    assert checkpoint.restore_latest(tmp_path, make_state(0)) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.choose(tmp_path, "best")


def test_no_best_before_the_first_evaluation(tmp_path):
    save_all(tmp_path, {2: None})
    with pytest.raises(UserError, match="use --checkpoint=latest"):
        checkpoint.choose(tmp_path, "best")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_left_out(tmp_path, caplog, monkeypatch, damage):
    save_all(tmp_path, {1: 0.1, 2: 0.2})
    path = tmp_path / "checkpoints" / "2"
    file = largest_file(path / "state")
    if damage == "bit":
        flip_a_bit(file)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(DamagedError, match="checkpoints/2"):
        checkpoint.read(path.absolute())
    monkeypatch.setattr(logging.getLogger("ferjax"), "propagate", True)
    with caplog.at_level("WARNING", logger="ferjax"):
        state, _ = checkpoint.restore_latest(tmp_path, make_state(0))
    assert "checkpoint 2 is damaged" in caplog.text
    assert equal(state, make_state(1))
    assert len(list((tmp_path / "damaged").glob("2-*"))) == 1  # moved, not deleted
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(make_state(2), {"row": {}}, 0.3)  # its step can be saved again
    checkpoints.close()
    assert equal(
        checkpoint.read((tmp_path / "checkpoints" / "2").absolute())[0]["params"],
        make_state(2).params,
    )


SCORE = "metrics/metrics"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (SCORE, None, b""),
        (SCORE, b"9", b"1"),
        (SCORE, b"accuracy", b"accurbcy"),
        (SCORE, None, None),
        ("meta/metadata", b"0.9", b"0.8"),
    ],
    ids=["empty", "digit", "key", "missing", "meta"],
)
def test_a_damaged_score_is_named_and_counts_for_nothing(
    tmp_path, caplog, monkeypatch, file, old, new
):
    save_all(tmp_path, {1: 0.9, 2: 0.2, 3: 0.4})
    path = tmp_path / "checkpoints" / "1" / file
    if new is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(old, new) if old else new)
    with pytest.raises(UserError, match=r"best can't be told .*checkpoints/1: its score"):
        checkpoint.choose(tmp_path, "best")
    with pytest.raises(DamagedError):
        checkpoint.read(tmp_path.absolute() / "checkpoints" / "1")
    monkeypatch.setattr(logging.getLogger("ferjax"), "propagate", True)
    with caplog.at_level("WARNING", logger="ferjax"):
        state, _ = checkpoint.restore_latest(tmp_path, make_state(0))
    assert equal(state, make_state(3))
    assert "checkpoint 1 is damaged" in caplog.text
    assert len(list((tmp_path / "damaged").glob("1-*"))) == 1
    save_all(tmp_path, {4: 0.3})
    assert checkpoint.choose(tmp_path, "best").name == "3"


def test_every_flipped_bit_of_meta_is_seen(tmp_path):
    save_all(tmp_path, {1: 0.5, 2: 0.25})
    path = tmp_path.absolute() / "checkpoints" / "2"
    file = path / "meta" / "metadata"
    whole, meta = file.read_bytes(), checkpoint.read(path)[1]
    unseen = []
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            if checkpoint.read(path)[1] != meta:
                unseen.append((place, data[place - 9 : place + 9]))
        except DamagedError:
            pass
    # But of the sum's own name: without it the checkpoint is taken for an older one.
    assert all(b"crc_me" in around or b"rc_meta" in around for _, around in unseen)


def test_a_checkpoint_from_before_there_was_a_sum_of_meta_is_read(tmp_path):
    save_all(tmp_path, {1: 0.5})
    file = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["crc_meta"]
    file.write_text(json.dumps(meta))
    state, _ = checkpoint.restore_latest(tmp_path, make_state(0))
    assert equal(state, make_state(1))


def test_a_checkpoint_that_its_trainer_removes_while_the_best_is_looked_for(tmp_path, monkeypatch):
    save_all(tmp_path, {1: 0.2, 2: 0.4, 3: 0.3}, keep=3)
    accuracy = checkpoint._accuracy

    def removed(path):
        if path.name == "1":
            shutil.rmtree(path)
        return accuracy(path)

    monkeypatch.setattr(checkpoint, "_accuracy", removed)
    assert checkpoint.choose(tmp_path, "best").name == "2"


def test_a_damaged_form_of_the_state_is_left_out(tmp_path, monkeypatch):
    save_all(tmp_path, {1: 0.1, 2: 0.2})
    read = checkpoint.read

    def lacking(path):
        tree, meta = read(path)
        if path.name == "2":
            del tree["extra"]  # a part without arrays
        return tree, meta

    monkeypatch.setattr(checkpoint, "read", lacking)
    state, _ = checkpoint.restore_latest(tmp_path, make_state(0))
    assert equal(state, make_state(1))
    assert len(list((tmp_path / "damaged").glob("2-*"))) == 1


def test_no_whole_checkpoint_is_an_error_and_moves_nothing(tmp_path):
    save_all(tmp_path, {1: 0.1, 2: 0.2})
    for step in (1, 2):
        flip_a_bit(largest_file(tmp_path / "checkpoints" / str(step) / "state"))
    with pytest.raises(DamagedError, match=r"no checkpoint .* is whole \(damaged: 2, 1\)"):
        checkpoint.restore_latest(tmp_path, make_state(0))
    assert steps(tmp_path) == [1, 2]


def test_other_errors_are_not_taken_for_damage(tmp_path, monkeypatch):
    save_all(tmp_path, {1: 0.1})

    def stale(*_, **__):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", stale)
    with pytest.raises(OSError, match="Stale"):
        checkpoint.restore_latest(tmp_path, make_state(0))
    assert steps(tmp_path) == [1]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    save_all(tmp_path, {1: 0.1})
    other = make_state(0).replace(params={"kernel": np.zeros((3, 3), np.float32)})
    with pytest.raises(UserError, match="other arrays than this config's network"):
        checkpoint.restore_latest(tmp_path, other)


def test_reading_deletes_nothing(tmp_path):
    save_all(tmp_path, {1: 0.9, 2: 0.2, 3: 0.3})
    before = steps(tmp_path)
    checkpoint.read(checkpoint.choose(tmp_path, "best"))
    assert steps(tmp_path) == before == [1, 2, 3]


def test_a_full_disk_warns_and_keeps_what_is_saved(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("ferjax"), "propagate", True)
    free = [10**9]
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free[0])
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(make_state(1), {}, 0.5)
    free[0] = 50_000
    checkpoints.save(make_state(2), {}, 0.5)
    assert checkpoints.failed
    message = f"step 2 could not be saved in {tmp_path}/checkpoints, which takes 0.1 MB: 0.1 MB are"
    assert message in caplog.text
    assert "the last checkpoint is step 1" in caplog.text
    free[0] = 10**9
    checkpoints.save(make_state(3), {}, 0.5)
    checkpoints.close()
    assert not checkpoints.failed
    assert steps(tmp_path) == [1, 3]


def test_a_write_that_fails_halfway_leaves_nothing_and_training_goes_on(tmp_path):
    """Files may not grow beyond 100 kB in this process: as if the disk became full meanwhile."""
    code = f"""
import logging, resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from test_checkpoint import Checkpoints, Path, make_state
logging.getLogger("ferjax").addHandler(logging.StreamHandler(sys.stdout))
checkpoints = Checkpoints(Path({str(tmp_path)!r}) / "checkpoints", 2)
checkpoints.save(make_state(1), {{}}, 0.5)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
rng = np.random.default_rng(0)
big = {{"kernel": rng.normal(size=(256, 256)).astype(np.float32)}}
checkpoints.save(make_state(2).replace(params=big), {{}}, 0.5)
checkpoints.wait()
assert checkpoints.failed
checkpoints.save(make_state(3), {{}}, 0.5)
checkpoints.close()
assert not checkpoints.failed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2 could not be saved" in done.stdout
    assert steps(tmp_path) == [1, 3]
    assert equal(checkpoint.read(tmp_path / "checkpoints" / "3")[0]["params"], make_state(3).params)
