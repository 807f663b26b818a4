"""The report's page: HTML in one file, without a script and without a request to anywhere.

Light and dark follow the reader's system (and print is light); one column on a phone, two or more
on a screen.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

from ferjax.analysis.figures import DARK, LIGHT

_PLACES = {"light": {"page": "#ffffff", "card": "#f3f6f8"}, "dark": {"page": "#14191e"}}
_PLACES["dark"]["card"] = "#1d242b"
_CSS = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--grid);padding-bottom:.2rem}
p,li{max-width:46rem}a{color:var(--accent)}.note{color:var(--muted);font-size:.92rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.92rem;margin:.6rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem}
.card{background:var(--card);border-radius:.5rem;padding:.7rem .9rem}
.card b{display:block;font-size:1.5rem;line-height:1.25}.card span{font-size:.88rem}
.card.main{grid-column:1/-1}.card.main b{font-size:2.3rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;max-width:34rem}figcaption{font-size:.92rem}
svg{width:100%;height:auto;display:block;font-family:inherit}svg text{fill:var(--ink)}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.faces{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.2rem,1fr));gap:.6rem}
.faces img{width:100%;display:block;border-radius:.25rem;background:var(--card)}
.faces figcaption{font-size:.8rem;line-height:1.3;overflow-wrap:anywhere}
.faces .wrong{color:var(--second);font-weight:600}.faces .right{color:var(--third)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
th,td{text-align:right;padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}
pre{overflow-x:auto;background:var(--card);padding:.7rem;border-radius:.4rem;font-size:.82rem}
@media print{body{max-width:none;font-size:11pt}nav{display:none}h2{break-after:avoid}
figure,.card,tr{break-inside:avoid}details>*{display:block}pre{white-space:pre-wrap}}
"""


def escape(text: object) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def page(title: str, sections: Sequence[tuple[str, str, str]], head: str) -> str:
    """The whole page.

    Args:
      title: of the page.
      sections: (id, heading, HTML) in order; each gets a link at the top.
      head: HTML between the title and the links.
    """
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in {**colours, **_PLACES[kind]}.items())
        for kind, colours in (("light", LIGHT), ("dark", DARK))
    )
    style = (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{_CSS}"
    )
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>{content}</section>\n'
        for key, name, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<link rel="icon" href="data:,"/>'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>\n"
        f"<header><h1>{escape(title)}</h1>{head}<nav>{links}</nav></header>\n<main>\n{body}</main>"
        "</body></html>\n"
    )


def cards(values: Iterable[tuple[str, str]], *, first: tuple[str, str] | None = None) -> str:
    """(value, what it is) pairs as tiles, the first one large."""
    main = f'<div class="card main"><b>{first[0]}</b><span>{first[1]}</span></div>' if first else ""
    tiles = (f'<div class="card"><b>{a}</b><span>{b}</span></div>' for a, b in values)
    return f'<div class="cards">{main}{"".join(tiles)}</div>'


def figures(drawn: Iterable[tuple[str, str]]) -> str:
    """(SVG, caption) pairs side by side."""
    each = (
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in drawn
    )
    return f'<div class="figures">{"".join(each)}</div>'


def faces(images: Iterable[tuple[bytes, str, str]]) -> str:
    """(PNG, text for those who can't see it, caption as HTML) of small images as a sheet."""
    each = (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}"/><figcaption>{caption}</figcaption></figure>'
        for data, text, caption in images
    )
    return f'<div class="faces">{"".join(each)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    rows_html = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{rows_html}</table></div>'


def pairs(values: Mapping[str, object]) -> str:
    """Names and values as a table of two columns."""
    return table(("", ""), values.items())


def note(text: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{escape(text)}</p>'
