"""The two snippets of the first README's LoRA section after changing only the import."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kiloq import AutoModelForCausalLM, AutoPeftModelForCausalLM, AutoTokenizer
from kiloq.checkpoint import load_dense, load_frozen, open_checkpoint
from kiloq.checkpoint.adapter_writer import write_adapter
from kiloq.checkpoint.fingerprint import Base
from kiloq.checkpoint.quantized_writer import write_quantized
from kiloq.errors import CheckpointError, ConfigError, RequestError
from kiloq.model import Transformer
from kiloq.quant.grid import Scheme, rtn
from kiloq.train.adapters import AdapterConfig, attach, stored

IDS = torch.arange(20)
Trained = Callable[..., tuple[Path, Transformer]]


@pytest.fixture
def trained(chat_folder: Path, tmp_path: Path) -> Trained:
    """An adapter with random values beside its base, both somewhere else than where they were made."""

    def make(*, quantized: bool = False, **adapter: object) -> tuple[Path, Transformer]:
        base = tmp_path / "models" / "base"
        if quantized:
            plain = load_dense(open_checkpoint(chat_folder)).named_parameters()
            codes = {name: rtn(one, Scheme(bits=8, group_size=None)) for name, one in plain if _is_matrix(name, one)}
            write_quantized(base, open_checkpoint(chat_folder), codes.items())
        else:
            shutil.copytree(chat_folder, base)
        checkpoint, config = open_checkpoint(base), AdapterConfig(rank=2, dropout=0.0, **adapter)
        model = (load_frozen if quantized else load_dense)(checkpoint, dtype="float32")
        attach(model, checkpoint, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        write_adapter(tmp_path / "runs" / "adapter", stored(model, config), model.config, base=Base.of(base))
        shutil.move(base, tmp_path / "elsewhere")
        shutil.move(tmp_path / "runs" / "adapter", tmp_path / "moved")
        return tmp_path / "moved", model.eval()

    return make


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2


@pytest.mark.parametrize("adapter", [{}, {"dora": True, "embeddings": "rows"}, {"quantized": True}], ids=str)
def test_the_snippets_of_the_readme_run(adapter: dict[str, object], trained: Trained, tmp_path: Path) -> None:
    path_to_adapter, together = trained(**adapter)
    new_model_directory = tmp_path / "new"

    model = AutoPeftModelForCausalLM.from_pretrained(
        path_to_adapter,  # path to the output directory
        device_map="auto",
        trust_remote_code=True,
    ).eval()

    merged_model = model.merge_and_unload()
    # max_shard_size and safe serialization are not necessary.
    # They respectively work for sharding checkpoint and save the model to safetensors
    merged_model.save_pretrained(new_model_directory, max_shard_size="2048MB", safe_serialization=True)

    tokenizer = AutoTokenizer.from_pretrained(
        path_to_adapter,  # path to the output directory
        trust_remote_code=True,
    )
    tokenizer.save_pretrained(new_model_directory)

    response, history = model.chat(tokenizer, "你好", history=None)
    assert history == [("你好", response)]
    again = AutoModelForCausalLM.from_pretrained(new_model_directory, device_map="auto").eval()
    inputs = tokenizer("你好", return_tensors="pt")
    assert again.generate(**inputs, do_sample=False).equal(model.generate(**inputs, do_sample=False))
    written = load_dense(open_checkpoint(new_model_directory), dtype="float32").logits(IDS)
    expected = together.logits(IDS)
    if adapter.get("quantized"):  # whose unquantised weights are kept in 16 bits
        assert (written - expected).norm() < 0.05 * expected.norm()
    else:
        torch.testing.assert_close(written, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(IDS[None]).logits[0], expected, rtol=0, atol=1e-4)


def test_a_type_may_be_asked_for_and_other_names_are_refused(trained: Trained) -> None:
    path, _ = trained()
    assert AutoPeftModelForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="device_maps"):
        AutoPeftModelForCausalLM.from_pretrained(path, device_maps="auto")
    with pytest.raises(RequestError, match="safetensors only"):
        AutoPeftModelForCausalLM.from_pretrained(path).save_pretrained(path.parent / "x", safe_serialization=False)


def test_what_is_no_adapter_or_has_lost_its_base_is_one_clear_error(trained: Trained, chat_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter\. AutoModelForCausalLM loads models"):
        AutoPeftModelForCausalLM.from_pretrained(chat_folder)
    path, _ = trained()
    shutil.rmtree(path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="was not found"):
        AutoPeftModelForCausalLM.from_pretrained(path)
