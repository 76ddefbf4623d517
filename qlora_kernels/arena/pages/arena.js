// The arena's page. Replies reach it as text nodes alone: nothing here sets HTML. Whose they are is
// not known to the page before the server has taken the vote.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const state = { pair: null, step: "", better: "", sending: false };

// --- the server -----------------------------------------------------------------------------------

async function post(path, body = {}) {
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error.message), { code: answer.error.code });
  return answer;
}

/** Tries again where the connection fails: a vote that is sent twice is counted once. */
async function surely(path, body) {
  for (let wait = 400; ; wait *= 2) {
    try {
      return await post(path, body);
    } catch (error) {
      if (!(error instanceof TypeError) || wait > 8000) throw error;
      await new Promise((go) => setTimeout(go, wait));
    }
  }
}

function complain(error) {
  $("note").textContent = error instanceof TypeError ? "No connection. Your last answer is not saved yet; try again." : error.message;
  $("note").hidden = false;
  setTimeout(() => { $("note").hidden = true; }, 5000);
}

async function next() {
  if (state.sending) return;
  state.sending = true;
  try {
    const answer = await surely("/api/next");
    state.pair = answer.pair;
    drawProgress(answer.votes, answer.pairs);
    if (state.pair) drawPair(); else drawEnd(answer.votes);
  } catch (error) { complain(error); } finally { state.sending = false; }
}

async function vote(guess) {
  if (state.sending) return;
  state.sending = true;
  try {
    const { token } = state.pair;
    const names = await surely("/api/vote", { token, better: state.better, guess });
    drawProgress(state.votes + 1, state.pairs);
    reveal(names, guess);
  } catch (error) {
    complain(error);
    if (error.code) { state.sending = false; await next(); }
  } finally { state.sending = false; }
}

async function skip() {
  if (state.sending || !["better", "guess"].includes(state.step)) return;
  state.sending = true;
  try { await surely("/api/skip", { token: state.pair.token }); } catch (error) { complain(error); }
  state.sending = false;
  next();
}

// --- drawing --------------------------------------------------------------------------------------

/** Text with code fences and `code`, as elements and text nodes. */
function written(text) {
  if (!text.trim()) return [make("p", { className: "empty", textContent: "(an empty reply)" })];
  const parts = [];
  const prose = (words) => {
    for (const paragraph of words.split(/\n{2,}/)) {
      if (!paragraph.trim()) continue;
      const p = make("p");
      for (const piece of paragraph.replace(/^\n+|\n+$/g, "").split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
        if (/^`[^`]+`$/.test(piece)) p.append(make("code", { textContent: piece.slice(1, -1) }));
        else if (/^\*\*[^*]+\*\*$/.test(piece)) p.append(make("strong", { textContent: piece.slice(2, -2) }));
        else if (piece) p.append(piece);
      }
      parts.push(p);
    }
  };
  let at = 0;
  for (const match of text.matchAll(/^```([^\n`]*)\n([\s\S]*?)(?:^```[ \t]*$|$(?![\s\S]))/gm)) {
    prose(text.slice(at, match.index));
    parts.push(make("pre", {}, make("code", { textContent: match[2].replace(/\n$/, "") })));
    at = match.index + match[0].length;
  }
  prose(text.slice(at));
  return parts;
}

function drawProgress(votes, pairs) {
  Object.assign(state, { votes, pairs });
  $("count").textContent = `${votes} of ${pairs}`;
  $("fill").style.width = `${pairs ? (100 * votes) / pairs : 0}%`;
  $("track").setAttribute("aria-valuemax", pairs);
  $("track").setAttribute("aria-valuenow", votes);
}

function drawPair() {
  const { question, left, right } = state.pair;
  $("question").textContent = question;
  for (const [side, text] of [["left", left], ["right", right]]) {
    $(`${side}-said`).replaceChildren(...written(text));
    $(`${side}-who`).replaceChildren();
    $(side).className = "reply";
  }
  $("end").hidden = true;
  $("pair").hidden = $("dock").hidden = false;
  $("main").scrollTop = 0;
  $("replies").scrollLeft = 0;
  step("better");
}

function drawEnd(votes) {
  $("pair").hidden = $("dock").hidden = true;
  $("end").hidden = false;
  $("end-title").textContent = votes ? "That was the last pair." : "There is nothing left to compare.";
  $("end-text").textContent = votes ? `Thank you for ${votes} ${votes === 1 ? "vote" : "votes"}. You can close this page.` : "You can close this page.";
  state.step = "end";
}

const STEPS = {
  better: () => ({
    ask: "Which reply is better?",
    choices: [["A is better", "1", () => better("left")], ["Tie", "0", () => better("tie")], ["B is better", "2", () => better("right")]],
  }),
  guess: () => ({
    ask: `Which one is ${state.pair.find}’s?`,
    choices: [["A", "1", () => vote("left")], ["B", "2", () => vote("right")], ["Neither", "3", () => vote("neither")], ["Can’t tell", "0", () => vote("unsure")]],
  }),
  told: () => ({ ask: state.said, choices: [["Next pair", "Enter", next]] }),
};

function step(name) {
  state.step = name;
  const { ask, choices } = STEPS[name]();
  $("ask").textContent = ask;
  $("ask").className = `ask ${name === "told" ? state.mark : ""}`;
  $("choices").className = `choices${choices.length > 3 ? " four" : ""}`;
  $("choices").replaceChildren(...choices.map(([text, key, act]) => {
    const button = make("button", { type: "button", onclick: act }, make("span", { textContent: text }), make("kbd", { textContent: key }));
    if (name === "told") button.className = "main";
    return button;
  }));
  state.keys = Object.fromEntries(choices.map(([, key, act]) => [key, act]));
  $("back").hidden = name !== "guess";
  $("skip").hidden = $("keys").hidden = name === "told";
}

function better(side) {
  state.better = side;
  mark();
  if (state.pair.find) step("guess"); else vote(null);
}

function mark() {
  for (const side of ["left", "right"]) {
    $(side).classList.toggle("won", state.better === side);
    $(side).classList.toggle("lost", !["tie", side].includes(state.better));
  }
}

function reveal(names, guess) {
  for (const side of ["left", "right"]) $(`${side}-who`).append(names[side]);
  state.said = "Thank you.";
  state.mark = "";
  if (names.correct !== null) {
    state.mark = names.correct ? "right" : "wrong";
    state.said = names.correct ? "You could tell." : "Not this time.";
  } else if (guess === "unsure") {
    state.said = "Now you know.";
  }
  step("told");
}

// --- hands on -------------------------------------------------------------------------------------

function theme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("qlora-theme", JSON.stringify(name)); } catch { /* not allowed here */ }
}

let wanted = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
try { wanted = JSON.parse(localStorage.getItem("qlora-theme")) ?? wanted; } catch { /* none kept */ }
theme(wanted);
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("back").onclick = () => { state.better = ""; for (const s of ["left", "right"]) $(s).className = "reply"; step("better"); };
$("skip").onclick = skip;
$("replies").onscroll = () => {
  const replies = $("replies");
  const second = replies.scrollLeft > (replies.scrollWidth - replies.clientWidth) / 2;
  const [a, b] = document.querySelectorAll(".dots i");
  a.classList.toggle("on", !second);
  b.classList.toggle("on", second);
};
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  // On a button Enter presses that button; the keys below would press a second one.
  if (event.key === "Enter" && event.target.tagName === "BUTTON") return;
  const same = { ArrowLeft: "1", a: "1", ArrowRight: "2", b: "2", ArrowDown: "0", "=": "0", n: "3" }[event.key] ?? event.key;
  const key = state.step === "guess" && event.key === "ArrowDown" ? "" : same;
  const act = state.keys?.[key] ?? { s: skip, t: () => $("theme").click(), Escape: () => !$("back").hidden && $("back").click() }[event.key];
  if (act && state.step !== "end") { event.preventDefault(); act(); }
};
next();
