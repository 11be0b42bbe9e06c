// Keeps the page for offline use and makes it cross-origin isolated, which threads need, where the server does not.
// VERSION, SHELL (path -> sha256 of the small files) and KEPT (keys of the large ones, which the page itself fetches)
// stand in front of this file.

const ROOT = new URL("./", self.location.href);
const CACHE = `cusprun ${ROOT.pathname}`;
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};
const keyOf = (path) => new URL(`${path}?sha256=${SHELL[path]}`, ROOT).href;

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(activate()));
self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== ROOT.origin || !url.pathname.startsWith(ROOT.pathname)) return;
  const path = decodeURIComponent(url.pathname.slice(ROOT.pathname.length)) || "index.html";
  if (path in SHELL) event.respondWith(answer(path, event.request));
});

async function install() {
  const cache = await caches.open(CACHE);
  await Promise.all(Object.keys(SHELL).map(async (path) => {
    if (!(await cache.match(keyOf(path)))) await cache.put(keyOf(path), await fetchChecked(path));
  }));
  await self.skipWaiting();
}

async function activate() {
  const cache = await caches.open(CACHE);
  const wanted = new Set([...Object.keys(SHELL).map(keyOf), ...KEPT.map((key) => new URL(key, ROOT).href)]);
  for (const request of await cache.keys()) if (!wanted.has(request.url)) await cache.delete(request);
  await self.clients.claim();
}

async function fetchChecked(path) {
  const response = await fetch(new URL(path, ROOT), { cache: "reload" });
  if (!response.ok) throw new Error(`${path}: HTTP ${response.status}`);
  const body = await response.arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", body));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== SHELL[path]) throw new Error(`${path} is of another version than ${VERSION}`);
  const type = response.headers.get("Content-Type") ?? "";
  return new Response(body, { headers: { "Content-Type": type, ...ISOLATION } });
}

async function answer(path, request) {
  const kept = await (await caches.open(CACHE)).match(keyOf(path));
  if (kept) return kept;
  const response = await fetch(request);
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
