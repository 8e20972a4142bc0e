// What every page has: times in the reader's own time zone, copy buttons, parts that keep themselves up to date, and
// forms that need no new page. Every page works without this.

const said = document.getElementById("said");

/** Tell those who do not see the page. */
export function say(words) {
  said.textContent = words;
}

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/** Show the times inside an element in the reader's own way. */
export function showTimes(inside) {
  for (const time of inside.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    if (!isNaN(moment)) {
      time.title = time.textContent;
      time.textContent = clock.format(moment);
    }
  }
}

/** Let the keyboard reach tables that scroll sideways. */
function reach(inside) {
  for (const region of inside.querySelectorAll(".wide")) region.tabIndex = 0;
}

/** Wait. */
export function pause(seconds) {
  return new Promise((done) => setTimeout(done, seconds * 1000));
}

showTimes(document);
reach(document);

// A picture that cannot be had leaves its frame.
document.addEventListener("error", (event) => {
  if (!(event.target instanceof HTMLImageElement)) return;
  const whole = event.target.closest(".picture a") ?? (event.target.closest(".thumb") && event.target);
  if (whole) whole.hidden = true;
}, true);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
    say("Copied");
  } catch {
    // Without https the clipboard is closed to scripts on other hosts than this one: select it for the reader.
    getSelection().selectAllChildren(source);
    button.textContent = "Press Ctrl C";
  }
  await pause(2);
  button.textContent = "Copy";
});

/** Take the parts of the page that have ids and changed from another copy of the same page. */
function takeOver(html, ids) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const id of ids) {
    const old = document.getElementById(id);
    const next = fresh.getElementById(id);
    if (!old || !next) continue;
    showTimes(next);
    reach(next);
    // What the reader opened stays open, and what has the focus keeps it.
    const open = [...old.querySelectorAll("details")].map((one) => one.open);
    next.querySelectorAll("details").forEach((one, place) => { one.open = open[place] ?? one.open; });
    merge(old, next);
  }
}

/** Make one element like another, and touch only what differs: pictures do not flicker, the focus stays. */
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
  children.forEach((child, place) => {
    const there = old.childNodes[place];
    if (there) merge(there, child);
    else old.append(child);
  });
  while (old.childNodes.length > children.length) old.lastChild.remove();
}

/** Keep a part up to date for as long as the server marks it with data-live, the address of its events if it has any. */
async function keepLive(id) {
  let news = null; // ends the present pause
  let isTold = false;
  const { live: address, liveSeconds } = document.getElementById(id).dataset;
  const seconds = Number(liveSeconds) || 2;
  const wake = () => news?.();
  let stream = null;
  const close = () => {
    stream?.close();
    stream = null;
    isTold = false;
  };
  const open = () => {
    if (!address || stream || document.hidden || !("EventSource" in window)) return;
    stream = new EventSource(address);
    stream.onopen = () => { isTold = true; };
    stream.onerror = () => { isTold = false; };
    for (const kind of ["request", "batch", "message"]) stream.addEventListener(kind, wake);
    stream.addEventListener("end", () => { close(); wake(); });
  };
  // A browser opens six connections to a host, all tabs together: those that nobody sees hold none.
  const look = () => {
    if (document.hidden) close();
    else open();
    wake();
  };
  document.addEventListener("visibilitychange", look);
  open();
  for (;;) {
    // Also when it is told of changes: why it waits changes without an event.
    await Promise.race([pause(isTold ? 5 : seconds), new Promise((done) => { news = done; })]);
    await pause(0.3); // events come in flocks
    if (document.hidden) continue;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (answer.ok) takeOver(await answer.text(), [id]);
      else await pause(5);
    } catch {
      await pause(5); // the server is away: it may come back
    }
    const part = document.getElementById(id);
    if (!part || !("live" in part.dataset)) {
      document.removeEventListener("visibilitychange", look);
      close();
      if (part) say("It is done.");
      return;
    }
  }
}

for (const part of document.querySelectorAll("[data-live][id]")) keepLive(part.id);

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
    const live = [...document.querySelectorAll("[data-live][id]")].map((part) => part.id);
    takeOver(await answer.text(), ["main"]);
    for (const part of document.querySelectorAll("[data-live][id]")) if (!live.includes(part.id)) keepLive(part.id);
    const main = document.getElementById("main");
    if (document.activeElement === document.body) main.focus();
    say(main.querySelector("[role=alert], .state")?.textContent ?? "Done.");
  } catch {
    form.submit(); // as without this script
  } finally {
    if (button) button.disabled = false;
  }
});
