"""Python runs this before anything else where the folder is on its path: programs find the stand-in by themselves."""

from tests import npu_standin

npu_standin.install()
