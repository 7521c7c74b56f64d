"""Several processes that train one model: each on other batches (DDP, FSDP2), or groups of them, of which each shares
the blocks of one model (tensor parallel). Knows no method and no file."""

import atexit
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kiloq.errors import ConfigError, LostProcessError
from kiloq.model import Transformer, shard
from kiloq.model.trained_lora import Frozen

from .buckets import Buckets
from .forward import Runtime
from .objective import B, Objective
from .parallel import T
from .pieces import Layout, Range, local_of, part, whole
from .settings import ParallelConfig, TrainConfig

_TRAINED_BYTES = 16  # of a trained weight: itself, its gradient and two moments in fp32


class Ranks:
    """This process among those that torchrun started."""

    def __init__(self, config: ParallelConfig, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            # Objects and flags go over gloo in any case: they are on the CPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        self.processes = dist.get_world_size()
        if config.tensor < 1 or self.processes % config.tensor:
            raise ConfigError(
                f"parallel.tensor is {config.tensor}, and torchrun started {self.processes} processes; their number "
                "must be a multiple of it."
            )
        shape = (self.processes // config.tensor, config.tensor)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "tensor"))
        self.data, self.tensor = mesh["data"], mesh["tensor"]
        self.rank, self.world = self.data.get_local_rank(), self.data.size()
        self.cuts: dict[str, shard.Cut] = {}
        self.is_first = dist.get_rank() == 0
        self.is_sharded = False
        self.buckets: Buckets | None = None

    @contextmanager
    def noticing(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, CheckpointException) as error:
            # gloo has no class of its own for it.
            if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
                raise
            raise LostProcessError(
                f"process {dist.get_rank()} of {self.processes} waited for another one that is gone or does not "
                "answer; what that one said last, or torchrun's report below, tells why. The same command goes on from "
                "the last saved state."
            ) from error

    def spread(self, model: Transformer, runtime: Runtime) -> Transformer:
        """One block after the other, so that no device need hold the whole model."""
        # Dropout differs between shares of a step, and not between processes that share one model.
        torch.manual_seed(torch.initial_seed() + self.rank)
        if self.tensor.size() > 1:
            self._equalise(model, self.tensor)
            shard.split(model, self.tensor.get_group())
            self.cuts, self.is_sharded = shard.plan(model.config), True
        wanted = self.config.kind == "fsdp" or (self.config.kind == "auto" and not self._fits(model))
        if self.world == 1 or not wanted:
            self._equalise(model.to(self.device), self.data)
            return model
        self.is_sharded = True
        if runtime.compiled:
            _compile_blocks(model)
        for block in model.blocks:
            # Products take matrices in the runtime's type in any case; an adapter's few would save nothing.
            is_trained = all(p.requires_grad for p in block.parameters())
            self._shard(block, reshard=self.config.reshard, dtype=runtime.dtype if is_trained else None)
        # Embedding, last norm and head stay gathered until the backward pass: the loss multiplies by the head outside
        # of the model's forward. Embedded tokens begin the residual stream, which is fp32.
        self._shard(model, reshard=False)
        return model

    def gather(self, model: Transformer) -> bool:
        """Whole weights replace the parts, one by one."""
        for prefix, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                cut = shard.cut_of(self.cuts, f"{prefix}.{name}")
                if cut is None and not isinstance(parameter, DTensor):
                    continue
                full = self.whole(f"{prefix}.{name}", parameter.detach())
                kept = full.to("cpu") if self.is_first else full.new_empty(0)
                module.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        return self.is_first

    @contextmanager
    def gathering(self, module: nn.Module, *, is_last: bool) -> Iterator[None]:
        """FSDP2 adds gradients up by itself; those of parameters outside of it go in buckets."""
        for part_of_it in _sharded(module):
            part_of_it.set_requires_gradient_sync(is_last or self.config.sync == "micro", recurse=False)
        if self.world == 1 or not is_last:
            yield
            return
        if self.buckets is None:
            plain = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
            self.buckets = Buckets(plain, self.data.get_group())
        with self.buckets.summing():
            yield

    def adopt(
        self, module: nn.Module, objective: Objective[B], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> tuple[Objective[B], torch.optim.Optimizer]:
        return objective, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        summed = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed, group=self.data.get_group())
        return summed.tolist()

    def any(self, flag: bool) -> bool:
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def collect(self, own: T) -> list[T]:
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, own, group=self.data.get_group())
        return cast(list[T], found)

    def clip(self, module: nn.Module, limit: float) -> float:
        """The norm over the parts of all processes, each value counted once."""
        kinds: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in module.named_parameters():
            if (gradient := parameter.grad) is not None:
                kind = isinstance(gradient, DTensor), shard.cut_of(self.cuts, name) is not None
                kinds.setdefault(kind, []).append(local_of(gradient))
        total = 0.0
        # All processes go through all kinds: one of them may hold nothing of what the others hold.
        for in_rows, in_shares in product((True, False), repeat=2):
            gradients = kinds.get((in_rows, in_shares), [])
            square = torch.zeros((), dtype=torch.float64, device=self.device)
            if gradients:
                square += torch.nn.utils.get_total_norm(gradients).double().square()
            if in_rows:
                dist.all_reduce(square, group=self.data.get_group())
            if in_shares:
                dist.all_reduce(square, group=self.tensor.get_group())
            total += float(square)
        norm = math.sqrt(total)
        if norm > limit and norm != float("inf"):
            torch._foreach_mul_([one for some in kinds.values() for one in some], limit / (norm + 1e-6))
        return norm

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        if not self.is_first:
            self.wait()
        try:
            yield
        finally:
            if self.is_first:
                self.wait()

    def wait(self) -> None:
        self.any(False)

    def settle(self, module: nn.Module) -> None:
        for part_of_it in _sharded(module):
            part_of_it.reshard()

    def layout(self, name: str, parameter: Tensor) -> Layout:
        """Of the rows of this process's share (of all, where none is cut) FSDP2 keeps some here."""
        cut = shard.cut_of(self.cuts, name)
        rows = self._rows(parameter.shape[0]) if isinstance(parameter, DTensor) else None
        if cut is None:
            return whole(parameter) if rows is None else part(parameter.shape, ranges=[(0, len(parameter))], rows=rows)
        size = list(parameter.shape)
        size[cut.dim] = sum(cut.parts)
        ranges = cut.ranges(self.tensor.get_local_rank(), self.tensor.size())
        return part(size, dim=cut.dim, ranges=ranges, rows=rows)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        cut = shard.cut_of(self.cuts, name)
        share: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return share if cut is None else shard.whole_share(share, cut, self.tensor.get_group())

    def local_state(self) -> dict[str, Tensor] | None:
        return None

    def refill(self) -> None:
        pass

    def _rows(self, count: int) -> Range:
        """Which of `count` rows FSDP2 keeps here: equal chunks, the last ones shorter or empty."""
        each = -(-count // self.world)
        return min(self.rank * each, count), min((self.rank + 1) * each, count)

    def _shard(self, module: nn.Module, *, reshard: bool, dtype: torch.dtype | None = None) -> None:
        """Trained vectors stay whole: they are tiny, and a gain that is gathered in bf16 is another gain."""
        self._equalise(module.to(self.device), self.data)
        for inner in module.modules():
            if isinstance(inner, Frozen):
                _codes_as_parameters(inner)
        sharded = fully_shard(
            module,
            mesh=self.data,
            reshard_after_forward=reshard,
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            ignored_params={p for p in module.parameters() if p.requires_grad and p.ndim < 2},
        )
        # The loop divides by the count of all ranks, so gradients are added, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def _equalise(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """What is trained starts everywhere as it does in the first process: new weights are drawn at random."""
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                dist.broadcast(parameter.detach(), group=mesh.get_group(), group_src=0)

    def _fits(self, model: Transformer) -> bool:
        """Whether training it whole takes less than half of this process's memory; activations take the rest."""
        needed = sum(p.numel() * (_TRAINED_BYTES if p.requires_grad else p.element_size()) for p in model.parameters())
        if self.device.type == "cuda":
            return needed < torch.cuda.get_device_properties(self.device).total_memory / 2
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return needed < memory / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _sharded(module: nn.Module) -> Iterator[FSDPModule]:
    return (inner for inner in module.modules() if isinstance(inner, FSDPModule))


def _codes_as_parameters(matrix: nn.Module) -> None:
    """FSDP2 leaves buffers whole in every process; frozen parameters it keeps in parts, of any type."""
    for name, codes in list(matrix.named_buffers(recurse=False)):
        if codes.ndim:
            delattr(matrix, name)
            matrix.register_parameter(name, nn.Parameter(codes, requires_grad=False))


def _compile_blocks(model: Transformer) -> None:
    """Each block's own code: the hooks that gather its weights stay outside."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
