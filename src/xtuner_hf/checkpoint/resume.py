"""Model and optimizer state, sharded on disk through `torch.distributed.checkpoint` (DCP).

    rank 0   rank 1   ...            any number of ranks, any layout
      |        |                          ^
      v        v                          |
    staging copies in host memory     each rank reads the parts of the chunks that it holds
      |        |        (a thread)        |
      v        v                          |
    dcp/__0_0.distcp  dcp/__1_0.distcp  dcp/.metadata

Every entry is a whole tensor under the model's own name for it, of which ranks write and read rectangular chunks. So it
does not matter whether the next job has other ranks, another `ep_size`, one process, or Accelerate's wrapping.

    model.<name>                     parameters and persistent buffers
    optimizer.<name>.<state>         exp_avg, exp_avg_sq, step, ...

Hyperparameters of the optimizer's groups lie beside it in a file of their own, by the names of their parameters:
the number of groups depends on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ..parallel.adapters import is_adapted
from .folder import SHARDS, CheckpointError

GROUPS_FILE = "optimizer_groups.pt"
_MODEL, _OPTIMIZER = "model.", "optimizer."
# What compilation and activation checkpointing put into parameter names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_state(model: nn.Module) -> dict[str, Any]:
    """The model's own tensors (not copies) by name: parameters and persistent buffers; of PEFT models, what trains."""
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=is_adapted(model)))


def _parameter_names(model: nn.Module) -> dict[torch.Tensor, str]:
    names: dict[torch.Tensor, str] = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        names[parameter] = name
    return names


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What DCP writes: a flat dict of the live tensors of model and optimizer.

    Raises:
        CheckpointError: for optimizer state of a sharded parameter that is neither shaped like it nor a single number:
            it could not be read by another layout.
    """
    state: dict[str, Any] = {_MODEL + name: tensor for name, tensor in model_state(model).items()}
    names = _parameter_names(model)
    optimizer.state_dict()  # one whose states are on their way to the host waits for them here
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            _check_state(names[parameter], key, parameter, value)
            state[f"{_OPTIMIZER}{names[parameter]}.{key}"] = value
    return state


def _check_state(name: str, key: str, parameter: torch.Tensor, value: Any) -> None:
    is_number = isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    if not (is_number or alike or (isinstance(value, torch.Tensor) and not isinstance(parameter, DTensor))):
        shape = tuple(getattr(value, "shape", ()))
        raise CheckpointError(
            f"The optimizer keeps {key!r} of {name}, a {type(value).__name__} {shape}; the "
            f"parameter has shape {tuple(parameter.shape)}, and sharded checkpoints hold state that is shaped like its "
            "parameter, or a number. Use another optim, or save_only_model=True."
        )


def optimizer_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each group, with the names of its parameters under `params`."""
    names = _parameter_names(model)
    return [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]


def load_model(folder: Path, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Fill the model, in its own layout, from a checkpoint folder. Collective.

    Raises:
        CheckpointError: names that only one of them has, or other shapes.
    """
    state = {_MODEL + name: tensor for name, tensor in model_state(model).items()}
    _check_same_tensors(folder, state)
    _read(folder, state, group)


def load_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
) -> None:
    """Fill the optimizer, in its own layout, from a checkpoint folder. Collective.

    A parameter that never had a gradient has no state in the checkpoint and gets none.
    """
    names = _parameter_names(model)
    by_name = {name: parameter for parameter, name in names.items()}
    state: dict[str, Any] = {}
    for key, metadata in _entries(folder).items():
        if key.startswith(_OPTIMIZER):
            name = key.removeprefix(_OPTIMIZER).rpartition(".")[0]
            if name not in by_name:
                raise CheckpointError(f"{folder} has optimizer state of {name}, which this model does not have.")
            state[key] = _empty_state(by_name[name], metadata)
    _read(folder, state, group)
    index = {parameter: i for i, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    loaded: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, entry = key.removeprefix(_OPTIMIZER).rpartition(".")
        if by_name[name] in index:
            loaded.setdefault(index[by_name[name]], {})[entry] = value
    optimizer.load_state_dict({"state": loaded, "param_groups": _groups_for(folder, names, optimizer)})


def _empty_state(parameter: torch.Tensor, metadata: Any) -> Any:
    if not isinstance(metadata, dcp.TensorStorageMetadata):
        return None  # a Python number
    dtype = metadata.properties.dtype
    if metadata.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(metadata.size, dtype=dtype)


def _groups_for(folder: Path, names: dict, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """This optimizer's groups with the saved hyperparameters: of each, those of its first parameter."""
    saved = torch.load(folder / GROUPS_FILE, weights_only=True)
    group_of = {name: group for group in saved for name in group["params"]}
    groups = optimizer.state_dict()["param_groups"]
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        found = [group_of.get(names[p]) for p in live["params"]]
        if not found or found[0] is None:
            continue
        if any(other is not found[0] and _differ(other, found[0]) for other in found):
            raise CheckpointError(
                f"Parameters that share an optimizer group here (with {names[live['params'][0]]}) had different "
                f"hyperparameters in {folder}: build the optimizer with the same groups as the run that is continued."
            )
        group |= {key: value for key, value in found[0].items() if key != "params"}
    return groups


def _differ(group: dict | None, other: dict) -> bool:
    return group is None or any(group[key] != other.get(key) for key in group if key != "params")


def _entries(folder: Path) -> dict[str, Any]:
    return dcp.FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata


def _check_same_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    saved = {key: tuple(m.size) for key, m in _entries(folder).items() if key.startswith(_MODEL)}
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{folder} is of another model: {len(differing)} tensors differ, the first is "
            f"{key.removeprefix(_MODEL)} with shape {saved.get(key, 'none')} in the checkpoint and "
            f"{wanted.get(key, 'none')} here."
        )


def _read(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    if not state:
        return
    reader = dcp.FileSystemReader(folder / SHARDS)
    dcp.load(state, storage_reader=reader, process_group=group, no_dist=not dist.is_initialized())


class AsyncSaver:
    """Writes training states in the background, one at a time.

    Args:
        group: a gloo group of all ranks that nothing else uses, since the thread has its collectives there; None in a
            job of one process.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, state: dict[str, Any], folder: Path, then: Callable[[], None]) -> None:
        """Copy the state to host memory, then write it while training goes on. Collective.

        Args:
            then: called in the thread when every rank has written; on rank 0, to make the folder a checkpoint.
        """
        self.wait()
        if state:
            written = dcp.async_save(
                state,
                storage_writer=dcp.FileSystemWriter(folder / SHARDS),
                process_group=self._group,
                no_dist=self._group is None,
            )
        else:
            written = Future()
            written.set_result(None)
        self._pending = self._executor.submit(self._finish, written, then)

    @staticmethod
    def _finish(written: Any, then: Callable[[], None]) -> None:
        written.result()
        then()

    def wait(self) -> None:
        """Until the checkpoint being written is complete on all ranks. Collective.

        Raises:
            CheckpointError: on every rank, if one failed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        failed = torch.tensor(int(error is not None))
        if self._group is not None:
            dist.all_reduce(failed, group=self._group)
        if failed:
            raise CheckpointError(f"Writing a checkpoint failed on {int(failed)} rank(s); here: {error}") from error
