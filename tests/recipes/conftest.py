"""The recipe's own package lies beside its scripts, so they find it when run; the tests look there too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "mini"))
