// On every page: local times, copy buttons, live updates, and forms that are sent without loading a new page. All pages
// work without this script.

const announcements = document.getElementById("announcements");

/** Have a screen reader read a text. */
export function announce(text) {
  announcements.textContent = text;
}

const timeFormat = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/** Show the times inside an element in the reader's time zone and language. */
export function showLocalTimes(element) {
  for (const time of element.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    if (!isNaN(moment)) {
      time.title = time.textContent;
      time.textContent = timeFormat.format(moment);
    }
  }
}

/** Make tables that scroll sideways focusable, so that the keyboard can scroll them. */
function makeTablesFocusable(element) {
  for (const region of element.querySelectorAll(".table-scroll")) region.tabIndex = 0;
}

export function pause(seconds) {
  return new Promise((done) => setTimeout(done, seconds * 1000));
}

showLocalTimes(document);
makeTablesFocusable(document);

// Hide an image that cannot be loaded; its frame stays.
document.addEventListener("error", (event) => {
  if (!(event.target instanceof HTMLImageElement)) return;
  const failed = event.target.closest(".image-frame a") ?? (event.target.closest(".thumb") && event.target);
  if (failed) failed.hidden = true;
}, true);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
    announce("Copied");
  } catch {
    // Without https, scripts may use the clipboard on localhost only: select the text for the reader.
    getSelection().selectAllChildren(source);
    button.textContent = "Press Ctrl+C";
  }
  await pause(2);
  button.textContent = "Copy";
});

document.addEventListener("input", (event) => {
  const slider = event.target.closest(".compare input[type=range]");
  if (!slider) return;
  slider.parentElement.style.setProperty("--cut", `${slider.value}%`);
  slider.setAttribute("aria-valuetext", `${slider.value} % photo`);
});

/** Update the elements with these ids from a newer copy of the page. */
function update(html, ids) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const id of ids) {
    const old = document.getElementById(id);
    const next = fresh.getElementById(id);
    if (!old || !next) continue;
    showLocalTimes(next);
    makeTablesFocusable(next);
    // What the reader has opened stays open.
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    next.querySelectorAll("details").forEach((details, index) => { details.open = open[index] ?? details.open; });
    merge(old, next);
  }
}

/** Update elements from a newer copy of the page, and follow those that have become live. */
function show(html, ids) {
  const live = [...document.querySelectorAll("[data-live][id]")].map((element) => element.id);
  update(html, ids);
  for (const { id } of document.querySelectorAll("[data-live][id]")) if (!live.includes(id)) keepLive(id);
}

/** Update an element from the server now. */
export async function refresh(id) {
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.ok) show(await answer.text(), [id]);
  } catch {
    announce("The server cannot be reached.");
  }
}

/** Make one element equal to another by changing only the differences: images do not flicker, the focus stays. */
function merge(old, next) {
  if (old.nodeType !== next.nodeType || old.nodeName !== next.nodeName) {
    old.replaceWith(next);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== next.nodeValue) old.nodeValue = next.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) if (!next.hasAttribute(name) && name !== "hidden") old.removeAttribute(name);
  for (const { name, value } of [...next.attributes]) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const children = [...next.childNodes];
  children.forEach((child, index) => {
    const present = old.childNodes[index];
    if (present) merge(present, child);
    else old.append(child);
  });
  while (old.childNodes.length > children.length) old.lastChild.remove();
}

/** Update an element as long as it has the attribute data-live, whose value is the URL of its events, if it has any. */
async function keepLive(id) {
  let endPause = null;
  let isConnected = false;
  const { live: url, liveSeconds, showsProgress } = document.getElementById(id).dataset;
  const seconds = Number(liveSeconds) || 2;
  const wake = () => endPause?.();
  let stream = null;
  const close = () => {
    stream?.close();
    stream = null;
    isConnected = false;
  };
  const open = () => {
    if (!url || stream || document.hidden || !("EventSource" in window)) return;
    stream = new EventSource(url);
    stream.onopen = () => { isConnected = true; };
    stream.onerror = () => { isConnected = false; };
    const kinds = ["request", "batch", "message", ...(showsProgress === undefined ? [] : ["progress"])];
    for (const kind of kinds) stream.addEventListener(kind, wake);
    stream.addEventListener("end", () => { close(); wake(); });
  };
  // A browser opens six connections to a host, for all tabs together: hidden tabs use none.
  const onVisibilityChange = () => {
    if (document.hidden) close();
    else open();
    wake();
  };
  document.addEventListener("visibilitychange", onVisibilityChange);
  open();
  for (;;) {
    // With events too: the reason why a request waits changes without one.
    await Promise.race([pause(isConnected ? 5 : seconds), new Promise((done) => { endPause = done; })]);
    await pause(0.3); // several events often come together
    if (document.hidden) continue;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (answer.ok) update(await answer.text(), [id]);
      else await pause(5);
    } catch {
      await pause(5); // the server cannot be reached now
    }
    const element = document.getElementById(id);
    if (!element || !("live" in element.dataset)) {
      document.removeEventListener("visibilitychange", onVisibilityChange);
      close();
      if (element) announce("Finished.");
      return;
    }
  }
}

for (const element of document.querySelectorAll("[data-live][id]")) keepLive(element.id);

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!("inPlace" in form.dataset)) return;
  event.preventDefault();
  const button = event.submitter;
  if (button) button.disabled = true;
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      body: new URLSearchParams(new FormData(form)),
      headers: { Accept: "text/html" },
    });
    if (new URL(answer.url).pathname !== location.pathname) {
      location.assign(answer.url);
      return;
    }
    show(await answer.text(), ["main"]);
    const main = document.getElementById("main");
    if (document.activeElement === document.body) main.focus();
    announce(main.querySelector("[role=alert], .state")?.textContent ?? "Done.");
  } catch {
    form.submit(); // as if there were no script
  } finally {
    if (button) button.disabled = false;
  }
});
