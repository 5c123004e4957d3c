"""TRL's own tests of its GRPO and DPO trainers, with our subclasses in their place: `python -m benchmarks.trl_tests`.

__main__.py     the command: stand-ins, pytest, summary
plugin.py       for pytest: puts our classes into the test modules, leaves tests out, counts
left_out.toml   which tests are left out, and why
stand_ins.py    the models and data sets that the tests name
"""
