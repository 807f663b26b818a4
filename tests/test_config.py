"""Configs: defaults, overrides, and what wrong ones get."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.main import config_name, unused_gpu

CONFIGS = Path(__file__).parent.parent / "configs"


def changed(**sections):
    c = configs.base().to_dict()
    for key, value in sections.items():
        if isinstance(value, dict) and key not in ("algorithm", "model", "views"):
            for k, v in value.items():
                c[key][k] = v
        else:
            c[key] = value
    return c


def test_every_field_of_the_open_sections_is_filled_in():
    c = configs.finalize(changed(algorithm={"name": "fixmatch", "mu": 3}))
    assert c.algorithm.mu == 3
    assert c.algorithm.threshold == 0.95
    assert c.model.preset == "small"
    assert c.views.weak.flip == 0.5
    assert c.views.strong.ops == 2


def test_an_integer_is_taken_for_a_float():
    c = configs.finalize(
        changed(optimizer={"clip_norm": 2}, algorithm={"name": "fixmatch", "lambda_u": 1})
    )
    assert isinstance(c.optimizer.clip_norm, float)
    assert isinstance(c.algorithm.lambda_u, float)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"epoch": 3}, r"config.epoch is not a key: did you mean epochs\?"),
        ({"optimizer": {"learningrate": 0.1}}, "optimizer.learningrate .* learning_rate"),
        ({"algorithm": {"name": "fixmatsh"}}, "no 'fixmatsh' in ferjax/algorithms: .*fixmatch"),
        ({"algorithm": {"name": "base"}}, "no 'base' in ferjax/algorithms"),
        ({"algorithm": {"name": "../x"}}, "no '../x' in ferjax/algorithms"),
        ({"algorithm": {"name": "fixmatch", "treshold": 0.9}}, "did you mean threshold"),
        (
            {"algorithm": {"name": "supervised", "threshold": 0.9}},
            "algorithm.threshold is not a key",
        ),
        ({"model": {"name": "resnett"}}, "did you mean resnet"),
        ({"model": {"name": "layers"}}, "no 'layers' in ferjax/models"),
        ({"data": {"name": "fer2031"}}, "did you mean fer2013"),
        ({"views": {"weak": {"policy": "weka"}}}, "did you mean weak"),
        ({"views": {"weak": {"policy": "weak", "flips": 1.0}}}, "did you mean flip"),
        ({"views": {"weak": {"flip": 0.5}}}, "views.weak needs a policy"),
        ({"epochs": "three"}, "config.epochs='three': expected int, such as 30"),
        ({"epochs": 2.5}, "expected int"),
        ({"data": {"std": (float("inf"),)}}, r"data.std=\(inf,\): expected a finite number"),
        ({"optimizer": 3}, "this is a section"),
        ({"epochs": 0}, "must be greater than 0"),
        ({"seed": -1}, "must not be negative"),
        ({"ema_decay": 1.0}, r"must be in \[0, 1\)"),
        ({"dtype": "float16"}, "config.dtype=float16: did you mean bfloat16"),
        ({"parallel": "pmpa"}, "did you mean pmap"),
        ({"data": {"mean": (0.1, 0.2)}}, "one value, or one for each of 1 channels"),
    ],
)
def test_wrong_configs_get_one_line(sections, message):
    with pytest.raises(UserError, match=message) as error:
        configs.finalize(changed(**sections))
    assert "\n" not in str(error.value)


def test_saved_and_loaded_configs_are_equal(tmp_path):
    c = configs.finalize(configs.base())
    configs.save(c, tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json") == c
    assert configs.differences(c, configs.load(tmp_path / "config.json")) == []


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"epochs": 3, "nothing": 1}', '"x"', '{"a.b": 1}'),
        '{"views": {"weak": {"policy": {}}}}',
    ],
)
def test_a_config_from_elsewhere_is_checked(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        configs.load(tmp_path / "config.json")


def test_missing_config_names_the_workdir(tmp_path):
    with pytest.raises(UserError, match="a ferjax workdir"):
        configs.load(tmp_path / "config.json")


def test_only_what_cannot_change_the_training_may_differ():
    old = configs.finalize(configs.base())
    free = changed(
        parallel="shard_map", stop_after_steps=3, log_every=7, data={"source": "elsewhere"}
    )
    assert configs.differences(old, configs.finalize(free)) == []
    c = configs.finalize(changed(epochs=31, optimizer={"momentum": 0.8}))
    assert configs.differences(old, c) == ["epochs: 30 -> 31", "optimizer.momentum: 0.9 -> 0.8"]


# Those in configs/sweeps are no configs: tests/test_sweep.py.
FILES = sorted(path for path in CONFIGS.rglob("*.py") if path.parent.name != "sweeps")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_file_is_whole_and_says_its_command(path):
    named = re.findall(rf"configs/.*{path.name}(?::(\w+))?", path.read_text().split('"""')[1])
    variants = sorted({"", *named})
    for variant in variants:
        configs.finalize(configs.from_file(path, variant))
    docstring = path.read_text().split('"""')[1]
    assert f"--config={path.relative_to(CONFIGS.parent)}" in docstring


def test_config_file_errors(tmp_path):
    with pytest.raises(UserError, match="is not a config file"):
        configs.from_file(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines no get_config"):
        configs.from_file(tmp_path / "empty.py")
    with pytest.raises(UserError, match="no variant 'gpu'"):
        configs.from_file(CONFIGS / "fixmatch.py", "gpu")


def test_workdir_names():
    assert config_name("configs/fixmatch.py:cpu") == "fixmatch_cpu"
    assert config_name("/a/configs/seeds/x.py") == "seeds_x"
    assert config_name("my.py") == "my"


def test_json_is_plain(tmp_path):
    configs.save(configs.finalize(configs.base()), tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["data"]["mean"] == [0.5077]


def test_an_nvidia_gpu_that_is_not_used_gets_a_line(monkeypatch):
    assert unused_gpu() == ""  # the suite sets JAX_PLATFORMS=cpu: that is a choice
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("ferjax.main.os.path.exists", lambda path: "nvidia" in str(path))
    assert "pip install '.[cuda]'" in unused_gpu()
    monkeypatch.setattr("ferjax.main.find_spec", lambda name: name == "jax_cuda13_plugin")
    assert "wants a newer driver" in unused_gpu()
    monkeypatch.setattr("ferjax.main.os.path.exists", lambda path: False)
    assert unused_gpu() == ""


def test_switching_modules_keeps_what_was_asked_for():
    file = {"algorithm": {"name": "fixmatch", "mu": 4, "threshold": 0.9}, "model": {"name": "cnn"}}
    given = {**file, "algorithm": {"name": "supervised", "mu": 4, "threshold": 0.5}}
    # mu and the file's threshold go; a threshold that the command line gave stays, to be refused.
    assert configs.switch_modules(given, file)["algorithm"] == {
        "name": "supervised",
        "threshold": 0.5,
    }
    assert configs.switch_modules(file, file) == file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("c = base()\nc.optimiser.learning_rate = 0.1\n", "line 2: AttributeError: .*optimiser"),
        ("from ferjax.nothing import x\n", "line 1: ModuleNotFoundError"),
        (
            "from ferjax.config import base\n\n\n"
            "def get_config():\n    c = base()\n    c.epochs = 'ten'\n    return c\n",
            "TypeError: .*line 6",
        ),
        ("def f(:\n", "line 1: SyntaxError: "),
        ("def get_config():\n    return int('x')\n", "ValueError: invalid literal .*line 2"),
    ],
)
def test_a_mistake_in_a_config_file_is_named_by_its_line(text, said, tmp_path):
    path = tmp_path / "mine.py"
    head = "from ferjax.config import base; " if text.startswith("c =") else ""
    path.write_text(head + text)
    code = (
        "from absl import flags; from ml_collections import config_flags;"
        "from ferjax.command import run;"
        "config_flags.DEFINE_config_file('config'); run(lambda: 0)"
    )
    args = [sys.executable, "-c", code, f"--config={path}"]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"ferjax: .*{said}.*\n", done.stderr), done.stderr
    assert str(path) in done.stderr


@pytest.mark.parametrize("key", ["seed", "split_seed"])
def test_seeds_fit_into_32_bits(key):
    sections = {"seed": 2**32} if key == "seed" else {"data": {key: 2**32}}
    with pytest.raises(UserError, match=f"{key}=4294967296: it must be below 2"):
        configs.finalize(changed(**sections))
