"""Training state: any layout writes what any other reads; a checkpoint holds the moment at which it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.export_scenario import LAYOUTS
from tests.checkpoint.layout_scenario import load, save, trained, values
from tests.ranks import run_on_ranks
from xtuner_hf.checkpoint.folder import CheckpointError
from xtuner_hf.checkpoint.resume import GROUPS_FILE, AsyncSaver, optimizer_groups, training_state


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("layouts")
    one = folder / "one process"
    model, optimizer = trained("one process")
    save(one, model, optimizer)
    torch.save(values(model, optimizer), one / "values.pt")
    return folder, run_on_ranks("tests.checkpoint.layout_scenario:pairs", 4, folder=str(folder), from_one=str(one))[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, "accelerate", "one process"])
def test_any_layout_reads_what_was_written_in(layout, written):
    _, results = written
    read = {name: equal for name, equal in results.items() if name.startswith(f"{layout} ->")}
    assert len(read) == (len(LAYOUTS) + 1 if layout == "one process" else 2)
    assert all(read.values()), read


@pytest.mark.parametrize("layout", [*LAYOUTS, "accelerate"])
def test_one_process_reads_what_four_wrote(layout, written):
    folder, _ = written
    expected = values(*trained("one process"))
    found = load(folder / layout, "one process")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_parameter_without_gradients_gets_no_state():
    names = training_state(*trained("one process")).keys()
    assert "model.model.norm.weight" in names
    assert not any(name.startswith("optimizer.model.norm.weight") for name in names)


class TestAsyncSaver:
    def test_what_happens_after_the_start_is_not_in_the_checkpoint(self, tmp_path):
        model, optimizer = trained("one process")
        expected = values(model, optimizer)
        saver, done = AsyncSaver(None), []
        saver.start(training_state(model, optimizer), tmp_path, lambda: done.append(True))
        torch.save(optimizer_groups(model, optimizer), tmp_path / GROUPS_FILE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for entries in optimizer.state.values():
            entries["exp_avg"].zero_()
            entries["step"].zero_()
        saver.wait()
        assert done == [True]
        found = load(tmp_path, "one process")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_a_failure_is_raised_where_one_waits(self, tmp_path):
        def fail():
            raise OSError("disk full")

        saver = AsyncSaver(None)
        saver.start({"x": torch.ones(3)}, tmp_path, fail)
        with pytest.raises(CheckpointError, match=r"failed on 1 rank.*disk full"):
            saver.wait()
        saver.wait()  # said once


def test_state_that_another_layout_could_not_read(written):
    _, results = written
    assert "keeps 'row' of 0.weight, a Tensor (4,); the parameter has shape (4, 4)" in results["odd state"]
