"""The script of the GPU checks, where it runs without a GPU: that each section starts, ends and reports."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.gpu_session import REPO


def test_sections_report_and_failures_do_not_end_the_session(tmp_path):
    sections = ["kernels", "whole_lora"]
    command = [sys.executable, "benchmarks/gpu_session.py", "--tiny", "--out", str(tmp_path), "--sections", *sections]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, timeout=250)
    session = json.loads((tmp_path / "session.json").read_text())
    assert list(session) == sections
    assert "error" in session["kernels"], "there is no GPU"
    assert session["whole_lora"]["tokens_per_second"] > 0
    assert "whole_lora" in done.stdout
    assert (tmp_path / "whole_lora.log").exists()
