"""The seed slides' table of CNN architectures, row by row.

python -m ferjax.sweep --sweep=configs/sweeps/seed_cnn_architectures.py

All labels, no augmentation. The slides name neither the split nor the schedule; what is assumed is
in configs/seeds/cnn_plain.py.
"""

from ferjax.rows import Row, Sweep

# What has been run on CPU cores; the others are left for a GPU.
ON_CPU = ("cnn_one_layer", "cnn_plain", "cnn_l2", "cnn_two_pools", "cnn_three_pools")
PUBLISHED = {
    "cnn_one_layer": 36.0,
    "cnn_three_pools": 56.0,
    "cnn_two_pools": 56.7,
    "cnn_plain": 58.9,
    "cnn_l2": 59.7,
    "cnn_strides": 58.6,
    "cnn_gaussian_dropout": 59.7,
    "cnn_64px": 59.7,
    "cnn_filters": 59.7,
}
NOTES = {
    "cnn_l2": "with 6 epochs 59.54 (public_test 59.68), which was read first",
}


def get_sweep(cpu: bool = False) -> Sweep:
    """Nine architectures; the same on a CPU and on a GPU."""
    del cpu
    source = "Seed slides, table of architectures: one run, split not named."
    rows = [
        Row(
            name=name,
            config=f"configs/seeds/{name}.py",
            published=published,
            source=source,
            reach=published,
            note=NOTES.get(name, ""),
            on="C" if name in ON_CPU else "G",
        )
        for name, published in PUBLISHED.items()
    ]
    return Sweep("The seed's CNN architectures", rows)
