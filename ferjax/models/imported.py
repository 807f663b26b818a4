"""ResNet weights that torchvision or timm trained, as this package's parameters.

Both name a ResNet's tensors alike: `conv1.weight`, `bn1.running_mean`, `layer1.0.conv1.weight`,
`layer2.0.downsample.0.weight`, `fc.bias`. Their convolution kernels are [out, in, height, width],
ours [height, width, in, out]; their dense kernels [out, in], ours [in, out].
"""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from ferjax.config import UserError
from ferjax.models.resnet import DEPTHS

Path = tuple[str, ...]

IGNORED = "num_batches_tracked"  # torch's counter of BatchNorm updates: no weight

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TOP = {"stem_conv": "conv1", "stem_norm": "bn1", "classifier": "fc"}


def torch_name(path: Path, depth: int) -> str:
    """torchvision's name of a parameter or statistic of `models/resnet.py`.

    >>> torch_name(("blocks_2", "norms_0", "mean"), 18)
    'layer2.0.bn1.running_mean'
    """
    *modules, leaf = path
    if modules[0] in _TOP:
        return f"{_TOP[modules[0]]}.{_LEAVES[leaf]}"
    starts = list(itertools.accumulate(DEPTHS[depth][0], initial=0))
    block = int(modules[0].removeprefix("blocks_"))
    stage = max(s for s in range(4) if starts[s] <= block)
    kind, _, number = modules[1].rpartition("_")
    if modules[1] == "shortcut":
        part = "downsample.0"
    elif modules[1] == "shortcut_norm":
        part = "downsample.1"
    else:
        part = f"{'conv' if kind == 'convs' else 'bn'}{int(number) + 1}"
    return f"layer{stage + 1}.{block - starts[stage]}.{part}.{_LEAVES[leaf]}"


def convert(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[Path, tuple[int, ...]], depth: int
) -> dict[Path, np.ndarray]:
    """A file's tensors as our arrays, each one accounted for.

    A stem on three channels becomes one on one channel by the sum over its input channels: the
    same function of a grey image that is repeated. The classifier is left out where the file has
    none, or one of another number of classes.

    Args:
      tensors: the file's, by torchvision's names.
      wanted: paths of the network's parameters and statistics, with their shapes.
      depth: of the network, a key of `resnet.DEPTHS`.

    Returns:
      Arrays of the wanted shapes, float, by path.

    Raises:
      UserError: a tensor is missing, left over, of another shape or type, or not finite; names it.
    """
    names = {path: torch_name(path, depth) for path in wanted}
    head = {path: name for path, name in names.items() if path[0] == "classifier"}
    left = {n for n in tensors if not n.endswith(IGNORED)} - set(names.values())
    if left:
        raise UserError(f"it holds {_some(left)}, which ResNet-{depth} has not: set model.depth")
    missing = set(names.values()) - set(tensors)
    if missing - set(head.values()):
        lacking = _some(missing - set(head.values()))
        raise UserError(f"it lacks {lacking}, which ResNet-{depth} has: set model.depth")
    found = {p: _array(n, tensors[n]) for p, n in names.items() if n in tensors}
    if missing or any(found[path].shape != wanted[path] for path in head):
        found = {path: array for path, array in found.items() if path not in head}
    for path, array in found.items():
        shape = wanted[path]
        if path[0] == "stem_conv" and array.shape[2:3] == (3,) and shape[2] == 1:
            array = found[path] = array.sum(2, keepdims=True)
        if array.shape != shape:
            theirs, ours = tensors[names[path]].shape, _torch_shape(shape)
            raise UserError(f"{names[path]} is {list(theirs)}, the network needs {list(ours)}")
    return found


def _array(name: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor in our order of axes, checked."""
    if not np.issubdtype(tensor.dtype, np.floating):
        raise UserError(f"{name} is of type {tensor.dtype}: floats are needed")
    if not np.isfinite(tensor).all() or (name.endswith("running_var") and (tensor < 0).any()):
        raise UserError(f"{name} holds NaN, infinite or impossible values")
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim)
    return tensor.transpose(order) if order else tensor


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
    return tuple(shape[axis] for axis in order)


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
