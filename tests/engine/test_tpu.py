"""The step compiled for a TPU v5e 4x4 on a CPU machine: what 16 chips would run.

Needs libtpu in a folder of its own, named by FERJAX_LIBTPU:
pip install --no-deps --target DIR libtpu
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DIRECTORY = os.environ.get("FERJAX_LIBTPU", "")

PROGRAM = """
import json, re
import harness, jax, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ferjax.engine.parallel import Layout
from ferjax.engine.step import make_call

devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
small = harness.Small(harness.make_config(
    dtype="bfloat16", batch_size=32,
    views={"weak": {"policy": "weak"}, "strong": {"policy": "strong"}},
    model={"name": "cnn", "layers": ("conv 8 3 nobias", "bn", "relu", "maxpool 4", "gap")},
))
layout = Layout("shard_map", devices)
call = layout.wrap(make_call(small.step, 2), donate=True)

def spec(x, *axes):
    return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype,
                                sharding=NamedSharding(layout.mesh, PartitionSpec(*axes)))

index = {n: x.reshape(2, 16, -1).swapaxes(0, 1) for n, x in small.index(0, 2).items()}
data = harness.make_data()
data["targets"] = data["targets"].astype(np.float32)
compiled = call.lower(
    jax.tree.map(spec, small.init()),
    jax.tree.map(lambda x: spec(x, "devices"), index),
    jax.tree.map(spec, data),
).compile()
text = compiled.as_text()
kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
lines = re.findall(rf"= (.*) ({kinds})(?:-start)?\\(", text)
names = [name for _, name in lines]

def elements(shapes):  # of "(f32[8,3]{0,1}, f32[])" and the like
    sizes = re.findall(r"[a-z]+[0-9]+\\[([0-9,]*)\\]", shapes)
    return sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in sizes)

state = small.init()
print(json.dumps({
    "devices": len(devices),
    "collectives": {n: names.count(n) for n in set(names)},
    "reduced": sorted(elements(shapes) for shapes, _ in lines),
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "statistics": sum(x.size for x in jax.tree.leaves(state.batch_stats)),
    "flops": compiled.cost_analysis()["flops"],
    "bytes": compiled.memory_analysis().temp_size_in_bytes,
    "gathers": [l for l in text.splitlines() if re.search(r"= \\S+ gather\\(", l)],
}))
"""


@pytest.mark.skipif(not DIRECTORY, reason="FERJAX_LIBTPU names no folder with libtpu")
def test_step_compiles_for_a_tpu_and_only_reduces():
    here = Path(__file__).parent
    path = os.pathsep.join([DIRECTORY, str(here), str(here.parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=500,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is there to be shared
            "TPU_WORKER_HOSTNAMES": "localhost",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 16
    assert found["flops"] > 0
    assert set(found["collectives"]) == {"all-reduce"}
    # All that is reduced: the gradients; BatchNorm's moments of the weak forward, of the other
    # forward and of its gradient (XLA may merge them); the metrics' sums. An activation would not
    # go unseen: the smallest of a device has 4 x 16 x 16 x 8 numbers.
    least = found["parameters"] + 3 * found["statistics"]
    assert least <= sum(found["reduced"]) <= least + 32
    # Rows of images and of targets, for both parts of a batch; warps and lookups are products.
    assert len(found["gathers"]) == 4
    assert all("gather(" in line and "slice_sizes={1," in line for line in found["gathers"])
