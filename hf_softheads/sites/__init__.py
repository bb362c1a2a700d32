"""The places in a model that can be replaced, one file each; importing this package imports them all."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from hf_softheads.registry import variants
from hf_softheads.sites.base import Site


def _discover() -> tuple[Site, ...]:
    found: list[Site] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            here = getattr(value, "__module__", None) == module.__name__
            if here and isinstance(value, type) and issubclass(value, Site) and value is not Site:
                found.append(value())
    return tuple(sorted(found, key=lambda site: site.order))


SITES = _discover()


def slots() -> tuple[str, ...]:
    """The keywords that name what to replace: `head`, `attention`, …"""
    return tuple(dict.fromkeys(site.slot for site in SITES))


def options() -> tuple[str, ...]:
    """The keywords beside them: `layers`, …"""
    return tuple(name for site in SITES for name in site.options)


def site_for(slot: str, value: Any) -> Site:
    """The site of a slot whose kind of variant `value` is; the slot's first one where it is none of any."""
    here = [site for site in SITES if site.slot == slot]
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", value)
    kind = getattr(value, "kind", None)
    for site in here:
        if kind == site.kind or (isinstance(name, str) and name in variants(site.kind)):
            return site
    return here[0]
