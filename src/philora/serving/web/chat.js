"use strict";
// A client of the endpoint that serves this page. Text of people and models is set by textContent only.

const $ = (id) => document.getElementById(id);
const STORE = "philora-chat";
const FIELDS = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed"];
const CHECKS = ["single", "blind", "plain"];
const key = new URLSearchParams(location.hash.slice(1)).get("key");

/* A turn: {user, system, settings, answers: [{model, text, finish, tokens, seconds, error}], chosen: 0 | 1, voted,
   verdict: "" | "better" | "good" | "bad", blind, leftOut}. It has one answer or two. The conversation continues with
   answers[chosen]. */
let turns = [];
let trained = ""; // the system prompt that the training data began with
let base = ""; // the name of the base
let running = null; // AbortController while answers come

const headers = () => ({
  "Content-Type": "application/json",
  ...(key ? { Authorization: `Bearer ${key}` } : {}),
});

async function call(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = new Error(body.error?.message ?? `${response.status} ${response.statusText}`);
  error.code = body.error?.code;
  throw error;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const say = (text, bad = false) => {
  $("status").textContent = text;
  $("status").classList.toggle("error", bad);
};

// -- the conversation

function messages(before, from = 0) {
  const { system, user } = turns[before]; // as they were when it was asked, also for a vote that comes later
  // An empty system prompt asks for none: without it the server would add that of the training data.
  const list = system?.trim() ? [{ role: "system", content: system }] : trained ? [{ role: "system", content: "" }] : [];
  for (const turn of turns.slice(from, before)) {
    const answer = turn.answers[turn.chosen];
    if (!answer?.text) continue;
    list.push({ role: "user", content: turn.user }, { role: "assistant", content: answer.text });
  }
  return [...list, { role: "user", content: user }];
}

function settings() {
  const chosen = {};
  for (const name of FIELDS.slice(1)) {
    if ($(name).value.trim() !== "" && Number.isFinite(Number($(name).value))) chosen[name] = Number($(name).value);
  }
  return chosen;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function answer(place, side, view, signal) {
  const turn = turns[place], made = turn.answers[side], begun = performance.now();
  try {
    let response = null;
    for (let from = turn.leftOut; response === null; from += 1) {
      try {
        response = await call("v1/chat/completions", {
          method: "POST",
          signal,
          body: JSON.stringify({
            model: made.model,
            messages: messages(place, from),
            stream: true,
            stream_options: { include_usage: true },
            ...turn.settings,
          }),
        });
        turn.leftOut = Math.max(turn.leftOut, from);
      } catch (error) {
        if (error.code !== "context_length_exceeded" || from >= place) throw error;
      }
    }
    for await (const event of events(response)) {
      const choice = event.choices[0];
      if (choice?.delta.content) made.text += choice.delta.content;
      if (choice?.finish_reason) made.finish = choice.finish_reason;
      if (event.usage) made.tokens = event.usage.completion_tokens;
      made.seconds = (performance.now() - begun) / 1000;
      view.update();
    }
    if (made.finish === null) throw new Error("The answer is incomplete: the server ended it");
  } catch (error) {
    if (error.name === "AbortError") made.finish = "stopped";
    else made.error = error.message;
  }
  view.update();
}

const newAnswer = (model) => ({ model, text: "", finish: null, tokens: null, seconds: 0, error: null });

function drawn(chosen) {
  // One seed for both, so that chance does not favour a side.
  return { ...chosen, seed: chosen.seed ?? Math.floor(Math.random() * 2 ** 31) };
}

async function ask(text) {
  const models = $("single").checked ? [$("right").value] : [$("left").value, $("right").value];
  const blind = $("blind").checked && models.length > 1;
  if (blind && Math.random() < 0.5) models.reverse();
  const turn = { user: text, system: $("system").value, settings: drawn(settings()), answers: models.map(newAnswer),
    chosen: Math.max(0, models.indexOf($("right").value)), voted: false, verdict: "", blind,
    leftOut: turns.at(-1)?.leftOut ?? 0 };
  turns.push(turn);
  show(turns.length - 1);
  views.at(-2)?.update(); // the one before can no longer be edited
  await answerAll(turns.length - 1);
}

async function answerAll(place) {
  const turn = turns[place], view = views[place];
  running = new AbortController();
  busy(true);
  say("");
  view.update();
  scrollDown(true);
  await Promise.all(turn.answers.map((_, side) => answer(place, side, view, running.signal)));
  running = null;
  busy(false);
  for (const each of views) each.update();
  keep();
}

async function regenerate(place) {
  const turn = turns[place];
  turn.answers = turn.answers.map((made) => newAnswer(made.model));
  Object.assign(turn, { settings: drawn(settings()), voted: false, verdict: "" });
  await answerAll(place);
}

function edit(place) {
  $("text").value = turns[place].user;
  turns.length = place;
  redraw();
  keep();
  grow();
  $("text").focus();
}

async function vote(place, side, view) {
  const turn = turns[place], other = 1 - side;
  await store(view, turn, "votes", {
    prompt: messages(place, turn.leftOut).filter((each) => each.content),
    chosen: turn.answers[side].text,
    rejected: turn.answers[other].text,
    chosen_model: turn.answers[side].model,
    rejected_model: turn.answers[other].model,
  }, () => {
    // Later turns answer the other text, so only the vote of the last turn decides how the conversation continues.
    turn.preferred = side;
    if (place === turns.length - 1) turn.chosen = side;
    turn.verdict = "better";
  });
}

async function rate(place, good, view) {
  const turn = turns[place];
  await store(view, turn, "ratings", {
    prompt: messages(place, turn.leftOut).filter((each) => each.content),
    answers: turn.answers.map((each) => each.text),
    models: turn.answers.map((each) => each.model),
    good,
  }, () => { turn.verdict = good ? "good" : "bad"; });
}

async function store(view, turn, path, body, then) {
  try {
    const response = await call(path, { method: "POST", body: JSON.stringify(body) });
    then();
    turn.voted = true;
    say(`Stored in ${(await response.json()).file}`);
    keep();
    count();
  } catch (error) {
    say(`The vote was not stored: ${error.message}`, true);
  }
  view.update();
}

// -- display

let views = [];

function action(text, title, act) {
  const made = element("button", "action", text);
  made.type = "button";
  made.title = title;
  made.addEventListener("click", act);
  return made;
}

function copier(text) {
  const made = action("Copy", "Copy the text", async () => {
    await navigator.clipboard.writeText(text());
    made.textContent = "Copied";
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  });
  made.hidden = !navigator.clipboard;
  return made;
}

function card(place, side, view) {
  const box = element("section", "answer");
  const who = element("div", "who");
  const name = element("b"), tag = element("span", "tag");
  const words = element("div", "words");
  const foot = element("div", "foot");
  const numbers = element("span", "figures");
  const copy = copier(() => turns[place].answers[side].text);
  const button = element("button", "vote", "Better");
  button.type = "button";
  button.addEventListener("click", () => vote(place, side, view));
  who.append(name, tag);
  foot.append(numbers, copy, button);
  box.append(who, words, foot);
  return { box, name, tag, words, numbers, copy, button, laid: null };
}

function show(place) {
  $("empty").hidden = true;
  const turn = turns[place];
  const box = element("article", "turn");
  const said = element("div", "said", turn.user);
  const leftOut = element("p", "left-out");
  const pair = element("div", turn.answers.length > 1 ? "pair" : "pair one");
  const foot = element("div", "turn-foot");
  const view = {};
  const sides = turn.answers.map((_, side) => card(place, side, view));
  const again = action("Regenerate", "Answer this message again", () => regenerate(place));
  const change = action("Edit", "Change this message; the messages after it are removed", () => edit(place));
  const good = action("Both good", "Neither is better: both are good", () => rate(place, true, view));
  const bad = action("Both bad", "Neither is better: both are bad", () => rate(place, false, view));
  foot.append(good, bad, again, change);
  pair.append(...sides.map((each) => each.box));
  box.append(said, leftOut, pair, foot);
  $("turns").append(box);
  view.update = () => {
    const ended = turn.answers.every((each) => each.finish !== null || each.error !== null);
    const whole = turn.answers.every((each) => ["stop", "length"].includes(each.finish) && each.text);
    const last = place === turns.length - 1, two = turn.answers.length > 1;
    leftOut.hidden = turn.leftOut === 0;
    leftOut.textContent = `The first ${turn.leftOut} turn(s) no longer fit and are left out`;
    box.classList.toggle("voted", turn.voted);
    for (const [side, parts] of sides.entries()) update(turn, side, parts, { last, ended, whole: whole && two });
    again.hidden = change.hidden = !last || running !== null;
    for (const [button, verdict] of [[good, "good"], [bad, "bad"]]) {
      button.hidden = !whole || !two || (turn.voted && turn.verdict !== verdict);
      button.disabled = turn.voted;
      button.setAttribute("aria-pressed", String(turn.verdict === verdict));
    }
    scrollDown(false);
  };
  views.push(view);
  showSystem();
  view.update();
  return view;
}

function update(turn, side, parts, { last, ended, whole }) {
  const made = turn.answers[side], hidden = turn.blind && !turn.voted;
  const same = turn.answers.length > 1 && turn.answers[0].text === turn.answers[1].text;
  const goesOn = ended && last && turn.answers.length > 1 && turn.chosen === side && Boolean(made.text) && !hidden;
  const mine = turn.verdict === "better" && (turn.preferred ?? turn.chosen) === side;
  parts.name.textContent = hidden ? `Answer ${"AB"[side]}` : made.model;
  parts.tag.textContent = goesOn ? "continues from here" : hidden ? "" : made.model === base ? "Base" : "Yours";
  parts.box.classList.toggle("goes-on", goesOn);
  parts.box.classList.toggle("busy", made.finish === null && made.error === null);
  const text = made.error ?? (made.text || (made.finish ? "(no words)" : ""));
  const how = made.error !== null || $("plain").checked ? "plain" : "markdown";
  if (parts.laid !== how + text) {
    if (how === "plain") parts.words.textContent = text;
    else markdown(parts.words, text);
    parts.laid = how + text;
  }
  parts.words.classList.toggle("plain", how === "plain");
  parts.words.classList.toggle("error", made.error !== null);
  parts.numbers.textContent = figures(made);
  parts.copy.hidden = !navigator.clipboard || !made.text;
  parts.button.hidden = !whole || (turn.voted && !mine);
  parts.button.disabled = turn.voted || same;
  parts.button.textContent = same ? "Same answer" : mine ? "Better ✓" : "Better";
  parts.button.setAttribute("aria-pressed", String(mine));
  parts.button.setAttribute("aria-label", `${parts.name.textContent} is better`);
}

function showSystem() {
  const text = turns.length ? turns[0].system : $("system").value;
  $("system-bubble").hidden = !text.trim();
  $("system-bubble").querySelector("span").textContent = text;
}

function redraw() {
  views = [];
  for (const each of document.querySelectorAll(".turn")) each.remove();
  $("empty").hidden = turns.length > 0;
  turns.forEach((_, place) => show(place));
  showSystem();
}

function figures(made) {
  const parts = [];
  if (made.tokens !== null) parts.push(`${made.tokens} tokens, ${made.seconds.toFixed(1)} s`);
  if (made.finish === "length") parts.push("cut at the longest answer");
  if (made.finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function scrollDown(always) {
  const box = $("turns");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

function busy(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
  for (const id of ["left", "right", "new"]) $(id).disabled = now;
}

async function count() {
  const found = await (await call("votes")).json();
  const parts = Object.entries(found.preferred).map(([model, times]) => `${model} ${times}`);
  parts.push(`both good ${found.both_good}`, `both bad ${found.both_bad}`);
  $("tally").textContent = `Votes: ${parts.join(" · ")}`;
}

async function download() {
  const address = URL.createObjectURL(await (await call("votes/download")).blob());
  const link = element("a");
  link.href = address;
  link.download = "votes.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

async function offer() {
  const { questions } = await (await call("questions")).json();
  for (const text of questions) {
    const chip = element("button", "chip", text);
    chip.type = "button";
    chip.addEventListener("click", () => { if (!running) ask(text); });
    $("chips").append(chip);
  }
  $("chips").hidden = questions.length === 0;
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

// -- the browser's storage

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  const checks = Object.fromEntries(CHECKS.map((name) => [name, $(name).checked]));
  const state = { turns, values, trained, checks, left: $("left").value, right: $("right").value };
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    say("The browser's storage is full: this conversation is not saved", true);
  }
}

/* A turn as this release knows it, of what a browser kept; null for one that cannot be shown. */
function readTurn(kept) {
  if (typeof kept?.user !== "string" || !Array.isArray(kept.answers)) return null;
  const answers = kept.answers.map((each) => ({ ...newAnswer(""), ...each }))
    .filter((each) => typeof each.text === "string" && typeof each.model === "string");
  const ended = answers.every((each) => each.finish !== null || each.error !== null);
  if (!ended || answers.length < 1 || answers.length > 2 || answers.length !== kept.answers.length) return null;
  const chosen = kept.chosen === 1 && answers.length > 1 ? 1 : 0, voted = kept.voted === true;
  return { user: kept.user, system: typeof kept.system === "string" ? kept.system : "", answers, chosen, voted,
    settings: kept.settings instanceof Object ? kept.settings : {}, preferred: kept.preferred,
    verdict: ["better", "good", "bad"].includes(kept.verdict) ? kept.verdict : voted ? "better" : "",
    blind: kept.blind === true, leftOut: Number.isInteger(kept.leftOut) ? kept.leftOut : 0 };
}

function restore(names) {
  let state = null;
  try {
    state = JSON.parse(localStorage.getItem(STORE));
  } catch {
    localStorage.removeItem(STORE);
  }
  if (!(state instanceof Object)) return;
  const values = state.values instanceof Object ? state.values : {};
  const kept = FIELDS.filter((name) => name !== "system" || (state.trained ?? "") === trained); // else of another run
  for (const name of kept) $(name).value = values[name] ?? $(name).value;
  for (const name of CHECKS) $(name).checked = Boolean(state.checks?.[name] ?? state[name]);
  for (const side of ["left", "right"]) if (names.includes(state[side])) $(side).value = state[side];
  turns = (Array.isArray(state.turns) ? state.turns : []).map(readTurn).filter((turn) => turn !== null);
  redraw();
  scrollDown(true);
}

function columns() {
  $("left-side").hidden = $("single").checked;
}

async function begin() {
  const models = (await (await call("v1/models")).json()).data;
  const names = models.map((each) => each.id);
  for (const side of ["left", "right"]) {
    for (const { id, parent } of models) $(side).append(new Option(parent ? id : `${id} (base)`, id));
  }
  $("left").value = names.at(-1); // the base comes last
  $("right").value = names[0];
  base = models.find((each) => !each.parent)?.id ?? "";
  trained = models.find((each) => each.system)?.system ?? "";
  $("system").value = trained;
  if (trained) say("The conversation starts with the system prompt of the training data (Settings)");
  restore(names);
  columns();
  showSystem();
  await Promise.all([offer(), count()]);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || running) return;
  $("text").value = "";
  grow();
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("text").addEventListener("input", grow);
$("stop").addEventListener("click", () => running?.abort());
$("toggle").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("new").addEventListener("click", () => {
  turns = [];
  redraw();
  say("");
  keep();
  $("text").focus();
});
for (const name of [...FIELDS, ...CHECKS, "left", "right"]) $(name).addEventListener("change", keep);
$("single").addEventListener("change", columns);
$("plain").addEventListener("change", () => { for (const each of views) each.update(); });
$("system").addEventListener("input", showSystem);
$("download").addEventListener("click", () => download().catch((error) => say(error.message, true)));

begin().catch((error) => say(`The server does not answer: ${error.message}`, true));
