// Brings the large files of the bundle here, checks every piece of them and keeps them for offline use.

export class FileError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind; // "offline", "missing" or "damaged"
  }
}

const CACHE = `cusprun ${new URL("./", location.href).pathname}`;
export const keyOf = (file) => `${file.path}?sha256=${file.sha256}`;

// Whether this browser can keep files: only for https and localhost.
export const canKeep = () => "caches" in globalThis;

// The files as Blobs, by path. `report` is told the bytes that are here. `kept` is false where there was no room.
export async function bring(files, pieceBytes, report) {
  const cache = canKeep() ? await caches.open(CACHE) : null;
  const here = new Map();
  const blobs = new Map();
  let kept = cache !== null;
  for (const file of files) {
    const tell = (bytes) => {
      here.set(file.path, bytes);
      report([...here.values()].reduce((sum, one) => sum + one, 0));
    };
    let blob = cache && (await find(cache, file));
    if (!blob && kept) {
      try {
        await cache.put(keyOf(file), await fetchChecked(file, pieceBytes, tell));
        blob = await find(cache, file);
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        kept = false;
      }
    }
    blob ??= await (await fetchChecked(file, pieceBytes, tell)).blob();
    tell(file.bytes);
    blobs.set(file.path, blob);
  }
  return { blobs, kept };
}

async function find(cache, file) {
  const blob = await (await cache.match(keyOf(file)))?.blob();
  return blob?.size === file.bytes ? blob : null;
}

async function fetchChecked(file, pieceBytes, tell) {
  let response;
  try {
    response = await fetch(file.path, { cache: "no-cache" });
  } catch (error) {
    throw new FileError("offline", file.path);
  }
  if (!response.ok) throw new FileError("missing", `${file.path}: HTTP ${response.status}`);
  const type = file.path.endsWith(".wasm") ? "application/wasm" : "application/octet-stream";
  const body = response.body.pipeThrough(checking(file, pieceBytes, tell));
  return new Response(body, { headers: { "Content-Type": type } });
}

// Passes a file on in pieces, each only when its hash is right.
function checking(file, pieceBytes, tell) {
  let piece = new Uint8Array(pieceBytes);
  let filled = 0;
  let index = 0;
  const damaged = () => new FileError("damaged", file.path);
  const check = async (bytes) => {
    const wanted = file.pieces[index++];
    if (wanted === undefined) throw damaged();
    if (!globalThis.crypto?.subtle) return; // plain http: nothing could be trusted there anyway
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== wanted) throw damaged();
  };
  return new TransformStream({
    async transform(data, controller) {
      for (let rest = data; rest.length; ) {
        const part = rest.subarray(0, pieceBytes - filled);
        piece.set(part, filled);
        filled += part.length;
        rest = rest.subarray(part.length);
        if (filled === pieceBytes) {
          await check(piece);
          controller.enqueue(piece);
          piece = new Uint8Array(pieceBytes);
          filled = 0;
        }
      }
      tell(Math.min(file.bytes, index * pieceBytes + filled));
    },
    async flush(controller) {
      const last = piece.subarray(0, filled);
      if (filled) await check(last);
      if (index !== file.pieces.length) throw damaged();
      if (filled) controller.enqueue(last);
    },
  });
}
