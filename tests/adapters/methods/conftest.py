"""Makes `table.py`, which the files of this folder share, importable under any way of starting pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
