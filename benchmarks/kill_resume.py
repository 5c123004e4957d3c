"""Kill a training job with SIGKILL at random moments, start it again each time, and compare it with one left alone.

    python benchmarks/kill_resume.py --kills 20 --processes 2

Half of the kills wait for a checkpoint that is being written and strike within it. Every start uses the same command
(`resume_from_checkpoint="auto"`). The job passes if it reaches its last step and every loss that it ever logged, before
and after each kill, is the one that the uninterrupted job logged for that step, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "kill_resume.json"


def worker(folder: str, steps: int, save_steps: int, losses_file: str, cached_rows: int = 64) -> None:
    """One process of the job: a tiny MoE with dropout and all balance terms, sharded over the processes with EP."""
    import torch
    from datasets import Dataset
    from transformers import Qwen3MoeConfig, TrainerCallback, set_seed

    import xtuner_hf
    from xtuner_hf.data import PackedCollator

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        attention_dropout=0.1,
        eos_token_id=1,
        pad_token_id=0,
        router_correction_bias=True,
    )
    set_seed(0)
    model = xtuner_hf.Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 256, (24 + i % 17,), generator=generator).tolist() for i in range(cached_rows)]

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs and state.is_world_process_zero:
                with open(losses_file, "a") as file:
                    line = {"step": state.global_step, "loss": logs["loss"].hex(), "norm": logs["grad_norm"].hex()}
                    file.write(json.dumps(line) + "\n")

    world_size = int(os.environ["WORLD_SIZE"])
    args = xtuner_hf.MoETrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4 // world_size,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=save_steps,
        save_total_limit=2,
        ep_size=world_size,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
        router_bias_update_rate=0.001,
        use_cpu=True,
        bf16=False,
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = xtuner_hf.MoETrainer(
        model=model,
        args=args,
        data_collator=PackedCollator(pad_token_id=0),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        callbacks=[Losses()],
    )
    trainer.train(resume_from_checkpoint="auto")


class Job:
    """The processes of one start."""

    def __init__(self, processes: int, arguments: list[str], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._log = log.open("a")
        self.processes = [self._start(rank, processes, port, arguments) for rank in range(processes)]

    def _start(self, rank: int, world_size: int, port: int, arguments: list[str]) -> subprocess.Popen:
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, __file__, "--worker", *arguments]
        return subprocess.Popen(command, env=env, stdout=self._log, stderr=self._log)

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def kill(self, generator: random.Random) -> None:
        """One process after the other, in any order, as nodes fail."""
        for process in generator.sample(self.processes, len(self.processes)):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(generator.uniform(0, 0.05))
        self._log.close()

    def wait(self) -> list[int]:
        return [process.wait() for process in self.processes]


def read_losses(path: Path) -> list[tuple[int, str, str]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        found.append((entry["step"], entry["loss"], entry["norm"]))
    return found


def moments(kills: int, generator: random.Random) -> Iterator[tuple[bool, float]]:
    """(within a checkpoint, delay in seconds) of each kill."""
    for index in range(kills):
        within = index % 2 == 0
        yield within, generator.uniform(0, 0.05) if within else generator.uniform(0, 3)


def run(folder: Path, kills: int, processes: int, steps: int, save_steps: int, seed: int) -> dict:
    """Both jobs; what was found."""
    arguments = [str(folder / "reference"), str(steps), str(save_steps), str(folder / "reference.jsonl")]
    reference = Job(processes, arguments, folder / "log.txt").wait()
    if any(reference):
        raise SystemExit(f"The uninterrupted job failed: {(folder / 'log.txt').read_text()[-3000:]}")
    expected = {step: (loss, norm) for step, loss, norm in read_losses(folder / "reference.jsonl")}
    arguments = [str(folder / "killed"), str(steps), str(save_steps), str(folder / "killed.jsonl")]
    struck = {"while saving": 0, "elsewhere": 0}
    resumed_from = []
    generator = random.Random(seed)
    for within, delay in moments(kills, generator):
        job = Job(processes, arguments, folder / "log.txt")
        logged = len(read_losses(folder / "killed.jsonl"))
        # It has started when it logs; a kill while it imports would prove nothing.
        while job.running() and len(read_losses(folder / "killed.jsonl")) == logged:
            time.sleep(0.01)
        resumed_from.append(read_losses(folder / "killed.jsonl")[logged][0] - 1)
        while within and job.running() and not list((folder / "killed").glob("incomplete-checkpoint-*")):
            time.sleep(0.001)
        # Elsewhere: some time after there is something to go on from.
        while not within and job.running() and not list((folder / "killed").glob("checkpoint-*")):
            time.sleep(0.01)
        time.sleep(delay)
        if not job.running():
            raise SystemExit("The job ended before it could be killed: give it more --steps.")
        job.kill(generator)
        saving = bool(list((folder / "killed").glob("incomplete-checkpoint-*")))
        struck["while saving" if saving else "elsewhere"] += 1
    logged = len(read_losses(folder / "killed.jsonl"))
    last = Job(processes, arguments, folder / "log.txt").wait()
    if any(last):
        raise SystemExit(f"The job did not go on: {(folder / 'log.txt').read_text()[-3000:]}")
    found = read_losses(folder / "killed.jsonl")
    resumed_from.append(found[logged][0] - 1)
    return {
        "kills": kills,
        **struck,
        "resumed from step": resumed_from,
        "logged losses": len(found),
        "of steps": len({step for step, _, _ in found}),
        "that differ": sum(expected[step] != (loss, norm) for step, loss, norm in found),
        "reached the end": {step for step, _, _ in found} == set(expected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.kills, options.processes, options.steps, options.save_steps, options.seed)
    print(json.dumps(result, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    if result["that differ"] or not result["reached the end"]:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
