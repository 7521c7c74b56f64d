"""DeepSpeed's ZeRO-2 and ZeRO-3 (arXiv 1910.02054) as a way of the processes of a run. The loop stays the one loop."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from kiloq.errors import ConfigError
from kiloq.model import Transformer

from .forward import Runtime
from .objective import B, Loss, Objective
from .ranks import Ranks
from .settings import ParallelConfig, TrainConfig
from .zero_config import filled, read_zero_config

_STALE_SECONDS = 600.0


class Zero(Ranks):
    """Gradients and moments (stage 2), and weights too (stage 3), each in parts over the processes.

    Its state is saved as each process's flat parts, so that a run goes on with the same number of them only.
    """

    def __init__(self, config: ParallelConfig, device: str) -> None:
        os.environ.setdefault("DS_ACCELERATOR", torch.device(device).type)
        self.path = Path(config.config)
        self.raw = read_zero_config(self.path)
        refuse_stale_locks(build_root())
        self.deepspeed = _import()
        super().__init__(config, device)
        self.stage: int = self.raw["zero_optimization"]["stage"]
        self.is_sharded = True
        self.engine: Any = None

    def spread(self, model: Transformer, runtime: Runtime) -> Transformer:
        """Whole and equal until `adopt`, which cuts it."""
        if runtime.compiled:
            raise ConfigError(
                "DeepSpeed moves weights between the modules of a model, which one compiled function hides from it; "
                "set loop.compile = off with parallel.kind = deepspeed."
            )
        torch.manual_seed(torch.initial_seed() + self.rank)
        self._equalise(model.to(self.device), self.data)
        return model

    def adopt(
        self, module: nn.Module, objective: Objective[B], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> tuple[Objective[B], torch.optim.Optimizer]:
        hidden = next(one.config.hidden_size for one in module.modules() if isinstance(one, Transformer))
        settings = filled(self.raw, self.path, config, world=self.world, hidden=hidden)
        # The loss multiplies by the head outside of the model's forward: hooks gather it around the whole step.
        self.engine, *_ = self.deepspeed.initialize(
            model=_Step(module, objective), optimizer=optimizer, config=settings, dist_init_required=False
        )

        def loss(batch: B) -> Loss:
            run = self.engine if torch.is_grad_enabled() else self.engine.module
            total, measures = run(batch)
            return Loss(total, measures)

        return loss, ZeroOptimizer(self.engine.optimizer)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over the processes; the loop's loss is a share of a sum."""
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    @contextmanager
    def gathering(self, module: nn.Module, *, is_last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        yield

    def clip(self, module: nn.Module, limit: float) -> float:
        """The norm only: the step itself scales to gradient_clipping, which is the recipe's."""
        zero = self.engine.optimizer
        groups = [float(zero.scaled_global_norm())] if self.stage == 2 else [float(n) for n in zero._get_norm_groups()]
        # What is not finite is -1 there.
        return float("inf") if min(groups) < 0 else sum(norm**2 for norm in groups) ** 0.5

    def gather(self, model: Transformer) -> bool:
        if self.stage == 2:
            return super().gather(model)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                with self.deepspeed.zero.GatheredParameters([parameter]):
                    kept = parameter.detach().to("cpu", copy=True) if self.is_first else torch.empty(0)
                module._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        return self.is_first

    def local_state(self) -> dict[str, Tensor]:
        zero = self.engine.optimizer
        found = {}
        for number, flat in enumerate(self._flat()):
            moments = zero.optimizer.state[flat]
            if not moments:  # as AdamW's first step makes them
                moments["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
            for key, value in {"weights": flat.detach(), **moments}.items():
                found[f"zero{self.stage}/{number}/{key} {self.rank + 1} of {self.world}"] = value
        return found

    def refill(self) -> None:
        zero = self.engine.optimizer
        if self.stage == 2:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(self._flat())):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero._post_step(set())

    def _flat(self) -> list[Tensor]:
        zero = self.engine.optimizer
        flat: list[Tensor] = (
            zero.single_partition_of_fp32_groups if self.stage == 2 else zero.fp32_partitioned_groups_flat
        )
        return flat


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimiser with the face of torch's: its groups and state are those of the AdamW within."""

    def __init__(self, zero: Any) -> None:
        super().__init__([torch.zeros(0)], {})
        self._zero = zero
        self.param_groups, self.state = zero.optimizer.param_groups, zero.optimizer.state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One clipped step of every part."""
        loss = None if closure is None else closure()
        self._zero.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also of a step that was left out, whose averaged gradients the next one would find."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if hasattr(zero, "all_grad_tensors"):  # stage 2; stage 3 overwrites its own
            zero.micro_step_id = -1
            zero._release_preflattened_grad_buffers()
            for key in zero.averaged_gradients:
                zero.averaged_gradients[key] = zero.all_grad_tensors[key] = None


class _Step(nn.Module):
    """A whole objective as one module, which is what DeepSpeed runs."""

    def __init__(self, module: nn.Module, objective: Objective[B]) -> None:
        super().__init__()
        self.module = module
        self.objective: Callable[[Any], Loss] = objective

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.objective(batch)
        return loss.total, {name: value.detach() for name, value in loss.measures.items()}


def build_root() -> Path:
    """Where torch keeps what DeepSpeed compiles at its first use."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def refuse_stale_locks(root: Path) -> None:
    """A build that was killed leaves its lock, and whoever finds it waits for ever."""
    for lock in root.glob("**/lock"):
        age = time.time() - lock.stat().st_mtime
        if age > _STALE_SECONDS:
            raise ConfigError(
                f"{lock} is {age / 60:.0f} minutes old: a build of DeepSpeed's code was killed, and every later run "
                "would wait for it. Remove that file, then run again."
            )
        print(f"{lock}: waiting for another process's build; if there is none, remove that file.", file=sys.stderr)


def _import() -> Any:
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise ConfigError(
            f"parallel.kind is deepspeed, which cannot be imported ({error}): pip install 'kiloq[deepspeed]'."
        ) from error
    logger.setLevel("WARNING")
    return deepspeed
