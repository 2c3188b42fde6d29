"""What pages are made of: pieces of HTML, the style sheet of the report, and the page of `ziprc inspect` with its script.

Pieces take text and escape it, except where they say that they take HTML. In the page of `ziprc inspect`, %TITLE% and %DATA% are filled in by inspection.py, escaped; the script puts model text on the page as `textContent` only.
"""
# ruff: noqa: E501

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# --- pieces of HTML --------------------------------------------------------------------------------------------------


def esc(text: object) -> str:
    return html.escape(str(text))


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def as_interval(result: Record | float | None) -> Record:
    """A result that may be a bare number, as an interval without ends."""
    return result if isinstance(result, Mapping) else {"value": result, "low": None, "high": None}


def interval(record: Record, digits: int = 3) -> str:
    """A value with its interval underneath."""
    ends = (
        ""
        if record["low"] is None
        else f"<small>{number(record['low'], digits)} … {number(record['high'], digits)}</small>"
    )
    return f"{number(record['value'], digits)}{ends}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls sideways by itself; cells are HTML already, header and caption are text."""
    head = "".join(f"<th>{esc(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{''.join(parts)}</section>"


def panels(svgs: Iterable[str]) -> str:
    return '<div class="panels">' + "".join(f"<figure>{svg}</figure>" for svg in svgs) + "</div>"


def say(text: str) -> str:
    return f"<p>{esc(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul>"


def cards(headline: Iterable[Record]) -> str:
    """A card per target: what was found, what was wanted, and whether that is met."""
    return f'<div class="cards">{"".join(map(_card, headline))}</div>'


def _card(record: Record) -> str:
    kind, verdict = {True: ("met", "reached"), False: ("missed", "missed"), None: ("open", "undecided")}[record["met"]]
    result = as_interval(record["result"])
    ends = "" if result["low"] is None else f"{number(result['low'])} … {number(result['high'])}"
    return (
        f'<div class="card {kind}"><div class="name">{esc(record["name"])}</div>'
        f'<div class="big">{found(result["value"])}</div><div class="ends">{ends}</div>'
        f'<div class="goal">{esc(record["direction"])} {record["target"]:.3g} · {verdict}</div></div>'
    )


def found(value: float | None, digits: int = 3) -> str:
    """A result or a count; counts are integers in the record and have no decimals."""
    return f"{value:,}" if isinstance(value, int) else number(value, digits)


# --- fixed text ------------------------------------------------------------------------------------------------------

REPORT_CSS = """
:root{color-scheme:light dark;--ink:#1c2128;--soft:#5d6673;--line:#dfe3e8;--page:#fff;--card:#f6f7f9;--good:#257a4c;--bad:#b8402f;--accent:#2f7fd1}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#98a1ad;--line:#343a42;--page:#14171b;--card:#1c2025;--good:#5cc08b;--bad:#ef8a78}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:auto;padding:1.4rem 1.1rem 4rem}
h1{font-size:1.9rem;line-height:1.15;margin:0}header p{color:var(--soft);margin:.35rem 0 1.2rem;font-size:1.05rem}
h2{font-size:1.25rem;margin:2.6rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.4rem 0 .2rem}
p{max-width:46rem;margin:.4rem 0 .9rem}ul{padding-left:1.2rem;max-width:46rem}li{margin:.2rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(11.2rem,1fr));gap:.7rem}
.card{background:var(--card);border-radius:10px;padding:.7rem .85rem;border-left:4px solid var(--soft);display:flex;flex-direction:column}
.card.met{border-color:var(--good)}.card.missed{border-color:var(--bad)}
.card .name{font-size:.84rem;color:var(--soft);line-height:1.3;flex:1}.card .big{font-size:1.75rem;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.3}
.card .ends{font-size:.82rem;font-variant-numeric:tabular-nums}.card .goal{font-size:.8rem;margin-top:.15rem;color:var(--soft)}
.card.met .goal{color:var(--good)}.card.missed .goal{color:var(--bad)}
.scroll{overflow-x:auto;margin:.7rem 0}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;font-size:.86rem;color:var(--soft);padding:.2rem 0}
th{text-align:left;font-weight:600;color:var(--soft);border-bottom:1px solid var(--line);padding:.35rem .7rem .35rem 0;vertical-align:bottom;white-space:nowrap}
td{border-bottom:1px solid var(--line);padding:.35rem .7rem .35rem 0;vertical-align:top;white-space:nowrap}td:first-child{min-width:8rem;white-space:normal}
td small{display:block;color:var(--soft);font-size:.74rem}.bar{height:.7rem;background:var(--accent);border-radius:3px;min-width:2px;margin-top:.35rem}td:has(.bar){width:40%}
.panels{display:flex;flex-wrap:wrap;gap:1rem 1.6rem;align-items:flex-start}figure{margin:0}.panels figure{flex:0 1 auto;max-width:100%}
.panels svg{min-width:13.5rem}.strip{margin:1.3rem 0}.strip figcaption{margin-bottom:.3rem;overflow-wrap:anywhere}.strip small{color:var(--soft)}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}.lost,.lost small{color:var(--bad)}.tied,.tied small{color:var(--soft)}
tr:has(td:first-child>b) td{background:var(--card)}td:first-child small{min-width:15rem}pre{font:.8rem/1.5 ui-monospace,Menlo,Consolas,monospace;background:var(--card);padding:.7rem;border-radius:8px;overflow:auto;max-height:24rem}
pre.response{white-space:pre-wrap;overflow-wrap:anywhere;max-height:9rem;margin:.3rem 0 0}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600}
.dag{font:11px system-ui,sans-serif}.dag text{text-anchor:middle;fill:var(--ink)}.dag rect{fill:var(--card);stroke:var(--line)}
.dag rect.model{stroke:var(--accent)}.dag .edge{fill:none;stroke:var(--soft);stroke-width:.9;opacity:.55}
@media print{details{display:block}.scroll{overflow:visible}}
"""

INSPECT_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>%TITLE%</title>
<style>
:root{color-scheme:light dark;--ink:#1c2128;--soft:#667;--line:#d8dce2;--page:#fff;--card:#f6f7f9;--accent:47,127,209}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#99a;--line:#363b43;--page:#15181c;--card:#1d2126}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1.2rem 1rem 15rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.35rem;margin:.2rem 0}p.note{color:var(--soft);margin:.2rem 0 1rem}
article{border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem;margin:1rem 0;background:var(--card)}
article h2{font-size:1rem;margin:0 0 .3rem;white-space:pre-wrap;overflow-wrap:anywhere}.meta{color:var(--soft);font-size:.85rem;margin-bottom:.5rem}
.right{color:#2b8a57;font-weight:600}.wrong{color:#c94a3b;font-weight:600}
.tokens{font:15px/1.9 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.tokens span{color:#14181d;padding:.12em 0;cursor:default}.tokens span.on,.tokens span:focus{outline:2px solid rgb(var(--accent));outline-offset:-1px}
#panel{position:fixed;left:0;right:0;bottom:0;background:var(--page);border-top:1px solid var(--line);padding:.5rem 1rem .7rem;
box-shadow:0 -4px 18px #0002;max-height:14.5rem;overflow:auto}#panel>div{max-width:60rem;margin:auto}
#panel table{border-collapse:collapse;font-size:.75rem;width:100%;table-layout:fixed}#panel td,#panel th{text-align:center;padding:.14rem;
font-weight:400}#panel th{color:var(--soft)}#panel td{border:1px solid var(--line)}#head{font-size:.9rem;margin-bottom:.25rem}
.scale{display:inline-block;width:9rem;height:.7rem;border-radius:4px;vertical-align:middle;margin:0 .4rem;
background:linear-gradient(90deg,rgb(239,122,92),rgb(246,224,150),rgb(118,184,232))}
</style></head><body>
<h1>%TITLE%</h1>
<p class="note">Each token is coloured by the expected score just before it was sampled: 0<span class="scale"></span>1.
Point at a token, or move with the arrow keys, to see the joint distribution over final score and remaining tokens.</p>
<main></main>
<div id="panel"><div><div id="head">Point at a token.</div><table></table></div></div>
<script id="data" type="application/json">%DATA%</script>
<script>
"use strict";
const data=JSON.parse(document.getElementById("data").textContent);
const main=document.querySelector("main"),head=document.getElementById("head"),table=document.querySelector("#panel table");
const stops=[[239,122,92],[246,224,150],[118,184,232]];
const colour=x=>{const s=Math.min(Math.max(x,0),1)*2,i=Math.min(Math.floor(s),1),f=s-i;
  return "rgb("+stops[i].map((a,k)=>Math.round(a+(stops[i+1][k]-a)*f)).join(",")+")"};
const make=(tag,text,name)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(name)e.className=name;return e};
let on=null;
function show(r,t,span){
  if(on)on.classList.remove("on");on=span;span.classList.add("on");
  head.textContent=`token ${t} of ${r.length} · expected score ${r.expected[t].toFixed(2)} · median ${r.median[t].toFixed(0)} `+
    `tokens to come, really ${r.length-t}`;
  table.replaceChildren();
  const L=data.lengths.length,top=make("tr");top.append(make("th","score \\\\ left"));
  data.lengths.forEach(l=>top.append(make("th",l)));table.append(top);
  const best=Math.max(...r.joint[t]);
  for(let i=data.rewards.length-1;i>=0;i--){const row=make("tr");row.append(make("th",data.rewards[i]));
    for(let l=0;l<L;l++){const p=r.joint[t][i*L+l],c=make("td",p>=.005?(100*p).toFixed(0)+"%":"");
      c.style.background=`rgba(var(--accent),${(best?p/best:0)*.75})`;row.append(c)}
    table.append(row)}
}
for(const r of data.rollouts){
  const box=make("article");box.append(make("h2",r.question));
  const meta=make("div",`${r.difficulty} · ${r.length} tokens · ${r.id} · `,"meta");
  const good=r.score>=.5;meta.append(make("span",!r.finished?"cut off":good?"right":"wrong",good?"right":"wrong"));box.append(meta);
  const line=make("div",undefined,"tokens");
  r.tokens.forEach((text,t)=>{const s=make("span",text.replace(/\\n/g,"⏎\\n"));s.style.background=colour(r.expected[t]);
    s.tabIndex=t?-1:0;s.onpointerenter=s.onclick=s.onfocus=()=>show(r,t,s);line.append(s)});
  line.onkeydown=e=>{const d={ArrowRight:"nextSibling",ArrowLeft:"previousSibling"}[e.key];
    const s=d&&document.activeElement[d];if(s){s.focus();e.preventDefault()}};
  if(r.tokens.length<r.length)line.append(make("em",` … ${r.length-r.tokens.length} more tokens`));
  box.append(line);main.append(box);
}
const first=data.rollouts[0];if(first)show(first,0,document.querySelector(".tokens span"));
</script></body></html>
"""
