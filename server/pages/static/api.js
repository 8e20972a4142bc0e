// The forms of the API's page: each sends its call as a program would, and shows what comes back.

import { say } from "./page.js";

const key = document.getElementById("key");
const LONGEST = 200_000;

/** Put the fields of a form into an address and a body. */
function build(form) {
  let address = form.dataset.path;
  const query = new URLSearchParams();
  const files = new FormData();
  let text = null;
  for (const field of form.querySelectorAll("[data-place]")) {
    const { place } = field.dataset;
    if (place === "json") text = field.value;
    else if (place === "path") address = address.replace(`{${field.name}}`, encodeURIComponent(field.value));
    else if (field.type === "file") for (const file of field.files) files.append(field.name, file);
    else if (field.value === "") continue;
    else if (place === "query") query.set(field.name, field.value);
    else files.append(field.name, field.value);
  }
  const headers = {};
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  let body;
  if (text !== null) {
    headers["Content-Type"] = "application/json";
    body = text;
  } else if (form.dataset.body === "multipart/form-data") body = files;
  else if (form.dataset.body) body = new URLSearchParams([...files]);
  return { address: query.size ? `${address}?${query}` : address, options: { method: form.dataset.method, headers, body } };
}

/** Show an answer as it comes: some have no end. */
async function show(answer, place) {
  const kind = answer.headers.get("Content-Type") ?? "";
  if (/^(image|application\/(zip|octet-stream))/.test(kind)) {
    place.textContent = `${kind}, ${(await answer.blob()).size} bytes`;
    return;
  }
  const decoder = new TextDecoder();
  const reader = answer.body?.getReader();
  let text = "";
  while (reader) {
    const { done, value } = await reader.read();
    if (done) break;
    text += decoder.decode(value, { stream: true });
    if (text.length > LONGEST) {
      reader.cancel();
      text = `${text.slice(0, LONGEST)}\n… and more`;
      break;
    }
    place.textContent = text;
  }
  if (kind.startsWith("application/json")) {
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // Shown as it came.
    }
  }
  place.textContent = text;
}

for (const form of document.querySelectorAll("form.try")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const [send, stop] = form.querySelectorAll("button");
    const outcome = form.querySelector(".outcome");
    const [line, place] = outcome.children;
    const { address, options } = build(form);
    const control = new AbortController();
    stop.onclick = () => control.abort();
    outcome.hidden = false;
    stop.hidden = false;
    send.disabled = true;
    line.textContent = `${options.method} ${address}`;
    place.textContent = "";
    try {
      const answer = await fetch(address, { ...options, signal: control.signal });
      line.textContent = `${options.method} ${address}: ${answer.status} ${answer.statusText}`;
      say(`Answered with ${answer.status}`);
      await show(answer, place);
    } catch (error) {
      if (!control.signal.aborted) place.textContent = `The server does not answer (${error.message}).`;
    } finally {
      send.disabled = false;
      stop.hidden = true;
    }
  });
}
