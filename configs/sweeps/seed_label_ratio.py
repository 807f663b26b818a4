"""The seed slides' CNN with 10 to 100 % of the labels: published 40/45/49/53/59 %.

python -m ferjax.sweep --sweep=configs/sweeps/seed_label_ratio.py

Supervised, as published. Ours: mild augmentation, and more epochs with fewer labels.
"""

from ferjax.rows import Row, Sweep

PUBLISHED = {10: 40, 20: 45, 30: 49, 50: 53, 100: 59}
# With 50 % 12 epochs ended at 57.76 % of public_test, still rising.
EPOCHS = {10: 40, 20: 20, 30: 14, 50: 20, 100: 24}


def get_sweep(cpu: bool = False) -> Sweep:
    """Five shares; the same on a CPU and on a GPU."""
    del cpu
    rows = [
        Row(
            name=f"cnn_labels_{share}",
            config="configs/seeds/cnn_few_labels.py",
            changes={
                "data.labeled": "all" if share == 100 else f"{share}%",
                "epochs": EPOCHS[share],
            },
            published=published,
            source="Seed slides, CNN by share of labels: their own split, without augmentation.",
            reach=published + 5,
            note="held back by the L2 term, without which cnn_keras20 is" if share == 100 else "",
            on="C",
            series="seed CNN",
            x=share,
        )
        for share, published in PUBLISHED.items()
    ]
    return Sweep("The seed's CNN by share of labels", rows, x_label="labelled images, %")
