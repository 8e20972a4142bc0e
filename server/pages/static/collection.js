// The pages of one collection: searches with an image that is chosen, dropped or pasted, and adds images.

import { refresh } from "./page.js";
import { acceptFiles, divide, resizeIfTooLarge } from "./upload.js";

const MAX_REASONS = 5;
const WAIT_SECONDS = 20;

const maxBytes = Number(document.getElementById("collection").dataset.maxBytes);

function say(zone, text) {
  zone.querySelector(".zone-status").textContent = text;
}

/** Call the API; an error is an answer without success. */
async function call(url, options) {
  try {
    const response = await fetch(url, { method: "POST", ...options });
    return await response.json();
  } catch {
    return { success: false, reason: "The server cannot be reached. Is it running?" };
  }
}

// Searching

/** Compute the vector of an image, and show what is similar to it. Its request's id is in the URL of that page. */
async function search(zone, options, go) {
  say(zone, "Looking for similar images…");
  const { search: url, find, page } = zone.dataset;
  const answer = await call(`${url ?? find}?k=1&wait=${WAIT_SECONDS}`, options);
  if (!answer.success) {
    say(zone, answer.reason);
    return;
  }
  const fields = new URLSearchParams(location.pathname === page ? location.search : "");
  fields.set("image", answer.req_id);
  go(`${page}?${fields}`);
}

for (const zone of document.querySelectorAll("form[data-search]")) {
  let isBusy = false;
  acceptFiles(zone, async ([file]) => {
    if (!file || isBusy) return;
    isBusy = true;
    const body = new FormData();
    body.append("image", await resizeIfTooLarge(file, maxBytes), file.name || "pasted.png");
    await search(zone, { body }, (url) => location.assign(url));
    isBusy = false;
  }, { takesPaste: true });
}

// The page of an image that has no vector yet: the reader asked for what is similar to it.
const unanswered = document.querySelector("form[data-find]");
if (unanswered) {
  const body = JSON.stringify({ req_id: new FormData(unanswered).get("image") });
  search(unanswered, { body, headers: { "Content-Type": "application/json" } }, (url) => location.replace(url));
}

// Adding

for (const zone of document.querySelectorAll("form[data-add]")) {
  let isBusy = false;
  acceptFiles(zone, async (files) => {
    if (!files.length || isBusy) return;
    isBusy = true;
    const label = document.getElementById("label").value.trim();
    const url = zone.dataset.add + (label ? `?${new URLSearchParams({ label })}` : "");
    const refused = [];
    let sent = 0;
    for (const part of divide(files, maxBytes)) {
      say(zone, `${sent} of ${files.length} sent…`);
      const body = new FormData();
      for (const file of part) body.append("image", await resizeIfTooLarge(file, maxBytes), file.name || "image");
      const answer = await call(url, { body });
      if (!answer.success) {
        refused.push(answer.reason);
        break;
      }
      sent += part.length;
      for (const item of answer.items) if (!item.req_id) refused.push(`${item.client_id}: ${item.reason}`);
      await refresh("images");
    }
    const more = refused.length > MAX_REASONS ? ` And ${refused.length - MAX_REASONS} more.` : "";
    say(zone, `${sent} of ${files.length} sent. ${refused.slice(0, MAX_REASONS).join(" ")}${more}`.trim());
    isBusy = false;
  });
}
