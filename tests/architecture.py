"""The picture of the rooms in docs/architecture.md, made from the imports: `python -m
tests.architecture` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.imports import ARROWS, ROOT, TOP, folder_graph

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- picture: make docs -->\n", "<!-- end of the picture -->"


def shortest(edges: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The arrows that no path of other arrows stands for (the transitive reduction)."""

    def reaches(start: str, end: str, past: tuple[str, str]) -> bool:
        seen, pending = set(), [start]
        while pending:
            at = pending.pop()
            for to in edges[at]:
                if (at, to) != past and to not in seen:
                    seen.add(to)
                    pending.append(to)
        return end in seen

    return {(a, b) for a in edges for b in edges[a] if not reaches(a, b, (a, b))}


def picture() -> str:
    """The folders of each room and the arrows between them, as Mermaid's text. Every folder may use
    core, so its arrows are left out.
    """
    found = {name: set(used) - {f"core/{TOP}"} for name, used in folder_graph().items()}
    drawn = [name for name in found if found[name] or any(name in used for used in found.values())]
    lines = ["flowchart TD"]
    for room in ARROWS:
        inside = sorted(name for name in drawn if name.split("/")[0] == room)
        if not inside:
            continue
        lines.append(f'  subgraph {room}["{room}/"]')
        lines += [f'    {_key(name)}["{_label(name)}"]' for name in inside]
        lines.append("  end")
    lines += [f"  {_key(a)} --> {_key(b)}" for a, b in sorted(shortest(found))]
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def _key(name: str) -> str:
    return name.replace("/.", "_own").replace("/", "_")


def _label(name: str) -> str:
    room, _, folder = name.partition("/")
    if folder != TOP:
        return folder
    return {"launcher": "cli, worker, node, batch"}.get(room, f"{room}'s own modules")


def page_with(text: str, drawn: str) -> str:
    """The page with its picture replaced."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{drawn}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), picture()), encoding="utf-8")
