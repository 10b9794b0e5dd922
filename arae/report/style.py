"""The style sheet of the report: readable on paper, on a phone, by day and by night."""

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #595959; --line: #d5d5d5; --page: #ffffff; --box: #f5f5f3;
  --link: #005a9c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a8a8a6; --line: #444442; --page: #161615;
  --box: #232322; --link: #7fbcf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, dd, li, figcaption { max-width: 48rem; }
a { color: var(--link); }
.note { border-left: 4px solid var(--line); padding: .3rem .8rem; color: var(--soft); }
figure { margin: 0; }
figure img { display: block; width: 100%; min-width: 40rem; background: #fff; border-radius: 4px; }
figure #reconstructions { width: auto; max-width: 100%; max-height: 60rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1.2rem 0 .4rem; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
th:first-child { text-align: left; white-space: nowrap; position: sticky; left: 0; background: var(--page); }
tbody th { font-weight: 500; }
th span { white-space: nowrap; }
ul { padding-left: 1.2rem; }
ul li { margin: .35rem 0; }
small { display: block; color: var(--soft); font-size: .76rem; font-weight: 400; white-space: nowrap; }
thead small { white-space: normal; min-width: 6.5rem; }
.best { font-weight: 700; text-decoration: underline; text-underline-offset: 3px; }
abbr { text-decoration: none; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.notes { font-size: .85rem; color: var(--soft); margin: .2rem 0 1rem; padding-left: 1.4rem; overflow-wrap: anywhere; }
details { margin: 1.4rem 0; }
summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0 0 0 1rem; }
pre { background: var(--box); padding: .7rem .9rem; overflow-x: auto; border-radius: 4px; font-size: .85rem;
  line-height: 1.45; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --box: #f5f5f3; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  figure, table, pre, tr { break-inside: avoid; }
  figure img { min-width: 0; max-width: 100%; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .25rem .35rem; }
  thead small { min-width: 0; }
}
"""
