"""Typed access to a config.json. Knows types and names, not what they mean."""

from collections.abc import Mapping

from kiloq.errors import ConfigError

_MOST = 2**31 - 1  # what a size or a length can be in any file
_LARGEST = 1e18


class Fields:
    """Values of a config.json, so that a wrong type is one clear error and never a crash deep in the model."""

    def __init__(self, hf: Mapping[str, object]) -> None:
        self.hf = hf

    def first(self, *names: str) -> object:
        return next((self.hf[name] for name in names if self.hf.get(name) is not None), None)

    def integer(self, *names: str, default: int | None = None, most: int = _MOST) -> int:
        value = self.first(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"config.json: {' or '.join(names)} is {value!r}; a whole number is needed.")
        if not 0 <= value <= most:
            # Python refuses to show a number of thousands of digits.
            shown = f"{value:,}" if value.bit_length() <= 64 else f"a number of {value.bit_length():,} bits"
            raise ConfigError(
                f"config.json: {' or '.join(names)} is {shown}; it must be at least 0 and at most {most:,}."
            )
        return value

    def number(self, *names: str, default: float) -> float:
        value = self.first(*names)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"config.json: {' or '.join(names)} is {value!r}; a number is needed.")
        if not abs(value) <= _LARGEST:  # NaN too
            shown = f"{value}" if isinstance(value, float) else f"a number of {value.bit_length():,} bits"
            raise ConfigError(f"config.json: {' or '.join(names)} is {shown}; a number up to {_LARGEST:g} is needed.")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.hf.get(name) is None else self.number(name, default=0.0)

    def flag(self, *names: str, default: bool = False) -> bool:
        value = self.first(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {' or '.join(names)} is {value!r}; true or false is needed.")
        return value

    def dtype(self, *names: str) -> str:
        value = str(self.first(*names) or "float32").removeprefix("torch.")
        if value not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"config.json: {names[0]} is {value!r}; float32, bfloat16 or float16 is needed.")
        return value
