"""Configs of the training options: what they refuse, what reaches the step, the two recipes."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.engine import assemble
from ferjax.engine.experiment import Experiment
from ferjax.engine.parallel import host

CONFIGS = Path(__file__).parent.parent / "configs"


def tiny(**data):
    c = configs.base()
    c.data.name = "synthetic_faces/tiny"
    c.batch_size = 8
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "layers": ("conv 4 3", "gap")}
    c.data.update(data)
    return c


@pytest.mark.parametrize(
    ("data", "algorithm", "message"),
    [
        ({"sampling": "even"}, {}, r"config\.data\.sampling=even: there are balanced, uniform"),
        ({"illumination": "clache"}, {}, "did you mean clahe"),
        ({"crop": -1}, {}, r"config\.data\.crop=-1: it must not be negative"),
        ({"illumination": "standardize", "mean": (0.4,)}, {}, "mean=.*takes each view's own"),
        ({"sampling": "balanced"}, {"weighting": "balanced"}, "weighting=balanced: .* alike"),
        ({"sampling": "balanced"}, {"logit_adjustment": 1.0}, "logit_adjustment=1.0: .* alike"),
    ],
)
def test_wrong_combinations_get_one_line(data, algorithm, message):
    c = tiny(**data)
    c.algorithm.update(algorithm)
    with pytest.raises(UserError, match=message) as error:
        configs.finalize(c)
    assert "\n" not in str(error.value)


def test_alternating_flips_need_passes():
    c = tiny(sampling="balanced")
    c.views.weak = {"policy": "none", "flip": 0.5, "flip_style": "alternate"}
    with pytest.raises(UserError, match="flip_style=alternate"):
        configs.finalize(c)


def test_what_reaches_the_step(data_dir, tmp_path, monkeypatch):
    seen = {}
    make_step = assemble.make_step

    def spy(*args, **options):
        seen.update(options)
        return make_step(*args, **options)

    monkeypatch.setattr(assemble, "make_step", spy)
    c = tiny(labeled="30", sampling="balanced")
    c.update(on_nan="skip", microbatches=2, ema_decay=0.5)
    run = Experiment(configs.finalize(c), tmp_path)
    labels = run.dataset.splits["train"].labels
    counts = np.bincount(labels[run.subsets.labeled], minlength=7)
    assert counts.sum() == 30
    assert list(seen["class_counts"]) == counts.tolist()
    assert seen["alternating"] is None
    assert (seen["skip_not_finite"], seen["microbatches"], seen["ema_decay"]) == (True, 2, 0.5)
    shown = np.concatenate([run.batches["labeled"](s) for s in range(7)])
    assert np.bincount(labels[shown], minlength=7).tolist() == [8] * 7
    assert set(shown) <= set(run.subsets.labeled)


@pytest.mark.parametrize(
    ("platform", "asked", "per_epoch", "stop_after", "expected"),
    [
        ("cpu", 0, 3, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("cpu", 4, 10, 0, [4, 8, 10, 14, 18, 20, 24, 28, 30]),
        ("cpu", 4, 10, 17, [4, 8, 10, 14, 17, 18, 20, 24, 28, 30]),
        ("gpu", 0, 57, 0, [19, 38, 57, 76, 95, 114, 133]),  # 3 x 19
        ("gpu", 0, 37, 0, [16, 32, 37, 53, 69, 74]),  # a prime
        ("tpu", 0, 5, 0, [5, 10]),
    ],
)
def test_where_calls_of_several_steps_end(platform, asked, per_epoch, stop_after, expected):
    """No call goes beyond an epoch's end or a stop, and a run that goes on falls into step."""
    config = types.SimpleNamespace(steps_per_call=asked, stop_after_steps=stop_after)
    layout = types.SimpleNamespace(platform=platform)
    run = types.SimpleNamespace(
        config=config, layout=layout, per_epoch=per_epoch, steps=expected[-1], streamed=False
    )
    run._steps_a_call = lambda: Experiment._steps_a_call(run)
    step, found = 0, []
    while step < run.steps:
        step = Experiment.next_stop(run, step)
        found.append(step)
    assert found == expected


def test_streamed_calls_are_short_where_images_are_large():
    """64 MiB a call and process: of 512 images of 48 pixels 16 steps, of 224 in colour one."""
    for shape, processes, per_epoch, expected in (
        ((48, 48, 1), 1, 64, 16),
        ((96, 96, 3), 1, 64, 4),
        ((96, 96, 3), 1, 57, 3),  # a divisor
        ((96, 96, 3), 1, 37, 4),
        ((96, 96, 3), 4, 64, 16),
        ((224, 224, 3), 1, 64, 1),
    ):
        train = types.SimpleNamespace(images=np.empty((0, *shape), np.uint8))
        run = types.SimpleNamespace(
            config=types.SimpleNamespace(steps_per_call=0, stop_after_steps=0),
            layout=types.SimpleNamespace(platform="gpu", processes=processes),
            dataset=types.SimpleNamespace(splits={"train": train}),
            batches={part: types.SimpleNamespace(size=256) for part in ("labeled", "unlabeled")},
            **{"per_epoch": per_epoch, "steps": 640, "streamed": True},
        )
        run._steps_a_call = lambda run=run: Experiment._steps_a_call(run)
        assert Experiment.next_stop(run, 0) == expected


def test_a_crop_beyond_the_images_is_refused_before_anything_is_compiled(data_dir, tmp_path):
    run = Experiment(configs.finalize(tiny(crop=49)), tmp_path)
    with pytest.raises(UserError, match=r"config\.data\.crop=49: the images have 48 x 48 pixels"):
        run.init_state()


def test_the_73_recipe_is_what_it_says():
    c = configs.finalize(configs.from_file(CONFIGS / "recipe73.py"))
    view = c.views.weak
    assert (c.epochs, c.batch_size, c.data.crop, c.data.channels) == (300, 128, 40, 1)
    assert (c.model.name, c.model.depth, c.model.stem) == ("resnet", 18, "cifar")
    assert (c.algorithm.mixup, c.algorithm.label_smoothing) == (1.0, 0.1)
    assert (c.optimizer.name, c.optimizer.nesterov, c.optimizer.momentum) == ("sgd", True, 0.9)
    assert (c.optimizer.learning_rate, c.optimizer.weight_decay) == (0.1, 1e-4)
    assert (view.resized_crop, view.shift, view.rotation) == ((0.8, 1.2), (0.2, 0.2), 10)
    assert (view.affine_p, view.jitter_p, view.brightness, view.contrast) == (0.5, 0.5, 0.5, 0.5)
    assert (view.flip, view.erase) == (0.5, 0.5)


def test_two_steps_of_the_speedrun_on_a_cpu(data_dir, tmp_path):
    c = configs.from_file(CONFIGS / "speedrun.py", "cpu")
    c.data.name = "synthetic_faces/tiny"
    # Its own network takes most of a minute to compile here, and trains in other tests.
    c.model.layers = ("space_to_depth 2", "conv 8 3 nobias", "bn", "relu", "gap")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        run = Experiment(configs.finalize(c), tmp_path)
        state, data = run.layout.replicate(run.init_state()), run.device_data()
        start = host(state)
        for step in range(2):
            state, metrics, _ = run.call(state, step, step + 1, data, [False, False])
            total, weight = host(metrics)["loss"]
            assert 0.5 < float(total[0] / weight[0]) < 10
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params, host(state).params)
    assert min(jax.tree.leaves(moved)) > 0
    assert [run.evaluates_at(s) for s in (1, run.per_epoch, run.steps)] == [False, False, True]
