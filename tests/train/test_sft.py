import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kiloq.chat import Message, chat_format_for, render
from kiloq.checkpoint import GenerationDefaults, load_dense, open_checkpoint
from kiloq.errors import CheckpointError, ConfigError, DataError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.optim import OptimConfig
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.run_folder import export, only_run_in, replacing
from kiloq.train.settings import BatchConfig, LoopConfig
from kiloq.train.sft import AnswerConfig, ChatSource, HeldOut, SftConfig, sft

TALK = {"hi": "Hello!", "你好": "你好！", "안녕": "안녕!", "1+1?": "2"}


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> SftConfig:
    shape = ShapeConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, trained_length=128)
    model = Transformer(qwen1_config(shape, tokenizer.size))
    model.init_weights(torch.Generator().manual_seed(0))
    end = tokenizer.end_of_text_id
    raw = GenerationDefaults(stop_ids=(end,), pad_id=end, chat_format="raw", max_window=512)
    export(tmp_path / "base", model, tokenizer, raw)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in TALK.items()
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SftConfig(
        out=str(tmp_path / "run"),
        model=str(tmp_path / "base"),
        answer=AnswerConfig(temperature=0.5),
        data=(ChatSource(path=str(tmp_path / "chat.jsonl")),),
        held=(HeldOut(name="same", path=str(tmp_path / "chat.jsonl")),),
        batch=BatchConfig(seq_len=160, tokens=320),
        optim=OptimConfig(lr=1e-2, steps=60, warmup_steps=5, weight_decay=0.0),
        loop=LoopConfig(device="cpu", precision="fp32", compile="off", log_every=5, save_every=1000, eval_every=1000),
    )


def log_of(config: SftConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def answer_of(folder: Path, question: str) -> str:
    """Greedy, by recomputing everything for each token."""
    checkpoint = open_checkpoint(folder)
    model = load_dense(checkpoint, dtype=torch.float32)
    fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
    ids = render([Message(role="user", content=question)], checkpoint.tokenizer, fmt).ids
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 40:
            answer.append(int(model.logits(torch.tensor(ids + answer))[-1].argmax()))
            if answer[-1] in checkpoint.generation.stop_ids:
                return checkpoint.tokenizer.decode(answer[:-1])
    return checkpoint.tokenizer.decode(answer) + " (did not stop)"


def test_a_tiny_set_is_learned_by_heart_and_answers_stop(config: SftConfig) -> None:
    assert sft(config) == "finished"
    losses = [line["loss"] for line in log_of(config) if "loss" in line]
    assert losses[-1] < 0.1
    assert next(line["eval/same"] for line in log_of(config) if "eval/same" in line) < 0.1
    model = Path(config.out) / "model"
    generation = open_checkpoint(model).generation
    assert generation.chat_format == "chatml"
    assert (generation.temperature, generation.max_window) == (0.5, 512)  # the recipe's wish, the base's own
    assert {question: answer_of(model, question) for question in TALK} == TALK


def test_epochs_decide_the_steps_where_they_are_left_open(config: SftConfig) -> None:
    # Four samples of about 70 bytes make two rows of 160, which are one step.
    sft(replace(config, epochs=3.0, optim=replace(config.optim, steps=0)))
    assert max(line["step"] for line in log_of(config)) == 3


def test_a_fault_in_the_data_comes_before_the_first_step(config: SftConfig) -> None:
    path = Path(config.data[0].path)
    path.write_text('{"messages": []}\n{"instruction": "x"}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"2 bad rows:\n.*line 1: messages is not a list of turns.*\n.*line 2: output is missing"
    ):
        sft(config)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no rows"):
        sft(config)
    assert not Path(config.out).exists()


def test_bad_rows_are_left_out_and_counted_where_the_recipe_allows_it(config: SftConfig) -> None:
    with Path(config.data[0].path).open("a", encoding="utf-8") as file:
        file.write('\n{"instruction": "x"}\n')
    sft(replace(config, bad_rows="skip", held=(), optim=replace(config.optim, steps=1)))
    log = (Path(config.out) / "log.jsonl").read_text(encoding="utf-8")
    assert "left out: 1 row, first " in log
    assert "each answer is trained to end with <|im_end|> (258)" in log
    assert "sample 3: " in log


def test_how_a_step_is_split_into_micro_batches_changes_no_bit(
    config: SftConfig, tmp_path: Path, saved_weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    def trained(tokens: int, accumulate: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        run = replace(
            config,
            out=str(tmp_path / f"{accumulate}"),
            batch=BatchConfig(seq_len=160, tokens=tokens, accumulate=accumulate),
            optim=replace(config.optim, steps=5),
            loop=replace(config.loop, log_every=1),
        )
        sft(run)
        return saved_weights(Path(run.out)), [line["loss"] for line in log_of(run) if "loss" in line]

    rows = [
        {"instruction": f"{question} {i}", "output": answer * (i + 1)}
        for i in range(4)
        for question, answer in TALK.items()
    ]
    Path(config.data[0].path).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    expected, losses = trained(640, 1)
    assert len(losses) == 5
    for tokens, accumulate in ((160, 4), (320, 2)):
        weights, same = trained(tokens, accumulate)
        assert same == losses
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(config: SftConfig) -> None:
    folder = Path(config.out)
    with only_run_in(folder), pytest.raises(ConfigError, match="another run is training in"):
        sft(config)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_a_result_of_something_else_is_not_replaced(config: SftConfig, name: str) -> None:
    (Path(config.out) / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{name} is there already.*no recipe"):
        sft(config)


def test_what_cannot_be_written_leaves_the_earlier_result_and_no_traceback(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("earlier")
    with pytest.raises(CheckpointError, match=r"model could not be written: .*No space"), replacing(folder):
        raise OSError(28, "No space left on device")
    assert (folder / "weights").read_text() == "earlier"
    with replacing(folder) as new:
        new.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list(folder.iterdir())


def test_a_damaged_recipe_of_the_run_is_one_clear_error(config: SftConfig) -> None:
    short = replace(config, optim=replace(config.optim, steps=2))
    sft(short)
    (Path(config.out) / "recipe.toml").write_text("out = ")
    with pytest.raises(ConfigError, match="recipe of the run there, cannot be read"):
        sft(short)


def test_a_folder_where_nothing_can_be_written_is_one_clear_error(config: SftConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="where nothing can be written: Not a directory"):
        sft(replace(config, out=str(tmp_path / "file" / "run")))
    with pytest.raises(ConfigError, match=r"where nothing can be written: .*null byte"), only_run_in(Path("a\0b")):
        pass
