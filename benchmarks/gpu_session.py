"""All that needs a GPU, in one call of at most nine minutes: is it right, how fast is it, what does it need?

    python benchmarks/gpu_session.py --out results            # everything, one process a section
    python benchmarks/gpu_session.py --out results --sections kernels syncs
    python benchmarks/gpu_session.py --out results --wheels wheels    # packages to import before what is installed

Sections are in the order of what they are worth; one that fails or runs out of its time leaves what it has written and
the next begins. `session.json` holds all figures, `SECTION.log` what a section printed. On a machine without a GPU the
sections that can run do so in tiny (`--tiny`), which is how this script is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent


def environment(options: argparse.Namespace) -> dict:
    """What the figures were measured on."""
    import torch
    import transformers

    from xtuner_hf.device import device_name, measured_matmul_flops
    from xtuner_hf.kernels.select import has_triton

    device = where()
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matrix_tflops": measured_matmul_flops(device) / 1e12,
    }
    if has_triton():
        import triton

        facts["triton"] = triton.__version__
    if device.type == "cuda":
        facts["memory_gigabytes"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return facts


def kernels(options: argparse.Namespace) -> dict:
    """Each Triton kernel against plain torch in fp64, and the FP8 ones against the recipe."""
    from tests.kernels import triton_cases, triton_fp8_cases

    errors = triton_cases.all_cases("cuda")
    fp8_errors = triton_fp8_cases.all_cases("cuda")
    half = max(error for name, error in errors.items() if "bfloat16" in name)
    single = max(error for name, error in errors.items() if "bfloat16" not in name)
    passed = half <= 2**-8 and single <= 1e-5 and max(fp8_errors.values()) <= 1e-5
    return {"passed": passed, "worst_bf16": half, "worst_fp32": single, "fp8": fp8_errors, "all": errors}


def paths(options: argparse.Namespace) -> dict:
    """The fused path of whole experts in bf16 against fp64, next to the step-by-step path's error; and the FP8 path
    against the same recipe in plain torch on a CPU."""
    import torch

    from tests.kernels.layers import ROUTINGS, make_experts, step

    def worst(found: dict, expected: dict) -> float:
        pairs = [(found[name].double().cpu(), value.double()) for name, value in expected.items()]
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    figures = {}
    for kind in ("swiglu", "gpt_oss"):
        for routing, ids_TK in ROUTINGS.items():
            on_cpu, experts = (make_experts(kind, torch.bfloat16) for _ in range(2))
            references = {"grouped_mm": step("reference", make_experts(kind), ids_TK)}
            references["fused"] = references["grouped_mm"]
            references["fp8"] = step("fp8", on_cpu, ids_TK, torch.bfloat16)
            experts.to(where())
            figures[f"{kind}, {routing}"] = {
                kernel: worst(step(kernel, experts, ids_TK.to(where()), torch.bfloat16), expected)
                for kernel, expected in references.items()
            }
    passed = all(
        errors["fused"] <= max(1.3 * errors["grouped_mm"], 0.02) and errors["fp8"] <= 0.05
        for errors in figures.values()
    )
    return {"passed": passed, "errors": figures}


def syncs(options: argparse.Namespace) -> dict:
    """A layer's forward and backward under an error for every call that makes the host wait (EP 1)."""
    import torch

    from xtuner_hf.bench.shapes import SHAPES
    from xtuner_hf.models.auto import AutoModelForCausalLM
    from xtuner_hf.models.fp8 import use_fp8
    from xtuner_hf.models.fused import fuse_norms

    figures: dict[str, Any] = {}
    for name in ("qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"):
        for fp8 in (False, True):
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(SHAPES[name].made_tiny().config(), dtype=torch.bfloat16)
            fuse_norms(model)
            if fp8:
                use_fp8(model, torch.device("cuda"))
            block = model.model.layers[-1].mlp
            hidden_BSH = torch.randn(1, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            block(hidden_BSH).sum().backward()  # compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                block(hidden_BSH).sum().backward()
                outcome = "none"
            except RuntimeError as error:
                outcome = str(error)[:300]
            torch.cuda.set_sync_debug_mode("default")
            figures[f"{name}{', fp8' if fp8 else ''}"] = outcome
    return {"passed": set(figures.values()) == {"none"}, "synchronising calls": figures}


def products(options: argparse.Namespace) -> dict:
    """TFLOP/s of the FP8 products and of bf16's at the experts' and projections' sizes: is there something to gain?"""
    import torch
    import torch.nn.functional as F

    from xtuner_hf.bench.rates import seconds_of
    from xtuner_hf.kernels import triton_fp8
    from xtuner_hf.kernels.fp8 import BLOCK

    def rates(experts: int, rows: int, summed: int, columns: int) -> dict[str, float]:
        device = torch.device("cuda")
        x_RA = torch.randn(rows, summed, device=device, dtype=torch.bfloat16)
        y_RB = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        weight_EBA = torch.randn(experts, columns, summed, device=device, dtype=torch.bfloat16)
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts // BLOCK * BLOCK)
        x, weight = triton_fp8.quantise_rows(x_RA), triton_fp8.quantise_blocks(weight_EBA)
        x_columns, y_columns = triton_fp8.quantise_columns(x_RA), triton_fp8.quantise_columns(y_RB)
        calls: dict[str, Callable[[], Any]] = {
            "bf16 forward": lambda: F.grouped_mm(x_RA, weight_EBA.transpose(1, 2), offs=ends),
            "bf16 wgrad": lambda: F.grouped_mm(y_RB.t(), x_RA, offs=ends),
            "fp8 forward": lambda: triton_fp8.grouped_mm(x, weight, ends, torch.bfloat16),
            "fp8 wgrad": lambda: triton_fp8.grouped_outer(y_columns, x_columns, ends, torch.bfloat16),
            "quantise rows": lambda: triton_fp8.quantise_rows(x_RA),
            "quantise columns": lambda: triton_fp8.quantise_columns(x_RA),
            "quantise weights": lambda: triton_fp8.quantise_blocks(weight_EBA),
        }
        seconds = {name: seconds_of(call, device) for name, call in calls.items()}
        work = 2 * int(ends[-1]) * summed * columns / 1e12
        products = {name: taken for name, taken in seconds.items() if "quantise" not in name}
        tflops = {f"{name} TFLOP/s": work / taken for name, taken in products.items()}
        return tflops | {f"{name} ms": 1e3 * taken for name, taken in seconds.items()}

    # Gate and up of each shape's experts, and a dense projection: (experts, rows, summed, columns).
    sizes = {
        "qwen3-30b-a3b experts": (128, 262144, 2048, 1536),
        "qwen3-235b-a22b experts": (128, 262144, 4096, 3072),
        "deepseek-v3 experts": (256, 131072, 7168, 4096),
        "deepseek-v3 dense": (1, 16384, 7168, 16384),
    }
    return {name: rates(*size) for name, size in sizes.items()}


def block(options: argparse.Namespace) -> dict:
    """One MoE block: overhead over its bare products, and peak memory next to transformers'."""
    import torch

    from benchmarks.moe_block import measure

    size = {"shape": "small", "tokens": 4096} if options.tiny else {"shape": "qwen3-30b-a3b", "tokens": 32768}
    device = where().type
    figures = measure(
        size, torch.float32 if device == "cpu" else torch.bfloat16, device, repeats=2 if options.tiny else 5
    )
    return {"passed": figures["fused"]["peak_over_transformers"] <= 0.6, **figures}


def stack(shape: str, tokens: int, variants: list[str], recomputes: list[str], deadline: float) -> Callable:
    """A section that runs `xtuner-hf bench` on one shape, documents of 4k."""

    def section(options: argparse.Namespace) -> dict:
        from xtuner_hf.bench.arguments import add_arguments
        from xtuner_hf.bench.command import run_benchmark

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        arguments = ["--shapes", shape, "--routings", "real", "--recomputes", *recomputes, "--variants", *variants]
        sizes = ["--tiny", "--tokens", "64", "--lengths", "32"] if options.tiny else ["--tokens", str(tokens)]
        lengths = [] if options.tiny else ["--lengths", "4096"]
        out = ["--out", str(options.out / f"bench-{shape}"), "--deadline", str(deadline)]
        return run_benchmark(parser.parse_args([*arguments, *sizes, *lengths, *out]))

    return section


def fp8_loss(options: argparse.Namespace) -> dict:
    """The loss curve over 300 steps, FP8 next to bf16 from the same start."""
    from benchmarks.fp8_loss import train, worst_difference

    size = {"steps": 12, "batch": 2} if options.tiny else {"steps": 300, "batch": 16}
    bf16, fp8 = train(**size), train(**size, fp8=True)
    worst = worst_difference(fp8, bf16, window=10)
    return {"passed": worst < 0.01, "worst_difference": worst, "losses": {"bf16": bf16, "fp8": fp8}}


def whole(options: argparse.Namespace) -> dict:
    """All layers of Qwen3-30B-A3B's shape on one card: full fine-tuning with 8-bit AdamW stepping in backward."""
    return train_whole(
        options,
        max_grad_norm=0.0,
        optimizer_in_backward=True,
        optimizer_states="bf16" if options.tiny else "8bit",
    )


def whole_lora(options: argparse.Namespace) -> dict:
    """The same model with LoRA on attention and on all experts."""
    return train_whole(options, lora=True)


def train_whole(options: argparse.Namespace, lora: bool = False, **arguments: Any) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    import xtuner_hf
    from xtuner_hf.bench.run import StepClock
    from xtuner_hf.bench.shapes import SHAPES
    from xtuner_hf.data import PackedCollator

    shape, device = SHAPES["qwen3-30b-a3b"], where()
    config = (shape.made_tiny() if options.tiny else shape).config()
    if not options.tiny:
        config.num_hidden_layers, config.vocab_size = shape.published_layers, 151_936
    length, rows = (32, 2) if options.tiny else (4096, 2)
    with torch.device(device):
        model: Any = xtuner_hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if lora:
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=16, target_modules=attention, target_parameters=experts))
    clock = StepClock(device)
    tokens = torch.randint(2, config.vocab_size, (4 * rows, length)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        args = xtuner_hf.MoETrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=4,
            logging_steps=1,
            recompute="full",
            save_strategy="no",
            report_to=[],
            use_cpu=device.type == "cpu",
            bf16=False,
            **arguments,
        )
        trainer = xtuner_hf.MoETrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
            data_collator=PackedCollator(pad_token_id=0, padding_free=True),
            callbacks=[clock],
        )
        trainer.train()
    seconds = min(step["step"] for step in clock.steps[1:])
    return {
        "parameters": parameters,
        "tokens_per_second": rows * length / seconds,
        "step_seconds": [step["step"] for step in clock.steps],
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        **arguments,
    }


# name: (what it does, its seconds)
OURS = ["ours", "ours compiled", "ours fp8", "stock grouped_mm"]
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], dict], int]] = {
    "environment": (environment, 30),
    "kernels": (kernels, 80),
    "paths": (paths, 40),
    "syncs": (syncs, 40),
    "products": (products, 40),
    "block": (block, 40),
    "qwen3-30b-a3b": (stack("qwen3-30b-a3b", 32768, OURS, ["none", "full"], 80), 110),
    "qwen3-235b-a22b": (stack("qwen3-235b-a22b", 65536, OURS, ["none"], 50), 75),
    "deepseek-v3": (stack("deepseek-v3", 16384, ["ours", "ours fp8", "stock grouped_mm"], ["none"], 40), 65),
    "gpt-oss-20b": (stack("gpt-oss-20b", 16384, ["ours", "stock grouped_mm"], ["none"], 30), 50),
    "fp8_loss": (fp8_loss, 75),
    "whole": (whole, 100),
    "whole_lora": (whole_lora, 60),
}


def where() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_section(name: str, options: argparse.Namespace, deadline: float) -> dict:
    """One section in a process of its own; what it returned, or why it returned nothing."""
    log, result = options.out / f"{name}.log", options.out / f".{name}.json"
    command = [sys.executable, __file__, "--out", str(options.out), "--section", name]
    seconds = min(SECTIONS[name][1] * (10 if options.tiny else 1), deadline - time.monotonic())
    started = time.monotonic()
    with log.open("w") as stream:
        try:
            subprocess.run(
                [*command, "--tiny"] if options.tiny else command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=options.environment,
                timeout=max(seconds, 1),
                check=True,
            )
            outcome = json.loads(result.read_text())
        except subprocess.TimeoutExpired:
            outcome = {"error": f"no end after {seconds:.0f} s"}
        except subprocess.CalledProcessError:
            outcome = {"error": "\n".join(log.read_text().splitlines()[-5:])}
    result.unlink(missing_ok=True)
    return outcome | {"took_seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=540, help="for all of them")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to import before what is installed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.section is not None:
        figures = SECTIONS[options.section][0](options)
        (options.out / f".{options.section}.json").write_text(json.dumps(figures))
        return
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(options.wheels.glob("*.whl")) if options.wheels else []:
            zipfile.ZipFile(wheel).extractall(folder)
        search = [str(REPO / "src"), str(REPO), folder, os.environ.get("PYTHONPATH", "")]
        options.environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
        session: dict[str, Any] = {}
        for name in options.sections:
            if time.monotonic() > deadline - 10:
                session[name] = {"error": "no time was left"}
                continue
            session[name] = run_section(name, options, deadline)
            (options.out / "session.json").write_text(json.dumps(session, indent=1) + "\n")
            figures = session[name]
            verdict = figures.get("error") or {True: "passed", False: "FAILED"}.get(figures.get("passed"), "measured")
            print(f"{name} ({figures['took_seconds']} s): {verdict}", flush=True)


if __name__ == "__main__":
    main()
