# gpmetric/kernels/__init__.py: path logic only, holds no names (it is not part of the wheel)
from pathlib import Path

_checkout = Path(__file__).parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
