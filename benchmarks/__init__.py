"""The measurements behind every number in the README; run from a checkout, not installed with the package."""

import sys
from importlib.util import find_spec

if _missing := [name for name in ("pandas", "tqdm", "transformers") if find_spec(name) is None]:
    sys.exit(f"benchmarks: {', '.join(_missing)} missing; run pip install '.[experiments]' in the checkout")
