// Follows requests until they have ended, with an event stream, or by polling where there is none.

import { pause } from "./page.js";

const MAX_STREAM_IDS = 60; // ids in the URL of an event stream, so that the URL does not get too long
const REASON_SECONDS = 4; // while a request waits there are no events, but the reason and the estimate change

/**
 * The requests that a page follows. An item has the `id` of its request.
 *
 * `onAnswer(item, answer)` gets what the server says of a request, again and again; it calls `remove` at the end.
 * `onProgress(item, report)` gets what a worker reports. `onUnreachable(item)` is called when the server cannot be
 * reached; it is tried again.
 */
export class RequestWatcher {
  #watched = new Map(); // request id -> item
  #hasEvents = "EventSource" in window;
  #stream = null;
  #streamed = new Set(); // request ids of the stream
  #isPolling = false;
  #openTimer = null;

  constructor({ onAnswer, onProgress = () => {}, onUnreachable }) {
    this.onAnswer = onAnswer;
    this.onProgress = onProgress;
    this.onUnreachable = onUnreachable;
    // A browser opens six connections to a host, for all tabs together: hidden tabs use none.
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#close();
      else this.#watch();
    });
  }

  add(item) {
    this.#watched.set(item.id, item);
    this.#watch();
    this.#refresh(item, 0);
  }

  remove(item) {
    this.#watched.delete(item.id);
  }

  #watch() {
    if (!this.#hasEvents) {
      this.#poll();
      return;
    }
    if (!this.#isPolling && this.#watched.size) this.#refreshReasons();
    const hasNew = [...this.#watched.keys()].some((id) => !this.#streamed.has(id));
    if (!hasNew || this.#openTimer || (this.#stream && this.#streamed.size >= MAX_STREAM_IDS)) return;
    this.#openTimer = setTimeout(() => {
      this.#openTimer = null;
      this.#open();
    }, 100); // requests sent together share a stream
  }

  #close() {
    this.#stream?.close();
    this.#stream = null;
    this.#streamed = new Set();
  }

  #open() {
    this.#close();
    if (document.hidden || !this.#watched.size) return;
    this.#streamed = new Set([...this.#watched.keys()].slice(0, MAX_STREAM_IDS));
    const opened = new EventSource(`/events?ids=${[...this.#streamed].join(",")}`);
    this.#stream = opened;
    const close = () => {
      opened.close();
      if (this.#stream !== opened) return false;
      this.#close();
      return true;
    };
    opened.addEventListener("request", (event) => {
      const answer = JSON.parse(event.data);
      const item = this.#watched.get(answer.req_id);
      if (item) this.onAnswer(item, { success: true, ...answer });
    });
    opened.addEventListener("progress", (event) => {
      const report = JSON.parse(event.data);
      const item = this.#watched.get(report.req_id);
      if (item) this.onProgress(item, report);
    });
    opened.addEventListener("end", () => {
      if (close() && this.#watched.size) this.#watch();
    });
    opened.addEventListener("error", () => {
      // The browser reconnects by itself, except after the server has refused the stream.
      if (opened.readyState === EventSource.CLOSED && close()) {
        this.#hasEvents = false;
        this.#watch();
      }
    });
  }

  async #refreshReasons() {
    this.#isPolling = true;
    let next = 0;
    while (this.#hasEvents && this.#watched.size) {
      await pause(REASON_SECONDS);
      const items = [...this.#watched.values()];
      for (let count = 0; count < Math.min(3, items.length); count += 1) {
        await this.#refresh(items[next % items.length], 0);
        next += 1;
      }
    }
    this.#isPolling = false;
    this.#watch();
  }

  /** Read the unfinished requests again and again, two at a time, in turn. */
  async #poll() {
    if (this.#isPolling) return;
    this.#isPolling = true;
    try {
      while (this.#watched.size) {
        const items = [...this.#watched.values()].slice(0, 2);
        // The server holds a read until there is a result, but not so long that what is shown gets old.
        await Promise.all(items.map((item) => this.#refresh(item, this.#watched.size > 2 ? 1 : 4)));
        for (const item of items) {
          if (this.#watched.delete(item.id)) this.#watched.set(item.id, item); // now the last one
        }
      }
    } finally {
      this.#isPolling = false;
    }
  }

  async #refresh(item, wait) {
    const { id } = item;
    try {
      const response = await fetch(`/readPrediction/${id}?wait=${wait}`);
      const answer = await response.json();
      if (this.#watched.get(id) === item) this.onAnswer(item, answer);
      if (!answer.success) await pause(2);
    } catch {
      this.onUnreachable(item);
      await pause(2);
    }
  }
}

/** Format seconds for people. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 2) return "a moment";
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.round(whole / 60)} min`;
  return `${(whole / 3600).toFixed(1)} h`;
}

/** Say why a request waits, and how long. */
export function waitingText(answer) {
  const eta = answer.eta_seconds === null || answer.eta_seconds === undefined ? "" : ` Ready in about ${duration(answer.eta_seconds)}.`;
  return `${answer.waiting_for ?? "Waiting."}${eta}`;
}

// Parts of a card

export function setState(card, state, label) {
  card.state.className = `state ${state}`;
  card.state.textContent = label;
  card.element.classList.toggle("failed", state === "failed");
}

export function showReason(card, text) {
  if (card.reason.textContent !== text) card.reason.textContent = text;
  card.reason.hidden = false;
}
