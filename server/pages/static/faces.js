// The page about faces: sends a photo to the pipeline, and draws boxes, eyes and answers as they come.

import { announce, pause } from "./page.js";
import { acceptFiles, resizeIfTooLarge } from "./upload.js";

const SVG = "http://www.w3.org/2000/svg";
const form = document.getElementById("send");
const consent = document.getElementById("consent");
const result = document.getElementById("result");
const state = document.getElementById("state");
const reason = document.getElementById("reason");
const photo = document.getElementById("photo");
const overlay = document.getElementById("overlay");
const list = document.getElementById("faces");
const deleteButton = document.getElementById("delete");
const template = document.getElementById("face");

let current = null; // id of the request that is shown
let stream = null;

form.addEventListener("submit", (event) => event.preventDefault());
acceptFiles(document.getElementById("drop"), (files) => files.length && send(files[0]), { area: window, takesPaste: true });

async function send(file) {
  if (!consent.checked) {
    consent.focus();
    consent.reportValidity();
    return;
  }
  stream?.close();
  current = null;
  result.hidden = false;
  deleteButton.hidden = true;
  overlay.replaceChildren();
  list.replaceChildren();
  if (photo.src.startsWith("blob:")) URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(file);
  show("claimed", "uploading");
  let answer;
  try {
    const body = new FormData();
    body.append("image", await resizeIfTooLarge(file, Number(form.dataset.maxBytes)), "photo");
    const response = await fetch(`/requestPrediction/${form.dataset.pipeline}`, { method: "POST", body });
    answer = await response.json();
  } catch {
    answer = { success: false, reason: "The server cannot be reached. Is it running?" };
  }
  if (!answer.success) {
    show("failed", "rejected", answer.reason);
    return;
  }
  current = answer.req_id;
  follow(current);
}

/** Draw each state of a request until it has ended: events tell that there is a new one. */
async function follow(id) {
  let wake = () => {};
  if ("EventSource" in window) {
    stream = new EventSource(`/events?ids=${id}`);
    stream.addEventListener("request", () => wake());
  }
  while (current === id) {
    const woken = new Promise((done) => { wake = done; });
    try {
      const response = await fetch(`/readPrediction/${id}`);
      const answer = await response.json();
      if (current !== id) break;
      if (draw(answer)) break;
    } catch {
      show("failed", "waiting", "The server cannot be reached. This page keeps trying.");
    }
    await Promise.race([woken, pause(2)]);
  }
  stream?.close();
}

/** Draw an answer. :return: whether it is final. */
function draw(answer) {
  if (!answer.success) {
    show("failed", "failed", answer.reason);
    return answer.code === "unknown_request";
  }
  const isFinal = !["queued", "claimed"].includes(answer.status);
  const steps = answer.steps ?? {};
  const found = steps.detect?.preds;
  if (found) drawFaces(found, steps);
  const count = found?.faces.length ?? 0;
  const faces = count === 1 ? "1 face" : `${count} faces`;
  show(answer.status, isFinal ? answer.status : "processing", found ? faces : answer.reason ?? answer.waiting_for ?? "");
  deleteButton.hidden = !isFinal;
  if (isFinal) announce(found ? faces : answer.reason ?? answer.status);
  return isFinal;
}

function drawFaces(found, steps) {
  overlay.setAttribute("viewBox", `0 0 ${found.width} ${found.height}`);
  const unit = Math.max(found.width, found.height) / 100;
  overlay.replaceChildren(...found.faces.flatMap(({ box, eyes }, index) => [
    make("rect", { x: box.left, y: box.top, width: box.width, height: box.height }),
    ...eyes.map(({ x, y }) => make("circle", { cx: x, cy: y, r: unit / 2 })),
    make("text", { x: box.left, y: box.top - unit / 2, "font-size": 3 * unit }, String(index + 1)),
  ]));
  found.faces.forEach((face, index) => drawCard(face, index, steps));
}

function drawCard(face, index, steps) {
  const card = list.children[index] ?? list.appendChild(template.content.firstElementChild.cloneNode(true));
  card.querySelector(".title").textContent = `Face ${index + 1}`;
  const image = card.querySelector("img");
  const cut = steps.crop?.[index]?.files?.image?.url;
  if (cut && image.getAttribute("src") !== cut) {
    image.src = cut;
    image.alt = `Face ${index + 1}, cut out`;
    image.hidden = false;
  }
  const facts = [["score", face.score.toFixed(2)], ["turned", `${face.angle}°`]];
  for (const [name, answers] of Object.entries(steps)) {
    const answer = Array.isArray(answers) ? answers[index] : null;
    if (answer && name !== "crop") facts.push([name, describe(answer)]);
  }
  card.querySelector("dl").replaceChildren(...facts.flatMap(([name, value]) => [text("dt", name), text("dd", value)]));
}

/** Say in a line what a step has answered. */
function describe(answer) {
  if (answer.status !== "done") return answer.reason ?? "…";
  const { preds } = answer;
  if (Array.isArray(preds)) return preds.slice(0, 3).map((row) => `${row.at(-2)} ${Math.round(row.at(-1) * 100)} %`).join(", ");
  if (preds.problems) return preds.problems.length ? preds.problems.join(", ") : "can be seen well";
  if (preds.dimensions) return `a vector of ${preds.dimensions} values`;
  return Object.entries(preds).map(([name, value]) => `${name} ${value}`).join(", ");
}

deleteButton.addEventListener("click", async () => {
  deleteButton.disabled = true;
  try {
    const response = await fetch(`/requests/${current}/delete`, { method: "POST" });
    const answer = await response.json();
    if (answer.success) {
      current = null;
      result.hidden = true;
      URL.revokeObjectURL(photo.src);
      photo.removeAttribute("src");
      announce("Deleted.");
    } else show("failed", "not deleted", answer.reason);
  } catch {
    show("failed", "not deleted", "The server cannot be reached.");
  }
  deleteButton.disabled = false;
});

function show(kind, label, more = "") {
  state.className = `state ${kind}`;
  state.textContent = label;
  reason.textContent = more;
}

function make(name, attributes, content = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = content;
  return element;
}

function text(name, content) {
  const element = document.createElement(name);
  element.textContent = content;
  return element;
}
