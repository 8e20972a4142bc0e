// The gallery: sends photos with what else the model takes, and shows how each becomes an image.

import { announce } from "./page.js";
import { acceptFiles, divide, resizeIfTooLarge } from "./upload.js";
import { RequestWatcher, setState, showReason, waitingText } from "./watch.js";

const form = document.getElementById("make");
const list = document.getElementById("images");
const sending = document.getElementById("sending");
const imageTemplate = document.getElementById("image");
const compareTemplate = document.getElementById("compare");
const chosen = new Map(); // name of an input -> files
let isBusy = false;

const watcher = new RequestWatcher({
  onAnswer: showAnswer,
  onProgress: showProgress,
  onUnreachable: (card) => showReason(card, "The server cannot be reached. This page keeps trying."),
});

if (form) {
  const zones = [...form.querySelectorAll("[data-input]")];
  form.noValidate = true; // the files that are chosen are not in the fields, see below
  for (const zone of zones) {
    const isFirst = zone === zones[0];
    zone.querySelector("input[type=file]").multiple = isFirst;
    acceptFiles(zone, (files) => choose(zone, isFirst ? files : files.slice(0, 1)), { takesPaste: isFirst });
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const options = form.querySelector(".options");
    const invalid = form.querySelector(".fields :invalid");
    if (invalid) {
      options.open = true;
      invalid.reportValidity();
      return;
    }
    const missing = zones.find((zone) => "required" in zone.dataset && !chosen.get(zone.dataset.input)?.length);
    for (const zone of zones) say(zone, zone === missing ? "Choose an image first." : "");
    if (missing) missing.querySelector("input[type=file]").focus();
    else send(zones.map((zone) => zone.dataset.input));
  });
}

function say(zone, text) {
  zone.querySelector(".zone-status").textContent = text;
}

/** Keep the files of an input, and show them. */
function choose(zone, files) {
  if (!files.length) return;
  chosen.set(zone.dataset.input, files);
  const images = files.slice(0, 12).map((file) => {
    const image = document.createElement("img");
    image.alt = file.name || "pasted image";
    image.src = URL.createObjectURL(file);
    image.addEventListener("load", () => URL.revokeObjectURL(image.src));
    image.addEventListener("error", () => image.replaceWith(image.alt)); // the server says what is wrong with it
    return image;
  });
  const shown = zone.querySelector(".chosen");
  shown.replaceChildren(...images);
  shown.hidden = false;
  say(zone, "");
  announce(files.length === 1 ? `Chosen: ${files[0].name || "pasted image"}` : `${files.length} photos chosen`);
}

// Sending

async function send([first, ...others]) {
  if (isBusy) return;
  isBusy = true;
  const maxBytes = Number(form.dataset.maxBytes);
  const query = new URLSearchParams();
  for (const field of form.querySelectorAll(".fields [name]")) query.set(field.name, field.value);
  const photos = chosen.get(first);
  let sent = 0;
  for (const part of divide(photos, maxBytes)) {
    sending.textContent = `Sending ${sent + 1} of ${photos.length}…`;
    const body = new FormData();
    for (const name of others) {
      for (const file of chosen.get(name) ?? []) body.append(name, await resizeIfTooLarge(file, maxBytes), file.name);
    }
    for (const [number, file] of part.entries()) {
      body.append("client_id", String(number));
      body.append(first, await resizeIfTooLarge(file, maxBytes), file.name || "pasted.png");
    }
    const answer = await post(`/requestPredictions/${encodeURIComponent(form.dataset.model)}?${query}`, body);
    if (!answer.success) {
      sending.textContent = answer.reason;
      isBusy = false;
      return;
    }
    answer.items.forEach((item, number) => addCard(item, part[number]));
    sent += part.length;
  }
  sending.textContent = "";
  isBusy = false;
  document.getElementById("made-title").scrollIntoView({ block: "nearest" });
}

async function post(url, body) {
  try {
    return await (await fetch(url, { method: "POST", body })).json();
  } catch {
    return { success: false, reason: "The server cannot be reached. Is it running?" };
  }
}

// Cards

function addCard(item, file) {
  const element = imageTemplate.content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const card = {
    element, id: item.req_id, photo: URL.createObjectURL(file), preview: find(".preview"), bar: find("progress"),
    name: find(".name"), state: find(".state"), work: find(".work"), reason: find(".reason"), buttons: find(".buttons"),
  };
  card.name.textContent = file.name || "pasted image";
  card.preview.src = card.photo;
  card.preview.alt = "The photo";
  document.getElementById("made").hidden = false;
  list.prepend(element);
  if (!card.id) {
    card.work.hidden = true;
    showReason(card, item.reason);
    finish(card, "failed", "rejected");
    return;
  }
  card.name.href = `/ui/requests/${card.id}`;
  setState(card, "queued", "waiting");
  watcher.add(card);
}

function showAnswer(card, answer) {
  if (card.isFinal) return;
  if (!answer.success) {
    showReason(card, answer.reason);
    if (answer.code === "unknown_request") finish(card, "failed", "deleted");
    return;
  }
  if (answer.status === "done") {
    card.reason.hidden = true;
    showImage(card, answer.image_url);
    finish(card, "done", "done");
  } else if (answer.status === "queued") {
    setState(card, "queued", "waiting");
    card.bar.removeAttribute("value");
    showReason(card, waitingText(answer));
    showCancel(card);
  } else if (answer.status === "claimed") {
    card.buttons.replaceChildren();
    showReason(card, waitingText(answer));
    if (answer.progress === undefined) setState(card, "claimed", "processing");
    else showProgress(card, answer);
  } else {
    showReason(card, answer.reason ?? "Cancelled.");
    finish(card, answer.status, answer.status);
  }
}

function showProgress(card, { progress, preview_url: url }) {
  if (card.isFinal) return;
  card.bar.value = progress;
  setState(card, "claimed", `${Math.floor(progress * 100)} %`);
  if (!url || card.previewUrl === url) return;
  card.previewUrl = url;
  // Loaded first, so that the frame is never empty.
  const next = new Image();
  next.onload = () => {
    if (card.isFinal || card.previewUrl !== url) return;
    card.preview.src = url;
    card.preview.alt = "What the new image looks like now";
  };
  next.src = url;
}

async function showImage(card, url) {
  const compare = compareTemplate.content.firstElementChild.cloneNode(true);
  const after = compare.querySelector(".after");
  after.src = url;
  compare.querySelector(".before").src = card.photo;
  compare.querySelector(".save").href = url;
  compare.querySelector("input").setAttribute("aria-label", `How much of the photo is shown: ${card.name.textContent}`);
  // So that the frame is never empty; of an image that cannot be shown the browser shows the text.
  await after.decode().catch(() => {});
  card.work.replaceChildren(compare);
}

function showCancel(card) {
  if (card.buttons.firstChild) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Cancel";
  button.setAttribute("aria-label", `Cancel: ${card.name.textContent}`);
  button.addEventListener("click", async () => {
    try {
      showAnswer(card, await (await fetch(`/requests/${card.id}`, { method: "DELETE" })).json());
    } catch {
      showReason(card, "The server cannot be reached.");
    }
  });
  card.buttons.replaceChildren(button);
}

function finish(card, state, label) {
  if (card.isFinal) return;
  card.isFinal = true;
  if (card.id) watcher.remove(card);
  card.buttons.replaceChildren();
  card.bar.remove();
  setState(card, state, label);
  announce(`${card.name.textContent}: ${label}`);
}
