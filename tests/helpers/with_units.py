"""``python with_units.py SCRIPT ARGUMENTS``: the script with the units of tests/helpers/units.py."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from units import force_units

force_units()
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as python itself does
runpy.run_path(sys.argv[0], run_name="__main__")
# Ranks leave as those of the launchers do: the interpreter's shutdown can abort a process whose work is done
# (pytorch/pytorch#38228).
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
