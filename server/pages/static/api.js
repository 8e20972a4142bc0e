// The forms of the API reference: each sends its call as a program would and shows the response.

import { announce } from "./page.js";

const key = document.getElementById("key");
const MAX_CHARACTERS = 200_000;

/** Make the URL and the options of `fetch` from the fields of a form. */
function buildRequest(form) {
  let url = form.dataset.path;
  const query = new URLSearchParams();
  const files = new FormData();
  const headers = {};
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  let text = null;
  for (const field of form.querySelectorAll("[data-location]")) {
    const { location } = field.dataset;
    if (location === "json") text = field.value;
    else if (location === "path") url = url.replace(`{${field.name}}`, encodeURIComponent(field.value));
    else if (field.type === "file") for (const file of field.files) files.append(field.name, file);
    else if (field.value === "") continue;
    else if (location === "query") query.set(field.name, field.value);
    else if (location === "header") headers[field.name] = field.value;
    else files.append(field.name, field.value);
  }
  let body;
  if (text !== null) {
    headers["Content-Type"] = "application/json";
    body = text;
  } else if (form.dataset.body === "multipart/form-data") body = files;
  else if (form.dataset.body) body = new URLSearchParams([...files]);
  return { url: query.size ? `${url}?${query}` : url, options: { method: form.dataset.method, headers, body } };
}

/** Show a response while it is received: event streams have no end. */
async function showResponse(response, output) {
  const kind = response.headers.get("Content-Type") ?? "";
  if (/^(image|application\/(zip|octet-stream))/.test(kind)) {
    output.textContent = `${kind}, ${(await response.blob()).size} bytes`;
    return;
  }
  const decoder = new TextDecoder();
  const reader = response.body?.getReader();
  let text = "";
  while (reader) {
    const { done, value } = await reader.read();
    if (done) break;
    text += decoder.decode(value, { stream: true });
    if (text.length > MAX_CHARACTERS) {
      reader.cancel();
      text = `${text.slice(0, MAX_CHARACTERS)}\n… and more`;
      break;
    }
    output.textContent = text;
  }
  if (kind.startsWith("application/json")) {
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // Not JSON: shown unchanged.
    }
  }
  output.textContent = text;
}

for (const form of document.querySelectorAll("form.try")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const [send, stop] = form.querySelectorAll("button");
    const outcome = form.querySelector(".outcome");
    const [line, output] = outcome.children;
    const { url, options } = buildRequest(form);
    const controller = new AbortController();
    stop.onclick = () => controller.abort();
    outcome.hidden = false;
    stop.hidden = false;
    send.disabled = true;
    line.textContent = `${options.method} ${url}`;
    output.textContent = "";
    try {
      const response = await fetch(url, { ...options, signal: controller.signal });
      line.textContent = `${options.method} ${url}: ${response.status} ${response.statusText}`;
      announce(`Status ${response.status}`);
      await showResponse(response, output);
    } catch (error) {
      if (!controller.signal.aborted) output.textContent = `The server cannot be reached (${error.message}).`;
    } finally {
      send.disabled = false;
      stop.hidden = true;
    }
  });
}
