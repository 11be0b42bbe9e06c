// The page: brings files and engine up, holds the talk, and says in words what goes wrong.

import { Engine, chooseThreads, lacking, needsCompat } from "./engine.js";
import { bring, canKeep } from "./files.js";

const at = (id) => document.getElementById(id);
const RELOADED = "cusprun reloaded";
const CONTROL_MS = 10_000;
const engine = new Engine();
let bundle;
let turns = []; // {role, content}, without the instructions
let used = 0; // tokens of the context after the last answer
let answering = null; // AbortController of the answer that is being given

start().catch(fail);

async function start() {
  lock(); // Firefox brings the state of the last visit back
  const missing = lacking();
  if (missing) {
    throw new Error(`This browser has no ${missing}. Use a Chrome, Edge, Firefox or Safari of the last two years.`);
  }
  const offline = await takeControl();
  if (offline === "reload") return location.reload();
  bundle = await (await fetch("bundle.json")).json();
  const compat = needsCompat();
  const wanted = [...Object.values(bundle.engine[compat ? "compat" : "default"]), ...bundle.model];
  const total = wanted.reduce((sum, file) => sum + file.bytes, 0);
  const { blobs, kept } = await bring(wanted, bundle.piece_bytes, (bytes) => {
    at("progress").value = bytes / total;
    at("loading-text").textContent = `Loading the model: ${megabytes(bytes)} of ${megabytes(total)}`;
  });
  at("progress").removeAttribute("value");
  at("loading-text").textContent = "Starting the model …";
  const threads = Number(new URLSearchParams(location.search).get("threads"));
  await engine.start(bundle, blobs, chooseThreads(threads), compat);
  at("loading").hidden = true;
  at("offline").textContent = offline ?? (kept ? "this page works without a network" : "no room on this device to keep the model");
  at("threads").textContent = engine.threads;
  at("isolation").textContent = crossOriginIsolated ? "the page may use threads" : "none, so there is one thread: see the README";
  at("memory").textContent = megabytes(engine.bytes);
  settle();
  tell("The model is ready.");
}

// Lets the service worker take over the page. Gives null when it did, "reload" when the page must be loaded through it
// to be isolated, and otherwise the reason why there is nothing offline.
async function takeControl() {
  if (!("serviceWorker" in navigator) || !canKeep()) {
    return isSecureContext ? "this browser keeps nothing" : "only from https or localhost";
  }
  let registration;
  try {
    registration = await navigator.serviceWorker.register("sw.js", { updateViaCache: "none" });
  } catch (error) {
    return `this browser keeps nothing (${error.message})`;
  }
  if (!navigator.serviceWorker.controller) await settled(registration);
  if (!navigator.serviceWorker.controller) return "the page's files are of two versions: load it again later";
  if (crossOriginIsolated) {
    sessionStorage.removeItem(RELOADED);
  } else if (!sessionStorage.getItem(RELOADED)) {
    sessionStorage.setItem(RELOADED, "once");
    return "reload";
  }
  return null;
}

// Until the service worker has the page, or has given up.
function settled(registration) {
  return new Promise((resolve) => {
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
    const worker = registration?.installing;
    worker?.addEventListener("statechange", () => worker.state === "redundant" && resolve());
    setTimeout(resolve, registration ? CONTROL_MS : 0);
  });
}

async function ask(question) {
  const [longest, temperature] = [at("longest").valueAsNumber, at("temperature").valueAsNumber];
  turns.push({ role: "user", content: question });
  show("asked", "You", question);
  const { box, text } = show("answered", bundle.name, "");
  box.classList.add("waiting");
  answering = new AbortController();
  settle();
  tell("The model is answering.");
  let figures = null;
  let forgotten = 0;
  // The oldest question and answer go until there is room for an answer.
  const room = Math.min(longest, Math.floor(bundle.context / 4));
  if (used + room > bundle.context && turns.length > 1) forgotten += turns.splice(0, 2).length / 2;
  try {
    for (;;) {
      try {
        const instructions = at("instructions").value.trim();
        const first = instructions ? [{ role: "system", content: instructions }] : [];
        const reason = await engine.answer([...first, ...turns], {
          longest,
          temperature,
          signal: answering.signal,
          onText: (piece) => {
            text.textContent += piece;
            follow();
          },
          onFigures: (found) => showFigures((figures = found)),
        });
        if (reason === "length") note(box, `cut at ${figures?.predicted_n ?? longest} tokens`);
        break;
      } catch (error) {
        if (!/context/i.test(error.message) || turns.length === 1) throw error;
        forgotten += turns.splice(0, 2).length / 2;
      }
    }
    tell("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      note(box, "stopped");
      tell("Stopped.");
    } else if (/context/i.test(error.message)) {
      note(box, `The question is longer than the ${bundle.context} tokens that fit: shorten it.`);
      turns.pop();
    } else {
      fail(error);
      return;
    }
  } finally {
    answering = null;
    box.classList.remove("waiting");
  }
  if (turns.at(-1)?.role === "user") turns.push({ role: "assistant", content: text.textContent });
  if (figures) used = (figures.cache_n ?? 0) + figures.prompt_n + figures.predicted_n;
  if (forgotten) note(box, `the context is full: the oldest ${forgotten} answers are forgotten`);
  settle();
  at("question").focus();
}

function show(kind, who, content) {
  const box = document.createElement("section");
  box.className = `turn ${kind}`;
  const name = box.appendChild(document.createElement("h2"));
  name.textContent = who;
  const text = box.appendChild(document.createElement("p"));
  text.dir = "auto";
  text.textContent = content;
  at("talk").append(box);
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  return { box, text };
}

function note(box, words) {
  const line = box.appendChild(document.createElement("p"));
  line.className = "note";
  line.textContent = `(${words})`;
  follow();
}

// Scrolls along with the answer unless the reader has scrolled up.
function follow() {
  const page = document.scrollingElement;
  if (page.scrollHeight - page.scrollTop - page.clientHeight < 160) page.scrollTop = page.scrollHeight;
}

function showFigures(figures) {
  at("speed").textContent = `${figures.predicted_per_second.toFixed(1)} tokens/s`;
  at("first").textContent = `${(figures.prompt_ms / 1000).toFixed(2)} s`;
}

// Brings buttons and fields in line with what can be done now.
function settle() {
  const busy = answering !== null;
  at("question").disabled = false;
  at("send").disabled = busy;
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("new").disabled = busy || turns.length === 0;
  at("talk").setAttribute("aria-busy", String(busy));
}

function lock() {
  for (const id of ["question", "send", "new"]) at(id).disabled = true;
  at("send").hidden = false;
  at("stop").hidden = true;
}

function fail(error) {
  console.info(error);
  at("loading").hidden = true;
  at("problem").hidden = false;
  at("problem-text").textContent = inWords(error);
  lock();
  at("problem").scrollIntoView({ block: "center" });
}

function inWords(error) {
  const size = bundle ? `, which has ${megabytes(bundle.model.reduce((sum, file) => sum + file.bytes, 0))} and needs more` : "";
  if (error.kind === "offline") {
    return `There is no connection, and not all of the model is on this device yet (${error.message}). Connect and try again; after one full load it works without a network.`;
  }
  if (error.kind === "missing") return `A file of the model is not where it should be: ${error.message}.`;
  if (error.kind === "damaged") {
    return `${error.message} is damaged or of another version than this page. Try again; if that does not help, the files have to be uploaded again.`;
  }
  if (error instanceof RangeError || /memory|alloc|OOM/i.test(error.message)) {
    return `This device has too little free memory for the model${size}. Close other pages and programs and try again. (${error.message})`;
  }
  return bundle ? `The model stopped: ${error.message}` : error.message;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const tell = (words) => (at("status").textContent = words);

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || at("send").disabled) return;
  if (!at("settings").reportValidity()) {
    at("about").open = true;
    return;
  }
  at("question").value = "";
  resize();
  ask(question).catch(fail);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("composer").requestSubmit();
  }
});
at("question").addEventListener("input", resize);
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => answering?.abort());
at("new").addEventListener("click", () => {
  turns = [];
  used = 0;
  at("talk").replaceChildren();
  settle();
  at("question").focus();
});
at("retry").addEventListener("click", () => location.reload());

function resize() {
  const field = at("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}
