// The first page: pictures by choosing, dropping or pasting; each answer as it comes.

import { pause, say } from "./page.js";

const AT_ONCE = 4; // uploads; browsers open six connections to a host
const LONGEST_SIDE = 2048; // pixels of a picture that had to be made smaller: far more than any model looks at

const form = document.getElementById("send");
const drop = document.getElementById("drop");
const picker = document.getElementById("files");
const list = document.getElementById("answers");
const results = document.getElementById("results");
const count = document.getElementById("count");
const curl = document.getElementById("curl");
const cardOf = document.getElementById("card");
const barOf = document.getElementById("bar");
const mostBytes = Number(form.dataset.mostBytes);

const waiting = []; // cards to be sent
const watched = new Map(); // request id -> card
let underWay = 0;
let made = 0;
let ended = 0;

picker.multiple = true;

function chosenModel() {
  return form.querySelector("input[name=model]:checked:enabled")?.value;
}

// Taking pictures

picker.addEventListener("change", () => {
  take(picker.files);
  picker.value = "";
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  take(picker.files);
});
form.addEventListener("change", () => {
  const base = curl.dataset.base;
  curl.textContent =
    `curl -F image=@kitten.jpg ${base}/requestPrediction/${chosenModel() ?? "MODEL"}\n` +
    `curl '${base}/readPrediction/REQ_ID?wait=30'`;
});

let depth = 0; // dragenter and dragleave also come from the elements inside
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth += 1;
  drop.classList.add("over");
});
addEventListener("dragover", (event) => {
  if (hasFiles(event)) event.preventDefault();
});
addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  if (!depth) drop.classList.remove("over");
});
addEventListener("drop", (event) => {
  depth = 0;
  drop.classList.remove("over");
  if (!hasFiles(event)) return;
  event.preventDefault(); // the browser would leave the page for the picture
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) take(event.clipboardData.files);
});

function take(files) {
  const model = chosenModel();
  const all = [...files];
  if (!all.length) return;
  results.hidden = false;
  for (const file of all) {
    const card = makeCard(file, model);
    list.prepend(card.element);
    if (!model) refuse(card, "No model is installed. The list beside it says how to install one.");
    else {
      waiting.push(card);
      made += 1;
    }
  }
  tell();
  send();
}

function makeCard(file, model) {
  const element = cardOf.content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const card = {
    element, file, model, id: null,
    name: find(".name"), state: find(".state"), why: find(".why"), bars: find(".bars"), more: find(".more"), act: find(".act"),
  };
  card.name.textContent = file.name || "pasted picture";
  card.name.title = card.name.textContent;
  const address = URL.createObjectURL(file);
  const picture = find("img");
  picture.addEventListener("load", () => URL.revokeObjectURL(address));
  picture.addEventListener("error", () => URL.revokeObjectURL(address));
  picture.src = address;
  mark(card, "queued", "to be sent");
  return card;
}

// Sending

function send() {
  while (underWay < AT_ONCE && waiting.length) {
    underWay += 1;
    sendOne(waiting.shift()).finally(() => {
      underWay -= 1;
      send();
    });
  }
}

async function sendOne(card) {
  mark(card, "claimed", "sending");
  let answer;
  try {
    const body = new FormData();
    body.append("image", await small(card.file), card.file.name || "pasted.png");
    const response = await fetch(`/requestPrediction/${encodeURIComponent(card.model)}`, { method: "POST", body });
    answer = await response.json();
  } catch {
    answer = { success: false, reason: "The server cannot be reached. Is it running?" };
  }
  if (!answer.success) {
    refuse(card, answer.reason);
    offer(card, "Try again", () => {
      ended -= 1;
      waiting.push(card);
      tell();
      send();
    });
    return;
  }
  card.id = answer.req_id;
  card.name.href = `/ui/requests/${card.id}`;
  watched.set(card.id, card);
  watch();
  refresh(card, 0);
}

/** Make a picture smaller if it is larger than the server takes: photos of phones are. */
async function small(file) {
  if (file.size <= mostBytes) return file;
  try {
    const picture = await createImageBitmap(file);
    for (let side = LONGEST_SIDE; side >= 512; side /= 2) {
      const scale = Math.min(1, side / Math.max(picture.width, picture.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(picture.width * scale));
      canvas.height = Math.max(1, Math.round(picture.height * scale));
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff"; // as the server does with what is transparent
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(picture, 0, 0, canvas.width, canvas.height);
      const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
      if (blob && blob.size <= mostBytes) return blob;
    }
  } catch {
    return file; // not a picture that this browser knows; the server says what is wrong with it
  }
  return file;
}

// Answers

const MOST_TOLD = 60; // ids in the address of a stream of events: an address must not get too long
const WHY_SECONDS = 4; // a request that waits has no events, but why it waits changes
let hasEvents = "EventSource" in window;
let stream = null;
let told = new Set();
let isWatching = false;
let opening = null;

/** Follow those that wait: told by the server, or asking it where it cannot tell. */
function watch() {
  if (!hasEvents) {
    ask();
    return;
  }
  if (!isWatching && watched.size) explainAll();
  const fresh = [...watched.keys()].some((id) => !told.has(id));
  if (!fresh || opening || (stream && told.size >= MOST_TOLD)) return;
  opening = setTimeout(() => {
    opening = null;
    listen();
  }, 100); // several at once share a stream
}

// A browser opens six connections to a host, all tabs together: a tab that nobody sees holds none.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    stream?.close();
    stream = null;
    told = new Set();
  } else watch();
});

function listen() {
  stream?.close();
  stream = null;
  if (document.hidden) {
    told = new Set();
    return;
  }
  told = new Set([...watched.keys()].slice(0, MOST_TOLD));
  if (!told.size) return;
  const mine = new EventSource(`/events?ids=${[...told].join(",")}`);
  stream = mine;
  const close = () => {
    mine.close();
    if (stream !== mine) return false;
    stream = null;
    told = new Set();
    return true;
  };
  mine.addEventListener("request", (event) => {
    const answer = JSON.parse(event.data);
    const card = watched.get(answer.req_id);
    if (card) show(card, { success: true, ...answer });
  });
  mine.addEventListener("end", () => {
    if (close() && watched.size) watch();
  });
  mine.addEventListener("error", () => {
    // It comes back by itself after a break; closed it is when the server refused.
    if (mine.readyState === EventSource.CLOSED && close()) {
      hasEvents = false;
      watch();
    }
  });
}

async function explainAll() {
  isWatching = true;
  let place = 0;
  while (hasEvents && watched.size) {
    await pause(WHY_SECONDS);
    const cards = [...watched.values()];
    for (let asked = 0; asked < Math.min(3, cards.length); asked += 1) {
      await refresh(cards[place % cards.length], 0);
      place += 1;
    }
  }
  isWatching = false;
  watch();
}

/** Ask for those that wait, the one that was asked for longest ago first. */
async function ask() {
  if (isWatching) return;
  isWatching = true;
  try {
    while (watched.size) {
      const few = [...watched.values()].slice(0, 2);
      // Held until it is there, but no longer than why it waits is worth reading.
      await Promise.all(few.map((card) => refresh(card, watched.size > 2 ? 1 : 4)));
      for (const card of few) {
        if (watched.delete(card.id)) {
          if (!card.isFinal) watched.set(card.id, card); // to the end of the line
        }
      }
    }
  } finally {
    isWatching = false;
  }
}

async function refresh(card, wait) {
  const asked = card.id;
  try {
    const response = await fetch(`/readPrediction/${card.id}?wait=${wait}`);
    const answer = await response.json();
    if (card.id === asked && !card.isFinal) show(card, answer);
    if (!answer.success) await pause(2);
  } catch {
    explain(card, "The server cannot be reached. This page keeps trying.");
    await pause(2);
  }
}

function show(card, answer) {
  if (!answer.success) {
    explain(card, answer.reason);
    if (answer.code === "unknown_request") finish(card, "failed", "failed");
    return;
  }
  const isFinal = !["queued", "claimed"].includes(answer.status);
  if (answer.status === "done") {
    card.why.hidden = true;
    showBars(card, answer.preds);
    const facts = [answer.model];
    if (answer.cached) facts.push("known already");
    else if (answer.seconds) facts.push(`${Math.max(1, Math.round(answer.seconds * 1000))} ms`);
    if (answer.provider && !answer.cached) facts.push(answer.provider);
    if (answer.cost) facts.push(`${answer.cost} GLM`);
    card.more.textContent = facts.join(" · ");
    card.more.hidden = false;
  } else if (answer.status === "queued" || answer.status === "claimed") {
    const eta = answer.eta_seconds === null || answer.eta_seconds === undefined ? "" : ` Ready in about ${length(answer.eta_seconds)}.`;
    explain(card, `${answer.waiting_for ?? "It waits."}${eta}`);
  } else explain(card, answer.reason ?? "It was cancelled.");
  if (isFinal) finish(card, answer.status, answer.status, answer);
  else {
    mark(card, answer.status, answer.status === "queued" ? "waiting" : "in work");
    if (answer.status === "queued") offer(card, "Cancel", () => cancel(card));
    else card.act.replaceChildren();
  }
}

function showBars(card, preds) {
  card.bars.replaceChildren(...(preds ?? []).map(([, name, share]) => {
    const bar = barOf.content.firstElementChild.cloneNode(true);
    bar.querySelector(".name").textContent = String(name).replaceAll("_", " ");
    bar.querySelector(".share").textContent = percent(share);
    requestAnimationFrame(() => bar.querySelector("rect").setAttribute("width", String(share * 100)));
    return bar;
  }));
  card.bars.hidden = false;
}

async function cancel(card) {
  try {
    const response = await fetch(`/requests/${card.id}`, { method: "DELETE" });
    const answer = await response.json();
    if (answer.success) show(card, answer);
    else explain(card, answer.reason);
  } catch {
    explain(card, "The server cannot be reached.");
  }
}

function finish(card, kind, words, answer) {
  if (card.isFinal) return;
  card.isFinal = true;
  watched.delete(card.id);
  card.act.replaceChildren();
  mark(card, kind, words);
  ended += 1;
  tell();
  const best = answer?.preds?.[0];
  say(best ? `${card.name.textContent}: ${String(best[1]).replaceAll("_", " ")}, ${percent(best[2])}` : `${card.name.textContent}: ${words}`);
}

function refuse(card, reason) {
  explain(card, reason ?? "It was not taken.");
  mark(card, "failed", "not taken");
  if (card.model) ended += 1;
  tell();
  say(`${card.name.textContent}: ${card.why.textContent}`);
}

// Showing

function mark(card, kind, words) {
  card.state.className = `state ${kind}`;
  card.state.textContent = words;
  card.element.classList.toggle("failed", kind === "failed");
}

function explain(card, words) {
  if (card.why.textContent !== words) card.why.textContent = words;
  card.why.hidden = false;
}

function offer(card, words, act) {
  if (card.act.firstChild?.textContent === words) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words;
  button.setAttribute("aria-label", `${words}: ${card.name.textContent}`);
  button.addEventListener("click", () => {
    card.act.replaceChildren();
    act();
  });
  card.act.replaceChildren(button);
}

function tell() {
  count.textContent = made === ended ? `${made} of ${made} ready.` : `${ended} of ${made} ready.`;
  count.hidden = made < 2;
}

function percent(share) {
  const hundredths = share * 100;
  if (hundredths > 0 && hundredths < 0.1) return "< 0.1 %";
  if (hundredths > 99.9 && hundredths < 100) return "> 99.9 %";
  return `${hundredths.toFixed(1)} %`;
}

function length(seconds) {
  const whole = Math.round(seconds);
  if (whole < 2) return "a moment";
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.round(whole / 60)} min`;
  return `${(whole / 3600).toFixed(1)} h`;
}
