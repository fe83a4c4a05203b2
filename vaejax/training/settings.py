"""By which settings a run is this one and no other: all that stands outside "schedule"."""

from collections.abc import Mapping
from typing import Any


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a run is this one and no other."""
    return {name: value for name, value in settings.items() if name != "schedule"}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields by which a run is another one: "model.size 64 → 128"."""
    old, new = _flat(there), _flat(here)
    keys = sorted(old.keys() | new.keys())
    values = ((k, str(old.get(k)), str(new.get(k))) for k in keys if old.get(k) != new.get(k))
    return [f"{k[:60]} {there[:60]} → {here[:60]}" for k, there, here in values]


def without_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The identity but for the images, and what follows from their number."""
    left = {name: value for name, value in identity(settings).items() if name != "data"}
    left["optimizer"] = {**left.get("optimizer", {}), "cosine_decay_updates": None}
    return left


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if prefix or key != "schedule":
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
