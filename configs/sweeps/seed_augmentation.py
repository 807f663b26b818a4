"""The seed slides' three strengths of Keras augmentation: published 63.14, 60.62 and 48.55 %.

python -m ferjax.sweep --sweep=configs/sweeps/seed_augmentation.py

Wanted: at least 64 % for the mildest, and the same order. Without augmentation 6 epochs, after
which the network knows its images; with it 24.
"""

from ferjax.rows import Row, Sweep

PUBLISHED = {20: 63.14, 40: 60.62, 90: 48.55}


def get_sweep(cpu: bool = False) -> Sweep:
    """No augmentation, then rotations of up to 20, 40 and 90 degrees."""
    del cpu
    source = (
        "Seed slides, augmentation. Their confusion matrix has private_test's class counts (one "
        "image is missing) and a diagonal of 57.8 %: that, not 63.14, compares with private_test."
    )
    rows = [
        Row(
            name=f"cnn_keras{degrees}",
            config=f"configs/seeds/cnn_keras{degrees}.py",
            published=published,
            source=source,
            reach=64.0 if degrees == 20 else None,
            note="" if degrees == 20 else "to stay below the row above, as published",
            on="C",
        )
        for degrees, published in PUBLISHED.items()
    ]
    plain = Row(
        name="cnn_plain",
        config="configs/seeds/cnn_plain.py",
        published=58.9,
        source="Seed slides, table of architectures: without augmentation.",
        on="C",
    )
    return Sweep("The seed's augmentation", [plain, *rows])
