// The home page: sends images that are chosen, dropped or pasted, and shows each result when it arrives.

import { announce } from "./page.js";
import { acceptFiles, resizeIfTooLarge } from "./upload.js";
import { RequestWatcher, setState, showReason, waitingText } from "./watch.js";

const MAX_UPLOADS = 4; // at once; browsers open six connections to a host

const form = document.getElementById("send");
const dropZone = document.getElementById("drop");
const fileInput = document.getElementById("files");
const list = document.getElementById("answers");
const results = document.getElementById("results");
const counter = document.getElementById("count");
const curl = document.getElementById("curl");
const cardTemplate = document.getElementById("card");
const barTemplate = document.getElementById("bar");
const minSharpness = document.getElementById("min-sharpness");
const maxBytes = Number(form.dataset.maxBytes);

const pending = []; // cards to upload
let uploading = 0;
let added = 0;
let finished = 0;

fileInput.multiple = true;

function chosenModel() {
  return form.querySelector("input[name=model]:checked:enabled")?.value;
}

// Adding images

form.addEventListener("submit", (event) => {
  event.preventDefault();
  addFiles(fileInput.files);
});
form.addEventListener("change", () => {
  const base = curl.dataset.base;
  curl.textContent =
    `curl -F image=@kitten.jpg ${minSharpness.value && `-F min_sharpness=${minSharpness.value} `}` +
    `${base}/requestPrediction/${chosenModel() ?? "MODEL"}\n` +
    `curl '${base}/readPrediction/REQ_ID?wait=30'`;
});

acceptFiles(dropZone, addFiles, { area: window, takesPaste: true });

function addFiles(files) {
  const model = chosenModel();
  const all = [...files];
  if (!all.length) return;
  results.hidden = false;
  for (const file of all) {
    const card = makeCard(file, model);
    list.prepend(card.element);
    if (!model) reject(card, "No model is installed. The list of models shows how to install one.");
    else {
      pending.push(card);
      added += 1;
    }
  }
  updateCounter();
  startUploads();
}

function makeCard(file, model) {
  const element = cardTemplate.content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const card = {
    element, file, model, id: null,
    name: find(".name"), state: find(".state"), reason: find(".reason"), bars: find(".bars"), meta: find(".meta"),
    buttons: find(".buttons"),
  };
  card.name.textContent = file.name || "pasted image";
  card.name.title = card.name.textContent;
  const url = URL.createObjectURL(file);
  const image = find("img");
  image.addEventListener("load", () => URL.revokeObjectURL(url));
  image.addEventListener("error", () => URL.revokeObjectURL(url));
  image.src = url;
  setState(card, "queued", "not sent yet");
  return card;
}

// Uploading

function startUploads() {
  while (uploading < MAX_UPLOADS && pending.length) {
    uploading += 1;
    upload(pending.shift()).finally(() => {
      uploading -= 1;
      startUploads();
    });
  }
}

async function upload(card) {
  setState(card, "claimed", "uploading");
  let answer;
  try {
    const body = new FormData();
    body.append("image", await resizeIfTooLarge(card.file, maxBytes), card.file.name || "pasted.png");
    body.append("min_sharpness", minSharpness.value);
    const response = await fetch(`/requestPrediction/${encodeURIComponent(card.model)}`, { method: "POST", body });
    answer = await response.json();
  } catch {
    answer = { success: false, reason: "The server cannot be reached. Is it running?" };
  }
  if (!answer.success) {
    reject(card, answer.reason);
    showButton(card, "Try again", () => {
      finished -= 1;
      pending.push(card);
      updateCounter();
      startUploads();
    });
    return;
  }
  card.id = answer.req_id;
  card.name.href = `/ui/requests/${card.id}`;
  watcher.add(card);
}

// Results

const watcher = new RequestWatcher({
  onAnswer: showAnswer,
  onUnreachable: (card) => showReason(card, "The server cannot be reached. This page keeps trying."),
});

function showAnswer(card, answer) {
  if (card.isFinal) return;
  if (!answer.success) {
    showReason(card, answer.reason);
    if (answer.code === "unknown_request") finish(card, "failed", "failed");
    return;
  }
  const isFinal = !["queued", "claimed"].includes(answer.status);
  if (answer.status === "done") {
    card.reason.hidden = true;
    showResult(card, answer);
    const details = [...(answer.unknown ? ["unknown: not sure enough"] : []), answer.model];
    if (answer.cached) details.push("from an earlier result");
    else if (answer.seconds) details.push(`${Math.max(1, Math.round(answer.seconds * 1000))} ms`);
    if (answer.provider && !answer.cached) details.push(answer.provider);
    if (answer.cost) details.push(`${answer.cost} GLM`);
    card.meta.textContent = details.join(" · ");
    card.meta.hidden = false;
  } else if (isFinal) showReason(card, answer.reason ?? "Cancelled.");
  else showReason(card, waitingText(answer));
  if (isFinal) finish(card, answer.status, answer.status, answer);
  else {
    setState(card, answer.status, answer.status === "queued" ? "waiting" : "processing");
    if (answer.status === "queued") showButton(card, "Cancel", () => cancel(card));
    else card.buttons.replaceChildren();
  }
}

function showResult(card, answer) {
  if (Array.isArray(answer.preds)) {
    showBars(card, answer.preds);
    return;
  }
  const facts = Object.entries(answer.preds ?? {}).map(([name, value]) => `${name}: ${value}`);
  showReason(card, facts.join(", "));
  for (const [name, file] of Object.entries(answer.files ?? {})) {
    const link = document.createElement("a");
    link.href = file.url;
    link.download = "";
    link.textContent = `Download ${name}`;
    card.reason.append(" ", link);
  }
}

function showBars(card, preds) {
  card.bars.replaceChildren(...preds.map(([, name, probability]) => {
    const bar = barTemplate.content.firstElementChild.cloneNode(true);
    bar.querySelector(".name").textContent = String(name).replaceAll("_", " ");
    bar.querySelector(".percent").textContent = percent(probability);
    requestAnimationFrame(() => bar.querySelector("rect").setAttribute("width", String(probability * 100)));
    return bar;
  }));
  card.bars.hidden = false;
}

async function cancel(card) {
  try {
    const response = await fetch(`/requests/${card.id}`, { method: "DELETE" });
    const answer = await response.json();
    if (answer.success) showAnswer(card, answer);
    else showReason(card, answer.reason);
  } catch {
    showReason(card, "The server cannot be reached.");
  }
}

function finish(card, state, label, answer) {
  if (card.isFinal) return;
  card.isFinal = true;
  watcher.remove(card);
  card.buttons.replaceChildren();
  setState(card, state, label);
  if (state === "done") showSimilar(card);
  finished += 1;
  updateCounter();
  const best = answer?.preds?.[0];
  const outcome = answer?.unknown ? "unknown" : best ? `${String(best[1]).replaceAll("_", " ")}, ${percent(best[2])}` : label;
  announce(`${card.name.textContent}: ${outcome}`);
}

function reject(card, reason) {
  showReason(card, reason ?? "The image was rejected.");
  setState(card, "failed", "rejected");
  if (card.model) finished += 1;
  updateCounter();
  announce(`${card.name.textContent}: ${card.reason.textContent}`);
}

// Parts of a card

function showButton(card, label, onClick) {
  if (card.buttons.firstChild?.textContent === label) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.setAttribute("aria-label", `${label}: ${card.name.textContent}`);
  button.addEventListener("click", () => {
    card.buttons.replaceChildren();
    onClick();
  });
  card.buttons.replaceChildren(button);
}

function showSimilar(card) {
  const link = document.createElement("a");
  link.href = `/ui/requests/${card.id}/similar`;
  link.textContent = "More like this";
  link.setAttribute("aria-label", `More like this: ${card.name.textContent}`);
  card.buttons.replaceChildren(link);
}

function updateCounter() {
  counter.textContent = `${finished} of ${added} finished.`;
  counter.hidden = added < 2;
}

function percent(fraction) {
  const value = fraction * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value > 99.9 && value < 100) return "> 99.9 %";
  return `${value.toFixed(1)} %`;
}
