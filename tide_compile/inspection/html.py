"""html: pages that stand alone, from the templates beside this file. No page asks the network for anything."""

from __future__ import annotations

import functools

import jinja2


def render(template: str, **values: object) -> str:
    """The page made from ``templates/<template>``."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tide_compile.inspection"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
