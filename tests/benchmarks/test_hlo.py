"""The reader of HLO against NumPy's sizes in programs that XLA compiled, and against TPU text."""

from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

DEVICES = 4


def compiled_text(function, *arguments):
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]), ("d",), axis_types=(AxisType.Auto,))
    one = partial(jax.shard_map, mesh=mesh, check_vma=False)
    spec = PartitionSpec("d")
    mapped = one(function, in_specs=(spec,) * len(arguments), out_specs=spec)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def test_collectives_of_a_compiled_program():
    whole = np.zeros((DEVICES * 8, 6), np.float32)
    bytes_ = np.zeros((DEVICES * 4,), np.uint8)
    local = whole.nbytes // DEVICES

    def function(x, y):
        gathered = jax.lax.all_gather(y, "d", tiled=True)
        moved = jax.lax.ppermute(x, "d", [(i, (i + 1) % DEVICES) for i in range(DEVICES)])
        swapped = jax.lax.all_to_all(moved, "d", 0, 0, tiled=True)
        return jax.lax.psum(jnp.sin(x), "d"), gathered, moved, swapped

    found = {c.kind: c for c in hlo.collectives(compiled_text(function, whole, bytes_))}
    assert {kind: c.bytes for kind, c in found.items()} == {
        "all-reduce": local,
        "all-gather": bytes_.nbytes,
        "collective-permute": local,
        "all-to-all": local,
    }
    assert {c.group for c in found.values()} == {DEVICES}
    assert {kind: c.sent_bytes for kind, c in found.items()} == {
        "all-reduce": 2 * local * 3 / 4,
        "all-gather": bytes_.nbytes * 3 / 4,
        "collective-permute": local,
        "all-to-all": local * 3 / 4,
    }


def test_collectives_in_a_loop_stand_once():
    def function(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "d") / 2, None), x, None, length=9)[0]

    found = hlo.collectives(compiled_text(function, np.zeros((DEVICES, 5), np.float32)))
    assert [(c.kind, c.shapes) for c in found] == [("all-reduce", (("f32", (1, 5)),))]


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("bf16", (3, 5), 30),
        ("f32", (), 4),
        ("f64", (2,), 16),
        ("s32", (7,), 28),
        ("u8", (9,), 9),
        ("pred", (3,), 3),
        ("f8e4m3fn", (6,), 6),
        ("u4", (3,), 2),
        ("c64", (2,), 16),
        ("f32", (0, 8), 0),
    ],
)
def test_size(kind, shape, expected):
    assert hlo.size(kind, shape) == expected
    text = f"{kind}[{','.join(map(str, shape))}]"
    assert hlo.shapes(f"({text}{{0}}, token[], {text})") == ((kind, shape),) * 2


def test_asynchronous_pairs_count_once_and_with_their_results():
    text = """HloModule jit_f, is_scheduled=true, num_partitions=16

%fused (p: f32[8]) -> f32[8] {
  %all-reduce-fake = f32[8]{0} negate(%p), metadata={op_name="all-reduce(no)"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %all-reduce-start.1 = (f32[2,8]{1,0:T(8,128)S(1)}, bf16[4]{0}) all-reduce-start(%a, %b), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
  %all-gather-start = (s32[8,128]{1,0:T(8,128)}, s32[128,128]{1,0:T(8,128)S(1)}) all-gather-start(%c), replica_groups={{0,1},{2,3}}, dimensions={0}
  %collective-permute-start = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d), source_target_pairs={{0,1},{1,0}}
  %work = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  %all-gather-done = s32[128,128]{1,0:T(8,128)S(1)} all-gather-done((s32[8,128]{1,0}, s32[128,128]{1,0}) %all-gather-start)
  %all-reduce-done.1 = (f32[2,8]{1,0:T(8,128)S(1)}, bf16[4]{0}) all-reduce-done(%all-reduce-start.1)
  ROOT %collective-permute-done = f32[4]{0} collective-permute-done(%collective-permute-start)
}
"""  # noqa: E501
    found = hlo.collectives(text)
    assert [(c.kind, c.bytes, c.group, c.asynchronous) for c in found] == [
        ("all-reduce", 64 + 8, 4, True),
        ("all-gather", 4 * 128 * 128, 2, True),
        ("collective-permute", 16, 16, True),
    ]
    assert hlo.summary([*found, found[0]])["all-reduce"] == {
        "count": 2,
        "bytes": 144,
        "sent_bytes": 2 * 2 * 72 * 3 / 4,
        "asynchronous": 2,
    }
    with pytest.raises(ValueError, match=r"collective-permute-start has no done"):
        hlo.collectives(text[: text.index("  ROOT")])
    with pytest.raises(ValueError, match=r"all-gather-done has no start"):
        hlo.collectives(text.replace("%all-gather-start = ", "%other = "))


def test_what_a_tpu_spreads_over_fusions_counts_once():
    """As libtpu 0.0.52 writes it: each part repeats the collective, with one chain_id."""
    part = """
%part.N (p: s32[8,128]) -> s32[128,128] {
  %p = s32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.N = s32[128,128]{1,0:T(8,128)S(1)} all-gather(%p), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
}
"""  # noqa: E501
    start = '  %s = ((f32[2]{0}), f32[8]{0}) async-start(%x), calls=%beside, chain_id="1"\n'
    text = "".join(part.replace("N", str(n)) for n in range(3)) + (
        "%beside (p: f32[2]) -> f32[8] {\n"
        "  ROOT %r = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}\n}\n" + start
    )
    found = hlo.collectives("HloModule m, num_partitions=4\n" + text)
    assert [(c.kind, c.bytes, c.sent_bytes, c.asynchronous) for c in found] == [
        ("all-gather", 4 * 128 * 128, 4 * 128 * 128 * 3 / 4, True),
        ("reduce-scatter", 8, 24, True),
    ]
