"""Accuracy against the share of labelled images: supervised, and each semi-supervised method.

python -m ferjax.sweep --sweep=configs/sweeps/label_ratio.py         WRN-28-2; a GPU or TPU
python -m ferjax.sweep --sweep=configs/sweeps/label_ratio.py --cpu   small CNN; two CPU cores
python -m ferjax.sweep --sweep=configs/sweeps/label_ratio.py --only='supervised_.*|fixmatch_.*'

All of it are 225 runs: with --cpu, at .5 to 1.5 hours each on two cores, 5 to 14 days. --only and
--seeds choose some. All runs of a network make as many steps: 16,200 on a GPU, 3,232 on a CPU
(FixMatch's at 10 %). At 100 % the unlabelled images are the labelled ones (data.unlabeled=all), so
each method has some.
"""

from ferjax.rows import Row, Sweep

METHODS = (
    "supervised",
    *("fixmatch", "flexmatch", "freematch", "softmatch", "adamatch", "uda", "ada_cm"),
    *("mean_teacher", "pi_model", "pseudo_label", "entropy_min", "vat", "mixmatch", "remixmatch"),
)
SHARES = (100, 50, 30, 20, 10)


def get_sweep(cpu: bool = False) -> Sweep:
    """Fifteen methods at five shares."""
    variant, steps = (":cpu", 3_232) if cpu else ("", 16_200)
    rows = []
    for method in METHODS:
        for share in SHARES:
            labels = {"data.labeled": f"{share}%"}
            if share == 100 and method != "supervised":
                labels["data.unlabeled"] = "all"
            rows.append(
                Row(
                    name=f"{method}_{share}",
                    config=f"configs/{method}.py{variant}",
                    changes=labels,
                    steps=steps,
                    beats="" if method == "supervised" else f"supervised_{share}",
                    on="C" if cpu else "G",
                    series=method,
                    x=share,
                )
            )
    return Sweep("Accuracy against the share of labels", rows, x_label="labelled images, %")
