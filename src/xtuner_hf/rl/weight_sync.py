"""New weights for a rollout engine: un-fused Hub names, layer by layer, each tensor written by a rank that owns it.

    layer 0   every rank: its experts of the layer, its share of the rest -> one safetensors file
              all files there? -> rank 0: the engine reads them -> they are removed
    layer 1   ...
    probe     the engine scores a fixed text, or answers to its pieces, and the trainer does; they must agree

Through storage that trainer and engine share: a RAM disk (/dev/shm) on one node, a network file system on several. It
holds one layer at a time, or the checkpoint for an engine that reads whole folders (SGLang). No rank ever holds more of
an expert tensor than its own part and one expert. Adapters are sent merged into the weights that they stand on: an
engine needs to know nothing of them, and the trainer keeps them apart.

While the engine reads, the ranks wait for rank 0: as long as its deadline at most.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..checkpoint.adapter import merged_tensors
from ..checkpoint.export import assign_items, hub_tensors, schedule, write_configs
from ..checkpoint.export_plan import Item, plan_export
from ..checkpoint.hub_source import HubSource
from ..checkpoint.passthrough import SourceEncoder
from ..checkpoint.quantised_format import TensorSpec
from ..checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from ..checkpoint.sources import LiveTensors, TensorSource
from ..models.base import fail_together
from ..parallel.adapters import base_model, is_adapted, without_adapters
from ..parallel.shard import local_part
from .engines.contract import EngineError, RolloutEngine, Sampling

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
_MARK = ".weight-sync"  # in a folder that we made
_PIECE = 8  # tokens of a prompt, and of the answer, where an engine scores nothing but its answers
_LAYER = re.compile(r"^(.*?\.\d+)\.")
# What a failed probe tells apart; the first pattern that fits a name, the model's own or the Hub's.
_CLASSES = (
    ("correction biases", r"e_score_correction_bias$"),
    ("routers", r"mlp\.gate\.|mlp\.router\."),
    ("shared experts", r"\.shared_experts?\."),
    ("experts", r"\.experts\."),
    ("norms", r"norm\.(weight|bias)$|layernorm"),
    ("attention", r"\.self_attn\."),
    ("dense layers", r"\.mlp\."),
    ("embeddings", r"embed_tokens"),
    ("output head", r"lm_head"),
)


class WeightSyncError(EngineError):
    """An engine that does not compute what the trainer does after it took the trainer's weights."""


@dataclass(frozen=True)
class Scored:
    """What an engine says of rows of tokens.

    Args:
        rows: token ids.
        given: of each row, how many tokens come before those that are scored.
        logps: of the others, row after row, in nats at temperature 1.
    """

    rows: list[list[int]]
    given: list[int]
    logps: list[float]


class WeightSync:
    """Brings a model's weights to an engine and proves that they arrived. Collective.

    Args:
        engine: shared by all ranks, or one for each.
        folder: on storage that all ranks and the engine see; must be empty or not there, and is removed after a sync.
        dtype: of what is sent; None keeps the model's. What the family keeps in fp32 stays so.
        quantised_like: the quantised checkpoint (folder) that the engine was started with; weights are then sent in its
            format (FP8 blocks, MXFP4).
        probe_tokens: length of the text that both score; where the engine scores nothing but its own answers, of all
            prompts together, with as many tokens in answers. It proves the experts that it reaches: with 256 tokens,
            nearly all of 128 with 8 a token. 0 for no probe, at your own risk.
        tolerance: largest difference of a token's log-probability. 1e-3 fits fp32 on both sides; bf16 engines differ
            by some 0.01 to 0.1.
        group: a gloo group of all ranks; None in a job of one process.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        quantised_like: str | Path | None = None,
        probe_tokens: int = 256,
        tolerance: float = PROBE_TOLERANCE,
        group: dist.ProcessGroup | None = None,
    ):
        self.engine, self.folder, self.group = engine, Path(folder), group
        self.dtype, self.probe_tokens, self.tolerance = dtype, probe_tokens, tolerance
        self._encoder = None if quantised_like is None else SourceEncoder(HubSource(quantised_like), quantise=True)
        self.rank, self.world_size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
        self._drives = self.rank == 0 or not engine.shared

    def __call__(self, model: Any, version: str) -> dict[str, float]:
        """Send the weights; metrics of the sync.

        Raises:
            EngineError: the engine did not take them.
            WeightSyncError: it did, and computes something else; names the tensors that it ignored or misread.
        """
        if not isinstance(base_model(model), PreTrainedModel):
            raise TypeError(
                f"Weights of {type(model).__name__} cannot be sent under Hub names: give it a model of ours."
            )
        started = time.perf_counter()
        self._together(self.engine.pause)
        num_bytes = self._send(model, version)
        self._together(self.engine.resume)
        sent = time.perf_counter() - started
        metrics = {"weight_sync/seconds": sent, "weight_sync/gigabytes": num_bytes / 1e9}
        if self.probe_tokens:
            difference = self._probe(model)
            metrics |= {
                "weight_sync/probe_difference": difference,
                "weight_sync/probe_seconds": time.perf_counter() - started - sent,
            }
            if not difference <= self.tolerance:
                raise WeightSyncError(self._explain(model, version, difference))
        return metrics

    def _together(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call the engine from the rank(s) that drive one; raise on all ranks what is raised on one."""
        with fail_together(sharded=self.group is not None, group=self.group):
            return call(*arguments) if self._drives else None

    # ---- sending ----

    def _send(self, model: Any, version: str, only: Callable[[str], bool] = lambda name: True) -> int:
        """Bytes of all tensors that were sent; those whose Hub name is chosen."""
        with fail_together(sharded=self.group is not None, group=self.group):
            if self.rank == 0:
                self._make_folder()
        self._together(self.engine.begin_update)
        source = self._source(model)
        num_bytes = 0
        weight_map: dict[str, str] = {}
        with without_adapters(model):
            for files in self._written_layers(base_model(model), source, only):
                num_bytes += sum(info.num_bytes for tensors in files.values() for info in tensors)
                weight_map |= {info.name: path.name for path, tensors in files.items() for info in tensors}
                if not self.engine.reads_whole_folder:
                    self._together(self.engine.load, list(files))
                    self._barrier()  # each rank's own engine has read them
                    if self.rank == 0:
                        for path in files:
                            path.unlink()
        if self.engine.reads_whole_folder and self.rank == 0:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
            write_configs(base_model(model), self.folder, self.dtype)
        self._together(self.engine.end_update, version, self.folder)
        self._barrier()
        if self.rank == 0:
            shutil.rmtree(self.folder)
        return num_bytes

    def _make_folder(self) -> None:
        """Empty, and marked as one that a sync may empty: of one that was killed, say."""
        mark = self.folder / _MARK
        if self.folder.exists() and any(self.folder.iterdir()) and not mark.exists():
            raise ValueError(
                f"{self.folder}, the folder for new weights, holds files of others, and every sync empties it: name "
                f"one that is not there yet, {self.folder / 'weights'} say."
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        mark.touch()

    @torch.no_grad()
    def _written_layers(
        self, model: PreTrainedModel, source: TensorSource, only: Callable[[str], bool]
    ) -> Iterator[dict[Path, list[TensorInfo]]]:
        """The files of each layer, once all ranks have written theirs."""
        items = plan_export(model, source.meta, self.dtype)
        for number, layer in enumerate(_by_layer([item for item in items if any(map(only, _names(item)))])):
            by_rank = assign_items(layer, source, self.world_size)
            paths = [self.folder / f"model-{number:05d}-rank-{rank:05d}.safetensors" for rank in range(self.world_size)]
            files = {path: self._stored(of_rank) for path, of_rank in zip(paths, by_rank, strict=True) if of_rank}
            own = paths[self.rank]
            writer = SafetensorsWriter(own, files[own]) if own in files else None
            for writing_rank, item in schedule(by_rank):
                for expert, tensors in hub_tensors(model, source, item, writing_rank, self.dtype):
                    assert writer is not None
                    for name, tensor in tensors.items():
                        for stored, values in self._encoded(item, expert, name, tensor).items():
                            writer.append(stored, values)
            if writer is not None:
                writer.close()
            self._barrier()
            yield files

    def _source(self, model: Any) -> TensorSource:
        """Whole tensors of the model; those with adapters on them are merged part by part, as they are sent."""
        if is_adapted(model):
            return merged_tensors(model, self.group)
        return LiveTensors(dict(model.state_dict()), self.group)

    def _stored(self, items: list[Item]) -> list[TensorInfo]:
        """What a file holds of these items; wide dtypes first, which keeps all aligned."""
        infos = [info for item in items for info in item.outputs.values()]
        if self._encoder is not None:
            specs = [spec for i in infos for spec in self._encoder.specs(TensorSpec(i.name, i.dtype, i.shape))]
            infos = [TensorInfo(spec.name, spec.dtype, spec.shape) for spec in specs]
        return sorted(infos, key=lambda info: -info.dtype.itemsize)

    def _encoded(self, item: Item, expert: int | None, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._encoder is None:
            return {name: tensor}
        # Of a tensor that the Hub has fused, an expert is one run of rows.
        rows = None if expert is None or len(item.experts or ()) == 1 else (expert, expert + 1)
        return self._encoder.encode(name, tensor, rows)

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    # ---- the probe ----

    def _probe(self, model: Any) -> float:
        """Largest difference of a token's log-probability between engine and trainer, in nats."""
        scored = self._engine_scores(model)
        return _difference(scored, _trainer_scores(model, scored))

    def _text(self, model: Any) -> list[int]:
        """Random tokens, the same in every sync: they reach experts that fluent text may not."""
        vocab_size = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (self.probe_tokens,), generator=generator).tolist()

    def _engine_scores(self, model: Any) -> Scored:
        """The same on all ranks: of the one engine, or of each rank's own, one after the other."""
        found = [self._together(self._ask, self._text(model))]
        if self.group is not None:
            found *= self.world_size
            dist.all_gather_object(found, found[self.rank], group=self.group)
        by_engine = [scored for scored in found if scored is not None]
        return Scored(
            rows=[row for scored in by_engine for row in scored.rows],
            given=[given for scored in by_engine for given in scored.given],
            logps=[logp for scored in by_engine for logp in scored.logps],
        )

    def _ask(self, text: list[int]) -> Scored:
        """Scores of the text; or of what the engine answers to its pieces, which proves the path that decodes too.

        It answers with the likeliest tokens, so that one that takes no notice of new weights says the same again.
        """
        if self.engine.scores_given_tokens:
            return Scored([text], [1], self.engine.score(text))
        prompts = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        answers = self.engine.generate(prompts, Sampling(max_tokens=_PIECE, top_k=1))
        return Scored(
            rows=[prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)],
            given=[len(prompt) for prompt in prompts],
            logps=[logp for answer in answers for logp in answer.logprobs],
        )

    def _explain(self, model: Any, version: str, difference: float) -> str:
        """Which tensors the engine ignores or misreads.

        Each class is zeroed in the trainer and sent alone. An engine whose answer does not move ignores it; one that
        agrees with the trainer now, and does not with the true values, misreads it.
        """
        ignored, misread = [], []
        true_scores = self._engine_scores(model)
        for name in sorted({_class_of(name) for name in model.state_dict()}):

            def is_of_class(hub_name: str, name: str = name) -> bool:
                return _class_of(hub_name) == name

            with _zeroed(model, is_of_class):
                self._send(model, version, only=is_of_class)
                scored = self._engine_scores(model)
                trainer = _trainer_scores(model, scored)
            self._send(model, version, only=is_of_class)
            is_uniform = bool((trainer - trainer[0]).abs().max() < 1e-6)  # no token is likelier: any engine agrees
            if scored == true_scores:
                ignored.append(name)
            elif not is_uniform and _difference(scored, trainer) <= self.tolerance:
                misread.append(name)
        verdicts = ([f"it takes no notice of its {', '.join(ignored)}"] if ignored else []) + (
            [f"it misreads its {', '.join(misread)}"] if misread else []
        )
        return (
            f"After the weights {version} were sent, the engine's log-probabilities of the probe differ from the "
            f"trainer's by up to {difference:.3g} nats (tolerance {self.tolerance:g}): "
            f"{'; '.join(verdicts) or 'no single class of tensors explains it'}. "
            "Check that the engine serves this architecture in this precision (a bf16 engine needs a higher tolerance) "
            "and can reload these tensors in place."
        )


def _names(item: Item) -> list[str]:
    return [info.name for info in item.outputs.values()]


def _by_layer(items: list[Item]) -> list[list[Item]]:
    """Decoder layers in order, and what belongs to none before them."""
    layers: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        match = _LAYER.match(item.source)
        prefix, _, number = match[1].rpartition(".") if match else ("", "", "0")
        layers[prefix, int(number)].append(item)
    return [layers[key] for key in sorted(layers)]


def _class_of(hub_name: str) -> str:
    return next((name for name, pattern in _CLASSES if re.search(pattern, hub_name)), "others")


@contextlib.contextmanager
def _zeroed(model: torch.nn.Module, chosen: Callable[[str], bool]) -> Iterator[None]:
    """Within it, the chosen tensors of the model are 0."""
    tensors = [local_part(tensor.detach()) for name, tensor in model.state_dict().items() if chosen(name)]
    saved = [tensor.clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.zero_()
        yield
    finally:
        for tensor, values in zip(tensors, saved, strict=True):
            tensor.copy_(values)


@torch.no_grad()
def _trainer_scores(model: Any, scored: Scored) -> torch.Tensor:
    """[tokens] fp64, as `Scored.logps`. Collective for a sharded model."""
    was_training = model.training
    model.eval()
    width = max(map(len, scored.rows))
    ids_BS = torch.tensor([row + [0] * (width - len(row)) for row in scored.rows])  # nothing looks at what comes later
    # On the host: not every device has float64.
    logits_BSV = model(input_ids=ids_BS.to(model.device), use_cache=False).logits.cpu()
    model.train(was_training)
    logps = []
    for ids_S, logits_SV, row, given in zip(ids_BS, logits_BSV, scored.rows, scored.given, strict=True):
        logps_SV = logits_SV[given - 1 : len(row) - 1].double().log_softmax(-1)
        logps.append(logps_SV.gather(1, ids_S[given : len(row), None])[:, 0])
    return torch.cat(logps)


def _difference(scored: Scored, trainer: torch.Tensor) -> float:
    engine = torch.tensor(scored.logps, dtype=torch.float64)
    return float((engine - trainer).abs().max().nan_to_num(nan=torch.inf))
