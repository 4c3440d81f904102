"use strict";
// A client of the endpoint this page comes from. Text of people and models reaches the page by textContent only.

const $ = (id) => document.getElementById(id);
const STORE = "philora-chat";
const FIELDS = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed"];
const key = new URLSearchParams(location.hash.slice(1)).get("key");

/* A turn: {user, system, settings, answers: [{model, text, finish, tokens, seconds, error}], chosen: 0 | 1, voted,
   blind, leftOut}. The conversation goes on with answers[chosen]. */
let turns = [];
let trained = ""; // the system prompt that the training data began with
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
  // An empty one asks for none: without it the server would begin with the system prompt of the training data.
  const list = system?.trim() ? [{ role: "system", content: system }] : trained ? [{ role: "system", content: "" }] : [];
  for (const turn of turns.slice(from, before)) {
    const answer = turn.answers[turn.chosen];
    if (!answer.text) continue;
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
    if (made.finish === null) throw new Error("The answer broke off: the server ended it");
  } catch (error) {
    if (error.name === "AbortError") made.finish = "stopped";
    else made.error = error.message;
  }
  view.update();
}

async function ask(text) {
  const models = [$("left").value, $("right").value];
  const blind = $("blind").checked;
  if (blind && Math.random() < 0.5) models.reverse();
  const fresh = (model) => ({ model, text: "", finish: null, tokens: null, seconds: 0, error: null });
  const shared = settings();
  // One seed for both, so that chance does not favour a side.
  if (shared.seed === undefined) shared.seed = Math.floor(Math.random() * 2 ** 31);
  const turn = { user: text, system: $("system").value, settings: shared, answers: models.map(fresh),
    chosen: models.indexOf($("right").value), voted: false, blind, leftOut: turns.at(-1)?.leftOut ?? 0 };
  if (turn.chosen < 0) turn.chosen = 1;
  turns.push(turn);
  const place = turns.length - 1;
  const view = show(place);
  views.at(-2)?.update(); // the one before can no longer be voted on
  running = new AbortController();
  busy(true);
  say("");
  scrollDown(true);
  await Promise.all([0, 1].map((side) => answer(place, side, view, running.signal)));
  running = null;
  busy(false);
  view.update();
  keep();
}

async function vote(place, side, view) {
  const turn = turns[place], other = 1 - side;
  try {
    const response = await call("votes", {
      method: "POST",
      body: JSON.stringify({
        prompt: messages(place, turn.leftOut).filter((each) => each.content),
        chosen: turn.answers[side].text,
        rejected: turn.answers[other].text,
        chosen_model: turn.answers[side].model,
        rejected_model: turn.answers[other].model,
      }),
    });
    turn.chosen = side;
    turn.voted = true;
    say(`Stored in ${(await response.json()).file}`);
    keep();
  } catch (error) {
    say(`The vote was not stored: ${error.message}`, true);
  }
  view.update();
}

// -- what is seen

let views = [];

function show(place) {
  $("empty").hidden = true;
  const turn = turns[place];
  const box = element("article", "turn");
  const leftOut = element("p", "left-out");
  const pair = element("div", "pair");
  const sides = turn.answers.map((made, side) => {
    const card = element("section", "answer");
    const who = element("div", "who");
    const name = element("b");
    const tag = element("span", "tag");
    const words = element("p", "words");
    const foot = element("div", "foot");
    const figures = element("span", "figures");
    const button = element("button", "vote", "Better");
    button.type = "button";
    button.addEventListener("click", () => vote(place, side, view));
    who.append(name, tag);
    foot.append(figures, button);
    card.append(who, words, foot);
    pair.append(card);
    return { made, card, name, tag, words, figures, button };
  });
  box.append(element("div", "said", turn.user), leftOut, pair);
  $("turns").append(box);
  const view = {
    update() {
      const last = place === turns.length - 1;
      const ended = turn.answers.every((each) => each.finish !== null || each.error !== null);
      const whole = turn.answers.every((each) => ["stop", "length"].includes(each.finish) && each.text);
      const same = turn.answers[0].text === turn.answers[1].text;
      leftOut.hidden = turn.leftOut === 0;
      leftOut.textContent = `The first ${turn.leftOut} turn(s) no longer fit and are left out`;
      box.classList.toggle("voted", turn.voted);
      for (const [side, parts] of sides.entries()) {
        const { made } = parts;
        const goesOn = ended && turn.chosen === side && Boolean(made.text);
        parts.name.textContent = turn.blind && !turn.voted && last ? `Answer ${"AB"[side]}` : made.model;
        parts.tag.textContent = goesOn && !(turn.blind && !turn.voted && last) ? "continues from here" : "";
        parts.card.classList.toggle("goes-on", parts.tag.textContent !== "");
        parts.card.classList.toggle("busy", made.finish === null && made.error === null);
        parts.words.textContent = made.error ?? (made.text || (made.finish ? "(no words)" : ""));
        parts.words.classList.toggle("error", made.error !== null);
        parts.figures.textContent = figures(made);
        parts.button.hidden = !whole || (turn.voted ? turn.chosen !== side : !last);
        parts.button.disabled = turn.voted || same;
        parts.button.textContent = same ? "Same answer" : turn.voted ? "Better ✓" : "Better";
        parts.button.setAttribute("aria-pressed", String(turn.voted && turn.chosen === side));
        parts.button.setAttribute("aria-label", `${parts.name.textContent} is better`);
      }
      scrollDown(false);
    },
  };
  views.push(view);
  view.update();
  return view;
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

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

// -- what the browser keeps

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  const state = { turns, values, trained, blind: $("blind").checked, left: $("left").value, right: $("right").value };
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    say("The browser has no room to keep this conversation", true);
  }
}

function restore(names) {
  let state = null;
  try {
    state = JSON.parse(localStorage.getItem(STORE));
  } catch {
    localStorage.removeItem(STORE);
  }
  if (!state) return;
  const kept = FIELDS.filter((name) => name !== "system" || (state.trained ?? "") === trained); // else of another run
  for (const name of kept) $(name).value = state.values?.[name] ?? $(name).value;
  $("blind").checked = Boolean(state.blind);
  for (const side of ["left", "right"]) if (names.includes(state[side])) $(side).value = state[side];
  turns = (state.turns ?? []).filter((turn) => turn.answers.every((each) => each.finish !== null || each.error !== null));
  turns.forEach((_, place) => show(place));
  scrollDown(true);
}

async function begin() {
  const models = (await (await call("v1/models")).json()).data;
  const names = models.map((each) => each.id);
  for (const side of ["left", "right"]) {
    for (const { id, parent } of models) $(side).append(new Option(parent ? id : `${id} (base)`, id));
  }
  $("left").value = names.at(-1); // the base comes last
  $("right").value = names[0];
  trained = models.find((each) => each.system)?.system ?? "";
  $("system").value = trained;
  if (trained) say("The conversation begins with the system prompt of the training data (Settings)");
  restore(names);
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
  views = [];
  for (const each of document.querySelectorAll(".turn")) each.remove();
  $("empty").hidden = false;
  say("");
  keep();
  $("text").focus();
});
for (const name of [...FIELDS, "blind", "left", "right"]) $(name).addEventListener("change", keep);

begin().catch((error) => say(`The server does not answer: ${error.message}`, true));
