"""The HTML page that reports are: one look, one policy of what a page may do. It loads nothing."""

from __future__ import annotations

import base64
import hashlib
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #16191f; --soft: #5c6470; --rule: #e1e4ea;
  --accent: #2563eb; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --paper: #101318; --card: #191d24; --ink: #e8eaee; --soft: #9aa3b0;
  --rule: #2b313b; --accent: #7aa7ff; --good: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 40px 0 12px; }
p { margin: 0 0 12px; color: var(--soft); }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
.tiles, .charts, .samples { display: grid; gap: 16px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); margin-top: 24px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px; margin: 0; }
.tile b { display: block; font-size: 24px; line-height: 1.25; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 14px; }
.chart figcaption { font-weight: 600; margin-bottom: 4px; }
.chart svg { display: block; width: 100%; height: auto; color: var(--soft); }
.sample { display: grid; grid-template-columns: 96px 1fr; gap: 14px; }
.sample img { width: 96px; height: 96px; object-fit: cover; border-radius: 8px; border: 1px solid var(--rule); }
dl { margin: 0; font-size: 14px; line-height: 1.4; min-width: 0; overflow-wrap: anywhere; }
dt { color: var(--soft); font-size: 12px; }
dd { margin: 0 0 6px; }
dd.right { color: var(--good); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; border-top: 1px solid var(--rule); }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 1%; padding-right: 32px; }
td { overflow-wrap: anywhere; }
summary { cursor: pointer; }
pre { overflow-x: auto; margin: 12px 0 0; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page. ``body`` is HTML; ``script``, which runs at the end of it, is the only one that may."""
    policy = POLICY
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        body += f"\n<script>{script}</script>"
    return PAGE.format(title=escape(title), policy=policy, style=STYLE + style, body=body)


def picture(image: bytes | None, alternative: str) -> str:
    if image is None:
        return "<p>no picture</p>"
    url = f"data:{mime_type(image)};base64,{base64.b64encode(image).decode()}"
    return f'<img src="{url}" alt="{escape(alternative)}" width="96" height="96">'


def mime_type(image: bytes) -> str:
    starts = {b"\xff\xd8": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    return next((kind for start, kind in starts.items() if image.startswith(start)), "application/octet-stream")
