"""The page of `zoft rank`: one file without anything from elsewhere. Texts are put in as text, never as markup."""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>zoft rank</title>
<style>
:root { color-scheme: light dark; --line: #8886; --best: #1b6ca8; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 0.75rem 0.75rem 6rem; }
header { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; flex-wrap: wrap; }
h1 { font-size: 1.05rem; margin: 0.2rem 0; }
#state { font-size: 0.9rem; opacity: 0.8; }
#prompt { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); border-radius: 0.5rem; padding: 0.6rem 0.75rem;
  max-height: 30vh; overflow-y: auto; margin: 0.5rem 0; }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 0.6rem; }
.card { display: flex; flex-direction: column; border: 2px solid var(--line); border-radius: 0.5rem; background: none; color: inherit;
  font: inherit; text-align: left; padding: 0; min-height: 5rem; }
.card.ranked { border-color: var(--best); }
.card.unknown { opacity: 0.45; }
.pick { flex: 1; background: none; border: 0; color: inherit; font: inherit; text-align: left; padding: 0.6rem 0.7rem; cursor: pointer;
  white-space: pre-wrap; overflow-wrap: anywhere; min-height: 3.5rem; }
.foot { display: flex; justify-content: space-between; align-items: center; padding: 0.2rem 0.5rem 0.4rem 0.7rem; font-size: 0.85rem; }
.rank { font-weight: 700; color: var(--best); }
.foot button, nav button { font: inherit; border: 1px solid var(--line); border-radius: 0.4rem; background: var(--soft); color: inherit;
  padding: 0.45rem 0.7rem; min-height: 2.6rem; cursor: pointer; }
nav { position: fixed; left: 0; right: 0; bottom: 0; display: flex; gap: 0.4rem; justify-content: center; flex-wrap: wrap;
  padding: 0.5rem; background: Canvas; border-top: 1px solid var(--line); }
nav button[aria-pressed=true] { border-color: var(--best); font-weight: 700; }
nav .main { background: var(--best); color: #fff; }
button:focus-visible { outline: 3px solid var(--best); outline-offset: 1px; }
button:disabled { opacity: 0.4; cursor: default; }
#help { font-size: 0.85rem; opacity: 0.8; margin: 0.6rem 0; }
#error { color: #d1495b; font-weight: 600; }
</style>
</head>
<body>
<header><h1 id="title">Which text is best?</h1><span id="state" role="status"></span></header>
<div id="prompt" aria-label="prompt" tabindex="0"></div>
<p id="error" role="alert"></p>
<div id="cards"></div>
<p id="help">Choose the best text first, then the next best, as far as you can tell. Texts you leave out stand below those you chose.
Keys: 1-9 choose, = ties the next with the last, x then 1-9 "cannot tell", u undo, Enter next, ← back.</p>
<nav>
<button id="back">Back</button>
<button id="undo">Undo</button>
<button id="tie" aria-pressed="false">Tie</button>
<button id="next" class="main">Next</button>
</nav>
<script>
"use strict";
const here = location.pathname.replace(/\/?$/, "/");
let asked = null, answers = [], at = 0, tie = false, doubt = false, history = [], saving = Promise.resolve();
const $ = (id) => document.getElementById(id);
const copy = (x) => JSON.parse(JSON.stringify(x));
const letters = () => Object.keys(asked.questions[at].texts);
const now = () => answers[at];

function remember() { history.push([at, copy(answers)]); if (history.length > 500) history.shift(); }
function taken(letter) { return now().order.findIndex((tier) => tier.includes(letter)); }
function drop(letter) {
  now().order = now().order.map((tier) => tier.filter((x) => x !== letter)).filter((tier) => tier.length);
  now().unknown = now().unknown.filter((x) => x !== letter);
}
function choose(letter) {
  remember();
  const was = taken(letter) >= 0;
  drop(letter);
  if (!was) {
    if (tie && now().order.length) now().order[now().order.length - 1].push(letter);
    else now().order.push([letter]);
  }
  tie = false;
  save(); show();
}
function unsure(letter) {
  remember();
  const was = now().unknown.includes(letter);
  drop(letter);
  if (!was) now().unknown.push(letter);
  doubt = false;
  save(); show();
}
function undo() {
  if (!history.length) return;
  [at, answers] = history.pop();
  tie = doubt = false;
  save(); show();
}
async function send(what) {
  const reply = await fetch(here + what, { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ step: asked.step, at, rankings: answers }) });
  if (!reply.ok) throw new Error(await reply.text());
}
function save() {
  saving = saving.then(() => send("draft")).then(() => { $("error").textContent = ""; },
    (e) => { $("error").textContent = "Not saved: " + e.message; });
}
async function next() {
  if (at + 1 < asked.questions.length) { remember(); at += 1; tie = doubt = false; save(); show(); scrollTo(0, 0); return; }
  $("next").disabled = true;
  try { await saving; await send("answer"); await load(); }
  catch (e) { $("error").textContent = "Not saved: " + e.message; $("next").disabled = false; }
}
function back() { if (at > 0) { at -= 1; tie = doubt = false; show(); } }
function show() {
  const q = asked.questions[at];
  $("state").textContent = `step ${asked.step}, question ${at + 1} of ${asked.questions.length}`;
  $("prompt").textContent = q.prompt;
  const cards = $("cards");
  cards.replaceChildren();
  letters().forEach((letter, i) => {
    const place = taken(letter), unknown = now().unknown.includes(letter);
    const card = document.createElement("div"), pick = document.createElement("button"), foot = document.createElement("div");
    const rank = document.createElement("span"), not = document.createElement("button");
    card.className = "card" + (place >= 0 ? " ranked" : "") + (unknown ? " unknown" : "");
    pick.className = "pick"; pick.dataset.letter = letter;
    pick.textContent = q.texts[letter] || "(nothing)";
    pick.setAttribute("aria-pressed", place >= 0);
    pick.onclick = () => (doubt ? unsure(letter) : choose(letter));
    foot.className = "foot";
    rank.className = "rank";
    const tied = place >= 0 && now().order[place].length > 1 ? " (tied)" : "";
    rank.textContent = place >= 0 ? `${place + 1}.${tied}` : unknown ? "cannot tell" : i < 9 ? `key ${i + 1}` : "";
    not.textContent = "cannot tell"; not.dataset.unsure = letter;
    not.onclick = () => unsure(letter);
    foot.append(rank, not);
    card.append(pick, foot);
    cards.append(card);
  });
  $("tie").setAttribute("aria-pressed", tie);
  $("back").disabled = at === 0;
  $("undo").disabled = !history.length;
  $("next").disabled = false;
  $("next").textContent = at + 1 < asked.questions.length ? "Next" : "Done";
}
async function load() {
  const reply = await fetch(here + "question");
  if (!reply.ok) { $("error").textContent = await reply.text(); return; }
  const found = await reply.json();
  if (!found.question) {
    asked = null;
    document.body.replaceChildren();
    const end = document.createElement("h1");
    end.id = "end"; end.textContent = found.done;
    document.body.append(end);
    return;
  }
  asked = found.question; history = []; tie = doubt = false;
  answers = found.draft ? found.draft.rankings : asked.questions.map(() => ({ order: [], unknown: [] }));
  at = found.draft ? found.draft.at : 0;
  show();
}
$("back").onclick = back; $("undo").onclick = undo; $("next").onclick = next;
$("tie").onclick = () => { tie = !tie; show(); };
addEventListener("keydown", (e) => {
  if (!asked || e.ctrlKey || e.metaKey || e.altKey) return;
  const n = "123456789".indexOf(e.key);
  if (n >= 0 && n < letters().length) { const letter = letters()[n]; doubt ? unsure(letter) : choose(letter); }
  else if (e.key === "=") { tie = !tie; show(); }
  else if (e.key === "x") { doubt = !doubt; }
  else if (e.key === "u") undo();
  else if (e.key === "ArrowLeft") back();
  else if (e.key === "Enter") { if (document.activeElement && document.activeElement.tagName === "BUTTON") document.activeElement.blur(); next(); }
  else return;
  e.preventDefault();
});
load();
</script>
</body>
</html>
"""
