"""HTML files of one kind: one template, one style sheet, no script, no request. What comes from
data is escaped; only drawings and tables made here are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from motet.core.marks import marked

HERE = Path(__file__).parent


def render(template: str, folder: Path, globals_: Mapping[str, Any], **context: Any) -> str:
    """Fill a template of `folder` that extends `base.html`; equal contexts give equal bytes.
    Characters that turn the direction of writing become marks.

    `globals_` are names that macros see too.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(globals_)
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return marked(environment.get_template(template).render(style=style, **context)) + "\n"


def plain_page(kind: str, title: str, body: Sequence[str]) -> str:
    """A page of tables and drawings; `body` is HTML, one part after the other."""
    from markupsafe import Markup

    parts = Markup("\n".join(body))
    return render("plain.html", HERE, {}, kind=kind, title=title, body=parts)


def table(rows: Sequence[Mapping[str, Any]], cell: Callable[[Any], str]) -> str:
    """Return a table of dictionaries with the same keys, which are the headings; None is a dash,
    all else what `cell` says. Columns of numbers stand on the right.
    """
    numeric = {
        name: all(isinstance(row[name], int | float | None) for row in rows) for name in rows[0]
    }
    kind = {name: ' class="num"' if right else "" for name, right in numeric.items()}
    heads = "".join(
        f'<th scope="col"{kind[name]}>{escape(name.replace("_", " "))}</th>' for name in rows[0]
    )
    body = "".join(
        f"<tr>{''.join(_cell(value, cell, kind[name]) for name, value in row.items())}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def drawing(svg: str) -> str:
    """A drawing in fixed colours, which need light paper in a dark page too."""
    return f'<div class="drawn">{svg}</div>'


def _cell(value: Any, cell: Callable[[Any], str], kind: str) -> str:
    return f"<td{kind}>{'–' if value is None else escape(cell(value))}</td>"
