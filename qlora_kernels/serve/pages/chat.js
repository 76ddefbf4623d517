// The chat page. Whatever a model says reaches the page as text nodes alone: nothing here sets HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, max_tokens: 512, seed: "" };
const STARTERS = [
  "Explain why the sky is blue to a ten-year-old.",
  "Write a Python function that tells whether a word is a palindrome.",
  "Plan a weekend in a city by the sea.",
  "What is overfitting, and how do I notice it?",
];
const state = {
  models: [], // ids; the base first
  chosen: "",
  compare: false,
  turns: [], // {asked, replies: [{model, text, state, error, tokens, seconds, stop}]}
  settings: { ...DEFAULTS },
  key: "",
};

function stored(store, name, fallback) {
  try { return JSON.parse(store.getItem(name)) ?? fallback; } catch { return fallback; }
}
function keep(store, name, value) {
  try { store.setItem(name, JSON.stringify(value)); } catch { /* private windows may refuse */ }
}

// --- talking with the server ----------------------------------------------------------------------

function headers() {
  const all = { "Content-Type": "application/json" };
  if (state.key) all.Authorization = `Bearer ${state.key}`;
  return all;
}

async function told(response) {
  let message = `the server answered ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* not in our shape */ }
  const wait = response.headers.get("Retry-After");
  return new Error(response.status === 429 && wait ? `Busy just now; try again in ${wait} s.` : message);
}

async function* stream(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await told(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the reply early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

async function loadModels() {
  const status = $("status");
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.status === 401) {
      status.className = "down";
      status.textContent = "This server asks for an API key";
      openPanel("key");
      return;
    }
    if (!response.ok) throw await told(response);
    state.models = (await response.json()).data.map((m) => m.id);
    if (!state.models.includes(state.chosen)) state.chosen = state.models.at(-1);
    status.className = "";
    drawModels();
    await health();
  } catch (error) {
    status.className = "down";
    status.textContent = `Not connected: ${error.message}`;
  }
}

async function health() {
  const status = $("status");
  try {
    const { requests, status: word } = await (await fetch("/health")).json();
    status.className = word === "ok" ? "" : "down";
    const others = requests.running + requests.waiting;
    status.textContent = word !== "ok" ? "The model has stopped; restart the server"
      : others ? `${requests.running} running, ${requests.waiting} waiting` : "Ready";
  } catch {
    status.className = "down";
    status.textContent = "Not connected";
  }
}

// --- replies --------------------------------------------------------------------------------------

const busy = () => state.turns.some((t) => t.replies.some((r) => r.state === "busy"));

/** What a model has to read for the reply at `turn`: its own earlier replies where it gave some. */
function history(model, turn) {
  const messages = [];
  const system = state.settings.system.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const t of state.turns.slice(0, turn)) {
    const reply = t.replies.find((r) => r.model === model && r.text) ?? t.replies.find((r) => r.text);
    messages.push({ role: "user", content: t.asked });
    if (reply) messages.push({ role: "assistant", content: reply.text });
  }
  messages.push({ role: "user", content: state.turns[turn].asked });
  return messages;
}

async function answer(turn, reply) {
  const control = new AbortController();
  Object.assign(reply, { text: "", state: "busy", error: "", tokens: 0, seconds: 0, cut: false, stop: () => control.abort() });
  drawTurns();
  const { temperature, top_p, max_tokens, seed } = state.settings;
  const body = {
    model: reply.model, messages: history(reply.model, turn), stream: true,
    stream_options: { include_usage: true },
    temperature: Number(temperature), top_p: Number(top_p), max_tokens: Number(max_tokens),
  };
  if (seed !== "") body.seed = Number(seed);
  let begun = 0;
  try {
    for await (const event of stream(body, control.signal)) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        begun ||= performance.now();
        reply.text += choice.delta.content;
        paint(reply);
      }
      if (choice?.finish_reason === "length") reply.cut = true;
      if (event.usage) reply.tokens = event.usage.completion_tokens;
    }
    reply.state = "done";
  } catch (error) {
    reply.state = control.signal.aborted ? "stopped" : "failed";
    if (reply.state === "failed") reply.error = error.message;
  }
  if (begun) reply.seconds = (performance.now() - begun) / 1000;
  drawTurns();
  health();
}

function ask(text) {
  if (!text.trim() || busy() || !state.models.length) return;
  const models = state.compare ? [state.models[0], tuned()] : [state.chosen];
  const replies = models.map((model) => ({ model, text: "" }));
  state.turns.push({ asked: text.trim(), replies });
  const turn = state.turns.length - 1;
  for (const reply of replies) answer(turn, reply);
  toEnd(true);
}

const tuned = () => (state.chosen !== state.models[0] ? state.chosen : state.models.at(-1));

function stopAll() {
  for (const t of state.turns) for (const r of t.replies) if (r.state === "busy") r.stop();
}

// --- drawing --------------------------------------------------------------------------------------

/** Text with code fences, `code` and **bold**, as elements and text nodes. */
function written(text) {
  const parts = [];
  const fence = /^```([^\n`]*)\n([\s\S]*?)(?:^```[ \t]*$|$(?![\s\S]))/gm;
  let at = 0;
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
  for (const match of text.matchAll(fence)) {
    prose(text.slice(at, match.index));
    const code = match[2].replace(/\n$/, "");
    parts.push(make("div", { className: "block-code" },
      make("header", {}, make("span", { textContent: match[1].trim() || "code" }), copier(() => code)),
      make("pre", {}, make("code", { textContent: code }))));
    at = match.index + match[0].length;
  }
  prose(text.slice(at));
  return parts;
}

function copier(text) {
  const button = make("button", { className: "small", type: "button", textContent: "Copy" });
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(text()); button.textContent = "Copied"; } catch { button.textContent = "Not allowed"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  return button;
}

const painting = new Set();
function paint(reply) {
  if (painting.has(reply)) return;
  painting.add(reply);
  requestAnimationFrame(() => {
    painting.delete(reply);
    if (reply.view && reply.state === "busy") {
      reply.view.classList.remove("waiting");
      reply.view.replaceChildren(...written(reply.text));
      toEnd();
    }
  });
}

function drawReply(turn, reply, last) {
  const view = make("div", { className: "said" });
  view.append(...written(reply.text));
  view.classList.toggle("waiting", reply.state === "busy" && !reply.text);
  reply.view = view;
  const isTuned = reply.model !== state.models[0];
  const article = make("article", { className: `reply ${reply.state}` },
    make("div", { className: `by${isTuned ? " tuned" : ""}`, textContent: reply.model }), view);
  article.setAttribute("aria-label", `Reply of ${reply.model}`);
  if (reply.error) article.append(make("div", { className: "wrong", role: "alert", textContent: reply.error }));
  const foot = make("div", { className: "foot" });
  if (reply.state !== "busy") {
    if (reply.text) foot.append(copier(() => reply.text));
    if (last) {
      const again = make("button", { className: "small again", type: "button", textContent: reply.error ? "Try again" : "Regenerate" });
      again.onclick = () => { if (reply.state !== "busy") answer(turn, reply); };
      foot.append(again);
    }
    const notes = [];
    if (reply.tokens) notes.push(`${reply.tokens} tokens`);
    if (reply.tokens && reply.seconds) notes.push(`${(reply.tokens / reply.seconds).toFixed(1)} a second`);
    if (reply.state === "stopped") notes.push("stopped");
    if (reply.cut) notes.push("cut at the longest length");
    foot.append(make("span", { className: "count", textContent: notes.join(" · ") }));
  }
  article.append(foot);
  return article;
}

function drawTurns() {
  const working = busy();
  document.body.classList.toggle("generating", working);
  document.body.classList.toggle("comparing", state.turns.some((t) => t.replies.length > 1));
  $("turns").setAttribute("aria-busy", String(working));
  $("empty").hidden = state.turns.length > 0;
  $("turns").replaceChildren(...state.turns.map((turn, i) => make("section", { className: "turn" },
    make("div", { className: "asked", textContent: turn.asked }),
    make("div", { className: `replies${turn.replies.length > 1 ? " two" : ""}` },
      ...turn.replies.map((r) => drawReply(i, r, i === state.turns.length - 1))))));
  drawSend();
  toEnd();
}

function drawSend() {
  const working = busy();
  $("send").disabled = !working && (!$("prompt").value.trim() || !state.models.length);
  $("send").setAttribute("aria-label", working ? "Stop" : "Send");
}

function drawModels() {
  $("models").replaceChildren(...state.models.map((id) => {
    const button = make("button", { type: "button", textContent: id, title: id });
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(id === state.chosen));
    button.tabIndex = id === state.chosen ? 0 : -1;
    // Whoever points chooses and then types; on a phone that would call up the keyboard.
    button.onclick = () => { choose(id); if (matchMedia("(hover: hover)").matches) $("prompt").focus(); };
    return button;
  }));
  $("compare").hidden = state.models.length < 2;
  state.compare &&= state.models.length > 1;
  $("compare").setAttribute("aria-pressed", String(state.compare));
  const others = state.models.length - 1;
  $("about").textContent = `${state.models[0]} runs on this machine in 4 bits`
    + (others ? `, with ${others} ${others > 1 ? "finetunes" : "finetune"} of it.` : ".");
  $("prompt").placeholder = state.compare ? `Ask ${state.models[0]} and ${tuned()}` : `Ask ${state.chosen}`;
  drawSend();
}

function choose(id, focus = false) {
  state.chosen = id;
  drawModels();
  if (focus) $("models").querySelector("[aria-checked=true]").focus();
}

let pinned = true;
function toEnd(force = false) {
  if (force) pinned = true;
  const thread = $("thread");
  if (pinned) thread.scrollTo({ top: thread.scrollHeight, behavior: "instant" });
}

function fresh() {
  stopAll();
  state.turns = [];
  drawTurns();
  $("prompt").focus();
}

// --- settings -------------------------------------------------------------------------------------

const NAMES = Object.keys(DEFAULTS);

function openPanel(focus) {
  for (const name of NAMES) $(name).value = state.settings[name];
  $("key").value = state.key;
  shown();
  if (!$("panel").open) $("panel").showModal();
  if (focus) $(focus).focus();
}

function shown() {
  for (const name of ["temperature", "top_p"]) $(`${name}-shown`).textContent = Number($(name).value).toFixed(2);
}

function closePanel() {
  for (const name of NAMES) state.settings[name] = $(name).value;
  if (!(state.settings.max_tokens >= 1)) state.settings.max_tokens = DEFAULTS.max_tokens;
  keep(localStorage, "qlora-settings", state.settings);
  if ($("key").value !== state.key) {
    state.key = $("key").value;
    keep(sessionStorage, "qlora-key", state.key);
    loadModels();
  }
  $("prompt").focus();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  keep(localStorage, "qlora-theme", name);
}

// --- hands on -------------------------------------------------------------------------------------

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  drawSend();
}

theme(stored(localStorage, "qlora-theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
state.settings = { ...DEFAULTS, ...stored(localStorage, "qlora-settings", {}) };
state.key = stored(sessionStorage, "qlora-key", "");
$("starters").append(...STARTERS.map((text) => {
  const button = make("button", { type: "button", textContent: text });
  button.onclick = () => ask(text);
  return button;
}));
$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (busy()) { stopAll(); return; }
  const text = $("prompt").value;
  if (!text.trim() || !state.models.length) return;
  $("prompt").value = "";
  grow();
  ask(text);
};
$("prompt").oninput = grow;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!busy()) $("composer").requestSubmit();
  }
};
$("models").onkeydown = (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const count = state.models.length;
  choose(state.models[(state.models.indexOf(state.chosen) + step + count) % count], true);
};
$("compare").onclick = () => { state.compare = !state.compare; drawModels(); };
$("fresh").onclick = fresh;
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("settings").onclick = () => openPanel();
$("panel").onclose = closePanel;
$("panel").onclick = (event) => { if (event.target === $("panel")) $("panel").close(); };
$("panel-form").oninput = shown;
$("down").onclick = () => toEnd(true);
$("thread").onscroll = () => {
  const thread = $("thread");
  pinned = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  $("down").hidden = pinned;
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && busy()) { stopAll(); return; }
  if ($("panel").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(TEXTAREA|INPUT)$/.test(event.target.tagName)) return;
  const act = { c: () => !$("compare").hidden && $("compare").click(), n: fresh, t: () => $("theme").click(), ",": () => openPanel(), "/": () => $("prompt").focus() }[event.key];
  if (act) { event.preventDefault(); act(); }
};
loadModels();
setInterval(() => { if (!document.hidden && state.models.length) health(); }, 10000);
$("prompt").focus();
