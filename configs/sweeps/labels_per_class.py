"""FixMatch and others with 10, 25, 100 and 250 labels a class, after Roy & Etemad (2022).

python -m ferjax.sweep --sweep=configs/sweeps/labels_per_class.py          a GPU or TPU
python -m ferjax.sweep --sweep=configs/sweeps/labels_per_class.py --cpu    two CPU cores

Theirs: as many labels of each class, the others unlabelled, 2^20 steps, the best checkpoint by the
test images. Ours: a fiftieth of the steps, of WRN-28-2 on a GPU, 3,232 of the small CNN on a CPU,
the best checkpoint by public_test, private_test read once. Their supervised figures for these
counts are not known to us.
"""

from ferjax.rows import Row, Sweep

COUNTS = (10, 25, 100, 250)
PUBLISHED = {
    "pi_model": (37.09, 40.87, 50.66, 56.42),
    "pseudo_label": (32.79, 36.04, 49.21, 54.88),
    "mean_teacher": (45.21, 55.14, 52.17, 58.06),
    "vat": (24.95, 55.22, 51.55, 55.64),
    "uda": (46.72, 49.89, 50.62, 60.68),
    "mixmatch": (45.69, 46.41, 55.73, 58.27),
    "remixmatch": (41.07, 43.25, 44.62, 57.49),
    "fixmatch": (47.88, 49.90, 59.46, 62.20),
}
STEPS = 2**20 // 50
SOURCE = "Roy & Etemad (2022): 2^20 steps, checkpoint picked on test; ours: fewer, on public_test."


def get_sweep(cpu: bool = False) -> Sweep:
    """Their eight methods and the supervised baseline at four counts."""
    variant, steps = (":cpu", 3_232) if cpu else ("", STEPS)
    rows = []
    for method in ("supervised", *PUBLISHED):
        for i, count in enumerate(COUNTS):
            published = PUBLISHED[method][i] if method in PUBLISHED else None
            rows.append(
                Row(
                    name=f"{method}_{count}_a_class",
                    config=f"configs/{method}.py{variant}",
                    changes={"data.labeled": f"{count}/class"},
                    steps=steps,
                    published=published,
                    source=SOURCE if published else "",
                    reach=None if cpu else published,
                    on="C" if cpu else "G",
                    series=method,
                    x=count,
                )
            )
    return Sweep("Few labels of each class", rows, x_label="labels a class")
