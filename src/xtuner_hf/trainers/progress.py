"""One line a log that a person can read, with the time that is left."""

from __future__ import annotations

import time

from transformers import TrainerCallback


class ProgressLineCallback(TrainerCallback):
    """Prints to stdout on rank 0:

    step 40/400 (10 %) | loss 5.312 | 4,210 tokens/s | MFU 11.2 % | experts: busiest 1.8x even, 0 idle | 2 min 10 s left
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            print(self._training_line(state, logs), flush=True)
        elif "eval_loss" in logs:
            print(f"step {state.global_step}/{state.max_steps} | held-out loss {logs['eval_loss']:.3f}", flush=True)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps} | saved in {args.output_dir}", flush=True)

    def _training_line(self, state, logs: dict[str, float]) -> str:
        parts = [
            f"step {state.global_step}/{state.max_steps} ({100 * state.global_step / max(state.max_steps, 1):.0f} %)",
            f"loss {logs['loss']:.3f}",
        ]
        if "tokens_per_second" in logs:
            parts += [f"{logs['tokens_per_second']:,.0f} tokens/s", f"MFU {100 * logs['mfu']:.1f} %"]
        if "router/max_vio" in logs:
            parts.append(
                f"experts: busiest {1 + logs['router/max_vio_worst_layer']:.1f}x even, "
                f"{logs['router/dead_experts']:.0f} idle"
            )
        parts.append(f"{format_duration(self._seconds_left(state))} left")
        return " | ".join(parts)

    def _seconds_left(self, state) -> float:
        done = state.global_step - self._first_step
        if done <= 0:
            return float("nan")
        return (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)


def format_duration(seconds: float) -> str:
    """ "45 s", "2 min 10 s", "3 h 05 min"; "unknown time" for a NaN."""
    if seconds != seconds:
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
