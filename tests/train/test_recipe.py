from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from kiloq.errors import ConfigError
from kiloq.train.optim import OptimConfig
from kiloq.train.pretrain import PretrainConfig
from kiloq.train.recipe import load_recipe, parse_config, to_toml
from kiloq.train.rollouts import RolloutConfig
from kiloq.train.sft import SftConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    mode: Literal["fast", "slow"] = "fast"
    limit: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    parts: tuple[Part, ...] = ()


def test_a_table_becomes_nested_dataclasses() -> None:
    whole = parse_config(Whole, {"name": "x", "limit": 2, "parts": [{"size": 1}, {"size": 2, "rate": 1}]})
    assert whole == Whole(name="x", limit=2.0, parts=(Part(size=1), Part(size=2, rate=1.0)))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"nmae": "x"}, r"^nmae is not a setting\. Did you mean name\?"),
        ({"name": "x", "parts": [{"sise": 1}]}, r"parts\[0\]\.sise is not a setting\. Did you mean size\?"),
        ({"name": "x", "zzz": 1}, r"zzz is not a setting\. Known here: name, mode"),
        ({}, "name is missing"),
        ({"name": 3}, "name is 3; it must be of type str"),
        ({"name": "x", "parts": [{"size": True}]}, r"parts\[0\]\.size is True; it must be of type int"),
        ({"name": "x", "mode": "medium"}, "mode is 'medium'; it is one of fast, slow"),
        ({"name": "x", "pair": [1]}, "pair has 1 entries; it needs 2"),
        ({"name": "x", "parts": {"size": 1}}, "it must be a list"),
    ],
)
def test_a_fault_names_its_key(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(Whole, table)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\n[[parts]]\nsize = 1\n')
    whole = load_recipe(Whole, path, ["limit=2.5", "name=plain text", "mode = slow"])
    assert whole == Whole(name="plain text", mode="slow", limit=2.5, parts=(Part(size=1),))


@pytest.mark.parametrize("flag", ["limit", "=3", "name.deeper=1"])
def test_a_flag_of_the_wrong_form_is_refused(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\n')
    with pytest.raises(ConfigError, match="--set"):
        load_recipe(Whole, path, [flag])


def test_a_file_that_is_missing_or_not_toml_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(Whole, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(Whole, tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "config",
    [
        parse_config(
            PretrainConfig,
            {
                "out": 'runs/"a"\\b',
                "tokenizer": "t",
                "data": [{"name": "한글", "path": "p"}, {"name": "b", "path": "q", "repeat": 0.5}],
                "optim": {"lr": 1e-3, "steps": 7},
                "loop": {"max_minutes": 5},
            },
        ),
        parse_config(SftConfig, {"out": "o", "model": "m", "data": [{"path": "p"}], "optim": {"lr": 1e-5}}),
    ],
)
def test_a_whole_configuration_survives_toml(tmp_path: Path, config: object) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_recipe(type(config), path) == config


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="above zero"):
        OptimConfig(lr=0.0)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("optim.lr=nan", "optim.lr is nan; it must be a finite number"),
        ("seed=-1", "seed is -1; it must be from 0"),
        ("seed=99999999999999999999", "seed is 9+; it must be from 0"),
        ("epochs=inf", "epochs is inf; it must be a finite number"),
        ("loop.checkpointing=1", "loop.checkpointing is 1; it is one of none"),
        ("loop.eval_tokens=-5", "loop.eval_tokens is -5; it must be at least 1"),
        ("parallel.tensor=0", "parallel.tensor is 0; it must be at least 1"),
        ("answer.top_p=7", r"answer\.top_p is 7.0; it must be from 0 to 1"),
        ("answer.top_k=-9", r"answer\.top_k is -9; it must be at least -1"),
        ("data=[]", "data is empty"),
        ("out=''", "out is empty"),
        ("held=[{name='a', path='b'}, {name='a', path='c'}]", "held has 2 entries of the name 'a'"),
        ("adapter.rank=100000", "adapter has rank 100000.*from 1 to 1,024"),
    ],
)
def test_a_number_that_no_run_can_use_is_refused_before_it_begins(tmp_path: Path, flag: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('out = "run"\nmodel = "m"\ndata = [{path = "d"}]\n[optim]\nlr = 1e-3\n')
    with pytest.raises(ConfigError, match=said):
        load_recipe(SftConfig, path, [flag])


def test_rollouts_draw_from_a_share_of_the_likeliest_tokens() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.top_p is 7.0; it must be from 0 to 1"):
        parse_config(RolloutConfig, {"top_p": 7}, "rollout.")


def test_a_recipe_may_begin_with_a_mark_and_other_encodings_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "x"')
    assert load_recipe(Whole, path).name == "x"
    path.write_bytes('name = "x"'.encode("utf-16"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_recipe(Whole, path)


@pytest.mark.parametrize("text", ['"\\', "a\tb\r\n", "\x00\x07\x1f\x7f\x85", "\u2028 你好"])
def test_any_text_survives_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(Whole(name=text)), encoding="utf-8", newline="")
    assert load_recipe(Whole, path).name == text
