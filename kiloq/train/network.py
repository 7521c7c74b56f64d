"""The network that a run trains: read and made trainable at its start, written at its end. For every method alike."""

import dataclasses
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from kiloq.checkpoint import Checkpoint, GenerationDefaults, load_dense, load_frozen
from kiloq.checkpoint.fingerprint import Base
from kiloq.errors import ConfigError
from kiloq.model import Transformer

from . import adapters
from .adapters import AdapterConfig
from .forward import Runtime
from .parallel import Alone, Parallel
from .run_folder import export


class NetworkRecipe(Protocol):
    """What of any method's recipe decides its network."""

    @property
    def out(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def adapter(self) -> AdapterConfig | None: ...


def read_network(
    recipe: NetworkRecipe,
    checkpoint: Checkpoint,
    runtime: Runtime,
    parallel: Parallel | None = None,
    *,
    headless: bool = False,
) -> tuple[Transformer, str]:
    """The checkpoint's network and a line on what of it is trained, which alone requires gradients and is fp32.

    What an adapter leaves frozen is in the type that products run in, or in codes; ConfigError where the run has begun
    on another model. Of several processes each holds what `parallel` gives it. `headless` is without the matrix that
    makes logits, where a full run would have to train it.
    """
    parallel = parallel or Alone()
    if recipe.adapter is None:
        _refuse_codes(recipe, checkpoint)
        model = load_dense(checkpoint, dtype=torch.float32).requires_grad_(True)
        if headless and not model.config.tie_embeddings:
            model.head = nn.Identity()
            model.config = dataclasses.replace(model.config, tie_embeddings=True)
    else:
        kind = None if checkpoint.quantization else recipe.adapter.quantization
        base = Base.of(checkpoint.folder, recipe.model, quantization=kind)
        with parallel.first_goes_ahead():
            adapters.claim_base(Path(recipe.out), base)
        if kind is None and checkpoint.quantization is None:
            model = load_dense(checkpoint, dtype=runtime.dtype)
        else:
            model = load_frozen(checkpoint, kind=kind or "auto", dtype=runtime.dtype, device=runtime.device)
        torch.manual_seed(recipe.seed)  # of dropout; a run that goes on has its own state
        adapters.attach(model, checkpoint, recipe.adapter, seed=recipe.seed)
        described = adapters.describe(model) + adapters.begun_elsewhere(recipe.adapter, base)
        return parallel.spread(model, runtime), described
    return parallel.spread(model, runtime), adapters.describe(model)


def _refuse_codes(recipe: NetworkRecipe, checkpoint: Checkpoint) -> None:
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"{recipe.model} is quantised ({checkpoint.quantization.label}), and codes cannot be trained. Add an "
            "[adapter] table (Q-LoRA), or train the unquantised model."
        )


def write_network(
    recipe: NetworkRecipe,
    model: Transformer,
    checkpoint: Checkpoint,
    generation: GenerationDefaults,
    parallel: Parallel | None = None,
    *,
    score: Tensor | None = None,
) -> Path:
    """Write what was trained below the run's folder; where it is. The first of several processes writes. `score` is a
    reward model's row, beside an adapter."""
    folder = trained_folder(recipe)
    if not (parallel or Alone()).gather(model):
        return folder
    if recipe.adapter is None:
        export(folder, model, checkpoint.tokenizer, generation)
    else:
        adapters.export(
            folder,
            model,
            recipe.adapter,
            base=Base.read(Path(recipe.out)),
            generation=generation.to_json(model.config.family, checkpoint.tokenizer),
            score=score,
        )
    return folder


def trained_folder(recipe: NetworkRecipe) -> Path:
    """Where a run leaves what it has trained."""
    return Path(recipe.out) / ("model" if recipe.adapter is None else "adapter")
