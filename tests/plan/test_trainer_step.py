"""The planner's step against the trainers': the same operators in the same order, bytes, FLOPs and traffic.

Both train the same model on the same tokens, for real, under one tracker; test_exactness.py holds dry runs against that
step of the planner's. What differs is named here, one difference after the other; nothing else may.
"""

from __future__ import annotations

import difflib
from collections import Counter

import pytest

from tests.plan.real import make_job
from tests.plan.trainer import Observed, run
from tests.ranks import run_on_ranks
from xtuner_hf.plan import ledger as memory
from xtuner_hf.plan.job import Job
from xtuner_hf.plan.ledger import BLOCK

EVERY_TRAINER = ("MoETrainer", "MoESFTTrainer")
# 514 labels of both ranks, a number that bf16 does not have.
LONGER = {"seq_len": 260, "document_len": 129}

CASES = {
    1: {
        "qwen3_moe, two micro-batches": ("qwen3_moe", {"accumulation": 2}, {}, ("MoETrainer",)),
        "deepseek_v3": ("deepseek_v3", {}, {}, EVERY_TRAINER),
    },
    2: {
        "qwen3_moe": ("qwen3_moe", LONGER, {}, EVERY_TRAINER),
        "qwen3_moe, two micro-batches": ("qwen3_moe", {"accumulation": 2}, {}, ("MoETrainer",)),
        "qwen3_moe, steps in backward": ("qwen3_moe", {"optimizer_in_backward": True}, {}, ("MoETrainer",)),
        "qwen3_moe, two copies": ("qwen3_moe", {"accumulation": 2}, {"dp_replicate_size": 2}, ("MoETrainer",)),
        "deepseek_v3, ep": ("deepseek_v3", {"accumulation": 2}, {"ep_size": 2}, EVERY_TRAINER),
    },
}
EACH = [(ranks, name, kind) for ranks, cases in CASES.items() for name, case in cases.items() for kind in case[3]]
ALL = [(ranks, name) for ranks, name, kind in EACH if kind == "MoETrainer"]
WITH_TRL = [(ranks, name) for ranks, name, kind in EACH if kind == "MoESFTTrainer"]


@pytest.fixture(scope="module")
def observed() -> dict[int, dict[str, dict[str, Observed]]]:
    return {1: run(CASES[1]), 2: run_on_ranks("tests.plan.trainer:run", 2, cases=CASES[2])[-1]}


def make_case(ranks: int, name: str) -> Job:
    family, changes, sizes, _ = CASES[ranks][name]
    return make_job(family, ranks, changes, **sizes)


def sequence(observed: Observed, *, with_head: bool = True) -> list[tuple[str, ...]]:
    """Phase, name and tensors of all that runs from the first forward on, but for bookkeeping on single numbers."""
    return [
        (operator.phase, operator.name, *operator.tensors)
        for operator in observed.operators
        if operator.phase != "setup" and not operator.is_bookkeeping and (with_head or not operator.in_head)
    ]


def only_here_and_there(here: list, there: list) -> tuple[Counter, Counter]:
    """Phase and name of what one of two sequences has and the other lacks, at the same place."""
    only: tuple[Counter, Counter] = Counter(), Counter()
    for kind, *parts in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        if kind != "equal":
            for counter, operators, (begin, end) in zip(only, (here, there), (parts[:2], parts[2:]), strict=True):
                counter.update(operator[:2] for operator in operators[begin:end])
    return only


def only_in_the_plan(job: Job) -> Counter:
    """A single process has nobody to sum the experts' load and the squares of the norm up with."""
    if job.layout.world_size > 1:
        return Counter()
    summed_in = "optimizer" if job.config.model_type == "deepseek_v3" else "forward"
    return Counter({(summed_in, "stack"): 2, (summed_in, "cat"): 2, (summed_in, "allreduce_"): 2}) + Counter(
        {("optimizer", "pow"): 1}
    )


def only_in_training(job: Job) -> Counter:
    """The count pass of the Switch loss moves batches to the device (ranks have five tensors that are not there), and
    Accelerate hands the logits of a position out in fp32."""
    if job.accumulation == 1 or job.config.model_type != "qwen3_moe":
        return Counter()
    return Counter({("forward", "_to_copy"): job.accumulation * (1 if job.layout.world_size == 1 else 6)})


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_the_same_operators_in_the_same_order(ranks, name, observed):
    planned, trained = (observed[ranks][name][kind] for kind in ("planner", "MoETrainer"))
    job = make_case(ranks, name)
    only_planned, only_trained = only_here_and_there(sequence(planned), sequence(trained))
    assert only_planned == only_in_the_plan(job)
    assert only_trained == only_in_training(job)
    assert {phase: work.flops for phase, work in planned.report.work.items()} == {
        phase: work.flops for phase, work in trained.report.work.items()
    }


@pytest.mark.parametrize(("ranks", "name"), WITH_TRL)
def test_sft_differs_in_the_head_alone(ranks, name, observed):
    planned, trained = (observed[ranks][name][kind] for kind in ("planner", "MoESFTTrainer"))
    job = make_case(ranks, name)
    outside = [sequence(each, with_head=False) for each in (planned, trained)]
    assert only_here_and_there(*outside) == (
        Counter({key: number for key, number in only_in_the_plan(job).items() if key[0] == "optimizer"}),
        Counter(),
    )
    # On a CPU, TRL scores all positions but the last, and not only those that have a label.
    further_rows = job.accumulation * (len(job.documents) - 1)
    product = 2.0 * further_rows * job.config.hidden_size * job.config.vocab_size
    for phase, number in {"forward": 1, "recompute": 0, "backward": 3, "optimizer": 0}.items():
        found, expected = trained.report.work[phase].flops, dict(planned.report.work[phase].flops)
        if number:
            expected["dense_matmul"] += number * product
        assert found == expected


@pytest.mark.parametrize(("ranks", "name", "kind"), EACH)
def test_the_same_bytes(ranks, name, kind, observed):
    job, planned, trained = make_case(ranks, name), observed[ranks][name]["planner"], observed[ranks][name][kind]
    batch = 3 * blocks(8 * job.seq_len) + 3 * BLOCK  # ids, labels, positions; boundaries of documents
    for region in {"forward", "backward", "optimizer"} | {f"layer {i}" for i in range(job.config.num_hidden_layers)}:
        more = Counter(trained.report.peaks[region].by_category)
        more.subtract(planned.report.peaks[region].by_category)
        # All micro-batches are fetched at once, and copied where they are not on the device yet; counts, scales, flags.
        fetched = 2 * job.accumulation * batch + 16 * BLOCK
        assert 0 <= more.pop(memory.INPUTS) <= fetched
        if kind == "MoESFTTrainer" and region in ("forward", "backward"):
            # TRL's tile, and what it computes of it step by step on a CPU.
            tile = (job.seq_len - 1) * (32768 * 2 + 5 * job.config.vocab_size * 4)
            assert sum(more.values()) <= tile + 8 * BLOCK
        else:
            assert all(abs(size) <= 8 * BLOCK for size in more.values()), more


@pytest.mark.parametrize(("ranks", "name", "kind"), EACH)
def test_the_same_traffic(ranks, name, kind, observed):
    planned, trained = (observed[ranks][name][which].report.traffic for which in ("planner", kind))

    def amounts(traffic):
        return {key: (each.calls, each.buffer_bytes) for key, each in traffic.items() if key[2] != "setup"}

    expected = amounts(planned)
    for (axis, what, phase), (calls, size) in amounts(planned).items():
        if (what, phase) == ("all-reduce", "optimizer"):
            # Ranks agree on whether the step is to be skipped, with three numbers.
            expected[axis, what, phase] = (calls + 1, size + 12)
    assert amounts(trained) == expected
    # What a step counts before it begins: labels and documents.
    assert sum(each.buffer_bytes for key, each in trained.items() if key[2] == "setup") <= 64


@pytest.mark.parametrize(("ranks", "name", "kind"), EACH)
def test_bookkeeping_is_a_few_numbers(ranks, name, kind, observed):
    """Scales of the loss, checks for NaN, what is logged; of these, what the host waits for."""
    job = make_case(ranks, name)
    planned, trained = (
        [operator for operator in run.operators if operator.is_bookkeeping]
        for run in (observed[ranks][name]["planner"], observed[ranks][name][kind])
    )
    assert len(trained) - len(planned) <= 40 + 60 * job.accumulation
    waits = Counter(operator.name for operator in trained)["_local_scalar_dense"]
    assert waits <= 5 + job.accumulation * (8 if kind == "MoESFTTrainer" else 3)


def test_labels_of_a_step_are_counted_in_full_precision(observed):
    """FSDP casts floating-point inputs of a model to bf16: a loss over 514 labels was divided by 512."""
    runs = observed[2]["qwen3_moe"]
    assert runs["MoETrainer"].loss == pytest.approx(runs["MoESFTTrainer"].loss, rel=1e-5)


def blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
